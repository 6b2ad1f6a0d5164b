"""Gradual magnitude pruning: to prune, or not to prune (Zhu and Gupta, 2017)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from sparse_optax import schedules
from sparse_optax.leaves import Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, redistribute
from sparse_optax.regrowth import prune as prune_rules
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule


def gradual_magnitude(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    update_period: int,
    update_start: int = 0,
    update_stop: int,
    initial_density: float = 1.0,
    prune: Rule = prune_rules.magnitude,
    key: Key = 0,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes a dense network while it trains, fast at first and gently at the end.

    Each period from t_0 to t_1, the first and the last at which a cycle comes, the
    smallest weights of each layer go until its density is

    .. math::
        d_t = d_f + (d_i - d_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    in terms of sparsity s = 1 - d the paper's formula. A weight that is gone stays
    away. The target is met exactly, at the last cycle.

    .. note::
      Last in the chain: wrap what you train with. Each prune opens an update, none
      follows the last. Memory: one byte a weight, one bit with ``packed``.

      Under ``optax.inject_hyperparams`` name all arguments in ``static_args``.

    Args:
      inner: The optimizer that is wrapped. None stands behind one in a chain.
      density: d_f, the fraction of weights kept in the end, in (0, 1], in every
        layer, or a budget.
      update_period: Updates between two prunes.
      update_start: No prune before this many updates; until then all weights train.
      update_stop: No prune from this many updates on. A third of training or more
        should follow.
      initial_density: d_i, the density that the first prune leaves, in (0, 1].
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
      ValueError: If an argument is out of its range or does not fit the parameters,
        or no cycle would come between ``update_start`` and ``update_stop``.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.gradual_magnitude(
      ...     optax.sgd(0.1), density=0.25, update_period=2, update_stop=8)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> counts = []
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"]}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     counts.append(int((params["w"] != 0).sum()))
      >>> counts
      [20, 20, 20, 20, 6, 6, 5, 5]

    References:
      Zhu and Gupta, `To prune, or not to prune: exploring the efficacy of pruning for
      model compression <https://arxiv.org/abs/1710.01878>`_, 2017.

    Differences from the paper: t_1 is a count at which a prune comes, so that the
    ramp cannot end short of its target; counts are exact, and of equal weights the
    first stays. Released code evaluates the ramp one step later.
    """
    name = "gradual_magnitude"
    first = schedules.first_due(update_period, update_start, caller=name)
    last = schedules.last_due(
        update_period, update_start, stop=update_stop, caller=name
    )

    def make(end):
        ramp = schedules.cubic_density(initial_density, end, min(first, last - 1), last)
        return lambda count: jnp.where(count < first, 1.0, ramp(count))

    return regrow(
        inner,
        density=density,
        prune=prune,
        redistribute=redistribute.none,
        grow=grow.magnitude,
        update_period=update_period,
        update_start=update_start,
        update_stop=update_stop,
        prune_rate=0.0,
        key=key,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
        budget=schedules.Towards(make),
        caller=name,
    )
