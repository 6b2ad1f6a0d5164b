"""Random control masks: do the positions matter, or only the counts?

From the loosest to the closest: ``random_masks_like`` (as many weights in all),
``shuffle_masks(key, masks)`` (as many in each layer) and ``shuffle_masks(key, masks,
within="unit")`` (as many for each output unit). Another control keeps the masks and
draws new weights: ``sparsify(new_params, masks)``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import checks, selection
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import (
    Layers,
    PyTree,
    check_unit_axis,
    chosen_layers,
    is_hole,
    unit_axes,
)
from sparse_optax.masks.make import Key, as_key, place, random_scores
from sparse_optax.masks.tree import (
    check_dtype,
    check_masks,
    flatten,
    mask_shape,
    slice_counts,
    unpack,
)
from sparse_optax.selection import uint64


@boundary("shuffle_masks")
def shuffle_masks(
    key: Key,
    masks: PyTree,
    within: str = "layer",
    *,
    stacked: Mapping[str, int] | None = None,
    unit_axis: int | Mapping[str, Any] | None = None,
) -> PyTree:
    r"""Random masks with as many weights in each layer, or for each output unit.

    With :math:`m_g` the mask of a group g, a layer or the weights into one unit, the
    new mask is uniform among those with :math:`\sum m'_g = \sum m_g`.

    Args:
      key: Integer seed or random key; each leaf folds in its name.
      masks: A mask tree, plain or packed.
      within: ``"layer"``, or ``"unit"`` for each output unit.
      stacked: ``{name: axis}`` of leaves that stack layers.
      unit_axis: The axis of output units in a layer, of all leaves or as ``{name:
        axis}`` of some, a tuple for several. None tells it from names and shapes: last
        in flax and haiku, first in equinox. A stacked axis is not counted.

    Returns:
      A mask tree of plain arrays, placed like the masks. ``"unit"`` reshapes each leaf,
      which may gather it if it is sharded.

    Raises:
      ValueError: If an argument does not fit the masks.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> found = {"w": jnp.array([[True, True], [False, False], [True, False]])}
      >>> new = sparse_optax.masks.shuffle_masks(0, found, within="unit")
      >>> new["w"].sum(0).tolist()
      [2, 1]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1803.03635>`_, 2019, and, for shuffling within layers,
      Frankle et al, `Pruning Neural Networks at Initialization
      <https://arxiv.org/abs/2009.08576>`_, 2021.
    """
    cure = (
        "Use 'unit' to keep the number of inputs of each output unit, or "
        "random_masks_like to keep only the total."
    )
    checks.choice("within", within, ("layer", "unit"), cure=cure)
    check_unit_axis(unit_axis)
    seed = as_key(key)
    layers, given = _plain_masks(masks, stacked)
    units: Sequence[Any] = [()] * len(given)
    if within == "unit":
        units = _units(layers, masks, unit_axis)
    new, bits = [], random_scores(seed, layers.names, given)
    for axis, unit, mask, scores in zip(layers.axes, units, given, bits, strict=True):
        axes = (*(() if axis is None else (axis,)), *unit)
        new.append(place(_redraw(scores, mask, axes), mask))
    return layers.rebuild(new)


@boundary("random_masks_like")
def random_masks_like(key: Key, masks: PyTree) -> PyTree:
    r"""Random masks with as many weights in all, anywhere in the network.

    They are uniform among the masks with :math:`\sum m' = \sum m` over all leaves that
    take part. So the counts of layers are random too, on average in proportion to their
    sizes; ``shuffle_masks`` keeps these counts.

    Args:
      key: Integer seed or random key; each leaf folds in its name.
      masks: A mask tree, plain or packed.

    Returns:
      A mask tree of plain arrays, placed like the masks.

    Raises:
      ValueError: If ``key`` is no key or a mask is not boolean.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> found = {"a": jnp.ones((3, 4), bool), "b": jnp.zeros((5, 4), bool)}
      >>> sparse_optax.masks.count(sparse_optax.masks.random_masks_like(0, found))
      12
    """
    seed = as_key(key)
    layers, given = _plain_masks(masks, None)
    if not given:
        return layers.rebuild([])
    scores = random_scores(seed, layers.names, given)
    counts = [jnp.reshape(slice_counts(mask), -1) for mask in given]
    whole = uint64.sum64(jnp.concatenate(counts).astype(jnp.uint32))
    new = selection.top_k_mask(scores, whole)
    return layers.rebuild(map(place, new, given))


def _plain_masks(masks: PyTree, stacked) -> tuple[Layers, list[jax.Array]]:
    """The layers that take part, and their masks unpacked."""
    check_masks("masks", masks)
    flat, structure = flatten(masks)
    plain = [m if is_hole(m) else jnp.asarray(unpack(m)) for m in flat]
    chosen = [not is_hole(m) for m in plain]
    layers = chosen_layers(jax.tree.unflatten(structure, plain), chosen, stacked)
    given = [plain[i] for i in layers.index]
    for name, mask in zip(layers.names, given, strict=True):
        check_dtype(mask, name)
    return layers, given


def _units(layers: Layers, masks: PyTree, unit_axis: Any) -> list[tuple[int, ...]]:
    """The axes of output units of each leaf; raises if they cannot be told."""
    flat, structure = flatten(masks)
    shapes = [
        m if is_hole(m) else jax.ShapeDtypeStruct(mask_shape(m), bool) for m in flat
    ]
    found = unit_axes(layers, jax.tree.unflatten(structure, shapes), unit_axis)
    for leaf, axes in zip(layers.leaves, found, strict=True):
        if axes is None:
            rank = len(leaf.layer_shape)
            raise ArgumentError(
                f"the output units of {leaf.name!r}, whose layers have {rank} axes, "
                "cannot be told from names and shapes. Give unit_axis="
                f"{{{leaf.name!r}: axis}}, or leave the leaf out of the masks."
            )
    return [
        tuple(a + (leaf.axis is not None and a >= leaf.axis) for a in axes or ())
        for leaf, axes in zip(layers.leaves, found, strict=True)
    ]


def _redraw(scores: jax.Array, mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The highest random scores, with the mask's count in each slice along the axes."""
    front = tuple(range(len(axes)))
    scores, mask = (jnp.moveaxis(x, axes, front) for x in (scores, mask))
    shape = mask.shape
    if axes:
        pools = int(np.prod(shape[: len(axes)]))
        scores, mask = (jnp.reshape(x, (pools, -1)) for x in (scores, mask))
        counts = slice_counts(mask)
    else:
        counts = jnp.sum(slice_counts(mask), dtype=jnp.int32)
    new = selection.top_k_mask([scores], [counts])[0]
    return jnp.moveaxis(jnp.reshape(new, shape), front, axes)
