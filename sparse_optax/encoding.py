"""How the leaves of a sparse model become bytes, and how many bytes they become.

The file of ``save_sparse`` is made of these parts. docs/file-format.md describes it.

- The *positions* of the kept weights of a leaf are the gaps between them, by a Rice
  code: the upper part of each gap in unary, its ``low`` lower bits as they are. With
  ``low`` = 0 this is a bitmap. If more weights are kept than not, the missing ones may
  be coded instead. Rows, columns or slices without a kept weight may be left out
  before: then a bitmap for each such axis says which indices are alive.
- The *values* are those of the kept weights in flat order, in the dtype of the leaf, as
  float16 or bfloat16, or as int8 with one float32 scale for each output unit.

Everything here runs on the host, in NumPy.
"""

import contextlib
import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import checks
from sparse_optax.checks import ArgumentError
from sparse_optax.layers import PyTree, is_hole, path_name

MAGIC = b"SPARSE"
VERSION = 1
# A file starts with the magic, the version, a space and the header, and a line break;
# it ends with a checksum.
AROUND = len(MAGIC) + len(f"{VERSION} \n") + 32

# What `dtype` may be.
DTYPES = ("float16", "bfloat16", "int8")
# Kinds of leaves that are arrays; other kinds are those of keys and Python values.
SPARSE, DENSE = "sparse", "dense"
# Larger shapes than these are in no array of NumPy.
_RANK, _SIZE = 64, 2**60


class Row(NamedTuple):
    """What the header says about a leaf; a column of the header for each field."""

    name: str  # normalised
    kind: str  # "sparse", "dense", the dtype of a random key, a Python type
    shape: tuple[int, ...]  # of the array
    dtype: str  # of the array
    stored: str | None = None  # dtype of the stored values, if it is another one
    live: tuple[int, ...] = ()  # axes with a bitmap of live indices
    low: int = 0  # lower bits of a gap
    high: int = 0  # bits of the upper parts of all gaps
    missing: int = 1  # 1 if the missing weights are coded: none for a dense leaf
    axis: int | None = None  # axis of the units that have a scale

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def header_text(rows: Sequence[Row]) -> bytes:
    """The header: JSON in ASCII, one list for each field of the rows."""
    columns = zip(*rows, strict=True) if rows else [()] * len(Row._fields)
    lists = dict(zip(Row._fields, map(list, columns), strict=True))
    return json.dumps(lists, separators=(",", ":")).encode("ascii")


def file_bytes(rows: Sequence[Row], payload: int) -> int:
    """Bytes of a file with these rows and so many bytes of positions and values."""
    return AROUND + len(header_text(rows)) + payload


# --- leaves ---------------------------------------------------------------------------
def is_leaf(node: Any) -> bool:
    """Whether a node is stored as one leaf although JAX sees none: a hole, or None."""
    return node is None or is_hole(node)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Normalised names and leaves in leaf order, None included and holes left out."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return [(path_name(path), leaf) for path, leaf in paths if not is_hole(leaf)]


def suffixed(names: Iterable[str], tree: Iterable[str]) -> list[str]:
    """Names as they stand in a tree, if all are those of one of its parts:
    ``"params/Dense_0/kernel"`` for ``"Dense_0/kernel"``. If not, the names.
    """
    names, there = list(names), set(tree)
    if "" in names or there.issuperset(names):
        return names
    parts = {x.removesuffix(names[0]) for x in there if x.endswith("/" + names[0])}
    fits = [part for part in parts if there.issuperset(part + x for x in names)]
    return [fits[0] + x for x in names] if len(fits) == 1 else names


@functools.cache
def key_kinds() -> dict[str, tuple[str, int]]:
    """Implementation and number of words of the random keys of JAX, by dtype."""
    found = {}
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        key = jax.eval_shape(functools.partial(jax.random.key, 0, impl=impl))
        found[key.dtype.name] = (impl, jax.eval_shape(jax.random.key_data, key).size)
    return found


def dtype_named(name: Any) -> np.dtype | None:
    """The dtype of numbers with this name, or None."""
    if not isinstance(name, str) or not re.fullmatch(r"bool|b?[a-z]+\d\w*", name):
        return None
    try:
        dtype = np.dtype(name)
    except (TypeError, ValueError):
        return None
    # Long doubles differ between machines; kind V is also that of bfloat16.
    exotic = dtype.type in (np.void, np.longdouble, np.clongdouble)
    return None if exotic or dtype.name != name or dtype.kind not in "biufcV" else dtype


