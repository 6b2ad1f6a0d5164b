"""One cycle as a pure function: prune, redistribute, grow."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.regrowth import allocate
from sparse_optax.regrowth.rules import (
    Evidence,
    Rule,
    axes_of,
    layer_sizes,
    split_layers,
    tally_layers,
)
from sparse_optax.selection.tally import all_true


class Cycle(NamedTuple):
    """What a cycle decided.

    Attributes:
      masks: The new masks, one a leaf.
      kept: The masks after the prune, before the growth. A weight of ``masks``
        that is not in ``kept`` was grown, and starts from zero.
      removed: int32 vector, weights removed from each layer.
      grown: int32 vector, weights grown in each layer; the sum is the same, but for
        a target.
      ok: Whether all evidence was finite. Where it is False the masks are those
        from before the cycle, and the counts zero.
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
    """Initial states of the prune, the redistribution and the growth rule.

    Args:
      rules: The three rules.
      params: One array a sparse leaf.
      masks: Their masks.

    Returns:
      The three states.

    Examples:
      >>> from sparse_optax import regrowth
      >>> rules = regrowth.prune.magnitude, regrowth.redistribute.none, None
      >>> rules = (*rules[:2], regrowth.grow.random)
      >>> regrowth.init_rules(rules, (), ())
      ((), (), ())
    """
    prune, redistribute, grow = (rule.init(params, masks) for rule in rules)
    return prune, redistribute, grow


def _active_and_broken(mask: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Active weights, and those of which any number is not finite."""
    finite = [jnp.isfinite(x) for x in arrays]
    return mask, jnp.logical_not(functools.reduce(jnp.logical_and, finite))


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
    """One cycle: prune, redistribute, grow, with exactly as many grown as removed.

    With p the prune rate, a_i the active weights of layer i and c_i its share::

        removed_i = floor(p_i * a_i)           (p_i: ``allocate.prune_counts``)
        grown_i   ~ sum(removed) * c_i / sum(c)       (``allocate.apportion``)

    With a ``target`` t_i of active weights, a_i - t_i more are removed where that is
    positive, and sum(t) - sum(a) more are grown: in the end sum(t) are active.

    Args:
      evidence: What the rules may look at; ``counts`` is filled in here.
      prune: The prune rule.
      redistribute: The redistribution rule.
      grow: The growth rule.
      prune_rate: p, a scalar in [0, 1].
      states: The rules' states, from ``init_rules``; None makes fresh ones.
      target: int32 vector, how many weights of each layer should be active after the
        cycle; None keeps their number.
      enabled: Where False, masks and states stay as where evidence is broken.

    Returns:
      A ``Cycle``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> evidence = regrowth.Evidence(
      ...     params=(jnp.array([3.0, 1.0, 0.0, 0.0]),),
      ...     masks=(jnp.array([True, True, False, False]),),
      ...     momentum=(jnp.array([1.0, 1.0, 2.0, 5.0]),))
      >>> new = regrowth.cycle(
      ...     evidence, prune=regrowth.prune.magnitude,
      ...     redistribute=regrowth.redistribute.momentum,
      ...     grow=regrowth.grow.momentum, prune_rate=0.5)
      >>> new.masks[0].tolist()
      [True, False, False, True]
    """
    if states is None:
        states = init_rules(
            (prune, redistribute, grow), evidence.params, evidence.masks
        )
    axes, before = axes_of(evidence), evidence.masks
    whole = layer_sizes(before, axes)
    sizes = jnp.asarray(whole.astype(np.int32))
    rate = jnp.asarray(prune_rate, jnp.float32)
    # One pass over all evidence: how many weights each layer has, and whether every
    # number is sound.
    groups = (before, evidence.params, evidence.gradient, evidence.momentum)
    leaves = list(zip(*(group for group in groups if group is not None), strict=True))
    active, ok = sizes, jnp.isfinite(rate)
    if leaves:
        active, broken = tally_layers(leaves, axes, _active_and_broken)
        active = active.astype(jnp.int32)
        ok = jnp.logical_and(ok, jnp.all(broken == 0))
    goal = active if target is None else target

    def split(vector: jax.Array) -> tuple[jax.Array, ...]:
        return split_layers(vector, before, axes)

    evidence = evidence._replace(
        counts=None,
        active=split(active),
        target=split(goal),
        before=before,
        rate=rate,
    )

    def keyed(evidence: Evidence, rule: int) -> Evidence:
        # A key for each rule: a random prune and a random growth must not agree.
        if evidence.key is None:
            return evidence
        return evidence._replace(key=jax.random.fold_in(evidence.key, rule))

    shares, share_state = None, states[1]
    if not redistribute.after_prune:
        shares, share_state = redistribute.apply(keyed(evidence, 1), states[1])
    even = jnp.zeros_like(sizes, dtype=jnp.uint32)
    staying = active if target is None else jnp.minimum(active, target)
    to_remove = allocate.prune_counts(
        rate, staying, sizes, even if shares is None else allocate.as_shares(shares)
    )
    if target is not None:
        to_remove += active - staying
    kept, prune_state = prune.apply(
        keyed(evidence._replace(counts=split(to_remove)), 0), states[0]
    )
    # A rule prunes what is active and nothing else.
    removed = to_remove
    if before and not prune.exact:
        pairs = list(zip(kept, before, strict=True))
        removed = active - tally_layers(pairs, axes, all_true)[0].astype(jnp.int32)
        kept = tuple(jnp.logical_and(k, m) for k, m in pairs)
    evidence = evidence._replace(masks=kept)
    if redistribute.after_prune:
        shares, share_state = redistribute.apply(keyed(evidence, 1), states[1])
    own = removed if target is None else removed + target - active
    if shares is None and (prune.exact or prune.covers or target is None):
        to_grow = own  # each layer gets back its own: never negative, always room
    else:
        to_grow = allocate.apportion(
            allocate.signed_sum(own),
            even if shares is None else allocate.as_shares(shares),
            sizes - active + removed,
            jnp.maximum(own, 0),
            most=int(whole.sum()),
        )
    added, grow_state = grow.apply(
        keyed(evidence._replace(counts=split(to_grow)), 2), states[2]
    )
    grown = to_grow
    if before and not grow.exact:
        missing = [jnp.logical_not(k) for k in kept]
        pairs = list(zip(added, missing, strict=True))
        grown = tally_layers(pairs, axes, all_true)[0].astype(jnp.int32)
    new = tuple(jnp.logical_or(k, g) for k, g in zip(kept, added, strict=True))

    if shares is not None and jnp.issubdtype(shares.dtype, jnp.floating):
        ok = jnp.logical_and(ok, jnp.all(jnp.isfinite(shares)))

    go = jnp.logical_and(ok, enabled)

    def if_ok(after: Any, otherwise: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(go, a, b), after, otherwise)

    return Cycle(
        masks=if_ok(new, before),
        kept=if_ok(kept, before),
        removed=if_ok(removed, jnp.zeros_like(removed)),
        grown=if_ok(grown, jnp.zeros_like(removed)),
        ok=ok,
        states=if_ok((prune_state, share_state, grow_state), states),
    )
