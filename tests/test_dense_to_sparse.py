"""Methods that become sparse while they train, against NumPy oracles."""

import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_dense_to_sparse as oracles
import pytest
from helpers import (
    at_step,
    kept,
    kernels,
    network,
    random_gradients,
    refuses,
    stepper,
)

import sparse_optax
from sparse_optax import budgets, patterns, regrowth, schedules, selection
from sparse_optax.regrowth import rules

SHAPES = ((6, 5), (5, 4))
SIZES = (30, 20)
LR, BETA = 0.1, 0.9
SGD = optax.sgd(LR, momentum=BETA)
CLOSE = dict(rtol=2e-5, atol=2e-6)


def run(tx, params, grads):
    """``(params, state)`` after each step."""
    state, step = tx.init(params), stepper(tx)
    for t in range(len(jax.tree.leaves(grads)[0])):
        params, state = step(params, state, at_step(grads, t))
        yield params, state


def start(steps, shapes=SHAPES, seed=1):
    """Parameters and gradients for the library, and in float64 for the oracle."""
    params = network(shapes)
    grads = random_gradients(seed, params, steps)
    weights = [np.float64(w) for w in kernels(params)]
    step_grads = list(zip(*(np.float64(g) for g in kernels(grads)), strict=True))
    return params, grads, weights, step_grads


def equals(got, wanted):
    """Masks to the bit, weights but for rounding, exact zeros."""
    seen = []
    for (params, state), (weights, mask, *rest) in zip(got, wanted, strict=True):
        shown = rest[0] if rest else weights
        for m, wanted_mask in zip(kept(state), mask, strict=True):
            np.testing.assert_array_equal(m, wanted_mask)
        for w, wanted_w, m in zip(kernels(params), shown, mask, strict=True):
            np.testing.assert_allclose(w, wanted_w, **CLOSE)
            assert not w[~m].tobytes().strip(b"\0")
        if rest:
            hidden = jax.tree.leaves(state.hidden)
            for h, wanted_h in zip(hidden, weights, strict=True):
                np.testing.assert_allclose(h, wanted_h, **CLOSE)
        seen.append([int(m.sum()) for m in mask])
    assert int(state.skipped) == 0
    return seen


def dense(shapes=SHAPES):
    return [np.ones(s, bool) for s in shapes]


# --- gradual, iterative, one-shot -----------------------------------------------------


@pytest.mark.parametrize(
    ("period", "begin", "stop", "initial", "final"),
    [
        (3, 0, 20, 1.0, 0.2),  # due at 3, 6 ... 18
        (3, 4, 18, 0.7, 0.2),  # the start between two counts, the stop on one
        (1, 5, 9, 1.0, 0.1),
        (5, 5, 6, 0.5, 0.2),  # a single count
    ],
)
def test_gradual_magnitude(period, begin, stop, initial, final):
    """The paper's masks, and its density where the paper has one."""
    due = [t for t in range(24) if oracles.due(t, period, begin, stop)]
    t0, n = due[0], len(due) - 1

    def counts_at(t):
        if t not in due:
            return None
        s = 1 - final
        if n:
            s = oracles.zhu_gupta(t, 1 - initial, 1 - final, t0, n, period)
        d = final if t == due[-1] else 1 - s
        return [oracles.target(d, final, k, int(final * k + 1e-9)) for k in SIZES]

    tx = sparse_optax.gradual_magnitude(
        SGD,
        density=final,
        initial_density=initial,
        update_period=period,
        update_start=begin,
        update_stop=stop,
    )
    params, grads, weights, step_grads = start(24)
    seen = equals(
        run(tx, params, grads),
        oracles.train_pruned(weights, dense(), step_grads, counts_at, lr=LR, beta=BETA),
    )
    assert seen[due[0] - 1] == list(SIZES)
    assert seen[due[-1]] == seen[-1] == [round(final * k) for k in SIZES]


