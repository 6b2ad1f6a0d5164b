"""RigL: rigging the lottery (Evci et al, 2020)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax.checks import boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.start import resets_of
from sparse_optax.schedules.prune_rate import cosine_unless


@boundary("rigl")
def rigl(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    update_period: int,
    update_stop: int | None = None,
    prune_rate: optax.ScalarOrSchedule | None = None,
    key: Key,
    masks: PyTree | None = None,
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    reset_moments: str | None = None,
    packed: bool = False,
    pattern: Pattern | None = None,
    dense_until: int | None = None,
    within: PyTree | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rewires by the dense gradient; a float thins the first layer as the others.

    Each period until T_end, with a_i the active weights of layer i and g the gradient
    of the current batch:

    .. math:: k_i = \lfloor f(t) a_i \rfloor, \quad
              f(t) = \frac{\alpha}{2} \left(1 + \cos \frac{\pi t}{T_{end}}\right), \quad
              \text{prune the } k_i \text{ smallest } |w|, \text{ grow the } k_i
              \text{ missing of largest } |g|

    New weights start from zero. Every layer keeps its number of weights. The paper's
    uniform budget keeps the first layer dense: leave it out with ``where``.

    .. note:: Last in the chain; it wraps the optimizer. The gradient that reaches it
      must be dense. Memory: one byte per weight, one bit with ``packed``. A cycle reads
      weights and gradient a few dozen times, other steps once. Under
      ``optax.inject_hyperparams`` only ``prune_rate`` varies.

    Clip gradients inside it, ``optax.chain(clip_by_active_norm(1.0), optax.sgd(0.1))``:
    a clip outside of it, or by the global norm, also measures missing weights.

    Args:
      inner: The wrapped optimizer. None, behind an optimizer in a chain, grows by the
        incoming update.
      density: Fraction of weights kept per layer, in (0, 1], or a budget; the paper's
        best is ``budgets.erdos_renyi_kernel(density)``.
      update_period: Delta T, updates between two cycles; 100 in the paper.
      update_stop: T_end, no cycle from then on; 75 % of training in the paper.
      prune_rate: A number in [0, 1] or a schedule of the number of finished updates;
        None is f(t) with alpha = 0.3.
      key: Integer seed or random key, for the first masks.
        Under ``jax.vmap`` give each member its own by ``in_axes``, see ``regrow``.
      masks: First masks instead of random ones; ``density`` may then be left out.
      where: Which leaves become sparse, see ``eligible``: by default kernels; tables of
        embeddings stay dense unless it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      reset_moments: See ``regrow``; None is ``"grown"`` if there is an ``inner``.
      packed: Stores one bit per weight.
      pattern: See ``regrow``.
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
      >>> tx = sparse_optax.rigl(
      ...     optax.adam(0.1), density=sparse_optax.budgets.erdos_renyi_kernel(0.25),
      ...     update_period=2, update_stop=6, key=0)
      >>> params = {"w": jnp.ones((4, 5))}
      >>> state = tx.init(params)
      >>> for _ in range(8):
      ...     updates, state = tx.update({"w": params["w"] - 2}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int((params["w"] != 0).sum())
      5

    References:
      Evci et al, `Rigging the Lottery <https://arxiv.org/abs/1911.11134>`_, 2020.

    Differences from the paper: weights just pruned may grow again, as in the released
    code. Differences from that code: kept weights also train at the update of a cycle,
    a weight pruned and regrown in one cycle starts from zero, and no noise breaks ties.
    """
    return unnamed(regrow)(
        inner,
        density=density,
        prune=prune.magnitude,
        redistribute=redistribute.none,
        grow=grow.gradient,
        update_period=update_period,
        update_stop=update_stop,
        prune_rate=cosine_unless(prune_rate, 0.3, update_stop),
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        reset_moments=resets_of(reset_moments, inner),
        packed=packed,
        pattern=pattern,
        dense_until=dense_until,
        within=within,
    )
