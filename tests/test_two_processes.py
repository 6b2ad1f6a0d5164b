"""Two real processes over loopback: one mesh, the same bits, resumed after a stop."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import two_processes as job
from helpers import as_users_compile, cpu_devices

import sparse_optax

SCRIPT = pathlib.Path(job.__file__)
LIMIT = 240  # seconds for a pair of processes; about 30 are needed


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_pair(folder, task):
    """Runs both processes of a task to their end, or kills them and says why."""
    port = free_port()
    environment = cpu_devices(job.DEVICES) | {"JAX_PLATFORMS": "cpu"}
    logs = [folder / f"{task}-{rank}.log" for rank in range(job.PROCESSES)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with open(log, "w") as output:
                command = [sys.executable, SCRIPT, folder, str(port), str(rank), task]
                processes.append(
                    subprocess.Popen(
                        command,
                        env=os.environ | environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        end = time.monotonic() + LIMIT
        # One that dies leaves the other waiting for it.
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.poll() not in (None, 0) for p in processes):
                break
            time.sleep(0.1)
        codes = [p.poll() for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                os.killpg(p.pid, signal.SIGKILL)
            p.wait()
    if codes != [0] * job.PROCESSES:
        tails = "\n".join(
            f"--- rank {rank}, exit code {code} (None: killed after {LIMIT} s or when "
            f"the other failed)\n{log.read_text()[-4000:]}"
            for rank, (code, log) in enumerate(zip(codes, logs, strict=True))
        )
        pytest.fail(f"{task} on {job.PROCESSES} processes\n{tails}", pytrace=False)
    with np.load(folder / f"{task}.npz") as results:
        return dict(results)


@pytest.fixture(scope="module")
def data():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    test, train = order[:360], order[360:]
    return {
        "train_x": images[train],
        "train_y": labels[train],
        "test_x": images[test],
        "test_y": labels[test],
    }


@pytest.fixture(scope="module")
def on_one():
    return {method: job.Training(method) for method in job.METHODS}


@pytest.fixture(scope="module")
def recorded(data, on_one):
    return {method: job.record(run, data) for method, run in on_one.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data, recorded):
    folder = tmp_path_factory.mktemp("two_processes")
    given = dict(data)
    for method, (gradients, _) in recorded.items():
        for t, gradient in enumerate(gradients):
            given |= job.flat(f"{method}/gradient/{t}", gradient)
    np.savez(folder / "given.npz", **given)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    return run_pair(folder, "train")


@pytest.fixture(scope="module")
def resumed(folder, trained):
    del trained  # leaves the checkpoint
    return run_pair(folder, "resume")


def assert_same(results, expected):
    assert results.keys() == expected.keys()
    for name, x in expected.items():
        assert x.dtype == results[name].dtype, name
        np.testing.assert_array_equal(results[name], x, err_msg=name)


def of(prefix, results):
    return {name: x for name, x in results.items() if name.startswith(prefix)}


@as_users_compile
@pytest.mark.parametrize("method", job.METHODS)
def test_recorded_gradients_give_the_bits_of_one_process(method, recorded, trained):
    prefix = f"{method}/replay"
    assert_same(of(prefix, trained), job.flat(prefix, recorded[method][1]))


def test_the_recorded_run_has_cycles(recorded):
    trail = recorded["sparse_momentum"][1]
    masks = [sparse_optax.get_masks(state) for _, state in trail]
    moved = sum(
        int(np.sum(a != b))
        for a, b in zip(
            jax.tree.leaves(masks[0]), jax.tree.leaves(masks[-1]), strict=True
        )
    )
    assert moved > 100


@pytest.mark.parametrize("method", job.METHODS)
def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(method, trained, resumed):
    end = of(f"{method}/end", trained)
    assert len(end) > 6
    assert_same(of(f"{method}/end", resumed), end)


@pytest.mark.parametrize("method", job.METHODS)
def test_error_is_that_of_one_process(method, data, on_one, trained):
    run, errors = on_one[method], []
    for seed in job.SEEDS:
        params, _ = run.train(data, seed, *run.start(seed), 0, job.STEPS)
        errors.append(run.error(params, data))
    two = trained[f"{method}/errors"]
    assert np.max(errors) < 15, "the network has not learned"
    # Sums in another order lead to other masks: as far apart as two seeds, at most.
    spread = max(np.ptp(errors), 1.0)
    assert abs(np.mean(two) - np.mean(errors)) <= spread, (errors, two)
