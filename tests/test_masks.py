"""Mask trees: who takes part, exact counts, reading and replacing, packing."""

import equinox as eqx
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
from helpers import kernels, mask_tree, network, refuses

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
    assert {n.split("/")[-1] for n in dense} == {"bias", "scale", "embedding"}
    assert {n.split("/")[-1] for n in chosen} == {"kernel"}


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


# --- what names, siblings and shapes tell ---------------------------------------------


def _shaped(tree):
    """Abstract arrays from a tree of shapes."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


class _Net(eqx.Module):
    """Layers of equinox whose leaves are all called ``weight`` and ``bias``."""

    linear: eqx.nn.Linear
    conv: eqx.nn.Conv2d
    one_input: eqx.nn.Linear
    scaled: eqx.nn.WeightNorm
    scaled_conv: eqx.nn.WeightNorm
    first: eqx.nn.LayerNorm
    second: eqx.nn.RMSNorm
    norm: eqx.nn.RMSNorm
    embed: eqx.nn.Embedding
    patch_embed: eqx.nn.Conv2d
    embed_features: eqx.nn.Linear

    def __init__(self, key):
        self.linear = eqx.nn.Linear(6, 8, key=key)
        self.conv = eqx.nn.Conv2d(6, 8, 3, key=key)
        self.one_input = eqx.nn.Linear("scalar", 8, key=key)
        self.scaled = eqx.nn.WeightNorm(eqx.nn.Linear(6, 8, key=key))
        self.scaled_conv = eqx.nn.WeightNorm(eqx.nn.Conv2d(6, 8, 3, key=key))
        self.first = eqx.nn.LayerNorm((4, 8))
        self.second = eqx.nn.RMSNorm((4, 8))
        self.norm = eqx.nn.RMSNorm((4, 8), use_bias=False)
        self.embed = eqx.nn.Embedding(10, 8, key=key)
        self.patch_embed = eqx.nn.Conv2d(3, 8, 4, use_bias=False, key=key)
        self.embed_features = eqx.nn.Linear(5, 8, key=key)


KERNELS = {
    "linear/weight",
    "conv/weight",
    "one_input/weight",
    "scaled/layer/weight",
    "scaled_conv/layer/weight",
    "patch_embed/weight",
    "embed_features/weight",
}


@pytest.fixture(scope="module")
def equinox_net():
    return eqx.filter(_Net(jax.random.key(0)), eqx.is_inexact_array)


def test_scales_of_equinox_stay_dense(equinox_net):
    assert _names(sparse_optax.eligible(equinox_net)) == KERNELS
    tables = _names(sparse_optax.eligible(equinox_net, embeddings=True))
    assert tables == KERNELS | {"embed/weight"}
    assert _names(sparse_optax.decay_mask(equinox_net)) == tables


def test_no_unit_dies_of_its_weight_norm():
    """`g` has shape (out, 1): as a kernel it would be cut to a tenth."""
    net = eqx.nn.WeightNorm(eqx.nn.Linear(16, 64, key=jax.random.key(0)))
    params = eqx.filter(net, eqx.is_inexact_array)
    state = sparse_optax.rigl(
        optax.sgd(0.1), density=0.1, update_period=9, update_stop=99, key=0
    ).init(params)
    thin = sparse_optax.sparsify(params, state)
    assert np.count_nonzero(thin.g) == 64
    assert np.count_nonzero(thin.layer.weight) == 64 * 16 // 10


def test_stacked_scales_are_told_by_their_bias():
    norms = eqx.filter_vmap(lambda _: eqx.nn.LayerNorm(8))(jnp.arange(3))
    assert _names(sparse_optax.eligible(eqx.filter(norms, eqx.is_array))) == set()


ROLES = {
    # name of a leaf: its shape and whether it is made sparse
    "torch/weight_g": ((8, 1), False),
    "torch/weight_v": ((8, 6), True),
    "lstm/g": ((8, 8), True),  # a gate, not a length
    "lstm/v": ((8, 8), True),
    "ssm/log_step": ((16, 1), False),
    "ssm/A_log": ((16, 4), False),
    "ssm/B": ((16, 4), True),
    "lora/lora_a": ((6, 2), False),
    "lora/lora_b": ((2, 8), False),
    "peft/lora_A/default/weight": ((2, 6), False),
    "qwix/kernel_lora_b": ((2, 8), False),
    "lora_linear/kernel": ((6, 8), True),
    "t5/relative_attention_bias": ((32, 4), False),
    "rnn/bias_hh": ((1, 8), False),
    "mlp/b1": ((1, 8), False),
    "mlp/w1": ((8, 1), True),
    "vit/pos_embed": ((1, 5, 8), False),
    "vit/cls_token": ((1, 1, 8), False),
    "vit/cls": ((1, 1, 8), False),
    "vit/embedding/kernel": ((4, 4, 3, 8), True),
    "vit/ls/lambda": ((1, 1, 8), False),
    "llama/embed_tokens/weight": ((50, 8), False),
    "llama/q_norm/weight": ((4, 16), False),
    "gpt/wte": ((50, 8), False),
    "gpt/ln_f/g": ((3, 8), False),
    "gpt/ln1_w": ((3, 8), False),
    "film/norm/kernel": ((6, 8), True),
    "film/norm_proj/weight": ((6, 8), True),
    "clip/logit_scale": ((1, 1), False),
    "remember/weight": ((6, 8), True),
    "Embed_0/embedding": ((10, 8), False),
    "TokenEmbed/embedding": ((10, 8), False),
}


def test_names_of_other_libraries():
    tree: dict = {}
    for name, (shape, _) in ROLES.items():
        *parents, key = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[key] = shape
    chosen = _names(sparse_optax.eligible(_shaped(tree)))
    assert chosen == {name for name, (_, sparse) in ROLES.items() if sparse}


def test_a_kernel_of_one_input_may_have_a_bias_of_its_shape():
    params = _shaped({"w": (1, 8), "b": (1, 8)})
    assert _names(sparse_optax.eligible(params)) == {"w"}


def test_eligibility_says_why(equinox_net):
    made = sparse_optax.report.eligibility(equinox_net)
    assert [x.name for x in made.leaves] == layers.leaf_names(equinox_net)
    assert {x.name for x in made.leaves if x.sparse} == KERNELS
    reasons = {x.name: x.reason for x in made.leaves}
    assert "'bias' beside it" in reasons["first/weight"]
    assert "'scaled/layer/weight'" in reasons["scaled/g"]
    assert "'norm'" in reasons["norm/weight"]
    assert "embeddings" in reasons["embed/weight"]
    lines = made.table().splitlines()
    assert len(lines) == len(made.leaves) + 2
    assert lines[0].split() == ["leaf", "shape", "dtype", "kind", "verdict", "reason"]
    (line,) = [x for x in lines if x.startswith("norm/weight ")]
    assert line.split()[1:6] == ["(4,", "8)", "float32", "scale", "dense"]
    assert lines[-1] == f"{len(KERNELS)} of {len(made.leaves)} leaves are made sparse."


def test_eligibility_of_what_was_asked_for_and_of_other_leaves():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3), "n": jnp.arange(4), "f": jnp.sin}
    made = sparse_optax.report.eligibility(params, lambda name, leaf: name == "b")
    told = {x.name: (x.sparse, x.reason) for x in made.leaves}
    assert told == {
        "a": (False, "left out by `where`"),
        "b": (True, "chosen by `where`"),
        "f": (False, f"no array: {type(jnp.sin).__name__}"),
        "n": (False, "neither floating nor complex: int32"),
    }
    with pytest.raises(ValueError, match="eligibility: `where` chooses the leaf 'n'"):
        sparse_optax.report.eligibility(
            params, {"a": True, "b": True, "n": True, "f": False}
        )


TABLES = {
    "tied": {"embedding": (40, 6)},
    "pos_embed": (1, 9, 6),
    "head": {"kernel": (6, 10)},
}


@pytest.mark.parametrize(
    "method", ["rigl", "gradual_magnitude", "static_sparse", "gsm"]
)
def test_all_methods_leave_tables_dense_unless_named(method):
    params = jax.tree.map(lambda x: jnp.ones(x.shape), _shaped(TABLES))

    def chosen(where):
        tx = {
            "rigl": lambda: sparse_optax.rigl(
                optax.sgd(0.1),
                density=0.5,
                update_period=2,
                update_stop=9,
                key=0,
                where=where,
            ),
            "gradual_magnitude": lambda: sparse_optax.gradual_magnitude(
                optax.sgd(0.1), density=0.5, update_period=2, update_stop=9, where=where
            ),
            "static_sparse": lambda: sparse_optax.static_sparse(
                optax.sgd(0.1), density=0.5, key=0, where=where
            ),
            "gsm": lambda: sparse_optax.gsm_mask(0.5, where=where),
        }[method]()
        state = tx.init(params)
        tree = state.gsm_passed if method == "gsm" else state.regrow_masks
        flat = jax.tree.leaves(tree, is_leaf=layers.is_hole)
        pairs = zip(layers.leaf_names(params), flat, strict=True)
        return {name for name, x in pairs if not layers.is_hole(x)}

    assert chosen(None) == {"head/kernel"}
    named = sparse_optax.eligible(params, embeddings=True)
    assert chosen(named) == {"head/kernel", "tied/embedding", "pos_embed"}


# --- complex kernels ------------------------------------------------------------------


def _complex(shape, seed=0):
    real, imaginary = np.random.default_rng(seed).normal(size=(2, *shape))
    return jnp.asarray(real + 1j * imaginary, jnp.complex64)


def _mixed():
    """A complex kernel beside a real one: one pool, ranked by |z|."""
    return {"spectral": {"kernel": _complex((6, 5))}, "w": _complex((5, 4), 1).real}


def test_complex_kernels_are_ranked_by_their_modulus():
    params = _mixed()
    assert _names(sparse_optax.eligible(params)) == {"spectral/kernel", "w"}
    assert sparse_optax.report.eligibility(params).leaves[0].kind == "kernel"
    made = masks.magnitude_masks(params, 0.3)
    flat = [np.abs(np.asarray(x)) for x in jax.tree.leaves(params)]
    for mask, wanted in zip(
        jax.tree.leaves(made), oracles.top_k(flat, 15), strict=True
    ):
        np.testing.assert_array_equal(mask, wanted)
    blocks = sparse_optax.patterns.blocks(2, 1)
    (kept,) = jax.tree.leaves(
        masks.magnitude_masks(params["spectral"], 0.5, pattern=blocks)
    )
    sums = flat[0].reshape(3, 2, 5).sum(1)
    (wanted,) = oracles.top_k([sums], 7)
    np.testing.assert_array_equal(kept, np.repeat(wanted, 2, axis=0))


COMPLEX = {
    "sparse_momentum": lambda **k: sparse_momentum_regrow(
        optax.adam(0.05), density=0.3, update_period=2, update_stop=9, key=0, **k
    ),
    "own_average": lambda **k: sparse_momentum_regrow(
        optax.sgd(0.05), density=0.3, update_period=2, update_stop=9, key=0, **k
    ),
    "rigl": lambda **k: sparse_optax.rigl(
        optax.sgd(0.05), density=0.3, update_period=2, update_stop=9, key=0, **k
    ),
    "gradual": lambda **k: sparse_optax.gradual_magnitude(
        optax.sgd(0.05), density=0.3, update_period=2, update_stop=4, **k
    ),
}


@pytest.mark.parametrize("name", ["sparse_momentum", "own_average", "rigl", "gradual"])
def test_methods_keep_the_count_of_complex_weights(name):
    tx, params = COMPLEX[name](), _mixed()
    gradient = jax.tree.map(lambda x: jnp.conj(x) * 0.1 + 0.01, params)
    state, step = tx.init(params), jax.jit(tx.update)
    masks_before = sparse_optax.get_masks(state)
    for _ in range(6):
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    made = sparse_optax.get_masks(state)
    z, kept = params["spectral"]["kernel"], np.asarray(made["spectral"]["kernel"])
    assert z.dtype == jnp.complex64
    assert masks.count(made) == 9 + 6
    assert not np.asarray(z)[~kept].any()
    assert np.asarray(z)[kept].imag.any()
    assert int(optax.tree.get(state, "skipped")) == 0
    assert (np.asarray(masks_before["spectral"]["kernel"]) != kept).any()


def test_the_engine_follows_the_imaginary_part_too():
    """Growth by an average of the gradient: |z|, with equal real parts."""
    params = {"w": jnp.zeros((4, 5), jnp.complex64)}
    gradient = {"w": _complex((4, 5)) - _complex((4, 5)).real + 1}
    tx = sparse_momentum_regrow(
        optax.sgd(0.0), density=0.5, update_period=1, prune_rate=1.0, key=0
    )
    state = tx.init(params)
    start = np.asarray(sparse_optax.get_masks(state)["w"])
    for _ in range(2):
        _, state = tx.update(gradient, state, params)
    mask = np.asarray(sparse_optax.get_masks(state)["w"])
    size = np.abs(np.asarray(gradient["w"]))
    lowest = size[~start & mask].min() if (~start & mask).any() else np.inf
    assert (~start & mask).sum() > 0
    assert lowest >= size[~start & ~mask].max(initial=0)


def test_gsm_ranks_complex_saliencies_by_their_modulus():
    params, gradient = _mixed(), jax.tree.map(lambda x: x[::-1], _mixed())
    tx = sparse_optax.gsm_mask(0.3)
    passed, _ = tx.update(gradient, tx.init(params), params)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(gradient), strict=True)
    wanted = oracles.top_k([np.abs(np.asarray(w * g)) for w, g in pairs], 15)
    for x, mask in zip(jax.tree.leaves(passed), wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x) != 0, mask)


@pytest.mark.parametrize("method", ["sparse_evolutionary", "deep_rewiring", "ham"])
def test_what_needs_a_sign_names_the_complex_kernel(method):
    def make(where):
        if method == "sparse_evolutionary":
            return sparse_optax.sparse_evolutionary(
                optax.sgd(0.1), density=0.5, update_period=1, key=0, where=where
            )
        if method == "deep_rewiring":
            return sparse_optax.deep_rewiring(
                learning_rate=0.1,
                density=0.5,
                l1=0.0,
                temperature=0.0,
                key=0,
                where=where,
            )
        return sparse_optax.ham(optax.sgd(0.1), 0.1, alpha=1.0, beta=0.0, where=where)

    def step(where):
        params = _mixed()
        tx = make(where)
        return tx.update(params, tx.init(params), params)

    with pytest.raises(ValueError, match=r"complex64.*where="):
        step(None)
    step({"spectral": False, "w": True})


def test_a_complex_model_comes_back_from_its_file(tmp_path):
    params = _mixed()
    made = masks.magnitude_masks(params, 0.3)
    thin = sparse_optax.sparsify(params, made)
    sparse_optax.save_sparse(tmp_path / "model.npz", thin, made)
    back = sparse_optax.load_sparse(tmp_path / "model.npz", like=params).dense()
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(thin), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_clipping_by_the_modulus():
    params = {"w": jnp.ones((1, 2), jnp.complex64)}
    tx = sparse_optax.static_sparse(
        sparse_optax.clip_by_active_norm(1.0), density=1.0, key=0
    )
    gradient = {"w": jnp.array([[3.0, 4.0j]], jnp.complex64)}
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[0.6, 0.8j]], rtol=1e-6)


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


@pytest.mark.parametrize("shape", [(9, 9), (40,), (20, 1)])
def test_leaves_of_one_shape_are_drawn_as_if_alone(shape):
    """They are drawn and searched as slices of one array."""
    tree = {name: jnp.zeros(shape) for name in "abc"} | {"d": jnp.zeros((5, 8))}
    draw = jax.jit(lambda tree: masks.random_masks(3, tree, 0.3, where=lambda *_: True))
    together = draw(tree)
    for name, leaf in tree.items():
        (alone,) = draw({name: leaf}).values()
        np.testing.assert_array_equal(together[name], alone)
    assert not np.array_equal(together["a"], together["b"])


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


@pytest.mark.parametrize("packed", [False, True])
def test_set_masks_keeps_what_the_count_means(packed):
    """Old masks under a ramp that begins anew would grow back; the count says where."""
    params = network(SHAPES)
    tx = sparse_optax.gradual_magnitude(
        optax.sgd(0.0), density=0.25, update_period=2, update_stop=8, packed=packed
    )
    step = jax.jit(tx.update)

    def train(state, steps):
        seen, trained = [], params
        for _ in range(steps):
            updates, state = step(params, state, trained)
            trained = optax.apply_updates(trained, updates)
            seen.append(masks.count(sparse_optax.get_masks(state)))
        return state, seen

    old, seen = train(tx.init(params), 8)
    pruned = sparse_optax.get_masks(old)
    assert seen[-1] < seen[0] / 3
    with refuses("set_masks", "`count`", "None", "integer"):
        sparse_optax.set_masks(tx.init(params), pruned)
    count = optax.tree.get(old, "count")
    fresh = sparse_optax.set_masks(tx.init(params), pruned, count=count)
    assert int(optax.tree.get(fresh, "count")) == 8
    assert train(fresh, 4)[1] == [seen[-1]] * 4
    # To begin anew is a choice.
    anew = sparse_optax.set_masks(tx.init(params), pruned, count=0)
    assert max(train(anew, 4)[1]) > seen[-1]
    # A state that has begun, and one without a ramp, need no count.
    sparse_optax.set_masks(train(tx.init(params), 2)[0], pruned)
    sparse_optax.set_masks(_tx().init(params), pruned)
    with refuses("set_masks", "`count`", "-1", "at least|in"):
        sparse_optax.set_masks(old, pruned, count=-1)


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
    with refuses("random_masks", "`keep`", r"\(4, 5\)", r"\(5, 4\)"):
        masks.random_masks(0, {"w": jnp.zeros((5, 4))}, 0.5, keep=kept)


# --- masks of what is there, and sets of weights --------------------------------------


def test_nonzero_masks_leave_biases_that_are_zero_free():
    """A model whose biases are zero: `w != 0` would freeze them for ever."""
    rng = np.random.default_rng(0)
    dense = network(SHAPES)
    dropped = [rng.random(shape) < 0.8 for shape in SHAPES]
    for layer, drop in zip(sorted(dense), dropped, strict=True):
        dense[layer]["kernel"] = jnp.where(drop, 0.0, dense[layer]["kernel"])
        dense[layer]["bias"] = jnp.zeros_like(dense[layer]["bias"])
    found = masks.nonzero_masks(dense)
    for m, drop in zip(kernels(found), dropped, strict=True):
        np.testing.assert_array_equal(m, ~drop)
    assert isinstance(found["Dense_0"]["bias"], optax.MaskedNode)
    tx = sparse_optax.static_sparse(optax.adam(0.1), masks=found)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, dense), tx.init(dense), dense)
    after = optax.apply_updates(dense, updates)
    for layer, drop in zip(sorted(dense), dropped, strict=True):
        assert (np.asarray(after[layer]["bias"]) != 0).all()
        np.testing.assert_array_equal(np.asarray(after[layer]["kernel"]) == 0, drop)


def test_nonzero_masks_go_by_the_bits():
    """CPUs compare the smallest numbers as zero; a sign of zero is no number."""
    x = np.array([[0.0, -0.0, 1e-42, -1e-42, np.nan, np.inf, 2.0, -3.0]], np.float32)
    wanted = [[False, False, True, True, True, True, True, True]]
    assert masks.nonzero_masks({"w": jnp.asarray(x)})["w"].tolist() == wanted
    jitted = jax.jit(masks.nonzero_masks)({"w": jnp.asarray(x)})
    assert jitted["w"].tolist() == wanted
    for dtype in (jnp.bfloat16, jnp.float16):
        half = jnp.asarray([[0.0, -0.0, 1.0]], dtype)
        assert masks.nonzero_masks({"w": half})["w"].tolist() == [[False, False, True]]


def test_nonzero_masks_of_other_leaves_and_trees():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    found = masks.nonzero_masks(nnx.state(model, nnx.Param))
    assert masks.count(found) == 12
    params = {"bias": jnp.array([0.0, 1.0]), "w": jnp.ones((2, 2))}
    chosen = masks.nonzero_masks(params, where=lambda name, x: name == "bias")
    assert chosen["bias"].tolist() == [False, True]
    assert isinstance(chosen["w"], optax.MaskedNode)
    shapes = jax.eval_shape(lambda: params)
    with refuses("nonzero_masks", "`params`", "'w'", "abstract"):
        masks.nonzero_masks(shapes)


def test_union_and_difference_are_those_of_sets():
    rng = np.random.default_rng(0)
    trees = [
        mask_tree([rng.random(shape) < p for shape in SHAPES]) for p in (0.3, 0.5, 0.2)
    ]
    packed = jax.tree.map(masks.pack, trees[1])
    a, b, c = map(kernels, trees)
    got = kernels(masks.union(trees[0], packed, trees[2]))
    for m, x, y, z in zip(got, a, b, c, strict=True):
        np.testing.assert_array_equal(m, x | y | z)
    got = kernels(masks.difference(trees[0], packed, trees[2]))
    for m, x, y, z in zip(got, a, b, c, strict=True):
        np.testing.assert_array_equal(m, x & ~y & ~z)
    assert isinstance(masks.union(*trees)["Dense_0"]["bias"], optax.MaskedNode)
    for m, x in zip(kernels(masks.union(packed)), b, strict=True):
        np.testing.assert_array_equal(m, x)


def test_union_of_masks_of_other_leaves():
    one, two = {"a": jnp.ones(3, bool)}, {"a": optax.MaskedNode()}
    with refuses("masks.union", "masks", "'a'", "same leaves"):
        masks.union(one, two)
    with refuses("masks.difference", "masks", "'b'", "equal"):
        masks.difference(one, {"b": jnp.ones(3, bool)})
    with refuses("masks.union", "a", r"\(3,\)", r"\(4,\)"):
        masks.union(one, {"a": jnp.ones(4, bool)})
    with refuses("masks.union", "masks", "empty", "one mask tree"):
        masks.union()


def test_a_network_with_a_new_head_and_a_new_layer_keeps_its_old_masks():
    """Leaves are paired by name; a new one, or one of another shape, is drawn anew."""
    old = network(SHAPES)
    kept = masks.magnitude_masks(old, 0.3, scope="leaf")
    new = network((SHAPES[0], (9, 20), (20, 5)))
    made = masks.random_masks(0, new, 0.3, keep=kept)
    counts = [int(m.sum()) for m in kernels(made)]
    assert counts == [int(m.sum()) for m in kernels(masks.random_masks(0, new, 0.3))]
    a, b = kernels(kept)[0], kernels(made)[0]
    smaller, larger = sorted((a, b), key=lambda m: int(m.sum()))
    assert not (smaller & ~larger).any()
    # A leaf that nothing is known of is drawn as without `keep`: uniformly.
    draw = jax.jit(
        jax.vmap(lambda s: masks.random_masks(s, new, 0.3, keep=kept)["Dense_1"])
    )
    share = np.asarray(draw(jnp.arange(200))["kernel"]).mean(0)
    assert abs(share - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 200)
    state = sparse_optax.static_sparse(density=0.3, key=0).init(old)
    again = masks.random_masks(0, old, 0.3, keep=state)
    for x, y in zip(kernels(again), kernels(state.regrow_masks), strict=True):
        np.testing.assert_array_equal(x, y)


def test_masks_of_another_network_are_no_keep():
    kept = {"other": {"kernel": jnp.ones((3, 3), bool)}}
    with refuses("random_masks", "`keep`", "other/kernel", "Dense_0/kernel"):
        masks.random_masks(0, network(SHAPES), 0.5, keep=kept)


def test_set_masks_takes_a_part_of_a_tree():
    params = network(SHAPES)
    for packed in (False, True):
        tx = sparse_optax.static_sparse(
            optax.sgd(0.1), density=0.3, key=0, packed=packed
        )
        state = tx.init(params)
        before = kernels(sparse_optax.get_masks(state))
        part = {"Dense_1": {"kernel": jnp.eye(9, 7, dtype=bool)}}
        changed = sparse_optax.set_masks(state, part)
        assert jax.tree.structure(changed) == jax.tree.structure(state)
        after = kernels(sparse_optax.get_masks(changed))
        np.testing.assert_array_equal(after[0], before[0])
        np.testing.assert_array_equal(after[1], np.eye(9, 7, dtype=bool))
    with refuses("set_masks", "Dense_1", r"\(2, 2\)", r"\(9, 7\)"):
        sparse_optax.set_masks(state, {"Dense_1": {"kernel": jnp.ones((2, 2), bool)}})
    with refuses("set_masks", "masks", "Dense_7", "Dense_0/kernel"):
        sparse_optax.set_masks(state, {"Dense_7": {"kernel": jnp.ones((2, 2), bool)}})
    with refuses("set_masks", "`masks`", "no mask", "at least one"):
        sparse_optax.set_masks(state, {"Dense_1": {"kernel": optax.MaskedNode()}})


def test_combine_takes_the_same_leaves_of_all_trees():
    a = {"w": jnp.array([True, False]), "b": optax.MaskedNode()}
    packed = {**a, "w": masks.pack(a["w"])}
    three = masks.combine(lambda *m: sum(x.astype(int) for x in m) >= 2, a, packed, a)
    np.testing.assert_array_equal(three["w"], a["w"])
    with refuses("masks.combine", "masks", "'b'"):
        masks.combine(jnp.logical_and, a, {"w": a["w"], "b": a["w"]})
    with refuses("masks.combine", "masks"):
        masks.combine(jnp.logical_and)
    with refuses("masks.combine", "'w'", "(3,)"):
        masks.combine(jnp.logical_and, a, {**a, "w": jnp.ones(3, bool)})


def test_numbers_are_no_masks():
    params = {"fc": {"kernel": jnp.full((4, 3), 0.5)}}
    for function in (masks.count, masks.density):
        with refuses(f"masks.{function.__name__}", "masks", "float32", "must be bool"):
            function(params)
    assert masks.count(masks.nonzero_masks(params)) == 12


def test_no_kernel_is_no_empty_mask():
    biases = {"fc": {"bias": jnp.ones(3)}}
    for make in (
        lambda: masks.magnitude_masks(biases, 0.1),
        lambda: masks.random_masks(0, biases, 0.1),
    ):
        with pytest.raises(ValueError, match=r"'fc/bias'.* takes part"):
            make()
