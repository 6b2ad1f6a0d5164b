"""DEEP-R: deep rewiring (Bellec et al, 2018)."""

from collections.abc import Mapping
from typing import Any

import optax

from sparse_optax.leaves import PyTree, Where
from sparse_optax.masks import Key
from sparse_optax.patterns import Pattern
from sparse_optax.regrowth import grow, prune, redistribute
from sparse_optax.regrowth.engine import regrow
from sparse_optax.regrowth.signed import signed_step


def deep_rewiring(
    inner: optax.GradientTransformation | None = None,
    *,
    density: Any = None,
    learning_rate: optax.ScalarOrSchedule,
    l1: optax.ScalarOrSchedule = 1e-5,
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
) -> optax.GradientTransformationExtraArgs:
    r"""A random walk of connections with fixed signs, rewired at every update.

    A weight is w = sign * theta. With the inner optimizer's update u:

    .. math::
        \theta \leftarrow \theta + sign \cdot u - \eta \lambda + \sqrt{2 \eta T} \, \nu,
        \quad \nu \sim N(0, 1)

    A weight whose theta would be negative becomes dormant, exactly zero, and at the
    next update as many dormant ones, chosen at random, start from zero and take it.
    The number of weights never changes.

    .. note::
      Last in the chain: wrap what you train with, usually plain SGD. A cycle opens
      every update and reads weights and random bits a few dozen times. Memory: two
      bytes a weight, for masks and signs. On a mesh, it needs small all-reduces.

      Under ``optax.inject_hyperparams`` only ``learning_rate``, ``l1`` and
      ``temperature`` may be injected; name all others in ``static_args``.

    Args:
      inner: The optimizer that is wrapped, or None behind one in a chain.
      density: Fraction of weights kept, in (0, 1], in every layer, or a budget. May be
        left out where ``masks`` are given.
      learning_rate: eta of ``inner``, for the L1 and the noise; a number or a schedule
        of the number of finished updates, as the next two.
      l1: lambda, at least 0.
      temperature: T, at least 0. The paper lowers it in steps; the released code's
        noise at its eta of 0.5 is T = 2.5e-11.
      scope: ``"layer"`` keeps every layer's number, as the released code;
        ``"global"`` reactivates uniformly among all dormant weights of the network.
      update_stop: No rewiring from this many updates on; None never stops.
      key: Integer seed or random key, for masks, signs, noise and growth.
      masks: First masks instead of random ones; their count is the budget.
      where: Which leaves become sparse, see ``leaves.resolve_where``.
      stacked: ``{name: axis}`` of leaves whose slices are layers of their own.
      reset_moments: ``"grown"`` zeroes the inner optimizer's moments of weights just
        reactivated; ``"none"`` leaves them. Plain SGD has none.
      packed: Stores one bit a weight.
      pattern: Which weights stand and fall together, see ``regrow``: a unit is dormant
        once all its weights have crossed zero.

    Returns:
      A transformation with a ``RegrowState``.

    Raises:
      ValueError: If an argument is out of its range or does not fit the parameters.

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
      Bellec et al, `Deep Rewiring: Training very sparse deep networks
      <https://arxiv.org/abs/1711.05136>`_, 2018.

    Differences from the paper: a weight that has become dormant is not reactivated at
    once in its own place, where there is any other; where more cross zero at once than
    there is room, the others go on from zero. Differences from the released code: the
    noise is that of the paper, and a reactivated weight starts from 0, not 1e-12. The
    paper's step is that of plain gradient descent; with another ``inner`` its update
    takes that step's place.
    """
    given = {"learning_rate": learning_rate, "l1": l1, "temperature": temperature}
    for name, value in given.items():
        if isinstance(value, str) or (
            isinstance(value, int | float) and not 0 <= value < float("inf")
        ):
            raise ValueError(
                f"deep_rewiring: `{name}` must be at least 0 and finite, or a "
                f"schedule; got {value!r}. Use 0 to leave it out."
            )
    if scope not in ("layer", "global"):
        raise ValueError(
            f'deep_rewiring: `scope` must be "layer" or "global"; got {scope!r}. Use '
            '"layer" to keep the number of every layer.'
        )
    signed = signed_step(learning_rate, l1=l1, temperature=temperature, key=key)
    pool = scope == "global"
    return regrow(
        optax.chain(inner or optax.identity(), signed),
        density=density,
        prune=prune.global_zeros if pool else prune.zeros,
        redistribute=redistribute.none,
        grow=grow.global_random_elsewhere if pool else grow.random_elsewhere,
        update_period=1,
        update_stop=update_stop,
        prune_rate=0.0,  # the zeros are what goes
        key=key,
        masks=masks,
        where=where,
        stacked=stacked,
        reset_moments=reset_moments,
        packed=packed,
        pattern=pattern,
        caller="deep_rewiring",
    )
