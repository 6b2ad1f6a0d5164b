"""Iterative and one-shot magnitude pruning (Han et al, 2015)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import schedules
from sparse_optax.leaves import Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, redistribute
from sparse_optax.regrowth import prune as prune_rules
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule
from sparse_optax.schedules.parts import check_whole


def iterative_magnitude(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    prunes: int,
    update_period: int,
    update_start: int = 0,
    prune: Rule = prune_rules.magnitude,
    key: Key = 0,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
    caller: str = "iterative_magnitude",
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes the same fraction of what is left n times, and trains in between.

    For a final density d, the k-th of n prunes removes the smallest weights of each
    layer, a fraction of

    .. math:: 1 - d^{1/n}, \quad \text{and leaves } d^{k/n}.

    A weight that is gone stays away. The n-th prune meets the target exactly.

    .. note::
      Last in the chain: wrap what you train with, usually on a trained network, and
      train on after the last prune. Memory: one byte a weight, one bit with
      ``packed``.

      Under ``optax.inject_hyperparams`` name all arguments in ``static_args``.

    Args:
      inner: The optimizer that is wrapped. None stands behind one in a chain.
      density: d, the fraction of weights kept in the end, in (0, 1], in every layer,
        or a budget.
      prunes: n, how often weights go, at least 1.
      update_period: Updates between two prunes; the first comes after as many.
      update_start: No prune before this many updates.
      prune: Which weights go: a rule that prunes what a budget asks for.
      key: Integer seed or random key; only a rule that draws needs one.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``; with N:M leave
        out ``density``.
      caller: The name that errors start with.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.iterative_magnitude(
      ...     optax.sgd(0.1), density=0.25, prunes=2, update_period=3)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> counts = []
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"]}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     counts.append(int((params["w"] != 0).sum()))
      >>> counts
      [20, 20, 20, 10, 10, 10, 5, 5]

    References:
      Han et al, `Learning both Weights and Connections for Efficient Neural Networks
      <https://arxiv.org/abs/1506.02626>`_, 2015; Mostafa and Wang, `Parameter
      Efficient Training of Deep Convolutional Neural Networks by Dynamic Sparse
      Reparameterization <https://arxiv.org/abs/1902.05967>`_, 2019 ("compressed
      sparse": n = 20, every 2 epochs, then 10 epochs).

    Differences from the papers: Han et al prune below a multiple of each layer's
    standard deviation, and lower learning rate and dropout by hand; here the number
    is given, and the optimizer is the caller's.
    """
    check_whole(caller, "prunes", prunes, least=1)
    first = schedules.first_due(update_period, update_start, caller=caller)
    last = first + (prunes - 1) * update_period
    return regrow(
        inner,
        density=density,
        prune=prune,
        redistribute=redistribute.none,
        grow=grow.magnitude,
        update_period=update_period,
        update_start=update_start,
        update_stop=last + 1,
        prune_rate=0.0,
        key=key,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
        budget=schedules.Towards(
            lambda end: schedules.geometric_density(
                1.0, end, first - update_period, last
            )
        ),
        caller=caller,
    )


def one_shot_magnitude(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    at: int,
    prune: Rule = prune_rules.magnitude,
    key: Key = 0,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prunes once, the smallest weights of each layer, and trains on.

    .. note:: Last in the chain; the prune opens the update after ``at`` of them.

    Args:
      inner: The optimizer that is wrapped. None stands behind one in a chain.
      density: Fraction of weights kept, in (0, 1], in every layer, or a budget.
      at: Number of updates after which weights go, at least 1. To prune a trained
        network before the first update, use ``masks.magnitude_masks``.
      prune: Which weights go: a rule that prunes what a budget asks for.
      key: Integer seed or random key; only a rule that draws needs one.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``; with N:M leave
        out ``density``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.one_shot_magnitude(optax.sgd(0.1), density=0.25, at=2)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> counts = []
      >>> for _ in range(4):
      ...     updates, state = tx.update({"w": params["w"]}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     counts.append(int((params["w"] != 0).sum()))
      >>> counts
      [20, 20, 5, 5]
    """
    check_whole("one_shot_magnitude", "at", at, least=1)
    return iterative_magnitude(
        inner,
        density=density,
        prunes=1,
        update_period=at,
        prune=prune,
        key=key,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
        caller="one_shot_magnitude",
    )
