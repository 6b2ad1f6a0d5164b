"""What tests on several devices need: a process that has them, meshes, their traffic.

A process has as many CPU devices as its first import of JAX was told, so a test file
runs again in a process of its own, which its first test starts.
"""

import math
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

EIGHT = jax.device_count() == 8
on_eight = pytest.mark.skipif(not EIGHT, reason="needs a process with eight devices")
not_on_eight = pytest.mark.skipif(EIGHT, reason="this is the process with eight")

KINDS = [AxisType.Auto, AxisType.Explicit]


def run_on_eight_devices(file, passed):
    """Runs a test file where JAX has eight CPU devices; ``passed`` tests must pass."""
    # Without the flags of this process: meshes give the bits of one device as users
    # compile, and not with fusions switched off.
    flags = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    done = subprocess.run(
        # All tests of the file, also those that the default run leaves out.
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "",
            file,
        ],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed, 1 skipped" in done.stdout, done.stdout


def mesh_of(kind):
    """Eight devices, 4 x 2."""
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def placed(tree, mesh, specs):
    """Puts a tree on a mesh; ``specs`` has a spec for each leaf, or for a subtree."""

    def put(spec, subtree):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.device_put(x, sharding), subtree)

    return jax.tree.map(put, specs, tree, is_leaf=lambda x: isinstance(x, P))


_COLLECTIVE = re.compile(
    r"= \(?(.*?)\)? (all-gather|all-reduce|all-to-all|ragged-all-to-all|"
    r"collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
)


def collectives(program):
    """Kinds of communication in a program, with the elements that each one moves.

    ``program`` is compiled, or the text of one.
    """
    text = program if isinstance(program, str) else program.as_text()
    sizes = {}
    for shapes, kind in _COLLECTIVE.findall(text):
        for dims in re.findall(r"\w+\[([\d,]*)\]", shapes):
            number = math.prod(int(d) for d in dims.split(",") if d)
            sizes.setdefault(kind, []).append(number)
    return sizes


def entry(program):
    """The text of what a program always runs: no branch and no body of a loop."""
    text = program.as_text()
    start = text.index("\nENTRY ")
    return text[start : text.index("\n}", start)]


def assert_small_sums_only(program, most, number=None):
    """All-reduces of at most ``most`` elements, ``number`` of them, nothing else."""
    sizes = collectives(program)
    assert set(sizes) == {"all-reduce"}, sizes
    assert max(sizes["all-reduce"]) <= most, sizes
    assert number is None or len(sizes["all-reduce"]) <= number, sizes


def assert_same_bits(trees, expected):
    """Two trees of one structure hold the same bits, leaf by leaf."""
    assert jax.tree.structure(trees) == jax.tree.structure(expected)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(trees),
        jax.tree.leaves(expected),
        strict=True,
    ):
        name, x, y = jax.tree_util.keystr(path), np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        different = np.sum(x.reshape(-1).view(np.uint8) != y.reshape(-1).view(np.uint8))
        assert not different, f"{name}: {different} of {x.nbytes} bytes differ"
