"""The budgets and the counts that they give."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from sparse_optax.budgets.water_filling import Number, Share, least, level, most, whole
from sparse_optax.checks import (
    ArgumentError,
    as_fraction,
    boundary,
    fail,
    nearest,
    two_axes,
)
from sparse_optax.encoding import (
    SPARSE,
    Row,
    checked_axis,
    checked_dtype,
    dense_bytes,
    dense_row,
    file_bytes,
    named_leaves,
    stored_as,
    suffixed,
)
from sparse_optax.layers import (
    Layers,
    Leaf,
    PyTree,
    Where,
    is_hole,
    layers_of,
    leaf_names,
)

Fixed = tuple[tuple[str, float], ...]
Axes = tuple[int, int]


# --- numbers --------------------------------------------------------------------------
def check_density(density: Any, argument: str = "density") -> Fraction:
    """The density as a fraction, see ``checks.nearest``."""
    value = as_fraction(density, argument)
    if not 0 < value <= 1:
        cure = "A density is the fraction of weights to keep: 0.05 keeps 5%."
        fail(argument, density, "a number in (0, 1]", cure)
    return nearest(value)


def check_whole(n: Any, least: int = 1) -> int:
    """The number as a Python integer; 1e6 is allowed, 0.5 is not."""
    value = as_fraction(n, "n")
    if value.denominator != 1 or value < least:
        fail("n", n, f"a whole number of at least {least}", "Give an integer.")
    return int(value)


def plain(number: Number) -> Number:
    """A Python integer if the number is one: it prints better and selects faster."""
    return int(number) if number == int(number) else number


def prices(costs: PyTree, unit: str = "FLOPs") -> dict[str, Fraction]:
    """The cost of one weight of each leaf, exactly, by name."""
    found = {}
    flat = jax.tree.leaves(costs, is_leaf=is_hole)
    for name, cost in zip(leaf_names(costs), flat, strict=True):
        if is_hole(cost):
            continue
        found[name] = as_fraction(cost, f"costs[{name!r}]", decimal=True)
        if found[name] < 0:
            raise ArgumentError(
                f"`costs` must be finite numbers of at least 0; got {cost!r} for "
                f"{name!r}. Give the {unit} of one weight."
            )
    return found


# --- the record -----------------------------------------------------------------------
class Budget(Protocol):
    """An object that says how many weights each layer keeps."""

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
          where: Which leaves take part, see ``eligible``: by default kernels, and
            tables of embeddings only where it names them.
          stacked: ``{name: axis}`` of leaves that stack layers.

        Returns:
          A tree like ``params``: a Python integer for each leaf that takes part, an
          int64 array (L,) if it stacks L layers, ``optax.MaskedNode()`` for the others.

        Raises:
          ValueError: If the budget cannot be met, or an argument does not fit.
        """
        ...


