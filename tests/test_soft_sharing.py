"""Soft weight-sharing: the gradient of a mixture prior, and the merging after it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import network, refuses

import sparse_optax
from sparse_optax import masks
from sparse_optax.transforms import mixture as mixtures

RNG = np.random.default_rng(3)
SHAPES = ((6, 5), (5, 4))
N, TAU = 50, 0.2
MEANS = np.array([-0.5, 0.1, 0.7])
LOGS = np.array([3.0, 1.0, 2.0, 1.5])
SHARES = np.array([0.3, -0.2, 0.5])
ZERO = 0.9


def np_prior(weights, means, logs, shares, zero=ZERO):
    """-log p(w) over all weights, and the Gamma priors of the precisions."""
    means = np.concatenate([[0.0], means])
    parts = np.exp(shares - shares.max())
    parts = np.concatenate([[zero], (1 - zero) * parts / parts.sum()])
    precisions = np.exp(logs)
    flat = np.concatenate([np.ravel(w) for w in weights])[:, None]
    density = np.sqrt(precisions / (2 * np.pi)) * np.exp(
        -precisions / 2 * (flat - means) ** 2
    )
    shape = np.array([5e3] + [2.5e2] * (len(logs) - 1))
    rate = np.array([2.0] + [0.1] * (len(logs) - 1))
    gamma = (1 - shape) * logs + rate * precisions
    return -np.log(density @ parts).sum() + gamma.sum()


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


def test_gradients_are_those_of_the_definition():
    weights = [RNG.normal(size=s) for s in SHAPES]
    mixture = mixtures.Mixture(*(jnp.float32(x) for x in (MEANS, LOGS, SHARES)))
    got = [mixtures.slopes(jnp.float32(w), mixture, ZERO) for w in weights]
    for i, (slope, _) in enumerate(got):

        def of_leaf(w, i=i):
            return np_prior([*weights[:i], w, *weights[i + 1 :]], MEANS, LOGS, SHARES)

        want = differences(of_leaf, weights[i])
        np.testing.assert_allclose(slope, want, rtol=2e-3, atol=2e-3)
    total = jax.tree.map(lambda a, b: a + b, got[0][1], got[1][1])
    total = total._replace(
        log_precisions=total.log_precisions
        + mixtures._prior_slope(mixture.log_precisions)
    )
    wants = (
        differences(lambda x: np_prior(weights, x, LOGS, SHARES), MEANS),
        differences(lambda x: np_prior(weights, MEANS, x, SHARES), LOGS),
        differences(lambda x: np_prior(weights, MEANS, LOGS, x), SHARES),
    )
    for a, b in zip(total, wants, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3)


def test_an_update_adds_it_and_moves_the_mixture_by_adam():
    params = network(SHAPES)
    tx = sparse_optax.soft_weight_sharing(
        examples=N, strength=TAU, components=4, zero_share=ZERO
    )
    state = tx.init(params)
    np.testing.assert_allclose(state.mixture.means, [-0.6, 0, 0.6], atol=1e-6)
    np.testing.assert_allclose(
        state.mixture.log_precisions, np.full(4, np.log(16)), rtol=1e-6
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, new = jax.jit(tx.update)(grads, state, params)
    weights = [np.asarray(params[n]["kernel"], np.float64) for n in sorted(params)]
    now = [np.asarray(x, np.float64) for x in state.mixture]
    for i, name in enumerate(sorted(params)):

        def of_leaf(w, i=i):
            return np_prior([*weights[:i], w, *weights[i + 1 :]], *now)

        want = 1 + TAU / N * differences(of_leaf, weights[i])
        np.testing.assert_allclose(updates[name]["kernel"], want, rtol=2e-3, atol=1e-4)
        np.testing.assert_array_equal(updates[name]["bias"], 1)
    # The first step of Adam is the learning rate against the sign of the gradient.
    slopes = [
        differences(
            lambda x, k=k: np_prior(weights, *now[:k], x, *now[k + 1 :]), now[k]
        )
        for k in range(3)
    ]
    for k, rate in enumerate((1e-4, 3e-3, 3e-3)):
        step = np.asarray(new.mixture[k], np.float64) - now[k]
        sure = np.abs(slopes[k]) > 1e-3
        np.testing.assert_allclose(
            step[sure], -rate * np.sign(slopes[k][sure]), rtol=0.02
        )
    assert int(new.count) == 1


def test_strength_may_be_a_schedule():
    params = {"w": jnp.ones((2, 2))}
    zeros = jax.tree.map(jnp.zeros_like, params)

    def slope(strength, state=None):
        tx = sparse_optax.soft_weight_sharing(examples=N, strength=strength)
        state = tx.init(params) if state is None else state
        return tx.update(zeros, state, params)

    one, state = slope(TAU)
    off, _ = slope(lambda count: jnp.where(count < 1, 0.0, TAU))
    np.testing.assert_array_equal(off["w"], 0)
    on, _ = slope(lambda count: jnp.where(count < 1, 0.0, TAU), state)
    assert (np.asarray(on["w"]) != 0).all()
    assert (np.asarray(one["w"]) > 0).all()


def np_share(weights, means, logs, shares):
    """The mean of the component that is most responsible, weight by weight."""
    out = np.empty_like(weights)
    for place, w in np.ndenumerate(weights):
        score = shares + 0.5 * logs - 0.5 * np.exp(logs) * (w - means) ** 2
        out[place] = means[np.argmax(score)]
    return out


def state_of(params, means, logs, shares, zero=ZERO):
    tx = sparse_optax.soft_weight_sharing(
        examples=N, components=len(logs), zero_share=zero
    )
    values = (jnp.float32(x) for x in (means, logs, shares))
    return tx.init(params)._replace(mixture=mixtures.Mixture(*values))


def test_weights_take_the_mean_of_their_component():
    params = network(SHAPES)
    # The second and third are the same and become one, with the sum of their shares.
    means, logs = np.array([-0.5, -0.5, 0.7]), np.array([3.0, 2.0, 2.0, 1.5])
    state = state_of(params, means, logs, SHARES)
    got = sparse_optax.share_weights(params, (state, optax.EmptyState()))
    parts = 0.1 * np.exp(SHARES) / np.exp(SHARES).sum()
    joined = np.log([0.9, parts[0] + parts[1], parts[2]])
    for name in params:
        kernel = np.asarray(params[name]["kernel"], np.float64)
        want = np_share(
            kernel, np.array([0, -0.5, 0.7]), np.array([3.0, 2.0, 1.5]), joined
        )
        np.testing.assert_allclose(got[name]["kernel"], want, rtol=1e-6)
        np.testing.assert_array_equal(got[name]["bias"], params[name]["bias"])
        assert len(np.unique(want)) == 3


def test_the_component_nearest_to_zero_is_at_zero():
    new, logs, shares = mixtures.merged(
        np.array([0.0, 0.0, 0.4]), np.array([2.0, 2.0, 1.0]), np.log([0.5, 0.2, 0.3])
    )
    np.testing.assert_allclose(new, [0, 0.4])
    np.testing.assert_allclose(logs, [2, 1])
    np.testing.assert_allclose(np.exp(shares), [0.7, 0.3])


def test_a_network_is_pruned_and_shared():
    """Weights of a few values and noise: the noise goes, the values stay."""
    rng = np.random.default_rng(0)
    truth = np.zeros((20, 10))
    places = rng.permutation(200)[:20]
    truth.ravel()[places] = rng.choice([-0.5, 0.5], 20)
    x = rng.normal(size=(200, 20))
    y = x @ truth
    params = {"w": jnp.float32(truth + 0.05 * rng.normal(size=truth.shape))}
    tx = optax.chain(
        sparse_optax.soft_weight_sharing(examples=200, strength=0.1),
        optax.adam(1e-3),
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean((x @ p["w"] - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(800):
        params, state = step(params, state)
    shared = sparse_optax.share_weights(params, state)
    np.testing.assert_array_equal(np.asarray(shared["w"]) != 0, truth != 0)
    assert len(np.unique(shared["w"])) <= 16
    assert masks.count(masks.nonzero_masks(shared)) == 20
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "argument", "value", "allowed"),
    [
        ({"examples": 0}, "examples", "0", "at least 1"),
        ({"strength": -1.0}, "strength", "-1.0", "at least 0"),
        ({"components": 1}, "components", "1", "at least 2"),
        ({"zero_share": 1.0}, "zero_share", "1.0", r"\(0, 1\)"),
        ({"spread": 0.0}, "spread", "0.0", "above 0"),
        ({"deviation": -0.1}, "deviation", "-0.1", "above 0"),
        ({"mean_rate": -1.0}, "mean_rate", "-1.0", "at least 0"),
        ({"rate": float("nan")}, "rate", "nan", "at least 0"),
        ({"where": 3}, "where", "3", "tree of bools"),
    ],
)
def test_wrong_input(options, argument, value, allowed):
    with refuses("soft_weight_sharing", argument, value, allowed):
        sparse_optax.soft_weight_sharing(**{"examples": 10} | options)


def test_wrong_trees():
    params = network(SHAPES)
    tx = sparse_optax.soft_weight_sharing(examples=10)
    state = tx.init(params)
    with refuses("soft_weight_sharing", "params", "None"):
        tx.update(params, state)
    with refuses("soft_weight_sharing", "params", "Dense_0"):
        tx.update({"Dense_0": params["Dense_0"]}, state, {"Dense_0": params["Dense_0"]})
    with refuses("share_weights", "opt_state", "EmptyState", "soft_weight_sharing"):
        sparse_optax.share_weights(params, optax.EmptyState())
    with refuses("share_weights", "params", "Dense_1", "Dense_0"):
        sparse_optax.share_weights({"Dense_0": params["Dense_0"]}, state)
    with refuses("share_weights", "opt_state", "traced", "jit"):
        jax.jit(sparse_optax.share_weights)(params, state)