@pytest.mark.parametrize(
    ("period", "density"),
    [(1, 0.1), (30, 0.1), (30, budgets.erdos_renyi_kernel(0.1)), (99, 0.1)],
)
def test_a_ramp_cannot_end_short_of_its_target(period, density):
    """With 100 updates and a cycle every 30 the plain ramp ends at 0.124, not 0.1."""
    params = {"a": jnp.ones((40, 30)), "z": jnp.ones((20, 10))}
    wanted = jax.tree.leaves(budgets.resolve(density, params))
    last = schedules.last_due(period, update_stop=100)
    plain = schedules.cubic_density(1.0, 0.1, 0, 100)
    assert last == 99 or float(plain(last)) > 0.100001

    tx = sparse_optax.gradual_magnitude(
        optax.sgd(0.0), density=density, update_period=period, update_stop=100
    )
    state = tx.init(params)
    step = stepper(tx)
    for t in sorted({last - 1, last}):
        state = state._replace(count=jnp.int32(t))
        params, state = step(params, state, params)
    assert [int(m.sum()) for m in kept(state)] == wanted
    assert [int((w != 0).sum()) for w in jax.tree.leaves(params)] == wanted


@pytest.mark.parametrize("kept", [1, 4])
def test_a_ramp_starts_dense_also_where_one_weight_goes(kept):
    params = {"w": jnp.arange(1.0, 6.0).reshape(5, 1)}
    tx = sparse_optax.gradual_magnitude(
        optax.sgd(0.0), density=budgets.nonzeros(kept), update_period=2, update_stop=3
    )
    state, counts = tx.init(params), []
    for _ in range(4):
        _, state = tx.update(params, state, params)
        counts.append(int(sparse_optax.get_masks(state)["w"].sum()))
    assert counts == [5, 5, kept, kept]


@pytest.mark.parametrize(("n", "period", "begin"), [(4, 3, 0), (1, 5, 0), (3, 2, 7)])
def test_iterative_magnitude(n, period, begin):
    final = 0.2
    first = next(t for t in range(99) if oracles.due(t, period, begin, 99))

    def counts_at(t):
        k = (t - first) // period + 1
        if t < first or (t - first) % period or k > n:
            return None
        d = oracles.compressed(k, 1 - final, n) if k < n else final
        return [oracles.target(d, final, k, round(final * k)) for k in SIZES]

    tx = sparse_optax.iterative_magnitude(
        SGD, density=final, prunes=n, update_period=period, update_start=begin
    )
    steps = first + n * period
    params, grads, weights, step_grads = start(steps)
    seen = equals(
        run(tx, params, grads),
        oracles.train_pruned(weights, dense(), step_grads, counts_at, lr=LR, beta=BETA),
    )
    assert len({tuple(c) for c in seen}) == n + 1
    assert seen[-1] == [6, 4]


def test_one_shot_magnitude():
    tx = sparse_optax.one_shot_magnitude(SGD, density=0.2, at=4)
    params, grads, weights, step_grads = start(10)
    seen = equals(
        run(tx, params, grads),
        oracles.train_pruned(
            weights,
            dense(),
            step_grads,
            lambda t: [6, 4] if t == 4 else None,
            lr=LR,
            beta=BETA,
        ),
    )
    assert seen == [[30, 20]] * 4 + [[6, 4]] * 6


def test_pruning_by_hand():
    """Ties: of equal magnitudes the lowest index stays. One weight stays one weight."""
    params = {"a": jnp.array([[1.0, -2.0, 2.0, 1.0, -1.0, 0.5]]), "z": jnp.ones((1, 1))}
    tx = sparse_optax.one_shot_magnitude(optax.sgd(0.0), density={"a": 3, "z": 1}, at=1)
    *_, (after, _) = run(tx, params, random_gradients(0, params, 2))
    assert after["a"].tolist() == [[1.0, -2.0, 2.0, 0.0, 0.0, 0.0]]
    assert after["z"].tolist() == [[1.0]]


