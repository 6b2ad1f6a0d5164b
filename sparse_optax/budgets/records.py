"""The records that budgets are, and their rules.

Users meet these names in ``sparse_optax.budgets``, which makes and documents them.
"""

import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

from sparse_optax.budgets import apportion
from sparse_optax.budgets.apportion import Layers, Leaf, check_density
from sparse_optax.leaves import PyTree, Where

Fixed = tuple[tuple[str, float], ...]
Axes = tuple[int, int]


class Budget(Protocol):
    """Anything that can say how many weights each layer keeps."""

    def counts(
        self,
        params: PyTree,
        *,
        where: Where | None = None,
        stacked: Mapping[str, int] | None = None,
    ) -> PyTree:
        """Counts of kept weights, from shapes alone.

        Args:
          params: The parameters, concrete or abstract.
          where: Which leaves take part, see ``leaves.resolve_where``.
          stacked: ``{name: axis}`` of leaves that stack several layers.

        Returns:
          A tree like ``params``: a Python integer for each leaf that takes part, an
          int64 array of shape (L,) for one that stacks L layers, and
          ``optax.MaskedNode()`` for the others.

        Raises:
          ValueError: If the budget cannot be met, or an argument does not fit.
        """
        ...


# --- records --------------------------------------------------------------------------
class Uniform(NamedTuple):
    """Record made by ``uniform``.

    Attributes:
      density: Fraction of all weights to keep, in (0, 1].
      overrides: Pairs (leaf name, density) that are kept to.
      dense: Names of leaves that keep every weight.
    """

    density: float
    overrides: Fixed = ()
    dense: tuple[str, ...] = ()

    def counts(self, params: PyTree, *, where=None, stacked=None) -> PyTree:
        """Counts of kept weights, see ``Budget.counts``."""
        layers = apportion.read(params, where, stacked, "uniform")
        return by_density(self, layers, by_size, "uniform")


class ErdosRenyi(NamedTuple):
    """Record made by ``erdos_renyi``.

    Attributes:
      density: Fraction of all weights to keep, in (0, 1].
      overrides: Pairs (leaf name, density) that are kept to.
      dense: Names of leaves that keep every weight.
      axes: The axes of a layer that count its inputs and outputs.
    """

    density: float
    overrides: Fixed = ()
    dense: tuple[str, ...] = ()
    axes: Axes = (-2, -1)

    def counts(self, params: PyTree, *, where=None, stacked=None) -> PyTree:
        """Counts of kept weights, see ``Budget.counts``."""

        def slope(leaf: Leaf) -> Fraction:
            n_in, n_out = _neurons(leaf, self.axes, "erdos_renyi")
            return Fraction(leaf.size * (n_in + n_out), n_in * n_out)

        layers = apportion.read(params, where, stacked, "erdos_renyi")
        return by_density(self, layers, slope, "erdos_renyi")


class ErdosRenyiKernel(NamedTuple):
    """Record made by ``erdos_renyi_kernel``.

    Attributes:
      density: Fraction of all weights to keep, in (0, 1].
      overrides: Pairs (leaf name, density) that are kept to.
      dense: Names of leaves that keep every weight.
    """

    density: float
    overrides: Fixed = ()
    dense: tuple[str, ...] = ()

    def counts(self, params: PyTree, *, where=None, stacked=None) -> PyTree:
        """Counts of kept weights, see ``Budget.counts``."""
        layers = apportion.read(params, where, stacked, "erdos_renyi_kernel")
        return by_density(self, layers, _sides, "erdos_renyi_kernel")


class Linear(NamedTuple):
    """Record made by ``linear``.

    Attributes:
      density: Fraction of all weights to keep, in (0, 1].
      overrides: Pairs (leaf name, density) that are kept to.
      dense: Names of leaves that keep every weight.
      axes: The axes of a layer that count its inputs and outputs.
    """

    density: float
    overrides: Fixed = ()
    dense: tuple[str, ...] = ()
    axes: Axes = (-2, -1)

    def counts(self, params: PyTree, *, where=None, stacked=None) -> PyTree:
        """Counts of kept weights, see ``Budget.counts``."""

        def slope(leaf: Leaf) -> int:
            return sum(_neurons(leaf, self.axes, "linear"))

        layers = apportion.read(params, where, stacked, "linear")
        return by_density(self, layers, slope, "linear", equal_spill=True)


class Nonzeros(NamedTuple):
    """Record made by ``nonzeros``.

    Attributes:
      n: Number of weights to keep, at least 1.
      overrides: Pairs (leaf name, density) that are kept to.
      dense: Names of leaves that keep every weight.
    """

    n: int
    overrides: Fixed = ()
    dense: tuple[str, ...] = ()

    def counts(self, params: PyTree, *, where=None, stacked=None) -> PyTree:
        """Counts of kept weights, see ``Budget.counts``."""
        layers = apportion.read(params, where, stacked, "nonzeros")
        return apportion.by_total(
            self, layers, self.n, by_size, asked=f"n={self.n}", caller="nonzeros"
        )


