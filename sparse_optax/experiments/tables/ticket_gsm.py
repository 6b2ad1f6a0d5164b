"""Tickets of GSM against tickets of magnitude, trained from their initial weights.

Pipeline of the released code: train a dense network from theta_0; find a mask, by GSM
from the dense network and its cut, or the largest weights of the dense network; set all
other weights of theta_0 to zero and train what is left by the recipe of the dense
network. Recipe of ``gsm_lenet300`` and, for ResNet-56, of ``gsm_networks``. The control
has as many weights as the ticket of GSM, anywhere. All of a seed have one dense
network.

References:
  Ding et al., `Global sparse momentum SGD for pruning very deep neural networks
  <https://arxiv.org/abs/1909.12778>`_, 2019; Frankle & Carbin, `The lottery ticket
  hypothesis <https://arxiv.org/abs/1803.03635>`_, 2019.
"""

from typing import Any

from sparse_optax.experiments import recipes
from sparse_optax.experiments.tables import common, published

SEEDS = range(5)
# Network, size, density; accuracy of the tickets of GSM and of magnitude.
PAPER = (
    ("lenet-300-100", "60x", 1 / 60, 98.22, 97.39),
    ("lenet-5-caffe", "125x", 1 / 125, 99.04, 97.60),
    ("lenet-5-caffe", "300x", 1 / 300, 98.88, 11.35),
    ("resnet-56", "10x", 0.1, None, None),
)


def _options(model: str, density: float) -> dict[str, Any]:
    dataset = "cifar10" if model == "resnet-56" else "mnist"
    recipe = recipes.GSM_RECIPES[dataset]
    cifar = {key: recipe[key] for key in recipe if key in ("augment", "pixels")}
    cifar |= {key: recipe[key] for key in recipe if key == "warmup_epochs"}
    if dataset == "cifar10":
        cifar |= dict(weight_decay=recipe["weight_decay"], nesterov=False)
    return dict(
        dataset=dataset,
        model=model,
        method="ticket",
        density=density,
        split="full",
        decay="kernels",
        init="xavier",
        **recipe["base"],
        **cifar,
    )


def _lines():
    for model, size, density, gsm, magnitude in PAPER:
        options = _options(model, density)
        for name, label, more, accuracy in (
            ("gsm", "GSM's ticket", dict(finder="gsm"), gsm),
            ("magnitude", "magnitude's", dict(finder="magnitude"), magnitude),
            ("random", "random", dict(finder="gsm", ticket="random"), None),
        ):
            paper = None
            if accuracy is not None:
                paper = common.Paper(round(100 - accuracy, 2))
            line = published.Line(f"{model} at {size}, {label}", options | more, paper)
            yield f"{model}_{size}_{name}", line


LINES = dict(_lines())
ROWS = published.rows(LINES, SEEDS)
TABLE = published.table(
    "ticket_gsm", "Tickets of GSM and of magnitude", LINES, ROWS, first="tickets"
)
