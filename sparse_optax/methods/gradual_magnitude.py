"""Gradual magnitude pruning: to prune, or not to prune (Zhu and Gupta, 2017)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
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


@boundary("gradual_magnitude")
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
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes a dense network while it trains, fast at first and slowly at the end.

    At each cycle, from the first t_0 to the last t_1, the smallest weights of each
    layer are pruned until its density is

    .. math:: d_t = d_f + (d_i - d_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    This is the paper's formula, there for the sparsity s = 1 - d. Pruned weights stay
    zero. The last cycle meets the target exactly.

    .. note:: Last in the chain; it wraps the optimizer. Memory: one byte per weight,
      one bit with ``packed``. All arguments are static under
      ``optax.inject_hyperparams``.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, or None behind an optimizer in a chain.
      density: d_f, the final fraction of weights per layer, in (0, 1], or a budget.
      update_period: Updates between two prunes.
      update_start: No prune before this many updates; until then all weights train.
      update_stop: No prune from this many updates on; train a third or more after it.
      initial_density: d_i, the density that the first prune leaves, in (0, 1].
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
      ValueError: If an argument does not fit, or no cycle would come.

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
      Zhu and Gupta, `To prune, or not to prune <https://arxiv.org/abs/1710.01878>`_,
      2017.

    Differences from the paper: t_1 is a count at which a prune comes, so that the ramp
    always reaches its target; counts are exact, and of equal weights the first stays.
    Released code evaluates the ramp one step later.
    """
    first = unnamed(schedules.first_due)(update_period, update_start)
    last = unnamed(schedules.last_due)(
        update_period, update_start, update_stop=update_stop
    )

    cure = "Use 1.0 to start dense."
    checks.number("initial_density", initial_density, 0, 1, ends="(]", cure=cure)

    def make(end):
        initial = checks.concrete(initial_density)
        if checks.known(initial) and end > np.float32(initial):
            cure = "Raise it, or lower `density`."
            allowed = f"at least the density in the end, {end:g}"
            checks.fail("initial_density", initial_density, allowed, cure)
        if checks.known(initial):
            initial = max(initial, end)  # which is rounded to float32
        ramp = schedules.cubic_density(initial, end, min(first, last - 1), last)
        return lambda count: jnp.where(count < first, 1.0, ramp(count))

    return unnamed(regrow)(
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
        within=within,
        ramp=schedules.Towards(make),
    )
