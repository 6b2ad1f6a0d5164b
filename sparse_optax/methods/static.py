"""Static sparse training: masks that never change, the baseline of every paper."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from sparse_optax.leaves import PyTree, Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import stateless

# No cycle is ever due; rules that do nothing leave little to compile for it.
_KEEP = stateless(lambda evidence: evidence.masks)
_NONE = stateless(
    lambda evidence: tuple(jnp.zeros_like(m) for m in evidence.masks), exact=True
)


def static_sparse(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    key: Key | None = None,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a sparse network whose mask never changes.

    .. math::
        \Delta w = u \text{ where } m, \quad -w \text{ elsewhere}

    The masks are random, an exact number in each layer, or given: those of
    ``snip_masks``, of a lottery ticket, of a control.

    .. note::
      Last in the chain: wrap what you train with. It is ``regrow`` without a cycle: a
      step costs one pass over weights, updates and masks, and ``get_masks``,
      ``set_masks`` and ``sparsify`` work on its state. Give every argument in
      ``static_args`` of ``optax.inject_hyperparams``.

    Args:
      inner: The optimizer that is wrapped; it sees the dense gradient and the masked
        weights. None, behind an optimizer in a chain.
      density: Fraction of weights kept, in (0, 1], in every layer, or a budget such as
        ``budgets.erdos_renyi_kernel(0.1)``. May be left out where ``masks`` are given.
      key: Integer seed or random key for the masks; needed unless they are given.
      masks: Masks instead of random ones.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.25, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int((optax.apply_updates(params, updates)["w"] != 0).sum())
      5

    References:
      Mostafa and Wang, `Parameter Efficient Training of Deep Convolutional Neural
      Networks by Dynamic Sparse Reparameterization
      <https://arxiv.org/abs/1902.05967>`_, 2019, who train it, uniform in each layer,
      for twice the epochs.
    """
    if key is None and masks is None:
        raise ValueError(
            "static_sparse: `key` must be a seed or a random key where the masks are "
            "random; got None. Pass key=0, or masks=."
        )
    return regrow(
        inner,
        density=density,
        prune=_KEEP,
        redistribute=redistribute.none,
        grow=_NONE,
        update_period=1,
        update_stop=1,
        prune_rate=0.0,
        key=0 if key is None else key,
        masks=masks,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
        caller="static_sparse",
    )
