"""The networks: their counts, their initial weights, their logits and statistics."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
models = pytest.importorskip("sparse_optax.experiments.models")
lenet = pytest.importorskip("sparse_optax.experiments.models.lenet")

from flax import nnx  # noqa: E402
from helpers import refuses  # noqa: E402

import sparse_optax  # noqa: E402
from sparse_optax.experiments import config, data  # noqa: E402
from sparse_optax.experiments.models import (  # noqa: E402
    alexnet,
    densenet,
    resnet,
    transformer,
    vgg,
    wide_resnet,
)

MNIST = (28, 28, 1)
CIFAR = (32, 32, 3)
LENETS = ("lenet-300-100", "lenet-5-caffe")
BN = "lenet-300-100-bn"
LARGE = [n for n in models.MODELS if n not in (*LENETS, BN, "transformer")]
TINY = (
    *("vgg16-c", "vgg16-d", "wrn-10-2", "vgg16-like", "alexnet-s", "resnet-8"),
    *("resnet-50", "densenet-7"),
)
# A generator whose draws compile in a third of the time.
KEY = jax.random.key(1, impl="rbg")


@pytest.fixture
def tiny(monkeypatch):
    """The conv models with few channels, for images of 8 x 8."""
    monkeypatch.setattr(vgg, "BLOCKS", ((3,), (5, 4, 6)))
    monkeypatch.setattr(vgg, "_HIDDEN", 7)
    make = functools.partial(wide_resnet.WideResNet, depth=10, factor=2, dropout=0.0)
    monkeypatch.setitem(models.MODELS, "wrn-10-2", models.Entry(make, True))
    monkeypatch.setattr(alexnet, "CONVS", ((3, 5, 2), (4, 3, 1)))
    make = functools.partial(alexnet.AlexNet, hidden=6)
    monkeypatch.setitem(models.MODELS, "alexnet-s", models.Entry(make, True))
    monkeypatch.setattr(resnet, "STAGES", ((2, 1), (3, 2)))
    make = functools.partial(resnet.CifarResNet, depth=8)
    monkeypatch.setitem(models.MODELS, "resnet-8", models.Entry(make, True))
    make = functools.partial(densenet.DenseNet, depth=7, growth=2)
    monkeypatch.setitem(models.MODELS, "densenet-7", models.Entry(make, True))


def layers(tree):
    """All dicts of the tree that hold a kernel."""
    if "kernel" in tree:
        return [tree]
    return [
        layer
        for child in tree.values()
        if isinstance(child, dict)
        for layer in layers(child)
    ]


@pytest.mark.parametrize(
    ("name", "total", "weights", "tensors"),
    [("lenet-300-100", 266_610, 266_200, 3), ("lenet-5-caffe", 431_080, 430_500, 4)],
)
def test_counts(name, total, weights, tensors):
    params, stats = shapes(name, MNIST)
    assert count(params) == total
    assert kernels(params) == (weights, tensors)
    assert stats == {}


def test_lenet_with_batch_norm_has_no_biases_and_normalises():
    """266,200 weights, and a scale and a shift for each of the 400 hidden units."""
    params, stats = shapes(BN, MNIST)
    assert count(params) == 266_200 + 2 * 400
    assert kernels(params) == (266_200, 3)
    assert count(stats) == 2 * 400
    assert {name for x in params.values() for name in x} == {"kernel", "scale", "bias"}
    assert all("bias" not in params[f"fc{i}"] for i in (1, 2, 3))
    apply, params, stats = models.create_stateful(BN, (4, 4, 1), 5, key=KEY)
    images = 3 + jax.random.normal(KEY, (8, 4, 4, 1))
    logits, after = apply(params, stats, images, train=True)
    x = np.asarray(images, np.float64).reshape(8, 16)
    for i in (1, 2):
        x = x @ np.asarray(params[f"fc{i}"]["kernel"])
        wanted = 0.9 * 0 + 0.1 * x.mean(axis=0)
        np.testing.assert_allclose(
            after[f"norm{i}"]["mean"], wanted, rtol=1e-4, atol=1e-6
        )
        x = np.maximum((x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5), 0)
    wanted = x @ np.asarray(params["fc3"]["kernel"])
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-4)


def vgg_counts(pointwise_padded):
    """Conv kernels, dense kernels and channels of VGG16, from its definition."""
    convs, inputs, size = [], 3, 32
    widths = [(64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3]
    for block in widths:
        for layer, width in enumerate(block):
            pointwise = pointwise_padded and layer == 2
            convs.append((1 if pointwise else 9) * inputs * width)
            size += 2 if pointwise else 0
            inputs = width
        size //= 2
    dense = [size * size * 512 * 512, 512 * 512, 512 * 10]
    channels = [width for block in widths for width in block]
    return convs, dense, channels


@pytest.mark.parametrize(
    ("name", "total", "weights"),
    [("vgg16-c", 11_323_466, 11_307_712), ("vgg16-d", 15_255_626, 15_239_872)],
)
def test_vgg_counts(name, total, weights):
    """Totals as tabulated; one by one as computed from the definition."""
    convs, dense, channels = vgg_counts(name == "vgg16-c")
    params, stats = shapes(name)
    assert [
        math.prod(params[f"conv{block}_{layer}"]["kernel"].shape)
        for block, depth in enumerate((2, 2, 3, 3, 3), 1)
        for layer in range(1, depth + 1)
    ] == convs
    sizes = [math.prod(params[f"fc{layer}"]["kernel"].shape) for layer in (1, 2, 3)]
    assert sizes == dense
    assert sum(convs) + sum(dense) == weights
    # A bias a unit, and a scale and a shift where batch norm follows.
    units = sum(channels) + 512 + 512
    assert weights + units + 10 + 2 * units == total
    assert count(params) == total
    assert count(stats) == 2 * units
    assert kernels(params) == (weights, 16)


def wrn_counts(depth, factor):
    """Weights, batch norm channels and kernels of a wide residual network."""
    weights, channels, tensors, inputs = 27 * 16, 0, 2, 16
    for width in (16 * factor, 32 * factor, 64 * factor):
        for _ in range((depth - 4) // 6):
            weights += 9 * inputs * width + 9 * width * width
            channels += inputs + width
            tensors += 2
            if inputs != width:
                weights, tensors = weights + inputs * width, tensors + 1
            inputs = width
    return weights + inputs * 10, channels + inputs, tensors


@pytest.mark.parametrize(
    ("depth", "factor", "total", "weights", "tensors"),
    [
        (28, 2, 1_467_610, 1_463_984, 29),
        (16, 8, 10_961_370, 10_954_160, 17),
        (16, 10, 17_116_634, 17_107_632, 17),
        (22, 8, 17_158_106, 17_147_312, 23),
        (22, 2, 1_079_642, 1_076_912, 23),
        (16, 4, 2_748_890, 2_745_264, 17),
        (16, 2, 691_674, 689_840, 17),
    ],
)
def test_wide_resnet_counts(depth, factor, total, weights, tensors):
    params, stats = shapes(f"wrn-{depth}-{factor}")
    computed, channels, kernel_count = wrn_counts(depth, factor)
    assert (computed, kernel_count) == (weights, tensors)
    assert kernels(params) == (weights, tensors)
    assert weights + 2 * channels + 10 == total
    assert count(params) == total
    assert count(stats) == 2 * channels
    # What Mostafa and Wang keep dense: the first kernel, the shortcuts, the last.
    blocks = [params[name] for name in params if name.startswith("block")]
    dense = [params["conv"], params["fc"]]
    dense += [block["shortcut"] for block in blocks if "shortcut" in block]
    assert len(blocks) == (depth - 4) // 2
    if (depth, factor) == (28, 2):
        assert sum(math.prod(layer["kernel"].shape) for layer in dense) == 12_464


@pytest.mark.parametrize(
    ("name", "total", "weights", "tensors", "biases", "norms"),
    [
        ("alexnet-s", 5_077_066, 5_066_784, 8, 3_434, 6_848),
        ("alexnet-b", 8_501_322, 8_484_896, 8, 5_482, 10_944),
        ("vgg16-like", 14_991_946, 14_977_728, 15, 4_746, 9_472),
        ("resnet-20", 272_474, 270_896, 22, 10, 1_568),
        ("resnet-56", 855_770, 851_504, 58, 10, 4_256),
        ("densenet-40", 1_019_722, 1_001_616, 40, 10, 18_096),
        ("resnet-50", 25_557_032, 25_502_912, 54, 1_000, 53_120),
        # Mostafa and Wang's thin ones: 29 and 35 channels, twice and twice again.
        ("resnet-50-0.46", 5_771_217, 5_746_147, 54, 1_000, 24_070),
        ("resnet-50-0.54", 8_167_095, 8_137_045, 54, 1_000, 29_050),
    ],
)
def test_counts_of_the_convolutional_networks(
    name, total, weights, tensors, biases, norms
):
    """As tabulated for the papers' networks; ResNet-20 by the definition."""
    of_imagenet = [(224, 224, 3), 1000] if "resnet-50" in name else []
    params, stats = shapes(name, *of_imagenet)
    assert count(params) == total == weights + biases + norms
    assert kernels(params) == (weights, tensors)
    assert count(stats) == norms
    assert sum(count(layer.get("bias", ())) for layer in layers(params)) == biases


