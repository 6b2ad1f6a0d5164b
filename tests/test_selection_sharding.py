"""Selection on meshes of eight devices: the same bits, and nothing gathered."""

import functools
import math

import jax
import jax.numpy as jnp
import mesh_helpers
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from mesh_helpers import (
    KINDS,
    mesh_of,
    not_on_eight,
    on_eight,
    placed,
    run_on_eight_devices,
)

from sparse_optax import selection

# Counts per leaf (or slice) and probe, and nothing that grows with the leaves.
assert_small_sums_only = functools.partial(
    mesh_helpers.assert_small_sums_only, most=7 * 70
)

pytestmark = pytest.mark.core


@not_on_eight
def test_in_a_process_with_eight_devices():
    run_on_eight_devices(__file__, passed=11)


SPECS = {"a": P("x", "y"), "b": P(None, "x", None), "c": P(), "d": P("y", ("x",))}
SHAPES = {"a": (128, 96), "b": (16, 8, 24), "c": (40,), "d": (8, 256)}
SIZE = sum(math.prod(shape) for shape in SHAPES.values())


def saliency(gradient, weight):
    return jnp.abs(gradient * weight)


def pairs(ties):
    """Gradients and weights; their products are often equal, or never."""
    rng = np.random.default_rng(0)

    def draw(shape):
        x = rng.standard_normal((2, *shape)).astype(np.float32)
        return tuple(np.round(2 * x) / 2 if ties else x)

    return {name: draw(shape) for name, shape in SHAPES.items()}


def compiled_select(arguments, k, **options):
    def program(tree, k):
        return selection.select(tree, k, **options)

    return jax.jit(program).lower(arguments, k).compile()


@on_eight
@pytest.mark.parametrize("kind", KINDS)
def test_one_pool(kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharded = placed(pairs(False), mesh, SPECS)
        program = compiled_select(sharded, jnp.int32(0), score=saliency)
        assert_small_sums_only(program)
        for ties in (False, True):
            tree = pairs(ties)
            sharded = placed(tree, mesh, SPECS)
            for k in (0, 1, 291, SIZE // 2, SIZE):
                masks, threshold, counts = program(sharded, jnp.int32(k))
                expected = selection.select(tree, k, score=saliency)
                jax.tree.map(np.testing.assert_array_equal, masks, expected.masks)
                np.testing.assert_array_equal(threshold, expected.threshold)
                jax.tree.map(np.testing.assert_array_equal, counts, expected.counts)
                assert sum(int(m.sum()) for m in jax.tree.leaves(masks)) == k
    for name, mask in masks.items():
        assert mask.sharding.is_equivalent_to(sharded[name][0].sharding, mask.ndim)


@on_eight
def test_masks_have_the_type_of_their_leaf():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        sharded = placed(pairs(False), mesh, SPECS)
        types = jax.tree.map(
            jax.typeof,
            jax.eval_shape(
                lambda t: selection.top_k_mask(t, 5, score=saliency), sharded
            ),
        )
    for name, mask in types.items():
        leaf = jax.typeof(sharded[name][0])
        assert mask.sharding.spec == leaf.sharding.spec
        assert (mask.shape, mask.dtype) == (leaf.shape, bool)


@on_eight
def test_without_a_mesh_in_context():
    mesh = mesh_of(AxisType.Auto)
    tree = pairs(True)
    sharded = placed(tree, mesh, SPECS)
    masks = selection.top_k_mask(sharded, 777, score=saliency)
    expected = selection.top_k_mask(tree, 777, score=saliency)
    jax.tree.map(np.testing.assert_array_equal, masks, expected)


@on_eight
@pytest.mark.parametrize("kind", KINDS)
def test_slices_of_a_leaf_that_is_sharded_along_them(kind):
    rng = np.random.default_rng(0)
    tree = {
        "stack": rng.integers(-4, 5, (64, 6, 2)).astype(np.float32),
        "leaf": rng.standard_normal((16, 8)).astype(np.float32),
    }
    counts = {"stack": np.arange(64) % 13, "leaf": np.array(100)}
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        specs = {"stack": P(("x", "y"), None, None), "leaf": P("y", "x")}
        sharded = placed(tree, mesh, specs)
        program = compiled_select(sharded, counts)
        assert_small_sums_only(program)
        chosen = program(sharded, counts)
    expected = selection.select(tree, counts)
    jax.tree.map(np.testing.assert_array_equal, chosen, expected)


@on_eight
def test_vmap_on_a_mesh():
    tree = {name: np.stack([x[0], -x[0]]) for name, x in pairs(True).items()}
    counts = np.array([5, 777])
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        specs = {name: P(None, *spec) for name, spec in SPECS.items()}
        sharded = placed(tree, mesh, specs)
        program = jax.jit(jax.vmap(selection.top_k_mask))
        assert_small_sums_only(program.lower(sharded, counts).compile())
        masks = program(sharded, counts)
    for i, k in enumerate(counts):
        expected = selection.top_k_mask({n: x[i] for n, x in tree.items()}, int(k))
        for name, mask in masks.items():
            np.testing.assert_array_equal(mask[i], expected[name])


@on_eight
def test_shard_map_over_all_axes():
    """Ties rank by leaf, then by shard: for shards along axis 0, as without a mesh."""
    tree = {name: x[0] for name, x in pairs(True).items() if name != "b"}
    mesh = mesh_of(AxisType.Auto)
    spec = P(("x", "y"))

    def body(tree, k):
        return selection.select(tree, k, axis_name=("x", "y"))

    program = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(spec, P()),
            out_specs=selection.Selection(spec, P(), P()),
        )
    )
    assert_small_sums_only(program.lower(tree, 1).compile())
    for k in (0, 777, 9_000):
        chosen = program(tree, k)
        expected = selection.select(tree, k)
        jax.tree.map(np.testing.assert_array_equal, chosen, expected)


