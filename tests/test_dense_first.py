"""A dense start: all weights train, one cut leaves the budget, a method goes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_dynamic as oracle
import pytest
from helpers import at_step, kept, kernels, network, random_gradients, refuses, stepper

import sparse_optax
from sparse_optax import budgets, patterns, regrowth, schedules
from sparse_optax.regrowth import grow, prune, redistribute

SHAPES = ((12, 9), (9, 7))
BUDGET = budgets.erdos_renyi(0.3)
UNTIL, PERIOD, STOP = 4, 3, 12
SGD = optax.sgd(0.1)
CYCLES = dict(density=BUDGET, update_period=PERIOD, update_stop=STOP, key=0)
HIDDEN = dict(density=BUDGET)

METHODS = {
    "rigl": (sparse_optax.rigl, CYCLES),
    "sparse_evolutionary": (sparse_optax.sparse_evolutionary, CYCLES),
    "dynamic_sparse": (sparse_optax.dynamic_sparse, {**CYCLES, "threshold": 0.5}),
    "in_time_over_parameterization": (
        sparse_optax.in_time_over_parameterization,
        CYCLES,
    ),
    "sparse_momentum_regrow": (sparse_optax.sparse_momentum_regrow, CYCLES),
    "deep_rewiring": (
        sparse_optax.deep_rewiring,
        dict(density=BUDGET, learning_rate=0.1, l1=2.0, key=0),
    ),
    "network_surgery": (sparse_optax.network_surgery, HIDDEN),
    "straight_through_magnitude": (sparse_optax.straight_through_magnitude, HIDDEN),
}
ONE_POOL = {"dynamic_sparse", "sparse_momentum_regrow"}  # layers exchange weights


def steps_of(tx, params, gradients):
    """``(params handed in, params after, state after)`` of each step."""
    state, step = tx.init(params), stepper(tx)
    for t in range(len(jax.tree.leaves(gradients)[0])):
        before = params
        params, state = step(params, state, at_step(gradients, t))
        yield before, params, state


def final_counts(params):
    counts = BUDGET.counts(params)
    return [counts[name]["kernel"] for name in sorted(counts)]


SAMPLE = {"rigl", "sparse_evolutionary", "dynamic_sparse", "deep_rewiring"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in METHODS
    ],
)
def test_all_weights_train_and_one_cut_leaves_the_largest(name):
    """At step T the largest of each layer stay, with the counts of the budget."""
    method, settings = METHODS[name]
    params = network(SHAPES)
    gradients = random_gradients(1, params, 14)
    counts, dense = final_counts(params), steps_of(SGD, params, gradients)
    tx = method(SGD, dense_until=UNTIL, **settings)
    cycles, last = 0, []
    for t, (before, after, state) in enumerate(steps_of(tx, params, gradients)):
        masks = kept(state)
        if t < UNTIL:
            assert all(m.all() for m in masks)
            if name != "deep_rewiring":  # whose weights do not cross zero
                for a, b in zip(kernels(after), kernels(next(dense)[1]), strict=True):
                    np.testing.assert_array_equal(a, b)
            continue
        if t == UNTIL:
            full = [np.ones_like(m) for m in masks]
            wanted = oracle.largest(kernels(before), full, counts)
            for got, right in zip(masks, wanted, strict=True):
                np.testing.assert_array_equal(got, right)
        elif name not in ONE_POOL:
            assert [int(m.sum()) for m in masks] == counts
        assert sum(int(m.sum()) for m in masks) == sum(counts)
        for w, m in zip(kernels(after), masks, strict=True):
            assert not w[~m].any()
        if t > UNTIL:
            cycles += any((a != b).any() for a, b in zip(masks, last, strict=True))
        last = masks
    assert cycles > 0


def test_a_cycle_comes_at_later_multiples_of_the_period_alone():
    params = network(SHAPES)
    gradients = random_gradients(1, params, 14)
    tx = sparse_optax.rigl(SGD, dense_until=UNTIL, **CYCLES)
    grown = [
        sum(int(n) for n in jax.tree.leaves(state.grown))
        for *_, state in steps_of(tx, params, gradients)
    ]
    moved = [t for t in range(1, 14) if grown[t] != grown[t - 1]]
    assert grown[: UNTIL + 1] == [0] * (UNTIL + 1)
    # Counts of finished updates at which a cycle is due; at 9 the rate is lower.
    assert moved == [6, 9]
    removed = [
        [int(n) for n in jax.tree.leaves(state.removed)]
        for *_, state in steps_of(tx, params, gradients)
    ]
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    assert removed[UNTIL] == [
        n - c for n, c in zip(sizes, final_counts(params), strict=True)
    ]


@pytest.mark.parametrize("until", [3, 6])
def test_a_cut_at_a_multiple_of_the_period_is_a_cut_alone(until):
    params = network(SHAPES)
    gradients = random_gradients(1, params, until + 1)
    tx = sparse_optax.sparse_evolutionary(SGD, dense_until=until, **CYCLES)
    *_, (before, _, state) = steps_of(tx, params, gradients)
    full = [np.ones_like(m) for m in kept(state)]
    wanted = oracle.largest(kernels(before), full, final_counts(params))
    for got, right in zip(kept(state), wanted, strict=True):
        np.testing.assert_array_equal(got, right)
    assert not any(int(n) for n in jax.tree.leaves(state.grown))


def test_after_the_cut_it_is_the_method_with_these_masks():
    """Cycles of RigL after the cut equal those of RigL that starts with the masks."""
    params = network(SHAPES)
    gradients = random_gradients(1, params, 12)
    tx = sparse_optax.rigl(SGD, prune_rate=0.4, dense_until=UNTIL, **CYCLES)
    states = list(steps_of(tx, params, gradients))
    _, cut_params, cut_state = states[UNTIL]
    plain = sparse_optax.rigl(SGD, prune_rate=0.4, **CYCLES)
    state = plain.init(params)._replace(
        count=cut_state.count, regrow_masks=cut_state.regrow_masks
    )
    step = stepper(plain)
    for t in range(UNTIL + 1, 12):
        cut_params, state = step(cut_params, state, at_step(gradients, t))
        for a, b in zip(kernels(cut_params), kernels(states[t][1]), strict=True):
            np.testing.assert_array_equal(a, b)


def test_members_of_an_ensemble_are_cut_by_their_own_weights_at_their_own_step():
    single = [network(SHAPES), jax.tree.map(lambda p: p[::-1] * 2, network(SHAPES))]
    gradients = random_gradients(1, single[0], 10)

    def run(until, params):
        tx = sparse_optax.rigl(SGD, dense_until=until, **CYCLES)

        def body(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(body, (params, tx.init(params)), gradients)
        return params, state.regrow_masks

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *single)
    after, masks = jax.jit(jax.vmap(run))(jnp.array([2, 7]), stacked)
    for i, until in enumerate((2, 7)):
        alone, own = jax.jit(run, static_argnums=0)(until, single[i])
        for a, b in zip(jax.tree.leaves(masks), jax.tree.leaves(own), strict=True):
            np.testing.assert_array_equal(a[i], b)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-6)


def test_numbers_that_are_not_finite_delay_the_cut_to_the_next_cycle():
    """RigL reads the gradient. The weights stay finite: the NaN is set to zero."""
    params = network(SHAPES)
    gradients = random_gradients(1, params, 8)
    broken = gradients["Dense_0"]["kernel"].at[UNTIL, 0, 0].set(jnp.nan)
    gradients["Dense_0"]["kernel"] = broken
    inner = optax.chain(optax.zero_nans(), SGD)
    tx = sparse_optax.rigl(inner, dense_until=UNTIL, **CYCLES)
    counts = [
        sum(int(m.sum()) for m in kept(state))
        for *_, state in steps_of(tx, params, gradients)
    ]
    size, few = sum(int(np.prod(s)) for s in SHAPES), sum(final_counts(params))
    assert counts == [size] * 6 + [few] * 2  # the cycle after 6 updates


def test_what_is_explored_counts_from_the_cut_on():
    """Else all weights had been active, and none would be preferred."""
    params = network(SHAPES)
    gradients = random_gradients(1, params, 10)
    tx = sparse_optax.in_time_over_parameterization(SGD, dense_until=UNTIL, **CYCLES)
    for t, (*_, state) in enumerate(steps_of(tx, params, gradients)):
        explored = sparse_optax.masks.get_explored(state)
        if t < UNTIL:
            assert sparse_optax.masks.density(explored) == 1.0
        if t == UNTIL:
            for a, b in zip(jax.tree.leaves(explored), kept(state), strict=True):
                np.testing.assert_array_equal(a, b)
    few = sparse_optax.masks.density(sparse_optax.get_masks(state))
    assert few < sparse_optax.masks.density(explored) < 1.0


@pytest.mark.parametrize(
    "pattern", [patterns.n_m(1, 4), patterns.output_units(), patterns.blocks(2, 2)]
)
def test_the_cut_follows_a_pattern(pattern):
    shapes = ((8, 8), (8, 4))
    params = network(shapes)
    gradients = random_gradients(1, params, 9)
    settings = {**CYCLES, "density": None if pattern.density else 0.5}
    tx = sparse_optax.rigl(SGD, dense_until=UNTIL, pattern=pattern, **settings)
    for t, (*_, state) in enumerate(steps_of(tx, params, gradients)):
        for m in kept(state):
            assert m.all() if t < UNTIL else m.mean() == (pattern.density or 0.5)
            assert bool(pattern.follows(jnp.asarray(m))) or t < UNTIL


def test_the_cut_is_that_of_a_prune_rule_that_meets_a_number():
    """Global magnitude keeps the budget's total in one pool; random keeps any."""
    params = network(SHAPES)
    gradients = random_gradients(1, params, UNTIL + 1)

    def masks_after(rule):
        tx = sparse_optax.sparse_momentum_regrow(
            SGD, prune=rule, dense_until=UNTIL, **CYCLES
        )
        *_, (before, _, state) = steps_of(tx, params, gradients)
        return kernels(before), kept(state)

    counts = final_counts(params)
    weights, masks = masks_after(prune.global_magnitude)
    full = [np.ones_like(m) for m in masks]
    lost = sum(m.size for m in masks) - sum(counts)
    for got, right in zip(masks, oracle.global_prune(weights, full, lost), strict=True):
        np.testing.assert_array_equal(got, right)
    weights, masks = masks_after(prune.random)
    assert [int(m.sum()) for m in masks] == counts
    largest = oracle.largest(weights, full, counts)
    assert any((a != b).any() for a, b in zip(masks, largest, strict=True))


