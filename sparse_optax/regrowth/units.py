"""Output units of a layer as pools: how a layer's new weights are split over them.

The units of a layer are the slices along its last axis, as the kernels of flax and
haiku have them. Where a leaf stacks layers, that is the last axis of each slice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparse_optax.regrowth import allocate
from sparse_optax.regrowth.redistribute import mean_magnitudes
from sparse_optax.regrowth.rules import layer_counts, layer_sizes, layer_vector


def _layers_first(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """The shape (layers, *a layer), a layer having at least one axis."""
    if axis is None:
        return (1, *(shape or (1,)))
    rest = shape[:axis] + shape[axis + 1 :]
    return (shape[axis], *(rest or (1,)))


def _sharding(x: jax.Array) -> Any:
    return jax.typeof(x).sharding


def _whole(x: jax.Array) -> jax.Array:
    """A leaf on an Explicit mesh, gathered: merged axes have no sharding to name."""
    sharding = _sharding(x)
    if sharding.mesh.empty:
        return x
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def fold(x: jax.Array, axis: int | None) -> jax.Array:
    """A leaf with its units first, those of the first layer before all others.

    Args:
      x: A leaf.
      axis: The axis whose slices are layers, or None.

    Returns:
      The array of shape (layers * units, *all other axes).

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.regrowth import units
      >>> units.fold(jnp.zeros((3, 3, 8, 16)), None).shape
      (16, 3, 3, 8)
      >>> units.fold(jnp.zeros((8, 2, 16)), 1).shape
      (32, 8)
    """
    if axis is None:
        return jnp.moveaxis(x, -1, 0) if x.ndim else x[None]
    layers, *_, number = shape = _layers_first(x.shape, axis)
    front = jnp.moveaxis(jnp.moveaxis(_whole(x), axis, 0).reshape(shape), -1, 1)
    return front.reshape(layers * number, *shape[1:-1])


def unfold(x: jax.Array, like: jax.Array, axis: int | None) -> jax.Array:
    """The inverse of ``fold``.

    Args:
      x: What ``fold`` made.
      like: An array of the leaf's shape and sharding.
      axis: The axis whose slices are layers, or None.

    Returns:
      The leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.regrowth import units
      >>> x = jnp.arange(24).reshape(2, 3, 4)
      >>> bool((units.unfold(units.fold(x, 1), x, 1) == x).all())
      True
    """
    shape = like.shape
    if axis is None:
        return jnp.moveaxis(x, 0, -1) if shape else x[0]
    layers, *rest, number = _layers_first(shape, axis)
    front = jnp.moveaxis(x.reshape(layers, number, *rest), 1, -1)
    plain = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    leaf, sharding = jnp.moveaxis(front.reshape(plain), 0, axis), _sharding(like)
    return leaf if sharding.mesh.empty else jax.reshard(leaf, sharding)


def split_counts(
    counts: tuple[jax.Array, ...],
    values: tuple[jax.Array, ...],
    masks: tuple[jax.Array, ...],
    axes: tuple[int | None, ...],
) -> list[jax.Array]:
    """Splits each layer's count over its units, by the mean |value| of a unit.

    The mean is over all weights of a unit. It is a whole number, of |x| relative to
    the largest of its layer, as in ``redistribute.mean_magnitudes``; floors, largest
    remainders and the spill of what a full unit cannot take are ``allocate.apportion``.
    Where all means of a layer are zero, units share in proportion to their room.

    Args:
      counts: Per layer, how many weights to grow, at most the room.
      values: One array a leaf.
      masks: Boolean arrays; a unit's room is where they are False.
      axes: For each leaf the axis whose slices are layers, or None.

    Returns:
      For each leaf an int32 array of shape (layers * units,).

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.regrowth import units
      >>> values = jnp.array([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
      >>> nothing = jnp.zeros((3, 2), bool)
      >>> units.split_counts((jnp.int32(4),), (values,), (nothing,), (None,))
      [Array([1, 3], dtype=int32)]
    """
    if not values:
        return []
    scaled, folded, shapes = [], [], []
    for v, m, axis in zip(values, masks, axes, strict=True):
        v = jnp.abs(v.astype(jnp.promote_types(v.dtype, jnp.float32)))
        others = tuple(i for i in range(v.ndim) if i != axis)
        top = jnp.max(v, axis=others, keepdims=True, initial=0)
        scaled.append(fold(v / jnp.where(top > 0, top, 1), axis))
        folded.append(fold(m, axis))
        layers, *_, number = _layers_first(v.shape, axis)
        shapes.append((layers, number))
    pools = (0,) * len(scaled)
    missing = tuple(jnp.logical_not(m) for m in folded)
    # With no weight active, the mean is over all.
    nothing = tuple(jnp.zeros_like(m) for m in folded)
    shares = mean_magnitudes(tuple(scaled), nothing, pools)
    room = layer_counts(missing, pools)
    widest = max(number for _, number in shapes)

    def rows(vector):
        ends = np.cumsum([layers * number for layers, number in shapes])[:-1]
        parts = [
            jnp.pad(part.reshape(shape), ((0, 0), (0, widest - shape[1])))
            for part, shape in zip(jnp.split(vector, ends), shapes, strict=True)
        ]
        return jnp.concatenate(parts)

    most = int(max(layer_sizes(masks, axes), default=1))
    split = jax.vmap(lambda n, s, r: allocate.apportion(n, s, r, r, most=most))
    given = split(layer_vector(counts), rows(shares), rows(room))
    out, start = [], 0
    for layers, number in shapes:
        out.append(given[start : start + layers, :number].reshape(-1))
        start += layers
    return out
