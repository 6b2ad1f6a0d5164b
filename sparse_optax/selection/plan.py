"""What a selection is before any value is known: leaves, cells, pools.

A *pool* is a set of weights that share one threshold: all leaves, one leaf, or one
slice of a leaf along axis 0. A *cell* is what is counted on its own: a leaf, or
each slice along axis 0 where these are pools (or where the leaf is so large that
its count does not fit 32 bits).
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparse_optax import wide
from sparse_optax.selection.keys import Order

# Weights a cell may hold, so that its count is a uint32.
LIMIT = 2**32


class Leaf(NamedTuple):
    """The static facts of one leaf; hashable.

    Attributes:
      shape: of its scores; under shard_map of one shard, else over the whole mesh.
      arity: how many arrays the score takes.
      split: whether each slice along axis 0 is a cell.
      cell: number of its first cell.
      pool: number of its first pool.
      pools: how many pools it holds: one, or one per cell.
      start: position of its first weight in its pool.
      cost: of one weight.
    """

    shape: tuple[int, ...]
    arity: int
    split: bool
    cell: int
    pool: int
    pools: int
    start: int
    cost: int

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


class Plan(NamedTuple):
    """What is static about a selection; hashable, a jit argument.

    Attributes:
      score: the score function, or None for the leaves themselves.
      order: how scores compare.
      leaves: one `Leaf` per leaf.
      axis_name: mesh axes of a surrounding shard_map over which pools extend.
      shards: number of shards along these axes.
      least: whether the smallest score kept is wanted.
      counts: whether it is wanted how many each cell keeps.
      skip_zeros: whether no score is negative, and those of zero are never kept
        unless all weights are.
      many: several comparisons in one reduction (fast, but the SPMD partitioner
        does not split it) or plain sums.
    """

    score: Any
    order: Order
    leaves: tuple[Leaf, ...]
    axis_name: Any = None
    shards: int = 1
    least: bool = False
    counts: bool = False
    skip_zeros: bool = False
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
        """Whether positions in a pool pass 32 bits, so that they count per cell."""
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


def pairs(values: list[int]) -> wide.Pair:
    """Non-negative Python ints below 2**64 as a pair of vectors."""
    high = np.array([value >> 32 for value in values], np.uint32)
    low = np.array([value & 0xFFFFFFFF for value in values], np.uint32)
    return jnp.asarray(high), jnp.asarray(low)
