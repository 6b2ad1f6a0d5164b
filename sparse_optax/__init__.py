"""Sparse training as composable Optax gradient transformations.

Chain one into your optimizer; the train step stays as it is.

**From a trained network, by the gradient:**
``gsm_mask``, ``gsm`` (with ``gsm_gap`` and ``gsm_log_decay``, which say whether a
run can reach its goal, and whether it did).

**From scratch, at constant sparsity:**
``sparse_momentum_regrow``, ``rigl``, ``sparse_evolutionary`` (SET),
``dynamic_sparse`` (DSR), ``deep_rewiring`` (DEEP-R),
``in_time_over_parameterization`` (ITOP), ``top_kast``; of no paper:
``long_average_regrow`` and, with a density that falls, ``falling_budget_regrow``.

**From dense to sparse while training:**
``gradual_magnitude``, ``iterative_magnitude``, ``one_shot_magnitude``, ``granet``,
``ac_dc``, ``network_surgery`` (DNS), ``straight_through_magnitude``,
``learning_compression``; by a prior ``soft_weight_sharing`` (then ``share_weights``).

**By weights that are drawn, with a second line in the loss:**
``sparse_variational_dropout``, ``l0_regularization``: the loss takes the parameters
that ``sample_weights`` gives, the test those of ``final_weights``.

**Masks that stay, from one look at the network:**
``static_sparse`` trains under given or random masks: those of ``snip_masks``,
``synflow_masks``, ``fisher_masks``, ``optimal_brain_damage_masks``, of
``masks.magnitude_masks``, or of another run. ``ticket_masks``, ``rewind`` and
``score_tickets`` are for lottery tickets.

**One cut of a trained network, from the inputs of its layers:**
``wanda_masks``, ``sparse_gpt``, ``layerwise_obs`` (one layer); ``layer_inputs`` shows
what they see.

**Beside the method, in the optimizer:**
``ham``, ``add_l1_decay``, ``proximal_group_lasso``, ``clip_by_active_norm``.

**Masks and states:**
``eligible`` (what is made sparse), ``decay_mask`` (what decays), ``sparsify``,
``get_masks``, ``set_masks``, ``shuffle_masks``, ``random_masks_like``,
``save_sparse``, ``load_sparse``.

**Smaller and faster:**
``compact`` (a smaller dense model that computes the same), ``compact_training``
(training whose steps become faster as units die).

**Modules:**
``budgets`` (how many weights each layer keeps), ``masks``, ``patterns`` (blocks,
units, N:M), ``structured`` (whole channels and heads), ``schedules``,
``regrowth`` (the engine and its rules: ``regrow``),
``selection`` (the k largest of a tree, exactly), ``export``, ``report``,
``analysis`` (sensitivity of layers, specialization of channels, saliencies compared),
``plot`` (pictures, which need matplotlib: ``pip install "sparse_optax[plot]"``).
"""

from importlib.metadata import version as _version

