"""Which leaves of a parameter tree take part, their names, and their layers.

Everything here runs on the host on structure alone, accepts abstract arrays and
allocates nothing. A *leaf* is an array of the parameter tree. A *layer* is a leaf, or
one slice of a leaf that stacks several layers (``nn.scan``). ``Layers`` is made once,
from the user's arguments or from the masks of a state.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from sparse_optax.checks import (
    ArgumentError,
    boundary,
    fail,
    flag,
    names_axes,
    path_name,
    takes,
)
from sparse_optax.patterns import SINGLE, Pattern, check_explicit
from sparse_optax.roles import layout, roles
from sparse_optax.selection.compilation import as_data, entries

PyTree = Any
Where = PyTree | Callable[[str, Any], bool]


# --- leaves and their names -----------------------------------------------------------
def is_hole(node: Any) -> bool:
    """Whether a node stands for a leaf that does not take part."""
    return isinstance(node, optax.MaskedNode)


def is_abstract(x: Any) -> bool:
    """Whether an array has a shape and no values yet."""
    return isinstance(x, Tracer | jax.ShapeDtypeStruct)


class PackedMask(NamedTuple):
    """A boolean array stored with one bit per weight.

    Attributes:
      bits: uint8, the mask's shape with its last axis divided by eight, rounded up.
      spare: uint8 zeros, one more than the unused bits at the end of each row. Its
        length stores the shape without a static field in the optimizer state; it is
        never empty, since not every library stores empty arrays.
    """

    bits: jax.Array
    spare: jax.Array


def is_packed(node: Any) -> bool:
    """Whether a node is a packed mask. ``flax.nnx`` stores a tuple with named fields as
    a mapping of these names.
    """
    if isinstance(node, PackedMask):
        return True
    if not isinstance(node, Mapping) or set(node) != set(PackedMask._fields):
        return False
    return all(
        jnp.issubdtype(getattr(x, "dtype", bool), jnp.integer) for x in node.values()
    )


def as_packed(node: Any) -> Any:
    """A packed mask as a ``PackedMask``; every other node as it is."""
    if is_packed(node) and not isinstance(node, PackedMask):
        return PackedMask(**{name: node[name] for name in PackedMask._fields})
    return node


def is_mask(node: Any) -> bool:
    """Whether a node of a mask tree is one leaf: a hole or a packed mask."""
    return is_hole(node) or is_packed(node)


def leaf_names(tree: PyTree) -> list[str]:
    """Normalised names of all leaves in leaf order, holes included."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_hole)
    return [path_name(path) for path, _ in paths]


def array_names(tree: PyTree) -> list[str]:
    """Normalised names in the order of ``jax.tree.leaves``, which has no holes."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


# --- which of them take part ----------------------------------------------------------
class Choice(NamedTuple):
    """What is decided of one leaf, and why.

    Attributes:
      name: Its normalised name.
      shape: Its shape; ``()`` for what is no array.
      dtype: Its dtype, or None for what is no array.
      kind: ``"kernel"``, ``"table"`` (of embeddings), ``"adapter"`` (of low rank),
        ``"bias"``, ``"scale"``, ``"vector"``, or ``"other"`` for what has no floating
        or complex numbers.
      sparse: Whether it is made sparse.
      reason: Why, in words.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    kind: str
    sparse: bool
    reason: str


def choices(
    params: PyTree, where: Where | None = None, *, embeddings: bool = False
) -> list[Choice]:
    """What is decided of each leaf, and why; see ``eligible`` for the arguments."""
    check_where(where)
    leaves, names = jax.tree.leaves(params, is_leaf=is_hole), leaf_names(params)
    given = None if where is None else _given_choices(params, where, leaves, names)
    found = roles(names, [_shape_of(x) for x in leaves])
    made = []
    for i, (name, x, role) in enumerate(zip(names, leaves, found, strict=True)):
        kind, reason = role
        if not _is_inexact(x):
            kind, reason = "other", _no_number(x)
        sparse = kind == "kernel" or (embeddings and kind == "table")
        if given is not None:
            sparse = given[i]
            if kind != "other":
                reason = f"{'chosen' if sparse else 'left out'} by `where`"
        shape, dtype = _shape_of(x) or (), getattr(x, "dtype", None)
        made.append(Choice(name, shape, dtype, kind, sparse, reason))
    return made


