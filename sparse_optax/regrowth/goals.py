"""How many units each layer is to have: at the end, and at a step on the way there."""

import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparse_optax import budgets, patterns, schedules
from sparse_optax import masks as mask_trees
from sparse_optax.leaves import (
    Layout,
    PyTree,
    is_hole,
    leaf_names,
)
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import allocate, redistribute
from sparse_optax.regrowth import prune as prune_rules
from sparse_optax.regrowth.rules import (
    Rule,
    layer_counts,
    layer_sizes,
    split_layers,
)

# Densities are whole numbers of 2^-30. A schedule knows its value to a few units in
# the last place of a float32: what it misses by so little is meant, as 21 of 30 weights
# is by 0.7.
DENSE = 2**30
SLACK = np.uint32(2**8)
BROKEN = np.uint32(2**32 - 1)


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
      >>> from sparse_optax.regrowth.goals import views
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
    moving: bool = False,
    *,
    caller: str,
) -> tuple[Rule, Rule, Rule]:
    """The rules with which the number of weights stays under a pattern.

    Args:
      pattern: Which weights stand and fall together, or None.
      rules: The prune, the redistribution and the growth rule.
      leaves: The sparse leaves, concrete or abstract.
      plan: Their layout.
      moving: Whether a budget says how many weights a cycle leaves.
      caller: The name that an error starts with.

    Returns:
      The rules; where units differ in size, and with N:M, without redistribution.

    Raises:
      ValueError: If the prune or the growth rule then moves weights between layers
        all the same.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves, patterns, regrowth
      >>> from sparse_optax.regrowth.goals import rules_under
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
    if prune.pooled:
        raise ValueError(
            f"{caller}: `prune` ranks all layers as one pool, and with {pattern.name} "
            "the number of weights would not stay: units of its layers differ in size, "
            "or each group has its own number. Use prune.magnitude."
        )
    if pattern.m and (prune.exact or prune is prune_rules.two_sided):
        shapes = tuple(
            (tuple(x.shape), a) for x, a in zip(leaves, plan.axes, strict=True)
        )
        prune = _of_whole_layers(prune, pattern, shapes, moving and prune.exact)
    if not grow.exact:
        raise ValueError(
            f"{caller}: `grow` must place exactly `counts` weights in each layer with "
            f"{pattern.name}, and does not say that it does. Use grow.random, or mark "
            "the rule: stateless(f, exact=True)."
        )
    return prune, redistribute.none, grow


# Cached: a rule is a static argument of the compiled cycle.
@functools.lru_cache
def _of_whole_layers(
    prune: Rule,
    pattern: Pattern,
    leaves: tuple[tuple[tuple[int, ...], Any], ...],
    moving: bool,
) -> Rule:
    """A prune rule that takes its share of whole layers and not of each group of N:M.

    The share of a group would be rounded down, mostly to nothing. Where a budget moves,
    each group first goes down to its own target.
    """
    grids = [patterns.grid(pattern, shape, axis) for shape, axis in leaves]
    axes = tuple(axis for _, axis in grids)

    def fold(arrays: Any) -> Any:
        if arrays is None:
            return None
        return tuple(x.reshape(s) for x, (s, _) in zip(arrays, grids, strict=True))

    def init(params, masks):
        return prune.init(fold(params), fold(masks))

    def apply(evidence, state):
        if moving:
            columns = zip(evidence.active, evidence.target, strict=True)
            above = tuple(jnp.maximum(n - goal, 0) for n, goal in columns)
            left, state = prune.apply(evidence._replace(counts=above), state)
            evidence = evidence._replace(masks=left)
        masks = fold(evidence.masks)
        active = layer_counts(masks, axes)
        counts = split_layers(
            allocate.floor_fraction(evidence.rate, active), masks, axes
        )
        number = split_layers(active, masks, axes)
        stay, state = prune.apply(
            evidence._replace(
                params=fold(evidence.params),
                masks=masks,
                before=masks,
                gradient=fold(evidence.gradient),
                momentum=fold(evidence.momentum),
                counts=counts,
                active=number,
                target=number,
                axes=axes,
            ),
            state,
        )
        pairs = zip(stay, evidence.masks, strict=True)
        return tuple(m.reshape(x.shape) for m, x in pairs), state

    return Rule(init, apply, needs=prune.needs, covers=moving)


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
      >>> from sparse_optax.regrowth.goals import unit_counts
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
        where=jax.tree.unflatten(structure, chosen_leaves(params, plan)),
        stacked=stacked_axes(plan.names, plan.axes),
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
        patterns.whole_units(n, size) for n, size in zip(counts, sizes, strict=True)
    ]
    return [n if n.ndim else int(n) for n in whole]


def chosen_leaves(params: PyTree, plan: Layout) -> list[bool]:
    """One bool a leaf, whether it takes part.

    Args:
      params: The parameters, concrete or abstract.
      plan: The leaves that do.

    Returns:
      A list in the order in which JAX flattens the tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves
      >>> from sparse_optax.regrowth.goals import chosen_leaves
      >>> tree = {"b": jnp.ones(2), "w": jnp.ones((2, 2))}
      >>> chosen_leaves(tree, leaves.Layout((1,), ("w",), (None,)))
      [False, True]
    """
    return [i in plan.index for i in range(len(leaf_names(params)))]


def stacked_axes(names: Sequence[str], axes: Sequence[int | None]) -> dict[str, int]:
    """``{name: axis}`` of the leaves that stack layers.

    Args:
      names: The names of the leaves.
      axes: For each the axis whose slices are layers, or None.

    Returns:
      What arguments called ``stacked`` take.

    Examples:
      >>> from sparse_optax.regrowth.goals import stacked_axes
      >>> stacked_axes(("v", "w"), (None, 0))
      {'w': 0}
    """
    pairs = zip(names, axes, strict=True)
    return {name: axis for name, axis in pairs if axis is not None}


class Goal(NamedTuple):
    """What a budget that moves asks for at a step, see ``allocate.target_counts``.

    Attributes:
      final: The counts of the end, an int32 vector with one entry a layer.
      excess: uint32 scalar: how far the density is above the one of the end, in
        units of 2^-30; ``BROKEN`` where it is not finite.
      whole: The same for a dense network.
    """

    final: np.ndarray
    excess: jax.Array
    whole: np.uint32


def targets(
    budget: optax.Schedule | schedules.Towards,
    density: Any,
    step: Any,
    params: PyTree,
    plan: Layout,
    pattern: Pattern | None = None,
    *,
    caller: str,
) -> Goal:
    """What a budget that moves asks for at a step.

    Args:
      budget: A schedule of the density.
      density: The final density or budget.
      step: Number of finished updates.
      params: The parameters, concrete or abstract.
      plan: The leaves that take part.
      pattern: Which weights stand and fall together; None for single weights.
      caller: The name that an error starts with.

    Returns:
      A ``Goal``, in integers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves
      >>> from sparse_optax.regrowth.goals import targets
      >>> goal = targets(
      ...     lambda step: 0.6, 0.2, 0, {"w": jnp.ones((4, 5))},
      ...     leaves.Layout((0,), ("w",), (None,)), caller="doc")
      >>> goal.final.tolist(), round(int(goal.excess) / int(goal.whole), 3)
      ([4], 0.5)
    """
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    units, axes = views(tuple(flat[i] for i in plan.index), plan, pattern)
    counts = unit_counts(density, params, plan, pattern, caller=caller)
    final = np.concatenate([np.reshape(np.asarray(n), -1) for n in counts])
    size = int(layer_sizes(units, axes).sum())
    total = int(final.sum())
    is_float = isinstance(density, float | np.floating)
    if is_float:
        # The end of its schedule, and not what its floors add up to.
        end = Fraction(float(density)).limit_denominator(10**9)
        met = Fraction(float(np.float32(density)))
    else:
        # A schedule may end at the density that was rounded down to this total.
        end = Fraction(total, max(size, 1))
        met = Fraction(float(np.float32((total + 1) / max(size, 1))))
    end, met = (min(int(x * DENSE), DENSE) for x in (end, met))
    if isinstance(budget, schedules.Towards):
        exact = density if is_float else total / max(size, 1)
        budget = budget.make(float(np.float32(exact)))
    now = jnp.asarray(budget(step), jnp.float32)
    steps = (jnp.clip(now, 0.0, 1.0) * DENSE).astype(jnp.uint32)  # exact: a shift
    above = jnp.minimum(steps + SLACK, np.uint32(DENSE)) - np.uint32(end)
    excess = jnp.where(steps > met, above, jnp.uint32(0))
    excess = jnp.where(jnp.isfinite(now), excess, BROKEN)
    return Goal(final.astype(np.int32), excess, np.uint32(max(DENSE - end, 1)))


def first_counts(
    budget: optax.Schedule | schedules.Towards,
    density: Any,
    params: PyTree,
    plan: Layout,
    pattern: Pattern | None = None,
    *,
    caller: str,
) -> list[Any]:
    """Whole counts of units: what the schedule asks for before the first update.

    Args:
      budget: A schedule of the density.
      density: The final density or budget.
      params: The parameters, concrete or abstract.
      plan: The leaves that take part.
      pattern: Which weights stand and fall together; None for single weights.
      caller: The name that an error starts with.

    Returns:
      For each leaf an integer, or an array with one for each of its layers.

    Raises:
      ValueError: If the schedule's first value is traced, or no number.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves
      >>> from sparse_optax.regrowth.goals import first_counts
      >>> plan = leaves.Layout((0,), ("w",), (None,))
      >>> counts = first_counts(
      ...     lambda step: 1.0, 0.2, {"w": jnp.ones((4, 5))}, plan, caller="doc")
      >>> [int(n) for n in counts]
      [20]
    """
    with jax.ensure_compile_time_eval():
        goal = targets(budget, density, 0, params, plan, pattern, caller=caller)
    if isinstance(goal.excess, Tracer):
        raise ValueError(
            f"{caller}: the first value of `budget` is traced; the first masks need a "
            "number. Name it in `static_args` of optax.inject_hyperparams."
        )
    excess = int(np.asarray(goal.excess))
    if excess == BROKEN:
        raise ValueError(
            f"{caller}: `budget` must be a schedule of the density, in (0, 1]; its "
            "first value is not finite. Pass schedules.cubic_density(...)."
        )
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    units, axes = views(tuple(flat[i] for i in plan.index), plan, pattern)
    sizes, final = layer_sizes(units, axes), goal.final.astype(np.int64)
    more = [excess * int(room) // int(goal.whole) for room in sizes - final]
    return list(split_layers(final + more, units, axes))
