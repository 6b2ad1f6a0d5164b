"""Whole numbers: statistics of layers, shares of a total, counts past 32 bits."""

import fractions
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from oracles import regrow_counts

import sparse_optax
from sparse_optax import masks, selection
from sparse_optax.gsm import gate
from sparse_optax.layers import layers_of
from sparse_optax.regrowth import allocate
from sparse_optax.regrowth.rules import tally_layers
from sparse_optax.selection import uint64

# --- tally ----------------------------------------------------------------------------


def statistics(x, mask):
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return mask, jnp.where(mask, x.astype(jnp.uint32), jnp.uint32(0)), bits


def three_leaves():
    """A stack of three layers along axis 1, a plain leaf and one of a single weight."""
    rng = np.random.default_rng(0)
    shapes = [(4, 3, 5), (30, 7), (1,)]
    return [
        (
            rng.integers(0, 2**31, shape).astype(np.float32),
            rng.random(shape) < 0.5,
        )
        for shape in shapes
    ]


def by_hand(leaves, axes):
    """Count of masks, sum of the masked, and largest, layer by layer."""
    rows = []
    for (x, mask), axis in zip(leaves, axes, strict=True):
        layers = [(x, mask)]
        if axis is not None:
            layers = [
                (np.take(x, i, axis), np.take(mask, i, axis))
                for i in range(x.shape[axis])
            ]
        rows += [(m.sum(), sum(int(v) for v in y[m]), y.max()) for y, m in layers]
    return rows


@pytest.mark.parametrize("axes", [(None, None, None), (1, 0, None), (2, 1, 0)])
def test_statistics_of_layers(axes):
    leaves = three_leaves()
    expected = by_hand(leaves, axes)
    counts, (high, low), largest = tally_layers(leaves, axes, statistics)
    largest = np.asarray(largest).view(np.float32)
    for i, row in enumerate(expected):
        total = (int(high[i]) << 32) + int(low[i])
        assert (int(counts[i]), total, largest[i]) == row


def test_statistics_of_a_batch():
    """Under vmap each member has its own."""
    leaves = three_leaves()
    both = [tuple(np.stack([a, a[::-1]]) for a in arrays) for arrays in leaves]
    both[1][1][1] = False

    def one(leaves):
        return tally_layers(leaves, (1, None, None), statistics)

    counts, (high, low), largest = jax.vmap(one)(both)
    for member in (0, 1):
        chosen = [tuple(a[member] for a in arrays) for arrays in both]
        for i, row in enumerate(by_hand(chosen, (1, None, None))):
            total = (int(high[member, i]) << 32) + int(low[member, i])
            found = np.asarray(largest[member, i]).view(np.float32)
            assert (int(counts[member, i]), total, found) == row


def as_words(x):
    return (x,)


def test_a_sum_past_32_bits():
    x = np.full((3, 70_000), 2**32 - 1, np.uint32)
    ((high, low),) = tally_layers([(x,), (x[0],)], (None, None), as_words)
    assert uint64.to_int((high[0], low[0])) == 210_000 * (2**32 - 1)
    assert uint64.to_int((high[1], low[1])) == 70_000 * (2**32 - 1)


def test_statistics_of_nothing():
    empty = np.zeros((0, 4), np.float32), np.zeros((0, 4), bool)
    full = np.ones((2, 4), np.float32), np.ones((2, 4), bool)
    counts, (_, low), _ = tally_layers([empty, full], (None, None), statistics)
    assert counts.tolist() == low.tolist() == [0, 8]


# --- shares of a total ----------------------------------------------------------------

LAYER = st.integers(0, 2**31 - 1)


@hypothesis.given(st.integers(1, 6), st.data())
def test_totals_past_32_bits(layers, data):
    """Layers of up to 2^31 weights: the total of removed weights needs 34 bits."""
    removed = data.draw(st.lists(LAYER, min_size=layers, max_size=layers))
    more = data.draw(st.lists(LAYER, min_size=layers, max_size=layers))
    free = [min(r + m, 2**31 - 1) for r, m in zip(removed, more, strict=True)]
    shares = data.draw(
        st.lists(st.integers(0, 2**28), min_size=layers, max_size=layers)
    )
    total = sum(removed)
    given = allocate.apportion(
        uint64.pair64(total),
        jnp.array(shares, jnp.uint32),
        jnp.array(free, jnp.int32),
        jnp.array(removed, jnp.int32),
        most=6 * 2**31,
    )
    assert [int(n) for n in given] == regrow_counts(total, shares, removed, free)


