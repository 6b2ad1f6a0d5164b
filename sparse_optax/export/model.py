"""A sparse model in memory: kept values and masks by name, its size, its matrices."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.encoding import (
    DENSE,
    Row,
    Sparse,
    checked_axis,
    checked_dtype,
    dense_bytes,
    dense_row,
    encode_mask,
    file_bytes,
    is_leaf,
    key_kinds,
    leaf_of,
    most_bytes,
    named_leaves,
    suffixed,
)
from sparse_optax.layers import PyTree, is_hole
from sparse_optax.masks.optimizer_state import kept_masks, states_with
from sparse_optax.masks.tree import check_shapes, unpack


class SparseLeaf(NamedTuple):
    """One leaf of a loaded model, in NumPy arrays.

    Attributes:
      positions: Flat indices of the kept weights, ascending; None for a leaf that was
        stored whole.
      values: The kept values in this order, or the whole array. Of a random key its
        data, of a Python value the value.
      shape: Shape of the leaf.
      dtype: Its dtype; the name of the type of a random key, or of a Python value.
    """

    positions: np.ndarray | None
    values: Any
    shape: tuple[int, ...]
    dtype: Any

    @property
    def mask(self) -> np.ndarray | None:
        """Boolean array, True where a weight is kept; None for a leaf stored whole."""
        if self.positions is None:
            return None
        flat = np.zeros(math.prod(self.shape), bool)
        flat[self.positions] = True
        return flat.reshape(self.shape)

    def dense(self) -> Any:
        """The leaf as an array, missing weights zero, or as a key or Python value."""
        if self.positions is None:
            is_key = isinstance(self.dtype, str) and self.dtype in key_kinds()
            return leaf_of(self.dtype, self.values) if is_key else self.values
        flat = np.zeros(math.prod(self.shape), self.dtype)
        flat[self.positions] = self.values
        return flat.reshape(self.shape)


class SparseModel(NamedTuple):
    """A loaded model.

    Attributes:
      leaves: ``{name: SparseLeaf}`` in the order of the saved tree.
      like: The tree whose type ``dense()`` and ``masks`` have, or None for dicts.
    """

    leaves: dict[str, SparseLeaf]
    like: PyTree = None

    def dense(self) -> PyTree:
        """The tree that was saved, missing weights zero.

        Without ``like`` it is nested dicts, from names split at ``/``; indices of
        lists become keys such as ``"0"``. Arrays are jax arrays, with the sharding of
        ``like`` if it has one; without x64, 64-bit leaves stay NumPy arrays. Random
        keys, None and Python values come back as they were.
        """
        return self._tree({name: x.dense() for name, x in self.leaves.items()})

    @property
    def masks(self) -> PyTree:
        """The mask tree, with ``optax.MaskedNode()`` for leaves stored whole."""
        return self._tree({name: _mask_of(x) for name, x in self.leaves.items()})

    @boundary("to_bcsr")
    def to_bcsr(
        self,
        name: str,
        *,
        shape: tuple[int, int] | None = None,
        transpose: bool = False,
    ) -> Any:
        """One kernel as ``jax.experimental.sparse.BCSR``; kept zeros stay entries.

        JAX multiplies ``BCSR @ dense`` only: for ``y = x @ kernel`` use
        ``(model.to_bcsr(name, transpose=True) @ x.T).T``.

        Args:
          name: Name of the leaf.
          shape: Rows and columns. By default the last axis is the columns and all
            others the rows, which is inputs by outputs in flax: a convolution kernel
            (height, width, in, out) becomes (height * width * in, out). For equinox,
            (out, in, height, width), give ``(out, -1)``.
          transpose: Gives columns by rows.

        Returns:
          The matrix.

        Raises:
          ValueError: If there is no such leaf, or the shape does not fit.
        """
        data, indices, starts, size = self._csr(name, shape, transpose)
        # Imported here, since experimental parts of JAX load slowly.
        from jax.experimental import sparse

        arrays = (_to_jax(data), jnp.array(indices), jnp.array(starts))
        return sparse.BCSR(arrays, shape=size)

    @boundary("to_csr")
    def to_csr(
        self,
        name: str,
        *,
        shape: tuple[int, int] | None = None,
        transpose: bool = False,
    ) -> Any:
        """One kernel as ``scipy.sparse.csr_matrix``; kept zeros stay entries.

        SciPy has no 8-bit and 16-bit floats; such values become float32, exactly.

        Args:
          name: Name of the leaf.
          shape: See ``to_bcsr``.
          transpose: See ``to_bcsr``.

        Returns:
          The matrix.

        Raises:
          ValueError: If there is no such leaf, or the shape does not fit.
          ImportError: If SciPy is not installed.
        """
        data, indices, starts, size = self._csr(name, shape, transpose)
        try:
            import scipy.sparse
        except ImportError as error:
            raise ImportError(
                f"to_csr: the matrix of {name!r} needs SciPy, which cannot be imported "
                f"({error}). Install it with `pip install scipy`, or use to_bcsr."
            ) from error
        return scipy.sparse.csr_matrix((widened(data), indices, starts), shape=size)

    @boundary("load_sparse")
    def _tree(self, values: dict[str, Any]) -> PyTree:
        if self.like is None:
            return _nest({name: _place(value, None) for name, value in values.items()})
        # None is a leaf of the file, and a part of the structure of a tree.
        named = dict(named_leaves(self.like))
        placed = iter([_place(values[name], x) for name, x in named.items()])
        flat, structure = jax.tree.flatten(self.like, is_leaf=is_leaf)
        return jax.tree.unflatten(
            structure, [x if is_hole(x) else next(placed) for x in flat]
        )

    def _csr(self, name, shape, transpose):
        leaf = self.leaves.get(name)
        if leaf is None or isinstance(leaf.dtype, str):
            arrays = [n for n, x in self.leaves.items() if not isinstance(x.dtype, str)]
            raise ArgumentError(
                f"`name`={name!r} is no array of the model; it must be one of "
                f"{arrays}. Give one of these names."
            )
        if shape is None:
            last = leaf.shape[-1] if leaf.shape else 1
            shape = (math.prod(leaf.shape[:-1]), last)
        size, positions = math.prod(leaf.shape), leaf.positions
        try:
            if len(leaf.shape) < 2 or len(shape) != 2:
                raise ValueError("two dimensions are needed")
            # The shape of a view of one number: nothing is allocated.
            shape = np.broadcast_to(False, size).reshape(shape).shape
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"`shape`={shape!r} does not make a matrix of the leaf "
                f"{name!r} of shape {leaf.shape} ({error}); it must be two numbers "
                f"whose product is {size}, of a leaf of two or more dimensions. "
                "Give (rows, columns)."
            ) from error
        flat = np.arange(size) if positions is None else positions.astype(np.int64)
        rows, columns = np.divmod(flat, max(shape[1], 1))
        data = leaf.values.reshape(-1)
        if transpose:
            order = np.argsort(columns, kind="stable")
            rows, columns, data = columns[order], rows[order], data[order]
            shape = shape[::-1]
        starts = np.searchsorted(rows, np.arange(shape[0] + 1))
        index = np.int32 if max(*shape, len(data)) < 2**31 else np.int64
        return data, columns.astype(index), starts.astype(index), shape


def _mask_of(leaf: SparseLeaf) -> Any:
    """What a mask tree holds for a leaf."""
    if leaf.positions is None:
        return None if leaf.dtype == "None" else optax.MaskedNode()
    return leaf.mask


def widened(values: np.ndarray) -> np.ndarray:
    """Values as SciPy takes them: floats of 8 and 16 bits become float32, exactly."""
    narrow = values.dtype.itemsize < 4 and jnp.issubdtype(values.dtype, jnp.floating)
    return values.astype(np.float32) if narrow else values


def by_parameter(masks: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Masks under the names of the parameters, all of which must be there."""
    named = dict(zip(suffixed(masks, names), masks.values(), strict=True))
    if unknown := sorted(named.keys() - set(names)):
        raise ArgumentError(
            f"`masks` holds {unknown}, which `params` does not; the "
            f"parameters are {list(names)}. Pass masks made for these parameters."
        )
    return named


