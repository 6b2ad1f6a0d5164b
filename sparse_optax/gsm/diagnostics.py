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
    *,
    where: Where | None = None,
    alive_above: float = 1e-4,
) -> GsmGap:
    """Tells whether the cut to ``density`` costs accuracy; also a stopping rule.

    The cut is free if at most Q weights are alive: the others are then negligible.

    Args:
      params: Concrete parameters after (or during) training with ``gsm``.
      density: Fraction that the cut keeps, in (0, 1], or a budget.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      alive_above: Weights of larger magnitude count as alive.

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
    check_static(density)
    checks.number("alive_above", alive_above, 0, cure="Leave it out for 1e-4.")
    layers = layers_of(params, where)
    pool = [(x,) for x in layers.pick(params)]
    if not pool:
        raise ArgumentError(
            f"no leaf of {leaf_names(params)} takes part; there must be one. Choose "
            "leaves with `where`."
        )
    k, size = pool_size(density, layers, params), int(layers.sizes.sum())
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
    checks.whole("steps", steps, 0, cure=cure)
    if callable(learning_rate):
        rates = np.asarray(jax.vmap(learning_rate)(jnp.arange(steps)), np.float64)
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
