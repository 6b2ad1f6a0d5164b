"""What patterns there are: records, made by one function each."""

import math
from typing import Any, NamedTuple

from sparse_optax.selection.rows import LONGEST


class Pattern(NamedTuple):
    """How a leaf is cut into units; made by the functions of this module.

    Attributes:
      name: what errors call it.
      sizes: ``(axis, size)`` of a unit along some axes.
      others: its size along all others: 1, or None for their whole length.
      n: for N:M, how many of a group are kept; else 0.
      m: for N:M, how many a group has; else 0.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    others: int | None = 1
    n: int = 0
    m: int = 0


def _whole(
    caller: str, name: str, value: Any, low: int, high: float = math.inf
) -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not low <= value <= high
    ):
        allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(
            f"{caller}: `{name}` must be an integer {allowed}; got {value!r}. Give a "
            "number of weights, such as blocks(4, 4) or n_m(2, 4)."
        )


def blocks(rows: int, columns: int, *, axes: tuple[int, int] = (-2, -1)) -> Pattern:
    """Rectangles of ``rows`` x ``columns`` weights: of inputs and outputs.

    A convolution kernel has such blocks at each of its positions.

    Args:
      rows: weights of a block along the first axis, at least 1.
      columns: along the second, at least 1.
      axes: the two axes, those of inputs and outputs.

    Returns:
      A pattern.

    Raises:
      ValueError: if a size is no integer of at least 1.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.unit_size(patterns.blocks(4, 2), (3, 3, 8, 6))
      8
    """
    _whole("blocks", "rows", rows, 1)
    _whole("blocks", "columns", columns, 1)
    return Pattern(f"blocks({rows}, {columns})", ((axes[0], rows), (axes[1], columns)))


def output_units(*, axis: int = -1) -> Pattern:
    """All weights that lead to one output unit or channel.

    Args:
      axis: the axis of the outputs; 0 in equinox.

    Returns:
      A pattern.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.unit_size(patterns.output_units(), (3, 3, 8, 6))
      72
    """
    return Pattern("output_units()", ((axis, 1),), others=None)


def slices(*, axes: tuple[int, int] = (-2, -1)) -> Pattern:
    """The spatial slices of convolution kernels: one for each input and output.

    Args:
      axes: the axes of inputs and outputs.

    Returns:
      A pattern. Of a dense kernel each weight is a slice.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.unit_size(patterns.slices(), (3, 3, 8, 6))
      9
    """
    return Pattern("slices()", ((axes[0], 1), (axes[1], 1)), others=None)


def n_m(n: int, m: int, *, axis: int = -2) -> Pattern:
    """N:M sparsity: n weights of each m neighbours along the contraction axis.

    Hardware that multiplies 2:4 sparse matrices skips zeros along the axis over which
    it sums: that of the inputs.

    Args:
      n: weights kept of a group, at least 1 and at most m.
      m: weights of a group, from 2 to 32.
      axis: the contraction axis; 1 in equinox.

    Returns:
      A pattern. The density is n / m in every layer, in the end where it falls.

    Raises:
      ValueError: if n or m is out of its range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import patterns
      >>> kernel = jnp.array([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]])
      >>> patterns.view(patterns.n_m(2, 4), kernel).tolist()
      [[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]]
    """
    _whole("n_m", "m", m, 2, LONGEST)
    _whole("n_m", "n", n, 1, m)
    return Pattern(f"n_m({n}, {m})", ((axis, m),), n=n, m=m)
