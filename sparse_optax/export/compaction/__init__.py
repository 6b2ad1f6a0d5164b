"""A smaller dense model from a sparse one, by an analysis of its traced program.

- ``program``: a traced function as a flat list of equations.
- ``facts``: what is known and needed of each value, axis by axis.
- ``rule``: what is said of one kind of operation.
- ``elementwise``, ``arrangement``, ``contraction``, ``reduction``, ``nested``: rules.
- ``analysis``: the passes forward and backward, and the smaller program.
- ``ties``: which indices of the parameters can only go together.
- ``record``: what went, layer by layer.
- ``compact``: ``compact`` and what it returns.
"""

from sparse_optax.export.compaction.compact import CompactModel as CompactModel
from sparse_optax.export.compaction.compact import compact as compact
from sparse_optax.export.compaction.record import CompactLayer as CompactLayer
from sparse_optax.export.compaction.record import CompactRecord as CompactRecord