RULES = {
    "two_sided": regrowth.prune.two_sided,
    "zeros": regrowth.prune.zeros,
    "global_zeros": regrowth.prune.global_zeros,
    "adaptive_threshold": regrowth.prune.adaptive_threshold(),
    "below_spread": regrowth.prune.below_spread(0.0),
    "keeps_all": regrowth.stateless(lambda evidence: evidence.masks),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_prune_rule_meets_the_target(rule):
    """Where a rule removes less than a ramp asks for, the smallest weights go."""
    params, grads, *_ = start(6)
    common = dict(density=0.3, prune=RULES[rule])
    for tx in (
        sparse_optax.one_shot_magnitude(SGD, at=2, **common),
        sparse_optax.iterative_magnitude(SGD, prunes=2, update_period=2, **common),
        sparse_optax.gradual_magnitude(SGD, update_period=2, update_stop=5, **common),
    ):
        *_, (trained, state) = run(tx, params, grads)
        counts = [int(m.sum()) for m in kept(state)]
        assert sum(counts) == 15
        if rule != "global_zeros":
            assert counts == [9, 6]
        for w, m in zip(kernels(trained), kept(state), strict=True):
            assert not w[~m].any()


def test_two_sided_pruning_shares_a_ramp_between_the_signs():
    """Without a prune rate each sign loses its part of what the ramp asks for."""
    weights = np.concatenate([np.arange(1, 21), -np.arange(1, 11)]) / 10
    params = network(((6, 5),), [weights.reshape(6, 5)])
    tx = sparse_optax.one_shot_magnitude(
        optax.sgd(0.0), density=0.3, at=1, prune=regrowth.prune.two_sided
    )
    *_, (trained, _) = run(tx, params, random_gradients(1, params, 2))
    left = np.flatnonzero(kernels(trained)[0])
    # 21 go: 14 of 20 positive ones, 7 of 10 negative ones.
    np.testing.assert_array_equal(left, [*range(14, 20), *range(27, 30)])


def test_another_prune_rule():
    """One that places the budget itself: the total is that of the schedule.

    Layers are not at their targets then, so that it goes by the sums.
    """

    def pooled(evidence):
        stay = jnp.minimum(sum(evidence.active), sum(evidence.target))
        columns = list(zip(evidence.params, evidence.masks, strict=True))
        return selection.top_k_mask(columns, stay, score=_active_size)

    rule = regrowth.stateless(lambda evidence: tuple(pooled(evidence)))
    for make in (
        functools.partial(sparse_optax.gradual_magnitude, update_stop=9),
        functools.partial(sparse_optax.iterative_magnitude, prunes=4),
        functools.partial(sparse_optax.ac_dc, update_stop=9),
    ):
        tx = make(optax.sgd(0.0), density=0.2, update_period=2, prune=rule)
        params = network(SHAPES)
        *_, (after, state) = run(tx, params, random_gradients(1, params, 10))
        flat = np.concatenate([np.ravel(w) for w in kernels(params)])
        cut = np.sort(np.abs(flat))[-10]
        for w, m in zip(kernels(params), kept(state), strict=True):
            np.testing.assert_array_equal(m, np.abs(w) >= cut)
        assert sum((w != 0).sum() for w in kernels(after)) == 10


def _active_size(weight, mask):
    return jnp.where(mask, jnp.abs(weight), -1.0)


# --- AC/DC ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("period", "begin", "stop", "reset"),
    [
        (2, 0, 11, "grown"),
        (2, 3, 9, "none"),
        (3, 3, 13, "grown"),
        (4, 0, 5, "grown"),
    ],
)
def test_ac_dc(period, begin, stop, reset):
    """Sparse and dense by turns, sparse at the end whatever the parity."""
    final = [6, 4]

    def counts_at(t):
        if not oracles.due(t, period, begin, stop):
            return None
        return final if oracles.ac_dc_is_sparse(t, period, begin, stop) else SIZES

    tx = sparse_optax.ac_dc(
        SGD,
        density=0.2,
        update_period=period,
        update_start=begin,
        update_stop=stop,
        prune=regrowth.prune.magnitude,
        reset_moments=reset,
    )
    params, grads, weights, step_grads = start(16)
    train = functools.partial(oracles.train_pruned, reset=reset == "grown")
    seen = equals(
        run(tx, params, grads),
        train(weights, dense(), step_grads, counts_at, lr=LR, beta=BETA),
    )
    first = next(t for t in range(99) if oracles.due(t, period, begin, stop))
    assert seen[:first] == [list(SIZES)] * first
    assert seen[-1] == final
    assert all(c in (final, list(SIZES)) for c in seen)