def test_shares_too_long_for_their_total_lose_their_last_bits():
    """The sum stays exact, the split is right to one part in 2^20."""
    shares = np.array([3 * 2**29, 2**30, 2**29 + 1], np.uint32)
    total = 3 * 2**41
    room = np.full(3, 2**31 - 1, np.int32)
    few = allocate.apportion(
        uint64.pair64(3_000_000), shares, room, np.zeros(3, np.int32), most=total
    )
    assert few.tolist() == [1_500_000, 1_000_000, 500_000]
    assert int(few.sum()) == 3_000_000


@pytest.mark.parametrize("rate", [0.1, 0.5, 1 / 3, 0.999])
def test_fractions_of_large_layers(rate):
    n = np.array([2**31 - 1, 2**24 + 1, 12_345_677], np.int32)
    exact = fractions.Fraction(float(np.float32(rate)))
    expected = [math.floor(exact * int(k)) for k in n]
    assert allocate.floor_fraction(jnp.float32(rate), n).tolist() == expected


# --- pools past 2^31 ------------------------------------------------------------------
def one_layer(size):
    return layers_of({"w": jax.ShapeDtypeStruct((size // 4, 4), jnp.float32)})


@pytest.mark.parametrize("density", [0.25, 0.5, 1 / 60, 1.0])
def test_a_traced_density_of_a_pool_past_32_bits(density):
    size = 3 * 2**33

    def count(density):
        found = gate.quota_of(density, jnp.int32(0), one_layer(size), {})
        assert found.costs is None
        return found.k

    k = uint64.to_int(jax.jit(count)(jnp.float32(density)))
    assert abs(k - density * size) <= 2**-23 * size
    if density in (0.25, 0.5, 1.0):
        assert k == density * size


def test_a_traced_count_past_31_bits():
    def count(k):
        return gate.quota_of(k, jnp.int32(0), one_layer(8 * 10**9), {}).k

    assert uint64.to_int(jax.jit(count)(jnp.uint32(3 * 10**9))) == 3 * 10**9
    assert uint64.to_int(jax.jit(count)(jnp.int32(-3))) == 0


def test_a_packed_scalar_is_refused():
    with pytest.raises(ValueError, match=r"scalar.*packed=False"):
        masks.pack(jnp.asarray(True))


def test_passed_counts_stay_in_int32():
    counts = gate.clipped([np.uint32(2**31 + 5), np.full(3, 2**31, np.uint32)])
    counts += gate.clipped([np.uint32(2**20)], [2**12])
    assert [int(n) for n in counts] == [2**31 - 1] * 3
    assert [int(n) for n in gate.clipped([np.uint32([3, 4])], [5])] == [35]
    assert all(n.dtype == jnp.int32 for n in counts)


def test_a_layer_past_31_bits_is_refused_with_the_cure():
    params = {"table": jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32)}

    def start(**options):
        tx = sparse_optax.sparse_momentum_regrow(
            optax.sgd(0.1, momentum=0.9),
            density=0.1,
            update_period=10,
            update_stop=100,
            key=0,
            **options,
        )
        return jax.eval_shape(tx.init, params)

    with pytest.raises(ValueError, match=r"'table'.*2147483648.*stacked") as error:
        start()
    assert "2**31" in str(error.value)
    state = start(stacked={"table": 0})
    assert state.removed["table"].shape == (2**16,)


def test_counts_of_a_mask_are_python_integers():
    kept = {"w": jnp.ones((3, 5), bool), "s": jnp.asarray(True)}
    assert masks.count(kept) == 16
    assert isinstance(masks.count(kept), int)


def test_a_whole_number_as_a_pair():
    for value in (0, 1, 2**24, 2**32, 2**33 + 2**12, 2**63):
        assert uint64.to_int(uint64.from_float(jnp.float32(value))) == value


def test_counts_of_a_selection_are_those_of_its_masks():
    rng = np.random.default_rng(0)
    tree = {"a": rng.standard_normal((50, 3)), "b": rng.standard_normal(77)}
    tree = jax.tree.map(lambda x: np.round(x * 2).astype(np.float32), tree)  # ties
    for k in range(0, 227, 7):
        found = selection.select(tree, k)
        for name in tree:
            assert int(found.counts[name]) == found.masks[name].sum()
