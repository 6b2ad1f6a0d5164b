"""Operations with a program inside: loops without a carry, what is computed again in a
backward pass, and functions with a derivative of their own.

The body is analysed like a program. Of a derivative of its own the program is traced at
full size and cut like any other, so that it stays the derivative that was written.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.export.compaction.facts import (
    Box,
    Facts,
    Known,
    Slices,
    as_mask,
    covers,
    cut,
    is_number,
    number_type,
)
from sparse_optax.export.compaction.program import Equation, Value, trace
from sparse_optax.export.compaction.rule import Rule

Boxes = list[Box | None]


def _loops(eqn: Equation, i: int) -> bool:
    """Whether an input of a loop gives an entry of its leading axis at a time."""
    if eqn.name != "scan" or eqn.body is None:
        return False
    return len(eqn.inputs[i].shape) > len(eqn.body.inputs[i].shape)


def _known_of(facts: Facts, value: Value, shift: int) -> Known:
    """All that is known of a value, with axes counted from ``-shift``."""
    axes = [i for i, n in enumerate(value.shape) if is_number(n)]
    found = {i + shift: facts.along(value, i) for i in axes if i + shift >= 0}
    return {i: slices for i, slices in found.items() if slices.mask.any()}


def _known(eqn: Equation, facts: Facts) -> list[Known]:
    body = eqn.body
    assert body is not None
    inner: Any = type(facts)(body, facts.settings)
    for i, (outer, own) in enumerate(zip(eqn.inputs, body.inputs, strict=True)):
        if _loops(eqn, i):
            inner.known[own] = _known_of(facts, outer, -1)
            inner.origin[own] = facts.origin.get(outer, frozenset())
        else:
            facts.hand_over(outer, inner, own)
    inner.forward()
    facts.inner[eqn.outputs[0]] = inner
    shift = 1 if eqn.name == "scan" else 0
    return [_known_of(inner, own, shift) for own in body.outputs]


def _needed(eqn: Equation, boxes: Boxes, facts: Facts) -> Boxes:
    inner = facts.inner[eqn.outputs[0]]
    if eqn.name == "scan":
        for out, box in zip(eqn.outputs, boxes, strict=True):
            if box is not None and box[0] is not None:
                facts.widen(out, 0, None)
        boxes = [None if box is None else box[1:] for box in boxes]
    inner.backward(boxes)
    wanted: Boxes = []
    for i, own in enumerate(inner.program.inputs):
        box = inner.need.get(own)
        wanted.append((None, *box) if box is not None and _loops(eqn, i) else box)
    return wanted


def _small(eqn: Equation, inputs: list[Any], boxes: Boxes, facts: Facts) -> list[Any]:
    inner, params = facts.inner[eqn.outputs[0]], eqn.params
    if eqn.name == "scan":
        # Constants come first.
        consts = sum(not _loops(eqn, i) for i in range(len(inputs)))

        def step(_, x):
            return None, inner.run([*inputs[:consts], *x])

        options = {name: params[name] for name in ("length", "reverse", "unroll")}
        return jax.lax.scan(step, None, inputs[consts:], **options)[1]
    if eqn.name.startswith("custom_jvp"):
        return _with_pushforward(eqn, boxes, facts)(*inputs)
    if eqn.name.startswith("custom_vjp"):
        return _with_pullback(eqn, boxes, facts)(*inputs)
    options = {name: params[name] for name in ("policy", "prevent_cse")}
    return jax.checkpoint(lambda *xs: inner.run(xs), **options)(*inputs)


NESTED = Rule(_known, _needed, _small)


# --- derivatives ----------------------------------------------------------------------
def _differentiable(value: Value) -> bool:
    return jnp.issubdtype(value.dtype, jnp.inexact)


def _whole(value: Value) -> Any:
    return jax.ShapeDtypeStruct(value.shape, value.dtype)


def _filled(given: Sequence[Any], moves: Sequence[bool], values: Any) -> list[Any]:
    """Tangents of all values: those given, and between them those of integers."""
    rest = iter(given)
    return [
        next(rest) if m else np.zeros(x.shape, jax.dtypes.float0)
        for m, x in zip(moves, values, strict=True)
    ]


def _as_numbers(tangents: Sequence[Any]) -> list[Any]:
    """Tangents without those of integers, which no program takes."""
    return [jnp.zeros(()) if t.dtype == jax.dtypes.float0 else t for t in tangents]


def _with_pushforward(eqn: Equation, boxes: Boxes, facts: Facts) -> Any:
    """The small function of an operation, with its own forward derivative."""
    inner, targets = facts.inner[eqn.outputs[0]], facts.targets[eqn.outputs[0]]
    moves = [_differentiable(x) for x in eqn.inputs]

    def pushforward(primals, tangents):
        filled = _filled(tangents, moves, eqn.inputs)
        return _as_numbers(jax.jvp(eqn.call, primals, filled)[1])

    @jax.custom_jvp
    def call(*xs):
        return inner.run(xs)

    @call.defjvp
    def _(primals, tangents):
        outs = [box if _differentiable(x) else None for x, box in _pairs(eqn, boxes)]
        given = [t for t, m in zip(tangents, moves, strict=True) if m]
        own = [b for b, m in zip(targets, moves, strict=True) if m]
        variables = [x for x, m in zip(eqn.inputs, moves, strict=True) if m]
        made = _derivative(
            eqn, facts, pushforward, primals, given, variables, own, outs
        )
        results = call(*primals)
        tangents_out = [
            t if t is not None or y is None else np.zeros(y.shape, jax.dtypes.float0)
            for y, t in zip(results, made, strict=True)
        ]
        return results, tangents_out

    return call


def _with_pullback(eqn: Equation, boxes: Boxes, facts: Facts) -> Any:
    """The small function of an operation, with its own backward derivative."""
    inner, targets = facts.inner[eqn.outputs[0]], facts.targets[eqn.outputs[0]]
    moves = [_differentiable(x) for x in eqn.outputs]

    def pullback(primals, cotangents):
        filled = _filled(cotangents, moves, eqn.outputs)
        return _as_numbers(jax.vjp(eqn.call, *primals)[1](filled))

    @jax.custom_vjp
    def call(*xs):
        return inner.run(xs)

    def forward(*xs):
        return call(*xs), xs

    def backward(primals, cotangents):
        outs = [
            box if _differentiable(x) else None
            for x, box in zip(eqn.inputs, targets, strict=True)
        ]
        given = [t for t, m in zip(cotangents, moves, strict=True) if m]
        own = [b for b, m in zip(boxes, moves, strict=True) if m]
        variables = [x for x, m in zip(eqn.outputs, moves, strict=True) if m]
        made = _derivative(eqn, facts, pullback, primals, given, variables, own, outs)
        return tuple(made)

    call.defvjp(forward, backward)
    return call


def _pairs(eqn: Equation, boxes: Boxes) -> list[tuple[Value, Box | None]]:
    return list(zip(eqn.outputs, boxes, strict=True))


def _derivative(
    eqn: Equation,
    facts: Facts,
    function: Callable[..., Any],
    primals: Sequence[Any],
    given: Sequence[Any],
    variables: Sequence[Value],
    own: Boxes,
    outs: Boxes,
) -> list[Any]:
    """A derivative of an operation, cut to boxes. ``given`` are tangents in the boxes
    ``own`` of ``variables``; they are zero elsewhere.
    """
    targets = facts.targets[eqn.outputs[0]]
    program, _ = trace(
        function, [_whole(x) for x in eqn.inputs], [_whole(x) for x in variables]
    )
    inner: Any = type(facts)(program, facts.settings._replace(fold=True))
    n = len(eqn.inputs)
    for outer, value, box in zip(eqn.inputs, program.inputs[:n], targets, strict=True):
        if facts.settings.fold:
            facts.hand_over(outer, inner, value)
        else:  # numbers that are known now may change in training
            inner.known[value] = _zero_outside(value, box)
    for value, box in zip(program.inputs[n:], own, strict=True):
        inner.known[value] = _zero_outside(value, box)
    inner.forward()
    inner.backward(outs)
    have = [*targets, *own]
    if all(
        covers(box, inner.need.get(x))
        for x, box in zip(program.inputs, have, strict=True)
    ):
        return inner.run(_cut_all([*primals, *given], have, inner))
    # It asks for entries that are not there: compute it at full size.
    arrays = [
        None if box is None else _embed(x, box, value, facts)
        for x, box, value in zip(
            [*primals, *given], have, [*eqn.inputs, *program.inputs[n:]], strict=True
        )
    ]
    filled = [
        jnp.zeros(x.shape, x.dtype) if a is None else a
        for a, x in zip(arrays, program.inputs, strict=True)
    ]
    made = function(filled[:n], filled[n:])
    return [
        None if box is None else cut(x, (None,) * len(box), box)
        for x, box in zip(made, outs, strict=True)
    ]


def _zero_outside(value: Value, box: Box | None) -> Known:
    """What is known of a tangent that is zero outside of a box."""
    found = {}
    for axis, n in enumerate(value.shape):
        mask = None if box is None else box[axis]
        if is_number(n) and (box is None or mask is not None):
            outside = ~as_mask(mask, n) if box is not None else np.ones(n, bool)
            found[axis] = Slices(outside, np.zeros(n, number_type(value.dtype)))
    return found


def _cut_all(arrays: Sequence[Any], have: Boxes, inner: Any) -> list[Any]:
    """Arrays in boxes as what a program needs of them."""
    made = []
    for x, box, value in zip(arrays, have, inner.program.inputs, strict=True):
        wanted = inner.need.get(value)
        if box is None or wanted is None:
            made.append(None)
        else:
            made.append(cut(x, box, wanted))
    return made


def _embed(x: Any, box: Box, value: Value, facts: Facts) -> Any:
    """An array in a box as a whole one: known numbers, and zero, outside of it."""
    whole = jnp.zeros(value.shape, x.dtype)
    for axis in facts.known.get(value, {}):
        slices, sides = facts.along(value, axis), [1] * len(box)
        sides[axis] = -1
        mask, number = (part.reshape(sides) for part in slices)
        whole = jnp.where(mask, jnp.asarray(number, x.dtype), whole)
    masks = [as_mask(m, n) for m, n in zip(box, value.shape, strict=True)]
    return whole.at[np.ix_(*masks)].set(x, unique_indices=True) if masks else x
