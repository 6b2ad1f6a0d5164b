"""Checks of arguments, and the name with which an error starts.

Code of this package raises ``ArgumentError`` and names the argument. ``boundary`` adds
the name of the public function that was called, once, for the function and for ``init``
and ``update`` of the transformation that it returns. Code that calls another public
function for its own caller calls it ``unnamed``.
"""

import functools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import optax

F = TypeVar("F", bound=Callable[..., Any])


class ArgumentError(ValueError):
    """A ``ValueError`` about an argument of the function ``caller``."""

    caller: str | None = None

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.caller is None else f"{self.caller}: {message}"


def boundary(name: str) -> Callable[[F], F]:
    """Decorates a public function: its errors, also later ones, start with ``name``."""

    def decorate(function: F) -> F:
        guarded = _naming(name, function)

        @functools.wraps(function)
        def call(*args, **kwargs):
            made = guarded(*args, **kwargs)
            if isinstance(made, optax.GradientTransformation):
                init, update = (_naming(name, part) for part in made)
                return type(made)(init, update)
            return made

        return call  # type: ignore[return-value]

    return decorate


def _naming(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except ArgumentError as error:
            if error.caller is None:
                error.caller = name
            raise

    return call


def unnamed(function: F) -> F:
    """A function without its ``boundary``: errors get the caller's name."""
    return getattr(function, "__wrapped__", function)


# --- checks ---------------------------------------------------------------------------
def fail(argument: str, value: Any, allowed: str, cure: str) -> NoReturn:
    """Raises an error about an argument, in the one form that all have."""
    raise ArgumentError(f"`{argument}` must be {allowed}; got {value!r}. {cure}")


def known(*values: Any) -> bool:
    """Whether all are concrete numbers, not traced by ``inject_hyperparams``."""
    return all(isinstance(x, numbers.Real) for x in values)


def number(
    argument: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    ends: str = "[]",
    schedule: bool = False,
    static: bool = False,
    cure: str,
) -> None:
    """Raises unless a value is a finite number in a range, traced, or a schedule.
    ``ends`` says which ends belong to the range, such as ``"(]"``.
    """
    if (isinstance(value, jax.Array) and not static) or (schedule and callable(value)):
        return
    value = _plain(value)
    right = known(value) and not isinstance(value, bool)
    if right and math.isfinite(value):
        above = value > low if ends[0] == "(" else value >= low
        if above and (value < high if ends[1] == ")" else value <= high):
            return
    if high < math.inf:
        allowed = f"a number in {ends[0]}{low:g}, {high:g}{ends[1]}"
    elif low > -math.inf:
        over = "above" if ends[0] == "(" else "at least"
        allowed = f"a number {over} {low:g} and finite"
    else:
        allowed = "a finite number"
    fail(argument, value, allowed + (", or a schedule" if schedule else ""), cure)


def whole(
    argument: str,
    value: Any,
    least: int,
    most: float = math.inf,
    *,
    static: bool = False,
    cure: str,
) -> None:
    """Raises unless a value is an integer in a range, or traced."""
    if isinstance(value, jax.Array) and not static:
        return
    value = _plain(value)
    right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not right or not least <= int(value) <= most:
        among = f"of at least {least}" if most == math.inf else f"in [{least}, {most}]"
        fail(argument, value, f"an integer {among}", cure)


def _plain(value: Any) -> Any:
    """The number in a NumPy array without axes."""
    if isinstance(value, np.ndarray) and not value.ndim:
        return value.item()
    return value


def choice(argument: str, value: Any, options: Iterable[str], *, cure: str) -> None:
    """Raises unless a value is one of a few strings."""
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        fail(argument, value, " or ".join(map(repr, options)), cure)


def transformation(argument: str, value: Any) -> None:
    """Raises unless a value is an Optax transformation."""
    if not hasattr(value, "update"):
        cure = "Pass optax.sgd(0.1), for instance."
        fail(argument, value, "an optax.GradientTransformation", cure)


def needs_params(params: Any, why: str) -> None:
    """Raises if ``update`` was called without the parameters."""
    if params is None:
        raise ArgumentError(
            f"`params` is None; {why}. Call tx.update(grads, state, params)."
        )
