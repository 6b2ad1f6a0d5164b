"""What pruning a layer costs: measured layer by layer, and predicted from one run."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import checks
from sparse_optax.analysis.ranks import RankCorrelation, rank_correlation
from sparse_optax.budgets import count
from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.layers import Layers, PyTree, Where, check_values, is_hole, layers_of
from sparse_optax.masks.tree import whole_count
from sparse_optax.scoring import batches as over
from sparse_optax.selection import top_k_mask


class Sensitivity(NamedTuple):
    """What ``layer_sensitivity`` returns.

    Attributes:
      names: Names of the layers.
      densities: The densities, from the largest to the smallest.
      dense: The metric of the network as it is.
      values: The metric with one layer pruned. # shape=(layers, densities)
    """

    names: tuple[str, ...]
    densities: tuple[float, ...]
    dense: float
    values: np.ndarray

    def damage(self) -> np.ndarray:
        """How much the metric rises, mean over the densities. # shape=(layers,)"""
        return (self.values - self.dense).mean(1)

    @boundary("agreement")
    def agreement(self, predicted: dict[str, float]) -> RankCorrelation:
        """Rank correlation of the damage with a prediction by layer.

        Args:
          predicted: A number for each layer, such as ``surviving_densities`` gives.

        Raises:
          ValueError: If a layer has no finite number, the metric was not finite, or
            there is only one layer.
        """
        cure = "Pass what surviving_densities gives."
        if not isinstance(predicted, Mapping):
            checks.fail("predicted", predicted, "a dict of numbers by layer", cure)
        missing = [name for name in self.names if name not in predicted]
        if missing:
            raise ArgumentError(
                f"`predicted` has no number for {missing}; it must have one "
                "for each layer. Give those too."
            )
        for name in self.names:
            checks.number(f"predicted[{name!r}]", predicted[name], cure=cure)
        damage = self.damage()
        if len(damage) < 2 or not np.isfinite(damage).all():
            raise ArgumentError(
                f"the damage of {list(self.names)} is {damage.tolist()}; to compare "
                "ranks there must be two finite numbers or more. Measure more layers, "
                "at densities where the metric is finite: give others as `densities`."
            )
        return unnamed(rank_correlation)([predicted[n] for n in self.names], damage)


@boundary("layer_sensitivity")
def layer_sensitivity(
    metric: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    batches: Iterable[Any],
    densities: Sequence[float] = (0.5, 0.2, 0.1, 0.05, 0.02),
    *,
    where: Where | None = None,
) -> Sensitivity:
    """Prunes each layer alone, by magnitude, and measures the metric.

    One function is compiled, whatever the number of layers and densities: which weights
    are kept is data.

    Args:
      metric: ``metric(params, batch)``: a mean over the batch, such as a loss or an
        error, a scalar. Batches of one size weigh alike.
      params: The trained parameters.
      batches: An iterable of held-out batches, at least one. They are kept in memory.
      densities: Shares of a layer that are kept, each in (0, 1].
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.

    Returns:
      A ``Sensitivity``.

    Raises:
      ValueError: If an argument does not fit, no batch comes, a weight is not finite,
        or the metric is no scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.analysis import layer_sensitivity
      >>> kernel = jnp.array([[1.0, 2.0], [1.0, 2.0]])
      >>> params = {"a": {"kernel": kernel}, "b": {"kernel": 4 * kernel}}
      >>> def metric(params, batch):
      ...     return batch - params["a"]["kernel"].sum() - params["b"]["kernel"].sum()
      >>> found = layer_sensitivity(metric, params, [jnp.float32(40.0)], [0.5])
      >>> found.dense, found.damage().tolist()
      (10.0, [2.0, 8.0])
    """
    if not checks.takes(metric, params, None):
        cure = "Pass a loss or an error."
        checks.fail("metric", metric, "a function metric(params, batch)", cure)
    allowed = "a sequence of numbers in (0, 1]"
    checks.iterable("densities", densities, allowed, "Pass [0.5], for instance.")
    given = list(densities)
    if not given:
        raise ArgumentError("`densities` is empty; give at least one.")
    for share in given:
        cure = "A density is the fraction of weights to keep: give 0.05 to keep 5%."
        checks.not_traced("densities", share)
        checks.number("densities", share, 0, 1, ends="(]", cure=cure)
    shares = sorted(set(map(float, given)), reverse=True)
    over.check_batches(batches)
    held = list(batches)
    if not held:
        over.fail_empty()
    layers = layers_of(params, where)
    weights = _finite_weights(layers, params)

    @jax.jit
    def kept(w, k):
        (mask,) = unnamed(top_k_mask)([jnp.abs(w)], k)
        return mask

    @jax.jit
    def evaluate(params, masks, batch):
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        for place, mask in masks.items():
            flat[place] = jnp.where(mask, flat[place], 0)
        value = metric(jax.tree.unflatten(structure, flat), batch)
        over.check_scalar(value, "metric")
        return value

    everything = {
        place: jnp.ones(w.shape, bool)
        for place, w in zip(layers.index, weights, strict=True)
    }

    def mean(masks):
        return float(np.mean([float(evaluate(params, masks, b)) for b in held]))

    values = [
        [
            mean({**everything, place: kept(w, max(1, count(share, w.size)))})
            for share in shares
        ]
        for place, w in zip(layers.index, weights, strict=True)
    ]
    return Sensitivity(
        layers.names, tuple(shares), mean(everything), np.asarray(values, np.float64)
    )


@boundary("surviving_densities")
def surviving_densities(
    params: PyTree, *, where: Where | None = None, alive_above: float = 1e-4
) -> dict[str, float]:
    """The share of each layer that is alive: one sparse run's view of its layers.

    After a run that ranks the weights of the whole network in one pool, such as GSM or
    the cut that follows, layers keep more of their weights the more the loss needs
    them. So one run predicts what ``layer_sensitivity`` measures layer by layer, and
    proposes a density for each layer: give the result as ``overrides`` of a budget.

    Args:
      params: Parameters at the end of such a run.
      where: Which leaves take part, see ``eligible``.
      alive_above: Weights of larger magnitude count as alive, 0 or above.

    Returns:
      The share of each layer in [0, 1], by name; 1 for a layer without weights.

    Raises:
      ValueError: If an argument does not fit, or a weight is not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.analysis import surviving_densities
      >>> params = {"a": {"kernel": jnp.eye(2)}, "b": {"kernel": jnp.ones((2, 2))}}
      >>> surviving_densities(params)
      {'a/kernel': 0.5, 'b/kernel': 1.0}

    References:
      Ding et al., `Global Sparse Momentum SGD for Pruning Very Deep Neural Networks
      <https://arxiv.org/abs/1909.12778>`_, 2019, who compare the two in a figure.
    """
    checks.number("alive_above", alive_above, 0, cure="Leave it out for 1e-4.")
    layers = layers_of(params, where)
    return {
        name: whole_count(jnp.abs(w) > alive_above) / w.size if w.size else 1.0
        for name, w in zip(layers.names, _finite_weights(layers, params), strict=True)
    }


def _finite_weights(layers: Layers, params: PyTree) -> tuple[Any, ...]:
    """The leaves that take part; NaN would be the largest weight, or a pruned one."""
    weights = layers.pick(params)
    check_values(layers.names, weights)
    cure = "Check `params`: the training may have diverged."
    over.check_finite(list(weights), layers.names, cure, what="weights")
    return weights