class NumBytes(NamedTuple):
    """Record made by ``num_bytes``.

    Attributes:
      n: Number of bytes, at least 1.
      overrides: Pairs (leaf name, density) that are kept to.
      dense: Names of leaves that keep every weight.
    """

    n: int
    overrides: Fixed = ()
    dense: tuple[str, ...] = ()

    def counts(self, params: PyTree, *, where=None, stacked=None) -> PyTree:
        """Counts of kept weights, see ``Budget.counts``."""
        layers = apportion.read(params, where, stacked, "num_bytes")
        return apportion.by_cost(self, layers, *weighed(self, layers), "num_bytes")


class NumFlops(NamedTuple):
    """Record made by ``num_flops``.

    Attributes:
      n: Number of FLOPs, above 0.
      costs: Pairs (leaf name, FLOPs a kept weight).
      overrides: Pairs (leaf name, density) that are kept to.
      dense: Names of leaves that keep every weight.
    """

    n: float | Fraction
    costs: tuple[tuple[str, float | Fraction], ...]
    overrides: Fixed = ()
    dense: tuple[str, ...] = ()

    def counts(self, params: PyTree, *, where=None, stacked=None) -> PyTree:
        """Counts of kept weights, see ``Budget.counts``."""
        layers = apportion.read(params, where, stacked, "num_flops")
        return apportion.by_cost(self, layers, *weighed(self, layers), "num_flops")


# --- their rules ----------------------------------------------------------------------
def by_size(leaf: Leaf) -> int:
    """The slope of a uniform density."""
    return leaf.size


def _sides(leaf: Leaf) -> int:
    return sum(leaf.shape)


def _neurons(leaf: Leaf, axes: Axes, caller: str) -> tuple[int, int]:
    shape = (1,) * (2 - len(leaf.shape)) + leaf.shape  # a vector is one row
    try:
        return shape[axes[0]], shape[axes[1]]
    except IndexError:
        raise ValueError(
            f"{caller}: `axes`={axes} does not fit {leaf.name!r}, a layer of shape "
            f"{leaf.shape}; both must be in [{-len(shape)}, {len(shape) - 1}]. Give "
            "the axes of inputs and outputs, (-2, -1) in flax and haiku."
        ) from None


def by_density(
    budget: Any,
    layers: Layers,
    slope: Callable[[Leaf], Any],
    caller: str,
    equal_spill: bool = False,
) -> PyTree:
    """Counts of a record with a density."""
    return apportion.by_total(
        budget,
        layers,
        check_density(budget.density, caller) * layers.size,
        slope,
        equal_spill=equal_spill,
        asked=f"density={budget.density}",
        caller=caller,
    )


def weighed(budget: NumBytes | NumFlops, layers: Layers) -> tuple[Any, list[Any]]:
    """What the weights may cost together, and what one weight of each leaf costs."""
    if isinstance(budget, NumBytes):
        masks = -(-layers.size // 8)
        return budget.n - masks, [x.width for x in layers.leaves]
    costs = dict(budget.costs)
    missing = [x.name for x in layers.leaves if x.name not in costs]
    unknown = [name for name in costs if name not in layers.names]
    if missing or (unknown and layers.leaves):
        problem = f"lacks {missing}" if missing else f"names {unknown}, unknown leaves"
        raise ValueError(
            f"num_flops: `costs` {problem}; it must give a number for each of "
            f"{[x.name for x in layers.leaves]}. Correct the names, or leave leaves "
            "out with `where`."
        )
    # Exact whatever the record was made with: sums of floats depend on their order.
    return Fraction(budget.n), [Fraction(costs[x.name]) for x in layers.leaves]


# --- checks of the factories ----------------------------------------------------------
def options(caller: str, overrides: Any, dense: Any) -> tuple[Fixed, tuple[str, ...]]:
    """The options of a factory as it stores them: hashable, and checked."""
    dense = (dense,) if isinstance(dense, str) else tuple(dense)
    pairs = tuple(dict(overrides or {}).items())
    for name, density in pairs:
        check_density(density, caller, f"overrides[{name!r}]")
    both = sorted({name for name, _ in pairs} & set(dense))
    if both:
        raise ValueError(
            f"{caller}: {both} stand in `overrides` and in `dense`; a leaf may stand "
            "in one of them. Remove them from `overrides`."
        )
    return pairs, dense


def check_axes(caller: str, axes: Any) -> Axes:
    """Two axes as Python integers."""
    try:
        n_in, n_out = (operator.index(axis) for axis in axes)
    except (TypeError, ValueError):
        n_in = n_out = 0
    if n_in == n_out:
        raise ValueError(
            f"{caller}: `axes` must be two different integers; got {axes!r}. Give the "
            "axes of inputs and outputs, (-2, -1) in flax and haiku and (0, 1) in "
            "equinox."
        )
    return n_in, n_out
