"""The results in Markdown files, rendered from the records."""

from collections.abc import Callable
from pathlib import Path

from sparse_optax.experiments import records
from sparse_optax.experiments.tables import TABLES, methods_lenet300
from sparse_optax.experiments.tables.common import Table
from sparse_optax.export.file import write_atomically

BEGIN = "<!-- results:begin -->"
END = "<!-- results:end -->"


def read_table(table: Table, results: str | Path) -> dict[str, records.Record]:
    """The records of a table, by row name; rows not run yet are left out."""
    folders = {row.table or table.name for row in table.rows}
    found = {name: records.read_folder(Path(results) / name) for name in folders}
    return {
        row.name: found[row.table or table.name][row.name]
        for row in table.rows
        if row.name in found[row.table or table.name]
    }


def render(results: str | Path) -> str:
    """Markdown of every table that has a record.

    Args:
      results: folder of the records.

    Returns:
      A heading and a table each.

    Examples:
      >>> from sparse_optax.experiments import readme
      >>> readme.render("no such folder")
      ''
    """
    sections = []
    for table in TABLES.values():
        found = read_table(table, results)
        if any(row.name in found for row in table.rows if row.table is None):
            sections.append(
                f"### {table.title}\n\n{table.render(found)}\n\n"
                f"`sparse-optax reproduce {table.name}`"
            )
    return "\n\n".join(sections)


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
            f"tables: {path} does not exist; name it with --readme or --choices."
        )
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(
            f"tables: {path} must hold the lines {BEGIN} and {END} once each."
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
    write_atomically(readme, lambda file: file.write(new.encode()))
    return True
