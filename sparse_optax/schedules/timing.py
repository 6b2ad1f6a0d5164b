"""Timing: at which counts of finished updates a cycle comes."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax.schedules.parts import check_timing, check_whole


def is_due(
    count: jax.Array | int, period: int, start: int = 0, stop: int | None = None
) -> jax.Array:
    r"""Tells whether a cycle opens the update that follows ``count`` finished ones.

    .. math:: count > 0, \quad count \bmod period = 0, \quad start \le count < stop

    So the first cycle comes after a full period, on weights that were trained for it,
    and with ``stop`` the length of training none follows the last update: what is
    evaluated or saved at the end of a period is a trained network.

    Args:
      count: Number of finished updates, a Python integer or an integer array.
      period: Number of updates between cycles, at least 1.
      start: First count at which a cycle may come, at least 0.
      stop: Count from which on there are no cycles, at least 0; None for never.

    Returns:
      A boolean array of the shape of ``count``.

    Raises:
      ValueError: If ``period``, ``start`` or ``stop`` is a number outside its range.

    Examples:
      >>> from sparse_optax import schedules
      >>> [t for t in range(41) if schedules.is_due(t, 10, stop=40)]
      [10, 20, 30]
    """
    check_timing("is_due", period, start, stop)
    count = jnp.asarray(count)
    due = (count > 0) & (count % period == 0) & (count >= start)
    return due if stop is None else due & (count < stop)


def never_due(period: Any, start: Any = 0, stop: Any = None) -> bool:
    """Whether it is known beforehand that no count is due.

    Args:
      period: Number of updates between cycles.
      start: First count at which a cycle may come.
      stop: Count from which on there are no cycles, or None.

    Returns:
      A Python bool; False where an argument is traced.

    Examples:
      >>> from sparse_optax import schedules
      >>> schedules.never_due(10, stop=10), schedules.never_due(10, stop=11)
      (True, False)
    """
    if not all(isinstance(value, numbers.Integral) for value in (period, start, stop)):
        return False
    return (stop - 1) // period * period < max(start, 1)


def first_due(period: int, start: int = 0, *, caller: str = "first_due") -> int:
    """The first count at which ``is_due``.

    Args:
      period: Number of updates between cycles, at least 1.
      start: First count at which a cycle may come, at least 0.
      caller: The name that an error starts with.

    Returns:
      A Python integer.

    Raises:
      ValueError: If an argument is out of range.

    Examples:
      >>> from sparse_optax import schedules
      >>> schedules.first_due(10), schedules.first_due(10, 25)
      (10, 30)
    """
    check_timing(caller, period, start, None)
    return -(-max(start, 1) // period) * period


def last_due(
    period: int, start: int = 0, *, stop: int, caller: str = "last_due"
) -> int:
    """The last count at which ``is_due``, for a density that must end there.

    Args:
      period: Number of updates between cycles, at least 1.
      start: First count at which a cycle may come, at least 0.
      stop: Count from which on there are no cycles.
      caller: The name that an error starts with.

    Returns:
      A Python integer.

    Raises:
      ValueError: If an argument is out of range, or no count is due.

    Examples:
      >>> from sparse_optax import schedules
      >>> end = schedules.last_due(10, stop=40)
      >>> density = schedules.cubic_density(1.0, 0.1, start=0, stop=end)
      >>> end, round(float(density(end)), 3)
      (30, 0.1)
    """
    check_timing(caller, period, start, stop)
    check_whole(caller, "stop", stop, least=0)
    if never_due(period, start, stop):
        raise ValueError(
            f"{caller}: with `period`={period}, `start`={start} and `stop`={stop} no "
            "count is due; a multiple of `period` must be at least `start` and below "
            "`stop`. Shorten the period or move `stop`."
        )
    return (stop - 1) // period * period
