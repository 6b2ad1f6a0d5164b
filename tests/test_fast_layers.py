"""Convolution and max pooling in their fast forms: numbers, gradients, ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
convolution = pytest.importorskip("sparse_optax.experiments.models.convolution")
max_pool = pytest.importorskip("sparse_optax.experiments.models.max_pool")

from flax import nnx  # noqa: E402

LAYOUT = ("NHWC", "HWIO", "NHWC")
# Images, channels, kernel, outputs, padding: a block of several images, of one, small
# images, a large kernel, an odd batch, an image that the kernel covers, few channels.
CASES = {
    "blocks": ((8, 9, 7, 6), (3, 3), 5, ((1, 1), (1, 1))),
    "small": ((4, 2, 2, 6), (3, 3), 5, "SAME"),
    "large kernel": ((6, 8, 9, 5), (5, 5), 4, "VALID"),
    "odd batch": ((7, 6, 6, 5), (3, 2), 2, ((0, 2), (1, 0))),
    "one pixel": ((2, 3, 3, 5), (3, 3), 4, "VALID"),
    "one channel": ((3, 8, 9, 1), (5, 5), 4, "VALID"),
    "three channels": ((3, 6, 7, 3), (3, 2), 4, ((0, 2), (1, 0))),
    "pointwise": ((3, 5, 4, 6), (1, 1), 4, "SAME"),
    "pointwise with zeros around": ((3, 5, 4, 6), (1, 1), 4, ((0, 2), (1, 0))),
}


def arrays(shape, window, outputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    kernel = rng.normal(size=(*window, shape[-1], outputs)).astype(np.float32)
    return x, kernel


def pads(shape, window, padding):
    if padding == "VALID":
        return ((0, 0), (0, 0))
    if padding == "SAME":
        return tuple(((k - 1) // 2, k // 2) for k in window)
    return padding


def oracle(x, kernel, pad, dy=None):
    """Outputs, or the two gradients, in float64 and from the definition."""
    x, kernel = x.astype(np.float64), kernel.astype(np.float64)
    padded = np.pad(x, ((0, 0), *pad, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, kernel.shape[:2], axis=(1, 2)
    )
    if dy is None:
        return np.einsum("bijchw,hwco->bijo", windows, kernel)
    dkernel = np.einsum("bijchw,bijo->hwco", windows, dy)
    dx = np.zeros_like(padded)
    rows, columns = dy.shape[1:3]
    for i in range(kernel.shape[0]):
        for j in range(kernel.shape[1]):
            dx[:, i : i + rows, j : j + columns] += dy @ kernel[i, j].T
    (top, _), (left, _) = pad
    return dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def close(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))


def fast(x, kernel, padding):
    return convolution.convolution(x, kernel, (1, 1), padding, dimension_numbers=LAYOUT)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bytes_of_a_block", [1, 4000, 10**9])
def test_outputs_and_gradients_of_a_convolution(case, bytes_of_a_block, monkeypatch):
    monkeypatch.setattr(convolution, "_BLOCK", bytes_of_a_block)
    shape, window, outputs, padding = CASES[case]
    x, kernel = arrays(shape, window, outputs)
    pad = pads(shape, window, padding)
    y, pull = jax.vjp(jax.jit(functools.partial(fast, padding=padding)), x, kernel)
    expected = oracle(x, kernel, pad)
    close(y, expected, 1e-6)
    dy = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    for gradient, right in zip(pull(dy), oracle(x, kernel, pad, dy), strict=True):
        close(gradient, right, 3e-6)


@pytest.mark.parametrize("strides", [(2, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 2))])
def test_a_kernel_of_one_pixel_takes_steps(strides, padding):
    """It sees the pixels that a convolution of stride 1 has there, and no others."""
    x, kernel = arrays((2, 7, 6, 3), (1, 1), 4)
    pad = ((0, 0), (0, 0)) if isinstance(padding, str) else padding
    every = slice(None, None, strides[0]), slice(None, None, strides[1])

    def apply(x, kernel):
        return convolution.convolution(
            x, kernel, strides, padding, dimension_numbers=LAYOUT
        )

    y, pull = jax.vjp(jax.jit(apply), x, kernel)
    expected = oracle(x, kernel, pad)[:, *every]
    close(y, expected, 1e-6)
    dy = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    spread = np.zeros(oracle(x, kernel, pad).shape, np.float32)
    spread[:, *every] = dy
    for gradient, right in zip(pull(dy), oracle(x, kernel, pad, spread), strict=True):
        close(gradient, right, 3e-6)


@pytest.mark.parametrize("case", CASES)
def test_other_derivatives_of_a_convolution(case):
    """Forward, second and batched derivatives are those of XLA's convolution."""
    shape, window, outputs, padding = CASES[case]
    x, kernel = arrays(shape, window, outputs)
    xla = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=LAYOUT
    )

    def results(apply):
        def loss(x, kernel):
            return jnp.sum(jnp.tanh(apply(x, kernel, padding=padding)) ** 2)

        both = jax.grad(loss, (0, 1))
        forward = jax.jvp(loss, (x, kernel), (x[::-1], kernel[::-1]))
        second = jax.jvp(both, (x, kernel), (x[::-1], kernel[::-1]))
        members = jnp.stack([x, 2 * x]), jnp.stack([kernel, kernel[::-1]])
        return forward, second, jax.vmap(both)(*members)

    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(results, static_argnums=0)(fast)),
        jax.tree.leaves(jax.jit(results, static_argnums=0)(xla)),
        strict=True,
    ):
        close(np.asarray(ours), np.asarray(theirs), 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 2)},
        {"rhs_dilation": (2, 2)},
        {"feature_group_count": 2},
        {"dimension_numbers": ("NCHW", "OIHW", "NCHW")},
    ],
    ids=["stride", "dilation", "groups", "layout"],
)
def test_what_is_no_plain_convolution_is_left_to_xla(options):
    rng = np.random.default_rng(0)
    options = {"window_strides": (1, 1), "dimension_numbers": LAYOUT} | options
    x, kernel = rng.normal(size=(2, 6, 6, 4)), rng.normal(size=(3, 3, 4, 6))
    if "feature_group_count" in options:
        kernel = kernel[:, :, :2]
    if options["dimension_numbers"] != LAYOUT:
        x, kernel = x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    x, kernel = (jnp.asarray(a, jnp.float32) for a in (x, kernel))
    ours = convolution.convolution(x, kernel, padding="SAME", **options)
    theirs = jax.lax.conv_general_dilated(x, kernel, padding="SAME", **options)
    np.testing.assert_array_equal(ours, theirs)


