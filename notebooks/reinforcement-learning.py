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
# # Sparse reinforcement learning
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-optax/sparse_optax/blob/main/notebooks/reinforcement-learning.ipynb)
#
# An agent learns to swing a pendulum up and hold it, in a simulator written in JAX. The
# task is small: the whole training is one jitted program. First we train a dense agent
# (deep Q learning). Then one that is dense at first, is cut once to a tenth of its
# weights, and goes on with RigL. The target network is kept under the masks of the
# online network.

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
from sparse_optax import budgets, masks

# %% [markdown]
# ## The task
#
# State: angle (0 is up) and speed. Action: torque -2, 0 or 2. Reward: minus the squared
# angle and small costs of speed and torque. An episode has 100 steps of 0.1 s.

# %%
TORQUES, STEPS = jnp.array([-2.0, 0.0, 2.0]), 100


def observe(state):
    angle, speed = state
    return jnp.stack([jnp.cos(angle), jnp.sin(angle), speed / 4])


def move(state, action):
    angle, speed = state
    torque = TORQUES[action]
    wrapped = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
    reward = -(wrapped**2) - 0.1 * speed**2 - 0.001 * torque**2
    speed = jnp.clip(speed + 0.1 * (15 * jnp.sin(angle) + 3 * torque), -8, 8)
    return (angle + 0.1 * speed, speed), reward / 10


def start(key):
    angle, speed = jax.random.uniform(key, (2,), minval=-1, maxval=1)
    return jnp.pi * angle, speed


# %% [markdown]
# ## The agent
#
# A network of two hidden layers gives a value to each action.

# %%
SIZES = [(3, 128), (128, 128), (128, 3)]


def first_params(key):
    draw = jax.nn.initializers.he_normal()
    return {
        f"Dense_{i}": {
            "kernel": draw(jax.random.fold_in(key, i), size),
            "bias": jnp.zeros(size[1]),
        }
        for i, size in enumerate(SIZES)
    }


def values(params, x):
    for name in ("Dense_0", "Dense_1"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]


# %% [markdown]
# ## Training
#
# 32 agents of the same network act at once, mostly greedily, and write into a replay
# buffer. Each step has one update on a batch of 128. `episodes` counts episodes of the
# 32 agents; the number of updates is `episodes x 100`, and it is updates that
# `update_period`, `dense_until` and `update_stop` count.

# %%
AGENTS, BATCH, BUFFER, EPISODES = 32, 128, 32 * 2000, 60
UPDATES = EPISODES * STEPS


def loss(params, target, batch):
    x, action, reward, y = batch
    best = values(params, y).argmax(axis=1)  # double Q: chosen online, valued by target
    future = jnp.take_along_axis(values(target, y), best[:, None], axis=1)[:, 0]
    chosen = jnp.take_along_axis(values(params, x), action[:, None], axis=1)[:, 0]
    return optax.huber_loss(chosen, reward + 0.97 * future).mean()


