"""The networks: their counts, their initial weights, their shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
models = pytest.importorskip("sparse_optax.experiments.models")
lenet = pytest.importorskip("sparse_optax.experiments.models.lenet")

import sparse_optax  # noqa: E402

MNIST = (28, 28, 1)


@pytest.mark.parametrize(
    ("name", "total", "weights", "tensors"),
    [("lenet-300-100", 266_610, 266_200, 3), ("lenet-5-caffe", 431_080, 430_500, 4)],
)
def test_counts(name, total, weights, tensors):
    _, params = models.create(name, MNIST, 10, key=jax.random.key(0))
    leaves = jax.tree.leaves(params)
    chosen = jax.tree.leaves(sparse_optax.eligible(params))
    assert sum(leaf.size for leaf in leaves) == total
    kernels = [leaf for leaf, kept in zip(leaves, chosen, strict=True) if kept]
    assert sum(leaf.size for leaf in kernels) == weights
    assert len(kernels) == tensors


@pytest.mark.parametrize("name", list(models.MODELS))
def test_torch_start_is_uniform_up_to_one_over_root_fan_in(name):
    _, params = models.create(name, MNIST, 10, key=jax.random.key(1))
    for layer in params.values():
        fan_in = int(np.prod(layer["kernel"].shape[:-1]))
        bound = fan_in**-0.5
        kernel = np.asarray(layer["kernel"]).ravel()
        assert np.abs(kernel).max() <= bound
        # Standard deviation of a uniform variable: half its width over root three.
        expected = bound / 3**0.5
        assert abs(kernel.std() - expected) < 4 * expected / kernel.size**0.5
        assert 0 < np.abs(layer["bias"]).max() <= bound


@pytest.mark.parametrize("name", list(models.MODELS))
def test_xavier_start(name):
    _, params = models.create(name, MNIST, 10, init="xavier", key=jax.random.key(1))
    for layer in params.values():
        *window, fan_in, fan_out = layer["kernel"].shape
        bound = (6 / (np.prod(window) * (fan_in + fan_out))) ** 0.5
        kernel = np.abs(np.asarray(layer["kernel"]))
        assert 0.95 * bound < kernel.max() <= bound
        assert not np.asarray(layer["bias"]).any()


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
    ],
)
def test_wrong_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
