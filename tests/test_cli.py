"""The command line: train, reproduce, tables, and what wrong input prints."""

import contextlib
import dataclasses
import errno
import importlib.util
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("flax")

import rich.console
from matplotlib.figure import Figure

import sparse_optax
from sparse_optax.experiments import (
    checkpoints,
    cli,
    compare,
    data,
    plots,
    progress,
    readme,
    recipes,
    records,
    reproduce,
    setup,
    train,
)
from sparse_optax.experiments import config as configs
from sparse_optax.experiments import page as pages
from sparse_optax.experiments.tables import (
    QUEUE,
    TABLES,
    ablation_networks,
    cifar10_lee,
    cifar10_short,
    common,
    costs,
    gsm_networks,
    methods_lenet300,
    others_lenet300,
    resnet50_mostafa,
    text_transformer,
    ticket_gsm,
    wrn28_mostafa,
)

PNG = b"\x89PNG\r\n\x1a\n"


def record(name="run", error=2.0, config=None, base=None, **results):
    """A made-up record."""
    results = {
        "test_error": error,
        "valid_error": error,
        "weights": 100,
        "kept": 5,
        "nonzeros": 5,
        **results,
    }
    return records.Record(
        name=name,
        command="sparse-optax",
        config=config or {"method": "dense"},
        seed=(config or {}).get("seed", 0),
        commit=None,
        dirty=None,
        versions={},
        device={},
        wall_seconds=1.0,
        compile_seconds=1.0,
        seconds_per_epoch=0.5,
        steps_per_epoch=10,
        results=results,
        layers=[],
        base=base,
        history={"epoch": [1], "test_error": [error]},
    )


def finish(table, results, errors):
    """Writes a record for each row, its error from ``errors(row)``."""
    for row in table.rows:
        config = configs.as_dict(configs.resolve(row.config))
        path = results / table.name / f"{row.name}.json"
        records.write(path, record(row.name, errors(row), config))


# -- train -------------------------------------------------------------------------


def test_train_prints_layers_and_leaves_record_and_plot(tmp_path, capsys):
    arguments = ["train", "--method", "dense", "--epochs", "2", "--drop-epochs", "1"]
    folders = ["--results", str(tmp_path / "r"), "--runs", str(tmp_path / "runs")]
    assert cli.main([*arguments, *folders]) == 0
    printed = capsys.readouterr().out
    (path,) = (tmp_path / "r").glob("*.json")
    plot = tmp_path / "runs" / path.stem / "plot.png"
    for word in ("fc1/kernel", "19,200", "50,200", str(path), str(plot)):
        assert word in printed
    assert plot.read_bytes().startswith(PNG)
    written = records.read(path)
    assert (written.config["epochs"], written.config["drop_epochs"]) == (2, [1])
    assert f"test error            {written.results['test_error']:.2f}%" in printed


def test_quiet_prints_the_record_only(tmp_path, capsys):
    arguments = ["train", "--method", "dense", "--epochs", "1", "--quiet"]
    folders = ["--results", str(tmp_path), "--runs", str(tmp_path)]
    assert cli.main([*arguments, *folders]) == 0
    assert Path(capsys.readouterr().out.strip()).suffix == ".json"


