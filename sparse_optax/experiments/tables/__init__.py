"""Tables of the papers, one file each: the runs they need and how they read.

A table is an entry of :data:`TABLES`. ``sparse-optax reproduce NAME`` runs the rows
whose records are missing from ``results/NAME/``; ``sparse-optax tables`` renders what
is there.
"""

from sparse_optax.experiments.tables import (
    ablation_lenet300,
    ablation_networks,
    bn_lenet300,
    cifar10_lee,
    cifar10_short,
    digits_lenet300,
    gsm_lenet300,
    gsm_networks,
    methods_lenet300,
    mnist_lenet5,
    mnist_lenet300,
    others_lenet300,
    recipes_lenet300,
    resnet50_mostafa,
    text_transformer,
    ticket_gsm,
    ticket_lenet300,
    wrn28_mostafa,
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
        others_lenet300,
        recipes_lenet300,
        ablation_lenet300,
        ticket_lenet300,
        digits_lenet300,
        gsm_networks,
        ticket_gsm,
        ablation_networks,
        cifar10_short,
        text_transformer,
        cifar10_lee,
        wrn28_mostafa,
        resnet50_mostafa,
    )
}

_IMAGENET = resnet50_mostafa.TABLE.name
# What ``reproduce`` without the name of a table runs: first what decides a question
# soonest; then, table by table, whatever is left.
QUEUE: tuple[Turn, ...] = (
    Turn("mnist_lenet5", seeds=3),
    Turn("mnist_lenet5"),
    Turn("gsm_networks", "lenet-5-caffe_.*"),
    Turn("ticket_gsm", "lenet-300-100_.*"),
    Turn("ticket_gsm", "lenet-5-caffe_.*", seeds=2),
    Turn("ablation_networks", "lenet-5-caffe_.*"),
    Turn("cifar10_short", "dense_.*|.*_d0.1_.*", seeds=1),
    Turn("cifar10_short", ".*_d0.05_.*", seeds=1),
    Turn("cifar10_short", seeds=1),
    Turn("text_transformer", seeds=1),
    Turn("cifar10_short"),
    Turn("text_transformer"),
    # Rows of ImageNet, of weeks each, are run only where they are asked for.
    Turn("gsm_networks", "(?!resnet-50).*"),
    *(Turn(name) for name in TABLES if name not in ("gsm_networks", _IMAGENET)),
)
