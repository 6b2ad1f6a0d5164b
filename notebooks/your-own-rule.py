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
# # Your own rule
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/your-own-rule.ipynb)
#
# A method is three rules: which weights are pruned, how many grow in each layer, which
# weights grow. A rule is a function of one record, the evidence. Here we write two
# growth rules and compare them with those of the library.

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
from sparse_optax import regrowth
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
# ## A rule
#
# The rule grows missing weights of inputs that many weights use already: its score is
# the number of kept weights at the same input, times the size of the gradient.
# `evidence.select` takes the highest scores of each layer, exactly `evidence.counts`.
# The score must be a function at module level, and it works element by element.

# %%


def score(gradient, popular, mask):
    return jnp.where(mask, -1.0, jnp.abs(gradient) * popular)


def by_popularity(evidence):
    popular = [
        jnp.broadcast_to(mask.sum(axis=1, keepdims=True), mask.shape).astype(
            jnp.float32
        )
        for mask in evidence.masks
    ]
    arrays = zip(evidence.gradient, popular, evidence.masks, strict=True)
    return evidence.select(arrays, evidence.counts, score)


popularity = regrowth.stateless(by_popularity, needs=("gradient",), exact=True)

# %% [markdown]
# The opposite rule prefers inputs with few weights.

# %%


def rare_score(gradient, popular, mask):
    return jnp.where(mask, -1.0, jnp.abs(gradient) / (1 + popular))


def by_rarity(evidence):
    popular = [
        jnp.broadcast_to(mask.sum(axis=1, keepdims=True), mask.shape).astype(
            jnp.float32
        )
        for mask in evidence.masks
    ]
    arrays = zip(evidence.gradient, popular, evidence.masks, strict=True)
    return evidence.select(arrays, evidence.counts, rare_score)


rarity = regrowth.stateless(by_rarity, needs=("gradient",), exact=True)

# %% [markdown]
# ## Compare
#
# `regrow` composes the rules. All else is the same in the four runs.

# %%
epochs = 25
rules = {
    "popular inputs": popularity,
    "rare inputs": rarity,
    "gradient": regrowth.grow.gradient,
    "random": regrowth.grow.random,
}
runs = {}
for name, grow in rules.items():
    tx = sparse_optax.regrow(
        optax.sgd(0.05, momentum=0.9, nesterov=True),
        density=0.05,
        prune=regrowth.prune.magnitude,
        redistribute=regrowth.redistribute.none,
        grow=grow,
        update_period=steps,
        update_stop=epochs * steps,
        key=0,
    )
    epoch, params, opt_state, errors = make_epoch(tx), first_params, None, []
    opt_state = tx.init(params)
    for number in range(epochs):
        params, opt_state = epoch(params, opt_state, jax.random.key(number))
        errors.append(test_error(params))
    masks = sparse_optax.get_masks(opt_state)
    assert sparse_optax.masks.count(masks) == 2_510
    runs[name] = errors, masks["fc1"]["kernel"].sum(axis=1)
    print(
        f"{name:15} test error {np.mean(errors[-5:]):.1f}% (mean of the last 5 epochs)"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for (name, (errors, counts)), style in zip(
    runs.items(), ("-", "--", "-.", ":"), strict=True
):
    left.plot(range(1, epochs + 1), errors, style, label=name)
    right.plot(np.sort(counts)[::-1], style, label=name)
left.set(xlabel="epoch", ylabel="test error (%)", ylim=(0, 40))
right.set(xlabel="pixels, sorted", ylabel="weights of the pixel")
left.legend(frameon=False)
plt.show()

# %% [markdown]
# Left: the errors. One test image is 0.28%, and this is one seed: do not rank rules
# that lie close together. Right: the rules differ in where the weights are. The first
# rule concentrates them on few pixels, the second one spreads them.
#
# A rule that remembers something is a `regrowth.Rule(init, apply)`. The page *Writing a
# rule* of the documentation describes what a rule sees and what it must return.
