"""The proximal step of the group lasso, which Optax does not have."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import (
    PyTree,
    Where,
    check_real,
    check_where,
    chosen_layers,
    is_hole,
    layers_of,
    leaf_names,
)
from sparse_optax.masks.tree import check_gradient, flatten, names_of
from sparse_optax.patterns import Pattern, pattern_of
from sparse_optax.selection.leaf import wide as as_wide


class GroupLassoState(NamedTuple):
    """State of ``proximal_group_lasso``.

    Attributes:
      count: Finished updates. # shape=(), int32
      grouped: A tree like the parameters: a scalar True for each leaf that takes part,
        holes for the others.
    """

    count: jax.Array
    grouped: PyTree


@boundary("proximal_group_lasso")
def proximal_group_lasso(
    learning_rate: optax.ScalarOrSchedule,
    strength: optax.ScalarOrSchedule,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shrinks groups of weights after each step; small groups become exactly zero.

    The penalty is :math:`\lambda \sum_G \sqrt{|G|} \, \| w_G \|_2` over the groups G.
    With u the update that arrives and :math:`\eta` the learning rate,

    .. math:: v = w + u, \qquad w_G \leftarrow \max\left(0,\;
              1 - \frac{\eta \lambda \sqrt{|G|}}{\| v_G \|_2}\right) v_G

    This is the proximal step: it solves the penalty's part exactly, so that groups
    become zero and not merely small, and can come back. Without ``pattern`` each weight
    is a group: soft thresholding, the proximal step of L1.

    .. note:: Last in the chain, behind the optimizer. It is exact for SGD; behind an
      optimizer that scales each weight, such as Adam, the step is that of one learning
      rate for all. How many groups are left follows from ``strength``;
      ``masks.nonzero_masks`` reads them, and ``compact`` makes the network smaller
      where units are groups. One pass over the weights; a counter and a scalar a leaf.

    Args:
      learning_rate: :math:`\eta`, that of the optimizer, at least 0, or its schedule.
      strength: :math:`\lambda`, at least 0, or a schedule of the number of finished
        updates.
      where: Which leaves take part, see ``eligible``: by default kernels.
      stacked: ``{name: axis}`` of leaves that stack layers: groups do not cross layers.
      pattern: The groups: ``patterns.output_units()``, ``patterns.slices()``,
        ``patterns.blocks(4, 4)``; None for single weights. Not N:M.

    Returns:
      A transformation with a ``GroupLassoState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = optax.chain(
      ...     optax.sgd(0.1),
      ...     sparse_optax.proximal_group_lasso(
      ...         0.1, 1.0, pattern=sparse_optax.patterns.output_units()))
      >>> params = {"w": jnp.array([[3.0, 0.1], [4.0, 0.05]])}
      >>> still = {"w": jnp.zeros((2, 2))}  # the gradient of a loss
      >>> updates, _ = tx.update(still, tx.init(params), params)
      >>> new = optax.apply_updates(params, updates)["w"]
      >>> [[round(float(w), 2) for w in row] for row in new]  # 5 is 5 - 0.14 now
      [[2.92, 0.0], [3.89, 0.0]]

    References:
      Yuan and Lin, `Model selection and estimation in regression with grouped variables
      <https://doi.org/10.1111/j.1467-9868.2005.00532.x>`_, 2006; Parikh and Boyd,
      `Proximal Algorithms <https://web.stanford.edu/~boyd/papers/prox_algs.html>`_,
      2014.
    """
    cure = "Use that of the optimizer."
    checks.number("learning_rate", learning_rate, 0, schedule=True, cure=cure)
    cure = "Use 1e-4, for instance."
    checks.number("strength", strength, 0, schedule=True, cure=cure)
    check_where(where)
    checks.names_axes("stacked", stacked)
    groups = pattern_of(pattern)
    if groups.density is not None:
        cure = "Pass patterns.output_units(), or leave it out."
        checks.fail("pattern", groups.name, "None or a pattern of units", cure)

    def init_fn(params):
        layers = layers_of(params, where, stacked, groups, may_be_empty=True)
        check_real(layers.leaves, "its norm")
        for name, value in (("learning_rate", learning_rate), ("strength", strength)):
            cure = "Give a schedule of numbers of at least 0."
            checks.first_value(name, value, 0, cure=cure)
        grouped = layers.rebuild(jnp.ones([], bool) for _ in layers.index)
        return GroupLassoState(jnp.zeros([], jnp.int32), grouped)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.needs_params(params, "groups shrink by their weights")
        checks.own_state(state, GroupLassoState)
        there, structure = flatten(state.grouped)
        if names_of(structure) != leaf_names(params):
            raise ArgumentError(
                f"`params` has the leaves {leaf_names(params)}; init saw "
                f"{names_of(structure)}. Pass the tree that init was called with."
            )
        check_gradient(updates, params)
        chosen = [not is_hole(x) for x in there]
        layers = chosen_layers(params, chosen, stacked, groups, structure)

        def at(name, value):
            value = cast(Any, value)(state.count) if callable(value) else value
            return checks.scalar(name, value)

        limit = at("learning_rate", learning_rate) * at("strength", strength)
        flat, outer = jax.tree.flatten(updates, is_leaf=is_hole)
        for i, leaf, w, size in zip(
            layers.index,
            layers.leaves,
            layers.pick(params),
            layers.unit_sizes,
            strict=True,
        ):
            wide = as_wide(w.dtype)
            moved = w.astype(wide) + flat[i].astype(wide)
            norm = jnp.sqrt(leaf.pattern.view(jnp.square(moved), leaf.axis))
            least = jnp.asarray(limit * size**0.5, wide)
            shrink = 1 - least / jnp.where(norm > 0, norm, 1)
            factor = jnp.where(norm <= least, 0, shrink)
            factor = leaf.pattern.spread(factor, leaf.shape, leaf.axis)
            factor = factor + jnp.zeros_like(moved)  # where the leaf lies on a mesh
            # In the parameter's dtype, so that the sum is exactly zero.
            step = (factor * moved - w.astype(wide)).astype(w.dtype)
            flat[i] = jnp.where(factor == 0, -w, step)
        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.unflatten(outer, flat), GroupLassoState(count, state.grouped)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
