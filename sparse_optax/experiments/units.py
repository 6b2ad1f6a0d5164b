"""Hidden units that do nothing, and the weights that are spent on them."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class DeadUnits(NamedTuple):
    """What :func:`dead_units` counts in one hidden layer or, of weights, in all.

    Attributes:
      dead: units whose output says nothing, by the layer that feeds them.
      removed: those of them that no weight leads to and none leads from: what is left
        of a unit that was pruned away.
      wasted: kept weights that lead to a dead unit or from one.
    """

    dead: dict[str, int]
    removed: dict[str, int]
    wasted: int


def numbered(names: Iterable[str]) -> list[str]:
    """Names of layers as they are numbered: fc10 comes after fc2.

    Args:
      names: the names.

    Returns:
      The names, sorted.

    Examples:
      >>> from sparse_optax.experiments import units
      >>> units.numbered(["fc10", "fc2", "fc1"])
      ['fc1', 'fc2', 'fc10']
    """

    def parts(name):
        stem = name.rstrip("0123456789")
        return stem, int(name[len(stem) :] or 0)

    return sorted(names, key=parts)


def dead_units(params: Any, images: Any, masks: Any = None) -> DeadUnits | None:
    """Counts the hidden units of a chain of dense layers that carry no information.

    A unit is dead where its output is the same for every image, be it zero or what its
    bias gives, or where none of its outgoing weights is kept.

    Args:
      params: ``{layer: {"kernel", "bias"}}``, the layers in the order of their numbers,
        with rectified linear units between them.
      images: what the first layer sees, shape (n, ...).
      masks: the mask tree, or None where what is not zero is what is kept.

    Returns:
      The counts; None where the layers are no such chain.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments import units
      >>> first = {"kernel": jnp.array([[1.0, 0.0, 0.0]]), "bias": jnp.ones(3)}
      >>> last = {"kernel": jnp.array([[1.0], [1.0], [0.0]]), "bias": jnp.zeros(1)}
      >>> images = jnp.arange(4.0)[:, None]
      >>> units.dead_units({"fc1": first, "fc2": last}, images)
      DeadUnits(dead={'fc1': 2}, removed={'fc1': 1}, wasted=1)
    """
    names = numbered(params)
    layers = [params[name] for name in names]
    if any(set(layer) != {"kernel", "bias"} for layer in layers):
        return None
    kernels = [layer["kernel"] for layer in layers]
    width = images[0].size
    for kernel in kernels:
        if kernel.ndim != 2 or kernel.shape[0] != width:
            return None
        width = kernel.shape[1]
    kept = [
        kernel != 0 if masks is None else masks[name]["kernel"]
        for name, kernel in zip(names, kernels, strict=True)
    ]
    dead, removed, wasted = _count(layers, kept, images.reshape(len(images), -1))
    hidden = names[:-1]
    return DeadUnits(
        {name: int(n) for name, n in zip(hidden, dead, strict=True)},
        {name: int(n) for name, n in zip(hidden, removed, strict=True)},
        int(wasted),
    )


@jax.jit
def _count(layers, kept, inputs):
    dead, removed = [], []
    for layer, (into, onward) in zip(layers, itertools.pairwise(kept), strict=False):
        inputs = jax.nn.relu(inputs @ layer["kernel"] + layer["bias"][None])
        constant = inputs.max(axis=0) == inputs.min(axis=0)
        fed, heard = into.any(axis=0), onward.any(axis=1)
        dead.append(jnp.logical_or(constant, jnp.logical_not(heard)))
        removed.append(jnp.logical_not(jnp.logical_or(fed, heard)))
    # A weight has a unit at each end; images and classes are never dead.
    ends = [
        jnp.zeros(kept[0].shape[0], bool),
        *dead,
        jnp.zeros(kept[-1].shape[1], bool),
    ]
    wasted = 0
    for m, (a, b) in zip(kept, itertools.pairwise(ends), strict=True):
        idle = jnp.logical_and(m, jnp.logical_or(a[:, None], b[None]))
        wasted += jnp.sum(idle, dtype=jnp.int32)
    return (
        [jnp.sum(x, dtype=jnp.int32) for x in dead],
        [jnp.sum(x, dtype=jnp.int32) for x in removed],
        wasted,
    )
