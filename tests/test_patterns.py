"""Patterns: units that stand and fall together, in the engine, in GSM and in masks.

The oracles are loops over units, written from the definitions: blocks and N:M groups
along inputs and outputs, a unit's score the sum of magnitudes.
"""

import functools
import itertools
import math
from fractions import Fraction

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import kept, refuses, stepper

import sparse_optax
from sparse_optax import budgets, masks, patterns, regrowth, schedules, selection
from sparse_optax.layers import layers_of, leaf_names
from sparse_optax.regrowth import grow, prune, redistribute

BLOCKS, SLICES = patterns.blocks(2, 2), patterns.slices()
OUT, N_M = patterns.output_units(), patterns.n_m(2, 4)
FAN_IN = patterns.constant_fan_in(0.5)
CONV, DENSE = (3, 2, 8, 4), (8, 6)


# --- oracle: the units of a leaf, as lists of positions -------------------------------


def places(shape, sizes):
    """Units of ``sizes`` weights along each axis: lists of positions, in order."""
    grid = [range(0, n, size) for n, size in zip(shape, sizes, strict=True)]
    for corner in itertools.product(*grid):
        inner = [range(c, c + s) for c, s in zip(corner, sizes, strict=True)]
        yield list(itertools.product(*inner))


def units_of(kind, shape):
    """By hand, for flax kernels: the sizes of a unit or of a group of N:M."""
    space = (1,) * (len(shape) - 2)
    return {
        "blocks(2, 2)": (*space, 2, 2),
        "slices()": (*shape[:-2], 1, 1),
        "output_units()": (*shape[:-1], 1),
        "n_m(2, 4)": (*space, 4, 1),
        "constant_fan_in(0.5)": (*shape[:-1], 1),
    }[kind]


def kept_of(pattern, size):
    """Weights that are kept of each group of a pattern of fixed density."""
    return max(1, math.floor(Fraction(str(pattern.density)) * size))


def holds(pattern, mask, sizes=None):
    """Whether each unit is whole or empty, or each group has its n."""
    mask = np.asarray(mask)
    counts = [
        sum(bool(mask[at]) for at in unit)
        for unit in places(mask.shape, sizes or units_of(pattern.name, mask.shape))
    ]
    size = mask.size // len(counts)
    if pattern.density:
        return all(n == kept_of(pattern, size) for n in counts)
    return all(n in (0, size) for n in counts)


def top_units(scores, sizes, weights):
    """Whole units of the largest sums, as many as fit into a number of weights."""
    pool = []
    for leaf, (x, size) in enumerate(zip(scores, sizes, strict=True)):
        for number, unit in enumerate(places(x.shape, size)):
            total = sum(abs(float(x[at])) for at in unit)
            pool.append((-total, leaf, number, unit))
    chosen = [np.zeros(x.shape, bool) for x in scores]
    for _, leaf, _, unit in sorted(pool):
        if len(unit) > weights:
            break
        weights -= len(unit)
        for at in unit:
            chosen[leaf][at] = True
    return chosen


def top_n_of_m(x, n, sizes):
    chosen = np.zeros(x.shape, bool)
    for unit in places(x.shape, sizes):
        for at in sorted(unit, key=lambda at: -abs(float(x[at])))[:n]:
            chosen[at] = True
    return chosen


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# --- units ----------------------------------------------------------------------------

CASES = [
    (BLOCKS, CONV, None, (1, 1, 2, 2)),
    (BLOCKS, DENSE, None, (2, 2)),
    (patterns.blocks(4, 1), CONV, None, (1, 1, 4, 1)),
    (patterns.blocks(2, 4, axes=(1, 0)), (8, 6, 3, 3), None, (4, 2, 1, 1)),  # OIHW
    (SLICES, CONV, None, (3, 2, 1, 1)),
    (SLICES, DENSE, None, (1, 1)),
    (patterns.slices(axes=(0, 1)), (8, 6, 3, 3), None, (1, 1, 3, 3)),
    (OUT, CONV, None, (3, 2, 8, 1)),
    (OUT, DENSE, None, (8, 1)),
    (patterns.output_units(axis=0), (6, 8), None, (1, 8)),
    (BLOCKS, (3, *DENSE), 0, (1, 2, 2)),
    (OUT, (3, *DENSE), 0, (1, 8, 1)),
    (OUT, (8, 3, 6), 1, (8, 1, 1)),
    (SLICES, (5, *CONV), 0, (1, 3, 2, 1, 1)),
]


@pytest.mark.parametrize(("pattern", "shape", "stacked", "sizes"), CASES)
def test_units_have_their_axes(pattern, shape, stacked, sizes):
    x = normal(shape)
    units = pattern.view(x, stacked)
    expected = [sum(abs(float(x[at])) for at in u) for u in places(shape, sizes)]
    np.testing.assert_allclose(units.reshape(-1), expected, rtol=1e-5)
    assert units.shape == pattern.view_shape(shape, stacked)
    assert pattern.unit_size(shape, stacked) == np.prod(sizes)
    chosen = np.random.default_rng(1).random(units.shape) < 0.5
    spread = np.array(pattern.spread(jnp.asarray(chosen), shape, stacked))
    for unit, whole in zip(places(shape, sizes), chosen.reshape(-1), strict=True):
        assert {bool(spread[at]) for at in unit} == {bool(whole)}
    back = pattern.view(jnp.asarray(spread), stacked)
    np.testing.assert_array_equal(back, chosen)
    assert pattern.follows(jnp.asarray(spread), stacked)
    if np.prod(sizes) > 1:
        spread[(0,) * len(shape)] ^= True
        assert not pattern.follows(jnp.asarray(spread), stacked)


@pytest.mark.parametrize(
    ("pattern", "shape", "stacked", "sizes"),
    [
        (N_M, DENSE, None, (4, 1)),
        (N_M, CONV, None, (1, 1, 4, 1)),
        (patterns.n_m(1, 4, axis=1), (6, 8), None, (1, 4)),  # equinox: (out, in)
        (patterns.n_m(2, 4, axis=1), (6, 8, 3, 3), None, (1, 4, 1, 1)),
        (N_M, (3, *DENSE), 0, (1, 4, 1)),
        (patterns.n_m(3, 4, axis=0), (8, 3, 2), 1, (4, 1, 1)),
        (FAN_IN, DENSE, None, (8, 1)),
        (FAN_IN, (3, *DENSE), 0, (1, 8, 1)),
        (FAN_IN, (8, 3, 6), 1, (8, 1, 1)),
        (patterns.constant_fan_in(0.3), CONV, None, (3, 2, 8, 1)),
        (patterns.constant_fan_in(0.01, axis=0), (6, 8), None, (1, 8)),  # equinox
        (patterns.constant_fan_in(0.1, axis=0), (6, 8, 3, 3), None, (1, 8, 3, 3)),
    ],
)
def test_groups_run_along_the_contraction_axis(pattern, shape, stacked, sizes):
    x = normal(shape)
    pattern.check("w", shape, stacked)
    rows = pattern.view(x, stacked)
    groups = [[float(x[at]) for at in unit] for unit in places(shape, sizes)]
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, groups))
    assert rows.shape == pattern.view_shape(shape, stacked)
    assert pattern.unit_size(shape, stacked) == 1
    n = kept_of(pattern, np.prod(sizes))
    largest = jnp.asarray(top_n_of_m(rows, n, (1, rows.shape[1])))
    mask = pattern.spread(largest, shape, stacked)
    np.testing.assert_array_equal(mask, top_n_of_m(x, n, sizes))
    assert pattern.follows(mask, stacked)
    assert not pattern.follows(jnp.ones(shape, bool), stacked)
    # Numbers of groups come back to their layers.
    number = jnp.sum(rows > 0, axis=1)
    positive = np.asarray(x > 0)
    others = tuple(i for i in range(len(shape)) if i != stacked)
    np.testing.assert_array_equal(
        pattern.weights(number, shape, stacked), positive.sum(others)
    )


