"""Mask trees: who takes part, exact counts, reading and replacing, packing."""

import flax.linen as nn
import flax.nnx as nnx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from helpers import kernels, network

import sparse_optax
from sparse_optax import layers, masks, sparse_momentum_regrow

SHAPES = ((12, 9), (9, 7))


def _names(tree):
    """Names of the leaves that are True."""
    return {layers.path_name(path) for path, x in jax.tree.leaves_with_path(tree) if x}


# --- names and eligibility ------------------------------------------------------------


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(x, x)
        return nn.Dense(8)(x), None


class _Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        blocks = nn.scan(
            _Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = blocks()(x, None)
        return nn.Dense(11)(x)


def _transformer_params():
    tokens = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    return jax.eval_shape(_Transformer().init, jax.random.key(0), tokens)["params"]


def test_attention_biases_and_scanned_scales_stay_dense():
    """They have two dimensions or more here and are told by name."""
    params = _transformer_params()
    chosen = _names(sparse_optax.eligible(params))
    dims = {
        layers.path_name(path): x.ndim for path, x in jax.tree.leaves_with_path(params)
    }
    dense = set(dims) - chosen
    assert max(dims[n] for n in dense) >= 3, "the example must hold the hard case"
    assert {n.split("/")[-1] for n in dense} == {"bias", "scale"}
    assert {n.split("/")[-1] for n in chosen} == {"kernel", "embedding"}


def test_nnx_attention_biases_stay_dense():
    attention = nnx.MultiHeadAttention(
        num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0)
    )
    params = nnx.state(attention, nnx.Param)
    chosen = _names(nnx.to_pure_dict(sparse_optax.eligible(params)))
    assert {n.split("/")[-1] for n in chosen} == {"kernel"}
    assert len(chosen) == 4


def test_nnx_names_are_those_of_plain_arrays():
    """`nnx` hands variables to init and arrays to update: one name for both."""
    params = nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Param)
    paths = [layers.path_name(p) for p, _ in jax.tree.leaves_with_path(params)]
    pure = nnx.to_pure_dict(params)
    assert paths == [layers.path_name(p) for p, _ in jax.tree.leaves_with_path(pure)]
    assert sorted(paths) == ["bias", "kernel"]


def test_names_of_all_containers():
    tree = {"a": [1, (2, {"value": 3})], "value": 4}
    names = [layers.path_name(p) for p, _ in jax.tree.leaves_with_path(tree)]
    assert names == ["a/0", "a/1/0", "a/1/1", "value"]


@pytest.mark.parametrize("last", ["bias", "b", "scale", "offset", "gamma", "beta"])
def test_dense_names(last):
    params = {"x": {last: jnp.ones((3, 4)), "w": jnp.ones((3, 4)), "v": jnp.ones(3)}}
    assert _names(sparse_optax.eligible(params)) == {"x/w"}


def test_integer_leaves_do_not_take_part():
    params = {"w": jnp.ones((3, 4)), "table": jnp.ones((3, 4), jnp.int32)}
    assert _names(sparse_optax.eligible(params)) == {"w"}


def test_where_as_callable_tree_and_prefix():
    params = network(SHAPES)
    by_name = sparse_optax.eligible(
        params, lambda path, leaf: path.startswith("Dense_1") and leaf.ndim == 2
    )
    assert _names(by_name) == {"Dense_1/kernel"}
    prefix = sparse_optax.eligible(params, {"Dense_0": False, "Dense_1": True})
    assert _names(prefix) == {"Dense_1/kernel", "Dense_1/bias"}
    assert sparse_optax.eligible(params, by_name) == by_name


def test_eligible_is_a_tree_of_python_bools_on_abstract_arrays():
    chosen = sparse_optax.eligible(_transformer_params())
    assert all(type(x) is bool for x in jax.tree.leaves(chosen))
    assert sparse_optax.eligible({}) == {}
    assert sparse_optax.eligible({"w": None}) == {"w": None}


# --- making masks ---------------------------------------------------------------------


