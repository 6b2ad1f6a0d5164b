"""The methods a run can choose from: one builder each.

A builder takes a :class:`Setup` and returns a :class:`Build`. A new method is a
function here, in :data:`BUILDERS`, and an entry of ``recipes.METHODS``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import sparse_optax
from sparse_optax import budgets, regrowth
from sparse_optax.experiments import setup as shared
from sparse_optax.experiments import units
from sparse_optax.experiments.setup import Build, Params, Setup, learning_rate

# Images that a criterion is measured on, beyond the batch that SNIP takes.
SCORED = 1000
# Updates between two cycles of RigL, in the paper and in its code.
RIGL_PERIOD = 100
# Weights that DSR replaces in a cycle, by the code of its authors; elsewhere a tenth.
DSR_NUMBER = {
    "mnist": 600,
    "fashion-mnist": 600,
    "cifar10": 20_000,
    "imagenet": 400_000,
}


# --- dense, and cut afterwards --------------------------------------------------------
def _cut(setup: Setup) -> Callable[..., Params]:
    def cut(params, opt_state, forward):
        del opt_state, forward
        density = setup.config.density
        masks = sparse_optax.masks.magnitude_masks(params, density)
        return sparse_optax.sparsify(params, masks)

    return cut


def dense(setup: Setup) -> Build:
    """No pruning at all: the baseline of every table."""
    return Build(shared.inner(setup))


def gsm(setup: Setup) -> Build:
    """GSM, then a cut to the largest weights by magnitude over the whole network."""
    config, settle = setup.config, setup.config.settle_epoch
    if config.optimizer == "adamw":
        if settle is not None:
            raise ValueError(
                f"train: settle_epoch={settle} must be left out for method='gsm' with "
                "optimizer='adamw'. Leave it out, or take SGD."
            )
        gate = sparse_optax.gsm_mask(config.gate or config.density)
        return Build(optax.chain(gate, shared.inner(setup)), cut=_cut(setup))
    optimizer = sparse_optax.gsm(
        learning_rate(config, setup.steps_per_epoch),
        config.density,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        gate=config.gate,
        settle_start=None if settle is None else settle * setup.steps_per_epoch,
    )
    return Build(optimizer, cut=_cut(setup))


def l1(setup: Setup) -> Build:
    """Dense training with an L1 penalty, then a cut without retraining."""
    penalty = sparse_optax.add_l1_decay(setup.config.l1, mask=sparse_optax.eligible)
    return Build(optax.chain(penalty, shared.inner(setup)), cut=_cut(setup))


def l2(setup: Setup) -> Build:
    """Dense training with its L2 decay, then a cut without retraining."""
    return Build(shared.inner(setup), cut=_cut(setup))


def _calibration(setup: Setup) -> list[jax.Array]:
    return [inputs for inputs, _ in setup.batches(SCORED)]


def _pattern(setup: Setup) -> Any:
    two_of_four = setup.config.pattern == "2:4"
    return sparse_optax.patterns.n_m(2, 4) if two_of_four else None


def wanda(setup: Setup) -> Build:
    """Dense training, then one cut by weights times the norm of their inputs."""

    def cut(params, opt_state, forward):
        del opt_state
        masks = sparse_optax.wanda_masks(
            forward,
            params,
            _calibration(setup),
            shared.budget(setup),
            pattern=_pattern(setup),
        )
        return sparse_optax.sparsify(params, masks)

    return Build(shared.inner(setup), cut=cut)


def sparse_gpt(setup: Setup) -> Build:
    """Dense training, then SparseGPT: one cut that corrects the weights that stay."""

    def cut(params, opt_state, forward):
        del opt_state
        _, new = sparse_optax.sparse_gpt(
            forward,
            params,
            _calibration(setup),
            shared.budget(setup),
            pattern=_pattern(setup),
        )
        return new

    return Build(shared.inner(setup), cut=cut)


def soft_weight_sharing(setup: Setup) -> Build:
    """A mixture prior on the weights of a trained network, then a cut."""
    # Adam at a twentieth of the rate for SGD: 5e-4 by default, as the tutorial has.
    rate = learning_rate(setup.config, setup.steps_per_epoch)
    # Ten times the strength of the tutorial, chosen on the validation images: with that
    # one most weights are still between the components when this run ends.
    prior = sparse_optax.soft_weight_sharing(examples=setup.examples, strength=0.03)
    adam = optax.adam(lambda count: 0.05 * rate(count))
    return Build(optax.chain(prior, adam), cut=_cut(setup))


# --- weights that are drawn -----------------------------------------------------------
def _drawn(setup: Setup, make: Callable[..., Any], **options: Any) -> Build:
    # Adam at a hundredth of the rate for SGD: 1e-3 by default, as the authors have.
    rate = learning_rate(setup.config, setup.steps_per_epoch)
    optimizer = make(
        optax.adam(lambda count: 0.01 * rate(count)),
        examples=setup.examples,
        key=setup.key,
        **options,
    )
    return Build(
        optimizer,
        cut=lambda params, opt_state, forward: sparse_optax.final_weights(
            params, opt_state, setup.config.density
        ),
        sample=sparse_optax.sample_weights,
        shown=sparse_optax.final_weights,
    )


def sparse_variational_dropout(setup: Setup) -> Build:
    """Variational dropout with full strength from a tenth of the run on, then a cut."""
    begin, end = setup.total // 40, max(1, setup.total // 10)
    strength = optax.linear_schedule(0.0, 1.0, max(1, end - begin), begin)
    return _drawn(setup, sparse_optax.sparse_variational_dropout, strength=strength)


def l0_regularization(setup: Setup) -> Build:
    """L0 with a gate for each weight, then a cut."""
    return _drawn(setup, sparse_optax.l0_regularization, strength=0.1)


# --- masks that never change ----------------------------------------------------------
def static(setup: Setup) -> Build:
    """Random masks."""
    optimizer = sparse_optax.static_sparse(
        shared.inner(setup), density=shared.budget(setup), key=setup.key
    )
    return shared.masked(optimizer)


def snip(setup: Setup) -> Build:
    """SNIP: |g w| on one batch at initialisation."""
    batch = setup.batch(setup.config.batch_size)
    masks = sparse_optax.snip_masks(
        setup.loss, setup.params, [batch], setup.config.density
    )
    return shared.static(setup, masks)


def ticket(setup: Setup) -> Build:
    """The weights that the finder ended with, from the start, or a control."""
    params = setup.params
    if setup.config.finder == "magnitude":
        found = sparse_optax.masks.magnitude_masks(params, setup.config.density)
        params = sparse_optax.sparsify(params, found)
    chosen = sparse_optax.eligible(params)
    masks = jax.tree.map(
        lambda w, sparse: w != 0 if sparse else optax.MaskedNode(), params, chosen
    )
    control, key = setup.config.ticket, setup.init_key
    if control == "shuffled":
        masks = sparse_optax.shuffle_masks(setup.key, masks)
    elif control == "random":
        masks = sparse_optax.random_masks_like(setup.key, masks)
    elif control == "reinitialised":
        key = jax.random.fold_in(key, 1)
    build = shared.static(setup, masks)
    fresh = sparse_optax.sparsify(setup.draw(key), masks)
    return build._replace(start=lambda params, opt_state: fresh)


def synflow(setup: Setup) -> Build:
    """SynFlow: what flows through the network, without data."""
    inputs = jnp.ones((1, *setup.images[0].shape[1:]))
    masks = sparse_optax.synflow_masks(
        setup.forward, setup.params, inputs, setup.config.density
    )
    return shared.static(setup, masks)


def fisher(setup: Setup) -> Build:
    """Fisher pruning of the trained network, then training of what is left."""
    masks = sparse_optax.fisher_masks(
        setup.example_loss, setup.params, setup.batches(SCORED), setup.config.density
    )
    return shared.static(setup, masks)


def optimal_brain_damage(setup: Setup) -> Build:
    """Optimal brain damage of the trained network, then training of what is left."""
    masks = sparse_optax.optimal_brain_damage_masks(
        setup.forward, setup.params, setup.batches(SCORED), setup.config.density
    )
    return shared.static(setup, masks)


def magnitude(setup: Setup) -> Build:
    """The largest weights of the trained network, then training of what is left."""
    masks = sparse_optax.masks.magnitude_masks(setup.params, setup.config.density)
    return shared.static(setup, masks)


def layerwise_obs(setup: Setup) -> Build:
    """Layer-wise OBS of a trained network of dense layers, then training."""
    images, _ = setup.batch(5 * SCORED)
    inputs = images.reshape(len(images), -1)
    named = (name for name in setup.params if "kernel" in setup.params[name])
    names = units.numbered(named)
    kernels = {name: setup.params[name]["kernel"] for name in names}
    counts = budgets.resolve(shared.budget(setup), kernels)
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
    build = shared.static(setup, masks)
    return build._replace(start=lambda params, opt_state: pruned)


# --- dynamic sparsity -----------------------------------------------------------------
def _dynamic(setup: Setup) -> dict[str, Any]:
    """What the dynamic methods have in common."""
    return {
        "density": shared.budget(setup),
        "update_period": setup.period,
        "update_stop": setup.total,
        "key": setup.key,
    }


def sparse_momentum(setup: Setup) -> Build:
    """Sparse momentum, a cycle every ``update_epochs`` epochs, from a random mask."""
    optimizer = sparse_optax.sparse_momentum_regrow(
        shared.inner(setup),
        **_dynamic(setup),
        prune_rate=shared.rate(setup),
        prune=getattr(regrowth.prune, setup.config.prune),
        redistribute=getattr(regrowth.redistribute, setup.config.redistribute),
        grow=getattr(regrowth.grow, setup.config.grow),
    )
    return shared.masked(optimizer)


def sparse_evolutionary(setup: Setup) -> Build:
    """SET, with its constant prune rate of 0.3."""
    return shared.masked(
        sparse_optax.sparse_evolutionary(shared.inner(setup), **_dynamic(setup))
    )


def dynamic_sparse(setup: Setup) -> Build:
    """DSR, which stops moving weights shortly before the end."""
    optimizer = sparse_optax.dynamic_sparse(
        shared.inner(setup),
        **{**_dynamic(setup), "update_stop": max(1, 9 * setup.total // 10)},
        prune_number=DSR_NUMBER.get(setup.config.dataset),
    )
    return shared.masked(optimizer)


def rigl(setup: Setup) -> Build:
    """RigL: short periods, in the first three quarters of the run."""
    timing = {
        "update_period": min(RIGL_PERIOD, setup.period),
        "update_stop": setup.settled,
    }
    optimizer = sparse_optax.rigl(shared.inner(setup), **{**_dynamic(setup), **timing})
    return shared.masked(optimizer)


def in_time_over_parameterization(setup: Setup) -> Build:
    """ITOP: random growth with long periods."""
    optimizer = sparse_optax.in_time_over_parameterization(
        shared.inner(setup), **{**_dynamic(setup), "update_period": 3 * setup.period}
    )
    return shared.masked(optimizer)


def deep_rewiring(setup: Setup) -> Build:
    """DEEP-R, which rewires at every step and cools down in the run."""
    # The code of Mostafa and Wang: temperatures T of 1e-5, 1e-8, 1e-12 and 1e-15, and
    # a noise of the gradient of sqrt(2 * 0.01 * T), whatever the learning rate.
    temperatures = optax.piecewise_constant_schedule(
        1e-5,
        {
            int(share * setup.total): factor
            for share, factor in ((1 / 8, 1e-3), (1 / 4, 1e-4), (3 / 8, 1e-3))
        },
    )
    common = _dynamic(setup)
    optimizer = sparse_optax.deep_rewiring(
        shared.inner(setup),
        density=common["density"],
        learning_rate=learning_rate(setup.config, setup.steps_per_epoch),
        l1=1e-4,
        gradient_noise=lambda count: jnp.sqrt(2 * 0.01 * temperatures(count)),
        update_stop=setup.total,
        key=setup.key,
    )
    return shared.masked(optimizer)


def ham(setup: Setup) -> Build:
    """Sparse momentum around SGD with hyperbolic aware minimization."""
    # The 200 that is told of ImageNet's learning rates diverges at 0.1.
    rate = learning_rate(setup.config, setup.steps_per_epoch)
    inner = sparse_optax.ham(shared.inner(setup), rate, alpha=1.0)
    optimizer = sparse_optax.sparse_momentum_regrow(
        inner, **_dynamic(setup), prune_rate=shared.rate(setup)
    )
    return shared.masked(optimizer)


def long_average_regrow(setup: Setup) -> Build:
    """This library's: growth by an average of the gradient over a period."""
    return shared.masked(
        sparse_optax.long_average_regrow(shared.inner(setup), **_dynamic(setup))
    )


