"""Clipping by the norm of active weights only."""

import math

import jax
import jax.numpy as jnp
import optax

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import is_hole
from sparse_optax.masks.tree import flatten
from sparse_optax.selection.leaf import wide as as_wide


@boundary("clip_by_active_norm")
def clip_by_active_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates to a global norm, taken over active and dense weights only.

    Inside a sparse method the gradient is dense, and ``optax.clip_by_global_norm``
    mostly measures missing weights. This scales all updates by

    .. math:: \min(1, \text{max\_norm} / \| u_{\text{active}} \|_2)

    At a density of 1%, with a gradient whose entries are all alike, a clip of the
    global norm to 1 leaves a norm of about 0.1 for the weights that train, outside of
    the method or inside; this one leaves 1.

    .. note:: Only inside a sparse method, which passes the masks:
      ``regrow(optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1)), ...)``. Cost: one
      pass over the updates; no memory.

    Args:
      max_norm: Largest norm, positive.

    Returns:
      A transformation without state.

    Raises:
      ValueError: If ``max_norm`` is not positive, or no ``regrow`` is around it.

    Examples:
      >>> import optax, sparse_optax
      >>> tx = sparse_optax.sparse_momentum_regrow(
      ...     optax.chain(sparse_optax.clip_by_active_norm(1.0), optax.sgd(0.1)),
      ...     density=0.05, update_period=100, update_stop=1000, key=0)
    """
    limit = checks.concrete(max_norm)
    if not (checks.known(limit) and limit == math.inf):  # that clips nothing
        cure = "Use 1.0, for instance."
        checks.number("max_norm", max_norm, 0, ends="(]", cure=cure)

    def update_fn(updates, state, params=None, *, regrow_masks=None, **extra_args):
        del params, extra_args
        if regrow_masks is None:
            raise ArgumentError(
                "no masks arrived; it must stand inside a sparse "
                "method. Wrap it: sparse_momentum_regrow(optax.chain("
                "clip_by_active_norm(...), optax.sgd(...)), ...)."
            )
        kept, _ = flatten(regrow_masks)
        flat = jax.tree.leaves(updates, is_leaf=is_hole)
        squares = []
        for mask, u in zip(kept, flat, strict=True):
            if is_hole(u):
                continue
            # In float32, since squares overflow float16 early.
            u = u.astype(as_wide(u.dtype))
            active = u if is_hole(mask) else jnp.where(mask, u, 0)
            squares.append(jnp.sum(jnp.square(_modulus(active))))
        norm = jnp.sqrt(sum(squares, jnp.zeros([])))
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))

        def scale(u):
            return (u.astype(as_wide(u.dtype)) * factor).astype(u.dtype)

        scaled = jax.tree.map(scale, updates)
        return scaled, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )


def _modulus(x: jax.Array) -> jax.Array:
    """A real array with the squares of a complex one, or the array itself."""
    return jnp.abs(x) if jnp.iscomplexobj(x) else x
