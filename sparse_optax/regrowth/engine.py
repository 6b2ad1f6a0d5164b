"""The engine: wraps any optimizer with a prune, a redistribution and a growth rule."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparse_optax import checks, schedules
from sparse_optax.budgets.resolve import unit_counts_of
from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.layers import (
    Layers,
    PackedMask,
    PyTree,
    Where,
    as_packed,
    flat_counts,
    is_hole,
    is_mask,
)
from sparse_optax.masks.make import Key, as_key
from sparse_optax.masks.tree import check_gradient, layers_of_masks, pack, unpack
from sparse_optax.patterns import SINGLE, Pattern, pattern_of
from sparse_optax.regrowth import allocate, guard
from sparse_optax.regrowth import inner as inner_update
from sparse_optax.regrowth import momentum as momenta
from sparse_optax.regrowth.cycle import cycle, init_rules
from sparse_optax.regrowth.dense_first import cut, cut_rules, is_dense
from sparse_optax.regrowth.frozen import (
    first_frozen,
    hold,
    leaves_of,
    silence,
    unchanged,
)
from sparse_optax.regrowth.restart import Restart, check_alone, restart_of
from sparse_optax.regrowth.rules import (
    Evidence,
    Rule,
    map_weights,
    nothing,
    tally_layers,
)
from sparse_optax.regrowth.start import (
    Method,
    check,
    check_acts,
    check_inner,
    first_masks,
)
from sparse_optax.regrowth.targets import BROKEN, Goal, check_end, goal_at
from sparse_optax.regrowth.under_pattern import rules_under
from sparse_optax.schedules.timing import NoCycle, never_due
from sparse_optax.selection.compilation import once
from sparse_optax.selection.tally import tally

OWN_DECAY = 0.9


class RegrowState(NamedTuple):
    """State of ``regrow``. Trees are like the parameters, with holes.

    Attributes:
      count: Finished updates. # shape=(), int32
      inner_state: State of the wrapped optimizer.
      regrow_masks: Boolean arrays, or ``PackedMask``.
      key: Random key data. # uint32
      momentum: The engine's own average of the gradient, float32, or complex64 for a
        complex leaf; ``()`` if the inner optimizer's momentum is used.
      rules: States of the prune, the redistribution and the growth rule.
      skipped: Cycles left out because of numbers that are not finite. # int32
      suspected: 1 if a missing weight was not zero when last looked at, else 0. # int32
      misplaced: How many times missing weights were not zero at two updates in a row,
        as seen after cycles. Above 0, what stands behind this transformation changes
        its updates, or they are not applied. # int32
      removed: Per leaf, weights removed in the last cycle. # int32
      grown: Per leaf, weights grown in the last cycle. # int32
      hidden: With ``hidden=True`` the values of missing weights, else ``()``.
      ramp: With a ``ramp`` its density at the last cycle, float32, else ``()``.
      frozen: With ``freeze`` or ``within``, which weights stay as they are: True for
        all that a leaf's mask leaves out, or a boolean array. Else ``()``.
    """

    count: jax.Array
    inner_state: Any
    regrow_masks: PyTree
    key: jax.Array
    momentum: PyTree
    rules: Any
    skipped: jax.Array
    suspected: jax.Array
    misplaced: jax.Array
    removed: PyTree
    grown: PyTree
    hidden: PyTree
    ramp: Any
    frozen: PyTree = ()


@boundary("regrow")
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
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    momentum: str | float = "auto",
    reset_moments: str = "none",
    packed: bool = False,
    ramp: optax.Schedule | schedules.Towards | None = None,
    hidden: bool = False,
    pattern: Pattern | None = None,
    regrown: str = "zero",
    dense_until: int | None = None,
    within: PyTree | None = None,
    freeze: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse training by three rules, around any optimizer.

    With masks m, weights w and the inner optimizer's update u, each step emits

    .. math:: \Delta w = u \text{ where } m, \quad -w \text{ elsewhere},

    so that missing weights are exactly zero after ``optax.apply_updates``. A cycle runs
    at the start of update ``k * update_period + 1``, k >= 1, on the weights handed in
    and the stored momentum. So the network at the end of a period is a trained one, and
    no cycle follows the last update. At this update, kept weights and those grown from
    missing get u. A pruned weight gets -w, even if it grows again in the same cycle,
    and moves from the next update on. The inner optimizer sees the dense gradient and
    the newly masked weights.

    .. note:: Last in the chain: scaling its updates would break the exact zeros.
      Without ``inner`` it stands behind an optimizer in a chain; the rules then see the
      incoming update, one step newer than a stored momentum, and no cycle runs if that
      is all zero. Accumulate gradients outside, ``optax.MultiSteps(regrow(...), k)``.

      A loss ``value_fn`` that is handed to ``update`` reaches the inner optimizer as
      the loss of the masked weights. A line search, as in ``optax.lbfgs``, also gets
      the masked gradient; the rules see the dense one. The derivative of an update
      takes the masks as constants.

      Between cycles a step costs one pass over weights, updates and masks. A cycle
      reads weights and momentum a few dozen times; on a mesh it needs small
      all-reduces. Memory: one byte per weight, one bit with ``packed``. Under
      ``optax.inject_hyperparams`` only ``prune_rate`` varies; name the others in
      ``static_args``.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer.
      density: Fraction of weights kept per layer, in (0, 1], or a budget.
      prune: Which active weights are pruned.
      redistribute: How many weights grow in each layer.
      grow: Which missing weights grow.
      update_period: Updates between two cycles, at least 1.
      update_start: No cycle before this many updates.
      update_stop: No cycle from this many updates on; None never stops.
      prune_rate: Fraction of a layer's active weights that a cycle prunes, in [0, 1],
        or a schedule of the finished updates. None: cosine from 0.5 to 0 at
        ``update_stop``.
      key: Integer seed or random key, for the first masks and random growth. Under
        ``jax.vmap`` give each member its own by ``in_axes``, see the example.
      masks: First masks instead of random ones; their count replaces ``density``.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers: each slice is a layer.
      momentum: ``"auto"`` reads the momentum that ``inner`` keeps (trace, mu, or mu /
        (sqrt(nu) + 1e-8)), or keeps an average with decay 0.9 if there is none or
        several kinds, or if mu and nu are something else than Adam's (``adopt``,
        ``adamax``). A number in [0, 1) keeps an average with that decay.
      reset_moments: ``"grown"`` gives the inner optimizer's moments of weights that
        have just grown the values of its ``init``; ``"none"`` leaves them. Entries
        without one number per weight stay.
      packed: Stores one bit per weight.
      ramp: A schedule of the density by the number of finished updates, for methods
        that become sparse while they train. With d its value at a cycle and D the
        density of ``density``, layer i gets ``c_i + floor(x (n_i - c_i))`` of its n_i
        weights, with x = (d - D) / (1 - D) clipped to [0, 1] and c_i its final count:
        all weights at d = 1, exactly the counts of ``density`` at d <= D. The first
        masks follow it at step 0. None keeps the number of weights.
        ``schedules.Towards`` makes a schedule that ends at D, for any ``density``.
      hidden: Keeps a hidden value for each missing weight, which the inner optimizer
        trains with the dense gradient and the rules see; a weight that grows starts
        from it. First masks are of the largest weights. Memory: a copy of the weights.
      pattern: Which weights are kept or removed together, see ``patterns``. Rules then
        see the sum of magnitudes of each unit. If units differ in size between layers,
        or the pattern fixes the density, nothing is redistributed, since the number of
        weights would change. N:M and ``constant_fan_in`` fix it: leave out ``density``.
        A cycle then prunes its share of a whole layer, and each group grows what it
        lost. Under a ``ramp`` a group has n + floor(x (m - n)) of its m weights.
      regrown: The value of a weight that is pruned and grows again in one cycle:
        ``"zero"``, or its own ``"value"``.
      dense_until: T, at least 1: all weights train for T updates. Then, at the start of
        update T + 1, one cut leaves the counts of ``density``, and cycles follow at
        later multiples of the period. ``prune`` makes the cut if it is ``exact`` or
        ``global_magnitude``, else ``prune.magnitude`` does. Rules that remember start
        anew with it. If numbers are not finite, it comes with the next cycle. None
        starts sparse.
      within: A mask tree, paired by name, of the weights that the method may use. All
        others stay as they are, bit for bit, also in leaves that stay dense, and are
        not among the weights that ``density`` keeps. Not with ``hidden`` or a pattern.
      freeze: Whether all weights outside of the masks keep their value, bit for bit,
        instead of zero, also those of leaves without a mask. Not with ``hidden``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

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

      An ensemble. ``in_axes`` gives each member its own key, and so its own masks. With
      an integer as key, all members have the same masks: other learning rates under one
      mask, for instance. ``report.same_masks`` tells.

      >>> import jax, sparse_optax
      >>> def start(key, params):
      ...     tx = sparse_optax.rigl(
      ...         optax.sgd(0.1), density=0.5, update_period=2, update_stop=10, key=key)
      ...     return tx.init(params)
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> states = jax.vmap(start, in_axes=(0, None))(keys, params)
      >>> states.regrow_masks["w"].shape, sparse_optax.report.same_masks(states)
      ((3, 2, 4), False)

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019.
    """
    method = Method(
        inner,
        density,
        prune,
        redistribute,
        grow,
        update_period,
        update_start,
        update_stop,
        prune_rate,
        key,
        masks,
        where,
        stacked,
        momentum,
        reset_moments,
        packed,
        ramp,
        hidden,
        pattern_of(pattern),
        regrown,
        dense_until,
        within,
        freeze,
    )
    check(method)
    check_acts(method)
    return transformation(method)


