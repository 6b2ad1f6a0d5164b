"""Checks and flattens the arguments of a selection and lays them out as a plan."""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.checks import ArgumentError, takes
from sparse_optax.selection import keys, plan, uint64
from sparse_optax.selection.leaf import scores

PyTree = Any


class Problem(NamedTuple):
    """A selection, ready to run."""

    args: tuple[tuple[jax.Array, ...], ...]  # the arrays of each leaf
    limit: uint64.Pair  # counts, or total costs, that may be kept, shape (P,)
    guess: jax.Array | None  # keys near the thresholds, shape (P,)
    plan: plan.Plan
    treedef: Any
    single: bool  # whether all leaves are one pool
    stacked: list[bool]  # for each leaf, whether each slice along axis 0 is a pool


def prepare(
    leaves: PyTree, k: Any, score, costs: PyTree, axis_name, guess: PyTree
) -> Problem:
    """Checks the arguments of a selection and lays it out."""
    if score is not None and not callable(score):
        raise ArgumentError(
            f"`score` must be an element-wise function, or None; got {score!r}. Pass "
            "jnp.abs, for instance."
        )
    is_leaf = None if score is None else _is_arguments
    found, treedef = jax.tree_util.tree_flatten_with_path(leaves, is_leaf=is_leaf)
    if not found:
        raise ArgumentError(f"leaves = {leaves!r} holds no array; give at least one.")
    names = ["leaves" + jax.tree_util.keystr(path) for path, _ in found]
    # Selection is piecewise constant; the operation on a mesh has no derivative.
    args = tuple(
        tuple(
            lax.stop_gradient(_as_array(name, x))
            for x in (value if _is_arguments(value) else (value,))
        )
        for name, (_, value) in zip(names, found, strict=True)
    )
    dtypes = [
        _score_dtype(score, arrays, name)
        for arrays, name in zip(args, names, strict=True)
    ]
    order = keys.order_of(dtypes, names)
    axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    shards = 1 if axis_name is None else _axis_size(axis_name)

    vector = isinstance(k, plan.PerLayer)
    single = not vector and _is_single(k)
    slices: list[int | None] = [None] * len(args)
    if vector:
        counts, slices = [k.counts], list(k.slices)
    else:
        counts = [k] if single else _per_leaf(k, treedef, "k")
    if not single and not vector:
        slices = [
            _slices(count, arrays[0].shape, name)
            for count, arrays, name in zip(counts, args, names, strict=True)
        ]
    stacked = [x is not None for x in slices]
    # A leaf without slices still gets a pool, so that indices of pools agree.
    if not vector:
        counts = [0 if x == 0 else k for k, x in zip(counts, slices, strict=False)]
    slices = [x or None for x in slices]
    prices = [1] * len(args)
    if costs is not None:
        prices, counts = _integer_costs(costs, counts, treedef, names)
    layout = _layout(args, slices, single, prices, shards, names)
    static = plan.Plan(score, order, layout, axis_name, shards)

    if max(static.totals) >= 2**64:
        raise ArgumentError(
            f"costs = {costs!r} sum to {max(static.totals)} in a pool; the "
            "sum must be below 2**64. Choose a larger unit for costs and k."
        )
    sizes = static.pool_sizes if single else [static.pool_sizes[x.pool] for x in layout]
    labels = ["k"] if single else [f"k for {name}" for name in names]
    kinds = {x.dtype for x in counts if isinstance(x, jax.Array)}
    traced = all(isinstance(x, jax.Array) for x in counts)
    if vector:  # from arithmetic, not from a user: not checked
        sizes, labels = [0], ["k"]
    elif not single and len(kinds) == 1 and traced:
        # Together: converting each count alone would compile a kernel each.
        counts = [jnp.concatenate([jnp.reshape(x, -1) for x in counts])]
        sizes, labels = [0], [f"k for {', '.join(names)}"]
    limits = [
        _limit(count, n if costs is None else None, label)
        for count, n, label in zip(counts, sizes, labels, strict=True)
    ]
    limit = (
        jnp.concatenate([high for high, _ in limits]),
        jnp.concatenate([low for _, low in limits]),
    )
    if guess is not None:
        guess = _guess_keys(guess, single, static, treedef)
    return Problem(args, limit, guess, static, treedef, single, stacked)