def pair_masks(params: PyTree, masks: PyTree) -> list[tuple[str, Any, Any]]:
    """Name, leaf and mask (or None) of every leaf of params that is no hole."""
    _refuse_gsm(masks)
    leaves = named_leaves(params)
    names = [name for name, _ in leaves]
    named = by_parameter(kept_masks(masks), names)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArgumentError(
            f"several leaves of `params` are named {twice}; each name must "
            "stand once. Rename keys that hold a slash."
        )
    for name, x in leaves:
        row = dense_row(name, x)  # raises for what a file cannot hold
        if (mask := named.get(name)) is None:
            continue
        if row.kind != DENSE:
            raise ArgumentError(
                f"`masks` has a mask for {name!r}, which is no array of numbers in "
                "`params`; only arrays can be sparse. Take it out of `masks`."
            )
        check_shapes([mask], [x], [name])
    return [(name, x, named.get(name)) for name, x in leaves]


def _refuse_gsm(masks: PyTree) -> None:
    """A state of GSM has no masks; what is cut is chosen after training."""
    masked = any(True for _ in states_with(masks, "regrow_masks"))
    if not masked and any(True for _ in states_with(masks, "gsm_threshold")):
        raise ArgumentError(
            "`masks` is a state of GSM, which lets gradients pass and masks no weight; "
            "it must be a mask tree or the state of a method that has masks. Cut "
            "first: masks = sparse_optax.masks.magnitude_masks(params, density), "
            "params = sparse_optax.sparsify(params, masks). Then pass these masks."
        )


