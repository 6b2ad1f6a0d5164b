"""This library's two recipes on LeNet-300-100 and MNIST, at four densities.

Protocol: as in ``mnist_lenet300``. The recipes are ``long_average_regrow``, at constant
density, and ``falling_budget_regrow``, which never has more than five times the final
weights. Both have the shares of Erdos-Renyi-kernel. Their numbers were chosen on the
validation split at 2% by ``benchmarks/choose_recipe.py``, with seeds from 100 on; the
10 seeds here are others. Ablations, 3 seeds: sparse momentum with the same shares, with
and without redistribution, so that what the average or the falling budget adds can be
read.
"""

from sparse_optax.experiments.config import TrainConfig
from sparse_optax.experiments.tables import common, mnist_lenet300

SEEDS = range(10)
DENSITIES = (0.01, 0.02, 0.05, 0.2)
RECIPES = {
    "long_average_regrow": "long average, constant density",
    "falling_budget_regrow": "falling budget, from five times",
}
ABLATIONS = {
    "momentum": "sparse momentum, shares by Erdos-Renyi-kernel",
    "none": "the same without redistribution",
}
ABLATION_SEEDS = range(3)


def _config(method: str, density: float, seed: int, **options) -> TrainConfig:
    return TrainConfig(
        dataset="mnist",
        method=method,
        density=density,
        shares="erdos_renyi_kernel",
        seed=seed,
        **options,
    )


def _rows():
    for row in mnist_lenet300.ROWS:
        if row.group in map(str, DENSITIES):
            group = f"sparse_momentum {row.group}"
            yield row._replace(group=group, table="mnist_lenet300")
    for seed in SEEDS:
        for density in DENSITIES:
            for method in RECIPES:
                yield common.Row(
                    f"{method}_d{density:g}_s{seed}",
                    _config(method, density, seed),
                    f"{method} {density:g}",
                )
            for shares in ABLATIONS if seed in ABLATION_SEEDS else ():
                yield common.Row(
                    f"sparse_momentum_{shares}_d{density:g}_s{seed}",
                    _config("sparse_momentum", density, seed, redistribute=shares),
                    f"{shares} {density:g}",
                )


ROWS = tuple(_rows())


def render(records):
    """One line a recipe, one column a density: test and validation error."""
    lines = []
    labels = {"sparse_momentum": "sparse momentum, the paper's recipe"}
    for name, label in (labels | ABLATIONS | RECIPES).items():
        groups = [
            common.group(ROWS, records, f"{name} {density:g}") for density in DENSITIES
        ]
        for kind in ("test", "valid"):
            cells = [
                common.mean_se([r.results[f"{kind}_error"] for r in found])
                for found in groups
            ]
            lines.append([f"{label}, {kind}", *cells])
    header = ["error %, mean ± SE (runs)", *(f"{d:.0%}" for d in DENSITIES)]
    return common.markdown(header, lines) + (
        "\n\nMNIST, 90/10 split, 100 epochs, errors of the last epoch."
    )


TABLE = common.Table(
    "recipes_lenet300", "This library's recipes on LeNet-300-100", ROWS, render
)
