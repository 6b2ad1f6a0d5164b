"""Mask trees as data: holes, packed leaves, counts, masks on parameters."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.layers import (
    Layers,
    PackedMask,
    PyTree,
    as_packed,
    chosen_layers,
    is_abstract,
    is_hole,
    is_mask,
    leaf_names,
)
from sparse_optax.patterns import SINGLE, Pattern


def flatten(masks: PyTree) -> tuple[list[Any], Any]:
    """Leaves and structure of a mask tree; holes and packed masks count as leaves."""
    flat, structure = jax.tree.flatten(masks, is_leaf=is_mask)
    return [as_packed(mask) for mask in flat], structure


def names_of(structure: Any) -> list[str]:
    """Normalised leaf names of a structure that ``flatten`` gave."""
    return leaf_names(jax.tree.unflatten(structure, [0] * structure.num_leaves))


def mask_shape(mask: Any) -> tuple[int, ...]:
    """Shape of the weights of a plain or packed mask."""
    mask = as_packed(mask)
    if not isinstance(mask, PackedMask):
        return mask.shape
    *rows, last = mask.bits.shape
    return (*rows, 8 * last - mask.spare.shape[-1] + 1)


@boundary("pack")
def pack(mask: jax.Array) -> PackedMask:
    """Stores a boolean array with one bit per weight, eight along the last axis.

    Args:
      mask: Boolean array of any shape with at least one dimension.

    Returns:
      A ``PackedMask`` of ceil(last / 8) bytes per row.

    Raises:
      ValueError: If the mask is a scalar, or an Explicit mesh splits the last axis
        within a byte. (An Auto mesh gathers such a mask.)

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> packed = sparse_optax.masks.pack(jnp.ones((3, 10), bool))
      >>> packed.bits.shape, bool(sparse_optax.masks.unpack(packed).all())
      ((3, 2), True)
    """
    if not mask.ndim:
        raise ArgumentError(
            "a scalar mask has no axis to pack. Use packed=False, or leave scalars "
            "out with `where`."
        )
    sharding = jax.typeof(mask).sharding
    if not sharding.mesh.empty and sharding.spec[-1] is not None:
        axes = sharding.spec[-1]
        axes = axes if isinstance(axes, tuple) else (axes,)
        parts = int(np.prod([sharding.mesh.shape[a] for a in axes]))
        if mask.shape[-1] % (8 * parts):
            raise ArgumentError(
                f"`packed`: the last axis of a mask of shape {mask.shape} is cut into "
                f"{parts} parts that are not whole bytes; its length must be a "
                f"multiple of {8 * parts}. Shard another axis, or use packed=False."
            )
    # NumPy's packing has no rule for arrays without entries.
    rows, last = mask.shape[:-1], mask.shape[-1]
    bits = (
        jnp.packbits(mask, axis=-1)
        if mask.size
        else jnp.zeros((*rows, -(-last // 8)), jnp.uint8)
    )
    unused = 8 * bits.shape[-1] - mask.shape[-1]
    return PackedMask(bits, jnp.zeros((unused + 1,), jnp.uint8))


def unpack(mask: jax.Array | PackedMask) -> jax.Array:
    """The boolean array of a packed mask; a plain mask is returned.

    Wrappers that do arithmetic on states (``optax.contrib.sam``) turn bools and bytes
    into integers, which are read as bools and bytes.

    Args:
      mask: A ``PackedMask`` or a boolean array.

    Returns:
      A boolean array.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> masks.unpack(masks.pack(jnp.array([True, False, True]))).tolist()
      [True, False, True]
    """
    mask = as_packed(mask)
    if not isinstance(mask, PackedMask):
        integer = jnp.issubdtype(getattr(mask, "dtype", bool), jnp.integer)
        return mask.astype(bool) if integer else mask
    if not mask.bits.size:
        return jnp.zeros(mask_shape(mask), bool)
    bits = mask.bits.astype(jnp.uint8)
    return jnp.unpackbits(bits, axis=-1, count=mask_shape(mask)[-1]).astype(bool)


def is_nonzero(x: jax.Array) -> jax.Array:
    """Which entries are nonzero, by bits: CPUs compare subnormals as zero."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.logical_or(is_nonzero(jnp.real(x)), is_nonzero(jnp.imag(x)))
    width = jnp.finfo(x.dtype).bits
    if width < 8:
        return x != 0
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    return bits << 1 != 0  # the sign of zero shifted out


