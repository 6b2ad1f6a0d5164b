"""What defines a training run: one frozen dataclass, and the recipes that fill it."""

import dataclasses
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, Literal

from sparse_optax.experiments import data, methods, models

if TYPE_CHECKING:
    DatasetName = ModelName = MethodName = str
else:  # the registries are the choices of the command line
    DatasetName = Literal[data.NAMES]
    ModelName = Literal[tuple(models.MODELS)]
    MethodName = Literal[tuple(methods.METHODS)]


@dataclasses.dataclass(frozen=True)
class Base:
    """Dense training that comes before the method (GSM starts from a trained net).

    Attributes:
      epochs: epochs of dense training; 0 starts the method from fresh weights.
        Default: 0, for GSM the recipe of the data set.
      batch_size: images a step.
      learning_rate: learning rate at the start.
      drop_epochs: epochs after which the learning rate is multiplied by drop_factor.
      momentum: momentum of SGD, in [0, 1).
    """

    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    drop_epochs: tuple[int, ...] | None = None
    momentum: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. What is left out comes from the recipe of the data set.

    Attributes:
      dataset: images to train on. The digits are bundled with scikit-learn; the others
        are read from $SPARSE_OPTAX_DATA or, where that is not set, downloaded.
      model: network.
      method: how the weights become sparse; "dense" keeps all of them.
      density: share of the weights that is kept, in (0, 1]; biases are not counted.
      epochs: passes over the training images.
      batch_size: images a step; a last partial batch is left out of the epoch.
      learning_rate: learning rate at the start.
      drop_steps: steps after which the learning rate is multiplied by drop_factor.
      drop_epochs: the same in epochs; give one of the two.
      drop_factor: what a drop multiplies the learning rate by.
      momentum: momentum of SGD, in [0, 1).
      nesterov: Nesterov's form of momentum.
      weight_decay: L2 coefficient, added to the gradient.
      decay: what decays: all parameters or only the kernels.
      prune_rate: sparse momentum: share of the kept weights replaced in the first
        cycle; it falls to 0 along a half cosine.
      update_epochs: sparse momentum: epochs between two cycles.
      gate: GSM: share of the weights whose gradient passes each step. Default: the
        density.
      settle_epoch: GSM: epoch from which only the largest weights are trained, the
        rest decays. Default: never, as in the paper.
      base: dense training before the method.
      init: initial weights: PyTorch's default, or Xavier uniform with zero biases.
      split: "lee" holds back the last tenth of the training images for validation,
        "full" trains on all.
      seed: drives the initial weights, the order of the images and every random
        choice of the method.
    """

    dataset: DatasetName = "digits"
    model: ModelName = "lenet-300-100"
    method: MethodName = "sparse_momentum"
    density: float = 0.05
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    drop_steps: tuple[int, ...] | None = None
    drop_epochs: tuple[int, ...] | None = None
    drop_factor: float = 0.1
    momentum: float | None = None
    nesterov: bool = True
    weight_decay: float | None = None
    decay: Literal["all", "kernels"] | None = None
    prune_rate: float = 0.5
    update_epochs: int = 1
    gate: float | None = None
    settle_epoch: int | None = None
    base: Base = Base()
    init: Literal["torch", "xavier"] | None = None
    split: Literal["lee", "full"] = "lee"
    seed: int = 0


_NO_BASE = dict(epochs=0, batch_size=0, learning_rate=0.0, drop_epochs=(), momentum=0.0)
_SGD = dict(momentum=0.9, weight_decay=5e-4, decay="all", init="torch")
_LEE_MNIST = dict(
    epochs=100, batch_size=100, learning_rate=0.1, drop_steps=(25_000, 50_000)
)
# Recipes by data set: the protocol of Lee et al. as the sparse momentum paper ran it
# (https://arxiv.org/abs/1907.04840), and a short one for the digits.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(epochs=100, batch_size=32, learning_rate=0.1, drop_epochs=(60, 85)),
    "mnist": _LEE_MNIST,
    "fashion-mnist": _LEE_MNIST,
    "cifar10": dict(
        epochs=250, batch_size=128, learning_rate=0.1, drop_steps=(30_000, 60_000)
    ),
}
# GSM starts from a trained network and needs a momentum near one to carry the passive
# weights to zero (https://arxiv.org/abs/1909.12778).
_GSM = dict(momentum=0.99, weight_decay=5e-4, decay="kernels", init="xavier")
_GSM_MNIST = dict(
    epochs=240,
    batch_size=256,
    learning_rate=3e-2,
    drop_epochs=(160, 200),
    base=dict(
        epochs=100,
        batch_size=256,
        learning_rate=3e-2,
        drop_epochs=(20, 40, 60, 80),
        momentum=0.9,
    ),
)
GSM_RECIPES: dict[str, dict[str, Any]] = {
    "digits": dict(
        # Few steps: decay is four times as strong, to reach zero all the same.
        weight_decay=2e-3,
        epochs=300,
        batch_size=64,
        learning_rate=1e-2,
        drop_epochs=(200, 250),
        base=dict(
            epochs=40,
            batch_size=64,
            learning_rate=3e-2,
            drop_epochs=(20, 30),
            momentum=0.9,
        ),
    ),
    "mnist": _GSM_MNIST,
    "fashion-mnist": _GSM_MNIST,
    "cifar10": _GSM_MNIST,
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills what was left out from the recipe, and checks every value.

    Args:
      config: the run as it was asked for.

    Returns:
      The run with no None but ``gate`` and ``settle_epoch`` where they are not used.

    Raises:
      ValueError: for a value outside its range, naming it and the range.

    Examples:
      >>> from sparse_optax.experiments import config
      >>> run = config.resolve(config.TrainConfig(dataset="mnist", density=0.02))
      >>> run.epochs, run.batch_size, run.drop_steps
      (100, 100, (25000, 50000))
    """
    _choose("dataset", config.dataset, data.NAMES)
    _choose("model", config.model, models.MODELS)
    _choose("method", config.method, methods.METHODS)
    gsm = config.method == "gsm"
    recipe = dict((GSM_RECIPES if gsm else RECIPES)[config.dataset])
    recipe_base = recipe.pop("base", _NO_BASE)
    recipe = {**(_GSM if gsm else _SGD), **recipe}
    if config.drop_steps and config.drop_epochs:
        raise ValueError(
            "TrainConfig: both drop_steps and drop_epochs are given; give one of them."
        )
    if config.drop_steps is not None or config.drop_epochs is not None:
        recipe.pop("drop_steps", None)
        recipe.pop("drop_epochs", None)
    recipe = {"drop_steps": (), "drop_epochs": (), **recipe}
    filled = _fill(config, recipe)
    base = _NO_BASE if config.base.epochs == 0 else _fill_base(config, recipe_base)
    filled = dataclasses.replace(filled, base=Base(**base))
    if config.method == "dense":
        filled = dataclasses.replace(filled, density=1.0)
    _check(filled)
    return filled


