"""SparseGPT: prunes input by input, corrects later ones (Frantar & Alistarh, 2023)."""

from collections.abc import Callable, Iterable
from typing import Any

from sparse_optax import checks
from sparse_optax.checks import boundary
from sparse_optax.layers import PyTree, Where
from sparse_optax.patterns import Pattern
from sparse_optax.scoring.layerwise import layers_and_counts, prune_in_order
from sparse_optax.scoring.sweep import second_moments, sweep


@boundary("sparse_gpt")
def sparse_gpt(
    forward: Callable[[PyTree, Any], Any],
    params: PyTree,
    batches: Iterable[Any],
    density: Any = None,
    *,
    damping: float = 0.01,
    block: int = 128,
    where: Where | None = None,
    pattern: Pattern | None = None,
) -> tuple[PyTree, PyTree]:
    r"""Prunes a trained network in one go, and corrects the weights that stay.

    With X the inputs of a layer and :math:`w_i` the weights from input i to the
    outputs, a row of its kernel, the inputs are visited in their order. At input i,
    :math:`F = \{i, i + 1, \ldots\}` are those that may still change:

    .. math:: H = X^T X + \lambda \operatorname{mean}(\operatorname{diag} X^T X) I,
              \quad
              e_i = \frac{w_i \odot (1 - m_i)}{[H_F^{-1}]_{ii}}, \quad
              W_F \leftarrow W_F - [H_F^{-1}]_{:, i} \, e_i

    so that the pruned weights of input i become zero and later inputs make up for them.
    At the first of each ``block`` inputs their masks m are chosen: the weights with the
    largest :math:`w_{ij}^2 / [H_F^{-1}]_{ii}` stay, over all outputs together. With
    N:M, n of each m inputs are chosen in the same way, as soon as they come.

    Layers are pruned in the order of their use, each with the inputs that the network
    pruned so far gives it.

    .. note:: Cost: for each layer the forward passes up to it over all batches, one
      Cholesky factor of inputs by inputs, and inputs squared times outputs products;
      memory of three such matrices. Computed in float32, or float64 for float64
      kernels.

    Args:
      forward: ``forward(params, batch)``, the network; its result is not used. It is
        traced, and the inputs of its layers are read, see ``layer_inputs``.
      params: The trained parameters.
      batches: Calibration batches, an iterable of what ``forward`` takes. The authors
        use 128 texts of 2,048 tokens. Together they should have more places than a
        layer has inputs.
      density: Fraction of weights to keep in each layer, in (0, 1], or a budget; None
        with N:M.
      damping: :math:`\lambda`, a share of the mean squared input, at least 0.
      block: Inputs whose masks are chosen together, at least 1. With N:M it only
        decides how the corrections are summed, rounded to a multiple of m.
      where: Which leaves take part, see ``eligible``: by default kernels. They must be
        kernels of dense layers. The authors leave the output layer dense.
      pattern: None, or ``patterns.n_m(n, m)``.

    Returns:
      ``(masks, new params)``: a mask tree, and the parameters with corrected kernels,
      exactly zero where pruned.

    Raises:
      ValueError: If an argument does not fit, no batch comes, an input is not finite,
        H is not positive definite, or a leaf is no kernel of a dense layer.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"w": jnp.array([[0.1], [1.0]])}
      >>> def forward(params, x):
      ...     return x @ params["w"]
      >>> batch = jnp.array([[1.0, 1.0], [2.0, 2.1]])  # nearly the same input twice
      >>> masks, new = sparse_optax.sparse_gpt(
      ...     forward, params, [batch], 0.5, damping=1e-6)
      >>> masks["w"].tolist(), [round(float(w), 2) for w in new["w"][:, 0]]
      ([[False], [True]], [0.0, 1.1])

    References:
      Frantar and Alistarh, `SparseGPT: Massive Language Models Can Be Accurately Pruned
      in One-Shot <https://arxiv.org/abs/2301.00774>`_, 2023, and ``sparsegpt.py`` of
      the authors' repository IST-DASLab/sparsegpt.

    Differences from the paper: the number of weights of a layer is exact; a block has
    its part of it. The factor of the inverse comes from one factor of H in reverse
    order, without the inverse. The authors read the inputs of all layers of a
    transformer block before they prune the first of them. Weights of an input that is
    always zero rank last, and those that are kept all the same stay as they are; the
    authors set them to zero.
    """
    checks.number("damping", damping, 0, cure="Use 0.01, as the paper does.")
    checks.whole("block", block, 1, static=True, cure="Use 128, as the paper does.")
    layers, keeps = layers_and_counts(params, density, where, pattern)

    def prune(weights, second, keep):
        return sweep(weights, second, keep, damping=damping, block=block)

    masks, new = prune_in_order(
        forward, params, layers, keeps, batches, second_moments, prune
    )
    return masks, new
