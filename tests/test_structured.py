"""``structured``: units that go together, read from the traced program."""

import functools
import math
import operator

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_compact import Walk

import sparse_optax
from sparse_optax import structured
from sparse_optax.experiments import models

LAYOUT = ("NHWC", "HWIO", "NHWC")


# --- oracles --------------------------------------------------------------------------
def dense(tree, seed=0):
    """Parameters without a zero; what is called a variance is positive."""
    rng = np.random.default_rng(seed)

    def one(path, x):
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        if "var" in jax.tree_util.keystr(path):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        fan = max(x.size / max(x.shape[-1], 1), 1) if x.ndim > 1 else 1
        return jnp.asarray(rng.normal(size=x.shape) / np.sqrt(fan), x.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def leaves_by_name(tree):
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {sparse_optax.layers.path_name(path): x for path, x in paths}


def slices(units, *gone):
    """``(leaf, axis, indices)`` of units, from their mask alone."""
    kept = np.ones(len(units), bool)
    kept[list(gone)] = False
    found = []
    for name, mask in leaves_by_name(units.masks(jnp.asarray(kept))).items():
        there = np.asarray(mask)
        for axis in range(there.ndim):
            others = tuple(i for i in range(there.ndim) if i != axis)
            at = np.flatnonzero(~there.any(others))
            if 0 < len(at) < there.shape[axis]:
                found.append((name, axis, at))
    return found


def without(units, params, unit):
    kept = np.ones(len(units), bool)
    kept[unit] = False
    return sparse_optax.sparsify(params, units.masks(jnp.asarray(kept)))


def only_unread(units, params, unit, reads):
    """The parameters where nothing reads a unit, or None if no weight does."""
    flat = dict(leaves_by_name(params))
    change = [x for x in slices(units, unit) if reads(flat[x[0]].shape, x[1], x[0])]
    for name, axis, at in change:
        index = (slice(None),) * axis + (at,)
        flat[name] = flat[name].at[index].set(0)
    structure = jax.tree.structure(params)
    return jax.tree.unflatten(structure, list(flat.values())) if change else None


def kernel_reads(shape, axis, name):
    """Inputs of the kernels of flax."""
    return name.endswith("kernel") and axis == len(shape) - 2


def far(a, b):
    """Largest difference over the largest number."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / jnp.abs(x).max()) for x, y in pairs)


def check_a_cut(fn, params, x, units, kept, *, all_read=True, pixels=()):
    """What ``compact`` leaves is what the units say, and computes the same. Where not
    all is read, or not for long, it may leave less. Of kernels of one pixel in
    ``pixels`` it leaves out so many of the batch, which nothing reads.
    """
    pruned = sparse_optax.sparsify(params, units.masks(jnp.asarray(kept)))
    small = sparse_optax.compact(fn, pruned, x)
    left = {n: list(w.shape) for n, w in leaves_by_name(params).items()}
    for name, axis, at in slices(units, *np.flatnonzero(~kept)):
        left[name][axis] -= len(at)
    before, after = small.record.multiply_adds
    costs = units.multiply_adds(), units.multiply_adds(jnp.asarray(kept))
    assert costs[0] == before
    unread = sum(n * math.prod(left[name]) for name, n in dict(pixels).items())
    assert costs[1] - unread == after if all_read else costs[1] >= after
    for name, w in leaves_by_name(small.params).items():
        if all_read:
            assert list(w.shape) == left[name], name
        else:
            assert all(map(operator.le, w.shape, left[name])), name
    assert far(jax.jit(fn)(pruned, x), jax.jit(small)(small.params, x)) < 1e-4


def check_units(fn, params, x, units, reads, tries=4, seed=0, pixels=()):
    """Zeroing a unit changes nothing but that it is no longer read."""
    rng = np.random.default_rng(seed)
    run, changed = jax.jit(fn), 0
    for unit in rng.permutation(len(units))[:tries]:
        unread = only_unread(units, params, unit, reads)
        if unread is None:
            continue
        gone = run(without(units, params, unit), x)
        assert far(run(unread, x), gone) < 1e-4
        changed += far(run(params, x), gone) > 1e-6
    assert changed
    # About a third go, and no group as a whole.
    scores = jnp.asarray(rng.random(len(units)), jnp.float32)
    kept = np.asarray(units.select(scores, 0.67))
    check_a_cut(fn, params, x, units, kept, pixels=pixels)


# --- the networks of the experiments --------------------------------------------------
def small_network(name):
    """A network of the registry, or a shallow one of its family; images or texts."""
    text = name == "transformer"
    shape = (16,) if text else (28, 28, 1) if "lenet" in name else (32, 32, 3)
    make = {
        "wrn": functools.partial(models.wide_resnet.WideResNet, depth=10, factor=1),
        "resnet": functools.partial(models.resnet.CifarResNet, depth=8),
        "densenet": functools.partial(models.densenet.DenseNet, depth=7, growth=5),
        "transformer": functools.partial(
            models.transformer.Transformer, width=16, depth=2, heads=4
        ),
    }.get(name) or functools.partial(models.MODELS[name].make, init="torch")
    module = make(shape, 10, rngs=nnx.Rngs(0))
    graph, params, stats, rest = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
    variables = {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}
    stateful = bool(variables["stats"])

    def fn(v, x):
        module = nnx.merge(graph, v["params"], v["stats"], rest)
        return module(x, train=False, key=None) if stateful else module(x)

    if text:
        return fn, dense(variables), jnp.arange(48).reshape(3, 16) % 10
    return fn, dense(variables), jax.random.normal(jax.random.key(0), (2, *shape))


# Sizes of the groups, as the papers describe the networks.
GROUPS = {
    "lenet-300-100": [300, 100],
    "lenet-300-100-bn": [300, 100],
    "lenet-5-caffe": [20, 50, 500],
    # Inside of the blocks, and the sums of each stage.
    "wrn": [16, 16, 32, 32, 64, 64],
    "resnet": [16, 16, 32, 32, 64, 64],
    # Each layer's new channels, and those of the transitions.
    "densenet": [16, 5, 21, 5, 26, 5],
    # Hidden units and heads of each layer.
    "transformer": [64, 4, 64, 4],
    "alexnet-s": [96, 256, 384, 384, 256, 1024, 1024],
    "vgg16-d": [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [512] * 2,
    "vgg16-like": [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6 + [512],
}
DEEP = ("resnet", "lenet-300-100-bn", "alexnet-s", "vgg16-d", "vgg16-like")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.exhaustive if n in DEEP else ())
        for n in GROUPS
    ],
)
def test_networks_of_the_experiments(name):
    fn, params, x = small_network(name)
    units = structured.channels(fn, params, x)
    assert sorted(g.size for g in units.groups) == sorted(GROUPS[name])
    check_units(fn, params, x, units, kernel_reads)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["wrn-16-2", "vgg16-c", "resnet-20", "densenet-40"])
def test_networks_at_full_size(name):
    fn, params, x = small_network(name)
    units = structured.channels(fn, params, x)
    pixels = {}
    if name == "vgg16-c":
        # Its kernels of one pixel have a border of zeros. Pooling takes 6 x 6 of 7 x 7
        # pixels behind it and 4 x 4 of 5 x 5, of two images: the others are left out.
        pixels["params/conv4_3/kernel"] = 2 * (7**2 - 6**2)
        pixels["params/conv5_3/kernel"] = 2 * (5**2 - 4**2)
    check_units(fn, params, x, units, kernel_reads, pixels=pixels)


def test_resnet_50_from_shapes_alone():
    shape = (32, 32, 3)
    make = functools.partial(models.resnet.ResNet50, shape, 10)
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)

    def fn(params, x):
        ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), stats)
        return nnx.merge(graph, params, ones)(x, train=False)

    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    units = structured.channels(fn, nnx.to_pure_dict(params), x)
    inside = [64] * 6 + [128] * 8 + [256] * 12 + [512] * 6
    assert sorted(g.size for g in units.groups) == sorted(
        [64, *inside, 256, 512, 1024, 2048]
    )


# --- units by hand --------------------------------------------------------------------
def group(units, name):
    (found,) = [g for g in units.groups if name in [s[0] for s in g.slices]]
    return found


def conv(x, w, **options):
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    return jax.lax.conv_general_dilated(x, w, dimension_numbers=LAYOUT, **options)


def test_a_residual_sum_is_one_unit_on_both_sides():
    def fn(params, x):
        x = conv(x, params["stem"])
        y = conv(jax.nn.relu(conv(x, params["a"])), params["b"])
        return jax.nn.relu(x + y).mean((1, 2)) @ params["last"]

    rng = np.random.default_rng(0)
    shapes = {
        "stem": (3, 3, 2, 6),
        "a": (3, 3, 6, 5),
        "b": (3, 3, 5, 6),
        "last": (6, 3),
    }
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    units = structured.channels(fn, params, x)
    assert {g.slices for g in units.groups} == {
        (("a", 2, 1), ("b", 3, 1), ("last", 0, 1), ("stem", 3, 1)),
        (("a", 3, 1), ("b", 2, 1)),
    }
    # The same program on arrays without the slices computes the same.
    for unit in range(len(units)):
        less = {n: np.asarray(w) for n, w in params.items()}
        for name, axis, at in slices(units, unit):
            less[name] = np.delete(less[name], at, axis)
        assert far(fn(without(units, params, unit), x), fn(less, x)) < 1e-5


def test_behind_a_flattened_image_a_channel_has_several_rows():
    def fn(params, x):
        y = jax.nn.relu(conv(x, params["a"]) + params["b"][None, None, None])
        return y.reshape(y.shape[0], -1) @ params["w"]

    params = {"a": jnp.ones((3, 3, 2, 6)), "b": jnp.ones(6), "w": jnp.ones((96, 3))}
    units = structured.channels(fn, params, jnp.ones((2, 4, 4, 2)))
    (only,) = units.groups
    assert only == ("a:3", 6, (("a", 3, 1), ("b", 0, 1), ("w", 0, 16)))
    assert dict((n, at.tolist()) for n, _, at in slices(units, 2))["w"] == [
        *range(2, 96, 6)
    ]


def test_groups_of_a_convolution_go_whole():
    def fn(params, x):
        y = jax.nn.relu(conv(x, params["a"]))
        y = jax.nn.relu(conv(y, params["deep"], feature_group_count=12))
        y = jax.nn.relu(conv(y, params["grouped"], feature_group_count=4))
        return y.mean((1, 2)) @ params["w"]

    rng = np.random.default_rng(0)
    shapes = {"a": (1, 1, 2, 12), "deep": (3, 3, 1, 24), "grouped": (3, 3, 6, 8)}
    shapes["w"] = (8, 3)
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 2))
    units = structured.channels(fn, params, x)
    (only,) = units.groups
    assert only.size == 4
    assert only.slices == (("a", 3, 3), ("deep", 3, 6), ("grouped", 3, 2), ("w", 0, 2))
    check_a_cut(fn, params, x, units, np.array([True, False, True, True]))


class Attention(nn.Module):
    """A block of a transformer."""

    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        x = x + y
        y = nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(20, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x + y))


def test_heads_of_attention_and_the_features_within_them():
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    params = dense(Attention().init(jax.random.key(1), x))
    units = structured.channels(Attention().apply, params, x)
    name = "params/MultiHeadDotProductAttention_0"
    heads = [g for g in units.groups if (f"{name}/out/kernel", 0, 1) in g.slices]
    assert [(g.size, len(g.slices)) for g in heads] == [(4, 7)]  # and three biases
    inner = {
        frozenset(leaf.split("/")[2] for leaf, axis, _ in g.slices)
        for g in units.groups
        if g.size == 3
    }
    assert inner == {frozenset({"query", "key"}), frozenset({"value", "out"})}
    assert group(units, "params/up/bias").size == 20
    # The stream is normalised: 12 of nothing.
    assert {g.size for g in units.groups} == {4, 3, 20}
    check_a_cut(Attention().apply, params, x, units, np.arange(len(units)) % 3 != 1)


class Linen(nn.Module):
    """Norms, pooling, a transposed convolution, a group norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.BatchNorm(use_running_average=True)(nn.Conv(10, (3, 3))(x))
        x = nn.avg_pool(nn.silu(x), (2, 2), (1, 1), padding="SAME")
        x = nn.relu(nn.GroupNorm(num_groups=3)(nn.ConvTranspose(12, (3, 3), (2, 2))(x)))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(3)(jnp.tanh(nn.Dense(9)(x)))


def test_linen():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    params = dense(Linen().init(jax.random.key(1), x))
    units = structured.channels(Linen().apply, params, x)
    # A group norm normalises over its groups, which go as wholes.
    assert sorted(g.size for g in units.groups) == [3, 8, 9, 10]
    names = {s[0] for s in group(units, "params/BatchNorm_0/bias").slices}
    assert {"batch_stats/BatchNorm_0/var", "params/Conv_1/bias"} < names
    check_units(Linen().apply, params, x, units, kernel_reads, tries=6)


def test_equinox():
    class Net(eqx.Module):
        first: eqx.nn.Conv2d
        second: eqx.nn.Conv2d
        last: eqx.nn.Linear

        def __call__(self, x):
            x = jax.nn.relu(self.second(jax.nn.relu(self.first(x))))
            return self.last(x.reshape(-1))

    keys = jax.random.split(jax.random.key(0), 3)
    net = Net(
        eqx.nn.Conv2d(2, 5, 3, key=keys[0]),
        eqx.nn.Conv2d(5, 7, 3, key=keys[1]),
        eqx.nn.Linear(7 * 4, 3, key=keys[2]),
    )
    arrays, static = eqx.partition(net, eqx.is_array)

    def fn(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    x = jax.random.normal(jax.random.key(1), (3, 2, 6, 6))
    units = structured.channels(fn, arrays, x)
    assert [g.slices for g in units.groups] == [
        (("first/weight", 0, 1), ("first/bias", 0, 1), ("second/weight", 1, 1)),
        (("second/weight", 0, 1), ("second/bias", 0, 1), ("last/weight", 1, 4)),
    ]
    check_units(
        fn, arrays, x, units, lambda s, axis, n: n.endswith("weight") and axis == 1
    )


# --- what stays whole -----------------------------------------------------------------
def test_what_is_normalised_or_summed_or_returned_has_no_units():
    w = jnp.ones((4, 6))

    def read(act):
        return lambda params, x: act(x @ params["a"]) @ params["b"]

    params, x = {"a": w, "b": w.T}, jnp.ones((2, 4))
    assert len(structured.channels(read(jnp.tanh), params, x)) == 6
    none = (
        jax.nn.softmax,
        functools.partial(jnp.cumsum, axis=-1),
        lambda h: jax.lax.top_k(h, 6)[0],
        lambda h: h - h.mean(-1, keepdims=True),
    )
    for act in none:
        with pytest.raises(ValueError, match="channels: `fn` has no unit"):
            structured.channels(read(act), params, x)
    for fn in (
        lambda params, x: (x @ params["a"]).sum(-1),
        lambda params, x: x @ params["a"],
        lambda params, x: (x @ params["a"], x @ params["a"] @ params["b"]),
    ):
        with pytest.raises(ValueError, match="channels: `fn` has no unit"):
            structured.channels(fn, params, x)


def test_a_product_of_activations_has_units_only_where_zeros_stay_zeros():
    def fn(params, x, act):
        a, b = act(x @ params["a"]), act(x @ params["b"])
        return jnp.einsum("ij,kj->ik", a, b) @ params["w"]

    params = {n: jnp.ones((4, 6)) for n in "ab"} | {"w": jnp.ones((2, 3))}
    x = jnp.ones((2, 4))
    units = structured.channels(functools.partial(fn, act=jnp.sin), params, x)
    assert [g.slices for g in units.groups] == [(("a", 1, 1), ("b", 1, 1))]
    for act in (jnp.cos, jax.nn.sigmoid, lambda h: h + 1):
        with pytest.raises(ValueError, match="no unit"):
            structured.channels(functools.partial(fn, act=act), params, x)


def test_numbers_that_the_function_closes_over_are_no_weights():
    fixed = jnp.ones((6, 5))

    def fn(params, x, act):
        return act(x @ params["a"]) @ fixed

    params, x = {"a": jnp.ones((4, 6))}, jnp.ones((2, 4))
    assert len(structured.channels(functools.partial(fn, act=jnp.tanh), params, x)) == 6
    with pytest.raises(ValueError, match="no unit"):
        structured.channels(functools.partial(fn, act=jnp.exp), params, x)


# --- a random walk --------------------------------------------------------------------
@pytest.mark.parametrize(
    "seed",
    [pytest.param(n, marks=pytest.mark.exhaustive if n > 9 else ()) for n in range(24)],
)
def test_a_random_walk_over_graphs(seed):
    walk = Walk(seed)
    rng = np.random.default_rng(seed)
    for name, w in walk.params.items():
        draw = rng.normal(size=w.shape)
        walk.params[name] = jnp.asarray(
            np.abs(draw) + 0.5 if w.ndim == 1 else draw / np.sqrt(w.shape[-2]),
            jnp.float32,
        )
    x = jax.random.normal(jax.random.key(seed), (2, 6, 6, 4))
    try:
        units = structured.channels(walk, walk.params, x)
    except ValueError as error:
        if "no unit" not in str(error):
            raise
        return

    def reads(shape, axis, name):
        return axis == (0 if len(shape) == 3 else len(shape) - 2) and len(shape) > 1

    run = jax.jit(walk)
    for unit in rng.permutation(len(units))[:5]:
        unread = only_unread(units, walk.params, unit, reads)
        if unread is not None:
            gone = run(without(units, walk.params, unit), x)
            assert far(run(unread, x), gone) < 1e-4
    scores = jnp.asarray(rng.random(len(units)), jnp.float32)
    kept = np.asarray(units.select(scores, 0.6))
    check_a_cut(walk, walk.params, x, units, kept, all_read=False)


# --- scores, selection, costs ---------------------------------------------------------
def little(seed=0):
    """A small network of two groups, with biases."""

    def fn(params, x):
        h = jax.nn.relu(x @ params["a"] + params["c"][None])
        return jax.nn.relu(h @ params["e"]) @ params["d"]

    rng = np.random.default_rng(seed)
    shapes = {"a": (5, 7), "e": (7, 6), "c": (7,), "d": (6, 3)}
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    x = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    return fn, params, x, structured.channels(fn, params, x)


def by_hand(values):
    """Sums over the kernels of the 7 and the 6 units."""
    a, e, d = (np.asarray(values[n], np.float64) for n in "aed")
    return np.concatenate([a.sum(0) + e.sum(1), e.sum(0) + d.sum(1)])


def test_scores_are_sums_over_the_kernels_of_a_unit():
    _, params, _, units = little()
    assert units.scored == ("a", "d", "e")
    sizes = np.array([5 + 6] * 7 + [7 + 3] * 6)
    np.testing.assert_array_equal(units.sizes, sizes)
    total = by_hand(jax.tree.map(jnp.abs, params))
    np.testing.assert_allclose(units.scores(params, mean=False), total, rtol=1e-6)
    np.testing.assert_allclose(units.scores(params), total / sizes, rtol=1e-6)
    roots = by_hand(jax.tree.map(jnp.square, params)) ** 0.5
    np.testing.assert_allclose(
        units.penalty(params), (np.sqrt(sizes) * roots).sum(), rtol=1e-6
    )
    zero = jax.tree.map(jnp.zeros_like, params)
    assert all(not np.any(g) for g in jax.tree.leaves(jax.grad(units.penalty)(zero)))


def test_where_says_which_leaves_count():
    fn, params, x, _ = little()
    units = structured.channels(fn, params, x, where=lambda name, leaf: name == "c")
    scores = np.asarray(units.scores(params))
    np.testing.assert_allclose(scores[:7], np.abs(params["c"]))
    assert not scores[7:].any()
    masks = units.masks(jnp.zeros(13, bool))
    assert not any(m.any() for m in jax.tree.leaves(masks))


def test_fisher_is_the_mean_of_squared_sums_over_examples():
    fn, params, x, units = little()
    y = jnp.arange(4) % 3

    def loss(params, example):
        x, y = example
        return -jax.nn.log_softmax(fn(params, x[None])[0])[y]

    expected = np.zeros(13)
    for i in range(4):
        grads = jax.grad(loss)(params, (x[i], y[i]))
        products = {n: np.asarray(params[n] * grads[n]) for n in params}
        expected += by_hand(products) ** 2 / 8
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    found = units.fisher(loss, params, batches)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)


def ranked(scores, groups):
    """Units in the order in which they are kept: the best of each group first."""
    first = []
    for g in sorted(set(groups)):
        members = [i for i in range(len(scores)) if groups[i] == g]
        first.append(min(members, key=lambda i: (-scores[i], i)))
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(first, key=lambda i: (-scores[i], i)) + [
        i for i in order if i not in first
    ]


@pytest.mark.parametrize("seed", range(4))
def test_exactly_so_many_units_are_kept(seed):
    *_, units = little()
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 5, 13).astype(np.float32)  # with ties
    groups = units.group.tolist()
    for k in range(1, 14):
        kept = np.asarray(units.select(scores, k / 13))
        assert kept.tolist() == [
            i in ranked(scores, groups)[: max(k, 2)] for i in range(13)
        ]
        assert kept[:7].any()
        assert kept[7:].any()
    each = np.asarray(units.select(scores, 0.5, scope="group"))
    assert (each[:7].sum(), each[7:].sum()) == (3, 3)
    for part, g in ((range(7), each[:7]), (range(7, 13), each[7:])):
        best = sorted(part, key=lambda i: (-scores[i], i))[:3]
        assert [i for i in part if g[i - part[0]]] == sorted(best)
    assert np.array_equal(
        jax.jit(lambda s: units.select(s, 0.5))(scores), units.select(scores, 0.5)
    )