def test_main_job_is_sparse_momentum_on_digits():
    run = configs.resolve(cli.Train().config)
    assert (run.dataset, run.model) == ("digits", "lenet-300-100")
    assert (run.method, run.density) == ("sparse_momentum", 0.05)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["train", "reproduce", "tables", "digits"]),
        (
            ["train"],
            [
                "--density",
                "share of the weights that is kept",
                "sparse_momentum",
                "network_surgery",
                "recipe of the data set",
                "--base.epochs",
            ],
        ),
        (["reproduce"], ["mnist_lenet300", "gsm_lenet300", "--jobs"]),
        (["tables"], ["--check"]),
        ([], ["compare", "report", "methods", "--version"]),
        (["compare"], ["results/<name>.json", "--plot"]),
        (["report"], ["runs/<name>", "--page"]),
        (["methods"], ["--dataset"]),
        (["train"], ["--budget", "200KB", "10MFLOPs", "--no-dense"]),
    ],
)
def test_help_reads_well(command, words, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    # Words may stand on two lines, inside a frame.
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().out)
    for word in words:
        assert word in printed
    assert "None" not in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--density", "1.5"], "TrainConfig: density=1.5 must be in (0, 1]"),
        (
            ["train", "--model", "lenet-5-caffe"],
            "LeNet5Caffe: in_shape=(8, 8, 1) leaves no pixel",
        ),
        (["reproduce", "mnist_lenet300", "--jobs", "999"], "jobs=999 must be between"),
        (["reproduce", "mnist_lenet300", "--rows", "x"], "rows='x' matches no row"),
        (["tables", "--readme", "nowhere.md"], "nowhere.md does not exist"),
        (
            ["train", "--epochs", "1"],
            "method='sparse_momentum' does not fit epochs=1 of",
        ),
        (
            ["train", "--seed", "4294967296"],
            "TrainConfig: seed=4294967296 must be in [0, 4294967295]",
        ),
        (["train", "--drop-steps", "-1"], "drop_steps=(-1,) must be numbers from 1 to"),
        (["train", "--drop-factor", "nan"], "drop_factor=nan must be a finite number"),
        (
            ["train", "--drop-steps", "99999999999999999999"],
            "drop_steps=(99999999999999999999,) must be numbers from 1 to 2147483647",
        ),
        (["train", "--epochs", "4294967297"], "epochs=4294967297 must be at most"),
        (["train", "--base.epochs", "-1"], "base.epochs=-1 must be 0, for no dense"),
        (
            ["train", "--method", "l2", "--density", "1e-9"],
            "density=1e-09 must be at least 1.99e-05, one of the 50200 weights",
        ),
        (["reproduce", "mnist_lenet300", "--rows", "["], "rows='[' must be a regular"),
        (["tables", "--readme", "."], ". does not exist"),
        (["reproduce"], "hours=None must be given where all tables are run"),
        (["reproduce", "--hours", "0"], "hours=0.0 must be a finite number above 0"),
        (
            ["reproduce", "digits_lenet300", "--hours", "nan"],
            "hours=nan must be a finite number above 0, or left out",
        ),
        (["reproduce", "digits_lenet300", "--seeds", "0"], "seeds=0 must be 1 or more"),
        (["reproduce", "--hours", "1", "--rows", "x"], "matches no row of any table"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("sparse-optax: ")
    assert words in printed
    assert "Traceback" not in printed


def test_unknown_method_lists_those_there_are(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--method", "prune"])
    assert caught.value.code == 2
    assert "sparse_momentum" in capsys.readouterr().err


INTS = (-1, 0, 1, 3, 2**31 - 1, 2**31, 2**32 + 1, 10**20)
FLOATS = (-1.0, 0.0, 1e-300, 1e-9, 0.5, 1.0, 2.0, 1e39, math.inf, -math.inf, math.nan)
FLAGS = {
    "epochs": INTS,
    "batch-size": INTS,
    "update-epochs": INTS,
    "settle-epoch": INTS,
    "seed": INTS,
    "checkpoint-every": INTS,
    "base.epochs": INTS,
    "base.batch-size": INTS,
    "drop-steps": INTS,
    "drop-epochs": INTS,
    "base.drop-epochs": INTS,
    "density": FLOATS,
    "learning-rate": FLOATS,
    "drop-factor": FLOATS,
    "momentum": FLOATS,
    "weight-decay": FLOATS,
    "prune-rate": FLOATS,
    "l1": FLOATS,
    "gate": FLOATS,
    "base.learning-rate": FLOATS,
    "base.momentum": FLOATS,
    "shares": ("uniform", "erdos_renyi", "linear"),
    "grow": ("momentum", "random", "global_momentum"),
    "split": ("lee", "full"),
    "ticket": ("own", "random"),
}


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(40, id="some"),
        pytest.param(500, marks=pytest.mark.fuzz, id="many"),
    ],
)
def test_no_flags_end_in_a_traceback(number, tmp_path, monkeypatch, capsys, figures):
    """Random flags come to the first epoch or end in one line that names one."""

    def stop(run, params, stats, folder):
        raise ValueError("would train")

    monkeypatch.setattr(train._Run, "train", stop)
    rng = np.random.default_rng(0)
    folders = [f"--{name}={tmp_path / name}" for name in ("results", "runs")]
    trained = 0
    for _ in range(number):
        methods = ("sparse_momentum", "dense", "gsm", "l1", "magnitude", "rigl")
        given = {"method": rng.choice(methods)}
        for name in rng.choice(list(FLAGS), int(rng.integers(1, 4)), replace=False):
            given[name] = FLAGS[name][rng.integers(len(FLAGS[name]))]
        flags = [f"--{name}={value}" for name, value in given.items()]
        many = ("drop-steps", "drop-epochs", "base.drop-epochs")
        flags = [
            x for f in flags for x in (f.split("=") if f[2:].startswith(many) else [f])
        ]
        assert cli.main(["train", *flags, *folders]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("sparse-optax: ")
        trained += line.endswith("would train")
        named = any(name.replace("-", "_").split(".")[0] in line for name in given)
        assert named or line.endswith("would train"), (flags, line)
    assert 0 < trained < number
    figures["command lines of random flags"] += number


def test_killed_process_goes_on_and_ends_the_same(tmp_path):
    """SIGKILL in the middle, then the same command again, against one unbroken."""

    def command(runs):
        return [
            *(sys.executable, "-m", "sparse_optax.experiments.cli", "train"),
            *("--method", "dense", "--epochs", "100", "--checkpoint-every", "4"),
            *("--runs", str(tmp_path / runs), "--results", str(tmp_path / runs)),
            "--quiet",
        ]

    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    broken = subprocess.Popen(
        command("broken"), env=environment, stdout=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 300
        while not list((tmp_path / "broken").glob("*/checkpoints/[0-9]*.ckpt")):
            assert broken.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        broken.send_signal(signal.SIGKILL)
        assert broken.wait() == -signal.SIGKILL
    assert not list((tmp_path / "broken").glob("*/weights.sparse"))
    for runs in ("broken", "unbroken"):
        subprocess.run(
            command(runs), env=environment, check=True, stdout=subprocess.DEVNULL
        )
    weights = [
        next((tmp_path / runs).glob("*/weights.sparse")).read_bytes()
        for runs in ("broken", "unbroken")
    ]
    assert weights[0] == weights[1]
    both = [
        records.read(next((tmp_path / runs).glob("*.json")))
        for runs in ("broken", "unbroken")
    ]
    assert both[0].history["epoch"] == list(range(1, 101))
    assert both[0].history["test_error"] == both[1].history["test_error"]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_of_a_process(tmp_path):
    """Status 130, one line that says how to go on, and the same command does."""
    command = [
        *(sys.executable, "-m", "sparse_optax.experiments.cli", "train", "--quiet"),
        *("--method", "dense", "--epochs", "300", "--checkpoint-every", "7"),
        *("--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("runs/*/checkpoints/*.ckpt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    (line,) = printed.splitlines()
    sentence = "sparse-optax: stopped after epoch (.*) of 300; the same command goes on"
    found = re.fullmatch(sentence + " from there.", line)
    assert found, line
    assert list(tmp_path.glob(f"runs/*/checkpoints/{found.group(1)}.ckpt"))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    record = records.read(Path(done.stdout.strip()))
    assert record.history["epoch"] == list(range(1, 301))


def test_ctrl_c_is_status_130(monkeypatch, capsys, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", stop)
    monkeypatch.setattr(reproduce, "run_jobs", stop)
    folders = [f"--{name}={tmp_path / name}" for name in ("results", "runs")]
    assert cli.main(["train", *folders]) == 130
    assert (
        capsys.readouterr().err
        == "sparse-optax: stopped; the same command goes on from its last checkpoint, "
        "or starts again where there is none.\n"
    )
    assert cli.main(["reproduce", "digits_lenet300", *folders]) == 130
    assert "stopped after 0 of 9 rows; the same command" in capsys.readouterr().err


def test_a_path_that_the_locale_cannot_decode(tmp_path):
    """Bytes past ASCII, in a locale that has no others and is not coerced."""
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    folder = tmp_path / "zählen"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sparse_optax.experiments.cli", "train"),
            *("--method", "dense", "--epochs", "1"),
            *("--runs", str(folder), "--results", str(folder)),
        ],
        env={**environment, "LC_ALL": "POSIX"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.json")
    assert os.fsencode(path) in done.stdout
    assert (folder / path.stem / "plot.png").read_bytes().startswith(PNG)


def test_output_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, capsys):
    """The files are written all the same, and the status says that something failed."""
    arguments = [*written_pages(tmp_path, page(tmp_path)), "--results", str(tmp_path)]
    finish(TABLES["mnist_lenet300"], tmp_path, lambda row: 1.5)
    with monkeypatch.context() as context, open("/dev/full", "w") as full:
        context.setattr(sys, "stdout", full)
        assert cli.main(arguments) == 1
    assert (tmp_path / "README.md").read_text().count("1.50 ± 0.000 (10)") == 5
    line = capsys.readouterr().err
    assert "standard output cannot be written (No space left on device); all" in line
    with monkeypatch.context() as context, open("/dev/full", "w") as full:
        context.setattr(sys, "stdout", full)
        with contextlib.suppress(SystemExit):
            assert cli.main(["train", "--help"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as context, os.fdopen(writer, "w") as closed:
        context.setattr(sys, "stdout", closed)
        assert cli.main([*arguments, "--check"]) == 1
    assert capsys.readouterr().err == ""
    assert cli.main([*arguments, "--check"]) == 0


def test_output_of_a_terminal_without_a_character(monkeypatch, tmp_path):
    finish(TABLES["mnist_lenet300"], tmp_path, lambda row: 1.5)
    buffer = io.BytesIO()
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
        assert cli.main(["reproduce", "mnist_lenet300", f"--results={tmp_path}"]) == 0
        text = buffer.getvalue().decode("ascii")
    assert r"1.50 \xb1 0.000 (10)" in text


def test_a_plot_that_cannot_be_written_leaves_the_record(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(plots, "save", refuse)
    arguments = ["train", "--method", "dense", "--epochs", "1", f"--runs={tmp_path}"]
    assert cli.main([*arguments, f"--results={tmp_path}"]) == 1
    (path,) = tmp_path.glob("*.json")
    line = capsys.readouterr().err
    assert f"the record {path} is written, but the plot" in line
    assert "(No space left on device)" in line
    monkeypatch.undo()
    assert cli.main([*arguments, f"--results={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "had finished before; --fresh trains it again" in printed
    assert list(tmp_path.glob("*/plot.png"))


# -- reproduce ---------------------------------------------------------------------


def test_reproduce_runs_what_is_missing_once(tmp_path, capsys):
    """In real worker processes, pinned to cores where there are two."""
    jobs = min(2, len(os.sched_getaffinity(0)))
    arguments = [
        *("reproduce", "digits_lenet300", "--rows", "dense_s[01]"),
        *("--jobs", str(jobs)),
        *("--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")),
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "results" / "digits_lenet300"
    assert sorted(p.name for p in folder.iterdir()) == [
        "dense_s0.json",
        "dense_s1.json",
    ]
    assert "2 of 9 rows to run" in printed
    assert "| dense | 50,200 |" in printed
    written = records.read(folder / "dense_s1.json")
    assert (written.seed, written.name) == (1, "dense_s1")
    assert written.command == "sparse-optax reproduce digits_lenet300 --rows dense_s1"
    if jobs == 2:
        assert written.device["cpu_threads"] == 1
    assert not list((tmp_path / "runs").glob("*.log"))

    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cli.main(arguments) == 0
    assert "0 of 9 rows to run" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_rows_that_need_one_another_are_refused(tmp_path):
    table = TABLES["gsm_lenet300"]
    first, second = table.rows[:2]
    circle = [
        first._replace(needs=(second.name,)),
        second._replace(needs=(first.name,)),
    ]
    with pytest.raises(ValueError, match=r"need one another.*Leave the circle out"):
        reproduce.run_jobs(
            [reproduce.Job(table, row) for row in circle],
            jobs=1,
            results=tmp_path,
            runs=tmp_path,
            on_job=lambda job, seconds: None,
        )


def with_idle_workers(jobs, folder, monkeypatch):
    """Runs jobs, two at a time, with workers that do nothing.

    Returns the outcome, the names that were done, and for each name that began those
    that were active with it and those that had ended.
    """
    active, ended, began, done = set(), set(), {}, []

    class Worker:
        returncode = 0

        def __init__(self, job, slot, core, results, runs, hours):
            del core, results, runs, hours
            self.job, self.slot, self.start = job, slot, time.perf_counter()
            self.process, self.polls = self, 0
            active.add(job.row.name)
            began[job.row.name] = set(active), set(ended)

        def poll(self):
            self.polls += 1
            return 0 if self.polls > 2 else None

        def check(self):
            active.remove(self.job.row.name)
            ended.add(self.job.row.name)

    monkeypatch.setattr(reproduce, "_Worker", Worker)
    monkeypatch.setattr(reproduce.os, "sched_getaffinity", lambda _: {0, 1})
    outcome = reproduce.run_jobs(
        jobs,
        jobs=2,
        results=folder,
        runs=folder,
        on_job=lambda job, seconds: done.append(job.row.name),
    )
    return outcome, done, began


def test_rows_wait_for_what_they_need(tmp_path, monkeypatch):
    table = TABLES["gsm_lenet300"]
    rows = [row for row in table.rows if row.name.endswith(("s0", "s1"))]
    jobs = [reproduce.Job(table, row) for row in rows]
    _, done, began = with_idle_workers(jobs, tmp_path, monkeypatch)
    assert sorted(done) == sorted(row.name for row in rows)
    assert max(len(active) for active, _ in began.values()) == 2
    for row in rows:
        _, finished = began[row.name]
        assert set(row.needs) <= finished


def test_rows_that_share_their_training_do_not_run_together(tmp_path, monkeypatch):
    """Wanda and SparseGPT cut what L2 trains; a dense network runs beside them."""
    methods = ("l2", "wanda", "sparse_gpt", "dense")
    rows = [
        common.Row(method, configs.TrainConfig(method=method), method)
        for method in methods
    ]
    jobs = [reproduce.Job(TABLES["digits_lenet300"], row) for row in rows]
    outcome, done, began = with_idle_workers(jobs, tmp_path, monkeypatch)
    assert outcome == ([], [], {})
    assert sorted(done) == sorted(methods)
    assert max(len(active) for active, _ in began.values()) == 2
    assert all(len(active - {"dense"}) <= 1 for active, _ in began.values())


def test_failed_worker_is_told_with_what_it_printed(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho something broke\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    table = TABLES["digits_lenet300"]
    with pytest.raises(RuntimeError, match="dense_s0 failed") as caught:
        reproduce.run_jobs(
            [reproduce.Job(table, table.rows[0])],
            jobs=1,
            results=tmp_path / "results",
            runs=tmp_path / "runs",
            on_job=lambda *_: None,
        )
    assert "something broke" in str(caught.value)
    assert "exit status 3" in str(caught.value)


def test_no_worker_outlives_a_run_that_is_told_to_end(tmp_path):
    """A SIGTERM ends the workers too; they would hold the folders of their runs."""
    worker = tmp_path / "python"
    worker.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 600\n")
    worker.chmod(0o755)
    program = (
        "import sys; from sparse_optax.experiments import cli; "
        f"sys.executable = {str(worker)!r}; sys.exit(cli.main(sys.argv[1:]))"
    )
    folders = [f"--{name}={tmp_path / name}" for name in ("results", "runs")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, "reproduce", "digits_lenet300", *folders],
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)
    finally:
        process.kill()
        if (tmp_path / "pid").exists():
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


# -- reproduce under a limit of hours ----------------------------------------------


def folders(path):
    return [f"--{name}={path / name}" for name in ("results", "runs")]


def test_reproduce_stops_when_the_hours_are_over_and_goes_on(tmp_path, capsys):
    """Hours that are over at once still train one epoch, so that every run ends."""
    command = ["reproduce", "digits_lenet300", "--rows=dense_s[01]"]
    arguments = [*command, *folders(tmp_path), "--seeds=1"]
    path = tmp_path / "results" / "digits_lenet300" / "dense_s0.json"
    for epoch in (1, 2):
        assert cli.main([*arguments, "--hours=1e-9"]) == 0
        printed = capsys.readouterr()
        assert "1 of 9 rows to run" in printed.out
        assert (
            f"digits_lenet300/dense_s0: stopped after epoch {epoch} of 100; the same "
            "command goes on from there."
        ) in printed.err
        assert "hours are over with 1 rows left; the same command" in printed.err
        assert not path.exists()
    assert cli.main([*arguments, "--hours=1"]) == 0
    assert "hours are over" not in capsys.readouterr().err
    assert records.read(path).history["epoch"] == list(range(1, 101))
    assert not list((tmp_path / "runs").glob("*.log"))


def test_a_run_of_another_process_is_passed_over(tmp_path, capsys):
    row = TABLES["digits_lenet300"].rows[0]
    name = configs.default_name(configs.resolve(row.config))
    arguments = ["reproduce", "digits_lenet300", f"--rows={row.name}"]
    with checkpoints.RunFolder(tmp_path / "runs" / name).lock():
        assert cli.main([*arguments, *folders(tmp_path)]) == 0
    printed = capsys.readouterr().err
    assert f"digits_lenet300/{row.name}: another process trains it" in printed
    assert "passed over, another process trains them: digits_lenet300/" in printed
    assert not list((tmp_path / "results").rglob("*.json"))


def test_what_needs_a_run_that_is_passed_over_is_not_begun(tmp_path, monkeypatch):
    table = TABLES["gsm_lenet300"]
    rows = [row for row in table.rows if row.config.seed == 0]
    monkeypatch.setattr(sys, "executable", program(tmp_path, "exit 76"))
    outcome = reproduce.run_jobs(
        [reproduce.Job(table, row) for row in rows],
        jobs=1,
        results=tmp_path / "results",
        runs=tmp_path,
        on_job=lambda *_: pytest.fail("nothing finishes"),
    )
    assert outcome == ([], [f"gsm_lenet300/{row.name}" for row in rows], {})
    assert (tmp_path / "begun").read_text().split() == ["base_s0"]


def program(tmp_path, end):
    """A worker that writes down the name of its row and ends."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\necho $4 >>{tmp_path}/begun\n{end}\n")
    path.chmod(0o755)
    return str(path)


def test_under_a_limit_of_hours_a_failed_row_does_not_stop_the_others(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "executable", program(tmp_path, "echo broke; exit 3"))
    command = ["reproduce", "digits_lenet300", *folders(tmp_path), "--seeds=1"]
    assert cli.main([*command, "--hours=1"]) == 1
    names = ["dense_s0", "sparse_momentum_s0", "gsm_s0"]
    assert (tmp_path / "begun").read_text().split() == names
    printed = capsys.readouterr().err
    for name in names:
        assert f"the run of {name} failed (exit status 3)" in printed


def test_all_tables_are_run_in_a_declared_order(tmp_path):
    jobs = [job.name for job in reproduce.queue(tmp_path)]
    own = [
        f"{table.name}/{row.name}"
        for table in TABLES.values()
        for row in table.rows
        # Rows of ImageNet, of weeks each, are run where their table is named.
        if row.table is None and row.config.dataset != "imagenet"
    ]
    assert sorted(jobs) == sorted(own)
    turns = iter(QUEUE)
    turn, seen = next(turns), set()
    for job in reproduce.queue(tmp_path):
        while (
            job.table.name != turn.table
            or not re.fullmatch(turn.rows, job.row.name)
            or (turn.seeds is not None and job.row.config.seed >= turn.seeds)
        ):
            turn = next(turns)  # a job out of turn would end the turns
        seen.add(turn)
    assert len(seen) > 1
    first = reproduce.queue(tmp_path, ".*_s1", seeds=2)
    assert {job.row.config.seed for job in first} == {1}
    finish(TABLES["mnist_lenet5"], tmp_path, lambda row: 1.0)
    left = [job.name for job in reproduce.queue(tmp_path)]
    assert left == [name for name in jobs if not name.startswith("mnist_lenet5/")]


def test_two_processes_that_try_a_row_have_a_log_each(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", program(tmp_path, "exit 76"))
    table = TABLES["digits_lenet300"]
    job = reproduce.Job(table, table.rows[0])
    (tmp_path / "runs").mkdir()
    workers = []
    for number in (101, 102):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        made = reproduce._Worker(job, 0, None, tmp_path, tmp_path / "runs", None)
        workers.append(made)
        made.process.wait()
    for worker in reversed(workers):  # the one that is kept out ends first
        worker.notes()
    assert not list((tmp_path / "runs").iterdir())


def test_rows_whose_images_are_not_there_are_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_OPTAX_DATA", str(tmp_path))
    monkeypatch.setattr(sys, "executable", program(tmp_path, "exit 76"))
    command = ["reproduce", "gsm_networks", *folders(tmp_path), "--seeds=1"]
    words = ["--rows=(lenet-5-caffe_125x|resnet-50_4x)_plain.*"]
    assert cli.main([*command, *words]) == 0
    assert (tmp_path / "begun").read_text().split() == ["lenet-5-caffe_125x_plain_s0"]
    assert "1 of 2 rows need imagenet in $SPARSE_OPTAX" in capsys.readouterr().err
    assert cli.main([*command, "--rows=resnet-50.*"]) == 1
    assert "2 of 2 rows need imagenet in $SPARSE_OPTAX" in capsys.readouterr().err
    (tmp_path / "imagenet").mkdir()
    assert cli.main([*command, "--rows=resnet-50_4x.*"]) == 0
    assert (tmp_path / "begun").read_text().split()[1:] == ["resnet-50_4x_plain_s0"]


def test_reproduce_runs_all_tables_in_turn(tmp_path, monkeypatch, capsys):
    tables = {name: TABLES[name] for name in ("gsm_lenet300", "digits_lenet300")}
    queue = [common.Turn("digits_lenet300", "dense_.*"), *map(common.Turn, tables)]
    monkeypatch.setattr(sys, "executable", program(tmp_path, "exit 75"))
    monkeypatch.setattr(reproduce, "QUEUE", queue)
    monkeypatch.setattr(cli, "TABLES", tables)
    command = ["reproduce", *folders(tmp_path), "--seeds=1", "--hours=1"]
    assert cli.main(command) == 0
    assert (tmp_path / "begun").read_text().split() == [
        *("dense_s0", "base_s0", "plain_s0", "gate_s0", "settle_s0"),
        *("sparse_momentum_s0", "gsm_s0"),
    ]
    printed = capsys.readouterr()
    assert "All tables: 7 rows to run" in printed.out
    assert "gsm_lenet300: 0 of 20 rows" in printed.out
    assert "hours are over with 7 rows left" in printed.err


def test_record_of_another_config_is_not_taken_for_the_row(tmp_path):
    table = TABLES["mnist_lenet300"]
    row = table.rows[0]
    config = configs.as_dict(configs.resolve(row.config))
    path = tmp_path / table.name / f"{row.name}.json"
    records.write(path, record(row.name, 1.3, config))
    assert row not in reproduce.missing(table, tmp_path)
    records.write(path, record(row.name, 1.3, {**config, "epochs": 5}))
    with pytest.raises(ValueError, match=r"other values of \['epochs'\]"):
        reproduce.missing(table, tmp_path)


@pytest.mark.parametrize("name", list(TABLES))
def test_rows_of_a_table_differ_and_resolve(name):
    table = TABLES[name]
    names = [row.name for row in table.rows]
    runs = [configs.default_name(configs.resolve(row.config)) for row in table.rows]
    assert len(set(names)) == len(names)
    assert len(set(runs)) == len(runs)
    for row in table.rows:
        assert set(row.needs) <= set(names)


def test_variants_of_gsm_start_from_the_base_row():
    rows = {row.name: row for row in TABLES["gsm_lenet300"].rows}
    for row in rows.values():
        for needed in row.needs:
            base = configs.base_of(configs.resolve(row.config))
            assert base == configs.resolve(rows[needed].config)


# -- published numbers and costs -----------------------------------------------------


def test_hours_are_measured_steps_times_steps():
    """A hundred epochs of 540 steps; GSM after its base; what is shared once."""
    lenet = configs.TrainConfig(dataset="mnist", model="lenet-5-caffe", split="full")
    seconds = costs.STEPS["lenet-5-caffe"][1]
    np.testing.assert_allclose(costs.hours(lenet), 100 * 600 * seconds / 3600)
    gsm = dataclasses.replace(lenet, method="gsm")
    # Batches of 256: 234 steps an epoch, 2.56 times as long.
    epoch = 234 * 2.56 * seconds / 3600
    np.testing.assert_allclose(costs.hours(gsm), (100 + 240) * epoch)
    runs = [gsm, dataclasses.replace(gsm, gate=0.01)]
    np.testing.assert_allclose(costs.together(runs), (100 + 2 * 240) * epoch)
    assert costs.told(None) == "not run"
    assert costs.told(1234.5) == "not run: 1,234 hours"
    assert costs.told(0.26) == "not run: 0.3 hours"


def test_every_row_knows_its_cost():
    for table in TABLES.values():
        for row in table.rows:
            assert (costs.hours(row.config) or 0) > 0


PUBLISHED = (
    *(cifar10_lee, wrn28_mostafa, ablation_networks, gsm_networks, ticket_gsm),
    *(cifar10_short, text_transformer, others_lenet300, resnet50_mostafa),
)


@pytest.mark.parametrize("module", PUBLISHED, ids=lambda m: m.TABLE.name)
def test_a_line_without_a_record_says_what_it_costs(module):
    lines = readme.render_table(module.TABLE, {}).splitlines()
    cells = [line.split(" | ") for line in lines if "not run" in line]
    assert len(cells) == len(module.LINES)
    for (group, line), found in zip(module.LINES.items(), cells, strict=True):
        runs = [row.config for row in module.ROWS if row.group == group]
        assert runs
        assert found[0] == f"| {line.label}"
        assert found[2] == costs.told(costs.together(runs))


def test_a_published_number_stands_beside_ours():
    made = {
        f"vgg16-d_{method}_s{seed}": record(
            f"vgg16-d_{method}_s{seed}", error + seed / 99
        )
        for seed in range(3)
        for method, error in (("sparse_momentum", 6.5), ("snip", 7.0))
    }
    lines = readme.render_table(cifar10_lee.TABLE, made).splitlines()
    ours, snip = (line for line in lines if "vgg16-d" in line and "not run" not in line)
    result = common.compare([6.5 + s / 99 for s in range(3)], common.Paper(6.49, 0.045))
    interval = f"{result.low:+.2f} … {result.high:+.2f}, matches"
    assert ours.endswith(f"| 6.49 ± 0.045 | {interval} |")
    # No error of SNIP is known, so that there is a difference and no interval.
    assert snip.endswith("| 7.09 | -0.08 |")


def test_numbers_of_the_papers_are_those_of_the_papers():
    """Some of each table, typed a second time from its source."""
    paper = {
        ("cifar10_lee", "wrn-22-8_sparse_momentum"): (4.96, 0.042),
        ("cifar10_lee", "alexnet-s_dense"): (12.95, 0.056),
        ("cifar10_lee", "vgg16-like_snip"): (8.00, None),
        ("wrn28_mostafa", "dense"): (5.30, 0.05),
        ("wrn28_mostafa", "sparse_momentum_d0.1"): (6.39, 0.05),
        ("wrn28_mostafa", "static_d0.5"): (5.72, 0.06),
        ("wrn28_mostafa", "deep_rewiring_d0.3"): (7.50, 0.10),
        ("others_lenet300", "learning_compression_d0.01"): (3.2, None),
        ("others_lenet300", "sparse_variational_dropout_d0.015"): (1.9, None),
        ("ablation_networks", "lenet-5-caffe"): (0.69, 0.021),
        ("ablation_networks", "vgg16-d_size_momentum"): (7.28, np.hypot(0.045, 0.082)),
        ("gsm_networks", "lenet-5-caffe_300x_plain"): (0.94, None),
        ("gsm_networks", "densenet-40_8x_plain"): (5.98, None),
        ("gsm_networks", "resnet-50_5x_plain"): (25.70, None),
        ("resnet50_mostafa", "sparse_momentum_d0.1"): (26.9, None),
        ("resnet50_mostafa", "static_d0.2"): (28.4, None),
        ("ticket_gsm", "lenet-300-100_60x_magnitude"): (2.61, None),
        ("ticket_gsm", "lenet-5-caffe_300x_gsm"): (1.12, None),
    }
    modules = {module.TABLE.name: module for module in PUBLISHED}
    for (table, group), number in paper.items():
        found = modules[table].LINES[group].paper
        assert (found.mean, found.se) == number
    assert sum(line.paper is not None for line in cifar10_lee.LINES.values()) == 24
    assert sum(line.paper is not None for line in wrn28_mostafa.LINES.values()) == 31


def test_runs_that_can_be_shared_are():
    def names(table):
        return {row.name: configs.resolve(row.config) for row in TABLES[table].rows}

    name = configs.default_name
    for table in ("cifar10_short", "text_transformer"):
        rows = names(table)
        assert name(configs.base_of(rows["gsm_d0.1_s0"])) == name(rows["dense_s0"])
    tickets, first = names("ticket_gsm"), names("gsm_lenet300")
    for finder, row in (("gsm", "plain_s1"), ("magnitude", "base_s1")):
        found = configs.base_of(tickets[f"lenet-300-100_60x_{finder}_s1"])
        assert name(found) == name(first[row])
    networks = names("gsm_networks")
    for ticket, row in (
        ("resnet-56_10x_gsm_s1", "resnet-56_10x_plain_s1"),
        ("lenet-5-caffe_125x_random_s0", "lenet-5-caffe_125x_plain_s0"),
    ):
        assert name(configs.base_of(tickets[ticket])) == name(networks[row])
    dense = configs.base_of(tickets["resnet-56_10x_magnitude_s0"])
    assert name(dense) == name(configs.base_of(networks["resnet-56_10x_plain_s0"]))
    surgery = configs.base_of(networks["resnet-56_10x_network_surgery_s0"])
    assert name(surgery) == name(dense)


def test_gsm_of_the_short_schedules_can_reach_zero():
    """ln(w_0 / w) of a passive weight, as the pages of the tables say."""
    for table, steps, said in (
        ("cifar10_short", 351, 6),
        ("text_transformer", 183, 10),
    ):
        rows = {row.name: configs.resolve(row.config) for row in TABLES[table].rows}
        run = rows["gsm_d0.1_s0"]
        decay = sparse_optax.gsm_log_decay(
            setup.learning_rate(run, steps),
            run.momentum,
            run.weight_decay,
            steps * run.epochs,
            decoupled=run.optimizer == "adamw",
        )
        np.testing.assert_allclose(decay, said, rtol=0.06)


def test_what_is_not_run_is_listed_with_its_cost(tmp_path):
    finish(TABLES["mnist_lenet5"], tmp_path, lambda row: 1.0)
    page = readme.render(tmp_path)
    done, _, others = page.partition("## Not run yet")
    assert done.count("## ") == 1
    table = TABLES["cifar10_lee"]
    cost = costs.told(costs.together(row.config for row in table.rows))
    line = f"| {table.title} | {len(table.rows)} | {cost} | `sparse-optax reproduce"
    assert line in others
    assert "mnist_lenet5" not in others


# -- comparison --------------------------------------------------------------------


def test_welch_interval_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    ours, paper = rng.normal(1.5, 0.06, 10), rng.normal(1.45, 0.1, 12)
    published = common.Paper(paper.mean(), paper.std(ddof=1) / math.sqrt(12), n=12)
    result = common.compare(list(ours), published)
    expected = stats.ttest_ind(ours, paper, equal_var=False).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high))
    assert result.mean == pytest.approx(ours.mean())
    assert result.se == pytest.approx(stats.sem(ours))


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([1.5, 1.52, 1.54], "matches"),
        ([1.3, 1.32, 1.34], "better"),
        ([1.7, 1.72, 1.74], "worse"),
        ([1.5], ""),
    ],
)
def test_verdict(ours, verdict):
    assert common.compare(ours, common.Paper(1.53, 0.02)).verdict == verdict


def test_no_verdict_without_a_standard_error():
    result = common.compare([1.8, 1.9], common.Paper(1.82))
    assert result.verdict == ""
    assert math.isnan(result.low)


def test_compare_nothing():
    with pytest.raises(ValueError, match="ours is empty"):
        common.compare([], common.Paper(1.0, 0.1))


# -- README ------------------------------------------------------------------------


def page(tmp_path, inside="", name="README.md"):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"# Title\n\n{readme.BEGIN}{inside}{readme.END}\n\nafter\n")
    return path


def written_pages(tmp_path, path):
    """Arguments of ``tables``: `path` gets all of them; the others are beside it."""
    arguments = ["tables", "--page", str(path)]
    for name in ("readme", "choices"):
        arguments += [f"--{name}", str(page(tmp_path, name=f"{name}.md"))]
    for name in readme.METHOD_PAGES:
        page(tmp_path, name=f"methods/{name}.md")
    return [*arguments, "--methods", str(tmp_path / "methods")]


def test_tables_are_written_between_the_markers(tmp_path, capsys):
    path, results = page(tmp_path, "\nold\n"), tmp_path / "results"
    paper = {"dense": 1.34, "0.01": 2.0, "0.02": 1.99, "0.05": 1.8, "0.2": 1.26}
    finish(
        TABLES["mnist_lenet300"],
        results,
        lambda row: paper[row.group] + 0.01 * (row.config.seed - 4.5),
    )
    arguments = [*written_pages(tmp_path, path), "--results", str(results)]
    assert cli.main([*arguments, "--check"]) == 1
    assert "run 'sparse-optax tables'" in capsys.readouterr().err
    assert "old" in path.read_text()

    assert cli.main(arguments) == 0
    text = path.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("\n\nafter\n")
    assert "old" not in text
    text, _, _ = text.partition("## Not run yet")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    verdicts = {line.split(" | ")[0]: line.split(" | ")[-1] for line in lines[2:]}
    assert verdicts == {
        "| dense": "matches |",
        "| 1%": "better |",
        "| 2%": "matches |",
        "| 5%": "worse |",
        "| 20%": "matches |",
    }
    assert "1.34 ± 0.010 (10)" in text

    assert cli.main([*arguments, "--check"]) == 0
    before = path.stat().st_mtime_ns
    assert cli.main(arguments) == 0
    assert path.stat().st_mtime_ns == before


def test_no_page_is_written_where_one_is_missing(tmp_path, capsys):
    path = page(tmp_path, "\nold\n")
    arguments = [*written_pages(tmp_path, path), "--choices", str(tmp_path / "no.md")]
    assert cli.main([*arguments, "--results", str(tmp_path)]) == 1
    assert "no.md does not exist" in capsys.readouterr().err
    assert "old" in path.read_text()


def of_methods(errors):
    """Records of the table of all methods: ``{group: errors, one a seed}``."""
    return {
        row.name: record(row.name, errors[row.group][row.config.seed])
        for row in TABLES["methods_lenet300"].rows
        if row.config.seed < len(errors.get(row.group, ()))
    }


def test_reduction_is_against_the_best_other_method():
    made = of_methods(
        {
            "sparse_momentum 0.05": [1.4, 1.5, 1.6],
            "ham 0.05": [1.0, 1.0, 1.0],  # holds sparse momentum: no other method
            "rigl 0.05": [1.9, 2.0, 2.1],
            "static 0.05": [3.0, 3.0, 3.0],
            "snip 0.05": [1.0, 1.0],  # two runs may be lucky ones
        }
    )
    best, share, spread = methods_lenet300.reduction(
        made, ["static", "rigl", "snip"], 0.05
    )
    assert best == "rigl"
    assert share == pytest.approx(1 - 1.5 / 2.0)
    # Both have a standard error of 0.1 / sqrt(3).
    se = 0.1 / 3**0.5
    assert spread == pytest.approx(0.75 * ((se / 1.5) ** 2 + (se / 2) ** 2) ** 0.5)
    assert methods_lenet300.reduction(made, ["ham"], 0.05) is None
    text = methods_lenet300.render(made)
    assert "| masks that move | - | - | +25.0 ± 3.6 (RigL) | - |" in text


def test_pages_show_their_own_rows(tmp_path, monkeypatch):
    """The README has an excerpt, and the page of a method its row and the dense one."""
    errors = {"dense": [1.3] * 3, "rigl 0.05": [1.5, 1.6, 1.7], "ac_dc 0.05": [1.4] * 3}
    made = of_methods(errors | {"static 0.05": [3.0] * 3})
    monkeypatch.setattr(readme, "read_table", lambda table, results: made)

    def cells(text):
        rows = [line.split(" | ") for line in text.splitlines()[2:]]
        return {row[0].removeprefix("| "): row[3] for row in rows}

    assert cells(readme.method("rigl")(tmp_path)) == {
        "dense, all weights": "1.30 ± 0.000 (3)",
        "RigL": "1.60 ± 0.058 (3)",
    }
    excerpt = cells(readme.excerpt(tmp_path))
    assert excerpt["static random"] == "3.00 ± 0.000 (3)"
    assert len(excerpt) == 1 + len(readme.EXCERPT)
    assert "AC/DC" not in excerpt
    assert "| AC/DC |" in methods_lenet300.render(made)


def test_choices_name_what_cannot_be_told_from_the_best():
    made = of_methods(
        {
            "rigl 0.05": [1.4, 1.5, 1.6],
            "sparse_momentum 0.05": [1.45, 1.55, 1.65],
            "dynamic_sparse 0.05": [2.4, 2.5, 2.6],
            "sparse_evolutionary 0.05": [1.0, 1.2],  # two runs say little
            # Broken down, each above each: no wide interval makes it a tie.
            "static 0.05": [3.0, 20.0, 60.0],
            "snip 0.05": [2.0, 2.1, 2.2],
            # Its lowest is not above their highest.
            "synflow 0.05": [2.1, 2.4, 2.5],
        }
    )
    lines = methods_lenet300.choices(made).splitlines()
    assert lines[2].endswith("| - | - | **RigL** 1.50; sparse momentum | - |")
    assert lines[3].endswith("| - | - | **SNIP** 2.10; SynFlow | - |")


def test_dead_units_are_shown_by_the_rule_of_growth():
    made = {}
    for seed, dead in enumerate((10, 20)):
        one = record(f"momentum_random_s{seed}", 1.5)
        one.results.update(
            dead_units={"fc1": dead, "fc2": 3},
            removed_units={"fc1": dead - 1, "fc2": 1},
            kept=13_310,
            wasted_weights=30 + dead,
        )
        made[one.name] = one
    made["d0.05_s0"] = record("d0.05_s0", 1.5)  # of a time when they were not counted
    text = TABLES["ablation_lenet300"].render(made)
    cells = ["15.0 ± 5.00 (2)", "14.0 ± 5.00 (2)", "3.0 ± 0.00 (2)", "1.0 ± 0.00 (2)"]
    assert f"| random | {' | '.join(cells)} | 45.0 ± 5.00 (2) |" in text
    assert "| momentum | - | - | - | - | - |" in text


def test_half_a_table_says_what_is_missing(tmp_path):
    table = TABLES["mnist_lenet300"]
    text = table.render({"d0.05_s0": record("d0.05_s0", 1.5)})
    assert "| 5% | 5 | 1.50 (1) |" in text
    assert text.count("not run yet") == 4


def test_gsm_table_shows_the_three_errors(tmp_path):
    table = TABLES["gsm_lenet300"]
    made = {
        f"{variant}_s{seed}": record(
            error=1.9 + 0.02 * seed,
            test_error_before_cut=1.8,
            gap={"alive": 60, "kept": 50, "ratio": 0.9},
            base={"results": {"test_error": 1.7}},
        )
        for variant in ("plain", "gate")
        for seed in (0, 1)
    }
    text = table.render(made)
    line = next(line for line in text.splitlines() if "as in the paper" in line)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[2:5] == ["1.70 ± 0.000 (2)", "1.80 ± 0.000 (2)", "1.91 ± 0.010 (2)"]
    assert cells[6] == "1.20 ± 0.000 (2)"


def altered(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def nothing(content):
    content["config"] = {}


def other_seed(content):
    content["config"]["seed"] += 1


def other_name(content):
    content["name"] = "another"


def with_base(content):
    content["base"] = {"config": content["config"], "results": content["results"]}


def null(content):
    content["results"]["test_error"] = None


def null_kept(content):
    content["results"]["kept"] = None


def no_weights(content):
    del content["results"]["weights"]


def text(content):
    content["results"] = "1.5"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nothing, "other values of ['dataset', 'model', 'method'"),
        (other_seed, "other values of ['seed']"),
        (other_name, "other values of ['name']"),
        (with_base, "other values of ['base']"),
        (null, "its results.test_error is None"),
        (null_kept, "its results.kept is None"),
        (no_weights, "no number for ['weights']"),
        (text, "its results is '1.5'"),
    ],
)
def test_a_record_is_compared_with_its_row(tmp_path, capsys, change, words):
    """One row, or a copy of its neighbour, and no table is written."""
    table, path = TABLES["mnist_lenet300"], page(tmp_path, "\nold\n")
    finish(table, tmp_path, lambda row: 1.5)
    arguments = [*written_pages(tmp_path, path), "--results", str(tmp_path)]
    changed = tmp_path / table.name / "d0.05_s1.json"
    altered(changed, change)
    assert cli.main(arguments) == 1
    line = capsys.readouterr().err
    assert f"{changed} " in line
    assert words in line
    assert "old" in path.read_text()


def test_a_copied_record_is_no_other_seed(tmp_path, capsys):
    table = TABLES["mnist_lenet300"]
    finish(table, tmp_path, lambda row: 1.5)
    folder = tmp_path / table.name
    (folder / "d0.05_s1.json").write_bytes((folder / "d0.05_s0.json").read_bytes())
    arguments = ["reproduce", table.name, f"--results={tmp_path}"]
    assert cli.main(arguments) == 1
    assert "d0.05_s1.json was made with other values" in capsys.readouterr().err
    (folder / "d0.05_s1.json").unlink()
    (folder / "d0.05_s1.json").mkdir()
    assert cli.main(arguments) == 1
    assert "d0.05_s1.json is not a results record" in capsys.readouterr().err
    # What is no row of the table is nobody's business.
    (folder / "d0.05_s1.json").rmdir()
    (folder / "x.json").mkdir()
    assert len(readme.read_table(table, tmp_path)) == len(table.rows) - 1


def test_records_of_the_repository_are_those_of_their_rows():
    """Also those that were made before some values of a run existed."""
    results = Path(__file__).parents[1] / "results"
    if not results.is_dir():
        pytest.skip("no records beside these tests")
    for table in TABLES.values():
        folder = results / table.name
        own = [row.name for row in table.rows if row.table is None]
        there = {path.stem for path in folder.glob("*.json")}
        left = {row.name for row in reproduce.missing(table, results)}
        assert there == set(own) - left


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        f"{readme.END}{readme.END}",
        f"{readme.END}\n{readme.BEGIN}",
        f"{readme.BEGIN}{readme.END}{readme.BEGIN}",
    ],
)
def test_readme_without_markers(tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="must hold the lines"):
        readme.update(path, tmp_path)
    assert path.read_text() == text


def test_records_have_one_line_a_field(tmp_path):
    path = tmp_path / "run.json"
    records.write(path, record(error=float("nan")))
    assert json.loads(path.read_text())["results"]["test_error"] is None
    assert len(path.read_text().splitlines()) == 2 + 16 + 3


def test_command_without_the_packages_of_its_extra():
    """One line that says what to install, and no traceback."""
    code = (
        "import sys; sys.modules['tyro'] = None; sys.argv[1:] = ['--help']; "
        "from sparse_optax.experiments.command import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "'tyro'" in done.stderr
    assert 'pip install "sparse_optax[experiments]"' in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_command_is_the_entry_point():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    scripts = tomllib.loads(text)["project"]["scripts"]
    assert scripts == {"sparse-optax": "sparse_optax_command:main"}
    installed = importlib.util.find_spec("sparse_optax_command")
    assert installed is not None, "install again: pip install -e ."
    source = Path(train.__file__).with_name("command.py")
    assert Path(installed.origin).read_text() == source.read_text()


# -- progress ----------------------------------------------------------------------


def quick(tmp_path, *words):
    """A command that trains for a moment."""
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    return ["train", *words, *folders]


def test_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    assert cli.main(quick(tmp_path, "--no-dense", "--epochs", "20")) == 0
    printed = capsys.readouterr().out
    lines = [x for x in printed.splitlines() if re.match(r"\d+:\d\d ", x)]
    texts = [line.partition(" ")[2] for line in lines]
    assert texts[0] == "20 epochs to train: sparse_momentum"
    for i, word in enumerate(("loading digits", "preparing the method", "compiling")):
        assert texts[1 + i] == f"sparse_momentum: {word}"
    assert texts[4] == "sparse_momentum: epoch 1 of 20, 40 steps"
    epochs = [int(re.search(r"epoch (\d+) of 20, test", x)[1]) for x in texts[5:]]
    assert {1, *range(2, 21, 2)} <= set(epochs)
    assert "\x1b" not in printed
    assert "\r" not in printed


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_steps_and_epochs_do_not_flood_a_file(monkeypatch):
    clock, out = Clock(monkeypatch), io.StringIO()
    display = progress.Display(rich.console.Console(file=out), 100.0)
    with display:
        display.on_activity(train.Activity("rigl", "compiling"))
        for step in range(1, 401):
            clock.now += 0.25
            display.on_activity(train.Activity("rigl", f"step {step} of 400", True))
        for epoch in range(1, 1001):
            clock.now += 0.125
            done = train.Progress("rigl", epoch, 1000, {"test_error": 2.0})
            display.on_epoch(done)
    lines = out.getvalue().splitlines()
    # Each half minute of the steps; then the first epoch and each tenth of them.
    assert lines[:3] == [
        "0:00 rigl: compiling",
        "0:30 rigl: epoch 1, step 120 of 400",
        "1:00 rigl: epoch 1, step 240 of 400",
    ]
    assert lines[3].startswith("1:30 ")
    assert lines[4] == "1:40 rigl: epoch 1 of 1000, test error 2.00%"
    numbers = [int(line.split("epoch ")[1].split()[0]) for line in lines[5:]]
    assert numbers == list(range(100, 1001, 100))


def test_bars_in_a_terminal():
    out = io.StringIO()
    console = rich.console.Console(file=out, force_terminal=True, width=100)
    with progress.Display(console, progress.time.monotonic()) as display:
        display.line("60 epochs of dense, then 40 epochs of magnitude")
        display.on_activity(train.Activity("magnitude", "loading digits"))
        display.on_activity(train.Activity("base", "compiling"))
        display.on_activity(train.Activity("base", "going on after epoch 2 of 4"))
        display.on_epoch(train.Progress("base", 4, 4, {"test_error": 7.5}))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "0:00 60 epochs of dense, then 40" in shown
    assert "after base" in shown
    assert re.search(r"base .*4/4 .*test error 7.50%", shown)
    assert "base: going on after epoch 2 of 4" in shown


def test_quiet_shows_nothing():
    out = io.StringIO()
    with progress.Display(rich.console.Console(file=out), 0.0, quiet=True) as display:
        display.line("x")
        display.on_activity(train.Activity("rigl", "compiling"))
        display.on_epoch(train.Progress("rigl", 1, 1, {"test_error": 1.0}))
    assert out.getvalue() == ""
    assert display.trained


def test_a_run_that_goes_on_says_so(tmp_path, monkeypatch, capsys):
    words = ["--no-dense", "--epochs", "4", "--checkpoint-every", "1"]
    show = progress.Display.on_epoch

    def stop(display, done):
        show(display, done)
        if done.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(progress.Display, "on_epoch", stop)
        assert cli.main(quick(tmp_path, *words)) == 130
    assert "stopped after epoch 2 of 4; the same command" in capsys.readouterr().err
    assert cli.main(quick(tmp_path, *words)) == 0
    printed = capsys.readouterr().out
    assert "sparse_momentum: going on after epoch 2 of 4\n" in printed
    assert "epoch 3 of 4, 40 steps" in printed


def test_two_stages_say_how_many_epochs_there_are(tmp_path, capsys):
    words = ["--no-dense", "--method", "magnitude", "--epochs", "2", "--drop-epochs"]
    words = [*words, "1", "--base.epochs", "3"]
    assert cli.main(quick(tmp_path, *words)) == 0
    told = "3 epochs of dense, then 2 epochs of magnitude: 5 epochs to train\n"
    assert told in capsys.readouterr().out
    # Another density starts from the same base.
    assert cli.main(quick(tmp_path, *words, "--density", "10%")) == 0
    told = "3 epochs of dense (there already), then 2 epochs of magnitude: 2 epochs"
    printed = capsys.readouterr().out
    assert told in printed
    assert "base:" not in printed
    assert cli.main(quick(tmp_path, *words)) == 0
    told = "2 epochs of magnitude (there already): nothing to train"
    assert told in capsys.readouterr().out


def test_the_dense_network_is_named_beside_it(tmp_path, capsys):
    """Trained once, with the same epochs and seed; then read."""
    words = ["--method", "static", "--density", "4%", "--epochs", "2", "--seed", "3"]
    assert cli.main(quick(tmp_path, *words)) == 0
    printed = capsys.readouterr().out
    assert "dense: epoch 2 of 2" in printed
    (path,) = tmp_path.glob("runs/*-dense-*/record.json")
    dense = records.read(path)
    assert (dense.config["seed"], dense.config["epochs"]) == (3, 2)
    (path,) = (tmp_path / "results").glob("*.json")
    ours = records.read(path).results["test_error"]
    theirs = dense.results["test_error"]
    line = f"dense {theirs:.2f}%, yours {ours:.2f}% with 4% of the weights (25 times f"
    assert line in printed
    # What its record says makes the same run.
    assert cli.main([*dense.command.split()[1:], *quick(tmp_path)[1:]]) == 0
    assert "there already" in capsys.readouterr().out
    other = ["--method", "static", "--density", "5%", *words[4:]]
    assert cli.main(quick(tmp_path, *other)) == 0
    printed = capsys.readouterr().out
    assert "dense: epoch" not in printed
    assert f"dense {theirs:.2f}%, yours" in printed


def test_without_a_dense_record_the_command_for_one_is_named(tmp_path, capsys):
    words = ["--method", "static", "--epochs", "1", "--seed", "2"]
    words += ["--dtype", "bfloat16"]
    assert cli.main(quick(tmp_path, "--no-dense", *words)) == 0
    (line,) = (
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("beside all weights")
    )
    assert not list(tmp_path.glob("runs/*-dense-*"))
    # It trains the network that the run is judged by.
    flags = line.partition("not known: train ")[2].split()
    assert cli.main(quick(tmp_path, *flags)) == 0
    capsys.readouterr()
    assert cli.main(quick(tmp_path, "--no-dense", *words)) == 0
    assert re.search(r"beside all weights +dense \d", capsys.readouterr().out)


def test_a_dense_record_of_a_table_is_found(tmp_path):
    """Also one that lacks values which came later, and no other one."""
    wanted = configs.dense_of(configs.resolve(configs.TrainConfig(dataset="mnist")))
    values = configs.as_dict(wanted)
    del values["grow"]
    path = tmp_path / "mnist_lenet300" / "dense_s0.json"
    records.write(path, record("dense_s0", 1.4, values))
    where = (tmp_path / "runs", tmp_path / "train")
    assert compare.find_dense(wanted, *where).results["test_error"] == 1.4
    other = dataclasses.replace(wanted, seed=1)
    assert compare.find_dense(other, *where) is None
    path.write_text("no record")
    assert compare.find_dense(wanted, *where) is None


def test_the_dense_run_beside_a_run():
    def dense(**values):
        return configs.dense_of(configs.resolve(configs.TrainConfig(**values)))

    plain = configs.resolve(configs.TrainConfig(method="dense"))
    for method in recipes.METHODS:
        density = {"thin": 0.05, "dense": 1.0}.get(method, 0.3)
        own = {
            name: value
            for name, value in {"gate": 0.2, "l1": 0.5, "prune_rate": 0.1}.items()
            if method in recipes.READ_BY[name]
        }
        found = dense(method=method, density=density, **own)
        assert found == plain, method
    drops = dense(drop_steps=(50, 60), learning_rate=0.5, shares="linear")
    wanted = configs.TrainConfig(method="dense", drop_steps=(50, 60), learning_rate=0.5)
    assert drops == configs.resolve(wanted)


def test_something_is_shown_before_the_libraries_are_loaded(tmp_path):
    """The first line of a process, and a version without the libraries."""
    # What the installed script does.
    code = (
        "import sys; sys.modules['jax'] = None; sys.argv[0] = 'sparse-optax'\n"
        "from sparse_optax_command import main; sys.exit(main())"
    )

    def run(*words):
        return subprocess.run(
            [sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            check=False,
        )

    done = run("train")
    assert done.stdout == "0:00 loading the libraries\n"
    assert done.returncode == 1
    assert "needs the package 'jax'" in done.stderr
    for words in (["train", "--quiet"], ["train", "--help"], ["compare"]):
        assert run(*words).stdout == ""
    done = run("--version")
    assert re.fullmatch(r"sparse-optax \d+\.\d+\.\d+\S*\n", done.stdout)
    assert done.returncode == 0


# -- names -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("set", "sparse_evolutionary"),
        ("snfs", "sparse_momentum"),
        ("gmp", "gradual_magnitude"),
        ("dns", "network_surgery"),
        ("obd", "optimal_brain_damage"),
        ("DEEP-R", "deep_rewiring"),
        ("sparse_momentum_regrow", "sparse_momentum"),
        ("rigl", "rigl"),
    ],
)
def test_methods_have_common_names(tmp_path, monkeypatch, name, method):
    seen = []

    def stop(config, **_):
        seen.append(config.method)
        raise ValueError("would train")

    monkeypatch.setattr(train, "train", stop)
    assert cli.main(quick(tmp_path, "--method", name)) == 1
    assert seen == [method]
    assert configs.resolve(configs.TrainConfig(method=name)).method == method


def test_names_of_methods_are_those_of_functions():
    """Each is a function of the library, by its own name or by the one listed."""
    import sparse_optax

    without = {"dense", "thin", "ticket", "l2"}
    for name in set(recipes.METHODS) - without:
        function = recipes.FUNCTIONS.get(name, name)
        found = getattr(sparse_optax, function, None)
        assert found or getattr(sparse_optax.masks, function), name
        assert recipes.method_named(function) == name
    common = [x for names in recipes.COMMON_NAMES.values() for x in names]
    assert len(set(common)) == len(common)
    assert not set(common) & set(recipes.METHODS)


@pytest.mark.parametrize("dataset", data.NAMES)
def test_methods_are_listed_for_every_data_set(dataset, capsys):
    assert cli.main(["methods", "--dataset", dataset]) == 0
    printed = capsys.readouterr().out
    listed = {name for name in recipes.METHODS if f"\n{name} " in printed}
    # There is no thin network for text.
    without = {"thin"} if dataset == "topics" else set()
    assert recipes.METHODS.keys() - listed == without


@pytest.mark.parametrize("dataset", ["digits", "mnist"])
def test_methods_are_listed_with_their_defaults(dataset, capsys):
    assert cli.main(["methods", "--dataset", dataset]) == 0
    printed = capsys.readouterr().out
    for name in recipes.METHODS:
        assert f"\n{name} " in printed
    assert "Also called set." in printed
    lines = {x.split()[0]: x.split()[1:] for x in printed.splitlines() if x.strip()}
    epochs = ["60", "+", "40"] if dataset == "digits" else ["46", "+", "54"]
    assert lines["network_surgery"] == ["uniform", *epochs, "0.01"]


# -- compare and report ------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folders of runs: of sparse momentum, of GSM, and the dense one beside them."""
    folder = tmp_path_factory.mktemp("finished")
    short = ["--epochs", "4"]
    gsm = ["--method", "gsm", "--density", "10%", *short, "--drop-epochs", "3"]
    gsm += ["--base.epochs", "2", "--base.drop-epochs", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(quick(folder, *short)) == 0
        assert cli.main(quick(folder, *gsm, "--no-dense")) == 0
    return folder


def of(folder, method):
    return next(folder.glob(f"runs/*-{method}-*"))


def test_compare_prints_a_table_and_draws_a_plot(finished, tmp_path, capsys):
    (record_path,) = finished.glob("results/*-gsm-*.json")
    plot = tmp_path / "compare.png"
    paths = [str(of(finished, "sparse_momentum")), str(record_path)]
    assert cli.main(["compare", *paths, "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    ours, theirs = (compare.read(path) for path in paths)
    rows = [line.split() for line in printed.splitlines() if "%" in line]
    error = f"{ours.results['test_error']:.2f}%"
    assert rows[0][:7] == ["sparse", "momentum", "5%", error, "2,510", "5%", "20"]
    assert rows[0][8] == f"{ours.results['file_bytes']:,}"
    assert rows[1][:3] == ["gsm", "10%", f"{theirs.results['test_error']:.2f}%"]
    assert "2 + 4" in printed
    assert plot.read_bytes().startswith(PNG)


def test_the_plot_holds_every_run(finished):
    found = [compare.read(of(finished, m)) for m in ("sparse_momentum", "dense")]
    named = dict(zip(compare.labels(found), found, strict=True))
    left, right = plots.comparison(named).axes
    shown = {line.get_label(): line.get_ydata() for line in left.lines}
    assert list(shown["sparse momentum 5%"]) == found[0].history["test_error"]
    assert "dense" in shown
    layers = {line.get_label(): line.get_ydata() for line in right.lines}
    assert list(layers["dense"]) == [100, 100, 100]


def test_the_named_command_of_a_dense_run_gives_that_run(tmp_path):
    """Its flags are read back as they were, also those that are True or False."""
    values = {"method": "rigl", "nesterov": False, "epochs": 3, "drop_epochs": (1, 2)}
    dense = configs.dense_of(configs.resolve(configs.TrainConfig(**values)))
    flags = cli._flags_of_dense(dense)
    assert "--no-nesterov" in flags.split()
    runs = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert cli.main(["train", *flags.split(), *runs]) == 0
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert folder.name == configs.default_name(dense)


def test_runs_are_named_by_all_that_tells_them_apart(finished):
    one = compare.read(of(finished, "sparse_momentum"))

    def named(*changes):
        found = [
            dataclasses.replace(one, config=one.config | change) for change in changes
        ]
        return [x.removeprefix("sparse momentum 5%") for x in compare.labels(found)]

    assert named({}, {"weight_decay": 0.5})[1] == ", weight_decay 0.5"
    assert named({"seed": 1}, {"momentum": 0.5, "seed": 2}) == [", seed 1", ", seed 2"]
    # Errors on two data sets do not compare, whatever else the names say.
    other = named({"density": 0.5}, {"dataset": "mnist"})
    assert other == ["sparse momentum 50%, digits", ", mnist"]
    assert named({}, {}) == [" (#1)", " (#2)"]


def damaged(rng, content):
    """A record with one change: of a bit, of a value, of a name, or without its end."""
    kind = rng.integers(4)
    if kind < 2:
        place, changed = int(rng.integers(len(content))), bytearray(content)
        if kind == 0:
            changed[place] ^= 1 << int(rng.integers(7))
        else:
            del changed[place:]
        return bytes(changed)
    whole = json.loads(content)
    node = whole
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = keys[rng.integers(len(keys))]
        inner = node[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            node = inner
            continue
        odd = [None, "x", -1, 0, 1.5, [], {}, True, [None], {"a": 1}, 10**400]
        if kind == 2 or isinstance(node, list):
            node[key] = odd[rng.integers(len(odd))]
        else:
            node.pop(key)
        return json.dumps(whole).encode()


@pytest.mark.parametrize(
    "number",
    [pytest.param(20, id="some"), pytest.param(600, id="many", marks=pytest.mark.fuzz)],
)
def test_a_damaged_record_ends_in_no_traceback(
    finished, tmp_path, monkeypatch, capsys, number, figures
):
    """It is shown as it stands, or one line names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    table = TABLES["mnist_lenet300"]
    finish(table, tmp_path, lambda row: 1.5)
    rows = sorted((tmp_path / table.name).iterdir())
    runs = sorted(finished.glob("results/*.json"))
    refused = 0
    for case in range(number):
        rng = np.random.default_rng(case)
        command = ["compare", "report", "reproduce"][case % 3]
        if command == "reproduce":
            path = rows[rng.integers(len(rows))]
            words = [command, table.name, f"--results={tmp_path}"]
        else:
            source = runs[rng.integers(len(runs))]
            path = tmp_path / source.name
            path.write_bytes(source.read_bytes())
            words = [command, str(path), str(runs[0])]
        content = path.read_bytes()
        path.write_bytes(damaged(rng, content))
        try:
            status = cli.main(words)
        except BaseException as error:
            error.add_note(f"case {case}: {command} {path.read_bytes()!r:.2000}")
            raise
        printed = capsys.readouterr()
        if status:
            (line,) = printed.err.splitlines()
            assert str(path) in line, case
            refused += 1
        path.write_bytes(content)
    assert 0 < refused < number
    figures["damaged records, to compare, report and reproduce"] += number


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "compare: no RECORD is given"),
        (
            ["compare", "nowhere"],
            "nowhere must be a record or the folder of a",
        ),
        (["report"], "report: no RUN is given"),
        (["report", "."], ". must be a record or the folder"),
        (["compare", "x.json"], "x.json is not a results record"),
    ],
)
def test_what_cannot_be_compared(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("x.json").write_text("{}")
    assert cli.main(words) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.parametrize("command", ["compare", "report"])
def test_runs_that_have_not_finished_are_left_out(
    finished, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "lock").touch()
    assert cli.main([command, str(begun), str(of(finished, "dense"))]) == 0
    assert "begun has not finished and is left out" in capsys.readouterr().err
    assert cli.main([command, str(begun)]) == 1
    assert (
        "begun must be a record or the folder of a finished" in capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_run_folder_that_was_altered_is_not_shown(
    finished, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    shutil.copytree(of(finished, "dense"), folder)
    path = folder / "record.json"
    changed = path.read_text().replace('"test_error": ', '"test_error": 1')
    path.write_text(changed)
    assert cli.main([command, str(folder)]) == 1
    assert (
        "record.json of a finished run is missing or damaged" in capsys.readouterr().err
    )


def test_cycles_that_were_left_out_are_told(capsys):
    made = record()
    cli._print_record(made, None, "")
    assert "cycles left out" not in capsys.readouterr().out
    made.results["skipped_cycles"] = 3
    cli._print_record(made, None, "")
    assert "cycles left out       3" in capsys.readouterr().out


def test_a_report_is_one_page_that_needs_nothing_else(finished, tmp_path, capsys):
    path = tmp_path / "page.html"
    runs = [str(of(finished, m)) for m in ("sparse_momentum", "gsm")]
    words = ["--page", str(path), "--results", str(finished / "results")]
    assert cli.main(["report", *runs, *words]) == 0
    text = path.read_text()
    assert str(path) in capsys.readouterr().out
    assert not re.search(r"https?://|<script|<link|url\(", text)
    sources = re.findall(r'src="([^"]{30})', text)
    assert all(x.startswith("data:image/svg+xml;base64,") for x in sources)
    captions = re.findall(r"<figcaption>([^<]*)", text)
    counts = {caption.split()[0]: captions.count(caption) for caption in captions}
    # The overview; errors and masks of both; densities and moves of one, decay of one.
    assert len(captions) == 1 + 2 + 1 + 1 + 1 + 4, counts
    ours = compare.read(runs[0])
    assert f"yours {ours.results['test_error']:.2f}% with 5% of the weights" in text
    for layer in ours.layers:
        assert f"<td>{layer['name']}</td>" in text
        assert f"<td>{layer['kept']:,}</td>" in text


def test_a_report_of_a_record_without_its_run(finished, tmp_path, monkeypatch):
    """No masks, and nothing is made up."""
    monkeypatch.chdir(tmp_path)
    (path,) = finished.glob("results/*-gsm-*.json")
    assert cli.main(["report", str(path)]) == 0
    text = Path("report.html").read_text()
    assert "First layer" not in text
    assert "gsm" in text


def test_a_page_escapes_what_it_is_given():
    made = record(config={"method": "<b>", "dataset": "d", "model": "m"})
    made = dataclasses.replace(made, command="<i>&")
    text = pages.render([pages.Run(made)])
    assert "<b>" not in text
    assert "&lt;i&gt;&amp;" in text


def test_the_first_mask_is_that_of_the_weights(finished):
    folder = of(finished, "sparse_momentum")
    made = compare.read(folder)
    mask = pages.first_mask(folder, made)
    assert mask.shape == (64, 300)
    assert mask.sum() == made.layers[0]["kept"]
    assert pages.first_mask(finished, made) is None
