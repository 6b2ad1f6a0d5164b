"""What keeps programs over many leaves quick to compile.

XLA compiles equal kernels once. Two things would make each leaf's kernels its own:
constants that differ from leaf to leaf, and cheap computations that fusion copies into
the kernel of every reader.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def as_data(rows: Sequence[Sequence[int]]) -> list[jax.Array]:
    """Non-negative numbers of each leaf, modulo 2**32, as data that no kernel holds.

    Vectors of at least two entries, since XLA copies constant scalars into kernels.
    """
    padded = [np.array([*row, 0], np.int64).astype(np.uint32) for row in rows]
    return lax.optimization_barrier(padded)


def entries(vector: jax.Array, first: jax.Array, number: int) -> jax.Array:
    """Entries of a vector from an index that is data; shape (number,)."""
    return lax.dynamic_slice(vector, (first,), (number,))


def once(values: Any) -> Any:
    """The same small arrays, computed once however many kernels read them.

    A call that XLA does not inline: an ``optimization_barrier`` is gone before fusion.
    Where such a call may not be supported, on other platforms than CPU and on meshes,
    nothing is done.
    """
    if jax.device_count() > 1:
        return values
    return lax.platform_dependent(values, cpu=_call, default=lambda x: x)


def _call(values: Any) -> Any:
    with set_xla_metadata(inlineable="false"):
        return _same(values)


@jax.jit
def _same(values: Any) -> Any:
    return lax.optimization_barrier(values)
