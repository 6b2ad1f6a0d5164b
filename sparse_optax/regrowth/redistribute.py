"""Redistribution rules: how the removed weights are shared among the layers.

A rule returns one non-negative share a layer, or None; the engine turns shares into
whole counts whose sum is exactly the number removed. Statistics of weights are made of
integers, so that every mesh of devices arrives at the same counts: a sum of floats
depends on the order of summation, a sum of integers does not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax import wide
from sparse_optax.regrowth.rules import (
    Evidence,
    axes_of,
    layer_counts,
    layer_sizes,
    require,
    stateless,
    tally_layers,
)

# |x| / max|x| is kept in 24 bits, as many as a float32 has; means of them in 31.
VALUE_BITS = 24
MEAN_BITS = 7


def mean_magnitudes(
    values: tuple[jax.Array, ...],
    masks: tuple[jax.Array, ...],
    axes: tuple[int | None, ...],
) -> jax.Array:
    """Mean |x| over the active weights of each layer, relative to the largest |x|.

    With M the largest |x| of all leaves, q = floor(2^24 |x| / M) and a_i the number
    of active weights of layer i::

        share_i = floor(2^7 * sum_active(q) / a_i)

    A layer without active weights takes the mean over its missing ones.

    Args:
      values: One array a leaf.
      masks: Boolean arrays of the same shapes.
      axes: For each leaf the axis whose slices are layers, or None.

    Returns:
      uint32 vector, one share a layer, at most 2^31.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> values = (jnp.array([1.0, 9.0]), jnp.array([2.0, 4.0]))
      >>> masks = (jnp.array([True, False]), jnp.array([True, True]))
      >>> shares = regrowth.redistribute.mean_magnitudes(values, masks, (None, None))
      >>> [round(int(s) / int(shares[0]), 3) for s in shares]
      [1.0, 3.0]
    """
    if not values:
        return jnp.zeros(0, jnp.uint32)
    leaves = list(zip(values, masks, strict=True))
    active, largest = tally_layers(leaves, axes, _counted)
    largest = lax.bitcast_convert_type(jnp.max(largest), jnp.float32)
    largest = jnp.where(largest > 0, largest, 1.0)
    existing, every = tally_layers(leaves, axes, _quantised, (largest,))
    sizes = jnp.asarray(layer_sizes(masks, axes).astype(np.uint32))
    total = wide.where64(active > 0, existing, every)
    divisor = jnp.where(active > 0, active, jnp.maximum(sizes, 1))
    scaled = wide.mul64(total, jnp.full_like(divisor, 2**MEAN_BITS))
    mean, _ = wide.divmod64(scaled, (jnp.zeros_like(divisor), divisor))
    return mean[1]


def _counted(value: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Active weights, and |x| as bits, which are ordered as the numbers are."""
    return mask, lax.bitcast_convert_type(jnp.abs(value.astype(jnp.float32)), jnp.int32)


def _quantised(
    largest: jax.Array, value: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """|x| in units of the largest / 2^24, of active weights and of all."""
    value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
    share = jnp.minimum(jnp.abs(value) / largest, 1.0) * 2**VALUE_BITS
    q = share.astype(jnp.uint32)
    return jnp.where(mask, q, jnp.uint32(0)), q


def _momentum(evidence: Evidence) -> jax.Array:
    values = require(evidence, "momentum", rule="redistribute.momentum")
    return mean_magnitudes(values, evidence.masks, axes_of(evidence))


def _magnitude(evidence: Evidence) -> jax.Array:
    return mean_magnitudes(evidence.params, evidence.masks, axes_of(evidence))


def _nonzeros(evidence: Evidence) -> jax.Array:
    return layer_counts(evidence.masks, axes_of(evidence)).astype(jnp.uint32)


def _size(evidence: Evidence) -> jax.Array:
    sizes = layer_sizes(evidence.masks, axes_of(evidence))
    return jnp.asarray(sizes.astype(np.uint32))


#: In proportion to the mean |momentum| of a layer's active weights.
momentum = stateless(_momentum, needs=("momentum",))

#: In proportion to the mean |w| of a layer's active weights.
magnitude = stateless(_magnitude)

#: In proportion to the number of weights that survive the prune in a layer.
nonzeros = stateless(_nonzeros, after_prune=True)

#: In proportion to a layer's number of weights, missing ones included.
size = stateless(_size)

#: Each layer grows as many weights as it lost.
none = stateless(lambda evidence: None)
