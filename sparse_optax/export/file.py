"""Saves and loads a sparse model: one bit per weight, and the kept values.

The file is an ``.npz`` that ``numpy.load(path, allow_pickle=False)`` reads. Each leaf's
name holds its values, only the kept ones if it has a mask; ``__bits__`` holds the masks
of all leaves end to end, as a budget of ``num_bytes`` counts them; ``__header__`` holds
names, shapes, dtypes, the format version and a checksum of everything. Dtypes that
NumPy lacks (bfloat16) are stored as raw bits.
"""

import contextlib
import hashlib
import json
import math
import os
import secrets
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from jax.core import Tracer

from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.export.model import SparseLeaf, SparseModel, pair_masks
from sparse_optax.layers import PyTree, is_hole, leaf_names
from sparse_optax.masks.tree import unpack

VERSION = 1
_HEADER, _BITS = "__header__", "__bits__"


@boundary("save_sparse")
def save_sparse(path: str | os.PathLike, params: PyTree, masks: PyTree) -> None:
    """Writes a sparse model to a file, completely or not at all.

    Weights outside of the masks are left out, whatever their value; all others are
    stored bit by bit. The file is written under a temporary name and then moved, so
    that a failure keeps the old file.

    Args:
      path: The file; its folder must exist. No suffix is added, ``.npz`` is usual.
      params: The parameters, concrete, of any tree type.
      masks: A mask tree or an optimizer state, paired by normalised leaf name.

    Raises:
      ValueError: If the masks do not fit, a leaf is no array, or writing fails.

    Examples:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.ones(2), "w": jnp.array([[1.0, 2.0]])}
      >>> mask = {"w": jnp.array([[False, True]])}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.npz")
      ...     sparse_optax.save_sparse(path, params, mask)
      ...     sparse_optax.load_sparse(path).dense()["w"].tolist()
      [[0.0, 2.0]]
    """
    entries, members, masks_kept = [], {}, []
    for name, x, mask in pair_masks(params, masks):
        if name in (_HEADER, _BITS) or "\0" in name:
            raise ArgumentError(
                f"`params` has a leaf named {name!r}; {_HEADER!r}, "
                f"{_BITS!r} and names with a null character are reserved. "
                "Give it another name."
            )
        if isinstance(x, jax.ShapeDtypeStruct | Tracer):
            raise ArgumentError(
                f"the leaf {name!r} of `params` is abstract; a file needs "
                "its values. Call it outside jit, with concrete arrays."
            )
        array = np.asarray(x)
        if mask is not None:
            masks_kept.append(np.asarray(unpack(mask)))
            array = array[masks_kept[-1]]
        entries.append(
            {
                "name": name,
                "shape": list(x.shape),
                "dtype": x.dtype.name,
                "sparse": mask is not None,
            }
        )
        members[name] = _raw(array)
    members[_BITS] = _end_to_end(masks_kept)
    header: dict[str, Any] = {"version": VERSION, "leaves": entries}
    header["sha256"] = _checksum(header, members)
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    try:
        write_atomically(path, lambda file: _fill(file, {_HEADER: text, **members}))
    except OSError as error:
        raise ArgumentError(
            f"`path`={os.fspath(path)!r} cannot be written "
            f"({error.strerror or error}); it must name a file in an existing folder "
            "with room and permission to write. Choose another path or make the "
            "folder; what was there before is unchanged."
        ) from error


