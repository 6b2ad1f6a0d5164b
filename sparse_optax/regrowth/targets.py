"""The counts that a ramp asks for at a step."""

from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparse_optax import checks, schedules
from sparse_optax.budgets.kinds import check_density
from sparse_optax.budgets.resolve import is_number, unit_counts_of
from sparse_optax.checks import ArgumentError
from sparse_optax.layers import Layers, PyTree, flat_counts

# Densities are whole numbers of 2^-30. The value of a schedule is off by a few units in
# the last place of a float32. SLACK allows for this: 0.7 of 30 weights are 21.
DENSE = 2**30
SLACK = np.uint32(2**8)
BROKEN = np.uint32(2**32 - 1)


# Updates after which a ramp without a stop must have ended; its sums stay in int32.
_LATE = 2**30


class Ending(NamedTuple):
    """A ramp that must be at its end when the last masks are chosen."""

    ramp: optax.Schedule | schedules.Towards
    update_stop: int | None


def ending(ramp: Any, update_stop: int | None) -> Any:
    """A ramp of a method that chooses masks at every update, to be checked by ``init``;
    what is no ramp stays what it is.
    """
    return Ending(ramp, update_stop) if is_ramp(ramp) else ramp


def is_ramp(value: Any) -> bool:
    """Whether a value is a schedule of the density."""
    return isinstance(value, Ending | schedules.Towards) or checks.takes(value, "count")


class Goal(NamedTuple):
    """What a ramp asks for at a step, see ``allocate.target_counts``."""

    final: np.ndarray  # the final counts, an int32 vector with one entry per layer
    # How far the density is above the final one, in units of 2^-30, a uint32 scalar;
    # BROKEN if it is not finite.
    excess: jax.Array
    whole: np.uint32  # the same for a dense network
    density: jax.Array  # what the schedule says, float32


def goal_at(
    ramp: optax.Schedule | schedules.Towards | Ending,
    density: Any,
    step: Any,
    layers: Layers,
    params: PyTree,
) -> Goal:
    """What a schedule of the density asks for at a step, in whole units. A ramp ends
    at a rounded density: its end counts as met within a weight of the final counts.
    """
    if isinstance(ramp, Ending):
        ramp = ramp.ramp
    if layers.pattern.density is not None:
        density = layers.pattern.density
    final = flat_counts(unit_counts_of(density, layers, params))
    size, total = int(layers.units.sizes.sum()), int(final.sum())
    is_float = is_number(density)
    if is_float:
        # The end of the schedule, not the sum of the floors of the layers.
        end = check_density(density)
        met = Fraction(float(np.float32(density)))
    else:
        # A schedule may end at the density that was rounded down to this total.
        end = Fraction(total, max(size, 1))
        met = Fraction(float(np.float32((total + 1) / max(size, 1))))
    end, met = (min(int(x * DENSE), DENSE) for x in (end, met))
    if np.float32(total / max(size, 1)) < 1:
        met = min(met, DENSE - 1)  # at density 1 all weights are there
    if isinstance(ramp, schedules.Towards):
        exact = density if is_float else (total / size if size else 1.0)
        ramp = ramp.make(float(np.float32(exact)))
    now = jnp.asarray(checks.scalar("ramp", ramp(step)), jnp.float32)
    steps = (jnp.clip(now, 0.0, 1.0) * DENSE).astype(jnp.uint32)  # exact: a shift
    above = jnp.minimum(steps + SLACK, np.uint32(DENSE)) - np.uint32(end)
    excess = jnp.where(steps > met, above, jnp.uint32(0))
    excess = jnp.where(jnp.isfinite(now), excess, BROKEN)
    return Goal(final.astype(np.int32), excess, np.uint32(max(DENSE - end, 1)), now)


def check_end(
    ramp: optax.Schedule | schedules.Towards | Ending,
    density: Any,
    layers: Layers,
    params: PyTree,
) -> None:
    """Raises if a ramp that must end leaves more weights than ``density`` asks for."""
    if not isinstance(ramp, Ending):
        return
    last = checks.concrete(ramp.update_stop)
    last = int(last) - 1 if checks.known(last) else _LATE
    with jax.ensure_compile_time_eval():
        goal = goal_at(ramp, density, last, layers, params)
    if isinstance(goal.excess, Tracer):
        return
    if any(_more(goal, layers)):
        raise ArgumentError(
            f"`ramp` is {float(goal.density):g} after {last} updates, when the last "
            f"masks are chosen; it must have reached `density`, here {density!r}. "
            "Lower its end, let it end earlier, or raise `update_stop`."
        )


def _more(goal: Goal, layers: Layers) -> list[int]:
    """How many units of each layer a known goal adds to the final ones."""
    excess, final = int(np.asarray(goal.excess)), goal.final.astype(np.int64)
    return [excess * int(n) // int(goal.whole) for n in layers.units.sizes - final]


def first_counts(
    ramp: optax.Schedule | schedules.Towards | Ending,
    density: Any,
    layers: Layers,
    params: PyTree,
) -> tuple[Any, ...]:
    """Number of units of each leaf before the first update."""
    with jax.ensure_compile_time_eval():
        goal = goal_at(ramp, density, 0, layers, params)
    if isinstance(goal.excess, Tracer):
        raise ArgumentError(
            "the first value of `ramp` is traced; the first masks need a number. "
            "Name it in `static_args` of optax.inject_hyperparams."
        )
    if int(np.asarray(goal.excess)) == BROKEN:
        raise ArgumentError(
            "`ramp` must be a schedule of the density, in (0, 1]; its first value is "
            "not finite. Pass schedules.cubic_density(...)."
        )
    counts = goal.final.astype(np.int64) + np.asarray(_more(goal, layers), np.int64)
    return layers.units.split(counts)
