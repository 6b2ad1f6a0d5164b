"""Operations that put entries at other places: reshape, slice, pad, concatenate, ..."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.export.compaction.facts import (
    Box,
    Facts,
    Known,
    Slices,
    any_along,
    as_mask,
    constant_along,
    crossed,
    cut,
    everything,
    is_number,
    length,
    lengths,
    plain,
    take,
    union,
)
from sparse_optax.export.compaction.program import Equation, Value
from sparse_optax.export.compaction.rule import NoRule, Rule

Boxes = list[Box | None]


def _moved(facts: Facts, value: Value, axes: dict[int, int]) -> Known:
    """What is known of a result whose axes, the keys, are axes of an operand."""
    found = {}
    for out_axis, axis in axes.items():
        if is_number(value.shape[axis]):
            slices = facts.along(value, axis)
            if slices.mask.any():
                found[out_axis] = slices
    return found


# --- transpose, squeeze, broadcast ----------------------------------------------------
def _axes(eqn: Equation) -> dict[int, int]:
    """For axes of the result the axis of the operand that they are."""
    params, shape = eqn.params, eqn.inputs[0].shape
    if eqn.name == "transpose":
        return dict(enumerate(params["permutation"]))
    if eqn.name == "squeeze":
        gone = {axis % len(shape) for axis in params["dimensions"]}
        return dict(enumerate(i for i in range(len(shape)) if i not in gone))
    if eqn.name == "expand_dims":
        new = {axis % len(eqn.outputs[0].shape) for axis in params["dimensions"]}
        left = [i for i in range(len(eqn.outputs[0].shape)) if i not in new]
        return {out: i for i, out in enumerate(left)}
    return {  # broadcast_in_dim
        out: axis
        for axis, out in enumerate(params["broadcast_dimensions"])
        if _same(shape[axis], eqn.outputs[0].shape[out])
    }


def _same(a: Any, b: Any) -> bool:
    """Whether two lengths are the same, also where they are symbolic."""
    return is_number(a) == is_number(b) and bool(a == b)


def _axes_known(eqn: Equation, facts: Facts) -> list[Known]:
    value, out = eqn.inputs[0], eqn.outputs[0]
    if not value.shape and value in facts.exact:
        number = np.asarray(facts.exact[value])
        return [
            {
                i: Slices(np.ones(n, bool), np.broadcast_to(number, n))
                for i, n in enumerate(out.shape)
                if is_number(n)
            }
        ]
    found = _moved(facts, value, _axes(eqn))
    # A slice of an axis that is new, or repeats, has all of the operand.
    rest = [i for i in range(len(out.shape)) if i not in _axes(eqn)]
    if eqn.name == "broadcast_in_dim" and value in facts.exact and rest:
        number = np.asarray(facts.exact[value]).reshape(-1)
        if len(number) and (number == number[0]).all():
            for i in rest:
                if is_number(n := out.shape[i]):
                    found[i] = Slices(np.ones(n, bool), np.full(n, number[0]))
    return [found]


def _axes_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    box, wanted = boxes[0], list(everything(eqn.inputs[0]))
    assert box is not None
    for out_axis, axis in _axes(eqn).items():
        wanted[axis] = box[out_axis]
    return [tuple(wanted), *(everything(x) for x in eqn.inputs[1:])]


def _axes_small(eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts) -> list:
    box, x = boxes[0], inputs[0]
    assert box is not None
    shape = lengths(box, eqn.outputs[0].shape)
    if eqn.name == "broadcast_in_dim":
        axes = eqn.params["broadcast_dimensions"]
        return [jax.lax.broadcast_in_dim(x, shape, axes)]
    return [eqn.primitive.bind(x, **eqn.params)]


AXES = Rule(_axes_known, _axes_needed, _axes_small)


# --- reshape --------------------------------------------------------------------------
def groups(
    before: Sequence[Any], after: Sequence[Any]
) -> Iterator[tuple[list[int], list[int]]]:
    """Axes before and after a reshape that hold the same entries, group by group."""
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = [], []
        a, b = 1, 1
        if i < len(before):
            a, i = before[i], i + 1
            left.append(i - 1)
        if j < len(after):
            b, j = after[j], j + 1
            right.append(j - 1)
        while not _same(a, b):
            smaller_left = _is_smaller(a, b)
            if smaller_left and i < len(before):
                a, i = a * before[i], i + 1
                left.append(i - 1)
            elif not smaller_left and j < len(after):
                b, j = b * after[j], j + 1
                right.append(j - 1)
            else:
                raise NoRule("a reshape of a symbolic length")
        yield left, right


def _is_smaller(a: Any, b: Any) -> bool:
    """Whether the first product lacks factors; a symbolic one is the larger."""
    if is_number(a) and is_number(b):
        return a < b
    return is_number(a)


def _static(shape: Sequence[Any], axes: Sequence[int]) -> bool:
    return all(is_number(shape[axis]) for axis in axes)


def _reshape_known(eqn: Equation, facts: Facts) -> list[Known]:
    value, out = eqn.inputs[0], eqn.outputs[0]
    found: Known = {}
    for left, right in groups(value.shape, out.shape):
        if not (_static(value.shape, left) and _static(out.shape, right)):
            continue
        grid = facts.grid(value, left)
        if not grid.mask.any():
            continue
        sides = [out.shape[axis] for axis in right]
        grid = Slices(grid.mask.reshape(sides), grid.number.reshape(sides))
        for place, axis in enumerate(right):
            slices = constant_along(grid, place)
            if slices.mask.any():
                found[axis] = slices
    return [found]


def _reshape_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    value, out, box = eqn.inputs[0], eqn.outputs[0], boxes[0]
    assert box is not None
    wanted = list(everything(value))
    for left, right in groups(value.shape, out.shape):
        if all(box[axis] is None for axis in right):
            continue
        if not (_static(value.shape, left) and _static(out.shape, right)):
            for axis in right:
                facts.widen(out, axis, None)
            continue
        if len(left) > 1 and len(right) > 1:
            for axis in right:
                facts.widen(out, axis, None)
            continue
        if value in facts.at_hand and len(right) == 1:
            # All of it is there: entries are taken once, after the reshape.
            if facts.settings.in_place:
                facts.widen(out, right[0], None)
            continue
        mask = crossed([as_mask(box[axis], out.shape[axis]) for axis in right])
        grid = mask.reshape([value.shape[axis] for axis in left])
        for place, axis in enumerate(left):
            wanted[axis] = plain(any_along(grid, place))
        if facts.settings.in_place and len(right) == 1:
            there = [as_mask(wanted[axis], value.shape[axis]) for axis in left]
            facts.widen(out, right[0], plain(crossed(there).reshape(-1)))
    return [tuple(wanted), *(everything(x) for x in eqn.inputs[1:])]


def _reshape_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    value, out, box = eqn.inputs[0], eqn.outputs[0], boxes[0]
    have = facts.targets[out][0]
    assert box is not None
    assert have is not None
    shape = list(lengths(box, out.shape))
    places = {}
    for left, right in groups(value.shape, out.shape):
        # Several axes become one: the product of what is there of them, and of this
        # what is wanted.
        if len(right) == 1 and _static(value.shape, left):
            there = crossed([as_mask(have[axis], value.shape[axis]) for axis in left])
            there, wanted = there.reshape(-1), box[right[0]]
            shape[right[0]] = int(there.sum())
            if wanted is not None and (there != wanted).any():
                places[right[0]] = np.flatnonzero(wanted[there])
    x = jax.lax.reshape(inputs[0], shape)
    for axis, at in places.items():
        x = take(x, at, axis)
    return [x]


RESHAPE = Rule(_reshape_known, _reshape_needed, _reshape_small)


# --- slice, split, reverse ------------------------------------------------------------
def _ranges(eqn: Equation) -> list[dict[int, slice]]:
    """For each output the axes along which it is a part of the operand."""
    params, shape = eqn.params, eqn.inputs[0].shape
    if eqn.name == "rev":
        return [{axis: slice(None, None, -1) for axis in params["dimensions"]}]
    if eqn.name == "split":
        stops = np.cumsum(params["sizes"]).tolist()
        starts = [0, *stops[:-1]]
        pairs = zip(starts, stops, strict=True)
        return [{params["axis"]: slice(a, b)} for a, b in pairs]
    steps = params["strides"] or (1,) * len(shape)
    limits = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
    found = {}
    for axis, (start, stop, step) in enumerate(limits):
        if _same(start, 0) and _same(stop, shape[axis]) and _same(step, 1):
            continue
        if not all(map(is_number, (start, stop, step, shape[axis]))):
            raise NoRule("a part of a symbolic length")
        found[axis] = slice(int(start), int(stop), int(step))
    return [found]


def _slice_known(eqn: Equation, facts: Facts) -> list[Known]:
    value, made = eqn.inputs[0], []
    for out, ranges in zip(eqn.outputs, _ranges(eqn), strict=True):
        facts.roots[out] = facts.roots.get(value, value)
        known = _moved(facts, value, {i: i for i in range(len(value.shape))})
        for axis, part in ranges.items():
            if axis in known:
                known[axis] = Slices(*(x[part] for x in known[axis]))
        made.append(known)
    return made


def _slice_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    value, wanted = eqn.inputs[0], None
    for box, ranges in zip(boxes, _ranges(eqn), strict=True):
        if box is not None:
            own = _before(value, box, ranges)
            wanted = own if wanted is None else union(wanted, own)
    return [wanted]


def _before(value: Value, box: Box, ranges: dict[int, slice]) -> Box:
    """What a part of an operand needs of it."""
    wanted = list(box)
    for axis, part in ranges.items():
        mask = np.zeros(value.shape[axis], bool)
        mask[part] = True if box[axis] is None else box[axis]
        wanted[axis] = plain(mask)
    return tuple(wanted)


def _slice_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    value, made = eqn.inputs[0], []
    have = facts.targets[eqn.outputs[0]][0]
    assert have is not None
    for box, ranges in zip(boxes, _ranges(eqn), strict=True):
        if box is None:
            made.append(None)
            continue
        x = cut(inputs[0], have, _before(value, box, ranges))
        if eqn.name == "rev":
            x = jax.lax.rev(x, tuple(ranges))
        made.append(x)
    return made


SLICE = Rule(_slice_known, _slice_needed, _slice_small)


# --- pad ------------------------------------------------------------------------------
def _pads(eqn: Equation) -> dict[int, tuple[int, int, int]]:
    """The axes that are padded; they need a length that is a number."""
    config = eqn.params["padding_config"]
    pads = {i: tuple(map(int, x)) for i, x in enumerate(config) if tuple(x) != (0,) * 3}
    if not _static(eqn.inputs[0].shape, list(pads)):
        raise NoRule("padding along a symbolic length")
    return pads  # type: ignore[return-value]


def _inside(pad: tuple[int, int, int], n: int, total: int) -> tuple[np.ndarray, ...]:
    """Which places of a padded axis have entries of the operand, and which entries."""
    low, _, interior = pad
    at = low + np.arange(n) * (interior + 1)
    kept = (at >= 0) & (at < total)
    return at[kept], np.flatnonzero(kept)


def _pad_known(eqn: Equation, facts: Facts) -> list[Known]:
    value, filling, out = *eqn.inputs, eqn.outputs[0]
    pads, found = _pads(eqn), {}
    facts.roots[out] = facts.roots.get(value, value)
    if filling not in facts.exact:
        return [
            _moved(
                facts, value, {i: i for i in range(len(out.shape))} if not pads else {}
            )
        ]
    number = np.asarray(facts.exact[filling])
    for axis, n in enumerate(out.shape):
        if not is_number(n):
            continue
        inside = facts.along(value, axis)
        if any(other != axis for other in pads):
            same = inside.mask & (inside.number == number)
            inside = Slices(same, inside.number)
        mask, numbers = np.ones(n, bool), np.full(n, number)
        at, entries = _inside(pads.get(axis, (0, 0, 0)), value.shape[axis], n)
        mask[at], numbers[at] = inside.mask[entries], inside.number[entries]
        if mask.any():
            found[axis] = Slices(mask, numbers)
    return [found]


def _pad_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    value, out, box = eqn.inputs[0], eqn.outputs[0], boxes[0]
    assert box is not None
    wanted = list(box)
    for axis, pad in _pads(eqn).items():
        mask = box[axis]
        if mask is None:
            continue
        if pad[2] or min(pad[:2]) < 0:
            facts.widen(out, axis, None)
            wanted[axis] = None
            continue
        own = mask[pad[0] : pad[0] + value.shape[axis]].copy()
        if not own.any():  # nothing but padding; an array has one entry at least
            own[0] = True
            mask = mask.copy()
            mask[pad[0]] = True
            facts.widen(out, axis, plain(mask))
        wanted[axis] = plain(own)
    return [tuple(wanted), ()]


def _pad_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    out, box = eqn.outputs[0], boxes[0]
    assert box is not None
    config = [tuple(x) for x in eqn.params["padding_config"]]
    for axis, (low, high, _) in _pads(eqn).items():
        mask = box[axis]
        if mask is not None:
            n = out.shape[axis]
            config[axis] = (int(mask[:low].sum()), int(mask[n - high :].sum()), 0)
    return [jax.lax.pad(inputs[0], inputs[1], config)]


PAD = Rule(_pad_known, _pad_needed, _pad_small)


# --- concatenate ----------------------------------------------------------------------
def _concatenate_known(eqn: Equation, facts: Facts) -> list[Known]:
    axis, out, found = eqn.params["dimension"], eqn.outputs[0], {}
    for i, n in enumerate(out.shape):
        if not is_number(n):
            continue
        parts = [facts.along(x, i) for x in eqn.inputs]
        if i == axis:
            masks, numbers = zip(*parts, strict=True)
            slices = Slices(np.concatenate(masks), np.concatenate(numbers))
        else:
            slices = _all_same(parts)
        if slices.mask.any():
            found[i] = slices
    return [found]


def _concatenate_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    axis, out, box = eqn.params["dimension"], eqn.outputs[0], boxes[0]
    assert box is not None
    if box[axis] is None or not is_number(out.shape[axis]):
        return [(*box[:axis], None, *box[axis + 1 :]) for _ in eqn.inputs]
    parts = _parts(eqn, box[axis])
    # Parts of one value, as the shifted images of a convolution, are cut alike: what
    # this keeps besides costs less than to take other entries of each.
    together: dict[Any, np.ndarray] = {}
    keys = [(facts.roots.get(x, x), x.shape[axis]) for x in eqn.inputs]
    for key, part in zip(keys, parts, strict=True):
        together[key] = together[key] | part if key in together else part
    parts = [together[key] for key in keys]
    facts.widen(out, axis, plain(np.concatenate(parts)))
    return [
        (*box[:axis], plain(part), *box[axis + 1 :]) if part.any() else None
        for part in parts
    ]


def _parts(eqn: Equation, mask: np.ndarray) -> list[np.ndarray]:
    """The mask of a result as masks of its operands."""
    axis = eqn.params["dimension"]
    ends = np.cumsum([x.shape[axis] for x in eqn.inputs])[:-1]
    return np.split(mask, ends)


def _concatenate_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    kept = [x for x in inputs if x is not None]
    return [jnp.concatenate(kept, eqn.params["dimension"])]


CONCATENATE = Rule(_concatenate_known, _concatenate_needed, _concatenate_small)


def _stack_axes(eqn: Equation) -> dict[int, int]:
    """For axes of a stack the axis of an operand."""
    axis, n = eqn.params["axis"], len(eqn.outputs[0].shape)
    left = [i for i in range(n) if i != axis % n]
    return {out: i for i, out in enumerate(left)}


def _stack_known(eqn: Equation, facts: Facts) -> list[Known]:
    found = {}
    for out, axis in _stack_axes(eqn).items():
        if is_number(eqn.outputs[0].shape[out]):
            slices = _all_same([facts.along(x, axis) for x in eqn.inputs])
            if slices.mask.any():
                found[out] = slices
    return [found]


def _all_same(parts: Sequence[Slices]) -> Slices:
    """What several operands know alike."""
    number = parts[0].number
    same = np.logical_and.reduce([x.mask & (x.number == number) for x in parts])
    return Slices(same, number)


def _stack_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    box, axes = boxes[0], _stack_axes(eqn)
    assert box is not None
    own = tuple(box[out] for out in axes)
    kept = as_mask(box[eqn.params["axis"]], len(eqn.inputs))
    return [own if there else None for there in kept]


def _stack_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    kept = [x for x in inputs if x is not None]
    return [jnp.stack(kept, eqn.params["axis"])]


STACK = Rule(_stack_known, _stack_needed, _stack_small)


def _unstack_axes(eqn: Equation) -> dict[int, int]:
    """For axes of each output the axis of the operand."""
    axis, n = eqn.params["axis"], len(eqn.inputs[0].shape)
    return dict(enumerate(i for i in range(n) if i != axis % n))


def _unstack_known(eqn: Equation, facts: Facts) -> list[Known]:
    known = _moved(facts, eqn.inputs[0], _unstack_axes(eqn))
    return [dict(known) for _ in eqn.outputs]


def _unstack_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    value, axis = eqn.inputs[0], eqn.params["axis"]
    wanted = None
    for box in boxes:
        if box is not None:
            own = list(everything(value))
            for out, i in _unstack_axes(eqn).items():
                own[i] = box[out]
            wanted = tuple(own) if wanted is None else union(wanted, tuple(own))
    assert wanted is not None
    there = np.array([box is not None for box in boxes])
    return [(*wanted[:axis], plain(there), *wanted[axis + 1 :])]


def _unstack_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    have, axis = facts.targets[eqn.outputs[0]][0], eqn.params["axis"]
    assert have is not None
    rows = iter(jnp.unstack(inputs[0], axis=axis))
    own = (*have[:axis], *have[axis + 1 :])
    return [None if box is None else cut(next(rows), own, box) for box in boxes]


UNSTACK = Rule(_unstack_known, _unstack_needed, _unstack_small)


# --- gather: tables of embeddings -----------------------------------------------------
def _passing(eqn: Equation) -> dict[int, int]:
    """Axes of a gather's result that are whole axes of the table."""
    table, numbers = eqn.inputs[0], eqn.params["dimension_numbers"]
    batched = getattr(numbers, "operand_batching_dims", ())
    gone = {*numbers.collapsed_slice_dims, *batched}
    left = [axis for axis in range(len(table.shape)) if axis not in gone]
    sizes = eqn.params["slice_sizes"]
    return {
        out: axis
        for out, axis in zip(numbers.offset_dims, left, strict=True)
        if axis not in numbers.start_index_map
        and _same(sizes[axis], table.shape[axis])
        and is_number(sizes[axis])
    }


