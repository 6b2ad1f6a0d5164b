"""Growth rules: which missing weights come back."""

import jax
import jax.numpy as jnp

from sparse_optax import masks
from sparse_optax.regrowth.rules import Evidence, axes_of, require, stateless


def _missing_magnitude(value: jax.Array, mask: jax.Array) -> jax.Array:
    # Below every magnitude, so that an active weight is never among the grown.
    return jnp.where(mask, -1.0, jnp.abs(value))


def _missing_random(bits: jax.Array, mask: jax.Array) -> jax.Array:
    # The top bit sets candidates apart; 31 random bits order them.
    return jnp.where(mask, jnp.uint32(0), bits | jnp.uint32(1 << 31))


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


def _random(evidence: Evidence) -> tuple[jax.Array, ...]:
    key = require(evidence, "key", rule="grow.random")
    names = evidence.names or tuple(str(i) for i in range(len(evidence.masks)))
    bits = [
        masks.random_scores(key, name, mask)
        for name, mask in zip(names, evidence.masks, strict=True)
    ]
    return tuple(
        masks.select(
            list(zip(bits, evidence.masks, strict=True)),
            list(require(evidence, "counts", rule="grow.random")),
            axes_of(evidence),
            _missing_random,
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
