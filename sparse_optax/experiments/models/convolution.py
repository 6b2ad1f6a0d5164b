"""Convolution in the form that is fast on the machine at hand.

On GPU and TPU it is XLA's own. On a CPU five of XLA's forms are far slower than their
operations cost, and are replaced:

- Kernels of one pixel, of any stride, are one matrix product in all three directions.
  XLA's gradient for such a kernel transposes all images first.
- Images of 2 x 2 pixels, as in the last block of VGG16. im2col takes the shifted
  images side by side, and one matrix product.
- The gradient for the kernel. It is im2col as well, in blocks of images whose shifted
  copies fit into a cache. Over all images at once the copies cost more than is gained.
- The same gradient for images of up to four channels, the first layer of a network:
  copies of whole rows of pixels, and one matrix product. A copy of the few channels of
  a pixel is as dear as one of many.
- Kernels of 5 x 5: im2col in blocks of images, in all three directions.

Milliseconds of XLA's own form and of this one for both gradients together, on two
cores, for batch 128 and 3 x 3 kernels (in the first row for batch 100 and 5 x 5):

==================  ==============  ==============
channels and image  jax 0.10.2      jax 0.12.0
==================  ==============  ==============
20 to 50, 12 x 12      25 |   15       14 |   14
32, 32 x 32           132 |  103
64, 32 x 32           543 |  299      323 |  307
64, 16 x 16           126 |   80
128, 16 x 16          325 |  195
128, 8 x 8             56 |   45
256, 8 x 8            160 |  114      227 |  141
512, 4 x 4            157 |  156      319 |  213
512, 2 x 2          1,064 |   25
==================  ==============  ==============

First layers, the gradient for the kernel alone, on one core with jax 0.10.2: XLA's own,
im2col in blocks of images, and rows of pixels.

=====================  =========================
1 to 20, 5 x 5, 28 px     8.1 |   10.7 |    3.0
3 to 16, 3 x 3, 32 px     8.9 |   14.8 |    6.6
3 to 64, 3 x 3, 32 px    41   |   85   |   11.5
=====================  =========================

Kernels of one pixel in batches of 16 on two cores, jax 0.10.2, XLA's own and a product:

======================  ===========  ===========  ============
channels and image      outputs      for images   for kernel
======================  ===========  ===========  ============
256 to 64, 56 x 56      44.2 |  9.2  45.0 | 22.2   92.3 | 23.5
256 to 128, 56 x 56     60.0 | 17.4  62.9 | 31.2  177.0 | 39.4
256 to 512, 56 x 56 /2  21.8 | 18.2  50.4 | 32.9  257.7 | 40.3
128 to 512, 28 x 28     18.3 |  9.3  19.9 |  8.8   45.5 | 18.3
256 to 1024, 14 x 14    10.0 |  9.0  12.0 |  8.1   30.1 | 13.9
512 to 2048, 7 x 7      10.6 |  8.6  13.3 |  8.8   18.6 | 11.7
======================  ===========  ===========  ============

Other forms were slower than XLA's own: im2col for the outputs and for the gradient for
the images (1.3 to 10 times), and a matrix product for each pixel of the kernel.
``python benchmarks/bench_networks.py --layers`` measures such a table, and ``--pixels``
that of kernels of one pixel.

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Whether the fast forms are used; benchmarks set it to False.
FAST = True
# Pixels of an image, or fewer, for which im2col is faster in all three directions.
_SMALL = 4
# Pixels of a kernel, or more, for which im2col in blocks is, too.
_LARGE = 25
# Channels, or fewer, whose images are copied row by row for the kernel's gradient.
_FEW = 4
# Bytes of the shifted copies of a block of images: about the cache of a core.
_BLOCK = 5_000_000

_Pads = tuple[tuple[int, int], ...]
_Form = Callable[..., jax.Array]


def convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: tuple[int, ...],
    padding: Any,
    **options: Any,
) -> jax.Array:
    """``lax.conv_general_dilated``, in other forms where these are faster.

    It is what ``nnx.Conv`` takes as ``conv_general_dilated``. Outputs and gradients are
    the same to rounding.

    Args:
      lhs: images, shape (b, h, w, c).
      rhs: kernel, shape (kernel h, kernel w, c, outputs).
      window_strides: steps of the window.
      padding: ``"SAME"``, ``"VALID"`` or pairs, as in ``lax``.
      **options: the other arguments of ``lax.conv_general_dilated``.

    Returns:
      The outputs, shape (b, new h, new w, outputs).

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments.models.convolution import convolution
      >>> images, kernel = jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 4))
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> y = convolution(images, kernel, (1, 1), "SAME", dimension_numbers=layout)
      >>> y.shape, float(y[0, 0, 0, 0])
      ((1, 2, 2, 4), 12.0)
    """
    on_cpu = FAST and jax.default_backend() == "cpu"
    pixel = rhs.shape[:2] == (1, 1)
    strides = tuple(window_strides)
    if not (on_cpu and _is_plain(lhs, rhs, options) and (pixel or set(strides) == {1})):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **options)
    if isinstance(padding, str):
        sides = lhs.shape[1:3], rhs.shape[:2]
        padding = lax.padtype_to_pads(*sides, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    precision = options.get("precision")
    dtype = options.get("preferred_element_type")
    if pixel:
        return im2col(lhs, rhs, pads, precision, dtype, strides)
    if lhs.shape[1] * lhs.shape[2] <= _SMALL:
        return im2col(lhs, rhs, pads, precision, dtype)
    if lhs.shape[3] <= _FEW:
        return _few_channels(lhs, rhs, pads, precision, dtype)
    if rhs.shape[0] * rhs.shape[1] >= _LARGE:
        return _in_blocks(lhs, rhs, pads, precision, dtype)
    return _blocked(lhs, rhs, pads, precision, dtype)


def im2col(
    x: jax.Array,
    kernel: jax.Array,
    pads: _Pads,
    precision: Any = None,
    dtype: Any = None,
    strides: tuple[int, ...] = (1, 1),
) -> jax.Array:
    """A convolution as one matrix product of all shifted images."""
    height, width, channels, outputs = kernel.shape
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = padded.shape[1] - height + 1, padded.shape[2] - width + 1
    down, along = strides
    shifted = [
        padded[:, i : i + rows : down, j : j + columns : along]
        for i in range(height)
        for j in range(width)
    ]
    return jnp.matmul(
        jnp.concatenate(shifted, axis=-1),
        kernel.reshape(height * width * channels, outputs),
        precision=precision,
        preferred_element_type=dtype,
    )


def _two_forms(outputs: _Form, by_kernel: _Form) -> _Form:
    """A convolution that is ``by_kernel`` in the gradient for its kernel.

    A convolution is linear in each of the two. What is written here for a tangent is
    transposed in a backward pass: for the kernel, shifted images times the gradient of
    the outputs.
    """

    @functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
    def convolve(x, kernel, *options):
        return outputs(x, kernel, *options)

    @convolve.defjvp
    def _(pads, precision, dtype, primals, tangents):
        x, kernel = primals
        dx, dkernel = tangents
        options = (pads, precision, dtype)
        out = convolve(x, kernel, *options)
        return out, convolve(dx, kernel, *options) + by_kernel(x, dkernel, *options)

    return convolve


def _own(x, kernel, pads, precision, dtype):
    """XLA's own convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
        preferred_element_type=dtype,
    )


