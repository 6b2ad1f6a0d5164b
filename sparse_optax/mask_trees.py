"""The mask tree as a data structure: holes, packed leaves, shapes, rebuilding.

A mask tree has the structure of the parameters. A leaf that takes part holds a
boolean array of its shape, True where the weight is kept, or that array packed to
one bit a weight; a leaf that does not is ``optax.MaskedNode()``, never None.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax.leaves import PyTree, is_hole, leaf_names


class PackedMask(NamedTuple):
    """A boolean array stored with one bit a weight.

    Attributes:
      bits: uint8, the mask's shape with its last axis divided by eight, rounded up.
      spare: uint8 zeros, one more than there are unused bits at the end of each row.
        Its length keeps the shape without a static field in the optimizer state, and
        it is not empty, since not every library stores an empty array.
    """

    bits: jax.Array
    spare: jax.Array


def is_mask(node: Any) -> bool:
    """Tells whether a node of a mask tree is to be taken as one leaf.

    Args:
      node: Any node.

    Returns:
      True for a hole or a packed mask.

    Examples:
      >>> import optax
      >>> from sparse_optax import mask_trees
      >>> mask_trees.is_mask(optax.MaskedNode())
      True
    """
    return is_hole(node) or isinstance(node, PackedMask)


def flatten(masks: PyTree) -> tuple[list[Any], Any]:
    """Flattens a mask tree; holes and packed masks count as leaves.

    Args:
      masks: A mask tree.

    Returns:
      The list of its leaves and its tree structure.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax import mask_trees
      >>> tree = {"b": optax.MaskedNode(), "w": jnp.ones((2, 2), bool)}
      >>> len(mask_trees.flatten(tree)[0])
      2
    """
    return jax.tree.flatten(masks, is_leaf=is_mask)


def pack(mask: jax.Array) -> PackedMask:
    """Stores a boolean array with one bit a weight, eight along the last axis.

    Args:
      mask: Boolean array of any shape with at least one dimension.

    Returns:
      A ``PackedMask`` of ceil(last / 8) bytes a row.

    Raises:
      ValueError: If the mask is a scalar, or an Explicit mesh cuts the last axis
        within a byte. (An Auto mesh gathers such a mask.)

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import mask_trees
      >>> packed = mask_trees.pack(jnp.ones((3, 10), bool))
      >>> packed.bits.shape, bool(mask_trees.unpack(packed).all())
      ((3, 2), True)
    """
    if not mask.ndim:
        raise ValueError(
            "packed: a scalar has no axis to pack. Use packed=False, or leave scalars "
            "out with `where`."
        )
    sharding = jax.typeof(mask).sharding
    if not sharding.mesh.empty and sharding.spec[-1] is not None:
        axes = sharding.spec[-1]
        axes = axes if isinstance(axes, tuple) else (axes,)
        parts = int(np.prod([sharding.mesh.shape[a] for a in axes]))
        if mask.shape[-1] % (8 * parts):
            raise ValueError(
                f"packed: the last axis of a mask of shape {mask.shape} is cut into "
                f"{parts} parts that are not whole bytes; its length must be a "
                f"multiple of {8 * parts}. Shard another axis, or use packed=False."
            )
    bits = jnp.packbits(mask, axis=-1)
    unused = 8 * bits.shape[-1] - mask.shape[-1]
    return PackedMask(bits, jnp.zeros((unused + 1,), jnp.uint8))


def unpack(mask: jax.Array | PackedMask) -> jax.Array:
    """Gives back the boolean array of a packed mask; a plain mask passes.

    Wrappers that mix states by arithmetic (``optax.contrib.sam``) leave integers where
    there were bools and bytes; they are read as what they were.

    Args:
      mask: A ``PackedMask`` or a boolean array.

    Returns:
      A boolean array.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import mask_trees
      >>> mask_trees.unpack(mask_trees.pack(jnp.array([True, False, True]))).tolist()
      [True, False, True]
    """
    if not isinstance(mask, PackedMask):
        integer = jnp.issubdtype(getattr(mask, "dtype", bool), jnp.integer)
        return mask.astype(bool) if integer else mask
    bits = mask.bits.astype(jnp.uint8)
    return jnp.unpackbits(bits, axis=-1, count=mask_shape(mask)[-1]).astype(bool)


def names_of(structure: Any) -> list[str]:
    """Normalised leaf names of a tree structure, in leaf order.

    Args:
      structure: The structure that ``flatten`` gave.

    Returns:
      One name a leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import mask_trees
      >>> mask_trees.names_of(mask_trees.flatten({"w": jnp.ones(2, bool)})[1])
      ['w']
    """
    return leaf_names(jax.tree.unflatten(structure, [0] * structure.num_leaves))


def check_names(masks: Any, params: Sequence[str], *, caller: str) -> None:
    """Raises unless a mask tree has the leaves of the parameters, by name.

    Args:
      masks: Structure of the mask tree.
      params: Normalised names of the parameters.
      caller: The name that the error starts with.

    Raises:
      ValueError: If a name differs; leaves are else paired by position.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import mask_trees
      >>> structure = mask_trees.flatten({"w": jnp.ones(2, bool)})[1]
      >>> mask_trees.check_names(structure, ["w"], caller="doc")
    """
    names = names_of(masks)
    if names != list(params):
        raise ValueError(
            f"{caller}: the masks have the leaves {names} and `params` {list(params)}; "
            "the structures must be equal. Pass the tree that the masks were made for."
        )


def slice_counts(mask: jax.Array) -> jax.Array:
    """Number of True entries in each slice along axis 0.

    Slice by slice, because an int32 could not hold the sum over a leaf of 2^31 weights.

    Args:
      mask: Boolean array of one or more dimensions, with fewer than 2^31 elements in
        each slice; of a scalar the count itself comes back.

    Returns:
      int32, one entry a slice.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import mask_trees
      >>> mask_trees.slice_counts(jnp.array([[True, True], [False, True]])).tolist()
      [2, 1]
    """
    return jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)


def whole_count(mask: jax.Array) -> int:
    """Number of True entries of a concrete mask of any size, as a Python integer.

    Args:
      mask: Boolean array, with fewer than 2^31 elements in each slice along axis 0.

    Returns:
      The count.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import mask_trees
      >>> mask_trees.whole_count(jnp.eye(3, dtype=bool))
      3
    """
    return int(np.asarray(slice_counts(mask)).sum(dtype=np.int64))


def mask_shape(mask: Any) -> tuple[int, ...]:
    """Shape of a plain or packed mask.

    Args:
      mask: A boolean array or a ``PackedMask``.

    Returns:
      The shape of the weights it speaks of.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import mask_trees
      >>> mask_trees.mask_shape(mask_trees.pack(jnp.ones((3, 10), bool)))
      (3, 10)
    """
    if not isinstance(mask, PackedMask):
        return mask.shape
    *rows, last = mask.bits.shape
    return (*rows, 8 * last - mask.spare.shape[-1] + 1)


def check_shapes(
    masks: Sequence[Any], params: Sequence[Any], names: Sequence[str], *, caller: str
) -> None:
    """Raises unless each mask has the shape of its parameter.

    Args:
      masks: Leaves of a mask tree.
      params: Leaves of the parameters, in the same order.
      names: Their names, for the message.
      caller: The name that the error starts with.

    Raises:
      ValueError: If the numbers of leaves or a shape differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import mask_trees
      >>> mask = jnp.ones(2, bool)
      >>> mask_trees.check_shapes([mask], [jnp.ones(2)], ["w"], caller="doc")
    """
    if len(masks) != len(params):
        raise ValueError(
            f"{caller}: the masks have {len(masks)} leaves and `params` "
            f"{len(params)}; the structures must be equal. Pass the tree that the "
            "masks were made for."
        )
    for mask, param, name in zip(masks, params, names, strict=True):
        if not is_hole(mask) and mask_shape(mask) != tuple(param.shape):
            raise ValueError(
                f"{caller}: the mask of {name!r} has shape {mask_shape(mask)} and "
                f"`params` {tuple(param.shape)}; they must be equal. Pass masks made "
                "for these parameters."
            )


def rebuild(
    structure: Any, size: int, index: Sequence[int], values: Sequence[Any]
) -> PyTree:
    """Puts values at the chosen leaves of a tree and holes everywhere else.

    Args:
      structure: The tree structure.
      size: Its number of leaves.
      index: Positions of the chosen leaves.
      values: One value a chosen leaf.

    Returns:
      The tree.

    Examples:
      >>> import jax
      >>> from sparse_optax import mask_trees
      >>> mask_trees.rebuild(jax.tree.structure({"b": 0, "w": 0}), 2, [1], [5])
      {'b': MaskedNode(), 'w': 5}
    """
    full: list[Any] = [optax.MaskedNode()] * size
    for i, value in zip(index, values, strict=True):
        full[i] = value
    return jax.tree.unflatten(structure, full)