def test_multiply_adds_are_counted_and_met():
    *_, units = little()
    rng = np.random.default_rng(0)
    for _ in range(20):
        kept = rng.random(13) < 0.6
        n, m = kept[:7].sum(), kept[7:].sum()
        assert units.multiply_adds(kept) == 4 * (5 * n + n * m + m * 3)
    whole = units.multiply_adds()
    expected = []
    for unit in range(13):
        kept = np.arange(13) != unit
        expected.append(whole - units.multiply_adds(kept))
    np.testing.assert_array_equal(units.savings(), expected)
    scores = rng.random(13).astype(np.float32)
    order = ranked(scores, units.group.tolist())
    for share in (0.2, 0.35, 0.5, 0.77, 1.0):
        fits = [
            k
            for k in range(2, 14)
            if units.multiply_adds(np.isin(np.arange(13), order[:k])) <= share * whole
        ]
        kept = np.asarray(units.select(scores, multiply_adds=share))
        assert kept.sum() == max(fits)
        each = np.asarray(units.select(scores, multiply_adds=share, scope="group"))
        assert units.multiply_adds(each) <= share * whole
        assert abs(each[:7].sum() / 7 - each[7:].sum() / 6) <= 1 / 6 + 1e-9
    with pytest.raises(ValueError, match=r"select: `multiply_adds`=0\.01 allows"):
        units.select(scores, multiply_adds=0.01)