def _by_rows(x, kernel, pads, precision, dtype):
    """im2col with whole rows of images side by side, channel after channel.

    Copies of rows are long where those of a few channels are short.
    """
    height, width, channels, outputs = kernel.shape
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = padded.shape[1] - height + 1, padded.shape[2] - width + 1
    shifted = jnp.stack(
        [
            padded[:, i : i + rows, j : j + columns, channel]
            for i in range(height)
            for j in range(width)
            for channel in range(channels)
        ]
    )
    # Without the barrier the copies are made anew inside the product.
    return jnp.einsum(
        "kbhw,ko->bhwo",
        lax.optimization_barrier(shifted),
        kernel.reshape(-1, outputs),
        precision=precision,
        preferred_element_type=dtype,
    )


def _in_blocks(x, kernel, pads, precision, dtype):
    """im2col, block after block of images."""
    size = _block_size(x, kernel, pads)
    # Without the checkpoint a forward pass would keep the shifted images of all blocks.
    one = jax.checkpoint(lambda block: im2col(block, kernel, pads, precision, dtype))
    blocks = lax.map(one, x.reshape(-1, size, *x.shape[1:]))
    return blocks.reshape(x.shape[0], *blocks.shape[2:])


_few_channels = _two_forms(_own, _by_rows)
_blocked = _two_forms(_own, _in_blocks)


def _block_size(x: jax.Array, kernel: jax.Array, pads: _Pads) -> int:
    """Images in a block: the largest divisor of the batch that keeps to the bytes."""
    batch, *sides, channels = x.shape
    pixels = math.prod(
        side + sum(pad) - width + 1
        for side, pad, width in zip(sides, pads, kernel.shape[:2], strict=True)
    )
    copies = pixels * math.prod(kernel.shape[:2]) * channels * x.dtype.itemsize
    most = max(1, _BLOCK // max(copies, 1))
    return max(n for n in range(1, max(batch, 1) + 1) if batch % n == 0 and n <= most)


def _is_plain(lhs: jax.Array, rhs: jax.Array, options: dict[str, Any]) -> bool:
    """Whether it is a two-dimensional convolution in one group, without dilation."""
    dilation = (options.get("lhs_dilation"), options.get("rhs_dilation"))
    layout = options.get("dimension_numbers")
    return (
        lhs.ndim == 4
        and all(d is None or set(d) == {1} for d in dilation)
        and options.get("feature_group_count", 1) == 1
        and options.get("batch_group_count", 1) == 1
        and lax.conv_dimension_numbers(lhs.shape, rhs.shape, layout)
        == lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    )
