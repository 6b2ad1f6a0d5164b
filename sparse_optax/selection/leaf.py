"""What a pass computes on one leaf, whichever leaf it is.

XLA compiles equal kernels once, and JAX traces a jitted function once for arguments of
one type. So that leaves of one shape share both, the functions here do not know their
leaf: where it lies among the others is data, its *mark*. As constants, these numbers
would make each leaf's kernels its own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.selection import keys as key_order
from sparse_optax.selection.keys import Order
from sparse_optax.selection.plan import Plan, row_major


class Kind(NamedTuple):
    """The static facts of a device's part of a leaf, except where it lies; hashable."""

    score: Any  # the score function, or None for the leaf itself
    order: Order  # how scores compare
    positive: bool  # whether no score is negative
    many: bool  # see `Plan`
    shape: tuple[int, ...]  # of the part
    split: bool  # whether each slice along axis 0 is a cell
    strides: tuple[int, ...]  # steps in position within the cell, per axis of the part


def kind_of(plan: Plan, shape, split: bool, strides) -> Kind:
    """The kind of a part of a leaf."""
    return Kind(plan.score, plan.order, plan.positive, plan.many, shape, split, strides)


class Mark(NamedTuple):
    """Where a part of a leaf lies, uint32 scalars that are data."""

    cell: jax.Array  # its first cell
    pool: jax.Array  # the first pool of its leaf
    start: jax.Array  # position of its first weight in its pool


def mark_of(vector: jax.Array) -> Mark:
    """The mark in a vector, which is data, see `compilation`."""
    return Mark(*(vector[i] for i in range(3)))


# --- scores and keys ------------------------------------------------------------------
def wide(dtype: Any) -> Any:
    """The dtype of sums and products of narrow floats: float32 or wider."""
    # There is no promotion of 8-bit floats.
    if _bits(dtype) < 16:
        return jnp.dtype(jnp.float32)
    return jnp.promote_types(dtype, jnp.float32)


def plus(x: jax.Array, more: Any) -> jax.Array:
    """A sum in float32 or wider, in the dtype of ``x``."""
    return (x.astype(wide(x.dtype)) + more).astype(x.dtype)


def scores(score, arrays: Sequence[jax.Array]) -> jax.Array:
    """The scores of one leaf; a score function gets narrow floats as float32."""
    if score is None:
        x = arrays[0]
        return x.astype(jnp.float32) if _bits(x.dtype) < 16 else x
    return score(*(x.astype(jnp.float32) if _bits(x.dtype) < 32 else x for x in arrays))


def _bits(dtype: Any) -> int:
    """Width of a float; 32 for all other dtypes."""
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 32


def keys_of(kind: Kind | Plan, arrays: Sequence[jax.Array]) -> jax.Array:
    """The keys of one leaf: its scores as integers."""
    score = scores(kind.score, arrays)
    return key_order.to_key(score, kind.order, positive=kind.positive)


def kept(keys: jax.Array, level: jax.Array, early: jax.Array, order: Order):
    """Which weights are kept: above the level, and at it if the position is early."""
    if order.name == "uint32":  # there is no key below the lowest
        return (keys > level) | ((keys == level) & early)
    # No key is so high that one more would overflow.
    return keys + early.astype(keys.dtype) > level


def positions(
    shape: tuple[int, ...], strides: tuple[int, ...], base: jax.Array
) -> jax.Array:
    """The position of each weight of an array within its pool or cell; the base alone
    if all have it.
    """
    out = base
    for axis, stride in enumerate(strides):
        if stride and shape[axis] > 1:
            iota = lax.broadcasted_iota(jnp.uint32, shape, axis)
            out = out + iota * np.uint32(stride % 2**32)
    return out


# --- reductions -----------------------------------------------------------------------
# What is counted: a list of conditions for each weight, one per column of the values.
# Values are given per cell, shape (C, m), or as one row for all cells.
Condition = Callable[..., list[jax.Array]]


def above(kind: Kind, keys: jax.Array, mark: Mark, thresholds) -> list[jax.Array]:
    """Keys strictly above thresholds."""
    return [keys > t for t in _columns(kind, keys.ndim, mark, thresholds)]


def before(kind: Kind, keys: jax.Array, mark: Mark, thresholds, ends):
    """Weights before pairs of key and position."""
    number, position = ends.shape[1], _row_positions(kind, keys.shape, mark)
    # All pairs in one array along a new axis 0, of which only columns are read: this
    # search is compiled with every program, and has a fraction of the operations.
    shape, inner = (number, *keys.shape), tuple(range(1, keys.ndim + 1))
    level, end = (_across(kind, shape, mark, x) for x in (thresholds, ends))
    keys = lax.broadcast_in_dim(keys, shape, inner)
    position = jnp.broadcast_to(position, keys.shape[1:])
    position = lax.broadcast_in_dim(position, shape, inner)
    found = kept(keys, level, position < end, kind.order).astype(jnp.uint32)
    return [lax.index_in_dim(found, j, keepdims=False) for j in range(number)]


