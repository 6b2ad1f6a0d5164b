"""Growth by a long average of the gradient: a recipe of this library, of no paper."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from sparse_optax import budgets, checks, schedules
from sparse_optax.budgets.resolve import is_number
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow


@boundary("long_average_regrow")
def long_average_regrow(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
    momentum: float = 0.998,
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    reset_moments: str = "none",
    packed: bool = False,
    pattern: Pattern | None = None,
    dense_until: int | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grows weights by an average of the gradient over some epoch; no paper's.

    Sparse momentum reads the momentum of SGD, an average over some ten batches. Here
    growth has an average of its own, with g the gradient:

    .. math:: M \leftarrow \beta M + (1 - \beta) g

    Each period, layer by layer, the fraction p of active weights of smallest |w| is
    pruned, and as many missing weights of largest |M| grow.

    .. note:: Last in the chain; it wraps the optimizer. The gradient that reaches it
      must be dense. Memory: four bytes per weight for the average and one for the mask,
      one bit with ``packed``. Under ``optax.inject_hyperparams`` only ``prune_rate``
      varies.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer.
      density: Fraction of weights kept, in (0, 1], shared among the layers by
        ``budgets.erdos_renyi_kernel``, or a budget.
      update_period: Updates between two cycles, about an epoch.
      update_stop: No cycle from this many updates on. Give the length of training.
      prune_rate: p in [0, 1], or a schedule of the number of finished updates; None is
        the cosine from 0.3 to 0 at ``update_stop``.
      momentum: beta, in [0, 1). 1 - 1 / n averages over about n updates: give about
        an epoch; the default is for 500.
      key: Integer seed or random key, for the first masks.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: First masks instead of random ones; ``density`` may then be left out.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      reset_moments: See ``regrow``.
      packed: Stores one bit per weight.
      pattern: See ``regrow``.
      dense_until: Trains all weights for this many updates, then cuts to ``density``
        once, see ``regrow``. None starts sparse.
      within: Masks of the weights that it may use; the others stay as they are, bit
        for bit, see ``regrow``. None is all.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.long_average_regrow(
      ...     optax.sgd(0.1, momentum=0.9), density=0.25, update_period=2,
      ...     update_stop=8, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"]}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["w"] != 0).sum())
      5
    """
    checks.transformation("inner", inner)
    cure = "Use 0.998 for an average over 500 updates."
    checks.number("momentum", momentum, 0, 1, ends="[)", static=True, cure=cure)
    checks.updates("update_stop", update_stop, 1, optional=True)
    if prune_rate is None and update_stop is not None:
        prune_rate = schedules.cosine_prune_rate(0.3, stop=update_stop)
    return unnamed(regrow)(
        inner,
        density=by_kernel(density),
        prune=prune.magnitude,
        redistribute=redistribute.none,
        grow=grow.momentum,
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=prune_rate,
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        momentum=float(momentum),
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        dense_until=dense_until,
        within=within,
    )


def by_kernel(density: Any) -> Any:
    """A fraction shared by Erdos-Renyi-kernel; a budget as it is."""
    checks.not_traced("density", density)
    if not is_number(density):
        return density
    if isinstance(density, jax.Array):
        density = np.asarray(density)[()]  # which a budget can be hashed with
    return unnamed(budgets.erdos_renyi_kernel)(density)._replace(named=False)
