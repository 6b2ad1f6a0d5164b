"""The inputs of layers: what the program of a network multiplies by each kernel.

The network is traced, not read: it works for functions of every library. A layer is
found where the program multiplies a kernel, or its transpose, by something else.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.export.compaction.program import Equation, Program, Value, trace
from sparse_optax.layers import PyTree, Where, layers_of
from sparse_optax.scoring.batches import Leaves, Split, split

# Operations whose result is the kernel itself.
_SAME = ("convert_element_type", "copy", "copy_p", "sharding_constraint")
# Leaf and its axes, in the order that an array has them.
_Kernel = tuple[int, tuple[int, ...]]


class Tap(NamedTuple):
    """One use of a kernel by a network."""

    axes: tuple[int, ...]  # of the leaf, which the product sums over, ascending
    inputs: jax.Array  # (n, in), the lengths of these axes multiplied


def taps(
    forward: Callable[[PyTree, Any], Any],
    parts: Split,
    chosen: Leaves,
    batch: Any,
    names: Sequence[str],
) -> dict[int, list[Tap]]:
    """The uses of each of the chosen leaves, by its number, in the order of use."""
    program, _ = trace(lambda w, x: forward(parts.rebuild(w), x), chosen, batch)
    kernels: dict[Value, _Kernel] = {
        x: (i, tuple(range(len(x.shape))))
        for i, x in enumerate(program.inputs[: len(chosen)])
    }
    found: dict[int, list[Tap]] = {}
    _run(program, [*chosen, *jax.tree.leaves(batch)], kernels, found)
    for i, name in enumerate(names):
        axes = {tap.axes for tap in found.get(i, ())}
        if len(axes) != 1:
            what = "along several axes" if axes else "by no product of dense layers"
            raise ArgumentError(
                f"`forward` uses {name!r} {what}; it must multiply each layer by its "
                "inputs, outside of loops. Leave the leaf out with where=lambda name, "
                "leaf: ..., as convolutions and layers of `nn.scan` must be."
            )
    return found


def _run(
    program: Program,
    values: Sequence[Any],
    kernels: dict[Value, _Kernel],
    found: dict[int, list[Tap]],
) -> list[Any]:
    """Evaluates a program and notes what meets a kernel on the way."""
    at = {**program.constants, **dict(zip(program.inputs, values, strict=True))}
    for eqn in program.equations:
        given = [at[x] for x in eqn.inputs]
        _follow(eqn, kernels)
        if eqn.name == "dot_general":
            _note(eqn, given, kernels, found)
        body = eqn.body
        if body is None or eqn.name == "scan":  # of a loop only the results are seen
            results = eqn.call(*given)
        else:
            _hand_over(eqn.inputs, body.inputs, kernels)
            results = _run(body, given, kernels, found)
            _hand_over(body.outputs, eqn.outputs, kernels)
        at.update(zip(eqn.outputs, results, strict=True))
    return [at[x] for x in program.outputs]


def _hand_over(
    source: Sequence[Value], target: Sequence[Value], kernels: dict[Value, _Kernel]
) -> None:
    for a, b in zip(source, target, strict=True):
        if a in kernels:
            kernels[b] = kernels[a]


def _follow(eqn: Equation, kernels: dict[Value, _Kernel]) -> None:
    """Where a result is a kernel again, or its transpose."""
    if len(eqn.inputs) != 1 or eqn.inputs[0] not in kernels:
        return
    leaf, order = kernels[eqn.inputs[0]]
    if eqn.name == "transpose":
        order = tuple(order[axis] for axis in eqn.params["permutation"])
    elif eqn.name not in _SAME:
        return
    kernels[eqn.outputs[0]] = (leaf, order)


def _note(
    eqn: Equation,
    given: Sequence[Any],
    kernels: dict[Value, _Kernel],
    found: dict[int, list[Tap]],
) -> None:
    """The inputs of a product of a kernel and something else."""
    summed, batched = eqn.params["dimension_numbers"]
    for side, other in ((0, 1), (1, 0)):
        kernel = kernels.get(eqn.inputs[side])
        if kernel is None or eqn.inputs[other] in kernels or batched[side]:
            continue
        leaf, order = kernel
        pairs = sorted(
            (order[own], its)
            for own, its in zip(summed[side], summed[other], strict=True)
        )
        places = [its for _, its in pairs]
        x = jnp.moveaxis(given[other], places, range(-len(places), 0))
        size = math.prod(x.shape[x.ndim - len(places) :])
        tap = Tap(tuple(own for own, _ in pairs), x.reshape(-1, size))
        found.setdefault(leaf, []).append(tap)


@boundary("layer_inputs")
def layer_inputs(
    forward: Callable[[PyTree, Any], Any],
    params: PyTree,
    batch: Any,
    *,
    where: Where | None = None,
) -> dict[str, jax.Array]:
    r"""What the layers of a network are given for a batch, by the name of the kernel.

    The network is traced and its program read, so that nothing is declared and no layer
    is wrapped: with Y the output of a dense layer and W its kernel as a matrix of
    inputs and outputs, it gives X of

    .. math:: Y = X W

    .. note:: Cost: one forward pass. The inputs of all layers are held at once.

    Args:
      forward: ``forward(params, batch)``, the network; its result is not used.
      params: The parameters.
      batch: What the network takes: an array or a tree of arrays.
      where: Which leaves take part, see ``eligible``: by default kernels.

    Returns:
      ``{name: inputs}`` in the order in which the layers are used, each of shape
      (n, in): n places (examples, positions of a text), in inputs. For a kernel that
      sums over several axes, as the output projection of attention does, ``in`` is the
      product of their lengths, in the order of the axes. Uses of one kernel follow each
      other.

    Raises:
      ValueError: If a leaf that takes part is not multiplied by a product of a dense
        layer: convolutions, and layers inside of ``nn.scan``.

    Examples:
      >>> import jax.numpy as jnp, sparse_optax
      >>> params = {"v": jnp.ones((2, 3)), "w": jnp.ones((3, 1))}
      >>> def forward(params, x):
      ...     return jnp.tanh(x @ params["v"]) @ params["w"]
      >>> found = sparse_optax.layer_inputs(forward, params, jnp.ones((5, 2)))
      >>> {name: x.shape for name, x in found.items()}
      {'v': (5, 2), 'w': (5, 3)}
    """
    layers = layers_of(params, where)
    parts = split(params, layers.index)

    def inputs(chosen, batch):
        found = taps(forward, parts, chosen, batch, layers.names)
        order[:] = found
        return [jnp.concatenate([t.inputs for t in found[i]]) for i in found]

    order: list[int] = []
    arrays = jax.jit(inputs)(parts.chosen, batch)
    return {layers.names[i]: x for i, x in zip(order, arrays, strict=True)}
