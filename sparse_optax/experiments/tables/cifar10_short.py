"""WRN-16-2 on CIFAR-10 in a short schedule of our own, for two processor cores.

No paper has this schedule: 10 epochs, batch 128, one cycle of the learning rate up to
0.1 and down, Nesterov 0.9, weight decay 5e-4 on kernels, no dropout, reflect-pad 4,
random crop and flip, the first 45,000 images, two cycles of the masks an epoch. What is
tested is the order of the methods and the shares of the layers, not the published
errors. GSM starts from the dense network of the same seed and trains as long again,
with a momentum of 0.98, a learning rate of 0.02 and a decay of 3e-3, which carry a
passive weight to exp(-6) of itself, and settles after 7 epochs. No method was tuned.
Also one epoch each of VGG16-D and WRN-28-2, which shows that the networks of the paper
run; their errors say nothing.
"""

from typing import Any

from sparse_optax.experiments.config import Base
from sparse_optax.experiments.tables import common, published

SEEDS = range(2)
DENSITIES = (0.1, 0.05)
EPOCHS = 10
LABELS = {
    "sparse_momentum": "sparse momentum",
    "rigl": "RigL",
    "static": "static random",
    "snip": "SNIP",
    "falling_budget_regrow": "falling budget",
    "gsm": "GSM from the dense network",
}
_RECIPE: dict[str, Any] = dict(
    dataset="cifar10",
    model="wrn-16-2",
    epochs=EPOCHS,
    drop_steps=(),
    schedule="one_cycle",
    decay="kernels",
)
_MOVING = ("sparse_momentum", "rigl", "falling_budget_regrow")
# Its dense network is the first line of the table, step for step.
_GSM: dict[str, Any] = dict(
    momentum=0.98,
    learning_rate=0.02,
    batch_size=128,
    weight_decay=3e-3,
    settle_epoch=7,
    warmup_epochs=0,
    augment="reflect",
    pixels="channels",
    init="torch",
    base=Base(
        epochs=EPOCHS,
        batch_size=128,
        learning_rate=0.1,
        drop_epochs=(),
        momentum=0.9,
        weight_decay=5e-4,
    ),
)


def _lines():
    yield "dense", published.Line("dense", _RECIPE | dict(method="dense"))
    for density in DENSITIES:
        for method, label in LABELS.items():
            options = _RECIPE | dict(method=method, density=density)
            options |= dict(cycles=2) if method in _MOVING else {}
            options |= _GSM if method == "gsm" else {}
            name = f"{method}_d{density:g}"
            yield name, published.Line(f"{label}, {density:.0%}", options)
    for model in ("vgg16-d", "wrn-28-2"):
        options = dict(dataset="cifar10", model=model, epochs=1, drop_steps=())
        options |= dict(method="static", density=0.05)
        yield f"one_epoch_{model}", published.Line(f"{model}, one epoch", options)


LINES = dict(_lines())
ROWS = published.rows(LINES, SEEDS)


def _shares(records) -> str:
    """Densities of the ends and the three groups of blocks, of the first seed."""
    lines = []
    for group, line in LINES.items():
        ours = common.group(ROWS, records, group)
        if not ours or group == "dense" or group.startswith("one_epoch"):
            continue
        parts = {}
        for layer in ours[0].layers:
            name = layer["name"].partition("/")[0].partition("_")[0]
            kept, weights = parts.get(name, (0, 0))
            parts[name] = kept + layer["kept"], weights + layer["weights"]
        names = ("conv", "block1", "block2", "block3", "fc")
        cells = (f"{100 * parts[n][0] / parts[n][1]:.1f}" for n in names)
        lines.append([line.label, *cells])
    if not lines:
        return ""
    header = ["% of the weights kept", "first", "group 1", "group 2", "group 3", "last"]
    return "\n\n" + common.markdown(header, lines)


def render(records):
    """One line a method and density, then the shares of the layers."""
    found = published.render(LINES, ROWS, records, first="our short schedule")
    return found + _shares(records) + published.NOTE


TABLE = common.Table(
    "cifar10_short", "WRN-16-2 on CIFAR-10 in a short schedule", ROWS, render
)
