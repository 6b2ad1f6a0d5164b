"""Global sparse momentum SGD: only the most salient weights receive their gradient.

At every step the Q weights of the whole model with the largest first-order Taylor
saliency T = |g * w| receive gradient and weight decay; all others only decay. What
momentum and weight decay cannot keep alive goes to zero, and the model may be cut to
Q weights afterwards.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from sparse_optax import budgets, gating, masks, patterns, selection
from sparse_optax.gating import saliency as saliency
from sparse_optax.leaves import (
    PyTree,
    Where,
    is_hole,
    layout,
    leaf_names,
    require_some,
    resolve_where,
)
from sparse_optax.patterns import Pattern


class GsmState(NamedTuple):
    """State of ``gsm_mask``. Trees have the parameters' structure, with holes.

    Attributes:
      count: Finished updates.  # shape=(), int32
      gsm_threshold: A saliency at which the last step that ranked them cut: all
        above it passed, none below it. The next step starts its search there.
        # shape=(), float32
      gsm_passed: Per leaf, how many weights passed, at most 2^31 - 1.  # int32
      gsm_reactivated: How many weights passed that had not at the step before;
        0 unless tracked.  # shape=(), int32
      gsm_active: The mask of the last step, or ``()`` where it is not needed.
    """

    count: jax.Array
    gsm_threshold: jax.Array
    gsm_passed: PyTree
    gsm_reactivated: jax.Array
    gsm_active: PyTree


def gsm_mask(
    density: Any = None,
    *,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    ties: str = "exact",
    reselect: bool = True,
    track_reactivated: bool = False,
    groups: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets the gradient of the Q most salient weights pass and stops all others.

    With Q = floor(density * N) of the N weights that take part,

    .. math::
        B = [\, |g w| \text{ among the } Q \text{ largest of the model} \,], \quad
        g \leftarrow B g

    so that, followed by weight decay and momentum SGD,
    :math:`Z \leftarrow \beta Z + \eta W + B \, \partial L / \partial W` and
    :math:`W \leftarrow W - \alpha Z`.

    .. note::
      It must be the first transformation of the chain, before weight decay and
      momentum, on the averaged gradient. Behind it needs to stand an element-wise
      optimizer with weight decay in its gradient: only decay moves a passive weight.
      AdamW's decoupled decay loses the factor 1 / (1 - momentum); Adam with L2 in
      the gradient moves passive weights like sign descent; muon and shampoo mix
      weights and move passive ones. A step costs a few reading passes over gradients
      and weights, no sort, and one small all-reduce a pass on a mesh.

      At most Q weights pass: ties go to the earlier leaf, then the lower index. A
      weight whose saliency is zero never passes while Q < N. A NaN gradient ranks
      highest and passes: a broken gradient must surface. Cutting the model to Q
      weights afterwards costs nothing only if no more are alive; see ``gsm_gap``.

      Under ``optax.inject_hyperparams`` only ``density`` may be injected, with
      ``hyperparam_dtype=jnp.float32``; name all others in ``static_args``.

    Args:
      density: Fraction in (0, 1], a budget, or a schedule of the number of finished
        updates that gives a fraction (exact to float32) or an integer count:
        ``schedules.cubic_density`` makes a trained network sparse by and by.
        Budgets in bytes or FLOPs weigh the one pool and leave each layer's share to
        the method.
      where: Which leaves take part, see ``leaves.resolve_where``. By default kernels,
        without embedding tables, whose absent rows would only decay.
      stacked: Accepted as everywhere; in one pool a stacked leaf is no special case,
        but units do not reach over the slices of one.
      ties: ``"exact"``, or ``"paper"`` for ``T >= threshold``, which lets more than
        Q pass where the threshold is tied.
      reselect: False keeps the first step's mask for ever (the paper's ablation).
      track_reactivated: Stores the mask, to count re-activated weights.
      groups: Which weights stand and fall together, see ``patterns``. A unit is scored
        by the sum of its saliencies, counts as many weights as it has, and passes
        whole; what does not fill a unit is left over. With ``patterns.n_m`` the n
        most salient of each m pass, and ``density`` is left out.

    Returns:
      A transformation with a ``GsmState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = optax.chain(
      ...     sparse_optax.gsm_mask(density=0.5),
      ...     optax.add_decayed_weights(5e-4, mask=sparse_optax.eligible),
      ...     optax.sgd(0.1, momentum=0.9))
      >>> params = {"w": jnp.array([[1.0, 2.0]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((1, 2))}, state, params)
      >>> int(optax.tree.get(state, "gsm_passed")["w"])
      1

    References:
      Ding et al., `Global Sparse Momentum SGD for Pruning Very Deep Neural Networks
      <https://arxiv.org/abs/1909.12778>`_, 2019.

    Differences from the released code: ties never exceed Q, and Q counts kernels.
    """
    return _gate(
        density,
        where=where,
        stacked=stacked,
        ties=ties,
        freeze_at=None if reselect else 0,
        freeze_density=None,
        track=track_reactivated,
        groups=groups,
        caller="gsm_mask",
    )


