"""The summary: what a run has kept, moved and let pass."""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import masks as mask_trees
from sparse_optax.budgets import apportion
from sparse_optax.leaves import PyTree, Where, is_hole, layout, require_some
from sparse_optax.report.arguments import (
    check_leaf,
    check_names,
    check_unit_axis,
    chosen_leaves,
    prices,
)
from sparse_optax.report.records import Layer, Summary
from sparse_optax.report.tallies import Seen, read_state, tally
from sparse_optax.sparse_models import named_masks, stored_bytes


def summary(
    params: PyTree,
    opt_state: PyTree = None,
    previous_masks: PyTree = None,
    *,
    masks: PyTree = None,
    explored: PyTree = None,
    costs: Any = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    unit_axis: int = -1,
) -> Summary:
    """Counts what a run has kept, moved and let pass, per layer and in total.

    The layers are the leaves that have a mask (given, or in the state) and those that
    a ``GsmState`` gates; without any, those that ``where`` chooses. Where there is no
    mask, what is not zero is what is kept. All trees are paired by normalised name.

    Args:
      params: Concrete parameters, of any tree type.
      opt_state: An optimizer state with states of ``regrow`` or of GSM anywhere
        inside: chained, partitioned, injected, accumulated.
      previous_masks: Masks of an earlier step, or the state of then, for the churn.
        Copy them before a step that donates the state.
      masks: Masks, instead of those in the state.
      explored: Weights ever kept, see ``explore``.
      costs: FLOPs per weight and example, a number for each layer's leaf, as in
        ``budgets.num_flops``: 2 for a dense layer, 2 * height * width of the output
        for a convolution. A tree like the parameters or a dict ``{name: number}``.
      where: Which leaves count, where neither masks nor a state is given; see
        ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      unit_axis: The axis of a layer that counts its output units: -1 in flax and
        haiku, 0 in equinox.

    Returns:
      A ``Summary``.

    Raises:
      ValueError: If the state holds no sparse method, or an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import report
      >>> params = {"bias": jnp.ones(3), "kernel": jnp.eye(2, 3)}
      >>> made = report.summary(params, costs={"kernel": 2})
      >>> layer, = made.layers
      >>> layer.name, layer.kept, layer.dead_units, layer.kept_flops
      ('kernel', 2, 1, 4)
      >>> made.file_bytes  # a byte of mask, two weights, three biases
      21
    """
    seen = read_state(opt_state, caller="summary")
    kept = seen.masks if masks is None else named_masks(masks, caller="summary")
    wanted = None
    if opt_state is not None or masks is not None:
        wanted = kept.keys() | seen.passed.keys()
    chosen = chosen_leaves(params, where, wanted)
    plan = layout(params, chosen, stacked, caller="summary")
    require_some(params, plan, caller="summary")
    given = {"masks": kept}
    for argument, tree in (("previous_masks", previous_masks), ("explored", explored)):
        given[argument] = {}
        if tree is not None:
            given[argument] = named_masks(tree, caller="summary")
            check_names(argument, given[argument], kept or plan.names)
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    costs_of = prices(costs, plan.names)
    operands = []
    for i, name, axis in zip(*plan, strict=True):
        check_leaf(name, flat[i], {a: m[name] for a, m in given.items() if name in m})
        check_unit_axis(unit_axis, name, flat[i].ndim - (axis is not None))
        operands.append((flat[i], *(named.get(name) for named in given.values())))
    layers: list[Layer] = []
    stored = []
    tallies = tally(operands, plan.axes, unit_axis)
    for (i, name, axis), counts in zip(zip(*plan, strict=True), tallies, strict=True):
        x = flat[i]
        layers += _layers(name, axis, x, counts, costs_of.get(name), seen)
        stored.append((x.size, sum(counts["kept"]), x.dtype.itemsize))
    # A leaf of another kind, such as a function in a module, has no weights.
    rest = [
        (math.prod(x.shape), x.dtype.itemsize)
        for x, is_layer in zip(flat, chosen, strict=True)
        if not is_layer and hasattr(x, "dtype")
    ]
    return Summary(
        layers=tuple(layers),
        total=_total(layers, plan.names, stored, seen),
        dense_weights=sum(size for size, _ in rest),
        dense_bytes=sum(size * width for size, width in rest),
        skipped=seen.skipped,
    )


