"""The two passes over a program, and the smaller program that they allow.

Forward, from the parameters: what is exact, and which slices of a value are one known
number. Backward, from the results: which slices of a value anything later reads. What
is needed of the parameters is the smaller model.
"""

import copy
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.export.compaction import (
    arrangement,
    contraction,
    elementwise,
    reduction,
)
from sparse_optax.export.compaction.facts import (
    Box,
    Facts,
    Known,
    as_numbers,
    covers,
    cut,
    everything,
    lengths,
    size,
)
from sparse_optax.export.compaction.nested import NESTED
from sparse_optax.export.compaction.program import Equation, Value
from sparse_optax.export.compaction.rule import NoRule, Rule

_PRODUCTS = ("dot_general", "conv_general_dilated")
# What is computed from parameters alone stays an operation if it is so much larger.
_GROWTH, _ALWAYS = 4, 2**16


def _nothing_known(eqn: Equation, facts: Facts) -> list[Known]:
    return [{} for _ in eqn.outputs]


def _all_needed(
    eqn: Equation, boxes: list[Box | None], facts: Facts
) -> list[Box | None]:
    for out in eqn.outputs:
        facts.need[out] = everything(out)
    return [everything(x) for x in eqn.inputs]


def _as_traced(
    eqn: Equation, inputs: list[Any], boxes: list[Box | None], facts: Facts
) -> list[Any]:
    return eqn.call(*inputs)


# What has no rule: it knows nothing and needs everything.
WHOLE = Rule(_nothing_known, _all_needed, _as_traced)

_RULES = {
    **dict.fromkeys(elementwise.NAMES, elementwise.RULE),
    "optimization_barrier": elementwise.SAME,
    **dict.fromkeys(
        ("transpose", "squeeze", "expand_dims", "broadcast_in_dim"), arrangement.AXES
    ),
    "reshape": arrangement.RESHAPE,
    **dict.fromkeys(("slice", "split", "rev"), arrangement.SLICE),
    "pad": arrangement.PAD,
    "concatenate": arrangement.CONCATENATE,
    "stack": arrangement.STACK,
    "unstack": arrangement.UNSTACK,
    "gather": arrangement.GATHER,
    **dict.fromkeys(("dynamic_slice", "dynamic_update_slice"), arrangement.DYNAMIC),
    "dot_general": contraction.DOT,
    "conv_general_dilated": contraction.CONVOLUTION,
    **dict.fromkeys(reduction.REDUCTIONS, reduction.REDUCE),
    **dict.fromkeys(reduction.WINDOWS, reduction.WINDOW),
    **dict.fromkeys((*reduction.RUNNING, "sort"), reduction.ALONG),
}


