"""Adapts the rules to a pattern, so that the number of weights is kept."""

import functools
from typing import Any

import jax.numpy as jnp

from sparse_optax.checks import ArgumentError
from sparse_optax.layers import Layers
from sparse_optax.regrowth import allocate, redistribute
from sparse_optax.regrowth import grow as grow_rules
from sparse_optax.regrowth.rules import Rule, layer_counts

Rules = tuple[Rule, Rule, Rule]


# Cached: rules are static arguments of the compiled cycle.
@functools.lru_cache
def rules_under(
    layers: Layers, rules: Rules, moving: bool = False, hidden: bool = False
) -> Rules:
    """Rules that keep the number of weights; ``moving`` says that there is a ramp. If
    units differ in size, and with N:M, nothing is redistributed. With ``hidden``
    weights one rule may find the masks at once.
    """
    prune, shares, grow = rules
    pattern, fixed = layers.pattern, layers.pattern.density is not None
    alike = grow is grow_rules.magnitude and shares is redistribute.none
    if hidden and not fixed and alike and prune.at_once is not None:
        whole = prune.at_once(prune, grow, layers.units.axes, moving)
        return whole, shares, grow
    if len(set(layers.unit_sizes)) < 2 and not fixed:
        return rules
    if prune.pooled:
        raise ArgumentError(
            f"`prune` ranks all layers as one pool, and with {pattern.name} the number "
            "of weights would not stay: units of its layers differ in size, or each "
            "group has its own number. Use prune.magnitude."
        )
    if fixed and (prune.exact or prune.by_share):
        prune = _of_whole_layers(prune, layers, moving and prune.exact)
    if not grow.exact:
        raise ArgumentError(
            f"`grow` must place exactly `counts` weights in each layer with "
            f"{pattern.name}, and does not say that it does. Use grow.random, or mark "
            "the rule: stateless(f, exact=True)."
        )
    return prune, redistribute.none, grow


def _of_whole_layers(prune: Rule, layers: Layers, moving: bool) -> Rule:
    """A prune rule that takes its share of whole layers, not of each group of N:M. The
    share of a group would be rounded down, mostly to zero. With a ramp, each
    group is first pruned to its own target.
    """
    grids = [x.pattern.grid(x.shape, x.axis) for x in layers.leaves]
    axes = tuple(axis for _, axis in grids)

    def fold(arrays: Any) -> Any:
        if arrays is None:
            return None
        return tuple(x.reshape(s) for x, (s, _) in zip(arrays, grids, strict=True))

    def init(params, masks):
        return prune.init(fold(params), fold(masks))

    def apply(evidence, state):
        if moving:
            above = jnp.maximum(evidence.active - evidence.target, 0)
            left, state = prune.apply(evidence._replace(counts=above), state)
            evidence = evidence._replace(masks=left)
        masks = fold(evidence.masks)
        active = layer_counts(masks, axes)
        stay, state = prune.apply(
            evidence._replace(
                params=fold(evidence.params),
                masks=masks,
                before=masks,
                gradient=fold(evidence.gradient),
                momentum=fold(evidence.momentum),
                counts=allocate.floor_fraction(evidence.rate, active),
                active=active,
                target=active,
                axes=axes,
            ),
            state,
        )
        pairs = zip(stay, evidence.masks, strict=True)
        return tuple(m.reshape(x.shape) for m, x in pairs), state

    return Rule(init, apply, needs=prune.needs, covers=moving)
