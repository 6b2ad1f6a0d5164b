"""How long it takes to compile an update of the 161 parameters of ResNet-50.

    python benchmarks/bench_compile.py

An update is ``optimizer.update`` and ``optax.apply_updates``, without a network. Each
figure comes from a fresh process without a compilation cache; the optimizers take
turns, and the fastest of the repeats counts. Nothing is run, so that the memory of
the arrays is not needed.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shapes import resnet50

import sparse_optax

STAGES = ("trace", "lower", "compile")


def sgd():
    return optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True)
    )


OPTIMIZERS = {
    "sgd": sgd,
    "gsm": lambda: sparse_optax.gsm(0.1, 1 / 60, momentum=0.9),
    "sparse momentum": lambda: sparse_optax.sparse_momentum_regrow(
        sgd(), density=0.05, update_period=1000, update_stop=10**6, key=0
    ),
}


def stages(name: str) -> dict[str, float]:
    """Seconds of tracing, lowering and compiling in this process."""
    # The backend starts with the first program.
    jax.jit(jnp.negative)(1.0).block_until_ready()
    params, optimizer = resnet50(), OPTIMIZERS[name]()
    opt_state = jax.eval_shape(optimizer.init, params)

    def update(params, opt_state, gradient):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    times = [time.perf_counter()]
    traced = jax.jit(update, donate_argnums=(0, 1)).trace(params, opt_state, params)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    lowered.compile()
    times.append(time.perf_counter())
    return dict(zip(STAGES, np.diff(times).tolist(), strict=True))


def fresh(name: str) -> dict[str, float]:
    """The same in a process of its own."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, __file__, "--only", name],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    parser.add_argument(
        "--only", choices=OPTIMIZERS, help="measure one, in this process"
    )
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(stages(arguments.only)))
        return
    if arguments.repeats < 1:
        parser.error("--repeats must be 1 or more")
    runs = {name: [] for name in OPTIMIZERS}
    for _ in range(arguments.repeats):
        for name in runs:
            runs[name].append(fresh(name))
    best = {
        name: min(times, key=lambda seconds: sum(seconds.values()))
        for name, times in runs.items()
    }
    leaves = jax.tree.leaves(resnet50())
    print(f"{len(leaves)} leaves, {sum(leaf.size for leaf in leaves):,} parameters")
    columns = (*STAGES, "sum", "over sgd")
    print(" " * 18 + "".join(f"{column:>10}" for column in columns) + "  seconds")
    base = sum(best["sgd"].values())
    for name, seconds in best.items():
        total = sum(seconds.values())
        row = (*seconds.values(), total, total - base)
        print(f"{name:18}" + "".join(f"{value:10.2f}" for value in row))
    if arguments.json:
        record = {
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            "leaves": len(leaves),
            "seconds": runs,
        }
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
