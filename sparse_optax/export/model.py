"""A sparse model in memory: kept values and masks by name, its size, its matrices."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import PyTree, is_hole, leaf_names
from sparse_optax.masks.optimizer_state import named_masks
from sparse_optax.masks.tree import check_shapes, unpack, whole_count


class SparseLeaf(NamedTuple):
    """One leaf of a loaded model, in NumPy arrays.

    Attributes:
      mask: Boolean array, True where a weight is kept; None for a leaf stored whole.
      values: The kept values in flat order, or the whole array.
      shape: Shape of the leaf.
      dtype: Its dtype.
    """

    mask: np.ndarray | None
    values: np.ndarray
    shape: tuple[int, ...]
    dtype: np.dtype

    def dense(self) -> np.ndarray:
        """The leaf as an array, missing weights zero."""
        if self.mask is None:
            return self.values
        full = np.zeros(self.shape, self.dtype)
        full[self.mask] = self.values
        return full


class SparseModel(NamedTuple):
    """A loaded model.

    Attributes:
      leaves: ``{name: SparseLeaf}`` in the order of the saved tree.
      like: The tree whose type ``dense()`` and ``masks`` have, or None for dicts.
    """

    leaves: dict[str, SparseLeaf]
    like: PyTree = None

    def dense(self) -> PyTree:
        """The parameters, missing weights zero.

        Without ``like`` they are nested dicts, from names split at ``/``; indices of
        lists become keys such as ``"0"``. Leaves are jax arrays, with the sharding of
        ``like`` if it has one; without x64, 64-bit leaves stay NumPy arrays.
        """
        return self._tree({name: x.dense() for name, x in self.leaves.items()})

    @property
    def masks(self) -> PyTree:
        """The mask tree, with ``optax.MaskedNode()`` for leaves stored whole."""
        hole = optax.MaskedNode()
        return self._tree(
            {n: hole if x.mask is None else x.mask for n, x in self.leaves.items()}
        )

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
        if data.dtype.itemsize < 4 and jnp.issubdtype(data.dtype, jnp.floating):
            data = data.astype(np.float32)
        return scipy.sparse.csr_matrix((data, indices, starts), shape=size)

    @boundary("load_sparse")
    def _tree(self, values: dict[str, Any]) -> PyTree:
        if self.like is None:
            return _nest({name: _place(value, None) for name, value in values.items()})
        flat, structure = jax.tree.flatten(self.like, is_leaf=is_hole)
        return jax.tree.unflatten(
            structure,
            [
                x if is_hole(x) else _place(values[name], x)
                for name, x in zip(leaf_names(self.like), flat, strict=True)
            ],
        )

    def _csr(self, name, shape, transpose):
        leaf = self.leaves.get(name)
        if leaf is None:
            raise ArgumentError(
                f"`name`={name!r} is no leaf of the model; it must be one of "
                f"{list(self.leaves)}. Give one of these names."
            )
        if shape is None:
            last = leaf.shape[-1] if leaf.shape else 1
            shape = (math.prod(leaf.shape[:-1]), last)
        mask = np.ones(leaf.shape, bool) if leaf.mask is None else leaf.mask
        try:
            if len(leaf.shape) < 2 or len(shape) != 2:
                raise ValueError("two dimensions are needed")
            matrix = mask.reshape(shape)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"`shape`={shape!r} does not make a matrix of the leaf "
                f"{name!r} of shape {leaf.shape} ({error}); it must be two numbers "
                f"whose product is {mask.size}, of a leaf of two or more dimensions. "
                "Give (rows, columns)."
            ) from error
        rows, columns = np.nonzero(matrix)
        data, size = leaf.values.reshape(-1), matrix.shape
        if transpose:
            order = np.argsort(columns, kind="stable")
            rows, columns, data = columns[order], rows[order], data[order]
            size = size[::-1]
        starts = np.searchsorted(rows, np.arange(size[0] + 1))
        index = np.int32 if max(*size, len(data)) < 2**31 else np.int64
        return data, columns.astype(index), starts.astype(index), size


def pair_masks(params: PyTree, masks: PyTree) -> list[tuple[str, Any, Any]]:
    """Name, leaf and mask (or None) of every leaf of params that is no hole."""
    named = named_masks(masks)
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    pairs = [
        (name, x, named.pop(name, None))
        for name, x in zip(leaf_names(params), flat, strict=True)
        if not is_hole(x)
    ]
    names = [name for name, _, _ in pairs]
    if named:
        raise ArgumentError(
            f"`masks` holds {sorted(named)}, which `params` does not; the "
            f"parameters are {names}. Pass masks made for these parameters."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ArgumentError(
            f"several leaves of `params` are named {twice}; each name must "
            "stand once. Rename keys that hold a slash."
        )
    for name, x, mask in pairs:
        dtype = getattr(x, "dtype", None)
        kinds = (np.number, np.bool_)
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in kinds):
            raise ArgumentError(
                f"the leaf {name!r} of `params` is of type "
                f"{dtype or type(x).__name__}; every leaf must be an array of numbers. "
                "Leave it out, as eqx.filter(model, eqx.is_array) does, or convert it: "
                "a random key by jax.random.key_data."
            )
        if mask is not None:
            check_shapes([mask], [x], [name])
    return pairs


def stored_bytes(layers: Iterable[tuple[int, int, int]]) -> int:
    """Bytes of sparse layers: one bit per weight end to end, and the kept values. A
    layer is its number of weights, the number kept, and the bytes of one weight.
    """
    layers = list(layers)
    bits = sum(weights for weights, _, _ in layers)
    return -(-bits // 8) + sum(kept * width for _, kept, width in layers)


@boundary("sparse_bytes")
def sparse_bytes(params: PyTree, masks: PyTree) -> int:
    """Bytes of a sparse model as stored by ``save_sparse``, without the container.

    The container adds a header, a few hundred bytes per leaf, and compresses masks.

    Args:
      params: The parameters, concrete or abstract.
      masks: A concrete mask tree, or an optimizer state that holds one.

    Returns:
      Bytes of mask bits, of kept values and of leaves without a mask.

    Raises:
      ValueError: If the masks do not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.ones(3), "w": jnp.ones((3, 3))}
      >>> sparse_optax.export.sparse_bytes(params, {"w": jnp.eye(3, dtype=bool)})
      26
    """
    layers, whole = [], 0
    for _, x, mask in pair_masks(params, masks):
        size, width = math.prod(x.shape), x.dtype.itemsize
        if mask is None:
            whole += size * width
        else:
            layers.append((size, whole_count(jnp.asarray(unpack(mask))), width))
    return whole + stored_bytes(layers)


# --- trees ----------------------------------------------------------------------------
def _to_jax(x: np.ndarray) -> Any:
    # Without x64 JAX would round 64 bits to 32.
    return jnp.array(x) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype else x


def _place(value: Any, like: Any) -> Any:
    """A value on the devices of its leaf."""
    sharding = getattr(like, "sharding", None)
    if is_hole(value) or sharding is None:
        return value if is_hole(value) else _to_jax(value)
    return jax.device_put(value, sharding)


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