@on_eight
def test_shard_map_over_some_axes():
    tree = {"a": pairs(True)["a"][0]}
    mesh = mesh_of(AxisType.Auto)

    def body(tree, k):
        return selection.select(tree, k, axis_name="x")

    program = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(P("x"), P()),
            out_specs=selection.Selection(P("x"), P(), P()),
            axis_names={"x"},
        )
    )
    sharded = placed(tree, mesh, {"a": P("x", "y")})
    assert_small_sums_only(program.lower(sharded, 1).compile())
    chosen = program(sharded, 777)
    expected = selection.select(tree, 777)
    jax.tree.map(np.testing.assert_array_equal, chosen, expected)


@on_eight
def test_shards_that_select_alone():
    """Without an axis name each shard keeps k of its own weights."""
    x = pairs(True)["a"][0]
    mesh = mesh_of(AxisType.Auto)
    program = jax.shard_map(
        lambda x: selection.top_k_mask(x, 17),
        mesh=mesh,
        in_specs=P(("x", "y")),
        out_specs=P(("x", "y")),
    )
    mask = np.asarray(jax.jit(program)(x)).reshape(8, -1)
    for shard, own in zip(np.split(x, 8), mask, strict=True):
        expected = selection.top_k_mask(shard, 17)
        np.testing.assert_array_equal(own, np.ravel(expected))


@on_eight
def test_eight_billion_weights():
    """Compiled only: shapes of a language model, in one pool past 2**32 weights."""
    mesh = mesh_of(AxisType.Explicit)
    shapes = {
        "embed": (128_256, 4096),
        "attention": (32, 4, 4096, 4096),
        "up": (32, 2, 4096, 14_336),
        "down": (32, 14_336, 4096),
    }

    def abstract(shape):
        spec = P(*[None] * (len(shape) - 2), "x", "y")
        sharding = NamedSharding(mesh, spec)
        return (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding),) * 2

    with jax.set_mesh(mesh):
        tree = {name: abstract(shape) for name, shape in shapes.items()}
        k = (jax.ShapeDtypeStruct((), jnp.uint32),) * 2
        program = compiled_select(tree, k, score=saliency)
    assert sum(math.prod(shape) for shape in shapes.values()) > 2**32
    assert_small_sums_only(program)
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 2**20
