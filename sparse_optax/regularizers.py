"""Regularizers of the loss that optax does not have."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax


class L1DecayState(NamedTuple):
    """State of ``add_l1_decay`` with a schedule.

    Attributes:
      count: Finished updates.  # shape=(), int32
    """

    count: jax.Array


def add_l1_decay(
    strength: optax.ScalarOrSchedule, mask: Any = None
) -> optax.GradientTransformationExtraArgs:
    r"""Adds the gradient of an L1 penalty, the companion of ``add_decayed_weights``.

    .. math::
        g \leftarrow g + \lambda \, \mathrm{sign}(w), \quad \mathrm{sign}(0) = 0

    Of the sub-gradients of |w| at zero, [-1, 1], it is the one that leaves a weight of
    zero where it is. L1 and L2 are the regularizers that GSM is argued against: both
    push on all weights at once and leave small ones, not zeros, so that a cut follows.

    .. note::
      In front of the optimizer, where it acts through momentum and learning rate, as
      ``optax.add_decayed_weights`` does for L2. It is a step of plain descent, not a
      proximal one: a small weight swings about zero by the learning rate times lambda.
      Element-wise; no memory but the counter of a schedule.

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
    if isinstance(strength, (int, float)) and not 0 <= strength < float("inf"):
        raise ValueError(
            f"add_l1_decay: `strength` must be at least 0 and finite; got {strength!r}."
            " Use 1e-5, for instance."
        )

    def init_fn(params):
        del params
        if callable(strength):
            return L1DecayState(count=jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "add_l1_decay: `params` is None; the penalty is on the weights. Call "
                "tx.update(grads, state, params)."
            )
        new_state, size = state, cast(Any, strength)
        if callable(strength):
            size = strength(state.count)
            count = jnp.asarray(optax.safe_increment(state.count))
            new_state = L1DecayState(count)

        def add(g, w):
            if g is None:
                return None
            return (g + jnp.sign(w) * size).astype(g.dtype)

        added = jax.tree.map(add, updates, params, is_leaf=lambda x: x is None)
        return added, new_state

    tx = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    if mask is None:
        return tx
    return optax.with_extra_args_support(optax.masked(tx, mask))
