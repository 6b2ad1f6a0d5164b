"""Redistribution rules: how the removed weights are shared among the layers.

A rule returns one non-negative share a layer; the engine turns shares into whole
counts whose sum is exactly the number removed. Statistics of weights are made of
integers, so that every mesh of devices arrives at the same counts: a sum of floats
depends on the order of summation, a sum of integers does not.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import wide
from sparse_optax.regrowth.rules import (
    Evidence,
    axes_of,
    layer_counts,
    layer_sizes,
    other_axes,
    per_weight,
    require,
    split_layers,
    stateless,
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
    wide_values = [v.astype(jnp.promote_types(v.dtype, jnp.float32)) for v in values]
    largest = jnp.zeros((), jnp.float32)
    for value in wide_values:
        biggest = jnp.max(jnp.abs(value), initial=0.0)
        largest = jnp.maximum(largest, biggest.astype(jnp.float32))
    largest = jnp.where(largest > 0, largest, 1.0)
    active = layer_counts(masks, axes)
    sizes = jnp.asarray(layer_sizes(masks, axes).astype(np.int32))
    divisor = jnp.where(active > 0, active, jnp.maximum(sizes, 1)).astype(jnp.uint32)
    sums = []
    for value, mask, axis, a in zip(
        wide_values, masks, axes, split_layers(active, masks, axes), strict=True
    ):
        counted = jnp.logical_or(mask, per_weight(a, mask, axis) == 0)
        q = jnp.minimum(jnp.abs(value) / largest, 1.0) * 2**VALUE_BITS
        q = jnp.where(counted, q, 0.0).astype(jnp.uint32)
        high, low = wide.sum64(q, other_axes(mask, axis))
        sums.append((high.reshape(-1), low.reshape(-1)))
    if not sums:
        return jnp.zeros(0, jnp.uint32)
    highs, lows = zip(*sums, strict=True)
    total = jnp.concatenate(highs), jnp.concatenate(lows)
    scaled = wide.mul64(total, jnp.uint32(2**MEAN_BITS))
    mean, _ = wide.divmod64(scaled, (jnp.zeros_like(divisor), divisor))
    return mean[1]


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


def _none(evidence: Evidence) -> jax.Array:
    # No layer has a share: the engine then gives each back what it lost.
    return jnp.zeros(len(layer_sizes(evidence.masks, axes_of(evidence))), jnp.uint32)


#: In proportion to the mean |momentum| of a layer's active weights.
momentum = stateless(_momentum, needs=("momentum",))

#: In proportion to the mean |w| of a layer's active weights.
magnitude = stateless(_magnitude)

#: In proportion to the number of weights that survive the prune in a layer.
nonzeros = stateless(_nonzeros, after_prune=True)

#: In proportion to a layer's number of weights, missing ones included.
size = stateless(_size)

#: Each layer grows as many weights as it lost.
none = stateless(_none)
