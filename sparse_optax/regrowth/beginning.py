"""What a run begins with: its sparse leaves, its first masks, its final counts."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparse_optax import budgets, patterns
from sparse_optax import masks as mask_trees
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
from sparse_optax.regrowth import redistribute
from sparse_optax.regrowth.rules import Rule, layer_sizes, split_layers


def first_masks(
    params: PyTree,
    density: Any,
    masks: PyTree | None,
    seed: jax.Array,
    where: Where | None,
    stacked: Mapping[str, int] | None,
    budget: optax.Schedule | None = None,
    pattern: Pattern | None = None,
    *,
    caller: str,
) -> tuple[Layout, tuple[jax.Array, ...]]:
    """The sparse leaves and their first masks, given or random.

    Args:
      params: The parameters, concrete or abstract.
      density: A density or a budget; None where masks are given.
      masks: Given masks, or None.
      seed: A random key.
      where: Which leaves take part.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      budget: A schedule of the density, whose value at 0 the random masks have.
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
        if budget is None:
            _check_given(density, kept, params, plan, pattern, caller)
    else:
        chosen = resolve_where(params, where, caller=caller)
        plan = layout(params, chosen, stacked, caller=caller)
        _check_layers(plan, flat, pattern, caller)
        kept = _random(params, density, seed, plan, budget, pattern, caller)
    require_some(params, plan, caller=caller)
    return plan, tuple(kept)


def _random(params, density, seed, plan, budget, pattern, caller) -> list[jax.Array]:
    """Random masks, of whole units, with the number that a budget has at first."""
    if not plan.index:
        return []
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    if budget is None:
        counts = unit_counts(density, params, plan, pattern, caller=caller)
    else:
        counts = _first_counts(budget, density, params, plan, pattern, caller)
    units, axes = views(tuple(flat[i] for i in plan.index), plan, pattern)
    tree = mask_trees.rebuild(structure, len(flat), plan.index, units)
    random = mask_trees.random_masks(
        jax.random.fold_in(seed, 0),
        tree,
        mask_trees.rebuild(structure, len(flat), plan.index, counts),
        where=jax.tree.unflatten(structure, _chosen(params, plan)),
        stacked=_stacked(plan.names, axes),
        caller=caller,
    )
    kept = [mask_trees.flatten(random)[0][i] for i in plan.index]
    if pattern is None:
        return kept
    return [
        # With the leaf's sharding, which the mask of its units has not.
        jnp.logical_and(
            patterns.spread(pattern, m, flat[i].shape, axis),
            jnp.ones_like(flat[i], dtype=bool),
        )
        for m, i, axis in zip(kept, plan.index, plan.axes, strict=True)
    ]


def views(
    leaves: tuple[Any, ...], plan: Layout, pattern: Pattern | None
) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
    """The shapes that a cycle sees, and the axes whose slices are its layers.

    Args:
      leaves: The sparse leaves, concrete or abstract.
      plan: Their layout.
      pattern: Which weights stand and fall together, or None.

    Returns:
      The leaves themselves, or with a pattern one abstract array of units a leaf; and
      one axis or None a leaf. Each group of N:M is a layer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves, patterns
      >>> from sparse_optax.regrowth.beginning import views
      >>> plan = leaves.Layout((0,), ("w",), (None,))
      >>> (units,), axes = views((jnp.ones((8, 3)),), plan, patterns.n_m(2, 4))
      >>> units.shape, axes
      ((6, 4), (0,))
    """
    if pattern is None:
        return leaves, plan.axes
    units = tuple(
        jax.ShapeDtypeStruct(patterns.view_shape(pattern, x.shape, axis), x.dtype)
        for x, axis in zip(leaves, plan.axes, strict=True)
    )
    return units, (0,) * len(leaves) if pattern.m else plan.axes


def rules_under(
    pattern: Pattern | None,
    rules: tuple[Rule, Rule, Rule],
    leaves: tuple[Any, ...],
    plan: Layout,
    *,
    caller: str,
) -> tuple[Rule, Rule, Rule]:
    """The rules with which the number of weights stays under a pattern.

    Args:
      pattern: Which weights stand and fall together, or None.
      rules: The prune, the redistribution and the growth rule.
      leaves: The sparse leaves, concrete or abstract.
      plan: Their layout.
      caller: The name that an error starts with.

    Returns:
      The rules; where units differ in size, and with N:M, without redistribution.

    Raises:
      ValueError: If the growth rule then moves weights between layers all the same.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves, patterns, regrowth
      >>> from sparse_optax.regrowth.beginning import rules_under
      >>> plan = leaves.Layout((0, 1), ("v", "w"), (None, None))
      >>> rules = (regrowth.prune.magnitude, regrowth.redistribute.momentum,
      ...          regrowth.grow.momentum)
      >>> kernels = jnp.ones((2, 3)), jnp.ones((3, 2))
      >>> rules = rules_under(
      ...     patterns.output_units(), rules, kernels, plan, caller="doc")
      >>> rules[1] is regrowth.redistribute.none
      True
    """
    if pattern is None:
        return rules
    columns = zip(leaves, plan.axes, strict=True)
    sizes = {patterns.unit_size(pattern, x.shape, axis) for x, axis in columns}
    if len(sizes) < 2 and not pattern.m:
        return rules
    prune, _, grow = rules
    if not grow.exact:
        raise ValueError(
            f"{caller}: `grow` must place exactly `counts` weights in each layer with "
            f"{pattern.name}, and does not say that it does. Use grow.random, or mark "
            "the rule: stateless(f, exact=True)."
        )
    return prune, redistribute.none, grow


