"""How many weights each layer may keep.

A *budget* is a small immutable record; its method ``counts(params)`` gives a tree of
whole numbers, one for each leaf that takes part. Every argument ``density`` of this
package takes a budget, or a float in (0, 1] for ``uniform(density)``:

================================  ==============================================
``uniform(d)``                    the same density in every layer
``erdos_renyi(d)``                density proportional to (n_in + n_out) / (n_in n_out)
``erdos_renyi_kernel(d)``         density proportional to sum(shape) / prod(shape)
``linear(d)``                     count proportional to n_in + n_out
``nonzeros(n)``                   n weights at one density
``num_bytes(n)``                  what fits in a file of n bytes at one density
``num_flops(n, costs)``           what costs at most n FLOPs at one density
================================  ==============================================

Counts are computed on the host from shapes alone, in integers and fractions. The total
is exact. Every layer keeps at least one weight and at most its size. What rounding down
leaves over goes to the layers with the largest fractional part, ties to the earlier
one. A *layer* is a leaf, or one slice of a leaf named in ``stacked``. Budgets are not
callable, since ``optax.inject_hyperparams`` takes every callable for a schedule.

- ``kinds``: the kinds of budgets and the counts that they ask for.
- ``flops``: what a weight costs in a model, for ``num_flops``.
- ``resolve``: counts, or the size of one pool, from whatever gives a density.
- ``water_filling``: exact shares of a total in whole numbers.
"""

from sparse_optax.budgets.flops import flops_per_weight as flops_per_weight
from sparse_optax.budgets.kinds import Budget as Budget
from sparse_optax.budgets.kinds import Shares as Shares
from sparse_optax.budgets.kinds import count as count
from sparse_optax.budgets.kinds import erdos_renyi as erdos_renyi
from sparse_optax.budgets.kinds import erdos_renyi_kernel as erdos_renyi_kernel
from sparse_optax.budgets.kinds import linear as linear
from sparse_optax.budgets.kinds import nonzeros as nonzeros
from sparse_optax.budgets.kinds import num_bytes as num_bytes
from sparse_optax.budgets.kinds import num_flops as num_flops
from sparse_optax.budgets.kinds import uniform as uniform
from sparse_optax.budgets.resolve import Pool as Pool
from sparse_optax.budgets.resolve import pool as pool
from sparse_optax.budgets.resolve import resolve as resolve
from sparse_optax.budgets.resolve import total as total
