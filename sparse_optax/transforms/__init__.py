"""Small Optax transformations beside a method or inside one.

- ``clipping``: ``clip_by_active_norm``: clips by the norm of active weights only.
- ``l1_decay``: ``add_l1_decay``, which Optax does not have.
- ``group_lasso``: ``proximal_group_lasso``: shrinks groups after each step.
- ``follow``: a second step after each of an optimizer's, for ``ham``.
- ``signed_step``: noise and L1 on weights with fixed signs, for DEEP-R.
- ``backward_set``: gradients and steps of the largest weights only, for Top-KAST.
- ``missing_decay``: decay of hidden weights that are missing, for SR-STE.
- ``mixture``: the gradient of a mixture prior, for soft weight-sharing.
- ``sampling``: weights that are drawn, for variational dropout and L0.
"""

from sparse_optax.transforms.clipping import clip_by_active_norm as clip_by_active_norm
from sparse_optax.transforms.follow import FollowState as FollowState
from sparse_optax.transforms.group_lasso import GroupLassoState as GroupLassoState
from sparse_optax.transforms.group_lasso import (
    proximal_group_lasso as proximal_group_lasso,
)
from sparse_optax.transforms.l1_decay import L1DecayState as L1DecayState
from sparse_optax.transforms.l1_decay import add_l1_decay as add_l1_decay
from sparse_optax.transforms.mixture import MixtureState as MixtureState
from sparse_optax.transforms.mixture import share_weights as share_weights
from sparse_optax.transforms.sampling import HardConcreteState as HardConcreteState
from sparse_optax.transforms.sampling import (
    VariationalDropoutState as VariationalDropoutState,
)
from sparse_optax.transforms.sampling import final_weights as final_weights
from sparse_optax.transforms.sampling import sample_weights as sample_weights
