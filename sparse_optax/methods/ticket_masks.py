"""Lottery tickets: rounds of magnitude pruning with rewinding (Frankle, 2019)."""

from collections.abc import Callable, Mapping
from typing import Any

from sparse_optax import checks
from sparse_optax.checks import ArgumentError, boundary, unnamed
from sparse_optax.layers import PyTree, Where
from sparse_optax.masks.make import ranking
from sparse_optax.masks.optimizer_state import count_kept, fitting_masks, sparsified
from sparse_optax.patterns import Pattern
from sparse_optax.scoring.rounds import in_rounds, set_back, sizes_after


@boundary("rewind")
def rewind(params: PyTree, initial: PyTree, masks: PyTree) -> PyTree:
    r"""Sets all parameters back to earlier values, and missing weights to zero.

    .. math:: w \leftarrow m \odot w_0

    for leaves with a mask, and :math:`w \leftarrow w_0` for all others. Leaves are
    paired by normalised name.

    Args:
      params: The trained parameters, which give the types of the result.
      initial: The values at the start, or at an early step.
      masks: A mask tree, or an optimizer state that holds one.

    Returns:
      Parameters in the type of ``params``, missing weights exactly zero.

    Raises:
      ValueError: If a parameter or a mask has no counterpart of its name and shape, or
        the type of ``params`` cannot hold a value: a real one none that is complex, and
        an integer no fraction.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"b": jnp.ones(1), "w": jnp.array([[5.0, 6.0]])}
      >>> initial = {"b": jnp.zeros(1), "w": jnp.array([[1.0, 2.0]])}
      >>> masks = {"w": jnp.array([[False, True]])}
      >>> again = sparse_optax.rewind(params, initial, masks)
      >>> again["b"].tolist(), again["w"].tolist()
      ([0.0], [[0.0, 2.0]])

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1803.03635>`_, 2019; to an early step: Frankle et al,
      `Stabilizing the Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1903.01611>`_, 2019.
    """
    kept = fitting_masks(params, masks, "masks")
    return sparsified(set_back(params, initial), kept)


@boundary("ticket_masks")
def ticket_masks(
    train: Callable[[PyTree, PyTree], PyTree],
    initial: PyTree,
    density: Any,
    *,
    rounds: int,
    scope: str = "global",
    where: Where | None = None,
    stacked: Mapping[str, int] | None = None,
    pattern: Pattern | None = None,
) -> PyTree:
    r"""Masks of a winning ticket: train, prune by magnitude, rewind, and again.

    Round r = 1 ... n trains from the rewound weights and keeps
    :math:`\lfloor N d^{r/n} \rfloor` of the N weights, those of largest trained |w|.
    Pruned weights never come back. Train the result from ``rewind(params, initial,
    masks)``.

    Args:
      train: ``train(params, masks)`` trains from given weights, with missing ones at
        zero, and returns the trained parameters. With ``static_sparse(inner,
        masks=masks)`` they stay zero.
      initial: The weights to which each round goes back: those of the start, or of an
        early step.
      density: d, the fraction of weights to keep, in (0, 1], or a budget.
      rounds: n, at least 1. A fifth is pruned in each round at
        n = log(d) / log(0.8), as in the paper.
      scope: ``"global"`` for one pool, or ``"leaf"`` to rank each layer alone, as the
        paper does for LeNet.
      where: Which leaves take part, see ``eligible``: by default kernels, and tables of
        embeddings only where it names them.
      stacked: ``{name: axis}`` of leaves that stack layers.
      pattern: See ``masks.score_masks``.

    Returns:
      A mask tree.

    Raises:
      ValueError: If an argument does not fit, or ``train`` returns another tree or
        weights that are not finite.

    Examples:
      >>> import jax, jax.numpy as jnp, sparse_optax
      >>> initial = {"w": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
      >>> def train(params, masks):  # the first weight grows most
      ...     step = jnp.array([[9.0, 0.0, 0.0, -0.5]])
      ...     return jax.tree.map(lambda w, m: w + m * step, params, masks)
      >>> masks = sparse_optax.ticket_masks(train, initial, 0.5, rounds=2)
      >>> masks["w"].tolist()
      [[True, False, False, True]]

    References:
      Frankle and Carbin, `The Lottery Ticket Hypothesis
      <https://arxiv.org/abs/1803.03635>`_, 2019.

    Differences from the paper: counts are exact; the output layer is pruned at the rate
    of the others, the paper's at half of it.
    """
    if not checks.takes(train, initial, None):
        raise ArgumentError(
            f"`train` must be a function of parameters and masks; got {train!r}. Pass "
            "def train(params, masks): ..."
        )
    cure = "Use 1 to prune once, 10 for the paper's rate at a tenth of the weights."
    checks.whole("rounds", rounds, 1, static=True, cure=cure)
    wanted = ranking(
        initial, density, scope=scope, where=where, stacked=stacked, pattern=pattern
    )
    weights = wanted.layers.pick(initial)

    def trained_sizes(kept, r):
        del r
        masks = wanted.layers.rebuild(kept)
        trained = train(unnamed(rewind)(initial, initial, masks), masks)
        return sizes_after(trained, initial, wanted.layers)

    return in_rounds(wanted, weights, trained_sizes, int(rounds))


@boundary("score_tickets")
def score_tickets(
    score: Callable[[PyTree, PyTree], Any],
    initial: PyTree,
    candidates: Mapping[str, PyTree],
) -> dict[str, Any]:
    """Scores masks as tickets: what each reaches from the same initial weights.

    Args:
      score: ``score(params, masks)`` trains from given weights under given masks and
        returns what is compared, such as a validation error.
      initial: The initial weights, or those of an early step.
      candidates: Masks by name: those of ``ticket_masks``, and others that keep as
        many weights of ``initial``, all of them in a leaf without a mask. Such are
        ``random_masks_like(key, masks)``, ``masks.magnitude_masks(trained, density)``
        and ``masks.nonzero_masks`` of a network that GSM has pruned.

    Returns:
      A dict with the score of each.

    Raises:
      ValueError: If masks do not fit the weights, or keep different numbers.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> initial = {"w": jnp.array([[1.0, 2.0]])}
      >>> first, last = jnp.array([[True, False]]), jnp.array([[False, True]])
      >>> found = sparse_optax.score_tickets(
      ...     lambda params, masks: float(params["w"].sum()), initial,
      ...     {"first": {"w": first}, "last": {"w": last}})
      >>> found
      {'first': 1.0, 'last': 2.0}

    References:
      Frankle and Carbin, 2019, see ``ticket_masks``.
    """
    if not isinstance(candidates, Mapping) or not candidates:
        raise ArgumentError(
            f"`candidates` must be a dict of masks by name; got {candidates!r}. Pass "
            '{"ticket": masks, "random": random_masks_like(key, masks)}.'
        )
    if not checks.takes(score, initial, None):
        cure = "Pass def score(params, masks): ..."
        checks.fail("score", score, "a function of parameters and masks", cure)
    counts = {
        name: count_kept(initial, masks, f"candidates[{name!r}]")
        for name, masks in candidates.items()
    }
    if len(set(counts.values())) > 1:
        raise ArgumentError(
            f"`candidates` keep {counts} weights of `initial`, leaves without a mask "
            "included; all must keep as many. Make them at one density, for the same "
            "leaves."
        )
    return {
        name: score(unnamed(rewind)(initial, initial, masks), masks)
        for name, masks in candidates.items()
    }
