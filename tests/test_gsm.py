"""GSM: what passes, the whole optimizer against its definition, and its tools."""

import functools
import math
from typing import Any

import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from flax import nnx
from helpers import at_step, kernels, network, random_gradients, refuses, stepper

import sparse_optax
from sparse_optax import budgets, gsm, gsm_gap, gsm_log_decay, gsm_mask

pytestmark = pytest.mark.core

SHAPES = ((8, 6), (6, 5))
N = 78


def _passing(tx, grads, params):
    """The gradients of the kernels after one update."""
    updates, _ = tx.update(grads, tx.init(params), params)
    return [np.array(k) for k in kernels(updates)]


# --- what passes ----------------------------------------------------------------------


@functools.cache
def _compiled_mask(density, shapes):
    tx = gsm_mask(density)
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])


@st.composite
def _cases(draw):
    shapes = draw(st.sampled_from([((1, 1),), ((3, 4),), SHAPES]))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kinds = {
        "normal": rng.normal,
        "ties": lambda size: rng.integers(-2, 3, size),
        "zeros": lambda size: rng.normal(size=size) * (rng.random(size) < 0.1),
        "equal": np.ones,
    }
    values = []
    for _ in ("gradient", "weight"):
        kind = kinds[draw(st.sampled_from(sorted(kinds)))]
        values.append(
            [
                np.float32(kind(size=s) if kind is not np.ones else np.ones(s))
                for s in shapes
            ]
        )
    size = sum(int(np.prod(s)) for s in shapes)
    share = draw(st.sampled_from([0.02, 0.25, 0.5, 1.0]))
    return shapes, *values, max(share, 1 / size)


@hypothesis.settings(max_examples=60)
@hypothesis.given(_cases())
def test_the_largest_products_pass(case):
    shapes, grads, weights, density = case
    q = sparse_optax.budgets.count(density, sum(g.size for g in grads))
    params = network(shapes, weights)
    updates = _compiled_mask(density, shapes)(network(shapes, grads), params)
    passing = oracles.gsm_pass(grads, weights, q)
    for got, g, b in zip(kernels(updates), grads, passing, strict=True):
        np.testing.assert_array_equal(got, np.where(b, g, 0))
    for name, layer in network(shapes, grads).items():
        np.testing.assert_array_equal(updates[name]["bias"], layer["bias"])


def test_at_most_q_pass_where_all_products_tie():
    params = network(SHAPES, [np.ones(s) for s in SHAPES])
    got = _passing(gsm_mask(0.25), params, params)
    flat = np.concatenate([g.ravel() for g in got])
    np.testing.assert_array_equal(flat, np.arange(N) < 19)


def test_ties_as_in_the_paper():
    """The paper's `>=` lets every weight pass that equals the Q-th greatest."""
    params = network(SHAPES, [np.ones(s) for s in SHAPES])
    got = _passing(gsm_mask(0.25, ties="paper"), params, params)
    assert sum((g != 0).sum() for g in got) == N


