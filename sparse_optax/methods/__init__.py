"""One short file per paper: what it does, where it differs, one composition."""

from sparse_optax.methods.deep_rewiring import deep_rewiring as deep_rewiring
from sparse_optax.methods.dynamic_sparse import dynamic_sparse as dynamic_sparse
from sparse_optax.methods.granet import granet as granet
from sparse_optax.methods.over_parameterization import (
    in_time_over_parameterization as in_time_over_parameterization,
)
from sparse_optax.methods.rigl import rigl as rigl
from sparse_optax.methods.sparse_evolutionary import (
    sparse_evolutionary as sparse_evolutionary,
)
from sparse_optax.methods.sparse_momentum import (
    sparse_momentum_regrow as sparse_momentum_regrow,
)
