"""What criteria of pruning share, each of them a score for every weight.

Statistics of a loss over batches, its curvature, the highest scores of one layer,
pruning in rounds. The criteria themselves are in ``methods``.
"""

from sparse_optax.criteria import batches as batches
from sparse_optax.criteria import curvature as curvature
from sparse_optax.criteria import one_layer as one_layer
from sparse_optax.criteria import rounds as rounds
