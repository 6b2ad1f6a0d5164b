"""Checks the arguments of ``regrow``, and turns a rate into a schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparse_optax import schedules
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth.rules import Rule


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
    pattern: Any = None,
    regrown: Any = "zero",
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
      pattern: ``pattern``.
      regrown: ``regrown``.

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
    if pattern is not None and not isinstance(pattern, Pattern):
        cure = "Pass patterns.blocks(4, 4) or patterns.n_m(2, 4)."
        fail("pattern", pattern, "one of sparse_optax.patterns", cure)
    groups = False
    if pattern is not None and pattern.m:
        groups = True
        if density is not None and density != pattern.n / pattern.m:
            share = f"{pattern.n / pattern.m:g}, or left out, with {pattern.name}"
            fail("density", density, share, "Leave it out: the pattern says it.")
    if density is None and masks is None and not groups:
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
    if budget is not None and density is None and not groups:
        fail("density", None, "given where `budget` is", "Pass the density of the end.")
    if not isinstance(hidden, bool):
        fail("hidden", hidden, "True or False", "Leave it out for False.")
    if hidden and inner is None:
        cure = "Wrap the optimizer: regrow(optax.sgd(...), hidden=True, ...)."
        fail("hidden", hidden, "False where there is no `inner`", cure)
    if regrown not in ("zero", "value"):
        fail("regrown", regrown, '"zero" or "value"', 'Use "zero", as most papers do.')
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
    prune_rate = schedules.cosine_unless(prune_rate, 0.5, update_stop)
    if callable(prune_rate):
        return prune_rate
    return lambda count: jnp.asarray(prune_rate, jnp.float32)
