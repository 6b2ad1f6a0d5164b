"""Mask trees: make them, read them, apply them, store them.

A mask tree has the structure of the parameters. A leaf that takes part holds a
boolean array of its shape, True where the weight is kept; a leaf that does not is
``optax.MaskedNode()``, never None.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import budgets
from sparse_optax.leaves import (
    PyTree,
    Where,
    is_hole,
    layout,
    leaf_names,
    resolve_where,
)
from sparse_optax.mask_trees import PackedMask as PackedMask
from sparse_optax.mask_trees import check_names as check_names
from sparse_optax.mask_trees import (
    check_shapes,
    is_mask,
    mask_shape,
    rebuild,
    whole_count,
)
from sparse_optax.mask_trees import flatten as flatten
from sparse_optax.mask_trees import pack as pack
from sparse_optax.mask_trees import unpack as unpack
from sparse_optax.patterns import Pattern
from sparse_optax.scored_masks import place as place
from sparse_optax.scored_masks import score_masks as score_masks
from sparse_optax.scored_masks import select as select
from sparse_optax.selection import mesh

Key = jax.Array | int


def apply(masks: PyTree, tree: PyTree) -> PyTree:
    """Sets every missing weight to exactly zero: ``where(mask, x, 0)``.

    Where, not multiplication: ``inf * 0`` is NaN.

    Args:
      masks: A mask tree.
      tree: A tree of the same structure; leaves under a hole pass through.

    Returns:
      The masked tree, dtypes unchanged.

    Raises:
      ValueError: If the numbers of leaves or a shape differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> mask = {"w": jnp.array([True, False])}
      >>> masks.apply(mask, {"w": jnp.array([2.0, jnp.inf])})["w"].tolist()
      [2.0, 0.0]
    """
    kept, _ = flatten(masks)
    flat, structure = jax.tree.flatten(tree, is_leaf=is_hole)
    check_shapes(kept, flat, leaf_names(tree), caller="masks.apply")
    return jax.tree.unflatten(
        structure,
        [
            x if is_hole(m) else jnp.where(unpack(m), x, jnp.zeros((), x.dtype))
            for m, x in zip(kept, flat, strict=True)
        ],
    )


def combine(operator: Callable[..., jax.Array], *masks: PyTree) -> PyTree:
    """Combines mask trees leaf by leaf.

    Args:
      operator: A function of boolean arrays, such as ``jnp.logical_or``.
      *masks: Mask trees of the same structure.

    Returns:
      A mask tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> a, b = {"w": jnp.array([True, False])}, {"w": jnp.array([True, True])}
      >>> masks.combine(jnp.logical_and, a, b)["w"].tolist()
      [True, False]
    """
    return jax.tree.map(
        lambda m, *rest: (
            m if is_hole(m) else operator(unpack(m), *(unpack(r) for r in rest))
        ),
        *masks,
        is_leaf=is_mask,
    )


def count(masks: PyTree) -> int:
    """Number of kept weights, as a Python integer.

    Args:
      masks: A concrete mask tree.

    Returns:
      The exact count over all leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> masks.count({"w": jnp.array([True, False, True])})
      2
    """
    kept = [m for m in flatten(masks)[0] if not is_hole(m)]
    # Given masks are constants of the trace: they are counted while it is made.
    with jax.ensure_compile_time_eval():
        return sum(whole_count(unpack(m)) for m in kept)


def density(masks: PyTree) -> float:
    """Kept weights over all weights that take part.

    Args:
      masks: A concrete mask tree.

    Returns:
      A number in [0, 1]; 1 for a tree in which nothing takes part.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> masks.density({"w": jnp.array([True, False])})
      0.5
    """
    shapes = [mask_shape(m) for m in flatten(masks)[0] if not is_hole(m)]
    size = sum(int(np.prod(shape)) for shape in shapes)
    return count(masks) / size if size else 1.0


def fill(masks: PyTree, params: PyTree) -> PyTree:
    """Turns holes into all-True masks, so that every parameter has an array.

    Args:
      masks: A mask tree.
      params: The parameters.

    Returns:
      A tree of boolean arrays with the structure of ``params``.

    Raises:
      ValueError: If the numbers of leaves or a shape differ.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax import masks
      >>> masks.fill({"b": optax.MaskedNode()}, {"b": jnp.zeros(2)})["b"].tolist()
      [True, True]
    """
    kept, _ = flatten(masks)
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    check_shapes(kept, flat, leaf_names(params), caller="masks.fill")
    filled = [
        jnp.ones_like(x, dtype=bool) if is_hole(m) and not is_hole(x) else unpack(m)
        for m, x in zip(kept, flat, strict=True)
    ]
    return jax.tree.unflatten(structure, filled)


def leaf_key(key: jax.Array, name: str) -> jax.Array:
    """A leaf's own random key: fold_in(key, crc32(name)).

    It depends on the leaf's name alone, so that one more bias in the model changes
    no mask.

    Args:
      key: Random key or key data.
      name: The normalised name of the leaf.

    Returns:
      A random key.

    Examples:
      >>> import jax
      >>> from sparse_optax import masks
      >>> masks.leaf_key(jax.random.key(0), "Dense_0/kernel").shape
      ()
    """
    return jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))


def random_scores(key: jax.Array, name: str, like: Any) -> jax.Array:
    """Uniform uint32 scores for a leaf: without the ties of random floats.

    Args:
      key: Random key.
      name: The normalised name of the leaf.
      like: The leaf, concrete or not, whose shape and sharding they take.

    Returns:
      uint32 array of the shape of ``like``.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> masks.random_scores(jax.random.key(0), "w", jnp.zeros((2, 3))).shape
      (2, 3)
    """
    sharding = jax.typeof(like).sharding
    with mesh.of(like):
        return jax.random.bits(
            leaf_key(key, name),
            like.shape,
            jnp.uint32,
            out_sharding=None if sharding.mesh.empty else sharding,  # an Explicit one
        )


def as_key(key: Key, *, caller: str) -> jax.Array:
    """Turns a seed, raw key data or a typed key into a typed key.

    Args:
      key: An integer seed, key data (uint32) or a typed key.
      caller: The name that an error starts with.

    Returns:
      A typed random key.

    Raises:
      ValueError: If ``key`` is none of these.

    Examples:
      >>> from sparse_optax import masks
      >>> masks.as_key(0, caller="doc").shape
      ()
    """
    if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
        return jax.random.key(int(key))
    if isinstance(key, (jax.Array, np.ndarray)):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            default = jax.random.key_impl(jax.random.key(0))
            if jax.random.key_impl(key) == default:
                return key
            # States keep key data, which does not tell its implementation.
            return jax.random.key(jax.random.bits(key, dtype=jnp.uint32))
        if key.dtype == jnp.uint32 and key.ndim >= 1:
            return jax.random.wrap_key_data(key)
        # An integer that was injected as a hyper-parameter, or a seed under vmap.
        if jnp.issubdtype(key.dtype, jnp.integer) and key.ndim == 0:
            return jax.random.key(key)
    raise ValueError(
        f"{caller}: `key` must be an integer seed or a key from jax.random.key; got "
        f"{key!r}. Pass, for instance, key=0."
    )


def random_masks(
    key: Key,
    params: PyTree,
    budget: Any,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    keep: PyTree | None = None,
    caller: str = "random_masks",
) -> PyTree:
    """Masks of exactly the budget's counts, uniformly at random within each layer.

    Args:
      key: An integer seed or a random key.
      params: The parameters, concrete or abstract; only shapes are used.
      budget: A density in (0, 1] for every layer, or a budget.
      where: Which leaves take part, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      keep: Masks whose weights come first: where the budget has more, all of them stay
        and random ones join; where it has fewer, a random part of them stays.
      caller: The name that an error starts with.

    Returns:
      A mask tree; each mask has the sharding of its leaf.

    Raises:
      ValueError: If an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> kept = masks.random_masks(0, {"w": jnp.zeros((20, 10))}, 0.05)
      >>> masks.count(kept)
      10
      >>> more = masks.random_masks(1, {"w": jnp.zeros((20, 10))}, 0.1, keep=kept)
      >>> masks.count(more), masks.count(masks.combine(jnp.logical_and, kept, more))
      (20, 10)
    """
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    chosen = resolve_where(params, where, caller=caller)
    plan = layout(params, chosen, stacked, caller=caller)
    counts = flatten(
        budgets.resolve(budget, params, where=where, stacked=stacked, caller=caller)
    )[0]
    typed = as_key(key, caller=caller)
    operands = [
        (random_scores(typed, name, flat[i]),)
        for i, name in zip(plan.index, plan.names, strict=True)
    ]
    if keep is not None:
        given, structure_given = flatten(keep)
        check_names(structure_given, leaf_names(params), caller=caller)
        check_shapes(given, flat, leaf_names(params), caller=caller)
        nothing = jnp.zeros((), bool)
        first = [nothing if is_hole(given[i]) else unpack(given[i]) for i in plan.index]
        operands = [
            (x, jnp.broadcast_to(m, x.shape))
            for (x,), m in zip(operands, first, strict=True)
        ]
    counts = [counts[i] for i in plan.index]
    kept = select(operands, counts, plan.axes, None if keep is None else _first)
    kept = [place(m, flat[i]) for m, i in zip(kept, plan.index, strict=True)]
    return rebuild(structure, len(flat), plan.index, kept)


def _first(chance: jax.Array, mask: jax.Array) -> jax.Array:
    # The top bit sets those apart that come first; 31 random bits order the rest.
    return (chance >> 1) | (mask.astype(jnp.uint32) << 31)


def magnitude_masks(
    params: PyTree,
    density: Any,
    *,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    embeddings: bool = True,
    pattern: Pattern | None = None,
) -> PyTree:
    """Masks of the weights of largest magnitude, an exact number of them.

    Args:
      params: The parameters.
      density: A density in (0, 1], or a budget.
      scope: ``"global"`` ranks all weights in one pool, with the budget's total;
        ``"leaf"`` ranks each layer alone, with the budget's count for it.
      where: Which leaves take part, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      embeddings: Whether the default choice takes embedding tables. Give False for
        the cut after GSM, which leaves them alone.
      pattern: Which weights stand and fall together, see ``patterns``: a unit is
        ranked by the sum of its magnitudes. With N:M give ``density=None``.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import masks
      >>> params = {"w": jnp.array([[0.1, -2.0], [0.3, 1.0]])}
      >>> masks.magnitude_masks(params, 0.5)["w"].tolist()
      [[False, True], [False, True]]
    """
    return score_masks(
        (params,),
        params,
        density,
        score=jnp.abs,
        scope=scope,
        where=where,
        stacked=stacked,
        embeddings=embeddings,
        pattern=pattern,
        caller="magnitude_masks",
    )