def _gather_known(eqn: Equation, facts: Facts) -> list[Known]:
    return [_moved(facts, eqn.inputs[0], _passing(eqn))]


def _gather_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    box, out = boxes[0], eqn.outputs[0]
    assert box is not None
    passing, wanted = _passing(eqn), list(everything(eqn.inputs[0]))
    for i, mask in enumerate(box):
        if i in passing:
            wanted[passing[i]] = mask
        elif mask is not None:
            facts.widen(out, i, None)
    return [tuple(wanted), everything(eqn.inputs[1])]


def _gather_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    sizes = list(eqn.params["slice_sizes"])
    have = facts.targets[eqn.outputs[0]][0]
    assert have is not None
    for axis, mask in enumerate(have):
        sizes[axis] = length(mask, sizes[axis])
    return [eqn.primitive.bind(*inputs, **eqn.params | {"slice_sizes": tuple(sizes)})]


GATHER = Rule(_gather_known, _gather_needed, _gather_small)


# --- parts at places that move --------------------------------------------------------
def _dynamic_axes(eqn: Equation) -> list[int]:
    """Axes along which a part at a moving place is whole."""
    value = eqn.inputs[0]
    part = eqn.outputs[0] if eqn.name == "dynamic_slice" else eqn.inputs[1]
    pairs = zip(value.shape, part.shape, strict=True)
    return [i for i, (n, m) in enumerate(pairs) if _same(n, m) and is_number(n)]


