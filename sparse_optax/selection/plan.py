"""The static layout of a selection: leaves, cells, pools.

A *pool* is a set of weights with one threshold: all leaves, one leaf, or one slice of a
leaf along axis 0. A *cell* is counted separately: a leaf, or each slice along axis 0 if
these are pools (or if the count of the leaf does not fit 32 bits).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.selection import uint64
from sparse_optax.selection.keys import Order

# Weights a cell may hold, so that its count is a uint32.
LIMIT = 2**32


class PerLayer(NamedTuple):
    """Counts of pools in one vector, as they come from arithmetic over layers.

    A tree of counts says the same, but each entry cut out of the vector costs
    compilation.
    """

    counts: jax.Array  # integers, shape (P,)
    slices: tuple[int | None, ...]  # for each leaf its slices that are pools, or None


class PlannedLeaf(NamedTuple):
    """The static facts of one leaf; hashable."""

    shape: tuple[int, ...]  # of its scores; of one shard under shard_map, else global
    arity: int  # number of arrays that the score takes
    split: bool  # whether each slice along axis 0 is a cell
    cell: int  # number of its first cell
    pool: int  # number of its first pool
    pools: int  # how many pools it holds: one, or one per cell
    start: int  # position of its first weight in its pool
    cost: int  # of one weight

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.shape[0] if self.split else 1

    @property
    def size(self) -> int:
        """Weights in a cell."""
        return math.prod(self.shape[1:] if self.split else self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        """Steps in row-major position within a cell, per axis."""
        return row_major(self.shape, self.split)

    @property
    def mark(self) -> np.ndarray:
        """Where it lies: its first cell, first pool and start, modulo 2**32."""
        return np.array([self.cell, self.pool, self.start % 2**32], np.uint32)


class Plan(NamedTuple):
    """The static facts of a selection; hashable, an argument of jit."""

    score: Any  # the score function, or None for the leaves themselves
    order: Order  # how scores compare
    leaves: tuple[PlannedLeaf, ...]
    axis_name: Any = None  # axes of a surrounding shard_map over which pools extend
    shards: int = 1  # number of shards along these axes
    least: bool = False  # whether the smallest score kept is wanted
    counts: bool = False  # whether the number of weights kept per cell is wanted
    # Scores are not negative; those of zero are kept only if all weights are.
    skip_zeros: bool = False
    positive: bool = False  # no score is negative, which makes keys cheaper
    # Several comparisons in one reduction, which is fast, or plain sums, which the
    # SPMD partitioner can split.
    many: bool = True

    @property
    def cells(self) -> int:
        """Number of cells."""
        return sum(leaf.cells for leaf in self.leaves)

    @property
    def pools(self) -> int:
        """Number of pools."""
        return max(leaf.pool + leaf.pools for leaf in self.leaves)

    @property
    def pool_of_cell(self) -> np.ndarray:
        """Pool of each cell, shape (C,)."""
        return self._per_cell(lambda leaf: leaf.pool, np.int32) + self._per_cell(
            lambda leaf: np.arange(leaf.cells) * (leaf.pools > 1), np.int32
        )

    @property
    def sizes(self) -> np.ndarray:
        """Weights in each cell over all shards, shape (C,), Python ints."""
        return self._per_cell(lambda leaf: leaf.size * self.shards, object)

    @property
    def costs(self) -> np.ndarray:
        """Cost of a weight of each cell, shape (C,), Python ints."""
        return self._per_cell(lambda leaf: leaf.cost, object)

    @property
    def pool_sizes(self) -> list[int]:
        """Weights in each pool over all shards."""
        return self._per_pool(self.sizes)

    @property
    def totals(self) -> list[int]:
        """Cost of all weights of each pool."""
        return self._per_pool(self.sizes * self.costs)

    @property
    def huge(self) -> bool:
        """Whether positions in a pool pass 32 bits and are counted per cell."""
        return max(self.pool_sizes) >= LIMIT

    def _per_cell(self, value, dtype) -> np.ndarray:
        out = [np.broadcast_to(value(x), (x.cells,)) for x in self.leaves]
        return np.concatenate(out).astype(dtype)

    def _per_pool(self, values: np.ndarray) -> list[int]:
        out = [0] * self.pools
        for pool, value in zip(self.pool_of_cell, values, strict=True):
            out[pool] += int(value)
        return out


def row_major(shape: tuple[int, ...], split: bool) -> tuple[int, ...]:
    """Row-major strides of an array, or of each of its slices along axis 0."""
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return tuple([0, *steps[1:]] if split else steps)


def pairs(values: list[int]) -> uint64.Pair:
    """Non-negative Python ints below 2**64 as a pair of vectors."""
    high = np.array([value >> 32 for value in values], np.uint32)
    low = np.array([value & 0xFFFFFFFF for value in values], np.uint32)
    return jnp.asarray(high), jnp.asarray(low)