def test_ac_dc_prunes_the_whole_network_by_default():
    """At the start of a sparse phase the largest weights of all layers stay."""
    tx = sparse_optax.ac_dc(SGD, density=0.2, update_period=3, update_stop=10)
    params, grads, *_ = start(9)
    counts = []
    before = kernels(params)
    for t, (after, state) in enumerate(run(tx, params, grads)):
        if t == 3:  # the first cycle: the weights handed in are those of step 2
            sizes = np.concatenate([np.abs(w).ravel() for w in before])
            cut = np.sort(sizes)[-10]
            for w, m in zip(before, kept(state), strict=True):
                np.testing.assert_array_equal(m, np.abs(w) >= cut)
            counts = [int(m.sum()) for m in kept(state)]
        before = kernels(after)
    assert sum(counts) == 10
    assert counts != [6, 4]


# --- network surgery, straight-through ------------------------------------------------


def surgery_masks(ratio, gamma=0.0, power=1.0, stop=None, ramp=None):
    """What network surgery does before update t, by the coin of the library."""

    def new(t, weights, mask):
        if t == 0 or (stop is not None and t >= stop):
            return mask
        counts = [int(m.sum()) for m in mask]
        if ramp is not None:
            counts = ramp(t)
        heads = bool(rules.coin(t, gamma, power))
        made = []
        for w, m, k in zip(weights, mask, counts, strict=True):
            if heads:
                made.append(oracles.spliced(w, m, k, ratio))
            else:
                made.append(oracles.top(np.where(m, np.abs(w), -1.0), k) & m)
        return made

    return new


def largest(weights, counts):
    return [oracles.top(np.abs(w), k) for w, k in zip(weights, counts, strict=True)]


@pytest.mark.parametrize(
    ("ratio", "gamma", "stop"), [(0.9 / 1.1, 0.0, None), (0.5, 0.5, None), (1.0, 0, 7)]
)
def test_network_surgery(ratio, gamma, stop):
    tx = sparse_optax.network_surgery(
        SGD, density=0.2, ratio=ratio, gamma=gamma, update_stop=stop
    )
    params, grads, weights, step_grads = start(30)
    seen = equals(
        run(tx, params, grads),
        oracles.train_hidden(
            weights,
            largest(weights, [6, 4]),
            step_grads,
            surgery_masks(ratio, gamma, 1.0, stop),
            lr=LR,
            beta=BETA,
        ),
    )
    assert seen == [[6, 4]] * 30


def test_surgery_has_a_margin_on_both_sides():
    """One place; two weights. Hand-worked: each change needs more than ratio."""
    ratio = 0.5
    tx = sparse_optax.network_surgery(optax.sgd(1.0), density={"w": 1}, ratio=ratio)
    params = {"w": jnp.array([[4.0, 3.0]])}
    state = tx.init(params)
    # Before each update: the pair of weights, and which of them is shown.
    table = [
        ([4, 3], 0),
        ([4, 7], 0),  # larger, but not twice as large
        ([4, 8], 0),  # exactly twice: equal, and the lower index stays
        ([4, 9], 1),
        ([10, 9], 1),
        ([18, 9], 0),  # exactly twice: equal, and the lower index comes
        ([-17, -35], 1),  # magnitudes
    ]
    for now, then in zip(table, [*table[1:], table[-1]], strict=True):
        grads = {"w": jnp.array([[float(a - b) for a, b in zip(now[0], then[0])]])}  # noqa: B905
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        (mask,) = kept(state)
        assert mask.tolist() == [[now[1] == 0, now[1] == 1]]
        assert state.hidden["w"].tolist() == [[float(x) for x in then[0]]]
        shown = [[float(x) if k == now[1] else 0.0 for k, x in enumerate(then[0])]]
        assert params["w"].tolist() == shown


