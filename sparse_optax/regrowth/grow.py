"""Growth rules: which missing weights come back."""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import masks, selection
from sparse_optax.regrowth import allocate, units
from sparse_optax.regrowth.rules import (
    Evidence,
    axes_of,
    layer_vector,
    require,
    stateless,
)

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
        units.unfold(m, v.shape, axis)
        for m, v, axis in zip(chosen, values, axes, strict=True)
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


def _bits(evidence: Evidence, rule: str) -> list[jax.Array]:
    key = require(evidence, "key", rule=rule)
    names = evidence.names or tuple(str(i) for i in range(len(evidence.masks)))
    return [
        masks.random_scores(key, name, mask)
        for name, mask in zip(names, evidence.masks, strict=True)
    ]


def _random(evidence: Evidence) -> tuple[jax.Array, ...]:
    bits = _bits(evidence, "grow.random")
    return tuple(
        masks.select(
            list(zip(bits, evidence.masks, strict=True)),
            list(require(evidence, "counts", rule="grow.random")),
            axes_of(evidence),
            _missing_random,
        )
    )


def _random_elsewhere(evidence: Evidence) -> tuple[jax.Array, ...]:
    bits = _bits(evidence, "grow.random_elsewhere")
    before = require(evidence, "before", rule="grow.random_elsewhere")
    return tuple(
        masks.select(
            list(zip(bits, evidence.masks, before, strict=True)),
            list(require(evidence, "counts", rule="grow.random_elsewhere")),
            axes_of(evidence),
            _elsewhere,
        )
    )


#: Grows, in each layer, the missing weights of largest absolute momentum. Of equal
#: values the lowest index comes first.
momentum = stateless(_momentum, needs=("momentum",), exact=True)

#: Grows, in each layer, the missing weights of largest absolute gradient.
gradient = stateless(_gradient, needs=("gradient",), exact=True)

#: Grows, in each layer, missing weights uniformly at random, an exact number.
random = stateless(_random, exact=True)


def _magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    return _largest(evidence, evidence.params, "grow.magnitude")


#: Grows, in each layer, the missing weights of largest |w|, which ``hidden=True``
#: keeps; without it all are zero and the lowest indices grow.
magnitude = stateless(_magnitude, exact=True)
#: The same, but what was just pruned only where a layer has no other room.
random_elsewhere = stateless(_random_elsewhere, exact=True)

#: Grows the ``sum(counts)`` missing weights of largest absolute momentum of the
#: network: how many come in each layer follows from them.
global_momentum = stateless(_global_momentum, needs=("momentum",))

#: Grows the ``sum(counts)`` missing weights of largest absolute gradient of all.
global_gradient = stateless(_global_gradient, needs=("gradient",))

#: Splits a layer's number over its output units (its last axis) in proportion to the
#: mean absolute momentum of a unit's weights, within each one's room, and grows in each
#: unit those of largest absolute momentum.
momentum_per_neuron = stateless(_momentum_per_neuron, needs=("momentum",), exact=True)
