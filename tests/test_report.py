"""What a run did: every number against a hand-worked one or a count by NumPy."""

import dataclasses
import itertools
import json
import math
import re

import flax.nnx as nnx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import network, random_gradients, refuses, stepper
from hypothesis import given

import sparse_optax
from sparse_optax import budgets, export, masks, report

HOLE = optax.MaskedNode()
SHAPES = ((4, 3), (3, 5))
PARAMS = network(SHAPES)


def array(rows, dtype=bool):
    return np.array(rows, dtype)


def summary_by_name(*args, **kwargs):
    made = report.summary(*args, **kwargs)
    return {layer.name: layer for layer in made.layers} | {"total": made.total}


# --- by hand --------------------------------------------------------------------------

HAND = {
    "conv": {"bias": np.ones(2, np.float32), "kernel": array([[1, 0], [2, 0]], "f4")},
    "head": {"kernel": array([[1, 0, 3, 0]] * 3, "f2")},
}
NOW = {
    "conv": {"bias": HOLE, "kernel": array([[1, 1], [0, 0]])},
    "head": {"kernel": array([[1, 0, 0, 1], [0, 0, 0, 1], [1, 0, 0, 0]])},
}
BEFORE = {
    "conv": {"bias": HOLE, "kernel": array([[1, 0], [0, 0]])},
    "head": {"kernel": array([[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])},
}


def test_every_number_by_hand():
    explored = report.explore(report.explore(None, BEFORE), NOW)
    made = report.summary(
        HAND,
        masks=NOW,
        previous_masks=BEFORE,
        explored=explored,
        costs={"conv/kernel": 2 * 49, "head/kernel": 0.5},
    )
    conv, head = made.layers
    assert conv == report.Layer(
        name="conv/kernel",
        weights=4,
        kept=2,
        dense_bytes=16,
        sparse_bytes=1 + 8,
        dense_flops=392,
        kept_flops=196,
        added=1,
        explored=2,
        units=2,
        empty_units=1,  # the second: its one kept weight is zero
        nonzero=2,
        outside=1,
    )
    assert head == report.Layer(
        name="head/kernel",
        weights=12,
        kept=4,
        dense_bytes=24,
        sparse_bytes=2 + 8,
        dense_flops=6,
        kept_flops=2,
        added=2,
        explored=5,
        units=4,
        empty_units=3,  # without weights kept, twice, and with zeros alone
        nonzero=6,
        outside=4,
    )
    assert made.total == report.Layer(
        name="total",
        weights=16,
        kept=6,
        dense_bytes=40,
        sparse_bytes=3 + 16,
        dense_flops=398,
        kept_flops=198,
        added=3,
        explored=7,
        units=6,
        empty_units=4,
        nonzero=8,
        outside=5,
    )
    assert (conv.density, conv.churn, conv.explored_share) == (0.5, 0.5, 0.5)
    assert (made.total.density, made.total.churn) == (6 / 16, 0.5)
    assert (made.dense_weights, made.dense_bytes, made.skipped) == (2, 8, None)
    assert made.file_bytes == 27
    bare = export.sparse_bytes(jax.tree.map(lambda x: x[:0], HAND), {})
    assert (
        made.file_bytes <= export.sparse_bytes(HAND, NOW) < made.file_bytes + bare + 9
    )
    numbers = [v for layer in made.layers for v in layer[1:] if v is not None]
    assert {type(v) for v in numbers} == {int}


def test_the_table_by_hand():
    made = report.summary(HAND, masks=NOW, previous_masks=BEFORE)
    assert report.table(made).splitlines() == [
        "layer        weights  kept  nonzero  outside  density  bytes  churn  "
        "empty_units",
        "conv/kernel        4     2        2        1      50%      9    50%  "
        "          1",
        "head/kernel       12     4        6        4    33.3%     10    50%  "
        "          3",
        "total             16     6        8        5    37.5%     19    50%  "
        "          4",
        "27 bytes sparse, 48 dense; 2 parameters in dense leaves included.",
        "WARNING: 5 weights outside the masks are not zero: bytes and density are not "
        "those of this network. Make the sparse method the last of its chain, or apply "
        "sparse_optax.sparsify(params, opt_state).",
    ]


def test_the_scalars_by_hand():
    made = report.summary(HAND, masks=NOW, previous_masks=BEFORE)
    flat = report.scalars(made)
    assert flat == made.scalars()
    assert flat["density/conv/kernel"] == 0.5
    assert flat["kept/head/kernel"] == 4
    assert flat["churn/total"] == 0.5
    assert flat["file_bytes/total"] == 27
    assert {name.split("/")[0] for name in flat} == {
        "weights",
        "kept",
        "nonzero",
        "outside",
        "density",
        "bytes",
        "churn",
        "empty_units",
        "file_bytes",
    }
    assert all(type(value) is float for value in flat.values())
    assert json.loads(json.dumps(flat)) == flat


def test_table_shows_what_is_unknown_as_a_dash():
    params = {"v": np.ones(3, np.float32), "w": np.eye(2, dtype=np.float32)}
    made = report.summary(params, where=lambda name, leaf: True)
    lines = report.table(made).splitlines()
    assert lines[1].split() == ["v", "3", "3", "100%", "13", "-"]
    assert lines[2].split() == ["w", "4", "2", "50%", "9", "0"]
    assert made.layers[0].units is None
    assert "empty_units/v" not in made.scalars()


# --- counts ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e5m2"])
def test_without_a_state_what_is_not_zero_is_kept(dtype):
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    values = array([[0.0, -0.0, tiny], [np.nan, np.inf, -1.0]], np.float32)
    params = {"bias": np.ones(3, dtype), "w": values.astype(dtype)}
    for leaf in (params, jax.tree.map(jnp.asarray, params)):
        (layer,) = report.summary(leaf).layers
        assert (layer.name, layer.kept, layer.empty_units) == ("w", 4, 0)


def test_where_chooses_the_layers():
    made = report.summary(PARAMS, where=lambda name, leaf: "1/kernel" in name)
    assert [layer.name for layer in made.layers] == ["Dense_1/kernel"]
    assert made.dense_weights == 12 + 3 + 5


@st.composite
def cases(draw):
    rank = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    stacked = draw(st.none() | st.integers(0, rank - 1)) if rank > 1 else None
    slice_rank = rank - (stacked is not None)
    unit_axis = draw(st.integers(-slice_rank, slice_rank - 1))
    return shape, stacked, unit_axis, draw(st.integers(0, 2**32 - 1))


@given(cases())
def test_counts_are_those_of_numpy(case):
    shape, stacked, unit_axis, seed = case
    rng = np.random.default_rng(seed)
    x = rng.integers(-1, 2, shape).astype(np.float32)
    now, before, ever = rng.random((3, *shape)) < 0.4
    made = report.summary(
        {"w": x},
        masks={"w": now},
        previous_masks={"w": before},
        explored={"w": ever},
        stacked=None if stacked is None else {"w": stacked},
        unit_axis=unit_axis,
    )
    parts = [(x, now, before, ever)]
    if stacked is not None:
        parts = list(zip(*(np.moveaxis(a, stacked, 0) for a in parts[0]), strict=True))
    assert len(made.layers) == len(parts)
    for i, (layer, (x_i, now_i, before_i, ever_i)) in enumerate(
        zip(made.layers, parts, strict=True)
    ):
        assert layer.name == ("w" if stacked is None else f"w[{i}]")
        assert layer.weights == x_i.size
        assert layer.kept == now_i.sum()
        assert layer.added == (now_i & ~before_i).sum()
        assert layer.explored == ever_i.sum()
        assert layer.sparse_bytes == math.ceil(x_i.size / 8) + 4 * now_i.sum()
        if x_i.ndim < 2:
            assert layer.empty_units is None
            continue
        incoming = np.moveaxis(now_i * x_i, unit_axis, 0)
        assert layer.units == len(incoming)
        assert layer.empty_units == sum(not unit.any() for unit in incoming)
    assert made.total.kept == now.sum()
    assert made.total.added == (now & ~before).sum()
    assert made.total.sparse_bytes == math.ceil(x.size / 8) + 4 * now.sum()


def test_flops_stay_within_their_budget():
    costs = {"Dense_0/kernel": 2 * 7, "Dense_1/kernel": 2}
    made = masks.random_masks(0, PARAMS, budgets.num_flops(100, costs))
    layers = summary_by_name(PARAMS, masks=made, costs=costs)
    assert layers["total"].dense_flops == 14 * 12 + 2 * 15
    assert 100 - 2 < layers["total"].kept_flops <= 100
    chosen = sparse_optax.eligible(PARAMS)
    tree = jax.tree.map(lambda is_layer: 3 if is_layer else HOLE, chosen)
    assert report.summary(PARAMS, costs=tree).total.dense_flops == 3 * 27


def test_costs_are_exact():
    """Tenths add up to whole numbers, and large numbers to the unit."""
    made = report.summary({"w": jnp.ones((2, 5))}, costs={"w": 0.1})
    assert made.total.dense_flops == 1
    made = report.summary({"w": jnp.ones((3, 1))}, costs={"w": 2**60 + 1})
    assert made.total.dense_flops == 3 * 2**60 + 3


def test_no_layer_no_error():
    made = report.summary({})
    assert made.layers == ()
    assert (made.total.density, made.file_bytes) == (1.0, 0)
    assert report.table(made).splitlines()[1].split()[0] == "total"


# --- explored weights -----------------------------------------------------------------


def test_explored_weights_add_up_under_jit():
    rng = np.random.default_rng(0)
    trees = [{"b": HOLE, "w": rng.random((3, 4)) < 0.3} for _ in range(4)]
    explore = jax.jit(report.explore)
    seen = report.explore(None, trees[0])
    for tree in trees[1:]:
        seen = explore(seen, tree)
    np.testing.assert_array_equal(seen["w"], np.any([t["w"] for t in trees], axis=0))
    assert isinstance(seen["b"], optax.MaskedNode)


def test_explored_weights_are_no_part_of_a_donated_state():
    first = {"w": jnp.array([[True, False]])}
    seen = report.explore(None, first)
    first["w"].delete()
    assert seen["w"].tolist() == [[True, False]]


def test_explored_weights_of_packed_masks():
    mask = array([[1, 0, 1]])
    seen = report.explore(None, {"w": masks.pack(jnp.asarray(mask))})
    np.testing.assert_array_equal(seen["w"], mask)


# --- states of regrow -----------------------------------------------------------------


def momentum(**kwargs):
    settings = dict(density=0.5, update_period=2, update_stop=20, key=0) | kwargs
    return sparse_optax.sparse_momentum_regrow(optax.sgd(0.1, momentum=0.9), **settings)


def by_layer(params):
    """Labels for optax.partition: the first layer is a, the second b."""
    labels = dict(zip(sorted(params), "ab", strict=True))
    return {
        name: jax.tree.map(lambda _, label=label: label, params[name])
        for name, label in labels.items()
    }


WRAPPERS = {
    "plain": lambda: momentum(),
    "packed": lambda: momentum(packed=True),
    "chain": lambda: optax.chain(optax.clip(1.0), momentum()),
    "named_chain": lambda: optax.named_chain(("sparse", momentum())),
    "multi_steps": lambda: optax.MultiSteps(momentum(), 2),
    "injected": lambda: optax.inject_hyperparams(
        lambda prune_rate: momentum(prune_rate=prune_rate)
    )(prune_rate=0.5),
    "partition": lambda: optax.partition(
        {"a": momentum(), "b": momentum(key=1)}, by_layer
    ),
    "one inside another": lambda: sparse_optax.sparse_momentum_regrow(
        momentum(where=lambda name, leaf: name == "Dense_0/kernel"),
        density=0.5,
        update_period=2,
        update_stop=20,
        key=0,
        where=lambda name, leaf: name == "Dense_1/kernel",
    ),
}


def marked(state, removed, grown):
    """The state with other numbers in it, one a leaf."""

    def is_regrow(node):
        return hasattr(node, "regrow_masks")

    def numbers(tree, values):
        values = iter(values)
        return jax.tree.map(lambda x: jnp.full_like(x, next(values)), tree)

    def mark(node):
        if not is_regrow(node):
            return node
        count = len(jax.tree.leaves(node.removed))
        return node._replace(
            removed=numbers(node.removed, itertools.islice(removed, count)),
            grown=numbers(node.grown, itertools.islice(grown, count)),
            skipped=jnp.full_like(node.skipped, 3),
            inner_state=jax.tree.map(mark, node.inner_state, is_leaf=is_regrow),
        )

    return jax.tree.map(mark, state, is_leaf=is_regrow)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_states_are_found_anywhere(wrapper):
    state = WRAPPERS[wrapper]().init(PARAMS)
    state = marked(state, itertools.count(1), itertools.count(11))
    kept = sparse_optax.get_masks(state)
    made = report.summary(PARAMS, state)
    assert [layer.name for layer in made.layers] == ["Dense_0/kernel", "Dense_1/kernel"]
    for layer, (name, tree) in zip(made.layers, sorted(kept.items()), strict=True):
        assert layer.name.startswith(name)
        assert layer.kept == np.asarray(tree["kernel"]).sum()
    assert sorted(layer.removed for layer in made.layers) == [1, 2]
    assert sorted(layer.grown for layer in made.layers) == [11, 12]
    assert (made.total.removed, made.total.grown) == (3, 23)
    several = wrapper in ("partition", "one inside another")
    assert made.skipped == (6 if several else 3)
    assert made.scalars()["skipped/total"] == made.skipped
    assert "cycles skipped" in report.table(made)


def test_a_run_is_what_numpy_sees_of_it():
    tx = momentum(update_period=2, prune_rate=0.5)
    step, params, state = stepper(tx), PARAMS, tx.init(PARAMS)
    gradients = random_gradients(0, PARAMS, 3)
    before = jax.tree.map(np.asarray, sparse_optax.get_masks(state))
    for t in range(3):
        gradient = jax.tree.map(lambda g, t=t: g[t], gradients)
        params, state = step(params, state, gradient)
    made = report.summary(params, state, before)
    after = sparse_optax.get_masks(state)
    total = 0
    for layer, name in zip(made.layers, sorted(before), strict=True):
        old, new = before[name]["kernel"], np.asarray(after[name]["kernel"])
        weights = np.asarray(params[name]["kernel"])
        assert layer.removed == old.sum() // 2
        assert layer.kept == new.sum()
        assert layer.kept - old.sum() == layer.grown - layer.removed
        assert layer.churn == (new & ~old).sum() / new.sum()
        alive = (new & (weights != 0)).any(axis=0)
        assert layer.empty_units == (~alive).sum()
        total += (new & ~old).sum()
    assert total > 0
    assert made.total.added == total
    assert made.total.removed == made.total.grown == 3 + 3
    assert made.skipped == 0


def test_weights_outside_the_masks_are_shouted_about():
    """Scaled updates leave missing weights over; a report without them is silent."""
    finished = {}
    for name, tx in {
        "last": momentum(),
        "not last": optax.chain(momentum(), optax.scale(0.9)),
    }.items():
        step, params, state = stepper(tx), PARAMS, tx.init(PARAMS)
        for _ in range(7):
            params, state = step(params, state, jax.tree.map(jnp.ones_like, params))
        finished[name] = params, report.summary(params, state)
    params, made = finished["not last"]
    kept = [np.asarray(m) for m in jax.tree.leaves(sparse_optax.get_masks(state))]
    found = [np.asarray(params[name]["kernel"]) for name in sorted(params)]
    outside = [int((w != 0)[~m].sum()) for w, m in zip(found, kept, strict=True)]
    assert [layer.outside for layer in made.layers] == outside
    assert made.total.outside == sum(outside) > 0
    assert made.total.nonzero == sum(int((w != 0).sum()) for w in found)
    assert made.misplaced == 2  # looked at after the cycles at 2 and at 4
    text = report.table(made)
    assert f"WARNING: {sum(outside)} weights outside the masks are not zero" in text
    assert "WARNING: 2 times missing weights did not become zero" in text
    assert made.scalars()["misplaced/total"] == 2
    assert made.scalars()["outside/total"] == sum(outside)
    _, right = finished["last"]
    assert (right.total.outside, right.misplaced) == (0, 0)
    assert right.total.nonzero <= right.total.kept
    assert "WARNING" not in report.table(right)


def test_no_masks_no_weights_outside():
    made = report.summary(HAND)
    assert made.total.nonzero is made.total.outside is made.misplaced is None
    assert "WARNING" not in report.table(made)


def test_previous_masks_may_be_the_state_of_then():
    states = [momentum(key=key).init(PARAMS) for key in (0, 1)]
    old, new = map(sparse_optax.get_masks, states)
    made = report.summary(PARAMS, states[1], states[0])
    wanted = sum(
        (np.asarray(new[k]["kernel"]) & ~np.asarray(old[k]["kernel"])).sum()
        for k in old
    )
    assert made.total.added == wanted > 0


@pytest.mark.parametrize("told", [True, False])
def test_stacked_layers(told):
    params = {"blocks": {"kernel": jnp.ones((3, 4, 5))}, "head": jnp.ones((5, 2))}
    stacked = {"blocks/kernel": 0}
    state = momentum(stacked=stacked).init(params)
    per_slice = {"blocks": {"kernel": jnp.array([1, 2, 3])}, "head": jnp.array(4)}
    state = state._replace(removed=per_slice)
    made = report.summary(
        params,
        state,
        stacked=stacked if told else None,
        costs={n: 2 for n in ("blocks/kernel", "head")},
    )
    assert made.total.removed == 10
    assert made.total.kept_flops == 2 * (3 * 10 + 5)
    removed = {layer.name: layer.removed for layer in made.layers}
    if told:
        names = [f"blocks/kernel[{i}]" for i in range(3)]
        assert removed == dict(zip([*names, "head"], (1, 2, 3, 4), strict=True))
        assert [layer.kept for layer in made.layers] == [10, 10, 10, 5]
    else:
        assert removed == {"blocks/kernel": 6, "head": 4}


def test_slices_that_the_state_does_not_tell_apart():
    params = {"kernel": jnp.ones((3, 4, 5))}
    state = momentum().init(params)._replace(removed={"kernel": jnp.array(7)})
    made = report.summary(params, state, stacked={"kernel": 0})
    assert [layer.removed for layer in made.layers] == [None] * 3
    assert made.total.removed == 7


# --- states of GSM --------------------------------------------------------------------


def after_one_step(tx):
    gradient = jax.tree.map(lambda g: g[0], random_gradients(1, PARAMS, 1))
    return gradient, tx.update(gradient, tx.init(PARAMS), PARAMS)[1]


@pytest.mark.parametrize(
    "tx",
    [
        sparse_optax.gsm_mask(0.2),
        optax.chain(sparse_optax.gsm_mask(0.2), optax.sgd(0.1)),
        sparse_optax.gsm(0.1, 0.2),
    ],
)
def test_what_gsm_let_pass(tx):
    gradient, state = after_one_step(tx)
    made = report.summary(PARAMS, state)
    saliency = {
        k: np.abs(np.asarray(gradient[k]["kernel"]) * np.asarray(v["kernel"]))
        for k, v in PARAMS.items()
    }
    pool = np.sort(np.concatenate([s.ravel() for s in saliency.values()]))[::-1]
    for layer, score in zip(made.layers, saliency.values(), strict=True):
        assert layer.passed == (score >= pool[4]).sum()  # floor(0.2 * 27) pass
        assert layer.kept == layer.weights
        assert pool[5] <= layer.threshold <= pool[4]
    assert made.total.passed == 5
    assert made.total.threshold == made.layers[0].threshold
    assert made.skipped is None
    assert "threshold" in report.table(made)


def test_masks_after_the_cut_beside_a_state_of_gsm():
    _, state = after_one_step(sparse_optax.gsm_mask(0.2))
    cut = masks.magnitude_masks(PARAMS, 0.2)
    made = report.summary(sparse_optax.sparsify(PARAMS, cut), state, masks=cut)
    assert (made.total.kept, made.total.passed) == (5, 5)


def test_two_methods_on_disjoint_leaves():
    tx = optax.partition({"a": momentum(), "b": sparse_optax.gsm_mask(0.2)}, by_layer)
    state = tx.init(PARAMS)
    seen = report.explore(None, sparse_optax.get_masks(state))
    made = report.summary(PARAMS, state, state, explored=seen)
    regrown, gated = made.layers
    assert (regrown.kept, regrown.removed, regrown.passed) == (6, 0, None)
    assert (gated.kept, gated.removed, gated.passed) == (15, None, 0)
    assert (regrown.churn, regrown.explored) == (0, 6)
    assert (gated.churn, made.total.churn, made.total.explored) == (None, None, None)
    assert (made.total.removed, made.total.passed) == (0, 0)


def test_two_thresholds_have_no_total():
    gates = {"a": sparse_optax.gsm_mask(0.2), "b": sparse_optax.gsm_mask(0.6)}
    _, state = after_one_step(optax.partition(gates, by_layer))
    made = report.summary(PARAMS, state)
    assert made.layers[0].threshold != made.layers[1].threshold
    assert made.total.threshold is None
    assert [layer.passed for layer in made.layers] == [2, 9]


# --- trees ----------------------------------------------------------------------------


def test_nnx_model_and_optimizer():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, momentum(), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    made = report.summary(params, optimizer.opt_state, optimizer.opt_state)
    (layer,) = made.layers
    assert (layer.name, layer.kept, layer.removed, layer.added) == ("kernel", 15, 0, 0)
    assert made.dense_weights == 5
    gated = nnx.Optimizer(model, sparse_optax.gsm_mask(0.5), wrt=nnx.Param)
    (layer,) = report.summary(params, gated.opt_state).layers
    assert (layer.passed, layer.threshold) == (0, 0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """What equinox gives: outputs first, None for what was filtered, functions."""

    weight: jax.Array
    bias: jax.Array | None
    activation: object


def test_module_with_none_and_function_leaves():
    weight = array([[1, 0], [0, 0], [2, 3]], np.float32)
    (layer,) = report.summary(Module(weight, None, jnp.tanh), unit_axis=0).layers
    assert (layer.name, layer.kept, layer.units, layer.empty_units) == (
        "weight",
        3,
        3,
        1,
    )


# --- output units ---------------------------------------------------------------------


def test_dead_units_of_equinox_are_rows():
    """96 columns without a weight are inputs that nobody reads, not dead units."""
    weight = np.zeros((32, 128), np.float32)
    weight[:, :32] = 1
    weight[5] = 0
    tree = {"linear": {"weight": weight, "bias": np.zeros(32, np.float32)}}
    layer, total = summary_by_name(tree)["linear/weight"], report.summary(tree).total
    assert (layer.units, layer.empty_units) == (32, 1)
    assert (total.units, total.empty_units) == (32, 1)
    turned = {"linear": {"kernel": weight.T, "bias": tree["linear"]["bias"]}}
    assert summary_by_name(turned)["linear/kernel"].empty_units == 1


def test_units_of_convolutions_and_attention():
    rng = np.random.default_rng(0)
    conv = rng.normal(size=(4, 3, 5, 5)).astype(np.float32)  # equinox: (out, in, h, w)
    query = rng.normal(size=(8, 2, 3)).astype(np.float32)  # flax: (in, heads, dim)
    conv[2] = query[:, 1, 2] = 0
    tree = {"conv": {"weight": conv}, "query": {"kernel": query}}
    found = summary_by_name(tree)
    layer = found["conv/weight"]
    assert (layer.units, layer.empty_units) == (4, 1)
    layer = found["query/kernel"]
    assert (layer.units, layer.empty_units) == (6, 1)
    stacked = {"query": {"kernel": np.stack([query, query * 0])}}
    made = report.summary(stacked, stacked={"query/kernel": 0})
    assert [(x.units, x.empty_units) for x in made.layers] == [(6, 1), (6, 6)]


def test_units_that_cannot_be_told_are_asked_for():
    x = np.ones((8, 2, 3), np.float32)
    x[:, 1, 2] = 0
    tree = {"proj": {"kernel": x}, "w": np.ones((2, 2), np.float32)}
    made = report.summary(tree)
    layer = made.layers[0]
    assert layer.units is layer.empty_units is made.total.empty_units is None
    assert made.unknown_units == ("proj/kernel",)
    assert "unit_axis={'proj/kernel': axis" in report.table(made)
    made = report.summary(tree, unit_axis={"proj/kernel": (1, 2)})
    assert (made.layers[0].units, made.layers[0].empty_units) == (6, 1)
    assert (made.layers[1].units, made.total.units) == (2, 8)
    assert made.unknown_units == ()
    assert "unit_axis" not in report.table(made)
    made = report.summary(tree, unit_axis={"proj/kernel": 1})
    assert (made.layers[0].units, made.layers[0].empty_units) == (2, 0)
    with refuses("summary", "unit_axis", "nobody", "proj/kernel"):
        report.summary(tree, unit_axis={"nobody": 0})


def test_complex_weights_count_as_one_weight():
    x = np.zeros((3, 2), np.complex64)
    x[0, 0], x[1, 0], x[2, 1] = 1, 1j, 1e-45
    made = report.summary({"kernel": x})
    (layer,) = made.layers
    assert (layer.weights, layer.kept, layer.empty_units) == (6, 3, 0)
    assert (layer.dense_bytes, layer.sparse_bytes) == (48, 1 + 3 * 8)


# --- what does not fit ----------------------------------------------------------------

KEPT = {f"Dense_{i}": {"kernel": np.ones(s, bool)} for i, s in enumerate(SHAPES)}
OTHER = {"Dense_0": KEPT["Dense_0"]}
TURNED = {k: {"kernel": v["kernel"].T} for k, v in KEPT.items()}
REFUSED = {
    "a dense state": (
        lambda: report.summary(PARAMS, optax.sgd(0.1, momentum=0.9).init(PARAMS)),
        "opt_state",
        "no sparse method",
    ),
    "two gates": (
        lambda: report.summary(
            PARAMS, optax.chain(*[sparse_optax.gsm_mask(0.5)] * 2).init(PARAMS)
        ),
        "opt_state",
        "Dense_0/kernel",
    ),
    "a state of other parameters": (
        lambda: report.summary({"w": jnp.ones((2, 2))}, momentum().init(PARAMS)),
        "masks",
        "Dense_0/kernel",
    ),
    "where beside masks": (
        lambda: report.summary(PARAMS, masks=KEPT, where=lambda name, leaf: True),
        "where",
        "function",
    ),
    "too few previous masks": (
        lambda: report.summary(PARAMS, previous_masks=OTHER),
        "previous_masks",
        "Dense_1/kernel",
    ),
    "unknown explored": (
        lambda: report.summary(PARAMS, masks=OTHER, explored=KEPT),
        "explored",
        "Dense_1/kernel",
    ),
    "shapes of masks": (
        lambda: report.summary(PARAMS, masks=TURNED),
        "masks",
        r"\(3, 4\)",
    ),
    "shapes of previous masks": (
        lambda: report.summary(PARAMS, previous_masks=TURNED),
        "previous_masks",
        r"\(3, 4\)",
    ),
    "masks of floats": (
        lambda: report.summary(PARAMS, masks=PARAMS),
        "mask",
        "float32",
    ),
    "a missing cost": (
        lambda: report.summary(PARAMS, costs={"Dense_0/kernel": 2}),
        "costs",
        "Dense_1/kernel",
    ),
    "a negative cost": (
        lambda: report.summary({"w": jnp.ones((2, 2))}, costs={"w": -2}),
        "costs",
        "-2",
    ),
    "a cost that is no number": (
        lambda: report.summary({"w": jnp.ones((2, 2))}, costs={"w": "2"}),
        "costs",
        "'2'",
    ),
    "an axis of units": (lambda: report.summary(PARAMS, unit_axis=2), "unit_axis", "2"),
    "an axis of layers": (
        lambda: report.summary(PARAMS, stacked={"Dense_0/kernel": 5}),
        "stacked",
        "5",
    ),
    "a mask of integers": (
        lambda: report.summary({"n": jnp.arange(2)}, masks={"n": jnp.ones(2, bool)}),
        "masks",
        "int32",
    ),
    "no layer": (lambda: report.summary({"b": jnp.ones(3)}), "leaf", "'b'"),
    "abstract parameters": (
        lambda: report.summary(jax.eval_shape(lambda: PARAMS)),
        "params",
        "ShapeDtypeStruct",
    ),
    "a tracer": (
        lambda: jax.jit(lambda p: report.summary(p).total.kept)(PARAMS),
        "params",
        "jit",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_that_do_not_fit(what):
    call, argument, value = REFUSED[what]
    with refuses("summary", argument, value):
        call()


@pytest.mark.parametrize("masks_now", [TURNED, OTHER])
def test_explore_refuses(masks_now):
    with refuses("explore", "explored"):
        report.explore(KEPT, masks_now)


# --- ensembles ------------------------------------------------------------------------


def _members(keys, wrap=lambda tx: tx, packed=False):
    """The state of three members that keep a fifth of the same weights."""

    def start(key):
        tx = sparse_optax.rigl(
            optax.sgd(0.1),
            density=0.2,
            update_period=2,
            update_stop=9,
            key=key,
            packed=packed,
        )
        return wrap(tx).init(PARAMS)

    axes = None if isinstance(keys, int) else 0
    return jax.vmap(start, in_axes=axes, axis_size=3)(keys)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "wrap",
    [lambda tx: tx, lambda tx: optax.chain(optax.clip(1.0), tx), optax.apply_if_finite],
    ids=["alone", "chained", "wrapped"],
)
def test_members_with_one_integer_key_hold_one_mask(wrap, packed):
    if wrap is optax.apply_if_finite:
        wrap = lambda tx: optax.apply_if_finite(tx, 3)  # noqa: E731
    one = _members(0, wrap, packed)
    assert report.same_masks(one)
    own = _members(jax.random.split(jax.random.key(0), 3), wrap, packed)
    assert not report.same_masks(own)
    assert report.same_masks(_members(jnp.array([4, 4, 4]), wrap, packed))
    # One member that differs is enough.
    assert not report.same_masks(_members(jnp.array([4, 4, 5]), wrap, packed))


def test_members_of_nested_ensembles():
    grid = jax.vmap(jax.vmap(lambda seed: _start(seed)))
    assert not report.same_masks(grid(jnp.array([[0, 0], [1, 1]])))
    assert report.same_masks(grid(jnp.array([[3, 3], [3, 3]])))


def _start(seed):
    return sparse_optax.static_sparse(density=0.2, key=seed).init(PARAMS)


def test_same_masks_refuses():
    with refuses("same_masks", "`opt_state`", "one network", "leading axis"):
        report.same_masks(_start(0))
    with refuses("same_masks", "`opt_state`", "no masks", "a method"):
        report.same_masks(optax.sgd(0.1).init(PARAMS))
    with refuses("same_masks", "`opt_state`", "traced", "concrete"):
        jax.jit(report.same_masks)(_members(0))


# --- members of a batch ---------------------------------------------------------------
def test_one_summary_for_each_member():
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x, 3 * x]), PARAMS)

    def make(key):
        return sparse_optax.rigl(
            optax.sgd(0.1), density=0.5, update_period=2, update_stop=9, key=key
        )

    keys = jax.random.split(jax.random.key(0), 3)
    state = jax.vmap(lambda key, p: make(key).init(p))(keys, params)
    found = report.summary(params, state)
    assert len(found) == 3
    for i, summary in enumerate(found):
        member = jax.tree.map(lambda x: x[i], (params, state))  # noqa: B023
        assert summary == report.summary(*member)
        assert "same masks" not in report.table(summary)
    # One key for all of them.
    state = jax.vmap(lambda p: make(0).init(p))(params)
    for summary in report.summary(params, state):
        assert summary.shared_masks
        assert report.table(summary).count("hold the same masks") == 1
    with refuses("summary", "opt_state", "3 members", "leading axis"):
        report.summary(PARAMS, state)


