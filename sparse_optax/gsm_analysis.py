"""Whether GSM can, and did, reach its goal: reachable decay, and the gap at the cut."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparse_optax import budgets, selection
from sparse_optax.leaves import PyTree, Where, is_hole, leaf_names, resolve_where


class GsmGap(NamedTuple):
    """What a cut to the largest weights would remove.

    Attributes:
      alive: Number of weights above the threshold of life.
      kept: Q, the number of weights that the cut keeps.
      ratio: \\|w\\| of the largest weight cut over \\|w\\| of the smallest kept.
      advice: What to do, in words.
    """

    alive: int
    kept: int
    ratio: float
    advice: str


def gsm_gap(
    params: PyTree,
    density: Any,
    *,
    where: Where | None = None,
    alive_above: float = 1e-4,
) -> GsmGap:
    """Tells whether the cut to ``density`` costs anything; also a stopping rule.

    The cut is free if at most Q weights are alive: the (Q+1)-th largest is then
    noise beside the Q-th.

    Args:
      params: Concrete parameters after (or during) training with ``gsm``.
      density: Fraction that the cut keeps, in (0, 1], or a budget.
      where: Which leaves take part, see ``leaves.resolve_where``.
      alive_above: A weight of larger magnitude counts as alive.

    Returns:
      A ``GsmGap``.

    Raises:
      ValueError: If ``density`` or ``where`` does not fit.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> gap = sparse_optax.gsm_gap({"w": jnp.array([[1.0, 0.5], [1e-7, 0.0]])}, 0.5)
      >>> gap.alive, gap.kept, gap.advice
      (2, 2, 'Cut: it costs nothing.')
    """
    budgets.check_static(density, "gsm_gap")
    chosen = resolve_where(params, where, embeddings=False, caller="gsm_gap")
    flat, structure = jax.tree.flatten(params, is_leaf=is_hole)
    pool = [(x,) for x, c in zip(flat, chosen, strict=True) if c]
    if not pool:
        raise ValueError(
            f"gsm_gap: no leaf of {leaf_names(params)} takes part; there must be one. "
            "Choose leaves with `where`."
        )
    k = budgets.pool_size(
        density, params, where=jax.tree.unflatten(structure, chosen), caller="gsm_gap"
    )
    size = sum(x.size for (x,) in pool)
    alive = sum(
        int(jnp.sum(jnp.abs(x) > alive_above, dtype=jnp.int32)) for (x,) in pool
    )
    smallest = float(selection.kth_largest(pool, k, score=jnp.abs))
    largest = 0.0
    if k < size:
        largest = float(selection.kth_largest(pool, k + 1, score=jnp.abs))
    ratio = largest / smallest if smallest > 0 else 0.0
    if alive <= k:
        advice = "Cut: it costs nothing."
    else:
        advice = (
            f"{alive / k:.2f} times as many weights are alive as the cut keeps: train "
            "on with a gate of 0.7 * density or with settle_start, then cut."
        )
    return GsmGap(alive, k, ratio, advice)


def gsm_log_decay(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: float,
    steps: int,
    decoupled: bool = False,
    nesterov: bool = False,
) -> float:
    r"""How far weight decay alone takes a passive weight: ln(w_0 / w_end).

    The exact recursion of a weight that never passes, from an empty buffer,

    .. math::
        z \leftarrow \beta z + \eta w, \quad w \leftarrow w - \alpha z

    (with Nesterov :math:`w \leftarrow w - \alpha(\eta w + \beta z)`). To a first
    approximation it is :math:`\sum \alpha \eta / (1 - \beta)`. Decoupled, as in
    AdamW, it is :math:`-\sum \ln(1 - \alpha \eta)`, about :math:`\sum \alpha \eta`:
    the momentum no longer helps. A schedule that reaches less than about 10 cannot
    empty the passive weights. It is necessary, not sufficient, since the mask
    rotates. There is no value for Adam with L2 in its gradient, which moves a
    passive weight like sign descent, whatever the decay.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule.
      momentum: :math:`\beta` in [0, 1).
      weight_decay: :math:`\eta`, non-negative.
      steps: Number of updates, non-negative.
      decoupled: Whether the decay bypasses the momentum (AdamW).
      nesterov: Whether the momentum is Nesterov's, as Optax and PyTorch have it.

    Returns:
      ln(\|w_0\| / \|w_end\|); infinity if the weight becomes exactly zero.

    Raises:
      ValueError: If an argument is out of its range.

    Examples:
      >>> import sparse_optax
      >>> round(sparse_optax.gsm_log_decay(5e-3, 0.99, 5e-4, 26_926), 2)
      6.88

    References:
      Ding et al., `Global Sparse Momentum SGD for Pruning Very Deep Neural Networks
      <https://arxiv.org/abs/1909.12778>`_, 2019.
    """
    for name, value, allowed, inside in (
        ("momentum", momentum, "[0, 1)", 0 <= momentum < 1),
        ("weight_decay", weight_decay, "[0, inf)", weight_decay >= 0),
        ("steps", steps, "[0, inf)", steps >= 0),
    ):
        if not inside:
            raise ValueError(
                f"gsm_log_decay: `{name}` must be in {allowed}; got {value!r}. Pass "
                "the values of your optimizer."
            )
    if callable(learning_rate):
        rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(steps)), np.float64)
    else:
        rates = np.full(steps, learning_rate, np.float64)
    if decoupled:
        with np.errstate(divide="ignore"):
            return float(-np.sum(np.log(np.abs(1 - rates * weight_decay))))
    # Runs of one rate are powers of one 2x2 matrix; scaled, so as not to underflow.
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
    """matrix**n @ state and the log of the factor taken out of it."""
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
