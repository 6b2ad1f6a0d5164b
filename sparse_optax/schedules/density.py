"""Schedules of the density."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary, concrete
from sparse_optax.schedules._ramp import blend, progress


@boundary("cubic_density")
def cubic_density(
    initial: float, final: float, start: int, stop: int
) -> optax.Schedule:
    r"""Density that falls fast at first and slowly towards its target.

    .. math:: d_t = d_f + (d_i - d_f) \left(1 - \frac{t - start}{stop - start}\right)^3

    for start < t < stop; d_i up to ``start`` and d_f from ``stop`` on, both exactly the
    float32 nearest to the argument. It is the paper's formula, there for s = 1 - d.

    .. note:: If pruning happens only at some counts (``is_due``), ``stop`` must be one
      of them, at most ``last_due``; otherwise training ends above the target.

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
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
      2017.
    """
    _check_ramp(initial, final, start, stop)

    def schedule(count):
        done = progress(count, start, stop)
        return blend(initial, final, (1.0 - done) ** 3, done)

    return schedule


@boundary("geometric_density")
def geometric_density(
    initial: float, final: float, start: int, stop: int
) -> optax.Schedule:
    r"""Density that falls by the same fraction at every update.

    .. math:: d_t = d_i \left(\frac{d_f}{d_i}\right)^{(t - start) / (stop - start)}

    for start < t < stop; d_i up to ``start`` and d_f from ``stop`` on, exactly. With n
    prunes at equal distances, the first one such distance after ``start``, each removes
    a fraction :math:`1 - (d_f / d_i)^{1/n}` of the weights that are left.

    .. note:: ``stop`` must be a count at which pruning happens, see ``cubic_density``.

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
      >>> density = schedules.geometric_density(1.0, 0.01, start=0, stop=20)
      >>> [round(float(density(t)), 4) for t in (0, 5, 10, 20, 30)]
      [1.0, 0.3162, 0.1, 0.01, 0.01]

    References:
      Mostafa and Wang, 2019, see ``dynamic_sparse``: "compressed sparse".
    """
    _check_ramp(initial, final, start, stop)

    def schedule(count):
        done = progress(count, start, stop)
        first, last = (jnp.asarray(x, jnp.float32) for x in (initial, final))
        between = jnp.clip(first * (last / first) ** done, last, first)
        return jnp.where(done >= 1.0, last, jnp.where(done <= 0.0, first, between))

    return schedule


@boundary("alternating_density")
def alternating_density(
    final: float, *, phase: int, start: int = 0, stop: int, dense: float = 1.0
) -> optax.Schedule:
    r"""Density that alternates between sparse and dense and ends sparse.

    .. math:: d_t = d_f \text{ where } t \ge stop \text{ or } t \ge start
              \text{ and } \lfloor (t - start) / phase \rfloor \text{ is even},
              \qquad d_t = dense \text{ elsewhere}

    Args:
      final: d_f, the density of sparse phases and from ``stop`` on, in (0, dense].
      phase: Length of a phase in updates, at least 1.
      start: Number of updates before the first sparse phase.
      stop: Number of updates from which on it stays sparse, at least ``start``.
      dense: The density before ``start`` and in every second phase, in (0, 1].

    Returns:
      A schedule.

    Raises:
      ValueError: If an argument is a number outside its range.

    Examples:
      >>> from sparse_optax import schedules
      >>> density = schedules.alternating_density(0.25, phase=10, start=10, stop=40)
      >>> [float(density(t)) for t in range(0, 60, 10)]
      [1.0, 0.25, 1.0, 0.25, 0.25, 0.25]

    References:
      Peste et al, `AC/DC <https://arxiv.org/abs/2106.12379>`_, 2021.
    """
    _check_fall("dense", dense, final)
    checks.updates("phase", phase, 1)
    checks.updates("start", start, 0)
    checks.updates("stop", stop, 0)
    if checks.known(start, stop) and concrete(stop) < concrete(start):
        raise ArgumentError(
            f"`stop`={stop} must be at least `start`={start}. Give the count "
            "of updates from which on the network stays sparse."
        )

    def schedule(count):
        count = jnp.asarray(count)
        even = (count - start) // phase % 2 == 0
        sparse = (count >= stop) | ((count >= start) & even)
        ends = (jnp.asarray(x, jnp.float32) for x in (final, dense))
        return jnp.where(sparse, *ends)

    return schedule


class Towards(NamedTuple):
    """A schedule of the density whose end follows from ``density`` and the parameters.

    ``regrow(ramp=Towards(make))`` calls ``make`` with the density that ``density``
    gives for the parameters, whether it is a float, counts or bytes.

    Attributes:
      make: ``make(end) -> schedule``.
    """

    make: Callable[[float], optax.Schedule]


def _check_fall(argument: str, initial: Any, final: Any) -> None:
    cure = (
        "Both are densities, the fraction of weights kept; for sparsities give 1 - s."
    )
    for name, value in ((argument, initial), ("final", final)):
        checks.number(name, value, 0, 1, ends="(]", cure=cure)
    if checks.known(initial, final) and concrete(final) > concrete(initial):
        raise ArgumentError(
            f"`final`={final} must be at most `{argument}`={initial}. {cure}"
        )


def _check_ramp(initial: Any, final: Any, start: Any, stop: Any) -> None:
    _check_fall("initial", initial, final)
    checks.updates("start", start, 0)
    checks.updates("stop", stop, 1)
    if checks.known(start, stop) and concrete(stop) <= concrete(start):
        raise ArgumentError(
            f"`stop`={stop} must be above `start`={start}. Give the count of updates "
            "at which the target is reached."
        )
