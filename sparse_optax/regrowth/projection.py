"""Pulls weights towards their projection on a number of weights, for LC."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparse_optax.budgets.resolve import counts_of, total, unit_counts
from sparse_optax.layers import Layers, Where, check_real, is_hole, layers_of
from sparse_optax.masks.make import Ranking, highest
from sparse_optax.masks.tree import layers_of_masks
from sparse_optax.patterns import SINGLE, Pattern
from sparse_optax.regrowth.guard import run_if
from sparse_optax.selection.leaf import plus
from sparse_optax.selection.leaf import wide as as_wide


class ProjectionState(NamedTuple):
    """State of ``towards_projection``. Trees are like the parameters, with holes.

    Attributes:
      count: Finished updates. # shape=(), int32
      target: The projection theta, in float32 or wider.
      multipliers: The estimates lambda of the Lagrange multipliers, or ``()``.
    """

    count: jax.Array
    target: Any
    multipliers: Any


def towards_projection(
    density: Any,
    *,
    penalty: float,
    growth: float,
    update_period: int,
    update_stop: int,
    multipliers: bool,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern = SINGLE,
) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`\mu (w - \theta) - \lambda` to the gradient until ``update_stop``.

    It works inside ``regrow``, which passes the masks, with the same ``where``. See
    ``methods.learning_compression`` for the steps of theta, lambda and mu.
    """

    def init(params):
        layers = layers_of(params, where, stacked, pattern, may_be_empty=True)
        check_real(layers.leaves, "its projection")

        def zeros():
            leaves = layers.pick(params)
            return layers.rebuild(
                [jnp.zeros_like(x, dtype=as_wide(x.dtype)) for x in leaves]
            )

        return ProjectionState(
            jnp.zeros([], jnp.int32), zeros(), zeros() if multipliers else ()
        )

    def update(updates, state, params=None, **extra_args):
        layers = layers_of_masks(extra_args["regrow_masks"], params, stacked, pattern)
        weights = [x.astype(as_wide(x.dtype)) for x in layers.pick(params)]
        pool, counts = _limits(density, layers, params)
        step, after = state.count // update_period, state.count % update_period
        on = state.count < update_stop
        target, slopes = _project_if(
            jnp.logical_and(on, after == 0),
            (
                weights,
                list(layers.pick(state.target)),
                list(layers.pick(state.multipliers)) if multipliers else [],
                step,
                counts,
            ),
            how=_How(layers, pool, penalty, growth),
        )
        flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
        pull = jnp.where(on, _strength(penalty, growth, step), 0)
        for i, (w, s), t in zip(
            layers.index, _pairs(weights, slopes), target, strict=True
        ):
            more = pull * (w - t) - jnp.where(on, s, 0)
            flat[i] = plus(flat[i], more)
        return jax.tree.unflatten(structure, flat), ProjectionState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            target=layers.rebuild(target),
            multipliers=layers.rebuild(slopes) if multipliers else (),
        )

    return optax.GradientTransformationExtraArgs(init, update)


class _How(NamedTuple):
    """What is known when the projection is compiled."""

    layers: Layers
    pool: int | None  # weights that all layers keep together; None within layers
    penalty: float
    growth: float


def _limits(density: Any, layers: Layers, params: Any) -> tuple[int | None, list[Any]]:
    """Weights of the pool, or under a pattern units within layers, as in the cut."""
    counts = [] if layers.pattern.density else counts_of(density, layers, params)
    if layers.pattern == SINGLE:
        return total(counts), []
    return None, unit_counts(counts, layers)


def _strength(penalty: float, growth: float, step: jax.Array) -> jax.Array:
    """The penalty after so many compression steps."""
    # A power of floats: that of an integer outside of jit is compiled for each.
    return penalty * jnp.power(jnp.float32(growth), step.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="how")
def _project_if(due: jax.Array, operands: Any, *, how: _How) -> Any:
    """The next projection and multipliers if due, else the old ones. Jitted at module
    level, so that a step that is not jitted compiles it once. Taken as constants.
    """
    return run_if(
        due,
        functools.partial(_project, how=how),
        lambda operands: operands[1:3],
        lax.stop_gradient(operands),
    )


def _project(operands: Any, how: _How) -> Any:
    weights, _, slopes, step, counts = operands
    before = _strength(how.penalty, how.growth, step - 1)
    shifted = [w - s / before for w, s in _pairs(weights, slopes)]
    target = _projected(how.layers, shifted, how.pool, counts)
    # The first projection is that of the trained weights: no step before it.
    moved = [
        jnp.where(step > 0, s - before * (w - t), s)
        for (w, s), t in zip(_pairs(weights, slopes), target, strict=True)
    ]
    return target, moved if slopes else []


def _pairs(weights: Sequence[jax.Array], slopes: Sequence[jax.Array]) -> Any:
    """Weights and multipliers, which are zero if there are none."""
    return list(zip(weights, slopes or [jnp.zeros([])] * len(weights), strict=True))


def _projected(
    layers: Layers, values: Sequence[jax.Array], pool: int | None, counts: list[Any]
) -> list[jax.Array]:
    """The values of largest size, and zero elsewhere."""
    if not layers.index:
        return []
    limit: Any = counts if pool is None else pool
    wanted = Ranking(layers, tuple(values), limit)
    masks = layers.pick(highest(wanted, [(v,) for v in values], jnp.abs))
    return [jnp.where(m, v, 0) for m, v in zip(masks, values, strict=True)]