def test_sums_of_half_precision_are_wide():
    x = jnp.full((256, 1), 1.01, jnp.bfloat16)
    (total,) = OUT.view(x)[0]
    assert total.dtype == jnp.float32
    assert float(total) == 256 * float(x[0, 0])


@pytest.mark.parametrize(
    ("pattern", "shape", "stacked"),
    [
        (N_M, (6, 8), None),
        (BLOCKS, (3, 8), None),
        (patterns.blocks(2, 2, axes=(1, -1)), (4, 4), None),
        (N_M, (8,), None),
        (N_M, (8, 3, 6), 1),
        (N_M, (3, 3, 1, 8), None),  # depthwise
    ],
)
def test_leaves_that_cannot_be_cut_are_named(pattern, shape, stacked):
    with refuses(pattern.name, "'body/kernel'", str(shape[0]), "multiple of"):
        pattern.check("body/kernel", shape, stacked)


@pytest.mark.parametrize(
    "make",
    [
        lambda: patterns.n_m(0, 4),
        lambda: patterns.n_m(5, 4),
        lambda: patterns.n_m(1, 33),
        lambda: patterns.n_m(1, 4.0),
        lambda: patterns.n_m(True, 4),
        lambda: patterns.blocks(0, 2),
        lambda: patterns.blocks(2, 2.5),
    ],
)
def test_sizes_are_whole(make):
    with pytest.raises(ValueError, match=r"^(n_m|blocks): .* must be an integer"):
        make()


@pytest.mark.parametrize("density", [0, 1.5, "a half", None, True, jnp.float32(0.5)])
def test_a_fan_in_is_a_share(density):
    with refuses("constant_fan_in", "density", "", r"\(0, 1\]"):
        patterns.constant_fan_in(density)