def at(kind: Kind, keys: jax.Array, mark: Mark, bound, ends) -> list[jax.Array]:
    """Keys equal to the bound, at positions before ends."""
    (level,) = _columns(kind, keys.ndim, mark, bound)
    position = _row_positions(kind, keys.shape, mark)
    # Other keys come after every end.
    position = jnp.where(keys == level, position, np.uint32(2**32 - 1))
    return [position < end for end in _columns(kind, keys.ndim, mark, ends)]


@functools.partial(jax.jit, static_argnames=("condition", "kind"))
def count(arrays, values, mark, *, condition: Condition, kind: Kind):
    """How many weights of each row meet each condition: a list of m uint32 vectors."""
    found = condition(kind, keys_of(kind, arrays), mark_of(mark), *values)
    ones = [x.astype(jnp.uint32) for x in found]
    if kind.many:
        return lax.reduce(
            ones,
            [np.uint32(0)] * len(ones),
            lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
            (1,),
        )
    axes = tuple(range(1 if kind.split else 0, ones[0].ndim))
    rows = [jnp.sum(x, axis=axes, dtype=jnp.uint32) for x in ones]
    return rows if kind.split else [x[None] for x in rows]


@functools.partial(jax.jit, static_argnames="kind")
def least(arrays, bound, mark, *, kind: Kind) -> jax.Array:
    """The smallest key of each row that is strictly above the bound, or the highest."""
    top = np.array(kind.order.highest, kind.order.dtype)
    keys = keys_of(kind, arrays)
    (level,) = _columns(kind, keys.ndim, mark_of(mark), bound)
    over = jnp.where(keys > level, keys, top)
    if not kind.many:
        axes = tuple(range(1 if kind.split else 0, over.ndim))
        lowest = jnp.min(over, axis=axes, initial=top)
        return lowest if kind.split else lowest[None]
    # A single minimum is not vectorised; the maximum beside it is unused except to see
    # whether there is any key above the bound.
    lowest, highest = lax.reduce(
        (over, keys),
        (top, ~top),
        lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
        (1,),
    )
    return jnp.where(highest > level.reshape(-1), lowest, top)


def _own(kind: Kind, mark: Mark, values: jax.Array) -> jax.Array:
    """The values of a leaf's cells, or the one row that is for all."""
    if values.shape[0] == 1:
        return values
    cells = kind.shape[0] if kind.split else 1
    first = (mark.cell, jnp.zeros_like(mark.cell))
    return lax.dynamic_slice(values, first, (cells, values.shape[1]))


def _columns(kind: Kind, ndim: int, mark: Mark, values: jax.Array) -> list[jax.Array]:
    """Columns of the values of a leaf's cells, shaped to broadcast over its rows.
    Scalars if these are one cell.
    """
    own = _own(kind, mark, values)
    number = values.shape[1]
    if own.shape[0] == 1:
        return [own[0, j] for j in range(number)]
    shape = (-1,) + (1,) * (ndim - 1)
    return [own[:, j].reshape(shape) for j in range(number)]


def _across(kind: Kind, shape, mark: Mark, values: jax.Array) -> jax.Array:
    """The same columns side by side along axis 0, broadcast to a shape."""
    own = _own(kind, mark, values)
    if own.shape[0] == 1:
        return lax.broadcast_in_dim(own[0], shape, (0,))
    return lax.broadcast_in_dim(own.T, shape, (0, 1))


def _row_positions(kind: Kind, rows: tuple[int, ...], mark: Mark) -> jax.Array:
    """Positions of the weights of a leaf, arranged as by `rows`."""
    shape, strides = kind.shape, kind.strides
    if not kind.many:
        return positions(shape, strides, mark.start)
    if strides == row_major(shape, kind.split):
        return positions(rows, row_major(rows, kind.split), mark.start)
    # Sharded along an inner axis: local neighbours are not neighbours in the cell.
    return jnp.broadcast_to(positions(shape, strides, mark.start), shape).reshape(rows)


# --- masks ----------------------------------------------------------------------------
@functools.partial(jax.jit, static_argnames="kind")
def mask(arrays, bound, ends, mark, *, kind: Kind) -> jax.Array:
    """The mask of a leaf, from the bound and the end of each of its pools or cells."""
    keys = keys_of(kind, arrays)
    position = positions(keys.shape, kind.strides, mark_of(mark).start)
    shape = (-1,) + (1,) * (keys.ndim - 1)
    level, end = (x[0] if len(x) == 1 else x.reshape(shape) for x in (bound, ends))
    return kept(keys, level, position < end, kind.order)
