"""The layers that the convolutional networks are made of.

Shapes use ``b`` for the batch, ``h`` and ``w`` for the image, ``c`` for channels.
"""

from flax import nnx

from sparse_optax.experiments.models import lenet
from sparse_optax.experiments.models.convolution import convolution

_he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    inputs: int,
    outputs: int,
    window: int,
    *,
    init: str,
    rngs: nnx.Rngs,
    stride: int = 1,
    padding: int | None = None,
) -> nnx.Conv:
    """A convolution with a bias; ``init`` as in :func:`lenet.initializers`.

    Without ``padding`` a window of odd size keeps the image at a stride of 1.
    """
    return nnx.Conv(
        inputs,
        outputs,
        (window, window),
        strides=stride,
        # "SAME" would shift the windows where the stride is 2.
        padding=window // 2 if padding is None else padding,
        conv_general_dilated=convolution,
        rngs=rngs,
        **lenet.initializers(init, window**2 * inputs)._asdict(),
    )


def plain_conv(
    inputs: int,
    outputs: int,
    window: int,
    *,
    init: str,
    rngs: nnx.Rngs,
    stride: int = 1,
) -> nnx.Conv:
    """A convolution without a bias, as residual networks have it.

    With ``init="torch"`` it is normal with variance 2 / fan_out, the start of the
    papers' code; with ``"xavier"`` as in :func:`lenet.initializers`.
    """
    start = lenet.initializers(init, window**2 * inputs)
    return nnx.Conv(
        inputs,
        outputs,
        (window, window),
        strides=stride,
        padding=window // 2,
        use_bias=False,
        conv_general_dilated=convolution,
        kernel_init=_he_normal if init == "torch" else start.kernel_init,
        rngs=rngs,
    )


def dense(inputs: int, outputs: int, *, init: str, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer; ``init`` as in :func:`lenet.initializers`."""
    start = lenet.initializers(init, inputs)
    return nnx.Linear(inputs, outputs, rngs=rngs, **start._asdict())


def classifier(inputs: int, classes: int, *, init: str, rngs: nnx.Rngs) -> nnx.Linear:
    """The last dense layer of a residual network: its bias starts from zero."""
    start = lenet.initializers(init, inputs)
    return nnx.Linear(inputs, classes, kernel_init=start.kernel_init, rngs=rngs)


def norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm, in float32 whatever the other layers compute in."""
    # PyTorch's momentum of 0.1 weighs the new value, this one the old.
    return nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)
