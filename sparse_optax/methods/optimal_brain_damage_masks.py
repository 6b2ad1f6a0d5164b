"""Optimal Brain Damage: pruning by the diagonal of the curvature (LeCun, 1989)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import PyTree, Where, check_real
from sparse_optax.masks.make import highest, ranking
from sparse_optax.patterns import Pattern
from sparse_optax.scoring import batches as over
from sparse_optax.scoring.curvature import gauss_newton_diagonal, quadratic_saliency
from sparse_optax.selection.leaf import wide as as_wide


@boundary("optimal_brain_damage_masks")
def optimal_brain_damage_masks(
    forward: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batches: Iterable[tuple[Any, Any]],
    density: Any,
    *,
    criterion: Callable[[jax.Array, Any], jax.Array] | None = None,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
) -> PyTree:
    r"""One cut by saliency :math:`h_{kk} w_k^2 / 2`, where the paper cuts in turns.

    :math:`h_{kk}` is the exact diagonal of the Gauss-Newton matrix, with J the Jacobian
    of one example's outputs z and H the Hessian of the criterion with respect to them:

    .. math::
        h_{kk} = \frac{1}{N} \sum_n (J_n^T H_n J_n)_{kk}
               = \frac{1}{N} \sum_n \sum_c \lambda_{nc} (J_n^T v_{nc})_k^2, \quad
        H_n = \sum_c \lambda_{nc} v_{nc} v_{nc}^T

    For softmax cross-entropy with probabilities p, :math:`\lambda_c = p_c` and
    :math:`v_c = e_c - p`; for others they are the eigenvalues and eigenvectors of H.

    One call is one deletion on a trained network. For the paper's loop of deletion and
    retraining, train with ``static_sparse(inner, masks=...)`` and call again with a
    smaller density. Deleted weights are zero and have saliency zero, so they stay
    deleted as long as every other saliency is positive.

    .. note:: As many backward passes as the network has outputs, per example: this
      takes the memory of the scored weights times the batch size, so give small
      batches. On an Explicit mesh outputs must not be sharded along C.

    Args:
      forward: ``forward(params, inputs)`` gives the outputs of a batch, shape (n, C);
        each example's must depend on its own inputs alone (no batch statistics).
      params: The trained parameters.
      batches: An iterable of ``(inputs, targets)`` whose first axis counts examples.
      density: Fraction of weights to keep, in (0, 1], or a budget.
      criterion: ``criterion(outputs, target)`` gives the loss of ONE example. It should
        be convex in the outputs, else a saliency may be negative. None is softmax
        cross-entropy on logits, whose Hessian needs no target.
      scope: ``"global"`` for one pool, or ``"leaf"`` to rank each layer alone.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      pattern: See ``masks.score_masks``.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit, no batch comes, or a score is not finite.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"w": jnp.array([[1.0, -1.0], [1.0, 1.0]])}
      >>> def forward(params, x):
      ...     return x @ params["w"]
      >>> batch = jnp.array([[2.0, 0.5]]), jnp.array([0])
      >>> masks = sparse_optax.optimal_brain_damage_masks(forward, params, [batch], 0.5)
      >>> masks["w"].tolist()
      [[True, True], [False, False]]

    References:
      LeCun, Denker and Solla, `Optimal Brain Damage
      <https://papers.nips.cc/paper/250-optimal-brain-damage>`_, 1989.

    Differences from the paper: the diagonal is that of the whole Gauss-Newton matrix.
    The paper propagates a diagonal back layer by layer and drops the terms between
    units. Weights that share a parameter (convolutions) are summed within the square.
    """
    wanted = ranking(
        params,
        density,
        scope=scope,
        where=where,
        stacked=stacked,
        pattern=pattern,
    )
    check_real(wanted.layers.leaves, "its saliency")
    parts = over.split(params, wanted.layers.index)

    def diagonal(chosen, example):
        if not isinstance(example, (tuple, list)) or len(example) != 2:
            raise ArgumentError(
                f"each of `batches` must be (inputs, targets); got "
                f"{type(example).__name__}. Pass [(inputs, targets)]."
            )
        inputs, target = example

        def outputs(chosen):
            one = jax.tree.map(lambda x: x[None], inputs)
            z = forward(parts.rebuild(chosen), one)
            if jnp.ndim(z) != 2 or z.shape[0] != 1:
                raise ArgumentError(
                    f"`forward` gave an output of shape {jnp.shape(z)} for "
                    "one example; it must be (1, C), a row for each example. Pass "
                    "a function that flattens other outputs."
                )
            return z[0].astype(as_wide(z.dtype))

        return gauss_newton_diagonal(outputs, chosen, criterion, target)

    curvature = over.mean_over_examples(diagonal, parts.chosen, batches)
    over.check_finite(
        curvature,
        wanted.layers.names,
        cure="Check the outputs and their derivatives at `params`.",
    )
    pairs = list(zip(curvature, parts.chosen, strict=True))
    return highest(wanted, pairs, quadratic_saliency)
