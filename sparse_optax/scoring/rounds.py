"""Pruning in rounds, with new scores in each; trainings from earlier values."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.checks import ArgumentError
from sparse_optax.layers import Layers, PyTree, is_hole, leaf_names
from sparse_optax.masks.make import Ranking, highest
from sparse_optax.scoring.batches import check_finite
from sparse_optax.selection.leaf import wide as as_wide


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


def set_back(params: PyTree, initial: PyTree) -> PyTree:
    """Earlier values, paired by name, in the types of ``params``."""
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    values = jax.tree.leaves(initial, is_leaf=is_hole)
    kinds = jnp.complexfloating, jnp.inexact
    early, back = dict(zip(leaf_names(initial), values, strict=True)), []
    for name, x in zip(leaf_names(params), flat, strict=True):
        if is_hole(x):
            back.append(x)
            continue
        if name not in early or jnp.shape(early[name]) != jnp.shape(x):
            raise ArgumentError(
                f"`initial` has no {name!r} of shape {jnp.shape(x)}; it has "
                f"{sorted(early)}. Pass earlier values of these parameters."
            )
        old, new = jnp.asarray(early[name]), jnp.asarray(x).dtype
        if any(
            jnp.issubdtype(old.dtype, k) and not jnp.issubdtype(new, k) for k in kinds
        ):
            raise ArgumentError(
                f"`initial` has dtype {old.dtype} for {name!r} and `params` {new}, "
                "which must be able to hold it. Pass earlier values of these "
                "parameters, or give `params` that type."
            )
        back.append(jnp.asarray(old, new))
    return jax.tree.unflatten(structure, back)


def sizes_after(trained: Any, initial: PyTree, layers: Layers) -> list[jax.Array]:
    """The magnitudes of what a training from ``initial`` gave back, checked."""
    cure = "Give back the trained parameters alone."
    wanted, found = leaf_names(initial), leaf_names(trained)
    if found != wanted:
        raise ArgumentError(
            f"`train` returned {type(trained).__name__} with the leaves {found}; they "
            f"must be those of `initial`, {wanted}. {cure}"
        )
    weights = layers.pick(trained)
    for leaf, x in zip(layers.leaves, weights, strict=True):
        if getattr(x, "shape", None) != leaf.shape:
            raise ArgumentError(
                f"`train` returned {leaf.name!r} of shape {jnp.shape(x)}; it must be "
                f"{leaf.shape}, as in `initial`. {cure}"
            )
    sizes = [jnp.abs(w).astype(as_wide(w.dtype)) for w in weights]
    cure = "Check `train`: it may have diverged."
    check_finite(sizes, layers.names, cure, what="trained weights")
    return sizes


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
