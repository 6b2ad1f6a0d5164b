"""CIFAR-10 by sparse momentum: Table 2 of the paper, eight networks.

Protocol of Lee et al.: first 45,000 training images, reflect-pad 4, random crop and
flip, batch 128, Nesterov 0.9, weight decay 5e-4, 250 epochs, learning rate 0.1 times
0.1 every 30,000 steps, test error of the last epoch. The paper's mean and standard
error are of 10 to 12 runs, SNIP's numbers are quoted there without errors.

References:
  Dettmers & Zettlemoyer, `Sparse networks from scratch: faster training without losing
  performance <https://arxiv.org/abs/1907.04840>`_, 2019.
"""

from typing import Any

from sparse_optax.experiments.tables import common, published

SEEDS = range(5)
# Density; then dense, SNIP and sparse momentum: error and its standard error.
PAPER = {
    "alexnet-s": (0.1, (12.95, 0.056), 14.99, (14.35, 0.057)),
    "alexnet-b": (0.1, (12.85, 0.068), 14.50, (13.93, 0.048)),
    "vgg16-c": (0.05, (6.49, 0.038), 7.27, (6.77, 0.056)),
    "vgg16-d": (0.05, (6.59, 0.050), 7.09, (6.49, 0.045)),
    "vgg16-like": (0.03, (6.50, 0.054), 8.00, (6.71, 0.046)),
    "wrn-16-8": (0.05, (4.57, 0.022), 6.63, (5.66, 0.054)),
    "wrn-16-10": (0.05, (4.45, 0.040), 6.43, (4.59, 0.043)),
    "wrn-22-8": (0.05, (4.26, 0.032), 5.85, (4.96, 0.042)),
}


def _lines():
    for model, (density, dense, snip, ours) in PAPER.items():
        share = f"{100 * density:g}%"
        for method, label, paper in (
            ("dense", "dense", common.Paper(*dense)),
            ("sparse_momentum", f"sparse momentum, {share}", common.Paper(*ours)),
            ("snip", f"SNIP, {share}", common.Paper(snip)),
        ):
            options: dict[str, Any] = dict(dataset="cifar10", model=model)
            options |= dict(method=method)
            options |= {} if method == "dense" else dict(density=density)
            yield (
                f"{model}_{method}",
                published.Line(f"{model}, {label}", options, paper),
            )


LINES = dict(_lines())
ROWS = published.rows(LINES, SEEDS)
TABLE = published.table(
    "cifar10_lee", "CIFAR-10, sparse momentum (Table 2)", LINES, ROWS, first="CIFAR-10"
)
