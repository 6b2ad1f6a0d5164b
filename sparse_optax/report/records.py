"""The records of a report, as scalars for loggers and as text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sparse_optax import checks
from sparse_optax.checks import boundary


class Layer(NamedTuple):
    """One layer, or all of them. None stands for an unknown number.

    Attributes:
      name: Name of the leaf, with ``[i]`` for a slice of a leaf that stacks layers.
      weights: Number of weights.
      kept: How many of them the mask keeps; without a mask, how many are not zero.
      dense_bytes: Bytes of all weights.
      sparse_bytes: Bytes that the kept weights and their positions take in a sparse
        file, at most; ``export.sparse_bytes`` gives the size of the whole file.
      dense_flops: FLOPs of all weights.
      kept_flops: FLOPs of the kept weights.
      removed: Weights removed in the last cycle.
      grown: Weights grown in the last cycle.
      added: Kept weights that were not kept before.
      explored: Weights that were ever kept.
      units: Output units, the indices along the unit axis; None for a vector, and
        where the axis is not known.
      empty_units: Units without a nonzero kept incoming weight; their output is their
        bias, whatever the input.
      passed: Weights whose gradient GSM let pass at the last step.
      threshold: The saliency threshold of GSM.
      nonzero: With a mask, how many weights are not zero.
      outside: How many of these the mask does not keep; 0 after an update of a method
        that is last in its chain.
      trained: Weights that train, where the state freezes all others at their value;
        these are kept, too.
    """

    name: str
    weights: int
    kept: int
    dense_bytes: int
    sparse_bytes: int
    dense_flops: int | float | None = None
    kept_flops: int | float | None = None
    removed: int | None = None
    grown: int | None = None
    added: int | None = None
    explored: int | None = None
    units: int | None = None
    empty_units: int | None = None
    passed: int | None = None
    threshold: float | None = None
    nonzero: int | None = None
    outside: int | None = None
    trained: int | None = None

    @property
    def density(self) -> float:
        """Fraction of kept weights; 1 for a layer without weights."""
        return self.kept / self.weights if self.weights else 1.0

    @property
    def churn(self) -> float | None:
        """Fraction of the kept weights that were not kept before."""
        return None if self.added is None else self.added / max(self.kept, 1)

    @property
    def explored_share(self) -> float | None:
        """Fraction of all weights that were ever kept."""
        return None if self.explored is None else self.explored / max(self.weights, 1)


class Summary(NamedTuple):
    """The result of ``summary``.

    Attributes:
      layers: One record per layer, in the order of the parameters.
      total: All layers together.
      dense_weights: Number of parameters in the leaves that stay dense.
      dense_bytes: Bytes of these leaves.
      skipped: Cycles left out because of numbers that are not finite, or None.
      unknown_units: Names of leaves of which names and shapes do not tell the axis of
        output units; ``total`` then has no units.
      misplaced: How often the method saw that missing weights did not become zero, or
        None. Above 0, something behind it in the chain changes its updates.
      shared_masks: Whether all members of an ensemble, of which this is one, hold the
        same masks.
    """

    layers: tuple[Layer, ...]
    total: Layer
    dense_weights: int
    dense_bytes: int
    skipped: int | None = None
    unknown_units: tuple[str, ...] = ()
    misplaced: int | None = None
    shared_masks: bool = False

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole model in a sparse file, at most, without its header."""
        return self.total.sparse_bytes + self.dense_bytes

    def scalars(self) -> dict[str, float]:
        """See ``report.scalars``."""
        return scalars(self)


_SHOWN: dict[str, Callable[[Layer], Any]] = {
    "weights": lambda layer: layer.weights,
    "kept": lambda layer: layer.kept,
    "nonzero": lambda layer: layer.nonzero,
    "outside": lambda layer: layer.outside,
    "density": lambda layer: layer.density,
    "bytes": lambda layer: layer.sparse_bytes,
    "flops": lambda layer: layer.kept_flops,
    "removed": lambda layer: layer.removed,
    "grown": lambda layer: layer.grown,
    "churn": lambda layer: layer.churn,
    "explored": lambda layer: layer.explored_share,
    "empty_units": lambda layer: layer.empty_units,
    "passed": lambda layer: layer.passed,
    "threshold": lambda layer: layer.threshold,
    "trained": lambda layer: layer.trained,
}
_SHARES = ("density", "churn", "explored")


