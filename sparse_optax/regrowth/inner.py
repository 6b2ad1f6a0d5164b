"""The update of the wrapped optimizer: what it is given besides the gradient."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer

from sparse_optax.layers import Layers, PyTree, is_hole

_SEARCHES = (
    optax.ScaleByBacktrackingLinesearchState,
    optax.ScaleByZoomLinesearchState,
)
_MASKS = "regrow_masks"


def has_line_search(inner_state: Any) -> bool:
    """Whether a line search of Optax is in the wrapped optimizer, as in L-BFGS."""

    def is_search(node):
        return isinstance(node, _SEARCHES)

    return any(map(is_search, jax.tree.leaves(inner_state, is_leaf=is_search)))


def update(
    inner_tx: optax.GradientTransformationExtraArgs,
    updates: PyTree,
    inner_state: Any,
    params: PyTree,
    layers: Layers,
    moves: Sequence[jax.Array],
    there: Sequence[jax.Array],
    changed: Callable[[], jax.Array],
    extra: dict[str, Any],
) -> tuple[PyTree, Any]:
    """The inner update on masked weights. ``moves`` are the masks of the weights that
    move, ``there`` those of all that the loss sees, and ``changed()`` says whether the
    loss ``value`` may be of other masks.

    A loss ``value_fn`` becomes that of the masked weights. Around a line search the
    gradient is masked too, so that its direction is one along which this loss falls.
    """
    extra = dict(extra)
    if "value_fn" in extra:
        loss, names = _masked_loss(extra["value_fn"], layers, there)
        extra["value_fn"] = loss
        if has_line_search(inner_state):
            updates = _masked(updates, layers, moves, _or_zero)
            if "value" in extra:
                given = {name: extra[name] for name in names if name in extra}
                extra["value"] = _value_of(
                    lambda: loss(params, **given), extra["value"], changed()
                )
    masks = layers.rebuild(moves)
    try:
        if not _accepts(inner_tx.update, _MASKS):
            extra.pop(_MASKS, None)
            return inner_tx.update(updates, inner_state, params, **extra)
        given = {**extra, _MASKS: masks}
        return inner_tx.update(updates, inner_state, params, **given)
    except TypeError as error:
        # A part of a chain may take no other arguments than its own.
        if f"argument '{_MASKS}'" not in str(error):
            raise
    return inner_tx.update(updates, inner_state, params, **extra)


def _accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes a keyword argument of this name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    kinds = {p.kind for p in parameters.values()}
    return name in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _masked(
    tree: PyTree,
    layers: Layers,
    moves: Sequence[jax.Array],
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> PyTree:
    """A tree like the parameters with a function of each mask and leaf."""
    flat, structure = jax.tree.flatten(tree, is_leaf=is_hole)
    for i, move in zip(layers.index, moves, strict=True):
        flat[i] = function(move, flat[i])
    return jax.tree.unflatten(structure, flat)


def _or_zero(move: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(move, x, jnp.zeros((), x.dtype))


def _straight_through(move: jax.Array, x: jax.Array) -> jax.Array:
    """Zero where missing, with the derivative of x: a line search stores the gradient,
    and rules that grow by it need the dense one.
    """
    return jnp.where(move, x, x - lax.stop_gradient(x))


def _masked_loss(
    value_fn: Callable[..., Any], layers: Layers, there: Sequence[jax.Array]
) -> tuple[Callable[..., Any], list[str]]:
    """The loss of the masked weights, and the names of its other arguments."""
    try:
        signature = inspect.signature(value_fn)
    except (TypeError, ValueError):
        return value_fn, []
    others = list(signature.parameters.values())[1:]
    wants_masks = any(p.name == _MASKS for p in others)

    @functools.wraps(value_fn)
    def loss(params, *args, **kwargs):
        if not wants_masks:
            kwargs.pop(_MASKS, None)
        masked = _masked(params, layers, there, _straight_through)
        return value_fn(masked, *args, **kwargs)

    if not wants_masks:
        # Optax hands over the arguments that the signature names, and no others.
        taken = list(signature.parameters.values())
        added = inspect.Parameter(_MASKS, inspect.Parameter.KEYWORD_ONLY, default=None)
        last = taken and taken[-1].kind is inspect.Parameter.VAR_KEYWORD
        taken.insert(len(taken) - bool(last), added)
        signature = signature.replace(parameters=taken)
    loss.__signature__ = signature  # type: ignore[attr-defined]
    return loss, [p.name for p in others]


def _value_of(fresh: Callable[[], Any], value: Any, changed: Any) -> Any:
    """The loss as given, or anew where the masks are not those it was computed with."""

    def anew():
        return jnp.asarray(fresh(), jnp.result_type(value))

    if isinstance(changed, Tracer):
        return lax.cond(changed, anew, lambda: jnp.asarray(value))
    return anew() if changed else value
