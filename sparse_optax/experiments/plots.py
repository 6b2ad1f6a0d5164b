"""Pictures of records: error by epoch, density by layer and epoch, what is left."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_optax import plot
from sparse_optax.experiments.compare import THRESHOLDS
from sparse_optax.experiments.records import Record, check_writable
from sparse_optax.export.file import write_atomically

# Colours told apart by most readers, in grey as well.
COLOURS = ("#0b5394", "#cc6600", "#38761d", "#741b47", "#666666")
# Layers that a legend names in letters of the usual size.
_LEGEND = 8
# Bars are told apart in grey by what fills them.
_HATCHES = ("", "//", "..", "xx", "--", "\\\\")


def errors(
    axes: Axes, records: Mapping[str, Record], *, colours: Sequence[str] | None = None
) -> None:
    """Draws the test error of each epoch, a line a record.

    Args:
      axes: where to draw.
      records: records by the name they get in the legend.
      colours: one a record, repeated where there are more; by default those of
        :func:`plot.styles`.
    """
    highest = 0.0
    ways = plot.styles(len(records), markers=False)
    colours = colours or [way["color"] for way in ways]
    for (label, record), colour, way in zip(
        records.items(), itertools.cycle(colours), ways, strict=False
    ):
        history = record.history
        line = way["linestyle"]
        axes.plot(
            history["epoch"],
            history["test_error"],
            color=colour,
            linestyle=line,
            label=label,
        )
        if record.base is not None:
            base = record.base["results"]["test_error"]
            axes.axhline(
                base,
                color=colour,
                linestyle=line,
                linewidth=0.7,
                label=f"{label}, dense before",
            )
            highest = max(highest, base)
        # The first epochs tower over the rest: the scale is that of the second half.
        half = history["test_error"][len(history["test_error"]) // 2 :]
        highest = max(highest, *half)
        if "test_error_before_cut" in record.results:
            cut = record.results["test_error"]
            axes.plot(
                history["epoch"][-1],
                cut,
                "D",
                color=colour,
                label=f"{label}, after the cut",
                clip_on=False,
            )
            highest = max(highest, cut)
    axes.set(xlabel="epoch", ylabel="test error (%)", ylim=(0, 1.6 * highest or 1.0))
    axes.legend(frameon=False, loc="upper right")


def layers(
    axes: Axes, records: Mapping[str, Record], *, colours: Sequence[str] = COLOURS
) -> None:
    """Draws the share of weights that each layer keeps, a group of bars a layer.

    Args:
      axes: where to draw.
      records: records of one network by the name they get in the legend.
      colours: one a record, repeated where there are more.
    """
    names = [layer["name"] for layer in next(iter(records.values())).layers]
    names = [name.removesuffix("/kernel") for name in names]
    height = 0.8 / len(records)
    for i, ((label, record), colour) in enumerate(
        zip(records.items(), itertools.cycle(colours), strict=False)
    ):
        shares = [100 * layer["kept"] / layer["weights"] for layer in record.layers]
        places = [j + (i - (len(records) - 1) / 2) * height for j in range(len(names))]
        hatch = _HATCHES[i % len(_HATCHES)]
        bars = axes.barh(
            places,
            shares,
            height,
            color=colour,
            label=label,
            hatch=hatch,
            edgecolor="w",
        )
        axes.bar_label(bars, fmt="%.3g%%", padding=3)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="weights kept (%)")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if len(records) > 1:
        axes.legend(frameon=False)


def small_weights(axes: Axes, record: Record) -> None:
    """Draws the share of weights left above 1e-3, 1e-4 and 1e-6 after each epoch.

    Args:
      axes: where to draw.
      record: a record; the thin line is the share that it keeps in the end. Once no
        more than this are left, its cut costs nothing.
    """
    left = {}
    for name in THRESHOLDS:
        exponent = int(name.removeprefix("below_1e"))
        shares = [1 - value for value in record.history[name]]
        left[f"|w| > $10^{{{exponent}}}$"] = shares
    density = record.config["density"]
    plot.decay(left, density, steps=record.history["epoch"], axes=axes)
    axes.set(xlabel="epoch", ylim=(50 * density, 130))


def densities(axes: Axes, record: Record) -> bool:
    """Draws the density of each layer after each epoch.

    Args:
      axes: where to draw.
      record: a record.

    Returns:
      Whether there is anything to draw: the counts of each epoch, of a method that has
      masks while it trains.
    """
    counts = {layer["name"]: layer["weights"] for layer in record.layers}
    lines = {
        name.removesuffix("/kernel"): [kept / weights for kept in column]
        for name, weights in counts.items()
        if None not in (column := record.history.get(f"kept/{name}", [None]))
    }
    if not lines:
        return False
    plot.densities(lines, steps=record.history["epoch"], axes=axes)
    axes.set_xlabel("epoch")
    if len(lines) > _LEGEND:
        axes.legend(frameon=False, fontsize="xx-small", ncols=2)
    return True


def moved(axes: Axes, record: Record) -> bool:
    """Draws how many weights of each layer came since the epoch before.

    Args:
      axes: where to draw.
      record: a record.

    Returns:
      Whether there is anything to draw.
    """
    columns = {
        layer["name"].removesuffix("/kernel"): column
        for layer in record.layers
        if None not in (column := record.history.get(f"moved/{layer['name']}", [None]))
    }
    if not any(map(any, columns.values())):
        return False
    ways = plot.styles(len(columns), markers=False)
    for (name, column), way in zip(columns.items(), ways, strict=True):
        axes.plot(record.history["epoch"], column, label=name, **way)
    axes.set(xlabel="epoch", ylabel="weights that are new", ylim=(0, None))
    small = len(columns) > _LEGEND
    axes.legend(
        frameon=False,
        fontsize="xx-small" if small else "small",
        ncols=2 if small else 1,
    )
    return True


def _shares(axes: Axes, records: Mapping[str, Record]) -> None:
    """Draws the share of weights that each layer keeps, a line a record."""
    for (label, record), way in zip(
        records.items(), plot.styles(len(records)), strict=True
    ):
        names = [layer["name"].removesuffix("/kernel") for layer in record.layers]
        shares = [100 * layer["kept"] / layer["weights"] for layer in record.layers]
        axes.plot(names, [share or math.nan for share in shares], label=label, **way)
    axes.set(ylabel="weights kept (%)", yscale="log", ylim=(None, 130))
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    axes.tick_params(axis="x", rotation=90 if len(names) > _LEGEND else 0)
    axes.legend(frameon=False, fontsize="small")


def comparison(records: Mapping[str, Record]) -> Figure:
    """Runs in one picture: errors by epoch and, of one network, densities by layer.

    Args:
      records: records by the name they get in the legend.

    Returns:
      A figure.
    """
    names = {tuple(layer["name"] for layer in r.layers) for r in records.values()}
    panels = 2 if len(names) == 1 and names != {()} else 1
    canvas = Figure(figsize=(6.2 * panels, 4.2), layout="constrained")
    axes = canvas.subplots(1, panels, squeeze=False)[0]
    errors(axes[0], records)
    if panels == 2:
        _shares(axes[1], records)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return canvas


def figure(record: Record) -> Figure:
    """The panels that show one run.

    Args:
      record: its record.

    Returns:
      A figure; :func:`save` writes it.

    Examples:
      >>> from sparse_optax.experiments import config, plots, train
      >>> run = config.TrainConfig(density=0.1, epochs=2)
      >>> trained = train.train(run, runs=None)
      >>> len(plots.figure(trained.record).axes)
      2
    """
    gsm = record.config["method"] == "gsm"
    panels = 3 if gsm else 2
    canvas = Figure(figsize=(4.6 * panels, 3.4), layout="constrained")
    axes = canvas.subplots(1, panels)
    one = {record.config["method"].replace("_", " "): record}
    errors(axes[0], one)
    layers(axes[1], one)
    if gsm:
        small_weights(axes[2], record)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    config = record.config
    canvas.suptitle(
        f"{config['model']} on {config['dataset']}, {100 * config['density']:.3g}% of "
        f"the weights, test error {record.results['test_error']:.2f}%",
        fontsize="medium",
    )
    return canvas


def save(
    canvas: Figure, path: str | Path, about: Mapping[str, str] | None = None
) -> None:
    """Writes a figure as PNG.

    Args:
      canvas: the figure.
      path: file to write or replace.
      about: texts that the file holds, by their names; None for no more than usual.

    Raises:
      ValueError: where the folder cannot be written to.
    """
    path = Path(path)
    check_writable(path.parent)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=144, metadata=dict(about or {}))
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
