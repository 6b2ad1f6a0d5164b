"""What everything that takes a density does with it.

Users meet these names in ``sparse_optax.budgets``.
"""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.budgets import apportion
from sparse_optax.budgets.apportion import Leaf, check_density, is_traced, plain
from sparse_optax.budgets.records import (
    Budget,
    ErdosRenyi,
    ErdosRenyiKernel,
    Linear,
    Nonzeros,
    NumBytes,
    NumFlops,
    Uniform,
    by_density,
    by_size,
    weighed,
)
from sparse_optax.leaves import PyTree, Where, is_hole


def resolve(
    density: float | Budget | PyTree,
    params: PyTree,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    caller: str = "resolve",
) -> PyTree:
    """Counts for each layer, from whatever stands for a density.

    Args:
      density: A float in (0, 1] for ``uniform(density)``; a budget; or a tree of
        counts as budgets return it, which is checked and passes. Counts of leaves
        that ``params`` have no more, as under ``optax.partition``, are left out: so
        one budget serves several methods.
      params: The parameters, concrete or abstract.
      where: Which leaves take part, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      caller: The name that an error starts with.

    Returns:
      A tree of counts, see ``Budget.counts``.

    Raises:
      ValueError: If ``density`` is none of these, is out of range or cannot be met.
        An integer is none of these: 1 may mean every weight or one weight.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> params = {"b": jnp.zeros(4), "w": jnp.zeros((5, 4))}
      >>> budgets.resolve(0.25, params)
      {'b': MaskedNode(), 'w': 5}
      >>> budgets.resolve(budgets.nonzeros(7), params)
      {'b': MaskedNode(), 'w': 7}
    """
    if _is_budget(density):
        return density.counts(params, where=where, stacked=stacked)
    layers = apportion.read(params, where, stacked, caller)
    if _is_float(density):
        return by_density(Uniform(density), layers, by_size, caller)
    # An integer is a tree of counts only where the parameters are one bare array.
    single = jax.tree.structure(params) == jax.tree.structure(0)
    try:
        if isinstance(density, int) and not single:
            raise ValueError
        given = layers.structure.flatten_up_to(density)
    except ValueError:
        raise ValueError(
            f"{caller}: `density` must be a float in (0, 1], a budget such as "
            "budgets.erdos_renyi(0.05), or a tree of counts with the structure of "
            f"params; got {density!r}. Write 1.0 to keep every weight, "
            "budgets.nonzeros(n) to keep n."
        ) from None
    there = jax.tree.leaves(params, is_leaf=is_hole)
    for i, node in enumerate(given):
        # Where there is no leaf the count is another's, as under `optax.partition`.
        if i not in layers.index and not is_hole(node) and not is_hole(there[i]):
            raise ValueError(
                f"{caller}: `density` has {node!r} for {layers.names[i]!r}, which does "
                "not take part and must be optax.MaskedNode(). Choose the same leaves "
                "with `where` as for the counts."
            )
    return layers.rebuild(
        _check_count(given[i], leaf, caller)
        for i, leaf in zip(layers.index, layers.leaves, strict=True)
    )


def _is_budget(value: Any) -> TypeGuard[Budget]:
    # By method, not by class: users may write their own.
    return callable(getattr(value, "counts", None)) and not isinstance(value, type)


def _is_float(value: Any) -> TypeGuard[float]:
    if isinstance(value, float | Fraction):
        return True
    floating = hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jnp.floating)
    return floating and np.shape(value) == ()


def _check_count(value: Any, leaf: Leaf, caller: str) -> Any:
    shape = (leaf.copies,) if leaf.stacked else ()
    low = min(1, leaf.size)
    try:
        array = np.asarray(None if is_traced(value) else value)
    except ValueError:  # a ragged list
        array = np.asarray(None)
    fits = array.shape == shape and array.dtype.kind in "iu"
    if not (fits and np.all(array >= low) and np.all(array <= leaf.size)):
        what = f"{leaf.copies} integers" if leaf.stacked else "an integer"
        raise ValueError(
            f"{caller}: the count of {leaf.name!r} must be {what} in [{low}, "
            f"{leaf.size}]; got {value!r}. A layer keeps at least one weight and at "
            "most its size: correct the tree of counts given as `density`."
        )
    return array.astype(np.int64) if leaf.stacked else int(array)


class Pool(NamedTuple):
    """How many weights one pool over all layers may keep.

    Attributes:
      budget: Number of weights, or with ``costs`` what they may cost together.
      costs: None, or a tree like the parameters with the cost of one weight for each
        leaf that takes part, and ``optax.MaskedNode()`` for the others.
    """

    budget: int | Fraction
    costs: PyTree | None


