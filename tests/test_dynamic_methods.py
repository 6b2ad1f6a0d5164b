"""The dynamic methods beside sparse momentum: each cycle against the definition."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import oracles_dynamic as oracle
import pytest
from helpers import network

import sparse_optax
from sparse_optax import regrowth
from sparse_optax.regrowth import grow, prune, redistribute

# --- random networks, and one cycle on them -------------------------------------------

SHAPES = ((1, 5), (16, 8), (3, 3, 2, 4))
KINDS = ("normal", "ties", "zero", "few", "huge")
ACTIVE = ("one", "some", "nearly", "all", "none")
RATES = (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)


class Net(NamedTuple):
    """Weights, masks and evidence of a network, one array a layer, and a prune rate."""

    params: list
    masks: list
    momentum: list
    gradient: list
    rate: float


def _values(rng, kind, shape):
    if kind == "zero":
        return np.zeros(shape, np.float32)
    if kind == "ties":
        return rng.integers(-2, 3, shape).astype(np.float32)
    x = rng.normal(size=shape)
    if kind == "few":
        x *= rng.random(shape) < 0.2
    return (x * (1e15 if kind == "huge" else 1)).astype(np.float32)


def nets(number, shapes=SHAPES, active=ACTIVE):
    """Networks with full, empty, tied and zero layers, each layer of another kind."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        made = Net([], [], [], [], RATES[seed % len(RATES)])
        for shape in shapes:
            n = int(np.prod(shape))
            count = {"one": 1, "some": int(rng.integers(0, n + 1)), "all": n, "none": 0}
            k = count.get(str(rng.choice(active)), n - n // 8)
            mask = rng.permutation(np.arange(n) < k).reshape(shape)
            a, b, c = (_values(rng, rng.choice(KINDS), shape) for _ in range(3))
            made.masks.append(mask)
            made.params.append(np.where(mask, a, 0))
            made.momentum.append(b)
            made.gradient.append(c)
        yield made


class Did(NamedTuple):
    """What a cycle did, as NumPy arrays."""

    masks: list
    kept: list
    removed: list
    grown: list
    states: Any


@functools.partial(jax.jit, static_argnames=("rules", "axes"))
def _cycle(net, key, states, target, rules, axes):
    evidence = regrowth.Evidence(
        params=net.params,
        masks=net.masks,
        momentum=net.momentum,
        gradient=net.gradient,
        key=key,
        axes=axes,
    )
    return regrowth.cycle(
        evidence,
        prune=rules[0],
        redistribute=rules[1],
        grow=rules[2],
        prune_rate=net.rate,
        states=states,
        target=target,
    )


def cycle(net, *rules, seed=0, states=None, target=None, axes=None):
    """One cycle of a triple of rules, and its totals checked."""
    arrays = Net(*(tuple(map(jnp.asarray, x)) for x in net[:4]), jnp.float32(net.rate))
    if target is not None:
        target = jnp.asarray(target, jnp.int32)
    result = _cycle(arrays, jax.random.key(seed), states, target, rules, axes)
    assert bool(result.ok)
    did = Did(
        [np.asarray(m) for m in result.masks],
        [np.asarray(m) for m in result.kept],
        result.removed.tolist(),
        result.grown.tolist(),
        result.states,
    )
    wanted = total(net.masks) if target is None else int(target.sum())
    assert total(did.masks) == wanted
    assert total(did.masks) == total(did.kept) + sum(did.grown)
    assert total(did.kept) == total(net.masks) - sum(did.removed)
    for before, kept, after in zip(net.masks, did.kept, did.masks, strict=True):
        assert not (kept & ~before).any()
        assert not (kept & ~after).any()
    return did


def total(masks):
    return sum(int(m.sum()) for m in masks)


def missing(masks):
    return [~m for m in masks]


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


def new(did):
    return [m & ~k for m, k in zip(did.masks, did.kept, strict=True)]


# --- the mixtures of sparse momentum's Table 5 ----------------------------------------


def _by_largest(values, did):
    return oracle.largest(values, missing(did.kept), did.grown)


def _by_unit(values, did):
    grown = zip(values, missing(did.kept), did.grown, strict=True)
    return [oracle.grow_by_unit(v, m, n) for v, m, n in grown]


GROWN = {
    "momentum": lambda net, did: _by_largest(net.momentum, did),
    "gradient": lambda net, did: _by_largest(net.gradient, did),
    "momentum_per_neuron": lambda net, did: _by_unit(net.momentum, did),
    "random": None,
}
SHARES = {
    "momentum": lambda net, kept: oracles.contributions(net.masks, net.momentum),
    "magnitude": lambda net, kept: oracles.contributions(net.masks, net.params),
    "nonzeros": lambda net, kept: [int(k.sum()) for k in kept],
    "none": None,
}


@pytest.mark.parametrize(
    ("shares", "growth"),
    [
        ("momentum", "random"),
        ("magnitude", "momentum_per_neuron"),
        ("nonzeros", "momentum"),
        ("none", "gradient"),
    ],
)
def test_a_mixture_equals_its_definition(shares, growth):
    rules = prune.magnitude, getattr(redistribute, shares), getattr(grow, growth)
    for net in nets(24):
        did = cycle(net, *rules)
        c, before_prune = [0] * len(SHAPES), SHARES[shares]
        if before_prune and shares != "nonzeros":
            c = before_prune(net, None)
        # What was not shared by a contribution is pruned by the plain rate.
        removed = oracles.prune_counts(net.masks, c, net.rate)
        assert did.removed == removed
        same(did.kept, oracle.smallest_go(net.params, net.masks, removed))
        free = [int(m.sum()) for m in missing(did.kept)]
        grown = removed
        if before_prune:
            c = before_prune(net, did.kept)
            grown = oracles.regrow_counts(sum(removed), c, removed, free)
        assert did.grown == grown
        if GROWN[growth]:
            same(new(did), GROWN[growth](net, did))


def test_every_mixture_is_one_call():
    params = network(((4, 3),))
    for shares, growth in itertools.product(SHARES, GROWN):
        tx = sparse_optax.sparse_momentum_regrow(
            optax.sgd(0.1, momentum=0.9),
            density=0.5,
            update_period=2,
            update_stop=8,
            redistribute=getattr(redistribute, shares),
            grow=getattr(grow, growth),
            key=0,
        )
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_a_unit_gets_its_share_by_hand():
    """Means 3, 1, 0 and 0 share eight places: six and two, but unit 0 has room for 4.

    The two that do not fit go one each to the lowest units with room.
    """
    momentum = np.zeros((4, 4), np.float32)
    momentum[:, 0], momentum[:, 1] = 3, [1, 0, 2, 1]
    missing = np.ones((4, 4), bool)
    assert oracle.unit_counts(momentum, missing, 8) == [4, 3, 1, 0]
    got = regrowth.units.split_counts(
        (jnp.int32(8),), (jnp.asarray(momentum),), (jnp.asarray(~missing),), (None,)
    )
    assert got[0].tolist() == [4, 3, 1, 0]


def test_units_of_stacked_layers_are_those_of_each_layer_alone():
    """Three layers in one leaf, along its middle axis, grow as three leaves do."""
    rules = prune.magnitude, redistribute.none, grow.momentum_per_neuron
    for net in nets(6, shapes=((6, 4),) * 3, active=("some", "nearly", "all")):
        arrays = [[np.stack(x, 1)] for x in net[:4]]
        did = cycle(Net(*arrays, net.rate), *rules, axes=(1,))
        after, kept = (list(np.moveaxis(m[0], 1, 0)) for m in (did.masks, did.kept))
        got = did._replace(masks=after, kept=kept)
        same(new(got), _by_unit(net.momentum, got))


def test_units_past_the_pairwise_ranks():
    """A layer of 300 units ranks their remainders by a sort."""
    net = next(nets(1, shapes=((2, 300),), active=("some",)))
    net = net._replace(rate=0.5)
    rng = np.random.default_rng(1)
    net = net._replace(momentum=[rng.integers(-3, 4, (2, 300)).astype(np.float32)])
    did = cycle(net, prune.magnitude, redistribute.none, grow.momentum_per_neuron)
    assert did.grown[0] > 50
    same(new(did), _by_unit(net.momentum, did))
