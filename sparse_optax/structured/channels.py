"""``channels``: which slices of which leaves are one unit, and what is done with them.

A pattern cuts each leaf into units of its own, and the engine counts them leaf by leaf.
A channel has slices in several leaves, and an entry of a kernel belongs to two of them,
that of its input and that of its output. So channels are no pattern but an object of
their own: it scores, selects and masks units, and hands over masks of weights, which
every other part of this package takes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from sparse_optax import checks
from sparse_optax.budgets import count
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.export.compaction import ties
from sparse_optax.export.compaction.program import trace
from sparse_optax.layers import PyTree, Where, choose, is_hole, leaf_names
from sparse_optax.scoring import batches as over
from sparse_optax.selection.leaf import wide as as_wide

SCOPES = ("global", "group")


class ChannelGroup(NamedTuple):
    """Units that have slices in the same leaves along the same axes.

    Attributes:
      name: The leaf that comes first, and its axis, such as ``"conv/kernel:3"``.
      size: Number of units.
      slices: ``(leaf, axis, each)``: a unit has ``each`` slices of the leaf along the
        axis; more than one behind a flattened image, or for a head.
    """

    name: str
    size: int
    slices: tuple[tuple[str, int, int], ...]


class _Place(NamedTuple):
    """An axis of a leaf that is cut by units."""

    leaf: int
    axis: int
    units: np.ndarray  # of each index, the number of all units for one that stays


class Channels:
    """Units of a network, made by ``channels``. ``len`` is their number.

    Units are numbered group by group. Attributes:

    - ``groups``: a ``ChannelGroup`` for each kind of unit.
    - ``group``: int array, for each unit the number of its group.
    - ``names``: the names of all leaves.
    - ``scored``: names of the leaves whose weights count in scores.
    - ``sizes``: for each unit, how many weights count.
    """

    def __init__(self, like: PyTree, tied: ties.Tied, scored: Sequence[bool]):
        """Made by ``channels``."""
        flat, self._structure = jax.tree.flatten(like, is_leaf=is_hole)
        self.names = tuple(leaf_names(like))
        self._shapes = [np.shape(x) for x in flat]
        self._scored = tuple(scored)
        order, self.group = _grouped(tied)
        number = np.append(np.argsort(order), tied.number)  # of each tied unit
        self._places = tuple(_Place(i, a, number[u]) for i, a, u in tied.places)
        self._terms = [
            (term.times, [number[u] for u in term.lengths]) for term in tied.terms
        ]
        self.groups = tuple(
            self._named(np.flatnonzero(self.group == g))
            for g in range(int(self.group.max(initial=-1)) + 1)
        )
        self.sizes = self._weights_of_units()
        self.scored = tuple(n for n, s in zip(self.names, scored, strict=True) if s)

    def __len__(self) -> int:
        return len(self.group)

    def _named(self, members: np.ndarray) -> ChannelGroup:
        slices = tuple(
            (self.names[p.leaf], p.axis, int((p.units == members[0]).sum()))
            for p in self._places
            if (p.units == members[0]).any()
        )
        name, axis, _ = slices[0]
        return ChannelGroup(f"{name}:{axis}", len(members), slices)

    def _weights_of_units(self) -> np.ndarray:
        """How many scored weights each unit has."""
        sizes = np.zeros(len(self) + 1)
        for p in self._places:
            if self._scored[p.leaf]:
                shape = self._shapes[p.leaf]
                np.add.at(sizes, p.units, np.prod(shape) / shape[p.axis])
        return sizes[:-1]

    @property
    def leaves(self) -> tuple[int, ...]:
        """Numbers of the leaves that have units."""
        return tuple(sorted({p.leaf for p in self._places}))

    def table(self) -> str:
        """Aligned plain text, one line per group."""
        rows = [("group", "units", "slices")]
        for x in self.groups:
            parts = [
                f"{name}:{axis}" + (f" x {each}" if each > 1 else "")
                for name, axis, each in x.slices
            ]
            rows.append((x.name, str(x.size), ", ".join(parts)))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        return "\n".join(
            f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c}" for a, b, c in rows
        )

    # --- scores -----------------------------------------------------------------------
    def scores(self, tree: PyTree, *, mean: bool = True) -> jax.Array:
        """The score of each unit: that of its weights, in magnitude.

        Args:
          tree: A number for each weight, a tree like the parameters: the parameters
            for magnitude, ``jax.tree.map(lambda w, g: w * g, params, grads)`` for the
            summed T of GSM. Of leaves that are not in ``scored`` nothing is read.
          mean: Whether the sum is divided by the number of weights, so that units of
            different groups compare. GSM's T is the sum.

        Returns:
          float32 array, one score for each unit, 0 or more.

        Raises:
          ValueError: If the tree does not fit.
        """
        return _scores(self, tree, mean)

    def fisher(
        self,
        loss: Callable[[PyTree, Any], jax.Array],
        params: PyTree,
        batches: Iterable[Any],
    ) -> jax.Array:
        r"""The Fisher score of each unit: what its removal costs, to second order.

        With :math:`g_n` the gradient of the loss of example n and u the weights of a
        unit that are scored:

        .. math:: \tfrac{1}{2N} \sum_n \Big(\sum_{k \in u} w_k g_{nk}\Big)^2

        Args:
          loss: ``loss(params, example)`` of one example, a scalar.
          params: The parameters.
          batches: Batches whose first axis counts examples, as in ``fisher_masks``.

        Returns:
          float32 array, one score for each unit, for ``select``.

        Raises:
          ValueError: If an argument does not fit.
        """
        return _fisher(self, loss, params, batches)

    def penalty(self, params: PyTree) -> jax.Array:
        r"""The penalty of the group lasso, to add to a loss.

        .. math:: \sum_u \sqrt{n_u} \, \lVert w_u \rVert_2

        over units u with their :math:`n_u` scored weights. Its gradient is zero where a
        unit is zero.

        Args:
          params: The parameters.

        Returns:
          A scalar, 0 or more.

        Raises:
          ValueError: If the parameters do not fit.
        """
        return _penalty(self, params)

    # --- selection --------------------------------------------------------------------
    def select(
        self,
        scores: Any,
        density: float | None = None,
        *,
        multiply_adds: float | None = None,
        scope: str = "global",
    ) -> jax.Array:
        """The units of the highest scores.

        Exactly ``count(density, n)`` units of n are kept, at least one of each group;
        or as many as leave at most a share of the multiply-adds. Of equal scores the
        lower number stays.

        Args:
          scores: A score for each unit, finite and 0 or more.
          density: Share of the units that is kept, in (0, 1].
          multiply_adds: Instead, the largest share of the multiply-adds, in (0, 1].
          scope: ``"global"`` ranks all units in one pool; ``"group"`` keeps the density
            in each group. With ``multiply_adds`` all groups shrink alike then.

        Returns:
          Boolean array, True for units that are kept.

        Raises:
          ValueError: If an argument does not fit, or one unit of each group costs more.
        """
        return _select(self, scores, density, multiply_adds, scope)

    def masks(self, kept: Any) -> PyTree:
        """Masks of the weights whose units are all kept.

        Args:
          kept: Boolean array, one entry for each unit.

        Returns:
          A mask tree: also for the biases, scales and statistics of units, and
          ``optax.MaskedNode()`` for leaves without units.

        Raises:
          ValueError: If there is not one entry for each unit.
        """
        return _masks(self, kept)

    def multiply_adds(self, kept: Any = None) -> int:
        """Multiply-adds of the products and convolutions that are left.

        Args:
          kept: Boolean array, one entry for each unit; None keeps all.

        Returns:
          Their number for the example that was given to ``channels``.

        Raises:
          ValueError: If there is not one entry for each unit.
        """
        return _multiply_adds(self, kept)

    def savings(self) -> np.ndarray:
        """Multiply-adds that each unit saves if it goes alone, an int array. Scores
        divided by it rank by what a unit is worth for its cost.
        """
        return _savings(self)

    def lengths(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What multiply-adds are made of: how often each unit, and at the end what
        stays, is in each length, (lengths, units + 1); for each product the numbers of
        its lengths, a last one being 1, (products, factors); and its factor.
        """
        rows: list[np.ndarray] = []
        known: dict[bytes, int] = {}
        numbers, width = [], max((len(x) for _, x in self._terms), default=0)
        for _, parts in self._terms:
            own = []
            for part in parts:
                key = part.tobytes()
                if key not in known:
                    known[key] = len(rows)
                    rows.append(np.bincount(part, minlength=len(self) + 1))
                own.append(known[key])
            numbers.append(own + [-1] * (width - len(own)))
        counts = np.array(rows, np.float32).reshape(-1, len(self) + 1)
        times = np.array([x for x, _ in self._terms], np.float32)
        return counts, np.array(numbers, np.int32).reshape(len(times), width), times

    # --- inside -----------------------------------------------------------------------
    def pick(self, tree: PyTree, argument: str) -> list[Any]:
        """The leaves of a tree like the parameters, checked."""
        flat = jax.tree.leaves(tree, is_leaf=is_hole)
        names = leaf_names(tree)
        if tuple(names) != self.names:
            raise ArgumentError(
                f"`{argument}` has the leaves {names}; they must be those in which the "
                f"units were found, {list(self.names)}. Pass a tree like these."
            )
        for i in self.leaves:
            if np.shape(flat[i]) != self._shapes[i]:
                raise ArgumentError(
                    f"`{argument}` has shape {np.shape(flat[i])} for "
                    f"{self.names[i]!r}; it must be {self._shapes[i]}. Pass a tree "
                    "like the parameters."
                )
        return flat

    def sums(self, flat: Sequence[Any], combine: Callable[[Any], Any]) -> jax.Array:
        """The sum over the scored weights of each unit, after a function of them."""
        total = jnp.zeros(len(self) + 1, jnp.float32)
        for p in self._places:
            if not self._scored[p.leaf]:
                continue
            x = jnp.asarray(flat[p.leaf])
            others = tuple(i for i in range(x.ndim) if i != p.axis)
            along = _whole(jnp.sum(combine(x.astype(as_wide(x.dtype))), others))
            total = total.at[p.units].add(along.astype(jnp.float32))
        return total[:-1]

    def alive(self, masks: Sequence[Any]) -> jax.Array:
        """Which units masks keep, one mask for each of ``leaves``."""
        of = dict(zip(self.leaves, masks, strict=True))
        found = jnp.zeros(len(self) + 1, jnp.int32)
        for p in self._places:
            mask = of[p.leaf]
            others = tuple(i for i in range(mask.ndim) if i != p.axis)
            along = _whole(jnp.any(mask, others).astype(jnp.int32))
            found = found.at[p.units].max(along)
        return found[:-1] > 0

    def mask_leaves(self, kept: jax.Array) -> list[jax.Array]:
        """Masks of the leaves that have units."""
        padded = jnp.append(kept, True)
        made: dict[int, jax.Array] = {}
        for p in self._places:
            line = [1] * len(self._shapes[p.leaf])
            line[p.axis] = -1
            mask = padded[p.units].reshape(line)
            if p.leaf in made:
                old = made[p.leaf]
                mask = jnp.logical_and(*jnp.broadcast_arrays(old, mask))
            made[p.leaf] = mask
        return [jnp.broadcast_to(made[i], self._shapes[i]) for i in self.leaves]

    def ranks(self, scores: jax.Array, scope: str) -> jax.Array:
        """The place of each unit in the order in which they are kept: 0 comes first. In
        one pool the best unit of each group comes before all others; by groups each has
        an order of its own.
        """
        number = jnp.arange(len(self), dtype=jnp.int32)
        group = jnp.asarray(self.group, jnp.int32)
        # Groups stand one behind the other.
        order = jnp.lexsort((-scores, group))
        starts = jnp.asarray(self._starts())[group]
        within = jnp.zeros_like(number).at[order].set(number) - starts
        if scope == "group":
            return within
        order = jnp.lexsort((-scores, within > 0))
        return jnp.zeros_like(number).at[order].set(number)

    def _starts(self) -> np.ndarray:
        sizes = [x.size for x in self.groups]
        return np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int32)

    def counts(self, density: float, scope: str) -> Any:
        """How many units stay, in one pool or for the group of each unit."""
        if scope == "global":
            return max(count(density, len(self)), len(self.groups))
        each = np.array([max(count(density, x.size), 1) for x in self.groups], int)
        return each[self.group] if len(each) else np.zeros(0, int)


