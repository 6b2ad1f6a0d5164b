"""Saves and loads a sparse model: every leaf, of sparse ones what is kept.

The first line of a file is the word SPARSE with the version of the format, a space and
the header. Then follow the bytes of the leaves, one after the other, and the SHA-256 of
all bytes before it. ``sparse_optax.encoding`` makes and reads header and leaves;
docs/file-format.md describes them.
"""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.encoding import (
    DENSE,
    MAGIC,
    SPARSE,
    VERSION,
    Reader,
    Row,
    Sparse,
    array_of,
    dense_bytes,
    encode_values,
    header_text,
    key_kinds,
    kind_of,
    leaf_of,
    named_leaves,
    read_dense,
    read_sparse,
    rows_of,
)
from sparse_optax.export.model import SparseLeaf, SparseModel, encode_leaves
from sparse_optax.layers import PyTree, is_abstract

# Without `max_bytes` a model may be so many times as large as its file, or 1 GiB.
_GROWTH, _ALWAYS = 1024, 2**30


@boundary("save_sparse")
def save_sparse(
    path: str | bytes | os.PathLike,
    params: PyTree,
    masks: PyTree,
    *,
    dtype: Any = None,
    unit_axis: int = -1,
    force: bool = False,
) -> None:
    """Writes a sparse model to a file, completely or not at all.

    Every leaf is stored. Of a leaf with a mask these are the kept values and their
    positions; any other leaf is stored as it is: biases, statistics of batch norm,
    random keys, None, Python numbers. So ``nnx.state(model)`` can be saved, and
    ``{"params": params, "batch_stats": statistics}`` with the masks of ``params``.

    The file is written under a temporary name and then moved, so that a failure keeps
    the old file. It keeps the permissions of the file that it replaces.

    Args:
      path: The file; its folder must exist. No suffix is added, ``.sparse`` is usual.
      params: A tree of any type with concrete leaves.
      masks: A mask tree or an optimizer state, paired by normalised leaf name. They may
        be those of a part of ``params``.
      dtype: What the kept values are stored as: None for their own dtype,
        ``"float16"``, ``"bfloat16"``, or ``"int8"`` with one scale for each output
        unit. They are rounded, in float16 to zero below 3e-8 and in int8 below 1/254
        of the largest of their unit, and come back in their own dtype. Leaves without a
        mask are not rounded, nor leaves that would not become smaller.
      unit_axis: The axis of output units, for ``"int8"``: -1 in flax and haiku, 0 in
        equinox.
      force: Leaves out weights that are outside of the masks and not zero, instead of
        an error.

    Raises:
      ValueError: If weights outside of the masks are not zero, the masks do not fit, a
        leaf cannot be stored, ``dtype`` cannot hold a value, or writing fails.

    Examples:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.ones(2), "w": jnp.array([[0.0, 2.0]])}
      >>> mask = {"w": jnp.array([[False, True]])}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.sparse")
      ...     sparse_optax.save_sparse(path, params, mask)
      ...     sparse_optax.load_sparse(path).dense()["w"].tolist()
      [[0.0, 2.0]]
    """
    path = _path_text(path)
    if not isinstance(force, bool):
        checks.fail("force", force, "True or False", "Leave it out.")
    for name, x in named_leaves(params):
        if is_abstract(x):
            raise ArgumentError(
                f"the leaf {name!r} of `params` is abstract; a file needs "
                "its values. Call it outside jit, with concrete arrays."
            )
    parts = list(content(params, masks, dtype, unit_axis, force))
    try:
        write_atomically(path, lambda file: file.writelines(parts))
    except OSError as error:
        raise ArgumentError(
            f"`path`={path!r} cannot be written "
            f"({error.strerror or error}); it must name a regular file in an existing "
            "folder with room and permission to write. Choose another path or make the "
            "folder; what was there before is unchanged."
        ) from error


