"""Integer statistics of layers, in one pass over the leaves, on any mesh.

Sums and maxima of integers do not depend on their order: every mesh gives the same
numbers, where a sum of floats differs in the last bit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.selection import mesh, uint64
from sparse_optax.selection.keys import Order
from sparse_optax.selection.passes import Part
from sparse_optax.selection.plan import Plan, PlannedLeaf

# A plan needs an order, which a tally does not use.
_ORDER = Order("float32")


def tally(
    leaves: Sequence[tuple[jax.Array, ...]],
    function: Callable[..., tuple[jax.Array, ...]],
    *,
    split: Sequence[bool],
    given: tuple[jax.Array, ...] = (),
) -> tuple[Any, ...]:
    """Sums and maxima of element-wise integers over each layer.

    A layer is a leaf, or one slice of it along axis 0. By the dtype that the function
    returns, bool is counted, uint32 summed in 64 bits, and int32 maximised.
    """
    layout, cell = [], 0
    for arrays, is_split in zip(leaves, split, strict=True):
        shape = tuple(arrays[0].shape)
        cells = shape[0] if is_split else 1
        leaf = PlannedLeaf(shape, len(arrays), is_split, cell, cell, cells, 0, 1)
        layout.append(leaf)
        cell += cells
    plan = Plan(function, _ORDER, tuple(layout))
    with mesh.of(leaves):
        return _tally(tuple(tuple(x) for x in leaves), given, plan=plan)


def all_true(*masks: jax.Array) -> tuple[jax.Array]:
    """True where all masks are: the function of a tally that counts entries."""
    return (functools.reduce(jnp.logical_and, masks),)


@functools.partial(jax.jit, static_argnames="plan")
def _tally(args, given, *, plan):
    # Integers have no derivative, and the operation on a mesh has no rule for one.
    args, given = lax.stop_gradient((args, given))
    return mesh.run(_on_each_device, plan, args, given)


def _on_each_device(part: Part, given: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    """The tallies of a device's part, added up over all devices."""
    plan = part.plan
    rows: list[list[Any]] = []
    cells: list[Any] = []
    for i, (leaf, arrays) in enumerate(zip(plan.leaves, part.rows(), strict=True)):
        reduced = _of_leaf(
            given, tuple(arrays), function=plan.score, many=plan.many, split=leaf.split
        )
        counts = part.places[i].counts
        flat, structure = jax.tree.flatten(reduced)
        if counts is not None:  # False on copies, which another device counts
            flat = [jnp.where(counts, x, _nothing(x)) for x in flat]
        rows.append(jax.tree.unflatten(structure, flat))
        number = flat[0].shape[0]
        first = leaf.cell + part.places[i].cell
        cells.append(first + np.arange(number, dtype=np.int32) * np.int32(leaf.split))
    # None if each row is a cell, as on one device with leaves that are not large.
    cell = None
    if part.names or sum(map(len, cells)) != plan.cells:
        cell = jnp.concatenate([jnp.asarray(c, jnp.int32) for c in cells])
    return tuple(
        _over_cells(part, jax.tree.map(lambda *x: jnp.concatenate(x), *column), cell)
        for column in zip(*rows, strict=True)
    )


@functools.partial(jax.jit, static_argnames=("function", "many", "split"))
def _of_leaf(given, arrays, *, function, many: bool, split: bool) -> list[Any]:
    """The tallies of the rows of a leaf; traced once for all leaves of one shape."""
    values = function(*given, *arrays)
    return _reduce(values) if many else _plain(values, split)


def _reduce(values: Sequence[jax.Array]) -> list[Any]:
    """All statistics of each row in one reduction: one kernel per leaf."""
    operands, start, combiners = [], [], []
    for x in values:
        if x.dtype == bool:
            operands += [x.astype(jnp.uint32)]
            start += [np.uint32(0)]
            combiners.append((1, lambda a, b: (a[0] + b[0],)))
        elif x.dtype == jnp.uint32:
            operands += [jnp.zeros_like(x), x]
            start += [np.uint32(0), np.uint32(0)]
            combiners.append((2, uint64.add64))
        else:
            operands += [x]
            start += [np.int32(np.iinfo(np.int32).min)]
            combiners.append((1, lambda a, b: (jnp.maximum(a[0], b[0]),)))

    if len(operands) == 1:
        # XLA would turn a reduction of one operand into several kernels.
        operands, start = [*operands, operands[0] ^ 1], start * 2
        combiners = combiners * 2

    def combine(a, b):
        out, at = [], 0
        for width, combiner in combiners:
            out += combiner(tuple(a[at : at + width]), tuple(b[at : at + width]))
            at += width
        return tuple(out)

    reduced = list(lax.reduce(tuple(operands), tuple(start), combine, (1,)))
    out = []
    for (width, _), _ in zip(combiners, values, strict=False):
        head, reduced = reduced[:width], reduced[width:]
        out.append(head[0] if width == 1 else tuple(head))
    return out


def _plain(values: Sequence[jax.Array], split: bool) -> list[Any]:
    """The same in plain reductions, which the SPMD partitioner can split."""
    out = []
    for x in values:
        axes = tuple(range(1 if split else 0, x.ndim))
        if x.dtype == bool:
            found = jnp.sum(x, axis=axes, dtype=jnp.uint32)
        elif x.dtype == jnp.uint32:
            found = uint64.sum64(x, axes) if axes else uint64.pair64(x)
        else:
            found = jnp.max(x, axis=axes, initial=np.iinfo(np.int32).min)
        out.append(found if split else jax.tree.map(lambda y: y[None], found))
    return out


def _over_cells(part: Part, values: Any, cell: jax.Array | None) -> Any:
    """Statistics of rows combined for each cell, over all devices."""
    cells = part.plan.cells
    if cell is None:
        return values
    if isinstance(values, tuple):
        # In limbs of 16 bits, so that sums over rows and devices do not overflow.
        limbs = [x & 0xFFFF for x in (values[1], values[1] >> 16, values[0])]
        limbs.append(values[0] >> 16)
        sums = [jax.ops.segment_sum(x, cell, cells) for x in limbs]
        low, middle, high, top = part.total(jnp.stack(sums))
        return uint64.add64((high + (top << 16), low), (middle >> 16, middle << 16))
    if values.dtype == jnp.uint32:
        return part.total(jax.ops.segment_sum(values, cell, cells))
    largest = jax.ops.segment_max(values, cell, cells)
    return lax.pmax(largest, part.names) if part.names else largest


def _nothing(x: jax.Array) -> np.ndarray:
    """The neutral element of a sum and of a maximum."""
    value = 0 if x.dtype == jnp.uint32 else np.iinfo(np.int32).min
    return np.array(value, x.dtype)
