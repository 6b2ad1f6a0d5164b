"""Finds the momentum in the state of any optimizer.

Optax names the fields: ``trace`` (sgd, rmsprop with momentum), ``mu`` with ``nu`` (the
Adam family), ``mu`` alone (lion). A field holds a tree like the parameters, so the path
of an entry is the path of the field followed by that of a parameter.
"""

import contextlib
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_optax.checks import ArgumentError, key_name, path_name
from sparse_optax.selection.leaf import wide as as_wide

FIELDS = ("trace", "mu")
EPSILON = 1e-8

# Optax gives them the state of Adam, and its entries mean something else: adopt
# averages gradients that are divided already, adamax keeps the largest one in place of
# a mean square. Then mu / sqrt(nu) would be largest where the gradient is smallest, or
# depend on its unit.
_OTHERS = ("adopt", "adamax", "adamaxw")


class Found(NamedTuple):
    """The entry of a leaf in an optimizer state."""

    path: str  # for messages
    field: str  # "trace" or "mu"
    first: Any  # the entry of that field
    second: Any  # the entry of "nu" beside "mu", or None


def candidates(
    state: Any, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> list[list[Found]]:
    """Every entry of the state that could be the momentum of each leaf."""
    index = {name: i for i, name in enumerate(names)}
    entries = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = [key_name(key) for key in path]
        for j, key in enumerate(path):
            # Only the field of a state counts, not a parameter named "mu".
            if not hasattr(key, "name") or keys[j] not in (*FIELDS, "nu"):
                continue
            i = index.get(path_name(path[j + 1 :]))
            if i is not None and getattr(leaf, "shape", None) == shapes[i]:
                entries["/".join(keys[:j]), keys[j], i] = leaf
    found: list[list[Found]] = [[] for _ in names]
    for (prefix, field, i), leaf in entries.items():
        if field in FIELDS:
            second = entries.get((prefix, "nu", i)) if field == "mu" else None
            path = "/".join(x for x in (prefix, field, names[i]) if x)
            found[i].append(Found(path, field, leaf, second))
    return found


def find(
    state: Any,
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
) -> list[Found] | None:
    """The momentum of every sparse leaf, or None if there is none for all of them."""
    if not names:
        # `optax.tree.map_params` initialises with a tree without leaves, and the state
        # must have its usual structure. The fields of the states tell it, except if
        # only some leaves have a momentum (`partition`).
        return [] if len(_kinds(state)) == 1 else None
    found = candidates(state, names, shapes)
    for name, entries in zip(names, found, strict=True):
        if len(entries) > 1:
            raise ArgumentError(
                f"the inner optimizer keeps two momenta for the leaf "
                f"{name!r}, at {entries[0].path!r} and {entries[1].path!r}; there "
                "must be one. Give momentum=0.9 (any decay in [0, 1)) to let the "
                "engine keep its own average of the gradient."
            )
    if not all(found):
        return None
    first = [entries[0] for entries in found]
    kinds = {(f.field, f.second is None) for f in first}
    return first if len(kinds) <= 1 else None


def means_what_adam_means(inner: Any) -> bool:
    """Whether no part of an optimizer is one that uses the fields of Adam otherwise.

    Only the functions of an optimizer tell its name; they are found through the
    closures by which ``chain``, ``partition`` and the like hold their parts.
    """
    waiting, seen = [inner], set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, (tuple, list)):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, functools.partial):
            waiting += [part.func, part.args, part.keywords]
        elif inspect.ismethod(part):
            waiting += [part.__func__, vars(part.__self__)]
        elif inspect.isfunction(part):
            maker = part.__qualname__.split(".")[0].removeprefix("scale_by_")
            if maker in _OTHERS and part.__module__.startswith("optax."):
                return False
            for cell in part.__closure__ or ():
                with contextlib.suppress(ValueError):  # a name without a value yet
                    waiting.append(cell.cell_contents)
    return True


def _kinds(state: Any) -> set[tuple[str, bool]]:
    """Kinds of momentum by the fields of the states, without looking at leaves."""
    fields = getattr(state, "_fields", ())
    kinds = {(f, "nu" not in fields) for f in fields if f in FIELDS}
    inside = state.values() if isinstance(state, dict) else state
    if isinstance(state, (tuple, list, dict)):
        for x in inside:
            kinds |= _kinds(x)
    return kinds


def value(first: jax.Array, second: jax.Array | None) -> jax.Array:
    """The momentum that the rules see: m, or m / (sqrt(v) + 1e-8) if there is a v."""
    if second is None:
        return first
    # In float32: 1e-8 is zero in float16, and 0 / 0 would prevent every cycle.
    wide = as_wide(first.dtype)
    return first.astype(wide) / (jnp.sqrt(second.astype(wide)) + EPSILON)


def average(
    old: tuple[jax.Array, ...], gradient: tuple[jax.Array, ...], decay: float
) -> tuple[jax.Array, ...]:
    """The engine's own average: m <- decay * m + (1 - decay) * g, in float32. An entry
    with a gradient that is not finite is kept; else no later cycle would run.
    """
    return tuple(
        jnp.where(
            jnp.isfinite(g),
            (decay * m + (1 - decay) * g.astype(m.dtype)).astype(m.dtype),
            m,
        )
        for m, g in zip(old, gradient, strict=True)
    )
