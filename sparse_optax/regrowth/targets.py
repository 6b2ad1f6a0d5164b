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


class Goal(NamedTuple):
    """What a ramp asks for at a step, see ``allocate.target_counts``."""

    final: np.ndarray  # the final counts, an int32 vector with one entry per layer
    # How far the density is above the final one, in units of 2^-30, a uint32 scalar;
    # BROKEN if it is not finite.
    excess: jax.Array
    whole: np.uint32  # the same for a dense network
    density: jax.Array  # what the schedule says, float32


def goal_at(
    ramp: optax.Schedule | schedules.Towards,
    density: Any,
    step: Any,
    layers: Layers,
    params: PyTree,
) -> Goal:
    """What a schedule of the density asks for at a step, in whole units. A ramp ends
    at a rounded density: its end counts as met within a weight of the final counts.
    """
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
        exact = density if is_float else total / max(size, 1)
        ramp = ramp.make(float(np.float32(exact)))
    now = jnp.asarray(checks.scalar("ramp", ramp(step)), jnp.float32)
    steps = (jnp.clip(now, 0.0, 1.0) * DENSE).astype(jnp.uint32)  # exact: a shift
    above = jnp.minimum(steps + SLACK, np.uint32(DENSE)) - np.uint32(end)
    excess = jnp.where(steps > met, above, jnp.uint32(0))
    excess = jnp.where(jnp.isfinite(now), excess, BROKEN)
    return Goal(final.astype(np.int32), excess, np.uint32(max(DENSE - end, 1)), now)


def first_counts(
    ramp: optax.Schedule | schedules.Towards,
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
    excess = int(np.asarray(goal.excess))
    if excess == BROKEN:
        raise ArgumentError(
            "`ramp` must be a schedule of the density, in (0, 1]; its first value is "
            "not finite. Pass schedules.cubic_density(...)."
        )
    final = goal.final.astype(np.int64)
    more = [excess * int(n) // int(goal.whole) for n in layers.units.sizes - final]
    return layers.units.split(final + np.asarray(more, np.int64))