class Shares(NamedTuple):
    """The budget that every function of this module makes.

    Attributes:
      kind: The name of that function.
      amount: Its first argument: a density, or a number of weights, bytes or FLOPs.
      overrides: Pairs (leaf name, density) with a fixed density.
      dense: Names of leaves that keep every weight.
      axes: The axes of a layer that count its inputs and outputs.
      costs: Pairs (leaf name, cost of a kept weight), for ``num_flops``.
      stored: How the file is stored, for ``num_bytes``.
      named: Whether errors about counts start with the kind: not where a method made
        the budget from a plain density.
    """

    kind: str
    amount: Any
    overrides: Fixed = ()
    dense: tuple[str, ...] = ()
    axes: Axes = (-2, -1)
    costs: tuple[tuple[str, Number], ...] = ()
    stored: "Stored | None" = None
    named: bool = True

    def __repr__(self) -> str:
        """The call that made it."""
        shown = [repr(self.amount)]
        for field in ("costs", "overrides", "dense"):
            value = getattr(self, field)
            if value:
                shown.append(f"{field}={value if field == 'dense' else dict(value)}")
        if self.stored is not None and self.stored.dtype is not None:
            shown.append(f"dtype={self.stored.dtype!r}")
        return f"{self.kind}({', '.join(shown)})"

    @property
    def density(self) -> float | None:
        """The density that it was made with, or None."""
        return (
            None if self.kind in ("nonzeros", "num_bytes", "num_flops") else self.amount
        )

    def counts(
        self,
        params: PyTree,
        *,
        where: Where | None = None,
        stacked: Mapping[str, int] | None = None,
    ) -> PyTree:
        """Counts of kept weights, see ``Budget.counts``."""
        of_layers = boundary(self.kind)(layers_of)
        layers = of_layers(params, where, stacked)
        return layers.rebuild(self.counts_of(layers, params))

    def counts_of(self, layers: Layers, params: PyTree) -> list[Any]:
        """The counts of each leaf of given layers."""
        counts = boundary(self.kind)(counts_of_shares)
        return (counts if self.named else counts_of_shares)(self, layers, params)

    def weighed(self, layers: Layers, params: PyTree) -> tuple[Number, list[Number]]:
        """The total cost allowed, and the cost of one weight of each leaf."""
        if self.stored is not None:
            return _weighed_bytes(self, self.stored, layers, params)
        costs = dict(self.costs)
        names = leaf_names(
            jax.tree.unflatten(layers.structure, [0] * layers.structure.num_leaves)
        )
        missing = [name for name in layers.names if name not in costs]
        unknown = [name for name in costs if name not in names]
        if missing or (unknown and layers.leaves):
            problem = f"lacks {missing}" if missing else f"names {unknown}, unknown"
            raise ArgumentError(
                f"`costs` {problem}; it must give a number for each of "
                f"{list(layers.names)}. Correct the names, or leave leaves out with "
                "`where`."
            )
        # As fractions: a sum of floats depends on the order.
        return Fraction(self.amount), [Fraction(costs[name]) for name in layers.names]


# --- bytes of a file ------------------------------------------------------------------
class Stored(NamedTuple):
    """How the file of a budget in bytes is stored.

    Attributes:
      rows: The leaves of the whole tree, or None where that is the parameters.
      dtype: Dtype of the kept values, None for their own.
      unit_axis: The axis of output units.
    """

    rows: tuple[Row, ...] | None = None
    dtype: str | None = None
    unit_axis: int = -1


def _weighed_bytes(
    budget: Shares, stored: Stored, layers: Layers, params: PyTree
) -> tuple[Number, list[Number]]:
    """Bytes for kept weights and their positions, and those of one weight of each leaf.

    The positions of k of n weights take at most k (low + 1) + (n - k) / 2^low bits, or
    as many with k and n - k exchanged, for whichever ``low`` the whole network has: the
    file takes the best for each leaf. This is linear in k, so that it does not matter
    which layers keep the weights.
    """
    fixed, whole, widths = _around(stored, layers, params)
    total = budget.amount - fixed
    sizes = [leaf.size * leaf.copies for leaf in layers.leaves]
    everything = sum(n * w for n, w in zip(sizes, widths, strict=True))
    # A leaf that keeps every weight has no positions.
    if not sum(sizes) or (whole <= budget.amount and not budget.overrides):
        return max(total, everything), widths
    # Two parts, each of whole bytes.
    total -= len(sizes) * Fraction(14, 8)
    best: Any = None
    for low in range(max(sizes).bit_length()):
        # Bits of a weight whose position is coded, and of any other.
        coded, other = low + 1, Fraction(1, 2**low)
        if len(set(widths)) > 1 and low:  # whole bits, see `pool_of`
            coded, other = low + 2, Fraction(1)
        for kept, missing in ((coded, other), (other, coded)):
            room = total - sum(sizes) * Fraction(missing) / 8
            costs = [w + Fraction(kept - missing) / 8 for w in widths]
            if min(costs) <= 0:
                continue
            mean = sum((n * c for n, c in zip(sizes, costs, strict=True)), Fraction())
            if best is None or room / mean > best[0]:
                best = room / mean, room, costs
    return best[1:]