@pytest.mark.parametrize(
    ("pattern", "shape", "stacked"),
    [
        (patterns.constant_fan_in(0.5, axis=0), (3, 8, 6), 0),
        (patterns.constant_fan_in(0.5, axis={"body/kernel": (0, 1)}), (8, 6), None),
        (patterns.constant_fan_in(0.5, axis=2), (8, 6), None),
    ],
)
def test_outputs_that_are_no_outputs_are_named(pattern, shape, stacked):
    where = None if stacked is None else {"body/kernel": stacked}
    tree = {"body": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
    with refuses("magnitude_masks", "'body/kernel'", str(shape[0]), "outputs|axis 2"):
        masks.magnitude_masks(tree, None, pattern=pattern, stacked=where)


def test_a_fan_in_counts_as_budgets_do():
    for density, n in ((np.float32(0.29), 29), (0.29, 29), (0.07, 7), (1 / 3, 33)):
        pattern = patterns.constant_fan_in(density)
        made = masks.magnitude_masks({"w": normal((100, 3))}, None, pattern=pattern)
        assert made["w"].sum(0).tolist() == [n] * 3
        assert budgets.count(density, 100) == n


UNEVEN = {"v": (19, 40), "w": (100, 10)}  # a tenth of 19 is 1.9


TENTH = patterns.constant_fan_in(0.1)


def has_its_fan_in(tree):
    found = {name: set((x != 0).sum(0).tolist()) for name, x in tree.items()}
    assert found == {"v": {1}, "w": {10}}


@pytest.mark.parametrize("name", ["ramp", "gradual_magnitude", "top_kast"])
def test_a_fan_in_that_is_rounded_down(name):
    if name == "ramp":
        tx = engine(TENTH, density=None, ramp=lambda t: 0.1, hidden=True)
    else:
        options = {"pattern": TENTH, "update_period": 1, "update_stop": 3}
        options |= {"backward_density": 0.2} if name == "top_kast" else {}
        tx = getattr(sparse_optax, name)(optax.sgd(0.1), **options)
    params = {k: normal(shape) for k, shape in UNEVEN.items()}
    *_, (_, state, _) = run(tx, params, steps=5)
    has_its_fan_in(state.regrow_masks)


def test_gsm_passes_a_fan_in_that_is_rounded_down():
    params, grads = (
        {k: normal(shape, seed) for k, shape in UNEVEN.items()} for seed in (0, 1)
    )
    tx = sparse_optax.gsm_mask(pattern=TENTH)
    updates, _ = tx.update(grads, tx.init(params), params)
    has_its_fan_in(updates)


def test_another_fan_in_reads_its_density_as_the_first_does():
    assert TENTH.with_density(np.float32(0.29)) == patterns.constant_fan_in(0.29)
    assert TENTH.with_density(1.5) == patterns.constant_fan_in(1.0)


def test_top_kast_weighs_its_penalty_by_the_share_that_is_kept():
    """1 of 19 weights into each output is 2 of 38, and 3/38 would be a tenth of 38."""
    pattern, params = patterns.constant_fan_in(0.1), {"w": normal((19, 2))}
    tx = sparse_optax.top_kast(
        optax.sgd(1.0), pattern=pattern, backward_density=1.0, penalty=0.01
    )
    state = tx.init(params)
    missing = ~kept(state)[0]
    assert missing.sum() == 36
    zero = jax.tree.map(jnp.zeros_like, params)
    _, after = tx.update(zero, state, sparse_optax.sparsify(params, state))
    left = np.asarray(after.hidden["w"] / state.hidden["w"])[missing]
    np.testing.assert_allclose(left, 1 - 0.01 / (2 / 38), rtol=1e-5)


def test_every_output_unit_keeps_one_weight_at_least():
    params = {"a": {"kernel": normal((100, 7))}, "b": {"kernel": normal(CONV)}}
    made = masks.magnitude_masks(params, None, pattern=patterns.constant_fan_in(0.001))
    for name, x in ((name, params[name]["kernel"]) for name in params):
        largest = top_n_of_m(x, 1, (*x.shape[:-1], 1))
        np.testing.assert_array_equal(made[name]["kernel"], largest)


# --- axes that are told from names and shapes -----------------------------------------


def rows_of(pattern, tree, stacked=None):
    """``{name: sizes}`` of a group or a unit of each leaf, as the layers see them."""
    abstract = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    found = {}
    for leaf in layers_of(abstract, None, stacked, pattern).leaves:
        x = np.zeros(leaf.shape, bool)
        units = np.zeros(leaf.pattern.view_shape(leaf.shape, leaf.axis), bool)
        first = np.unravel_index(0, units.shape)
        if pattern.density:
            units[0] = True
        else:
            units[first] = True
        x = np.asarray(leaf.pattern.spread(jnp.asarray(units), leaf.shape, leaf.axis))
        found[leaf.name] = tuple(len(set(i.tolist())) for i in np.nonzero(x))
    return found


# name of a kernel: shape, bias beside it, group of 2:4, output unit, slice, block 2 x 4
LAYOUTS = {
    "Dense_0/kernel": ((8, 12), (12,), (4, 1), (8, 1), (1, 1), (2, 4)),
    "Conv_0/kernel": (
        (3, 3, 8, 12),
        None,
        (1, 1, 4, 1),
        (3, 3, 8, 1),
        (3, 3, 1, 1),
        (1, 1, 2, 4),
    ),
    "conv1d/kernel": ((5, 8, 12), None, (1, 4, 1), (5, 8, 1), (5, 1, 1), (1, 2, 4)),
    "biased/kernel": ((5, 8, 12), (12,), (1, 4, 1), (5, 8, 1), (5, 1, 1), (1, 2, 4)),
    "a/query/kernel": ((64, 4, 16), None, (4, 1, 1), (64, 1, 1), (1, 1, 1), (2, 1, 4)),
    "a/key/kernel": ((64, 4, 16), (4, 16), (4, 1, 1), (64, 1, 1), (1, 1, 1), (2, 1, 4)),
    "a/out/kernel": ((4, 16, 64), None, (1, 4, 1), (4, 16, 1), (1, 1, 1), (1, 2, 4)),
    "general/kernel": ((8, 4, 12), (4, 12), (4, 1, 1), (8, 1, 1), (1, 1, 1), (2, 1, 4)),
    "two/kernel": (
        (4, 8, 3, 12),
        (3, 12),
        (1, 4, 1, 1),
        (4, 8, 1, 1),
        (1,) * 4,
        (1, 2, 1, 4),
    ),
    "eqx/weight": ((12, 8), (12,), (1, 4), (1, 8), (1, 1), (4, 2)),
    "eqx_conv/weight": (
        (12, 8, 3, 3),
        (12, 1, 1),
        (1, 4, 1, 1),
        (1, 8, 3, 3),
        (1, 1, 3, 3),
        (4, 2, 1, 1),
    ),
    "own/weight": ((8, 12), (12,), (4, 1), (8, 1), (1, 1), (2, 4)),
    "own/w": ((12, 8), (12,), (1, 4), (1, 8), (1, 1), (4, 2)),
    "conv2_d_transpose/w": (
        (3, 3, 12, 8),
        (12,),
        (1, 1, 1, 4),
        (3, 3, 1, 8),
        (3, 3, 1, 1),
        (1, 1, 4, 2),
    ),
    "Transpose_0/kernel": (
        (3, 3, 12, 8),
        (12,),
        (1, 1, 1, 4),
        (3, 3, 1, 8),
        (3, 3, 1, 1),
        (1, 1, 4, 2),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("layers", [None, 3])
def test_axes_are_those_of_the_layer(name, layers):
    shape, bias, group, unit, spatial, block = LAYOUTS[name]
    parent, key = name.split("/")[-2:]
    stack = () if layers is None else (layers,)
    node = {key: (*stack, *shape)}
    if bias is not None:
        node["bias"] = (*stack, *bias)
    stacked = None if layers is None else {f"{parent}/{key}": 0}
    one = () if layers is None else (1,)
    for pattern, sizes in (
        (N_M, group),
        (OUT, unit),
        (SLICES, spatial),
        (patterns.blocks(2, 4), block),
    ):
        (found,) = rows_of(pattern, {parent: node}, stacked).values()
        assert found == (*one, *sizes), pattern.name


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("proj/kernel", (64, 4, 16)),
        ("q_einsum/w", (4, 64, 16)),
        ("Einsum_0/kernel", (2, 8, 4, 16)),
        ("ConvTranspose_0/kernel", (3, 3, 8, 8)),
    ],
)
def test_axes_that_cannot_be_told_are_asked_for(name, shape):
    parent, key = name.split("/")
    tree = {parent: {key: shape}}
    for pattern, argument in ((N_M, "axis="), (OUT, "axis="), (BLOCKS, "axes=")):
        with pytest.raises(ValueError, match=f"{name}.*cannot be told") as caught:
            rows_of(pattern, tree)
        assert f"{argument}{{'{name}'" in str(caught.value)
    params = {parent: {key: normal(shape)}}
    tx = sparse_optax.gradual_magnitude(
        optax.sgd(0.1), pattern=N_M, update_period=1, update_stop=4
    )
    with refuses("gradual_magnitude", "axis", name, "cannot be told"):
        tx.init(params)
    sizes = tuple(4 if i == 0 else 1 for i in range(len(shape)))
    if shape[0] % 4 == 0:
        given = patterns.n_m(2, 4, axis={name: 0})
        assert rows_of(given, tree) == {name: sizes}
    whole = tuple(1 if i in (1, 2) else n for i, n in enumerate(shape))
    units = patterns.output_units(axis={name: (1, 2)})
    assert rows_of(units, tree) == {name: whole}


def test_axes_given_by_name_are_those_of_that_leaf_alone():
    tree = {"a": {"kernel": (8, 12)}, "b": {"kernel": (8, 12)}}
    pattern = patterns.n_m(2, 4, axis={"a/kernel": 1})
    assert rows_of(pattern, tree) == {"a/kernel": (1, 4), "b/kernel": (4, 1)}
    assert hash(pattern) == hash(patterns.n_m(2, 4, axis={"a/kernel": 1}))
    with refuses("n_m", "axis", "'x'", "integer"):
        patterns.n_m(2, 4, axis={"a/kernel": "x"})


def test_n_m_of_attention_under_a_method():
    """Two of each four inputs of a head, at every step, in queries and in outputs."""
    shapes = {"query": (16, 2, 8), "out": (2, 8, 16)}
    params = {
        name: {"kernel": normal(s, i)} for i, (name, s) in enumerate(shapes.items())
    }
    state = engine(N_M).init(params)
    mask = sparse_optax.get_masks(state)
    assert holds(N_M, mask["query"]["kernel"], (4, 1, 1))
    assert holds(N_M, mask["out"]["kernel"], (1, 4, 1))


# --- axes that a module tells ---------------------------------------------------------


class _Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(8, 12, rngs=rngs)
        self.conv = nnx.Conv(8, 12, (3,), use_bias=False, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 12, (3,), transpose_kernel=True, rngs=rngs)
        self.proj = nnx.LinearGeneral(8, (2, 4), use_bias=False, rngs=rngs)
        self.mix = nnx.Einsum("nta,hab->nthb", (2, 8, 4), rngs=rngs)
        self.first = nnx.Einsum("ta,ahb->thb", (8, 2, 4), rngs=rngs)
        self.low = nnx.LoRALinear(8, 12, lora_rank=4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs)])


