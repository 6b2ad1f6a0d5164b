"""Sparse momentum: one cycle, the training step, and what people do to optimizers."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from helpers import (
    at_step,
    kept,
    kernels,
    mask_tree,
    network,
    random_gradients,
    refuses,
    run_cycle,
    stepper,
)

import sparse_optax
from sparse_optax import sparse_momentum_regrow
from sparse_optax.layers import layers_of, path_name
from sparse_optax.regrowth import restart

# --- one cycle against the oracle -----------------------------------------------------

STRUCTURES = (
    ((1, 1),),
    ((6, 5),),
    ((2, 3), (16, 8), (1, 5), (3, 3, 2, 4)),
)

pytestmark = pytest.mark.core


def _layer_values(rng, kind, shape):
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind == "equal":
        return np.full(shape, rng.choice([-0.5, 0.5]), np.float32)
    if kind == "ties":
        return rng.integers(-2, 3, shape).astype(np.float32)
    if kind == "few":
        return (rng.normal(size=shape) * (rng.random(shape) < 0.1)).astype(np.float32)
    scale = {"normal": 1.0, "tiny": 1e-9, "huge": 1e15}[kind]
    return (scale * rng.normal(size=shape)).astype(np.float32)


VALUES = st.sampled_from(["normal", "ties", "equal", "zero", "few", "tiny", "huge"])
# How many weights of a layer are active; "nearly" is below 20 percent sparsity.
ACTIVE = st.sampled_from(["none", "one", "some", "nearly", "all but one", "all"])
RATES = st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0])


def _active(rng, how, size):
    some = int(rng.integers(0, size + 1))
    nearly = size - size // 8
    table = {"none": 0, "one": 1, "some": some, "nearly": nearly, "all": size}
    return table.get(how, size - 1)


@st.composite
def cycles(draw):
    """Weights, masks and momentum of a network, and a prune rate."""
    shapes = draw(st.sampled_from(STRUCTURES))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    params, mask, momentum = [], [], []
    for shape in shapes:
        size = int(np.prod(shape))
        flat = np.arange(size) < _active(rng, draw(ACTIVE), size)
        active = rng.permutation(flat).reshape(shape)
        mask.append(active)
        params.append(np.where(active, _layer_values(rng, draw(VALUES), shape), 0))
        momentum.append(_layer_values(rng, draw(VALUES), shape))
    return params, mask, momentum, draw(RATES)


@hypothesis.settings(max_examples=200)
@hypothesis.given(cycles())
def test_cycle_equals_the_oracle(example):
    params, mask, momentum, rate = example
    wanted_masks, wanted_removed, wanted_grown, _ = oracles.sparse_momentum_cycle(
        params, mask, momentum, rate
    )
    new, removed, grown = run_cycle(params, mask, momentum, rate)
    np.testing.assert_array_equal(removed, wanted_removed)
    np.testing.assert_array_equal(grown, wanted_grown)
    for got, wanted in zip(new, wanted_masks, strict=True):
        np.testing.assert_array_equal(got, wanted)


@hypothesis.settings(max_examples=50)
@hypothesis.given(cycles())
def test_cycle_keeps_the_total(example):
    params, mask, momentum, rate = example
    new, removed, grown = run_cycle(params, mask, momentum, rate)
    assert sum(m.sum() for m in new) == sum(m.sum() for m in mask)
    assert sum(removed) == sum(grown)
    for before, after, r, g in zip(mask, new, removed, grown, strict=True):
        assert after.sum() == before.sum() - r + g


def test_cycle_by_hand():
    """Two layers of eight; p = 1/2 takes two of four and one of two.

    Means of 3 and 1 give the three places as 2.25 and 0.75, hence 2 and 1. In layer 0
    the momenta 3.0 at indices 1 and 4, both just pruned, tie: the lower one grows.
    """
    momentum_0 = [3.0, 3.0, 7.0, 1.0, 3.0, 3.0, 2.0, 0.5]
    weights__0 = [9.0, 0.1, 0.0, 0.0, 0.2, 8.0, 0.0, 0.0]
    before___0 = [1, 1, 0, 0, 1, 1, 0, 0]
    after____0 = [1, 1, 1, 0, 0, 1, 0, 0]
    momentum_1 = [1.0, 1.0, 9.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    weights__1 = [0.3, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    before___1 = [1, 1, 0, 0, 0, 0, 0, 0]
    after____1 = [0, 1, 1, 0, 0, 0, 0, 0]
    new, removed, grown = run_cycle(
        [np.float32(weights__0), np.float32(weights__1)],
        [np.array(before___0, bool), np.array(before___1, bool)],
        [np.float32(momentum_0), np.float32(momentum_1)],
        0.5,
    )
    assert removed == [2, 1]
    assert grown == [2, 1]
    np.testing.assert_array_equal(new[0], np.array(after____0, bool))
    np.testing.assert_array_equal(new[1], np.array(after____1, bool))


def test_a_full_layer_spills_what_it_cannot_take():
    """Edge case 1: all momentum is in a layer with one free place."""
    mask = [np.ones(4, bool), np.arange(40) < 20, np.arange(40) < 20]
    mask[0][3] = False
    params = [np.where(m, 1.0 + np.arange(m.size), 0).astype(np.float32) for m in mask]
    momentum = [np.full(4, 1, np.float32), *(np.zeros(40, np.float32),) * 2]
    new, removed, grown = run_cycle(params, mask, momentum, 0.5)
    # Sparsity 1/4 is not below 0.2, so layer 0 loses floor(3/2) = 1 and takes 2 of 21;
    # the other 19 are shared as 9 and 9, and the last goes to the lower layer.
    assert removed == [1, 10, 10]
    assert grown == [2, 10, 9]
    assert new[0].all()


def _two_layers(active_0, active_1, momentum_0, momentum_1):
    """Layers of 20 and 30 equal weights, the first ones active."""
    mask = [np.arange(20) < active_0, np.arange(30) < active_1]
    params = [np.where(m, 1.0, 0.0).astype(np.float32) for m in mask]
    momentum = [
        np.full(m.size, z, np.float32)
        for m, z in zip(mask, (momentum_0, momentum_1), strict=True)
    ]
    return params, mask, momentum


@pytest.mark.parametrize(("m0", "m1", "lost"), [(1.0, 0.1, 1), (0.1, 1.0, 9)])
def test_a_dense_layer_that_still_grows_loses_little(m0, m1, lost):
    """Edge case 2: sparsity 0.1 and contribution > 1/L give floor(0.1 * 18) = 1."""
    _, removed, _ = run_cycle(*_two_layers(18, 10, m0, m1), 0.5)
    assert removed == [lost, 5]


def test_a_full_growing_layer_loses_nothing():
    new, removed, grown = run_cycle(*_two_layers(20, 4, 1.0, 0.5), 0.5)
    assert removed == [0, 2]
    assert grown == [0, 2]
    assert new[0].all()


def test_zero_momentum_regrows_what_each_layer_lost():
    params, mask, momentum = _two_layers(10, 0, 0.0, 0.0)
    mask[1][24:] = True
    new, removed, grown = run_cycle(params, mask, momentum, 0.5)
    assert removed == [5, 3]
    assert grown == [5, 3]
    # Equal weights: the highest indices go. Equal momenta: the lowest places grow.
    np.testing.assert_array_equal(new[0], np.arange(20) < 10)
    np.testing.assert_array_equal(new[1], np.isin(np.arange(30), [0, 1, 2, 24, 25, 26]))


def test_subnormal_momentum_keeps_the_total():
    """XLA on a CPU may take subnormal numbers for zero; either way counts hold."""
    new, removed, grown = run_cycle(*_two_layers(10, 6, 1e-40, 1e-40), 0.5)
    assert removed == [5, 3]
    assert sum(grown) == 8
    assert sum(m.sum() for m in new) == 16


@pytest.mark.parametrize("rate", [np.nan, np.inf, -np.inf])
def test_a_broken_prune_rate_changes_nothing(rate):
    params, mask, momentum = _two_layers(10, 6, 1.0, 0.5)
    new, removed, grown = run_cycle(params, mask, momentum, rate)
    assert removed == grown == [0, 0]
    for a, b in zip(new, mask, strict=True):
        np.testing.assert_array_equal(a, b)


# --- the training step against the oracle ---------------------------------------------

SHAPES = ((12, 9), (9, 7), (7, 5))
# One layer where one is enough: compiling a cycle takes most of a test's time.
SMALL = ((9, 7),)
PERIOD, STOP = 4, 20


def _inner(nesterov=True, decay=5e-2):
    return optax.chain(
        optax.add_decayed_weights(decay),
        optax.sgd(0.05, momentum=0.9, nesterov=nesterov),
    )


def _transformation(inner=None, **kwargs):
    settings = dict(density=0.3, update_period=PERIOD, update_stop=STOP, key=1)
    return sparse_momentum_regrow(
        _inner() if inner is None else inner, **(settings | kwargs)
    )


def _budget(density=0.3, shapes=SHAPES):
    return sparse_optax.budgets.count(density, sum(int(np.prod(s)) for s in shapes))


@functools.cache
def _default_step():
    """One compiled step of the default transformation, for every test that uses it."""
    return stepper(_transformation())


def _cosine(count):
    return 0.25 * (1 + np.cos(np.pi * count / STOP))


_LINEAR = lambda count: 0.5 - count / 64  # noqa: E731


@pytest.mark.parametrize(
    ("nesterov", "prune_rate", "oracle_rate", "stop", "shapes"),
    [
        (True, None, _cosine, STOP, SHAPES),
        (False, 0.4, lambda count: 0.4, STOP, SMALL),
        (True, _LINEAR, _LINEAR, None, SHAPES[1:]),
    ],
    ids=["cosine", "constant", "schedule without an end"],
)
def test_training_equals_the_oracle(nesterov, prune_rate, oracle_rate, stop, shapes):
    tx = _transformation(_inner(nesterov), prune_rate=prune_rate, update_stop=stop)
    step, params = stepper(tx), network(shapes)
    if shapes == SHAPES:
        step = _default_step()
    steps = STOP + PERIOD + 2
    grads = random_gradients(3, params, steps)
    state = tx.init(params)
    oracle = oracles.train_sparse_momentum(
        [k.astype(np.float64) for k in kernels(params)],
        kept(state),
        [
            [k.astype(np.float64) for k in kernels(at_step(grads, t))]
            for t in range(steps)
        ],
        period=PERIOD,
        stop=stop,
        rate=oracle_rate,
        lr=0.05,
        beta=0.9,
        nesterov=nesterov,
        decay=5e-2,
    )
    changes = []
    for t, (weights, mask, _, removed, grown) in enumerate(oracle):
        before = kept(state)
        params, state = step(params, state, at_step(grads, t))
        for got, wanted in zip(kept(state), mask, strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=f"mask, step {t + 1}")
        for got, wanted in zip(kernels(params), weights, strict=True):
            np.testing.assert_allclose(
                got, wanted, rtol=2e-4, atol=2e-6, err_msg=f"weights, step {t + 1}"
            )
        np.testing.assert_array_equal(jax.tree.leaves(state.removed), removed)
        np.testing.assert_array_equal(jax.tree.leaves(state.grown), grown)
        if any((a != b).any() for a, b in zip(before, kept(state), strict=True)):
            changes.append(t)
    # Cycles open the updates after full periods: 5, 9, 13, 17, counted from one.
    last = steps if stop is None else STOP
    assert changes == list(range(PERIOD, last, PERIOD))


def test_biases_are_the_inner_optimizers():
    params = network(SMALL)
    grads = random_gradients(4, params, 10)
    alone, wrapped = _inner(), _transformation()
    state_alone, state_wrapped = alone.init(params), wrapped.init(params)
    step_alone, step_wrapped = stepper(alone), _default_step()
    params_alone = params
    for t in range(10):
        params_alone, state_alone = step_alone(
            params_alone, state_alone, at_step(grads, t)
        )
        params, state_wrapped = step_wrapped(params, state_wrapped, at_step(grads, t))
    for name, layer in params.items():
        np.testing.assert_allclose(
            layer["bias"], params_alone[name]["bias"], rtol=1e-6, atol=1e-7
        )


def _train(steps, seed=5, tx=None, **kwargs):
    """Yields ``(finished steps, params before, params, state)`` after each step."""
    tx = _transformation(**kwargs) if tx is None else tx
    step = stepper(tx) if kwargs else _default_step()
    params = network(SHAPES)
    grads = random_gradients(seed, params, steps)
    state = tx.init(params)
    for t in range(steps):
        before = params
        params, state = step(params, state, at_step(grads, t))
        yield t + 1, before, params, state


def test_a_period_ends_with_a_trained_net():
    """At the end of a period every kept weight has moved; none waits at zero."""
    alive = {
        finished: sum(int((k != 0).sum()) for k in kernels(params))
        for finished, _, params, _ in _train(STOP)
    }
    assert {alive[t] for t in range(PERIOD, STOP + 1, PERIOD)} == {_budget()}
    # Right after a cycle some do wait: pruned, and regrown in their own place.
    assert min(alive[t] for t in range(PERIOD + 1, STOP, PERIOD)) < _budget()


def test_evaluating_at_a_periods_end_loses_nothing_to_the_cycle():
    """The masked forward pass of the evaluated params is that of the params."""
    for finished, _, params, state in _train(STOP):
        if finished % PERIOD == 0:
            sparse = sparse_optax.sparsify(params, state)
            for a, b in zip(kernels(params), kernels(sparse), strict=True):
                np.testing.assert_array_equal(a, b)


def test_no_cycle_follows_the_last_step():
    """The run ends at a multiple of the period: the mask is the trained one."""
    masks = {0: None}
    for finished, _, _, state in _train(STOP + 2 * PERIOD):
        masks[finished] = kept(state)
    changed = [
        t
        for t in range(2, STOP + 2 * PERIOD + 1)
        if any((a != b).any() for a, b in zip(masks[t - 1], masks[t], strict=True))
    ]
    assert changed == [5, 9, 13, 17]


def test_pruned_weights_stop_and_grown_weights_start_from_zero():
    tx = _transformation()
    params = network(SHAPES)
    grads = random_gradients(5, params, 6)
    step, state = _default_step(), tx.init(params)
    for t in range(PERIOD):
        params, state = step(params, state, at_step(grads, t))
    momentum = kernels(optax.tree.get(state.inner_state, "trace"))
    before, weights = kept(state), kernels(params)
    new, _, _, pruned = oracles.sparse_momentum_cycle(
        weights, before, momentum, _cosine(PERIOD)
    )
    regrown = [p & n for p, n in zip(pruned, new, strict=True)]
    assert sum(r.sum() for r in regrown) > 0, "the example must hold a regrown weight"
    g = kernels(at_step(grads, PERIOD))
    params, state = step(params, state, at_step(grads, PERIOD))
    after = kernels(params)
    for i, (old, mask) in enumerate(zip(before, new, strict=True)):
        np.testing.assert_array_equal(kept(state)[i], mask)
        np.testing.assert_array_equal(after[i][pruned[i]], 0.0)
        fresh = mask & ~old
        z = g[i] + 0.9 * momentum[i]
        np.testing.assert_allclose(
            after[i][fresh], (-0.05 * (g[i] + 0.9 * z))[fresh], rtol=1e-5, atol=1e-7
        )
        stay = mask & old & ~pruned[i]
        decayed = g[i] + 5e-2 * weights[i]
        z = decayed + 0.9 * momentum[i]
        np.testing.assert_allclose(
            after[i][stay],
            (weights[i] - 0.05 * (decayed + 0.9 * z))[stay],
            rtol=1e-5,
            atol=1e-6,
        )
    params, state = step(params, state, at_step(grads, PERIOD + 1))
    for r, k in zip(regrown, kernels(params), strict=True):
        assert (k[r] != 0).all(), "a regrown weight moves again at the next step"


# --- exact zeros, exact counts --------------------------------------------------------


@pytest.mark.parametrize(
    ("param_dtype", "grad_dtype"),
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16),
    ],
    ids=["float32", "bfloat16", "float32 with bfloat16 gradients"],
)
def test_missing_weights_are_exactly_zero_for_100_steps(param_dtype, grad_dtype):
    tx = _transformation(update_stop=100, update_period=7)
    params = jax.tree.map(lambda p: p.astype(param_dtype), network(SMALL))
    grads = jax.tree.map(
        lambda g: g.astype(grad_dtype), random_gradients(6, params, 100)
    )

    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        # A rounded -p would leave a remainder.
        assert updates["Dense_0"]["kernel"].dtype == param_dtype
        params = optax.apply_updates(params, updates)
        pairs = [
            (params[name]["kernel"], mask["kernel"])
            for name, mask in sparse_optax.get_masks(state).items()
        ]
        # The bits, because -0.0 == 0.0 and NaN compares with nothing.
        unsigned = {2: jnp.uint16, 4: jnp.uint32}[param_dtype.dtype.itemsize]
        dirty = sum(
            jnp.sum(~m & (jax.lax.bitcast_convert_type(w, unsigned) != 0))
            for w, m in pairs
        )
        count = sum(jnp.sum(m, dtype=jnp.int32) for _, m in pairs)
        alive = sum(jnp.sum(w != 0) for w, _ in pairs)
        return (params, state), (dirty, count, alive)

    (params, state), (dirty, count, alive) = jax.jit(
        lambda carry: jax.lax.scan(step, carry, grads)
    )((params, tx.init(params)))
    np.testing.assert_array_equal(dirty, 0)
    np.testing.assert_array_equal(count, _budget(shapes=SMALL))
    assert int(alive[-1]) > 0.9 * _budget(shapes=SMALL)
    assert int(state.skipped) == 0
    for layer in params.values():
        assert layer["kernel"].dtype == param_dtype


# --- broken numbers -------------------------------------------------------------------


def _poison(tree, where, value, masks):
    """Puts ``value`` at the first active or missing weight of the second kernel."""
    mask = kernels(masks)[1]
    index = tuple(np.argwhere(mask == (where == "active"))[0])
    kernel = tree["Dense_1"]["kernel"].at[index].set(value)
    return tree | {"Dense_1": tree["Dense_1"] | {"kernel": kernel}}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["active", "missing"])
@pytest.mark.parametrize("what", ["params", "momentum"])
def test_broken_numbers_never_change_a_mask(value, where, what):
    tx, step = _transformation(), _default_step()
    params = network(SHAPES)
    grads = random_gradients(7, params, PERIOD + 2)
    state = tx.init(params)
    for t in range(PERIOD):
        grad = at_step(grads, t)
        if what == "momentum" and t == PERIOD - 1:
            grad = _poison(grad, where, value, sparse_optax.get_masks(state))
        params, state = step(params, state, grad)
    if what == "params":
        params = _poison(params, where, value, sparse_optax.get_masks(state))
    before = kept(state)
    old = kernels(params)
    params, state = step(params, state, at_step(grads, PERIOD))
    for a, b in zip(before, kept(state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(state.skipped) == 1
    assert int(state.count) == PERIOD + 1
    # The update passes through: the other layers train on.
    assert (kernels(params)[0] != old[0])[before[0]].all()
    params, state = step(params, state, at_step(grads, PERIOD + 1))
    assert int(state.skipped) == 1, "a step without a due cycle skips nothing"


def test_the_gradient_of_the_opening_step_is_no_evidence():
    """The cycle reads the stored momentum, which a broken gradient has not entered."""
    tx, step = _transformation(), _default_step()
    params = network(SHAPES)
    grads = random_gradients(7, params, PERIOD + 1)
    state = tx.init(params)
    params, state = _loop(step, params, state, at_step(grads, slice(0, PERIOD)))
    grad = at_step(grads, PERIOD)
    broken = _poison(grad, "missing", np.nan, sparse_optax.get_masks(state))
    _, whole = step(params, state, grad)
    _, other = step(params, state, broken)
    assert int(other.skipped) == 0
    for a, b, c in zip(kept(state), kept(whole), kept(other), strict=True):
        assert (a != b).any()
        np.testing.assert_array_equal(b, c)


# --- what the momentum is -------------------------------------------------------------


def _trace(grads, beta):
    z = 0.0
    for g in grads:
        z = g + beta * z
    return z


def _ema(grads, beta):
    m = 0.0
    for g in grads:
        m = beta * m + (1 - beta) * g
    return m


def _adam(grads):
    return _ema(grads, 0.9) / (np.sqrt(_ema([g * g for g in grads], 0.999)) + 1e-8)


def _rmsprop(grads):
    nu, z = 0.0, 0.0
    for g in grads:
        nu = 0.9 * nu + 0.1 * g * g
        z = -1e-2 * g / np.sqrt(nu + 1e-8) + 0.9 * z
    return z


_ALL = lambda tree: jax.tree.map(lambda _: True, tree)  # noqa: E731
_LABELS = lambda tree: {name: "ab"[name == "Dense_1"] for name in tree}  # noqa: E731
SGD = optax.sgd(1e-2, momentum=0.8)

MOMENTA = {
    "sgd": (SGD, lambda gs: _trace(gs, 0.8)),
    "adam": (optax.adam(1e-3), _adam),
    "adamw": (optax.adamw(1e-3), _adam),
    "lion": (optax.lion(1e-3), lambda gs: _ema(gs, 0.99)),
    "rmsprop": (optax.rmsprop(1e-2, momentum=0.9), _rmsprop),
    "chain": (
        optax.chain(optax.clip(1e3), optax.add_decayed_weights(0.0), SGD),
        lambda gs: _trace(gs, 0.8),
    ),
    "masked": (optax.masked(SGD, _ALL), lambda gs: _trace(gs, 0.8)),
    "partition": (
        optax.partition({"a": SGD, "b": optax.sgd(3e-2, momentum=0.8)}, _LABELS),
        lambda gs: _trace(gs, 0.8),
    ),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2, momentum=0.8),
        lambda gs: _trace(gs, 0.8),
    ),
    # Without a momentum of its own, or with several kinds: the engine's average.
    "plain sgd": (optax.sgd(1e-2), lambda gs: _ema(gs, 0.9)),
    "adafactor": (
        optax.adafactor(1e-3, min_dim_size_to_factor=4),
        lambda gs: _ema(gs, 0.9),
    ),
    # The state of Adam with another meaning: the engine's average, wherever they stand.
    "adamax": (optax.adamax(1e-3), lambda gs: _ema(gs, 0.9)),
    "adopt": (
        optax.chain(optax.clip(1e3), optax.contrib.adopt(1e-3)),
        lambda gs: _ema(gs, 0.9),
    ),
    "masked adopt": (
        optax.masked(optax.contrib.adopt(1e-3), _ALL),
        lambda gs: _ema(gs, 0.9),
    ),
    "injected adamaxw": (
        optax.inject_hyperparams(optax.adamaxw)(learning_rate=1e-3),
        lambda gs: _ema(gs, 0.9),
    ),
    "partition of adopt": (
        optax.partition(
            {"a": optax.contrib.adopt(1e-3), "b": optax.contrib.adopt(1e-2)}, _LABELS
        ),
        lambda gs: _ema(gs, 0.9),
    ),
    "muon": (optax.contrib.muon(1e-3), lambda gs: _ema(gs, 0.95)),
    "several kinds": (
        optax.partition({"a": SGD, "b": optax.adam(1e-3)}, _LABELS),
        lambda gs: _ema(gs, 0.9),
    ),
}


def _first_cycle(inner, momentum_of, *, shapes=SMALL, seed=8, **kwargs):
    """Masks after the first cycle, and the oracle's for this momentum."""
    tx = _transformation(inner, prune_rate=0.4, **kwargs)
    step, params = stepper(tx), network(shapes)
    grads = random_gradients(seed, params, PERIOD + 1)
    state = tx.init(params)
    before = kept(state)
    for t in range(PERIOD):
        params, state = step(params, state, at_step(grads, t))
    history = [kernels(at_step(grads, t)) for t in range(PERIOD)]
    momentum = [
        momentum_of([np.float64(h[i]) for h in history]) for i in range(len(before))
    ]
    wanted, *_ = oracles.sparse_momentum_cycle(kernels(params), before, momentum, 0.4)
    _, state = step(params, state, at_step(grads, PERIOD))
    return kept(state), wanted


