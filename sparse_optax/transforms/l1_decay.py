"""L1 decay, which Optax does not have."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax import checks
from sparse_optax.checks import boundary
from sparse_optax.layers import is_hole
from sparse_optax.masks.tree import check_gradient
from sparse_optax.selection.leaf import plus
from sparse_optax.selection.leaf import wide as as_wide


class L1DecayState(NamedTuple):
    """State of ``add_l1_decay`` with a schedule.

    Attributes:
      count: Finished updates.  # shape=(), int32
    """

    count: jax.Array


@boundary("add_l1_decay")
def add_l1_decay(
    strength: optax.ScalarOrSchedule, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of an L1 penalty, like ``add_decayed_weights`` for L2.

    .. math:: g \leftarrow g + \lambda \, \mathrm{sign}(w), \quad \mathrm{sign}(0) = 0

    This sub-gradient of |w| keeps a weight at zero there. The GSM paper argues against
    L1 and L2: both act on all weights at once and leave small weights, not zeros.

    .. note:: Before the optimizer, so that it acts through momentum and learning rate.
      It is plain descent, not a proximal step: a small weight oscillates about zero by
      the learning rate times lambda. Element-wise; a schedule stores one counter.

    Args:
      strength: lambda, at least 0, or a schedule of the number of finished updates.
      mask: Which leaves are penalised: a tree or prefix tree of bools, or a callable of
        the parameters that gives one, such as ``sparse_optax.eligible``. None is all.
        Name it in ``static_args`` of ``optax.inject_hyperparams``.

    Returns:
      A transformation.

    Raises:
      ValueError: If ``strength`` is negative, or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = optax.chain(
      ...     sparse_optax.add_l1_decay(1e-2, mask=sparse_optax.eligible),
      ...     optax.sgd(1.0))
      >>> params = {"b": jnp.ones(1), "w": jnp.array([[2.0, 0.0, -3.0]])}
      >>> gradient = {"b": jnp.ones(1), "w": jnp.ones((1, 3))}
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> [round(float(u), 4) for u in updates["w"][0]], float(updates["b"][0])
      ([-1.01, -1.0, -0.99], -1.0)

    References:
      Tibshirani, `Regression Shrinkage and Selection via the Lasso
      <https://doi.org/10.1111/j.2517-6161.1996.tb02080.x>`_, 1996.
    """
    cure = "Use 1e-5, for instance."
    checks.number("strength", strength, 0, schedule=True, cure=cure)
    _check_mask(mask)

    def init_fn(params):
        del params
        if callable(strength):
            checks.first_value("strength", strength, 0, cure=cure)
            return L1DecayState(count=jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        _check_trees(updates, params)
        new_state, size = state, cast(Any, strength)
        if callable(strength):
            checks.own_state(state, L1DecayState)
            size = checks.scalar("strength", strength(state.count))
            count = jnp.asarray(optax.safe_increment(state.count))
            new_state = L1DecayState(count)

        def add(g, w):
            if g is None:
                return None
            sign = jnp.sign(w)
            if hasattr(size, "dtype"):  # 8-bit floats are not promoted to that of a sum
                return plus(g, sign.astype(as_wide(w.dtype)) * size)
            return (g + sign * size).astype(g.dtype)

        added = jax.tree.map(add, updates, params, is_leaf=lambda x: x is None)
        return added, new_state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    if mask is None:
        return tx
    masked = optax.with_extra_args_support(optax.masked(tx, mask))

    def checked_init(params):
        _check_fits(mask(params) if callable(mask) else mask, params)
        return masked.init(params)

    def checked_update(updates, state, params=None, **extra_args):
        _check_trees(updates, params)
        return masked.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(checked_init, checked_update)


def _check_trees(updates: Any, params: Any) -> None:
    """Raises unless there are parameters, and the gradient fits; it may hold None."""
    checks.needs_params(params, "the penalty is on the weights")

    def filled(tree):
        holes = optax.MaskedNode()
        return jax.tree.map(
            lambda x: holes if x is None else x, tree, is_leaf=lambda x: x is None
        )

    check_gradient(filled(updates), filled(params))


_CURE = "Pass sparse_optax.decay_mask, for instance, or leave it out."


def _are_bools(mask: Any) -> bool:
    """Whether all leaves of a tree are bools or holes."""
    flat = jax.tree.leaves(mask, is_leaf=is_hole)
    return all(isinstance(x, bool | np.bool_) or is_hole(x) for x in flat)


def _check_mask(mask: Any) -> None:
    """Raises unless it is None, a function of the parameters or a tree of bools."""
    if mask is None or checks.takes(mask, "params"):
        return
    if not _are_bools(mask):
        allowed = "a tree of bools, a function of the parameters, or None"
        checks.fail("mask", mask, allowed, _CURE)


def _check_fits(mask: Any, params: Any) -> None:
    """Raises unless it is a tree of bools, a prefix of the parameters."""
    right = _are_bools(mask)
    try:
        jax.tree.map(lambda _, x: x, mask, params)
    except ValueError:
        right = False
    if not right:
        allowed = "a tree of bools with the structure of params or of a prefix of it"
        checks.fail("mask", mask, allowed, _CURE)
