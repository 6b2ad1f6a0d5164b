"""The gate of GSM: how many weights pass at a step, and which.

The scores are |g * w|, of 16-bit floats in float32; all weights that take part are one
pool.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import budgets, masks, patterns, selection, wide
from sparse_optax.leaves import PyTree, is_hole
from sparse_optax.patterns import Pattern
from sparse_optax.selection import passes
from sparse_optax.selection.tally import all_true, tally

# Counts in the state are int32.
_MOST = np.uint32(2**31 - 1)


def saliency(gradient: jax.Array, weight: jax.Array) -> jax.Array:
    """First-order Taylor saliency T = |g * w|: the loss change if w were removed.

    Args:
      gradient: g, of any shape.
      weight: w, of the same shape.

    Returns:
      An array of that shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.gsm import saliency
      >>> saliency(jnp.array([-2.0]), jnp.array([3.0])).tolist()
      [6.0]
    """
    return jnp.abs(gradient * weight)


def _wide_saliency(gradient: jax.Array, weight: jax.Array) -> jax.Array:
    """As the search computes it: halves in float32, float64 as it is."""
    return passes.scores(saliency, (gradient, weight))


def passing(
    pairs: list[tuple[jax.Array, jax.Array]],
    quota: tuple[Any, Any],
    size: int,
    ties: str,
    guess: jax.Array,
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """The Q most salient weights, without those of saliency zero.

    Args:
      pairs: For each leaf its gradient and its weights.
      quota: Q, or a budget, and what a weight of each leaf costs or None.
      size: Number of weights of all leaves.
      ties: ``"exact"``, or ``"paper"`` for all scores not below the Q-th largest.
      guess: A saliency near the threshold; any value is safe.

    Returns:
      ``(masks, threshold, passed)``: the last an int32 count for each leaf.

    Raises:
      ValueError: If ``selection`` cannot take the arrays or the quota.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import gating
      >>> pair = jnp.array([1.0, -3.0, 0.0]), jnp.ones(3)
      >>> masks, _, passed = gating.passing([pair], (2, None), 3, "exact", 0.0)
      >>> masks[0].tolist(), int(passed[0])
      ([True, True, False], 2)
    """
    k, costs = quota
    if isinstance(k, int) and k >= size and costs is None:
        everything = [jnp.ones_like(w, dtype=bool) for _, w in pairs]
        sizes = [np.uint32(min(w.size, _MOST)) for _, w in pairs]
        return everything, guess, numbers(sizes)
    if ties == "exact":
        # The counts come with the search: the mask itself is never stored, but made
        # again where the gradient is read.
        chosen = selection.select(
            pairs,
            k,
            score=saliency,
            costs=costs,
            guess=guess,
            exact_threshold=False,
            skip_zeros=True,
        )
        threshold = chosen.threshold.astype(jnp.float32)
        return chosen.masks, threshold, numbers(chosen.counts)
    bound = selection.kth_largest(pairs, k, score=saliency, costs=costs, guess=guess)
    everything = False
    if not isinstance(k, int):
        k = k if isinstance(k, tuple) else wide.pair64(k)
        everything = jnp.logical_not(wide.less64(k, wide.pair64(size)))
    passing = []
    for g, w in pairs:
        score = _wide_saliency(g, w)
        # A NaN saliency passes, and no comparison finds it.
        over = jnp.logical_or(score >= bound, jnp.isnan(score))
        alive = jnp.logical_or(score != 0, everything)
        passing.append(jnp.logical_and(over, alive))
    return passing, bound.astype(jnp.float32), counted([(m,) for m in passing])


def passing_units(
    pairs: list[tuple[jax.Array, jax.Array]],
    quota: tuple[Any, Any],
    pattern: Pattern,
    axes: Sequence[int | None],
    guess: jax.Array,
    score: Any = saliency,
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """The units of largest summed saliency, whole; those of zero never pass.

    Args:
      pairs: For each leaf the arguments of the score.
      quota: Q, or a budget, and what a weight of each leaf costs or None.
      pattern: Which weights stand and fall together; of N:M the groups decide alone,
        and the quota is not read.
      axes: For each leaf the stacked axis, or None.
      guess: A threshold near that of the units; any value is safe.
      score: The saliency, or another score that is never negative.

    Returns:
      ``(masks, threshold, passed)`` as ``passing``; the threshold is one of units.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import gating, patterns
      >>> pair = jnp.array([[1.0, -3.0], [2.0, 1.0]]), jnp.ones((2, 2))
      >>> masks, _, passed = gating.passing_units(
      ...     [pair], (2, None), patterns.output_units(), [None], 0.0)
      >>> masks[0].tolist(), int(passed[0])
      ([[False, True], [False, True]], 2)
    """
    shapes = [pair[0].shape for pair in pairs]
    scores = [passes.scores(score, pair) for pair in pairs]
    columns = list(zip(scores, axes, strict=True))
    units = [patterns.view(pattern, x, axis) for x, axis in columns]
    if pattern.m:
        kept = [
            jnp.logical_and(
                selection.top_of_rows([x], pattern.n),
                True if pattern.n == pattern.m else x != 0,
            )
            for x in units
        ]
        threshold = guess
    else:
        k, costs = quota
        chosen = selection.select(
            units,
            k,
            costs=patterns.unit_costs(pattern, shapes, axes, costs),
            guess=guess,
            exact_threshold=False,
            skip_zeros=True,
        )
        kept, threshold = chosen.masks, chosen.threshold.astype(jnp.float32)
    masks = [
        patterns.spread(pattern, m, shape, axis)
        for m, shape, axis in zip(kept, shapes, axes, strict=True)
    ]
    return masks, threshold, counted([(m,) for m in masks])


def counted(leaves: list[tuple[jax.Array, ...]]) -> list[jax.Array]:
    """How many entries are True in all masks of each leaf, on any mesh.

    Args:
      leaves: For each leaf one or more boolean arrays of its shape.

    Returns:
      int32 scalars.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import gating
      >>> both = jnp.array([True, True, False]), jnp.array([True, False, True])
      >>> [int(n) for n in gating.counted([both, both[:1]])]
      [1, 2]
    """
    (counts,) = tally(leaves, all_true, split=[False] * len(leaves))
    return numbers([counts[i] for i in range(len(leaves))])


def check_groups(groups: Any, density: Any, ties: str, caller: str) -> None:
    """Raises where density, ties and groups of GSM do not go together.

    Args:
      groups: A pattern, or None.
      density: The density, or None.
      ties: How ties are broken.
      caller: The name that the error starts with.

    Raises:
      ValueError: If they do not fit.

    Examples:
      >>> from sparse_optax import gating, patterns
      >>> gating.check_groups(patterns.n_m(2, 4), None, "exact", "doc")
    """
    if groups is not None and not isinstance(groups, Pattern):
        raise ValueError(
            f"{caller}: `groups` must be one of sparse_optax.patterns; got {groups!r}. "
            "Pass patterns.blocks(4, 4) or patterns.n_m(2, 4)."
        )
    if groups is None or not groups.m:
        budgets.check_static(density, caller)
    elif density is not None:
        raise ValueError(
            f"{caller}: `density` must be left out with {groups.name}, which is the "
            f"density; got {density!r}. Leave out one of the two."
        )
    if groups is not None and ties != "exact":
        raise ValueError(
            f"{caller}: `ties` must be 'exact' with `groups`; got {ties!r}. Leave it "
            "out."
        )


def numbers(counts: list[Any]) -> list[jax.Array]:
    """Counts per leaf as int32, at most 2^31 - 1; several of a leaf are summed.

    Args:
      counts: uint32, a scalar for each leaf, or several numbers to sum.

    Returns:
      int32 scalars.

    Examples:
      >>> import numpy as np
      >>> from sparse_optax import gating
      >>> [int(n) for n in gating.numbers([np.uint32([3, 4]), np.uint32(2**31)])]
      [7, 2147483647]
    """
    pairs = [wide.sum64(jnp.asarray(n)) for n in counts]
    return [
        jnp.where(high > 0, _MOST, jnp.minimum(low, _MOST)).astype(jnp.int32)
        for high, low in pairs
    ]


def quota(
    density: Any,
    count: jax.Array,
    params: PyTree,
    where: PyTree,
    size: int,
    caller: str,
) -> tuple[Any, Any]:
    """How many weights pass, or what they may cost.

    Args:
      density: A fraction or a budget, a traced fraction or count, or a schedule.
      count: Number of finished updates, for a schedule.
      params: The parameters.
      where: For each leaf whether it takes part.
      size: Number of weights that take part.
      caller: The name that errors start with.

    Returns:
      ``(k, costs)`` for ``selection``: k a Python int where it is static, an integer
      scalar or a pair of `wide`; costs None, or one for each leaf.

    Raises:
      ValueError: If the density or the budget does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import gating
      >>> params, where = {"w": jnp.ones((10, 10))}, {"w": True}
      >>> gating.quota(0.29, jnp.int32(0), params, where, 100, "doc")
      (29, None)
    """
    if callable(density):
        density = density(count)
    if isinstance(density, (jax.Array, np.ndarray, np.generic)):
        density = jnp.asarray(density)
        if jnp.issubdtype(density.dtype, jnp.integer):
            return wide.min64(wide.pair64(density), wide.pair64(size)), None
        # Rounded to the nearest float32 before the floor, so that 0.29 of 100 is 29.
        k = jnp.floor(density.astype(jnp.float32) * np.float32(size))
        return wide.from_float(jnp.clip(k, 0, np.float32(size))), None
    pool = budgets.pool(density, params, where=where, caller=caller)
    costs = pool.costs
    if costs is not None:
        costs = [c for c in masks.flatten(costs)[0] if not is_hole(c)]
    return pool.budget, costs
