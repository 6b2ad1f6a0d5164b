"""Checkpoints through Orbax: a run goes on with the same bits, whatever stopped it.

The runs themselves are in ``checkpoints.py``, which also trains in processes of its
own: where a checkpoint is restored, nothing of the process that saved it is left.
"""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("orbax.checkpoint")

import checkpoints
from helpers import as_users_compile, cpu_devices

import sparse_optax
from sparse_optax import layers, masks
from sparse_optax.masks import tree

SAVED, RESUMED, ON_MESH = 35, 85, 45


# Every process compiles a program once, all of them together.
CACHE = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # The address of a callback, which differs although the program is the same.
    "jax_remove_custom_partitioning_ptr_from_cache_key": True,
}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """What child processes start with."""
    cache = pytest.importorskip("jax.experimental.compilation_cache.compilation_cache")
    folder = str(tmp_path_factory.mktemp("compiled"))
    options = CACHE | {"jax_compilation_cache_dir": folder}
    before = {name: getattr(jax.config, name) for name in options}
    root = str(pathlib.Path(sparse_optax.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    for settings in (options, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        cache.reset_cache()
        if settings is options:
            yield {
                **os.environ,
                **{name.upper(): str(value) for name, value in options.items()},
                "PYTHONPATH": os.pathsep.join(paths),
            }


def program(*arguments):
    return [sys.executable, checkpoints.__file__, *map(str, arguments)]


def succeed(arguments, environment):
    done = subprocess.run(
        program(*arguments),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def unbroken():
    """Per method the run after SAVED, ON_MESH and RESUMED steps, and gradients."""
    runs = {}
    for method, make in checkpoints.METHODS.items():
        tx = make()
        saved, _ = checkpoints.train(tx, checkpoints.start(tx), 0, SAVED)
        middle, gradients = checkpoints.train(tx, saved, SAVED, ON_MESH)
        end, _ = checkpoints.train(tx, middle, ON_MESH, RESUMED)
        runs[method] = saved, gradients, end
    return runs


@pytest.fixture(scope="module")
def folder(unbroken, tmp_path_factory):
    """A folder with a checkpoint of every method after SAVED steps."""
    folder = tmp_path_factory.mktemp("runs")
    for method, (saved, _, _) in unbroken.items():
        checkpoints.save(folder / method, SAVED, saved)
    return folder


def assert_same_bits(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, x in arrays.items():
        y = expected[name]
        assert (x.shape, x.dtype) == (y.shape, y.dtype), name
        assert x.tobytes() == y.tobytes(), name


def read(path):
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_resumed_in_another_process(folder, unbroken, environment):
    succeed(["resume", folder, RESUMED], environment)
    for method, (saved, _, end) in unbroken.items():
        end, saved = checkpoints.flat(end), checkpoints.flat(saved)
        assert_same_bits(read(folder / f"{method}.npz"), end)
        # Else equal masks and keys would mean little.
        moved = [n for n in end if end[n].dtype == bool]
        moved = {n for n in moved if (end[n] != saved[n]).any()}
        assert sum("kernel" in name for name in moved) == 2, (method, moved)


@as_users_compile
@pytest.mark.parametrize("method", ["sparse_momentum", "random_growth", "gsm"])
def test_restored_on_another_mesh(method, folder, unbroken, environment):
    """Saved on one device, restored on 4 x 2: ten steps with the same gradients."""
    saved, gradients, _ = unbroken[method]
    step, run, expected = checkpoints.stepper(checkpoints.METHODS[method]()), saved, {}
    for t, gradient in enumerate(gradients):
        run = step(run, gradient)
        expected |= {f"{t}{path}": x for path, x in checkpoints.flat(run).items()}
    stacked = jax.tree.map(lambda *g: np.stack(g), *gradients)
    np.savez(folder / "gradients.npz", *jax.tree.leaves(stacked))
    succeed(["reshard", folder, method, ON_MESH], environment | cpu_devices(8))
    assert_same_bits(read(folder / f"{method}_on_mesh.npz"), expected)


def test_packed_masks(tmp_path):
    params = checkpoints.first_params()
    mask = jax.tree.map(lambda x: masks.pack(x > 0), params)
    checkpoints.save(tmp_path, 1, mask)
    _, restored = checkpoints.restore(tmp_path, mask)
    jax.tree.map(np.testing.assert_array_equal, restored, mask)


# --- another density ------------------------------------------------------------------
@pytest.mark.parametrize("density", [0.1, 0.4])
@pytest.mark.parametrize("method", ["sparse_momentum", "random_growth"])
def test_regrow_goes_on_at_another_density(method, density, folder):
    """The recipe: restore, new masks, ``set_masks``, ``sparsify``, and go on.

    The density given to the optimizer only makes the first masks; from then on a
    state keeps the number of weights that its masks have. So the optimizer of the
    restored run may be built with the old density or the new one.
    """
    tx = checkpoints.METHODS[method](density)
    _, run = checkpoints.restore(folder / method, checkpoints.start(tx))
    params, state = run["params"], run["opt_state"]
    old = sparse_optax.get_masks(state)
    if density < 0.25:
        new = masks.magnitude_masks(params, density, where=lambda n, x: x.ndim == 2)
    else:
        new = masks.random_masks(5, params, density, keep=old)
    state = sparse_optax.set_masks(state, new)
    params = sparse_optax.sparsify(params, state)
    run = {"params": params, "opt_state": state}

    sizes = [w.size for w in jax.tree.leaves(params) if w.ndim == 2]
    total = int(density * sum(sizes))
    if density > 0.25:
        total = sum(int(density * size) for size in sizes)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            assert not np.any(a & ~b), "a kept weight is gone"
    before = new
    step, moves = checkpoints.stepper(tx), []
    for t in range(SAVED, SAVED + 2 * checkpoints.PERIOD + 2):
        run = step(run, checkpoints.gradient(run, t))
        kept = sparse_optax.get_masks(run["opt_state"])
        assert masks.count(kept) == total
        for name, mask in zip(
            layers.leaf_names(kept), tree.flatten(kept)[0], strict=True
        ):
            if not layers.is_hole(mask):
                layer, leaf = name.split("/")
                assert not run["params"][layer][leaf][~mask].any(), name
        changed = masks.combine(jnp.logical_xor, before, kept)
        moves += [t] if masks.count(changed) else []
        before = kept
    assert moves == [36, 40, 44]


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_gsm_goes_on_at_another_density(density, folder):
    """Nothing to convert: the state of GSM does not depend on the density."""
    tx = checkpoints.gsm(density)
    _, run = checkpoints.restore(folder / "gsm", checkpoints.start(tx))
    quota = int(density * sum(m * n for m, n in itertools.pairwise(checkpoints.SIZES)))
    step = checkpoints.stepper(tx)
    for t in range(SAVED, 63):
        run = step(run, checkpoints.gradient(run, t))
        gate = run["opt_state"][0]
        assert sum(jax.tree.leaves(gate.gsm_passed)) == quota
        assert masks.count(gate.gsm_active) == quota


# --- killed ---------------------------------------------------------------------------
KILLS = int(os.environ.get("SPARSE_OPTAX_KILLS", "4"))
EVERY = 5
STEPS = 16 * KILLS + 40


def torn(folder):
    """Checkpoints that were begun and not finished."""
    return list((folder / "checkpoints").glob("*orbax-checkpoint-tmp*"))


class Process:
    """The training program, and what it has told so far."""

    def __init__(self, folder, environment):
        self.popen = subprocess.Popen(
            program("train", folder, "sparse_momentum", STEPS, EVERY),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.lines = []

    def read(self):
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if line:
            event, step = line.split()
            self.lines.append((event, int(step)))
        return bool(line)

    def read_until(self, condition):
        while not (self.lines and condition(*self.lines[-1])):
            if not self.read():
                break

    def kill(self):
        """``kill -9``, and the lines that were still on their way."""
        self.popen.send_signal(signal.SIGKILL)
        with self.popen:
            while self.read():
                pass
        return self.popen.returncode

    def last(self, event):
        return max((step for name, step in self.lines if name == event), default=0)


def strike(process, moment, folder, rng):
    """Lets the program run up to a random moment of one kind."""
    if moment == "start":
        time.sleep(rng.uniform(0, 3))
        return
    process.read_until(lambda event, _: event == "restored")
    target = process.last("restored") + int(rng.integers(3, 3 * EVERY))
    if moment == "step":
        process.read_until(lambda event, step: event == "step" and step >= target)
        time.sleep(rng.uniform(0, 0.02))
        return
    process.read_until(lambda event, step: event == "saving" and step >= target - EVERY)
    deadline = time.monotonic() + 5
    while not torn(folder) and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, 0.01))


def test_killed_and_restarted(tmp_path, environment):
    """By kill -9 at random moments: only steps since the last checkpoint are lost."""
    rng = np.random.default_rng(0)
    finished, begun, strikes, torn_writes = 0, 0, 0, 0
    moments = ["write", "step", "start", "write"]
    while strikes < KILLS or not torn_writes:
        assert strikes < KILLS + 10, "no kill fell into the write of a checkpoint"
        moment = moments[strikes % 4] if strikes < KILLS else "write"
        process = Process(tmp_path, environment)
        strike(process, moment, tmp_path, rng)
        alive = process.popen.poll() is None
        status = process.kill()
        if not alive or status != -signal.SIGKILL:
            break
        strikes += 1
        torn_writes += bool(torn(tmp_path))
        if process.lines:
            # A checkpoint may be finished and the program killed before it says so.
            assert process.last("restored") in (finished, begun)
            finished = max(process.last("restored"), process.last("saved"))
            begun = max(finished, process.last("saving"))
    assert strikes >= KILLS, f"the program was done after {strikes} kills"
    succeed(["train", tmp_path, "sparse_momentum", STEPS, EVERY], environment)
    tx = checkpoints.sparse_momentum()
    expected, _ = checkpoints.train(tx, checkpoints.start(tx), 0, STEPS)
    assert_same_bits(read(tmp_path / "result.npz"), checkpoints.flat(expected))
    assert not torn(tmp_path)
