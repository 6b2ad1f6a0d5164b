"""The search loop: brackets a threshold and narrows it with a few probes per pass.

Values are unsigned integers. ``weigh(probes)`` gives the weight strictly above each
probe, which never grows with the probe. For each row (one search) the loop finds the
smallest value whose weight fits the limit. Probes are placed by linear interpolation in
the bracket and spread by its error: the standard deviation of a random order and the
curvature of a smooth density. After a round with little progress they are evenly
spaced, which bounds the number of rounds for any input.

A *weight* is a tuple of one uint32 array, or a pair of `uint64` for larger totals.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.selection import uint64

Weight = tuple[jax.Array, ...]

# Positions of probes in standard deviations, by number of probes. Tuned by simulation
# on products of Gaussians, for the fewest passes.
_OFFSETS = {
    3: (-1.0, 0.0, 1.0),
    5: (-2.0, -0.7, 0.0, 0.7, 2.0),
    7: (-1.8, -0.9, -0.4, 0.0, 0.4, 0.9, 1.8),
}


class Bracket(NamedTuple):
    """The brackets of P searches; the invariant of the loop."""

    low: jax.Array  # smallest candidate, unsigned, shape (P,)
    high: jax.Array  # largest candidate, unsigned, shape (P,)
    below: Weight  # weight strictly above `low - 1`, over the limit, shape (P,)
    above: Weight  # weight strictly above `high`, within the limit, shape (P,)
    cells: Any = None  # the counts in `above` per cell, shape (C,), if asked for


def unfinished(bracket: Bracket, limit: Weight, spare: int | None = 0) -> jax.Array:
    """Which searches still have more than one candidate, shape (P,)."""
    more = bracket.low < bracket.high
    if spare is None:
        return more
    unused = subtract(limit, bracket.above)
    return more & less(widen(jnp.uint32(spare), len(limit)), unused)


def search(
    weigh: Callable[[jax.Array], tuple[Weight, jax.Array]],
    bracket: Bracket,
    limit: Weight,
    probes: jax.Array,
    *,
    spare: int | None = 0,
    bend: float = 0.0,
) -> Bracket:
    """Narrows a bracket to the smallest value whose weight fits the limit."""

    def body(state):
        bracket, probes = state
        probes = within(bracket, probes)
        return narrow(bracket, limit, probes, *weigh(probes), bend)

    return lax.while_loop(
        lambda state: jnp.any(unfinished(state[0], limit, spare)),
        body,
        (bracket, probes),
    )[0]


def within(bracket: Bracket, probes: jax.Array) -> jax.Array:
    """Probes moved into the bracket; outside of it they would give no information."""
    return jnp.clip(probes, bracket.low[:, None], bracket.high[:, None])


def narrow(
    bracket: Bracket,
    limit: Weight,
    probes: jax.Array,
    weight: Weight,
    counts: jax.Array,
    bend: float = 0.0,
) -> tuple[Bracket, jax.Array]:
    """The bracket after one round, and the probes of the next."""
    # The barriers keep XLA from computing these again for every later use.
    probes, weight, counts = lax.optimization_barrier((probes, weight, counts))
    low, high, below, above, cells = bracket
    one = np.array(1, probes.dtype)
    for j in range(probes.shape[1]):
        probe, part = probes[:, j], tuple(word[:, j] for word in weight)
        over = less(limit, part)
        lower = jnp.logical_not(over) & (probe < high)
        higher = over & (probe >= low)
        high, above = lax.select(lower, probe, high), choose(lower, part, above)
        low, below = lax.select(higher, probe + one, low), choose(higher, part, below)
        if cells is not None:
            cells = jnp.where(lower, counts[:, j], cells)
    new = lax.optimization_barrier(Bracket(low, high, below, above, cells))
    left, was = new.high - new.low, bracket.high - bracket.low
    stuck = left > was >> np.array(2, low.dtype)
    return new, propose(new, limit, probes.shape[1], stuck, bend)


def propose(
    bracket: Bracket, limit: Weight, count: int, even, bend: float = 0.0
) -> jax.Array:
    """The next probes of each search."""
    low, high, below, above, _ = bracket
    dtype = np.float32 if low.dtype.itemsize == 4 else np.float64
    inside = jnp.maximum(real(subtract(below, above), dtype), 1)
    share = jnp.clip(real(subtract(limit, above), dtype) / inside, 0, 1)
    both = share * (1 - share)
    width = (high - low).astype(dtype)
    chance = jnp.maximum(both / inside, 0.25 / inside**2)
    spread = jnp.sqrt(chance + (bend * both * width) ** 2)
    offsets = np.array([_OFFSETS[count]], dtype)
    evenly = np.arange(1, count + 1, dtype=dtype)[None] / (count + 1)
    guided = jnp.clip(share[:, None] + spread[:, None] * offsets, 0, 1)
    place = jnp.where(even[:, None], evenly, guided)
    # The largest float below 2**32 (2**64), so that the cast cannot overflow.
    top = np.nextafter(np.array(2.0 ** (8 * low.dtype.itemsize), dtype), dtype(0))
    down = jnp.minimum(place * width[:, None], top).astype(low.dtype)
    one = np.array(1, low.dtype)
    # From `low` to one below `high`.
    down = jnp.clip(down, one, jnp.maximum(high - low, one)[:, None])
    return high[:, None] - jnp.minimum(down, high[:, None])


def widen(x: jax.Array, words: int) -> Weight:
    """A uint32 array as a weight of one or two words."""
    return (x,) if words == 1 else (jnp.zeros_like(x), x)


def less(a: Weight, b: Weight) -> jax.Array:
    """Whether a < b."""
    if len(a) == 2 and len(b) == 2:
        return uint64.less64(a, b)
    return a[0] < b[0]


def subtract(a: Weight, b: Weight) -> Weight:
    """The weight a - b."""
    if len(a) == 2 and len(b) == 2:
        return uint64.sub64(a, b)
    return (a[0] - b[0],)


def choose(condition: jax.Array, a: Weight, b: Weight) -> Weight:
    """The weight a where the condition holds, else b."""
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True))


def real(weight: Weight, dtype) -> jax.Array:
    """A weight as a float, rounded."""
    value = weight[-1].astype(dtype)
    return value if len(weight) == 1 else weight[0].astype(dtype) * 2.0**32 + value