# --- counts -------------------------------------------------------------------------
def slice_counts(mask: jax.Array) -> jax.Array:
    """True entries in each slice along axis 0, int32; for a scalar the count itself.
    An int32 could not hold the count of a whole leaf of 2^31 weights.
    """
    return jnp.sum(mask, axis=tuple(range(1, mask.ndim)), dtype=jnp.int32)


def whole_count(mask: jax.Array) -> int:
    """True entries of a concrete mask of any size, as a Python integer."""
    return int(np.asarray(slice_counts(mask)).sum(dtype=np.int64))


@boundary("masks.count")
def count(masks: PyTree) -> int:
    """Number of kept weights.

    Args:
      masks: A concrete mask tree.

    Returns:
      The exact count over all leaves, as a Python integer.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> sparse_optax.masks.count({"w": jnp.array([True, False, True])})
      2
    """
    _check_arrays(masks)
    kept = [m for m in flatten(masks)[0] if not is_hole(m)]
    # Under a trace, concrete masks are constants and are counted at trace time.
    with jax.ensure_compile_time_eval():
        return sum(whole_count(unpack(m)) for m in kept)


@boundary("masks.density")
def density(masks: PyTree) -> float:
    """Fraction of kept weights among all weights that take part.

    Args:
      masks: A concrete mask tree.

    Returns:
      A number in [0, 1]; 1 if no leaf takes part.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> sparse_optax.masks.density({"w": jnp.array([True, False])})
      0.5
    """
    _check_arrays(masks)
    shapes = [mask_shape(m) for m in flatten(masks)[0] if not is_hole(m)]
    size = sum(int(np.prod(shape)) for shape in shapes)
    return unnamed(count)(masks) / size if size else 1.0


def _check_arrays(masks: PyTree) -> None:
    """Raises unless all masks are arrays; those of `optax.contrib.sam` are integers."""
    flat, structure = flatten(masks)
    for name, mask in zip(names_of(structure), flat, strict=True):
        if is_mask(mask):
            continue
        if not hasattr(mask, "ndim"):
            raise ArgumentError(
                f"`masks` must be a tree of boolean arrays; got {mask!r}. Pass a mask "
                "tree, such as sparse_optax.get_masks(opt_state)."
            )
        if mask.dtype != bool and not jnp.issubdtype(mask.dtype, jnp.integer):
            raise ArgumentError(
                f"in `masks`, {name!r} has dtype {mask.dtype}; it must be bool. Pass "
                "masks; those of weights that are not zero are "
                "masks.nonzero_masks(params)."
            )


# --- masks and parameters -----------------------------------------------------------
def check_names(masks: Any, params: Sequence[str]) -> None:
    """Raises unless the masks have the leaves of the parameters, by name."""
    names = names_of(masks)
    if names != list(params):
        raise ArgumentError(
            f"the masks have the leaves {names} and `params` {list(params)}; the "
            "structures must be equal. Pass the tree that the masks were made for."
        )


def check_shapes(
    masks: Sequence[Any], params: Sequence[Any], names: Sequence[str]
) -> None:
    """Raises unless there is a mask for each parameter, of its shape."""
    if len(masks) != len(params):
        raise ArgumentError(
            f"the masks have {len(masks)} leaves and `params` {len(params)}; the "
            "structures must be equal. Pass the tree that the masks were made for."
        )
    for mask, param, name in zip(masks, params, names, strict=True):
        if not is_hole(mask) and mask_shape(mask) != tuple(param.shape):
            raise ArgumentError(
                f"the mask of {name!r} has shape {mask_shape(mask)} and `params` "
                f"{tuple(param.shape)}; they must be equal. Pass masks made for these "
                "parameters."
            )


