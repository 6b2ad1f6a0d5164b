"""Hyperbolic aware minimization, HAM: an exponential step after any optimizer."""

import math
from typing import Any

import jax.numpy as jnp
import optax

from sparse_optax.following import follow
from sparse_optax.leaves import Where


def ham(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    alpha: float = 200.0,
    beta: float = 1e-3,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Follows each step of an optimizer by one that is multiplicative in the weights.

    With the gradient g at the weights :math:`\theta` handed in and the inner update u,

    .. math::
        \theta \leftarrow (\theta + u) \,
        \exp\!\left(-\eta \, (\alpha \, \mathrm{sign}(\theta) \, g + \beta)\right)

    A weight whose gradient points to zero gets there faster, one that the gradient
    enlarges grows faster, and beta is a decay of all: a push towards sparsity that
    costs no extra gradient. At zero the sign is zero: the gradient has no part there.

    .. note::
      It wraps the optimizer, since it needs the gradient besides the update. Nothing
      may change the gradient in front of it that is meant for the inner optimizer only:
      weight decay belongs inside, ``ham(optax.chain(optax.add_decayed_weights(5e-4),
      optax.sgd(lr)), lr)``. Inside a sparse method,
      ``sparse_momentum_regrow(ham(...), ...)``, and around one,
      ``ham(sparse_momentum_regrow(...), lr)``, missing weights stay exactly zero. A
      step costs one pass over weights, gradients and updates and stores no array. The
      factor overflows where ``learning_rate * alpha * |g|`` passes 88 (float32): clip
      gradients before.

      Under ``optax.inject_hyperparams`` the three numbers may be injected; name
      ``where`` in ``static_args``.

    Args:
      inner: The optimizer.
      learning_rate: :math:`\eta`, that of the inner optimizer: a number or a schedule
        of the number of finished updates.
      alpha: Strength of the gradient's part, at least 0. About 200 on ImageNet.
      beta: Strength of the decay, at least 0. About 1e-3 on ImageNet.
      where: Which leaves take the step, see ``leaves.resolve_where``. By default
        kernels; biases and norms get the inner update unchanged.

    Returns:
      A transformation with a ``FollowState``.

    Raises:
      ValueError: If an argument is out of its range or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.ham(optax.sgd(0.1), 0.1, alpha=10.0, beta=0.0)
      >>> params = {"w": jnp.array([[1.0, -1.0, 0.0]])}
      >>> gradient = {"w": jnp.array([[0.1, 0.1, 0.1]])}
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> [round(float(w), 3) for w in params["w"][0]]
      [0.896, -1.116, -0.01]

    References:
      HAM: Hyperbolic Aware Minimization, 2026, `OpenReview XKB5Hu0ACY
      <https://openreview.net/forum?id=XKB5Hu0ACY>`_.

    Differences from the paper, known from a second source: the sign is taken where the
    gradient was, before the inner step; after it the sign differs only where the step
    crosses zero. Biases and norms are left out by default.
    """
    given = {"learning_rate": learning_rate, "alpha": alpha, "beta": beta}
    for name, value in given.items():
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(
                f"ham: `{name}` must be at least 0 and finite; got {value!r}. Use the "
                "optimizer's learning rate, alpha=200 and beta=1e-3 as on ImageNet."
            )

    def step(count, weight, gradient, update):
        rate: Any = learning_rate(count) if callable(learning_rate) else learning_rate
        exponent = -rate * (alpha * jnp.sign(weight) * gradient + beta)
        # (w + u) exp(x) - w, without the cancellation where x is small.
        return update + (weight + update) * jnp.expm1(exponent)

    return follow(inner, step, where=where, caller="ham")
