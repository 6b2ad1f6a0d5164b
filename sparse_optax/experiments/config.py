"""What defines a training run: one frozen dataclass, and the recipes that fill it."""

import dataclasses
import hashlib
import itertools
import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro

from sparse_optax.experiments import data, flags, models, recipes, sizes

if TYPE_CHECKING:
    DatasetName: TypeAlias = str
    ModelName: TypeAlias = str
    SharesName: TypeAlias = str
    PruneName: TypeAlias = str
    RedistributeName: TypeAlias = str
    GrowName: TypeAlias = str
    OptimizerName: TypeAlias = str
    ScheduleName: TypeAlias = str
    AugmentName: TypeAlias = str
    PixelsName: TypeAlias = str
    FinderName: TypeAlias = str
    PatternName: TypeAlias = str
    DtypeName: TypeAlias = str
else:  # the registries are the choices of the command line
    OptimizerName = Literal[recipes.OPTIMIZERS]
    ScheduleName = Literal[recipes.SCHEDULES]
    AugmentName = Literal[recipes.AUGMENT]
    PixelsName = Literal[recipes.PIXELS]
    FinderName = Literal[recipes.FINDERS]
    PatternName = Literal[recipes.PATTERNS]
    DtypeName = Literal[models.DTYPES]
    DatasetName = Literal[data.NAMES]
    ModelName = Literal[tuple(models.MODELS)]
    PruneName = Literal[recipes.PRUNE]
    RedistributeName = Literal[recipes.REDISTRIBUTE]
    GrowName = Literal[recipes.GROW]
    SharesName = Literal[recipes.SHARES]


# Steps are counted in 32 bits, and numbers are those of float32.
_MOST = 2**31 - 1
_LARGEST = 3.4e38


