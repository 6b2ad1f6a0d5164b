"""A budget that moves: what it asks for at a step, in whole numbers."""

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparse_optax import budgets, schedules
from sparse_optax import masks as mask_trees
from sparse_optax.leaves import Layout, PyTree, is_hole
from sparse_optax.regrowth.rules import layer_sizes, split_layers

# Densities are whole numbers of 2^-30. A schedule knows its value to a few units in
# the last place of a float32: what it misses by so little is meant, as 21 of 30 weights
# is by 0.7.
DENSE = 2**30
SLACK = np.uint32(2**8)
BROKEN = np.uint32(2**32 - 1)


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
    chosen: list[bool],
    plan: Layout,
    *,
    caller: str,
) -> Goal:
    """What a budget that moves asks for at a step.

    Args:
      budget: A schedule of the density.
      density: The final density or budget.
      step: Number of finished updates.
      params: The parameters, concrete or abstract.
      chosen: One bool a leaf, whether it takes part.
      plan: The leaves that do.
      caller: The name that an error starts with.

    Returns:
      A ``Goal``, in integers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves
      >>> from sparse_optax.regrowth.goal import targets
      >>> goal = targets(
      ...     lambda step: 0.6, 0.2, 0, {"w": jnp.ones((4, 5))}, [True],
      ...     leaves.Layout((0,), ("w",), (None,)), caller="doc")
      >>> goal.final.tolist(), round(int(goal.excess) / int(goal.whole), 3)
      ([4], 0.5)
    """
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    where = jax.tree.unflatten(structure, chosen)
    stacked = {
        name: axis
        for name, axis in zip(plan.names, plan.axes, strict=True)
        if axis is not None
    }
    tree = budgets.resolve(density, params, where=where, stacked=stacked, caller=caller)
    counts = [mask_trees.flatten(tree)[0][i] for i in plan.index]
    final = np.concatenate([np.reshape(np.asarray(n), -1) for n in counts])
    size = int(layer_sizes(tuple(flat[i] for i in plan.index), plan.axes).sum())
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
    units = (jnp.clip(now, 0.0, 1.0) * DENSE).astype(jnp.uint32)  # exact: a shift
    above = jnp.minimum(units + SLACK, np.uint32(DENSE)) - np.uint32(end)
    excess = jnp.where(units > met, above, jnp.uint32(0))
    excess = jnp.where(jnp.isfinite(now), excess, BROKEN)
    return Goal(final.astype(np.int32), excess, np.uint32(max(DENSE - end, 1)))


def first_counts(
    budget: optax.Schedule | schedules.Towards,
    density: Any,
    params: PyTree,
    chosen: list[bool],
    plan: Layout,
    *,
    caller: str,
) -> PyTree:
    """What the schedule asks for before the first update.

    Args:
      budget: A schedule of the density.
      density: The final density or budget.
      params: The parameters, concrete or abstract.
      chosen: One bool a leaf, whether it takes part.
      plan: The leaves that do.
      caller: The name that an error starts with.

    Returns:
      A tree of whole counts.

    Raises:
      ValueError: If the value is traced or not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves
      >>> from sparse_optax.regrowth.goal import first_counts
      >>> counts = first_counts(
      ...     lambda step: 0.5, 0.25, {"w": jnp.ones((4, 5))}, [True],
      ...     leaves.Layout((0,), ("w",), (None,)), caller="doc")
      >>> int(counts["w"])
      10
    """
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    with jax.ensure_compile_time_eval():
        goal = targets(budget, density, 0, params, chosen, plan, caller=caller)
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
    sparse = tuple(flat[i] for i in plan.index)
    sizes, final = layer_sizes(sparse, plan.axes), goal.final.astype(np.int64)
    more = [excess * int(room) // int(goal.whole) for room in sizes - final]
    parts = split_layers(final + more, sparse, plan.axes)
    return mask_trees.rebuild(structure, len(flat), plan.index, parts)
