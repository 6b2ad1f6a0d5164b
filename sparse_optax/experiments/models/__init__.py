"""Networks of the papers, one family per file, and their registry."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from sparse_optax.experiments.models import lenet


class Entry(NamedTuple):
    """One model of the registry.

    Attributes:
      make: ``make(in_shape, classes, *, init, rngs)`` returns the nnx module;
        ``in_shape`` is (height, width, channels).
      convolutional: whether it holds convolutions. On a CPU these are slow inside
        ``lax.scan``, so that the train loop steps through them in Python.
    """

    make: Callable[..., nnx.Module]
    convolutional: bool


MODELS: dict[str, Entry] = {
    "lenet-300-100": Entry(
        lambda in_shape, classes, *, init, rngs: lenet.LeNet300100(
            math.prod(in_shape), classes, init=init, rngs=rngs
        ),
        convolutional=False,
    ),
    "lenet-5-caffe": Entry(lenet.LeNet5Caffe, convolutional=True),
}


def create(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    *,
    init: str = "torch",
    key: jax.Array,
) -> tuple[Callable[[Any, jax.Array], jax.Array], Any]:
    """Makes a model as a pure function and its parameters.

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
      ValueError: for an unknown model.

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
    if name not in MODELS:
        raise ValueError(f"create: model={name!r}; choose one of {', '.join(MODELS)}.")
    module = MODELS[name].make(in_shape, classes, init=init, rngs=nnx.Rngs(key))
    graph, state = nnx.split(module)

    def apply(params, images):
        return nnx.merge(graph, params)(images)

    return apply, nnx.to_pure_dict(state)
