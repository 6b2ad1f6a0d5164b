"""Redistribution rules: how removed weights are divided among the layers.

A rule returns one non-negative share per layer, or None. The engine turns shares into
counts whose sum is exactly the number removed. Shares are integers, so that every mesh
gives the same counts: a float sum depends on the order of summation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.layers import layer_sizes
from sparse_optax.regrowth.rules import Evidence, stateless, tally_layers
from sparse_optax.selection import uint64
from sparse_optax.selection.compilation import once
from sparse_optax.selection.leaf import wide as as_wide

__all__ = [
    "magnitude",
    "momentum",
    "none",
    "nonzeros",
    "size",
]

# |x| / max|x| has 24 bits, like a float32; means of it have 31.
_VALUE_BITS = 24
_MEAN_BITS = 7


def mean_magnitudes(
    values: tuple[jax.Array, ...],
    masks: tuple[jax.Array, ...],
    axes: tuple[int | None, ...],
) -> jax.Array:
    """Mean |x| over the active weights of each layer, relative to the largest |x|.

    With M the largest |x| of all leaves, q = floor(2^24 |x| / M) and a_i the number of
    active weights of layer i, ``share_i = floor(2^7 * sum_active(q) / a_i)``, a uint32
    of at most 2^31. A layer without active weights uses its missing ones.
    """
    if not values:
        return jnp.zeros(0, jnp.uint32)
    leaves = list(zip(values, masks, strict=True))
    active, largest = tally_layers(leaves, axes, _counted)
    largest = lax.bitcast_convert_type(jnp.max(largest), jnp.float32)
    largest = once(jnp.where(largest > 0, largest, 1.0))
    existing, every = tally_layers(leaves, axes, _quantised, (largest,))
    sizes = jnp.asarray(layer_sizes([m.shape for m in masks], axes).astype(np.uint32))
    total = uint64.where64(active > 0, existing, every)
    divisor = jnp.where(active > 0, active, jnp.maximum(sizes, 1))
    scaled = uint64.mul64(total, jnp.full_like(divisor, 2**_MEAN_BITS))
    mean, _ = uint64.divmod64(scaled, (jnp.zeros_like(divisor), divisor))
    return mean[1]


def _counted(value: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Active weights, and |x| as bits, which have the order of the numbers."""
    if jnp.iscomplexobj(value):
        value = jnp.abs(value)
    return mask, lax.bitcast_convert_type(jnp.abs(value.astype(jnp.float32)), jnp.int32)


def _quantised(
    largest: jax.Array, value: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """|x| in units of the largest / 2^24, of active weights and of all."""
    value = value.astype(as_wide(value.dtype))
    share = jnp.minimum(jnp.abs(value) / largest, 1.0) * 2**_VALUE_BITS
    q = share.astype(jnp.uint32)
    return jnp.where(mask, q, jnp.uint32(0)), q


def _momentum(evidence: Evidence) -> jax.Array:
    values = evidence.need("momentum", "redistribute.momentum")
    return mean_magnitudes(values, evidence.masks, evidence.layer_axes)


def _magnitude(evidence: Evidence) -> jax.Array:
    return mean_magnitudes(evidence.params, evidence.masks, evidence.layer_axes)


def _nonzeros(evidence: Evidence) -> jax.Array:
    return evidence.count(evidence.masks).astype(jnp.uint32)


def _size(evidence: Evidence) -> jax.Array:
    return jnp.asarray(evidence.sizes.astype(np.uint32))


#: In proportion to the mean |momentum| of a layer's active weights.
momentum = stateless(_momentum, needs=("momentum",))

#: In proportion to the mean |w| of a layer's active weights.
magnitude = stateless(_magnitude)

#: In proportion to the number of weights of a layer after the prune.
nonzeros = stateless(_nonzeros, after_prune=True)

#: In proportion to a layer's number of weights, missing ones included.
size = stateless(_size)

#: Each layer grows as many weights as it lost.
none = stateless(lambda evidence: None)
