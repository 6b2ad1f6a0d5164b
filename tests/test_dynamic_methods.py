"""The dynamic methods beside sparse momentum: each cycle against the definition."""

import functools
import inspect
import itertools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import oracles_dynamic as oracle
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
from sparse_optax import budgets, regrowth, schedules
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.grow import _split_counts
from sparse_optax.transforms.signed_step import signed_step

# --- random networks, and one cycle on them -------------------------------------------

SHAPES = ((1, 5), (16, 8), (3, 3, 2, 4))
KINDS = ("normal", "ties", "zero", "few", "huge")
ACTIVE = ("one", "some", "nearly", "all", "none")
RATES = (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)


class Net(NamedTuple):
    """Weights, masks and evidence of a network, one array a layer, and a prune rate."""

    params: list
    masks: list
    momentum: list
    gradient: list
    rate: float


def _values(rng, kind, shape):
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind == "ties":
        return rng.integers(-2, 3, shape).astype(np.float32)
    x = rng.normal(size=shape)
    if kind == "few":
        x *= rng.random(shape) < 0.2
    return (x * (1e15 if kind == "huge" else 1)).astype(np.float32)


def nets(number, shapes=SHAPES, active=ACTIVE):
    """Networks with full, empty, tied and zero layers, each layer of another kind."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        made = Net([], [], [], [], RATES[seed % len(RATES)])
        for shape in shapes:
            n = int(np.prod(shape))
            count = {"one": 1, "some": int(rng.integers(0, n + 1)), "all": n, "none": 0}
            k = count.get(str(rng.choice(active)), n - n // 8)
            mask = rng.permutation(np.arange(n) < k).reshape(shape)
            a, b, c = (_values(rng, rng.choice(KINDS), shape) for _ in range(3))
            made.masks.append(mask)
            made.params.append(np.where(mask, a, 0))
            made.momentum.append(b)
            made.gradient.append(c)
        yield made


class Did(NamedTuple):
    """What a cycle did, as NumPy arrays."""

    masks: list
    kept: list
    removed: list
    grown: list
    states: Any


@functools.partial(jax.jit, static_argnames=("rules", "axes"))
def _cycle(net, key, states, target, rules, axes):
    evidence = regrowth.Evidence(
        params=net.params,
        masks=net.masks,
        momentum=net.momentum,
        gradient=net.gradient,
        key=key,
        axes=axes,
    )
    return regrowth.cycle(
        evidence,
        prune=rules[0],
        redistribute=rules[1],
        grow=rules[2],
        prune_rate=net.rate,
        states=states,
        target=target,
    )


def cycle(net, *rules, seed=0, states=None, target=None, axes=None):
    """One cycle of a triple of rules, and its totals checked."""
    arrays = Net(*(tuple(map(jnp.asarray, x)) for x in net[:4]), jnp.float32(net.rate))
    if target is not None:
        target = jnp.asarray(target, jnp.int32)
    result = _cycle(arrays, jax.random.key(seed), states, target, rules, axes)
    assert bool(result.ok)
    did = Did(
        [np.asarray(m) for m in result.masks],
        [np.asarray(m) for m in result.kept],
        result.removed.tolist(),
        result.grown.tolist(),
        result.states,
    )
    wanted = total(net.masks) if target is None else int(target.sum())
    assert total(did.masks) == wanted
    assert total(did.masks) == total(did.kept) + sum(did.grown)
    assert total(did.kept) == total(net.masks) - sum(did.removed)
    for before, stay, after in zip(net.masks, did.kept, did.masks, strict=True):
        assert not (stay & ~before).any()
        assert not (stay & ~after).any()
    return did


def total(masks):
    return sum(int(m.sum()) for m in masks)


def missing(masks):
    return [~m for m in masks]


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def new(did):
    return [m & ~k for m, k in zip(did.masks, did.kept, strict=True)]


# --- the mixtures of sparse momentum's Table 5 ----------------------------------------


def _by_largest(values, did):
    return oracle.largest(values, missing(did.kept), did.grown)


def _by_unit(values, did):
    grown = zip(values, missing(did.kept), did.grown, strict=True)
    return [oracle.grow_by_unit(v, m, n) for v, m, n in grown]


GROWN = {
    "momentum": lambda net, did: _by_largest(net.momentum, did),
    "gradient": lambda net, did: _by_largest(net.gradient, did),
    "momentum_per_neuron": lambda net, did: _by_unit(net.momentum, did),
    "random": None,
}
SHARES = {
    "momentum": lambda net, kept: oracles.contributions(net.masks, net.momentum),
    "magnitude": lambda net, kept: oracles.contributions(net.masks, net.params),
    "nonzeros": lambda net, kept: [int(k.sum()) for k in kept],
    "none": None,
}


@pytest.mark.parametrize(
    ("shares", "growth"),
    [
        ("momentum", "random"),
        ("magnitude", "momentum_per_neuron"),
        ("nonzeros", "momentum"),
        ("none", "gradient"),
    ],
)
def test_a_mixture_equals_its_definition(shares, growth):
    rules = prune.magnitude, getattr(redistribute, shares), getattr(grow, growth)
    for net in nets(24):
        did = cycle(net, *rules)
        c, before_prune = [0] * len(SHAPES), SHARES[shares]
        if before_prune and shares != "nonzeros":
            c = before_prune(net, None)
        # What was not shared by a contribution is pruned by the plain rate.
        removed = oracles.prune_counts(net.masks, c, net.rate)
        assert did.removed == removed
        same(did.kept, oracle.smallest_go(net.params, net.masks, removed))
        free = [int(m.sum()) for m in missing(did.kept)]
        grown = removed
        if before_prune:
            c = before_prune(net, did.kept)
            grown = oracles.regrow_counts(sum(removed), c, removed, free)
        assert did.grown == grown
        if GROWN[growth]:
            same(new(did), GROWN[growth](net, did))


def test_every_mixture_is_one_call():
    params = network(((4, 3),))
    for shares, growth in itertools.product(SHARES, GROWN):
        tx = sparse_optax.sparse_momentum_regrow(
            optax.sgd(0.1, momentum=0.9),
            density=0.5,
            update_period=2,
            update_stop=8,
            redistribute=getattr(redistribute, shares),
            grow=getattr(grow, growth),
            key=0,
        )
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_units_get_their_shares():
    """Means 3, 1, 0 and 0 share eight places: six and two, but unit 0 has room for 4.

    The two that do not fit go one each to the lowest units with room. Another layer has
    more units than are ranked in pairs.
    """
    rng = np.random.default_rng(1)
    momentum = [np.zeros((4, 4)), rng.integers(-3, 4, (2, 300))]
    momentum[0][:, 0], momentum[0][:, 1] = 3, [1, 0, 2, 1]
    momentum = [m.astype(np.float32) for m in momentum]
    missing = [np.ones((4, 4), bool), rng.random((2, 300)) < 0.5]
    split = jax.jit(_split_counts, static_argnums=3)
    one, many = split(
        jnp.array([8, 150]),
        tuple(map(jnp.asarray, momentum)),
        tuple(jnp.asarray(~m) for m in missing),
        (None, None),
    )
    assert one.tolist() == [4, 3, 1, 0]
    assert many.tolist() == oracle.unit_counts(momentum[1], missing[1], 150)


def test_units_of_stacked_layers_are_those_of_each_layer_alone():
    """Three layers in one leaf, along its middle axis, grow as three leaves do."""
    rules = prune.magnitude, redistribute.none, grow.momentum_per_neuron
    for net in nets(6, shapes=((6, 4),) * 3, active=("some", "nearly", "all")):
        arrays = [[np.stack(x, 1)] for x in net[:4]]
        did = cycle(Net(*arrays, net.rate), *rules, axes=(1,))
        after, kept = (list(np.moveaxis(m[0], 1, 0)) for m in (did.masks, did.kept))
        got = did._replace(masks=after, kept=kept)
        same(new(got), _by_unit(net.momentum, got))


# --- rules of the other methods, one cycle --------------------------------------------


def test_random_pruning_equals_its_definition():
    """The active weights of the highest random bits stay, an exact number a layer."""
    for seed, net in enumerate(nets(12)):
        did = cycle(net, prune.random, redistribute.none, grow.random, seed=seed)
        removed = oracles.prune_counts(net.masks, [0] * len(SHAPES), net.rate)
        assert did.removed == removed
        key = jax.random.fold_in(jax.random.key(seed), 0)  # that of the prune rule
        for i, (m, kept_now, gone) in enumerate(
            zip(net.masks, did.kept, removed, strict=True)
        ):
            own = jax.random.fold_in(key, np.uint32(zlib.crc32(str(i).encode())))
            draw = np.asarray(jax.random.bits(own, m.shape, jnp.uint32)) >> 1
            # Of equal bits the lower index stays.
            ranked = np.where(m, draw.astype(np.float64), -1.0)
            (right,) = oracles.top_k([ranked], int(m.sum()) - gone)
            np.testing.assert_array_equal(kept_now, right & m)


def test_random_pruning_is_uniform():
    """Each active weight goes in about its share of 400 cycles."""
    mask = jnp.arange(40).reshape(5, 8) % 4 != 0
    evidence = regrowth.Evidence(
        params=(jnp.zeros((5, 8)),),
        masks=(mask,),
        counts=jnp.array([12]),
        active=jnp.array([30]),
    )

    def stay(key):
        return prune.random.apply(evidence._replace(key=key), ())[0][0]

    keys = jax.random.split(jax.random.key(0), 400)
    share = np.asarray(jax.jit(jax.vmap(stay))(keys)).mean(0)
    assert not share[~np.asarray(mask)].any()
    right = np.asarray(mask)
    assert abs(share[right] - 0.6).max() < 5 * np.sqrt(0.6 * 0.4 / 400)


def test_random_pruning_follows_a_ramp():
    """Gradual pruning at random, the control for every criterion."""
    params = network(((12, 9), (9, 7)))
    tx = sparse_optax.gradual_magnitude(
        optax.sgd(0.1), density=0.25, update_period=2, update_stop=8,
        prune=prune.random, key=0,
    )  # fmt: skip
    gradients, state = random_gradients(1, params, 8), tx.init(params)
    step = stepper(tx)
    for t in range(8):
        params, state = step(params, state, at_step(gradients, t))
    counts = sparse_optax.budgets.uniform(0.25).counts(network(((12, 9), (9, 7))))
    wanted = [counts[name]["kernel"] for name in sorted(counts)]
    assert [int(m.sum()) for m in kept(state)] == wanted
    for w, m in zip(kernels(params), kept(state), strict=True):
        assert not w[~m].any()


def test_two_sided_pruning_equals_its_definition():
    for net in nets(24):
        did = cycle(net, prune.two_sided, redistribute.none, grow.random)
        wanted = [
            oracle.two_sided(w, m, net.rate)
            for w, m in zip(net.params, net.masks, strict=True)
        ]
        same(did.kept, wanted)
        assert did.grown == did.removed


def test_two_sided_pruning_removes_the_wrong_half_nowhere():
    """Half of four positive and half of four negative weights: those next to zero.

    A known failure takes all but the most negative weights.
    """
    weights = np.float32([-4, -3, -2, -1, 1, 2, 3, 4])
    net = Net([weights], [np.ones(8, bool)], [weights], [weights], 0.5)
    did = cycle(net, prune.two_sided, redistribute.none, grow.random)
    assert did.kept[0].tolist() == [True, True, False, False, False, False, True, True]
    # With one sign alone nothing else is touched.
    for sign in (1, -1):
        net = net._replace(params=[sign * np.abs(weights)])
        did = cycle(net, prune.two_sided, redistribute.none, grow.random)
        assert np.abs(weights)[did.kept[0]].tolist() == [4, 3, 3, 4]


GLOBAL = prune.global_magnitude, redistribute.none, grow.global_momentum


def test_global_rules_equal_their_definitions():
    for net in nets(24):
        did = cycle(
            net, prune.global_magnitude, redistribute.none, grow.global_momentum
        )
        lost = sum(oracle.floor_rate(net.rate, m.sum()) for m in net.masks)
        same(did.kept, oracle.global_prune(net.params, net.masks, lost))
        same(
            new(did),
            oracle.global_grow(net.momentum, missing(did.kept), sum(did.removed)),
        )
        for before, after in zip(net.masks, did.kept, strict=True):
            assert after.any() == before.any()


def test_global_rules_by_hand():
    """Four of eight go, though layer 0 has the four largest; each keeps its largest."""
    params = [np.float32([5, 6, 7, 8]), np.float32([4, 3, 2, 1])]
    masks = [np.ones(4, bool)] * 2
    momentum = [np.float32([1, 1, 1, 1]), np.float32([1, 9, 2, 0])]
    net = Net(params, masks, momentum, momentum, 0.5)
    did = cycle(net, *GLOBAL)
    assert [k.tolist() for k in did.kept] == [
        [False, True, True, True],
        [True, False, False, False],
    ]
    assert (did.removed, did.grown) == ([1, 3], [1, 3])
    net = net._replace(rate=1.0)
    did = cycle(net, *GLOBAL)
    assert (did.removed, did.grown) == ([3, 3], [3, 3])


# --- training -------------------------------------------------------------------------

NET = ((9, 6), (6, 5))
PERIOD, STOP = 3, 24
SGD = optax.sgd(0.05, momentum=0.9)


class Step(NamedTuple):
    """One update: what went in and what came out, NumPy arrays a layer."""

    count: int
    params: list
    masks: list
    gradient: list
    after: list
    new: list
    state: Any


def follow(tx, steps=STOP + PERIOD, shapes=NET, seed=0, budget=None, cut=False):
    """Trains by random gradients; each step's exact total and exact zeros checked."""
    params = network(shapes)
    grads = random_gradients(seed, params, steps)
    state, step = tx.init(params), stepper(tx)
    params = sparse_optax.sparsify(params, state) if cut else params
    wanted = total(kept(state)) if budget is None else budget
    for t in range(steps):
        g, before, masks = at_step(grads, t), params, kept(state)
        params, state = step(params, state, g)
        made = Step(
            t, kernels(before), masks, kernels(g), kernels(params), kept(state), state
        )
        assert total(made.new) == (wanted(t) if callable(wanted) else wanted)
        for w, m in zip(made.after, made.new, strict=True):
            assert not w[~m].any()
            assert np.isfinite(w).all()
        yield made


