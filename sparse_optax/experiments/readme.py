"""The results in Markdown files, rendered from the records."""

import functools
from collections.abc import Callable
from pathlib import Path

from sparse_optax.experiments import records
from sparse_optax.experiments.tables import (
    TABLES,
    common,
    costs,
    methods_lenet300,
    others_lenet300,
    recipes_lenet300,
)
from sparse_optax.experiments.tables.common import Table
from sparse_optax.export.file import write_atomically

BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"
# The methods of the excerpt: of each family the lowest at 5%, and what to compare with.
EXCERPT = (
    *("sparse_momentum", "rigl", "sparse_evolutionary"),
    *("static", "snip", "gradual_magnitude", "granet"),
    *("network_surgery", "gsm", "magnitude"),
)
# What each page of a method shows, by the name of its file.
PAGES = {
    "ac_dc": ("ac_dc",),
    "deep_rewiring": ("deep_rewiring",),
    "dynamic_sparse": ("dynamic_sparse",),
    "fisher_masks": ("fisher",),
    "gradual_magnitude": ("gradual_magnitude",),
    "granet": ("granet",),
    "gsm": ("gsm", "magnitude", "l2"),
    "ham": ("sparse_momentum", "ham"),
    "in_time_over_parameterization": ("in_time_over_parameterization",),
    "iterative_magnitude": ("iterative_magnitude",),
    "layerwise_obs": ("layerwise_obs",),
    "network_surgery": ("network_surgery",),
    "one_shot_magnitude": ("one_shot_magnitude",),
    "optimal_brain_damage_masks": ("optimal_brain_damage",),
    "rigl": ("rigl",),
    "snip_masks": ("snip",),
    "sparse_evolutionary": ("sparse_evolutionary",),
    "sparse_momentum_regrow": ("sparse_momentum", "ham"),
    "static_sparse": ("static", "snip", "synflow", "thin"),
    "straight_through_magnitude": ("straight_through_magnitude",),
    "synflow_masks": ("synflow",),
    "top_kast": ("top_kast",),
}
# The pages that show a whole table.
TABLE_PAGES = {
    **dict.fromkeys(
        ("long_average_regrow", "falling_budget_regrow"), recipes_lenet300.TABLE
    ),
    **dict.fromkeys(
        (
            "learning_compression",
            "soft_weight_sharing",
            "sparse_variational_dropout",
            "l0_regularization",
        ),
        others_lenet300.TABLE,
    ),
}
METHOD_PAGES = (*PAGES, *TABLE_PAGES)


def read_table(table: Table, results: str | Path) -> dict[str, records.Record]:
    """The records of a table, by row name; rows not run yet are left out.

    Raises:
      ValueError: where a record is damaged or is not that of its row.
    """
    paths = {
        row.name: Path(results) / (row.table or table.name) / f"{row.name}.json"
        for row in table.rows
    }
    return {
        row.name: common.read_row(row, paths[row.name])
        for row in table.rows
        if paths[row.name].exists()
    }


def render_table(table: Table, found: dict[str, records.Record]) -> str:
    """Markdown of one table, without the heading.

    Raises:
      ValueError: where a record lacks a number that the table shows.
    """
    try:
        return table.render(found)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"tables: a record of {table.name} lacks what the table shows "
            f"({type(error).__name__}: {error}); delete it and run it again."
        ) from error


def render(results: str | Path) -> str:
    """Markdown of every table that has a record, and what the others would cost.

    Args:
      results: folder of the records.

    Returns:
      A heading and a table each; where there is one, a list of the others at the end.

    Examples:
      >>> from sparse_optax.experiments import readme
      >>> readme.render("no such folder")
      ''
    """
    sections, others = [], []
    for table in TABLES.values():
        found, own = read_table(table, results), _own(table)
        if not any(row.name in found for row in own):
            others.append([table.title, str(len(own)), _cost(table), _command(table)])
        else:
            text = f"{render_table(table, found)}\n\n{_command(table)}"
            sections.append(f"## {table.title}\n\n{text}")
    if sections and others:
        header = ["table", "runs", "on two processor cores", "command"]
        sections.append(f"## Not run yet\n\n{common.markdown(header, others)}")
    return "\n\n".join(sections)


