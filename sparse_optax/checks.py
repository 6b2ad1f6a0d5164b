"""Checks of arguments, and the name with which an error starts.

Code of this package raises ``ArgumentError`` and names the argument. ``boundary`` adds
the name of the public function that was called, once, for the function and for ``init``
and ``update`` of the transformation that it returns. Code that calls another public
function for its own caller calls it ``unnamed``.
"""

import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
import optax
from jax.core import Tracer

F = TypeVar("F", bound=Callable[..., Any])


# Finished updates are counted in int32.
MOST_UPDATES = 2**31 - 1


class ArgumentError(ValueError):
    """A ``ValueError`` about an argument of the function ``caller``."""

    caller: str | None = None

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.caller is None else f"{self.caller}: {message}"


class UnknownArgument(ArgumentError, TypeError):
    """An argument that a function does not have."""


_OTHER_NAMES = {
    "sparsity": "Give `density`, the fraction of weights to keep: 0.05 for a sparsity "
    "of 0.95."
}


def boundary(name: str) -> Callable[[F], F]:
    """Decorates a public function: its errors, also later ones, start with ``name``."""

    def decorate(function: F) -> F:
        guarded = _naming(name, function)
        parameters = inspect.signature(function).parameters
        open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

        @functools.wraps(function)
        def call(*args, **kwargs):
            if not open_ended and (unknown := kwargs.keys() - parameters.keys()):
                _refuse_unknown(name, sorted(unknown), list(parameters))
            made = guarded(*args, **kwargs)
            if isinstance(made, optax.GradientTransformation):
                init = _naming(name, made.init)
                update = _naming(name, _knowing_its_state(init, made.update))
                return type(made)(init, update)
            return made

        return call  # type: ignore[return-value]

    return decorate


def _refuse_unknown(name: str, unknown: list[str], known: list[str]) -> NoReturn:
    listed = ", ".join(map(repr, known))
    cures = [_OTHER_NAMES[x] for x in unknown if x in _OTHER_NAMES]
    error = UnknownArgument(
        f"there is no argument {', '.join(f'`{x}`' for x in unknown)}; it must be one "
        f"of {listed}. {' '.join(cures) or 'Correct the name, or leave it out.'}"
    )
    error.caller = name
    raise error


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


def _knowing_its_state(
    init: Callable[..., Any], update: Callable[..., Any]
) -> Callable[..., Any]:
    """An ``update`` that says so if it fails because the state is not its own. Nothing
    is compared as long as it does not fail.
    """

    @functools.wraps(update)
    def call(updates, state, params=None, **extra_args):
        try:
            return update(updates, state, params, **extra_args)
        except ArgumentError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            if _is_of_another(state, init, params):
                raise another_state(state) from error
            raise

    return call