def is_due(count):
    return count > 0 and count % PERIOD == 0 and count < STOP


def cycles_of(tx, **kwargs):
    """The steps of ``follow`` that open a cycle; on the others no mask moves."""
    for step in follow(tx, **kwargs):
        if is_due(step.count):
            yield step
        else:
            same(step.new, step.masks)


def cosine(initial, count):
    """The float32 that the schedule has, so that floors agree."""
    rate = float(schedules.cosine_prune_rate(initial, stop=STOP)(count))
    by_hand = initial * (1 + np.cos(np.pi * min(count, STOP) / STOP)) / 2
    np.testing.assert_allclose(rate, by_hand, atol=1e-6)
    return rate


def rests(step, kept):
    """What was pruned is zero after the update, also where it has grown back."""
    for w, before, k in zip(step.after, step.masks, kept, strict=True):
        assert not w[before & ~k].any()


SETTINGS = dict(density=0.4, update_period=PERIOD, update_stop=STOP, key=1)


def test_set_trains_as_defined():
    moved = 0
    for step in cycles_of(sparse_optax.sparse_evolutionary(SGD, **SETTINGS)):
        stay = [
            oracle.two_sided(w, m, 0.3)
            for w, m in zip(step.params, step.masks, strict=True)
        ]
        rests(step, stay)
        for k, old, m in zip(stay, step.masks, step.new, strict=True):
            assert not (k & ~m).any()
            assert m.sum() == old.sum()
            moved += int((m & ~old).sum())
    assert moved > 10


