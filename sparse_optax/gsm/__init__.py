"""GSM: the most salient weights get their gradient, all others decay to zero.

- ``gate``: how many weights pass at a step, and which.
- ``transform``: ``gsm_mask``, and ``gsm``, the optimizer around it.
- ``diagnostics``: whether a run can reach its goal, and whether it did.
"""

from sparse_optax.gsm.diagnostics import GsmGap as GsmGap
from sparse_optax.gsm.diagnostics import gsm_gap as gsm_gap
from sparse_optax.gsm.diagnostics import gsm_log_decay as gsm_log_decay
from sparse_optax.gsm.gate import saliency as saliency
from sparse_optax.gsm.transform import GsmState as GsmState
from sparse_optax.gsm.transform import gsm as gsm
from sparse_optax.gsm.transform import gsm_mask as gsm_mask