def falling_budget_regrow(setup: Setup) -> Build:
    """This library's: five times the weights at first, the final number from 60% on."""
    return shared.masked(
        sparse_optax.falling_budget_regrow(shared.inner(setup), **_dynamic(setup))
    )


# --- from dense to sparse while training ----------------------------------------------
def _pruning(setup: Setup) -> dict[str, Any]:
    """Pruning in the first three quarters of the run; the rest trains what is left."""
    return {
        "density": shared.budget(setup),
        "update_period": setup.period,
        "update_stop": setup.settled,
    }


def granet(setup: Setup) -> Build:
    """GraNet, from dense."""
    optimizer = sparse_optax.granet(
        shared.inner(setup), **_pruning(setup), key=setup.key
    )
    return shared.masked(optimizer)


def gradual_magnitude(setup: Setup) -> Build:
    """Gradual magnitude pruning along the cubic schedule."""
    return shared.masked(
        sparse_optax.gradual_magnitude(
            shared.inner(setup), **_pruning(setup), pattern=_pattern(setup)
        )
    )


def iterative_magnitude(setup: Setup) -> Build:
    """Iterative magnitude pruning: equal shares of what is left, many times."""
    prunes = max(1, 3 * setup.config.epochs // 4 // setup.config.update_epochs)
    optimizer = sparse_optax.iterative_magnitude(
        shared.inner(setup),
        density=shared.budget(setup),
        prunes=prunes,
        update_period=setup.period,
    )
    return shared.masked(optimizer)


def one_shot_magnitude(setup: Setup) -> Build:
    """One prune by magnitude in each layer, in the middle of the run."""
    optimizer = sparse_optax.one_shot_magnitude(
        shared.inner(setup), density=shared.budget(setup), at=max(1, setup.total // 2)
    )
    return shared.masked(optimizer)


def ac_dc(setup: Setup) -> Build:
    """AC/DC: dense and sparse phases in turn, sparse for the last quarter."""
    optimizer = sparse_optax.ac_dc(
        shared.inner(setup),
        **{**_pruning(setup), "update_period": max(1, setup.total // 16)},
    )
    return shared.masked(optimizer)


def network_surgery(setup: Setup) -> Build:
    """Dynamic network surgery of a trained network, at an exact number."""
    optimizer = sparse_optax.network_surgery(
        shared.inner(setup),
        density=shared.budget(setup),
        update_stop=setup.settled,
    )
    return shared.masked(optimizer)


def learning_compression(setup: Setup) -> Build:
    """Learning-compression of a trained network, whose penalty grows each epoch."""
    # The authors' 1.1 is for twenty times as many epochs.
    optimizer = sparse_optax.learning_compression(
        shared.inner(setup),
        density=setup.config.density,
        update_period=min(setup.period, setup.settled),
        update_stop=setup.settled,
        growth=1.2,
    )
    return shared.masked(optimizer)


def straight_through_magnitude(setup: Setup) -> Build:
    """The largest of dense hidden weights, chosen anew at every step."""
    optimizer = sparse_optax.straight_through_magnitude(
        shared.inner(setup),
        density=shared.budget(setup),
        update_stop=setup.settled,
    )
    return shared.masked(optimizer)


def top_kast(setup: Setup) -> Build:
    """Top-KAST, with twice as many weights in the backward set."""
    optimizer = sparse_optax.top_kast(
        shared.inner(setup),
        density=shared.budget(setup),
        backward_density=shared.budget(setup, min(1.0, 2 * setup.config.density)),
        update_stop=setup.settled,
    )
    return shared.masked(optimizer)


BUILDERS: dict[str, Callable[[Setup], Build]] = {
    "dense": dense,
    "sparse_momentum": sparse_momentum,
    "gsm": gsm,
    "sparse_evolutionary": sparse_evolutionary,
    "dynamic_sparse": dynamic_sparse,
    "rigl": rigl,
    "in_time_over_parameterization": in_time_over_parameterization,
    "deep_rewiring": deep_rewiring,
    "ham": ham,
    "long_average_regrow": long_average_regrow,
    "falling_budget_regrow": falling_budget_regrow,
    "static": static,
    "thin": dense,  # of a smaller model, which the run names
    "snip": snip,
    "synflow": synflow,
    "ticket": ticket,
    "gradual_magnitude": gradual_magnitude,
    "granet": granet,
    "iterative_magnitude": iterative_magnitude,
    "one_shot_magnitude": one_shot_magnitude,
    "ac_dc": ac_dc,
    "straight_through_magnitude": straight_through_magnitude,
    "top_kast": top_kast,
    "network_surgery": network_surgery,
    "magnitude": magnitude,
    "fisher": fisher,
    "optimal_brain_damage": optimal_brain_damage,
    "layerwise_obs": layerwise_obs,
    "l1": l1,
    "l2": l2,
    "learning_compression": learning_compression,
    "soft_weight_sharing": soft_weight_sharing,
    "sparse_variational_dropout": sparse_variational_dropout,
    "l0_regularization": l0_regularization,
    "wanda": wanda,
    "sparse_gpt": sparse_gpt,
}
