"""The makers of budgets: they check their arguments and give a record."""

import math
from collections.abc import Iterable, Mapping

import jax

from sparse_optax.budgets.apportion import (
    as_fraction,
    check_density,
    check_whole,
    plain,
)
from sparse_optax.budgets.records import (
    ErdosRenyi,
    ErdosRenyiKernel,
    Linear,
    Nonzeros,
    NumBytes,
    NumFlops,
    Uniform,
    check_axes,
    options,
)
from sparse_optax.leaves import PyTree, is_hole, leaf_names


def count(d: float, n: int) -> int:
    r"""Number of weights that a density keeps: the one rounding rule of this package.

    .. math:: \lfloor \mathrm{frac}(d) \cdot n \rfloor

    with frac(d) the closest fraction to d whose denominator is at most 10**9, so that
    0.29 means 29/100 although the float lies below it. No floating-point product is
    taken: the result is exact for any n.

    Args:
      d: Density, the fraction of weights to keep, in (0, 1].
      n: Number of weights, an integer of at least 0.

    Returns:
      A Python integer in [0, n].

    Raises:
      ValueError: If ``d`` is outside (0, 1] or ``n`` is negative.

    Examples:
      >>> from sparse_optax import budgets
      >>> budgets.count(0.29, 100), budgets.count(0.1, 8_000_000_000)
      (29, 800000000)
    """
    return math.floor(check_density(d, "count", "d") * check_whole(n, "count", 0))


