"""The curvature of a loss: its diagonal, and what removing one weight costs by it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Leaves = list[jax.Array]


def quadratic_saliency(curvature: jax.Array, weight: jax.Array) -> jax.Array:
    """Loss change if a weight were removed, to second order: h w^2 / 2.

    Args:
      curvature: h, the diagonal of the curvature.
      weight: w, of the same shape.

    Returns:
      An array of that shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.criteria.curvature import quadratic_saliency
      >>> quadratic_saliency(jnp.array([3.0]), jnp.array([-2.0])).tolist()
      [6.0]
    """
    return 0.5 * curvature * jnp.square(weight)


def gauss_newton_diagonal(
    outputs: Callable[[Leaves], jax.Array],
    chosen: Leaves,
    criterion: Callable[[jax.Array, Any], jax.Array] | None = None,
    target: Any = None,
) -> Leaves:
    r"""The exact diagonal of the Gauss-Newton matrix of one example.

    With J the Jacobian of the outputs and H the Hessian of the criterion at them,

    .. math::
        (J^T H J)_{kk} = \sum_c \lambda_c (J^T v_c)_k^2, \quad
        H = \sum_c \lambda_c v_c v_c^T

    .. note::
      One backward pass for each output, one after the other.

    Args:
      outputs: ``outputs(chosen)`` gives the network's outputs, shape (C,).
      chosen: The leaves that are differentiated.
      criterion: ``criterion(z, target)`` gives the loss; None is softmax cross-entropy
        on logits, whose factors need no target: with probabilities p, lambda_c = p_c
        and v_c = e_c - p.
      target: What the criterion compares with.

    Returns:
      A float32 (or wider) array a leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.criteria import curvature
      >>> x = jnp.array([2.0, 0.5])
      >>> def outputs(chosen):
      ...     return x * chosen[0]
      >>> def criterion(z, _):  # its Hessian is [[2, 1], [1, 2]]
      ...     return z[0] ** 2 + z[0] * z[1] + z[1] ** 2
      >>> (h,) = curvature.gauss_newton_diagonal(outputs, [jnp.ones(2)], criterion)
      >>> [round(float(v), 4) for v in h]
      [8.0, 0.5]
    """
    z, pull = jax.vjp(outputs, chosen)
    factors = (
        _softmax_factors(z) if criterion is None else _factors(criterion, z, target)
    )

    def add(sums, factor):
        size, vector = factor
        (gradient,) = pull(vector)
        pairs = zip(sums, gradient, strict=True)
        return [s + size * jnp.square(g.astype(s.dtype)) for s, g in pairs], None

    zeros = [
        jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)) for w in chosen
    ]
    return lax.scan(add, zeros, factors)[0]


def _softmax_factors(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    p = jax.nn.softmax(z)
    return p, jnp.eye(z.size, dtype=z.dtype) - p[None, :]


def _factors(
    criterion: Callable[[jax.Array, Any], jax.Array], z: jax.Array, target: Any
) -> tuple[jax.Array, jax.Array]:
    sizes, columns = jnp.linalg.eigh(jax.hessian(criterion)(z, target))
    return sizes, columns.T
