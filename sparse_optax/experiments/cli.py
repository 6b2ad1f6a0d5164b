"""The command ``sparse-optax``: train, compare, report; reproduce and render tables."""

import contextlib
import dataclasses
import os
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, cast

import rich.console
import rich.progress
import rich.table
import tyro

from sparse_optax.experiments import (
    compare,
    data,
    readme,
    recipes,
    records,
    reproduce,
    sizes,
    train,
)
from sparse_optax.experiments import config as configs
from sparse_optax.experiments.progress import Display
from sparse_optax.experiments.tables import TABLES
from sparse_optax.export.file import write_atomically

if TYPE_CHECKING:
    TableName = str
else:
    TableName = Literal[(*TABLES, "all")]

_DEFAULTS = configs.TrainConfig()
# Data sets whose dense network takes seconds.
_CHEAP = ("digits",)
# What the builder of another method does.
_PURPOSE = {"thin": "No pruning of a smaller network, of as many weights as are kept."}


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
    in, a second Ctrl-C at once. In the end the dense network is named beside it, where
    it was trained before; on the digits, where it takes seconds, it is trained.

    Attributes:
      config: the run.
      results: folder of the record, a JSON file.
      runs: folder of checkpoints, final weights and the plot.
      checkpoint_every: epochs between two checkpoints.
      fresh: start again even where a checkpoint or a finished run is found.
      no_dense: train no dense network for comparison.
      quiet: print nothing but the path of the record.
    """

    config: Annotated[configs.TrainConfig, tyro.conf.arg(name="")] = _DEFAULTS
    results: Path = Path("results/train")
    runs: Path = Path("runs")
    checkpoint_every: int = 10
    fresh: bool = False
    no_dense: bool = False
    quiet: bool = False

    def run(self, started: float) -> None:
        """Trains and shows how far it is, then prints the layers and the paths."""
        from sparse_optax.experiments import plots

        config = configs.resolve(self.config)
        name = configs.default_name(config)
        record_path = self.results / f"{name}.json"
        plot = self.runs / name / "plot.png"
        records.check_file(plot)
        with Display(_console, started, quiet=self.quiet) as display:
            display.line(_plan(train.stages(config, self.runs, fresh=self.fresh)))
            trained = train.train(
                config,
                runs=self.runs,
                record_path=record_path,
                checkpoint_every=self.checkpoint_every,
                fresh=self.fresh,
                on_epoch=display.on_epoch,
                on_activity=display.on_activity,
                on_note=_note,
            )
            again = not display.trained
            dense = self._dense(config, display)
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
        _print_record(trained.record, dense, _flags_of_dense(configs.dense_of(config)))
        if again:
            _console.print("This run had finished before; --fresh trains it again.")
        weights = self.runs / name / "weights.sparse"
        _console.print(f"weights {weights}", soft_wrap=True)
        _console.print(f"record  {record_path}", soft_wrap=True)
        _console.print(f"plot    {plot}", soft_wrap=True)

    def _dense(
        self, config: configs.Resolved, display: Display
    ) -> records.Record | None:
        """The dense run beside it, from before or, where that takes seconds, trained.

        None for a dense run, and where there is none.
        """
        if config.method == "dense" or self.quiet:
            return None
        wanted = configs.dense_of(config)
        found = compare.find_dense(wanted, self.runs, self.results)
        if found is not None or self.no_dense or wanted.dataset not in _CHEAP:
            return found
        display.line("the dense network, for comparison")
        return train.train(
            wanted,
            runs=self.runs,
            command="sparse-optax train " + _flags_of_dense(wanted),
            on_epoch=display.on_epoch,
            on_activity=display.on_activity,
            on_note=_note,
        ).record


@dataclasses.dataclass(frozen=True)
class Compare:
    """Put finished runs side by side: a table, and one plot of all of them.

    Attributes:
      records: records (results/<name>.json) or folders of finished runs (runs/<name>).
      plot: the picture, a PNG file: errors by epoch and, of one network, the share of
        the weights that each layer keeps.
    """

    records: tyro.conf.Positional[tuple[Path, ...]]
    plot: Path = Path("compare.png")

    def run(self, started: float) -> None:
        """Prints the table and draws the plot."""
        from sparse_optax.experiments import plots

        del started
        _need_some("compare", "RECORD", self.records)
        found = [record for _, record in compare.read_all(self.records, _note)]
        canvas = plots.comparison(dict(zip(compare.labels(found), found, strict=True)))
        plots.save(canvas, self.plot)
        _console.print(compare.table(found))
        _console.print(f"plot    {self.plot}", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page about runs, which opens without a network.

    It shows the error by epoch beside the dense network's, what each layer keeps and
    what it moves in each epoch, the masks of the first layer, and a table of layers.

    Attributes:
      runs: folders of finished runs (runs/<name>), or records, which have no masks.
      page: the page.
      results: folder of the records, where that of a dense run is looked for.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    page: Path = Path("report.html")
    results: Path = Path("results/train")

    def run(self, started: float) -> None:
        """Writes the page."""
        from sparse_optax.experiments import page

        del started
        _need_some("report", "RUN", self.runs)
        records.check_file(self.page)
        found = []
        for path, record in compare.read_all(self.runs, _note):
            folder = path if path.is_dir() else Path("runs") / path.stem
            first = page.first_mask(folder, record)
            found.append(page.Run(record, self._dense(record, folder.parent), first))
        content = page.render(found).encode()
        try:
            write_atomically(self.page, lambda file: file.write(content))
        except OSError as error:
            raise ValueError(
                f"report: the page {self.page} cannot be written "
                f"({error.strerror or error}). Make room, or choose another file with "
                "--page."
            ) from error
        _console.print(f"page    {self.page}", soft_wrap=True)

    def _dense(self, record: records.Record, runs: Path) -> records.Record | None:
        """The record of the dense run beside a run, where there is one."""
        known = {field.name for field in dataclasses.fields(configs.Resolved)}
        values = {k: _tuples(v) for k, v in record.config.items() if k in known}
        try:
            values["base"] = configs.ResolvedBase(**values.get("base", {}))
            wanted = configs.dense_of(configs.Resolved(**values))
            return compare.find_dense(wanted, runs, self.results)
        except (ValueError, TypeError, KeyError):  # of what is not known here
            return None


@dataclasses.dataclass(frozen=True)
class Methods:
    """List the methods of `sparse-optax train`, their names and their defaults.

    Attributes:
      dataset: whose recipe the defaults are of.
    """

    dataset: configs.DatasetName = "digits"

    def run(self, started: float) -> None:
        """Prints the table."""
        del started
        model = _model_of("sparse_momentum", self.dataset)
        plain = configs.resolve(configs.TrainConfig(dataset=self.dataset, model=model))
        _console.print(
            f"Recipe of {self.dataset}: density {plain.density:g}, batches of "
            f"{plain.batch_size}, momentum {plain.momentum:g}, weight decay "
            f"{plain.weight_decay:g}; gsm and the methods after a base have their own. "
            "shares: how the density is shared among the layers; epochs: of the base, "
            "then of the method; rate: the learning rate at the start.\n"
        )
        form = "{:31} {:18} {:>9}  {:>5}"
        _console.print(form.format("method", "shares", "epochs", "rate"))
        for name in recipes.METHODS:
            if name == "thin" and self.dataset == "topics":
                continue  # a thin LeNet-300-100 reads no text
            *row, text = _method_row(name, self.dataset)
            _console.print(form.format(name, *row))
            indent = " " * 4
            _console.print(
                textwrap.fill(
                    text,
                    _console.width,
                    initial_indent=indent,
                    subsequent_indent=indent,
                )
            )


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Run the rows of a paper's table that are missing, and compare with the paper.

    Rows of ImageNet are run where their table is named and its folder is there. With
    --hours it stops when they are over, each run after the epoch that it is in,
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

    def run(self, started: float) -> None:
        """Runs what is missing, then prints the table."""
        del started
        reproduce.check_workers(self.jobs, self.hours)
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
        todo = _with_data(todo)
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
    """Write the tables into the README and the pages of the documentation.

    Attributes:
      readme: the README; like the pages, it holds two marker lines.
      page: the page of all results.
      choices: the page that helps choose a method.
      methods: the folder with one page a method.
      results: folder of the records.
      check: change nothing; fail where a file is not up to date.
    """

    readme: Path = Path("README.md")
    page: Path = Path("docs/results.md")
    choices: Path = Path("docs/choosing-a-method.md")
    methods: Path = Path("docs/methods")
    results: Path = Path("results")
    check: bool = False

    def run(self, started: float) -> None:
        """Renders every table that has a record."""
        del started
        files = {
            self.readme: readme.excerpt,
            self.page: readme.render,
            self.choices: readme.choices,
        }
        pages = readme.METHOD_PAGES
        files |= {self.methods / f"{n}.md": readme.method(n) for n in pages}
        for path in files:  # all, before one is changed
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


def _plan(stages: list[train.Stage]) -> str:
    """What is trained, and for how long, before it begins."""
    texts = [
        f"{stage.config.epochs} epochs of {stage.config.method}"
        + (" (there already)" if stage.done else "")
        for stage in stages
    ]
    left = sum(stage.config.epochs for stage in stages if not stage.done)
    if not left:
        return f"{texts[-1]}: nothing to train"
    if len(stages) == 1:
        return f"{left} epochs to train: {stages[0].config.method}"
    return f"{', then '.join(texts)}: {left} epochs to train"


def _flags_of_dense(wanted: configs.Resolved) -> str:
    """The flags that make a dense run."""
    plain = configs.resolve(
        configs.TrainConfig(
            dataset=wanted.dataset, model=wanted.model, method="dense", seed=wanted.seed
        )
    )
    flags = [f"--dataset {wanted.dataset}", f"--model {wanted.model}"]
    flags += ["--method dense", f"--seed {wanted.seed}"]
    for field in dataclasses.fields(configs.Resolved):
        value = getattr(wanted, field.name)
        if field.name in ("base", "budget") or value == getattr(plain, field.name):
            continue
        name = field.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
            continue
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        flags.append(f"--{name} {text}")
    return " ".join(flags)


def _with_data(todo: list[reproduce.Job]) -> list[reproduce.Job]:
    """The jobs whose data set can be had; says what is left out, and raises where
    that is all of them.
    """
    able = [job for job in todo if data.can_be_had(job.row.config.dataset)]
    if len(able) == len(todo):
        return todo
    told = (
        f"{len(todo) - len(able)} of {len(todo)} rows need imagenet in "
        f"${data.VARIABLE}, and the packages grain and Pillow"
    )
    if not able:
        raise ValueError(
            f"reproduce: {told}. See the page on ImageNet of the documentation."
        )
    _note(f"{told}; they are left out.")
    return able


def _need_some(command: str, name: str, given: Sequence[Path]) -> None:
    if not given:
        raise ValueError(
            f"{command}: no {name} is given; give one or more, such as runs/<name> or "
            "results/train/<name>.json."
        )


def _tuples(value: Any) -> Any:
    """A value of JSON as a run has it."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _model_of(method: str, dataset: str) -> str:
    """A network that a method can train on a data set; defaults depend on neither."""
    if dataset == "topics":
        return "transformer"
    return "thin-lenet-0.05" if method == "thin" else "lenet-300-100"


