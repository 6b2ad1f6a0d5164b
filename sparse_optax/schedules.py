r"""Schedules of sparse training: how much to prune, how dense to be, when to act.

Each factory returns an ``optax.Schedule``: a function of the number of finished
updates, a Python integer or a traced one, that returns a float32 scalar. They can be
given wherever a ``prune_rate`` or a density is a schedule, and jitted, scanned and
vmapped like any function. Where a schedule has an end, it returns its end value exactly
from that count on: no rounding error is left over.
"""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp
import optax


def cosine_prune_rate(
    initial: float = 0.5, *, stop: int, floor: float = 0.0
) -> optax.Schedule:
    r"""Prune rate that falls like a cosine.

    .. math:: p_t = floor + \frac{p_0 - floor}{2} \left(1 + \cos \frac{\pi t}{stop}
              \right) \quad \text{for } t < stop, \qquad p_t = floor \text{ afterwards}

    Args:
      initial: p_0, the fraction of a layer's weights that the first cycle may prune,
        in [0, 1].
      stop: Number of updates after which the rate stays at ``floor``, at least 1;
        usually the length of training.
      floor: The rate at the end, in [0, initial].

    Returns:
      A schedule.

    Raises:
      ValueError: If an argument is a number outside its range.

    Examples:
      >>> from sparse_optax import schedules
      >>> rate = schedules.cosine_prune_rate(0.5, stop=100)
      >>> [round(float(rate(t)), 3) for t in (0, 25, 50, 100, 101)]
      [0.5, 0.427, 0.25, 0.0, 0.0]

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019. Differences from the reference code:
      its floor is 0.005, which ``floor`` gives.
    """
    _check_rates("cosine_prune_rate", initial, floor)
    _check_whole("cosine_prune_rate", "stop", stop, least=1)

    def schedule(count):
        done = _progress(count, 0, stop)
        # (1 + cos x) / 2 without the cancellation near the end.
        return _blend(initial, floor, jnp.cos(0.5 * jnp.pi * done) ** 2, done)

    return schedule


def linear_prune_rate(
    initial: float = 0.5, *, stop: int, floor: float = 0.0
) -> optax.Schedule:
    r"""Prune rate that falls in a straight line.

    .. math:: p_t = floor + (p_0 - floor) (1 - t / stop)
              \quad \text{for } t < stop, \qquad p_t = floor \text{ afterwards}

    Args:
      initial: p_0, the fraction of a layer's weights that the first cycle may prune,
        in [0, 1].
      stop: Number of updates after which the rate stays at ``floor``, at least 1.
      floor: The rate at the end, in [0, initial].

    Returns:
      A schedule.

    Raises:
      ValueError: If an argument is a number outside its range.

    Examples:
      >>> from sparse_optax import schedules
      >>> rate = schedules.linear_prune_rate(0.5, stop=100, floor=0.25)
      >>> [float(rate(t)) for t in (0, 50, 100, 101)]
      [0.5, 0.375, 0.25, 0.25]

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019, whose code offers it.
    """
    _check_rates("linear_prune_rate", initial, floor)
    _check_whole("linear_prune_rate", "stop", stop, least=1)

    def schedule(count):
        done = _progress(count, 0, stop)
        return _blend(initial, floor, 1.0 - done, done)

    return schedule