def _around(
    stored: Stored, layers: Layers, params: PyTree
) -> tuple[int, int, list[Number]]:
    """Bytes of a file without kept weights and positions, at most; bytes of the file
    with all weights; the bytes of a kept weight of each leaf.
    """
    rows = stored.rows
    if rows is None:
        rows = tuple(dense_row(name, x) for name, x in named_leaves(params))
    names = suffixed(layers.names, [row.name for row in rows])
    if unknown := sorted(set(names) - {row.name for row in rows}):
        raise ArgumentError(
            f"`tree` lacks {unknown}, which take part; it must hold the parameters. "
            "Pass the whole tree that is saved, such as {'params': params, "
            "'batch_stats': statistics}, or leave it out."
        )
    payload, widths = 0, dict.fromkeys(names, 0)
    longest, full, weights = [], [], 0
    for row in rows:
        if row.name not in widths:
            payload += dense_bytes(row)
            longest.append(row)
            full.append(row)
            continue
        dtype, axis = stored_as(row, stored.dtype, stored.unit_axis)
        widths[row.name] = np.dtype(dtype or row.dtype).itemsize
        payload += 0 if axis is None else 4 * row.shape[axis]
        weights += widths[row.name] * row.size
        row = row._replace(kind=SPARSE, stored=dtype, axis=axis)
        axes = tuple(range(len(row.shape)))
        longest.append(row._replace(live=axes, low=10, high=row.size))
        full.append(row)
    fixed, whole = file_bytes(longest, payload), file_bytes(full, payload + weights)
    return fixed, whole, [widths[name] for name in names]


# --- counts ---------------------------------------------------------------------------
def _neurons(leaf: Leaf, budget: Shares) -> tuple[int, int]:
    shape = (1,) * (2 - len(leaf.layer_shape)) + leaf.layer_shape  # a vector is one row
    rank = len(shape)
    there = all(-rank <= axis < rank for axis in budget.axes)
    if not there or len({axis % rank for axis in budget.axes}) < 2:
        raise ArgumentError(
            f"`axes`={budget.axes} does not fit {leaf.name!r}, a layer of shape "
            f"{leaf.layer_shape}; they must be two axes in [{-rank}, {rank - 1}]. "
            "Give the axes of inputs and outputs, (-2, -1) in flax and haiku."
        )
    return shape[budget.axes[0]], shape[budget.axes[1]]


def _erdos_renyi(leaf: Leaf, budget: Shares) -> Fraction:
    n_in, n_out = _neurons(leaf, budget)
    return Fraction(leaf.size * (n_in + n_out), n_in * n_out)


# What the share of a layer is in proportion to.
_SLOPES: dict[str, Callable[[Leaf, Shares], Number]] = {
    **dict.fromkeys(
        ("uniform", "nonzeros", "num_bytes", "num_flops"),
        lambda leaf, budget: leaf.size,
    ),
    "erdos_renyi": _erdos_renyi,
    "erdos_renyi_kernel": lambda leaf, budget: sum(leaf.layer_shape),
    "linear": lambda leaf, budget: sum(_neurons(leaf, budget)),
}


def counts_of_shares(budget: Shares, layers: Layers, params: PyTree) -> list[Any]:
    """Whole counts for each leaf, an array of them where it stacks layers."""
    if budget.kind in ("num_bytes", "num_flops"):
        shares, goal = _by_cost(budget, layers, params)
        rounded = whole(shares, level(shares, goal), goal)
    else:
        shares, goal = _by_total(budget, layers)
        rounded = whole(shares, level(shares, goal), math.floor(goal))
    values: list[Any] = []
    for leaf, (base, extra) in zip(layers.leaves, rounded, strict=True):
        if leaf.axis is None:
            values.append(base + extra)
        else:
            values.append(base + (np.arange(leaf.copies, dtype=np.int64) < extra))
    return values


