"""Random masks to compare with, and static sparse training under given masks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import at_step, kernels, network, random_gradients, refuses, stepper

import sparse_optax
from sparse_optax import budgets, masks
from sparse_optax.masks import random_masks_like, shuffle_masks

SHAPES = ((12, 9), (9, 7))


def uneven(seed=0, shape=(12, 9)):
    """A mask whose columns and rows differ widely in their counts."""
    rng = np.random.default_rng(seed)
    share = np.linspace(0, 1, shape[-1]) ** 2
    return jnp.asarray(rng.random(shape) < share)


FOUND = {
    "Dense_0": {"bias": optax.MaskedNode(), "kernel": uneven(0, (12, 9))},
    "Dense_1": {"bias": optax.MaskedNode(), "kernel": uneven(1, (9, 7))},
    "none": None,
}
LAYERS = ("Dense_0", "Dense_1")


def arrays(tree):
    return [np.asarray(tree[name]["kernel"]) for name in LAYERS]


# --- counts ---------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("within", ["layer", "unit"])
def test_counts_are_those_of_the_masks(within, packed):
    given = FOUND
    if packed:
        given = jax.tree.map(
            lambda m: m if isinstance(m, optax.MaskedNode) else masks.pack(m),
            FOUND,
            is_leaf=lambda m: isinstance(m, optax.MaskedNode),
        )
    new = shuffle_masks(3, given, within)
    assert jax.tree.structure(new) == jax.tree.structure(FOUND)
    axis = 0 if within == "unit" else None
    for a, b in zip(arrays(new), arrays(FOUND), strict=True):
        assert a.dtype == bool
        np.testing.assert_array_equal(a.sum(axis), b.sum(axis))
        assert (a != b).any()


def test_a_layer_does_not_keep_its_units():
    new = shuffle_masks(3, FOUND)
    for a, b in zip(arrays(new), arrays(FOUND), strict=True):
        assert (a.sum(0) != b.sum(0)).any()


def test_the_network_does_not_keep_its_layers():
    new = random_masks_like(3, FOUND)
    assert masks.count(new) == masks.count(FOUND)
    assert jax.tree.structure(new) == jax.tree.structure(FOUND)
    per_layer = {
        tuple(int(m.sum()) for m in arrays(random_masks_like(seed, FOUND)))
        for seed in range(5)
    }
    assert len(per_layer) > 1


@pytest.mark.parametrize("kind", ["layer", "unit", "network"])
def test_every_position_is_as_likely(kind):
    """Over 400 seeds; where the positions of a group are equal by definition."""
    found = {"kernel": uneven(2, (6, 5))}

    @jax.jit
    @jax.vmap
    def draw(seed):
        if kind == "network":
            return random_masks_like(seed, found)["kernel"]
        return shuffle_masks(seed, found, kind)["kernel"]

    share = np.asarray(draw(jnp.arange(400))).mean(0)
    mask = np.asarray(found["kernel"])
    want = mask.mean(0) if kind == "unit" else np.full(5, mask.mean())
    spread = np.sqrt(want * (1 - want) / 400)
    assert (abs(share - want) <= 5 * spread).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("within", ["layer", "unit"])
def test_slices_of_a_stacked_leaf_are_layers(within, axis):
    found = np.stack([uneven(s, (6, 5)) & (s != 1) for s in range(3)], axis)
    new = shuffle_masks(0, {"w": jnp.asarray(found)}, within, stacked={"w": axis})
    for i in range(3):
        a, b = np.take(np.asarray(new["w"]), i, axis), np.take(found, i, axis)
        assert a.sum() == b.sum()
        if within == "unit":
            np.testing.assert_array_equal(a.sum(0), b.sum(0))
    plain = shuffle_masks(0, {"w": jnp.asarray(found)})
    assert plain["w"].sum() == found.sum()
    assert np.take(np.asarray(plain["w"]), 1, axis).sum() > 0


@pytest.mark.parametrize("stacked", [None, {"w": 1}, {"w": 0}])
def test_units_along_another_axis(stacked):
    """As in equinox: (out, in, height, width), with or without an axis of layers."""
    rng = np.random.default_rng(0)
    found = rng.random((4, 3, 5, 2)) < np.linspace(0, 1, 4).reshape(4, 1, 1, 1)
    new = shuffle_masks(
        0, {"w": jnp.asarray(found)}, "unit", stacked=stacked, unit_axis=0
    )
    rest = {None: (1, 2, 3), 1: (2, 3), 0: (2, 3)}[stacked and stacked["w"]]
    np.testing.assert_array_equal(np.asarray(new["w"]).sum(rest), found.sum(rest))


def test_units_are_told_from_the_layout():
    """The rows of a weight of equinox, and the heads and indices of queries."""
    rng = np.random.default_rng(0)
    weight = rng.random((6, 40)) < np.linspace(0, 1, 6)[:, None]
    query = rng.random((30, 2, 4)) < np.linspace(0, 1, 8).reshape(2, 4)
    found = {"linear": {"weight": weight}, "query": {"kernel": query}}
    new = shuffle_masks(0, jax.tree.map(jnp.asarray, found), "unit")
    moved, kernel = (
        np.asarray(new["linear"]["weight"]),
        np.asarray(new["query"]["kernel"]),
    )
    np.testing.assert_array_equal(moved.sum(1), weight.sum(1))
    np.testing.assert_array_equal(kernel.sum(0), query.sum(0))
    assert (moved != weight).any()
    assert (kernel != query).any()
    unknown = {"proj": {"kernel": jnp.asarray(query)}}
    with refuses("shuffle_masks", "unit_axis", "proj/kernel", "cannot be told"):
        shuffle_masks(0, unknown, "unit")
    new = shuffle_masks(0, unknown, "unit", unit_axis={"proj/kernel": (1, 2)})
    kernel = np.asarray(new["proj"]["kernel"])
    np.testing.assert_array_equal(kernel.sum(0), query.sum(0))


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("within", ["layer", "unit"])
def test_empty_and_full_masks_stay(fill, within):
    found = {"w": jnp.full((4, 3), fill), "v": jnp.full((1, 1), not fill)}
    new = shuffle_masks(0, found, within)
    jax.tree.map(np.testing.assert_array_equal, new, found)


def test_trees_without_masks():
    for found in ({}, {"b": optax.MaskedNode()}, {"n": None}):
        assert shuffle_masks(0, found) == found
        assert random_masks_like(0, found) == found


# --- keys -----------------------------------------------------------------------------


def test_a_leafs_draw_depends_on_its_name_alone():
    more = {"Aaa": {"kernel": uneven(4)}} | FOUND
    for within in ("layer", "unit"):
        one, two = shuffle_masks(5, FOUND, within), shuffle_masks(5, more, within)
        for a, b in zip(arrays(one), arrays(two), strict=True):
            np.testing.assert_array_equal(a, b)
    twins = shuffle_masks(5, {"a": uneven(4), "b": uneven(4)})
    assert (twins["a"] != twins["b"]).any()


@pytest.mark.parametrize("draw", [shuffle_masks, random_masks_like])
def test_seeds_keys_and_jit_agree(draw):
    key = jax.random.key(5)
    for same in (key, jax.random.key_data(key)):
        jax.tree.map(np.testing.assert_array_equal, draw(5, FOUND), draw(same, FOUND))
    jitted = jax.jit(draw)(key, FOUND)
    jax.tree.map(np.testing.assert_array_equal, draw(5, FOUND), jitted)
    other = draw(6, FOUND)
    assert any(
        (a != b).any() for a, b in zip(arrays(other), arrays(jitted), strict=True)
    )


def test_the_control_of_new_weights():
    """Same masks, drawn anew: ``sparsify(new_params, masks)``."""
    params = network(SHAPES)
    found = masks.magnitude_masks(params, 0.3)
    anew = jax.tree.map(lambda x: x + 5.0, params)
    sparse = sparse_optax.sparsify(anew, found)
    for w, m in zip(kernels(sparse), kernels(found), strict=True):
        np.testing.assert_array_equal(w != 0, m)


def test_wrong_input():
    with refuses("shuffle_masks", "within", "'filter'", "'layer' or 'unit'"):
        shuffle_masks(0, FOUND, "filter")
    with refuses("shuffle_masks", "key", "0.5", "seed"):
        shuffle_masks(0.5, FOUND)
    with refuses("random_masks_like", "key", "None", "seed"):
        random_masks_like(None, FOUND)
    with refuses("shuffle_masks", "masks", "float32", "bool"):
        shuffle_masks(0, {"w": jnp.ones((2, 2))})
    with refuses("shuffle_masks", "stacked", "nobody", "take part"):
        shuffle_masks(0, FOUND, stacked={"nobody": 0})
    with refuses("shuffle_masks", "unit_axis", "2", r"\[-2, 1\]"):
        shuffle_masks(0, {"w": uneven()}, "unit", unit_axis=2)
    with refuses("shuffle_masks", "'w'", r"0 axes", "unit_axis"):
        shuffle_masks(0, {"w": jnp.array(True)}, "unit")


# --- static sparse training -----------------------------------------------------------


def np_static(params, found, grads, steps):
    """Momentum SGD on the dense gradient; missing weights are zero after each step."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    buffer = jax.tree.map(np.zeros_like, params)
    for t in range(steps):
        for layer, mask in zip(LAYERS, kernels(found), strict=True):
            for name in ("bias", "kernel"):
                buffer[layer][name] = (
                    0.9 * buffer[layer][name] + np.asarray(grads[layer][name])[t]
                )
                params[layer][name] = params[layer][name] - 0.1 * buffer[layer][name]
            params[layer]["kernel"][~mask] = 0.0
    return params


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_static_training_is_masked_descent(given, packed):
    params = network(SHAPES)
    grads = random_gradients(0, params, 6)
    sgd = optax.sgd(0.1, momentum=0.9)
    if given:
        found = masks.magnitude_masks(params, 0.2)
        tx = sparse_optax.static_sparse(sgd, masks=found, packed=packed)
    else:
        tx = sparse_optax.static_sparse(sgd, density=0.2, key=3, packed=packed)
        found = sparse_optax.get_masks(tx.init(params))
    assert masks.count(found) == budgets.count(0.2, 171)
    state, step, start = tx.init(params), stepper(tx), params
    for t in range(6):
        params, state = step(params, state, at_step(grads, t))
        jax.tree.map(
            np.testing.assert_array_equal, sparse_optax.get_masks(state), found
        )
        for w, m in zip(kernels(params), kernels(found), strict=True):
            np.testing.assert_array_equal(w[~m], 0.0)
    want = np_static(start, found, grads, 6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), params, want)
    assert int(state.skipped) == 0
    assert state.momentum == ()


