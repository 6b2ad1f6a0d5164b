"""Matrix products and convolutions: here units come and go.

An index that is summed over is needed where neither operand is zero along it. Where an
operand is known and the other exact, it is left out and what it adds is computed once.
An output that no moving input feeds is known.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    as_numbers,
    constant_along,
    everything,
    filled,
    is_number,
    length,
    lengths,
    number_type,
    plain,
    wide,
)
from sparse_optax.export.compaction.program import Equation, Value
from sparse_optax.export.compaction.rule import NoRule, Rule

Boxes = list[Box | None]

# To take an entry of an activation costs about as much as so many multiply-adds.
TAKE = 40


def _summed(
    facts: Facts,
    key: tuple[Value, int],
    live: np.ndarray,
    at_hand: np.ndarray,
    products: int,
) -> np.ndarray | None:
    """The indices over which a sum goes: those that are live; with them those at hand,
    if to leave them out costs more than it saves; and more, up to a round number.
    ``products`` is how many multiply-adds an index costs for one entry.
    """
    if facts.settings.keep_all:
        return None
    kept = live | facts.sums.get(key, np.zeros(len(live), bool))
    if not kept.any():
        kept[0] = True  # an array has one entry at least
    spare = int((at_hand & ~kept).sum())
    dear = facts.settings.spare_takes and spare * products <= TAKE * int(kept.sum())
    if facts.settings.in_place or (dear and key not in facts.least_sums):
        kept |= at_hand
    size, multiple = int(kept.sum()), facts.settings.round_to
    least = max(size + -size % multiple, facts.least_sums.get(key, 0))
    kept = filled(kept, least, at_hand)  # first with what is there anyway
    facts.sums[key] = kept
    return plain(kept)


# --- matrix products ------------------------------------------------------------------
class _Side(NamedTuple):
    """One operand of a matrix product."""

    value: Value
    summed: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    out: int  # the first axis of the result that is a free axis of it


def _sides(eqn: Equation) -> tuple[_Side, _Side]:
    """Both operands, with the axes of the result."""
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    made, start = [], len(left_batch)
    for value, summed, batch in zip(
        eqn.inputs, (left, right), (left_batch, right_batch), strict=True
    ):
        gone = {*summed, *batch}
        free = tuple(i for i in range(len(value.shape)) if i not in gone)
        made.append(_Side(value, tuple(summed), tuple(batch), free, start))
        start += len(free)
    return made[0], made[1]


def _weights(facts: Facts, sides: Sequence[_Side]) -> tuple[_Side, _Side] | None:
    """The moving and the exact operand; None if both move."""
    exact = [x.value in facts.exact for x in sides]
    if exact == [False, True]:
        return sides[0], sides[1]
    if exact == [True, False]:
        return sides[1], sides[0]
    return None


def _dot_known(eqn: Equation, facts: Facts) -> list[Known]:
    sides = _sides(eqn)
    out, found = eqn.outputs[0], {}
    for side in sides:  # zero times anything
        axes = [*enumerate(side.batch), *enumerate(side.free, side.out)]
        for out_axis, axis in axes:
            if is_number(out.shape[out_axis]):
                _add_zeros(found, out_axis, facts.zeros(side.value, axis), out)
    pair = _weights(facts, sides)
    if pair is not None and _numbered(pair):
        _add_unfed(found, facts, out, *pair)
    return [found]


def _numbered(pair: Sequence[_Side]) -> bool:
    """Whether the lengths that count are numbers."""
    moving, exact = pair
    axes = (*moving.summed, *moving.batch)
    return all(is_number(moving.value.shape[i]) for i in axes) and all(
        map(is_number, exact.value.shape)
    )


def _add_zeros(found: Known, axis: int, zeros: np.ndarray, out: Value) -> None:
    if zeros.any():
        old = found.get(axis)
        mask = zeros if old is None else zeros | old.mask
        found[axis] = Slices(mask, np.zeros(len(mask), number_type(out.dtype)))


def _add_unfed(
    found: Known, facts: Facts, out: Value, moving: _Side, exact: _Side
) -> None:
    """Outputs that no moving input feeds."""
    value = exact.value
    order = (*exact.batch, *exact.summed, *exact.free)
    sides = [value.shape[i] for i in order]
    batch, summed = len(exact.batch), len(exact.summed)
    shape = (
        math.prod(sides[:batch]),
        math.prod(sides[batch : batch + summed]),
        math.prod(sides[batch + summed :]),
    )
    weights = as_numbers(facts.exact[value])
    assert weights is not None
    weights = weights.transpose(order).reshape(shape)
    live = facts.nonzero(value).transpose(order).reshape(shape)
    inputs = facts.grid(moving.value, (*moving.batch, *moving.summed))
    mask, number = (x.reshape(shape[:2]) for x in inputs)
    unfed, number = _unfed(weights, live, mask, number)
    result = sides[:batch] + sides[batch + summed :]
    number = number.astype(number_type(out.dtype))
    grid = Slices(unfed.reshape(result), number.reshape(result))
    axes = [*range(batch), *range(exact.out, exact.out + len(exact.free))]
    for place, axis in enumerate(axes):
        slices = constant_along(grid, place)
        if slices.mask.any():
            found[axis] = slices


def _unfed(
    weights: np.ndarray, live: np.ndarray, mask: np.ndarray, number: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which outputs no unknown input feeds, and their number. Weights have the axes
    (batch, inputs, outputs), ``mask`` and ``number`` (batch, inputs).
    """
    moves = (~mask).astype(np.float32)[:, None] @ live.astype(np.float32)
    if (mask & (number != 0)).any():
        known = np.where(mask, wide(number), np.zeros_like(wide(number)))
        values = (known[:, None] @ wide(weights))[:, 0]
    else:
        values = np.zeros((len(weights), weights.shape[2]))
    return moves[:, 0] == 0, values


