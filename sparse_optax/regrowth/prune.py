"""Prune rules: which active weights stay."""

import functools
import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import masks, selection, wide
from sparse_optax.regrowth import allocate
from sparse_optax.regrowth.rules import (
    Evidence,
    PerWeight,
    Rule,
    axes_of,
    coin,
    layer_counts,
    layer_sizes,
    layer_vector,
    random_bits,
    require,
    split_layers,
    stateless,
    tally_layers,
)
from sparse_optax.regrowth.spread import check_spread, thresholds

# A threshold that left these bounds could neither be doubled nor halved back.
LOWEST, HIGHEST = 2.0**-120, 2.0**120


def _active_magnitude(weight: jax.Array, mask: jax.Array) -> jax.Array:
    # Below every magnitude, so that a missing weight is never among the kept.
    return jnp.where(mask, jnp.abs(weight), -1.0)


def _largest(evidence: Evidence, stay: jax.Array) -> tuple[jax.Array, ...]:
    """Masks of the ``stay`` largest active weights of each layer."""
    axes = axes_of(evidence)
    return tuple(
        masks.select(
            list(zip(evidence.params, evidence.masks, strict=True)),
            split_layers(stay, evidence.masks, axes),
            axes,
            _active_magnitude,
        )
    )


def _magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    active = require(evidence, "active", rule="prune.magnitude")
    counts = require(evidence, "counts", rule="prune.magnitude")
    return _largest(evidence, layer_vector(active) - layer_vector(counts))


def _two_sided(evidence: Evidence) -> tuple[jax.Array, ...]:
    rate = require(evidence, "rate", rule="prune.two_sided")
    pairs = list(zip(evidence.params, evidence.masks, strict=True))
    # Two pools a layer, in one search. A weight that has not moved yet is positive.
    pools = [(w, jnp.logical_and(m, w >= 0)) for w, m in pairs]
    pools += [(w, jnp.logical_and(m, w < 0)) for w, m in pairs]
    axes, sides = axes_of(evidence) * 2, tuple(m for _, m in pools)
    number = layer_counts(sides, axes)
    stay = number - allocate.floor_fraction(rate, number)
    kept = masks.select(pools, split_layers(stay, sides, axes), axes, _active_magnitude)
    return tuple(map(jnp.logical_or, kept[: len(pairs)], kept[len(pairs) :]))


def _saved_magnitude(weight: jax.Array, mask: jax.Array, saved: jax.Array) -> jax.Array:
    return jnp.where(saved, jnp.inf, jnp.where(mask, jnp.abs(weight), -1.0))


def _global_magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    if not evidence.masks:
        return ()
    active = layer_vector(require(evidence, "active", rule="prune.global_magnitude"))
    counts = layer_vector(require(evidence, "counts", rule="prune.global_magnitude"))
    target = active if evidence.target is None else layer_vector(evidence.target)
    one = jnp.minimum(active, 1)
    saved = _largest(evidence, one)
    # A budget that moves is one number here: layers need not be at their targets.
    lost = wide.add64(
        allocate.signed_sum(counts - jnp.maximum(active - target, 0)),
        allocate.signed_sum(active - target),
    )
    whole, least = allocate.signed_sum(active), allocate.signed_sum(one)
    stay = wide.sub64(whole, wide.min64(lost, wide.sub64(whole, least)))
    columns = zip(evidence.params, evidence.masks, saved, strict=True)
    return tuple(selection.top_k_mask(list(columns), stay, score=_saved_magnitude))


def _zero_last(weight: jax.Array, mask: jax.Array, bits: jax.Array) -> jax.Array:
    # Zeros in random order, below all other active weights and above missing ones.
    active = jnp.where(weight != 0, jnp.uint32(2**32 - 1), bits >> 1 | 1)
    return jnp.where(mask, active, jnp.uint32(0))


def _is_zero(weight: jax.Array, mask: jax.Array) -> tuple[jax.Array]:
    return (jnp.logical_and(mask, weight == 0),)


def _zeros(evidence: Evidence, *, pool: bool) -> tuple[jax.Array, ...]:
    if not evidence.masks:
        return ()
    active = layer_vector(require(evidence, "active", rule="prune.zeros"))
    bits = random_bits(evidence, "prune.zeros")
    axes, pairs = (
        axes_of(evidence),
        list(zip(evidence.params, evidence.masks, strict=True)),
    )
    (zeros,) = tally_layers(pairs, axes, _is_zero)
    room = jnp.asarray(layer_sizes(evidence.masks, axes).astype(np.int32)) - active
    columns = [(w, m, b) for (w, m), b in zip(pairs, bits, strict=True)]
    if pool:
        lost = wide.min64(wide.sum64(zeros), allocate.signed_sum(room))
        stay = wide.sub64(allocate.signed_sum(active), lost)
        return tuple(selection.top_k_mask(columns, stay, score=_zero_last))
    stay = active - jnp.minimum(zeros.astype(jnp.int32), room)
    split = split_layers(stay, evidence.masks, axes)
    return tuple(masks.select(columns, split, axes, _zero_last))


