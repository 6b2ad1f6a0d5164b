"""Tables of the papers, one file each: the runs they need and how they read.

A table is an entry of :data:`TABLES`. ``sparse-optax reproduce NAME`` runs the rows
whose records are missing from ``results/NAME/``; ``sparse-optax tables`` renders what
is there.
"""

from sparse_optax.experiments.tables import (
    ablation_lenet300,
    bn_lenet300,
    digits_lenet300,
    gsm_lenet300,
    methods_lenet300,
    mnist_lenet5,
    mnist_lenet300,
    recipes_lenet300,
    ticket_lenet300,
)
from sparse_optax.experiments.tables.common import Table, Turn

TABLES: dict[str, Table] = {
    module.TABLE.name: module.TABLE
    for module in (
        mnist_lenet300,
        mnist_lenet5,
        gsm_lenet300,
        methods_lenet300,
        bn_lenet300,
        recipes_lenet300,
        ablation_lenet300,
        ticket_lenet300,
        digits_lenet300,
    )
}

# What ``reproduce`` without the name of a table runs: first what decides a question
# soonest; then, table by table, whatever is left.
QUEUE: tuple[Turn, ...] = (
    Turn("mnist_lenet5", seeds=3),
    *(Turn(name) for name in TABLES),
)
