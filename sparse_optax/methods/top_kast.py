"""Top-KAST: top-k always sparse training (Jayakumar et al, 2020)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import checks
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import Where
from sparse_optax.patterns import Pattern, pattern_of
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.transforms.backward_set import backward_set


@boundary("top_kast")
def top_kast(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    backward_density: Any,
    penalty: float = 1e-4,
    update_period: int = 1,
    update_stop: int | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Uses the largest weights in the forward pass and some more in the backward.

    In each layer, A are the weights of largest |w|, a fraction D, chosen every period.
    B are A and the next largest, a fraction D + M, chosen at each update. With g the
    gradient at the weights of A and :math:`\lambda` the penalty, the optimizer gets

    .. math:: g_i + \lambda w_i \text{ in } A, \quad g_i + \tfrac{\lambda}{D} w_i
              \text{ in } B \setminus A, \quad 0 \text{ elsewhere}

    and its step moves only the weights in B. So weights of B can grow past those of A
    that shrink; the larger penalty outside of A keeps noise from changing the order.

    .. note:: Last in the chain, around the whole optimizer. The dense gradient is
      computed and masked: the method is simulated, without its saving. Memory: one copy
      of the weights and one byte per weight, one bit with ``packed``. Cost: one
      selection per update and one per period. All arguments are static under
      ``optax.inject_hyperparams``.

    Clip gradients inside it: a clip outside of it also measures weights outside of B.

    Args:
      inner: The wrapped optimizer.
      density: D, the fraction kept per layer, in (0, 1], or a budget; None if
        ``pattern`` fixes it.
      backward_density: D + M, the fraction that trains, at least D in every layer;
        rounded down in each group of N:M. The paper studies several for each D; in
        tables here it is twice D, a choice.
      penalty: :math:`\lambda`, on top of the weight decay of ``inner``, of the loss
        :math:`\frac{\lambda}{2} (\sum_A w^2 + \frac{1}{D} \sum_{B \setminus A} w^2)`.
      update_period: Updates between two choices of A.
      update_stop: A stays from this many updates on; None never stops.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      packed: Stores one bit per weight.
      pattern: See ``regrow``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.top_kast(
      ...     optax.sgd(0.5), density=0.25, backward_density=0.5, penalty=0.0)
      >>> params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     grads = {"w": jnp.array([[1.0, -1.0, -9.0, -9.0]])}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].tolist(), state.hidden["w"].tolist()
      ([[0.0, 5.0, 0.0, 0.0]], [[2.0, 5.0, 2.0, 1.0]])

    References:
      Jayakumar et al, `Top-KAST <https://arxiv.org/abs/2106.03517>`_, 2020.

    Differences from the paper: counts are exact in each layer. The exploration loss has
    the paper's factors 1 and 1/D; it is quadratic, as in its text (L2), not linear.
    """
    checks.transformation("inner", inner)
    checks.number("penalty", penalty, 0, cure="Give 1e-4, as for weight decay.")
    within = backward_set(
        inner,
        density,
        backward_density,
        penalty=penalty,
        where=where,
        stacked=stacked,
        pattern=pattern_of(pattern),
    )
    return unnamed(regrow)(
        within,
        density=density,
        prune=prune.outranked(1.0),
        redistribute=redistribute.none,
        grow=grow.magnitude,
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=0.0,
        key=0,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
        hidden=True,
    )