def test_rigl_trains_as_defined():
    changed = 0
    for step in cycles_of(sparse_optax.rigl(SGD, **SETTINGS)):
        rate = cosine(0.3, step.count)
        wanted, stay = oracle.rigl_cycle(step.params, step.masks, step.gradient, rate)
        same(step.new, wanted)
        rests(step, stay)
        changed += any((a != b).any() for a, b in zip(step.masks, wanted, strict=True))
        trace = kernels(optax.tree.get(step.state, "trace"))
        for z, g, k, m in zip(trace, step.gradient, stay, step.new, strict=True):
            # Reset, then this step's gradient: all that a new weight remembers.
            np.testing.assert_allclose(z[m & ~k], g[m & ~k], rtol=1e-6)
    assert changed > 3


def test_random_growth_is_uniform_over_what_is_missing():
    """Of 48 places 8 come, 600 times: each about 100 times."""
    weights = jnp.where(jnp.arange(50) < 10, 1.0 + jnp.arange(50), 0)

    def masks_of(key):
        evidence = regrowth.Evidence((weights,), (weights != 0,), key=key)
        rules = dict(prune=prune.two_sided, redistribute=redistribute.none)
        return regrowth.cycle(evidence, **rules, grow=grow.random, prune_rate=0.8).masks

    (masks,) = jax.jit(jax.vmap(masks_of))(jax.random.split(jax.random.key(0), 600))
    masks = np.asarray(masks)
    assert (masks.sum(axis=1) == 10).all()
    assert masks[:, 8:10].all()
    came = masks[:, np.r_[:8, 10:50]].sum(axis=0)
    assert came.sum() == 8 * 600
    # Chi-square with 47 degrees of freedom is below 84 in 999 of 1000 draws.
    assert ((came - 100) ** 2 / 100).sum() < 84


# --- DSR ------------------------------------------------------------------------------

THRESHOLD = prune.adaptive_threshold(0.5)
DSR = THRESHOLD, redistribute.nonzeros, grow.random_elsewhere


def test_dsr_equals_its_definition():
    factors = set()
    for i, net in enumerate(nets(24)):
        before = np.float32(0.5 * 4.0 ** (i % 3 - 1))
        did = cycle(net, *DSR, states=(jnp.float32(before), (), ()))
        wanted = sum(oracle.floor_rate(net.rate, m.sum()) for m in net.masks)
        stay, removed, after = oracle.under_threshold(
            net.params, net.masks, before, wanted, 0.1
        )
        same(did.kept, stay)
        assert did.removed == removed
        assert did.grown == oracle.dsr_grown(stay, removed)
        assert float(did.states[0]) == after
        factors.add(after / before)
        for k, old, m in zip(did.kept, net.masks, did.masks, strict=True):
            # Back in its own place only where no other was left.
            assert not (m & ~k & old).any() or m[~old].all()
    assert factors == {0.5, 1.0, 2.0}


def test_the_band_of_the_threshold_is_exact():
    """Ten of twenty are under it: 1.1 * 9 < 10, 0.9 * 11 < 10, 0.9 * 12 > 10."""
    weights, mask = jnp.float32([0.25] * 10 + [1.0] * 10), jnp.ones(20, bool)
    evidence = regrowth.Evidence((weights,), (mask,), active=jnp.array([20]))
    for number, factor in ((1, 0.5), (9, 0.5), (10, 1), (11, 1), (12, 2)):
        rule = prune.adaptive_threshold(0.5, number=number)
        (stay,), threshold = rule.apply(evidence, rule.init((), ()))
        assert int(stay.sum()) == 10
        assert float(threshold) == 0.5 * factor


def test_a_threshold_never_gets_stuck():
    """Where nothing can reach the target it stays a number that can come back."""
    weights = np.float32([1.0, 2.0])
    net = Net([weights], [np.ones(2, bool)], [weights], [weights], 1.0)
    state = (jnp.float32(2.0**119), (), ())
    for _ in range(3):  # one weight stays, and two should go
        did = cycle(net, *DSR, states=state)
        state = did.states
    assert float(state[0]) == 2.0**120
    net = net._replace(rate=0.0)
    did = cycle(net, *DSR, states=state)
    assert (did.removed, float(did.states[0])) == ([1], 2.0**119)
    state = (jnp.float32(2.0**-119), (), ())
    net = net._replace(params=[np.zeros(2, np.float32)])
    for _ in range(3):  # a zero is under every threshold
        did = cycle(net, *DSR, states=state)
        state = did.states
    assert float(state[0]) == 2.0**-120


def test_dsr_trains_as_defined():
    tx = sparse_optax.dynamic_sparse(SGD, threshold=0.05, prune_number=5, **SETTINGS)
    threshold, seen = 0.05, []
    for step in cycles_of(tx):
        threshold = np.float32(threshold)
        stay, removed, threshold = oracle.under_threshold(
            step.params, step.masks, threshold, 5, 0.1
        )
        grown = oracle.dsr_grown(stay, removed)
        rests(step, stay)
        for k, m, n in zip(stay, step.new, grown, strict=True):
            assert not (k & ~m).any()
            assert m.sum() == k.sum() + n
        np.testing.assert_array_equal(step.state.rules[0], np.float32(threshold))
        seen.append((sum(removed), float(threshold)))
    assert min(max(removed for removed, _ in seen), len(seen)) > 3
    assert len({threshold for _, threshold in seen}) > 2


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("initial", 0.0, r"\["),
        ("initial", float("nan"), r"\["),
        ("tolerance", 1.0, r"\[0, 1\)"),
        ("number", 0, r"\[1, 2"),
        ("number", 1.5, r"\[1, 2"),
        ("number", True, r"\[1, 2"),
    ],
)
def test_a_wrong_threshold(argument, value, allowed):
    with refuses("adaptive_threshold", argument, str(value), allowed):
        prune.adaptive_threshold(**{argument: value})


