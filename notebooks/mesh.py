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
# # Sparsity on a mesh of eight devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/mesh.ipynb)
#
# The library needs no setting for a mesh. Masks lie where the weights lie, and masks
# and weights have the same bits as on one device. We make eight devices out of one CPU,
# shard a network over them, and compare. No figure here is a measurement of speed.

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

jax.config.update("jax_num_cpu_devices", 8)  # before anything else uses JAX
jax.config.update("jax_platforms", "cpu")

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sparse_optax
from sparse_optax.experiments import data

print(jax.devices())

# %% [markdown]
# ## A network on a mesh
#
# Four devices along the batch, two along the outputs of a layer. Kernels are sharded
# over both.

# %%
mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
digits = data.load("digits")
images = np.asarray(digits.train_x).reshape(len(digits.train_x), -1)[:1024]
labels = np.asarray(digits.train_y)[:1024]
sizes = [(64, 256), (256, 128), (128, 16)]  # 16 outputs, of which 10 are used
draw = jax.nn.initializers.he_normal()
params = {
    f"Dense_{i}": {
        "kernel": draw(jax.random.key(i), size),
        "bias": jnp.zeros(size[1]),
    }
    for i, size in enumerate(sizes)
}
places = {
    "kernel": NamedSharding(mesh, P("data", "model")),
    "bias": NamedSharding(mesh, P("model")),
}
on_mesh = jax.device_put(params, {name: places for name in params})
jax.debug.visualize_array_sharding(on_mesh["Dense_0"]["kernel"])

# %% [markdown]
# ## Gradients once, updates twice
#
# Sums over a sharded batch are added in another order, so gradients differ in the last
# bit between one device and eight: that is not the method's doing. To compare the
# method we record gradients on one device, and replay the updates on the mesh.

# %%


def scores(params, x):
    for name in ("Dense_0", "Dense_1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]


@jax.jit
def gradient(params, x, y):
    def loss(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(scores(params, x), y)
        return losses.mean()

    return jax.grad(loss)(params)


tx = sparse_optax.sparse_momentum_regrow(
    optax.sgd(0.1, momentum=0.9), density=0.1, update_period=32, update_stop=320, key=0
)


@jax.jit
def apply(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


one, state = params, tx.init(params)
eight, its_state = on_mesh, jax.jit(tx.init)(on_mesh)
errors, same = [], []
for step in range(320):
    rows = np.random.default_rng(step).integers(0, len(images), 64)
    grads = gradient(one, images[rows], labels[rows])
    one, state = apply(one, state, grads)
    its_grads = jax.device_put(grads, {name: places for name in params})
    eight, its_state = apply(eight, its_state, its_grads)
    if step % 32 == 31:
        pairs = zip(
            jax.tree.leaves((one, sparse_optax.get_masks(state))),
            jax.tree.leaves((eight, sparse_optax.get_masks(its_state))),
            strict=True,
        )
        same.append(all(np.array_equal(a, b) for a, b in pairs))
        test_x = np.asarray(digits.test_x).reshape(len(digits.test_x), -1)
        wrong = np.asarray(scores(one, test_x)).argmax(-1) != np.asarray(digits.test_y)
        errors.append(100 * wrong.mean())
print(f"the same bits at all {len(same)} comparisons: {all(same)}")
assert all(same)

# %% [markdown]
# ## Where the masks lie

# %%
masks = sparse_optax.get_masks(its_state)
mask = masks["Dense_0"]["kernel"]
print(mask.sharding.spec, sparse_optax.masks.count(masks), "weights in all")

figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(1, 1.4)
)
left.plot(32 * np.arange(1, len(errors) + 1), errors, "o-")
left.set(xlabel="update", ylabel="test error (%)", ylim=(0, None))
owner = np.zeros(mask.shape)
for shard in mask.addressable_shards:
    owner[shard.index] = shard.device.id
right.imshow(
    np.where(mask, owner, np.nan),
    cmap="tab10",
    vmin=0,
    vmax=9,
    interpolation="nearest",
    aspect="auto",
)
right.set(xlabel="outputs", ylabel="inputs", title="kept weights, coloured by device")
plt.show()

# %% [markdown]
# ## What goes over the wire
#
# The compiled update has small all-reduces, of counts, and gathers nothing.

# %%
text = apply.lower(eight, its_state, its_grads).compile().as_text()
for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
    print(f"{kind:20} {text.count(f' {kind}(') + text.count(f' {kind}-start(')}")
