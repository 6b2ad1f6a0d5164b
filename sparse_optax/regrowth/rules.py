"""The types of the algebra: the evidence that a rule sees, and what a rule is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax import masks
from sparse_optax.selection.tally import all_true, tally


class Evidence(NamedTuple):
    """All that a rule may look at. Each tuple has one entry a sparse leaf.

    A layer is a leaf, or one slice of a leaf that stacks layers. "Per layer" below
    means an int32 scalar a leaf, or shape (L,) for a leaf of L stacked layers.

    Attributes:
      params: The weights as they were handed in. Missing ones are zero after any
        update, but not where masks were replaced since: a rule looks at the masks.
        With ``hidden`` weights, those in the place of missing ones.
      masks: Boolean arrays, True where a weight is active. A growth rule sees the
        masks after the prune: what it may grow is where they are False.
      gradient: The dense gradient of this step, or None.
      momentum: The smoothed gradient, of missing weights too, or None.
      counts: Per layer, how many weights to prune or to grow. A prune rule may set
        its own numbers; a growth rule may place them in other layers, but the sum
        it must meet exactly.
      active: Per layer, how many weights are active before the prune.
      target: Per layer, how many should be active after the cycle; ``active`` but
        for a budget that moves.
      before: The masks before the prune.
      rate: The prune rate p, float32 scalar.
      key: A random key, new for each cycle.
      step: int32 scalar, the number of finished updates.
      names: The leaves' names, for keys of their own.
      axes: For each leaf the axis whose slices are layers, or None.
    """

    params: tuple[jax.Array, ...]
    masks: tuple[jax.Array, ...]
    gradient: tuple[jax.Array, ...] | None = None
    momentum: tuple[jax.Array, ...] | None = None
    counts: tuple[jax.Array, ...] | None = None
    active: tuple[jax.Array, ...] | None = None
    target: tuple[jax.Array, ...] | None = None
    before: tuple[jax.Array, ...] | None = None
    rate: jax.Array | None = None
    key: jax.Array | None = None
    step: jax.Array | int = 0
    names: tuple[str, ...] | None = None
    axes: tuple[int | None, ...] | None = None


class Rule(NamedTuple):
    """One rule: two functions, in a tuple.

    A tuple, not a bare function, because ``optax.inject_hyperparams`` takes every
    callable argument for a schedule.

    Attributes:
      init: ``init(params, masks) -> state``: tuples of arrays in, a pytree of
        arrays out, ``()`` where the rule remembers nothing. What has one array a
        leaf goes into a ``PerWeight``.
      apply: ``apply(evidence, state) -> (result, state)``. The result of a prune
        rule is a tuple of masks of the weights that stay; of a redistribution rule
        a vector of shares, one a layer, in proportion to which the removed weights
        come back (uint32, or float, which is quantised), or None, by which each
        layer gets back what it lost; of a growth rule a tuple of masks of the new
        weights.
      needs: Which of ``"momentum"`` and ``"gradient"`` the rule looks at. The engine
        collects what a rule needs and nothing else, and no cycle runs where that is
        not finite.
      after_prune: Whether a redistribution rule sees the masks after the prune.
      exact: Whether a prune rule removes, or a growth rule adds, exactly ``counts``
        weights of each layer. Then they are not counted again.
      pooled: Whether a prune rule ranks all layers as one pool, so that the layers'
        own counts follow from the weights.
      covers: Whether a prune rule that is not exact leaves no layer with more than its
        target, so that each can get back its own.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    needs: tuple[str, ...] = ()
    after_prune: bool = False
    exact: bool = False
    pooled: bool = False
    covers: bool = False


class PerWeight(NamedTuple):
    """A part of a rule's state that has one array a sparse leaf.

    The rule sees a tuple of arrays. In the optimizer state it is a tree like the
    parameters, as Optax expects of what has a parameter's shape.

    Attributes:
      values: The arrays.
    """

    values: Any


def map_weights(function: Callable[[Any], Any], states: Any) -> Any:
    """Applies a function to the values of every ``PerWeight`` in the rules' states.

    Args:
      function: ``function(values) -> values``.
      states: A pytree.

    Returns:
      The pytree with new values.

    Examples:
      >>> from sparse_optax.regrowth.rules import PerWeight, map_weights
      >>> map_weights(sum, ((), PerWeight((1, 2)), 3))
      ((), PerWeight(values=3), 3)
    """

    def is_part(node: Any) -> bool:
        return isinstance(node, PerWeight)

    return jax.tree.map(
        lambda x: PerWeight(function(x.values)) if is_part(x) else x,
        states,
        is_leaf=is_part,
    )


