# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Lottery tickets
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/lottery-tickets.ipynb)
#
# A ticket is a mask and the weights that the training began with (Frankle & Carbin,
# 2019). It wins if the sparse network, trained from there, is as good as the dense one.
# This notebook finds tickets of LeNet-300-100 on the handwritten digits of scikit-learn
# by rounds of training and pruning, and compares them with other masks of as many
# weights and with other first weights.

# %%
# Installs what is missing: from the checkout that this notebook lies in; elsewhere, as
# in Colab, from PyPI or else from the repository. Otherwise nothing happens.
import importlib.util
import pathlib
import subprocess
import sys

REPOSITORY = "https://github.com/sparse-optax/sparse_optax"


def pip_install(requirement):
    command = [sys.executable, "-m", "pip", "install", "--quiet", requirement]
    return subprocess.run(command, check=False).returncode == 0


needed = ("sparse_optax", "flax", "matplotlib", "sklearn")
if not all(map(importlib.util.find_spec, needed)) and not (
    pip_install("..[experiments]")
    if pathlib.Path("../pyproject.toml").exists()
    else pip_install("sparse_optax[experiments]")
    or pip_install(f"sparse_optax[experiments] @ git+{REPOSITORY}")
):
    raise RuntimeError("pip could not install sparse_optax; see its messages above")

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import sparse_optax
from sparse_optax.experiments import data, models

# %%
digits = data.load("digits")
digits = digits._replace(
    train_x=jnp.asarray(digits.train_x), train_y=jnp.asarray(digits.train_y)
)
apply, first = models.create("lenet-300-100", (8, 8, 1), 10, key=jax.random.key(0))
_, others = models.create("lenet-300-100", (8, 8, 1), 10, key=jax.random.key(1))
batch_size = 32
steps = len(digits.train_x) // batch_size  # an epoch


def loss(params, images, labels):
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def test_error(params):
    return 100 * float(
        (apply(params, digits.test_x).argmax(-1) != digits.test_y).mean()
    )


def make_epoch(tx):
    """One epoch in one jitted call: a scan over its batches."""

    @jax.jit
    def epoch(params, opt_state, key):
        rows = jax.random.permutation(key, len(digits.train_x))
        rows = rows[: steps * batch_size].reshape(steps, batch_size)

        def step(run, rows):
            params, opt_state = run
            grads = jax.grad(loss)(params, digits.train_x[rows], digits.train_y[rows])
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, opt_state), rows)[0]

    return epoch


# %% [markdown]
# ## Training under masks
#
# `static_sparse` keeps given masks: missing weights stay zero. All trainings here share
# one compiled program, since masks are data: they are handed over in the state.

# %%
epochs = 20
sgd = optax.sgd(0.05, momentum=0.9, nesterov=True)
full = sparse_optax.masks.magnitude_masks(first, 1.0)
tx = sparse_optax.static_sparse(sgd, masks=full)
epoch = make_epoch(tx)


def train(params, masks, seed=0):
    """Trains for 20 epochs; the masks stay as they are."""
    opt_state = sparse_optax.set_masks(tx.init(params), masks)
    for number in range(epochs):
        key = jax.random.fold_in(jax.random.key(seed), number)
        params, opt_state = epoch(params, opt_state, key)
    return params


def score(params, masks):
    """Mean test error of three trainings with other batches."""
    return np.mean([test_error(train(params, masks, seed)) for seed in (1, 2, 3)])


dense = train(first, full)
print(f"dense: test error {test_error(dense):.1f}%")

# %% [markdown]
# ## A ticket for each density
#
# `ticket_masks` trains, prunes the smallest weights, sets the others back to their
# first values, and trains again, `rounds` times. Other masks keep as many weights: the
# largest of the trained dense network, pruned in one round, and random ones with the
# same number in each layer.

# %%
densities = (0.2, 0.05, 0.02, 0.01)
found = {}
for density in densities:
    ticket = sparse_optax.ticket_masks(train, first, density, rounds=4)
    found[density] = sparse_optax.score_tickets(
        score,
        first,
        {
            "ticket, four rounds": ticket,
            "magnitude, one round": sparse_optax.masks.magnitude_masks(dense, density),
            "random, same shares": sparse_optax.random_masks_like(0, ticket),
        },
    )
    again = sparse_optax.rewind(others, others, ticket)
    found[density]["ticket, other first weights"] = score(again, ticket)
    print(density, {name: round(float(e), 1) for name, e in found[density].items()})

# %% [markdown]
# Each point is the mean of three trainings that differ in their batches. The dashed
# line is the dense network.

# %%
figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
styles = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
for name, (marker, line) in zip(found[densities[0]], styles, strict=True):
    errors = [found[density][name] for density in densities]
    axes.plot([100 * d for d in densities], errors, marker + line, label=name)
axes.axhline(test_error(dense), color="black", lw=0.8, ls=(0, (5, 5)), label="dense")
axes.set(xscale="log", xlabel="weights kept (%)", ylabel="test error (%)", ylim=(0, 40))
axes.set_xticks([100 * d for d in densities], [f"{100 * d:g}" for d in densities])
axes.minorticks_off()
axes.invert_xaxis()
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# What to look for: does the ticket stay near the dense line for longer than a mask of
# one round, and does it lose anything from other first weights? On this small task the
# mask matters more than the first weights, as in the
# [tables of MNIST](https://github.com/sparse-optax/sparse_optax/blob/main/docs/results.md).
# To go back to an early step instead of the start, hand `ticket_masks` and `rewind` the
# weights of that step.

# %%
counts = {
    d: sparse_optax.masks.count(sparse_optax.masks.magnitude_masks(dense, d))
    for d in densities
}
print("weights kept:", counts)
