"""What schedules share: progress between two counts, exact ends, checked arguments."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp


def progress(count: Any, start: Any, stop: Any) -> jax.Array:
    """Fraction of the way from start to stop, float32 in [0, 1]."""
    count = jnp.asarray(count)
    # Subtracted and compared as given: a float32 cannot hold every count past 2**24.
    part = (count - start).astype(jnp.float32) / jnp.float32(stop - start)
    return jnp.where(count >= stop, 1.0, jnp.clip(part, 0.0, 1.0)).astype(jnp.float32)


def blend(first: Any, last: Any, weight: jax.Array, done: jax.Array) -> jax.Array:
    """Mean of two ends, the first weighing ``weight``; the ends are exact."""
    first, last = jnp.asarray(first, jnp.float32), jnp.asarray(last, jnp.float32)
    between = first * weight + last * (1.0 - weight)
    return jnp.where(done >= 1.0, last, jnp.where(done <= 0.0, first, between))


# Only Python numbers are checked: `optax.inject_hyperparams` may hand in tracers.
def known(*values: Any) -> bool:
    return all(isinstance(value, numbers.Real) for value in values)


def check_number(
    caller: str,
    argument: str,
    value: Any,
    low: float,
    high: float,
    *,
    above: bool = False,
) -> None:
    if isinstance(value, jax.Array):
        return
    right = known(value) and not isinstance(value, bool) and math.isfinite(value)
    if not right or not low <= value <= high or (above and value == low):
        raise ValueError(
            f"{caller}: `{argument}` must be a number in {'(' if above else '['}{low}, "
            f"{high}]; got {value!r}. Give a fraction, such as 0.5 for half the "
            "weights."
        )


def check_rates(caller: str, initial: Any, floor: Any) -> None:
    check_number(caller, "initial", initial, 0, 1)
    check_number(caller, "floor", floor, 0, initial if known(initial) else 1)


def check_whole(caller: str, argument: str, value: Any, *, least: int) -> None:
    if isinstance(value, jax.Array):
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(
            f"{caller}: `{argument}` must be an integer of at least {least}; got "
            f"{value!r}. Give a whole number, such as {max(least, 1)}."
        )


def check_timing(caller: str, period: Any, start: Any, stop: Any) -> None:
    check_whole(caller, "period", period, least=1)
    check_whole(caller, "start", start, least=0)
    if stop is not None:
        check_whole(caller, "stop", stop, least=0)
