"""Masks in optimizer states: reads, replaces and applies them."""

import functools
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.layers import (
    PyTree,
    is_abstract,
    is_hole,
    is_mask,
    is_packed,
    leaf_names,
    path_name,
)
from sparse_optax.masks.tree import (
    check_masks,
    check_shapes,
    check_some_kept,
    check_some_masks,
    flatten,
    mask_shape,
    names_of,
    pack,
    unpack,
    whole_count,
)
from sparse_optax.masks.tree import count as count_masks


def states_with(opt_state: PyTree, *fields: str) -> Iterator[Any]:
    """Every state that has one of these fields, nested states included. States are
    found by field, not by class: wrappers such as flax.nnx keep the fields, and the
    states are defined in later modules.
    """

    def is_state(node):
        return any(hasattr(node, field) for field in fields)

    for node in jax.tree.leaves(opt_state, is_leaf=is_state):
        if is_state(node):
            yield node
            yield from states_with(getattr(node, "inner_state", ()), *fields)


def named_masks(masks_or_state: PyTree, argument: str = "masks") -> dict[str, Any]:
    """Masks by the normalised name of their leaf, plain or packed, without holes."""
    if any(True for _ in states_with(masks_or_state, "regrow_masks")):
        masks_or_state = get_masks(masks_or_state)
    flat, structure = flatten(masks_or_state)
    check_masks(argument, masks_or_state)
    named = dict(zip(names_of(structure), flat, strict=True))
    return {name: mask for name, mask in named.items() if not is_hole(mask)}


def _has_masks(node: Any) -> bool:
    return hasattr(node, "regrow_masks")


def _merge(a: PyTree, b: PyTree, path: tuple = ()) -> PyTree:
    """Merges two trees. A hole may stand for a leaf or for a whole subtree."""
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
        raise ArgumentError(
            f"two states in `opt_state` mask the leaf {path_name(path)!r}; "
            "each leaf may have one method. Give the methods disjoint leaves through "
            "`where` or optax.partition."
        )
    merged = [
        _merge(x, y, (*path, *key))
        for (key, x), y in zip(children, others, strict=True)
    ]
    return jax.tree.unflatten(structure, merged)


@boundary("get_masks")
def get_masks(opt_state: PyTree) -> PyTree:
    """Masks in an optimizer state, merged over all states of ``regrow`` in it.

    Args:
      opt_state: An optimizer state, also chained, partitioned, masked or injected.

    Returns:
      A mask tree like the parameters. Its arrays belong to the state: copy them before
      a training step that donates the state.

    Raises:
      ValueError: Without a state of ``regrow``, or if two of them mask one leaf.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.sparse_momentum_regrow(
      ...     optax.sgd(0.1, momentum=0.9), density=0.25, update_period=10,
      ...     update_stop=100, key=0)
      >>> state = tx.init({"w": jnp.ones((4, 5))})
      >>> sparse_optax.masks.count(sparse_optax.get_masks(state))
      5
    """
    found = [s.regrow_masks for s in states_with(opt_state, "regrow_masks")]
    if not found:
        raise ArgumentError(
            f"`opt_state` holds no masks; got {type(opt_state).__name__}, and it must "
            "come from an optimizer with a sparse training method of this package, "
            "such as sparse_momentum_regrow. Pass that optimizer's state."
        )
    merged, structure = flatten(functools.reduce(_merge, found))
    return jax.tree.unflatten(
        structure, [m if is_hole(m) else unpack(m) for m in merged]
    )


def freezes(opt_state: PyTree) -> bool:
    """Whether a state leaves weights outside of its masks as they are, instead of zero:
    ``static_sparse(freeze=True)``, or a method with ``within``.
    """
    states = states_with(opt_state, "regrow_masks")
    return any(jax.tree.leaves(getattr(s, "frozen", ())) for s in states)


def kept_masks(masks_or_state: PyTree, argument: str = "masks") -> dict[str, Any]:
    """Masks by name of the weights that are not held at zero: the active ones, and
    those that a state freezes. A mask tree freezes none.
    """
    named = named_masks(masks_or_state, argument)
    for state in states_with(masks_or_state, "regrow_masks"):
        for name, frozen in _named_frozen(state).items():
            if name in named:
                mask = unpack(named[name])
                # A scalar, or one for each member of an ensemble, is for a whole leaf.
                axes = frozen.shape + (1,) * (mask.ndim - frozen.ndim)
                named[name] = jnp.logical_or(mask, frozen.reshape(axes))
    return named