@boundary("load_sparse")
def load_sparse(path: str | os.PathLike, like: PyTree = None) -> SparseModel:
    """Reads a file of ``save_sparse`` and checks that it is complete.

    Args:
      path: The file.
      like: A tree of arrays, concrete or abstract; ``dense()`` and ``masks`` take its
        structure and types. Leaves are paired by normalised name. None: nested dicts.

    Returns:
      A ``SparseModel``.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is truncated, altered or of another format, or ``like``
        has other names, shapes or dtypes.

    Examples:
      >>> import os, tempfile
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = [jnp.array([[1.0, 2.0]])]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "model.npz")
      ...     sparse_optax.save_sparse(path, params, [jnp.array([[False, True]])])
      ...     model = sparse_optax.load_sparse(path, like=params)
      >>> model.dense()[0].tolist(), model.leaves["0"].values.tolist()
      ([[0.0, 2.0]], [2.0])
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"load_sparse: `path`={os.fspath(path)!r} does not exist. Give the path of "
            "a file that save_sparse wrote."
        ) from error
    except OSError as error:
        raise ArgumentError(
            f"`path`={os.fspath(path)!r} cannot be read "
            f"({error.strerror}). Give a readable file that save_sparse wrote."
        ) from error
    with file:
        with _intact(path):
            if not zipfile.is_zipfile(file):  # else NumPy advises to allow pickles
                raise ValueError("no npz file")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            header = json.loads(archive[_HEADER + ".npy"].tobytes())
            version = header["version"]
        if version != VERSION:
            raise ArgumentError(
                f"`path`={os.fspath(path)!r} has version {version!r} of "
                f"the format; this package reads version {VERSION}. Use a "
                "version of sparse_optax that does, or save the model again with this."
            )
        with _intact(path):
            leaves = _read(archive, header)
    if like is not None:
        _check_like(leaves, like)
    return SparseModel(leaves, like)


# --- bytes ----------------------------------------------------------------------------
def _raw(array: np.ndarray) -> np.ndarray:
    """The array in a dtype of NumPy itself, little-endian, in C order."""
    if array.dtype.kind == "V":  # such as bfloat16, which an npy header cannot name
        array = array.view(f"u{array.dtype.itemsize}")
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _end_to_end(masks: Sequence[np.ndarray]) -> np.ndarray:
    chunks, rest = [], np.zeros(0, bool)
    for mask in masks:
        bits = np.concatenate([rest, mask.reshape(-1)])
        whole = bits.size // 8 * 8
        chunks.append(np.packbits(bits[:whole]))
        rest = bits[whole:]
    return np.concatenate([*chunks, np.packbits(rest)])


def _checksum(header: dict[str, Any], members: dict[str, np.ndarray]) -> str:
    rest = {key: value for key, value in header.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for entry in header["leaves"]:
        digest.update(members[entry["name"]].tobytes())
    digest.update(members[_BITS].tobytes())
    return digest.hexdigest()


def _read(archive: Any, header: dict[str, Any]) -> dict[str, SparseLeaf]:
    # By full names: the short name of "a.npy" would be the full name of "a".
    names = [entry["name"] for entry in header["leaves"]]
    members = {name: archive[name + ".npy"] for name in [*names, _BITS]}
    if _checksum(header, members) != header["sha256"]:
        raise ValueError("the checksum differs")
    leaves, start = {}, 0
    for entry in header["leaves"]:
        shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
        values = members[entry["name"]]
        # Raw bits get back their dtype, other values the byte order of this machine.
        raw = dtype.kind == "V"
        values = values.view(dtype) if raw else values.astype(dtype, copy=False)
        mask, stored = None, shape
        if entry["sparse"]:
            stop = start + math.prod(shape)
            chunk = members[_BITS][start // 8 : -(-stop // 8)]
            bits = np.unpackbits(chunk)[start % 8 :][: stop - start]
            mask, start = bits.astype(bool).reshape(shape), stop
            stored = (np.count_nonzero(mask),)
        if values.shape != stored:
            raise ValueError(f"{entry['name']!r} has {values.shape} values")
        leaves[entry["name"]] = SparseLeaf(mask, values, shape, dtype)
    return leaves


@contextlib.contextmanager
def _intact(path: str | os.PathLike):
    try:
        yield
    except Exception as error:  # a broken file can raise anything in a reader
        raise ArgumentError(
            f"`path`={os.fspath(path)!r} is truncated, altered or was not "
            f"written by save_sparse ({type(error).__name__}: {error}). Make a new "
            "copy of the file, or save the model again."
        ) from error


def write_atomically(path: str | os.PathLike, fill: Callable[[BinaryIO], Any]) -> None:
    """Replaces a file in one step of the file system: completely or not at all."""
    real = Path(os.path.realpath(path))  # a link stays a link
    temporary = real.with_name(f".{real.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _fill(file: BinaryIO, members: dict[str, np.ndarray]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in members.items():
            # A fixed date, so that equal models give equal files.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            # Masks have few bits set and compress well. Values do not.
            info.compress_type = (
                zipfile.ZIP_DEFLATED if name == _BITS else zipfile.ZIP_STORED
            )
            with archive.open(info, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _check_like(leaves: dict[str, SparseLeaf], like: PyTree) -> None:
    flat = jax.tree.leaves(like, is_leaf=is_hole)
    names = leaf_names(like)
    there = {n: x for n, x in zip(names, flat, strict=True) if not is_hole(x)}
    if there.keys() != leaves.keys():
        raise ArgumentError(
            f"`like` lacks {sorted(leaves.keys() - there.keys())} of the "
            f"file and has {sorted(there.keys() - leaves.keys())} besides; the names "
            "must be equal. Pass the parameters of the network that was saved."
        )
    for name, x in there.items():
        wanted = leaves[name].shape, leaves[name].dtype
        got = getattr(x, "shape", None), getattr(x, "dtype", type(x).__name__)
        if got != wanted:
            raise ArgumentError(
                f"`like` has {got[1]} of shape {got[0]} for {name!r}, and "
                f"the file {wanted[1]} of shape {wanted[0]}; they must be equal. Pass "
                "the parameters of the network that was saved."
            )