class Analysis(Facts):
    """Facts about a program, found by two passes; ``run`` computes what is needed."""

    def __init__(self, program: Any, settings: Any):
        """Knows nothing but the constants of the program."""
        super().__init__(program, settings)
        self.rules: dict[Value, Rule] = {}
        self.boxes: list[Box | None] = []

    def set_exact(self, value: Value, number: Any, kept: np.ndarray | None) -> None:
        """Gives an input its number. ``kept`` says which zeros may change."""
        self.exact[value] = number
        array = as_numbers(number)
        if kept is not None and array is not None and (kept & (array == 0)).any():
            self.live[value] = kept | (array != 0)
            one = np.ones((), array.dtype)
            self.probe[value] = np.where(self.live[value] & (array == 0), one, array)

    # --- forward ----------------------------------------------------------------------
    def forward(self) -> None:
        """Finds what is exact and what is known."""
        for eqn in self.program.equations:
            if not eqn.outputs:
                continue
            origins = [self.origin.get(x, frozenset()) for x in eqn.inputs]
            fixed = all(x in self.exact or x in self.origin for x in eqn.inputs)
            if fixed:
                made = functools.reduce(frozenset.union, origins, frozenset())
                self.origin.update({out: made for out in eqn.outputs})
            if all(x in self.exact for x in eqn.inputs) and self._is_small(eqn):
                self._compute(eqn)
                self.rules[eqn.outputs[0]] = _rule_of(eqn)
                if eqn.body is None:
                    continue
            self.rules[eqn.outputs[0]] = rule = _rule_of(eqn)
            try:
                known = rule.known(eqn, self)
            except NoRule:
                self.rules[eqn.outputs[0]] = WHOLE
                known = _nothing_known(eqn, self)
            for out, found in zip(eqn.outputs, known, strict=True):
                if out not in self.exact:
                    self.known[out] = found

    def again(self) -> "Analysis":
        """The same knowledge, for another pass backward."""
        other = copy.copy(self)
        other.need, other.have, other.sums, other.targets = {}, {}, {}, {}
        return other

    def _is_small(self, eqn: Equation) -> bool:
        """Whether an exact result may be kept as an array."""
        sizes = [size(x.shape) for x in (*eqn.inputs, *eqn.outputs)]
        if any(n is None for n in sizes):
            return False
        n = len(eqn.inputs)
        before, after = sum(sizes[:n]), sum(sizes[n:])  # type: ignore[arg-type]
        return after <= max(_GROWTH * before, _ALWAYS)

    def _compute(self, eqn: Equation) -> None:
        """Computes an exact result, and where it may be different from zero."""
        with jax.ensure_compile_time_eval():
            made = eqn.call(*(_array(self.exact[x]) for x in eqn.inputs))
            self.exact.update(zip(eqn.outputs, made, strict=True))
            if not any(x in self.probe for x in eqn.inputs):
                return
            probes = [self.probe.get(x, self.exact[x]) for x in eqn.inputs]
            probed = eqn.call(*map(_array, probes))
        for out, number, probe in zip(eqn.outputs, made, probed, strict=True):
            arrays = as_numbers(number), as_numbers(probe)
            if arrays[0] is not None and arrays[1] is not None:
                self.live[out] = (arrays[0] != 0) | (arrays[1] != 0)
                self.probe[out] = probe

    # --- backward ---------------------------------------------------------------------
    def backward(self, boxes: Sequence[Box | None]) -> None:
        """Finds what is needed for boxes of the results, None for no result."""
        self.boxes = list(boxes)
        while True:
            self.have, self.need = self.need, {}
            for out, box in zip(self.program.outputs, boxes, strict=True):
                self.want(out, box)
            for eqn in reversed(self.program.equations):
                if any(out in self.need for out in eqn.outputs):
                    self._read(eqn)
            for value in self.program.inputs:
                self.fill(value)
            if _same_boxes(self.have, self.need):
                break
        self.folds.clear()

    def _read(self, eqn: Equation) -> None:
        """Adds what an equation reads."""
        for out in eqn.outputs:
            self.fill(out)
        if self.settings.in_place:
            self._take_all(eqn)
        wanted = [self.need.get(out) for out in eqn.outputs]
        first = eqn.outputs[0]
        try:
            targets = self.rules[first].needed(eqn, wanted, self)
        except NoRule:
            self.rules[first] = WHOLE
            targets = _all_needed(eqn, wanted, self)
        self.targets[first] = targets
        for value, box in zip(eqn.inputs, targets, strict=True):
            self.want(value, box)

    def _take_all(self, eqn: Equation) -> None:
        """Makes an operation read all that is there of its operands, as its code does:
        both sides of a residual sum have the same units, and a mean has those of what
        it is taken of. Products choose for themselves what they sum over.
        """
        if eqn.name in _PRODUCTS:
            return
        inputs = [self.have.get(x) for x in eqn.inputs]
        sums = (elementwise.RULE, elementwise.SAME, NESTED)
        for out in eqn.outputs:
            if out not in self.need:
                continue
            if self.rules[eqn.outputs[0]] in sums:
                for x, there in zip(eqn.inputs, inputs, strict=True):
                    self.want(out, self._beside(out, x, there))
            elif all(there is not None for there in inputs):
                self.want(out, self._made_of(out, eqn, inputs))

    def _beside(self, out: Value, x: Value, there: Box | None) -> Box | None:
        """The box of a result beside that of an operand; where the operand has length
        one it is repeated.
        """
        if there is None or len(x.shape) != len(out.shape):
            return None
        axes = zip(x.shape, out.shape, there, self.need[out], strict=True)
        return tuple(own if n == m else old for n, m, own, old in axes)

    def to_be_had(self, value: Value) -> Box | None:
        """The box of a value that can be computed from what is needed anyway, and from
        parameters; None if there is none.
        """
        makers = {out: e for e in self.program.equations for out in e.outputs}
        return self._to_be_had(value, makers, {})

    def _to_be_had(
        self, value: Value, makers: dict[Value, Equation], found: dict[Value, Any]
    ) -> Box | None:
        if value in self.exact or value in self.at_hand:
            return everything(value)
        if value in self.need:
            return self.need[value]
        if value not in found:
            found[value], eqn = None, makers[value]
            if eqn.name not in _PRODUCTS:
                inputs = [self._to_be_had(x, makers, found) for x in eqn.inputs]
                if None not in inputs:
                    found[value] = self._made_of(value, eqn, inputs)
        return found[value]

    def _made_of(
        self, value: Value, eqn: Equation, inputs: Sequence[Any]
    ) -> Box | None:
        """The box of an output that reads no more of the inputs than these boxes."""
        masks = [mask for box in inputs for mask in box if mask is not None]
        choices = [[None, *(m for m in masks if len(m) == n)] for n in value.shape]
        for box in itertools.product(*choices):
            if self._is_enough(value, eqn, box, inputs):
                return box
        return None

    def _is_enough(
        self, value: Value, eqn: Equation, box: Box, inputs: Sequence[Box]
    ) -> bool:
        """Whether boxes of the inputs are enough for a box of one output."""
        need, self.need = self.need, {**self.need, value: box}
        try:
            wanted = [box if out is value else None for out in eqn.outputs]
            targets = self.rules[eqn.outputs[0]].needed(eqn, wanted, self)
            return _same_box(self.need[value], box) and all(
                map(covers, inputs, targets)
            )
        except NoRule:
            return False
        finally:
            self.need = need

    # --- the smaller program ----------------------------------------------------------
    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """The results, from inputs in the boxes that ``need`` has of them."""
        env = dict(zip(self.program.inputs, arrays, strict=True))
        for value, number in self.program.constants.items():
            if value in self.need:
                env[value] = cut(number, everything(value), self.need[value])
        for eqn in self.program.equations:
            boxes = [self.need.get(out) for out in eqn.outputs]
            if all(box is None for box in boxes):
                continue
            targets = self.targets[eqn.outputs[0]]
            inputs = [
                None if box is None else cut(env[x], self.need[x], box)
                for x, box in zip(eqn.inputs, targets, strict=True)
            ]
            made = self.rules[eqn.outputs[0]].small(eqn, inputs, boxes, self)
            for out, box, y in zip(eqn.outputs, boxes, made, strict=True):
                if box is not None:
                    assert y.shape == lengths(box, out.shape), eqn.name
                    env[out] = y
        return [
            None if box is None else cut(env[x], self.need[x], box)
            for x, box in zip(self.program.outputs, self.boxes, strict=True)
        ]


def _rule_of(eqn: Equation) -> Rule:
    return NESTED if eqn.body is not None else _RULES.get(eqn.name, WHOLE)


def _array(x: Any) -> Any:
    return x if as_numbers(x) is None else jnp.asarray(x)


def _same_boxes(a: dict[Value, Box], b: dict[Value, Box]) -> bool:
    return a.keys() == b.keys() and all(_same_box(a[x], b[x]) for x in b)


def _same_box(a: Box, b: Box) -> bool:
    return all(
        x is y or (x is not None and y is not None and np.array_equal(x, y))
        for x, y in zip(a, b, strict=True)
    )
