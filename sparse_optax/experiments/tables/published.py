"""Tables whose lines are published numbers: each knows its runs, error and cost."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sparse_optax.experiments.config import TrainConfig
from sparse_optax.experiments.records import Record
from sparse_optax.experiments.tables import common, costs


class Line(NamedTuple):
    """One line of a table.

    Attributes:
      label: what it is called.
      options: the run, as keyword arguments of ``TrainConfig`` without the seed.
      paper: the published error in percent, or None.
      table: another table that runs it and holds its records; its group is ``group``.
      group: the group there.
    """

    label: str
    options: Mapping[str, Any]
    paper: common.Paper | None = None
    table: str | None = None
    group: str = ""


def rows(
    lines: Mapping[str, Line], seeds: Iterable[int], others: Sequence[common.Row] = ()
) -> tuple[common.Row, ...]:
    """The runs of lines, seed by seed, so that a table half done has every line.

    Args:
      lines: the lines by group, which begins the names of their rows.
      seeds: the seeds.
      others: rows of the tables that hold records of some lines.

    Returns:
      The rows.
    """
    found = []
    for seed in seeds:
        for group, line in lines.items():
            if line.table is not None:
                found += [
                    row._replace(group=group, table=line.table)
                    for row in others
                    if row.group == line.group and row.config.seed == seed
                ]
                continue
            config = TrainConfig(seed=seed, **line.options)
            found.append(common.Row(f"{group}_s{seed}", config, group))
    return tuple(found)


def render(
    lines: Mapping[str, Line],
    table_rows: Sequence[common.Row],
    records: dict[str, Record],
    *,
    first: str,
    metric: str = "test_error",
    unit: str = "test error %",
) -> str:
    """Paper against ours, one line a published number.

    Args:
      lines: the lines by group.
      table_rows: the rows of the table.
      records: the records by row name.
      first: heading of the first column.
      metric: the number of a record that is shown.
      unit: what it is.

    Returns:
      Markdown. A line without a record says what its runs cost on two cores.
    """
    cells = []
    for group, line in lines.items():
        ours = common.group(table_rows, records, group)
        paper = line.paper
        published = "-"
        if paper is not None:
            published = f"{paper.mean:.2f}"
            published += "" if paper.se is None else f" ± {paper.se:.3f}"
        if not ours:
            runs = [row.config for row in table_rows if row.group == group]
            cost = costs.told(costs.together(runs))
            cells.append([line.label, "-", cost, published, "-"])
            continue
        values = [record.results[metric] for record in ours]
        verdict = "-"
        if paper is not None:
            result = common.compare(values, paper)
            verdict = f"{result.mean - paper.mean:+.2f}"
            if result.verdict:
                interval = f"{result.low:+.2f} … {result.high:+.2f}"
                verdict = f"{interval}, {result.verdict}"
        kept = f"{ours[0].results['kept']:,}"
        cells.append([line.label, kept, common.mean_se(values), published, verdict])
    header = [first, "kept", f"{unit}, mean ± SE (runs)", "paper", "ours - paper"]
    return common.markdown(header, cells)


NOTE = (
    "\n\nDifferences with an interval are Welch's at 95%. Hours are those of all runs "
    "of a line on two processor cores, training steps only."
)


def table(
    name: str,
    title: str,
    lines: Mapping[str, Line],
    table_rows: Sequence[common.Row],
    *,
    first: str,
) -> common.Table:
    """A table that is its lines and the note on them.

    Args:
      name: its name.
      title: its title.
      lines: the lines by group.
      table_rows: its rows.
      first: heading of the first column.

    Returns:
      The table.
    """

    def rendered(records: dict[str, Record]) -> str:
        return render(lines, table_rows, records, first=first) + NOTE

    return common.Table(name, title, tuple(table_rows), rendered)