def test_axes_of_an_nnx_module():
    module = _Nnx()
    found = patterns.contraction_axes(module)
    assert found == {
        "linear/kernel": -2,
        "conv/kernel": -2,
        "up/kernel": -1,
        "proj/kernel": -3,
        "mix/kernel": -2,
        "first/kernel": -3,
        "low/kernel": -2,
        "low/lora/lora_a": -2,
        "low/lora/lora_b": -2,
        "layers/0/kernel": -2,
    }
    names = set(leaf_names(nnx.state(module, nnx.Param)))
    assert set(found) <= names
    pattern = patterns.n_m(2, 4, axis=found)
    kernels = {n: (8, 2, 4) for n in ("proj/kernel", "first/kernel")}
    made = masks.magnitude_masks(nnx.state(module, nnx.Param), None, pattern=pattern)
    for path in ("proj", "first"):
        assert holds(N_M, made[path]["kernel"].get_value(), (4, 1, 1)), kernels


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        assert isinstance(train, bool)
        y = nn.Conv(8, (3,))(x)
        y = nn.ConvTranspose(8, (3,), transpose_kernel=True)(y)
        y = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8)(y))
        y = nn.DenseGeneral((2, 4), use_bias=False)(y)
        y = nn.DenseGeneral(8, axis=(-2, -1))(y)
        y = nn.Einsum((8, 2, 4), "...a,ahb->...hb")(y)
        return nn.Einsum((2, 4, 8))(y, "nthb,hba->nta")


class _Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        def block(self, x, _):
            return nn.MultiHeadDotProductAttention(2)(x, x), None

        return nn.scan(
            block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )(self, x, None)


def test_axes_of_a_linen_module():
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
    assert patterns.contraction_axes(_Linen(), x, train=True) == {
        "Conv_0/kernel": -2,
        "ConvTranspose_0/kernel": -1,
        "Dense_0/kernel": -2,
        "DenseGeneral_0/kernel": -3,
        "DenseGeneral_1/kernel": -2,
        "Einsum_0/kernel": -3,
        "Einsum_1/kernel": -2,
    }


def test_axes_of_scanned_attention():
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
    found = patterns.contraction_axes(_Scanned(), x)
    variables = jax.eval_shape(_Scanned().init, jax.random.key(0), x)
    shapes = dict(
        zip(
            leaf_names(variables["params"]),
            [leaf.shape for leaf in jax.tree.leaves(variables["params"])],
            strict=True,
        )
    )
    assert len(found) == 4
    for name, axis in found.items():
        # (layers, in, heads, dim), or (layers, heads, dim, out)
        assert shapes[name][axis] == (4 if "out" in name else 8), name


def test_modules_of_other_libraries_are_named():
    with refuses("contraction_axes", "module", "function", "flax"):
        patterns.contraction_axes(jnp.sin)


# --- densities beside N:M -------------------------------------------------------------


def test_masks_refuse_a_density_that_the_pattern_does_not_have():
    params = {"w": normal(DENSE)}
    with refuses("magnitude_masks", "density", "0.3", r"0.5.*n_m\(2, 4\)"):
        masks.magnitude_masks(params, 0.3, pattern=N_M)
    with refuses("score_masks", "density", "0.3", r"0.5.*n_m\(2, 4\)"):
        masks.score_masks(params, params, 0.3, pattern=N_M)
    for same in (None, 0.5):
        made = masks.magnitude_masks(params, same, pattern=N_M)
        assert holds(N_M, made["w"])


# --- the largest of rows --------------------------------------------------------------

# Few values, so that ties are the rule. -0 equals 0, a NaN ranks above infinity.
VALUES = [0.0, -0.0, 1.0, 1.5, -1.0, np.inf, -np.inf, np.nan]