# --- ITOP -----------------------------------------------------------------------------


def test_what_was_never_active_grows_first():
    rules = prune.magnitude, redistribute.none, grow.unexplored(grow.gradient)
    for seed, net in enumerate(nets(24)):
        rng = np.random.default_rng(seed)
        ever = [m | (rng.random(m.shape) < 0.7) for m in net.masks]
        state = grow.Explored(regrowth.PerWeight(tuple(map(jnp.asarray, ever))), ())
        did = cycle(net, *rules, states=((), (), state))
        wanted = oracle.grow_unexplored(net.gradient, did.kept, ever, did.grown)
        same(new(did), wanted)
        after = did.states[2].explored.values
        same(after, [e | n for e, n in zip(ever, wanted, strict=True)])


def test_the_explored_share_is_what_was_ever_active():
    tx = sparse_optax.in_time_over_parameterization(
        SGD, packed=True, prefer_unexplored=True, **SETTINGS
    )
    ever, shares = None, []
    for step in follow(tx):
        ever = ever or step.masks
        for e, m, n in zip(ever, step.masks, step.new, strict=True):
            come = n & ~m  # at random, and nothing twice while there is more
            assert not (come & e).any() or (e | come).all()
        ever = [e | n for e, n in zip(ever, step.new, strict=True)]
        explored = sparse_optax.masks.get_explored(step.state)
        same(jax.tree.leaves(explored), ever)
        shares.append(sparse_optax.masks.density(explored))
    assert shares[0] == 33 / 84  # floor(0.4 * 54) + floor(0.4 * 30)
    assert shares[-1] == 1.0
    assert sorted(shares) == shares
    params = network(NET)
    made = sparse_optax.report.summary(params, step.state, explored=explored)
    assert made.total.explored == 84


def test_masks_set_from_outside_are_explored():
    tx = sparse_optax.in_time_over_parameterization(
        optax.sgd(0.1),
        masks={"w": jnp.arange(12).reshape(3, 4) < 4},
        update_period=1,
        prune_rate=0.0,
        key=0,
    )
    params = {"w": jnp.ones((3, 4))}
    state = sparse_optax.set_masks(
        tx.init(params), {"w": jnp.arange(12).reshape(3, 4) >= 8}
    )
    for _ in range(2):
        _, state = jax.jit(tx.update)(params, state, params)
    explored = sparse_optax.masks.get_explored(state)["w"]
    assert explored.tolist() == [[True] * 4, [False] * 4, [True] * 4]


def test_unexplored_wants_a_rule_that_keeps_to_its_counts():
    with refuses("unexplored", "rule", "Rule", "counts"):
        grow.unexplored(grow.global_momentum)
    with refuses("get_explored", "opt_state"):
        sparse_optax.masks.get_explored(())


# --- GraNet ---------------------------------------------------------------------------

RAMP = dict(density=0.3, update_period=PERIOD, update_stop=STOP, key=1)
SIZES = (54, 30)
FINAL = (16, 9)


def _targets(count, initial=1.0):
    density = schedules.cubic_density(initial, 0.3, 0, 21)(count)
    by_hand = 0.3 + (initial - 0.3) * (1 - min(count, 21) / 21) ** 3
    np.testing.assert_allclose(density, by_hand, atol=1e-6)
    return oracle.targets(density if count < 21 else 0.0, 0.3, FINAL, SIZES)


def _granet_total(count):
    """The density changes at cycles, and stays in between and after the last."""
    return sum(_targets(min(count, STOP - 1) // PERIOD * PERIOD))


def test_granet_trains_as_defined():
    tx = sparse_optax.granet(SGD, scope="layer", **RAMP)
    for step in cycles_of(tx, budget=_granet_total):
        rate, target = cosine(0.5, step.count), _targets(step.count)
        wanted, _ = oracle.granet_cycle(
            step.params, step.masks, step.gradient, rate, target
        )
        same(step.new, wanted)
        assert [int(m.sum()) for m in step.new] == target
    assert target == list(FINAL)


def test_granet_prunes_globally_and_exchanges_within_layers_by_default():
    moved = False
    for step in cycles_of(sparse_optax.granet(SGD, **RAMP), budget=_granet_total):
        wanted = oracle.granet_mixed_cycle(
            step.params,
            step.masks,
            step.gradient,
            cosine(0.5, step.count),
            sum(_targets(step.count)),
        )
        same(step.new, wanted)
        moved = moved or [int(m.sum()) for m in step.new] != _targets(step.count)
    assert moved


def test_what_granet_grows_back_keeps_its_value():
    """A first cycle near density 1 prunes half; nearly all of it comes back."""
    params = network(NET)
    still = jax.tree.map(jnp.zeros_like, params)
    tx = sparse_optax.granet(optax.sgd(0.0), **RAMP | dict(update_period=1))
    state, step = tx.init(params), stepper(tx)
    after, state = step(params, state, still)
    after, state = step(after, state, still)
    masks = kept(state)
    assert total(masks) < 84
    same(
        kernels(after),
        [np.where(m, w, 0) for w, m in zip(kernels(params), masks, strict=True)],
    )


def test_global_granet_meets_the_total_and_moves_between_layers():
    tx = sparse_optax.granet(SGD, scope="global", **RAMP)
    moved = False
    for step in cycles_of(tx, budget=_granet_total):
        counts = [int(m.sum()) for m in step.new]
        assert min(counts) > 0
        moved = moved or counts != _targets(step.count)
    assert sum(counts) == sum(FINAL)
    assert moved


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("scope", "leaf", "layer"),
        ("initial_density", 0.01, "at least the density"),
        ("density", None, r"\(0, 1\]"),
        ("density_stop", 22, "at most 21"),
    ],
)
def test_wrong_arguments_of_granet(argument, value, allowed):
    with refuses("granet", argument, "", allowed):
        tx = sparse_optax.granet(SGD, **RAMP | {argument: value})
        tx.init(network(SHAPES))


# --- this library's recipes -----------------------------------------------------------


def _by_kernel(density):
    """Counts of the layers of ``NET`` by Erdos-Renyi-kernel."""
    found = budgets.erdos_renyi_kernel(density).counts(network(NET))
    return [int(n) for n in jax.tree.leaves(found)]