def transformation(method: Method) -> optax.GradientTransformationExtraArgs:
    """The transformation of checked arguments."""

    def init_fn(params):
        return _init(method, params)

    def update_fn(updates, state, params=None, **extra_args):
        return _update(method, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- init -----------------------------------------------------------------------------
def _average_of(x: Any) -> Any:
    """Dtype of the engine's own average of a leaf's gradient."""
    return jnp.complex64 if jnp.iscomplexobj(x) else jnp.float32


def _init(method: Method, params: PyTree) -> RegrowState:
    seed = as_key(method.key)
    jax.eval_shape(method.rate_at, jax.ShapeDtypeStruct((), jnp.int32))
    cure = "Use 0.5 as in the paper."
    checks.first_value("prune_rate", method.prune_rate, 0, 1, cure=cure)
    layers, kept = first_masks(method, params, seed)
    leaves = layers.pick(params)
    rules = _rules(method, layers)
    inner_state = method.inner_tx.init(params)
    check_inner(method, inner_state, layers)
    if _restart(method, layers, inner_state, params) and method.inner is not None:
        check_alone(method.inner)
    own: Any = ()
    if method.inner is not None and "momentum" in method.needs:
        if _found_momentum(method, inner_state, layers) is None:
            own = layers.rebuild([jnp.zeros_like(x, _average_of(x)) for x in leaves])
    states = init_rules(rules, layers.view(leaves), layers.view(kept))
    return RegrowState(
        count=jnp.zeros([], jnp.int32),
        inner_state=inner_state,
        regrow_masks=layers.rebuild(
            map(unnamed(pack), kept) if method.packed else kept
        ),
        # Copied, since the state may be donated and the caller keeps the key.
        key=jnp.array(jax.random.key_data(seed), copy=True),
        momentum=own,
        rules=map_weights(layers.rebuild, states),
        skipped=jnp.zeros([], jnp.int32),
        suspected=jnp.zeros([], jnp.int32),
        misplaced=jnp.zeros([], jnp.int32),
        removed=_no_counts(layers),
        grown=_no_counts(layers),
        hidden=layers.rebuild(map(_copied, leaves)) if method.hidden else (),
        ramp=() if method.ramp is None else _ramp_at_start(method, layers, params),
        frozen=first_frozen(
            method.freeze, method.within, layers, params, method.packed
        ),
    )


def _rules(method: Method, layers: Layers) -> tuple[Rule, Rule, Rule]:
    """The rules of a cycle, as they fit the layers."""
    return rules_under(layers, method.rules, method.ramp is not None, method.hidden)


def _ramp_at_start(method: Method, layers: Layers, params: PyTree) -> jax.Array:
    if method.ramp is None or not layers.index:
        return jnp.zeros([], jnp.float32)
    check_end(method.ramp, method.density, layers, params)
    return goal_at(method.ramp, method.density, 0, layers, params).density


def _no_counts(layers: Layers) -> PyTree:
    shapes = [() if x.axis is None else (x.copies,) for x in layers.leaves]
    return layers.rebuild(jnp.zeros(shape, jnp.int32) for shape in shapes)


def _copied(leaf: Any) -> jax.Array:
    """A copy, since the state may be donated together with the parameters."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros_like(leaf)
    return jnp.array(leaf, leaf.dtype, copy=True)


def _found_momentum(method: Method, inner_state: Any, layers: Layers):
    """The momentum that the inner optimizer keeps, one entry per leaf, or None."""
    # A line search sees the masked gradient, which has no momentum to grow by.
    if method.momentum != "auto" or inner_update.has_line_search(inner_state):
        return None
    if not momenta.means_what_adam_means(method.inner):
        return None
    shapes = tuple(leaf.shape for leaf in layers.leaves)
    return momenta.find(inner_state, layers.names, shapes)


# --- update ---------------------------------------------------------------------------
class _Seen(NamedTuple):
    """What a cycle reads besides the state, as it is stored."""

    params: tuple[jax.Array, ...]  # with the hidden values of missing weights
    gradient: tuple[jax.Array, ...] | None  # dense; None if no rule needs it
    # First and second moments of each leaf.
    moments: tuple[tuple[jax.Array, jax.Array | None], ...] | None
    rate: jax.Array  # the prune rate
    goal: Goal | None  # what a ramp asks for
    cut: np.ndarray | None  # the counts after `dense_until`, one per layer
    within: tuple[jax.Array, ...] | None  # the weights that may be active
    frozen: tuple[jax.Array, ...] | None  # those that stay, to be spread over the leaf


def _update(
    method: Method, updates: PyTree, state: RegrowState, params: PyTree, extra: Any
) -> tuple[PyTree, RegrowState]:
    """One step: perhaps a cycle, then the inner update, then exact zeros."""
    checks.needs_params(params, "the update of a missing weight is minus the weight")
    checks.own_state(state, RegrowState)
    extra = dict(extra)
    between = _between(method, extra.pop("regrow_between", None))
    # Without a cycle weights may be cut to a smaller tree, which fits no pattern.
    how = (None, SINGLE) if between else (method.stacked, method.pattern)
    layers = layers_of_masks(state.regrow_masks, params, *how)
    check_gradient(updates, params)
    _check_own(method, layers, state)
    state = _as_stored(state)
    frozen = leaves_of(state.frozen, layers.structure.num_leaves)

    # Whether the last updates left zeros where weights are missing; then perhaps a
    # cycle; then the inner update, on the newly masked weights; then exact zeros.
    if between:
        seen = _only_weights(method, layers, params, frozen)
        suspected, misplaced = state.suspected, state.misplaced
        due = jnp.zeros([], bool)
        opened = _no_cycle_here(layers, state, seen, params)
    else:
        seen = _look(method, layers, updates, state, params, frozen)
        suspected, misplaced = _look_back(method, layers, state, params, seen.frozen)
        due = _is_due(method, state.count)
        looked = suspected < 2
        opened = _perhaps_cycle(method, layers, state, seen, params, due, looked)
    moves = opened.moves
    inner_updates = updates
    if seen.moments is not None:
        inner_updates = _after_cycle(updates, opened.state, layers)
    new_updates, inner_state = inner_update.update(
        method.inner_tx,
        silence(inner_updates, frozen, layers),
        opened.inner_state,
        opened.masked,
        layers,
        moves,
        _there(seen, moves),
        # The first weights may be dense.
        lambda: jnp.logical_or(due, state.count == 0),
        extra,
    )
    emitted, hidden = _emit(
        method, layers, new_updates, params, seen.params, moves, frozen
    )
    return emitted, opened.state._replace(
        count=jnp.asarray(optax.safe_increment(state.count)),
        suspected=suspected,
        misplaced=misplaced,
        inner_state=inner_state,
        momentum=_own_momentum(method, layers, state, updates),
        hidden=hidden,
        frozen=state.frozen,
    )


def _check_own(method: Method, layers: Layers, state: RegrowState) -> None:
    """Raises if the state is that of a method with other parts."""
    if not layers.index:
        return
    parts = {
        "hidden": method.hidden,
        "ramp": method.ramp is not None,
        "frozen": method.freeze or method.within is not None,
    }
    averages = method.inner is not None and "momentum" in method.needs
    if not averages or method.momentum != "auto":
        parts["momentum"] = averages
    checks.own_state(state, RegrowState, **parts)
    for rule, memory in zip(_rules(method, layers), state.rules, strict=True):
        if rule.init is nothing and jax.tree.leaves(memory):
            raise checks.another_state(state, " with what another rule remembers")


def _between(method: Method, given: NoCycle | None) -> bool:
    """Whether the caller says that this update opens no cycle; tells it when one is."""
    if given is None:
        return False
    if method.hidden:
        raise ArgumentError(
            "the method trains missing weights too, by the dense gradient at every "
            "update, and cannot be trained compacted; it must be one that leaves "
            "missing weights at zero. Use rigl or sparse_momentum_regrow, for instance."
        )
    reads = "momentum" in method.needs or method.reset_moments == "none"
    given.tell(functools.partial(_is_due, method), reads)
    return True


class _Opened(NamedTuple):
    """The state of an update after its cycle, if one was due."""

    state: RegrowState  # without what no cycle changes
    moves: tuple[jax.Array, ...]  # which weights move at this update
    masked: PyTree  # the parameters as the inner optimizer sees them
    inner_state: Any


def _perhaps_cycle(
    method: Method,
    layers: Layers,
    state: RegrowState,
    seen: _Seen,
    params: PyTree,
    due: jax.Array,
    looked: jax.Array,
) -> _Opened:
    """A cycle if it is due. Only what it changes or reads goes through the guard.

    ``looked`` is always true, which XLA cannot know. What follows depends on it, and so
    on the look at weights and masks, which then needs no copies of them.
    """
    inner_state = state.inner_state
    lean = state._replace(inner_state=(), momentum=(), hidden=(), frozen=())
    after, moves = lean, layers.pick(lean.regrow_masks)
    moments: tuple[jax.Array, ...] = ()
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    restart = None
    if never_due(*method.timing):
        moves = tuple(jnp.logical_and(unpack(m), looked) for m in moves)
    else:
        due = jnp.logical_and(due, looked)
        restart = _restart(method, layers, inner_state, params)
        how = _How(
            layers,
            _rules(method, layers),
            cut=None if seen.cut is None else cut_rules(method.prune, layers),
            idle=method.inner is None,
            stays=method.hidden or method.regrown == "value",
            hidden=method.hidden,
            restart=restart,
        )
        others = ()
        if restart is not None:
            moments, others = restart.pick(inner_state), tuple(flat)
        after, moves, moments = _cycle_if(
            due, _Operands(lean, seen, moments, others), how=how
        )
    moves = tuple(map(unpack, moves))
    masked = _masked(layers, flat, seen, moves, method.hidden)
    if restart is not None:
        masks = layers.pick(lean.regrow_masks), layers.pick(after.regrow_masks), moves
        entries = restart.pick(inner_state)
        moments = _differentiable(restart, moments, entries, masked, masks)
        inner_state = restart.put(inner_state, moments)
    return _Opened(after, moves, jax.tree.unflatten(structure, masked), inner_state)


def _no_cycle_here(
    layers: Layers, state: RegrowState, seen: _Seen, params: PyTree
) -> _Opened:
    """An update of which the caller says that it opens no cycle."""
    lean = state._replace(inner_state=(), momentum=(), hidden=(), frozen=())
    moves = tuple(map(unpack, layers.pick(lean.regrow_masks)))
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    masked = _masked(layers, flat, seen, moves, False)
    return _Opened(
        lean, moves, jax.tree.unflatten(structure, masked), state.inner_state
    )


def _after_cycle(updates: PyTree, state: RegrowState, layers: Layers) -> PyTree:
    """The same updates, computed from what went through the guard: a cycle that reads
    moments then needs no copies of those that this update overwrites.
    """
    flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
    passed = state.skipped >= 0  # always true, which XLA cannot know
    for i in layers.index:
        flat[i] = jnp.where(passed, flat[i], jnp.zeros((), flat[i].dtype))
    return jax.tree.unflatten(structure, flat)


def _own_momentum(
    method: Method, layers: Layers, state: RegrowState, updates: PyTree
) -> PyTree:
    """The engine's own average of the gradient, where it keeps one."""
    own = state.momentum
    if not jax.tree.leaves(own):
        return own
    decay = OWN_DECAY if isinstance(method.momentum, str) else method.momentum
    averaged = momenta.average(layers.pick(own), layers.pick(updates), decay)
    return layers.rebuild(averaged)


def _is_due(method: Method, count: jax.Array) -> jax.Array:
    """Whether a cycle, or the cut of `dense_until`, opens the next update."""
    due = schedules.is_due(count, *method.timing)
    if method.dense_until is None:
        return due
    return jnp.logical_or(due, count == method.dense_until)


def _look_back(
    method: Method,
    layers: Layers,
    state: RegrowState,
    params: PyTree,
    frozen: tuple[jax.Array, ...] | None,
) -> tuple[jax.Array, jax.Array]:
    """Looks whether missing weights are zero, at the two updates after a cycle, or
    after the first update if there are no cycles. A wrapper may average weights once
    (``optax.lookahead``), but the update after that makes them zero again.
    """
    if never_due(*method.timing):
        first, second = state.count == 1, state.count == 2
    else:
        first, second = (_is_due(method, state.count - n) for n in (1, 2))
    look = jnp.logical_or(first, second)
    # What is frozen has any value.
    still = frozen or (False,) * len(layers.index)
    arrays = layers.pick(state.regrow_masks), layers.pick(params), still
    # No derivative: it decides nothing.
    found = _any_over_if(look, lax.stop_gradient(arrays))
    again = jnp.logical_and(jnp.logical_and(found, second), state.suspected > 0)
    suspected = jnp.where(look, found.astype(jnp.int32), state.suspected)
    return suspected, state.misplaced + again.astype(jnp.int32)


@jax.jit
def _any_over_if(look: jax.Array, arrays: tuple[Any, Any, Any]) -> jax.Array:
    """Whether a missing weight is not zero; False if it is not looked at."""

    def any_over(arrays):
        masks, weights, frozen = arrays
        rows = [
            (unpack(mask), weight, jnp.broadcast_to(still, weight.shape))
            for mask, weight, still in zip(masks, weights, frozen, strict=True)
        ]
        if not rows:
            return jnp.zeros([], bool)
        # Counted, not asked leaf by leaf: one sum over the devices of a mesh.
        (counts,) = tally(rows, _left_over, split=[False] * len(rows))
        return jnp.any(counts > 0)

    return guard.run_if(look, any_over, lambda _: jnp.zeros([], bool), arrays)


def _left_over(
    mask: jax.Array, weight: jax.Array, frozen: jax.Array
) -> tuple[jax.Array]:
    """Missing weights that are not zero. NaN and inf stay, whatever is subtracted."""
    there = jnp.logical_and(weight != 0, jnp.isfinite(weight))
    missing = jnp.logical_not(jnp.logical_or(mask, frozen))
    return (jnp.logical_and(missing, there),)


def _restart(
    method: Method, layers: Layers, inner_state: Any, params: PyTree
) -> Restart | None:
    """How moments of grown weights restart, or None if they stay."""
    if method.reset_moments == "none" or method.inner is None or not layers.index:
        return None
    return restart_of(method.inner, inner_state, layers, params)


def _restarting(
    before: Sequence[jax.Array],
    after: Sequence[jax.Array],
    moves: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
    """Which weights restart. What stayed goes on: it was active before and moves."""
    return tuple(
        jnp.logical_and(new, jnp.logical_not(jnp.logical_and(move, was)))
        for was, new, move in zip(before, after, moves, strict=True)
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(
    restart: Restart, moments: Any, entries: Any, params: Any, masks: Any
) -> Any:
    """The moments behind the guard, with the derivative of ``restart.apply``: the guard
    has none. Nothing is computed where no derivative is asked for.
    """
    return moments


@_differentiable.defjvp
def _derivative_of_moments(restart: Restart, primals: Any, tangents: Any) -> Any:
    moments, entries, params, (before, after, moves) = primals
    grown = _restarting(tuple(map(unpack, before)), tuple(map(unpack, after)), moves)

    def apply(entries: Any, params: Any) -> Any:
        return restart.apply(entries, params, grown)

    _, moved = jax.jvp(apply, (entries, params), tangents[1:3])
    return moments, moved


def _there(seen: "_Seen", moves: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Which weights the loss sees: those that move, and those that are frozen."""
    if seen.frozen is None:
        return moves
    return tuple(map(jnp.logical_or, moves, seen.frozen))


def _masked(
    layers: Layers,
    flat: Sequence[Any],
    seen: "_Seen",
    moves: tuple[jax.Array, ...],
    hidden: bool,
) -> list[Any]:
    """All leaves as the inner optimizer sees them: zero where a weight is missing."""
    masked, there = list(flat), _there(seen, moves)
    for i, w, m in zip(layers.index, seen.params, there, strict=True):
        masked[i] = w if hidden else jnp.where(m, w, jnp.zeros((), w.dtype))
    return masked


def _as_stored(state: RegrowState) -> RegrowState:
    """The state in its own dtypes, after any arithmetic of a wrapper on states."""

    def mask(x):
        x = as_packed(x)
        if isinstance(x, PackedMask):
            return PackedMask(*(part.astype(jnp.uint8) for part in x))
        return x if is_hole(x) else unpack(x)

    return state._replace(
        regrow_masks=jax.tree.map(mask, state.regrow_masks, is_leaf=is_mask),
        frozen=jax.tree.map(mask, state.frozen, is_leaf=is_mask),
        key=state.key.astype(jnp.uint32),
    )


def _only_weights(
    method: Method, layers: Layers, params: PyTree, frozen: list[Any]
) -> _Seen:
    """What an update without a cycle sees."""
    still = None
    if method.freeze or method.within is not None:
        still = tuple(frozen[i] for i in layers.index)
    return _Seen(
        params=layers.pick(params),
        gradient=None,
        moments=None,
        rate=jnp.zeros([], jnp.float32),
        goal=None,
        cut=None,
        within=None,
        frozen=still,
    )


def _look(
    method: Method,
    layers: Layers,
    updates: PyTree,
    state: RegrowState,
    params: PyTree,
    frozen: list[Any],
) -> _Seen:
    """Collects what the rules need, and nothing else."""
    moments = None
    if "momentum" not in method.needs:
        pass
    elif method.inner is None:
        moments = tuple((g, None) for g in layers.pick(updates))
    elif jax.tree.leaves(state.momentum):
        moments = tuple((m, None) for m in layers.pick(state.momentum))
    else:
        found = _found_momentum(method, state.inner_state, layers) or ()
        moments = tuple((f.first, f.second) for f in found)
    weights = layers.pick(params)
    if method.hidden:
        # Active weights as handed in, the others with their hidden values.
        masks, behind = layers.pick(state.regrow_masks), layers.pick(state.hidden)
        columns = zip(masks, weights, behind, strict=True)
        weights = tuple(jnp.where(unpack(m), w, h) for m, w, h in columns)
    goal = None
    if method.ramp is not None and layers.index:
        goal = goal_at(method.ramp, method.density, state.count, layers, params)
    cut = within = None
    if method.dense_until is not None and layers.index:
        final = flat_counts(unit_counts_of(method.density, layers, params))
        cut = final.astype(np.int32)
    if method.within is not None and layers.index:
        within = tuple(jnp.logical_not(frozen[i]) for i in layers.index)
    return _only_weights(method, layers, params, frozen)._replace(
        params=weights,
        gradient=layers.pick(updates) if "gradient" in method.needs else None,
        moments=moments,
        rate=method.rate_at(state.count),
        goal=goal,
        cut=cut,
        within=within,
    )


def _emit(
    method: Method,
    layers: Layers,
    new_updates: PyTree,
    params: PyTree,
    weights: tuple[jax.Array, ...],
    moves: tuple[jax.Array, ...],
    frozen: list[Any],
) -> tuple[PyTree, PyTree]:
    """The updates, minus the weight where it is missing, and the hidden values."""
    emitted, structure = jax.tree.flatten(new_updates, is_leaf=is_hole)
    hidden = []
    columns = zip(layers.index, layers.pick(params), weights, moves, strict=True)
    for i, p, w, move in columns:
        # In the parameter's dtype: a rounded -p would not cancel p.
        step = emitted[i].astype(p.dtype)
        if method.hidden:
            hidden.append(w + step)
            # A weight that grows starts from its hidden value.
            step += w - p
        rest = -p
        if not is_hole(frozen[i]):
            rest = jnp.where(frozen[i], unchanged(p.dtype), rest)
        emitted[i] = jnp.where(move, step, rest)
    hold(emitted, frozen, layers)
    tree = jax.tree.unflatten(structure, emitted)
    return tree, layers.rebuild(hidden) if method.hidden else ()


# --- the guarded cycle ----------------------------------------------------------------
class _How(NamedTuple):
    """What is static when a cycle is traced; hashable."""

    layers: Layers
    rules: tuple[Rule, Rule, Rule]
    cut: tuple[Rule, Rule, Rule] | None = None  # rules of the cut of `dense_until`
    idle: bool = False  # whether no cycle runs on evidence that is all zero
    stays: bool = False  # whether regrown weights keep a value and move at once
    hidden: bool = False  # whether the inner optimizer sees missing weights too
    restart: Restart | None = None  # of the moments of weights that grow


class _Operands(NamedTuple):
    """What goes through the guard. Arrays that a cycle only reads cost nothing."""

    state: RegrowState  # without the parts that no cycle changes
    seen: _Seen
    moments: tuple[jax.Array, ...]  # entries of the inner state that may restart
    params: tuple[Any, ...]  # all leaves, where moments may restart, else empty


def _no_cycle(operands: _Operands, layers: Layers):
    """The result of an ordinary update: the same state, and all active weights move."""
    state = operands.state
    return state, layers.pick(state.regrow_masks), operands.moments


@functools.partial(jax.jit, static_argnames="how")
def _cycle_if(due: jax.Array, operands: _Operands, *, how: _How):
    """``_open_cycle`` if due, else ``_no_cycle``. Jitted at module level, so that a
    training step that is not jitted compiles the cycle once and not at each step.
    Masks are piecewise constant: nothing in here has a derivative.
    """
    operands = lax.stop_gradient(operands)
    opened = functools.partial(_open_cycle, how=how)
    ordinary = functools.partial(_no_cycle, layers=how.layers)
    return guard.run_if(due, opened, ordinary, operands)


def _open_cycle(operands: _Operands, how: _How):
    """Runs a cycle on the stored state; gives the new state, which weights move, and
    the moments.
    """
    state, seen, moments, params = operands
    layers = how.layers
    stored = layers.pick(state.regrow_masks)
    old = tuple(map(unpack, stored))
    evidence = _evidence(layers, state, seen, old)
    target, rate = _target(layers, seen, evidence)
    enabled: Any = True
    evident = evidence.momentum or evidence.gradient
    if how.idle and evident:
        # An update that is all zero (a learning rate of 0) is no evidence.
        leaves = [(x,) for x in evident]
        (moving,) = tally_layers(leaves, (None,) * len(leaves), _not_zero)
        enabled = jnp.any(moving > 0)
    states = map_weights(layers.pick, state.rules)

    def exchange():
        prune, redistribute, grow = how.rules
        return cycle(
            evidence,
            prune=prune,
            redistribute=redistribute,
            grow=grow,
            prune_rate=rate,
            states=states,
            target=target,
            enabled=enabled,
        )

    if seen.cut is None or how.cut is None:
        result = exchange()
    else:
        cut_now = functools.partial(
            cut, evidence, how.cut, how.rules, seen.cut, states, enabled
        )
        result = lax.cond(is_dense(evidence), cut_now, exchange)

    # The barrier stores the masks; recomputing them would double the kernels.
    kept_masks = () if how.stays else layers.spread(result.kept, old)
    new_masks, kept_masks = lax.optimization_barrier(
        (layers.spread(result.masks, old), kept_masks)
    )
    moves = new_masks
    if not how.stays:
        moves = tuple(
            # Kept, or grown from missing. Pruned weights do not move at this update,
            # even if they grew again.
            jnp.logical_and(new, jnp.logical_or(kept, jnp.logical_not(was)))
            for new, kept, was in zip(new_masks, kept_masks, old, strict=True)
        )

    if how.restart is not None:
        grown = _restarting(old, new_masks, moves)
        masked = _masked(layers, params, seen, moves, how.hidden)
        moments = how.restart.apply(moments, masked, grown)

    def store(plain):
        pairs = zip(plain, stored, strict=True)
        return tuple(
            unnamed(pack)(x) if isinstance(m, PackedMask) else x for x, m in pairs
        )

    go = jnp.logical_and(result.ok, enabled)

    removed, grown = once((result.removed, result.grown))

    def counts(vector, previous):
        new = layers.rebuild(layers.weights(vector))
        return jax.tree.map(lambda a, b: jnp.where(go, a, b), new, previous)

    ramp = state.ramp
    if seen.goal is not None:
        ramp = jnp.where(go, seen.goal.density, ramp)
    after = state._replace(
        ramp=ramp,
        regrow_masks=layers.rebuild(store(new_masks)),
        rules=map_weights(layers.rebuild, result.states),
        removed=counts(removed, state.removed),
        grown=counts(grown, state.grown),
        skipped=state.skipped + jnp.logical_not(result.ok).astype(jnp.int32),
    )
    return after, store(moves), moments


def _evidence(
    layers: Layers, state: RegrowState, seen: _Seen, masks: tuple[jax.Array, ...]
) -> Evidence:
    """What the rules see: one number per unit."""
    momentum = gradient = None
    if seen.moments is not None:
        momentum = layers.view([momenta.value(*m) for m in seen.moments])
    if seen.gradient is not None:
        gradient = layers.view(seen.gradient)
    key = jax.random.wrap_key_data(state.key)
    return Evidence(
        params=layers.view(seen.params),
        masks=layers.view(masks),
        gradient=gradient,
        momentum=momentum,
        key=jax.random.fold_in(key, state.count),
        step=state.count,
        names=layers.names,
        axes=layers.units.axes,
        within=seen.within,
    )


def _target(
    layers: Layers, seen: _Seen, evidence: Evidence
) -> tuple[jax.Array | None, jax.Array]:
    """The target number of units of each layer, or None, and the prune rate."""
    if seen.goal is None:
        return None, seen.rate
    final, excess, whole = seen.goal[:3]
    sizes = jnp.asarray(layers.units.sizes.astype(np.int32))
    target = allocate.target_counts(excess, whole, jnp.asarray(final), sizes)
    if seen.within is not None:
        target = jnp.minimum(target, evidence.places)
    # NaN prevents a cycle if the schedule is not finite.
    return target, jnp.where(excess == BROKEN, jnp.nan, seen.rate)


def _not_zero(x: jax.Array) -> tuple[jax.Array]:
    return (x != 0,)
