"""What several test files need: small trees, and one way to call a cycle."""

import contextlib
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_optax
from sparse_optax import regrowth


def as_users_compile(test):
    """Marks a test that compares the bits of two programs, one of them on a mesh.

    Without XLA's optimizations and fusions a sum may be rounded differently in the two.
    """
    reason = "bits of two programs: run with XLA's optimizations"
    off = pytest.mark.skipif(
        jax.config.read("jax_disable_most_optimizations"), reason=reason
    )
    return pytest.mark.core(off(test))


def cpu_devices(number):
    """Environment of a process with so many, which compiles like this one otherwise."""
    flag = f"--xla_force_host_platform_device_count={number}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    return {"XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "0"}


def network(shapes, values=None):
    """``{"Dense_0": {"bias", "kernel"}, ...}``; values is a list of kernels or None."""
    rng = np.random.default_rng(0)
    return {
        f"Dense_{i}": {
            "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
            "kernel": jnp.asarray(
                rng.normal(size=shape) if values is None else values[i], jnp.float32
            ),
        }
        for i, shape in enumerate(shapes)
    }


def kernels(tree):
    """The kernels of ``network`` or the masks of a mask tree, as NumPy arrays."""
    return [np.asarray(layer["kernel"]) for _, layer in sorted(tree.items())]


def random_gradients(seed, params, steps):
    """Normal gradients with a leading axis of ``steps``."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=(steps, *p.shape)), p.dtype), params
    )


def at_step(stacked, t):
    """Step ``t`` of ``random_gradients``."""
    return jax.tree.map(lambda g: g[t], stacked)


def mask_tree(arrays):
    """The mask tree of ``network`` whose kernels have these masks."""
    return {
        f"Dense_{i}": {"bias": optax.MaskedNode(), "kernel": jnp.asarray(m)}
        for i, m in enumerate(arrays)
    }


@jax.jit
def _cycle(params, mask, momentum, rate):
    evidence = regrowth.Evidence(params=params, masks=mask, momentum=momentum)
    return regrowth.cycle(
        evidence,
        prune=regrowth.prune.magnitude,
        redistribute=regrowth.redistribute.momentum,
        grow=regrowth.grow.momentum,
        prune_rate=rate,
    )


def run_cycle(params, mask, momentum, rate):
    """``regrowth.cycle`` of sparse momentum on lists: ``(masks, removed, grown)``."""
    arrays = (tuple(jnp.asarray(x) for x in xs) for xs in (params, mask, momentum))
    result = _cycle(*arrays, jnp.float32(rate))
    masks = [np.asarray(m) for m in result.masks]
    return masks, result.removed.tolist(), result.grown.tolist()


def stepper(tx):
    """One jitted training step ``(params, state, grads) -> (params, state)``."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def kept(state):
    """The masks of a state as a list of NumPy arrays."""
    return [np.asarray(m) for m in jax.tree.leaves(sparse_optax.get_masks(state))]


# A cure is an order to the caller.
CURE = (
    r"\b(pass|give|use|choose|wrap|move|call|set|put|leave|correct|raise|lower|name|"
    r"make|start|keep|take|add|drop|hand|convert|write|check|cast|swap|prefer)\b"
)


@contextlib.contextmanager
def refuses(function, argument, value="", allowed=""):
    """Checks that a message names function, argument, value, range and a cure.

    ``value`` and ``allowed`` are regular expressions.
    """
    with pytest.raises(ValueError, match=r".") as caught:
        yield caught
    text = str(caught.value)
    assert text.startswith(function), f"names another function: {text}"
    for what, pattern in (
        ("the argument", re.escape(argument)),
        ("the value", value),
        ("the range", allowed),
        ("a cure", f"(?i){CURE}"),
    ):
        assert re.search(pattern, text), f"does not name {what} ({pattern}): {text}"