@boundary("scalars")
def scalars(summary: Summary) -> dict[str, float]:
    """A summary as scalars, for any logger.

    Args:
      summary: From ``summary``.

    Returns:
      ``{"density/Dense_0/kernel": 0.05, ..., "density/total": 0.05}``: every known
      quantity, for each layer and in total.

    Raises:
      ValueError: If ``summary`` is something else, such as the tuple of an ensemble.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> made = sparse_optax.report.summary({"kernel": jnp.eye(2)})
      >>> sparse_optax.report.scalars(made)["density/kernel"]
      0.5
    """
    _check_summaries([summary], "a Summary")
    rows = (*summary.layers, summary.total)
    found = {
        f"{quantity}/{layer.name}": float(value)
        for quantity, read in _SHOWN.items()
        for layer in rows
        if (value := read(layer)) is not None
    }
    found["file_bytes/total"] = float(summary.file_bytes)
    for quantity in ("skipped", "misplaced"):
        value = getattr(summary, quantity)
        if value is not None:
            found[f"{quantity}/total"] = float(value)
    return found


@boundary("table")
def table(summary: Summary | Sequence[Summary]) -> str:
    """A summary as aligned plain text, one line per layer.

    Args:
      summary: From ``summary``; of a vmapped state one a member.

    Returns:
      Text, with dashes for unknown numbers and without unknown columns; of several
      members one table after another.

    Raises:
      ValueError: If ``summary`` is something else.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import report
      >>> print(report.table(report.summary({"kernel": jnp.eye(2, 40)})))
      layer   weights  kept  density  bytes  empty_units
      kernel       80     2     2.5%     10           38
      total        80     2     2.5%     10           38
      10 bytes sparse, 320 dense; 0 parameters in dense leaves included.
    """
    if isinstance(summary, Summary):
        return _table(summary)
    allowed = "a Summary, or a tuple of them"
    checks.iterable("summary", summary, allowed, _SUMMARY)
    members = list(summary)
    _check_summaries(members, allowed)
    parts = (f"member {i}\n{_table(each)}" for i, each in enumerate(members))
    return "\n\n".join(parts)


_SUMMARY = "Pass report.summary(params, opt_state)."


def _check_summaries(values: Sequence[Any], allowed: str) -> None:
    for value in values:
        if not isinstance(value, Summary):
            checks.fail("summary", value, allowed, _SUMMARY)


def _table(summary: Summary) -> str:
    """The table of one network."""
    rows = (*summary.layers, summary.total)
    columns = [["layer", *(layer.name for layer in rows)]]
    for quantity, read in _SHOWN.items():
        values = [read(layer) for layer in rows]
        if quantity == "outside" and not any(values):
            continue  # as it should be
        if any(value is not None for value in values):
            shown = [_text(value, quantity in _SHARES) for value in values]
            columns.append([quantity, *shown])
    lines = aligned(list(zip(*columns, strict=True)), str.rjust)
    dense = summary.total.dense_bytes + summary.dense_bytes
    lines.append(
        f"{summary.file_bytes:,} bytes sparse, {dense:,} dense; "
        f"{summary.dense_weights:,} parameters in dense leaves included."
    )
    outside = summary.total.outside
    if outside:
        # Before the first update that is so, unless the parameters were made sparse.
        lines.append(
            f"WARNING: {outside:,} weights outside the masks are not zero: bytes and "
            "density are not those of this network. Make the sparse method the last of "
            "its chain, or apply sparse_optax.sparsify(params, opt_state)."
        )
    if summary.misplaced:
        lines.append(
            f"WARNING: {summary.misplaced:,} times missing weights did not become "
            "zero: what stands behind the sparse method changes its updates. Make it "
            "the last of its chain; decay, clipping and scaling go inside or before it."
        )
    if summary.skipped:
        lines.append(f"{summary.skipped:,} cycles skipped: numbers not finite.")
    if summary.shared_masks:
        lines.append(
            "All members of this ensemble hold the same masks. Give each its own key, "
            "by `in_axes`, if they should differ."
        )
    if summary.unknown_units:
        first, number = summary.unknown_units[0], len(summary.unknown_units)
        lines.append(
            f"The output units of {number:,} leaves are not known: give "
            f"unit_axis={{{first!r}: axis, ...}}."
        )
    return "\n".join(lines)


def aligned(
    rows: Sequence[Sequence[str]], justify: Callable[[str, int], str]
) -> list[str]:
    """Rows of text as lines of columns; the first column is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            justify(cell, width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _text(value: Any, is_share: bool) -> str:
    if value is None:
        return "-"
    if is_share:
        return f"{100 * value:.3g}%"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
