"""Random masks to compare with: is it the positions, or the counts alone?

Three controls for masks that a method has found, from the loosest to the closest:

- ``random_masks_like``: as many weights, anywhere in the network;
- ``shuffle_masks(key, masks)``: as many in each layer, at random positions;
- ``shuffle_masks(key, masks, within="unit")``: as many for each output unit.

A fourth keeps the masks and draws the weights anew: ``sparsify(new_params, masks)``.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import selection, wide
from sparse_optax.leaves import Layout, PyTree, is_hole, layout
from sparse_optax.mask_trees import (
    flatten,
    names_of,
    rebuild,
    slice_counts,
    unpack,
)
from sparse_optax.masks import Key, as_key, place, random_scores


def shuffle_masks(
    key: Key,
    masks: PyTree,
    within: str = "layer",
    *,
    stacked: Mapping[str, int] | None = None,
    unit_axis: int = -1,
) -> PyTree:
    r"""Random masks with as many weights in each layer, or for each output unit.

    With :math:`m_g` the mask of a group g, a layer or the weights into one unit, the
    new mask is uniform among those with :math:`\sum m'_g = \sum m_g`.

    Args:
      key: An integer seed or a random key; each leaf's own is folded in by its name.
      masks: A mask tree, its leaves plain or packed.
      within: ``"layer"``, or ``"unit"`` for each output unit.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      unit_axis: The axis of a layer that counts its output units: the last one in flax
        and haiku, 0 in equinox. A stacked axis is not counted.

    Returns:
      A mask tree of plain arrays, placed as the masks are. With ``"unit"`` a leaf is
      reshaped on the way, which may gather it where it is sharded.

    Raises:
      ValueError: If an argument does not fit the masks.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import control_masks
      >>> found = {"w": jnp.array([[True, True], [False, False], [True, False]])}
      >>> new = control_masks.shuffle_masks(0, found, within="unit")
      >>> new["w"].sum(0).tolist()
      [2, 1]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1803.03635>`_, 2019, and Frankle et al., `Pruning Neural
      Networks at Initialization: Why Are We Missing the Mark?
      <https://arxiv.org/abs/2009.08576>`_, 2021, for shuffling within layers.
    """
    caller = "shuffle_masks"
    if within not in ("layer", "unit"):
        raise ValueError(
            f"{caller}: `within` must be 'layer' or 'unit'; got {within!r}. Use "
            "'unit' to keep the number of inputs of each output unit, or "
            "random_masks_like to keep only the total."
        )
    seed = as_key(key, caller=caller)
    plan, given, restore = _parts(masks, stacked, caller)
    new = []
    for name, axis, mask in zip(plan.names, plan.axes, given, strict=True):
        scores = random_scores(seed, name, mask)
        axes = () if axis is None else (axis,)
        if within == "unit":
            axes += (_unit(mask, axis, unit_axis, name, caller),)
        new.append(_redraw(scores, mask, axes))
    return restore(new)


def random_masks_like(key: Key, masks: PyTree) -> PyTree:
    r"""Random masks with as many weights in all, anywhere in the network.

    Uniform among the masks with :math:`\sum m' = \sum m`, over all leaves that take
    part: the layers' counts are random too, in proportion to their sizes on average.
    ``shuffle_masks`` keeps them.

    Args:
      key: An integer seed or a random key; each leaf's own is folded in by its name.
      masks: A mask tree, its leaves plain or packed.

    Returns:
      A mask tree of plain arrays, placed as the masks are.

    Raises:
      ValueError: If ``key`` is no key or a mask is not boolean.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import control_masks, masks
      >>> found = {"a": jnp.ones((3, 4), bool), "b": jnp.zeros((5, 4), bool)}
      >>> masks.count(control_masks.random_masks_like(0, found))
      12
    """
    caller = "random_masks_like"
    seed = as_key(key, caller=caller)
    plan, given, restore = _parts(masks, None, caller)
    if not given:
        return restore([])
    scores = [
        random_scores(seed, name, mask)
        for name, mask in zip(plan.names, given, strict=True)
    ]
    counts = [jnp.reshape(slice_counts(mask), -1) for mask in given]
    whole = wide.sum64(jnp.concatenate(counts).astype(jnp.uint32))
    return restore(selection.top_k_mask(scores, whole))


def _parts(masks, stacked, caller):
    """Plan and plain masks of the leaves that take part, and how to put them back."""
    flat, structure = flatten(masks)
    plain = [m if is_hole(m) else jnp.asarray(unpack(m)) for m in flat]
    names = names_of(structure)
    index = [i for i, m in enumerate(plain) if not is_hole(m)]
    for i in index:
        if plain[i].dtype != jnp.dtype(bool):
            raise ValueError(
                f"{caller}: in `masks`, {names[i]!r} has dtype {plain[i].dtype}; it "
                "must be bool. Pass mask.astype(bool)."
            )
    by_leaf = jax.tree.unflatten(structure, plain)
    chosen = [not is_hole(m) for m in plain]
    plan: Layout = layout(by_leaf, chosen, stacked, caller=caller)

    def restore(new):
        new = [place(m, plain[i]) for i, m in zip(index, new, strict=True)]
        return rebuild(structure, len(flat), index, new)

    return plan, [plain[i] for i in index], restore


def _unit(mask, axis: int | None, unit_axis: int, name: str, caller: str) -> int:
    """The axis of output units, in a leaf that may have an axis of layers as well."""
    rest = [i for i in range(mask.ndim) if i != axis]
    if not -len(rest) <= unit_axis < len(rest):
        raise ValueError(
            f"{caller}: `unit_axis` is {unit_axis}, and the layers of {name!r} have "
            f"{len(rest)} axes; it must be in [{-len(rest)}, {len(rest) - 1}]. Use -1 "
            "for kernels of flax, or leave the leaf out of the masks."
        )
    return rest[unit_axis]


def _redraw(scores: jax.Array, mask: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The highest random scores, as many in each slice along axes as in the mask."""
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
