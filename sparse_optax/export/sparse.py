"""``to_sparse``: sparse matrices in place of dense layers, where they are faster here.

A product with a sparse matrix computes less, and less regularly. Where it wins depends
on density, sizes, batch and machine, so it is measured.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.export.compaction.program import Equation, Program, Value, trace
from sparse_optax.export.model import by_parameter, widened
from sparse_optax.export.timing import least_seconds
from sparse_optax.layers import PyTree, array_names, is_abstract
from sparse_optax.masks.make import random_masks
from sparse_optax.masks.optimizer_state import named_masks
from sparse_optax.masks.tree import unpack

# No other form than the dense one is tried above this density.
MOST = 0.2
# A form must be faster than dense by this factor: measurements scatter.
GAIN = 1.05
# What JAX has a product with sparse matrices for, on a CPU.
_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


# --- the forms ------------------------------------------------------------------------
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "inputs", "outputs"],
    meta_fields=["shape", "flipped"],
)
@dataclasses.dataclass(frozen=True)
class ReducedKernel:
    """A kernel without the inputs and outputs that have no weight.

    Attributes:
      kernel: What is left of it, (inputs, outputs).
      inputs: Which inputs are left, an int32 array, or None for all.
      outputs: Which outputs are left, or None for all.
      shape: The shape of the whole kernel, (inputs, outputs).
      flipped: Whether the parameter is (outputs, inputs), as in equinox.
    """

    kernel: Any
    inputs: Any
    outputs: Any
    shape: tuple[int, int]
    flipped: bool = False

    def product(self, x: jax.Array) -> jax.Array:
        """``x @ kernel`` for x of shape (rows, inputs)."""
        if self.inputs is not None:
            index = (slice(None), self.inputs)
            x = x.at[index].get(mode="promise_in_bounds", unique_indices=True)
        y = x @ self.kernel
        if self.outputs is None:
            return y
        whole = jnp.zeros((x.shape[0], self.shape[1]), y.dtype)
        return whole.at[:, self.outputs].set(y, unique_indices=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["matrix"],
    meta_fields=["shape", "flipped"],
)
@dataclasses.dataclass(frozen=True)
class BcsrKernel:
    """A kernel as a matrix of ``jax.experimental.sparse``.

    Attributes:
      matrix: Its transpose as BCSR, (outputs, inputs): JAX has sparse times dense only.
      shape: The shape of the kernel, (inputs, outputs).
      flipped: Whether the parameter is (outputs, inputs), as in equinox.
    """

    matrix: Any
    shape: tuple[int, int]
    flipped: bool = False

    def product(self, x: jax.Array) -> jax.Array:
        """``x @ kernel`` for x of shape (rows, inputs)."""
        return (self.matrix @ x.T).T


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "inputs"],
    meta_fields=["shape", "flipped"],
)
@dataclasses.dataclass(frozen=True)
class EllKernel:
    """A kernel as rows of one length: the weights of each output and their inputs.

    XLA computes it without a kernel of its own, as a gather and a product. That is fast
    for a few rows; for many it writes a copy of the inputs for each output.

    Attributes:
      values: The weights of each output, zeros behind them, (outputs, most).
      inputs: The inputs that they belong to, int32.
      shape: The shape of the kernel, (inputs, outputs).
      flipped: Whether the parameter is (outputs, inputs), as in equinox.
    """

    values: Any
    inputs: Any
    shape: tuple[int, int]
    flipped: bool = False

    def product(self, x: jax.Array) -> jax.Array:
        """``x @ kernel`` for x of shape (rows, inputs)."""
        index = (slice(None), self.inputs)
        taken = x.at[index].get(mode="promise_in_bounds")
        return jnp.einsum("bok,ok->bo", taken, self.values)


_FORMS = (ReducedKernel, BcsrKernel, EllKernel)
# What of ELL's copy of the inputs is tried at most, in numbers.
_COPY = 2**22


def _is_form(x: Any) -> bool:
    return isinstance(x, _FORMS)


def _reduced(kernel: np.ndarray, kept: np.ndarray) -> ReducedKernel:
    rows, columns = (np.flatnonzero(kept.any(i)) for i in (1, 0))
    # An array has one entry at least.
    rows, columns = (x if len(x) else np.zeros(1, int) for x in (rows, columns))
    n, m = kernel.shape
    return ReducedKernel(
        jnp.asarray(kernel[np.ix_(rows, columns)]),
        None if len(rows) == n else jnp.asarray(rows.astype(np.int32)),
        None if len(columns) == m else jnp.asarray(columns.astype(np.int32)),
        (n, m),
    )


def _csr_parts(kernel: np.ndarray, kept: np.ndarray) -> tuple[Any, Any, Any]:
    """Values, columns and row starts of the transposed kernel."""
    rows, columns = np.nonzero(kept.T)
    starts = np.searchsorted(rows, np.arange(kept.shape[1] + 1))
    return (
        np.ascontiguousarray(kernel.T[rows, columns]),
        columns.astype(np.int32),
        starts.astype(np.int32),
    )


def _bcsr(kernel: np.ndarray, kept: np.ndarray) -> BcsrKernel:
    # Imported here, since experimental parts of JAX load slowly.
    from jax.experimental import sparse

    values, columns, starts = map(jnp.asarray, _csr_parts(kernel, kept))
    matrix = sparse.BCSR((values, columns, starts), shape=kernel.shape[::-1])
    inputs, outputs = kernel.shape
    return BcsrKernel(matrix, (inputs, outputs))


def _ell(kernel: np.ndarray, kept: np.ndarray) -> EllKernel:
    values, columns, starts = _csr_parts(kernel, kept)
    each = np.diff(starts)
    there = np.arange(max(int(each.max(initial=0)), 1)) < each[:, None]
    shape = there.shape
    padded, taken = np.zeros(shape, kernel.dtype), np.zeros(shape, np.int32)
    padded[there], taken[there] = values, columns
    inputs, outputs = kernel.shape
    return EllKernel(jnp.asarray(padded), jnp.asarray(taken), (inputs, outputs))


def _csr(kernel: np.ndarray, kept: np.ndarray) -> Any:
    """The transposed kernel as a matrix of SciPy, which has no narrow floats."""
    import scipy.sparse

    values, *places = _csr_parts(kernel, kept)
    values = widened(values)
    return scipy.sparse.csr_matrix((values, *places), shape=kernel.shape[::-1])


_MAKE = {"compacted": _reduced, "bcsr": _bcsr, "ell": _ell}


# --- measurements ---------------------------------------------------------------------
@jax.jit
def _times(x: jax.Array, kernel: Any) -> jax.Array:
    return kernel.product(x) if _is_form(kernel) else x @ kernel


def _seconds(kernel: np.ndarray, kept: np.ndarray, rows: int) -> dict[str, float]:
    """Seconds of one product in each form, for a batch of so many rows."""
    dense = jnp.asarray(kernel)
    x = jnp.asarray(
        np.random.default_rng(0).normal(size=(rows, kernel.shape[0])), dense.dtype
    )
    forms: dict[str, Any] = {"dense": dense}
    if not (kept.any(0).all() and kept.any(1).all()):
        forms["compacted"] = _reduced(kernel, kept)
    if kernel.dtype in _DTYPES:
        forms["bcsr"] = _bcsr(kernel, kept)
    if rows * kernel.shape[1] * int(kept.sum(0).max(initial=0)) <= _COPY:
        forms["ell"] = _ell(kernel, kept)
    calls: dict[str, Callable[[], Any]] = {
        name: functools.partial(_times, x, form) for name, form in forms.items()
    }
    try:
        matrix = _csr(kernel, kept)
        columns = np.ascontiguousarray(np.asarray(x, matrix.dtype).T)
    except ImportError:
        pass
    else:
        calls["scipy"] = lambda: matrix @ columns
    return least_seconds(calls)


def _choose(seconds: dict[str, float]) -> str:
    """The fastest form that JAX runs, where it is faster than dense."""
    among = {k: v for k, v in seconds.items() if k in _MAKE}
    best = min(among, key=lambda k: among[k], default="dense")
    return best if seconds[best] * GAIN < seconds["dense"] else "dense"


class BreakEven(NamedTuple):
    """What ``sparse_break_even`` returns.

    Attributes:
      shape: Inputs and outputs of the layer.
      batch: Rows of the batch.
      densities: The densities that were measured, from the largest to the smallest.
      seconds: ``{form: seconds}`` for each density: ``"dense"``, ``"bcsr"``, for few
        rows ``"ell"``, and ``"scipy"`` where SciPy is installed.
      density: The largest density from which on BCSR or ELL was faster than dense, at
        all smaller ones too; None if they never were.
    """

    shape: tuple[int, int]
    batch: int
    densities: tuple[float, ...]
    seconds: tuple[dict[str, float], ...]
    density: float | None

    def table(self) -> str:
        """Aligned plain text: milliseconds, one line for each density."""
        names = list(dict.fromkeys(k for x in self.seconds for k in x))
        rows = [("density", *names)]
        for density, found in zip(self.densities, self.seconds, strict=True):
            rows.append((f"{density:g}", *_milliseconds(found, names)))
        return aligned(rows)


def _milliseconds(seconds: dict[str, float], names: Sequence[str]) -> list[str]:
    return [f"{1e3 * seconds[n]:.3g}" if n in seconds else "-" for n in names]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


@boundary("sparse_break_even")
def sparse_break_even(
    inputs: int,
    outputs: int,
    batch: int,
    densities: Sequence[float] = (0.2, 0.1, 0.05, 0.02, 0.01),
) -> BreakEven:
    """Measures from which density on a sparse matrix beats a dense one on this machine.

    Weights are random and lie at random places; float32. A measurement takes about 0.5
    seconds for each density and form.

    Args:
      inputs: Inputs of the layer, at least 1.
      outputs: Outputs of the layer, at least 1.
      batch: Rows that are multiplied at once, at least 1.
      densities: Shares of the weights, each in (0, 1].

    Returns:
      A ``BreakEven``.

    Raises:
      ValueError: If an argument is out of its range.

    Examples:
      >>> from sparse_optax import export
      >>> found = export.sparse_break_even(64, 32, batch=4, densities=[0.1])
      >>> found.densities, found.seconds[0]["dense"] > 0
      ((0.1,), True)
    """
    cure = "Give sizes such as 4096, 4096, batch=128."
    for name, n in (("inputs", inputs), ("outputs", outputs), ("batch", batch)):
        checks.whole(name, n, 1, static=True, cure=cure)
    shares = sorted({float(d) for d in densities}, reverse=True)
    if not shares:
        raise ArgumentError("`densities` is empty; give at least one.")
    for share in shares:
        cure = "A density is the fraction of weights to keep: 0.05 keeps 5%."
        checks.number("densities", share, 0, 1, ends="(]", cure=cure)
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(inputs, outputs)).astype(np.float32)
    found, even = [], None
    for share in shares:
        mask = unnamed(random_masks)(0, {"w": jnp.asarray(kernel)}, share)["w"]
        seconds = _seconds(kernel, np.asarray(mask), batch)
        found.append({k: v for k, v in seconds.items() if k != "compacted"})
        sparse = min(seconds[k] for k in ("bcsr", "ell") if k in seconds)
        wins = sparse < seconds["dense"]
        even = (even if even is not None else share) if wins else None
    return BreakEven((inputs, outputs), batch, tuple(shares), tuple(found), even)


# --- a whole model --------------------------------------------------------------------
class SparseLayer(NamedTuple):
    """What ``to_sparse`` did with one dense layer.

    Attributes:
      name: Name of its kernel.
      shape: Inputs and outputs.
      density: Share of its weights that is kept.
      rows: Rows that are multiplied at once, for the example.
      form: ``"dense"``, ``"compacted"``, ``"bcsr"`` or ``"ell"``.
      seconds: ``{form: seconds}`` of one product as measured; with ``"scipy"`` where
        SciPy is installed. Empty if more than a fifth of the weights is kept.
    """

    name: str
    shape: tuple[int, int]
    density: float
    rows: int
    form: str
    seconds: dict[str, float]


class SparseRecord(NamedTuple):
    """What ``to_sparse`` chose.

    Attributes:
      layers: One record for each dense layer.
    """

    layers: tuple[SparseLayer, ...]

    def table(self) -> str:
        """Aligned plain text, one line for each layer, times in milliseconds."""
        names = list(dict.fromkeys(k for x in self.layers for k in x.seconds))
        rows = [("layer", "shape", "density", "rows", "form", *names)]
        for x in self.layers:
            cells = " x ".join(map(str, x.shape)), f"{x.density:.3g}", str(x.rows)
            rows.append((x.name, *cells, x.form, *_milliseconds(x.seconds, names)))
        return aligned(rows)


class SparseNetwork:
    """A model with sparse layers, made by ``to_sparse``.

    Call it like the function that it was made from, with ``params`` in place of the
    parameters. It is an ordinary function of JAX for inference; it takes any batch.

    Attributes:
      params: The parameters, a tree of the same type, in which a ``ReducedKernel``, a
        ``BcsrKernel`` or an ``EllKernel`` stands for some of the kernels.
      record: What was chosen for each layer, and why, a ``SparseRecord``.
    """

    def __init__(self, fn: Any, structure: Any, leaves: Sequence[Any], record: Any):
        """Made by ``to_sparse``."""
        self._fn, self._structure = fn, structure
        self.record = record
        self.params = jax.tree.unflatten(structure, leaves)
        self._run = jax.jit(self._call)

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """The results of the function."""
        return _call_sparse(self, params, *args)

    def _call(self, leaves: list[Any], args: tuple[Any, ...]) -> Any:
        program, result = _program(self._fn, self._structure, leaves, args)
        made = _evaluate(program, [*leaves, *jax.tree.leaves(args)])
        return jax.tree.unflatten(jax.tree.structure(result), made)


def concrete_leaves(params: PyTree) -> tuple[list[str], list[Any], Any]:
    """Names, arrays and structure of parameters; raises if one has no values."""
    leaves, structure = jax.tree.flatten(params)
    names = array_names(params)
    for name, x in zip(names, leaves, strict=True):
        if is_abstract(x) or isinstance(x, Tracer) or not hasattr(x, "dtype"):
            raise ArgumentError(
                f"the leaf {name!r} of `params` is {type(x).__name__}; it must be a "
                "concrete array. Call it outside of jit, with the arrays of the model."
            )
    return names, leaves, structure


@boundary("to_sparse")
def _call_sparse(model: SparseNetwork, params: PyTree, *args: Any) -> Any:
    leaves, structure = jax.tree.flatten(params, is_leaf=_is_form)
    if structure != model._structure:
        raise ArgumentError(
            f"`params` has the structure {structure}; it must have that of the model's "
            f"parameters, {model._structure}. Pass its `params`."
        )
    return model._run(leaves, args)


@boundary("to_sparse")
def to_sparse(
    fn: Callable[..., Any],
    params: PyTree,
    *example: Any,
    masks: PyTree | None = None,
) -> SparseNetwork:
    r"""Takes sparse matrices for dense layers where they are faster on this machine.

    Each kernel of a dense layer of which at least 80% is missing is measured in the
    forms that are there, at the batch of the example, and the fastest is taken if it is
    faster than dense by a twentieth:

    - as it is, dense;
    - compacted: without the inputs and outputs of this layer that have no weight;
    - BCSR, a matrix of ``jax.experimental.sparse``;
    - ELL, for a few rows: the weights of each output as a row of one length, padded
      with zeros. It suits a constant number of weights for each output best.

    Where whole units are missing, ``compact`` first: ``small = compact(fn, params,
    x)``, then ``to_sparse(small, small.params, x)``. Convolutions stay dense. With N
    weights kept of a layer and B rows, a product takes :math:`BN` multiply-adds.

    .. note:: For inference: the result is not made to be trained. Its arrays are
      arguments of the compiled program, not constants. For a batch of 1 a matrix of
      SciPy, outside of JAX, is another choice: the record has its times, and
      ``SparseModel.to_csr`` makes one.

    Args:
      fn: The function, called as ``fn(params, *args)``.
      params: Its parameters, a tree of concrete arrays.
      *example: Its other arguments, concrete or abstract; the batch is theirs.
      masks: Masks or an optimizer state; zeros that they keep stay entries. None keeps
        what is not zero.

    Returns:
      A ``SparseNetwork``, with ``params`` and ``record``; it is called like ``fn``.

    Raises:
      ValueError: If a leaf is no concrete array, masks do not fit, or ``fn`` cannot be
        traced with the example.

    Examples:
      >>> import jax, jax.numpy as jnp, sparse_optax
      >>> def model(params, x):
      ...     return jnp.maximum(x @ params["v"], 0) @ params["w"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> params = {
      ...     "v": jax.random.normal(keys[0], (64, 96)),
      ...     "w": jax.random.normal(keys[1], (96, 4)),
      ... }
      >>> masks = sparse_optax.masks.random_masks(keys[2], params, 0.05)
      >>> params = sparse_optax.sparsify(params, masks)
      >>> x = jnp.ones((8, 64))
      >>> sparse = sparse_optax.export.to_sparse(model, params, x)
      >>> [(layer.name, layer.shape, layer.rows) for layer in sparse.record.layers]
      [('v', (64, 96), 8), ('w', (96, 4), 8)]
      >>> same = jnp.allclose(sparse(sparse.params, x), model(params, x), atol=1e-4)
      >>> bool(same)
      True
    """
    if not callable(fn):
        checks.fail("fn", fn, "a function fn(params, *args)", "Pass model.apply.")
    names, leaves, structure = concrete_leaves(params)
    given = {}
    if masks is not None:
        given = by_parameter(named_masks(masks), names)
    program, _ = _program(fn, structure, leaves, example)
    made, records = list(leaves), []
    for i, uses in _products(program, len(leaves)).items():
        kernel = np.asarray(leaves[i])
        kept = _kept(names[i], kernel, given.get(names[i]))
        if uses.transposed:
            kernel, kept = kernel.T, kept.T
        density = float(kept.mean()) if kept.size else 1.0
        seconds: dict[str, float] = {}
        form = "dense"
        if density <= MOST and jnp.issubdtype(kernel.dtype, jnp.inexact):
            seconds = _seconds(kernel, kept, uses.rows)
            form = _choose(seconds)
        if form != "dense":
            sparse = _MAKE[form](kernel, kept)
            made[i] = dataclasses.replace(sparse, flipped=uses.transposed)
        shape = (kernel.shape[0], kernel.shape[1])
        records.append(SparseLayer(names[i], shape, density, uses.rows, form, seconds))
    return SparseNetwork(fn, structure, made, SparseRecord(tuple(records)))


def _kept(name: str, kernel: np.ndarray, mask: Any) -> np.ndarray:
    """Which entries of a kernel are kept."""
    if mask is None:
        return kernel != 0
    kept = np.asarray(unpack(mask))
    if kept.shape != kernel.shape:
        raise ArgumentError(
            f"`masks` has shape {kept.shape} for {name!r}; it must be {kernel.shape}. "
            "Pass masks made for these parameters."
        )
    return kept | (kernel != 0)


def _program(
    fn: Any, structure: Any, leaves: Sequence[Any], args: Any
) -> tuple[Program, Any]:
    """The program of a function of dense kernels, for arguments of these shapes, and
    the tree of its results.
    """
    flat, own = jax.tree.flatten(tuple(args))

    def whole(leaves, flat):
        return fn(jax.tree.unflatten(structure, leaves), *jax.tree.unflatten(own, flat))

    dense = [_as_dense(x) for x in leaves]
    return trace(whole, dense, [_abstract(x) for x in flat])


def _abstract(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


def _as_dense(x: Any) -> Any:
    """The shape of a leaf as the function knows it."""
    if not _is_form(x):
        return _abstract(x)
    dtype = jax.tree.leaves(x)[0].dtype  # of the values, which come first
    return jax.ShapeDtypeStruct(x.shape[::-1] if x.flipped else x.shape, dtype)


class _Uses(NamedTuple):
    """The products of a kernel, which nothing else reads."""

    transposed: bool  # whether its first axis are the outputs
    rows: int  # of the largest product


def _products(program: Program, leaves: int) -> dict[int, _Uses]:
    """The leaves that are kernels of dense layers and nothing else."""
    # Values that are a leaf, and whether its axes are swapped.
    same: dict[Value, tuple[int, bool]] = {
        x: (i, False)
        for i, x in enumerate(program.inputs[:leaves])
        if len(x.shape) == 2
    }
    found: dict[int, list[_Uses]] = {}
    others = {same[x][0] for x in program.outputs if x in same}
    for eqn in program.equations:
        for place, x in enumerate(eqn.inputs):
            if x not in same:
                continue
            leaf, swapped = same[x]
            if eqn.name == "transpose":
                same[eqn.outputs[0]] = (leaf, swapped ^ _swaps(eqn))
            elif (uses := _product(eqn, place, swapped)) is not None:
                found.setdefault(leaf, []).append(uses)
            else:
                others.add(leaf)
    others |= {same[x][0] for x in program.outputs if x in same}
    return {
        leaf: _Uses(uses[0].transposed, max(u.rows for u in uses))
        for leaf, uses in sorted(found.items())
        if leaf not in others and len({u.transposed for u in uses}) == 1
    }


def _swaps(eqn: Equation) -> bool:
    return tuple(eqn.params["permutation"]) == (1, 0)


def _product(eqn: Equation, place: int, swapped: bool) -> _Uses | None:
    """The product of a kernel at this place with an array of rows; None for others."""
    if eqn.name != "dot_general":
        return None
    summed, batch = eqn.params["dimension_numbers"]
    other = eqn.inputs[1 - place]
    if batch[0] or batch[1] or len(summed[0]) != 1 or other is eqn.inputs[place]:
        return None
    rows = 1
    for i, n in enumerate(other.shape):
        if i != summed[1 - place][0]:
            if not isinstance(n, int):
                raise ArgumentError(
                    f"`example` has an axis of the length {n}; times are measured at "
                    "lengths that are numbers. Give an example of one batch."
                )
            rows *= n
    return _Uses(bool(summed[place][0]) ^ swapped, rows)


def _evaluate(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """The results of a program, with sparse products."""
    env = dict(program.constants) | dict(zip(program.inputs, inputs, strict=True))
    for eqn in program.equations:
        xs = [env[x] for x in eqn.inputs]
        forms = [i for i, x in enumerate(xs) if _is_form(x)]
        if not forms:
            env.update(zip(eqn.outputs, eqn.call(*xs), strict=True))
        elif eqn.name == "transpose":
            env[eqn.outputs[0]] = xs[0]
        elif _product(eqn, forms[0], False) is not None:
            env[eqn.outputs[0]] = _sparse_product(eqn, xs, forms[0])
        else:
            raise ArgumentError(
                f"`fn` uses a sparse kernel in {eqn.name!r} for arguments of these "
                "shapes, and only in products for those of the example. Call to_sparse "
                "with such an example."
            )
    return [env[x] for x in program.outputs]


def _sparse_product(eqn: Equation, xs: Sequence[Any], place: int) -> jax.Array:
    summed, _ = eqn.params["dimension_numbers"]
    form, x = xs[place], xs[1 - place]
    x = jnp.moveaxis(x, summed[1 - place][0], -1)
    y = form.product(x.reshape(-1, x.shape[-1]))
    y = y.reshape(*x.shape[:-1], y.shape[-1]).astype(eqn.outputs[0].dtype)
    return y if place else jnp.moveaxis(y, -1, 0)
