"""ITOP: in-time over-parameterization (Liu et al, 2021)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import schedules
from sparse_optax.leaves import PyTree, Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow as growth
from sparse_optax.regrowth import prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule


def in_time_over_parameterization(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
    grow: Rule = growth.random,
    prefer_unexplored: bool = True,
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    momentum: str | float = "auto",
    reset_moments: str = "none",
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rare, large exchanges that visit as many weights as possible while training.

    Each period, layer by layer, with k_i = floor(p a_i) of a_i active weights:

    .. math::
        \text{prune the } k_i \text{ smallest } |w|, \text{ grow } k_i, \quad
        R_s = \frac{\#\{\text{weights ever active}\}}{\#\{\text{weights}\}}

    New weights come at random (the paper's SET-ITOP) or by the gradient (RigL-ITOP);
    first those that were never active. ``state.get_explored`` reads the set behind R_s.

    .. note::
      Last in the chain: wrap what you train with. Memory: one byte a weight for the
      mask, one bit with ``packed``, and one byte for what was explored. A cycle reads
      weights and scores a few dozen times, once a period; other steps cost one pass.
      On a mesh, a cycle needs small all-reduces.

      Under ``optax.inject_hyperparams`` only ``prune_rate`` may be injected; name
      all others in ``static_args``.

    Args:
      inner: The optimizer that is wrapped, or None behind one in a chain.
      density: Fraction of weights kept, in (0, 1], in every layer, or a budget; the
        paper's is ``budgets.erdos_renyi_kernel(density)``. May be left out where
        ``masks`` are given.
      update_period: Updates between two cycles: long ones let a weight prove itself.
        At batch size 128 the paper takes 1500 for random growth, 4000 for gradients.
      update_stop: No cycle from this many updates on. Give the length of training.
      prune_rate: p in [0, 1], or a schedule of the number of finished updates; None
        is the paper's cosine from 0.5 to 0.005 at ``update_stop``.
      grow: How to choose new weights: ``grow.random``, ``grow.gradient`` or
        ``grow.momentum``.
      prefer_unexplored: Whether weights that were never active come first. False is
        the paper's, which only counts them.
      key: Integer seed or random key, for the first masks and the growth.
      masks: First masks instead of random ones; their count is the budget.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      momentum: Where ``grow.momentum`` finds its momentum, see ``regrow``.
      reset_moments: ``"none"``, or ``"grown"`` to zero the inner optimizer's moments
        of weights just grown, as RigL does.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> from sparse_optax import masks, regrowth, state
      >>> tx = sparse_optax.in_time_over_parameterization(
      ...     optax.sgd(0.1), density=0.25, update_period=2, update_stop=8,
      ...     grow=regrowth.grow.gradient, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> opt_state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, opt_state = tx.update({"w": params["w"] - 2}, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["w"] != 0).sum()), masks.density(state.get_explored(opt_state))
      (5, 0.4)

    References:
      Liu et al, `Do We Actually Need Dense Over-Parameterization? In-Time
      Over-Parameterization in Sparse Training <https://arxiv.org/abs/2102.02887>`_,
      2021.

    Differences from the paper: unexplored weights come first, unless told otherwise;
    and a weight pruned and regrown in one cycle starts from zero. The wrapped optimizer
    sees the dense gradient: where it has momentum, that of missing weights gathers too
    and acts once they have grown, unless ``reset_moments="grown"``.
    """
    return regrow(
        inner,
        density=density,
        prune=prune.magnitude,
        redistribute=redistribute.none,
        grow=growth.unexplored(grow, prefer=prefer_unexplored),
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=schedules.cosine_unless(prune_rate, 0.5, update_stop, floor=0.005),
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        momentum=momentum,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        caller="in_time_over_parameterization",
    )
