"""Masks of the highest scores, an exact number of them.

Every criterion of pruning comes down to this: a score for each weight, ranked in one
pool over the network or within each layer. Users meet ``score_masks`` and ``select``
in ``sparse_optax.masks``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from sparse_optax import budgets, patterns, selection
from sparse_optax.leaves import (
    Layout,
    PyTree,
    Where,
    is_hole,
    layout,
    leaf_names,
    resolve_where,
)
from sparse_optax.mask_trees import flatten, names_of, rebuild
from sparse_optax.patterns import Pattern
from sparse_optax.selection import passes
from sparse_optax.selection.rows import LONGEST


def select(
    operands: Sequence[tuple[jax.Array, ...]],
    counts: Sequence[Any],
    axes: Sequence[int | None],
    score: Callable[..., jax.Array] | None = None,
) -> list[jax.Array]:
    """Masks of the highest-scored weights, a pool for every layer.

    Args:
      operands: For each leaf a tuple of arrays of its shape.
      counts: For each leaf how many to keep: an integer, or one a slice, shape (L,).
      axes: For each leaf the axis whose slices are layers, or None.
      score: A module-level function of a leaf's arrays; None takes the only one.

    Returns:
      A boolean array a leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> masks.select([(jnp.array([1.0, -3.0]),)], [1], [None], jnp.abs)[0].tolist()
      [False, True]
    """
    if not operands:
        return []
    front = [
        xs if axis is None else tuple(jnp.moveaxis(x, axis, 0) for x in xs)
        for xs, axis in zip(operands, axes, strict=True)
    ]
    chosen: list[Any] = [None] * len(front)
    for i, (xs, axis) in enumerate(zip(front, axes, strict=True)):
        if axis is not None and _has_short_rows(xs[0]):
            chosen[i] = selection.top_of_rows(xs, counts[i], score=score)
    rest = [i for i, m in enumerate(chosen) if m is None]
    if rest:
        leaves = [front[i] if score else front[i][0] for i in rest]
        found = selection.top_k_mask(leaves, [counts[i] for i in rest], score=score)
        for i, m in zip(rest, found, strict=True):
            chosen[i] = m
    return [
        m if axis is None else jnp.moveaxis(m, 0, axis)
        for m, axis in zip(chosen, axes, strict=True)
    ]


def place(mask: jax.Array, like: Any) -> jax.Array:
    """Puts a concrete mask on the devices of its leaf, under Auto meshes too.

    Args:
      mask: The mask.
      like: The leaf, concrete or not.

    Returns:
      The mask, where the leaf lies.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> masks.place(jnp.array([True]), jnp.ones(1)).tolist()
      [True]
    """
    concrete = isinstance(like, jax.Array) and not isinstance(like, Tracer)
    # What is free to move stays so: else the second step would be compiled anew.
    if isinstance(mask, Tracer) or not concrete or not like.committed:
        return mask
    return jax.device_put(mask, like.sharding)


def _has_short_rows(x: jax.Array) -> bool:
    """Whether pairs of a row may be compared: few, and whole on each device."""
    if x.ndim != 2 or x.shape[1] > LONGEST:
        return False
    spec = jax.typeof(x).sharding.spec
    return len(spec) < 2 or spec[1] is None


class Ranking(NamedTuple):
    """What is ranked and how much of it is kept.

    Attributes:
      structure: Structure of the parameters.
      size: Their number of leaves.
      plan: The leaves that take part.
      like: These leaves, concrete or abstract; masks lie where they do.
      limit: How many weights the one pool keeps, or with ``costs`` what they may cost
        together; a list with the count of each leaf where each layer is ranked alone;
        with N:M how many each group keeps.
      costs: None, or what one weight of each leaf costs.
      pattern: Which weights stand and fall together, or None.
    """

    structure: Any
    size: int
    plan: Layout
    like: list[Any]
    limit: Any
    costs: list[Any] | None
    pattern: Pattern | None = None


def ranking(
    params: PyTree,
    density: Any,
    *,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    embeddings: bool = True,
    pattern: Pattern | None = None,
    caller: str = "ranking",
) -> Ranking:
    """Works out what a density asks for, before there are any scores.

    Args:
      params: The parameters, concrete or abstract.
      density: A density in (0, 1], or a budget.
      scope: ``"global"`` ranks all weights in one pool, with the budget's total;
        ``"leaf"`` ranks each layer alone, with the budget's count for it.
      where: Which leaves take part, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      embeddings: Whether the default choice takes embedding tables.
      pattern: Which weights stand and fall together, or None.
      caller: The name that an error starts with.

    Returns:
      A ``Ranking``.

    Raises:
      ValueError: If an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import scored_masks
      >>> scored_masks.ranking({"w": jnp.zeros((4, 5))}, 0.25).limit
      5
    """
    if scope not in ("global", "leaf"):
        raise ValueError(
            f"{caller}: `scope` must be 'global' or 'leaf'; got {scope!r}."
            " Use 'leaf' to rank each layer alone."
        )
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    chosen = resolve_where(params, where, embeddings=embeddings, caller=caller)
    plan = layout(params, chosen, stacked, caller=caller)
    where = jax.tree.unflatten(structure, chosen)
    layers: Any = {"where": where, "stacked": stacked, "caller": caller}
    like = [flat[i] for i in plan.index]
    if not plan.index:
        return Ranking(structure, len(flat), plan, like, 0, None)
    columns = [
        (flat[i].shape, axis) for i, axis in zip(plan.index, plan.axes, strict=True)
    ]
    if pattern is not None:
        for (shape, axis), name in zip(columns, plan.names, strict=True):
            patterns.check(pattern, shape, name, axis, caller=caller)
        if pattern.m:
            return Ranking(structure, len(flat), plan, like, pattern.n, None, pattern)
    if scope == "leaf":
        counts = flatten(budgets.resolve(density, params, **layers))[0]
        limits = [counts[i] for i in plan.index]
        if pattern is not None:
            sizes = [patterns.unit_size(pattern, *column) for column in columns]
            pairs = zip(limits, sizes, strict=True)
            limits = [patterns.whole_units(n, size) for n, size in pairs]
        return Ranking(structure, len(flat), plan, like, limits, None, pattern)
    k, costs = budgets.pool(density, params, **layers)
    if costs is not None:
        costs = [c for c in flatten(costs)[0] if not is_hole(c)]
    if pattern is not None:
        shapes = [shape for shape, _ in columns]
        costs = patterns.unit_costs(pattern, shapes, plan.axes, costs)
    return Ranking(structure, len(flat), plan, like, k, costs, pattern)


def highest(
    wanted: Ranking,
    operands: Sequence[tuple[jax.Array, ...]],
    score: Callable[..., jax.Array] | None = None,
    within: Sequence[jax.Array] | None = None,
) -> PyTree:
    """The masks of a ranking, once there are scores.

    Args:
      wanted: What ``ranking`` gave.
      operands: For each leaf that takes part a tuple of arrays of its shape.
      score: An element-wise, module-level function of such a tuple; None takes its
        only array.
      within: For each leaf a mask of what comes first, whatever its score; it follows
        the pattern. With it there is one array of scores a leaf, none negative.

    Returns:
      A mask tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import scored_masks
      >>> wanted = scored_masks.ranking({"w": jnp.zeros((1, 3))}, 0.34)
      >>> scores = jnp.array([[1.0, 3.0, 2.0]])
      >>> scored_masks.highest(wanted, [(scores,)])["w"].tolist()
      [[False, True, False]]
    """
    plan = wanted.plan
    pattern, shapes = wanted.pattern, [xs[0].shape for xs in operands]
    if pattern is not None:
        scores = [passes.scores(score, xs) for xs in operands]
        columns = zip(scores, plan.axes, strict=True)
        operands = [(patterns.view(pattern, x, axis),) for x, axis in columns]
        score = None
        if within is not None:
            columns = zip(within, plan.axes, strict=True)
            within = [patterns.view(pattern, m, axis) for m, axis in columns]
    if within is not None:
        operands = [(*xs, m) for xs, m in zip(operands, within, strict=True)]
        score = _first
    if not plan.index:
        kept = []
    elif pattern is not None and pattern.m:
        kept = [selection.top_of_rows(xs, wanted.limit, score=score) for xs in operands]
    elif isinstance(wanted.limit, list):
        kept = select(operands, wanted.limit, plan.axes, score)
    else:
        pool = list(operands) if score else [x for (x,) in operands]
        kept = selection.top_k_mask(pool, wanted.limit, score=score, costs=wanted.costs)
    if pattern is not None:
        kept = [
            patterns.spread(pattern, m, shape, axis)
            for m, shape, axis in zip(kept, shapes, plan.axes, strict=True)
        ]
    kept = [place(m, x) for m, x in zip(kept, wanted.like, strict=True)]
    return rebuild(wanted.structure, wanted.size, plan.index, kept)


def _first(score: jax.Array, within: jax.Array) -> jax.Array:
    # Outside it is below every score, so that it does not tie with a score of zero.
    return jnp.where(within, score, -1)


def score_masks(
    scores: PyTree,
    params: PyTree,
    density: Any,
    *,
    score: Callable[..., jax.Array] | None = None,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    embeddings: bool = True,
    pattern: Pattern | None = None,
    caller: str = "score_masks",
) -> PyTree:
    """Masks of the weights of highest score, an exact number of them.

    Equal scores rank by leaf, then by index; a NaN ranks above all numbers.

    Args:
      scores: A tree with the structure of ``params``; what it holds for a leaf that
        does not take part is not read. With ``score``, a tuple of such trees.
      params: The parameters, concrete or abstract: names, shapes and places.
      density: A density in (0, 1], or a budget.
      score: An element-wise, module-level function of the leaves of the trees in
        ``scores``. It is applied while searching, so that its result is never stored.
      scope: ``"global"`` ranks all weights in one pool, with the budget's total;
        ``"leaf"`` ranks each layer alone, with the budget's count for it.
      where: Which leaves take part, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      embeddings: Whether the default choice takes embedding tables.
      pattern: Which weights stand and fall together, see ``patterns``: a unit is
        ranked by the sum of its scores' magnitudes. Ranked alone, a layer keeps at
        least one. With N:M the density is not read.
      caller: The name that an error starts with.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> params = {"b": jnp.zeros(2), "w": jnp.zeros((2, 2))}
      >>> scores = {"b": jnp.ones(2), "w": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
      >>> masks.score_masks(scores, params, 0.5)["w"].tolist()
      [[True, False], [False, True]]
    """
    wanted = ranking(
        params,
        density,
        scope=scope,
        where=where,
        stacked=stacked,
        embeddings=embeddings,
        pattern=pattern,
        caller=caller,
    )
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    names = leaf_names(params)
    trees = [scores] if score is None else list(scores)
    columns = [_leaves_of(tree, flat, names, wanted.plan, caller) for tree in trees]
    return highest(wanted, list(zip(*columns, strict=True)), score)


def _leaves_of(tree, params, names, plan, caller) -> list[Any]:
    """The leaves of a tree of scores that take part, checked."""
    flat, structure = flatten(tree)
    if (found := names_of(structure)) != names:
        raise ValueError(
            f"{caller}: `scores` has the leaves {found} and `params` {names}; the "
            "structures must be equal. Pass one score for each weight."
        )
    for i, name in zip(plan.index, plan.names, strict=True):
        shape = getattr(flat[i], "shape", None)
        if shape != params[i].shape:
            raise ValueError(
                f"{caller}: the scores of {name!r} have shape {shape} and `params` "
                f"{params[i].shape}; they must be equal. Pass one score a weight."
            )
    return [flat[i] for i in plan.index]
