"""Runs the rows of tables that have no record yet, several at a time if asked."""

import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparse_optax.experiments import checkpoints, records, train
from sparse_optax.experiments import config as configs
from sparse_optax.experiments.tables import QUEUE, TABLES, common
from sparse_optax.experiments.tables.common import Row, Table

# Exit status of a worker whose hours are over, and of one that another keeps out.
_TIME_OVER, _BUSY = 75, 76
# What starts the lines that a worker wants to be read.
_NOTE = "sparse-optax: "
# One core a worker: two that share cores slow each other down more than that.
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Job(NamedTuple):
    """A row to run and the table that it is of."""

    table: Table
    row: Row

    @property
    def name(self) -> str:
        """``table/row``, unique among all."""
        return f"{self.table.name}/{self.row.name}"

    def path(self, results: str | Path) -> Path:
        """File of its record."""
        return Path(results) / self.table.name / f"{self.row.name}.json"


class Outcome(NamedTuple):
    """What became of the jobs that have no record at the end of :func:`run_jobs`.

    Attributes:
      left: jobs for which the hours did not suffice, begun or not.
      busy: jobs that another process trains, and those that need one of them.
      failed: what was printed by the jobs that failed, by name.
    """

    left: list[str]
    busy: list[str]
    failed: dict[str, str]


def find(name: str) -> Table:
    """A table by name.

    Raises:
      ValueError: for an unknown one, listing all.
    """
    if name not in TABLES:
        raise ValueError(f"reproduce: table={name!r}; choose one of {[*TABLES]}.")
    return TABLES[name]


def missing(
    table: Table, results: str | Path, pattern: str = "", seeds: int | None = None
) -> list[Row]:
    """The rows without a record.

    Args:
      table: the table.
      results: the results folder.
      pattern: regular expression; only rows whose name it matches whole.
      seeds: only rows of so many seeds, from seed 0; None for all of them.

    Returns:
      Rows in the order of the table; those that another table runs are not among
      them.

    Raises:
      ValueError: where ``pattern`` is no regular expression or matches no row, where
        ``seeds`` is below 1, and where a record is damaged or was made with other
        values than its row asks for.
    """
    rows = _chosen(table, pattern, seeds)
    if not rows:
        own = ", ".join(row.name for row in table.rows if row.table is None)
        raise ValueError(
            f"reproduce: rows={pattern!r} matches no row of {table.name}; its rows are "
            f"{own}."
        )
    return [row for row in rows if not _finished(Job(table, row), results)]


def queue(
    results: str | Path, pattern: str = "", seeds: int | None = None
) -> list[Job]:
    """The rows of all tables without a record, in the order of ``tables.QUEUE``.

    Args:
      results: the results folder.
      pattern: as in :func:`missing`; here it must match a row of any table.
      seeds: as in :func:`missing`.

    Returns:
      The jobs, each once.

    Raises:
      ValueError: as in :func:`missing`.
    """
    jobs: dict[str, Job] = {}
    for turn in QUEUE:
        table = find(turn.table)
        first = {row.name for row in _chosen(table, turn.rows, turn.seeds)}
        for row in _chosen(table, pattern, seeds):
            if row.name in first:
                job = Job(table, row)
                jobs.setdefault(job.name, job)
    if not jobs:
        raise ValueError(f"reproduce: rows={pattern!r} matches no row of any table.")
    return [job for job in jobs.values() if not _finished(job, results)]


def _chosen(table: Table, pattern: str, seeds: int | None) -> list[Row]:
    """The rows that the table runs itself, of some names and seeds."""
    if seeds is not None and seeds < 1:
        raise ValueError(
            f"reproduce: seeds={seeds} must be 1 or more, or left out for all seeds."
        )
    try:
        expression = re.compile(pattern or ".*")
    except re.error as error:
        raise ValueError(
            f"reproduce: rows={pattern!r} must be a regular expression ({error}). Give "
            "one that matches the names of the rows, such as 'd0.05_s.' or '.*_s0'."
        ) from error
    return [
        row
        for row in table.rows
        if row.table is None
        and expression.fullmatch(row.name)
        and (seeds is None or row.config.seed < seeds)
    ]


