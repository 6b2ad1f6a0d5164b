"""Methods that pull at all weights, on a mesh of eight devices: as on one device.

No weights are gathered: what a step moves between devices is a few sums.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from mesh_helpers import (
    KINDS,
    collectives,
    mesh_of,
    not_on_eight,
    on_eight,
    placed,
    run_on_eight_devices,
)

import sparse_optax
from sparse_optax import patterns


@not_on_eight
def test_in_a_process_with_eight_devices():
    run_on_eight_devices(__file__, passed=14)


SPECS = {"fc1": P("x", "y"), "fc2": P("y", None)}
SHAPES = {"fc1": (8, 16), "fc2": (16, 4)}


def arrays(seed):
    rng = np.random.default_rng(seed)
    drawn = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)


METHODS = {
    "learning_compression": lambda: sparse_optax.learning_compression(
        optax.sgd(0.1), density=0.25, update_period=2, update_stop=6, penalty=0.5
    ),
    "soft_weight_sharing": lambda: optax.chain(
        sparse_optax.soft_weight_sharing(examples=10, strength=0.1), optax.sgd(0.01)
    ),
    "sparse_variational_dropout": lambda: sparse_optax.sparse_variational_dropout(
        optax.sgd(0.01), examples=10, key=0
    ),
    "l0_regularization": lambda: sparse_optax.l0_regularization(
        optax.sgd(0.01), examples=10, strength=0.1, key=0
    ),
    "proximal_group_lasso": lambda: optax.chain(
        optax.sgd(0.1),
        sparse_optax.proximal_group_lasso(0.1, 1.0, pattern=patterns.output_units()),
    ),
    "proximal_group_lasso, blocks": lambda: optax.chain(
        optax.sgd(0.1),
        sparse_optax.proximal_group_lasso(0.1, 1.0, pattern=patterns.blocks(2, 2)),
    ),
}
# What their loss reads in place of the parameters.
DRAWN = ("sparse_variational_dropout", "l0_regularization")


def steps(name, params):
    """Weights and state after seven steps, and the program of a step."""
    tx = METHODS[name]()

    def loss(params, state):
        used = sparse_optax.sample_weights(params, state) if name in DRAWN else params
        return sum(jnp.sum(jnp.sin(w) ** 2) for w in jax.tree.leaves(used))

    @jax.jit
    def step(params, state):
        gradient = jax.grad(loss)(params, state)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    program = step.lower(params, state).compile()
    for _ in range(7):
        params, state = step(params, state)
    return params, state, program


@on_eight
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_mesh(name, kind):
    params = arrays(0)
    expected = steps(name, params)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        found = steps(name, placed(params, mesh, SPECS))
    for got, right in zip(
        jax.tree.leaves(found[:2]), jax.tree.leaves(expected[:2]), strict=True
    ):
        np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)
    moved = any(np.abs(a - params[n]).max() > 1e-3 for n, a in expected[0].items())
    assert moved
    sizes = collectives(found[2])
    assert set(sizes) <= {"all-reduce"}, sizes
    # Norms of eight units on a device, and no part of a leaf, which has 16 at least.
    assert max(sizes.get("all-reduce", [0])) <= 10, sizes
    if name in DRAWN or name.endswith("blocks"):
        assert not sizes


@on_eight
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_final_weights_on_a_mesh(kind):
    params = arrays(1)
    mesh = mesh_of(kind)
    tx = METHODS["sparse_variational_dropout"]()
    expected = sparse_optax.final_weights(params, tx.init(params), 0.25)
    with jax.set_mesh(mesh):
        there = placed(params, mesh, SPECS)
        found = sparse_optax.final_weights(there, tx.init(there), 0.25)
    assert sum(int((w != 0).sum()) for w in found.values()) == 48
    for name, right in expected.items():
        np.testing.assert_array_equal(found[name], right)
