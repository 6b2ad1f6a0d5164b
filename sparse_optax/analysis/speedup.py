"""What sparsity brings in time: estimated as in the papers, and measured."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import checks
from sparse_optax.checks import boundary, unnamed
from sparse_optax.export import compact, to_sparse
from sparse_optax.export.compaction import contraction
from sparse_optax.export.compaction.analysis import Analysis
from sparse_optax.export.compaction.compact import kept_of
from sparse_optax.export.compaction.facts import Settings, everything, lengths
from sparse_optax.export.compaction.program import Equation, trace
from sparse_optax.export.sparse import aligned, concrete_leaves
from sparse_optax.export.timing import least_seconds
from sparse_optax.layers import PyTree


class SpeedupLayer(NamedTuple):
    """One layer: the products and convolutions with one parameter.

    Attributes:
      name: Name of the parameter; ``"(activations)"`` for products of two activations.
      density: Share of its weights that is kept.
      empty: Share of its output channels that have no weight.
      dense: Seconds of the dense layer, measured alone.
      by_density: Estimated seconds: ``dense * density``.
      by_channels: Estimated seconds: ``dense * (1 - empty)``.
      compacted: Seconds of the layer in the smaller model of ``compact``, measured.
      sparse: Seconds in the fastest sparse matrix of JAX, measured; None where there
        is none: for convolutions, and with more than a fifth of the weights.
    """

    name: str
    density: float
    empty: float
    dense: float
    by_density: float
    by_channels: float
    compacted: float
    sparse: float | None


class Speedup(NamedTuple):
    """What ``measure_speedup`` returns.

    Attributes:
      layers: One record for each layer.
      seconds: Seconds of the whole model as measured: ``"dense"``, ``"compacted"`` and
        ``"sparse"``.
    """

    layers: tuple[SpeedupLayer, ...]
    seconds: dict[str, float]

    @property
    def estimates(self) -> dict[str, float]:
        """The papers' estimates for all layers together: how many times faster
        ``"by_density"`` and ``"by_channels"``.
        """
        dense = sum(x.dense for x in self.layers)
        totals = {
            "by_density": sum(x.by_density for x in self.layers),
            "by_channels": sum(x.by_channels for x in self.layers),
        }
        return {k: dense / v if v else math.inf for k, v in totals.items()}

    @property
    def measured(self) -> dict[str, float]:
        """How many times faster than dense the whole model is, as measured:
        ``"compacted"`` and ``"sparse"``. Below 1 it is slower.
        """
        dense = self.seconds["dense"]
        return {k: dense / v for k, v in self.seconds.items() if k != "dense"}

    def table(self) -> str:
        """Aligned plain text: milliseconds of each layer, of all of them, and of the
        whole model, with the factors by which they are faster.
        """
        names = ("dense", "by density", "by channels", "compacted", "sparse")
        rows: list[tuple[str, ...]] = [("layer", "density", "empty", *names)]
        sums = [0.0] * len(names)
        for x in self.layers:
            seconds = (x.dense, x.by_density, x.by_channels, x.compacted, x.sparse)
            shares = f"{x.density:.3g}", f"{x.empty:.3g}"
            rows.append((x.name, *shares, *map(_ms, seconds)))
            # A layer without a sparse form stays dense.
            pairs = zip(sums, seconds, strict=True)
            sums = [n + (x.dense if s is None else s) for n, s in pairs]
        measured = [self.seconds[k] for k in ("dense", "compacted", "sparse")]
        whole = [measured[0], None, None, *measured[1:]]
        for name, seconds in (("all layers", sums), ("whole model", whole)):
            rows.append((name, "", "", *map(_ms, seconds)))
            rows.append(("", "", "", *_factors(seconds)))
        return aligned(rows)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"


def _factors(seconds: Sequence[Any]) -> list[str]:
    """How many times faster than the first each is."""
    return ["", *(f"{seconds[0] / x:.2f}x" if x else "" for x in seconds[1:])]


@boundary("measure_speedup")
def measure_speedup(
    fn: Callable[..., Any],
    params: PyTree,
    *example: Any,
    masks: PyTree | None = None,
) -> Speedup:
    r"""Sets the papers' estimates of a speed-up beside what is measured here.

    With :math:`t_l` the time of the dense layer l, :math:`d_l` its density and
    :math:`e_l` the share of its output channels that have no weight, the papers
    estimate

    .. math:: \frac{\sum_l t_l}{\sum_l d_l t_l} \quad \text{and} \quad
              \frac{\sum_l t_l}{\sum_l (1 - e_l) t_l}

    for hardware that skips each zero, and for removed channels. Beside them stand
    measured times: of each layer alone, dense, at the size that ``compact`` leaves of
    it, and in the fastest sparse matrix of ``to_sparse``; and of the whole model in the
    three forms. Where sparsity loses is part of the result.

    .. note:: A layer is its product or convolution alone, without bias and activation,
      and is called alone, which costs small layers more than their arithmetic: all
      layers do not add up to the whole model. Times are those of this machine, the
      least of seven rounds in turns. It takes a few seconds for each layer.

    Args:
      fn: The model, called as ``fn(params, *args)``, as it is used for inference.
      params: Its parameters, a tree of concrete arrays; also with running statistics.
      *example: Its other arguments, concrete or abstract; the batch is theirs.
      masks: Masks or an optimizer state; a weight that they keep counts as kept, also
        if it is zero. None keeps what is not zero.

    Returns:
      A ``Speedup``.

    Raises:
      ValueError: If a leaf is no concrete array, masks do not fit, or ``fn`` cannot be
        traced with the example.

    Examples:
      >>> import jax, jax.numpy as jnp, sparse_optax
      >>> from sparse_optax.analysis import measure_speedup
      >>> def model(params, x):
      ...     return jnp.maximum(x @ params["v"], 0) @ params["w"]
      >>> params = {"v": jnp.ones((8, 6)).at[:, 2:5].set(0), "w": jnp.ones((6, 4))}
      >>> found = measure_speedup(model, params, jnp.ones((2, 8)))
      >>> [(layer.name, layer.density, layer.empty) for layer in found.layers]
      [('v', 0.5, 0.5), ('w', 1.0, 0.0)]
      >>> found.layers[0].by_density == found.layers[0].dense / 2
      True

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019, Table 4.

    Differences from the paper: there layers are timed on a GPU; the measured columns
    are not in it.
    """
    if not callable(fn):
        checks.fail("fn", fn, "a function fn(params, *args)", "Pass model.apply.")
    args = jax.tree.map(_concrete, tuple(example))
    analysis = _analysis(fn, params, args, masks)
    products = list(_products(analysis, 1))
    seconds = _times_of(products)
    network = unnamed(to_sparse)(fn, params, *args, masks=masks)
    small = unnamed(compact)(fn, params, *args, masks=masks)
    matrices = {
        x.name: min(x.seconds[k] for k in ("bcsr", "ell") if k in x.seconds)
        for x in network.record.layers
        if {"bcsr", "ell"} & x.seconds.keys()
    }
    rows: dict[str, list[SpeedupLayer]] = {}
    for product, (dense, compacted) in zip(products, seconds, strict=True):
        n = product.times
        rows.setdefault(product.name, []).append(
            SpeedupLayer(
                product.name,
                product.density,
                product.empty,
                n * dense,
                n * dense * product.density,
                n * dense * (1 - product.empty),
                n * compacted,
                matrices.get(product.name),
            )
        )
    runs: dict[str, tuple[Any, Any]] = {
        "dense": (jax.jit(fn), params),
        "compacted": (jax.jit(small), small.params),
        "sparse": (jax.jit(network), network.params),
    }
    whole = least_seconds(
        {k: functools.partial(run, own, *args) for k, (run, own) in runs.items()}
    )
    return Speedup(tuple(map(_joined, rows.values())), whole)


def _joined(parts: list[SpeedupLayer]) -> SpeedupLayer:
    """One record for all products of a parameter."""
    first, sparse = parts[0], parts[0].sparse
    return first._replace(
        dense=sum(x.dense for x in parts),
        by_density=sum(x.by_density for x in parts),
        by_channels=sum(x.by_channels for x in parts),
        compacted=sum(x.compacted for x in parts),
        sparse=None if sparse is None else len(parts) * sparse,
    )


def _concrete(x: Any) -> Any:
    return jnp.ones(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


# --- the layers -----------------------------------------------------------------------
def _analysis(fn: Any, params: PyTree, args: Any, masks: PyTree | None) -> Analysis:
    """What ``compact`` finds of a function."""
    names, leaves, structure = concrete_leaves(params)
    kept = kept_of(names, leaves, masks)
    flat, own = jax.tree.flatten(args)

    def whole(leaves, flat):
        return fn(jax.tree.unflatten(structure, leaves), *jax.tree.unflatten(own, flat))

    program, _ = trace(whole, leaves, flat)
    analysis = Analysis(program, Settings())
    columns = zip(names, leaves, kept, program.inputs[: len(leaves)], strict=True)
    for name, x, mask, value in columns:
        analysis.set_exact(value, x, mask)
        analysis.origin[value] = frozenset([name])
    analysis.at_hand.update(program.inputs[len(leaves) :])
    analysis.forward()
    analysis.backward([everything(x) for x in program.outputs])
    return analysis


class _Product(NamedTuple):
    """A product or convolution of a program."""

    name: str
    density: float
    empty: float
    times: int  # how often a loop computes it
    eqn: Equation
    analysis: Analysis


def _products(analysis: Analysis, times: int) -> Iterator[_Product]:
    """The products of a program, also inside of loops."""
    for eqn in analysis.program.equations:
        if not eqn.outputs:
            continue
        if (inner := analysis.inner.get(eqn.outputs[0])) is not None:
            more = eqn.params["length"] if eqn.name == "scan" else 1
            yield from _products(inner, times * more)
        elif eqn.name in ("dot_general", "conv_general_dilated"):
            yield _Product(*_weights(analysis, eqn), times, eqn, analysis)


def _weights(analysis: Analysis, eqn: Equation) -> tuple[str, float, float]:
    """Name, density and empty output channels of the weights of a product."""
    if eqn.name == "conv_general_dilated":
        kernel = eqn.inputs[1]
        outputs: tuple[int, ...] = (eqn.params["dimension_numbers"].rhs_spec[0],)
    else:
        pair = contraction._weights(analysis, contraction._sides(eqn))
        if pair is None:
            return "(activations)", 1.0, 0.0
        kernel, outputs = pair[1].value, (*pair[1].batch, *pair[1].free)
    names = analysis.origin.get(kernel, frozenset())
    if kernel not in analysis.exact or not names:
        return "(activations)", 1.0, 0.0
    live = analysis.nonzero(kernel)
    others = tuple(i for i in range(live.ndim) if i not in outputs)
    there = live.any(others)
    name = min(names, key=lambda n: (not n.endswith(("kernel", "weight")), n))
    return name, float(live.mean()), float(1 - there.mean())


def _times_of(products: list[_Product]) -> list[tuple[float, float]]:
    """Seconds of each product, dense and at the size that is left of it. Equal ones are
    measured once.
    """
    known: dict[Any, float] = {}
    made = []
    for product in products:
        eqn, analysis = product.eqn, product.analysis
        calls: dict[str, Callable[[], Any]] = {}
        keys: dict[str, Any] = {}
        for form in ("dense", "compacted"):
            needed = analysis.need.get(eqn.outputs[0])
            if form == "compacted" and needed is None:
                continue
            boxes = [everything(x) for x in eqn.inputs]
            run: Any = eqn.call
            if form == "compacted":
                boxes = analysis.targets[eqn.outputs[0]]
                run = functools.partial(_smaller, analysis, eqn)
            arrays = [
                _random(lengths(box, x.shape), x.dtype)
                for box, x in zip(boxes, eqn.inputs, strict=True)
                if box is not None
            ]
            shapes = ((a.shape, str(a.dtype)) for a in arrays)
            keys[form] = (eqn.name, str(eqn.params), *shapes)
            again = form == "compacted" and keys[form] == keys["dense"]
            if keys[form] not in known and not again:
                calls[form] = functools.partial(jax.jit(run), *arrays)
        for form, seconds in least_seconds(calls).items():
            known[keys[form]] = seconds
        dense, compacted = (
            known[keys[form]] if form in keys else 0.0
            for form in ("dense", "compacted")
        )
        made.append((dense, compacted))
    return made


def _smaller(analysis: Analysis, eqn: Equation, *arrays: Any) -> Any:
    """One operation at the size that is left of it."""
    boxes = [analysis.need.get(out) for out in eqn.outputs]
    rule = analysis.rules[eqn.outputs[0]]
    return rule.small(eqn, list(arrays), boxes, analysis)


def _random(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
