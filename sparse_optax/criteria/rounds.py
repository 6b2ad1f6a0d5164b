"""Pruning in rounds: a little, score what is left, a little more."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import mask_trees, patterns, scored_masks
from sparse_optax.leaves import PyTree
from sparse_optax.scored_masks import Ranking


def in_rounds(
    wanted: Ranking,
    weights: Sequence[jax.Array],
    score: Callable[[list[jax.Array], int], Sequence[jax.Array]],
    rounds: int,
) -> PyTree:
    """Keeps what scores highest, round after round; what is pruned never comes back.

    Round r of n keeps the share d^(r/n) of all weights, d the final one.

    Args:
      wanted: What ``scored_masks.ranking`` gave.
      weights: The leaves that take part, for their shapes.
      score: ``score(kept, r)`` gives an array of scores a leaf, none negative, for the
        masks ``kept`` of the round before.
      rounds: n, at least 1.

    Returns:
      A mask tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import scored_masks
      >>> from sparse_optax.criteria import rounds
      >>> w = jnp.array([[4.0, 2.0, 1.0, 3.0]])
      >>> def score(kept, r):  # the second round would rather have the others
      ...     return [w if r == 1 else 1 / w]
      >>> wanted = scored_masks.ranking({"w": w}, 0.25)
      >>> rounds.in_rounds(wanted, [w], score, 2)["w"].tolist()
      [[False, False, False, True]]
    """
    index = wanted.plan.index
    kept = [jnp.ones_like(w, dtype=bool) for w in weights]
    masks = mask_trees.rebuild(wanted.structure, wanted.size, index, kept)
    for r in range(1, rounds + 1) if kept else ():
        scores = score(kept, r)
        now = on_the_way(wanted, weights, Fraction(r, rounds))
        masks = scored_masks.highest(now, [(s,) for s in scores], within=kept)
        flat = mask_trees.flatten(masks)[0]
        kept = [flat[i] for i in index]
    return masks


def floor_power(whole: int, final: int, way: Fraction) -> int:
    """``floor(whole * (final / whole) ** way)`` in whole numbers.

    A power of floats is a hair below the number that it should be, now and then, and
    its floor one short.

    Args:
      whole: All, at least 0.
      final: What is left in the end, from 0 to ``whole``.
      way: In (0, 1).

    Returns:
      A Python integer.

    Examples:
      >>> from fractions import Fraction
      >>> from sparse_optax.criteria import rounds
      >>> rounds.floor_power(1024, 1, Fraction(2, 10))
      256
    """
    r, n = way.numerator, way.denominator
    power = whole ** (n - r) * final**r  # the n-th power of what is asked for
    count = int(whole * (final / max(whole, 1)) ** float(way))
    while count**n > power:
        count -= 1
    while (count + 1) ** n <= power:
        count += 1
    return count


def on_the_way(wanted: Ranking, weights: Sequence[Any], way: Fraction) -> Ranking:
    """A ranking that keeps more: all of it times (final share) ** way.

    Args:
      wanted: What ``ranking`` gave.
      weights: The leaves that take part, for their shapes.
      way: How much of the way is behind, in (0, 1]; 1 gives ``wanted`` itself.

    Returns:
      The ranking with its limit raised, never below the end; a whole number unless
      costs are fractions.

    Examples:
      >>> from fractions import Fraction
      >>> import jax.numpy as jnp
      >>> from sparse_optax import scored_masks
      >>> from sparse_optax.criteria import rounds
      >>> w = jnp.zeros((10, 10))
      >>> wanted = scored_masks.ranking({"w": w}, 0.01)
      >>> rounds.on_the_way(wanted, [w], Fraction(1, 2)).limit, wanted.limit
      (10, 1)
    """
    if way == 1:
        return wanted
    exponent = float(way)
    sizes = [math.prod(w.shape) for w in weights]
    if (pattern := wanted.pattern) is not None:
        columns = zip(weights, wanted.plan.axes, strict=True)
        sizes = [
            math.prod(patterns.view_shape(pattern, w.shape, a)) for w, a in columns
        ]

    def between(whole, final):
        return np.vectorize(lambda k: floor_power(whole, int(k), way))(final)

    if isinstance(wanted.limit, list):
        # A count may be one number for each of several layers.
        pairs = zip(sizes, map(np.asarray, wanted.limit), strict=True)
        limit = [between(n // max(k.size, 1), k) for n, k in pairs]
    elif pattern is not None and pattern.m:
        limit = int(between(pattern.m, np.asarray(wanted.limit)))
    elif wanted.costs is None:
        limit = int(between(sum(sizes), np.asarray(wanted.limit)))
    else:
        whole = sum(n * Fraction(c) for n, c in zip(sizes, wanted.costs, strict=True))
        limit = whole * Fraction(float(wanted.limit / whole) ** exponent)
        limit = max(limit, Fraction(wanted.limit))
        # Whole costs are exact; a cost in seconds stays a fraction.
        if all(Fraction(c).denominator == 1 for c in wanted.costs):
            limit = int(limit)
    return wanted._replace(limit=limit)
