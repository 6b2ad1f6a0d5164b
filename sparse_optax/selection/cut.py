"""Where to cut each pool: the key of the last weight kept, and ties by position."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.selection import bracket as loop
from sparse_optax.selection import follow, uint64
from sparse_optax.selection.compilation import entries
from sparse_optax.selection.follow import Near
from sparse_optax.selection.keys import Order
from sparse_optax.selection.leaf import mark_of
from sparse_optax.selection.passes import Part
from sparse_optax.selection.plan import Plan, pairs

# First probes around a guess, in powers of two, by number of probes. Tuned on GSM of
# LeNet-300-100: from batch to batch the threshold moves by a factor of 1.2, often 1.6.
_AROUND = {
    5: (-1.0, -0.3, 0.0, 0.3, 1.0),
    7: (-1.0, -0.4, -0.1, 0.0, 0.1, 0.4, 1.0),
}
# First probes within the bracket of a sample, as shares of its width, besides its ends.
_BETWEEN = {5: (0.3, 0.5, 0.7), 7: (0.2, 0.38, 0.5, 0.62, 0.8)}
# In a smaller pool a full pass costs no more than one over a sample.
_WORTH_SAMPLING = 2**14


class Cut(NamedTuple):
    """A cut through each of P pools: what is kept, exactly.

    Keys above ``bound`` are kept, and keys at it whose position is before ``ends``
    (uint32). Both hold one array for all leaves, or one per leaf with a row for each of
    its pools (``ends``: each of its cells, if pools are huge). All keys above
    ``threshold``, shape (P,), are kept and none below: it is the bound, or on request
    the smallest key kept (the highest of all if none is). ``counts`` are the weights
    kept per cell (uint32), an array per leaf; empty unless asked for. ``near`` is what
    the next search starts from, if this one started from such, and ``split`` whether
    any pool is cut among equal keys.
    """

    bound: tuple[jax.Array, ...]
    ends: tuple[jax.Array, ...]
    threshold: jax.Array
    counts: tuple[jax.Array, ...]
    near: Any = ()
    split: Any = ()


def probe_count(plan: Plan) -> int:
    """Probes per round: more if reading the leaves costs more than comparing. Fewer
    for many pools: they are searched rarely, and each probe adds to compilation.
    """
    return 7 if plan.pools == 1 and sum(plan.pool_sizes) >= 2**22 else 5


def find(part: Part, limit: uint64.Pair, guess: jax.Array | Near | None) -> Cut:
    """Finds the cut that keeps the longest prefix of each pool within its limit. A
    pool is ordered by key, highest first, then by leaf and position. This runs on each
    device for its part; all devices find the same cut.

    A guess is a key for each pool, or what the last search left: totals then have one
    word, and all weights the cost 1.
    """
    plan, values = part.plan, _Values(part.plan.order)
    count = probe_count(plan)
    limit, guess = part.varying((limit, guess))
    totals = part.varying(_words(plan, pairs(plan.totals)))
    # A larger limit is clipped to the total, which fits one word.
    whole = jnp.logical_not(uint64.less64(limit, pairs(plan.totals)))
    room = loop.choose(whole, totals, _words(plan, limit))
    low = part.varying(jnp.zeros((plan.pools,), plan.order.unsigned))
    high = jnp.where(whole, low, values.span)
    nothing = part.varying(tuple(jnp.zeros_like(word) for word in totals))
    bracket = loop.Bracket(low, high, totals, nothing)
    # The search also gives the counts per cell, except for several pools of several
    # cells each, which only leaves of 2**32 weights have.
    along = plan.counts and plan.pools in (1, plan.cells)
    if along:
        none = part.varying(jnp.zeros((plan.cells,), jnp.uint32))
        bracket = bracket._replace(cells=none)

    if isinstance(guess, Near):
        probes = bracket.low[:, None]  # the search has its own
    elif guess is not None:
        probes = values.around(guess, count)
    elif _worth_sampling(plan):
        probes = _sampled(part, room, bracket, count)
    else:
        probes = loop.propose(bracket, room, count, jnp.ones_like(whole))

    def weigh(probes):
        thresholds = _to_cells(plan, values.to_keys(probes))
        counts = part.above(thresholds)
        return _to_pools(plan, counts), counts

    def left(bracket):
        """What still fits once all keys above the bound are kept."""
        rest = loop.subtract(room, bracket.above)
        if not plan.skip_zeros:
            return rest
        at_zero = values.to_keys(bracket.high) == values.zero
        return loop.choose(at_zero & jnp.logical_not(whole), nothing, rest)

    # A weight without cost may come after the budget is used up.
    spare = 0 if all(plan.costs) else None
    bend, near, split = values.bend, (), ()
    if isinstance(guess, Near):
        bracket, width = follow.search(
            weigh,
            bracket,
            room,
            values.of_keys(guess.bound),
            guess.width,
            count=count,
            bend=bend,
            octave=plan.order.octave,
        )
        bound = values.to_keys(bracket.high)
        # A pool of which all is kept has no threshold.
        near = Near(lax.select(whole, guess.bound, bound), width)
        ends, kept = _early(part, bound, bracket, left(bracket), whole, spare)
        cut_in_two = jnp.logical_not(whole) & _some(loop.subtract(room, bracket.above))
        split = jnp.any(cut_in_two)
    elif 1 < plan.pools == plan.cells and _unit(plan) and not plan.huge:
        # If everything fits, the first value below all weights ends the search.
        bracket = bracket._replace(high=low + values.span)
        bracket, ends, kept = _search_together(
            part, values.to_keys, bracket, room, left, whole, probes, bend=bend
        )
        bound = values.to_keys(bracket.high)
    else:
        bracket = loop.search(weigh, bracket, room, probes, spare=spare, bend=bend)
        bound = values.to_keys(bracket.high)
        ends, kept = _early(part, bound, bracket, left(bracket), whole, spare)
    counts = ()
    marks = lax.optimization_barrier([leaf.mark for leaf in plan.leaves])
    marks = list(zip(plan.leaves, map(mark_of, marks), strict=True))
    if plan.counts:
        over = bracket.cells
        if not along:
            level = _to_cells(plan, bound)
            over = part.above(jnp.stack([level, level], axis=1))[:, 0]
        everything = np.array(plan.sizes, np.uint32)
        counts = jnp.where(_to_cells(plan, whole), everything, over + kept)
        counts = tuple(entries(counts, mark.cell, leaf.cells) for leaf, mark in marks)
    threshold = _least(part, bound, kept > 0) if plan.least else bound
    if plan.pools == 1 and not plan.huge:
        return Cut((bound,), (ends,), threshold, counts, near, split)
    # Sliced here, within the operation that is opaque to the partitioner: outside, it
    # would shard the row that is sliced.
    bounds = [entries(bound, mark.pool, leaf.pools) for leaf, mark in marks]
    if plan.huge:
        stops = [entries(ends, mark.cell, leaf.cells) for leaf, mark in marks]
    else:
        stops = [entries(ends, mark.pool, leaf.pools) for leaf, mark in marks]
    return Cut(tuple(bounds), tuple(stops), threshold, counts, near, split)


class _Values(NamedTuple):
    """Keys as unsigned values from 0, so that brackets can be halved."""

    order: Order

    @property
    def span(self) -> np.ndarray:
        return np.array(self.order.highest - self.order.lowest, self.order.unsigned)

    @property
    def shift(self) -> np.ndarray:
        bits = 8 * self.order.unsigned.itemsize
        return np.array(self.order.lowest % 2**bits, self.order.unsigned)

    @property
    def zero(self) -> np.ndarray:
        """The key of the score zero."""
        lowest = self.order.lowest if self.order.name == "uint32" else 0
        return np.array(lowest, self.order.dtype)

    @property
    def bend(self) -> float:
        """Curvature of counts over keys: float keys are logarithmic, tails fall."""
        return 0.0 if self.order.name == "uint32" else 0.7 / self.order.octave

    def to_keys(self, values: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(values + self.shift, self.order.dtype)

    def of_keys(self, keys: jax.Array) -> jax.Array:
        """The inverse, within the span."""
        values = lax.bitcast_convert_type(keys, self.order.unsigned) - self.shift
        return jnp.minimum(values, self.span)

    def around(self, guess: jax.Array, count: int) -> jax.Array:
        """Probes around guessed keys, shape (P, count)."""
        centre = self.of_keys(guess)
        out = []
        for power in _AROUND[count]:
            step = np.array(abs(power) * self.order.octave, self.order.unsigned)
            if power < 0:
                out.append(centre - jnp.minimum(centre, step))
            else:
                out.append(centre + jnp.minimum(self.span - centre, step))
        return jnp.stack(out, axis=1)


def _sampled(
    part: Part, limit: loop.Weight, bracket: loop.Bracket, count: int
) -> jax.Array:
    """First probes of a single pool, from a search in a sample of it."""
    plan, values = part.plan, _Values(part.plan.order)
    sample, number = part.sample(4096 if count == 5 else 32768)
    size = jnp.maximum(number, 1).astype(jnp.float32)
    share = loop.real(limit, np.float32) / float(sum(plan.totals))
    spread = 3.0 * jnp.sqrt(size * jnp.maximum(share * (1 - share), 0)) + 1
    ranks = jnp.concatenate([size * share - spread, size * share + spread])
    limit = (jnp.clip(ranks, 0, size).astype(jnp.uint32),)

    def weigh(probes):
        keys, thresholds = lax.optimization_barrier(
            (sample[None], [values.to_keys(probes[:, j, None]) for j in range(5)])
        )
        counts = lax.reduce(
            [(keys > threshold).astype(jnp.uint32) for threshold in thresholds],
            [np.uint32(0)] * 5,
            lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
            (1,),
        )
        counts = part.total(jnp.stack(counts, axis=1))
        return (counts,), counts

    # Two searches at once, for the ranks on both sides of the answer.
    low, high = (jnp.concatenate([x, x]) for x in (bracket.low, bracket.high))
    none = part.varying(jnp.zeros((2,), jnp.uint32))
    start = loop.Bracket(low, high, (none + number.astype(jnp.uint32),), (none,))
    probes = loop.propose(start, limit, 5, jnp.ones((2,), bool))
    spare = 1 if count == 5 else 4
    found = loop.search(weigh, start, limit, probes, spare=spare).high
    high, low = found[:1], found[1:]
    inner = (high - low).astype(jnp.float32)[:, None] * np.array(
        [_BETWEEN[count]], np.float32
    )
    # One below the low end: if one value fills the bracket, it is found at once.
    below = low - jnp.minimum(low, np.array(1, low.dtype))
    inner = low[:, None] + inner.astype(low.dtype)
    return jnp.concatenate([below[:, None], inner, high[:, None]], axis=1)


def _early(part: Part, bound, found: loop.Bracket, rest, whole, spare: int | None):
    """Which weights at the bound are kept: the first ones that fit the rest."""
    plan = part.plan
    sizes = plan.sizes if plan.huge else plan.pool_sizes
    sizes = np.array(sizes, np.uint32)
    none = part.varying(jnp.zeros(sizes.shape, jnp.uint32))
    sizes = none + sizes
    bound = _to_cells(plan, bound)
    most, zero = (tuple(none + np.uint32(x) for _ in rest) for x in (2**32 - 1, 0))
    limit, first = rest, jnp.any(whole & _some(rest))
    nothing = part.varying(jnp.zeros((plan.cells,), jnp.uint32))
    bracket = loop.Bracket(none, sizes, most, zero, nothing)
    if plan.huge:
        limit, first = zero, jnp.any(_some(rest))
    else:
        # The weight at the bound is known, unless everything fits at once.
        ties = loop.subtract(found.below, found.above)
        fit = jnp.logical_not(whole | loop.less(rest, ties))
        bracket = loop.Bracket(
            jnp.where(whole | fit, none, none + np.uint32(1)),
            jnp.where(fit, none, sizes),
            loop.choose(whole, most, ties),
            loop.choose(fit, ties, zero),
            nothing,
        )

    # Values count positions from the end, so that weights fall as values grow. If
    # needed, a first round counts all ties; huge pools then divide the rest.
    def body(state):
        first, limit, bracket, probes = state
        probes = jnp.where(first, np.uint32(0), loop.within(bracket, probes))
        ends = sizes[:, None] - probes
        counts = part.at(bound, ends if plan.huge else _to_cells(plan, ends))
        if not plan.huge:
            weight = _to_pools(plan, counts)
            new, probes = loop.narrow(bracket, limit, probes, weight, counts)
            return first & np.False_, limit, new, probes
        weight = _weights(plan, counts)
        share, spent = _shares(plan, tuple(word[:, 0] for word in weight), rest)
        limit = loop.choose(first, share, limit)
        new, probes = loop.narrow(bracket, limit, probes, weight, counts)
        spent = first & spent
        low, high = (jnp.where(spent, sizes, x) for x in (new.low, new.high))
        cells = jnp.where(spent, jnp.uint32(0), new.cells)
        new = new._replace(low=low, high=high, cells=cells)
        return first & np.False_, limit, new, probes

    def unfinished(state):
        first, limit, bracket, _ = state
        return first | jnp.any(loop.unfinished(bracket, limit, spare))

    if spare is None and plan.huge:
        first = none[0] == 0
    probes = loop.propose(bracket, limit, 3, none > 0)
    state = (first, limit, bracket, probes)
    _, _, bracket, _ = lax.while_loop(unfinished, body, state)
    ends = sizes - bracket.high
    kept = bracket.cells
    if spare is None:  # the search may end before it has counted what fits at once
        cells = ends if plan.huge else _to_cells(plan, ends)
        kept = part.at(bound, jnp.stack([cells, cells], axis=1))[:, 0]
    return ends, kept


def _least(part: Part, bound: jax.Array, kept: jax.Array) -> jax.Array:
    """The smallest key kept: the bound, if any weight at it is kept."""
    plan = part.plan
    lowest = part.least(_to_cells(plan, bound))
    lowest = jnp.where(kept, bound[plan.pool_of_cell], lowest)
    if plan.pools == plan.cells:
        return lowest
    if plan.pools == 1:
        return jnp.min(lowest, keepdims=True)
    return jax.ops.segment_min(lowest, plan.pool_of_cell, plan.pools)


def _shares(plan: Plan, ties, rest):
    """The part of each cell's ties that fits, when cells are served in order."""
    pool = plan.pool_of_cell
    rest = (rest[0][pool], rest[1][pool])
    before = uint64.sub64(_running(plan, ties), ties)
    spent = uint64.less64(rest, before)
    left = uint64.where64(spent, uint64.pair64(0), uint64.sub64(rest, before))
    return uint64.min64(left, ties), spent


