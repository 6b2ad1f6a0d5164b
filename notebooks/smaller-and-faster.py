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
# # From a checkpoint to a smaller, faster model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/smaller-and-faster.ipynb)
#
# A sparse network has as many bytes and takes as much time as a dense one, until its
# zeros are used. We train a network of 1,000 and 500 hidden units with 2% of its
# weights, on the digits that come with scikit-learn. Then we make it small: on disk, in
# memory, and in time. The same steps work for a function of any framework. Where they
# do not pay, the notebook shows that too.

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
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import sparse_optax
from sparse_optax import export
from sparse_optax.analysis import measure_speedup
from sparse_optax.experiments import data

# %% [markdown]
# ## The network
#
# Sparse momentum keeps 2% of the weights from the first step to the last. The learning
# rate falls to zero along a cosine. A dense network is trained for comparison.
# With so few images the sparse network loses more than it does on MNIST: errors by
# density are in the [results](https://github.com/sparse-optax/sparse_optax/blob/main/docs/results.md).

# %%
digits = data.load("digits")
images = digits.train_x.reshape(len(digits.train_x), -1)
test_images = digits.test_x.reshape(len(digits.test_x), -1)
sizes = (64, 1000, 500, 10)
draw = jax.nn.initializers.he_normal()
params = {
    f"layer{i}": {
        "kernel": draw(jax.random.key(i), (a, b)),
        "bias": jnp.zeros(b),
    }
    for i, (a, b) in enumerate(itertools.pairwise(sizes))
}


def model(params, x):
    for i in range(3):
        layer = params[f"layer{i}"]
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < 2 else x
    return x


epochs, batch = 30, 32
per_epoch = len(images) // batch
steps = epochs * per_epoch
sgd = optax.sgd(optax.cosine_decay_schedule(0.05, steps), momentum=0.9, nesterov=True)
sparse_momentum = sparse_optax.sparse_momentum_regrow(
    sgd,
    density=0.02,
    update_period=per_epoch,
    update_stop=steps * 3 // 4,
    key=0,
)


def train(tx, params, opt_state):
    @jax.jit
    def train_step(params, opt_state, x, y):
        def loss(params):
            scores = model(params, x)
            return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.key(epoch), len(images))
        for rows in order[: per_epoch * batch].reshape(per_epoch, batch):
            params, opt_state = train_step(
                params, opt_state, images[rows], digits.train_y[rows]
            )
    return params, opt_state


def test_error(scores):
    return 100 * float((scores.argmax(-1) != digits.test_y).mean())


dense, _ = train(sgd, params, sgd.init(params))
opt_state = sparse_momentum.init(params)
params = sparse_optax.sparsify(params, opt_state)
params, opt_state = train(sparse_momentum, params, opt_state)
print(f"test error of the dense network {test_error(model(dense, test_images)):.1f}%")
print(f"with 2% of its weights {test_error(model(params, test_images)):.1f}%")
print(sparse_optax.report.table(sparse_optax.report.summary(params, opt_state)))

# %% [markdown]
# ## The checkpoint
#
# `save_sparse` stores the kept weights and their positions. `dtype=` rounds the values
# as well: the positions, the biases and everything without a mask stay as they are.

# %%
folder = pathlib.Path("model")
folder.mkdir(exist_ok=True)
np.savez(folder / "dense.npz", *jax.tree.leaves(params))
np.savez_compressed(folder / "compressed.npz", *jax.tree.leaves(params))
files = {"dense": "dense.npz", "compressed .npz": "compressed.npz"}
for name, dtype in (("sparse", None), ("float16", "float16"), ("int8", "int8")):
    files[name] = f"{name}.sparse"
    sparse_optax.save_sparse(folder / files[name], params, opt_state, dtype=dtype)
kilobytes = {k: (folder / v).stat().st_size / 1000 for k, v in files.items()}

for name, size in kilobytes.items():
    line = f"{name:16} {size:8,.0f} KB"
    if files[name].endswith(".sparse"):
        loaded = sparse_optax.load_sparse(folder / files[name], like=params).dense()
        line += f", test error {test_error(model(loaded, test_images)):.1f}%"
    print(line)

