"""SNIP: pruning before training by connection sensitivity (Lee et al., 2019)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax import scored_masks
from sparse_optax.criteria import batches as over
from sparse_optax.gating import saliency
from sparse_optax.leaves import PyTree, Where
from sparse_optax.patterns import Pattern


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

    With gates c on the weights, :math:`L(c \odot w)`, and g the gradient of the loss,
    the mean over all examples,

    .. math::
        s_j = \left| \frac{\partial L}{\partial c_j} \right|_{c = 1} = |w_j g_j|, \quad
        m_j = [\, s_j \text{ among the } \lfloor d N \rfloor \text{ largest} \,]

    The paper divides the scores by their sum, which changes no ranking. Train the masks
    with ``static_sparse(inner, masks=...)``.

    .. note::
      One gradient for each batch and one selection; no sort. Within ``jax.jit`` a score
      that is NaN ranks first, outside it is an error.

    Args:
      loss: ``loss(params, batch)`` gives the mean loss of a batch, a scalar.
      params: The parameters at initialisation.
      batches: An iterable of batches, each counted by its examples, the length of
        its first array; the paper takes one.
      density: d, the fraction of weights to keep, in (0, 1], or a budget.
      scope: ``"global"``, as in the paper, or ``"leaf"`` to rank each layer alone.
      where: Which leaves take part, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves that stack several layers.
      pattern: Which weights stand and fall together, see ``masks.score_masks``.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit, there is no batch, or a score is not
        finite.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"]) ** 2)
      >>> batch = jnp.array([[1.0, 0.0]])
      >>> sparse_optax.snip_masks(loss, params, [batch], 0.25)["w"].tolist()
      [[False, True], [False, False]]

    References:
      Lee et al., `SNIP: Single-shot Network Pruning based on Connection Sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019.

    Differences from the released code: it scores and prunes biases too, rounds the
    number kept to nearest, and trains from a second initialisation, drawn after
    scoring; here biases stay dense and the caller decides what to train
    (``sparsify(new_params, masks)`` for another initialisation).
    """
    caller = "snip_masks"
    wanted = scored_masks.ranking(
        params,
        density,
        scope=scope,
        where=where,
        stacked=stacked,
        pattern=pattern,
        caller=caller,
    )
    parts = over.split(params, wanted.plan.index)

    def gradient(chosen, batch):
        def of(chosen):
            value = loss(parts.rebuild(chosen), batch)
            over.check_scalar(value, caller=caller)
            return value

        # A batch counts by its examples; widened first, for float16 ends at 65,504.
        examples = jnp.float32(over.length(batch) or 1)
        return [g * examples for g in jax.grad(of)(chosen)]

    # The sum ranks as the mean does.
    sums, _ = over.total(gradient, parts.chosen, batches, caller=caller)
    over.check_finite(
        sums,
        wanted.plan.names,
        caller=caller,
        cure="Check the loss and the gradient at `params`.",
    )
    pairs = list(zip(sums, parts.chosen, strict=True))
    return scored_masks.highest(wanted, pairs, saliency)
