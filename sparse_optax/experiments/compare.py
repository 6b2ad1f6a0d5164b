"""Finished runs beside one another, and beside the dense network."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import rich.box
import rich.table

from sparse_optax.experiments import checkpoints, records
from sparse_optax.experiments import config as configs
from sparse_optax.experiments.records import Record

# What a run folder and the results folders call a record of a dense run.
_DENSE = "*dense*.json"
# Methods under which weights shrink before they are cut, and the columns of how many
# are below 1e-3, 1e-4 and 1e-6.
SHRINKING = ("gsm", "l1", "l2")
THRESHOLDS = ("below_1e-03", "below_1e-04", "below_1e-06")


def read(path: str | Path) -> Record:
    """Reads a record from its file, or from the folder of its run.

    Args:
      path: ``results/<name>.json`` or ``runs/<name>``.

    Returns:
      The record.

    Raises:
      ValueError: where there is no record, or a damaged one.
    """
    path = Path(path)
    file = path / "record.json" if path.is_dir() else path
    if not (checkpoints.is_finished(path) if path.is_dir() else path.is_file()):
        raise ValueError(
            f"record: {path} must be a record or the folder of a finished run. Give "
            "results/<name>.json or runs/<name>."
        )
    record = checkpoints.record_of(path) if path.is_dir() else records.read(path)
    lacking = _lacking(record)
    if lacking:
        raise ValueError(
            f"compare: {file} lacks {', '.join(lacking)}, which are shown; delete it "
            "and run it again."
        )
    return record


def read_all(
    paths: Sequence[str | Path], note: Callable[[str], None]
) -> list[tuple[Path, Record]]:
    """Reads records, and leaves out the folders of runs that have not finished.

    Args:
      paths: as :func:`read` takes them.
      note: gets one line for each that is left out.

    Returns:
      Paths and records.

    Raises:
      ValueError: as :func:`read`; also where every folder is left out.
    """
    found, out = [], []
    for path in map(Path, paths):
        if (
            path.is_dir()
            and (path / "lock").exists()
            and not checkpoints.is_finished(path)
        ):
            out.append(path)
        else:
            found.append((path, read(path)))
    if out and not found:
        read(out[0])
    for path in out:
        note(f"{path} has not finished and is left out.")
    return found


def _lacking(record: Record) -> list[str]:
    """What a record lacks of what the table, the plot and the page show."""
    history = ["epoch", "test_error"]
    if record.config.get("method") in SHRINKING:
        history += THRESHOLDS
    needed = {
        "config": (record.config, ("dataset", "model", "method", "density")),
        "results": (record.results, ("test_error", "weights", "kept")),
        "history": ({k: v for k, v in record.history.items() if v}, history),
    }
    if record.base is not None:
        needed["base.config"] = record.base["config"], ("epochs",)
        needed["base.results"] = record.base["results"], ("test_error",)
    return [
        f"{part}.{name}"
        for part, (there, names) in needed.items()
        for name in names
        if name not in there
    ]


def find_dense(
    wanted: configs.Resolved, runs: str | Path, results: str | Path
) -> Record | None:
    """The record of a dense run, where it has been trained before.

    Args:
      wanted: the run, see :func:`config.dense_of`.
      runs: folder of the runs.
      results: folder of the records; those beside it are searched as well, where
        ``sparse-optax reproduce`` writes.

    Returns:
      The record, or None.
    """
    name = configs.default_name(wanted)
    likely = [Path(runs) / name / "record.json", Path(results) / f"{name}.json"]
    beside = sorted(Path(results).absolute().parent.glob(f"*/{_DENSE}"))
    values = configs.as_dict(wanted)
    for path in [*likely, *beside]:
        if not path.is_file():
            continue
        try:
            record = records.read(path)
        except ValueError:
            continue  # of another kind, or damaged: it is not asked for
        # Older records lack values that do not matter to a dense run.
        config = record.config
        if "dataset" in config and all(values.get(k) == v for k, v in config.items()):
            return record
    return None


def share(kept: int, weights: int) -> str:
    """How much is kept, in words.

    Args:
      kept: kept weights.
      weights: all weights.

    Returns:
      The text.

    Examples:
      >>> from sparse_optax.experiments import compare
      >>> compare.share(2510, 50200)
      '5% of the weights (20 times fewer)'
    """
    if kept >= weights:
        return "all weights"
    fewer = f" ({weights / kept:.3g} times fewer)" if kept else ""
    return f"{100 * kept / weights:.3g}% of the weights{fewer}"


def sentence(record: Record, dense: Record) -> str:
    """What a run lost against the dense network, and what it saved.

    Args:
      record: the run.
      dense: the dense run.

    Returns:
      One line.
    """
    ours, theirs = record.results, dense.results
    return (
        f"dense {theirs['test_error']:.2f}%, yours {ours['test_error']:.2f}% with "
        f"{share(ours['kept'], theirs['weights'])}"
    )


def labels(found: Sequence[Record]) -> list[str]:
    """A short and unique name for each record.

    Args:
      found: records.

    Returns:
      Method and density; data set and network where there are several of them; and
      the seed or any other value that tells runs of the same name apart.

    Examples:
      >>> from sparse_optax.experiments import compare, records
      >>> def run(method, seed):
      ...     config = {"method": method, "density": 0.05, "seed": seed}
      ...     return records.Record(
      ...         *("run", "command", config, seed, None, None, {}, {}, 1.0, 1.0, 0.1),
      ...         *(40, {"test_error": 2.5}, [], None, {}),
      ...     )
      >>> compare.labels([run("rigl", 0), run("snip", 0)])
      ['rigl 5%', 'snip 5%']
      >>> compare.labels([run("rigl", 0), run("rigl", 1)])
      ['rigl 5%, seed 0', 'rigl 5%, seed 1']
    """
    names = [_label(record) for record in found]
    for key in ("dataset", "model"):  # errors on different ones do not compare
        values = [str(record.config.get(key)) for record in found]
        if len(set(values)) > 1:
            names = [f"{a}, {value}" for a, value in zip(names, values, strict=True)]
    # What tells runs apart is named, what people change most often first.
    often = ("budget", "seed", "epochs", "shares", "grow", "split", "learning_rate")
    every = sorted({key for record in found for key in record.config} - {*often})
    for key in (*often, *every):
        if len(set(names)) == len(names):
            return names
        # Only those that are called the same, and where it tells them apart.
        told: dict[str, set[str]] = {}
        for name, record in zip(names, found, strict=True):
            told.setdefault(name, set()).add(str(record.config.get(key)))
        names = [
            f"{name}, {key} {record.config.get(key)}" if len(told[name]) > 1 else name
            for name, record in zip(names, found, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [f"{name} (#{i})" for i, name in enumerate(names, 1)]
    return names


def _label(record: Record) -> str:
    method = str(record.config.get("method", record.name)).replace("_", " ")
    density = record.config.get("density", 1.0)
    return method if density == 1 else f"{method} {100 * density:.3g}%"


def table(found: Sequence[Record]) -> rich.table.Table:
    """Records as a table, in the order that they are given in.

    Args:
      found: records.

    Returns:
      A table of rich: test error, weights, bytes of the file, epochs (of the base and
      of the method) and seconds of training of each.
    """
    made = rich.table.Table(box=rich.box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("run", overflow="fold")
    columns = ("error", "kept", "share", "fewer", "file bytes", "epochs", "time")
    for column in columns:
        made.add_column(column, justify="right")
    for label, record in zip(labels(found), found, strict=True):
        made.add_row(label, *_cells(record))
    return made


def _cells(record: Record) -> Iterable[str]:
    results = record.results
    kept, weights = results["kept"], results["weights"]
    size = results.get("file_bytes")
    base = 0 if record.base is None else record.base["config"]["epochs"]
    epochs = len(record.history["epoch"])
    return (
        f"{results['test_error']:.2f}%",
        f"{kept:,}",
        f"{100 * kept / weights:.3g}%",
        f"{weights / kept:.3g} x" if kept else "-",
        "-" if size is None else f"{size:,}",
        f"{base} + {epochs}" if base else str(epochs),
        f"{record.wall_seconds:.1f} s",
    )
