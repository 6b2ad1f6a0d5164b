"""Weights that a method leaves as they are: `freeze` and `within` of ``regrow``.

The state holds one tree for both, ``frozen``. A leaf of it is a scalar True (all that
the mask leaves out, or the whole of a dense leaf), the mask of the frozen weights, or a
hole where nothing is frozen. Without both arguments the tree is ``()``.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax.checks import ArgumentError, unnamed
from sparse_optax.layers import (
    Layers,
    PyTree,
    flat_counts,
    is_abstract,
    is_hole,
    is_mask,
    leaf_names,
)
from sparse_optax.masks.make import place
from sparse_optax.masks.optimizer_state import named_masks
from sparse_optax.masks.tree import check_shapes, pack, unpack
from sparse_optax.regrowth.rules import layer_counts


# --- at the start ---------------------------------------------------------------------
def _named(within: PyTree, params: PyTree) -> dict[str, jax.Array]:
    """The masks of `within` by name, checked against the parameters."""
    given = named_masks(within)
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    there = dict(zip(leaf_names(params), flat, strict=True))
    unknown = given.keys() - there.keys()
    if unknown:
        raise ArgumentError(
            f"`within` holds {sorted(unknown)}, which `params` does not; the "
            f"parameters are {list(there)}. Pass masks made for these parameters."
        )
    # `optax.partition` gives each group a tree with holes; a mask there is not read.
    found = {n: m for n, m in given.items() if not is_hole(there[n])}
    for name, mask in found.items():
        check_shapes([mask], [there[name]], [name])
    return {name: unpack(mask) for name, mask in found.items()}


def usable_of(within: PyTree, layers: Layers, params: PyTree) -> tuple[jax.Array, ...]:
    """For each leaf of the layers the weights that may be active."""
    named = _named(within, params)
    pairs = zip(layers.names, layers.pick(params), strict=True)
    return tuple(
        jnp.asarray(named[name]) if name in named else jnp.ones_like(x, dtype=bool)
        for name, x in pairs
    )


def first_frozen(
    freeze: bool, within: PyTree | None, layers: Layers, params: PyTree, packed: bool
) -> PyTree:
    """The tree `frozen` of a new state."""
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    if not freeze and within is None:
        return ()
    if not flat:  # `optax.tree.map_params` initialises with a tree without leaves
        return params
    named = {} if within is None else _named(within, params)
    among, frozen = set(layers.index), []
    for i, (name, x) in enumerate(zip(leaf_names(params), flat, strict=True)):
        floating = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)
        if freeze and floating:
            frozen.append(jnp.ones([], bool))
        elif within is not None and (name in named or i in among):
            mask = named.get(name, jnp.ones_like(x, dtype=bool))
            mask = place(jnp.logical_not(mask), x)
            frozen.append(unnamed(pack)(mask) if packed and mask.ndim else mask)
        else:
            frozen.append(optax.MaskedNode())
    return jax.tree.unflatten(structure, frozen)


def at_most(counts: Sequence[Any], layers: Layers, usable: Sequence[jax.Array]):
    """The counts of each leaf, limited to the weights that may be active."""
    most = layers.split(layer_counts(usable, layers.axes))
    return [jnp.minimum(jnp.asarray(n), m) for n, m in zip(counts, most, strict=True)]


def check_room(
    layers: Layers, counts: Sequence[Any], usable: Sequence[jax.Array]
) -> None:
    """Raises if a layer must keep more weights than it may have."""
    if any(map(is_abstract, usable)):
        return
    with jax.ensure_compile_time_eval():
        most = layers.split(np.asarray(layer_counts(usable, layers.axes), np.int64))
    for name, n, m in zip(layers.names, counts, most, strict=True):
        wanted, there = flat_counts([n]), flat_counts([m])
        if np.any(wanted > there):
            worst = int(np.argmax(wanted - there))
            raise ArgumentError(
                f"`within` leaves {there[worst]} weights of {name!r} and `density` "
                f"asks for {wanted[worst]}; it must leave as many. Lower `density`, "
                "or give a budget with fewer weights for this layer."
            )


def check_within(
    layers: Layers,
    masks: Sequence[jax.Array],
    usable: Sequence[jax.Array] | None,
) -> None:
    """Raises if given masks keep a weight that may not be active."""
    given = [*masks, *(usable or ())]
    if usable is None or any(map(is_abstract, given)):
        return
    for name, mask, may in zip(layers.names, masks, usable, strict=True):
        outside = int(np.sum(np.asarray(mask) & ~np.asarray(may)))
        if outside:
            raise ArgumentError(
                f"`masks` keep {outside} weights of {name!r} that `within` does not "
                "allow; there must be none. Pass masks.combine(jnp.logical_and, masks, "
                "within)."
            )


# --- at an update ---------------------------------------------------------------------
def leaves_of(frozen: PyTree, number: int) -> list[Any]:
    """What is frozen of each leaf: an array that spreads over it, or a hole."""
    if not jax.tree.leaves(frozen):
        return [optax.MaskedNode()] * number
    flat = jax.tree.leaves(frozen, is_leaf=is_mask)
    return [m if is_hole(m) else unpack(m) for m in flat]


def silence(updates: PyTree, frozen: Sequence[Any], layers: Layers) -> PyTree:
    """The gradient without that of frozen weights in dense leaves: no norm sees it."""
    flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
    for i, x in _dense(frozen, layers):
        flat[i] = jnp.where(x, jnp.zeros((), flat[i].dtype), flat[i])
    return jax.tree.unflatten(structure, flat)


def hold(emitted: list[Any], frozen: Sequence[Any], layers: Layers) -> None:
    """Writes updates that leave the frozen weights of dense leaves as they are."""
    for i, x in _dense(frozen, layers):
        emitted[i] = jnp.where(x, unchanged(emitted[i].dtype), emitted[i])


def unchanged(dtype: Any) -> jax.Array:
    """The update that changes no bit: minus zero, since -0 + 0 is +0."""
    return -jnp.zeros((), dtype)


def _dense(frozen: Sequence[Any], layers: Layers) -> list[tuple[int, Any]]:
    among = set(layers.index)
    return [(i, x) for i, x in enumerate(frozen) if i not in among and not is_hole(x)]
