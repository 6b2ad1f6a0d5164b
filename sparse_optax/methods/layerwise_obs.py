"""Layer-wise Optimal Brain Surgeon: prunes one layer, adjusts the rest (Dong, 2017)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from sparse_optax import checks
from sparse_optax.budgets.resolve import unit_counts
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import layers_of
from sparse_optax.masks.make import Ranking, highest
from sparse_optax.patterns import Pattern, pattern_of
from sparse_optax.selection.leaf import wide as as_wide


@boundary("layerwise_obs")
def layerwise_obs(
    kernel: jax.Array,
    inputs: jax.Array,
    keep: int | None = None,
    *,
    damping: float,
    pattern: Pattern | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Prunes a dense layer once with least change of its outputs; adjusts the others.

    The paper retrains after each cut.

    With X the n inputs of the layer and w one column of its kernel (one output unit),

    .. math:: H = \tfrac{1}{n} X^T X + \text{damping} \cdot I, \quad
              L_q = \frac{w_q^2}{2 [H^{-1}]_{qq}}

    all weights of the layer are ranked by :math:`L_q` at once, and the smallest are
    pruned. The kept weights S of each column, with P the pruned ones, are set to

    .. math:: \arg\min_{v : v_q = 0,\; q \notin S} \tfrac{1}{2} (v - w)^T H (v - w),
              \quad \text{i.e.} \quad
              v_S = w_S + H_{SS}^{-1} H_{SP} w_P

    This is the joint solution. For one pruned weight in a column it is the paper's
    update :math:`-(w_q / [H^{-1}]_{qq}) H^{-1} e_q`. For several, the sum of such
    updates, each made for a full column, moves pruned weights away from zero and is not
    the minimum; applying them one by one with a new :math:`H^{-1}` each time gives the
    joint solution at a higher cost. The ranking, as in the paper, is made once.

    .. note:: Cost: one inverse and, one output unit after the other, one Cholesky
      factor of a matrix of inputs by inputs; memory of a few such matrices. Computed in
      float32, or float64 for a float64 kernel. The bias is left as it is. Prune the
      layers one by one, each with its inputs in the dense network, as in the paper, or
      in the network pruned so far, where each layer corrects those before it.

    Args:
      kernel: Weights, shape (in, out).
      inputs: Inputs of the layer, shape (n, in), or with more axes before the last.
      keep: Number of weights kept in the layer, from 0 to in * out; left out with N:M.
      damping: Added to the diagonal of H, at least 0, in units of squared inputs. It
        must be above 0 if inputs are dependent or constant zero; 1e-4 times the mean
        square of the inputs is a start.
      pattern: See ``patterns``. Units are ranked by the sum of their :math:`L_q`; as
        many are kept as fit into ``keep``.

    Returns:
      ``(mask, new kernel)``: boolean, True where kept, and the adjusted kernel in its
      own dtype, exactly zero where pruned.

    Raises:
      ValueError: If an argument does not fit, or H is not positive definite.

    Examples:
      >>> import jax, jax.numpy as jnp, sparse_optax
      >>> kernel = jnp.array([[1.0], [0.1]])
      >>> x = jnp.array([[1.0, 1.0], [2.0, 2.1]])  # nearly the same input twice
      >>> mask, new = sparse_optax.layerwise_obs(kernel, x, 1, damping=1e-6)
      >>> mask.tolist(), [round(float(w), 2) for w in new[:, 0]]
      ([[True], [False]], [1.1, 0.0])

      The kernel of a convolution, with patches for inputs. They list channels first,
      then height and width, and so must the kernel:

      >>> kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
      >>> images = jax.random.normal(jax.random.key(1), (5, 8, 8, 2))
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> patches = jax.lax.conv_general_dilated_patches(
      ...     images, (3, 3), (1, 1), "SAME", dimension_numbers=layout)
      >>> flat = kernel.transpose(2, 0, 1, 3).reshape(18, 4)
      >>> mask, flat = sparse_optax.layerwise_obs(flat, patches, 20, damping=1e-4)
      >>> new_kernel = flat.reshape(2, 3, 3, 4).transpose(1, 2, 0, 3)
      >>> int((new_kernel != 0).sum())
      20

    References:
      Dong et al, `Learning to Prune Deep Neural Networks via Layer-wise Optimal Brain
      Surgeon <https://arxiv.org/abs/1705.07565>`_, 2017.

    Differences from the paper: the kept weights are set to the joint minimum, see
    above. H is summed and inverted at once; the paper updates its inverse input by
    input. The number of weights is given; the paper prunes up to an error.
    """
    if jnp.ndim(kernel) != 2 or not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ArgumentError(
            f"`kernel` must be floating, of shape (in, out); got "
            f"{jnp.asarray(kernel).dtype} of shape {jnp.shape(kernel)}. Reshape the "
            "kernel of a convolution and give patches, see the example."
        )
    if jnp.ndim(inputs) < 2 or inputs.shape[-1] != kernel.shape[0]:
        raise ArgumentError(
            f"`inputs` must have shape (n, {kernel.shape[0]}), for a kernel "
            f"of shape {kernel.shape}; got {jnp.shape(inputs)}. Pass what the layer "
            "multiplies by its kernel."
        )
    cure = "Use 1e-4 times the mean square of the inputs."
    checks.number("damping", damping, 0, cure=cure)
    layers = layers_of({"kernel": kernel}, None, None, pattern_of(pattern))
    fixed = layers.pattern.density
    if fixed is None:
        cure = "Give the number to keep, such as budgets.count(0.05, kernel.size)."
        checks.whole("keep", keep, 0, kernel.size, cure=cure)
    elif keep not in (None, wanted := int(sum(unit_counts([0], layers)[0]))):
        cure = f"Leave it out: {layers.pattern.name} says it."
        checks.fail("keep", keep, f"{wanted} or None", cure)
    mask, new = _prune(kernel, inputs, keep, damping, layers)
    if not isinstance(new, Tracer) and not bool(jnp.isfinite(new).all()):
        raise ArgumentError(
            f"with `damping`={damping!r} H is not positive definite to the "
            "precision of its dtype, or an argument is not finite. Raise `damping`."
        )
    return mask, new


