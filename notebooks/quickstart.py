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
# # Sparse training in two minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/quickstart.ipynb)
#
# We train LeNet-300-100 on the handwritten digits that come with scikit-learn. We do so
# three times: with all weights; with 5% of the weights from scratch (**sparse
# momentum**); and from a trained network down to 5% of the weights (**GSM**). Two CPU
# cores are enough.

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
import optax

import sparse_optax
from sparse_optax.experiments import data, models, plots
from sparse_optax.experiments.config import TrainConfig
from sparse_optax.experiments.train import train

# %% [markdown]
# ## One line in the optimizer
#
# The next cell is the complete program: a network, a loss, and the usual train step.
# `sparse_momentum_regrow` wraps the optimizer. Once per epoch it removes the smallest
# weights. It then grows as many of the missing weights, those with the largest
# momentum. The number of weights never changes.

# %%
digits = data.load("digits")
apply, params = models.create("lenet-300-100", (8, 8, 1), 10, key=jax.random.key(0))

batch_size, epochs = 32, 20
steps = len(digits.train_x) // batch_size

tx = sparse_optax.sparse_momentum_regrow(
    optax.sgd(0.05, momentum=0.9, nesterov=True),
    density=0.05,
    update_period=steps,
    update_stop=epochs * steps,
    key=0,
)
opt_state = tx.init(params)
params = sparse_optax.sparsify(params, opt_state)


@jax.jit
def train_step(params, opt_state, images, labels):
    def loss(params):
        logits = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def test_error(params):
    wrong = apply(params, digits.test_x).argmax(-1) != digits.test_y
    return 100 * float(wrong.mean())


first_masks = sparse_optax.get_masks(opt_state)
for epoch in range(epochs):
    order = jax.random.permutation(jax.random.key(epoch), len(digits.train_x))
    for rows in order[: steps * batch_size].reshape(steps, batch_size):
        params, opt_state = train_step(
            params, opt_state, digits.train_x[rows], digits.train_y[rows]
        )

masks = sparse_optax.get_masks(opt_state)
print(f"test error {test_error(params):.1f}%")
print(f"weights kept: {sparse_optax.masks.count(masks):,}")
assert sparse_optax.masks.count(masks) == sparse_optax.masks.count(first_masks)

# %% [markdown]
# Every weight outside the mask is exactly zero. No second function call is needed:

# %%
for layer in params:
    kernel, mask = params[layer]["kernel"], masks[layer]["kernel"]
    assert not jnp.any(jnp.where(mask, 0, kernel))
    print(f"{layer}: {int(mask.sum()):6,} of {mask.size:6,} weights kept")

# %% [markdown]
# At the start, each layer has the same share of weights, at random positions. The next
# figure counts the weights of the first layer for each pixel. After training, more of
# them are in the middle columns, where the digits are drawn:

# %%
per_pixel = {
    "before training": first_masks["fc1"]["kernel"].sum(axis=1).reshape(8, 8),
    "after training": masks["fc1"]["kernel"].sum(axis=1).reshape(8, 8),
}
most = max(counts.max() for counts in per_pixel.values())
figure, pair = plt.subplots(1, 2, figsize=(7, 2.8), layout="constrained")
for axes, (title, counts) in zip(pair, per_pixel.items(), strict=True):
    picture = axes.imshow(counts, vmin=0, vmax=most)
    axes.set(title=title, xticks=[], yticks=[])
figure.colorbar(picture, ax=pair, label="weights kept per pixel")
plt.show()

# %% [markdown]
# ## Dense, sparse momentum, GSM
#
# We now use the train loop of the experiments, which runs an epoch in one jitted call.
# Its numbers are not those of the first half: it trains for 100 epochs in place of 20,
# with weight decay, and with a learning rate of 0.1 that falls twice. GSM trains a
# dense network for 40 epochs and then goes on for 300.
#
# GSM starts from a trained network. At each step, only the gradients of the 5% of
# weights with the largest |gradient x weight| pass. The other weights decay towards
# zero. In the end they can be cut without further training.

# %%
runs = {
    name: train(TrainConfig(method=method, density=density), runs=None).record
    for name, method, density in (
        ("dense", "dense", 1.0),
        ("sparse momentum", "sparse_momentum", 0.05),
        ("GSM", "gsm", 0.05),
    )
}
for name, record in runs.items():
    results = record.results
    print(
        f"{name:16} {results['kept']:6,} of {results['weights']:,} weights, "
        f"test error {results['test_error']:.1f}%"
    )

# %% [markdown]
# There are 360 test images, so one image is 0.28%. The test images were written by
# other people than the training images. Differences of a few tenths of a percent are
# not significant here.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
plots.errors(left, runs)
sparse = {name: runs[name] for name in ("sparse momentum", "GSM")}
plots.layers(right, sparse, colours=plots.COLOURS[1:])
plt.show()

# %% [markdown]
# The number of weights of each layer was not given. Both methods keep a large share of
# the small last layer and a small share of the large layers.
#
# ## The cut
#
# After GSM many weights are almost zero. The cut sets them to zero. It costs nothing if
# no more weights are alive than are kept. It costs little if the weights that are cut
# are small. The figure shows the weights left above three sizes. `gsm_gap`
# counts the weights that are alive.

# %%
figure, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
plots.small_weights(axes, runs["GSM"])
plt.show()

results = runs["GSM"].results
print(f"alive before the cut  {results['gap']['alive']:6,}")
print(f"kept by the cut       {results['gap']['kept']:6,}")
print(f"test error before     {results['test_error_before_cut']:.2f}%")
print(f"test error after      {results['test_error']:.2f}%")

# %% [markdown]
# ## Next steps
#
# - `sparse-optax train --dataset mnist --density 0.02` trains on MNIST, with the recipe
#   of the paper.
# - `sparse-optax reproduce mnist_lenet300` runs the table of the paper and compares the
#   results.
# - `help(sparse_optax.sparse_momentum_regrow)` and `help(sparse_optax.gsm_mask)`
#   describe every argument.
