"""Restarts what the inner optimizer keeps about weights that have just grown.

An entry with one number per weight gets the value that the optimizer's own ``init``
gives, which is not always zero. Statistics of rows, blocks or whole leaves stay.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_optax.checks import ArgumentError
from sparse_optax.layers import (
    Layers,
    PyTree,
    is_hole,
    layers_of,
    leaf_names,
    path_name,
)

# How much larger the step of a weight that restarts alone may be. Adam's is larger by a
# few times, since its correction of the bias has ended.
_FAR = 1e4


class Restart(NamedTuple):
    """How to restart weights; hashable, a static argument of the compiled cycle."""

    init: Callable[[PyTree], Any]  # of the inner optimizer
    structure: Any  # of the parameters
    # For each entry with one number per weight its position among the leaves of the
    # inner state, and the position of its leaf among those that take part.
    places: tuple[tuple[int, int], ...]

    def pick(self, inner_state: Any) -> tuple[jax.Array, ...]:
        """The entries that can restart."""
        flat = jax.tree.leaves(inner_state, is_leaf=is_hole)
        return tuple(flat[j] for j, _ in self.places)

    def put(self, inner_state: Any, entries: Sequence[jax.Array]) -> Any:
        """The inner state with these entries in place of its own."""
        flat, structure = jax.tree.flatten(inner_state, is_leaf=is_hole)
        for (j, _), entry in zip(self.places, entries, strict=True):
            flat[j] = entry
        return jax.tree.unflatten(structure, flat)

    def apply(
        self,
        entries: Sequence[jax.Array],
        params: Sequence[Any],
        grown: Sequence[jax.Array],
    ) -> tuple[jax.Array, ...]:
        """The entries, as ``init`` gives them where weights have grown. ``params`` are
        the leaves that the inner optimizer sees at this update.
        """
        fresh = self.pick(self.init(jax.tree.unflatten(self.structure, params)))
        return tuple(
            jnp.where(grown[i], new.astype(old.dtype), old)
            for (_, i), new, old in zip(self.places, fresh, entries, strict=True)
        )


def restart_of(
    inner: optax.GradientTransformation,
    inner_state: Any,
    layers: Layers,
    params: PyTree,
) -> Restart | None:
    """How weights of this optimizer restart; None if it keeps nothing per weight."""
    among = {i: k for k, i in enumerate(layers.index)}
    entries = jax.tree.leaves(inner_state, is_leaf=is_hole)
    owners = _by_walk(inner, inner_state, params)
    if owners is None:
        owners = _by_name(inner_state, params)
    places = []
    for j, (entry, owner) in enumerate(zip(entries, owners, strict=True)):
        if owner not in among or not _is_number(entry):
            continue
        shape = layers.leaves[among[owner]].shape
        if entry.shape == shape:
            places.append((j, among[owner]))
        elif len(entry.shape) > len(shape) and entry.shape[-len(shape) :] == shape:
            _refuse(f"{entry.shape[: -len(shape)]} numbers for each weight", entry)
    if not places:
        return None
    structure = jax.tree.structure(params, is_leaf=is_hole)
    return Restart(inner.init, structure, tuple(places))


def check_alone(inner: optax.GradientTransformation) -> None:
    """Raises if a weight that restarts alone takes a step of another size.

    ``optax.contrib.acprop`` divides by the second moment of the step before, and only
    at its very first step not by its initial zero. One weight is tried.
    """
    try:
        with jax.ensure_compile_time_eval():
            params: Any = {"w": jnp.ones((1, 1))}
            step: Any = None
            start = state = inner.init(params)
            usual = []
            for _ in range(3):
                step, state = inner.update(params, state, params)
                usual.append(float(jnp.max(jnp.abs(step["w"]))))
            layers = layers_of(params)
            restart = restart_of(inner, state, layers, params)
            if restart is None:
                return
            state = restart.put(state, restart.pick(start))
            step, _ = inner.update(params, state, params)
            restarted = float(jnp.max(jnp.abs(step["w"])))
    # An optimizer for other parameters, or with arguments of its own, is not tried.
    except Exception:
        return
    most = max(usual)
    if 0 < most < math.inf and not restarted <= _FAR * most:
        raise ArgumentError(
            "`reset_moments` is 'grown', and with the moments that `init` of `inner` "
            f"gives, a single weight takes a step of {restarted:.3g} where the others "
            f"take {most:.3g}; it must be of their size. Pass "
            "reset_moments='none'."
        )


def _is_number(entry: Any) -> bool:
    """Whether an entry may be a moment; signs, masks and counters are none."""
    return hasattr(entry, "dtype") and jnp.issubdtype(entry.dtype, jnp.inexact)


class _Owner:
    """The position of a parameter, or None; opaque to ``jax.tree.map``."""

    def __init__(self, position: int | None):
        self.position = position


def _by_walk(inner: Any, inner_state: Any, params: PyTree) -> list[int | None] | None:
    """For each leaf of the inner state the parameter in whose place it stands; None
    if Optax cannot tell, since the optimizer does not keep trees like the parameters.
    """
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    owners = jax.tree.unflatten(structure, [_Owner(i) for i in range(len(flat))])
    try:
        marked = optax.tree.map_params(
            inner,
            lambda _, owner: owner,
            inner_state,
            owners,
            transform_non_params=lambda _: _Owner(None),
            is_leaf=is_hole,
        )
    # Whatever a function of someone else raises on a tree without arrays.
    except Exception:
        return None
    found = jax.tree.leaves(marked)
    number = len(jax.tree.leaves(inner_state, is_leaf=is_hole))
    if len(found) != number or not all(isinstance(x, _Owner) for x in found):
        return None
    return [owner.position for owner in found]


def _by_name(inner_state: Any, params: PyTree) -> list[int | None]:
    """The same by names: an entry's path ends with the path of its parameter."""
    index = {name: i for i, name in enumerate(leaf_names(params))}
    owners = []
    for path, entry in jax.tree_util.tree_leaves_with_path(
        inner_state, is_leaf=is_hole
    ):
        ends = (index.get(path_name(path[k:])) for k in range(len(path) + 1))
        owner = next((i for i in ends if i is not None), None)
        owners.append(owner)
        if owner is None and _is_number(entry) and entry.size > 1:
            # A list of statistics in a parameter's place is no entry per weight.
            parts = (path[a:b] for b in range(len(path)) for a in range(b))
            if not any(path_name(part) in index for part in parts):
                _refuse(f"{path_name(path)!r}", entry)
    return owners


def _refuse(what: str, entry: Any) -> None:
    raise ArgumentError(
        f"`reset_moments` is 'grown', and `inner` keeps {what} in an array of shape "
        f"{tuple(entry.shape)}; a weight that grows can restart only where there is "
        "one number for it, in a tree like the parameters. Pass reset_moments='none'."
    )