# Python values as arrays, and back. Sizes of integers and texts are those of the value.
_PYTHON: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "None": (type(None), lambda x: np.zeros(0, np.uint8), lambda a: None),
    "bool": (bool, lambda x: np.array(x, np.bool_), lambda a: bool(a)),
    "int": (
        int,
        lambda x: np.frombuffer(
            x.to_bytes(x.bit_length() // 8 + 1, "little", signed=True), np.uint8
        ),
        lambda a: int.from_bytes(a.tobytes(), "little", signed=True),
    ),
    "float": (float, lambda x: np.array(x, np.float64), lambda a: float(a)),
    "complex": (complex, lambda x: np.array(x, np.complex128), lambda a: complex(a)),
    "str": (
        str,
        lambda x: np.frombuffer(x.encode("utf-8", "surrogatepass"), np.uint8),
        lambda a: a.tobytes().decode("utf-8", "surrogatepass"),
    ),
}


def kind_of(leaf: Any) -> tuple[str, tuple[int, ...], str] | None:
    """Kind, shape and dtype of a leaf as users see them; None if it cannot be stored.
    The dtype of a Python value is the name of its type.
    """
    for kind, (python, _, _) in _PYTHON.items():
        if type(leaf) is python:
            return kind, (), kind
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    name = getattr(dtype, "name", None)
    if name in key_kinds():
        return name, tuple(shape), name  # type: ignore[arg-type]
    if dtype_named(name) is None or shape is None:
        return None
    return DENSE, tuple(shape), name  # type: ignore[return-value]


def dense_row(name: str, leaf: Any, argument: str = "params") -> Row:
    """The row of a leaf that is stored whole, concrete or abstract."""
    found = kind_of(leaf)
    if found is None:
        dtype = getattr(leaf, "dtype", None)
        raise ArgumentError(
            f"the leaf {name!r} of `{argument}` is of type "
            f"{dtype or type(leaf).__name__}, which a file cannot hold; every leaf "
            "must be an array of numbers, a random key, None, or a Python number or "
            "text. Leave it out, as eqx.filter(model, eqx.is_array) does, or convert "
            "it with np.asarray(leaf, dtype)."
        )
    kind, shape, dtype = found
    if kind in _PYTHON:
        array = _PYTHON[kind][1](leaf)
        return Row(name, kind, array.shape, array.dtype.name)
    if kind == DENSE:
        return Row(name, kind, shape, dtype)
    return Row(name, kind, (*shape, key_kinds()[kind][1]), "uint32")


def array_of(leaf: Any) -> np.ndarray:
    """The stored array of a concrete leaf, in the byte order of this machine."""
    kind = kind_of(leaf)
    assert kind is not None
    if kind[0] in _PYTHON:
        return _PYTHON[kind[0]][1](leaf)
    array = np.asarray(leaf if kind[0] == DENSE else jax.random.key_data(leaf))
    return np.asarray(array, array.dtype.newbyteorder("="))


def leaf_of(kind: str, array: np.ndarray) -> Any:
    """The leaf of a stored array, the inverse of ``array_of``."""
    if kind == DENSE:
        return array
    if kind in _PYTHON:
        return _PYTHON[kind][2](array)
    return jax.random.wrap_key_data(jnp.asarray(array), impl=key_kinds()[kind][0])