# --- while training -------------------------------------------------------------------
def train(fn, params, x, tx, steps, look):
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.mean(jnp.square(fn(p, x) - 1)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    for _ in range(steps):
        before = params
        params, state, grads = step(params, state)
        look(before, params, state, grads)
    assert step._cache_size() == 1
    return params, state


@pytest.mark.parametrize("scope", ["global", "group"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradual_pruning_follows_the_cubic_ramp(scope, packed):
    fn, params, x, units = little()
    tx = structured.gradual_channels(
        optax.sgd(0.05, momentum=0.9),
        units=units,
        density=0.4,
        update_period=3,
        update_stop=20,
        scope=scope,
        packed=packed,
    )
    counts, gone = [], np.zeros(13, bool)

    def look(before, after, state, grads):
        kept = np.asarray(
            units.alive([sparse_optax.get_masks(state)[n] for n in "acde"])
        )
        step = len(counts)
        if step and step % 3 == 0 and step < 20:
            scores = np.where(gone, -1, units.scores(before))
            for g in set(units.group) if scope == "group" else [None]:
                among = [i for i in range(13) if g is None or units.group[i] == g]
                order = [
                    i
                    for i in ranked(
                        scores, units.group.tolist() if g is None else [0] * 13
                    )
                    if i in among
                ]
                assert kept[order].tolist() == sorted(kept[order].tolist())[::-1]
        assert not (kept & gone).any()
        gone[:] = ~kept
        counts.append(int(kept.sum()))
        masks = units.masks(jnp.asarray(kept))
        for name, mask in masks.items():
            assert not np.asarray(after[name])[~np.asarray(mask)].any()

    params, _state = train(fn, params, x, tx, 25, look)
    expected, now = [], 13
    for step in range(25):
        if step and step % 3 == 0 and step < 20:
            left = (1 - (step - 3) / 15) ** 3
            if scope == "global":
                now = 5 + int(8 * left)
            else:
                now = 2 + int(5 * left) + 2 + int(4 * left)
        expected.append(now)
    assert counts == expected
    small = sparse_optax.compact(fn, params, x)
    n, m = (int((~gone)[units.group == g].sum()) for g in (0, 1))
    assert small.params["e"].shape == (n, m)


def test_gradual_pruning_within_multiply_adds():
    fn, params, x, units = little()
    for scope in ("global", "group"):
        tx = structured.gradual_channels(
            optax.adam(0.01),
            units=units,
            multiply_adds=0.4,
            update_period=2,
            update_stop=9,
            scope=scope,
        )
        costs = []

        def look(before, after, state, grads, costs=costs):
            masks = sparse_optax.get_masks(state)
            kept = units.alive([masks[n] for n in "acde"])
            costs.append(units.multiply_adds(kept) / units.multiply_adds())

        after, _ = train(fn, params, x, tx, 12, look)
        for step, cost in enumerate(costs):
            left = (1 - min(max(step - step % 2, 2) - 2, 6) / 6) ** 3
            assert cost <= 0.4 + 0.6 * left
        assert costs[-1] > 0.2
        record = sparse_optax.compact(fn, after, x).record.multiply_adds
        assert record[1] <= 0.4 * record[0]


def test_taylor_ranks_by_weight_times_momentum():
    fn, params, x, units = little()
    tx = structured.gradual_channels(
        optax.sgd(0.05, momentum=0.9),
        units=units,
        density=6 / 13,
        update_period=4,
        update_stop=5,
        score="taylor",
    )
    trace = jax.tree.map(jnp.zeros_like, params)
    seen = []

    def look(before, after, state, grads):
        nonlocal trace
        if len(seen) == 4:
            products = jax.tree.map(lambda w, m: np.abs(w * m), before, trace)
            order = ranked(by_hand(products), units.group.tolist())
            masks = sparse_optax.get_masks(state)
            kept = np.asarray(units.alive([masks[n] for n in "acde"]))
            assert sorted(np.flatnonzero(kept)) == sorted(order[:6])
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, grads)
        seen.append(1)

    train(fn, params, x, tx, 6, look)


def test_seeds_in_one_program():
    _fn, params, _x, units = little()
    tx = structured.gradual_channels(
        optax.sgd(0.05), units=units, density=0.5, update_period=2, update_stop=5
    )
    several = jax.tree.map(lambda w: jnp.stack([w, -2 * w, w[::-1]]), params)
    states = jax.vmap(tx.init)(several)
    step = jax.jit(jax.vmap(tx.update))
    alone = jax.jit(tx.update)
    for i in range(5):
        _, states = step(several, states, several)
        for member in (0, 2) if i == 4 else ():
            own = jax.tree.map(lambda w, m=member: w[m], several)
            state = tx.init(own)
            for _ in range(5):
                _, state = alone(own, state, own)
            masks = sparse_optax.get_masks(states)
            for name, mask in sparse_optax.get_masks(state).items():
                np.testing.assert_array_equal(masks[name][member], mask)


@pytest.mark.parametrize("density", [0.5, lambda count: 0.5])
def test_the_gate_passes_the_units_of_largest_t(density):
    fn, params, x, units = little()
    tx = structured.gate_channels(units, density)
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(fn(p, x))))(params)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    products = jax.tree.map(lambda w, g: np.abs(w * g), params, grads)
    order = ranked(by_hand(products), units.group.tolist())
    kept = np.isin(np.arange(13), order[:6])
    np.testing.assert_array_equal(state.kept, kept)
    first, second = kept[:7], kept[7:]
    passes = {
        "a": np.broadcast_to(first, (5, 7)),
        "c": first,
        "d": np.broadcast_to(second[:, None], (6, 3)),
        "e": np.outer(first, second),
    }
    for name, g in grads.items():
        np.testing.assert_array_equal(updates[name], np.where(passes[name], g, 0))


