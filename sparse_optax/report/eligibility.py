"""Which leaves are made sparse, and why: of every leaf, before any training."""

from typing import NamedTuple

from sparse_optax.checks import boundary
from sparse_optax.layers import Choice, PyTree, Where, choices
from sparse_optax.report.records import aligned


class Eligibility(NamedTuple):
    """The result of ``eligibility``.

    Attributes:
      leaves: One record per leaf, in the order of the parameters: ``name``, ``shape``,
        ``dtype``, ``kind``, ``sparse`` (the verdict) and ``reason``.
    """

    leaves: tuple[Choice, ...]

    def table(self) -> str:
        """The records as aligned plain text, one line per leaf.

        Returns:
          Text.

        Examples:
          >>> import jax.numpy as jnp
          >>> from sparse_optax import report
          >>> print(report.eligibility({"bias": jnp.zeros(3)}).table())
          leaf  shape  dtype    kind    verdict  reason
          bias  (3,)   float32  vector  dense    fewer than two dimensions
          0 of 1 leaves are made sparse.
        """
        rows = [("leaf", "shape", "dtype", "kind", "verdict", "reason")]
        rows += [
            (
                x.name,
                str(x.shape),
                "-" if x.dtype is None else str(x.dtype),
                x.kind,
                "sparse" if x.sparse else "dense",
                x.reason,
            )
            for x in self.leaves
        ]
        number = sum(x.sparse for x in self.leaves)
        last = f"{number} of {len(self.leaves)} leaves are made sparse."
        return "\n".join([*aligned(rows, str.ljust), last])


@boundary("eligibility")
def eligibility(
    params: PyTree, where: Where | None = None, *, embeddings: bool = False
) -> Eligibility:
    """Says of every leaf whether it is made sparse, and why.

    ``docs/which-weights.md`` lists the rules, and what names and shapes cannot tell.

    Args:
      params: The parameters, concrete or abstract.
      where: See ``eligible``.
      embeddings: See ``eligible``.

    Returns:
      An ``Eligibility``.

    Raises:
      ValueError: If ``where`` does not fit or chooses a leaf of other numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import report
      >>> params = {"g": jnp.ones((4, 1)), "v": jnp.zeros((4, 3))}
      >>> made = report.eligibility(params)
      >>> [(x.name, x.sparse) for x in made.leaves]
      [('g', False), ('v', True)]
      >>> made.leaves[0].reason
      "a scale of 'v', to whose shape it spreads"
    """
    return Eligibility(tuple(choices(params, where, embeddings=embeddings)))
