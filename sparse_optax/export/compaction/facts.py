"""What is known and what is needed of every value of a program, axis by axis."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.export.compaction.program import Program, Value

# Along each axis the indices that are needed; None for all of them.
Box = tuple[np.ndarray | None, ...]


class Slices(NamedTuple):
    """Along one axis: which slices are one number each, and this number."""

    mask: np.ndarray
    number: np.ndarray


class Settings(NamedTuple):
    """How index sets are chosen.

    Attributes:
      round_to: Sizes of index sets that are summed over are multiples of it.
      fold: Whether inputs of a sum that are known numbers are left out, and what they
        add is computed once.
      keep_all: Whether nothing is cut.
      spare_takes: Whether inputs stay where to take the others costs more.
      in_place: Whether a product reads all that is there of what it sums over.
    """

    round_to: int = 1
    fold: bool = True
    keep_all: bool = False
    spare_takes: bool = True
    in_place: bool = False


Known = dict[int, Slices]  # by axis; axes of which nothing is known are left out


class Facts:
    """Facts about the values of one program.

    Attributes:
      exact: Values that depend on parameters alone.
      live: Where such a value may be different from zero; without an entry, where it
        is.
      probe: Of such a value another number, with other weights where zeros may change.
      known: For other values, the slices that are one number.
      need: What is needed of each value; a value that is not here is not needed.
      have: ``need`` as the last pass found it.
      sums: By the first output of an equation and one of its pairs of axes, the
        indices over which it sums; they only become more.
      targets: By the first output of an equation, what it reads of each input.
      origin: The parameters from which a value is made, and nothing else.
      roots: Of a part of another value this value, for parts that lie side by side.
      at_hand: Values that are there in full whatever is needed.
      inner: By the first output of an equation, the analysis of its body.
      folds: By the first output of an equation, what inputs that were left out add.
      least: Lengths that boxes of values are filled up to.
      least_sums: Numbers of indices that ``sums`` are filled up to.
      real: What is needed of values without filling up; of other entries, which nothing
        reads, the numbers do not matter. Without an entry, all that is needed.
    """

    def __init__(self, program: Program, settings: Settings):
        """Knows the constants of the program."""
        self.program = program
        self.settings = settings
        self.exact: dict[Value, Any] = dict(program.constants)
        self.live: dict[Value, np.ndarray] = {}
        self.probe: dict[Value, Any] = {}
        self.known: dict[Value, Known] = {}
        self.need: dict[Value, Box] = {}
        self.have: dict[Value, Box] = {}
        self.sums: dict[tuple[Value, int], np.ndarray] = {}
        self.targets: dict[Value, list[Box | None]] = {}
        self.origin: dict[Value, frozenset[str]] = {}
        self.roots: dict[Value, Value] = {}
        self.at_hand: set[Value] = set()
        self.inner: dict[Value, Any] = {}
        self.folds: dict[Value, np.ndarray | None] = {}
        self.least: dict[Value, tuple[Any, ...]] = {}
        self.least_sums: dict[tuple[Value, int], int] = {}
        self.real: dict[Value, Box] = {}

    def along(self, value: Value, axis: int) -> Slices:
        """What is known of the slices along an axis of a length that is a number."""
        n = value.shape[axis]
        if value in self.exact:
            array = as_numbers(self.exact[value])
            if array is not None:
                rows = np.moveaxis(array, axis, 0).reshape(n, -1)
                if rows.shape[1]:
                    return Slices((rows == rows[:, :1]).all(1), rows[:, 0])
        elif axis in self.known.get(value, {}):
            return self.known[value][axis]
        return Slices(np.zeros(n, bool), np.zeros(n, number_type(value.dtype)))

    def grid(self, value: Value, axes: Sequence[int]) -> Slices:
        """Known numbers over several axes: of an entry that one of them knows."""
        shape = [value.shape[axis] for axis in axes]
        mask = np.zeros(shape, bool)
        number = np.zeros(shape, number_type(value.dtype))
        for place, axis in enumerate(axes):
            found = self.along(value, axis)
            if found.mask.any():
                sides = [1] * len(shape)
                sides[place] = -1
                there = np.broadcast_to(found.mask.reshape(sides), mask.shape)
                number = np.where(there, found.number.reshape(sides), number)
                mask = mask | there
        return Slices(mask, number)

    def zeros(self, value: Value, axis: int) -> np.ndarray:
        """Which slices along an axis are zero and stay so."""
        if value in self.exact:
            return ~any_along(self.nonzero(value), axis)
        found = self.along(value, axis)
        return found.mask & (found.number == 0)

    def nonzero(self, value: Value) -> np.ndarray:
        """Where an exact value is not zero, or may become so in training."""
        if value not in self.live:
            array = as_numbers(self.exact[value])
            self.live[value] = (
                np.ones(value.shape, bool) if array is None else array != 0
            )
        return self.live[value]

    def hand_over(self, value: Value, other: "Facts", own: Value) -> None:
        """Tells what is known of a value to the facts of a program that it enters."""
        for name in ("exact", "live", "probe", "known", "origin"):
            mine = getattr(self, name)
            if value in mine:
                getattr(other, name)[own] = mine[value]

    def want(self, value: Value, box: Box | None) -> None:
        """Adds to what is needed of a value."""
        if box is not None:
            old = self.need.get(value)
            self.need[value] = box if old is None else union(old, box)

    def widen(self, value: Value, axis: int, mask: np.ndarray | None) -> None:
        """Makes more of a needed value than is asked for."""
        box = list(self.need[value])
        box[axis] = mask
        self.need[value] = union(self.need[value], tuple(box))

    def fill(self, value: Value) -> None:
        """Makes as much of a needed value as ``least`` says, with what was there."""
        if value not in self.need or value not in self.least:
            return
        for axis, (mask, n) in enumerate(
            zip(self.need[value], self.least[value], strict=True)
        ):
            if mask is not None and is_number(n) and mask.sum() < n:
                self.widen(value, axis, filled(mask, n, self.there(value, axis)))

    def really(self, value: Value, box: Box) -> Box:
        """The part of a box that is not there to fill it up."""
        return both(box, self.real[value]) if value in self.real else box

    def there(self, value: Value, axis: int) -> np.ndarray:
        """The indices that were there after the last pass."""
        n = value.shape[axis]
        if value in self.at_hand:
            return np.ones(n, bool)
        if value not in self.have:
            return np.zeros(n, bool)
        return as_mask(self.have[value][axis], n)


# --- numbers --------------------------------------------------------------------------
def as_numbers(x: Any) -> np.ndarray | None:
    """An array of numbers on the host; None for random keys."""
    dtype = getattr(x, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.extended):
        return None
    return np.asarray(x)


def number_type(dtype: Any) -> Any:
    """A dtype that NumPy knows; bool for keys and tokens, of which nothing is known."""
    try:
        return np.dtype(dtype)
    except TypeError:
        return np.dtype(bool)


def wide(array: np.ndarray) -> np.ndarray:
    """Floating numbers in double precision, others as they are."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array.astype(np.complex128)
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(np.float64) if floating else array


