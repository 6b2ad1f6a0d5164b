"""Leaves cut into the units of a pattern, and back."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.patterns.kinds import Pattern


def _unit(pattern: Pattern, shape: Sequence[int], stacked: int | None) -> list[int]:
    """Size of a unit, or of a group of N:M, along each axis."""
    rank = len(shape)
    sizes = [size if pattern.others is None else 1 for size in shape]
    for axis, size in pattern.sizes:
        sizes[axis % rank] = size
    if stacked is not None:
        sizes[stacked] = 1
    return sizes


def check(
    pattern: Pattern,
    shape: Sequence[int],
    name: str,
    stacked: int | None = None,
    *,
    caller: str,
) -> None:
    """Raises where a leaf cannot be cut into units.

    Args:
      pattern: the pattern.
      shape: the shape of the leaf.
      name: its name.
      stacked: the axis whose slices are layers, or None.
      caller: the name that the error starts with.

    Raises:
      ValueError: if an axis is missing, is the stacked one, or is not a multiple of
        the size of a unit.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.check(patterns.n_m(2, 4), (8, 3), "w", caller="doc")
    """
    rank = len(shape)
    taken: set[int] = set()
    for axis, size in pattern.sizes:
        there = -rank <= axis < rank and axis % rank not in taken
        if there:
            taken.add(axis % rank)
            there = axis % rank != stacked or size == 1
        if not there or shape[axis] % size:
            what = f"axis {axis}" if there else f"an axis {axis} of its own"
            raise ValueError(
                f"{caller}: {pattern.name} needs {what} whose length is a multiple of "
                f"{size}; {name!r} has shape {tuple(shape)}"
                + ("" if stacked is None else f", stacked along axis {stacked}")
                + ". Leave it out with where=lambda name, leaf: ..., or choose other "
                "sizes or axes."
            )


def unit_size(
    pattern: Pattern, shape: Sequence[int], stacked: int | None = None
) -> int:
    """Number of weights of a unit of a leaf.

    Args:
      pattern: the pattern.
      shape: the shape of the leaf.
      stacked: the axis whose slices are layers, or None.

    Returns:
      A Python integer; 1 for N:M, whose units are single weights.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.unit_size(patterns.n_m(2, 4), (8, 3))
      1
    """
    return 1 if pattern.m else math.prod(_unit(pattern, shape, stacked))


def whole_units(counts: Any, size: int) -> Any:
    """Counts of weights as counts of units: rounded down, but one where there is any.

    Args:
      counts: weights, an integer or an array of integers.
      size: weights of a unit.

    Returns:
      A NumPy array, or scalar.

    Examples:
      >>> from sparse_optax import patterns
      >>> [int(patterns.whole_units(n, 4)) for n in (0, 3, 11)]
      [0, 1, 2]
    """
    return np.maximum(np.asarray(counts) // size, np.minimum(counts, 1))


def unit_costs(
    pattern: Pattern,
    shapes: Sequence[Sequence[int]],
    axes: Sequence[int | None],
    costs: Sequence[Any] | None = None,
) -> list[Any]:
    """What a unit of each leaf costs: the sum over its weights.

    Args:
      pattern: the pattern.
      shapes: the shapes of the leaves.
      axes: for each the axis whose slices are layers, or None.
      costs: what a weight of each leaf costs; None is 1.

    Returns:
      One number a leaf.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.unit_costs(patterns.output_units(), [(8, 3), (5, 2)], [None, None])
      [8, 5]
    """
    prices = [1] * len(shapes) if costs is None else costs
    return [
        price * unit_size(pattern, shape, axis)
        for price, shape, axis in zip(prices, shapes, axes, strict=True)
    ]


def view(pattern: Pattern, x: jax.Array, stacked: int | None = None) -> jax.Array:
    """One number for each unit of a leaf, or its groups of N:M as rows.

    Args:
      pattern: the pattern.
      x: a leaf of weights, of scores, or a mask. Of a mask a unit is True where any
        weight is; of numbers it is the sum of their magnitudes, in float32 for 16-bit
        floats.
      stacked: the axis whose slices are layers, or None.

    Returns:
      An array of the leaf's rank with a number for each unit; for N:M the leaf's own
      values in the shape (groups, m).

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import patterns
      >>> kernel = jnp.array([[1.0, -2.0, 0.0, 0.0], [3.0, 4.0, 0.0, 1.0]])
      >>> patterns.view(patterns.blocks(2, 2), kernel).tolist()
      [[10.0, 1.0]]
    """
    if pattern.m:
        ((axis, _),) = pattern.sizes
        return jnp.moveaxis(x, axis, -1).reshape(-1, pattern.m)
    sizes = _unit(pattern, x.shape, stacked)
    cut = [y for n, size in zip(x.shape, sizes, strict=True) for y in (n // size, size)]
    within = tuple(range(1, 2 * x.ndim, 2))
    parts = x.reshape(cut)
    if x.dtype == bool:
        return jnp.any(parts, axis=within)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.sum(jnp.abs(parts.astype(wide)), axis=within)


def spread(
    pattern: Pattern,
    units: jax.Array,
    shape: Sequence[int],
    stacked: int | None = None,
) -> jax.Array:
    """A mask of units as a mask of weights: the way back from ``view``.

    Args:
      pattern: the pattern.
      units: bool array of the shape that ``view`` gives.
      shape: the shape of the leaf.
      stacked: the axis whose slices are layers, or None.

    Returns:
      A bool array of that shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import patterns
      >>> kept = patterns.spread(
      ...     patterns.blocks(1, 2), jnp.array([[True, False]]), (1, 4))
      >>> kept.tolist()
      [[True, True, False, False]]
    """
    if pattern.m:
        ((axis, _),) = pattern.sizes
        moved = list(shape)
        moved.append(moved.pop(axis))
        return jnp.moveaxis(units.reshape(moved), -1, axis)
    sizes = _unit(pattern, shape, stacked)
    for axis, size in enumerate(sizes):
        units = jnp.repeat(units, size, axis=axis, total_repeat_length=shape[axis])
    return units


def layer_sums(
    pattern: Pattern,
    groups: jax.Array,
    shape: Sequence[int],
    stacked: int | None = None,
) -> jax.Array:
    """Numbers of the groups of N:M, summed over a leaf or each of its stacked layers.

    Args:
      pattern: an N:M pattern.
      groups: one number a group, in the order of ``view``'s rows.
      shape: the shape of the leaf.
      stacked: the axis whose slices are layers, or None.

    Returns:
      A scalar, or one number a layer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import patterns
      >>> pattern = patterns.n_m(2, 4)
      >>> patterns.layer_sums(pattern, jnp.ones(6, int), (3, 8, 1), 0).tolist()
      [2, 2, 2]
    """
    whole, own = grid(pattern, shape, stacked)
    others = tuple(i for i in range(len(whole)) if i != own)
    cut = (*whole[:-1], whole[-1] // pattern.m)
    return jnp.sum(groups.reshape(cut), axis=others, dtype=groups.dtype)


def grid(
    pattern: Pattern, shape: Sequence[int], stacked: int | None = None
) -> tuple[tuple[int, ...], int | None]:
    """The shape of a leaf with the axis of the groups of N:M last, as ``view`` has it.

    Args:
      pattern: an N:M pattern.
      shape: the shape of the leaf.
      stacked: the axis whose slices are layers, or None.

    Returns:
      The shape, and the axis in it whose slices are layers, or None.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.grid(patterns.n_m(2, 4), (3, 8, 5), 0)
      ((3, 5, 8), 0)
    """
    ((axis, _),) = pattern.sizes
    axis %= len(shape)
    moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
    return moved, None if stacked is None else stacked - (stacked > axis)


def view_shape(
    pattern: Pattern, shape: Sequence[int], stacked: int | None = None
) -> tuple[int, ...]:
    """The shape that ``view`` gives.

    Args:
      pattern: the pattern.
      shape: the shape of the leaf.
      stacked: the axis whose slices are layers, or None.

    Returns:
      A tuple of integers.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.view_shape(patterns.n_m(2, 4), (8, 3))
      (6, 4)
    """
    if pattern.m:
        return (math.prod(shape) // pattern.m, pattern.m)
    sizes = _unit(pattern, shape, stacked)
    return tuple(n // size for n, size in zip(shape, sizes, strict=True))


def follows(pattern: Pattern, mask: jax.Array, stacked: int | None = None) -> jax.Array:
    """Whether a mask follows a pattern: units whole or empty, n of each m.

    Args:
      pattern: the pattern.
      mask: bool array.
      stacked: the axis whose slices are layers, or None.

    Returns:
      A bool scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import patterns
      >>> mask = jnp.array([[True, True, False, False]])
      >>> [bool(patterns.follows(patterns.blocks(1, n), mask)) for n in (2, 4)]
      [True, False]
    """
    units = view(pattern, mask, stacked)
    if pattern.m:
        return jnp.all(jnp.sum(units, axis=1, dtype=jnp.int32) == pattern.n)
    return jnp.all(spread(pattern, units, mask.shape, stacked) == mask)
