"""The two thresholds of network surgery, of the mean and spread of first weights."""

import math
import numbers
from typing import Any

import jax
import jax.numpy as jnp


def thresholds(
    params: tuple[jax.Array, ...], c: float, factor: float
) -> tuple[jax.Array, ...]:
    """Factor * max(mean + c * standard deviation, 0) of the |w| that are not zero.

    Args:
      params: Weights, one array a leaf.
      c: Standard deviations above the mean.
      factor: A number.

    Returns:
      float32 scalars.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.regrowth import spread
      >>> float(spread.thresholds((jnp.array([3.0, 0.0, -1.0]),), 1.0, 0.5)[0])
      1.5
    """
    found = []
    for w in params:
        size, there = jnp.abs(w.astype(jnp.float32)), w != 0
        mean = jnp.mean(size, where=there)
        spread = jnp.std(size, where=there)
        found.append(factor * jnp.maximum(jnp.nan_to_num(mean + c * spread), 0.0))
    return tuple(found)


def check_spread(caller: str, c: Any, factor: Any, gamma: Any, power: Any) -> None:
    """Raises where a number of ``below_spread`` or ``above_spread`` is out of range.

    Args:
      caller: The name that the error starts with.
      c: Any finite number.
      factor: At least 0.
      gamma: At least 0.
      power: At least 0.

    Raises:
      ValueError: For the first that does not fit.

    Examples:
      >>> from sparse_optax.regrowth import spread
      >>> spread.check_spread("doc", 0.0, 0.9, 0.0, 1.0)
    """
    given = {"c": c, "factor": factor, "gamma": gamma, "power": power}
    for name, value in given.items():
        least = -math.inf if name == "c" else 0.0
        number = float(value) if isinstance(value, numbers.Real) else math.nan
        if not (least <= number and abs(number) < math.inf):
            allowed = "finite" if name == "c" else "at least 0 and finite"
            raise ValueError(
                f"{caller}: `{name}` must be a number, {allowed}; got {value!r}. Use "
                "c=1.0 and leave out the others, for instance."
            )