def adaptive_threshold(
    initial: float = 1e-3, *, tolerance: float = 0.1, number: int | None = None
) -> Rule:
    r"""Removes what is under one threshold that follows a target number.

    .. math:: K_i = \#\{|w| < H\}, \quad
              H \leftarrow H / 2 \text{ if } K > (1 + \delta) N_p, \quad
              H \leftarrow 2 H \text{ if } K < (1 - \delta) N_p

    with K the sum of K_i. A layer that would be emptied keeps its largest weight. It
    sets its own numbers: with a ``budget`` that moves the total lags behind.

    Args:
      initial: The first threshold H, above 0.
      tolerance: delta, the width of the band in which H stays, in [0, 1).
      number: N_p, how many weights a cycle should remove; None is the prune rate's
        share of the active weights.

    Returns:
      A prune rule whose state is H, a float32 scalar.

    Raises:
      ValueError: If an argument is a number outside its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> rule = regrowth.prune.adaptive_threshold(0.5, number=1)
      >>> evidence = regrowth.Evidence(
      ...     params=(jnp.array([3.0, 0.1, 0.2, 0.3]),),
      ...     masks=(jnp.ones(4, bool),), active=(jnp.int32(4),))
      >>> (kept,), threshold = rule.apply(evidence, rule.init((), ()))
      >>> kept.tolist(), float(threshold)
      ([True, False, False, False], 0.25)

    References:
      Mostafa and Wang, `Parameter Efficient Training of Deep Convolutional Neural
      Networks by Dynamic Sparse Reparameterization
      <https://arxiv.org/abs/1902.05967>`_, 2019.
    """

    def fail(name, value, allowed, cure):
        raise ValueError(
            f"adaptive_threshold: `{name}` must be {allowed}; got {value!r}. {cure}"
        )

    if isinstance(initial, numbers.Real) and not LOWEST <= initial <= HIGHEST:
        allowed = f"in [{LOWEST:.1g}, {HIGHEST:.1g}]"
        fail("initial", initial, allowed, "Use 1e-3 as in the paper.")
    if isinstance(tolerance, numbers.Real) and not 0 <= tolerance < 1:
        fail("tolerance", tolerance, "in [0, 1)", "Use 0.1 as in the paper.")
    whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if number is not None and not isinstance(number, jax.Array):
        if not whole or not 1 <= number < 2**31:
            allowed = "an integer in [1, 2**31) or None"
            fail("number", number, allowed, "Leave it out to follow prune_rate.")
    if any(isinstance(x, jax.Array) for x in (initial, tolerance, number)):
        return _adaptive_threshold.__wrapped__(initial, tolerance, number)
    return _adaptive_threshold(initial, tolerance, number)


# Cached: a rule is a static argument of the compiled cycle.
@functools.lru_cache
def _adaptive_threshold(initial: Any, tolerance: Any, number: Any) -> Rule:
    def init(params, masks):
        del params, masks
        return jnp.asarray(initial, jnp.float32)

    def apply(evidence, threshold):
        if not evidence.masks:
            return (), threshold
        active = require(evidence, "active", rule="prune.adaptive_threshold")
        active, axes = layer_vector(active), axes_of(evidence)
        above = tuple(
            jnp.logical_and(m, jnp.abs(w.astype(_wide(w))) >= threshold)
            for w, m in zip(evidence.params, evidence.masks, strict=True)
        )
        stay = layer_counts(above, axes)
        emptied = jnp.logical_and(stay == 0, active > 0).astype(jnp.int32)
        saved = _largest(evidence, emptied)
        if number is None:
            counts = require(evidence, "counts", rule="prune.adaptive_threshold")
            wanted = allocate.signed_sum(layer_vector(counts))
        else:
            wanted = wide.pair64(jnp.asarray(number, jnp.uint32))
        lost = allocate.signed_sum(active - stay - emptied)
        band = allocate.floor_fraction64(tolerance, wanted)
        half = wide.less64(wide.add64(wanted, band), lost)
        double = wide.less64(lost, wide.sub64(wanted, band))
        factor = jnp.where(half, 0.5, jnp.where(double, 2.0, 1.0))
        after = jnp.clip(threshold * factor, LOWEST, HIGHEST).astype(jnp.float32)
        return tuple(map(jnp.logical_or, above, saved)), after

    return Rule(init, apply)


def _wide(x: jax.Array) -> np.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


#: Removes the ``counts`` active weights of smallest magnitude in each layer. Of
#: equal magnitudes the lowest index stays.
magnitude = stateless(_magnitude, exact=True)

#: Removes, in each layer, the prune rate's share of the positive weights closest to
#: zero and of the negative weights closest to zero, each rounded down. Active weights
#: of exactly zero count among the positive. For budgets that do not move.
two_sided = stateless(_two_sided)

#: Removes the ``sum(counts)`` active weights of smallest magnitude of the network; of
#: equal magnitudes the first leaf's lowest index stays. Each layer keeps its largest
#: weight, so that fewer go where nothing else is left.
global_magnitude = stateless(_global_magnitude, pooled=True)


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
        chosen = masks.select(ranked, list(counts), axes_of(evidence))
        pairs = zip(chosen, evidence.masks, strict=True)
        return tuple(jnp.logical_and(c, m) for c, m in pairs)

    return stateless(stay)


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
    check_spread("prune.below_spread", c, factor, gamma, power)
    return _below_spread(c, factor, gamma, power)


@functools.lru_cache
def _below_spread(c: float, factor: float, gamma: float, power: float) -> Rule:
    def apply(evidence: Evidence, state: Any) -> tuple[tuple[jax.Array, ...], Any]:
        heads = coin(evidence.step, gamma, power)
        columns = zip(evidence.params, evidence.masks, state.values, strict=True)
        stay = (m & ((jnp.abs(w) >= t) | jnp.logical_not(heads)) for w, m, t in columns)
        return tuple(stay), state

    return Rule(lambda params, _: PerWeight(thresholds(params, c, factor)), apply)


#: Removes active weights that are exactly zero, in each layer at most as many as it has
#: missing ones: so growth elsewhere always has room. Which of more go is random.
zeros = stateless(functools.partial(_zeros, pool=False))

#: The same for all layers as one pool.
global_zeros = stateless(functools.partial(_zeros, pool=True), pooled=True)
