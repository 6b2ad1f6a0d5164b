"""Diagnostics of GSM: how far weights can decay, and what the cut would remove."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax import checks, selection
from sparse_optax.budgets.resolve import check_static, pool_size
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import PyTree, Where, layers_of, leaf_names
from sparse_optax.masks.optimizer_state import states_with


class GsmGap(NamedTuple):
    """What a cut to the largest weights would remove.

    Attributes:
      alive: Number of weights whose magnitude is above ``alive_above``.
      kept: Q, the number of weights that the cut keeps.
      ratio: \\|w\\| of the largest weight cut over \\|w\\| of the smallest kept.
      advice: What to do, in words.
    """

    alive: int
    kept: int
    ratio: float
    advice: str


@boundary("gsm_gap")
def gsm_gap(
    params: PyTree,
    density: Any,
    opt_state: PyTree = None,
    *,
    where: Where | None = None,
    alive_above: float = 1e-4,
) -> GsmGap:
    """Tells whether the cut to ``density`` costs accuracy; also a stopping rule.

    The cut is free if at most Q weights are alive: the others are then negligible. If
    more are, the advice names the likely cause. If most of the N - Q weights that the
    cut removes are alive, they have not decayed; the optimizer state tells why: the
    gate does not stand first in the chain, or Adam stands behind it, or training was
    too short. If fewer are, the mask rotates.

    Args:
      params: Concrete parameters after (or during) training with ``gsm``.
      density: Fraction that the cut keeps, in (0, 1], or a budget.
      opt_state: The optimizer state with the state of the gate, for the advice.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      alive_above: Weights of larger magnitude count as alive.

    Returns:
      A ``GsmGap``.

    Raises:
      ValueError: If ``density`` or ``where`` does not fit, or ``opt_state`` has no
        state of a gate.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> gap = sparse_optax.gsm_gap({"w": jnp.array([[1.0, 0.5], [1e-7, 0.0]])}, 0.5)
      >>> gap.alive, gap.kept, gap.advice
      (2, 2, 'Cut: it costs nothing.')
    """
    check_static(density)
    checks.number("alive_above", alive_above, 0, cure="Leave it out for 1e-4.")
    if checks.known(alive_above):
        alive_above = float(alive_above)
    layers = layers_of(params, where)
    pool = [(x,) for x in layers.pick(params)]
    if not pool:
        raise ArgumentError(
            f"no leaf of {leaf_names(params)} takes part; there must be one. Choose "
            "leaves with `where`."
        )
    k, size = pool_size(density, layers, params), int(layers.sizes.sum())
    # Counted by what is not small, since NaN is not.
    small = sum(
        int(jnp.sum(jnp.abs(x) <= alive_above, dtype=jnp.int32)) for (x,) in pool
    )
    alive = size - small
    smallest = float(selection.kth_largest(pool, k, score=jnp.abs))
    largest = 0.0
    if k < size:
        largest = float(selection.kth_largest(pool, k + 1, score=jnp.abs))
    ratio = largest / smallest if smallest > 0 else 0.0
    chain = None if opt_state is None else _read_chain(opt_state)
    if not all(bool(jnp.all(jnp.isfinite(x))) for (x,) in pool):
        advice = "Some weights are not finite: find out why before the cut."
    elif alive <= k:
        advice = "Cut: it costs nothing."
    else:
        many = f"{alive / k:.2f} times as many weights are alive as the cut keeps"
        decayed = 2 * (alive - k) <= size - k
        advice = f"{many}: {_ROTATES if decayed else _not_decayed(chain)}"
    return GsmGap(alive, k, ratio, advice)


# --- why weights are alive ------------------------------------------------------------
_ROTATES = "train on with a gate of 0.7 * density or with settle_start, then cut."
_FIRST = "Put it first in the chain: before weight decay and momentum."
_LONGER = (
    "train longer, or with a larger learning rate, momentum or weight decay, until "
    "gsm_log_decay is about 7 or more."
)
_ADAM = (
    "behind Adam with weight decay in its gradient passive weights move like sign "
    "descent, and decoupled decay lacks the factor 1 / (1 - momentum)"
)
_MOMENTS = ("trace", "mu", "nu")


class _Chain(NamedTuple):
    """What the optimizer state tells about the gate's place."""

    count: int  # finished updates
    is_late: bool  # whether a momentum comes before the gate
    is_last: bool  # whether nothing stands behind it in its chain
    has_adam: bool  # whether second moments are kept


def _not_decayed(chain: _Chain | None) -> str:
    """The likely cause, and the cure, where most passive weights are alive."""
    if chain is None:
        return (
            "most weights that the cut removes have not decayed. Either gsm_mask does "
            f"not stand first in the chain, or Adam stands behind it ({_ADAM}), or "
            f"training was too short: {_LONGER} Pass opt_state to tell them apart."
        )
    if chain.is_late or chain.is_last:
        where = "behind the optimizer" if chain.is_late else "last in its chain"
        return f"gsm_mask stands {where} and stops the decay of weights. {_FIRST}"
    if chain.has_adam:
        return f"{_ADAM}. Use SGD with momentum, or for AdamW {_LONGER}"
    return f"{chain.count} updates were too few for weights to decay: {_LONGER}"


def _read_chain(opt_state: PyTree) -> _Chain:
    """Finds the state of the gate among the states of its chain."""
    gates = list(states_with(opt_state, "gsm_passed"))
    if not gates:
        raise ArgumentError(
            "`opt_state` holds no state of gsm_mask or gsm; it must have one. Pass the "
            "state of the optimizer that trained these parameters, or leave it out."
        )
    before, last = _place(opt_state)
    (count,) = (int(np.asarray(x).max()) for x in jax.tree.leaves(gates[0].count))
    return _Chain(count, before, last, bool(_moments(opt_state) & {"nu"}))


