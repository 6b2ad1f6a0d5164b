"""Exact k-th largest and top-k masks over a pytree: no sort, any k, any sharding."""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax import _keys, wide


class _Plan(NamedTuple):
    """What is known of a selection at trace time; hashable, a static jit argument."""

    caller: str
    score: object
    pools: tuple[tuple[int, int, bool], ...]  # per leaf: first pool, pools, stacked
    costs: tuple[int, ...] | None
    axis_name: object


def kth_largest(leaves, k, *, score=None, costs=None, axis_name=None):
    """The k-th largest score of a tree (see `top_k_mask` for the arguments).

    Returns:
      A scalar; with a tree of counts, a tree of scalars (of ``(L,)`` arrays). The
      smallest score that `top_k_mask` keeps; where that keeps nothing, NaN (for
      uint32 scores 2**32 - 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> float(selection.kth_largest({"w": jnp.array([3.0, 1.0, 2.0])}, 2))
      2.0
    """
    args, treedef, single, plan, limit = _prepare(
        leaves, k, score, costs, axis_name, "kth_largest"
    )
    values = _kth(args, limit, plan=plan)
    return values[0] if single else jax.tree.unflatten(treedef, values)


def top_k_mask(leaves, k, *, score=None, costs=None, axis_name=None):
    """Boolean masks of the k largest scores of a tree.

    Returns:
      The tree with a bool array in place of each array (or tuple of arrays).

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> selection.top_k_mask({"w": jnp.array([3.0, 1.0, 2.0])}, 2)["w"].tolist()
      [True, False, True]
    """
    args, treedef, _, plan, limit = _prepare(
        leaves, k, score, costs, axis_name, "top_k_mask"
    )
    return jax.tree.unflatten(treedef, _mask(args, limit, plan=plan))


# Arguments.


def _is_array(x) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _is_score_tuple(x) -> bool:
    return type(x) is tuple and len(x) > 0 and all(_is_array(a) for a in x)


def _is_count(x) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool | np.bool_)


