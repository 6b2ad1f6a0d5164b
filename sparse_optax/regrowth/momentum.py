"""Finds the momentum that an optimizer already keeps, whatever its structure.

Optax names the fields: ``trace`` (sgd, rmsprop with momentum), ``mu`` with ``nu``
(the Adam family), ``mu`` alone (lion). A field holds a tree like the parameters, so
the path of an entry is the path of the field followed by the path of a parameter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_optax.leaves import key_name, path_name

FIELDS = ("trace", "mu")
EPSILON = 1e-8


class Found(NamedTuple):
    """A leaf's entry in an optimizer state.

    Attributes:
      path: Where it stands, for messages.
      field: ``"trace"`` or ``"mu"``.
      first: The entry of ``trace`` or ``mu``.
      second: The entry of ``nu`` beside ``mu``, or None.
    """

    path: str
    field: str
    first: Any
    second: Any


def candidates(
    state: Any, names: tuple[str, ...], shapes: tuple[tuple[int, ...], ...]
) -> list[list[Found]]:
    """Every entry of the state that could be the momentum of each leaf.

    Args:
      state: An optimizer state, concrete or abstract.
      names: Normalised names of the sparse leaves.
      shapes: Their shapes; a momentum has its leaf's shape.

    Returns:
      For each leaf a list of entries.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax.regrowth import momentum
      >>> state = optax.adam(1e-3).init({"w": jnp.zeros((2, 3))})
      >>> [f.path for f in momentum.candidates(state, ("w",), ((2, 3),))[0]]
      ['0/mu/w']
    """
    index = {name: i for i, name in enumerate(names)}
    entries = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        keys = [key_name(key) for key in path]
        for j, key in enumerate(path):
            # Only a field of a state counts, not a parameter that is called "mu".
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
    *,
    caller: str,
) -> list[Found] | None:
    """The momentum of every sparse leaf, or None where there is none to share.

    Args:
      state: An optimizer state.
      names: Normalised names of the sparse leaves.
      shapes: Their shapes.
      caller: The name that an error starts with.

    Returns:
      One entry a leaf, all of one kind; None if a leaf has none or the kinds
      differ, which means that the engine keeps an average of its own.

    Raises:
      ValueError: If a leaf has two candidates.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax.regrowth import momentum
      >>> params = {"w": jnp.zeros((2, 3))}
      >>> momentum.find(optax.sgd(0.1).init(params), ("w",), ((2, 3),), caller="doc")
    """
    if not names:
        # A tree without leaves, with which `optax.tree.map_params` initialises: the
        # state must have the structure that it has with leaves. By the states' fields
        # alone that is wrong where only some leaves have a momentum (`partition`).
        return [] if len(_kinds(state)) == 1 else None
    found = candidates(state, names, shapes)
    for name, entries in zip(names, found, strict=True):
        if len(entries) > 1:
            raise ValueError(
                f"{caller}: the inner optimizer keeps two momenta for the leaf "
                f"{name!r}, at {entries[0].path!r} and {entries[1].path!r}; there "
                "must be one. Give momentum=0.9 (any decay in [0, 1)) to let the "
                "engine keep its own average of the gradient."
            )
    if not all(found):
        return None
    first = [entries[0] for entries in found]
    kinds = {(f.field, f.second is None) for f in first}
    return first if len(kinds) <= 1 else None


def _kinds(state: Any) -> set[tuple[str, bool]]:
    """Kinds of momentum by the fields of states alone, without looking at leaves."""
    fields = getattr(state, "_fields", ())
    kinds = {(f, "nu" not in fields) for f in fields if f in FIELDS}
    inside = state.values() if isinstance(state, dict) else state
    if isinstance(state, (tuple, list, dict)):
        for x in inside:
            kinds |= _kinds(x)
    return kinds


def value(first: jax.Array, second: jax.Array | None) -> jax.Array:
    """The momentum that the rules see: m, or m / (sqrt(v) + 1e-8) where v is kept.

    Args:
      first: The first moment or trace.
      second: The second moment, or None.

    Returns:
      An array of the same shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.regrowth import momentum
      >>> float(momentum.value(jnp.float32(1.0), jnp.float32(4.0)))
      0.5
    """
    if second is None:
        return first
    # In float32: a float16 has no 1e-8, and 0 / 0 would stop every cycle.
    wide = jnp.promote_types(first.dtype, jnp.float32)
    return first.astype(wide) / (jnp.sqrt(second.astype(wide)) + EPSILON)


def average(
    old: tuple[jax.Array, ...], gradient: tuple[jax.Array, ...], decay: float
) -> tuple[jax.Array, ...]:
    """The engine's own average: m <- decay * m + (1 - decay) * g, in float32.

    An entry whose gradient is not finite keeps its average: one broken step would
    otherwise end all later cycles.

    Args:
      old: The averages.
      gradient: The gradients.
      decay: In [0, 1).

    Returns:
      The new averages.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.regrowth import momentum
      >>> new = momentum.average((jnp.zeros(1),), (jnp.ones(1),), 0.75)
      >>> new[0].tolist()
      [0.25]
    """
    return tuple(
        jnp.where(
            jnp.isfinite(g),
            (decay * m + (1 - decay) * g.astype(m.dtype)).astype(m.dtype),
            m,
        )
        for m, g in zip(old, gradient, strict=True)
    )
