"""One JSON file per finished run: what was run, on what, and what came out."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sparse_optax
from sparse_optax.export.file import write_atomically


@dataclasses.dataclass(frozen=True)
class Record:
    """A finished run. Errors are in percent of wrongly classified images; of a text, of
    characters, and there the loss is given in bits a character besides.

    Attributes:
      name: name of the run, unique in its folder.
      command: what reproduces it.
      config: every value that defined it.
      seed: its seed, once more, for tables.
      commit: git commit of the code, or None outside a checkout.
      dirty: whether the package had uncommitted changes; None outside a checkout.
      versions: of Python and the libraries.
      device: platform, kind of device and of processor, processor threads used.
      wall_seconds: from the first epoch to the last, compilation left out.
      compile_seconds: compilation.
      seconds_per_epoch: median time of one training epoch, evaluation left out.
      steps_per_epoch: optimizer steps of one epoch.
      results: errors of the final network and what led to them.
      layers: name, shape, weights, kept and non-zero weights of every kernel, the
        last recounted from the final weights.
      base: the dense run that came before: its name, config and results; or None.
      history: a list per measured quantity, one entry an epoch.
    """

    name: str
    command: str
    config: dict[str, Any]
    seed: int
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    device: dict[str, Any]
    wall_seconds: float
    compile_seconds: float
    seconds_per_epoch: float
    steps_per_epoch: int
    results: dict[str, Any]
    layers: list[dict[str, Any]]
    base: dict[str, Any] | None
    history: dict[str, list[Any]]


def write(path: str | Path, record: Record) -> None:
    """Writes a record so that a reader sees all of it or nothing.

    Args:
      path: file to write or replace, ``<folder>/<name>.json``.
      record: the record.

    Raises:
      ValueError: where it cannot be written.

    Examples:
      >>> import pathlib, tempfile
      >>> from sparse_optax.experiments import records
      >>> record = records.Record(
      ...     *("run", "command", {}, 0, None, None, {}, {}, 1.0, 1.0, 0.1, 40),
      ...     *({"test_error": 2.5}, [], None, {}),
      ... )
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.json"
      >>> records.write(path, record)
      >>> records.read(path).results
      {'test_error': 2.5}
    """
    path = Path(path)
    check_file(path)
    content = encode(record)
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise ValueError(
            f"records: {path} cannot be written ({error.strerror or error}). Make "
            "room and give the same command again: a finished run is not trained "
            "again."
        ) from error


def encode(record: Record) -> bytes:
    """The content of a record's file."""
    # One line a field (a column of the history), so that a diff can be read.
    lines = []
    for key, value in dataclasses.asdict(record).items():
        if key == "history":
            columns = [f"  {_dump(k)}: {_dump(v)}" for k, v in value.items()]
            lines.append(' "history": {\n' + ",\n".join(columns) + "\n }")
        else:
            lines.append(f" {_dump(key)}: {_dump(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _dump(value) -> str:
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None  # JSON knows neither NaN nor infinity
    return value


def read(path: str | Path) -> Record:
    """Reads a record.

    Args:
      path: file written by :func:`write`.

    Returns:
      The record.

    Raises:
      ValueError: where the file is not such a record.
    """
    try:
        record = Record(**json.loads(Path(path).read_text(encoding="utf-8")))
        for field in dataclasses.fields(Record):
            _check_kind(field.name, getattr(record, field.name), field.type)
        _check_parts(record)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"records.read: {path} is not a results record ({error}). Give another "
            "file; a record that was damaged comes again with the run that wrote it, "
            "once it is deleted."
        ) from error
    return record


def _check_kind(name: str, value: Any, kind: Any) -> None:
    """Raises TypeError unless a value of JSON is of the kind that a field has, and a
    number finite.
    """
    base = typing.get_origin(kind) or kind
    if base is types.UnionType:
        base = tuple(typing.get_origin(one) or one for one in typing.get_args(kind))
    right = isinstance(value, (int, float) if base is float else base)
    if right and base in (int, float):
        right = not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if not right:
        raise TypeError(f"its {name} is {value!r:.40}")


def _check_parts(record: Record) -> None:
    """Raises TypeError unless the fields hold what tables, plots and pages read there.
    A name that is missing is told by those who need it.
    """
    _check_config("config", record.config)
    _check_results("results", record.results)
    for i, layer in enumerate(record.layers):
        _check_kind(f"layers[{i}]", layer, dict)
        kinds = {"name": str, "shape": list, **dict.fromkeys(_COUNTS, int)}
        for name, kind in kinds.items():
            _check_kind(f"layers[{i}].{name}", layer.get(name), kind)
        _check_counts(f"layers[{i}]", layer)
    if record.base is not None:
        for name in ("config", "results"):
            _check_kind(f"base.{name}", record.base.get(name), dict)
        _check_config("base.config", record.base["config"])
        _check_results("base.results", record.base["results"])
    length = None
    for name, column in record.history.items():
        _check_kind(f"history[{name!r}]", column, list)
        length = len(column) if length is None else length
        if len(column) != length:
            raise TypeError(f"its history[{name!r}] has another length than the others")
        whole = name in ("epoch", "test_error") or name.startswith("below_")
        for value in column:
            if whole or value is not None:
                _check_kind(f"history[{name!r}]", value, float)


