"""Sparse variational dropout (Molchanov et al, 2017)."""

import optax

from sparse_optax import checks
from sparse_optax.checks import boundary
from sparse_optax.layers import Where
from sparse_optax.masks.make import Key, check_key
from sparse_optax.transforms.sampling import GAUSSIAN, sampled


@boundary("sparse_variational_dropout")
def sparse_variational_dropout(
    inner: optax.GradientTransformation,
    *,
    examples: int,
    strength: optax.ScalarOrSchedule = 1.0,
    log_variance: float = -10.0,
    key: Key,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Learns for each weight how much noise it bears; drops those that bear much.

    The weights are drawn anew in each step, :math:`w = \theta + \sigma \epsilon` with
    :math:`\epsilon \sim N(0, 1)`; :math:`\theta` are the parameters, and
    :math:`\log \sigma^2` lies in the state. With N training examples, the loss is

    .. math:: \tfrac{1}{N} \sum_n L_n(w) + \tfrac{s}{N} \sum_k D(\alpha_k), \qquad
              \alpha = \sigma^2 / \theta^2

    .. math:: -D(\alpha) \approx k_1 \operatorname{sigmoid}(k_2 + k_3 \log \alpha)
              - \tfrac{1}{2} \log(1 + \alpha^{-1}) - k_1

    with :math:`k_1, k_2, k_3` of 0.63576, 1.8732 and 1.48695. The loss of the train
    step must be called with ``sample_weights(params, opt_state)``: besides the
    optimizer it is the second line that changes, since noise on the weights has to be
    there when the loss is computed. ``final_weights(params, opt_state)`` are the
    weights for a test, zero where :math:`\log \alpha > 3`; how many are left is what
    the method finds.

    .. note:: Around the whole optimizer, which trains :math:`\log \sigma^2` by the same
      rule in a state of its own. Leave weight decay out: the divergence takes its
      place. Memory: three arrays of the size of the weights for Adam. Cost: one random
      number a weight, drawn twice. The noise is the same for all examples of a batch
      and in all steps that ``optax.MultiSteps`` adds up. Under
      ``optax.inject_hyperparams`` only ``strength`` varies.

    Clip gradients inside it, by ``optax.clip_by_global_norm``: the penalty is then
    part of what is measured.

    Args:
      inner: The wrapped optimizer; the authors use Adam.
      examples: N, the number of training examples, at least 1. The loss is a mean.
      strength: s, the weight of the divergence, at least 0, or a schedule of the number
        of finished updates. The authors raise it from 0 to 1 between epochs 5 and 20 of
        200.
      log_variance: :math:`\log \sigma^2` at first.
      key: Integer seed or random key.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      where: Which leaves are drawn, see ``eligible``: by default kernels.

    Returns:
      A transformation with a ``VariationalDropoutState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.sparse_variational_dropout(
      ...     optax.adam(1e-2), examples=200, key=0)
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
      >>> for _ in range(1500):
      ...     params, state = step(params, state)
      >>> final = sparse_optax.final_weights(params, state)
      >>> (final["w"] != 0)[:, 0].tolist()
      [True, False, False, False, False, False, False, False]

    References:
      Molchanov, Ashukha and Vetrov, `Variational Dropout Sparsifies Deep Neural
      Networks <https://arxiv.org/abs/1701.05369>`_, 2017, and ``nets/layers.py`` of the
      authors' repository bayesgroup/variational-dropout-sparsifies-dnn.

    Differences from the paper: weights are drawn once for a batch. The authors draw the
    outputs of layers for each example instead (local reparameterization), which has the
    same mean gradient with less variance, and needs the layers themselves. Their code
    sets the mean of a weight to zero in training once its log alpha is 3.
    """
    check_key(key)
    cure = "Give 1.0, or a schedule that rises to it."
    checks.number("strength", strength, 0, schedule=True, cure=cure)
    checks.number("log_variance", log_variance, static=True, cure="Give -10.")
    return sampled(
        inner,
        GAUSSIAN,
        start=log_variance,
        examples=examples,
        strength=strength,
        key=key,
        where=where,
    )
