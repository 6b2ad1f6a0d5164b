"""The engine's moving budget and its hidden weights, against plain arithmetic."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import (
    at_step,
    kept,
    kernels,
    mask_tree,
    network,
    random_gradients,
    refuses,
    stepper,
)

import sparse_optax
from sparse_optax import budgets, regrowth, schedules
from sparse_optax.layers import layers_of
from sparse_optax.regrowth import allocate
from sparse_optax.regrowth.targets import goal_at

SHAPES = ((6, 5), (5, 4))
SGD = optax.sgd(0.1, momentum=0.9)
RULES = dict(
    prune=regrowth.prune.magnitude,
    redistribute=regrowth.redistribute.none,
    grow=regrowth.grow.magnitude,
)


def table(values):
    """A schedule that gives these densities, to the bit, and then the last one."""
    values = np.float32(values)
    return lambda count: jnp.asarray(values)[jnp.minimum(count, len(values) - 1)]


def engine(inner=SGD, **kwargs):
    settings = dict(density=0.2, update_period=1, prune_rate=0.0, key=0)
    return regrowth.regrow(inner, **{**settings, **RULES, **kwargs})


def run(tx, params, grads, step=None):
    """``(params, state)`` before the first step and after each."""
    state, step = tx.init(params), step or stepper(tx)
    yield params, state
    for t in range(len(jax.tree.leaves(grads)[0])):
        params, state = step(params, state, at_step(grads, t))
        yield params, state


FIFTH = Fraction(1, 5)


# --- counts: the oracle ---------------------------------------------------------------


def counts_at(d, end, final, sizes):
    """``c + floor(x (n - c))``, x = (d - D) / (1 - D) cut to [0, 1], in rationals.

    d is a float32, D a rational; both are rounded down to units of 2**-30. As d is
    known to a few places of a float32, 2**-22 is added to it.
    """
    if np.float32(d) <= np.float32(float(end)):
        return list(final)
    d, end = (int(y * 2**30) for y in (Fraction(float(np.float32(d))), end))
    x = Fraction(min(d + 2**8, 2**30) - end, max(2**30 - end, 1))
    return [c + int(x * (n - c)) for c, n in zip(final, sizes, strict=True)]


RAMP = [
    *(1.0, 0.9, 0.62, 0.41, 0.3, 0.21, 0.2, 0.2, 1.0),
    *(0.2, 0.77, 0.1, 0.5, 0.0, 7.0, -3.0, 2.0, 0.2),
]


@pytest.mark.parametrize("density", ["float", "budget", "counts"])
def test_counts_of_each_layer_follow_the_schedule(density):
    """Stacked layers too, at every step, from the first mask on."""
    rng = np.random.default_rng(3)
    shapes = {"a": (7, 9), "s": (5, 3, 6), "z": (4, 1)}
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    stacked = {"s": 1}
    sizes = [63, *[30] * 3, 4]
    asked = {
        "float": 0.2,
        "budget": budgets.erdos_renyi(0.2),
        "counts": {"a": 20, "s": np.array([1, 30, 7]), "z": 2},
    }[density]
    given = budgets.resolve(asked, params, stacked=stacked)
    final = [int(given["a"]), *map(int, given["s"]), int(given["z"])]
    total = Fraction(sum(final), sum(sizes))
    end = FIFTH if density == "float" else total
    tx = engine(density=asked, ramp=table(RAMP), stacked=stacked)
    grads = random_gradients(4, params, len(RAMP) + 2)
    for t, (after, state) in enumerate(run(tx, params, grads)):
        d = RAMP[min(max(t - 1, 0), len(RAMP) - 1)]
        mask = sparse_optax.get_masks(state)
        got = [int(mask["a"].sum()), *np.sum(mask["s"], (0, 2)), int(mask["z"].sum())]
        wanted = counts_at(d, end, final, sizes)
        if d == np.float32(0.2):
            wanted = final
        assert got == wanted
        if t:
            for name, w in after.items():
                assert not np.asarray(w)[~np.asarray(mask[name])].any()


def test_both_ends_are_exact_at_every_density():
    """A compiled quotient of floats misses dense by one weight at one in nine."""
    params = {"w": jax.ShapeDtypeStruct((1000, 1000), jnp.float32)}
    layers = layers_of(params)
    sizes = jnp.array([10**6])
    for k in range(1, 200, 13):
        d = k / 200

        @jax.jit
        @jax.vmap
        def counts(now):
            budget = lambda step: now  # noqa: E731
            goal = goal_at(budget, d, 0, layers, params)  # noqa: B023
            final = jnp.asarray(goal.final)
            return allocate.target_counts(goal.excess, goal.whole, final, sizes)[0]

        dense, end, middle = counts(jnp.float32([1.0, d, (1 + d) / 2])).tolist()
        assert (dense, end) == (10**6, 5000 * k)
        assert abs(middle - 500000 - 2500 * k) <= 1


@pytest.mark.parametrize("size", [10, 99, 10**8 + 9, 10**9 + 9])
def test_a_schedule_may_end_at_the_density_that_a_budget_was_made_of(size):
    """0.1 as a float32 is more than the rounded down total over the size."""
    params = {"w": jax.ShapeDtypeStruct((size,), jnp.float32)}
    layers = layers_of(params, {"w": True})
    for density in (budgets.uniform(0.1), {"w": max(size // 10, 1)}):
        goal = goal_at(lambda step: jnp.float32(0.1), density, 0, layers, params)
        assert int(goal.excess) == 0


@pytest.mark.parametrize(
    "density", [0.2, budgets.erdos_renyi(0.23), budgets.nonzeros(11), 1.0]
)
def test_a_schedule_towards_whatever_the_density_comes_to(density):
    """It ends at the exact counts, and is told the fraction that they are."""
    ends = []

    def make(end):
        ends.append(end)
        return schedules.cubic_density(1.0, end, 0, 3)

    params = network(SHAPES)
    final = jax.tree.leaves(budgets.resolve(density, params))
    tx = engine(density=density, ramp=schedules.Towards(make))
    runs = list(run(tx, params, random_gradients(1, params, 5)))
    got = [[m.sum() for m in kept(s)] for _, s in runs]
    assert got[0] == [30, 20]
    assert got[4] == got[5] == final
    wanted = density if isinstance(density, float) else sum(final) / 50
    assert set(ends) == {float(np.float32(wanted))}


def test_first_masks_are_random_and_follow_the_key():
    tx = [engine(ramp=table([0.7]), key=k) for k in (0, 0, 1)]
    a, b, c = (kept(t.init(network(SHAPES))) for t in tx)
    assert [m.sum() for m in a] == [21, 14]
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
    assert any((x != y).any() for x, y in zip(a, c, strict=True))


def test_given_first_masks_move_to_the_schedule_at_the_first_cycle():
    mask = [np.arange(30).reshape(6, 5) < 3, np.ones((5, 4), bool)]
    tx = engine(masks=mask_tree(mask), ramp=table([1.0, 0.2]))
    params = network(SHAPES)
    runs = list(run(tx, params, random_gradients(1, params, 3)))
    assert [[m.sum() for m in kept(s)] for _, s in runs] == [[3, 20]] * 2 + [[6, 4]] * 2
    assert [int(x) for x in jax.tree.leaves(runs[2][1].removed)] == [0, 16]
    assert [int(x) for x in jax.tree.leaves(runs[2][1].grown)] == [3, 0]


@pytest.mark.parametrize(("rate", "d"), [(0.5, 0.6), (0.3, 0.2), (1.0, 1.0)])
def test_a_prune_rate_moves_weights_on_top_of_the_schedule(rate, d):
    """``floor(p min(a, t)) + max(a - t, 0)`` go, and what is then missing comes."""
    tx = engine(prune_rate=rate, ramp=table([0.4, d]), grow=regrowth.grow.random)
    params = network(SHAPES)
    _, (_, before), (_, after) = run(tx, params, random_gradients(1, params, 2))
    sizes, final = [30, 20], [6, 4]
    a = [m.sum() for m in kept(before)]
    t = counts_at(d, FIFTH, final, sizes)
    removed = [
        int(Fraction(float(np.float32(rate))) * min(x, y)) + max(x - y, 0)
        for x, y in zip(a, t, strict=True)
    ]
    assert [int(x) for x in jax.tree.leaves(after.removed)] == removed
    assert [m.sum() for m in kept(after)] == t
    grown = [y - x + r for x, y, r in zip(a, t, removed, strict=True)]
    assert [int(x) for x in jax.tree.leaves(after.grown)] == grown


def test_shares_place_weights_elsewhere_and_the_total_is_kept():
    """Redistribution under a budget that falls and one that rises."""
    ramp = [1.0, 0.5, 0.3, 0.9, 0.2, 0.2]
    tx = engine(
        prune_rate=0.4,
        ramp=table(ramp),
        redistribute=regrowth.redistribute.momentum,
        grow=regrowth.grow.momentum,
    )
    params = network(SHAPES)
    grads = random_gradients(1, params, 8)
    grads["Dense_1"]["kernel"] = 9 * grads["Dense_1"]["kernel"]
    moved = False
    for t, (_, state) in enumerate(run(tx, params, grads)):
        d = ramp[min(max(t - 1, 0), 5)]
        wanted = counts_at(d, FIFTH, [6, 4], [30, 20])
        got = [m.sum() for m in kept(state)]
        assert sum(got) == sum(wanted)
        moved |= got != wanted
    assert moved


# --- hidden weights -------------------------------------------------------------------


def largest(values, mask, k):
    """Of the entries of the mask the k of largest value, the lowest index first."""
    score = np.where(mask, values, -np.inf).ravel()
    chosen = np.zeros(score.size, bool)
    chosen[np.argsort(-score, kind="stable")[:k]] = True
    return chosen.reshape(mask.shape) & mask


def hidden_run(weights, mask, grads, *, rate, lr, beta, final, ramp, period):
    """All weights train on; what exists is shown. Yields (hidden, mask, shown)."""
    trace = np.zeros_like(weights)
    for t, g in enumerate(grads):
        if t and t % period == 0:
            a, size = int(mask.sum()), mask.size
            d = ramp[min(t, len(ramp) - 1)]
            (target,) = counts_at(d, FIFTH, [final], [size])
            gone = int(Fraction(float(np.float32(rate))) * min(a, target))
            stay = largest(np.abs(weights), mask, a - gone - max(a - target, 0))
            back = largest(np.abs(weights), ~stay, target - int(stay.sum()))
            mask = stay | back
        trace = g + beta * trace
        weights = weights - lr * trace
        yield weights, mask, np.where(mask, weights, 0.0)


@pytest.mark.parametrize(
    ("rate", "period", "packed"), [(0.0, 1, False), (0.5, 3, False), (0.5, 1, True)]
)
def test_hidden_weights_train_and_come_back_with_their_value(rate, period, packed):
    params = network(((6, 5),))
    grads = random_gradients(1, params, 12)
    ramp = [0.5, 0.5, 0.4, 1.0, 0.3, 0.2, 0.9, 0.2]
    tx = engine(
        ramp=table(ramp),
        hidden=True,
        prune_rate=rate,
        update_period=period,
        packed=packed,
    )
    got = list(run(tx, params, grads))
    wanted = hidden_run(
        np.float64(params["Dense_0"]["kernel"]),
        kept(got[0][1])[0],
        np.float64(grads["Dense_0"]["kernel"]),
        rate=rate,
        lr=0.1,
        beta=0.9,
        final=6,
        ramp=ramp,
        period=period,
    )
    back = 0
    before = kept(got[0][1])[0]
    for (after, state), (weights, mask, shown) in zip(got[1:], wanted, strict=True):
        np.testing.assert_array_equal(kept(state)[0], mask)
        (hidden,) = jax.tree.leaves(state.hidden)
        np.testing.assert_allclose(hidden, weights, rtol=1e-5, atol=1e-6)
        (weight,) = kernels(after)
        np.testing.assert_allclose(weight, shown, rtol=1e-5, atol=1e-6)
        assert not weight[~mask].tobytes().strip(b"\0")
        back += (mask & ~before).sum()
        before = mask
    assert back > 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("jitted", [False, True])
def test_what_is_shown_is_what_is_hidden_to_the_bit(dtype, jitted):
    """No drift on active weights, and the emitted update lands on the value."""
    params = jax.tree.map(lambda x: x.astype(dtype), network(SHAPES))
    grads = random_gradients(1, params, 30)
    tx = engine(
        optax.sgd(0.03, momentum=0.9), hidden=True, prune_rate=0.4, update_period=2
    )
    step = None
    if not jitted:

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
            return optax.apply_updates(params, updates), state

    for t, (after, state) in enumerate(run(tx, params, grads, step)):
        if t:
            hidden = [np.asarray(x) for x in jax.tree.leaves(state.hidden)]
            for w, h, m in zip(kernels(after), hidden, kept(state), strict=True):
                assert w.dtype == h.dtype == dtype
                shown = np.where(m, h, 0)
                if jitted:  # an update is rounded to its dtype, a sum is not always
                    shown, w = np.float32(shown), np.float32(w)
                    eps = float(jnp.finfo(dtype).eps)
                    np.testing.assert_allclose(w, shown, rtol=2 * eps, atol=eps / 8)
                    assert not w[~m].any()
                else:
                    np.testing.assert_array_equal(w, shown)


def test_the_inner_optimizer_sees_all_weights():
    """So that weight decay acts on what is hidden."""
    inner = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))
    params = network(((6, 5),))
    zero = jax.tree.map(lambda x: jnp.zeros((4, *x.shape)), params)
    *_, (after, state) = run(engine(inner, hidden=True), params, zero)
    wanted = np.float64(params["Dense_0"]["kernel"]) * 0.9**4
    np.testing.assert_allclose(state.hidden["Dense_0"]["kernel"], wanted, rtol=1e-5)
    shown = np.where(kept(state)[0], wanted, 0)
    np.testing.assert_allclose(after["Dense_0"]["kernel"], shown, rtol=1e-5)


def test_first_masks_with_hidden_weights_are_those_of_the_largest():
    params = network(SHAPES)
    state = engine(hidden=True, ramp=table([0.6])).init(params)
    for w, m, k in zip(kernels(params), kept(state), (18, 12), strict=True):
        np.testing.assert_array_equal(m, largest(np.abs(w), np.ones_like(m), k))


def test_weights_handed_in_count_for_what_is_hidden_where_they_exist():
    """A caller who changes parameters, or masks, is followed."""
    params = network(((6, 5),))
    tx = engine(optax.sgd(0.0), hidden=True, update_period=100)
    step = stepper(tx)
    params, state = step(params, tx.init(params), params)
    (mask,) = kept(state)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    _, state = step(doubled, state, params)
    hidden = np.asarray(state.hidden["Dense_0"]["kernel"])
    (weight,) = kernels(doubled)
    (first,) = kernels(network(((6, 5),)))
    np.testing.assert_array_equal(hidden, np.where(mask, weight, first))
    state = sparse_optax.set_masks(state, mask_tree([~mask]))
    after, state = step(doubled, state, params)
    assert not kernels(after)[0].any()  # what came by hand starts from zero
    hidden = np.asarray(state.hidden["Dense_0"]["kernel"])
    np.testing.assert_array_equal(hidden, np.where(mask, hidden, 0))


@pytest.mark.parametrize("place", ["missing", "active"])
def test_a_nan_anywhere_stops_the_cycles_and_is_counted(place):
    params = network(((6, 5),))
    tx = engine(hidden=True, prune_rate=0.5)
    step = stepper(tx)
    first = at_step(random_gradients(1, params, 1), 0)
    params, state = step(params, tx.init(params), first)
    (mask,) = kept(state)
    index = tuple(np.argwhere(mask if place == "active" else ~mask)[0])
    grads = at_step(random_gradients(2, params, 1), 0)
    broken = jax.tree.map(lambda x: x, grads)
    kernel = broken["Dense_0"]["kernel"].at[index].set(jnp.nan)
    broken["Dense_0"]["kernel"] = kernel
    params, state = step(params, state, broken)
    (moved,) = kept(state)
    assert int(state.skipped) == 0
    assert np.isnan(state.hidden["Dense_0"]["kernel"][index])
    assert np.isnan(kernels(params)[0]).any() == moved[index]
    for n in (1, 2):
        params, state = step(params, state, grads)
        assert int(state.skipped) == n
        np.testing.assert_array_equal(kept(state)[0], moved)


def test_a_budget_that_is_not_finite_moves_nothing():
    params = network(SHAPES)
    tx = engine(ramp=table([1.0, np.nan, 0.5, np.inf, 0.2]))
    got = [
        (sum(m.sum() for m in kept(s)), int(s.skipped))
        for _, s in run(tx, params, random_gradients(1, params, 5))
    ]
    half = sum(counts_at(0.5, FIFTH, [6, 4], [30, 20]))
    assert got == [(50, 0), (50, 0), (50, 1), (half, 1), (half, 2), (10, 2)]


# --- in use ---------------------------------------------------------------------------

MOVING = dict(
    hidden=True,
    prune_rate=0.3,
    ramp=schedules.cubic_density(1.0, 0.2, 0, 4),
)


def same(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if a.dtype == bool:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_donation():
    params = network(SHAPES)
    tx = engine(**MOVING)
    state = tx.init(params)
    step = jax.jit(
        lambda grads, state, params: tx.update(grads, state, params),
        donate_argnums=(1,),
    )
    grads = random_gradients(1, params, 3)
    given = params
    for t in range(3):
        before = state
        updates, state = step(at_step(grads, t), before, params)
        assert all(x.is_deleted() for x in jax.tree.leaves(before.hidden))
        params = optax.apply_updates(params, updates)
    assert not any(x.is_deleted() for x in jax.tree.leaves(given))


def test_accumulated_steps():
    params = network(SHAPES)
    grads = random_gradients(1, params, 5)
    twice = jax.tree.map(lambda g: jnp.repeat(g, 2, 0), grads)
    alone = list(run(engine(**MOVING), params, grads))
    outside = list(run(optax.MultiSteps(engine(**MOVING), 2), params, twice))
    for (after, state), (other, around) in zip(alone, outside[::2], strict=True):
        same(after, other)
        same(state.hidden, around.inner_opt_state.hidden)
        same(state.regrow_masks, around.inner_opt_state.regrow_masks)


def test_injected():
    params = network(SHAPES)
    grads = random_gradients(1, params, 5)
    settings = dict(inner=SGD, density=0.2, update_period=1, key=0, **RULES)
    static = [*settings, "hidden", "ramp"]
    make = optax.inject_hyperparams(regrowth.regrow, static_args=static)
    tx = make(**settings, **MOVING)
    wanted = run(engine(**MOVING), params, grads)
    for (after, state), (other, around) in zip(
        wanted, run(tx, params, grads), strict=True
    ):
        same(after, other)
        same(state.hidden, around.inner_state.hidden)
    with refuses("regrow", "ramp", allowed="schedule"):
        optax.inject_hyperparams(regrowth.regrow, static_args=static[:-1])(
            **settings, **MOVING
        ).init(params)


def test_vmap_over_seeds():
    txs = [engine(**{**MOVING, "ramp": table([0.5, 0.4, 0.2])}, key=k) for k in (0, 1)]
    params = network(SHAPES)
    members = [jax.tree.map(lambda p: p * (1 + k), params) for k in (0, 1)]  # noqa: B023
    grads = random_gradients(1, params, 5)
    alone = [list(run(t, p, grads)) for t, p in zip(txs, members, strict=True)]
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))
    states = stack(*(t.init(p) for t, p in zip(txs, members, strict=True)))
    together = jax.jit(jax.vmap(txs[0].update, in_axes=(None, 0, 0)))
    weights = stack(*members)
    for t in range(5):
        updates, states = together(at_step(grads, t), states, weights)
        weights = optax.apply_updates(weights, updates)
        for k in (0, 1):
            same(at_step(weights, k), alone[k][t + 1][0])
            same(at_step(states.hidden, k), alone[k][t + 1][1].hidden)
            same(at_step(states.regrow_masks, k), alone[k][t + 1][1].regrow_masks)


def test_hidden_weights_of_weak_parameters_have_a_type():
    """Python numbers times ones are weakly typed, what a step leaves is not."""
    params = {"w": jnp.broadcast_to(jnp.asarray(1.0), (4, 5)) * 1.0}
    assert params["w"].weak_type
    tx = engine(**MOVING)
    state = tx.init(params)
    _, after = jax.eval_shape(tx.update, params, state, params)
    assert after.hidden["w"].weak_type == state.hidden["w"].weak_type


def test_init_of_shapes_and_under_jit():
    params = network(SHAPES)
    for hidden in (False, True):
        tx = engine(**{**MOVING, "hidden": hidden, "ramp": table([0.7])})
        state = tx.init(params)
        same(jax.jit(tx.init)(params), state)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
        abstract = jax.eval_shape(tx.init, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == shapes


def test_reset_moments_of_weights_that_come_back():
    params = network(((6, 5),))
    tx = engine(**{**MOVING, "ramp": table([0.2, 0.2, 1.0])}, reset_moments="grown")
    grads = random_gradients(1, params, 3)
    *_, (_, before), (_, after) = run(tx, params, grads)
    (mask,) = kept(before)
    trace = optax.tree.get(before, "trace")["Dense_0"]["kernel"]
    wanted = np.where(mask, 0.9 * trace, 0) + grads["Dense_0"]["kernel"][2]
    got = optax.tree.get(after, "trace")["Dense_0"]["kernel"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


# --- wrong input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "allowed", "change"),
    [
        ("ramp", "0.5", "a schedule of the density", dict(ramp=0.5)),
        (
            "density",
            "None",
            "a budget",
            dict(
                density=None,
                ramp=table([1.0]),
                masks=mask_tree([np.ones(s, bool) for s in SHAPES]),
            ),
        ),
        (
            "hidden",
            "True",
            "False where there is no `inner`",
            dict(inner=None, hidden=True),
        ),
        ("hidden", "'yes'", "True or False", dict(hidden="yes")),
        (
            "ramp",
            "not finite",
            "a schedule of the density",
            dict(ramp=table([np.nan])),
        ),
    ],
)
def test_wrong_input(argument, value, allowed, change):
    with refuses("regrow", argument, value, allowed):
        engine(**change).init(network(SHAPES))


def test_a_first_value_that_is_traced():
    """Masks are of whole numbers: what they start with is known when they are made."""

    @jax.jit
    def init(d):
        return engine(ramp=lambda count: d).init(network(SHAPES))

    with refuses("regrow", "ramp", allowed="traced"):
        init(0.5)
