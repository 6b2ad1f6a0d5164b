"""A finished sparse model as a compact file and as sparse matrices.

- ``model``: a loaded model: dense, as masks, as BCSR and CSR matrices.
- ``file``: ``save_sparse`` and ``load_sparse``.
"""

from sparse_optax.export.file import load_sparse as load_sparse
from sparse_optax.export.file import save_sparse as save_sparse
from sparse_optax.export.model import SparseLeaf as SparseLeaf
from sparse_optax.export.model import SparseModel as SparseModel
from sparse_optax.export.model import sparse_bytes as sparse_bytes