def _as_array(name: str, x: Any) -> jax.Array:
    """A leaf as an array of real numbers or booleans."""
    try:
        array = jnp.asarray(x)
    except (TypeError, ValueError, OverflowError):
        array = None
    kinds = (jnp.integer, jnp.inexact, jnp.bool_)
    if array is None or not any(jnp.issubdtype(array.dtype, k) for k in kinds):
        raise ArgumentError(
            f"{name} must be an array of numbers; got {x!r}. Pass arrays of scores."
        )
    return array


def _axis_size(axis_name: Any) -> int:
    """Number of shards along axes of a surrounding ``shard_map``."""
    try:
        return lax.psum(1, axis_name)
    except (NameError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"`axis_name` must be an axis of the shard_map around this call, or "
            f"several; got {axis_name!r} ({error}). Leave it out where there is none."
        ) from None


def _is_array(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_arguments(x) -> bool:
    """Whether x is a plain tuple of arrays: the arguments of a score function."""
    return type(x) is tuple and len(x) > 0 and all(_is_array(a) for a in x)


def _is_single(k) -> bool:
    """Whether k is one count: a number, an integer scalar, or a pair."""
    if _is_arguments(k) and len(k) == 2:
        return all(x.dtype == jnp.uint32 and x.ndim == 0 for x in k)
    return isinstance(k, int | float | np.number | Fraction) or (
        _is_array(k) and k.ndim == 0
    )


def _is_static(k) -> bool:
    return isinstance(k, int | float | np.number | np.ndarray | Fraction | list | tuple)


def _per_leaf(tree, treedef, name) -> list:
    try:
        return treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ArgumentError(
            f"{name} = {tree!r} must be one value, or a tree of values of "
            f"the structure of leaves, {treedef}: {error}. Give one value per leaf."
        ) from None


def _score_dtype(score, arrays, name):
    shapes = {x.shape for x in arrays}
    if score is not None and not takes(score, *arrays):
        raise ArgumentError(
            f"`score` must be a function of {len(arrays)} arrays for {name}; got "
            f"{score!r}. Pass jnp.abs, for instance."
        )
    struct = jax.eval_shape(lambda *xs: scores(score, xs), *arrays)
    if len(shapes) > 1 or struct.shape not in shapes:
        raise ArgumentError(
            f"score = {score} takes arrays of shapes {sorted(shapes)} for "
            f"{name} and gives shape {struct.shape}; all of these must be equal, since "
            "a score function is element-wise. Make its arguments one shape first."
        )
    return struct.dtype


def _slices(count, shape, name) -> int | None:
    """How many slices along axis 0 are pools; None if the leaf is one pool."""
    dims = np.shape(count)
    if not dims:
        return None
    if len(dims) > 1 or shape[:1] != dims:
        raise ArgumentError(
            f"k for {name} has shape {dims}; it must be one count, or one "
            f"for each slice along axis 0 of the leaf, whose shape is {shape}."
        )
    return shape[0]


def _layout(args, slices, single, prices, shards, names):
    """The leaves as cells and pools."""
    sizes = [math.prod(arrays[0].shape) * shards for arrays in args]
    largest = sum(sizes) if single else max(sizes)
    cell = pool = start = 0
    out = []
    for arrays, parts, price, size, name in zip(
        args, slices, prices, sizes, names, strict=True
    ):
        shape = arrays[0].shape
        split = parts is not None or size >= plan.LIMIT
        pools = 1 if parts is None else parts
        leaf = plan.PlannedLeaf(
            shape, len(arrays), split, cell, pool, pools, start, price
        )
        if leaf.size * shards >= plan.LIMIT or (parts is None and leaf.cells > 2**20):
            raise ArgumentError(
                f"{name} of shape {shape} holds {size} weights; from 2**32 "
                "on it must have at most 2**20 slices along axis 0, each of fewer "
                "than 2**32 weights. Reshape it."
            )
        cell += leaf.cells
        if not single:
            pool += pools
        elif largest < plan.LIMIT:
            start += size
        out.append(leaf)
    return tuple(out)


def _limit(k, n: int | None, name: str) -> uint64.Pair:
    """Counts as a pair of vectors; static ones are checked."""
    if _is_arguments(k) and _is_single(k):
        high, low = k
        return jnp.reshape(high, 1), jnp.reshape(low, 1)
    if not _is_static(k):
        if not jnp.issubdtype(k.dtype, jnp.integer):
            raise ArgumentError(
                f"{name} has dtype {k.dtype}; it must be an integer. Cast "
                "it, for example with k.astype(jnp.int32)."
            )
        return uint64.pair64(jnp.reshape(k, -1))
    values = np.asarray(k).reshape(-1)
    whole = values.dtype.kind in "iuO" and all(v == int(v) for v in values)
    counts = [int(v) for v in values] if whole else [-1]
    if min(counts, default=0) < 0 or (n is not None and max(counts, default=0) > n):
        allowed = (
            "of at least 0"
            if n is None
            else f"in [0, {n}], for the {n} weights that it selects from"
        )
        raise ArgumentError(
            f"{name} = {k} must be an integer {allowed}. Pass such a count, "
            "for example int(density * n)."
        )
    return plan.pairs([min(v, 2**64 - 1) for v in counts])


def _integer_costs(costs, counts, treedef, names):
    """Costs and budgets as integers in one unit, rounded so that none is exceeded."""
    prices = []
    given = _per_leaf(costs, treedef, "costs")
    for cost, name in zip(given, names, strict=True):
        try:
            price = Fraction(cost.item() if isinstance(cost, np.generic) else cost)
        except (TypeError, ValueError, OverflowError):
            price = Fraction(-1)
        if price < 0:
            raise ArgumentError(
                f"costs for {name} = {cost!r} must be a finite number of at "
                "least 0: what one weight of the leaf costs."
            )
        prices.append(price)
    whole = all(p.denominator == 1 and p < 2**32 for p in prices)
    if whole and not any(isinstance(k, float | np.floating | Fraction) for k in counts):
        return [int(p) for p in prices], counts
    if not all(_is_static(k) for k in counts):
        raise ArgumentError(
            f"costs = {costs!r} must be integers below 2**32 where k is "
            "traced; choose a smaller unit for both."
        )
    unit = Fraction(1) if whole else max(prices) / 2**24
    scaled = []
    for k in counts:
        try:
            values = [math.floor(Fraction(v) / unit) for v in np.ravel(k).tolist()]
        except (TypeError, ValueError, OverflowError):
            raise ArgumentError(
                f"k = {k!r} must be a finite number: with costs it is the "
                "budget, in their unit."
            ) from None
        scaled.append(values if np.ndim(k) else values[0])
    return [math.ceil(p / unit) for p in prices], scaled


def _guess_keys(guess, single, static: plan.Plan, treedef) -> jax.Array:
    given = [guess] if single else _per_leaf(guess, treedef, "guess")
    try:
        flat = [jnp.reshape(jnp.asarray(x, static.order.name), -1) for x in given]
    except (TypeError, ValueError):
        raise ArgumentError(
            f"`guess` must be a score near the threshold; got {guess!r}. Leave it out, "
            "or give the threshold of an earlier step."
        ) from None
    found = keys.to_key(lax.stop_gradient(jnp.concatenate(flat)), static.order)
    if found.shape != (static.pools,):
        raise ArgumentError(
            f"guess = {guess!r} holds {found.shape[0]} scores; it must hold "
            f"{static.pools}, one for each pool. Pass what kth_largest returned, or "
            "leave it out."
        )
    return found
