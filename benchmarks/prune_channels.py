"""What half of the multiply-adds costs in accuracy: pruned channels, narrow networks.

    python benchmarks/prune_channels.py --seeds 0

LeNet-5-Caffe on CIFAR-10, 45,000 training images as they are, 16 epochs in batches of
128, Nesterov 0.9, weight decay 5e-4 on kernels, learning rate 0.05 along a cosine to
zero; test error of the last epoch. Four networks of each seed: dense; with channels
pruned by magnitude on the cubic ramp of ``structured.gradual_channels`` over the first
10 epochs, in one pool or alike in all groups; and the network that the last one leaves,
of uniform width, trained from new weights for all 16 epochs. A small network for this
data set: what is compared is the four with each other. Each finished network is a line
of the file of records and is not trained again.
"""

import argparse
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import sparse_optax
from sparse_optax import structured
from sparse_optax.experiments import data, models

RECORDS = pathlib.Path(__file__).parent / "records" / "prune_channels.jsonl"
EPOCHS, PRUNED = 16, 10
BATCH = 128
SHARE = 0.5


def trained(fn, params, tx, cifar, seed):
    """The weights and the optimizer state after all epochs."""
    images = jnp.asarray(cifar.train_x), jnp.asarray(cifar.train_y)
    steps = len(cifar.train_x) // BATCH

    @jax.jit
    def step(params, state, rows, x, y):
        def loss(params):
            logits = fn(params, x[rows])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
            return losses.mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = tx.init(params), np.random.default_rng(seed)
    for _ in range(EPOCHS):
        order = rng.permutation(len(cifar.train_x))[: steps * BATCH]
        for rows in order.reshape(steps, BATCH):
            params, state = step(params, state, rows, *images)
    return params, state


def error(fn, params, cifar):
    """Test error in percent."""
    parts = range(0, len(cifar.test_x), 1000)
    forward = jax.jit(fn)
    scores = [forward(params, cifar.test_x[i : i + 1000]) for i in parts]
    return round(
        float(100 * (np.concatenate(scores).argmax(-1) != cifar.test_y).mean()), 2
    )


def drawn(params, key):
    """New weights for these shapes, by the rule of the dense network."""
    leaves, structure = jax.tree.flatten(params)
    fans = [math.prod(x.shape[:-1]) for x in leaves]
    # A bias has the bound of its kernel, which follows it in the order of names.
    fans = [
        fans[i + 1] if x.ndim == 1 else n
        for i, (x, n) in enumerate(zip(leaves, fans, strict=True))
    ]
    new = [
        jax.random.uniform(k, x.shape, minval=-(n**-0.5), maxval=n**-0.5)
        for k, x, n in zip(
            jax.random.split(key, len(leaves)), leaves, fans, strict=True
        )
    ]
    return jax.tree.unflatten(structure, new)


def networks(cifar, seed):
    """Name -> a function that trains and gives multiply-adds and error."""
    shape = cifar.train_x.shape[1:]
    fn, params = models.create("lenet-5-caffe", shape, 10, key=jax.random.key(seed))
    one = jnp.asarray(cifar.train_x[:1])
    units = structured.channels(fn, params, one)
    steps = len(cifar.train_x) // BATCH

    def sgd():
        rate = optax.cosine_decay_schedule(0.05, EPOCHS * steps)
        return optax.chain(
            optax.add_decayed_weights(5e-4, mask=sparse_optax.decay_mask),
            optax.sgd(rate, momentum=0.9, nesterov=True),
        )

    def dense():
        found, _ = trained(fn, params, sgd(), cifar, seed)
        return 1.0, error(fn, found, cifar)

    def pruned(scope):
        tx = structured.gradual_channels(
            sgd(),
            units=units,
            multiply_adds=SHARE,
            update_period=steps // 4,
            update_stop=PRUNED * steps,
            scope=scope,
        )
        found, _ = trained(fn, params, tx, cifar, seed)
        small = sparse_optax.compact(fn, found, one)
        before, after = small.record.multiply_adds
        return after / before, error(small, small.params, cifar)

    def narrow():
        kept = units.select(units.scores(params), multiply_adds=SHARE, scope="group")
        cut = sparse_optax.sparsify(params, units.masks(kept))
        small = sparse_optax.compact(fn, cut, one, fold=False)
        before, after = small.record.multiply_adds
        new = drawn(small.params, jax.random.key(100 + seed))
        found, _ = trained(small, new, sgd(), cifar, seed)
        return after / before, error(small, found, cifar)

    return {
        "dense": dense,
        "one pool": lambda: pruned("global"),
        "alike in all groups": lambda: pruned("group"),
        "uniform width, from new weights": narrow,
    }


def main():
    """Trains what the records do not have, and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--records", type=pathlib.Path, default=RECORDS)
    given = parser.parse_args()
    given.records.parent.mkdir(parents=True, exist_ok=True)
    given.records.touch()
    cifar = data.load("cifar10")
    for seed in given.seeds:
        for name, train in networks(cifar, seed).items():
            done = [json.loads(x) for x in given.records.read_text().splitlines()]
            if any((run["network"], run["seed"]) == (name, seed) for run in done):
                continue
            share, wrong = train()
            run = {
                "network": name,
                "seed": seed,
                "multiply_adds": round(share, 3),
                "test_error": wrong,
                "versions": {"jax": jax.__version__, "optax": optax.__version__},
            }
            with given.records.open("a") as file:
                file.write(json.dumps(run) + "\n")
    done = [json.loads(x) for x in given.records.read_text().splitlines()]
    for run in done:
        print(
            f"{run['network']:34}{run['seed']:3}{run['multiply_adds']:8}{run['test_error']:8}"
        )


if __name__ == "__main__":
    main()