@boundary("load_sparse")
def load_sparse(
    path: str | bytes | os.PathLike,
    like: PyTree = None,
    *,
    max_bytes: int | None = None,
) -> SparseModel:
    """Reads a file of ``save_sparse`` and checks that it is complete.

    Loading takes memory in proportion to the size of the file; ``dense()`` of the model
    takes what the shapes in the file say.

    Args:
      path: The file.
      like: A tree of arrays, concrete or abstract; ``dense()`` and ``masks`` take its
        structure and types. Leaves are paired by normalised name. None: nested dicts.
      max_bytes: How large the file, and the model with all its zeros, may be. None
        allows a model of 1,024 times the size of the file, and any model of 1 GiB. Give
        it for files of unknown origin.

    Returns:
      A ``SparseModel``.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is truncated, altered or of another format, the model is
        larger than allowed, or ``like`` has other names, shapes or dtypes.

    Examples:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = [jnp.array([[0.0, 2.0]])]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.sparse")
      ...     sparse_optax.save_sparse(path, params, [jnp.array([[False, True]])])
      ...     model = sparse_optax.load_sparse(path, like=params)
      >>> model.dense()[0].tolist(), model.leaves["0"].values.tolist()
      ([[0.0, 2.0]], [2.0])
    """
    path = _path_text(path)
    if max_bytes is not None:
        checks.whole("max_bytes", max_bytes, 0, cure="Give 2**30 for one GiB.")
    data = _read(path, max_bytes)
    with _intact(path):
        rows, reader = _header(path, data)
    _check_size(path, rows, len(data), max_bytes)
    with _intact(path):
        leaves = {row.name: _leaf(row, reader) for row in rows}
        if reader.left:
            raise ValueError(f"{reader.left} bytes are left over")
    if like is not None:
        _check_like(leaves, like)
    return SparseModel(leaves, like)


# --- paths ----------------------------------------------------------------------------
def _path_text(path: Any) -> str:
    """A path as text that the system can open."""
    try:
        text = os.fsdecode(path)
        right = bool(text) and "\0" not in text and bool(os.fsencode(text))
    except (TypeError, UnicodeError):
        right, text = False, ""
    if not right:
        allowed = "a path that this system allows, as text, bytes or os.PathLike"
        checks.fail("path", path, allowed, "Give the name of a file.")
    return text


def _regular(path: str) -> os.stat_result | None:
    """What the system says of a regular file; None if there is nothing. Devices and
    pipes would be replaced, or block the reader.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory")
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file")
    return found


def write_atomically(path: str | os.PathLike, fill: Callable[[BinaryIO], Any]) -> None:
    """Replaces a file in one step of the file system: completely or not at all. What is
    no regular file raises OSError; a new file keeps owner and permissions of the old.
    """
    real = Path(os.path.realpath(path))  # a link stays a link
    old = _regular(os.fspath(real))
    temporary = real.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            if old is not None:
                _copy_access(old, temporary)
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _copy_access(old: os.stat_result, path: Path) -> None:
    with contextlib.suppress(OSError, AttributeError):  # the superuser's right alone
        os.chown(path, old.st_uid, old.st_gid)
    os.chmod(path, stat.S_IMODE(old.st_mode))


# --- writing --------------------------------------------------------------------------
def content(
    params: PyTree, masks: PyTree, dtype: Any = None, unit_axis: int = -1, force=False
) -> Iterator[Any]:
    """The bytes of a file, part after part, the checksum last."""
    leaves = encode_leaves(params, masks, dtype, unit_axis)
    if not force:
        _check_zeros(leaves)
    digest = hashlib.sha256()
    for part in _parts(leaves):
        raw = part if isinstance(part, bytes) else _raw(part)
        digest.update(raw)
        yield raw
    yield digest.digest()


def _check_zeros(leaves: list[Any]) -> None:
    """Raises if weights outside of the masks are not zero."""
    outside = {}
    for found, x, mask in leaves:
        if mask is not None:
            others = array_of(x)[~mask]
            if count := int(np.count_nonzero(others != 0)):
                outside[found.row.name] = count
    if outside:
        raise ArgumentError(
            f"{sum(outside.values())} weights outside of `masks` are not zero "
            f"({outside}); a sparse file would lose them, and the loaded model would "
            "be another one. Call params = sparse_optax.sparsify(params, masks) first "
            "and evaluate these parameters, or pass force=True to leave them out. A "
            "method that writes zeros must be the last element of the chain."
        )


def _parts(leaves: list[Any]) -> Iterator[Any]:
    """The parts of a file, without the checksum."""
    rows = [found.row if isinstance(found, Sparse) else found for found, _, _ in leaves]
    yield MAGIC + b"%d %b\n" % (VERSION, header_text(rows))
    for found, x, mask in leaves:
        if isinstance(found, Sparse):
            yield from found.code.parts
            yield from encode_values(found, array_of(x), mask)
        else:
            yield array_of(x)


def _raw(array: np.ndarray) -> Any:
    """The bytes of an array in C order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# --- reading --------------------------------------------------------------------------
