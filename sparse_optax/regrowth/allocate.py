"""Whole counts: how many weights each layer loses and gets back, in integers.

Floats that are rounded to counts differ in the last place from one mesh of devices
to the next, and the totals with them. Here every floor and every share is integer
arithmetic, on 64-bit pairs (``wide``).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax import wide


def _pair(x: jax.Array) -> wide.Pair:
    x = x.astype(jnp.uint32)
    return jnp.zeros_like(x), x


def _spread(pair: wide.Pair, shape: tuple[int, ...]) -> wide.Pair:
    return jnp.broadcast_to(pair[0], shape), jnp.broadcast_to(pair[1], shape)


def floor_fraction(rate: jax.Array, n: jax.Array) -> jax.Array:
    """floor(rate * n), exact for the float32 value of the rate.

    Args:
      rate: float32 in [0, 1], a scalar or one entry a layer.
      n: int32 counts, one entry a layer.

    Returns:
      int32 vector.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> n = jnp.array([9, 2**30 + 1])
      >>> regrowth.allocate.floor_fraction(jnp.float32(0.5), n).tolist()
      [4, 536870912]
    """
    return floor_fraction64(rate, _pair(n))[1].astype(jnp.int32)


def floor_fraction64(rate: jax.Array | float, n: wide.Pair) -> wide.Pair:
    """``floor_fraction`` of counts that are pairs of ``wide``, below 2^40.

    Args:
      rate: float32 in [0, 1], a scalar or one entry a count.
      n: The counts.

    Returns:
      A pair.

    Examples:
      >>> from sparse_optax import regrowth, wide
      >>> half = regrowth.allocate.floor_fraction64(0.5, wide.pair64(2**36 + 3))
      >>> wide.to_int(half) == 2**35 + 1
      True
    """
    rate = jnp.clip(jnp.asarray(rate, jnp.float32), 0.0, 1.0)
    bits = lax.bitcast_convert_type(rate, jnp.uint32)
    exponent = bits >> 23
    # rate = mantissa * 2**(exponent - 150); zero and subnormal rates move nothing.
    mantissa = jnp.where(exponent > 0, (bits & 0x7FFFFF) | 0x800000, 0)
    shift = jnp.minimum(150 - exponent.astype(jnp.int32), 63).astype(jnp.uint32)
    mantissa, shift = (
        jnp.broadcast_to(x.astype(jnp.uint32), n[0].shape) for x in (mantissa, shift)
    )
    one = jnp.ones_like(shift)
    power = (
        jnp.where(shift >= 32, one << (shift & 31), 0),
        jnp.where(shift < 32, one << (shift & 31), 0),
    )
    return wide.divmod64(wide.mul64(n, mantissa), power)[0]


def prune_counts(
    rate: jax.Array, active: jax.Array, sizes: jax.Array, shares: jax.Array
) -> jax.Array:
    """How many weights each layer loses: floor(p_i * nonzeros_i).

    A layer that is dense and still growing could not take back what it loses. So
    (edge case 2 of the sparse momentum paper), where a layer's sparsity is under
    0.2 and its contribution over 1 / L, p_i is the smaller of p and that sparsity.

    Args:
      rate: The prune rate p, float32 in [0, 1].
      active: int32 vector, active weights of each layer.
      sizes: int32 vector, all weights of each layer.
      shares: uint32 vector, each layer's contribution, not normalised.

    Returns:
      int32 vector.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> regrowth.allocate.prune_counts(
      ...     jnp.float32(0.5), jnp.array([90, 10]), jnp.array([100, 100]),
      ...     jnp.array([3, 1], jnp.uint32)).tolist()
      [9, 5]
    """
    counts = floor_fraction(rate, active)
    missing = sizes - active
    layers = jnp.full_like(sizes, len(sizes), dtype=jnp.uint32)
    dense = wide.less64(wide.mul32(missing, jnp.full_like(layers, 5)), _pair(sizes))
    total = wide.sum64(shares)
    growing = wide.less64(
        _spread(total, shares.shape),
        wide.mul32(shares, layers),
    )
    # floor(sparsity * nonzeros) with sparsity = missing / size.
    most, _ = wide.divmod64(wide.mul32(missing, active), _pair(sizes))
    capped = jnp.minimum(counts, most[1].astype(jnp.int32))
    return jnp.where(jnp.logical_and(dense, growing), capped, counts)


def as_shares(shares: jax.Array) -> jax.Array:
    """Shares as uint32: floats are quantised to 24 bits of the largest.

    Args:
      shares: Vector of non-negative numbers.

    Returns:
      uint32 vector.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> regrowth.allocate.as_shares(jnp.array([0.5, 1.0])).tolist()
      [8388608, 16777216]
    """
    if jnp.issubdtype(shares.dtype, jnp.integer):
        return jnp.maximum(shares, 0).astype(jnp.uint32)
    largest = jnp.max(shares, initial=0.0)
    scaled = jnp.clip(shares / jnp.where(largest > 0, largest, 1.0), 0.0, 1.0)
    return (scaled * 2**24).astype(jnp.uint32)


def signed_sum(counts: jax.Array) -> wide.Pair:
    """Sum of counts, some of which may be negative; 0 where it is negative.

    Args:
      counts: int32 vector.

    Returns:
      A pair of ``wide``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth, wide
      >>> wide.to_int(regrowth.allocate.signed_sum(jnp.array([5, -3, 4])))
      6
    """
    plus, minus = (
        wide.sum64(jnp.maximum(x, 0).astype(jnp.uint32)) for x in (counts, -counts)
    )
    return wide.sub64(plus, wide.min64(plus, minus))


def target_counts(
    excess: jax.Array | int, whole: Any, final: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Active weights of each layer on the way from dense to the final counts.

    ``t_i = c_i + floor(x * (n_i - c_i))`` with x = excess / whole, exactly: all at
    x = 1, the final ones at x = 0. A quotient of floats would not be the same in
    every program, and would miss the ends by a weight.

    Args:
      excess: uint32 scalar, at most ``whole``.
      whole: uint32 scalar, at least 1.
      final: c_i, int32 vector.
      sizes: n_i, int32 vector, all weights of each layer.

    Returns:
      int32 vector.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> final, sizes = jnp.array([10, 1]), jnp.array([100, 10])
      >>> for x in (2, 1, 0):
      ...     print(regrowth.allocate.target_counts(x, 2, final, sizes).tolist())
      [100, 10]
      [55, 5]
      [10, 1]
    """
    room = (sizes - final).astype(jnp.uint32)
    above, below = (jnp.full_like(room, jnp.uint32(x)) for x in (excess, whole))
    more, _ = wide.divmod64(wide.mul32(above, room), _pair(below))
    return final + more[1].astype(jnp.int32)


