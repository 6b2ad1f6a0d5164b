"""Sparse layers: where they beat dense ones, and a wide network with them.

    python benchmarks/bench_sparse.py
    python benchmarks/bench_sparse.py --width 4096 --layers 3 --batches 1 128

First, for one layer, the break-even of each batch. Then a network of such layers, with
random masks: dense, with the forms that ``to_sparse`` takes, and in SciPy. All take
turns in one run; each figure is the least of all rounds. For one core:

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
        taskset -c 1 python benchmarks/bench_sparse.py
"""

import argparse

import jax
import numpy as np
import scipy.sparse

import sparse_optax
from sparse_optax import export
from sparse_optax.export.timing import least_seconds


def network(width, layers, density):
    """A network of equal layers with random masks: its function and parameters."""
    keys = jax.random.split(jax.random.key(0), layers)
    params = [
        {"kernel": jax.random.normal(k, (width, width)) * (2 / width / density) ** 0.5}
        for k in keys
    ]
    masks = sparse_optax.masks.random_masks(1, params, density)

    def fn(params, x):
        for layer in params:
            x = jax.nn.relu(x @ layer["kernel"])
        return x

    return fn, sparse_optax.sparsify(params, masks)


def in_scipy(params):
    """The same function in SciPy, of rows that are columns."""
    kernels = [scipy.sparse.csr_matrix(np.asarray(p["kernel"]).T) for p in params]

    def call(columns):
        for kernel in kernels:
            columns = np.maximum(kernel @ columns, 0)
        return columns

    return call


def compare(width, layers, density, batch, rounds):
    """Prints one line: milliseconds of each form."""
    fn, params = network(width, layers, density)
    x = jax.random.normal(jax.random.key(2), (batch, width))
    sparse = export.to_sparse(fn, params, x)
    dense, run = jax.jit(fn), jax.jit(sparse)
    rows, call = np.ascontiguousarray(np.asarray(x).T), in_scipy(params)
    calls = {
        "dense": lambda: dense(params, x),
        "to_sparse": lambda: run(sparse.params, x),
        "scipy": lambda: call(rows),
    }
    expected = np.asarray(dense(params, x))
    scale = np.abs(expected).max()
    for name, result in (("to_sparse", calls["to_sparse"]()), ("scipy", call(rows).T)):
        gap = np.abs(np.asarray(result) - expected).max() / scale
        assert gap < 1e-4, (name, gap)
    found = {k: 1e3 * s for k, s in least_seconds(calls, rounds=rounds).items()}
    forms = sorted({layer.form for layer in sparse.record.layers})
    cells = [f"{v:.3g} ({found['dense'] / v:.2f}x)" for v in found.values()]
    print(f"| {density:g} | {batch} | {', '.join(forms)} | {' | '.join(cells)} |")


def main():
    """Prints the break-even of one layer, and a table of networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.01])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    for batch in args.batches:
        found = export.sparse_break_even(args.width, args.width, batch)
        print(f"batch {batch}, break-even at {found.density}, ms:")
        print(found.table())
    print("| density | batch | forms | dense, ms | to_sparse | SciPy |")
    print("|---|---|---|---:|---:|---:|")
    for density in args.densities:
        for batch in args.batches:
            compare(args.width, args.layers, density, batch, args.rounds)


if __name__ == "__main__":
    main()
