"""A sparse backward pass: moves only the largest weights, for Top-KAST."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax import checks
from sparse_optax.budgets.resolve import (
    check_static,
    counts_of,
    is_number,
    total,
    unit_counts,
)
from sparse_optax.checks import unnamed
from sparse_optax.layers import is_hole
from sparse_optax.masks.make import Ranking, highest
from sparse_optax.masks.tree import apply, layers_of_masks, unpack
from sparse_optax.patterns import SINGLE, Pattern


def backward_set(
    inner: optax.GradientTransformation,
    density: Any,
    backward_density: Any,
    *,
    penalty: float,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern = SINGLE,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients and steps only in B: the masked weights A and the next largest.

    With D the fraction of weights in A, the inner optimizer gets

    .. math:: g + \lambda w \text{ in } A, \quad g + \tfrac{\lambda}{D} w
              \text{ in } B \setminus A, \quad 0 \text{ elsewhere,}

    and only the part of its step within B is used. Each update chooses B anew, by one
    selection per layer. It works inside ``regrow`` with ``hidden=True``, which passes
    A. ``backward_density`` is at least ``density``; N:M rounds it down.
    """
    inner = optax.with_extra_args_support(inner)
    check_static(backward_density, "backward_density")

    def too_small(least):
        allowed = f"at least `density`={least!r} in every layer"
        checks.fail("backward_density", backward_density, allowed, "Give 0.5.")

    fixed = pattern.density
    if fixed is not None and not (
        is_number(backward_density) and backward_density >= fixed
    ):
        too_small(fixed)
    forward = density if fixed is None else fixed

    def update(updates, state, params=None, **extra_args):
        regrow_masks = extra_args["regrow_masks"]
        layers = layers_of_masks(regrow_masks, params, stacked, pattern)
        kept = counts_of(forward, layers, params)
        moving = counts_of(backward_density, layers, params)
        if any(np.any(np.greater(a, b)) for a, b in zip(kept, moving, strict=True)):
            too_small(density)
        share = total(kept) / max(int(layers.sizes.sum()), 1)

        active = [unpack(m) for m in layers.pick(regrow_masks)]
        weights = layers.pick(params)
        # Active weights rank first, whatever their size.
        ahead = [
            (jnp.where(m, jnp.inf, w),) for m, w in zip(active, weights, strict=True)
        ]
        units = layers.at(backward_density)
        counts = unit_counts(moving, units)
        within = highest(Ranking(units, weights, counts), ahead, jnp.abs)

        flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
        for i, m, w in zip(layers.index, active, weights, strict=True):
            strength = jnp.where(m, penalty, penalty / share)
            flat[i] = flat[i] + (strength * w).astype(flat[i].dtype)
        updates = unnamed(apply)(within, jax.tree.unflatten(structure, flat))
        steps, state = inner.update(updates, state, params, **extra_args)
        return unnamed(apply)(within, steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
