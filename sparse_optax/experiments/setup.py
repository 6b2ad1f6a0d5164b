"""What the builder of a method may look at, what it gives, and the optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import sparse_optax
from sparse_optax import budgets, schedules
from sparse_optax.experiments import models
from sparse_optax.experiments.config import Resolved
from sparse_optax.experiments.sizes import SHARES

Params = Any
# Images whose gradients are held at a time.
SLICE = 50
_DECAYS = {
    "cosine": schedules.cosine_prune_rate,
    "linear": schedules.linear_prune_rate,
    "constant": lambda rate, stop: schedules.constant_prune_rate(rate),
}


def _unchanged(params: Params, opt_state: Any) -> Params:
    del opt_state
    return params


class Build(NamedTuple):
    """What a method adds to a training run.

    Attributes:
      optimizer: the Optax transformation that trains.
      start: ``start(params, opt_state)`` gives the parameters of the first forward
        pass, from fresh or loaded ones.
      masks: ``masks(opt_state)`` gives the mask tree; None where there is none.
      cut: ``cut(params, opt_state, forward)`` gives the final, sparse parameters where
        training alone does not leave exact zeros (GSM); None otherwise. ``forward`` is
        that of :class:`Setup` with the statistics that training has left.
      sample: ``sample(params, opt_state)`` gives the parameters that the loss is
        computed with.
      shown: ``shown(params, opt_state)`` gives those of a test during training.
    """

    optimizer: optax.GradientTransformation
    start: Callable[[Params, Any], Params] = _unchanged
    masks: Callable[[Any], Any] | None = None
    cut: Callable[[Params, Any, Callable[..., Any]], Params] | None = None
    sample: Callable[[Params, Any], Params] = _unchanged
    shown: Callable[[Params, Any], Params] = _unchanged


class Setup(NamedTuple):
    """What a builder may look at.

    Attributes:
      config: the resolved run.
      steps_per_epoch: steps of one epoch, at least 1.
      key: a random key for the method's own choices.
      forward: ``forward(params, images)`` gives the logits.
      params: the parameters that the run starts from.
      images: training images and labels, for criteria that look at data.
      draw: ``draw(key)`` gives fresh initial parameters.
      init_key: the key with which this run's were drawn.
    """

    config: Resolved
    steps_per_epoch: int
    key: jax.Array
    forward: Callable[[Params, jax.Array], jax.Array]
    params: Params
    images: tuple[Any, Any]
    draw: Callable[[jax.Array], Params]
    init_key: jax.Array

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.config.epochs * self.steps_per_epoch

    @property
    def examples(self) -> int:
        """Training examples of an epoch."""
        return self.steps_per_epoch * self.config.batch_size

    @property
    def settled(self) -> int:
        """Step from which on methods that prune while they train keep their masks."""
        return 3 * self.total // 4

    @property
    def period(self) -> int:
        """Steps between two cycles, at least one."""
        epochs, cycles = self.config.update_epochs, self.config.cycles
        steps = epochs * self.steps_per_epoch
        if cycles > steps:
            raise ValueError(
                f"train: cycles={cycles} must be at most the {steps} steps of "
                f"update_epochs={epochs}. Give fewer."
            )
        return steps // cycles

    def loss(self, params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Mean cross-entropy of a batch."""
        images, labels = batch
        return mean_loss(self.config, self.forward(params, images), labels)

    def example_loss(self, params: Params, example: tuple) -> jax.Array:
        """Cross-entropy of one image."""
        image, label = example
        return self.loss(params, (image[None], label[None]))

    def batches(self, size: int) -> list[tuple[jax.Array, jax.Array]]:
        """The same in slices: a gradient for each image takes memory."""
        x, y = self.batch(size)
        cuts = range(0, len(x) - len(x) % SLICE or len(x), SLICE)
        return [(x[i : i + SLICE], y[i : i + SLICE]) for i in cuts]

    def batch(self, size: int) -> tuple[jax.Array, jax.Array]:
        """Images of a random batch that the key draws, and their labels."""
        x, y = self.images
        chosen = jax.random.fold_in(self.key, 1)
        rows = jax.random.permutation(chosen, len(x))[: min(size, len(x))]
        return x[rows], y[rows]


