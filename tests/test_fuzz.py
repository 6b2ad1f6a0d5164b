"""Random programs against what the library guarantees.

A program is a random tree of parameters, an optimizer, a method and a wrapper, trained
for a few steps on random gradients. The default run tries a few; ``pytest -m fuzz``
many. The same number gives the same program.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict
from helpers import kept, stepper

import sparse_optax
from sparse_optax import selection

STEPS = 6
SHAPES = ((6, 5), (4, 3), (5, 1), (1, 7), (3, 3, 2, 4), (8,), ())
DTYPES = (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16)


# --- trees ----------------------------------------------------------------------------
class Pair(NamedTuple):
    left: Any
    right: Any


class Module(eqx.Module):
    weight: Any
    rest: Any


def leaf(rng, shape=None):
    """Weights: drawn, all equal, few values, or with zeros of both signs."""
    shape = SHAPES[rng.integers(len(SHAPES))] if shape is None else shape
    values = rng.normal(size=shape)
    kind = rng.integers(5)
    if kind == 1:
        values = np.full(shape, 0.5)
    elif kind == 2:
        values = np.round(values)
    elif kind == 3:
        values = np.where(rng.random(shape) < 0.5, values, -0.0)
    elif kind == 4:
        values = values * 1e-39
    return jnp.asarray(values, DTYPES[rng.integers(len(DTYPES))])


def tree(rng, depth=0):
    """A container of a random kind with a kernel in it, at times nested."""

    def part():
        if depth < 2 and rng.random() < 0.3:
            return tree(rng, depth + 1)
        return [None, optax.MaskedNode(), leaf(rng), leaf(rng)][rng.integers(4)]

    kernel = leaf(rng, SHAPES[rng.integers(5)])
    kind = rng.integers(7)
    if kind == 0:
        return {"kernel": kernel, "bias": part(), "more": part()}
    if kind == 1:
        return [kernel, part(), part()]
    if kind == 2:
        return (kernel, part())
    if kind == 3:
        return Pair(kernel, part())
    if kind == 4:
        return FrozenDict(kernel=kernel, more=part())
    if kind == 5 and depth == 0:
        return nnx.State({"kernel": nnx.Param(kernel), "bias": nnx.Param(leaf(rng))})
    return Module(kernel, part())


# --- methods, optimizers, wrappers ----------------------------------------------------
OPTIMIZERS = (
    lambda: optax.sgd(0.1),
    lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    lambda: optax.adam(0.01),
    lambda: optax.adamw(0.01, weight_decay=0.1),
    lambda: optax.lion(0.01),
    lambda: optax.rmsprop(0.01),
    lambda: optax.adafactor(0.01),
    lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    lambda: optax.chain(optax.add_decayed_weights(0.01), optax.adamax(0.01)),
    lambda: optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.5),
)
_CYCLES = {"update_period": 2, "update_stop": 40}
METHODS = {
    "sparse_momentum_regrow": {**_CYCLES, "key": 0},
    "sparse_evolutionary": {**_CYCLES, "key": 0},
    "dynamic_sparse": {**_CYCLES, "key": 0, "prune_number": 2},
    "rigl": {**_CYCLES, "key": 0},
    "in_time_over_parameterization": {**_CYCLES, "key": 0},
    "static_sparse": {"key": 0},
    "straight_through_magnitude": {},
    "network_surgery": {},
    "top_kast": {"backward_density": 0.8},
    "deep_rewiring": {"key": 0, "learning_rate": 0.1},
}
WRAPPERS = {
    "none": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(10.0), tx),
    "accumulation": lambda tx: optax.MultiSteps(tx, 2),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    "arguments": optax.with_extra_args_support,
}


def gradients(rng, params, broken):
    """Random gradients of the parameters' shapes; at times with NaN and infinity."""

    def one(w):
        values = np.asarray(rng.normal(size=w.shape) * 10.0 ** rng.integers(-3, 3))
        if broken:
            values = np.where(rng.random(w.shape) < 0.1, np.inf, values)
            values = np.where(rng.random(w.shape) < 0.1, np.nan, values)
        return jnp.asarray(values, w.dtype)

    return jax.tree.map(one, params)