def make_episode(tx, is_sparse):
    def step(run, t):
        params, target, opt_state, states, buffer, count, key = run
        key, explore, which, draw = jax.random.split(key, 4)
        x = jax.vmap(observe)(states)
        rate = jnp.maximum(0.05, 1 - count / (0.2 * UPDATES))
        random = jax.random.randint(which, (AGENTS,), 0, 3)
        wild = jax.random.uniform(explore, (AGENTS,)) < rate
        action = jnp.where(wild, random, values(params, x).argmax(axis=1))
        states, reward = jax.vmap(move)(states, action)
        new = (x, action, reward, jax.vmap(observe)(states))
        at = count * AGENTS % BUFFER
        buffer = jax.tree.map(
            lambda old, part: jax.lax.dynamic_update_slice_in_dim(old, part, at, 0),
            buffer,
            new,
        )
        filled = jnp.minimum((count + 1) * AGENTS, BUFFER)
        rows = jax.random.randint(draw, (BATCH,), 0, filled)
        batch = jax.tree.map(lambda part: part[rows], buffer)
        grads = jax.grad(loss)(params, target, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        target = optax.incremental_update(params, target, 0.01)
        if is_sparse:
            target = sparse_optax.sparsify(target, opt_state)  # under the online masks
        return (params, target, opt_state, states, buffer, count + 1, key), None

    def test(params, key):
        """Mean reward of a greedy step, over 64 episodes."""

        def act(states, _):
            action = values(params, jax.vmap(observe)(states)).argmax(axis=1)
            return jax.vmap(move)(states, action)

        states = jax.vmap(start)(jax.random.split(key, 64))
        return jax.lax.scan(act, states, length=STEPS)[1].mean()

    @jax.jit
    def episode(run):
        key, draw = jax.random.split(run[-1])
        states = jax.vmap(start)(jax.random.split(draw, AGENTS))
        run, _ = jax.lax.scan(
            step, (*run[:3], states, *run[4:6], key), jnp.arange(STEPS)
        )
        return run, test(run[0], jax.random.key(7))

    return episode


def train(tx, is_sparse, seed=0):
    params = first_params(jax.random.key(seed))
    buffer = (
        jnp.zeros((BUFFER, 3)),
        jnp.zeros(BUFFER, jnp.int32),
        jnp.zeros(BUFFER),
        jnp.zeros((BUFFER, 3)),
    )
    run = (params, params, tx.init(params), None, buffer, jnp.int32(0))
    run = (*run, jax.random.key(seed + 1))
    rewards, densities = [], []
    episode = make_episode(tx, is_sparse)
    for _ in range(EPISODES):
        run, reward = episode(run)
        rewards.append(float(reward))
        densities.append(masks.density(masks.nonzero_masks(run[0])))
    return run, rewards, densities


adam = optax.adam(1e-3)
dense = train(adam, False)
print(f"dense: mean reward {np.mean(dense[1][-10:]):.3f} of the last 10 episodes")

# %% [markdown]
# ## Dense first, one cut, then RigL

# %%
tx = sparse_optax.rigl(
    adam,
    density=budgets.erdos_renyi(0.1),
    dense_until=UPDATES // 4,
    update_period=100,
    update_stop=3 * UPDATES // 4,
    key=0,
)
sparse = train(tx, True)
params, target, opt_state = sparse[0][:3]
kept = sparse_optax.get_masks(opt_state)
outside = masks.difference(masks.nonzero_masks(target), kept)
print(f"sparse: mean reward {np.mean(sparse[1][-10:]):.3f} of the last 10 episodes")
print(f"{masks.count(kept):,} of {sum(m * n for m, n in SIZES):,} weights")
assert masks.count(outside) == 0  # the target has the masks of the online network

# %%
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(12, 3.4), layout="constrained"
)
episodes = range(1, EPISODES + 1)
left.plot(episodes, dense[1], ":", label="dense")
left.plot(episodes, sparse[1], "-", label="dense, cut, RigL")
left.axvline(EPISODES / 4, color="grey", lw=0.8, ls="--", label="the cut")
left.set(xlabel="episode", ylabel="mean reward of a step")
left.legend(frameon=False)
middle.plot(episodes, [100 * density for density in sparse[2]])
middle.set(xlabel="episode", ylabel="weights that are not zero (%)", ylim=(0, 105))
for (_, result), label, style in (
    ((None, dense[0][0]), "dense", ":"),
    ((None, params), "dense, cut, RigL", "-"),
):
    state, angles = (jnp.float32(jnp.pi), jnp.float32(0.0)), []
    for _ in range(STEPS):
        angles.append(float((state[0] + jnp.pi) % (2 * jnp.pi) - jnp.pi))
        state, _ = move(state, values(result, observe(state)).argmax())
    right.plot(np.arange(STEPS) / 10, np.abs(angles), style, label=label)
right.set(xlabel="seconds", ylabel="|angle|, 0 is up", title="from hanging down")
right.legend(frameon=False)
plt.show()

# %% [markdown]
# Left: the reward of a greedy agent after each episode; 0 would be upright at every
# step. Middle: the share of the weights that are not zero. Right: one episode from the
# lowest point. This is one seed, and rewards of deep Q learning vary much between
# seeds: do not rank the two by this plot.
