"""The summary: kept, moved and passed weights, counted layer by layer."""

import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_optax.budgets.kinds import plain, prices
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.export.model import stored_bytes
from sparse_optax.layers import (
    Layers,
    Leaf,
    PyTree,
    Where,
    check_values,
    chosen_layers,
    is_hole,
    layers_of,
    leaf_names,
    unit_axes,
)
from sparse_optax.masks.optimizer_state import (
    freezes,
    kept_masks,
    named_masks,
    states_with,
)
from sparse_optax.masks.tree import (
    combine,
    is_nonzero,
    mask_shape,
    slice_counts,
    unpack,
)
from sparse_optax.report.ensembles import members_agree
from sparse_optax.report.records import Layer, Summary


@boundary("summary")
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
    unit_axis: int | Mapping[str, Any] | None = None,
) -> Any:
    """Counts the weights kept, moved and let pass, per layer and in total.

    The layers are the leaves with a mask (given, or in the state) and those that GSM
    gates; without any, those that ``where`` chooses. Without a mask, nonzero weights
    are the kept ones. All trees are paired by normalised name.

    A state of ``jax.vmap(tx.init)`` holds the members of an ensemble, in the leading
    axis of all its arrays and of the parameters: then each member has a summary.

    Args:
      params: Concrete parameters, of any tree type.
      opt_state: An optimizer state with states of ``regrow`` or GSM inside: chained,
        partitioned, injected, accumulated.
      previous_masks: Masks, or the optimizer state, of an earlier step, for the churn.
        Copy them before a step that donates the state.
      masks: Masks to use instead of those in the state.
      explored: Weights that were ever kept, see ``explore``.
      costs: FLOPs per weight and example, see ``budgets.num_flops``.
      where: Which leaves count without masks and state, see ``eligible``.
      stacked: ``{name: axis}`` of leaves that stack layers.
      unit_axis: The axis of output units in a layer, of all leaves or as ``{name:
        axis}`` of some, a tuple for several. None tells it from names and shapes as
        ``patterns`` do: last in flax and haiku, first in equinox. Layers where it
        cannot be told have no ``units``, and the table names them.

    Returns:
      A ``Summary``, or a tuple of them, one for each member of a batch.

    Raises:
      ValueError: If an argument does not fit, the state has no sparse method, or a
        number is traced.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"bias": jnp.ones(3), "kernel": jnp.eye(2, 3)}
      >>> made = sparse_optax.report.summary(params, costs={"kernel": 2})
      >>> layer, = made.layers
      >>> layer.name, layer.kept, layer.empty_units, layer.kept_flops
      ('kernel', 2, 1, 4)
      >>> made.file_bytes  # a byte of mask, two weights, three biases
      21
    """
    trees = params, opt_state, previous_masks, masks, explored
    _refuse_tracers(trees)
    members = _members(opt_state)
    if members is not None:
        settings = dict(costs=costs, where=where, stacked=stacked, unit_axis=unit_axis)
        states = list(states_with(opt_state, "regrow_masks"))
        shared = members > 1 and bool(states) and all(map(members_agree, states))
        return tuple(
            _summary(*_member(trees, i, members), **settings)._replace(
                shared_masks=shared
            )
            for i in range(members)
        )
    return _summary(
        *trees, costs=costs, where=where, stacked=stacked, unit_axis=unit_axis
    )


def _summary(
    params: PyTree,
    opt_state: PyTree,
    previous_masks: PyTree,
    masks: PyTree,
    explored: PyTree,
    *,
    costs: Any,
    where: Where | None,
    stacked: Mapping[str, int] | None,
    unit_axis: int | Mapping[str, Any] | None,
) -> Summary:
    """The summary of one network."""
    seen = _read_state(opt_state)
    kept = seen.masks if masks is None else named_masks(masks)
    wanted = None
    if opt_state is not None or masks is not None:
        wanted = kept.keys() | seen.passed.keys()
    layers = counted_layers(params, wanted, where, stacked)
    given = {"masks": kept, "previous_masks": {}, "explored": {}}
    for argument, tree in (("previous_masks", previous_masks), ("explored", explored)):
        if tree is not None:
            given[argument] = named_masks(tree, argument)
            _check_names(argument, given[argument], kept or layers.names)
    arrays, costs_of = layers.pick(params), _costs(costs, layers.names)
    operands = []
    for leaf, x in zip(layers.leaves, arrays, strict=True):
        found = {a: m[leaf.name] for a, m in given.items() if leaf.name in m}
        check_leaf(leaf, x, found)
        operands.append((x, *(named.get(leaf.name) for named in given.values())))
    rows: list[Layer] = []
    stored = []
    axes_of_units = unit_axes(layers, params, unit_axis)
    tallies = _tallied(operands, layers.axes, axes_of_units)
    for leaf, counts in zip(layers.leaves, tallies, strict=True):
        rows += _rows(leaf, counts, costs_of.get(leaf.name), seen)
        width = np.dtype(leaf.dtype).itemsize
        stored.append((leaf.size * leaf.copies, sum(counts["kept"]), width))
    unknown = tuple(
        leaf.name
        for leaf, axes in zip(layers.leaves, axes_of_units, strict=True)
        if axes is None and len(leaf.layer_shape) > 1
    )
    total = _total(rows, layers.names, stored, seen)
    if unknown:
        total = total._replace(units=None, empty_units=None)
    # Other leaves, such as a function in a module, have no weights.
    rest = [
        (math.prod(x.shape), x.dtype.itemsize)
        for i, x in enumerate(jax.tree.leaves(params, is_leaf=is_hole))
        if i not in layers.index and hasattr(x, "dtype")
    ]
    return Summary(
        layers=tuple(rows),
        total=total,
        dense_weights=sum(size for size, _ in rest),
        dense_bytes=sum(size * width for size, width in rest),
        skipped=seen.skipped,
        unknown_units=unknown,
        misplaced=seen.misplaced,
    )


