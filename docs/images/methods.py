"""Draw every method's test error by density, from the records.

    python docs/images/methods.py

Reads ``results/methods_lenet300`` and ``results/mnist_lenet300`` and writes
``methods.png`` next to this file. The lines are geometric means over the seeds, because
the axis of errors is logarithmic. The bands are their 95% intervals (Student's
distribution of the logarithms), where there are three seeds or more. Methods without a
record are left out.
"""

import math
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


def band(errors: list[float]) -> tuple[float, float, float]:
    """Geometric mean and its 95% interval, of width zero for one or two runs."""
    logs, n = np.log(errors), len(errors)
    mean, half = float(np.mean(logs)), 0.0
    if n >= table.LEAST:
        se = np.std(logs, ddof=1) / np.sqrt(n)
        half = float(stats.t.ppf(0.975, n - 1) * se)
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def panel(axes: Axes, records: dict, methods: tuple[str, ...]) -> None:
    """One line and one band per method, over the density on a logarithmic axis."""
    dense, low, high = band(table.errors(records, "dense", 1.0))
    axes.axhspan(low, high, color="#bbbbbb", lw=0)
    axes.axhline(dense, color="#666666", lw=1, label="dense")
    for method in methods:
        found = {
            density: errors
            for density in sorted(table.DENSITIES)
            if (errors := table.errors(records, method, density))
        }
        if not found:
            continue
        means, low, high = np.array([band(errors) for errors in found.values()]).T
        width = 2.0 if method == REFERENCE else 1.0
        density = 100 * np.array(list(found))
        (line,) = axes.plot(
            density, means, marker="o", ms=3, lw=width, label=table.LABELS[method]
        )
        axes.fill_between(density, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks([1, 2, 5, 20], ["1", "2", "5", "20"], minor=False)
    axes.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.set_ylim(1, 12)
    axes.legend(fontsize="x-small", framealpha=0.85, edgecolor="none")


def main() -> None:
    """Draws all methods that have records."""
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