def _by_total(budget: Shares, layers: Layers) -> tuple[list[Share], Number]:
    """Shares that add up to a number of weights, and that number before its floor. So
    a uniform density gives each layer floor(d * size) weights or one more.
    """
    size, goal = int(layers.sizes.sum()), budget.amount
    asked = f"n={goal}"
    if budget.density is not None:
        goal, asked = check_density(goal) * size, f"density={goal}"
    total = math.floor(goal)
    shares = _bounded(budget, layers, [1] * len(layers.leaves))
    low, high = least(shares), most(shares)
    if layers.leaves and total < low:
        raise ArgumentError(
            f"{asked} keeps {total} of {size} weights, fewer than {low}: every layer "
            "keeps at least one and leaves in `dense` or `overrides` keep theirs. Keep "
            f"{low} or more (a density of {low}/{size}), or leave leaves out with "
            "`where`."
        )
    if layers.leaves and total > high:
        room = "`overrides` leave room for" if high < size else "there are only"
        raise ArgumentError(
            f"{asked} keeps {total} of {size} weights, but {room} {high}. Keep {high} "
            f"or fewer{', or raise the overrides' * (high < size)}."
        )
    free = [s for s in shares if s.low < s.high]
    if budget.kind == "linear" and free:
        # What full layers cannot take is spread equally.
        rest = Fraction(goal) - least(s for s in shares if s.low == s.high)
        scale = rest / sum(s.copies * s.slope for s in free)
        shares = [s._replace(base=scale * s.slope, slope=1) for s in shares]
    return shares, goal


def _by_cost(
    budget: Shares, layers: Layers, params: PyTree
) -> tuple[list[Share], Number]:
    """Shares at one density, and their total cost."""
    amount, costs = budget.weighed(layers, params)
    shares = _bounded(budget, layers, costs)
    low = least(shares)
    if layers.leaves and amount < low:
        raise ArgumentError(
            f"`n` leaves {_show(amount)} for the weights and must leave at least "
            f"{_show(low)}: every layer keeps at least one weight and leaves in "
            "`dense` or `overrides` keep theirs. Raise `n` by "
            f"{_show(math.ceil(low - amount))}, or leave leaves out with `where`."
        )
    return shares, amount


def _bounded(budget: Shares, layers: Layers, costs: Sequence[Number]) -> list[Share]:
    """The bounds of each leaf's share; `dense` and `overrides` fix their counts."""
    fixed = dict.fromkeys(budget.dense, Fraction(1))
    for name, density in budget.overrides:
        fixed[name] = check_density(density, f"overrides[{name!r}]")
    unknown = [name for name in fixed if name not in layers.names]
    if unknown and layers.leaves:
        raise ArgumentError(
            f"`overrides` or `dense` names {unknown}, which do not take part; they "
            f"must name some of {list(layers.names)}. Correct the names."
        )
    slope = _SLOPES[budget.kind]
    shares = []
    for leaf, cost in zip(layers.leaves, costs, strict=True):
        low, high = min(1, leaf.size), leaf.size
        if leaf.name in fixed:
            low = high = max(math.floor(fixed[leaf.name] * leaf.size), low)
        rise = slope(leaf, budget) if low < high else 1
        shares.append(Share(0, rise, low, high, cost, leaf.copies))
    return shares


def _show(number: Number) -> str:
    number = plain(number)
    return str(number) if isinstance(number, int) else f"{float(number):.6g}"


# --- options of the functions below ---------------------------------------------------
def _options(overrides: Any, dense: Any) -> tuple[Fixed, tuple[str, ...]]:
    """The options, checked and made hashable."""
    if overrides is not None and not isinstance(overrides, Mapping):
        cure = 'Give {"Dense_0/kernel": 0.5}, for instance.'
        fail("overrides", overrides, "a dict of names of leaves and densities", cure)
    try:
        listed = (dense,) if isinstance(dense, str) else tuple(dense)
    except TypeError:
        listed = (dense,)
    if not all(isinstance(name, str) for name in listed):
        cure = 'Give ["Dense_0/kernel"], for instance.'
        fail("dense", dense, "the name of a leaf, or several", cure)
    dense, pairs = listed, tuple(dict(overrides or {}).items())
    for name, density in pairs:
        check_density(density, f"overrides[{name!r}]")
    both = sorted({name for name, _ in pairs} & set(dense))
    if both:
        raise ArgumentError(
            f"{both} stand in `overrides` and in `dense`; a leaf may stand in one of "
            "them. Remove them from `overrides`."
        )
    return pairs, dense


