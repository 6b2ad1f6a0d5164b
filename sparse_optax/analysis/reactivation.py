"""How many weights a gate takes up again (the re-activation ratio of GSM)."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.layers import PyTree
from sparse_optax.masks.optimizer_state import named_masks
from sparse_optax.masks.tree import mask_shape, unpack


class Reactivation(NamedTuple):
    """What ``reactivation`` returns, one number for each mask after the first.

    Attributes:
      taken_up: Weights that are kept and were not at the mask before, as a share of all
        weights.
      first_time: Those of them that no mask so far had kept, as a share of all weights.
      explored: Weights that some mask so far has kept, as a share of all weights.
    """

    taken_up: np.ndarray
    first_time: np.ndarray
    explored: np.ndarray


@boundary("reactivation")
def reactivation(masks: Iterable[PyTree]) -> Reactivation:
    """Follows the masks of a run: step by step, or once an epoch.

    Give it the mask of each step, such as ``GsmState.gsm_active`` where that is
    tracked, or ``get_masks(opt_state)`` after each epoch. It holds two masks at a time.

    Args:
      masks: An iterable of at least two mask trees, plain or packed, or of optimizer
        states that hold masks. All have the same leaves, by name; holes are left out.

    Returns:
      A ``Reactivation``.

    Raises:
      ValueError: If there are fewer than two masks, one is no mask tree, or one has
        other leaves or shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax.analysis import reactivation
      >>> masks = [{"w": jnp.array(m, bool)} for m in ([1, 1, 0, 0], [1, 0, 1, 0])]
      >>> found = reactivation([*masks, masks[0]])
      >>> found.taken_up.tolist(), found.first_time.tolist()
      ([0.25, 0.25], [0.25, 0.0])

    References:
      Ding et al., `Global Sparse Momentum SGD for Pruning Very Deep Neural Networks
      <https://arxiv.org/abs/1909.12778>`_, 2019.
    """
    allowed = "an iterable of mask trees, one for each step"
    checks.iterable("masks", masks, allowed, "Pass a list of them.")
    first, before, ever, rows = None, None, None, []
    for tree in masks:
        named = named_masks(tree)
        shapes = {name: mask_shape(mask) for name, mask in named.items()}
        first = shapes if first is None else first
        if shapes != first or not any(map(math.prod, shapes.values())):
            raise ArgumentError(
                f"`masks` holds masks of {first} and of {shapes}; all must be of the "
                "same weights, one or more. Give those of one run."
            )
        now = np.concatenate([np.asarray(unpack(named[n])).ravel() for n in first])
        if before is None or ever is None:
            before, ever = now, now.copy()
            continue
        fresh = now & ~before
        new = fresh & ~ever
        ever |= now
        rows.append([fresh.mean(), new.mean(), ever.mean()])
        before = now
    if not rows:
        raise ArgumentError("`masks` must hold at least two masks; give more of them.")
    return Reactivation(*np.asarray(rows).T)