from sparse_optax import analysis as analysis
from sparse_optax import budgets as budgets
from sparse_optax import export as export
from sparse_optax import masks as masks
from sparse_optax import patterns as patterns
from sparse_optax import plot as plot
from sparse_optax import regrowth as regrowth
from sparse_optax import report as report
from sparse_optax import schedules as schedules
from sparse_optax import selection as selection
from sparse_optax import structured as structured
from sparse_optax.export import compact as compact
from sparse_optax.export import compact_training as compact_training
from sparse_optax.export import load_sparse as load_sparse
from sparse_optax.export import save_sparse as save_sparse
from sparse_optax.gsm import GsmGap as GsmGap
from sparse_optax.gsm import GsmState as GsmState
from sparse_optax.gsm import gsm as gsm
from sparse_optax.gsm import gsm_gap as gsm_gap
from sparse_optax.gsm import gsm_log_decay as gsm_log_decay
from sparse_optax.gsm import gsm_mask as gsm_mask
from sparse_optax.layers import decay_mask as decay_mask
from sparse_optax.layers import eligible as eligible
from sparse_optax.masks import get_masks as get_masks
from sparse_optax.masks import random_masks_like as random_masks_like
from sparse_optax.masks import set_masks as set_masks
from sparse_optax.masks import shuffle_masks as shuffle_masks
from sparse_optax.masks import sparsify as sparsify
from sparse_optax.methods import ac_dc as ac_dc
from sparse_optax.methods import deep_rewiring as deep_rewiring
from sparse_optax.methods import dynamic_sparse as dynamic_sparse
from sparse_optax.methods import falling_budget_regrow as falling_budget_regrow
from sparse_optax.methods import fisher_masks as fisher_masks
from sparse_optax.methods import gradual_magnitude as gradual_magnitude
from sparse_optax.methods import granet as granet
from sparse_optax.methods import ham as ham
from sparse_optax.methods import (
    in_time_over_parameterization as in_time_over_parameterization,
)
from sparse_optax.methods import iterative_magnitude as iterative_magnitude
from sparse_optax.methods import l0_regularization as l0_regularization
from sparse_optax.methods import layerwise_obs as layerwise_obs
from sparse_optax.methods import learning_compression as learning_compression
from sparse_optax.methods import long_average_regrow as long_average_regrow
from sparse_optax.methods import network_surgery as network_surgery
from sparse_optax.methods import one_shot_magnitude as one_shot_magnitude
from sparse_optax.methods import (
    optimal_brain_damage_masks as optimal_brain_damage_masks,
)
from sparse_optax.methods import rewind as rewind
from sparse_optax.methods import rigl as rigl
from sparse_optax.methods import score_tickets as score_tickets
from sparse_optax.methods import snip_masks as snip_masks
from sparse_optax.methods import soft_weight_sharing as soft_weight_sharing
from sparse_optax.methods import sparse_evolutionary as sparse_evolutionary
from sparse_optax.methods import sparse_gpt as sparse_gpt
from sparse_optax.methods import sparse_momentum_regrow as sparse_momentum_regrow
from sparse_optax.methods import (
    sparse_variational_dropout as sparse_variational_dropout,
)
from sparse_optax.methods import static_sparse as static_sparse
from sparse_optax.methods import (
    straight_through_magnitude as straight_through_magnitude,
)
from sparse_optax.methods import synflow_masks as synflow_masks
from sparse_optax.methods import ticket_masks as ticket_masks
from sparse_optax.methods import top_kast as top_kast
from sparse_optax.methods import wanda_masks as wanda_masks
from sparse_optax.regrowth import RegrowState as RegrowState
from sparse_optax.regrowth import regrow as regrow
from sparse_optax.scoring.inputs import layer_inputs as layer_inputs
from sparse_optax.transforms import FollowState as FollowState
from sparse_optax.transforms import GroupLassoState as GroupLassoState
from sparse_optax.transforms import HardConcreteState as HardConcreteState
from sparse_optax.transforms import L1DecayState as L1DecayState
from sparse_optax.transforms import MixtureState as MixtureState
from sparse_optax.transforms import (
    VariationalDropoutState as VariationalDropoutState,
)
from sparse_optax.transforms import add_l1_decay as add_l1_decay
from sparse_optax.transforms import clip_by_active_norm as clip_by_active_norm
from sparse_optax.transforms import final_weights as final_weights
from sparse_optax.transforms import proximal_group_lasso as proximal_group_lasso
from sparse_optax.transforms import sample_weights as sample_weights
from sparse_optax.transforms import share_weights as share_weights

__version__ = _version("sparse_optax")

# What users import. Rooms that are not in it (layers, checks, methods, transforms,
# scoring) are for readers: their names may move.
__all__ = [
    "FollowState",
    "GroupLassoState",
    "GsmGap",
    "GsmState",
    "HardConcreteState",
    "L1DecayState",
    "MixtureState",
    "RegrowState",
    "VariationalDropoutState",
    "ac_dc",
    "add_l1_decay",
    "analysis",
    "budgets",
    "clip_by_active_norm",
    "compact",
    "compact_training",
    "decay_mask",
    "deep_rewiring",
    "dynamic_sparse",
    "eligible",
    "export",
    "falling_budget_regrow",
    "final_weights",
    "fisher_masks",
    "get_masks",
    "gradual_magnitude",
    "granet",
    "gsm",
    "gsm_gap",
    "gsm_log_decay",
    "gsm_mask",
    "ham",
    "in_time_over_parameterization",
    "iterative_magnitude",
    "l0_regularization",
    "layer_inputs",
    "layerwise_obs",
    "learning_compression",
    "load_sparse",
    "long_average_regrow",
    "masks",
    "network_surgery",
    "one_shot_magnitude",
    "optimal_brain_damage_masks",
    "patterns",
    "plot",
    "proximal_group_lasso",
    "random_masks_like",
    "regrow",
    "regrowth",
    "report",
    "rewind",
    "rigl",
    "sample_weights",
    "save_sparse",
    "schedules",
    "score_tickets",
    "selection",
    "set_masks",
    "share_weights",
    "shuffle_masks",
    "snip_masks",
    "soft_weight_sharing",
    "sparse_evolutionary",
    "sparse_gpt",
    "sparse_momentum_regrow",
    "sparse_variational_dropout",
    "sparsify",
    "static_sparse",
    "straight_through_magnitude",
    "structured",
    "synflow_masks",
    "ticket_masks",
    "top_kast",
    "wanda_masks",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
