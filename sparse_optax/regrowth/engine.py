"""The engine: one transformation for every prune-redistribute-grow method.

A step of sparse training is an ordinary optimizer step on the weights that exist.
Now and then a cycle moves the mask:

    prune      which active weights go
    redistribute   how many come back in each layer
    grow       which missing weights come

A method is a triple of rules. ``regrow`` wraps any optimizer with such a triple.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_optax import budgets, schedules
from sparse_optax import masks as mask_trees
from sparse_optax.leaves import (
    Layout,
    PyTree,
    Where,
    is_hole,
    layout,
    leaf_names,
    resolve_where,
)
from sparse_optax.regrowth import guard
from sparse_optax.regrowth import momentum as momenta
from sparse_optax.regrowth.cycle import all_finite, cycle, init_rules
from sparse_optax.regrowth.rules import Evidence, Rule, split_layers

OWN_DECAY = 0.9


class RegrowState(NamedTuple):
    """State of ``regrow``. Trees have the parameters' structure, with holes.

    Attributes:
      count: Finished updates.  # shape=(), int32
      inner_state: State of the wrapped optimizer.
      regrow_masks: Boolean arrays, or ``PackedMask``.
      key: Random key data.  # uint32
      momentum: The engine's own average of the gradient, float32; ``()`` where the
        inner optimizer's momentum serves.
      rules: States of the prune, the redistribution and the growth rule.
      skipped: Cycles left out because of numbers that are not finite.  # int32
      removed: Per leaf, weights removed in the last cycle.  # int32
      grown: Per leaf, weights grown in the last cycle.  # int32
    """

    count: jax.Array
    inner_state: Any
    regrow_masks: PyTree
    key: jax.Array
    momentum: PyTree
    rules: Any
    skipped: jax.Array
    removed: PyTree
    grown: PyTree


def regrow(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    prune: Rule,
    redistribute: Rule,
    grow: Rule,
    update_period: int,
    update_start: int = 0,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
    key: mask_trees.Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    momentum: str | float = "auto",
    reset_moments: str = "none",
    packed: bool = False,
    caller: str = "regrow",
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse training by a triple of rules, around any optimizer.

    With masks m, weights w and the inner optimizer's update u, each step emits

    .. math::
        \Delta w = u \text{ where } m, \quad -w \text{ elsewhere},

    so that missing weights are exactly zero after ``optax.apply_updates``. A cycle
    opens update ``k * update_period + 1``, k >= 1, on the weights handed in and the
    momentum stored: what is evaluated at the end of a period is a trained network,
    and no cycle follows the last step. At an opening update a kept weight and one
    grown from missing get u; a pruned weight, regrown in the same cycle or not,
    gets -w and moves again from the next step. The inner optimizer sees the dense
    gradient and the newly masked weights.

    .. note::
      It must be the last transformation of a chain: whatever scales its updates
      breaks the exact zeros. Without ``inner`` it is chained behind an optimizer,
      and its evidence is the incoming update, one step newer than a stored
      momentum; where that is all zero no cycle runs. Accumulate gradients outside,
      ``optax.MultiSteps(regrow(...), k)``.

      Between cycles a step costs one pass over weights, updates and masks. A cycle
      reads weights and momentum a few dozen times. Memory: one byte a weight, one
      bit with ``packed``.

    Args:
      inner: The optimizer that is wrapped.
      density: Fraction of weights kept, in (0, 1], in every layer, or a budget.
        May be left out where ``masks`` are given.
      prune: Which active weights go.
      redistribute: How many come back in each layer.
      grow: Which missing weights come.
      update_period: Updates between two cycles, at least 1.
      update_start: No cycle before this many updates.
      update_stop: No cycle from this many updates on; None never stops.
      prune_rate: Fraction of a layer's active weights that a cycle prunes, in
        [0, 1], or a schedule of the number of finished updates. None is the cosine
        from 0.5 at the start to 0 at ``update_stop``.
      key: Integer seed or random key, for the first masks and random growth.
      masks: First masks, instead of random ones; their count is the budget.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      momentum: ``"auto"`` reads the momentum that ``inner`` keeps (trace, mu, or
        mu / (sqrt(nu) + 1e-8)) and keeps an average of its own (decay 0.9) where
        there is none or several kinds; a number in [0, 1) keeps an average of that
        decay.
      reset_moments: ``"none"``, or ``"grown"`` to zero the inner optimizer's
        moments of weights just grown.
      packed: Stores one bit a weight.
      caller: The name that errors start with.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: At construction, ``init`` or trace time, if an argument is out of
        its range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax import masks, regrowth
      >>> tx = regrowth.regrow(
      ...     optax.sgd(0.1), density=0.5, prune=regrowth.prune.magnitude,
      ...     redistribute=regrowth.redistribute.none, grow=regrowth.grow.random,
      ...     update_period=2, update_stop=10, key=0)
      >>> params = {"w": jnp.ones((2, 4))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int((optax.apply_updates(params, updates)["w"] == 0).sum())
      4

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019.
    """
    _check_arguments(
        caller,
        inner,
        density,
        masks,
        update_period,
        update_start,
        update_stop,
        prune_rate,
        momentum,
        reset_moments,
        (prune, redistribute, grow),
    )
    inner_tx = optax.with_extra_args_support(inner or optax.identity())
    rules = (prune, redistribute, grow)
    rate_at = _rate_schedule(prune_rate, update_stop)

    def init_fn(params):
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        seed = mask_trees.as_key(key, caller=caller)
        plan, kept = _first_masks(
            params, density, masks, seed, where, stacked, caller=caller
        )
        sparse = tuple(flat[i] for i in plan.index)
        inner_state = inner_tx.init(params)
        _refuse_multi_steps(inner_state, caller)

        def tree(values):
            return mask_trees.rebuild(structure, len(flat), plan.index, values)

        def zeros():
            return tree([_layer_zeros(x, a) for x, a in _zip(sparse, plan.axes)])

        own = ()
        if inner is not None and momentum is not None:
            found = _find(inner_state, plan, sparse, caller)
            if momentum != "auto" or found is None:
                own = tree([jnp.zeros_like(x, dtype=jnp.float32) for x in sparse])
        return RegrowState(
            count=jnp.zeros([], jnp.int32),
            inner_state=inner_state,
            regrow_masks=tree([mask_trees.pack(m) for m in kept] if packed else kept),
            key=jax.random.key_data(seed),
            momentum=own,
            rules=init_rules(rules, sparse, kept),
            skipped=jnp.zeros([], jnp.int32),
            removed=zeros(),
            grown=zeros(),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                f"{caller}: `params` is None; the update of a missing weight is "
                "minus the weight. Call tx.update(grads, state, params)."
            )
        stored, mask_structure = mask_trees.flatten(state.regrow_masks)
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        gradient = jax.tree.leaves(updates, is_leaf=is_hole)
        names = leaf_names(params)
        mask_trees.check_shapes(stored, flat, names, caller=caller)
        mask_trees.check_shapes(stored, gradient, names, caller=caller)
        sparse_leaves = [not is_hole(m) for m in stored]
        plan = layout(params, sparse_leaves, stacked, caller=caller)

        def pick(tree):
            leaves = jax.tree.leaves(tree, is_leaf=mask_trees.is_mask)
            return tuple(leaves[i] for i in plan.index)

        def tree(values):
            return mask_trees.rebuild(mask_structure, len(flat), plan.index, values)

        moments = None
        if inner is None:
            moments = tuple((g, None) for g in pick(updates))
        elif jax.tree.leaves(state.momentum):
            moments = tuple((m, None) for m in pick(state.momentum))
        elif momentum is not None:
            found = _find(state.inner_state, plan, pick(params), caller) or ()
            moments = tuple((f.first, f.second) for f in found)

        operands = _Operands(
            params=pick(params),
            masks=pick(state.regrow_masks),
            gradient=None if inner is None else pick(updates),
            moments=moments,
            rules=state.rules,
            key=state.key,
            step=state.count,
            rate=rate_at(state.count),
            removed=pick(state.removed),
            grown=pick(state.grown),
            skipped=state.skipped,
        )

        def open_cycle(operands):
            return _open_cycle(operands, plan, rules, idle=inner is None)

        due = schedules.is_due(state.count, update_period, update_start, update_stop)
        after = guard.run_if(due, open_cycle, _no_cycle, operands)
        moves = tuple(mask_trees.unpack(m) for m in after.moves)

        masked = list(flat)
        for i, move in _zip(plan.index, moves):
            masked[i] = jnp.where(move, flat[i], jnp.zeros((), flat[i].dtype))
        inner_state = state.inner_state
        if reset_moments == "grown":
            inner_state = _reset_grown(
                inner_tx, inner_state, params, due, operands.masks, after, plan
            )
        new_updates, inner_state = inner_tx.update(
            updates,
            inner_state,
            jax.tree.unflatten(structure, masked),
            **{**extra_args, "regrow_masks": tree(moves)},
        )
        emitted, update_structure = jax.tree.flatten(new_updates, is_leaf=is_hole)
        for i, move in _zip(plan.index, moves):
            # In the parameter's dtype: a rounded -p would leave a remainder.
            step = emitted[i].astype(flat[i].dtype)
            emitted[i] = jnp.where(move, step, -flat[i])
        own = state.momentum
        if jax.tree.leaves(own):
            decay = OWN_DECAY if momentum == "auto" else momentum
            own = tree(momenta.average(pick(own), pick(updates), decay))
        return jax.tree.unflatten(update_structure, emitted), RegrowState(
            count=optax.safe_increment(state.count),
            inner_state=inner_state,
            regrow_masks=tree(after.masks),
            key=state.key,
            momentum=own,
            rules=after.rules,
            skipped=after.skipped,
            removed=tree(after.removed),
            grown=tree(after.grown),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rate_schedule(prune_rate, update_stop):
    if prune_rate is None:
        return schedules.cosine_prune_rate(0.5, stop=update_stop)
    if callable(prune_rate):
        return prune_rate
    return lambda count: jnp.asarray(prune_rate, jnp.float32)


class _Operands(NamedTuple):
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


class _After(NamedTuple):
    """What a cycle changes: ``moves`` is True where a weight takes its update now."""

    masks: tuple[Any, ...]
    moves: tuple[Any, ...]
    rules: Any
    removed: tuple[jax.Array, ...]
    grown: tuple[jax.Array, ...]
    skipped: jax.Array


def _zip(*columns):
    return zip(*columns, strict=True)


def _no_cycle(operands: _Operands) -> _After:
    return _After(
        masks=operands.masks,
        moves=operands.masks,
        rules=operands.rules,
        removed=operands.removed,
        grown=operands.grown,
        skipped=operands.skipped,
    )


def _open_cycle(
    operands: _Operands, plan: Layout, rules: tuple[Rule, Rule, Rule], *, idle: bool
) -> _After:
    old = tuple(mask_trees.unpack(m) for m in operands.masks)
    moments = operands.moments
    evidence = Evidence(
        params=tuple(
            jnp.where(m, p, jnp.zeros((), p.dtype))
            for m, p in _zip(old, operands.params)
        ),
        masks=old,
        gradient=operands.gradient,
        momentum=None if moments is None else tuple(momenta.value(*m) for m in moments),
        key=jax.random.fold_in(jax.random.wrap_key_data(operands.key), operands.step),
        step=operands.step,
        names=plan.names,
        axes=plan.axes,
    )
    prune, redistribute, grow = rules
    result = cycle(
        evidence,
        prune=prune,
        redistribute=redistribute,
        grow=grow,
        prune_rate=operands.rate,
        states=operands.rules,
    )
    # A broken weight counts where it is missing too: it cannot be zeroed.
    sound = jnp.logical_and(result.ok, all_finite(operands.params))
    go = sound
    if idle and evidence.momentum:
        # An update that is zero everywhere (a learning rate of 0) is no evidence.
        moving = [jnp.any(m != 0) for m in evidence.momentum]
        go = jnp.logical_and(go, jnp.any(jnp.stack(moving)))
    moves = tuple(
        # Kept, or grown from missing. What was pruned rests for this update, also
        # where the growth has brought it back.
        jnp.logical_and(new, jnp.logical_or(kept, jnp.logical_not(was)))
        for new, kept, was in _zip(result.masks, result.kept, old)
    )
    removed = split_layers(result.removed, old, plan.axes)
    grown = split_layers(result.grown, old, plan.axes)

    def store(plain):
        return tuple(
            mask_trees.pack(x) if isinstance(m, mask_trees.PackedMask) else x
            for x, m in _zip(plain, operands.masks)
        )

    proposed = _After(
        masks=store(result.masks),
        moves=store(moves),
        rules=result.states,
        removed=removed,
        grown=grown,
        skipped=operands.skipped,
    )
    chosen = jax.tree.map(
        lambda a, b: jnp.where(go, a, b), proposed, _no_cycle(operands)
    )
    broken = jnp.logical_not(sound).astype(jnp.int32)
    return chosen._replace(skipped=operands.skipped + broken)


def _layer_zeros(leaf: Any, axis: int | None) -> jax.Array:
    return jnp.zeros(() if axis is None else (leaf.shape[axis],), jnp.int32)


def _first_masks(params, density, masks, seed, where, stacked, *, caller):
    """The sparse leaves and their first masks, given or random."""
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    names = leaf_names(params)
    if masks is not None and flat:
        given = mask_trees.flatten(masks)[0]
        mask_trees.check_shapes(given, flat, names, caller=caller)
        plan = layout(params, [not is_hole(m) for m in given], stacked, caller=caller)
        for i in plan.index:
            dtype = getattr(given[i], "dtype", jnp.dtype(bool))
            if dtype != jnp.dtype(bool):
                raise ValueError(
                    f"{caller}: the mask of {names[i]!r} has dtype {dtype}; it must "
                    "be bool. Pass mask.astype(bool)."
                )
        # Copied: the caller may donate the state and keep the masks.
        kept = [jnp.array(mask_trees.unpack(given[i]), copy=True) for i in plan.index]
        _check_budget(density, masks, params, where, stacked, caller)
    else:
        chosen = resolve_where(params, where, caller=caller)
        plan = layout(params, chosen, stacked, caller=caller)
        random = mask_trees.random_masks(
            jax.random.fold_in(seed, 0), params, density, where=where, stacked=stacked
        )
        kept = [mask_trees.flatten(random)[0][i] for i in plan.index]
    if not plan.index and any(not is_hole(x) for x in flat):
        raise ValueError(
            f"{caller}: no leaf of {names} is to be made sparse; there must be one. "
            "Choose leaves with where=lambda name, leaf: ..., by default those of "
            "two or more dimensions that are not biases or scales."
        )
    return plan, tuple(kept)


def _check_budget(density, masks, params, where, stacked, caller):
    abstract = any(
        isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct))
        for x in jax.tree.leaves(masks)
    )
    if density is None or abstract:
        return
    wanted = budgets.pool_size(density, params, where=where, stacked=stacked)
    given = mask_trees.count(masks)
    if wanted != given:
        raise ValueError(
            f"{caller}: `masks` keep {given} weights and `density` asks for {wanted}; "
            "they must agree. Leave out `density`: the masks are the budget."
        )


