"""Schedules of the prune rate and the density, and the timing of cycles.

Each factory returns an ``optax.Schedule``: a function of the number of finished updates
(a Python integer or traced) that returns a float32 scalar. It works under jit, scan and
vmap. From the end of a schedule on, its value is exactly the end value.

- ``prune_rate``: how much a cycle prunes.
- ``density``: density ramps from dense to sparse.
- ``timing``: at which updates a cycle comes.
"""

from sparse_optax.schedules.density import Towards as Towards
from sparse_optax.schedules.density import alternating_density as alternating_density
from sparse_optax.schedules.density import cubic_density as cubic_density
from sparse_optax.schedules.density import geometric_density as geometric_density
from sparse_optax.schedules.prune_rate import constant_prune_rate as constant_prune_rate
from sparse_optax.schedules.prune_rate import cosine_prune_rate as cosine_prune_rate
from sparse_optax.schedules.prune_rate import linear_prune_rate as linear_prune_rate
from sparse_optax.schedules.timing import first_due as first_due
from sparse_optax.schedules.timing import is_due as is_due
from sparse_optax.schedules.timing import last_due as last_due
