"""The weights of highest score in one layer, alone or in the units of a pattern."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from sparse_optax import patterns, scored_masks
from sparse_optax.leaves import Layout
from sparse_optax.patterns import Pattern


def number(
    pattern: Pattern | None, shape: Sequence[int], keep: Any, *, caller: str
) -> Any:
    """How many weights a layer keeps; with N:M the pattern says it.

    Args:
      pattern: Which weights stand and fall together, or None.
      shape: The shape of the layer.
      keep: The number that was asked for, or None.
      caller: The name that an error starts with.

    Returns:
      The number; what was given, but with N:M.

    Raises:
      ValueError: If the layer cannot be cut so, or another number than that of N:M was
        given.

    Examples:
      >>> from sparse_optax import patterns
      >>> from sparse_optax.criteria import one_layer
      >>> one_layer.number(patterns.n_m(2, 4), (8, 3), None, caller="doc")
      12
    """
    if pattern is None:
        return keep
    patterns.check(pattern, shape, "kernel", caller=caller)
    if not pattern.m:
        return keep
    right = math.prod(shape) // pattern.m * pattern.n
    if not (keep is None or keep == right):
        raise ValueError(
            f"{caller}: `keep` must be {right}, or left out, with {pattern.name}; got "
            f"{keep!r}. Leave it out: the pattern says it."
        )
    return right


def highest(pattern: Pattern | None, scores: jax.Array, keep: Any) -> jax.Array:
    """A mask of the weights, or whole units, of highest score.

    Args:
      pattern: Which weights stand and fall together, or None; a unit has the sum of
        its scores.
      scores: Of the weights of a layer, none negative.
      keep: How many weights at most, an integer that may be traced; not read with N:M.

    Returns:
      A bool array of the shape of ``scores``.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import patterns
      >>> from sparse_optax.criteria import one_layer
      >>> scores = jnp.array([[1.0, 2.0], [5.0, 1.0]])
      >>> one_layer.highest(patterns.blocks(2, 1), scores, 3).tolist()
      [[True, False], [True, False]]
    """
    limit: Any = [keep]
    if pattern is not None:
        size = patterns.unit_size(pattern, scores.shape)
        limit = pattern.n if pattern.m else [keep // size]
    # A tree of one leaf.
    tree, plan = jax.tree.structure(0), Layout((0,), ("kernel",), (None,))
    wanted = scored_masks.Ranking(tree, 1, plan, [scores], limit, None, pattern)
    return scored_masks.highest(wanted, [(scores,)])
