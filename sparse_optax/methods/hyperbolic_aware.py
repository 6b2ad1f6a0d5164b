"""Hyperbolic aware minimization, HAM: an exponential step after any optimizer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparse_optax import mask_trees
from sparse_optax.leaves import (
    PyTree,
    Where,
    is_hole,
    layout,
    leaf_names,
    require_some,
    resolve_where,
)


class HamState(NamedTuple):
    """State of ``ham``.

    Attributes:
      count: Finished updates.  # shape=(), int32
      inner_state: State of the wrapped optimizer.
      ham_leaves: The parameters' structure: a scalar True for each leaf that takes the
        exponential step, holes for the others.
    """

    count: jax.Array
    inner_state: Any
    ham_leaves: PyTree


def ham(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    alpha: float = 200.0,
    beta: float = 1e-3,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Follows each step of an optimizer by one that is multiplicative in the weights.

    With the gradient g at the weights :math:`\theta` handed in and the inner update u,

    .. math::
        \theta \leftarrow (\theta + u) \,
        \exp\!\left(-\eta \, (\alpha \, \mathrm{sign}(\theta) \, g + \beta)\right)

    A weight whose gradient points to zero gets there faster, one that the gradient
    enlarges grows faster, and beta is a decay of all: a push towards sparsity that
    costs no extra gradient. At zero the sign is zero: the gradient has no part there.

    .. note::
      It wraps the optimizer, since it needs the gradient besides the update. Nothing
      may change the gradient in front of it that is meant for the inner optimizer only:
      weight decay belongs inside, ``ham(optax.chain(optax.add_decayed_weights(5e-4),
      optax.sgd(lr)), lr)``. Inside a sparse method,
      ``sparse_momentum_regrow(ham(...), ...)``, and around one,
      ``ham(sparse_momentum_regrow(...), lr)``, missing weights stay exactly zero. A
      step costs one pass over weights, gradients and updates and stores no array. The
      factor overflows where ``learning_rate * alpha * |g|`` passes 88 (float32): clip
      gradients before.

      Under ``optax.inject_hyperparams`` the three numbers may be injected; name
      ``where`` in ``static_args``.

    Args:
      inner: The optimizer.
      learning_rate: :math:`\eta`, that of the inner optimizer: a number or a schedule
        of the number of finished updates.
      alpha: Strength of the gradient's part, at least 0. About 200 on ImageNet.
      beta: Strength of the decay, at least 0. About 1e-3 on ImageNet.
      where: Which leaves take the step, see ``leaves.resolve_where``. By default
        kernels; biases and norms get the inner update unchanged.

    Returns:
      A transformation with a ``HamState``.

    Raises:
      ValueError: If an argument is out of its range or ``params`` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.ham(optax.sgd(0.1), 0.1, alpha=10.0, beta=0.0)
      >>> params = {"w": jnp.array([[1.0, -1.0, 0.0]])}
      >>> gradient = {"w": jnp.array([[0.1, 0.1, 0.1]])}
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> [round(float(w), 3) for w in params["w"][0]]
      [0.896, -1.116, -0.01]

    References:
      HAM: Hyperbolic Aware Minimization, 2026, `OpenReview XKB5Hu0ACY
      <https://openreview.net/forum?id=XKB5Hu0ACY>`_.

    Differences from the paper, known from a second source: the sign is taken where the
    gradient was, before the inner step; after it the sign differs only where the step
    crosses zero. Biases and norms are left out by default.
    """
    if not hasattr(inner, "update"):
        raise ValueError(
            f"ham: `inner` must be an optax.GradientTransformation; got {inner!r}. "
            "Pass optax.sgd(0.1), for instance."
        )
    for name, value in (("alpha", alpha), ("beta", beta)):
        if isinstance(value, (int, float)) and not value >= 0:
            raise ValueError(
                f"ham: `{name}` must be at least 0; got {value!r}. Use alpha=200 and "
                "beta=1e-3 as on ImageNet."
            )
    inner_tx = optax.with_extra_args_support(inner)

    def init_fn(params):
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        chosen = resolve_where(params, where, caller="ham")
        plan = layout(params, chosen, caller="ham")
        require_some(params, plan, caller="ham")
        touched = [jnp.ones([], bool) for _ in plan.index]
        return HamState(
            count=jnp.zeros([], jnp.int32),
            inner_state=inner_tx.init(params),
            ham_leaves=mask_trees.rebuild(structure, len(flat), plan.index, touched),
        )

    def update_fn(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "ham: `params` is None; the step is multiplicative in the weights. "
                "Call tx.update(grads, state, params)."
            )
        touched = jax.tree.leaves(state.ham_leaves, is_leaf=is_hole)
        weights = jax.tree.leaves(params, is_leaf=is_hole)
        gradient = jax.tree.leaves(updates, is_leaf=is_hole)
        if not len(touched) == len(weights) == len(gradient):
            raise ValueError(
                f"ham: init saw {len(touched)} leaves; `params` has {len(weights)} and "
                f"the gradient {len(gradient)} ({leaf_names(params)}). The structures "
                "must be equal: pass the tree that init was called with."
            )
        new_updates, inner_state = inner_tx.update(
            updates, state.inner_state, params, **extra_args
        )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        emitted, structure = jax.tree.flatten(new_updates, is_leaf=is_hole)
        for i, leaf in enumerate(touched):
            if not is_hole(leaf):
                emitted[i] = _step(
                    weights[i], gradient[i], emitted[i], rate, alpha, beta
                )
        return jax.tree.unflatten(structure, emitted), HamState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            inner_state=inner_state,
            ham_leaves=state.ham_leaves,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step(weight, gradient, update, rate, alpha, beta):
    """The update of one leaf, in the weight's dtype."""
    wide = jnp.promote_types(weight.dtype, jnp.float32)
    w, g, u = (x.astype(wide) for x in (weight, gradient, update))
    exponent = -rate * (alpha * jnp.sign(w) * g + beta)
    after = w + u
    # (w + u) exp(x) - w, without the cancellation where x is small.
    step = (u + after * jnp.expm1(exponent)).astype(weight.dtype)
    # A weight that the inner optimizer puts to zero gets there, whatever the factor.
    return jnp.where(after == 0, -weight, step)