def flag(metavar: str, default: str) -> Any:
    """How ``--help`` shows a field whose default None stands for something."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


_RECIPE = "recipe of the data set"
Count = Annotated[int | None, flag("INT", _RECIPE)]
Number = Annotated[float | None, flag("FLOAT", _RECIPE)]
Counts = Annotated[tuple[int, ...] | None, flag("[INT ...]", _RECIPE)]


@dataclasses.dataclass(frozen=True)
class Base:
    """Dense training that comes before the method (GSM starts from a trained net).

    Attributes:
      epochs: epochs of dense training; 0 starts the method from fresh weights.
      batch_size: images a step.
      learning_rate: learning rate at the start.
      drop_epochs: epochs after which the learning rate is multiplied by drop_factor.
      momentum: momentum of SGD, in [0, 1).
      weight_decay: L2 coefficient, where it is not that of the run.
    """

    epochs: Annotated[int | None, flag("INT", "0; for gsm, " + _RECIPE)] = None
    batch_size: Count = None
    learning_rate: Number = None
    drop_epochs: Counts = None
    momentum: Number = None
    weight_decay: Annotated[float | None, flag("FLOAT", "that of the run")] = None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. What is left out comes from the recipe of the data set.

    Attributes:
      dataset: images to train on. The digits are bundled with scikit-learn; the others
        are read from $SPARSE_OPTAX_DATA or, where that is not set, downloaded. imagenet
        is a folder there, imagenet/train and imagenet/val, each with a folder of JPEG
        files for each class. topics is a text, the help pages of Python, for model
        transformer.
      model: network; for method thin, lenet-300-100 stands for the smaller one.
      method: how the weights become sparse; dense keeps all of them. The names of the
        library's functions and common ones (set, snfs, gmp, dns, obd) are understood;
        `sparse-optax methods` lists them.
      density: share of the weights that is kept, in (0, 1], as 0.05 or 5%; biases are
        not counted.
      budget: size of the finished network at most, in place of the density: 13310 is a
        number of weights; 200KB, 1.5KiB or 2MB is the size of the file of its weights,
        with biases, statistics and header (a KB has 1000 bytes, a KiB 1024); 10MFLOPs
        is what the kept weights cost for one image, two FLOPs for a multiplication and
        an addition.
      epochs: passes over the training images.
      batch_size: images a step; a last partial batch is left out of the epoch.
      learning_rate: learning rate at the start.
      drop_steps: steps after which the learning rate is multiplied by drop_factor.
      drop_epochs: the same in epochs; give one of the two.
      drop_factor: what a drop multiplies the learning rate by.
      optimizer: SGD with momentum, or AdamW with its usual decay rates.
      schedule: the learning rate at drops, or one cycle: up in the first 30% of the
        steps and down again, along cosines.
      warmup_epochs: epochs in which the learning rate rises from zero, before drops.
      label_smoothing: share of each label that is spread over all classes, in [0, 1).
      augment: random crops and flips of the training images, padded with their mirror
        images or with black, or, of imagenet, crops of a random size; validation and
        test images stay as they are.
      pixels: how pixels are normalised: by mean and deviation of each channel, or all
        to [-1, 1].
      dtype: what convolutions and dense layers compute in; weights are float32.
      momentum: momentum of SGD, in [0, 1).
      nesterov: Nesterov's form of momentum.
      weight_decay: L2 coefficient, added to the gradient.
      decay: what decays: all parameters or only the kernels.
      prune_rate: sparse momentum: share of the kept weights replaced in the first
        cycle.
      prune_decay: sparse momentum: how that share goes on; cosine and linear end in 0.
      prune: sparse momentum: whether each layer or the network as a whole loses its
        smallest weights.
      redistribute: sparse momentum: what says how many weights a layer gets back.
      grow: sparse momentum: what says which missing weights come.
      shares: how the density is shared among the layers; mostafa_wang keeps the first
        layer, the last (not that of a ResNet-50) and the shortcuts dense, and the
        density is that of the others.
      update_epochs: epochs between two cycles of methods that have cycles; RigL has
        one every 100 steps at least.
      cycles: cycles in that time, which is then cut into as many equal parts.
      pattern: what becomes sparse: single weights, or two of every four inputs of a
        unit, at a density of 0.5, for the methods gradual_magnitude, wanda and
        sparse_gpt.
      l1: strength of the L1 penalty of method l1.
      ticket: method ticket: the mask that the finder found, trained from its own
        initial weights; or a control: the mask shuffled within each layer, spread at
        random over the network, or trained from other initial weights.
      finder: method ticket: what finds the mask; magnitude takes the largest weights of
        the dense network that GSM starts from.
      gate: GSM: share of the weights whose gradient passes each step.
      settle_epoch: GSM: epoch from which only the largest weights are trained, the
        rest decays.
      base: dense training before the method.
      init: initial weights: PyTorch's default, or Xavier uniform with zero biases.
      split: lee holds back the last tenth of the training images for validation, full
        trains on all of them.
      seed: drives the initial weights, the order of the images and every random
        choice of the method; below 2^32.
    """

    dataset: DatasetName = "digits"
    model: ModelName = "lenet-300-100"
    method: Annotated[str, flags.METHOD] = "sparse_momentum"
    density: Annotated[float | None, flags.SHARE, flag("SHARE", "0.05")] = None
    budget: Annotated[str | None, flag("SIZE", "by the density")] = None
    epochs: Count = None
    batch_size: Count = None
    learning_rate: Number = None
    drop_steps: Counts = None
    drop_epochs: Counts = None
    drop_factor: float = 0.1
    optimizer: Annotated[
        OptimizerName | None, flag("{" + ",".join(recipes.OPTIMIZERS) + "}", _RECIPE)
    ] = None
    schedule: Annotated[
        ScheduleName | None, flag("{" + ",".join(recipes.SCHEDULES) + "}", _RECIPE)
    ] = None
    warmup_epochs: Count = None
    label_smoothing: float = 0.0
    augment: Annotated[
        AugmentName | None, flag("{" + ",".join(recipes.AUGMENT) + "}", _RECIPE)
    ] = None
    pixels: Annotated[
        PixelsName | None, flag("{" + ",".join(recipes.PIXELS) + "}", _RECIPE)
    ] = None
    dtype: DtypeName = "float32"
    momentum: Number = None
    nesterov: bool = True
    weight_decay: Number = None
    decay: Annotated[
        Literal["all", "kernels"] | None,
        flag("{all,kernels}", "all; for gsm, kernels"),
    ] = None
    prune_rate: float = 0.5
    prune_decay: Literal["cosine", "linear", "constant"] = "cosine"
    prune: PruneName = "magnitude"
    redistribute: RedistributeName = "momentum"
    grow: GrowName = "momentum"
    shares: Annotated[
        SharesName | None,
        flag("{" + ",".join(recipes.SHARES) + "}", "the method's own"),
    ] = None
    update_epochs: int = 1
    cycles: int = 1
    pattern: PatternName = "weights"
    l1: float = 1e-5
    ticket: Literal["own", "shuffled", "random", "reinitialised"] = "own"
    finder: FinderName = "sparse_momentum"
    gate: Annotated[float | None, flag("FLOAT", "the density")] = None
    settle_epoch: Annotated[int | None, flag("INT", "never, as in the paper")] = None
    base: Base = Base()
    init: Annotated[
        Literal["torch", "xavier"] | None,
        flag("{torch,xavier}", "torch; for gsm, xavier, but on imagenet and topics"),
    ] = None
    split: Literal["lee", "full"] = "lee"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ResolvedBase(Base):
    """A :class:`Base` with every value filled in; no epochs, no base."""

    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    drop_epochs: tuple[int, ...] = ()
    momentum: float = 0.0


