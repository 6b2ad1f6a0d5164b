"""What pushes weights towards zero: L1 decay and hyperbolic aware minimization."""

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import at_step, kernels, network, random_gradients, refuses, stepper

import sparse_optax
from sparse_optax import layers, masks, patterns

SHAPES = ((6, 5), (5, 4))
STEPS = 7


def array(tree):
    return jax.tree.map(np.asarray, tree)


# --- L1 -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduled", [False, True])
def test_l1_descends_the_penalised_loss(scheduled):
    """Namely w <- w - lr (g + lambda_t sign(w)), on every parameter."""
    at = lambda t: 0.03 / (1 + t)  # noqa: E731
    tx = optax.chain(
        sparse_optax.add_l1_decay(at if scheduled else 0.03), optax.sgd(0.1)
    )
    params = network(SHAPES)
    grads = random_gradients(1, params, STEPS)
    want, state, step = array(params), tx.init(params), stepper(tx)
    for t in range(STEPS):
        params, state = step(params, state, at_step(grads, t))
        size = at(t) if scheduled else 0.03
        want = jax.tree.map(
            lambda w, g, s=size: w - 0.1 * (np.asarray(g) + s * np.sign(w)),
            want,
            at_step(grads, t),
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, want)


def test_l1_leaves_a_weight_of_zero_where_it_is():
    tx = sparse_optax.add_l1_decay(0.5)
    w = {"w": jnp.array([0.0, -0.0, 1e-30, -2.0])}
    updates, _ = tx.update({"w": jnp.zeros(4)}, tx.init(w), w)
    np.testing.assert_array_equal(updates["w"], [0, 0, 0.5, -0.5])


@pytest.mark.parametrize(
    "mask", [sparse_optax.eligible, {"Dense_0": True, "Dense_1": False}]
)
def test_l1_of_chosen_leaves(mask):
    params = network(SHAPES)
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = sparse_optax.add_l1_decay(1.0, mask=mask)
    updates, _ = tx.update(zeros, tx.init(params), params)
    chosen = mask(params) if callable(mask) else jax.tree.broadcast(mask, params)
    for u, w, c in zip(*map(jax.tree.leaves, (updates, params, chosen)), strict=True):
        np.testing.assert_array_equal(u, np.sign(w) if c else 0)


def test_l1_takes_none_extra_arguments_and_halves():
    tx = sparse_optax.add_l1_decay(optax.constant_schedule(0.25))
    params = {"n": None, "w": jnp.ones((2, 2), jnp.bfloat16)}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params, value=1.0)
    assert updates["n"] is None
    assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(updates["w"], float), 1.25)
    assert isinstance(state, sparse_optax.L1DecayState)
    assert int(state.count) == 1


def test_l1_strength_may_be_injected():
    tx = optax.inject_hyperparams(sparse_optax.add_l1_decay)(strength=0.25)
    params = {"w": jnp.ones((2, 2))}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["w"], 1.25)


def test_l1_wrong_input():
    with refuses("add_l1_decay", "strength", "-1", "at least 0"):
        sparse_optax.add_l1_decay(-1)
    for value in (float("nan"), float("inf")):
        with refuses("add_l1_decay", "strength", str(value), "at least 0 and finite"):
            sparse_optax.add_l1_decay(value)
    tx = sparse_optax.add_l1_decay(0.1)
    with refuses("add_l1_decay", "params", "None"):
        tx.update({}, tx.init({}))


# --- HAM ------------------------------------------------------------------------------


