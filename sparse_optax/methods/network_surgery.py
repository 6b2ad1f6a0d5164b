"""Dynamic network surgery: pruning and splicing (Guo, Yao and Chen, 2016)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import schedules
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import Where
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.targets import ending


@boundary("network_surgery")
def network_surgery(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    ramp: optax.Schedule | schedules.Towards | None = None,
    ratio: float = 0.9 / 1.1,
    gamma: float = 1e-4,
    power: float = 1.0,
    update_stop: int | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
    dense_until: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes weights that keep training, and restores them when they have grown.

    All weights take the step of the dense gradient, hidden ones too. Before an update,
    with probability :math:`(1 + \gamma t)^{-power}`, the mask becomes

    .. math:: T = [\, |w| \text{ where } T, \; \tfrac{a}{b} |w| \text{ elsewhere, }
              \text{among the } k \text{ largest of the layer} \,]

    The factor a / b is a hysteresis: only a clearly larger weight replaces another.

    .. note:: Last in the chain, around the whole optimizer: weight decay inside it acts
      on hidden weights too. Memory: one copy of the weights and one byte per weight,
      one bit with ``packed``. Cost: one selection per update. All arguments are static
      under ``optax.inject_hyperparams``.

    Hidden weights train too, so ``optax.clip_by_global_norm`` has the right norm, and
    ``clip_by_active_norm`` has not.

    Args:
      inner: The wrapped optimizer.
      density: Fraction of weights kept per layer, in (0, 1], or a budget; None if
        ``pattern`` fixes it.
      ramp: A schedule of the density that reaches ``density``. None keeps that many
        weights from the start, first the largest.
      ratio: a / b, in (0, 1], the factor of missing weights in the ranking.
      gamma: In the probability above, at least 0; 0 is every update.
      power: Exponent of the probability, at least 0.
      update_stop: No mask changes from this many updates on; None never stops. A
        ``ramp`` must have ended by then.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      packed: Stores one bit per weight.
      pattern: See ``regrow``.
      dense_until: Trains all weights for this many updates, then cuts to ``density``
        once, see ``regrow``. None starts sparse.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.network_surgery(optax.sgd(0.1), density=0.25)
      >>> params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> state = tx.init(params)
      >>> for _ in range(9):  # the target of training: the first two weights
      ...     grads = {"w": params["w"] - jnp.array([[20.0, 20, 0, 0], [0, 0, 0, 0]])}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> (params["w"] != 0).tolist()
      [[True, True, False, False], [False, False, False, False]]

    References:
      Guo, Yao and Chen, `Dynamic Network Surgery for Efficient DNNs
      <https://arxiv.org/abs/1608.04493>`_, 2016.

    Differences from the paper: a layer keeps exactly a given number of weights. The
    paper has two thresholds instead and keeps what they leave; in the released code
    they are 0.9 and 1.1 times the mean plus c standard deviations of |w| at the start,
    of kernel and bias together, and both are pruned. Here biases stay dense. For such
    thresholds use ``regrow(density=1.0, prune=prune.below_spread(c),
    grow=grow.above_spread(c), hidden=True, prune_rate=0.0, update_period=1, ...)``. The
    random decision depends on the step alone and is the same in all runs. While a
    ramp falls, the smallest weights are pruned at every update.
    """
    return unnamed(regrow)(
        inner,
        density=density,
        prune=unnamed(prune.outranked)(ratio, gamma=gamma, power=power),
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