@pytest.mark.parametrize("name", MOMENTA)
def test_momentum_is_found(name):
    # Groups need a layer each; everything else is found as well in one.
    grouped = name in ("partition", "several kinds", "partition of adopt")
    got, wanted = _first_cycle(*MOMENTA[name], shapes=SHAPES[1:] if grouped else SMALL)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_momentum_of_ones_own():
    """A float asks for the engine's average, though the inner trace is there."""
    got, wanted = _first_cycle(SGD, lambda gs: _ema(gs, 0.5), momentum=0.5)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def test_missing_weights_have_momentum():
    """The inner optimizer sees the dense gradient."""
    *_, (_, _, _, state) = _train(3)
    trace = kernels(optax.tree.get(state.inner_state, "trace"))
    for m, z in zip(kept(state), trace, strict=True):
        assert (z[~m] != 0).all()


def test_adam_in_float16_divides_nothing_by_zero():
    """1e-8 is zero in float16, and so is the square of a gradient of 1e-4.

    Optax is given an epsilon that float16 holds, so that only the engine can break.
    """
    params = jax.tree.map(lambda p: p.astype(jnp.float16), network(SMALL))
    grads = random_gradients(8, params, PERIOD + 1)
    scale = np.where(np.arange(63).reshape(9, 7) % 5 == 0, 0.0, 1e-4)
    grads["Dense_0"]["kernel"] *= jnp.asarray(scale, jnp.float16)[None]
    tx = _transformation(optax.adam(1e-3, eps=1e-4), prune_rate=0.4)
    start = tx.init(params)
    params, state = _loop(stepper(tx), params, start, grads)
    assert np.isfinite(kernels(params)[0]).all()
    assert int(state.skipped) == 0
    assert (kept(state)[0] != kept(start)[0]).any()


