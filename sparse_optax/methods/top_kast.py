"""Top-KAST: top-k always sparse training (Jayakumar et al, 2020)."""

import math
from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax.leaves import Where
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.backward import backward_set
from sparse_optax.regrowth.engine import regrow


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
    r"""Forward with the largest weights, backward with some more, the rest at rest.

    In each layer, A are the weights of largest |w|, a fraction D, chosen every period,
    and B are A and the next largest, a fraction D + M, chosen at each update. With g
    the gradient at the weights of A and :math:`\lambda` the penalty,

    .. math::
        g_i + \lambda w_i \text{ in } A, \quad g_i + \tfrac{\lambda}{D} w_i
        \text{ in } B \setminus A, \quad 0 \text{ elsewhere}

    goes to the optimizer, and its step moves the weights in B alone. So a weight of A
    that shrinks meets one of B that has grown; the larger penalty outside of A keeps
    the order from changing by noise.

    .. note::
      Last in the chain, around the whole optimizer. The dense gradient is computed
      and masked: it is the method that is simulated, not its saving. Memory: one
      more copy of the weights, and a byte or, with ``packed``, a bit each. Cost: one
      selection an update, another each period.

      Under ``optax.inject_hyperparams`` name all arguments in ``static_args``.

    Args:
      inner: The optimizer that is wrapped.
      density: D, the fraction of weights kept, in (0, 1], in every layer, or a budget.
        Left out with ``patterns.n_m``.
      backward_density: D + M, the fraction that trains, at least D in every layer; of
        each group of N:M, rounded down.
      penalty: The coefficient of the exploration loss
        :math:`\frac{\lambda}{2} (\sum_A w^2 + \frac{1}{D} \sum_{B \setminus A} w^2)`.
      update_period: Updates between two choices of A.
      update_stop: A stays from this many updates on; None never stops.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

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
      Jayakumar et al, `Top-KAST: Top-K Always Sparse Training
      <https://arxiv.org/abs/2106.03517>`_, 2020.

    Differences from the paper: counts are exact in each layer. The weights of the
    exploration loss, 1 on A and 1/D on the rest of B, are from memory of the paper and
    not confirmed.
    """
    if not isinstance(penalty, int | float) or not 0 <= penalty < math.inf:
        raise ValueError(
            "top_kast: `penalty` must be a number of at least 0; got "
            f"{penalty!r}. Give 1e-4, as for weight decay."
        )
    within = backward_set(
        inner,
        density,
        backward_density,
        penalty=penalty,
        stacked=stacked,
        pattern=pattern,
        caller="top_kast",
    )
    return regrow(
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
        caller="top_kast",
    )
