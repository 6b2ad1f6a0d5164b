"""One pass over the leaves: how many scores are above a threshold, per cell.

Values are given per cell, or as one row for all cells. The form of the count decides
its speed. On CPU one reduction of several comparisons vectorises and runs at memory
speed, a single one does not; thresholds must be scalars; two or more rows let threads
share a leaf. The barrier around the leaves keeps XLA from storing scores before a loop.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from sparse_optax.selection import keys as key_order
from sparse_optax.selection.plan import Plan, PlannedLeaf, row_major


class Place(NamedTuple):
    """The place of a device's part of a leaf within the leaf."""

    strides: tuple[int, ...]  # steps in position within the cell, per axis of the part
    base: Any  # position of the part's first weight; int or uint32 scalar
    cell: Any  # first cell of the part, counted within the leaf; int or int32 scalar
    counts: Any  # False on all but one of the devices that hold a copy; None is True


def whole(leaf: PlannedLeaf) -> Place:
    """The place of a leaf that is not split."""
    return Place(leaf.strides, leaf.start, 0, None)


class Part(NamedTuple):
    """What one device sees of a selection: its arrays and their places."""

    plan: Plan
    args: Sequence[Sequence[jax.Array]]  # the arrays of each leaf
    places: Sequence[Place]
    names: tuple  # mesh axes to sum over; empty on a single device

    def above(self, thresholds: jax.Array) -> jax.Array:
        """How many keys of each cell are strictly above its thresholds."""
        count = thresholds.shape[1]
        rows, over = lax.optimization_barrier((self.rows(), _unpacked(thresholds)))

        def condition(i):
            keys = keys_of(self.plan, rows[i])
            return [keys > self._across(i, over, j, keys.ndim) for j in range(count)]

        return self._count(condition, count)

    def before(self, thresholds: jax.Array, ends: jax.Array) -> jax.Array:
        """How many weights come before pairs of key and position."""
        plan, count = self.plan, ends.shape[1]
        rows, levels, before, zero = lax.optimization_barrier(
            (self.rows(), _unpacked(thresholds), _unpacked(ends), jnp.uint32(0))
        )

        def condition(i):
            keys = keys_of(self.plan, rows[i])
            position = self._row_positions(i, keys.shape, zero)
            return [
                kept(
                    keys,
                    self._across(i, levels, j, keys.ndim),
                    position < self._across(i, before, j, keys.ndim),
                    plan,
                )
                for j in range(count)
            ]

        return self._count(condition, count)

    def at(self, bound: jax.Array, ends: jax.Array) -> jax.Array:
        """How many keys equal the bound, at positions before each end."""
        count = ends.shape[1]
        rows, at, before, zero = lax.optimization_barrier(
            (self.rows(), _unpacked(bound[:, None]), _unpacked(ends), jnp.uint32(0))
        )

        def condition(i):
            keys = keys_of(self.plan, rows[i])
            equal = keys == self._across(i, at, 0, keys.ndim)
            # The zero behind a barrier keeps XLA from storing positions.
            position = self._row_positions(i, keys.shape, zero)
            # Other keys come after every end.
            position = jnp.where(equal, position, np.uint32(2**32 - 1))
            return [
                position < self._across(i, before, j, keys.ndim) for j in range(count)
            ]

        return self._count(condition, count)

    def least(self, bound: jax.Array) -> jax.Array:
        """The smallest key of each cell that is strictly above the bound."""
        plan = self.plan
        top = np.array(plan.order.highest, plan.order.dtype)
        rows, level = lax.optimization_barrier((self.rows(), _unpacked(bound[:, None])))
        done, pending = {}, {}
        for i, leaf in enumerate(plan.leaves):
            keys = keys_of(self.plan, rows[i])
            over = jnp.where(keys > self._across(i, level, 0, keys.ndim), keys, top)
            if plan.many:
                # A single minimum is not vectorised; the maximum beside it is unused
                # except to see whether there is any key above the bound.
                lowest, highest = lax.reduce(
                    (over, keys),
                    (top, ~top),
                    lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
                    (1,),
                )
                found = highest > self._across(i, level, 0, 1)
                lowest = jnp.where(found, lowest, top)
            else:
                axes = tuple(range(1 if leaf.split else 0, over.ndim))
                lowest = jnp.min(over, axis=axes, initial=top)
                lowest = lowest if leaf.split else lowest[None]
            if leaf.split:
                done[i] = self._among_cells(i, lowest[:, None], top)
            else:
                pending.setdefault(lowest.size, []).append((i, [lowest]))
        lowest = self._gather(done, pending, 1, jnp.min)[:, 0]
        return lax.pmin(lowest, self.names) if self.names else lowest

    def sample(self, size: int) -> tuple[jax.Array, jax.Array]:
        """Keys at equal distances through all leaves, and how many of them count."""
        order = self.plan.order
        step = max(sum(self.plan.pool_sizes) // size, 1)
        keys, number = [], jnp.zeros((), jnp.int32)
        for i, arrays in enumerate(self.args):
            length, stride = arrays[0].size, step
            if length < step:
                continue
            # So that not only a few columns of a matrix are sampled.
            while math.gcd(stride, (1, *arrays[0].shape)[-1]) > 1:
                stride += 1
            start = min(stride // 2, length - 1)
            picked = [
                lax.slice(a.reshape(-1), (start,), (length,), (stride,)) for a in arrays
            ]
            key = keys_of(self.plan, picked)
            counts = self.places[i].counts
            if counts is None:
                number += np.int32(key.size)
            else:
                key = jnp.where(counts, key, np.array(order.lowest, order.dtype))
                number += jnp.where(counts, np.int32(key.size), 0)
            keys.append(key)
        if not keys:
            keys = [jnp.zeros((1,), order.dtype)]
        return jnp.concatenate(keys), self.total(number)

    def varying(self, tree: Any) -> Any:
        """Arrays typed like the counts: varying over each manual shard.

        Under ``shard_map`` without an ``axis_name``, or with fewer axes than are
        manual, each shard selects on its own. The initial values of a loop need that
        type; adding a sum over no elements gives it.
        """
        if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
            return tree
        nothing = [
            jnp.sum(lax.slice(x.reshape(-1), (0,), (0,)).astype(jnp.uint32))
            for arrays in self.args
            for x in arrays
        ]
        zero = self.total(sum(nothing, start=jnp.uint32(0)))
        return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)

    def total(self, x: jax.Array) -> jax.Array:
        """The sum of x over all devices."""
        return lax.psum(x, self.names) if self.names else x

    def rows(self) -> list[list[jax.Array]]:
        """The arrays as rows to reduce over axis 1: cells, or parts of one cell. With
        plain sums they keep their shape: the SPMD partitioner would gather an array
        whose sharded axes are merged.
        """
        if not self.plan.many:
            return [list(arrays) for arrays in self.args]

        def arrange(leaf, x):
            rows = x.shape[0] if leaf.split else _row_count(x.size)
            return x.reshape(rows, x.size // max(rows, 1))

        return [
            [arrange(leaf, x) for x in arrays]
            for leaf, arrays in zip(self.plan.leaves, self.args, strict=True)
        ]

    def _across(self, i: int, values: list, j: int, ndim: int) -> jax.Array:
        """Column j of unpacked values, shaped to broadcast over the rows of leaf i."""
        leaf = self.plan.leaves[i]
        x = values[j]
        if x.ndim == 0:
            return x
        if not leaf.split:
            return x[leaf.cell]
        here = self.args[i][0].shape[0]
        x = lax.dynamic_slice(x, (leaf.cell + self.places[i].cell,), (here,))
        return x.reshape((here,) + (1,) * (ndim - 1))

    def _row_positions(self, i: int, rows: tuple[int, ...], zero) -> jax.Array:
        """Positions of the weights of leaf i, arranged as by `rows`."""
        place, split = self.places[i], self.plan.leaves[i].split
        shape = self.args[i][0].shape
        base = jnp.asarray(place.base, jnp.uint32) + zero
        if not self.plan.many:
            return positions(shape, place.strides, base)
        if place.strides == row_major(shape, split):
            return positions(rows, row_major(rows, split), base)
        # Sharded along an inner axis: local neighbours are not neighbours in the cell.
        return jnp.broadcast_to(positions(shape, place.strides, base), shape).reshape(
            rows
        )

    def _count(self, condition, count: int) -> jax.Array:
        """Counts per cell over all devices, from a list of conditions per leaf."""
        done, pending = {}, {}
        for i, leaf in enumerate(self.plan.leaves):
            ones = [x.astype(jnp.uint32) for x in condition(i)]
            if self.plan.many:
                rows = lax.reduce(
                    ones,
                    [np.uint32(0)] * count,
                    lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
                    (1,),
                )
            else:
                axes = tuple(range(1 if leaf.split else 0, ones[0].ndim))
                rows = [jnp.sum(x, axis=axes, dtype=jnp.uint32) for x in ones]
                if not leaf.split:
                    rows = [x[None] for x in rows]
            counts = self.places[i].counts
            if counts is not None:
                rows = [jnp.where(counts, x, 0) for x in rows]
            if leaf.split:
                done[i] = self._among_cells(i, jnp.stack(rows, axis=1), np.uint32(0))
            else:
                pending.setdefault(rows[0].size, []).append((i, rows))
        return self.total(self._gather(done, pending, count, jnp.sum))

    def _gather(self, done: dict, pending: dict, count: int, combine) -> jax.Array:
        """One table of all cells, from tables of split leaves and rows of others. Rows
        of equal size are concatenated together: each kernel costs compile time.
        """
        for size, group in pending.items():
            flat = jnp.concatenate([x for _, rows in group for x in rows])
            table = flat.reshape(len(group), count, size)
            table = combine(table, axis=-1).astype(flat.dtype)
            if len(group) == len(self.plan.leaves):
                return table
            for row, (i, _) in enumerate(group):
                done[i] = table[row : row + 1]
        return jnp.concatenate([done[i] for i in range(len(done))])

    def _among_cells(self, i: int, values: jax.Array, fill) -> jax.Array:
        """Values for this device's cells of leaf i, put into a row of all its cells."""
        cells = self.plan.leaves[i].cells
        if values.shape[0] == cells:
            return values
        row = jnp.full((cells, *values.shape[1:]), fill, values.dtype)
        start = (self.places[i].cell,) + (0,) * (values.ndim - 1)
        return lax.dynamic_update_slice(row, values, start)


def scores(score, arrays: Sequence[jax.Array]) -> jax.Array:
    """The scores of one leaf; a score function gets 16-bit floats as float32."""
    if score is None:
        return arrays[0]
    half = (jnp.float16, jnp.bfloat16)
    return score(*(x.astype(jnp.float32) if x.dtype in half else x for x in arrays))


def keys_of(plan: Plan, arrays: Sequence[jax.Array]) -> jax.Array:
    """The keys of one leaf: its scores as integers."""
    score = scores(plan.score, arrays)
    return key_order.to_key(score, plan.order, positive=plan.skip_zeros)


def kept(keys: jax.Array, level: jax.Array, early: jax.Array, plan: Plan) -> jax.Array:
    """Which weights are kept: above the level, and at it if the position is early."""
    if plan.order.name == "uint32":  # there is no key below the lowest
        return (keys > level) | ((keys == level) & early)
    return keys > jnp.where(early, level - np.array(1, level.dtype), level)


def positions(shape: tuple[int, ...], strides: tuple[int, ...], base) -> jax.Array:
    """The position of each weight of an array within its pool or cell."""
    out = jnp.full((1,) * len(shape), base, jnp.uint32)
    for axis, stride in enumerate(strides):
        if stride and shape[axis] > 1:
            iota = lax.broadcasted_iota(jnp.uint32, shape, axis)
            out = out + iota * np.uint32(stride % 2**32)
    return out


def _row_count(size: int) -> int:
    """Number of rows into which a leaf is cut for threads; one if it is small."""
    if size < 2**20:
        return 1
    return max(rows for rows in range(1, 17) if size % rows == 0)


def _unpacked(values: jax.Array) -> list[jax.Array]:
    """Columns of an array of shape (n, m); scalars where n is 1."""
    if values.shape[0] == 1:
        return [values[0, j] for j in range(values.shape[1])]
    return [values[:, j] for j in range(values.shape[1])]
