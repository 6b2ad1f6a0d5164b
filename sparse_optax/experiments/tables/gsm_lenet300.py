"""GSM on LeNet-300-100 and MNIST at 60x, pruned without retraining.

Protocol: all 60,000 training images, as in the paper, so that nothing is selected on
a validation set and the last epoch is reported. Base: the released recipe at half its
length (100 epochs, batch 256, Nesterov 0.9, learning rate 3e-2 times 0.1 at epochs 20,
40, 60 and 80, Xavier start). GSM stage: Nesterov 0.99, batch 256, learning rate 3e-2,
3e-3, 3e-4 for 160, 40 and 40 epochs. Weight decay 5e-4 on kernels throughout. Then all
but the 4,436 largest weights (1/60) are set to zero. Variants: as in the paper; a gate
that lets 0.7 of them pass each step; the mask fixed at the largest from epoch 160 on.
5 seeds; the variants of a seed share their base run. About 50 s a base run and 150 s a
GSM run on one core.

References:
  Ding et al., `Global sparse momentum SGD for pruning very deep neural networks
  <https://arxiv.org/abs/1909.12778>`_, 2019.
"""

from sparse_optax.experiments import config as configs
from sparse_optax.experiments.tables import common

SEEDS = range(5)
DENSITY = 1 / 60
VARIANTS = {
    "plain": {},
    "gate": {"gate": 0.7 * DENSITY},
    "settle": {"settle_epoch": 160},
}
LABELS = {
    "plain": "as in the paper",
    "gate": "gate 0.7 of the density",
    "settle": "settled from epoch 160",
}


def _config(seed: int, **options) -> configs.TrainConfig:
    return configs.TrainConfig(
        dataset="mnist",
        method="gsm",
        density=DENSITY,
        split="full",
        seed=seed,
        **options,
    )


def _rows():
    for seed in SEEDS:
        base = f"base_s{seed}"
        dense = configs.base_of(configs.resolve(_config(seed)))
        assert dense is not None  # GSM starts from a trained network
        yield common.Row(base, dense, "base")
        for name, options in VARIANTS.items():
            yield common.Row(f"{name}_s{seed}", _config(seed, **options), name, (base,))


ROWS = tuple(_rows())


def render(records):
    """One line a variant: before, after GSM, after the cut."""
    lines = []
    for name, label in LABELS.items():
        ours = common.group(ROWS, records, name)
        kept = [record.results["nonzeros"] for record in ours]
        alive = [
            record.results["gap"]["alive"] / record.results["gap"]["kept"]
            for record in ours
        ]
        lines.append(
            [
                label,
                common.mean_se(
                    [r.base["results"]["test_error"] for r in ours if r.base]
                ),
                common.mean_se([r.results["test_error_before_cut"] for r in ours]),
                common.mean_se([r.results["test_error"] for r in ours]),
                f"{kept[0]:,}" if kept else "-",
                common.mean_se(alive),
            ]
        )
    lines.append(["paper (Ding et al.)", "1.81", "-", "1.82", "4.4K", "-"])
    header = [
        "GSM at 60x",
        "base error %",
        "after GSM",
        "after the cut",
        "non-zero",
        "alive before the cut / kept",
    ]
    return common.markdown(header, lines) + (
        "\n\nMNIST, all 60,000 training images, test error of the last epoch, mean ± "
        "SE (runs). The paper gives one number without runs or errors."
    )


TABLE = common.Table("gsm_lenet300", "LeNet-300-100 on MNIST, GSM", ROWS, render)
