"""The gradient of a mixture prior, whose parts learn with the weights."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import (
    PyTree,
    Where,
    check_real,
    chosen_layers,
    is_hole,
    layers_of,
    leaf_names,
)
from sparse_optax.masks.optimizer_state import states_with
from sparse_optax.masks.tree import check_gradient, flatten, names_of
from sparse_optax.selection.leaf import plus
from sparse_optax.selection.leaf import wide as as_wide

# Two components are one where the divergence between them is less.
_SAME = 1e-10
# Shape and rate of the Gamma prior of the precisions: of the component at zero, and of
# the others (``empirical_priors.py`` of the authors).
_AT_ZERO, _OTHERS = (5e3, 2.0), (2.5e2, 0.1)


class Mixture(NamedTuple):
    """The parameters of a mixture of J normal distributions, the first at zero.

    Attributes:
      means: Of the others. # shape=(J - 1,), float32
      log_precisions: Of all. # shape=(J,), float32
      log_shares: Of the others, up to a constant. # shape=(J - 1,), float32
    """

    means: jax.Array
    log_precisions: jax.Array
    log_shares: jax.Array


class MixtureState(NamedTuple):
    """State of ``soft_weight_sharing``.

    Attributes:
      count: Finished updates. # shape=(), int32
      mixture: The prior, a ``Mixture``.
      mixture_moments: Adam's state for it.
      zero_share: The share of the component at zero. # shape=(), float32
      shared: A tree like the parameters: a scalar True for each leaf that has the
        prior, holes for the others.
    """

    count: jax.Array
    mixture: Mixture
    mixture_moments: Any
    zero_share: jax.Array
    shared: PyTree


def terms(mixture: Mixture, zero_share: Any) -> tuple[jax.Array, ...]:
    """Means, log precisions and log shares of all components, shape (J,)."""
    means = jnp.concatenate([jnp.zeros(1), mixture.means])
    others = jax.nn.log_softmax(mixture.log_shares) + jnp.log1p(-zero_share)
    first = jnp.reshape(jnp.log(zero_share), (1,))
    return means, mixture.log_precisions, jnp.concatenate([first, others])


def slopes(
    weights: jax.Array, mixture: Mixture, zero_share: Any
) -> tuple[jax.Array, Mixture]:
    """The gradients of -sum log p(w), by the weights of a leaf and by the mixture. One
    component after the other, so that no array is larger than the leaf.
    """
    parts = terms(mixture, zero_share)

    def log_part(part):
        mean, log_precision, log_share = part
        square = jnp.square(weights - mean)
        return log_share + 0.5 * (log_precision - jnp.exp(log_precision) * square)

    lowest = jnp.full_like(weights, -jnp.inf)
    whole, _ = lax.scan(
        lambda sums, part: (jnp.logaddexp(sums, log_part(part)), None), lowest, parts
    )

    def of_part(slope, part):
        mean, log_precision, _ = part
        precision = jnp.exp(log_precision)
        member = jnp.exp(log_part(part) - whole)  # the responsibility
        away = weights - mean
        push = member * precision * away
        sums = (
            -jnp.sum(push),
            -0.5 * (jnp.sum(member) - jnp.sum(push * away)),
            -jnp.sum(member),
        )
        return slope + push, sums

    slope, (by_mean, by_precision, by_share) = lax.scan(
        of_part, jnp.zeros_like(weights), parts
    )
    others = by_share[1:] - jax.nn.softmax(mixture.log_shares) * jnp.sum(by_share[1:])
    return slope, Mixture(by_mean[1:], by_precision, others)


def _prior_slope(log_precisions: jax.Array) -> jax.Array:
    """The gradient of the Gamma priors of the precisions, by their logarithms."""
    others = [_OTHERS] * (log_precisions.shape[0] - 1)
    shape, rate = jnp.asarray([_AT_ZERO, *others], log_precisions.dtype).T
    return (1 - shape) + rate * jnp.exp(log_precisions)


def mixture_prior(
    *,
    components: int,
    zero_share: float,
    spread: float,
    deviation: float,
    strength: optax.ScalarOrSchedule,
    examples: int,
    mean_rate: float,
    rate: float,
    where: Where | None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the prior; see ``methods.soft_weight_sharing``."""
    adam = optax.scale_by_adam()

    def init_fn(params):
        layers = layers_of(params, where)
        check_real(layers.leaves, "its prior")
        cure = "Give 0.003, as the tutorial has."
        checks.first_value("strength", strength, 0, cure=cure)
        others = components - 1
        mixture = Mixture(
            jnp.linspace(-spread, spread, others, dtype=jnp.float32),
            jnp.full(components, -2 * np.log(deviation), jnp.float32),
            jnp.zeros(others, jnp.float32),
        )
        return MixtureState(
            count=jnp.zeros([], jnp.int32),
            mixture=mixture,
            mixture_moments=adam.init(mixture),
            zero_share=jnp.asarray(zero_share, jnp.float32),
            shared=layers.rebuild(jnp.ones([], bool) for _ in layers.index),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.needs_params(params, "the prior is on the weights")
        checks.own_state(state, MixtureState)
        there, structure = flatten(state.shared)
        if names_of(structure) != leaf_names(params):
            raise ArgumentError(
                f"`params` has the leaves {leaf_names(params)}; init saw "
                f"{names_of(structure)}. Pass the tree that init was called with."
            )
        check_gradient(updates, params)
        layers = chosen_layers(params, [not is_hole(x) for x in there])
        mixture, share = Mixture(*state.mixture), state.zero_share
        size = strength(state.count) if callable(strength) else strength
        size = checks.scalar("strength", size) / examples

        flat, outer = jax.tree.flatten(updates, is_leaf=is_hole)
        total = Mixture(
            jnp.zeros_like(mixture.means),
            _prior_slope(mixture.log_precisions),
            jnp.zeros_like(mixture.log_shares),
        )
        for i, w in zip(layers.index, layers.pick(params), strict=True):
            slope, more = slopes(w.astype(as_wide(w.dtype)), mixture, share)
            flat[i] = plus(flat[i], size * slope)
            total = jax.tree.map(lambda a, b: (a + b).astype(a.dtype), total, more)
        total = jax.tree.map(lambda g: (size * g).astype(g.dtype), total)
        steps, moments = adam.update(total, state.mixture_moments)
        rates = (mean_rate, rate, rate)
        moves = zip(mixture, jax.tree.leaves(steps), rates, strict=True)
        moved = Mixture(*(x - r * u for x, u, r in moves))
        return jax.tree.unflatten(outer, flat), MixtureState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            mixture=moved,
            mixture_moments=moments,
            zero_share=share,
            shared=state.shared,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


# --- after training -------------------------------------------------------------------
def merged(
    means: np.ndarray, log_precisions: np.ndarray, log_shares: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The components with those joined that are the same; that nearest to zero is at
    zero. All in float64.
    """
    count = len(means)
    precisions = np.exp(log_precisions)
    joined = np.arange(count)
    for i in range(count):
        for j in range(count):
            far = (means[i] - means[j]) ** 2 + 1 / precisions[i]
            ratio = log_precisions[i] - log_precisions[j]
            if 0.5 * (ratio + precisions[j] * far - 1) < _SAME:
                joined[joined == joined[j]] = joined[i]
    shares = np.exp(log_shares)
    found = []
    for group in dict.fromkeys(joined):
        own = joined == group
        share = shares[own].sum()
        part = shares[own] / share
        found.append((part @ means[own], np.log(part @ precisions[own]), np.log(share)))
    new, logs, parts = (np.array(x) for x in zip(*found, strict=True))
    new[np.abs(new).argmin()] = 0
    return new, logs, parts


def _as_mixture(node: Any) -> Mixture:
    """A mixture, of which ``flax.nnx`` may have made a mapping of its names."""
    return Mixture(**node) if isinstance(node, Mapping) else Mixture(*node)


def _shared(weights: jax.Array, parts: Sequence[np.ndarray]) -> jax.Array:
    """Each weight as the mean of the component that is most responsible for it."""
    means, logs, shares = (jnp.asarray(x, weights.dtype) for x in parts)

    def step(best, part):
        mean, log_precision, log_share = part
        square = jnp.square(weights - mean)
        score = log_share + 0.5 * (log_precision - jnp.exp(log_precision) * square)
        better = score > best[0]
        return (jnp.where(better, score, best[0]), jnp.where(better, mean, best[1])), ()

    first = jnp.full_like(weights, -jnp.inf), jnp.zeros_like(weights)
    return lax.scan(step, first, (means, logs, shares))[0][1]


@boundary("share_weights")
def share_weights(params: PyTree, opt_state: PyTree) -> PyTree:
    r"""The weights after soft weight-sharing: each is the mean of its component.

    Components are merged whose divergence is below 1e-10. Each weight then takes the
    mean of the component k with the largest :math:`\pi_k N(w; \mu_k, 1 / \lambda_k)`;
    the component nearest to zero has the mean zero, so that its weights are pruned. How
    many are left is what the training has led to. For a given number, cut the weights
    by ``masks.magnitude_masks`` instead.

    Args:
      params: The trained parameters.
      opt_state: The optimizer state with ``soft_weight_sharing``, also chained.

    Returns:
      A tree like ``params`` whose leaves with the prior hold at most as many values as
      there are components.

    Raises:
      ValueError: Without a state of ``soft_weight_sharing``, within ``jax.jit``, or if
        ``params`` does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.soft_weight_sharing(
      ...     examples=100, components=4, deviation=0.1)
      >>> params = {"w": jnp.array([[0.01, 0.5], [-0.7, 0.02]])}
      >>> shared = sparse_optax.share_weights(params, tx.init(params))["w"]
      >>> [[round(float(w), 1) for w in row] for row in shared]
      [[0.0, 0.6], [-0.6, 0.0]]
    """
    found = list(states_with(opt_state, "mixture"))
    if not found:
        raise ArgumentError(
            f"`opt_state` holds no mixture; got {type(opt_state).__name__}, and it "
            "must come from an optimizer with soft_weight_sharing. Pass that state."
        )
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    names = leaf_names(params)
    for state in found:
        mixture = _as_mixture(state.mixture)
        if any(isinstance(x, Tracer) for x in mixture):
            raise ArgumentError(
                "`opt_state` is traced; components are merged by their numbers. Call "
                "it outside of jax.jit."
            )
        parts = terms(mixture, state.zero_share)
        parts = merged(*(np.asarray(x, np.float64) for x in parts))
        there, tree = flatten(state.shared)
        chosen = {
            name
            for name, x in zip(names_of(tree), there, strict=True)
            if not is_hole(x)
        }
        if missing := sorted(chosen - set(names)):
            raise ArgumentError(
                f"`params` lacks {missing}, which have the prior; its leaves are "
                f"{names}. Pass the parameters that the optimizer was made for."
            )
        for i, (name, w) in enumerate(zip(names, flat, strict=True)):
            if name in chosen:
                wide = w.astype(as_wide(w.dtype))
                flat[i] = _shared(wide, parts).astype(w.dtype)
    return jax.tree.unflatten(structure, flat)
