"""Schedules of the prune rate: the fraction of a layer that a cycle prunes."""

from typing import Any

import jax.numpy as jnp
import optax

from sparse_optax import checks
from sparse_optax.checks import boundary
from sparse_optax.schedules._ramp import blend, progress

_CURE = "Give a fraction, such as 0.5 for half the weights."


def _check(initial: Any, floor: Any, stop: Any) -> None:
    checks.number("initial", initial, 0, 1, cure=_CURE)
    most = checks.concrete(initial) if checks.known(initial) else 1
    checks.number("floor", floor, 0, most, cure=_CURE)
    cure = "Give the number of updates of the training."
    checks.updates("stop", stop, 1, cure=cure)


@boundary("cosine_prune_rate")
def cosine_prune_rate(
    initial: float = 0.5, *, stop: int, floor: float = 0.0
) -> optax.Schedule:
    r"""Prune rate that falls like a cosine.

    .. math:: p_t = floor + \frac{p_0 - floor}{2} \left(1 + \cos \frac{\pi t}{stop}
              \right) \quad \text{for } t < stop, \qquad p_t = floor \text{ afterwards}

    Args:
      initial: p_0, the prune rate at the start, in [0, 1].
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
      <https://arxiv.org/abs/1907.04840>`_, 2019. Their code has a floor of 0.005.
    """
    _check(initial, floor, stop)

    def schedule(count):
        done = progress(count, 0, stop)
        # (1 + cos x) / 2 without the cancellation near the end.
        return blend(initial, floor, jnp.cos(0.5 * jnp.pi * done) ** 2, done)

    return schedule


@boundary("linear_prune_rate")
def linear_prune_rate(
    initial: float = 0.5, *, stop: int, floor: float = 0.0
) -> optax.Schedule:
    r"""Prune rate that falls linearly.

    .. math:: p_t = floor + (p_0 - floor) (1 - t / stop)
              \quad \text{for } t < stop, \qquad p_t = floor \text{ afterwards}

    Args:
      initial: p_0, the prune rate at the start, in [0, 1].
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
      The released code of Dettmers and Zettlemoyer, 2019, see ``cosine_prune_rate``.
    """
    _check(initial, floor, stop)

    def schedule(count):
        done = progress(count, 0, stop)
        return blend(initial, floor, 1.0 - done, done)

    return schedule


@boundary("constant_prune_rate")
def constant_prune_rate(value: float = 0.5) -> optax.Schedule:
    """Constant prune rate: :math:`p_t = p`.

    Args:
      value: p, the fraction of a layer's weights that a cycle prunes, in [0, 1].

    Returns:
      A schedule.

    Raises:
      ValueError: If ``value`` is a number outside its range.

    Examples:
      >>> from sparse_optax import schedules
      >>> float(schedules.constant_prune_rate(0.25)(1000))
      0.25

    References:
      Mocanu et al, `SET <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    checks.number("value", value, 0, 1, cure=_CURE)

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
    """The given prune rate, or for None the cosine that ends at ``update_stop``.
    Without a stop None is returned, and the caller's check raises.
    """
    if prune_rate is not None or update_stop is None:
        return prune_rate
    return lambda count: cosine_prune_rate(initial, stop=update_stop, floor=floor)(
        count
    )
