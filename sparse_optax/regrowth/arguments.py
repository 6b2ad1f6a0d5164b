"""Checks and readies the arguments of ``regrow``: rates, first masks, budgets."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from sparse_optax import budgets, schedules
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
from sparse_optax.regrowth.goal import first_counts
from sparse_optax.regrowth.rules import Rule, layer_sizes


def first_masks(
    params: PyTree,
    density: Any,
    masks: PyTree | None,
    seed: jax.Array,
    where: Where | None,
    stacked: Mapping[str, int] | None,
    budget: optax.Schedule | schedules.Towards | None = None,
    hidden: bool = False,
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
      caller: The name that an error starts with.

    Returns:
      The layout, and one boolean array a sparse leaf.

    Raises:
      ValueError: If nothing takes part, or given masks do not fit.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from sparse_optax.regrowth.arguments import first_masks
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
        _check_layers(plan, flat, caller)
        # Copied: the caller may donate the state and keep the masks.
        kept = [jnp.array(mask_trees.unpack(given[i]), copy=True) for i in plan.index]
        if budget is None:
            _check_budget(density, masks, params, where, stacked, caller)
    else:
        chosen = resolve_where(params, where, caller=caller)
        plan = layout(params, chosen, stacked, caller=caller)
        _check_layers(plan, flat, caller)
        counts = density
        if budget is not None and plan.index:
            counts = first_counts(budget, density, params, chosen, plan, caller=caller)
        if hidden:
            where = jax.tree.unflatten(jax.tree.structure(params, is_hole), chosen)
            layers: Any = {"where": where, "stacked": stacked}
            counts = budgets.resolve(counts, params, **layers, caller=caller)
            made = mask_trees.magnitude_masks(params, counts, scope="leaf", **layers)
        else:
            made = mask_trees.random_masks(
                jax.random.fold_in(seed, 0),
                params,
                counts,
                where=where,
                stacked=stacked,
                caller=caller,
            )
        kept = [mask_trees.flatten(made)[0][i] for i in plan.index]
    require_some(params, plan, caller=caller)
    return plan, tuple(kept)


def _check_layers(plan: Layout, flat: list[Any], caller: str) -> None:
    for i, name, axis in zip(plan.index, plan.names, plan.axes, strict=True):
        (size, *_) = layer_sizes((flat[i],), (axis,)) if flat[i].shape else (1,)
        if size >= 2**31:  # counts of a layer are int32
            raise ValueError(
                f"{caller}: {name!r} of shape {tuple(flat[i].shape)} is a layer of "
                f"{size} weights; a layer must hold fewer than 2**31. Make it several "
                f"layers: stacked={{{name!r}: axis}} takes each slice along an axis as "
                "one."
            )


def _check_budget(density, masks, params, where, stacked, caller):
    abstract = any(
        isinstance(x, (Tracer, jax.ShapeDtypeStruct)) for x in jax.tree.leaves(masks)
    )
    if density is None or abstract:
        return
    wanted = budgets.total(
        budgets.resolve(density, params, where=where, stacked=stacked, caller=caller)
    )
    given = mask_trees.count(masks)
    if wanted != given:
        raise ValueError(
            f"{caller}: `masks` keep {given} weights and `density`={density!r} asks "
            f"for {wanted}; they must agree. Leave out `density`: the masks are the "
            "budget."
        )


def refuse_multi_steps(inner_state: Any, caller: str) -> None:
    """Raises where gradients are accumulated inside the engine.

    Args:
      inner_state: State of the inner optimizer.
      caller: The name that the error starts with.

    Raises:
      ValueError: If the state holds a ``MultiStepsState``.

    Examples:
      >>> import optax
      >>> from sparse_optax.regrowth.arguments import refuse_multi_steps
      >>> refuse_multi_steps(optax.sgd(0.1).init({}), "doc")
    """

    def is_accumulator(node):
        return isinstance(node, optax.MultiStepsState)

    nodes = jax.tree.leaves(inner_state, is_leaf=is_accumulator)
    if any(is_accumulator(node) for node in nodes):
        raise ValueError(
            f"{caller}: optax.MultiSteps stands inside; masks would move on steps "
            f"that only accumulate. Put it outside: optax.MultiSteps({caller}(...), k)."
        )


def check_arguments(
    caller: str,
    inner: Any,
    density: Any,
    masks: Any,
    period: Any,
    start: Any,
    stop: Any,
    rate: Any,
    momentum: Any,
    reset: Any,
    rules: tuple[Any, Any, Any],
    budget: Any = None,
    hidden: bool = False,
) -> None:
    """Raises where an argument of ``regrow`` is out of its range.

    Only Python numbers are checked: an injected hyper-parameter is traced.

    Args:
      caller: The name that an error starts with.
      inner: The inner optimizer.
      density: The density.
      masks: Given masks, or None.
      period: ``update_period``.
      start: ``update_start``.
      stop: ``update_stop``.
      rate: ``prune_rate``.
      momentum: ``momentum``.
      reset: ``reset_moments``.
      rules: The three rules.
      budget: ``budget``.
      hidden: ``hidden``.

    Raises:
      ValueError: For the first argument that does not fit.

    Examples:
      >>> from sparse_optax import regrowth
      >>> from sparse_optax.regrowth.arguments import check_arguments
      >>> rule = regrowth.prune.magnitude
      >>> check_arguments("doc", None, 0.05, None, 10, 0, 100, None, "auto", "none",
      ...                 (rule, rule, rule))
    """

    def fail(name, value, allowed, cure):
        raise ValueError(f"{caller}: `{name}` must be {allowed}; got {value!r}. {cure}")

    if inner is not None and not hasattr(inner, "update"):
        fail("inner", inner, "an optax.GradientTransformation", "Pass optax.sgd(0.1).")
    if density is None and masks is None:
        fail(
            "density", density, "in (0, 1] or a budget", "Pass density=0.05, or masks."
        )
    if isinstance(density, bool) or (
        isinstance(density, (int, float)) and not 0 < density <= 1
    ):
        fail(
            "density",
            density,
            "in (0, 1] or a budget",
            "Pass 0.05 to keep 5% of the weights.",
        )
    if isinstance(period, float) or (isinstance(period, int) and period < 1):
        fail(
            "update_period",
            period,
            "an integer of at least 1",
            "Pass the steps of an epoch.",
        )
    for name, value, least in (("update_start", start, 0), ("update_stop", stop, 1)):
        if isinstance(value, float) or (isinstance(value, int) and value < least):
            allowed = f"an integer of at least {least}"
            fail(name, value, allowed, "Give a number of updates.")
    if rate is None and stop is None:
        fail(
            "update_stop",
            None,
            "given where `prune_rate` is None",
            "The default prune rate falls to 0 at update_stop; pass it, or a rate.",
        )
    if isinstance(rate, (int, float)) and not 0 <= rate <= 1:
        fail("prune_rate", rate, "in [0, 1] or a schedule", "Use 0.5 as in the paper.")
    if not (
        momentum == "auto" or (isinstance(momentum, float | int) and 0 <= momentum < 1)
    ):
        fail("momentum", momentum, '"auto" or a number in [0, 1)', "Pass 0.9.")
    if inner is None and momentum != "auto":
        cure = "Wrap the optimizer: regrow(optax.sgd(...), ...)."
        fail("momentum", momentum, '"auto" where there is no `inner`', cure)
    if inner is None and reset == "grown":
        cure = "Wrap the optimizer: regrow(optax.adam(...), ...)."
        fail("reset_moments", reset, '"none" where there is no `inner`', cure)
    if reset not in ("none", "grown"):
        fail(
            "reset_moments",
            reset,
            '"none" or "grown"',
            'Use "grown" for RigL, else "none".',
        )
    moves = callable(budget) or isinstance(budget, schedules.Towards)
    if budget is not None and not moves:
        cure = "Pass schedules.cubic_density(...), or leave it out for a constant."
        fail("budget", budget, "a schedule of the density", cure)
    if budget is not None and density is None:
        fail("density", None, "given where `budget` is", "Pass the density of the end.")
    if not isinstance(hidden, bool):
        fail("hidden", hidden, "True or False", "Leave it out for False.")
    if hidden and inner is None:
        cure = "Wrap the optimizer: regrow(optax.sgd(...), hidden=True, ...)."
        fail("hidden", hidden, "False where there is no `inner`", cure)
    for name, rule in zip(("prune", "redistribute", "grow"), rules, strict=True):
        if not isinstance(rule, Rule):
            fail(
                name, rule, "a regrowth.Rule", "Wrap a function: regrowth.stateless(f)."
            )


def rate_schedule(
    prune_rate: optax.ScalarOrSchedule | None, update_stop: int | None
) -> optax.Schedule:
    """The prune rate as a schedule of the number of finished updates.

    Args:
      prune_rate: A number, a schedule, or None for the cosine from 0.5 to 0.
      update_stop: Where the cosine reaches 0.

    Returns:
      A schedule.

    Examples:
      >>> from sparse_optax.regrowth.arguments import rate_schedule
      >>> round(float(rate_schedule(None, 100)(50)), 6)
      0.25
    """
    if prune_rate is None:
        return schedules.cosine_prune_rate(0.5, stop=cast(int, update_stop))
    if callable(prune_rate):
        return prune_rate
    return lambda count: jnp.asarray(prune_rate, jnp.float32)
