"""SNIP: pruning before training by connection sensitivity (Lee et al., 2019)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax.checks import boundary
from sparse_optax.gsm.gate import saliency
from sparse_optax.layers import PyTree, Where, check_real
from sparse_optax.masks.make import highest, ranking
from sparse_optax.patterns import Pattern
from sparse_optax.scoring import batches as over


@boundary("snip_masks")
def snip_masks(
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
    r"""Keeps the weights whose removal would change the loss most, before training.

    With gates c on the weights, :math:`L(c \odot w)`, and the mean gradient g,

    .. math:: s_j = \left| \frac{\partial L}{\partial c_j} \right|_{c = 1} = |w_j g_j|,
              \quad m_j = [s_j \text{ among the } \lfloor d N \rfloor \text{ largest}]

    The paper divides the scores by their sum, which does not change the ranking. Train
    with ``static_sparse(inner, masks=...)``.

    .. note:: One gradient per batch and one selection, without a sort. A NaN score is
      an error; within ``jax.jit`` it ranks first.

    Args:
      loss: ``loss(params, batch)`` gives the mean loss of a batch, a scalar.
      params: The parameters at initialisation.
      batches: An iterable of batches, each weighted by its examples, the length of its
        first array; the paper has one.
      density: d, the fraction of weights to keep, in (0, 1], or a budget.
      scope: ``"global"``, as in the paper, or ``"leaf"`` to rank each layer alone.
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
      >>> params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"]) ** 2)
      >>> batch = jnp.array([[1.0, 0.0]])
      >>> sparse_optax.snip_masks(loss, params, [batch], 0.25)["w"].tolist()
      [[False, True], [False, False]]

    References:
      Lee et al, `SNIP <https://arxiv.org/abs/1810.02340>`_, 2019.

    Differences from the released code: it also scores and prunes biases, rounds the
    count to nearest, and trains from a second initialisation drawn after scoring. Here
    biases stay dense and the caller decides what to train (``sparsify(new_params,
    masks)`` for another initialisation).
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

    def gradient(chosen, batch):
        def of(chosen):
            value = loss(parts.rebuild(chosen), batch)
            over.check_scalar(value)
            return value

        # Weighted by its examples; in float32, since float16 ends at 65,504.
        examples = jnp.float32(over.length(batch) or 1)
        return [g * examples for g in jax.grad(of)(chosen)]

    # The sum gives the same ranking as the mean.
    sums, _ = over.total(gradient, parts.chosen, batches)
    over.check_finite(
        sums,
        wanted.layers.names,
        cure="Check the loss and the gradient at `params`.",
    )
    pairs = list(zip(sums, parts.chosen, strict=True))
    return highest(wanted, pairs, saliency)
