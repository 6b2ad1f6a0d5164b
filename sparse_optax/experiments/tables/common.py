"""What every table is made of: rows to run, a paper's numbers, a comparison."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparse_optax.experiments import config as configs
from sparse_optax.experiments import recipes, records
from sparse_optax.experiments.config import TrainConfig
from sparse_optax.experiments.records import Record

# Values that runs have had since later versions: the records before lack them, and were
# made with their defaults.
_LATER = ("grow", "l1", "prune", "prune_decay", "redistribute", "shares", "ticket")
# Numbers of a result that may be null: without validation images, without weights.
_NULL = ("valid_error", "valid_error_before_cut", "ratio")


class Row(NamedTuple):
    """One run of a table.

    Attributes:
      name: name of its record, ``results/<table>/<name>.json``.
      config: the run.
      group: the line of the table that it counts for.
      needs: names of rows to run before this one.
      table: the table that runs it and holds its record; None is its own.
    """

    name: str
    config: TrainConfig
    group: str
    needs: tuple[str, ...] = ()
    table: str | None = None


class Table(NamedTuple):
    """A table of a paper.

    Attributes:
      name: its folder under ``results/``.
      title: heading.
      rows: the runs.
      render: records by name to Markdown, without the heading.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    render: Callable[[dict[str, Record]], str]


class Turn(NamedTuple):
    """Some rows of a table, in the order in which all tables are run.

    Attributes:
      table: name of the table.
      rows: regular expression that matches the names of the rows.
      seeds: only so many seeds, from seed 0; None for all of them.
    """

    table: str
    rows: str = ".*"
    seeds: int | None = None


class Paper(NamedTuple):
    """A published number: mean of ``n`` runs and its standard error.

    The standard error is None where the paper gives none.
    """

    mean: float
    se: float | None = None
    n: int = 10


class Comparison(NamedTuple):
    """Our runs beside a published number.

    Attributes:
      n: our runs.
      mean: their mean.
      se: their standard error, std(ddof=1) / sqrt(n); NaN for one run.
      low: lower end of the 95% Welch interval of (ours - paper).
      high: upper end.
      verdict: ``"matches"`` where the interval holds 0, ``"better"`` where it lies
        below, ``"worse"`` where it lies above, ``""`` where there is no interval.
    """

    n: int
    mean: float
    se: float
    low: float
    high: float
    verdict: str