def _find(inner_state, plan, sparse, caller):
    shapes = tuple(tuple(x.shape) for x in sparse)
    return momenta.find(inner_state, plan.names, shapes, caller=caller)


def _reset_grown(inner_tx, inner_state, params, due, before, after, plan):
    """Zeroes the moments of weights that this update's cycle has grown."""
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    full: list[Any] = [optax.MaskedNode()] * len(flat)
    for i, old, new, move in _zip(plan.index, before, after.masks, after.moves):
        was, now, moves = (mask_trees.unpack(m) for m in (old, new, move))
        grown = jnp.logical_and(now, jnp.logical_not(jnp.logical_and(moves, was)))
        full[i] = jnp.logical_and(due, grown)
    grown = jax.tree.unflatten(structure, [_Boxed(m) for m in full])

    def zero(moment, box):
        # Factored or stacked statistics have no entry of their own for a weight.
        if is_hole(moment) or is_hole(box.mask) or moment.shape != box.mask.shape:
            return moment
        return jnp.where(box.mask, jnp.zeros((), moment.dtype), moment)

    return optax.tree.map_params(inner_tx, zero, inner_state, grown, is_leaf=is_hole)


class _Boxed:
    """A leaf that is opaque to ``jax.tree.map``, so that holes keep their place."""

    def __init__(self, mask):
        self.mask = mask


