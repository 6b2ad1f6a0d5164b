"""Draw reactivation.png and specialization.png from the records of a benchmark.

Run from the root of a checkout: ``python docs/images/analysis.py``, after
``python benchmarks/analyse_networks.py gsm`` and ``channels``.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from sparse_optax import plot
from sparse_optax.experiments import plots

RECORDS = Path("benchmarks/records/analysis.json")
HERE = Path(__file__).parent


def reactivation(found):
    """Weights that pass again by epoch, and the loss with and without selection."""
    canvas = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = canvas.subplots(1, 2)
    labels = {
        "selected": "selected at each step",
        "first mask": "mask of the first step",
    }
    for (name, label), way in zip(
        labels.items(), plot.styles(2, markers=False), strict=True
    ):
        history = found[name]["history"]
        epochs = [row["epoch"] for row in history]
        right.plot(epochs, [row["loss"] for row in history], label=label, **way)
        if name == "selected":
            shares = [100 * row["reactivated"] for row in history]
            left.plot(epochs, shares, label=label, **way)
    left.set(
        xlabel="epoch", ylabel="taken up again at a step, % of all", ylim=(0, None)
    )
    right.set(xlabel="epoch", ylabel="training loss", yscale="log")
    right.legend()
    plots.save(canvas, HERE / "reactivation.png")


def specialization(found):
    """The largest share of a class in each channel's activity, layer by layer."""
    layers = list(next(iter(found.values()))["largest"])
    canvas = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, layer in zip(canvas.subplots(1, len(layers)), layers, strict=True):
        for (name, network), way in zip(
            found.items(), plot.styles(len(found), markers=False), strict=True
        ):
            values = [v for v in network["largest"][layer] if v is not None]
            shares = np.linspace(0, 100, len(values), endpoint=False)
            axes.plot(shares, sorted(values, reverse=True), label=name, **way)
        axes.axhline(0.1, color="#666666", linewidth=0.7)
        axes.set(title=layer, xlabel="% of the channels", ylim=(0, None))
    canvas.axes[0].set_ylabel("largest share of a class")
    canvas.axes[-1].legend()
    plots.save(canvas, HERE / "specialization.png")


def main():
    """Draws both."""
    found = json.loads(RECORDS.read_text())
    if "gsm" in found:
        reactivation(found["gsm"])
    if "channels" in found:
        networks = {k: v for k, v in found["channels"].items() if k != "versions"}
        specialization(networks)


if __name__ == "__main__":
    main()
