"""The methods a run can choose from: one builder each.

A builder takes a :class:`Setup` and returns a :class:`Plan`. A new method is a function
and one entry of :data:`METHODS`, which also says what the run starts from.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_optax
from sparse_optax import budgets, regrowth, schedules

if TYPE_CHECKING:
    from sparse_optax.experiments.config import Resolved

Params = Any
# Images that a criterion is measured on, beyond the batch that SNIP takes.
SCORED = 1000
REDISTRIBUTE = ("momentum", "magnitude", "nonzeros", "none")
GROW = ("momentum", "gradient", "random", "momentum_per_neuron")
DECAYS = {
    "cosine": schedules.cosine_prune_rate,
    "linear": schedules.linear_prune_rate,
    "constant": lambda rate, stop: schedules.constant_prune_rate(rate),
}


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


class Setup(NamedTuple):
    """What a builder may look at.

    Attributes:
      config: the resolved run.
      steps_per_epoch: steps of one epoch, at least 1.
      key: a random key for the method's own choices.
      forward: ``forward(params, images)`` gives the logits.
      params: the parameters that the run starts from.
      images: training images and labels, for criteria that look at data.
    """

    config: "Resolved"
    steps_per_epoch: int
    key: jax.Array
    forward: Callable[[Params, jax.Array], jax.Array]
    params: Params
    images: tuple[Any, Any]

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def period(self) -> int:
        """Steps between two cycles."""
        return self.config.update_epochs * self.steps_per_epoch

    def loss(self, params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Mean cross-entropy of a batch."""
        images, labels = batch
        logits = self.forward(params, images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def example_loss(self, params: Params, example: tuple) -> jax.Array:
        """Cross-entropy of one image."""
        image, label = example
        return self.loss(params, (image[None], label[None]))

    def batch(self, size: int) -> tuple[jax.Array, jax.Array]:
        """Images of a random batch that the key draws, and their labels."""
        x, y = self.images
        chosen = jax.random.fold_in(self.key, 1)
        rows = jax.random.permutation(chosen, len(x))[: min(size, len(x))]
        return x[rows], y[rows]


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


def _inner(setup: Setup) -> optax.GradientTransformation:
    return sgd(setup.config, setup.steps_per_epoch)


def _rate(setup: Setup) -> optax.Schedule:
    decay = DECAYS[setup.config.prune_decay]
    return decay(setup.config.prune_rate, stop=setup.total)


def _budget(setup: Setup) -> Any:
    """The run's density, in the shares that it asks for."""
    density = setup.config.density
    kinds = {
        "erdos_renyi": budgets.erdos_renyi,
        "erdos_renyi_kernel": budgets.erdos_renyi_kernel,
        "linear": budgets.linear,
    }
    make = kinds.get(setup.config.budget)
    return density if make is None or density == 1 else make(density)


def _masked(optimizer: optax.GradientTransformation) -> Plan:
    """The plan of a transformation that keeps masks and exact zeros itself."""
    start, masks = sparse_optax.sparsify, sparse_optax.get_masks
    return Plan(optimizer, start=start, masks=masks)


def _static(setup: Setup, masks: Any) -> Plan:
    return _masked(sparse_optax.static_sparse(_inner(setup), masks=masks))


# --- dense, and cut afterwards --------------------------------------------------------
def _cut(setup: Setup) -> Callable[[Params], Params]:
    def cut(params):
        density = setup.config.density
        masks = sparse_optax.masks.magnitude_masks(params, density)
        return sparse_optax.sparsify(params, masks)

    return cut


def dense(setup: Setup) -> Plan:
    """No pruning at all: the baseline of every table."""
    return Plan(_inner(setup))


def gsm(setup: Setup) -> Plan:
    """GSM, then a cut to the largest weights by magnitude over the whole network."""
    config, settle = setup.config, setup.config.settle_epoch
    optimizer = sparse_optax.gsm(
        learning_rate(config, setup.steps_per_epoch),
        config.density,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        gate=config.gate,
        settle_start=None if settle is None else settle * setup.steps_per_epoch,
    )
    return Plan(optimizer, cut=_cut(setup))


def l1(setup: Setup) -> Plan:
    """Dense training with an L1 penalty, then a cut without retraining."""
    penalty = sparse_optax.add_l1_decay(setup.config.l1, mask=sparse_optax.eligible)
    return Plan(optax.chain(penalty, _inner(setup)), cut=_cut(setup))


def l2(setup: Setup) -> Plan:
    """Dense training with its L2 decay, then a cut without retraining."""
    return Plan(_inner(setup), cut=_cut(setup))


# --- masks that never change ----------------------------------------------------------
def static(setup: Setup) -> Plan:
    """Random masks."""
    optimizer = sparse_optax.static_sparse(
        _inner(setup), density=_budget(setup), key=setup.key
    )
    return _masked(optimizer)


def snip(setup: Setup) -> Plan:
    """SNIP: |g w| on one batch at initialisation."""
    batch = setup.batch(setup.config.batch_size)
    masks = sparse_optax.snip_masks(
        setup.loss, setup.params, [batch], setup.config.density
    )
    return _static(setup, masks)


def synflow(setup: Setup) -> Plan:
    """SynFlow: what flows through the network, without data."""
    inputs = jnp.ones((1, *setup.images[0].shape[1:]))
    masks = sparse_optax.synflow_masks(
        setup.forward, setup.params, inputs, setup.config.density
    )
    return _static(setup, masks)


def fisher(setup: Setup) -> Plan:
    """Fisher pruning of the trained network, then training of what is left."""
    masks = sparse_optax.fisher_masks(
        setup.example_loss, setup.params, [setup.batch(SCORED)], setup.config.density
    )
    return _static(setup, masks)


def optimal_brain_damage(setup: Setup) -> Plan:
    """Optimal brain damage of the trained network, then training of what is left."""
    masks = sparse_optax.optimal_brain_damage_masks(
        setup.forward, setup.params, [setup.batch(SCORED)], setup.config.density
    )
    return _static(setup, masks)


def magnitude(setup: Setup) -> Plan:
    """The largest weights of the trained network, then training of what is left."""
    masks = sparse_optax.masks.magnitude_masks(setup.params, setup.config.density)
    return _static(setup, masks)


def layerwise_obs(setup: Setup) -> Plan:
    """Layer-wise OBS of a trained network of dense layers, then training."""
    images, _ = setup.batch(5 * SCORED)
    inputs = images.reshape(len(images), -1)
    names = sorted(name for name in setup.params if "kernel" in setup.params[name])
    kernels = {name: setup.params[name]["kernel"] for name in names}
    counts = budgets.resolve(_budget(setup), kernels)
    hole: Any = optax.MaskedNode()
    masks = {name: dict.fromkeys(layer, hole) for name, layer in setup.params.items()}
    pruned = {name: dict(setup.params[name]) for name in setup.params}
    for name in names:
        kernel = kernels[name]
        if kernel.ndim != 2 or kernel.shape[0] != inputs.shape[1]:
            raise ValueError(
                f"layerwise_obs: {name} of shape {kernel.shape} does not take the "
                f"{inputs.shape[1]} outputs before it; the method needs a chain of "
                "dense layers. Choose model='lenet-300-100'."
            )
        mask, weights = sparse_optax.layerwise_obs(
            kernel, inputs, int(counts[name]), damping=1e-3
        )
        masks[name]["kernel"], pruned[name]["kernel"] = mask, weights
        # Later layers see what the dense layers before them give, as in the paper.
        inputs = jax.nn.relu(inputs @ kernel + setup.params[name]["bias"])
    plan = _static(setup, masks)
    return plan._replace(start=lambda params, opt_state: pruned)


# --- dynamic sparsity -----------------------------------------------------------------
def _dynamic(setup: Setup) -> dict[str, Any]:
    """What the dynamic methods have in common."""
    return {
        "density": _budget(setup),
        "update_period": setup.period,
        "update_stop": setup.total,
        "key": setup.key,
    }


def sparse_momentum(setup: Setup) -> Plan:
    """Sparse momentum, a cycle every ``update_epochs`` epochs, from a random mask."""
    optimizer = sparse_optax.sparse_momentum_regrow(
        _inner(setup),
        **_dynamic(setup),
        prune_rate=_rate(setup),
        redistribute=getattr(regrowth.redistribute, setup.config.redistribute),
        grow=getattr(regrowth.grow, setup.config.grow),
    )
    return _masked(optimizer)


def sparse_evolutionary(setup: Setup) -> Plan:
    """SET, with its constant prune rate of 0.3."""
    return _masked(sparse_optax.sparse_evolutionary(_inner(setup), **_dynamic(setup)))


def dynamic_sparse(setup: Setup) -> Plan:
    """DSR."""
    return _masked(sparse_optax.dynamic_sparse(_inner(setup), **_dynamic(setup)))


def rigl(setup: Setup) -> Plan:
    """RigL."""
    return _masked(sparse_optax.rigl(_inner(setup), **_dynamic(setup)))


def ham(setup: Setup) -> Plan:
    """Sparse momentum around SGD with hyperbolic aware minimization."""
    # The 200 that is told of ImageNet's learning rates diverges at 0.1.
    rate = learning_rate(setup.config, setup.steps_per_epoch)
    inner = sparse_optax.ham(_inner(setup), rate, alpha=1.0)
    optimizer = sparse_optax.sparse_momentum_regrow(
        inner, **_dynamic(setup), prune_rate=_rate(setup)
    )
    return _masked(optimizer)


class Method(NamedTuple):
    """An entry of :data:`METHODS`.

    Attributes:
      build: the builder.
      recipe: ``"scratch"``, ``"trained"`` (a dense network first) or ``"gsm"``.
      budget: how its density is shared among the layers, unless the run says.
    """

    build: Callable[[Setup], Plan]
    recipe: str = "scratch"
    budget: str = "uniform"


METHODS: dict[str, Method] = {
    "dense": Method(dense),
    "sparse_momentum": Method(sparse_momentum),
    "gsm": Method(gsm, recipe="gsm"),
    "sparse_evolutionary": Method(sparse_evolutionary, budget="erdos_renyi"),
    "dynamic_sparse": Method(dynamic_sparse),
    "rigl": Method(rigl, budget="erdos_renyi_kernel"),
    "ham": Method(ham),
    "static": Method(static),
    "snip": Method(snip),
    "synflow": Method(synflow),
    "magnitude": Method(magnitude, recipe="trained"),
    "fisher": Method(fisher, recipe="trained"),
    "optimal_brain_damage": Method(optimal_brain_damage, recipe="trained"),
    "layerwise_obs": Method(layerwise_obs, recipe="trained"),
    "l1": Method(l1),
    "l2": Method(l2),
}
