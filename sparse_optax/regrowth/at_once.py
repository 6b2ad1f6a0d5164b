"""Rules that find the new masks in one search, where prune and growth rank alike.

With hidden weights, ``prune.outranked`` and ``grow.magnitude`` leave the ``target``
largest weights of each layer. Their methods choose at every update, and two searches
for one answer, each through the whole range of floats, cost 30 times SGD's update. Here
it is one search, which starts where the last one ended.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_optax import selection
from sparse_optax.layers import layer_sizes
from sparse_optax.masks.make import follow_layers
from sparse_optax.regrowth.rules import Evidence, Rule, coin

Masks = tuple[jax.Array, ...]
Found = tuple[Masks, selection.Near]


# Cached, as is the score: both are static arguments of compiled functions.
@functools.lru_cache
def outranked_at_once(
    prune: Rule,
    grow: Rule,
    axes: tuple[int | None, ...],
    moving: bool,
    *,
    ratio: float,
    gamma: float,
    power: float,
) -> Rule:
    """One rule for ``prune.outranked(ratio, ...)`` and ``grow.magnitude``: its masks
    are those of the two. ``axes`` are those of the layers; ``moving`` says that there
    is a ramp.
    """
    score = _ranked(ratio)

    def init(params: Masks, masks: Masks) -> selection.Near:
        del masks
        pools = layer_sizes([x.shape for x in params], axes)
        return selection.nowhere(params, len(pools))

    def by_two(evidence: Evidence) -> Masks:
        kept, _ = prune.apply(evidence, ())
        counts = evidence.target - evidence.count(kept)
        added, _ = grow.apply(evidence._replace(masks=kept, counts=counts), ())
        return tuple(map(jnp.logical_or, kept, added))

    def apply(evidence: Evidence, near: selection.Near) -> Found:
        target = evidence.need("target", "prune.outranked")
        before = evidence.masks

        def by_one() -> tuple[Masks, selection.Near, jax.Array]:
            arrays = list(zip(evidence.params, before, strict=True))
            chosen, after, equal = follow_layers(
                arrays, target, evidence.layer_axes, score, near
            )
            # Of equal scores, growth takes the largest weight and not the first: the
            # factor may round several weights to one number.
            return tuple(chosen), after, equal if ratio < 1 else jnp.zeros([], bool)

        def as_before() -> tuple[Masks, selection.Near, jax.Array]:
            moves = jnp.any(target != evidence.active) if moving else False
            return before, near, jnp.asarray(moves)

        always = not (gamma and power)
        if always:
            masks, after, again = by_one()
        else:
            heads = coin(evidence.step, gamma, power)
            masks, after, again = lax.cond(heads, by_one, as_before)
        if ratio < 1 or (moving and not always):
            masks = lax.cond(again, lambda: by_two(evidence), lambda: masks)
        return masks, after

    return Rule(init, apply, whole=True)


@functools.lru_cache
def _ranked(ratio: float) -> Any:
    """The score |w| of active weights, reduced by a factor for missing ones."""

    def score(weight: jax.Array, mask: jax.Array) -> jax.Array:
        size = jnp.abs(weight)
        return size if ratio == 1.0 else jnp.where(mask, size, ratio * size)

    return score
