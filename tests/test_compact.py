"""``compact``: a smaller model that computes the same function."""

import functools
import importlib.util
import itertools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import refuses

import sparse_optax
from sparse_optax import analysis, compact, export
from sparse_optax.experiments import models
from sparse_optax.export.compaction import contraction


# --- oracles --------------------------------------------------------------------------
def hollow(tree, density=0.1, dead=0.35, seed=0, axes=(-2, -1)):
    """Parameters with random kernels of which some rows and columns are zero, random
    biases, and statistics that are positive.
    """
    rng = np.random.default_rng(seed)

    def one(path, x):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        if "var" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
        if x.ndim < 2 or "bias" in name:
            return jnp.asarray(rng.normal(size=x.shape) + 0.1, x.dtype)
        kept = rng.random(x.shape) < density
        for axis in axes:
            sides = [1] * x.ndim
            sides[axis] = -1
            kept &= rng.random(x.shape[axis]).reshape(sides) > dead
        scale = np.sqrt(1 / (density * max(x.size / x.shape[-1], 1)))
        values = np.where(kept, rng.normal(size=x.shape) * scale, 0)
        return jnp.asarray(values, x.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def gap(fn, small, params, *args):
    """Largest difference of the results over the largest result."""
    dense = jax.tree.leaves(jax.jit(fn)(params, *args))
    other = jax.tree.leaves(jax.jit(small)(small.params, *args))
    assert [x.shape for x in dense] == [x.shape for x in other]
    assert [x.dtype for x in dense] == [x.dtype for x in other]
    gaps = [
        float(jnp.abs(a - b).max() / jnp.maximum(jnp.abs(a).max(), 1e-30))
        for a, b in zip(dense, other, strict=True)
    ]
    assert not np.isnan(gaps).any()
    return max(gaps)


def sizes(model):
    """Shapes of the smaller leaves, by name."""
    return {x.name: x.small_shape for x in model.record.layers}


# --- networks -------------------------------------------------------------------------
NETWORKS = (
    "lenet-300-100",
    "lenet-5-caffe",
    "wrn-10-1",
    pytest.param("vgg16-c", marks=pytest.mark.exhaustive),
    pytest.param("vgg16-d", marks=pytest.mark.exhaustive),
    pytest.param("wrn-28-2", marks=pytest.mark.exhaustive),
)


def network(name, key=0):
    """Apply, variables and images of a network of the experiments."""
    shape = (28, 28, 1) if "lenet" in name else (32, 32, 3)
    if name == "wrn-10-1":  # the shallowest of the family
        module = models.wide_resnet.WideResNet(
            shape, depth=10, factor=1, rngs=nnx.Rngs(0)
        )
        graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)

        def apply(params, stats, x, *, train=False, key=None):
            module = nnx.merge(graph, params, stats)
            y = module(x, train=train, key=key)
            return y, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

        variables = {
            "params": nnx.to_pure_dict(params),
            "stats": nnx.to_pure_dict(stats),
        }
    else:
        apply, params, stats = models.create_stateful(
            name, shape, 10, key=jax.random.key(0)
        )
        variables = {"params": params, "stats": stats}
    images = jax.random.normal(jax.random.key(key), (4, *shape))
    return apply, variables, images


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_experiments(name):
    apply, variables, images = network(name)
    variables = hollow(variables)

    def fn(v, x):
        return apply(v["params"], v["stats"], x)[0]

    small = compact(fn, variables, images)
    assert gap(fn, small, variables, images) < 1e-5
    assert not small.record.left_whole
    before, after = small.record.multiply_adds
    assert after < before / 2
    # Another batch, and a batch of which the example has no shape.
    other = jax.random.normal(jax.random.key(1), (3, *images.shape[1:]))
    assert gap(fn, small, variables, other) < 1e-5


def test_sizes_are_those_of_a_compaction_by_hand(monkeypatch):
    """Of a net without known units that are read: live rows and columns."""
    monkeypatch.setattr(contraction, "TAKE", 0)  # cut also where it does not pay
    rng = np.random.default_rng(0)
    shapes = [(20, 12), (12, 9), (9, 4)]
    kernels = [rng.normal(size=s) * (rng.random(s) < 0.2) for s in shapes]
    params = [jnp.asarray(k, jnp.float32) for k in kernels]

    def fn(params, x):
        for k in params[:-1]:
            x = jax.nn.relu(x @ k)
        return x @ params[-1]

    fed = [np.ones(20, bool)]
    for k in kernels:
        fed.append((k[fed[-1]] != 0).any(0))
    read = [np.ones(4, bool)]
    for k in reversed(kernels):
        read.append((k[:, read[-1]] != 0).any(1))
    read = read[::-1]
    alive = [int((a & b).sum()) for a, b in zip(fed, read, strict=True)]
    alive[-1] = 4
    small = compact(fn, params, jnp.ones((2, 20)))
    found = [x.small_shape for x in small.record.layers]
    assert found == list(itertools.pairwise(alive))
    assert gap(fn, small, params, jax.random.normal(jax.random.key(0), (5, 20))) < 1e-6