def _ranks(values: wide.Pair) -> jax.Array:
    """How many entries come before each: the larger ones, of equal ones the earlier."""
    high, low = values
    order = jnp.arange(len(high))
    if len(high) > 256:  # the units of a layer; its layers compile faster in pairs
        *_, place = lax.sort((~high, ~low, order), num_keys=3)
        return jnp.zeros_like(order).at[place].set(order)
    mine, theirs = (high[:, None], low[:, None]), (high[None, :], low[None, :])
    tied = jnp.logical_not(wide.less64(mine, theirs) | wide.less64(theirs, mine))
    ahead = wide.less64(mine, theirs) | (tied & (order[None, :] < order[:, None]))
    return jnp.sum(ahead, axis=1, dtype=jnp.int32)


def apportion(
    total: jax.Array | wide.Pair,
    shares: jax.Array,
    room: jax.Array,
    fallback: jax.Array,
    *,
    most: int = 2**32 - 1,
) -> jax.Array:
    """Splits a total over layers in proportion to shares, within each one's room.

    ``g_i = floor(total * share_i / sum(shares))``; what the floors leave over goes
    one each to the largest remainders, of equal ones to the earlier layer. What a
    layer has no room for (edge case 1 of the sparse momentum paper) is spread
    equally over the layers that have, again and again until all is placed; fewer
    than there are such layers go one each to the first of them.

    Args:
      total: int32 scalar or a pair of ``wide``, at most ``sum(room)``.
      shares: uint32 vector, one entry a layer.
      room: int32 vector, the free places of each layer.
      fallback: int32 vector, the split where all shares are zero.
      most: A bound of the total, below 2^63. Shares that are so large that their
        product with it would not fit 64 bits lose their last bits.

    Returns:
      int32 vector whose sum is exactly ``total``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> regrowth.allocate.apportion(
      ...     jnp.int32(10), jnp.array([1, 2, 3], jnp.uint32),
      ...     jnp.array([9, 9, 3]), jnp.array([0, 0, 0])).tolist()
      [3, 4, 3]
    """
    layers = len(shares)
    if not layers:
        return jnp.zeros(0, jnp.int32)
    total = total if isinstance(total, tuple) else wide.pair64(total)
    shares = jnp.where(jnp.any(shares > 0), shares, fallback.astype(jnp.uint32))
    longest = jnp.uint32(32) - lax.clz(jnp.max(shares))
    allowed = np.uint32(min(64 - most.bit_length(), 32))
    shares = shares >> jnp.where(longest > allowed, longest - allowed, 0)
    whole = _spread(wide.sum64(shares), (layers,))
    whole = wide.where64(whole[0] | whole[1] > 0, whole, _pair(jnp.ones_like(shares)))
    product = wide.mul64(_spread(total, (layers,)), shares)
    given, remainder = wide.divmod64(product, whole)
    rank = _ranks(remainder)
    _, left = wide.sub64(total, wide.sum64(given))  # fewer than there are layers
    given = wide.add64(given, _pair(rank < left.astype(jnp.int32)))
    placed = wide.min64(given, _pair(room))
    excess = wide.sub64(total, wide.sum64(placed))

    def spill(carry):
        given, excess = carry
        free = room - given
        open_layers = free > 0
        number = jnp.maximum(jnp.sum(open_layers, dtype=jnp.uint32), 1)
        each, _ = wide.divmod64(excess, wide.pair64(number))
        turn = jnp.cumsum(open_layers, dtype=jnp.uint32)
        first = jnp.logical_not(wide.less64(_spread(excess, (layers,)), _pair(turn)))
        some = (each[0] | each[1]) > 0
        offer = wide.where64(some, _spread(each, (layers,)), _pair(first))
        offer = wide.where64(open_layers, offer, _pair(jnp.zeros_like(turn)))
        taken = wide.min64(offer, _pair(free))[1]
        return given + taken.astype(jnp.int32), wide.sub64(excess, wide.sum64(taken))

    given, _ = lax.while_loop(
        lambda carry: (carry[1][0] | carry[1][1]) > 0,
        spill,
        (placed[1].astype(jnp.int32), excess),
    )
    return given
