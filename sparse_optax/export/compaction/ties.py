"""Which indices of the parameters can only go together.

Every index along every axis of every value is a node, and each operation ties nodes:
the outputs of a convolution to the scale of the norm behind it and to the inputs of the
next one, the two sides of a sum to each other. What is tied is one unit. An index is
*fixed*, and with it its unit, where its entries mean something together: an axis of the
function's arguments or results, one that is summed over without weights or normalised,
or one of an operation without a rule.

A unit goes without a trace where the sums that it enters get zero from it once its own
weights are zero. So a second pass finds which slices are zero then, and fixes the units
of sums that are not.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.export.compaction import (
    arrangement,
    contraction,
    elementwise,
    nested,
    reduction,
)
from sparse_optax.export.compaction.facts import as_numbers, is_number
from sparse_optax.export.compaction.program import Equation, Program, Value
from sparse_optax.export.compaction.rule import NoRule

Nodes = np.ndarray  # numbers of nodes
Axis = tuple[Value, int]


class Term(NamedTuple):
    """The multiply-adds of one product: a number times the lengths of axes, each given
    by the units of its indices, -1 for one that stays.
    """

    times: int
    lengths: tuple[np.ndarray, ...]


class Tied(NamedTuple):
    """What a program ties.

    Attributes:
      places: ``(leaf, axis, units)``: for axes of leaves the unit of each index, -1 for
        one that stays. Axes without a unit are left out.
      number: Number of units.
      terms: The multiply-adds of all products, by units.
    """

    places: tuple[tuple[int, int, np.ndarray], ...]
    number: int
    terms: tuple[Term, ...]


class _Link(NamedTuple):
    """Indices of an operand that are indices of a result."""

    source: Axis
    target: Axis
    at: Any = slice(None)  # of the operand
    to: Any = slice(None)  # of the result


class _Split(NamedTuple):
    """A reshape of several axes to one, or back."""

    several: tuple[Axis, ...]
    one: Axis


class _Step(NamedTuple):
    """What an operation ties.

    Attributes:
      links: Indices that go on.
      fixed: Axes whose indices cannot go.
      splits: Its reshapes.
      zero: When a slice of a result is zero: if ``"all"`` slices that it is linked to
        are, or ``"any"`` of them; ``"none"`` does not tell.
      summed: Pairs of axes over which it sums products.
      tied: Further ties, which do not tell what is zero.
      filled: Indices of results that lie between those that are linked.
    """

    links: list[_Link]
    fixed: list[Axis]
    splits: tuple[_Split, ...] = ()
    zero: str = "all"
    summed: tuple[tuple[Axis, Axis], ...] = ()
    tied: tuple[_Link, ...] = ()
    filled: tuple[tuple[Axis, np.ndarray], ...] = ()


def tie(program: Program, leaves: int, usable: Sequence[bool]) -> Tied:
    """The units of a program whose first inputs are leaves. ``usable`` says which of
    these may be cut.
    """
    graph = _Graph()
    graph.walk(program, 1)
    own, others = program.inputs[:leaves], program.inputs[leaves:]
    for value in (*others, *program.outputs):
        graph.fix(value)
    for value, may in zip(own, usable, strict=True):
        if not may or value not in graph.read:
            graph.fix(value)
    graph.connect()
    graph.choose_carriers()
    graph.check_sums(own)
    graph.spread_fixed()
    return graph.units(own)


class _Graph:
    """Nodes, what ties them, and which are fixed."""

    def __init__(self):
        self.starts: dict[Axis, int] = {}
        self.number = 0
        self.steps: list[tuple[Equation, _Step]] = []
        self.constants: dict[Value, Any] = {}
        self.pairs: list[tuple[Nodes, Nodes]] = []
        self.stay: list[Nodes] = []
        self.splits: list[_Split] = []
        self.read: set[Value] = set()
        self.products: list[tuple[int, list[Axis]]] = []
        self.label = np.zeros(0, int)

    # --- nodes ------------------------------------------------------------------------
    def nodes(self, axis: Axis) -> Nodes:
        """The nodes of an axis."""
        n = axis[0].shape[axis[1]]
        if axis not in self.starts:
            self.starts[axis] = self.number
            self.number += n
        start = self.starts[axis]
        return np.arange(start, start + n)

    def fix(self, value: Value) -> None:
        """Fixes all axes of a value."""
        self.stay += [self.nodes((value, i)) for i in range(len(value.shape))]

    # --- the ties ---------------------------------------------------------------------
    def walk(self, program: Program, times: int) -> None:
        """Collects what the equations of a program tie."""
        self.constants.update(program.constants)
        for eqn in program.equations:
            self.read.update(eqn.inputs)
            if eqn.body is not None:
                self.enter(eqn, times)
                continue
            self.add(eqn, _step_of(eqn))
            if eqn.name in ("dot_general", "conv_general_dilated"):
                self.products.append((times, _lengths_of(eqn)))

    def enter(self, eqn: Equation, times: int) -> None:
        """Walks the program inside of an operation."""
        assert eqn.body is not None
        for x, own in zip(eqn.inputs, eqn.body.inputs, strict=True):
            if x in self.constants and not own.shape:
                self.constants[own] = self.constants[x]
        into, out_of = _doors(eqn)
        self.add(eqn, into)
        self.walk(eqn.body, times * (eqn.params["length"] if eqn.name == "scan" else 1))
        self.add(eqn, out_of)

    def add(self, eqn: Equation, step: _Step) -> None:
        """Adds a step."""
        self.steps.append((eqn, step))
        for link in (*step.links, *step.tied):
            pair = self.nodes(link.source)[link.at], self.nodes(link.target)[link.to]
            self.pairs.append(pair)
        for one, other in step.summed:
            self.pairs.append((self.nodes(one), self.nodes(other)))
        self.stay += [self.nodes(axis) for axis in step.fixed]
        self.splits += step.splits

    def connect(self) -> None:
        """Finds the connected nodes."""
        for split in self.splits:
            for axis in (*split.several, split.one):
                self.nodes(axis)
        self.label = components(self.number, *_joined(self.pairs))
        self.fixed = np.zeros(self.number, bool)
        self.fixed[self.label[_all(self.stay)]] = True
        self.spread_fixed()

    def merge(self, pairs: list[tuple[Nodes, Nodes]]) -> None:
        """Ties more nodes."""
        a, b = (self.label[x] for x in _joined(pairs))
        among, short = np.unique(np.concatenate([a, b]), return_inverse=True)
        low = components(len(among), *np.split(short.reshape(-1), 2))
        new = np.arange(self.number)
        new[among] = among[low]
        np.logical_or.at(self.fixed, among[low], self.fixed[among])
        self.label = new[self.label]

    def stays(self, nodes: Nodes) -> np.ndarray:
        """Which nodes are fixed."""
        return self.fixed[self.label[nodes]]

    def spread_fixed(self) -> None:
        """Of a reshape: a fixed entry fixes all indices that it belongs to."""
        while True:
            before = int(self.fixed.sum())
            for split in self.splits:
                sides = [value.shape[i] for value, i in split.several]
                one = self.nodes(split.one)
                grid = self.stays(one).reshape(sides)
                for place, axis in enumerate(split.several):
                    others = tuple(i for i in range(len(sides)) if i != place)
                    nodes = self.nodes(axis)
                    self.fixed[self.label[nodes[grid.any(others)]]] = True
                if not self.candidates(split):
                    self.fixed[self.label[one]] = True
            if int(self.fixed.sum()) == before:
                return

    def candidates(self, split: _Split) -> list[int]:
        """Of the several axes of a reshape those that are not fixed as a whole."""
        return [
            place
            for place, axis in enumerate(split.several)
            if not self.stays(self.nodes(axis)).all()
        ]

    def choose_carriers(self) -> None:
        """Of the several axes that a reshape makes one, one has the units: the one that
        keeps apart what is apart, and the first where that does not tell: heads, and
        not the features within heads. The others stay whole.
        """
        for split in self.splits:
            places = self.candidates(split)
            if not places:
                continue
            one = self.nodes(split.one)
            among = self.label[one]
            best = places[0]
            if len(places) > 1 and len(np.unique(among)) < len(one):
                left = [self.apart(split, place) for place in places]
                best = places[int(np.argmax(left))]
            self.merge([self.carried(split, best)])
            for place, axis in enumerate(split.several):
                if place != best:
                    self.fixed[self.label[self.nodes(axis)]] = True
            self.spread_fixed()

    def carried(self, split: _Split, place: int) -> tuple[Nodes, Nodes]:
        """What is tied if one axis of a reshape has the units."""
        sides = [value.shape[i] for value, i in split.several]
        line = [1] * len(sides)
        line[place] = -1
        nodes = self.nodes(split.several[place]).reshape(line)
        return np.broadcast_to(nodes, sides).reshape(-1), self.nodes(split.one)

    def apart(self, split: _Split, place: int) -> int:
        """How many units are left of the one axis if an axis has the units."""
        nodes, one = self.carried(split, place)
        both = np.concatenate([self.label[nodes], self.label[one]])
        _, short = np.unique(both, return_inverse=True)
        a, b = np.split(short.reshape(-1), 2)
        return len(np.unique(components(int(short.max()) + 1, a, b)[b]))

    # --- which slices are zero --------------------------------------------------------
    def check_sums(self, leaves: Sequence[Value]) -> None:
        """Fixes units that a sum would miss: their slices are not zero when all of
        their own weights are.
        """
        zero = _Zeros()
        for value in leaves:
            for i, n in enumerate(value.shape):
                zero.of[value, i] = np.ones(n, bool)
        for eqn, step in self.steps:
            for one, other in step.summed:
                missed = ~(zero.along(one) | zero.along(other))
                self.fixed[self.label[self.nodes(one)[missed]]] = True
            zero.add(eqn, step, self.constants)
            for split in step.splits:
                if places := self.candidates(split):
                    zero.reshape(split, places[0], split.one[0] is eqn.outputs[0])

    # --- the units --------------------------------------------------------------------
    def units(self, leaves: Sequence[Value]) -> Tied:
        """The units that have a slice of a leaf, in the order of the leaves."""
        numbers = np.full(self.number, -1)
        total, places = 0, []
        for leaf, value in enumerate(leaves):
            for i in range(len(value.shape)):
                nodes = self.nodes((value, i))
                label = self.label[nodes]
                free = ~self.fixed[label]
                for x in label[free]:
                    if numbers[x] < 0:
                        numbers[x], total = total, total + 1
                if free.any():
                    places.append((leaf, i, np.where(free, numbers[label], -1)))
        terms = tuple(self._term(times, axes, numbers) for times, axes in self.products)
        return Tied(tuple(places), total, terms)

    def _term(self, times: int, axes: list[Axis], numbers: np.ndarray) -> Term:
        factors: list[np.ndarray] = []
        for axis in axes:
            value, i = axis
            if axis in self.starts:
                label = self.label[self.nodes(axis)]
                units = np.where(self.fixed[label], -1, numbers[label])
                if (units >= 0).any():
                    factors.append(units)
                    continue
            times *= value.shape[i]
        return Term(times, tuple(factors))


class _Zeros:
    """Slices that are zero where all weights of their unit are."""

    def __init__(self):
        self.of: dict[Axis, np.ndarray] = {}

    def along(self, axis: Axis) -> np.ndarray:
        """Which slices along an axis are zero."""
        value, i = axis
        return self.of.get(axis, np.zeros(value.shape[i], bool))

    def add(self, eqn: Equation, step: _Step, constants: dict[Value, Any]) -> None:
        """What a step tells of its results."""
        how = step.zero
        if how == "elementwise":
            how = _zero_of(eqn, constants)
        if how == "padded":
            fill = constants.get(eqn.inputs[1])
            how = "all" if fill is not None and not np.any(fill) else "none"
        if how == "none":
            return
        found: dict[Axis, list[np.ndarray]] = {}
        for link in step.links:
            from_first = link.source[0] is eqn.inputs[0]
            if (how == "first" and not from_first) or (how == "cases" and from_first):
                continue
            value, i = link.target
            part = np.zeros(value.shape[i], bool)
            part[link.to] = self.along(link.source)[link.at]
            found.setdefault(link.target, []).append(part)
        for axis, parts in found.items():
            beside = how == "parts" and axis[1] == eqn.params["dimension"]
            combine = np.logical_or if how == "any" or beside else np.logical_and
            self.of[axis] = combine.reduce(parts)
        for axis, at in step.filled:
            self.of[axis] = self.along(axis) | at

    def reshape(self, split: _Split, place: int, to_one: bool) -> None:
        """What a reshape passes on, between the one axis and that with the units."""
        axis = split.several[place]
        sides = [value.shape[i] for value, i in split.several]
        if to_one:
            line = [1] * len(sides)
            line[place] = -1
            grid = np.broadcast_to(self.along(axis).reshape(line), sides)
            self.of[split.one] = grid.reshape(-1)
        else:
            others = tuple(i for i in range(len(sides)) if i != place)
            whole = self.along(split.one).reshape(sides).all(others)
            self.of[axis] = np.asarray(whole)


def _all(parts: Sequence[Nodes]) -> Nodes:
    return np.concatenate([np.zeros(0, int), *parts])


def _joined(pairs: Sequence[tuple[Nodes, Nodes]]) -> tuple[Nodes, Nodes]:
    return _all([a for a, _ in pairs]), _all([b for _, b in pairs])


def components(number: int, a: Nodes, b: Nodes) -> np.ndarray:
    """For each node the lowest one that it is connected to by pairs (a, b)."""
    label = np.arange(number)
    while True:
        low = np.minimum(label[a], label[b])
        new = label.copy()
        np.minimum.at(new, label[a], low)
        np.minimum.at(new, label[b], low)
        while not np.array_equal(new[new], new):
            new = new[new]
        if np.array_equal(new, label):
            return label
        label = new


# --- the steps ------------------------------------------------------------------------
def _step_of(eqn: Equation) -> _Step:
    """What an operation ties."""
    rule = _STEPS.get(eqn.name) if eqn.outputs else None
    sizes = (n for x in (*eqn.inputs, *eqn.outputs) for n in x.shape)
    if rule is None or not all(map(is_number, sizes)):
        return _whole(eqn)
    try:
        return rule(eqn)
    except NoRule:
        return _whole(eqn)


def _whole(eqn: Equation) -> _Step:
    """An operation without a rule: all stay."""
    return _Step([], _axes_of(eqn.inputs) + _axes_of(eqn.outputs), zero="none")


def _axes_of(values: Sequence[Value]) -> list[Axis]:
    return [(x, i) for x in values for i in range(len(x.shape))]


def _linked(x: Value, out: Value, axes: dict[int, int]) -> tuple[list[_Link], Any]:
    """Links of a result whose axes, the keys, are axes of an operand; the others of
    the operand.
    """
    links = [_Link((x, i), (out, j)) for j, i in axes.items()]
    kept = set(axes.values())
    return links, [(x, i) for i in range(len(x.shape)) if i not in kept]


def _elementwise(eqn: Equation) -> _Step:
    out, links, fixed = eqn.outputs[0], [], []
    for x in eqn.inputs:
        axes = {
            i: i for i in range(len(x.shape)) if x.shape[i] == out.shape[i] and x.shape
        }
        more, rest = _linked(x, out, axes)
        links, fixed = links + more, fixed + rest
    return _Step(links, fixed, zero="elementwise")


def _barrier(eqn: Equation) -> _Step:
    links = []
    for x, out in zip(eqn.inputs, eqn.outputs, strict=True):
        links += _linked(x, out, {i: i for i in range(len(x.shape))})[0]
    return _Step(links, [])


def _arranged(eqn: Equation) -> _Step:
    x, out = eqn.inputs[0], eqn.outputs[0]
    links, fixed = _linked(x, out, arrangement._axes(eqn))
    return _Step(links, fixed)


def _reshaped(eqn: Equation) -> _Step:
    x, out = eqn.inputs[0], eqn.outputs[0]
    links, fixed, splits = [], [], []
    for left, right in arrangement.groups(x.shape, out.shape):
        # An axis of length 1 holds all of its units, and none of them goes.
        fixed += [(x, i) for i in left if x.shape[i] == 1]
        fixed += [(out, i) for i in right if out.shape[i] == 1]
        before = tuple((x, i) for i in left if x.shape[i] != 1)
        after = tuple((out, i) for i in right if out.shape[i] != 1)
        if len(before) == len(after) == 1:
            links.append(_Link(before[0], after[0]))
        elif len(after) == 1:
            splits.append(_Split(before, after[0]))
        elif len(before) == 1:
            splits.append(_Split(after, before[0]))
        else:
            fixed += [*before, *after]
    return _Step(links, fixed, tuple(splits))


def _sliced(eqn: Equation) -> _Step:
    x, links = eqn.inputs[0], []
    for out, ranges in zip(eqn.outputs, arrangement._ranges(eqn), strict=True):
        for i in range(len(x.shape)):
            links.append(_Link((x, i), (out, i), ranges.get(i, slice(None))))
    return _Step(links, [])


def _padded(eqn: Equation) -> _Step:
    x, out = eqn.inputs[0], eqn.outputs[0]
    links, fixed, filled = [], [], []
    for i in range(len(x.shape)):
        pad = arrangement._pads(eqn).get(i)
        if pad is None:
            links.append(_Link((x, i), (out, i)))
        elif pad[2] or min(pad[:2]) < 0:
            fixed += [(x, i), (out, i)]
        else:
            inside = slice(pad[0], pad[0] + x.shape[i])
            links.append(_Link((x, i), (out, i), to=inside))
            at = np.ones(out.shape[i], bool)
            at[inside] = False
            filled.append(((out, i), at))
    return _Step(links, fixed, zero="padded", filled=tuple(filled))


def _concatenated(eqn: Equation) -> _Step:
    out, axis = eqn.outputs[0], eqn.params["dimension"]
    links, start = [], 0
    for x in eqn.inputs:
        for i in range(len(x.shape)):
            if i != axis:
                links.append(_Link((x, i), (out, i)))
        stop = start + x.shape[axis]
        links.append(_Link((x, axis), (out, axis), to=slice(start, stop)))
        start = stop
    return _Step(links, [], zero="parts")


def _stacked(eqn: Equation) -> _Step:
    out, links = eqn.outputs[0], []
    for x in eqn.inputs:
        links += _linked(x, out, arrangement._stack_axes(eqn))[0]
    axis = eqn.params["axis"] % len(out.shape)
    return _Step(links, [(out, axis)])


def _unstacked(eqn: Equation) -> _Step:
    x, links, fixed = eqn.inputs[0], [], []
    for out in eqn.outputs:
        more, fixed = _linked(x, out, arrangement._unstack_axes(eqn))
        links += more
    return _Step(links, fixed)


def _gathered(eqn: Equation) -> _Step:
    x, out = eqn.inputs[0], eqn.outputs[0]
    passing = arrangement._passing(eqn)
    links, fixed = _linked(x, out, passing)
    fixed += [(out, i) for i in range(len(out.shape)) if i not in passing]
    return _Step(links, fixed + _axes_of(eqn.inputs[1:]))


def _dynamic(eqn: Equation) -> _Step:
    out, axes = eqn.outputs[0], {i: i for i in arrangement._dynamic_axes(eqn)}
    arrays = eqn.inputs[: 1 if eqn.name == "dynamic_slice" else 2]
    links, fixed = [], [(out, i) for i in range(len(out.shape)) if i not in axes]
    for x in arrays:
        more, rest = _linked(x, out, axes)
        links, fixed = links + more, fixed + rest
    return _Step(links, fixed)


def _product(eqn: Equation) -> _Step:
    out, links = eqn.outputs[0], []
    sides = contraction._sides(eqn)
    for side in sides:
        axes = {i: axis for i, axis in enumerate(side.batch)}
        axes |= {i: axis for i, axis in enumerate(side.free, side.out)}
        links += _linked(side.value, out, axes)[0]
    pairs = zip(sides[0].summed, sides[1].summed, strict=True)
    summed = tuple(((sides[0].value, a), (sides[1].value, b)) for a, b in pairs)
    return _Step(links, [], zero="any", summed=summed)


def _convolved(eqn: Equation) -> _Step:
    conv, (images, kernel) = contraction._convolution(eqn), eqn.inputs
    out, groups, tied = eqn.outputs[0], conv.groups, []
    outputs, len_out = (kernel, conv.outputs), kernel.shape[conv.outputs]
    links = [
        _Link((images, conv.batch), (out, conv.out_batch)),
        _Link(outputs, (out, conv.out_feature)),
    ]
    kept = {(images, conv.batch), (images, conv.feature), outputs}
    kept |= {(out, conv.out_batch), (out, conv.out_feature)}
    summed: tuple[Any, ...] = ()
    if groups == 1:
        kept.add((kernel, conv.inputs))
        summed = (((images, conv.feature), (kernel, conv.inputs)),)
    else:  # a group goes as a whole
        each, per = (n // groups for n in (images.shape[conv.feature], len_out))
        first = np.arange(groups * each) // each * per
        tied.append(_Link((images, conv.feature), outputs, to=first))
        first = np.arange(groups * per) // per * each
        tied.append(_Link((images, conv.feature), outputs, at=first))
    axes = _axes_of([images, kernel, out])
    fixed = [axis for axis in axes if axis not in kept]
    return _Step(links, fixed, zero="any", summed=summed, tied=tuple(tied))


def _reduced(eqn: Equation) -> _Step:
    left = dict(enumerate(reduction._left(eqn)))
    links, fixed = [], []
    for out in eqn.outputs:
        links, fixed = _linked(eqn.inputs[0], out, left)
    keeps = eqn.name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_or")
    return _Step(links, fixed, zero="all" if keeps else "none")


def _windowed(eqn: Equation) -> _Step:
    x, out, axes = eqn.inputs[0], eqn.outputs[0], {}
    for i in range(len(x.shape)):
        if reduction._trivial(eqn, i):
            axes[i] = i
    links, fixed = _linked(x, out, axes)
    return _Step(links, fixed + [(out, i) for _, i in fixed])


def _running(eqn: Equation) -> _Step:
    along, links, fixed = reduction._along(eqn), [], []
    for x in eqn.inputs:
        axes = {i: i for i in range(len(x.shape)) if i != along % len(x.shape)}
        for out in eqn.outputs:
            more, rest = _linked(x, out, axes)
            links, fixed = links + more, fixed + rest
    fixed += [(out, along % len(out.shape)) for out in eqn.outputs]
    return _Step(links, fixed, zero="all" if eqn.name == "cumsum" else "none")


def _numbered(eqn: Equation) -> _Step:
    """``iota``: its indices mean numbers."""
    out = eqn.outputs[0]
    return _Step([], [(out, eqn.params["dimension"])], zero="none")


def _random(eqn: Equation) -> _Step:
    """Random numbers: any of them will do."""
    return _Step([], _axes_of(eqn.inputs), zero="none")


def _doors(eqn: Equation) -> tuple[_Step, _Step]:
    """What enters and what leaves an operation with a program inside."""
    body, into, stay = eqn.body, [], []
    assert body is not None
    for i, (x, own) in enumerate(zip(eqn.inputs, body.inputs, strict=True)):
        shift = 1 if nested._loops(eqn, i) else 0
        into += [_Link((x, j + shift), (own, j)) for j in range(len(own.shape))]
        stay += [(x, 0)] * shift
    out_of, shift = [], 1 if eqn.name == "scan" else 0
    for out, own in zip(eqn.outputs, body.outputs, strict=True):
        out_of += [_Link((own, j), (out, j + shift)) for j in range(len(own.shape))]
        stay += [(out, 0)] * shift
    return _Step(into, stay), _Step(out_of, [])


_STEPS = {
    **dict.fromkeys(elementwise.NAMES, _elementwise),
    "optimization_barrier": _barrier,
    **dict.fromkeys(
        ("transpose", "squeeze", "expand_dims", "broadcast_in_dim"), _arranged
    ),
    "reshape": _reshaped,
    **dict.fromkeys(("slice", "split", "rev"), _sliced),
    "pad": _padded,
    "concatenate": _concatenated,
    "stack": _stacked,
    "unstack": _unstacked,
    "gather": _gathered,
    **dict.fromkeys(("dynamic_slice", "dynamic_update_slice"), _dynamic),
    "dot_general": _product,
    "conv_general_dilated": _convolved,
    **dict.fromkeys(reduction.REDUCTIONS, _reduced),
    **dict.fromkeys(reduction.WINDOWS, _windowed),
    **dict.fromkeys((*reduction.RUNNING, "sort"), _running),
    "iota": _numbered,
    **dict.fromkeys(("random_bits", "threefry2x32", "rng_bit_generator"), _random),
}


def _lengths_of(eqn: Equation) -> list[Axis]:
    """The axes whose lengths multiply to the multiply-adds of a product."""
    axes = _axes_of(eqn.outputs)
    if eqn.name == "dot_general":
        return axes + [(eqn.inputs[0], i) for i in contraction._sides(eqn)[0].summed]
    kernel, outputs = eqn.inputs[1], eqn.params["dimension_numbers"].rhs_spec[0]
    return axes + [(kernel, i) for i in range(len(kernel.shape)) if i != outputs]


# --- elementwise operations at zero ---------------------------------------------------
_ZERO_AT_ZERO = frozenset(
    "abs add add_any and asin asinh atan atanh cbrt ceil conj convert_element_type "
    "copy copy_p erf expm1 floor imag log1p max min mul ne neg or real "
    "reduce_precision round sign sin sinh sqrt square stop_gradient sub tan tanh gt lt "
    "xor".split()
)


def _zero_of(eqn: Equation, constants: dict[Value, Any]) -> str:
    """How a result is zero: if ``any`` operand is, ``all``, the ``first``, all
    ``cases`` of a selection, or ``none`` says so.
    """
    scalars = [constants.get(x) for x in eqn.inputs if not x.shape]
    if eqn.name in ("mul", "and"):
        return "any"
    if eqn.name == "div":
        return "first"
    if eqn.name == "select_n":
        which, *cases = eqn.inputs
        known = [constants.get(x) for x in cases if not x.shape]
        numbers = [None if x is None else as_numbers(x) for x in known]
        if any(x is None or np.any(x) for x in numbers):
            return "none"
        return "cases" if which.shape else "all"
    if any(x is None for x in scalars):
        return "none"
    if not scalars and eqn.name in _ZERO_AT_ZERO:
        return "all"
    return "all" if _at_zero(eqn, constants) == 0 else "none"


def _at_zero(eqn: Equation, constants: dict[Value, Any]) -> Any:
    """The result of an operation where its arrays are zero; NaN if it has none."""
    numbers = [
        np.zeros((), x.dtype) if x.shape else np.asarray(constants[x], x.dtype)
        for x in eqn.inputs
    ]
    known = elementwise._IN_NUMPY.get(eqn.name)
    if known is not None:
        return known(*numbers)
    try:
        with jax.ensure_compile_time_eval():
            arrays = [jnp.asarray(x) for x in numbers]
            return np.asarray(eqn.primitive.bind(*arrays, **eqn.params))
    except (TypeError, ValueError):
        return math.nan
