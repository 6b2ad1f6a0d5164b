"""VGG16-C, VGG16-D and VGG16-like for CIFAR, as in the sparse momentum paper.

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.

References:
  Simonyan & Zisserman, `Very deep convolutional networks for large-scale image
  recognition <https://arxiv.org/abs/1409.1556>`_, 2015, for the convolutions; Dettmers
  & Zettlemoyer, `Sparse networks from scratch <https://arxiv.org/abs/1907.04840>`_,
  2019, for the classifier and the batch norm.
"""

import math

import jax
from flax import nnx

from sparse_optax.experiments.models.max_pool import max_pool
from sparse_optax.experiments.models.parts import conv, dense, norm

# Widths of the convolutions, block by block; a 2 x 2 max pooling ends each block.
BLOCKS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
_HIDDEN = 512


class VGG16(nnx.Module):
    """Thirteen convolutions and two or three dense layers, with batch norm.

    Each convolution has a bias, and batch norm and a rectified linear unit after it.
    The hidden dense layers of 512 units, two in C and D and one in the variant
    ``"like"``, have the rectified linear unit first, then batch norm in place of
    dropout. On CIFAR, D has 15,239,872 weights, C 11,307,712 and ``"like"``
    14,977,728.

    In C the third convolution of the last three blocks is 1 x 1. It keeps the padding
    of 1, as in the released code of sparse momentum, so that the maps grow by 2 there
    and 2,048 features of a 32 x 32 image reach the classifier. With SNIP's geometry
    they are 512, and the network has 10,521,280 weights.

    Args:
      in_shape: shape of one image, (h, w, c); 32 x 32 x 3 for CIFAR.
      classes: number of classes.
      variant: ``"C"``, ``"D"`` or ``"like"``.
      init: see :func:`lenet.initializers`.
      rngs: random keys of the initial weights.

    Raises:
      ValueError: for another variant, and where the image is too small.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.vgg import VGG16
      >>> def logits(images):
      ...     return VGG16((32, 32, 3), rngs=nnx.Rngs(0))(images, train=False)
      >>> jax.eval_shape(logits, jax.numpy.zeros((2, 32, 32, 3))).shape
      (2, 10)

    Differences from the released code: the running variance averages the variance of
    the batch, not its unbiased estimate.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int = 10,
        *,
        variant: str = "D",
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws the fifteen or sixteen layers."""
        if variant not in ("C", "D", "like"):
            raise ValueError(f"VGG16: variant={variant!r}; choose 'C', 'D' or 'like'.")
        *sizes, channels = in_shape
        for block, widths in enumerate(BLOCKS, 1):
            for layer, width in enumerate(widths, 1):
                window = 1 if variant == "C" and layer == 3 else 3
                # A padding of 1 also where the window is 1 x 1, see above.
                made = conv(channels, width, window, padding=1, init=init, rngs=rngs)
                setattr(self, f"conv{block}_{layer}", made)
                setattr(self, f"norm{block}_{layer}", norm(width, rngs))
                channels = width
                sizes = [size + 3 - window for size in sizes]
            sizes = [size // 2 for size in sizes]
        if min(sizes) < 1:
            raise ValueError(
                f"VGG16: in_shape={in_shape} leaves no pixel after five poolings; use "
                "images of at least 32 x 32."
            )
        features = math.prod(sizes) * channels
        self.hidden = 1 if variant == "like" else 2
        for layer in range(1, self.hidden + 1):
            made = dense(features, _HIDDEN, init=init, rngs=rngs)
            setattr(self, f"fc{layer}", made)
            setattr(self, f"norm_fc{layer}", norm(_HIDDEN, rngs))
            features = _HIDDEN
        last = dense(features, classes, init=init, rngs=rngs)
        setattr(self, f"fc{self.hidden + 1}", last)

    def __call__(
        self, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits of shape (b, classes); ``train`` normalises by the batch."""
        del key  # there is no dropout
        x = images
        for block, widths in enumerate(BLOCKS, 1):
            for layer in range(1, len(widths) + 1):
                x = getattr(self, f"conv{block}_{layer}")(x)
                normalise = getattr(self, f"norm{block}_{layer}")
                x = nnx.relu(normalise(x, use_running_average=not train))
            x = max_pool(x)
        x = x.reshape(x.shape[0], -1)
        for layer in range(1, self.hidden + 1):
            x = nnx.relu(getattr(self, f"fc{layer}")(x))
            x = getattr(self, f"norm_fc{layer}")(x, use_running_average=not train)
        return getattr(self, f"fc{self.hidden + 1}")(x)
