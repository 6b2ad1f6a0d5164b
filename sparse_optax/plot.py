"""Pictures: masks, densities over time, the decay under GSM, error by density.

Every function draws on the ``axes`` of matplotlib that it is given, or on those of a
new figure of ``pyplot``, and returns them. Lines differ in colour, in style and in
marker, so that they can be told apart in grey. Matplotlib is imported when a function
is called, not with this module: ``pip install "sparse_optax[plot]"``.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sparse_optax.checks import ArgumentError, boundary, fail, number, whole
from sparse_optax.masks.optimizer_state import named_masks
from sparse_optax.masks.tree import unpack

__all__ = ["decay", "densities", "error_by_density", "mask", "styles"]

# Colours of unlike brightness, from dark to light and back.
_COLOURS = ("#0b5394", "#cc6600", "#38761d", "#741b47", "#e69f00", "#666666", "#56b4e9")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
# Pixels along a side of the picture of a mask: larger masks are averaged.
_PIXELS = 256
# Below a share of this, nothing is left.
_NOTHING = 1e-8


@boundary("styles")
def styles(number: int, *, markers: bool = True) -> list[dict[str, Any]]:
    """Ways to draw lines that differ in colour, in style and in marker.

    Args:
      number: How many.
      markers: False for lines without markers, of many points.

    Returns:
      Keyword arguments of ``Axes.plot``, a dict each.

    Raises:
      ValueError: If ``number`` is no integer of at least 0.

    Examples:
      >>> from sparse_optax import plot
      >>> first, second = plot.styles(2)
      >>> first["linestyle"], second["linestyle"], first["marker"], second["marker"]
      ('-', '--', 'o', 's')
    """
    whole("number", number, 0, cure="Give the number of lines.")
    ways = zip(*map(itertools.cycle, (_COLOURS, _LINES, _MARKERS)), strict=True)
    made = []
    for colour, line, marker in itertools.islice(ways, int(number)):
        way = {"color": colour, "linestyle": line}
        made.append({**way, "marker": marker, "markersize": 4} if markers else way)
    return made


@boundary("mask")
def mask(
    masks: Any,
    name: str | None = None,
    *,
    image: Sequence[int] | None = None,
    axes: Any = None,
) -> Any:
    """Draws the mask of one leaf, or how much is kept of what each input leads to.

    A mask of two dimensions is drawn as it is, inputs down and outputs across in flax
    and haiku. The first axes of a kernel of more dimensions are joined to one. Masks of
    more than 256 rows or columns are averaged over neighbours: the picture shows the
    share of kept weights.

    Args:
      masks: A boolean array; or a mask tree, or an optimizer state with masks.
      name: The leaf of a tree, such as ``"Dense_0/kernel"``; it may be left out where
        there is one.
      image: Height and width, or height, width and channels, of the input: each pixel
        then shows the share of its outgoing weights that are kept, in percent. The
        first axis of the mask must have as many entries.
      axes: Axes of matplotlib, or None for new ones.

    Returns:
      The axes.

    Raises:
      ValueError: If an argument does not fit.
      ImportError: If matplotlib is not installed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from matplotlib.figure import Figure
      >>> from sparse_optax import plot
      >>> axes = plot.mask(jnp.eye(64, 10, dtype=bool), axes=Figure().add_subplot())
      >>> axes.images[0].get_array().shape
      (64, 10)
      >>> axes = plot.mask(
      ...     {"fc": jnp.eye(64, 10, dtype=bool)}, image=(8, 8), axes=axes
      ... )
    """
    array = _one_mask(masks, name)
    axes = _axes(axes)
    if image is None:
        shares = _averaged(array.reshape(-1, array.shape[-1]))
        axes.set(xlabel="output", ylabel="input")
    else:
        shares = 100 * _per_pixel(array, image)
        axes.set(xticks=[], yticks=[])
    # Averages of a sparse mask are all small.
    top = float(shares.max()) or 1.0
    dark = "Greys" if image is None else "viridis"
    height, width = array.reshape(-1, array.shape[-1]).shape
    shown = axes.imshow(
        shares,
        cmap=dark,
        vmin=0,
        vmax=top,
        interpolation="nearest",
        aspect="auto" if image is None else "equal",
        extent=None if image is not None else (0, width, height, 0),
    )
    if image is not None:
        axes.figure.colorbar(shown, ax=axes, label="weights kept per pixel (%)")
    return axes


@boundary("densities")
def densities(
    history: Sequence[Any] | Mapping[str, Sequence[float]],
    *,
    steps: Sequence[float] | None = None,
    axes: Any = None,
) -> Any:
    """Draws the density of each layer over time, on a logarithmic axis.

    Args:
      history: The results of ``report.summary``, or of ``report.metrics``, one a time;
        or ``{layer: densities}``, in (0, 1].
      steps: When they were taken; by default 1, 2, 3 and so on.
      axes: Axes of matplotlib, or None for new ones.

    Returns:
      The axes.

    Raises:
      ValueError: If an argument does not fit.
      ImportError: If matplotlib is not installed.

    Examples:
      >>> from matplotlib.figure import Figure
      >>> from sparse_optax import plot
      >>> axes = plot.densities(
      ...     {"fc1": [0.05, 0.04], "fc2": [0.05, 0.3]}, axes=Figure().add_subplot()
      ... )
      >>> [line.get_label() for line in axes.lines]
      ['fc1', 'fc2']
    """
    axes = _over_time(_columns(history), steps, axes)
    axes.set(ylabel="weights kept (%)")
    return _percent(axes)


@boundary("decay")
def decay(
    left: Mapping[str, Sequence[float]],
    density: float,
    *,
    steps: Sequence[float] | None = None,
    axes: Any = None,
) -> Any:
    """Draws how many weights are left above a magnitude, and where the cut will be.

    Under GSM all but the passing weights decay. The cut to the density is free once no
    more than this share is left: the lines must come down to the cut. What is left
    spans decades, so that its axis is logarithmic.

    Args:
      left: ``{label: shares}``: the share of all weights whose magnitude is above a
        limit, in [0, 1], one a time; such as ``gsm_gap(...).alive`` over the number of
        weights.
      density: The share that the cut keeps, in (0, 1].
      steps: When they were counted; by default 1, 2, 3 and so on.
      axes: Axes of matplotlib, or None for new ones.

    Returns:
      The axes.

    Raises:
      ValueError: If an argument does not fit.
      ImportError: If matplotlib is not installed.

    Examples:
      >>> from matplotlib.figure import Figure
      >>> from sparse_optax import plot
      >>> axes = plot.decay(
      ...     {"above 1e-4": [1, 0.4, 0.02]}, 0.02, axes=Figure().add_subplot()
      ... )
      >>> axes.get_yscale()
      'log'
    """
    number("density", density, 0, 1, ends="(]", cure="Give the share that is kept.")
    lines = {
        label: [x if x > _NOTHING else math.nan for x in values]
        for label, values in _columns(left).items()
    }
    axes = _over_time(lines, steps, axes)
    axes.axhline(
        100 * density, color="black", linewidth=0.8, label="what the cut keeps"
    )
    axes.set(ylabel="weights left (%)")
    return _percent(axes)


@boundary("error_by_density")
def error_by_density(
    errors: Mapping[str, Mapping[float, Any]],
    *,
    dense: float | None = None,
    axes: Any = None,
) -> Any:
    """Draws the error of methods at several densities, a line each.

    Points are means, bars reach from the lowest to the highest run.

    Args:
      errors: ``{method: {density: error, or the errors of several runs}}``, densities
        in (0, 1], errors of any unit.
      dense: The error of the network with all weights, a horizontal line.
      axes: Axes of matplotlib, or None for new ones.

    Returns:
      The axes.

    Raises:
      ValueError: If an argument does not fit.
      ImportError: If matplotlib is not installed.

    Examples:
      >>> from matplotlib.figure import Figure
      >>> from sparse_optax import plot
      >>> errors = {"RigL": {0.01: [2.1, 2.3], 0.05: [1.6, 1.7]}, "SET": {0.05: 1.8}}
      >>> axes = plot.error_by_density(errors, dense=1.4, axes=Figure().add_subplot())
      >>> axes.get_xscale(), len(axes.containers)
      ('log', 2)
    """
    if not isinstance(errors, Mapping) or not all(
        isinstance(x, Mapping) for x in errors.values()
    ):
        cure = 'Give {"RigL": {0.05: [1.6, 1.7]}}, for instance.'
        fail("errors", errors, "a dict of dicts, by method and density", cure)
    axes = _axes(axes)
    ticks = set()
    for (label, found), way in zip(errors.items(), styles(len(errors)), strict=True):
        for density in found:
            cure = "Give the share that is kept."
            number(f"errors[{label!r}]", density, 0, 1, ends="(]", cure=cure)
        order = sorted(found)
        runs = [np.ravel(np.asarray(found[d], float)) for d in order]
        means = np.array([x.mean() for x in runs])
        low, high = (np.array([f(x) for x in runs]) for f in (np.min, np.max))
        ticks |= set(order)
        axes.errorbar(
            [100 * d for d in order],
            means,
            yerr=[means - low, high - means],
            label=label,
            capsize=2,
            **way,
        )
    if dense is not None:
        axes.axhline(dense, color="black", linewidth=0.8, label="all weights")
    axes.set(xlabel="weights kept (%)", ylabel="error", xscale="log")
    axes.set_xticks([100 * d for d in sorted(ticks)])
    axes.set_xticklabels([f"{100 * d:g}" for d in sorted(ticks)])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small")
    return axes


# --- axes -----------------------------------------------------------------------------
def _axes(axes: Any) -> Any:
    """The axes, or new ones; matplotlib is needed from here on."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"sparse_optax.plot needs matplotlib, which cannot be imported ({error}). "
            'Install it: pip install "sparse_optax[plot]".'
        ) from error
    if axes is None:
        _, axes = plt.subplots(layout="constrained")
    elif not hasattr(axes, "plot"):
        fail("axes", axes, "axes of matplotlib", "Leave it out for new ones.")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _over_time(
    lines: Mapping[str, Sequence[float]], steps: Sequence[float] | None, axes: Any
) -> Any:
    """Shares over time in percent, a line each."""
    axes = _axes(axes)
    ways = styles(len(lines), markers=False)
    for (label, values), way in zip(lines.items(), ways, strict=True):
        shown = [100 * x for x in values]
        axes.plot(_steps(steps, len(values)), shown, label=label, **way)
    axes.set(xlabel="step" if steps is not None else "time")
    return axes