@hypothesis.given(
    st.integers(1, 9).flatmap(
        lambda m: st.lists(
            st.lists(st.sampled_from(VALUES), min_size=m, max_size=m),
            min_size=3,
            max_size=3,
        )
    ),
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@hypothesis.settings(max_examples=8)
def test_top_of_rows_is_a_stable_sort(rows, k, dtype):
    x = jnp.asarray(rows, dtype)
    traced = jax.jit(lambda x, k: selection.top_of_rows([x], k))

    def expected(row, number):
        def rank(i):
            high = np.inf if np.isnan(row[i]) else row[i]
            return (not np.isnan(row[i]), -high, i)

        order = sorted(range(len(row)), key=rank)
        return [i in order[:number] for i in range(len(row))]

    each = [expected(r, n) for r, n in zip(rows, k, strict=True)]
    assert traced(x, jnp.asarray(k)).tolist() == each
    same = [expected(r, k[0]) for r in rows]
    assert selection.top_of_rows([x], k[0]).tolist() == same
    assert traced(x, jnp.int32(k[0])).tolist() == same


def test_top_of_rows_refuses_long_rows():
    with pytest.raises(ValueError, match=r"^top_of_rows: .*\(2, 33\).* 32"):
        selection.top_of_rows([jnp.zeros((2, 33))], 1)


# --- masks ----------------------------------------------------------------------------

SHAPES = {"u": DENSE, "v": CONV}


def params_of(shapes=SHAPES):
    return {name: normal(s, seed) for seed, (name, s) in enumerate(shapes.items())}


@pytest.mark.parametrize("pattern", [BLOCKS, SLICES, OUT], ids=lambda p: p.name)
@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_magnitude_masks_keep_the_largest_units(pattern, scope):
    params = params_of()
    made = masks.magnitude_masks(params, 0.4, scope=scope, pattern=pattern)
    leaves = [np.asarray(x) for x in params.values()]
    sizes = [units_of(pattern.name, x.shape) for x in leaves]
    if scope == "global":
        expected = top_units(leaves, sizes, int(0.4 * sum(x.size for x in leaves)))
    else:
        expected = [
            top_units([x], [size], int(0.4 * x.size))[0]
            for x, size in zip(leaves, sizes, strict=True)
        ]
    for mask, right in zip(made.values(), expected, strict=True):
        np.testing.assert_array_equal(mask, right)


def test_masks_of_scores_in_groups():
    params, scores = params_of(), {k: -x for k, x in params_of().items()}
    made = masks.score_masks(scores, params, None, pattern=N_M)
    for name, mask in made.items():
        # Of single weights scores are ranked as they are.
        x = np.asarray(scores[name])
        right = top_n_of_m(np.exp(x), 2, units_of(N_M.name, x.shape))
        np.testing.assert_array_equal(mask, right)
    made = masks.magnitude_masks(params, None, pattern=N_M)
    for name, mask in made.items():
        right = top_n_of_m(params[name], 2, units_of(N_M.name, mask.shape))
        np.testing.assert_array_equal(mask, right)


def test_a_layer_ranked_alone_keeps_a_unit():
    made = masks.magnitude_masks(
        {"w": normal((4, 4))}, 0.1, scope="leaf", pattern=BLOCKS
    )
    assert masks.count(made) == 4


# --- the engine -----------------------------------------------------------------------

RULES = {
    "sparse_momentum": (prune.magnitude, redistribute.momentum, grow.momentum),
    "set": (prune.two_sided, redistribute.none, grow.random),
    "rigl": (prune.magnitude, redistribute.none, grow.gradient),
}
PATTERNS = [BLOCKS, SLICES, OUT, N_M, FAN_IN]


def engine(pattern, rules="rigl", density="half", **options):
    rules = dict(zip(("prune", "redistribute", "grow"), RULES[rules], strict=True))
    if density == "half":
        density = None if pattern.density else 0.5
    return regrowth.regrow(
        optax.sgd(0.1, momentum=0.9),
        **{
            "density": density,
            "update_period": 2,
            "prune_rate": 0.3,
            "key": 0,
            "pattern": pattern,
            **rules,
            **options,
        },
    )


def run(tx, params, steps=6, seed=3):
    """``(params, state, previous masks)`` after each step."""
    state = tx.init(params)
    step = stepper(tx)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        grads = {
            k: jnp.asarray(rng.normal(size=x.shape), x.dtype) for k, x in params.items()
        }
        before = kept(state)
        params, state = step(params, state, grads)
        yield params, state, before


def check_step(pattern, params, state, sizes=None):
    """The pattern holds and what is missing is exactly zero; the number of weights."""
    now = kept(state)
    for mask, w in zip(now, params.values(), strict=True):
        assert holds(pattern, mask, sizes)
        assert not np.any(np.asarray(w)[~mask])
    return sum(m.sum() for m in now)


@pytest.mark.parametrize(
    ("pattern", "rules"),
    [
        (BLOCKS, "sparse_momentum"),
        (OUT, "sparse_momentum"),
        (N_M, "sparse_momentum"),
        (SLICES, "set"),
        (N_M, "set"),
        (BLOCKS, "rigl"),
        (FAN_IN, "rigl"),
        (FAN_IN, "sparse_momentum"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_the_engine_keeps_pattern_and_number(pattern, rules):
    rate = 0.5 if pattern == OUT else 0.3  # of three columns 0.3 is none
    tx, params = engine(pattern, rules, prune_rate=rate), params_of()
    number = sum(m.sum() for m in kept(tx.init(params)))
    sizes = [pattern.unit_size(x.shape) for x in params.values()]
    assert number == 24 + 96  # whole units of half of 48 and of 192
    moved = 0
    for t, (w, state, before) in enumerate(run(tx, params)):
        assert check_step(pattern, w, state) == number
        now = kept(state)
        gone = [int((b & ~m).sum()) for b, m in zip(before, now, strict=True)]
        come = [int((m & ~b).sum()) for b, m in zip(before, now, strict=True)]
        if t not in (2, 4):
            assert sum(gone) == sum(come) == 0
            continue
        moved += sum(gone)
        # In weights: what was pruned and regrown at once counts in both.
        removed = [int(state.removed[k]) for k in params]
        grown = [int(state.grown[k]) for k in params]
        for i, n in enumerate(sizes):
            assert removed[i] - gone[i] == grown[i] - come[i] >= 0
            units = int(before[i].sum()) // n
            if rules == "set" and n == 1:  # each sign is rounded down
                assert rate * units - 2 < removed[i] <= rate * units
            else:
                assert removed[i] == int(rate * units) * n
    assert moved > 0


@pytest.mark.parametrize("pattern", [BLOCKS, N_M, FAN_IN], ids=lambda p: p.name)
def test_one_cycle_against_its_definition(pattern):
    """RigL by hand: the smallest units go, units of largest gradient come."""
    params, tx = {"w": normal(CONV)}, engine(pattern)
    state = tx.init(params)
    step = stepper(tx)
    for t in range(3):
        grads, before, w = {"w": normal(CONV, 10 + t)}, kept(state)[0], params["w"]
        params, state = step(params, state, grads)
    sizes = units_of(pattern.name, CONV)
    units = list(places(CONV, (1, 1, 1, 1) if pattern.density else sizes))

    def total(x, unit):
        return sum(abs(float(x[at])) for at in unit)

    active = [u for u in units if before[u[0]]]
    gone = sorted(active, key=lambda u: total(w, u))[: int(0.3 * len(active))]
    stay = [u for u in active if u not in gone]
    missing = [u for u in units if u not in stay]
    missing.sort(key=lambda u: -total(grads["w"], u))
    right = np.zeros(CONV, bool)
    if pattern.density:
        for group in places(CONV, sizes):
            lost = sum(u[0] in group for u in gone)
            stay += [u for u in missing if u[0] in group][:lost]
    else:
        stay += missing[: len(gone)]
    for unit in stay:
        for at in unit:
            right[at] = True
    np.testing.assert_array_equal(kept(state)[0], right)


@pytest.mark.parametrize("pattern", [BLOCKS, OUT], ids=lambda p: p.name)
def test_gradual_with_whole_units(pattern):
    final = schedules.cubic_density(1.0, 0.25, 0, 4)
    tx = engine(pattern, density=0.25, ramp=final, prune_rate=0.0)
    params = params_of()
    counts = [check_step(pattern, w, state) for w, state, _ in run(tx, params)]
    whole = sum(x.size for x in params.values())
    assert counts[0] == counts[1] == whole
    assert counts[1] > counts[2] >= counts[4] == counts[5]
    sizes = [pattern.unit_size(x.shape) for x in params.values()]
    right = [x.size // 4 // n * n for n, x in zip(sizes, params.values(), strict=True)]
    assert counts[5] == sum(right)


@pytest.mark.parametrize("pattern", [BLOCKS, N_M, FAN_IN], ids=lambda p: p.name)
def test_hidden_weights_begin_with_the_largest_units(pattern):
    params = params_of()
    tx = engine(pattern, hidden=True)
    first = kept(tx.init(params))
    for x, mask in zip(params.values(), first, strict=True):
        sizes = units_of(pattern.name, x.shape)
        right = (
            top_n_of_m(x, kept_of(pattern, np.prod(sizes)), sizes)
            if pattern.density
            else top_units([np.asarray(x)], [sizes], x.size // 2)[0]
        )
        np.testing.assert_array_equal(mask, right)
    number = sum(m.sum() for m in first)
    for w, state, _ in run(tx, params):
        assert check_step(pattern, w, state) == number


@pytest.mark.parametrize("pattern", [BLOCKS, N_M], ids=lambda p: p.name)
def test_stacked_layers_each_keep_their_number(pattern):
    tx = engine(pattern, stacked={"w": 0}, packed=True)
    params = {"w": normal((3, *DENSE))}
    sizes = (1, 4, 1) if pattern.density else (1, 2, 2)
    for t, (w, state, _) in enumerate(run(tx, params)):
        assert check_step(pattern, w, state, sizes) == 72
        assert [m.sum() for m in kept(state)[0]] == [24] * 3
        if t in (2, 4):
            n = 1 if pattern.density else 4
            assert state.removed["w"].tolist() == [int(0.3 * (24 // n)) * n] * 3


def test_n_m_of_equinox_kernels():
    pattern = patterns.n_m(2, 4, axis=1)
    params = {"w": normal((6, 8))}
    for w, state, _ in run(engine(pattern), params):
        assert check_step(pattern, w, state, (1, 4)) == 24


def test_given_masks_must_follow():
    params = {"w": normal(DENSE)}
    wrong = {"w": jnp.zeros(DENSE, bool).at[0, 0].set(True)}
    budget = schedules.cubic_density(0.5, 0.25, 0, 4)
    for pattern, options in (
        (BLOCKS, {"density": None}),
        (N_M, {}),
        (BLOCKS, {"density": 0.25, "ramp": budget}),
    ):
        tx = engine(pattern, masks=wrong, **options)
        with refuses("regrow", "masks", "'w'", r"blocks\(2, 2\)|n_m\(2, 4\)"):
            tx.init(params)
    right = masks.magnitude_masks(params, 0.5, pattern=BLOCKS)
    state = engine(BLOCKS, density=None, masks=right).init(params)
    np.testing.assert_array_equal(kept(state)[0], right["w"])


def test_wrong_input_to_the_engine():
    with refuses("regrow", "density", "0.3", "0.5"):
        engine(N_M, density=0.3)
    engine(N_M, density=0.5)  # says the same
    with refuses("regrow", "pattern", "2:4", "patterns"):
        regrowth.regrow(
            optax.sgd(0.1),
            **dict(zip(("prune", "redistribute", "grow"), RULES["rigl"], strict=True)),
            update_period=1,
            prune_rate=0.1,
            key=0,
            pattern="2:4",
        )
    with refuses("regrow", "'w'", r"\(6, 5\)", "multiple of 4"):
        engine(N_M).init({"w": normal((6, 5))})
    unsure = grow.global_gradient  # may move weights between layers
    for pattern in (OUT, N_M):
        with refuses("regrow", "grow", "", "exactly"):
            engine(pattern, grow=unsure).init(params_of())
    # Where units are equal that is no matter.
    for w, state, _ in run(engine(BLOCKS, grow=unsure), params_of(), 3):
        number = check_step(BLOCKS, w, state)
    assert number == 24 + 96


def test_vmap_over_seeds():
    params = {"w": jnp.stack([normal(DENSE, s) for s in range(3)])}
    grads = {"w": jnp.stack([normal(DENSE, 9 + s) for s in range(3)])}

    def train(params, grads):
        tx = engine(N_M)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state.regrow_masks

    together = jax.jit(jax.vmap(train))(params, grads)
    for i in range(3):
        pick = functools.partial(jax.tree.map, lambda x, i=i: x[i])
        alone = jax.jit(train)(pick(params), pick(grads))
        assert holds(N_M, together[1]["w"][i])
        np.testing.assert_array_equal(together[1]["w"][i], alone[1]["w"])


# --- GSM in groups --------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.name)
@pytest.mark.parametrize("density", [0.3, 0.62])
def test_gsm_passes_the_most_salient_units(pattern, density):
    params = params_of()
    grads = {k: normal(x.shape, 7) for k, x in params.items()}
    tx = sparse_optax.gsm_mask(None if pattern.density else density, pattern=pattern)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    saliency = [np.abs(np.asarray(grads[k] * params[k])) for k in params]
    sizes = [units_of(pattern.name, x.shape) for x in saliency]
    if pattern.density:
        columns = zip(saliency, sizes, strict=True)
        right = [
            top_n_of_m(x, kept_of(pattern, np.prod(size)), size) for x, size in columns
        ]
    else:
        quota = int(density * sum(x.size for x in saliency))
        right = top_units(saliency, sizes, quota)
        assert sum(m.sum() for m in right) <= quota
    for name, mask in zip(params, right, strict=True):
        np.testing.assert_array_equal(
            updates[name], np.where(mask, np.asarray(grads[name]), 0)
        )
        assert int(state.gsm_passed[name]) == mask.sum()


def gate(params, grads, *args, **options):
    tx = sparse_optax.gsm_mask(*args, **options)
    updates, state = tx.update({"w": grads}, tx.init({"w": params}), {"w": params})
    return np.asarray(updates["w"]), state


def test_gsm_zeros_never_pass_and_nan_surfaces():
    w = jnp.ones((4, 4))
    grads = jnp.zeros((4, 4)).at[0, 0].set(2.0).at[3, 1].set(jnp.nan)
    passed, state = gate(w, grads, pattern=N_M)
    np.testing.assert_array_equal(passed != 0, np.asarray(grads != 0))
    assert np.isnan(passed[3, 1])
    assert int(state.gsm_passed["w"]) == 2
    passed, state = gate(w, grads, 0.9, pattern=BLOCKS)
    assert int(state.gsm_passed["w"]) == 8  # two units, whole
    assert np.isnan(passed[3, 1])
    passed, state = gate(w, grads, 0.25, pattern=BLOCKS)
    assert int(state.gsm_passed["w"]) == 4
    assert np.isnan(passed[3, 1])  # a broken gradient goes first
    # With room for all, all pass, as without groups.
    for groups, density in ((None, 1.0), (BLOCKS, 1.0), (patterns.n_m(4, 4), None)):
        _, state = gate(w, grads, density, pattern=groups)
        assert int(state.gsm_passed["w"]) == 16


def test_gsm_quota_that_fills_no_unit_is_left_over():
    w = normal(DENSE)
    _, state = gate(w, normal(DENSE, 1), 0.13, pattern=BLOCKS)  # 6 of 48 weights
    assert int(state.gsm_passed["w"]) == 4


def test_gsm_injected_density_in_groups():
    make = optax.inject_hyperparams(
        sparse_optax.gsm_mask,
        static_args=("pattern", "where", "stacked", "ties", "reselect"),
        hyperparam_dtype=jnp.float32,
    )
    tx = make(density=0.5, pattern=BLOCKS)
    params, grads = {"w": normal(DENSE)}, {"w": normal(DENSE, 1)}
    state = tx.init(params)
    for density, number in ((0.5, 24), (0.25, 12)):
        state.hyperparams["density"] = jnp.float32(density)
        updates, state = tx.update(grads, state, params)
        assert int((updates["w"] != 0).sum()) == number


@pytest.mark.parametrize("pattern", [BLOCKS, N_M], ids=lambda p: p.name)
def test_gsm_settles_at_the_largest_weights(pattern):
    """From the third step on the mask is that of magnitudes, and stays."""
    params = {"w": normal(DENSE)}
    tx = sparse_optax.gsm(
        0.01,
        None if pattern.density else 0.5,
        momentum=0.9,
        settle_start=2,
        pattern=pattern,
    )
    state, fixed = tx.init(params), None
    step = stepper(tx)
    for t in range(5):
        if t == 2:
            fixed = masks.magnitude_masks(
                params, None if pattern.density else 0.5, pattern=pattern
            )["w"]
        params, state = step(params, state, {"w": normal(DENSE, 20 + t)})
        active = optax.tree.get(state, "gsm_active")["w"]
        assert holds(pattern, active)
        if fixed is not None:
            np.testing.assert_array_equal(active, fixed)


def test_wrong_input_to_gsm_groups():
    with refuses("gsm_mask", "density", "0.4", r"n_m\(2, 4\)"):
        sparse_optax.gsm_mask(0.4, pattern=N_M)
    for groups in (None, BLOCKS):
        with refuses("gsm_mask", "density", "None", r"\(0, 1\]"):
            sparse_optax.gsm_mask(pattern=groups)
    with refuses("gsm_mask", "ties", "paper", "exact"):
        sparse_optax.gsm_mask(0.5, pattern=BLOCKS, ties="paper")
    with refuses("gsm_mask", "pattern", "2:4", "patterns"):
        sparse_optax.gsm_mask(0.5, pattern="2:4")
    with refuses("gsm", "gate", "0.3", r"n_m\(2, 4\)"):
        sparse_optax.gsm(0.1, gate=0.3, pattern=N_M)
    with refuses("gsm", "'w'", r"\(6, 5\)", "multiple of 4"):
        sparse_optax.gsm_mask(pattern=N_M).init({"w": normal((6, 5))})


# --- every method ---------------------------------------------------------------------

OFTEN = {"update_period": 2, "key": 0}
METHODS = {
    "sparse_momentum_regrow": {**OFTEN, "prune_rate": 0.3},
    "sparse_evolutionary": OFTEN,
    "dynamic_sparse": {**OFTEN, "threshold": 3.0},
    "rigl": {**OFTEN, "update_stop": 9},
    "in_time_over_parameterization": {**OFTEN, "update_stop": 9},
    "granet": {**OFTEN, "update_stop": 6},
    "gradual_magnitude": {"update_period": 2, "update_stop": 5},
    "iterative_magnitude": {"update_period": 2, "prunes": 2},
    "one_shot_magnitude": {"at": 2},
    "network_surgery": {},
    "straight_through_magnitude": {},
    "top_kast": {"backward_density": 0.75},
    "ac_dc": {"update_period": 2, "update_stop": 3},
    "static_sparse": {"key": 0},
    "deep_rewiring": {"key": 0, "learning_rate": 0.3, "l1": 0.5},
}
# They become sparse while they train.
GRADUAL = (
    "granet gradual_magnitude iterative_magnitude one_shot_magnitude ac_dc".split()
)
STILL = ["static_sparse"]


def groups_of(pattern, mask):
    """How many are kept of each group of a flax kernel."""
    sizes = units_of(pattern.name, mask.shape)
    return {int(sum(mask[at] for at in unit)) for unit in places(mask.shape, sizes)}


@pytest.mark.parametrize("shape", [(8, 8), (3, 2, 8, 8)], ids=["dense", "conv"])
@pytest.mark.parametrize("pattern", [BLOCKS, N_M, OUT], ids=lambda p: p.name)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_its_pattern(name, pattern, shape):
    method_keeps(name, pattern, shape)


@pytest.mark.parametrize("name", ["rigl", "gradual_magnitude", "top_kast", "ac_dc"])
def test_methods_keep_the_fan_in(name):
    method_keeps(name, FAN_IN, (3, 2, 8, 8))


def method_keeps(name, pattern, shape):
    options, rate = dict(METHODS[name]), 0.3
    if name == "dynamic_sparse":  # that of the sum of a unit
        size = pattern.unit_size(shape)
        options["threshold"] = max(options["threshold"], 0.8 * size)
    params = {"w": normal(shape)}
    if name == "deep_rewiring":  # a unit goes when all its weights have crossed zero
        params, rate = jax.tree.map(lambda w: w / 10, params), 0.01
    tx = getattr(sparse_optax, name)(
        optax.sgd(rate),
        density=None if pattern.density else 0.5,
        pattern=pattern,
        **options,
    )
    half = params["w"].size // 2
    seen = [kept(tx.init(params))[0]]
    for w, state, _ in run(tx, params):
        mask = kept(state)[0]
        number = int(mask.sum())
        seen.append(mask)
        assert not np.any(np.asarray(w["w"])[~mask])
        if name in GRADUAL and pattern.density and number != half:
            # On the way every group has as many.
            (each,) = groups_of(pattern, mask)
            size = np.prod(units_of(pattern.name, shape))
            assert each * mask.size == number * size
        else:
            check_step(pattern, w, state)
        if name not in GRADUAL:
            assert number == half
    assert number == half
    moved = any((m != seen[0]).any() for m in seen)
    assert moved == (name not in STILL) or pattern == OUT  # big sums are slow to change


def test_gradual_pruning_of_groups_takes_the_smallest_of_each():
    """From the definition: n + floor(x (m - n)) largest of each m at a prune."""
    pattern = patterns.n_m(1, 4)
    densities = {2: 0.95, 4: 0.6, 6: 0.25}  # x = 14/15, 7/15, 0: 3, 2 and 1 of 4
    tx = regrowth.regrow(
        optax.sgd(0.1),
        pattern=pattern,
        prune=regrowth.prune.magnitude,
        redistribute=regrowth.redistribute.none,
        grow=regrowth.grow.magnitude,
        ramp=lambda t: jnp.select(
            [t < 2, t < 4, t < 6], [1.0, densities[2], densities[4]], densities[6]
        ),
        update_period=2,
        prune_rate=0.0,
        key=0,
    )
    params = {"w": normal(DENSE)}
    state, step = tx.init(params), stepper(tx)
    wanted = np.ones(DENSE, bool)
    for t in range(8):
        if t in densities:
            number = {2: 3, 4: 2, 6: 1}[t]
            wanted = top_n_of_m(np.asarray(params["w"]), number, (4, 1))
        params, state = step(params, state, {"w": normal(DENSE, 40 + t)})
        np.testing.assert_array_equal(kept(state)[0], wanted)
        assert not np.any(np.asarray(params["w"])[~wanted])


def test_surgery_thins_groups_out_along_its_budget():
    """Shown are the largest hidden weights of a group, as many as the budget says."""
    ramp = {t: 1.0 for t in range(3)} | {3: 0.8, 4: 0.6}
    tx = sparse_optax.network_surgery(
        optax.sgd(0.3),
        density=0.5,
        pattern=N_M,
        ramp=lambda t: jnp.select(
            [t == n for n in ramp], [jnp.float32(d) for d in ramp.values()], 0.5
        ),
        ratio=1.0,
        gamma=0.0,
    )
    params = {"w": normal(DENSE)}
    dense, state, step = np.asarray(params["w"]), tx.init(params), stepper(tx)
    for t in range(7):
        number = {3: 3, 4: 2}.get(t, 4 if t < 3 else 2)  # 2 + floor(x 2)
        shown = top_n_of_m(dense, number, (4, 1))
        grads = {"w": normal(DENSE, 50 + t)}
        params, state = step(params, state, grads)
        np.testing.assert_array_equal(kept(state)[0], shown)
        dense = dense - np.float32(0.3) * np.asarray(grads["w"])
        np.testing.assert_allclose(params["w"], np.where(shown, dense, 0), atol=1e-5)


def test_granet_exchanges_within_groups():
    """At the end of pruning, regrowth keeps every group's number and moves weights."""
    tx = sparse_optax.granet(
        optax.sgd(0.3),
        pattern=N_M,
        key=0,
        update_period=2,
        update_stop=20,
        density_stop=4,
        prune_rate=0.25,
    )
    moved = 0
    for t, (_, state, before) in enumerate(run(tx, {"w": normal((8, 8))}, steps=16)):
        mask = kept(state)[0]
        if t >= 4:
            assert groups_of(N_M, mask) == {2}
        if t > 4:
            moved += int((mask & ~before[0]).sum())
        if t > 4 and t % 2 == 0:
            # A quarter of the layer's 32 weights, not of each group's two.
            assert int(optax.tree.get(state, "grown")["w"]) == 8
    assert moved > 0


@pytest.mark.parametrize("name", ["network_surgery", "straight_through_magnitude"])
def test_n_m_with_hidden_weights_shows_the_largest(name):
    """From the definition: before each step the n largest |w| of each m are shown."""
    options = {"ratio": 1.0, "gamma": 0.0} if name == "network_surgery" else {}
    make = getattr(sparse_optax, name)
    tx = make(optax.sgd(0.3), pattern=N_M, **options)
    params = {"w": normal(DENSE)}
    dense, first = np.asarray(params["w"]), True
    state, step = tx.init(params), stepper(tx)
    for t in range(4):
        shown = top_n_of_m(dense, 2, (4, 1))
        grads = {"w": normal(DENSE, 30 + t)}
        params, state = step(params, state, grads)
        if not first:  # the first choice is that of init
            np.testing.assert_array_equal(kept(state)[0], shown)
        dense, first = dense - np.float32(0.3) * np.asarray(grads["w"]), False


@pytest.mark.parametrize("pattern", [BLOCKS, N_M, OUT], ids=lambda p: p.name)
def test_layerwise_obs_keeps_its_pattern(pattern):
    """Units of the largest summed loss; what is left is mended as without a pattern."""
    kernel, x = normal((8, 6)), normal((50, 8), 1)
    keep = None if pattern.density else 24
    mask, new = sparse_optax.layerwise_obs(
        kernel, x, keep, damping=1e-3, pattern=pattern
    )
    wide = np.asarray(x, np.float64)
    hessian = wide.T @ wide / 50 + 1e-3 * np.eye(8)
    spread = np.diag(np.linalg.inv(hessian))
    w = np.asarray(kernel, np.float64)
    loss_of = w**2 / (2 * spread[:, None])
    if pattern.density:
        right = top_n_of_m(loss_of, 2, (4, 1))
    else:
        (right,) = top_units([loss_of], [units_of(pattern.name, (8, 6))], 24)
    np.testing.assert_array_equal(mask, right)
    for j in range(6):
        s = right[:, j]
        mended = w[s, j] + np.linalg.solve(
            hessian[np.ix_(s, s)], hessian[np.ix_(s, ~s)] @ w[~s, j]
        )
        np.testing.assert_allclose(np.asarray(new)[s, j], mended, rtol=2e-3, atol=1e-4)
        assert not np.asarray(new)[~s, j].any()


def test_layerwise_obs_refuses_what_its_pattern_does_not_fit():
    kernel, x = normal((8, 6)), normal((50, 8), 1)
    with refuses("layerwise_obs", "keep", "25", r"24.*n_m\(2, 4\)"):
        sparse_optax.layerwise_obs(kernel, x, 25, damping=1e-3, pattern=N_M)
    with refuses("layerwise_obs", "keep", "None", "integer"):
        sparse_optax.layerwise_obs(kernel, x, damping=1e-3)
    for damping in ("a", -1.0, float("inf")):
        with refuses("layerwise_obs", "damping", str(damping), "at least 0"):
            sparse_optax.layerwise_obs(kernel, x, 24, damping=damping)
    with refuses("layerwise_obs", "kernel", r"\(6, 5\)", "multiple of 4"):
        sparse_optax.layerwise_obs(
            normal((6, 5)), normal((9, 6)), damping=1.0, pattern=N_M
        )


def loss(params, x):
    return jnp.mean((jnp.tanh(x @ params["u"]) @ params["v"]) ** 2)


def forward(params, x):
    return x @ params["u"] @ params["v"]


X = normal((3, 8), 5)
ONE_SHOT = {
    "snip_masks": lambda p, *a, **k: sparse_optax.snip_masks(loss, p, [X], *a, **k),
    "synflow_masks": lambda p, *a, **k: sparse_optax.synflow_masks(
        forward, p, (1, 8), *a, rounds=3, **k
    ),
    "fisher_masks": lambda p, *a, **k: sparse_optax.fisher_masks(loss, p, [X], *a, **k),
    "optimal_brain_damage_masks": lambda p, *a, **k: (
        sparse_optax.optimal_brain_damage_masks(
            forward, p, [(X, jnp.zeros(3, int))], *a, **k
        )
    ),
}


@pytest.mark.parametrize("pattern", [BLOCKS, N_M], ids=lambda p: p.name)
@pytest.mark.parametrize("scope", ["global", "leaf"])
@pytest.mark.parametrize("name", ONE_SHOT)
def test_masks_before_training_keep_their_pattern(name, scope, pattern):
    params = {"u": normal((8, 8)), "v": normal((8, 4), 1)}
    density = None if pattern.density else 0.5
    made = ONE_SHOT[name](params, density, scope=scope, pattern=pattern)
    assert masks.count(made) == 48
    for mask in made.values():
        assert holds(pattern, mask)
    if name == "snip_masks":
        g = jax.grad(loss)(params, X)
        scores = [np.abs(np.asarray(g[k] * params[k])) for k in params]
        sizes = [units_of(pattern.name, x.shape) for x in scores]
        if pattern.density:
            right = [top_n_of_m(x, 2, s) for x, s in zip(scores, sizes, strict=True)]
        elif scope == "global":
            right = top_units(scores, sizes, 48)
        else:
            right = [
                top_units([x], [s], x.size // 2)[0]
                for x, s in zip(scores, sizes, strict=True)
            ]
        for mask, expected in zip(made.values(), right, strict=True):
            np.testing.assert_array_equal(mask, expected)


def test_synflow_never_brings_a_unit_back():
    """The rounds by hand: of what is left, the units of largest flow."""
    params, rounds = {"u": normal((8, 8)), "v": normal((8, 4), 1)}, 4
    u, v = (np.abs(np.asarray(x, np.float64)) for x in params.values())
    left = [np.ones(u.shape, bool), np.ones(v.shape, bool)]
    for r in range(1, rounds + 1):
        a, b = u * left[0], v * left[1]
        # R = sum_ijk a_ij b_jk, so that a score is the flow through a weight.
        scores = [a * b.sum(1)[None, :], b * a.sum(0)[:, None]]
        fresh = top_units(scores, [(2, 2)] * 2, np.floor(96 * 0.2 ** (r / rounds)))
        assert all(not np.any(f & ~m) for f, m in zip(fresh, left, strict=True))
        left = fresh
    made = sparse_optax.synflow_masks(
        forward, params, (1, 8), 0.2, rounds=rounds, pattern=BLOCKS
    )
    for mask, right in zip(made.values(), left, strict=True):
        np.testing.assert_array_equal(mask, right)
