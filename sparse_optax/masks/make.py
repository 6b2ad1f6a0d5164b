"""Makes masks: of the largest weights, of the highest scores, at random.

Every pruning criterion is a score for each weight, ranked in one pool over the network
or within each layer, of which an exact number is kept.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from sparse_optax import checks, selection
from sparse_optax.budgets.resolve import (
    check_static,
    counts_of,
    pool_of,
    unit_counts_of,
)
from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.layers import (
    Layers,
    PyTree,
    Where,
    check_values,
    layers_of,
    leaf_names,
    split_layers,
)
from sparse_optax.masks.optimizer_state import named_masks
from sparse_optax.masks.tree import (
    flatten,
    is_nonzero,
    mask_shape,
    names_of,
    unpack,
)
from sparse_optax.patterns import Pattern, pattern_of
from sparse_optax.selection import mesh
from sparse_optax.selection.compilation import as_data
from sparse_optax.selection.leaf import positions
from sparse_optax.selection.plan import PerLayer, row_major
from sparse_optax.selection.topk import LONGEST

Key = jax.Array | int
Operands = tuple[jax.Array, ...]


# --- keys -----------------------------------------------------------------------------
def check_key(key: Any) -> None:
    """Raises unless a value is an integer seed or a random key."""
    plain = checks.concrete(key)
    if isinstance(plain, (int, np.integer)) and not isinstance(plain, bool):
        # JAX uses 32 bits of a seed: 2**32 would be another name of 0.
        if 0 <= plain < 2**32:
            return
    elif isinstance(key, (jax.Array, np.ndarray)):
        is_key = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        is_data = key.dtype == jnp.uint32 and key.ndim >= 1
        # An injected hyper-parameter, or a seed under vmap.
        is_seed = jnp.issubdtype(key.dtype, jnp.integer) and key.ndim == 0
        if key.ndim > (is_data and not is_key):
            raise ArgumentError(
                f"`key` has shape {key.shape}; it must be one key. Pass one of them, "
                "or map over them with jax.vmap."
            )
        if is_key or is_data or is_seed:
            return
    allowed = "an integer seed in [0, 2**32) or a key from jax.random.key"
    checks.fail("key", key, allowed, "Pass, for instance, key=0.")


def as_key(key: Key) -> jax.Array:
    """A typed key, from a seed, raw key data (uint32) or a typed key."""
    check_key(key)
    if isinstance(key, (jax.Array, np.ndarray)):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            default = jax.random.key_impl(jax.random.key(0))
            if jax.random.key_impl(key) == default:
                return key
            # States store key data, which does not say its implementation.
            return jax.random.key(jax.random.bits(key, dtype=jnp.uint32))
        if key.dtype == jnp.uint32 and key.ndim >= 1:
            return jax.random.wrap_key_data(key)
        return jax.random.key(key)
    return jax.random.key(int(key))


def _folded(key: jax.Array, names: Sequence[str]) -> jax.Array:
    """The random key of each leaf, by its name, so that another leaf changes no mask;
    one array, from one kernel.
    """
    hashes = np.array([zlib.crc32(name.encode()) for name in names], np.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)


def leaf_keys(key: jax.Array, names: Sequence[str]) -> list[jax.Array]:
    """The same, one by one."""
    return _slices(_folded(key, names)) if names else []


def draw(
    sample: Callable[..., jax.Array], key: jax.Array, like: Any, dtype: Any
) -> jax.Array:
    """Random numbers with the shape and sharding of a leaf, by the leaf's own key.
    ``sample`` is a function of ``jax.random``.
    """
    sharding = jax.typeof(like).sharding
    with mesh.of(like):
        return sample(
            key,
            like.shape,
            dtype,
            out_sharding=None if sharding.mesh.empty else sharding,  # an Explicit one
        )


def random_scores(
    key: jax.Array, names: Sequence[str], likes: Sequence[Any]
) -> list[jax.Array]:
    """Uniform uint32 scores for leaves; floats would have ties."""
    pairs = zip(leaf_keys(key, names), likes, strict=True)
    return [draw(jax.random.bits, own, like, jnp.uint32) for own, like in pairs]


def hashed_scores(
    key: jax.Array, names: Sequence[str], likes: Sequence[Any]
) -> list[jax.Array]:
    """Uniform uint32 scores for leaves, all different within a leaf, for choices at
    every update. A hash of the position under two random words of the leaf's own key:
    a tenth of the time of ``random_scores``, element by element on any mesh.
    """
    if not likes:
        return []
    words = jax.vmap(lambda own: jax.random.bits(own, (2,), jnp.uint32))(
        _folded(key, names)
    )
    marks = as_data([[i] for i in range(len(likes))])
    return [
        _hashed(lax.dynamic_slice(words, (mark[0], 0 * mark[0]), (1, 2))[0], like)
        for mark, like in zip(marks, likes, strict=True)
    ]


# The finalizer of MurmurHash3: a bijection of 32 bits in which each bit of the input
# changes half of the output. Twice, with a key before each.
_MIX = (16, 0x85EBCA6B), (13, 0xC2B2AE35)


def _hashed(words: jax.Array, like: Any) -> jax.Array:
    shape = tuple(like.shape)
    x = positions(shape, row_major(shape, False), jnp.zeros([], jnp.uint32))
    x = jnp.zeros_like(like, jnp.uint32) + x  # with the sharding of the leaf
    for j in range(2):
        x = x ^ words[j]
        for shift, factor in _MIX:
            x = (x ^ x >> shift) * np.uint32(factor)
        x = x ^ x >> 16
    return x


# --- selections -----------------------------------------------------------------------
def top_of_layers(
    operands: Sequence[Operands],
    counts: Sequence[Any] | jax.Array,
    axes: Sequence[int | None],
    score: Callable[..., jax.Array] | None = None,
) -> list[jax.Array]:
    """Masks of the highest scores, one pool per layer. ``counts`` has an integer per
    leaf, or one per slice if the leaf has an axis of layers; or it is one array over
    all layers. ``score`` is a module-level function of a leaf's arrays.
    """
    if not operands:
        return []
    shapes = [xs[0].shape for xs in operands]
    front = [
        xs if axis is None else tuple(jnp.moveaxis(x, axis, 0) for x in xs)
        for xs, axis in zip(operands, axes, strict=True)
    ]
    short = [
        axis is not None and _has_short_rows(xs[0])
        for xs, axis in zip(front, axes, strict=True)
    ]
    numbers = [None if a is None else s[a] for s, a in zip(shapes, axes, strict=True)]
    if not isinstance(counts, jax.Array):
        each, whole = counts, None
    elif any(short) or 0 in numbers:  # some leaves take no part in the search
        each, whole = split_layers(counts, shapes, axes), None
    else:
        each, whole = (), PerLayer(counts, tuple(numbers))
    chosen: list[Any] = [None] * len(front)
    for i, xs in enumerate(front):
        if short[i]:
            chosen[i] = selection.top_of_rows(xs, each[i], score=score)
    rest = [i for i, m in enumerate(chosen) if m is None]
    if rest:
        leaves = [front[i] if score else front[i][0] for i in rest]
        k = whole if whole is not None else [each[i] for i in rest]
        found = selection.top_k_mask(leaves, k, score=score)
        for i, m in zip(rest, found, strict=True):
            chosen[i] = m
    return [
        m if axis is None else jnp.moveaxis(m, 0, axis)
        for m, axis in zip(chosen, axes, strict=True)
    ]


def follow_layers(
    operands: Sequence[Operands],
    counts: jax.Array | Sequence[Any],
    axes: Sequence[int | None],
    score: Callable[..., jax.Array],
    near: selection.Near,
    *,
    positive: bool = True,
) -> tuple[list[jax.Array], selection.Near, jax.Array]:
    """``top_of_layers`` from where the last search ended. Returns the masks, the next
    ``near``, and whether a layer is cut among equal scores. ``positive`` says that no
    score is negative.
    """
    shapes = [xs[0].shape for xs in operands]
    numbers = [None if a is None else s[a] for s, a in zip(shapes, axes, strict=True)]
    if not operands or 0 in numbers:  # a leaf without layers has no pool
        chosen = top_of_layers(operands, counts, axes, score)
        return chosen, near, jnp.ones([], bool)
    front = [
        xs if axis is None else tuple(jnp.moveaxis(x, axis, 0) for x in xs)
        for xs, axis in zip(operands, axes, strict=True)
    ]
    k: Any = list(counts) if not isinstance(counts, jax.Array) else None
    k = k or PerLayer(jnp.asarray(counts), tuple(numbers))
    found, near, among_equal = selection.follow(
        front, k, near, score=score, positive=positive
    )
    masks = [
        m if axis is None else jnp.moveaxis(m, 0, axis)
        for m, axis in zip(found, axes, strict=True)
    ]
    return masks, near, among_equal


def _has_short_rows(x: jax.Array) -> bool:
    """Whether all pairs of a row may be compared: rows are short and not split."""
    if x.ndim != 2 or x.shape[1] > LONGEST:
        return False
    spec = jax.typeof(x).sharding.spec
    return len(spec) < 2 or spec[1] is None


def place(mask: jax.Array, like: Any) -> jax.Array:
    """Puts a concrete mask on the devices of its leaf, also under Auto meshes."""
    concrete = isinstance(like, jax.Array) and not isinstance(like, Tracer)
    # Uncommitted arrays stay so; otherwise the second step would be compiled again.
    if isinstance(mask, Tracer) or not concrete or not like.committed:
        return mask
    return jax.device_put(mask, like.sharding)


class Ranking(NamedTuple):
    """What is ranked and how much of it is kept."""

    layers: Layers  # the leaves that take part
    like: tuple[Any, ...]  # these leaves, concrete or abstract, for shape and placement
    # Units that the pool keeps, or with `costs` their total cost; a list with the
    # counts of each leaf if layers are ranked alone.
    limit: Any
    costs: list[Any] | None = None  # cost of one unit of each leaf


def ranking(
    params: PyTree,
    density: Any,
    *,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
) -> Ranking:
    """The ranking that a density asks for, without scores; see ``score_masks``."""
    cure = "Use 'leaf' to rank each layer alone."
    checks.choice("scope", scope, ("global", "leaf"), cure=cure)
    pattern = pattern_of(pattern)
    if pattern.density is not None:
        check_static(density, pattern=pattern)
    layers = layers_of(params, where, stacked, pattern)
    like = layers.pick(params)
    if not layers.index:
        return Ranking(layers, like, [])
    if pattern.density is not None or scope == "leaf":
        return Ranking(layers, like, unit_counts_of(density, layers, params))
    k, costs = pool_of(density, layers, params)
    return Ranking(layers, like, k, layers.costs(costs))


def highest(
    wanted: Ranking,
    arrays: Sequence[Operands],
    score: Callable[..., jax.Array] | None = None,
    within: Sequence[jax.Array] | None = None,
) -> PyTree:
    """The mask tree of a ranking, from scores. ``within`` is a mask per leaf of what
    ranks first, whatever its score. It follows the pattern; each leaf then has one
    array of scores, none negative.
    """
    layers = wanted.layers
    operands, score = layers.operands(arrays, score)
    if within is not None:
        pairs = zip(operands, layers.view(within), strict=True)
        operands, score = [(*xs, m) for xs, m in pairs], _first_within
    if isinstance(wanted.limit, list):
        kept = top_of_layers(operands, wanted.limit, layers.units.axes, score)
    else:
        pool = list(operands) if score else [x for (x,) in operands]
        kept = selection.top_k_mask(pool, wanted.limit, score=score, costs=wanted.costs)
    return layers.rebuild(map(place, layers.spread(kept), wanted.like))


def _first_within(score: jax.Array, within: jax.Array) -> jax.Array:
    # Outside of it -1, below every score, so that there is no tie with zero.
    return jnp.where(within, score, -1)


def random_of_layers(
    key: jax.Array,
    layers: Layers,
    like: Sequence[Any],
    counts: Sequence[Any],
    keep: Sequence[jax.Array] | None = None,
) -> list[jax.Array]:
    """Random masks with these counts; ``like`` gives shapes and placement."""
    if keep is not None:
        scores = random_scores(key, layers.names, like)
        operands = list(zip(scores, keep, strict=True))
        kept = top_of_layers(operands, counts, layers.axes, _first_kept)
        return [place(m, x) for m, x in zip(kept, like, strict=True)]
    # Leaves of one shape are drawn and searched as slices of one array: a program of a
    # few large operations instead of many for each leaf.
    groups, drawn, numbers, axes = _alike(layers, like), [], [], []
    for first, *others in groups:
        if others:
            keys = _folded(key, [layers.names[i] for i in (first, *others)])
            drawn.append((_bits_of(keys, shape=tuple(like[first].shape)),))
            numbers.append(np.array([counts[i] for i in (first, *others)]))
            axes.append(0)
        else:
            names, likes = [layers.names[first]], [like[first]]
            drawn.append(tuple(random_scores(key, names, likes)))
            numbers.append(counts[first])
            axes.append(layers.axes[first])
    masks: dict[int, jax.Array] = {}
    for group, found in zip(groups, top_of_layers(drawn, numbers, axes), strict=True):
        parts = _slices(found) if len(group) > 1 else [found]
        masks.update(zip(group, parts, strict=True))
    return [place(masks[i], x) for i, x in enumerate(like)]


def _alike(layers: Layers, like: Sequence[Any]) -> list[list[int]]:
    """Groups of leaves that may be slices of one array: of one shape, one layer each.
    Not with several devices, since an array of slices would not be sharded like them.
    """
    groups: dict[Any, list[int]] = {}
    for i, (leaf, x) in enumerate(zip(layers.leaves, like, strict=True)):
        alone = leaf.axis is not None or not jax.typeof(x).sharding.mesh.empty
        alone = alone or jax.device_count() > 1
        groups.setdefault(i if alone else tuple(x.shape), []).append(i)
    return list(groups.values())


@functools.partial(jax.jit, static_argnames="shape")
def _bits_of(keys: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    """Uniform uint32 numbers of one shape for each key, the same as one by one."""
    return lax.map(lambda key: jax.random.bits(key, shape, jnp.uint32), keys)


def _slices(stack: jax.Array) -> list[jax.Array]:
    """The slices along axis 0, by indices that are data."""
    marks = as_data([[i] for i in range(stack.shape[0])])
    return [lax.dynamic_index_in_dim(stack, mark[0], keepdims=False) for mark in marks]


def _first_kept(chance: jax.Array, mask: jax.Array) -> jax.Array:
    # The top bit marks those that come first; 31 random bits order the others.
    return (chance >> 1) | (mask.astype(jnp.uint32) << 31)


# --- what users call ------------------------------------------------------------------
@boundary("random_masks")
def random_masks(
    key: Key,
    params: PyTree,
    density: Any,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    keep: PyTree | None = None,
) -> PyTree:
    """Masks of exactly the counts of a density, uniformly at random within each layer.

    Args:
      key: Integer seed or random key.
      params: The parameters, concrete or abstract; only shapes are used.
      density: A density in (0, 1] for every layer, or a budget.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      keep: Masks whose weights come first: a larger budget keeps all of them and adds
        random ones, a smaller one keeps a random part of them. Leaves are paired by
        name. A leaf that ``keep`` lacks, or has in another shape, is drawn anew: a new
        layer, a new head.

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
      >>> new = {"head": jnp.zeros((10, 3)), "w": jnp.zeros((20, 10))}
      >>> wider = masks.random_masks(1, new, 0.1, keep=kept)
      >>> masks.count(wider), masks.count({"w": kept["w"] & wider["w"]})
      (23, 10)
    """
    layers = layers_of(params, where, stacked)
    counts, like = counts_of(density, layers, params), layers.pick(params)
    first = None
    if keep is not None:
        first = _kept_first(keep, layers, like)
    kept = random_of_layers(as_key(key), layers, like, counts, first)
    return layers.rebuild(kept)


def _kept_first(keep: PyTree, layers: Layers, like: Sequence[Any]) -> list[jax.Array]:
    """For each leaf the mask in `keep` that fits it, or an empty one."""
    named = named_masks(keep, "keep")
    fits = {
        leaf.name: unpack(named[leaf.name])
        for leaf in layers.leaves
        if leaf.name in named and mask_shape(named[leaf.name]) == leaf.shape
    }
    if layers.index and not fits:
        shapes = {leaf.name: leaf.shape for leaf in layers.leaves}
        given = {name: mask_shape(mask) for name, mask in named.items()}
        raise ArgumentError(
            f"`keep` has masks of the shapes {given}, none of which is a leaf of "
            f"`params` that takes part ({shapes}); one or more must be. Pass masks of "
            "a network that shares a layer with this one."
        )
    nothing = jnp.zeros((), bool)
    return [
        jnp.broadcast_to(fits.get(name, nothing), x.shape)
        for name, x in zip(layers.names, like, strict=True)
    ]


@boundary("nonzero_masks")
def nonzero_masks(params: PyTree, *, where: Where | None = None) -> PyTree:
    """Masks of the weights that are not zero, to fine-tune a pruned model.

    ``static_sparse(inner, masks=nonzero_masks(params))`` keeps its zeros. A leaf that
    does not take part, such as a bias, gets a hole and no mask: it trains whole, also
    where it is zero. A tree of ``w != 0`` would freeze a zero bias for ever.

    Args:
      params: The parameters of the pruned model, concrete or traced.
      where: Which leaves take part, see ``eligible``.

    Returns:
      A mask tree, placed like the parameters. Subnormal numbers count as nonzero, NaN
      too.

    Raises:
      ValueError: If no leaf takes part, or a leaf has no values.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> pruned = {"bias": jnp.zeros(2), "kernel": jnp.array([[0.0, 1.5], [2.0, 0.0]])}
      >>> found = sparse_optax.masks.nonzero_masks(pruned)
      >>> found["bias"], found["kernel"].tolist()
      (MaskedNode(), [[False, True], [True, False]])
      >>> tx = sparse_optax.static_sparse(optax.adam(1e-3), masks=found)
    """
    layers = layers_of(params, where)
    leaves = layers.pick(params)
    check_values(layers.names, leaves)
    arrays = map(jnp.asarray, leaves)
    return layers.rebuild(place(is_nonzero(x), x) for x in arrays)


@boundary("magnitude_masks")
def magnitude_masks(
    params: PyTree,
    density: Any,
    *,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
) -> PyTree:
    """Masks of the weights of largest magnitude, an exact number of them.

    Args:
      params: The parameters.
      density: A density in (0, 1], or a budget.
      scope: ``"global"`` ranks all weights in one pool, with the budget's total;
        ``"leaf"`` ranks each layer alone, with the budget's count for it.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      pattern: See ``patterns``; ranks the sum of magnitudes. With N:M and
        ``constant_fan_in`` ``density=None``.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"w": jnp.array([[0.1, -2.0], [0.3, 1.0]])}
      >>> sparse_optax.masks.magnitude_masks(params, 0.5)["w"].tolist()
      [[False, True], [False, True]]
    """
    return unnamed(score_masks)(
        (params,),
        params,
        density,
        score=jnp.abs,
        scope=scope,
        where=where,
        stacked=stacked,
        pattern=pattern,
    )


@boundary("score_masks")
def score_masks(
    scores: PyTree,
    params: PyTree,
    density: Any,
    *,
    score: Callable[..., jax.Array] | None = None,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
) -> PyTree:
    """Masks of the weights of highest score, an exact number of them.

    Equal scores rank by leaf, then by index; NaN ranks above all numbers.

    Args:
      scores: A tree like ``params``; leaves that do not take part are not read. With
        ``score``, a tuple of such trees.
      params: The parameters, concrete or abstract: names, shapes and placement.
      density: A density in (0, 1], or a budget.
      score: An element-wise, module-level function of the leaves of the trees in
        ``scores``. It is applied during the search; its result is never stored.
      scope: ``"global"`` ranks all weights in one pool, with the budget's total;
        ``"leaf"`` ranks each layer alone, with the budget's count for it.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      pattern: See ``patterns``; ranks the sum of magnitudes of scores. With ``"leaf"``
        a layer keeps a unit or more. With N:M and
        ``constant_fan_in`` ``density=None``.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.zeros(2), "w": jnp.zeros((2, 2))}
      >>> scores = {"b": jnp.ones(2), "w": jnp.array([[4.0, 1.0], [2.0, 3.0]])}
      >>> sparse_optax.masks.score_masks(scores, params, 0.5)["w"].tolist()
      [[True, False], [False, True]]
    """
    wanted = ranking(
        params,
        density,
        scope=scope,
        where=where,
        stacked=stacked,
        pattern=pattern,
    )
    names = leaf_names(params)
    trees = [scores] if score is None else list(scores)
    columns = [_picked(tree, names, wanted) for tree in trees]
    return highest(wanted, list(zip(*columns, strict=True)), score)


def _picked(tree: PyTree, names: list[str], wanted: Ranking) -> tuple[Any, ...]:
    """The leaves of a tree of scores that take part, checked."""
    if (found := names_of(flatten(tree)[1])) != names:
        raise ArgumentError(
            f"`scores` has the leaves {found} and `params` {names}; the structures "
            "must be equal. Pass one score for each weight."
        )
    picked = wanted.layers.pick(tree)
    for leaf, x in zip(wanted.layers.leaves, picked, strict=True):
        if (shape := getattr(x, "shape", None)) != leaf.shape:
            raise ArgumentError(
                f"the scores of {leaf.name!r} have shape {shape} and `params` "
                f"{leaf.shape}; they must be equal. Pass one score a weight."
            )
    return picked
