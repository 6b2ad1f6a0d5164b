"""Updates of a language model of 8B weights on 256 devices: compiled, never run."""

import json
import pathlib
import subprocess
import sys

import pytest
import scale

DEVICES = 256


def compile_update(method, kind):
    command = [sys.executable, scale.__file__, method, kind, str(DEVICES)]
    done = subprocess.run(
        command,
        cwd=pathlib.Path(scale.__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    needs = json.loads(done.stdout.splitlines()[-1])
    print(needs)  # seen where a test fails, and with -rP
    return needs


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    ("method", "layers", "masks", "temporaries"),
    [
        # How many layers (or leaves of one pool) are counted, bytes a weight that the
        # state holds beside the momentum, temporaries as a share of the arguments.
        ("gsm", 6, 0, 1e-4),
        ("sparse_momentum", 2 + 5 * 32, 1, 0.1),
        ("whole_leaves", 8, 1, 0.1),
    ],
)
def test_update(method, layers, masks, temporaries, kind):
    needs = compile_update(method, kind)
    share = needs["weights"] / DEVICES
    assert needs["weights"] > 8e9
    assert method == "whole_leaves" or needs["largest_leaf"] > 2**31
    # Shards of parameters, gradients and momentum, 4 bytes each, and of masks: next to
    # nothing else, and no leaf on every device.
    assert needs["argument_bytes"] < 1.001 * (12 + masks) * share
    assert needs["output_bytes"] < 1.001 * (8 + masks) * share
    assert needs["temporary_bytes"] < temporaries * needs["argument_bytes"]
    # Seven counts a layer at most, and no more sums with more leaves.
    sums = needs["collectives"]
    assert set(sums) == {"all-reduce"}, sums
    assert max(sums["all-reduce"]) <= 7 * layers, sums
    assert len(sums["all-reduce"]) <= 12, sums