# %% [markdown]
# ## A smaller model
#
# From here on we are another program: it has the file and the function. `compact` reads
# the traced function. It removes units that nothing goes into, units that nothing comes
# out of, and inputs that no weight reads. It keeps the function: no number changes but
# for the order of sums.

# %%
params = sparse_optax.load_sparse(folder / "sparse.sparse", like=params).dense()
small = sparse_optax.compact(model, params, test_images)
print(small.record.table())

scores = model(params, test_images)
gap = jnp.max(jnp.abs(small(small.params, test_images) - scores))
print(f"largest difference {gap:.1e}, largest score {jnp.max(jnp.abs(scores)):.1f}")
assert gap < 1e-4 * jnp.max(jnp.abs(scores))

# %% [markdown]
# The picture shows a corner of the second kernel: weights in black. Grey rows and
# columns are units without any weight on one side.

# %%
kernel = params["layer1"]["kernel"]
image = jnp.where(kernel != 0, 1.0, 0.0)
gone_in = ~(kernel != 0).any(1) | ~(params["layer0"]["kernel"] != 0).any(0)
gone_out = ~(kernel != 0).any(0) | ~(params["layer2"]["kernel"] != 0).any(1)
image = jnp.where(gone_in[:, None] | gone_out[None, :], 0.4, image)
figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
axes.imshow(image[:100, :150], cmap="Greys", interpolation="nearest")
axes.set(xlabel="output unit", ylabel="input unit", title="second kernel, 1000 x 500")
plt.show()

# %% [markdown]
# ## What is faster, on this machine
#
# `measure_speedup` sets the papers' estimates beside measured times, layer by layer:
# dense, compacted, and as a sparse matrix. The estimate by density assumes hardware
# that skips every zero. Your figures will differ from those below.

# %%
batches = (1, 32, 256, 2048)
found = {
    n: measure_speedup(model, params, jax.ShapeDtypeStruct((n, 64), jnp.float32))
    for n in batches
}
print(found[256].table())

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.plot(list(kilobytes.values()), list(kilobytes), "o", color="black")
left.set(xscale="log", xlim=(10, 10_000), xlabel="kilobytes", title="file")
left.grid(alpha=0.4)
left.invert_yaxis()
for form, style in (("compacted", "o-"), ("sparse", "s--")):
    right.plot(batches, [found[n].measured[form] for n in batches], style, label=form)
right.axhline(1, color="black", linestyle=":", label="dense")
right.set(xscale="log", xlabel="batch", ylabel="times faster than dense", title="time")
right.set_ylim(0, 1.2 * max(right.get_ylim()))
right.legend(frameon=False, ncols=3, loc="upper center")
plt.show()

# %% [markdown]
# Most of these zeros lie in whole units, so the smaller dense model gains more than
# sparse matrices do. Both together are possible: `export.to_sparse` of the smaller
# model takes a sparse matrix for layers where it measured a gain, and only there.

# %%
sparse = export.to_sparse(small, small.params, test_images[:256])
print(sparse.record.table())

# %% [markdown]
# ## The program without its code
#
# `jax.export` keeps the smaller program with its weights, for batches of any size.
# `program.serialize()` gives the bytes of a file; it needs the package flatbuffers, as
# does who loads it. Neither this library nor the code of the model is needed then.

# %%
(n,) = jax.export.symbolic_shape("n")
served = jax.jit(lambda x: small(small.params, x))
program = jax.export.export(served)(jax.ShapeDtypeStruct((n, 64), jnp.float32))
same = program.call(test_images[:5])
print(np.abs(same - scores[:5]).max())
assert jnp.allclose(same, scores[:5], atol=1e-4)

# %% [markdown]
# ## Next steps
#
# - [A smaller, faster model](https://github.com/sparse-optax/sparse_optax/blob/main/docs/deploy.md)
#   has ONNX, PyTorch and NumPy as well, and says which form pays when.
# - [Channels](https://github.com/sparse-optax/sparse_optax/blob/main/docs/channels.md)
#   removes whole units on purpose. Then the smaller model of a convolutional network is
#   faster too.
# - [Faster training](https://github.com/sparse-optax/sparse_optax/blob/main/docs/faster-training.md)
#   trains the smaller model between the cycles of the masks.
