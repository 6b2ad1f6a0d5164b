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
# # Pruning a trained network with GSM
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/pruning-with-gsm.ipynb)
#
# GSM starts from a trained network. At each step only the gradients of the weights with
# the largest |gradient x weight| pass. Weight decay and a high momentum move all other
# weights to zero. In the end they are cut. This notebook trains LeNet-300-100 on the
# handwritten digits of scikit-learn, runs GSM on it down to 5% of the weights, and
# looks at what is left before the cut.

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
# ## The dense network

# %%
tx = optax.sgd(0.05, momentum=0.9, nesterov=True)
epoch, params, opt_state = make_epoch(tx), first_params, tx.init(first_params)
for number in range(30):
    params, opt_state = epoch(params, opt_state, jax.random.key(number))
dense = params
print(f"dense: test error {test_error(dense):.1f}%")
cut = sparse_optax.masks.magnitude_masks(dense, 0.05)
at_once = sparse_optax.sparsify(dense, cut)
print(f"cut at once to 5%: test error {test_error(at_once):.1f}%")

# %% [markdown]
# ## Can the decay reach zero?
#
# A weight whose gradient never passes is multiplied at each step by the same factor.
# `gsm_log_decay` gives the logarithm of what remains after a schedule: about 7, a
# factor of a thousand, is needed. It is necessary, but not sufficient: weights that
# pass now and then start again.

# %%
epochs, momentum, weight_decay = 120, 0.99, 2e-3
schedule = optax.piecewise_constant_schedule(1e-2, {80 * steps: 0.1, 100 * steps: 0.1})
found = sparse_optax.gsm_log_decay(
    schedule, momentum=momentum, weight_decay=weight_decay, steps=epochs * steps
)
print(f"logarithm of the decay: {float(found):.1f}")

# %% [markdown]
# ## GSM as the first element of a chain

# %%
tx = optax.chain(
    sparse_optax.gsm_mask(density=0.05),
    optax.add_decayed_weights(weight_decay, mask=sparse_optax.decay_mask),
    optax.sgd(schedule, momentum=momentum, nesterov=True),
)
epoch, params, opt_state = make_epoch(tx), dense, tx.init(dense)


def kernels(params):
    return np.abs(np.concatenate([np.ravel(x["kernel"]) for x in params.values()]))


history = []
for number in range(epochs):
    params, opt_state = epoch(params, opt_state, jax.random.key(1000 + number))
    sizes = kernels(params)
    history.append([(sizes >= bound).sum() for bound in (1e-3, 1e-4, 1e-6)])

gap = sparse_optax.gsm_gap(params, 0.05, opt_state)
pruned = sparse_optax.sparsify(params, sparse_optax.masks.magnitude_masks(params, 0.05))
print(f"kept by the cut {gap.kept:,}, alive before it {gap.alive:,}")
print(f"test error before the cut {test_error(params):.1f}%")
print(f"test error after the cut {test_error(pruned):.1f}%")
print(gap.advice)
assert int((kernels(pruned) > 0).sum()) <= gap.kept

# %% [markdown]
# The left figure counts the weights that are larger than a bound, after each epoch. The
# cut is free where the curves are below the dashed line. The learning rate falls at the
# dotted lines: from then on the weights no longer move much, and what is alive stays
# alive. In this run the cut also removes some weights that are alive: they are small,
# and so the error hardly changes. The right figure shows the sizes of the weights of
# both networks.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for line, label, style in zip(
    np.transpose(history), ("1e-3", "1e-4", "1e-6"), ("-", "--", "-."), strict=True
):
    left.plot(range(1, epochs + 1), line, style, label=f"|w| at least {label}")
left.axhline(gap.kept, color="black", lw=0.8, ls=(0, (5, 5)), label="kept by the cut")
for fall in (80, 100):
    left.axvline(fall, color="grey", lw=0.8, ls=":")
left.set(yscale="log", xlabel="epoch of GSM", ylabel="weights")
left.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.9))
bins = np.logspace(-9, 1, 60)
right.hist(np.maximum(kernels(dense), 1e-9), bins, alpha=0.5, label="dense")
right.hist(np.maximum(kernels(params), 1e-9), bins, alpha=0.5, label="after GSM")
right.axvline(np.sort(kernels(params))[-gap.kept], color="black", ls="--", label="cut")
right.set(xscale="log", xlabel="|w|", ylabel="weights")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Where the weights are
#
# The gate ranks all layers as one pool, so that the share of each layer is a result.

# %%
masks = sparse_optax.masks.nonzero_masks(pruned)
shares = {name: float(layer["kernel"].mean()) for name, layer in masks.items()}
figure, axes = plt.subplots(figsize=(5, 2.2), layout="constrained")
bars = axes.barh(list(shares), [100 * share for share in shares.values()])
axes.bar_label(bars, fmt="%.1f%%", padding=3)
axes.set(xlabel="weights kept (%)")
axes.invert_yaxis()
axes.margins(x=0.15)
plt.show()

# %% [markdown]
# If the cut costs too much: train longer before the learning rate falls, use `gate`
# (fewer gradients pass than weights are kept) or `settle_start` (the mask is fixed from
# then on), both in `sparse_optax.gsm`.
