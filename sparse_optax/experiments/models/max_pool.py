"""Max pooling whose gradient is fast on a CPU.

The gradient of ``nnx.max_pool`` is a scatter, which XLA runs on a CPU one element at a
time: it takes longer than the convolution before it. Where windows do not overlap, the
maximum is a chain of comparisons between strided slices, whose gradient is a chain of
selections. Forward and backward in ms, jax 0.10.2, two cores:

==================  ==========  ==========
images              scatter     selections
==================  ==========  ==========
100, 24 x 24 x 20         10.1         1.6
128, 32 x 32 x 64        135.0        16.7
==================  ==========  ==========

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

# Whether the fast form is used; benchmarks set it to False.
FAST = True


def max_pool(x: jax.Array, window: int = 2) -> jax.Array:
    """The maximum over square windows that do not overlap.

    Values and gradient are those of ``nnx.max_pool``, bit for bit: of equal maxima the
    first in the window gets the gradient. On GPU and TPU it is ``nnx.max_pool``.

    Args:
      x: images, shape (b, h, w, c).
      window: side of a window, at least 1. Rows and columns that fill no window are
        dropped.

    Returns:
      Shape (b, h // window, w // window, c).

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments.models.max_pool import max_pool
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    if not FAST or jax.default_backend() != "cpu":
        return nnx.max_pool(x, (window, window), strides=(window, window))
    b, h, w, c = x.shape
    h, w = h // window, w // window
    split = x[:, : h * window, : w * window].reshape(b, h, window, w, window, c)
    pixels = [split[:, :, i, :, j] for i in range(window) for j in range(window)]
    return functools.reduce(_larger, pixels)


def _larger(first: jax.Array, second: jax.Array) -> jax.Array:
    """The larger of two, the first where they are equal; NaN stays."""
    return jnp.where((second > first) | (second != second), second, first)
