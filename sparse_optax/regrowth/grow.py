"""Growth rules: which missing weights come back."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import masks, selection
from sparse_optax.regrowth import allocate, units
from sparse_optax.regrowth.rules import (
    Evidence,
    PerWeight,
    Rule,
    axes_of,
    coin,
    layer_counts,
    layer_vector,
    random_bits,
    require,
    split_layers,
    stateless,
)
from sparse_optax.regrowth.spread import check_spread, thresholds

_TOP = np.uint32(1 << 31)


def _missing_magnitude(value: jax.Array, mask: jax.Array) -> jax.Array:
    # Below every magnitude, so that an active weight is never among the grown.
    return jnp.where(mask, -1.0, jnp.abs(value))


def _missing_random(bits: jax.Array, mask: jax.Array) -> jax.Array:
    # The top bit sets candidates apart; 31 random bits order them.
    return jnp.where(mask, jnp.uint32(0), _TOP | bits)


def _elsewhere(bits: jax.Array, mask: jax.Array, before: jax.Array) -> jax.Array:
    # Below all other missing weights those that were just pruned.
    missing = jnp.where(before, bits >> 2 | jnp.uint32(1 << 30), _TOP | bits)
    return jnp.where(mask, jnp.uint32(0), missing)


def _largest(evidence: Evidence, values, rule: str) -> tuple[jax.Array, ...]:
    return tuple(
        masks.select(
            list(zip(values, evidence.masks, strict=True)),
            list(require(evidence, "counts", rule=rule)),
            axes_of(evidence),
            _missing_magnitude,
        )
    )


def _momentum(evidence: Evidence) -> tuple[jax.Array, ...]:
    values = require(evidence, "momentum", rule="grow.momentum")
    return _largest(evidence, values, "grow.momentum")


def _gradient(evidence: Evidence) -> tuple[jax.Array, ...]:
    values = require(evidence, "gradient", rule="grow.gradient")
    return _largest(evidence, values, "grow.gradient")


def _momentum_per_neuron(evidence: Evidence) -> tuple[jax.Array, ...]:
    values = require(evidence, "momentum", rule="grow.momentum_per_neuron")
    counts = require(evidence, "counts", rule="grow.momentum_per_neuron")
    axes = axes_of(evidence)
    by_unit = [
        (units.fold(v, axis), units.fold(m, axis))
        for v, m, axis in zip(values, evidence.masks, axes, strict=True)
    ]
    chosen = masks.select(
        by_unit,
        units.split_counts(counts, values, evidence.masks, axes),
        [0] * len(by_unit),
        _missing_magnitude,
    )
    return tuple(
        units.unfold(new, m, axis)
        for new, m, axis in zip(chosen, evidence.masks, axes, strict=True)
    )


def _pooled(evidence: Evidence, operands, score, rule: str) -> tuple[jax.Array, ...]:
    """The best ``sum(counts)`` of all layers as one pool."""
    counts = layer_vector(require(evidence, "counts", rule=rule))
    if not operands:
        return ()
    k = allocate.signed_sum(counts)
    return tuple(selection.top_k_mask(operands, k, score=score))


def _global_momentum(evidence: Evidence) -> tuple[jax.Array, ...]:
    values = require(evidence, "momentum", rule="grow.global_momentum")
    pairs = list(zip(values, evidence.masks, strict=True))
    return _pooled(evidence, pairs, _missing_magnitude, "grow.global_momentum")


def _global_gradient(evidence: Evidence) -> tuple[jax.Array, ...]:
    values = require(evidence, "gradient", rule="grow.global_gradient")
    pairs = list(zip(values, evidence.masks, strict=True))
    return _pooled(evidence, pairs, _missing_magnitude, "grow.global_gradient")


def _magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    return _largest(evidence, evidence.params, "grow.magnitude")


def _random(evidence: Evidence) -> tuple[jax.Array, ...]:
    bits = random_bits(evidence, "grow.random")
    return tuple(
        masks.select(
            list(zip(bits, evidence.masks, strict=True)),
            list(require(evidence, "counts", rule="grow.random")),
            axes_of(evidence),
            _missing_random,
        )
    )


def _random_elsewhere(evidence: Evidence) -> tuple[jax.Array, ...]:
    return tuple(
        masks.select(
            _by_chance(evidence, "grow.random_elsewhere"),
            list(require(evidence, "counts", rule="grow.random_elsewhere")),
            axes_of(evidence),
            _elsewhere,
        )
    )


def _global_random_elsewhere(evidence: Evidence) -> tuple[jax.Array, ...]:
    rule = "grow.global_random_elsewhere"
    return _pooled(evidence, _by_chance(evidence, rule), _elsewhere, rule)


def _by_chance(evidence: Evidence, rule: str) -> list[tuple[jax.Array, ...]]:
    before = require(evidence, "before", rule=rule)
    bits = random_bits(evidence, rule)
    return list(zip(bits, evidence.masks, before, strict=True))


class Explored(NamedTuple):
    """State of ``unexplored``.

    Attributes:
      explored: Where a weight was ever active, bool arrays.
      rule: State of the rule inside.
    """

    explored: PerWeight
    rule: Any


def unexplored(rule: Rule, *, prefer: bool = True) -> Rule:
    """Remembers which weights were ever active, and grows others first.

    Where a layer has no room that was never active, the rest grows by the same rule
    anywhere. ``state.get_explored`` reads the set. Memory: one byte a weight.

    Args:
      rule: How to choose: ``random``, ``gradient``, ``momentum`` or any other growth
        rule that keeps to its counts.
      prefer: Whether weights that were never active come first; False just remembers.

    Returns:
      A growth rule.

    Raises:
      ValueError: If the rule places its counts in other layers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> rule = regrowth.grow.unexplored(regrowth.grow.gradient)
      >>> masks = (jnp.array([True, False, False, False]),)
      >>> evidence = regrowth.Evidence(
      ...     params=(jnp.ones(4),), masks=masks, before=masks,
      ...     gradient=(jnp.array([0.0, 9.0, 2.0, 1.0]),), counts=(jnp.int32(1),))
      >>> seen = regrowth.PerWeight((jnp.array([True, True, False, False]),))
      >>> (new,), state = rule.apply(evidence, regrowth.grow.Explored(seen, ()))
      >>> new.tolist(), state.explored.values[0].tolist()
      ([False, False, True, False], [True, True, True, False])

    References:
      Liu et al, `Do We Actually Need Dense Over-Parameterization?
      <https://arxiv.org/abs/2102.02887>`_, 2021, who count such weights.
    """
    if not isinstance(rule, Rule) or not rule.exact:
        raise ValueError(
            f"unexplored: `rule` must be a growth rule that keeps to its counts; got "
            f"{rule!r}. Use grow.random, grow.gradient or grow.momentum."
        )
    return _unexplored(rule, bool(prefer))


# Cached: a rule is a static argument of the compiled cycle.
@functools.lru_cache
def _unexplored(rule: Rule, prefer: bool) -> Rule:
    def init(params, masks):
        # Copied: the masks are in the state as well, and it may be donated.
        seen = tuple(jnp.array(m, copy=True) for m in masks)
        return Explored(PerWeight(seen), rule.init(params, masks))

    def apply(evidence, state):
        before = require(evidence, "before", rule="grow.unexplored")
        counts = require(evidence, "counts", rule="grow.unexplored")
        seen = tuple(map(jnp.logical_or, state.explored.values, before))
        inside, first = state.rule, tuple(map(jnp.zeros_like, before))
        if prefer and seen:
            axes = axes_of(evidence)
            room = layer_counts(tuple(map(jnp.logical_not, seen)), axes)
            wanted = layer_vector(counts)
            some = jnp.minimum(wanted, room)
            split = split_layers(some, seen, axes)
            fresh = evidence._replace(masks=seen, counts=split)
            first, inside = rule.apply(fresh, inside)
            taken = tuple(map(jnp.logical_or, evidence.masks, first))
            split = split_layers(wanted - some, seen, axes)
            evidence = evidence._replace(masks=taken, counts=split)
        rest, inside = rule.apply(evidence, inside)
        new = tuple(map(jnp.logical_or, first, rest))
        seen = tuple(map(jnp.logical_or, seen, new))
        return new, Explored(PerWeight(seen), inside)

    return Rule(init, apply, needs=rule.needs, exact=True)


#: Grows, in each layer, the missing weights of largest absolute momentum. Of equal
#: values the lowest index comes first.
momentum = stateless(_momentum, needs=("momentum",), exact=True)

#: Grows, in each layer, the missing weights of largest absolute gradient.
gradient = stateless(_gradient, needs=("gradient",), exact=True)

#: Grows, in each layer, the missing weights of largest |w|, which ``hidden=True``
#: keeps; without it all are zero and the lowest indices grow.
magnitude = stateless(_magnitude, exact=True)

#: Grows, in each layer, missing weights uniformly at random, an exact number.
random = stateless(_random, exact=True)

#: The same, but what was just pruned only where a layer has no other room.
random_elsewhere = stateless(_random_elsewhere, exact=True)

#: The same for all layers as one pool, uniform over the missing weights of all.
global_random_elsewhere = stateless(_global_random_elsewhere)

#: Grows the ``sum(counts)`` missing weights of largest absolute momentum of the
#: network: how many come in each layer follows from them.
global_momentum = stateless(_global_momentum, needs=("momentum",))

#: Grows the ``sum(counts)`` missing weights of largest absolute gradient of all.
global_gradient = stateless(_global_gradient, needs=("gradient",))

#: Splits a layer's number over its output units (its last axis) in proportion to the
#: mean absolute momentum of a unit's weights, within each one's room, and grows in each
#: unit those of largest absolute momentum.
momentum_per_neuron = stateless(_momentum_per_neuron, needs=("momentum",), exact=True)


def above_spread(
    c: float, factor: float = 1.1, *, gamma: float = 0.0, power: float = 1.0
) -> Rule:
    """Grows every missing weight at or above a threshold, see ``prune.below_spread``.

    Args:
      c: Standard deviations above the mean.
      factor: At least that of ``prune.below_spread``.
      gamma: Of the coin, at least 0; 0 is every cycle.
      power: Of the coin, at least 0.

    Returns:
      A rule that remembers one number a leaf. It grows as many as there are.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> rule = regrowth.grow.above_spread(0.0, 1.0)
      >>> params, masks = (jnp.array([3.0, 1.0]),), (jnp.zeros(2, bool),)
      >>> state = rule.init(params, masks)
      >>> (new,), _ = rule.apply(regrowth.Evidence(params, masks), state)
      >>> new.tolist()
      [True, False]
    """
    check_spread("grow.above_spread", c, factor, gamma, power)
    return _above_spread(c, factor, gamma, power)


@functools.lru_cache
def _above_spread(c: float, factor: float, gamma: float, power: float) -> Rule:
    def apply(evidence, state):
        heads = coin(evidence.step, gamma, power)
        columns = zip(evidence.params, evidence.masks, state.values, strict=True)
        new = (heads & (jnp.abs(w) >= t) & jnp.logical_not(m) for w, m, t in columns)
        return tuple(new), state

    return Rule(lambda params, _: PerWeight(thresholds(params, c, factor)), apply)