def _gate(
    density, *, where, stacked, ties, freeze_at, freeze_density, track, groups, caller
) -> optax.GradientTransformationExtraArgs:
    """The gate of both public transformations.

    From ``freeze_at`` on the mask stays what it is there: the mask of saliencies, or
    with ``freeze_density`` that of the largest weights.
    """
    gating.check_groups(groups, density, ties, caller)
    if ties not in ("exact", "paper"):
        raise ValueError(
            f"{caller}: `ties` must be 'exact' or 'paper'; got {ties!r}. Use 'exact' "
            "to let at most Q pass."
        )
    stores = track or freeze_at is not None

    def init_fn(params):
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        chosen = resolve_where(params, where, embeddings=False, caller=caller)
        plan = layout(params, chosen, stacked, caller=caller)
        require_some(params, plan, caller=caller)
        for i, name, axis in zip(*plan, strict=True):
            if groups is not None:
                patterns.check(groups, flat[i].shape, name, axis, caller=caller)

        def tree(values):
            return masks.rebuild(structure, len(flat), plan.index, values)

        return GsmState(
            count=jnp.zeros([], jnp.int32),
            gsm_threshold=jnp.zeros([], jnp.float32),
            gsm_passed=tree([jnp.zeros([], jnp.int32) for _ in plan.index]),
            gsm_reactivated=jnp.zeros([], jnp.int32),
            gsm_active=tree([jnp.zeros_like(flat[i], dtype=bool) for i in plan.index])
            if stores
            else (),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                f"{caller}: `params` is None; the saliency |g * w| needs the weights. "
                "Call tx.update(grads, state, params)."
            )
        old, structure = jax.tree.flatten(state.gsm_passed, is_leaf=is_hole)
        flat = jax.tree.leaves(params, is_leaf=is_hole)
        gradient, update_structure = jax.tree.flatten(updates, is_leaf=is_hole)
        if not len(old) == len(flat) == len(gradient):
            raise ValueError(
                f"{caller}: init saw {len(old)} leaves; `params` has {len(flat)} and "
                f"the gradient {len(gradient)}. The structures must be equal: pass "
                "the tree that init was called with."
            )
        index = [i for i, x in enumerate(old) if not is_hole(x)]
        if not index:
            return updates, state._replace(count=optax.safe_increment(state.count))
        pairs = [(gradient[i], flat[i]) for i in index]
        for i in index:
            if gradient[i].shape != flat[i].shape:
                raise ValueError(
                    f"{caller}: the gradient of {leaf_names(params)[i]!r} has shape "
                    f"{gradient[i].shape} and `params` {flat[i].shape}; they must be "
                    "equal. Pass gradients of these parameters."
                )
        size = sum(int(np.prod(flat[i].shape, dtype=np.int64)) for i in index)
        among = [i in index for i in range(len(flat))]
        where_now = jax.tree.unflatten(
            jax.tree.structure(params, is_leaf=is_hole), among
        )
        plan = layout(params, among, stacked, caller=caller)

        def quota_of(density):
            if density is None:  # N:M
                return 0, None
            return gating.quota(density, state.count, params, where_now, size, caller)

        quota, guess = quota_of(density), state.gsm_threshold

        def by_saliency():
            if groups is None:
                return gating.passing(pairs, quota, size, ties, guess)
            return gating.passing_units(pairs, quota, groups, plan.axes, guess)

        def as_before():
            return previous, state.gsm_threshold, [old[i] for i in index]

        previous: list[Any] = []
        if stores:
            previous = masks.flatten(state.gsm_active)[0]
            previous = [masks.unpack(previous[i]) for i in index]
        if freeze_at is None:
            active, threshold, passed = by_saliency()
        else:

            def by_rule():
                if freeze_density is None:
                    return by_saliency()
                k, costs = quota_of(freeze_density)
                weights: list[Any] = [(flat[i],) for i in index]
                if groups is not None:
                    return gating.passing_units(
                        weights, (k, costs), groups, plan.axes, guess, jnp.abs
                    )
                kept = selection.select(
                    weights, k, score=jnp.abs, costs=costs, exact_threshold=False
                )
                return kept.masks, state.gsm_threshold, gating.numbers(kept.counts)

            branch = jnp.sign(state.count - freeze_at) + 1
            branches = [by_saliency, by_rule, as_before]
            if isinstance(branch, Tracer):
                chosen = lax.switch(branch, branches)
            else:  # outside of a trace a switch over closures compiles at each step
                chosen = branches[int(branch)]()
            active, threshold, passed = chosen
        reactivated = state.gsm_reactivated
        if stores:
            fresh = gating.counted(
                [(m, jnp.logical_not(p)) for m, p in zip(active, previous, strict=True)]
            )
            reactivated = jnp.where(state.count > 0, sum(fresh), 0)
        for i, m in zip(index, active, strict=True):
            gradient[i] = jnp.where(m, gradient[i], jnp.zeros((), gradient[i].dtype))

        def tree(values):
            return masks.rebuild(structure, len(old), index, values)

        return jax.tree.unflatten(update_structure, gradient), GsmState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            gsm_threshold=threshold,
            gsm_passed=tree(passed),
            gsm_reactivated=reactivated,
            gsm_active=tree(active) if stores else (),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


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
    groups: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GSM as an optimizer: gate, weight decay on kernels, momentum SGD.

    .. math::
        Z \leftarrow \beta Z + \eta W + B \, \partial L / \partial W, \quad
        W \leftarrow W - \alpha Z

    The paper's recipe rotates the mask with every mini-batch, so that more than Q
    weights stay alive and the cut to Q costs accuracy. Two ways to a cut that costs
    nothing: a ``gate`` smaller than ``density``, and ``settle_start``.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule.
      density: Fraction of the weights that the model is cut to, or a budget.
      momentum: :math:`\beta` in [0, 1). The paper uses 0.98 and 0.99; a passive
        weight decays 1 / (1 - momentum) times faster than without momentum.
      nesterov: Whether to use Nesterov momentum.
      weight_decay: :math:`\eta`, on the leaves that take part, not on biases.
      gate: Fraction that passes at each step, or a budget or schedule; None is
        ``density``, as in the paper. 0.7 * density leaves room for the rotation.
      settle_start: Number of updates after which the mask is fixed at the largest
        weights, ``density`` of them; None never fixes it.
      where: Which leaves take part, see ``leaves.resolve_where``.
      groups: Which weights stand and fall together, as in ``gsm_mask``. Cut with the
        same ``pattern`` in ``masks.magnitude_masks``.

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
      Ding et al., `Global Sparse Momentum SGD for Pruning Very Deep Neural Networks
      <https://arxiv.org/abs/1909.12778>`_, 2019.
    """
    for name, value, allowed, inside in (
        ("momentum", momentum, "[0, 1)", lambda x: 0 <= x < 1),
        ("weight_decay", weight_decay, "[0, inf)", lambda x: x >= 0),
        ("settle_start", settle_start, "[0, inf)", lambda x: x >= 0),
    ):
        if isinstance(value, (int, float)) and not inside(value):
            raise ValueError(
                f"gsm: `{name}` must be in {allowed}; got {value!r}. Use momentum "
                "0.99 and weight decay 5e-4 for the paper's LeNets."
            )
    gating.check_groups(groups, density, "exact", "gsm")
    settled = density
    if groups is not None and groups.m:
        settled = groups.n / groups.m
        if gate is not None:
            raise ValueError(
                f"gsm: `gate` must be left out with {groups.name}, which is the "
                f"density; got {gate!r}. Leave out one of the two."
            )
    if gate is not None:
        budgets.check_static(gate, "gsm", "gate")
    passing = _gate(
        density if gate is None else gate,
        where=where,
        stacked=None,
        ties="exact",
        freeze_at=settle_start,
        freeze_density=settled,
        track=False,
        groups=groups,
        caller="gsm",
    )

    def decayed(params):
        chosen = resolve_where(params, where, embeddings=False, caller="gsm")
        structure = jax.tree.structure(params, is_leaf=is_hole)
        return jax.tree.unflatten(structure, chosen)

    return optax.chain(
        passing,
        optax.add_decayed_weights(weight_decay, mask=decayed),
        optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
    )
