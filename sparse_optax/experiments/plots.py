"""Pictures of a record: error by epoch, density by layer, small weights by epoch."""

import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_optax.experiments.records import Record, check_writable
from sparse_optax.export.file import write_atomically

# Colours told apart by most readers, in grey as well.
COLOURS = ("#0b5394", "#cc6600", "#38761d", "#741b47", "#666666")
_THRESHOLDS = ("below_1e-03", "below_1e-04", "below_1e-06")


def errors(
    axes: Axes, records: Mapping[str, Record], *, colours: Sequence[str] = COLOURS
) -> None:
    """Draws the test error of each epoch, a line a record.

    Args:
      axes: where to draw.
      records: records by the name they get in the legend.
      colours: one a record, repeated where there are more.
    """
    highest = 0.0
    for (label, record), colour in zip(
        records.items(), itertools.cycle(colours), strict=False
    ):
        history = record.history
        axes.plot(history["epoch"], history["test_error"], color=colour, label=label)
        if record.base is not None:
            base = record.base["results"]["test_error"]
            axes.axhline(
                base, color=colour, linestyle=":", label=f"{label}, dense before"
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
        bars = axes.barh(places, shares, height, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3g%%", padding=3)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="weights kept (%)")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if len(records) > 1:
        axes.legend(frameon=False)


def small_weights(axes: Axes, record: Record) -> None:
    """Draws the share of weights below 1e-3, 1e-4 and 1e-6 after each epoch.

    Args:
      axes: where to draw.
      record: a record; the dashed line is the share that it removes in the end.
    """
    for name, colour in zip(_THRESHOLDS, COLOURS, strict=False):
        exponent = int(name.removeprefix("below_1e"))
        share = [100 * value for value in record.history[name]]
        label = f"|w| < $10^{{{exponent}}}$"
        axes.plot(record.history["epoch"], share, color=colour, label=label)
    removed = 100 * (1 - record.config["density"])
    axes.axhline(
        removed, color="black", linestyle="--", linewidth=0.8, label="cut at the end"
    )
    axes.set(xlabel="epoch", ylabel="share of the weights (%)", ylim=(0, 103))
    axes.legend(frameon=False, loc="lower right")


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


def save(canvas: Figure, path: str | Path) -> None:
    """Writes a figure as PNG.

    Args:
      canvas: the figure.
      path: file to write or replace.

    Raises:
      ValueError: where the folder cannot be written to.
    """
    path = Path(path)
    check_writable(path.parent)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=144)
    write_atomically(path, lambda file: file.write(buffer.getvalue()))
