"""The gate of GSM: how many weights pass at a step, and which.

The scores are |g * w|, in float32 for 16-bit floats, ranked in one pool.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import checks, selection
from sparse_optax.budgets.resolve import (
    is_number,
    is_schedule,
    pool_of,
    unit_counts,
)
from sparse_optax.layers import Layers, PyTree
from sparse_optax.masks.make import top_of_layers
from sparse_optax.selection import uint64
from sparse_optax.selection.leaf import scores
from sparse_optax.selection.tally import all_true, tally

# Counts in the state are int32.
_MOST = np.uint32(2**31 - 1)


def saliency(gradient: jax.Array, weight: jax.Array) -> jax.Array:
    """First-order Taylor saliency T = |g * w|: the loss change if w were removed."""
    return jnp.abs(gradient * weight)


class Passing(NamedTuple):
    """Which weights pass."""

    masks: list[jax.Array]  # a boolean array per leaf
    threshold: jax.Array  # a score near which the next search may start
    passed: list[jax.Array]  # how many pass, per leaf, int32


class Quota(NamedTuple):
    """How many weights pass: Q, or a limit on their total cost."""

    # A Python int if static, an integer scalar, a pair of `uint64`, or None if the
    # pattern fixes it.
    k: Any
    costs: list[Any] | None = None  # cost of one weight of each leaf


def check_first(density: Any, params: PyTree) -> None:
    """Raises unless the first value of a schedule is a fraction or a count, or 0, which
    lets nothing pass.
    """
    if not is_schedule(density, params):
        return
    first = checks.at_first("density", density)
    cure = "Give a fraction such as 0.05, or a number of weights as an integer."
    if isinstance(first, int) and not isinstance(first, bool):
        checks.whole("density(0)", first, 0, cure=cure)
    else:
        checks.number("density(0)", first, 0, 1, cure=cure)


def quota_of(density: Any, count: jax.Array, layers: Layers, params: PyTree) -> Quota:
    """The quota of a fraction, a budget, a traced fraction or count, or a schedule."""
    if layers.pattern.density is not None:
        return Quota(None)
    size = int(layers.sizes.sum())
    if is_schedule(density, params):
        density = checks.scalar("density", density(count))
        if isinstance(density, int):  # a number of weights, as an integer of JAX is
            return Quota(min(density, size))
    elif is_number(density) and not isinstance(density, jax.Array):
        return Quota(*pool_of(density, layers, params))
    if isinstance(density, (jax.Array, np.ndarray, np.generic)):
        density = jnp.asarray(density)
        if jnp.issubdtype(density.dtype, jnp.integer):
            return Quota(uint64.min64(uint64.pair64(density), uint64.pair64(size)))
        # Rounded to the nearest float32 before the floor, so that 0.29 of 100 is 29.
        k = jnp.floor(density.astype(jnp.float32) * np.float32(size))
        return Quota(uint64.from_float(jnp.clip(k, 0, np.float32(size))))
    return Quota(*pool_of(density, layers, params))


def passing(
    arrays: Sequence[tuple[jax.Array, ...]],
    quota: Quota,
    layers: Layers,
    guess: jax.Array | None,
    score: Callable[..., jax.Array] = saliency,
    skip_zeros: bool = True,
) -> Passing:
    """The units of highest score within the quota; a score of zero never passes.
    ``guess`` is a score near the threshold; any value is safe. Scores are not negative.
    """
    size = int(layers.sizes.sum())
    if isinstance(quota.k, int) and quota.k >= size and quota.costs is None:
        everything = [jnp.ones_like(xs[0], dtype=bool) for xs in arrays]
        sizes = [np.uint32(min(xs[0].size, _MOST)) for xs in arrays]
        return Passing(everything, _or_zero(guess), clipped(sizes))
    units, ranked = layers.operands(arrays, score)
    if quota.k is None:
        counts = unit_counts([], layers)
        kept = top_of_layers(units, counts, layers.units.axes, ranked)
        if skip_zeros and layers.pattern.density != 1:
            alive = [scores(ranked, xs) != 0 for xs in units]
            kept = list(map(jnp.logical_and, kept, alive))
        masks = list(layers.spread(kept, [xs[0] for xs in arrays]))
        return Passing(masks, _or_zero(guess), counted([(m,) for m in masks]))
    # The search gives the counts. A mask of weights is never stored, but recomputed
    # where the gradient is read.
    chosen = selection.select(
        list(units) if ranked else [x for (x,) in units],
        quota.k,
        score=ranked,
        costs=layers.costs(quota.costs),
        guess=guess,
        exact_threshold=False,
        skip_zeros=skip_zeros,
    )
    threshold = chosen.threshold.astype(jnp.float32)
    passed = clipped(chosen.counts, layers.unit_sizes)
    masks = layers.spread(chosen.masks, [xs[0] for xs in arrays])
    return Passing(list(masks), threshold, passed)


def passing_ties(
    pairs: Sequence[tuple[jax.Array, jax.Array]],
    quota: Quota,
    layers: Layers,
    guess: jax.Array,
) -> Passing:
    """All saliencies not below the Q-th largest: with ties more than Q."""
    k, size = quota.k, int(layers.sizes.sum())
    if isinstance(k, int) and k >= size and quota.costs is None:
        return passing(pairs, quota, layers, guess)
    bound = selection.kth_largest(
        list(pairs), k, score=saliency, costs=quota.costs, guess=guess
    )
    everything: Any = False
    if not isinstance(k, int):
        k = k if isinstance(k, tuple) else uint64.pair64(k)
        everything = jnp.logical_not(uint64.less64(k, uint64.pair64(size)))
    masks = []
    for pair in pairs:
        score = scores(saliency, pair)
        # NaN saliencies pass too; comparisons with them are False.
        over = jnp.logical_or(score >= bound, jnp.isnan(score))
        alive = jnp.logical_or(score != 0, everything)
        masks.append(jnp.logical_and(over, alive))
    return Passing(masks, bound.astype(jnp.float32), counted([(m,) for m in masks]))


def _or_zero(guess: jax.Array | None) -> jax.Array:
    return jnp.zeros([], jnp.float32) if guess is None else guess


def counted(leaves: Sequence[tuple[jax.Array, ...]]) -> list[jax.Array]:
    """How many entries are True in all masks of each leaf, int32, on any mesh."""
    (counts,) = tally(leaves, all_true, split=[False] * len(leaves))
    return clipped([counts[i] for i in range(len(leaves))])


def clipped(
    counts: Sequence[Any], sizes: Sequence[int] | None = None
) -> list[jax.Array]:
    """Counts per leaf as int32, at most 2^31 - 1; several counts of a leaf are summed.
    ``sizes`` gives the number of weights per counted unit.
    """
    found = []
    for n, size in zip(counts, sizes or [1] * len(counts), strict=True):
        high, low = uint64.sum64(jnp.asarray(n))
        if size > 1:
            high, low = uint64.mul64((high, low), jnp.uint32(size))
        low = jnp.minimum(low, _MOST)
        found.append(jnp.where(high > 0, _MOST, low).astype(jnp.int32))
    return found
