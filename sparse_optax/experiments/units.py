"""Hidden units that do nothing: what growth by momentum is said to avoid."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp


def dead_units(params: Any, images: jax.Array) -> dict[str, int] | None:
    """Counts the hidden units of a chain of dense layers that carry no information.

    A unit is dead where its output is the same for every image, be it zero or what its
    bias gives, or where none of its outgoing weights differs from zero.

    Args:
      params: ``{layer: {"kernel", "bias"}}``, the layers in the order of their names,
        with rectified linear units between them.
      images: what the first layer sees, shape (n, ...).

    Returns:
      A number for every hidden layer, by the name of the layer that feeds it; None
      where the layers are no such chain.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments import units
      >>> first = {"kernel": jnp.array([[1.0, 0.0, 1.0]]), "bias": jnp.ones(3)}
      >>> last = {"kernel": jnp.array([[1.0], [1.0], [0.0]]), "bias": jnp.zeros(1)}
      >>> units.dead_units({"fc1": first, "fc2": last}, jnp.arange(4.0)[:, None])
      {'fc1': 2}
    """
    names = sorted(params)
    layers = [params[name] for name in names]
    if any(set(layer) != {"kernel", "bias"} for layer in layers):
        return None
    kernels = [layer["kernel"] for layer in layers]
    width = images[0].size
    for kernel in kernels:
        if kernel.ndim != 2 or kernel.shape[0] != width:
            return None
        width = kernel.shape[1]
    counts = _count(layers, images.reshape(len(images), -1))
    return {name: int(n) for name, n in zip(names[:-1], counts, strict=True)}


@jax.jit
def _count(layers, inputs):
    counts = []
    for layer, following in itertools.pairwise(layers):
        inputs = jax.nn.relu(inputs @ layer["kernel"] + layer["bias"][None])
        constant = inputs.max(axis=0) == inputs.min(axis=0)
        unheard = jnp.logical_not(jnp.any(following["kernel"] != 0, axis=1))
        counts.append(jnp.sum(jnp.logical_or(constant, unheard), dtype=jnp.int32))
    return counts
