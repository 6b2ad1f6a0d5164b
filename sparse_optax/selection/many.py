"""Many pools at once: one loop for thresholds and ties, to compile half as much.

A tree whose leaves are pools is searched now and then, in a cycle, but compiled with
every program. So the search here has one kernel a leaf instead of two: it counts the
weights that come before a pair of key and position, which serves for thresholds (at
position 0) and then for ties (at the threshold).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.selection import bracket as loop
from sparse_optax.selection.passes import Part


def search(
    part: Part,
    to_keys,
    bracket: loop.Bracket,
    room: loop.Weight,
    left: Callable[[loop.Bracket], loop.Weight],
    whole: jax.Array,
    probes: jax.Array,
    *,
    bend: float,
) -> tuple[loop.Bracket, jax.Array, jax.Array]:
    """Finds where to cut each of P pools that are a cell each.

    Args:
      part: the leaves; every weight costs 1.
      to_keys: from values, in which brackets are halved, to keys.
      bracket: where the thresholds lie, shape (P,).
      room: how many fit, shape (P,).
      left: how many still fit once all above a bracket's bound are kept.
      whole: whether all weights of a pool fit, shape (P,).
      probes: the first probes, shape (P, m).
      bend: see `loop.propose`.

    Returns:
      ``(bracket, ends, kept)``: where the bounds are, the positions before which
      weights at them are kept, and how many these are. Shape (P,).
    """
    count = probes.shape[1]
    none = part.varying(jnp.zeros(bracket.low.shape, jnp.uint32))
    sizes = none + np.array(part.plan.pool_sizes, np.uint32)

    def ties(bracket):
        """Where to look for the end: values count positions from the last one."""
        low = jnp.where(whole, none, none + np.uint32(1))
        return loop.Bracket(
            low, sizes, loop.subtract(bracket.below, bracket.above), (none,)
        )

    def first_ends(tied, bracket):
        return loop.propose(tied, left(bracket), count, none == 0)

    def searching(bracket):
        return loop.unfinished(bracket, room)

    def body(state):
        bracket, probes, tied, tie_probes = state
        first = searching(bracket)
        probes = loop.within(bracket, probes)
        tie_probes = loop.within(tied, tie_probes)
        level = to_keys(bracket.high)[:, None]
        level = jnp.where(first[:, None], to_keys(probes), level)
        ends = jnp.where(first[:, None], np.uint32(0), sizes[:, None] - tie_probes)
        counts = part.before(level, ends)
        over = (counts,)
        at = (counts - bracket.above[-1][:, None],)
        found, next_probes = loop.narrow(bracket, room, probes, over, counts, bend)
        closer, next_ties = loop.narrow(tied, left(bracket), tie_probes, at, counts)
        found = _where(first, found, bracket)
        started = ties(found)
        tied = _where(first, started, closer)
        start = first_ends(started, found)
        tie_probes = jnp.where(first[:, None], start, next_ties)
        return found, next_probes, tied, tie_probes

    def unfinished(state):
        bracket, _, tied, _ = state
        return jnp.any(searching(bracket) | loop.unfinished(tied, left(bracket)))

    tied = ties(bracket)
    state = bracket, probes, tied, first_ends(tied, bracket)
    bracket, _, tied, _ = lax.while_loop(unfinished, body, state)
    return bracket, sizes - tied.high, tied.above[-1]


def _where(condition, a: loop.Bracket, b: loop.Bracket) -> loop.Bracket:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
