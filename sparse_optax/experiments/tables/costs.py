"""What the runs of the tables cost: hours on two processor cores, from measured steps.

Only the training steps are counted, not evaluation and compilation. A method costs what
dense training costs; criteria and cycles are left out.
"""

from collections.abc import Iterable

from sparse_optax.experiments import config as configs
from sparse_optax.experiments.config import TrainConfig

# Batch and seconds of a training step, printed by benchmarks/bench_tables.py on two
# cores (AVX-512, jax 0.10.2), with nothing else running.
STEPS: dict[str, tuple[int, float]] = {
    "lenet-300-100": (100, 0.00131),
    "lenet-5-caffe": (100, 0.026),
    "alexnet-s": (128, 0.836),
    "alexnet-b": (128, 0.73),
    "vgg16-c": (128, 2.19),
    "vgg16-d": (128, 1.81),
    "vgg16-like": (128, 2.15),
    "wrn-28-2": (128, 2.19),
    "wrn-16-2": (128, 1.04),
    "resnet-20": (64, 0.291),
    "resnet-56": (64, 0.976),
    "densenet-40": (64, 3.37),
    "transformer": (32, 0.436),
    "wrn-16-8": (128, 11.5),
    "wrn-22-8": (128, 17.1),
    "wrn-16-10": (128, 17.2),
    "resnet-50": (64, 26.2),
    "resnet-50-0.46": (64, 8.97),
    "resnet-50-0.54": (64, 11.3),
}
# Images to train on, without the validation images of the split.
IMAGES = {"digits": 1437, "mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}
# Windows of the text: characters of Python 3.11 to train on, by 64.
IMAGES["topics"] = 6537
IMAGES["imagenet"] = 1_281_167


def hours(config: TrainConfig) -> float | None:
    """Hours of a run on two cores, with the runs that come before it.

    Args:
      config: the run.

    Returns:
      The hours; None for a network whose step was not measured.

    Examples:
      >>> from sparse_optax.experiments.config import TrainConfig
      >>> from sparse_optax.experiments.tables import costs
      >>> run = TrainConfig(dataset="mnist", model="lenet-5-caffe")
      >>> round(costs.hours(run), 2)  # 54,000 steps of 26 ms
      0.39
    """
    found = [_stage_hours(stage) for stage in _stages(configs.resolve(config))]
    known = [each for each in found if each is not None]
    return sum(known) if len(known) == len(found) else None


def together(runs: Iterable[TrainConfig]) -> float | None:
    """Hours of several runs, of which those that come before some are run once."""
    stages: dict[str, configs.Resolved] = {}
    for run in runs:
        for stage in _stages(configs.resolve(run)):
            stages[configs.default_name(stage)] = stage
    found = [_stage_hours(stage) for stage in stages.values()]
    known = [each for each in found if each is not None]
    return sum(known) if len(known) == len(found) else None


def told(value: float | None) -> str:
    """``not run: 12 hours``, for a cell of a table."""
    if value is None:
        return "not run"
    digits = f"{value:.1f}" if value < 10 else f"{value:,.0f}"
    return f"not run: {digits} hours"


def _stages(config: configs.Resolved) -> list[configs.Resolved]:
    """What trains a run, after all that comes before it."""
    base = configs.base_of(config)
    earlier = [] if base is None else _stages(base)
    return [*earlier, configs.training_of(config)]


def _stage_hours(config: configs.Resolved) -> float | None:
    """Hours of the steps of one stage."""
    if config.model not in STEPS and "lenet" not in config.model:
        return None
    # The other forms of LeNet-300-100 cost no more than it does, or little.
    batch, seconds = STEPS.get(config.model, STEPS["lenet-300-100"])
    images = IMAGES[config.dataset] * (9 if config.split == "lee" else 10) // 10
    steps = config.epochs * (images // config.batch_size)
    return steps * seconds * config.batch_size / batch / 3600
