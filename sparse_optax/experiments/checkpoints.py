"""The folder of one run: checkpoints while it goes, weights once it is finished.

A checkpoint is one file, ``checkpoints/<epoch>.ckpt``: a line with the SHA-256 of all
that follows, a line of JSON (the name of the run; the history; name, dtype and shape of
every array) and the bytes of the arrays. It is written under another name and then
moved, so that a kill leaves a whole file or none, and it is read only where its
checksum is right. What a finished run leaves counts as finished once ``checksums.json``
names it.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.experiments import records
from sparse_optax.export.file import content, load_sparse, write_atomically

_SUFFIX = ".ckpt"
# So many are kept: where the newest is damaged, the run goes on from the other.
_KEPT = 2
# What a finished run leaves, in the order in which it is written, and the last of all.
_LEFT, _CHECKSUMS = ("weights.sparse", "record.json"), "checksums.json"
# Between two looks at a lock that another process has.
_POLL_SECONDS = 0.2
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Busy(ValueError):
    """Another process trains the same run."""


def joined(params: Any, stats: Any) -> Any:
    """The form of weights in files: statistics are one more layer, if there are any."""
    return {**params, "stats": stats} if stats else params


def parted(weights: Any) -> tuple[Any, Any]:
    """Parameters and statistics of what :func:`joined` made."""
    params = dict(weights)
    stats = params.pop("stats", {})
    return params, stats


def is_finished(path: Path) -> bool:
    """Whether a run has left its weights and its record in a folder."""
    return (path / _CHECKSUMS).exists()


def record_of(path: Path) -> records.Record:
    """The record of a finished run, once all that it left has its checksum.

    Args:
      path: the folder of the run, which :func:`is_finished`.

    Raises:
      ValueError: where one of its files is damaged or missing.
    """
    file = path / _CHECKSUMS
    try:
        checksums = json.loads(file.read_bytes())
        for name in _LEFT:
            file = path / name
            if checksums.get(name) != _checksum(file.read_bytes()):
                raise ValueError("its checksum does not match")
        return records.read(file)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"train: {file} of a finished run is missing or damaged ({error}). Train "
            "it again with --fresh."
        ) from error


class RunFolder:
    """Where a run keeps what it needs to go on after a kill.

    A checkpoint holds the parameters, the optimizer state and the history; random
    keys come from the seed and the epoch, so that a run which goes on from one ends
    with the same bits as an unbroken run. A finished run leaves ``weights.sparse``,
    ``record.json`` and their checksums.

    Args:
      path: the folder, made where it is missing. Its name is that of the run.
      shared: another folder, which holds the checkpoints for several runs that train
        alike; they stay there when one of them has finished.

    Raises:
      ValueError: where one cannot be written to.
    """

    def __init__(self, path: str | Path, shared: str | Path | None = None):
        """Makes the folders."""
        self.path = Path(path).absolute()
        self._shared = shared is not None
        self._training = Path(path if shared is None else shared).absolute()
        self._checkpoints = self._training / "checkpoints"
        for folder in (self.path, self._training):
            records.check_writable(folder)

    @contextlib.contextmanager
    def lock(self, *, wait: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Keeps other processes out while this one trains; a kill releases it.

        Args:
          wait: whether to go on waiting for the other process, asked again and again.

        Raises:
          Busy: where another process trains this run and ``wait`` gives False.
        """
        try:
            import fcntl
        except ImportError:  # Windows: two trainings of one run are not prevented
            yield
            return
        with open(self._training / "lock", "w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    pass
                if not wait():
                    raise Busy(
                        f"train: another process is training in {self._training}; "
                        "wait, or choose another folder with --runs."
                    )
                time.sleep(_POLL_SECONDS)
            yield

    def save(self, epoch: int, state: Any, history: dict[str, Any]) -> None:
        """Saves the state after an epoch; the newest two checkpoints are kept.

        Raises:
          ValueError: where it cannot be written; the older ones are unchanged.
        """
        parts = _encode(state, history, self._training.name)
        self._checkpoints.mkdir(exist_ok=True)
        self._write(self._checkpoints / f"{epoch}{_SUFFIX}", parts)
        # Any that claims a later epoch was damaged: the run went on from before it.
        later = [path for path in self._saved() if int(path.stem) > epoch]
        older = [path for path in self._saved() if int(path.stem) <= epoch]
        for path in [*later, *older[_KEPT:], *self._checkpoints.glob(".*.tmp")]:
            path.unlink(missing_ok=True)

    def restore(
        self, state: Any, note: Callable[[str], None] = print
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest checkpoint that is not damaged, or None where there is none.

        Args:
          state: a state of the same structure, shapes and dtypes.
          note: gets one line where a damaged checkpoint was passed over.

        Returns:
          The epoch, the state and the history.

        Raises:
          ValueError: where there are checkpoints and none can be used.
        """
        wrong = []
        for path in self._saved():
            try:
                found, history = _decode(path.read_bytes(), state, self._training.name)
                epoch = len(history["epochs"])
                if epoch != int(path.stem):
                    raise ValueError(f"holds epoch {epoch}")
            except (OSError, ValueError) as error:
                wrong.append(f"{path} {error}")
                continue
            if wrong:
                note(
                    f"{'; '.join(wrong)}. The run goes on from the checkpoint before "
                    f"it, after epoch {epoch}."
                )
            return epoch, found, history
        if wrong:
            raise ValueError(
                f"train: no checkpoint can be used: {'; '.join(wrong)}. Start again "
                "with --fresh."
            )
        return None

    def clear(self) -> None:
        """Deletes the checkpoints, all at once for whoever looks for them."""
        gone = self._training / "checkpoints.deleted"
        shutil.rmtree(gone, ignore_errors=True)  # of a kill
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._checkpoints, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def start_again(self) -> None:
        """Deletes what the run has left, the sign that it finished first."""
        for name in (_CHECKSUMS, *_LEFT):
            (self.path / name).unlink(missing_ok=True)
        self.clear()

    def finish(self, params: Any, record: records.Record, masks: Any) -> None:
        """Writes the final weights and the record, then deletes its checkpoints.

        Args:
          params: parameters and statistics.
          record: the record.
          masks: which weights are stored; all others are zero.

        Raises:
          ValueError: where they cannot be written; the checkpoints stay.
        """
        weights = b"".join(content(params, masks))
        contents = dict(zip(_LEFT, (weights, records.encode(record)), strict=True))
        checksums = {name: _checksum(whole) for name, whole in contents.items()}
        contents[_CHECKSUMS] = json.dumps(checksums).encode()
        for name, whole in contents.items():
            self._write(self.path / name, [whole])
        self._tidy()

    def finished(self, params: Any) -> tuple[Any, records.Record] | None:
        """Final weights and record of a finished run, or None.

        Args:
          params: parameters of the same structure.

        Raises:
          ValueError: where one of the files is damaged or missing, its weights are
            those of another network, or the folder has been given another run's name.
        """
        if not is_finished(self.path):
            return None
        # The checkpoints of a run that was killed while it deleted them.
        self._tidy()
        record = record_of(self.path)
        if record.name != self.path.name:
            raise ValueError(
                f"train: {self.path} holds the finished run {record.name}, so it was "
                "copied or renamed. Give it that name back, or train this run with "
                "--fresh."
            )
        try:
            weights = load_sparse(self.path / "weights.sparse", like=params).dense()
        except ValueError as error:
            raise ValueError(
                f"train: the weights of the finished run {self.path} do not fit the "
                f"network that the data set asks for now ({error}). Put its data set "
                "back, or train it again with --fresh."
            ) from error
        return weights, record

    def _saved(self) -> list[Path]:
        """The checkpoints, the newest first."""
        found = self._checkpoints.glob(f"*{_SUFFIX}")
        numbered = [path for path in found if path.stem.isdecimal()]
        return sorted(numbered, key=lambda path: -int(path.stem))

    def _write(self, path: Path, parts: list[bytes]) -> None:
        """Replaces a file; on a full disk the older checkpoints make room."""

        def fill(file):
            file.writelines(parts)

        try:
            try:
                write_atomically(path, fill)
            except OSError as error:
                older = self._saved()[1:]
                if error.errno not in _FULL or not older:
                    raise
                for each in older:
                    each.unlink()
                write_atomically(path, fill)
        except OSError as error:
            raise ValueError(
                f"train: {path} cannot be written ({error.strerror or error}); the "
                "last checkpoint is kept. Make room and give the same command again: "
                "it goes on from there."
            ) from error

    def _tidy(self) -> None:
        """Deletes what a finished run needs no more."""
        for path in self.path.glob(".*.tmp"):  # of a kill
            path.unlink(missing_ok=True)
        if not self._shared:
            self.clear()


def _named(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree and their names."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def _described(tree: Any) -> list[list[Any]]:
    """Name, dtype and shape of every leaf, as JSON gives them back."""
    return [[name, x.dtype.name, list(x.shape)] for name, x in _named(tree)]


def _encode(state: Any, history: dict[str, Any], run: str) -> list[bytes]:
    """The parts of a checkpoint file."""
    header = {"run": run, "arrays": _described(state), "history": history}
    parts = [json.dumps(header).encode() + b"\n"]
    parts += [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]
    return [_checksum(*parts).encode() + b"\n", *parts]


def _checksum(*parts: bytes) -> str:
    """SHA-256 of some bytes, end to end."""
    checksum = hashlib.sha256()
    for part in parts:
        checksum.update(part)
    return checksum.hexdigest()


def _decode(whole: bytes, state: Any, run: str) -> tuple[Any, dict[str, Any]]:
    """State and history of the bytes of a file; ``state`` has the structure."""
    checksum, _, body = whole.partition(b"\n")
    if _checksum(body).encode() != checksum:
        raise ValueError("is damaged: its checksum does not match")
    line, _, data = body.partition(b"\n")
    header = json.loads(line)
    if header.get("run", run) != run:
        raise ValueError(f"is of another run, {header['run']}")
    if header["arrays"] != _described(state):
        raise ValueError("is of another version of the program: its arrays differ")
    leaves, start = [], 0
    for leaf in jax.tree.leaves(state):
        array = np.frombuffer(data, leaf.dtype, leaf.size, start).reshape(leaf.shape)
        leaves.append(jnp.array(array))  # a copy, which may be donated
        start += array.nbytes
    return jax.tree.unflatten(jax.tree.structure(state), leaves), header["history"]