@pytest.mark.parametrize("momentum", [0.7, 0.998])
def test_a_long_average_says_what_grows(momentum):
    """The average of the gradients, whatever SGD's momentum is."""
    tx = sparse_optax.long_average_regrow(SGD, momentum=momentum, **SETTINGS)
    average, by_trace = [np.zeros(shape) for shape in NET], 0
    for step in follow(tx):
        if is_due(step.count):
            rate = cosine(0.3, step.count)
            counts = [oracle.floor_rate(rate, m.sum()) for m in step.masks]
            stay = oracle.smallest_go(step.params, step.masks, counts)
            new = oracle.largest(average, [~m for m in stay], counts)
            same(step.new, [s | n for s, n in zip(stay, new, strict=True)])
            rests(step, stay)
            trace = oracle.largest(step.gradient, [~m for m in stay], counts)
            by_trace += any((a != b).any() for a, b in zip(new, trace, strict=True))
        pairs = zip(average, step.gradient, strict=True)
        average = [momentum * m + (1 - momentum) * g for m, g in pairs]
        assert [int(m.sum()) for m in step.new] == _by_kernel(0.4)
    assert by_trace > 3  # growth by the last gradient would be another


@pytest.mark.parametrize(
    ("given", "decay", "share"),
    [({}, 0.9995, 0.0005), ({"momentum": "auto"}, 0.9, 1.0)],
    ids=["long average", "momentum of SGD"],
)
def test_a_falling_budget_trains_as_defined(given, decay, share):
    """From three times the weights along the cubic, by a long average or momentum."""
    tx = sparse_optax.falling_budget_regrow(
        SGD, initial_factor=3.0, **SETTINGS | dict(density=0.2) | given
    )
    final, end = _by_kernel(0.2), 12  # the last cycle within 60% of 24

    def targets(count):
        seen = min(count, end) // PERIOD * PERIOD
        whole = sum(final) / sum(SIZES)  # the density that the counts come to
        now = whole + 2 * whole * (1 - seen / end) ** 3
        return oracle.targets(now if seen < end else 0.0, whole, final, SIZES)

    trace, moved = [np.zeros(shape) for shape in NET], 0
    for step in follow(tx, budget=lambda count: sum(targets(count))):
        assert [int(m.sum()) for m in step.new] == targets(step.count)
        if is_due(step.count):
            wanted, stay = oracle.granet_cycle(
                step.params,
                step.masks,
                trace,
                cosine(0.3, step.count),
                targets(step.count),
            )
            same(step.new, wanted)
            rests(step, stay)
            moved += total([n & ~m for n, m in zip(step.new, step.masks, strict=True)])
        pairs = zip(trace, step.gradient, strict=True)
        trace = [decay * m + share * g for m, g in pairs]
    assert moved > 3
    assert [int(m.sum()) for m in step.new] == final


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [("initial_factor", 0.5, "at least 1"), ("density_stop", 22, "at most 21")],
)
def test_wrong_arguments_of_a_falling_budget(argument, value, allowed):
    with refuses("falling_budget_regrow", argument, str(value), allowed):
        sparse_optax.falling_budget_regrow(SGD, **SETTINGS | {argument: value})


def test_wrong_momentum_of_a_long_average():
    with refuses("long_average_regrow", "momentum", "1.0", r"\[0, 1\)"):
        sparse_optax.long_average_regrow(SGD, momentum=1.0, **SETTINGS)


@pytest.mark.parametrize("name", ["long_average_regrow", "falling_budget_regrow"])
def test_a_density_of_jax_is_shared_as_a_number_is(name):
    make, params = getattr(sparse_optax, name), network(NET)
    settings = {key: SETTINGS[key] for key in SETTINGS if key != "density"}
    found = [
        sparse_optax.get_masks(make(SGD, density=d, **settings).init(params))
        for d in (np.float32(0.3), jnp.float32(0.3))
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)
    with refuses(name, "density", "Tracer", "static_args"):
        jax.jit(lambda d: make(SGD, density=d, **settings).init(params))(0.3)
    with refuses("falling_budget_regrow", "momentum", "1.5"):
        sparse_optax.falling_budget_regrow(SGD, momentum=jnp.float32(1.5), **SETTINGS)


# --- DEEP-R ---------------------------------------------------------------------------

LR, L1 = 0.3, 0.05


def _deep(**kwargs):
    settings = dict(density=0.4, learning_rate=LR, l1=L1, gradient_noise=0.0, key=1)
    return sparse_optax.deep_rewiring(optax.sgd(LR), **(settings | kwargs))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_deep_rewiring_trains_as_defined(scope):
    positive, left, counts = None, 0, []
    for step in follow(_deep(scope=scope), steps=20):
        signs = kernels(optax.tree.get(step.state, "positive"))
        if positive is None:  # of existing weights the sign that they start with
            for w, m, s in zip(step.params, step.masks, signs, strict=True):
                np.testing.assert_array_equal(s[m], w[m] > 0)
        else:
            same(signs, positive)
        positive = signs
        zeros = [oracle.dormant(*x) for x in zip(step.params, step.masks, strict=True)]
        gone = [m & ~n for m, n in zip(step.masks, step.new, strict=True)]
        come = [n & ~m for m, n in zip(step.masks, step.new, strict=True)]
        if step.count == 0:
            assert total(gone) == total(come) == 0
        else:
            assert total(gone) == total(come) == sum(zeros)
            for w, g in zip(step.params, gone, strict=True):
                assert not w[g].any()
            if scope == "layer":
                assert [int(c.sum()) for c in come] == zeros
        left += total(gone)
        counts.append([int(n.sum()) for n in step.new])
        for w, n, s, g, after in zip(
            step.params, step.new, signs, step.gradient, step.after, strict=True
        ):
            seen = np.where(n, w, 0)
            wanted = oracle.rewiring_step(seen, n, s, -LR * g, LR * L1, 0.0)
            np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(after == 0, wanted == 0)
    assert left > 20
    assert (len({tuple(c) for c in counts}) > 1) == (scope == "global")


@pytest.mark.parametrize(
    ("temperature", "noise"),
    [(0.0, 0.0), (0.01, 0.0), (0.04, 0.0), (0.0, 0.2), (0.01, 0.2)],
)
def test_the_method_has_the_noise_of_its_temperature(temperature, noise):
    """Without a gradient or L1 weights move by normal numbers, whose variance is 2 eta
    T + (eta sigma)^2.
    """
    tx = sparse_optax.deep_rewiring(
        optax.sgd(0.5),
        density=0.5,
        learning_rate=0.5,
        l1=0.0,
        gradient_noise=noise,
        temperature=temperature,
        key=0,
    )
    params = {"w": jnp.full((100, 100), 10.0)}  # no sign changes
    state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = jax.jit(tx.update)(zero, state, params)
    mask = np.asarray(sparse_optax.get_masks(state)["w"])
    moved = np.asarray(updates["w"])[mask]
    sigma = np.sqrt(2 * 0.5 * temperature + (0.5 * noise) ** 2)
    assert moved.std() == pytest.approx(sigma, rel=0.05)
    assert abs(moved.mean()) <= 0.05 * sigma
    if sigma:  # of 5000, 0.27 percent lie beyond three deviations, 13 give or take 4
        assert 2 <= (np.abs(moved - moved.mean()) > 3 * sigma).sum() <= 29
        assert abs(np.corrcoef(moved[:-1], moved[1:])[0, 1]) < 0.06


