"""What a report counts: states by the names of leaves, weights where they are."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.leaves import PyTree, is_hole, leaf_names
from sparse_optax.mask_trees import slice_counts, unpack
from sparse_optax.sparse_models import named_masks


class Seen(NamedTuple):
    """What the states of sparse methods say, by the name of the leaf.

    Attributes:
      masks: Masks, plain or packed.
      removed: Weights removed in the last cycle, a number or one a slice.
      grown: Weights grown in the last cycle.
      passed: Weights that GSM let pass.
      thresholds: The saliency at which GSM cut.
      skipped: Cycles left out, or None without a state of ``regrow``.
    """

    masks: dict[str, Any]
    removed: dict[str, np.ndarray]
    grown: dict[str, np.ndarray]
    passed: dict[str, np.ndarray]
    thresholds: dict[str, float]
    skipped: int | None


def read_state(opt_state: PyTree, *, caller: str) -> Seen:
    """Finds the states of ``regrow`` and of GSM in an optimizer state, and reads them.

    Args:
      opt_state: Any optimizer state, or None.
      caller: The name that an error starts with.

    Returns:
      What they say; nothing for None.

    Raises:
      ValueError: If there is none, or two of a kind speak of one leaf.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> from sparse_optax.report import tallies
      >>> state = sparse_optax.gsm_mask(0.5).init({"w": jnp.ones((2, 2))})
      >>> tallies.read_state(state, caller="doc").thresholds
      {'w': 0.0}
    """
    states = list(_states(opt_state))
    if opt_state is not None and not states:
        raise ValueError(
            f"{caller}: `opt_state` holds no sparse method; got "
            f"{type(opt_state).__name__} without a state of regrow or of GSM. Leave it "
            "out to count what is not zero."
        )
    regrown = [s for s in states if hasattr(s, "regrow_masks")]
    gates = [s for s in states if hasattr(s, "gsm_passed")]
    return Seen(
        masks=named_masks(opt_state, caller=caller) if regrown else {},
        removed=_by_name([s.removed for s in regrown], caller),
        grown=_by_name([s.grown for s in regrown], caller),
        passed=_by_name([s.gsm_passed for s in gates], caller),
        thresholds={
            name: float(_numbers(s.gsm_threshold))
            for s in gates
            for name in _by_name([s.gsm_passed], caller)
        },
        skipped=sum(int(_numbers(s.skipped)) for s in regrown) if regrown else None,
    )


def _is_state(node: Any) -> bool:
    # By field: wrappers such as flax.nnx keep the fields.
    return hasattr(node, "regrow_masks") or hasattr(node, "gsm_passed")


def _states(tree: PyTree) -> Iterator[Any]:
    for node in jax.tree.leaves(tree, is_leaf=_is_state):
        if _is_state(node):
            yield node
            yield from _states(getattr(node, "inner_state", ()))


def _by_name(trees: Sequence[PyTree], caller: str) -> dict[str, np.ndarray]:
    """Numbers a leaf, merged over trees of disjoint leaves."""
    found: dict[str, np.ndarray] = {}
    for tree in trees:
        flat = jax.tree.leaves(tree, is_leaf=is_hole)
        for name, value in zip(leaf_names(tree), flat, strict=True):
            if is_hole(value):
                continue
            if name in found:
                raise ValueError(
                    f"{caller}: two states in `opt_state` speak of the leaf {name!r}; "
                    "each leaf may have one method of a kind. Give the methods "
                    "disjoint leaves through `where` or optax.partition."
                )
            found[name] = _numbers(value)
    return found


def _numbers(value: Any) -> np.ndarray:
    (array,) = jax.tree.leaves(value)  # flax.nnx wraps the leaves of a state
    return np.asarray(array)


def tally(
    operands: Sequence[tuple[Any, ...]],
    axes: Sequence[int | None],
    unit_axis: int,
) -> list[dict[str, list[int]]]:
    """Counts of each layer, exactly, in one compiled call for all leaves.

    Args:
      operands: For each leaf ``(weights, mask, earlier mask, weights ever kept)``,
        None for what there is not.
      axes: For each leaf the axis whose slices are layers, or None.
      unit_axis: The axis of a layer that counts its output units.

    Returns:
      For each leaf the counts by name, a list with one entry a layer: ``kept`` (not
      zero, where there is no mask), ``added``, ``explored``, and for layers of two or
      more dimensions ``units`` and ``dead_units``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.report import tallies
      >>> counts, = tallies.tally([(jnp.eye(2, 3), None, None, None)], [None], -1)
      >>> counts == {"kept": [2], "units": [3], "dead_units": [1]}
      True
    """
    counted = _tally(tuple(operands), axes=tuple(axes), unit_axis=unit_axis)
    result = []
    for counts, axis in zip(jax.device_get(counted), axes, strict=True):
        wide = {k: v.astype(np.int64) for k, v in counts.items()}
        if axis is None:
            wide = {k: v.sum(keepdims=True) for k, v in wide.items()}
        result.append({k: v.tolist() for k, v in wide.items()})
    return result


@functools.partial(jax.jit, static_argnames=("axes", "unit_axis"))
def _tally(operands, *, axes, unit_axis) -> list[dict[str, jax.Array]]:
    """Counts along the axis of layers, or along axis 0: all of a leaf may pass 2^31."""
    result = []
    for arrays, axis in zip(operands, axes, strict=True):
        x, mask, before, ever = (_front(array, axis) for array in arrays)
        there = _nonzero(x)
        kept = there if mask is None else mask
        counts = {"kept": slice_counts(kept)}
        if before is not None:
            added = jnp.logical_and(kept, jnp.logical_not(before))
            counts["added"] = slice_counts(added)
        if ever is not None:
            counts["explored"] = slice_counts(ever)
        stacks = axis is not None
        rank = arrays[0].ndim - stacks
        if rank > 1:
            unit = unit_axis % rank + stacks
            others = tuple(d for d in range(stacks, x.ndim) if d != unit)
            alive = jnp.any(jnp.logical_and(kept, there), axis=others)
            counts["units"] = slice_counts(jnp.ones_like(alive))
            counts["dead_units"] = slice_counts(jnp.logical_not(alive))
        result.append(counts)
    return result


def _front(array: Any, axis: int | None) -> Any:
    if array is None:
        return None
    array = unpack(array)
    return jnp.moveaxis(array, axis or 0, 0) if array.ndim else array[None]


def _nonzero(x: jax.Array) -> jax.Array:
    """What is not zero, by bits alone: CPUs take subnormals for zero in comparisons."""
    width = jnp.finfo(x.dtype).bits
    if width < 8:
        return x != 0
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{width}"))
    return bits << 1 != 0  # the sign of zero shifted out
