"""Whether the criteria that rank weights agree on a trained network."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import checks
from sparse_optax.analysis.ranks import correlation, mean_ranks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import PyTree, Where, check_real, check_values, layers_of
from sparse_optax.scoring import batches as over
from sparse_optax.scoring.curvature import gauss_newton_diagonal, quadratic_saliency
from sparse_optax.selection.leaf import wide as as_wide

CRITERIA = ("magnitude", "taylor", "fisher", "optimal_brain_damage")


class Saliencies(NamedTuple):
    """What ``compare_saliencies`` returns.

    Attributes:
      names: The criteria, in the order of rows and columns.
      ranks: Spearman's correlation of each pair. # shape=(4, 4)
      scores: The saliencies by criterion, all weights end to end. # shape=(weights,)
    """

    names: tuple[str, ...]
    ranks: np.ndarray
    scores: dict[str, np.ndarray]


@boundary("compare_saliencies")
def compare_saliencies(
    forward: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batches: Iterable[tuple[Any, Any]],
    *,
    where: Where | None = None,
) -> Saliencies:
    r"""Ranks the weights of a trained network by four criteria and compares the ranks.

    With :math:`g_n` the gradient of one example's cross-entropy and :math:`H_n` its
    Gauss-Newton matrix:

    - magnitude: :math:`|w_k|`
    - taylor, the gate of GSM, squared: :math:`E[T_k^2] = w_k^2 E[g_{nk}^2]`
    - fisher: :math:`w_k^2 E[g_{nk}^2] / 2`
    - optimal_brain_damage: :math:`w_k^2 E[(H_n)_{kk}] / 2`

    For single examples the second and the third are one but for a factor, whatever the
    network: GSM's criterion in the mean is Fisher pruning. With labels drawn from the
    network's own outputs the fourth is the same again in expectation; with true labels
    it differs as far as the network is not calibrated. So taylor is measured on the
    mean gradient of each batch, as GSM has it, and what is compared is what batches do:

    .. math:: T_k^2 = w_k^2 \left(\tfrac{1}{B} \sum_{n \in batch} g_{nk}\right)^2

    averaged over the batches.

    Args:
      forward: ``forward(params, inputs)`` gives the logits of a batch, shape (n, C),
        each example's from its own inputs alone.
      params: The trained parameters.
      batches: An iterable of ``(inputs, labels)`` whose first axis counts examples;
        labels are integers below C. Gradients per example take the memory of the
        weights times the batch size.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.

    Returns:
      A ``Saliencies``.

    Raises:
      ValueError: If an argument does not fit, no batch comes, a label is no class, or a
        score is not finite.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from sparse_optax.analysis import compare_saliencies
      >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
      >>> inputs = jax.random.normal(jax.random.key(1), (8, 4))
      >>> found = compare_saliencies(
      ...     lambda params, x: x @ params["w"], params, [(inputs, jnp.arange(8) % 3)]
      ... )
      >>> found.ranks.shape, float(found.ranks[1, 1])
      ((4, 4), 1.0)

    References:
      Ding et al., 2019 (GSM); Theis et al., 2018 (Fisher pruning); LeCun, Denker and
      Solla, 1989 (optimal brain damage).
    """
    if not checks.takes(forward, params, None):
        cure = "Pass a function that gives logits."
        checks.fail("forward", forward, "a function forward(params, inputs)", cure)
    layers = layers_of(params, where)
    check_real(layers.leaves, "its saliency")
    check_values(layers.names, layers.pick(params))
    over.check_batches(batches)
    parts, held = over.split(params, layers.index), list(batches)
    if not held:
        over.fail_empty()

    def logits(chosen, example):
        one = jax.tree.map(lambda x: x[None], example[0])
        z = forward(parts.rebuild(chosen), one)
        shape = jax.tree.map(jnp.shape, z)
        if not hasattr(z, "shape") or z.ndim != 2 or z.shape[0] != 1:
            raise ArgumentError(
                f"`forward` gave an output of shape {shape} for one example; it "
                "must be (1, C), a row for each example. Pass such a function."
            )
        return z[0].astype(as_wide(z.dtype))

    def loss(chosen, example):
        z = logits(chosen, example)
        return jax.nn.logsumexp(z) - z[example[1]]

    def squares(chosen, example):
        return [jnp.square(g) for g in jax.grad(loss)(chosen, example)]

    def curvature(chosen, example):
        return gauss_newton_diagonal(lambda w: logits(w, example), chosen)

    def of_batch(chosen, batch):
        gradient = jax.grad(
            lambda w: jax.vmap(lambda example: loss(w, example))(batch).mean()
        )
        return [jnp.square(g) for g in gradient(chosen)]

    def outputs(chosen, batch):
        return jax.vmap(lambda example: logits(chosen, example))(batch)

    for batch in held:
        over.check_pair(batch)
        over.check_examples(batch)
    classes = jax.eval_shape(outputs, parts.chosen, held[0]).shape[-1]
    for _, labels in held:
        cure = "Give those of the logits, from 0."
        over.checked_labels(labels, classes, cure)
    means = {
        "fisher": over.mean_over_examples(squares, parts.chosen, held),
        "optimal_brain_damage": over.mean_over_examples(curvature, parts.chosen, held),
    }
    sums, lengths = over.total(of_batch, parts.chosen, held)
    means["taylor"] = [s / len(lengths) for s in sums]
    scores = {"magnitude": [jnp.abs(w) for w in parts.chosen]}
    for name, found in means.items():
        over.check_finite(found, layers.names, cure="Check the logits at `params`.")
        scores[name] = [
            quadratic_saliency(h, w) for h, w in zip(found, parts.chosen, strict=True)
        ]
    scores["taylor"] = [2 * s for s in scores["taylor"]]
    flat = {
        name: np.concatenate([np.asarray(s, np.float64).ravel() for s in scores[name]])
        for name in CRITERIA
    }
    ranked = [mean_ranks(flat[name]) for name in CRITERIA]
    ranks = np.array([[correlation(a, b) for b in ranked] for a in ranked])
    return Saliencies(CRITERIA, ranks, flat)