def _dot_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    box, sides = boxes[0], _sides(eqn)
    assert box is not None
    wanted = _operands(sides, box)
    real = _operands(sides, facts.really(eqn.outputs[0], box))
    left, right = sides
    for place, (a, b) in enumerate(zip(left.summed, right.summed, strict=True)):
        if not is_number(left.value.shape[a]) or not is_number(right.value.shape[b]):
            continue
        kept = _summed_in_dot(eqn, facts, sides, real, place)
        wanted[0][a] = wanted[1][b] = kept
    return [tuple(x) for x in wanted]


def _operands(sides: Sequence[_Side], box: Box) -> list[list[np.ndarray | None]]:
    """What a box of the result needs of each operand, for all that is summed over."""
    wanted = [list(everything(side.value)) for side in sides]
    for side, own in zip(sides, wanted, strict=True):
        for i, axis in enumerate(side.batch):
            own[axis] = box[i]
        for i, axis in enumerate(side.free, side.out):
            own[axis] = box[i]
    return wanted


def _summed_in_dot(
    eqn: Equation,
    facts: Facts,
    sides: tuple[_Side, _Side],
    wanted: list[list[np.ndarray | None]],
    place: int,
) -> np.ndarray | None:
    """The indices of one pair of axes over which a product sums."""
    axes = [side.summed[place] for side in sides]
    live = np.ones(sides[0].value.shape[axes[0]], bool)
    for side, own, axis in zip(sides, wanted, axes, strict=True):
        live &= ~_never(facts, side.value, tuple(own), axis)
    key, pair = (eqn.outputs[0], place), _weights(facts, sides)
    if pair is None:
        return _summed(facts, key, live, np.zeros(len(live), bool), 1)
    moving, exact = pair
    axis = moving.summed[place]
    simple = len(moving.summed) == 1 and not moving.batch and _numbered(pair)
    if simple and facts.settings.fold:
        live &= ~facts.along(moving.value, axis).mask
    own = wanted[0] if exact is sides[0] else wanted[1]
    outs = [length(own[i], exact.value.shape[i]) for i in exact.free]
    products = math.prod(outs) if all(map(is_number, outs)) else TAKE
    if len(moving.summed) > 1:  # the product of several index sets; kept simple
        products = TAKE * len(live)
    return _summed(facts, key, live, facts.there(moving.value, axis), products)