def stored_bytes(layers: Iterable[tuple[int, int, int]]) -> int:
    """Bytes that sparse layers take at most in a file: the kept values and their
    positions. A layer is its number of weights, the number kept, and the bytes of one
    weight.
    """
    return sum(most_bytes(size, kept) + kept * width for size, kept, width in layers)


def encode_leaves(
    params: PyTree, masks: PyTree, dtype: Any, unit_axis: int
) -> list[tuple[Row | Sparse, Any, np.ndarray | None]]:
    """The row of each leaf, or the row and the positions; the leaf; its mask."""
    dtype, unit_axis = checked_dtype(dtype), checked_axis(unit_axis)
    found = []
    for name, x, mask in pair_masks(params, masks):
        if mask is None:
            found.append((dense_row(name, x), x, None))
            continue
        kept = np.asarray(unpack(mask))
        found.append((encode_mask(name, x, kept, dtype, unit_axis), x, kept))
    return found


@boundary("sparse_bytes")
def sparse_bytes(
    params: PyTree, masks: PyTree, *, dtype: Any = None, unit_axis: int = -1
) -> int:
    """Bytes of the file that ``save_sparse`` would write.

    Args:
      params: The parameters, concrete or abstract, with all else that is saved.
      masks: A concrete mask tree, or an optimizer state that holds one.
      dtype: See ``save_sparse``.
      unit_axis: See ``save_sparse``.

    Returns:
      Bytes of the whole file: kept values, their positions, leaves without a mask,
      header and checksum.

    Raises:
      ValueError: If the masks do not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.ones(3), "w": jnp.ones((3, 3))}
      >>> mask = {"w": jnp.eye(3, dtype=bool)}
      >>> sparse_optax.export.sparse_bytes(params, mask)
      257
    """
    leaves = encode_leaves(params, masks, dtype, unit_axis)
    rows = [x.row if isinstance(x, Sparse) else x for x, _, _ in leaves]
    sizes = (
        x.nbytes if isinstance(x, Sparse) else dense_bytes(x) for x, _, _ in leaves
    )
    return file_bytes(rows, sum(sizes))


# --- trees ----------------------------------------------------------------------------
def _to_jax(x: np.ndarray) -> Any:
    # Without x64 JAX would round 64 bits to 32.
    return jnp.array(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x


def _place(value: Any, like: Any) -> Any:
    """A value on the devices of its leaf."""
    sharding = getattr(like, "sharding", None)
    if not hasattr(value, "dtype"):  # a hole, None or a Python value
        return value
    if sharding is not None:
        return jax.device_put(value, sharding)
    return _to_jax(value) if isinstance(value, np.ndarray) else value


def _nest(values: dict[str, Any]) -> PyTree:
    if list(values) == [""]:
        return values[""]
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise ArgumentError(
                f"the leaf {name!r} and another one cannot both stand in "
                "nested dicts; no name may be the beginning of another. Pass `like`."
            )
        node[last] = value
    return tree