def _finished(job: Job, results: str | Path) -> bool:
    """Whether a job has its record."""
    path = job.path(results)
    if not path.exists():
        return False
    common.read_row(job.row, path)
    return True


def run_row(
    table: Table,
    row: Row,
    results: str | Path,
    runs: str | Path,
    hours: float | None = None,
) -> None:
    """Runs one row in this process and writes its record."""
    train.train(
        row.config,
        runs=runs,
        record_path=Job(table, row).path(results),
        hours=hours,
        command=f"sparse-optax reproduce {table.name} --rows {row.name}",
        on_note=lambda line: print(f"{_NOTE}{line}", file=sys.stderr),
    )


def check_workers(jobs: int, hours: float | None) -> list[int]:
    """The cores that workers are pinned to; raises for too many jobs or no time."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    most = len(cores) or os.cpu_count() or 1
    if not 1 <= jobs <= most:
        raise ValueError(
            f"reproduce: jobs={jobs} must be between 1 and {most}, the "
            "number of cores. Give such a number."
        )
    if hours is not None and not 0 < hours < math.inf:
        raise ValueError(
            f"reproduce: hours={hours!r} must be a finite number above 0, or left out "
            "for no limit."
        )
    return cores


def run_jobs(
    todo: Sequence[Job],
    *,
    jobs: int,
    results: str | Path,
    runs: str | Path,
    on_job: Callable[[Job, float], None],
    hours: float | None = None,
) -> Outcome:
    """Runs rows in worker processes, a row that others need before those.

    Args:
      todo: what to run, the first first.
      jobs: how many at a time; from 2 on each is pinned to one core.
      results: the results folder.
      runs: the folder of checkpoints and weights.
      on_job: called after each finished job with the seconds it took.
      hours: after so many no job but the first is begun, and those that are running
        stop after their epoch, with a checkpoint; None for no limit.

    Returns:
      What has not finished. Without ``hours`` that is what other processes train.

    Raises:
      ValueError: for more jobs than cores, and for hours that are not above 0.
      RuntimeError: where a worker fails and there are no ``hours``, with the end of
        what it printed; the others are stopped. With ``hours`` they go on.
    """
    cores = check_workers(jobs, hours)
    for folder in {job.path(results).parent for job in todo}:
        records.check_writable(folder)
    records.check_writable(runs)
    end = math.inf if hours is None else time.monotonic() + 3600 * hours
    waiting, begun = list(todo), False  # one is begun whatever the hours
    outcome = Outcome([], [], {})
    free = list(range(jobs))
    trainings = {job.name: _training(job) for job in todo}
    with _told_to_end() as told, _workers() as active:
        while waiting or active:
            if told:
                raise SystemExit(128 + told[0])
            left = max(0.0, end - time.monotonic())
            if begun and not left:
                outcome.left.extend(job.name for job in waiting)
                waiting = []
            unable = {*outcome.busy, *outcome.failed}
            for job in [job for job in waiting if unable & _needs(job)]:
                waiting.remove(job)
                outcome.busy.append(job.name)
            pending = {job.name for job in [*waiting, *(w.job for w in active)]}
            # Of runs that share their training one at a time: the others read it then.
            trained = {trainings[w.job.name] for w in active}
            ready = [job for job in waiting if not pending & _needs(job)]
            while free and ready:
                job = ready.pop(0)
                if trainings[job.name] in trained:
                    continue
                trained.add(trainings[job.name])
                waiting.remove(job)
                slot = free.pop(0)
                core = cores[slot] if jobs > 1 and cores else None
                hours_left = None if hours is None else left / 3600
                active.append(_Worker(job, slot, core, results, runs, hours_left))
                begun = True
            if waiting and not active:
                raise ValueError(
                    f"reproduce: rows={[job.name for job in waiting]!r} need one "
                    "another; `needs` must lead to a row that needs none. Leave the "
                    "circle out of the table."
                )
            time.sleep(0.05)
            for worker in [w for w in active if w.process.poll() is not None]:
                active.remove(worker)
                free.append(worker.slot)
                _end(worker, outcome, on_job, keep_going=hours is not None)
    return outcome


def _needs(job: Job) -> set[str]:
    """Names of the jobs to run before one."""
    return {
        job._replace(row=job.row._replace(name=name)).name for name in job.row.needs
    }


def _training(job: Job) -> str:
    """Name of the training of a job, which other jobs may share."""
    resolved = configs.resolve(job.row.config)
    return configs.default_name(configs.training_of(resolved))


def _end(worker: Any, outcome: Outcome, on_job: Callable, *, keep_going: bool) -> None:
    """Sorts a worker that has ended into what became of its job."""
    job, status = worker.job, worker.process.returncode
    if status in (_TIME_OVER, _BUSY):
        worker.notes()
        (outcome.left if status == _TIME_OVER else outcome.busy).append(job.name)
        return
    try:
        worker.check()
    except RuntimeError as error:
        if not keep_going:
            raise
        outcome.failed[job.name] = str(error)
        return
    on_job(job, time.perf_counter() - worker.start)


class _Worker:
    """A process that runs one row."""

    def __init__(self, job, slot, core, results, runs, hours):
        self.job, self.slot, self.start = job, slot, time.perf_counter()
        # Two processes may try the same row: each has a log of its own.
        name = f"{job.table.name}-{job.row.name}-{os.getpid()}.log"
        self.log = Path(runs) / name
        environment = dict(os.environ)
        if core is not None:
            flags = f"{environment.get('XLA_FLAGS', '')} {_ONE_CORE}".strip()
            environment |= {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}
        words = [job.table.name, job.row.name, results, runs, core, hours]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, *map(str, words)],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def check(self):
        """Raises where it has failed, else passes on its notes."""
        if self.process.returncode:
            tail = self.log.read_text("utf-8", errors="replace")[-2000:]
            raise RuntimeError(
                f"reproduce: the run of {self.job.row.name} failed (exit status "
                f"{self.process.returncode}); the end of {self.log}:\n{tail}"
            )
        self.notes()

    def notes(self):
        """Prints the lines that are to be read, and deletes the log."""
        for line in self.log.read_text("utf-8", errors="replace").splitlines():
            if line.startswith(_NOTE):
                print(line, file=sys.stderr)
        self.log.unlink()


@contextlib.contextmanager
def _workers() -> Iterator[list[_Worker]]:
    """The list of running workers; whatever happens, none outlives the block."""
    active: list[_Worker] = []
    try:
        yield active
    finally:
        for worker in active:
            worker.process.terminate()
        for worker in active:
            worker.process.wait()


@contextlib.contextmanager
def _told_to_end() -> Iterator[list[int]]:
    """Collects SIGTERM, which would end this process at once and leave the workers."""
    told: list[int] = []
    # Handlers can be set in the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _main() -> None:
    name, row, results, runs, core, hours = sys.argv[1:]
    if core != "None":
        # Before the first computation: the thread pools count the cores they see.
        os.sched_setaffinity(0, {int(core)})
    table = find(name)
    (match,) = (r for r in table.rows if r.name == row)
    limit = None if hours == "None" else float(hours)
    try:
        run_row(table, match, results, runs, limit)
    except train.TimeOver as over:
        print(f"{_NOTE}{name}/{row}: {over}", file=sys.stderr)
        sys.exit(_TIME_OVER)
    except checkpoints.Busy:
        print(f"{_NOTE}{name}/{row}: another process trains it.", file=sys.stderr)
        sys.exit(_BUSY)


if __name__ == "__main__":
    _main()