def test_the_coin_falls_as_often_as_the_paper_says():
    for gamma, power in ((1e-2, 1.0), (0.1, 0.5)):
        coin = jax.jit(jax.vmap(lambda t: rules.coin(t, gamma, power)))  # noqa: B023
        heads = np.asarray(coin(jnp.arange(4000)))
        chance = np.array([oracles.probability(t, gamma, power) for t in range(4000)])
        for part in np.split(np.arange(4000), 4):
            wanted, spread = chance[part].sum(), (chance * (1 - chance))[part].sum()
            assert abs(heads[part].sum() - wanted) < 4 * math.sqrt(spread)
    assert all(bool(rules.coin(t, 0.0, 1.0)) for t in range(9))


def test_without_heads_the_mask_stays_and_a_budget_is_still_met():
    """The coin decides what moves, not how many weights there are."""
    ramp = [1.0, 0.8, 0.5, 0.35, 0.2]
    budget = lambda count: jnp.float32(ramp)[jnp.minimum(count, 4)]  # noqa: E731

    def counts_at(t):
        d = float(np.float32(ramp[min(t, 4)]))
        return [oracles.target(d, 0.2, n, c) for n, c in ((30, 6), (20, 4))]

    tx = sparse_optax.network_surgery(SGD, density=0.2, ramp=budget, gamma=1e9)
    params, grads, weights, step_grads = start(9)
    seen = equals(
        run(tx, params, grads),
        oracles.train_hidden(
            weights,
            dense(),
            step_grads,
            surgery_masks(0.9 / 1.1, 1e9, 1.0, None, counts_at),
            lr=LR,
            beta=BETA,
        ),
    )
    assert seen == [list(SIZES)] + [counts_at(t) for t in range(1, 9)]
    assert seen[-1] == [6, 4]


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_surgery_by_the_papers_thresholds(gamma):
    """Counts follow: the one composition here that has no exact number."""
    tx = regrowth.regrow(
        SGD,
        density=1.0,
        prune=regrowth.prune.below_spread(0.5, gamma=gamma),
        redistribute=regrowth.redistribute.none,
        grow=regrowth.grow.above_spread(0.5, gamma=gamma),
        update_period=1,
        prune_rate=0.0,
        hidden=True,
        key=0,
    )
    params, grads, weights, step_grads = start(12)
    limits = [oracles.surgery_thresholds(w, 0.5) for w in weights]

    def new(t, weights, mask):
        if t == 0 or not rules.coin(t, gamma, 1.0):
            return mask
        columns = zip(weights, mask, limits, strict=True)
        return [oracles.surgery_mask(w, m, *ab) for w, m, ab in columns]

    seen = equals(
        run(tx, params, grads),
        oracles.train_hidden(weights, dense(), step_grads, new, lr=LR, beta=BETA),
    )
    assert len({tuple(c) for c in seen}) > 3
    assert any(b > a for (a, _), (b, _) in itertools.pairwise(seen))


