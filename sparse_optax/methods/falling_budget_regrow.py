"""A budget that falls from a sparse start: a recipe of this library, of no paper."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from sparse_optax import checks, schedules
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.methods.long_average_regrow import by_kernel
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.schedules.timing import check_density_stop


@boundary("falling_budget_regrow")
def falling_budget_regrow(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    initial_factor: float = 5.0,
    update_period: int,
    update_stop: int,
    density_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    momentum: str | float = 0.9995,
    reset_moments: str = "none",
    packed: bool = False,
    pattern: Pattern | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse from the start, with some times the final weights at first; no paper's.

    With d the density and f the initial factor, the density falls until t_1:

    .. math:: d_t = d + \left(\min(f d, 1) - d\right) \left(1 - t / t_1\right)^3

    Each period the smallest weights of each layer are pruned, as many as d_t asks for
    and a fraction p of the others. That fraction grows back where a long average of
    the gradient is largest, that of ``long_average_regrow``. A network that is never
    dense has more places to find its weights in.

    .. note:: Last in the chain; it wraps the optimizer. The gradient that reaches it
      must be dense. Memory: four bytes per weight for the average and one for the mask,
      one bit with ``packed``. A cycle reads weights and average a few dozen times,
      other steps once. Under ``optax.inject_hyperparams`` only ``prune_rate`` varies.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer.
      density: d, the fraction of weights at the end, in (0, 1], shared among the layers
        by ``budgets.erdos_renyi_kernel``, or a budget.
      initial_factor: f, at least 1.
      update_period: Updates between two cycles, about an epoch.
      update_stop: No cycle from this many updates on. Give the length of training.
      density_stop: t_1; None is the last cycle within 60% of ``update_stop``.
      prune_rate: p in [0, 1], or a schedule of the number of finished updates; None is
        the cosine from 0.3 to 0 at ``update_stop``.
      key: Integer seed or random key, for the first masks.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: First masks instead of random ones. The first cycle brings them to the
        number of weights of the ramp, whatever theirs is.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      momentum: beta of the average, in [0, 1): 1 - 1 / n averages over about n updates;
        the default is for 2,000, some epochs. ``"auto"`` reads the momentum of
        ``inner`` in its place, see ``regrow``.
      reset_moments: See ``regrow``.
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
      >>> tx = sparse_optax.falling_budget_regrow(
      ...     optax.sgd(0.1, momentum=0.9), density=0.1, update_period=2,
      ...     update_stop=10, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state, counts = tx.init(params), []
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"]}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     counts.append(sparse_optax.masks.count(sparse_optax.get_masks(state)))
      >>> counts
      [10, 10, 4, 4, 2, 2, 2, 2]
    """
    checks.transformation("inner", inner)
    cure = "Give 5.0 for five times the weights at first."
    checks.number("initial_factor", initial_factor, 1, static=True, cure=cure)
    if momentum != "auto":
        cure = "Use 0.9995 for an average over 2,000 updates, or 'auto'."
        checks.number("momentum", momentum, 0, 1, ends="[)", static=True, cure=cure)
    last = unnamed(schedules.last_due)(update_period, 0, update_stop=update_stop)
    end = density_stop
    if end is None:
        period = int(update_period)
        end = max(3 * int(update_stop) // 5 // period, 1) * period
        end = min(end, last)
    check_density_stop(end, last)

    def make(final: float) -> optax.Schedule:
        initial = float(np.float32(min(1.0, initial_factor * final)))
        return schedules.cubic_density(max(initial, final), final, 0, end)

    if prune_rate is None:
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
        momentum=momentum,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        within=within,
        ramp=schedules.Towards(make),
    )
