"""Runs a rare, costly function only when it is due, also for a batch of members.

Under ``vmap`` a ``lax.cond`` on a batched predicate becomes a select, and every
step would pay for the costly branch. The function here batches to one cond on
"is any member due", with a ``where`` for each member inside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap


def run_if(
    due: jax.Array,
    then: Callable[[Any], Any],
    otherwise: Callable[[Any], Any],
    operands: Any,
) -> Any:
    """``then(operands)`` where due, else ``otherwise(operands)``.

    Args:
      due: bool scalar; one a member under ``vmap``.
      then: The costly function of the operands.
      otherwise: The cheap one, whose result has the same structure and types.
      operands: A pytree of arrays. The functions must not close over traced
        arrays: pass them here.

    Returns:
      The result of one of the two.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from sparse_optax.regrowth import guard
      >>> def step(due, x):
      ...     return guard.run_if(due, lambda x: x + 1, lambda x: x, x)
      >>> jax.vmap(step)(jnp.array([True, False]), jnp.zeros(2)).tolist()
      [1.0, 0.0]
    """

    @custom_vmap
    def guarded(due, operands):
        return lax.cond(due, then, otherwise, operands)

    @guarded.def_vmap
    def batched(axis_size, in_batched, due, operands):
        def spread(x, is_batched):
            return x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))

        each_due = spread(due, in_batched[0])
        each = jax.tree.map(spread, operands, in_batched[1])

        def then_each(each):
            members_due, members = each

            def member(is_due, x):
                return jax.tree.map(
                    lambda a, b: jnp.where(is_due, a, b), then(x), otherwise(x)
                )

            return jax.vmap(member)(members_due, members)

        def otherwise_each(each):
            return jax.vmap(otherwise)(each[1])

        # The guard again, so that a vmap around this vmap meets the same rule.
        result = run_if(jnp.any(each_due), then_each, otherwise_each, (each_due, each))
        return result, jax.tree.map(lambda _: True, result)

    return guarded(due, operands)
