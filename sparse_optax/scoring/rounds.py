"""Pruning in rounds, with new scores in each."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.layers import PyTree
from sparse_optax.masks.make import Ranking, highest


def in_rounds(
    wanted: Ranking,
    weights: Sequence[jax.Array],
    score: Callable[[list[jax.Array], int], Sequence[jax.Array]],
    rounds: int,
) -> PyTree:
    """Keeps the highest scores, round by round; pruned weights never come back.

    Round r of n keeps the fraction d^(r/n) of all weights, d the final one.
    ``score(kept, r)`` gives non-negative scores per leaf, for the last masks.
    """
    kept = [jnp.ones_like(w, dtype=bool) for w in weights]
    masks = wanted.layers.rebuild(kept)
    for r in range(1, rounds + 1) if kept else ():
        scores = score(kept, r)
        now = on_the_way(wanted, Fraction(r, rounds))
        masks = highest(now, [(s,) for s in scores], within=kept)
        kept = list(wanted.layers.pick(masks))
    return masks


def floor_power(whole: int, final: int, way: Fraction) -> int:
    """``floor(whole * (final / whole) ** way)`` in whole numbers, ``way`` in (0, 1). A
    float power can fall just below a whole number, and its floor is then one short.
    """
    r, n = way.numerator, way.denominator
    power = whole ** (n - r) * final**r  # the n-th power of what is asked for
    count = int(whole * (final / max(whole, 1)) ** float(way))
    while count**n > power:
        count -= 1
    while (count + 1) ** n <= power:
        count += 1
    return count


def on_the_way(wanted: Ranking, way: Fraction) -> Ranking:
    """A ranking that keeps more: all times (final fraction) ** way, 0 < way <= 1."""
    if way == 1:
        return wanted
    units = wanted.layers.units
    sizes = [math.prod(leaf.shape) for leaf in units.leaves]

    def between(whole, final):
        # Groups of N:M are many layers with the same count.
        values, places = np.unique(final, return_inverse=True)
        powers = [floor_power(whole, int(k), way) for k in values]
        return np.asarray(powers, np.int64)[places].reshape(np.shape(final))

    if isinstance(wanted.limit, list):
        # A count may be one number for several layers.
        pairs = zip(units.leaves, wanted.limit, strict=True)
        limit = [between(leaf.size, np.asarray(k)) for leaf, k in pairs]
    elif wanted.costs is None:
        limit = int(between(sum(sizes), np.asarray(wanted.limit)))
    else:
        whole = sum(n * Fraction(c) for n, c in zip(sizes, wanted.costs, strict=True))
        limit = whole * Fraction(float(wanted.limit / whole) ** float(way))
        limit = max(limit, Fraction(wanted.limit))
        # Whole costs are exact; a cost in seconds stays a fraction.
        if all(Fraction(c).denominator == 1 for c in wanted.costs):
            limit = int(limit)
    return wanted._replace(limit=limit)
