"""Checks and readies the arguments of ``regrow``: rates, first masks, budgets."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_optax import budgets, schedules
from sparse_optax import masks as mask_trees
from sparse_optax.leaves import is_hole, layout, leaf_names, resolve_where
from sparse_optax.regrowth.rules import Rule


def first_masks(params, density, masks, seed, where, stacked, *, caller):
    """The sparse leaves and their first masks, given or random."""
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    names = leaf_names(params)
    if masks is not None and flat:
        given = mask_trees.flatten(masks)[0]
        mask_trees.check_shapes(given, flat, names, caller=caller)
        plan = layout(params, [not is_hole(m) for m in given], stacked, caller=caller)
        for i in plan.index:
            dtype = getattr(given[i], "dtype", jnp.dtype(bool))
            if dtype != jnp.dtype(bool):
                raise ValueError(
                    f"{caller}: the mask of {names[i]!r} has dtype {dtype}; it must "
                    "be bool. Pass mask.astype(bool)."
                )
        # Copied: the caller may donate the state and keep the masks.
        kept = [jnp.array(mask_trees.unpack(given[i]), copy=True) for i in plan.index]
        _check_budget(density, masks, params, where, stacked, caller)
    else:
        chosen = resolve_where(params, where, caller=caller)
        plan = layout(params, chosen, stacked, caller=caller)
        random = mask_trees.random_masks(
            jax.random.fold_in(seed, 0),
            params,
            density,
            where=where,
            stacked=stacked,
            caller=caller,
        )
        kept = [mask_trees.flatten(random)[0][i] for i in plan.index]
    if not plan.index and any(not is_hole(x) for x in flat):
        raise ValueError(
            f"{caller}: no leaf of {names} is to be made sparse; there must be one. "
            "Choose leaves with where=lambda name, leaf: ..., by default those of "
            "two or more dimensions that are not biases or scales."
        )
    return plan, tuple(kept)


def _check_budget(density, masks, params, where, stacked, caller):
    abstract = any(
        isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct))
        for x in jax.tree.leaves(masks)
    )
    if density is None or abstract:
        return
    wanted = budgets.total(
        budgets.resolve(density, params, where=where, stacked=stacked, caller=caller)
    )
    given = mask_trees.count(masks)
    if wanted != given:
        raise ValueError(
            f"{caller}: `masks` keep {given} weights and `density` asks for {wanted}; "
            "they must agree. Leave out `density`: the masks are the budget."
        )


def refuse_multi_steps(inner_state: Any, caller: str) -> None:
    def is_accumulator(node):
        return isinstance(node, optax.MultiStepsState)

    nodes = jax.tree.leaves(inner_state, is_leaf=is_accumulator)
    if any(is_accumulator(node) for node in nodes):
        raise ValueError(
            f"{caller}: optax.MultiSteps stands inside; masks would move on steps "
            f"that only accumulate. Put it outside: optax.MultiSteps({caller}(...), k)."
        )


def check_arguments(
    caller, inner, density, masks, period, start, stop, rate, momentum, reset, rules
):
    def fail(name, value, allowed, cure):
        raise ValueError(f"{caller}: `{name}` must be {allowed}; got {value!r}. {cure}")

    if inner is not None and not hasattr(inner, "update"):
        fail("inner", inner, "an optax.GradientTransformation", "Pass optax.sgd(0.1).")
    if density is None and masks is None:
        fail(
            "density", density, "in (0, 1] or a budget", "Pass density=0.05, or masks."
        )
    if isinstance(density, (int, float)) and not 0 < density <= 1:
        fail(
            "density", density, "in (0, 1] or a budget", "0.05 keeps 5% of the weights."
        )
    if isinstance(period, (int, float)) and (period < 1 or period != int(period)):
        fail(
            "update_period",
            period,
            "an integer of at least 1",
            "Pass the steps of an epoch.",
        )
    for name, value in (("update_start", start), ("update_stop", stop)):
        if isinstance(value, (int, float)) and (value < 0 or value != int(value)):
            fail(name, value, "a non-negative integer", "It counts updates.")
    if rate is None and stop is None:
        fail(
            "update_stop",
            None,
            "given where `prune_rate` is None",
            "The default prune rate falls to 0 at update_stop; pass it, or a rate.",
        )
    if isinstance(rate, (int, float)) and not 0 <= rate <= 1:
        fail("prune_rate", rate, "in [0, 1] or a schedule", "0.5 is the paper's.")
    if not (
        momentum == "auto" or (isinstance(momentum, float | int) and 0 <= momentum < 1)
    ):
        fail("momentum", momentum, '"auto" or a number in [0, 1)', "Pass 0.9.")
    if reset not in ("none", "grown"):
        fail("reset_moments", reset, '"none" or "grown"', 'RigL resets "grown".')
    for name, rule in zip(("prune", "redistribute", "grow"), rules, strict=True):
        if not isinstance(rule, Rule):
            fail(
                name, rule, "a regrowth.Rule", "Lift a function: regrowth.stateless(f)."
            )


def rate_schedule(prune_rate, update_stop):
    if prune_rate is None:
        return schedules.cosine_prune_rate(0.5, stop=update_stop)
    if callable(prune_rate):
        return prune_rate
    return lambda count: jnp.asarray(prune_rate, jnp.float32)
