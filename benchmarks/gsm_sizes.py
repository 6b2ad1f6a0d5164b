"""One run of GSM for six sizes, against a run of its own for each size.

LeNet-300-100 on MNIST, all 60,000 training images, test error of the last epoch. The
dense network and a run of its own have the rates of the table gsm_lenet300: 100 epochs,
then 240 with learning rate 3e-2, 3e-3, 3e-4 for 160, 40 and 40, the mask settled after
160. The one run goes through the sizes from the largest to the smallest, each for 48
epochs with the same proportions, and begins each size with the network that the last
one was cut to. So its six sizes cost 288 epochs, 1.2 times one run. Its masks settle
after 16 epochs of 48, so that the others have time to decay at the first learning rate:
by exp(-5.6), as `gsm_log_decay` tells.

    python benchmarks/gsm_sizes.py --json benchmarks/records/gsm_sizes.json

Runs that the file has already are not done again.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import optax

import sparse_optax
from sparse_optax.experiments import data, models

SIZES = (0.1, 0.05, 0.03, 0.02, 0.01, 0.005)
BATCH = 256
OWN_EPOCHS = 240
OWN_SETTLE = 160
STAGE_EPOCHS = 48
STAGE_SETTLE = 16
DENSE_EPOCHS = 100


class Trainer:
    """Trains LeNet-300-100 by whole epochs."""

    def __init__(self, mnist, apply):
        self.x, self.y = jnp.asarray(mnist.train_x), jnp.asarray(mnist.train_y)
        self.test_x, self.test_y = jnp.asarray(mnist.test_x), jnp.asarray(mnist.test_y)
        self.apply = apply
        self.steps = len(self.x) // BATCH

    def run(self, tx, params, epochs, seed):
        """The weights after so many epochs."""

        @jax.jit
        def epoch(params, opt_state, key):
            rows = jax.random.permutation(key, len(self.x))
            rows = rows[: self.steps * BATCH].reshape(self.steps, BATCH)

            def step(run, rows):
                params, opt_state = run
                grads = jax.grad(self.loss)(params, self.x[rows], self.y[rows])
                updates, opt_state = tx.update(grads, opt_state, params)
                return (optax.apply_updates(params, updates), opt_state), None

            return jax.lax.scan(step, (params, opt_state), rows)[0]

        opt_state = tx.init(params)
        for key in jax.random.split(jax.random.key(seed), epochs):
            params, opt_state = epoch(params, opt_state, key)
        return params

    def loss(self, params, x, y):
        scores = self.apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    def error(self, params):
        """Test error in percent."""
        wrong = self.apply(params, self.test_x).argmax(-1) != self.test_y
        return round(100 * float(wrong.mean()), 2)

    def gsm(self, params, density, epochs, settle, seed):
        """Weights cut to ``density`` after GSM, and what was measured."""
        falls = {epochs * i // 6 * self.steps: 0.1 for i in (4, 5)}
        rate = optax.piecewise_constant_schedule(3e-2, falls)
        tx = sparse_optax.gsm(rate, density, settle_start=settle * self.steps)
        params = self.run(tx, params, epochs, seed)
        gap = sparse_optax.gsm_gap(params, density)
        masks = sparse_optax.masks.magnitude_masks(params, density)
        cut = sparse_optax.sparsify(params, masks)
        return cut, {
            "epochs": epochs,
            "alive": gap.alive,
            "kept": gap.kept,
            "error_before_cut": self.error(params),
            "error": self.error(cut),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, required=True, metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    mnist = data.load("mnist", split="full")
    apply, params = models.create(
        "lenet-300-100", (28, 28, 1), 10, key=jax.random.key(arguments.seed)
    )
    trainer = Trainer(mnist, apply)
    fall = {epoch * trainer.steps: 0.1 for epoch in (20, 40, 60, 80)}
    sgd = optax.chain(
        optax.add_decayed_weights(5e-4, mask=sparse_optax.decay_mask),
        optax.sgd(optax.piecewise_constant_schedule(3e-2, fall), 0.9, nesterov=True),
    )
    dense = trainer.run(sgd, params, DENSE_EPOCHS, arguments.seed)
    found = json.loads(arguments.json.read_text()) if arguments.json.exists() else []

    def done(record):
        keys = ("kind", "density", "seed")
        return any(all(old[k] == record[k] for k in keys) for old in found)

    def keep(record):
        versions = {"jax": jax.__version__, "optax": optax.__version__}
        found.append(record | versions)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        print(record, flush=True)

    about = {"kind": "dense", "density": 1.0, "seed": arguments.seed}
    if not done(about):
        keep(about | {"epochs": DENSE_EPOCHS, "error": trainer.error(dense)})
    about = {"kind": "one run", "density": SIZES[-1], "seed": arguments.seed}
    if not done(about):
        params, stages = dense, []
        for number, density in enumerate(SIZES):
            params, record = trainer.gsm(
                params, density, STAGE_EPOCHS, STAGE_SETTLE, 1000 + number
            )
            print(density, record, flush=True)
            stages.append({"density": density} | record)
        for stage in stages:
            keep(about | stage)
    for density in SIZES:
        about = {"kind": "own run", "density": density, "seed": arguments.seed}
        if not done(about):
            _, record = trainer.gsm(dense, density, OWN_EPOCHS, OWN_SETTLE, 2000)
            keep(about | record)


if __name__ == "__main__":
    main()
