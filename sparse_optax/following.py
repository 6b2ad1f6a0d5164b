"""A step of its own after each step of an optimizer, on the leaves that are chosen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_optax import mask_trees
from sparse_optax.leaves import (
    PyTree,
    Where,
    is_hole,
    layout,
    leaf_names,
    require_some,
    resolve_where,
)


class FollowState(NamedTuple):
    """State of ``follow``.

    Attributes:
      count: Finished updates.  # shape=(), int32
      inner_state: State of the wrapped optimizer.
      followed: The parameters' structure: a scalar True for each leaf that takes the
        second step, holes for the others.
    """

    count: jax.Array
    inner_state: Any
    followed: PyTree


def follow(
    inner: optax.GradientTransformation,
    step: Callable[..., jax.Array],
    *,
    where: Where | None = None,
    caller: str,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer and changes its update of the leaves that are chosen.

    With the gradient handed in, which the inner optimizer sees too, the update of a
    chosen leaf becomes ``step(count, weight, gradient, update)``, computed in float32
    or wider and cast to the weight's dtype; others keep theirs:

    .. math::
        u \leftarrow s(t, w, g, u)

    .. note::
      It stands where the optimizer stands, around it. A step costs one pass over
      weights, gradients and updates, stores nothing and needs no collective.

    Args:
      inner: The optimizer.
      step: Element-wise; ``count`` is the number of finished updates. A weight that the
        inner update puts to zero gets there, whatever it returns.
      where: Which leaves take it, see ``leaves.resolve_where``.
      caller: The name that errors start with.

    Returns:
      A transformation with a ``FollowState``. It stores no array of weights.

    Raises:
      ValueError: If ``inner`` is no transformation, ``params`` is missing or its
        structure is not that of ``init``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from sparse_optax.following import follow
      >>> tx = follow(optax.sgd(1.0), lambda t, w, g, u: u / 2, caller="halved")
      >>> params = {"b": jnp.ones(1), "w": jnp.ones((1, 2))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["b"].tolist(), updates["w"].tolist()
      ([-1.0], [[-1.0, -1.0]])

      The kernel of ones went to zero. One that does not:

      >>> params = {"b": jnp.ones(1), "w": jnp.full((1, 2), 3.0)}
      >>> gradient = jax.tree.map(jnp.ones_like, params)
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> updates["w"].tolist()
      [[-0.5, -0.5]]
    """
    if not hasattr(inner, "update"):
        raise ValueError(
            f"{caller}: `inner` must be an optax.GradientTransformation; got {inner!r}."
            " Pass optax.sgd(0.1), for instance."
        )
    inner_tx = optax.with_extra_args_support(inner)

    def init_fn(params):
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        chosen = resolve_where(params, where, caller=caller)
        plan = layout(params, chosen, caller=caller)
        require_some(params, plan, caller=caller)
        touched = [jnp.ones([], bool) for _ in plan.index]
        return FollowState(
            count=jnp.zeros([], jnp.int32),
            inner_state=inner_tx.init(params),
            followed=mask_trees.rebuild(structure, len(flat), plan.index, touched),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                f"{caller}: `params` is None; the step depends on the weights. Call "
                "tx.update(grads, state, params)."
            )
        touched, weights, gradient = (
            jax.tree.leaves(tree, is_leaf=is_hole)
            for tree in (state.followed, params, updates)
        )
        if not len(touched) == len(weights) == len(gradient):
            raise ValueError(
                f"{caller}: init saw {len(touched)} leaves; `params` has "
                f"{len(weights)} and the gradient {len(gradient)} "
                f"({leaf_names(params)}). The structures must be equal: pass the tree "
                "that init was called with."
            )
        new_updates, inner_state = inner_tx.update(
            updates, state.inner_state, params, **extra_args
        )
        emitted, structure = jax.tree.flatten(new_updates, is_leaf=is_hole)
        for i, leaf in enumerate(touched):
            if is_hole(leaf):
                continue
            wide = jnp.promote_types(weights[i].dtype, jnp.float32)
            w, g, u = (x[i].astype(wide) for x in (weights, gradient, emitted))
            new = step(state.count, w, g, u).astype(weights[i].dtype)
            emitted[i] = jnp.where(w + u == 0, -weights[i], new)
        return jax.tree.unflatten(structure, emitted), FollowState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            inner_state=inner_state,
            followed=state.followed,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