@functools.partial(jax.jit, static_argnames="layers")
def _prune(kernel, inputs, keep, damping, layers):
    dtype = as_wide(kernel.dtype)
    weights = kernel.astype(dtype)
    x = inputs.astype(dtype).reshape(-1, kernel.shape[0])
    identity = jnp.eye(kernel.shape[0], dtype=dtype)
    # Reduced precision of matrix units would be amplified by the inverse.
    second = jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST) / x.shape[0]
    hessian = second + damping * identity
    factor = jax.scipy.linalg.cho_factor(hessian)
    spread = jnp.diagonal(jax.scipy.linalg.cho_solve(factor, identity))
    loss = jnp.square(weights) / (2 * spread[:, None])
    # A pattern N:M fixes the count; units are kept whole.
    limit = unit_counts([0], layers)
    if layers.pattern.density is None:
        limit = [keep // size for size in layers.unit_sizes]
    mask = highest(Ranking(layers, (loss,), limit), [(loss,)])["kernel"]

    def mend(column):
        stays, w = column
        gone = jnp.where(stays, 0, w)
        inside = jnp.logical_and(stays[:, None], stays[None, :])
        system = jnp.where(inside, hessian, identity)
        force = jnp.matmul(hessian, gone, precision=lax.Precision.HIGHEST)
        factor = jax.scipy.linalg.cho_factor(system)
        change = jax.scipy.linalg.cho_solve(factor, jnp.where(stays, force, 0))
        return jnp.where(stays, w + change, 0)

    new = lax.map(mend, (mask.T, weights.T)).T
    # Checked here: zeros in pruned entries would hide a NaN.
    broken = jnp.logical_not(jnp.isfinite(spread).all())
    return mask, jnp.where(broken, jnp.nan, new).astype(kernel.dtype)
