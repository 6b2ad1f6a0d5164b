"""LeNet-5-Caffe on MNIST by sparse momentum: Table 1 of the paper.

Protocol: that of LeNet-300-100, see ``mnist_lenet300``. Test error of the last epoch,
5 seeds. About an hour a run on one core.

References:
  Dettmers & Zettlemoyer, `Sparse networks from scratch: faster training without losing
  performance <https://arxiv.org/abs/1907.04840>`_, 2019.
"""

from sparse_optax.experiments.tables import common

SEEDS = range(5)
# Mean and standard error of 10 to 12 runs; 10 are assumed.
PAPER = {
    "dense": common.Paper(0.58, 0.010),
    "0.01": common.Paper(0.83, 0.040),
    "0.02": common.Paper(0.76, 0.022),
    "0.05": common.Paper(0.69, 0.021),
    "0.2": common.Paper(0.60, 0.013),
}


ROWS = common.sparse_momentum_rows(SEEDS, PAPER, model="lenet-5-caffe")


def render(records):
    """Paper against ours, one line a density."""
    return common.against_paper(ROWS, PAPER, records) + (
        "\n\nMNIST, 90/10 split, 100 epochs, last epoch. Welch interval, the paper's "
        "10 to 12 runs taken as 10."
    )


TABLE = common.Table(
    "mnist_lenet5", "LeNet-5-Caffe on MNIST, sparse momentum", ROWS, render
)