def _dynamic_known(eqn: Equation, facts: Facts) -> list[Known]:
    axes = {i: i for i in _dynamic_axes(eqn)}
    known = _moved(facts, eqn.inputs[0], axes)
    if eqn.name == "dynamic_slice":
        return [known]
    other = _moved(facts, eqn.inputs[1], axes)
    return [
        {
            i: Slices(
                known[i].mask & other[i].mask & (known[i].number == other[i].number),
                known[i].number,
            )
            for i in known.keys() & other.keys()
        }
    ]


def _dynamic_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    box, out, axes = boxes[0], eqn.outputs[0], _dynamic_axes(eqn)
    assert box is not None
    for i, mask in enumerate(box):
        if i not in axes and mask is not None:
            facts.widen(out, i, None)
    wanted = tuple(mask if i in axes else None for i, mask in enumerate(box))
    arrays = 1 if eqn.name == "dynamic_slice" else 2
    made: Boxes = [wanted] * arrays
    return made + [() for _ in eqn.inputs[arrays:]]


def _dynamic_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    have = facts.targets[eqn.outputs[0]][0]
    assert have is not None
    arrays = 1 if eqn.name == "dynamic_slice" else 2
    starts = inputs[arrays:]
    if arrays == 2:
        return [jax.lax.dynamic_update_slice(inputs[0], inputs[1], starts)]
    sides = [length(have[i], n) for i, n in enumerate(eqn.params["slice_sizes"])]
    return [jax.lax.dynamic_slice(inputs[0], starts, sides)]


DYNAMIC = Rule(_dynamic_known, _dynamic_needed, _dynamic_small)
