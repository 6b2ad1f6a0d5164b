"""What the criteria of a loss share: gradients of some leaves, summed over batches."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from sparse_optax.leaves import PyTree, is_hole

Leaves = list[jax.Array]


class Split(NamedTuple):
    """A tree of parameters taken apart.

    Attributes:
      chosen: The leaves that are differentiated.
      rebuild: A function of such leaves that gives the whole tree.
    """

    chosen: Leaves
    rebuild: Callable[[Leaves], PyTree]


def split(params: PyTree, index: Iterable[int]) -> Split:
    """Takes the leaves that are scored out of a tree, since not all have gradients.

    Args:
      params: The parameters.
      index: Positions of the leaves that are scored.

    Returns:
      A ``Split``.

    Examples:
      >>> from sparse_optax.criteria import batches
      >>> parts = batches.split({"n": 3, "w": 2.0}, [1])
      >>> parts.chosen, parts.rebuild([5.0])
      ([2.0], {'n': 3, 'w': 5.0})
    """
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    index = list(index)

    def rebuild(chosen):
        whole = list(flat)
        for i, x in zip(index, chosen, strict=True):
            whole[i] = x
        return jax.tree.unflatten(structure, whole)

    return Split([flat[i] for i in index], rebuild)


def total(
    statistic: Callable[[Leaves, Any], Leaves],
    chosen: Leaves,
    batches: Iterable[Any],
    *,
    caller: str,
) -> tuple[Leaves, list[Any]]:
    """Sums a statistic over batches, compiled once for all batches of one shape.

    Args:
      statistic: ``statistic(chosen, batch)`` gives an array for each leaf.
      chosen: The leaves.
      batches: The batches, an iterable; not a tuple of arrays, which is one batch.
      caller: The name that an error starts with.

    Returns:
      The float32 (or wider) sums, and the number of examples of each batch: the length
      of its first array, None where there is none.

    Raises:
      ValueError: If there is no batch or an empty one, or ``batches`` is one batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.criteria import batches
      >>> batches.total(lambda w, x: [w[0] * x.sum()], [jnp.float32(2)],
      ...               [jnp.ones(3), jnp.ones(2)], caller="doc")
      ([Array(10., dtype=float32)], [3, 2])
    """
    # A tuple of arrays is one batch, of inputs and targets.
    arrays = isinstance(batches, tuple) and all(hasattr(x, "shape") for x in batches)
    if hasattr(batches, "shape") or isinstance(batches, dict) or (batches and arrays):
        raise ValueError(
            f"{caller}: `batches` must be an iterable of batches; got one "
            f"{type(batches).__name__} of arrays. Pass [batch]."
        )
    compiled = jax.jit(lambda w, batch: _widened(statistic(w, batch)))
    sums, lengths = None, []
    for batch in batches:
        lengths.append(length(batch))
        if lengths[-1] == 0:
            raise ValueError(
                f"{caller}: `batches` holds a batch without examples; each must have "
                "at least one. Leave the empty one out."
            )
        part = compiled(chosen, batch)
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
    if sums is None:
        raise ValueError(
            f"{caller}: `batches` is empty; it must hold at least one batch. Pass "
            "[batch], and a list where an iterator may be used up."
        )
    return sums, lengths


def length(batch: Any) -> int | None:
    """Number of examples of a batch: the length of its first array.

    Args:
      batch: A tree of arrays.

    Returns:
      An integer; None where no array has an axis.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.criteria import batches
      >>> batches.length((jnp.ones((5, 2)), jnp.ones(5)))
      5
    """
    arrays = [x for x in jax.tree.leaves(batch) if jnp.ndim(x)]
    return arrays[0].shape[0] if arrays else None


def mean_over_examples(
    statistic: Callable[[Leaves, Any], Leaves],
    chosen: Leaves,
    batches: Iterable[Any],
    *,
    caller: str,
) -> Leaves:
    """Mean over all examples of a statistic of one example.

    Args:
      statistic: ``statistic(chosen, example)`` gives an array for each leaf.
      chosen: The leaves.
      batches: The batches: trees of arrays whose first axis counts examples.
      caller: The name that an error starts with.

    Returns:
      The float32 (or wider) means. Memory: the leaves times the examples of a batch.

    Raises:
      ValueError: If there is no batch, or its arrays do not agree on their length.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.criteria import batches
      >>> batches.mean_over_examples(lambda w, x: [w[0] * x], [jnp.float32(2)],
      ...                            [jnp.ones(3), jnp.zeros(1)], caller="doc")
      [Array(1.5, dtype=float32)]
    """

    def summed(chosen, batch):
        lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
        if len(lengths) != 1 or lengths == {()}:
            found = [jnp.shape(x) for x in jax.tree.leaves(batch)]
            raise ValueError(
                f"{caller}: a batch holds arrays of shapes {found}; their first axis "
                "must count the same examples. Give each example one entry in each."
            )
        each = jax.vmap(lambda example: _widened(statistic(chosen, example)))(batch)
        return [jnp.sum(x, axis=0) for x in each]

    sums, lengths = total(summed, chosen, batches, caller=caller)
    return [x / sum(lengths) for x in sums]


def _widened(values: Leaves) -> Leaves:
    return [x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in values]


def ones(inputs: Any, *, caller: str) -> Any:
    """A batch of ones.

    Args:
      inputs: A shape with its batch axis, or a tree of arrays or
        ``jax.ShapeDtypeStruct``, of which only shapes and dtypes are used.
      caller: The name that an error starts with.

    Returns:
      An array, or a tree of them.

    Raises:
      ValueError: If ``inputs`` is neither.

    Examples:
      >>> from sparse_optax.criteria import batches
      >>> batches.ones((1, 2), caller="doc").tolist()
      [[1.0, 1.0]]
    """
    if isinstance(inputs, tuple) and all(isinstance(n, int) for n in inputs):
        return jnp.ones(inputs)
    flat = jax.tree.leaves(inputs)
    if not flat or not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in flat):
        raise ValueError(
            f"{caller}: `inputs` must be a shape, a tuple of whole numbers, or a tree "
            f"of arrays or jax.ShapeDtypeStruct; got {inputs!r}. Pass (1, 784), for "
            "instance."
        )
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), inputs)


def check_scalar(shape: Any, *, caller: str) -> None:
    """Raises where a loss is no scalar.

    Args:
      shape: What ``jax.eval_shape`` gave, or the loss itself.
      caller: The name that the error starts with.

    Raises:
      ValueError: If it has axes or is a tree.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.criteria import batches
      >>> batches.check_scalar(jnp.float32(1), caller="doc")
    """
    found = jax.tree.map(jnp.shape, shape)
    if found != ():
        raise ValueError(
            f"{caller}: `loss` must return one number; got an output of shape {found}. "
            "Take the mean over the batch, and leave out auxiliary outputs."
        )


def check_finite(
    scores: Leaves, names: Iterable[str], *, caller: str, cure: str
) -> None:
    """Raises where a score is not finite; traced ones are not looked at.

    Args:
      scores: The scores.
      names: Names of their leaves.
      caller: The name that the error starts with.
      cure: What to do about it.

    Raises:
      ValueError: Where an infinity or a NaN is found.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.criteria import batches
      >>> batches.check_finite([jnp.ones(2)], ["w"], caller="doc", cure="")
    """
    for x, name in zip(scores, names, strict=True):
        if not isinstance(x, Tracer) and not bool(jnp.isfinite(x).all()):
            raise ValueError(
                f"{caller}: the scores of {name!r} hold numbers that are not finite; "
                f"a ranking needs finite ones. {cure}"
            )
