"""Transformations that prune units while the network trains."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax import checks, schedules
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, is_hole
from sparse_optax.patterns import SINGLE
from sparse_optax.regrowth import redistribute
from sparse_optax.regrowth.engine import transformation
from sparse_optax.regrowth.rules import Evidence, Rule, stateless
from sparse_optax.regrowth.start import Method, check, check_acts
from sparse_optax.structured.channels import Channels, check_goal, fitting, laid_like

SCORES = ("magnitude", "taylor")
# A share of the multiply-adds is met within float32: this much is left free.
_MARGIN = 1 + 2.0**-18

# The rule below returns the masks after the cycle; nothing grows.
_NONE = stateless(
    lambda evidence: tuple(jnp.zeros_like(m) for m in evidence.masks), exact=True
)


@boundary("gradual_channels")
def gradual_channels(
    inner: optax.GradientTransformation | None = None,
    *,
    units: Channels,
    density: float | None = None,
    multiply_adds: float | None = None,
    update_period: int,
    update_start: int = 0,
    update_stop: int,
    score: str = "magnitude",
    scope: str = "global",
    packed: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Prunes whole units while it trains, fast at first and slowly at the end.

    At each cycle, from the first t_0 to the last t_1, the units of the lowest scores go
    until k of the n units are left, with K the number at the end:

    .. math:: k_t = K + \lfloor (n - K) \left(1 - \frac{t - t_0}{t_1 - t_0}\right)^3
              \rfloor

    or, with ``multiply_adds``, until their share of the multiply-adds follows the same
    curve. A unit goes with all of its slices: bias, scale and the weights that read it.
    At least one unit of each group stays. Units that are gone stay zero.

    .. note:: Last in the chain; it wraps the optimizer. It is the engine of ``regrow``:
      ``get_masks``, ``sparsify``, ``report.summary`` and ``save_sparse`` take its
      state, and a step between cycles costs the same. Memory: one byte per weight of
      the leaves that have units, one bit with ``packed``. A cycle sorts the units, not
      the weights. All arguments are static under ``optax.inject_hyperparams``.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, or None behind an optimizer in a chain.
      units: What ``channels`` found for these parameters.
      density: The final share of units, in (0, 1]: exactly ``count(density, n)``.
      multiply_adds: Instead, the largest share of the multiply-adds at the end, in
        (0, 1]; met within 4e-6 of it.
      update_period: Updates between two prunes.
      update_start: No prune before this many updates.
      update_stop: No prune from this many updates on; train a third or more after it.
      score: ``"magnitude"``, the mean :math:`|w|` of a unit, or ``"taylor"``, its
        summed T of GSM, :math:`\sum |w m|` with the momentum m.
      scope: ``"global"`` for one pool, ``"group"`` to shrink all groups alike.
      packed: Stores one bit per weight.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument does not fit, or no cycle would come.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax import structured
      >>> def model(params, x):
      ...     return jnp.maximum(x @ params["v"], 0) @ params["w"]
      >>> params = {"v": jnp.arange(1.0, 13.0).reshape(2, 6), "w": jnp.ones((6, 1))}
      >>> units = structured.channels(model, params, jnp.ones((1, 2)))
      >>> tx = structured.gradual_channels(
      ...     optax.sgd(0.0), units=units, density=0.5, update_period=2, update_stop=8)
      >>> state, left = tx.init(params), []
      >>> for _ in range(8):
      ...     updates, state = tx.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      ...     left.append(int((params["w"] != 0).sum()))
      >>> left
      [6, 6, 6, 6, 3, 3, 3, 3]
    """
    _check_units(units)
    check_goal(density, multiply_adds, scope)
    cure = 'Use "magnitude".'
    checks.choice("score", score, SCORES, cure=cure)
    first = unnamed(schedules.first_due)(update_period, update_start)
    last = unnamed(schedules.last_due)(
        update_period, update_start, update_stop=update_stop
    )
    ramp = functools.partial(_left, start=min(first, last - 1), stop=last)
    if multiply_adds is not None:  # raises where it is too small
        with jax.ensure_compile_time_eval():
            order = np.asarray(units.ranks(jnp.zeros(len(units)), scope))
        fitting(units, order, multiply_adds, scope)
    method = Method(
        inner=inner,
        density=None,
        prune=_rule(units, density, multiply_adds, scope, score, ramp),
        redistribute=redistribute.none,
        grow=_NONE,
        update_period=update_period,
        update_start=update_start,
        update_stop=update_stop,
        prune_rate=0.0,
        key=0,
        masks=units.masks(np.ones(len(units), bool)),
        where=None,
        stacked=None,
        momentum="auto",
        reset_moments="none",
        packed=packed,
        ramp=None,
        hidden=False,
        pattern=SINGLE,
        regrown="zero",
    )
    check(method)
    check_acts(method)
    tx = transformation(method)

    def init_fn(params: PyTree) -> Any:
        flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
        if not flat:  # `optax.tree.map_params` initialises with a tree without leaves
            return tx.init(params)
        units.pick(params, "params")
        masks = jax.tree.leaves(method.masks, is_leaf=is_hole)
        pairs = zip(masks, flat, strict=True)
        laid = [m if is_hole(m) else laid_like(m, x) for m, x in pairs]
        laid = jax.tree.unflatten(structure, laid)
        return transformation(method._replace(masks=laid)).init(params)

    return optax.GradientTransformationExtraArgs(init_fn, tx.update)