@pytest.mark.parametrize("moving", [False, True])
def test_straight_through_magnitude(moving):
    """At every step the largest of all weights, hidden ones included."""
    budget = schedules.Towards(
        lambda end: schedules.cubic_density(1.0, end, start=2, stop=12)
    )

    def counts_at(t):
        if not moving:
            return [6, 4]
        if t <= 2:
            return list(SIZES)
        s = oracles.zhu_gupta(t, 0.0, 0.8, 2, 1, 10)
        return [oracles.target(1 - s, 0.2, n, c) for n, c in ((30, 6), (20, 4))]

    tx = sparse_optax.straight_through_magnitude(
        SGD, density=0.2, ramp=budget if moving else None
    )
    params, grads, weights, step_grads = start(20)

    def new(t, weights, mask):
        return largest(weights, counts_at(t))

    seen = equals(
        run(tx, params, grads),
        oracles.train_hidden(weights, dense(), step_grads, new, lr=LR, beta=BETA),
    )
    assert seen[-1] == [6, 4]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("nm", [False, True])
def test_masked_weights_decay_as_in_sr_ste(nm, packed):
    """In the gradient, and only those that the forward pass has masked."""
    shapes, decay = ((8, 5), (4, 4)), 0.3
    kept = {"pattern": patterns.n_m(2, 4)} if nm else {"density": 0.4}
    tx = sparse_optax.straight_through_magnitude(
        SGD, missing_decay=decay, packed=packed, **kept
    )
    plain = sparse_optax.straight_through_magnitude(SGD, packed=packed, **kept)
    params, grads, weights, step_grads = start(15, shapes)

    def masks_of(weights):
        if not nm:
            return largest(weights, [16, 6])
        found = []
        for w in weights:
            rows = w.reshape(-1, 4, w.shape[1])
            rank = np.argsort(np.argsort(-np.abs(rows), axis=1), axis=1)
            found.append((rank < 2).reshape(w.shape))
        return found

    moments, wanted = [np.zeros_like(w) for w in weights], []
    for step in step_grads:
        masks = masks_of(weights)
        moments = [
            BETA * v + g + decay * np.where(m, 0, w)
            for v, g, m, w in zip(moments, step, masks, weights, strict=True)
        ]
        weights = [w - LR * v for w, v in zip(weights, moments, strict=True)]
        shown = [np.where(m, w, 0) for m, w in zip(masks, weights, strict=True)]
        wanted.append((weights, masks, shown))
    equals(run(tx, params, grads), wanted)
    *_, (without, _) = run(plain, params, grads)
    assert (without["Dense_0"]["kernel"] != wanted[-1][2][0]).any()


@pytest.mark.parametrize("method", ["straight", "surgery", "kast"])
def test_choosing_at_every_update_where_layers_are_stacked(method):
    """A stack, along its last axis, and the same layers as leaves of their own."""
    made = {
        "straight": sparse_optax.straight_through_magnitude,
        "surgery": functools.partial(sparse_optax.network_surgery, gamma=0.1),
        "kast": functools.partial(sparse_optax.top_kast, backward_density=0.6),
    }[method]
    rng = np.random.default_rng(0)
    # Coarse values, so that many weights are equal.
    values = np.round(2 * rng.standard_normal((12, 6, 5, 3))) / 2
    grads = np.asarray(values[1:], np.float32)
    together = {"w": jnp.asarray(values[0], jnp.float32)}
    apart = {str(i): together["w"][..., i] for i in range(3)}
    one, many = made(SGD, density=0.3, stacked={"w": 2}), made(SGD, density=0.3)
    first, second = one.init(together), many.init(apart)
    seen = set()
    for g in grads:
        pieces = {str(i): g[..., i] for i in range(3)}
        updates, first = jax.jit(one.update)({"w": g}, first, together)
        together = optax.apply_updates(together, updates)
        updates, second = jax.jit(many.update)(pieces, second, apart)
        apart = optax.apply_updates(apart, updates)
        mask = np.asarray(sparse_optax.get_masks(first)["w"])
        for i in range(3):
            np.testing.assert_array_equal(together["w"][..., i], apart[str(i)])
            np.testing.assert_array_equal(
                mask[..., i], sparse_optax.get_masks(second)[str(i)]
            )
        seen.add(mask.tobytes())
    assert len(seen) > 5


# --- Top-KAST -------------------------------------------------------------------------


