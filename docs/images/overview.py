"""Draw the figure of the README: what sparse momentum does to a small network.

    python docs/images/overview.py

Trains LeNet-300-100 on the digits that come with scikit-learn, with five seeds of
each variant: all weights; 5% of the weights with sparse momentum; the first masks of
the same runs, kept fixed. Takes about two minutes on two CPU cores and writes
``overview.png`` next to this file.
"""

import pathlib

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_optax.experiments import config, plots, train

SEEDS = range(5)
DENSITY = 0.05
SIDE = 8  # the digits are 8 x 8 pixels
RUNS = {
    "dense": {"method": "dense"},
    "5%, sparse momentum": {"density": DENSITY},
    # Without pruning nothing moves: the masks stay those the method starts from.
    "5%, fixed random mask": {"density": DENSITY, "prune_rate": 0.0},
}
COLOURS = dict(zip(RUNS, ("#666666", "#0b5394", "#cc6600"), strict=True))
# In grey, too, the lines and the bars can be told apart.
LINES = dict(zip(RUNS, ("-", "--", ":"), strict=True))


def train_all() -> dict[str, list[train.Trained]]:
    """Every run of the figure, by its name in the legend."""
    trained = {}
    for name, values in RUNS.items():
        trained[name] = []
        for seed in SEEDS:
            run = train.train(config.TrainConfig(seed=seed, **values), runs=None)
            trained[name].append(run)
            print(f"{name}, seed {seed}: {run.record.results['test_error']:.2f}%")
    return trained


def errors(axes: Axes, trained: dict[str, list[train.Trained]]) -> None:
    """Mean test error by epoch, with the range over the seeds."""
    for name, runs in trained.items():
        epochs = runs[0].record.history["epoch"]
        error = np.array([run.record.history["test_error"] for run in runs])
        axes.fill_between(
            epochs, error.min(0), error.max(0), color=COLOURS[name], alpha=0.15, lw=0
        )
        label = f"{name}: {error[:, -1].mean():.1f}%"
        line = {"color": COLOURS[name], "linestyle": LINES[name]}
        axes.plot(epochs, error.mean(0), label=label, **line)
    axes.set(xlabel="epoch", ylabel="test error (%)", ylim=(0, 40))
    axes.set_title(f"mean and range of {len(SEEDS)} seeds", fontsize="medium")
    axes.legend(frameon=False)


def per_pixel(run: train.Trained) -> np.ndarray:
    """Share of the outgoing weights that each input pixel keeps, in percent."""
    kernel = np.asarray(run.params["fc1"]["kernel"])
    return 100 * np.mean(kernel != 0, axis=1).reshape(SIDE, SIDE)


def layers(axes: Axes, start: train.Trained, end: train.Trained) -> None:
    """Share of the weights that each layer keeps, at the start and at the end."""
    names = [layer["name"].removesuffix("/kernel") for layer in end.record.layers]
    for run, offset, colour, hatch, label in (
        (start, -0.2, COLOURS["5%, fixed random mask"], "///", "start"),
        (end, 0.2, COLOURS["5%, sparse momentum"], None, "end"),
    ):
        share = [100 * x["nonzero"] / x["weights"] for x in run.record.layers]
        places = np.arange(len(names)) + offset
        look = {"color": colour, "hatch": hatch, "edgecolor": "white"}
        bars = axes.barh(places, share, 0.4, label=label, **look)
        axes.bar_label(bars, fmt="%.3g%%", padding=3)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="weights kept (%)")
    axes.set_title("each layer finds its share", fontsize="medium")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.legend(frameon=False)


def draw(trained: dict[str, list[train.Trained]]) -> Figure:
    """The figure: error by epoch, weights per pixel, weights per layer."""
    start = trained["5%, fixed random mask"][0]
    end = trained["5%, sparse momentum"][0]
    canvas = Figure(figsize=(13, 3.1), layout="constrained")
    first, before, after, last = canvas.subplots(1, 4, width_ratios=(4, 2.4, 2.4, 3.2))
    errors(first, trained)
    maps = {before: per_pixel(start), after: per_pixel(end)}
    highest = max(float(shares.max()) for shares in maps.values())
    for axes, shares in maps.items():
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=highest)
        axes.set(xticks=[], yticks=[])
        when = "start" if axes is before else "end"
        axes.set_title(f"first layer at the {when}", fontsize="medium")
    canvas.colorbar(
        image,
        ax=[before, after],
        shrink=0.9,
        label="weights kept per pixel (%)",
    )
    layers(last, start, end)
    for axes in (first, last):
        axes.spines[["top", "right"]].set_visible(False)
    return canvas


if __name__ == "__main__":
    path = pathlib.Path(__file__).with_suffix(".png")
    plots.save(draw(train_all()), path)
    print(path)
