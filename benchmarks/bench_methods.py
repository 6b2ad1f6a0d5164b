"""What each method adds to SGD's update of LeNet-300-100, at 5% of the weights.

Each program is a scan over updates, started from the state that two scans have left, so
that schedules are under way. Methods that move weights once a period have two: one
without a cycle, and one with a single cycle in it, whose difference is the cycle; those
that choose at every update have one. All take turns in one run, least of all rounds.

    python benchmarks/bench_methods.py
"""

import argparse
import time

import jax
import optax
from bench_seeds import STEPS, network, program

import sparse_optax

RATE = 0.01
DENSITY = 0.05
NEVER = 10**7


def sgd():
    return optax.sgd(RATE, momentum=0.9, nesterov=True)


def periodic():
    """Name -> a function of the period."""

    def method(build, **more):
        def of(period):
            # Short, so that a schedule has somewhere to go in its first cycle.
            timing = {"update_period": period, "update_stop": 4 * period}
            return build(sgd(), density=DENSITY, **timing, key=0, **more)

        return of

    return {
        "sparse momentum": method(sparse_optax.sparse_momentum_regrow),
        "SET": method(sparse_optax.sparse_evolutionary),
        "DSR": method(sparse_optax.dynamic_sparse, prune_number=600),
        "RigL": method(sparse_optax.rigl),
        "ITOP": method(sparse_optax.in_time_over_parameterization),
        "gradual magnitude": method(sparse_optax.gradual_magnitude),
        "GraNet": method(sparse_optax.granet),
        "AC/DC": method(sparse_optax.ac_dc),
    }


def each_step():
    """Name -> an optimizer that chooses at every update, or has nothing to choose."""
    return {
        "static": sparse_optax.static_sparse(sgd(), density=DENSITY, key=0),
        "sparse momentum around HAM, no cycle": sparse_optax.sparse_momentum_regrow(
            sparse_optax.ham(sgd(), RATE, alpha=1.0),
            density=DENSITY,
            update_period=NEVER,
            update_stop=4 * NEVER,
            key=0,
        ),
        "GSM": sparse_optax.gsm(RATE, DENSITY, momentum=0.9),
        "network surgery": sparse_optax.network_surgery(sgd(), density=DENSITY),
        "straight-through": sparse_optax.straight_through_magnitude(
            sgd(), density=DENSITY
        ),
        "Top-KAST": sparse_optax.top_kast(
            sgd(), density=DENSITY, backward_density=2 * DENSITY
        ),
        "DEEP-R without noise": sparse_optax.deep_rewiring(
            sgd(), density=DENSITY, learning_rate=RATE, gradient_noise=0.0, key=0
        ),
        "DEEP-R": sparse_optax.deep_rewiring(
            sgd(), density=DENSITY, learning_rate=RATE, key=0
        ),
    }


def programs():
    """(name, whether a cycle is due) -> a compiled scan and its arguments."""
    made = {("SGD", False): program(sgd(), 1)}
    for name, build in periodic().items():
        made[name, False] = program(build(NEVER), 1)
        # A cycle opens the first update after a full period: the first of the scan.
        made[name, True] = program(build(STEPS), 1)
    for name, optimizer in each_step().items():
        made[name, False] = program(optimizer, 1)
    under_way = {}
    for key, (f, (params, state, gradients)) in made.items():
        # Twice: the first cycle of a schedule is at its start, and may prune nothing.
        for _ in range(2):
            params, state = f(params, state, gradients)
        under_way[key] = f, (params, state, gradients)
    return under_way


def check(name, before, after):
    """A cycle that was left out would be timed as none."""
    same = jax.tree.map(
        lambda a, b: bool((a == b).all()),
        sparse_optax.get_masks(before),
        sparse_optax.get_masks(after),
    )
    if all(jax.tree.leaves(same)):
        raise RuntimeError(f"{name}: no mask has changed where a cycle was due")


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    rounds = parser.parse_args().rounds
    made = programs()
    times = {key: [] for key in made}
    for _ in range(rounds):
        for (name, due), (f, (params, state, gradients)) in made.items():
            start = time.perf_counter()
            _, after = jax.block_until_ready(f(params, state, gradients))
            times[name, due].append((time.perf_counter() - start) * 1e3)
            if due:
                check(name, state, after)
    least = {key: min(values) for key, values in times.items()}
    base = least["SGD", False] / STEPS
    size = sum(x.size for x in jax.tree.leaves(network(0)))
    print(f"{size:,} weights at {DENSITY:.0%}; SGD: {base:.3f} ms an update\n")
    print(f"{'over SGD':38s}{'an update':>11s}{'a cycle':>9s}")
    for name in dict.fromkeys(name for name, _ in made):
        row = f"{name:38s}{least[name, False] / STEPS / base:11.1f}"
        if (name, True) in least:
            row += f"{(least[name, True] - least[name, False]) / base:9.0f}"
        print(row)


if __name__ == "__main__":
    main()