def test_counts_of_parts_that_the_papers_tell():
    sizes = [layer["kernel"].shape for layer in layers(shapes("alexnet-b")[0])]
    assert sorted(math.prod(size) for size in sizes) == sorted(
        [34_848, 614_400, 884_736, 1_327_104, 884_736, 524_288, 4_194_304, 20_480]
    )
    params, _ = shapes("resnet-50", (224, 224, 3), 1000)
    shortcuts = [b["shortcut"] for b in params.values() if "shortcut" in b]
    assert [count(params[name]["kernel"]) for name in ("conv", "fc")] == [
        9_408,
        2_048_000,
    ]
    assert sum(count(layer["kernel"]) for layer in shortcuts) == 2_768_896
    params, _ = shapes("densenet-40")
    assert params["fc"]["kernel"].shape == (448, 10)
    assert params["transition1"]["kernel"].shape == (1, 1, 160, 160)
    assert params["transition2"]["kernel"].shape == (1, 1, 304, 304)


def test_strides_of_resnet_50_are_in_the_3_by_3_convolutions():
    """Version 1.5: of the first bottleneck of stages 2 to 4, no other."""
    model: Any = nnx.eval_shape(
        lambda: resnet.ResNet50((224, 224, 3), rngs=nnx.Rngs(0))
    )
    strided = {
        name: (block.conv1.strides, block.conv2.strides)
        for name in model.blocks
        if (block := getattr(model, name)).conv2.strides not in (1, (1, 1))
        or block.conv1.strides not in (1, (1, 1))
    }
    assert strided == dict.fromkeys([f"block{s}_1" for s in (2, 3, 4)], (1, 2))
    assert len(model.blocks) == 16