def is_number(n: Any) -> bool:
    """Whether a length is a number, and not symbolic."""
    return isinstance(n, int | np.integer)


# --- boxes ----------------------------------------------------------------------------
def everything(value: Value) -> Box:
    """The box of a whole value."""
    return (None,) * len(value.shape)


def filled(mask: np.ndarray, n: int, first: np.ndarray) -> np.ndarray:
    """A mask with more indices, up to n: those of ``first``, then others, in order."""
    order = np.argsort(~first, kind="stable")
    order = order[~mask[order]]
    mask = mask.copy()
    mask[order[: max(0, n - int(mask.sum()))]] = True
    return mask


def plain(mask: np.ndarray | None) -> np.ndarray | None:
    """None for a mask of all indices."""
    return None if mask is None or mask.all() else mask


def union(a: Box, b: Box) -> Box:
    """The smallest box around two."""
    return tuple(
        None if x is None or y is None else plain(x | y)
        for x, y in zip(a, b, strict=True)
    )


def both(a: Box, b: Box) -> Box:
    """What two boxes have in common."""
    return tuple(
        y if x is None else x if y is None else x & y for x, y in zip(a, b, strict=True)
    )


def covers(a: Box | None, b: Box | None) -> bool:
    """Whether the first box has all of the second."""
    if b is None:
        return True
    if a is None:
        return False
    return all(
        x is None or (y is not None and not bool((y & ~x).any()))
        for x, y in zip(a, b, strict=True)
    )


