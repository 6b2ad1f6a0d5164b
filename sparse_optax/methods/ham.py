"""Hyperbolic aware minimization, HAM: an exponential step after an optimizer's step."""

from typing import Any

import jax.numpy as jnp
import optax

from sparse_optax import checks
from sparse_optax.checks import boundary
from sparse_optax.layers import Where, check_where
from sparse_optax.transforms.follow import follow

# The exponent is clipped to this, as in the released code.
_MOST = 5.0


@boundary("ham")
def ham(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    alpha: float = 200.0,
    beta: float = 1e-3,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds a step that is multiplicative in the weights to each optimizer step.

    With the weights :math:`\theta`, their gradient g and the inner update u,

    .. math:: \theta' = \theta + u, \quad \theta \leftarrow \theta' \exp\!\left(
              -\eta \, (\alpha \, \mathrm{sign}(\theta') \, g + \beta)\right)

    with the exponent clipped to [-5, 5].

    A weight that the gradient moves to zero gets there faster, one that it enlarges
    grows faster, and beta is a decay of all: a bias to sparsity without an extra
    gradient. A weight that the inner step leaves at zero stays there.

    .. note:: It wraps the optimizer, since it needs gradient and update. Put inside
      whatever changes the gradient of the inner optimizer only, such as weight decay:
      ``ham(optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(lr)), lr)``. Missing
      weights stay exactly zero inside a sparse method, ``rigl(ham(...), ...)``, and
      around one, ``ham(rigl(...), lr)``. A step costs one pass over weights, gradients
      and updates and stores no array. Where ``learning_rate * alpha * |g|`` is mostly
      far below 1, the step does little; near 5, training becomes unstable. ``where`` is
      static under ``optax.inject_hyperparams``.

    Args:
      inner: The wrapped optimizer.
      learning_rate: :math:`\eta`, that of the inner optimizer: a number or a schedule
        of the number of finished updates.
      alpha: Strength of the gradient term, at least 0. About 200 on ImageNet.
      beta: Strength of the decay, at least 0. About 1e-3 on ImageNet.
      where: Which leaves take the step, see ``eligible``: by default kernels, and
        tables of embeddings only where it names them.

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
      [0.896, -1.116, -0.011]

    References:
      Jacobs et al, `Hyperbolic Aware Minimization: Implicit Bias for Sparsity
      <https://openreview.net/forum?id=XKB5Hu0ACY>`_, 2026.

    Differences from the paper: biases and norms are left out by default. The sign after
    the inner step, the limits of the exponent and zeros that stay are those of the
    released code.
    """
    cure = "Use the optimizer's learning rate, alpha=200 and beta=1e-3 as on ImageNet."
    checks.number("learning_rate", learning_rate, 0, schedule=True, cure=cure)
    checks.number("alpha", alpha, 0, cure=cure)
    checks.number("beta", beta, 0, cure=cure)
    check_where(where)

    def check():
        checks.first_value("learning_rate", learning_rate, 0, cure=cure)

    def step(count, weight, gradient, update):
        rate: Any = learning_rate
        if callable(learning_rate):
            rate = checks.scalar("learning_rate", learning_rate(count))
        after = weight + update
        exponent = -rate * (alpha * jnp.sign(after) * gradient + beta)
        exponent = jnp.clip(exponent, -_MOST, _MOST)
        # (w + u) exp(x) - w, without the cancellation where x is small.
        return update + after * jnp.expm1(exponent)

    return follow(inner, step, where=where, check=check)
