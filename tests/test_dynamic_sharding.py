"""The dynamic methods' own array code on a mesh of eight devices: the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from mesh_helpers import (
    KINDS,
    assert_same_bits,
    mesh_of,
    not_on_eight,
    on_eight,
    placed,
    run_on_eight_devices,
)

import sparse_optax
from sparse_optax import regrowth
from sparse_optax.regrowth import grow, prune, redistribute


@not_on_eight
def test_in_a_process_with_eight_devices():
    run_on_eight_devices(__file__, passed=14)


SPECS = P("x", "y"), P("x", None, "y")
AXES = None, 0
SHAPES = (8, 16), (4, 8, 12)


def _arrays(seed):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in SHAPES]


@on_eight
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_growth_by_unit_on_a_mesh(kind):
    """Leaves sharded by units, one of them a stack of sharded layers."""

    @jax.jit
    def masks(params, momentum):
        evidence = regrowth.Evidence(
            params=tuple(params),
            masks=tuple(x > 0 for x in params),
            momentum=tuple(momentum),
            axes=AXES,
        )
        rules = prune.magnitude, redistribute.none, grow.momentum_per_neuron
        names = "prune", "redistribute", "grow"
        chosen = dict(zip(names, rules, strict=True))
        return regrowth.cycle(evidence, **chosen, prune_rate=0.5).masks

    trees = _arrays(0), _arrays(1)
    mesh = mesh_of(kind)
    on_mesh = masks(*(placed(tree, mesh, list(SPECS)) for tree in trees))
    assert_same_bits(on_mesh, masks(*trees))


@on_eight
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_deep_rewiring_on_a_mesh(kind):
    """Signs, noise, zeros and growth over the network; the noise is the same."""
    tx = sparse_optax.deep_rewiring(
        optax.sgd(0.1),
        learning_rate=0.1,
        l1=0.5,
        temperature=0.05,
        density=0.5,
        scope="global",
        key=0,
    )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    def train(params):
        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        signs = optax.tree.get(state, "positive")
        return sparse_optax.get_masks(state), signs, params

    params = _arrays(0)
    *exact, weights = train(params)
    *got, sharded = train(placed(params, mesh_of(kind), list(SPECS)))
    assert_same_bits(got, exact)
    for a, b in zip(sharded, weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


EACH_UPDATE = {
    "straight_through_magnitude": {},
    "network_surgery": {"gamma": 0.5},
    "top_kast": {"backward_density": 0.6, "penalty": 0.0},
    "sparse_evolutionary": {"update_period": 1, "key": 0},
    "granet": {"update_period": 1, "update_stop": 6, "key": 0},
}


@on_eight
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("method", EACH_UPDATE)
def test_choosing_at_every_update_on_a_mesh(method, kind):
    """Steps of a power of two, so that the weights are exact; masks with many ties."""
    options = {"density": 0.3, "stacked": {"1": 0}, **EACH_UPDATE[method]}
    tx = getattr(sparse_optax, method)(optax.sgd(0.5), **options)
    grads = [[jnp.round(2 * x) / 4 for x in _arrays(seed)] for seed in range(1, 7)]

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def train(place):
        params = place([jnp.round(2 * x) / 4 for x in _arrays(0)])
        state, masks = tx.init(params), []
        for g in grads:
            params, state = step(params, state, place(g))
            masks.append(sparse_optax.get_masks(state))
        return params, masks

    mesh = mesh_of(kind)
    params, masks = train(lambda tree: tree)
    on_mesh = train(lambda tree: placed(tree, mesh, list(SPECS)))
    assert_same_bits(on_mesh, (params, masks))
    assert len({np.asarray(m[0]).tobytes() for m in masks}) > 3