# --- positions ------------------------------------------------------------------------
class Positions(NamedTuple):
    """The coded positions of the kept weights of a leaf."""

    kept: int
    low: int
    high: int
    parts: tuple[np.ndarray, ...]  # bytes: bitmaps of live indices, then both codes
    missing: int = 0
    live: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the code."""
        return sum(part.nbytes for part in self.parts)


def encode_positions(mask: np.ndarray) -> Positions:
    """The smallest code of a mask among a few."""
    best = _encode_flat(mask.reshape(-1))
    alive, inner = {}, mask
    for axis, length in enumerate(mask.shape if best.kept else ()):
        others = tuple(i for i in range(mask.ndim) if i != axis)
        indices = mask.any(axis=others)
        # Without dead indices each position takes fewer bits, and a bitmap is added.
        if best.kept * math.log2(length / np.count_nonzero(indices)) > length:
            alive[axis] = indices
            inner = np.compress(indices, inner, axis)
    if not alive:
        return best
    code = _encode_flat(inner.reshape(-1))
    maps = tuple(np.packbits(indices) for indices in alive.values())
    code = code._replace(live=tuple(alive), parts=(*maps, *code.parts))
    # The axes take room in the header.
    return code if code.nbytes + 2 * len(alive) < best.nbytes else best


def _encode_flat(mask: np.ndarray) -> Positions:
    kept = np.flatnonzero(mask)
    best = _encode_gaps(kept, mask.size)
    if 2 * len(kept) > mask.size:
        code = _encode_gaps(np.flatnonzero(~mask), mask.size)
        if code.nbytes < best.nbytes:
            best = code._replace(kept=len(kept), missing=1)
    return best


def _encode_gaps(positions: np.ndarray, size: int) -> Positions:
    """Ascending positions among so many, with the best number of lower bits."""
    count = len(positions)
    gaps = np.diff(positions, prepend=-1) - 1
    middle = _low_bits(size, count)
    sizes = []
    for low in {0, max(middle - 1, 0), middle, middle + 1}:
        upper = count + int(np.sum(gaps >> low))
        sizes.append((bit_bytes(upper) + bit_bytes(low * count), low, upper))
    _, low, upper = min(sizes)
    ones = np.zeros(upper, np.uint8)
    ones[np.cumsum((gaps >> low) + 1) - 1] = 1
    lower = np.empty((low, count), np.uint8)
    for bit in range(low):
        lower[bit] = gaps >> bit & 1
    return Positions(count, low, upper, (np.packbits(ones), np.packbits(lower)))


def bit_bytes(bits: int) -> int:
    """Bytes that hold so many bits."""
    return -(-bits // 8)


def _low_bits(size: int, kept: int) -> int:
    """The number of lower bits with the smallest bound on the bytes."""
    return min(
        range(max(size, 1).bit_length()),
        key=lambda low: _most_bytes(size, kept, low),
    )


def _most_bytes(size: int, kept: int, low: int) -> int:
    # The gaps add up to at most the number of missing weights.
    return bit_bytes(kept + (size - kept >> low)) + bit_bytes(kept * low)


def most_bytes(size: int, kept: int) -> int:
    """Bytes that the positions of any ``kept`` of ``size`` weights take at most. At a
    density of 5% they are 0.77 for a kept weight, 0.72 if it is random, and 2.5 with a
    bitmap.
    """
    return _most_bytes(size, kept, _low_bits(size, kept))


# --- values ---------------------------------------------------------------------------
class Sparse(NamedTuple):
    """A leaf with a mask, without its values."""

    row: Row
    code: Positions
    units: int  # that have a scale

    @property
    def nbytes(self) -> int:
        """Bytes of positions and values."""
        width = np.dtype(self.row.stored or self.row.dtype).itemsize
        return self.code.nbytes + 4 * self.units + width * self.code.kept


def encode_mask(
    name: str, leaf: Any, mask: np.ndarray, dtype: str | None, unit_axis: int
) -> Sparse:
    """The row and the positions of a leaf, concrete or abstract."""
    code, row = encode_positions(mask), dense_row(name, leaf)
    fields = {
        field: getattr(code, field) for field in ("live", "low", "high", "missing")
    }
    row = row._replace(kind=SPARSE, **fields)
    whole = Sparse(row, code, 0)
    stored, axis = stored_as(row, dtype, unit_axis)
    if stored is None:
        return whole
    units = 0 if axis is None else row.shape[axis]
    short = Sparse(row._replace(stored=stored, axis=axis), code, units)
    # Few weights do not make up for their scales.
    return short if short.nbytes < whole.nbytes else whole


def checked_dtype(dtype: Any) -> str | None:
    """The name of the dtype that values may be stored as."""
    if dtype is None:
        return None
    name = ""
    # An array is no dtype, although NumPy takes it for its own.
    if not isinstance(dtype, np.ndarray | np.generic | jax.Array):
        with contextlib.suppress(TypeError, ValueError):
            name = np.dtype(dtype).name
    if name not in DTYPES:
        cure = "Leave it out to store every value as it is."
        checks.fail("dtype", dtype, " or ".join([*map(repr, DTYPES), "None"]), cure)
    return name


def checked_axis(unit_axis: Any) -> int:
    """An axis as a Python integer."""
    cure = "Give -1, or 0 for equinox."
    checks.whole("unit_axis", unit_axis, -_RANK, _RANK - 1, static=True, cure=cure)
    return int(unit_axis)


def stored_as(
    row: Row, dtype: str | None, unit_axis: int
) -> tuple[str | None, int | None]:
    """The dtype that the values of a sparse leaf are stored as, None if it is the
    leaf's own, and the axis of the units that have a scale.
    """
    own = np.dtype(row.dtype)
    if dtype is None or not jnp.issubdtype(own, jnp.floating) or not row.shape:
        return None, None
    if np.dtype(dtype).itemsize >= own.itemsize:
        return None, None
    if dtype != "int8":
        return dtype, None
    rank = len(row.shape)
    if not -rank <= unit_axis < rank:
        raise ArgumentError(
            f"`unit_axis`={unit_axis} does not fit {row.name!r} of shape {row.shape}; "
            f"it must be in [{-rank}, {rank - 1}]. Give the axis of output units, -1 "
            "in flax and haiku, 0 in equinox."
        )
    return dtype, unit_axis % rank


def encode_values(sparse: Sparse, array: np.ndarray, mask: np.ndarray) -> list[Any]:
    """The kept values as the row says, as arrays in the order of the file."""
    row, values = sparse.row, array[mask]
    index = None
    if row.stored is None:
        return [values]
    if row.axis is None:
        with np.errstate(over="ignore"):
            parts = [values.astype(np.dtype(row.stored))]
    else:
        index = np.nonzero(mask)[row.axis]
        scales = np.zeros(row.shape[row.axis], np.float32)
        wide = values.astype(np.float32)
        if lost := int(np.count_nonzero(~np.isfinite(wide))):
            _refuse(row, lost, "that are not finite")
        np.maximum.at(scales, index, np.abs(wide))
        scales /= np.float32(127)
        with np.errstate(all="ignore"):  # a unit of zeros
            steps = np.where(scales[index] > 0, wide / scales[index], 0)
            parts = [scales, np.clip(np.rint(steps), -127, 127).astype(np.int8)]
    with np.errstate(over="ignore"):
        loaded = _decoded(row, parts, index)
    lost = np.isfinite(values) & ~np.isfinite(loaded)
    if lost.any():
        _refuse(row, int(lost.sum()), f"too large for {row.stored}")
    return parts


def _refuse(row: Row, count: int, why: str) -> None:
    cure = "dtype='bfloat16', which has nearly the range of float32, or dtype=None"
    raise ArgumentError(
        f"`dtype`={row.stored!r} cannot hold {count} weights of {row.name!r} {why}; "
        "all must come back as finite numbers. Use "
        f"{'dtype=None' if row.stored == 'bfloat16' else cure}."
    )


def _decoded(
    row: Row, parts: Sequence[np.ndarray], units: np.ndarray | None
) -> np.ndarray:
    """Values in the dtype of the leaf; ``units`` says which scale a value has."""
    *scales, values = parts
    if scales:
        values = values * scales[0][units]
    return values.astype(np.dtype(row.dtype))


# --- reading --------------------------------------------------------------------------
class Reader:
    """Takes bytes from the front of a buffer, never more than there are."""

    def __init__(self, data: memoryview):
        """Starts at the first byte."""
        self._data = data

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return len(self._data)

    def take(self, count: int, dtype: Any = np.uint8) -> np.ndarray:
        """So many numbers, as a copy."""
        dtype = np.dtype(dtype)
        size = count * dtype.itemsize
        if size > self.left:
            raise ValueError(f"{size} bytes are wanted, {self.left} are left")
        taken, self._data = self._data[:size], self._data[size:]
        if dtype == np.bool_:
            numbers = np.frombuffer(taken, np.uint8)
            if numbers.size and numbers.max() > 1:
                raise ValueError("a bool is neither 0 nor 1")
            return numbers.astype(np.bool_)
        return np.frombuffer(taken, np.uint8).copy().view(dtype)

    def bits(self, count: int) -> np.ndarray:
        """So many bits, from whole bytes."""
        return np.unpackbits(self.take(bit_bytes(count)), count=count)


def rows_of(text: bytes) -> list[Row]:
    """The rows of a header, checked."""
    # Numbers of thousands of digits would take long to read.
    columns = json.loads(text, parse_int=_short, parse_float=_short)
    if list(columns) != list(Row._fields):
        raise ValueError("the header has other columns")
    rows = [_checked_row(Row(*row)) for row in zip(*columns.values(), strict=True)]
    if len({row.name for row in rows}) != len(rows):
        raise ValueError("two leaves have one name")
    return rows


def _short(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError("a number is too long")
    return int(digits)


def _checked_row(row: Row) -> Row:
    """The row with tuples; raises unless it may be that of a leaf."""
    row = row._replace(shape=_numbers(row.shape), live=_numbers(row.live))
    shape, rank = row.shape, len(row.shape)
    size = 1
    for length in shape:  # a product of many large numbers would take long
        size *= max(length, 1)
        if rank > _RANK or size > _SIZE:
            raise ValueError("a shape is too large")
    if dtype_named(row.dtype) is None or not isinstance(row.name, str):
        raise ValueError("a leaf without a name or a dtype")
    _numbers([row.low, row.high, row.missing])
    if row.kind == SPARSE:
        right = row.low < _SIZE.bit_length() and row.missing <= 1
        right &= list(row.live) == sorted({i for i in row.live if i < rank})
        right &= row.stored in (None, *DTYPES)
        axes = (None,) if row.stored != "int8" else range(rank)
        right &= row.axis in axes
    else:
        plain = Row(row.name, row.kind, shape, row.dtype)
        right = row == plain and _has_kind(row)
    if not right:
        raise ValueError(f"the leaf {row.name!r} has an impossible code")
    return row


def _numbers(values: Any) -> tuple[int, ...]:
    """A list of whole numbers as a tuple."""
    if not all(type(x) is int and 0 <= x <= _SIZE for x in values):
        raise ValueError("a number is out of range")
    return tuple(values)


def _has_kind(row: Row) -> bool:
    """Whether shape and dtype are those of the kind."""
    kind, shape, dtype = row.kind, row.shape, row.dtype
    if kind in key_kinds():
        return dtype == "uint32" and shape[-1:] == (key_kinds()[kind][1],)
    if kind in ("int", "str", "None"):
        return (
            dtype == "uint8" and len(shape) == 1 and (kind != "None" or shape == (0,))
        )
    plain = {"bool": "bool", "float": "float64", "complex": "complex128"}
    return kind == DENSE or (dtype == plain.get(kind) and not shape)


def dense_bytes(row: Row) -> int:
    """Bytes of the whole array."""
    return row.size * np.dtype(row.dtype).itemsize


def read_dense(row: Row, reader: Reader) -> np.ndarray:
    """The array of a leaf that is stored whole."""
    return reader.take(row.size, row.dtype).reshape(row.shape)


def read_sparse(row: Row, reader: Reader) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions, ascending, and values of a leaf with a mask. Takes memory in
    proportion to the bytes that are read, whatever the shape.
    """
    alive = {i: np.flatnonzero(reader.bits(row.shape[i])) for i in row.live}
    shape = [len(alive[i]) if i in alive else n for i, n in enumerate(row.shape)]
    size = math.prod(shape)
    inner = _read_gaps(reader, row.high, row.low, size)
    if row.missing:
        # As many values must follow, so that the file bounds the memory.
        if size - len(inner) > reader.left:
            raise ValueError(f"{row.name!r} has fewer values than kept weights")
        kept = np.ones(size, bool)
        kept[inner] = False
        inner = np.flatnonzero(kept)
    if alive and len(inner):
        index = list(np.unravel_index(inner, shape))
        for axis, indices in alive.items():
            index[axis] = indices[index[axis]]
        inner = np.ravel_multi_index(index, row.shape)
    parts, units = [], None
    if row.axis is not None:
        parts.append(reader.take(row.shape[row.axis], np.float32))
        units = inner // math.prod(row.shape[row.axis + 1 :]) % row.shape[row.axis]
    parts.append(reader.take(len(inner), row.stored or row.dtype))
    values = _decoded(row, parts, units)
    small = row.size <= 2**32
    return inner.astype(np.uint32 if small else np.int64), values


def _read_gaps(reader: Reader, high: int, low: int, size: int) -> np.ndarray:
    """Ascending positions among so many."""
    ones = np.flatnonzero(reader.bits(high))
    count = len(ones)
    gaps = np.diff(ones, prepend=-1) - 1
    if count and gaps.max() > size >> low:
        raise ValueError("a position outside of the leaf")
    gaps <<= low
    lower = reader.bits(low * count).reshape(low, count)
    for bit in range(low):
        gaps |= lower[bit].astype(np.int64) << bit
    # In floats first: the sum of crafted gaps may pass 2^63.
    if count and float(np.sum(gaps, dtype=np.float64)) + count > 2 * size:
        raise ValueError("positions outside of the leaf")
    positions = np.cumsum(gaps + 1) - 1
    if count and positions[-1] >= size:
        raise ValueError("a position outside of the leaf")
    return positions