def as_mask(mask: np.ndarray | None, n: int) -> np.ndarray:
    """A mask of n indices."""
    return np.ones(n, bool) if mask is None else mask


def length(mask: np.ndarray | None, n: Any) -> Any:
    """How many indices a box has along an axis of length n."""
    return n if mask is None else int(mask.sum())


def lengths(box: Box, shape: Iterable[Any]) -> tuple[Any, ...]:
    """The shape of a box."""
    return tuple(length(mask, n) for mask, n in zip(box, shape, strict=True))


def cut(array: Any, have: Box, want: Box) -> Any:
    """From what is there of an array, what is wanted of it."""
    for axis, (there, wanted) in enumerate(zip(have, want, strict=True)):
        if wanted is not None and (there is None or (there != wanted).any()):
            places = np.flatnonzero(wanted[as_mask(there, len(wanted))])
            array = take(array, places, axis)
        elif wanted is None and there is not None:
            raise AssertionError("more is wanted than is there")
    return array


def take(array: Any, places: np.ndarray, axis: int) -> Any:
    """Slices at ascending places: by steps where they are regular."""
    if len(places) == array.shape[axis]:
        return array
    steps = np.unique(np.diff(places))
    if len(places) and len(steps) <= 1:
        step = int(steps[0]) if len(steps) else 1
        first, last = int(places[0]), int(places[-1]) + 1
        if isinstance(array, np.ndarray):
            return array[(slice(None),) * axis + (slice(first, last, step),)]
        return jax.lax.slice_in_dim(array, first, last, step, axis)
    if isinstance(array, np.ndarray):
        return array.take(places, axis)
    index = (slice(None),) * axis + (places,)
    taken = array.at[index].get(
        mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
    )
    # Without the barrier XLA hands the entries to a matrix product in the order in
    # which it took them, which makes both up to three times slower on a CPU.
    return jax.lax.optimization_barrier(taken)


def crossed(masks: Sequence[np.ndarray]) -> np.ndarray:
    """The outer product of masks."""
    product = np.ones((), bool)
    for mask in masks:
        product = np.logical_and.outer(product, mask)
    return product


def any_along(mask: np.ndarray, axis: int) -> np.ndarray:
    """Along an axis of a mask, whether anything is set."""
    others = tuple(i for i in range(mask.ndim) if i != axis)
    return np.asarray(mask.any(others))


def constant_along(found: Slices, axis: int) -> Slices:
    """Along an axis of a grid, which slices are one number."""
    n = found.mask.shape[axis]
    mask = np.moveaxis(found.mask, axis, 0).reshape(n, -1)
    number = np.moveaxis(found.number, axis, 0).reshape(n, -1)
    if not mask.shape[1]:
        return Slices(np.zeros(n, bool), np.zeros(n, number.dtype))
    return Slices(mask.all(1) & (number == number[:, :1]).all(1), number[:, 0])


def size(shape: Sequence[Any]) -> int | None:
    """Number of entries; None if it is symbolic."""
    return math.prod(shape) if all(map(is_number, shape)) else None
