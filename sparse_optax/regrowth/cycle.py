"""One cycle as a pure function: prune, redistribute, grow."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.checks import ArgumentError
from sparse_optax.regrowth import allocate
from sparse_optax.regrowth.rules import Evidence, Rule, active_magnitude, tally_layers
from sparse_optax.selection.tally import all_true


class Cycle(NamedTuple):
    """The result of a cycle.

    Attributes:
      masks: The new masks, one per leaf.
      kept: The masks after the prune. Weights of ``masks`` not in ``kept`` have grown.
      removed: int32 vector, weights removed from each layer.
      grown: int32 vector, weights grown in each layer; the same sum without a target.
      ok: Whether all evidence was finite, and the growth rule met its sum. If False,
        masks stay and counts are zero.
      states: The states of the three rules.
    """

    masks: tuple[jax.Array, ...]
    kept: tuple[jax.Array, ...]
    removed: jax.Array
    grown: jax.Array
    ok: jax.Array
    states: tuple[Any, Any, Any]


def init_rules(
    rules: tuple[Rule, Rule, Rule],
    params: tuple[jax.Array, ...],
    masks: tuple[jax.Array, ...],
) -> tuple[Any, Any, Any]:
    """Initial states of the three rules."""
    prune, redistribute, grow = (rule.init(params, masks) for rule in rules)
    return prune, redistribute, grow


def cycle(
    evidence: Evidence,
    *,
    prune: Rule,
    redistribute: Rule,
    grow: Rule,
    prune_rate: jax.Array | float,
    states: tuple[Any, Any, Any] | None = None,
    target: jax.Array | None = None,
    enabled: jax.Array | bool = True,
) -> Cycle:
    """One cycle as a pure function; it grows exactly as many weights as it removes.

    With p the prune rate, a_i the active weights of layer i and c_i its share::

        removed_i = floor(p_i * a_i)
        grown_i   ~ sum(removed) * c_i / sum(c)

    where p_i is p, but at most the sparsity in a layer that is nearly dense and has a
    large share. With a ``target`` t_i of active weights, max(a_i - t_i, 0) more are
    removed, and sum(t) - sum(a) more grow, so that sum(t) are active at the end.

    Args:
      evidence: What the rules may read; ``counts`` is filled in here.
      prune: The prune rule.
      redistribute: The redistribution rule.
      grow: The growth rule.
      prune_rate: p, a scalar in [0, 1].
      states: The states of the rules; None makes new ones.
      target: int32 vector, active weights per layer at the end; None keeps the number.
      enabled: If False, masks and states stay, as with evidence that is not finite.

    Returns:
      A ``Cycle``.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> evidence = sparse_optax.regrowth.Evidence(
      ...     params=(jnp.array([3.0, 1.0, 0.0, 0.0]),),
      ...     masks=(jnp.array([True, True, False, False]),),
      ...     momentum=(jnp.array([1.0, 1.0, 2.0, 5.0]),))
      >>> new = sparse_optax.regrowth.cycle(
      ...     evidence, prune=sparse_optax.regrowth.prune.magnitude,
      ...     redistribute=sparse_optax.regrowth.redistribute.momentum,
      ...     grow=sparse_optax.regrowth.grow.momentum, prune_rate=0.5)
      >>> new.masks[0].tolist()
      [True, False, False, True]
    """
    before, moving = evidence.masks, target is not None
    if states is None:
        rules = prune, redistribute, grow
        states = init_rules(rules, evidence.params, before)
    prune_state, share_state, grow_state = states
    evidence, ok = _counted(evidence, prune_rate, target)
    if prune.whole:
        return _at_once(evidence, prune, states, jnp.logical_and(ok, enabled), ok)

    # Prune active weights only. Most redistribution rules see the masks before that.
    shares = None
    if not redistribute.after_prune:
        shares, share_state = _shares(evidence, redistribute, share_state)
    kept, removed, prune_state = _pruned(evidence, prune, prune_state, shares, moving)
    evidence = evidence._replace(masks=kept)

    # Redistribute.
    if redistribute.after_prune:
        shares, share_state = _shares(evidence, redistribute, share_state)
    if shares is not None and jnp.issubdtype(shares.dtype, jnp.floating):
        ok = jnp.logical_and(ok, jnp.all(jnp.isfinite(shares)))
    own = removed if not moving else removed + evidence.target - evidence.active
    keeps_own = shares is None and (prune.exact or prune.covers or not moving)
    to_grow = own if keeps_own else _spread_over_layers(evidence, own, removed, shares)

    # Grow.
    added, grown, grow_state = _grown(evidence, grow, grow_state, to_grow)
    new = tuple(jnp.logical_or(k, g) for k, g in zip(kept, added, strict=True))
    if not (grow.exact or grow.open_ended):
        for over in (grown - to_grow, to_grow - grown):
            high, low = allocate.signed_sum(over)
            ok = jnp.logical_and(ok, high | low == 0)

    none = jnp.zeros_like(removed)
    after = Cycle(new, kept, removed, grown, ok, (prune_state, share_state, grow_state))
    otherwise = Cycle(before, before, none, none, ok, states)
    return _if_ok(jnp.logical_and(ok, enabled), after, otherwise)


def _if_ok(go: jax.Array, after: Cycle, otherwise: Cycle) -> Cycle:
    """The result of a cycle, or that of none; ``ok`` says why."""
    chosen = jax.tree.map(
        lambda a, b: jnp.where(go, a, b),
        after._replace(ok=()),
        otherwise._replace(ok=()),
    )
    return chosen._replace(ok=after.ok)


def _at_once(
    evidence: Evidence, prune: Rule, states: Any, go: jax.Array, ok: jax.Array
) -> Cycle:
    """A cycle of a rule that returns the masks after it."""
    before = evidence.masks
    new, state = _masks("prune", prune, _keyed(evidence, 0), states[0])
    kept = tuple(map(jnp.logical_and, before, new))
    none = jnp.zeros_like(evidence.active)
    staying = number = none
    if before:
        pairs = list(zip(new, before, strict=True))
        counts = tally_layers(pairs, evidence.layer_axes, _all_and_stayed)
        number, staying = (x.astype(jnp.int32) for x in counts)
    removed, grown = evidence.active - staying, number - staying
    after = Cycle(new, kept, removed, grown, ok, (state, *states[1:]))
    return _if_ok(go, after, Cycle(before, before, none, none, ok, states))


def _all_and_stayed(mask: jax.Array, before: jax.Array) -> tuple[jax.Array, ...]:
    return mask, jnp.logical_and(mask, before)


def _returned(role: str, rule: Rule, evidence: Evidence, state: Any) -> Any:
    """What a rule returned: its result and its new state."""
    pair = rule.apply(evidence, state)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ArgumentError(
            f"apply of `{role}` returned {type(pair).__name__}; it must return (result,"
            " state). Return the state, too, or use regrowth.stateless(f)."
        )
    return pair


def _masks(role: str, rule: Rule, evidence: Evidence, state: Any) -> Any:
    """The masks that a prune or growth rule returned, and its new state."""
    result, state = _returned(role, rule, evidence, state)
    wanted = [m.shape for m in evidence.masks]
    found: Any = type(result).__name__
    if isinstance(result, tuple | list):
        found = [getattr(m, "shape", type(m).__name__) for m in result]
        if found == wanted and all(m.dtype == bool for m in result):
            return tuple(result), state
        if found == wanted:
            found = f"dtypes {[str(m.dtype) for m in result]}"
    raise ArgumentError(
        f"`{role}` returned {found}; it must return a tuple of boolean arrays, one for "
        f"each of evidence.masks, of the shapes {wanted}. Return "
        "evidence.select(arrays, counts, score), for instance."
    )


def _shares(evidence: Evidence, rule: Rule, state: Any) -> Any:
    """The shares that a redistribution rule returned, and its new state."""
    shares, state = _returned("redistribute", rule, _keyed(evidence, 1), state)
    layers = len(evidence.sizes)
    if shares is not None and getattr(shares, "shape", None) != (layers,):
        found = getattr(shares, "shape", type(shares).__name__)
        raise ArgumentError(
            f"`redistribute` returned {found}; it must return None or an array with "
            f"one share for each of {layers} layers. Use evidence.count(masks), for "
            "instance."
        )
    return shares, state


def _keyed(evidence: Evidence, rule: int) -> Evidence:
    # A key per rule: random prunes and random growth must be independent.
    if evidence.key is None:
        return evidence
    return evidence._replace(key=jax.random.fold_in(evidence.key, rule))


def _active_and_broken(mask: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Active weights, and those with a number that is not finite."""
    finite = [jnp.isfinite(x) for x in arrays]
    return mask, jnp.logical_not(functools.reduce(jnp.logical_and, finite))