@pytest.mark.parametrize(("period", "penalty"), [(1, 0.3), (4, 0.0)])
def test_top_kast(period, penalty):
    """A is shown, B moves with its penalty, the rest stays where it began."""
    tx = sparse_optax.top_kast(
        SGD,
        density=0.2,
        backward_density=0.5,
        penalty=penalty,
        update_period=period,
    )
    params, grads, weights, step_grads = start(16)

    def new(t, weights, mask):
        return largest(weights, [6, 4]) if t % period == 0 else mask

    reach = functools.partial(oracles.top_kast, d=0.2, backward=[15, 10], l2=penalty)
    seen = equals(
        run(tx, params, grads),
        oracles.train_hidden(
            weights, dense(), step_grads, new, lr=LR, beta=BETA, moves=reach
        ),
    )
    assert seen == [[6, 4]] * 16


def test_top_kast_leaves_the_rest_alone():
    """To the bit, also under momentum and decoupled weight decay."""
    params = network(((20, 10),))
    tx = sparse_optax.top_kast(
        optax.adamw(0.05, weight_decay=0.1), density=0.1, backward_density=0.2
    )
    first = kernels(params)[0]
    moved = np.zeros(first.shape, bool)
    state, step = tx.init(params), stepper(tx)
    for t in range(10):
        before = state.hidden
        grads = at_step(random_gradients(t, params, 1), 0)
        params, state = step(params, state, grads)
        (old,), (new,) = (jax.tree.leaves(x) for x in (before, state.hidden))
        changed = np.asarray(old != new)
        assert changed.sum() == 40
        assert changed[kept(state)[0]].all()
        moved |= changed
    hidden = np.asarray(state.hidden["Dense_0"]["kernel"])
    assert 40 < moved.sum() < 200
    np.testing.assert_array_equal(hidden[~moved], first[~moved])
    # Dense leaves train as ever.
    assert (params["Dense_0"]["bias"] != network(((20, 10),))["Dense_0"]["bias"]).all()


# --- all of them ----------------------------------------------------------------------

ENDS = {
    "gradual_magnitude": dict(update_period=2, update_stop=9),
    "iterative_magnitude": dict(update_period=2, prunes=4),
    "one_shot_magnitude": dict(at=6),
    "ac_dc": dict(update_period=2, update_stop=9, prune=regrowth.prune.magnitude),
    "network_surgery": {},
    "straight_through_magnitude": {},
    "top_kast": dict(backward_density=0.9),
}


@pytest.mark.parametrize("name", ENDS)
def test_stacked_layers_ties_and_one_weight_layers(name):
    """Exact in each slice, on a tree where all magnitudes tie at first."""
    make = getattr(sparse_optax, name)
    params = {"one": jnp.ones((1, 1)), "s": jnp.ones((4, 3, 5)), "w": jnp.ones((7, 3))}
    density = {"one": 1, "s": np.array([2, 11, 1]), "w": 4}
    tx = make(optax.sgd(0.01), density=density, stacked={"s": 1}, **ENDS[name])
    if name == "top_kast":
        tx = make(
            optax.sgd(0.01),
            density=density,
            backward_density={"one": 1, "s": np.array([9, 20, 2]), "w": 4},
            stacked={"s": 1},
        )
    *_, (params, state) = run(tx, params, random_gradients(3, params, 10))
    mask = sparse_optax.get_masks(state)
    assert np.sum(mask["s"], (0, 2)).tolist() == [2, 11, 1]
    assert [int(mask["one"].sum()), int(mask["w"].sum())] == [1, 4]
    nonzero = jax.tree.map(lambda w: w != 0, params)
    for a, b in zip(jax.tree.leaves(nonzero), jax.tree.leaves(mask), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["gradual_magnitude", "network_surgery", "top_kast"])
