"""Gradients and other statistics of some leaves, summed over batches."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparse_optax import checks
from sparse_optax.checks import ArgumentError
from sparse_optax.layers import PyTree, is_hole
from sparse_optax.selection.leaf import wide as as_wide

Leaves = list[jax.Array]


class Split(NamedTuple):
    """A tree of parameters, split into scored and other leaves."""

    chosen: Leaves  # the leaves that are differentiated
    rebuild: Callable[[Leaves], PyTree]  # the whole tree from such leaves


def split(params: PyTree, index: Iterable[int]) -> Split:
    """Takes the scored leaves out of a tree, since not all leaves have gradients."""
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
) -> tuple[Leaves, list[Any]]:
    """Sums a statistic over batches, compiled once for all batches of one shape."""
    check_batches(batches)
    compiled = jax.jit(lambda w, batch: _widened(statistic(w, batch)))
    sums, lengths = None, []
    for batch in batches:
        lengths.append(length(batch))
        if lengths[-1] == 0:
            raise ArgumentError(
                "`batches` holds a batch without examples; each must have "
                "at least one. Leave the empty one out."
            )
        part = compiled(chosen, batch)
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
    if sums is None:
        fail_empty()
    return sums, lengths


def check_batches(batches: Any) -> None:
    """Raises if what should hold batches is one batch."""
    # A tuple of arrays would be one batch of inputs and targets.
    arrays = isinstance(batches, tuple) and all(hasattr(x, "shape") for x in batches)
    if hasattr(batches, "shape") or isinstance(batches, dict) or (batches and arrays):
        raise ArgumentError(
            f"`batches` must be an iterable of batches; got one "
            f"{type(batches).__name__} of arrays. Pass [batch]."
        )
    checks.iterable("batches", batches, "an iterable of batches", "Pass [batch].")


def fail_empty() -> NoReturn:
    """Raises because no batch came."""
    raise ArgumentError(
        "`batches` is empty; it must hold at least one batch. Pass "
        "[batch], and a list where an iterator may be used up."
    )


def length(batch: Any) -> int | None:
    """Number of examples of a batch: the length of its first array."""
    arrays = [x for x in jax.tree.leaves(batch) if jnp.ndim(x)]
    return arrays[0].shape[0] if arrays else None


def mean_over_examples(
    statistic: Callable[[Leaves, Any], Leaves],
    chosen: Leaves,
    batches: Iterable[Any],
) -> Leaves:
    """Mean of a statistic of one example over all examples."""

    def summed(chosen, batch):
        check_examples(batch)
        each = jax.vmap(lambda example: _widened(statistic(chosen, example)))(batch)
        return [jnp.sum(x, axis=0) for x in each]

    sums, lengths = total(summed, chosen, batches)
    return [x / sum(lengths) for x in sums]


def _widened(values: Leaves) -> Leaves:
    return [x.astype(as_wide(x.dtype)) for x in values]


def check_examples(batch: Any) -> None:
    """Raises unless the first axis of all arrays of a batch counts its examples."""
    found = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    lengths = {shape[:1] for shape in found}
    if len(lengths) != 1 or lengths == {()}:
        raise ArgumentError(
            f"a batch holds arrays of shapes {found}; their first axis "
            "must count the same examples. Give each example one entry in each."
        )


def check_pair(batch: Any) -> None:
    """Raises unless a batch has inputs and labels."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ArgumentError(
            f"`batches` holds a {type(batch).__name__}{size}; each batch must be a "
            "pair (inputs, labels). Pass [(inputs, labels)]."
        )


def checked_labels(labels: Any, classes: int, cure: str) -> np.ndarray:
    """The labels of a batch on the host; raises unless each is the number of a class.
    JAX would take those outside of the classes for others, or for none.
    """
    found = np.asarray(labels)
    if found.ndim != 1:
        raise ArgumentError(
            f"`batches` holds labels of shape {found.shape}; they must be (b,), one "
            "number for each example. Pass labels.argmax(-1) for rows of one-hot."
        )
    if found.size and not jnp.issubdtype(found.dtype, jnp.integer):
        raise ArgumentError(
            f"`batches` holds labels of dtype {found.dtype}; they must be integers. "
            "Pass labels.astype(int)."
        )
    if found.size and not (0 <= found.min() and found.max() < classes):
        raise ArgumentError(
            f"`batches` holds labels from {int(found.min())} to {int(found.max())}; "
            f"they must be from 0 to {classes - 1}. {cure}"
        )
    return found


def ones(inputs: Any) -> Any:
    """A batch of ones."""
    if isinstance(inputs, tuple) and all(isinstance(n, int) for n in inputs):
        return jnp.ones(inputs)
    flat = jax.tree.leaves(inputs)
    if not flat or not all(hasattr(x, "shape") and hasattr(x, "dtype") for x in flat):
        raise ArgumentError(
            f"`inputs` must be a shape, a tuple of whole numbers, or a tree "
            f"of arrays or jax.ShapeDtypeStruct; got {inputs!r}. Pass (1, 784), for "
            "instance."
        )
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), inputs)


def check_scalar(value: Any, argument: str = "loss") -> None:
    """Raises if what a function gave, such as a loss, is no real number."""
    found = jax.tree.map(jnp.shape, value)
    if found == () and not jnp.iscomplexobj(value):
        return
    what = "a complex one" if found == () else f"an output of shape {found}"
    raise ArgumentError(
        f"`{argument}` must return one number; got {what}. Take the mean of real "
        "numbers over the batch, and leave out auxiliary outputs."
    )


def check_finite(
    scores: Leaves, names: Iterable[str], cure: str, what: str = "scores"
) -> None:
    """Raises if a score is not finite; traced scores are not checked."""
    for x, name in zip(scores, names, strict=True):
        if not isinstance(x, Tracer) and not bool(jnp.isfinite(x).all()):
            raise ArgumentError(
                f"the {what} of {name!r} hold numbers that are not finite; "
                f"all must be finite. {cure}"
            )
