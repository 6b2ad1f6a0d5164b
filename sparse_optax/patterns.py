"""Patterns: which weights are kept or removed together, or N of each M.

A pattern cuts each leaf into *units*, which a method keeps or removes as a whole.
Methods see one number per unit, the sum of :math:`|x|` over its weights, and their
masks of units are spread over the weights:

===========================  ========================================================
``single_weights()``         every weight is a unit, as without a pattern
``blocks(rows, columns)``    rectangles of inputs and outputs
``output_units()``           whole columns: the weights of one output unit or channel
``slices()``                 the spatial slices of convolution kernels
``n_m(n, m)``                single weights, n of each m along the contraction axis
``constant_fan_in(density)`` single weights, the same number into each output unit
===========================  ========================================================

The axes of inputs and outputs are told leaf by leaf, from names and shapes: dense
kernels of flax and haiku are (in, out), convolution kernels (height, width, in, out),
and a leaf called ``weight``, as in equinox, is (out, in, ...). A bias beside a kernel
has the shape of its outputs. Where this does not decide, an error asks for the axes:
``n_m(2, 4, axis={"query/kernel": 0})``; ``contraction_axes`` reads them from a module.

Units should not cross devices. On a mesh with Explicit axes blocks, slices and output
units lie where their leaves do, and blocks that cross devices are an error; under N:M
and ``constant_fan_in`` a leaf must not be sharded there. A pattern is a tuple and not a
function, since ``optax.inject_hyperparams`` takes every callable for a schedule.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, NoReturn, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_optax import checks
from sparse_optax.contraction import contraction_axes as contraction_axes
from sparse_optax.roles import Layout
from sparse_optax.selection.leaf import scores
from sparse_optax.selection.leaf import wide as as_wide
from sparse_optax.selection.topk import LONGEST

__all__ = [
    "Blocks",
    "ConstantFanIn",
    "GroupsNM",
    "Pattern",
    "SingleWeights",
    "blocks",
    "constant_fan_in",
    "contraction_axes",
    "n_m",
    "output_units",
    "single_weights",
    "slices",
]

Shape = Sequence[int]
Axes = tuple[int, int]
Operands = tuple[jax.Array, ...]
Score = Callable[..., jax.Array] | None


class Pattern(Protocol):
    """The interface of a pattern. ``stacked`` is the axis whose slices are layers."""

    @property
    def name(self) -> str:
        """Its name in errors."""
        ...

    @property
    def density(self) -> float | None:
        """The density that it fixes in every layer; None for any density."""
        ...

    @property
    def asks(self) -> bool:
        """Whether its axes differ from leaf to leaf, see ``along``."""
        ...

    @property
    def given(self) -> Any:
        """``(name, axes)`` of leaves whose axes were given, if it asks for them."""
        ...

    def along(self, name: str, layout: Layout | None) -> "Pattern":
        """The pattern with the axes of the leaf ``name``; raises if they are unknown.
        ``layout`` is what names and shapes tell, or None.
        """
        ...

    def check(self, name: str, shape: Shape, stacked: int | None = None) -> None:
        """Raises if the leaf ``name`` of this shape cannot be cut into units."""
        ...

    def with_density(self, density: Any) -> "Pattern":
        """The pattern for another density than its own."""
        ...

    def unit_size(self, shape: Shape, stacked: int | None = None) -> int:
        """Number of weights of a unit."""
        ...

    def view_shape(self, shape: Shape, stacked: int | None = None) -> tuple[int, ...]:
        """The shape of what ``view`` gives."""
        ...

    def view_axis(self, stacked: int | None) -> int | None:
        """The axis of the view whose slices are ranked separately."""
        ...

    def view(self, x: jax.Array, stacked: int | None = None) -> jax.Array:
        """One number per unit: the sum of magnitudes; of a mask, whether any is set."""
        ...

    def operands(
        self, score: Score, arrays: Operands, stacked: int | None = None
    ) -> tuple[Operands, Score]:
        """The arrays and the score by which a selection ranks units."""
        ...

    def spread(
        self, units: jax.Array, shape: Shape, stacked: int | None = None
    ) -> jax.Array:
        """A mask of weights from a mask of units."""
        ...

    def weights(self, units: Any, shape: Shape, stacked: int | None = None) -> Any:
        """Weights per leaf, or stacked layer, from units per layer of the view."""
        ...

    def grid(
        self, shape: Shape, stacked: int | None = None
    ) -> tuple[tuple[int, ...], int | None]:
        """The shape of the view with whole layers, and the axis of layers in it."""
        ...

    def follows(self, mask: jax.Array, stacked: int | None = None) -> jax.Array:
        """Whether a mask follows the pattern, a bool scalar."""
        ...


class SingleWeights(NamedTuple):
    """The default pattern: every weight is a unit.

    Attributes:
      name: Its name in errors.
      density: None: any density.
    """

    name: str = "single_weights()"
    density: float | None = None

    @property
    def asks(self) -> bool:
        return False

    @property
    def given(self) -> tuple[()]:
        return ()

    def along(self, name: str, layout: Layout | None) -> Pattern:
        return self

    def check(self, name: str, shape: Shape, stacked: int | None = None) -> None:
        pass

    def with_density(self, density: Any) -> Pattern:
        return self

    def unit_size(self, shape: Shape, stacked: int | None = None) -> int:
        return 1

    def view_shape(self, shape: Shape, stacked: int | None = None) -> tuple[int, ...]:
        return tuple(shape)

    def view_axis(self, stacked: int | None) -> int | None:
        return stacked

    def view(self, x: jax.Array, stacked: int | None = None) -> jax.Array:
        return x

    def operands(
        self, score: Score, arrays: Operands, stacked: int | None = None
    ) -> tuple[Operands, Score]:
        return arrays, score

    def spread(
        self, units: jax.Array, shape: Shape, stacked: int | None = None
    ) -> jax.Array:
        return units

    def weights(self, units: Any, shape: Shape, stacked: int | None = None) -> Any:
        return units

    def grid(
        self, shape: Shape, stacked: int | None = None
    ) -> tuple[tuple[int, ...], int | None]:
        return self.view_shape(shape, stacked), stacked

    def follows(self, mask: jax.Array, stacked: int | None = None) -> jax.Array:
        return jnp.ones([], bool)


class Blocks(NamedTuple):
    """Units that are boxes; made by ``blocks``, ``output_units`` and ``slices``.

    Attributes:
      name: Its name in errors.
      sizes: ``(axis, size)`` of a unit along some axes.
      others: Its size along the other axes: 1, or None for their whole length.
      density: None: any density.
      given: ``(name, axes)`` of leaves whose axes were given; None if ``sizes`` has
        the axes of all leaves.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    others: int | None = 1
    density: float | None = None
    given: tuple[tuple[str, tuple[int, ...]], ...] | None = None

    @property
    def asks(self) -> bool:
        return self.given is not None

    def along(self, name: str, layout: Layout | None) -> Pattern:
        axes = dict(self.given or ()).get(name)
        if axes is None and layout is None:
            pairs = len(self.sizes) > 1
            told = f"axes={{{name!r}: (-2, -1)}}" if pairs else f"axis={{{name!r}: -1}}"
            _unknown(self.name, name, told)
        return self._replace(sizes=self._sizes(axes, layout), given=None)

    def _sizes(self, axes: tuple[int, ...] | None, layout: Any) -> Any:
        """``sizes`` along given axes, or those of a layout."""
        lengths = [size for _, size in self.sizes]
        if axes is not None:
            lengths = lengths * (len(axes) // len(lengths))
            return tuple(zip(axes, lengths, strict=True))
        if len(lengths) == 1:  # output units
            return tuple((axis, 1) for axis in layout.outputs)
        if self.others is None:  # slices
            return tuple((axis, 1) for axis in (*layout.inputs, *layout.outputs))
        return ((layout.inputs[-1], lengths[0]), (layout.outputs[-1], lengths[1]))

    def check(self, name: str, shape: Shape, stacked: int | None = None) -> None:
        _check_axes(self.name, self.sizes, name, shape, stacked)

    def with_density(self, density: Any) -> Pattern:
        return self

    def _unit(self, shape: Shape, stacked: int | None) -> list[int]:
        """Size of a unit along each axis."""
        sizes = [size if self.others is None else 1 for size in shape]
        for axis, size in self.sizes:
            sizes[axis % len(shape)] = size
        if stacked is not None:
            sizes[stacked] = 1
        return sizes

    def unit_size(self, shape: Shape, stacked: int | None = None) -> int:
        return math.prod(self._unit(shape, stacked))

    def view_shape(self, shape: Shape, stacked: int | None = None) -> tuple[int, ...]:
        sizes = self._unit(shape, stacked)
        return tuple(n // size for n, size in zip(shape, sizes, strict=True))

    def view_axis(self, stacked: int | None) -> int | None:
        return stacked

    def view(self, x: jax.Array, stacked: int | None = None) -> jax.Array:
        sizes = self._unit(x.shape, stacked)
        parts, within, whole = x, [], []
        # From the last axis on, so that those before it keep their numbers.
        for axis, (n, size) in reversed([*enumerate(zip(x.shape, sizes, strict=True))]):
            if 1 < size < n:
                parts = _divided(parts, axis, size)
                within = [axis + 1, *(i + 1 for i in within)]
                whole = [i + 1 for i in whole]
            elif size > 1:
                whole.append(axis)
        axes = (*within, *whole)
        if x.dtype == bool:
            found = jnp.any(parts, axis=axes, keepdims=True)
        else:
            wide = jnp.abs(parts.astype(as_wide(x.dtype)))
            found = jnp.sum(wide, axis=axes, keepdims=True)
        return jnp.squeeze(found, within)

    def operands(
        self, score: Score, arrays: Operands, stacked: int | None = None
    ) -> tuple[Operands, Score]:
        return (self.view(scores(score, arrays), stacked),), None

    def spread(
        self, units: jax.Array, shape: Shape, stacked: int | None = None
    ) -> jax.Array:
        for axis, size in enumerate(self._unit(shape, stacked)):
            if 1 < size < shape[axis]:
                units = _repeated(units, axis, size)
        return jnp.broadcast_to(units, shape)

    def weights(self, units: Any, shape: Shape, stacked: int | None = None) -> Any:
        return units * self.unit_size(shape, stacked)

    def grid(
        self, shape: Shape, stacked: int | None = None
    ) -> tuple[tuple[int, ...], int | None]:
        return self.view_shape(shape, stacked), stacked

    def follows(self, mask: jax.Array, stacked: int | None = None) -> jax.Array:
        units = self.view(mask, stacked)
        return jnp.all(self.spread(units, mask.shape, stacked) == mask)


class GroupsNM(NamedTuple):
    """N of each M weights; made by ``n_m``. Each group is ranked like a layer.

    Attributes:
      name: Its name in errors.
      n: Weights kept per group.
      m: Weights per group.
      axis: The axis along which groups lie.
      given: ``(name, axis)`` of leaves whose axis was given; None if ``axis`` is that
        of all leaves.
    """

    name: str
    n: int
    m: int
    axis: int
    given: tuple[tuple[str, int], ...] | None = None

    @property
    def asks(self) -> bool:
        return self.given is not None

    def along(self, name: str, layout: Layout | None) -> Pattern:
        axis = dict(self.given or ()).get(name)
        if axis is None and layout is None:
            told = f"axis={{{name!r}: axis}}, or read them from the module with "
            _unknown(self.name, name, told + "patterns.contraction_axes")
        if axis is None:
            axis = layout.inputs[-1]  # type: ignore[union-attr]
        return self._replace(axis=axis, given=None)

    @property
    def density(self) -> float | None:
        """The density n / m of every layer."""
        return self.n / self.m

    def check(self, name: str, shape: Shape, stacked: int | None = None) -> None:
        _check_axes(self.name, ((self.axis, self.m),), name, shape, stacked)

    def with_density(self, density: Any) -> Pattern:
        n = math.floor(min(density, 1) * self.m)
        return self._replace(name=f"n_m({n}, {self.m})", n=n)

    def unit_size(self, shape: Shape, stacked: int | None = None) -> int:
        return 1

    def view_shape(self, shape: Shape, stacked: int | None = None) -> tuple[int, ...]:
        return math.prod(shape) // self.m, self.m

    def view_axis(self, stacked: int | None) -> int | None:
        return 0

    def view(self, x: jax.Array, stacked: int | None = None) -> jax.Array:
        """The values of the leaf, one row per group."""
        return jnp.moveaxis(x, self.axis, -1).reshape(-1, self.m)

    def operands(
        self, score: Score, arrays: Operands, stacked: int | None = None
    ) -> tuple[Operands, Score]:
        return (self.view(scores(score, arrays), stacked),), None

    def spread(
        self, units: jax.Array, shape: Shape, stacked: int | None = None
    ) -> jax.Array:
        moved = list(shape)
        moved.append(moved.pop(self.axis))
        return jnp.moveaxis(units.reshape(moved), -1, self.axis)

    def grid(
        self, shape: Shape, stacked: int | None = None
    ) -> tuple[tuple[int, ...], int | None]:
        axis = self.axis % len(shape)
        moved = (*shape[:axis], *shape[axis + 1 :], shape[axis])
        return moved, None if stacked is None else stacked - (stacked > axis)

    def weights(self, units: Any, shape: Shape, stacked: int | None = None) -> Any:
        whole, own = self.grid(shape, stacked)
        others = tuple(i for i in range(len(whole)) if i != own)
        cut = (*whole[:-1], whole[-1] // self.m)
        return jnp.sum(units.reshape(cut), axis=others, dtype=units.dtype)

    def follows(self, mask: jax.Array, stacked: int | None = None) -> jax.Array:
        kept = jnp.sum(self.view(mask, stacked), axis=1, dtype=jnp.int32)
        return jnp.all(kept == self.n)


class ConstantFanIn(NamedTuple):
    """The same number of weights into each output unit; made by ``constant_fan_in``.
    Those of a unit are ranked like a layer.

    Attributes:
      name: Its name in errors.
      density: The density of every unit.
      outputs: The axes of the outputs.
      given: ``(name, axes)`` of leaves whose axes were given; None if ``outputs`` are
        those of all leaves.
    """

    name: str
    density: float
    outputs: tuple[int, ...]
    given: tuple[tuple[str, tuple[int, ...]], ...] | None = None

    @property
    def asks(self) -> bool:
        return self.given is not None

    def along(self, name: str, layout: Layout | None) -> Pattern:
        axes = dict(self.given or ()).get(name)
        if axes is None and layout is None:
            _unknown(self.name, name, f"axis={{{name!r}: (axes of its outputs)}}")
        if axes is None:
            axes = tuple(layout.outputs)  # type: ignore[union-attr]
        return self._replace(outputs=axes, given=None)

    def check(self, name: str, shape: Shape, stacked: int | None = None) -> None:
        sizes = tuple((axis, 1) for axis in self.outputs)
        _check_axes(self.name, sizes, name, shape, stacked)
        own = {axis % len(shape) for axis in self.outputs}
        if stacked is not None and stacked % len(shape) in own:
            allowed = "axes of outputs other than the axis of layers"
        elif not self._order(len(shape), stacked)[1]:
            allowed = "an axis that is summed over beside those of its outputs"
        else:
            return
        raise checks.ArgumentError(
            f"{self.name} needs {allowed}; {name!r} has shape {tuple(shape)} and "
            f"outputs along {self.outputs}"
            + ("" if stacked is None else f", stacked along axis {stacked}")
            + ". Give axis={name: axes of its outputs}, or leave it out with "
            "where=lambda name, leaf: ..."
        )

    def with_density(self, density: Any) -> Pattern:
        made = constant_fan_in(min(density, 1.0))
        return self._replace(name=made.name, density=made.density)

    def unit_size(self, shape: Shape, stacked: int | None = None) -> int:
        return 1

    def _order(self, rank: int, stacked: int | None) -> tuple[list[int], list[int]]:
        """The axes of output units, with that of layers, and those summed over."""
        first = {axis % rank for axis in self.outputs}
        first |= set() if stacked is None else {stacked % rank}
        return sorted(first), [axis for axis in range(rank) if axis not in first]

    def view_shape(self, shape: Shape, stacked: int | None = None) -> tuple[int, ...]:
        units, summed = self._order(len(shape), stacked)
        return math.prod(shape[i] for i in units), math.prod(shape[i] for i in summed)

    def view_axis(self, stacked: int | None) -> int | None:
        return 0

    def view(self, x: jax.Array, stacked: int | None = None) -> jax.Array:
        """The values of the leaf, one row per output unit."""
        units, summed = self._order(x.ndim, stacked)
        return x.transpose(units + summed).reshape(self.view_shape(x.shape, stacked))

    def operands(
        self, score: Score, arrays: Operands, stacked: int | None = None
    ) -> tuple[Operands, Score]:
        return (self.view(scores(score, arrays), stacked),), None

    def spread(
        self, units: jax.Array, shape: Shape, stacked: int | None = None
    ) -> jax.Array:
        moved, _ = self.grid(shape, stacked)
        first, summed = self._order(len(shape), stacked)
        return units.reshape(moved).transpose(np.argsort(first + summed))

    def grid(
        self, shape: Shape, stacked: int | None = None
    ) -> tuple[tuple[int, ...], int | None]:
        units, summed = self._order(len(shape), stacked)
        own = None if stacked is None else units.index(stacked % len(shape))
        return tuple(shape[i] for i in units + summed), own

    def weights(self, units: Any, shape: Shape, stacked: int | None = None) -> Any:
        rows, _ = self._order(len(shape), stacked)
        _, own = self.grid(shape, stacked)
        others = tuple(i for i in range(len(rows)) if i != own)
        by_axis = units.reshape([shape[i] for i in rows])
        return jnp.sum(by_axis, axis=others, dtype=units.dtype)

    def follows(self, mask: jax.Array, stacked: int | None = None) -> jax.Array:
        rows = self.view(mask, stacked)
        wanted = kept_of_each(self.density, rows.shape[1])
        return jnp.all(jnp.sum(rows, axis=1, dtype=jnp.int32) == wanted)


def kept_of_each(density: float, size: int) -> int:
    """Weights that a pattern of fixed density keeps of each of its groups: rounded down
    as by ``budgets.count``, but at least one.
    """
    least = min(1, math.ceil(density), size)
    return max(math.floor(checks.nearest(Fraction(density)) * size), least)


SINGLE = SingleWeights()


def pattern_of(pattern: Any) -> Pattern:
    """A pattern that was given, or the identity for None."""
    if pattern is None:
        return SINGLE
    if not isinstance(pattern, SingleWeights | Blocks | GroupsNM | ConstantFanIn):
        cure = "Pass patterns.blocks(4, 4) or patterns.n_m(2, 4)."
        checks.fail("pattern", pattern, "one of sparse_optax.patterns", cure)
    return pattern


def whole_units(counts: Any, size: int) -> Any:
    """Counts of weights as whole units: rounded down, but one where there is any."""
    return np.maximum(np.asarray(counts) // size, np.minimum(counts, 1))


def _unknown(pattern: str, name: str, told: str) -> NoReturn:
    raise checks.ArgumentError(
        f"{pattern}: the axes of {name!r} cannot be told from names and shapes; they "
        "may be those of a convolution or of a projection of attention. Give them: "
        f"{told}."
    )


def _by_name(argument: str, given: Any, several: int) -> Any:
    """``(name, axes)`` pairs of axes given by name; () for None."""
    if given is None:
        return ()
    cure = "Give {'query/kernel': 0}, or leave it out."
    pairs = []
    for name, axes in given.items():
        axes = axes if isinstance(axes, tuple) else (axes,)
        for axis in axes:
            checks.whole(argument, axis, -LONGEST, static=True, cure=cure)
        if len(axes) % several if several else len(axes) != 1:
            allowed = f"{several or 1} axes for {name!r}"
            checks.fail(argument, axes, allowed, cure)
        pairs.append((name, tuple(map(int, axes)) if several else int(axes[0])))
    return tuple(pairs)


def _divided(x: jax.Array, axis: int, size: int) -> jax.Array:
    """An axis as blocks of some size, and a new one inside of them."""
    _check_whole_blocks(x, axis, size)
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])

    def moved(spec):
        return (*spec[: axis + 1], None, *spec[axis + 1 :])

    return _reshaped(x, shape, moved)


def _check_whole_blocks(x: jax.Array, axis: int, size: int) -> None:
    """Raises where blocks along an Explicit axis of a mesh would cross devices."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return
    names = (*sharding.spec, *[None] * x.ndim)[axis] or ()
    names = names if isinstance(names, tuple) else (names,)
    devices = math.prod(sharding.mesh.shape[name] for name in names)
    if x.shape[axis] // size % devices:
        raise checks.ArgumentError(
            f"blocks of {size} along axis {axis} of a leaf of shape {x.shape} cross "
            f"the {devices} devices that it is sharded over, on a mesh with Explicit "
            "axes. Shard it by whole blocks, choose another size, or make the axes of "
            "the mesh Auto."
        )


def check_explicit(pattern: Pattern, name: str, leaf: Any) -> None:
    """Raises where a leaf is sharded over Explicit axes of a mesh under a pattern whose
    groups are rows of another array.
    """
    if pattern.density is None:
        return
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.Array) else None
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return
    if any(axis is not None for axis in sharding.spec):
        raise checks.ArgumentError(
            f"`pattern`: {pattern.name} needs leaves that are not sharded over "
            f"Explicit axes of a mesh; {name!r} has {sharding.spec}. Make the axes of "
            "the mesh Auto, or choose blocks or output_units."
        )


def _repeated(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Each entry along an axis so many times."""
    apart = jnp.expand_dims(x, axis + 1)
    sides = list(apart.shape)
    sides[axis + 1] = size
    shape = (*x.shape[:axis], x.shape[axis] * size, *x.shape[axis + 1 :])
    return _reshaped(
        jnp.broadcast_to(apart, sides),
        shape,
        lambda spec: (*spec[: axis + 1], *spec[axis + 2 :]),
    )


def _reshaped(x: jax.Array, shape: Shape, moved: Callable[[Any], Any]) -> jax.Array:
    """``x.reshape(shape)``; on an Explicit mesh ``moved`` says which axes lie where."""
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x.reshape(shape)
    spec = PartitionSpec(
        *moved((*sharding.spec, *[None] * (x.ndim - len(sharding.spec))))
    )
    return jax.lax.reshape(x, shape, out_sharding=NamedSharding(sharding.mesh, spec))


def _check_axes(pattern, sizes, name, shape, stacked) -> None:
    rank = len(shape)
    taken: set[int] = set()
    for axis, size in sizes:
        there = -rank <= axis < rank and axis % rank not in taken
        if there:
            taken.add(axis % rank)
            there = axis % rank != stacked or size == 1
        if not there or shape[axis] % size:
            what = f"axis {axis}" if there else f"an axis {axis} of its own"
            raise checks.ArgumentError(
                f"{pattern} needs {what} whose length is a multiple of {size}; "
                f"{name!r} has shape {tuple(shape)}"
                + ("" if stacked is None else f", stacked along axis {stacked}")
                + ". Leave it out with where=lambda name, leaf: ..., or choose other "
                "sizes or axes."
            )


# --- the patterns ---------------------------------------------------------------------
_CURE = "Give a number of weights, such as blocks(4, 4) or n_m(2, 4)."
_AXIS = "Give an axis such as -1, {'query/kernel': 0}, or leave it out."


def single_weights() -> SingleWeights:
    """Every weight is a unit, as without a pattern.

    Returns:
      A pattern.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.single_weights().unit_size((3, 3, 8, 6))
      1
    """
    return SINGLE


@checks.boundary("blocks")
def blocks(
    rows: int, columns: int, *, axes: Axes | Mapping[str, Axes] | None = None
) -> Blocks:
    """Rectangles of ``rows`` x ``columns`` weights, of inputs and outputs.

    A convolution kernel has such blocks at each spatial position.

    Args:
      rows: Weights of a block along the inputs, at least 1.
      columns: Weights of a block along the outputs, at least 1.
      axes: The axes of inputs and outputs, of all leaves or as ``{name: axes}`` of
        some. None tells them from names and shapes, see ``patterns``.

    Returns:
      A pattern.

    Raises:
      ValueError: If a size is not an integer of at least 1.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.blocks(4, 2).unit_size((3, 3, 8, 6))
      8
    """
    checks.whole("rows", rows, 1, static=True, cure=_CURE)
    checks.whole("columns", columns, 1, static=True, cure=_CURE)
    (first, second), given = _axes_of(axes, (-2, -1))
    sizes = ((first, rows), (second, columns))
    return Blocks(f"blocks({rows}, {columns})", sizes, given=given)


def _axes_of(axes: Any, usual: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
    """Axes of all leaves, and those given by name; None where all leaves share them."""
    if axes is None or isinstance(axes, Mapping):
        argument = "axes" if len(usual) > 1 else "axis"
        return usual, _by_name(argument, axes, len(usual))
    if len(usual) > 1:
        return checks.two_axes("axes", axes), None
    checks.whole("axis", axes, -LONGEST, static=True, cure=_AXIS)
    return (int(axes),), None


@checks.boundary("output_units")
def output_units(*, axis: int | Mapping[str, Any] | None = None) -> Blocks:
    """All weights that lead to one output unit or channel.

    The queries of attention have one unit for each head and index.

    Args:
      axis: The axis of the outputs, of all leaves or as ``{name: axis}`` of some, a
        tuple for several. None tells it from names and shapes, see ``patterns``.

    Returns:
      A pattern.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.output_units().unit_size((3, 3, 8, 6))
      72
    """
    (only,), given = _axes_of(axis, (-1,))
    return Blocks("output_units()", ((only, 1),), others=None, given=given)


@checks.boundary("slices")
def slices(*, axes: Axes | Mapping[str, Axes] | None = None) -> Blocks:
    """The spatial slices of convolution kernels: one for each input and output.

    Args:
      axes: The axes of inputs and outputs, of all leaves or as ``{name: axes}`` of
        some. None tells them from names and shapes, see ``patterns``.

    Returns:
      A pattern. Of a dense kernel each weight is a slice.

    Examples:
      >>> from sparse_optax import patterns
      >>> patterns.slices().unit_size((3, 3, 8, 6))
      9
    """
    (first, second), given = _axes_of(axes, (-2, -1))
    return Blocks("slices()", ((first, 1), (second, 1)), others=None, given=given)


@checks.boundary("n_m")
def n_m(n: int, m: int, *, axis: int | Mapping[str, int] | None = None) -> GroupsNM:
    """N:M sparsity: n weights of each m neighbours along the contraction axis.

    Hardware for 2:4 matrices skips zeros along the axis that it sums over: inputs.

    Args:
      n: Weights kept per group, at least 1 and at most m.
      m: Weights per group, from 2 to 32.
      axis: The contraction axis, of all leaves or as ``{name: axis}`` of some. None
        tells it from names and shapes, see ``patterns``; where it cannot be told, an
        error asks for it. ``contraction_axes`` reads it from a module.

    Returns:
      A pattern. It fixes the final density of every layer at n / m.

    Raises:
      ValueError: If n or m is out of its range.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> kernel = jnp.array([[1.0, 8.0], [2.0, 7.0], [3.0, 6.0], [4.0, 5.0]])
      >>> sparse_optax.patterns.n_m(2, 4).view(kernel).tolist()
      [[1.0, 2.0, 3.0, 4.0], [8.0, 7.0, 6.0, 5.0]]
    """
    checks.whole("m", m, 2, LONGEST, static=True, cure=_CURE)
    checks.whole("n", n, 1, m, static=True, cure=_CURE)
    given = None
    if axis is None or isinstance(axis, Mapping):
        axis, given = -2, _by_name("axis", axis, 0)
    checks.whole("axis", axis, -LONGEST, static=True, cure=_AXIS)
    return GroupsNM(f"n_m({n}, {m})", n, m, int(axis), given)


@checks.boundary("constant_fan_in")
def constant_fan_in(
    density: float, *, axis: int | Mapping[str, Any] | None = None
) -> ConstantFanIn:
    r"""The same number of weights into each output unit of a layer.

    Of the :math:`f` weights that lead to an output unit or channel,
    :math:`\max(1, \lfloor f \cdot \text{density} \rfloor)` are kept. In the form ELL of
    ``export.to_sparse`` such a kernel needs no padding. No unit is ever empty, so
    ``compact`` finds few units to remove.

    Args:
      density: The density of every layer, in (0, 1].
      axis: The axis of the outputs, of all leaves or as ``{name: axis}`` of some, a
        tuple for several, without the axis of stacked layers. None tells it from names
        and shapes, see ``patterns``.

    Returns:
      A pattern. It fixes the final density of every layer.

    Raises:
      ValueError: If ``density`` is outside (0, 1]; at ``init`` if nothing is left to
        sum over, or an axis of outputs is that of stacked layers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks, patterns
      >>> kernel = jnp.array([[1.0, 8.0], [2.0, 1.0], [3.0, 6.0], [4.0, 5.0]])
      >>> few = patterns.constant_fan_in(0.5)
      >>> made = masks.magnitude_masks({"kernel": kernel}, None, pattern=few)
      >>> made["kernel"].sum(axis=0).tolist()
      [2, 2]

    References:
      Lasby, Golubeva, Evci, Nica and Ioannou, `Dynamic Sparse Training with Structured
      Sparsity <https://arxiv.org/abs/2305.02299>`_, 2024.

    Differences from the paper: the number of weights of a unit never changes, and no
    unit is removed.
    """
    cure = "Give a fraction such as 0.1."
    checks.number("density", density, 0, 1, ends="(]", static=True, cure=cure)
    outputs, given = _axes_of(axis, (-1,))
    # A float32 is read by its shortest decimal form, as in ``budgets.count``.
    share = float(checks.as_fraction(density, "density"))
    name = f"constant_fan_in({share:g})"
    return ConstantFanIn(name, share, outputs, given)