@dataclasses.dataclass(frozen=True)
class Resolved(TrainConfig):
    """A :class:`TrainConfig` with every value filled in, as :func:`resolve` gives it.

    Only ``gate`` and ``settle_epoch`` may be None: the paper's GSM has neither; and
    ``budget``, whose density is filled in where it is given.
    """

    density: float = recipes.DENSITY
    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    drop_steps: tuple[int, ...] = ()
    drop_epochs: tuple[int, ...] = ()
    optimizer: Literal["sgd", "adamw"] = "sgd"
    schedule: Literal["drops", "one_cycle"] = "drops"
    warmup_epochs: int = 0
    augment: Literal["none", "reflect", "zero", "random_resized_crop"] = "none"
    pixels: Literal["channels", "half"] = "channels"
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: Literal["all", "kernels"] = "all"
    shares: Literal[
        "uniform", "erdos_renyi", "erdos_renyi_kernel", "linear", "mostafa_wang"
    ] = "uniform"
    base: ResolvedBase = ResolvedBase()
    init: Literal["torch", "xavier"] = "torch"


# Values that runs have had since later versions, and what they stood at before: names
# of runs and records of then are those of runs with these.
EARLIER: dict[str, Any] = dict(
    optimizer="sgd",
    schedule="drops",
    warmup_epochs=0,
    label_smoothing=0.0,
    augment="none",
    pixels="channels",
    dtype="float32",
    cycles=1,
    pattern="weights",
    finder="sparse_momentum",
)
_CHOICES = dict(
    optimizer="OPTIMIZERS", schedule="SCHEDULES", augment="AUGMENT", pixels="PIXELS"
)