def uniform(
    density: float,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> Uniform:
    r"""The same density in every layer.

    .. math:: k_l \approx d N_l, \qquad \sum_l k_l = \lfloor d N \rfloor

    Args:
      density: d, the fraction of weights to keep, in (0, 1]. It is met by the total
        over all leaves that take part, those in ``overrides`` and ``dense`` included.
      overrides: ``{leaf name: density}`` to keep to; the other leaves are solved for.
      dense: Names of leaves that keep every weight and still count in the total: a
        leaf may start dense and be pruned later.

    Returns:
      A budget.

    Raises:
      ValueError: If a density is outside (0, 1], or a leaf is in both options; and by
        ``counts`` where the total cannot be met or a name is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> lenet = [jnp.zeros((784, 300)), jnp.zeros((300, 100)), jnp.zeros((100, 10))]
      >>> budgets.uniform(0.01).counts(lenet)
      [2352, 300, 10]
      >>> budgets.uniform(0.01, dense=["2"]).counts(lenet)
      [1474, 188, 1000]

    References:
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019, where every layer starts at the same
      density, drawn weight by weight; here the counts are exact.
    """
    check_density(density, "uniform")
    return Uniform(density, *options("uniform", overrides, dense))


def erdos_renyi(
    density: float,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
    axes: tuple[int, int] = (-2, -1),
) -> ErdosRenyi:
    r"""Wide layers sparser: density proportional to (n_in + n_out) / (n_in n_out).

    .. math:: k_l = \varepsilon \frac{n_{in} + n_{out}}{n_{in} n_{out}} N_l,
              \qquad \sum_l k_l = \lfloor d N \rfloor

    A layer that would keep more than it has becomes dense, and epsilon is solved again
    over the rest. The spatial size of a kernel plays no part in its density, see
    ``erdos_renyi_kernel``.

    Args:
      density: d, the fraction of weights to keep over all leaves, in (0, 1].
      overrides: ``{leaf name: density}`` to keep to; the other leaves are solved for.
      dense: Names of leaves that keep every weight and still count in the total.
      axes: The axes of a layer that count its inputs and outputs: the last two in
        flax and haiku, (0, 1) for the convolutions of equinox.

    Returns:
      A budget.

    Raises:
      ValueError: If a density is outside (0, 1], a leaf is in both options or the
        axes are equal; and by ``counts`` where the total cannot be met, a name is
        unknown or a layer lacks the axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> lenet = [jnp.zeros((784, 300)), jnp.zeros((300, 100)), jnp.zeros((100, 10))]
      >>> budgets.erdos_renyi(0.01).counts(lenet)
      [1810, 668, 184]

    References:
      Mocanu et al, `Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity <https://arxiv.org/abs/1707.04780>`_, 2018.
    """
    check_density(density, "erdos_renyi")
    fixed = options("erdos_renyi", overrides, dense)
    return ErdosRenyi(density, *fixed, check_axes("erdos_renyi", axes))


def erdos_renyi_kernel(
    density: float,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> ErdosRenyiKernel:
    r"""Large layers sparser: density proportional to sum(shape) / prod(shape), ERK.

    .. math:: k_l = \varepsilon \sum_i shape_{l,i}, \qquad
              \sum_l k_l = \lfloor d N \rfloor

    A layer that would keep more than it has becomes dense, and epsilon is solved again
    over the rest. For matrices this is ``erdos_renyi``. The order of the axes plays no
    part, so that it fits every library's convolutions.

    Args:
      density: d, the fraction of weights to keep over all leaves, in (0, 1].
      overrides: ``{leaf name: density}`` to keep to; the other leaves are solved for.
      dense: Names of leaves that keep every weight and still count in the total.

    Returns:
      A budget.

    Raises:
      ValueError: If a density is outside (0, 1], or a leaf is in both options; and by
        ``counts`` where the total cannot be met or a name is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> net = {"conv": jnp.zeros((3, 3, 16, 32)), "head": jnp.zeros((32, 10))}
      >>> budgets.erdos_renyi_kernel(0.1).counts(net)
      {'conv': 277, 'head': 215}

    References:
      Evci et al, `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020.
    """
    check_density(density, "erdos_renyi_kernel")
    fixed = options("erdos_renyi_kernel", overrides, dense)
    return ErdosRenyiKernel(density, *fixed)


def linear(
    density: float,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
    axes: tuple[int, int] = (-2, -1),
) -> Linear:
    r"""Weights in proportion to neurons: count proportional to n_in + n_out.

    .. math:: k_l = \min(\varepsilon (n_{in} + n_{out}) + c, N_l), \qquad
              \sum_l k_l = \lfloor d N \rfloor

    with epsilon such that the counts add up before any layer is cut off at its size,
    and c the equal share of every other layer in what those cannot take (or must take
    to have one weight).

    It is the sentence behind the Erdos-Renyi rules taken literally, with channels for
    neurons. It differs from ``erdos_renyi`` where kernels have a spatial size: there
    a count grows with the kernel's area, here it does not. It differs from
    ``erdos_renyi_kernel`` in that the sides of the kernel are not added. And it differs
    from both in what becomes of the excess, which they divide in proportion.

    Differences from the reference code: the initialisation called "linear" in the
    released code of sparse momentum gives a layer epsilon * sum(shape) weights, which
    is ``erdos_renyi_kernel`` as long as no layer is full; there the excess of a full
    layer is lost, and masks are drawn weight by weight. Use ``erdos_renyi_kernel`` to
    come closest to it.

    Args:
      density: d, the fraction of weights to keep over all leaves, in (0, 1].
      overrides: ``{leaf name: density}`` to keep to; the other leaves are solved for.
      dense: Names of leaves that keep every weight and still count in the total.
      axes: The axes of a layer that count its inputs and outputs: the last two in
        flax and haiku, (0, 1) for the convolutions of equinox.

    Returns:
      A budget.

    Raises:
      ValueError: If a density is outside (0, 1], a leaf is in both options or the
        axes are equal; and by ``counts`` where the total cannot be met, a name is
        unknown or a layer lacks the axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> net = {"conv": jnp.zeros((3, 3, 16, 32)), "head": jnp.zeros((32, 10))}
      >>> budgets.linear(0.1).counts(net)
      {'conv': 262, 'head': 230}

    References:
      Mocanu et al, `Scalable Training of Artificial Neural Networks with Adaptive
      Sparse Connectivity <https://arxiv.org/abs/1707.04780>`_, 2018.
      Dettmers and Zettlemoyer, `Sparse Networks from Scratch
      <https://arxiv.org/abs/1907.04840>`_, 2019.
    """
    check_density(density, "linear")
    fixed = options("linear", overrides, dense)
    return Linear(density, *fixed, check_axes("linear", axes))


def nonzeros(
    n: int,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> Nonzeros:
    r"""A number of weights, at the same density in every layer.

    .. math:: k_l \approx n N_l / N, \qquad \sum_l k_l = n

    Args:
      n: Number of weights to keep over all leaves, from the number of layers to the
        number of weights.
      overrides: ``{leaf name: density}`` to keep to; the other leaves are solved for.
      dense: Names of leaves that keep every weight and still count in the total.

    Returns:
      A budget.

    Raises:
      ValueError: If ``n`` is not a whole number of at least 1, a density is outside
        (0, 1], or a leaf is in both options; and by ``counts`` where the total cannot
        be met or a name is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> budgets.nonzeros(5).counts([jnp.zeros((10, 10)), jnp.zeros((2, 2))])
      [4, 1]
    """
    fixed = options("nonzeros", overrides, dense)
    return Nonzeros(check_whole(n, "nonzeros"), *fixed)


def num_bytes(
    n: int,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> NumBytes:
    r"""As many weights as fit in a number of bytes, at the same density in every layer.

    .. math:: \sum_l k_l \, \mathrm{bytes}_l + \lceil N / 8 \rceil \le n

    Stored are the values of kept weights, at the width of the leaf's dtype, and a mask
    of one bit for every weight that may be missing, kept or not, all bits end to end.
    Leaves that do not take part (biases, norms) come on top. (``masks.pack`` rounds
    each row of a mask up to whole bytes and so takes slightly more.)

    Where all leaves have one dtype this is the largest number of weights that fits.
    With several dtypes each layer is within one weight of the density they share.
    When ``n`` holds the whole network, nothing is pruned.

    Args:
      n: Number of bytes, at least 1; 4e6 is four megabytes.
      overrides: ``{leaf name: density}`` to keep to; the other leaves are solved for.
      dense: Names of leaves that keep every weight and still count in the total.

    Returns:
      A budget.

    Raises:
      ValueError: If ``n`` is not a whole number of at least 1, a density is outside
        (0, 1], or a leaf is in both options; and by ``counts`` where not even one
        weight a layer fits or a name is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> params = {"w": jnp.zeros((100, 80))}  # 32,000 bytes when dense
      >>> budgets.num_bytes(5000).counts(params)  # 1,000 bytes of mask, 1,000 floats
      {'w': 1000}
    """
    return NumBytes(
        check_whole(n, "num_bytes"), *options("num_bytes", overrides, dense)
    )


def num_flops(
    n: float,
    costs: PyTree,
    *,
    overrides: Mapping[str, float] | None = None,
    dense: Iterable[str] = (),
) -> NumFlops:
    r"""The largest density, the same in every layer, whose cost fits.

    .. math:: \sum_l k_l \, cost_l \le n

    The shares at the largest density are rounded down; what that leaves of n is given
    to the layers with the largest fractional part, one weight each, where it still
    fits. When ``n`` pays for the whole network, nothing is pruned. Any cost that adds
    up weight by weight will do, for instance measured nanoseconds.

    Args:
      n: What the kept weights may cost together: FLOPs per example, above 0.
      costs: FLOPs per kept weight, a number of at least 0 for each leaf that takes
        part: 2 for a dense layer, 2 * height * width of the output for a
        convolution. A tree like the parameters or a dict ``{leaf name: number}``.
      overrides: ``{leaf name: density}`` to keep to; the other leaves are solved for.
      dense: Names of leaves that keep every weight and still count in the total.

    Returns:
      A budget.

    Raises:
      ValueError: If a cost or ``n`` is negative or not finite, a density is outside
        (0, 1], or a leaf is in both options; and by ``counts`` where not even one
        weight a layer fits, a cost is missing or a name is unknown.

    Examples:
      >>> import jax.numpy as jnp
      >>> from sparse_optax import budgets
      >>> net = {"conv": jnp.zeros((3, 3, 1, 16)), "head": jnp.zeros((64, 10))}
      >>> budgets.num_flops(60_000, {"conv": 2 * 28 * 28, "head": 2}).counts(net)
      {'conv': 38, 'head': 170}
    """
    pairs = []
    flat = jax.tree.leaves(costs, is_leaf=is_hole)
    for name, cost in zip(leaf_names(costs), flat, strict=True):
        if is_hole(cost):
            continue
        value = as_fraction(cost, "num_flops", f"costs[{name!r}]", decimal=True)
        if value < 0:
            raise ValueError(
                "num_flops: `costs` must be finite numbers of at least 0; got "
                f"{cost!r} for {name!r}. Give the FLOPs of one kept weight."
            )
        pairs.append((name, plain(value)))
    amount = as_fraction(n, "num_flops", "n", decimal=True)
    if amount <= 0:
        raise ValueError(
            f"num_flops: `n` must be a finite number above 0; got {n!r}. Give the "
            "FLOPs that the kept weights may cost together."
        )
    return NumFlops(
        plain(amount), tuple(pairs), *options("num_flops", overrides, dense)
    )
