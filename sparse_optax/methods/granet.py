"""GraNet: gradual pruning with neuroregeneration (Liu et al, 2021)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from sparse_optax import schedules
from sparse_optax.leaves import PyTree, Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow


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
    scope: str = "layer",
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    reset_moments: str = "grown",
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradual magnitude pruning whose cycles also exchange weights.

    The density falls from d_i to d_f between two counts of updates t_0 and t_1:

    .. math::
        d_t = d_f + (d_i - d_f) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3

    Each period the smallest weights go, as many as d_t asks for and p times what is
    left, and p times what is left comes back where the gradient is largest. From
    ``density_stop`` on the number of weights is exactly that of ``density``.

    .. note::
      Last in the chain: wrap what you train with; the gradient that reaches it must
      be dense. Memory: one byte a weight, one bit with ``packed``. A cycle reads
      weights and gradient a few dozen times, once a period; other steps cost one pass.
      On a mesh, a cycle needs small all-reduces.

      Under ``optax.inject_hyperparams`` only ``prune_rate`` may be injected; name
      all others in ``static_args``.

    Args:
      inner: The optimizer that is wrapped. None, behind an optimizer in a chain, grows
        by the incoming update; it needs ``reset_moments="none"``.
      density: d_f, the fraction of weights kept in the end, in (0, 1], in every layer,
        or a budget with a density; the paper's is ``budgets.erdos_renyi_kernel(d_f)``.
      initial_density: d_i, in (0, 1]; 1 is a dense network, 0.5 the paper's other.
      update_period: Updates between two cycles; 1000 in the paper on CIFAR.
      update_stop: No cycle from this many updates on.
      density_start: t_0, before which no cycle comes.
      density_stop: t_1; None is the last cycle. The paper takes 30 epochs of 100.
      prune_rate: p in [0, 1], or a schedule of the number of finished updates; None
        is the cosine from the paper's 0.5 to 0 at ``update_stop``.
      scope: ``"layer"`` prunes and grows within layers, to the counts of ``density``;
        ``"global"`` ranks all layers as one pool, to its total, and leaves each layer
        at least one weight.
      key: Integer seed or random key, for the first masks.
      masks: First masks instead of random ones.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      reset_moments: ``"grown"`` zeroes the inner optimizer's moments of weights just
        grown, whatever the optimizer; ``"none"`` leaves them.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``; with N:M leave
        out ``density``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

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

    Differences from the released code: pruning and exchange are one prune and one
    growth. As there, and unlike the other methods here, a weight that is pruned and
    grown back in one cycle keeps its value: near density 1 most are.
    """

    def fail(name, value, allowed, cure):
        raise ValueError(f"granet: `{name}` must be {allowed}; got {value!r}. {cure}")

    if scope not in ("layer", "global"):
        fail("scope", scope, '"layer" or "global"', 'Use "layer" as in the paper.')
    final = getattr(density, "density", density)
    if density is None and isinstance(pattern, Pattern) and pattern.m:
        final = pattern.n / pattern.m
    if not isinstance(final, float | int) or isinstance(final, bool):
        cure = "For another budget call regrow with budget=."
        fail("density", density, "in (0, 1] or a budget with a density", cure)
    last = schedules.last_due(
        update_period, density_start, stop=update_stop, caller="granet"
    )
    end = last if density_stop is None else density_stop
    if end > last:
        cure = f"No cycle comes after {last}: lower it or raise update_stop."
        fail("density_stop", density_stop, f"at most {last}", cure)
    ramp = schedules.cubic_density(initial_density, final, density_start, end)
    pools = prune.global_magnitude, grow.global_gradient
    rules = pools if scope == "global" else (prune.magnitude, grow.gradient)
    return regrow(
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
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        # In the end exactly what `density` asks for, below its rounded fraction.
        budget=lambda count: jnp.where(jnp.asarray(count) >= end, 0.0, ramp(count)),
        regrown="value",
        caller="granet",
    )