def resolve(config: TrainConfig) -> Resolved:
    """Fills what was left out from the recipe, and checks every value.

    Args:
      config: the run as it was asked for; a resolved one comes back unchanged.

    Returns:
      The run with every value filled in.

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
    config = dataclasses.replace(config, method=recipes.method_named(config.method))
    _choose("prune_decay", config.prune_decay, recipes.DECAYS)
    _choose("prune", config.prune, recipes.PRUNE)
    _choose("redistribute", config.redistribute, recipes.REDISTRIBUTE)
    if config.shares is not None:
        _choose("shares", config.shares, recipes.SHARES)
    _choose("grow", config.grow, recipes.GROW)
    _choose("finder", config.finder, recipes.FINDERS)
    _choose("pattern", config.pattern, recipes.PATTERNS)
    _choose("dtype", config.dtype, models.DTYPES)
    for name in ("optimizer", "schedule", "augment", "pixels"):
        value = getattr(config, name)
        if value is not None:
            _choose(name, value, getattr(recipes, _CHOICES[name]))
    if models.MODELS[config.model].text != (config.dataset == "topics"):
        raise ValueError(
            f"TrainConfig: model={config.model!r} does not fit "
            f"dataset={config.dataset!r}; model='transformer' and dataset='topics' go "
            "together. Give both, or neither."
        )
    if config.drop_steps and config.drop_epochs:
        raise ValueError(
            "TrainConfig: both drop_steps and drop_epochs are given; give one of them."
        )
    method = recipes.METHODS[config.method]
    asked, config = config, _with_density(config)
    if config.method == "thin":
        config = dataclasses.replace(config, model=_thin_model(config))
    recipe = {
        **(recipes.GSM if method.recipe == "gsm" else recipes.SGD),
        **recipes.BY_METHOD[method.recipe][config.dataset],
        "shares": method.shares,
    }
    plain = recipe.get("base")
    recipe["base"] = _resolve_base(config, plain)
    if not isinstance(asked, Resolved):
        _refuse_unread(asked, recipe)
        _refuse_late_drops(asked, recipe, plain)
    # Drops that are given replace the drops of the recipe, whatever their unit.
    if config.drop_steps is not None or config.drop_epochs is not None:
        recipe |= {"drop_steps": (), "drop_epochs": ()}
    given = (
        _given(config)
        if config.method != "dense"
        else {**_given(config), **recipes.DENSE}
    )
    resolved = Resolved(**{**recipe, **given, "base": recipe["base"]})
    _check(resolved)
    return resolved


def _refuse_unread(config, recipe) -> None:
    """Raises for a value that changes nothing, since others leave it no part."""
    given = _given(config)
    plain = {**_given(TrainConfig()), **recipe}
    whole = {**plain, **given}
    why: dict[str, str] = {}
    method = f"method={config.method!r}, which"
    if config.method in ("dense", "thin"):
        why["shares"] = f"{method} shares nothing out"
    if recipes.METHODS[config.method].pooled:
        ranks = "ranks the weights of all layers at once and shares nothing out"
        why["shares"] = f"{method} {ranks}"
    if config.method in recipes.ADAM:
        reason = f"{method} trains with Adam and without decay"
        why |= dict.fromkeys(recipes.OF_OPTIMIZERS, reason)
    elif whole["optimizer"] == "adamw":
        reason = "optimizer='adamw', which has decay rates of its own"
        why |= dict.fromkeys(("momentum", "nesterov"), reason)
    if whole["schedule"] == "one_cycle":
        reason = "schedule='one_cycle', which is the whole course of the rate"
        names = ("drop_steps", "drop_epochs", "drop_factor", "warmup_epochs")
        why |= dict.fromkeys(names, reason)
    none = {"drop_steps": (), "drop_epochs": (), "warmup_epochs": 0}
    for name, reason in why.items():
        if name in given and given[name] not in (none.get(name), plain.get(name)):
            raise ValueError(
                f"TrainConfig: {name}={given[name]!r} must be left out for {reason}. "
                "Leave it out."
            )
    if config.method == "dense" and config.density not in (None, 1.0):
        raise ValueError(
            f"TrainConfig: density={config.density!r} must be 1, or left out, for "
            "method='dense', which keeps all weights. Leave it out, or choose another "
            "method."
        )


def _refuse_late_drops(config, recipe, base) -> None:
    """Raises for drops of the learning rate that come after the last epoch."""
    stages = {"": (config, recipe, config.epochs or recipe["epochs"])}
    if recipe["base"].epochs:
        stages["base."] = (config.base, base or {}, recipe["base"].epochs)
    for name, (given, plain, epochs) in stages.items():
        drops = given.drop_epochs or ()
        # Those of the recipe stay where fewer epochs are given.
        if drops not in ((), plain.get("drop_epochs")) and max(drops) >= epochs:
            raise ValueError(
                f"TrainConfig: {name}drop_epochs={drops!r} must be below "
                f"{name}epochs={epochs}, or the rate never falls. Give earlier ones, "
                "or more epochs."
            )


def _with_density(config):
    """The run with the density that its budget asks for."""
    if config.budget is None:
        density = recipes.DENSITY if config.density is None else config.density
        return dataclasses.replace(config, density=density)
    size = sizes.parse(config.budget)
    if config.method in ("dense", "thin"):
        raise ValueError(
            f"TrainConfig: budget={config.budget!r} must be left out for method="
            f"{config.method!r}, whose size is that of its network. Leave it out, or "
            "choose another method."
        )
    if config.density is not None and not isinstance(config, Resolved):
        raise ValueError(
            f"TrainConfig: both density={config.density!r} and budget="
            f"{config.budget!r} are given; give one of them."
        )
    if config.shares == "mostafa_wang":
        raise ValueError(
            f"TrainConfig: budget={config.budget!r} must be left out for shares="
            "'mostafa_wang', whose density is that of some of the layers. Leave one of "
            "them out."
        )
    method = recipes.METHODS[config.method]
    still = config.method == "sparse_momentum" and (
        config.prune == "magnitude"
        and config.redistribute == "none"
        and config.grow != "global_momentum"
    )
    density = sizes.density(
        size,
        config.model,
        config.dataset,
        config.shares or method.shares,
        free=method.pooled or (method.moves and not still),
    )
    return dataclasses.replace(config, density=density, budget=str(size))


def _thin_model(config) -> str:
    """The smaller network that has as many weights as the density keeps."""
    name = f"thin-lenet-{config.density:g}"
    names = [n for n in models.MODELS if n.startswith("thin-lenet-")]
    there = [n.removeprefix("thin-lenet-") for n in names]
    if config.model not in ("lenet-300-100", name):
        raise ValueError(
            f"TrainConfig: model={config.model!r} must be 'lenet-300-100' for "
            "method='thin'; use that one."
        )
    if name not in models.MODELS:
        raise ValueError(
            f"TrainConfig: density={config.density!r} must be one of "
            f"{', '.join(there)} for method='thin'; choose one of these."
        )
    return name


def _given(config) -> dict[str, Any]:
    """The fields that are not None, without going into nested dataclasses."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def _resolve_base(config, recipe) -> ResolvedBase:
    given = _given(config.base)
    if given.get("epochs") == 0:
        return ResolvedBase()
    if recipe is None and "epochs" in given:
        recipe = recipes.GSM_RECIPES[config.dataset]["base"]
    if recipe is None and given:
        raise ValueError(
            f"TrainConfig: base has {sorted(given)} but no epochs, and the recipe of "
            f"method={config.method!r} has no dense training before it; set "
            "base.epochs."
        )
    return ResolvedBase(**{**(recipe or {}), **given})


