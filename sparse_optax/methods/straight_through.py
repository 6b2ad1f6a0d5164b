"""Magnitude pruning with a straight-through gradient."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import schedules
from sparse_optax.leaves import Where
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow


def straight_through_magnitude(
    inner: optax.GradientTransformation,
    *,
    density: Any = None,
    budget: optax.Schedule | schedules.Towards | None = None,
    update_stop: int | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains all weights and shows the largest, chosen anew before each update.

    With k the weights that a layer keeps and g the gradient at the weights shown,

    .. math::
        w \leftarrow w - \text{step}(g), \qquad
        \text{shown} = w \text{ among the } k \text{ largest } |w|, \text{ else } 0

    the gradient passes the choice as if it were not there. The choice is that of the
    weights before the step.

    .. note::
      Last in the chain, around the whole optimizer. Memory: one more copy of the
      weights, and a byte or, with ``packed``, a bit each. Cost: one selection an
      update.

      Under ``optax.inject_hyperparams`` name all arguments in ``static_args``.

    Args:
      inner: The optimizer that is wrapped.
      density: Fraction of weights kept, in (0, 1], in every layer, or a budget. Left
        out with ``patterns.n_m``.
      budget: A schedule of the density that ends at ``density``, or None: the weights
        kept are as many from the start.
      update_stop: The mask stays from this many updates on; None never stops. A
        ``budget`` must have ended by then.
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
      >>> tx = sparse_optax.straight_through_magnitude(optax.sgd(0.5), density=0.5)
      >>> params = {"w": jnp.array([[4.0, 3.0, 2.0, 1.0]])}
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     grads = {"w": jnp.array([[0.0, 1.0, 0.0, -1.0]])}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].tolist()
      [[4.0, 0.0, 0.0, 3.0]]

    References:
      Bengio, Leonard and Courville, `Estimating or Propagating Gradients Through
      Stochastic Neurons for Conditional Computation
      <https://arxiv.org/abs/1308.3432>`_, 2013, for the estimator.

    Differences from other libraries: the weights handed to the loss are the sparse
    ones; the dense ones are in the state.
    """
    return regrow(
        inner,
        density=density,
        prune=prune.outranked(1.0),
        redistribute=redistribute.none,
        grow=grow.magnitude,
        update_period=1,
        update_stop=update_stop,
        prune_rate=0.0,
        key=0,
        where=where,
        stacked=stacked,
        packed=packed,
        pattern=pattern,
        budget=budget,
        hidden=True,
        caller="straight_through_magnitude",
    )