def _counted(
    evidence: Evidence, prune_rate: Any, target: jax.Array | None
) -> tuple[Evidence, jax.Array]:
    """The evidence with its counts, and whether every number is finite: one pass."""
    rate = jnp.asarray(prune_rate, jnp.float32)
    groups = (evidence.masks, evidence.params, evidence.gradient, evidence.momentum)
    leaves = list(zip(*(group for group in groups if group is not None), strict=True))
    active = jnp.asarray(evidence.sizes.astype(np.int32))
    ok = jnp.isfinite(rate)
    if leaves:
        axes = evidence.layer_axes
        active, broken = tally_layers(leaves, axes, _active_and_broken)
        active = active.astype(jnp.int32)
        ok = jnp.logical_and(ok, jnp.all(broken == 0))
    return (
        evidence._replace(
            counts=None,
            active=active,
            target=active if target is None else target,
            before=evidence.masks,
            rate=rate,
        ),
        ok,
    )


def _pruned(evidence: Evidence, prune: Rule, state: Any, shares: Any, moving: bool):
    """Masks after the prune, the number removed per layer, and the rule's state."""
    active, before = evidence.active, evidence.before
    sizes = evidence.places
    staying = jnp.minimum(active, evidence.target) if moving else active
    counts = allocate.prune_counts(evidence.rate, staying, sizes, _whole(shares, sizes))
    if moving:
        counts += active - staying
    evidence = evidence._replace(counts=counts)
    kept, state = _masks("prune", prune, _keyed(evidence, 0), state)
    if before and moving and not (prune.exact or prune.covers or prune.pooled):
        kept = _within(evidence._replace(masks=kept))
    if before and not prune.exact:
        pairs = list(zip(kept, before, strict=True))
        left = tally_layers(pairs, evidence.layer_axes, all_true)[0]
        counts = active - left.astype(jnp.int32)
        kept = tuple(jnp.logical_and(k, m) for k, m in pairs)
    return kept, counts, state


