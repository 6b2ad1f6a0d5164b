"""Runs the rows of a table that have no record yet, several at a time if asked."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sparse_optax.experiments import records, train
from sparse_optax.experiments.tables import TABLES, common
from sparse_optax.experiments.tables.common import Row, Table

# One core a worker: two that share cores slow each other down more than that.
# What starts the lines that a worker wants to be read.
_NOTE = "sparse-optax: "
_ONE_CORE = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


def find(name: str) -> Table:
    """A table by name.

    Raises:
      ValueError: for an unknown one, listing all.
    """
    if name not in TABLES:
        raise ValueError(f"reproduce: table={name!r}; choose one of {[*TABLES]}.")
    return TABLES[name]


def missing(table: Table, results: str | Path, pattern: str = "") -> list[Row]:
    """The rows without a record.

    Args:
      table: the table.
      results: the results folder.
      pattern: regular expression; only rows whose name it matches whole.

    Returns:
      Rows in the order of the table; those that another table runs are not among
      them.

    Raises:
      ValueError: where ``pattern`` is no regular expression or matches no row, and
        where a record is damaged or was made with other values than its row asks for.
    """
    own = [row for row in table.rows if row.table is None]
    try:
        expression = re.compile(pattern or ".*")
    except re.error as error:
        raise ValueError(
            f"reproduce: rows={pattern!r} must be a regular expression ({error}). Give "
            "one that matches the names of the rows, such as 'd0.05_s.' or '.*_s0'."
        ) from error
    rows = [row for row in own if expression.fullmatch(row.name)]
    if not rows:
        raise ValueError(
            f"reproduce: rows={pattern!r} matches no row of {table.name}; its rows are "
            f"{', '.join(row.name for row in own)}."
        )
    left = []
    for row in rows:
        path = Path(results) / table.name / f"{row.name}.json"
        if not path.exists():
            left.append(row)
            continue
        common.read_row(row, path)
    return left


def run_row(table: Table, row: Row, results: str | Path, runs: str | Path) -> None:
    """Runs one row in this process and writes its record."""
    train.train(
        row.config,
        runs=runs,
        record_path=Path(results) / table.name / f"{row.name}.json",
        command=f"sparse-optax reproduce {table.name} --rows {row.name}",
        on_note=lambda line: print(f"{_NOTE}{line}", file=sys.stderr),
    )


def run_rows(
    table: Table,
    rows: list[Row],
    *,
    jobs: int,
    results: str | Path,
    runs: str | Path,
    on_row: Callable[[Row, float], None],
) -> None:
    """Runs rows in worker processes, a row that others need before those.

    Args:
      table: the table.
      rows: what to run.
      jobs: how many at a time; from 2 on each is pinned to one core.
      results: the results folder.
      runs: the folder of checkpoints and weights.
      on_row: called after each row with the seconds it took.

    Raises:
      ValueError: for more jobs than cores.
      RuntimeError: where a worker fails, with the end of what it printed; the others
        are stopped.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    most = len(cores) or os.cpu_count() or 1
    if not 1 <= jobs <= most:
        raise ValueError(
            f"reproduce: jobs={jobs} must be between 1 and {most}, the "
            "number of cores. Give fewer jobs."
        )
    records.check_writable(Path(results) / table.name)
    records.check_writable(runs)
    waiting = list(rows)
    free = list(range(jobs))
    with _told_to_end() as told, _workers() as active:
        while waiting or active:
            if told:
                raise SystemExit(128 + told[0])
            pending = {row.name for row in waiting} | {
                worker.row.name for worker in active
            }
            ready = [row for row in waiting if not pending.intersection(row.needs)]
            while free and ready:
                row = ready.pop(0)
                waiting.remove(row)
                slot = free.pop(0)
                core = cores[slot] if jobs > 1 and cores else None
                active.append(_Worker(table, row, slot, core, results, runs))
            if waiting and not active:
                raise ValueError(
                    f"reproduce: rows={[row.name for row in waiting]!r} need one "
                    "another; `needs` must lead to a row that needs none. Leave the "
                    "circle out of the table."
                )
            time.sleep(0.05)
            for worker in [w for w in active if w.process.poll() is not None]:
                active.remove(worker)
                free.append(worker.slot)
                worker.check()
                on_row(worker.row, time.perf_counter() - worker.start)


class _Worker:
    """A process that runs one row."""

    def __init__(self, table, row, slot, core, results, runs):
        self.row, self.slot, self.start = row, slot, time.perf_counter()
        self.log = Path(runs) / f"{table.name}-{row.name}.log"
        environment = dict(os.environ)
        if core is not None:
            flags = f"{environment.get('XLA_FLAGS', '')} {_ONE_CORE}".strip()
            environment |= {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}
        arguments = [table.name, row.name, str(results), str(runs), str(core)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __spec__.name, *arguments],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def check(self):
        if self.process.returncode:
            tail = self.log.read_text("utf-8", errors="replace")[-2000:]
            raise RuntimeError(
                f"reproduce: the run of {self.row.name} failed (exit status "
                f"{self.process.returncode}); the end of {self.log}:\n{tail}"
            )
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
    table, row, results, runs, core = sys.argv[1:]
    if core != "None":
        # Before the first computation: the thread pools count the cores they see.
        os.sched_setaffinity(0, {int(core)})
    chosen = find(table)
    (match,) = (r for r in chosen.rows if r.name == row)
    run_row(chosen, match, results, runs)


if __name__ == "__main__":
    _main()