def test_static_masks_survive_broken_gradients():
    params = network(SHAPES)
    tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.2, key=3)
    state = tx.init(params)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    updates, after = jax.jit(tx.update)(broken, state, params)
    params = optax.apply_updates(params, updates)
    for w, m in zip(kernels(params), kernels(state.regrow_masks), strict=True):
        np.testing.assert_array_equal(w[~m], 0.0)
    jax.tree.map(np.testing.assert_array_equal, after.regrow_masks, state.regrow_masks)


@pytest.mark.parametrize(
    "budget",
    [0.2, budgets.erdos_renyi_kernel(0.2), budgets.linear(0.2), budgets.nonzeros(40)],
)
def test_static_budgets(budget):
    params = network(SHAPES)
    tx = sparse_optax.static_sparse(optax.sgd(0.1), density=budget, key=0)
    counts = budgets.resolve(budget, params)
    for m, layer in zip(kernels(tx.init(params).regrow_masks), LAYERS, strict=True):
        assert m.sum() == counts[layer]["kernel"]


def test_static_behind_an_optimizer():
    params = network(SHAPES)
    tx = optax.chain(
        optax.sgd(0.1), sparse_optax.static_sparse(density=0.2, key=jax.random.key(1))
    )
    updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    found = kernels(sparse_optax.get_masks(state))
    for w, old, m in zip(kernels(after), kernels(params), found, strict=True):
        np.testing.assert_allclose(w, np.where(m, 0.9 * old, 0), rtol=1e-6)


