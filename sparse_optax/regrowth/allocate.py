"""Counts: how many weights each layer loses and grows, in integer arithmetic.

Floats rounded to counts would differ in the last place between meshes of devices, and
the totals with them. So every floor and share is computed on 64-bit pairs (``uint64``).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.selection import uint64


def _pair(x: jax.Array) -> uint64.Pair:
    x = x.astype(jnp.uint32)
    return jnp.zeros_like(x), x


def _spread(pair: uint64.Pair, shape: tuple[int, ...]) -> uint64.Pair:
    return jnp.broadcast_to(pair[0], shape), jnp.broadcast_to(pair[1], shape)


def floor_fraction(rate: jax.Array, n: jax.Array) -> jax.Array:
    """floor(rate * n), exact for the float32 value of the rate."""
    return floor_fraction64(rate, _pair(n))[1].astype(jnp.int32)


def floor_fraction64(rate: jax.Array | float, n: uint64.Pair) -> uint64.Pair:
    """``floor_fraction`` of counts that are pairs of ``uint64``, below 2^40."""
    rate = jnp.clip(jnp.asarray(rate, jnp.float32), 0.0, 1.0)
    bits = lax.bitcast_convert_type(rate, jnp.uint32)
    exponent = bits >> 23
    # rate = mantissa * 2**(exponent - 150); zero and subnormal rates give 0.
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
    return uint64.divmod64(uint64.mul64(n, mantissa), power)[0]


def prune_counts(
    rate: jax.Array, active: jax.Array, sizes: jax.Array, shares: jax.Array
) -> jax.Array:
    """How many weights each layer loses: floor(p_i * nonzeros_i).

    A layer that is dense and still growing could not grow back what it loses (edge case
    2 of the sparse momentum paper). So if a layer's sparsity is under 0.2 and its share
    over 1 / L, p_i is the smaller of p and that sparsity.
    """
    counts = floor_fraction(rate, active)
    missing = sizes - active
    layers = jnp.full_like(sizes, len(sizes), dtype=jnp.uint32)
    dense = uint64.less64(uint64.mul32(missing, jnp.full_like(layers, 5)), _pair(sizes))
    total = uint64.sum64(shares)
    growing = uint64.less64(
        _spread(total, shares.shape),
        uint64.mul32(shares, layers),
    )
    # floor(sparsity * nonzeros) with sparsity = missing / size.
    most, _ = uint64.divmod64(uint64.mul32(missing, active), _pair(sizes))
    capped = jnp.minimum(counts, most[1].astype(jnp.int32))
    return jnp.where(jnp.logical_and(dense, growing), capped, counts)


def as_shares(shares: jax.Array) -> jax.Array:
    """Shares as uint32; floats are quantised to 24 bits of the largest."""
    if jnp.issubdtype(shares.dtype, jnp.integer):
        return jnp.maximum(shares, 0).astype(jnp.uint32)
    largest = jnp.max(shares, initial=0.0)
    scaled = jnp.clip(shares / jnp.where(largest > 0, largest, 1.0), 0.0, 1.0)
    return (scaled * 2**24).astype(jnp.uint32)


def signed_sum(counts: jax.Array) -> uint64.Pair:
    """Sum of counts, some of which may be negative; at least 0."""
    plus, minus = (
        uint64.sum64(jnp.maximum(x, 0).astype(jnp.uint32)) for x in (counts, -counts)
    )
    return uint64.sub64(plus, uint64.min64(plus, minus))


def target_counts(
    excess: jax.Array | int, whole: Any, final: jax.Array, sizes: jax.Array
) -> jax.Array:
    """Active weights of each layer on the way from dense to the final counts.

    ``t_i = c_i + floor(x * (n_i - c_i))`` with x = excess / whole, exactly: all weights
    at x = 1, the final counts at x = 0. A float quotient would differ between programs
    and miss the ends by a weight.
    """
    room = (sizes - final).astype(jnp.uint32)
    above, below = (jnp.full_like(room, jnp.uint32(x)) for x in (excess, whole))
    more, _ = uint64.divmod64(uint64.mul32(above, room), _pair(below))
    return final + more[1].astype(jnp.int32)


def _ranks(values: uint64.Pair) -> jax.Array:
    """How many entries rank before each: larger ones, and equal ones of lower index."""
    high, low = values
    order = jnp.arange(len(high))
    if len(high) > 256:  # units of a layer; for a few layers, pairs compile faster
        *_, place = lax.sort((~high, ~low, order), num_keys=3)
        return jnp.zeros_like(order).at[place].set(order)
    mine, theirs = (high[:, None], low[:, None]), (high[None, :], low[None, :])
    tied = jnp.logical_not(uint64.less64(mine, theirs) | uint64.less64(theirs, mine))
    ahead = uint64.less64(mine, theirs) | (tied & (order[None, :] < order[:, None]))
    return jnp.sum(ahead, axis=1, dtype=jnp.int32)


def apportion(
    total: jax.Array | uint64.Pair,
    shares: jax.Array,
    room: jax.Array,
    fallback: jax.Array,
    *,
    most: int = 2**32 - 1,
) -> jax.Array:
    """Divides a total over layers in proportion to shares, within each layer's room.

    ``g_i = floor(total * share_i / sum(shares))``. What the floors leave over goes one
    each to the largest remainders, ties to the earlier layer. What a layer has no room
    for (edge case 1 of the sparse momentum paper) is spread equally over the layers
    with room, repeatedly until all is placed, a last rest one each to the first.
    """
    layers = len(shares)
    if not layers:
        return jnp.zeros(0, jnp.int32)
    total = total if isinstance(total, tuple) else uint64.pair64(total)
    shares = jnp.where(jnp.any(shares > 0), shares, fallback.astype(jnp.uint32))
    longest = jnp.uint32(32) - lax.clz(jnp.max(shares))
    allowed = np.uint32(min(64 - most.bit_length(), 32))
    shares = shares >> jnp.where(longest > allowed, longest - allowed, 0)
    whole = _spread(uint64.sum64(shares), (layers,))
    whole = uint64.where64(whole[0] | whole[1] > 0, whole, _pair(jnp.ones_like(shares)))
    product = uint64.mul64(_spread(total, (layers,)), shares)
    given, remainder = uint64.divmod64(product, whole)
    rank = _ranks(remainder)
    _, left = uint64.sub64(total, uint64.sum64(given))  # less than one per layer
    given = uint64.add64(given, _pair(rank < left.astype(jnp.int32)))
    placed = uint64.min64(given, _pair(room))
    excess = uint64.sub64(total, uint64.sum64(placed))

    def spill(carry):
        given, excess = carry
        free = room - given
        open_layers = free > 0
        number = jnp.maximum(jnp.sum(open_layers, dtype=jnp.uint32), 1)
        each, _ = uint64.divmod64(excess, uint64.pair64(number))
        turn = jnp.cumsum(open_layers, dtype=jnp.uint32)
        first = jnp.logical_not(uint64.less64(_spread(excess, (layers,)), _pair(turn)))
        some = (each[0] | each[1]) > 0
        offer = uint64.where64(some, _spread(each, (layers,)), _pair(first))
        offer = uint64.where64(open_layers, offer, _pair(jnp.zeros_like(turn)))
        taken = uint64.min64(offer, _pair(free))[1]
        return given + taken.astype(jnp.int32), uint64.sub64(
            excess, uint64.sum64(taken)
        )

    given, _ = lax.while_loop(
        lambda carry: (carry[1][0] | carry[1][1]) > 0,
        spill,
        (placed[1].astype(jnp.int32), excess),
    )
    return given
