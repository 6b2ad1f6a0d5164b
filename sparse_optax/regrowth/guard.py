"""Runs a rare, costly function only when it is due, also under ``vmap``.

Under ``vmap`` a ``lax.cond`` with a batched predicate becomes a select, so every step
would pay for the costly branch. Here it becomes one cond on "any is due", with a
``where`` inside.
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
    """``then(operands)`` if due, else ``otherwise(operands)``."""

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

        # The guard again, for a vmap around this vmap.
        result = run_if(jnp.any(each_due), then_each, otherwise_each, (each_due, each))
        return result, jax.tree.map(lambda _: True, result)

    return guarded(due, operands)