@boundary("channels")
def channels(
    fn: Callable[..., Any],
    params: PyTree,
    *example: Any,
    where: Where | None = None,
) -> Channels:
    """Finds the units of a network: the slices of parameters that belong together.

    A unit is a channel of a convolution with its scale, its shift and the weights that
    read it; a hidden unit; a head of attention. Channels that are added to each other
    are one unit. Which these are is read from the traced program, by the analysis that
    ``compact`` makes, for a function of any framework; nothing is declared. Where the
    weights of a unit are all zero, the rest of the network computes what it would
    compute without the unit, and ``compact`` makes the network smaller.

    Units are found along axes that pass through operations one by one. An axis that is
    normalised over, goes through a softmax, is summed without weights, or reaches a
    result has none, as the residual stream of a transformer with layer norm. What
    enters a loop that carries values has none either. A grouped convolution has one
    unit for each group.

    .. note:: Units of several leaves do not fit ``pattern=``, which cuts each leaf into
      units of its own. They come as masks of weights instead: ``static_sparse(inner,
      masks=units.masks(kept))`` trains what is left, ``gradual_channels`` prunes while
      it trains, ``gate_channels`` is the gate of GSM.

    Args:
      fn: The model as it is used, called as ``fn(params, *args)``: without dropout, and
        with running statistics where it has batch norm. New statistics among its
        results would fix their units.
      params: Its parameters, a tree of arrays, concrete or abstract; also with running
        statistics. Statistics that ``fn`` closes over have no slices in units.
      *example: Its other arguments, concrete or abstract, of sizes that are numbers.
      where: Which leaves count in scores, see ``eligible``: by default kernels. Masks
        cover all leaves of units.

    Returns:
      A ``Channels``.

    Raises:
      ValueError: If ``fn`` cannot be traced with the example, or has no unit.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> from sparse_optax import structured
      >>> def model(params, x):
      ...     hidden = jnp.maximum(x @ params["v"] + params["b"][None], 0)
      ...     return hidden @ params["w"]
      >>> v = jnp.array([[1.0, 0.1, 2.0], [0.5, 0.0, 3.0]])
      >>> params = {"b": jnp.ones(3), "v": v, "w": jnp.array([[1.0], [0.1], [2.0]])}
      >>> x = jnp.array([[1.0, 2.0]])
      >>> units = structured.channels(model, params, x)
      >>> print(units.table())
      group  units  slices
      b:0        3  b:0, v:1, w:0
      >>> kept = units.select(units.scores(params), 2 / 3)
      >>> kept.tolist(), units.multiply_adds(), units.multiply_adds(kept)
      ([True, False, True], 9, 6)
      >>> pruned = sparse_optax.sparsify(params, units.masks(kept))
      >>> sparse_optax.compact(model, pruned, x).params["v"].shape
      (2, 2)
    """
    if not callable(fn):
        checks.fail("fn", fn, "a function fn(params, *args)", "Pass model.apply.")
    flat, structure = jax.tree.flatten(params)
    given = [_abstract(x) for x in flat]
    rest, own = jax.tree.flatten(tuple(example))

    def whole(leaves, rest):
        return fn(jax.tree.unflatten(structure, leaves), *jax.tree.unflatten(own, rest))

    program, _ = trace(whole, given, [_abstract(x) for x in rest])
    usable = [jnp.issubdtype(x.dtype, jnp.inexact) for x in given]
    tied = ties.tie(program, len(flat), usable)
    if not tied.number:
        raise ArgumentError(
            "`fn` has no unit that could go alone; it must have a hidden layer whose "
            "outputs enter a product with weights. Look at the results of `fn`: what "
            "they contain is whole."
        )
    like = jax.tree.unflatten(structure, given)
    return Channels(like, tied, choose(like, where))


