"""Masks inside optimizer states: read them, replace them, apply them to parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax.leaves import PyTree, is_hole, leaf_names
from sparse_optax.mask_trees import (
    PackedMask,
    check_shapes,
    flatten,
    mask_shape,
    pack,
    unpack,
)


def _has_masks(node: Any) -> bool:
    # By field, not by class: the engine's state is defined further down the list of
    # modules. Optax's own accessors go by field name too.
    return hasattr(node, "regrow_masks")


def get_masks(opt_state: PyTree) -> PyTree:
    """Masks in an optimizer state, merged over every engine state it holds.

    Args:
      opt_state: Any optimizer state: chained, partitioned, masked, injected or
        accumulated.

    Returns:
      A mask tree with the structure of the parameters.

    Raises:
      ValueError: If there is no engine state, or two of them mask one leaf.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.sparse_momentum_regrow(
      ...     optax.sgd(0.1, momentum=0.9), density=0.25, update_period=10,
      ...     update_stop=100, key=0)
      >>> state = tx.init({"w": jnp.ones((4, 5))})
      >>> sparse_optax.masks.count(sparse_optax.get_masks(state))
      5
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=_has_masks)
    found = [node.regrow_masks for node in nodes if _has_masks(node)]
    if not found:
        raise ValueError(
            "get_masks: `opt_state` holds no masks; it must come from an optimizer "
            "with a sparse training method of this package, such as "
            "sparse_momentum_regrow. Pass that optimizer's state."
        )
    merged, structure = flatten(found[0])
    for other in found[1:]:
        for i, mask in enumerate(flatten(other)[0]):
            if is_hole(mask):
                continue
            if not is_hole(merged[i]):
                raise ValueError(
                    "get_masks: two states in `opt_state` mask the leaf "
                    f"{leaf_names(found[0])[i]!r}; each leaf may have one method. "
                    "Give the methods disjoint leaves through `where` or "
                    "optax.partition."
                )
            merged[i] = mask
    return jax.tree.unflatten(
        structure, [m if is_hole(m) else unpack(m) for m in merged]
    )


def set_masks(opt_state: PyTree, masks: PyTree) -> PyTree:
    """Replaces the masks in an optimizer state.

    Args:
      opt_state: An optimizer state with at least one engine state.
      masks: A mask tree with the structure of the parameters. Where a state has a
        hole, it is not read.

    Returns:
      The state with the new masks; the next cycle keeps their count.

    Raises:
      ValueError: If there is no engine state, or the masks do not fit.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.sparse_momentum_regrow(
      ...     optax.sgd(0.1, momentum=0.9), density=0.25, update_period=10,
      ...     update_stop=100, key=0)
      >>> state = tx.init({"w": jnp.ones((4, 5))})
      >>> new = {"w": jnp.arange(20).reshape(4, 5) < 5}
      >>> state = sparse_optax.set_masks(state, new)
      >>> bool((sparse_optax.get_masks(state)["w"] == new["w"]).all())
      True
    """
    get_masks(opt_state)  # raises where there is none
    given, _ = flatten(masks)

    def replace(node):
        if not _has_masks(node):
            return node
        old, structure = flatten(node.regrow_masks)
        names = leaf_names(jax.tree.unflatten(structure, list(range(len(old)))))
        if len(given) != len(old):
            check_shapes(given, old, names, caller="set_masks")
        new = []
        for mask, previous, name in zip(given, old, names, strict=True):
            if is_hole(previous):
                new.append(previous)
                continue
            if is_hole(mask) or mask_shape(mask) != mask_shape(previous):
                raise ValueError(
                    f"set_masks: the mask of {name!r} must have shape "
                    f"{mask_shape(previous)}; got "
                    f"{'a hole' if is_hole(mask) else mask_shape(mask)}. "
                    "Pass a boolean array of that shape."
                )
            plain = jnp.asarray(unpack(mask), bool)
            new.append(pack(plain) if isinstance(previous, PackedMask) else plain)
        return node._replace(regrow_masks=jax.tree.unflatten(structure, new))

    return jax.tree.map(replace, opt_state, is_leaf=_has_masks)


def sparsify(params: PyTree, masks_or_state: PyTree) -> PyTree:
    """Sets missing weights to zero: before the first step, or on averaged weights.

    Leaves are paired by normalised name, so masks found under ``flax.nnx`` fit a
    plain tree of arrays and the other way round.

    Args:
      params: The parameters.
      masks_or_state: A mask tree, or an optimizer state that holds one.

    Returns:
      The parameters in their own type, missing weights exactly zero.

    Raises:
      ValueError: If a mask has no parameter of its name, or another shape.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.ones(2), "w": jnp.ones((1, 2))}
      >>> mask = {"w": jnp.array([[True, False]])}
      >>> sparse_optax.sparsify(params, mask)["w"].tolist()
      [[1.0, 0.0]]
    """
    nodes = jax.tree.leaves(masks_or_state, is_leaf=_has_masks)
    if any(_has_masks(node) for node in nodes):
        masks_or_state = get_masks(masks_or_state)
    kept, mask_structure = flatten(masks_or_state)
    names = leaf_names(jax.tree.unflatten(mask_structure, list(range(len(kept)))))
    by_name = {n: m for n, m in zip(names, kept, strict=True) if not is_hole(m)}
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    result = []
    for name, x in zip(leaf_names(params), flat, strict=True):
        mask = by_name.pop(name, None)
        if mask is None:
            result.append(x)
            continue
        check_shapes([mask], [x], [name], caller="sparsify")
        result.append(jnp.where(unpack(mask), x, jnp.zeros((), x.dtype)))
    if by_name:
        raise ValueError(
            f"sparsify: no parameter is named {sorted(by_name)}; the parameters are "
            f"{leaf_names(params)}. Pass masks made for these parameters."
        )
    return jax.tree.unflatten(structure, result)
