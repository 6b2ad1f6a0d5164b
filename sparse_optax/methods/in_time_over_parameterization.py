"""ITOP: in-time over-parameterization (Liu et al, 2021)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import checks
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow as growth
from sparse_optax.regrowth import prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule
from sparse_optax.regrowth.start import resets_of
from sparse_optax.schedules.prune_rate import cosine_unless


@boundary("in_time_over_parameterization")
def in_time_over_parameterization(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
    grow: Rule = growth.random,
    prefer_unexplored: bool = False,
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    momentum: str | float = "auto",
    reset_moments: str | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
    dense_until: int | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Exchanges many weights at rare cycles, to visit as many as possible in training.

    Each period, layer by layer, with k_i = floor(p a_i) of a_i active weights:

    .. math:: \text{prune the } k_i \text{ smallest } |w|, \text{ grow } k_i, \quad
              R_s = \frac{\#\{\text{weights ever active}\}}{\#\{\text{weights}\}}

    New weights are random (the paper's SET-ITOP) or chosen by the gradient (RigL-ITOP).
    See ``masks.get_explored`` for R_s.

    .. note:: Last in the chain; it wraps the optimizer. Memory: one byte per weight for
      the mask, one bit with ``packed``, and one byte for the explored set. A cycle
      reads weights and scores a few dozen times, other steps once. Under
      ``optax.inject_hyperparams`` only ``prune_rate`` varies.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, or None behind an optimizer in a chain.
      density: Fraction of weights kept per layer, in (0, 1], or a budget; the paper's
        is ``budgets.erdos_renyi_kernel(density)``.
      update_period: Updates between two cycles, long enough to train new weights. At
        batch size 128 the paper has 1500 for random growth, 4000 for gradients.
      update_stop: No cycle from this many updates on. Give the length of training.
      prune_rate: p in [0, 1], or a schedule of the number of finished updates; None is
        the paper's cosine from 0.5 to 0.005 at ``update_stop``.
      grow: Growth rule: ``grow.random``, ``grow.gradient`` or ``grow.momentum``.
      prefer_unexplored: Whether weights that were never active come first. The paper
        only counts them.
      key: Integer seed or random key, for the first masks and the growth.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: First masks instead of random ones; ``density`` may then be left out.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      momentum: The momentum of ``grow.momentum``, see ``regrow``.
      reset_moments: See ``regrow``; None is ``"grown"`` if there is an ``inner``: the
        released code keeps the momentum of missing weights at zero.
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
      >>> from sparse_optax import masks, regrowth
      >>> tx = sparse_optax.in_time_over_parameterization(
      ...     optax.sgd(0.1), density=0.25, update_period=2, update_stop=8,
      ...     grow=regrowth.grow.gradient, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> opt_state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, opt_state = tx.update({"w": params["w"] - 2}, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["w"] != 0).sum()), masks.density(masks.get_explored(opt_state))
      (5, 0.4)

    References:
      Liu et al, `Do We Actually Need Dense Over-Parameterization?
      <https://arxiv.org/abs/2102.02887>`_, 2021.

    Source: ``sparselearning/core.py`` of the authors' In-Time-Over-Parameterization.
    Differences from it: a weight pruned and regrown in one cycle starts from zero.
    """
    checks.flag("prefer_unexplored", prefer_unexplored)
    growth.check_exact("grow", grow)
    return unnamed(regrow)(
        inner,
        density=density,
        prune=prune.magnitude,
        redistribute=redistribute.none,
        grow=unnamed(growth.unexplored)(grow, prefer=prefer_unexplored),
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=cosine_unless(prune_rate, 0.5, update_stop, floor=0.005),
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        momentum=momentum,
        reset_moments=resets_of(reset_moments, inner),
        packed=packed,
        pattern=pattern,
        dense_until=dense_until,
        within=within,
    )