def test_counts_of_the_transformer():
    params, stats = shapes("transformer", (128,), 103)
    # Four kernels of 3, 1, 4 and 4 squares of the width in each of four layers; the
    # tables of characters and of positions are no kernels, and there is no last layer.
    assert kernels(params) == (4 * 12 * 128**2, 16)
    norms = (2 * 4 + 1) * 2 * 128
    biases = 4 * (3 + 1 + 4 + 1) * 128
    assert count(params) == 4 * 12 * 128**2 + norms + biases + (103 + 128) * 128
    assert count(params) == 822_912 < 1_000_000
    assert stats == {}


def shapes(name, in_shape=CIFAR, classes=10):
    """Abstract parameters and statistics of a model."""
    return jax.eval_shape(
        lambda key: models.create_stateful(name, in_shape, classes, key=key)[1:],
        jax.random.key(0),
    )


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def kernels(params):
    """How many weights the methods make sparse, in how many kernels."""
    chosen = zip(
        jax.tree.leaves(params),
        jax.tree.leaves(sparse_optax.eligible(params)),
        strict=True,
    )
    sizes = [math.prod(leaf.shape) for leaf, kept in chosen if kept]
    return sum(sizes), len(sizes)


@pytest.mark.parametrize("name", LARGE)
def test_logits_and_statistics_of_the_large_models(name):
    """By shape alone: nothing is drawn and nothing compiled."""

    def step(key, images):
        apply, params, stats = models.create_stateful(name, CIFAR, 10, key=key)
        return stats, apply(params, stats, images, train=True, key=key)

    images = jax.ShapeDtypeStruct((3, *CIFAR), jnp.float32)
    stats, (logits, after) = jax.eval_shape(step, jax.random.key(0), images)
    assert logits.shape == (3, 10)
    assert jax.tree.structure(after) == jax.tree.structure(stats)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(after)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(stats)
    ]


def test_statistics_lie_beside_the_scales_that_they_go_with():
    params, stats = shapes("wrn-16-8")
    for block in ("block1_1", "block3_2"):
        for norm in ("norm1", "norm2"):
            expected = params[block][norm]["scale"].shape
            assert stats[block][norm]["mean"].shape == expected
            assert stats[block][norm]["var"].shape == expected


@pytest.mark.parametrize("name", [*LENETS, "vgg16-c"])
@pytest.mark.usefixtures("tiny")
def test_torch_start_is_uniform_up_to_one_over_root_fan_in(name):
    params = models.create_stateful(name, MNIST, 10, key=KEY)[1]
    for layer in layers(params):
        fan_in = int(np.prod(layer["kernel"].shape[:-1]))
        bound = fan_in**-0.5
        kernel = np.asarray(layer["kernel"]).ravel()
        assert np.abs(kernel).max() <= bound
        # Standard deviation of a uniform variable: half its width over root three.
        expected = bound / 3**0.5
        assert abs(kernel.std() - expected) < 4 * expected / kernel.size**0.5
        assert 0 < np.abs(layer["bias"]).max() <= bound


def test_wide_resnet_starts_from_he_normal_by_fan_out():
    def make(key):
        model = wide_resnet.WideResNet(CIFAR, depth=10, factor=4, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(model, nnx.Param))

    params = jax.jit(make)(KEY)
    convs = [np.asarray(layer["kernel"]) for layer in layers(params)]
    convs = [kernel for kernel in convs if kernel.ndim == 4]
    assert len(convs) == 10
    for kernel in convs:
        expected = (2 / kernel[:, :, 0].size) ** 0.5
        error = expected / (2 * kernel.size) ** 0.5
        assert abs(kernel.std() - expected) < 4 * error
        # No cut at two deviations.
        assert np.abs(kernel).max() > 2.5 * expected
    bound = 256**-0.5
    assert 0.95 * bound < np.abs(params["fc"]["kernel"]).max() <= bound
    assert not np.asarray(params["fc"]["bias"]).any()
    norm = params["block2_1"]["norm1"]
    assert np.all(np.asarray(norm["scale"]) == 1)
    assert not np.asarray(norm["bias"]).any()


