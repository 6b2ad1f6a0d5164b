"""Networks of the papers, one family per file, and their registry.

:func:`create` makes a network that is a function of its parameters alone;
:func:`create_stateful` makes any network, also one with batch norm, whose running
statistics are neither trained nor pruned, and with dropout, which draws at random.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_optax.experiments.models import (
    alexnet,
    densenet,
    lenet,
    resnet,
    transformer,
    vgg,
    wide_resnet,
)

# What a network may compute in.
DTYPES = ("float32", "bfloat16")


class Entry(NamedTuple):
    """One model of the registry.

    Attributes:
      make: ``make(in_shape, classes, *, init, rngs)`` returns the nnx module;
        ``in_shape`` is (height, width, channels). A module with running statistics
        is called as ``module(images, train=..., key=...)``, one without as
        ``module(images)``.
      convolutional: whether it holds convolutions. On a CPU these are slow inside
        ``lax.scan``, so that the train loop steps through them in Python.
      text: whether it reads numbers of characters, shape (t,), and predicts the next
        of each, in place of images.
      large_classifier: whether its last layer is one of many weights, which the shares
        of Mostafa and Wang do not leave dense.
    """

    make: Callable[..., nnx.Module]
    convolutional: bool
    text: bool = False
    large_classifier: bool = False


def _thin_lenet(in_shape, classes, *, density, init, rngs) -> nnx.Module:
    """LeNet-300-100 with fewer units: the dense network of a sparse one's size."""
    pixels = math.prod(in_shape)
    hidden = lenet.thin_widths(density, pixels, classes)
    return lenet.LeNet300100(pixels, classes, hidden=hidden, init=init, rngs=rngs)


MODELS: dict[str, Entry] = {
    "lenet-300-100": Entry(
        lambda in_shape, classes, *, init, rngs: lenet.LeNet300100(
            math.prod(in_shape), classes, init=init, rngs=rngs
        ),
        convolutional=False,
    ),
    "lenet-5-caffe": Entry(lenet.LeNet5Caffe, convolutional=True),
    "lenet-300-100-bn": Entry(
        lambda in_shape, classes, *, init, rngs: lenet.LeNet300100BN(
            math.prod(in_shape), classes, init=init, rngs=rngs
        ),
        convolutional=False,
    ),
    # The densities of Mostafa and Wang's tables, and 20%.
    **{
        f"thin-lenet-{density}": Entry(
            functools.partial(_thin_lenet, density=density), convolutional=False
        )
        for density in (0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2)
    },
    **{
        f"alexnet-{size}": Entry(
            functools.partial(alexnet.AlexNet, hidden=hidden), convolutional=True
        )
        for size, hidden in (("s", 1024), ("b", 2048))
    },
    **{
        f"vgg16-{variant.lower()}": Entry(
            functools.partial(vgg.VGG16, variant=variant), convolutional=True
        )
        for variant in ("C", "D", "like")
    },
    **{
        f"wrn-{depth}-{factor}": Entry(
            functools.partial(wide_resnet.WideResNet, depth=depth, factor=factor),
            convolutional=True,
        )
        for depth, factor in ((28, 2), (16, 8), (16, 10), (22, 8), (22, 2), (16, 4))
    },
    # For short schedules, in which dropout costs more than it gives.
    "wrn-16-2": Entry(
        functools.partial(wide_resnet.WideResNet, depth=16, factor=2, dropout=0.0),
        convolutional=True,
    ),
    **{
        f"resnet-{depth}": Entry(
            functools.partial(resnet.CifarResNet, depth=depth), convolutional=True
        )
        for depth in (20, 56)
    },
    "resnet-50": Entry(resnet.ResNet50, convolutional=True, large_classifier=True),
    # The widths of Mostafa and Wang's thin networks.
    **{
        f"resnet-50-{width}": Entry(
            functools.partial(resnet.ResNet50, width=width),
            convolutional=True,
            large_classifier=True,
        )
        for width in (0.46, 0.54)
    },
    "densenet-40": Entry(densenet.DenseNet, convolutional=True),
    "transformer": Entry(transformer.Transformer, convolutional=False, text=True),
}


