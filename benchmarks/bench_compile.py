"""How much processor time it takes to compile an update, or ``init``, of many leaves.

    python benchmarks/bench_compile.py
    python benchmarks/bench_compile.py --tree resnet50 --optimizers adamw gsm

An update is ``optimizer.update`` and ``optax.apply_updates``, without a network. Each
figure comes from a fresh process without a compilation cache, and counts the seconds of
all its threads; the optimizers take turns, and the least of the repeats counts. Nothing
is run, so that the memory of the arrays is not needed.
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
from shapes import resnet50, transformer

import sparse_optax

STAGES = ("trace", "lower", "compile")
TREES = {"transformer": transformer, "resnet50": resnet50}
BASE = "adamw"
DENSITY = 0.1
RATE = 1e-3


def adamw():
    return optax.adamw(RATE)


def periodic(method, **more):
    timing = {"update_period": 1000, "update_stop": 10**6}
    return lambda: method(adamw(), density=DENSITY, **timing, **more)


OPTIMIZERS = {
    BASE: adamw,
    "gsm": lambda: optax.chain(sparse_optax.gsm_mask(DENSITY), adamw()),
    "sparse momentum": periodic(sparse_optax.sparse_momentum_regrow, key=0),
    "SET": periodic(sparse_optax.sparse_evolutionary, key=0),
    "DSR": periodic(sparse_optax.dynamic_sparse, key=0, prune_number=600),
    "RigL": periodic(sparse_optax.rigl, key=0),
    "ITOP": periodic(sparse_optax.in_time_over_parameterization, key=0),
    "gradual magnitude": periodic(sparse_optax.gradual_magnitude),
    "GraNet": periodic(sparse_optax.granet, key=0),
    "AC/DC": periodic(sparse_optax.ac_dc),
    "network surgery": lambda: sparse_optax.network_surgery(adamw(), density=DENSITY),
    "straight-through": lambda: sparse_optax.straight_through_magnitude(
        adamw(), density=DENSITY
    ),
    "Top-KAST": lambda: sparse_optax.top_kast(
        adamw(), density=DENSITY, backward_density=2 * DENSITY
    ),
    "DEEP-R": lambda: sparse_optax.deep_rewiring(
        adamw(), density=DENSITY, learning_rate=RATE, key=0
    ),
}


def stages(tree: str, name: str, init: bool) -> dict[str, float]:
    """Seconds of tracing, lowering and compiling in this process, all threads."""
    # The backend starts with the first program.
    jax.jit(jnp.negative)(1.0).block_until_ready()
    params, optimizer = TREES[tree](), OPTIMIZERS[name]()

    def update(params, opt_state, gradient):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    if init:
        program, arguments = jax.jit(optimizer.init), (params,)
    else:
        opt_state = jax.eval_shape(optimizer.init, params)
        program = jax.jit(update, donate_argnums=(0, 1))
        arguments = (params, opt_state, params)
    times = [time.process_time()]
    traced = program.trace(*arguments)
    times.append(time.process_time())
    lowered = traced.lower()
    times.append(time.process_time())
    lowered.compile()
    times.append(time.process_time())
    return dict(zip(STAGES, np.diff(times).tolist(), strict=True))


def fresh(tree: str, name: str, init: bool) -> dict[str, float]:
    """The same in a process of its own."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, __file__, "--tree", tree, "--only", name]
    done = subprocess.run(
        command + ["--init"] * init,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tree", choices=TREES, default="transformer")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    parser.add_argument(
        "--only", choices=OPTIMIZERS, help="measure one, in this process"
    )
    parser.add_argument("--init", action="store_true", help="with --only: of init")
    arguments = parser.parse_args()
    tree = arguments.tree
    if arguments.only:
        print(json.dumps(stages(tree, arguments.only, arguments.init)))
        return
    if arguments.repeats < 1:
        parser.error("--repeats must be 1 or more")
    chosen = dict.fromkeys([BASE, *(arguments.optimizers or OPTIMIZERS)])
    runs = {(name, init): [] for name in chosen for init in (False, True)}
    for _ in range(arguments.repeats):
        for name, init in runs:
            runs[name, init].append(fresh(tree, name, init))
    best = {
        key: min(times, key=lambda seconds: sum(seconds.values()))
        for key, times in runs.items()
    }
    leaves = jax.tree.leaves(TREES[tree]())
    print(f"{len(leaves)} leaves, {sum(leaf.size for leaf in leaves):,} parameters")
    columns = (*STAGES, "sum", f"over {BASE}", "init")
    print(" " * 18 + "".join(f"{column:>12}" for column in columns) + "  CPU seconds")
    base = sum(best[BASE, False].values())
    for name in chosen:
        seconds = best[name, False].values()
        row = (*seconds, sum(seconds), sum(seconds) - base)
        row += (sum(best[name, True].values()),)
        print(f"{name:18}" + "".join(f"{value:12.2f}" for value in row))
    if arguments.json:
        names = {(name, init): f"{name}, init" if init else name for name, init in runs}
        record = {
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            "leaves": len(leaves),
            "cpu_seconds": {names[key]: times for key, times in runs.items()},
        }
        with open(arguments.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
