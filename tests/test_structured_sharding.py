"""Units on eight devices: the same masks, leaves where they were."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from mesh_helpers import (
    KINDS,
    mesh_of,
    not_on_eight,
    on_eight,
    placed,
    run_on_eight_devices,
)
from test_structured import dense

import sparse_optax
from sparse_optax import structured


@not_on_eight
def test_on_eight_devices():
    run_on_eight_devices(__file__, 2)


def fn(params, x):
    return jax.nn.relu(x @ params["v"] + params["c"][None]) @ params["w"]


@on_eight
@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_changes_nothing(kind):
    shapes = {"c": (16,), "v": (8, 16), "w": (16, 4)}
    params = dense({name: jnp.zeros(shape) for name, shape in shapes.items()})
    units = structured.channels(fn, params, jnp.ones((2, 8)))
    specs, mesh = {"c": P("y"), "v": P("x", "y"), "w": P("y")}, mesh_of(kind)
    there = placed(params, mesh, specs)
    for options in ({"score": "taylor", "density": 0.5}, {"multiply_adds": 0.3}):
        tx = structured.gradual_channels(
            optax.sgd(0.1, momentum=0.9),
            units=units,
            update_period=2,
            update_stop=7,
            **options,
        )
        masks = []
        for tree in (params, there):
            with jax.set_mesh(mesh):
                state, step = tx.init(tree), jax.jit(tx.update)
                for _ in range(7):
                    _, state = step(tree, state, tree)
            masks.append(sparse_optax.get_masks(state))
        for name, mask in masks[1].items():
            np.testing.assert_array_equal(mask, masks[0][name])
            here = there[name].sharding
            assert mask.sharding.is_equivalent_to(here, mask.ndim)
        assert masks[0]["c"].sum() == (8 if "density" in options else 4)
    gate = structured.gate_channels(units, 0.5)
    passed = []
    for tree in (params, there):
        with jax.set_mesh(mesh):
            updates, _ = jax.jit(gate.update)(tree, gate.init(tree), tree)
        passed.append(updates)
    for name, g in passed[1].items():
        np.testing.assert_array_equal(g, passed[0][name])
