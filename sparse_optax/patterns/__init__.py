r"""Patterns: weights that stand and fall together, or so many of a few.

A *unit* is what a method keeps or removes as a whole. A pattern cuts each leaf into
units; methods then see one number a unit, the sum of :math:`|x|` over its weights, and
their masks are spread over the weights again:

===========================  ========================================================
``blocks(rows, columns)``    rectangles of the last two axes
``output_units()``           whole columns: the weights of one output unit or channel
``slices()``                 the spatial slices of convolution kernels
``n_m(n, m)``                single weights, n of each m along the contraction axis
===========================  ========================================================

Axes are those of flax and haiku: a dense kernel is (in, out), a convolution kernel
(height, width, in, out). In both the contraction axis, along which products are summed,
is the last but one. For other layouts give the axes.

Units should not reach over devices; on a mesh with Explicit axes an axis that is cut
into units must not be sharded, since JAX splits no sharded axis there.

A pattern is a tuple and not a function, since ``optax.inject_hyperparams`` takes
everything callable for a schedule.
"""

from sparse_optax.patterns.kinds import Pattern as Pattern
from sparse_optax.patterns.kinds import blocks as blocks
from sparse_optax.patterns.kinds import n_m as n_m
from sparse_optax.patterns.kinds import output_units as output_units
from sparse_optax.patterns.kinds import slices as slices
from sparse_optax.patterns.units import check as check
from sparse_optax.patterns.units import follows as follows
from sparse_optax.patterns.units import grid as grid
from sparse_optax.patterns.units import layer_sums as layer_sums
from sparse_optax.patterns.units import spread as spread
from sparse_optax.patterns.units import unit_costs as unit_costs
from sparse_optax.patterns.units import unit_size as unit_size
from sparse_optax.patterns.units import view as view
from sparse_optax.patterns.units import view_shape as view_shape
from sparse_optax.patterns.units import whole_units as whole_units
