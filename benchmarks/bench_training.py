"""Training of LeNet-300-100 on MNIST: dense, sparse momentum, and the same compacted.

    python benchmarks/bench_training.py
    python benchmarks/bench_training.py --densities 0.02 --seeds 0 1 2 --out runs.json

The rows of a seed take turns, an epoch each, and each pays for its own compilation: run
it without a compilation cache. With ``--out`` a seed whose rows are all in the file is
not run again, so that a run which was stopped goes on. For one core:

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
        taskset -c 1 python benchmarks/bench_training.py

Images are read from $SPARSE_OPTAX_DATA, or downloaded.
"""

import argparse
import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_optax
from sparse_optax.experiments import data, models

BATCH = 100


def row(mode, density, window, seed, epochs, images):
    """Trains one network, an epoch at each turn; the last turn gives the result."""
    x, y, test_x, test_y = images
    steps = len(x) // BATCH
    apply, params = models.create(
        "lenet-300-100", (28, 28, 1), 10, init="torch", key=jax.random.key(seed)
    )
    inner = optax.chain(
        optax.add_decayed_weights(5e-4),
        optax.sgd(
            optax.exponential_decay(0.1, epochs * steps // 4, 0.1, staircase=True),
            momentum=0.9,
            nesterov=True,
        ),
    )
    tx = inner
    if mode != "dense":
        tx = sparse_optax.sparse_momentum_regrow(
            inner,
            density=density,
            update_period=steps,
            update_stop=epochs * steps,
            key=seed,
        )
    state = tx.init(params)
    if mode != "dense":
        params = sparse_optax.sparsify(params, state)

    def loss(params, x, y):
        logits = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def batch(rows, x, y):
        return x[rows], y[rows]

    @jax.jit
    def epoch(params, state, rows, x, y):
        def step(carry, rows):
            params, state = carry
            gradient = jax.grad(loss)(params, *batch(rows, x, y))
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), rows)[0]

    training = sparse_optax.compact_training(
        loss, tx, total_steps=epochs * steps, window=window, batch=batch
    )
    rng, times = np.random.default_rng(seed), []
    for _ in range(epochs):
        start = time.perf_counter()
        rows = jnp.asarray(rng.permutation(len(x))[: steps * BATCH], jnp.int32)
        rows = rows.reshape(steps, BATCH)
        if mode == "compacted":
            params, state, *_ = training(params, state, rows, x, y)
        else:
            params, state = jax.block_until_ready(epoch(params, state, rows, x, y))
        times.append(time.perf_counter() - start)
        yield None
    kept = 266_200
    if mode != "dense":
        kept = sparse_optax.masks.count(sparse_optax.get_masks(state))
    wrong = jnp.argmax(jax.jit(apply)(params, test_x), -1) != test_y
    yield {
        "mode": mode,
        "density": density,
        "window": window,
        "seed": seed,
        "epochs": epochs,
        "seconds": round(sum(times), 2),
        "last_epoch": round(float(np.median(times[-10:])), 4),
        "test_error": round(float(100 * wrong.mean()), 2),
        "kept": kept,
        "table": training.table() if mode == "compacted" else "",
    }


def main():
    """Prints a row for each training."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.02, 0.05])
    parser.add_argument("--windows", type=int, nargs="+", default=[100, 40])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--modes", nargs="+", default=["dense", "sparse", "compacted"])
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    found = data.load("mnist")
    arrays = found.train_x, found.train_y, found.test_x, found.test_y
    images = [jnp.asarray(a.reshape(len(a), -1) if a.ndim > 1 else a) for a in arrays]
    done = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    print(f"{'':24}{'seed':>5}{'s':>8}{'of dense':>10}{'ms/epoch':>10}{'error %':>9}")
    for seed in args.seeds:
        jobs = []
        for mode in args.modes:
            densities = [1.0] if mode == "dense" else args.densities
            windows = args.windows if mode == "compacted" else [0]
            jobs += itertools.product([mode], densities, windows, [seed], [args.epochs])
        names = ("mode", "density", "window", "seed", "epochs")
        known = {tuple(r[n] for n in names): r for r in done}
        if not known.keys() >= set(jobs):
            known |= dict(zip(jobs, in_turns(jobs, images), strict=True))
            done = list(known.values())
            if args.out:
                args.out.write_text(json.dumps(done, indent=1))
        show([known[job] for job in jobs])


def in_turns(jobs, images):
    """The results of several trainings, whose epochs take turns."""
    rows = [row(*job, images) for job in jobs]
    for _ in range(jobs[0][-1]):
        for one in rows:
            next(one)
    return [next(one) for one in rows]


def show(results):
    """Prints the rows of one seed."""
    dense = [r["seconds"] for r in results if r["mode"] == "dense"]
    for result in results:
        label = result["mode"]
        label += f", {result['density']:g}" if label != "dense" else ""
        label += f", window {result['window']}" if result["window"] else ""
        ratio = result["seconds"] / dense[0] if dense else float("nan")
        print(
            f"{label:24}{result['seed']:5}{result['seconds']:8.1f}{ratio:10.3f}"
            f"{1000 * result['last_epoch']:10.0f}{result['test_error']:9.2f}",
            flush=True,
        )
        if result["table"]:
            print(result["table"], flush=True)


if __name__ == "__main__":
    main()
