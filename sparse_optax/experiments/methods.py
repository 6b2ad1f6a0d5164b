"""The methods a run can choose from: one builder each.

A builder takes the resolved run, the number of steps of an epoch and a random key,
and returns a :class:`Plan`. A new method is a function and one entry of
:data:`METHODS`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import optax

import sparse_optax

if TYPE_CHECKING:
    from sparse_optax.experiments.config import Resolved

Params = Any


def _unchanged(params: Params, opt_state: Any) -> Params:
    del opt_state
    return params


class Plan(NamedTuple):
    """What a method adds to a training run.

    Attributes:
      optimizer: the Optax transformation that trains.
      start: ``start(params, opt_state)`` gives the parameters of the first forward
        pass, from fresh or loaded ones.
      masks: ``masks(opt_state)`` gives the mask tree; None where there is none.
      cut: ``cut(params)`` gives the final, sparse parameters where training alone
        does not leave exact zeros (GSM); None otherwise.
    """

    optimizer: optax.GradientTransformation
    start: Callable[[Params, Any], Params] = _unchanged
    masks: Callable[[Any], Any] | None = None
    cut: Callable[[Params], Params] | None = None


def learning_rate(config: "Resolved", steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of a run, step by step.

    Args:
      config: a resolved run.
      steps_per_epoch: steps of one epoch, at least 1.

    Returns:
      An Optax schedule.

    Examples:
      >>> from sparse_optax.experiments import config, methods
      >>> run = config.resolve(config.TrainConfig(drop_epochs=(2,), learning_rate=1.0))
      >>> rate = methods.learning_rate(run, steps_per_epoch=10)
      >>> float(rate(19)), round(float(rate(20)), 6)
      (1.0, 0.1)
    """
    steps = config.drop_steps or [
        epoch * steps_per_epoch for epoch in config.drop_epochs
    ]
    return optax.piecewise_constant_schedule(
        config.learning_rate, {int(step): config.drop_factor for step in steps}
    )


def sgd(config: "Resolved", steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum and L2 decay inside the gradient, the optimizer of all runs.

    Args:
      config: a resolved run.
      steps_per_epoch: steps of one epoch, at least 1.

    Returns:
      ``chain(add_decayed_weights, sgd)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments import config, methods
      >>> optimizer = methods.sgd(config.resolve(config.TrainConfig()), 10)
      >>> params = {"w": jnp.ones((2, 2))}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> round(float(updates["w"][0, 0]), 6)
      -0.190095
    """
    mask = sparse_optax.eligible if config.decay == "kernels" else None
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=mask),
        optax.sgd(
            learning_rate(config, steps_per_epoch),
            momentum=config.momentum or None,
            nesterov=config.nesterov,
        ),
    )


def dense(config: "Resolved", steps_per_epoch: int, key: jax.Array) -> Plan:
    """No pruning at all: the baseline of every table."""
    del key
    return Plan(sgd(config, steps_per_epoch))


def sparse_momentum(config: "Resolved", steps_per_epoch: int, key: jax.Array) -> Plan:
    """Sparse momentum, a cycle every ``update_epochs`` epochs, from a random mask."""
    total = config.epochs * steps_per_epoch
    optimizer = sparse_optax.sparse_momentum_regrow(
        sgd(config, steps_per_epoch),
        density=config.density,
        update_period=config.update_epochs * steps_per_epoch,
        update_stop=total,
        prune_rate=optax.cosine_decay_schedule(config.prune_rate, total),
        key=key,
    )
    return Plan(optimizer, start=sparse_optax.sparsify, masks=sparse_optax.get_masks)


def gsm(config: "Resolved", steps_per_epoch: int, key: jax.Array) -> Plan:
    """GSM, then a cut to the largest weights by magnitude over the whole network."""
    del key
    settle = config.settle_epoch
    optimizer = sparse_optax.gsm(
        learning_rate(config, steps_per_epoch),
        config.density,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        gate=config.gate,
        settle_start=None if settle is None else settle * steps_per_epoch,
    )

    def cut(params):
        return sparse_optax.sparsify(
            params, sparse_optax.masks.magnitude_masks(params, config.density)
        )

    return Plan(optimizer, cut=cut)


METHODS: dict[str, Callable[["Resolved", int, jax.Array], Plan]] = {
    "dense": dense,
    "sparse_momentum": sparse_momentum,
    "gsm": gsm,
}
