"""What is said of one kind of operation."""

from collections.abc import Callable
from typing import Any, NamedTuple

from sparse_optax.export.compaction.facts import Box, Facts, Known
from sparse_optax.export.compaction.program import Equation


class Rule(NamedTuple):
    """Three views of an operation.

    Attributes:
      known: ``known(equation, facts)`` gives what is known of its outputs.
      needed: ``needed(equation, boxes, facts)`` gives the box of each input that it
        reads for these boxes of its outputs, or None for nothing. It may make more of
        an output than is asked for, by ``facts.widen``.
      small: ``small(equation, inputs, boxes, facts)`` gives its outputs for the boxes
        that ``facts.need`` has of them, from inputs in the boxes of ``needed``.
    """

    known: Callable[[Equation, Facts], list[Known]]
    needed: Callable[[Equation, list[Box | None], Facts], list[Box | None]]
    small: Callable[[Equation, list[Any], list[Box | None], Facts], list[Any]]


class NoRule(Exception):
    """An operation, with these arguments, is left whole."""
