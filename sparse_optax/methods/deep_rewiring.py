"""DEEP-R: deep rewiring (Bellec et al, 2018)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax import checks
from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.transforms.signed_step import signed_step


@boundary("deep_rewiring")
def deep_rewiring(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    learning_rate: optax.ScalarOrSchedule,
    l1: optax.ScalarOrSchedule = 1e-5,
    gradient_noise: optax.ScalarOrSchedule = 1e-5,
    temperature: optax.ScalarOrSchedule = 0.0,
    scope: str = "layer",
    update_stop: int | None = None,
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    reset_moments: str = "grown",
    packed: bool = False,
    pattern: Pattern | None = None,
    dense_until: int | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rewires connections at random at every update; their signs are fixed.

    A weight is w = sign * theta. With the inner optimizer's update u:

    .. math:: \theta \leftarrow \theta + sign \cdot u - \eta \lambda
              + \sqrt{\eta^2 \sigma^2 + 2 \eta T} \; \nu, \quad \nu \sim N(0, 1)

    The released code has the noise :math:`\sigma` of the gradient, which is the default
    here, and the paper the temperature T. A weight whose theta would become negative is
    set to exactly zero and is dormant. At the next update as many dormant weights,
    chosen at random, become active: they start from zero and take that update. The
    number of weights never changes.

    .. note:: Last in the chain; it wraps the optimizer, usually plain SGD. Every update
      has a cycle, which reads weights and random bits a few dozen times. Memory: two
      bytes per weight, for masks and signs. Under ``optax.inject_hyperparams`` only
      numbers from ``learning_rate`` to ``temperature`` vary.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer, or None behind an optimizer in a chain.
      density: Fraction of weights kept per layer, in (0, 1], or a budget.
      learning_rate: eta of ``inner``, for L1 and noise: a number or a schedule of the
        number of finished updates, as the next two.
      l1: lambda, at least 0.
      gradient_noise: sigma, at least 0: the standard deviation of what is added to the
        gradient. That of the released code.
      temperature: T, at least 0, for the noise of the paper's theory, whose deviation
        falls with the root of the learning rate. Give ``gradient_noise=0`` with it.
      scope: ``"layer"`` keeps the count of every layer, as the released code;
        ``"global"`` chooses uniformly among all dormant weights of the network.
      update_stop: No cycle from this many updates on; None never stops.
      key: Integer seed or random key, for masks, signs, noise and growth.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: First masks instead of random ones; ``density`` may then be left out.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      reset_moments: See ``regrow``; plain SGD has no moments.
      packed: Stores one bit per weight.
      pattern: See ``regrow``; a unit is dormant once all its weights crossed zero.
      dense_until: Trains all weights for this many updates, then cuts to ``density``
        once, see ``regrow``. None starts sparse.
      within: Masks of the weights that it may use; the others stay as they are, bit
        for bit, see ``regrow``. None is all.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax.numpy as jnp, optax, sparse_optax
      >>> tx = sparse_optax.deep_rewiring(
      ...     optax.sgd(0.1), learning_rate=0.1, l1=1e-3, temperature=1e-4,
      ...     density=0.25, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"] + 2}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> sparse_optax.masks.count(sparse_optax.get_masks(state))
      5

    References:
      Bellec et al, `Deep Rewiring <https://arxiv.org/abs/1711.05136>`_, 2018.

    Differences from the paper: a weight that has just become dormant is chosen again
    only where no other is dormant. If more weights cross zero than there are dormant
    ones to replace them, the rest stay active at zero. The paper's step is plain
    gradient descent; another ``inner`` replaces it. Source of the defaults: the script
    ``script_mnist_deep_rewiring.py`` of the authors' deep_rewiring, with a learning
    rate of 0.5. Differences from it: a weight becomes active at 0, not 1e-12. Mostafa
    and Wang, whose results are those of tables with DEEP-R, have an L1 of 1e-4 on MNIST
    and a noise of the gradient of :math:`\sqrt{0.02 \, T}`, with T of 1e-5, 1e-8, 1e-12
    and 1e-15 from 0, 1/8, 1/4 and 3/8 of training on.
    """
    given = {
        "learning_rate": learning_rate,
        "l1": l1,
        "gradient_noise": gradient_noise,
        "temperature": temperature,
    }
    for name, value in given.items():
        checks.number(name, value, 0, schedule=True, cure="Use 0 to leave it out.")
    if inner is not None:
        checks.transformation("inner", inner)
    cure = 'Use "layer" to keep the number of every layer.'
    checks.choice("scope", scope, ("layer", "global"), cure=cure)
    signed = unnamed(signed_step)(
        learning_rate, l1=l1, noise=gradient_noise, temperature=temperature, key=key
    )
    pool = scope == "global"
    return unnamed(regrow)(
        optax.chain(inner or optax.identity(), signed),
        density=density,
        prune=prune.global_zeros if pool else prune.zeros,
        redistribute=redistribute.none,
        grow=grow.global_random_elsewhere if pool else grow.random_elsewhere,
        update_period=1,
        update_stop=update_stop,
        prune_rate=0.0,  # only zeros are pruned
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        dense_until=dense_until,
        within=within,
    )