def test_stacked_layers_are_cut_one_by_one():
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 6, 5)))}
    tx = sparse_optax.rigl(
        SGD, density=0.2, update_period=2, update_stop=9, dense_until=1, key=0,
        stacked={"w": 0},
    )  # fmt: skip
    gradients = random_gradients(1, params, 2)
    *_, (before, _, state) = steps_of(tx, params, gradients)
    (mask,), w = kept(state), np.asarray(before["w"])
    for got, right in zip(
        mask, oracle.largest(w, [np.ones((6, 5), bool)] * 3, [6] * 3), strict=True
    ):
        np.testing.assert_array_equal(got, right)


def test_wrong_arguments():
    def made(**other):
        return sparse_optax.rigl(SGD, **{**CYCLES, **other})

    with refuses("rigl", "dense_until", "0", "at least 1"):
        made(dense_until=0)
    with refuses("rigl", "dense_until", "12", "update_stop=12"):
        made(dense_until=12)
    with refuses("rigl", "dense_until", "9", "update_stop=12"):
        made(dense_until=9)  # the last cycle is at 9
    made(dense_until=8)
    full = {"w": jnp.ones((3, 4), bool)}
    with refuses("rigl", "dense_until", "2", "None beside `masks`"):
        made(dense_until=2, masks=full)
    with refuses("regrow", "dense_until", "2", "None beside `ramp`"):
        regrowth.regrow(
            SGD,
            density=0.5,
            prune=prune.magnitude,
            redistribute=redistribute.none,
            grow=grow.gradient,
            update_period=2,
            update_stop=9,
            key=0,
            ramp=schedules.cubic_density(1.0, 0.5, 0, 8),
            dense_until=2,
        )
