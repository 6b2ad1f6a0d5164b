"""How exact the short formula of the decay of passive weights is."""

import math
from typing import NamedTuple

from sparse_optax import checks
from sparse_optax.checks import boundary, unnamed
from sparse_optax.gsm import gsm_log_decay


class DecayError(NamedTuple):
    """What ``passive_decay_error`` returns.

    Attributes:
      exact: ln(|w_0| / |w_end|) of the recurrence.
      formula: The same by the short formula.
      error: ``formula / exact - 1``; NaN if nothing decays.
    """

    exact: float
    formula: float
    error: float


@boundary("passive_decay_error")
def passive_decay_error(
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    steps: int,
    *,
    nesterov: bool = False,
) -> DecayError:
    r"""Relative error of the decay of a passive weight by the paper's argument.

    Momentum multiplies the decay by 1 / (1 - beta) once it has built up:

    .. math:: \ln |w_0 / w_k| \approx -k \ln(1 - \alpha \eta / (1 - \beta))

    The recurrence starts from a buffer of zero, and so lags by about
    :math:`\beta / (1 - \beta)` steps. With :math:`\alpha \eta > (1 - \sqrt\beta)^2` it
    swings about zero, and the formula does not hold.

    Args:
      learning_rate: :math:`\alpha`, a number, 0 or above.
      momentum: :math:`\beta`, in [0, 1).
      weight_decay: :math:`\eta`, 0 or above.
      steps: Number of updates, at least 1.
      nesterov: Whether the momentum is Nesterov's.

    Returns:
      A ``DecayError``.

    Raises:
      ValueError: If an argument is out of its range.

    Examples:
      >>> from sparse_optax.analysis import passive_decay_error
      >>> found = passive_decay_error(5e-3, 0.98, 5e-4, 54_918)
      >>> round(found.exact, 2), f"{found.error:.1%}"
      (6.9, '-0.5%')
    """
    cure = "Pass the values of your optimizer."
    checks.number("learning_rate", learning_rate, 0, cure=cure)
    checks.number("momentum", momentum, 0, 1, ends="[)", cure=cure)
    checks.number("weight_decay", weight_decay, 0, cure=cure)
    checks.updates("steps", steps, 1, traced=False, cure=cure)
    rates = dict(
        learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    for name, value in rates.items():
        checks.not_traced(name, value)
    # Scalars of JAX would be computed with in float32.
    learning_rate, momentum, weight_decay = map(checks.concrete, rates.values())
    steps = checks.concrete(steps)
    exact = unnamed(gsm_log_decay)(
        learning_rate, momentum, weight_decay, steps, nesterov=nesterov
    )
    rate = learning_rate * weight_decay / (1 - momentum)
    formula = -steps * math.log1p(-rate) if rate < 1 else math.inf
    error = formula / exact - 1 if 0 < exact < math.inf else math.nan
    return DecayError(exact, formula, error)