def _choose(name, value, allowed):
    if value not in allowed:
        raise ValueError(
            f"TrainConfig: {name}={value!r}; choose one of {', '.join(allowed)}."
        )


def _check(config):
    def need(ok, name, value, allowed):
        if not ok:
            raise ValueError(
                f"TrainConfig: {name}={value!r} must be {allowed}. Give such a value, "
                "or leave it out for the default."
            )

    def need_number(name, value):
        allowed = f"a finite number, 0 or above, up to {_LARGEST:g}"
        need(0 <= value <= _LARGEST, name, value, allowed)

    def need_drops(name, value, most):
        ordered = all(a < b for a, b in itertools.pairwise(value))
        right = ordered and all(1 <= each <= most for each in value)
        allowed = f"numbers from 1 to {most}, each once and in increasing order"
        need(right, name, value, allowed)

    stages = {"": config}
    if config.base != ResolvedBase():
        stages["base."] = config.base
        need(
            config.base.epochs >= 1,
            "base.epochs",
            config.base.epochs,
            "0, for no dense training, or more",
        )
    for name, stage in stages.items():
        for field in ("epochs", "batch_size"):
            value = getattr(stage, field)
            need(value >= 1, name + field, value, "at least 1")
        need_number(name + "learning_rate", stage.learning_rate)
        need(0 <= stage.momentum < 1, name + "momentum", stage.momentum, "in [0, 1)")
        need_drops(name + "drop_epochs", stage.drop_epochs, _MOST)
    need_drops("drop_steps", config.drop_steps, _MOST)
    need_number("drop_factor", config.drop_factor)
    need(0 < config.density <= 1, "density", config.density, "in (0, 1]")
    need(
        config.method != "gsm" or config.decay == "kernels",
        "decay",
        config.decay,
        "'kernels' for method='gsm', which decays what it prunes",
    )
    need_number("weight_decay", config.weight_decay)
    need(0 <= config.prune_rate <= 1, "prune_rate", config.prune_rate, "in [0, 1]")
    need_number("l1", config.l1)
    need(
        1 <= config.update_epochs <= config.epochs,
        "update_epochs",
        config.update_epochs,
        f"between 1 and epochs={config.epochs}; masks that never change are those of "
        "method='static'",
    )
    need(
        0 <= config.label_smoothing < 1,
        "label_smoothing",
        config.label_smoothing,
        "in [0, 1)",
    )
    for field, value in (("augment", "random_resized_crop"), ("pixels", "channels")):
        # Images in files are cropped and normalised while they are read, in one way.
        given = getattr(config, field)
        if config.dataset == "imagenet":
            need(given == value, field, given, f"{value!r} for dataset='imagenet'")
    need(
        config.augment != "random_resized_crop" or config.dataset == "imagenet",
        "augment",
        config.augment,
        "another one for images that are arrays; this one is of dataset='imagenet'",
    )
    need(
        config.cycles >= 1,
        "cycles",
        config.cycles,
        "1 or more",
    )
    need(
        0 <= config.warmup_epochs < config.epochs,
        "warmup_epochs",
        config.warmup_epochs,
        f"from 0 to {config.epochs - 1}, fewer than epochs",
    )
    need(
        config.pattern == "weights"
        or (config.method in recipes.TWO_OF_FOUR and config.density == 0.5),
        "pattern",
        config.pattern,
        "'weights', but for density=0.5 and method one of "
        + ", ".join(recipes.TWO_OF_FOUR),
    )
    for field, readers in recipes.READ_BY.items():
        value = getattr(config, field)
        need(
            value == getattr(TrainConfig, field) or config.method in readers,
            field,
            value,
            f"left out for method={config.method!r}, which does not read it; those "
            f"that do are {', '.join(readers)}",
        )
    need(
        0 <= config.seed < 2**32,
        "seed",
        config.seed,
        f"in [0, {2**32 - 1}], the seeds that give different random numbers",
    )
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
        f"between 0 and epochs={config.epochs}, or left out for never",
    )