# --- bad input ------------------------------------------------------------------------
def test_bad_input_gets_one_clear_error():
    fn, params, x, units = little()
    with pytest.raises(ValueError, match="channels: `fn` must be a function"):
        structured.channels(params, fn, x)
    with pytest.raises(ValueError, match="scores: `tree` has the leaves"):
        units.scores({"a": params["a"]})
    with pytest.raises(ValueError, match=r"scores: `tree` has shape \(7, 5\) for 'a'"):
        units.scores(params | {"a": params["a"].T})
    with pytest.raises(ValueError, match="select: `scores` must be an array of 13"):
        units.select(jnp.ones(5), 0.5)
    with pytest.raises(ValueError, match="select: `scores` has numbers that are neg"):
        units.select(-jnp.ones(13), 0.5)
    with pytest.raises(ValueError, match="exactly one of the two must be given"):
        units.select(jnp.ones(13))
    with pytest.raises(ValueError, match="exactly one of the two must be given"):
        units.select(jnp.ones(13), 0.5, multiply_adds=0.5)
    with pytest.raises(ValueError, match=r"select: `density` must be a number in \(0"):
        units.select(jnp.ones(13), 1.5)
    with pytest.raises(ValueError, match="select: `scope` must be"):
        units.select(jnp.ones(13), 0.5, scope="leaf")
    with pytest.raises(ValueError, match="masks: `kept` must be a boolean array of 13"):
        units.masks(jnp.ones(13))
    with pytest.raises(ValueError, match="gradual_channels: `units` must be the units"):
        structured.gradual_channels(
            optax.sgd(0.1), units=params, density=0.5, update_period=1, update_stop=3
        )
    with pytest.raises(ValueError, match=r"gradual_channels: `multiply_adds`=0\.01"):
        structured.gradual_channels(
            optax.sgd(0.1),
            units=units,
            multiply_adds=0.01,
            update_period=1,
            update_stop=3,
        )
    with pytest.raises(ValueError, match="gate_channels: `density` must be"):
        structured.gate_channels(units, 2.0)
    tx = structured.gate_channels(units, 0.5)
    with pytest.raises(ValueError, match="gate_channels: `params` is None"):
        tx.update(params, tx.init(params))
