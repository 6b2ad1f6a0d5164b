"""GraNet: gradual pruning with neuroregeneration (Liu et al, 2021)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import optax

from sparse_optax import checks, schedules
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import SINGLE, Pattern, pattern_of
from sparse_optax.regrowth import exchange, grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.start import resets_of
from sparse_optax.schedules.timing import check_density_stop


@boundary("granet")
def granet(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    initial_density: float = 1.0,
    update_period: int,
    update_stop: int,
    density_start: int = 0,
    density_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
    scope: str = "mixed",
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    reset_moments: str | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes gradually by magnitude and also exchanges weights at each cycle.

    The density falls from d_i to d_f between two counts of updates, t_0 and t_1:

    .. math:: d_t = d_f + (d_i - d_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    Each period the smallest weights of the network are pruned, as many as d_t asks for.
    Then every layer exchanges a fraction p of its weights, the smallest, for the
    missing ones of largest gradient. From ``density_stop`` on the number of weights is
    exactly that of ``density``.

    .. note:: Last in the chain; it wraps the optimizer. The gradient that reaches it
      must be dense. Memory: one byte per weight, one bit with ``packed``. A cycle reads
      weights and gradient a few dozen times, other steps once. Under
      ``optax.inject_hyperparams`` only ``prune_rate`` varies.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer. None, behind an optimizer in a chain, grows by the
        incoming update.
      density: d_f, the fraction of weights at the end, in (0, 1], or a budget, of which
        the total counts unless the scope is ``"layer"``. From a sparse start the
        paper has ``budgets.erdos_renyi_kernel(d_f)``.
      initial_density: d_i, in (0, 1]: 1 (a dense network) or 0.5 in the paper.
      update_period: Updates between two cycles; 1000 in the paper on CIFAR.
      update_stop: No cycle from this many updates on.
      density_start: t_0; no cycle comes before it.
      density_stop: t_1; None is the last cycle. The paper has 30 epochs of 100.
      prune_rate: p in [0, 1], or a schedule of the number of finished updates; None is
        the cosine from the paper's 0.5 to 0 at ``update_stop``.
      scope: ``"mixed"`` prunes in one pool over all layers, which empties no layer, and
        exchanges within layers, as the released code; ``"layer"`` does both within
        layers, to the counts of ``density``; ``"global"`` does both in one pool. With a
        ``pattern``, ``"mixed"`` is ``"layer"``.
      key: Integer seed or random key, for the first masks.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: First masks instead of random ones.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      reset_moments: See ``regrow``; None is ``"grown"`` if there is an ``inner``.
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
      >>> tx = sparse_optax.granet(
      ...     optax.sgd(0.1), density=0.25, update_period=2, update_stop=8, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"] - 2}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["w"] != 0).sum())
      5

    References:
      Liu et al, `Sparse Training via Boosting Pruning Plasticity with Neuroregeneration
      <https://arxiv.org/abs/2106.10404>`_, 2021.

    Source: ``CIFAR/sparselearning/core.py`` of the authors' GraNet. Differences: counts
    are exact, with the exchanged number rounded down. As there, and unlike the other
    methods here, a weight that is pruned and grown back in one cycle keeps its value;
    near density 1 most are.
    """
    cure = 'Use "mixed" as in the released code.'
    checks.choice("scope", scope, ("mixed", "layer", "global"), cure=cure)
    if scope == "mixed" and pattern_of(pattern) != SINGLE:
        scope = "layer"
    checks.updates("density_start", density_start, 0, traced=False)
    last = unnamed(schedules.last_due)(
        update_period, density_start, update_stop=update_stop
    )
    end = last if density_stop is None else density_stop
    cure = "Use 1.0 to start dense."
    checks.number("initial_density", initial_density, 0, 1, ends="(]", cure=cure)
    check_density_stop(end, last)

    def make(final):
        initial = float(np.float32(initial_density))  # as ``final`` is
        if not final <= initial <= 1:
            cure = "Raise it, or lower `density`." if initial < final else "Use 1.0."
            allowed = f"at least the density in the end, {final:g}, and at most 1"
            checks.fail("initial_density", initial_density, allowed, cure)
        return schedules.cubic_density(initial, final, density_start, end)

    rules = {
        "mixed": (exchange.within_layers, grow.gradient),
        "layer": (prune.magnitude, grow.gradient),
        "global": (prune.global_magnitude, grow.global_gradient),
    }[scope]
    return unnamed(regrow)(
        inner,
        density=density,
        prune=rules[0],
        redistribute=redistribute.none,
        grow=rules[1],
        update_period=update_period,
        update_start=density_start,
        update_stop=update_stop,
        prune_rate=prune_rate,
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        reset_moments=resets_of(reset_moments, inner),
        packed=packed,
        pattern=pattern,
        within=within,
        ramp=schedules.Towards(make),
        regrown="value",
    )