# --- metrics --------------------------------------------------------------------------
def _trained(make, params=PARAMS, steps=3, **options):
    """Parameters and state after a few updates."""
    tx = make(optax.sgd(0.1), density=0.5, update_period=2, update_stop=9, **options)
    state = tx.init(params)
    for i in range(steps):
        grads = jax.tree.map(lambda x: jnp.cos(x * (i + 1)), params)  # noqa: B023
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def same_as_scalars(found, scalars):
    """Every metric is a scalar of the summary with the same number."""
    assert {"density/total", "kept/total"} <= found.keys() <= scalars.keys()
    for name, value in found.items():
        assert np.shape(value) == ()
        want = scalars[name]
        near = pytest.approx(want, rel=1e-6)
        assert float(value) == (near if name.startswith("density") else want), name


@pytest.mark.parametrize("packed", [False, True])
def test_metrics_under_jit_are_the_scalars_of_the_summary(packed):
    made = _trained(sparse_optax.rigl, key=0, packed=packed)
    found = jax.jit(report.metrics)(*made)
    same_as_scalars(found, report.summary(*made).scalars())
    assert float(found["grown/total"]) > 0
    assert {"removed/Dense_0/kernel", "skipped/total", "misplaced/total"} <= set(found)
    assert found["kept/total"].dtype == jnp.int32


