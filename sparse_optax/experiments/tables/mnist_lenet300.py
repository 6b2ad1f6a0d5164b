"""LeNet-300-100 on MNIST by sparse momentum: Table 1 of the paper.

Protocol: first 54,000 training images to train on, the other 6,000 to validate on,
batch 100, 100 epochs, learning rate 0.1 times 0.1 every 25,000 steps, Nesterov 0.9,
weight decay 5e-4 on all parameters, prune rate 0.5 along a cosine to 0, a cycle an
epoch. Test error of the last epoch, 10 seeds. About 55 s a run on one core.

References:
  Dettmers & Zettlemoyer, `Sparse networks from scratch: faster training without losing
  performance <https://arxiv.org/abs/1907.04840>`_, 2019.
"""

from sparse_optax.experiments.tables import common

SEEDS = range(10)
# Mean and standard error of 10 to 12 runs; 10 are assumed.
PAPER = {
    "dense": common.Paper(1.34, 0.011),
    "0.01": common.Paper(2.36, 0.044),
    "0.02": common.Paper(1.99, 0.019),
    "0.05": common.Paper(1.53, 0.020),
    "0.2": common.Paper(1.26, 0.017),
}


ROWS = common.sparse_momentum_rows(SEEDS, PAPER)


def render(records):
    """Paper against ours, one line a density."""
    return common.against_paper(ROWS, PAPER, records) + (
        "\n\nMNIST, 90/10 split, 100 epochs, last epoch. Welch interval, the paper's "
        "10 to 12 runs taken as 10."
    )


TABLE = common.Table(
    "mnist_lenet300", "LeNet-300-100 on MNIST, sparse momentum", ROWS, render
)
