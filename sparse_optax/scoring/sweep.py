"""Prunes one layer input by input, and lets the inputs that follow make up for it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from sparse_optax import selection
from sparse_optax.checks import ArgumentError
from sparse_optax.patterns import GroupsNM

# Reduced precision of matrix units would be amplified by the inverse.
_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def second_moments(x: jax.Array) -> jax.Array:
    """The matrix of products of inputs, summed over n, from (n, in)."""
    return _dot(x.T, x)


def sweep(
    weights: jax.Array,
    second: jax.Array,
    keep: int | GroupsNM,
    *,
    damping: float,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """Mask and new weights of a layer (in, out); see ``methods.sparse_gpt``."""
    inputs = weights.shape[0]
    whole = keep.m if isinstance(keep, GroupsNM) else 1
    block = max(min(block, inputs) // whole, 1) * whole
    blocks = -(-inputs // block)
    if isinstance(keep, GroupsNM):
        counts, group = np.full(blocks, keep.n), keep.m
    else:
        # Each block keeps its part of the whole number.
        ends = [min(i * block, inputs) for i in range(blocks + 1)]
        counts, group = np.diff([keep * end // inputs for end in ends]), block
    mask, new = _sweep(
        weights,
        second.astype(weights.dtype),
        damping,
        counts.astype(np.int32),
        block=block,
        group=group,
        rows=isinstance(keep, GroupsNM),
    )
    if not isinstance(new, Tracer) and not bool(jnp.isfinite(new).all()):
        raise ArgumentError(
            f"with `damping`={damping!r} H is not positive definite to the precision "
            "of its dtype. Raise `damping`, or give more batches."
        )
    return mask, new


def _factor(second: jax.Array, damping: jax.Array, used: jax.Array) -> jax.Array:
    """U, upper triangular, with U^T U the inverse of H. Its rows and columns from i on
    give that of H without the inputs before i. An input that is not used has a one.
    """
    identity = jnp.eye(second.shape[0], dtype=second.dtype)
    more = damping * jnp.mean(jnp.diagonal(second)) + jnp.where(used, 0, 1)
    hessian = second + jnp.diag(more.astype(second.dtype))
    lower = jnp.linalg.cholesky(hessian[::-1, ::-1])
    upper = lower[::-1, ::-1]  # times its transpose it is H
    return jnp.triu(jax.scipy.linalg.solve_triangular(upper, identity, lower=False))


@functools.partial(jax.jit, static_argnames=("block", "group", "rows"))
def _sweep(weights, second, damping, counts, *, block, group, rows):
    inputs = weights.shape[0]
    used = jnp.diagonal(second) > 0
    factor = _factor(second, damping, used)
    # The last block is filled up with inputs of no weight, which no other sees.
    spare = -inputs % block
    weights = jnp.pad(weights, ((0, spare), (0, 0)))
    identity = jnp.eye(spare, dtype=factor.dtype)
    factor = jax.scipy.linalg.block_diag(factor, identity) if spare else factor
    # What is not used ranks last, and what is filled up behind it.
    place = jnp.pad(used.astype(weights.dtype), (0, spare), constant_values=-1)
    places = jnp.arange(inputs + spare)

    def choose(scores, count):
        if rows:
            return selection.top_of_rows([scores.T], count).T
        return selection.top_k_mask([scores], count)[0]

    def of_block(number, carry):
        weights, mask = carry
        start = number * block
        own, across, where = (
            lax.dynamic_slice_in_dim(x, start, block) for x in (weights, factor, place)
        )
        inside = lax.dynamic_slice_in_dim(across, start, block, axis=1)
        pick = functools.partial(choose, count=counts[number])
        own, kept, errors = _block(own, inside, where, group, pick)
        # What comes later makes up for the whole block at once.
        later = jnp.where(places[None, :] >= start + block, across, 0)
        weights = weights - _dot(later.T, errors)
        weights = lax.dynamic_update_slice_in_dim(weights, own, start, axis=0)
        return weights, lax.dynamic_update_slice_in_dim(mask, kept, start, axis=0)

    first = weights, jnp.zeros(weights.shape, bool)
    weights, mask = lax.fori_loop(0, (inputs + spare) // block, of_block, first)
    mask = mask[:inputs]
    return mask, jnp.where(mask, weights[:inputs], 0)


def _block(own, factor, place, group, pick):
    """New weights, mask and errors of a block of inputs, group by group."""
    pivots = jnp.diagonal(factor)

    def of_group(number, carry):
        own, kept, errors = carry
        start = number * group
        part, pivot, where = (
            lax.dynamic_slice_in_dim(x, start, group) for x in (own, pivots, place)
        )
        scores = jnp.square(part / pivot[:, None])
        best = pick(jnp.where(where[:, None] > 0, scores, where[:, None]))
        kept = lax.dynamic_update_slice_in_dim(kept, best, start, axis=0)

        def of_input(i, carry):
            own, errors = carry
            error = jnp.where(kept[i], 0, own[i]) / pivots[i]
            own = own - factor[i][:, None] * error[None, :]
            return own, errors.at[i].set(error)

        own, errors = lax.fori_loop(start, start + group, of_input, (own, errors))
        return own, kept, errors

    first = own, jnp.zeros(own.shape, bool), jnp.zeros_like(own)
    return lax.fori_loop(0, own.shape[0] // group, of_group, first)