def choose(
    params: PyTree, where: Where | None = None, *, embeddings: bool = False
) -> list[bool]:
    """Whether each leaf takes part, a list of bools; see ``eligible``."""
    flag("embeddings", embeddings)
    return [x.sparse for x in choices(params, where, embeddings=embeddings)]


def _shape_of(x: Any) -> tuple[int, ...] | None:
    shape = getattr(x, "shape", None)
    return None if shape is None else tuple(shape)


def _is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _no_number(x: Any) -> str:
    """Why a leaf cannot be made sparse."""
    if is_hole(x):
        return "no array here: optax.MaskedNode()"
    if not hasattr(x, "dtype"):
        return f"no array: {type(x).__name__}"
    return f"neither floating nor complex: {x.dtype}"


def _is_function(where: Any) -> bool:
    # A callable whose leaves are bools is a tree (an equinox module of bools).
    return callable(where) and all(callable(x) for x in jax.tree.leaves(where))


def check_where(where: Any) -> None:
    """Raises unless a value is None, a tree of bools or a function of name and leaf."""
    if where is None:
        return
    cure = "Pass a tree of bools, or where=lambda name, leaf: ... that gives a bool."
    if _is_function(where):
        if not takes(where, "name", None):
            fail("where", where, "a function of two arguments, name and leaf", cure)
        return
    flat = jax.tree.leaves(where, is_leaf=is_hole)
    for name, x in zip(leaf_names(where), flat, strict=True):
        if not isinstance(x, bool | np.bool_) and not is_hole(x):
            at = f" for {name!r}" if name else ""
            raise ArgumentError(
                "`where` must be None, a tree of bools or a callable (name, leaf) -> "
                f"bool; got {x!r}{at}. {cure}"
            )


def _given_choices(
    params: PyTree, where: Where, leaves: Sequence[Any], names: Sequence[str]
) -> list[bool]:
    """What ``where`` says of each leaf, checked."""
    if _is_function(where):
        chosen = [
            False if is_hole(x) else where(name, x)
            for name, x in zip(names, leaves, strict=True)
        ]
    else:
        try:
            spread = jax.tree.broadcast(where, params, is_leaf=is_hole)
            chosen = jax.tree.leaves(spread, is_leaf=is_hole)
        except ValueError as error:
            found = _by_prefix(where, names)
            if found is None:
                raise ArgumentError(
                    "`where` must have the structure of params, or of a prefix of it; "
                    f"got {jax.tree.structure(where)}. Pass a tree of bools or a "
                    "callable (name, leaf) -> bool."
                ) from error
            chosen = found
    # Holes, which `optax.partition` puts into the tree of each group, stay holes.
    chosen = [
        False if is_hole(x) else choice
        for x, choice in zip(leaves, chosen, strict=True)
    ]
    for name, x, choice in zip(names, leaves, chosen, strict=True):
        if not isinstance(choice, bool | np.bool_):
            raise ArgumentError(
                f"`where` must give True or False for each leaf; got {choice!r} for "
                f"{name!r}. Pass a tree of bools or a callable (name, leaf) -> bool."
            )
        if choice and not _is_inexact(x):
            raise ArgumentError(
                f"`where` chooses the leaf {name!r} of dtype "
                f"{getattr(x, 'dtype', type(x).__name__)}; only floating and complex "
                "leaves can be made sparse. Leave it out of `where`."
            )
    return list(map(bool, chosen))


def _by_prefix(tree: PyTree, names: Sequence[str]) -> list[Any] | None:
    """The values of a tree of other containers, whose leaves have the names of leaves
    or of their parents; None if a name is missing or unknown.
    """
    flat = jax.tree.leaves(tree, is_leaf=is_hole)
    given = dict(zip(leaf_names(tree), flat, strict=True))
    parents = [
        next((part for part in _parents(name) if part in given), None) for name in names
    ]
    if None in parents or set(parents) != set(given) or len(given) != len(flat):
        return None
    return [given[part] for part in parents if part is not None]