def test_clipping_by_the_norm_of_active_weights():
    """Biases and active weights make the norm, the dense gradient does not."""
    clip = sparse_optax.clip_by_active_norm(0.5)
    tx = _transformation(optax.chain(clip, optax.sgd(1.0)))
    params = network(SMALL)
    grads = at_step(random_gradients(8, params, 1), 0)
    grads["Dense_0"]["kernel"] = grads["Dense_0"]["kernel"] * 10
    state = tx.init(params)
    (mask,) = kept(state)
    updates, _ = jax.jit(tx.update)(grads, state, params)
    bias, kernel = grads["Dense_0"]["bias"], np.where(mask, kernels(grads)[0], 0)
    norm = np.sqrt((np.float64(bias) ** 2).sum() + (np.float64(kernel) ** 2).sum())
    assert norm > 1
    np.testing.assert_allclose(
        kernels(updates)[0][mask], -0.5 * kernel[mask] / norm, rtol=1e-5
    )
    np.testing.assert_allclose(
        updates["Dense_0"]["bias"], -0.5 * bias / norm, rtol=1e-5
    )


def test_a_clip_outside_leaves_little_of_the_weights_that_train():
    """At a density of 1%: the share of their squares in that of the dense gradient."""
    params = network(((60, 50),))
    grads = at_step(random_gradients(8, params, 1), 0)
    settings = dict(density=0.01, update_period=9, update_stop=99, key=0)
    method = sparse_optax.sparse_momentum_regrow
    outer = optax.chain(
        optax.clip_by_global_norm(1.0), method(optax.sgd(1.0), **settings)
    )
    clip = sparse_optax.clip_by_active_norm(1.0)
    inner = method(optax.chain(clip, optax.sgd(1.0)), **settings)
    norms = []
    for tx in (outer, inner):
        state = tx.init(params)
        updates, _ = tx.update(grads, state, sparse_optax.sparsify(params, state))
        norms.append(float(optax.tree.norm(updates)))
    (mask,) = kept(state)
    kernel, bias = kernels(grads)[0], np.asarray(grads["Dense_0"]["bias"])
    moving = (kernel[mask] ** 2).sum() + (bias**2).sum()
    whole = (kernel**2).sum() + (bias**2).sum()
    np.testing.assert_allclose(norms, [np.sqrt(moving / whole), 1.0], rtol=1e-5)
    assert norms[0] < 0.2


COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: (
        COMPILED.append(event) if event.endswith("backend_compile_duration") else None
    )
)

# --- jit, scan, vmap, wrappers --------------------------------------------------------


def _loop(step, params, state, grads):
    for t in range(jax.tree.leaves(grads)[0].shape[0]):
        params, state = step(params, state, at_step(grads, t))
    return params, state


def _scan(tx, params, grads):
    def step(carry, grad):
        params, state = carry
        updates, state = tx.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry, _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    return carry


def test_scan_equals_a_loop_over_jitted_steps():
    params, tx = network(SMALL), _transformation()
    grads = random_gradients(5, params, 10)
    scanned, state = jax.jit(lambda p, g: _scan(tx, p, g))(params, grads)
    looped, other = _loop(_default_step(), params, tx.init(params), grads)
    np.testing.assert_array_equal(kept(state)[0], kept(other)[0])
    np.testing.assert_allclose(
        kernels(scanned)[0], kernels(looped)[0], rtol=1e-5, atol=1e-7
    )


def test_without_jit():
    tx, params = _transformation(SGD, update_period=1, update_stop=6), network(SMALL)
    grads = random_gradients(5, params, 4)
    step, other_params, state = stepper(tx), params, tx.init(params)
    other = state
    for t in range(4):
        grad = at_step(grads, t)
        other_params, other = step(other_params, other, grad)
        before = len(COMPILED)
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(kept(state)[0], kept(other)[0])
    assert kept(state)[0].sum() == _budget(shapes=SMALL)
    np.testing.assert_allclose(
        kernels(params)[0], kernels(other_params)[0], rtol=1e-5, atol=1e-7
    )
    # Without jit every operation is compiled once, and not again at every step.
    assert len(COMPILED) == before


