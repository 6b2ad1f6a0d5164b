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

from sparse_optax import masks as mask_trees
from sparse_optax import schedules
from sparse_optax.leaves import PyTree, Where, is_hole, layout, leaf_names
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import momentum as momenta
from sparse_optax.regrowth.arguments import (
    check_arguments,
    rate_schedule,
    refuse_multi_steps,
)
from sparse_optax.regrowth.beginning import first_masks
from sparse_optax.regrowth.cycle import init_rules
from sparse_optax.regrowth.goals import rules_under, targets
from sparse_optax.regrowth.opening import (
    How,
    Operands,
    cycle_if,
    no_cycle,
    reset_grown,
    seen,
    zip_equal,
)
from sparse_optax.regrowth.rules import Rule, map_weights

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
      hidden: With ``hidden=True`` the weights that go on behind missing ones; else
        ``()``.
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
    hidden: PyTree


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
    budget: optax.Schedule | schedules.Towards | None = None,
    hidden: bool = False,
    pattern: Pattern | None = None,
    regrown: str = "zero",
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

      Under ``optax.inject_hyperparams`` only ``prune_rate`` may be injected; name
      all others in ``static_args``.

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
      budget: A schedule of the density by the number of finished updates, for
        methods that become sparse while they train. At a cycle, with d the density
        that it gives and D that of ``density``, layer i is to have
        ``c_i + floor(x (n_i - c_i))`` of its n_i weights, x = (d - D) / (1 - D) cut
        to [0, 1], where c_i is its final count: all at d = 1, exactly the counts of
        ``density`` at d <= D. The first masks follow it at 0. None keeps the number.
        ``schedules.Towards`` makes one that ends at D, whatever ``density`` is.
      hidden: Keeps a weight behind each missing one, which the inner optimizer goes
        on training with the dense gradient and the rules see: where its weight
        comes back it brings that value. First masks that are not given are of the
        largest weights. Memory: one more copy of the weights.
      pattern: Which weights stand and fall together, see ``patterns``: rules then see
        the sum of magnitudes of each unit in the place of weights. Where units of
        different layers differ in size, and with N:M, nothing is redistributed: the
        number of weights would change. With N:M ``density`` is left out; a cycle
        prunes its share of a whole layer, and each group gets back what it lost.
        Under a ``budget`` a group has n + floor(x (m - n)) of its m weights.
      regrown: What a weight that is pruned and grown back in one cycle goes on with:
        ``"zero"``, or its ``"value"``, so that only the growth's choice counts.
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
    check_arguments(
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
        budget,
        hidden,
        pattern,
        regrown,
    )
    inner_tx = optax.with_extra_args_support(inner or optax.identity())
    moving = budget is not None
    given = (prune, redistribute, grow)
    needs = {name for rule in given for name in rule.needs}
    rate_at = rate_schedule(prune_rate, update_stop)

    def init_fn(params):
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        seed = mask_trees.as_key(key, caller=caller)
        plan, kept = first_masks(
            params,
            density,
            masks,
            seed,
            where,
            stacked,
            budget,
            hidden,
            pattern,
            caller=caller,
        )
        sparse = tuple(flat[i] for i in plan.index)
        rules = rules_under(pattern, given, sparse, plan, moving, caller=caller)
        inner_state = inner_tx.init(params)
        refuse_multi_steps(inner_state, caller)

        def tree(values):
            return mask_trees.rebuild(structure, len(flat), plan.index, values)

        def zeros():
            return tree([_layer_zeros(x, a) for x, a in zip_equal(sparse, plan.axes)])

        own = ()
        if inner is not None and "momentum" in needs:
            found = None
            if momentum == "auto":
                found = _find(inner_state, plan, sparse, caller)
            if found is None:
                own = tree([jnp.zeros_like(x, dtype=jnp.float32) for x in sparse])
        return RegrowState(
            count=jnp.zeros([], jnp.int32),
            inner_state=inner_state,
            regrow_masks=tree([mask_trees.pack(m) for m in kept] if packed else kept),
            # Copied: the state may be donated, the caller's key may not.
            key=jnp.array(jax.random.key_data(seed), copy=True),
            momentum=own,
            rules=map_weights(
                tree, init_rules(rules, *seen(pattern, plan, sparse, kept))
            ),
            skipped=jnp.zeros([], jnp.int32),
            removed=zeros(),
            grown=zeros(),
            hidden=tree([_copy(x) for x in sparse]) if hidden else (),
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
        mask_trees.check_names(mask_structure, names, caller=caller)
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
        if "momentum" not in needs:
            pass
        elif inner is None:
            moments = tuple((g, None) for g in pick(updates))
        elif jax.tree.leaves(state.momentum):
            moments = tuple((m, None) for m in pick(state.momentum))
        else:
            found = _find(state.inner_state, plan, pick(params), caller) or ()
            moments = tuple((f.first, f.second) for f in found)

        weights = pick(params)
        if hidden:
            # What exists is what was handed in; the rest is as it was left.
            columns = zip_equal(pick(state.regrow_masks), weights, pick(state.hidden))
            weights = tuple(
                jnp.where(mask_trees.unpack(m), w, h) for m, w, h in columns
            )
        goal = None
        if budget is not None and plan.index:
            now = state.count
            goal = targets(budget, density, now, params, plan, pattern, caller=caller)
        operands = Operands(
            params=weights,
            masks=tuple(_as_stored(m) for m in pick(state.regrow_masks)),
            gradient=pick(updates) if "gradient" in needs else None,
            moments=moments,
            rules=map_weights(pick, state.rules),
            key=state.key.astype(jnp.uint32),
            step=state.count,
            rate=jnp.asarray(rate_at(state.count)),
            removed=pick(state.removed),
            grown=pick(state.grown),
            skipped=state.skipped,
            goal=goal,
        )

        due = schedules.is_due(state.count, update_period, update_start, update_stop)
        after = no_cycle(operands)
        if not schedules.never_due(update_period, update_start, update_stop):
            rules = rules_under(pattern, given, weights, plan, moving, caller=caller)
            stays = hidden or regrown == "value"
            how = How(plan, rules, inner is None, stays, pattern)
            after = cycle_if(due, operands, how=how)
        moves = tuple(mask_trees.unpack(m) for m in after.moves)

        masked = list(flat)
        for i, w, move in zip_equal(plan.index, weights, moves):
            masked[i] = w if hidden else jnp.where(move, w, jnp.zeros((), w.dtype))
        inner_state = state.inner_state
        if reset_moments == "grown":
            inner_state = reset_grown(
                inner_tx, inner_state, params, due, operands.masks, after, plan
            )
        new_updates, inner_state = inner_tx.update(
            updates,
            inner_state,
            jax.tree.unflatten(structure, masked),
            **{**extra_args, "regrow_masks": tree(moves)},
        )
        emitted, update_structure = jax.tree.flatten(new_updates, is_leaf=is_hole)
        behind = []
        for i, w, move in zip_equal(plan.index, weights, moves):
            # In the parameter's dtype: a rounded -p would leave a remainder.
            step = emitted[i].astype(flat[i].dtype)
            if hidden:
                behind.append(w + step)
                # A weight that comes back brings what was hidden; others just move.
                step += w - flat[i]
            emitted[i] = jnp.where(move, step, -flat[i])
        own = state.momentum
        if jax.tree.leaves(own):
            decay = OWN_DECAY if isinstance(momentum, str) else momentum
            own = tree(momenta.average(pick(own), pick(updates), decay))
        return jax.tree.unflatten(update_structure, emitted), RegrowState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            inner_state=inner_state,
            regrow_masks=tree(after.masks),
            key=operands.key,
            momentum=own,
            rules=map_weights(tree, after.rules),
            skipped=after.skipped,
            removed=tree(after.removed),
            grown=tree(after.grown),
            hidden=tree(behind) if hidden else (),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _as_stored(mask: Any) -> Any:
    """A stored mask in its own dtype, whatever arithmetic a wrapper did on states."""
    if isinstance(mask, mask_trees.PackedMask):
        return mask_trees.PackedMask(*(x.astype(jnp.uint8) for x in mask))
    return mask_trees.unpack(mask)


def _copy(leaf: Any) -> jax.Array:
    """A copy, since the state may be donated with the parameters beside it."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros_like(leaf)
    return jnp.array(leaf, leaf.dtype, copy=True)


def _layer_zeros(leaf: Any, axis: int | None) -> jax.Array:
    return jnp.zeros(() if axis is None else (leaf.shape[axis],), jnp.int32)


def _find(inner_state, plan, sparse, caller):
    shapes = tuple(tuple(x.shape) for x in sparse)
    return momenta.find(inner_state, plan.names, shapes, caller=caller)
