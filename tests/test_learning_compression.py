"""Learning-compression: a penalty towards the projection, then the cut."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from helpers import at_step, kernels, network, random_gradients, refuses, stepper

import sparse_optax
from sparse_optax import budgets, masks, patterns

SHAPES = ((6, 5), (5, 4))
RATE, PENALTY, GROWTH, PERIOD, STOP = 0.1, 0.5, 1.5, 3, 10
STEPS = STOP + 3


def np_lc(params, grads, keep, multipliers):
    """Learning and compression steps, the cut, and SGD after it; float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    names = sorted(params)
    weights = [params[n]["kernel"] for n in names]
    slopes = [np.zeros_like(w) for w in weights]
    mask = [np.ones(w.shape, bool) for w in weights]
    for t in range(STEPS):
        g = [np.asarray(grads[n]["kernel"][t], np.float64) for n in names]
        if t == STOP:
            mask = oracles.top_k([np.abs(w) for w in weights], keep)
        if t < STOP:
            j = t // PERIOD
            if t % PERIOD == 0:
                before = PENALTY * GROWTH ** (j - 1)
                shifted = [w - s / before for w, s in zip(weights, slopes, strict=True)]
                kept = oracles.top_k([np.abs(v) for v in shifted], keep)
                target = [np.where(m, v, 0) for m, v in zip(kept, shifted, strict=True)]
                if j and multipliers:
                    slopes = [
                        s - before * (w - a)
                        for s, w, a in zip(slopes, weights, target, strict=True)
                    ]
            mu = PENALTY * GROWTH**j
            g = [
                x + mu * (w - a) - s
                for x, w, a, s in zip(g, weights, target, slopes, strict=True)
            ]
        weights = [
            np.where(m, w - RATE * x, 0)
            for m, w, x in zip(mask, weights, g, strict=True)
        ]
    for n in names:
        params[n]["bias"] -= RATE * np.asarray(grads[n]["bias"], np.float64).sum(0)
    return weights, mask, params


def method(inner=None, **options):
    settings = {
        "density": 0.3,
        "update_period": PERIOD,
        "update_stop": STOP,
        "penalty": PENALTY,
        "growth": GROWTH,
    }
    inner = optax.sgd(RATE) if inner is None else inner
    return sparse_optax.learning_compression(inner, **settings | options)


@pytest.mark.parametrize("multipliers", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_steps_of_the_definition(seed, multipliers):
    params = network(SHAPES)
    grads = random_gradients(seed, params, STEPS)
    keep = sum(budgets.count(0.3, w.size) for w in kernels(params))
    want, mask, whole = np_lc(params, grads, keep, multipliers)
    tx = method(multipliers=multipliers)
    state, step = tx.init(params), stepper(tx)
    for t in range(STEPS):
        params, state = step(params, state, at_step(grads, t))
        if t < STOP:
            assert all((w != 0).all() for w in kernels(params))
    for got, w in zip(kernels(params), want, strict=True):
        np.testing.assert_allclose(got, w, rtol=1e-3, atol=1e-4)
    for got, m in zip(kernels(sparse_optax.get_masks(state)), mask, strict=True):
        np.testing.assert_array_equal(got, m)
    for n in params:
        np.testing.assert_allclose(params[n]["bias"], whole[n]["bias"], rtol=1e-4)
    # One pool: the shares of the layers are found and not given.
    counts = [int(m.sum()) for m in mask]
    assert sum(counts) == keep
    assert step._cache_size() == 1


def test_without_a_loss_the_cut_is_free():
    """The other weights go to zero, and the K largest stay as they are."""
    start = network(SHAPES)
    params, still = start, jax.tree.map(jnp.zeros_like, start)
    tx = method(update_stop=60, multipliers=False, penalty=2.0, growth=1.0)
    state, step = tx.init(params), stepper(tx)
    for _ in range(60):
        params, state = step(params, state, still)
    kept = masks.magnitude_masks(start, budgets.nonzeros(15))
    for w, first, m in zip(kernels(params), kernels(start), kernels(kept), strict=True):
        np.testing.assert_array_equal(w[m], first[m])
        assert np.abs(w[~m]).max() < 1e-3


def test_two_of_four_and_stacked_layers():
    params = {"w": jnp.float32(np.random.default_rng(0).normal(size=(3, 8, 4)))}
    tx = method(
        density=None,
        pattern=patterns.n_m(2, 4, axis=1),
        stacked={"w": 0},
        update_stop=6,
    )
    state, step = tx.init(params), stepper(tx)
    grads = random_gradients(0, params, 8)
    for t in range(8):
        params, state = step(params, state, at_step(grads, t))
    mask = np.asarray(sparse_optax.get_masks(state)["w"])
    np.testing.assert_array_equal(mask.reshape(3, 2, 4, 4).sum(2), 2)
    np.testing.assert_array_equal(np.asarray(params["w"]) != 0, mask)


def test_halves_keep_their_dtype():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), network(SHAPES))
    tx = method()
    state, step = tx.init(params), stepper(tx)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for t in range(STEPS):
        grads = at_step(random_gradients(1, params, STEPS), t)
        params, state = step(params, state, grads)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
    assert all(w.dtype == jnp.bfloat16 for w in jax.tree.leaves(params))
    assert sum(int((w != 0).sum()) for w in kernels(params)) == 15


@pytest.mark.parametrize(
    ("options", "argument", "value", "allowed"),
    [
        ({"penalty": 0.0}, "penalty", "0.0", "above 0"),
        ({"growth": 0.5}, "growth", "0.5", "at least 1"),
        ({"multipliers": 1}, "multipliers", "1", "True or False"),
        ({"update_period": 0}, "update_period", "0", "at least 1"),
        ({"update_stop": 2}, "update_stop", "2", "at least 3"),
        ({"density": 1.5}, "density", "1.5", r"\(0, 1\]"),
        ({"inner": "sgd"}, "inner", "sgd", "GradientTransformation"),
    ],
)
def test_wrong_input(options, argument, value, allowed):
    with refuses("learning_compression", argument, value, allowed):
        method(**options)