def _is_of_another(state: Any, init: Callable[..., Any], params: Any) -> bool:
    """Whether a state has other parts than those that ``init`` makes, by name."""
    try:
        own = jax.eval_shape(init, params)
    except Exception:  # the parameters do not fit either: the first error says more
        return False
    names, others = (
        [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
        for tree in (own, state)
    )
    return names != others


def key_name(key: Any) -> str:
    """One key of a path as text: a dict key, an attribute or an index."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def path_name(path: Sequence[Any]) -> str:
    """Normalised name of a leaf, such as "Dense_0/kernel", the same in every library.
    A trailing ``value`` is dropped: ``flax.nnx`` gives variables to ``init`` and plain
    arrays to ``update``, and their paths differ by that key.
    """
    keys = [key_name(key) for key in path]
    if len(keys) > 1 and keys[-1] == "value":
        keys = keys[:-1]
    return "/".join(keys)


def unnamed(function: F) -> F:
    """A function without its ``boundary``: errors get the caller's name."""
    return getattr(function, "__wrapped__", function)


# --- checks ---------------------------------------------------------------------------
def fail(argument: str, value: Any, allowed: str, cure: str) -> NoReturn:
    """Raises an error about an argument, in the one form that all have."""
    raise ArgumentError(f"`{argument}` must be {allowed}; got {value!r}. {cure}")


def takes(value: Any, *arguments: Any) -> bool:
    """Whether a value is a function of these arguments, by its signature."""
    if isinstance(value, type) or not callable(value):
        return False
    try:
        inspect.signature(value).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # a builtin, which has no signature
        pass
    return True


def _is_scalar(value: Any) -> bool:
    """Whether a value is one real number of JAX, which may be traced."""
    if not isinstance(value, jax.Array) or value.shape:
        return False
    kinds = (np.integer, np.floating)
    return any(jax.numpy.issubdtype(value.dtype, kind) for kind in kinds)


_STATIC = "Give a number of Python or NumPy: it is needed before arrays are computed."


def concrete(value: Any, *, static: bool = False) -> Any:
    """The number in an array without axes, of NumPy or, unless ``static``, of JAX; all
    else, also what is traced, as it is.
    """
    arrays = np.ndarray if static else np.ndarray | jax.Array
    if not isinstance(value, arrays) or isinstance(value, Tracer) or value.ndim:
        return value
    if jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    plain = np.asarray(value)
    # The small floats of JAX are no numbers for Python.
    is_float = jax.numpy.issubdtype(plain.dtype, np.floating)
    return float(plain) if is_float else plain.item()


def known(*values: Any) -> bool:
    """Whether all are numbers, see ``concrete``, not traced by
    ``inject_hyperparams``.
    """
    return all(_is_real(concrete(x)) for x in values)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real)


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
    if schedule and takes(value, "count"):
        return
    value = concrete(value, static=static)
    if _is_scalar(value):
        if not static:
            return
        cure = _STATIC
    right = _is_real(value) and not isinstance(value, bool)
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


def not_traced(argument: str, value: Any) -> None:
    """Raises if a value is traced: it is needed before arrays are computed."""
    if isinstance(value, Tracer):
        raise ArgumentError(
            f"`{argument}` is a traced value, {value!r}; it must be a number that is "
            "known here. Give a Python number, or list the argument in `static_args` "
            "of optax.inject_hyperparams."
        )


def as_fraction(value: Any, argument: str, *, decimal: bool = False) -> Fraction:
    """The value of a number as a fraction; -1 if it is not a finite number. A float32,
    and with ``decimal`` any float, is read by its shortest decimal form: 0.29 is then
    29/100 and not 0.28999999, which would keep 28 of 100 weights.
    """
    not_traced(argument, value)
    text: Any = "no number"
    try:
        if isinstance(value, np.generic | np.ndarray | jax.Array) and not value.shape:
            text = str(np.asarray(value)[()])
        elif isinstance(value, int | float | Fraction) and not isinstance(value, bool):
            text = repr(value) if decimal and isinstance(value, float) else value
        return Fraction(text)
    except (TypeError, ValueError, OverflowError):
        return Fraction(-1)  # outside every range: the caller's check raises


def nearest(value: Fraction) -> Fraction:
    """The closest fraction of denominator at most 10**9, if it is within two units in
    the last place; else the same. 0.29 is 29/100, and 1 - 1e-10 is not 1.
    """
    near = value.limit_denominator(10**9)
    return near if abs(near - value) <= 2 * Fraction(math.ulp(value)) else value


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
    value = concrete(value, static=static)
    if _is_scalar(value):
        if not static:
            return
        cure = _STATIC
    right = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not right or not least <= int(value) <= most:
        among = f"of at least {least}" if most == math.inf else f"in [{least}, {most}]"
        fail(argument, value, f"an integer {among}", cure)


def updates(
    argument: str,
    value: Any,
    least: int,
    *,
    optional: bool = False,
    traced: bool = True,
    cure: str = "Give a number of updates.",
) -> None:
    """Raises unless a value is a number of updates, ``traced``, or ``optional`` and
    None: for the end of something, where None is never.
    """
    if optional and value is None:
        return
    if not traced:
        not_traced(argument, value)
    value = concrete(value)
    is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    never = " None is never." if optional else ""
    if is_whole and int(value) > MOST_UPDATES:
        cure = "Updates are counted in 32 bits: give fewer."
        whole(argument, value, least, MOST_UPDATES, cure=cure + never)
    whole(argument, value, least, cure=cure + never)