def test_static_trains_the_masks_of_snip():
    params = network(SHAPES)

    def loss(params, x):
        for layer in LAYERS:
            x = jnp.tanh(x @ params[layer]["kernel"] + params[layer]["bias"][None])
        return jnp.mean(x**2)

    x = jnp.float32(np.random.default_rng(1).normal(size=(8, 12)))
    found = sparse_optax.snip_masks(loss, params, [x], 0.25)
    tx = sparse_optax.static_sparse(optax.sgd(0.5), masks=found)
    params = sparse_optax.sparsify(params, found)
    state, step, before = tx.init(params), stepper(tx), loss(params, x)
    gradient = jax.jit(jax.grad(loss))
    for _ in range(60):
        params, state = step(params, state, gradient(params, x))
    assert float(loss(params, x)) < 0.7 * float(before)
    for w, m in zip(kernels(params), kernels(found), strict=True):
        np.testing.assert_array_equal(w != 0, m)


def test_static_wrong_input():
    with refuses("static_sparse", "key", "None", "random"):
        sparse_optax.static_sparse(optax.sgd(0.1), density=0.1)
    with refuses("static_sparse", "density", "None", r"\(0, 1\]"):
        sparse_optax.static_sparse(optax.sgd(0.1), key=0)
    with refuses("static_sparse", "density", "2.0", r"\(0, 1\]"):
        sparse_optax.static_sparse(optax.sgd(0.1), density=2.0, key=0)
    params = network(SHAPES)
    found = masks.magnitude_masks(params, 0.2)
    with refuses("static_sparse", "density", "34", "agree"):
        sparse_optax.static_sparse(optax.sgd(0.1), density=0.5, masks=found).init(
            params
        )
