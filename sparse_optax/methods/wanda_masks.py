"""Wanda: weights times the norm of their inputs (Sun et al., 2023)."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sparse_optax import selection
from sparse_optax.checks import boundary
from sparse_optax.layers import PyTree, Where
from sparse_optax.patterns import GroupsNM, Pattern
from sparse_optax.scoring.layerwise import Keep, layers_and_counts, prune_in_order


@boundary("wanda_masks")
def wanda_masks(
    forward: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    density: Any = None,
    *,
    where: Where | None = None,
    pattern: Pattern | None = None,
) -> PyTree:
    r"""Keeps of each output the weights of largest size times the norm of their input.

    With :math:`X_i` the values of input i over all examples and places, and
    :math:`W_{ij}` the weight from input i to output j, of a trained network:

    .. math:: S_{ij} = |W_{ij}| \cdot \| X_i \|_2

    The weights of one output are compared with each other only. No weight is changed
    and no gradient taken. The layers are pruned in the order of their use, each with
    the inputs that the network pruned so far gives it.

    .. note:: Cost: for each layer the forward passes up to it over all batches, and
      the compilation of one; memory of one activation at a time.

    Args:
      forward: ``forward(params, batch)``, the network; its result is not used. It is
        traced, and the inputs of its layers are read, see ``layer_inputs``.
      params: The trained parameters.
      batches: Calibration batches, an iterable of what ``forward`` takes. The authors
        use 128 texts of 2,048 tokens.
      density: Fraction of weights to keep in each layer, in (0, 1], or a budget; None
        with N:M. If the number of a layer is no multiple of its outputs, some outputs
        keep one more: those whose next weight has the largest score.
      where: Which leaves take part, see ``eligible``: by default kernels. They must be
        kernels of dense layers. The authors leave the output layer dense.
      pattern: None, or ``patterns.n_m(n, m)``: the largest n scores of each m inputs.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit, no batch comes, an input is not finite,
        or a leaf is no kernel of a dense layer.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"w": jnp.array([[3.0, 1.0], [2.0, 2.0]])}
      >>> def forward(params, x):
      ...     return x @ params["w"]
      >>> batch = jnp.array([[1.0, 2.0], [1.0, -2.0]])  # the second input is larger
      >>> sparse_optax.wanda_masks(forward, params, [batch], 0.5)["w"].tolist()
      [[False, False], [True, True]]

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models
      <https://arxiv.org/abs/2306.11695>`_, 2023, and ``lib/prune.py`` of the authors'
      repository locuslab/wanda.

    Differences from the paper: the number of weights of a layer is exact. The authors
    read the inputs of all layers of a transformer block before they prune the first of
    them; here each layer sees what the layers before it have become.
    """
    layers, keeps = layers_and_counts(params, density, where, pattern)

    def prune(weights, squares, keep):
        scores = jnp.abs(weights) * jnp.sqrt(squares)[:, None]
        mask = _best(scores, keep)
        return mask, jnp.where(mask, weights, 0)

    return prune_in_order(
        forward, params, layers, keeps, batches, _squares, prune
    ).masks


def _squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x), axis=0)


def _best(scores: jax.Array, keep: Keep) -> jax.Array:
    """The largest scores of each column, as many in each column but for one."""
    if isinstance(keep, GroupsNM):
        rows = scores.T.reshape(-1, keep.m)
        best = selection.top_of_rows([rows], keep.n)
        return best.reshape(scores.shape[::-1]).T
    each, more = divmod(keep, scores.shape[1])
    rank = jnp.argsort(jnp.argsort(-scores, axis=0, stable=True), axis=0)
    last = jnp.max(jnp.where(rank == each, scores, -1), axis=0)
    (wins,) = selection.top_k_mask([last], more)
    return (rank < each) | ((rank == each) & wins[None, :])
