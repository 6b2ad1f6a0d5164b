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
# # Sparse momentum from scratch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/sparse-momentum.ipynb)
#
# Sparse momentum trains a network that is sparse from the first step. Once a period it
# removes the smallest weights and grows as many, where the momentum is large. This
# notebook watches the masks move, on LeNet-300-100 with 5% of its weights and the
# handwritten digits of scikit-learn.

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
import itertools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import sparse_optax
from sparse_optax.experiments import data, models

# %%
digits = data.load("digits")
digits = digits._replace(
    train_x=jnp.asarray(digits.train_x), train_y=jnp.asarray(digits.train_y)
)
apply, first_params = models.create(
    "lenet-300-100", (8, 8, 1), 10, key=jax.random.key(0)
)
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
# ## Train and watch
#
# The masks are part of the optimizer state. We keep them after each epoch.

# %%
epochs = 40
tx = sparse_optax.sparse_momentum_regrow(
    optax.sgd(0.05, momentum=0.9, nesterov=True),
    density=0.05,
    update_period=steps,
    update_stop=epochs * steps,
    key=0,
)


def train(tx):
    epoch, opt_state = make_epoch(tx), tx.init(first_params)
    params = sparse_optax.sparsify(first_params, opt_state)
    errors, masks = [], [sparse_optax.get_masks(opt_state)]
    for number in range(epochs):
        params, opt_state = epoch(params, opt_state, jax.random.key(number))
        errors.append(test_error(params))
        masks.append(sparse_optax.get_masks(opt_state))
    return params, errors, masks


params, errors, masks = train(tx)
for kept in masks:  # at every moment exactly as many
    assert sparse_optax.masks.count(kept) == sparse_optax.masks.count(masks[0])
print(f"{sparse_optax.masks.count(masks[0]):,} weights, test error {errors[-1]:.1f}%")

# %% [markdown]
# ## What a fixed mask reaches
#
# The same first masks, which never move, and the dense network:

# %%
sgd = optax.sgd(0.05, momentum=0.9, nesterov=True)
_, fixed, _ = train(sparse_optax.static_sparse(sgd, masks=masks[0]))
dense_epoch, dense_state, dense = make_epoch(sgd), sgd.init(first_params), []
dense_params = first_params
for number in range(epochs):
    dense_params, dense_state = dense_epoch(
        dense_params, dense_state, jax.random.key(number)
    )
    dense.append(test_error(dense_params))
print(f"fixed random masks {fixed[-1]:.1f}%, dense {dense[-1]:.1f}%")

# %%
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(12, 3.4), layout="constrained"
)
for line, label, style in (
    (dense, "dense", ":"),
    (errors, "sparse momentum", "-"),
    (fixed, "fixed masks", "--"),
):
    left.plot(range(1, epochs + 1), line, style, label=label)
left.set(xlabel="epoch", ylabel="test error (%)", ylim=(0, 40))
left.legend(frameon=False)
for layer, style in zip(first_params, ("-", "--", ":"), strict=True):
    share = [100 * float(kept[layer]["kernel"].mean()) for kept in masks]
    middle.plot(share, style, label=layer)
middle.set(xlabel="epoch", ylabel="weights kept (%)", yscale="log")
middle.legend(frameon=False)
moved = [
    sparse_optax.masks.count(sparse_optax.masks.difference(b, a))
    for a, b in itertools.pairwise(masks)
]
right.bar(range(1, epochs + 1), moved)
right.set(xlabel="epoch", ylabel="weights that moved")
plt.show()

# %% [markdown]
# Left: the error. Middle: the share of each layer, on a logarithmic axis. All start at
# 5%; the small last layer gets a large share. Right: how many weights moved in each
# cycle. The prune rate falls from a half to zero along a cosine. No cycle runs before
# the second epoch.
#
# ## Where the weights of the first layer go

# %%
shown = (0, 5, 20, epochs)
figure, row = plt.subplots(1, len(shown), figsize=(10, 2.8), layout="constrained")
counts = [masks[i]["fc1"]["kernel"].sum(axis=1).reshape(8, 8) for i in shown]
for axes, i, count in zip(row, shown, counts, strict=True):
    picture = axes.imshow(count, vmin=0, vmax=max(c.max() for c in counts))
    axes.set(title=f"after {i} epochs", xticks=[], yticks=[])
figure.colorbar(picture, ax=row, label="weights kept per pixel")
plt.show()

# %% [markdown]
# Each picture has the 8 x 8 pixels of a digit. At the start the weights are spread
# evenly. In the end the middle columns, where the digits are drawn, have most.