def mean_loss(config: Resolved, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy that a run minimises, a mean over its labels.

    Args:
      config: a resolved run, whose ``label_smoothing`` is spread over all classes.
      logits: shape (..., classes).
      labels: whole numbers, shape (...).

    Returns:
      A scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments import config, setup
      >>> run = config.resolve(config.TrainConfig(label_smoothing=0.5))
      >>> logits, labels = jnp.array([[0.0, 2.0]]), jnp.array([1])
      >>> round(float(setup.mean_loss(run, logits, labels)), 4)
      0.6269
    """
    if not config.label_smoothing:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()
    shares = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    shares = optax.smooth_labels(shares, config.label_smoothing)
    return optax.softmax_cross_entropy(logits, shares).mean()


def learning_rate(config: Resolved, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of a run, step by step.

    Args:
      config: a resolved run.
      steps_per_epoch: steps of one epoch, at least 1.

    Returns:
      An Optax schedule.

    Examples:
      >>> from sparse_optax.experiments import config, setup
      >>> run = config.resolve(config.TrainConfig(drop_epochs=(2,), learning_rate=1.0))
      >>> rate = setup.learning_rate(run, steps_per_epoch=10)
      >>> float(rate(19)), round(float(rate(20)), 6)
      (1.0, 0.1)
    """
    if config.schedule == "one_cycle":
        total = config.epochs * steps_per_epoch
        return optax.cosine_onecycle_schedule(total, config.learning_rate)
    steps = config.drop_steps or [
        epoch * steps_per_epoch for epoch in config.drop_epochs
    ]
    dropping = optax.piecewise_constant_schedule(
        config.learning_rate, {int(step): config.drop_factor for step in steps}
    )
    if not config.warmup_epochs:
        return dropping
    warmup = config.warmup_epochs * steps_per_epoch
    return lambda step: dropping(step) * jnp.minimum(1.0, step / warmup)


def adamw(config: Resolved, steps_per_epoch: int) -> optax.GradientTransformation:
    """AdamW with optax's decay rates; its decay is not in the gradient.

    Args:
      config: a resolved run.
      steps_per_epoch: steps of one epoch, at least 1.

    Returns:
      ``optax.adamw``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments import config, setup
      >>> run = config.TrainConfig(dataset="topics", model="transformer")
      >>> optimizer = setup.adamw(config.resolve(run), 10)
      >>> optimizer.init({"w": jnp.ones((2, 2))})[0].count.item()
      0
    """
    return optax.adamw(
        learning_rate(config, steps_per_epoch),
        weight_decay=config.weight_decay,
        mask=sparse_optax.eligible if config.decay == "kernels" else None,
    )


def sgd(config: Resolved, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD with momentum and L2 decay inside the gradient.

    Args:
      config: a resolved run.
      steps_per_epoch: steps of one epoch, at least 1.

    Returns:
      ``chain(add_decayed_weights, sgd)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments import config, setup
      >>> optimizer = setup.sgd(config.resolve(config.TrainConfig()), 10)
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


def inner(setup: Setup) -> optax.GradientTransformation:
    """The optimizer that a run's method wraps."""
    make = adamw if setup.config.optimizer == "adamw" else sgd
    return make(setup.config, setup.steps_per_epoch)


def rate(setup: Setup) -> optax.Schedule:
    """The prune rate of a run, step by step."""
    decay = _DECAYS[setup.config.prune_decay]
    return decay(setup.config.prune_rate, stop=setup.total)


def budget(setup: Setup, density: float | None = None) -> Any:
    """The run's density, or another, in the shares that the run asks for."""
    density = setup.config.density if density is None else density
    if setup.config.shares == "mostafa_wang" and density < 1:
        last = not models.MODELS[setup.config.model].large_classifier
        return mostafa_wang(setup.params, density, last=last)
    # A uniform density is the density itself.
    even = setup.config.shares == "uniform" or density == 1
    return density if even else SHARES[setup.config.shares](density)


def mostafa_wang(params: Params, density: float, *, last: bool = True) -> Any:
    """The budget of Mostafa and Wang: first layer, last layer and shortcuts dense.

    Args:
      params: parameters of a residual network.
      density: share of the weights of the other layers that is kept, in (0, 1].
      last: whether the last layer stays dense, too.

    Returns:
      A budget for ``density``; WRN-28-2 keeps 12,464 weights dense besides, and
      ResNet-50, but for its last layer, 2,778,304.

    Raises:
      ValueError: for a network without such layers.

    References:
      Mostafa & Wang, `Parameter efficient training of deep convolutional neural
      networks by dynamic sparse reparameterization
      <https://arxiv.org/abs/1902.05967>`_, 2019.
    """
    chosen = jax.tree.leaves(sparse_optax.eligible(params))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for (path, leaf), counted in zip(leaves, chosen, strict=True)
        if counted
    }
    dense = [
        name
        for name in sizes
        if name == "conv/kernel"
        or (last and name == "fc/kernel")
        or "shortcut/" in name
    ]
    if not dense:
        raise ValueError(
            "train: shares='mostafa_wang' keeps the layers conv, fc and shortcut "
            f"dense; there must be one among {', '.join(sizes)}. Choose other shares, "
            "or a residual network."
        )
    whole = sum(sizes[name] for name in dense)
    rest = sum(sizes.values()) - whole
    kept = whole + budgets.count(density, rest)
    return budgets.uniform(kept / (whole + rest), dense=dense)


def masked(optimizer: optax.GradientTransformation) -> Build:
    """The build of a transformation that keeps masks and exact zeros itself."""
    start, masks = sparse_optax.sparsify, sparse_optax.get_masks
    return Build(optimizer, start=start, masks=masks)


def static(setup: Setup, masks: Any) -> Build:
    """The build of masks that never change."""
    return masked(sparse_optax.static_sparse(inner(setup), masks=masks))