def np_ham(params, grads, rates, alpha, beta, decay=0.9):
    """Momentum SGD, then the exponential step on kernels; float64, step by step."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    buffer = jax.tree.map(np.zeros_like, params)
    for t, rate in enumerate(rates):
        for layer in params:
            for name in ("bias", "kernel"):
                w, g = params[layer][name], np.asarray(grads[layer][name][t], float)
                buffer[layer][name] = decay * buffer[layer][name] + g
                after = w - rate * buffer[layer][name]
                if name == "kernel":
                    exponent = -rate * (alpha * np.sign(after) * g + beta)
                    after *= np.exp(np.clip(exponent, -5, 5))
                params[layer][name] = after
    return params


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize(("alpha", "beta"), [(5.0, 0.0), (0.0, 0.3), (8.0, 0.1)])
def test_ham_follows_the_definition(scheduled, alpha, beta):
    rate = optax.linear_schedule(0.02, 0.005, STEPS) if scheduled else 0.02
    tx = sparse_optax.ham(optax.sgd(rate, 0.9), rate, alpha=alpha, beta=beta)
    params = network(SHAPES)
    grads = random_gradients(2, params, STEPS)
    rates = [float(rate(t)) if scheduled else rate for t in range(STEPS)]
    want = np_ham(params, grads, rates, alpha, beta)
    state, step = tx.init(params), stepper(tx)
    for t in range(STEPS):
        params, state = step(params, state, at_step(grads, t))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), params, want)
    assert int(state.count) == STEPS


def test_ham_leaves_biases_to_the_inner_optimizer_to_the_last_bit():
    params, inner = network(SHAPES), optax.adam(0.01)
    grads = at_step(random_gradients(3, params, 1), 0)
    got, _ = sparse_optax.ham(inner, 0.01).update(
        grads, sparse_optax.ham(inner, 0.01).init(params), params
    )
    plain, _ = inner.update(grads, inner.init(params), params)
    for layer in params:
        np.testing.assert_array_equal(got[layer]["bias"], plain[layer]["bias"])
        assert (got[layer]["kernel"] != plain[layer]["kernel"]).all()


@pytest.mark.parametrize(
    "where",
    [
        lambda name, leaf: name == "Dense_1/bias",
        {"Dense_0": False, "Dense_1": {"bias": True, "kernel": False}},
    ],
)
def test_ham_of_chosen_leaves(where):
    params, inner = network(SHAPES), optax.sgd(0.1)
    grads = at_step(random_gradients(3, params, 1), 0)
    tx = sparse_optax.ham(inner, 0.1, where=where)
    got, _ = tx.update(grads, tx.init(params), params)
    plain, _ = inner.update(grads, inner.init(params), params)
    changed = {
        layers.path_name(path)
        for path, same in jax.tree.leaves_with_path(
            jax.tree.map(lambda a, b: bool((a == b).all()), got, plain)
        )
        if not same
    }
    assert changed == {"Dense_1/bias"}


def sparse_tx(where, dtype=jnp.float32):
    """HAM inside of sparse momentum, or around it."""
    options = {"density": 0.3, "update_period": 2, "update_stop": 20, "key": 0}
    sgd = optax.sgd(0.02, momentum=0.9)
    if where == "inside":
        inner = sparse_optax.ham(sgd, 0.02, alpha=20.0, beta=0.5)
        return sparse_optax.sparse_momentum_regrow(inner, **options)
    sparse = sparse_optax.sparse_momentum_regrow(sgd, **options)
    return sparse_optax.ham(sparse, 0.02, alpha=20.0, beta=0.5)


@pytest.mark.parametrize("place", ["inside", "around"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ham_and_a_sparse_method_leave_exact_zeros(place, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), network(SHAPES))
    grads = random_gradients(4, params, 9)
    tx = sparse_tx(place)
    state, step = tx.init(params), stepper(tx)
    moved = []
    for t in range(9):
        before = kernels(sparse_optax.get_masks(state))
        params, state = step(params, state, at_step(grads, t))
        kept = kernels(sparse_optax.get_masks(state))
        assert masks.count(sparse_optax.get_masks(state)) == 15
        moved.append(any((a != b).any() for a, b in zip(before, kept, strict=True)))
        for w, m in zip(kernels(params), kept, strict=True):
            assert w.dtype == dtype
            np.testing.assert_array_equal(np.asarray(w[~m], float), 0.0)
            assert np.isfinite(np.asarray(w, float)).all()
    assert moved == [False, False, True, False, True, False, True, False, True]


def test_ham_inside_regrows_by_the_momentum_of_its_optimizer():
    """The engine reads the trace through it and keeps no average of its own."""
    params = network(SHAPES)
    state = sparse_tx("inside").init(params)
    assert state.momentum == ()


def test_a_weight_put_to_zero_gets_there_whatever_the_factor():
    """However large the exponent; -w is exact for odd weights too."""
    w = jnp.float32([[1.1, -0.3, 3e-5]])
    tx = sparse_optax.ham(optax.stateless(lambda u, p: {"w": -p["w"]}), 1.0)
    params = {"w": w}
    for g in (-jnp.sign(w), 0.003 * jnp.sign(w)):
        updates, _ = tx.update({"w": g}, tx.init(params), params)
        after = optax.apply_updates(params, updates)["w"]
        np.testing.assert_array_equal(after, 0.0)


def test_the_exponent_is_clipped_and_has_the_sign_after_the_inner_step():
    """Hand-worked: 2 - 3 = -1 and 2 + 3 = 5 both grow, by e^5 and not by e^30."""
    tx = sparse_optax.ham(optax.sgd(1.0), 1.0, alpha=10.0, beta=0.0)
    params = {"w": jnp.full((1, 2), 2.0)}
    gradient = {"w": jnp.array([[3.0, -3.0]])}
    updates, _ = tx.update(gradient, tx.init(params), params)
    after = optax.apply_updates(params, updates)["w"][0]
    np.testing.assert_allclose(after, [-np.exp(5.0), 5 * np.exp(5.0)], rtol=1e-5)


def test_small_steps_are_not_lost_to_rounding():
    """exp(x) - 1 of x = 1e-9 is zero in float32, its share of the weight is not."""
    tx = sparse_optax.ham(optax.sgd(0.0), 1e-6, alpha=0.0, beta=1e-3)
    params = {"w": jnp.full((1, 1), 3.0)}
    updates, _ = tx.update({"w": jnp.zeros((1, 1))}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -3e-9, rtol=1e-5)


def test_ham_keeps_dtypes_of_weights_under_halved_gradients():
    params = {"bias": jnp.ones(3), "w": jnp.ones((2, 3)), "n": None}
    half = jax.tree.map(lambda x: (0.1 * x).astype(jnp.bfloat16), params)
    tx = sparse_optax.ham(optax.sgd(0.1), 0.1)
    updates, _ = tx.update(half, tx.init(params), params)
    assert updates["w"].dtype == jnp.float32
    g = float(half["w"][0, 0])
    u = float(jnp.bfloat16(-0.1 * g))
    want = (1 + u) * np.exp(-0.1 * (200 * g + 1e-3)) - 1  # an exponent of -2
    np.testing.assert_allclose(updates["w"], want, rtol=1e-5)
    assert updates["bias"].dtype == jnp.bfloat16
    assert updates["n"] is None


def test_ham_trains_a_model_of_nnx():
    """Its names are those of variables at init and of arrays at the update."""
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    before = np.asarray(model.kernel[...])
    where = nnx.State({"bias": False, "kernel": True})
    tx = sparse_optax.ham(optax.sgd(0.1), 0.1, alpha=0.0, beta=1.0, where=where)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(model.kernel[...], before * np.exp(-0.1), rtol=1e-6)


def test_ham_injected_equals_plain():
    params = network(SHAPES)
    grads = at_step(random_gradients(5, params, 1), 0)
    make = optax.inject_hyperparams(sparse_optax.ham, static_args=("inner", "where"))
    settings = {"learning_rate": 0.05, "alpha": 3.0, "beta": 0.1}
    updates = []
    for tx in (
        make(optax.sgd(0.05), **settings),
        sparse_optax.ham(optax.sgd(0.05), **settings),
    ):
        updates.append(jax.jit(tx.update)(grads, tx.init(params), params)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *updates)


def test_ham_state_survives_map_params_and_abstract_init():
    params = network(SHAPES)
    tx = sparse_optax.ham(optax.sgd(0.1, momentum=0.9), 0.1)
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    shapes = jax.eval_shape(tx.init, params)
    _, after = jax.jit(tx.update)(params, state, params)
    for x in (shapes, after):
        assert jax.tree.map(lambda a: (a.shape, a.dtype), x) == jax.tree.map(
            lambda a: (a.shape, a.dtype), state
        )


def test_ham_wrong_input():
    with refuses("ham", "inner", "0.1", "GradientTransformation"):
        sparse_optax.ham(0.1, 0.1)
    with refuses("ham", "alpha", "-1", "at least 0"):
        sparse_optax.ham(optax.sgd(0.1), 0.1, alpha=-1)
    with refuses("ham", "beta", "nan", "at least 0"):
        sparse_optax.ham(optax.sgd(0.1), 0.1, beta=float("nan"))
    with refuses("ham", "alpha", "inf", "at least 0 and finite"):
        sparse_optax.ham(optax.sgd(0.1), 0.1, alpha=float("inf"))
    with refuses("ham", "learning_rate", "nan", "at least 0 and finite"):
        sparse_optax.ham(optax.sgd(0.1), float("nan"))
    tx = sparse_optax.ham(optax.sgd(0.1), 0.1)
    params = network(SHAPES)
    with refuses("ham", "params", "None"):
        tx.update(params, tx.init(params))
    with refuses("ham", "params", "4 leaves", "equal"):
        tx.update(params["Dense_0"], tx.init(params), params["Dense_0"])
    with refuses("ham", "no leaf", "bias", "at least one must"):
        tx.init({"bias": jnp.ones(3)})


# --- group lasso ----------------------------------------------------------------------


def np_prox(v, groups, limit):
    """The minimum of limit * sum sqrt(|G|) |w_G| + |w - v|^2 / 2, group by group."""
    out = np.array(v, np.float64)
    for places in groups:
        norm = np.sqrt((out[places] ** 2).sum())
        least = limit * np.sqrt(out[places].size)
        out[places] = 0 if norm <= least else out[places] * (1 - least / norm)
    return out


GROUPS = {
    "weights": (None, lambda s: list(np.ndindex(*s))),
    "units": (patterns.output_units(), lambda s: [np.s_[:, j] for j in range(s[1])]),
    "blocks": (
        patterns.blocks(2, 1),
        lambda s: [
            np.s_[i : i + 2, j : j + 1] for i in range(0, s[0], 2) for j in range(s[1])
        ],
    ),
}


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize("scheduled", [False, True])
def test_group_lasso_is_the_proximal_step_of_sgd(kind, scheduled):
    pattern, groups = GROUPS[kind]
    shapes = ((6, 5), (4, 3))
    rate = optax.linear_schedule(0.1, 0.05, STEPS) if scheduled else 0.1
    whole = 4.0 if kind == "units" else 1.0  # they are longer
    strength = (lambda t: whole * (0.4 + 0.1 * t)) if scheduled else 0.5 * whole
    tx = optax.chain(
        optax.sgd(rate),
        sparse_optax.proximal_group_lasso(rate, strength, pattern=pattern),
    )
    params = network(shapes)
    grads = random_gradients(4, params, STEPS)
    want, state, step = array(params), tx.init(params), stepper(tx)
    zeros = 0
    for t in range(STEPS):
        params, state = step(params, state, at_step(grads, t))
        eta = float(rate(t)) if scheduled else rate
        limit = eta * (strength(t) if scheduled else strength)
        for name, layer in want.items():
            for part, w in layer.items():
                v = w - eta * np.asarray(grads[name][part][t], np.float64)
                kernel = part == "kernel"
                layer[part] = np_prox(v, groups(v.shape), limit) if kernel else v
            got = np.asarray(params[name]["kernel"])
            np.testing.assert_array_equal(got == 0, want[name]["kernel"] == 0)
            zeros += int((got == 0).sum())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), params, want)
    assert zeros > 0
    assert step._cache_size() == 1


def test_the_proximal_step_is_a_minimum():
    """No step away from it makes penalty and distance smaller."""
    rng = np.random.default_rng(0)
    v = rng.normal(size=(4, 3))
    tx = sparse_optax.proximal_group_lasso(1.0, 0.6, pattern=patterns.output_units())
    params = {"w": jnp.float32(v)}
    updates, _ = tx.update({"w": jnp.zeros((4, 3))}, tx.init(params), params)
    found = np.asarray(params["w"] + updates["w"], np.float64)

    def cost(w):
        norms = np.sqrt((w**2).sum(0))
        return 0.6 * 2 * norms.sum() + 0.5 * ((w - v) ** 2).sum()

    least = cost(found)
    for _ in range(200):
        assert cost(found + 0.01 * rng.normal(size=v.shape)) > least


def test_group_lasso_of_halves_stacks_and_a_long_run():
    params = {"s": jnp.ones((3, 4, 5), jnp.bfloat16), "w": jnp.ones((4, 4))}
    tx = sparse_optax.proximal_group_lasso(
        0.1, 1.0, pattern=patterns.output_units(axis=-1), stacked={"s": 0}
    )
    state, still = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for _ in range(12):
        updates, state = jax.jit(tx.update)(still, state, params)
        assert updates["s"].dtype == jnp.bfloat16
        params = optax.apply_updates(params, updates)
    assert not np.asarray(params["s"], float).any()
    assert not np.asarray(params["w"]).any()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before


def test_group_lasso_wrong_input():
    make = sparse_optax.proximal_group_lasso
    with refuses("proximal_group_lasso", "learning_rate", "-1", "at least 0"):
        make(-1.0, 1.0)
    with refuses("proximal_group_lasso", "strength", "nan", "at least 0"):
        make(1.0, float("nan"))
    with refuses("proximal_group_lasso", "pattern", "n_m", "units"):
        make(1.0, 1.0, pattern=patterns.n_m(2, 4))
    tx, params = make(1.0, 1.0), network(SHAPES)
    with refuses("proximal_group_lasso", "params", "None"):
        tx.update(params, tx.init(params))
    part = {"Dense_0": params["Dense_0"]}
    with refuses("proximal_group_lasso", "params", "Dense_1"):
        tx.update(part, tx.init(params), part)
