"""Sparse training as composable Optax gradient transformations.

From top to bottom, each module uses only those above it:

- ``wide``: 64-bit counts as pairs of 32-bit integers.
- ``selection``: the k largest of a tree, exactly, without a sort.
- ``patterns``: weights that stand and fall together: blocks, channels, N:M.
- ``leaves``: which leaves take part, and what they are called.
- ``budgets``: how many weights each leaf may keep.
- ``mask_trees``, ``scored_masks``, ``masks``, ``control_masks``, ``state``: masks as
  data, of the highest scores, making and counting them, random ones to compare with,
  and the masks in an optimizer state.
- ``sparse_models``, ``sparse_files``: a finished model by name, and its compact file.
- ``clipping``, ``regularizers``, ``following``: by the norm of active weights; L1
  decay; a step of its own after that of an optimizer.
- ``schedules``: prune rates, density ramps, when to act.
- ``gating``, ``gsm``, ``gsm_analysis``: which weights pass, ``gsm_mask``, the
  ready-made optimizer around it, and whether a run can reach, and did reach, its goal.
- ``regrowth``: the engine, prune -> redistribute -> grow, and its rules.
- ``criteria``: what scores of a loss share: batches, curvature, rounds.
- ``methods``: one short file per paper, each a composition of rules.
- ``report``: what a run did, layer by layer: records, a dict for loggers, a table.
- ``experiments`` (extra ``[experiments]``): models, data, training, tables.
"""

from importlib.metadata import version as _version

from sparse_optax import budgets as budgets
from sparse_optax import control_masks as control_masks
from sparse_optax import criteria as criteria
from sparse_optax import leaves as leaves
from sparse_optax import masks as masks
from sparse_optax import methods as methods
from sparse_optax import patterns as patterns
from sparse_optax import regrowth as regrowth
from sparse_optax import report as report
from sparse_optax import schedules as schedules
from sparse_optax import selection as selection
from sparse_optax import sparse_files as sparse_files
from sparse_optax import sparse_models as sparse_models
from sparse_optax import state as state
from sparse_optax.clipping import clip_by_active_norm as clip_by_active_norm
from sparse_optax.control_masks import random_masks_like as random_masks_like
from sparse_optax.control_masks import shuffle_masks as shuffle_masks
from sparse_optax.following import FollowState as FollowState
from sparse_optax.gsm import GsmState as GsmState
from sparse_optax.gsm import gsm as gsm
from sparse_optax.gsm import gsm_mask as gsm_mask
from sparse_optax.gsm_analysis import GsmGap as GsmGap
from sparse_optax.gsm_analysis import gsm_gap as gsm_gap
from sparse_optax.gsm_analysis import gsm_log_decay as gsm_log_decay
from sparse_optax.leaves import eligible as eligible
from sparse_optax.methods import ac_dc as ac_dc
from sparse_optax.methods import deep_rewiring as deep_rewiring
from sparse_optax.methods import dynamic_sparse as dynamic_sparse
from sparse_optax.methods import fisher_masks as fisher_masks
from sparse_optax.methods import gradual_magnitude as gradual_magnitude
from sparse_optax.methods import granet as granet
from sparse_optax.methods import ham as ham
from sparse_optax.methods import (
    in_time_over_parameterization as in_time_over_parameterization,
)
from sparse_optax.methods import iterative_magnitude as iterative_magnitude
from sparse_optax.methods import layerwise_obs as layerwise_obs
from sparse_optax.methods import network_surgery as network_surgery
from sparse_optax.methods import one_shot_magnitude as one_shot_magnitude
from sparse_optax.methods import (
    optimal_brain_damage_masks as optimal_brain_damage_masks,
)
from sparse_optax.methods import rigl as rigl
from sparse_optax.methods import snip_masks as snip_masks
from sparse_optax.methods import sparse_evolutionary as sparse_evolutionary
from sparse_optax.methods import sparse_momentum_regrow as sparse_momentum_regrow
from sparse_optax.methods import static_sparse as static_sparse
from sparse_optax.methods import (
    straight_through_magnitude as straight_through_magnitude,
)
from sparse_optax.methods import synflow_masks as synflow_masks
from sparse_optax.methods import top_kast as top_kast
from sparse_optax.regrowth import RegrowState as RegrowState
from sparse_optax.regrowth import regrow as regrow
from sparse_optax.regularizers import L1DecayState as L1DecayState
from sparse_optax.regularizers import add_l1_decay as add_l1_decay
from sparse_optax.sparse_files import load_sparse as load_sparse
from sparse_optax.sparse_files import save_sparse as save_sparse
from sparse_optax.state import get_masks as get_masks
from sparse_optax.state import set_masks as set_masks
from sparse_optax.state import sparsify as sparsify

__version__ = _version("sparse_optax")
