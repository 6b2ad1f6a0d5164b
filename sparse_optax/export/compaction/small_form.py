"""Parameters and optimizer states in small form, for training between two cycles.

A leaf in small form is the box that the smaller program needs of it, and below this box
further rows with the entries that are not in it but still change: they have no
gradient, and decay as the optimizer says.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sparse_optax.checks import unnamed
from sparse_optax.export.compaction.facts import Box, as_mask, lengths
from sparse_optax.layers import is_packed
from sparse_optax.masks.tree import pack, unpack


class Cut(NamedTuple):
    """How one leaf is cut.

    Attributes:
      box: What is needed of it; None for nothing.
      below: Flat places of the entries that are not in the box and still change.
      rows: How many rows these take, with room to spare.
    """

    box: Box | None
    below: np.ndarray
    rows: int

    @property
    def whole(self) -> bool:
        """Whether the leaf stays as it is."""
        return self.box is not None and not self.rows and not any(map(_cuts, self.box))

    def inside(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the box in a leaf of this shape."""
        if self.box is None:
            return (0, *(1 for _ in shape[1:]))
        return lengths(self.box, shape)


def _cuts(mask: np.ndarray | None) -> bool:
    return mask is not None


def cut_of(box: Box | None, changes: np.ndarray) -> Cut:
    """The cut of a leaf. ``changes`` are the entries that training changes."""
    if not changes.ndim:
        return Cut((), np.zeros(0, np.intp), 0)
    left = changes.copy()
    if box is not None:
        left[_grid(box, changes.shape)] = False
    below = np.flatnonzero(left)
    width = math.prod(Cut(box, below, 0).inside(changes.shape)[1:])
    # An array has one row at least.
    return Cut(box, below, max(-(-len(below) // width), int(box is None)))


def _grid(box: Box, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Places of a box, for indexing."""
    pairs = zip(box, shape, strict=True)
    return np.ix_(*(np.flatnonzero(as_mask(mask, n)) for mask, n in pairs))


def to_small(cut: Cut, x: Any) -> Any:
    """A leaf, or an entry of a state in its place, in small form."""
    if cut.whole:
        return x
    if is_packed(x):
        return unnamed(pack)(jnp.asarray(to_small(cut, unpack(x))))
    array = np.asarray(x)
    inside = cut.inside(array.shape)
    small = np.zeros((inside[0] + cut.rows, *inside[1:]), array.dtype)
    if cut.box is not None:
        small[: inside[0]] = array[_grid(cut.box, array.shape)]
    rows = small[inside[0] :].reshape(-1)
    rows[: len(cut.below)] = array.reshape(-1)[cut.below]
    small[inside[0] :] = rows.reshape(cut.rows, *inside[1:])
    return jnp.asarray(small)


def to_full(cut: Cut, x: Any, small: Any) -> Any:
    """The leaf with what its small form has become; all else as it was."""
    if cut.whole:
        return small
    if is_packed(x):
        whole = to_full(cut, unpack(x), unpack(small))
        return unnamed(pack)(jnp.asarray(whole))
    array, small = np.array(x), np.asarray(small)
    n = cut.inside(array.shape)[0]
    if cut.box is not None:
        array[_grid(cut.box, array.shape)] = small[:n]
    array.reshape(-1)[cut.below] = small[n:].reshape(-1)[: len(cut.below)]
    return _placed_like(x, array)


def _placed_like(x: Any, array: np.ndarray) -> jax.Array:
    """An array on the devices of another."""
    sharding = getattr(x, "sharding", None)
    if sharding is not None and len(sharding.device_set) > 1:
        return jax.device_put(array, sharding)
    return jnp.asarray(array)


# --- programs -------------------------------------------------------------------------
class Lifted(NamedTuple):
    """A traced function whose constants are arguments.

    Attributes:
      text: What tells it from others: functions of one text differ by constants only,
        and by derivatives of their own that they hold.
      constants: The constants of this one.
      call: ``call(constants, *args)`` gives its results as a list.
    """

    text: str
    constants: list[jax.Array]
    call: Callable[..., list[Any]]


def lifted(function: Callable[..., Any], *args: Any) -> Lifted:
    """Traces a function of arrays and takes its constants out: index sets."""
    closed = jax.make_jaxpr(function)(*args)
    jaxpr = closed.jaxpr
    variables = [*jaxpr.constvars, *jaxpr.invars]
    open_jaxpr = jaxpr.replace(constvars=[], invars=variables)
    run = core.jaxpr_as_fun(core.ClosedJaxpr(open_jaxpr, ()))
    rest = hashlib.sha256(str(jaxpr).encode())
    _hash_constants(jaxpr, rest)
    return Lifted(
        rest.hexdigest(),
        [jnp.asarray(x) for x in closed.consts],
        lambda constants, *xs: list(run(*constants, *xs)),
    )


def arrays_in(function: Callable[..., Any], *args: Any) -> bytes:
    """The bytes of the arrays, without scalars, in the program of a function."""
    closed = jax.make_jaxpr(function)(*args)
    rest = _Bytes()
    _hash_constants(closed.jaxpr, rest)
    for x in closed.consts:
        rest.update(np.asarray(x).tobytes() if np.ndim(x) else b"")
    return bytes(rest.found)


class _Bytes:
    """Collects what a hash would be made of."""

    def __init__(self) -> None:
        self.found = bytearray()

    def update(self, data: bytes) -> None:
        self.found += data


def _hash_constants(jaxpr: Any, rest: Any) -> None:
    """Adds the arrays that stand in a program itself, and not among its constants."""
    for eqn in jaxpr.eqns:
        for x in eqn.invars:
            if isinstance(x, core.Literal) and np.ndim(x.val):
                rest.update(np.asarray(x.val).tobytes())
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                for constant in getattr(inner, "consts", ()):
                    if np.ndim(constant):
                        rest.update(np.asarray(constant).tobytes())
                _hash_constants(getattr(inner, "jaxpr", inner), rest)


def _is_program(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)
