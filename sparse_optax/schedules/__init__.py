r"""Schedules of sparse training: how much to prune, how dense to be, when to act.

Each factory returns an ``optax.Schedule``: a function of the number of finished
updates, a Python integer or a traced one, that returns a float32 scalar. They can be
given wherever a ``prune_rate`` or a density is a schedule, and jitted, scanned and
vmapped like any function. Where a schedule has an end, it returns its end value exactly
from that count on: no rounding error is left over.
"""

from sparse_optax.schedules.densities import Towards as Towards
from sparse_optax.schedules.densities import alternating_density as alternating_density
from sparse_optax.schedules.densities import cubic_density as cubic_density
from sparse_optax.schedules.densities import geometric_density as geometric_density
from sparse_optax.schedules.rates import constant_prune_rate as constant_prune_rate
from sparse_optax.schedules.rates import cosine_prune_rate as cosine_prune_rate
from sparse_optax.schedules.rates import cosine_unless as cosine_unless
from sparse_optax.schedules.rates import linear_prune_rate as linear_prune_rate
from sparse_optax.schedules.timing import first_due as first_due
from sparse_optax.schedules.timing import is_due as is_due
from sparse_optax.schedules.timing import last_due as last_due
from sparse_optax.schedules.timing import never_due as never_due