def check_gradient(updates: PyTree, params: PyTree) -> None:
    """Raises unless the gradient has the leaves of the parameters, and their shapes."""
    gradient, flat = (jax.tree.leaves(x, is_leaf=is_hole) for x in (updates, params))
    if len(gradient) != len(flat):
        raise ArgumentError(
            f"the gradient has {len(gradient)} leaves and `params` {len(flat)}; the "
            "structures must be equal. Pass gradients of these parameters."
        )
    for g, x, name in zip(gradient, flat, leaf_names(params), strict=True):
        arrays = hasattr(g, "shape") and hasattr(x, "shape")
        if arrays and jnp.shape(g) != jnp.shape(x):
            raise ArgumentError(
                f"the gradient of {name!r} has shape {jnp.shape(g)} and `params` "
                f"{jnp.shape(x)}; they must be equal. Pass gradients of these "
                "parameters."
            )


def check_dtype(mask: Any, name: str, argument: str = "masks") -> None:
    """Raises unless a mask is boolean."""
    dtype = getattr(mask, "dtype", jnp.dtype(bool))
    if dtype != jnp.dtype(bool):
        raise ArgumentError(
            f"in `{argument}`, {name!r} has dtype {dtype}; it must be bool. Pass "
            "mask.astype(bool)."
        )


def check_masks(argument: str, masks: Any) -> None:
    """Raises unless every leaf of a tree is a boolean array, a hole or packed."""
    flat, structure = flatten(masks)
    for name, mask in zip(names_of(structure), flat, strict=True):
        if is_mask(mask):
            continue
        if not hasattr(mask, "dtype") or not hasattr(mask, "ndim"):
            at = f" for {name!r}" if name else ""
            raise ArgumentError(
                f"`{argument}` must be a tree of boolean arrays; got {mask!r}{at}, of "
                f"type {type(mask).__name__}. Pass a mask tree, such as "
                "sparse_optax.get_masks(opt_state)."
            )
        check_dtype(mask, name, argument)


def check_some_masks(argument: str, masks: PyTree) -> None:
    """Raises if a tree has holes only."""
    if all(map(is_hole, flatten(masks)[0])):
        raise ArgumentError(
            f"`{argument}` holds no mask; it must hold at least one. Pass masks such "
            "as sparse_optax.masks.magnitude_masks(params, 0.1)."
        )


def check_some_kept(argument: str, masks: Sequence[Any]) -> None:
    """Raises if known masks keep none of their weights: nothing would ever train."""
    kept = [unpack(m) for m in masks if not is_hole(m)]
    if any(map(is_abstract, kept)) or not sum(m.size for m in kept):
        return
    if not any(map(whole_count, kept)):
        raise ArgumentError(
            f"`{argument}` keep none of {sum(m.size for m in kept)} weights; they must "
            "keep at least one. Pass masks such as "
            "sparse_optax.masks.magnitude_masks(params, 0.1)."
        )


def layers_of_masks(
    masks: PyTree,
    params: PyTree,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern = SINGLE,
) -> Layers:
    """The layers that have masks; they rebuild trees like the masks'."""
    kept, structure = flatten(masks)
    flat, names = jax.tree.leaves(params, is_leaf=is_hole), leaf_names(params)
    check_names(structure, names)
    check_shapes(kept, flat, names)
    chosen = [not is_hole(m) for m in kept]
    return chosen_layers(params, chosen, stacked, pattern, structure)


@boundary("masks.apply")
def apply(masks: PyTree, tree: PyTree) -> PyTree:
    """Sets every missing weight to exactly zero: ``where(mask, x, 0)``.

    A product would not do: ``inf * 0`` is NaN.

    Args:
      masks: A mask tree.
      tree: A tree of the same structure; leaves at a hole are returned as they are.

    Returns:
      The masked tree, dtypes unchanged.

    Raises:
      ValueError: If the numbers of leaves or a shape differ.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> mask = {"w": jnp.array([True, False])}
      >>> sparse_optax.masks.apply(mask, {"w": jnp.array([2.0, jnp.inf])})["w"].tolist()
      [2.0, 0.0]
    """
    kept, _ = flatten(masks)
    flat, structure = jax.tree.flatten(tree, is_leaf=is_hole)
    check_shapes(kept, flat, leaf_names(tree))
    return jax.tree.unflatten(
        structure,
        [
            x if is_hole(m) else jnp.where(unpack(m), x, jnp.zeros((), x.dtype))
            for m, x in zip(kept, flat, strict=True)
        ],
    )


