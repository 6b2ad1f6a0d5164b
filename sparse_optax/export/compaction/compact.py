"""``compact``: a smaller dense model that computes the same function."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.encoding import suffixed
from sparse_optax.export.compaction.analysis import Analysis
from sparse_optax.export.compaction.facts import (
    Box,
    Settings,
    as_mask,
    as_numbers,
    covers,
    cut,
    everything,
    lengths,
    union,
)
from sparse_optax.export.compaction.program import Program, trace
from sparse_optax.export.compaction.record import CompactRecord, record_of
from sparse_optax.export.model import by_parameter
from sparse_optax.export.timing import least_seconds
from sparse_optax.layers import (
    PyTree,
    array_names,
    is_abstract,
    is_hole,
    is_mask,
    is_packed,
    path_name,
)
from sparse_optax.masks.optimizer_state import named_masks
from sparse_optax.masks.tree import pack, unpack

State = Callable[[Any], PyTree]


class CompactModel:
    """A smaller model, made by ``compact``.

    Call it like the function that it was made from, with ``params`` in place of the
    parameters. It is an ordinary function of JAX: ``jax.jit``, ``jax.grad``,
    ``jax.vmap`` and ``jax.export`` work. It takes a batch of any size. The first call
    with arguments of other shapes analyses the function again.

    Attributes:
      params: The smaller parameters, a tree of the same type. A leaf of which nothing
        is needed has no entries.
      record: What went, layer by layer, a ``CompactRecord``.
    """

    def __init__(self, source: "Source", boxes: Sequence[Box], record: CompactRecord):
        """Made by ``compact``."""
        self._source = source
        self._boxes = tuple(boxes)
        self._plans: dict[Any, Any] = {}
        self.record = record
        self.params = jax.tree.unflatten(
            source.structure,
            [_cut_leaf(x, b) for x, b in zip(source.leaves, boxes, strict=True)],
        )

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """The results of the function, as it would give them."""
        return _call(self, params, *args)

    def cut(self, tree: PyTree) -> PyTree:
        """What belongs to the smaller parameters: of an optimizer state, of masks, of
        gradients or of other parameters, such as an average of those of training.

        Other parameters need a model made with ``fold=False``: what was folded keeps
        the numbers of the parameters that were given to ``compact``.

        Args:
          tree: A tree with leaves named like those of the parameters and of the same
            shape, at any depth, such as an optimizer state; other leaves stay.

        Returns:
          The tree with these leaves cut.
        """
        return _cut(self, tree)

    def expand(self, params: PyTree, into: PyTree | None = None) -> PyTree:
        """The parameters at full size again.

        Args:
          params: Smaller parameters, also after training; with ``into`` also masks as
            ``cut`` gives them.
          into: Where they are put: parameters, or a tree like them such as masks. None
            takes the parameters that were given to ``compact``.

        Returns:
          A tree like ``into``: the smaller arrays at their places, all else as it was.
        """
        return _expand(self, params, into)


class Source(NamedTuple):
    """The dense model that a ``CompactModel`` is made from."""

    fn: Callable[..., Any]
    structure: Any
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    kept: tuple[np.ndarray | None, ...]  # masks
    state: State | None
    settings: Settings

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the leaves."""
        return [np.shape(x) for x in self.leaves]


