"""What a run begins with: its sparse leaves, its first masks, its final counts."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparse_optax import masks as mask_trees
from sparse_optax import patterns, schedules
from sparse_optax.leaves import (
    Layout,
    PyTree,
    Where,
    is_hole,
    layout,
    leaf_names,
    require_some,
    resolve_where,
)
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth.goals import (
    chosen_leaves,
    first_counts,
    stacked_axes,
    unit_counts,
    views,
)
from sparse_optax.regrowth.rules import layer_sizes


def first_masks(
    params: PyTree,
    density: Any,
    masks: PyTree | None,
    seed: jax.Array,
    where: Where | None,
    stacked: Mapping[str, int] | None,
    budget: optax.Schedule | schedules.Towards | None = None,
    hidden: bool = False,
    pattern: Pattern | None = None,
    *,
    caller: str,
) -> tuple[Layout, tuple[jax.Array, ...]]:
    """The sparse leaves and their first masks: given, random or of the largest.

    Args:
      params: The parameters, concrete or abstract.
      density: A density or a budget; None where masks are given.
      masks: Given masks, or None.
      seed: A random key.
      where: Which leaves take part.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      budget: A schedule of the density, whose value at 0 masks that are not given have.
      hidden: Whether the largest weights exist first, and not random ones.
      pattern: Which weights stand and fall together, or None.
      caller: The name that an error starts with.

    Returns:
      The layout, and one boolean array a sparse leaf.

    Raises:
      ValueError: If nothing takes part, or given masks do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from sparse_optax.regrowth.beginning import first_masks
      >>> plan, (mask,) = first_masks(
      ...     {"w": jnp.ones((4, 5))}, 0.25, None, jax.random.key(0), None, None,
      ...     caller="doc")
      >>> plan.names, int(mask.sum())
      (('w',), 5)
    """
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    names = leaf_names(params)
    if not flat:  # `optax.tree.map_params` initialises with a tree without leaves
        return Layout((), (), ()), ()
    if masks is not None:
        given, structure = mask_trees.flatten(masks)
        mask_trees.check_names(structure, names, caller=caller)
        mask_trees.check_shapes(given, flat, names, caller=caller)
        plan = layout(params, [not is_hole(m) for m in given], stacked, caller=caller)
        for i in plan.index:
            dtype = getattr(given[i], "dtype", jnp.dtype(bool))
            if dtype != jnp.dtype(bool):
                raise ValueError(
                    f"{caller}: in `masks`, {names[i]!r} has dtype {dtype}; it must be "
                    "bool. Pass mask.astype(bool)."
                )
        _check_layers(plan, flat, pattern, caller)
        # Copied: the caller may donate the state and keep the masks.
        kept = [jnp.array(mask_trees.unpack(given[i]), copy=True) for i in plan.index]
        agree = None if budget is not None else density
        _check_given(agree, kept, params, plan, pattern, budget is None, caller)
    else:
        chosen = resolve_where(params, where, caller=caller)
        plan = layout(params, chosen, stacked, caller=caller)
        _check_layers(plan, flat, pattern, caller)
        kept = _made(params, density, seed, plan, budget, hidden, pattern, caller)
    require_some(params, plan, caller=caller)
    return plan, tuple(kept)


def _made(
    params, density, seed, plan, budget, hidden, pattern, caller
) -> list[jax.Array]:
    """Masks of whole units, with the number that a budget has at first."""
    if not plan.index:
        return []
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    if budget is None:
        counts = unit_counts(density, params, plan, pattern, caller=caller)
    else:
        counts = first_counts(budget, density, params, plan, pattern, caller=caller)
    sparse = tuple(flat[i] for i in plan.index)
    units, axes = views(sparse, plan, pattern)
    # Of shapes alone there is no largest; any masks have the right type.
    by_size = hidden and not any(isinstance(x, jax.ShapeDtypeStruct) for x in sparse)
    if by_size and pattern is not None:
        columns = zip(sparse, plan.axes, strict=True)
        units = tuple(patterns.view(pattern, x, axis) for x, axis in columns)

    def tree(values):
        return mask_trees.rebuild(structure, len(flat), plan.index, values)

    chosen: Any = {
        "where": jax.tree.unflatten(structure, chosen_leaves(params, plan)),
        "stacked": stacked_axes(plan.names, axes),
    }
    if by_size:
        made = mask_trees.magnitude_masks(
            tree(units), tree(counts), scope="leaf", **chosen
        )
    else:
        seed = jax.random.fold_in(seed, 0)
        made = mask_trees.random_masks(
            seed, tree(units), tree(counts), **chosen, caller=caller
        )
    kept = [mask_trees.flatten(made)[0][i] for i in plan.index]
    if pattern is None:
        return kept
    return [
        # With the leaf's sharding, which the mask of its units has not.
        jnp.logical_and(
            patterns.spread(pattern, m, x.shape, axis), jnp.ones_like(x, dtype=bool)
        )
        for m, x, axis in zip(kept, sparse, plan.axes, strict=True)
    ]


def _check_layers(
    plan: Layout, flat: list[Any], pattern: Pattern | None, caller: str
) -> None:
    for i, name, axis in zip(plan.index, plan.names, plan.axes, strict=True):
        (size, *_) = layer_sizes((flat[i],), (axis,)) if flat[i].shape else (1,)
        if size >= 2**31:  # counts of a layer are int32
            raise ValueError(
                f"{caller}: {name!r} of shape {tuple(flat[i].shape)} is a layer of "
                f"{size} weights; a layer must hold fewer than 2**31. Make it several "
                f"layers: stacked={{{name!r}: axis}} takes each slice along an axis as "
                "one."
            )
        if pattern is not None:
            patterns.check(pattern, flat[i].shape, name, axis, caller=caller)


def _check_given(density, kept, params, plan, pattern, still, caller) -> None:
    """Given masks follow the pattern, and keep what the density asks for.

    Under a budget that moves, groups of N:M have any number at first.
    """
    if any(isinstance(m, (Tracer, jax.ShapeDtypeStruct)) for m in kept):
        return
    held = pattern if pattern is not None and (still or not pattern.m) else None
    for mask, name, axis in zip(kept, plan.names, plan.axes, strict=True):
        if held is not None and not patterns.follows(held, mask, axis):
            raise ValueError(
                f"{caller}: in `masks`, {name!r} does not follow {held.name}; units "
                "must be whole or empty. Make the masks with this pattern."
            )
    if density is None or (pattern is not None and pattern.m):
        return
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    wanted = given = 0
    counts = unit_counts(density, params, plan, pattern, caller=caller)
    for mask, i, axis, n in zip(kept, plan.index, plan.axes, counts, strict=True):
        size = (
            1 if pattern is None else patterns.unit_size(pattern, flat[i].shape, axis)
        )
        wanted += int(np.sum(n)) * size
        given += mask_trees.count(mask)
    if wanted != given:
        raise ValueError(
            f"{caller}: `masks` keep {given} weights and `density`={density!r} asks "
            f"for {wanted}; they must agree. Leave out `density`: the masks are the "
            "budget."
        )
