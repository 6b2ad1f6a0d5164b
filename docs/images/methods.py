"""Draw every method's test error by density, from the records.

    python docs/images/methods.py

Reads ``results/methods_lenet300`` and ``results/mnist_lenet300`` and writes
``methods.png`` next to this file, a panel for each method. The points are geometric
means over the seeds, because the axis of errors is logarithmic. The bars are their 95%
intervals (Student's distribution of the logarithms), where there are three seeds or
more. The dashed line in each panel is sparse momentum, the grey line the dense network
with its interval. Methods without a record are left out.
"""

import hashlib
import json
import math
import pathlib
from typing import Any

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


def line(axes: Axes, records: dict, method: str, **style: Any) -> bool:
    """Mean and interval of a method at each density; whether there is a record."""
    found = {
        density: errors
        for density in sorted(table.DENSITIES)
        if (errors := table.errors(records, method, density))
    }
    if found:
        means, low, high = np.array([band(errors) for errors in found.values()]).T
        bars = [means - low, high - means] if style.get("marker") else None
        axes.errorbar(100 * np.array(list(found)), means, bars, **style)
    return bool(found)


def panel(axes: Axes, records: dict, method: str) -> bool:
    """One method before the reference and the dense network, on logarithmic axes."""
    dense, low, high = band(table.errors(records, "dense", 1.0))
    axes.axhspan(low, high, color="#cccccc", lw=0)
    axes.axhline(dense, color="#666666", lw=0.8)
    if method != REFERENCE:
        line(axes, records, REFERENCE, color="#666666", lw=1, ls="--")
    own = dict(color="#0b5394", lw=1.5, marker="o", ms=4, capsize=2)
    drawn = line(axes, records, method, **own)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks([1, 2, 5, 20], ["1", "2", "5", "20"], minor=False)
    axes.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.set_xlim(0.8, 25)
    axes.set_ylim(1, 12)
    axes.set_title(table.LABELS[method], fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def fingerprint(records: dict) -> str:
    """What is drawn, in short; the file holds it, and a test compares it."""
    methods = ["dense", *(m for family in table.FAMILIES.values() for m in family)]
    errors = [
        [method, density, table.errors(records, method, density)]
        for method in methods
        for density in (1.0, *sorted(table.DENSITIES))
    ]
    return hashlib.sha256(json.dumps(errors).encode()).hexdigest()


def main() -> None:
    """Draws all methods that have records, a row of panels for each family."""
    records = readme.read_table(table.TABLE, RESULTS)
    columns = max(map(len, table.FAMILIES.values()))
    figure = Figure(figsize=(2.0 * columns, 9.6), layout="constrained")
    rows = figure.subfigures(len(table.FAMILIES), 1)
    for row, (family, methods) in zip(rows, table.FAMILIES.items(), strict=True):
        row.suptitle(family, fontsize="medium", x=0.01, ha="left")
        axes = row.subplots(1, columns, sharey=True)
        for place, ax in enumerate(axes):
            if place >= len(methods) or not panel(ax, records, methods[place]):
                ax.set_visible(False)
        axes[0].set_ylabel("test error (%)")
    rows[-1].supxlabel("weights kept (%)", fontsize="medium")
    about = {"Source": fingerprint(records)}
    plots.save(figure, HERE / "methods.png", about)


if __name__ == "__main__":
    main()
