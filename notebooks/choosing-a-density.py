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
# # Choosing a density
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/choosing-a-density.ipynb)
#
# How few weights are enough, which layers can spare them, and how large is the file?
# This notebook answers the three questions for LeNet-300-100 on the handwritten digits
# of scikit-learn: the error by density, the sensitivity of each layer, measured and
# predicted, and a budget in bytes.

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
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import sparse_optax
from sparse_optax import analysis, budgets
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


# %%
def train(tx, params, epochs):
    epoch, opt_state = make_epoch(tx), tx.init(params)
    for number in range(epochs):
        params, opt_state = epoch(params, opt_state, jax.random.key(number))
    return params, opt_state


sgd = optax.sgd(0.05, momentum=0.9, nesterov=True)
dense, _ = train(sgd, first_params, 30)
print(f"dense: test error {test_error(dense):.1f}%")

# %% [markdown]
# ## Which layers can spare weights?
#
# `layer_sensitivity` prunes each layer alone and measures the loss on images that were
# not trained on, here the validation images. One run of GSM predicts the same: it ranks
# the weights of all layers in one pool, so that a layer which the loss needs more keeps
# more of them.

# %%
held_out = [(jnp.asarray(digits.valid_x), jnp.asarray(digits.valid_y))]


def held_out_loss(params, batch):
    return loss(params, *batch)


densities = (0.5, 0.2, 0.1, 0.05, 0.02)
measured = analysis.layer_sensitivity(held_out_loss, dense, held_out, densities)
gsm = sparse_optax.gsm(1e-2, 0.05, weight_decay=2e-3, settle_start=40 * steps)
after, _ = train(gsm, dense, 60)
cut = sparse_optax.sparsify(after, sparse_optax.masks.magnitude_masks(after, 0.05))
predicted = analysis.surviving_densities(cut)
agreement = measured.agreement(predicted)
for name, damage in zip(measured.names, measured.damage(), strict=True):
    print(f"{name}: loss +{damage:.3f}, GSM keeps {100 * predicted[name]:.1f}%")
print(f"rank correlation {agreement.value:.1f}")

# %% [markdown]
# The left figure shows what each layer costs when it is pruned alone. Three layers are
# too few for an interval of the correlation; it means something for networks of ten
# layers and more.
#
# ## The error by density
#
# The same method, gradual pruning, at four densities and under two budgets: the same
# share for each layer, and more for small layers (Erdos-Renyi-kernel).

# %%
points = (0.2, 0.05, 0.01, 0.005)
epochs = 25
curves = {}
for name, budget in (
    ("same share", budgets.uniform),
    ("Erdos-Renyi-kernel", budgets.erdos_renyi_kernel),
):
    curves[name] = []
    for density in points:
        tx = sparse_optax.gradual_magnitude(
            sgd,
            density=budget(density),
            update_period=steps // 2,
            update_stop=15 * steps,
        )
        params, _ = train(tx, first_params, epochs)
        curves[name].append(test_error(params))
    print(name, [round(error, 1) for error in curves[name]])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for name, values, style in zip(
    measured.names, measured.values, ("o-", "s--", "^:"), strict=True
):
    left.plot(100 * np.asarray(measured.densities), values, style, label=name)
left.axhline(measured.dense, color="black", lw=0.8, ls=(0, (5, 5)), label="dense")
left.set(xscale="log", xlabel="weights of this layer (%)", ylabel="loss, one layer cut")
left.legend(frameon=False)
for (name, errors), style in zip(curves.items(), ("o-", "s--"), strict=True):
    right.plot([100 * d for d in points], errors, style, label=name)
right.axhline(test_error(dense), color="black", lw=0.8, ls=(0, (5, 5)), label="dense")
right.set(xscale="log", xlabel="weights of the network (%)", ylabel="test error (%)")
right.set_ylim(0, min(60, right.get_ylim()[1]))
right.legend(frameon=False)
for axes, shares in ((left, measured.densities), (right, points)):
    axes.set_xticks([100 * d for d in shares], [f"{100 * d:g}" for d in shares])
    axes.minorticks_off()
    axes.invert_xaxis()
plt.show()

# %% [markdown]
# ## A budget in bytes
#
# Often the size of a file is given, not a density. `budgets.num_bytes` finds the shares
# that fit, biases and headers included. The file of `save_sparse` is at most as large.

# %%
size = 8_000
tx = sparse_optax.gradual_magnitude(
    sgd,
    density=budgets.num_bytes(size),
    update_period=steps // 2,
    update_stop=15 * steps,
)
params, opt_state = train(tx, first_params, epochs)
masks = sparse_optax.get_masks(opt_state)
path = pathlib.Path("model.sparse")
sparse_optax.save_sparse(path, params, masks)
print(f"asked for at most {size:,} bytes, the file has {path.stat().st_size:,}")
print(f"{sparse_optax.masks.count(masks):,} weights, error {test_error(params):.1f}%")
assert path.stat().st_size <= size
dense_bytes = sum(w.nbytes for w in jax.tree.leaves(dense))
print(f"the dense network has {dense_bytes:,} bytes")

# %% [markdown]
# How to go on: choose the smallest density whose error you accept on validation images,
# train it with a longer schedule, and look at the layers in
# `sparse_optax.report.summary`. `sparse_optax.compact` makes the network smaller where
# whole units have no weights left.