def _named_frozen(state: Any) -> dict[str, jax.Array]:
    """What a state of ``regrow`` freezes, by the name of the leaf."""
    flat, structure = flatten(getattr(state, "frozen", ()))
    pairs = zip(names_of(structure), flat, strict=True)
    return {name: jnp.asarray(unpack(x)) for name, x in pairs if not is_hole(x)}


def _check_not_frozen(name: str, mask: jax.Array, frozen: jax.Array | None) -> None:
    """Raises if a mask keeps weights that `within` excludes; a scalar excludes none."""
    if frozen is None or frozen.shape != mask.shape or not mask.ndim:
        return
    outside = jnp.logical_and(mask, frozen)
    if not isinstance(outside, Tracer) and bool(jnp.any(outside)):
        raise ArgumentError(
            f"`masks` keeps {int(outside.sum())} weights of {name!r} that the method's "
            "`within` excludes; there must be none. Pass "
            "masks.combine(jnp.logical_and, masks, within)."
        )


@boundary("get_explored")
def get_explored(opt_state: PyTree) -> PyTree:
    """Which weights were ever active, if a growth rule records it.

    Args:
      opt_state: An optimizer state with ``in_time_over_parameterization``, or another
        method that grows by ``regrowth.grow.unexplored``.

    Returns:
      A mask tree like the parameters, for ``report.summary(params, opt_state,
      explored=...)``. Its ``masks.density`` is the explored share R_s. Each cycle
      updates it. With a ``pattern`` it has one entry per unit.

    Raises:
      ValueError: If no rule records it, or two rules do for one leaf.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.in_time_over_parameterization(
      ...     optax.sgd(0.1), density=0.25, update_period=1, update_stop=4, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> shares = []
      >>> for _ in range(3):
      ...     explored = sparse_optax.masks.get_explored(state)
      ...     shares.append(sparse_optax.masks.density(explored))
      ...     _, state = tx.update(params, state, params)
      >>> shares[0], shares == sorted(shares), shares[-1] > 0.25
      (0.25, True, True)
    """

    def remembers(node):
        return hasattr(node, "explored")

    nodes = jax.tree.leaves(opt_state, is_leaf=remembers)
    found = [node.explored.values for node in nodes if remembers(node)]
    if not found:
        raise ArgumentError(
            "no rule in `opt_state` remembers; it must come from "
            "in_time_over_parameterization, or grow by grow.unexplored. Use "
            "report.explore to count beside the training."
        )
    return functools.reduce(_merge, found)