# --- the kinds ------------------------------------------------------------------------
@boundary("count")
def count(d: float, n: int) -> int:
    r"""Number of weights that a density keeps: the only rounding rule of this package.

    .. math:: \lfloor \mathrm{frac}(d) \cdot n \rfloor

    with frac(d) the closest fraction to d with a denominator of at most 10**9, if it is
    within two units in the last place of the float, else d itself: 0.29 means 29/100,
    although the float is below it. The result is exact for any n.

    Args:
      d: Density, the fraction of weights to keep, in (0, 1].
      n: Number of weights, an integer of at least 0.

    Returns:
      A Python integer in [0, n].

    Raises:
      ValueError: If ``d`` is outside (0, 1] or ``n`` is negative.

    Examples:
      >>> from sparse_optax import budgets
      >>> budgets.count(0.29, 100), budgets.count(0.1, 8_000_000_000)
      (29, 800000000)
    """
    return math.floor(check_density(d, "d") * check_whole(n, 0))


@boundary("uniform")
def uniform(
    density: float,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> Shares:
    r"""The same density in every layer.

    .. math:: k_l \approx d N_l, \qquad \sum_l k_l = \lfloor d N \rfloor

    Args:
      density: d, the fraction of weights to keep, in (0, 1]. The total over all leaves
        that take part meets it, ``overrides`` and ``dense`` included.
      overrides: ``{leaf name: density}`` of fixed densities; the others are solved for.
      dense: Names of leaves that keep every weight and count in the total: a leaf may
        start dense and be pruned later.

    Returns:
      A budget.

    Raises:
      ValueError: If an argument does not fit or ``counts`` cannot meet the total.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> lenet = [jnp.zeros((784, 300)), jnp.zeros((300, 100)), jnp.zeros((100, 10))]
      >>> sparse_optax.budgets.uniform(0.01).counts(lenet)
      [2352, 300, 10]
      >>> sparse_optax.budgets.uniform(0.01, dense=["2"]).counts(lenet)
      [1474, 188, 1000]

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019, where each weight is drawn at this
      density; here the counts are exact.
    """
    check_density(density)
    return Shares("uniform", density, *_options(overrides, dense))


@boundary("erdos_renyi")
def erdos_renyi(
    density: float,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
    axes: tuple[int, int] = (-2, -1),
) -> Shares:
    r"""Wide layers sparser: density proportional to (n_in + n_out) / (n_in n_out).

    .. math:: k_l = \varepsilon \frac{n_{in} + n_{out}}{n_{in} n_{out}} N_l,
              \qquad \sum_l k_l = \lfloor d N \rfloor

    A layer that would keep more than its size becomes dense, and epsilon is solved
    again over the rest. The spatial size of a kernel does not change its density,
    unlike in ``erdos_renyi_kernel``.

    Args:
      density: d, the fraction of weights to keep over all leaves, in (0, 1].
      overrides: ``{leaf name: density}`` of fixed densities; the others are solved for.
      dense: Names of leaves that keep every weight and count in the total.
      axes: The axes of a layer that count its inputs and outputs: the last two in flax
        and haiku, (0, 1) for the convolutions of equinox.

    Returns:
      A budget.

    Raises:
      ValueError: If an argument does not fit or ``counts`` cannot meet the total.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> lenet = [jnp.zeros((784, 300)), jnp.zeros((300, 100)), jnp.zeros((100, 10))]
      >>> sparse_optax.budgets.erdos_renyi(0.01).counts(lenet)
      [1810, 668, 184]

    References:
      Mocanu et al, `Scalable Training with Adaptive Sparse Connectivity
      <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    check_density(density)
    fixed = _options(overrides, dense)
    return Shares("erdos_renyi", density, *fixed, two_axes("axes", axes))


@boundary("erdos_renyi_kernel")
def erdos_renyi_kernel(
    density: float,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> Shares:
    r"""Large layers sparser: density proportional to sum(shape) / prod(shape), ERK.

    .. math:: k_l = \varepsilon \sum_i shape_{l,i}, \qquad
              \sum_l k_l = \lfloor d N \rfloor

    A layer that would keep more than its size becomes dense, and epsilon is solved
    again over the rest. For matrices this is ``erdos_renyi``. The order of the axes
    does not matter, so it fits the convolutions of every library.

    Args:
      density: d, the fraction of weights to keep over all leaves, in (0, 1].
      overrides: ``{leaf name: density}`` of fixed densities; the others are solved for.
      dense: Names of leaves that keep every weight and count in the total.

    Returns:
      A budget.

    Raises:
      ValueError: If an argument does not fit or ``counts`` cannot meet the total.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> net = {"conv": jnp.zeros((3, 3, 16, 32)), "head": jnp.zeros((32, 10))}
      >>> sparse_optax.budgets.erdos_renyi_kernel(0.1).counts(net)
      {'conv': 277, 'head': 215}

    References:
      Evci et al, `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    check_density(density)
    return Shares("erdos_renyi_kernel", density, *_options(overrides, dense))


@boundary("linear")
def linear(
    density: float,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
    axes: tuple[int, int] = (-2, -1),
) -> Shares:
    r"""Weights in proportion to neurons: count proportional to n_in + n_out.

    .. math:: k_l = \min(\varepsilon (n_{in} + n_{out}) + c, N_l), \qquad
              \sum_l k_l = \lfloor d N \rfloor

    Epsilon makes the counts add up before any layer is cut off at its size. The
    constant c is the equal share of every other layer in what full layers cannot take,
    less what layers below one weight must get.

    This is the sentence behind the Erdos-Renyi rules taken literally, with channels for
    neurons. Unlike in ``erdos_renyi``, a count does not grow with the area of a kernel.
    Unlike in ``erdos_renyi_kernel``, the sides of the kernel are not added. Both others
    divide the excess in proportion, not equally.

    Differences from the reference code: "linear" in the released code of sparse
    momentum gives a layer epsilon * sum(shape) weights, which is ``erdos_renyi_kernel``
    as long as no layer is full. The excess of a full layer is lost there, and masks are
    drawn weight by weight. ``erdos_renyi_kernel`` is closest to it.

    Args:
      density: d, the fraction of weights to keep over all leaves, in (0, 1].
      overrides: ``{leaf name: density}`` of fixed densities; the others are solved for.
      dense: Names of leaves that keep every weight and count in the total.
      axes: The axes of a layer that count its inputs and outputs, see ``erdos_renyi``.

    Returns:
      A budget.

    Raises:
      ValueError: If an argument does not fit or ``counts`` cannot meet the total.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> net = {"conv": jnp.zeros((3, 3, 16, 32)), "head": jnp.zeros((32, 10))}
      >>> sparse_optax.budgets.linear(0.1).counts(net)
      {'conv': 262, 'head': 230}

    References:
      Mocanu et al, see ``erdos_renyi``; Dettmers and Zettlemoyer, see ``uniform``.
    """
    check_density(density)
    fixed = _options(overrides, dense)
    return Shares("linear", density, *fixed, two_axes("axes", axes))


@boundary("nonzeros")
def nonzeros(
    n: int,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> Shares:
    r"""A number of weights, at the same density in every layer.

    .. math:: k_l \approx n N_l / N, \qquad \sum_l k_l = n

    Args:
      n: Number of weights to keep over all leaves, at least one per layer.
      overrides: ``{leaf name: density}`` of fixed densities; the others are solved for.
      dense: Names of leaves that keep every weight and count in the total.

    Returns:
      A budget.

    Raises:
      ValueError: If an argument does not fit or ``counts`` cannot meet the total.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> budgets.nonzeros(5).counts([jnp.zeros((10, 10)), jnp.zeros((2, 2))])
      [4, 1]
    """
    return Shares("nonzeros", check_whole(n), *_options(overrides, dense))


@boundary("num_bytes")
def num_bytes(
    n: int,
    *,
    tree: PyTree = None,
    dtype: Any = None,
    unit_axis: int = -1,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> Shares:
    r"""As many weights as fit in a file of n bytes, at the same density in every layer.

    The file is the whole file of ``save_sparse``: kept values and their positions,
    leaves without a mask, header and checksum.

    .. math:: \sum_l k_l \left(\mathrm{bytes}_l + \tfrac{r + 1 - 2^{-r}}{8}\right)
              + \tfrac{N}{8 \cdot 2^r} + \mathrm{rest} \le n

    Positions are counted at the size that is enough for any masks with these counts, by
    the best code with r lower bits; random masks take a few percent less. If
    ``n`` holds the whole network, nothing is pruned. Under a method that moves weights
    between layers, the file stays within n bytes if all layers have one dtype.

    Args:
      n: Number of bytes, at least 1; 4e6 is four megabytes.
      tree: The tree that will be saved, concrete or abstract, if it holds more than the
        parameters: ``{"params": params, "batch_stats": statistics}``.
      dtype: What the kept values are stored as, see ``save_sparse``.
      unit_axis: See ``save_sparse``.
      overrides: ``{leaf name: density}`` of fixed densities; the others are solved for.
      dense: Names of leaves that keep every weight and count in the total.

    Returns:
      A budget.

    Raises:
      ValueError: If an argument does not fit or ``n`` is too small.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets, export, masks
      >>> params = {"w": jnp.zeros((100, 80))}  # 32,000 bytes when dense
      >>> budgets.num_bytes(5000).counts(params)
      {'w': 1048}
      >>> made = masks.random_masks(0, params, budgets.num_bytes(5000))
      >>> 4900 < export.sparse_bytes(params, made) <= 5000
      True
    """
    rows = None
    if tree is not None:
        rows = tuple(dense_row(name, x, "tree") for name, x in named_leaves(tree))
    n = check_whole(n)
    stored = Stored(rows, checked_dtype(dtype), checked_axis(unit_axis))
    return Shares("num_bytes", n, *_options(overrides, dense), stored=stored)


@boundary("num_flops")
def num_flops(
    n: float,
    costs: PyTree,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> Shares:
    r"""The largest density, the same in every layer, whose cost fits.

    .. math:: \sum_l k_l \, cost_l \le n

    The shares at this density are rounded down. What is left of n goes to the layers
    with the largest fractional part, one weight each, as long as it fits. If ``n`` pays
    for the whole network, nothing is pruned. Any cost that adds up over weights is
    allowed, for instance measured nanoseconds.

    Args:
      n: Total cost of the kept weights: FLOPs per example, above 0.
      costs: FLOPs per kept weight, a number of at least 0 for each leaf that takes
        part, from ``flops_per_weight(model, params, example)``: 2 for a dense layer, 2
        * height * width of the output for a convolution. A tree like the parameters or
        a dict ``{leaf name: number}``.
      overrides: ``{leaf name: density}`` of fixed densities; the others are solved for.
      dense: Names of leaves that keep every weight and count in the total.

    Returns:
      A budget.

    Raises:
      ValueError: If an argument does not fit or ``n`` is too small.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> net = {"conv": jnp.zeros((3, 3, 1, 16)), "head": jnp.zeros((64, 10))}
      >>> budgets.num_flops(60_000, {"conv": 2 * 28 * 28, "head": 2}).counts(net)
      {'conv': 38, 'head': 170}
    """
    pairs = tuple((name, plain(cost)) for name, cost in prices(costs).items())
    amount = as_fraction(n, "n", decimal=True)
    if amount <= 0:
        cure = "Give the FLOPs that the kept weights may cost together."
        fail("n", n, "a finite number above 0", cure)
    fixed = _options(overrides, dense)
    return Shares("num_flops", plain(amount), *fixed, costs=pairs)
