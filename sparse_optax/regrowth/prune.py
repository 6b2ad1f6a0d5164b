"""Prune rules: which active weights stay."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax import checks, selection
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.masks.make import follow_layers
from sparse_optax.regrowth import allocate
from sparse_optax.regrowth.at_once import outranked_at_once
from sparse_optax.regrowth.rules import (
    Evidence,
    PerWeight,
    Rule,
    active_magnitude,
    coin,
    layer_counts,
    stateless,
    tally_layers,
)
from sparse_optax.selection import uint64
from sparse_optax.selection.leaf import wide as as_wide

__all__ = [
    "adaptive_threshold",
    "below_spread",
    "global_magnitude",
    "global_zeros",
    "magnitude",
    "outranked",
    "random",
    "two_sided",
    "zeros",
]

# Bounds of a threshold, so that doubling and halving can always bring it back.
_LOWEST, _HIGHEST = 2.0**-120, 2.0**120


# --- by magnitude ---------------------------------------------------------------------
def _pairs(evidence: Evidence) -> list[tuple[jax.Array, jax.Array]]:
    return list(zip(evidence.params, evidence.masks, strict=True))


def _largest(evidence: Evidence, stay: jax.Array) -> tuple[jax.Array, ...]:
    """Masks of the ``stay`` largest active weights of each layer."""
    return evidence.select(_pairs(evidence), stay, active_magnitude)


def _magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    counts = evidence.need("counts", "prune.magnitude")
    return _largest(evidence, evidence.need("active", "prune.magnitude") - counts)


def _two_sided(evidence: Evidence) -> tuple[jax.Array, ...]:
    rate, pairs = evidence.need("rate", "prune.two_sided"), _pairs(evidence)
    for w, _ in pairs:
        if jnp.iscomplexobj(w):
            raise ArgumentError(
                "prune.two_sided needs the signs of weights; got a leaf of shape "
                f"{w.shape} and dtype {w.dtype}. Leave it out with where=lambda name, "
                "leaf: ..., or use prune.magnitude."
            )
    # Two pools per layer, in one search. Zeros, as of new weights, count as positive.
    pools = [(w, jnp.logical_and(m, w >= 0)) for w, m in pairs]
    pools += [(w, jnp.logical_and(m, w < 0)) for w, m in pairs]
    axes, sides = evidence.layer_axes * 2, [m for _, m in pools]
    number = layer_counts(sides, axes)
    left = number - _lost_to_ramp(evidence, number)
    stay = left - allocate.floor_fraction(rate, left)
    near = selection.nowhere([w for w, _ in pools], len(stay))
    kept = follow_layers(pools, stay, axes, active_magnitude, near, positive=False)[0]
    return tuple(map(jnp.logical_or, kept[: len(pairs)], kept[len(pairs) :]))


def _has_ramp(evidence: Evidence) -> bool:
    """Whether targets differ from what is active; without a ramp they are the same."""
    return evidence.target is not None and evidence.target is not evidence.active


def _lost_to_ramp(evidence: Evidence, number: jax.Array) -> jax.Array | int:
    """How many of both signs' weights a ramp takes, each sign by its share; rounding
    takes from the negative ones.
    """
    if not _has_ramp(evidence):
        return 0
    excess = jnp.maximum(evidence.active - evidence.target, 0).astype(jnp.uint32)
    positive, _ = jnp.split(number.astype(jnp.uint32), 2)
    whole = jnp.maximum(evidence.active, 1).astype(jnp.uint32)
    product = uint64.mul64(uint64.pair64(excess), positive)
    share, _ = uint64.divmod64(product, uint64.pair64(whole))
    return jnp.concatenate([share[1], excess - share[1]]).astype(jnp.int32)


def _saved_magnitude(weight: jax.Array, mask: jax.Array, saved: jax.Array) -> jax.Array:
    return jnp.where(saved, jnp.inf, jnp.where(mask, jnp.abs(weight), -1.0))


def _global_magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    if not evidence.masks:
        return ()
    active = evidence.need("active", "prune.global_magnitude")
    counts = evidence.need("counts", "prune.global_magnitude")
    target = active if evidence.target is None else evidence.target
    one = jnp.minimum(active, 1)
    saved = _largest(evidence, one)
    # Of a ramp only the total counts: layers need not meet their targets.
    lost = uint64.add64(
        allocate.signed_sum(counts - jnp.maximum(active - target, 0)),
        allocate.signed_sum(active - target),
    )
    whole, least = allocate.signed_sum(active), allocate.signed_sum(one)
    stay = uint64.sub64(whole, uint64.min64(lost, uint64.sub64(whole, least)))
    columns = zip(evidence.params, evidence.masks, saved, strict=True)
    return tuple(selection.top_k_mask(list(columns), stay, score=_saved_magnitude))


#: Removes the ``counts`` active weights of smallest magnitude in each layer. Of equal
#: magnitudes the lowest index stays.
magnitude = stateless(_magnitude, exact=True)

#: Removes in each layer a fraction, the prune rate, of the positive weights and of the
#: negative weights, those closest to zero, each rounded down. Active weights of exactly
#: zero count as positive. A ramp first takes its part, from both by their shares.
two_sided = stateless(_two_sided, covers=True, by_share=True)

#: Removes the ``sum(counts)`` active weights of smallest magnitude of the network. Of
#: equal magnitudes the lowest index of the first leaf stays. Each layer keeps its
#: largest weight, even if fewer weights are then removed.
global_magnitude = stateless(_global_magnitude, pooled=True)


# --- at random ------------------------------------------------------------------------
def _active_random(bits: jax.Array, mask: jax.Array) -> jax.Array:
    # The top bit marks active weights; 31 random bits order them.
    return jnp.where(mask, bits >> 1 | jnp.uint32(1 << 31), jnp.uint32(0))


def _random(evidence: Evidence) -> tuple[jax.Array, ...]:
    counts = evidence.need("counts", "prune.random")
    stay = evidence.need("active", "prune.random") - counts
    bits = evidence.random_bits("prune.random")
    pairs = list(zip(bits, evidence.masks, strict=True))
    return evidence.select(pairs, stay, _active_random)


#: Removes ``counts`` active weights of each layer, uniformly at random.
random = stateless(_random, exact=True)


# --- zeros ----------------------------------------------------------------------------
def _zero_last(weight: jax.Array, mask: jax.Array, bits: jax.Array) -> jax.Array:
    # Zeros rank in random order below other active weights and above missing ones.
    active = jnp.where(weight != 0, jnp.uint32(2**32 - 1), bits >> 1 | 1)
    return jnp.where(mask, active, jnp.uint32(0))


def _is_zero(weight: jax.Array, mask: jax.Array) -> tuple[jax.Array]:
    return (jnp.logical_and(mask, weight == 0),)


def _zeros(evidence: Evidence, *, pool: bool) -> tuple[jax.Array, ...]:
    if not evidence.masks:
        return ()
    active, pairs = evidence.need("active", "prune.zeros"), _pairs(evidence)
    (zeros,) = tally_layers(pairs, evidence.layer_axes, _is_zero)
    room = evidence.places - active
    if pool:
        fits = jnp.logical_not(
            uint64.less64(allocate.signed_sum(room), uint64.sum64(zeros))
        )
    else:
        fits = jnp.all(zeros.astype(jnp.int32) <= room)

    def all_go() -> tuple[jax.Array, ...]:
        return tuple(jnp.logical_and(m, w != 0) for w, m in pairs)

    def some_go() -> tuple[jax.Array, ...]:
        bits = evidence.random_bits("prune.zeros")
        columns = [(w, m, b) for (w, m), b in zip(pairs, bits, strict=True)]
        if pool:
            lost = uint64.min64(uint64.sum64(zeros), allocate.signed_sum(room))
            stay = uint64.sub64(allocate.signed_sum(active), lost)
            return tuple(selection.top_k_mask(columns, stay, score=_zero_last))
        stay = active - jnp.minimum(zeros.astype(jnp.int32), room)
        return evidence.select(columns, stay, _zero_last)

    # Random numbers only where not all zeros may go.
    kept = lax.cond(fits, all_go, some_go)
    if not pool or not _has_ramp(evidence):
        return kept
    # The ramp takes the rest, the smallest of all.
    left = evidence.count(kept)
    above = jnp.maximum(left - evidence.target, 0)
    return _global_magnitude(evidence._replace(masks=kept, active=left, counts=above))


#: Removes active weights that are exactly zero, in each layer at most as many as it has
#: missing ones, so that they can grow elsewhere. The choice among more is random.
zeros = stateless(functools.partial(_zeros, pool=False))

#: The same for all layers as one pool.
global_zeros = stateless(functools.partial(_zeros, pool=True), pooled=True)


# --- by one threshold -----------------------------------------------------------------
def check_adaptive(**given: Any) -> None:
    """Raises unless the threshold, the tolerance and the number of an adaptive
    threshold, in this order and under the caller's names, are in their ranges.
    """
    (initial, first), (tolerance, width), (number, wanted) = given.items()
    cure = "Use 1e-3 as in the paper."
    checks.number(initial, first, _LOWEST, _HIGHEST, cure=cure)
    cure = "Use 0.1 as in the paper."
    checks.number(tolerance, width, 0, 1, ends="[)", cure=cure)
    if wanted is not None:
        cure = "Leave it out to follow prune_rate."
        checks.whole(number, wanted, 1, 2**31 - 1, cure=cure)


@boundary("adaptive_threshold")
def adaptive_threshold(
    initial: float = 1e-3, *, tolerance: float = 0.1, number: int | None = None
) -> Rule:
    r"""Removes the weights under one threshold, which follows a target number.

    .. math:: K_i = \#\{|w| < H\}, \quad
              H \leftarrow H / 2 \text{ if } K > (1 + \delta) N_p, \quad
              H \leftarrow 2 H \text{ if } K < (1 - \delta) N_p

    with K the sum of K_i. A layer that would lose all weights keeps the largest. With a
    ``ramp`` the smallest weights above a layer's target go too.

    Args:
      initial: The first threshold H, above 0.
      tolerance: delta, the width of the band in which H stays, in [0, 1).
      number: N_p, how many weights a cycle should remove; None is the prune rate's
        fraction of the active weights.

    Returns:
      A prune rule whose state is H, a float32 scalar.

    Raises:
      ValueError: If an argument is a number outside its range.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> rule = sparse_optax.regrowth.prune.adaptive_threshold(0.5, number=1)
      >>> evidence = sparse_optax.regrowth.Evidence(
      ...     params=(jnp.array([3.0, 0.1, 0.2, 0.3]),),
      ...     masks=(jnp.ones(4, bool),), active=jnp.array([4]))
      >>> (kept,), threshold = rule.apply(evidence, rule.init((), ()))
      >>> kept.tolist(), float(threshold)
      ([True, False, False, False], 0.25)

    References:
      Mostafa and Wang, 2019, see ``dynamic_sparse``.
    """
    check_adaptive(initial=initial, tolerance=tolerance, number=number)
    make = _adaptive_threshold
    if any(isinstance(x, jax.Array) for x in (initial, tolerance, number)):
        make = make.__wrapped__  # traced values cannot be cache keys
    # NumPy's arrays cannot be keys either.
    given = (initial, tolerance, number)
    return make(*(x.item() if isinstance(x, np.ndarray) else x for x in given))


# Cached: a rule is a static argument of the compiled cycle.
@functools.lru_cache
def _adaptive_threshold(initial: Any, tolerance: Any, number: Any) -> Rule:
    def init(params, masks):
        del params, masks
        return jnp.asarray(initial, jnp.float32)

    def apply(evidence, threshold):
        if not evidence.masks:
            return (), threshold
        active = evidence.need("active", "prune.adaptive_threshold")
        above = tuple(
            jnp.logical_and(m, jnp.abs(_wide(w)) >= threshold)
            for w, m in _pairs(evidence)
        )
        stay = evidence.count(above)
        emptied = jnp.logical_and(stay == 0, active > 0).astype(jnp.int32)
        saved = _largest(evidence, emptied)
        if number is None:
            counts = evidence.need("counts", "prune.adaptive_threshold")
            wanted = allocate.signed_sum(counts)
        else:
            wanted = uint64.pair64(jnp.asarray(number, jnp.uint32))
        lost = allocate.signed_sum(active - stay - emptied)
        band = allocate.floor_fraction64(tolerance, wanted)
        half = uint64.less64(uint64.add64(wanted, band), lost)
        double = uint64.less64(lost, uint64.sub64(wanted, band))
        factor = jnp.where(half, 0.5, jnp.where(double, 2.0, 1.0))
        after = jnp.clip(threshold * factor, _LOWEST, _HIGHEST).astype(jnp.float32)
        return tuple(map(jnp.logical_or, above, saved)), after

    return Rule(init, apply)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(as_wide(x.dtype))


# --- against weights that are hidden --------------------------------------------------
_COIN = "Give ratio=0.9 / 1.1, gamma=1e-4, power=1.0 as in network surgery."


@boundary("prune.outranked")
def outranked(ratio: float = 1.0, *, gamma: float = 0.0, power: float = 1.0) -> Rule:
    r"""Keeps active weights among the ``target`` largest, hidden ones included.

    With m the mask, a weight is removed unless it is among the ``target`` largest of

    .. math:: |w| \text{ where } m, \quad ratio \cdot |w| \text{ elsewhere.}

    So a missing weight with a larger ratio |w| replaces an active one, and
    ``grow.magnitude`` grows it. After t updates this happens with probability
    :math:`(1 + \gamma t)^{-power}`; at other updates missing weights do not count, and
    the smallest are removed if the target has fallen.

    Args:
      ratio: In (0, 1]; 1 always keeps the largest.
      gamma: In the probability above, at least 0; 0 is every update.
      power: Exponent of the probability, at least 0.

    Returns:
      A rule that sets its own counts, whatever the ``prune_rate``.

    Raises:
      ValueError: If an argument is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> evidence = regrowth.Evidence(
      ...     params=(jnp.array([3.0, 1.0, 1.1, 2.0]),),
      ...     masks=(jnp.array([True, True, False, False]),), target=jnp.array([2]))
      >>> for ratio in (0.8, 0.4):
      ...     (stay,), _ = regrowth.prune.outranked(ratio).apply(evidence, ())
      ...     print(stay.tolist())
      [True, False, False, False]
      [True, True, False, False]

    References:
      Guo, Yao and Chen, 2016, see ``network_surgery``.
    """
    checks.number("ratio", ratio, 0, 1, ends="(]", static=True, cure=_COIN)
    checks.number("gamma", gamma, 0, static=True, cure=_COIN)
    checks.number("power", power, 0, static=True, cure=_COIN)
    return _outranked(float(ratio), float(gamma), float(power))


# Cached: a rule is a static argument of the compiled cycle.
@functools.lru_cache
def _outranked(ratio: float, gamma: float, power: float) -> Rule:
    def stay(evidence: Evidence) -> tuple[jax.Array, ...]:
        heads: Any = coin(evidence.step, gamma, power)
        ranked = []
        for w, m in _pairs(evidence):
            size = jnp.abs(_wide(w))
            ranked.append((jnp.where(m, size, jnp.where(heads, ratio * size, -1.0)),))
        counts = evidence.need("target", "prune.outranked")
        chosen = evidence.select(ranked, counts)
        pairs = zip(chosen, evidence.masks, strict=True)
        return tuple(jnp.logical_and(c, m) for c, m in pairs)

    def at_once(prune: Rule, grow: Rule, axes: Any, moving: bool) -> Rule:
        return outranked_at_once(
            prune, grow, axes, moving, ratio=ratio, gamma=gamma, power=power
        )

    return stateless(stay, covers=True)._replace(at_once=at_once)


@boundary("prune.below_spread")
def below_spread(
    c: float, factor: float = 0.9, *, gamma: float = 0.0, power: float = 1.0
) -> Rule:
    r"""Removes weights below a threshold of their leaf, fixed by the first weights.

    .. math:: |w| < factor \cdot \max(\mu + c \, \sigma, 0)

    with mean and standard deviation of the nonzero |w| at ``init``. With
    ``grow.above_spread`` these are the two thresholds of network surgery. No budget
    holds the number of weights. After t updates a cycle changes masks with probability
    :math:`(1 + \gamma t)^{-power}`.

    Args:
      c: Standard deviations above the mean.
      factor: Factor of the threshold, at most that of ``grow.above_spread``.
      gamma: In the probability above, at least 0; 0 is every cycle.
      power: Exponent of the probability, at least 0.

    Returns:
      A rule that stores one number per leaf, for all layers that it stacks.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> rule = sparse_optax.regrowth.prune.below_spread(0.0, 1.0)
      >>> params, masks = (jnp.array([3.0, 1.0, 0.0]),), (jnp.ones(3, bool),)
      >>> state = rule.init(params, masks)
      >>> (stay,), _ = rule.apply(sparse_optax.regrowth.Evidence(params, masks), state)
      >>> stay.tolist()
      [True, False, False]

    References:
      Guo, Yao and Chen, 2016, see ``network_surgery``.
    """
    check_spread(c, factor, gamma, power)
    return _below_spread(c, factor, gamma, power)


@functools.lru_cache
def _below_spread(c: float, factor: float, gamma: float, power: float) -> Rule:
    def apply(evidence: Evidence, state: Any) -> tuple[tuple[jax.Array, ...], Any]:
        heads = coin(evidence.step, gamma, power)
        columns = zip(evidence.params, evidence.masks, state.values, strict=True)
        stay = (m & ((jnp.abs(w) >= t) | jnp.logical_not(heads)) for w, m, t in columns)
        return tuple(stay), state

    return Rule(lambda params, _: PerWeight(thresholds(params, c, factor)), apply)


def thresholds(
    params: tuple[jax.Array, ...], c: float, factor: float
) -> tuple[jax.Array, ...]:
    """Factor * max(mean + c * standard deviation, 0) of the |w| that are not zero."""
    found = []
    for w in params:
        size, there = jnp.abs(w) if jnp.iscomplexobj(w) else w, w != 0
        size = jnp.abs(size.astype(jnp.float32))
        mean = jnp.mean(size, where=there)
        spread = jnp.std(size, where=there)
        found.append(factor * jnp.maximum(jnp.nan_to_num(mean + c * spread), 0.0))
    return tuple(found)


def check_spread(c: Any, factor: Any, gamma: Any, power: Any) -> None:
    """Raises if an argument of ``below_spread`` or ``above_spread`` is out of range."""
    cure = "Use c=1.0 and leave out the others, for instance."
    checks.number("c", c, static=True, cure=cure)
    for name, value in (("factor", factor), ("gamma", gamma), ("power", power)):
        checks.number(name, value, 0, static=True, cure=cure)
