"""The command ``sparse-optax``: train one network, reproduce a table, render tables."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Literal, cast

import rich.console
import rich.progress
import rich.table
import tyro

from sparse_optax.experiments import config as configs
from sparse_optax.experiments import readme, records, reproduce, sizes, train
from sparse_optax.experiments.tables import TABLES

if TYPE_CHECKING:
    TableName = str
else:
    TableName = Literal[(*TABLES, "all")]

_DEFAULTS = configs.TrainConfig()


class _Output:
    """Standard output that never ends a run: the first error is kept for the end.

    Attributes:
      error: what went wrong, after which nothing more is written; or None.
    """

    error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes, with escapes where the encoding lacks a character."""
        out = sys.stdout
        try:
            out.write(text)
        except UnicodeEncodeError:
            code = out.encoding
            self.write(text.encode(code, "backslashreplace").decode(code))
        except OSError as error:
            self.fail(error)
        return len(text)

    def flush(self) -> None:
        """Flushes."""
        try:
            sys.stdout.flush()
        except OSError as error:
            self.fail(error)

    def fail(self, error: OSError) -> None:
        """Keeps the error and leads what follows to nowhere, also at the exit."""
        self.error = self.error or error
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())

    def __getattr__(self, name):
        return getattr(sys.stdout, name)


