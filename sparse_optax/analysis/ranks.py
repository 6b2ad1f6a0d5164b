"""Spearman's rank correlation and its interval."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_optax.checks import ArgumentError, boundary

# Two-sided 95% of a normal variable; variance of Fisher's z of ranks, times n - 3.
_NORMAL, _VARIANCE = 1.959963984540054, 1.06


class RankCorrelation(NamedTuple):
    """What ``rank_correlation`` returns.

    Attributes:
      value: The correlation, in [-1, 1]; NaN if one side is constant.
      low: Lower end of the 95% interval; NaN with fewer than four pairs.
      high: Upper end.
      count: Number of pairs.
    """

    value: float
    low: float
    high: float
    count: int


@boundary("rank_correlation")
def rank_correlation(x: Sequence[float] | Any, y: Sequence[float] | Any):
    r"""Spearman's correlation: that of the ranks, ties having their mean rank.

    The interval is that of Fisher's transform with the variance that Fieller, Hartley
    and Pearson give for ranks:

    .. math:: \tanh\left(\operatorname{artanh} r \pm 1.96 \sqrt{1.06 / (n - 3)}\right)

    Args:
      x: Numbers, of any shape.
      y: As many numbers.

    Returns:
      A ``RankCorrelation``.

    Raises:
      ValueError: If the numbers are not as many, fewer than two, not real, or not
        finite.

    Examples:
      >>> from sparse_optax.analysis import rank_correlation
      >>> found = rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5])
      >>> round(found.value, 3), found.low < 0.8 < found.high
      (0.8, True)

    References:
      Fieller, Hartley and Pearson, `Tests for rank correlation coefficients
      <https://doi.org/10.1093/biomet/44.3-4.470>`_, 1957.
    """
    x, y = _numbers("x", x), _numbers("y", y)
    if len(x) != len(y) or len(x) < 2:
        raise ArgumentError(
            f"`x` has {len(x)} numbers and `y` {len(y)}; they must be as many, two or "
            "more. Pass pairs."
        )
    for name, values in (("x", x), ("y", y)):
        if not np.isfinite(values).all():
            raise ArgumentError(
                f"`{name}` must be finite; got a NaN or an infinity. Leave such pairs "
                "out."
            )
    value = correlation(mean_ranks(x), mean_ranks(y))
    low = high = math.nan
    if len(x) > 3 and not math.isnan(value):
        if abs(value) == 1:
            low = high = value
        else:
            half = _NORMAL * math.sqrt(_VARIANCE / (len(x) - 3))
            centre = math.atanh(value)
            low, high = math.tanh(centre - half), math.tanh(centre + half)
    return RankCorrelation(value, low, high, len(x))


def _numbers(argument: str, values: Any) -> np.ndarray:
    """Real numbers in one row; raises if they are none."""
    try:
        found = np.asarray(values)
        if found.dtype.kind not in "cSU":  # complex, and text that looks like numbers
            return found.astype(np.float64).ravel()
        kind = str(found.dtype)
    except (TypeError, ValueError):
        kind = type(values).__name__
    raise ArgumentError(
        f"`{argument}` must be an array or a list of real numbers; got {kind}. Pass "
        "such numbers."
    )


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2)[inverse.ravel()]


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; NaN if one side is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(np.clip(x @ y / size, -1, 1)) if size > 0 else math.nan