def stateless(
    function: Callable[[Evidence], Any],
    *,
    needs: tuple[str, ...] = (),
    after_prune: bool = False,
    exact: bool = False,
    pooled: bool = False,
) -> Rule:
    """Lifts a plain function of the evidence to a rule.

    Args:
      function: ``function(evidence) -> result``.
      needs: See ``Rule``.
      after_prune: See ``Rule``.
      exact: See ``Rule``.
      pooled: See ``Rule``.

    Returns:
      A rule without memory.

    Examples:
      >>> from sparse_optax import regrowth
      >>> rule = regrowth.stateless(lambda evidence: evidence.masks)
      >>> rule.init((), ())
      ()
    """
    return Rule(
        init=lambda params, masks: (),
        apply=lambda evidence, state: (function(evidence), state),
        needs=needs,
        after_prune=after_prune,
        exact=exact,
        pooled=pooled,
    )


def require(evidence: Evidence, field: str, *, rule: str) -> Any:
    """A field of the evidence, or an error that says what the rule needs.

    Args:
      evidence: The evidence.
      field: The name of the field.
      rule: The name of the rule that asks.

    Returns:
      The field.

    Raises:
      ValueError: If the field is None.

    Examples:
      >>> from sparse_optax import regrowth
      >>> evidence = regrowth.Evidence(params=(), masks=(), counts=())
      >>> regrowth.rules.require(evidence, "counts", rule="doc")
      ()
    """
    cure = {
        "momentum": 'Give it: Rule(..., needs=("momentum",)) in the engine.',
        "gradient": 'Give it: Rule(..., needs=("gradient",)) in the engine.',
        "counts": "Give a prune_rate.",
        "rate": "Give a prune_rate.",
        "key": "Give a random key.",
    }
    value = getattr(evidence, field)
    if value is None:
        raise ValueError(
            f"{rule} needs `{field}` in its evidence, and there is none. "
            f"{cure.get(field, 'Use another rule.')}"
        )
    return value


def random_bits(evidence: Evidence, rule: str) -> list[jax.Array]:
    """Uniform uint32 bits for every leaf, of a key of its own.

    Args:
      evidence: The evidence, with a key.
      rule: The name of the rule that asks.

    Returns:
      An array a leaf.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> evidence = regrowth.Evidence(
      ...     (jnp.ones(2),), (jnp.ones(2, bool),), key=jax.random.key(0))
      >>> regrowth.rules.random_bits(evidence, "doc")[0].dtype
      dtype('uint32')
    """
    key = require(evidence, "key", rule=rule)
    names = evidence.names or tuple(str(i) for i in range(len(evidence.masks)))
    return [
        masks.random_scores(key, name, mask)
        for name, mask in zip(names, evidence.masks, strict=True)
    ]


def axes_of(evidence: Evidence) -> tuple[int | None, ...]:
    """The stacked axis of each leaf; all None where the evidence has no axes.

    Args:
      evidence: The evidence.

    Returns:
      One entry a leaf.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> evidence = regrowth.Evidence((jnp.ones(2),), (jnp.ones(2, bool),))
      >>> regrowth.rules.axes_of(evidence)
      (None,)
    """
    return evidence.axes or (None,) * len(evidence.masks)


