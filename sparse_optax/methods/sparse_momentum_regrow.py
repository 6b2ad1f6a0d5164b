"""Sparse momentum: sparse networks from scratch (Dettmers and Zettlemoyer, 2019)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow as growth
from sparse_optax.regrowth import prune as pruning
from sparse_optax.regrowth import redistribute as sharing
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.rules import Rule


@boundary("sparse_momentum_regrow")
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
    dense_until: int | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains a sparse network from scratch at constant sparsity.

    Each period, with p the prune rate, a_i the active weights of layer i and M_i its
    momentum:

    .. math:: \text{prune } \lfloor p_i a_i \rfloor \text{ smallest } |w|, \quad
              \text{grow } \sum_j \lfloor p_j a_j \rfloor \,
              \frac{\overline{|M_i|}}{\sum_j \overline{|M_j|}}
              \text{ missing weights of largest } |M_i|

    The mean is over active weights. What a full layer cannot take is spread equally
    over the others. A nearly dense layer whose share grows prunes at most its sparsity;
    the limits 0.2 and 1 / L of this rule are the released code's, the paper gives it in
    words. The number of weights never changes.

    The mixtures of the paper's ablation (Table 5) are one call each:
    ``redistribute.momentum``, ``magnitude``, ``nonzeros``, ``size`` or ``none`` with
    ``grow.momentum``, ``momentum_per_neuron``, ``gradient`` or ``random``. With
    ``prune.global_magnitude`` or ``grow.global_momentum`` the network is one pool.

    .. note:: Last in the chain; it wraps the optimizer. Memory: one byte per weight,
      one bit with ``packed``. A cycle reads weights and momentum a few dozen times,
      other steps once. Under ``optax.inject_hyperparams`` only ``prune_rate`` varies.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer; its momentum must see dense gradients. None, behind
        an optimizer in a chain, reads the incoming update.
      density: Fraction of weights per layer at the start, in (0, 1], or a budget.
      update_period: Updates between two cycles, the paper's epoch.
      update_stop: No cycle from this many updates on. Give the length of training.
      prune_rate: p in [0, 1], or a schedule of the number of finished updates; None is
        the paper's cosine from 0.5 to 0 at ``update_stop``.
      prune: Which active weights are pruned.
      redistribute: How many weights grow in each layer.
      grow: Which missing weights grow.
      key: Integer seed or random key, for the first masks and random growth.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: First masks instead of random ones; ``density`` may then be left out.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      momentum: ``"auto"`` reads the momentum of ``inner``; a decay in [0, 1) keeps an
        average of the gradient, see ``regrow``.
      reset_moments: See ``regrow``. ``"none"`` as in the paper: the momentum of a
        missing weight is the growth criterion.
      packed: Stores one bit per weight.
      pattern: See ``regrow``.
      dense_until: Trains all weights for this many updates, then cuts to ``density``
        once, see ``regrow``. None starts sparse.
      within: Masks of the weights that it may use; the others stay as they are, bit
        for bit, see ``regrow``. None is all.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

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
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019.

    Differences from the paper: exactly as many weights grow as were pruned (largest
    remainders, not floors). Differences from the released code: the first masks have
    exact counts, not independent random draws; the prune rate falls to 0, not 0.005;
    counts are floors; a weight pruned and regrown in one cycle starts from zero. In the
    mixtures, random growth has exact counts, ``none`` gives each layer back what it
    lost, not a share by size (``redistribute.size``), and the excess of full neurons
    goes to others.
    """
    return unnamed(regrow)(
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
        dense_until=dense_until,
        within=within,
    )
