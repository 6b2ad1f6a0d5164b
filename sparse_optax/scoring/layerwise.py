"""Pruning a trained network layer by layer, each with its inputs so far.

A layer is a matrix of inputs and outputs here, whatever the axes of its kernel.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_optax import checks
from sparse_optax.budgets.resolve import check_static, counts_of
from sparse_optax.checks import ArgumentError
from sparse_optax.layers import Layers, Leaf, PyTree, Where, check_real, layers_of
from sparse_optax.masks.make import place
from sparse_optax.patterns import GroupsNM, Pattern, SingleWeights, pattern_of
from sparse_optax.scoring import batches as over
from sparse_optax.scoring.inputs import taps
from sparse_optax.selection.leaf import wide as as_wide

# How many weights of a layer are kept: a number, or so many of each group.
Keep = int | GroupsNM
# Weights and a statistic of the inputs to a mask and new weights.
Prune = Callable[[jax.Array, jax.Array, Keep], tuple[jax.Array, jax.Array]]


class Pruned(NamedTuple):
    """Masks and parameters of a network that was pruned layer by layer."""

    masks: PyTree
    params: PyTree


def layers_and_counts(
    params: PyTree, density: Any, where: Where | None, pattern: Pattern | None
) -> tuple[Layers, list[Keep]]:
    """The layers that take part, and how much of each is kept."""
    given = pattern_of(pattern)
    if not isinstance(given, SingleWeights | GroupsNM):
        cure = "Pass patterns.n_m(2, 4), or leave it out."
        checks.fail("pattern", given.name, "None or one of patterns.n_m", cure)
    check_static(density, pattern=given)
    layers = layers_of(params, where)
    check_real(layers.leaves, "its score")
    if isinstance(given, GroupsNM):
        return layers, [given] * len(layers.leaves)
    return layers, counts_of(density, layers, params)


def prune_in_order(
    forward: Callable[[PyTree, Any], Any],
    params: PyTree,
    layers: Layers,
    keeps: list[Keep],
    batches: Iterable[Any],
    statistic: Callable[[jax.Array], jax.Array],
    prune: Prune,
) -> Pruned:
    """Prunes the layers in the order of their use. Each has the inputs that the network
    pruned so far gives it; ``statistic`` of them, (n, in), is summed over the batches.
    """
    over.check_batches(batches)
    batches, parts = list(batches), over.split(params, layers.index)
    if not batches:
        over.fail_empty()

    def tapped(chosen, batch):
        return taps(forward, parts, chosen, batch, layers.names)

    order = {}

    def note(chosen, batch):
        found = tapped(chosen, batch)
        order.update({i: uses[0].axes for i, uses in found.items()})

    jax.eval_shape(note, parts.chosen, batches[0])
    chosen, masks = list(parts.chosen), list(parts.chosen)
    for i, axes in order.items():

        def summed(chosen, batch, i=i):
            uses = [use.inputs for use in tapped(chosen, batch)[i]]
            found = [statistic(x.astype(as_wide(x.dtype))) for x in uses]
            return [functools.reduce(jnp.add, found)]

        (found,), _ = over.total(summed, chosen, batches)
        cure = "Check the batches, and the network at `params`."
        over.check_finite([found], [layers.names[i]], cure)
        _check_groups(keeps[i], layers.leaves[i], axes)
        kernel = chosen[i]
        wide = kernel.astype(as_wide(kernel.dtype))
        cure = "Check `params`: the training may have diverged."
        over.check_finite([wide], [layers.names[i]], cure, what="weights")
        mask, new = prune(_as_matrix(wide, axes), found, keeps[i])
        masks[i] = place(_as_kernel(mask, kernel.shape, axes), kernel)
        new = _as_kernel(new, kernel.shape, axes).astype(kernel.dtype)
        chosen[i] = place(new, kernel)
    return Pruned(layers.rebuild(masks), parts.rebuild(chosen))


def _check_groups(keep: Keep, leaf: Leaf, axes: tuple[int, ...]) -> None:
    """Raises unless groups of N:M lie along the last axis that is summed over."""
    if not isinstance(keep, GroupsNM):
        return
    given, rank = dict(keep.given or ()).get(leaf.name), len(leaf.shape)
    axis = keep.axis if keep.given is None else given
    if axis is not None and axis % rank != axes[-1]:
        raise ArgumentError(
            f"`pattern` has groups along axis {axis} of {leaf.name!r}; `forward` sums "
            f"over axis {axes[-1]}, which must hold them. Leave out its `axis`: it is "
            "read from `forward`."
        )
    keep._replace(axis=axes[-1], given=None).check(leaf.name, leaf.shape)


def _as_matrix(kernel: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A kernel as (inputs, outputs)."""
    size = math.prod(kernel.shape[axis] for axis in axes)
    return jnp.moveaxis(kernel, axes, range(len(axes))).reshape(size, -1)


def _as_kernel(
    matrix: jax.Array, shape: tuple[int, ...], axes: tuple[int, ...]
) -> jax.Array:
    """A matrix of inputs and outputs in the shape of the kernel."""
    others = [n for axis, n in enumerate(shape) if axis not in axes]
    whole = matrix.reshape([*(shape[axis] for axis in axes), *others])
    return jnp.moveaxis(whole, range(len(axes)), axes)
