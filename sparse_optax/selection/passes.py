"""One pass over the leaves: how many scores are above a threshold, per cell.

The form of the count decides its speed. On CPU one reduction of several comparisons
vectorises and runs at memory speed, a single one does not; thresholds must be scalars;
two or more rows let threads share a leaf. The barrier around the leaves keeps XLA from
storing scores before a loop.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType

from sparse_optax.selection import leaf as one
from sparse_optax.selection.plan import Plan, PlannedLeaf


class Place(NamedTuple):
    """The place of a device's part of a leaf within the leaf."""

    strides: tuple[int, ...]  # steps in position within the cell, per axis of the part
    base: Any  # of the part's first weight, counted within it; int or uint32 scalar
    cell: Any  # first cell of the part, counted within the leaf; int or int32 scalar
    counts: Any  # False on all but one of the devices that hold a copy; None is True


def whole(leaf: PlannedLeaf) -> Place:
    """The place of a leaf that is not split."""
    return Place(leaf.strides, 0, 0, None)


class Part(NamedTuple):
    """What one device sees of a selection: its arrays and their places."""

    plan: Plan
    args: Sequence[Sequence[jax.Array]]  # the arrays of each leaf
    places: Sequence[Place]
    names: tuple  # mesh axes to sum over; empty on a single device

    def above(self, thresholds: jax.Array) -> jax.Array:
        """How many keys of each cell are strictly above its thresholds."""
        return self._count(one.above, thresholds)

    def before(self, thresholds: jax.Array, ends: jax.Array) -> jax.Array:
        """How many weights come before pairs of key and position."""
        return self._count(one.before, thresholds, ends)

    def at(self, bound: jax.Array, ends: jax.Array) -> jax.Array:
        """How many keys equal the bound, at positions before each end."""
        return self._count(one.at, bound[:, None], ends)

    def least(self, bound: jax.Array) -> jax.Array:
        """The smallest key of each cell that is strictly above the bound."""
        plan = self.plan
        top = np.array(plan.order.highest, plan.order.dtype)
        rows, level, marks = lax.optimization_barrier(
            (self.rows(), bound[:, None], self.marks())
        )
        done, pending = {}, {}
        for i, leaf in enumerate(plan.leaves):
            lowest = one.least(rows[i], level, marks[i], kind=self.kind(i))
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
            key = one.keys_of(self.plan, picked)
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

    def kind(self, i: int) -> one.Kind:
        """What leaf i has in common with leaves of its shape."""
        shape, split = self.args[i][0].shape, self.plan.leaves[i].split
        return one.kind_of(self.plan, shape, split, self.places[i].strides)

    def marks(self) -> list[Any]:
        """Where each part lies, as vectors for a barrier, see `leaf.mark_of`."""
        return [
            leaf.mark
            if isinstance(place.base, int) and isinstance(place.cell, int)
            else leaf.mark + _vector(place)
            for leaf, place in zip(self.plan.leaves, self.places, strict=True)
        ]

    def _count(self, condition: one.Condition, *values: jax.Array) -> jax.Array:
        """Counts per cell over all devices of what meets each condition."""
        # The barrier keeps XLA from storing scores and positions outside of a loop.
        rows, values, marks = lax.optimization_barrier(
            (self.rows(), values, self.marks())
        )
        done, pending = {}, {}
        for i, leaf in enumerate(self.plan.leaves):
            found = one.count(
                rows[i], values, marks[i], condition=condition, kind=self.kind(i)
            )
            counts = self.places[i].counts
            if counts is not None:
                found = [jnp.where(counts, x, 0) for x in found]
            if leaf.split:
                done[i] = self._among_cells(i, jnp.stack(found, axis=1), np.uint32(0))
            else:
                pending.setdefault(found[0].size, []).append((i, found))
        number = values[-1].shape[1]
        return self.total(self._gather(done, pending, number, jnp.sum))

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


def _vector(place: Place) -> jax.Array:
    """How a place moves the mark of its leaf."""
    moved = [jnp.asarray(x).astype(jnp.uint32) for x in (place.cell, 0, place.base)]
    return jnp.stack(moved)


def _row_count(size: int) -> int:
    """Number of rows into which a leaf is cut for threads; one if it is small."""
    if size < 2**20:
        return 1
    return max(rows for rows in range(1, 17) if size % rows == 0)
