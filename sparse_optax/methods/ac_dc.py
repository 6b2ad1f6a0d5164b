"""AC/DC: alternating compressed and decompressed training (Peste et al, 2021)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import schedules
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import SINGLE, Pattern, pattern_of
from sparse_optax.regrowth import grow, redistribute
from sparse_optax.regrowth import prune as prune_rules
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule


@boundary("ac_dc")
def ac_dc(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    update_period: int,
    update_start: int = 0,
    update_stop: int,
    prune: Rule | None = None,
    reset_moments: str = "grown",
    key: Key = 0,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Alternates sparse and dense phases of training and ends with a sparse one.

    After a dense warm-up, phases of one period alternate; the first is sparse. At its
    start only the k largest weights of the network stay:

    .. math:: w \leftarrow w \text{ among the } k \text{ largest } |w|, \;
              0 \text{ elsewhere}

    In a dense phase all weights train, the pruned ones from zero. The last phase is
    sparse and lasts to the end of training.

    .. note:: Last in the chain; it wraps the optimizer. Memory: one byte per weight,
      one bit with ``packed``. All arguments are static under
      ``optax.inject_hyperparams``.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer.
      density: Fraction of weights kept when sparse, in (0, 1], or a budget, of which
        the total counts unless ``prune`` works layer by layer.
      update_period: Length of a phase in updates.
      update_start: Warm-up: the first phase begins at the first multiple of
        ``update_period`` that is not smaller, so at the earliest after one. In the
        paper it has 10 of 100 epochs with phases of 5 (ImageNet), and 10 of 200 with
        phases of 20 (CIFAR).
      update_stop: The last phase begins at the last multiple of ``update_period`` below
        it. If that phase would be dense, the sparse one before it continues.
      prune: Which weights are pruned; of what a rule leaves above the target, the
        smallest. None is ``regrowth.prune.global_magnitude``, as in the released code,
        in which each layer keeps at least one weight, and with a ``pattern``
        ``regrowth.prune.magnitude``.
      reset_moments: See ``regrow``; weights that come back have dense moments.
      key: Integer seed or random key, for rules that draw random numbers.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      packed: Stores one bit per weight.
      pattern: See ``regrow``; leave out ``density`` if it fixes it.
      within: Masks of the weights that it may use; the others stay as they are, bit
        for bit, see ``regrow``. None is all.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument does not fit, or no cycle would come.

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
      Peste et al, `AC/DC <https://arxiv.org/abs/2106.12379>`_, 2021.

    Differences from the paper: all phases have one length; the paper's last ones are
    longer, here ``update_stop`` can lengthen the last. A dense phase does not reset the
    moments of kept weights. Source of the defaults: ``policies/pruners.py`` and
    ``configs/neurips`` of the authors' ACDC.
    """
    if prune is None:
        plain = pattern_of(pattern) == SINGLE
        prune = prune_rules.global_magnitude if plain else prune_rules.magnitude
    first = unnamed(schedules.first_due)(update_period, update_start)
    last = unnamed(schedules.last_due)(
        update_period, update_start, update_stop=update_stop
    )
    return unnamed(regrow)(
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
        within=within,
        ramp=schedules.Towards(
            lambda end: schedules.alternating_density(
                end, phase=update_period, start=first, stop=last
            )
        ),
    )
