"""The k largest of each of many short rows, by comparing pairs.

Where a pool has a handful of weights, as in N:M patterns, its search would cost more
than all its comparisons, and there are as many pools as the leaf has groups.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.selection import keys as key_order
from sparse_optax.selection.passes import scores

LONGEST = 32


def top_of_rows(arrays: Sequence[jax.Array], k: Any, *, score: Any = None) -> jax.Array:
    """Masks of the k largest scores of each row, in the order of ``top_k_mask``.

    Args:
      arrays: the arguments of the score, each of shape (rows, length); the length is
        at most 32, since every pair of a row is compared.
      k: how many of each row, an integer or an array of shape (rows,).
      score: an element-wise function of the arrays, or None for the first itself.

    Returns:
      A bool array of that shape. An element-wise program: any sharding of the rows
      stays as it is.

    Raises:
      ValueError: if rows are too long, or their scores have no order.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> x = jnp.array([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
      >>> selection.top_of_rows([x], 2).astype(int).tolist()
      [[0, 1, 1, 0], [1, 1, 0, 0]]
    """
    values = scores(score, arrays)
    if values.ndim != 2 or values.shape[1] > LONGEST:
        raise ValueError(
            f"top_of_rows: the rows have shape {values.shape}; it must be (rows, "
            f"length) with a length of at most {LONGEST}. Use top_k_mask for longer."
        )
    order = key_order.order_of([values.dtype], ["the rows"], "top_of_rows")
    keys = key_order.to_key(values, order)
    position = np.arange(values.shape[1])
    mine, theirs = keys[:, :, None], keys[:, None, :]
    earlier = position[None, None, :] < position[None, :, None]
    ahead = (theirs > mine) | ((theirs == mine) & earlier)
    rank = jnp.sum(ahead, axis=2, dtype=jnp.int32)
    limit = jnp.asarray(k)
    return rank < (limit[:, None] if limit.ndim else limit)