@boundary("explore")
def explore(explored: PyTree, masks: PyTree) -> PyTree:
    """Adds the weights kept now to those kept before: a logical or.

    The result is not part of the optimizer state: call this after a cycle, jitted or
    not, and give the result to ``summary``.

    Args:
      explored: The tree so far, or None at the start.
      masks: The present masks.

    Returns:
      A mask tree in new arrays, safe beside a donated state.

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
        return combine(lambda mask: jnp.array(mask, copy=True), masks)
    try:
        return combine(jnp.logical_or, explored, masks)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"`explored` does not have the structure of `masks` ({error}); "
            "they must be equal. Start with None, on these masks."
        ) from error


# --- members of a batch ---------------------------------------------------------------
def _refuse_tracers(trees: Any) -> None:
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(trees)):
        raise ArgumentError(
            "`params` or `opt_state` is traced; counts come back to the host, so that "
            "all arrays must be concrete. Call it outside jit, after the step."
        )


def _members(opt_state: PyTree) -> int | None:
    """How many members a state has that was made under ``jax.vmap``; None without."""
    counts = [
        _numbers(state.count)
        for state in states_with(opt_state, "regrow_masks", "gsm_passed")
    ]
    shapes = {count.shape for count in counts}
    if shapes <= {()}:
        return None
    if len(shapes) > 1 or len(next(iter(shapes))) > 1:
        raise ArgumentError(
            f"the states in `opt_state` have counts of shapes {sorted(shapes)}; all "
            "must have one axis of members, or none. Take a member out of the trees: "
            "jax.tree.map(lambda x: x[0], tree)."
        )
    return next(iter(shapes))[0]


def _member(trees: Any, i: int, members: int) -> Any:
    """Entry i of every array."""

    def take(x: Any) -> Any:
        if np.shape(x)[:1] != (members,):
            raise ArgumentError(
                f"`opt_state` has {members} members, and an array has shape "
                f"{np.shape(x)}; all arrays must have this leading axis. Pass "
                "parameters and masks of all members."
            )
        return x[i]

    return jax.tree.map(take, trees)


# --- what there is to count -----------------------------------------------------------
class _Seen(NamedTuple):
    """The numbers in the states of sparse methods, by the name of the leaf."""

    masks: dict[str, Any]  # plain or packed
    removed: dict[str, np.ndarray]  # in the last cycle, a number or one per slice
    grown: dict[str, np.ndarray]  # in the last cycle
    passed: dict[str, np.ndarray]  # by GSM
    thresholds: dict[str, float]  # of GSM
    skipped: int | None  # cycles left out; None without a state of `regrow`
    misplaced: int | None  # how often missing weights were found that are not zero
    trained: dict[str, Any]  # masks of the leaves whose other weights are frozen


def _read_state(opt_state: PyTree) -> _Seen:
    """The numbers in the states of ``regrow`` and GSM; nothing for None."""
    states = list(states_with(opt_state, "regrow_masks", "gsm_passed"))
    if opt_state is not None and not states:
        raise ArgumentError(
            "`opt_state` holds no sparse method; got "
            f"{type(opt_state).__name__} without a state of regrow or of GSM. Leave it "
            "out to count what is not zero."
        )
    regrown = [s for s in states if hasattr(s, "regrow_masks")]
    gates = [s for s in states if hasattr(s, "gsm_passed")]
    active = named_masks(opt_state) if regrown else {}
    return _Seen(
        # Weights that stay as they are count as kept.
        masks=kept_masks(opt_state) if regrown else {},
        removed=_numbers_by_name([s.removed for s in regrown]),
        grown=_numbers_by_name([s.grown for s in regrown]),
        passed=_numbers_by_name([s.gsm_passed for s in gates]),
        thresholds={
            name: float(_numbers(s.gsm_threshold))
            for s in gates
            for name in by_name([s.gsm_passed])
        },
        skipped=_sum(int(_numbers(s.skipped)) for s in regrown),
        misplaced=_sum(int(_numbers(s.misplaced)) for s in regrown),
        trained=active if regrown and freezes(opt_state) else {},
    )


def by_name(trees: Iterable[PyTree]) -> dict[str, Any]:
    """Arrays per leaf, merged over trees of disjoint leaves."""
    found: dict[str, Any] = {}
    for tree in trees:
        flat = jax.tree.leaves(tree, is_leaf=is_hole)
        for name, value in zip(leaf_names(tree), flat, strict=True):
            if is_hole(value):
                continue
            if name in found:
                raise ArgumentError(
                    f"two states in `opt_state` speak of the leaf {name!r}; "
                    "each leaf may have one method of a kind. Give the methods "
                    "disjoint leaves through `where` or optax.partition."
                )
            found[name] = array_of(value)
    return found


def _numbers_by_name(trees: Iterable[PyTree]) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in by_name(trees).items()}


def array_of(value: Any) -> Any:
    """An array of a state, which flax.nnx wraps."""
    (array,) = jax.tree.leaves(value)
    return array


def _numbers(value: Any) -> np.ndarray:
    return np.asarray(array_of(value))


# --- arguments ------------------------------------------------------------------------
def counted_layers(
    params: PyTree,
    wanted: Collection[str] | None,
    where: Where | None,
    stacked: Mapping[str, int] | None,
) -> Layers:
    """The layers of these names, with masks or of GSM, or those of `where` if None."""
    if wanted is None:
        return layers_of(params, where, stacked)
    if where is not None:
        raise ArgumentError(
            f"`where`={where!r} is given beside `opt_state` or `masks`, which say "
            "which leaves count; it must be None. Leave `where` out."
        )
    flat, names = jax.tree.leaves(params, is_leaf=is_hole), leaf_names(params)
    chosen = [n in wanted and not is_hole(x) for n, x in zip(names, flat, strict=True)]
    _check_names("masks", wanted, [n for n, c in zip(names, chosen, strict=True) if c])
    for name, x, choice in zip(names, flat, chosen, strict=True):
        if choice and not hasattr(x, "shape"):
            raise ArgumentError(
                f"the leaf {name!r} of `params` is a {type(x).__name__}; it must be an "
                "array. Pass the parameters that the masks or the state were made for."
            )
    return chosen_layers(params, chosen, stacked)


def _check_names(argument: str, got: Collection[str], wanted: Collection[str]) -> None:
    if set(got) != set(wanted):
        raise ArgumentError(
            f"`{argument}` speaks of {sorted(set(got) - set(wanted))}, which are no "
            f"layers here, and not of {sorted(set(wanted) - set(got))}; the layers are "
            f"{sorted(wanted)}. Pass masks or a state made for these parameters."
        )


def check_leaf(leaf: Leaf, x: Any, masks: Mapping[str, Any]) -> None:
    """Raises unless a leaf has values and its masks fit."""
    check_values([leaf.name], [x])
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ArgumentError(
            f"`masks` holds a mask for {leaf.name!r} of dtype {x.dtype}; only floating "
            "and complex leaves can be sparse. Leave it out."
        )
    for argument, mask in masks.items():
        if tuple(mask_shape(mask)) != x.shape:
            raise ArgumentError(
                f"`{argument}` has shape {tuple(mask_shape(mask))} for {leaf.name!r}, "
                f"and `params` {x.shape}; they must be equal. Pass masks made for "
                "these parameters."
            )


def _costs(costs: Any, names: Collection[str]) -> dict[str, Fraction]:
    """FLOPs per weight by name, exactly; empty without costs."""
    if costs is None:
        return {}
    found = prices(costs)
    if found.keys() != set(names):
        raise ArgumentError(
            f"`costs` lacks {sorted(set(names) - found.keys())} and has "
            f"{sorted(found.keys() - set(names))} besides; it must give a number for "
            f"each of {list(names)}. Correct the names."
        )
    return found


# --- counts ---------------------------------------------------------------------------
def _tallied(
    operands: Sequence[tuple[Any, ...]],
    axes: Sequence[int | None],
    units: Sequence[tuple[int, ...] | None],
) -> list[dict[str, list[int]]]:
    """Counts of each layer, exactly, in one compiled call for all leaves.

    Operands are ``(weights, mask, earlier mask, weights ever kept)`` per leaf, each but
    the first may be None. The counts have one entry per layer: ``kept`` (without a mask
    the nonzero weights), with one ``nonzero`` and ``outside``, further ``added``,
    ``explored``, and for layers of two or more dimensions whose axes of ``units`` are
    known ``units`` and ``empty_units``.
    """
    counted = _tally(tuple(operands), axes=tuple(axes), units=tuple(units))
    result = []
    for counts, axis in zip(jax.device_get(counted), axes, strict=True):
        wide = {k: v.astype(np.int64) for k, v in counts.items()}
        if axis is None:
            wide = {k: v.sum(keepdims=True) for k, v in wide.items()}
        result.append({k: v.tolist() for k, v in wide.items()})
    return result


@functools.partial(jax.jit, static_argnames=("axes", "units"))
def _tally(operands, *, axes, units) -> list[dict[str, jax.Array]]:
    """Counts along the axis of layers, or along axis 0: a whole leaf may pass 2^31."""
    result = []
    for arrays, axis, unit in zip(operands, axes, units, strict=True):
        x, mask, before, ever = (front(array, axis) for array in arrays)
        there = is_nonzero(x)
        kept = there if mask is None else mask
        counts = {"kept": slice_counts(kept)}
        if mask is not None:
            over = jnp.logical_and(there, jnp.logical_not(mask))
            counts |= {"nonzero": slice_counts(there), "outside": slice_counts(over)}
        if before is not None:
            added = jnp.logical_and(kept, jnp.logical_not(before))
            counts["added"] = slice_counts(added)
        if ever is not None:
            counts["explored"] = slice_counts(ever)
        stacks = axis is not None
        if unit is not None and arrays[0].ndim - stacks > 1:
            others = tuple(d for d in range(stacks, x.ndim) if d - stacks not in unit)
            alive = jnp.any(jnp.logical_and(kept, there), axis=others)
            counts["units"] = slice_counts(jnp.ones_like(alive))
            counts["empty_units"] = slice_counts(jnp.logical_not(alive))
        result.append(counts)
    return result


def front(array: Any, axis: int | None) -> Any:
    """A mask or weights with the axis of layers first; None for None."""
    if array is None:
        return None
    array = unpack(array)
    return jnp.moveaxis(array, axis or 0, 0) if array.ndim else array[None]


# --- records --------------------------------------------------------------------------
def _rows(leaf: Leaf, counts, price, seen: _Seen) -> list[Layer]:
    """The records of a leaf, one per layer."""
    name, slices, weights = leaf.name, leaf.copies, leaf.size
    width = np.dtype(leaf.dtype).itemsize
    removed, grown, passed = (
        _per_slice(numbers.get(name), leaf)
        for numbers in (seen.removed, seen.grown, seen.passed)
    )
    trained: Sequence[int | None] = [None] * slices
    if name in seen.trained:
        mask = np.asarray(unpack(seen.trained[name]))
        others = tuple(d for d in range(mask.ndim) if d != leaf.axis)
        trained = np.sum(mask, axis=others, dtype=np.int64).reshape(-1).tolist()
    rows = []
    for j in range(slices):
        found = {quantity: numbers[j] for quantity, numbers in counts.items()}
        rows.append(
            Layer(
                name=name if leaf.axis is None else f"{name}[{j}]",
                weights=weights,
                dense_bytes=weights * width,
                sparse_bytes=stored_bytes([(weights, found["kept"], width)]),
                dense_flops=_times(weights, price),
                kept_flops=_times(found["kept"], price),
                removed=removed[j],
                grown=grown[j],
                passed=passed[j],
                threshold=seen.thresholds.get(name),
                trained=trained[j],
                **found,
            )
        )
    return rows


def _per_slice(numbers: Any, leaf: Leaf) -> list[int | None]:
    """One number per layer; None if the state has one for all layers of a leaf."""
    slices = leaf.copies
    if numbers is None or (leaf.axis is not None and numbers.shape != (slices,)):
        return [None] * slices
    if leaf.axis is None:  # the state stacks layers, the report does not
        return [int(numbers.sum(dtype=np.int64))]
    return numbers.tolist()


def _total(layers, names, stored, seen: _Seen) -> Layer:
    sums = {}
    for field in ("weights", "kept", "dense_bytes"):
        sums[field] = sum(getattr(layer, field) for layer in layers)
    known = ("dense_flops", "kept_flops", "units", "empty_units", "trained")
    for field in (*known, "nonzero", "outside"):
        sums[field] = _sum(getattr(layer, field) for layer in layers)
    for field in ("removed", "grown", "passed"):
        # From the state, since slices are None if it has one number for all of them.
        numbers = (getattr(seen, field).get(name) for name in names)
        sums[field] = _sum(n if n is None else int(n.sum()) for n in numbers)
    for field in ("added", "explored"):
        # Known for all layers or not at all.
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
    cost = plain(count * price)
    return cost if isinstance(cost, int) else float(cost)
