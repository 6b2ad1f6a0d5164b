"""Sparse momentum: sparse networks from scratch (Dettmers and Zettlemoyer, 2019)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax.leaves import PyTree, Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow as growth
from sparse_optax.regrowth import prune as pruning
from sparse_optax.regrowth import redistribute as sharing
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule


def sparse_momentum_regrow(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
    prune: Rule = pruning.magnitude,
    redistribute: Rule = sharing.momentum,
    grow: Rule = growth.momentum,
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    momentum: str | float = "auto",
    reset_moments: str = "none",
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a sparse network from scratch at constant sparsity.

    Each period, with p the prune rate, a_i the active weights of layer i and M_i its
    momentum:

    .. math::
        \text{prune } \lfloor p_i a_i \rfloor \text{ smallest } |w|, \quad
        \text{grow } \sum_j \lfloor p_j a_j \rfloor \,
        \frac{\overline{|M_i|}}{\sum_j \overline{|M_j|}}
        \text{ missing weights of largest } |M_i|

    The mean is over active weights. What a full layer cannot take is spread equally
    over the others; a layer that is nearly dense and still growing prunes at most
    its sparsity. The number of weights never changes.

    The mixtures of the paper's ablation (Table 5) are one call each:
    ``redistribute.momentum``, ``magnitude``, ``nonzeros``, ``size`` or ``none`` with
    ``grow.momentum``, ``momentum_per_neuron``, ``gradient`` or ``random``. With
    ``prune.global_magnitude`` or ``grow.global_momentum`` the network is one pool.

    .. note::
      Last in the chain: wrap what you train with. Memory: one byte a weight, one bit
      with ``packed``. A cycle reads weights and momentum a few dozen times, once a
      period; other steps cost one pass. On a mesh, a cycle needs small all-reduces.

      Under ``optax.inject_hyperparams`` only ``prune_rate`` may be injected; name
      all others in ``static_args``.

    Args:
      inner: The optimizer that is wrapped; its momentum must see dense gradients.
        None, behind an optimizer in a chain, reads the incoming update.
      density: Fraction of weights kept, in (0, 1], in every layer at the start, or a
        budget. May be left out where ``masks`` are given.
      update_period: Updates between two cycles, the paper's epoch.
      update_stop: No cycle from this many updates on. Give the length of training.
      prune_rate: p in [0, 1], or a schedule of the number of finished updates; None
        is the paper's cosine from 0.5 to 0 at ``update_stop``.
      prune: Which active weights go.
      redistribute: How many weights come back in each layer.
      grow: Which missing weights come.
      key: Integer seed or random key, for the first masks and random growth.
      masks: First masks instead of random ones; their count is the budget.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      momentum: ``"auto"`` reads the momentum that ``inner`` keeps, or a decay in
        [0, 1) of an average of the engine's own.
      reset_moments: ``"none"``, as in the paper: the momentum of a missing weight is
        the criterion of growth; or ``"grown"``.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.sparse_momentum_regrow(
      ...     optax.sgd(0.1, momentum=0.9, nesterov=True),
      ...     density=0.25, update_period=2, update_stop=8, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"]}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["w"] != 0).sum())
      5

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch: Faster Training without
      Losing Performance <https://arxiv.org/abs/1907.04840>`_, 2019.

    The 0.2 and the 1 / L of a layer that is nearly dense and growing are the released
    code's, where the paper gives the rule in words.

    Differences from the paper: exactly as many weights are grown as were pruned
    (largest remainder instead of floors). Differences from the released code: the
    first masks have exact counts instead of coin flips, the prune rate falls to 0
    instead of 0.005, counts are floors, a weight pruned and regrown in one cycle
    starts from zero. In the mixtures random growth has exact counts, ``none`` gives
    each layer back what it lost instead of a share by its size (``redistribute.size``),
    and what a full neuron cannot take goes to others.
    """
    return regrow(
        inner,
        density=density,
        prune=prune,
        redistribute=redistribute,
        grow=grow,
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=prune_rate,
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        momentum=momentum,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        caller="sparse_momentum_regrow",
    )