def test_the_noise_by_default_is_that_of_the_released_code():
    """1e-5 of the gradient: a step of 5e-6 at a learning rate of 0.5."""
    tx = sparse_optax.deep_rewiring(
        optax.sgd(0.5), density=0.5, learning_rate=0.5, l1=0.0, key=0
    )
    params = {"w": jnp.full((100, 100), 1e-3)}
    still = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(still, tx.init(params), params)
    moved = np.asarray(updates["w"])[np.asarray(sparse_optax.get_masks(state)["w"])]
    assert moved.std() == pytest.approx(5e-6, rel=0.05)


def test_the_noise_has_its_temperature():
    params = {"w": jnp.full((40, 50), 9.0)}
    tx = signed_step(0.5, l1=0.0, temperature=0.04, key=0)
    still = jax.tree.map(jnp.zeros_like, params)
    exist = jax.tree.map(lambda x: x > 0, params)
    state, seen = tx.init(params), []
    for _ in range(2):
        updates, state = tx.update(still, state, params, regrow_masks=exist)
        seen.append(np.asarray(updates["w"]))
    # Of 2000 draws the deviation is known to 1.6 percent, the mean to 0.0045.
    assert abs(seen[0].std() / 0.2 - 1) < 0.06
    assert abs(seen[0].mean()) < 0.018
    assert abs(np.corrcoef(seen[0].ravel(), seen[1].ravel())[0, 1]) < 0.1


def test_signs_are_random_where_nothing_tells_them():
    """Missing weights, and weights that start at zero."""
    zero, one = jnp.zeros(400), jnp.ones(400)
    params = {"missing": zero, "zero": zero, "negative": -one}
    exist = {"missing": zero > 0, "zero": zero == 0, "negative": zero == 0}
    tx = signed_step(0.1, l1=0.0, temperature=0.0, key=0)
    _, state = tx.update(params, tx.init(params), params, regrow_masks=exist)
    positive = jax.tree.map(lambda s: int(s.sum()), state.positive)
    assert 160 < positive["missing"] < 240
    assert 160 < positive["zero"] < 240
    assert positive["negative"] == 0


def test_a_full_network_of_deep_rewiring_goes_on_from_zero():
    """Nothing is missing, so no weight leaves; one that was clamped moves again."""
    waited = moved = 0
    for step in follow(_deep(density=1.0), steps=12, shapes=((9, 6),)):
        (w,), (after,) = step.params, step.after
        waited += int((after == 0).sum())
        moved += int(((w == 0) & (after != 0)).sum())
    assert min(waited, moved) > 10


def test_global_reactivation_is_uniform_over_the_network():
    """Of 60 + 20 missing places 8 come, 400 times: each about 40 times."""
    before = jnp.arange(64) < 4, jnp.arange(40) < 20
    stay = jnp.zeros(64, bool), (jnp.arange(40) < 20) & (jnp.arange(40) >= 4)

    def masks_of(key):
        counts = jnp.array([4, 4])
        evidence = regrowth.Evidence(
            stay, stay, key=key, before=before, counts=counts, names=("a", "b")
        )
        return grow.global_random_elsewhere.apply(evidence, ())[0]

    keys = jax.random.split(jax.random.key(0), 400)
    one, two = map(np.asarray, jax.jit(jax.vmap(masks_of))(keys))
    assert not one[:, :4].any()
    assert not two[:, :20].any()
    came = np.concatenate([one[:, 4:].sum(axis=0), two[:, 20:].sum(axis=0)])
    assert came.sum() == 8 * 400
    # Chi-square with 79 degrees of freedom is below 124 in 999 of 1000 draws.
    assert ((came - 40) ** 2 / 40).sum() < 124


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("l1", -1.0, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("learning_rate", -1.0, "at least 0"),
        ("learning_rate", float("nan"), "at least 0"),
        ("learning_rate", "0.1", "schedule"),
        ("scope", "leaf", "layer"),
        ("density", 0.0, r"\(0, 1\]"),
    ],
)
def test_wrong_arguments_of_deep_rewiring(argument, value, allowed):
    with refuses("deep_rewiring", argument, "", allowed):
        _deep(**{argument: value})


def test_a_signed_step_stands_inside_regrow():
    tx = signed_step(0.1, l1=0.0, temperature=0.0, key=0)
    params = {"w": jnp.ones((2, 2))}
    with refuses("signed_step", "regrow_masks"):
        tx.update(params, tx.init(params), params)


# --- known failures of other libraries ------------------------------------------------

OPTIMIZERS = {
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=4),
    "lion": lambda: optax.lion(0.01),
    "rmsprop": lambda: optax.rmsprop(0.01, momentum=0.9),
    "muon": lambda: optax.contrib.muon(0.01),
    "partition": lambda: optax.partition(
        {"k": optax.adam(0.01), "b": optax.sgd(0.01)},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key[0], params
        ),
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_growth_and_reset_work_around_any_optimizer(optimizer):
    tx = sparse_optax.rigl(
        OPTIMIZERS[optimizer](),
        density=0.4,
        update_period=1,
        update_stop=9,
        key=0,
    )
    changed = 0
    for step in follow(tx, steps=4, shapes=((6, 5),)):
        assert (step.after[0][step.new[0]] != 0).sum() > 6
        if step.count:
            rate = float(schedules.cosine_prune_rate(0.3, stop=9)(step.count))
            wanted, _ = oracle.rigl_cycle(step.params, step.masks, step.gradient, rate)
            same(step.new, wanted)
            changed += (step.new[0] != step.masks[0]).sum()
    assert changed > 3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_moments_of_grown_weights_are_one_step_from_zero(optimizer):
    """Each moment that has an entry a weight, whatever the optimizer calls it."""
    inner = OPTIMIZERS[optimizer]()
    tx = sparse_optax.rigl(inner, density=0.4, update_period=1, update_stop=9, key=0)
    params = network(((6, 5),))
    grads = random_gradients(0, params, 4)
    state, step, checked = tx.init(params), stepper(tx), 0
    for t in range(4):
        g, masks, before = at_step(grads, t), kept(state)[0], state.inner_state
        old, (params, state) = params, step(params, state, g)
        grown = kept(state)[0] & ~masks
        # As if those weights had never had a moment.
        fresh = jax.tree.map(
            lambda x, grown=grown: jnp.where(grown, 0, x) if x.shape == (6, 5) else x,
            before,
        )
        wanted = jax.jit(inner.update)(g, fresh, old)[1]
        pairs = zip(
            jax.tree.leaves(state.inner_state), jax.tree.leaves(wanted), strict=True
        )
        for a, b in pairs:
            if a.shape == (6, 5):
                np.testing.assert_allclose(a[grown], b[grown], rtol=1e-5, atol=1e-7)
                checked += grown.sum()
    # Factored statistics have no entry for a weight.
    assert checked > 3 or optimizer == "adafactor"