def test_vmap_over_seeds_gives_each_its_own_mask():
    params = network(SMALL)
    grads = random_gradients(9, params, 10)

    def run(seed):
        return _scan(_transformation(key=jax.random.key(seed)), params, grads)

    trained, states = jax.jit(jax.vmap(run))(jnp.arange(3))
    (together,) = jax.tree.leaves(sparse_optax.get_masks(states))
    for seed in range(3):
        tx = _transformation(key=seed)
        alone, state = _loop(_default_step(), params, tx.init(params), grads)
        np.testing.assert_array_equal(together[seed], kept(state)[0])
        np.testing.assert_allclose(
            kernels(trained)[0][seed], kernels(alone)[0], rtol=1e-5, atol=1e-6
        )
        assert together[seed].sum() == _budget(shapes=SMALL)
    assert (together[0] != together[1]).any()
    assert (together[1] != together[2]).any()


def test_vmap_with_cycles_due_at_different_steps():
    """Members of a batch that stand at different counts, one due and one not."""
    tx, step = _transformation(), _default_step()
    params = network(SMALL)
    grads = random_gradients(9, params, PERIOD + 1)
    early = _loop(step, params, tx.init(params), at_step(grads, slice(0, 1)))
    due = _loop(step, params, tx.init(params), at_step(grads, slice(0, PERIOD)))
    grad = at_step(grads, PERIOD)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), early, due)
    _, states = jax.jit(jax.vmap(lambda p, s: tx.update(grad, s, p)))(*stacked)
    (together,) = jax.tree.leaves(sparse_optax.get_masks(states))
    for i, (params, state) in enumerate((early, due)):
        (before,) = kept(state)
        _, state = step(params, state, grad)
        assert (before != kept(state)[0]).any() == (i == 1)
        np.testing.assert_array_equal(together[i], kept(state)[0])


