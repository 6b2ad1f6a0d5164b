"""Wide residual networks for CIFAR, by depth and width factor.

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.

References:
  Zagoruyko & Komodakis, `Wide residual networks <https://arxiv.org/abs/1605.07146>`_,
  2016.
"""

import jax
from flax import nnx

from sparse_optax.experiments.models.parts import classifier, norm
from sparse_optax.experiments.models.parts import plain_conv as conv


class Block(nnx.Module):
    """Two 3 x 3 convolutions around the identity, each behind batch norm and ReLU.

    Where the width changes the identity becomes a 1 x 1 convolution, without batch
    norm, of the normalised input.

    Args:
      inputs: channels of the input.
      outputs: channels of the output.
      stride: stride of the first convolution.
      dropout: share of the features dropped between the convolutions, in [0, 1).
      init: see :class:`WideResNet`.
      rngs: random keys of the initial weights.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        dropout: float,
        init: str,
        rngs: nnx.Rngs,
    ):
        """Draws the two or three convolutions."""
        self.norm1 = norm(inputs, rngs)
        self.conv1 = conv(inputs, outputs, 3, stride=stride, init=init, rngs=rngs)
        self.norm2 = norm(outputs, rngs)
        self.dropout = nnx.Dropout(dropout)
        self.conv2 = conv(outputs, outputs, 3, init=init, rngs=rngs)
        self.changes = inputs != outputs
        if self.changes:
            self.shortcut = conv(
                inputs, outputs, 1, stride=stride, init=init, rngs=rngs
            )

    def __call__(
        self, x: jax.Array, *, train: bool, key: jax.Array | None
    ) -> jax.Array:
        """Features of shape (b, h / stride, w / stride, outputs)."""
        y = nnx.relu(self.norm1(x, use_running_average=not train))
        if self.changes:
            x = self.shortcut(y)
        y = nnx.relu(self.norm2(self.conv1(y), use_running_average=not train))
        y = self.dropout(y, deterministic=not train, rngs=key)
        return x + self.conv2(y)


class WideResNet(nnx.Module):
    """WRN-depth-factor: three groups of residual blocks, each wider than the last.

    A 3 x 3 convolution to 16 channels; three groups of (depth - 4) / 6 blocks with
    16, 32 and 64 times ``factor`` channels, of which the second and the third halve
    the image; batch norm, ReLU, the mean over the image and one dense layer. On CIFAR
    WRN-28-2 has 1,463,984 weights, WRN-16-8 10,954,160, WRN-16-10 17,107,632 and
    WRN-22-8 17,147,312.

    Args:
      in_shape: shape of one image, (h, w, c); 32 x 32 x 3 for CIFAR, where the mean
        goes over 8 x 8 pixels.
      classes: number of classes.
      depth: number of convolutions, the three of the shortcuts among them: 10, 16,
        22, 28, ...
      factor: width factor, at least 1.
      dropout: share of the features dropped inside a block in training, in [0, 1).
      init: ``"torch"``, the start of the papers' code: convolutions normal with
        variance 2/fan_out, the dense layer as in :func:`lenet.initializers` but with
        zero bias; or ``"xavier"``, see there.
      rngs: random keys of the initial weights.

    Raises:
      ValueError: for a depth, a factor or a dropout out of range.

    Examples:
      >>> import jax
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.wide_resnet import WideResNet
      >>> def logits(images):
      ...     model = WideResNet((32, 32, 3), depth=28, factor=2, rngs=nnx.Rngs(0))
      ...     return model(images, train=False)
      >>> jax.eval_shape(logits, jax.numpy.zeros((2, 32, 32, 3))).shape
      (2, 10)

    Differences from the released code of sparse momentum: the running variance
    averages the variance of the batch, not its unbiased estimate.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int = 10,
        *,
        depth: int,
        factor: int,
        dropout: float = 0.3,
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws all layers."""
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(
                f"WideResNet: depth={depth} must be 6 n + 4 with n of 1 or more: 10, "
                "16, 22, 28, ..."
            )
        if factor < 1:
            raise ValueError(f"WideResNet: factor={factor} must be 1 or more.")
        if not 0 <= dropout < 1:
            raise ValueError(f"WideResNet: dropout={dropout} must be in [0, 1).")
        self.drops = dropout > 0
        self.conv = conv(in_shape[-1], 16, 3, init=init, rngs=rngs)
        names = []
        width = 16
        for group in (1, 2, 3):
            for block in range(1, (depth - 4) // 6 + 1):
                outputs = 16 * factor * 2 ** (group - 1)
                name = f"block{group}_{block}"
                made = Block(
                    width,
                    outputs,
                    stride=2 if group > 1 and block == 1 else 1,
                    dropout=dropout,
                    init=init,
                    rngs=rngs,
                )
                setattr(self, name, made)
                names.append(name)
                width = outputs
        self.blocks = tuple(names)
        self.norm = norm(width, rngs)
        self.fc = classifier(width, classes, init=init, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, train: bool, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits of shape (b, classes).

        Args:
          images: shape (b, h, w, c).
          train: normalise by the batch, and drop features.
          key: random key of what is dropped; needed in training with dropout.

        Returns:
          The logits.

        Raises:
          ValueError: where the key is missing.
        """
        keys: list[jax.Array | None] = [None] * len(self.blocks)
        if train and self.drops:
            if key is None:
                raise ValueError(
                    "WideResNet: key=None, and dropout in training draws at random; "
                    "pass a random key."
                )
            keys = list(jax.random.split(key, len(self.blocks)))
        x = self.conv(images)
        for name, block_key in zip(self.blocks, keys, strict=True):
            x = getattr(self, name)(x, train=train, key=block_key)
        x = nnx.relu(self.norm(x, use_running_average=not train))
        return self.fc(x.mean((1, 2)))
