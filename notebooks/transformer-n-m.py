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
# # A small transformer with N:M sparsity
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/transformer-n-m.ipynb)
#
# In 2:4 sparsity, two of each four neighbouring weights along the inputs of a layer are
# kept. Some hardware multiplies such matrices faster. We train a small transformer to
# classify the handwritten digits of scikit-learn, a row of pixels at a time, dense and
# with 2:4 and 1:4.

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
from flax import nnx

import sparse_optax
from sparse_optax import patterns, report
from sparse_optax.experiments import data

digits = data.load("digits")
digits = digits._replace(
    train_x=jnp.asarray(digits.train_x), train_y=jnp.asarray(digits.train_y)
)
rows_x, rows_test = (
    digits.train_x[..., 0],
    digits.test_x[..., 0],
)  # eight rows of pixels
batch_size, epochs, width = 64, 40, 32
steps = len(rows_x) // batch_size

# %% [markdown]
# ## The model
#
# Each row of eight pixels is a token. Two blocks of attention and a feed-forward layer,
# and a mean over the tokens.

# %%


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.project = nnx.Linear(8, width, rngs=rngs)
        self.places = nnx.Param(0.02 * jax.random.normal(rngs.params(), (8, width)))
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.project(x) + self.places[None]
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=1))


# %% [markdown]
# `report.eligibility` tells what will be sparse. The places are an array of numbers
# that are added, not a kernel: we leave them out by name, and the small first and last
# layers, too.

# %%
params = nnx.state(Model(nnx.Rngs(0)), nnx.Param)


def where(name, leaf):
    return name.startswith("blocks/") and name.endswith("kernel")


print(report.eligibility(params, where=where).table())

# %% [markdown]
# ## Train
#
# `gradual_magnitude` with a pattern reduces the groups step by step: it keeps 4, then
# 3, then 2 of 4 weights. The axes of the inputs are read from the model: for the output
# layer of the attention they are two axes.

# %%
axes = patterns.contraction_axes(Model(nnx.Rngs(0)))


def optimizer(n):
    schedule = optax.cosine_decay_schedule(3e-3, epochs * steps)
    adamw = optax.adamw(schedule, weight_decay=0.05, mask=sparse_optax.decay_mask)
    if n == 4:
        return adamw
    return sparse_optax.gradual_magnitude(
        adamw,
        pattern=patterns.n_m(n, 4, axis=axes),
        where=where,
        update_period=steps,
        update_stop=epochs * steps // 2,
    )


def train(n):
    model = Model(nnx.Rngs(0))
    graph, params = nnx.split(model)
    tx = optimizer(n)

    def loss(params, x, y):
        scores = nnx.merge(graph, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    @jax.jit
    def epoch(params, opt_state, key):
        rows = jax.random.permutation(key, len(rows_x))[: steps * batch_size]

        def step(run, rows):
            params, opt_state = run
            grads = jax.grad(loss)(params, rows_x[rows], digits.train_y[rows])
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        run, _ = jax.lax.scan(
            step, (params, opt_state), rows.reshape(steps, batch_size)
        )
        scores = nnx.merge(graph, run[0])(rows_test)
        return *run, 100 * (scores.argmax(-1) != digits.test_y).mean()

    opt_state, errors, masks = tx.init(params), [], []
    for number in range(epochs):
        params, opt_state, error = epoch(params, opt_state, jax.random.key(number))
        errors.append(float(error))
        if n < 4:
            masks.append(sparse_optax.get_masks(opt_state))
    return params, errors, masks


runs = {n: train(n) for n in (4, 2, 1)}
names = {4: "dense", 2: "2:4", 1: "1:4"}
for n, (_, errors, _) in runs.items():
    print(f"{names[n]:6} test error {np.mean(errors[-5:]):.1f}% (last 5 epochs)")

# %% [markdown]
# Every group of four weights along the inputs keeps exactly two:

# %%
mask = runs[2][2][-1]["blocks"][0]["up"]["kernel"]
mask = np.asarray(mask[...])  # (inputs, outputs)
groups = mask.reshape(width // 4, 4, -1).sum(axis=1)
assert (groups == 2).all()
print(f"{groups.size:,} groups, each with {groups.min()} of 4 weights")

# %%
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(12, 3.4), layout="constrained", width_ratios=(1, 1, 1.2)
)
for (n, (_, errors, masks)), style in zip(runs.items(), (":", "-", "--"), strict=True):
    left.plot(range(1, epochs + 1), errors, style, label=names[n])
    if masks:
        share = [100 * sparse_optax.masks.density(each) for each in masks]
        middle.plot(
            range(1, epochs + 1), share, style, label=names[n], color=f"C{4 - n - 1}"
        )
left.set(xlabel="epoch", ylabel="test error (%)", ylim=(0, 30))
left.legend(frameon=False)
middle.set(xlabel="epoch", ylabel="weights kept in the blocks (%)", ylim=(0, 105))
middle.legend(frameon=False)
right.imshow(mask[:, :48], cmap="Greys", interpolation="nearest")
right.set(title="a mask: inputs down, outputs across", yticks=range(0, width, 4))
for edge in range(4, width, 4):
    right.axhline(edge - 0.5, color="C3", lw=0.8)
plt.show()

# %% [markdown]
# Left: the errors; one test image is 0.28%, and this is one seed. Middle: the groups
# lose weights in steps. Right: the mask of the first feed-forward layer; between two
# lines each column has two dark cells.
