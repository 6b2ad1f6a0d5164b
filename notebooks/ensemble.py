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
# # An ensemble under vmap
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/ensemble.ipynb)
#
# `jax.vmap` trains several sparse networks at once, each with its own weights, masks
# and cycles. We compare a dense network with ten sparse ones that have, together, about
# as many weights, on the handwritten digits of scikit-learn.

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
from sparse_optax import report
from sparse_optax.experiments import data, models

# %%
digits = data.load("digits")
digits = digits._replace(
    train_x=jnp.asarray(digits.train_x), train_y=jnp.asarray(digits.train_y)
)
batch_size, epochs, members, density = 32, 40, 10, 0.1
steps = len(digits.train_x) // batch_size


def create(key):
    return models.create("lenet-300-100", (8, 8, 1), 10, key=key)[1]


apply, _ = models.create("lenet-300-100", (8, 8, 1), 10, key=jax.random.key(0))


def loss(params, images, labels):
    logits = apply(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# %% [markdown]
# ## Train
#
# A member is a function of a key. `vmap` makes ten of it. Each member hands its own key
# to the method: an integer would give the same masks to all.

# %%


def train(make, key):
    """Outputs for the test images after each epoch, and the final state."""
    for_params, for_masks, for_batches = jax.random.split(key, 3)
    params, tx = create(for_params), make(for_masks)

    def epoch(run, key):
        rows = jax.random.permutation(key, len(digits.train_x))
        rows = rows[: steps * batch_size].reshape(steps, batch_size)

        def step(run, rows):
            params, state = run
            grads = jax.grad(loss)(params, digits.train_x[rows], digits.train_y[rows])
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        run, _ = jax.lax.scan(step, run, rows)
        return run, jax.nn.softmax(apply(run[0], digits.test_x))

    keys = jax.random.split(for_batches, epochs)
    return jax.lax.scan(epoch, (params, tx.init(params)), keys)


def sgd():
    return optax.sgd(0.05, momentum=0.9, nesterov=True)


def rigl(key):
    return sparse_optax.rigl(
        sgd(),
        density=sparse_optax.budgets.erdos_renyi_kernel(density),
        update_period=steps,
        update_stop=epochs * steps,
        key=key,
    )


keys = jax.random.split(jax.random.key(0), members)
(_, states), outputs = jax.jit(jax.vmap(lambda key: train(rigl, key)))(keys)
_, dense = jax.jit(jax.vmap(lambda key: train(lambda _: sgd(), key)))(keys[:3])
assert not report.same_masks(states)
masks = sparse_optax.get_masks(states)
counts = sum(layer["kernel"].sum(axis=(1, 2)) for layer in masks.values())
print(f"weights of the members: {counts}, in all {int(counts.sum()):,}")


def error(probabilities):
    return 100 * (probabilities.argmax(-1) != digits.test_y).mean(axis=-1)


mean = outputs.mean(axis=0)  # over the members
alone, together, one = error(outputs[:, -1]), error(mean[-1]), error(dense[:, -1])
print(
    f"members alone {alone.min():.1f} to {alone.max():.1f}%, together {together:.1f}%"
)
print(f"dense networks, each of 50,200 weights: {np.round(np.asarray(one), 1)}")

# %%
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(12, 3.4), layout="constrained"
)
x = range(1, epochs + 1)
left.plot(x, error(outputs).T, color="0.75", lw=0.8)
left.plot([], [], color="0.75", label="members")
left.plot(x, error(mean), "-", color="C0", label="together")
left.plot(x, error(dense).mean(axis=0), ":", color="C1", label="dense, mean of 3")
left.set(xlabel="epoch", ylabel="test error (%)", ylim=(0, 25))
left.legend(frameon=False)
sizes = range(1, members + 1)
middle.plot(sizes, [error(outputs[:n, -1].mean(axis=0)) for n in sizes], "o-")
middle.set(xlabel="members", ylabel="test error of the ensemble (%)", ylim=(0, 12))
kernel = np.asarray(masks["fc1"]["kernel"]).reshape(members, -1).astype(float)
shared = kernel @ kernel.T / kernel.sum(axis=1)
picture = right.imshow(100 * shared, vmin=0, vmax=100)
right.set(title="shared weights of fc1 (%)", xlabel="member", ylabel="member")
figure.colorbar(picture, ax=right)
plt.show()

# %% [markdown]
# Left: the members in grey and the mean of their probabilities. Middle: the error by
# the number of members, in the order of their keys. Right: the share of the weights of
# the first layer that two members have in common, about as many as by chance.
# Differences of one or two test images, 0.28% each, mean nothing: on this task the
# ensemble is as good as a dense network, not better.