def _running(plan: Plan, weights: uint64.Pair) -> uint64.Pair:
    """Sums over the cells of each pool up to and including each cell, along axis 0."""
    pool = plan.pool_of_cell
    first = np.searchsorted(pool, pool).astype(np.int32)
    until = lax.associative_scan(uint64.add64, weights)
    before = uint64.sub64(until, weights)
    return uint64.sub64(until, (before[0][first], before[1][first]))


def _worth_sampling(plan: Plan) -> bool:
    """Whether the first probes come from a sample: for one large pool. Not with plain
    sums, where the sample would have to be gathered.
    """
    alone = plan.pools == 1 and plan.many and _unit(plan)
    return alone and sum(plan.totals) >= _WORTH_SAMPLING


def _some(weight: loop.Weight) -> jax.Array:
    """Whether a weight is not zero."""
    return functools.reduce(jnp.bitwise_or, weight) > 0


def _unit(plan: Plan) -> bool:
    return all(cost == 1 for cost in plan.costs)


def _words(plan: Plan, pair: uint64.Pair) -> loop.Weight:
    """A pair as a weight, of one word if the costs of all pools fit."""
    return pair if plan.huge or max(plan.totals) >= 2**32 else pair[1:]


def _weights(plan: Plan, counts: jax.Array) -> loop.Weight:
    """Costs of counts per cell, shape (C, m)."""
    if _unit(plan):
        return _words(plan, uint64.pair64(counts))
    costs = jnp.asarray(np.array(plan.costs, np.uint32))[:, None]
    return _words(plan, uint64.mul32(counts, costs))


