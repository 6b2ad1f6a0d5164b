"""Operations that go along whole axes: sums, windows, sorts, running sums.

The axes along which they go are whole; along the others they do nothing, and there
index sets pass through. So a softmax or a norm keeps all of the axis it normalises.
"""

import math
from typing import Any

import numpy as np

from sparse_optax.export.compaction.facts import (
    Box,
    Facts,
    Known,
    Slices,
    everything,
    is_number,
    number_type,
)
from sparse_optax.export.compaction.program import Equation
from sparse_optax.export.compaction.rule import Rule

Boxes = list[Box | None]

REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and")
REDUCTIONS = (*REDUCTIONS, "reduce_or", "argmax", "argmin")
WINDOWS = ("reduce_window_sum", "reduce_window_max", "reduce_window_min")
RUNNING = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


# --- over axes ------------------------------------------------------------------------
def _left(eqn: Equation) -> list[int]:
    """The axes that a reduction leaves."""
    gone = set(eqn.params["axes"])
    return [i for i in range(len(eqn.inputs[0].shape)) if i not in gone]


def _reduce_known(eqn: Equation, facts: Facts) -> list[Known]:
    value, found = eqn.inputs[0], {}
    lengths = [value.shape[i] for i in eqn.params["axes"]]
    n = math.prod(lengths) if all(map(is_number, lengths)) else None
    for out_axis, axis in enumerate(_left(eqn)):
        if not is_number(value.shape[axis]):
            continue
        slices = facts.along(value, axis)
        if eqn.name == "reduce_sum":
            slices = _times(slices, n)
        elif eqn.name not in ("reduce_max", "reduce_min", "reduce_and", "reduce_or"):
            continue
        if slices.mask.any():
            found[out_axis] = slices
    return [found]


def _times(slices: Slices, n: int | None) -> Slices:
    """The sum of n slices; of an unknown number of them only zero stays."""
    if n is None:
        return Slices(slices.mask & (slices.number == 0), slices.number)
    number = (slices.number * n).astype(slices.number.dtype)
    return Slices(slices.mask, number)


def _reduce_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    box, wanted = boxes[0], list(everything(eqn.inputs[0]))
    assert box is not None
    for out_axis, axis in enumerate(_left(eqn)):
        wanted[axis] = box[out_axis]
    return [tuple(wanted)]


def _bind(eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts) -> list[Any]:
    result = eqn.primitive.bind(*inputs, **eqn.params)
    return list(result) if eqn.primitive.multiple_results else [result]


REDUCE = Rule(_reduce_known, _reduce_needed, _bind)


# --- over windows ---------------------------------------------------------------------
def _trivial(eqn: Equation, axis: int) -> bool:
    """Whether a window is one entry along an axis, and moves by one."""
    params = eqn.params
    ones = [params["window_dimensions"], params["window_strides"]]
    ones += [params.get("base_dilation"), params.get("window_dilation")]
    if any(x is not None and tuple(x)[axis] != 1 for x in ones):
        return False
    return tuple(params["padding"][axis]) == (0, 0)


def _window_known(eqn: Equation, facts: Facts) -> list[Known]:
    value, params, found = eqn.inputs[0], eqn.params, {}
    sides = params["window_dimensions"]
    for axis, n in enumerate(value.shape):
        if not is_number(n) or not _trivial(eqn, axis):
            continue
        slices = facts.along(value, axis)
        padded = any(tuple(x) != (0, 0) for x in params["padding"])
        spread = any(x != 1 for x in params.get("base_dilation") or ())
        if eqn.name == "reduce_window_sum":
            slices = _times(slices, None if padded or spread else math.prod(sides))
        elif spread or any(
            max(map(int, pad)) >= side
            for pad, side in zip(params["padding"], sides, strict=True)
        ):
            continue  # a window may see nothing but padding
        if slices.mask.any():
            found[axis] = slices
    return [found]


def _window_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    box, wanted = boxes[0], list(everything(eqn.inputs[0]))
    assert box is not None
    for axis, mask in enumerate(box):
        if _trivial(eqn, axis):
            wanted[axis] = mask
        elif mask is not None:
            facts.widen(eqn.outputs[0], axis, None)
    return [tuple(wanted)]


WINDOW = Rule(_window_known, _window_needed, _bind)


# --- along one axis -------------------------------------------------------------------
def _along(eqn: Equation) -> int:
    """The axis along which a running operation or a sort goes."""
    params = eqn.params
    return params["axis"] if "axis" in params else params["dimension"]


def _running_known(eqn: Equation, facts: Facts) -> list[Known]:
    made = []
    for value in eqn.inputs:
        found = {}
        for axis, n in enumerate(value.shape):
            if is_number(n) and axis != _along(eqn):
                zeros = facts.zeros(value, axis)
                if zeros.any() and eqn.name == "cumsum":
                    numbers = np.zeros(n, number_type(value.dtype))
                    found[axis] = Slices(zeros, numbers)
        made.append(found)
    return made


def _running_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    box = None
    for own in boxes:  # a sort moves all of its operands alike
        if own is not None:
            box = (
                own
                if box is None
                else tuple(
                    None if a is None or b is None else a | b
                    for a, b in zip(box, own, strict=True)
                )
            )
    assert box is not None
    axis = _along(eqn)
    whole = (*box[:axis], None, *box[axis + 1 :])
    for out in eqn.outputs:
        facts.need[out] = whole
    return [whole] * len(eqn.inputs)


ALONG = Rule(_running_known, _running_needed, _bind)
