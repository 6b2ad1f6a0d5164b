"""LeNet-300-100 and LeNet-5-Caffe, the two networks of every MNIST table.

Shapes use ``b`` for the batch.

References:
  LeCun et al., `Gradient-based learning applied to document recognition
  <https://doi.org/10.1109/5.726791>`_, 1998. LeNet-5-Caffe is the variant that came
  with the Caffe framework: more channels, max pooling, rectified linear units.
"""

import math
from typing import NamedTuple

import jax
from flax import nnx

from sparse_optax import budgets
from sparse_optax.experiments.models.convolution import convolution
from sparse_optax.experiments.models.max_pool import max_pool


class Initializers(NamedTuple):
    """Keyword arguments of one layer: how it draws its kernel and its bias."""

    kernel_init: jax.nn.initializers.Initializer
    bias_init: jax.nn.initializers.Initializer


def initializers(init: str, fan_in: int) -> Initializers:
    """How a layer of ``fan_in`` inputs is drawn.

    Args:
      init: ``"torch"``, the default of PyTorch's layers: kernel and bias uniform on
        ``(-1/sqrt(fan_in), 1/sqrt(fan_in))``; or ``"xavier"``: kernel uniform on
        ``+-sqrt(6/(fan_in + fan_out))``, bias zero.
      fan_in: number of inputs of one output unit, at least 1.

    Returns:
      The two initializers.

    Raises:
      ValueError: for another ``init``.

    Examples:
      >>> import jax
      >>> from sparse_optax.experiments.models import lenet
      >>> draw = lenet.initializers("torch", fan_in=100).kernel_init
      >>> kernel = draw(jax.random.key(0), (100, 50))
      >>> bool(abs(kernel).max() <= 0.1)
      True

    References:
      He et al., `Delving deep into rectifiers <https://arxiv.org/abs/1502.01852>`_,
      2015 (with the gain that makes the bound 1/sqrt(fan_in)); Glorot & Bengio,
      `Understanding the difficulty of training deep feedforward neural networks
      <https://proceedings.mlr.press/v9/glorot10a.html>`_, 2010.
    """
    if init == "torch":
        bound = 1 / math.sqrt(fan_in)

        def uniform(key, shape, dtype=None, out_sharding=None):
            del out_sharding
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return Initializers(uniform, uniform)
    if init == "xavier":
        return Initializers(
            nnx.initializers.xavier_uniform(), nnx.initializers.zeros_init()
        )
    raise ValueError(f"initializers: init={init!r}; choose 'torch' or 'xavier'.")


def _dense(inputs: int, outputs: int, init: str, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, rngs=rngs, **initializers(init, inputs)._asdict()
    )


def _conv(inputs: int, outputs: int, init: str, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (5, 5),
        padding="VALID",
        conv_general_dilated=convolution,
        rngs=rngs,
        **initializers(init, 25 * inputs)._asdict(),
    )


