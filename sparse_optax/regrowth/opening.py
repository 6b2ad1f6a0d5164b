"""What happens at an update that opens a cycle, and what at all others."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparse_optax import masks as mask_trees
from sparse_optax import patterns
from sparse_optax.leaves import Layout, is_hole
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import allocate, guard
from sparse_optax.regrowth import momentum as momenta
from sparse_optax.regrowth.cycle import cycle
from sparse_optax.regrowth.goals import BROKEN, Goal
from sparse_optax.regrowth.rules import (
    Evidence,
    Rule,
    layer_sizes,
    split_layers,
    tally_layers,
)


class Operands(NamedTuple):
    """What a cycle reads, as it is stored: nothing is derived outside the guard."""

    params: tuple[jax.Array, ...]
    masks: tuple[Any, ...]
    gradient: tuple[jax.Array, ...] | None
    moments: tuple[tuple[jax.Array, jax.Array | None], ...] | None
    rules: Any
    key: jax.Array
    step: jax.Array
    rate: jax.Array
    removed: tuple[jax.Array, ...]
    grown: tuple[jax.Array, ...]
    skipped: jax.Array
    goal: Goal | None = None


class How(NamedTuple):
    """What is fixed when a step is traced; hashable.

    Attributes:
      plan: The sparse leaves.
      rules: The prune, the redistribution and the growth rule.
      idle: Whether evidence that is zero everywhere means that no cycle runs.
      hidden: Whether a weight that comes back has a value, so that none rests.
      pattern: Which weights stand and fall together, or None.
    """

    plan: Layout
    rules: tuple[Rule, Rule, Rule]
    idle: bool = False
    hidden: bool = False
    pattern: Pattern | None = None


class After(NamedTuple):
    """What a cycle changes: ``moves`` is True where a weight takes its update now."""

    masks: tuple[Any, ...]
    moves: tuple[Any, ...]
    rules: Any
    removed: tuple[jax.Array, ...]
    grown: tuple[jax.Array, ...]
    skipped: jax.Array


def zip_equal(*columns):
    """``zip`` that insists on equal lengths.

    Args:
      *columns: Iterables.

    Returns:
      An iterator of tuples.

    Examples:
      >>> from sparse_optax.regrowth.opening import zip_equal
      >>> list(zip_equal([1], [2]))
      [(1, 2)]
    """
    return zip(*columns, strict=True)


def no_cycle(operands: Operands) -> After:
    """What an ordinary update leaves: everything as it was.

    Args:
      operands: The stored state.

    Returns:
      The same masks; a weight moves where it exists.

    Examples:
      >>> from sparse_optax.regrowth.opening import Operands, no_cycle
      >>> blank = Operands(*[()] * len(Operands._fields))
      >>> no_cycle(blank).masks
      ()
    """
    return After(
        masks=operands.masks,
        moves=operands.masks,
        rules=operands.rules,
        removed=operands.removed,
        grown=operands.grown,
        skipped=operands.skipped,
    )


@functools.partial(jax.jit, static_argnames="how")
def cycle_if(due: jax.Array, operands: Operands, *, how: How) -> After:
    """``open_cycle`` where due, else ``no_cycle``.

    Jitted here, at module level, so that a training step that is not jitted itself
    compiles the cycle once and not at each step.

    Args:
      due: bool scalar, whether this update opens a cycle.
      operands: The stored state.
      how: The method.

    Returns:
      The masks to go on with, and which weights move now.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from sparse_optax import leaves, regrowth
      >>> from sparse_optax.regrowth.opening import How, Operands, cycle_if
      >>> zero = jnp.int32(0)
      >>> before = Operands(
      ...     params=(jnp.array([3.0, 1.0, 0.0]),),
      ...     masks=(jnp.array([True, True, False]),), gradient=None,
      ...     moments=((jnp.array([1.0, 1.0, 2.0]), None),), rules=((), (), ()),
      ...     key=jax.random.key_data(jax.random.key(0)), step=jnp.int32(10),
      ...     rate=jnp.float32(0.5), removed=(zero,), grown=(zero,), skipped=zero)
      >>> rules = (regrowth.prune.magnitude, regrowth.redistribute.momentum,
      ...          regrowth.grow.momentum)
      >>> how = How(leaves.Layout((0,), ("w",), (None,)), rules)
      >>> for due in (False, True):
      ...     after = cycle_if(jnp.array(due), before, how=how)
      ...     print(after.masks[0].tolist())
      [True, True, False]
      [True, False, True]
    """
    opened = functools.partial(open_cycle, how=how)
    return guard.run_if(due, opened, no_cycle, operands)


def seen(
    pattern: Pattern | None, plan: Layout, *groups: Sequence[Any] | None
) -> list[Any]:
    """Leaves as the rules see them: themselves, or one number for each unit.

    Args:
      pattern: Which weights stand and fall together, or None.
      plan: The sparse leaves.
      *groups: For each kind of evidence one array a leaf, or None.

    Returns:
      The groups, as tuples.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import leaves, patterns
      >>> from sparse_optax.regrowth.opening import seen
      >>> plan = leaves.Layout((0,), ("w",), (None,))
      >>> ((units,),) = seen(patterns.output_units(), plan, [jnp.ones((3, 2))])
      >>> units.tolist()
      [[3.0, 3.0]]
    """

    def one(group):
        if pattern is None or group is None:
            return group if group is None else tuple(group)
        columns = zip_equal(group, plan.axes)
        return tuple(patterns.view(pattern, x, axis) for x, axis in columns)

    return [one(group) for group in groups]


def open_cycle(operands: Operands, how: How) -> After:
    """Runs a cycle on the stored state and says what this update may move.

    Args:
      operands: The stored state.
      how: The method.

    Returns:
      The masks after the cycle; those from before it where a number is not finite.
    """
    plan, pattern = how.plan, how.pattern
    old = tuple(mask_trees.unpack(m) for m in operands.masks)
    moments = operands.moments
    momentum = None if moments is None else tuple(momenta.value(*m) for m in moments)
    params, units, gradient, momentum = seen(
        pattern, plan, operands.params, old, operands.gradient, momentum
    )
    groups = pattern is not None and pattern.m > 0
    axes = (0,) * len(old) if groups else plan.axes  # each group of N:M is a layer
    evidence = Evidence(
        params=params,
        masks=units,
        gradient=gradient,
        momentum=momentum,
        key=jax.random.fold_in(jax.random.wrap_key_data(operands.key), operands.step),
        step=operands.step,
        names=plan.names,
        axes=axes,
    )
    enabled: Any = True
    evident = evidence.momentum or evidence.gradient
    if how.idle and evident:
        # An update that is zero everywhere (a learning rate of 0) is no evidence.
        leaves = [(x,) for x in evident]
        (moving,) = tally_layers(leaves, (None,) * len(leaves), _not_zero)
        enabled = jnp.any(moving > 0)
    target, rate = None, operands.rate
    if operands.goal is not None:
        final, excess, whole = operands.goal
        sizes = jnp.asarray(layer_sizes(units, axes).astype(np.int32))
        target = allocate.target_counts(excess, whole, jnp.asarray(final), sizes)
        rate = jnp.where(excess == BROKEN, jnp.nan, rate)  # no cycle on that either
    prune, redistribute, grow = how.rules
    result = cycle(
        evidence,
        prune=prune,
        redistribute=redistribute,
        grow=grow,
        prune_rate=rate,
        states=operands.rules,
        target=target,
        enabled=enabled,
    )
    go = jnp.logical_and(result.ok, enabled)

    def weights(masks):
        """Masks of weights, from those of the units that a cycle saw."""
        if pattern is None:
            return masks
        columns = zip_equal(masks, old, plan.axes)
        return tuple(patterns.spread(pattern, m, x.shape, a) for m, x, a in columns)

    def numbers(vector):
        """Weights per leaf or stacked layer, from units per layer of the cycle."""
        parts = split_layers(vector, units, axes)
        if pattern is None:
            return parts
        return tuple(
            patterns.layer_sums(pattern, n, x.shape, a)
            if groups
            else n * patterns.unit_size(pattern, x.shape, a)
            for n, x, a in zip_equal(parts, old, plan.axes)
        )

    # Stored once, not made again for the moves: that is half the kernels to compile.
    new_masks, kept_masks = lax.optimization_barrier(
        (weights(result.masks), weights(result.kept))
    )
    moves = new_masks
    if not how.hidden:
        moves = tuple(
            # Kept, or grown from missing. What was pruned rests for this update, also
            # where the growth has brought it back.
            jnp.logical_and(new, jnp.logical_or(kept, jnp.logical_not(was)))
            for new, kept, was in zip_equal(new_masks, kept_masks, old)
        )
    removed, grown = numbers(result.removed), numbers(result.grown)

    def store(plain):
        return tuple(
            mask_trees.pack(x) if isinstance(m, mask_trees.PackedMask) else x
            for x, m in zip_equal(plain, operands.masks)
        )

    def if_go(new, old):
        return jax.tree.map(lambda a, b: jnp.where(go, a, b), new, old)

    return After(
        masks=store(new_masks),
        moves=store(moves),
        rules=result.states,
        removed=if_go(removed, operands.removed),
        grown=if_go(grown, operands.grown),
        skipped=operands.skipped + jnp.logical_not(result.ok).astype(jnp.int32),
    )


def _not_zero(x: jax.Array) -> tuple[jax.Array]:
    return (x != 0,)


def reset_grown(inner_tx, inner_state, params, due, before, after, plan):
    """Zeroes the moments of weights that this update's cycle has grown.

    Args:
      inner_tx: The inner optimizer.
      inner_state: Its state.
      params: The parameters.
      due: Whether this update opened a cycle.
      before: The stored masks from before it.
      after: What the cycle changed.
      plan: The sparse leaves.

    Returns:
      The inner state; entries without their weight's shape are left alone.
    """
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    full: list[Any] = [optax.MaskedNode()] * len(flat)
    for i, old, new, move in zip_equal(plan.index, before, after.masks, after.moves):
        was, now, moves = (mask_trees.unpack(m) for m in (old, new, move))
        grown = jnp.logical_and(now, jnp.logical_not(jnp.logical_and(moves, was)))
        full[i] = jnp.logical_and(due, grown)
    grown = jax.tree.unflatten(structure, [_Boxed(m) for m in full])

    def zero(moment, box):
        # Factored or stacked statistics have no entry of their own for a weight.
        if is_hole(moment) or is_hole(box.mask) or moment.shape != box.mask.shape:
            return moment
        if not jnp.issubdtype(moment.dtype, jnp.inexact):
            return moment  # signs, masks and counters are no moments
        return jnp.where(box.mask, jnp.zeros((), moment.dtype), moment)

    return optax.tree.map_params(inner_tx, zero, inner_state, grown, is_leaf=is_hole)


class _Boxed:
    """A leaf that is opaque to ``jax.tree.map``, so that holes keep their place."""

    def __init__(self, mask):
        self.mask = mask
