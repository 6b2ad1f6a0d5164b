"""Networks with half of their arithmetic: channels and heads pruned, then smaller.

    python benchmarks/bench_channels.py
    python benchmarks/bench_channels.py --models wrn-16-2 --batches 1 64

Weights are as initialised: times depend on sizes alone. Units are ranked by magnitude
in one pool (``global``), and alike in all groups (``group``), which is the network of
uniform width. Dense and smaller networks take turns in one run; each figure is the
least of all rounds. For one core:

    XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" \
        taskset -c 1 python benchmarks/bench_channels.py
"""

import argparse
import time

import jax
import jax.numpy as jnp

import sparse_optax
from sparse_optax import structured
from sparse_optax.experiments import models
from sparse_optax.export.timing import least_seconds


def network(name):
    """A function, its variables, and one example without its batch."""
    text = models.MODELS[name].text
    shape = (128,) if text else (28, 28, 1) if "lenet" in name else (32, 32, 3)
    classes = 103 if text else 10
    apply, params, stats = models.create_stateful(
        name, shape, classes, key=jax.random.key(0)
    )

    def fn(variables, x):
        return apply(variables["params"], variables["stats"], x)[0]

    return fn, {"params": params, "stats": stats}, (shape, text)


def batch_of(example, n):
    """A batch of n images or texts."""
    shape, text = example
    if text:
        return jnp.arange(n * shape[0]).reshape(n, *shape) % 100
    return jax.random.normal(jax.random.key(1), (n, *shape))


def main():
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["wrn-16-2", "transformer"])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--round-to", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    print("| model | units | batch | form | multiply-adds | ms | faster |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for name in args.models:
        fn, variables, example = network(name)
        one = batch_of(example, 1)
        start = time.perf_counter()
        units = structured.channels(fn, variables, one)
        took = time.perf_counter() - start
        forms = {"dense": (jax.jit(fn), variables, 1.0)}
        for scope in ("global", "group"):
            kept = units.select(
                units.scores(variables), multiply_adds=args.share, scope=scope
            )
            pruned = sparse_optax.sparsify(variables, units.masks(kept))
            for n in args.round_to:
                small = sparse_optax.compact(fn, pruned, one, round_to=n)
                before, after = small.record.multiply_adds
                forms[f"{scope}, {n}"] = jax.jit(small), small.params, after / before
        for batch in args.batches:
            x = batch_of(example, batch)
            found = least_seconds(
                {k: lambda f=f, p=p, x=x: f(p, x) for k, (f, p, _) in forms.items()},
                rounds=args.rounds,
            )
            for form, seconds in found.items():
                print(
                    f"| {name} | {len(units)} | {batch} | {form} | "
                    f"{forms[form][2]:.3f} | {1e3 * seconds:.3g} | "
                    f"{found['dense'] / seconds:.2f}x |"
                )
        print(f"{name}: units found in {took:.2f} s")


if __name__ == "__main__":
    main()
