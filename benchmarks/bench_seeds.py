"""What four seeds under ``vmap`` cost beside one, between cycles.

A ``lax.cond`` under ``vmap`` runs both branches: without its guard the engine would pay
for a cycle at every step. The updates of LeNet-300-100 run in a scan, one seed and four
by turns; no cycle is due, and one row has a cycle in the scan.

    python benchmarks/bench_seeds.py
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import sparse_optax

SHAPES = {"one": (784, 300), "two": (300, 100), "three": (100, 10)}
STEPS = 200


def network(seed):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(0.05 * rng.standard_normal(shape), jnp.float32)
        for name, shape in SHAPES.items()
    }


def optimizers():
    sgd = optax.sgd(0.01, momentum=0.9, nesterov=True)

    def sparse(period):
        return sparse_optax.sparse_momentum_regrow(
            sgd, density=0.05, update_period=period, update_stop=10**7, key=0
        )

    return {
        "SGD": sgd,
        "sparse momentum, no cycle due": sparse(10**6),
        f"sparse momentum, a cycle in {STEPS} steps": sparse(STEPS - 1),
        "GSM": sparse_optax.gsm(0.01, 1 / 60, momentum=0.9),
    }


def program(tx, members):
    """A compiled scan over the updates of all members, and what it starts from."""

    def run(params, state, gradients):
        def step(carry, i):
            params, state = carry
            gradient = jax.tree.map(lambda g: g[i % 4], gradients)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, state), jnp.arange(STEPS))[0]

    def some(seed):
        stacked = [network(seed + i) for i in range(4)]
        return jax.tree.map(lambda *x: jnp.stack(x), *stacked)

    if members == 1:
        return jax.jit(run), (network(0), tx.init(network(0)), some(1))
    each = [(network(i), tx.init(network(i)), some(10 * i)) for i in range(members)]
    return jax.jit(jax.vmap(run)), jax.tree.map(lambda *x: jnp.stack(x), *each)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    programs = {
        (name, members): program(tx, members)
        for name, tx in optimizers().items()
        for members in (1, 4)
    }
    times = {key: [] for key in programs}
    for f, args in programs.values():
        jax.block_until_ready(f(*args))
    for _ in range(rounds):
        for key, (f, args) in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(f(*args))
            times[key].append((time.perf_counter() - start) / STEPS * 1e3)
    print("milliseconds a step, least of all rounds\n")
    print(f"{'':44s}{'one seed':>10s}{'four':>10s}{'ratio':>8s}")
    for name in optimizers():
        one, four = min(times[name, 1]), min(times[name, 4])
        print(f"{name:44s}{one:10.3f}{four:10.3f}{four / one:8.2f}")


if __name__ == "__main__":
    main()
