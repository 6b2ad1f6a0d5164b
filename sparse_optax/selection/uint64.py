"""Unsigned 64-bit integers as pairs of uint32: exact counts without x64.

JAX computes in 32 bits unless x64 is enabled, but a pool may hold more than 2**32
weights, and budgets in bytes or FLOPs exceed 2**32 much earlier. A *pair* ``(high,
low)`` of two uint32 arrays of one shape stands for ``high * 2**32 + low``. All
functions are pure and element-wise (with NumPy broadcasting of equal ranks), wrap
modulo 2**64, and work under ``jit``, ``vmap`` and ``scan``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pair = tuple[jax.Array, jax.Array]


def pair64(value) -> Pair:
    """A pair from a non-negative Python int or from an integer array."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_):
        if not 0 <= int(value) < 2**64:
            raise ValueError(
                f"pair64: value = {value} is outside [0, 2**64); give a non-negative "
                "count that fits in 64 bits."
            )
        high, low = divmod(int(value), 2**32)
        return jnp.uint32(high), jnp.uint32(low)
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"pair64: value has dtype {value.dtype}; give an integer array, for "
            "example value.astype(jnp.int32)."
        )
    if jnp.issubdtype(value.dtype, jnp.signedinteger):
        value = jnp.maximum(value, 0)
    low = value.astype(jnp.uint32)
    if value.dtype.itemsize == 8:
        return (value >> 32).astype(jnp.uint32), low
    return jnp.zeros_like(low), low


def from_float(value: jax.Array) -> Pair:
    """The pair of a whole float32 number, exactly."""
    word = np.float32(2**32)
    high = jnp.floor(value / word)
    return high.astype(jnp.uint32), (value - high * word).astype(jnp.uint32)


def to_int(pair: Pair) -> int:
    """The Python int of a scalar pair (on the host, not under ``jit``)."""
    return (int(pair[0]) << 32) + int(pair[1])


def add64(a: Pair, b: Pair) -> Pair:
    """The sum a + b, modulo 2**64."""
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def sub64(a: Pair, b: Pair) -> Pair:
    """The difference a - b, modulo 2**64 (a >= b where a count is meant)."""
    return a[0] - b[0] - (a[1] < b[1]).astype(jnp.uint32), a[1] - b[1]


def less64(a: Pair, b: Pair) -> jax.Array:
    """Whether a < b, as unsigned integers."""
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def where64(condition: jax.Array, a: Pair, b: Pair) -> Pair:
    """The pair a where the condition holds, b elsewhere."""
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


def min64(a: Pair, b: Pair) -> Pair:
    """The smaller of a and b."""
    return where64(less64(b, a), b, a)


def mul32(x: jax.Array, y: jax.Array) -> Pair:
    """The full 64-bit product of two uint32 arrays."""
    x, y = jnp.asarray(x, jnp.uint32), jnp.asarray(y, jnp.uint32)
    x_high, x_low = x >> 16, x & 0xFFFF
    y_high, y_low = y >> 16, y & 0xFFFF
    low, high = x_low * y_low, x_high * y_high
    # The two middle products have weight 2**16: none of these sums passes 2**32.
    middle = x_high * y_low + (low >> 16)
    other = x_low * y_high + (middle & 0xFFFF)
    return high + (middle >> 16) + (other >> 16), (other << 16) | (low & 0xFFFF)


def mul64(a: Pair, y: jax.Array) -> Pair:
    """The product of a pair with a uint32 array, modulo 2**64."""
    y = jnp.asarray(y, jnp.uint32)
    high, low = mul32(a[1], y)
    return high + a[0] * y, low


def divmod64(a: Pair, b: Pair) -> tuple[Pair, Pair]:
    """Quotient and remainder of a / b by binary long division."""
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (*a, *b)))
    a = jnp.broadcast_to(a[0], shape), jnp.broadcast_to(a[1], shape)
    b = jnp.broadcast_to(b[0], shape), jnp.broadcast_to(b[1], shape)

    def bring_down_one_bit(_, carry):
        (high, low), (rest_high, rest_low) = carry
        overflow = rest_high >> 31
        rest = (rest_high << 1) | (rest_low >> 31), (rest_low << 1) | (high >> 31)
        # A remainder past 2**64 is larger than any divisor.
        fits = (overflow == 1) | jnp.logical_not(less64(rest, b))
        rest = where64(fits, sub64(rest, b), rest)
        digits = (high << 1) | (low >> 31), (low << 1) | fits.astype(jnp.uint32)
        return digits, rest

    zero = jnp.zeros_like(a[0]), jnp.zeros_like(a[1])
    return lax.fori_loop(0, 64, bring_down_one_bit, (a, zero))


def sum64(x: jax.Array | Pair, axis: int | Sequence[int] | None = None) -> Pair:
    """The exact sum of a uint32 array, or of a pair, over some axes.

    Each axis is summed in limbs so narrow that the uint32 sum of a limb cannot
    overflow, then carried. Only plain sums are used: the SPMD partitioner splits them
    over any mesh, while it would gather the array for a reduction with a carry.
    """
    words = list(x[::-1]) if isinstance(x, tuple) else [x]  # least significant first
    if any(word.dtype != jnp.uint32 for word in words):
        raise ValueError(
            f"sum64: x has dtype {words[0].dtype}; give uint32, for example "
            "x.astype(jnp.uint32)."
        )
    ndim = words[0].ndim
    if axis is None:
        axis = range(ndim)
    axes = [axis] if isinstance(axis, int) else list(axis)
    for d in sorted((d % ndim for d in axes), reverse=True):
        words = _sum_axis(words, d)
    return (words[1], words[0]) if len(words) > 1 else pair64(words[0])


def _sum_axis(words: list[jax.Array], axis: int) -> list[jax.Array]:
    """Sum little-endian 32-bit words over one axis into two words."""
    length = max(words[0].shape[axis], 1)
    width = 32 - (length - 1).bit_length()
    total = pair64(jnp.zeros_like(words[0].sum(axis, dtype=jnp.uint32)))
    for position, word in enumerate(words):
        for shift in range(0, 32, width):
            limb = (word >> shift) & np.uint32(2**width - 1)
            part = limb.sum(axis, dtype=jnp.uint32)
            if position == 1:
                total = total[0] + (part << shift), total[1]
            else:
                high = part >> (32 - shift) if shift else jnp.zeros_like(part)
                total = add64(total, (high, part << shift))
    return [total[1], total[0]]
