"""The inputs of layers: what the program of a network multiplies by each kernel.

The network is traced, not read: it works for functions of every library. A layer is
found where the program multiplies a kernel, or its transpose, by something else.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparse_optax.checks import ArgumentError, boundary
from sparse_optax.export.compaction.program import Equation, Program, Value, trace
from sparse_optax.layers import PyTree, Where, layers_of
from sparse_optax.scoring.batches import Leaves, Split, split

# Operations into whose bodies is not looked.
_LOOPS = ("scan", "while", "cond")
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
    own, rest = program.inputs[: len(chosen)], program.inputs[len(chosen) :]
    facts = _Facts(
        {x: (i, tuple(range(len(x.shape)))) for i, x in enumerate(own)},
        {x: {i} for i, x in enumerate(own)},
        set(rest),
    )
    _run(program, [*chosen, *jax.tree.leaves(batch)], facts)
    found = facts.found
    for i, name in enumerate(names):
        axes = {tap.axes for tap in found.get(i, ())}
        if len(axes) != 1 or i in facts.unseen:
            what = "by no product of dense layers"
            if axes:
                what = facts.unseen.get(i, "along several axes")
            raise ArgumentError(
                f"`forward` uses {name!r} {what}; it must multiply each layer by its "
                "inputs, outside of loops. Leave the leaf out with where=lambda name, "
                "leaf: ..., as convolutions and layers of `nn.scan` must be."
            )
    return found


@dataclasses.dataclass
class _Facts:
    """What is known of the values of a program that is run.

    Attributes:
      kernels: those that are a kernel or its transpose.
      made_of: the kernels that a value is computed from.
      moving: those that depend on the batch.
      found: the uses of each kernel.
      unseen: how else a kernel is used, in a way whose inputs are not seen.
    """

    kernels: dict[Value, _Kernel]
    made_of: dict[Value, set[int]]
    moving: set[Value]
    found: dict[int, list[Tap]] = dataclasses.field(default_factory=dict)
    unseen: dict[int, str] = dataclasses.field(default_factory=dict)

    def hand_over(self, source: Sequence[Value], target: Sequence[Value]) -> None:
        """Values of a body are those that it was called with, and its results."""
        for a, b in zip(source, target, strict=True):
            self.made_of[b] = self.made_of.get(a, set())
            self.kernels.pop(b, None)
            if a in self.kernels:
                self.kernels[b] = self.kernels[a]
            (self.moving.add if a in self.moving else self.moving.discard)(b)

    def follow(self, eqn: Equation) -> None:
        """What the results of an operation are made of."""
        made = set().union(*(self.made_of.get(x, ()) for x in eqn.inputs))
        moving = any(x in self.moving for x in eqn.inputs)
        for y in eqn.outputs:
            self.made_of[y] = made
            (self.moving.add if moving else self.moving.discard)(y)

    def check(self, eqn: Equation) -> None:
        """Notes kernels whose inputs cannot be seen here."""
        if eqn.name in _LOOPS:
            for x in eqn.inputs:
                if x in self.kernels:
                    why = "inside of a loop or a branch"
                    self.unseen.setdefault(self.kernels[x][0], why)
        if eqn.name not in ("dot_general", "conv_general_dilated"):
            return
        for x, other in (eqn.inputs[:2], eqn.inputs[1::-1]):
            direct = x in self.kernels and eqn.name == "dot_general"
            if other in self.moving and x not in self.moving and not direct:
                for i in self.made_of.get(x, ()):
                    why = "in a product after other operations, or in a convolution"
                    self.unseen.setdefault(i, why)


def _run(program: Program, values: Sequence[Any], facts: _Facts) -> list[Any]:
    """Evaluates a program and notes what meets a kernel on the way."""
    at = {**program.constants, **dict(zip(program.inputs, values, strict=True))}
    for eqn in program.equations:
        given = [at[x] for x in eqn.inputs]
        _follow(eqn, facts.kernels)
        facts.check(eqn)
        if eqn.name == "dot_general":
            _note(eqn, given, facts)
        facts.follow(eqn)
        body = eqn.body
        if body is None or eqn.name in _LOOPS:  # only its results are seen
            results = eqn.call(*given)
        else:
            facts.hand_over(eqn.inputs, body.inputs)
            results = _run(body, given, facts)
            facts.hand_over(body.outputs, eqn.outputs)
        at.update(zip(eqn.outputs, results, strict=True))
    return [at[x] for x in program.outputs]


def _follow(eqn: Equation, kernels: dict[Value, _Kernel]) -> None:
    """Where a result is a kernel again, or its transpose."""
    for y in eqn.outputs:  # of a body that is called again
        kernels.pop(y, None)
    if len(eqn.inputs) != 1 or eqn.inputs[0] not in kernels:
        return
    leaf, order = kernels[eqn.inputs[0]]
    if eqn.name == "transpose":
        order = tuple(order[axis] for axis in eqn.params["permutation"])
    elif eqn.name not in _SAME:
        return
    kernels[eqn.outputs[0]] = (leaf, order)


def _note(eqn: Equation, given: Sequence[Any], facts: _Facts) -> None:
    """The inputs of a product of a kernel and what depends on the batch."""
    kernels = facts.kernels
    summed, batched = eqn.params["dimension_numbers"]
    for side, other in ((0, 1), (1, 0)):
        kernel = kernels.get(eqn.inputs[side])
        if kernel is None or eqn.inputs[other] not in facts.moving or batched[side]:
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
        facts.found.setdefault(leaf, []).append(tap)


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
      ValueError: If a leaf that takes part is used otherwise, too, than in products of
        dense layers with what the batch gives: in convolutions, inside of loops and
        branches as ``nn.scan``, or in a product after other operations, as under
        spectral norm.

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
