"""The public functions: masks, thresholds, or both."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparse_optax.checks import ArgumentError, boundary, flag
from sparse_optax.selection import keys as key_order
from sparse_optax.selection import leaf as one
from sparse_optax.selection import mesh, passes
from sparse_optax.selection.cut import find
from sparse_optax.selection.follow import Near, anywhere
from sparse_optax.selection.plan import Plan
from sparse_optax.selection.problem import Problem, prepare

PyTree = Any
# Longest rows whose pairs of scores are compared.
LONGEST = 32


class Selection(NamedTuple):
    """Masks, the threshold that made them, and how many weights they keep.

    Attributes:
      masks: The tree with a bool array for each array (or tuple of arrays).
      threshold: The smallest score kept, as from ``kth_largest``; if not asked for, a
        score with all above it kept and none below it.
      counts: The tree with the number of weights kept for each array, uint32; of shape
        (L,) if the L slices of a leaf are pools or it has 2**32 weights.
    """

    masks: PyTree
    threshold: PyTree
    counts: PyTree


@boundary("top_k_mask")
def top_k_mask(
    leaves: PyTree,
    k: Any,
    *,
    score: Any = None,
    costs: PyTree = None,
    axis_name: Any = None,
    guess: PyTree = None,
) -> PyTree:
    r"""Masks of the k largest scores of a tree.

    In the order of this package, :math:`m_i = [\operatorname{rank}(s_i) \le k]`, and
    with ``costs`` the longest prefix of the order that fits:
    :math:`m_i = [\sum_{j : \operatorname{rank}(s_j) \le \operatorname{rank}(s_i)}
    c_j \le k]`.

    Args:
      leaves: A pytree of arrays of any float dtype or of uint32 (compared as integers).
        With ``score``, also a pytree whose innermost plain tuples are the arguments of
        ``score``, all of one shape. None and ``optax.MaskedNode()`` are empty nodes.
      k: How many to select, 0 <= k <= n: a Python int, an integer scalar, or past 2**31
        a pair ``(high, low)`` of uint32 scalars for ``high * 2**32 + low``. All leaves
        are then one pool. A pytree of counts like ``leaves`` makes each leaf a pool; a
        count of shape (L,) makes each of the L slices along axis 0 a pool. A k that is
        an array of JAX, traced or not, is not checked but clipped to [0, n].
      score: An element-wise function of the arrays of a leaf to one array of their
        shape; it gets 16-bit floats as float32. None ranks the leaves themselves. There
        is no gradient.
      costs: A pytree like ``leaves`` of non-negative numbers: the cost of one weight of
        each leaf (bytes, FLOPs, seconds). Then k is a budget in this unit. Integer
        costs below 2**32 with an integer k are exact. Others are scaled to integers,
        costs rounded up to 24 bits below the largest and the budget rounded down, so
        that it is never exceeded; this needs a static k.
      axis_name: Inside ``shard_map``, the mesh axis (or tuple of axes) over which each
        pool extends; every leaf must be sharded along all of them. Ties then rank by
        leaf, shard, and index within the shard.
      guess: A score near the threshold, such as that of the previous step: a scalar, or
        a tree with a tree of counts. It saves the sample; with any value, NaN included,
        the result is exact.

    Returns:
      The tree with a bool array for each array (or tuple of arrays), sharded like it.

    Raises:
      ValueError: If k is outside [0, n] or no integer, a leaf is neither float nor
        uint32, there is no leaf, or trees do not match.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> tree = {"a": jnp.array([3.0, -1.0, 2.0]), "b": jnp.array([2.0, 5.0])}
      >>> masks = sparse_optax.selection.top_k_mask(tree, 3)
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([True, False, True], [False, True])
      >>> masks = sparse_optax.selection.top_k_mask(tree, {"a": 1, "b": 1})
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([True, False, False], [False, True])
    """
    problem = prepare(leaves, k, score, costs, axis_name, guess)
    masks, _ = _found(_select, problem, problem.plan)
    return jax.tree.unflatten(problem.treedef, masks)


@boundary("kth_largest")
def kth_largest(
    leaves: PyTree,
    k: Any,
    *,
    score: Any = None,
    costs: PyTree = None,
    axis_name: Any = None,
    guess: PyTree = None,
) -> PyTree:
    """The k-th largest score of a tree: the smallest one that ``top_k_mask`` keeps.

    Args:
      leaves: See ``top_k_mask``, as for all arguments.
      k: How many to select.
      score: An element-wise function, or None.
      costs: Cost of one weight of each leaf; k is then a budget.
      axis_name: Mesh axes of a surrounding ``shard_map``.
      guess: A score near the threshold.

    Returns:
      A scalar; with a tree of counts, a tree of scalars or of ``(L,)`` arrays. Its
      dtype is that of the scores (the widest). If nothing is kept it is NaN, or 2**32 -
      1 for uint32.

    Raises:
      ValueError: As ``top_k_mask``.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> tree = {"a": jnp.array([3.0, -1.0, 2.0]), "b": jnp.array([2.0, 5.0])}
      >>> float(sparse_optax.selection.kth_largest(tree, 2))
      3.0
    """
    problem = prepare(leaves, k, score, costs, axis_name, guess)
    plan = problem.plan._replace(least=True)
    least = _found(_threshold, problem, plan)
    return _thresholds(problem, least)


@boundary("select")
def select(
    leaves: PyTree,
    k: Any,
    *,
    score: Any = None,
    costs: PyTree = None,
    axis_name: Any = None,
    guess: PyTree = None,
    exact_threshold: bool = True,
    skip_zeros: bool = False,
) -> Selection:
    """Masks, threshold and counts together, in one search.

    The exact threshold costs one more pass over the leaves than ``top_k_mask``. The
    counts cost nothing, except for leaves of 2**32 weights and more, which are read
    once more. Any threshold is a good guess for the next step.

    Args:
      leaves: See ``top_k_mask``, as for all arguments.
      k: How many to select.
      score: An element-wise function, or None.
      costs: Cost of one weight of each leaf; k is then a budget.
      axis_name: Mesh axes of a surrounding ``shard_map``.
      guess: A score near the threshold.
      exact_threshold: Whether the threshold must be the smallest score kept. False
        saves a pass; with a guess the threshold is then still the same on any mesh.
      skip_zeros: Whether scores of zero are left out even if k is not reached, unless k
        is all weights. For scores that are never negative.

    Returns:
      ``Selection(masks, threshold, counts)``.

    Raises:
      ValueError: As ``top_k_mask``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> masks, threshold, count = selection.select(jnp.array([3.0, -1.0, 2.0]), 2)
      >>> masks.tolist(), float(threshold), int(count)
      ([True, False, True], 2.0, 2)
    """
    flag("exact_threshold", exact_threshold)
    flag("skip_zeros", skip_zeros)
    problem = prepare(leaves, k, score, costs, axis_name, guess)
    plan = problem.plan._replace(
        least=exact_threshold, counts=True, skip_zeros=skip_zeros, positive=skip_zeros
    )
    masks, cut = _found(_select, problem, plan)
    threshold = key_order.from_key(cut.threshold, plan.order)
    counts = [
        count if leaf.split else count[: leaf.shape[0]] if stacked else count[0]
        for leaf, stacked, count in zip(
            plan.leaves, problem.stacked, cut.counts, strict=True
        )
    ]
    return Selection(
        jax.tree.unflatten(problem.treedef, masks),
        _thresholds(problem, threshold),
        jax.tree.unflatten(problem.treedef, counts),
    )


@boundary("follow")
def follow(
    leaves: PyTree, k: Any, near: Near, *, score: Any, positive: bool = True
) -> tuple[PyTree, Near, jax.Array]:
    """Masks of the k largest scores, by a search that starts where the last one ended.

    The masks are those of ``top_k_mask``, whatever ``near`` is. It only saves passes
    over the leaves, where thresholds have moved little since the last search.

    Args:
      leaves: See ``top_k_mask``.
      k: How many to select, as for ``top_k_mask``.
      near: What the last search returned, or ``nowhere``.
      score: An element-wise function.
      positive: Whether no score is negative, which makes the passes cheaper.

    Returns:
      The masks, what the next search starts from, and whether any pool was cut among
      equal scores.

    Raises:
      ValueError: As ``top_k_mask``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> x, k = [jnp.array([3.0, -1.0, 2.0])], [2]
      >>> near = selection.nowhere(x, 1)
      >>> masks, near, among_equal = selection.follow(x, k, near, score=jnp.abs)
      >>> masks[0].tolist(), bool(among_equal)
      ([True, False, True], False)
    """
    problem = prepare(leaves, k, score, None, None, None)
    plan, order = problem.plan._replace(positive=positive), problem.plan.order
    # After arithmetic of a wrapper on states, any number; each is safe.
    near = Near(near.bound.astype(order.dtype), near.width.astype(order.unsigned))
    if max(plan.totals) >= 2**32:  # counts need two words: an ordinary search
        masks, cut = _found(_select, problem._replace(guess=near.bound), plan)
        return jax.tree.unflatten(problem.treedef, masks), near, jnp.ones([], bool)
    masks, cut = _found(_select, problem._replace(guess=near), plan)
    return jax.tree.unflatten(problem.treedef, masks), cut.near, cut.split


def nowhere(weights: Sequence[jax.Array], pools: int) -> Near:
    """What the first search of ``follow`` starts from: any place is safe.

    Args:
      weights: Arrays of which the scores are magnitudes.
      pools: In how many pools they are searched.

    Returns:
      A ``Near``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> selection.nowhere([jnp.ones(3)], 1).bound.shape
      (1,)
    """
    wide = any(jnp.finfo(w.dtype).bits == 64 for w in weights)
    return anywhere(pools, key_order.Order("float64" if wide else "float32"))


@boundary("top_of_rows")
def top_of_rows(arrays: Sequence[jax.Array], k: Any, *, score: Any = None) -> jax.Array:
    """Masks of the k largest scores of each row, in the order of ``top_k_mask``.

    All pairs are compared, which costs less than a search for a few weights, as in N:M.

    Args:
      arrays: Arguments of the score, each of shape (rows, length), length at most 32.
      k: How many of each row, an integer or an array of shape (rows,).
      score: An element-wise function of the arrays, or None for the first itself.

    Returns:
      A bool array of that shape. It is element-wise and keeps any sharding of the rows.

    Raises:
      ValueError: If rows are too long, or their scores have no order.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> x = jnp.array([[1.0, 3.0, 2.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
      >>> sparse_optax.selection.top_of_rows([x], 2).astype(int).tolist()
      [[0, 1, 1, 0], [1, 1, 0, 0]]
    """
    values = one.scores(score, arrays)
    if values.ndim != 2 or values.shape[1] > LONGEST:
        raise ArgumentError(
            f"the rows have shape {values.shape}; it must be (rows, "
            f"length) with a length of at most {LONGEST}. Use top_k_mask for longer."
        )
    order = key_order.order_of([values.dtype], ["the rows"])
    keys = key_order.to_key(values, order)
    position = np.arange(values.shape[1])
    mine, theirs = keys[:, :, None], keys[:, None, :]
    earlier = position[None, None, :] < position[None, :, None]
    ahead = (theirs > mine) | ((theirs == mine) & earlier)
    rank = jnp.sum(ahead, axis=2, dtype=jnp.int32)
    limit = jnp.asarray(k)
    return rank < (limit[:, None] if limit.ndim else limit)


def _found(search: Any, problem: Problem, plan: Plan) -> Any:
    with mesh.of(problem.args):
        return search(problem.args, problem.limit, problem.guess, plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def _select(args, limit, guess, *, plan):
    cut = mesh.run(find, plan, args, limit, guess)
    # With the barrier and keys of the search, so that masks cannot differ from it.
    part = passes.Part(plan, args, mesh.places(plan), ())
    args, bound, ends, marks = lax.optimization_barrier(
        (args, cut.bound, cut.ends, part.marks())
    )
    count = len(plan.leaves)
    bounds = bound * count if len(bound) == 1 else bound
    ends = ends * count if len(ends) == 1 else ends
    columns = zip(args, bounds, ends, marks, strict=True)
    masks = [one.mask(*column, kind=part.kind(i)) for i, column in enumerate(columns)]
    return masks, cut


@functools.partial(jax.jit, static_argnames="plan")
def _threshold(args, limit, guess, *, plan):
    cut = mesh.run(find, plan, args, limit, guess)
    return key_order.from_key(cut.threshold, plan.order)


def _thresholds(problem: Problem, least: jax.Array) -> PyTree:
    if problem.single:
        return least[0]
    values = [
        least[leaf.pool : leaf.pool + leaf.shape[0]] if stacked else least[leaf.pool]
        for leaf, stacked in zip(problem.plan.leaves, problem.stacked, strict=True)
    ]
    return jax.tree.unflatten(problem.treedef, values)
