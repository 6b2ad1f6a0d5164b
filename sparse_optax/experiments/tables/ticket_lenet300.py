"""Is the mask that sparse momentum ends with good from the start?

Protocol: as in ``mnist_lenet300``, 5% of the weights. The non-zero weights of the final
network are trained once more, for as long, without a cycle: from their own initial
values, from other ones, shuffled within each layer, and spread at random over the
network. 3 seeds; the four runs of a seed share the run that found the mask.
"""

from typing import Any

from sparse_optax.experiments.config import TrainConfig
from sparse_optax.experiments.tables import common, mnist_lenet300

SEEDS = range(3)
LABELS = {
    "own": "its mask, its own initial weights",
    "reinitialised": "its mask, other initial weights",
    "shuffled": "its mask shuffled within each layer",
    "random": "as many weights, anywhere",
}


def _rows():
    for row in mnist_lenet300.ROWS:
        if row.group == "0.05":
            yield row._replace(group="found", table="mnist_lenet300")
    for seed in SEEDS:
        for control in LABELS:
            options: dict[str, Any] = dict(ticket=control, density=0.05, seed=seed)
            config = TrainConfig(dataset="mnist", method="ticket", **options)
            yield common.Row(f"{control}_s{seed}", config, control)


ROWS = tuple(_rows())


def render(records):
    """One line for the run that found the mask, one for each way to train it again."""
    lines = []
    for group, label in {"found": "sparse momentum", **LABELS}.items():
        found = common.group(ROWS, records, group)
        errors = [record.results["test_error"] for record in found]
        lines.append([label, common.mean_se(errors)])
    header = ["LeNet-300-100 at 5%", "test error %, mean ± SE (runs)"]
    return common.markdown(header, lines)


TABLE = common.Table("ticket_lenet300", "Tickets of sparse momentum", ROWS, render)