@boundary("compact")
def compact(
    fn: Callable[..., Any],
    params: PyTree,
    *example: Any,
    masks: PyTree | None = None,
    state: State | None = None,
    fold: bool = True,
    round_to: int | str = 1,
    in_place: bool = False,
) -> CompactModel:
    r"""A smaller dense model that computes the same function.

    Units go of which nothing reads the output, or which no input feeds: a unit without
    incoming weights is a number, and what it adds to the next layer is computed once.
    Which these are is read from the traced program, for a function of any framework;
    nothing is declared. With :math:`m_1, m_2` inputs and outputs left of a layer, its
    products take :math:`m_1 m_2` multiply-adds per example.

    For each value of the program and each axis of it two things are found: which slices
    are one known number, whatever the input is, and which slices anything later reads.
    Operations without a rule need all of their operands: they are left whole, and named
    in the record. So the result is never wrong, only less small. Zero times a value
    counts as zero: the function must not rely on infinite numbers or NaN.

    **To train on**, cut the optimizer state and the masks with ``cut``: zeros inside of
    the smaller arrays stay zero by masks, as before, and what is outside stays as it
    is. A unit that is a known number goes. So its own bias does not learn any more,
    while the bias of the next layer does; the gradient of a bias that is read elsewhere
    too lacks this part. ``fold=False`` keeps such units: then all gradients are those
    of the dense model.

    Of the inputs of the function, or what another layer reads, few dead ones stay
    where to take the others out costs more than it saves: one taken entry is counted
    as 40 multiply-adds.

    **Smaller is not always faster.** The default cuts all that can go: it costs
    nothing to decide, and is the same on every machine. ``round_to="measured"``
    compiles the function for a few roundings, and as it is, and takes the fastest. What
    was measured is remembered as long as the process runs.

    **In place.** A module whose code reads the sizes of its arrays, as those of
    ``flax.nnx`` do, computes the same with smaller ones: ``nnx.merge(graph,
    small.params)``. With ``in_place=True`` only what this allows is cut: the inputs and
    outputs of ``fn`` stay whole, no unit goes that is a known number, and each layer
    takes what the one before it gives.

    Args:
      fn: The function, called as ``fn(params, *args)``: a model, or a loss. What it
        closes over is constant. Static arguments are bound with ``functools.partial``.
      params: Its parameters, a tree of concrete arrays; also with running statistics,
        as in ``nnx.state(model)``.
      *example: Its other arguments, concrete or abstract.
      masks: Masks or an optimizer state. A weight that they keep stays, also if it is
        zero now, as weights are that have just grown. None keeps what is not zero.
      state: For a function that returns new values of some of the parameters, such as
        running statistics: ``state(result)`` gives these as a tree with their names.
        They come back cut like the parameters. None: all results are whole.
      fold: Whether units go that are a known number. False keeps them, to train on.
      round_to: Sizes over which a product sums are rounded up to multiples of it, by
        keeping units that could go, at least 1; or ``"measured"``.
      in_place: Whether ``fn`` itself must run on the smaller parameters; ``fold`` is
        then False.

    Returns:
      A ``CompactModel``, with ``params`` and ``record``; it is called like ``fn``.

    Raises:
      ValueError: If a leaf is no concrete array, masks do not fit, ``fn`` cannot be
        traced with the example, or its code fixes shapes and ``in_place`` is True.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> def model(params, x):
      ...     hidden = jnp.maximum(x @ params["v"] + params["b"], 0)
      ...     return hidden @ params["w"]
      >>> v = jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
      >>> params = {"b": jnp.ones(3), "v": v, "w": jnp.array([[1.0], [5.0], [0.0]])}
      >>> x = jnp.array([[1.0, 2.0]])
      >>> small = sparse_optax.compact(model, params, x)
      >>> small.params["v"].shape, small.params["w"].shape
      ((2, 1), (1, 1))
      >>> model(params, x).tolist(), small(small.params, x).tolist()
      ([[7.0]], [[7.0]])
      >>> print(small.record.table())
      layer  shape  small shape  multiply-adds  small  ratio
      b          3            1              0      0      -
      v      2 x 3        2 x 1              6      2   3.00
      w      3 x 1        1 x 1              3      1   3.00
      total     12            4              9      3   3.00
    """
    if not callable(fn):
        checks.fail("fn", fn, "a function fn(params, *args)", "Pass model.apply.")
    if round_to != "measured":
        cure = 'Give 8, for instance, or "measured".'
        if isinstance(round_to, str):
            checks.fail("round_to", round_to, 'an integer or "measured"', cure)
        checks.whole("round_to", round_to, 1, static=True, cure=cure)
    checks.flag("fold", fold)
    checks.flag("in_place", in_place)
    settings = Settings(fold=fold and not in_place, in_place=in_place)
    source = source_of(fn, params, masks, state, settings)
    if round_to == "measured":
        made = _fastest(source, example)
    else:
        settings = settings._replace(round_to=int(round_to))
        made = _build(source._replace(settings=settings), example)
    if in_place:
        _check_in_place(made, example)
    return made