def _never(facts: Facts, value: Value, box: Box, axis: int) -> np.ndarray:
    """Which slices along an axis add nothing: they are zero wherever they are needed.
    A moving value that is zero now may become another number as biases learn.
    """
    if value not in facts.exact:
        zeros = facts.zeros(value, axis)
        return zeros if facts.settings.fold else np.zeros_like(zeros)
    live = facts.nonzero(value)
    for i, mask in enumerate(box):
        if i != axis and mask is not None:
            live = live.compress(mask, i)
    return ~any_along(live, axis)


def _dot_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    y = eqn.primitive.bind(*inputs, **eqn.params)
    added = _fold(eqn, boxes, facts, _dot_fold)
    return [y if added is None else y + added]


def _fold(eqn: Equation, boxes: Boxes, facts: Facts, compute: Any) -> Any:
    """What inputs that were left out add; None for nothing."""
    out = eqn.outputs[0]
    if not facts.settings.fold:  # then what is left out meets weights that are zero
        return None
    if out not in facts.folds:
        facts.folds[out] = compute(eqn, boxes[0], facts)
    return facts.folds[out]


def _left_out(
    facts: Facts, moving: Value, axis: int, target: Box
) -> tuple[np.ndarray, np.ndarray]:
    """Which known inputs a sum leaves out, and their numbers."""
    slices = facts.along(moving, axis)
    kept = as_mask(target[axis], len(slices.mask))
    return slices.mask & ~kept & (slices.number != 0), slices.number


def _dot_fold(eqn: Equation, box: Box, facts: Facts) -> np.ndarray | None:
    sides = _sides(eqn)
    pair = _weights(facts, sides)
    if pair is None or len(pair[0].summed) != 1 or pair[0].batch:
        return None
    moving, exact = pair
    axis, targets = moving.summed[0], facts.targets[eqn.outputs[0]]
    target = targets[0] if moving is sides[0] else targets[1]
    assert target is not None
    if not is_number(moving.value.shape[axis]):
        return None
    gone, number = _left_out(facts, moving.value, axis, target)
    if not gone.any():
        return None
    weights = as_numbers(facts.exact[exact.value])
    assert weights is not None
    weights = np.moveaxis(weights, exact.summed[0], 0)[gone]
    for i in range(len(exact.free)):
        mask = box[exact.out + i]
        if mask is not None:
            weights = weights.compress(mask, i + 1)
    added = np.tensordot(wide(number[gone]), wide(weights), 1)
    if not added.any():
        return None
    after = len(box) - exact.out - len(exact.free)
    dtype = number_type(eqn.outputs[0].dtype)
    return added.astype(dtype).reshape((1,) * exact.out + added.shape + (1,) * after)


DOT = Rule(_dot_known, _dot_needed, _dot_small)


# --- convolutions ---------------------------------------------------------------------
class _Convolution(NamedTuple):
    """The axes of a convolution, and its groups."""

    batch: int  # of the images
    feature: int
    inputs: int  # of the kernel
    outputs: int
    out_batch: int  # of the result
    out_feature: int
    groups: int
    uneven: bool  # whether zeros stand between or around the entries of an image


