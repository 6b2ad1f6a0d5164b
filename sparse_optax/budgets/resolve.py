"""Turns a density into counts for each layer, or into the size of one pool."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparse_optax.budgets.kinds import (
    Budget,
    Number,
    Shares,
    check_density,
    counts_of_shares,
    plain,
)
from sparse_optax.checks import ArgumentError, boundary, concrete, fail, known, takes
from sparse_optax.layers import (
    Layers,
    Leaf,
    PyTree,
    Where,
    is_hole,
    layers_of,
    leaf_names,
)
from sparse_optax.patterns import SINGLE, Pattern, kept_of_each, whole_units


# --- what can be a density ------------------------------------------------------------
def is_budget(value: Any) -> TypeGuard[Budget]:
    """Whether a value has a method ``counts``, as budgets written by users have."""
    return callable(getattr(value, "counts", None)) and not isinstance(value, type)


def _is_float(value: Any) -> TypeGuard[float]:
    if isinstance(value, float | Fraction):
        return True
    floating = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
    return floating and np.shape(value) == ()


def check_static(
    density: Any,
    argument: str = "density",
    pattern: Pattern = SINGLE,
    *,
    schedule: bool = False,
    may_miss: bool = False,
) -> None:
    """Raises if a density that is not traced is invalid. ``schedule`` and ``may_miss``
    say whether it may be a schedule or be left out.
    """
    if pattern.density is not None:
        agrees = is_number(density) and concrete(density) == pattern.density
        if density is not None and not agrees:
            allowed = f"{pattern.density:g}, or left out, with {pattern.name}"
            fail(argument, density, allowed, "Leave it out: the pattern says it.")
        return
    if density is None and may_miss:
        return
    right = is_budget(density) or (schedule and takes(density, "count"))
    if is_number(density):
        right = bool(0 < concrete(density) <= 1)
    elif not right:
        # A tracer is a density under `optax.inject_hyperparams`.
        right = isinstance(density, Tracer) or _are_counts(density)
    if not right:
        allowed = "in (0, 1]" + (
            ", a budget or a schedule" if schedule else " or a budget"
        )
        fail(argument, density, allowed, "Pass 0.05 to keep 5% of the weights.")


def is_number(value: Any) -> bool:
    """Whether a value is a number of Python, NumPy or JAX that is not traced."""
    value = concrete(value)
    return known(value) and not isinstance(value, bool)


def _are_counts(tree: Any) -> bool:
    """Whether a value is a tree of whole numbers."""
    if tree is None or isinstance(tree, str):
        return False
    flat = jax.tree.leaves(tree, is_leaf=is_hole)
    return all(is_hole(x) or _is_whole(x) for x in flat)


def _is_whole(value: Any) -> bool:
    """Whether a value is an integer or an array of integers."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return jnp.issubdtype(getattr(value, "dtype", bool), jnp.integer)


# --- counts of layers -----------------------------------------------------------------
@boundary("resolve")
def resolve(
    density: float | Budget | PyTree,
    params: PyTree,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
) -> PyTree:
    """Counts for each layer, from anything that is accepted as a density.

    Args:
      density: A float in (0, 1] for ``uniform(density)``, a budget, or a tree of counts
        as budgets return it, which is checked and returned. Counts of leaves that
        ``params`` lacks (``optax.partition``) are left out.
      params: The parameters, concrete or abstract.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.

    Returns:
      A tree of counts, see ``Budget.counts``.

    Raises:
      ValueError: If ``density`` is none of these, is out of range or cannot be met. An
        integer is none of these: 1 may mean every weight or one weight.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.zeros(4), "w": jnp.zeros((5, 4))}
      >>> sparse_optax.budgets.resolve(0.25, params)
      {'b': MaskedNode(), 'w': 5}
      >>> sparse_optax.budgets.resolve(sparse_optax.budgets.nonzeros(7), params)
      {'b': MaskedNode(), 'w': 7}
    """
    layers = layers_of(params, where, stacked)
    return layers.rebuild(counts_of(density, layers, params))


def counts_of(density: Any, layers: Layers, params: PyTree) -> list[Any]:
    """Counts of weights for each leaf, see ``resolve``; user budgets get params."""
    if isinstance(density, Shares):
        return density.counts_of(layers, params)
    if is_budget(density):
        # In the containers of the parameters, whatever those of the masks are.
        own = layers._replace(structure=jax.tree.structure(params, is_leaf=is_hole))
        counts = density.counts(params, where=own.where, stacked=layers.stacked)
        return list(layers.pick(counts))
    if _is_float(density):
        # Not by the method of the record, which would put its name on errors.
        return counts_of_shares(Shares("uniform", density), layers, params)
    return _given_counts(density, layers, params)


