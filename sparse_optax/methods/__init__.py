"""The methods, one file per paper and named like its function; two are no paper's."""

from sparse_optax.methods.ac_dc import ac_dc as ac_dc
from sparse_optax.methods.deep_rewiring import deep_rewiring as deep_rewiring
from sparse_optax.methods.dynamic_sparse import dynamic_sparse as dynamic_sparse
from sparse_optax.methods.falling_budget_regrow import (
    falling_budget_regrow as falling_budget_regrow,
)
from sparse_optax.methods.fisher_masks import fisher_masks as fisher_masks
from sparse_optax.methods.gradual_magnitude import (
    gradual_magnitude as gradual_magnitude,
)
from sparse_optax.methods.granet import granet as granet
from sparse_optax.methods.ham import ham as ham
from sparse_optax.methods.in_time_over_parameterization import (
    in_time_over_parameterization as in_time_over_parameterization,
)
from sparse_optax.methods.iterative_magnitude import (
    iterative_magnitude as iterative_magnitude,
)
from sparse_optax.methods.iterative_magnitude import (
    one_shot_magnitude as one_shot_magnitude,
)
from sparse_optax.methods.l0_regularization import (
    l0_regularization as l0_regularization,
)
from sparse_optax.methods.layerwise_obs import layerwise_obs as layerwise_obs
from sparse_optax.methods.learning_compression import (
    learning_compression as learning_compression,
)
from sparse_optax.methods.long_average_regrow import (
    long_average_regrow as long_average_regrow,
)
from sparse_optax.methods.network_surgery import network_surgery as network_surgery
from sparse_optax.methods.optimal_brain_damage_masks import (
    optimal_brain_damage_masks as optimal_brain_damage_masks,
)
from sparse_optax.methods.rigl import rigl as rigl
from sparse_optax.methods.snip_masks import snip_masks as snip_masks
from sparse_optax.methods.soft_weight_sharing import (
    soft_weight_sharing as soft_weight_sharing,
)
from sparse_optax.methods.sparse_evolutionary import (
    sparse_evolutionary as sparse_evolutionary,
)
from sparse_optax.methods.sparse_gpt import sparse_gpt as sparse_gpt
from sparse_optax.methods.sparse_momentum_regrow import (
    sparse_momentum_regrow as sparse_momentum_regrow,
)
from sparse_optax.methods.sparse_variational_dropout import (
    sparse_variational_dropout as sparse_variational_dropout,
)
from sparse_optax.methods.static_sparse import static_sparse as static_sparse
from sparse_optax.methods.straight_through_magnitude import (
    straight_through_magnitude as straight_through_magnitude,
)
from sparse_optax.methods.synflow_masks import synflow_masks as synflow_masks
from sparse_optax.methods.ticket_masks import rewind as rewind
from sparse_optax.methods.ticket_masks import score_tickets as score_tickets
from sparse_optax.methods.ticket_masks import ticket_masks as ticket_masks
from sparse_optax.methods.top_kast import top_kast as top_kast
from sparse_optax.methods.wanda_masks import wanda_masks as wanda_masks