def _convolution(eqn: Equation) -> _Convolution:
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    if params["batch_group_count"] != 1:
        raise NoRule("a convolution in groups of the batch")
    features = [eqn.inputs[0].shape[numbers.lhs_spec[1]], *eqn.inputs[1].shape]
    if not all(map(is_number, features)):
        raise NoRule("a kernel or features of symbolic size")
    padded = any(tuple(x) != (0, 0) for x in params["padding"])
    spread = any(x != 1 for x in params["lhs_dilation"] or ())
    return _Convolution(
        batch=numbers.lhs_spec[0],
        feature=numbers.lhs_spec[1],
        inputs=numbers.rhs_spec[1],
        outputs=numbers.rhs_spec[0],
        out_batch=numbers.out_spec[0],
        out_feature=numbers.out_spec[1],
        groups=params["feature_group_count"],
        uneven=padded or spread,
    )


def _kernel(array: np.ndarray, conv: _Convolution) -> np.ndarray:
    """A kernel as (groups, inputs of a group, outputs of a group, window)."""
    array = np.moveaxis(array, (conv.outputs, conv.inputs), (0, 1))
    array = array.reshape(conv.groups, -1, array.shape[1], math.prod(array.shape[2:]))
    return array.transpose(0, 2, 1, 3)


def _conv_known(eqn: Equation, facts: Facts) -> list[Known]:
    conv, (images, kernel) = _convolution(eqn), eqn.inputs
    out, found = eqn.outputs[0], {}
    _add_zeros(found, conv.out_feature, facts.zeros(kernel, conv.outputs), out)
    if is_number(images.shape[conv.batch]):
        _add_zeros(found, conv.out_batch, facts.zeros(images, conv.batch), out)
    if kernel in facts.exact and images not in facts.exact:
        array = as_numbers(facts.exact[kernel])
        assert array is not None
        inputs = facts.along(images, conv.feature)
        # Of a number other than zero the edges of the result differ from its middle.
        usable = inputs.mask & (inputs.number == 0) if conv.uneven else inputs.mask
        unfed, number = _unfed(
            _kernel(wide(array), conv).sum(3),
            np.asarray(_kernel(facts.nonzero(kernel), conv).any(3)),
            usable.reshape(conv.groups, -1),
            inputs.number.reshape(conv.groups, -1),
        )
        slices = Slices(
            unfed.reshape(-1), number.reshape(-1).astype(number_type(out.dtype))
        )
        if slices.mask.any():
            found[conv.out_feature] = slices
    return [found]


def _conv_needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    conv, (images, kernel), box = _convolution(eqn), eqn.inputs, boxes[0]
    assert box is not None
    image_box, kernel_box = list(everything(images)), list(everything(kernel))
    image_box[conv.batch] = box[conv.out_batch]
    outs = box[conv.out_feature]
    for i, mask in enumerate(box):
        if mask is not None and i not in (conv.out_batch, conv.out_feature):
            facts.widen(eqn.outputs[0], i, None)
    if conv.groups > 1:
        outs, inputs = _whole_groups(eqn, facts, conv, outs)
        facts.widen(eqn.outputs[0], conv.out_feature, outs)
        image_box[conv.feature], kernel_box[conv.outputs] = inputs, outs
        return [tuple(image_box), tuple(kernel_box)]
    real = facts.really(eqn.outputs[0], box)[conv.out_feature]
    kernel_box[conv.outputs] = real
    live = ~_never(facts, kernel, tuple(kernel_box), conv.inputs)
    kernel_box[conv.outputs] = outs
    live &= ~_never(facts, images, tuple(image_box), conv.feature)
    learned = kernel in facts.exact and images not in facts.exact
    if learned and facts.settings.fold:
        places = [n for i, n in enumerate(images.shape) if i != conv.batch]
        if all(map(is_number, places)) or not conv.uneven:
            live &= ~facts.along(images, conv.feature).mask
    window = math.prod(n for i, n in enumerate(kernel.shape) if i != conv.inputs)
    share = length(outs, kernel.shape[conv.outputs]) / kernel.shape[conv.outputs]
    there = facts.there(images, conv.feature)
    key = (eqn.outputs[0], 0)
    kept = _summed(facts, key, live, there, int(window * share))
    image_box[conv.feature] = kernel_box[conv.inputs] = kept
    return [tuple(image_box), tuple(kernel_box)]