def test_a_nan_stops_the_cycles_and_is_counted(name):
    """Masks stay as they are; the count of weights never goes beyond what it was."""
    params = network(((6, 5),))
    tx = getattr(sparse_optax, name)(optax.sgd(0.1), density=0.2, **ENDS[name])
    grads = random_gradients(3, params, 8)
    (mask,) = kept(tx.init(params))
    index = tuple(np.argwhere(mask)[0])
    grads["Dense_0"]["kernel"] = grads["Dense_0"]["kernel"].at[(0, *index)].set(jnp.nan)
    states = [state for _, state in run(tx, params, grads)]
    assert {int(kept(state)[0].sum()) for state in states} == {int(mask.sum())}
    assert int(states[-1].skipped) >= 1


@pytest.mark.parametrize("name", ENDS)
def test_wrong_arguments(name):
    make = functools.partial(getattr(sparse_optax, name), optax.sgd(0.1))
    given = dict(density=0.2, **ENDS[name])
    with refuses(name, "density", "1.5", r"\(0, 1\]"):
        make(**{**given, "density": 1.5})
    with refuses(name, "density", "None"):
        make(**{**given, "density": None})
    for argument, value, pattern in (
        ("update_period", 0, "at least 1"),
        ("update_period", 2.5, "integer"),
        ("update_stop", 2, "update_stop|stop"),
        ("prunes", 0, "at least 1"),
        ("at", 0, "at least 1"),
        ("at", None, "integer"),
    ):
        if argument in ENDS[name]:
            with refuses(name, "", str(value), pattern):
                make(**{**given, argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value", "allowed"),
    [
        ("network_surgery", "ratio", 1.5, r"\(0, 1\]"),
        ("network_surgery", "gamma", -1.0, "at least 0"),
        ("network_surgery", "power", math.nan, "at least 0"),
        ("top_kast", "penalty", -1.0, "at least 0"),
        ("top_kast", "backward_density", 0.1, "at least `density`=0.2"),
        (
            "top_kast",
            "backward_density",
            2.0,
            r"_density` must be in \(0, 1\]",
        ),
        (
            "top_kast",
            "backward_density",
            "x",
            r"_density` must be in \(0, 1\]",
        ),
        ("gradual_magnitude", "initial_density", 0.1, "0.2"),
        ("network_surgery", "ramp", 0.5, "a schedule"),
        ("straight_through_magnitude", "ramp", 0.5, "a schedule"),
        ("straight_through_magnitude", "missing_decay", -1.0, "at least 0"),
    ],
)
def test_wrong_values(name, argument, value, allowed):
    params = network(((6, 5),))
    settings = {**ENDS[name], "density": 0.2, argument: value}

    def use():
        tx = getattr(sparse_optax, name)(optax.sgd(0.1), **settings)
        tx.update(params, tx.init(params), params)

    with pytest.raises(ValueError, match=allowed) as caught:
        use()
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("rule", ["prune.below_spread", "grow.above_spread"])
@pytest.mark.parametrize(
    ("argument", "value"),
    [("c", math.nan), ("c", "a"), ("factor", -1.0), ("gamma", math.inf), ("power", -1)],
)
def test_wrong_numbers_of_the_two_thresholds(rule, argument, value):
    make = operator.attrgetter(rule)(regrowth)
    with refuses(rule, argument, str(value), "finite"):
        make(**{"c": 1.0, argument: value})


def test_gsm_follows_a_density_schedule():
    """GSM has no masks to prune: as many gradients pass as the schedule says."""
    density = schedules.cubic_density(1.0, 0.2, start=0, stop=4)
    tx = sparse_optax.gsm_mask(density)
    params = network(SHAPES)
    grads = random_gradients(1, params, 6)
    state = tx.init(params)
    passed = []
    for t in range(6):
        updates, state = tx.update(at_step(grads, t), state, params)
        passed.append(sum(int((u != 0).sum()) for u in kernels(updates)))
    wanted = [int(np.float32(density(t)) * 50 + 1e-4) for t in range(6)]
    assert passed == wanted
    assert (passed[0], passed[-1]) == (50, 10)
