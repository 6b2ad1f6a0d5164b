"""Counts as scalars on the device, for a logger, inside a compiled step."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.optimizer_state import kept_masks, named_masks, states_with
from sparse_optax.masks.tree import is_nonzero, slice_counts
from sparse_optax.report.summaries import (
    array_of,
    by_name,
    check_leaf,
    counted_layers,
    front,
)

# More than an int32 holds.
_MANY = 2**31


@boundary("metrics")
def metrics(
    params: PyTree,
    opt_state: PyTree = None,
    *,
    masks: PyTree = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
) -> dict[str, jax.Array]:
    """Counts of each layer and in total as a flat dict of scalars, also under jit.

    The names are those of ``report.scalars``, which has more of them, but only for
    concrete arrays. Under ``jax.vmap`` each number has the axis of the members. On a
    mesh the counts are added over its devices, with one small all-reduce.

    ===================  ===============================================================
    ``kept/...``         weights in the mask; without a mask those that are not zero
    ``density/...``      their fraction of all weights
    ``nonzero/...``      with a mask, weights that are not zero
    ``outside/...``      those of them that the mask does not keep: 0 after an update
    ``removed/...``      weights removed in the last cycle
    ``grown/...``        weights grown in the last cycle
    ``passed/...``       weights whose gradient GSM let pass at the last step
    ``skipped/total``    cycles left out because of numbers that are not finite
    ``misplaced/total``  how often missing weights were not zero, see ``report.summary``
    ===================  ===============================================================

    Args:
      params: The parameters, of any tree type, traced or not.
      opt_state: An optimizer state with states of ``regrow`` or GSM inside.
      masks: Masks to use instead of those in the state.
      where: Which leaves count without masks and state, see ``eligible``.
      stacked: ``{name: axis}`` of leaves that stack layers.

    Returns:
      ``{"density/Dense_0/kernel": ..., ..., "density/total": ...}``: densities in
      float32, counts in int32, or in float32 where there are 2^31 weights or more.

    Raises:
      ValueError: If an argument does not fit or the state has no sparse method.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sparse_optax
      >>> params = {"kernel": jnp.ones((20, 10))}
      >>> tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.05, key=0)
      >>> state = tx.init(params)
      >>> found = jax.jit(sparse_optax.report.metrics)(params, state)
      >>> int(found["kept/kernel"]), round(float(found["density/total"]), 3)
      (10, 0.05)
    """
    states = list(states_with(opt_state, "regrow_masks", "gsm_passed"))
    if opt_state is not None and not states:
        raise ArgumentError(
            "`opt_state` holds no sparse method; it must hold a state of regrow or of "
            "GSM. Leave it out to count what is not zero."
        )
    regrown = [state for state in states if hasattr(state, "regrow_masks")]
    gates = [state for state in states if hasattr(state, "gsm_passed")]
    kept = {}
    if masks is not None:
        kept = named_masks(masks)
    elif regrown:
        kept = kept_masks(opt_state)
    moved = {
        "removed": by_name(state.removed for state in regrown),
        "grown": by_name(state.grown for state in regrown),
        "passed": by_name(state.gsm_passed for state in gates),
    }
    given = opt_state is not None or masks is not None
    wanted = kept.keys() | moved["passed"].keys() if given else None
    layers = counted_layers(params, wanted, where, stacked)
    found: dict[str, Any] = {}
    totals: dict[str, list[Any]] = {}
    for leaf, x in zip(layers.leaves, layers.pick(params), strict=True):
        mask = kept.get(leaf.name)
        check_leaf(leaf, x, {} if mask is None else {"masks": mask})
        # An axis of layers in front, of one where the leaf does not stack any.
        view = front(x, leaf.axis) if leaf.axis is not None else x[None]
        if mask is not None:
            mask = front(mask, leaf.axis)
            mask = mask if leaf.axis is not None else mask.reshape(view.shape)
        counts = _counts(view, mask, leaf.size)
        counts |= _given(moved, leaf)
        names = [leaf.name]
        if leaf.axis is not None:
            names = [f"{leaf.name}[{i}]" for i in range(leaf.copies)]
        for quantity, numbers in counts.items():
            totals.setdefault(quantity, []).append(numbers)
            if len(numbers) == len(names):
                found |= {
                    f"{quantity}/{name}": numbers[i] for i, name in enumerate(names)
                }
        for i, name in enumerate(names):
            share = counts["kept"][i].astype(jnp.float32) / max(leaf.size, 1)
            found[f"density/{name}"] = share if leaf.size else jnp.float32(1)
    size = int(layers.sizes.sum())
    for quantity, parts in totals.items():
        found[f"{quantity}/total"] = _sum(parts, size)
    if totals:
        share = found["kept/total"].astype(jnp.float32) / max(size, 1)
        found["density/total"] = share
    for quantity in ("skipped", "misplaced"):
        if regrown:
            numbers = [
                jnp.asarray(array_of(getattr(state, quantity))) for state in regrown
            ]
            found[f"{quantity}/total"] = sum(numbers[1:], start=numbers[0])
    return found


def _counts(x: Any, mask: Any, size: int) -> dict[str, jax.Array]:
    """Counts along the first axis, of layers of so many weights each."""

    def count(there):
        if size < _MANY:
            return slice_counts(there)
        rest = there.reshape(len(there), there.shape[1], -1)
        return jnp.sum(jnp.sum(rest, -1, dtype=jnp.int32), -1, dtype=jnp.float32)

    there = is_nonzero(x)
    if mask is None:
        return {"kept": count(there)}
    outside = jnp.logical_and(there, jnp.logical_not(mask))
    return {"kept": count(mask), "nonzero": count(there), "outside": count(outside)}


def _given(moved: Mapping[str, Mapping[str, Any]], leaf: Any) -> dict[str, jax.Array]:
    """The numbers of the states for a leaf: one for each of its layers, or one."""
    found = {}
    for quantity, named in moved.items():
        if leaf.name in named:
            numbers = jnp.atleast_1d(named[leaf.name])
            # A state may stack layers that the caller takes for one.
            if leaf.axis is None and numbers.shape[0] > 1:
                numbers = jnp.sum(numbers, keepdims=True)
            found[quantity] = numbers
    return found


def _sum(parts: Sequence[Any], size: int) -> jax.Array:
    dtype = jnp.int32 if size < _MANY else jnp.float32
    sums = [jnp.sum(part.astype(dtype)) for part in parts]
    return sum(sums[1:], start=sums[0])