def constant_prune_rate(value: float = 0.5) -> optax.Schedule:
    r"""Prune rate that stays: :math:`p_t = p`.

    Args:
      value: p, the fraction of a layer's weights that a cycle may prune, in [0, 1].

    Returns:
      A schedule.

    Raises:
      ValueError: If ``value`` is a number outside its range.

    Examples:
      >>> from sparse_optax import schedules
      >>> float(schedules.constant_prune_rate(0.25)(1000))
      0.25

    References:
      Mocanu et al, `Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    _check_number("constant_prune_rate", "value", value, 0, 1)

    def schedule(count):
        del count
        return jnp.asarray(value, jnp.float32)

    return schedule


def cosine_unless(
    prune_rate: optax.ScalarOrSchedule | None,
    initial: float,
    update_stop: int | None,
    floor: float = 0.0,
) -> optax.ScalarOrSchedule | None:
    """The given prune rate, or where there is none a cosine.

    Args:
      prune_rate: A number, a schedule, or None.
      initial: Where the cosine starts.
      update_stop: Where it ends. Where it is None, the rate stays as it is given,
        for whoever takes it to refuse; its range is checked there as well.
      floor: Its end.

    Returns:
      A prune rate.

    Examples:
      >>> from sparse_optax import schedules
      >>> schedules.cosine_unless(0.2, 0.5, 100)
      0.2
      >>> round(float(schedules.cosine_unless(None, 0.5, 100)(50)), 6)
      0.25
    """
    if prune_rate is not None or update_stop is None:
        return prune_rate
    return lambda count: cosine_prune_rate(initial, stop=update_stop, floor=floor)(
        count
    )


def cubic_density(
    initial: float, final: float, start: int, stop: int
) -> optax.Schedule:
    r"""Density that falls fast at first and gently towards its target.

    .. math:: d_t = d_f + (d_i - d_f) \left(1 - \frac{t - start}{stop - start}\right)^3

    for start < t < stop; d_i up to ``start`` and d_f from ``stop`` on, both exactly
    the float32 nearest to the argument. In terms of sparsity s = 1 - d it is the
    paper's formula.

    .. note:: The target is reached at ``stop`` and not before. Where pruning happens
      only on some counts, as with ``is_due``, let ``stop`` be one of them, the
      last at the latest (``last_due``); otherwise training ends above the target.

    Args:
      initial: d_i, the density up to ``start``, in (0, 1]; 1 for a dense network.
      final: d_f, the density from ``stop`` on, in (0, initial].
      start: Number of updates at which pruning begins, at least 0.
      stop: Number of updates at which the target is reached, above ``start``.

    Returns:
      A schedule.

    Raises:
      ValueError: If an argument is a number outside its range.

    Examples:
      >>> from sparse_optax import schedules
      >>> density = schedules.cubic_density(1.0, 0.1, start=100, stop=300)
      >>> [round(float(density(t)), 4) for t in (0, 100, 200, 300, 400)]
      [1.0, 1.0, 0.2125, 0.1, 0.1]

    References:
      Zhu and Gupta, `To prune, or not to prune: exploring the efficacy of pruning for
      model compression <https://arxiv.org/abs/1710.01878>`_, 2017.
    """
    for argument, value in (("initial", initial), ("final", final)):
        _check_number("cubic_density", argument, value, 0, 1, above=True)
    if _known(initial, final) and final > initial:
        raise ValueError(
            f"cubic_density: `final`={final} must be at most `initial`={initial}; both "
            "are densities, the fraction of weights kept. For sparsities s give 1 - s."
        )
    _check_whole("cubic_density", "start", start, least=0)
    _check_whole("cubic_density", "stop", stop, least=1)
    if _known(start, stop) and stop <= start:
        raise ValueError(
            f"cubic_density: `stop`={stop} must be above `start`={start}. Give the "
            "count of updates at which the target is reached."
        )

    def schedule(count):
        done = _progress(count, start, stop)
        return _blend(initial, final, (1.0 - done) ** 3, done)

    return schedule


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
    _check_timing("is_due", period, start, stop)
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


def last_due(period: int, start: int = 0, *, stop: int) -> int:
    """The last count at which ``is_due``, for a density that must end there.

    Args:
      period: Number of updates between cycles, at least 1.
      start: First count at which a cycle may come, at least 0.
      stop: Count from which on there are no cycles.

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
    _check_timing("last_due", period, start, stop)
    _check_whole("last_due", "stop", stop, least=0)
    if never_due(period, start, stop):
        raise ValueError(
            f"last_due: with `period`={period}, `start`={start} and `stop`={stop} no "
            "count is due; a multiple of `period` must be at least `start` and below "
            "`stop`. Shorten the period or move `stop`."
        )
    return (stop - 1) // period * period


# --- arithmetic -----------------------------------------------------------------------
def _progress(count: Any, start: Any, stop: Any) -> jax.Array:
    """Fraction of the way from start to stop, float32 in [0, 1]."""
    count = jnp.asarray(count)
    # Subtracted and compared as given: a float32 cannot hold every count past 2**24.
    part = (count - start).astype(jnp.float32) / jnp.float32(stop - start)
    return jnp.where(count >= stop, 1.0, jnp.clip(part, 0.0, 1.0)).astype(jnp.float32)


def _blend(first: Any, last: Any, weight: jax.Array, done: jax.Array) -> jax.Array:
    """Mean of two ends, the first weighing ``weight``; the ends are exact."""
    first, last = jnp.asarray(first, jnp.float32), jnp.asarray(last, jnp.float32)
    between = first * weight + last * (1.0 - weight)
    return jnp.where(done >= 1.0, last, jnp.where(done <= 0.0, first, between))


# --- checks ---------------------------------------------------------------------------
# Only Python numbers are checked: `optax.inject_hyperparams` may hand in tracers.
def _known(*values: Any) -> bool:
    return all(isinstance(value, numbers.Real) for value in values)


def _check_number(
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
    right = _known(value) and not isinstance(value, bool) and math.isfinite(value)
    if not right or not low <= value <= high or (above and value == low):
        raise ValueError(
            f"{caller}: `{argument}` must be a number in {'(' if above else '['}{low}, "
            f"{high}]; got {value!r}. Give a fraction, such as 0.5 for half the "
            "weights."
        )


def _check_rates(caller: str, initial: Any, floor: Any) -> None:
    _check_number(caller, "initial", initial, 0, 1)
    _check_number(caller, "floor", floor, 0, initial if _known(initial) else 1)


def _check_whole(caller: str, argument: str, value: Any, *, least: int) -> None:
    if isinstance(value, jax.Array):
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(
            f"{caller}: `{argument}` must be an integer of at least {least}; got "
            f"{value!r}. Give a number of updates."
        )


def _check_timing(caller: str, period: Any, start: Any, stop: Any) -> None:
    _check_whole(caller, "period", period, least=1)
    _check_whole(caller, "start", start, least=0)
    if stop is not None:
        _check_whole(caller, "stop", stop, least=0)
