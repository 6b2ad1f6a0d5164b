"""The engine of dynamic sparsity: prune, redistribute, grow.

``regrow`` is the one transformation, ``cycle`` one cycle as a pure function; the
rules are in ``prune``, ``redistribute`` and ``grow``. README.md in this folder has
the algebra in one page and how to write a rule.
"""

from sparse_optax.regrowth import allocate as allocate
from sparse_optax.regrowth import grow as grow
from sparse_optax.regrowth import guard as guard
from sparse_optax.regrowth import momentum as momentum
from sparse_optax.regrowth import prune as prune
from sparse_optax.regrowth import redistribute as redistribute
from sparse_optax.regrowth import rules as rules
from sparse_optax.regrowth import signed as signed
from sparse_optax.regrowth import units as units
from sparse_optax.regrowth.cycle import Cycle as Cycle
from sparse_optax.regrowth.cycle import cycle as cycle
from sparse_optax.regrowth.cycle import init_rules as init_rules
from sparse_optax.regrowth.engine import RegrowState as RegrowState
from sparse_optax.regrowth.engine import regrow as regrow
from sparse_optax.regrowth.rules import Evidence as Evidence
from sparse_optax.regrowth.rules import PerWeight as PerWeight
from sparse_optax.regrowth.rules import Rule as Rule
from sparse_optax.regrowth.rules import stateless as stateless
