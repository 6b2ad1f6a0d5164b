"""Prune rules: which active weights stay."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax import masks
from sparse_optax.regrowth.rules import (
    Evidence,
    Rule,
    axes_of,
    coin,
    layer_vector,
    require,
    split_layers,
    stateless,
)


def _active_magnitude(weight: jax.Array, mask: jax.Array) -> jax.Array:
    # Below every magnitude, so that a missing weight is never among the kept.
    return jnp.where(mask, jnp.abs(weight), -1.0)


def _magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    axes = axes_of(evidence)
    active = require(evidence, "active", rule="prune.magnitude")
    counts = require(evidence, "counts", rule="prune.magnitude")
    stay = layer_vector(active) - layer_vector(counts)
    return tuple(
        masks.select(
            list(zip(evidence.params, evidence.masks, strict=True)),
            split_layers(stay, evidence.masks, axes),
            axes,
            _active_magnitude,
        )
    )


#: Removes the ``counts`` active weights of smallest magnitude in each layer. Of
#: equal magnitudes the lowest index stays.
magnitude = stateless(_magnitude, exact=True)


def outranked(ratio: float = 1.0, *, gamma: float = 0.0, power: float = 1.0) -> Rule:
    r"""Keeps what is among the ``target`` largest of a layer, hidden weights included.

    With m the mask and t the number of finished updates, a weight goes unless it is
    among the ``target`` largest of

    .. math:: |w| \text{ where } m, \quad ratio \cdot |w| \text{ elsewhere.}

    So a missing weight takes an active one's place where ratio |w| is larger, and
    ``grow.magnitude`` lets it. That happens with probability
    :math:`(1 + \gamma t)^{-power}`; at other updates a missing weight counts
    nothing, and the smallest go where the target has fallen.

    Args:
      ratio: In (0, 1]; 1 always keeps the largest.
      gamma: At least 0; 0 is every update.
      power: At least 0.

    Returns:
      A rule. It sets its own counts, which a ``prune_rate`` does not change.

    Raises:
      ValueError: If an argument is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> evidence = regrowth.Evidence(
      ...     params=(jnp.array([3.0, 1.0, 1.1, 2.0]),),
      ...     masks=(jnp.array([True, True, False, False]),), target=(2,))
      >>> for ratio in (0.8, 0.4):
      ...     (stay,), _ = regrowth.prune.outranked(ratio).apply(evidence, ())
      ...     print(stay.tolist())
      [True, False, False, False]
      [True, True, False, False]

    References:
      Guo, Yao and Chen, `Dynamic Network Surgery for Efficient DNNs
      <https://arxiv.org/abs/1608.04493>`_, 2016.
    """
    for name, value, right, allowed in (
        ("ratio", ratio, lambda x: 0 < x <= 1, "in (0, 1]"),
        ("gamma", gamma, lambda x: x >= 0, "at least 0"),
        ("power", power, lambda x: x >= 0, "at least 0"),
    ):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not right(value):
            raise ValueError(
                f"prune.outranked: `{name}` must be a number {allowed}; got {value!r}. "
                "Give ratio=0.9 / 1.1, gamma=1e-4, power=1.0 as in network surgery."
            )
    return _outranked(float(ratio), float(gamma), float(power))


# Cached: a rule is a static argument of the compiled cycle.
@functools.lru_cache
def _outranked(ratio: float, gamma: float, power: float) -> Rule:
    def stay(evidence: Evidence) -> tuple[jax.Array, ...]:
        heads: Any = coin(evidence.step, gamma, power)
        ranked = []
        for w, m in zip(evidence.params, evidence.masks, strict=True):
            size = jnp.abs(w.astype(jnp.promote_types(w.dtype, jnp.float32)))
            ranked.append((jnp.where(m, size, jnp.where(heads, ratio * size, -1.0)),))
        counts = require(evidence, "target", rule="prune.outranked")
        chosen = masks.select(ranked, list(counts), axes_of(evidence), _itself)
        pairs = zip(chosen, evidence.masks, strict=True)
        return tuple(jnp.logical_and(c, m) for c, m in pairs)

    return stateless(stay)


def _itself(score: jax.Array) -> jax.Array:
    return score


def below_spread(
    c: float, factor: float = 0.9, *, gamma: float = 0.0, power: float = 1.0
) -> Rule:
    r"""Removes weights below a threshold of their leaf, fixed by the first weights.

    .. math:: |w| < factor \cdot \max(\mu + c \, \sigma, 0)

    with mean and standard deviation of the |w| that are not zero at ``init``, where
    ``rules.coin`` falls so. Together with ``grow.above_spread`` the two thresholds of
    network surgery. How many weights there are follows; no budget holds it.

    Args:
      c: Standard deviations above the mean.
      factor: At most that of ``grow.above_spread``.
      gamma: Of the coin, at least 0; 0 is every cycle.
      power: Of the coin, at least 0.

    Returns:
      A rule that remembers one number a leaf, stacked layers together.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> rule = regrowth.prune.below_spread(0.0, 1.0)
      >>> params, masks = (jnp.array([3.0, 1.0, 0.0]),), (jnp.ones(3, bool),)
      >>> state = rule.init(params, masks)
      >>> (stay,), _ = rule.apply(regrowth.Evidence(params, masks), state)
      >>> stay.tolist()
      [True, False, False]

    References:
      Guo, Yao and Chen, `Dynamic Network Surgery for Efficient DNNs
      <https://arxiv.org/abs/1608.04493>`_, 2016.
    """
    return _below_spread(c, factor, gamma, power)


@functools.lru_cache
def _below_spread(c: float, factor: float, gamma: float, power: float) -> Rule:
    def apply(evidence: Evidence, state: Any) -> tuple[tuple[jax.Array, ...], Any]:
        heads = coin(evidence.step, gamma, power)
        columns = zip(evidence.params, evidence.masks, state, strict=True)
        stay = (m & ((jnp.abs(w) >= t) | jnp.logical_not(heads)) for w, m, t in columns)
        return tuple(stay), state

    return Rule(lambda params, masks: thresholds(params, c, factor), apply)


def thresholds(
    params: tuple[jax.Array, ...], c: float, factor: float
) -> tuple[jax.Array, ...]:
    """Factor * max(mean + c * standard deviation, 0) of the |w| that are not zero.

    Args:
      params: Weights, one array a leaf.
      c: Standard deviations above the mean.
      factor: A number.

    Returns:
      float32 scalars.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> float(regrowth.prune.thresholds((jnp.array([3.0, 0.0, -1.0]),), 1.0, 0.5)[0])
      1.5
    """
    found = []
    for w in params:
        size, there = jnp.abs(w.astype(jnp.float32)), w != 0
        mean = jnp.mean(size, where=there)
        spread = jnp.std(size, where=there)
        found.append(factor * jnp.maximum(jnp.nan_to_num(mean + c * spread), 0.0))
    return tuple(found)
