"""Mask trees: made, combined, stored and read from optimizer states.

A mask tree has the structure of the parameters. A leaf that takes part holds a boolean
array of its shape, True where the weight is kept, or a ``PackedMask``; other leaves are
``optax.MaskedNode()``, a hole, never None.

- ``tree``: what is done with masks that there are: apply, combine, count, pack, fill.
- ``make``: masks of the largest weights, of the highest scores, of the nonzero weights,
  random ones.
- ``controls``: random masks to compare the masks of a method with.
- ``optimizer_state``: masks in an optimizer state: read, replace, apply.
"""

from sparse_optax.layers import PackedMask as PackedMask
from sparse_optax.masks.controls import random_masks_like as random_masks_like
from sparse_optax.masks.controls import shuffle_masks as shuffle_masks
from sparse_optax.masks.make import magnitude_masks as magnitude_masks
from sparse_optax.masks.make import nonzero_masks as nonzero_masks
from sparse_optax.masks.make import random_masks as random_masks
from sparse_optax.masks.make import score_masks as score_masks
from sparse_optax.masks.optimizer_state import get_explored as get_explored
from sparse_optax.masks.optimizer_state import get_masks as get_masks
from sparse_optax.masks.optimizer_state import set_masks as set_masks
from sparse_optax.masks.optimizer_state import sparsify as sparsify
from sparse_optax.masks.tree import apply as apply
from sparse_optax.masks.tree import combine as combine
from sparse_optax.masks.tree import count as count
from sparse_optax.masks.tree import density as density
from sparse_optax.masks.tree import difference as difference
from sparse_optax.masks.tree import fill as fill
from sparse_optax.masks.tree import pack as pack
from sparse_optax.masks.tree import union as union
from sparse_optax.masks.tree import unpack as unpack
