"""Densities that move: how many weights there are at a count."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from sparse_optax.schedules.parts import (
    blend,
    check_number,
    check_whole,
    known,
    progress,
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
    _check_ramp("cubic_density", initial, final, start, stop)

    def schedule(count):
        done = progress(count, start, stop)
        return blend(initial, final, (1.0 - done) ** 3, done)

    return schedule


def geometric_density(
    initial: float, final: float, start: int, stop: int
) -> optax.Schedule:
    r"""Density that falls by the same fraction of what is left with every update.

    .. math:: d_t = d_i \left(\frac{d_f}{d_i}\right)^{(t - start) / (stop - start)}

    for start < t < stop; d_i up to ``start`` and d_f from ``stop`` on, exactly. Pruned
    n times at equal distances, the first of them one such distance after ``start``, a
    network loses :math:`1 - (d_f / d_i)^{1/n}` of its weights each time.

    .. note:: As with ``cubic_density``, let ``stop`` be a count at which pruning
      happens.

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
      Mostafa and Wang, `Parameter Efficient Training of Deep Convolutional Neural
      Networks by Dynamic Sparse Reparameterization
      <https://arxiv.org/abs/1902.05967>`_, 2019, whose "compressed sparse" baseline
      prunes so.
    """
    _check_ramp("geometric_density", initial, final, start, stop)

    def schedule(count):
        done = progress(count, start, stop)
        first, last = (jnp.asarray(x, jnp.float32) for x in (initial, final))
        between = jnp.clip(first * (last / first) ** done, last, first)
        return jnp.where(done >= 1.0, last, jnp.where(done <= 0.0, first, between))

    return schedule


def alternating_density(
    final: float, *, phase: int, start: int = 0, stop: int, dense: float = 1.0
) -> optax.Schedule:
    r"""Density that goes to and fro between sparse and dense, and ends sparse.

    .. math:: d_t = d_f \text{ where } t \ge stop \text{ or } t \ge start
              \text{ and } \lfloor (t - start) / phase \rfloor \text{ is even},
              \qquad d_t = dense \text{ elsewhere}

    Args:
      final: d_f, the density of sparse phases and from ``stop`` on, in (0, dense].
      phase: Length of a phase in updates, at least 1.
      start: Number of updates after which the first sparse phase begins.
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
      Peste et al, `AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
      Networks <https://arxiv.org/abs/2106.12379>`_, 2021.
    """
    name = "alternating_density"
    _check_fall(name, "dense", dense, final)
    check_whole(name, "phase", phase, least=1)
    check_whole(name, "start", start, least=0)
    check_whole(name, "stop", stop, least=0)
    if known(start, stop) and stop < start:
        raise ValueError(
            f"{name}: `stop`={stop} must be at least `start`={start}. Give the count "
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
    """A schedule of the density whose end is known with the parameters alone.

    ``regrow(budget=Towards(make))`` calls ``make`` with the density that ``density``
    comes to, whatever it is: a float, counts, bytes. So the schedule ends there.

    Attributes:
      make: ``make(end) -> schedule``.
    """

    make: Callable[[float], optax.Schedule]


def _check_fall(caller: str, argument: str, initial: Any, final: Any) -> None:
    for name, value in ((argument, initial), ("final", final)):
        check_number(caller, name, value, 0, 1, above=True)
    if known(initial, final) and final > initial:
        raise ValueError(
            f"{caller}: `final`={final} must be at most `{argument}`={initial}; both "
            "are densities, the fraction of weights kept. For sparsities s give 1 - s."
        )


def _check_ramp(caller: str, initial: Any, final: Any, start: Any, stop: Any) -> None:
    _check_fall(caller, "initial", initial, final)
    check_whole(caller, "start", start, least=0)
    check_whole(caller, "stop", stop, least=1)
    if known(start, stop) and stop <= start:
        raise ValueError(
            f"{caller}: `stop`={stop} must be above `start`={start}. Give the "
            "count of updates at which the target is reached."
        )
