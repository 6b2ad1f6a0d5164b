"""The folder of one run: checkpoints while it goes, weights once it is finished."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sparse_optax.experiments import records
from sparse_optax.export.file import write_atomically


class RunFolder:
    """Where a run keeps what it needs to go on after a kill.

    A checkpoint holds the parameters, the optimizer state and the history; random
    keys come from the seed and the epoch, so that a run which goes on from one ends
    with the same bits as an unbroken run. A finished run leaves ``weights.npz`` and
    ``record.json``.

    Args:
      path: the folder, made where it is missing.
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
        for folder in (self.path, self._training):
            records.check_writable(folder)
        self._checkpoints = self._training / "checkpoints"

    @contextlib.contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """Keeps other processes out while this one trains; a kill releases it.

        Args:
          wait: wait for the other process instead of raising.

        Raises:
          ValueError: where another process trains this run and ``wait`` is False.
        """
        try:
            import fcntl
        except ImportError:  # Windows: two trainings of one run are not prevented
            yield
            return
        with open(self._training / "lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ValueError(
                    f"train: another process is training in {self._training}; wait, "
                    "or choose another folder with --runs."
                ) from None
            yield

    def save(self, epoch: int, state: Any, history: dict[str, Any]) -> None:
        """Saves the state after an epoch; the newest two are kept."""
        with self._manager() as manager:
            manager.save(
                epoch,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    history=ocp.args.JsonSave(history),
                ),
            )

    def restore(self, state: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest finished checkpoint, or None.

        Args:
          state: a state of the same structure, shapes and dtypes.

        Returns:
          The epoch, the state and the history.
        """
        if not self._checkpoints.exists():
            return None
        with self._manager() as manager:
            epoch = manager.latest_step()
            if epoch is None:
                return None
            restored = manager.restore(
                epoch,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(
                        jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
                    ),
                    history=ocp.args.JsonRestore(),
                ),
            )
            return epoch, restored.state, restored.history

    def clear(self) -> None:
        """Deletes the checkpoints."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    def finish(self, params: Any, record: records.Record) -> None:
        """Writes the final weights and the record, then deletes its checkpoints."""
        flat: dict[str, Any] = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        buffer = io.BytesIO()
        np.savez(buffer, **flat)
        write_atomically(
            self.path / "weights.npz", lambda file: file.write(buffer.getvalue())
        )
        records.write(self.path / "record.json", record)
        if not self._shared:
            self.clear()

    def finished(self, params: Any) -> tuple[Any, records.Record] | None:
        """Final weights and record of a finished run, or None.

        Args:
          params: parameters of the same structure.
        """
        if not (self.path / "record.json").exists():
            return None
        with np.load(self.path / "weights.npz", allow_pickle=False) as flat:
            weights = jax.tree_util.tree_map_with_path(
                lambda path, leaf: jax.numpy.asarray(
                    flat[jax.tree_util.keystr(path, simple=True, separator="/")],
                    leaf.dtype,
                ),
                params,
            )
        return weights, records.read(self.path / "record.json")

    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._checkpoints, options=options)