@pytest.mark.parametrize("name", [*LENETS, "vgg16-c", "wrn-10-2"])
@pytest.mark.usefixtures("tiny")
def test_xavier_start(name):
    params = models.create_stateful(name, MNIST, 10, init="xavier", key=KEY)[1]
    for layer in layers(params):
        *window, fan_in, fan_out = layer["kernel"].shape
        bound = (6 / (np.prod(window) * (fan_in + fan_out))) ** 0.5
        kernel = np.abs(np.asarray(layer["kernel"]))
        assert kernel.max() <= bound
        # Of n draws the largest is expected 1/n below the bound.
        assert kernel.max() > (1 - 10 / kernel.size) * bound
        assert not np.asarray(layer.get("bias", 0)).any()


@pytest.mark.parametrize(
    ("density", "widths"),
    [(0.01, (3, 23)), (0.05, (16, 29)), (0.2, (65, 30)), (1.0, (300, 100))],
)
def test_thin_lenet_has_the_weights_of_a_sparse_one(density, widths):
    budget = round(density * 266_200)

    def weights(first, second):
        return 784 * first + first * second + second * 10

    first = max(m for m in range(1, 400) if weights(m, max(m // 3, 1)) <= budget)
    second = max(m for m in range(1, 101) if weights(first, m) <= budget)
    assert lenet.thin_widths(density) == widths == (first, second)
    if density < 1:
        params, _ = shapes(f"thin-lenet-{density}", MNIST)
        assert kernels(params) == (weights(first, second), 3)


def test_thin_lenet_refuses_a_density_without_units():
    with refuses("thin_widths", "density", "0.001", "0, 1|needs 795"):
        lenet.thin_widths(0.001)
    with refuses("thin_widths", "density", "1.5", "0, 1"):
        lenet.thin_widths(1.5)


def test_lenet300100_is_three_matrices():
    apply, params = models.create("lenet-300-100", (8, 8, 1), 7, key=jax.random.key(2))
    images = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)
    x = images.reshape(5, 64).astype(np.float64)
    for name in ("fc1", "fc2", "fc3"):
        x = x @ np.asarray(params[name]["kernel"], np.float64)
        x = x + np.asarray(params[name]["bias"], np.float64)[None]
        x = x if name == "fc3" else np.maximum(x, 0)
    assert x.shape == (5, 7)
    np.testing.assert_allclose(apply(params, images), x, rtol=1e-4, atol=1e-5)


def test_lenet5_is_two_convolutions_and_two_matrices():
    apply, params = models.create("lenet-5-caffe", MNIST, 10, key=jax.random.key(3))
    images = np.random.default_rng(1).normal(size=(2, 28, 28, 1)).astype(np.float32)
    x = images.astype(np.float64)
    for name in ("conv1", "conv2"):
        kernel = np.asarray(params[name]["kernel"], np.float64)
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))
        x = np.einsum("bijchw,hwco->bijo", windows, kernel)
        x = np.maximum(x + np.asarray(params[name]["bias"])[None, None, None], 0)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    assert x.shape == (2, 4, 4, 50)
    x = x.reshape(2, 800) @ np.asarray(params["fc1"]["kernel"], np.float64)
    x = np.maximum(x + np.asarray(params["fc1"]["bias"])[None], 0)
    x = x @ np.asarray(params["fc2"]["kernel"], np.float64)
    x = x + np.asarray(params["fc2"]["bias"])[None]
    np.testing.assert_allclose(apply(params, images), x, rtol=1e-3, atol=1e-4)


class Oracle:
    """The layers of the conv models in NumPy, from the definitions.

    Args:
      params: parameters.
      stats: running statistics.
      train: whether batch norm takes the statistics of the batch.
    """

    def __init__(self, params, stats, train):
        self.params, self.stats = (
            jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
            for tree in (params, stats)
        )
        self.train = train

    def conv(self, x, path, stride=1, padding=1):
        layer = self.get(self.params, path)
        kernel = layer["kernel"]
        x = np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(
            x, kernel.shape[:2], axis=(1, 2)
        )[:, ::stride, ::stride]
        x = np.einsum("bijchw,hwco->bijo", windows, kernel)
        return x + layer.get("bias", np.zeros(1))[None, None, None]

    def dense(self, x, path):
        layer = self.get(self.params, path)
        return x @ layer["kernel"] + layer["bias"][None]

    def norm(self, x, path):
        layer, running = self.get(self.params, path), self.get(self.stats, path)
        flat = x.reshape(-1, x.shape[-1])
        mean, var = running["mean"], running["var"]
        if self.train:
            mean = flat.sum(0) / len(flat)
            var = ((flat - mean[None]) ** 2).sum(0) / len(flat)
            running["mean"] = 0.9 * running["mean"] + 0.1 * mean
            running["var"] = 0.9 * running["var"] + 0.1 * var
        flat = (flat - mean[None]) / np.sqrt(var + 1e-5)[None]
        return (flat * layer["scale"][None] + layer["bias"][None]).reshape(x.shape)

    @staticmethod
    def get(tree, path):
        for key in path.split("/"):
            tree = tree[key]
        return tree