def thin_widths(
    density: float, in_features: int = 784, classes: int = 10
) -> tuple[int, int]:
    """Hidden widths of the dense LeNet-300-100 with as many weights as a sparse one.

    Args:
      density: share of the weights of LeNet-300-100, in (0, 1]; biases are not counted.
      in_features: number of pixels of an image, at least 1.
      classes: number of classes, at least 1.

    Returns:
      The first width as large as the weights allow with a second of a third of it,
      rounded down and at least 1; then the second as large as the rest of them allows,
      at most 100: at 5% one more unit in the first layer costs 784 weights, in the
      second 26.

    Raises:
      ValueError: where ``density`` is outside (0, 1] or pays for no unit.

    Examples:
      >>> from sparse_optax.experiments.models import lenet
      >>> lenet.thin_widths(1.0), lenet.thin_widths(0.05)
      ((300, 100), (16, 29))
    """

    def weights(first: int, second: int) -> int:
        return in_features * first + first * second + second * classes

    def third(first: int) -> int:
        return max(first // 3, 1)

    if not 0 < density <= 1:
        raise ValueError(
            f"thin_widths: density={density!r} must be in (0, 1]; use 0.05 for the "
            "size of a network that keeps 5% of its weights."
        )
    budget = budgets.count(density, weights(300, 100))
    first = 300
    while first and weights(first, third(first)) > budget:
        first -= 1
    if not first:
        raise ValueError(
            f"thin_widths: density={density!r} keeps {budget} weights, and one hidden "
            f"unit a layer needs {weights(1, 1)}; raise the density."
        )
    return first, min((budget - in_features * first) // (first + classes), 100)


class LeNet300100(nnx.Module):
    """Fully connected, 300 and 100 hidden units: 266,200 weights on MNIST.

    Takes images of any shape (b, h, w, c) with ``h * w * c = in_features`` and
    returns logits of shape (b, classes).

    Args:
      in_features: number of pixels of an image, at least 1.
      classes: number of classes.
      hidden: other numbers of hidden units, such as those of :func:`thin_widths`.
      init: see :func:`initializers`.
      rngs: random keys of the initial weights.

    Examples:
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.lenet import LeNet300100
      >>> model = LeNet300100(64, 10, rngs=nnx.Rngs(0))
      >>> model(jax.numpy.zeros((3, 8, 8, 1))).shape
      (3, 10)
    """

    def __init__(
        self,
        in_features: int,
        classes: int = 10,
        *,
        hidden: tuple[int, int] = (300, 100),
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws the three layers."""
        first, second = hidden
        self.fc1 = _dense(in_features, first, init, rngs)
        self.fc2 = _dense(first, second, init, rngs)
        self.fc3 = _dense(second, classes, init, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape (b, classes)."""
        x = images.reshape(images.shape[0], -1)
        x = nnx.relu(self.fc1(x))
        x = nnx.relu(self.fc2(x))
        return self.fc3(x)


class LeNet300100BN(nnx.Module):
    """LeNet-300-100 with batch norm before each rectifier and without biases.

    The network of the MNIST tables of DSR: its 266,200 weights are all that can be
    pruned, scales and shifts of the norms stay.

    Args:
      in_features: number of pixels of an image, at least 1.
      classes: number of classes.
      init: see :func:`initializers`.
      rngs: random keys of the initial weights.

    Examples:
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.lenet import LeNet300100BN
      >>> model = LeNet300100BN(64, 10, rngs=nnx.Rngs(0))
      >>> model(jax.numpy.zeros((3, 8, 8, 1)), train=True).shape
      (3, 10)

    References:
      Mostafa and Wang, `Parameter efficient training of deep convolutional neural
      networks by dynamic sparse reparameterization
      <https://arxiv.org/abs/1902.05967>`_, 2019.
    """

    def __init__(
        self,
        in_features: int,
        classes: int = 10,
        *,
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws the three layers."""

        def dense(inputs: int, outputs: int) -> nnx.Linear:
            start = initializers(init, inputs).kernel_init
            return nnx.Linear(
                inputs, outputs, use_bias=False, kernel_init=start, rngs=rngs
            )

        def norm(features: int) -> nnx.BatchNorm:
            return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)

        self.fc1, self.norm1 = dense(in_features, 300), norm(300)
        self.fc2, self.norm2 = dense(300, 100), norm(100)
        self.fc3 = dense(100, classes)

    def __call__(
        self, images: jax.Array, *, train: bool = False, key: jax.Array | None = None
    ) -> jax.Array:
        """Logits of shape (b, classes)."""
        del key
        x = images.reshape(images.shape[0], -1)
        x = nnx.relu(self.norm1(self.fc1(x), use_running_average=not train))
        x = nnx.relu(self.norm2(self.fc2(x), use_running_average=not train))
        return self.fc3(x)


class LeNet5Caffe(nnx.Module):
    """Two 5 x 5 convolutions (20, 50) and 500 hidden units: 430,500 weights.

    Rectified linear units after both convolutions and the first dense layer, as in
    the released code of sparse momentum and of GSM.

    Args:
      in_shape: shape of one image, (h, w, c); 28 x 28 x 1 for MNIST, and at least
        16 x 16 so that something is left after two unpadded convolutions.
      classes: number of classes.
      init: see :func:`initializers`.
      rngs: random keys of the initial weights.

    Raises:
      ValueError: where the image is too small.

    Examples:
      >>> from flax import nnx
      >>> from sparse_optax.experiments.models.lenet import LeNet5Caffe
      >>> model = LeNet5Caffe((28, 28, 1), rngs=nnx.Rngs(0))
      >>> model(jax.numpy.zeros((3, 28, 28, 1))).shape
      (3, 10)
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        classes: int = 10,
        *,
        init: str = "torch",
        rngs: nnx.Rngs,
    ):
        """Draws the four layers."""
        height, width, channels = in_shape
        # A valid 5 x 5 convolution takes off 4, a pooling halves; twice.
        left = [((size - 4) // 2 - 4) // 2 for size in (height, width)]
        if min(left) < 1:
            raise ValueError(
                f"LeNet5Caffe: in_shape={in_shape} leaves no pixel after two unpadded "
                "5 x 5 convolutions with pooling; use images of at least 16 x 16, or "
                "LeNet300100."
            )
        self.conv1 = _conv(channels, 20, init, rngs)
        self.conv2 = _conv(20, 50, init, rngs)
        self.fc1 = _dense(math.prod(left) * 50, 500, init, rngs)
        self.fc2 = _dense(500, classes, init, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of shape (b, classes)."""
        x = max_pool(nnx.relu(self.conv1(images)))
        x = max_pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.fc1(x.reshape(x.shape[0], -1)))
        return self.fc2(x)
