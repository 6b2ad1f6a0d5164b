"""One short file per paper: what it does, where it differs, one composition."""

from sparse_optax.methods.sparse_momentum import (
    sparse_momentum_regrow as sparse_momentum_regrow,
)