def _own(table: Table) -> list[common.Row]:
    """The rows that a table runs itself."""
    return [row for row in table.rows if row.table is None]


def _cost(table: Table) -> str:
    return costs.told(costs.together(row.config for row in _own(table)))


def _command(table: Table) -> str:
    return f"`sparse-optax reproduce {table.name}`"


def excerpt(results: str | Path) -> str:
    """The short table of the README, from the table of every method.

    Args:
      results: folder of the records.

    Returns:
      Markdown.

    Examples:
      >>> from sparse_optax.experiments import readme
      >>> readme.excerpt("no such folder")
      ''
    """
    return _lines(results, EXCERPT)


def method(name: str) -> Callable[[str | Path], str]:
    """What the page of a method shows.

    Args:
      name: the name of the page, one of ``METHOD_PAGES``.

    Returns:
      A function of the folder of the records to Markdown.

    Examples:
      >>> from sparse_optax.experiments import readme
      >>> readme.method("rigl")("no such folder")
      ''
    """
    if name in TABLE_PAGES:
        return functools.partial(_table, table=TABLE_PAGES[name])
    return functools.partial(_lines, methods=PAGES[name])


def _table(results: str | Path, table: Table) -> str:
    """A table of which something has been run, else what its runs cost."""
    found = read_table(table, results)
    if any(row.name in found for row in _own(table)):
        return f"{render_table(table, found)}\n\n{_command(table)}"
    if not Path(results).is_dir():
        return ""
    return f"{_cost(table).capitalize()} on two cores. {_command(table)}"


def _lines(results: str | Path, methods) -> str:
    found = read_table(methods_lenet300.TABLE, results)
    return methods_lenet300.lines_of(found, methods) if found else ""


def choices(results: str | Path) -> str:
    """The table of the page that helps choose a method.

    Args:
      results: folder of the records.

    Returns:
      Markdown.

    Examples:
      >>> from sparse_optax.experiments import readme
      >>> readme.choices("no such folder")
      ''
    """
    found = read_table(methods_lenet300.TABLE, results)
    return methods_lenet300.choices(found) if found else ""


def read_page(path: Path) -> str:
    """Text of a Markdown file with the two marker lines.

    Raises:
      ValueError: where there is no such file, or the markers are not there once each.
    """
    if not path.is_file():
        raise ValueError(
            f"tables: {path} does not exist; name it with --readme, --page or "
            "--choices, or the folder of the methods with --methods."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"tables: {path} cannot be read ({error}); name another file with "
            "--readme, --page, --choices or --methods."
        ) from error
    once = text.count(BEGIN) == text.count(END) == 1
    if not once or text.index(END) < text.index(BEGIN):
        raise ValueError(
            f"tables: {path} must hold the lines {BEGIN} and {END} once each, in this "
            "order. Put them where the tables belong."
        )
    return text


def update(
    readme: str | Path,
    results: str | Path,
    *,
    check: bool = False,
    render: Callable[[str | Path], str] = render,
) -> bool:
    """Writes the results between the two marker lines of a Markdown file.

    Args:
      readme: the file.
      results: folder of the records.
      check: change nothing, raise where the file is not up to date.
      render: what is written, from the folder.

    Returns:
      Whether the file was changed.

    Raises:
      ValueError: where the file lacks the markers, or is stale under ``check``.
    """
    readme = Path(readme)
    text = read_page(readme)
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    tables = render(results)
    middle = f"\n\n{tables}\n\n" if tables else "\n"
    new = f"{before}{BEGIN}{middle}{END}{after}"
    if new == text:
        return False
    if check:
        raise ValueError(
            f"tables: {readme} is not what the records in {results} say; run "
            "'sparse-optax tables'."
        )
    try:
        write_atomically(readme, lambda file: file.write(new.encode()))
    except OSError as error:
        raise ValueError(
            f"tables: {readme} cannot be written ({error.strerror or error}); it is "
            "unchanged. Make room, or change its permissions."
        ) from error
    return True
