"""What happens at an update that opens a cycle, and what at all others."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparse_optax import masks as mask_trees
from sparse_optax.leaves import Layout, is_hole
from sparse_optax.regrowth import allocate, guard
from sparse_optax.regrowth import momentum as momenta
from sparse_optax.regrowth.cycle import cycle
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
    excess: jax.Array | None = None
    final: jax.Array | np.ndarray | None = None


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


@functools.partial(jax.jit, static_argnames=("plan", "rules", "idle", "hidden"))
def cycle_if(
    due: jax.Array,
    operands: Operands,
    *,
    plan: Layout,
    rules: tuple[Rule, Rule, Rule],
    idle: bool,
    hidden: bool,
) -> After:
    """``open_cycle`` where due, else ``no_cycle``.

    Jitted here, at module level, so that a training step that is not jitted itself
    compiles the cycle once and not at each step.

    Args:
      due: bool scalar, whether this update opens a cycle.
      operands: The stored state.
      plan: The sparse leaves.
      rules: The prune, the redistribution and the growth rule.
      idle: Whether evidence that is zero everywhere means that no cycle runs.
      hidden: Whether a weight that comes back has a value, so that none rests.

    Returns:
      The masks to go on with, and which weights move now.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from sparse_optax import leaves, regrowth
      >>> from sparse_optax.regrowth.opening import Operands, cycle_if
      >>> zero = jnp.int32(0)
      >>> before = Operands(
      ...     params=(jnp.array([3.0, 1.0, 0.0]),),
      ...     masks=(jnp.array([True, True, False]),), gradient=None,
      ...     moments=((jnp.array([1.0, 1.0, 2.0]), None),), rules=((), (), ()),
      ...     key=jax.random.key_data(jax.random.key(0)), step=jnp.int32(10),
      ...     rate=jnp.float32(0.5), removed=(zero,), grown=(zero,), skipped=zero)
      >>> rules = (regrowth.prune.magnitude, regrowth.redistribute.momentum,
      ...          regrowth.grow.momentum)
      >>> plan = leaves.Layout((0,), ("w",), (None,))
      >>> for due in (False, True):
      ...     after = cycle_if(
      ...         jnp.array(due), before, plan=plan, rules=rules, idle=False,
      ...         hidden=False)
      ...     print(after.masks[0].tolist())
      [True, True, False]
      [True, False, True]
    """
    opened = functools.partial(
        open_cycle, plan=plan, rules=rules, idle=idle, hidden=hidden
    )
    return guard.run_if(due, opened, no_cycle, operands)


def open_cycle(
    operands: Operands,
    plan: Layout,
    rules: tuple[Rule, Rule, Rule],
    *,
    idle: bool,
    hidden: bool,
) -> After:
    """Runs a cycle on the stored state and says what this update may move.

    Args:
      operands: The stored state.
      plan: The sparse leaves.
      rules: The prune, the redistribution and the growth rule.
      idle: Whether evidence that is zero everywhere means that no cycle runs.
      hidden: Whether a weight that comes back has a value, so that none rests.

    Returns:
      The masks after the cycle; those from before it where a number is not finite.
    """
    old = tuple(mask_trees.unpack(m) for m in operands.masks)
    moments = operands.moments
    evidence = Evidence(
        params=operands.params,
        masks=old,
        gradient=operands.gradient,
        momentum=None if moments is None else tuple(momenta.value(*m) for m in moments),
        key=jax.random.fold_in(jax.random.wrap_key_data(operands.key), operands.step),
        step=operands.step,
        names=plan.names,
        axes=plan.axes,
    )
    enabled: Any = True
    seen = evidence.momentum or evidence.gradient
    if idle and seen:
        # An update that is zero everywhere (a learning rate of 0) is no evidence.
        leaves = [(x,) for x in seen]
        (moving,) = tally_layers(leaves, (None,) * len(leaves), _not_zero)
        enabled = jnp.any(moving > 0)
    target = None
    if operands.final is not None and operands.excess is not None:
        sizes = jnp.asarray(layer_sizes(old, plan.axes).astype(np.int32))
        target = allocate.target_counts(
            operands.excess, jnp.asarray(operands.final), sizes
        )
    prune, redistribute, grow = rules
    result = cycle(
        evidence,
        prune=prune,
        redistribute=redistribute,
        grow=grow,
        prune_rate=operands.rate,
        states=operands.rules,
        target=target,
        enabled=enabled,
    )
    go = jnp.logical_and(result.ok, enabled)
    # Stored once, not made again for the moves: that is half the kernels to compile.
    new_masks, kept_masks = lax.optimization_barrier((result.masks, result.kept))
    moves = (
        new_masks
        if hidden
        else tuple(
            # Kept, or grown from missing. What was pruned rests for this update, also
            # where the growth has brought it back.
            jnp.logical_and(new, jnp.logical_or(kept, jnp.logical_not(was)))
            for new, kept, was in zip_equal(new_masks, kept_masks, old)
        )
    )
    removed = split_layers(result.removed, old, plan.axes)
    grown = split_layers(result.grown, old, plan.axes)

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
