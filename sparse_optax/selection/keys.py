"""Scores as signed integers in the same order, by bit operations only.

Float comparisons give no usable order: XLA on CPU flushes subnormals to zero in them,
NaN is unordered, and 0 * inf is a *negative* NaN. Keys have one total order: all NaN
equal and highest, then +inf, finite values, -inf, with +0 and -0 equal. Signed keys
compare fastest: half of the floats are their own key.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.checks import ArgumentError

# Exponent bits all set: the bits of infinity, and its octave (one power of two).
_INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
_INFINITY["float64"] = 0x7FF << 52
_OCTAVE = {"float16": 10, "bfloat16": 7, "float32": 23, "float64": 52, "uint32": 23}


class Order(NamedTuple):
    """How the scores of one selection become keys; hashable."""

    name: str  # dtype in which scores compare: a float of 16, 32, 64 bits or uint32

    @property
    def dtype(self) -> np.dtype:
        """Signed dtype of the keys."""
        return np.dtype("int64" if self.name == "float64" else "int32")

    @property
    def unsigned(self) -> np.dtype:
        """Unsigned dtype of the same width."""
        return np.dtype("uint64" if self.name == "float64" else "uint32")

    @property
    def lowest(self) -> int:
        """The smallest key."""
        return -(2**31) if self.name == "uint32" else -_INFINITY[self.name]

    @property
    def highest(self) -> int:
        """The largest key, that of NaN where there is one."""
        return 2**31 - 1 if self.name == "uint32" else _INFINITY[self.name] + 1

    @property
    def octave(self) -> int:
        """Distance in keys between a float and its double."""
        return 1 << _OCTAVE[self.name]


def order_of(dtypes, names) -> Order:
    """The order in which scores of these dtypes compare."""
    kinds = [np.dtype(d).name for d in dtypes]
    for kind, name in zip(kinds, names, strict=True):
        if kind not in _OCTAVE:
            raise ArgumentError(
                f"the scores of {name} have dtype {kind}; they must be "
                "float16, bfloat16, float32, float64 or uint32. Cast the leaf, for "
                "example with x.astype(jnp.float32), or leave it out."
            )
    found = sorted(set(kinds))
    if len(found) == 1:
        return Order(found[0])
    if "uint32" in found:
        raise ArgumentError(
            f"the scores have dtypes {found}; uint32 and float scores have "
            "no common order. Cast them to one dtype in `score`."
        )
    return Order("float64" if "float64" in found else "float32")


def to_key(score: jax.Array, order: Order, *, positive: bool = False) -> jax.Array:
    """The key of each score."""
    if order.name == "uint32":
        return lax.bitcast_convert_type(score ^ np.uint32(1 << 31), jnp.int32)
    if order.name in ("float16", "bfloat16"):
        bits = lax.bitcast_convert_type(score, jnp.int16).astype(jnp.int32)
        magnitude = bits & np.int32(0x7FFF)
    elif order.name == "float32":
        bits = _bits32(score)
        magnitude = bits & np.int32(0x7FFFFFFF)
    else:
        bits = _bits64(score)
        magnitude = bits & np.int64(2**63 - 1)
    infinity = np.array(_INFINITY[order.name], order.dtype)
    if positive:
        return jnp.minimum(magnitude, infinity + 1)
    key = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > infinity, infinity + 1, key)


def from_key(key: jax.Array, order: Order) -> jax.Array:
    """The score of each key, in the dtype of the order."""
    if order.name == "uint32":
        return lax.bitcast_convert_type(key, jnp.uint32) ^ np.uint32(1 << 31)
    infinity = _INFINITY[order.name]
    nan = np.array(infinity + order.octave // 2, order.dtype)
    bits = jnp.where(key > infinity, nan, jnp.abs(key))
    negative = key < 0
    if order.name in ("float16", "bfloat16"):
        bits = jnp.where(negative, bits | 0x8000, bits).astype(jnp.uint16)
    else:
        bits = jnp.where(negative, bits | np.iinfo(order.dtype).min, bits)
    return lax.bitcast_convert_type(bits, jnp.dtype(order.name))


def _bits32(score: jax.Array) -> jax.Array:
    if score.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(score, jnp.uint16).astype(jnp.uint32) << 16
        return lax.bitcast_convert_type(bits, jnp.int32)
    # Every float16 is a normal float32 (or zero, inf, NaN): the cast flushes nothing.
    return lax.bitcast_convert_type(score.astype(jnp.float32), jnp.int32)


def _bits64(score: jax.Array) -> jax.Array:
    if score.dtype == jnp.float64:
        return lax.bitcast_convert_type(score, jnp.int64)
    bits = _bits32(score)
    magnitude = bits & np.int32(0x7FFFFFFF)
    # A float32 subnormal is a normal float64, but a cast would flush it to zero.
    normal = lax.bitcast_convert_type(magnitude, jnp.float32).astype(jnp.float64)
    small = magnitude.astype(jnp.float64) * 2.0**-149
    value = jnp.where(magnitude < (1 << 23), small, normal)
    value = lax.bitcast_convert_type(value, jnp.int64)
    return jnp.where(bits < 0, value | np.int64(-(2**63)), value)
