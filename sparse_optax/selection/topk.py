"""The functions of this package: masks, thresholds, or both."""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax

from sparse_optax.selection import keys as key_order
from sparse_optax.selection import mesh, passes
from sparse_optax.selection.cut import find
from sparse_optax.selection.plan import Plan
from sparse_optax.selection.problem import Problem, prepare

PyTree = Any


class Selection(NamedTuple):
    """Masks, the threshold that made them, and how many weights they keep.

    Attributes:
      masks: the tree with a bool array in place of each array (tuple of arrays).
      threshold: the smallest score kept, as `kth_largest` returns it; or, where that
        was not asked for, a score with all above it kept and none below it.
      counts: the tree with the number of weights kept in place of each array, uint32;
        shape (L,) where the L slices of a leaf are pools. Of a leaf of 2**32 weights
        and more, one number for each slice along axis 0.
    """

    masks: PyTree
    threshold: PyTree
    counts: PyTree


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

    With the order above, :math:`m_i = [\operatorname{rank}(s_i) \le k]`, and with
    ``costs`` the longest prefix of the order that fits:
    :math:`m_i = [\sum_{j : \operatorname{rank}(s_j) \le \operatorname{rank}(s_i)}
    c_j \le k]`.

    Args:
      leaves: a pytree of arrays of any float dtype or of uint32 (ordered as
        integers). With ``score``, also a pytree whose innermost plain tuples are
        the arguments of ``score``, all of one shape. ``None`` and
        ``optax.MaskedNode()`` are empty nodes, as everywhere in JAX.
      k: how many to select, 0 <= k <= n: a Python int, an integer scalar (traced or
        not), or past 2**31 a pair ``(high, low)`` of uint32 scalars that stands for
        ``high * 2**32 + low``. All leaves are one pool. A pytree of counts of the
        structure of ``leaves`` makes each leaf a pool of its own; a count of shape
        (L,) makes each of the L slices along axis 0 a pool. A traced k is not
        checked: below 0 counts as 0, above n as n.
      score: an element-wise function of the arrays of a leaf to one array of their
        shape; 16-bit floats reach it as float32. ``None`` takes the leaves
        themselves. Gradients do not pass.
      costs: a pytree of non-negative numbers of the structure of ``leaves``: what
        one weight of each leaf costs (bytes, FLOPs, seconds). Then k is a budget in
        the same unit. Integer costs below 2**32 with an integer k are exact. Others
        are scaled to integers, costs rounded up to 24 bits below the largest and
        the budget rounded down, so that none overspends; that needs a static k.
      axis_name: inside ``shard_map``, the mesh axis (or tuple of axes) over which
        each pool extends; every leaf must be sharded along all of them. Ties then
        rank by leaf, shard, and index within the shard.
      guess: a score near the threshold, for example that of the previous step: a
        scalar, or with a tree of counts a tree. It saves the sample; any value,
        NaN included, leaves the result exact.

    Returns:
      The tree with a bool array in place of each array (or tuple of arrays), of its
      shape and sharding.

    Raises:
      ValueError: if k is outside [0, n] or not an integer, a leaf is neither float
        nor uint32, there is no leaf, or trees do not match.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> tree = {"a": jnp.array([3.0, -1.0, 2.0]), "b": jnp.array([2.0, 5.0])}
      >>> masks = selection.top_k_mask(tree, 3)
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([True, False, True], [False, True])
      >>> masks = selection.top_k_mask(tree, {"a": 1, "b": 1})
      >>> masks["a"].tolist(), masks["b"].tolist()
      ([True, False, False], [False, True])
    """
    problem = prepare(leaves, k, score, costs, axis_name, guess, "top_k_mask")
    masks, _ = _found(_select, problem, problem.plan)
    return jax.tree.unflatten(problem.treedef, masks)


def kth_largest(
    leaves: PyTree,
    k: Any,
    *,
    score: Any = None,
    costs: PyTree = None,
    axis_name: Any = None,
    guess: PyTree = None,
) -> PyTree:
    """The k-th largest score of a tree: the smallest one that `top_k_mask` keeps.

    Args:
      leaves: see `top_k_mask`, as for all arguments.
      k: how many to select.
      score: an element-wise function, or None.
      costs: what a weight of each leaf costs, which makes k a budget.
      axis_name: mesh axes of a surrounding ``shard_map``.
      guess: a score near the threshold.

    Returns:
      A scalar; with a tree of counts, a tree of scalars, or of ``(L,)`` arrays. Its
      dtype is that of the scores (the widest, where they differ). Where nothing is
      kept it is NaN, or 2**32 - 1 for uint32 scores.

    Raises:
      ValueError: as `top_k_mask`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> tree = {"a": jnp.array([3.0, -1.0, 2.0]), "b": jnp.array([2.0, 5.0])}
      >>> float(selection.kth_largest(tree, 2))
      3.0
    """
    problem = prepare(leaves, k, score, costs, axis_name, guess, "kth_largest")
    plan = problem.plan._replace(least=True)
    least = _found(_threshold, problem, plan)
    return _thresholds(problem, least)


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

    The exact threshold costs one pass over the leaves more than `top_k_mask`; the
    counts come with the search (but for leaves of 2**32 weights and more, which are
    read once more). Any threshold is a good guess for the next step.

    Args:
      leaves: see `top_k_mask`, as for all arguments.
      k: how many to select.
      score: an element-wise function, or None.
      costs: what a weight of each leaf costs, which makes k a budget.
      axis_name: mesh axes of a surrounding ``shard_map``.
      guess: a score near the threshold.
      exact_threshold: whether the threshold must be the smallest score kept. False
        saves a pass; the threshold is then the same on any mesh if a guess is given.
      skip_zeros: whether a weight whose score is zero is left out even if k is not
        used up, unless k takes all weights. For scores that are never negative.

    Returns:
      ``Selection(masks, threshold, counts)``.

    Raises:
      ValueError: as `top_k_mask`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import selection
      >>> masks, threshold, count = selection.select(jnp.array([3.0, -1.0, 2.0]), 2)
      >>> masks.tolist(), float(threshold), int(count)
      ([True, False, True], 2.0, 2)
    """
    problem = prepare(leaves, k, score, costs, axis_name, guess, "select")
    plan = problem.plan._replace(
        least=exact_threshold, counts=True, skip_zeros=skip_zeros
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


def _found(search: Any, problem: Problem, plan: Plan) -> Any:
    with mesh.of(problem.args):
        return search(problem.args, problem.limit, problem.guess, plan=plan)


@functools.partial(jax.jit, static_argnames="plan")
def _select(args, limit, guess, *, plan):
    cut = mesh.run(find, plan, args, limit, guess)
    # The same barrier and the same keys as in the search: masks cannot disagree.
    args, bound, ends = lax.optimization_barrier((args, cut.bound, cut.ends))
    count = len(plan.leaves)
    bounds = bound * count if len(bound) == 1 else bound
    ends = ends * count if len(ends) == 1 else ends
    masks = []
    for place, arrays, level, end in zip(
        mesh.places(plan), args, bounds, ends, strict=True
    ):
        keys = passes.keys_of(plan, arrays)
        shape = (-1,) + (1,) * (keys.ndim - 1) if keys.ndim else ()
        position = passes.positions(keys.shape, place.strides, place.base)
        level, end = level.reshape(shape), end.reshape(shape)
        masks.append(passes.kept(keys, level, position < end, plan))
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
