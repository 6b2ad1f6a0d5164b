r"""How many weights each layer may keep.

A *budget* is a small immutable record with a method ``counts(params)`` that gives a
tree of whole numbers, one for each leaf that takes part. Wherever this package takes a
``density``, a float in (0, 1] means ``uniform(density)`` and a budget may stand in its
place. What it is asked for is what the network gets, exactly:

================================  ==============================================
``uniform(d)``                    the same density in every layer
``erdos_renyi(d)``                density proportional to (n_in + n_out) / (n_in n_out)
``erdos_renyi_kernel(d)``         density proportional to sum(shape) / prod(shape)
``linear(d)``                     count proportional to n_in + n_out
``nonzeros(n)``                   n weights at one density
``num_bytes(n)``                  what fits in n bytes at one density
``num_flops(n, costs)``           what costs at most n FLOPs at one density
================================  ==============================================

Counts are worked out on the host, in integers and fractions, from shapes alone. The
rules that all budgets keep: the total is exact; every layer keeps at least one weight
and at most its size; what is left over by rounding down goes to the layers with the
largest fractional part, ties to the earlier one. A *layer* is a leaf, or one slice of a
leaf named in ``stacked``. Budgets are not callable, since ``optax.inject_hyperparams``
takes anything callable for a schedule.
"""

from sparse_optax.budgets.densities import Pool as Pool
from sparse_optax.budgets.densities import check_static as check_static
from sparse_optax.budgets.densities import pool as pool
from sparse_optax.budgets.densities import pool_size as pool_size
from sparse_optax.budgets.densities import resolve as resolve
from sparse_optax.budgets.densities import total as total
from sparse_optax.budgets.factories import count as count
from sparse_optax.budgets.factories import erdos_renyi as erdos_renyi
from sparse_optax.budgets.factories import erdos_renyi_kernel as erdos_renyi_kernel
from sparse_optax.budgets.factories import linear as linear
from sparse_optax.budgets.factories import nonzeros as nonzeros
from sparse_optax.budgets.factories import num_bytes as num_bytes
from sparse_optax.budgets.factories import num_flops as num_flops
from sparse_optax.budgets.factories import uniform as uniform
from sparse_optax.budgets.records import Budget as Budget
from sparse_optax.budgets.records import ErdosRenyi as ErdosRenyi
from sparse_optax.budgets.records import ErdosRenyiKernel as ErdosRenyiKernel
from sparse_optax.budgets.records import Linear as Linear
from sparse_optax.budgets.records import Nonzeros as Nonzeros
from sparse_optax.budgets.records import NumBytes as NumBytes
from sparse_optax.budgets.records import NumFlops as NumFlops
from sparse_optax.budgets.records import Uniform as Uniform
