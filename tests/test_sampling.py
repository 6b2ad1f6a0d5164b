"""Weights that are drawn: sparse variational dropout and L0, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import network, refuses

import sparse_optax
from sparse_optax import masks, patterns

SHAPES = ((6, 5), (5, 4))
N, RATE = 40, 0.1
K1, K2, K3 = 0.63576, 1.87320, 1.48695
BETA, LOW, HIGH = 2 / 3, -0.1, 1.1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def dropout(inner=None, **options):
    inner = optax.sgd(RATE) if inner is None else inner
    options = {"examples": N, "log_variance": -1.0, "key": 3} | options
    return sparse_optax.sparse_variational_dropout(inner, **options)


def gates(inner=None, **options):
    inner = optax.sgd(RATE) if inner is None else inner
    options = {"examples": N, "strength": 0.5, "key": 3} | options
    return sparse_optax.l0_regularization(inner, **options)


MAKE = {"dropout": dropout, "gates": gates}
FIELD = {"dropout": "log_variance", "gates": "log_open"}
SLOPES = jax.tree.map(
    lambda x: jnp.float32(np.random.default_rng(5).normal(size=x.shape)),
    network(SHAPES),
)


def gradient(params, state):
    """Of a loss that is linear in the drawn weights, with the slopes above."""

    def loss(params):
        drawn = sparse_optax.sample_weights(params, state)
        return sum(
            jnp.vdot(c, w)
            for c, w in zip(
                jax.tree.leaves(SLOPES), jax.tree.leaves(drawn), strict=True
            )
        )

    return jax.grad(loss)(params)


def step(tx, params, state):
    updates, state = tx.update(gradient(params, state), state, params)
    return optax.apply_updates(params, updates), state


def wide(tree, name):
    return np.asarray(tree[name]["kernel"], np.float64)


# --- sparse variational dropout -------------------------------------------------------


def np_divergence(theta, log_variance):
    ratio = np.clip(log_variance - np.log(theta**2), -8, 8)
    return (K1 - K1 * sigmoid(K2 + K3 * ratio) + 0.5 * np.log1p(np.exp(-ratio))).sum()


def differences(function, x, step=1e-6):
    out = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        sides = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            sides.append(function(moved))
        out[place] = (sides[0] - sides[1]) / (2 * step)
    return out


@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_a_step_of_variational_dropout(strength):
    params, tx = network(SHAPES), dropout(strength=strength)
    state = tx.init(params)
    # Some far from others, and beyond the ends of log alpha.
    logs = {
        n: jnp.linspace(-12.0, 9.0, w.size).reshape(w.shape)
        for n in params
        for w in [params[n]["kernel"]]
    }
    tree = {n: {"bias": optax.MaskedNode(), "kernel": logs[n]} for n in params}
    state = state._replace(log_variance=tree)
    drawn = sparse_optax.sample_weights(params, state)
    after, new = jax.jit(lambda p, s: step(tx, p, s))(params, state)
    for n in params:
        theta, log = wide(params, n), np.asarray(logs[n], np.float64)
        sigma = np.exp(log / 2)
        noise = (wide(drawn, n) - theta) / sigma
        g = wide(SLOPES, n)
        by_theta = differences(lambda x, log=log: np_divergence(x, log), theta)
        by_log = differences(lambda x, theta=theta: np_divergence(theta, x), log)
        theta = theta - RATE * (g + strength / N * by_theta)
        log = log - RATE * (g * noise * sigma / 2 + strength / N * by_log)
        np.testing.assert_allclose(wide(after, n), theta, rtol=1e-4, atol=1e-5)
        got = np.asarray(new.log_variance[n]["kernel"])
        np.testing.assert_allclose(got, log, rtol=1e-4, atol=3e-5)
        bias = params[n]["bias"] - RATE * SLOPES[n]["bias"]
        np.testing.assert_allclose(after[n]["bias"], bias, rtol=1e-6)
        np.testing.assert_array_equal(drawn[n]["bias"], params[n]["bias"])
    assert int(new.count) == 1


def test_noise_is_normal_new_in_each_step_and_another_for_each_leaf():
    params = {"v": jnp.zeros((40, 50)), "w": jnp.zeros((40, 50))}
    tx = dropout(log_variance=0.0)
    state = tx.init(params)
    one = sparse_optax.sample_weights(params, state)
    same = sparse_optax.sample_weights(params, state)
    np.testing.assert_array_equal(one["w"], same["w"])
    _, later = tx.update(params, state, params)
    assert int(later.count) == 1
    later = later._replace(log_variance=state.log_variance)
    two = sparse_optax.sample_weights(params, later)
    other = sparse_optax.sample_weights(params, state, key=8)
    drawn = [one["v"], one["w"], two["w"], other["w"]]
    table = np.corrcoef([np.ravel(x) for x in drawn])
    assert np.abs(table - np.eye(4)).max() < 0.1
    for x in drawn:
        assert abs(float(x.mean())) < 0.1
        assert abs(float(x.std()) - 1) < 0.05
        assert abs(float((np.abs(x) > 1).mean()) - 0.317) < 0.04


def test_final_weights_of_variational_dropout():
    params, tx = network(SHAPES), dropout(log_variance=0.0)
    state = tx.init(params)
    final = sparse_optax.final_weights(params, state)
    for n in params:
        theta = wide(params, n)
        stays = -np.log(theta**2) <= 3  # log alpha
        np.testing.assert_array_equal(final[n]["kernel"], np.where(stays, theta, 0))
        assert 0 < stays.sum()
        np.testing.assert_array_equal(final[n]["bias"], params[n]["bias"])
    cut = sparse_optax.final_weights(params, state, 0.2)
    largest = masks.magnitude_masks(params, 0.2)  # all have the same variance
    for n in params:
        want = np.where(largest[n]["kernel"], params[n]["kernel"], 0)
        np.testing.assert_array_equal(cut[n]["kernel"], want)


# --- L0 -------------------------------------------------------------------------------


def test_a_step_of_l0():
    params, tx = network(SHAPES), gates()
    state = tx.init(params)
    logs = {
        n: jnp.linspace(-2.5, 2.5, w.size).reshape(w.shape)
        for n in params
        for w in [params[n]["kernel"]]
    }
    tree = {n: {"bias": optax.MaskedNode(), "kernel": logs[n]} for n in params}
    state = state._replace(log_open=tree)
    drawn = sparse_optax.sample_weights(params, state)
    after, new = jax.jit(lambda p, s: step(tx, p, s))(params, state)
    moved = 0
    for n in params:
        w, log = wide(params, n), np.asarray(logs[n], np.float64)
        z = wide(drawn, n) / w
        assert z.min() >= 0
        assert z.max() <= 1 + 1e-6
        s = (z - LOW) / (HIGH - LOW)
        inside = (z > 0) & (z < 1 - 1e-6)
        by_gate = np.where(inside, (HIGH - LOW) * s * (1 - s) / BETA, 0)
        g = wide(SLOPES, n)
        open_ = lambda x: sigmoid(x - BETA * np.log(-LOW / HIGH)).sum()  # noqa: E731
        by_log = g * w * by_gate + 0.5 / N * differences(open_, log)
        log = np.clip(log - RATE * by_log, np.log(1e-2), np.log(1e2))
        np.testing.assert_allclose(wide(after, n), w - RATE * g * z, rtol=1e-4)
        got = np.asarray(new.log_open[n]["kernel"])
        np.testing.assert_allclose(got, log, rtol=1e-3, atol=1e-4)
        moved += inside.sum()
    assert 5 < moved < 45  # gates of all three kinds


def test_gates_have_the_distribution_of_the_paper():
    params, tx = {"w": jnp.ones((200, 200))}, gates(dropout=0.3)
    state = tx.init(params)
    log = np.log(0.7 / 0.3)
    np.testing.assert_allclose(state.log_open["w"], log, rtol=1e-6)
    z = np.asarray(sparse_optax.sample_weights(params, state)["w"])
    for x in (0.0, 0.25, 0.5, 0.9):  # P(z <= x)
        s = (x - LOW) / (HIGH - LOW)
        want = sigmoid(BETA * np.log(s / (1 - s)) - log)
        assert abs((z <= x).mean() - want) < 0.01
    s = (1 - LOW) / (HIGH - LOW)
    assert abs((z == 1).mean() - (1 - sigmoid(BETA * np.log(s / (1 - s)) - log))) < 0.01


def test_final_weights_of_l0():
    params, tx = network(SHAPES), gates()
    logs = {
        n: jnp.linspace(-4.0, 4.0, w.size).reshape(w.shape)
        for n in params
        for w in [params[n]["kernel"]]
    }
    tree = {n: {"bias": optax.MaskedNode(), "kernel": logs[n]} for n in params}
    state = tx.init(params)._replace(log_open=tree)
    final = sparse_optax.final_weights(params, state)
    cut = sparse_optax.final_weights(params, state, 0.2)
    count = 0
    for n in params:
        gate = np.clip(sigmoid(np.float64(logs[n])) * (HIGH - LOW) + LOW, 0, 1)
        want = wide(params, n) * gate
        np.testing.assert_allclose(final[n]["kernel"], want, rtol=1e-5, atol=1e-6)
        assert (np.asarray(final[n]["kernel"])[gate == 0] == 0).all()
        kept = np.asarray(cut[n]["kernel"]) != 0
        np.testing.assert_array_equal(
            np.asarray(cut[n]["kernel"])[kept], np.asarray(final[n]["kernel"])[kept]
        )
        count += kept.sum()
    assert count == 10


def test_units_share_a_gate():
    params = network(SHAPES)
    tx = gates(pattern=patterns.output_units(axis=0))  # inputs of (in, out)
    state = tx.init(params)
    shapes = [state.log_open[n]["kernel"].shape for n in sorted(params)]
    assert shapes == [(6, 1), (5, 1)]
    drawn = sparse_optax.sample_weights(params, state)
    _, new = step(tx, params, state)
    for n in params:
        w = wide(params, n)
        z = (wide(drawn, n) / w).mean(1, keepdims=True)
        np.testing.assert_allclose(wide(drawn, n), w * z, rtol=1e-5)
        s = (z - LOW) / (HIGH - LOW)
        inside = (z > 0) & (z < 1 - 1e-6)
        by_gate = np.where(inside, (HIGH - LOW) * s * (1 - s) / BETA, 0)
        p = sigmoid(-BETA * np.log(-LOW / HIGH))
        slope = (wide(SLOPES, n) * w).sum(1, keepdims=True) * by_gate
        slope += 0.5 / N * w.shape[1] * p * (1 - p)  # a gate counts for its weights
        got = np.asarray(new.log_open[n]["kernel"])
        np.testing.assert_allclose(got, -RATE * slope, rtol=1e-3, atol=1e-5)


def test_a_strength_for_each_layer():
    params = network(SHAPES)
    tx = gates(strength={"Dense_0/kernel": 0.0, "Dense_1/kernel": 2.0})
    state = tx.init(params)
    still = jax.tree.map(jnp.zeros_like, params)
    _, new = tx.update(still, state, params)
    np.testing.assert_array_equal(new.log_open["Dense_0"]["kernel"], 0)
    assert (np.asarray(new.log_open["Dense_1"]["kernel"]) < 0).all()


# --- both -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKE)
def test_micro_batches_have_the_same_noise(name):
    """Their gradients are added up, and so must be those of one draw."""
    params = network(SHAPES)
    tx = optax.MultiSteps(MAKE[name](), 2)
    state = tx.init(params)
    first = sparse_optax.sample_weights(params, state)
    same, state = step(tx, params, state)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    second = sparse_optax.sample_weights(same, state)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    after, state = step(tx, same, state)
    third = sparse_optax.sample_weights(params, state)
    assert (third["Dense_0"]["kernel"] != first["Dense_0"]["kernel"]).any()
    plain = MAKE[name]()
    want, _ = step(plain, params, plain.init(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, want
    )


@pytest.mark.parametrize("name", MAKE)
def test_states_keep_shapes_and_dtypes_under_halves_and_jit(name):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network(SHAPES))
    tx = optax.chain(optax.clip_by_global_norm(5.0), MAKE[name](optax.adam(1e-2)))
    state = tx.init(params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), (params, state))
    jitted = jax.jit(lambda p, s: step(tx, p, s))
    for _ in range(3):
        params, state = jitted(params, state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), (params, state)) == before
    assert jitted._cache_size() == 1
    drawn = sparse_optax.sample_weights(params, state)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(drawn))


@pytest.mark.parametrize("name", MAKE)
def test_members_draw_their_own(name):
    params = network(SHAPES)

    def first(key):
        state = MAKE[name](key=key).init(params)
        return sparse_optax.sample_weights(params, state)["Dense_0"]["kernel"]

    own = jax.vmap(first)(jax.random.split(jax.random.key(0), 2))
    assert (own[0] != own[1]).any()


def test_nnx_and_chosen_leaves():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(5, 2, rngs=nnx.Rngs(1))

    params = nnx.state(Net(), nnx.Param)
    tx = dropout(where=lambda name, leaf: name == "a/kernel")
    state = tx.init(params)
    drawn = sparse_optax.sample_weights(params, state)
    assert jax.tree.structure(drawn) == jax.tree.structure(params)
    assert (drawn["a"]["kernel"][...] != params["a"]["kernel"][...]).any()
    np.testing.assert_array_equal(drawn["b"]["kernel"][...], params["b"]["kernel"][...])
    updates, state = tx.update(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("name", "options", "argument", "value", "allowed"),
    [
        ("dropout", {"inner": "adam"}, "inner", "adam", "GradientTransformation"),
        ("dropout", {"examples": 0}, "examples", "0", "at least 1"),
        ("dropout", {"strength": -1.0}, "strength", "-1.0", "at least 0"),
        ("dropout", {"log_variance": np.inf}, "log_variance", "inf", "finite"),
        ("dropout", {"key": None}, "key", "None", "seed"),
        ("gates", {"strength": {"w": -1.0}}, "strength", "-1.0", "at least 0"),
        ("gates", {"dropout": 1.0}, "dropout", "1.0", r"\(0, 1\)"),
        ("gates", {"pattern": 3}, "pattern", "3", "patterns"),
        ("gates", {"strength": {"w": 1.0}}, "strength", "'w'", "Dense_0/kernel"),
        ("gates", {"pattern": patterns.blocks(1, 2)}, "pattern", "blocks", "whole"),
        (
            "gates",
            {"pattern": patterns.n_m(1, 2, axis=-1)},
            "pattern",
            "n_m",
            "whole",
        ),
    ],
)
def test_wrong_input(name, options, argument, value, allowed):
    shapes = ((10, 10), (10, 4)) if "pattern" in options else SHAPES
    function = {"dropout": "sparse_variational_dropout", "gates": "l0_regularization"}
    with refuses(function[name], argument, value, allowed):
        MAKE[name](**options).init(network(shapes))


def test_wrong_trees():
    params, tx = network(SHAPES), dropout()
    state = tx.init(params)
    with refuses("sparse_variational_dropout", "params", "None"):
        tx.update(params, state)
    part = {"Dense_0": params["Dense_0"]}
    with refuses("sparse_variational_dropout", "params", "Dense_1"):
        tx.update(part, state, part)
    for call in (sparse_optax.sample_weights, sparse_optax.final_weights):
        with refuses(call.__name__, "opt_state", "EmptyState", "l0_regularization"):
            call(params, optax.EmptyState())
        with refuses(call.__name__, "params", "Dense_1", "Dense_0"):
            call(part, state)
    with refuses("sample_weights", "key", "1.5", "seed"):
        sparse_optax.sample_weights(params, state, 1.5)
    with refuses("final_weights", "density", "2.0", r"\(0, 1\]"):
        sparse_optax.final_weights(params, state, 2.0)
