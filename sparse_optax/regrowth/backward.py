"""A sparse backward pass: an optimizer that moves the largest weights only."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax import budgets, mask_trees, masks
from sparse_optax.leaves import is_hole
from sparse_optax.patterns import Pattern


def backward_set(
    inner: optax.GradientTransformation,
    density: Any,
    backward_density: Any,
    *,
    penalty: float,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
    caller: str,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradients and steps within B, the masked weights A and the next largest.

    With D the share of all weights that A holds, the inner optimizer gets

    .. math::
        g + \lambda w \text{ in } A, \quad g + \tfrac{\lambda}{D} w
        \text{ in } B \setminus A, \quad 0 \text{ elsewhere,}

    and of its step only what lies in B is taken. B is chosen anew at each update.

    .. note::
      Inside ``regrow`` with ``hidden=True``, from which it learns A. Each update
      makes a selection in every layer: a few passes over the weights, on a mesh with
      small all-reduces, and a temporary mask, one byte a weight.

    Args:
      inner: The optimizer.
      density: The fraction in A, in each layer, or a budget; None with N:M.
      backward_density: The fraction in B, or a budget, at least that of A in every
        layer; of each group of N:M, rounded down.
      penalty: :math:`\lambda`, at least 0.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      pattern: Which weights stand and fall together.
      caller: The name that errors start with.

    Returns:
      A transformation with the state of ``inner``.

    Raises:
      ValueError: If B would be smaller than A.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax.regrowth.backward import backward_set
      >>> tx = backward_set(optax.sgd(1.0), 0.25, 0.5, penalty=0.0, caller="doc")
      >>> params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
      >>> a = {"w": jnp.array([[True, False, False, False]])}
      >>> step, _ = tx.update(params, tx.init(params), params, regrow_masks=a)
      >>> step["w"].tolist()
      [[-4.0, -3.0, 0.0, 0.0]]

    References:
      Jayakumar et al, `Top-KAST: Top-K Always Sparse Training
      <https://arxiv.org/abs/2106.03517>`_, 2020.
    """
    inner = optax.with_extra_args_support(inner)

    def fail(least):
        raise ValueError(
            f"{caller}: `backward_density` must be at least `density`={least!r} "
            f"in every layer; got {backward_density!r}. Give 0.5, for instance."
        )

    plain = isinstance(backward_density, float | int)
    if isinstance(backward_density, str) or (plain and not 0 < backward_density <= 1):
        raise ValueError(
            f"{caller}: `backward_density` must be in (0, 1], or a budget; got "
            f"{backward_density!r}. Give twice the density, for instance."
        )
    wider, fraction = pattern, density
    if pattern is not None and pattern.m:
        fraction = least = pattern.n / pattern.m
        if not isinstance(backward_density, float | int) or backward_density < least:
            fail(least)
        wider = pattern._replace(n=math.floor(min(backward_density, 1) * pattern.m))

    def update(updates, state, params=None, **extra_args):
        regrow_masks = extra_args["regrow_masks"]
        over = functools.partial(jax.tree.map, is_leaf=mask_trees.is_mask)
        where = over(lambda m: not is_hole(m), regrow_masks)
        layers: Any = {"where": where, "stacked": stacked, "caller": caller}
        fractions = fraction, backward_density, 1.0
        kept, moving, every = (budgets.resolve(d, params, **layers) for d in fractions)
        pairs = zip(jax.tree.leaves(kept), jax.tree.leaves(moving), strict=True)
        if any(np.any(np.greater(a, b)) for a, b in pairs):
            fail(density)
        share = budgets.total(kept) / max(budgets.total(every), 1)

        def ahead(m, w):
            return w if is_hole(m) else jnp.where(masks.unpack(m), jnp.inf, w)

        def penalised(m, g, w):
            if is_hole(m):
                return g
            factor = jnp.where(masks.unpack(m), penalty, penalty / share)
            return g + (factor * w).astype(g.dtype)

        within = masks.magnitude_masks(
            over(ahead, regrow_masks, params),
            moving,
            scope="leaf",
            where=where,
            stacked=stacked,
            pattern=wider,
        )
        updates = masks.apply(within, over(penalised, regrow_masks, updates, params))
        steps, state = inner.update(updates, state, params, **extra_args)
        return masks.apply(within, steps), state

    return optax.GradientTransformationExtraArgs(inner.init, update)
