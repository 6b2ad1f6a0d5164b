"""The methods a run can choose from: one builder each.

A builder takes a :class:`Setup` and returns a :class:`Plan`. A new method is a function
and one entry of :data:`METHODS`, which also says what the run starts from.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_optax
from sparse_optax import budgets, regrowth
from sparse_optax.experiments import plans, units
from sparse_optax.experiments.plans import DECAYS as DECAYS
from sparse_optax.experiments.plans import Params, Plan, Setup
from sparse_optax.experiments.plans import learning_rate as learning_rate
from sparse_optax.experiments.plans import sgd as sgd

# Images that a criterion is measured on, beyond the batch that SNIP takes.
SCORED = 1000
# Updates between two cycles of RigL, in the paper and in its code.
RIGL_PERIOD = 100
# Weights that DSR replaces in a cycle, by the code of its authors; elsewhere a tenth.
DSR_NUMBER = {"mnist": 600, "fashion-mnist": 600, "cifar10": 20_000}
PRUNE = ("magnitude", "global_magnitude")
REDISTRIBUTE = ("momentum", "magnitude", "nonzeros", "size", "none")
GROW = ("momentum", "gradient", "random", "momentum_per_neuron", "global_momentum")


# --- dense, and cut afterwards --------------------------------------------------------
def _cut(setup: Setup) -> Callable[[Params], Params]:
    def cut(params):
        density = setup.config.density
        masks = sparse_optax.masks.magnitude_masks(params, density)
        return sparse_optax.sparsify(params, masks)

    return cut


def dense(setup: Setup) -> Plan:
    """No pruning at all: the baseline of every table."""
    return Plan(plans.inner(setup))


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
    return Plan(optax.chain(penalty, plans.inner(setup)), cut=_cut(setup))


def l2(setup: Setup) -> Plan:
    """Dense training with its L2 decay, then a cut without retraining."""
    return Plan(plans.inner(setup), cut=_cut(setup))


# --- masks that never change ----------------------------------------------------------
def static(setup: Setup) -> Plan:
    """Random masks."""
    optimizer = sparse_optax.static_sparse(
        plans.inner(setup), density=plans.budget(setup), key=setup.key
    )
    return plans.masked(optimizer)


def snip(setup: Setup) -> Plan:
    """SNIP: |g w| on one batch at initialisation."""
    batch = setup.batch(setup.config.batch_size)
    masks = sparse_optax.snip_masks(
        setup.loss, setup.params, [batch], setup.config.density
    )
    return plans.static(setup, masks)


def ticket(setup: Setup) -> Plan:
    """The weights that sparse momentum ended with, from the start, or a control."""
    chosen = sparse_optax.eligible(setup.params)
    masks = jax.tree.map(
        lambda w, sparse: w != 0 if sparse else optax.MaskedNode(), setup.params, chosen
    )
    control, key = setup.config.ticket, setup.init_key
    if control == "shuffled":
        masks = sparse_optax.shuffle_masks(setup.key, masks)
    elif control == "random":
        masks = sparse_optax.random_masks_like(setup.key, masks)
    elif control == "reinitialised":
        key = jax.random.fold_in(key, 1)
    plan = plans.static(setup, masks)
    fresh = sparse_optax.sparsify(setup.draw(key), masks)
    return plan._replace(start=lambda params, opt_state: fresh)


def synflow(setup: Setup) -> Plan:
    """SynFlow: what flows through the network, without data."""
    inputs = jnp.ones((1, *setup.images[0].shape[1:]))
    masks = sparse_optax.synflow_masks(
        setup.forward, setup.params, inputs, setup.config.density
    )
    return plans.static(setup, masks)


def fisher(setup: Setup) -> Plan:
    """Fisher pruning of the trained network, then training of what is left."""
    masks = sparse_optax.fisher_masks(
        setup.example_loss, setup.params, setup.batches(SCORED), setup.config.density
    )
    return plans.static(setup, masks)


def optimal_brain_damage(setup: Setup) -> Plan:
    """Optimal brain damage of the trained network, then training of what is left."""
    masks = sparse_optax.optimal_brain_damage_masks(
        setup.forward, setup.params, setup.batches(SCORED), setup.config.density
    )
    return plans.static(setup, masks)


def magnitude(setup: Setup) -> Plan:
    """The largest weights of the trained network, then training of what is left."""
    masks = sparse_optax.masks.magnitude_masks(setup.params, setup.config.density)
    return plans.static(setup, masks)


def layerwise_obs(setup: Setup) -> Plan:
    """Layer-wise OBS of a trained network of dense layers, then training."""
    images, _ = setup.batch(5 * SCORED)
    inputs = images.reshape(len(images), -1)
    named = (name for name in setup.params if "kernel" in setup.params[name])
    names = units.numbered(named)
    kernels = {name: setup.params[name]["kernel"] for name in names}
    counts = budgets.resolve(plans.budget(setup), kernels)
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
        inputs = jax.nn.relu(inputs @ kernel + setup.params[name]["bias"][None])
    plan = plans.static(setup, masks)
    return plan._replace(start=lambda params, opt_state: pruned)


# --- dynamic sparsity -----------------------------------------------------------------
def _dynamic(setup: Setup) -> dict[str, Any]:
    """What the dynamic methods have in common."""
    return {
        "density": plans.budget(setup),
        "update_period": setup.period,
        "update_stop": setup.total,
        "key": setup.key,
    }


def sparse_momentum(setup: Setup) -> Plan:
    """Sparse momentum, a cycle every ``update_epochs`` epochs, from a random mask."""
    optimizer = sparse_optax.sparse_momentum_regrow(
        plans.inner(setup),
        **_dynamic(setup),
        prune_rate=plans.rate(setup),
        prune=getattr(regrowth.prune, setup.config.prune),
        redistribute=getattr(regrowth.redistribute, setup.config.redistribute),
        grow=getattr(regrowth.grow, setup.config.grow),
    )
    return plans.masked(optimizer)


def sparse_evolutionary(setup: Setup) -> Plan:
    """SET, with its constant prune rate of 0.3."""
    return plans.masked(
        sparse_optax.sparse_evolutionary(plans.inner(setup), **_dynamic(setup))
    )


def dynamic_sparse(setup: Setup) -> Plan:
    """DSR, which stops moving weights shortly before the end."""
    optimizer = sparse_optax.dynamic_sparse(
        plans.inner(setup),
        **{**_dynamic(setup), "update_stop": max(1, 19 * setup.total // 20)},
        prune_number=DSR_NUMBER.get(setup.config.dataset),
    )
    return plans.masked(optimizer)


def rigl(setup: Setup) -> Plan:
    """RigL: short periods, in the first three quarters of the run."""
    timing = {
        "update_period": min(RIGL_PERIOD, setup.period),
        "update_stop": setup.settled,
    }
    optimizer = sparse_optax.rigl(plans.inner(setup), **{**_dynamic(setup), **timing})
    return plans.masked(optimizer)


def in_time_over_parameterization(setup: Setup) -> Plan:
    """ITOP: SET that prefers weights never tried, with long periods."""
    optimizer = sparse_optax.in_time_over_parameterization(
        plans.inner(setup), **{**_dynamic(setup), "update_period": 3 * setup.period}
    )
    return plans.masked(optimizer)


def deep_rewiring(setup: Setup) -> Plan:
    """DEEP-R, which rewires at every step and cools down in the run."""
    # The temperatures that Mostafa and Wang lowered it by, and where in the run.
    temperature = optax.piecewise_constant_schedule(
        1e-5,
        {
            int(share * setup.total): factor
            for share, factor in ((1 / 8, 1e-3), (2 / 5, 1e-4), (7 / 10, 1e-3))
        },
    )
    shared = _dynamic(setup)
    optimizer = sparse_optax.deep_rewiring(
        plans.inner(setup),
        density=shared["density"],
        learning_rate=learning_rate(setup.config, setup.steps_per_epoch),
        temperature=temperature,
        update_stop=setup.total,
        key=setup.key,
    )
    return plans.masked(optimizer)


def ham(setup: Setup) -> Plan:
    """Sparse momentum around SGD with hyperbolic aware minimization."""
    # The 200 that is told of ImageNet's learning rates diverges at 0.1.
    rate = learning_rate(setup.config, setup.steps_per_epoch)
    inner = sparse_optax.ham(plans.inner(setup), rate, alpha=1.0)
    optimizer = sparse_optax.sparse_momentum_regrow(
        inner, **_dynamic(setup), prune_rate=plans.rate(setup)
    )
    return plans.masked(optimizer)


# --- from dense to sparse while training ----------------------------------------------
def _pruning(setup: Setup) -> dict[str, Any]:
    """Pruning in the first three quarters of the run; the rest trains what is left."""
    return {
        "density": plans.budget(setup),
        "update_period": setup.period,
        "update_stop": setup.settled,
    }


def granet(setup: Setup) -> Plan:
    """GraNet, from dense."""
    optimizer = sparse_optax.granet(
        plans.inner(setup), **_pruning(setup), key=setup.key
    )
    return plans.masked(optimizer)


def gradual_magnitude(setup: Setup) -> Plan:
    """Gradual magnitude pruning along the cubic schedule."""
    return plans.masked(
        sparse_optax.gradual_magnitude(plans.inner(setup), **_pruning(setup))
    )


def iterative_magnitude(setup: Setup) -> Plan:
    """Iterative magnitude pruning: equal shares of what is left, many times."""
    prunes = max(1, 3 * setup.config.epochs // 4 // setup.config.update_epochs)
    optimizer = sparse_optax.iterative_magnitude(
        plans.inner(setup),
        density=plans.budget(setup),
        prunes=prunes,
        update_period=setup.period,
    )
    return plans.masked(optimizer)


def one_shot_magnitude(setup: Setup) -> Plan:
    """One prune by magnitude in each layer, in the middle of the run."""
    optimizer = sparse_optax.one_shot_magnitude(
        plans.inner(setup), density=plans.budget(setup), at=max(1, setup.total // 2)
    )
    return plans.masked(optimizer)


def ac_dc(setup: Setup) -> Plan:
    """AC/DC: dense and sparse phases in turn, sparse for the last quarter."""
    optimizer = sparse_optax.ac_dc(
        plans.inner(setup),
        **{**_pruning(setup), "update_period": max(1, setup.total // 16)},
    )
    return plans.masked(optimizer)


def network_surgery(setup: Setup) -> Plan:
    """Dynamic network surgery of a trained network, at an exact number."""
    optimizer = sparse_optax.network_surgery(
        plans.inner(setup),
        density=plans.budget(setup),
        update_stop=setup.settled,
    )
    return plans.masked(optimizer)


def straight_through_magnitude(setup: Setup) -> Plan:
    """The largest of dense hidden weights, chosen anew at every step."""
    optimizer = sparse_optax.straight_through_magnitude(
        plans.inner(setup),
        density=plans.budget(setup),
        update_stop=setup.settled,
    )
    return plans.masked(optimizer)


def top_kast(setup: Setup) -> Plan:
    """Top-KAST, with twice as many weights in the backward set."""
    optimizer = sparse_optax.top_kast(
        plans.inner(setup),
        density=plans.budget(setup),
        backward_density=plans.budget(setup, min(1.0, 2 * setup.config.density)),
        update_stop=setup.settled,
    )
    return plans.masked(optimizer)


class Method(NamedTuple):
    """An entry of :data:`METHODS`.

    Attributes:
      build: the builder.
      recipe: ``"scratch"``, ``"trained"`` (a dense network first) or ``"gsm"``.
      budget: how its density is shared among the layers, unless the run says.
      cut_only: it reads the density after training only, so that runs at several
        densities share theirs.
      pooled: it ranks the weights of all layers at once, whatever the budget's shares.
    """

    build: Callable[[Setup], Plan]
    recipe: str = "scratch"
    budget: str = "uniform"
    cut_only: bool = False
    pooled: bool = False


METHODS: dict[str, Method] = {
    "dense": Method(dense),
    "sparse_momentum": Method(sparse_momentum),
    "gsm": Method(gsm, recipe="gsm", pooled=True),
    "sparse_evolutionary": Method(sparse_evolutionary, budget="erdos_renyi"),
    "dynamic_sparse": Method(dynamic_sparse),
    "rigl": Method(rigl, budget="erdos_renyi_kernel"),
    "in_time_over_parameterization": Method(
        in_time_over_parameterization, budget="erdos_renyi_kernel"
    ),
    "deep_rewiring": Method(deep_rewiring),
    "ham": Method(ham),
    "static": Method(static),
    "thin": Method(dense),  # of a smaller model, which the run's values name
    "snip": Method(snip, pooled=True),
    "synflow": Method(synflow, pooled=True),
    "ticket": Method(ticket),
    "gradual_magnitude": Method(gradual_magnitude),
    "granet": Method(granet, budget="erdos_renyi_kernel"),
    "iterative_magnitude": Method(iterative_magnitude),
    "one_shot_magnitude": Method(one_shot_magnitude),
    "ac_dc": Method(ac_dc),
    "straight_through_magnitude": Method(straight_through_magnitude),
    "top_kast": Method(top_kast),
    "network_surgery": Method(network_surgery, recipe="trained"),
    "magnitude": Method(magnitude, recipe="trained", pooled=True),
    "fisher": Method(fisher, recipe="trained", pooled=True),
    "optimal_brain_damage": Method(optimal_brain_damage, recipe="trained", pooled=True),
    "layerwise_obs": Method(layerwise_obs, recipe="trained"),
    "l1": Method(l1, cut_only=True, pooled=True),
    "l2": Method(l2, cut_only=True, pooled=True),
}