def base_of(config: Resolved) -> Resolved | None:
    """The run that comes before ``config``, as a run of its own.

    Runs that differ only in what follows share it.

    Args:
      config: a resolved run.

    Returns:
      A resolved run: of sparse momentum for method ticket, else of ``"dense"``; None
      where nothing comes before.

    Examples:
      >>> from sparse_optax.experiments import config
      >>> run = config.resolve(config.TrainConfig(dataset="mnist", method="gsm"))
      >>> base = config.base_of(run)
      >>> base.method, base.epochs, base.momentum
      ('dense', 100, 0.9)
    """
    plain = TrainConfig()
    if config.method == "ticket":
        if config.finder == "sparse_momentum":
            return dataclasses.replace(
                config, method="sparse_momentum", ticket=plain.ticket
            )
        kept = ("dataset", "model", "density", "split", "seed", "nesterov", "dtype")
        kept = (*kept, "label_smoothing")
        given: dict[str, Any] = {name: getattr(config, name) for name in kept}
        found = resolve(TrainConfig(method="gsm", **given))
        return found if config.finder == "gsm" else base_of(found)
    if not config.base.epochs:
        return None
    # What only the later stage reads goes back to its default.
    return dataclasses.replace(
        config,
        **recipes.DENSE,
        budget=None,
        drop_steps=(),
        prune_rate=plain.prune_rate,
        prune_decay=plain.prune_decay,
        prune=plain.prune,
        redistribute=plain.redistribute,
        grow=plain.grow,
        shares="uniform",
        l1=plain.l1,
        ticket=plain.ticket,
        update_epochs=plain.update_epochs,
        cycles=plain.cycles,
        pattern=plain.pattern,
        gate=None,
        settle_epoch=None,
        base=ResolvedBase(),
        **_given(config.base),
    )