_output = _Output()
_console = rich.console.Console(highlight=False, file=cast(IO[str], _output))


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one network and write a record of it.

    Without an argument: LeNet-300-100 on scikit-learn's digits, by sparse momentum,
    with 5% of the weights. A run that was killed goes on from its last checkpoint; one
    that has finished is not trained again. Ctrl-C stops it after the epoch that it is
    in, a second Ctrl-C at once.

    Attributes:
      config: the run.
      results: folder of the record, a JSON file.
      runs: folder of checkpoints, final weights and the plot.
      checkpoint_every: epochs between two checkpoints.
      fresh: start again even where a checkpoint or a finished run is found.
      quiet: print nothing but the path of the record.
    """

    config: Annotated[configs.TrainConfig, tyro.conf.arg(name="")] = _DEFAULTS
    results: Path = Path("results/train")
    runs: Path = Path("runs")
    checkpoint_every: int = 10
    fresh: bool = False
    quiet: bool = False

    def run(self) -> None:
        """Trains with a progress bar, then prints the layers and the paths."""
        from sparse_optax.experiments import plots

        config = configs.resolve(self.config)
        name = configs.default_name(config)
        record_path = self.results / f"{name}.json"
        plot = self.runs / name / "plot.png"
        records.check_file(plot)
        with _progress(disable=self.quiet) as bar:
            tasks = {}

            def on_epoch(progress: train.Progress) -> None:
                if progress.stage not in tasks:
                    tasks[progress.stage] = bar.add_task(
                        progress.stage, total=progress.epochs, error=""
                    )
                error = progress.metrics["test_error"]
                bar.update(
                    tasks[progress.stage],
                    completed=progress.epoch,
                    error=f"test error {error:.2f}%",
                )

            trained = train.train(
                config,
                runs=self.runs,
                record_path=record_path,
                checkpoint_every=self.checkpoint_every,
                fresh=self.fresh,
                on_epoch=on_epoch,
                on_note=_note,
            )
        try:
            plots.save(plots.figure(trained.record), plot)
        except OSError as error:
            raise ValueError(
                f"train: the record {record_path} is written, but the plot {plot} "
                f"cannot be ({error.strerror or error}). Make room and give the same "
                "command again; nothing is trained again."
            ) from error
        if self.quiet:
            print(record_path, file=_output)
            return
        _print_record(trained.record)
        if not tasks:
            _console.print("This run had finished before; --fresh trains it again.")
        weights = self.runs / name / "weights.sparse"
        _console.print(f"weights {weights}", soft_wrap=True)
        _console.print(f"record  {record_path}", soft_wrap=True)
        _console.print(f"plot    {plot}", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Run the rows of a paper's table that are missing, and compare with the paper.

    With --hours it stops when they are over, each run after the epoch that it is in,
    and the same command goes on. A run that another process trains is passed over.

    Attributes:
      table: which table; all runs every table in turn, and needs --hours.
      rows: regular expression (no glob); only the rows whose whole name it matches,
        e.g. 'd0.05_s.' or '.*_s0'.
      seeds: only so many seeds of each row, from seed 0.
      hours: how long to run, e.g. 7.5; without it until all rows are done.
      jobs: runs at a time; from 2 on each is pinned to one processor core.
      results: folder of the records.
      runs: folder of checkpoints and final weights.
    """

    table: tyro.conf.Positional[TableName] = "all"
    rows: str = ""
    seeds: Annotated[int | None, configs.flag("INT", "all")] = None
    hours: Annotated[float | None, configs.flag("FLOAT", "no limit")] = None
    jobs: int = 1
    results: Path = Path("results")
    runs: Path = Path("runs")

    def run(self) -> None:
        """Runs what is missing, then prints the table."""
        if self.table == "all":
            if self.hours is None:
                raise ValueError(
                    "reproduce: hours=None must be given where all tables are run; "
                    "give --hours, or one table of " + ", ".join(TABLES) + "."
                )
            todo = reproduce.queue(self.results, self.rows, self.seeds)
            _console.print(f"All tables: {len(todo)} rows to run")
        else:
            table = reproduce.find(self.table)
            rows = reproduce.missing(table, self.results, self.rows, self.seeds)
            todo = [reproduce.Job(table, row) for row in rows]
            _console.print(
                f"{table.title}: {len(rows)} of {len(table.rows)} rows to run"
            )
        outcome = self._run_jobs(todo)
        tables = TABLES.values() if self.table == "all" else [TABLES[self.table]]
        for table in tables:
            found = readme.read_table(table, self.results)
            if self.table == "all":
                _console.print(f"{table.name}: {len(found)} of {len(table.rows)} rows")
            else:
                print(readme.render_table(table, found), file=_output)
        self._tell(outcome)

    def _run_jobs(self, todo: list[reproduce.Job]) -> reproduce.Outcome:
        """Runs with a progress bar."""
        done = []
        with _progress(disable=not todo) as bar:
            task = bar.add_task(self.table, total=len(todo), error="")

            def on_job(job, seconds):
                done.append(job)
                record = records.read(job.path(self.results))
                error = f"test error {record.results['test_error']:.2f}%"
                name = job.name if self.table == "all" else job.row.name
                bar.console.print(f"{name}: {error}, {seconds:.0f} s")
                bar.advance(task)

            try:
                return reproduce.run_jobs(
                    todo,
                    jobs=self.jobs,
                    results=self.results,
                    runs=self.runs,
                    on_job=on_job,
                    hours=self.hours,
                )
            except KeyboardInterrupt:
                raise train.Stopped(
                    f"stopped after {len(done)} of {len(todo)} rows; the same command "
                    "goes on with the others."
                ) from None

    def _tell(self, outcome: reproduce.Outcome) -> None:
        """Says what has not finished; rows that failed are an error."""
        if outcome.busy:
            _note(f"passed over, another process trains them: {_listed(outcome.busy)}.")
        if outcome.left:
            _note(
                f"the hours are over with {len(outcome.left)} rows left; the same "
                "command goes on."
            )
        if outcome.failed:
            raise RuntimeError("\n".join(outcome.failed.values()))


