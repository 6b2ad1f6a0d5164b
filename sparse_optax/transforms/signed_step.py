"""A noisy step of weights with fixed signs, for DEEP-R."""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import Leaf, PyTree, check_real, is_hole, leaf_names
from sparse_optax.masks.make import Key, as_key, hashed_scores, random_scores
from sparse_optax.masks.tree import flatten, unpack
from sparse_optax.selection.leaf import wide as as_wide

# Differs from the keys of first masks and cycles, which fold in small numbers.
_OWN = np.uint32(zlib.crc32(b"signed_step"))


class SignedStepState(NamedTuple):
    """State of ``signed_step``."""

    count: jax.Array  # finished updates, int32
    key: jax.Array  # random key data, uint32
    positive: PyTree  # the signs: a tree like the parameters, bool


@boundary("signed_step")
def signed_step(
    learning_rate: optax.ScalarOrSchedule,
    *,
    l1: optax.ScalarOrSchedule,
    noise: optax.ScalarOrSchedule = 0.0,
    temperature: optax.ScalarOrSchedule,
    key: Key,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds L1 and noise to updates, and lets no weight cross zero, as in DEEP-R.

    With theta = sign * w and the incoming update u, for an active weight:

    .. math:: \theta \leftarrow \max(0, \theta + sign \cdot u - \eta \lambda
              + \sqrt{\eta^2 \sigma^2 + 2 \eta T} \; \nu), \quad \nu \sim N(0, 1)

    The sign is that of the first parameters, and random for those that are missing or
    zero. It is the last transformation inside ``regrow``, which passes the masks. If
    :math:`\sigma`, the ``noise``, and T are the number 0, nothing is drawn.
    """
    given = {
        "learning_rate": learning_rate,
        "l1": l1,
        "gradient_noise": noise,
        "temperature": temperature,
    }

    def init_fn(params):
        for name, value in given.items():
            checks.first_value(name, value, 0, cure="Use 0 to leave it out.")
        seed = as_key(key)
        seed = jax.random.fold_in(seed, _OWN)
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        names = leaf_names(params)
        # A number of Python has no missing weights, and no sign of its own.
        signs = [x if is_hole(x) else jnp.zeros([], bool) for x in flat]
        there = [i for i, x in enumerate(flat) if hasattr(x, "shape")]
        bits = random_scores(seed, [names[i] for i in there], [flat[i] for i in there])
        for i, x in zip(there, bits, strict=True):
            signs[i] = x >> 31 == 1
        return SignedStepState(
            count=jnp.zeros([], jnp.int32),
            key=jnp.array(jax.random.key_data(seed), copy=True),
            positive=jax.tree.unflatten(structure, signs),
        )

    def update_fn(updates, state, params=None, **extra_args):
        exist = extra_args.get("regrow_masks")
        if exist is None or params is None:
            raise ArgumentError(
                "`regrow_masks` or `params` is None; they must say which "
                "weights exist. Put it inside regrow, as deep_rewiring does."
            )

        def at(name, value):
            return checks.scalar(name, value(state.count)) if callable(value) else value

        eta, strength, spread, heat = (at(*pair) for pair in given.items())
        cold = all(isinstance(x, int | float) and x == 0 for x in (heat, spread))
        seed = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.count)
        first = state.count == 0
        moves = flatten(exist)[0]
        flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
        weights, signs = (
            jax.tree.leaves(tree, is_leaf=is_hole) for tree in (params, state.positive)
        )
        index = [i for i, move in enumerate(moves) if not is_hole(move)]
        names = leaf_names(params)
        chosen = [weights[i] for i in index]
        drawn = [None] * len(index)
        if not cold:
            drawn = hashed_scores(seed, [names[i] for i in index], chosen)
        for i, bits in zip(index, drawn, strict=True):
            w, move = weights[i], unpack(moves[i])
            check_real([Leaf(names[i], w.shape, w.dtype)], "a sign")
            decided = jnp.logical_and(first, jnp.logical_and(move, w != 0))
            signs[i] = positive = jnp.where(decided, w > 0, signs[i])
            step = flat[i].astype(as_wide(flat[i].dtype))
            step = step - eta * strength * jnp.where(positive, 1.0, -1.0)
            if bits is not None:
                size = jnp.sqrt((eta * spread) ** 2 + 2.0 * eta * heat)
                step += size * _normal(bits)
            # In the parameter's dtype, so that the sum equals that of apply_updates.
            step = step.astype(w.dtype)
            after = w + step
            across = jnp.where(positive, after < 0, after > 0)
            flat[i] = jnp.where(jnp.logical_and(move, across), -w, step)
        tree = jax.tree.structure(state.positive, is_leaf=is_hole)
        return jax.tree.unflatten(structure, flat), SignedStepState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            key=state.key.astype(jnp.uint32),
            positive=jax.tree.unflatten(tree, signs),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _normal(bits: jax.Array) -> jax.Array:
    """Normal numbers from 24 uniform bits, by the inverse of their distribution."""
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-23 + (2.0**-24 - 1)  # (-1, 1)
    return np.float32(np.sqrt(2)) * jax.scipy.special.erfinv(uniform)