def test_accumulation_outside():
    tx = optax.MultiSteps(sparse_optax.rigl(SGD, **SETTINGS | dict(update_period=1)), 2)
    masks = [step.new for step in follow(tx, steps=6, shapes=((6, 5),), cut=True)]
    # The odd steps update; the cycles open the second and the third of these.
    changes = [(a[0] != b[0]).any() for a, b in itertools.pairwise(masks)]
    assert changes == [False, False, True, False, True]


def test_seeds_of_a_batch_have_masks_of_their_own():
    """Three seeds in one program, first masks and growth; each as it is alone."""
    params = network(((6, 5),))

    def tx(key):
        settings = SETTINGS | dict(update_period=1, key=key)
        return sparse_optax.sparse_evolutionary(optax.sgd(0.1), **settings)

    def run(key):
        def step(carry, _):
            updates, state = tx(key).update(params, *carry)
            return (state, optax.apply_updates(carry[1], updates)), None

        start = tx(key).init(params), params
        (state, _), _ = jax.lax.scan(step, start, length=3)
        return sparse_optax.get_masks(state)["Dense_0"]["kernel"]

    keys = jax.random.split(jax.random.key(3), 3)
    together = np.asarray(jax.jit(jax.vmap(run))(keys))
    alone = jax.jit(run)
    same(together, [np.asarray(alone(key)) for key in keys])
    assert (together.sum(axis=(1, 2)) == 12).all()
    for a, b in itertools.combinations(together, 2):
        assert (a != b).any()


def test_an_infinite_gradient_of_a_missing_weight_makes_no_nan():
    """No cycle by it, and 0 * inf nowhere."""
    tx = sparse_optax.rigl(optax.sgd(0.1), **SETTINGS | dict(update_period=1))
    params = network(((6, 5),))
    state, step = tx.init(params), stepper(tx)
    still = jax.tree.map(jnp.ones_like, params)
    params, state = step(params, state, still)
    before = kept(state)
    i = tuple(np.argwhere(~before[0])[0])
    broken = still | {
        "Dense_0": still["Dense_0"]
        | {"kernel": still["Dense_0"]["kernel"].at[i].set(jnp.inf)}
    }
    params, state = step(params, state, broken)
    same(kept(state), before)
    assert int(state.skipped) == 1
    assert np.isfinite(kernels(params)[0]).all()
    assert kernels(params)[0][i] == 0


LATER = dict(density=0.4, update_period=5, update_stop=20)
EVERY = {
    "momentum": lambda: sparse_optax.sparse_momentum_regrow(SGD, **LATER, key=0),
    "set": lambda: sparse_optax.sparse_evolutionary(SGD, **LATER, key=0),
    "dsr": lambda: sparse_optax.dynamic_sparse(SGD, **LATER, key=0),
    "rigl": lambda: sparse_optax.rigl(SGD, **LATER, key=0),
    "static": lambda: sparse_optax.static_sparse(SGD, density=0.4, key=0),
    "deep_r": lambda: sparse_optax.deep_rewiring(
        SGD, density=0.4, learning_rate=0.1, key=0
    ),
    "surgery": lambda: sparse_optax.network_surgery(SGD, density=0.4),
    "straight_through": lambda: sparse_optax.straight_through_magnitude(
        SGD, density=0.4
    ),
    "top_kast": lambda: sparse_optax.top_kast(SGD, density=0.4, backward_density=0.6),
    "ham": lambda: sparse_optax.static_sparse(
        sparse_optax.ham(SGD, 0.1, alpha=1.0), density=0.4, key=0
    ),
}


@pytest.mark.parametrize("method", EVERY)
@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_what_is_infinite_behind_a_mask_stays_behind_it(method, jitted):
    """Without jit too: with it XLA makes a selection of a product with a mask."""
    tx = EVERY[method]()
    params = network(((6, 5),))
    update = jax.jit(tx.update) if jitted else tx.update
    state = tx.init(params)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, state = update(still, state, params)
    params = optax.apply_updates(params, updates)
    before = kept(state)[0]
    # What is last by magnitude, where the dense weights say what is missing.
    i = tuple(np.argwhere(~before)[0])
    broken = still | {"Dense_0": dict(still["Dense_0"])}
    broken["Dense_0"]["kernel"] = still["Dense_0"]["kernel"].at[i].set(jnp.inf)
    updates, state = update(broken, state, params)
    params = optax.apply_updates(params, updates)
    assert np.isfinite(kernels(params)[0]).all()
    assert not kernels(params)[0][~kept(state)[0]].any()
    assert kernels(params)[0][i] == 0
    same(kept(state), [before])


@pytest.mark.parametrize(
    "rules",
    [
        (prune.magnitude, redistribute.none, grow.gradient),
        (prune.magnitude, redistribute.magnitude, grow.momentum_per_neuron),
        GLOBAL,
    ],
    ids=["gradient", "momentum_per_neuron", "global_momentum"],
)
def test_zero_evidence_still_grows(rules):
    """As many come as went."""
    net = next(nets(1, active=("some",)))._replace(rate=0.5)
    zero = [np.zeros_like(w) for w in net.params]
    did = cycle(net._replace(momentum=zero, gradient=zero), *rules)
    assert sum(did.grown) == sum(did.removed) > 10


# --- one budget over several methods --------------------------------------------------
def test_one_budget_over_layers_of_different_methods():
    """Each method keeps its layers' counts of the one budget."""
    params = {
        name: {"kernel": jnp.ones(shape), "bias": jnp.zeros(shape[1])}
        for name, shape in (("a", (20, 30)), ("b", (30, 40)), ("c", (40, 10)))
    }
    counts = sparse_optax.budgets.erdos_renyi(0.1).counts(params)
    labels = {"a": "momentum", "b": "rigl", "c": "momentum"}
    options = dict(density=counts, update_period=2, update_stop=9, key=0)
    tx = optax.partition(
        {
            "momentum": sparse_optax.sparse_momentum_regrow(
                optax.sgd(0.1, momentum=0.9), **options
            ),
            "rigl": sparse_optax.rigl(optax.adam(0.1), **options),
        },
        labels,
    )
    state = tx.init(params)
    total = sum(n for n in jax.tree.leaves(counts) if isinstance(n, int))
    assert total == int(0.1 * (600 + 1200 + 400))
    for _ in range(9):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        masks = sparse_optax.get_masks(state)
        assert sparse_optax.masks.count(masks) == total
        assert int(masks["b"]["kernel"].sum()) == counts["b"]["kernel"]
    for name, layer in params.items():
        kernel, mask = np.asarray(layer["kernel"]), np.asarray(masks[name]["kernel"])
        assert not kernel[~mask].any()


