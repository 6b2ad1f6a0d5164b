"""Growth rules: which missing weights grow."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sparse_optax import checks, selection
from sparse_optax.checks import boundary
from sparse_optax.layers import layer_sizes
from sparse_optax.masks.make import follow_layers, top_of_layers
from sparse_optax.regrowth import allocate
from sparse_optax.regrowth.prune import check_spread, thresholds
from sparse_optax.regrowth.redistribute import mean_magnitudes
from sparse_optax.regrowth.rules import (
    Evidence,
    PerWeight,
    Rule,
    coin,
    layer_counts,
    stateless,
)
from sparse_optax.selection.leaf import wide as as_wide

__all__ = [
    "Explored",
    "above_spread",
    "global_gradient",
    "global_momentum",
    "global_random_elsewhere",
    "gradient",
    "magnitude",
    "momentum",
    "momentum_per_neuron",
    "random",
    "random_elsewhere",
    "unexplored",
]

_TOP = np.uint32(1 << 31)


def _with_masks(evidence: Evidence, values: Iterable[Any]) -> list[tuple[Any, Any]]:
    return list(zip(values, evidence.masks, strict=True))


# --- the largest in each layer --------------------------------------------------------
def _missing_magnitude(value: jax.Array, mask: jax.Array) -> jax.Array:
    # Active weights rank below every magnitude and never grow.
    return jnp.where(mask, -1.0, jnp.abs(value))


def _largest(evidence: Evidence, values: Any, rule: str) -> tuple[jax.Array, ...]:
    counts = evidence.need("counts", rule)
    return evidence.select(_with_masks(evidence, values), counts, _missing_magnitude)


def _momentum(evidence: Evidence) -> tuple[jax.Array, ...]:
    values = evidence.need("momentum", "grow.momentum")
    return _largest(evidence, values, "grow.momentum")


def _gradient(evidence: Evidence) -> tuple[jax.Array, ...]:
    values = evidence.need("gradient", "grow.gradient")
    return _largest(evidence, values, "grow.gradient")


def _magnitude(evidence: Evidence) -> tuple[jax.Array, ...]:
    return _largest(evidence, evidence.params, "grow.magnitude")


#: Grows, in each layer, the missing weights of largest absolute momentum. Ties go to
#: the lower index.
momentum = stateless(_momentum, needs=("momentum",), exact=True)

#: Grows, in each layer, the missing weights of largest absolute gradient.
gradient = stateless(_gradient, needs=("gradient",), exact=True)

#: Grows, in each layer, the missing weights of largest |w|, for ``hidden=True``.
#: Without it all are zero, and the lowest indices grow.
magnitude = stateless(_magnitude, exact=True)


# --- at random ------------------------------------------------------------------------
def _missing_random(bits: jax.Array, mask: jax.Array) -> jax.Array:
    # The top bit marks missing weights; 31 random bits order them.
    return jnp.where(mask, jnp.uint32(0), _TOP | bits)


def _elsewhere(bits: jax.Array, mask: jax.Array, before: jax.Array) -> jax.Array:
    # Weights just pruned rank below all other missing weights.
    missing = jnp.where(before, bits >> 2 | jnp.uint32(1 << 30), _TOP | bits)
    return jnp.where(mask, jnp.uint32(0), missing)


def _by_chance(evidence: Evidence, rule: str) -> list[tuple[jax.Array, ...]]:
    before, bits = evidence.need("before", rule), evidence.hashed_bits(rule)
    return list(zip(bits, evidence.masks, before, strict=True))


def _expected(evidence: Evidence, counts: jax.Array, room: jax.Array) -> selection.Near:
    """Where the search for the ``counts`` highest of ``room`` uniform scores ends, give
    or take two standard deviations.
    """
    room = jnp.maximum(room, 1).astype(jnp.float32)
    share = jnp.clip(counts.astype(jnp.float32) / room, 0, 1)
    spread = 2 * jnp.sqrt(share * (1 - share) / room) + 2 / room
    # Scores of missing weights have the top bit: their keys are not negative.
    half = np.nextafter(np.float32(2**31), np.float32(0))
    return selection.Near(
        ((1 - share) * half).astype(jnp.int32), (spread * half).astype(jnp.uint32)
    )


def _at_random(
    evidence: Evidence, arrays: Any, score: Any, room: jax.Array, rule: str
) -> tuple[jax.Array, ...]:
    """The highest random scores, ``counts`` in each layer."""
    counts = jnp.asarray(evidence.need("counts", rule))
    near = _expected(evidence, counts, room)
    found = follow_layers(arrays, counts, evidence.layer_axes, score, near)
    return tuple(found[0])


def _random(evidence: Evidence) -> tuple[jax.Array, ...]:
    if not evidence.masks:
        return ()
    pairs = _with_masks(evidence, evidence.hashed_bits("grow.random"))
    room = evidence.count([jnp.logical_not(m) for m in evidence.masks])
    return _at_random(evidence, pairs, _missing_random, room, "grow.random")


def _random_elsewhere(evidence: Evidence) -> tuple[jax.Array, ...]:
    if not evidence.masks:
        return ()
    arrays, rule = (
        _by_chance(evidence, "grow.random_elsewhere"),
        "grow.random_elsewhere",
    )
    missing = [jnp.logical_not(jnp.logical_or(m, b)) for _, m, b in arrays]
    return _at_random(evidence, arrays, _elsewhere, evidence.count(missing), rule)


#: Grows, in each layer, missing weights uniformly at random, an exact number.
random = stateless(_random, exact=True)

#: The same, but weights just pruned grow only if their layer has no other room.
random_elsewhere = stateless(_random_elsewhere, exact=True)


# --- one pool over all layers ---------------------------------------------------------
def _pooled(evidence: Evidence, arrays, score, rule: str) -> tuple[jax.Array, ...]:
    """The best ``sum(counts)`` weights of all layers as one pool."""
    counts = evidence.need("counts", rule)
    if not arrays:
        return ()
    k = allocate.signed_sum(counts)
    return tuple(selection.top_k_mask(arrays, k, score=score))


def _global_momentum(evidence: Evidence) -> tuple[jax.Array, ...]:
    rule = "grow.global_momentum"
    pairs = _with_masks(evidence, evidence.need("momentum", rule))
    return _pooled(evidence, pairs, _missing_magnitude, rule)


def _global_gradient(evidence: Evidence) -> tuple[jax.Array, ...]:
    rule = "grow.global_gradient"
    pairs = _with_masks(evidence, evidence.need("gradient", rule))
    return _pooled(evidence, pairs, _missing_magnitude, rule)


def _global_random_elsewhere(evidence: Evidence) -> tuple[jax.Array, ...]:
    rule = "grow.global_random_elsewhere"
    return _pooled(evidence, _by_chance(evidence, rule), _elsewhere, rule)


#: Grows the ``sum(counts)`` missing weights of largest absolute momentum in one pool.
#: The number of each layer follows from them.
global_momentum = stateless(_global_momentum, needs=("momentum",))

#: Grows the ``sum(counts)`` missing weights of largest absolute gradient in one pool.
global_gradient = stateless(_global_gradient, needs=("gradient",))

#: ``random_elsewhere`` in one pool: uniform over the missing weights of all layers.
global_random_elsewhere = stateless(_global_random_elsewhere)


# --- output units as pools ------------------------------------------------------------
# The units of a layer are the slices along its last axis, as in flax and haiku. If a
# leaf stacks layers, that is the last axis of each slice.
def _layers_first(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    """The shape (layers, *shape of a layer); a layer has at least one axis."""
    if axis is None:
        return (1, *(shape or (1,)))
    rest = shape[:axis] + shape[axis + 1 :]
    return (shape[axis], *(rest or (1,)))


def _sharding(x: jax.Array) -> Any:
    return jax.typeof(x).sharding


def _whole(x: jax.Array) -> jax.Array:
    """A leaf, gathered on an Explicit mesh, where merged axes cannot be sharded."""
    sharding = _sharding(x)
    if sharding.mesh.empty:
        return x
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def _fold(x: jax.Array, axis: int | None) -> jax.Array:
    """A leaf with its units along the first axis, those of the first layer first."""
    if axis is None:
        return jnp.moveaxis(x, -1, 0) if x.ndim else x[None]
    layers, *_, number = shape = _layers_first(x.shape, axis)
    front = jnp.moveaxis(jnp.moveaxis(_whole(x), axis, 0).reshape(shape), -1, 1)
    return front.reshape(layers * number, *shape[1:-1])


def _unfold(x: jax.Array, like: jax.Array, axis: int | None) -> jax.Array:
    """The inverse of ``_fold``, for a leaf with the shape and sharding of ``like``."""
    shape = like.shape
    if axis is None:
        return jnp.moveaxis(x, 0, -1) if shape else x[0]
    layers, *rest, number = _layers_first(shape, axis)
    front = jnp.moveaxis(x.reshape(layers, number, *rest), 1, -1)
    plain = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    leaf, sharding = jnp.moveaxis(front.reshape(plain), 0, axis), _sharding(like)
    return leaf if sharding.mesh.empty else jax.reshard(leaf, sharding)


def _split_counts(
    counts: jax.Array,
    values: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    axes: Sequence[int | None],
) -> list[jax.Array]:
    """Divides each layer's count over its units, by the mean |value| of a unit.

    The mean is over all weights of a unit, as a whole number relative to the largest
    |x| of the layer, see ``redistribute.mean_magnitudes``. ``allocate.apportion`` does
    the rest; units share in proportion to their room if all means of a layer are zero.
    Returns for each leaf an int32 array of shape (layers * units,).
    """
    if not values:
        return []
    scaled, folded, shapes = [], [], []
    for v, m, axis in zip(values, masks, axes, strict=True):
        v = jnp.abs(v.astype(as_wide(v.dtype)))
        others = tuple(i for i in range(v.ndim) if i != axis)
        top = jnp.max(v, axis=others, keepdims=True, initial=0)
        scaled.append(_fold(v / jnp.where(top > 0, top, 1), axis))
        folded.append(_fold(m, axis))
        layers, *_, number = _layers_first(v.shape, axis)
        shapes.append((layers, number))
    pools = (0,) * len(scaled)
    missing = tuple(jnp.logical_not(m) for m in folded)
    # With no active weight, the mean is over all weights.
    nothing = tuple(jnp.zeros_like(m) for m in folded)
    shares = mean_magnitudes(tuple(scaled), nothing, pools)
    room = layer_counts(missing, pools)
    widest = max(number for _, number in shapes)

    def rows(vector):
        ends = np.cumsum([layers * number for layers, number in shapes])[:-1]
        parts = [
            jnp.pad(part.reshape(shape), ((0, 0), (0, widest - shape[1])))
            for part, shape in zip(jnp.split(vector, ends), shapes, strict=True)
        ]
        return jnp.concatenate(parts)

    most = int(max(layer_sizes([m.shape for m in masks], axes), default=1))
    split = jax.vmap(lambda n, s, r: allocate.apportion(n, s, r, r, most=most))
    given = split(counts, rows(shares), rows(room))
    out, start = [], 0
    for layers, number in shapes:
        out.append(given[start : start + layers, :number].reshape(-1))
        start += layers
    return out


def _momentum_per_neuron(evidence: Evidence) -> tuple[jax.Array, ...]:
    values = evidence.need("momentum", "grow.momentum_per_neuron")
    counts = evidence.need("counts", "grow.momentum_per_neuron")
    masks, axes = evidence.masks, evidence.layer_axes
    by_unit = [
        (_fold(v, axis), _fold(m, axis))
        for v, m, axis in zip(values, masks, axes, strict=True)
    ]
    split = _split_counts(counts, values, masks, axes)
    chosen = top_of_layers(by_unit, split, [0] * len(by_unit), _missing_magnitude)
    columns = zip(chosen, masks, axes, strict=True)
    return tuple(_unfold(new, m, axis) for new, m, axis in columns)


#: Divides a layer's count over its output units (its last axis) in proportion to the
#: mean absolute momentum of a unit, within its room, and grows the weights of largest
#: absolute momentum in each unit.
momentum_per_neuron = stateless(_momentum_per_neuron, needs=("momentum",), exact=True)


# --- weights that were never active ---------------------------------------------------
class Explored(NamedTuple):
    """State of ``unexplored``.

    Attributes:
      explored: Where a weight was ever active, bool arrays.
      rule: State of the inner rule.
    """

    explored: PerWeight
    rule: Any


def check_exact(argument: str, rule: Any) -> None:
    """Raises unless a value is a growth rule that keeps to its counts."""
    if not isinstance(rule, Rule) or not rule.exact:
        cure = "Use grow.random, grow.gradient or grow.momentum."
        checks.fail(argument, rule, "a growth rule that keeps to its counts", cure)


@boundary("unexplored")
def unexplored(rule: Rule, *, prefer: bool = True) -> Rule:
    """Records which weights were ever active, and grows other weights first.

    If a layer has too few weights that were never active, the rest grows anywhere by
    the same rule. ``masks.get_explored`` reads the record. Memory: one byte per weight.

    Args:
      rule: A growth rule that keeps to its counts, such as ``random`` or ``gradient``.
      prefer: Whether weights that were never active come first; False only records.

    Returns:
      A growth rule.

    Raises:
      ValueError: If the rule places its counts in other layers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> rule = regrowth.grow.unexplored(regrowth.grow.gradient)
      >>> masks = (jnp.array([True, False, False, False]),)
      >>> evidence = regrowth.Evidence(
      ...     params=(jnp.ones(4),), masks=masks, before=masks,
      ...     gradient=(jnp.array([0.0, 9.0, 2.0, 1.0]),), counts=jnp.array([1]))
      >>> seen = regrowth.PerWeight((jnp.array([True, True, False, False]),))
      >>> (new,), state = rule.apply(evidence, regrowth.grow.Explored(seen, ()))
      >>> new.tolist(), state.explored.values[0].tolist()
      ([False, False, True, False], [True, True, True, False])

    References:
      Liu et al, `Do We Actually Need Dense Over-Parameterization?
      <https://arxiv.org/abs/2102.02887>`_, 2021, who count such weights.
    """
    check_exact("rule", rule)
    checks.flag("prefer", prefer)
    return _unexplored(rule, bool(prefer))


# Cached: a rule is a static argument of the compiled cycle.
@functools.lru_cache
def _unexplored(rule: Rule, prefer: bool) -> Rule:
    def init(params, masks):
        # Copied, since the state also holds the masks and may be donated.
        seen = tuple(jnp.array(m, copy=True) for m in masks)
        return Explored(PerWeight(seen), rule.init(params, masks))

    def apply(evidence, state):
        before = evidence.need("before", "grow.unexplored")
        wanted = evidence.need("counts", "grow.unexplored")
        seen = tuple(map(jnp.logical_or, state.explored.values, before))
        inside, first = state.rule, tuple(map(jnp.zeros_like, before))
        if prefer and seen:
            full = seen
            if evidence.within is not None:
                full = tuple(map(jnp.logical_or, seen, evidence.masks))
            room = evidence.count(tuple(map(jnp.logical_not, full)))
            some = jnp.minimum(wanted, room)
            fresh = evidence._replace(masks=full, counts=some)
            first, inside = rule.apply(fresh, inside)
            taken = tuple(map(jnp.logical_or, evidence.masks, first))
            evidence = evidence._replace(masks=taken, counts=wanted - some)
        rest, inside = rule.apply(evidence, inside)
        new = tuple(map(jnp.logical_or, first, rest))
        seen = tuple(map(jnp.logical_or, seen, new))
        return new, Explored(PerWeight(seen), inside)

    return Rule(init, apply, needs=rule.needs, exact=True)


# --- above a threshold ----------------------------------------------------------------
@boundary("grow.above_spread")
def above_spread(
    c: float, factor: float = 1.1, *, gamma: float = 0.0, power: float = 1.0
) -> Rule:
    """Grows all missing weights at or above a threshold, see ``prune.below_spread``.

    Args:
      c: Standard deviations above the mean.
      factor: Factor of the threshold, at least that of ``prune.below_spread``.
      gamma: In the probability of a change, at least 0; 0 is every cycle.
      power: Exponent of the probability, at least 0.

    Returns:
      A rule that stores one number per leaf. No budget limits the growth.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> rule = sparse_optax.regrowth.grow.above_spread(0.0, 1.0)
      >>> params, masks = (jnp.array([3.0, 1.0]),), (jnp.zeros(2, bool),)
      >>> state = rule.init(params, masks)
      >>> (new,), _ = rule.apply(sparse_optax.regrowth.Evidence(params, masks), state)
      >>> new.tolist()
      [True, False]
    """
    check_spread(c, factor, gamma, power)
    return _above_spread(c, factor, gamma, power)


@functools.lru_cache
def _above_spread(c: float, factor: float, gamma: float, power: float) -> Rule:
    def apply(evidence, state):
        heads = coin(evidence.step, gamma, power)
        columns = zip(evidence.params, evidence.masks, state.values, strict=True)
        new = (heads & (jnp.abs(w) >= t) & jnp.logical_not(m) for w, m, t in columns)
        return tuple(new), state

    return Rule(
        lambda params, _: PerWeight(thresholds(params, c, factor)),
        apply,
        open_ended=True,
    )
