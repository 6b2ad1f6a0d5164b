"""Learning-compression (Carreira-Perpinan and Idelbayev, 2018)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import checks
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import Where
from sparse_optax.methods.iterative_magnitude import one_shot_magnitude
from sparse_optax.patterns import Pattern, pattern_of
from sparse_optax.regrowth import prune
from sparse_optax.regrowth.projection import towards_projection


@boundary("learning_compression")
def learning_compression(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int,
    penalty: float = 9e-5,
    growth: float = 1.1,
    multipliers: bool = True,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Pulls all weights towards their K largest, more and more; then cuts to K.

    The constrained problem and its augmented Lagrangian are

    .. math:: \min_w L(w) \text{ with } \| w \|_0 \le K, \qquad
              L(w) + \tfrac{\mu}{2} \| w - \theta - \lambda / \mu \|^2

    The learning step trains w: the gradient gets :math:`\mu (w - \theta) - \lambda`
    added. Every ``update_period`` updates comes a compression step,

    .. math:: \theta \leftarrow \text{the K largest of } |w - \lambda / \mu|, \quad
              \lambda \leftarrow \lambda - \mu (w - \theta), \quad
              \mu \leftarrow \text{growth} \cdot \mu

    over all layers as one pool. Before the first update it is made with
    :math:`\lambda = 0` and does not change :math:`\lambda` and :math:`\mu`. The network
    is dense until ``update_stop``; then the K largest weights stay and train on
    without the penalty.

    .. note:: Last in the chain, around the whole optimizer, for a trained network; the
      cut comes at the start of update ``update_stop + 1``. For SGD keep the learning
      rate times :math:`\mu` below 1, at its last value, too. Memory: two arrays of the
      size of the weights (one without multipliers) and one byte a weight, one bit with
      ``packed``. Cost: one selection a period. All arguments are static under
      ``optax.inject_hyperparams``.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it does not see the penalty.

    Args:
      inner: The wrapped optimizer.
      density: Fraction of weights at the end, in (0, 1], or a budget whose sum is K;
        None if ``pattern`` fixes it.
      update_period: Updates of a learning step, at least 1.
      update_stop: Updates before the cut, at least ``update_period``.
      penalty: :math:`\mu` at first, above 0. The default is that of the authors'
        LeNet-300-100.
      growth: The factor of :math:`\mu` at each compression step, at least 1. The
        authors have 1.1, over 40 steps of 20 epochs; a shorter run needs a larger one.
      multipliers: False leaves :math:`\lambda` at zero: the quadratic penalty method.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      packed: Stores one bit per weight.
      pattern: See ``regrow``. Units are then compared within layers.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.learning_compression(
      ...     optax.sgd(0.5), density=0.5, update_period=2, update_stop=6, penalty=0.5,
      ...     multipliers=False)
      >>> params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
      >>> state = tx.init(params)
      >>> for _ in range(6):
      ...     updates, state = tx.update({"w": jnp.zeros((1, 4))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [round(float(w), 2) for w in params["w"][0]]  # without a loss
      [4.0, 3.0, 0.29, 0.14]
      >>> updates, state = tx.update({"w": jnp.zeros((1, 4))}, state, params)
      >>> optax.apply_updates(params, updates)["w"].tolist()
      [[4.0, 3.0, 0.0, 0.0]]

    References:
      Carreira-Perpinan and Idelbayev, `Learning-Compression Algorithms for Neural Net
      Pruning <https://doi.org/10.1109/CVPR.2018.00890>`_, 2018; Carreira-Perpinan,
      `Model compression as constrained optimization, Part I
      <https://arxiv.org/abs/1707.01209>`_, 2017; ``lc/main.py`` and
      ``examples/lenet300`` of the authors' repository UCMerced-ML/LC-model-compression.

    Differences from the paper: learning steps have a fixed length; the authors double
    the first. The final network has the weights w of largest size; theirs has
    :math:`\theta`, which is the same where the penalty has done its work.
    """
    checks.transformation("inner", inner)
    cure = "Give 9e-5 and 1.1, as the authors have."
    checks.number("penalty", penalty, 0, ends="(]", static=True, cure=cure)
    checks.number("growth", growth, 1, static=True, cure=cure)
    checks.flag("multipliers", multipliers)
    checks.updates("update_period", update_period, 1)
    checks.updates("update_stop", update_stop, update_period)
    pulled = towards_projection(
        density,
        penalty=penalty,
        growth=growth,
        update_period=update_period,
        update_stop=update_stop,
        multipliers=multipliers,
        where=where,
        stacked=stacked,
        pattern=pattern_of(pattern),
    )
    return unnamed(one_shot_magnitude)(
        optax.chain(pulled, inner),
        density=density,
        at=update_stop,
        prune=prune.global_magnitude if pattern is None else prune.magnitude,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
    )
