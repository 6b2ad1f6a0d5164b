"""The diagonal of the curvature of a loss, and the saliency that it gives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparse_optax.selection.leaf import wide as as_wide

Leaves = list[jax.Array]


def quadratic_saliency(curvature: jax.Array, weight: jax.Array) -> jax.Array:
    """Second-order change of the loss if a weight were removed: h w^2 / 2."""
    return 0.5 * curvature * jnp.square(weight)


def gauss_newton_diagonal(
    outputs: Callable[[Leaves], jax.Array],
    chosen: Leaves,
    criterion: Callable[[jax.Array, Any], jax.Array] | None = None,
    target: Any = None,
) -> Leaves:
    r"""The exact diagonal of the Gauss-Newton matrix of one example.

    With J the Jacobian of the outputs and H the Hessian of the criterion at them,

    .. math:: (J^T H J)_{kk} = \sum_c \lambda_c (J^T v_c)_k^2, \quad
              H = \sum_c \lambda_c v_c v_c^T

    It takes one backward pass per output, one after the other.
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

    zeros = [jnp.zeros(w.shape, as_wide(w.dtype)) for w in chosen]
    return lax.scan(add, zeros, factors)[0]


def _softmax_factors(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    p = jax.nn.softmax(z)
    return p, jnp.eye(z.size, dtype=z.dtype) - p[None, :]


def _factors(
    criterion: Callable[[jax.Array, Any], jax.Array], z: jax.Array, target: Any
) -> tuple[jax.Array, jax.Array]:
    sizes, columns = jnp.linalg.eigh(jax.hessian(criterion)(z, target))
    return sizes, columns.T
