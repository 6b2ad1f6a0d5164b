"""Ensembles: states of a method under ``jax.vmap``."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import PyTree
from sparse_optax.masks.optimizer_state import states_with


@boundary("same_masks")
def same_masks(opt_state: PyTree) -> bool:
    """Whether all members of an ensemble hold the same masks.

    They do if the method's ``key`` was one integer for all. This is right to compare
    learning rates under one mask; for an ensemble of different networks give each
    member its own key by ``in_axes``, see ``regrow``.

    Args:
      opt_state: The state of a method under ``jax.vmap``, also chained or wrapped:
        every array has a leading axis of members. Several nested axes are allowed.

    Returns:
      True if no member has a mask of its own; also for an ensemble of one.

    Raises:
      ValueError: If the state has no masks, no members, or is traced.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sparse_optax
      >>> params = {"w": jnp.ones((3, 8, 8))}  # three members
      >>> tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.25, key=0)
      >>> sparse_optax.report.same_masks(jax.vmap(tx.init)(params))
      True
      >>> def start(key, params):
      ...     tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.25, key=key)
      ...     return tx.init(params)
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> sparse_optax.report.same_masks(jax.vmap(start)(keys, params))
      False
    """
    states = list(states_with(opt_state, "regrow_masks"))
    if not states:
        raise ArgumentError(
            "`opt_state` holds no masks; it must come from a method of this package. "
            "Pass the state of jax.vmap(tx.init)."
        )
    return all(map(members_agree, states))


def members_agree(state) -> bool:
    (count,) = jax.tree.leaves(state.count)  # flax.nnx wraps the leaves of a state
    if not np.ndim(count):
        raise ArgumentError(
            "`opt_state` is that of one network; it must have a leading axis of "
            "members. Pass the state of jax.vmap(tx.init)."
        )
    for mask in jax.tree.leaves(state.regrow_masks):
        if isinstance(mask, Tracer):
            raise ArgumentError(
                "`opt_state` is traced; the answer is a Python bool. Call it outside "
                "of jax.jit, with concrete arrays."
            )
        members = jnp.reshape(mask, (-1, *np.shape(mask)[np.ndim(count) :]))
        if not bool(jnp.all(members == members[:1])):
            return False
    return True