def create(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    *,
    init: str = "torch",
    key: jax.Array,
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """Makes a model without running statistics: a pure function and its parameters.

    Args:
      name: a key of :data:`MODELS`.
      in_shape: shape of one image, (height, width, channels).
      classes: number of classes, at least 2.
      init: ``"torch"`` or ``"xavier"``, see :func:`lenet.initializers`.
      key: random key of the initial weights.

    Returns:
      ``(apply, params)``: ``apply(params, images)`` gives the logits, of shape
      (batch, classes); ``params`` is a nested dict of arrays.

    Raises:
      ValueError: for an unknown model, and for one that keeps running statistics.

    Examples:
      >>> import jax
      >>> from sparse_optax.experiments import models
      >>> apply, params = models.create(
      ...     "lenet-300-100", (28, 28, 1), 10, key=jax.random.key(0)
      ... )
      >>> sum(leaf.size for leaf in jax.tree.leaves(params))
      266610
      >>> apply(params, jax.numpy.zeros((5, 28, 28, 1))).shape
      (5, 10)
    """
    apply, params, stats = create_stateful(name, in_shape, classes, init=init, key=key)
    if stats:
        raise ValueError(
            f"create: model={name!r} keeps running statistics, so that its logits are "
            "no function of its parameters alone; use create_stateful."
        )
    return lambda params, images: apply(params, {}, images)[0], params


def create_stateful(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    *,
    init: str = "torch",
    dtype: str = "float32",
    key: jax.Array,
) -> tuple[Callable[..., tuple[jax.Array, Any]], Any, Any]:
    """Makes any model as a pure function, its parameters and its statistics.

    Args:
      name: a key of :data:`MODELS`.
      in_shape: shape of one image, (height, width, channels).
      classes: number of classes, at least 2.
      init: ``"torch"`` or ``"xavier"``, see :func:`lenet.initializers`.
      dtype: what convolutions and dense layers compute in, ``"float32"`` or
        ``"bfloat16"``. Parameters, norms and logits are float32 in any case.
      key: random key of the initial weights.

    Returns:
      ``(apply, params, stats)``. ``apply(params, stats, images, train=False,
      key=None)`` gives ``(logits, stats)``. With ``train`` the images are normalised
      by their own mean and variance, which enter the new statistics, and features are
      dropped at random as ``key`` says; it may be left out for a model without
      dropout. Without ``train`` the statistics normalise and come back unchanged.
      ``params`` and ``stats`` are nested dicts of arrays; ``stats`` is empty for a
      model that keeps none, and there ``train`` and ``key`` change nothing.

    Raises:
      ValueError: for an unknown model or dtype.

    Examples:
      >>> import jax
      >>> from sparse_optax.experiments import models
      >>> def logits(key, images):
      ...     apply, params, stats = models.create_stateful(
      ...         "wrn-28-2", (32, 32, 3), 10, key=key
      ...     )
      ...     return apply(params, stats, images, train=True, key=key)
      >>> images = jax.numpy.zeros((5, 32, 32, 3))
      >>> shape, stats = jax.eval_shape(logits, jax.random.key(0), images)
      >>> shape.shape, sorted(stats["norm"])
      ((5, 10), ['mean', 'var'])
    """
    if name not in MODELS:
        raise ValueError(f"create: model={name!r}; choose one of {', '.join(MODELS)}.")
    if dtype not in DTYPES:
        raise ValueError(f"create: dtype={dtype!r}; choose one of {', '.join(DTYPES)}.")
    module = MODELS[name].make(in_shape, classes, init=init, rngs=nnx.Rngs(key))
    if dtype != "float32":
        _compute_in(module, jnp.dtype(dtype))
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    stateful = bool(nnx.to_pure_dict(stats))

    def apply(params, stats, images, *, train=False, key=None):
        # A variable that holds a NumPy array would be written to in place.
        module = nnx.merge(graph, params, jax.tree.map(jnp.asarray, stats))
        if not stateful:
            return _logits(module(images)), stats
        logits = _logits(module(images, train=train, key=key))
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return apply, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def _compute_in(module: nnx.Module, dtype: jnp.dtype) -> None:
    """Lets convolutions and dense layers compute in a dtype; norms stay as they are."""
    for _, part in nnx.iter_graph(module):
        if isinstance(part, nnx.Conv | nnx.Linear):
            part.dtype = dtype


def _logits(values: jax.Array) -> jax.Array:
    """Logits in float32, which losses need."""
    return values.astype(jnp.float32)
