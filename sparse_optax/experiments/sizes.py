"""Sizes of a network that a run may ask for: weights, bytes of its file, or FLOPs.

A size becomes a density, so that all methods and shares take it: the largest density at
which the finished network has this size or less.
"""

import bisect
import functools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_optax import budgets
from sparse_optax.checks import ArgumentError
from sparse_optax.experiments import checkpoints, data, models
from sparse_optax.layers import layers_of

# What a unit stands for; prefixes are powers of 1000, with an i powers of 1024.
_PREFIXES = {
    "": 1,
    **{name: 1000 ** (i + 1) for i, name in enumerate("KMGT")},
    **{f"{name}I": 1024 ** (i + 1) for i, name in enumerate("KMGT")},
}
_PATTERN = re.compile(
    r"([0-9][0-9_]*(?:\.[0-9]+)?(?:E[0-9]+)?) *([KMGT]I?)?(B|FLOPS?)?"
)
_BESIDES = {"bytes": ", and in a file biases, statistics and header"}
_EXAMPLES = "13310 (weights), 200KB, 1.5KiB, 2MB (of the file) or 10MFLOPs (an image)"
# The budget of a density, by how it is shared among the layers.
SHARES: dict[str, Callable[[float], Any]] = {
    "uniform": budgets.uniform,
    "erdos_renyi": budgets.erdos_renyi,
    "erdos_renyi_kernel": budgets.erdos_renyi_kernel,
    "linear": budgets.linear,
}
# Image shape and classes of the data sets that need not be loaded to be known.
IMAGES: dict[str, tuple[tuple[int, ...], int]] = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion-mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
}


class Size(NamedTuple):
    """A size that a network is to have at most.

    Attributes:
      amount: how many, a whole number of at least 1.
      unit: ``"weights"``, ``"bytes"`` of the file of its weights, or ``"FLOPs"`` of its
        kept weights for one image, two for a multiplication and an addition.
    """

    amount: int
    unit: str

    def __str__(self) -> str:
        """The one text of this size, which :func:`parse` reads."""
        if self.unit == "weights":
            return str(self.amount)
        suffix = "B" if self.unit == "bytes" else "FLOPs"
        prefix = max(
            (name for name in ("", *"KMGT") if not self.amount % _PREFIXES[name]),
            key=_PREFIXES.__getitem__,
        )
        return f"{self.amount // _PREFIXES[prefix]}{prefix}{suffix}"


def parse(text: str) -> Size:
    """Reads a size.

    Args:
      text: a number of weights; or a number with a unit, ``B`` for bytes of the file or
        ``FLOPs`` for one image, with K, M, G or T before it for powers of 1000, or Ki,
        Mi, Gi, Ti for powers of 1024. Upper and lower case are the same; what is no
        whole number of bytes or FLOPs is rounded down.

    Returns:
      The size.

    Raises:
      ValueError: for anything else.

    Examples:
      >>> from sparse_optax.experiments import sizes
      >>> sizes.parse("200KB"), str(sizes.parse("1.5KiB"))
      (Size(amount=200000, unit='bytes'), '1536B')
    """
    found = _PATTERN.fullmatch(text.strip().upper())
    amount = Fraction(0)
    if found:
        number, prefix, unit = found.groups()
        amount = Fraction(number.replace("_", "")) * _PREFIXES[prefix or ""]
    if not found or amount < 1 or (not unit and (prefix or amount.denominator > 1)):
        raise ValueError(
            f"TrainConfig: budget={text!r} must be a size of at least 1: {_EXAMPLES}. "
            "Give one of these forms."
        )
    names = {None: "weights", "B": "bytes"}
    return Size(int(amount), names.get(unit, "FLOPs"))


class _Network(NamedTuple):
    """What a size is counted on: shapes alone.

    Attributes:
      params: parameters.
      stats: running statistics.
      apply: the model.
      image: a batch of one image.
      layers: its sparse layers.
    """

    params: Any
    stats: Any
    apply: Callable[..., Any]
    image: Any
    layers: Any

    @property
    def total(self) -> int:
        """All weights that take part."""
        return int(self.layers.sizes.sum())


@functools.cache
def _network(model: str, dataset: str) -> _Network:
    """The shapes of a network."""
    if dataset in IMAGES:
        (shape, classes), dtype = IMAGES[dataset], jnp.float32
    else:
        loaded = data.load(dataset)
        shape, classes = loaded.train_x.shape[1:], loaded.classes
        dtype = loaded.train_x.dtype
    made = []

    def create(key):
        apply, params, stats = models.create_stateful(model, shape, classes, key=key)
        made.append(apply)
        return params, stats

    params, stats = jax.eval_shape(create, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, *shape), dtype)
    return _Network(params, stats, made[0], image, layers_of(params))