def _check_in_place(model: CompactModel, example: Sequence[Any]) -> None:
    """Raises unless the function runs on the smaller parameters, with their result."""
    args = jax.tree.map(_concrete, tuple(example))
    reason, fn = None, model._source.fn
    try:
        found = jax.tree.leaves(jax.jit(fn)(model.params, *args))
        expected = jax.tree.leaves(jax.jit(model)(model.params, *args))
        if not all(map(_is_close, found, expected)):
            reason = "its results differ"
    except Exception as error:  # whatever the code of others raises
        reason = str(error).partition("\n")[0]
    if reason is not None:
        raise ArgumentError(
            f"`in_place` is True, and `fn` does not run on the smaller parameters "
            f"({reason}); its code must read sizes from its arrays. Leave `in_place` "
            "out and call what compact returns."
        )


def _is_close(x: Any, y: Any) -> bool:
    """Whether two results are the same but for rounding."""
    if jnp.shape(x) != jnp.shape(y):
        return False
    x, y = np.asarray(x), np.asarray(y)
    return bool(np.allclose(x, y, rtol=1e-3, atol=1e-3 * np.abs(y).max(initial=0)))


# Roundings that are measured: vectors of this many numbers are what cores compute with.
_ROUNDINGS = (1, 8, 16, 32)


def source_of(
    fn: Any, params: PyTree, masks: PyTree | None, state: Any, settings: Settings
) -> Source:
    """The dense model, checked."""
    if state is not None and not callable(state):
        cure = 'Give lambda result: {"stats": result[1]}, for instance.'
        checks.fail("state", state, "a function of the result", cure)
    leaves, structure = jax.tree.flatten(params)
    names = array_names(params)
    for name, x in zip(names, leaves, strict=True):
        if is_abstract(x) or not isinstance(
            x, jax.Array | np.ndarray | np.generic | float | int | complex
        ):
            raise ArgumentError(
                f"the leaf {name!r} of `params` is {type(x).__name__}; it must be a "
                "concrete array. Call it outside of jit, with the arrays of the model "
                "alone: eqx.filter(model, eqx.is_array) in equinox."
            )
    kept = kept_of(names, leaves, masks)
    return Source(fn, structure, tuple(leaves), tuple(names), kept, state, settings)


def kept_of(
    names: Sequence[str], leaves: Sequence[Any], masks: PyTree | None
) -> tuple[np.ndarray | None, ...]:
    """The mask of each leaf, or None."""
    if masks is None:
        return (None,) * len(leaves)
    named = by_parameter(named_masks(masks), names)
    found = []
    for name, x in zip(names, leaves, strict=True):
        mask = named.get(name)
        mask = None if mask is None else np.asarray(unpack(mask))
        if mask is not None and mask.shape != np.shape(x):
            raise ArgumentError(
                f"`masks` has shape {mask.shape} for {name!r}; it must be "
                f"{np.shape(x)}. Pass masks made for these parameters."
            )
        found.append(mask)
    return tuple(found)


# --- the analysis ---------------------------------------------------------------------
def _abstract(x: Any) -> Any:
    """The shape of an argument, without its values."""
    aval = jax.typeof(x)
    weak = getattr(aval, "weak_type", False)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak)


class Traced(NamedTuple):
    """The program of a function of the leaves of its parameters and arguments."""

    program: Program
    result: Any  # the tree of results


class _Plan(NamedTuple):
    """A function analysed for arguments of certain shapes."""

    analysis: Analysis
    result: Any  # the tree of results
    run: Callable[..., list[Any]]


def traced_program(source: Source, args: Sequence[Any]) -> Traced:
    """Traces the function for arguments of these shapes."""
    flat, structure = jax.tree.flatten(tuple(args))
    dense = [_abstract(x) for x in source.leaves]
    given = [x if isinstance(x, jax.ShapeDtypeStruct) else _abstract(x) for x in flat]

    def whole(leaves, flat):
        params = jax.tree.unflatten(source.structure, leaves)
        return source.fn(params, *jax.tree.unflatten(structure, flat))

    return Traced(*trace(whole, dense, given))


