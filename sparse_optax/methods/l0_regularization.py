"""L0 regularization by hard concrete gates (Louizos et al, 2018)."""

import math
from collections.abc import Mapping

import optax

from sparse_optax import checks
from sparse_optax.checks import boundary
from sparse_optax.layers import Where
from sparse_optax.masks.make import Key, check_key
from sparse_optax.patterns import Pattern, pattern_of
from sparse_optax.transforms.sampling import HARD_CONCRETE, sampled


@boundary("l0_regularization")
def l0_regularization(
    inner: optax.GradientTransformation,
    *,
    examples: int,
    strength: optax.ScalarOrSchedule | Mapping[str, float],
    dropout: float = 0.5,
    key: Key,
    where: Where | None = None,
    pattern: Pattern | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Gives weights, or units, random gates, and makes the number of open gates small.

    The network uses :math:`w z`. Each gate z is drawn anew in each step, with
    :math:`\beta = 2/3`, :math:`\gamma = -0.1`, :math:`\zeta = 1.1`:

    .. math:: u \sim U(0, 1), \quad s = \operatorname{sigmoid}\left(
              \tfrac{\log u - \log(1 - u) + \log a}{\beta} \right), \quad
              z = \min(1, \max(0, s (\zeta - \gamma) + \gamma))

    The parameters are w; :math:`\log a` lies in the state. With N training examples and
    the gate of a unit counted for each of its weights, the loss is

    .. math:: \tfrac{1}{N} \sum_n L_n(w z) + \tfrac{\lambda}{N} \sum_k
              \operatorname{sigmoid}(\log a_k - \beta \log \tfrac{-\gamma}{\zeta})

    The loss of the train step must be called with ``sample_weights(params,
    opt_state)``: besides the optimizer it is the second line that changes, since the
    gates have to be there when the loss is computed. ``final_weights(params,
    opt_state)`` are the weights for a test; how many are zero is what the method finds.

    .. note:: Around the whole optimizer, which trains :math:`\log a` by the same rule
      in a state of its own; weight decay in it would pull :math:`\log a` to zero, too,
      so give it a ``mask`` or leave it out. :math:`\log a` stays within the logarithms
      of 0.01 and 100. Memory: three arrays of the size of the gates for Adam. Cost: one
      random number a gate, drawn twice. Gates are the same for all examples of a batch
      and in all steps that ``optax.MultiSteps`` adds up. Under
      ``optax.inject_hyperparams`` only ``strength`` varies.

    Clip gradients inside it, by ``optax.clip_by_global_norm``: the gradient is that of
    the drawn weights.

    Args:
      inner: The wrapped optimizer; the authors use Adam.
      examples: N, the number of training examples, at least 1. The loss is a mean.
      strength: :math:`\lambda`, at least 0, a schedule of the number of finished
        updates, or ``{name: number}`` with one for each leaf. The authors have 0.1 for
        each layer of an MLP on MNIST.
      dropout: :math:`1 / (1 + a)` at first, in (0, 1).
      key: Integer seed or random key.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      where: Which leaves have gates, see ``eligible``: by default kernels.
      pattern: None for a gate for each weight. ``patterns.output_units()`` for one for
        each output unit or channel, ``patterns.output_units(axis=0)`` for one for each
        input of a kernel (in, out), as the authors have for dense layers.

    Returns:
      A transformation with a ``HardConcreteState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.l0_regularization(
      ...     optax.adam(2e-2), examples=200, strength=4.0, key=0)
      >>> x = jax.random.normal(jax.random.key(0), (200, 8))
      >>> y = 2 * x[:, :1]  # seven inputs are of no use
      >>> params = {"w": jnp.full((8, 1), 0.5)}
      >>> state = tx.init(params)
      >>> def loss(params, state):
      ...     w = sparse_optax.sample_weights(params, state)["w"]
      ...     return jnp.mean((x @ w - y) ** 2)
      >>> @jax.jit
      ... def step(params, state):
      ...     updates, state = tx.update(jax.grad(loss)(params, state), state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(1000):
      ...     params, state = step(params, state)
      >>> final = sparse_optax.final_weights(params, state)
      >>> (final["w"] != 0)[:, 0].tolist()
      [True, False, False, False, False, False, False, False]

    References:
      Louizos, Welling and Kingma, `Learning Sparse Neural Networks through L0
      Regularization <https://arxiv.org/abs/1712.01312>`_, 2018, and ``l0_layers.py`` of
      the authors' repository AMLab-Amsterdam/L0_regularization.

    Differences from the paper: a weight has its own gate unless ``pattern`` says
    otherwise. :math:`\log a` starts at one value, without noise. The authors weigh
    their weight decay by the chance that a gate is open; here it is the optimizer's.
    They evaluate an average of the parameters over steps.
    """
    check_key(key)
    numbers = strength.values() if isinstance(strength, Mapping) else [strength]
    for number in numbers:
        cure = "Give 0.1, as the authors have for an MLP."
        checks.number("strength", number, 0, schedule=True, cure=cure)
    checks.number("dropout", dropout, 0, 1, ends="()", static=True, cure="Give 0.5.")
    return sampled(
        inner,
        HARD_CONCRETE,
        start=math.log((1 - dropout) / dropout),
        examples=examples,
        strength=strength,
        key=key,
        where=where,
        pattern=pattern_of(pattern),
    )
