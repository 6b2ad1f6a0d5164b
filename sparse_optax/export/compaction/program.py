"""A traced function as a flat list of equations over values of its own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from sparse_optax.checks import ArgumentError

# Calls that mean no more than their content.
_CALLS = ("jit", "pjit", "closed_call", "core_call", "core_closed_call")


class Value:
    """A value of a program; two values are the same if they are one object."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any):
        self.aval = aval

    @property
    def shape(self) -> tuple[Any, ...]:
        """Its shape; a symbolic batch is no number."""
        return tuple(getattr(self.aval, "shape", ()))

    @property
    def dtype(self) -> Any:
        """Its dtype; None of a token."""
        return getattr(self.aval, "dtype", None)


class Equation(NamedTuple):
    """One operation. ``body`` is the program inside of a loop, of what is computed
    again in a backward pass, and of what has a derivative of its own.
    """

    primitive: Any
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    params: dict[str, Any]
    call: Callable[..., list[Any]]  # the operation as it was traced
    body: "Program | None" = None

    @property
    def name(self) -> str:
        """Name of its primitive."""
        return self.primitive.name


class Program(NamedTuple):
    """Equations in order; ``constants`` has the numbers of the text and those that the
    function closes over.
    """

    inputs: tuple[Value, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Value, ...]
    constants: dict[Value, Any]


def trace(fn: Callable[..., Any], *args: Any) -> tuple[Program, Any]:
    """The program of a function of trees, and the tree of its results."""
    try:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    except ArgumentError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ArgumentError(
            f"`fn` cannot be traced with the example: {reason}. It must be a function "
            "of these parameters and arrays. Pass an example that fits, and bind what "
            "is no array with functools.partial."
        ) from error
    return program_of(closed), shape


def program_of(closed: Any) -> Program:
    """The program of a jaxpr, without calls."""
    jaxpr, constants = getattr(closed, "jaxpr", closed), {}
    equations: list[Equation] = []

    def fixed(variables: Sequence[Any], numbers: Sequence[Any]) -> list[Value]:
        values = [Value(x.aval) for x in variables]
        constants.update(zip(values, numbers, strict=True))
        return values

    def literal(x: Any) -> Value:
        return fixed([x], [np.asarray(x.val, x.aval.dtype)])[0]

    def walk(jaxpr: Any, names: dict[Any, Value]) -> list[Value]:
        def read(x: Any) -> Value:
            return literal(x) if isinstance(x, core.Literal) else names[x]

        for eqn in jaxpr.eqns:
            inputs = [read(x) for x in eqn.invars]
            if eqn.primitive.name in _CALLS:
                inner = inner_of(eqn.params)
                own = fixed(inner.jaxpr.constvars, inner.consts)
                variables = [*inner.jaxpr.constvars, *inner.jaxpr.invars]
                pairs = zip(variables, [*own, *inputs], strict=True)
                outputs = walk(inner.jaxpr, dict(pairs))
            else:
                outputs = [Value(x.aval) for x in eqn.outvars]
                equations.append(
                    Equation(
                        eqn.primitive,
                        tuple(inputs),
                        tuple(outputs),
                        eqn.params,
                        _call_of(jaxpr, eqn),
                        _body(eqn),
                    )
                )
            names.update(zip(eqn.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    inputs = [Value(x.aval) for x in jaxpr.invars]
    own = fixed(jaxpr.constvars, getattr(closed, "consts", ()))
    names = dict(zip([*jaxpr.invars, *jaxpr.constvars], [*inputs, *own], strict=True))
    outputs = walk(jaxpr, names)
    return Program(tuple(inputs), tuple(equations), tuple(outputs), constants)


def inner_of(params: dict[str, Any]) -> Any:
    """The one jaxpr among the parameters of an operation, closed."""
    found = [x for x in params.values() if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]
    inner = found[0]
    return inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())


def _call_of(jaxpr: Any, eqn: Any) -> Callable[..., list[Any]]:
    """One equation as a function of its inputs."""
    places = {x: i for i, x in enumerate(eqn.invars) if not isinstance(x, core.Literal)}

    def call(*inputs):
        own = jaxpr.replace(
            constvars=[], invars=list(places), outvars=list(eqn.outvars), eqns=[eqn]
        )
        run = core.jaxpr_as_fun(core.ClosedJaxpr(own, ()))
        return list(run(*(inputs[i] for i in places.values())))

    return call


def _body(eqn: Any) -> Program | None:
    """What an operation computes once, or for each entry of a leading axis alone."""
    name = eqn.primitive.name
    independent = name == "scan" and _has_no_carry(eqn)
    wrapped = name in ("remat", "remat2", "checkpoint")
    own_derivative = name.startswith(("custom_jvp_call", "custom_vjp_call"))
    if not (independent or wrapped or own_derivative):
        return None
    return program_of(inner_of(eqn.params))


def _has_no_carry(eqn: Any) -> bool:
    """Whether all results of a loop stack those of its body."""
    outs = inner_of(eqn.params).jaxpr.outvars
    pairs = zip(eqn.outvars, outs, strict=True)
    return all(len(a.aval.shape) == len(b.aval.shape) + 1 for a, b in pairs)