def test_metrics_of_given_masks_of_no_masks_and_of_gsm():
    same_as_scalars(report.metrics(PARAMS), report.summary(PARAMS).scalars())
    params = jax.tree.map(jnp.asarray, HAND)
    found = jax.jit(lambda p, m: report.metrics(p, masks=m))(params, NOW)
    same_as_scalars(found, report.summary(params, masks=NOW).scalars())
    assert int(found["outside/conv/kernel"]) == 1
    tx = sparse_optax.gsm_mask(0.5)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    found = jax.jit(report.metrics)(PARAMS, state)
    same_as_scalars(found, report.summary(PARAMS, state).scalars())
    assert int(found["passed/total"]) == 13


def test_metrics_of_stacked_layers():
    params = {"layers": {"kernel": jnp.arange(24.0).reshape(2, 4, 3) - 5}}
    stacked = {"layers/kernel": 0}
    made = _trained(sparse_optax.rigl, params, key=0, stacked=stacked)
    found = jax.jit(lambda *x: report.metrics(*x, stacked=stacked))(*made)
    scalars = report.summary(*made, stacked=stacked).scalars()
    same_as_scalars(found, scalars)
    assert int(found["kept/layers/kernel[1]"]) == 6


def test_metrics_of_members_have_their_axis():
    params = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)

    def start(key, p):
        tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.2, key=key)
        return report.metrics(p, tx.init(p))

    keys = jax.random.split(jax.random.key(0), 2)
    found = jax.jit(jax.vmap(start))(keys, params)
    assert found["kept/total"].tolist() == [5, 5]


