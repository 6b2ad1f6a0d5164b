"""Growth rules: which missing weights come back."""

import functools

import jax
import jax.numpy as jnp

from sparse_optax import masks
from sparse_optax.regrowth.prune import thresholds
from sparse_optax.regrowth.rules import (
    Evidence,
    Rule,
    axes_of,
    coin,
    require,
    stateless,
)


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
    return _above_spread(c, factor, gamma, power)


@functools.lru_cache
def _above_spread(c: float, factor: float, gamma: float, power: float) -> Rule:
    def apply(evidence, state):
        heads = coin(evidence.step, gamma, power)
        columns = zip(evidence.params, evidence.masks, state, strict=True)
        new = (heads & (jnp.abs(w) >= t) & jnp.logical_not(m) for w, m, t in columns)
        return tuple(new), state

    return Rule(lambda params, masks: thresholds(params, c, factor), apply)