def _given_counts(density: Any, layers: Layers, params: PyTree) -> list[Any]:
    """A tree of counts, checked."""
    there = jax.tree.leaves(params, is_leaf=is_hole)
    given = _paired(density, params)
    for i, (name, node) in enumerate(zip(leaf_names(params), given, strict=True)):
        # A count without a leaf belongs to another group of `optax.partition`.
        if i not in layers.index and not is_hole(node) and not is_hole(there[i]):
            raise ArgumentError(
                f"`density` has {node!r} for {name!r}, which does not take part and "
                "must be optax.MaskedNode(). Choose the same leaves with `where` as "
                "for the counts."
            )
    pairs = zip(layers.index, layers.leaves, strict=True)
    return [_check_count(given[i], leaf) for i, leaf in pairs]


def _paired(density: Any, params: PyTree) -> list[Any]:
    """The counts of a tree, one per leaf of the parameters. Trees of equal structure
    are paired leaf by leaf, others by name: ``flax.nnx`` gives variables to ``init``
    and plain arrays to ``update``.
    """
    # An integer is a tree of counts only where the parameters are one bare array.
    single = jax.tree.structure(params) == jax.tree.structure(0)
    there, structure = jax.tree.flatten(params, is_leaf=is_hole)
    try:
        if isinstance(density, int) and not single:
            raise ValueError
        given = structure.flatten_up_to(density)
        pairs = zip(given, there, strict=True)
        if not any(_is_box(node) and not is_hole(leaf) for node, leaf in pairs):
            return given
    except ValueError:
        pass
    found = None if single else _by_name(density, leaf_names(params), there)
    if found is None:
        cure = "Write 1.0 to keep every weight, budgets.nonzeros(n) to keep n."
        fail(
            "density",
            density,
            "a float in (0, 1], a budget such as budgets.erdos_renyi(0.05), or a tree "
            "of counts with the structure of params",
            cure,
        )
    return found


def _by_name(
    density: Any, names: Sequence[str], there: Sequence[Any]
) -> list[Any] | None:
    """The counts with the names of the leaves; None if one is missing or unknown. A
    hole in the parameters stands for a leaf, or for a whole branch.
    """
    flat = jax.tree.leaves(density, is_leaf=is_hole)
    given = dict(zip(leaf_names(density), flat, strict=True))
    holes = [n for n, leaf in zip(names, there, strict=True) if is_hole(leaf)]
    missing = set(names) - set(given) - set(holes)
    unknown = set(given) - set(names)
    unknown -= {n for n in unknown if any(n.startswith(f"{h}/") for h in holes)}
    if missing or unknown or len(given) < len(flat):
        return None
    return [given.get(name, optax.MaskedNode()) for name in names]


def _is_box(node: Any) -> bool:
    """Whether a node holds a count or a hole, as a variable of ``flax.nnx`` does."""
    flat = jax.tree.leaves(node, is_leaf=is_hole)
    return len(flat) == 1 and flat[0] is not node and not isinstance(node, list | tuple)


def is_schedule(density: Any, params: PyTree = None) -> bool:
    """Whether a density is a schedule. A tree of counts may be callable too, as a
    module of equinox is: it has a leaf for each leaf of the parameters.
    """
    if not callable(density) or is_budget(density):
        return False
    flat = jax.tree.leaves(density, is_leaf=is_hole)
    counts = [x for x in flat if not is_hole(x) and not callable(x)]
    if not counts or not all(map(_is_whole, counts)):
        return True
    return params is not None and set(leaf_names(density)) != set(leaf_names(params))


def _check_count(value: Any, leaf: Leaf) -> Any:
    stacked = leaf.axis is not None
    shape = (leaf.copies,) if stacked else ()
    low = min(1, leaf.size)
    try:
        array = np.asarray(None if isinstance(value, Tracer) else value)
    except ValueError:  # a ragged list
        array = np.asarray(None)
    fits = array.shape == shape and array.dtype.kind in "iu"
    if not (fits and np.all(array >= low) and np.all(array <= leaf.size)):
        what = f"{leaf.copies} integers" if stacked else "an integer"
        raise ArgumentError(
            f"the count of {leaf.name!r} must be {what} in [{low}, {leaf.size}]; got "
            f"{value!r}. A layer keeps at least one weight and at most its size: "
            "correct the tree of counts given as `density`."
        )
    return array.astype(np.int64) if stacked else int(array)


def unit_counts(counts: Sequence[Any], layers: Layers) -> list[Any]:
    """Counts of weights as counts of units, one per leaf or per layer of its view.
    They are rounded down, but to at least one unit if there is a weight. A pattern that
    fixes the density does not read them.
    """
    fixed = layers.pattern.density
    if fixed is not None:
        rows = layers.units.leaves
        return [np.full(x.copies, kept_of_each(fixed, x.size), np.int64) for x in rows]
    pairs = zip(counts, layers.unit_sizes, strict=True)
    whole = [n if size == 1 else whole_units(n, size) for n, size in pairs]
    return [n if np.ndim(n) else int(n) for n in whole]