def _percent(axes: Any) -> Any:
    """A logarithmic axis of percent, in plain numbers, and the names of the lines."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    low, high = axes.get_ylim()
    axes.set_ylim(low, min(high, 130))
    axes.legend(frameon=False, fontsize="small")
    return axes


def _steps(steps: Sequence[float] | None, length: int) -> list[float]:
    if steps is None:
        return list(range(1, length + 1))
    found = [float(x) for x in steps]
    if len(found) != length:
        cure = "Give one step for each time, or leave it out."
        fail("steps", steps, f"{length} numbers, as many as times", cure)
    return found


# --- numbers --------------------------------------------------------------------------
def _columns(history: Any) -> dict[str, list[float]]:
    """A list of numbers for each line."""
    if isinstance(history, Mapping):
        lines = {str(name): [float(x) for x in row] for name, row in history.items()}
    else:
        rows = [_densities_of(moment) for moment in _listed(history)]
        lines = {name: [row[name] for row in rows] for name in (rows or [{}])[0]}
    if not lines or not all(lines.values()):
        cure = 'Give the results of report.summary, or {"fc1": [0.05, 0.04]}.'
        fail("history", history, "one moment or more", cure)
    return lines


def _listed(history: Any) -> list[Any]:
    if not isinstance(history, Iterable) or hasattr(history, "layers"):
        cure = "Collect the results of report.summary in a list."
        fail("history", history, "a sequence of moments", cure)
    return list(history)


def _densities_of(moment: Any) -> dict[str, float]:
    """The density of each layer, from a summary or from metrics."""
    if hasattr(moment, "layers"):
        return {layer.name: layer.density for layer in moment.layers}
    if isinstance(moment, Mapping):
        start = "density/"
        return {
            name.removeprefix(start): float(value)
            for name, value in moment.items()
            if name.startswith(start) and name != "density/total"
        }
    return fail(
        "history", moment, "results of report.summary or report.metrics", "Give these."
    )


def _one_mask(masks: Any, name: str | None) -> np.ndarray:
    """The boolean array of a leaf, of two dimensions or more."""
    if isinstance(masks, jax.Array | np.ndarray):
        found: dict[str, Any] = {"mask": masks}
        name = "mask"
    else:
        found = named_masks(masks)
    if name is None and len(found) == 1:
        (name,) = found
    if name not in found:
        cure = "Give the name of one of these."
        fail("name", name, f"one of {sorted(found)}", cure)
    array = np.asarray(unpack(found[name]))
    if array.dtype != bool or not array.size:
        raise ArgumentError(
            f"`masks` has {array.dtype} of shape {array.shape} for {name!r}; it must "
            "be boolean and hold a weight. Pass a mask: weights != 0."
        )
    return array if array.ndim > 1 else array.reshape(1, -1)


def _per_pixel(array: np.ndarray, image: Sequence[int]) -> np.ndarray:
    """Share of kept weights of each entry of the first axis, as an image."""
    sides = tuple(image) if isinstance(image, Sequence) else ()
    if len(sides) not in (2, 3) or math.prod(sides) != len(array):
        cure = "Give (28, 28) for 784 inputs, for instance."
        allowed = f"two or three numbers whose product is {len(array)}"
        fail("image", image, allowed, cure)
    shares = array.reshape(len(array), -1).mean(axis=1).reshape(sides)
    return shares if len(sides) == 2 else shares.mean(axis=2)


def _averaged(array: np.ndarray) -> np.ndarray:
    """A matrix of at most as many rows and columns as the picture has pixels."""
    shares = array.astype(float)
    for axis in (0, 1):
        size = shares.shape[axis]
        starts = np.unique(np.linspace(0, size, min(size, _PIXELS), False).astype(int))
        lengths = np.diff([*starts, size])
        sums = np.add.reduceat(shares, starts, axis=axis)
        shares = sums / (lengths[:, None] if axis == 0 else lengths)
    return shares
