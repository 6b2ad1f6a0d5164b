"""Class specialization of channels (Figure 3 of sparse momentum)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.scoring import batches as over


class Specialization(NamedTuple):
    """What ``channel_specialization`` returns, by layer.

    Attributes:
      shares: Of each channel's activity the share of each class. # shape=(c, classes)
      largest: The largest of them: 1 / classes if a channel is equally active for all
        classes, 1 if for one only. NaN for a channel that is never active. # shape=(c,)
    """

    shares: dict[str, np.ndarray]
    largest: dict[str, np.ndarray]

    def means(self) -> dict[str, float]:
        """Mean specialization of the active channels of each layer."""
        return {
            name: float(np.nanmean(values)) if np.isfinite(values).any() else np.nan
            for name, values in self.largest.items()
        }


@boundary("channel_specialization")
def channel_specialization(
    activations: Callable[[Any], dict[str, jax.Array]],
    batches: Iterable[tuple[Any, Any]],
    classes: int,
) -> Specialization:
    r"""Whether each channel serves one class or all of them.

    With the activity of a channel c for a class k, over all examples and all places of
    the map, and its share:

    .. math:: A_{ck} = \sum_{n: y_n = k} \sum_{ij} |a_{nijc}|, \quad
              s_{ck} = A_{ck} / \sum_l A_{cl}

    the specialization of the channel is the largest of its shares. Classes should have
    as many examples each.

    Args:
      activations: ``activations(inputs)`` gives the outputs of layers by name, shape
        (b, ..., c). It is compiled once for all batches of one shape.
      batches: An iterable of ``(inputs, labels)``; labels are integers below
        ``classes``, shape (b,).
      classes: Number of classes, at least 1.

    Returns:
      A ``Specialization``.

    Raises:
      ValueError: If no batch comes, a label is not below ``classes``, there are not as
        many labels as rows of activations, an activation is not finite, or an argument
        does not fit.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.analysis import channel_specialization
      >>> images = jnp.array([[1.0, 1.0], [3.0, -1.0]])  # two examples, two channels
      >>> batch = images, jnp.array([0, 1])
      >>> found = channel_specialization(lambda x: {"layer": x}, [batch], 2)
      >>> found.largest["layer"].tolist()
      [0.75, 0.5]

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019.
    """
    checks.whole("classes", classes, 1, cure="Give the number of classes.")
    if not checks.takes(activations, None):
        cure = "Pass lambda inputs: {'layer': ...}."
        checks.fail("activations", activations, "a function activations(inputs)", cure)
    over.check_batches(batches)

    @jax.jit
    def activity(inputs, labels):
        member = jax.nn.one_hot(labels, classes, dtype=jnp.float32)

        def of(values):
            places = tuple(range(1, values.ndim - 1))
            # A product, since it keeps complex numbers and counts True as 1.
            one = jnp.abs(values * jnp.float32(1)).astype(jnp.float32).sum(places)
            return jnp.einsum("bk,bc->ck", member, one)

        found = activations(inputs)
        _check_activations(found, len(labels))
        return {name: of(values) for name, values in found.items()}

    sums: dict[str, np.ndarray] = {}
    for batch in batches:
        over.check_pair(batch)
        inputs, labels = batch
        cure = "Give all classes with `classes`."
        labels = over.checked_labels(labels, classes, cure)
        found = activity(inputs, labels)
        cure = "Check the batches, and the network: its training may have diverged."
        over.check_finite(list(found.values()), found, cure, what="activations")
        for name, part in found.items():
            # Sums over many batches are beyond the digits of float32.
            sums[name] = sums.get(name, 0.0) + np.asarray(part, np.float64)
    if not sums:
        over.fail_empty()
    shares = {}
    for name, activity_of in sums.items():
        whole = activity_of.sum(1, keepdims=True)
        shares[name] = np.divide(
            activity_of, whole, out=np.full_like(activity_of, np.nan), where=whole > 0
        )
    return Specialization(shares, {name: s.max(1) for name, s in shares.items()})


def _check_activations(found: Any, examples: int) -> None:
    """Raises unless there are layers by name, with a row for each label."""
    if not isinstance(found, Mapping) or not found:
        raise ArgumentError(
            f"`activations` returned {found!r}; it must return a dict of arrays by the "
            "name of the layer, one or more. Return {'layer': values}."
        )
    for name, values in found.items():
        shape = jax.tree.map(jnp.shape, values)
        right = hasattr(values, "shape") and values.ndim > 1
        if not right or shape[0] != examples:
            raise ArgumentError(
                f"`activations` gave shape {shape} for {name!r} and `batches` "
                f"{examples} labels; it must be (b, ..., c) with b = {examples}, a row "
                "for each label. Correct the one or the other."
            )
