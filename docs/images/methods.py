"""Draw every method's test error by density, from the records.

    python docs/images/methods.py

Reads ``results/methods_lenet300`` and ``results/mnist_lenet300`` and writes
``methods.png`` beside this file: means over the seeds, with the 95% interval of a mean
(Student's distribution) as a band, where there are three or more. Methods without a
record are left out.
"""

import pathlib

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from sparse_optax.experiments import plots, readme
from sparse_optax.experiments.tables import methods_lenet300 as table

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
# In every panel for comparison.
REFERENCE = "sparse_momentum"


def band(errors: list[float]) -> tuple[float, float]:
    """Mean and half the 95% interval of the mean; 0 for one or two runs."""
    n = len(errors)
    if n < table.LEAST:
        return float(np.mean(errors)), 0.0
    se = np.std(errors, ddof=1) / np.sqrt(n)
    return float(np.mean(errors)), float(stats.t.ppf(0.975, n - 1) * se)


def panel(axes: Axes, records: dict, methods: tuple[str, ...]) -> None:
    """One line and band a method, over the density on a logarithmic axis."""
    dense, half = band(table.errors(records, "dense", 1.0))
    axes.axhspan(dense - half, dense + half, color="#bbbbbb", lw=0)
    axes.axhline(dense, color="#666666", lw=1, label="dense")
    for method in methods:
        found = {
            density: errors
            for density in sorted(table.DENSITIES)
            if (errors := table.errors(records, method, density))
        }
        if not found:
            continue
        means, halves = np.array([band(errors) for errors in found.values()]).T
        width = 2.0 if method == REFERENCE else 1.0
        density = 100 * np.array(list(found))
        (line,) = axes.plot(
            density, means, marker="o", ms=3, lw=width, label=table.LABELS[method]
        )
        axes.fill_between(
            density, means - halves, means + halves, color=line.get_color(), alpha=0.15
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xticks([1, 2, 5, 20], ["1", "2", "5", "20"], minor=False)
    axes.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.set_ylim(1, 12)
    axes.legend(frameon=False, fontsize="x-small")


def main() -> None:
    """Draws what there are records of."""
    records = readme.read_table(table.TABLE, RESULTS)
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for ax, (family, methods) in zip(axes.flat, table.FAMILIES.items(), strict=True):
        extra = () if REFERENCE in methods else (REFERENCE,)
        panel(ax, records, (*extra, *methods))
        ax.set_title(family, fontsize="medium")
    for ax in axes[:, 0]:
        ax.set_ylabel("test error (%)")
    for ax in axes[1]:
        ax.set_xlabel("weights kept (%)")
    plots.save(figure, HERE / "methods.png")


if __name__ == "__main__":
    main()