def _place(state: Any) -> tuple[bool, bool]:
    """Whether a momentum comes before the gate, and whether it is last in its chain."""
    parts = list(state.values()) if isinstance(state, dict) else state
    if not isinstance(parts, (tuple, list)) or _is_gate(state):
        return False, False
    for i, part in enumerate(parts):
        if any(True for _ in states_with(part, "gsm_passed")):
            before, last = _place(part)
            # A state with fields is a wrapper; what else it keeps is its own.
            if hasattr(state, "_fields"):
                return before, last
            earlier = any(_moments(x) for x in parts[:i])
            ends = last if not _is_gate(part) else len(parts) > 1
            return before or earlier, ends and i == len(parts) - 1
    return False, False


def _is_gate(node: Any) -> bool:
    return hasattr(node, "gsm_passed")


def _moments(state: Any) -> set[str]:
    """The fields of momenta and second moments in a state."""

    def has_moments(node):
        return any(hasattr(node, field) for field in _MOMENTS)

    nodes = jax.tree.leaves(state, is_leaf=has_moments)
    return {f for node in nodes for f in _MOMENTS if hasattr(node, f)}


@boundary("gsm_log_decay")
def gsm_log_decay(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: float,
    steps: int,
    decoupled: bool = False,
    nesterov: bool = False,
) -> float:
    r"""Decay of a passive weight over a whole training: ln(w_0 / w_end).

    The exact recursion of a weight that never passes, from an empty buffer, is

    .. math:: z \leftarrow \beta z + \eta w, \quad w \leftarrow w - \alpha z

    (with Nesterov :math:`w \leftarrow w - \alpha(\eta w + \beta z)`). To first order
    the result is :math:`\sum \alpha \eta / (1 - \beta)`. Decoupled decay, as in AdamW,
    gives :math:`-\sum \ln(1 - \alpha \eta)`, about :math:`\sum \alpha \eta`: momentum
    does not help there. A schedule with less than about 10 cannot bring passive weights
    to zero. This is necessary, not sufficient, since the mask rotates. Adam with L2 in
    its gradient has no such value: it moves weights like sign descent.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule.
      momentum: :math:`\beta` in [0, 1).
      weight_decay: :math:`\eta`, non-negative.
      steps: Number of updates, non-negative.
      decoupled: Whether the decay bypasses the momentum (AdamW).
      nesterov: Whether the momentum is Nesterov's, as in Optax and PyTorch.

    Returns:
      ln(\|w_0\| / \|w_end\|); infinity if the weight becomes exactly zero.

    Raises:
      ValueError: If an argument is out of its range.

    Examples:
      >>> import sparse_optax
      >>> round(sparse_optax.gsm_log_decay(5e-3, 0.99, 5e-4, 26_926), 2)
      6.88

    References:
      Ding et al, 2019, see ``gsm_mask``.
    """
    cure = "Pass the values of your optimizer."
    checks.number("learning_rate", learning_rate, 0, schedule=True, cure=cure)
    checks.number("momentum", momentum, 0, 1, ends="[)", cure=cure)
    checks.number("weight_decay", weight_decay, 0, cure=cure)
    if isinstance(steps, jax.Array):
        if steps.shape or not jnp.issubdtype(steps.dtype, jnp.integer):
            checks.fail("steps", steps, "an integer of at least 0", cure)
        steps = int(steps)
    checks.updates("steps", steps, 0, cure=cure)
    checks.flag("decoupled", decoupled)
    checks.flag("nesterov", nesterov)
    if callable(learning_rate):
        schedule = learning_rate  # as the type checker knows it in a closure

        def rate(count):
            return jnp.asarray(checks.scalar("learning_rate", schedule(count)))

        rates = np.asarray(jax.vmap(rate)(jnp.arange(steps)), np.float64)
        for count in np.flatnonzero(~(np.isfinite(rates) & (rates >= 0)))[:1]:
            name = f"learning_rate({count})"
            checks.number(name, float(rates[count]), 0, cure=cure)
    else:
        rates = np.full(steps, learning_rate, np.float64)
    if decoupled:
        with np.errstate(divide="ignore"):
            return float(-np.sum(np.log(np.abs(1 - rates * weight_decay))))
    # Steps of equal rate are powers of one 2x2 matrix, scaled against underflow.
    edges = np.flatnonzero(np.diff(rates)) + 1
    state, log_scale = np.array([1.0, 0.0]), 0.0
    for run in np.split(rates, edges):
        if not len(run):
            continue
        state, log_part = _power(
            _passive_step(run[0], momentum, weight_decay, nesterov), len(run), state
        )
        log_scale += log_part
    weight = abs(state[0])
    return float("inf") if weight == 0 else float(-(log_scale + np.log(weight)))


def _passive_step(rate, momentum, weight_decay, nesterov) -> np.ndarray:
    """(w, z) after one step, as a matrix on (w, z) before."""
    buffer = np.array([weight_decay, momentum])
    if nesterov:
        step = np.array([weight_decay, 0.0]) + momentum * buffer
    else:
        step = buffer
    return np.stack([np.array([1.0, 0.0]) - rate * step, buffer])


def _power(matrix: np.ndarray, n: int, state: np.ndarray):
    """matrix**n @ state, rescaled, and the log of the scale."""
    log_state = log_matrix = 0.0
    while n:
        if n & 1:
            state = matrix @ state
            scale = np.abs(state).max() or 1.0
            state, log_state = state / scale, log_state + np.log(scale) + log_matrix
        matrix = matrix @ matrix
        scale = np.abs(matrix).max() or 1.0
        matrix, log_matrix = matrix / scale, 2 * log_matrix + np.log(scale)
        n >>= 1
    return state, log_state
