"""Iterative and one-shot magnitude pruning (Han et al, 2015)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import checks, schedules
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, redistribute
from sparse_optax.regrowth import prune as prune_rules
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule


@boundary("iterative_magnitude")
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
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes the same fraction of the remaining weights n times and trains between.

    For a final density d, each of n prunes removes the smallest weights of each layer;
    the k-th leaves the share

    .. math:: d_k = d^{k/n}, \quad k = 1, \dots, n

    so that each takes a fraction of :math:`1 - d^{1/n}` of what is left. Pruned weights
    stay zero. The n-th prune meets the target exactly.

    .. note:: Last in the chain; it wraps the optimizer, usually for a trained network.
      Continue to train after the last prune. Memory: one byte per weight, one bit with
      ``packed``. All arguments are static under ``optax.inject_hyperparams``.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, or None behind an optimizer in a chain.
      density: d, the fraction of weights per layer at the end, in (0, 1], or a budget.
      prunes: n, the number of prunes, at least 1.
      update_period: Updates between two prunes, and before the first.
      update_start: No prune before this many updates.
      prune: Which weights are pruned; of what a rule leaves above the target, the
        smallest.
      key: Integer seed or random key, for rules that draw random numbers.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      packed: Stores one bit per weight.
      pattern: See ``regrow``; leave out ``density`` if it fixes it.
      within: Masks of the weights that it may use; the others stay as they are, bit
        for bit, see ``regrow``. None is all.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

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
      Han et al, `Learning both Weights and Connections
      <https://arxiv.org/abs/1506.02626>`_, 2015. Mostafa and Wang, 2019, see
      ``dynamic_sparse`` ("compressed sparse": n = 20, every 2 epochs, then 10 epochs).

    Differences from the papers: Han et al prune below a multiple of each layer's
    standard deviation, and lower learning rate and dropout by hand; here the number is
    given, and the optimizer is the caller's.
    """
    checks.whole("prunes", prunes, 1, static=True, cure="Give 20, for instance.")
    first = unnamed(schedules.first_due)(update_period, update_start)
    update_period = int(update_period)
    last = first + (int(prunes) - 1) * update_period
    if last >= checks.MOST_UPDATES:
        allowed = f"a number whose last prune comes before {checks.MOST_UPDATES}"
        cure = f"Prunes end at {last}: give fewer, or shorten `update_period`."
        checks.fail("prunes", prunes, allowed, cure)
    return unnamed(regrow)(
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
        within=within,
        ramp=schedules.Towards(
            lambda end: schedules.geometric_density(
                1.0, end, first - update_period, last
            )
        ),
    )


@boundary("one_shot_magnitude")
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
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes the smallest weights of each layer once; training continues.

    A layer of N weights keeps the K of the largest size, the number for its density d;
    after the prune

    .. math:: m_i = [\, |w_i| \text{ is among the } K \text{ largest} \,], \quad
              w_i \leftarrow m_i w_i, \quad K \approx d N

    with exactly K also where sizes are equal. What is pruned stays zero.

    .. note:: Last in the chain; the prune comes at the start of update ``at + 1``.
      Memory: one byte per weight, one bit with ``packed``. The prune is one selection;
      all other updates cost what they cost under fixed masks.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, or None behind an optimizer in a chain.
      density: Fraction of weights kept per layer, in (0, 1], or a budget.
      at: Number of updates before the prune, at least 1. For a trained network, before
        the first update, use ``masks.magnitude_masks``.
      prune: Which weights are pruned; of what a rule leaves above the target, the
        smallest.
      key: Integer seed or random key, for rules that draw random numbers.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      packed: Stores one bit per weight.
      pattern: See ``regrow``; leave out ``density`` if it fixes it.
      within: Masks of the weights that it may use; the others stay as they are, bit
        for bit, see ``regrow``. None is all.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

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

    References:
      Han et al, `Learning both Weights and Connections
      <https://arxiv.org/abs/1506.02626>`_, 2015, where one prune and training after it
      is the plain form beside the iterative one.

    Differences from the paper: Han et al prune below a multiple of each layer's
    standard deviation, and retrain with a lower learning rate and dropout; here the
    number is given, and the optimizer is the caller's.
    """
    checks.updates("at", at, 1, traced=False)
    return unnamed(iterative_magnitude)(
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
        within=within,
    )