def _method_row(name: str, dataset: str) -> tuple[str, ...]:
    """Defaults, purpose and names of a method."""
    from sparse_optax.experiments import methods

    function = recipes.FUNCTIONS.get(name)
    others = [*recipes.COMMON_NAMES.get(name, ()), *([function] if function else [])]
    purpose = _PURPOSE.get(name) or (methods.BUILDERS[name].__doc__ or "")
    method = recipes.METHODS[name]
    model = _model_of(name, dataset)
    run = configs.resolve(
        configs.TrainConfig(dataset=dataset, model=model, method=name)
    )
    earlier = configs.base_of(run)
    base = f"{earlier.epochs} + " if earlier is not None else ""
    shares = "one pool" if method.pooled else run.shares
    if name in ("dense", "thin"):
        shares = "-"
    text = purpose.partition("\n")[0].replace("``", "")
    if others:
        text += f" Also called {', '.join(others)}."
    return shares, f"{base}{run.epochs}", f"{run.learning_rate:g}", text


def _print_record(record, dense: records.Record | None, flags_of_dense: str) -> None:
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
    if dense is not None:
        beside = compare.sentence(record, dense)
        _console.print(f"beside all weights    {beside}", soft_wrap=True)
    elif record.config["method"] != "dense":
        _console.print(
            f"beside all weights    not known: train {flags_of_dense}", soft_wrap=True
        )
    if results.get("skipped_cycles"):
        _console.print(
            f"cycles left out       {results['skipped_cycles']:,}: weights or momentum "
            "were not finite",
            soft_wrap=True,
        )
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


def main(
    arguments: Sequence[str] | None = None, *, started: float | None = None
) -> int:
    """Runs the command; wrong input ends in one line, not in a traceback.

    Args:
      arguments: words of the command line; those of the process by default.
      started: when the command was given, by ``time.monotonic``; now by default.

    Returns:
      The exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    _output.error = None
    try:
        status = _run(arguments, time.monotonic() if started is None else started)
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


def _run(arguments: Sequence[str] | None, started: float) -> int:
    try:
        command = tyro.cli(
            Annotated[Train, tyro.conf.subcommand("train")]
            | Annotated[Compare, tyro.conf.subcommand("compare")]
            | Annotated[Report, tyro.conf.subcommand("report")]
            | Annotated[Methods, tyro.conf.subcommand("methods")]
            | Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
            | Annotated[Tables, tyro.conf.subcommand("tables")],
            prog="sparse-optax",
            description="Sparse training in JAX: experiments and the papers' tables. "
            "sparse-optax --version says which version this is.",
            args=arguments,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        command.run(started)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        _note(str(error))
        return 1
    except KeyboardInterrupt as stopped:
        where = "from its last checkpoint, or starts again where there is none"
        _note(str(stopped) or f"stopped; the same command goes on {where}.")
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
