"""Unsigned 64-bit integers as pairs of uint32: exact counts without x64.

JAX computes in 32 bits unless x64 is enabled, but a pool of weights may hold more
than 2**32 of them, and a budget in bytes or FLOPs passes 2**32 long before that. A
*pair* is a tuple ``(high, low)`` of two uint32 arrays of one shape and stands for
``high * 2**32 + low``. Every function here is pure, works element-wise on arrays of
any shape (with NumPy broadcasting of equal ranks), wraps modulo 2**64 as machine
integers do, and traces under ``jit``, ``vmap`` and ``scan``.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pair = tuple[jax.Array, jax.Array]


def pair64(value) -> Pair:
    """A pair from a non-negative Python int or from an integer array.

    Args:
      value: a Python int in [0, 2**64), or an integer array of any shape. Negative
        entries of a signed array count as zero; 64-bit arrays keep all their bits.

    Returns:
      ``(high, low)``, two uint32 arrays of the shape of ``value``.

    Raises:
      ValueError: for a Python int outside [0, 2**64) or an array that is not integer.

    Examples:
      >>> from sparse_optax import wide
      >>> high, low = wide.pair64(2**40 + 7)
      >>> int(high), int(low)
      (256, 7)
    """
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
    """The pair of a whole float32 number, exactly.

    Args:
      value: float32 of any shape, whole numbers in [0, 2**64).

    Returns:
      The pair.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import wide
      >>> wide.to_int(wide.from_float(jnp.float32(2**33 + 2**12))) == 2**33 + 2**12
      True
    """
    word = np.float32(2**32)
    high = jnp.floor(value / word)
    return high.astype(jnp.uint32), (value - high * word).astype(jnp.uint32)


def to_int(pair: Pair) -> int:
    """The Python int of a scalar pair (on the host, not under ``jit``).

    Args:
      pair: two concrete uint32 scalars ``(high, low)``.

    Returns:
      ``high * 2**32 + low``.

    Examples:
      >>> from sparse_optax import wide
      >>> wide.to_int(wide.pair64(2**40 + 7)) == 2**40 + 7
      True
    """
    return (int(pair[0]) << 32) + int(pair[1])


def add64(a: Pair, b: Pair) -> Pair:
    """The sum a + b, modulo 2**64.

    Args:
      a: a pair.
      b: a pair.

    Returns:
      The pair of a + b.

    Examples:
      >>> from sparse_optax import wide
      >>> wide.to_int(wide.add64(wide.pair64(2**32 - 1), wide.pair64(1))) == 2**32
      True
    """
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]).astype(jnp.uint32), low


def sub64(a: Pair, b: Pair) -> Pair:
    """The difference a - b, modulo 2**64 (a >= b where a count is meant).

    Args:
      a: a pair.
      b: a pair.

    Returns:
      The pair of a - b.

    Examples:
      >>> from sparse_optax import wide
      >>> wide.to_int(wide.sub64(wide.pair64(2**32), wide.pair64(1))) == 2**32 - 1
      True
    """
    return a[0] - b[0] - (a[1] < b[1]).astype(jnp.uint32), a[1] - b[1]


def less64(a: Pair, b: Pair) -> jax.Array:
    """Whether a < b, as unsigned integers.

    Args:
      a: a pair.
      b: a pair.

    Returns:
      A bool array.

    Examples:
      >>> from sparse_optax import wide
      >>> bool(wide.less64(wide.pair64(5), wide.pair64(2**33)))
      True
    """
    return (a[0] < b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))


def where64(condition: jax.Array, a: Pair, b: Pair) -> Pair:
    """The pair a where the condition holds, b elsewhere.

    Args:
      condition: a bool array.
      a: a pair.
      b: a pair.

    Returns:
      The chosen pair.

    Examples:
      >>> from sparse_optax import wide
      >>> wide.to_int(wide.where64(False, wide.pair64(1), wide.pair64(2**35))) == 2**35
      True
    """
    return jnp.where(condition, a[0], b[0]), jnp.where(condition, a[1], b[1])


def min64(a: Pair, b: Pair) -> Pair:
    """The smaller of a and b.

    Args:
      a: a pair.
      b: a pair.

    Returns:
      The pair min(a, b).

    Examples:
      >>> from sparse_optax import wide
      >>> wide.to_int(wide.min64(wide.pair64(2**33), wide.pair64(9)))
      9
    """
    return where64(less64(b, a), b, a)


def mul32(x: jax.Array, y: jax.Array) -> Pair:
    """The full 64-bit product of two uint32 arrays.

    Args:
      x: a uint32 array.
      y: a uint32 array.

    Returns:
      The pair of x * y.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import wide
      >>> product = wide.mul32(jnp.uint32(2**32 - 1), jnp.uint32(2**32 - 1))
      >>> wide.to_int(product) == (2**32 - 1) ** 2
      True
    """
    x, y = jnp.asarray(x, jnp.uint32), jnp.asarray(y, jnp.uint32)
    x_high, x_low = x >> 16, x & 0xFFFF
    y_high, y_low = y >> 16, y & 0xFFFF
    low, high = x_low * y_low, x_high * y_high
    # The two middle products have weight 2**16: none of these sums passes 2**32.
    middle = x_high * y_low + (low >> 16)
    other = x_low * y_high + (middle & 0xFFFF)
    return high + (middle >> 16) + (other >> 16), (other << 16) | (low & 0xFFFF)


def mul64(a: Pair, y: jax.Array) -> Pair:
    """The product of a pair with a uint32 array, modulo 2**64.

    Args:
      a: a pair.
      y: a uint32 array.

    Returns:
      The pair of a * y.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import wide
      >>> wide.to_int(wide.mul64(wide.pair64(2**33), jnp.uint32(3))) == 3 * 2**33
      True
    """
    y = jnp.asarray(y, jnp.uint32)
    high, low = mul32(a[1], y)
    return high + a[0] * y, low


def divmod64(a: Pair, b: Pair) -> tuple[Pair, Pair]:
    """Quotient and remainder of a / b by binary long division.

    Args:
      a: a pair.
      b: a pair; where b is 0 the quotient is 2**64 - 1 and the remainder a.

    Returns:
      ``(quotient, remainder)``, two pairs.

    Examples:
      >>> from sparse_optax import wide
      >>> quotient, remainder = wide.divmod64(wide.pair64(10**18), wide.pair64(7))
      >>> wide.to_int(quotient) == 10**18 // 7, wide.to_int(remainder) == 10**18 % 7
      (True, True)
    """
    shape = jnp.broadcast_shapes(*(jnp.shape(x) for x in (*a, *b)))
    a = jnp.broadcast_to(a[0], shape), jnp.broadcast_to(a[1], shape)
    b = jnp.broadcast_to(b[0], shape), jnp.broadcast_to(b[1], shape)

    def bring_down_one_bit(_, carry):
        (high, low), (rest_high, rest_low) = carry
        overflow = rest_high >> 31
        rest = (rest_high << 1) | (rest_low >> 31), (rest_low << 1) | (high >> 31)
        # A remainder that spills over 2**64 is larger than any divisor.
        fits = (overflow == 1) | jnp.logical_not(less64(rest, b))
        rest = where64(fits, sub64(rest, b), rest)
        digits = (high << 1) | (low >> 31), (low << 1) | fits.astype(jnp.uint32)
        return digits, rest

    zero = jnp.zeros_like(a[0]), jnp.zeros_like(a[1])
    return lax.fori_loop(0, 64, bring_down_one_bit, (a, zero))


def sum64(x: jax.Array | Pair, axis: int | Sequence[int] | None = None) -> Pair:
    """The exact sum of a uint32 array, or of a pair, over some axes.

    Each axis is summed on its own, in limbs narrow enough that the plain uint32 sum
    of a limb cannot overflow, then carried over. Only plain sums are used, which
    the SPMD partitioner splits over any mesh (a reduction with a carry in its
    combiner would gather the array first).

    Args:
      x: a uint32 array or a pair of any shape, no axis longer than 2**30.
      axis: the axis or axes to sum over; None sums over all.

    Returns:
      The pair of the sum, modulo 2**64.

    Raises:
      ValueError: if x is neither a uint32 array nor a pair of them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import wide
      >>> total = wide.sum64(jnp.full((1000, 300), 2**32 - 1, jnp.uint32))
      >>> wide.to_int(total) == 300_000 * (2**32 - 1)
      True
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
