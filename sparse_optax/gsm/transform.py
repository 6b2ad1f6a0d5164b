"""Global sparse momentum SGD: the gate ``gsm_mask`` and the optimizer ``gsm``."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from sparse_optax import checks
from sparse_optax.budgets.resolve import check_static
from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.gsm.gate import (
    Passing,
    check_first,
    counted,
    passing,
    passing_ties,
    quota_of,
)
from sparse_optax.layers import (
    Layers,
    PyTree,
    Where,
    check_where,
    chosen_layers,
    eligible,
    is_hole,
    layers_of,
)
from sparse_optax.masks.tree import check_gradient, unpack
from sparse_optax.patterns import SINGLE, Pattern, pattern_of


class GsmState(NamedTuple):
    """State of ``gsm_mask``. Trees are like the parameters, with holes.

    Attributes:
      count: Finished updates. # shape=(), int32
      gsm_threshold: The threshold of the last step that ranked saliencies: all above it
        passed, none below. The next search starts there. # shape=(), float32
      gsm_passed: Per leaf, how many weights passed, at most 2^31 - 1. # int32
      gsm_reactivated: How many weights passed, but not at the step before; 0 unless
        tracked. # shape=(), int32
      gsm_active: The mask of the last step, or ``()`` if it is not needed.
    """

    count: jax.Array
    gsm_threshold: jax.Array
    gsm_passed: PyTree
    gsm_reactivated: jax.Array
    gsm_active: PyTree


@boundary("gsm_mask")
def gsm_mask(
    density: Any = None,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    ties: str = "exact",
    reselect: bool = True,
    track_reactivated: bool = False,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets the gradient of the Q most salient weights pass and stops all others.

    With Q = floor(density * N) of the N weights that take part,

    .. math:: B = [\, |g w| \text{ among the } Q \text{ largest of the model} \,], \quad
              g \leftarrow B g

    Followed by weight decay and momentum SGD this is

    .. math:: Z \leftarrow \beta Z + \eta W + B \, \partial L / \partial W, \quad
              W \leftarrow W - \alpha Z

    Weights outside of B only decay; afterwards the model can be cut to Q weights.

    .. note:: First in the chain, before weight decay and momentum, on the averaged
      gradient. Clip behind it: a clip in front measures the gradients that do not pass.
      It needs an element-wise optimizer with weight decay in its gradient,
      since only decay moves a passive weight. AdamW's decoupled decay loses the factor
      1 / (1 - momentum); Adam with L2 in the gradient moves passive weights like sign
      descent; muon and shampoo mix weights and move passive ones. A step reads
      gradients and weights a few times; on a mesh each pass has an all-reduce.

      At most Q weights pass: ties go to the earlier leaf, then the lower index. A
      saliency of zero never passes while Q < N. A NaN gradient ranks highest and
      passes, so that the fault becomes visible. The cut to Q weights is free only if no
      more are alive, see ``gsm_gap``. Under ``optax.inject_hyperparams`` only
      ``density`` varies, with ``hyperparam_dtype=jnp.float32``.

    Args:
      density: Fraction in (0, 1], a budget, or a schedule of the number of finished
        updates that gives a fraction (exact to float32) or an integer count, such as
        ``schedules.cubic_density``. Budgets in bytes or FLOPs limit the total cost.
      where: Which leaves take part, see ``eligible``. By default kernels, and not
        tables of embeddings, whose rows absent from a batch would only decay.
      stacked: ``{name: axis}`` of leaves that stack layers. They are one pool with all
        others, but units do not cross slices.
      ties: ``"exact"``, or ``"paper"`` for ``T >= threshold``: ties can exceed Q.
      reselect: False keeps the mask of the first step (the paper's ablation).
      track_reactivated: Stores the mask, to count re-activated weights.
      pattern: See ``patterns``. A unit is scored by its sum of saliencies, counts as
        its number of weights, and passes as a whole; a rest smaller than a unit is
        unused. With N:M the n most salient of each m pass, without ``density``, and
        with ``constant_fan_in`` those of each output unit.

    Returns:
      A transformation with a ``GsmState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = optax.chain(
      ...     sparse_optax.gsm_mask(density=0.5),
      ...     optax.add_decayed_weights(5e-4, mask=sparse_optax.decay_mask),
      ...     optax.sgd(0.1, momentum=0.9))
      >>> params = {"w": jnp.array([[1.0, 2.0]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((1, 2))}, state, params)
      >>> int(optax.tree.get(state, "gsm_passed")["w"])
      1

    References:
      Ding et al, `Global Sparse Momentum SGD <https://arxiv.org/abs/1909.12778>`_,
      2019.

    Differences from the released code: ties never exceed Q, and Q counts kernels only.
    """
    pattern = pattern_of(pattern)
    check_static(density, pattern=pattern, schedule=True)
    checks.choice("ties", ties, ("exact", "paper"), cure="Use 'exact' for at most Q.")
    checks.flag("reselect", reselect)
    checks.flag("track_reactivated", track_reactivated)
    check_where(where)
    checks.names_axes("stacked", stacked)
    if ties == "paper" and pattern != SINGLE:
        checks.fail("ties", ties, '"exact" with `pattern`', "Leave it out.")
    return _gate(
        _Gate(
            density,
            pattern,
            where,
            stacked,
            ties=ties,
            freeze_at=None if reselect else 0,
            stores=track_reactivated or not reselect,
        )
    )