@functools.cache
def _costs(model: str, dataset: str) -> dict[str, Any]:
    """FLOPs of one weight of each layer, for one image."""
    network = _network(model, dataset)

    def logits(params, stats, image):
        return network.apply(params, stats, image)[0]

    costs = budgets.flops_per_weight(
        logits, network.params, network.stats, network.image
    )
    return dict(zip(network.layers.names, network.layers.pick(costs), strict=True))


def flops(model: str, dataset: str, kept: dict[str, int]) -> int:
    """FLOPs of the kept weights of a network for one image.

    Args:
      model: name of the network.
      dataset: name of the data set.
      kept: kept weights of each layer.

    Returns:
      The FLOPs, two for a multiplication and an addition.

    Examples:
      >>> from sparse_optax.experiments import sizes
      >>> sizes.flops("lenet-300-100", "digits", {"fc1/kernel": 10, "fc2/kernel": 5})
      30
    """
    costs = _costs(model, dataset)
    return int(sum(costs[name] * count for name, count in kept.items()))


def density(
    size: Size,
    model: str,
    dataset: str,
    shares: str = "uniform",
    *,
    free: bool = False,
) -> float:
    """The largest density at which a network has a size or less.

    Args:
      size: the size.
      model: name of the network.
      dataset: name of the data set.
      shares: how the density is shared among the layers, a key of :data:`SHARES`.
      free: whether the method decides how many weights each layer keeps in the end.

    Returns:
      The density: k of N weights, as the float k / N.

    Raises:
      ValueError: where the size is too small, or holds the whole network, and for
        FLOPs under a method that decides itself what layers of unequal cost keep.

    Examples:
      >>> from sparse_optax.experiments import sizes
      >>> sizes.density(sizes.parse("2510"), "lenet-300-100", "digits")
      0.05
    """
    total, named = _network(model, dataset).total, f"TrainConfig: budget='{size}'"
    kept = _kept(size, model, dataset, SHARES[shares])
    if not kept:
        least = Size(_least(size.unit, model, dataset), size.unit)
        raise ValueError(
            f"{named} must be at least {least} for {model}: one weight in each layer"
            f"{_BESIDES.get(size.unit, '')}. Give more."
        )
    if kept >= total:
        raise ValueError(
            f"{named} must be less than all of {model}: it holds the whole network of "
            f"{total:,} weights, and nothing would be pruned. Give less, or --method "
            "dense."
        )
    costs = sorted(set(_costs(model, dataset).values())) if size.unit == "FLOPs" else ()
    if free and len(costs) > 1:
        raise ValueError(
            f"{named} must be a number of weights or of bytes here: the method decides "
            f"while it runs how many weights each layer keeps, and one weight of "
            f"{model} costs {costs[0]:,} to {costs[-1]:,} FLOPs. Give one of these, or "
            "a method that keeps the shares of the layers."
        )
    return kept / total


def _least(unit: str, model: str, dataset: str) -> int:
    """The smallest size: one weight in each layer."""
    network = _network(model, dataset)
    layers = len(network.layers.leaves)
    if unit == "weights":
        return layers
    if unit == "FLOPs":
        return flops(model, dataset, dict.fromkeys(network.layers.names, 1))

    most = 1
    while not _kept_bytes(most, network):
        most *= 2
    return bisect.bisect_left(
        range(most), 1, key=lambda n: _kept_bytes(n or 1, network)
    )


def _kept(size: Size, model: str, dataset: str, share: Any) -> int:
    """How many weights have this size; 0 where a layer would have none."""
    network = _network(model, dataset)
    layers = len(network.layers.leaves)
    if size.unit == "weights":
        return size.amount if size.amount >= layers else 0
    if size.unit == "bytes":
        return _kept_bytes(size.amount, network)

    def too_many(kept):
        counts = share(kept / network.total).counts(network.params)
        names, flat = network.layers.names, network.layers.pick(counts)
        cost = flops(model, dataset, dict(zip(names, flat, strict=True)))
        return cost > size.amount

    numbers = range(layers, network.total + 1)
    fitting = bisect.bisect_left(numbers, True, key=too_many)
    return numbers[fitting - 1] if fitting else 0


def _kept_bytes(amount: int, network: _Network) -> int:
    """How many weights fit in a file, whichever they are; 0 where a layer has none."""
    tree = checkpoints.joined(network.params, network.stats)
    budget = budgets.num_bytes(amount, tree=tree)
    try:
        return budgets.total(budget.counts(network.params))
    except ArgumentError:
        return 0
