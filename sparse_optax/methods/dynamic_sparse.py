"""DSR: dynamic sparse reparameterization (Mostafa and Wang, 2019)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import checks
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow


@boundary("dynamic_sparse")
def dynamic_sparse(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
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
    dense_until: int | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes by one adaptive threshold and grows where most weights were kept.

    Each period, with R_i the weights that are left in layer i:

    .. math:: \text{prune } K_i = \#\{|w| < H\}, \quad
              \text{grow } \sum_j K_j \, R_i / \sum_j R_j \text{ at random}

    H is halved if the sum of K_i is above (1 + delta) N_p, and doubled if it is below
    (1 - delta) N_p. A layer that would lose all weights keeps the largest; only there
    are weights ranked. The total number of weights never changes.

    .. note:: Last in the chain; it wraps the optimizer. Memory: one byte per weight,
      one bit with ``packed``. A cycle reads weights and random bits a few dozen times,
      other steps once. Under ``optax.inject_hyperparams`` only ``prune_rate`` varies.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, or None behind an optimizer in a chain.
      density: Fraction of weights per layer at the start, in (0, 1], or a budget.
      update_period: Updates between two cycles. The released code has 100, 200, 400 and
        800 in the four quarters of training on MNIST.
      update_stop: No cycle from then on, on MNIST after 90 of 100 epochs; None never
        stops.
      prune_rate: N_p as a fraction of the active weights, in [0, 1], or a schedule of
        the number of finished updates. None is 0.1, or ``prune_number``.
      prune_number: N_p as a number, as in the paper: 600 on MNIST, 20,000 for WRN-28-2,
        400,000 for ResNet-50. None uses ``prune_rate``; give one of the two.
      threshold: H at the start, above 0; ``state.rules[0]`` holds the current H.
      tolerance: delta, in [0, 1).
      key: Integer seed or random key, for the first masks and the growth.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: First masks instead of random ones; ``density`` may then be left out.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      reset_moments: See ``regrow``.
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

    The released code trains MNIST with batch norm and without biases, at a learning
    rate of 0.1, times 0.2 after 25, 50 and 75 of 100 epochs, with an L1 decay of 1e-4
    and no weight decay. Differences from it: what rounding leaves over goes to the
    largest remainders, not to a random layer; what a full layer cannot take is spread
    over the others at once; a weight just pruned can grow again if its layer has no
    other place; the period is constant. The wrapped optimizer sees the dense gradient:
    any momentum also collects at missing weights and acts when they grow, unless
    ``reset_moments="grown"``.
    """
    prune.check_adaptive(
        threshold=threshold, tolerance=tolerance, prune_number=prune_number
    )
    if prune_number is not None and prune_rate is not None:
        cure = "It says how many weights go: leave out one of the two."
        checks.fail("prune_number", prune_number, "None beside `prune_rate`", cure)
    return unnamed(regrow)(
        inner,
        density=density,
        prune=unnamed(prune.adaptive_threshold)(
            threshold, tolerance=tolerance, number=prune_number
        ),
        redistribute=redistribute.nonzeros,
        grow=grow.random_elsewhere,
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=0.1 if prune_rate is None else prune_rate,
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        dense_until=dense_until,
        within=within,
    )