def compare(ours: Sequence[float], paper: Paper | None = None) -> Comparison:
    """Compares runs with a published mean by Welch's interval; lower is better.

    The interval is ``d +- t * sqrt(se1**2 + se2**2)``, ``t`` the 97.5% point of
    Student's distribution with the Welch-Satterthwaite degrees of freedom.

    Args:
      ours: one number a run, at least one.
      paper: the published number, or None.

    Returns:
      A :class:`Comparison`.

    Raises:
      ValueError: without runs.

    Examples:
      >>> from sparse_optax.experiments.tables import common
      >>> result = common.compare([1.4, 1.5, 1.6], common.Paper(1.53, 0.02))
      >>> round(result.mean, 2), result.verdict
      (1.5, 'matches')

    References:
      Welch, `The generalization of Student's problem when several different
      population variances are involved <https://doi.org/10.2307/2332510>`_, 1947.
    """
    from scipy import stats

    if not len(ours):
        raise ValueError("compare: ours is empty; give at least one run.")
    n, mean = len(ours), float(np.mean(ours))
    se = float(np.std(ours, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    low = high = math.nan
    verdict = ""
    if paper is not None and paper.se is not None and n > 1:
        variance = se**2 + paper.se**2
        if variance > 0:
            freedom = variance**2 / (se**4 / (n - 1) + paper.se**4 / (paper.n - 1))
            half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
        else:
            half = 0.0
        low, high = mean - paper.mean - half, mean - paper.mean + half
        verdict = "better" if high < 0 else "worse" if low > 0 else "matches"
    return Comparison(n, mean, se, low, high, verdict)


def read_row(row: Row, path: Path) -> Record:
    """Reads the record of a row and compares it with what the row asks for.

    Args:
      row: the row.
      path: file of its record.

    Returns:
      The record.

    Raises:
      ValueError: where the record is damaged or is that of another run.
    """
    record = records.read(path)
    wanted = configs.resolve(row.config)
    other = _differences(record.config, wanted)
    if record.name != row.name:
        other.append("name")
    if record.seed != wanted.seed:
        other.append("seed")
    base = configs.base_of(wanted)
    if base is None or record.base is None:
        if (base is None) != (record.base is None):
            other.append("base")
    else:
        found = record.base.get("config", {})
        other += [f"base.{key}" for key in _differences(found, base)]
    if other:
        raise ValueError(
            f"tables: {path} was made with other values of {other} than its row asks "
            "for; delete it to run it again."
        )
    parts = [record.results, *([record.base.get("results")] if record.base else [])]
    for results in parts:
        needed = {"test_error": None, "kept": None, "weights": None}
        nulls = _nulls({**needed, **(results or {})})
        if nulls:
            raise ValueError(
                f"tables: {path} has no number for {nulls}; delete it to run it again."
            )
    return record


def _differences(found: dict[str, Any], config: configs.Resolved) -> list[str]:
    """The keys in which the configuration of a record is another than a run's."""
    wanted = configs.as_dict(config)
    plain = configs.as_dict(TrainConfig())
    plain["shares"] = recipes.METHODS[config.method].shares
    found = {**configs.EARLIER, **{key: plain[key] for key in _LATER}, **found}
    if isinstance(found.get("base"), dict):
        found["base"] = {"weight_decay": None, **found["base"]}
    keys = dict.fromkeys([*wanted, *found])
    return [
        key
        for key in keys
        if key not in wanted or key not in found or wanted[key] != found[key]
    ]


def _nulls(results: dict[str, Any]) -> list[str]:
    """The names under which there is null instead of a number."""
    names = []
    for name, value in results.items():
        if isinstance(value, dict):
            names += [f"{name}.{inner}" for inner in _nulls(value)]
        elif value is None and name not in _NULL:
            names.append(name)
    return names


def group(rows: Sequence[Row], records: dict[str, Record], name: str) -> list[Record]:
    """The finished records of one line of a table, in the order of its rows."""
    return [records[r.name] for r in rows if r.group == name and r.name in records]


def sparse_momentum_rows(
    seeds: Iterable[int], groups: Iterable[str], **network: Any
) -> tuple[Row, ...]:
    """MNIST, dense and by sparse momentum; groups are ``"dense"`` and densities. Seed
    by seed, so that a table half done has every line.
    """

    def row(group: str, seed: int) -> Row:
        dense = group == "dense"
        config = TrainConfig(
            dataset="mnist",
            method="dense" if dense else "sparse_momentum",
            density=1.0 if dense else float(group),
            seed=seed,
            **network,
        )
        return Row(f"{group if dense else 'd' + group}_s{seed}", config, group)

    return tuple(row(group, seed) for seed in seeds for group in groups)


def against_paper(
    rows: Sequence[Row], papers: dict[str, Paper], records: dict[str, Record]
) -> str:
    """One line a density, ours beside the published error; groups are densities."""
    lines = []
    for name, paper in papers.items():
        ours = group(rows, records, name)
        label = "dense" if name == "dense" else f"{100 * float(name):g}%"
        published = f"{paper.mean:.2f} ± {paper.se:.3f}"
        if not ours:
            lines.append([label, "-", "-", published, "-", "not run yet"])
            continue
        errors = [record.results["test_error"] for record in ours]
        result = compare(errors, paper)
        interval = f"{result.low:+.2f} … {result.high:+.2f}" if result.verdict else "-"
        lines.append(
            [
                label,
                f"{ours[0].results['kept']:,}",
                mean_se(errors),
                published,
                interval,
                result.verdict or "one run",
            ]
        )
    header = [
        "weights",
        "kept",
        "test error %, mean ± SE (runs)",
        "paper",
        "95% interval of ours - paper",
        "verdict",
    ]
    return markdown(header, lines)


def mean_se(values: Sequence[float], digits: int = 2) -> str:
    """Formats a mean and its standard error, ``1.53 ± 0.020 (10)``."""
    if not values:
        return "-"
    result = compare(values)
    if result.n == 1:
        return f"{result.mean:.{digits}f} (1)"
    return f"{result.mean:.{digits}f} ± {result.se:.{digits + 1}f} ({result.n})"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join(
        "| " + " | ".join(cells) + " |" for cells in [header, rule, *lines]
    )
