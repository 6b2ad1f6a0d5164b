"""A search that starts where the last one ended.

While a network trains, the threshold of a pool moves little from one update to the
next. What is carried is where it was and how far it moved, both in keys. The first
probes span this distance. If the answer lies outside of them, the distance grows by a
factor of about a thousand in each round; inside of them, interpolation narrows the
bracket. Any carried value gives the exact answer.

The loop differs from `bracket.search` in its form: all probes of a round are reduced
together. On CPU each small kernel of a round costs as much as reading 50,000 weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.selection import bracket as loop
from sparse_optax.selection.keys import Order

# Places of the first probes in units of the carried width, by number of probes.
_FIRST = {
    5: (-1.0, -0.3, 0.0, 0.3, 1.0),
    7: (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0),
}
# Distances of later probes from the known end, where the answer is outside of them.
_REACH = (1, 4, 16, 64, 256, 1024, 4096)
_FARTHER = 2048.0
# The smallest width: a few keys.
_LEAST = 8


class Near(NamedTuple):
    """What the search in each of P pools leaves to the next one.

    Attributes:
      bound: The key at which it cut. # shape=(P,), int32, int64 for float64 scores
      width: How far the bound moved lately, in keys. # shape=(P,), unsigned
    """

    bound: jax.Array
    width: jax.Array


def anywhere(pools: int, order: Order) -> Near:
    """What a first search may start from: a score of 1/32, and an eighth around it."""
    exponent = 127 if order.octave == 2**23 else 1023
    bound = (exponent - 5) * order.octave
    return Near(
        jnp.full((pools,), bound, order.dtype),
        jnp.full((pools,), order.octave // 8, order.unsigned),
    )


class _State(NamedTuple):
    """A bracket as in `bracket.Bracket`, with weights of one word, and the probes."""

    low: jax.Array
    high: jax.Array
    below: jax.Array
    above: jax.Array
    cells: Any
    reach: jax.Array  # how far outwards the next probes go, as a float
    probes: jax.Array


def search(
    weigh: Callable[[jax.Array], tuple[loop.Weight, jax.Array]],
    start: loop.Bracket,
    limit: loop.Weight,
    centre: jax.Array,
    width: jax.Array,
    *,
    count: int,
    bend: float,
    octave: int,
) -> tuple[loop.Bracket, jax.Array]:
    """The smallest values whose weight fits the limit, and the next widths.

    As ``bracket.search``, from values ``centre`` that are carried and how far to look
    first; weights have one word. ``octave`` is the distance of a float and its double.
    """
    (below,), (above,), (most,) = start.below, start.above, limit
    probes = _around(start, centre, width, _FIRST[count])
    real = _real_of(centre)
    state = _State(
        start.low, start.high, below, above, start.cells, width.astype(real), probes
    )

    def unfinished(s: _State) -> jax.Array:
        return jnp.any((s.low < s.high) & (s.above < most))

    def body(s: _State) -> _State:
        (weight,), cells = weigh(s.probes)
        weight, cells = lax.optimization_barrier((weight, cells))
        new = _narrowed(s, most, weight, cells)
        length = new.high - new.low
        stuck = length > (s.high - s.low) >> np.array(2, length.dtype)
        stuck |= length > np.array(2 * octave, length.dtype)
        inside = loop.Bracket(new.low, new.high, (new.below,), (new.above,))
        inner = loop.propose(inside, (most,), count, stuck, bend)
        open_above = new.high == start.high
        outside = open_above | (new.low == start.low)
        outer = _outwards(new, open_above, count)
        return new._replace(
            reach=s.reach * real(_FARTHER),
            probes=jnp.where(outside[:, None], outer, inner),
        )

    s = lax.while_loop(unfinished, body, state)
    found = loop.Bracket(s.low, s.high, (s.below,), (s.above,), s.cells)
    return found, _next_width(found, centre, width, octave)


def _real_of(values: jax.Array) -> Any:
    return np.float32 if values.dtype.itemsize == 4 else np.float64


def _around(start: loop.Bracket, centre, width, places: tuple[float, ...]):
    """Probes on both sides of a value, within the bracket, shape (P, m)."""
    share = np.array([places], _real_of(centre))
    far = (np.abs(share) * width.astype(share.dtype)[:, None]).astype(centre.dtype)
    low, high = start.low[:, None], start.high[:, None]
    centre = jnp.clip(centre[:, None], low, high)
    down = centre - jnp.minimum(far, centre - low)
    up = centre + jnp.minimum(far, high - centre)
    return jnp.where(share < 0, down, up)


def _narrowed(s: _State, limit, weight, cells) -> _State:
    """The bracket after a round. Weights never grow with the probe: of the probes that
    fit, the lowest has the largest weight, also within each cell.
    """
    fits = weight <= limit[:, None]
    over = jnp.logical_not(fits)

    def highest(chosen, values, otherwise):
        return jnp.max(jnp.where(chosen, values, otherwise[:, None]), axis=1)

    def lowest(chosen, values, otherwise):
        return jnp.min(jnp.where(chosen, values, otherwise[:, None]), axis=1)

    return s._replace(
        low=highest(over, s.probes + np.array(1, s.low.dtype), s.low),
        high=lowest(fits, s.probes, s.high),
        below=lowest(over, weight, s.below),
        above=highest(fits, weight, s.above),
        cells=None if s.cells is None else highest(fits, cells, s.cells),
    )


def _outwards(s: _State, from_low: jax.Array, count: int) -> jax.Array:
    """Probes above the low end, or below the high end, at growing distances."""
    reach = s.reach[:, None] * np.array([_REACH[:count]], s.reach.dtype)
    top = 2.0 ** (8 * s.low.dtype.itemsize)
    top = np.nextafter(np.array(top, reach.dtype), np.zeros((), reach.dtype))
    far = jnp.minimum(reach, top).astype(s.low.dtype)
    low, high = s.low[:, None], s.high[:, None]
    # From the low end to one below the high end, so that each probe tells something.
    most = jnp.maximum(high - low, 1) - np.array(1, far.dtype)
    up = low + jnp.minimum(far, most)
    down = high - jnp.minimum(jnp.maximum(far, 1), high - low)
    return jnp.where(from_low[:, None], up, down)


def _next_width(found: loop.Bracket, centre, width, octave: int) -> jax.Array:
    """How far to look at the next step: half more than the bound moved now, at least
    three quarters of the last width, and four weights at the density of the bracket.
    """
    dtype = width.dtype
    moved = jnp.maximum(centre, found.high) - jnp.minimum(centre, found.high)
    moved = jnp.minimum(moved, np.array(octave, dtype))
    real = _real_of(centre)
    between = loop.real(loop.subtract(found.below, found.above), real)
    apart = (found.high - found.low).astype(real) / jnp.maximum(between, 1)
    few = jnp.minimum(4 * apart, real(octave)).astype(dtype)
    last = width - (width >> np.array(2, dtype))
    wanted = jnp.maximum(moved + (moved >> np.array(1, dtype)), jnp.maximum(last, few))
    return jnp.clip(wanted, np.array(_LEAST, dtype), np.array(2 * octave, dtype))
