"""A sparse backward pass: moves only the largest weights, for Top-KAST."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax import checks, selection
from sparse_optax.budgets.resolve import (
    check_static,
    counts_of,
    is_number,
    total,
    unit_counts,
)
from sparse_optax.checks import unnamed
from sparse_optax.layers import Layers, Where, is_hole, layers_of
from sparse_optax.masks.make import follow_layers, top_of_layers
from sparse_optax.masks.tree import apply, layers_of_masks, unpack
from sparse_optax.patterns import SINGLE, Pattern


class BackwardState(NamedTuple):
    """State of ``backward_set``.

    Attributes:
      inner_state: State of the wrapped optimizer.
      near: Where the last search for B ended, ``()`` if the pattern fixes the
        density.
    """

    inner_state: Any
    near: Any


def backward_set(
    inner: optax.GradientTransformation,
    density: Any,
    backward_density: Any,
    *,
    penalty: float,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern = SINGLE,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients and steps only in B: the masked weights A and the next largest.

    With D the fraction of weights in A, the inner optimizer gets

    .. math:: g + \lambda w \text{ in } A, \quad g + \tfrac{\lambda}{D} w
              \text{ in } B \setminus A, \quad 0 \text{ elsewhere,}

    and only the part of its step within B is used. Each update chooses B anew, by one
    selection per layer, which starts where the last one ended. It works inside
    ``regrow`` with ``hidden=True``, which passes A, and with the same ``where``.
    ``backward_density`` is at least ``density``; a pattern that fixes the
    density rounds it down.
    """
    inner = optax.with_extra_args_support(inner)
    check_static(backward_density, "backward_density")

    def too_small(least):
        allowed = f"at least `density`={least!r} in every layer"
        checks.fail("backward_density", backward_density, allowed, "Give 0.5.")

    fixed = pattern.density
    if fixed is not None and not (
        is_number(backward_density) and checks.concrete(backward_density) >= fixed
    ):
        too_small(fixed)

    def init(params):
        layers = layers_of(params, where, stacked, pattern, may_be_empty=True)
        near: Any = ()
        if fixed is None:
            near = selection.nowhere(layers.pick(params), len(layers.units.sizes))
        return BackwardState(inner.init(params), near)

    def update(updates, state, params=None, **extra_args):
        regrow_masks = extra_args["regrow_masks"]
        layers = layers_of_masks(regrow_masks, params, stacked, pattern)
        units = layers.at(backward_density)
        if fixed is None:
            kept = counts_of(density, layers, params)
            moving = counts_of(backward_density, layers, params)
            if any(np.any(np.greater(a, b)) for a, b in zip(kept, moving, strict=True)):
                too_small(density)
        else:  # the patterns say it
            kept, moving = unit_counts([], layers), []
        size = int(layers.sizes.sum())
        share = total(kept) / size if size else 1.0

        active = [unpack(m) for m in layers.pick(regrow_masks)]
        weights = layers.pick(params)
        within, near = _largest(
            units, weights, active, unit_counts(moving, units), state.near
        )

        flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
        for i, m, w in zip(layers.index, active, weights, strict=True):
            strength = jnp.where(m, penalty, penalty / share)
            flat[i] = flat[i] + (strength * w).astype(flat[i].dtype)
        updates = unnamed(apply)(within, jax.tree.unflatten(structure, flat))
        steps, inner_state = inner.update(
            updates, state.inner_state, params, **extra_args
        )
        return unnamed(apply)(within, steps), BackwardState(inner_state, near)

    return optax.GradientTransformationExtraArgs(init, update)


def _largest(
    layers: Layers,
    weights: Sequence[jax.Array],
    active: Sequence[jax.Array],
    counts: Sequence[Any],
    near: Any,
) -> tuple[Any, Any]:
    """Masks of the active weights and the next largest, and the next ``near``."""
    arrays = list(zip(weights, active, strict=True))
    operands, score = layers.operands(arrays, _active_first)
    axes = layers.units.axes
    if isinstance(near, selection.Near):
        kept, near, _ = follow_layers(operands, counts, axes, score or jnp.abs, near)
    else:
        kept = top_of_layers(operands, counts, axes, score)
    return layers.rebuild(layers.spread(kept, weights)), near


def _active_first(weight: jax.Array, mask: jax.Array) -> jax.Array:
    # Active weights rank first, whatever their size.
    return jnp.where(mask, jnp.inf, jnp.abs(weight))