def pool(
    density: float | Budget | PyTree,
    params: PyTree,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    caller: str = "pool",
) -> Pool:
    """The budget of one pool over all layers, for methods that find the shares.

    A global method ranks all weights together, so that of a budget only the total is
    used. A budget in bytes or FLOPs becomes a budget of costs: it weighs the weights of
    the one pool instead of fixing the count of each layer.

    Args:
      density: A float in (0, 1], a budget without ``overrides`` and ``dense``, or a
        tree of counts.
      params: The parameters, concrete or abstract.
      where: Which leaves take part, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      caller: The name that an error starts with.

    Returns:
      A ``Pool``, at most the whole network. ``costs`` is None unless leaves differ in
      cost; it is what ``selection.top_k_mask`` takes.

    Raises:
      ValueError: If ``density`` is out of range, keeps no weight, or fixes the counts
        of single leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> params = {"b": jnp.zeros(4), "v": jnp.zeros((4, 2)), "w": jnp.zeros((5, 4))}
      >>> budgets.pool(0.25, params)
      Pool(budget=7, costs=None)
      >>> budgets.pool(budgets.num_flops(30, {"v": 2, "w": 8}), params)
      Pool(budget=30, costs={'b': MaskedNode(), 'v': 2, 'w': 8})
    """
    if getattr(density, "overrides", ()) or getattr(density, "dense", ()):
        raise ValueError(
            f"{caller}: `density` fixes the counts of leaves with `overrides` or "
            f"`dense`; one pool over all layers must have none; got {density!r}. Leave "
            "these leaves out with `where`, or rank each layer alone."
        )
    layers = apportion.read(params, where, stacked, caller)
    budget, costs = None, [1] * len(layers.leaves)
    if isinstance(density, Uniform | ErdosRenyi | ErdosRenyiKernel | Linear):
        density = density.density
    if _is_float(density):
        budget = math.floor(check_density(density, caller) * layers.size)
    elif isinstance(density, NumBytes | NumFlops):
        budget, costs = weighed(density, layers)
    elif isinstance(density, Nonzeros):
        budget = density.n
    if budget is None:
        # A tree of counts, or a budget of the user's own.
        given = resolve(density, params, where=where, stacked=stacked, caller=caller)
        budget = total(given)
    if layers.size and budget < min(costs):
        raise ValueError(
            f"{caller}: `density`={density!r} pays for less than one of {layers.size} "
            "weights; it must pay for at least one. Raise it."
        )
    if isinstance(density, Nonzeros) and budget > layers.size:
        raise ValueError(
            f"{caller}: n={budget} exceeds the {layers.size} weights that take part; "
            f"it must be in [1, {layers.size}]. Lower it."
        )
    if len(set(costs)) <= 1:
        each = costs[0] if costs else 1
        fits = math.floor(Fraction(budget) / each) if each else layers.size
        return Pool(min(fits, layers.size), None)
    everything = sum(
        x.size * x.copies * cost for x, cost in zip(layers.leaves, costs, strict=True)
    )
    return Pool(plain(min(budget, everything)), layers.rebuild(map(plain, costs)))


def pool_size(
    density: float | Budget | PyTree,
    params: PyTree,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    caller: str = "pool_size",
) -> int:
    """Number of weights that one pool over all layers keeps, see ``pool``.

    Args:
      density: A float in (0, 1], a budget or a tree of counts.
      params: The parameters, concrete or abstract.
      where: Which leaves take part, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      caller: The name that an error starts with.

    Returns:
      A Python integer.

    Raises:
      ValueError: As ``pool``, and where leaves differ in cost, so that the number
        depends on which weights are kept.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> budgets.pool_size(0.25, {"w": jnp.zeros((5, 4))})
      5
    """
    size, costs = pool(density, params, where=where, stacked=stacked, caller=caller)
    if costs is not None:
        raise ValueError(
            f"{caller}: under `density`={density!r} weights differ in cost, so that "
            "their number depends on which are kept; it must be a density or a number "
            "of weights. Use budgets.nonzeros(n)."
        )
    return int(size)


def total(counts: PyTree) -> int:
    """Sum of a tree of counts, as a Python integer.

    Args:
      counts: A tree of integers and integer arrays, from a budget.

    Returns:
      The exact sum, whatever its size.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> params = {"b": jnp.zeros(4), "w": jnp.zeros((5, 4))}
      >>> budgets.total(budgets.uniform(0.5).counts(params))
      10
    """
    return sum(sum(np.ravel(x).tolist()) for x in jax.tree.leaves(counts))


def check_static(density: Any, caller: str, argument: str = "density") -> None:
    """Raises where a static density is outside (0, 1] or of a wrong type.

    Args:
      density: What the caller was given.
      caller: The name that the error starts with.
      argument: The name of the argument.

    Raises:
      ValueError: If it can be no density.

    Examples:
      >>> from sparse_optax import budgets
      >>> budgets.check_static(0.05, "doc")
    """
    is_number = isinstance(density, (int, float)) and not isinstance(density, bool)
    number: Any = density if is_number else 1
    wrong_type = density is None or isinstance(density, (bool, str))
    if wrong_type or not 0 < number <= 1:
        raise ValueError(
            f"{caller}: `{argument}` must be in (0, 1], a budget or a schedule; got "
            f"{density!r}. Pass 1 / 60 to keep one weight in sixty."
        )
