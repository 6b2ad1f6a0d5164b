"""DenseNet-40 for CIFAR: every layer sees the outputs of all layers before it.

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.

References:
  Huang et al., `Densely connected convolutional networks
  <https://arxiv.org/abs/1608.06993>`_, 2017.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_optax.experiments.models.parts import classifier, norm, plain_conv


class DenseNet(nnx.Module):
    """DenseNet without bottlenecks and without compression.

    A 3 x 3 convolution to 16 channels; three blocks of (depth - 4) / 3 layers of batch
    norm, ReLU and a 3 x 3 convolution to ``growth`` channels that are put beside their
    inputs; between blocks batch norm, ReLU, a 1 x 1 convolution and the mean of 2 x 2
    pixels; at the end batch norm, ReLU, the mean over the image and one dense layer.
    DenseNet-40 has 1,001,616 weights on CIFAR.

    Args:
      in_shape: shape of one image, (h, w, c); 32 x 32 x 3 for CIFAR.
      classes: number of classes.
      depth: 3 n + 4 with n of 1 or more: 7, 10, ..., 40.
      growth: channels that a layer adds, at least 1.
      init: see :func:`parts.plain_conv`.
      rngs: random keys of the initial weights.

    Raises:
      ValueError: for another depth, and for an image too small to be halved twice.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.densenet import DenseNet
      >>> def logits(images):
      ...     return DenseNet((32, 32, 3), rngs=nnx.Rngs(0))(images, train=False)
      >>> jax.eval_shape(logits, jax.numpy.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int = 10,
        *,
        depth: int = 40,
        growth: int = 12,
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws all layers."""
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(
                f"DenseNet: depth={depth} must be 3 n + 4 with n of 1 or more: 7, 10, "
                "..., 40."
            )
        if min(in_shape[:-1]) < 4:
            raise ValueError(
                f"DenseNet: in_shape={in_shape} cannot be halved twice; use images of "
                "at least 4 x 4."
            )
        self.conv = plain_conv(in_shape[-1], 16, 3, init=init, rngs=rngs)
        self.layers = (depth - 4) // 3
        channels = 16
        for block in (1, 2, 3):
            for layer in range(1, self.layers + 1):
                name = f"{block}_{layer}"
                setattr(self, f"norm{name}", norm(channels, rngs))
                made = plain_conv(channels, growth, 3, init=init, rngs=rngs)
                setattr(self, f"conv{name}", made)
                channels += growth
            if block < 3:
                setattr(self, f"transition_norm{block}", norm(channels, rngs))
                made = plain_conv(channels, channels, 1, init=init, rngs=rngs)
                setattr(self, f"transition{block}", made)
        self.norm = norm(channels, rngs)
        self.fc = classifier(channels, classes, init=init, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits of shape (b, classes); ``train`` normalises by the batch."""
        del key  # there is no dropout

        def active(name, x):
            return nnx.relu(getattr(self, name)(x, use_running_average=not train))

        x = self.conv(images)
        for block in (1, 2, 3):
            for layer in range(1, self.layers + 1):
                name = f"{block}_{layer}"
                new = getattr(self, f"conv{name}")(active(f"norm{name}", x))
                x = jnp.concatenate([x, new], axis=-1)
            if block < 3:
                x = active(f"transition_norm{block}", x)
                x = getattr(self, f"transition{block}")(x)
                x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        return self.fc(active("norm", x).mean((1, 2)))
