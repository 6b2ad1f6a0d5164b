"""SET: sparse evolutionary training (Mocanu et al, 2018)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow


@boundary("sparse_evolutionary")
def sparse_evolutionary(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule = 0.3,
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
    r"""Rewires at random at constant sparsity, layer by layer.

    Each period, in a layer with a+ positive and a- negative active weights:

    .. math:: \text{prune } \lfloor \zeta a^+ \rfloor \text{ smallest positive and }
              \lfloor \zeta a^- \rfloor \text{ largest negative weights,}
              \text{ grow as many at random}

    Weights just pruned may grow again. Every layer keeps its number of weights.

    .. note:: Last in the chain; it wraps the optimizer. Memory: one byte per weight,
      one bit with ``packed``. A cycle reads weights and random bits a few dozen times,
      other steps once. Under ``optax.inject_hyperparams`` only ``prune_rate`` varies.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, or None behind an optimizer in a chain.
      density: Fraction of weights kept per layer, in (0, 1], or a budget; the paper's
        is ``budgets.erdos_renyi(density)``.
      update_period: Updates between two cycles, the paper's epoch.
      update_stop: No cycle from this many updates on; None never stops.
      prune_rate: zeta, in [0, 1], or a schedule of the number of finished updates.
      key: Integer seed or random key, for the first masks and the growth.
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
      >>> tx = sparse_optax.sparse_evolutionary(
      ...     optax.sgd(0.1), density=sparse_optax.budgets.erdos_renyi(0.25),
      ...     update_period=2, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"] - 2}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["w"] != 0).sum())
      5

    References:
      Mocanu et al, `Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity <https://arxiv.org/abs/1707.04780>`_, 2018.

    Differences from the paper: the first masks have exact counts, not independent
    random draws, and an active weight of exactly zero counts as positive. Differences
    from the released code: a weight pruned and regrown in one cycle starts from zero.
    The SET of the sparse momentum code is another method, which prunes one sign only.
    The wrapped optimizer sees the dense gradient: any momentum also collects at missing
    weights and acts when they grow, unless ``reset_moments="grown"``.
    """
    return unnamed(regrow)(
        inner,
        density=density,
        prune=prune.two_sided,
        redistribute=redistribute.none,
        grow=grow.random,
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=prune_rate,
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        dense_until=dense_until,
        within=within,
    )
