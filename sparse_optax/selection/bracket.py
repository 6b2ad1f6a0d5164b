"""The one loop: bracket a threshold, weigh a few probes, narrow, until exact.

Values are unsigned integers. ``weigh(probes)`` says how much lies strictly above
each probe, which never grows with the probe. For each row (one search), the loop
finds the smallest value whose weight fits the limit. Probes sit where a straight
line through the bracket puts the answer, spread by what that line may be off: the
standard deviation of a random order, and the bend of a smooth density; a round of
evenly spaced ones after each that got nowhere bounds the rounds for any input.

A *weight* is a tuple of one uint32 array, or of two (a pair of `wide`) where totals
pass 32 bits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax import wide

Weight = tuple[jax.Array, ...]

# Where probes go, in standard deviations, by number of probes. Tuned by simulation on
# products of Gaussians, for the fewest passes.
_OFFSETS = {
    3: (-1.0, 0.0, 1.0),
    5: (-2.0, -0.7, 0.0, 0.7, 2.0),
    7: (-1.8, -0.9, -0.4, 0.0, 0.4, 0.9, 1.8),
}


class Bracket(NamedTuple):
    """Where the answers of P searches lie; the invariant of the loop.

    Attributes:
      low: smallest candidate. Unsigned, shape (P,).
      high: largest candidate. Unsigned, shape (P,).
      below: weight strictly above ``low - 1``, over the limit. Shape (P,).
      above: weight strictly above ``high``, within the limit. Shape (P,).
      cells: how many of each cell that is, where asked for, else None. Shape (C,).
    """

    low: jax.Array
    high: jax.Array
    below: Weight
    above: Weight
    cells: Any = None


def unfinished(bracket: Bracket, limit: Weight, spare: int | None = 0) -> jax.Array:
    """Which searches still have more than one candidate, shape (P,).

    Args:
      bracket: the state of the searches.
      limit: the weight that must fit, shape (P,).
      spare: a search is also finished with at most this much unused; None demands
        the smallest value even where nothing is unused.

    Returns:
      A bool array.
    """
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
    """Narrow a bracket around the smallest value whose weight fits the limit.

    Args:
      weigh: gives the weight strictly above probes, both of shape (P, m), and how
        many of each cell that is, shape (C, m), where C is P or P is 1.
      bracket: where to start; trivially true bounds will do.
      limit: the weight that must fit, shape (P,).
      probes: the first probes, any values; shape (P, m), m = 3, 5 or 7.
      spare: see `unfinished`.
      bend: see `propose`.

    Returns:
      The final bracket; ``high`` is the answer.
    """

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
    """Probes moved into the bracket: outside they would say nothing new."""
    return jnp.clip(probes, bracket.low[:, None], bracket.high[:, None])


def narrow(
    bracket: Bracket,
    limit: Weight,
    probes: jax.Array,
    weight: Weight,
    counts: jax.Array,
    bend: float = 0.0,
) -> tuple[Bracket, jax.Array]:
    """The bracket after one round, and the probes of the next.

    Args:
      bracket: the state of the searches.
      limit: the weight that must fit, shape (P,).
      probes: shape (P, m).
      weight: strictly above each probe, shape (P, m).
      counts: how many of each cell that is, shape (C, m).
      bend: see `propose`.

    Returns:
      ``(bracket, probes)``.
    """
    # Barriers store what XLA would otherwise compute again for every later use.
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
    """The next probes of each search.

    Args:
      bracket: the state of the searches.
      limit: the weight that must fit, shape (P,).
      count: probes per search: 3, 5 or 7.
      even: where True, evenly spaced probes. Bool, shape (P,).
      bend: how far, as a share of the weight inside, the middle of a bracket may lie
        off the straight line; times four and per unit of its width.

    Returns:
      Probes in [low, high) where that is not empty. Shape (P, count).
    """
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
    # At least one below high, at most as low as low.
    down = jnp.clip(down, one, jnp.maximum(high - low, one)[:, None])
    return high[:, None] - jnp.minimum(down, high[:, None])


def widen(x: jax.Array, words: int) -> Weight:
    """A uint32 array as a weight of one or two words."""
    return (x,) if words == 1 else (jnp.zeros_like(x), x)


def less(a: Weight, b: Weight) -> jax.Array:
    """Whether a < b."""
    if len(a) == 2 and len(b) == 2:
        return wide.less64(a, b)
    return a[0] < b[0]


def subtract(a: Weight, b: Weight) -> Weight:
    """The weight a - b."""
    if len(a) == 2 and len(b) == 2:
        return wide.sub64(a, b)
    return (a[0] - b[0],)


def choose(condition: jax.Array, a: Weight, b: Weight) -> Weight:
    """The weight a where the condition holds, else b."""
    return tuple(jnp.where(condition, x, y) for x, y in zip(a, b, strict=True))


def real(weight: Weight, dtype) -> jax.Array:
    """A weight as a float, rounded."""
    value = weight[-1].astype(dtype)
    return value if len(weight) == 1 else weight[0].astype(dtype) * 2.0**32 + value
