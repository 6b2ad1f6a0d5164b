"""Table 5 of sparse momentum on LeNet-5-Caffe and VGG16-D: four mixtures at 5%.

Protocols of ``mnist_lenet5`` and ``cifar10_lee``. The paper's numbers are differences
from momentum and momentum, added here to that one's error; its redistribution of none
gives layers their shares by size.

References:
  Dettmers & Zettlemoyer, `Sparse networks from scratch: faster training without losing
  performance <https://arxiv.org/abs/1907.04840>`_, 2019.
"""

import math
from typing import Any

from sparse_optax.experiments.tables import (
    cifar10_lee,
    common,
    mnist_lenet5,
    published,
)

SEEDS = range(3)
# Momentum and momentum, and what a mixture adds: error and standard error.
PAPER = {
    "lenet-5-caffe": (
        (0.69, 0.021),
        {
            ("momentum", "random"): (-0.05, 0.011),
            ("size", "momentum"): (0.32, 0.071),
            ("size", "random"): (0.13, 0.013),
        },
    ),
    "vgg16-d": (
        (6.49, 0.045),
        {
            ("momentum", "random"): (-0.15, 0.054),
            ("size", "momentum"): (0.79, 0.082),
            ("size", "random"): (0.49, 0.060),
        },
    ),
}
OWN = {
    "lenet-5-caffe": ("mnist", "mnist_lenet5", "0.05"),
    "vgg16-d": ("cifar10", "cifar10_lee", "vgg16-d_sparse_momentum"),
}


def _lines():
    for model, ((error, se), added) in PAPER.items():
        dataset, table, group = OWN[model]
        paper = common.Paper(error, se)
        label = f"{model}: redistribution by momentum, growth by momentum"
        yield model, published.Line(label, {}, paper, table, group)
        for (share, grow), (more, spread) in added.items():
            options: dict[str, Any] = dict(
                dataset=dataset,
                model=model,
                method="sparse_momentum",
                density=0.05,
                redistribute=share,
                grow=grow,
            )
            paper = common.Paper(round(error + more, 2), math.hypot(se, spread))
            label = f"{model}: redistribution by {share}, growth by {grow}"
            yield f"{model}_{share}_{grow}", published.Line(label, options, paper)


LINES = dict(_lines())
ROWS = published.rows(LINES, SEEDS, [*mnist_lenet5.ROWS, *cifar10_lee.ROWS])
TABLE = published.table(
    "ablation_networks",
    "Sparse momentum, its mixtures on two networks",
    LINES,
    ROWS,
    first="5% of the weights",
)