def relu(x):
    return np.maximum(x, 0)


def vgg_oracle(oracle, x):
    for block, depth in ((1, 1), (2, 3)):
        for layer in range(1, depth + 1):
            x = oracle.conv(x, f"conv{block}_{layer}")
            x = relu(oracle.norm(x, f"norm{block}_{layer}"))
        b, h, w, c = x.shape
        x = x[:, : h // 2 * 2, : w // 2 * 2]
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
    x = x.reshape(len(x), -1)
    hidden = 2 if "fc3" in oracle.params else 1
    for layer in range(1, hidden + 1):
        x = oracle.norm(relu(oracle.dense(x, f"fc{layer}")), f"norm_fc{layer}")
    return oracle.dense(x, f"fc{hidden + 1}")


def alexnet_oracle(oracle, x):
    for layer, padding in ((1, 2), (2, 1)):
        x = oracle.conv(x, f"conv{layer}", 2, padding)
        x = relu(oracle.norm(x, f"norm{layer}"))
    x = x.reshape(len(x), -1)
    for layer in (1, 2):
        x = relu(oracle.norm(oracle.dense(x, f"fc{layer}"), f"norm_fc{layer}"))
    return oracle.dense(x, "fc3")


def residual_oracle(oracle, x, name, strides):
    """A block: convolutions, their strides, and a projection where there is one."""
    y = x
    for number, stride in enumerate(strides, 1):
        path = f"{name}/conv{number}"
        padding = oracle.get(oracle.params, path)["kernel"].shape[0] // 2
        y = oracle.norm(oracle.conv(y, path, stride, padding), f"{name}/norm{number}")
        y = relu(y) if number < len(strides) else y
    if "shortcut" in oracle.params[name]:
        x = oracle.conv(x, f"{name}/shortcut", math.prod(strides), 0)
        x = oracle.norm(x, f"{name}/shortcut_norm")
    return relu(x + y)


def mean_dense(oracle, x):
    return oracle.dense(x.sum((1, 2)) / (x.shape[1] * x.shape[2]), "fc")


def resnet_oracle(oracle, x):
    x = relu(oracle.norm(oracle.conv(x, "conv"), "norm"))
    for stage, stride in ((1, 1), (2, 2), (3, 2)):
        x = residual_oracle(oracle, x, f"block{stage}_1", (stride, 1))
    return mean_dense(oracle, x)


def resnet50_oracle(oracle, x):
    x = relu(oracle.norm(oracle.conv(x, "conv", 2, 3), "norm"))
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    x = windows[:, ::2, ::2].max((-1, -2))
    for name, stride in (("block1_1", 1), ("block2_1", 2), ("block2_2", 1)):
        x = residual_oracle(oracle, x, name, (1, stride, 1))
    return mean_dense(oracle, x)


def densenet_oracle(oracle, x):
    x = oracle.conv(x, "conv")
    for block in (1, 2, 3):
        y = relu(oracle.norm(x, f"norm{block}_1"))
        x = np.concatenate([x, oracle.conv(y, f"conv{block}_1")], axis=-1)
        if block < 3:
            y = relu(oracle.norm(x, f"transition_norm{block}"))
            y = oracle.conv(y, f"transition{block}", padding=0)
            b, h, w, c = y.shape
            x = y.reshape(b, h // 2, 2, w // 2, 2, c).sum((2, 4)) / 4
    return mean_dense(oracle, relu(oracle.norm(x, "norm")))


def wrn_oracle(oracle, x):
    x = oracle.conv(x, "conv")
    for group, stride in ((1, 1), (2, 2), (3, 2)):
        block = f"block{group}_1"
        y = relu(oracle.norm(x, f"{block}/norm1"))
        x = oracle.conv(y, f"{block}/shortcut", stride, padding=0)
        y = oracle.conv(y, f"{block}/conv1", stride)
        y = relu(oracle.norm(y, f"{block}/norm2"))
        x = x + oracle.conv(y, f"{block}/conv2")
    x = relu(oracle.norm(x, "norm"))
    return oracle.dense(x.sum((1, 2)) / (x.shape[1] * x.shape[2]), "fc")


ORACLES = {
    "vgg16": vgg_oracle,
    "alexnet": alexnet_oracle,
    "resnet-8": resnet_oracle,
    "resnet-50": resnet50_oracle,
    "densenet": densenet_oracle,
    "wrn": wrn_oracle,
}


def drawn(tree, seed):
    """Values of which none is 0 or 1, and variances that are positive."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            rng.uniform(0.5, 2, x.shape)
            if path[-1].key == "var"
            else rng.normal(size=x.shape) / max(1, math.prod(x.shape[:-1])) ** 0.5
        ).astype(np.float32),
        tree,
    )


def undrawn(name, shape):
    """A model of 5 classes, with parameters and statistics no initializer gives."""

    def make(key):
        return models.create_stateful(name, shape, 5, key=key)

    def apply(*args, **kwargs):
        # Made inside the trace, so that no weight is drawn.
        return make(jax.random.key(0))[0](*args, **kwargs)

    params, stats = jax.eval_shape(lambda key: make(key)[1:], jax.random.key(0))
    return apply, drawn(params, 1), drawn(stats, 2)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", TINY)
@pytest.mark.usefixtures("tiny")
def test_conv_models_against_numpy(name, train):
    apply, params, stats = undrawn(name, (8, 8, 3))
    images = np.random.default_rng(3).normal(size=(4, 8, 8, 3)).astype(np.float32)
    run = jax.jit(functools.partial(apply, train=train))
    logits, after = run(params, stats, images)
    oracle = Oracle(params, stats, train)
    (make,) = (make for start, make in ORACLES.items() if name.startswith(start))
    expected = make(oracle, images.astype(np.float64))
    assert expected.shape == (4, 5)
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-4)
    same = np.testing.assert_array_equal
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close if train else same, after, oracle.stats if train else stats)


def test_transformer_against_numpy(monkeypatch):
    """Attention head by head and character by character."""
    width, heads, classes, length = 6, 2, 5, 4
    model = functools.partial(
        transformer.Transformer, width=width, heads=heads, depth=2
    )
    monkeypatch.setitem(models.MODELS, "small", models.Entry(model, False, True))
    apply, params, _ = undrawn("small", (length,))
    texts = np.random.default_rng(3).integers(classes, size=(3, length))

    def norm(x, layer):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * layer["scale"] + layer["bias"]

    def dense(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    def gelu(x):
        return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = p["characters"]["embedding"][texts] + p["positions"]["embedding"]
    for name in ("layer1", "layer2"):
        layer = p[name]
        q, k, v = np.split(dense(norm(x, layer["norm1"]), layer["qkv"]), 3, -1)
        attended = np.zeros_like(x)
        for head in np.split(np.arange(width), heads):
            for place in range(length):
                seen = k[:, : place + 1][..., head]
                score = np.einsum("bd,btd->bt", q[:, place][:, head], seen)
                share = np.exp(score / len(head) ** 0.5)
                share /= share.sum(-1, keepdims=True)
                mixed = np.einsum("bt,btd->bd", share, v[:, : place + 1][..., head])
                attended[:, place, head] = mixed
        x = x + dense(attended, layer["out"])
        y = gelu(dense(norm(x, layer["norm2"]), layer["up"]))
        x = x + dense(y, layer["down"])
    expected = norm(x, p["norm"]) @ p["characters"]["embedding"].T
    logits, _ = apply(params, {}, texts)
    np.testing.assert_allclose(logits, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["lenet-300-100", "resnet-8"])
@pytest.mark.usefixtures("tiny")
def test_compute_dtype_leaves_norms_parameters_and_logits_in_float32(name):
    images = np.random.default_rng(3).normal(size=(4, 8, 8, 3)).astype(np.float32)
    single = {jnp.dtype("float32")}

    def trace(dtype):
        apply, params, stats = models.create_stateful(
            name, (8, 8, 3), 5, dtype=dtype, key=KEY
        )
        assert {x.dtype for x in jax.tree.leaves((params, stats))} == single
        run = functools.partial(apply, train=True)
        (logits, after) = run(params, stats, images)
        assert {x.dtype for x in jax.tree.leaves((logits, after))} == single
        products, roots = [], []
        for eqn in jaxpr_eqns(jax.make_jaxpr(run)(params, stats, images).jaxpr):
            kind = eqn.primitive.name
            if kind in ("conv_general_dilated", "dot_general"):
                products += [v.aval.dtype for v in eqn.invars]
            if kind in ("rsqrt", "sqrt"):
                roots += [v.aval.dtype for v in eqn.invars]
        return logits, set(products), set(roots)

    whole, products, _ = trace("float32")
    assert products == single
    half, products, roots = trace("bfloat16")
    assert products == {jnp.dtype("bfloat16")}
    assert roots <= single
    assert 0 < jnp.abs(whole - half).max() < 0.1 * jnp.abs(whole).max()


def jaxpr_eqns(jaxpr):
    """The equations of a jaxpr, those of the functions it calls among them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from jaxpr_eqns(inner)


def test_padding_of_the_1_by_1_convolutions_enlarges_the_maps():
    """32, 16, 8 + 2, 5 + 2, 3 + 2, then 2 x 2 x 512 features."""
    params, _ = shapes("vgg16-c")
    assert params["conv3_3"]["kernel"].shape == (1, 1, 256, 256)
    assert params["fc1"]["kernel"].shape == (2048, 512)
    assert shapes("vgg16-d")[0]["fc1"]["kernel"].shape == (512, 512)


def test_dropout_of_wide_resnets_is_inside_the_blocks(monkeypatch):
    make = functools.partial(wide_resnet.WideResNet, depth=10, factor=1, dropout=0.5)
    monkeypatch.setitem(models.MODELS, "wrn-10-1", models.Entry(make, True))
    apply, params, stats = undrawn("wrn-10-1", (8, 8, 1))
    images = np.random.default_rng(3).normal(size=(4, 8, 8, 1)).astype(np.float32)

    @jax.jit
    def logits(params, key):
        return apply(params, stats, images, train=True, key=key)[0]

    key, another = KEY, jax.random.key(2, impl="rbg")
    first, again, other = (logits(params, k) for k in (key, key, another))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    # Nothing that is dropped comes through where the second convolutions are zero.
    closed = {
        name: layer | {"conv2": {"kernel": jnp.zeros_like(layer["conv2"]["kernel"])}}
        if name.startswith("block")
        else layer
        for name, layer in params.items()
    }
    first, other = (logits(closed, k) for k in (key, another))
    np.testing.assert_array_equal(first, other)
    with pytest.raises(ValueError, match="key=None, and dropout in training"):
        logits(params, None)


def test_dropout_of_the_registered_wide_resnets_is_the_papers():
    model = nnx.eval_shape(
        lambda: models.MODELS["wrn-28-2"].make(
            CIFAR, 10, init="torch", rngs=nnx.Rngs(0)
        )
    )
    assert model.block1_1.dropout.rate == 0.3


def test_model_without_statistics_takes_both_forms():
    apply, params = models.create("lenet-300-100", MNIST, 10, key=jax.random.key(0))
    stateful, same, stats = models.create_stateful(
        "lenet-300-100", MNIST, 10, key=jax.random.key(0)
    )
    assert stats == {}
    jax.tree.map(np.testing.assert_array_equal, params, same)
    images = np.random.default_rng(0).normal(size=(2, *MNIST)).astype(np.float32)
    logits, after = stateful(params, stats, images, train=True, key=jax.random.key(1))
    np.testing.assert_array_equal(logits, apply(params, images))
    assert after == {}


def test_same_key_same_weights():
    first, again, other = (
        models.create("lenet-300-100", MNIST, 10, key=jax.random.key(seed))[1]
        for seed in (5, 5, 6)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert jnp.any(first["fc1"]["kernel"] != other["fc1"]["kernel"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: models.create("lenet-9", MNIST, 10, key=jax.random.key(0)),
            "model='lenet-9'; choose one of lenet-300-100, lenet-5-caffe",
        ),
        (
            lambda: models.create(
                "lenet-300-100", MNIST, 10, init="he", key=jax.random.key(0)
            ),
            "init='he'; choose 'torch' or 'xavier'",
        ),
        (
            lambda: models.create(
                "lenet-5-caffe", (8, 8, 1), 10, key=jax.random.key(0)
            ),
            r"in_shape=\(8, 8, 1\) leaves no pixel",
        ),
        (
            lambda: make_abstract(vgg.VGG16, MNIST),
            r"in_shape=\(28, 28, 1\) leaves no pixel after five poolings",
        ),
        (
            lambda: make_abstract(vgg.VGG16, CIFAR, variant="E"),
            "variant='E'; choose 'C', 'D' or 'like'",
        ),
        (
            lambda: make_abstract(wide_resnet.WideResNet, CIFAR, depth=18, factor=2),
            r"depth=18 must be 6 n \+ 4",
        ),
        (
            lambda: make_abstract(wide_resnet.WideResNet, CIFAR, depth=4, factor=2),
            r"depth=4 must be 6 n \+ 4",
        ),
        (
            lambda: make_abstract(wide_resnet.WideResNet, CIFAR, depth=16, factor=0),
            "factor=0 must be 1 or more",
        ),
        (
            lambda: make_abstract(
                wide_resnet.WideResNet, CIFAR, depth=16, factor=1, dropout=1.0
            ),
            r"dropout=1.0 must be in \[0, 1\)",
        ),
        (
            lambda: jax.eval_shape(
                lambda key: models.create("wrn-28-2", CIFAR, 10, key=key)[1],
                jax.random.key(0),
            ),
            "model='wrn-28-2' keeps running statistics.* use create_stateful",
        ),
        (
            lambda: models.create_stateful("wrn", CIFAR, 10, key=jax.random.key(0)),
            "model='wrn'; choose one of",
        ),
        (
            lambda: models.create_stateful(
                "lenet-300-100", MNIST, 10, dtype="float16", key=jax.random.key(0)
            ),
            "dtype='float16'; choose one of float32, bfloat16",
        ),
        (
            lambda: make_abstract(alexnet.AlexNet, (2, 2, 3)),
            r"in_shape=\(2, 2, 3\) leaves no pixel after convolution 1",
        ),
        (
            lambda: make_abstract(resnet.CifarResNet, CIFAR, depth=18),
            r"depth=18 must be 6 n \+ 2",
        ),
        (
            lambda: make_abstract(densenet.DenseNet, CIFAR, depth=39),
            r"depth=39 must be 3 n \+ 4",
        ),
        (
            lambda: make_abstract(densenet.DenseNet, (3, 32, 3)),
            r"in_shape=\(3, 32, 3\) cannot be halved twice",
        ),
        (
            lambda: make_abstract(transformer.Transformer, (8,), 5, heads=3),
            "width=128 must be a multiple of heads=3",
        ),
    ],
)
def test_wrong_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def make_abstract(module, *args, **kwargs):
    """Makes a module without drawing its weights."""
    return nnx.eval_shape(lambda: module(*args, **kwargs, rngs=nnx.Rngs(0)))


# -- training ----------------------------------------------------------------------


class Small(nnx.Module):
    """All that the conv models have and the LeNets have not, in two dense layers."""

    def __init__(self, in_shape, classes, *, init, rngs):
        del init
        self.fc1 = nnx.Linear(math.prod(in_shape), 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3)
        self.fc2 = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, images, *, train, key=None):
        x = self.fc1(images.reshape(len(images), -1))
        x = nnx.relu(self.norm(x, use_running_average=not train))
        return self.fc2(self.dropout(x, deterministic=not train, rngs=key))


@pytest.mark.parametrize("convolutional", [False, True])
def test_training_carries_the_running_statistics(monkeypatch, convolutional):
    """An epoch in one scan and step by step, both against a plain loop."""
    train = pytest.importorskip("sparse_optax.experiments.train")
    monkeypatch.setitem(
        models.MODELS, "lenet-5-caffe", models.Entry(Small, convolutional)
    )
    run = config.TrainConfig(
        model="lenet-5-caffe",
        method="dense",
        epochs=1,
        drop_epochs=(),
        batch_size=128,
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
    )
    trained = train.train(run, runs=None)
    digits = data.load("digits")
    init_key, order_key, _ = jax.random.split(jax.random.key(0), 3)
    apply, params, stats = models.create_stateful(
        "lenet-5-caffe", (8, 8, 1), 10, key=init_key
    )

    @jax.jit
    def step(params, stats, x, y, key):
        def loss(params):
            logits, after = apply(params, stats, x, train=True, key=key)
            return -jax.nn.log_softmax(logits)[np.arange(128), y].mean(), after

        gradient, after = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, gradient), after

    key = jax.random.fold_in(order_key, 0)
    order = np.asarray(jax.random.permutation(key, 1293))
    for number, rows in enumerate(order[: 10 * 128].reshape(10, 128)):
        drop = jax.random.fold_in(key, 2 + number)
        x, y = digits.train_x[rows], digits.train_y[rows]
        params, stats = step(params, stats, x, y, drop)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, (trained.params, trained.stats), (params, stats))
    assert np.abs(stats["norm"]["mean"]).max() > 0.05
    logits, _ = apply(params, stats, digits.test_x)
    wrong = np.asarray(logits).argmax(-1) != digits.test_y
    error = trained.record.results["test_error"]
    assert error == pytest.approx(100 * wrong.mean(), abs=0.6)


