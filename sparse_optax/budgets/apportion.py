"""Exact shares of a total over the layers of a network, in whole weights.

Host arithmetic on Python integers and fractions: no array, no rounding error, the
same answer on every machine. A layer's share is a straight line ``base + x * slope``
cut off at its bounds; one number ``x`` for all layers makes the shares add up to the
total. Then the shares become whole numbers by largest remainder. Which lines there are
is the business of ``sparse_optax.budgets``; nothing here is public.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.core import Tracer

from sparse_optax.leaves import (
    PyTree,
    Where,
    is_hole,
    layout,
    leaf_names,
    resolve_where,
)

Number = int | Fraction


# --- numbers --------------------------------------------------------------------------
def is_traced(value: Any) -> bool:
    """Tells whether a value is known only when the program runs."""
    return isinstance(value, Tracer)


def as_fraction(
    value: Any, caller: str, argument: str, *, decimal: bool = False
) -> Fraction:
    """The value of a number as a fraction; -1 for what is not a finite number.

    A float32, and with ``decimal`` any float, is read by its shortest decimal form:
    0.29 is then 29/100 and not 0.28999999, which would keep 28 of 100 weights.
    """
    if is_traced(value):
        raise ValueError(
            f"{caller}: `{argument}` is a traced value; whole counts need a Python "
            "number. Give a float, or list the argument in `static_args` of "
            "optax.inject_hyperparams."
        )
    if isinstance(value, np.generic | np.ndarray | jax.Array) and not value.shape:
        text = str(np.asarray(value)[()])
    elif isinstance(value, int | float | Fraction) and not isinstance(value, bool):
        text = repr(value) if decimal and isinstance(value, float) else value
    else:
        text = "no number"
    try:
        return Fraction(text)
    except (ValueError, OverflowError):
        return Fraction(-1)  # outside every range: the caller's check speaks


def check_density(density: Any, caller: str, argument: str = "density") -> Fraction:
    """The density as the closest fraction of denominator at most 10**9."""
    value = as_fraction(density, caller, argument)
    if not 0 < value <= 1:
        raise ValueError(
            f"{caller}: `{argument}` must be a number in (0, 1]; got {density!r}. A "
            "density is the fraction of weights to keep: 0.05 keeps 5%."
        )
    return value.limit_denominator(10**9)


def check_whole(n: Any, caller: str, least: int = 1) -> int:
    """The number as a Python integer; 1e6 is welcome, 0.5 is not."""
    value = as_fraction(n, caller, "n")
    if value.denominator != 1 or value < least:
        raise ValueError(
            f"{caller}: `n` must be a whole number of at least {least}; got {n!r}. "
            "Give an integer."
        )
    return int(value)


def plain(number: Number) -> Number:
    """A Python integer where it is one, which reads better and selects faster."""
    return int(number) if number == int(number) else number


def _show(number: Number) -> str:
    number = plain(number)
    return str(number) if isinstance(number, int) else f"{float(number):.6g}"


# --- shares ---------------------------------------------------------------------------
class Share(NamedTuple):
    """What one leaf may get: a line between two bounds.

    Attributes:
      base: Weights a layer has at x = 0.
      slope: Weights a layer gains per unit of x, above 0.
      low: Fewest weights a layer may have.
      high: Most weights a layer may have; where it equals ``low`` the share is fixed.
      cost: What one weight takes out of the total, at least 0.
      copies: Number of equal layers that the leaf stacks.
    """

    base: Number
    slope: Number
    low: int
    high: int
    cost: Number = 1
    copies: int = 1


def least(shares: Iterable[Share]) -> Number:
    """The smallest total that the bounds allow."""
    return sum(s.copies * s.cost * s.low for s in shares)


def most(shares: Iterable[Share]) -> Number:
    """The largest total that the bounds allow."""
    return sum(s.copies * s.cost * s.high for s in shares)


def level(shares: Sequence[Share], total: Number) -> list[Number]:
    r"""Exact shares that cost a total: water filling.

    .. math:: s_l = \min(\max(b_l + x r_l, low_l), high_l), \quad
              \sum_l copies_l \, cost_l \, s_l = total

    The sum grows with x along straight pieces that end where a layer meets a bound, so
    that one walk over the sorted ends finds x exactly. With base 0 this is the rule "a
    layer above its size becomes dense and the rest is solved again", since a layer made
    dense can only raise x.

    Args:
      shares: What each leaf may get.
      total: What they may cost together. Outside the bounds of ``least`` and ``most``
        every share is at that bound.

    Returns:
      The share of one layer of each leaf.

    Examples:
      >>> from sparse_optax.budgets.apportion import Share, level
      >>> [str(s) for s in level([Share(0, 4, 0, 3), Share(0, 1, 0, 9)], 5)]
      ['3', '2']
    """
    if total >= most(shares):
        return [s.high for s in shares]
    if total <= least(shares):
        return [s.low for s in shares]
    ends = []
    for s in shares:
        if s.low < s.high:
            cost, start = s.copies * s.cost, Fraction(s.low - s.base) / s.slope
            stop = Fraction(s.high - s.base) / s.slope
            ends.append((start, cost * s.slope, cost * (s.base - s.low)))
            ends.append((stop, -cost * s.slope, cost * (s.high - s.base)))
    # Left of the first end no layer grows and the sum is `least`; between two ends
    # it is constant + slope * x.
    constant, slope = Fraction(least(shares)), Fraction(0)
    for end, more_slope, more_constant in sorted(ends):
        if constant + slope * end >= total:
            break
        slope += more_slope
        constant += more_constant
    x = (total - constant) / slope
    return [min(max(s.base + x * s.slope, s.low), s.high) for s in shares]


def whole(
    shares: Sequence[Share], exact: Sequence[Number], total: Number
) -> list[tuple[int, int]]:
    """Whole numbers for exact shares: floors, then the largest remainders.

    The layers with the largest fractional part get one weight more, as far as the
    total pays for it; ties go to the earlier leaf, then to the earlier slice. Every
    layer ends within one weight of its share, and so within its bounds.

    Args:
      shares: What each leaf may get.
      exact: The share of one layer of each leaf, from ``level``.
      total: What the whole numbers may cost together.

    Returns:
      For each leaf ``(count, extra)``: its layers have ``count`` weights, and the
      first ``extra`` of them one more.

    Examples:
      >>> from fractions import Fraction
      >>> from sparse_optax.budgets.apportion import Share, whole
      >>> half = Fraction(5, 2)
      >>> whole([Share(0, 1, 0, 9), Share(0, 1, 0, 9, copies=3)], [half, half], 10)
      [(2, 1), (2, 1)]
    """
    floors = [int(x) for x in exact]
    spare = total - sum(
        s.copies * s.cost * f for s, f in zip(shares, floors, strict=True)
    )
    remainder = [x - f for x, f in zip(exact, floors, strict=True)]
    extra = [0] * len(shares)
    for i in sorted(range(len(shares)), key=lambda i: -remainder[i]):
        s = shares[i]
        if remainder[i]:
            extra[i] = min(s.copies, int(spare // s.cost)) if s.cost else s.copies
            spare -= extra[i] * s.cost
    return list(zip(floors, extra, strict=True))


# --- the layers of a tree -------------------------------------------------------------
class Leaf(NamedTuple):
    """A leaf that takes part, as ``copies`` layers of one shape.

    Attributes:
      name: Its normalised name.
      shape: Shape of a layer.
      size: Number of weights of a layer.
      copies: Number of layers.
      width: Bytes of one weight.
      stacked: Whether its layers are counted one by one.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    copies: int
    width: int
    stacked: bool