def _whole_groups(
    eqn: Equation, facts: Facts, conv: _Convolution, outs: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Outputs and inputs of the groups of which an output is needed."""
    if outs is None:
        return None, None
    kept = outs.reshape(conv.groups, -1).any(1)
    sizes = (len(outs), eqn.inputs[0].shape[conv.feature])
    made = [np.repeat(kept, n // conv.groups) for n in sizes]
    return plain(made[0]), plain(made[1])


def _conv_small(
    eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts
) -> list[Any]:
    conv, target = _convolution(eqn), facts.targets[eqn.outputs[0]][0]
    assert target is not None
    params = dict(eqn.params)
    if conv.groups > 1:
        n = eqn.inputs[0].shape[conv.feature]
        left = length(target[conv.feature], n)
        params["feature_group_count"] = left // (n // conv.groups)
    y = eqn.primitive.bind(*inputs, **params)
    added = _fold(eqn, boxes, facts, _conv_fold)
    return [y if added is None else y + added]


def _conv_fold(eqn: Equation, box: Box, facts: Facts) -> np.ndarray | None:
    """The same convolution of the numbers that were left out: a map over the image."""
    conv, (images, kernel) = _convolution(eqn), eqn.inputs
    target = facts.targets[eqn.outputs[0]][0]
    assert target is not None
    if conv.groups > 1 or kernel not in facts.exact or images in facts.exact:
        return None
    gone, number = _left_out(facts, images, conv.feature, target)
    if not gone.any():
        return None
    array = as_numbers(facts.exact[kernel])
    assert array is not None
    array = array.compress(gone, conv.inputs)
    outs = box[conv.out_feature]
    if outs is not None:
        array = array.compress(outs, conv.outputs)
    if not array.any():
        return None
    if not conv.uneven:
        axes = tuple(
            i for i in range(array.ndim) if i not in (conv.inputs, conv.outputs)
        )
        sums = wide(array).sum(axes)
        if conv.inputs > conv.outputs:
            sums = sums.T
        sides = [1] * len(box)
        sides[conv.out_feature] = -1
        added = (wide(number[gone]) @ sums).reshape(sides)
        return added.astype(number_type(eqn.outputs[0].dtype))
    return _map(eqn, conv, number[gone], array)


def _map(
    eqn: Equation, conv: _Convolution, number: np.ndarray, kernel: np.ndarray
) -> np.ndarray:
    sides = [n if is_number(n) else 1 for n in eqn.inputs[0].shape]
    sides[conv.batch], sides[conv.feature] = 1, len(number)
    line = [1] * len(sides)
    line[conv.feature] = -1
    image = np.broadcast_to(number.reshape(line), sides)
    with jax.ensure_compile_time_eval():
        y = eqn.primitive.bind(jnp.asarray(image), jnp.asarray(kernel), **eqn.params)
        return np.asarray(y)


CONVOLUTION = Rule(_conv_known, _conv_needed, _conv_small)


# --- cost -----------------------------------------------------------------------------
def multiply_adds(eqn: Equation, boxes: Sequence[Box], out: Box) -> int | None:
    """Multiply-adds of a product or convolution with operands cut to boxes; None if a
    length is symbolic.
    """
    shapes = [lengths(b, x.shape) for b, x in zip(boxes, eqn.inputs, strict=True)]
    result = lengths(out, eqn.outputs[0].shape)
    if not all(map(is_number, (*result, *shapes[0], *shapes[1]))):
        return None
    if eqn.name == "dot_general":
        terms = [shapes[0][i] for i in eqn.params["dimension_numbers"][0][0]]
    else:
        outputs = eqn.params["dimension_numbers"].rhs_spec[0]
        terms = [n for i, n in enumerate(shapes[1]) if i != outputs]
    return math.prod(result) * math.prod(terms)
