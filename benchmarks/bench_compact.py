"""Inference and a training step of sparse networks, dense and compacted in one run.

    python benchmarks/bench_compact.py
    python benchmarks/bench_compact.py --models vgg16-d --densities 0.05 --out runs.json

The masks are drawn: of each kernel the given share of weights is kept, and of each
layer's output units or channels the share ``--dead`` is without weights. With
``--runs FOLDER`` the network is trained by sparse momentum, or read from there. All
forms take turns; each figure is the least of all rounds. For one core:

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
        taskset -c 1 python benchmarks/bench_compact.py

With ``--out`` a row that is in the file is not measured again.
"""

import argparse
import itertools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_optax
from sparse_optax.experiments import config, models, train
from sparse_optax.export.timing import least_seconds


def network(model, density, dead, args):
    """Function, parameters, statistics and the shape of an image."""
    small = model.startswith("lenet")
    shape, name = ((28, 28, 1), "mnist") if small else ((32, 32, 3), "cifar10")
    apply, params, stats = models.create_stateful(
        model, shape, 10, key=jax.random.key(0)
    )
    if args.runs:
        run = config.TrainConfig(
            dataset=name,
            model=model,
            method="sparse_momentum",
            density=density,
            epochs=args.epochs,
        )
        done = train.train(run, runs=args.runs)
        print(f"test error {done.record.results['test_error']:.2f}%")
        params, stats = jax.tree.map(jnp.asarray, (done.params, done.stats))
        return apply, params, stats, shape
    rng = np.random.default_rng(0)

    def thin(x, kernel):
        if not kernel:
            return x
        outputs = rng.random(x.shape[-1]) >= dead
        if x.shape[-1] == 10:  # the classes
            outputs[:] = True
        kept = rng.random(x.shape) < density / max(outputs.mean(), density)
        return jnp.where(kept & outputs, x / math.sqrt(density), 0)

    params = jax.tree.map(thin, params, sparse_optax.eligible(params))
    return apply, params, stats, shape


def inference(net, batch, rounds, round_to):
    """Seconds dense and compacted, and the multiply-adds of both."""
    apply, params, stats, shape = net
    variables = {"params": params, "stats": stats}

    def fn(v, x):
        return apply(v["params"], v["stats"], x)[0]

    x = jax.random.normal(jax.random.key(1), (batch, *shape))
    small = sparse_optax.compact(fn, variables, x, round_to=round_to)
    dense, own = jax.jit(fn), jax.jit(small)
    gap = jnp.abs(dense(variables, x) - own(small.params, x)).max()
    assert gap < 1e-3 * jnp.abs(dense(variables, x)).max(), gap
    calls = {
        "dense": lambda: dense(variables, x),
        "small": lambda: own(small.params, x),
    }
    seconds = least_seconds(calls, rounds=rounds, turn=0.1)
    return seconds, small.record.multiply_adds


def training(net, batch, rounds):
    """The same of a step of SGD with momentum, in training mode."""
    apply, params, stats, shape = net
    variables = {"params": params, "stats": stats}
    x = jax.random.normal(jax.random.key(1), (batch, *shape))
    y = jnp.arange(batch) % 10

    def fn(v, x, y):
        logits, new = apply(
            v["params"], v["stats"], x, train=True, key=jax.random.key(0)
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return loss, new

    chosen = sparse_optax.eligible(params)
    masks = jax.tree.map(
        lambda w, c: w != 0 if c else optax.MaskedNode(), params, chosen
    )
    tx = sparse_optax.static_sparse(optax.sgd(0.01, momentum=0.9), masks=masks)
    small = sparse_optax.compact(
        fn,
        variables,
        x,
        y,
        masks={"params": masks},
        fold=False,
        state=lambda out: {"stats": out[1]},
    )

    def step(fn):
        @jax.jit
        def run(variables, state):
            def loss(p):
                return fn({"params": p, "stats": variables["stats"]}, x, y)

            gradient, new = jax.grad(loss, has_aux=True)(variables["params"])
            updates, state = tx.update(gradient, state, variables["params"])
            params = optax.apply_updates(variables["params"], updates)
            return {"params": params, "stats": new}, state

        return run

    dense, own = step(fn), step(small)
    state = tx.init(params)
    cut = small.cut(state)
    calls = {
        "dense": lambda: dense(variables, state),
        "small": lambda: own(small.params, cut),
    }
    seconds = least_seconds(calls, rounds=rounds, turn=0.1)
    return seconds, small.record.multiply_adds


def main():
    """Prints a row for each network, density and kind of work."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=["lenet-300-100", "lenet-5-caffe"]
    )
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05])
    parser.add_argument("--dead", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-to", default="1", help='a number, or "measured"')
    parser.add_argument("--epochs", type=int, default=5, help="with --runs")
    parser.add_argument("--runs", help="folder of trained networks")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    round_to = "measured" if args.round_to == "measured" else int(args.round_to)
    done = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    print(
        f"{'':38}{'dense ms':>10}{'small ms':>10}{'faster':>8}{'multiply-adds':>15}"
        f"{'reached':>9}"
    )
    for model, density in itertools.product(args.models, args.densities):
        net = None
        for kind in ("inference", "training step"):
            key = f"{model}, {density:g}, batch {args.batch}, {kind}"
            full = f"{key}, {args.dead}, {args.round_to}, {args.runs}"
            if full not in done:
                net = net or network(model, density, args.dead, args)
                if kind == "inference":
                    took, work = inference(net, args.batch, args.rounds, round_to)
                else:
                    took, work = training(net, args.batch, args.rounds)
                done[full] = [took["dense"], took["small"], *work]
                if args.out:
                    args.out.write_text(json.dumps(done, indent=1))
            dense, small, before, after = done[full]
            faster, less = dense / small, before / max(after, 1)
            print(
                f"{key:38}{1000 * dense:10.2f}{1000 * small:10.2f}{faster:8.2f}"
                f"{less:14.2f}x{faster / less:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