def _check_units(units: Any) -> None:
    if not isinstance(units, Channels):
        cure = "Pass structured.channels(fn, params, example)."
        checks.fail("units", units, "the units that `channels` found", cure)


def _left(step: Any, start: int, stop: int) -> jax.Array:
    """How much of what goes is still there: from 1 to exactly 0."""
    done = (jnp.asarray(step, jnp.float32) - start) / (stop - start)
    return (1 - jnp.clip(done, 0, 1)) ** 3


def _rule(
    units: Channels,
    density: float | None,
    multiply_adds: float | None,
    scope: str,
    score: str,
    ramp: Callable[[Any], jax.Array],
) -> Rule:
    """The rule that returns the masks of the units that stay."""
    taylor = score == "taylor"

    def apply(evidence: Evidence, state: Any) -> tuple[Any, Any]:
        found = list(evidence.params)
        if taylor:
            momentum = evidence.need("momentum", "gradual_channels")
            found = [w * m for w, m in zip(found, momentum, strict=True)]
        flat: list[Any] = [None] * len(units.names)
        for i, x in zip(units.leaves, found, strict=True):
            flat[i] = x
        scores = units.sums(flat, jnp.abs)
        if not taylor:
            scores = scores / np.maximum(units.sizes, 1).astype(np.float32)
        # What is gone ranks last.
        ranks = units.ranks(jnp.where(units.alive(evidence.masks), scores, -1), scope)
        left = ramp(evidence.step)
        if multiply_adds is None:
            assert density is not None
            final = jnp.asarray(units.counts(density, scope), jnp.int32)
            most = _most(units, scope)
            more = jnp.floor(left * (most - final).astype(jnp.float32))
            depth = final + more.astype(jnp.int32)
        else:
            share = multiply_adds + left * (1 - multiply_adds)
            depth = _within(units, ranks, share, scope)
        pairs = zip(units.mask_leaves(ranks < depth), evidence.masks, strict=True)
        return tuple(laid_like(new, old) for new, old in pairs), state

    return Rule(
        init=lambda params, masks: (),
        apply=apply,
        needs=("momentum",) if taylor else (),
        whole=True,
    )


def _most(units: Channels, scope: str) -> jax.Array:
    """How many units there are, in one pool or in the group of each unit."""
    if scope == "global":
        return jnp.asarray(len(units), jnp.int32)
    each = np.array([x.size for x in units.groups], np.int32)
    return jnp.asarray(each[units.group])


