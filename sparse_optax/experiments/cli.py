"""The command ``sparse-optax``: train one network, reproduce a table, render tables."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import rich.console
import rich.progress
import rich.table
import tyro

from sparse_optax.experiments import config as configs
from sparse_optax.experiments import readme, reproduce, train
from sparse_optax.experiments.tables import TABLES

if TYPE_CHECKING:
    TableName = str
else:
    TableName = Literal[tuple(TABLES)]

_DEFAULTS = configs.TrainConfig()
_console = rich.console.Console(highlight=False)


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one network and write a record of it.

    Without an argument: LeNet-300-100 on scikit-learn's digits, by sparse momentum,
    with 5% of the weights. A run that was killed goes on from its last checkpoint.

    Attributes:
      config: the run.
      results: folder of the record, a JSON file.
      runs: folder of checkpoints, final weights and the plot.
      checkpoint_every: epochs between two checkpoints.
      fresh: start again even where a checkpoint is found.
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
            )
        plot = self.runs / name / "plot.png"
        plots.save(plots.figure(trained.record), plot)
        if self.quiet:
            print(record_path)
            return
        _print_record(trained.record)
        _console.print(f"record  {record_path}", soft_wrap=True)
        _console.print(f"plot    {plot}", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Run the rows of a paper's table that are missing, and compare with the paper.

    Attributes:
      table: which table.
      rows: regular expression; only the rows whose name it matches, e.g. 'd0.05_s.'.
      jobs: runs at a time; from 2 on each is pinned to one processor core.
      results: folder of the records.
      runs: folder of checkpoints and final weights.
    """

    table: tyro.conf.Positional[TableName]
    rows: str = ""
    jobs: int = 1
    results: Path = Path("results")
    runs: Path = Path("runs")

    def run(self) -> None:
        """Runs what is missing, then prints the table."""
        table = reproduce.find(self.table)
        rows = reproduce.missing(table, self.results, self.rows)
        _console.print(f"{table.title}: {len(rows)} of {len(table.rows)} rows to run")
        with _progress(disable=not rows) as bar:
            task = bar.add_task(table.name, total=len(rows), error="")

            def on_row(row, seconds):
                record = readme.read_table(table, self.results)[row.name]
                error = f"test error {record.results['test_error']:.2f}%"
                bar.console.print(f"{row.name}: {error}, {seconds:.0f} s")
                bar.advance(task)

            reproduce.run_rows(
                table,
                rows,
                jobs=self.jobs,
                results=self.results,
                runs=self.runs,
                on_row=on_row,
            )
        print(table.render(readme.read_table(table, self.results)))


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
    _console.print(
        f"time                  {record.wall_seconds:.1f} s, "
        f"{record.seconds_per_epoch:.3f} s an epoch, "
        f"{record.compile_seconds:.1f} s to compile"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; wrong input ends in one line, not in a traceback.

    Args:
      arguments: words of the command line; those of the process by default.

    Returns:
      The exit status.
    """
    command = tyro.cli(
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
        | Annotated[Tables, tyro.conf.subcommand("tables")],
        prog="sparse-optax",
        description="Sparse training in JAX: experiments and the papers' tables.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        command.run()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"sparse-optax: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