def _parents(name: str) -> Iterable[str]:
    """A name and the names of the nodes above it."""
    keys = name.split("/")
    return ("/".join(keys[:n]) for n in range(len(keys), 0, -1))


def _tree_like(params: PyTree, values: Sequence[Any]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_hole), values)


@boundary("eligible")
def eligible(
    params: PyTree, where: Where | None = None, *, embeddings: bool = False
) -> PyTree:
    """Shows which leaves are made sparse: a tree of bools like ``params``.

    It is the default choice of every transformation here. By default kernels take part:
    floating or complex leaves of two or more dimensions that are no biases, scales,
    parts of norms, tables of embeddings (tied or not, ``pos_embed``), learned tokens or
    adapters of low rank. These are told by names, sibling leaves and shapes;
    ``report.eligibility`` shows the reason for each leaf. Tables stay dense because a
    row that is absent from the batches has no gradient: it would be cut first, or only
    decay. For a mask of weight decay see ``decay_mask``.

    Args:
      params: The parameters, concrete or abstract.
      where: None for the default, a tree or prefix tree of bools, or a callable
        ``(name, leaf) -> bool``.
      embeddings: Whether the default choice takes tables of embeddings. The tree that
        comes back can be the ``where`` of every method.

    Returns:
      A tree like ``params`` of Python bools.

    Raises:
      ValueError: If ``where`` does not fit or chooses a leaf of other numbers.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))}
      >>> sparse_optax.eligible(params)
      {'bias': False, 'kernel': True}
      >>> table = {"embedding": jnp.zeros((5, 2))}
      >>> sparse_optax.eligible(table), sparse_optax.eligible(table, embeddings=True)
      ({'embedding': False}, {'embedding': True})
    """
    return _tree_like(params, choose(params, where, embeddings=embeddings))


@boundary("decay_mask")
def decay_mask(params: PyTree) -> PyTree:
    """The leaves that weight decay is for: all that multiply, a tree of bools.

    These are kernels, tables of embeddings and adapters of low rank, and not biases,
    scales and parts of norms. So tables are decayed although they stay dense, see
    ``eligible``.

    Args:
      params: The parameters, concrete or abstract.

    Returns:
      A tree like ``params`` of Python bools.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> params = {"bias": jnp.zeros(3), "embedding": jnp.zeros((2, 3))}
      >>> sparse_optax.decay_mask(params)
      {'bias': False, 'embedding': True}
      >>> decay = optax.add_decayed_weights(5e-4, mask=sparse_optax.decay_mask)
    """
    decayed = ("kernel", "table", "adapter")
    return _tree_like(params, [x.kind in decayed for x in choices(params)])


