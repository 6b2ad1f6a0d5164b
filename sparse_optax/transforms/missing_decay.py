"""Decay of the hidden values of missing weights, for SR-STE."""

import jax
import jax.numpy as jnp
import optax

from sparse_optax.layers import is_hole
from sparse_optax.masks.tree import flatten, unpack
from sparse_optax.selection.leaf import plus
from sparse_optax.selection.leaf import wide as as_wide


def decay_missing(strength: float) -> optax.GradientTransformationExtraArgs:
    r"""Adds :math:`\lambda (1 - m) w` to the gradient, m the mask of the forward pass.

    It works inside ``regrow`` with ``hidden=True``, which passes the masks. It is
    element-wise and has no state.
    """

    def update_fn(updates, state, params=None, **extra_args):
        masks, _ = flatten(extra_args["regrow_masks"])
        flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
        weights = jax.tree.leaves(params, is_leaf=is_hole)
        for i, (mask, w) in enumerate(zip(masks, weights, strict=True)):
            if is_hole(mask):
                continue
            missing = jnp.where(unpack(mask), 0, w.astype(as_wide(w.dtype)))
            flat[i] = plus(flat[i], strength * missing)
        return jax.tree.unflatten(structure, flat), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