@pytest.mark.parametrize("ties", ["exact", "paper"])
def test_zero_products_never_pass_below_full_density(ties):
    weights = [np.ones(s) for s in SHAPES]
    weights[0][:, 1:] = 0
    weights[1][:] = 0
    params = network(SHAPES, weights)
    ones = network(SHAPES, [np.ones(s) for s in SHAPES])
    got = _passing(gsm_mask(0.5, ties=ties), ones, params)
    assert sum(g.sum() for g in got) == 8
    np.testing.assert_array_equal(got[0][:, 0], 1.0)


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_the_papers_rule_lets_no_fewer_pass_in_float64(scale):
    """Scores that a float32 would round below the bound, or to nothing."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        weights, grads = (
            {"w": {"kernel": jnp.asarray(scale * rng.standard_normal((40, 50)))}}
            for _ in range(2)
        )
        for density in (0.05, 0.5):
            tx = gsm_mask(density, ties="paper")
            updates, state = tx.update(grads, tx.init(weights), weights)
            passed = int((updates["w"]["kernel"] != 0).sum())
            assert passed == density * 2000 == int(state.gsm_passed["w"]["kernel"])


def test_full_density_passes_zero_products():
    params = network(SHAPES, [np.zeros(s) for s in SHAPES])
    ones = network(SHAPES, [np.ones(s) for s in SHAPES])
    got = _passing(gsm_mask(1.0), ones, params)
    assert sum(g.sum() for g in got) == N


@pytest.mark.parametrize("ties", ["exact", "paper"])
@pytest.mark.parametrize("broken", ["gradient", "weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_gradients_surface(broken, value, ties):
    """NaN ranks highest; an infinite weight times a zero gradient is NaN too."""
    params = network(SHAPES)
    grads = network(SHAPES)
    tree = grads if broken == "gradient" else params
    kernel = tree["Dense_1"]["kernel"].at[2, 3].set(value)
    tree["Dense_1"]["kernel"] = kernel
    if broken == "weight":
        grads["Dense_1"]["kernel"] = grads["Dense_1"]["kernel"].at[2, 3].set(0.0)
    got = _passing(gsm_mask(1 / N, ties=ties), grads, params)
    if broken == "gradient":
        np.testing.assert_array_equal(got[1][2, 3], value)
    # The one place is taken by the broken product.
    got[1][2, 3] = 0
    assert sum((g != 0).sum() for g in got) == 0


def test_many_nans_pass_at_most_q():
    grads = network(SHAPES, [np.full(s, np.nan) for s in SHAPES])
    got = _passing(gsm_mask(0.5), grads, network(SHAPES))
    assert sum(np.isnan(g).sum() for g in got) == N // 2


def test_bfloat16_products_are_ranked_in_float32():
    """1.0078125 * 1.0078125 and 1.015625 * 1 are one number in bfloat16."""
    params = {"w": jnp.array([[1.015625, 1.0078125]], jnp.bfloat16)}
    grads = {"w": jnp.array([[1.0, 1.0078125]], jnp.bfloat16)}
    tx = gsm_mask(0.5)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(updates["w"]), [[0.0, 1.0078125]])


def test_density_as_a_schedule():
    """The schedule is read at the count of finished updates."""
    densities = jnp.array([1.0, 0.5, 0.25, 1 / N])
    tx, params = gsm_mask(lambda count: densities[count]), network(SHAPES)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for passed in (78, 39, 19, 1):
        updates, state = update(params, state, params)
        assert sum((g != 0).sum() for g in kernels(updates)) == passed


def test_injected_density():
    make = optax.inject_hyperparams(gsm_mask, hyperparam_dtype=jnp.float32)
    tx, params = make(density=0.25), network(SHAPES)
    state = tx.init(params)
    update = jax.jit(tx.update)
    updates, state = update(params, state, params)
    assert sum((g != 0).sum() for g in kernels(updates)) == 19
    state.hyperparams["density"] = jnp.float32(0.5)
    updates, _ = update(params, state, params)
    assert sum((g != 0).sum() for g in kernels(updates)) == 39


def test_vmap_over_densities():
    params = network(SHAPES)

    def passed(density):
        tx = gsm_mask(lambda count: density)
        updates, _ = tx.update(params, tx.init(params), params)
        return [jnp.sum(layer["kernel"] != 0) for layer in updates.values()]

    counts = jax.jit(jax.vmap(passed))(jnp.array([0.25, 0.5, 1.0]))
    np.testing.assert_array_equal(sum(counts), [19, 39, 78])


def test_without_reselection_the_first_mask_stays():
    tx, params = gsm_mask(0.25, reselect=False), network(SHAPES)
    grads = random_gradients(0, params, 3)
    state, seen = tx.init(params), []
    for t in range(3):
        updates, state = jax.jit(tx.update)(at_step(grads, t), state, params)
        seen.append([u != 0 for u in kernels(updates)])
    wanted = oracles.gsm_pass(kernels(at_step(grads, 0)), kernels(params), 19)
    for masks in seen:
        for a, b in zip(masks, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_embeddings_and_biases_pass_untouched():
    """A row absent from the batch has no gradient and would only decay."""
    params = {
        "Embed_0": {"embedding": jnp.ones((10, 4))},
        "Dense_0": {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)},
    }
    tx = gsm_mask(0.2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert int(updates["Embed_0"]["embedding"].sum()) == 40
    assert int(updates["Dense_0"]["bias"].sum()) == 5
    assert int(updates["Dense_0"]["kernel"].sum()) == 4


def test_stacked_leaves_are_one_pool():
    """GSM ranks the whole network: a scanned leaf changes nothing."""
    a, b = (np.random.default_rng(i).normal(size=(4, 3)) for i in (0, 1))
    apart = {"a": {"kernel": jnp.asarray(a)}, "b": {"kernel": jnp.asarray(b)}}
    together = {"ab": {"kernel": jnp.stack([jnp.asarray(a), jnp.asarray(b)])}}
    tx = gsm_mask(0.3)
    one, _ = tx.update(apart, tx.init(apart), apart)
    two, _ = gsm_mask(0.3, stacked={"ab/kernel": 0}).update(
        together, gsm_mask(0.3, stacked={"ab/kernel": 0}).init(together), together
    )
    np.testing.assert_array_equal(
        jnp.stack([one["a"]["kernel"], one["b"]["kernel"]]), two["ab"]["kernel"]
    )


def test_none_leaves_and_empty_trees():
    params = {"kernel": jnp.ones((4, 5)), "bias": None}
    tx = gsm_mask(0.2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["bias"] is None
    assert int(updates["kernel"].sum()) == 4
    for empty in ({}, (), {"a": None}):
        updates, _ = tx.update(empty, tx.init(empty), empty)
        assert updates == empty


# --- the whole optimizer against its definition ---------------------------------------

LR, BETA, ETA, STEPS = 0.05, 0.95, 1e-2, 50


def _gradient(t, arrays):
    """Gradients that depend on the step and on where the arrays stand."""
    rng = np.random.default_rng(t)
    return [rng.normal(size=a.shape) + 0.3 * np.asarray(a, np.float64) for a in arrays]


def _both(tx, oracle, check_masks=True):
    params = network(SHAPES)
    step, state = stepper(tx), tx.init(params)
    for t, (weights, biases, _) in enumerate(oracle):
        names = sorted(params)
        arrays = [*kernels(params), *(np.asarray(params[n]["bias"]) for n in names)]
        flat = [jnp.asarray(g, jnp.float32) for g in _gradient(t, arrays)]
        half = len(names)
        grads = {
            n: {"kernel": flat[i], "bias": flat[half + i]} for i, n in enumerate(names)
        }
        params, state = step(params, state, grads)
        for n, w, b in zip(names, weights, biases, strict=True):
            for got, wanted in ((params[n]["kernel"], w), (params[n]["bias"], b)):
                np.testing.assert_allclose(
                    got, wanted, rtol=2e-4, atol=1e-5, err_msg=f"step {t + 1}"
                )


def _oracle(nesterov, **kwargs):
    params = network(SHAPES)
    settings = dict(steps=STEPS, q=19, beta=BETA, eta=ETA, lr=lambda t: LR)
    return oracles.train_gsm(
        [k.astype(np.float64) for k in kernels(params)],
        [np.float64(params[n]["bias"]) for n in sorted(params)],
        _gradient,
        nesterov=nesterov,
        **(settings | kwargs),
    )


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_chain_is_gsm(nesterov):
    tx = optax.chain(
        gsm_mask(0.25),
        optax.add_decayed_weights(ETA, mask=sparse_optax.eligible),
        optax.sgd(LR, momentum=BETA, nesterov=nesterov),
    )
    _both(tx, _oracle(nesterov))


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_ready_made_optimizer_is_gsm(nesterov):
    tx = gsm(LR, 0.25, momentum=BETA, nesterov=nesterov, weight_decay=ETA)
    _both(tx, _oracle(nesterov))


def test_ready_made_with_a_schedule_and_a_gate():
    """`gate` is the fraction that passes; the learning rate follows its schedule."""
    rate = lambda t: LR / (1 + t)  # noqa: E731
    tx = gsm(rate, 0.25, momentum=BETA, nesterov=True, weight_decay=ETA, gate=0.1)
    _both(tx, _oracle(True, q=7, lr=rate))


def test_ready_made_that_settles():
    """From `settle_start` on exactly the Q largest weights of that step pass."""
    tx = gsm(LR, 0.25, momentum=BETA, nesterov=True, weight_decay=ETA, settle_start=30)
    _both(tx, _oracle(True, settle_start=(30, 19)))


def test_a_settled_run_with_a_gate_keeps_the_density():
    tx = gsm(
        LR,
        0.25,
        momentum=BETA,
        nesterov=True,
        weight_decay=ETA,
        gate=0.1,
        settle_start=30,
    )
    _both(tx, _oracle(True, q=7, settle_start=(30, 19)))


def test_scan_equals_jit():
    tx = gsm(LR, 0.25, momentum=BETA, weight_decay=ETA)
    params = network(SHAPES)
    grads = random_gradients(0, params, 5)
    step, looped, state = stepper(tx), params, tx.init(params)
    for t in range(5):
        looped, state = step(looped, state, at_step(grads, t))

    def body(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, grads))(
        (params, tx.init(params))
    )
    for a, b in zip(kernels(looped), kernels(scanned), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_no_retrace():
    traces = []
    tx, params = gsm(LR, 0.25, settle_start=2), network(SHAPES)

    @jax.jit
    def step(params, state):
        traces.append(0)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    assert len(traces) == 1


# --- log decay and gap ----------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("lr", "beta", "eta", "steps"),
    [
        (5e-3, 0.98, 5e-4, 20_000),
        (1e-2, 0.99, 5e-4, 5_000),
        (5e-3, 0.9, 5e-4, 20_000),
        (5e-2, 0.0, 1e-2, 1_000),
        (1e-2, 0.99, 5e-4, 10),
    ],
)
def test_log_decay_of_a_passive_weight(lr, beta, eta, steps, nesterov):
    simulated = oracles.passive_log_decay(lr, beta, eta, steps, nesterov=nesterov)
    got = gsm_log_decay(lr, beta, eta, steps, nesterov=nesterov)
    assert math.isclose(got, simulated, rel_tol=1e-4), (got, simulated)


@pytest.mark.parametrize("nesterov", [True, False])
def test_log_decay_over_a_schedule(nesterov):
    """The schedule of the released code for LeNet, 280 epochs of 234 steps.

    To first order, lr * eta / (1 - beta) a step, its decay is 19.2; the exact one
    is a little more.
    """
    drops = {epoch * 234: 0.1 for epoch in (160, 200, 240)}
    schedule = optax.piecewise_constant_schedule(1e-2, drops)
    rate = lambda t: 1e-2 * 0.1 ** sum(t >= at for at in drops)  # noqa: E731
    simulated = oracles.passive_log_decay(
        rate, 0.99, 5e-4, 280 * 234, nesterov=nesterov
    )
    assert 19.2 < simulated < 20.5
    got = gsm_log_decay(schedule, 0.99, 5e-4, 280 * 234, nesterov=nesterov)
    assert math.isclose(got, simulated, rel_tol=1e-4), (got, simulated)


def test_log_decay_decoupled():
    """AdamW divides nothing by 1 - beta: the sum of lr times weight decay."""
    simulated = oracles.passive_log_decay(
        1e-3, 0.9, 1e-1, 5_000, nesterov=False, decoupled=True
    )
    got = gsm_log_decay(1e-3, 0.9, 1e-1, 5_000, decoupled=True)
    assert math.isclose(got, simulated, rel_tol=1e-3)
    assert math.isclose(got, 5_000 * 1e-3 * 1e-1, rel_tol=1e-3)


def test_gap_counts_the_weights_alive():
    values = [np.zeros(s) for s in SHAPES]
    values[0].flat[:20] = np.arange(20, 0, -1)
    params = network(SHAPES, values)
    gap = gsm_gap(params, 0.25)
    assert (gap.alive, gap.kept) == (20, 19)
    assert math.isclose(gap.ratio, 1 / 2)
    assert gap.advice
    done = gsm_gap(params, 20 / N)
    assert (done.alive, done.kept, done.ratio) == (20, 20, 0.0)
    assert done.advice != gap.advice


_DECAY, _SGD = optax.add_decayed_weights(5e-2), optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("tx", "cause", "cure"),
    [
        (optax.chain(gsm_mask(0.2), _DECAY, _SGD), "4 updates were too few", "longer"),
        (gsm(0.1, 0.2), "4 updates were too few", "longer"),
        (
            optax.chain(_DECAY, _SGD, gsm_mask(0.2)),
            "stands behind the optimizer",
            "first in the chain",
        ),
        (
            optax.chain(_DECAY, optax.sgd(0.1), gsm_mask(0.2)),
            "stands last in its chain",
            "first in the chain",
        ),
        (
            optax.chain(_DECAY, optax.adam(1e-3), gsm_mask(0.2), optax.scale(1.0)),
            "stands behind the optimizer",
            "first in the chain",
        ),
        (
            optax.chain(gsm_mask(0.2), _DECAY, optax.adam(1e-3)),
            "behind Adam",
            "SGD with momentum",
        ),
    ],
    ids=["short", "gsm", "last", "last of plain SGD", "behind Adam", "before Adam"],
)
@pytest.mark.parametrize("wrapper", ["plain", "accumulated"])
def test_gap_names_the_likely_cause(tx, cause, cure, wrapper):
    params = network(SHAPES)
    if wrapper == "accumulated":
        tx = optax.MultiSteps(tx, 1).gradient_transformation()
    state, step = tx.init(params), stepper(tx)
    for _ in range(4):
        params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
    gap = gsm_gap(params, 0.2, state)
    assert cause in gap.advice
    assert cure in gap.advice
    # Without the state it names all of them, and how to tell them apart.
    blind = gsm_gap(params, 0.2).advice
    for words in ("first in the chain", "Adam", "too short", "opt_state"):
        assert words in blind


def test_gap_of_a_mask_that_rotates():
    """Most passive weights have decayed: another cause, another cure."""
    values = [np.full(s, 1e-6) for s in SHAPES]
    values[0].flat[:20] = np.arange(20, 0, -1)
    advice = gsm_gap(network(SHAPES, values), 0.2).advice
    assert "settle_start" in advice
    assert "too short" not in advice


def test_gap_of_a_network_that_is_not_finite():
    values = [np.zeros(s) for s in SHAPES]
    values[0][0, 0] = np.nan
    gap = gsm_gap(network(SHAPES, values), 0.25)
    assert gap.alive == 1
    assert "not finite" in gap.advice
    with pytest.raises(ValueError, match=r"^gsm_gap: `opt_state` holds no state of"):
        gsm_gap(network(SHAPES), 0.25, optax.adam(0.1).init(network(SHAPES)))


def test_gap_of_an_empty_network():
    """Zeros only: nothing alive, no division by zero."""
    gap = gsm_gap(network(SHAPES, [np.zeros(s) for s in SHAPES]), 0.25)
    assert (gap.alive, gap.kept) == (0, 19)
    assert not math.isnan(gap.ratio)


# --- counts that are callable, or in variables ----------------------------------------
class Callable(eqx.Module):
    """A module: a tree of counts in it is callable too."""

    kernel: Any
    bias: Any

    def __call__(self, x):
        raise AssertionError("a tree of counts is no schedule")


@pytest.mark.parametrize("make", [gsm_mask, functools.partial(gsm, 0.1)])
def test_counts_in_a_module_are_no_schedule(make):
    params = Callable(kernel=jnp.ones((6, 5)), bias=jnp.ones(5))
    counts = budgets.uniform(0.3).counts(params)
    assert callable(counts)
    tx = make(counts)
    _, state = tx.update(params, tx.init(params), params)
    assert int(optax.tree.get(state, "gsm_passed").kernel) == 9


class Schedule(eqx.Module):
    """A module that is a schedule, with a number of its own."""

    start: float

    def __call__(self, count):
        return self.start / (1.0 + count)


def test_a_module_may_be_a_schedule():
    params = {"kernel": jnp.ones((6, 5))}
    tx = gsm_mask(Schedule(0.3))
    _, state = tx.update(params, tx.init(params), params)
    assert int(state.gsm_passed["kernel"]) == 9


@pytest.mark.parametrize(
    "make",
    [
        lambda where: gsm(0.1, 0.5, where=where),
        lambda where: sparse_optax.ham(optax.sgd(0.1), 0.1, where=where),
    ],
)
def test_where_in_variables(make):
    """`flax.nnx` gives variables to ``init`` and plain arrays to ``update``."""
    plain = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((3, 2))}}
    chosen = {"a": {"kernel": True}, "b": {"kernel": False}}
    boxed = nnx.State(jax.tree.map(nnx.Param, chosen))
    wanted, _ = make(chosen).update(plain, make(chosen).init(plain), plain)
    tx = make(boxed)
    updates, _ = tx.update(plain, tx.init(plain), plain)
    for a, b in zip(*map(jax.tree.leaves, (updates, wanted)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_where_by_prefix_in_another_container():
    params = {"a": {"kernel": jnp.ones((4, 3))}, "b": {"kernel": jnp.ones((3, 2))}}
    where = nnx.State({"a": nnx.Param(True), "b": nnx.Param(False)})
    assert sparse_optax.eligible(params, where) == {
        "a": {"kernel": True},
        "b": {"kernel": False},
    }
    with refuses("eligible", "where", "", "structure"):
        sparse_optax.eligible(params, nnx.State({"a": nnx.Param(True)}))