def _fill(config, recipe):
    missing = {
        name: value for name, value in recipe.items() if getattr(config, name) is None
    }
    return dataclasses.replace(config, **missing)


def _fill_base(config, recipe_base):
    given = {k: v for k, v in dataclasses.asdict(config.base).items() if v is not None}
    if given and "epochs" not in given and recipe_base is _NO_BASE:
        raise ValueError(
            f"TrainConfig: base has {sorted(given)} but no epochs, and the recipe of "
            f"method={config.method!r} has no dense training before it; set "
            "base.epochs."
        )
    if given.get("epochs") and recipe_base is _NO_BASE:
        recipe_base = GSM_RECIPES[config.dataset]["base"]
    return {**recipe_base, **given}


def _choose(name, value, allowed):
    if value not in allowed:
        raise ValueError(
            f"TrainConfig: {name}={value!r}; choose one of {', '.join(allowed)}."
        )


def _check(config):
    def need(ok, name, value, allowed):
        if not ok:
            raise ValueError(f"TrainConfig: {name}={value!r} must be {allowed}.")

    for name, stage in (("", config), ("base.", config.base)):
        least = 1 if not name else 0
        for field in ("epochs", "batch_size"):
            value = getattr(stage, field)
            need(value >= least, name + field, value, f"at least {least}")
        rate = stage.learning_rate
        need(
            math.isfinite(rate) and rate >= 0,
            name + "learning_rate",
            rate,
            "a finite number, 0 or above",
        )
        need(0 <= stage.momentum < 1, name + "momentum", stage.momentum, "in [0, 1)")
    need(0 < config.density <= 1, "density", config.density, "in (0, 1]")
    need(
        config.method != "gsm" or config.decay == "kernels",
        "decay",
        config.decay,
        "'kernels' for method='gsm', which decays what it prunes",
    )
    need(config.weight_decay >= 0, "weight_decay", config.weight_decay, "0 or above")
    need(0 <= config.prune_rate <= 1, "prune_rate", config.prune_rate, "in [0, 1]")
    need(config.update_epochs >= 1, "update_epochs", config.update_epochs, "1 or more")
    need(config.seed >= 0, "seed", config.seed, "0 or above")
    need(
        config.gate is None or 0 < config.gate <= 1,
        "gate",
        config.gate,
        "in (0, 1], or left out for the density",
    )
    need(
        config.settle_epoch is None or 0 <= config.settle_epoch <= config.epochs,
        "settle_epoch",
        config.settle_epoch,
        f"between 0 and epochs={config.epochs}",
    )


def base_of(config: TrainConfig) -> TrainConfig:
    """The dense run that comes before ``config``, as a run of its own.

    Runs that differ only in what follows share it.

    Args:
      config: a resolved run with ``base.epochs`` above 0.

    Returns:
      A resolved run of method ``"dense"``.

    Examples:
      >>> from sparse_optax.experiments import config
      >>> run = config.resolve(config.TrainConfig(dataset="mnist", method="gsm"))
      >>> config.base_of(run).epochs, config.base_of(run).momentum
      (100, 0.9)
    """
    plain = TrainConfig()
    return dataclasses.replace(
        config,
        method="dense",
        density=1.0,
        drop_steps=(),
        prune_rate=plain.prune_rate,
        update_epochs=plain.update_epochs,
        gate=None,
        settle_epoch=None,
        base=Base(**_NO_BASE),
        **dataclasses.asdict(config.base),
    )


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The run as JSON would give it back: tuples are lists.

    Args:
      config: a run.

    Returns:
      A nested dict of numbers, strings and lists.

    Examples:
      >>> from sparse_optax.experiments import config
      >>> config.as_dict(config.TrainConfig(drop_steps=(5,)))["drop_steps"]
      [5]
    """
    return json.loads(json.dumps(dataclasses.asdict(config)))


def default_name(config: TrainConfig) -> str:
    """A readable name of a resolved run, and a digest of all its values.

    Args:
      config: a resolved run.

    Returns:
      A name that serves as a file name.

    Examples:
      >>> from sparse_optax.experiments import config
      >>> config.default_name(config.resolve(config.TrainConfig())).rsplit("-", 1)[0]
      'digits-lenet-300-100-sparse_momentum-d0.05-s0'
    """
    text = json.dumps(as_dict(config), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return (
        f"{config.dataset}-{config.model}-{config.method}"
        f"-d{config.density:g}-s{config.seed}-{digest}"
    )
