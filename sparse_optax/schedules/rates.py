"""Prune rates: how many of a layer's weights a cycle may prune."""

import jax.numpy as jnp
import optax

from sparse_optax.schedules.parts import (
    blend,
    check_number,
    check_rates,
    check_whole,
    progress,
)


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
    check_rates("cosine_prune_rate", initial, floor)
    check_whole("cosine_prune_rate", "stop", stop, least=1)

    def schedule(count):
        done = progress(count, 0, stop)
        # (1 + cos x) / 2 without the cancellation near the end.
        return blend(initial, floor, jnp.cos(0.5 * jnp.pi * done) ** 2, done)

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
    check_rates("linear_prune_rate", initial, floor)
    check_whole("linear_prune_rate", "stop", stop, least=1)

    def schedule(count):
        done = progress(count, 0, stop)
        return blend(initial, floor, 1.0 - done, done)

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
    check_number("constant_prune_rate", "value", value, 0, 1)

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