def _to_pools(plan: Plan, counts: jax.Array) -> loop.Weight:
    """Costs per pool, shape (P, m), of counts per cell, shape (C, m)."""
    weights = _weights(plan, counts)
    if plan.pools == plan.cells:
        return weights
    if len(weights) != 2:  # one pool: several pools of several cells are huge
        return (weights[0].sum(0, keepdims=True, dtype=jnp.uint32),)
    last = np.searchsorted(plan.pool_of_cell, np.arange(plan.pools), "right") - 1
    high, low = _running(plan, weights)
    return high[last], low[last]


def _to_cells(plan: Plan, values: jax.Array) -> jax.Array:
    """Values per pool as values per cell; those of a single pool stay one row."""
    if plan.pools in (1, plan.cells):
        return values
    return values[plan.pool_of_cell]


def _search_together(
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
    """Finds where to cut each of P pools of one cell each, in one loop.

    Trees of many pools are searched rarely, but compiled with every program. So each
    leaf has one kernel instead of two: it counts the weights before a pair of key and
    position, first for thresholds (at position 0), then for ties (at the threshold).
    Returns ``(bracket, ends, kept)``: the bounds, the positions before which weights at
    the bounds are kept, and the number of these.
    """
    count = probes.shape[1]
    none = part.varying(jnp.zeros(bracket.low.shape, jnp.uint32))
    sizes = none + np.array(part.plan.pool_sizes, np.uint32)

    def ties(bracket):
        """The bracket of the end; values count positions from the last one."""
        low = jnp.where(whole, none, none + np.uint32(1))
        return loop.Bracket(
            low, sizes, loop.subtract(bracket.below, bracket.above), (none,)
        )

    def first_ends(tied, bracket):
        return loop.propose(tied, left(bracket), count, none == 0)

    def searching(bracket):
        return loop.unfinished(bracket, room)

    def asked(bracket, probes, tied, tie_probes):
        """The state of the loop, with what the next round counts. So it is computed
        once, and not again in the kernel of each leaf.
        """
        first = searching(bracket)[:, None]
        probes = loop.within(bracket, probes)
        tie_probes = loop.within(tied, tie_probes)
        level = to_keys(bracket.high)[:, None]
        level = jnp.where(first, to_keys(probes), level)
        ends = jnp.where(first, np.uint32(0), sizes[:, None] - tie_probes)
        return (bracket, probes, tied, tie_probes), (level, ends)

    def body(state):
        (bracket, probes, tied, tie_probes), pairs = state
        first = searching(bracket)
        counts = part.before(*pairs)
        over = (counts,)
        at = (counts - bracket.above[-1][:, None],)
        found, next_probes = loop.narrow(bracket, room, probes, over, counts, bend)
        closer, next_ties = loop.narrow(tied, left(bracket), tie_probes, at, counts)
        found = _where(first, found, bracket)
        started = ties(found)
        tied = _where(first, started, closer)
        start = first_ends(started, found)
        tie_probes = jnp.where(first[:, None], start, next_ties)
        return asked(found, next_probes, tied, tie_probes)

    def unfinished(state):
        (bracket, _, tied, _), _ = state
        return jnp.any(searching(bracket) | loop.unfinished(tied, left(bracket)))

    tied = ties(bracket)
    state = asked(bracket, probes, tied, first_ends(tied, bracket))
    (bracket, _, tied, _), _ = lax.while_loop(unfinished, body, state)
    return bracket, sizes - tied.high, tied.above[-1]


def _where(condition, a: loop.Bracket, b: loop.Bracket) -> loop.Bracket:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
