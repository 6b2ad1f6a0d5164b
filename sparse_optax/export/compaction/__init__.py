"""A smaller dense model from a sparse one, by an analysis of its traced program.

- ``program``: a traced function as a flat list of equations.
- ``facts``: what is known and needed of each value, axis by axis.
- ``rule``: what is said of one kind of operation.
- ``elementwise``, ``arrangement``, ``contraction``, ``reduction``, ``nested``: rules.
- ``analysis``: the passes forward and backward, and the smaller program.
- ``ties``: which indices of the parameters can only go together.
- ``record``: what went, layer by layer.
- ``compact``: ``compact`` and what it returns.
- ``small_form``: leaves and states in small form, programs without their constants.
- ``training``: ``compact_training``, which trains in small form between cycles.
"""

from sparse_optax.export.compaction.compact import CompactModel as CompactModel
from sparse_optax.export.compaction.compact import compact as compact
from sparse_optax.export.compaction.record import CompactLayer as CompactLayer
from sparse_optax.export.compaction.record import CompactRecord as CompactRecord
from sparse_optax.export.compaction.training import CompactTrained as CompactTrained
from sparse_optax.export.compaction.training import CompactTraining as CompactTraining
from sparse_optax.export.compaction.training import TrainingForm as TrainingForm
from sparse_optax.export.compaction.training import compact_training as compact_training