def _within(evidence: Evidence) -> tuple[jax.Array, ...]:
    """The weights that stay, where they are more than all targets together the largest
    of each layer, up to its own.
    """
    pairs = zip(evidence.params, evidence.masks, evidence.before or (), strict=True)
    staying = [(w, jnp.logical_and(k, m)) for w, k, m in pairs]
    left = evidence.count([k for _, k in staying])
    high, low = allocate.signed_sum(left - evidence.target)
    most = jnp.where(high | low > 0, jnp.minimum(left, evidence.target), left)
    return evidence.select(staying, most, active_magnitude)


def _spread_over_layers(
    evidence: Evidence, own: jax.Array, removed: jax.Array, shares: Any
) -> jax.Array:
    """How many weights grow in each layer, by shares and within its room."""
    whole, sizes = evidence.sizes, evidence.places
    return allocate.apportion(
        allocate.signed_sum(own),
        _whole(shares, sizes),
        sizes - evidence.active + removed,
        jnp.maximum(own, 0),
        most=int(whole.sum()),
    )


def _whole(shares: Any, sizes: jax.Array) -> jax.Array:
    """Shares as uint32; all zero if there are none."""
    if shares is None:
        return jnp.zeros_like(sizes, dtype=jnp.uint32)
    return allocate.as_shares(shares)


def _grown(evidence: Evidence, grow: Rule, state: Any, counts: jax.Array):
    """Masks of the new weights, their number per layer, and the rule's state."""
    evidence = evidence._replace(masks=evidence.taken(evidence.masks))
    evidence = evidence._replace(counts=counts)
    added, state = _masks("grow", grow, _keyed(evidence, 2), state)
    if evidence.masks and not grow.exact:
        missing = [jnp.logical_not(k) for k in evidence.masks]
        pairs = list(zip(added, missing, strict=True))
        counted = tally_layers(pairs, evidence.layer_axes, all_true)[0]
        counts = counted.astype(jnp.int32)
    return added, counts, state