METHODS = {
    "sparse_momentum_regrow": {},
    "sparse_evolutionary": {},
    "rigl": {},
    "dynamic_sparse": {},
    "in_time_over_parameterization": {},
    "granet": {},
    "gradual_magnitude": {},
    "ac_dc": {},
    "top_kast": {"backward_density": 0.9},
    "deep_rewiring": {"learning_rate": 0.1},
    "network_surgery": {},
    "straight_through_magnitude": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_never_acts_is_refused(name):
    """Else its first masks would stay, random ones for the most part, in silence."""
    method = getattr(sparse_optax, name)
    takes = inspect.signature(method).parameters
    given = {"density": 0.3, "update_period": 1000, "key": 0, **METHODS[name]}
    given = {argument: x for argument, x in given.items() if argument in takes}
    # Without a period there is a cycle at each update, but the first.
    stop = 1000 if "update_period" in takes else 1
    with refuses(name, "`update_stop`", str(stop), "at least"):
        method(optax.sgd(0.1), **given, update_stop=stop)
    method(optax.sgd(0.1), **given, update_stop=stop + 1)


def test_masks_that_stay_are_no_fault():
    sparse_optax.static_sparse(optax.sgd(0.1), density=0.3, key=0)


# --- leaves of unusual types and shapes -----------------------------------------------
def few_steps(tx, params, steps=4):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_deep_rewiring_with_a_number_beside_the_kernels():
    params = {"scale": 1.0, "w": jnp.ones((4, 5))}
    tx = sparse_optax.deep_rewiring(
        optax.sgd(0.1), learning_rate=0.1, density=0.25, key=0
    )
    updates, _ = tx.update(params, tx.init(params), params)
    assert int((params["w"] + updates["w"] != 0).sum()) == 5


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_packed_masks_of_leaves_without_weights(shape):
    params = {"none": jnp.ones(shape), "w": jnp.ones((4, 5))}
    tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.5, key=0, packed=True)
    after, state = few_steps(tx, params, 2)
    masks = sparse_optax.get_masks(state)
    assert masks["none"].shape == shape
    assert int((after["w"] != 0).sum()) == 10


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: sparse_optax.sparse_momentum_regrow(
            optax.adam(0.5), density=0.5, update_period=2, update_stop=9, key=0
        ),
        lambda: sparse_optax.deep_rewiring(
            optax.sgd(0.5), learning_rate=0.5, density=0.5, key=0
        ),
        lambda: sparse_optax.rigl(
            optax.sgd(0.5), density=0.5, update_period=2, update_stop=9, key=0
        ),
    ],
    ids=["sparse_momentum", "deep_rewiring", "rigl"],
)
def test_floats_of_eight_bits(make, dtype):
    """Sums and scores are in float32; JAX promotes no 8-bit float by itself."""
    params = {"w": jnp.linspace(1, 2, 24).reshape(4, 6).astype(dtype)}
    after, state = few_steps(make(), params)
    mask = np.asarray(sparse_optax.get_masks(state)["w"])
    assert after["w"].dtype == dtype
    assert mask.sum() == 12
    assert not np.asarray(after["w"].astype(jnp.float32))[~mask].any()


@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_in_a_chain_there_are_no_moments_to_reset(method):
    settings = dict(density=0.25, update_period=2, update_stop=8, key=0)
    tx = optax.chain(optax.sgd(0.1), getattr(sparse_optax, method)(**settings))
    _, state = few_steps(tx, {"w": jnp.ones((4, 5))}, 9)
    assert sparse_optax.masks.count(sparse_optax.get_masks(state)) == 5
    with refuses(method, "reset_moments", "'grown'", "inner"):
        getattr(sparse_optax, method)(**settings, reset_moments="grown")


def test_infinite_weight_outside_the_masks():
    """No update can take it away, since inf + x is never 0. ``sparsify`` can, and
    training goes on as if it had never been there.
    """
    tx = sparse_optax.static_sparse(optax.adam(0.1), density=0.5, key=0)
    clean = {"w": jnp.ones((4, 6))}
    mask = sparse_optax.get_masks(tx.init(clean))["w"]
    place = tuple(int(i) for i in np.argwhere(~np.asarray(mask))[0])
    params = {"w": clean["w"].at[place].set(jnp.inf)}
    state = tx.init(params)
    updates, state = tx.update(clean, state, params)
    params = optax.apply_updates(params, updates)
    assert not np.isfinite(params["w"][place])
    params = sparse_optax.sparsify(params, state)
    assert float(params["w"][place]) == 0.0
    wanted, _ = few_steps(tx, clean, 1)
    np.testing.assert_array_equal(params["w"], wanted["w"])
    updates, state = tx.update(clean, state, params)
    after = np.asarray(optax.apply_updates(params, updates)["w"])
    assert np.isfinite(after).all()
    assert not after[~np.asarray(mask)].any()


# --- rules that do not keep their word ------------------------------------------------
PAIR = {"a": jnp.arange(1.0, 33).reshape(8, 4), "b": jnp.arange(1.0, 9).reshape(4, 2)}


def trained_with(**rules):
    """The state after three cycles with some rules of one's own."""
    usual = {"prune": prune.magnitude, "redistribute": redistribute.none}
    tx = regrowth.regrow(
        optax.sgd(0.1, momentum=0.9),
        density=0.5,
        update_period=2,
        update_stop=9,
        key=0,
        where=lambda name, leaf: True,
        **{**usual, "grow": grow.random, **rules},
    )
    state, params = tx.init(PAIR), PAIR
    step = jax.jit(tx.update)
    for _ in range(8):
        updates, state = step(PAIR, state, params)
        params = optax.apply_updates(params, updates)
    return state


@pytest.mark.parametrize("many", [True, False])
def test_growth_that_misses_its_sum_is_a_skipped_cycle(many):
    def wrong(evidence):
        return tuple(~m if many else jnp.zeros_like(m) for m in evidence.masks)

    state = trained_with(grow=regrowth.stateless(wrong))
    assert sparse_optax.masks.count(state.regrow_masks) == 20
    assert int(state.skipped) == 3
    assert not any(int(x) for x in jax.tree.leaves((state.removed, state.grown)))
    right = trained_with(grow=grow.global_momentum)
    assert sparse_optax.masks.count(right.regrow_masks) == 20
    assert int(right.skipped) == 0


def test_growth_without_a_budget_says_so():
    def everything(evidence):
        return tuple(~m for m in evidence.masks)

    state = trained_with(grow=regrowth.stateless(everything, open_ended=True))
    assert sparse_optax.masks.count(state.regrow_masks) == 40
    assert grow.above_spread(1.0).open_ended


@pytest.mark.parametrize(
    ("role", "rule", "says"),
    [
        ("grow", regrowth.stateless(lambda e: None), "returned NoneType"),
        ("grow", regrowth.stateless(lambda e: e.masks[:1]), r"returned \[\(8, 4\)\]"),
        ("grow", regrowth.stateless(lambda e: e.params), "dtypes .*float32"),
        ("prune", regrowth.stateless(lambda e: e.masks[0]), "a tuple of boolean"),
        ("prune", regrowth.Rule(lambda p, m: (), lambda e, s: None), "result, state"),
        ("redistribute", regrowth.stateless(lambda e: jnp.ones(5)), "each of 2 layers"),
        ("redistribute", regrowth.stateless(lambda e: [1.0, 2.0]), "returned list"),
        ("prune", regrowth.stateless(lambda e: e.masks, needs=("weights",)), "needs"),
    ],
)
def test_what_a_rule_returns_is_checked(role, rule, says):
    with pytest.raises(ValueError, match=rf"regrow: .*`{role}.*{says}"):
        trained_with(**{role: rule})