def flag(argument: str, value: Any) -> None:
    """Raises unless a value is True or False."""
    if not isinstance(value, bool | np.bool_):
        fail(argument, value, "True or False", "Give one of the two.")


def names_axes(argument: str, value: Any) -> None:
    """Raises unless a value is None or a mapping of names of leaves to axes."""
    if value is None:
        return
    right = isinstance(value, Mapping) and all(
        isinstance(name, str)
        and isinstance(axis, numbers.Integral)
        and not isinstance(axis, bool)
        for name, axis in value.items()
    )
    if not right:
        cure = 'Give {"layers/kernel": 0}, for instance.'
        fail(argument, value, "a dict of names of leaves and integer axes", cure)


def two_axes(argument: str, value: Any) -> tuple[int, int]:
    """Two axes as Python integers; raises unless they differ."""
    try:
        first, second = (operator.index(axis) for axis in value)
    except (TypeError, ValueError):
        first = second = 0
    if first == second:
        cure = (
            "Give the axes of inputs and outputs, (-2, -1) in flax and haiku and "
            "(0, 1) in equinox."
        )
        fail(argument, value, "two different integers", cure)
    return first, second


def iterable(argument: str, value: Any, allowed: str, cure: str) -> None:
    """Raises unless a value holds entries to go through: no number, text or dict."""
    single = isinstance(value, str | bytes | Mapping) or getattr(value, "ndim", 1) == 0
    if single or not (isinstance(value, Iterable) or hasattr(value, "__getitem__")):
        fail(argument, value, allowed, cure)


def scalar(argument: str, value: Any) -> Any:
    """A value that a schedule gave; raises unless it is one number."""
    shape = getattr(value, "shape", ())
    if shape != () or (not hasattr(value, "dtype") and not known(value)):
        cure = "Give a function that returns a scalar, such as jnp.float32(0.5)."
        fail(argument, value, "a schedule that gives a number for each count", cure)
    return value


def first_value(
    argument: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    ends: str = "[]",
    cure: str,
) -> None:
    """Raises unless the first value of a schedule is in a range, or traced."""
    if callable(value):
        first = at_first(argument, value)
        number(f"{argument}(0)", first, low, high, ends=ends, cure=cure)


def at_first(argument: str, schedule: Callable[..., Any]) -> Any:
    """The value of a schedule before the first update, a number unless it is traced."""
    with jax.ensure_compile_time_eval():
        first = schedule(jax.numpy.zeros([], jax.numpy.int32))
        return concrete(scalar(argument, first))


def choice(argument: str, value: Any, options: Iterable[str], *, cure: str) -> None:
    """Raises unless a value is one of a few strings."""
    options = tuple(options)
    if not isinstance(value, str) or value not in options:
        fail(argument, value, " or ".join(map(repr, options)), cure)


def transformation(argument: str, value: Any) -> None:
    """Raises unless a value is an Optax transformation."""
    parts = (getattr(value, name, None) for name in ("init", "update"))
    # A class has functions of these names too, and a dict has an ``update``.
    if isinstance(value, type) or not all(map(callable, parts)):
        cure = "Pass optax.sgd(0.1), for instance."
        fail(argument, value, "an optax.GradientTransformation", cure)


def own_state(state: Any, kind: Any, **parts: bool) -> None:
    """Raises unless the state has the fields of ``kind``, a named tuple, and has or
    lacks arrays in some of its ``parts``. Two methods may have the same.
    """
    if getattr(state, "_fields", None) != kind._fields:
        raise another_state(state)
    for name, there in parts.items():
        if bool(jax.tree.leaves(getattr(state, name))) != there:
            raise another_state(state, f" with{'out' if there else ''} `{name}`")


def another_state(state: Any, what: str = "") -> ArgumentError:
    """The error about a state that ``init`` did not make; ``what`` says why not."""
    return ArgumentError(
        f"`state` is a {type(state).__name__}{what}; it must be what init of the same "
        "transformation returned. Call tx.update(grads, state, params) with state = "
        "tx.init(params)."
    )


def needs_params(params: Any, why: str) -> None:
    """Raises if ``update`` was called without the parameters."""
    if params is None:
        raise ArgumentError(
            f"`params` is None; {why}. Call tx.update(grads, state, params)."
        )