def test_half_precision_stays():
    x, kernel = (a.astype(jnp.bfloat16) for a in arrays((4, 6, 6, 3), (3, 3), 5))
    y, pull = jax.vjp(functools.partial(fast, padding="SAME"), x, kernel)
    assert [a.dtype for a in (y, *pull(y))] == [jnp.bfloat16] * 3


@pytest.mark.parametrize("shape", [(3, 8, 6, 2), (2, 7, 9, 3), (1, 2, 2, 1)])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_pooling_is_that_of_flax_with_ties_and_all(shape, window):
    if min(shape[1:3]) < window:
        pytest.skip("no window fits")
    # Few values: most windows hold equal maxima.
    x = np.random.default_rng(0).integers(-1, 2, shape).astype(np.float32)

    def reference(x):
        return nnx.max_pool(x, (window, window), strides=(window, window))

    y, pull = jax.vjp(lambda x: max_pool.max_pool(x, window), x)
    right, right_pull = jax.vjp(reference, x)
    np.testing.assert_array_equal(y, right)
    dy = np.random.default_rng(1).normal(size=y.shape).astype(np.float32)
    np.testing.assert_array_equal(pull(dy)[0], right_pull(dy)[0])


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_pooling_keeps_nan(place):
    x = jnp.ones((1, 2, 2, 1)).at[0, place[0], place[1], 0].set(jnp.nan)
    assert jnp.isnan(max_pool.max_pool(x)).all()


def test_networks_are_the_same_in_both_forms(monkeypatch):
    models = pytest.importorskip("sparse_optax.experiments.models")
    apply, params = models.create(
        "lenet-5-caffe", (28, 28, 1), 10, key=jax.random.key(0)
    )
    images = np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype(np.float32)

    def gradient():
        return jax.jit(jax.grad(lambda p: jnp.sum(apply(p, images) ** 2)))(params)

    ours = gradient()
    monkeypatch.setattr(convolution, "FAST", False)
    monkeypatch.setattr(max_pool, "FAST", False)
    for fast_leaf, leaf in zip(
        jax.tree.leaves(ours), jax.tree.leaves(gradient()), strict=True
    ):
        close(np.asarray(fast_leaf), np.asarray(leaf), 5e-6)