def test_statistics_survive_a_kill_and_follow_their_weights(monkeypatch, tmp_path):
    """Killed after the base and an epoch, taken up again: the same bits at the end."""
    train = pytest.importorskip("sparse_optax.experiments.train")
    monkeypatch.setitem(models.MODELS, "lenet-5-caffe", models.Entry(Small, False))
    base = config.Base(
        epochs=1, batch_size=64, learning_rate=0.1, drop_epochs=(), momentum=0.9
    )
    run = config.TrainConfig(
        model="lenet-5-caffe",
        method="dense",
        epochs=2,
        batch_size=600,
        drop_epochs=(),
        base=base,
    )
    unbroken = train.train(run, runs=None)

    class Killed(Exception):
        pass

    stages = []

    def kill(progress):
        if progress.stage == "dense":
            raise Killed

    folder = {"runs": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Killed):
        train.train(run, **folder, on_epoch=kill)
    resumed = train.train(
        run, **folder, on_epoch=lambda p: stages.append((p.stage, p.epoch))
    )
    assert stages == [("dense", 2)]
    same = np.testing.assert_array_equal
    jax.tree.map(same, resumed.params, unbroken.params)
    jax.tree.map(same, resumed.stats, unbroken.stats)
    assert resumed.record.results == unbroken.record.results
    resolved = config.resolve(run)
    mean = np.asarray(resumed.stats["norm"]["mean"])
    saved = tmp_path / config.default_name(resolved) / "weights.sparse"
    saved = sparse_optax.load_sparse(saved).dense()
    same(saved["stats"]["norm"]["mean"], mean)
    same(saved["fc1"]["kernel"], resumed.params["fc1"]["kernel"])
    # Four steps later, and 0.34 of the way where they had started from zero.
    base_name = config.default_name(config.base_of(resolved))
    saved = sparse_optax.load_sparse(tmp_path / base_name / "weights.sparse").dense()
    before = np.asarray(saved["stats"]["norm"]["mean"])
    assert mean @ before > 0.7 * before @ before