def _prepare(leaves, k, score, costs, axis_name, caller):
    is_leaf = _is_score_tuple if score is not None else None
    paths, treedef = jax.tree_util.tree_flatten_with_path(leaves, is_leaf=is_leaf)
    if not paths:
        raise ValueError(
            f"{caller}: leaves = {leaves!r} holds no array; give at least one."
        )
    names = [jax.tree_util.keystr(path) or "the leaf" for path, _ in paths]
    args = tuple(
        tuple(map(jnp.asarray, x)) if isinstance(x, tuple) else (jnp.asarray(x),)
        for _, x in paths
    )
    structs = [jax.eval_shape(functools.partial(_score, score), *a) for a in args]
    for name, s, a in zip(names, structs, args, strict=True):
        _keys.check_dtype(s.dtype, name, caller)
        if s.shape != a[0].shape:
            raise ValueError(
                f"{caller}: score gives shape {s.shape} for {name} of shape "
                f"{a[0].shape}; it must give one score per weight."
            )
    _keys.key_dtype([s.dtype for s in structs], caller)
    shards = 1 if axis_name is None else lax.psum(1, axis_name)
    sizes = [s.size * shards for s in structs]

    single = _is_single(k)
    if single:
        pools = ((0, 1, False),) * len(args)
        counts = [(k, "k", sum(sizes))]
    else:
        try:
            parts = treedef.flatten_up_to(k)
        except ValueError as error:
            raise ValueError(
                f"{caller}: k = {k!r} is neither a count nor a tree of counts of the "
                f"structure {treedef}: {error}"
            ) from None
        pools, counts, first = [], [], 0
        for name, s, size, part in zip(names, structs, sizes, parts, strict=True):
            part = np.asarray(part) if isinstance(part, tuple | list) else part
            stacked = np.ndim(part) == 1
            if np.ndim(part) > 1 or (
                stacked and (s.ndim == 0 or s.shape[0] != np.shape(part)[0])
            ):
                raise ValueError(
                    f"{caller}: k for {name} has shape {np.shape(part)}; it must be a "
                    f"scalar or one count for each slice of axis 0 of {s.shape}."
                )
            slices = s.shape[0] if stacked else 1
            counts.append((part, f"k for {name}", size // max(slices, 1)))
            pools.append((first, slices, stacked))
            first += slices
        pools = tuple(pools)

    if costs is not None:
        costs, counts = _integer_costs(costs, treedef, counts, sizes, names, caller)
    limits = [_limit(*c, capped=costs is None, caller=caller) for c in counts]
    limit = tuple(
        jnp.concatenate([jnp.reshape(pair[i], -1) for pair in limits]) for i in (0, 1)
    )
    plan = _Plan(caller, score, pools, costs, axis_name)
    return args, treedef, single, plan, limit


def _is_single(k) -> bool:
    if isinstance(k, tuple) and len(k) == 2:
        return all(_is_array(x) and x.dtype == jnp.uint32 and x.ndim == 0 for x in k)
    return isinstance(k, int | float | np.number | Fraction) or (
        _is_array(k) and k.ndim == 0
    )


def _limit(k, name, n, *, capped, caller):
    """One count (or a vector of them) as a pair, checked where it is static."""
    allowed = f"an integer in [0, {n}]" if capped else "an integer of at least 0"
    if isinstance(k, tuple):
        return k
    if isinstance(k, np.ndarray | np.number | int | float):
        values = np.asarray(k)
        bad = values.dtype.kind not in "iuO" or np.any(values < 0)
        if bad or (capped and np.any(values > n)):
            raise ValueError(
                f"{caller}: {name} = {k} must be {allowed}, the number of weights it "
                "selects from; pass a smaller count, for example budgets.count(d, n)."
            )
        values = [min(int(v), 2**64 - 1) for v in values.reshape(-1)]
        return tuple(
            jnp.asarray(np.array([v >> s & 0xFFFFFFFF for v in values], np.uint32))
            for s in (32, 0)
        )
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise ValueError(
            f"{caller}: {name} has dtype {k.dtype}; it must be {allowed}. Cast it, for "
            "example with k.astype(jnp.int32)."
        )
    return wide.pair64(k)


def _integer_costs(costs, treedef, counts, sizes, names, caller):
    """Costs and budgets as integers in one unit, rounded so that none overspends."""
    try:
        values = [Fraction(c) for c in treedef.flatten_up_to(costs)]
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{caller}: costs must be one finite Python number per leaf, in the "
            f"structure {treedef}: {error}"
        ) from None
    for name, value in zip(names, values, strict=True):
        if value < 0:
            raise ValueError(
                f"{caller}: costs for {name} = {float(value)} must be at least 0."
            )
    static = [isinstance(k, int | float | np.number | Fraction) for k, _, _ in counts]
    if all(v.denominator == 1 and v < 2**32 for v in values) and not any(
        isinstance(k, float | np.floating | Fraction) for k, _, _ in counts
    ):
        unit = Fraction(1)
    elif all(static):
        unit = max(max(values), Fraction(1, 2**64)) / 2**24
        counts = [(int(Fraction(k) // unit), name, n) for k, name, n in counts]
    else:
        raise ValueError(
            f"{caller}: costs = {[float(v) for v in values]} are not integers below "
            "2**32, which a traced k requires; choose a smaller unit for both."
        )
    integers = tuple(-int(-v // unit) for v in values)
    total = sum(c * n for c, n in zip(integers, sizes, strict=True))
    if total >= 2**64:
        raise ValueError(
            f"{caller}: costs sum to {total} over all weights, past 2**64; choose a "
            "larger unit."
        )
    return integers, counts


# The search, on flat tuples of leaves.


def _score(score, *arrays):
    if score is None:
        return arrays[0]
    half = (jnp.float16, jnp.bfloat16)
    return score(*(a.astype(jnp.float32) if a.dtype in half else a for a in arrays))


def _weights_before(size: int, pools) -> jax.Array:
    raise NotImplementedError


@functools.partial(jax.jit, static_argnames="plan")
def _mask(args, limit, *, plan):
    keyed = _Keyed(args, plan)
    bound, end = _boundary(keyed, limit)
    args = lax.optimization_barrier(args)
    return [keyed.chosen(i, args[i], bound, end) for i in range(len(args))]


@functools.partial(jax.jit, static_argnames="plan")
def _kth(args, limit, *, plan):
    keyed = _Keyed(args, plan)
    bound, end = _boundary(keyed, limit)
    args = lax.optimization_barrier(args)
    top = np.array(np.iinfo(keyed.dtype).max, keyed.dtype)
    lowest = jnp.full((keyed.pools,), top)
    for i, (first, count, stacked) in enumerate(plan.pools):
        chosen = keyed.chosen(i, args[i], bound, end)
        key = jnp.where(chosen, keyed.keys(args[i]), top)
        axes = tuple(range(1 if stacked else 0, key.ndim))
        least = jnp.min(key, axis=axes, initial=top).reshape(-1)
        lowest = lowest.at[first : first + count].min(least)
    if plan.axis_name is not None:
        lowest = lax.pmin(lowest, plan.axis_name)
    values = _keys.from_key(lowest, keyed.score_dtypes)
    if all(pool == (0, 1, False) for pool in plan.pools):
        return [values[0]] * len(args)
    return [values[f : f + c] if s else values[f] for f, c, s in plan.pools]


class _Keyed:
    """The leaves of a selection with their keys, pools and costs."""

    def __init__(self, args, plan):
        structs = [
            jax.eval_shape(functools.partial(_score, plan.score), *a) for a in args
        ]
        self.args, self.plan = args, plan
        self.score_dtypes = tuple(s.dtype for s in structs)
        self.dtype = _keys.key_dtype(self.score_dtypes, plan.caller)
        self.shapes = [s.shape for s in structs]
        self.pools = max([f + c for f, c, _ in plan.pools], default=0)
        # Position of each leaf's first weight in the tie order of its pool.
        self.starts, filled = [], {}
        shards = 1 if plan.axis_name is None else lax.psum(1, plan.axis_name)
        self.sizes = []
        for (first, count, stacked), shape in zip(plan.pools, self.shapes, strict=True):
            size = int(np.prod(shape[1:] if stacked else shape, dtype=object))
            self.starts.append(filled.get(first, 0))
            self.sizes.append(size)
            filled[first] = filled.get(first, 0) + size * shards
        self.totals = (
            wide_constants([filled.get(p, 0) for p in range(self.pools)])
            if not any(s for _, _, s in plan.pools)
            else self._stacked_totals(filled)
        )

    def _stacked_totals(self, filled):
        totals = []
        for first, count, _ in self.plan.pools:
            totals += [filled.get(first, 0)] * count
        return wide_constants(totals)

    def keys(self, arrays):
        return _keys.to_key(_score(self.plan.score, *arrays), self.dtype)

    def per_leaf(self, i, x):
        """The pools' values for leaf i, shaped to broadcast against it."""
        first, count, stacked = self.plan.pools[i]
        if stacked:
            return x[first : first + count].reshape(
                (count,) + (1,) * (len(self.shapes[i]) - 1)
            )
        return x[first].reshape((1,) * len(self.shapes[i]))

    def chosen(self, i, arrays, bound, end):
        """Keys over the bound, and those at the bound with a position before end."""
        _, _, stacked = self.plan.pools[i]
        key = self.keys(arrays)
        bound = self.per_leaf(i, bound)
        start = wide.pair64(self.starts[i])
        if self.plan.axis_name is not None:
            shard = lax.axis_index(self.plan.axis_name).astype(jnp.uint32)
            start = wide.add64(start, wide.mul64(wide.pair64(self.sizes[i]), shard))
        local = wide.where64(
            wide.less64(end, start), wide.pair64(0), wide.sub64(end, start)
        )
        shape = self.shapes[i]
        axes = range(1 if stacked else 0, len(shape))
        inner = int(np.prod([shape[d] for d in axes][1:], dtype=np.int64))
        row, rest = wide.divmod64(local, wide.pair64(max(inner, 1)))
        row_limit = jnp.where(row[0] > 0, np.uint32(0xFFFFFFFF), row[1])
        row_limit, rest = self.per_leaf(i, row_limit), self.per_leaf(i, rest[1])
        if not shape or len(axes) == 0:
            before = 0 < row_limit
        else:
            row = lax.broadcasted_iota(jnp.uint32, shape, axes[0])
            place, stride = jnp.zeros((1,) * len(shape), jnp.uint32), 1
            for d in reversed(axes[1:]):
                iota = lax.broadcasted_iota(jnp.uint32, shape, d)
                place, stride = place + iota * np.uint32(stride), stride * shape[d]
            before = (row < row_limit) | ((row == row_limit) & (place < rest))
        return (key > bound) | ((key == bound) & before)

    def cost(self, predicate):
        """The summed cost, per pool, of the weights where the predicate holds."""
        args = lax.optimization_barrier(self.args)
        high = jnp.zeros((self.pools,), jnp.uint32)
        low = jnp.zeros((self.pools,), jnp.uint32)
        for i, (first, count, stacked) in enumerate(self.plan.pools):
            chosen = predicate(i, args[i]).astype(jnp.uint32)
            axes = tuple(range(1 if stacked else 0, chosen.ndim))
            inner = chosen.sum(axes[1:], dtype=jnp.uint32)
            counted = wide.sum64(inner, axes[:1]) if axes else wide.pair64(inner)
            counted = tuple(c.reshape(-1) for c in counted)
            if self.plan.costs is not None:
                counted = wide.mul64(counted, np.uint32(self.plan.costs[i]))
            part = slice(first, first + count)
            new = wide.add64((high[part], low[part]), counted)
            high, low = high.at[part].set(new[0]), low.at[part].set(new[1])
        total = (high, low)
        if self.plan.axis_name is not None:
            halves = [h for word in total for h in (word >> 16, word & 0xFFFF)]
            a, b, c, d = lax.psum(jnp.stack(halves), self.plan.axis_name)
            total = wide.add64(((a << 16) + b, d), (c >> 16, c << 16))
        return total


def wide_constants(values):
    return tuple(
        jnp.asarray(np.array([v >> s & 0xFFFFFFFF for v in values], np.uint32))
        for s in (32, 0)
    )


def _boundary(keyed, limit):
    """The key and position at which each pool is cut.

    Selected are the keys over the bound, and those at the bound whose position in
    the tie order lies before end. The bound is the smallest key b such that all
    weights with keys over b fit the limit.
    """
    dtype = keyed.dtype
    zero = jnp.zeros((keyed.pools,), dtype)
    none = (jnp.zeros((keyed.pools,), jnp.uint32),) * 2

    def halve(state):
        low, high = state
        middle = low + (high - low) // np.array(2, dtype)
        spent = keyed.cost(lambda i, a: keyed.keys(a) > keyed.per_leaf(i, middle))
        fits = jnp.logical_not(wide.less64(limit, spent))
        return jnp.where(fits, low, middle + np.array(1, dtype)), jnp.where(
            fits, middle, high
        )

    low, _ = lax.while_loop(lambda s: jnp.any(s[0] < s[1]), halve, (zero, ~zero))

    def halve_positions(state):
        # The last position that fits, so the middle is rounded up.
        start, stop = state
        gap = wide.add64(wide.sub64(stop, start), wide.pair64(1))
        half = gap[0] >> 1, (gap[1] >> 1) | (gap[0] << 31)
        middle = wide.min64(wide.add64(start, half), stop)
        spent = keyed.cost(lambda i, a: keyed.chosen(i, a, low, middle))
        fits = jnp.logical_not(wide.less64(limit, spent))
        before = wide.where64(
            wide.less64(start, middle), wide.sub64(middle, wide.pair64(1)), middle
        )
        return wide.where64(fits, middle, start), wide.where64(fits, stop, before)

    end, _ = lax.while_loop(
        lambda s: jnp.any(wide.less64(*s)), halve_positions, (none, keyed.totals)
    )
    return low, end
