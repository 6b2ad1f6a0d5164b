"""What a compaction did, layer by layer."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sparse_optax.export.compaction.analysis import WHOLE, Analysis
from sparse_optax.export.compaction.contraction import multiply_adds
from sparse_optax.export.compaction.facts import everything

# Why an operation is left whole; of all others: there is no rule for it.
_REASONS = {
    "scan": "a loop that carries values",
    "while": "a loop of unknown length",
    "cond": "a choice between programs",
    "conv_general_dilated": "a convolution in groups of the batch, or of symbolic size",
    "reshape": "of a symbolic length",
    "slice": "of a symbolic length",
    "pad": "of a symbolic length",
}


class CompactLayer(NamedTuple):
    """One leaf of the parameters, before and after.

    Attributes:
      name: Its normalised name; ``"(activations)"`` for products of two activations.
      shape: Its shape before.
      small_shape: Its shape after; with a 0 for a leaf of which nothing is needed.
      multiply_adds: Of the products and convolutions that it enters, for the example;
        of several weights that are combined, each has all of them.
      small_multiply_adds: The same after.
    """

    name: str
    shape: tuple[int, ...]
    small_shape: tuple[int, ...]
    multiply_adds: int
    small_multiply_adds: int


class CompactRecord(NamedTuple):
    """What a compaction did.

    Attributes:
      layers: One record per leaf, in leaf order, then that of activations if any.
      left_whole: ``{operation: (times, reason)}`` of what was not cut, although index
        sets ended there.
      round_to: What sizes were rounded up to; None if nothing was cut, as the dense
        model was fastest.
      seconds: ``{what: seconds}`` as measured, for ``round_to="measured"``; the key
        None is the dense model.
    """

    layers: tuple[CompactLayer, ...]
    left_whole: dict[str, tuple[int, str]]
    round_to: int | None = 1
    seconds: dict[int | None, float] | None = None

    @property
    def parameters(self) -> tuple[int, int]:
        """Number of parameters before and after."""
        before = sum(int(np.prod(x.shape)) for x in self.layers)
        return before, sum(int(np.prod(x.small_shape)) for x in self.layers)

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Multiply-adds before and after, summed over the layers."""
        before = sum(x.multiply_adds for x in self.layers)
        return before, sum(x.small_multiply_adds for x in self.layers)

    def table(self) -> str:
        """Aligned plain text, one line per leaf."""
        rows = [("layer", "shape", "small shape", "multiply-adds", "small", "ratio")]
        rows += [
            _row(x.name, _sides(x.shape), _sides(x.small_shape), *x[3:])
            for x in self.layers
        ]
        before, after = self.parameters
        rows.append(_row("total", f"{before:,}", f"{after:,}", *self.multiply_adds))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        for name, (times, reason) in self.left_whole.items():
            lines.append(f"Left whole: {name}, {times} times: {reason}.")
        for key, value in (self.seconds or {}).items():
            what = "Dense" if key is None else f"Rounded up to {key}"
            lines.append(f"{what}: {1000 * value:.3g} ms.")
        return "\n".join(lines)


def _sides(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _row(name: str, shape: str, small: str, before: int, after: int) -> tuple[str, ...]:
    ratio = f"{before / after:.2f}" if after else "-"
    return name, shape, small, f"{before:,}", f"{after:,}", ratio


def record_of(
    analysis: Analysis,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    small_shapes: Sequence[tuple[int, ...]],
) -> CompactRecord:
    """The record of an analysis of a program whose first inputs are the leaves."""
    work: dict[str, Counter] = {"before": Counter(), "after": Counter()}
    whole: Counter = Counter()
    _walk(analysis, 1, work, whole)
    layers = [
        CompactLayer(n, tuple(s), tuple(t), work["before"][n], work["after"][n])
        for n, s, t in zip(names, shapes, small_shapes, strict=True)
    ]
    if work["before"][_MOVING]:
        sums = work["before"][_MOVING], work["after"][_MOVING]
        layers.append(CompactLayer(_MOVING, (0,), (0,), *sums))
    reasons = {
        name: (times, _REASONS.get(name, "there is no rule for it"))
        for name, times in sorted(whole.items())
    }
    return CompactRecord(tuple(layers), reasons)


def multiply_adds_of(analysis: Analysis) -> tuple[int, int]:
    """Multiply-adds of a program, at full size and for what is needed."""
    work: dict[str, Counter] = {"before": Counter(), "after": Counter()}
    _walk(analysis, 1, work, Counter())
    return work["before"].total(), work["after"].total()


_MOVING = "(activations)"


def _walk(
    analysis: Analysis, times: int, work: dict[str, Counter], whole: Counter
) -> None:
    """Counts multiply-adds by leaf, and operations that were left whole."""
    for eqn in analysis.program.equations:
        if not eqn.outputs:
            continue
        first = eqn.outputs[0]
        if first in analysis.inner:
            loops = eqn.params["length"] if eqn.name == "scan" else 1
            _walk(analysis.inner[first], times * loops, work, whole)
        elif eqn.name in ("dot_general", "conv_general_dilated"):
            _count(analysis, eqn, times, work)
        needed = any(out in analysis.need for out in eqn.outputs)
        moves = any(x.shape and x not in analysis.exact for x in eqn.inputs)
        weights = any(x.shape and analysis.origin.get(x) for x in eqn.inputs)
        if analysis.rules[first] is WHOLE and needed and (moves or weights):
            whole[eqn.name] += 1


def _count(analysis: Analysis, eqn: Any, times: int, work: dict[str, Counter]) -> None:
    """Adds the multiply-adds of one product, before and after."""
    out = eqn.outputs[0]
    names = sorted({n for x in eqn.inputs for n in analysis.origin.get(x, ())})
    before = multiply_adds(eqn, [everything(x) for x in eqn.inputs], everything(out))
    after: int | None = 0
    if out in analysis.need and analysis.rules[out] is not WHOLE:
        targets = [x for x in analysis.targets[out] if x is not None]
        after = multiply_adds(eqn, targets, analysis.need[out])
    elif out in analysis.need:
        after = before
    for name in names or [_MOVING]:
        work["before"][name] += times * (before or 0)
        work["after"][name] += times * (after or 0)
