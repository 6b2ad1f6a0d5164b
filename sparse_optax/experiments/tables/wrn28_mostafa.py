"""WRN-28-2 on CIFAR-10 in the protocol of Mostafa and Wang: Figure 2 of the paper.

All 50,000 training images, reflect-pad 4, random crop and flip, batch 100, Nesterov
0.9, weight decay 5e-4, 200 epochs, learning rate 0.1 times 0.2 after epochs 60, 120
and 160. The first layer, the last and the shortcuts stay dense (12,464 weights), and
the sparsity is that of the others. Static masks train for 400 epochs, with drops at
twice the epochs. DSR and SET move their masks once an epoch here, where the authors'
periods are 100 to 800 steps; compressed sparse is iterative magnitude pruning within
the 200 epochs. The paper's errors are those of 5 runs, from its accuracies.

References:
  Mostafa & Wang, `Parameter efficient training of deep convolutional neural networks
  by dynamic sparse reparameterization <https://arxiv.org/abs/1902.05967>`_, 2019;
  Dettmers & Zettlemoyer, `Sparse networks from scratch
  <https://arxiv.org/abs/1907.04840>`_, 2019, for the numbers.
"""

from typing import Any

from sparse_optax.experiments.tables import common, published

SEEDS = range(5)
# Accuracy and standard error by sparsity.
PAPER = {
    "sparse_momentum": {
        *((0.9, 93.61, 0.05), (0.8, 94.32, 0.05), (0.7, 94.58, 0.05)),
        *((0.6, 94.68, 0.06), (0.5, 94.75, 0.04)),
    },
    "dynamic_sparse": {
        *((0.9, 93.59, 0.08), (0.8, 94.40, 0.05), (0.7, 94.57, 0.05)),
        *((0.6, 94.66, 0.05), (0.5, 94.73, 0.05)),
    },
    "sparse_evolutionary": {
        *((0.9, 93.28, 0.06), (0.8, 94.25, 0.07), (0.7, 94.40, 0.09)),
        *((0.6, 94.55, 0.06), (0.5, 94.76, 0.04)),
    },
    "deep_rewiring": {
        *((0.9, 91.41, 0.06), (0.8, 92.36, 0.08), (0.7, 92.50, 0.10)),
        *((0.6, 92.80, 0.04), (0.5, 92.92, 0.08)),
    },
    "iterative_magnitude": {
        *((0.9, 93.75, 0.04), (0.8, 94.13, 0.06), (0.7, 94.53, 0.06)),
        *((0.6, 94.54, 0.02), (0.5, 94.59, 0.06)),
    },
    "static": {
        *((0.9, 92.04, 0.14), (0.8, 93.48, 0.05), (0.7, 93.87, 0.05)),
        *((0.6, 94.26, 0.05), (0.5, 94.28, 0.06)),
    },
}
LABELS = {
    "sparse_momentum": "sparse momentum",
    "dynamic_sparse": "DSR",
    "sparse_evolutionary": "SET",
    "deep_rewiring": "DEEP-R",
    "iterative_magnitude": "compressed sparse",
    "static": "static sparse, twice the epochs",
}
_RECIPE: dict[str, Any] = dict(
    dataset="cifar10",
    model="wrn-28-2",
    split="full",
    epochs=200,
    batch_size=100,
    drop_epochs=(60, 120, 160),
    drop_factor=0.2,
)
_TWICE: dict[str, Any] = dict(epochs=400, drop_epochs=(120, 240, 320))


def _lines():
    dense = _RECIPE | dict(method="dense")
    yield "dense", published.Line("dense", dense, common.Paper(5.30, 0.05, 5))
    for sparsity in (0.9, 0.8, 0.7, 0.6, 0.5):
        for method, numbers in PAPER.items():
            density = round(1 - sparsity, 1)
            options = _RECIPE | dict(
                method=method, density=density, shares="mostafa_wang"
            )
            options |= _TWICE if method == "static" else {}
            for s, accuracy, se in numbers:
                if s == sparsity:
                    paper = common.Paper(round(100 - accuracy, 2), se, 5)
                    label = f"{LABELS[method]}, sparsity {sparsity:g}"
                    name = f"{method}_d{density:g}"
                    yield name, published.Line(label, options, paper)


LINES = dict(_lines())
ROWS = published.rows(LINES, SEEDS)
TABLE = published.table(
    "wrn28_mostafa",
    "WRN-28-2 on CIFAR-10, protocol of Mostafa and Wang",
    LINES,
    ROWS,
    first="WRN-28-2",
)