def explore(explored: PyTree, masks: PyTree) -> PyTree:
    """Adds the weights kept now to those kept before: a logical or.

    It stays outside the optimizer state: call it after a cycle, jitted or not, and
    hand the result to ``summary``.

    Args:
      explored: The tree so far, or None to start.
      masks: The masks of now.

    Returns:
      A mask tree in arrays of its own, safe beside a donated state.

    Raises:
      ValueError: If the structures differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import report
      >>> seen = report.explore(None, {"w": jnp.array([True, False, False])})
      >>> report.explore(seen, {"w": jnp.array([False, True, False])})["w"].tolist()
      [True, True, False]
    """
    if explored is None:
        return mask_trees.combine(lambda mask: jnp.array(mask, copy=True), masks)
    try:
        return mask_trees.combine(jnp.logical_or, explored, masks)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"explore: `explored` does not have the structure of `masks` ({error}); "
            "they must be equal. Start with None, on these masks."
        ) from error


# --- records --------------------------------------------------------------------------
def _layers(name, axis, x, counts, price, seen: Seen) -> list[Layer]:
    slices = 1 if axis is None else x.shape[axis]
    weights, width = math.prod(x.shape) // max(slices, 1), x.dtype.itemsize
    removed, grown, passed = (
        _per_slice(numbers.get(name), slices, axis)
        for numbers in (seen.removed, seen.grown, seen.passed)
    )
    rows = []
    for j in range(slices):
        found = {quantity: numbers[j] for quantity, numbers in counts.items()}
        rows.append(
            Layer(
                name=name if axis is None else f"{name}[{j}]",
                weights=weights,
                dense_bytes=weights * width,
                sparse_bytes=stored_bytes([(weights, found["kept"], width)]),
                dense_flops=_times(weights, price),
                kept_flops=_times(found["kept"], price),
                removed=removed[j],
                grown=grown[j],
                passed=passed[j],
                threshold=seen.thresholds.get(name),
                **found,
            )
        )
    return rows


def _per_slice(numbers: Any, slices: int, axis: int | None) -> list[int | None]:
    """One number a layer; None where the state has one for all layers of a leaf."""
    if numbers is None or (axis is not None and numbers.shape != (slices,)):
        return [None] * slices
    if axis is None:  # a state that stacks what the report takes for one layer
        return [int(numbers.sum(dtype=np.int64))]
    return numbers.tolist()


def _total(layers, names, stored, seen: Seen) -> Layer:
    sums = {}
    for field in ("weights", "kept", "dense_bytes"):
        sums[field] = sum(getattr(layer, field) for layer in layers)
    for field in ("dense_flops", "kept_flops", "units", "dead_units"):
        sums[field] = _sum(getattr(layer, field) for layer in layers)
    for field in ("removed", "grown", "passed"):
        # By leaf: where a state has one number for all slices they have none.
        numbers = (getattr(seen, field).get(name) for name in names)
        sums[field] = _sum(n if n is None else int(n.sum()) for n in numbers)
    for field in ("added", "explored"):
        # Shares of all weights: known for all layers or not at all.
        values = [getattr(layer, field) for layer in layers]
        sums[field] = None if not values or None in values else sum(values)
    thresholds = set(seen.thresholds.values())
    return Layer(
        name="total",
        sparse_bytes=stored_bytes(stored),
        threshold=thresholds.pop() if len(thresholds) == 1 else None,
        **sums,
    )


def _sum(values: Iterable[Any]) -> Any:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _times(count: int, price: Fraction | None) -> int | float | None:
    if price is None:
        return None
    cost = apportion.plain(count * price)
    return cost if isinstance(cost, int) else float(cost)