class _Gate(NamedTuple):
    """The static arguments of a gate. From ``freeze_at`` on the mask is fixed: at the
    saliencies of that step, or with ``freeze_density`` at the largest weights.
    """

    density: Any
    pattern: Pattern
    where: Where | None
    stacked: Mapping[str, int] | None = None
    ties: str = "exact"
    freeze_at: int | None = None
    freeze_density: Any = None
    stores: bool = False


def _gate(gate: _Gate) -> optax.GradientTransformationExtraArgs:
    """The gate of both public transformations."""

    def init_fn(params):
        layers = layers_of(params, gate.where, gate.stacked, gate.pattern)
        check_first(gate.density, params)
        leaves = layers.pick(params)
        active: Any = ()
        if gate.stores:
            active = layers.rebuild([jnp.zeros_like(x, dtype=bool) for x in leaves])
        return GsmState(
            count=jnp.zeros([], jnp.int32),
            gsm_threshold=jnp.zeros([], jnp.float32),
            gsm_passed=layers.rebuild([jnp.zeros([], jnp.int32) for _ in leaves]),
            gsm_reactivated=jnp.zeros([], jnp.int32),
            gsm_active=active,
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.needs_params(params, "the saliency |g * w| needs the weights")
        checks.own_state(state, GsmState)
        layers = _layers_of_state(state, updates, params, gate)
        if layers.index:
            checks.own_state(state, GsmState, gsm_active=gate.stores)
        count = jnp.asarray(optax.safe_increment(state.count))
        if not layers.index:
            return updates, state._replace(count=count)
        previous = (
            [unpack(m) for m in layers.pick(state.gsm_active)] if gate.stores else []
        )
        found = _chosen(gate, layers, updates, state, params, previous)

        flat, structure = jax.tree.flatten(updates, is_leaf=is_hole)
        for i, m in zip(layers.index, found.masks, strict=True):
            flat[i] = jnp.where(m, flat[i], jnp.zeros((), flat[i].dtype))
        reactivated, active = state.gsm_reactivated, ()
        if gate.stores:
            pairs = zip(found.masks, previous, strict=True)
            fresh = counted([(m, jnp.logical_not(p)) for m, p in pairs])
            reactivated = jnp.where(state.count > 0, sum(fresh), 0)
            active = layers.rebuild(found.masks)
        return jax.tree.unflatten(structure, flat), GsmState(
            count=count,
            gsm_threshold=found.threshold,
            gsm_passed=layers.rebuild(found.passed),
            gsm_reactivated=reactivated,
            gsm_active=active,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _layers_of_state(
    state: GsmState, updates: PyTree, params: PyTree, gate: _Gate
) -> Layers:
    """The layers that ``init`` chose, after a check of gradients and parameters."""
    old, structure = jax.tree.flatten(state.gsm_passed, is_leaf=is_hole)
    flat = jax.tree.leaves(params, is_leaf=is_hole)
    if len(old) != len(flat):
        raise ArgumentError(
            f"init saw {len(old)} leaves and `params` has {len(flat)}; the structures "
            "must be equal. Pass the tree that init was called with."
        )
    chosen = [not is_hole(x) for x in old]
    check_gradient(updates, params)
    return chosen_layers(params, chosen, gate.stacked, gate.pattern, structure)


def _chosen(
    gate: _Gate,
    layers: Layers,
    updates: PyTree,
    state: GsmState,
    params: PyTree,
    previous: list[jax.Array],
) -> Passing:
    """Which weights pass at this step: by saliency, or by the frozen mask."""
    weights, guess = layers.pick(params), state.gsm_threshold
    pairs = list(zip(layers.pick(updates), weights, strict=True))
    quota = quota_of(gate.density, state.count, layers, params)

    def by_saliency():
        if gate.ties == "paper":
            return passing_ties(pairs, quota, layers, guess)
        return passing(pairs, quota, layers, guess)

    if gate.freeze_at is None:
        return by_saliency()

    def first_frozen():
        if gate.freeze_density is None:
            return by_saliency()
        largest = quota_of(gate.freeze_density, state.count, layers, params)
        arrays = [(w,) for w in weights]
        found = passing(arrays, largest, layers, None, jnp.abs, skip_zeros=False)
        return found._replace(threshold=guess)

    def as_before():
        return Passing(previous, guess, list(layers.pick(state.gsm_passed)))

    branch = jnp.sign(state.count - gate.freeze_at) + 1
    branches = [by_saliency, first_frozen, as_before]
    if isinstance(branch, Tracer):
        return lax.switch(branch, branches)
    # Without a trace, a switch over closures would compile at each step.
    return branches[int(branch)]()


@boundary("gsm")
def gsm(
    learning_rate: optax.ScalarOrSchedule,
    density: Any = None,
    *,
    momentum: float = 0.99,
    nesterov: bool = True,
    weight_decay: float = 5e-4,
    gate: Any = None,
    settle_start: int | None = None,
    where: Where | None = None,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GSM as an optimizer: gate, weight decay on kernels, momentum SGD.

    .. math:: Z \leftarrow \beta Z + \eta W + B \, \partial L / \partial W, \quad
              W \leftarrow W - \alpha Z

    In the paper's recipe the mask rotates with every mini-batch, so that more than Q
    weights stay alive and the cut to Q costs accuracy. The cut becomes free with a
    ``gate`` smaller than ``density``, or with ``settle_start``.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule.
      density: Fraction of the weights that the model is cut to, or a budget.
      momentum: :math:`\beta` in [0, 1). The paper has 0.98 and 0.99; passive weights
        decay 1 / (1 - momentum) times faster than without momentum.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: :math:`\eta`, on the leaves that take part, not on biases.
      gate: Fraction that passes at each step, or a budget or schedule. None is
        ``density``, as in the paper; 0.7 * density leaves room for the rotation.
      settle_start: Number of updates after which the mask is fixed at the largest
        weights, ``density`` of them; None never fixes it.
      where: Which leaves take part, see ``gsm_mask``.
      pattern: See ``gsm_mask``. Cut with the same in ``masks.magnitude_masks``.

    Returns:
      An optimizer.

    Raises:
      ValueError: If an argument is out of its range.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.gsm(0.1, density=0.5, momentum=0.9)
      >>> params = {"w": jnp.array([[1.0, 2.0]])}
      >>> updates, _ = tx.update({"w": jnp.ones((1, 2))}, tx.init(params), params)
      >>> [round(float(u), 5) for u in updates["w"][0]]
      [-0.0001, -0.19019]

    References:
      Ding et al, `Global Sparse Momentum SGD <https://arxiv.org/abs/1909.12778>`_,
      2019.
    """
    cure = "Use momentum 0.99 and weight decay 5e-4 for the paper's LeNets."
    checks.number("learning_rate", learning_rate, 0, schedule=True, cure=cure)
    checks.number("momentum", momentum, 0, 1, ends="[)", cure=cure)
    checks.number("weight_decay", weight_decay, 0, cure=cure)
    checks.updates("settle_start", settle_start, 0, optional=True)
    checks.flag("nesterov", nesterov)
    check_where(where)
    if isinstance(learning_rate, np.integer):
        learning_rate = int(learning_rate)  # an unsigned one has no negative
    pattern = pattern_of(pattern)
    check_static(density, pattern=pattern, schedule=True)
    if gate is not None:
        if pattern.density is not None:
            allowed = f"left out with {pattern.name}, which is the density"
            checks.fail("gate", gate, allowed, "Leave out one of the two.")
        check_static(gate, "gate", schedule=True)
    passing = _gate(
        _Gate(
            density if gate is None else gate,
            pattern,
            where,
            freeze_at=settle_start,
            freeze_density=density if pattern.density is None else pattern.density,
            stores=settle_start is not None,
        )
    )

    def decayed(params):
        return unnamed(eligible)(params, where)

    return optax.chain(
        passing,
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
