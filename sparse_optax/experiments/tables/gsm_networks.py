"""GSM on LeNet-5, the networks of CIFAR-10 and ResNet-50, pruned without retraining.

LeNet-5: recipe of ``gsm_lenet300``, all 60,000 images, at 125x and 300x, as in the
paper and settled from epoch 160 on. ResNet-56 and DenseNet-40: the released recipe,
batch 64, momentum 0.98 without Nesterov, weight decay 1e-4 on kernels, learning rate
5e-3 times 0.1 after epochs 400 and 500 of 600, from a dense network of 500 epochs;
zero-pad 4, random crop and flip, pixels in [-1, 1]. Beside ResNet-56 at 10x network
surgery from the same dense network, with as many epochs. ResNet-50 on ImageNet: batch
64, momentum 0.98, learning rate 1e-3 times 0.1 after epochs 40 and 50 of 60, from a
dense network of 100 epochs; its errors are top-1, on the 50,000 validation images.
Errors of the last epoch, after the cut; the paper gives one accuracy a line without
runs or errors.

References:
  Ding et al., `Global sparse momentum SGD for pruning very deep neural networks
  <https://arxiv.org/abs/1909.12778>`_, 2019.
"""

from typing import Any

from sparse_optax.experiments import recipes
from sparse_optax.experiments.config import Base
from sparse_optax.experiments.tables import common, published

SEEDS = range(2)
# Network, name of the size, density, top-1 accuracy after the cut.
PAPER = (
    ("lenet-5-caffe", "125x", 1 / 125, 99.22),
    ("lenet-5-caffe", "300x", 1 / 300, 99.06),
    ("resnet-56", "6.6x", 0.15, 94.10),
    ("resnet-56", "10x", 0.1, 93.80),
    ("densenet-40", "6.6x", 0.15, 94.07),
    ("densenet-40", "8x", 0.125, 94.02),
    ("densenet-40", "10x", 0.1, 93.90),
    ("resnet-50", "4x", 0.25, 75.33),
    ("resnet-50", "5x", 0.2, 74.30),
)
_CIFAR: dict[str, Any] = dict(dataset="cifar10", split="full", nesterov=False)
_MNIST: dict[str, Any] = dict(dataset="mnist", split="full")
_IMAGENET = _CIFAR | dict(dataset="imagenet")
_DATA = {"lenet-5-caffe": _MNIST, "resnet-50": _IMAGENET}


def _lines():
    for model, size, density, accuracy in PAPER:
        lenet = model == "lenet-5-caffe"
        options = _DATA.get(model, _CIFAR) | dict(
            model=model, method="gsm", density=density
        )
        paper = common.Paper(round(100 - accuracy, 2))
        label = f"{model} at {size}"
        yield f"{model}_{size}_plain", published.Line(f"{label}, GSM", options, paper)
        if lenet:
            settled = published.Line(
                f"{label}, GSM settled", options | dict(settle_epoch=160), paper
            )
            yield f"{model}_{size}_settled", settled
    gsm = recipes.GSM_RECIPES["cifar10"]
    surgery = _CIFAR | dict(
        model="resnet-56",
        method="network_surgery",
        density=0.1,
        decay="kernels",
        init="xavier",
        base=Base(**gsm["base"]),
        **{key: value for key, value in gsm.items() if key != "base"},
    )
    yield (
        "resnet-56_10x_network_surgery",
        published.Line("resnet-56 at 10x, network surgery", surgery),
    )


LINES = dict(_lines())
ROWS = published.rows(LINES, SEEDS)


def render(records):
    """One line a network, size and variant; then the bases and the gaps."""
    gaps = []
    for group, line in LINES.items():
        ours = [r for r in common.group(ROWS, records, group) if "gap" in r.results]
        if not ours:
            continue
        before = [r.results["test_error_before_cut"] for r in ours]
        alive = [r.results["gap"]["alive"] / r.results["gap"]["kept"] for r in ours]
        base = [r.base["results"]["test_error"] for r in ours if r.base]
        numbers = (common.mean_se(values) for values in (base, before, alive))
        gaps.append([line.label, *numbers])
    header = ["GSM", "base error %", "before the cut", "alive / kept"]
    more = "\n\n" + common.markdown(header, gaps) if gaps else ""
    found = published.render(LINES, ROWS, records, first="GSM")
    return found + more + published.NOTE


TABLE = common.Table("gsm_networks", "GSM on deeper networks", ROWS, render)
