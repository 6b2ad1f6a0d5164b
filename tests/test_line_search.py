"""Losses and other extra arguments on their way to the wrapped optimizer.

The oracle of a line search is the least-squares solution on the kept columns.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses

import sparse_optax

RNG = np.random.default_rng(0)
A = RNG.normal(size=(40, 12)).astype(np.float32)
Y = RNG.normal(size=(40, 2)).astype(np.float32)
START = RNG.normal(size=(12, 2)).astype(np.float32)
CYCLES = dict(density=0.5, update_period=5, update_stop=20, key=0)


def loss(params, scale=1.0):
    return scale * jnp.sum((A @ params["w"] - Y) ** 2)


def least(mask):
    """The smallest loss under a mask: each column is a problem of its own."""
    total = 0.0
    for kept, y in zip(mask.T, Y.T, strict=True):
        x, *_ = np.linalg.lstsq(A[:, kept].astype(np.float64), y, rcond=None)
        total += ((A[:, kept] @ x - y) ** 2).sum()
    return total


def minimised(tx, *, steps=30, stored=False, sparse_start=False):
    """Trains on the whole loss; gives the weights, the masks and the first losses."""
    params = {"w": jnp.asarray(START)}
    state = tx.init(params)
    if sparse_start:
        params = sparse_optax.sparsify(params, state)
    of_state = optax.value_and_grad_from_state(loss)

    @jax.jit
    def step(params, state):
        if stored:
            value, grads = of_state(params, state=state)
        else:
            value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=loss
        )
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return np.asarray(params["w"]), np.asarray(sparse_optax.get_masks(state)["w"])


def backtracking(momentum=None):
    return optax.chain(
        optax.sgd(1.0, momentum=momentum),
        optax.scale_by_backtracking_linesearch(20, store_grad=True),
    )


METHODS = {
    "static": lambda: sparse_optax.static_sparse(optax.lbfgs(), density=0.5, key=0),
    "rigl": lambda: sparse_optax.rigl(backtracking(), reset_moments="none", **CYCLES),
    "sparse_momentum": lambda: sparse_optax.sparse_momentum_regrow(
        optax.lbfgs(), **CYCLES
    ),
    "own_momentum": lambda: sparse_optax.sparse_momentum_regrow(
        backtracking(0.5), **CYCLES
    ),
}


@pytest.mark.parametrize("stored", [False, True], ids=["given", "stored"])
@pytest.mark.parametrize("method", METHODS)
def test_line_search_ends_at_the_masked_optimum(method, stored):
    weights, mask = minimised(METHODS[method](), stored=stored)
    assert mask.sum() == 12
    assert (weights[~mask] == 0).all()
    np.testing.assert_allclose(loss({"w": weights}), least(mask), rtol=2e-5)


def test_growth_sees_the_dense_gradient_behind_a_stored_one():
    """A gradient that a line search stores is no masked one: RigL would grow by zeros,
    which is at the first missing weights.
    """
    make = METHODS["rigl"]
    _, given = minimised(make(), steps=12)
    _, stored = minimised(make(), steps=12, stored=True)
    np.testing.assert_array_equal(given, stored)


def test_line_search_around_masks_that_stay():
    inner = sparse_optax.static_sparse(optax.sgd(1.0), density=0.5, key=0)
    search = optax.scale_by_backtracking_linesearch(20, store_grad=True)
    weights, mask = minimised(optax.chain(inner, search), steps=60, sparse_start=True)
    assert (weights[~mask] == 0).all()
    np.testing.assert_allclose(loss({"w": weights}), least(mask), rtol=1e-3)


def test_hidden_weights_have_no_line_search():
    for method in (
        functools.partial(sparse_optax.straight_through_magnitude, density=0.5),
        functools.partial(sparse_optax.network_surgery, density=0.5),
    ):
        with refuses(method.func.__name__, "inner", "line search", "learning rate"):
            method(optax.lbfgs()).init({"w": jnp.asarray(START)})


# --- optimizers that take no other arguments ------------------------------------------
def narrow():
    """An optimizer with one argument of its own, and no others."""

    def update(updates, state, params=None, *, value):
        return jax.tree.map(lambda g: -value * g, updates), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: optax.chain(optax.clip(9), x)])
def test_no_argument_leaks_into_an_optimizer_that_does_not_take_it(wrap):
    tx = sparse_optax.static_sparse(wrap(narrow()), density=0.5, key=0)
    params = {"w": jnp.ones((4, 3))}
    state = tx.init(params)
    updates, _ = tx.update(params, state, params, value=0.25)
    mask = np.asarray(sparse_optax.get_masks(state)["w"])
    np.testing.assert_array_equal(updates["w"], np.where(mask, -0.25, -1.0))


def test_another_error_of_the_optimizer_is_not_hidden():
    tx = sparse_optax.static_sparse(narrow(), density=0.5, key=0)
    params = {"w": jnp.ones((4, 3))}
    with pytest.raises(TypeError, match="value"):
        tx.update(params, tx.init(params), params)


def test_masks_reach_an_optimizer_that_asks_for_them():
    seen = []

    def update(updates, state, params=None, *, regrow_masks):
        seen.append(regrow_masks)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update
    )
    tx = sparse_optax.static_sparse(inner, density=0.5, key=0)
    params = {"w": jnp.ones((4, 3))}
    tx.update(params, tx.init(params), params)
    assert int(seen[0]["w"].sum()) == 6


def test_a_loss_may_ask_for_the_masks_too():
    seen = []

    def counted(params, regrow_masks):
        seen.append(regrow_masks)
        return jnp.sum(params["w"] ** 2)

    inner = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(3))
    tx = sparse_optax.static_sparse(inner, density=0.5, key=0)
    params = {"w": jnp.ones((4, 3))}
    masks = sparse_optax.get_masks(tx.init(params))
    tx.update(
        params,
        tx.init(params),
        params,
        value=jnp.float32(12.0),
        grad=params,
        value_fn=counted,
        regrow_masks=masks,
    )
    assert seen


# --- derivatives ----------------------------------------------------------------------
def test_derivative_by_hand():
    """24 of 48 weights are kept: 24 (1 - lr)^4 has the derivative -96 (1 - lr)^3."""

    def size(rate):
        tx = sparse_optax.rigl(
            optax.sgd(rate), density=0.5, update_period=100, update_stop=1000, key=0
        )
        params = {"w": jnp.ones((8, 6))}
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params["w"] ** 2)

    wanted = -96 * 0.9**3
    np.testing.assert_allclose(jax.grad(size)(0.1), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(size, (0.1,), (1.0,))[1], wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.linearize(size, 0.1)[1](1.0), wanted, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(jax.jit(size))(0.1), wanted, rtol=1e-5)
