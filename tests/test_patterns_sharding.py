"""Patterns on eight devices: the same masks, leaves where they were."""

import jax
import numpy as np
import pytest
from helpers import kept, refuses
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from mesh_helpers import mesh_of, not_on_eight, on_eight, placed, run_on_eight_devices
from test_patterns import BLOCKS, FAN_IN, N_M, engine, normal, run

import sparse_optax

UNITS = sparse_optax.patterns.output_units(axis=-1)


@not_on_eight
def test_on_eight_devices():
    run_on_eight_devices(__file__, 9)


@on_eight
@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        *((pattern, AxisType.Auto) for pattern in (BLOCKS, UNITS, N_M, FAN_IN)),
        *((pattern, AxisType.Explicit) for pattern in (BLOCKS, UNITS)),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_a_mesh_changes_nothing(pattern, kind):
    params, specs = {"w": normal((16, 8))}, {"w": P("x", "y")}
    mesh = mesh_of(kind)
    on_mesh = placed(params, mesh, specs)
    right = list(run(engine(pattern), params, 3))
    found = list(run(engine(pattern), on_mesh, 3))
    for (w, state, _), (v, other, _) in zip(right, found, strict=True):
        np.testing.assert_array_equal(kept(state)[0], kept(other)[0])
        np.testing.assert_allclose(w["w"], v["w"], rtol=1e-5)
    assert int(other.removed["w"]) > 0
    mask = other.regrow_masks["w"]
    assert mask.sharding.is_equivalent_to(on_mesh["w"].sharding, 2)
    tx = sparse_optax.gsm_mask(None if pattern.density else 0.5, pattern=pattern)
    grads = {"w": normal((16, 8), 2)}
    plain, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    far, _ = jax.jit(tx.update)(placed(grads, mesh, specs), tx.init(on_mesh), on_mesh)
    np.testing.assert_array_equal(plain["w"], far["w"])


@on_eight
def test_blocks_that_cross_explicit_devices_are_refused():
    # Of 16 rows on four devices: each block would lie on two.
    across = sparse_optax.patterns.blocks(8, 2)
    params = {"w": normal((16, 8))}
    there = placed(params, mesh_of(AxisType.Explicit), {"w": P("x", "y")})
    with refuses("magnitude_masks", "blocks of 8 along axis 0", "4 devices"):
        sparse_optax.masks.magnitude_masks(there, 0.5, pattern=across)


@on_eight
@pytest.mark.parametrize("pattern", [N_M, FAN_IN], ids=lambda x: x.name)
def test_groups_on_explicit_devices_are_refused(pattern):
    """Sharded along any axis; whole on each device they work."""
    mesh = mesh_of(AxisType.Explicit)
    params = {"w": normal((16, 8))}
    density = None if pattern.density else 0.25
    for spec in (P("x", None), P(None, "y")):
        there = placed(params, mesh, {"w": spec})
        for act in (engine(pattern).init, jax.jit(engine(pattern).init)):
            with refuses("regrow", "not sharded over Explicit", "'w' has", "mesh Auto"):
                act(there)
    right = sparse_optax.masks.magnitude_masks(params, density, pattern=pattern)
    whole = placed(params, mesh, {"w": P(None, None)})
    found = sparse_optax.masks.magnitude_masks(whole, density, pattern=pattern)
    np.testing.assert_array_equal(right["w"], found["w"])