@boundary("masks.combine")
def combine(operator: Callable[..., jax.Array], *masks: PyTree) -> PyTree:
    """Combines mask trees leaf by leaf.

    Args:
      operator: A function of boolean arrays, such as ``jnp.logical_or``.
      *masks: Mask trees with masks for the same leaves, plain or packed; one or more.

    Returns:
      A mask tree of plain arrays, with the structure of the first.

    Raises:
      ValueError: If the trees have masks for different leaves, or of other shapes.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([True, True])}
      >>> sparse_optax.masks.combine(jnp.logical_and, a, b)["w"].tolist()
      [True, False]
    """
    return _combined(operator, masks)


@boundary("masks.union")
def union(*masks: PyTree) -> PyTree:
    """Weights that at least one of several mask trees keeps.

    Args:
      *masks: Mask trees with masks for the same leaves, plain or packed; one or more.

    Returns:
      A mask tree of plain arrays, with the structure of the first.

    Raises:
      ValueError: If the trees have masks for different leaves, or of other shapes.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> a, b = ({"w": jnp.array(x, bool)} for x in ([1, 0, 0], [0, 1, 0]))
      >>> sparse_optax.masks.union(a, b)["w"].tolist()
      [True, True, False]
    """
    return _combined(lambda *m: functools.reduce(jnp.logical_or, m), masks)


@boundary("masks.difference")
def difference(masks: PyTree, *others: PyTree) -> PyTree:
    """Weights that the first mask tree keeps and none of the others.

    For instance what a second task adds to a first one. Weights that no task uses are
    ``combine(jnp.logical_not, used)``.

    Args:
      masks: A mask tree, plain or packed.
      *others: Mask trees with masks for the same leaves.

    Returns:
      A mask tree of plain arrays, with the structure of the first.

    Raises:
      ValueError: If the trees have masks for different leaves, or of other shapes.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> a, b = ({"w": jnp.array(x, bool)} for x in ([1, 1, 0], [0, 1, 1]))
      >>> sparse_optax.masks.difference(a, b)["w"].tolist()
      [True, False, False]
    """

    def left(first, *rest):
        return functools.reduce(lambda m, x: jnp.logical_and(m, ~x), rest, first)

    return _combined(left, (masks, *others))


def _combined(operator: Callable[..., jax.Array], trees: Sequence[PyTree]) -> PyTree:
    """An operator on the masks of each leaf; all trees must take the same leaves."""
    if not trees:
        raise ArgumentError("`masks` is empty; give one mask tree or more.")
    first, structure = flatten(trees[0])
    names = names_of(structure)
    columns = [[m] for m in first]
    for tree in trees[1:]:
        other, others_structure = flatten(tree)
        check_names(others_structure, names)
        for name, m, column in zip(names, other, columns, strict=True):
            if is_hole(m) != is_hole(column[0]):
                raise ArgumentError(
                    f"only one of the `masks` has a mask for {name!r}, and the other a "
                    "hole; all must take the same leaves. Use masks.fill on both."
                )
            if not is_hole(m):
                check_shapes([m], [unpack(column[0])], [name])
            column.append(m)
    return jax.tree.unflatten(
        structure,
        [c[0] if is_hole(c[0]) else operator(*map(unpack, c)) for c in columns],
    )


@boundary("masks.fill")
def fill(masks: PyTree, params: PyTree) -> PyTree:
    """Turns holes into all-True masks, so that every parameter has an array.

    Args:
      masks: A mask tree.
      params: The parameters.

    Returns:
      A tree of boolean arrays with the structure of ``params``.

    Raises:
      ValueError: If the numbers of leaves or a shape differ.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax import masks
      >>> masks.fill({"b": optax.MaskedNode()}, {"b": jnp.zeros(2)})["b"].tolist()
      [True, True]
    """
    kept, _ = flatten(masks)
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    check_shapes(kept, flat, leaf_names(params))
    filled = [
        jnp.ones_like(x, dtype=bool) if is_hole(m) and not is_hole(x) else unpack(m)
        for m, x in zip(kept, flat, strict=True)
    ]
    return jax.tree.unflatten(structure, filled)