class Layers(NamedTuple):
    """The leaves that take part in a tree.

    Attributes:
      structure: The structure of the tree, holes being leaves.
      names: Names of all its leaves.
      index: Positions of the leaves that take part.
      leaves: These leaves.
      size: Their number of weights.
    """

    structure: Any
    names: list[str]
    index: tuple[int, ...]
    leaves: list[Leaf]
    size: int

    def rebuild(self, values: Iterable[Any]) -> PyTree:
        """A tree of one value a leaf that takes part, holes elsewhere."""
        full: list[Any] = [optax.MaskedNode()] * len(self.names)
        for i, value in zip(self.index, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(self.structure, full)


def read(
    params: PyTree,
    where: Where | None,
    stacked: Mapping[str, int] | None,
    caller: str,
) -> Layers:
    """Reads the layers of a tree from shapes alone."""
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    names = leaf_names(params)
    chosen = resolve_where(params, where, caller=caller)
    plan = layout(params, chosen, stacked, caller=caller)
    # A tree without any array is no mistake: `optax.tree.map_params` calls `init` with
    # one, and `optax.partition` may hand a group nothing but holes.
    if not plan.index and not all(is_hole(x) for x in flat):
        raise ValueError(
            f"{caller}: no leaf takes part; at least one of {names} must. Pass the "
            "parameters of a layer with a kernel, or choose leaves with `where`."
        )
    leaves = []
    for i, name, axis in zip(*plan, strict=True):
        shape, copies = tuple(flat[i].shape), 1
        if axis is not None:
            shape, copies = shape[:axis] + shape[axis + 1 :], shape[axis]
        width = np.dtype(flat[i].dtype).itemsize
        leaves.append(
            Leaf(name, shape, math.prod(shape), copies, width, axis is not None)
        )
    size = sum(x.size * x.copies for x in leaves)
    return Layers(structure, names, plan.index, leaves, size)


def _fixed(budget: Any, layers: Layers, caller: str) -> dict[str, int]:
    """Weights a layer of the leaves that `dense` and `overrides` settle."""
    sizes = {x.name: x.size for x in layers.leaves}
    fixed = dict.fromkeys(budget.dense, Fraction(1))
    for name, density in budget.overrides:
        fixed[name] = check_density(density, caller, f"overrides[{name!r}]")
    unknown = [name for name in fixed if name not in sizes]
    if unknown and layers.leaves:
        raise ValueError(
            f"{caller}: `overrides` or `dense` names {unknown}, which do not take "
            f"part; they must name some of {list(sizes)}. Correct the names."
        )
    return {
        name: max(math.floor(fixed[name] * size), min(1, size))
        for name, size in sizes.items()
        if name in fixed
    }


def _shares(
    budget: Any,
    layers: Layers,
    slope: Callable[[Leaf], Number],
    costs: Iterable[Number],
    caller: str,
) -> list[Share]:
    fixed = _fixed(budget, layers, caller)
    shares = []
    for x, cost in zip(layers.leaves, costs, strict=True):
        low, high = min(1, x.size), x.size
        if x.name in fixed:
            low = high = fixed[x.name]
        rise = slope(x) if low < high else 1
        shares.append(Share(0, rise, low, high, cost, x.copies))
    return shares


def _counts(layers: Layers, shares: list[Share], goal: Number, total: Number) -> PyTree:
    values = []
    rounded = whole(shares, level(shares, goal), total)
    for x, (base, extra) in zip(layers.leaves, rounded, strict=True):
        if x.stacked:
            values.append(base + (np.arange(x.copies, dtype=np.int64) < extra))
        else:
            values.append(base + extra)
    return layers.rebuild(values)


def by_total(
    budget: Any,
    layers: Layers,
    goal: Number,
    slope: Callable[[Leaf], Number],
    *,
    equal_spill: bool = False,
    asked: str,
    caller: str,
) -> PyTree:
    """Counts that add up to floor(goal).

    The shares are those of the goal before it is rounded down, so that a uniform
    density gives each layer floor(d * size) weights or one more.
    """
    total, size = math.floor(goal), layers.size
    shares = _shares(budget, layers, slope, [1] * len(layers.leaves), caller)
    low, high = least(shares), most(shares)
    if layers.leaves and total < low:
        raise ValueError(
            f"{caller}: {asked} keeps {total} of {size} weights, fewer than {low}: "
            "every layer keeps at least one and leaves in `dense` or `overrides` keep "
            f"theirs. Keep {low} or more (a density of {low}/{size}), or leave leaves "
            "out with `where`."
        )
    if layers.leaves and total > high:
        room = "`overrides` leave room for" if high < size else "there are only"
        raise ValueError(
            f"{caller}: {asked} keeps {total} of {size} weights, but {room} {high}. "
            f"Keep {high} or fewer{', or raise the overrides' * (high < size)}."
        )
    free = [s for s in shares if s.low < s.high]
    if equal_spill and free:
        rest = Fraction(goal) - least(s for s in shares if s.low == s.high)
        scale = rest / sum(s.copies * s.slope for s in free)
        shares = [s._replace(base=scale * s.slope, slope=1) for s in shares]
    return _counts(layers, shares, goal, total)


def by_cost(
    budget: Any, layers: Layers, amount: Number, costs: list[Number], caller: str
) -> PyTree:
    """Counts at one density whose summed cost fits an amount."""
    shares = _shares(budget, layers, lambda x: x.size, costs, caller)
    low = least(shares)
    if layers.leaves and amount < low:
        raise ValueError(
            f"{caller}: `n` leaves {_show(amount)} for the weights and must leave at "
            f"least {_show(low)}: every layer keeps at least one weight and leaves in "
            "`dense` or `overrides` keep theirs. Raise `n` by "
            f"{_show(low - amount)}, or leave leaves out with `where`."
        )
    return _counts(layers, shares, amount, amount)
