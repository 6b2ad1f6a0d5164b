"""The arguments of a summary: what fits these parameters, and what FLOPs cost."""

from collections.abc import Collection, Mapping, Set
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_optax.budgets import apportion
from sparse_optax.leaves import PyTree, Where, is_hole, leaf_names, resolve_where
from sparse_optax.mask_trees import mask_shape


def chosen_leaves(
    params: PyTree, where: Where | None, wanted: Set[str] | None
) -> list[bool]:
    """One bool a leaf: those with the names wanted, else those that `where` takes."""
    if wanted is None:
        return resolve_where(params, where, caller="summary")
    if where is not None:
        raise ValueError(
            f"summary: `where`={where!r} is given beside `opt_state` or `masks`, which "
            "say which leaves count; it must be None. Leave `where` out."
        )
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    names = leaf_names(params)
    chosen = [
        name in wanted and not is_hole(x) for name, x in zip(names, flat, strict=True)
    ]
    there = [name for name, is_layer in zip(names, chosen, strict=True) if is_layer]
    check_names("masks", wanted, there)
    return chosen


def check_names(argument: str, got: Collection[str], wanted: Collection[str]) -> None:
    """Raises unless a tree of masks is one of these leaves."""
    if set(got) != set(wanted):
        raise ValueError(
            f"summary: `{argument}` speaks of {sorted(set(got) - set(wanted))}, which "
            f"are no layers here, and not of {sorted(set(wanted) - set(got))}; the "
            f"layers are {sorted(wanted)}. Pass masks or a state made for these "
            "parameters."
        )


def check_leaf(name: str, x: Any, masks: Mapping[str, Any]) -> None:
    """Raises unless a leaf is concrete and each argument's mask has its shape."""
    if not isinstance(x, jax.Array | np.ndarray) or isinstance(x, Tracer):
        raise ValueError(
            f"summary: the leaf {name!r} of `params` is a {type(x).__name__}; counts "
            "come back to the host. Call it outside jit, with concrete arrays."
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"summary: `masks` holds a mask for {name!r} of dtype {x.dtype}; only "
            "floating leaves can be sparse. Leave it out."
        )
    for argument, mask in masks.items():
        if tuple(mask_shape(mask)) != x.shape:
            raise ValueError(
                f"summary: `{argument}` has shape {tuple(mask_shape(mask))} for "
                f"{name!r}, and `params` {x.shape}; they must be equal. Pass masks "
                "made for these parameters."
            )


def check_unit_axis(unit_axis: int, name: str, rank: int) -> None:
    """Raises unless layers of two or more dimensions have the axis."""
    if rank > 1 and not -rank <= unit_axis < rank:
        raise ValueError(
            f"summary: `unit_axis`={unit_axis!r} is no axis of {name!r}, whose layers "
            f"have {rank} dimensions; it must be in [{-rank}, {rank - 1}]. Give -1 for "
            "flax and haiku, 0 for equinox."
        )


def prices(costs: Any, names: Collection[str]) -> dict[str, Fraction]:
    """FLOPs a weight by name, exactly; none where there are no costs."""
    if costs is None:
        return {}
    flat = jax.tree.leaves(costs, is_leaf=is_hole)
    found = {}
    for name, cost in zip(leaf_names(costs), flat, strict=True):
        if is_hole(cost):
            continue
        argument = f"costs[{name!r}]"
        found[name] = apportion.as_fraction(cost, "summary", argument, decimal=True)
        if found[name] < 0:
            raise ValueError(
                f"summary: `costs` must be finite numbers of at least 0; got {cost!r} "
                f"for {name!r}. Give the FLOPs of one weight."
            )
    if found.keys() != set(names):
        raise ValueError(
            f"summary: `costs` lacks {sorted(set(names) - found.keys())} and has "
            f"{sorted(found.keys() - set(names))} besides; it must give a number for "
            f"each of {list(names)}. Correct the names."
        )
    return found