def form(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def taking_part(params):
    """The leaves whose weights a mask covers."""
    flat = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    chosen = jax.tree.leaves(sparse_optax.eligible(params))
    return [w for w, takes in zip(flat, chosen, strict=True) if takes]


def count(state):
    """Active weights of each leaf."""
    return [int(m.sum()) for m in kept(state)]


def check_program(number):
    """Trains one program and checks it at each step."""
    rng = np.random.default_rng(number)
    params = tree(rng)
    method = list(METHODS)[rng.integers(len(METHODS))]
    inner = OPTIMIZERS[rng.integers(len(OPTIMIZERS))]()
    wrapper = list(WRAPPERS)[rng.integers(len(WRAPPERS))]
    sizes = [w.size for w in taking_part(params)]
    density = float(rng.choice([0.1, 0.3, 0.5, 0.75]))
    if method == "top_kast" or sparse_optax.budgets.count(density, sum(sizes)) < len(
        sizes
    ):
        density = 0.5
    build = getattr(sparse_optax, method)
    tx = WRAPPERS[wrapper](build(inner, density=density, **METHODS[method]))
    step, state = stepper(tx), tx.init(params)
    wanted, forms = count(state), (form(params), form(state))
    assert sum(wanted) == sparse_optax.budgets.count(density, sum(sizes))
    if method != "top_kast":  # whose layers are one pool
        # Each keeps one at least, which others give.
        for number_kept, size in zip(wanted, sizes, strict=True):
            assert 1 <= number_kept
            assert abs(number_kept - density * size) <= len(sizes)
    compiled = []
    broken_at = rng.integers(STEPS) if rng.random() < 0.3 else None
    for t in range(STEPS):
        params, state = step(params, state, gradients(rng, params, t == broken_at))
        compiled.append(step._cache_size())
        assert (form(params), form(state)) == forms
        # Layers may exchange weights; together they keep the number.
        assert sum(count(state)) == sum(wanted)
    # The second step may compile once more: what `init` gives is not committed.
    assert compiled[-1] == compiled[1]
    if wrapper == "accumulation":
        assert int(state.gradient_step) == STEPS // 2
    for w, m in zip(taking_part(params), kept(state), strict=True):
        missing = np.asarray(w.astype(jnp.float32))[~m]
        # What is not finite shows; no subtraction makes it zero.
        assert (missing[np.isfinite(missing)] == 0).all()
        if broken_at is None:
            assert np.isfinite(missing).all()


@pytest.mark.parametrize(
    ("first", "number"),
    [
        pytest.param(0, 6, id="some"),
        *(
            pytest.param(first, 25, id=f"many{first}", marks=pytest.mark.fuzz)
            for first in range(100, 400, 25)
        ),
    ],
)
def test_random_programs_keep_what_is_guaranteed(first, number, figures):
    for case in range(first, first + number):
        try:
            check_program(case)
        except Exception as error:
            error.add_note(f"random program number {case}")
            raise
    figures["random programs: tree, optimizer, method, wrapper"] += number


# --- selection ------------------------------------------------------------------------
def rank_keys(values):
    """Scores as integers in the library's order: all NaN highest, zeros equal."""
    values = np.asarray(values, np.float64)
    keys = np.where(np.isnan(values), np.inf, values)
    order = np.unique(keys[~np.isnan(values)])
    ranks = np.searchsorted(order, keys)
    return np.where(np.isnan(values), len(order), ranks)


def check_selection(number):
    rng = np.random.default_rng(number)
    dtype = DTYPES[rng.integers(1, 4)]
    shapes = [tuple(rng.integers(1, 9, rng.integers(1, 4))) for _ in range(3)]
    leaves = []
    for shape in shapes:
        x = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 4)
        special = rng.choice(
            [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-40], shape
        )
        x = np.where(rng.random(shape) < rng.choice([0.0, 0.1, 0.6]), special, x)
        if rng.random() < 0.3:
            x = np.round(x)
        leaves.append(jnp.asarray(x, dtype))
    flat = np.concatenate([np.asarray(x.astype(jnp.float32)).ravel() for x in leaves])
    k = int(rng.integers(0, flat.size + 1))
    found = np.concatenate(
        [np.asarray(m).ravel() for m in selection.top_k_mask(leaves, k)]
    )
    # Ties go to the lowest index: a stable sort of the negative ranks.
    chosen = np.argsort(-rank_keys(flat), kind="stable")[:k]
    expected = np.zeros(flat.size, bool)
    expected[chosen] = True
    np.testing.assert_array_equal(found, expected, err_msg=f"selection {number}")


@pytest.mark.parametrize(
    ("first", "number"),
    [
        pytest.param(0, 10, id="some"),
        pytest.param(100, 400, id="many", marks=pytest.mark.fuzz),
    ],
)
def test_random_selections_are_those_of_a_stable_sort(first, number, figures):
    for case in range(first, first + number):
        check_selection(case)
    figures["random selections against a stable sort"] += number
