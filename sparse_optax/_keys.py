"""Scores as unsigned integers of the same order, by bit operations only.

Float comparisons do not give a usable order: XLA on CPU flushes subnormals to zero
in them, NaN compares with nothing, and 0 * inf is a *negative* NaN. The keys here
follow one total order: every NaN highest (and equal), then +inf, finite values,
-inf; +0 and -0 are equal.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def check_dtype(dtype, name: str, caller: str) -> None:
    """Refuse scores that have no key.

    Args:
      dtype: of a score array.
      name: of the leaf, for the message.
      caller: the public function, for the message.

    Raises:
      ValueError: unless the dtype is a real float or uint32.
    """
    if np.dtype(dtype).name not in (*_FLOATS, "uint32"):
        raise ValueError(
            f"{caller}: the scores of {name} have dtype {np.dtype(dtype).name}; they "
            "must be float16, bfloat16, float32, float64 or uint32. Cast integers "
            "to float32 (or uint32) in `score`."
        )


def key_dtype(dtypes, caller: str) -> np.dtype:
    """The unsigned dtype in which scores of these dtypes can be compared.

    Args:
      dtypes: dtypes of all score arrays.
      caller: the public function, for the message.

    Returns:
      uint64 if there is a float64 among them, else uint32.

    Raises:
      ValueError: where integer and float scores meet.
    """
    names = sorted({np.dtype(d).name for d in dtypes})
    if "uint32" in names and len(names) > 1:
        raise ValueError(
            f"{caller}: the scores have dtypes {names}; uint32 and float scores have "
            "no common order. Cast them to one dtype in `score`."
        )
    return np.dtype("uint64" if "float64" in names else "uint32")


def to_key(score: jax.Array, dtype: np.dtype) -> jax.Array:
    """The key of each score.

    Args:
      score: float or uint32 array.
      dtype: uint32 or uint64, from `key_dtype`.

    Returns:
      An array of ``dtype`` and of the shape of ``score``, in the order of the scores.
    """
    if score.dtype == jnp.uint32:
        return score
    bits = _bits64(score) if dtype.itemsize == 8 else _bits32(score)
    sign = np.array(1 << (8 * dtype.itemsize - 1), dtype)
    infinity = np.array(_infinity(dtype), dtype)
    magnitude = bits & ~sign
    # Negative values: the larger the magnitude, the smaller the key; -0 becomes +0.
    key = jnp.where(bits >= sign, sign - magnitude, sign + magnitude)
    return jnp.where(magnitude > infinity, nan_key(dtype), key)


def nan_key(dtype: np.dtype):
    """The key that all NaN share, the largest of all float keys."""
    return np.array(_infinity(dtype) + (1 << (8 * dtype.itemsize - 1)) + 1, dtype)


def from_key(key: jax.Array, dtypes) -> jax.Array:
    """The score of a key.

    Args:
      key: array of keys.
      dtypes: dtypes of the score arrays that the keys came from.

    Returns:
      Scores in the dtype that these dtypes promote to.
    """
    names = {np.dtype(d).name for d in dtypes}
    if names == {"uint32"}:
        return key
    sign = np.array(1 << (8 * key.dtype.itemsize - 1), key.dtype)
    bits = jnp.where(key >= sign, key - sign, (sign - key) | sign)
    quiet_nan = np.array(
        _infinity(key.dtype) | (1 << (50 if key.dtype.itemsize == 8 else 22)),
        key.dtype,
    )
    bits = jnp.where(key >= nan_key(key.dtype), quiet_nan, bits)
    if key.dtype.itemsize == 8:
        return lax.bitcast_convert_type(bits, jnp.float64)
    if names == {"bfloat16"}:  # by bits: a float cast would flush subnormals
        return lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    value = lax.bitcast_convert_type(bits, jnp.float32)
    return value.astype(jnp.float16) if names == {"float16"} else value


def _infinity(dtype: np.dtype) -> int:
    return 0x7FF << 52 if dtype.itemsize == 8 else 0xFF << 23


def _bits32(score: jax.Array) -> jax.Array:
    if score.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(score, jnp.uint16)
        return bits.astype(jnp.uint32) << 16
    # Every float16 is a normal float32 (or zero, inf, NaN): the cast flushes nothing.
    return lax.bitcast_convert_type(score.astype(jnp.float32), jnp.uint32)


def _bits64(score: jax.Array) -> jax.Array:
    if score.dtype == jnp.float64:
        return lax.bitcast_convert_type(score, jnp.uint64)
    bits = _bits32(score)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    # A float32 subnormal is a normal float64, but a cast would flush it to zero.
    small = magnitude.astype(jnp.float64) * 2.0**-149
    value = lax.bitcast_convert_type(magnitude, jnp.float32).astype(jnp.float64)
    value = jnp.where(magnitude < (1 << 23), small, value)
    sign = (bits >> 31).astype(jnp.uint64) << 63
    return lax.bitcast_convert_type(value, jnp.uint64) | sign
