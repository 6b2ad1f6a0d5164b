"""One short file per paper: what it does, where it differs, one composition."""

from sparse_optax.methods.ac_dc import ac_dc as ac_dc
from sparse_optax.methods.gradual_magnitude import (
    gradual_magnitude as gradual_magnitude,
)
from sparse_optax.methods.iterative_magnitude import (
    iterative_magnitude as iterative_magnitude,
)
from sparse_optax.methods.iterative_magnitude import (
    one_shot_magnitude as one_shot_magnitude,
)
from sparse_optax.methods.network_surgery import network_surgery as network_surgery
from sparse_optax.methods.sparse_momentum import (
    sparse_momentum_regrow as sparse_momentum_regrow,
)
from sparse_optax.methods.straight_through import (
    straight_through_magnitude as straight_through_magnitude,
)
from sparse_optax.methods.top_kast import top_kast as top_kast