@dataclasses.dataclass(frozen=True)
class Tables:
    """Write the tables into the README and the page that helps choose a method, both.

    Attributes:
      readme: the README; like the page, it holds two marker lines.
      choices: the page.
      results: folder of the records.
      check: change nothing; fail where a file is not up to date.
    """

    readme: Path = Path("README.md")
    choices: Path = Path("docs/choosing-a-method.md")
    results: Path = Path("results")
    check: bool = False

    def run(self) -> None:
        """Renders every table that has a record."""
        files = {self.readme: readme.render, self.choices: readme.choices}
        for path in files:  # both, before one is changed
            readme.read_page(path)
        for path, render in files.items():
            new = readme.update(path, self.results, check=self.check, render=render)
            outcome = "updated" if new else "is up to date"
            _console.print(f"{path} {outcome}", soft_wrap=True)


def _listed(names: Sequence[str], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _note(line: str) -> None:
    """Tells of something on standard error."""
    print(f"sparse-optax: {line}", file=sys.stderr)


def _progress(*, disable: bool) -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[error]}"),
        console=_console,
        disable=disable,
    )


def _print_record(record) -> None:
    table = rich.table.Table(title=record.name)
    for column in ("layer", "shape", "weights", "kept", "non-zero", "density"):
        table.add_column(column, justify="left" if column == "layer" else "right")

    def add(name, shape, *counts):
        weights, kept, _ = counts
        numbers = (f"{count:,}" for count in counts)
        table.add_row(name, shape, *numbers, f"{100 * kept / weights:.2f}%")

    for layer in record.layers:
        shape = " x ".join(map(str, layer["shape"]))
        add(layer["name"], shape, layer["weights"], layer["kept"], layer["nonzero"])
    table.add_section()
    results = record.results
    add("all", "", results["weights"], results["kept"], results["nonzeros"])
    _console.print(table)
    if record.base is not None:
        _console.print(
            f"base test error       {record.base['results']['test_error']:.2f}%"
        )
    if "test_error_before_cut" in results:
        gap = results["gap"]
        _console.print(
            f"before the cut        {results['test_error_before_cut']:.2f}%, "
            f"{gap['alive']:,} weights alive of {gap['kept']:,} to keep"
        )
    _console.print(f"test error            {results['test_error']:.2f}%")
    _print_sizes(record)
    _console.print(
        f"time                  {record.wall_seconds:.1f} s, "
        f"{record.seconds_per_epoch:.3f} s an epoch, "
        f"{record.compile_seconds:.1f} s to compile"
    )


def _print_sizes(record) -> None:
    """What the run was given as its size, and what its file and its weights take."""
    asked = record.config.get("budget")
    size = sizes.parse(asked) if asked else None
    for unit, column in (("bytes", "file_bytes"), ("FLOPs", "flops")):
        if column in record.results:
            most = f" of at most {size.amount:,}" if size and size.unit == unit else ""
            title = "file" if unit == "bytes" else "an image"
            _console.print(f"{title:21s} {record.results[column]:,} {unit}{most}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; wrong input ends in one line, not in a traceback.

    Args:
      arguments: words of the command line; those of the process by default.

    Returns:
      The exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    _output.error = None
    try:
        status = _run(arguments)
    except SystemExit:  # of --help and of words that are no flags
        _output.flush()
        if _output.error is None:
            raise
        status = 1
    _output.flush()
    if status or _output.error is None:
        return status
    # Whoever closed a pipe has read what it wants.
    if not isinstance(_output.error, BrokenPipeError):
        _note(
            f"standard output cannot be written ({_output.error.strerror}); all files "
            "are written. Give the same command again to see it; nothing is trained "
            "again."
        )
    return 1


def _run(arguments: Sequence[str] | None) -> int:
    try:
        command = tyro.cli(
            Annotated[Train, tyro.conf.subcommand("train")]
            | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
            | Annotated[Tables, tyro.conf.subcommand("tables")],
            prog="sparse-optax",
            description="Sparse training in JAX: experiments and the papers' tables.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run()
    except (ValueError, OSError, RuntimeError) as error:
        _note(str(error))
        return 1
    except KeyboardInterrupt as stopped:
        _note(str(stopped) or "stopped; the same command goes on.")
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
