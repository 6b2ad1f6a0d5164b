"""Timing: at which counts of finished updates there is a cycle."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary


class NoCycle:
    """Given to ``update`` as ``regrow_between``: this update opens no cycle. Each
    method in the optimizer tells it at which counts its own cycles are due.
    """

    def __init__(self) -> None:
        self.due: list[Callable[[Any], jax.Array]] = []  # of counts, one per method
        self.reads_momentum = False  # whether a rule reads that of missing weights

    def tell(self, due: Callable[[Any], jax.Array], reads_momentum: bool) -> None:
        """Adds what one method has to tell."""
        self.due.append(due)
        self.reads_momentum |= reads_momentum


def _check(
    update_period: Any, update_start: Any, update_stop: Any, *, traced: bool = True
) -> None:
    checks.updates("update_period", update_period, 1, traced=traced)
    checks.updates("update_start", update_start, 0, traced=traced)
    checks.updates("update_stop", update_stop, 0, optional=True, traced=traced)


@boundary("is_due")
def is_due(
    count: jax.Array | int,
    update_period: int,
    update_start: int = 0,
    update_stop: int | None = None,
) -> jax.Array:
    r"""Tells whether a cycle opens the update that follows ``count`` finished ones.

    With the period P, the start a and the stop b:

    .. math:: count > 0, \quad count \bmod P = 0, \quad a \le count < b

    The first cycle comes after a full period. If ``update_stop`` is the length of
    training, no cycle follows the last update.

    Args:
      count: Number of finished updates, a Python integer or an integer array.
      update_period: Number of updates between cycles, at least 1.
      update_start: First count at which a cycle may come, at least 0.
      update_stop: Count from which on no cycle comes, at least 0; None never stops.

    Returns:
      A boolean array of the shape of ``count``.

    Raises:
      ValueError: If an argument is a number outside its range.

    Examples:
      >>> from sparse_optax import schedules
      >>> [t for t in range(41) if schedules.is_due(t, 10, update_stop=40)]
      [10, 20, 30]
    """
    _check(update_period, update_start, update_stop)
    count = _as_counts(count)
    due = (count > 0) & (count % update_period == 0) & (count >= update_start)
    return due if update_stop is None else due & (count < update_stop)


def _as_counts(count: Any) -> jax.Array:
    """Numbers of finished updates as an array."""
    cure = "Give a number of finished updates, below 2**31."
    try:
        counts = jnp.asarray(count)
    except (TypeError, ValueError, OverflowError):
        checks.fail("count", count, "an integer or an array of integers", cure)
    kinds = (jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(counts.dtype, kind) for kind in kinds):
        checks.fail("count", count, "an integer or an array of integers", cure)
    return counts


def never_due(period: Any, start: Any = 0, stop: Any = None) -> bool:
    """Whether it is known that no count is due; False if an argument is traced."""
    if stop is None or not checks.known(period, start, stop):
        return False
    period, start, stop = map(checks.concrete, (period, start, stop))
    return (stop - 1) // period * period < max(start, 1)


def check_some_due(period: Any, start: Any, stop: Any) -> None:
    """Raises if it is known that no count is due."""
    if never_due(period, start, stop):
        given = f"`update_start`={start} and " if start else ""
        least = f"at least {max(start, 1)} and below {stop}"
        raise ArgumentError(
            f"with `update_period`={period}, {given}`update_stop`={stop} no cycle is "
            f"due and the masks would never change; a multiple of the period must be "
            f"{least}. Shorten the period or move the stop, or use static_sparse for "
            "masks that stay."
        )


@boundary("first_due")
def first_due(update_period: int, update_start: int = 0) -> int:
    """The first count at which ``is_due``.

    Args:
      update_period: Number of updates between cycles, at least 1.
      update_start: First count at which a cycle may come, at least 0.

    Returns:
      A Python integer.

    Raises:
      ValueError: If an argument is out of range.

    Examples:
      >>> from sparse_optax import schedules
      >>> schedules.first_due(10), schedules.first_due(10, 25)
      (10, 30)
    """
    _check(update_period, update_start, None, traced=False)
    period, start = map(int, map(checks.concrete, (update_period, update_start)))
    return -(-max(start, 1) // period) * period


@boundary("last_due")
def last_due(update_period: int, update_start: int = 0, *, update_stop: int) -> int:
    """The last count at which ``is_due``, for a density that must end there.

    Args:
      update_period: Number of updates between cycles, at least 1.
      update_start: First count at which a cycle may come, at least 0.
      update_stop: Count from which on there are no cycles.

    Returns:
      A Python integer.

    Raises:
      ValueError: If an argument is out of range, or no count is due.

    Examples:
      >>> from sparse_optax import schedules
      >>> end = schedules.last_due(10, update_stop=40)
      >>> density = schedules.cubic_density(1.0, 0.1, start=0, stop=end)
      >>> end, round(float(density(end)), 3)
      (30, 0.1)
    """
    _check(update_period, update_start, None, traced=False)
    checks.updates("update_stop", update_stop, 0, traced=False)
    check_some_due(update_period, update_start, update_stop)
    period, stop = map(int, map(checks.concrete, (update_period, update_stop)))
    return (stop - 1) // period * period


def check_density_stop(stop: Any, last: int) -> None:
    """Raises unless a falling density ends at the last cycle or before it."""
    checks.updates("density_stop", stop, 1, traced=False)
    if checks.concrete(stop) > last:
        cure = f"No cycle comes after {last}: lower it or raise update_stop."
        checks.fail("density_stop", stop, f"at most {last}", cure)
