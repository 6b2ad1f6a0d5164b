"""AC/DC: alternating compressed and decompressed training (Peste et al, 2021)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import schedules
from sparse_optax.leaves import Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, redistribute
from sparse_optax.regrowth import prune as prune_rules
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule


def ac_dc(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    update_period: int,
    update_start: int = 0,
    update_stop: int,
    prune: Rule = prune_rules.magnitude,
    reset_moments: str = "grown",
    key: Key = 0,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains sparse and dense in turn, and ends sparse.

    After a dense warm-up, phases of one period each alternate, sparse first. A sparse
    phase begins with

    .. math::
        w \leftarrow w \text{ where among the } k \text{ largest } |w|
        \text{ of its layer, } 0 \text{ elsewhere}

    and a dense one lets all weights train, the missing ones from zero. The last phase
    is sparse, to the end of training.

    .. note::
      Last in the chain: wrap what you train with. Memory: one byte a weight, one bit
      with ``packed``.

      Under ``optax.inject_hyperparams`` name all arguments in ``static_args``.

    Args:
      inner: The optimizer that is wrapped.
      density: Fraction of weights kept in sparse phases, in (0, 1], in every layer,
        or a budget.
      update_period: Length of a phase in updates.
      update_start: The warm-up: the first phase begins at the first multiple of
        ``update_period`` that is as large.
      update_stop: The last phase begins at the last multiple of ``update_period``
        below it. Where a dense phase would, the sparse one before it goes on.
      prune: Which weights go: a rule that prunes what a budget asks for.
      reset_moments: ``"grown"`` zeroes the inner optimizer's moments of weights that
        come back, which saw the dense gradient meanwhile; or ``"none"``.
      key: Integer seed or random key; only a rule that draws needs one.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``; with N:M leave
        out ``density``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters,
        or no cycle would come between ``update_start`` and ``update_stop``.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.ac_dc(
      ...     optax.sgd(0.1), density=0.25, update_period=2, update_stop=8)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> counts = []
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"] - 2}, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     counts.append(int((params["w"] != 0).sum()))
      >>> counts
      [20, 20, 5, 5, 20, 20, 5, 5]

    References:
      Peste et al, `AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
      Networks <https://arxiv.org/abs/2106.12379>`_, 2021.

    Differences from the paper: phases have one length; the paper's last ones are
    longer, which ``update_stop`` gives to the last. The moments of weights that were
    never missing go on at a decompression. ``prune`` chooses per layer or globally.
    """
    name = "ac_dc"
    first = schedules.first_due(update_period, update_start, caller=name)
    last = schedules.last_due(
        update_period, update_start, stop=update_stop, caller=name
    )
    return regrow(
        inner,
        density=density,
        prune=prune,
        redistribute=redistribute.none,
        grow=grow.magnitude,
        update_period=update_period,
        update_start=update_start,
        update_stop=update_stop,
        prune_rate=0.0,
        key=key,
        where=where,
        stacked=stacked,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        budget=schedules.Towards(
            lambda end: schedules.alternating_density(
                end, phase=update_period, start=first, stop=last
            )
        ),
        caller=name,
    )
