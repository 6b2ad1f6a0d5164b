"""AlexNet-s and AlexNet-b for CIFAR, as in SNIP and the sparse momentum paper.

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.

References:
  Krizhevsky, Sutskever & Hinton, `ImageNet classification with deep convolutional
  neural networks <https://doi.org/10.1145/3065386>`_, 2012; Lee et al., `SNIP
  <https://arxiv.org/abs/1810.02340>`_, 2019, for the form without pooling.
"""

import math
from typing import Any

import jax
from flax import nnx

from sparse_optax.experiments.models.parts import conv, dense, norm

# Channels, window and padding of the convolutions, which all have a stride of 2.
CONVS = ((96, 11, 2), (256, 5, 2), (384, 3, 1), (384, 3, 1), (256, 3, 1))


class AlexNet(nnx.Module):
    """Five convolutions of stride 2 and three dense layers, without pooling.

    Batch norm and a rectified linear unit follow every layer but the last. On CIFAR
    there are 5,066,784 weights with 1,024 hidden units (AlexNet-s) and 8,484,896 with
    2,048 (AlexNet-b).

    Args:
      in_shape: shape of one image, (h, w, c); 32 x 32 x 3 for CIFAR.
      classes: number of classes.
      hidden: units of the two hidden dense layers, at least 1.
      init: see :func:`lenet.initializers`.
      rngs: random keys of the initial weights.

    Raises:
      ValueError: where the image is too small.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.alexnet import AlexNet
      >>> def logits(images):
      ...     return AlexNet((32, 32, 3), rngs=nnx.Rngs(0))(images, train=False)
      >>> jax.eval_shape(logits, jax.numpy.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int = 10,
        *,
        hidden: int = 1024,
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws the eight layers."""
        *sizes, channels = in_shape
        for layer, (width, window, padding) in enumerate(CONVS, 1):
            options: dict[str, Any] = dict(padding=padding, init=init, rngs=rngs)
            made = conv(channels, width, window, stride=2, **options)
            setattr(self, f"conv{layer}", made)
            setattr(self, f"norm{layer}", norm(width, rngs))
            channels = width
            sizes = [(size + 2 * padding - window) // 2 + 1 for size in sizes]
            if min(sizes) < 1:
                raise ValueError(
                    f"AlexNet: in_shape={in_shape} leaves no pixel after convolution "
                    f"{layer}; use images of at least 32 x 32."
                )
        features = math.prod(sizes) * channels
        for layer in (1, 2):
            setattr(self, f"fc{layer}", dense(features, hidden, init=init, rngs=rngs))
            setattr(self, f"norm_fc{layer}", norm(hidden, rngs))
            features = hidden
        self.fc3 = dense(features, classes, init=init, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits of shape (b, classes); ``train`` normalises by the batch."""
        del key  # there is no dropout
        x = images
        for layer in range(1, len(CONVS) + 1):
            x = getattr(self, f"conv{layer}")(x)
            normalise = getattr(self, f"norm{layer}")
            x = nnx.relu(normalise(x, use_running_average=not train))
        x = x.reshape(x.shape[0], -1)
        for layer in (1, 2):
            x = getattr(self, f"fc{layer}")(x)
            normalise = getattr(self, f"norm_fc{layer}")
            x = nnx.relu(normalise(x, use_running_average=not train))
        return self.fc3(x)
