"""Static sparse training with masks that never change, the usual baseline."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from sparse_optax import checks
from sparse_optax.checks import boundary
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern, pattern_of
from sparse_optax.regrowth import redistribute
from sparse_optax.regrowth.engine import transformation
from sparse_optax.regrowth.rules import stateless
from sparse_optax.regrowth.start import Method, check

# No cycle is ever due, and rules that do nothing keep its compilation cheap.
_KEEP = stateless(lambda evidence: evidence.masks)
_NONE = stateless(
    lambda evidence: tuple(jnp.zeros_like(m) for m in evidence.masks), exact=True
)


@boundary("static_sparse")
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
    freeze: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a sparse network whose masks never change.

    .. math:: \Delta w = u \text{ where } m, \quad -w \text{ elsewhere}

    The masks are random, with an exact count in each layer, or given: those of
    ``snip_masks``, of a lottery ticket, of a control.

    .. note:: Last in the chain; it wraps the optimizer. It is ``regrow`` without a
      cycle: a step costs one pass over weights, updates and masks, and ``get_masks``,
      ``set_masks`` and ``sparsify`` take its state. All arguments are static under
      ``optax.inject_hyperparams``.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, which sees the dense gradient and the masked
        weights, or None behind an optimizer in a chain.
      density: Fraction of weights kept per layer, in (0, 1], or a budget such as
        ``budgets.erdos_renyi_kernel(0.1)``.
      key: Integer seed or random key for random masks.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: Masks instead of random ones; ``density`` and ``key`` may then be left out.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      packed: Stores one bit per weight.
      pattern: See ``regrow``.
      freeze: Whether all other weights keep their value, bit for bit, instead of zero,
        whatever weight decay and momentum do: those outside of the masks, and all of
        leaves without a mask, such as biases. To train these, give
        ``masks=masks.fill(masks, params)``. The state says so: ``sparsify``,
        ``save_sparse`` and ``report.summary`` take all its weights as kept.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.25, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int((optax.apply_updates(params, updates)["w"] != 0).sum())
      5

      Only these five weights train; the others keep their value:

      >>> tx = sparse_optax.static_sparse(
      ...     optax.adamw(0.1), density=0.25, key=0, freeze=True)
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int((optax.apply_updates(params, updates)["w"] == 1).sum())
      15

    References:
      Mostafa and Wang, 2019, see ``dynamic_sparse``: uniform, for twice the epochs.
    """
    if key is None and masks is None:
        cure = "Pass key=0, or masks=."
        checks.fail("key", key, "a seed or key where the masks are random", cure)
    method = Method(
        inner=inner,
        density=density,
        prune=_KEEP,
        redistribute=redistribute.none,
        grow=_NONE,
        update_period=1,
        update_start=0,
        update_stop=1,  # before the first cycle
        prune_rate=0.0,
        key=0 if key is None else key,
        masks=masks,
        where=where,
        stacked=stacked,
        momentum="auto",
        reset_moments="none",
        packed=packed,
        ramp=None,
        hidden=False,
        pattern=pattern_of(pattern),
        regrown="zero",
        freeze=freeze,
    )
    check(method)
    return transformation(method)
