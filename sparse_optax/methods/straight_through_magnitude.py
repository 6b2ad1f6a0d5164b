"""Magnitude pruning with a straight-through gradient."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import checks, schedules
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import Where
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.targets import ending
from sparse_optax.transforms.missing_decay import decay_missing


@boundary("straight_through_magnitude")
def straight_through_magnitude(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    ramp: optax.Schedule | schedules.Towards | None = None,
    update_stop: int | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
    dense_until: int | None = None,
    missing_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains all weights with the gradient at the largest, chosen before each update.

    With k the weights that a layer keeps and g the gradient at the masked weights,

    .. math:: w \leftarrow w - \text{step}(g), \qquad \text{masked} = w
              \text{ among the } k \text{ largest } |w|, \text{ else } 0

    The gradient ignores the masking. The mask is that of the weights before the step.
    With ``missing_decay``, as in SR-STE, the gradient of the weights that are masked
    gets :math:`\lambda w` added, so that they come and go less often.

    .. note:: Last in the chain, around the whole optimizer. Memory: one copy of the
      weights and one byte per weight, one bit with ``packed``. Cost: one selection per
      update. All arguments are static under ``optax.inject_hyperparams``.

    Hidden weights train too, so ``optax.clip_by_global_norm`` has the right norm, and
    ``clip_by_active_norm`` has not.

    Args:
      inner: The wrapped optimizer.
      density: Fraction of weights kept per layer, in (0, 1], or a budget; None if
        ``pattern`` fixes it.
      ramp: A schedule of the density that reaches ``density``; None is constant.
      update_stop: The masks stay from this many updates on; None never stops. A
        ``ramp`` must have ended by then.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      packed: Stores one bit per weight.
      pattern: See ``regrow``.
      dense_until: Trains all weights for this many updates, then cuts to ``density``
        once, see ``regrow``. None starts sparse.
      missing_decay: :math:`\lambda`, the decay of masked weights in their gradient, at
        least 0. SR-STE has 2e-4, with N:M, beside the weight decay of all weights.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.straight_through_magnitude(optax.sgd(0.5), density=0.5)
      >>> params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     grads = {"w": jnp.array([[0.0, 1.0, 0.0, -1.0]])}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].tolist()
      [[4.0, 0.0, 0.0, 3.0]]

    References:
      Bengio, Leonard and Courville, `Estimating or Propagating Gradients Through
      Stochastic Neurons <https://arxiv.org/abs/1308.3432>`_, 2013, for the estimator.
      Zhou et al., `Learning N:M Fine-grained Structured Sparse Neural Networks From
      Scratch <https://arxiv.org/abs/2102.04010>`_, 2021, for SR-STE:
      ``pattern=patterns.n_m(2, 4), missing_decay=2e-4``.

    Differences from other libraries: the parameters are the sparse weights, and the
    state holds the dense ones. Without ``ramp`` the density is constant; others, such
    as JaxPruner, let it fall by a cubic, ``ramp=schedules.Towards(...)``.
    """
    checks.transformation("inner", inner)
    cure = "Give 2e-4, as SR-STE has, or 0."
    checks.number("missing_decay", missing_decay, 0, static=True, cure=cure)
    if missing_decay:
        inner = optax.chain(decay_missing(missing_decay), inner)
    return unnamed(regrow)(
        inner,
        density=density,
        prune=prune.outranked(1.0),
        redistribute=redistribute.none,
        grow=grow.magnitude,
        update_period=1,
        update_stop=update_stop,
        prune_rate=0.0,
        key=0,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
        dense_until=dense_until,
        ramp=ending(ramp, update_stop),
        hidden=True,
    )
