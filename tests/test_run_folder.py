"""The folder of a run under kills, damaged files, a full disk and Ctrl-C.

The train loop is the real one; what it would compile is replaced by a few additions,
so that a run takes milliseconds and can be killed at every file operation.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import pathlib
import re
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from sparse_optax.experiments import checkpoints, data, models, records, train
from sparse_optax.experiments import config as configs
from sparse_optax.export import file

EPOCHS = 4
RUN = configs.TrainConfig(method="dense", epochs=EPOCHS, drop_epochs=())
# A method after a base: two folders.
TWO = configs.TrainConfig(
    method="magnitude",
    density=0.5,
    epochs=2,
    drop_epochs=(),
    base=configs.Base(epochs=2, drop_epochs=()),
)
# Kills in the default run; with the mark `fuzz` at every operation.
EVERY = [pytest.param(5, id="some"), pytest.param(1, id="all", marks=pytest.mark.fuzz)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs of a tiny network, whose epoch adds what key and epoch say."""
    x, y = np.zeros((64, 2, 2, 1), np.float32), np.zeros(64, np.int32)
    monkeypatch.setattr(
        data, "load", lambda *_, **__: data.Dataset(x, y, x, y, x, y, 2, "none")
    )

    def create(name, in_shape, classes, *, key, init, dtype):
        del name, in_shape, classes, init, dtype
        kernel = jax.random.normal(key, (4, 3))
        params = {"fc1": {"bias": jnp.zeros(3), "kernel": kernel}}
        return (lambda params, stats, x, **_: (x, stats)), params, {}

    def epoch_function(run, state):
        del run, state

        def epoch(state, key):
            moved = jax.tree.map(
                lambda x: x + 1 if x.dtype == bool else x + jax.random.key_data(key)[1],
                state[0],
            )
            return (moved, *state[1:]), jnp.float32(0.5)

        return epoch

    monkeypatch.setattr(models, "create_stateful", create)
    monkeypatch.setattr(train._Run, "_epoch_function", epoch_function)
    monkeypatch.setattr(
        train._Run,
        "_evaluator",
        lambda run: lambda params, stats: {"valid_error": 1.0, "test_error": 1.0},
    )


def command(folder, run=RUN, **options):
    """The command of a user; gives the epochs that it trained."""
    epochs = []
    options = {"on_note": lambda line: pytest.fail(line), **options}
    trained = train.train(
        run,
        runs=folder / "runs",
        record_path=folder / "results" / "run.json",
        checkpoint_every=1,
        on_epoch=lambda progress: epochs.append((progress.stage, progress.epoch)),
        command="command",
        **options,
    )
    return trained, epochs