def training_of(config: Resolved) -> Resolved:
    """The run that trains: ``config`` itself, but for methods that cut afterwards.

    Such a method reads density and pattern after training, so that runs at several
    densities share one; ``"wanda"`` and ``"sparse_gpt"`` share that of ``"l2"``.

    Args:
      config: a resolved run.

    Returns:
      A resolved run. Those that share their training give the same one.

    Examples:
      >>> from sparse_optax.experiments import config
      >>> run = config.resolve(config.TrainConfig(method="wanda", density=0.5))
      >>> shared = config.training_of(run)
      >>> shared.method, shared.density
      ('l2', 1.0)
    """
    method = recipes.METHODS[config.method]
    if not method.cut_only:
        return config
    plain = TrainConfig()
    return dataclasses.replace(
        config,
        method=method.trains_as or config.method,
        density=1.0,
        budget=None,
        shares="uniform",
        update_epochs=plain.update_epochs,
        cycles=plain.cycles,
        pattern=plain.pattern,
    )


def dense_of(config: Resolved) -> Resolved:
    """The dense run that a run is judged by.

    Args:
      config: a resolved run.

    Returns:
      Its network with all weights: trained in the same way where the method starts from
      fresh weights, else by the recipe of the data set, for the same seed.

    Examples:
      >>> from sparse_optax.experiments import config
      >>> run = config.resolve(config.TrainConfig(method="rigl", epochs=7))
      >>> dense = config.dense_of(run)
      >>> dense.method, dense.density, dense.epochs
      ('dense', 1.0, 7)
    """
    thin = config.method == "thin"
    same: dict[str, Any] = {
        "dataset": config.dataset,
        "model": "lenet-300-100" if thin else config.model,
        "split": config.split,
        "seed": config.seed,
        "dtype": config.dtype,
        "label_smoothing": config.label_smoothing,
    }
    if recipes.METHODS[config.method].recipe == "scratch":
        names = ("epochs", "batch_size", "learning_rate", "drop_factor", "momentum")
        names = (*names, "nesterov", "weight_decay", "decay", "init", "optimizer")
        names = (*names, "schedule", "warmup_epochs", "augment", "pixels")
        drops = "drop_steps" if config.drop_steps else "drop_epochs"
        same |= {name: getattr(config, name) for name in (*names, drops)}
    return resolve(TrainConfig(method="dense", **same))


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The run as JSON would give it back: tuples are lists.

    Args:
      config: a run.

    Returns:
      A nested dict of numbers, strings and lists. Without a budget there is no such
      key, as in the records of the time when there was none.

    Examples:
      >>> from sparse_optax.experiments import config
      >>> config.as_dict(config.TrainConfig(drop_steps=(5,)))["drop_steps"]
      [5]
    """
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    if values["budget"] is None:
        del values["budget"]
    return values


def default_name(config: Resolved) -> str:
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
    values = as_dict(config)
    values = {k: v for k, v in values.items() if k not in EARLIER or v != EARLIER[k]}
    if values["base"]["weight_decay"] is None:
        del values["base"]["weight_decay"]
    text = json.dumps(values, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return (
        f"{config.dataset}-{config.model}-{config.method}"
        f"-d{config.density:g}-s{config.seed}-{digest}"
    )
