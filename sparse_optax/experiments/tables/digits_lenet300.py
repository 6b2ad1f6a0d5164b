"""LeNet-300-100 on scikit-learn's digits: both flagship methods, in some minutes.

No paper has this table; it shows that the methods work where no data set can be
downloaded. Recipes of the digits (``recipes.RECIPES``), 5% of the weights, 3 seeds. The
360 test images are by other writers than the training images; one image is 0.28%.
"""

from sparse_optax.experiments.config import TrainConfig
from sparse_optax.experiments.tables import common

SEEDS = range(3)
METHODS = ("dense", "sparse_momentum", "gsm")

ROWS = tuple(
    common.Row(f"{method}_s{seed}", TrainConfig(method=method, seed=seed), method)
    for seed in SEEDS
    for method in METHODS
)


def render(records):
    """One line a method."""
    lines = []
    for method in METHODS:
        ours = common.group(ROWS, records, method)
        kept = f"{ours[0].results['kept']:,}" if ours else "-"
        errors = [record.results["test_error"] for record in ours]
        lines.append([method.replace("_", " "), kept, common.mean_se(errors)])
    header = ["method", "weights kept of 50,200", "test error %, mean ± SE (runs)"]
    return common.markdown(header, lines) + (
        "\n\nDigits bundled with scikit-learn, test images by other writers than the "
        "training images, last epoch."
    )


TABLE = common.Table("digits_lenet300", "LeNet-300-100 on digits", ROWS, render)
