"""The types of the rules: ``Evidence``, what a rule sees, and ``Rule``."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparse_optax.checks import ArgumentError
from sparse_optax.layers import layer_sizes, split_layers
from sparse_optax.masks.make import hashed_scores, random_scores, top_of_layers
from sparse_optax.selection.tally import all_true, tally

_CURES = {
    "momentum": 'Give it: Rule(..., needs=("momentum",)) in the engine.',
    "gradient": 'Give it: Rule(..., needs=("gradient",)) in the engine.',
    "counts": "Give a prune_rate.",
    "rate": "Give a prune_rate.",
    "key": "Give a random key.",
}


class Evidence(NamedTuple):
    """What a rule may read. Each tuple has one entry per sparse leaf.

    A layer is a leaf, or one slice of a leaf that stacks layers. "Per layer" means an
    int32 vector with one entry per layer, in the order of the leaves.

    Attributes:
      params: The weights as handed in; with ``hidden`` also the hidden values. Missing
        weights are zero, except just after masks were replaced: read the masks.
      masks: Boolean arrays, True where a weight is active. A growth rule sees the masks
        after the prune and may grow where they are False.
      gradient: The dense gradient of this step, or None.
      momentum: The smoothed gradient, of missing weights too, or None.
      counts: Per layer, how many weights to prune or to grow. A prune rule may set its
        own counts. A growth rule may place them in other layers, but must meet the sum.
      active: Per layer, how many weights are active before the prune.
      target: Per layer, active weights after the cycle; ``active`` without a ramp.
      before: The masks before the prune.
      rate: The prune rate p, float32 scalar.
      key: A random key, new for each cycle.
      step: int32 scalar, the number of finished updates.
      names: The leaves' names, for their random keys; None numbers the leaves.
      axes: For each leaf the axis whose slices are layers, or None.
      within: Boolean arrays, True where a weight may be active; None for all. For a
        growth rule ``masks`` is True where it may not.
    """

    params: tuple[jax.Array, ...]
    masks: tuple[jax.Array, ...]
    gradient: tuple[jax.Array, ...] | None = None
    momentum: tuple[jax.Array, ...] | None = None
    counts: Any = None
    active: Any = None
    target: Any = None
    before: tuple[jax.Array, ...] | None = None
    rate: Any = None
    key: jax.Array | None = None
    step: jax.Array | int = 0
    names: tuple[str, ...] | None = None
    axes: tuple[int | None, ...] | None = None
    within: tuple[jax.Array, ...] | None = None

    @property
    def layer_axes(self) -> tuple[int | None, ...]:
        """For each leaf the axis whose slices are layers, or None."""
        return self.axes or (None,) * len(self.masks)

    @property
    def sizes(self) -> np.ndarray:
        """Number of weights in each layer, int64."""
        return layer_sizes([m.shape for m in self.masks], self.layer_axes)

    @property
    def places(self) -> jax.Array:
        """Number of weights of each layer that may be active, an int32 vector."""
        if self.within is None:
            return jnp.asarray(self.sizes.astype(np.int32))
        return self.count(self.within)

    def need(self, field: str, rule: str) -> Any:
        """A field of the evidence; an error names the rule that needs it."""
        value = getattr(self, field)
        if value is None:
            raise ArgumentError(
                f"{rule} needs `{field}` in its evidence, and there is none. "
                f"{_CURES.get(field, 'Use another rule.')}"
            )
        return value

    def split(self, vector: jax.Array) -> tuple[jax.Array, ...]:
        """A vector over layers as one entry per leaf, (L,) if it stacks L layers."""
        return split_layers(vector, [m.shape for m in self.masks], self.layer_axes)

    def select(
        self,
        arrays: Iterable[tuple[jax.Array, ...]],
        counts: jax.Array,
        score: Callable[..., jax.Array] | None = None,
    ) -> tuple[jax.Array, ...]:
        """Masks of the highest scores, ``counts`` in each layer. ``arrays`` holds for
        each leaf the arguments of ``score``, a module-level, element-wise function;
        None ranks the only argument. Ties go to the lower index.
        """
        if not isinstance(counts, jax.Array):
            counts = self.split(counts)
        return tuple(top_of_layers(list(arrays), counts, self.layer_axes, score))

    def count(self, masks: Sequence[jax.Array]) -> jax.Array:
        """Number of True entries in each layer, an int32 vector."""
        return layer_counts(masks, self.layer_axes)

    def random_bits(self, rule: str) -> list[jax.Array]:
        """Uniform uint32 bits for every leaf, from its own key."""
        key = self.need("key", rule)
        names = self.names or tuple(str(i) for i in range(len(self.masks)))
        return random_scores(key, names, self.masks)

    def taken(self, masks: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """Masks in which weights that may not be active look so: no rule grows them."""
        if self.within is None:
            return masks
        pairs = zip(masks, self.within, strict=True)
        return tuple(jnp.logical_or(m, jnp.logical_not(may)) for m, may in pairs)

    def hashed_bits(self, rule: str) -> list[jax.Array]:
        """Uniform uint32 bits that cost less, for rules of every update."""
        key = self.need("key", rule)
        names = self.names or tuple(str(i) for i in range(len(self.masks)))
        return hashed_scores(key, names, self.masks)


class Rule(NamedTuple):
    """One rule: two functions, in a tuple.

    A tuple, since ``optax.inject_hyperparams`` takes every callable for a schedule.

    Attributes:
      init: ``init(params, masks) -> state``: tuples of arrays in, a pytree of arrays
        out, ``()`` for a rule without memory. Use ``PerWeight`` for one array per leaf.
      apply: ``apply(evidence, state) -> (result, state)``. A prune rule returns a tuple
        of masks of the weights that stay, a growth rule one of the new weights. A
        redistribution rule returns a vector of shares, one per layer (uint32, or float,
        which is quantised), or None: each layer grows what it lost.
      needs: Which of ``"momentum"`` and ``"gradient"`` the rule reads. The engine
        collects nothing else, and runs no cycle if they are not finite.
      after_prune: Whether a redistribution rule sees the masks after the prune.
      exact: Whether a prune or growth rule moves exactly ``counts`` weights of each
        layer. Then they are not counted again.
      pooled: Whether a prune rule ranks all layers as one pool, so that the counts of
        layers follow from the weights.
      covers: Whether a prune rule that is not exact leaves no layer with more than its
        target, so that each layer can grow back its own count. Where a rule without it
        leaves more than all targets together, the smallest go, layer by layer.
      open_ended: Whether a growth rule may grow another number than ``sum(counts)``, so
        that no total is kept. If it is neither this nor ``exact``, a cycle whose growth
        misses the sum is skipped.
      by_share: Whether a prune rule that is not exact takes the prune rate's fraction
        of each layer. Under N:M it then sees whole layers, not groups.
      at_once: Of a prune rule, ``at_once(prune, grow, axes, moving) -> Rule``: a
        ``whole`` rule that stands for it and ``grow.magnitude`` together, where weights
        are hidden and nothing is redistributed; or None.
      whole: Whether a prune rule returns the masks after the cycle, with
        ``sum(target)`` weights. The other rules are then not asked.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    needs: tuple[str, ...] = ()
    after_prune: bool = False
    exact: bool = False
    pooled: bool = False
    covers: bool = False
    by_share: bool = False
    open_ended: bool = False
    at_once: Callable[..., "Rule"] | None = None
    whole: bool = False


