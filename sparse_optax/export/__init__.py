"""A finished sparse model: as a small file, a smaller dense model, sparse matrices.

- ``compaction``: ``compact``, a smaller dense model that computes the same function,
  and ``compact_training``, which trains in this form between cycles.
- ``sparse``: ``to_sparse``, sparse matrices for dense layers where they are faster.
- ``timing``: times of calls, measured in turns.
- ``model``: a loaded model: dense, as masks, as BCSR and CSR matrices.
- ``file``: ``save_sparse`` and ``load_sparse``.
"""

from sparse_optax.export.compaction import CompactLayer as CompactLayer
from sparse_optax.export.compaction import CompactModel as CompactModel
from sparse_optax.export.compaction import CompactRecord as CompactRecord
from sparse_optax.export.compaction import CompactTrained as CompactTrained
from sparse_optax.export.compaction import CompactTraining as CompactTraining
from sparse_optax.export.compaction import TrainingForm as TrainingForm
from sparse_optax.export.compaction import compact as compact
from sparse_optax.export.compaction import compact_training as compact_training
from sparse_optax.export.file import load_sparse as load_sparse
from sparse_optax.export.file import save_sparse as save_sparse
from sparse_optax.export.model import SparseLeaf as SparseLeaf
from sparse_optax.export.model import SparseModel as SparseModel
from sparse_optax.export.model import sparse_bytes as sparse_bytes
from sparse_optax.export.sparse import BcsrKernel as BcsrKernel
from sparse_optax.export.sparse import BreakEven as BreakEven
from sparse_optax.export.sparse import EllKernel as EllKernel
from sparse_optax.export.sparse import ReducedKernel as ReducedKernel
from sparse_optax.export.sparse import SparseLayer as SparseLayer
from sparse_optax.export.sparse import SparseNetwork as SparseNetwork
from sparse_optax.export.sparse import SparseRecord as SparseRecord
from sparse_optax.export.sparse import sparse_break_even as sparse_break_even
from sparse_optax.export.sparse import to_sparse as to_sparse
