"""The engine of dynamic sparsity, ``regrow``, and its rules.

README.md in this folder explains the algebra and how to write a rule.

- ``engine``: ``regrow``: what happens at ``init``, at an update, at a cycle.
- ``start``: the arguments, checked, and the first masks.
- ``targets``: the counts that a ramp asks for.
- ``cycle``: prune, redistribute, grow, as one pure function.
- ``rules``: ``Evidence``, what a rule sees, and ``Rule``, what it is.
- ``prune``, ``redistribute``, ``grow``: the rules.
- ``at_once``: one search for prune and growth where both rank hidden weights.
- ``exchange``: a prune in one pool and an exchange within layers, for GraNet.
- ``under_pattern``: the rules that keep the number of weights under a pattern.
- ``allocate``: whole counts for each layer, in integer arithmetic.
- ``restart``: the moments of weights that have just grown, as ``init`` gives them.
- ``inner``: the update of the wrapped optimizer, and what a line search in it sees.
- ``momentum``: finds the momentum that an optimizer keeps already.
- ``projection``: a penalty towards the largest weights, for learning-compression.
- ``guard``: runs a cycle only where it is due, also under ``vmap``.
"""

from sparse_optax.regrowth import grow as grow
from sparse_optax.regrowth import prune as prune
from sparse_optax.regrowth import redistribute as redistribute
from sparse_optax.regrowth.cycle import Cycle as Cycle
from sparse_optax.regrowth.cycle import cycle as cycle
from sparse_optax.regrowth.engine import RegrowState as RegrowState
from sparse_optax.regrowth.engine import regrow as regrow
from sparse_optax.regrowth.rules import Evidence as Evidence
from sparse_optax.regrowth.rules import PerWeight as PerWeight
from sparse_optax.regrowth.rules import Rule as Rule
from sparse_optax.regrowth.rules import stateless as stateless
