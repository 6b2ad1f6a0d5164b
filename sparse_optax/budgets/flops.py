"""What a weight costs: the multiply-adds of a model, counted in its traced program."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
from jax.extend import core

from sparse_optax.budgets.kinds import plain
from sparse_optax.checks import ArgumentError, boundary, fail
from sparse_optax.layers import PyTree, leaf_names

# Operations on weights whose work cannot be seen, or depends on the data.
_OPAQUE = ("while", "shard_map", "pallas_call", "ffi_call", "ragged_dot_general")


@boundary("flops_per_weight")
def flops_per_weight(fn: Callable[..., Any], params: PyTree, *args: Any) -> PyTree:
    r"""FLOPs that each weight of a leaf costs in one call of a model.

    .. math:: cost_l = 2 \, M_l / N_l

    with M_l the multiply-adds of all matrix products and convolutions that the leaf
    enters and N_l its number of weights. The model is traced, not run: only shapes
    count. A weight that is used at many places, as in a convolution, a scan or a tied
    layer, costs as much more. Products of two activations, additions, tables that are
    looked up and scales cost nothing here. A convolution counts the zeros of its
    padding.

    Args:
      fn: The model, called as ``fn(params, *args)``.
      params: The parameters, concrete or abstract.
      args: Its other arguments, concrete or abstract: one example, with a batch axis of
        1 if the model has one.

    Returns:
      A tree like ``params``: the cost of a weight of each leaf, at least 0, for
      ``num_flops`` and ``report.summary(costs=)``.

    Raises:
      ValueError: If ``fn`` is no function, or a leaf enters a loop of unknown length or
        an operation whose work cannot be seen.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> def model(params, x):
      ...     return jnp.tanh(x @ params["v"]) @ params["w"] + params["b"]
      >>> params = {"b": jnp.zeros(2), "v": jnp.zeros((8, 4)), "w": jnp.zeros((4, 2))}
      >>> costs = budgets.flops_per_weight(model, params, jnp.zeros((1, 8)))
      >>> costs
      {'b': 0, 'v': 2, 'w': 2}
      >>> budgets.num_flops(40, costs).counts(params)
      {'b': MaskedNode(), 'v': 16, 'w': 4}
    """
    if not callable(fn):
        fail("fn", fn, "a function fn(params, *args)", "Pass model.apply.")
    flat, structure = jax.tree.flatten(params)
    program = jax.make_jaxpr(fn)(params, *args)
    values = [
        _Value({i: Fraction(1)}) if i < len(flat) else _Value({}, moving=True)
        for i in range(len(program.jaxpr.invars))
    ]
    work, _ = _walk(program, values, leaf_names(params))
    costs = []
    for i, x in enumerate(flat):
        cost = plain(2 * Fraction(work[i]) / max(math.prod(jax.numpy.shape(x)), 1))
        costs.append(cost if isinstance(cost, int) else float(cost))
    return jax.tree.unflatten(structure, costs)


class _Value(NamedTuple):
    """What is known of a value of the program.

    Attributes:
      shares: The leaves whose weights it holds, each with its share of the entries.
      moving: Whether it depends on the other arguments: no weights, an activation.
    """

    shares: Mapping[int, Any] = {}
    moving: bool = False


_Work = Counter  # multiply-adds of each leaf


def _walk(
    program: Any, values: Sequence[_Value], names: Sequence[str]
) -> tuple[_Work, list[_Value]]:
    """The multiply-adds of a program, and its results."""
    jaxpr = getattr(program, "jaxpr", program)
    known = dict(zip(jaxpr.invars, values, strict=True))

    def value(x):
        return _Value() if isinstance(x, core.Literal) else known.get(x, _Value())

    work: _Work = Counter()
    for eqn in jaxpr.eqns:
        inputs = [value(x) for x in eqn.invars]
        more, results = _step(eqn, inputs, names)
        work.update(more)
        known.update(zip(eqn.outvars, results, strict=True))
    return work, [value(x) for x in jaxpr.outvars]


def _step(
    eqn: Any, inputs: Sequence[_Value], names: Sequence[str]
) -> tuple[_Work, list[_Value]]:
    """The multiply-adds of one operation, and its results."""
    name, moving = eqn.primitive.name, any(x.moving for x in inputs)
    result = _Value(moving=moving)
    if name in ("dot_general", "conv_general_dilated"):
        products = _products(eqn)
        work: _Work = Counter()
        for x in inputs:
            work.update({leaf: share * products for leaf, share in x.shares.items()})
        return work, [result]
    if name == "scan":
        return _scan(eqn, inputs, names)
    if name == "cond":
        return _cond(eqn, inputs, names)
    inner = [x for x in eqn.params.values() if isinstance(x, _PROGRAMS)]
    weights = sorted({leaf for x in inputs for leaf in x.shares})
    if len(inner) == 1 and name not in _OPAQUE:
        program = getattr(inner[0], "jaxpr", inner[0])
        if len(program.invars) == len(inputs):
            return _walk(program, inputs, names)
    if weights and (inner or name in _OPAQUE):
        raise ArgumentError(
            f"`fn` hands {[names[i] for i in weights]} to {name!r}, whose work cannot "
            "be counted; weights must enter matrix products, convolutions, and loops "
            "of a known length. Count these leaves by hand and pass {leaf name: FLOPs "
            "per weight} as `costs`."
        )
    if not moving:
        result = _Value(_held(eqn, inputs))
    return Counter(), [result] * len(eqn.outvars)


_PROGRAMS = (core.Jaxpr, core.ClosedJaxpr)


def _size(x: Any) -> int:
    return math.prod(x.aval.shape)


def _products(eqn: Any) -> int:
    """Multiply-adds of a matrix product or a convolution."""
    left, right = (x.aval.shape for x in eqn.invars)
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        terms = math.prod(left[i] for i in numbers[0][0])
    else:
        terms = math.prod(right) // max(right[numbers.rhs_spec[0]], 1)
    return _size(eqn.outvars[0]) * terms


def _held(eqn: Any, inputs: Sequence[_Value]) -> dict[int, Any]:
    """The weights in the result of an operation on weights alone: those of its largest
    operands, so that of a scaled kernel they are the kernel's.
    """
    held: Counter = Counter()
    if eqn.primitive.name == "concatenate":
        total = max(_size(eqn.outvars[0]), 1)
        for x, value in zip(eqn.invars, inputs, strict=True):
            part = Fraction(_size(x), total)
            held.update({leaf: share * part for leaf, share in value.shares.items()})
        return dict(held)
    pairs = zip(eqn.invars, inputs, strict=True)
    sized = [(_size(x), value.shares) for x, value in pairs if value.shares]
    largest = max((size for size, _ in sized), default=0)
    for size, shares in sized:
        if size == largest:
            held |= Counter(shares)
    return dict(held)


def _scan(
    eqn: Any, inputs: Sequence[_Value], names: Sequence[str]
) -> tuple[_Work, list[_Value]]:
    """A loop of a known length. What it carries may start as a constant and move."""
    consts, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    inputs = list(inputs)
    while True:
        work, results = _walk(eqn.params["jaxpr"], inputs, names)
        stop = consts + carried
        carry = [
            old if old == new else _Value(moving=old.moving or new.moving)
            for old, new in zip(inputs[consts:stop], results[:carried], strict=True)
        ]
        if carry == inputs[consts:stop]:
            break
        inputs[consts:stop] = carry
    length = eqn.params["length"]
    return Counter({leaf: length * n for leaf, n in work.items()}), results


def _cond(
    eqn: Any, inputs: Sequence[_Value], names: Sequence[str]
) -> tuple[_Work, list[_Value]]:
    """The most expensive branch for each leaf."""
    work: _Work = Counter()
    outcomes = []
    for branch in eqn.params["branches"]:
        more, results = _walk(branch, inputs[1:], names)
        work |= more
        outcomes.append(results)
    moving = inputs[0].moving
    joined = []
    for results in zip(*outcomes, strict=True):
        moves = moving or any(x.moving for x in results)
        same = all(x == results[0] for x in results) and not moves
        joined.append(results[0] if same else _Value(moving=moves))
    return work, joined