def unit_counts_of(density: Any, layers: Layers, params: PyTree) -> list[Any]:
    """Number of units that each leaf keeps under a density, or under N:M."""
    fixed = layers.pattern.density is not None
    return unit_counts([] if fixed else counts_of(density, layers, params), layers)


# --- one pool -------------------------------------------------------------------------
class Pool(NamedTuple):
    """How many weights one pool over all layers may keep.

    Attributes:
      budget: Number of weights, or with ``costs`` their total cost.
      costs: None, or a tree like the parameters with the cost of one weight for each
        leaf that takes part, and ``optax.MaskedNode()`` for the others.
    """

    budget: int | Fraction
    costs: PyTree | None


@boundary("pool")
def pool(
    density: float | Budget | PyTree,
    params: PyTree,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
) -> Pool:
    """The budget of one pool over all layers, for methods that rank globally.

    Such a method uses only the total of a budget. A budget in bytes or FLOPs becomes a
    limit on the total cost of the pool.

    Args:
      density: A float in (0, 1], a budget without fixed leaves, or a tree of counts.
      params: The parameters, concrete or abstract.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.

    Returns:
      A ``Pool``, at most the whole network. ``costs`` is None unless leaves differ in
      cost; it is what ``selection.top_k_mask`` takes.

    Raises:
      ValueError: If ``density`` is out of range, keeps nothing or fixes leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> params = {"b": jnp.zeros(4), "v": jnp.zeros((4, 2)), "w": jnp.zeros((5, 4))}
      >>> budgets.pool(0.25, params)
      Pool(budget=7, costs=None)
      >>> budgets.pool(budgets.num_flops(30, {"v": 2, "w": 8}), params)
      Pool(budget=30, costs={'b': MaskedNode(), 'v': 2, 'w': 8})
    """
    layers = layers_of(params, where, stacked)
    amount, costs = pool_of(density, layers, params)
    return Pool(amount, None if costs is None else layers.rebuild(costs))


def pool_of(
    density: Any, layers: Layers, params: PyTree
) -> tuple[int | Fraction, list[Number] | None]:
    """The amount of one pool, and the cost of a weight of each leaf, see ``pool``."""
    if getattr(density, "overrides", ()) or getattr(density, "dense", ()):
        raise ArgumentError(
            f"`density` fixes the counts of leaves with `overrides` or `dense`; one "
            f"pool over all layers must have none; got {density!r}. Leave these leaves "
            "out with `where`, or rank each layer alone."
        )
    size = int(layers.sizes.sum())
    costs: list[Number] = [1] * len(layers.leaves)
    is_shares = isinstance(density, Shares)
    fraction = density.density if is_shares else density
    if _is_float(fraction):
        amount: Number = math.floor(check_density(fraction) * size)
    elif is_shares and density.kind == "nonzeros":
        amount = density.amount
        if amount > size:
            raise ArgumentError(
                f"n={amount} exceeds the {size} weights that take part; it must be in "
                f"[1, {size}]. Lower it."
            )
    elif is_shares:
        amount, costs = boundary(density.kind)(density.weighed)(layers, params)
        if density.kind == "num_bytes" and len(set(costs)) > 1:
            # In bits, since the selection weighs whole numbers exactly.
            amount, costs = math.floor(8 * amount), [8 * cost for cost in costs]
    else:  # a tree of counts, or a budget of the user's own
        amount = total(counts_of(density, layers, params))
    if size and amount < min(costs):
        raise ArgumentError(
            f"`density`={density!r} pays for less than one of {size} weights; it must "
            "pay for at least one. Raise it."
        )
    if len(set(costs)) <= 1:
        each = costs[0] if costs else 1
        fits = math.floor(Fraction(amount) / each) if each else size
        return min(fits, size), None
    pairs = zip(layers.leaves, costs, strict=True)
    everything = sum(x.size * x.copies * cost for x, cost in pairs)
    return plain(min(amount, everything)), [plain(cost) for cost in costs]


def pool_size(density: Any, layers: Layers, params: PyTree) -> int:
    """Number of weights that one pool keeps; raises if leaves differ in cost."""
    size, costs = pool_of(density, layers, params)
    if costs is not None:
        raise ArgumentError(
            f"under `density`={density!r} weights differ in cost, so that their number "
            "depends on which are kept; it must be a density or a number of weights. "
            "Use budgets.nonzeros(n)."
        )
    return int(size)


def total(counts: PyTree | Sequence[Any]) -> int:
    """Sum of a tree of counts, as a Python integer.

    Args:
      counts: A tree of integers and integer arrays, from a budget.

    Returns:
      The exact sum, of any size.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.zeros(4), "w": jnp.zeros((5, 4))}
      >>> sparse_optax.budgets.total(sparse_optax.budgets.uniform(0.5).counts(params))
      10
    """
    return sum(sum(np.ravel(x).tolist()) for x in jax.tree.leaves(counts))
