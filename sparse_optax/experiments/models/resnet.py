"""Residual networks: those of CIFAR by depth, and ResNet-50 of ImageNet.

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.

References:
  He et al., `Deep residual learning for image recognition
  <https://arxiv.org/abs/1512.03385>`_, 2016.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_optax.experiments.models.parts import classifier, norm, plain_conv

# Width of the first convolutions of a stage of ResNet-50, and how many blocks it has.
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
# How much wider the last convolution of a bottleneck is.
_EXPANSION = 4


class Block(nnx.Module):
    """Convolutions in a row, batch norm after each, added to the input.

    Where the shape changes, the input goes through a 1 x 1 convolution and batch norm.
    ReLU follows every convolution but the last, and the sum.

    Args:
      inputs: channels of the input.
      convs: channels, window and stride of each convolution.
      init: see :func:`parts.plain_conv`.
      rngs: random keys of the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        convs: tuple[tuple[int, int, int], ...],
        *,
        init: str,
        rngs: nnx.Rngs,
    ):
        """Draws the convolutions."""
        self.depth = len(convs)
        channels, total = inputs, 1
        for number, (width, window, stride) in enumerate(convs, 1):
            made = plain_conv(
                channels, width, window, stride=stride, init=init, rngs=rngs
            )
            setattr(self, f"conv{number}", made)
            setattr(self, f"norm{number}", norm(width, rngs))
            channels, total = width, total * stride
        self.changes = channels != inputs or total > 1
        if self.changes:
            self.shortcut = plain_conv(
                inputs, channels, 1, stride=total, init=init, rngs=rngs
            )
            self.shortcut_norm = norm(channels, rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Features of shape (b, h / stride, w / stride, channels)."""
        y = x
        for number in range(1, self.depth + 1):
            y = getattr(self, f"conv{number}")(y)
            y = getattr(self, f"norm{number}")(y, use_running_average=not train)
            y = nnx.relu(y) if number < self.depth else y
        if self.changes:
            x = self.shortcut_norm(self.shortcut(x), use_running_average=not train)
        return nnx.relu(x + y)


class CifarResNet(nnx.Module):
    """ResNet-20, 32, 44, 56, ... of CIFAR, with projections where the width changes.

    A 3 x 3 convolution to 16 channels; three stages of (depth - 2) / 6 blocks of two
    3 x 3 convolutions, of 16, 32 and 64 channels, of which the second and the third
    halve the image; the mean over the image and one dense layer. The shortcut at the
    two changes of width is a 1 x 1 convolution with batch norm, as in GSM's code. On
    CIFAR ResNet-56 has 851,504 weights.

    Args:
      in_shape: shape of one image, (h, w, c); 32 x 32 x 3 for CIFAR.
      classes: number of classes.
      depth: 6 n + 2 with n of 1 or more: 8, 14, 20, ..., 56.
      init: see :func:`parts.plain_conv`.
      rngs: random keys of the initial weights.

    Raises:
      ValueError: for another depth.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.resnet import CifarResNet
      >>> def logits(images):
      ...     model = CifarResNet((32, 32, 3), depth=20, rngs=nnx.Rngs(0))
      ...     return model(images, train=False)
      >>> jax.eval_shape(logits, jax.numpy.zeros((2, 32, 32, 3))).shape
      (2, 10)
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int = 10,
        *,
        depth: int,
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws all layers."""
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f"CifarResNet: depth={depth} must be 6 n + 2 with n of 1 or more: 8, "
                "14, 20, ..., 56."
            )
        self.conv = plain_conv(in_shape[-1], 16, 3, init=init, rngs=rngs)
        self.norm = norm(16, rngs)
        names, inputs = [], 16
        for stage, width in enumerate((16, 32, 64), 1):
            for block in range(1, (depth - 2) // 6 + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                convs = ((width, 3, stride), (width, 3, 1))
                names.append(f"block{stage}_{block}")
                setattr(self, names[-1], Block(inputs, convs, init=init, rngs=rngs))
                inputs = width
        self.blocks = tuple(names)
        self.fc = classifier(inputs, classes, init=init, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits of shape (b, classes); ``train`` normalises by the batch."""
        del key  # there is no dropout
        x = nnx.relu(self.norm(self.conv(images), use_running_average=not train))
        for name in self.blocks:
            x = getattr(self, name)(x, train=train)
        return self.fc(x.mean((1, 2)))


class ResNet50(nnx.Module):
    """ResNet-50 v1.5: the 3 x 3 convolution of a bottleneck has its stride.

    A 7 x 7 convolution of stride 2 to 64 channels and max pooling; four stages of 3, 4,
    6 and 3 bottlenecks; the mean over the image and one dense layer. With 1,000 classes
    it has 25,502,912 weights.

    Args:
      in_shape: shape of one image, (h, w, c); 224 x 224 x 3 for ImageNet.
      classes: number of classes.
      init: see :func:`parts.plain_conv`.
      rngs: random keys of the initial weights.
      width: what the 64 channels of the first layer are multiplied by, rounded; all
        others are multiples of these.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.resnet import ResNet50
      >>> def logits(images):
      ...     model = ResNet50((64, 64, 3), 1000, rngs=nnx.Rngs(0))
      ...     return model(images, train=False)
      >>> jax.eval_shape(logits, jax.numpy.zeros((2, 64, 64, 3))).shape
      (2, 1000)
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int = 1000,
        *,
        init: str = "torch",
        rngs: nnx.Rngs,
        width: float = 1.0,
    ):
        """Draws the 54 kernels."""
        first = round(64 * width)
        self.conv = plain_conv(in_shape[-1], first, 7, stride=2, init=init, rngs=rngs)
        self.norm = norm(first, rngs)
        names, inputs = [], first
        for stage, (channels, blocks) in enumerate(STAGES, 1):
            inner = first * channels // 64
            for block in range(1, blocks + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                outputs = _EXPANSION * inner
                convs = ((inner, 1, 1), (inner, 3, stride), (outputs, 1, 1))
                names.append(f"block{stage}_{block}")
                setattr(self, names[-1], Block(inputs, convs, init=init, rngs=rngs))
                inputs = outputs
        self.blocks = tuple(names)
        self.fc = classifier(inputs, classes, init=init, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits of shape (b, classes); ``train`` normalises by the batch."""
        del key  # there is no dropout
        x = nnx.relu(self.norm(self.conv(images), use_running_average=not train))
        # Windows overlap, so that the fast form of max pooling does not serve. Behind a
        # ReLU a border of zeros changes no maximum.
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2))
        for name in self.blocks:
            x = getattr(self, name)(x, train=train)
        return self.fc(x.mean((1, 2)))
