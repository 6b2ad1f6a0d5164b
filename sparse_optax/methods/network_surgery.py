"""Dynamic network surgery: pruning and splicing (Guo, Yao and Chen, 2016)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import schedules
from sparse_optax.leaves import Where
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow


def network_surgery(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    budget: optax.Schedule | schedules.Towards | None = None,
    ratio: float = 0.9 / 1.1,
    gamma: float = 1e-4,
    power: float = 1.0,
    update_stop: int | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes and splices: what was cut trains on, and returns when it has grown.

    All weights take the step of the dense gradient, missing ones behind a zero. With
    probability :math:`(1 + \gamma t)^{-power}` before an update, the mask becomes

    .. math::
        T = [\, |w| \text{ where } T, \; \tfrac{a}{b} |w| \text{ elsewhere, among the }
        k \text{ largest of the layer} \,]

    so that a weight leaves only when it has fallen clearly below one that waits, and
    comes back only when it has risen clearly above one that is there.

    .. note::
      Last in the chain, around the whole optimizer: weight decay inside it reaches
      hidden weights too. Memory: one more copy of the weights, and a byte or, with
      ``packed``, a bit each. Cost: one selection an update.

      Under ``optax.inject_hyperparams`` name all arguments in ``static_args``.

    Args:
      inner: The optimizer that is wrapped.
      density: Fraction of weights kept, in (0, 1], in every layer, or a budget. Left
        out with ``patterns.n_m``.
      budget: A schedule of the density that ends at ``density``, or None: the weights
        kept are as many from the start, first the largest.
      ratio: a / b, in (0, 1], how much a missing weight counts.
      gamma: Of the probability, at least 0; 0 is every update.
      power: Of the probability, at least 0.
      update_stop: No mask changes from this many updates on; None never stops. A
        ``budget`` must have ended by then.
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
      >>> tx = sparse_optax.network_surgery(optax.sgd(0.1), density=0.25)
      >>> params = {"w": jnp.arange(1.0, 9.0).reshape(2, 4)}
      >>> state = tx.init(params)
      >>> for _ in range(9):  # the target of training: the first two weights
      ...     grads = {"w": params["w"] - jnp.array([[20.0, 20, 0, 0], [0, 0, 0, 0]])}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> (params["w"] != 0).tolist()
      [[True, True, False, False], [False, False, False, False]]

    References:
      Guo, Yao and Chen, `Dynamic Network Surgery for Efficient DNNs
      <https://arxiv.org/abs/1608.04493>`_, 2016.

    Differences from the paper: a layer keeps a given number of weights, exactly,
    where the paper has two thresholds (0.9 and 1.1 times the mean plus c standard
    deviations of |w| at the start in the released code, of kernel and bias together, of
    which both are pruned; here biases stay dense) and takes what they leave:
    for those ``regrow(density=1.0, prune=prune.below_spread(c),
    grow=grow.above_spread(c), hidden=True, prune_rate=0.0, update_period=1, ...)``.
    The coin is the same in all runs. Where a budget falls the smallest go without
    a coin, so that the number holds at every update.
    """
    return regrow(
        inner,
        density=density,
        prune=prune.outranked(ratio, gamma=gamma, power=power),
        redistribute=redistribute.none,
        grow=grow.magnitude,
        update_period=1,
        update_stop=update_stop,
        prune_rate=0.0,
        key=0,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
        budget=budget,
        hidden=True,
        caller="network_surgery",
    )
