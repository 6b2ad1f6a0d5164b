"""Seconds of a training step of each network of the tables, on this machine.

    python benchmarks/bench_tables.py
    python benchmarks/bench_tables.py --models wrn-16-2 resnet-56 --steps 5

A step is what the runs of the tables do: forward, backward, batch statistics, dropout
and SGD with Nesterov momentum and weight decay, in float32 on random images; of the
transformer AdamW. The smallest of several steps is printed, in the form that
``sparse_optax.experiments.tables.costs`` holds. Run nothing else meanwhile.
"""

import argparse
import time

import jax
import numpy as np
import optax

from sparse_optax.experiments import models

# Batches of the recipes of the tables.
BATCHES = {
    "lenet-300-100": 100,
    "lenet-5-caffe": 100,
    "alexnet-s": 128,
    "alexnet-b": 128,
    "vgg16-c": 128,
    "vgg16-d": 128,
    "vgg16-like": 128,
    "wrn-28-2": 128,
    "wrn-16-2": 128,
    "resnet-20": 64,
    "resnet-56": 64,
    "densenet-40": 64,
    "transformer": 32,
    "wrn-16-8": 128,
    "wrn-22-8": 128,
    "wrn-16-10": 128,
    "resnet-50": 64,
    "resnet-50-0.46": 64,
    "resnet-50-0.54": 64,
}
CHARACTERS = 103


def seconds(name: str, batch: int, steps: int) -> float:
    """The smallest time of a step."""
    text = models.MODELS[name].text
    large = "resnet-50" in name
    shape = (128,) if text else (28, 28, 1) if "lenet" in name else (32, 32, 3)
    shape = (224, 224, 3) if large else shape
    classes = CHARACTERS if text else 1000 if large else 10
    rng = np.random.default_rng(0)
    if text:
        x = rng.integers(classes, size=(batch, *shape)).astype(np.int32)
        y = rng.integers(classes, size=(batch, *shape)).astype(np.int32)
        optimizer = optax.adamw(1e-3, weight_decay=0.1)
    else:
        x = rng.normal(size=(batch, *shape)).astype(np.float32)
        y = rng.integers(classes, size=batch).astype(np.int32)
        optimizer = optax.chain(
            optax.add_decayed_weights(5e-4), optax.sgd(0.01, 0.9, nesterov=True)
        )
    key = jax.random.key(0)
    apply, params, stats = models.create_stateful(name, shape, classes, key=key)

    @jax.jit
    def step(params, stats, state):
        def loss_of(params):
            logits, new = apply(params, stats, x, train=True, key=key)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean(), new

        (_, new), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), new, state

    values = params, stats, optimizer.init(params)
    values = jax.block_until_ready(step(*values))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        values = jax.block_until_ready(step(*values))
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Prints a line a network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=[*BATCHES])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, help="in place of the recipe's")
    given = parser.parse_args()
    for name in given.models:
        batch = given.batch or BATCHES[name]
        found = seconds(name, batch, given.steps)
        print(f'    "{name}": ({batch}, {found:.3g}),', flush=True)


if __name__ == "__main__":
    main()