def _plan(source: Source, args: Sequence[Any]) -> _Plan:
    """Analyses the function for arguments of these shapes."""
    traced = traced_program(source, args)
    analysis = analysis_of(source, traced)
    find_needed(source, traced, analysis)
    return _Plan(analysis, traced.result, analysis.run)


def analysis_of(source: Source, traced: Traced) -> Analysis:
    """What is known of the values of a program, with the numbers of the parameters."""
    program, n = traced.program, len(source.leaves)
    analysis = Analysis(program, source.settings)
    inputs = program.inputs[:n]
    for i, value in enumerate(inputs):
        analysis.set_exact(value, source.leaves[i], source.kept[i])
        analysis.origin[value] = frozenset([source.names[i]])
    analysis.at_hand.update(program.inputs[n:])
    analysis.forward()
    return analysis


def find_needed(source: Source, traced: Traced, analysis: Analysis) -> None:
    """Finds what is needed of the values of a program."""
    program = traced.program
    inputs = program.inputs[: len(source.leaves)]
    outputs = _state_outputs(source, traced.result)
    boxes: list[Box | None] = [everything(x) for x in program.outputs]
    boxes = [None if i in outputs else box for i, box in enumerate(boxes)]
    while True:
        analysis.backward(boxes)
        # A new value is needed where the old one is, and comes where all that it is
        # made of is there anyway: statistics that only a later evaluation reads.
        new = list(boxes)
        for i, leaf in outputs.items():
            new[i] = _either(
                analysis.need.get(inputs[leaf]),
                analysis.to_be_had(program.outputs[i]),
            )
        if all(covers(a, b) for a, b in zip(boxes, new, strict=True)):
            return
        boxes = new


def _either(a: Box | None, b: Box | None) -> Box | None:
    """The smallest box around two, of which either may be missing."""
    if a is None or b is None:
        return a if b is None else b
    return union(a, b)


def _state_outputs(source: Source, result: Any) -> dict[int, int]:
    """Which results are new values of which leaves."""
    if source.state is None:
        return {}
    flat, structure = jax.tree.flatten(result)
    numbered = jax.tree.unflatten(structure, list(range(len(flat))))
    picked = source.state(numbered)
    found = {}
    names = array_names(picked)
    for name, i in zip(
        suffixed(names, source.names), jax.tree.leaves(picked), strict=True
    ):
        if name not in source.names:
            raise ArgumentError(
                f"`state` gives {name!r}, which is no leaf of `params`; they are "
                f"{list(source.names)}. Give a tree with the names of the parameters."
            )
        leaf = source.names.index(name)
        if not isinstance(i, int) or tuple(flat[i].shape) != source.shapes[leaf]:
            raise ArgumentError(
                f"`state` gives for {name!r} no result of its shape "
                f"{source.shapes[leaf]}. Pick parts of the result as they are."
            )
        found[i] = leaf
    return found


def _nothing(shape: Sequence[int]) -> Box:
    """The box of a leaf of which nothing is needed."""
    return tuple(np.zeros(n, bool) for n in shape)


def _build(source: Source, example: Sequence[Any]) -> CompactModel:
    """A smaller model, for an example."""
    plan = _plan(source, example)
    need, inputs = plan.analysis.need, plan.analysis.program.inputs
    pairs = zip(inputs[: len(source.leaves)], source.shapes, strict=True)
    boxes = [need.get(x, _nothing(shape)) for x, shape in pairs]
    small = [lengths(b, s) for b, s in zip(boxes, source.shapes, strict=True)]
    record = record_of(plan.analysis, source.names, source.shapes, small)
    whole = source.settings.keep_all
    record = record._replace(round_to=None if whole else source.settings.round_to)
    made = CompactModel(source, boxes, record)
    key = _key(example)
    if key is not None:
        made._plans[key] = _compiled(plan)
    return made


def _key(args: Sequence[Any]) -> Any:
    """What a plan is kept by; None if a length is symbolic."""
    flat, structure = jax.tree.flatten(tuple(args))
    avals = [x if isinstance(x, jax.ShapeDtypeStruct) else _abstract(x) for x in flat]
    if not all(isinstance(n, int) for x in avals for n in x.shape):
        return None
    return structure, tuple((x.shape, str(x.dtype), x.weak_type) for x in avals)