@boundary("set_masks")
def set_masks(
    opt_state: PyTree, masks: PyTree, *, count: jax.Array | int | None = None
) -> PyTree:
    """Replaces the masks in an optimizer state.

    Args:
      opt_state: An optimizer state with at least one state of ``regrow``.
      masks: A mask tree, paired by name. Leaves that it lacks, or that are holes in it,
        keep their masks, so that one layer can be given alone.
      count: Number of finished updates that belongs to the masks, for the prune rate,
        the times of cycles and a ``ramp``; None keeps the state's own. Counters of the
        inner optimizer stay.

    Returns:
      The state with the new masks. The next cycle keeps their number of weights, unless
      the method has a ``ramp``: then it goes to the ramp's number at that count. They
      must follow the ``pattern``, which is not checked. A hidden weight that becomes
      active starts at zero.

    Raises:
      ValueError: If there is no state of ``regrow``, the masks do not fit, or a method
        with a ``ramp`` starts with masks of another number of weights and no ``count``.

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
    unnamed(get_masks)(opt_state)  # raises where there is none
    if count is not None:
        checks.whole("count", count, 0, most=checks.MOST_UPDATES, cure=_COUNT)
    given = named_masks(masks)
    check_some_masks("masks", given)
    used: set[str] = set()
    known: set[str] = set()

    def as_count(old):
        return jnp.full_like(old, 0 if count is None else count, dtype=jnp.int32)

    def replace(node):
        if not _has_masks(node):
            return node
        old, structure = flatten(node.regrow_masks)
        frozen = _named_frozen(node)
        new = []
        for previous, name in zip(old, names_of(structure), strict=True):
            if is_hole(previous):
                new.append(previous)
                continue
            known.add(name)
            mask = given.get(name)
            if mask is None:
                new.append(previous)
                continue
            if mask_shape(mask) != mask_shape(previous):
                raise ArgumentError(
                    f"`masks` holds a mask of shape {mask_shape(mask)} for {name!r}; "
                    f"it must be {mask_shape(previous)}. Pass masks made for these "
                    "parameters, or masks.random_masks(key, params, budget, "
                    "keep=masks) for a layer of another shape."
                )
            used.add(name)
            # Copied: the state may be donated, the caller's masks may not.
            plain = jnp.array(unpack(mask), bool, copy=True)
            _check_not_frozen(name, plain, frozen.get(name))
            new.append(unnamed(pack)(plain) if is_packed(previous) else plain)
        if not jax.tree.leaves(node.ramp):
            check_some_kept("masks", new)
        if count is None:
            _check_start(node, old, new)
        else:
            node = node._replace(count=jax.tree.map(as_count, node.count))
        return node._replace(
            regrow_masks=jax.tree.unflatten(structure, new),
            inner_state=jax.tree.map(replace, node.inner_state, is_leaf=_has_masks),
        )

    replaced = jax.tree.map(replace, opt_state, is_leaf=_has_masks)
    if unknown := sorted(given.keys() - used):
        raise ArgumentError(
            f"`masks` holds {unknown}, which no state masks; the names must "
            f"be among {sorted(known)}. Leave them out."
        )
    return replaced


_COUNT = "Give the number of updates after which the masks were read."


def _check_start(state: Any, old: Sequence[Any], new: Sequence[Any]) -> None:
    """Raises if a ramp would begin at masks of another number of weights."""
    counts, masks = jax.tree.leaves(state.count), jax.tree.leaves((old, new))
    if not jax.tree.leaves(state.ramp) or any(map(is_abstract, (*counts, *masks))):
        return
    before, after = (
        sum(whole_count(unpack(m)) for m in group if not is_hole(m))
        for group in (old, new)
    )
    if before != after and not any(np.any(np.asarray(n)) for n in counts):
        raise ArgumentError(
            f"`count` is None, and the method has a ramp: it goes by the number of "
            f"finished updates, 0 in this state, and would bring the {after} weights "
            f"of `masks` back towards {before} at its next cycle; `count` must be an "
            "integer of at least 0. Give the count of the state that the masks come "
            'from, optax.tree.get(old_state, "count"), or 0 to begin the ramp anew.'
        )


@boundary("sparsify")
def sparsify(params: PyTree, masks_or_state: PyTree) -> PyTree:
    """Sets missing weights to zero: before the first step, or in averaged weights.

    Leaves are paired by normalised name: masks of ``flax.nnx`` fit a plain tree.

    Args:
      params: The parameters.
      masks_or_state: A mask tree, or an optimizer state that holds one. Weights that a
        state freezes (``static_sparse(freeze=True)``, ``within``) stay as they are.

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
    return sparsified(params, fitting_masks(params, masks_or_state, "masks_or_state"))


def fitting_masks(params: PyTree, masks_or_state: Any, argument: str) -> dict[str, Any]:
    """``kept_masks`` of some of the parameters; raises if one has no parameter."""
    if masks_or_state is None or isinstance(masks_or_state, str | numbers.Number):
        raise ArgumentError(
            f"`{argument}` must be a mask tree or an optimizer state; got "
            f"{masks_or_state!r}. Make masks, such as "
            "masks.magnitude_masks(params, 0.1), and pass them."
        )
    found = kept_masks(masks_or_state, argument)
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    leaves = dict(zip(leaf_names(params), flat, strict=True))
    if unknown := sorted(found.keys() - leaves.keys()):
        raise ArgumentError(
            f"in `{argument}`, no parameter is named {unknown}; the parameters are "
            f"{list(leaves)}. Pass masks made for these parameters."
        )
    for name, mask in found.items():
        check_shapes([mask], [leaves[name]], [name])
    return found


def count_kept(params: PyTree, masks_or_state: Any, argument: str) -> int:
    """How many parameters are not held at zero, in leaves with and without a mask."""
    found = fitting_masks(params, masks_or_state, argument)
    masked = sum(math.prod(mask_shape(mask)) for mask in found.values())
    whole = sum(jnp.size(x) for x in jax.tree.leaves(params))
    return whole - masked + unnamed(count_masks)(found)


def sparsified(params: PyTree, masks: Mapping[str, Any]) -> PyTree:
    """Parameters, with zeros for the weights that masks by name do not keep."""
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    result = [
        jnp.where(unpack(masks[name]), x, jnp.zeros((), x.dtype))
        if name in masks
        else x
        for name, x in zip(leaf_names(params), flat, strict=True)
    ]
    return jax.tree.unflatten(structure, result)
