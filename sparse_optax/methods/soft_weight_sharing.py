"""Soft weight-sharing (Ullrich et al, 2017)."""

import optax

from sparse_optax import checks
from sparse_optax.checks import boundary
from sparse_optax.layers import Where, check_where
from sparse_optax.transforms.mixture import mixture_prior


@boundary("soft_weight_sharing")
def soft_weight_sharing(
    *,
    examples: int,
    strength: optax.ScalarOrSchedule = 0.003,
    components: int = 16,
    zero_share: float = 0.99,
    spread: float = 0.6,
    deviation: float = 0.25,
    mean_rate: float = 1e-4,
    rate: float = 3e-3,
    where: Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Draws weights to a few values, most of them to zero, by a mixture prior.

    With N training examples, the gradient that arrives gets that of the prior added:

    .. math:: - \frac{\tau}{N} \sum_i \log \sum_{j=0}^{J-1}
              \pi_j N(w_i; \mu_j, 1 / \lambda_j)

    The component at zero has :math:`\mu_0 = 0` and a fixed :math:`\pi_0`. The other
    means, all precisions and the other shares learn, by Adam, from the same loss and
    Gamma priors of the precisions, with shape and rate of 5000 and 2 for the component
    at zero and of 250 and 0.1 for the others. ``share_weights`` then sets each weight
    to the mean of its component, or ``masks.magnitude_masks`` cuts to a number.

    .. note:: First in the chain, before the optimizer, for a trained network. Leave
      weight decay out: the prior takes its place. Memory: three arrays of the size of
      the largest leaf. Cost: two passes over the weights a component.

    Args:
      examples: N, the number of training examples, at least 1. The loss is a mean.
      strength: :math:`\tau`, at least 0, or a schedule of the number of finished
        updates.
      components: J, with that at zero, at least 2.
      zero_share: :math:`\pi_0`, in (0, 1).
      spread: The other means start evenly from -spread to spread, above 0.
      deviation: :math:`\lambda^{-1/2}` of all components at first, above 0.
      mean_rate: Adam's learning rate of the means.
      rate: That of the logarithms of precisions and shares. The authors train the
        weights by Adam with 5e-4.
      where: Which leaves have the prior, see ``eligible``: by default kernels, as one
        pool.

    Returns:
      A transformation with a ``MixtureState``.

    Raises:
      ValueError: If an argument is out of range or does not fit the parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, sparse_optax
      >>> tx = optax.chain(
      ...     sparse_optax.soft_weight_sharing(examples=100, strength=0.1),
      ...     optax.adam(5e-4))
      >>> params = {"w": jnp.array([[0.05, 0.5], [-0.6, 0.02]])}
      >>> state = tx.init(params)
      >>> still = {"w": jnp.zeros((2, 2))}  # the gradient of a loss
      >>> update = jax.jit(tx.update)
      >>> for _ in range(100):
      ...     updates, state = update(still, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> [[round(abs(float(w)), 2) for w in row] for row in params["w"]]
      [[0.01, 0.45], [0.55, 0.0]]

    References:
      Ullrich, Meeds and Welling, `Soft Weight-Sharing for Neural Network Compression
      <https://arxiv.org/abs/1702.04008>`_, 2017, and ``empirical_priors.py``,
      ``helpers.py`` and ``tutorial.ipynb`` of the authors' repository
      KarenUllrich/Tutorial-SoftWeightSharingForNNCompression, which the defaults are
      from.

    Differences from the paper: the prior is on kernels, not on biases.
    ``share_weights`` uses the shares as they are trained; the tutorial takes them
    before they are normalised, and a share of zero of 0.999.
    """
    checks.whole("examples", examples, 1, cure="Give the number of training examples.")
    cure = "Give 0.003, as the tutorial has."
    checks.number("strength", strength, 0, schedule=True, cure=cure)
    checks.whole("components", components, 2, static=True, cure="Give 16.")
    cure = "Give 0.99, as the tutorial has."
    checks.number("zero_share", zero_share, 0, 1, ends="()", static=True, cure=cure)
    for name, value in (("spread", spread), ("deviation", deviation)):
        cure = "Give 0.6 and 0.25, as the tutorial has."
        checks.number(name, value, 0, ends="(]", static=True, cure=cure)
    for name, value in (("mean_rate", mean_rate), ("rate", rate)):
        cure = "Give 1e-4 and 3e-3, as the tutorial has."
        checks.number(name, value, 0, static=True, cure=cure)
    check_where(where)
    return mixture_prior(
        examples=examples,
        strength=strength,
        components=components,
        zero_share=zero_share,
        spread=spread,
        deviation=deviation,
        mean_rate=mean_rate,
        rate=rate,
        where=where,
    )
