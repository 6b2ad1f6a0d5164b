"""DSR: dynamic sparse reparameterization (Mostafa and Wang, 2019)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax.leaves import PyTree, Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow


def dynamic_sparse(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule = 0.1,
    prune_number: int | None = None,
    threshold: float = 1e-3,
    tolerance: float = 0.1,
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    reset_moments: str = "none",
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""One adaptive threshold prunes; weights move to the layers that keep theirs.

    Each period, with R_i the weights left in layer i:

    .. math::
        \text{prune } K_i = \#\{|w| < H\}, \quad
        \text{grow } \sum_j K_j \, R_i / \sum_j R_j \text{ at random}

    and H is halved where the sum of K_i is above (1 + delta) N_p, doubled where it is
    below (1 - delta) N_p. A layer that would be emptied keeps its largest weight. The
    total number of weights never changes. Nothing is ranked but in such a layer.

    .. note::
      Last in the chain: wrap what you train with. Memory: one byte a weight, one bit
      with ``packed``. A cycle reads weights and random bits a few dozen times, once a
      period; other steps cost one pass. On a mesh, a cycle needs small all-reduces.

      Under ``optax.inject_hyperparams`` only ``prune_rate`` may be injected; name
      all others in ``static_args``.

    Args:
      inner: The optimizer that is wrapped, or None behind one in a chain.
      density: Fraction of weights kept, in (0, 1], in every layer at the start, or a
        budget. May be left out where ``masks`` are given.
      update_period: Updates between two cycles.
      update_stop: No cycle from this many updates on; None never stops. The paper
        stops a few epochs before the end.
      prune_rate: N_p as a fraction of the active weights, in [0, 1], or a schedule of
        the number of finished updates.
      prune_number: N_p as a number, as in the paper: 600 on MNIST, 20,000 for
        WRN-28-2, 400,000 for ResNet-50. None takes ``prune_rate``.
      threshold: H at the start, above 0. The rules' state in the optimizer's has H.
      tolerance: delta, in [0, 1).
      key: Integer seed or random key, for the first masks and the growth.
      masks: First masks instead of random ones; their count is the budget.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      reset_moments: ``"none"``, or ``"grown"`` to zero the inner optimizer's moments
        of weights just grown.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.dynamic_sparse(
      ...     optax.sgd(0.1), density=0.25, update_period=2, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"] - 2}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["w"] != 0).sum()), round(float(state.rules[0]), 6)
      (5, 0.001)

    References:
      Mostafa and Wang, `Parameter Efficient Training of Deep Convolutional Neural
      Networks by Dynamic Sparse Reparameterization
      <https://arxiv.org/abs/1902.05967>`_, 2019.

    Differences from the released code: what the shares' floors leave over goes to the
    largest remainders instead of a random layer, what a full layer cannot take is
    spread over the others at once, a place just pruned grows again where a layer has
    no other room, H is compared with what was removed after a layer kept its last
    weight, and the period is constant. The wrapped optimizer sees the dense gradient:
    where it has momentum, that of missing weights gathers too and acts once they have
    grown, unless ``reset_moments="grown"``.
    """
    return regrow(
        inner,
        density=density,
        prune=prune.adaptive_threshold(
            threshold, tolerance=tolerance, number=prune_number
        ),
        redistribute=redistribute.nonzeros,
        grow=grow.random_elsewhere,
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=prune_rate,
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        caller="dynamic_sparse",
    )