def _whole(x: jax.Array) -> jax.Array:
    """A vector on all devices: an Explicit mesh does not add up what it splits."""
    sharding = jax.typeof(x).sharding
    if sharding.mesh.empty:
        return x
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def laid_like(mask: jax.Array, leaf: Any) -> jax.Array:
    """A mask with the sharding of its leaf."""
    abstract = isinstance(leaf, jax.ShapeDtypeStruct)
    if abstract or jax.typeof(mask).sharding == jax.typeof(leaf).sharding:
        return mask
    return jnp.logical_and(mask, jnp.ones_like(leaf, dtype=bool))


def _abstract(x: Any) -> Any:
    """The shape of an argument, without its values."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x
    aval = jax.typeof(x)
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


def _grouped(tied: ties.Tied) -> tuple[np.ndarray, np.ndarray]:
    """Units in the order of their groups, and the group of each in this order. Units of
    one group have slices in the same places.
    """
    seen = np.zeros((tied.number, len(tied.places)), bool)
    for place, (_, _, units) in enumerate(tied.places):
        seen[units[units >= 0], place] = True
    _, first, kind = np.unique(seen, axis=0, return_index=True, return_inverse=True)
    place = np.argsort(np.argsort(first))[kind.reshape(-1)]  # groups as they come
    order = np.argsort(place, kind="stable")
    return order, place[order]


# --- scores ---------------------------------------------------------------------------
@boundary("scores")
def _scores(units: Channels, tree: PyTree, mean: bool) -> jax.Array:
    checks.flag("mean", mean)
    total = units.sums(units.pick(tree, "tree"), jnp.abs)
    return total / np.maximum(units.sizes, 1).astype(np.float32) if mean else total


@boundary("fisher")
def _fisher(units: Channels, loss: Any, params: PyTree, batches: Any) -> jax.Array:
    flat = units.pick(params, "params")
    parts = over.split(params, [i for i, s in enumerate(units._scored) if s])
    scored = [i for i, s in enumerate(units._scored) if s]

    def squares(chosen, example):
        def of(chosen):
            value = loss(parts.rebuild(chosen), example)
            over.check_scalar(value)
            return value

        products = list(flat)
        for i, w, g in zip(scored, chosen, jax.grad(of)(chosen), strict=True):
            products[i] = w * g
        return [jnp.square(units.sums(products, jnp.real)) / 2]

    (found,) = over.mean_over_examples(squares, parts.chosen, batches)
    over.check_finite([found], ["units"], cure="Check the loss and its gradient.")
    return found


@boundary("penalty")
def _penalty(units: Channels, params: PyTree) -> jax.Array:
    flat = units.pick(params, "params")
    squares = units.sums(flat, lambda x: jnp.square(jnp.abs(x)))
    there = squares > 0
    norms = jnp.where(there, jnp.sqrt(jnp.where(there, squares, 1)), 0)
    return jnp.sum(np.sqrt(units.sizes).astype(np.float32) * norms)


# --- selection ------------------------------------------------------------------------
_DENSITY = "Give one of density=0.5 and multiply_adds=0.5."


def check_goal(density: Any, multiply_adds: Any, scope: Any) -> None:
    """Raises unless one of two shares is given, and a scope."""
    cure = 'Use "group" to keep the density in each group.'
    checks.choice("scope", scope, SCOPES, cure=cure)
    if (density is None) == (multiply_adds is None):
        raise ArgumentError(
            f"`density`={density!r} and `multiply_adds`={multiply_adds!r}: exactly one "
            f"of the two must be given. {_DENSITY}"
        )
    for name, share in (("density", density), ("multiply_adds", multiply_adds)):
        if share is not None:
            checks.number(name, share, 0, 1, ends="(]", static=True, cure=_DENSITY)


@boundary("select")
def _select(
    units: Channels, scores: Any, density: Any, multiply_adds: Any, scope: str
) -> jax.Array:
    check_goal(density, multiply_adds, scope)
    scores = _checked(units, scores)
    ranks = units.ranks(scores, scope)
    if density is not None:
        return ranks < units.counts(density, scope)
    if isinstance(ranks, Tracer):
        raise ArgumentError(
            "`scores` is traced, and `multiply_adds` is counted on the host; they must "
            "be concrete. Call select outside of jit, or give a density."
        )
    place = np.asarray(ranks)
    return jnp.asarray(place < fitting(units, place, multiply_adds, scope))


def _checked(units: Channels, scores: Any) -> jax.Array:
    scores = jnp.asarray(scores, jnp.float32)
    if scores.shape != (len(units),):
        allowed = f"an array of {len(units)} scores, one for each unit"
        checks.fail("scores", scores.shape, allowed, "Take them from units.scores.")
    if not isinstance(scores, Tracer) and not bool(
        (jnp.isfinite(scores) & (scores >= 0)).all()
    ):
        raise ArgumentError(
            "`scores` has numbers that are negative or not finite; they must be finite "
            "and 0 or more. Take magnitudes, and check the weights or gradients."
        )
    return scores


def fitting(units: Channels, place: np.ndarray, share: float, scope: str) -> Any:
    """How far down an order of units one may go within a share of the multiply-adds: a
    rank, or one for the group of each unit.
    """
    limit = share * units.multiply_adds()
    low, high = 0, len(units) + 1  # the first fits, the last does not
    while high - low > 1:
        middle = (low + high) // 2
        cost = units.multiply_adds(place < _depth(units, middle, scope))
        low, high = (middle, high) if cost <= limit else (low, middle)
    least = units.multiply_adds(place < _depth(units, 0, scope))
    if least > limit:
        raise ArgumentError(
            f"`multiply_adds`={share!r} allows {int(limit):,} multiply-adds, and one "
            f"unit of each group costs {least:,}; it must be at least "
            f"{least / units.multiply_adds():.3g}. Give more."
        )
    return _depth(units, low, scope)


def _depth(units: Channels, n: int, scope: str) -> Any:
    """The ranks that stay at the n-th of ``len(units)`` steps from few to all units."""
    if scope == "global":
        return max(n, len(units.groups))
    sizes = np.array([x.size for x in units.groups])
    return np.maximum(n * sizes // max(len(units), 1), 1)[units.group]


# --- masks and costs ------------------------------------------------------------------
def _as_kept(units: Channels, kept: Any) -> Any:
    if np.shape(kept) != (len(units),) or np.dtype(kept.dtype) != bool:
        allowed = f"a boolean array of {len(units)} entries, one for each unit"
        got = np.shape(kept), getattr(kept, "dtype", type(kept).__name__)
        checks.fail("kept", got, allowed, "Take it from units.select.")
    return kept


@boundary("masks")
def _masks(units: Channels, kept: Any) -> PyTree:
    made = units.mask_leaves(jnp.asarray(_as_kept(units, kept)))
    full: list[Any] = [optax.MaskedNode()] * len(units.names)
    for i, mask in zip(units.leaves, made, strict=True):
        full[i] = mask
    return jax.tree.unflatten(units._structure, full)


@boundary("multiply_adds")
def _multiply_adds(units: Channels, kept: Any) -> int:
    if kept is None:
        kept = np.ones(len(units), bool)
    kept = np.append(np.asarray(_as_kept(units, kept)), True)
    total = 0
    for times, lengths in units._terms:
        for indices in lengths:
            times *= int(kept[indices].sum())
        total += times
    return total


def _savings(units: Channels) -> np.ndarray:
    saved = np.zeros(len(units) + 1, np.int64)
    for times, lengths in units._terms:
        own = [np.bincount(u, minlength=len(units) + 1) for u in lengths]
        whole = [len(u) for u in lengths]
        left = np.full(len(units) + 1, times)
        for gone, n in zip(own, whole, strict=True):
            left = left * (n - gone)
        saved += times * int(np.prod(whole)) - left
    return saved[:-1]
