"""Reductions on any mesh: each device reads its part, small all-reduces add up.

The SPMD partitioner would gather every leaf for the reductions of `passes`, and under
Auto axes no sharding is visible while tracing. So a whole search or tally is one
operation with its own partitioning: it takes the leaves as they are sharded, runs on
local parts, sums over the mesh, and returns a few small replicated arrays.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from sparse_optax.selection.passes import Part, Place, whole
from sparse_optax.selection.plan import Plan, PlannedLeaf

Body = Callable[..., Any]


def places(plan: Plan) -> list[Place]:
    """The places of the arrays of a selection, for code outside of the search."""
    out = [whole(leaf) for leaf in plan.leaves]
    if plan.axis_name is None:
        return out
    shard = lax.axis_index(plan.axis_name).astype(jnp.uint32)
    return [
        place._replace(base=shard * np.uint32(leaf.size))
        for place, leaf in zip(out, plan.leaves, strict=True)
    ]


@contextlib.contextmanager
def of(tree: Any) -> Iterator[None]:
    """Makes the mesh of explicitly sharded arrays the current one. Arrays carry their
    mesh, so Optax needs no ``jax.set_mesh``; `run` and random bits need a current one.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        yield
        return
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    traced = any(isinstance(x, Tracer) for x in leaves)
    for x in leaves:
        # Traced arrays have an abstract mesh; outside of a trace devices are needed.
        sharding = jax.typeof(x).sharding if traced else x.sharding
        mesh = getattr(sharding, "mesh", None)
        if mesh is not None and AxisType.Explicit in mesh.axis_types:
            enter = jax.sharding.use_abstract_mesh if traced else jax.set_mesh
            with enter(mesh):
                yield
            return
    yield


def run(body: Body, plan: Plan, args, *rest) -> Any:
    """``body(part, *rest)`` for any sharding of the leaves."""
    kinds = set(jax.sharding.get_abstract_mesh().axis_types)
    if plan.axis_name is None and AxisType.Manual not in kinds:
        return _operation(body, plan)(args, *rest)
    if AxisType.Manual in kinds and len(kinds) > 1:
        # In a partly manual region only plain sums can be split over the other axes.
        plan = plan._replace(many=False)
    names = plan.axis_name if isinstance(plan.axis_name, tuple) else (plan.axis_name,)
    names = () if plan.axis_name is None else names
    return body(Part(plan, args, places(plan), names), *rest)


@functools.lru_cache(maxsize=1024)
def _operation(body: Body, plan: Plan):
    """A reduction as an operation with rules for partitioning and for vmap."""

    def alone(plan, args, *rest):
        return body(Part(plan, args, places(plan), ()), *rest)

    def partitioned(plan, args, *rest):
        # On several devices only the result types of this body are used. The jit keeps
        # array constants inside, which custom_partitioning does not accept.
        return jax.jit(_automatic(functools.partial(alone, plan)))(args, *rest)

    sharded: Any = custom_partitioning(partitioned, static_argnums=(0,))
    sharded.def_partition(
        partition=functools.partial(_partition, body), sharding_rule=_rule
    )

    def unbatched(args, *rest):
        return sharded(plan, args, *rest)

    operation: Any = jax.custom_batching.custom_vmap(unbatched)

    @operation.def_vmap
    def batched(size, in_batched, args, *rest):
        # custom_partitioning has no rule for vmap; plain sums are slow, but the
        # partitioner splits them.
        plain = plan._replace(many=jax.device_count() == 1)
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        many = jax.vmap(functools.partial(alone, plain), in_axes=axes, axis_size=size)
        found = _automatic(many)(args, *rest)
        return found, jax.tree.map(lambda _: True, found)

    return operation


def _automatic(function: Any) -> Any:
    """A function from sharded arrays to replicated ones, also on an Explicit mesh."""
    kinds = jax.sharding.get_abstract_mesh().axis_types
    if AxisType.Explicit not in kinds:
        return function
    return auto_axes(function, out_sharding=PartitionSpec())


def _rule(plan, mesh, value_types, result_types) -> str:
    """Arguments of one leaf are sharded alike; everything else is replicated."""
    del mesh
    operands = []
    for number, leaf in enumerate(plan.leaves):
        factors = " ".join(f"l{number}d{axis}" for axis in range(len(leaf.shape)))
        operands += [factors] * leaf.arity
    rest = value_types[len(operands) :]
    # One factor per axis, none for a scalar.
    names = [
        " ".join(f"v{i}d{axis}" for axis in range(len(value.shape)))
        for i, value in enumerate([*rest, *result_types])
    ]
    return (
        f"{', '.join(operands + names[: len(rest)])} -> {', '.join(names[len(rest) :])}"
    )


def _partition(body: Body, plan: Plan, mesh, operands, results):
    """The computation of one device; called while XLA partitions the program."""
    args, *rest = operands
    specs = [_even(arrays[0], mesh) for arrays in args]
    same = NamedSharding(mesh, PartitionSpec())

    def local(args, *rest):
        # These are plain local arrays. Traced under the surrounding mesh they would get
        # shardings, which the program of one device cannot have.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            leaves = zip(plan.leaves, specs, strict=True)
            there = [_local_place(leaf, spec, mesh) for leaf, spec in leaves]
            return body(Part(plan, args, there, tuple(mesh.axis_names)), *rest)

    shardings = (
        tuple(
            tuple(NamedSharding(mesh, PartitionSpec(*spec)) for _ in arrays)
            for arrays, spec in zip(args, specs, strict=True)
        ),
        *jax.tree.map(lambda _: same, tuple(rest)),
    )
    return mesh, local, jax.tree.map(lambda _: same, results), shardings


def _even(array, mesh) -> list[tuple[str, ...]]:
    """Mesh axes of each axis of an array, none if they do not divide it."""
    if not isinstance(array.sharding, NamedSharding):
        # No mesh is visible, as in a program without array arguments: not split.
        return [()] * len(array.shape)
    spec = [axes or () for axes in array.sharding.spec]
    spec = [axes if isinstance(axes, tuple) else (axes,) for axes in spec]
    spec += [()] * (len(array.shape) - len(spec))
    return [
        axes if size % int(np.prod([mesh.shape[a] for a in axes])) == 0 else ()
        for axes, size in zip(spec, array.shape, strict=True)
    ]


def _local_place(leaf: PlannedLeaf, spec, mesh) -> Place:
    """The place of this device's part of a sharded leaf."""
    base, cell, used = jnp.uint32(0), 0, set()
    for axis, (axes, size) in enumerate(zip(spec, leaf.shape, strict=True)):
        if not axes:
            continue
        used.update(axes)
        parts = int(np.prod([mesh.shape[a] for a in axes]))
        start = lax.axis_index(axes) * (size // parts)
        if leaf.split and axis == 0:
            cell = start
        else:
            base += start.astype(jnp.uint32) * np.uint32(leaf.strides[axis] % 2**32)
    copies = tuple(a for a in mesh.axis_names if a not in used and mesh.shape[a] > 1)
    counts = lax.axis_index(copies) == 0 if copies else None
    return Place(leaf.strides, base, cell, counts)
