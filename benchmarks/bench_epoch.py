"""What sparse training adds to an epoch of LeNet-300-100 on MNIST-sized data.

One run times all optimizers in turn, round after round, so that a busy machine slows
them alike; the figure to quote is the ratio of the fastest epochs. Run it on an idle
machine, on one thread for a figure a core:

    XLA_FLAGS=--xla_cpu_multi_thread_eigen=false taskset -c 0 \
        python benchmarks/bench_epoch.py

Each ratio is to the dense epoch of the same batch size, with the same learning rate,
Nesterov momentum and weight decay. An epoch of sparse momentum holds one cycle.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_optax
from sparse_optax.experiments import models

IMAGES = 54_000


def optimizers(steps: dict[int, int]) -> dict[str, tuple[int, object]]:
    """Name -> (batch size, optimizer)."""

    def sgd(momentum, mask=None):
        return optax.chain(
            optax.add_decayed_weights(5e-4, mask=mask),
            optax.sgd(0.1, momentum=momentum, nesterov=True),
        )

    return {
        "dense, batch 100": (100, sgd(0.9)),
        "sparse momentum 5%, batch 100": (
            100,
            sparse_optax.sparse_momentum_regrow(
                sgd(0.9),
                density=0.05,
                update_period=steps[100],
                update_stop=10**6,
                key=0,
            ),
        ),
        "dense, batch 256": (256, sgd(0.99, sparse_optax.eligible)),
        "gsm 1/60, batch 256": (256, sparse_optax.gsm(0.1, 1 / 60, momentum=0.99)),
    }


def epoch_function(apply, optimizer, steps, batch):
    """``(state, x, y) -> state``, one compiled epoch."""

    def step(state, rows, x, y):
        params, opt_state = state

        def loss_of(params):
            logits = apply(params, x[rows])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, y[rows]
            ).mean()

        gradient = jax.grad(loss_of)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def epoch(state, x, y):
        rows = jnp.arange(steps * batch).reshape(steps, batch)
        return jax.lax.scan(lambda s, r: (step(s, r, x, y), None), state, rows)[0]

    return epoch


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(IMAGES, 28, 28, 1)), jnp.float32)
    y = jnp.asarray(generator.integers(0, 10, IMAGES), jnp.int32)
    steps = {batch: IMAGES // batch for batch in (100, 256)}
    runs, times = {}, {}
    for name, (batch, optimizer) in optimizers(steps).items():
        apply, params = models.create(
            "lenet-300-100", x.shape[1:], 10, init="torch", key=jax.random.key(0)
        )
        epoch = epoch_function(apply, optimizer, steps[batch], batch)
        state = jax.block_until_ready(epoch((params, optimizer.init(params)), x, y))
        runs[name], times[name] = (epoch, state), []
    for _ in range(rounds):
        for name, (epoch, state) in runs.items():
            start = time.perf_counter()
            state = jax.block_until_ready(epoch(state, x, y))
            times[name].append(time.perf_counter() - start)
            runs[name] = epoch, state
    best = {name: min(seconds) for name, seconds in times.items()}
    print(f"{'':32}{'best s':>10}{'median s':>10}{'ratio':>8}")
    for name, seconds in times.items():
        base = best[f"dense, {name.rsplit(', ', 1)[1]}"]
        print(
            f"{name:32}{best[name]:10.3f}{np.median(seconds):10.3f}"
            f"{best[name] / base:8.3f}"
        )
    print(json.dumps({"seconds": times, "jax": jax.__version__, "rounds": rounds}))


if __name__ == "__main__":
    main()