# --- calls ----------------------------------------------------------------------------
@boundary("compact")
def _call(model: CompactModel, params: PyTree, *args: Any) -> Any:
    source, key = model._source, _key(args)
    plan = model._plans.get(key)
    if plan is None:
        plan = _plan(source, args)
        if key is not None:
            plan = model._plans[key] = _compiled(plan)
    leaves = _checked(model, params)
    analysis, n = plan.analysis, len(leaves)
    inputs = analysis.program.inputs
    arrays = []
    for value, x, box in zip(inputs[:n], leaves, model._boxes, strict=True):
        wanted = analysis.need.get(value)
        if not covers(box, wanted):
            raise ArgumentError(
                "`fn` reads other parameters for arguments of these shapes than for "
                "the example. Call compact again with such an example."
            )
        arrays.append(None if wanted is None else cut(x, box, wanted))
    for value, x in zip(inputs[n:], jax.tree.leaves(args), strict=True):
        wanted = analysis.need.get(value)
        whole = everything(value)
        arrays.append(None if wanted is None else cut(x, whole, wanted))
    flat, structure = jax.tree.flatten(plan.result)
    made = [
        # A new value of a leaf of which nothing is needed has no entries.
        jnp.zeros((0,) * len(x.shape), x.dtype) if y is None else y
        for x, y in zip(flat, plan.run(arrays), strict=True)
    ]
    return jax.tree.unflatten(structure, made)


def _compiled(plan: _Plan) -> _Plan:
    """A plan that is compiled also where its caller is not."""
    return plan._replace(run=jax.jit(plan.run))


def _flat(source: Source, tree: PyTree) -> tuple[list[Any], Any]:
    """The leaves of a tree like the parameters; in masks there may be holes."""
    flat, structure = jax.tree.flatten(tree)
    if structure == source.structure:
        return flat, structure
    return jax.tree.flatten(tree, is_leaf=is_hole)


def _checked(model: CompactModel, params: PyTree, *, holes: bool = False) -> list[Any]:
    """The leaves of smaller parameters, or with ``holes`` of their masks."""
    source = model._source
    flat = _flat(source, params) if holes else jax.tree.flatten(params)
    leaves, structure = flat
    if structure != source.structure:
        raise ArgumentError(
            f"`params` has the structure {structure}; it must have that of the "
            f"parameters that were compacted, {source.structure}. Pass its `params`, "
            "or what cut gives."
        )
    for name, x, own in zip(
        source.names, leaves, jax.tree.leaves(model.params), strict=True
    ):
        if holes and is_hole(x):
            continue
        if np.shape(x) != np.shape(own):
            raise ArgumentError(
                f"`params` has shape {np.shape(x)} for {name!r}; it must be "
                f"{np.shape(own)}. Pass the smaller parameters: what cut gives of the "
                "dense ones."
            )
    return leaves


# --- cut and expand -------------------------------------------------------------------
def _cut_leaf(x: Any, box: Box) -> Any:
    """What a box has of a leaf."""
    if all(mask is None for mask in box):
        return x
    # On the host nothing is compiled; a traced leaf is cut where it is.
    array = x if isinstance(x, Tracer) else as_numbers(x)
    if array is None:  # random keys
        masks = [as_mask(m, n) for m, n in zip(box, x.shape, strict=True)]
        return x[np.ix_(*masks)]
    small = cut(array, (None,) * len(box), box)
    return jnp.asarray(small) if isinstance(x, jax.Array) else small


@boundary("cut")
def _cut(model: CompactModel, tree: PyTree) -> PyTree:
    source = model._source
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_mask)
    made, found = [], False
    for path, x in paths:
        i = None if is_hole(x) else leaf_of(source, path_name(path), shape_of(x))
        found |= i is not None
        made.append(x if i is None else _cut_one(x, model._boxes[i]))
    if not found:
        raise ArgumentError(
            "`tree` has no leaf of the name and shape of a parameter; the parameters "
            f"are {dict(zip(source.names, source.shapes, strict=True))}. Pass their "
            "optimizer state, masks or gradients."
        )
    return jax.tree.unflatten(structure, made)