def test_float64_is_exact():
    with jax.enable_x64(True):
        apply, variables, images = network("lenet-300-100")
        variables = hollow(jax.tree.map(lambda x: x.astype(jnp.float64), variables))
        images = images.astype(jnp.float64)

        def fn(v, x):
            return apply(v["params"], v["stats"], x)[0]

        assert gap(fn, compact(fn, variables, images), variables, images) < 1e-13


# --- frameworks -----------------------------------------------------------------------
class Linen(nn.Module):
    """Grouped, depthwise, transposed convolution, norms, pooling, activations."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.gelu(nn.Conv(16, (3, 3))(x))
        x = nn.silu(nn.Conv(16, (3, 3), feature_group_count=16)(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(24, (3, 3), feature_group_count=4)(x))
        x = nn.GroupNorm(num_groups=4)(x)
        x = nn.relu(nn.ConvTranspose(12, (3, 3), strides=(2, 2))(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.max_pool(x, (2, 2), (2, 2), padding="SAME")
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(5)(nn.LayerNorm()(nn.Dense(30)(x)))


def test_linen_with_many_operations():
    model, x = Linen(), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = hollow(model.init(jax.random.key(1), x), density=0.3)
    small = compact(model.apply, variables, x)
    assert gap(model.apply, small, variables, x) < 1e-5
    before, after = small.record.parameters
    assert after < 0.8 * before
    assert sizes(small)["params/ConvTranspose_0/kernel"][-1] < 12


class Attention(nn.Module):
    """A block of a transformer, with a table of embeddings."""

    dead: int = 2

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 16)(tokens)
        mask = nn.make_causal_mask(tokens)
        y = nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        x = x + y
        y = nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
        return nn.Dense(11)(nn.LayerNorm()(x + y))


def test_a_head_goes_where_nothing_moves_through_it():
    model = Attention()
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)
    variables = model.init(jax.random.key(1), tokens)
    variables = hollow(variables, density=0.8, dead=0.0)
    block = variables["params"]["MultiHeadDotProductAttention_0"]
    kernel = block["value"]["kernel"].at[:, 1:3].set(0)
    block["value"] = {
        "kernel": kernel,
        "bias": block["value"]["bias"].at[1:3].set(0),
    }
    hidden = variables["params"]["Dense_1"]  # flax numbers the outer one first
    hidden["kernel"] = hidden["kernel"].at[:, ::2].set(0)
    small = compact(model.apply, variables, tokens)
    assert gap(model.apply, small, variables, tokens) < 1e-5
    found = sizes(small)
    name = "params/MultiHeadDotProductAttention_0"
    assert found[f"{name}/value/kernel"] == (16, 2, 4)
    assert found[f"{name}/out/kernel"] == (2, 4, 16)
    assert found[f"{name}/query/kernel"] == (16, 2, 4)
    assert found["params/Dense_0/kernel"] == (16, 16)
    assert found["params/Dense_1/kernel"] == (16, 16)


def test_equinox():
    model = eqx.nn.MLP(8, 4, 30, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    arrays = hollow(arrays, density=0.2)

    def fn(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    x = jax.random.normal(jax.random.key(1), (6, 8))
    small = compact(fn, arrays, x)
    assert gap(fn, small, arrays, x) < 1e-5
    assert type(small.params) is type(arrays)
    assert small.record.parameters[1] < small.record.parameters[0] / 3


def test_haiku():
    def forward(x):
        return hk.Sequential(
            [hk.Linear(40), jax.nn.relu, hk.Linear(20), jnp.tanh, hk.Linear(3)]
        )(x)

    model = hk.without_apply_rng(hk.transform(forward))
    x = jax.random.normal(jax.random.key(1), (6, 8))
    params = hollow(model.init(jax.random.key(0), x), density=0.2)
    small = compact(model.apply, params, x)
    assert gap(model.apply, small, params, x) < 1e-5
    assert small.record.parameters[1] < small.record.parameters[0] / 3


def test_a_state_of_nnx_with_random_keys():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(8, 40, rngs=rngs)
            self.norm = nnx.BatchNorm(40, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.last = nnx.Linear(40, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))

    model = Net(nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    state = hollow(state, density=0.2)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    x = jax.random.normal(jax.random.key(1), (6, 8))
    small = compact(fn, state, x)
    assert gap(fn, small, state, x) < 1e-5
    assert sizes(small)["last/kernel"][0] < 40


def test_dense_connections():
    def fn(params, x):
        for w in params[:-1]:
            y = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
            x = jnp.concatenate([x, y], axis=-1)
        return x.mean((1, 2)) @ params[-1]

    key = jax.random.key(0)
    shapes = [(3, 3, 4 + 8 * i, 8) for i in range(4)] + [(36, 5)]
    params = hollow([jax.random.normal(key, s) for s in shapes])
    x = jax.random.normal(key, (2, 6, 6, 4))
    small = compact(fn, params, x)
    assert gap(fn, small, params, x) < 1e-5
    assert small.record.multiply_adds[1] < small.record.multiply_adds[0] / 3


def test_a_padded_shortcut():
    """Channels of zeros beside those of the identity."""

    def conv(x, w, stride):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=layout
        )

    def fn(params, x):
        x = jax.nn.relu(conv(x, params["a"], 1))
        y = conv(jax.nn.relu(conv(x, params["b"], 2)), params["c"], 1)
        x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (4, 4))) + y
        return jax.nn.relu(x).mean((1, 2)) @ params["d"]

    key = jax.random.key(0)
    shapes = {"a": (3, 3, 3, 8), "b": (3, 3, 8, 16), "c": (3, 3, 16, 16), "d": (16, 5)}
    params = hollow({n: jax.random.normal(key, s) for n, s in shapes.items()}, 0.2)
    x = jax.random.normal(key, (2, 8, 8, 3))
    small = compact(fn, params, x)
    assert gap(fn, small, params, x) < 1e-5
    assert small.record.multiply_adds[1] < small.record.multiply_adds[0] / 3


def test_known_channels_behind_zero_padding_add_a_map():
    """A channel that is a number other than zero is uneven at the border."""

    def fn(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        for w, b in params:
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, w, (1, 1), "SAME", dimension_numbers=layout
                )
                + b
            )
        return x

    rng = np.random.default_rng(0)
    params = [
        [
            jnp.asarray(rng.normal(size=(3, 3, n, m)), jnp.float32).at[..., :4].set(0),
            jnp.asarray(rng.uniform(0.5, 1, m), jnp.float32)[None, None, None],
        ]
        for n, m in ((3, 8), (8, 8), (8, 8))
    ]
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 3))
    small = compact(fn, params, x)
    assert gap(fn, small, params, x) < 1e-5
    assert small.params[1][0].shape[2] == 4


# --- a random walk over graphs --------------------------------------------------------
class Walk:
    """A random program over features (batch, 6, 6, channels), with its parameters."""

    def __init__(self, seed):
        rng = self.rng = np.random.default_rng(seed)
        self.params, self.steps = {}, []
        channels = [4]
        for _ in range(int(rng.integers(4, 12))):
            self.add(channels)
        self.last = self.weight((channels[-1], 3))

    def weight(self, shape, positive=False):
        rng, name = self.rng, f"w{len(self.params):02}"
        x = rng.normal(size=shape)
        if len(shape) > 1:
            x *= rng.random(shape) < 0.5
            x *= rng.random(shape[-1]) < 0.7
            x *= (rng.random(shape[-2]) < 0.8)[:, None]
        if positive:
            x = np.abs(x) + 0.5
        self.params[name] = jnp.asarray(x, jnp.float32)
        return name

    def add(self, channels):
        rng, n = self.rng, channels[-1]
        kind = rng.choice(
            "dense conv depthwise bias act norm residual concat slice pool softmax "
            "layernorm gate heads transpose pad scanmap remat stop flip take".split()
        )
        m = n
        if kind in ("dense", "conv", "residual", "gate", "scanmap", "remat"):
            window = () if kind in ("dense", "gate", "scanmap") else (3, 3)
            m = int(rng.integers(3, 9)) if kind != "residual" else n
            own = (self.weight((*window, n, m)), self.weight((m,)))
        elif kind == "depthwise":
            own = (self.weight((3, 3, 1, 2 * n)),)
            m = 2 * n
        elif kind in ("bias", "norm", "layernorm"):
            own = (self.weight((n,)), self.weight((n,), positive=True))
        elif kind == "heads":
            own = tuple(self.weight((n, 2, 3)) for _ in range(3))
            m = 6
        elif kind == "concat":
            back = int(rng.integers(len(channels)))
            own, m = (back,), n + channels[back]
        elif kind == "slice":
            m = max(n - 1, 1)
            own = (n - m,)
        elif kind == "pad":
            own, m = (1, 2), n + 3
        elif kind == "take":
            own = tuple(int(i) for i in rng.permutation(n)[: max(n - 1, 1)])
            m = len(own)
        elif kind == "act":
            own = (rng.choice("relu gelu silu tanh relu6 leaky abs".split()),)
        else:
            own = ()
        self.steps.append((kind, own))
        channels.append(m)

    def __call__(self, params, x):
        seen = [x]
        for kind, own in self.steps:
            seen.append(self.step(kind, own, params, seen))
        y = seen[-1].mean((1, 2)) @ params[self.last]
        return y

    def step(self, kind, own, params, seen):
        x = seen[-1]
        w = [params[i] for i in own if isinstance(i, str) and i in params]
        layout = ("NHWC", "HWIO", "NHWC")
        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=layout,
        )
        wide = (None, None, None)
        if kind == "dense":
            return x @ w[0] + w[1][wide]
        if kind == "conv":
            return conv(x, w[0]) + w[1][wide]
        if kind == "remat":
            return jax.checkpoint(lambda x, w: jax.nn.relu(conv(x, w)))(x, w[0])
        if kind == "residual":
            return x + jax.nn.relu(conv(x, w[0]) + w[1][wide])
        if kind == "gate":
            return jax.nn.sigmoid(x @ w[0]) * (x @ w[0] + w[1][wide])
        if kind == "scanmap":
            return jax.lax.map(lambda y: jax.nn.relu(y @ w[0] + w[1][None, None]), x)
        if kind == "depthwise":
            return conv(x, w[0], feature_group_count=x.shape[-1])
        if kind == "bias":
            return x * w[0][wide] + w[1][wide]
        if kind == "norm":
            return (x - w[0][wide]) * jax.lax.rsqrt(w[1][wide] + 1e-3)
        if kind == "layernorm":
            y = x - x.mean(-1, keepdims=True)
            y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-3)
            return y * w[1][wide] + w[0][wide]
        if kind == "softmax":
            return jax.nn.softmax(x, axis=-1)
        if kind == "pool":
            return nn.avg_pool(x, (2, 2), (1, 1), padding="SAME")
        if kind == "concat":
            return jnp.concatenate([x, seen[own[0]]], -1)
        if kind == "slice":
            return x[..., own[0] :]
        if kind == "pad":
            return jnp.pad(x, ((0, 0), (0, 0), (0, 0), own), constant_values=0.5)
        if kind == "flip":
            return x[..., ::-1]
        if kind == "take":
            return jnp.stack([x[..., i] for i in own], -1)
        if kind == "stop":
            return jax.lax.stop_gradient(x) * 0.5 + x
        if kind == "transpose":
            return x.transpose(0, 2, 1, 3)
        if kind == "heads":
            q, k, v = (jnp.einsum("bijc,chd->bihjd", x, y) for y in w)
            a = jax.nn.softmax(jnp.einsum("bihjd,bihkd->bihjk", q, k))
            y = jnp.einsum("bihjk,bihkd->bijhd", a, v)
            return y.reshape(*y.shape[:3], 6)
        acts = {
            "relu": jax.nn.relu,
            "gelu": jax.nn.gelu,
            "silu": jax.nn.silu,
            "tanh": jnp.tanh,
            "relu6": jax.nn.relu6,
            "leaky": jax.nn.leaky_relu,
            "abs": jnp.abs,
        }
        return acts[own[0]](x)


@pytest.mark.parametrize("seed", range(24))
def test_a_random_walk_over_graphs(seed):
    walk = Walk(seed)
    x = jax.random.normal(jax.random.key(seed), (2, 6, 6, 4))
    fold = bool(seed % 2)
    small = compact(walk, walk.params, x, round_to=1 + seed % 3, fold=fold)
    assert gap(walk, small, walk.params, x) < 1e-5
    assert not small.record.left_whole

    if fold:
        return

    def loss(fn, params):
        return jnp.sum(jnp.sin(fn(params, x)))

    # Gradients of weights that are not zero are those of the dense model.
    dense = small.cut(jax.jit(jax.grad(functools.partial(loss, walk)))(walk.params))
    own = jax.jit(jax.grad(functools.partial(loss, small)))(small.params)
    largest = max([1.0, *(float(jnp.abs(g).max()) for g in dense.values() if g.size)])
    for name, g in own.items():
        error = jnp.where(small.params[name] != 0, g - dense[name], 0)
        assert float(jnp.abs(error).max(initial=0)) < 2e-5 * largest, name


# --- gathers, heads, groups -----------------------------------------------------------
def test_a_table_whose_columns_nothing_reads():
    def fn(params, tokens):
        return params["table"][tokens] @ params["w"]

    key = jax.random.key(0)
    params = {
        "table": jax.random.normal(key, (50, 12)),
        "w": jax.random.normal(key, (12, 40)).at[::3].set(0),
    }
    tokens = jnp.array([[1, 2, 49], [0, 7, 7]])
    small = compact(fn, params, tokens)
    assert small.params["table"].shape == (50, 8)
    assert gap(fn, small, params, tokens) < 1e-6


def test_a_depthwise_channel_goes_with_its_input():
    def fn(params, x):
        conv = functools.partial(
            jax.lax.conv_general_dilated,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.nn.relu(conv(x, params["a"]))
        x = jax.nn.relu(conv(x, params["b"], feature_group_count=9))
        return conv(x, params["c"])

    key = jax.random.key(0)
    params = {
        "a": jax.random.normal(key, (3, 3, 2, 9)),
        "b": jax.random.normal(key, (3, 3, 1, 9)).at[..., 4:6].set(0),
        "c": jax.random.normal(key, (1, 1, 9, 40)).at[:, :, 1].set(0),
    }
    x = jax.random.normal(key, (2, 5, 5, 2))
    small = compact(fn, params, x)
    assert [small.params[n].shape[-1] for n in "ab"] == [6, 6]
    assert small.params["c"].shape[2] == 6
    assert gap(fn, small, params, x) < 1e-6


# --- what has no rule -----------------------------------------------------------------
def test_a_loop_that_carries_is_left_whole_and_named():
    def fn(params, x):
        def step(h, w):
            return jnp.tanh(h @ w), None

        x = jax.nn.relu(x @ params["first"])
        x, _ = jax.lax.scan(step, x, params["layers"])
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    key = jax.random.key(0)
    params = {
        "first": jax.random.normal(key, (5, 8)).at[:, 3].set(0),
        "layers": jax.random.normal(key, (3, 8, 8)),
        "a": jax.random.normal(key, (8, 20)).at[:, ::2].set(0),
        "b": jax.random.normal(key, (20, 4)),
    }
    x = jax.random.normal(key, (2, 5))
    small = compact(fn, params, x)
    assert small.record.left_whole["scan"] == (1, "a loop that carries values")
    assert "Left whole: scan, 1 times" in small.record.table()
    assert small.params["layers"].shape == (3, 8, 8)
    assert small.params["first"].shape == (5, 8)
    assert small.params["a"].shape == (8, 10)
    assert gap(fn, small, params, x) < 1e-5


def test_an_unknown_operation_needs_all():
    def fn(params, x):
        h = jax.nn.relu(x @ params["a"])
        return jax.lax.top_k(h, 3)[0] @ params["b"]

    key = jax.random.key(0)
    params = {
        "a": jax.random.normal(key, (5, 8)).at[:, 3].set(0),
        "b": jax.random.normal(key, (3, 4)),
    }
    x = jax.random.normal(key, (2, 5))
    small = compact(fn, params, x)
    assert small.record.left_whole == {"top_k": (1, "there is no rule for it")}
    assert gap(fn, small, params, x) < 1e-6


# --- derivatives ----------------------------------------------------------------------
@jax.custom_vjp
def straight(x):
    """Rounds, and lets gradients pass, three times as large."""
    return jnp.round(x)


straight.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (3 * g,))


@jax.custom_vjp
def normed(x):
    """Does nothing, and divides gradients by the norm of all of them."""
    return x


normed.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.linalg.norm(g),))


@pytest.mark.parametrize(
    "act", [jax.nn.relu, straight, normed], ids=["relu", "straight", "normed"]
)
def test_derivatives_of_their_own_stay(act):
    """Of zero, where relu has the derivative 0 and a maximum 1/2, too."""

    def fn(params, x):
        return jnp.sum(jnp.sin(act(x @ params["a"]) @ params["b"]))

    key = jax.random.key(0)
    params = {
        "a": jax.random.normal(key, (5, 8)).at[:, 3].set(0),
        "b": jax.random.normal(key, (8, 30)).at[1:3].set(0),
    }
    x = jax.random.normal(key, (4, 5)).at[0].set(0)
    small = compact(fn, params, x, fold=False)
    assert small.params["a"].shape == (5, 6)
    dense = small.cut(jax.grad(fn)(params, x))
    own = jax.grad(small)(small.params, x)
    for name in own:
        np.testing.assert_allclose(own[name], dense[name], rtol=1e-4, atol=1e-5)


def test_forward_and_second_derivatives():
    def fn(params, x):
        return jnp.sum(jnp.sin(jax.nn.relu(x @ params["a"]) @ params["b"]))

    key = jax.random.key(0)
    params = {
        "a": jax.random.normal(key, (5, 8)).at[:, 3].set(0),
        "b": jax.random.normal(key, (8, 30)).at[1:3].set(0),
    }
    x = jax.random.normal(key, (4, 5))
    small = compact(fn, params, x)

    def product(fn, params, along):
        return jax.jvp(jax.grad(lambda p: fn(p, x)), (params,), (along,))[1]

    along = jax.tree.map(lambda w: jnp.where(w != 0, jnp.cos(w), 0), params)
    dense = small.cut(product(fn, params, along))
    own = product(small, small.params, small.cut(along))
    for name in own:
        np.testing.assert_allclose(own[name], dense[name], rtol=1e-3, atol=1e-4)


# --- trained on -----------------------------------------------------------------------
def test_trained_on_with_batch_statistics():
    """Steps of the small model are those of the dense one, with masks and momentum."""
    apply, variables, images = network("wrn-10-1")
    variables = hollow(variables, density=0.3)
    labels = jnp.arange(4)

    def fn(v, x):
        logits, stats = apply(
            v["params"], v["stats"], x, train=True, key=jax.random.key(3)
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, stats

    masks = jax.tree.map(
        lambda w: w != 0 if w.ndim > 1 else optax.MaskedNode(), variables["params"]
    )
    tx = sparse_optax.static_sparse(optax.sgd(0.05, momentum=0.9), masks=masks)
    state = tx.init(variables["params"])
    small = compact(
        fn, variables, images, fold=False, state=lambda out: {"stats": out[1]}
    )
    assert small.record.parameters[1] < 0.8 * small.record.parameters[0]

    def steps(fn, variables, state):
        @jax.jit
        def step(params, stats, state):
            def loss(p):
                return fn({"params": p, "stats": stats}, images)

            (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), stats, state, value

        params, stats = variables["params"], variables["stats"]
        for _ in range(3):
            params, stats, state, value = step(params, stats, state)
        return {"params": params, "stats": stats}, value

    dense, loss = steps(fn, variables, state)
    own, own_loss = steps(small, small.params, small.cut(state))
    np.testing.assert_allclose(own_loss, loss, rtol=1e-4)
    again = small.expand(own)
    for a, b, before in zip(
        jax.tree.leaves(small.cut(dense)),
        jax.tree.leaves(own),
        jax.tree.leaves(small.params),
        strict=True,
    ):
        np.testing.assert_allclose(
            a, b, atol=2e-3 * max(1, np.abs(before).max(initial=0))
        )
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, variables)


def test_weights_that_have_just_grown_stay():
    def fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    params = {"a": jnp.eye(6, 9), "b": jnp.ones((9, 30))}
    masks = {"a": (params["a"] != 0).at[2, 7].set(True), "b": jnp.ones((9, 30), bool)}
    x = jnp.ones((2, 6))
    assert compact(fn, params, x).params["a"].shape == (6, 6)
    small = compact(fn, params, x, masks=masks)
    assert small.params["a"].shape == (6, 7)
    assert small.cut(masks)["a"].sum() == 7
    assert gap(fn, small, params, x) < 1e-6


def test_masks_of_the_library_are_cut_and_put_back():
    rng = np.random.default_rng(0)
    shapes = {"v": (8, 16), "b": (16,), "w": (16, 4)}
    params = {n: jnp.float32(rng.normal(size=s)) for n, s in shapes.items()}
    masks = sparse_optax.masks.magnitude_masks(params, 0.3)
    assert isinstance(masks["b"], optax.MaskedNode)

    def net(p, x):
        return jax.nn.relu(x @ p["v"] + p["b"][None]) @ p["w"]

    pruned = sparse_optax.sparsify(params, masks)
    small = sparse_optax.compact(net, pruned, jnp.ones((2, 8)), masks=masks)
    again = small.expand(small.cut(masks), into=masks)
    assert jax.tree.structure(again) == jax.tree.structure(masks)
    for name in ("v", "w"):
        np.testing.assert_array_equal(again[name], masks[name])
    with refuses("expand", "params", "structure"):
        small.expand(small.cut(masks))
    with refuses("expand", "into", "shapes"):
        small.expand(small.cut(masks), into=masks | {"v": jnp.ones((3, 3), bool)})


def test_expand_gives_back_what_was_not_cut():
    def fn(params, x):
        return jax.nn.relu(x @ params["a"] + params["c"][None]) @ params["b"]

    key = jax.random.key(0)
    params = {
        "a": jax.random.normal(key, (5, 8)).at[:, 3].set(0),
        "b": jax.random.normal(key, (8, 30)).at[1:3].set(0),
        "c": jnp.ones(8),
    }
    small = compact(fn, params, jnp.ones((2, 5)))
    same = small.expand(small.params)
    assert all(bool((same[n] == params[n]).all()) for n in params)
    doubled = small.expand(jax.tree.map(lambda w: 2 * w, small.params))
    kept = [0, 4, 5, 6, 7]
    np.testing.assert_array_equal(doubled["c"], [1 + (i in kept) for i in range(8)])
    zeros = jax.tree.map(jnp.zeros_like, params)
    assert float(small.expand(small.params, into=zeros)["c"].sum()) == 5


def test_states_and_packed_masks_are_cut():
    def fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    key = jax.random.key(0)
    params = {
        "a": jax.random.normal(key, (5, 8)).at[:, 3].set(0),
        "b": jax.random.normal(key, (8, 30)).at[1:3].set(0),
    }
    small = compact(fn, params, jnp.ones((2, 5)))
    tx = sparse_optax.static_sparse(
        optax.adam(1e-3), masks=jax.tree.map(lambda w: w != 0, params), packed=True
    )
    state = small.cut(tx.init(params))
    cut = sparse_optax.static_sparse(
        optax.adam(1e-3),
        masks=jax.tree.map(lambda w: w != 0, small.params),
        packed=True,
    )
    like = cut.init(small.params)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, like)
    masks = sparse_optax.get_masks(state)
    for name, w in small.params.items():
        np.testing.assert_array_equal(masks[name], w != 0)


# --- saved and loaded -----------------------------------------------------------------
@pytest.mark.parametrize("name", ["lenet-300-100", "wrn-10-1"])
def test_exported_with_any_batch_and_loaded_without_the_original(name):
    apply, variables, images = network(name)
    variables = hollow(variables)

    def fn(v, x):
        return apply(v["params"], v["stats"], x)[0]

    small = compact(fn, variables, images)
    (batch,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    loaded = jax.export.export(jax.jit(small))(small.params, x)
    if importlib.util.find_spec("flatbuffers"):  # what files need
        loaded = jax.export.deserialize(loaded.serialize())
    for n in (1, 4):
        np.testing.assert_allclose(
            loaded.call(small.params, images[:n]),
            jax.jit(fn)(variables, images[:n]),
            atol=1e-4,
        )


# --- rounding -------------------------------------------------------------------------
def layers(density=0.2):
    key = jax.random.key(0)
    shapes = [(30, 40), (40, 50), (50, 5)]
    params = hollow([jax.random.normal(key, s) for s in shapes], density)

    def fn(params, x):
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ params[-1]

    return fn, params, jax.random.normal(key, (6, 30))


@pytest.mark.parametrize("round_to", [1, 4, 7, 64])
def test_sizes_are_rounded_up(round_to):
    fn, params, x = layers()
    small = compact(fn, params, x, round_to=round_to)
    for layer in small.record.layers[1:]:
        n, whole = layer.small_shape[0], layer.shape[0]
        assert n % round_to == 0 or n == whole
    assert gap(fn, small, params, x) < 1e-6


def test_measured_takes_the_fastest(monkeypatch):
    module = __import__("sys").modules["sparse_optax.export.compaction.compact"]
    fn, params, x = layers()
    for best in (1, 16, None):
        monkeypatch.setattr(
            module,
            "least_seconds",
            lambda calls, turn, best=best: {k: 1.0 + (k != best) for k in calls},
        )
        monkeypatch.setattr(module, "_MEASURED", {})
        small = compact(fn, params, x, round_to="measured")
        assert small.record.round_to == best
        assert small.record.seconds[best] == 1.0
        assert gap(fn, small, params, x) < 1e-6
        if best is None:
            assert small.params[1].shape == params[1].shape
            assert "Dense: 1e+03 ms." in small.record.table()


def test_what_was_measured_is_remembered(monkeypatch):
    module = __import__("sys").modules["sparse_optax.export.compaction.compact"]
    fn, params, x = layers(density=0.3)
    seconds = {1: 3.0, 8: 1.0, 16: 2.0, 32: 2.0, None: 4.0}
    monkeypatch.setattr(module, "_MEASURED", {})
    monkeypatch.setattr(module, "least_seconds", lambda *args, **more: seconds)
    first = compact(fn, params, x, round_to="measured")
    monkeypatch.setattr(
        module, "least_seconds", lambda *args, **more: pytest.fail("measured again")
    )
    again = compact(fn, params, x, round_to="measured")
    assert first.record == again.record
    assert again.record.round_to == 8
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        compact(fn, params, x[:3], round_to="measured")


def test_times_are_measured():
    fn, params, x = layers()
    small = compact(
        fn, params, jax.ShapeDtypeStruct(x.shape, x.dtype), round_to="measured"
    )
    seconds = small.record.seconds
    assert set(seconds) == {1, 8, 16, 32, None}
    assert min(seconds.values()) == seconds[small.record.round_to] > 0


# --- in place -------------------------------------------------------------------------
class Images(nnx.Module):
    """Convolutions with norms and a residual sum, pooling, and dense layers."""

    def __init__(self, rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.first, self.second, self.third = conv(2, 16), conv(16, 16), conv(16, 8)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.hidden = nnx.Linear(8 * 9, 40, rngs=rngs)
        self.last = nnx.Linear(40, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        x = x + nnx.relu(self.second(x))
        x = nnx.avg_pool(nnx.gelu(self.third(x)), (2, 2), (2, 2))
        return self.last(nnx.relu(self.hidden(x.reshape(x.shape[0], -1))))


def test_a_module_of_nnx_takes_the_small_arrays_in_place():
    model = Images(nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    state = hollow(state, density=0.3, dead=0.5)
    rows = state["hidden"]["kernel"].get_value().reshape(9, 8, 40)
    state["hidden"]["kernel"].set_value(rows.at[:, 2:4].set(0).reshape(72, 40))

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 2))
    small = compact(fn, state, x, in_place=True)
    module = nnx.merge(graph, small.params)
    np.testing.assert_allclose(module(x), fn(state, x), rtol=1e-4, atol=1e-5)
    assert module.third.kernel.shape[-1] == 6
    assert module.hidden.kernel.shape[0] == 9 * module.third.kernel.shape[-1]
    assert module.hidden.kernel.shape[1] == module.last.kernel.shape[0] < 40
    assert module.last.kernel.shape[1] == 5
    # Its gradient is that of the dense model, for what is there.
    dense = small.cut(jax.grad(lambda s: fn(s, x).sum(), allow_int=True)(state))
    own = jax.grad(lambda s: fn(s, x).sum(), allow_int=True)(small.params)
    np.testing.assert_allclose(
        own["third"]["bias"].get_value(),
        dense["third"]["bias"].get_value(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_in_place_the_inputs_stay_whole():
    def fn(params, x):
        return jax.nn.relu(x @ params["a"] + params["c"][None]) @ params["b"]

    key = jax.random.key(0)
    params = {
        "a": jax.random.normal(key, (50, 20)).at[:40].set(0).at[:, 3].set(0),
        "b": jax.random.normal(key, (20, 30)).at[5:9].set(0),
        "c": jnp.ones(20),
    }
    x = jax.random.normal(key, (2, 50))
    assert compact(fn, params, x).params["a"].shape == (10, 15)
    small = compact(fn, params, x, in_place=True)
    assert small.params["a"].shape == (50, 16)  # a known unit stays
    np.testing.assert_allclose(fn(small.params, x), fn(params, x), rtol=1e-5)


READERS = {
    "compact": compact,
    "to_sparse": export.to_sparse,
    "measure_speedup": analysis.measure_speedup,
}


def _two_layers(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


@pytest.mark.parametrize("name", READERS)
def test_holes_among_the_parameters_stay_holes(name):
    key = jax.random.key(0)
    params = {"a": jax.random.normal(key, (8, 12)), "b": jnp.ones((12, 3))}
    params |= {"a hole": optax.MaskedNode(), "z": None}
    made = READERS[name](_two_layers, params, jnp.ones((4, 8)))
    if name == "measure_speedup":
        assert [layer.name for layer in made.layers] == ["a", "b"]
        return
    assert made.params["a hole"] == optax.MaskedNode()
    assert made.params["a"].shape == (8, 12)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("x", [jnp.ones((4, 9)), jnp.ones(())], ids=["width", "none"])
def test_an_example_that_does_not_fit_is_one_error(name, x):
    params = {"a": jnp.ones((8, 12)), "b": jnp.ones((12, 3))}
    with pytest.raises(ValueError, match=f"{name}: `fn` cannot be traced .* fits"):
        READERS[name](_two_layers, params, x)


def _residual(params, x):
    h = jax.nn.relu(x @ params["a"])
    g = h + jax.nn.relu(h @ params["r"])
    return g.mean(1) @ params["b"]


def _transposed(params, x):
    h = jax.nn.relu(x @ params["a"])
    g = h + jax.nn.relu(h @ params["r"])
    return jnp.swapaxes(jnp.swapaxes(g, 1, 2).max(2, keepdims=True), 1, 2) @ params["b"]


def _two_heads(params, x):
    h = jax.nn.relu(x @ params["a"])
    return h @ params["b"], (h @ params["r"]).sum()


def _shared_bias(params, x):
    left = jax.nn.relu(x @ params["a"] + params["s"][None, None]) @ params["b"]
    return (
        left + jax.nn.relu(x @ params["a"] * 2 + params["s"][None, None]) @ params["c"]
    )


@pytest.mark.parametrize("fn", [_residual, _transposed, _two_heads, _shared_bias])
def test_in_place_an_operation_reads_all_that_is_there(fn):
    """What another reader of the same units needs stays for all of them."""
    rng = np.random.default_rng(0)
    shapes = dict(a=(8, 12), r=(12, 12), b=(12, 3), c=(12, 3), s=(12,))
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    params["b"][::2], params["r"][:8:2], params["c"][:6:2] = 0, 0, 0
    if fn is _two_heads:
        del params["c"], params["s"]
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    x = jnp.asarray(rng.normal(size=(4, 6, 8)), jnp.float32)
    small = compact(fn, params, x, in_place=True)
    assert small.params["a"].shape[1] == small.params["b"].shape[0] < 12
    for a, b in zip(
        jax.tree.leaves(fn(small.params, x)),
        jax.tree.leaves(fn(params, x)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_entries_of_reshaped_inputs_are_taken_once(in_place):
    """Rows and columns of images that nothing reads: one gather, after the reshape."""

    def fn(params, x):
        hidden = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["v"])
        return hidden @ params["w"]

    key = jax.random.key(0)
    live = jnp.zeros((6, 8)).at[1:5:2, jnp.array([0, 2, 3, 7])].set(1).reshape(-1, 1)
    params = {
        "v": jax.random.normal(key, (48, 400)) * live,
        "w": jax.random.normal(key, (400, 7)),
    }
    x = jax.random.normal(key, (5, 6, 8))
    small = compact(fn, params, x, in_place=in_place)
    if in_place:
        assert small.params["v"].shape == (48, 400)
        np.testing.assert_allclose(fn(small.params, x), fn(params, x), rtol=1e-5)
        return
    assert small.params["v"].shape == (8, 400)
    close = dict(rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(small(small.params, x), fn(params, x), **close)
    program = str(jax.make_jaxpr(small)(small.params, x))
    assert program.count(" gather[") == 1


def test_code_that_fixes_shapes_is_not_cut_in_place():
    model = nn.Sequential([nn.Dense(20), nn.relu, nn.Dense(3)])
    x = jnp.ones((2, 8))
    variables = hollow(model.init(jax.random.key(0), x), density=0.3, dead=0.5)
    with pytest.raises(ValueError, match=r"compact: `in_place` is True, and `fn` does"):
        compact(model.apply, variables, x, in_place=True)

    def fixed(params, x):
        n = params["a"].shape[1]
        return jax.nn.relu(x @ params["a"]) @ params["b"] / n

    params = {"a": jnp.ones((8, 6)), "b": jnp.ones((6, 2)).at[:2].set(0)}
    with pytest.raises(ValueError, match=r"its results differ"):
        compact(fixed, params, x, in_place=True)


# --- bad input ------------------------------------------------------------------------
def test_bad_input_gets_one_clear_error():
    fn, params, x = layers()
    with pytest.raises(ValueError, match=r"compact: `in_place` must be True or False"):
        compact(fn, params, x, in_place=1)
    with pytest.raises(ValueError, match=r"compact: `fn` must be a function"):
        compact(params, params, x)
    with pytest.raises(ValueError, match=r"compact: the leaf '1' of `params` is str"):
        compact(fn, [params[0], "no", params[2]], x)
    with pytest.raises(ValueError, match=r"compact: `round_to` must be an integer"):
        compact(fn, params, x, round_to=0)
    with pytest.raises(ValueError, match=r'integer or "measured"'):
        compact(fn, params, x, round_to="fast")
    with pytest.raises(ValueError, match=r"compact: `fold` must be True or False"):
        compact(fn, params, x, fold=None)
    with pytest.raises(
        ValueError, match=r"compact: `masks` has shape \(2, 3\) for '0'"
    ):
        compact(fn, params, x, masks=[jnp.ones((2, 3), bool)])
    with pytest.raises(ValueError, match=r"compact: `masks` holds \['other'\]"):
        compact(fn, params, x, masks={"other": jnp.ones((2, 3), bool)})
    with pytest.raises(ValueError, match=r"compact: `state` gives '7'"):
        compact(fn, params, x, state=lambda out: {"7": out})
    with pytest.raises(ValueError, match="must be a concrete array"):
        jax.jit(lambda p: compact(fn, p, x).params)(params)
    small = compact(fn, params, x)
    with pytest.raises(ValueError, match=r"compact: `params` has shape \(30, 40\)"):
        small(params, x)
    with pytest.raises(ValueError, match=r"compact: `params` has the structure"):
        small(tuple(small.params), x)
    with pytest.raises(ValueError, match=r"cut: `tree` has no leaf"):
        small.cut({"other": x})
    with pytest.raises(ValueError, match=r"expand: `into` must be a tree like"):
        small.expand(small.params, into=small.params)
