"""Operations that compute each entry from the entries at its place.

What is known stays known, and a result needs of each operand what is needed of it. So
the two sides of a sum have one index set.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.export.compaction.facts import (
    Box,
    Facts,
    Known,
    Slices,
    is_number,
    number_type,
)
from sparse_optax.export.compaction.program import Equation, Value
from sparse_optax.export.compaction.rule import Rule

NAMES = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy "
    "copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "igamma igammac imag integer_pow is_finite le lgamma log log1p log2 logistic lt "
    "max min mul ne neg nextafter not one_minus_square or polygamma population_count "
    "pow real reduce_precision rem round rsqrt select_n shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square "
    "stop_gradient sub tan tanh tie_in xor".split()
)
# What NumPy computes alike, without a compilation.
_IN_NUMPY: dict[str, Any] = {
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "or": np.bitwise_or,
    "sqrt": np.sqrt,
    "square": np.square,
    "stop_gradient": np.positive,
    "sub": np.subtract,
}


def _known(eqn: Equation, facts: Facts) -> list[Known]:
    out, found = eqn.outputs[0], {}
    for axis, n in enumerate(out.shape):
        if not is_number(n):
            continue
        slices = _along(eqn, axis, n, facts)
        if slices is not None and slices.mask.any():
            found[axis] = slices
    return [found]


def _along(eqn: Equation, axis: int, n: int, facts: Facts) -> Slices | None:
    """What is known of a result along one axis."""
    moving = [x for x in eqn.inputs if x not in facts.exact]
    product = eqn.name in ("mul", "and")
    if not product and not any(axis in facts.known.get(x, {}) for x in moving):
        return None
    operands = [_operand(x, axis, n, facts) for x in eqn.inputs]
    masks = [x.mask for x in operands]
    all_known = np.logical_and.reduce(masks)
    zero = np.zeros(n, bool)
    if product:  # zero times anything finite
        for x in operands:
            zero |= x.mask & (x.number == 0)
    chosen, picked = _chosen(eqn, operands)
    if not (all_known | zero | chosen).any():
        return None
    number = _numbers(eqn, operands, all_known)
    number = np.where(chosen, picked, number) if chosen.any() else number
    return Slices(
        all_known | zero | chosen, np.where(zero, np.zeros_like(number), number)
    )


def _operand(value: Value, axis: int, n: int, facts: Facts) -> Slices:
    """What is known of an operand along an axis of the result."""
    if not value.shape:
        if value in facts.exact:
            number = np.asarray(facts.exact[value])
            return Slices(np.ones(n, bool), np.broadcast_to(number, n))
        return Slices(np.zeros(n, bool), np.zeros(n, number_type(value.dtype)))
    found = facts.along(value, axis)
    return Slices(np.broadcast_to(found.mask, n), np.broadcast_to(found.number, n))


def _chosen(eqn: Equation, operands: list[Slices]) -> tuple[np.ndarray, np.ndarray]:
    """Where a selection gives a known case, by what is known of its predicate, or as
    all cases are equal.
    """
    n = len(operands[0].mask)
    if eqn.name != "select_n":
        return np.zeros(n, bool), np.zeros(n)
    which, *cases = operands
    masks = np.stack([x.mask for x in cases])
    numbers = np.stack([x.number for x in cases])
    index = np.clip(which.number.astype(int), 0, len(cases) - 1)
    picked = np.take_along_axis(numbers, index[None], 0)[0]
    told = which.mask & np.take_along_axis(masks, index[None], 0)[0]
    equal = masks.all(0) & (numbers == numbers[:1]).all(0)
    return told | equal, np.where(told, picked, numbers[0])


def _numbers(eqn: Equation, operands: list[Slices], where: np.ndarray) -> np.ndarray:
    """The operation itself, on the numbers that are known."""
    dtype = number_type(eqn.outputs[0].dtype)
    if not where.any():
        return np.zeros(len(where), dtype)
    numbers = [np.where(where, x.number, np.ones_like(x.number)) for x in operands]
    if eqn.name in _IN_NUMPY:
        return np.asarray(_IN_NUMPY[eqn.name](*numbers), dtype)
    with jax.ensure_compile_time_eval():
        pairs = zip(numbers, eqn.inputs, strict=True)
        arrays = [jnp.asarray(x, v.dtype) for x, v in pairs]
        if eqn.name == "clamp":
            arrays[0], arrays[2] = arrays[0][0], arrays[2][0]
        return np.asarray(eqn.primitive.bind(*arrays, **eqn.params))


def _needed(eqn: Equation, boxes: list[Box | None], facts: Facts) -> list[Box | None]:
    box, shape = boxes[0], eqn.outputs[0].shape
    assert box is not None
    return [
        tuple(
            None if value.shape[i] != shape[i] else mask for i, mask in enumerate(box)
        )
        if value.shape
        else ()
        for value in eqn.inputs
    ]


def _small(
    eqn: Equation, inputs: list[Any], boxes: list[Box | None], facts: Facts
) -> list[Any]:
    return [eqn.primitive.bind(*inputs, **eqn.params)]


RULE = Rule(_known, _needed, _small)


def _same_known(eqn: Equation, facts: Facts) -> list[Known]:
    return [
        {i: facts.along(x, i) for i, n in enumerate(x.shape) if is_number(n)}
        for x in eqn.inputs
    ]


def _same_needed(
    eqn: Equation, boxes: list[Box | None], facts: Facts
) -> list[Box | None]:
    return list(boxes)


def _same_small(
    eqn: Equation, inputs: list[Any], boxes: list[Box | None], facts: Facts
) -> list[Any]:
    kept = [x for x in inputs if x is not None]
    results = iter(eqn.primitive.bind(*kept, **eqn.params) if kept else ())
    return [None if x is None else next(results) for x in inputs]


# ``optimization_barrier``: each output is an input.
SAME = Rule(_same_known, _same_needed, _same_small)