def unit_counts(
    density: Any, params: PyTree, plan: Layout, pattern: Pattern | None, *, caller: str
) -> list[Any]:
    """How many units each leaf keeps.

    Args:
      density: A density or a budget, of weights.
      params: The parameters, concrete or abstract.
      plan: The leaves that take part.
      pattern: Which weights stand and fall together; None for single weights.
      caller: The name that an error starts with.

    Returns:
      For each leaf an integer, or an array with one for each of its layers: the
      budget's weights in whole units, at least one.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves, patterns
      >>> from sparse_optax.regrowth.beginning import unit_counts
      >>> plan = leaves.Layout((0,), ("w",), (None,))
      >>> unit_counts(0.5, {"w": jnp.ones((4, 5))}, plan, patterns.output_units(),
      ...             caller="doc")
      [2]
    """
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    sparse = tuple(flat[i] for i in plan.index)
    if pattern is not None and pattern.m:
        groups = (patterns.view_shape(pattern, x.shape)[0] for x in sparse)
        return [np.full(number, pattern.n) for number in groups]
    tree = budgets.resolve(
        density,
        params,
        where=jax.tree.unflatten(structure, _chosen(params, plan)),
        stacked=_stacked(plan.names, plan.axes),
        caller=caller,
    )
    counts = [mask_trees.flatten(tree)[0][i] for i in plan.index]
    if pattern is None:
        return counts
    sizes = [
        patterns.unit_size(pattern, x.shape, axis)
        for x, axis in zip(sparse, plan.axes, strict=True)
    ]
    whole = [
        np.maximum(np.asarray(n) // size, np.minimum(n, 1))
        for n, size in zip(counts, sizes, strict=True)
    ]
    return [n if n.ndim else int(n) for n in whole]


def _chosen(params: PyTree, plan: Layout) -> list[bool]:
    return [i in plan.index for i in range(len(leaf_names(params)))]


def _stacked(names, axes) -> dict[str, int]:
    pairs = zip(names, axes, strict=True)
    return {name: axis for name, axis in pairs if axis is not None}


def targets(
    budget: optax.Schedule,
    density: Any,
    step: Any,
    params: PyTree,
    plan: Layout,
    pattern: Pattern | None = None,
    *,
    caller: str,
) -> tuple[np.ndarray, jax.Array]:
    """What a budget that moves asks for at a step, see ``allocate.target_counts``.

    Args:
      budget: A schedule of the density.
      density: The final density or budget.
      step: Number of finished updates.
      params: The parameters, concrete or abstract.
      plan: The leaves that take part.
      pattern: Which weights stand and fall together; None for single weights.
      caller: The name that an error starts with.

    Returns:
      The final counts of units, an int32 vector with one entry a layer, and how far
      above them the step is: 1 where the network is dense, 0 at the end.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves
      >>> from sparse_optax.regrowth.beginning import targets
      >>> final, excess = targets(
      ...     lambda step: 0.6, 0.2, 0, {"w": jnp.ones((4, 5))},
      ...     leaves.Layout((0,), ("w",), (None,)), caller="doc")
      >>> final.tolist(), round(float(excess), 3)
      ([4], 0.5)
    """
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    units, axes = views(tuple(flat[i] for i in plan.index), plan, pattern)
    counts = unit_counts(density, params, plan, pattern, caller=caller)
    final = np.concatenate([np.reshape(np.asarray(n), -1) for n in counts])
    size = int(layer_sizes(units, axes).sum())
    # A float is the end of its schedule to the bit, and not what its floors add up to.
    is_float = isinstance(density, float | np.floating)
    end = np.float32(density if is_float else int(final.sum()) / max(size, 1))
    now = jnp.asarray(budget(step), jnp.float32)
    above = jnp.clip((now - end) / max(1 - end, np.float32(1e-9)), 0.0, 1.0)
    return final.astype(np.int32), above


def _first_counts(budget, density, params, plan, pattern, caller) -> list[Any]:
    """Whole counts: what the schedule asks for before the first update."""
    with jax.ensure_compile_time_eval():
        final, above = targets(budget, density, 0, params, plan, pattern, caller=caller)
    if isinstance(above, Tracer):
        raise ValueError(
            f"{caller}: the first value of `budget` is traced; the first masks need a "
            "number. Name it in `static_args` of optax.inject_hyperparams."
        )
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    units, axes = views(tuple(flat[i] for i in plan.index), plan, pattern)
    sizes = layer_sizes(units, axes)
    share = Fraction(float(above))
    more = [int(share * (int(n) - int(c))) for n, c in zip(sizes, final, strict=True)]
    return list(split_layers(final.astype(np.int64) + more, units, axes))


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


def _check_given(density, kept, params, plan, pattern, caller) -> None:
    """Given masks follow the pattern, and keep what the density asks for."""
    if any(isinstance(m, (Tracer, jax.ShapeDtypeStruct)) for m in kept):
        return
    for mask, name, axis in zip(kept, plan.names, plan.axes, strict=True):
        if pattern is not None and not patterns.follows(pattern, mask, axis):
            raise ValueError(
                f"{caller}: in `masks`, {name!r} does not follow {pattern.name}; units "
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
