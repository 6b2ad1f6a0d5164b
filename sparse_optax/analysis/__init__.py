"""Questions about a network and a run, one function each that returns a record.

- ``specialization``: whether channels serve one class or all.
- ``sensitivity``: what pruning each layer alone costs, and what one sparse run predicts
  of it.
- ``saliencies``: whether criteria rank the weights alike.
- ``reactivation``: how many weights a gate takes up again.
- ``decay``: how exact the formula of the decay of passive weights is.
- ``speedup``: what sparsity brings in time, estimated and measured.
- ``ranks``: rank correlation with its interval.
"""

from sparse_optax.analysis.decay import DecayError as DecayError
from sparse_optax.analysis.decay import passive_decay_error as passive_decay_error
from sparse_optax.analysis.ranks import RankCorrelation as RankCorrelation
from sparse_optax.analysis.ranks import rank_correlation as rank_correlation
from sparse_optax.analysis.reactivation import Reactivation as Reactivation
from sparse_optax.analysis.reactivation import reactivation as reactivation
from sparse_optax.analysis.saliencies import Saliencies as Saliencies
from sparse_optax.analysis.saliencies import compare_saliencies as compare_saliencies
from sparse_optax.analysis.sensitivity import Sensitivity as Sensitivity
from sparse_optax.analysis.sensitivity import layer_sensitivity as layer_sensitivity
from sparse_optax.analysis.sensitivity import surviving_densities as surviving_densities
from sparse_optax.analysis.specialization import Specialization as Specialization
from sparse_optax.analysis.specialization import (
    channel_specialization as channel_specialization,
)
from sparse_optax.analysis.speedup import Speedup as Speedup
from sparse_optax.analysis.speedup import SpeedupLayer as SpeedupLayer
from sparse_optax.analysis.speedup import measure_speedup as measure_speedup
