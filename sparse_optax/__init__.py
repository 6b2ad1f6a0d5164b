"""Sparse training as composable Optax gradient transformations.

From top to bottom, each module uses only those above it:

- ``wide``: 64-bit counts as pairs of 32-bit integers.
- ``selection``: the k largest of a tree, exactly, without a sort.
- ``leaves``: which leaves take part, and what they are called.
- ``budgets``: how many weights each leaf may keep.
- ``mask_trees``, ``masks``, ``state``: masks as data, making and counting them,
  and the masks in an optimizer state.
- ``sparse_models``, ``sparse_files``: a finished model by name, and its compact file.
- ``clipping``: by the norm of active weights.
- ``schedules``: prune rates, density ramps, when to act.
- ``gating``, ``gsm``, ``gsm_analysis``: which weights pass, ``gsm_mask``, the
  ready-made optimizer around it, and whether a run can reach, and did reach, its goal.
- ``regrowth``: the engine, prune -> redistribute -> grow, and its rules.
- ``methods``: one short file per paper, each a composition of rules.
- ``report``: what a run did, layer by layer: records, a dict for loggers, a table.
- ``experiments`` (extra ``[experiments]``): models, data, training, tables.
"""

from importlib.metadata import version as _version

from sparse_optax import budgets as budgets
from sparse_optax import leaves as leaves
from sparse_optax import masks as masks
from sparse_optax import methods as methods
from sparse_optax import regrowth as regrowth
from sparse_optax import report as report
from sparse_optax import schedules as schedules
from sparse_optax import selection as selection
from sparse_optax import sparse_files as sparse_files
from sparse_optax import sparse_models as sparse_models
from sparse_optax import state as state
from sparse_optax.clipping import clip_by_active_norm as clip_by_active_norm
from sparse_optax.gsm import GsmState as GsmState
from sparse_optax.gsm import gsm as gsm
from sparse_optax.gsm import gsm_mask as gsm_mask
from sparse_optax.gsm_analysis import GsmGap as GsmGap
from sparse_optax.gsm_analysis import gsm_gap as gsm_gap
from sparse_optax.gsm_analysis import gsm_log_decay as gsm_log_decay
from sparse_optax.leaves import eligible as eligible
from sparse_optax.methods import deep_rewiring as deep_rewiring
from sparse_optax.methods import dynamic_sparse as dynamic_sparse
from sparse_optax.methods import granet as granet
from sparse_optax.methods import (
    in_time_over_parameterization as in_time_over_parameterization,
)
from sparse_optax.methods import rigl as rigl
from sparse_optax.methods import sparse_evolutionary as sparse_evolutionary
from sparse_optax.methods import sparse_momentum_regrow as sparse_momentum_regrow
from sparse_optax.regrowth import RegrowState as RegrowState
from sparse_optax.regrowth import regrow as regrow
from sparse_optax.sparse_files import load_sparse as load_sparse
from sparse_optax.sparse_files import save_sparse as save_sparse
from sparse_optax.state import get_masks as get_masks
from sparse_optax.state import set_masks as set_masks
from sparse_optax.state import sparsify as sparsify

__version__ = _version("sparse_optax")