def layer_sizes(leaves: tuple[Any, ...], axes: tuple[int | None, ...]) -> np.ndarray:
    """Number of weights in each layer.

    Args:
      leaves: Arrays, concrete or abstract.
      axes: For each the stacked axis, or None.

    Returns:
      int64 vector, one entry a layer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> leaves = (jnp.zeros((2, 3)), jnp.zeros((2, 4, 5)))
      >>> regrowth.rules.layer_sizes(leaves, (None, 0)).tolist()
      [6, 20, 20]
    """
    sizes: list[int] = []
    for leaf, axis in zip(leaves, axes, strict=True):
        n = int(np.prod(leaf.shape, dtype=np.int64))
        layers = 1 if axis is None else leaf.shape[axis]
        sizes += [n // max(layers, 1)] * layers
    return np.asarray(sizes, np.int64)


def layer_counts(
    masks: tuple[jax.Array, ...], axes: tuple[int | None, ...]
) -> jax.Array:
    """Number of True entries in each layer.

    Args:
      masks: Boolean arrays.
      axes: For each the stacked axis, or None.

    Returns:
      int32 vector, one entry a layer.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> regrowth.rules.layer_counts((jnp.eye(3) > 0,), (None,)).tolist()
      [3]
    """
    if not masks:
        return jnp.zeros(0, jnp.int32)
    (counts,) = tally_layers([(mask,) for mask in masks], axes, all_true)
    return counts.astype(jnp.int32)


def tally_layers(
    leaves: Sequence[tuple[jax.Array, ...]],
    axes: tuple[int | None, ...],
    function: Callable[..., tuple[jax.Array, ...]],
    given: tuple[jax.Array, ...] = (),
) -> tuple[Any, ...]:
    """Whole-number statistics of each layer: `tally`, with layers along any axis.

    Args:
      leaves: For each leaf a tuple of arrays of one shape.
      axes: For each the stacked axis, or None.
      function: See `tally`.
      given: See `tally`.

    Returns:
      See `tally`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> def positive(x):
      ...     return (x > 0,)
      >>> leaves = [(jnp.array([[1.0, -2.0], [3.0, 4.0]]),)]
      >>> regrowth.rules.tally_layers(leaves, (1,), positive)[0].tolist()
      [2, 1]
    """
    front = [
        arrays if axis is None else tuple(jnp.moveaxis(x, axis, 0) for x in arrays)
        for arrays, axis in zip(leaves, axes, strict=True)
    ]
    split = [axis is not None for axis in axes]
    return tally(front, function, split=split, given=given)


def split_layers(
    vector: Any, leaves: tuple[Any, ...], axes: tuple[int | None, ...]
) -> tuple[Any, ...]:
    """Cuts a vector over layers into one entry a leaf.

    Args:
      vector: One entry a layer.
      leaves: Arrays, concrete or abstract.
      axes: For each the stacked axis, or None.

    Returns:
      For each leaf a scalar, or an array of shape (L,) where it stacks L layers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> leaves = (jnp.zeros((2, 3)), jnp.zeros((2, 4, 5)))
      >>> parts = regrowth.rules.split_layers(jnp.arange(3), leaves, (None, 0))
      >>> [p.tolist() for p in parts]
      [0, [1, 2]]
    """
    parts, start = [], 0
    for leaf, axis in zip(leaves, axes, strict=True):
        if axis is None:
            parts.append(vector[start])
            start += 1
        else:
            parts.append(vector[start : start + leaf.shape[axis]])
            start += leaf.shape[axis]
    return tuple(parts)


def layer_vector(parts: tuple[jax.Array, ...]) -> jax.Array:
    """Puts the per-layer entries of all leaves into one vector.

    Arithmetic on the vector is one operation to compile, instead of one a leaf.

    Args:
      parts: For each leaf a scalar, or an array of shape (L,).

    Returns:
      One entry a layer; what ``split_layers`` cuts up.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import regrowth
      >>> parts = (jnp.int32(4), jnp.array([2, 3]))
      >>> regrowth.rules.layer_vector(parts).tolist()
      [4, 2, 3]
    """
    flat = [jnp.reshape(part, -1) for part in parts]
    return jnp.concatenate(flat) if flat else jnp.zeros(0, jnp.int32)


def coin(step: jax.Array | int, gamma: float, power: float) -> jax.Array:
    r"""True with probability :math:`(1 + \gamma t)^{-power}`, by the step alone.

    Rules of one cycle, and runs of all seeds, see the same coin.

    Args:
      step: t, the number of finished updates.
      gamma: At least 0; 0 is always True.
      power: At least 0.

    Returns:
      bool scalar.

    Examples:
      >>> from sparse_optax import regrowth
      >>> sum(bool(regrowth.rules.coin(t, 0.1, 1.0)) for t in range(90, 110)) < 9
      True
    """
    if not gamma or not power:
        return jnp.ones([], bool)
    key = jax.random.fold_in(jax.random.key(0), step)
    chance = (1.0 + gamma * jnp.asarray(step, jnp.float32)) ** -power
    return jax.random.uniform(key) < chance
