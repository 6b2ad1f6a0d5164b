"""SynFlow: iterative pruning before training, without data (Tanaka et al., 2020)."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import PyTree, Where, check_real
from sparse_optax.masks.make import ranking
from sparse_optax.patterns import Pattern
from sparse_optax.scoring import batches as over
from sparse_optax.scoring.rounds import in_rounds
from sparse_optax.selection.leaf import wide as as_wide


@boundary("synflow_masks")
def synflow_masks(
    forward: Callable[[PyTree, Any], Any],
    params: PyTree,
    inputs: Any,
    density: Any,
    *,
    rounds: int = 100,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
) -> PyTree:
    r"""Keeps the weights through which the most synaptic strength flows.

    Every parameter is replaced by its absolute value, and the input by ones:

    .. math:: R = \mathbf{1}^T f(\mathbf{1}; |m \odot w|), \quad
              s_j = \left| \frac{\partial R}{\partial |w_j|} \, |w_j| \right|

    In each round r = 1 ... n the :math:`\lfloor N d^{r/n} \rfloor` largest scores are
    kept, and the next scores are taken on the remaining network. Pruned weights never
    come back. One round can remove a whole layer. Many rounds cannot, if there are
    enough weights, since the flow concentrates in a layer that shrinks.

    .. note:: One backward pass and one selection per round; no data, no sort. Masked
      weights are set to zero, not multiplied. R is a sum over all paths and grows by
      about the square root of the fan-in in each layer. Above 3e38, after some fifty
      wide layers, it overflows float32, which is an error. Scores are not rescaled
      layer by layer: with biases, norms or shortcuts that would change the ranking.
      Within ``jax.jit`` nothing is checked.

    Args:
      forward: ``forward(params, inputs)`` gives the outputs, an array or a tree of
        them. Norm layers must use fixed statistics, dropout must be off.
      params: The parameters at initialisation; 16-bit floats are computed in float32.
      inputs: Shape of the input with its batch axis, such as ``(1, 784)``, or a tree of
        arrays or ``jax.ShapeDtypeStruct``, of which only shapes and dtypes are used.
      density: d, the fraction of weights to keep, in (0, 1], or a budget.
      rounds: n, at least 1; 100 in the paper.
      scope: ``"global"``, as in the paper, or ``"leaf"``, which brings each layer to
        its own count by the same rule.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      pattern: See ``masks.score_masks``.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit, R is 0 or a score is not finite.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"u": jnp.array([[1.0, -2.0]]), "v": jnp.array([[3.0], [1.0]])}
      >>> def forward(params, x):
      ...     return x @ params["u"] @ params["v"]
      >>> masks = sparse_optax.synflow_masks(forward, params, (1, 1), 0.5, rounds=2)
      >>> masks["u"].tolist(), masks["v"].tolist()
      ([[True, False]], [[True], [False]])

    References:
      Tanaka et al, `Pruning neural networks without any data by iteratively conserving
      synaptic flow <https://arxiv.org/abs/2006.05467>`_, 2020.

    Source: ``Pruners/pruners.py`` of the authors' Synaptic-Flow, where all parameters
    and running statistics join the flow by their absolute value, as biases and norm
    scales do here. Differences from it: statistics that ``forward`` holds stay as they
    are.
    """
    checks.whole("rounds", rounds, 1, static=True, cure="Use 100, as in the paper.")
    wanted = ranking(
        params,
        density,
        scope=scope,
        where=where,
        stacked=stacked,
        pattern=pattern,
    )
    check_real(wanted.layers.leaves, "its score")
    ones = over.ones(inputs)
    parts = over.split(jax.tree.map(_strength, params), wanted.layers.index)

    def flow(strengths):
        outputs = forward(parts.rebuild(strengths), ones)
        return sum(jnp.sum(x) for x in jax.tree.leaves(outputs))

    @jax.jit
    def score(strengths, kept):
        strengths = [jnp.where(m, w, 0) for m, w in zip(kept, strengths, strict=True)]
        total, gradient = jax.value_and_grad(flow)(strengths)
        return total, [jnp.abs(g * w) for g, w in zip(gradient, strengths, strict=True)]

    def checked(kept, r):
        total, scores = score(parts.chosen, kept)
        _check_flow(total, r)
        over.check_finite(scores, wanted.layers.names, cure=_CURE)
        return scores

    return in_rounds(wanted, parts.chosen, checked, rounds)


_CURE = (
    "Use float64: call it within `with jax.enable_x64(True):` on parameters cast to "
    "float64, or scale the parameters."
)


def _strength(x: Any) -> Any:
    """|x| in float32 or wider; integers as they are."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jnp.abs(x.astype(as_wide(x.dtype)))


def _check_flow(total: jax.Array, r: int) -> None:
    if isinstance(total, Tracer):
        return
    if not math.isfinite(total) or (r == 1 and float(total) == 0):
        raise ArgumentError(
            f"in round {r} the flow R is {float(total):g}; it must be "
            f"finite and, at first, above zero, within its dtype {total.dtype}. {_CURE}"
        )