def left(folder):
    """What a folder holds in the end, by path; of records what is not measured."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.name in ("run.json", "record.json"):
            record = records.read(path)
            kept = ("name", "command", "config", "seed", "results", "layers", "base")
            found[name] = {k: getattr(record, k) for k in kept}
        elif path.name == "checksums.json":
            found[name] = None  # of a record with times
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {k: arrays[k].tobytes() for k in arrays.files}
        else:
            found[name] = path.is_dir() or path.read_bytes()
    return found


def half_written(names):
    """Records that were begun: they have names of their own, which no reader takes."""
    return {name for name in names if re.fullmatch(r"results/\.[^/]+\.tmp", name)}


# --- kills ----------------------------------------------------------------------------
class Killed(BaseException):
    """A kill -9: nothing that the program does afterwards reaches the disk."""


class Disk:
    """Stops the program at the n-th operation that changes a file or folder."""

    EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

    def __init__(self):
        self.allowed, self.done, self.folder = None, 0, ""
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.allowed is None:
            return
        if event == "open":
            path, _, flags = arguments
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
            if not isinstance(path, str) or not (flags or 0) & writes:
                return
        elif event not in self.EVENTS:
            return
        # Names without a folder are those of rmtree, inside an open one.
        path = os.fspath(arguments[0])
        if os.path.isabs(path) and not path.startswith(self.folder):
            return
        if self.done >= self.allowed:
            raise Killed(f"before {event} of {path}")
        self.done += 1

    def run(self, allowed, folder, function, **options):
        """Whether the function came to its end."""
        self.allowed, self.done, self.folder = allowed, 0, str(folder)
        try:
            function(folder, **options)
        except Killed:
            return False
        finally:
            self.allowed = None
        return True


@pytest.fixture(scope="module")
def disk():
    return Disk()


@pytest.mark.parametrize("every", EVERY)
@pytest.mark.parametrize("run", [RUN, TWO], ids=["one", "two"])
def test_a_run_killed_at_any_file_operation_ends_the_same(
    tmp_path, disk, run, every, figures
):
    """The same command again gives the record, the weights and nothing besides."""
    command(tmp_path / "unbroken", run)
    expected = left(tmp_path / "unbroken")
    for allowed in itertools.count(every - 1, every):
        folder = tmp_path / str(allowed)
        finished = disk.run(allowed, folder, command, run=run)
        command(folder, run)
        found = left(folder)
        half = half_written(found)
        assert len(half) <= 1
        assert {n: x for n, x in found.items() if n not in half} == expected, allowed
        if finished:
            break
        figures["runs killed at a file operation, then begun again"] += 1
    assert allowed > 20


@pytest.mark.fuzz
def test_a_run_killed_again_and_again_ends_the_same(tmp_path, disk, figures):
    rng = np.random.default_rng(0)
    command(tmp_path / "unbroken", TWO)
    expected = left(tmp_path / "unbroken")
    for number in range(20):
        folder, kills = tmp_path / str(number), 0
        while not disk.run(int(rng.integers(3, 30)), folder, command, run=TWO):
            kills += 1
            assert kills < 100
        figures["runs killed at a file operation, then begun again"] += kills
        found = left(folder)
        assert expected.items() <= found.items()
        assert found.keys() - expected == half_written(found)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, epochs = command(tmp_path)
    assert epochs == [("dense", n + 1) for n in range(EPOCHS)]
    # As after a kill before the record was written and while checkpoints were deleted.
    (tmp_path / "results" / "run.json").unlink()
    folder = tmp_path / "runs" / configs.default_name(configs.resolve(RUN))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "3.ckpt").write_bytes(b"half of it")
    again, epochs = command(tmp_path)
    assert epochs == []
    assert again.record == first.record
    assert not (folder / "checkpoints").exists()
    assert records.read(tmp_path / "results" / "run.json") == first.record
    _, epochs = command(tmp_path, fresh=True)
    assert len(epochs) == EPOCHS


# --- damaged files --------------------------------------------------------------------
STATE = {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(7), "m": jnp.ones(3, bool)}


def saved(tmp_path):
    """A folder with the checkpoints of epochs 2 and 3."""
    folder = checkpoints.RunFolder(tmp_path)
    for epoch in (1, 2, 3):
        state = {**STATE, "w": STATE["w"] + epoch}
        folder.save(epoch, state, {"epochs": [{"test_error": 1.0}] * epoch})
    paths = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in paths] == ["2.ckpt", "3.ckpt"]
    return folder, *paths


def damages(content, every):
    """Every truncation of a file and every change of one bit of it."""
    for length in range(0, len(content), every):
        yield content[:length]
    for bit in range(0, 8 * len(content), every):
        byte, place = divmod(bit, 8)
        changed = bytes([content[byte] ^ 1 << place])
        yield content[:byte] + changed + content[byte + 1 :]


def restored(folder, notes):
    epoch, state, history = folder.restore(STATE, notes.append)
    assert len(history["epochs"]) == epoch
    np.testing.assert_array_equal(state["w"], STATE["w"] + epoch)
    assert (int(state["n"]), state["m"].dtype) == (7, bool)
    return epoch


@pytest.mark.parametrize(
    "every",
    [pytest.param(41, id="some"), pytest.param(1, id="all", marks=pytest.mark.fuzz)],
)
def test_of_a_damaged_checkpoint_nothing_is_read(tmp_path, every, figures):
    """The older one is used, and one line says so; without it an error does."""
    folder, older, newest = saved(tmp_path)
    notes = []
    assert restored(folder, notes) == 3
    assert notes == []
    content = newest.read_bytes()
    for damaged in damages(content, every):
        newest.write_bytes(damaged)
        notes.clear()
        assert restored(folder, notes) == 2
        (line,) = notes
        assert line.startswith(f"{newest} is damaged")
        assert line.endswith("after epoch 2.")
        assert "\n" not in line
        figures["checkpoints cut at a byte or with one bit changed"] += 1
    older.write_bytes(b"")
    with pytest.raises(ValueError, match="no checkpoint can be used") as caught:
        folder.restore(STATE, notes.append)
    for word in (str(older), str(newest), "--fresh"):
        assert word in str(caught.value)


def test_checkpoints_of_other_arrays_or_epochs_are_not_used(tmp_path):
    folder, older, newest = saved(tmp_path)
    for like in ({"w": STATE["w"]}, {**STATE, "n": jnp.float32(0)}):
        with pytest.raises(ValueError, match=r"its arrays differ.*--fresh"):
            folder.restore(like, print)
    newest.write_bytes(older.read_bytes())  # a copy under another number
    notes = []
    assert restored(folder, notes) == 2
    assert "3.ckpt holds epoch 2" in notes[0]


def test_a_run_goes_on_from_the_older_checkpoint(tmp_path):
    def stop(progress):
        if progress.epoch == 3:
            raise Killed

    with pytest.raises(Killed):
        train.train(RUN, runs=tmp_path / "runs", checkpoint_every=1, on_epoch=stop)
    (newest,) = tmp_path.rglob("3.ckpt")
    newest.write_bytes(newest.read_bytes()[:-1])
    notes = []
    trained, epochs = command(tmp_path, on_note=notes.append)
    assert epochs == [("dense", 3), ("dense", 4)]
    assert len(notes) == 1
    unbroken, _ = command(tmp_path / "unbroken")
    jax.tree.map(np.testing.assert_array_equal, trained.params, unbroken.params)


@pytest.mark.parametrize(
    "every",
    [pytest.param(97, id="some"), pytest.param(7, id="all", marks=pytest.mark.fuzz)],
)
def test_damaged_files_of_a_finished_run_are_named(tmp_path, every, figures):
    trained, _ = command(tmp_path)
    folder = checkpoints.RunFolder(
        tmp_path / "runs" / configs.default_name(configs.resolve(RUN))
    )
    for name in ("weights.sparse", "record.json", "checksums.json"):
        path = folder.path / name
        content = path.read_bytes()
        for damaged in damages(content, every):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="is missing or damaged") as caught:
                folder.finished(trained.params)
            assert "--fresh" in str(caught.value)
            figures["files of finished runs cut or with one bit changed"] += 1
        path.write_bytes(content)
    weights, record = folder.finished(trained.params)
    jax.tree.map(np.testing.assert_array_equal, weights, trained.params)
    assert record.results == trained.record.results


def test_a_finished_run_of_another_network_is_not_called_damaged(tmp_path):
    trained, _ = command(tmp_path)
    name = configs.default_name(configs.resolve(RUN))
    folder = checkpoints.RunFolder(tmp_path / "runs" / name)
    other = jax.tree.map(lambda x: np.zeros((*x.shape, 2), x.dtype), trained.params)
    with pytest.raises(ValueError, match=f"{name} do not fit the network") as caught:
        folder.finished(other)
    assert "damaged" not in str(caught.value)
    assert "--fresh" in str(caught.value)


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_base_that_cannot_be_read_is_named(tmp_path, harm):
    command(tmp_path, TWO)
    (path,) = (tmp_path / "runs").glob("*-dense-*/weights.sparse")
    path.unlink() if harm == "missing" else path.write_bytes(path.read_bytes()[:99])
    other = dataclasses.replace(TWO, density=0.25)
    with pytest.raises(ValueError, match=r"missing or damaged.*--fresh") as caught:
        command(tmp_path, other)
    assert str(path) in str(caught.value)
    _, epochs = command(tmp_path, other, fresh=True)
    assert epochs == [(s, n) for s in ("base", "magnitude") for n in (1, 2)]


@pytest.mark.parametrize("epochs", [3, EPOCHS], ids=["checkpoint", "finished"])
def test_a_folder_that_was_given_the_name_of_another_run_is_refused(tmp_path, epochs):
    def stop(progress):
        if progress.epoch == epochs < EPOCHS:
            raise Killed

    runs, other = tmp_path / "runs", dataclasses.replace(RUN, seed=1)
    mine, its = (configs.default_name(configs.resolve(run)) for run in (RUN, other))
    with contextlib.suppress(Killed):
        train.train(RUN, runs=runs, checkpoint_every=1, on_epoch=stop)
    shutil.copytree(runs / mine, runs / its)
    with pytest.raises(ValueError, match="--fresh") as caught:
        command(tmp_path, other)
    assert mine in str(caught.value)
    _, trained = command(tmp_path, other, fresh=True)
    assert len(trained) == EPOCHS


def diverge(run, state):
    """Epochs that end with weights which are not finite."""
    del run, state
    return lambda state, key: (
        (jax.tree.map(lambda x: x * np.nan, state[0]), *state[1:]),
        jnp.float32(np.nan),
    )


@pytest.mark.parametrize(
    ("run", "name", "flag"),
    [
        (RUN, "-dense-", "--learning-rate"),
        (TWO, "-dense-", r"--base\.learning-rate"),
    ],
    ids=["run", "base"],
)
def test_a_run_that_diverges_is_an_error_and_leaves_nothing(
    tmp_path, monkeypatch, run, name, flag
):
    monkeypatch.setattr(train._Run, "_epoch_function", diverge)
    wanted = f"after epoch 1 of .*{name}.*not finite.*{flag}"
    with pytest.raises(ValueError, match=wanted):
        command(tmp_path, run)
    assert not [path for path in tmp_path.rglob("*.*") if path.is_file()]


def test_nothing_starts_from_a_finished_base_that_is_not_finite(tmp_path, monkeypatch):
    with monkeypatch.context() as context:  # as a version left them that did not look
        context.setattr(train._Run, "_epoch_function", diverge)
        context.setattr(train, "_check_finite", lambda *_: None)
        command(tmp_path, TWO)
    other = dataclasses.replace(TWO, density=0.25)
    with pytest.raises(ValueError, match=r"run .*-dense-.*not finite.*--fresh"):
        command(tmp_path, other)


# --- full disks -----------------------------------------------------------------------
class Full:
    """A disk with room for so many more files."""

    def __init__(self, monkeypatch, room):
        self.room, fsync = room, os.fsync

        def write(descriptor):
            if self.room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.room -= 1
            fsync(descriptor)

        monkeypatch.setattr(file.os, "fsync", write)


# Four checkpoints, weights, record, checksums; then the record in results/.
@pytest.mark.parametrize("room", range(8))
def test_a_full_disk_ends_in_one_line_and_nothing_is_lost(tmp_path, monkeypatch, room):
    with monkeypatch.context() as context:
        Full(context, room)
        with pytest.raises(ValueError, match=r"cannot be written.*No space") as caught:
            command(tmp_path)
    assert "same command again" in str(caught.value)
    assert "\n" not in str(caught.value)
    trained, epochs = command(tmp_path)
    assert [epoch for _, epoch in epochs] == list(range(min(room, EPOCHS) + 1, 5))
    unbroken, _ = command(tmp_path / "unbroken")
    jax.tree.map(np.testing.assert_array_equal, trained.params, unbroken.params)


def test_older_checkpoints_make_room(tmp_path, monkeypatch):
    folder, older, newest = saved(tmp_path)
    fsync = os.fsync

    def write(descriptor):
        if older.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(file.os, "fsync", write)
    folder.save(4, STATE, {"epochs": [{}] * 4})
    assert sorted(p.name for p in newest.parent.iterdir()) == ["3.ckpt", "4.ckpt"]


# --- all of it in turn ----------------------------------------------------------------
def harm(rng, path):
    """Changes one bit of a file, cuts it or makes it longer."""
    content = bytearray(path.read_bytes())
    place, kind = int(rng.integers(len(content))), rng.integers(3)
    if kind == 0:
        content[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[place:]
    else:
        content += rng.bytes(int(rng.integers(1, 9)))
    path.write_bytes(content)


@pytest.mark.parametrize(
    "walks",
    [pytest.param(2, id="some"), pytest.param(60, id="many", marks=pytest.mark.fuzz)],
)
def test_a_walk_of_kills_full_disks_and_damage(
    tmp_path, disk, monkeypatch, walks, figures
):
    """A command ends as an unbroken run does, or in one line with a cure."""
    whole, _ = command(tmp_path / "unbroken", TWO)
    expected, ends = left(tmp_path / "unbroken"), set()
    for number in range(walks):
        rng, folder = np.random.default_rng(number), tmp_path / str(number)
        for _ in range(10):
            event = rng.choice(["kill", "full disk", "damage", "nothing"])
            there = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            there = [path for path in there if path.stat().st_size]
            if event == "damage" and there:
                harm(rng, there[rng.integers(len(there))])
            options = dict(run=TWO, on_note=lambda line: None)
            options["fresh"] = bool(rng.random() < 0.1)
            try:
                if event == "kill":
                    done = disk.run(rng.integers(1, 40), folder, command, **options)
                    ends.add("finished" if done else "killed")
                    continue
                with monkeypatch.context() as context:
                    if event == "full disk":
                        Full(context, int(rng.integers(8)))
                    trained, _ = command(folder, **options)
            except ValueError as error:
                (line,) = str(error).splitlines()
                assert str(folder) in line
                full = "No space" in line
                ends.add("full" if full else "damaged")
                assert ("the same command again" if full else "--fresh") in line
                if not full:
                    command(folder, TWO, fresh=True)
            else:
                ends.add("finished")
                for a, b in zip(
                    jax.tree.leaves(trained.params),
                    jax.tree.leaves(whole.params),
                    strict=True,
                ):
                    np.testing.assert_array_equal(a, b)
                assert trained.record.results == whole.record.results
                assert (
                    left(folder / "results")["run.json"] == expected["results/run.json"]
                )
            figures["runs through kills, full disks and damaged files: steps"] += 1
        command(folder, TWO, fresh=True)
        found = left(folder)
        half = half_written(found)
        assert {n: x for n, x in found.items() if n not in half} == expected
    assert ends == {"finished", "killed", "full", "damaged"} or walks < 10


# --- a limit of hours -----------------------------------------------------------------
def test_the_end_of_the_hours_stops_a_run_as_ctrl_c_does(tmp_path):
    """In the base, between the base and the method, and in the method."""
    told = []
    for _ in range(3):
        with pytest.raises(train.TimeOver) as caught:
            command(tmp_path, TWO, hours=1e-9)
        told.append(str(caught.value).partition(";")[0])
    assert told == [
        "stopped after epoch 1 of 2 of the base",
        "stopped after epoch 0 of 2",
        "stopped after epoch 1 of 2",
    ]
    trained, epochs = command(tmp_path, TWO, hours=1e-9)
    assert epochs == [("magnitude", 2)]
    unbroken, _ = command(tmp_path / "unbroken", TWO)
    jax.tree.map(np.testing.assert_array_equal, trained.params, unbroken.params)
    assert trained.record.results == unbroken.record.results


def test_hours_that_suffice_stop_nothing(tmp_path):
    assert len(command(tmp_path, hours=1.0)[1]) == 4
    assert issubclass(train.TimeOver, KeyboardInterrupt)  # as Stopped


@pytest.mark.parametrize("hours", [-1.0, float("nan"), float("inf")])
def test_hours_that_are_no_time(hours):
    with pytest.raises(ValueError, match=rf"train: hours={hours} must be a finite"):
        train.train(RUN, runs=None, hours=hours)


def test_a_base_that_another_process_trains_is_waited_for_within_the_hours(tmp_path):
    base = configs.base_of(configs.resolve(TWO))
    assert base is not None
    folder = checkpoints.RunFolder(tmp_path / configs.default_name(base))
    with folder.lock():
        start = time.monotonic()
        with pytest.raises(checkpoints.Busy, match="another process is training"):
            train.train(TWO, runs=tmp_path, hours=0.5 / 3600)
        assert time.monotonic() - start >= 0.5


def test_a_long_epoch_ends_in_a_checkpoint(tmp_path, monkeypatch):
    kept = []
    save = checkpoints.RunFolder.save

    def note(folder, epoch, *rest):
        kept.append(epoch)
        save(folder, epoch, *rest)

    monkeypatch.setattr(checkpoints.RunFolder, "save", note)
    train.train(RUN, runs=tmp_path / "short", checkpoint_every=100)
    monkeypatch.setattr(train, "_SAVE_SECONDS", 0)
    train.train(RUN, runs=tmp_path / "long", checkpoint_every=100)
    assert kept == [4, 1, 2, 3, 4]


# --- Ctrl-C ---------------------------------------------------------------------------
@pytest.mark.parametrize(("presses", "done"), [(1, 2), (2, 1)])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, presses, done):
    """Once: the epoch is ended and saved. Twice: it ends at once."""
    make = train._Run._epoch_function

    def pressed(run, state):
        epoch, numbers = make(run, state), itertools.count(1)

        def interrupted(*arguments):
            if next(numbers) == 2:
                for _ in range(presses):
                    signal.raise_signal(signal.SIGINT)
            return epoch(*arguments)

        return interrupted

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as context:
        context.setattr(train._Run, "_epoch_function", pressed)
        with pytest.raises(train.Stopped) as caught:
            command(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert str(caught.value) == (
        f"stopped after epoch {done} of 4; the same command goes on from there."
    )
    trained, epochs = command(tmp_path)
    assert [epoch for _, epoch in epochs] == list(range(done + 1, 5))
    unbroken, _ = command(tmp_path / "unbroken")
    jax.tree.map(np.testing.assert_array_equal, trained.params, unbroken.params)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_names_the_stage_and_what_is_kept(tmp_path, monkeypatch):
    def press(progress):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(train.Stopped, match=r"after epoch 1 of 2 of the base; nothing"):
        train.train(TWO, runs=None, on_epoch=press)
    with pytest.raises(train.Stopped, match=r"command without --fresh goes on after e"):
        train.train(TWO, runs=tmp_path, fresh=True, on_epoch=press)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_an_epoch_that_has_no_checkpoint_makes_one(tmp_path):
    def press(progress):
        if progress.epoch == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(train.Stopped, match=r"epoch 3 of 4; the same .* from there"):
        train.train(RUN, runs=tmp_path / "runs", checkpoint_every=2, on_epoch=press)
    assert command(tmp_path)[1] == [("dense", 4)]


# --- other names ----------------------------------------------------------------------
def test_paths_that_the_locale_cannot_decode(tmp_path):
    """What os.fsdecode gives for the bytes of another encoding."""
    folder = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xfc\xc3\xbc"))
    trained, epochs = command(folder)
    assert len(epochs) == EPOCHS
    assert records.read(folder / "results" / "run.json") == trained.record
    assert command(folder)[1] == []