@hypothesis.given(
    st.floats(0.001, 1.0), st.integers(0, 100), st.sampled_from([SHAPES, ((1, 1),)])
)
def test_random_masks_hold_exact_counts(density, seed, shapes):
    """The total is floor(d N), a layer's count within one of d n and at least one."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    density = max(density, len(sizes) / sum(sizes))
    made = masks.random_masks(seed, network(shapes), density)
    assert masks.count(made) == sparse_optax.budgets.count(density, sum(sizes))
    for m, n in zip(kernels(made), sizes, strict=True):
        assert m.sum() >= 1
        assert abs(m.sum() - density * n) < 1 or m.sum() == 1
    assert isinstance(made["Dense_0"]["bias"], optax.MaskedNode)


def test_random_masks_are_uniform():
    """Every weight is kept by about its share of 400 seeds."""
    like = {"kernel": jnp.zeros((5, 8))}
    draw = jax.jit(jax.vmap(lambda s: masks.random_masks(s, like, 0.25)["kernel"]))
    share = np.asarray(draw(jnp.arange(400))).mean(0)
    assert abs(share - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 400)


def test_a_leafs_mask_depends_on_its_name_alone():
    one = masks.random_masks(3, {"a": {"kernel": jnp.zeros((9, 9))}}, 0.3)
    more = {"0": {"bias": jnp.zeros(4)}, "a": {"b": jnp.zeros(9)}}
    more["a"]["kernel"] = jnp.zeros((9, 9))
    more["b"] = {"kernel": jnp.zeros((9, 9))}
    two = masks.random_masks(3, more, 0.3)
    np.testing.assert_array_equal(one["a"]["kernel"], two["a"]["kernel"])
    assert (two["a"]["kernel"] != two["b"]["kernel"]).any()


def test_seed_raw_key_and_typed_key_agree():
    params = network(SHAPES)
    typed = jax.random.key(7)
    draws = [
        masks.random_masks(key, params, 0.3)
        for key in (7, typed, jax.random.key_data(typed), jax.random.PRNGKey(7))
    ]
    for other in draws[1:]:
        jax.tree.map(np.testing.assert_array_equal, draws[0], other)


def test_stacked_slices_hold_their_own_counts():
    params = {"kernel": jnp.zeros((3, 4, 5)), "bias": jnp.zeros((3, 5))}
    made = masks.random_masks(0, params, 0.25, stacked={"kernel": 0})
    np.testing.assert_array_equal(made["kernel"].sum((1, 2)), [5, 5, 5])
    made = masks.random_masks(0, params, 0.25, stacked={"kernel": 1})
    np.testing.assert_array_equal(made["kernel"].sum((0, 2)), [4, 4, 4, 3])


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_magnitude_masks(scope, ties):
    rng = np.random.default_rng(0)
    values = [rng.integers(-3, 4, s) if ties else rng.normal(size=s) for s in SHAPES]
    got = kernels(masks.magnitude_masks(network(SHAPES, values), 1 / 3, scope=scope))
    scores = [np.abs(np.float32(v)) for v in values]
    if scope == "global":
        wanted = oracles.top_k(scores, sum(s.size for s in scores) // 3)
    else:
        wanted = [oracles.top_k([s], s.size // 3)[0] for s in scores]
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


# --- apply, count, combine, fill, pack ------------------------------------------------


def test_apply_is_not_a_multiplication():
    kept = {"w": jnp.array([True, False, False]), "b": optax.MaskedNode()}
    tree = {"w": jnp.array([1.0, jnp.inf, jnp.nan]), "b": jnp.array([jnp.inf])}
    out = masks.apply(kept, tree)
    np.testing.assert_array_equal(out["w"], [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(out["b"], [jnp.inf])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_apply_keeps_the_dtype(dtype):
    out = masks.apply({"w": jnp.array([True, False])}, {"w": jnp.ones(2, dtype)})
    assert out["w"].dtype == dtype


def test_count_and_density_are_python_numbers():
    made = masks.random_masks(0, network(SHAPES), 0.3)
    assert type(masks.count(made)) is int
    assert masks.count(made) == 51
    assert masks.density(made) == 51 / 171
    assert masks.count({}) == 0
    assert masks.density({}) == 1.0


def test_fill_turns_holes_into_dense_masks():
    params = network(SHAPES)
    made = masks.random_masks(0, params, 0.3)
    filled = masks.fill(made, params)
    assert jax.tree.structure(filled) == jax.tree.structure(params)
    for name, layer in filled.items():
        assert layer["bias"].all()
        np.testing.assert_array_equal(layer["kernel"], made[name]["kernel"])


@hypothesis.given(
    st.lists(st.integers(0, 17), min_size=1, max_size=3), st.integers(0, 99)
)
def test_pack_and_unpack(shape, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.5
    packed = masks.pack(jnp.asarray(mask))
    np.testing.assert_array_equal(masks.unpack(packed), mask)
    assert packed.bits.nbytes == int(np.prod(shape[:-1])) * -(-shape[-1] // 8)
    # And at most eight bytes a leaf, which tell how many bits of a row are in use.
    assert 1 <= packed.spare.nbytes <= 8


# --- reading and replacing the masks of a state ---------------------------------------


def _tx(**kwargs):
    settings = dict(density=0.3, update_period=4, update_stop=20, key=0)
    return sparse_momentum_regrow(optax.sgd(0.1, momentum=0.9), **(settings | kwargs))


def test_get_masks_finds_them_anywhere():
    params = network(SHAPES)
    wanted = sparse_optax.get_masks(_tx().init(params))
    assert masks.count(wanted) == 51
    for tx in (
        optax.chain(optax.clip(1.0), _tx()),
        optax.MultiSteps(_tx(), 2),
        optax.masked(_tx(), jax.tree.map(lambda _: True, params)),
        optax.apply_if_finite(_tx(), 3),
    ):
        got = sparse_optax.get_masks(tx.init(params))
        jax.tree.map(np.testing.assert_array_equal, wanted, got)


def test_get_masks_merges_groups():
    params = network(SHAPES)
    labels = {"Dense_0": "a", "Dense_1": "b"}
    tx = optax.partition({"a": _tx(density=0.1), "b": _tx(density=0.5)}, labels)
    got = sparse_optax.get_masks(tx.init(params))
    assert [int(m.sum()) for m in kernels(got)] == [10, 31]
    assert isinstance(got["Dense_0"]["bias"], optax.MaskedNode)


def test_set_masks_replaces_and_the_next_steps_hold():
    params, tx = network(SHAPES), optax.chain(optax.clip(1.0), _tx())
    state = tx.init(params)
    new = masks.random_masks(99, params, 0.1)
    state = sparse_optax.set_masks(state, new)
    jax.tree.map(np.testing.assert_array_equal, new, sparse_optax.get_masks(state))
    step = jax.jit(tx.update)
    for _ in range(6):
        updates, state = step(params, state, params)
        params = optax.apply_updates(params, updates)
    got = sparse_optax.get_masks(state)
    assert masks.count(got) == masks.count(new)
    for w, m in zip(kernels(params), kernels(got), strict=True):
        np.testing.assert_array_equal(w[~m], 0.0)


def test_set_masks_into_packed_states():
    params, tx = network(SHAPES), _tx(packed=True)
    new = masks.random_masks(99, params, 0.1)
    state = tx.init(params)
    changed = sparse_optax.set_masks(state, new)
    assert jax.tree.structure(changed) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, new, sparse_optax.get_masks(changed))


def test_sparsify_takes_masks_or_a_state():
    params = network(SHAPES)
    state = _tx().init(params)
    made = sparse_optax.get_masks(state)
    for source in (state, made):
        sparse = sparse_optax.sparsify(params, source)
        for name, layer in sparse.items():
            kept = made[name]["kernel"]
            np.testing.assert_array_equal(
                layer["kernel"], jnp.where(kept, params[name]["kernel"], 0)
            )
            np.testing.assert_array_equal(layer["bias"], params[name]["bias"])


def test_sparsify_pairs_by_name_and_keeps_the_type():
    """Masks of plain arrays fit a state of variables, and come back as one."""
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    made = masks.random_masks(0, nnx.to_pure_dict(params), 0.3)
    sparse = sparse_optax.sparsify(params, made)
    assert type(sparse) is type(params)
    assert jax.tree.structure(sparse) == jax.tree.structure(params)
    assert int((nnx.to_pure_dict(sparse)["kernel"] != 0).sum()) == 9
    nnx.update(model, sparse)
    assert int((model.kernel[...] != 0).sum()) == 9


def test_none_leaves_and_empty_trees():
    params = {"w": jnp.ones((4, 5)), "b": None}
    made = masks.random_masks(0, params, 0.2)
    assert made["b"] is None
    assert masks.count(made) == 4
    assert sparse_optax.sparsify(params, made)["b"] is None
    assert masks.random_masks(0, {}, 0.2) == {}
    assert masks.magnitude_masks({}, 0.2) == {}
    assert masks.apply({}, {}) == {}


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_random_masks_keep_what_they_are_told_to(density):
    """The larger of two sets of weights holds the smaller one, at exact counts."""
    params = {"b": jnp.zeros(8), "v": jnp.zeros((6, 50)), "w": jnp.zeros((3, 20, 10))}
    old = masks.random_masks(3, params, 0.2)
    new = masks.random_masks(4, params, density, keep=old)
    for name, size in (("v", 300), ("w", 600)):
        was, now = np.asarray(old[name]), np.asarray(new[name])
        assert now.sum() == int(density * size)
        assert (was & now).sum() == min(was.sum(), now.sum())
    packed = {"b": old["b"], **{n: masks.pack(old[n]) for n in ("v", "w")}}
    again = masks.random_masks(4, params, density, keep=packed)
    assert all(bool((new[n] == again[n]).all()) for n in ("v", "w"))
    other = masks.random_masks(5, params, density, keep=old)
    same = all(bool((new[n] == other[n]).all()) for n in ("v", "w"))
    assert same == (density in (0.2, 1.0))


def test_random_masks_refuse_masks_of_other_parameters():
    kept = masks.random_masks(0, {"w": jnp.zeros((4, 5))}, 0.5)
    with pytest.raises(ValueError, match=r"^random_masks: the mask of 'w' has shape"):
        masks.random_masks(0, {"w": jnp.zeros((5, 4))}, 0.5, keep=kept)
