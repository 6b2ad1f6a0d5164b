"""Masks inside optimizer states: read them, replace them, apply them to parameters."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax.leaves import PyTree, is_hole, leaf_names, path_name
from sparse_optax.mask_trees import (
    PackedMask,
    check_shapes,
    flatten,
    is_mask,
    mask_shape,
    names_of,
    pack,
    unpack,
)


def _has_masks(node: Any) -> bool:
    # By field, not by class: the engine's state is defined further down the list of
    # modules. Optax's own accessors go by field name too.
    return hasattr(node, "regrow_masks")


def _mask_trees(opt_state: PyTree) -> list[PyTree]:
    """Mask trees of all engine states, one inside another included."""
    found = []
    for node in jax.tree.leaves(opt_state, is_leaf=_has_masks):
        if _has_masks(node):
            found += [node.regrow_masks, *_mask_trees(node.inner_state)]
    return found


def _merge(a: PyTree, b: PyTree, path: tuple = ()) -> PyTree:
    """Both trees in one. A hole may stand for a leaf or for a whole subtree."""
    if is_hole(a):
        return b
    if is_hole(b):
        return a

    def is_child(tree):
        return lambda node: node is not tree

    children, structure = jax.tree_util.tree_flatten_with_path(a, is_leaf=is_child(a))
    others = jax.tree.leaves(b, is_leaf=is_child(b))
    if is_mask(a) or not children or children[0][1] is a:
        if not children and not is_mask(a):
            return a
        raise ValueError(
            f"get_masks: two states in `opt_state` mask the leaf {path_name(path)!r}; "
            "each leaf may have one method. Give the methods disjoint leaves through "
            "`where` or optax.partition."
        )
    merged = [
        _merge(x, y, (*path, *key))
        for (key, x), y in zip(children, others, strict=True)
    ]
    return jax.tree.unflatten(structure, merged)


def get_masks(opt_state: PyTree) -> PyTree:
    """Masks in an optimizer state, merged over every engine state it holds.

    Args:
      opt_state: Any optimizer state: chained, partitioned, masked, injected or
        accumulated.

    Returns:
      A mask tree with the structure of the parameters. Its arrays are the state's
      own: copy them before a training step that donates the state.

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
    found = _mask_trees(opt_state)
    if not found:
        raise ValueError(
            "get_masks: `opt_state` holds no masks; it must come from an optimizer "
            "with a sparse training method of this package, such as "
            "sparse_momentum_regrow. Pass that optimizer's state."
        )
    merged, structure = flatten(functools.reduce(_merge, found))
    return jax.tree.unflatten(
        structure, [m if is_hole(m) else unpack(m) for m in merged]
    )


def get_explored(opt_state: PyTree) -> PyTree:
    """Which weights were ever active, where a growth rule remembers it.

    Args:
      opt_state: An optimizer state with ``in_time_over_parameterization`` in it, or
        another method that grows by ``regrowth.grow.unexplored``.

    Returns:
      A mask tree with the structure of the parameters, for
      ``report.summary(params, opt_state, explored=...)``; its ``masks.density`` is
      the explored share R_s. It is brought up to date by each cycle. With a
      ``pattern`` it has an entry a unit, and its density is a share of units.

    Raises:
      ValueError: If no rule remembers, or two of them do for one leaf.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.in_time_over_parameterization(
      ...     optax.sgd(0.1), density=0.25, update_period=1, update_stop=4, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     explored = sparse_optax.state.get_explored(state)
      ...     print(sparse_optax.masks.density(explored))
      ...     _, state = tx.update(params, state, params)
      0.25
      0.25
      0.35
    """

    def remembers(node):
        return hasattr(node, "explored")

    nodes = jax.tree.leaves(opt_state, is_leaf=remembers)
    found = [node.explored.values for node in nodes if remembers(node)]
    if not found:
        raise ValueError(
            "get_explored: no rule in `opt_state` remembers; it must come from "
            "in_time_over_parameterization, or grow by grow.unexplored. Use "
            "report.explore to count beside the training."
        )
    return functools.reduce(_merge, found)


def set_masks(opt_state: PyTree, masks: PyTree) -> PyTree:
    """Replaces the masks in an optimizer state.

    Args:
      opt_state: An optimizer state with at least one engine state.
      masks: A mask tree with the structure of the parameters. Where a state has a
        hole, it is not read.

    Returns:
      The state with the new masks. The next cycle keeps their count, unless the
      method's budget moves; under a pattern they must follow it, which is not checked.
      A hidden weight that is switched on starts at zero.

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
    given = _by_name(masks)
    used: set[str] = set()

    def replace(node):
        if not _has_masks(node):
            return node
        old, structure = flatten(node.regrow_masks)
        new = []
        for previous, name in zip(old, names_of(structure), strict=True):
            if is_hole(previous):
                new.append(previous)
                continue
            mask = given.get(name)
            if mask is None or mask_shape(mask) != mask_shape(previous):
                got = "none" if mask is None else f"shape {mask_shape(mask)}"
                raise ValueError(
                    f"set_masks: `masks` must hold a mask of shape "
                    f"{mask_shape(previous)} for {name!r}; got {got}. Pass masks made "
                    "for these parameters."
                )
            used.add(name)
            # Copied: the state may be donated, the caller's masks may not.
            plain = jnp.array(unpack(mask), bool, copy=True)
            new.append(pack(plain) if isinstance(previous, PackedMask) else plain)
        return node._replace(
            regrow_masks=jax.tree.unflatten(structure, new),
            inner_state=jax.tree.map(replace, node.inner_state, is_leaf=_has_masks),
        )

    replaced = jax.tree.map(replace, opt_state, is_leaf=_has_masks)
    if unknown := sorted(given.keys() - used):
        raise ValueError(
            f"set_masks: `masks` holds {unknown}, which no state masks; the names must "
            f"be among {sorted(used)}. Leave them out."
        )
    return replaced


def _by_name(masks: PyTree) -> dict[str, Any]:
    kept, structure = flatten(masks)
    names = names_of(structure)
    return {n: m for n, m in zip(names, kept, strict=True) if not is_hole(m)}


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
    by_name = _by_name(masks_or_state)
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
