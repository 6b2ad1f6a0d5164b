"""Reads from a module of flax along which axis each of its kernels sums."""

from collections.abc import Sequence
from typing import Any

import jax

from sparse_optax import checks
from sparse_optax.checks import ArgumentError


@checks.boundary("contraction_axes")
def contraction_axes(module: Any, *args: Any, **kwargs: Any) -> dict[str, int]:
    """The contraction axis of each kernel of a module of ``flax.nnx`` or ``linen``.

    A kernel of shape (64, 4, 16) may project to 4 heads, and sums along axis 0, or be a
    1-D convolution, and sums along axis 1. The module knows. It reads Dense or Linear,
    DenseGeneral or LinearGeneral (attention), Einsum, the convolutions and LoRA. Where
    a layer sums along several axes, it is the last of them.

    Args:
      module: A module of ``flax.nnx``, or one of ``flax.linen`` with example inputs.
      *args: For linen the inputs of ``module.init``, arrays or shapes; they are traced,
        and nothing is computed.
      **kwargs: For linen further arguments of ``module.init``, which are not traced.

    Returns:
      ``{name: axis}`` for ``n_m(2, 4, axis=...)``, by the names of the parameters. Axes
      are negative, so that they hold for leaves that stack layers along axis 0 too.

    Raises:
      ValueError: If ``module`` is of another library.

    Examples:
      >>> import flax.linen as nn, jax.numpy as jnp
      >>> from sparse_optax import patterns
      >>> layer = nn.DenseGeneral((4, 16))
      >>> patterns.contraction_axes(layer, jnp.zeros((1, 64)))
      {'kernel': -3}
    """
    try:
        from flax import linen, nnx
    except ImportError as error:
        raise ArgumentError(
            "`module` is read with flax, which is not installed. Install flax, or give "
            "the axes: n_m(2, 4, axis={name: axis})."
        ) from error
    if isinstance(module, nnx.Module):
        return _of_nnx(module, nnx)
    if isinstance(module, linen.Module):
        return _of_linen(module, args, kwargs, linen)
    cure = "Leave it out for equinox: leaves called `weight` are read as (out, in)."
    checks.fail("module", module, "a module of flax.nnx or flax.linen", cure)


def _of_nnx(module: Any, nnx: Any) -> dict[str, int]:
    found = {}
    for path, node in nnx.iter_graph(module):
        for leaf, axis in _of_nnx_layer(node, nnx).items():
            found["/".join(map(str, (*path, leaf)))] = axis
    return found


def _of_nnx_layer(node: Any, nnx: Any) -> dict[str, int]:
    """The axes of the kernels of one layer."""
    if isinstance(node, nnx.LinearGeneral):
        return {"kernel": -len(node.out_features) - 1}
    if isinstance(node, nnx.Einsum):
        return _of_einsum(node.einsum_str)
    if isinstance(node, nnx.ConvTranspose):
        return {"kernel": -1 if node.transpose_kernel else -2}
    if isinstance(node, nnx.LoRA):
        own = {"lora_a": -2, "lora_b": -2}
        return own | ({"kernel": -2} if isinstance(node, nnx.Linear) else {})
    if isinstance(node, nnx.Linear | nnx.Conv):
        return {"kernel": -2}
    return {}


def _of_linen(
    module: Any, args: Sequence[Any], kwargs: Any, linen: Any
) -> dict[str, int]:
    found: dict[str, int] = {}

    def watch(call, given, options, context):
        layer = context.module
        if context.method_name == "__call__":
            for leaf, axis in _of_linen_layer(layer, given, options, linen).items():
                found["/".join((*layer.path, leaf))] = axis
        return call(*given, **options)

    traced = [i for i, x in enumerate(args) if hasattr(x, "shape")]

    def init(key, arrays):
        inputs = list(args)
        for i, x in zip(traced, arrays, strict=True):
            inputs[i] = x
        return module.init({"params": key, "dropout": key}, *inputs, **kwargs)

    with linen.intercept_methods(watch):
        jax.eval_shape(init, jax.random.key(0), [args[i] for i in traced])
    return found


def _of_linen_layer(
    layer: Any, args: Sequence[Any], kwargs: Any, linen: Any
) -> dict[str, int]:
    """The axes of the kernels of one layer that is called."""
    if isinstance(layer, linen.DenseGeneral):
        features = layer.features
        number = len(features) if isinstance(features, Sequence) else 1
        return {"kernel": -number - 1}
    if isinstance(layer, linen.Einsum):
        text = kwargs.get("einsum_str") or (args[1] if len(args) > 1 else None)
        return _of_einsum(text or layer.einsum_str)
    if isinstance(layer, linen.ConvTranspose):
        return {"kernel": -1 if layer.transpose_kernel else -2}
    if isinstance(layer, linen.Dense | linen.Conv | linen.ConvLocal):
        return {"kernel": -2}
    return {}


def _of_einsum(text: str) -> dict[str, int]:
    """From a text such as "nta,hab->nthb", of the inputs and the kernel."""
    operands, _, result = text.replace(" ", "").partition("->")
    kernel = operands.split(",")[1]
    summed = [i for i, letter in enumerate(kernel) if letter not in result]
    return {"kernel": summed[-1] - len(kernel)} if summed else {}