def _read(path: str, max_bytes: int | None) -> memoryview:
    """The bytes of a file without its checksum, which is right."""
    try:
        found = _regular(path)
        if found is None:
            raise FileNotFoundError(
                f"load_sparse: `path`={path!r} does not exist. Give the path of "
                "a file that save_sparse wrote."
            )
        if max_bytes is not None and found.st_size > max_bytes:
            raise ArgumentError(
                f"`path`={path!r} has {found.st_size} bytes, more than "
                f"`max_bytes`={max_bytes}; nothing was read. Raise `max_bytes` if you "
                "trust the file."
            )
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArgumentError(
            f"`path`={path!r} cannot be read "
            f"({error.strerror}). Give a readable file that save_sparse wrote."
        ) from error
    return memoryview(data)


def _header(path: str, data: memoryview) -> tuple[list[Row], Reader]:
    """The rows of the header, and what follows them."""
    whole, checksum = data[:-32], data[-32:]
    start = re.match(rb"SPARSE(\d{1,9}) ", whole)
    if start is None:
        raise ValueError("no sparse file")
    if hashlib.sha256(whole).digest() != checksum:
        raise ValueError("the checksum differs")
    if (version := int(start[1])) != VERSION:
        raise ArgumentError(
            f"`path`={path!r} has version {version} of the format; this package reads "
            f"version {VERSION}. Use a version of sparse_optax that does, or save the "
            "model again with this."
        )
    line = re.compile(rb"[^\n]*\n").match(whole, start.end())
    if line is None:
        raise ValueError("no end of the header")
    return rows_of(line[0]), Reader(whole[line.end() :])


def _check_size(
    path: str, rows: list[Row], file_size: int, max_bytes: int | None
) -> None:
    """Raises if the model is larger than it may be, before anything is allocated."""
    size = sum(map(dense_bytes, rows))
    limit = max(_GROWTH * file_size, _ALWAYS) if max_bytes is None else max_bytes
    if size > limit:
        raise ArgumentError(
            f"`path`={path!r} has {file_size} bytes and declares a model of {size} "
            f"bytes; at most {limit} are allowed. Pass max_bytes={size} if you trust "
            "the file."
        )


def _leaf(row: Row, reader: Reader) -> SparseLeaf:
    if row.kind == SPARSE:
        positions, values = read_sparse(row, reader)
        return SparseLeaf(positions, values, row.shape, np.dtype(row.dtype))
    array = read_dense(row, reader)
    if row.kind == DENSE:
        return SparseLeaf(None, array, row.shape, array.dtype)
    if row.kind in key_kinds():
        return SparseLeaf(None, array, row.shape[:-1], row.kind)
    return SparseLeaf(None, leaf_of(row.kind, array), (), row.kind)


@contextlib.contextmanager
def _intact(path: str):
    try:
        yield
    except ArgumentError:
        raise
    except Exception as error:  # a broken file can raise anything in a reader
        raise ArgumentError(
            f"`path`={path!r} is truncated, altered or was not "
            f"written by save_sparse ({type(error).__name__}: {error}). Make a new "
            "copy of the file, or save the model again."
        ) from error


def _check_like(leaves: dict[str, SparseLeaf], like: PyTree) -> None:
    there = dict(named_leaves(like))
    if there.keys() != leaves.keys():
        raise ArgumentError(
            f"`like` lacks {sorted(leaves.keys() - there.keys())} of the "
            f"file and has {sorted(there.keys() - leaves.keys())} besides; the names "
            "must be equal. Pass a tree like the one that was saved."
        )
    for name, x in there.items():
        dtype = leaves[name].dtype
        wanted = dtype if isinstance(dtype, str) else dtype.name, leaves[name].shape
        kind = kind_of(x)
        got = (type(x).__name__, None) if kind is None else (kind[2], kind[1])
        if got != wanted:
            raise ArgumentError(
                f"`like` has {got[0]} of shape {got[1]} for {name!r}, and "
                f"the file {wanted[0]} of shape {wanted[1]}; they must be equal. Pass "
                "a tree like the one that was saved."
            )