# --- the record -----------------------------------------------------------------------
class Leaf(NamedTuple):
    """A leaf that takes part, as ``copies`` layers of one shape."""

    name: str  # normalised
    shape: tuple[int, ...]
    dtype: Any
    axis: int | None = None  # whose slices are layers
    pattern: Pattern = SINGLE  # which of its weights are one unit, with its axes

    @property
    def copies(self) -> int:
        """Number of layers."""
        return 1 if self.axis is None else self.shape[self.axis]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of a layer."""
        if self.axis is None:
            return self.shape
        return self.shape[: self.axis] + self.shape[self.axis + 1 :]

    @property
    def size(self) -> int:
        """Number of weights of a layer."""
        return math.prod(self.layer_shape)


def _laid_like(mask: jax.Array, like: Any) -> jax.Array:
    """A mask with the sharding of its leaf, which that of whole units may lack on an
    Explicit mesh.
    """
    if jax.typeof(mask).sharding == jax.typeof(like).sharding:
        return mask
    return jnp.logical_and(mask, jnp.ones_like(like, dtype=bool))


class Layers(NamedTuple):
    """The leaves of a tree that take part, with their layers and units."""

    structure: Any  # of the tree; holes and packed masks are leaves
    index: tuple[int, ...]  # positions of the leaves that take part, in leaf order
    leaves: tuple[Leaf, ...]  # these leaves
    pattern: Pattern = SINGLE  # which weights of a leaf are one unit

    @property
    def names(self) -> tuple[str, ...]:
        """The leaves' names."""
        return tuple(leaf.name for leaf in self.leaves)

    @property
    def axes(self) -> tuple[int | None, ...]:
        """For each leaf the axis whose slices are layers, or None."""
        return tuple(leaf.axis for leaf in self.leaves)

    @property
    def sizes(self) -> np.ndarray:
        """Number of weights in each layer, int64."""
        return layer_sizes([leaf.shape for leaf in self.leaves], self.axes)

    @property
    def units(self) -> "Layers":
        """The same leaves with one entry per unit, as methods see them."""
        if self.pattern == SINGLE:
            return self
        views = tuple(
            leaf._replace(
                shape=leaf.pattern.view_shape(leaf.shape, leaf.axis),
                axis=leaf.pattern.view_axis(leaf.axis),
                pattern=SINGLE,
            )
            for leaf in self.leaves
        )
        return self._replace(leaves=views, pattern=SINGLE)

    @property
    def unit_sizes(self) -> tuple[int, ...]:
        """For each leaf the number of weights per unit."""
        return tuple(x.pattern.unit_size(x.shape, x.axis) for x in self.leaves)

    @property
    def where(self) -> PyTree:
        """A tree of bools: which leaves take part."""
        among = set(self.index)
        return jax.tree.unflatten(
            self.structure, [i in among for i in range(self.structure.num_leaves)]
        )

    @property
    def stacked(self) -> dict[str, int]:
        """``{name: axis}`` of the leaves that stack layers."""
        return {x.name: x.axis for x in self.leaves if x.axis is not None}

    def pick(self, tree: PyTree) -> tuple[Any, ...]:
        """The leaves that take part, from a tree with as many leaves."""
        flat = jax.tree.leaves(tree, is_leaf=is_mask)
        return tuple(flat[i] for i in self.index)

    def rebuild(self, values: Iterable[Any]) -> PyTree:
        """A tree with one value per leaf that takes part, and holes elsewhere."""
        full: list[Any] = [optax.MaskedNode()] * self.structure.num_leaves
        for i, value in zip(self.index, values, strict=True):
            full[i] = value
        return jax.tree.unflatten(self.structure, full)

    def split(self, vector: Any) -> tuple[Any, ...]:
        """A vector over layers as one entry per leaf, an array if it stacks layers."""
        return split_layers(vector, [x.shape for x in self.leaves], self.axes)

    def view(self, arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Arrays of weights, or masks, as one number per unit."""
        pairs = zip(arrays, self.leaves, strict=True)
        return tuple(leaf.pattern.view(x, leaf.axis) for x, leaf in pairs)

    def operands(
        self, arrays: Sequence[tuple[jax.Array, ...]], score: Any
    ) -> tuple[list[tuple[jax.Array, ...]], Any]:
        """The arrays and the score by which a selection ranks units."""
        pairs = [
            leaf.pattern.operands(score, xs, leaf.axis)
            for xs, leaf in zip(arrays, self.leaves, strict=True)
        ]
        return [xs for xs, _ in pairs], pairs[0][1] if pairs else score

    def costs(self, costs: Sequence[Any] | None) -> list[Any] | None:
        """The cost of a unit of each leaf, from that of a weight; None if all are 1."""
        sizes = self.unit_sizes
        if costs is None and set(sizes) <= {1}:
            return None
        prices = [1] * len(sizes) if costs is None else costs
        return [price * size for price, size in zip(prices, sizes, strict=True)]

    def spread(
        self, masks: Sequence[jax.Array], likes: Sequence[Any] | None = None
    ) -> tuple[jax.Array, ...]:
        """Masks of units as masks of weights, with the sharding of arrays ``likes``."""
        pairs = zip(masks, self.leaves, strict=True)
        spread = tuple(x.pattern.spread(m, x.shape, x.axis) for m, x in pairs)
        return spread if likes is None else tuple(map(_laid_like, spread, likes))

    def weights(self, units: Any) -> tuple[Any, ...]:
        """Weights per leaf, or stacked layer, from a vector of units per layer."""
        pairs = zip(self.units.split(units), self.leaves, strict=True)
        return tuple(x.pattern.weights(n, x.shape, x.axis) for n, x in pairs)

    def at(self, density: Any) -> "Layers":
        """The same leaves under a pattern for another density than its own."""
        leaves = tuple(
            x._replace(pattern=x.pattern.with_density(density)) for x in self.leaves
        )
        return self._replace(leaves=leaves, pattern=self.pattern.with_density(density))


def layers_of(
    params: PyTree,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern = SINGLE,
    *,
    may_be_empty: bool = False,
) -> Layers:
    """The layers that a user chose; see ``eligible`` for the arguments."""
    chosen = choose(params, where)
    layers = chosen_layers(params, chosen, stacked, pattern)
    if not may_be_empty:
        check_some(layers, params)
    return layers


def check_some(layers: Layers, params: PyTree) -> None:
    """Raises if the parameters have leaves and none of them takes part."""
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    # A tree without leaves is allowed: `optax.tree.map_params` initialises with one,
    # and `optax.partition` may give a group only holes.
    if not layers.index and not all(map(is_hole, flat)):
        raise ArgumentError(
            f"no leaf of {leaf_names(params)} takes part; at least one must. Pass the "
            "parameters of a layer with a kernel, or choose leaves with where=lambda "
            "name, leaf: ...; report.eligibility(params) says of each leaf why it does "
            "not take part."
        )


def check_values(names: Iterable[str], leaves: Iterable[Any]) -> None:
    """Raises if a leaf has a shape and no values, which are needed."""
    for name, x in zip(names, leaves, strict=True):
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ArgumentError(
                f"the leaf {name!r} of `params` is abstract, a ShapeDtypeStruct; its "
                "values are needed. Pass concrete arrays."
            )


def check_real(leaves: Iterable[Leaf], what: str) -> None:
    """Raises if one of the leaves is complex: ``what`` is not defined for it."""
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ArgumentError(
                f"{leaf.name!r} has dtype {leaf.dtype}, and {what} is defined for real "
                "weights only. Leave it out with where=lambda name, leaf: ..."
            )


def chosen_layers(
    params: PyTree,
    chosen: Sequence[bool],
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern = SINGLE,
    structure: Any = None,
) -> Layers:
    """The layers of the chosen leaves, one bool per leaf. ``structure`` is that of the
    tree to rebuild, if it differs from that of params.
    """
    flat, own = jax.tree.flatten(params, is_leaf=is_hole)
    names_axes("stacked", stacked)
    names, axes = leaf_names(params), dict(stacked or {})
    index = tuple(i for i, choice in enumerate(chosen) if choice)
    shapes = shapes_by_name(params) if pattern.asks else {}
    unknown = sorted(set(dict(pattern.given or ())) - set(names)) if flat else []
    if unknown:
        raise ArgumentError(
            f"`pattern`: {pattern.name} has axes of {unknown}, which are no leaves "
            f"here; they must be some of {[names[i] for i in index]}. Correct them."
        )
    leaves = []
    for i in index:
        shape, axis = tuple(flat[i].shape), axes.pop(names[i], None)
        if axis is not None:
            axis = _checked_axis(names[i], shape, axis)
        own_pattern = pattern
        if pattern.asks:
            own_pattern = pattern.along(names[i], layout(names[i], shapes, axis))
        own_pattern.check(names[i], shape, axis)
        check_explicit(own_pattern, names[i], flat[i])
        leaves.append(Leaf(names[i], shape, flat[i].dtype, axis, own_pattern))
    if axes and flat:
        raise ArgumentError(
            f"`stacked` names {sorted(axes)}, which do not take part; it must name "
            f"some of {[names[i] for i in index]}. Correct the names."
        )
    return Layers(structure or own, index, tuple(leaves), pattern)


def shapes_by_name(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shapes of all leaves that have one."""
    pairs = zip(leaf_names(tree), jax.tree.leaves(tree, is_leaf=is_hole), strict=True)
    return {name: tuple(x.shape) for name, x in pairs if hasattr(x, "shape")}


def check_unit_axis(given: Any) -> None:
    """Raises unless a value is None, an axis or several, or a mapping to such."""
    values = given.values() if isinstance(given, Mapping) else (given,)
    for value in values if given is not None else ():
        axes = value if isinstance(value, tuple) else (value,)
        if not axes or any(
            isinstance(a, bool) or not isinstance(a, int | np.integer) for a in axes
        ):
            cure = "Give -1, (-2, -1) or {'query/kernel': (1, 2)}, or leave it out."
            fail("unit_axis", given, "axes of output units, or a dict of them", cure)


def unit_axes(
    layers: Layers, tree: PyTree, given: int | Mapping[str, Any] | None
) -> list[tuple[int, ...] | None]:
    """For each leaf the axes of output units, counted in one layer; None if they cannot
    be told. ``given`` is that axis for all leaves, or ``{name: axis or axes}``. The
    tree has the shapes of all leaves, also of those that do not take part.
    """
    check_unit_axis(given)
    named: Any = given if isinstance(given, Mapping) else {}
    if unknown := sorted(set(named) - set(layers.names)):
        raise ArgumentError(
            f"`unit_axis` names {unknown}, which are no layers here; it must name some "
            f"of {list(layers.names)}. Correct the names."
        )
    shapes, found = shapes_by_name(tree), []
    for leaf in layers.leaves:
        rank = len(leaf.layer_shape)
        if rank < 2:  # each weight of a vector is a unit, and a scalar has none
            found.append((0,) if rank else None)
            continue
        axis: Any = named.get(leaf.name) if given is named else given
        if axis is None:
            told = layout(leaf.name, shapes, leaf.axis)
            found.append(None if told is None else _in_layer(told.outputs, leaf.axis))
            continue
        axes = axis if isinstance(axis, tuple) else (axis,)
        if not all(-rank <= a < rank for a in axes):
            raise ArgumentError(
                f"`unit_axis`={axis!r} is no axis of {leaf.name!r}, whose layers have "
                f"{rank} axes; it must be in [{-rank}, {rank - 1}]. Leave it out to "
                "have it told from the layout of the layer."
            )
        found.append(tuple(a % rank for a in axes))
    return found


def _in_layer(axes: tuple[int, ...], stacked: int | None) -> tuple[int, ...]:
    """Axes of a leaf as axes of one of its layers."""
    return tuple(a - (stacked is not None and a > stacked) for a in axes)


def _checked_axis(name: str, shape: tuple[int, ...], axis: int) -> int:
    rank = len(shape)
    if not -rank <= axis < rank or rank < 2:
        raise ArgumentError(
            f"`stacked` gives axis {axis} for the leaf {name!r} of shape {shape}; the "
            f"axis must be in [{-rank}, {rank - 1}] of a leaf of two or more "
            "dimensions. Correct the axis."
        )
    return axis % rank


# --- vectors over layers --------------------------------------------------------------
def layer_sizes(
    shapes: Sequence[tuple[int, ...]], axes: Sequence[int | None]
) -> np.ndarray:
    """Number of weights in each layer, int64."""
    sizes: list[int] = []
    for shape, axis in zip(shapes, axes, strict=True):
        layers = 1 if axis is None else shape[axis]
        sizes += [math.prod(shape) // max(layers, 1)] * layers
    return np.asarray(sizes, np.int64)


def split_layers(
    vector: Any, shapes: Sequence[tuple[int, ...]], axes: Sequence[int | None]
) -> tuple[Any, ...]:
    """Cuts a vector over layers into a number per leaf, or (L,) if it stacks L."""
    numbers = [
        None if axis is None else shape[axis]
        for shape, axis in zip(shapes, axes, strict=True)
    ]
    widths = [1 if n is None else n for n in numbers]
    starts = np.cumsum([0, *widths])[:-1].tolist()
    if not isinstance(vector, jax.Array):
        columns = zip(starts, numbers, strict=True)
        return tuple(vector[s] if n is None else vector[s : s + n] for s, n in columns)
    marks = as_data([[start] for start in starts])
    columns = zip(marks, widths, strict=True)
    parts = [entries(vector, mark[0], width) for mark, width in columns]
    pairs = zip(parts, numbers, strict=True)
    return tuple(jnp.squeeze(part) if n is None else part for part, n in pairs)


def flat_counts(parts: Sequence[Any]) -> np.ndarray:
    """Counts of leaves, a number or one per layer each, as one int64 vector."""
    flat = [np.reshape(np.asarray(part, np.int64), -1) for part in parts]
    return np.concatenate(flat) if flat else np.zeros(0, np.int64)
