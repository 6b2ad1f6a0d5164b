"""Fisher pruning, the form for single weights (Theis et al., 2018)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax.checks import boundary
from sparse_optax.layers import PyTree, Where, check_real
from sparse_optax.masks.make import highest, ranking
from sparse_optax.patterns import Pattern
from sparse_optax.scoring import batches as over
from sparse_optax.scoring.curvature import quadratic_saliency
from sparse_optax.selection.leaf import wide as as_wide


@boundary("fisher_masks")
def fisher_masks(
    loss: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    density: Any,
    *,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
) -> PyTree:
    r"""One cut of weights by the Fisher matrix, where the paper cuts in turns.

    Keeps the weights whose removal would raise the loss most.

    With :math:`g_{nk}` the gradient of example n's loss, on a trained network, whose
    mean gradient is zero:

    .. math:: \Delta L_k \approx \tfrac{1}{2} w_k^2 F_{kk}, \quad
              F_{kk} = \frac{1}{N} \sum_n g_{nk}^2

    .. note:: Gradients per example take the memory of the scored weights times the
      batch size: give small batches. All examples have the same weight.

    Args:
      loss: ``loss(params, example)`` gives the loss of ONE example, a scalar; an
        example is a batch without its first axis.
      params: The trained parameters.
      batches: An iterable of batches: trees of arrays whose first axis counts examples.
      density: Fraction of weights to keep, in (0, 1], or a budget.
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
      >>> params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]])}
      >>> def loss(params, x):
      ...     return jnp.sum(x @ params["w"])
      >>> batch = jnp.array([[1.0, 0.1], [-1.0, 0.1]])  # the mean gradient is no guide
      >>> sparse_optax.fisher_masks(loss, params, [batch], 0.5)["w"].tolist()
      [[True, True], [False, False]]

    References:
      Theis et al., `Faster gaze prediction with dense networks and Fisher pruning
      <https://arxiv.org/abs/1801.05787>`_, 2018.

    Differences from the paper: single weights instead of feature maps; one cut instead
    of one map at a time with scores summed during fine-tuning; no cost term, but a
    budget in FLOPs (``budgets.num_flops``) takes the cost into account.
    """
    wanted = ranking(
        params,
        density,
        scope=scope,
        where=where,
        stacked=stacked,
        pattern=pattern,
    )
    check_real(wanted.layers.leaves, "its score")
    parts = over.split(params, wanted.layers.index)

    def squares(chosen, example):
        def of(chosen):
            value = loss(parts.rebuild(chosen), example)
            over.check_scalar(value)
            return value

        gradient = jax.grad(of)(chosen)
        return [jnp.square(g.astype(_wide(g))) for g in gradient]

    fisher = over.mean_over_examples(squares, parts.chosen, batches)
    over.check_finite(
        fisher,
        wanted.layers.names,
        cure="Check the loss and its gradient at `params`; a squared gradient must fit "
        "its float: scale the loss down.",
    )
    pairs = list(zip(fisher, parts.chosen, strict=True))
    return highest(wanted, pairs, quadratic_saliency)


def _wide(x: jax.Array) -> Any:
    # The square of a half precision number underflows early.
    return as_wide(x.dtype)
