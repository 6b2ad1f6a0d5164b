"""A prune in one pool over all layers, and an exchange within each, as in GraNet."""

import jax
import jax.numpy as jnp

from sparse_optax.regrowth import allocate, grow, prune
from sparse_optax.regrowth.rules import Evidence, Rule, active_magnitude


def _exchange(evidence: Evidence, state: tuple) -> tuple[tuple[jax.Array, ...], tuple]:
    if not evidence.masks:
        return (), state
    rule = "exchange.within_layers"
    active, target = evidence.need("active", rule), evidence.need("target", rule)
    # Only the ramp prunes globally.
    above = jnp.maximum(active - target, 0)
    left, _ = prune.global_magnitude.apply(evidence._replace(counts=above), ())
    number = evidence.count(left)
    lost = allocate.floor_fraction(evidence.need("rate", rule), number)
    pairs = zip(evidence.params, left, strict=True)
    stay = evidence.select(pairs, number - lost, active_magnitude)
    evidence = evidence._replace(masks=evidence.taken(stay), counts=lost)
    new, _ = grow.gradient.apply(evidence, ())
    return tuple(map(jnp.logical_or, stay, new)), state


#: What a ramp asks for is pruned by magnitude in one pool over all layers, of which
#: each keeps its largest weight. Then every layer exchanges the prune rate's fraction
#: of what it has left for the missing weights of largest absolute gradient.
within_layers = Rule(
    lambda params, masks: (), _exchange, needs=("gradient",), pooled=True, whole=True
)