def test_the_table_of_members_is_one_of_each():
    summaries = [
        report.summary(PARAMS),
        report.summary(jax.tree.map(jnp.zeros_like, PARAMS)),
    ]
    first, second = map(report.table, summaries)
    expected = f"member 0\n{first}\n\nmember 1\n{second}"
    assert report.table(tuple(summaries)) == expected


def test_metrics_refuses():
    with refuses("metrics", "`opt_state`", "no sparse method"):
        report.metrics(PARAMS, optax.sgd(0.1).init(PARAMS))
    with refuses("metrics", "`masks`", "no layers here"):
        report.metrics(PARAMS, masks={"x": jnp.ones((2, 2), bool)})


def _other(change):
    """Parameters whose kernels are changed, with the state of the first ones."""
    params = jax.tree.map(lambda x: change(x) if x.ndim > 1 else x, PARAMS)
    tx = sparse_optax.static_sparse(optax.sgd(0.1), density=0.5, key=0)
    return params, tx.init(PARAMS)


@pytest.mark.parametrize("count", [report.metrics, report.summary])
@pytest.mark.parametrize(
    ("change", "value", "allowed"),
    [
        (jnp.transpose, "Dense_0/kernel", "must be equal"),
        (lambda x: x[:1, :1], "Dense_0/kernel", "must be equal"),
        (lambda x: x.astype(int), "int", "floating and complex"),
        (lambda x: 1.0, "float", "an array"),
        (lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), "abstract", "values"),
    ],
)
def test_counts_of_other_parameters_than_the_state(count, change, value, allowed):
    with refuses(count.__name__, "`params`" if value != "int" else "", value, allowed):
        count(*_other(change))


@pytest.mark.parametrize("wrong", ["x", None, 3, [1], {"a": 1}])
def test_what_is_no_summary_is_refused(wrong):
    value = re.escape(repr(wrong).strip("[]"))
    with refuses("table", "summary", value, "a Summary, or a tuple of them"):
        report.table(wrong)
    with refuses("scalars", "summary", value, "a Summary"):
        report.scalars(wrong)
    with refuses("scalars", "summary", "Summary", "a Summary"):
        report.scalars((report.summary(PARAMS),))
