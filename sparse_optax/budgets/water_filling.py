"""Exact shares of a total over the layers of a network, in whole weights.

Everything is computed on the host in Python integers and fractions, without rounding
errors. The share of a layer is a line ``base + x * slope`` clipped to its bounds; one
number ``x`` for all layers makes them add up to the total. They are rounded by largest
remainder.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import NamedTuple

Number = int | Fraction


class Share(NamedTuple):
    """The share of one leaf as a function of x: a line between two bounds."""

    base: Number  # weights of a layer at x = 0
    slope: Number  # weights gained per unit of x, above 0
    low: int  # fewest weights of a layer
    high: int  # most weights of a layer; equal to `low` if the share is fixed
    cost: Number = 1  # what one weight takes from the total, at least 0
    copies: int = 1  # number of equal layers that the leaf stacks


def least(shares: Iterable[Share]) -> Number:
    """The smallest total that the bounds allow."""
    return sum(s.copies * s.cost * s.low for s in shares)


def most(shares: Iterable[Share]) -> Number:
    """The largest total that the bounds allow."""
    return sum(s.copies * s.cost * s.high for s in shares)


def level(shares: Sequence[Share], total: Number) -> list[Number]:
    r"""The exact share of one layer of each leaf, such that they cost a total.

    .. math:: s_l = \min(\max(b_l + x r_l, low_l), high_l), \quad
              \sum_l copies_l \, cost_l \, s_l = total

    The sum is piecewise linear in x and bends where a layer meets a bound, so one pass
    over the sorted bends finds x exactly. With base 0 this is the rule "a layer above
    its size becomes dense and the rest is solved again", since a dense layer can only
    raise x. For a total outside of ``least`` and ``most`` all shares are at that bound.
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
    # Below the first end the sum is `least`; between two ends it is
    # constant + slope * x.
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

    The layers with the largest fractional part get one weight more, as far as the total
    pays for it; ties go to the earlier leaf, then to the earlier slice. Returns
    ``(count, extra)`` for each leaf: its layers have ``count`` weights, the first
    ``extra`` of them one more. Every layer is within one weight of its share.
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