STATIC = ("inner", "density", "update_period", "update_stop", "key")


def test_inject_hyperparams_of_the_prune_rate():
    make = optax.inject_hyperparams(sparse_momentum_regrow, static_args=STATIC)
    settings = dict(density=0.3, update_period=PERIOD, update_stop=STOP, key=1)
    injected = make(inner=SGD, prune_rate=0.4, **settings)
    plain = _transformation(SGD, prune_rate=0.4)
    params = network(SMALL)
    grads = random_gradients(5, params, 2 * PERIOD + 1)
    a, state_a = _loop(step := stepper(injected), params, injected.init(params), grads)
    b, state_b = _loop(stepper(plain), params, plain.init(params), grads)
    np.testing.assert_array_equal(kept(state_a)[0], kept(state_b)[0])
    np.testing.assert_allclose(kernels(a)[0], kernels(b)[0], rtol=1e-5, atol=1e-7)
    assert int(jax.tree.leaves(optax.tree.get(state_a, "removed"))[0]) == 7
    # Set to zero by hand, the injected rate stops the exchange of weights.
    state_a.hyperparams["prune_rate"] = jnp.zeros([])
    _, state = _loop(step, a, state_a, at_step(grads, slice(0, PERIOD)))
    np.testing.assert_array_equal(kept(state_a)[0], kept(state)[0])