def _within(
    units: Channels, ranks: jax.Array, share: jax.Array, scope: str
) -> jax.Array:
    """``fitting`` in the traced program, in float32."""
    axes, numbers, times = units.lengths()
    limit = share * float(units.multiply_adds())
    sizes = np.array([x.size for x in units.groups], np.int32)

    def depth(n: Any) -> Any:
        if scope == "global":
            return jnp.maximum(n, len(units.groups))
        each = jnp.maximum(n * jnp.asarray(sizes) // len(units), 1)
        return each[units.group]

    def fits(n: Any) -> jax.Array:
        kept = jnp.append(ranks < depth(n), True).astype(jnp.float32)
        lengths = jnp.append(axes @ kept, 1.0)
        cost = jnp.sum(times * jnp.prod(lengths[numbers], -1))
        return cost * _MARGIN <= limit

    def step(_: Any, ends: Any) -> Any:
        low, high = ends
        middle = (low + high) // 2
        fit = fits(middle)
        return jnp.where(fit, middle, low), jnp.where(fit, high, middle)

    ends = jnp.asarray(0, jnp.int32), jnp.asarray(len(units) + 1, jnp.int32)
    rounds = len(units).bit_length() + 1
    low, _ = jax.lax.fori_loop(0, rounds, step, ends)
    return depth(low)


# --- the gate of GSM ------------------------------------------------------------------
class GateState(NamedTuple):
    """State of ``gate_channels``.

    Attributes:
      count: Finished updates. # shape=(), int32
      kept: Whether a unit passed at the last update. # shape=(units,), bool
    """

    count: jax.Array
    kept: jax.Array


@boundary("gate_channels")
def gate_channels(
    units: Channels, density: float | optax.Schedule, *, scope: str = "global"
) -> optax.GradientTransformation:
    r"""The gate of GSM for whole units: the gradient of the others becomes zero.

    With T summed over the scored weights of a unit,

    .. math:: T_u = \sum_{k \in u} |w_k g_k|

    the gradient of the Q units of largest T passes; all weights of other units only
    decay, towards a network whose small units can go. Cut at the end:
    ``units.masks(units.select(units.scores(params), density))``.

    .. note:: First in the chain, on the averaged gradient, before weight decay and
      momentum. A step adds one pass over the weights and a sort of the units.

    Args:
      units: What ``channels`` found for these parameters.
      density: Q over the number of units, in (0, 1], or a schedule of it.
      scope: ``"global"`` for one pool, ``"group"`` for the density in each group.

    Returns:
      A transformation with a ``GateState``.

    Raises:
      ValueError: If an argument does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from sparse_optax import structured
      >>> def model(params, x):
      ...     return jnp.maximum(x @ params["v"], 0) @ params["w"]
      >>> params = {"v": jnp.ones((2, 4)), "w": jnp.ones((4, 1))}
      >>> units = structured.channels(model, params, jnp.ones((1, 2)))
      >>> tx = optax.chain(structured.gate_channels(units, 0.5), optax.sgd(0.1))
      >>> grads = {"v": jnp.ones((2, 4)), "w": jnp.array([[1.0], [3.0], [2.0], [0.0]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> (updates["w"] != 0).ravel().tolist()
      [False, True, True, False]
    """
    _check_units(units)
    cure = 'Use "group" to keep the density in each group.'
    checks.choice("scope", scope, ("global", "group"), cure=cure)
    cure = "Pass the share of the units whose gradient passes."
    checks.number("density", density, 0, 1, ends="(]", schedule=True, cure=cure)

    def init_fn(params: PyTree) -> GateState:
        if jax.tree.leaves(params):
            units.pick(params, "params")
        checks.first_value("density", density, 0, 1, ends="(]", cure=cure)
        return GateState(jnp.zeros([], jnp.int32), jnp.ones(len(units), bool))

    def update_fn(updates, state, params=None):
        checks.needs_params(params, "the gate ranks weights times gradients")
        checks.own_state(state, GateState)
        gradient = units.pick(updates, "updates")
        weights = units.pick(params, "params")
        products = [
            g if is_hole(g) or is_hole(w) else w * g
            for w, g in zip(weights, gradient, strict=True)
        ]
        ranks = units.ranks(units.sums(products, jnp.abs), scope)
        depth: Any
        if callable(density):
            share = jnp.clip(jnp.asarray(density(state.count), jnp.float32), 0, 1)
            most = _most(units, scope).astype(jnp.float32)
            # A float32 that is a little too small must not lose a unit.
            depth = jnp.floor(share * most * (1 + 2.0**-22)).astype(jnp.int32)
            least = len(units.groups) if scope == "global" else 1
            depth = jnp.maximum(depth, least)
        else:
            depth = units.counts(density, scope)
        kept = ranks < depth
        passed = list(gradient)
        for i, mask in zip(units.leaves, units.mask_leaves(kept), strict=True):
            g = passed[i]
            passed[i] = jnp.where(laid_like(mask, g), g, jnp.zeros((), g.dtype))
        structure = jax.tree.structure(updates, is_leaf=is_hole)
        new = GateState(jnp.asarray(optax.safe_increment(state.count)), kept)
        return jax.tree.unflatten(structure, passed), new

    return optax.GradientTransformation(init_fn, update_fn)