class PerWeight(NamedTuple):
    """A part of a rule's state with one array per sparse leaf.

    The rule sees a tuple; the optimizer state holds a tree like the parameters.

    Attributes:
      values: The arrays.
    """

    values: Any


def nothing(params: Any, masks: Any) -> tuple[()]:
    """The state of a rule without memory."""
    return ()


def stateless(
    function: Callable[[Evidence], Any],
    *,
    needs: tuple[str, ...] = (),
    after_prune: bool = False,
    exact: bool = False,
    pooled: bool = False,
    covers: bool = False,
    by_share: bool = False,
    open_ended: bool = False,
) -> Rule:
    """Turns a function of the evidence into a rule without memory.

    Args:
      function: ``function(evidence) -> result``.
      needs: See ``Rule``, as for all others.
      after_prune: Of a redistribution rule.
      exact: Of a prune or growth rule.
      pooled: Of a prune rule.
      covers: Of a prune rule.
      by_share: Of a prune rule.
      open_ended: Of a growth rule.

    Returns:
      A rule.

    Examples:
      >>> from sparse_optax import regrowth
      >>> rule = regrowth.stateless(lambda evidence: evidence.masks)
      >>> rule.init((), ())
      ()
    """
    return Rule(
        init=nothing,
        apply=lambda evidence, state: (function(evidence), state),
        needs=needs,
        after_prune=after_prune,
        exact=exact,
        pooled=pooled,
        covers=covers,
        by_share=by_share,
        open_ended=open_ended,
    )


# --- helpers of rules -----------------------------------------------------------------
def map_weights(function: Callable[[Any], Any], states: Any) -> Any:
    """Applies a function to the values of every ``PerWeight`` in the rules' states."""

    def is_part(node: Any) -> bool:
        return isinstance(node, PerWeight)

    return jax.tree.map(
        lambda x: PerWeight(function(x.values)) if is_part(x) else x,
        states,
        is_leaf=is_part,
    )


def tally_layers(
    leaves: Sequence[tuple[jax.Array, ...]],
    axes: Sequence[int | None],
    function: Callable[..., tuple[jax.Array, ...]],
    given: tuple[jax.Array, ...] = (),
) -> tuple[Any, ...]:
    """Integer statistics of each layer: ``tally``, with layers along any axis."""
    front = [
        arrays if axis is None else tuple(jnp.moveaxis(x, axis, 0) for x in arrays)
        for arrays, axis in zip(leaves, axes, strict=True)
    ]
    split = [axis is not None for axis in axes]
    return tally(front, function, split=split, given=given)


def layer_counts(masks: Sequence[jax.Array], axes: Sequence[int | None]) -> jax.Array:
    """Number of True entries in each layer, an int32 vector."""
    if not masks:
        return jnp.zeros(0, jnp.int32)
    (counts,) = tally_layers([(mask,) for mask in masks], axes, all_true)
    return counts.astype(jnp.int32)


def active_magnitude(weight: jax.Array, mask: jax.Array) -> jax.Array:
    """A score by |w|; missing weights rank below all others and are never kept."""
    return jnp.where(mask, jnp.abs(weight), -1.0)


def coin(step: jax.Array | int, gamma: float, power: float) -> jax.Array:
    r"""True with probability :math:`(1 + \gamma t)^{-power}`, by the step alone. It is
    the same for all rules of a cycle and for runs of all seeds.
    """
    if not gamma or not power:
        return jnp.ones([], bool)
    key = jax.random.fold_in(jax.random.key(0), step)
    chance = (1.0 + gamma * jnp.asarray(step, jnp.float32)) ** -power
    return jax.random.uniform(key) < chance