def _refuse_multi_steps(inner_state: Any, caller: str) -> None:
    def is_accumulator(node):
        return isinstance(node, optax.MultiStepsState)

    nodes = jax.tree.leaves(inner_state, is_leaf=is_accumulator)
    if any(is_accumulator(node) for node in nodes):
        raise ValueError(
            f"{caller}: optax.MultiSteps stands inside; masks would move on steps "
            f"that only accumulate. Put it outside: optax.MultiSteps({caller}(...), k)."
        )


def _check_arguments(
    caller, inner, density, masks, period, start, stop, rate, momentum, reset, rules
):
    def fail(name, value, allowed, cure):
        raise ValueError(f"{caller}: `{name}` must be {allowed}; got {value!r}. {cure}")

    if inner is not None and not hasattr(inner, "update"):
        fail("inner", inner, "an optax.GradientTransformation", "Pass optax.sgd(0.1).")
    if density is None and masks is None:
        fail(
            "density", density, "in (0, 1] or a budget", "Pass density=0.05, or masks."
        )
    if isinstance(density, (int, float)) and not 0 < density <= 1:
        fail(
            "density", density, "in (0, 1] or a budget", "0.05 keeps 5% of the weights."
        )
    if isinstance(period, (int, float)) and (period < 1 or period != int(period)):
        fail(
            "update_period",
            period,
            "an integer of at least 1",
            "Pass the steps of an epoch.",
        )
    for name, value in (("update_start", start), ("update_stop", stop)):
        if isinstance(value, (int, float)) and (value < 0 or value != int(value)):
            fail(name, value, "a non-negative integer", "It counts updates.")
    if rate is None and stop is None:
        fail(
            "update_stop",
            None,
            "given where `prune_rate` is None",
            "The default prune rate falls to 0 at update_stop; pass it, or a rate.",
        )
    if isinstance(rate, (int, float)) and not 0 <= rate <= 1:
        fail("prune_rate", rate, "in [0, 1] or a schedule", "0.5 is the paper's.")
    if not (
        momentum in ("auto", None)
        or (isinstance(momentum, float | int) and 0 <= momentum < 1)
    ):
        fail("momentum", momentum, '"auto" or a number in [0, 1)', "Pass 0.9.")
    if reset not in ("none", "grown"):
        fail("reset_moments", reset, '"none" or "grown"', 'RigL resets "grown".')
    for name, rule in zip(("prune", "redistribute", "grow"), rules, strict=True):
        if not isinstance(rule, Rule):
            fail(
                name, rule, "a regrowth.Rule", "Lift a function: regrowth.stateless(f)."
            )
