"""Wraps an optimizer: adds a second step to each of its steps, for ``ham``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_optax import checks
from sparse_optax.checks import ArgumentError
from sparse_optax.layers import (
    PyTree,
    Where,
    check_real,
    is_hole,
    layers_of,
    leaf_names,
)
from sparse_optax.masks.tree import check_gradient
from sparse_optax.selection.leaf import wide as as_wide


class FollowState(NamedTuple):
    """State of ``follow``.

    Attributes:
      count: Finished updates. # shape=(), int32
      inner_state: State of the wrapped optimizer.
      followed: A tree like the parameters: a scalar True for each leaf that takes the
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
    check: Callable[[], None] = lambda: None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer; its update u of chosen leaves becomes s(t, w, g, u).

    ``step(count, weight, gradient, update)`` is element-wise, in float32 or wider, and
    cast to the weight's dtype; ``count`` is the number of finished updates. A weight
    that the inner update sets to zero stays zero. No array is stored. ``init`` calls
    ``check``.
    """
    checks.transformation("inner", inner)
    inner_tx = optax.with_extra_args_support(inner)

    def init_fn(params):
        check()
        layers = layers_of(params, where)
        check_real(layers.leaves, "a step by its sign")
        return FollowState(
            count=jnp.zeros([], jnp.int32),
            inner_state=inner_tx.init(params),
            followed=layers.rebuild(jnp.ones([], bool) for _ in layers.index),
        )

    def update_fn(updates, state, params=None, **extra_args):
        checks.needs_params(params, "the step depends on the weights")
        checks.own_state(state, FollowState)
        check_gradient(updates, params)
        touched, weights, gradient = (
            jax.tree.leaves(tree, is_leaf=is_hole)
            for tree in (state.followed, params, updates)
        )
        if len(touched) != len(weights):
            raise ArgumentError(
                f"init saw {len(touched)} leaves; `params` has {len(weights)} "
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
            wide = as_wide(weights[i].dtype)
            w, g, u = (x[i].astype(wide) for x in (weights, gradient, emitted))
            new = step(state.count, w, g, u).astype(weights[i].dtype)
            emitted[i] = jnp.where(w + u == 0, -weights[i], new)
        return jax.tree.unflatten(structure, emitted), FollowState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            inner_state=inner_state,
            followed=state.followed,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