def test_multi_steps_outside():
    """Mini-steps leave parameters alone; a cycle counts real steps; zeros survive."""
    tx = optax.MultiSteps(_transformation(), 2)
    params = network(SMALL)
    grads = random_gradients(5, params, 2 * PERIOD + 2)
    step, state = stepper(tx), tx.init(params)
    plain, plain_params = _transformation(), params
    plain_step, plain_state = _default_step(), plain.init(params)
    for t in range(2 * PERIOD + 2):
        before = params
        params, state = step(params, state, at_step(grads, t))
        if t % 2 == 0:
            for a, b in zip(kernels(before), kernels(params), strict=True):
                np.testing.assert_array_equal(a, b)
        else:
            mean = jax.tree.map(lambda g: (g[t - 1] + g[t]) / 2, grads)  # noqa: B023
            plain_params, plain_state = plain_step(plain_params, plain_state, mean)
            for a, b in zip(kernels(params), kernels(plain_params), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
            for m, w in zip(kept(state), kernels(params), strict=True):
                np.testing.assert_array_equal(w[~m], 0.0)
    for a, b in zip(kept(state), kept(plain_state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(optax.tree.get(state, "RegrowState").count) == PERIOD + 1


def test_a_donated_state_takes_nothing_of_the_callers():
    """Key and masks that were handed in are still there after the first step."""
    given = mask_tree([np.arange(63).reshape(9, 7) % 3 == 0])
    params = network(SMALL)

    @functools.partial(jax.jit, donate_argnums=0)
    def lose(state):
        return jax.tree.map(lambda x: x + 1 if x.dtype != bool else ~x, state)

    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        tx = sparse_momentum_regrow(
            SGD, masks=given, update_period=2, update_stop=9, key=key
        )
        lose(tx.init(params))
        assert sparse_optax.masks.count(given) == 21
        assert jax.random.bits(key) >= 0


def test_unknown_extra_arguments_pass():
    tx, params = _transformation(), network(SMALL)
    state = tx.init(params)
    jax.eval_shape(lambda: tx.update(params, state, params, loss=jnp.zeros([])))


def test_no_retrace():
    """The second call finds its state as the first one found its own."""
    traces = []
    tx, params = _transformation(), network(SMALL)

    @jax.jit
    def step(params, state, grads):
        traces.append(0)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, params)
    assert len(traces) == 1


def test_abstract_init():
    params = network(SHAPES)
    tx = _transformation()
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    shapes = jax.eval_shape(tx.init, abstract)
    concrete = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tx.init(params)
    )
    assert shapes == concrete


# --- containers -----------------------------------------------------------------------


def test_none_leaves():
    params = {"Dense_0": {"kernel": jnp.ones((4, 5)), "bias": None}, "rest": ()}
    tx = _transformation(SGD, update_period=1)
    params, state = _loop(
        stepper(tx), params, tx.init(params), random_gradients(0, params, 3)
    )
    assert params["Dense_0"]["bias"] is None
    assert sparse_optax.masks.count(sparse_optax.get_masks(state)) == 6
    assert 0 < int((params["Dense_0"]["kernel"] != 0).sum()) <= 6


@pytest.mark.parametrize("empty", [{}, (), {"a": None}])
def test_empty_trees(empty):
    tx = _transformation(SGD, update_period=1)
    state = tx.init(empty)
    for _ in range(3):
        updates, state = tx.update(empty, state, empty)
        assert updates == empty
    assert int(state.count) == 3


def test_given_masks_are_the_start_and_the_budget():
    rng = np.random.default_rng(2)
    given = mask_tree([rng.random(s) < 0.2 for s in SMALL])
    tx = sparse_momentum_regrow(
        SGD, masks=given, update_period=2, update_stop=10, key=0
    )
    params = network(SMALL)
    state = tx.init(params)
    np.testing.assert_array_equal(kept(state)[0], kernels(given)[0])
    _, state = _loop(stepper(tx), params, state, random_gradients(0, params, 6))
    assert kept(state)[0].sum() == sparse_optax.masks.count(given)
    assert (kept(state)[0] != kernels(given)[0]).any()


@pytest.mark.parametrize("start", ["density", "masks"])
def test_map_params_finds_the_trees_like_params(start):
    """Optax calls ``init`` with a placeholder that has no leaves."""
    given = mask_tree([np.arange(63).reshape(9, 7) % 3 == 0])
    start = dict(density=0.3) if start == "density" else dict(masks=given)
    tx = sparse_momentum_regrow(SGD, update_period=2, update_stop=9, key=0, **start)
    state = tx.init(network(SMALL))
    mapped = optax.tree.map_params(tx, lambda x: x, state)
    jax.tree.map(np.testing.assert_array_equal, state, mapped)
    hit = optax.tree.map_params(
        tx,
        lambda x: "params",
        state,
        transform_non_params=lambda x: "other",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    assert hit.count == hit.skipped == "other"
    assert set(jax.tree.leaves(hit.inner_state)) == {"params"}


def test_stacked_slices_are_layers():
    """A scanned leaf with two slices trains as two layers do."""
    rng = np.random.default_rng(3)
    flat = [rng.normal(size=(6, 5)).astype(np.float32) for _ in range(2)]
    momentum = [rng.normal(size=(6, 5)).astype(np.float32) for _ in range(2)]
    momentum[1] *= 3
    params = {"block": {"kernel": jnp.stack([jnp.asarray(w) for w in flat], axis=1)}}
    grad = {"block": {"kernel": jnp.stack([jnp.asarray(m) for m in momentum], axis=1)}}
    tx = sparse_momentum_regrow(
        optax.sgd(0.0, momentum=0.5),
        density=0.5,
        update_period=1,
        prune_rate=0.4,
        key=0,
        stacked={"block/kernel": 1},
    )
    step, state = stepper(tx), tx.init(params)
    (start,) = kept(state)
    assert [int(start[:, i].sum()) for i in (0, 1)] == [15, 15]
    params, state = step(params, state, grad)
    sparse = [np.where(start[:, i], w, 0) for i, w in enumerate(flat)]
    wanted, removed, grown, _ = oracles.sparse_momentum_cycle(
        sparse, [start[:, 0], start[:, 1]], momentum, 0.4
    )
    params, state = step(params, state, grad)
    (after,) = kept(state)
    for i in (0, 1):
        np.testing.assert_array_equal(after[:, i], wanted[i])
    assert grown[0] < grown[1]
    np.testing.assert_array_equal(jax.tree.leaves(state.removed)[0], removed)
    np.testing.assert_array_equal(jax.tree.leaves(state.grown)[0], grown)


def test_packed_masks_train_the_same():
    params = network(SMALL)
    grads = random_gradients(5, params, 6)
    tx, packed_tx = _transformation(), _transformation(packed=True)
    plain, state = _loop(_default_step(), params, tx.init(params), grads)
    packed, packed_state = _loop(
        stepper(packed_tx), params, packed_tx.init(params), grads
    )
    for a, b in zip(kept(state), kept(packed_state), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(kernels(plain), kernels(packed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    size = lambda s: sum(x.nbytes for x in jax.tree.leaves(s.regrow_masks))  # noqa: E731
    assert size(packed_state) < 0.3 * size(state)


def test_reset_moments_of_grown_weights():
    """`reset_moments="grown"` starts a grown weight without a history."""
    params = network(SMALL)
    grads = random_gradients(5, params, PERIOD + 1)
    last = kernels(at_step(grads, PERIOD))[0]
    traces = {}
    for reset in ("none", "grown"):
        tx = _transformation(SGD, prune_rate=0.4, reset_moments=reset)
        step, state = stepper(tx), tx.init(params)
        trained, state = _loop(step, params, state, at_step(grads, slice(0, PERIOD)))
        (before,) = kept(state)
        trained, state = step(trained, state, at_step(grads, PERIOD))
        (after,) = kept(state)
        # From missing, or pruned in this cycle and so at zero now.
        grown = after & (~before | (kernels(trained)[0] == 0))
        assert (grown & ~before).any()
        traces[reset] = kernels(optax.tree.get(state.inner_state, "trace"))[0]
    np.testing.assert_array_equal(traces["grown"][grown], last[grown])
    assert not np.isclose(traces["none"][grown], last[grown]).any()
    np.testing.assert_allclose(
        traces["none"][~grown], traces["grown"][~grown], rtol=1e-5, atol=1e-6
    )


def _one_cycle(inner, **kwargs):
    """States of the inner optimizer before and after the update of a cycle, the
    parameters after it, and which weights have grown from missing at it.
    """
    tx = sparse_optax.rigl(
        inner, density=0.3, update_period=3, update_stop=30, key=0, **kwargs
    )
    params = network(SMALL)
    grads = random_gradients(5, params, 4)
    step, state = stepper(tx), tx.init(params)
    params, state = _loop(step, params, state, at_step(grads, slice(0, 3)))
    before, (mask,) = state.inner_state, kept(state)
    params, state = step(params, state, at_step(grads, 3))
    grown = kept(state)[0] & ~mask
    assert grown.any()
    return before, state.inner_state, params, grown


def test_reset_moments_are_those_of_init():
    """Rprop starts from its learning rate: with zero no grown weight ever moves."""
    before, after, _, grown = _one_cycle(optax.rprop(1e-2, min_step_size=1e-4))
    sizes = [kernels(optax.tree.get(s, "step_sizes"))[0] for s in (before, after)]
    assert (sizes[0][grown] != np.float32(1e-2)).any()
    np.testing.assert_array_equal(sizes[1][grown], np.float32(1e-2))
    # What its next update takes.
    (following,) = kernels(optax.tree.get(after, "prev_updates"))
    np.testing.assert_allclose(np.abs(following[grown]), 1e-2, rtol=1e-6)


def test_reset_moments_of_an_optimizer_that_copies_the_weights():
    """Schedule-free keeps a copy z of the weights, which is zero where they are."""
    inner = optax.contrib.schedule_free_sgd(0.1)
    _, after, _, grown = _one_cycle(inner)
    _, kept_on, _, _ = _one_cycle(inner, reset_moments="none")
    grads = random_gradients(5, network(SMALL), 4)
    (last,) = kernels(at_step(grads, 3))
    z, other = (kernels(optax.tree.get(s, "z"))[0] for s in (after, kept_on))
    np.testing.assert_allclose(z[grown], -0.1 * last[grown], rtol=1e-5)
    assert not np.isclose(other[grown], z[grown]).any()


def test_factored_statistics_do_not_restart():
    """SM3 keeps a list of row and column statistics where a weight tree has a leaf."""
    _, after, params, grown = _one_cycle(optax.sm3(0.1))
    (nu,) = kernels(after[0].nu)
    assert np.isfinite(nu).all()
    assert (kernels(params)[0][grown] != 0).all()


@pytest.mark.parametrize(
    ("inner", "value"),
    [
        (optax.flatten(optax.adam(1e-3)), "'0/mu'"),
        (optax.lbfgs(), "weights_memory"),
        (optax.scale_by_lbfgs(), "numbers for each weight"),
        (optax.contrib.acprop(1e-3), r"a step of \d"),
    ],
    ids=["flatten", "lbfgs", "history", "acprop"],
)
@pytest.mark.parametrize("method", ["rigl", "granet"])
def test_optimizers_whose_moments_cannot_restart(method, inner, value):
    make = functools.partial(
        getattr(sparse_optax, method),
        inner,
        density=0.3,
        update_period=3,
        update_stop=30,
        key=0,
    )
    with refuses(method, "`reset_moments`", value, "one number|of their size"):
        make().init(network(SMALL))
    make(reset_moments="none").init(network(SMALL))


def test_a_line_search_behind_an_optimizer_can_restart():
    """Optax cannot walk such a state; names and shapes find the moments."""
    chain = optax.chain(optax.adam(0.1), optax.scale_by_zoom_linesearch(5))
    params = network(SMALL)
    state = chain.init(params)
    layers = layers_of(params)
    found = restart.restart_of(chain, state, layers, params)
    paths = jax.tree.leaves_with_path(state)
    names = [path_name(paths[j][0]) for j, _ in found.places]
    assert [n.split("/")[-3] for n in names] == ["mu", "nu", "grad"]


def _is_identity(equation):
    """Whether it gives the moments their derivative, and computes nothing."""
    body = equation.params.get("call_jaxpr")
    return equation.primitive.name == "custom_jvp_call" and not body.eqns


def test_moments_restart_in_the_branch_of_a_cycle_alone():
    """The operations of the other steps are those of `reset_moments="none"`."""
    params, made = network(SMALL), {}
    for reset in ("none", "grown"):
        tx = _transformation(optax.adam(0.1), reset_moments=reset)
        traced = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
        made[reset] = [
            each.primitive.name for each in traced.eqns if not _is_identity(each)
        ]
    assert made["grown"] == made["none"]


def test_alone_at_the_end_of_a_chain():
    """Without `inner` the evidence is the incoming update; all zero: no cycle."""
    tx = sparse_momentum_regrow(
        density=0.3, update_period=PERIOD, update_stop=STOP, prune_rate=0.4, key=1
    )
    params = network(SMALL)
    incoming = random_gradients(5, params, PERIOD + 1)
    step, state = stepper(tx), tx.init(params)
    params, state = _loop(step, params, state, at_step(incoming, slice(0, PERIOD)))
    before, last = kept(state), at_step(incoming, PERIOD)
    wanted, *_ = oracles.sparse_momentum_cycle(
        kernels(params), before, kernels(last), 0.4
    )
    _, after = step(params, state, last)
    assert (wanted[0] != before[0]).any()
    np.testing.assert_array_equal(kept(after)[0], wanted[0])
    _, after = step(params, state, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_array_equal(kept(after)[0], before[0])
    assert int(after.skipped) == 0