# Of a layer, and of what results may hold those that are shown.
_COUNTS = ("weights", "kept", "nonzero")
_SHOWN = ("test_error", "weights", "kept", "nonzeros", "file_bytes", "flops")
_TEXTS = ("dataset", "model", "method")


def _check_config(name: str, config: dict[str, Any]) -> None:
    """Raises TypeError unless the shown values of a configuration are of their kind."""
    for key, kind in {**dict.fromkeys(_TEXTS, str), "density": float}.items():
        if key in config:
            _check_kind(f"{name}.{key}", config[key], kind)


def _check_results(name: str, results: dict[str, Any]) -> None:
    """Raises TypeError unless the shown results are numbers."""
    for key in (*_SHOWN, "test_error_before_cut"):
        if key in results:
            _check_kind(f"{name}.{key}", results[key], float)
    _check_counts(name, results)


def _check_counts(name: str, counts: dict[str, Any]) -> None:
    """Raises TypeError unless there are weights, and at most all of them are kept."""
    weights, kept = counts.get("weights", 1), counts.get("kept", 0)
    if weights < 1 or not 0 <= kept <= counts.get("weights", kept):
        raise TypeError(f"its {name} has {weights} weights and keeps {kept}")


def read_folder(folder: str | Path) -> dict[str, Record]:
    """Reads every record of a folder, by file name without ``.json``."""
    paths = sorted(Path(folder).glob("*.json"))
    return {path.stem: read(path) for path in paths if path.is_file()}


def check_writable(folder: str | Path) -> None:
    """Makes a folder and raises at once if nothing can be written there.

    Raises:
      ValueError: naming the folder and the cure.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"records: the folder {folder} cannot be written to ({error}). Choose "
            "another one with --results or --runs, or change its permissions."
        ) from error


def check_file(path: str | Path) -> None:
    """Raises at once if a file cannot be written or replaced; makes its folder.

    Raises:
      ValueError: naming the file or its folder, and the cure.
    """
    path = Path(path)
    check_writable(path.parent)
    if path.is_dir():
        raise ValueError(
            f"records: {path} is a folder, and a file of this name is to be written. "
            "Move it away, or choose another folder with --results or --runs."
        )


def layers(params: Any, masks: Any = None) -> list[dict[str, Any]]:
    """Counts the weights of every kernel, those in the mask and those not zero.

    Fewer are non-zero than kept where a weight that was grown has never moved: that
    of a hidden unit that is off for every image.

    Args:
      params: parameters of a network.
      masks: its mask tree, or None where what is not zero is what is kept.

    Returns:
      One dict per eligible leaf: name, shape, weights, kept, nonzero.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.experiments import records
      >>> layer, = records.layers({"fc": {"bias": jnp.ones(3), "kernel": jnp.eye(3)}})
      >>> layer["name"], layer["weights"], layer["nonzero"]
      ('fc/kernel', 9, 3)
    """
    # Without masks the report counts what is not zero.
    kept = sparse_optax.report.summary(params, masks=masks).layers
    nonzero = sparse_optax.report.summary(params).layers
    paths = jax.tree_util.tree_leaves_with_path(params)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(leaf.shape)
        for path, leaf in paths
    }
    return [
        {
            "name": layer.name,
            "shape": shapes[layer.name],
            "weights": layer.weights,
            "kept": layer.kept,
            "nonzero": counted.kept,
        }
        for layer, counted in zip(kept, nonzero, strict=True)
    ]


def environment(more: Iterable[str] = ()) -> dict[str, Any]:
    """Commit, versions and device, as keyword arguments of :class:`Record`; ``more``
    names other packages that a run depends on.
    """
    commit, dirty = _git()
    libraries = ("jax", "jaxlib", "optax", "flax", "numpy", *more)
    versions = {name: importlib.metadata.version(name) for name in libraries}
    device = jax.devices()[0]
    try:
        threads = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        threads = os.cpu_count() or 1
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "cpu": _processor(),
            "cpu_threads": threads,
        },
    }


def _git() -> tuple[str | None, bool | None]:
    root = Path(__file__).resolve().parents[2]

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        # A wheel inside somebody's checkout is not that checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None, None
        changes = git("status", "--porcelain", "--", "sparse_optax", "pyproject.toml")
        return git("rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def command_line() -> str:
    """The command that runs now, without the folder of the program."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
