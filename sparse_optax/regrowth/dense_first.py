"""A dense start: all weights train at first, then one cut leaves the budget."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.layers import Layers
from sparse_optax.regrowth import prune as prune_rules
from sparse_optax.regrowth import redistribute
from sparse_optax.regrowth.cycle import Cycle, cycle, init_rules
from sparse_optax.regrowth.rules import Evidence, Rule, stateless
from sparse_optax.regrowth.under_pattern import Rules, rules_under

# A cut grows nothing; a rule that selects would cost compilation.
_NOTHING = stateless(
    lambda evidence: tuple(jnp.zeros_like(m) for m in evidence.masks), exact=True
)


def cut_rules(prune: Rule, layers: Layers) -> Rules:
    """The rules of the cut: by magnitude where the prune rule may miss a target."""
    if prune.pooled:
        prune = prune_rules.global_magnitude
    elif not prune.exact:
        prune = prune_rules.magnitude
    return rules_under(layers, (prune, redistribute.none, _NOTHING), True)


def is_dense(evidence: Evidence) -> jax.Array:
    """Whether every weight that may be active is, so that the cut is still to come."""
    return jnp.all(evidence.count(evidence.masks) >= evidence.places)


def cut(
    evidence: Evidence,
    rules: Rules,
    later: Rules,
    final: np.ndarray,
    states: tuple[Any, Any, Any],
    enabled: Any,
) -> Cycle:
    """Prunes each layer to its final count. The rules of ``later`` cycles start anew,
    as if the method began with this network.
    """
    prune, shares, grow = rules
    target = jnp.minimum(jnp.asarray(final), evidence.places)
    result = cycle(
        evidence,
        prune=prune,
        redistribute=shares,
        grow=grow,
        prune_rate=0.0,
        target=target,
        enabled=enabled,
    )
    pairs = zip(evidence.params, result.masks, strict=True)
    weights = tuple(jnp.where(m, w, jnp.zeros((), w.dtype)) for w, m in pairs)
    fresh = init_rules(later, weights, result.masks)
    done = jnp.logical_and(result.ok, enabled)
    kept = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, states)
    return result._replace(states=kept)
