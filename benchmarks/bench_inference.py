"""Inference of a trained sparse network: dense, compacted, and in sparse matrices.

    python benchmarks/bench_inference.py
    python benchmarks/bench_inference.py --model lenet-5-caffe --density 0.05

The network is trained first by sparse momentum, or read from ``--runs``. All forms take
turns in one run; each figure is the least of all rounds. For one core:

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
        taskset -c 1 python benchmarks/bench_inference.py

Sparse matrices, BCSR of JAX and CSR of SciPy, stand for dense layers only.
"""

import argparse
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import sparse_optax
from sparse_optax.experiments import config, models, train
from sparse_optax.export.timing import least_seconds

SHAPES = {"mnist": (28, 28, 1), "digits": (8, 8, 1)}


def trained(args):
    """A trained network: its function and parameters."""
    run = config.TrainConfig(
        dataset=args.dataset,
        model=args.model,
        method="sparse_momentum",
        density=args.density,
        epochs=args.epochs,
    )
    done = train.train(run, runs=args.runs)
    print(f"test error {done.record.results['test_error']:.2f}%")
    key, shape = jax.random.key(0), SHAPES[args.dataset]
    apply, _ = models.create(args.model, shape, 10, key=key)
    return apply, jax.tree.map(jnp.asarray, done.params), shape


def in_matrices(params):
    """LeNet-300-100 in sparse matrices: of JAX and of SciPy."""
    names = ("fc1", "fc2", "fc3")
    masks = {n: {"kernel": params[n]["kernel"] != 0} for n in names}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.sparse")
        sparse_optax.save_sparse(path, params, masks)
        model = sparse_optax.load_sparse(path)
    kernels = [model.to_bcsr(f"{n}/kernel", transpose=True) for n in names]
    biases = [params[n]["bias"] for n in names]

    @jax.jit
    def bcsr(x):
        y = x.reshape(x.shape[0], -1).T
        for i, (w, b) in enumerate(zip(kernels, biases, strict=True)):
            y = w @ y + b[:, None]
            y = y if i == len(names) - 1 else jnp.maximum(y, 0)
        return y.T

    rows = [model.to_csr(f"{n}/kernel", transpose=True) for n in names]
    offsets = [np.asarray(b)[:, None] for b in biases]

    def scipy(x):
        y = x.reshape(x.shape[0], -1).T
        for i, (w, b) in enumerate(zip(rows, offsets, strict=True)):
            y = w @ y + b
            y = y if i == len(names) - 1 else np.maximum(y, 0)
        return y.T

    return bcsr, scipy


def main():
    """Prints the sizes and a table of times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="mnist", choices=sorted(SHAPES))
    parser.add_argument("--model", default="lenet-300-100")
    parser.add_argument("--density", type=float, default=0.02)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256, 4096])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--runs", default="runs")
    args = parser.parse_args()
    apply, params, shape = trained(args)
    dense = jax.jit(apply)
    columns = {}
    for batch in args.batches:
        x = jax.random.normal(jax.random.key(1), (batch, *shape))
        calls = {"dense": lambda x=x: dense(params, x)}
        for n in args.round_to:
            small = sparse_optax.compact(apply, params, x, round_to=n)
            run, own = jax.jit(small), small.params
            calls[f"compact, {n}"] = lambda x=x, run=run, own=own: run(own, x)
        if args.model == "lenet-300-100":
            bcsr, scipy = in_matrices(params)
            calls["BCSR"] = lambda x=x, bcsr=bcsr: bcsr(x)
            rows = np.asarray(x)
            calls["SciPy"] = lambda x=rows, scipy=scipy: scipy(x)
        expected = np.asarray(dense(params, x))
        for name, call in calls.items():
            gap = np.abs(np.asarray(call()) - expected).max()
            assert gap < 1e-3, (name, gap)
        seconds = least_seconds(calls, rounds=args.rounds, turn=0.03)
        columns[batch] = {name: 1000 * each for name, each in seconds.items()}
    print(small_table(apply, params, shape))
    names = list(columns[args.batches[0]])
    print("| ms | " + " | ".join(f"batch {b}" for b in columns) + " |")
    print("|---|" + "---:|" * len(columns))
    for name in names:
        cells = [
            f"{found[name]:.3g} ({found['dense'] / found[name]:.2f}x)"
            for found in columns.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def small_table(apply, params, shape):
    """What went, layer by layer."""
    x = jnp.ones((1, *shape))
    return sparse_optax.compact(apply, params, x).record.table()


if __name__ == "__main__":
    main()
