"""Clipping that looks at active weights only."""

import jax
import jax.numpy as jnp
import optax

from sparse_optax import mask_trees
from sparse_optax.leaves import is_hole


def clip_by_active_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    r"""Clips updates to a global norm, taken over active and dense weights only.

    Inside a sparse method the inner optimizer sees the dense gradient, and the norm
    of ``optax.clip_by_global_norm`` is mostly that of missing weights. This one
    scales all updates by

    .. math::
        \min(1, \text{max\_norm} / \| u_{\text{active}} \|_2)

    .. note::
      It works inside the wrapper only, ``regrow(optax.chain(clip_by_active_norm(1.0),
      optax.sgd(0.1)), ...)``: the engine hands the masks down.

    Args:
      max_norm: Largest norm, positive.

    Returns:
      A transformation without state.

    Raises:
      ValueError: If ``max_norm`` is not positive, or there is no engine around it.

    Examples:
      >>> import optax, sparse_optax
      >>> tx = sparse_optax.sparse_momentum_regrow(
      ...     optax.chain(sparse_optax.clip_by_active_norm(1.0), optax.sgd(0.1)),
      ...     density=0.05, update_period=100, update_stop=1000, key=0)
    """
    if isinstance(max_norm, (int, float)) and not max_norm > 0:
        raise ValueError(
            f"clip_by_active_norm: `max_norm` must be positive; got {max_norm!r}. "
            "Use 1.0, for instance."
        )

    def update_fn(updates, state, params=None, *, regrow_masks=None, **extra_args):
        del params, extra_args
        if regrow_masks is None:
            raise ValueError(
                "clip_by_active_norm: no masks arrived, it must stand inside a sparse "
                "method. Wrap it: sparse_momentum_regrow(optax.chain("
                "clip_by_active_norm(...), optax.sgd(...)), ...)."
            )
        kept, _ = mask_trees.flatten(regrow_masks)
        flat = jax.tree.leaves(updates, is_leaf=is_hole)
        squares = []
        for mask, u in zip(kept, flat, strict=True):
            if is_hole(u):
                continue
            # In float32: squares overflow a float16 early.
            u = u.astype(jnp.promote_types(u.dtype, jnp.float32))
            active = u if is_hole(mask) else jnp.where(mask, u, 0)
            squares.append(jnp.sum(jnp.square(active)))
        norm = jnp.sqrt(sum(squares, jnp.zeros([])))
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
        scaled = jax.tree.map(lambda u: (u * factor).astype(u.dtype), updates)
        return scaled, state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )
