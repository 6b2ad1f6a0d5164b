"""Weights that a method leaves as they are, bit for bit: ``freeze`` and ``within``."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles_dynamic as oracle
import pytest
from helpers import at_step, kept, kernels, network, random_gradients, refuses, stepper

import sparse_optax
from sparse_optax import masks, patterns, regrowth, report
from sparse_optax.masks.optimizer_state import freezes, kept_masks
from sparse_optax.regrowth import grow, prune, redistribute

SHAPES = ((12, 9), (9, 7))
# Whatever moves weights that have no gradient, or keeps moving them.
HEAVY = {
    "adamw": optax.adamw(0.1, weight_decay=0.5),
    "sgd": optax.chain(optax.add_decayed_weights(0.5), optax.sgd(0.1, momentum=0.9)),
    "sign": optax.lion(0.1, weight_decay=0.5),
}


def bits(x):
    """An array as bytes, one row for each entry: -0 is not 0, NaN is NaN."""
    x = np.asarray(x)
    return x.reshape(-1).view(np.uint8).reshape(x.size, x.dtype.itemsize)


def unchanged(before, after):
    """Which entries have the same bits."""
    same = (bits(before) == bits(after)).all(axis=1)
    return same.reshape(np.shape(before))


def run(tx, params, steps=6, seed=1):
    gradients = random_gradients(seed, params, steps)
    state, step = tx.init(params), stepper(tx)
    for t in range(steps):
        params, state = step(params, state, at_step(gradients, t))
    return params, state


def with_hard_values(params):
    """A minus zero in a kernel and in a bias."""
    params["Dense_0"]["kernel"] = params["Dense_0"]["kernel"].at[0].set(-0.0)
    params["Dense_0"]["bias"] = params["Dense_0"]["bias"].at[0].set(-0.0)
    return params


# --- freeze ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("adamw", jnp.float32), ("sgd", jnp.bfloat16), ("sign", jnp.float16)],
)
def test_all_others_keep_their_bits_and_the_masked_train(name, dtype):
    params = jax.tree.map(lambda p: p.astype(dtype), with_hard_values(network(SHAPES)))
    tx = sparse_optax.static_sparse(HEAVY[name], density=0.2, key=0, freeze=True)
    after, state = run(tx, params)
    for layer, mask in zip(sorted(params), kept(state), strict=True):
        same = unchanged(params[layer]["kernel"], after[layer]["kernel"])
        np.testing.assert_array_equal(same[~mask], True)
        assert same[mask].mean() < 0.2  # in 16 bits some come back to their value
        assert unchanged(params[layer]["bias"], after[layer]["bias"]).all()
    assert int(state.misplaced) == 0  # nonzero weights outside are no alarm here


def test_the_masked_train_as_they_do_without_the_others():
    """Element-wise optimizers: each trained weight moves as in dense training, where
    the others are handed in at their frozen value.
    """
    params = network(SHAPES)
    tx = sparse_optax.static_sparse(HEAVY["adamw"], density=0.2, key=0, freeze=True)
    after, state = run(tx, params)
    plain, _ = run(HEAVY["adamw"], params)
    for layer, mask in zip(sorted(params), kept(state), strict=True):
        a, b = (np.asarray(x[layer]["kernel"])[mask] for x in (after, plain))
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_filled_masks_train_the_biases_too():
    params = network(SHAPES)
    found = masks.fill(masks.random_masks(0, params, 0.2), params)
    tx = sparse_optax.static_sparse(HEAVY["adamw"], masks=found, freeze=True)
    after, _ = run(tx, params)
    for layer in params:
        assert not unchanged(params[layer]["bias"], after[layer]["bias"]).any()


def test_behind_an_optimizer_and_within_one_group():
    """The others of the group stay; the other group trains as it would alone."""
    params = network(SHAPES)
    frozen = sparse_optax.static_sparse(density=0.2, key=0, freeze=True)
    groups = {
        "few": optax.chain(HEAVY["adamw"], frozen),
        "all": optax.sgd(0.1),
    }
    tx = optax.partition(groups, {"Dense_0": "few", "Dense_1": "all"})
    after, state = run(tx, params)
    mask = np.asarray(sparse_optax.get_masks(state)["Dense_0"]["kernel"])
    same = unchanged(params["Dense_0"]["kernel"], after["Dense_0"]["kernel"])
    np.testing.assert_array_equal(same, ~mask)
    assert unchanged(params["Dense_0"]["bias"], after["Dense_0"]["bias"]).all()
    plain, _ = run(optax.sgd(0.1), params)
    for name, x in after["Dense_1"].items():
        np.testing.assert_array_equal(x, plain["Dense_1"][name])


def test_states_say_so_and_all_weights_count_as_kept():
    params = network(SHAPES)
    tx = sparse_optax.static_sparse(HEAVY["adamw"], density=0.2, key=0, freeze=True)
    after, state = run(tx, params, steps=2)
    trained = masks.count(sparse_optax.get_masks(state))
    assert freezes(state)
    assert freezes((optax.EmptyState(), state))
    assert all(bool(m.all()) for m in kept_masks(state).values())
    for x, y in zip(
        jax.tree.leaves(sparse_optax.sparsify(after, state)),
        jax.tree.leaves(jax.jit(sparse_optax.sparsify)(after, state)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(
        jax.tree.leaves(sparse_optax.sparsify(after, state)),
        jax.tree.leaves(after),
        strict=True,
    ):
        assert unchanged(x, y).all()
    summary = report.summary(after, state)
    assert summary.total.kept == summary.total.weights == 12 * 9 + 9 * 7
    assert summary.total.trained == trained < summary.total.kept
    assert [x.trained for x in summary.layers] == [int(m.sum()) for m in kept(state)]
    assert "trained" in report.table(summary)
    assert summary.scalars()["trained/total"] == trained


def test_other_states_do_not():
    params = network(SHAPES)
    tx = sparse_optax.static_sparse(HEAVY["adamw"], density=0.2, key=0)
    after, state = run(tx, params, steps=2)
    assert not freezes(state)
    assert jax.tree.leaves(state.frozen) == []
    summary = report.summary(after, state)
    assert summary.total.trained is None
    assert "trained" not in report.table(summary)


def test_a_file_holds_all_weights(tmp_path):
    params = network(SHAPES)
    tx = sparse_optax.static_sparse(HEAVY["adamw"], density=0.2, key=0, freeze=True)
    after, state = run(tx, params, steps=2)
    path = tmp_path / "model.npz"
    sparse_optax.save_sparse(path, after, state)
    back = sparse_optax.load_sparse(path, like=params).dense()
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(back), strict=True):
        assert unchanged(x, y).all()


def test_masks_may_be_replaced():
    """What trains next is the new mask; what trained before is frozen where it is."""
    params = network(SHAPES)
    tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.2, key=0, freeze=True)
    after, state = run(tx, params, steps=2)
    new = masks.random_masks(5, params, 0.3)
    state = sparse_optax.set_masks(state, new)
    gradient = at_step(random_gradients(3, params, 1), 0)
    later, _ = stepper(tx)(after, state, gradient)
    for layer in params:
        same = unchanged(after[layer]["kernel"], later[layer]["kernel"])
        np.testing.assert_array_equal(same, ~np.asarray(new[layer]["kernel"]))


def test_a_norm_of_active_weights_leaves_out_what_is_frozen():
    """Biases too: a clip by the active norm to 1 gives a step of norm 1."""
    params = network(SHAPES)
    inner = optax.chain(sparse_optax.clip_by_active_norm(1.0), optax.sgd(1.0))
    tx = sparse_optax.static_sparse(inner, density=0.2, key=0, freeze=True)
    gradient = jax.tree.map(lambda p: jnp.full_like(p, 10.0), params)
    updates, _ = tx.update(gradient, tx.init(params), params)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-5)


def test_an_ensemble_freezes_in_each_member():
    params = jax.tree.map(lambda p: jnp.stack([p, p * 2, -p]), network(SHAPES))

    def start(key, params):
        tx = sparse_optax.static_sparse(
            HEAVY["adamw"], density=0.2, key=key, freeze=True
        )
        state = tx.init(params)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    keys = jax.random.split(jax.random.key(0), 3)
    after, state = jax.jit(jax.vmap(start))(keys, params)
    for layer in params:
        mask = np.asarray(state.regrow_masks[layer]["kernel"])
        same = unchanged(params[layer]["kernel"], after[layer]["kernel"])
        np.testing.assert_array_equal(same, ~mask)
    whole = sparse_optax.sparsify(after, state)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_dynamic_method_may_freeze_what_it_prunes():
    """A pruned weight stops at its value, and a grown one starts from its own."""
    params = network(SHAPES)
    tx = regrowth.regrow(
        optax.sgd(0.1),
        density=0.3,
        prune=prune.magnitude,
        redistribute=redistribute.none,
        grow=grow.gradient,
        update_period=1,
        update_stop=9,
        prune_rate=0.5,
        key=0,
        freeze=True,
    )
    gradients = random_gradients(1, params, 6)
    state, step = tx.init(params), stepper(tx)
    moved = [np.zeros(s, bool) for s in SHAPES]
    for t in range(6):
        before, was = params, kept(state)
        params, state = step(params, state, at_step(gradients, t))
        for i, layer in enumerate(sorted(params)):
            same = unchanged(before[layer]["kernel"], params[layer]["kernel"])
            now = kept(state)[i]
            assert same[~now].all()
            assert not same[now & was[i] & (t == 0)].any()
            moved[i] |= ~same
    assert all(m.sum() > n.sum() for m, n in zip(moved, kept(state), strict=True))


# --- within ---------------------------------------------------------------------------
SGD = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))
CYCLES = dict(density=0.2, update_period=2, update_stop=9, key=0)
WITHIN = {
    "rigl": (sparse_optax.rigl, CYCLES),
    "sparse_evolutionary": (sparse_optax.sparse_evolutionary, CYCLES),
    "dynamic_sparse": (
        sparse_optax.dynamic_sparse,
        {**CYCLES, "prune_number": 8, "threshold": 1.0},
    ),
    "in_time_over_parameterization": (
        sparse_optax.in_time_over_parameterization,
        CYCLES,
    ),
    "sparse_momentum_regrow": (sparse_optax.sparse_momentum_regrow, CYCLES),
    "momentum_per_neuron": (
        functools.partial(
            sparse_optax.sparse_momentum_regrow, grow=grow.momentum_per_neuron
        ),
        CYCLES,
    ),
    "global": (
        functools.partial(
            sparse_optax.sparse_momentum_regrow,
            grow=grow.global_momentum,
            prune=prune.global_magnitude,
        ),
        CYCLES,
    ),
    "deep_rewiring": (
        sparse_optax.deep_rewiring,
        dict(density=0.2, learning_rate=0.1, key=0),
    ),
    "granet": (sparse_optax.granet, CYCLES),
    "gradual_magnitude": (sparse_optax.gradual_magnitude, CYCLES),
    "iterative_magnitude": (
        sparse_optax.iterative_magnitude,
        dict(density=0.2, prunes=2, update_period=2),
    ),
    "one_shot_magnitude": (sparse_optax.one_shot_magnitude, dict(density=0.2, at=3)),
    "ac_dc": (sparse_optax.ac_dc, CYCLES),
    "dense_until": (functools.partial(sparse_optax.rigl, dense_until=3), CYCLES),
    "packed": (functools.partial(sparse_optax.rigl, packed=True), CYCLES),
}


def free_weights(params):
    """Half of the kernels, and half of the first bias; the second bias is free."""
    free = masks.random_masks(3, params, 0.5)
    free["Dense_0"]["bias"] = jnp.arange(9) < 4
    return free


SAMPLE = {"rigl", "dynamic_sparse", "global", "gradual_magnitude", "packed"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in WITHIN
    ],
)
def test_a_method_uses_only_free_weights_and_leaves_the_others_alone(name):
    method, settings = WITHIN[name]
    params = with_hard_values(network(SHAPES))
    free = free_weights(params)
    tx = method(SGD, within=free, **settings)
    after, state = run(tx, params, steps=10)
    found = kept(state)
    assert sum(int(m.sum()) for m in found) == int(0.2 * (12 * 9 + 9 * 7))
    for i, layer in enumerate(sorted(params)):
        may = np.asarray(free[layer]["kernel"])
        w = np.asarray(after[layer]["kernel"])
        assert unchanged(params[layer]["kernel"], w)[~may].all()
        assert not (found[i] & ~may).any()
        assert not w[may & ~found[i]].any()
    assert int(state.misplaced) == 0
    same = unchanged(params["Dense_0"]["bias"], after["Dense_0"]["bias"])
    np.testing.assert_array_equal(same, np.arange(9) >= 4)
    assert not unchanged(params["Dense_1"]["bias"], after["Dense_1"]["bias"]).any()


def test_a_cycle_equals_its_definition_on_the_free_weights():
    """RigL: the smallest go, the largest gradients among free weights come."""
    params = network(SHAPES)
    free = masks.random_masks(3, params, 0.5)
    tx = sparse_optax.rigl(optax.sgd(0.1), prune_rate=0.6, within=free, **CYCLES)
    gradients = random_gradients(1, params, 3)
    state, step = tx.init(params), stepper(tx)
    for t in range(3):
        before, old = params, kept(state)
        params, state = step(params, state, at_step(gradients, t))
    counts = [oracle.floor_rate(0.6, m.sum()) for m in old]
    weights = [np.where(m, w, 0) for m, w in zip(old, kernels(before), strict=True)]
    stay = oracle.smallest_go(weights, old, counts)
    places = [~k & f for k, f in zip(stay, kernels(free), strict=True)]
    new = oracle.largest(kernels(at_step(gradients, 2)), places, counts)
    for got, k, n in zip(kept(state), stay, new, strict=True):
        np.testing.assert_array_equal(got, k | n)


def test_redistribution_meets_the_room_of_free_weights():
    """One layer has nearly no free weight left; the other takes what it cannot."""
    params = network(SHAPES)
    free = masks.random_masks(3, params, 0.5)
    tight = jnp.zeros((9, 7), bool).at[0].set(True).at[1].set(True)  # 14 of 63
    free["Dense_1"]["kernel"] = tight
    tx = sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.1, momentum=0.9), prune_rate=0.5, within=free, **CYCLES
    )
    gradients = random_gradients(1, params, 8)
    large = gradients["Dense_1"]["kernel"] * 100  # most momentum: it asks for all
    gradients["Dense_1"]["kernel"] = large
    state, step = tx.init(params), stepper(tx)
    for t in range(8):
        params, state = step(params, state, at_step(gradients, t))
    first, second = kept(state)
    assert int(second.sum()) == 14
    assert int(first.sum()) == 34 - 14
    assert not (second & ~np.asarray(tight)).any()


def test_a_second_task_leaves_the_first_one_as_it_was():
    params = network(SHAPES)
    first = sparse_optax.rigl(SGD, **CYCLES)
    model, state = run(first, params, steps=8)
    used = sparse_optax.get_masks(state)
    network_of_first = masks.apply(used, model)
    free = masks.combine(jnp.logical_not, masks.fill(used, params))
    second = sparse_optax.rigl(SGD, within=free, **{**CYCLES, "key": 1})
    model, state = run(second, model, steps=8, seed=2)
    added = sparse_optax.get_masks(state)
    assert masks.count(masks.difference(added, used)) == masks.count(added)
    assert masks.count(masks.union(added, used)) == 2 * masks.count(used)
    for x, y in zip(
        jax.tree.leaves(network_of_first),
        jax.tree.leaves(masks.apply(used, model)),
        strict=True,
    ):
        assert unchanged(x, y).all()
    # The report counts the weights of the first task as kept.
    summary = report.summary(model, state)
    in_use = [int(((~f) | a).sum()) for f, a in zip(
        kernels(free), kernels(added), strict=True
    )]  # fmt: skip
    assert [x.kept for x in summary.layers] == in_use
    assert summary.total.trained == masks.count(added)
    whole = sparse_optax.sparsify(model, state)
    for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(model), strict=True):
        assert unchanged(x, y).all()


def test_wrong_arguments():
    params = network(SHAPES)
    free = masks.random_masks(3, params, 0.5)

    def made(**other):
        return sparse_optax.rigl(SGD, **{**CYCLES, "within": free, **other})

    with refuses("rigl", "within", "54 weights", "asks for 7[56]"):
        made(density=0.7).init(params)
    with refuses("rigl", "within", "Dense_9", "Dense_0/kernel"):
        made(within={"Dense_9": jnp.ones((3, 3), bool)}).init(params)
    wrong = {"Dense_0": {"kernel": jnp.ones((3, 3), bool)}}
    with refuses("rigl", "Dense_0/kernel", r"\(3, 3\)", r"\(12, 9\)"):
        made(within=wrong).init(params)
    with refuses("rigl", "pattern", "blocks", "None beside `within`"):
        made(pattern=patterns.blocks(3, 1))
    others = masks.combine(jnp.logical_not, free)
    with refuses("rigl", "within", "weights of 'Dense_0/kernel'", "none"):
        made(density=None, masks=others).init(params)
    state = made().init(params)
    with refuses("set_masks", "within", "54 weights", "none"):
        sparse_optax.set_masks(state, others)
    common = dict(
        prune=prune.magnitude, redistribute=redistribute.none, grow=grow.magnitude,
        **CYCLES,
    )  # fmt: skip
    for other in (dict(freeze=True, hidden=True), dict(freeze=True, within=free)):
        with refuses("regrow", "freeze", "True", "False"):
            regrowth.regrow(SGD, **common, **other)
    with refuses("regrow", "hidden", "True", "False beside `within`"):
        regrowth.regrow(SGD, hidden=True, within=free, **common)
    with refuses("static_sparse", "freeze", "'yes'", "True or False"):
        sparse_optax.static_sparse(SGD, density=0.2, key=0, freeze="yes")