def leaf_of(source: Source, path: str, shape: Any) -> int | None:
    """The parameter of this shape whose name has most of the end of a path."""
    shared = [
        _shared(path, name) if own == shape else -1
        for name, own in zip(source.names, source.shapes, strict=True)
    ]
    most = max(shared, default=-1)
    # A tree of one array has no names.
    if most < (0 if "" in source.names else 1):
        return None
    if shared.count(most) > 1:
        names = [n for n, k in zip(source.names, shared, strict=True) if k == most]
        raise ArgumentError(
            f"`tree` has the leaf {path!r}, which may belong to {names}; its name must "
            "tell. Cut a tree with the names of the parameters."
        )
    return shared.index(most)


def _shared(path: str, name: str) -> int:
    """How many keys two paths have in common at their ends."""
    keys = zip(reversed(path.split("/")), reversed(name.split("/")), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], keys)))


def shape_of(x: Any) -> tuple[int, ...] | None:
    if is_hole(x):
        return None
    return np.shape(unpack(x)) if is_packed(x) else getattr(x, "shape", None)


def _cut_one(x: Any, box: Box) -> Any:
    if is_packed(x):
        return unnamed(pack)(jnp.asarray(_cut_leaf(unpack(x), box)))
    return _cut_leaf(x, box)


@boundary("expand")
def _expand(model: CompactModel, params: PyTree, into: PyTree | None) -> PyTree:
    source = model._source
    # Masks go where masks are: at weights they would be ones and zeros among them.
    leaves = _checked(model, params, holes=into is not None)
    dense, structure = source.leaves, source.structure
    if into is not None:
        dense, structure = _flat(source, into)
        shapes = [None if is_hole(x) else np.shape(x) for x in dense]
        fits = len(shapes) == len(source.shapes) and all(
            a in (None, b) for a, b in zip(shapes, source.shapes, strict=True)
        )
        if not fits:
            raise ArgumentError(
                "`into` must be a tree like the parameters that were compacted, with "
                f"the shapes {source.shapes}; got {[np.shape(x) for x in dense]}. "
                "Leave it out for these parameters."
            )
    made = []
    for x, small, box in zip(dense, leaves, model._boxes, strict=True):
        if is_hole(x) or is_hole(small):  # a leaf without a mask
            made.append(x)
            continue
        if all(mask is None for mask in box):
            made.append(small)
            continue
        masks = [as_mask(m, n) for m, n in zip(box, np.shape(x), strict=True)]
        places = jnp.asarray(x).at[np.ix_(*masks)]
        made.append(places.set(small, unique_indices=True))
    return jax.tree.unflatten(structure, made)


# --- measured -------------------------------------------------------------------------
def _fastest(source: Source, example: Sequence[Any]) -> CompactModel:
    """The rounding that is fastest here, with its time and that of the others."""
    args = jax.tree.map(_concrete, tuple(example))
    models: dict[int | None, CompactModel] = {}
    for rounding in (*_ROUNDINGS, None):
        settings = source.settings._replace(
            round_to=rounding or 1, keep_all=rounding is None
        )
        models[rounding] = _build(source._replace(settings=settings), args)
    text = str(jax.make_jaxpr(source.fn)(models[None].params, *args))
    shapes = tuple(tuple(map(np.shape, _leaves(x))) for x in models.values())
    known = text, shapes, jax.devices()[0].device_kind
    if known not in _MEASURED:
        calls = {
            key: functools.partial(
                jax.jit(source.fn if key is None else model), model.params, *args
            )
            for key, model in models.items()
        }
        _MEASURED[known] = least_seconds(calls, turn=0.03)
    seconds = dict(_MEASURED[known])
    best = min(seconds, key=lambda key: seconds[key])
    model = models[best]
    model.record = model.record._replace(seconds=seconds)
    return model


# Seconds of each rounding, by program, sizes and kind of device.
_MEASURED: dict[Any, dict[Any, float]] = {}


def _leaves(model: CompactModel) -> list[Any]:
    return jax.tree.leaves(model.params)


def _concrete(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.ones(x.shape, x.dtype)
    return x
