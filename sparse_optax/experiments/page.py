"""One page of HTML about runs, which needs no other file and no network."""

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_optax import load_sparse, plot
from sparse_optax.experiments import compare, plots, sizes
from sparse_optax.experiments.records import Record

# Output units or filters of the first layer that are shown one by one.
_UNITS = 24
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff;
       max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
.key { font-size: 1.15rem; } .note { color: #555; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 28rem; } figcaption { color: #555; font-size: .9rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.all td { font-weight: 600; border-top: 2px solid #888; }
code { background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }
"""


class Run(NamedTuple):
    """A run of a page.

    Attributes:
      record: its record.
      dense: the record of the dense run beside it, or None.
      first: the mask of its first layer, or None where its weights are not at hand.
    """

    record: Record
    dense: Record | None = None
    first: np.ndarray | None = None


def first_mask(folder: Path, record: Record) -> np.ndarray | None:
    """The mask of the first layer, from the weights that a run has left.

    Args:
      folder: the folder of the run.
      record: its record.

    Returns:
      A boolean array; None where there are no weights, or the layer is whole.
    """
    path = folder / "weights.sparse"
    if not path.is_file() or not record.layers:
        return None
    leaf = load_sparse(path).leaves.get(record.layers[0]["name"])
    if leaf is None or leaf.positions is None:
        return None
    mask = np.zeros(math.prod(leaf.shape), bool)
    mask[leaf.positions] = True
    return mask.reshape(leaf.shape)


def render(runs: Sequence[Run]) -> str:
    """The page.

    Args:
      runs: one run or more.

    Returns:
      HTML. Pictures are in it; nothing is loaded from elsewhere.
    """
    names = compare.labels([run.record for run in runs])
    parts = [_picture(_overview, names, runs)] if len(runs) > 1 else []
    parts += [_section(name, run) for name, run in zip(names, runs, strict=True)]
    title = "sparse-optax: " + ", ".join(names)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n" + "\n".join(parts) + "</body></html>\n"
    )


# --- one run --------------------------------------------------------------------------
def _section(name: str, run: Run) -> str:
    """What there is to say of one run."""
    record, config = run.record, run.record.config
    key = (
        compare.sentence(record, run.dense)
        if run.dense is not None and config["method"] != "dense"
        else f"test error {record.results['test_error']:.2f}% with "
        + compare.share(record.results["kept"], record.results["weights"])
    )
    panels = [
        ("Test error after each epoch.", _errors),
        ("Weights that each layer keeps, after each epoch.", _densities),
        ("Weights kept that were not kept one epoch before.", _moved),
        ("Weights left above three magnitudes; what the cut keeps.", _left),
        ("First layer: weights kept of each input.", _inputs),
        ("First layer: masks of the units with the most weights.", _units),
    ]
    pictures = [_panel(caption, draw, run) for caption, draw in panels]
    dense = "" if run.dense is None else f", dense record {run.dense.name}"
    device = record.device.get("cpu") or record.device.get("kind") or "unknown device"
    return "\n".join(
        [
            f"<section><h2>{html.escape(name)}</h2>",
            f'<p class="key">{html.escape(key)}</p>',
            f'<p class="note">{html.escape(_facts(record))}<br>'
            f"<code>{html.escape(record.command)}</code><br>"
            f"{html.escape(f'{record.name}{dense}, {device}')}</p>",
            f'<div class="plots">{"".join(pictures)}</div>',
            _layer_table(record),
            "</section>",
        ]
    )


def _facts(record: Record) -> str:
    config, results = record.config, record.results
    facts = [
        f"{config['model']} on {config['dataset']}",
        f"{len(record.history['epoch'])} epochs",
        f"{record.wall_seconds:.1f} s of training",
    ]
    if config.get("budget"):
        facts.insert(1, f"at most {config['budget']}")
    if "file_bytes" in results:
        facts.append(f"a file of {results['file_bytes']:,} bytes")
    if "flops" in results:
        facts.append(f"{results['flops']:,} FLOPs an image")
    if record.base is not None:
        error = record.base["results"]["test_error"]
        facts.append(f"from a network with a test error of {error:.2f}%")
    return ", ".join(facts)


def _layer_table(record: Record) -> str:
    columns = ("layer", "shape", "weights", "kept", "non-zero", "density")
    rows = [
        (
            layer["name"],
            " x ".join(map(str, layer["shape"])),
            *(f"{layer[key]:,}" for key in ("weights", "kept", "nonzero")),
            f"{100 * layer['kept'] / layer['weights']:.2f}%",
        )
        for layer in record.layers
    ]
    results = record.results
    numbers = (results["weights"], results["kept"], results.get("nonzeros", 0))
    total = ("all", "", *(f"{number:,}" for number in numbers))
    rows.append((*total, f"{100 * results['kept'] / results['weights']:.2f}%"))
    body = "".join(
        ('<tr class="all">' if row is rows[-1] else "<tr>")
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    head = "".join(f"<th>{column}</th>" for column in columns)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# --- pictures -------------------------------------------------------------------------
def _panel(caption: str, draw: Callable[[Axes, Run], bool], run: Run) -> str:
    """A picture with its caption; nothing where there is nothing to draw."""
    canvas = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = canvas.add_subplot()
    if not draw(axes, run):
        return ""
    return _image(canvas, caption)


def _picture(draw: Callable[..., Figure], *values: Any) -> str:
    canvas = draw(*values)
    return f'<div class="plots">{_image(canvas, "All runs of this page.")}</div>'


def _image(canvas: Figure, caption: str) -> str:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _overview(names: Sequence[str], runs: Sequence[Run]) -> Figure:
    found = dict(zip(names, (run.record for run in runs), strict=True))
    return plots.comparison(found)


def _errors(axes: Axes, run: Run) -> bool:
    label = run.record.config["method"].replace("_", " ")
    plots.errors(axes, {label: run.record})
    axes.spines[["top", "right"]].set_visible(False)
    if run.dense is not None and run.record.config["method"] != "dense":
        error = run.dense.results["test_error"]
        axes.axhline(error, color="black", lw=0.8, label=f"dense, {error:.2f}%")
        top = axes.get_ylim()[1]
        axes.set_ylim(0, max(top, 1.3 * error))
        axes.legend(frameon=False, loc="upper right")
    return True


def _densities(axes: Axes, run: Run) -> bool:
    return plots.densities(axes, run.record)


def _moved(axes: Axes, run: Run) -> bool:
    return plots.moved(axes, run.record)


def _left(axes: Axes, run: Run) -> bool:
    if run.record.config["method"] not in compare.SHRINKING:
        return False
    plots.small_weights(axes, run.record)
    return True


def _image_shape(run: Run) -> tuple[int, ...] | None:
    """The image that the inputs of a dense first layer come from."""
    if run.first is None or run.first.ndim != 2:
        return None
    shape, _ = sizes.IMAGES.get(run.record.config["dataset"], ((), 0))
    return shape if math.prod(shape) == len(run.first) else None


def _inputs(axes: Axes, run: Run) -> bool:
    if run.first is None:
        return False
    plot.mask(run.first, image=_image_shape(run), axes=axes)
    return True


def _units(axes: Axes, run: Run) -> bool:
    """Masks of single units side by side: images of pixels, or kernels."""
    mask, shape = run.first, _image_shape(run)
    if mask is None or (mask.ndim == 2 and shape is None):
        return False
    if mask.ndim == 4:
        pictures = mask.mean(axis=2)
    else:
        pictures = mask.reshape(*(shape or ()), mask.shape[-1]).mean(axis=2)
    order = np.argsort(-pictures.sum(axis=(0, 1)), kind="stable")[:_UNITS]
    columns = min(len(order), 8)
    rows = -(-len(order) // columns)
    height, width = pictures.shape[:2]
    # A line of one pixel between two of them.
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1), np.nan)
    for place, unit in enumerate(order):
        i, j = divmod(place, columns)
        top, left = i * (height + 1) + 1, j * (width + 1) + 1
        canvas[top : top + height, left : left + width] = pictures[:, :, unit]
    axes.set_facecolor("#cc6600")
    axes.imshow(canvas, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    return True
