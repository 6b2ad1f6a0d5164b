"""Selection against its definition: a stable sort of exact values in NumPy."""

import collections
import math

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from sparse_optax import selection
from sparse_optax.selection import cut, keys, passes, plan, uint64

pytestmark = pytest.mark.core

# --- the definition -------------------------------------------------------------------


def exact(scores):
    """Scores as float64, which holds every value of the narrower dtypes."""
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return np.concatenate(
            [np.asarray(x).ravel().astype(np.float64) for x in scores]
        )


def top(scores, budget, costs=None):
    """Masks of the longest prefix of the order that fits, and its last score."""
    costs = costs or [1] * len(scores)
    flat = exact(scores)
    cost = np.concatenate(
        [np.full(np.size(s), c, object) for s, c in zip(scores, costs, strict=True)]
    )
    nan = np.isnan(flat)
    order = np.lexsort((np.arange(flat.size), -np.where(nan, 0, flat), ~nan))
    kept, spent, last = np.zeros(flat.size, bool), 0, math.nan
    for i in order:
        spent += cost[i]
        if spent > budget:
            break
        kept[i], last = True, flat[i]
    ends = np.cumsum([np.size(s) for s in scores])[:-1]
    masks = [
        m.reshape(np.shape(s))
        for m, s in zip(np.split(kept, ends), scores, strict=True)
    ]
    return masks, last


def same(found, expected):
    """Equal as floats are here: NaN equals NaN, -0 equals 0."""
    (found,) = exact([found])
    return bool(found == expected or (np.isnan(found) and np.isnan(expected)))


def check(tree, chosen, budget, costs=None):
    leaves, masks = jax.tree.leaves(tree), jax.tree.leaves(chosen.masks)
    assert jax.tree.structure(tree) == jax.tree.structure(chosen.masks)
    expected, last = top(leaves, budget, costs)
    for mask, m in zip(masks, expected, strict=True):
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, m)
    assert same(chosen.threshold, last), (chosen.threshold, last)
    counts = jax.tree.leaves(chosen.counts)
    assert [np.sum(n) for n in counts] == [m.sum() for m in expected]


# --- values ---------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "x y")
SHAPES = {"a": (3, 4), "b": [(5,), (), (0, 2)], "c": Pair((2, 3, 2), (1,))}
SIZE = 31

# Values between which mistakes happen: equal ones, zeros of both signs, subnormals,
# the ends of the range, NaN of both signs and with payloads.
HARD = {
    "float32": np.array(
        [
            0,
            0x80000000,
            1,
            0x80000001,
            2,
            0x007FFFFF,
            0x00800000,
            0x7F7FFFFF,
            0x7F800000,
            0xFF800000,
            0x7FC00000,
            0xFFC00000,
            0x7F800001,
            0xFFFFFFFF,
            0x3F800000,
            0xBF800000,
            0x3F800001,
            0x40000000,
        ],
        np.uint32,
    ).view(np.float32),
    "bfloat16": np.array(
        [
            0,
            0x8000,
            1,
            0x8001,
            0x007F,
            0x0080,
            0x7F7F,
            0x7F80,
            0xFF80,
            0x7FC0,
            0xFFC0,
            0x7F81,
            0x3F80,
            0xBF80,
            0x3F81,
            0x4000,
        ],
        np.uint16,
    ).view(ml_dtypes.bfloat16),
    "float16": np.array(
        [
            0,
            0x8000,
            1,
            0x8001,
            0x03FF,
            0x0400,
            0x7BFF,
            0x7C00,
            0xFC00,
            0x7E00,
            0xFE00,
            0x7C01,
            0x3C00,
            0xBC00,
            0x3C01,
            0x4000,
        ],
        np.uint16,
    ).view(np.float16),
    "uint32": np.array([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], np.uint32),
    "float64": np.array(
        [
            0,
            1 << 63,
            1,
            (1 << 63) | 1,
            (1 << 52) - 1,
            1 << 52,
            0x7FF << 52,
            0xFFF << 52,
            (0x7FF << 52) | 1,
            (0xFFF << 52) | (1 << 51),
            0x3FF << 52,
            (0x3FF << 52) | 1,
            0x36A << 52,
            0x36B << 52,
        ],
        np.uint64,
    ).view(np.float64),
}


def some(dtype, seed, kinds):
    """A tree of SHAPES with values of a few kinds, some of them many times."""
    rng = np.random.default_rng(seed)
    pool = rng.choice(HARD[dtype], size=kinds)

    def leaf(shape):
        return jnp.asarray(rng.choice(pool, size=shape).astype(pool.dtype))

    return jax.tree.map(
        leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple) and not isinstance(x, Pair)
    )


SEEDS = st.integers(0, 10**6)
KINDS = st.integers(1, 12)
COUNTS = st.integers(0, SIZE)


@hypothesis.given(SEEDS, KINDS, COUNTS)
def test_float32(seed, kinds, k):
    tree = some("float32", seed, kinds)
    check(tree, selection.select(tree, k), k)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "uint32"])
def test_other_dtypes(dtype):
    for seed in range(15):
        tree, k = some(dtype, seed, seed % 7 + 1), (seed * 5) % (SIZE + 1)
        chosen = selection.select(tree, k)
        if k:
            check(tree, chosen, k)
        assert chosen.threshold.dtype == jnp.dtype(dtype)
    none = selection.kth_largest(tree, 0)
    assert int(none) == 2**32 - 1 if dtype == "uint32" else np.isnan(none)


def test_float64_and_mixed_with_float32():
    with jax.enable_x64(True):
        for seed in range(12):
            tree, k = some("float64", seed, 5), (seed * 5) % (SIZE + 1)
            check(tree, selection.select(tree, k), k)
            narrow = some("float32", seed, 5)
            mixed = {"wide": tree["a"], "narrow": narrow["a"]}
            chosen = selection.select(mixed, min(k, 24))
            check(mixed, chosen, min(k, 24))
            assert chosen.threshold.dtype == np.float64


def test_halves_mixed_with_float32():
    for seed in range(12):
        tree = [some(t, seed, 6)["a"] for t in ("bfloat16", "float32", "float16")]
        k = (seed * 7) % 37
        chosen = selection.select(tree, k)
        check(tree, chosen, k)
        assert chosen.threshold.dtype == np.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_order_of_all_values_of_16_bits(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(HARD[dtype].dtype)
    order = keys.order_of([every.dtype], ["x"])
    value = exact([every])
    nan = np.isnan(value)
    expected = np.full(every.shape, 2**16)
    expected[~nan] = np.unique(value[~nan], return_inverse=True)[1]
    for to in (order, keys.Order("float32")):
        found = np.asarray(keys.to_key(jnp.asarray(every), to))
        rank = np.argsort(expected, kind="stable")
        np.testing.assert_array_equal(
            np.sign(np.diff(found[rank])), np.sign(np.diff(expected[rank]))
        )
    back = np.asarray(keys.from_key(keys.to_key(jnp.asarray(every), order), order))
    np.testing.assert_array_equal(exact([back]), value)


# --- k --------------------------------------------------------------------------------

select_jit = jax.jit(selection.select)


def test_every_kind_of_count_says_the_same():
    tree = some("float32", 3, 9)
    for k in (0, 1, 16, SIZE):
        expected = selection.select(tree, k)
        for kind in (np.int64(k), np.array(k), jnp.int32(k), jnp.uint8(k)):
            chosen = selection.select(tree, kind)
            jax.tree.map(np.testing.assert_array_equal, chosen, expected)
        chosen = selection.select(tree, (np.uint32(0), np.uint32(k)))
        jax.tree.map(np.testing.assert_array_equal, chosen, expected)
        chosen = select_jit(tree, jnp.int32(k))
        jax.tree.map(np.testing.assert_array_equal, chosen, expected)
    # What is traced cannot be checked: it counts as the nearest count there is.
    everything = selection.top_k_mask(tree, (np.uint32(1), np.uint32(0)))
    assert all(m.all() for m in jax.tree.leaves(everything))
    assert all(m.all() for m in jax.tree.leaves(select_jit(tree, SIZE + 9).masks))
    assert not any(m.any() for m in jax.tree.leaves(select_jit(tree, -3).masks))


@hypothesis.given(SEEDS, KINDS, st.data())
def test_a_pool_per_leaf_and_per_slice(seed, kinds, data):
    tree = some("float32", seed, kinds)
    tree = [tree["a"], tree["b"][0], tree["c"].x, tree["b"][2]]
    counts = [
        data.draw(st.integers(0, 12)),
        data.draw(st.integers(0, 5)),
        np.array([data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))]),
        0,
    ]
    masks, thresholds, kept = selection.select(tree, counts)
    assert [np.sum(n) for n in kept] == [np.sum(n) for n in counts]
    assert [n.shape for n in kept] == [np.shape(n) for n in counts]
    for i in (0, 1):
        (expected,), last = top([tree[i]], counts[i])
        np.testing.assert_array_equal(masks[i], expected)
        assert same(thresholds[i], last)
    assert thresholds[2].shape == (2,)
    for row in (0, 1):
        (expected,), last = top([tree[2][row]], counts[2][row])
        np.testing.assert_array_equal(masks[2][row], expected)
        assert same(thresholds[2][row], last)
    assert masks[3].shape == (0, 2)
    assert np.isnan(thresholds[3])
    # Positions of a tuple of ints, as budgets give them, mean the same.
    counts[2] = tuple(int(k) for k in counts[2])
    again = selection.top_k_mask(tree, counts)
    jax.tree.map(np.testing.assert_array_equal, again, masks)


@pytest.mark.parametrize("costs", [(3, 1, 2), (0, 5, 1), (2, 0, 0), (2**31, 7, 2**31)])
def test_a_budget_of_costs(costs):
    for seed in range(12):
        tree = some("float32", seed, seed % 6 + 1)
        tree = [tree["a"], tree["b"][0], tree["c"].x]
        budget = (seed * max(costs)) % (1 + sum(costs) * 9) + seed % 4
        chosen = selection.select(tree, budget, costs=list(costs))
        check(tree, chosen, budget, costs)


def test_costs_that_are_no_integers_never_overspend():
    tree = [jnp.asarray([5.0, 3.0, 1.0]), jnp.asarray([4.0, 2.0])]
    price = [0.1, 0.25]
    for budget, count in [(0.0999, 0), (0.1, 1), (0.35, 2), (0.45, 3), (0.8, 5)]:
        masks = selection.top_k_mask(tree, budget, costs=price)
        number = sum(int(m.sum()) for m in masks)
        # Costs round up by 2**-24 of the largest: at most one weight less than exact.
        assert number in (count, max(count - 1, 0))
        spent = sum(int(m.sum()) * p for m, p in zip(masks, price, strict=True))
        assert spent <= budget + 1e-12
    assert [m.sum() for m in selection.top_k_mask(tree, 9.0, costs=price)] == [3, 2]


# --- size: samples, guesses, many rows ------------------------------------------------

N = 40_000
K = 1_234


def values(kind):
    """N values of a kind that some bracketing handles badly."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(N).astype(np.float32)
    tiny = (rng.integers(0, 5000, N) + 1).astype(np.uint32).view(np.float32)
    return {
        "normal": normal,
        "equal": np.full(N, 0.5, np.float32),
        "two values": np.where(rng.random(N) < 0.02, 1, -1).astype(np.float32),
        "sorted": np.sort(normal),
        "heavy tails": np.exp(20 * normal),
        "mostly zeros": np.where(rng.random(N) < 0.01, normal, 0).astype(np.float32),
        "subnormal": tiny,
        "one inf": np.where(np.arange(N) == 77, np.inf, normal).astype(np.float32),
        "nearly all NaN": np.where(rng.random(N) < 0.9, np.nan, normal),
        "coarse": np.round(normal * 4) / 4,
    }[kind].astype(np.float32)


KINDS_OF_VALUES = (
    (
        "normal equal|two values|sorted|heavy tails|mostly zeros|subnormal|one inf|"
        "nearly all NaN|coarse"
    )
    .replace("normal equal", "normal|equal")
    .split("|")
)


@jax.jit
def select_guessed(tree, k, guess):
    return selection.select(tree, k, guess=guess)


@pytest.mark.parametrize("kind", KINDS_OF_VALUES)
def test_values_that_are_hard_to_bracket(kind):
    x = values(kind)
    tree = [jnp.asarray(x[: N // 2].reshape(100, -1)), jnp.asarray(x[N // 2 :])]
    for k in (1, K, N // 2, N - 1):
        chosen = select_jit(tree, k)
        (expected,), last = top_fast(x, k)
        got = np.concatenate([np.ravel(m) for m in chosen.masks])
        np.testing.assert_array_equal(got, expected)
        assert same(chosen.threshold, last)
    for guess in (last, last * 1.1, 0.0, np.inf, -np.inf, np.nan, 1e-42):
        chosen = select_guessed(tree, k, jnp.float32(guess))
        got = np.concatenate([np.ravel(m) for m in chosen.masks])
        np.testing.assert_array_equal(got, expected)
        assert same(chosen.threshold, last)


def top_fast(x, k):
    """`top` for one float32 leaf and counts, without the Python loop."""
    value = exact([x])
    nan = np.isnan(value)
    order = np.lexsort((np.arange(x.size), -np.where(nan, 0, value), ~nan))
    kept = np.zeros(x.size, bool)
    kept[order[:k]] = True
    return [kept], value[order[k - 1]]


def test_a_large_leaf():
    """Past the sizes where a leaf is cut into rows and more probes are used."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal(2**22 + 64).astype(np.float32)
    tree = [jnp.asarray(x[: 2**22].reshape(2048, 2, 1024)), jnp.asarray(x[2**22 :])]
    k = 71_003
    masks, threshold, counts = select_jit(tree, k)
    cutoff = np.partition(x, x.size - k)[x.size - k]
    assert float(threshold) == cutoff
    np.testing.assert_array_equal(masks[0], x[: 2**22].reshape(2048, 2, 1024) >= cutoff)
    # The same leaf with many ties: the first of them in row-major order.
    coarse = [jnp.round(leaf) for leaf in tree]
    masks, threshold, counts = select_jit(coarse, k)
    assert sum(int(n) for n in counts) == k
    flat = np.concatenate([np.ravel(leaf) for leaf in coarse])
    over = flat > float(threshold)
    ties = np.flatnonzero(flat == float(threshold))
    over[ties[: k - over.sum()]] = True
    np.testing.assert_array_equal(np.concatenate([np.ravel(m) for m in masks]), over)


def test_no_slices_at_all():
    masks, thresholds, _ = selection.select([jnp.ones((0, 3))], [np.zeros(0, int)])
    assert masks[0].shape == (0, 3)
    assert thresholds[0].shape == (0,)


def test_a_tree_of_guesses():
    x = jnp.arange(12.0).reshape(3, 4)
    tree, counts = {"a": x, "b": -x}, {"a": np.array([1, 2, 3]), "b": 5}
    expected = selection.select(tree, counts)
    chosen = selection.select(tree, counts, guess=expected.threshold)
    jax.tree.map(np.testing.assert_array_equal, chosen, expected)


# --- pools of more weights than a uint32 counts ---------------------------------------


@pytest.mark.parametrize("costs", [None, [3, 0, 2]])
def test_pools_cut_into_cells(costs, monkeypatch):
    """What pools past 2**32 weights do, at a size that can be checked."""
    monkeypatch.setattr(plan, "LIMIT", 13)
    kind = 0 if costs is None else 1
    shapes = [(5, 3 + kind, 2), (4 + kind,), (6, 2)]
    rng = np.random.default_rng(0)
    for _ in range(8):
        tree = [rng.integers(0, 4, s).astype(np.float32) for s in shapes]
        budget = int(rng.integers(0, 60 if costs is None else 130))
        budget = min(budget, sum(x.size for x in tree)) if costs is None else budget
        chosen = selection.select(tree, budget, costs=costs)
        check(tree, chosen, budget, costs)
    counts = [17, 2, np.array([0, 1, 2, 0, 1, 2])]
    masks = selection.top_k_mask(tree, counts)
    np.testing.assert_array_equal(masks[0], top([tree[0]], 17)[0][0])
    np.testing.assert_array_equal(masks[1], top([tree[1]], 2)[0][0])


class Endless(passes.Part):
    """A leaf of 2**36 weights that exists only as a formula.

    Each of its 2**16 rows holds the scores 0 to 4095, 256 times each, in order.
    """

    def above(self, thresholds):
        value = keys.from_key(thresholds, self.plan.order)
        count = jnp.uint32(256) * (4095 - jnp.minimum(value, 4095))
        return jnp.broadcast_to(count, (2**16, count.shape[1]))

    def at(self, bound, ends):
        start = keys.from_key(bound, self.plan.order)[:, None] * 256
        ends = jnp.broadcast_to(ends, (2**16, ends.shape[1]))
        return jnp.where(ends > start, jnp.minimum(ends - start, 256), 0)


ENDLESS = plan.Plan(
    None,
    keys.Order("uint32"),
    (plan.PlannedLeaf((2**16, 2**20), 1, True, 0, 0, 1, 0, 1),),
    axis_name=None,
    shards=1,
    least=False,
    counts=True,
    skip_zeros=False,
    many=True,
)


@jax.jit
def find_endless(high, low):
    return cut.find(Endless(ENDLESS, (), (), ()), (high, low), None)


@pytest.mark.parametrize("k", [2**33 + 12_345, 2**36 - 1, 1, 2**32 * 15 + 2**24])
def test_counts_past_32_bits(k):
    found = find_endless(*plan.pairs([k]))
    value, ties = divmod(k - 1, 2**24)
    value, ties = 4095 - value, ties + 1
    rows, rest = divmod(ties, 256)
    ends = np.asarray(found.ends[0])
    before = np.clip(ends.astype(np.int64) - value * 256, 0, 256)
    assert np.asarray(found.counts[0]).astype(np.int64).sum() == k
    bound = int(keys.from_key(found.bound[0], ENDLESS.order)[0])
    if ties == 2**24:  # all of a value are kept: as well none of the next one
        over = 2**24 * (4095 - bound)
        assert over + before.sum() == k
    else:
        assert bound == value
        np.testing.assert_array_equal(before[:rows], 256)
        assert before[rows] == rest
        assert not before[rows + 1 :].any()


@pytest.mark.parametrize("guess", [None, 0.0, 3.0])
@pytest.mark.parametrize("k", [0, 5, 8, 20, 30])
def test_zeros_may_be_left_out(k, guess):
    rng = np.random.default_rng(k)
    tree = [np.abs(rng.standard_normal(n)).astype(np.float32) for n in (10, 20)]
    alive = [rng.permutation(n) < 4 for n in (10, 20)]  # eight of thirty
    tree = [np.where(a, x, 0) for a, x in zip(alive, tree, strict=True)]
    found = selection.select(
        tree, k, guess=guess, exact_threshold=False, skip_zeros=True
    )
    expected, _ = top(tree, k)
    if k < 30:
        expected = [m & a for m, a in zip(expected, alive, strict=True)]
    for mask, m, count in zip(found.masks, expected, found.counts, strict=True):
        np.testing.assert_array_equal(mask, m)
        assert int(count) == m.sum()
    # All above the threshold are kept, and none below it.
    kept, scores = np.concatenate(found.masks), np.concatenate(tree)
    assert kept[scores > found.threshold].all()
    assert not kept[scores < found.threshold].any()


# --- score functions ------------------------------------------------------------------


DRIFT = "still", "small", "zero", "jump", "equal", "nan"


@jax.jit
def follow_and_search(tree, k, near):
    found = selection.follow(tree, k, near, score=jnp.abs)
    return found, selection.top_k_mask(tree, k, score=jnp.abs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(2))
def test_a_search_from_where_the_last_one_ended(seed, dtype):
    """Pools of every kind, whose thresholds drift, jump, tie, vanish and return."""
    rng = np.random.default_rng(seed)
    shapes, k = [(30, 20), (7,), (4, 25)], [117, 3, jnp.array([0, 25, 9, 1])]
    arrays = [rng.standard_normal(s) for s in shapes]
    near = selection.nowhere([jnp.zeros(s, dtype) for s in shapes], 6)
    tied = set()
    for step in range(24):
        kind = "small" if step < 2 else rng.choice(DRIFT)
        move = [rng.standard_normal(s) for s in shapes]
        if kind == "small":
            arrays = [x + 0.01 * y for x, y in zip(arrays, move, strict=True)]
        elif kind == "zero":
            arrays = [np.zeros(s) for s in shapes]
        elif kind == "jump":
            arrays = [y * 10.0 ** rng.integers(-38, 38) for y in move]
        elif kind == "equal":
            arrays = [np.round(y) for y in move]
        elif kind == "nan":
            arrays = [
                np.where(y > 1, np.nan, x) for x, y in zip(arrays, move, strict=True)
            ]
        tree = [jnp.asarray(x, dtype) for x in arrays]
        (masks, near, equal), searched = follow_and_search(tree, k, near)
        jax.tree.map(np.testing.assert_array_equal, masks, searched)
        sizes = [np.asarray(jnp.abs(x).astype(jnp.float32)) for x in tree]
        rows = [sizes[0], sizes[1], *sizes[2]]
        counts = [117, 3, 0, 25, 9, 1]
        among = []
        for row, n in zip(rows, counts, strict=True):
            ranked = np.sort(np.nan_to_num(row.ravel(), nan=np.inf))[::-1]
            among.append(0 < n < row.size and ranked[n - 1] == ranked[n])
        assert bool(equal) == any(among)
        tied.add(any(among))
    assert tied == {False, True}


def saliency(gradient, weight):
    assert gradient.dtype == weight.dtype == jnp.float32
    return jnp.abs(gradient * weight)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_score_of_several_arrays(dtype):
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    tree = {"w": (draw((6, 5)), draw((6, 5))), "v": [(draw((7,)), draw((7,)))]}
    masks = selection.top_k_mask(tree, 9, score=saliency)
    product = [
        np.abs(g.astype(np.float32) * w.astype(np.float32))
        for g, w in (
            [np.asarray(x) for x in pair] for pair in (tree["v"][0], tree["w"])
        )
    ]
    expected, _ = top(product, 9)
    np.testing.assert_array_equal(masks["v"][0], expected[0])
    np.testing.assert_array_equal(masks["w"], expected[1])


def test_holes_are_empty_nodes():
    tree = {"a": jnp.arange(4.0), "b": None, "c": optax.MaskedNode(), "d": ()}
    masks = selection.top_k_mask(tree, 2)
    assert masks["b"] is None
    assert masks["c"] == optax.MaskedNode()
    assert masks["a"].tolist() == [False, False, True, True]
    masks = selection.top_k_mask(tree, tree | {"a": 1})
    assert masks["a"].tolist() == [False, False, False, True]


def test_no_gradient_passes():
    def loss(x):
        return jnp.sum(jnp.where(selection.top_k_mask(x, 2), x, 0.0))

    grad = jax.grad(loss)(jnp.array([1.0, 4.0, 3.0]))
    assert grad.tolist() == [0.0, 1.0, 1.0]


# --- transformations ------------------------------------------------------------------


def test_vmap_gives_each_member_its_own_mask():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (3, 5, 4)).astype(np.float32)
    y = rng.standard_normal((7,)).astype(np.float32)
    counts = np.array([0, 13, 27])

    def one(x, k):
        return selection.select([x, y], k)

    masks, thresholds, kept = jax.jit(jax.vmap(one))(x, counts)
    np.testing.assert_array_equal(kept[0] + kept[1], counts)
    for i, k in enumerate(counts):
        expected, last = top([x[i], y], k)
        np.testing.assert_array_equal(masks[0][i], expected[0])
        np.testing.assert_array_equal(masks[1][i], expected[1])
        assert same(thresholds[i], last)
    # Members of members, and a batch of counts alone.
    grid = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(x, counts)
    np.testing.assert_array_equal(
        grid.masks[0][[0, 1, 2], [0, 1, 2]], np.asarray(masks[0])
    )


def test_scan_over_steps():
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 4, (4, 31)).astype(np.float32)

    def step(guess, x):
        masks, threshold, _ = selection.select([x], 11, guess=guess)
        return threshold, masks[0]

    _, masks = jax.lax.scan(step, jnp.float32(0), x)
    for mask, row in zip(masks, x, strict=True):
        np.testing.assert_array_equal(mask, top([row], 11)[0][0])


# --- what it costs --------------------------------------------------------------------

traces = 0


def counted(x):
    global traces
    traces += 1
    return -x


def test_calls_outside_jit_compile_once():
    selection.top_k_mask({"w": jnp.arange(9.0)}, 2, score=counted)
    first = traces
    assert first > 0
    for k in range(4):
        masks = selection.top_k_mask({"w": jnp.arange(9.0) + k}, k, score=counted)
        assert int(masks["w"].sum()) == k
    # One more trace a call, of shapes alone: which dtype the scores have.
    assert traces <= first + 4


def test_nothing_is_sorted_or_stored():
    def program(g, w, k):
        return selection.select([(g, w)], k, score=saliency)

    g = jnp.ones((1024, 1024))
    lowered = jax.jit(program).lower(g, g, 1000)
    text = lowered.as_text()
    assert "stablehlo.while" in text
    assert "stablehlo.sort" not in text
    assert "top_k" not in text.replace("top_k_mask", "")
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 0.1 * g.nbytes


# --- wrong input ----------------------------------------------------------------------

ONES = jnp.ones((3, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f([ONES], 13), r"k = 13 must be an integer in \[0, 12\].*Pass"),
        (lambda f: f([ONES], -1), r"k = -1 must be an integer in \[0, 12\]"),
        (lambda f: f([ONES], 2.5), r"k = 2.5 must be an integer"),
        (lambda f: f([ONES], True), r"k = True must be an integer"),
        (lambda f: f([ONES], jnp.float32(2)), r"k has dtype float32.*astype"),
        (lambda f: f([ONES], {"a": 1}), r"k = {'a': 1} must be one value, or a tree"),
        (lambda f: f({"a": ONES}, {"a": 13}), r"k for leaves\['a'\] = 13 must"),
        (lambda f: f([ONES], [np.array([1, 5, 0])]), r"in \[0, 4\]"),
        (lambda f: f([ONES], [np.array([1, 2])]), r"shape \(2,\).*axis 0.*\(3, 4\)"),
        (lambda f: f([], 0), r"leaves = \[\] holds no array; give at least one"),
        (
            lambda f: f([ONES > 0], 1),
            r"leaves\[0\] have dtype bool; they must be.*Cast",
        ),
        (lambda f: f([jnp.ones(3, int)], 1), r"leaves\[0\] have dtype int32"),
        (lambda f: f([ONES, jnp.ones(3, "uint32")], 1), r"'float32', 'uint32'.*Cast"),
        (lambda f: f([ONES], 1, score=jnp.sum), r"score = .*\(3, 4\).*shape \(\)"),
        (lambda f: f([ONES], 5, costs=[-1]), r"costs for leaves\[0\] = -1 must be"),
        (lambda f: f([ONES], 5, costs=[math.nan]), r"costs for leaves\[0\] = nan"),
        (lambda f: f([ONES], 5, costs=[1, 2]), r"costs = \[1, 2\] must be one value"),
        (
            lambda f: f([ONES], -5, costs=[1]),
            r"k = -5 must be an integer of at least 0",
        ),
        (lambda f: f([ONES], math.inf, costs=[1]), r"k = inf must be a finite number"),
        (lambda f: f([ONES], jnp.int32(5), costs=[0.5]), r"costs = .*k is traced"),
        (lambda f: f([ONES], 5, guess=jnp.ones(2)), r"guess = .* holds 2 scores"),
    ],
)
@pytest.mark.parametrize("function", ["top_k_mask", "kth_largest", "select"])
def test_wrong_input_is_named(function, call, message):
    with pytest.raises(ValueError, match=rf"(?s)^{function}: .*{message}"):
        call(getattr(selection, function))


def test_a_sum_of_costs_past_64_bits():
    """Only shapes are needed, so no array of 2**33 weights is made."""
    with pytest.raises(ValueError, match=r"costs = .*2\*\*64.*unit"):
        jax.eval_shape(
            lambda x: selection.top_k_mask([x], 5, costs=[2**32 - 1]),
            jax.ShapeDtypeStruct((2**17, 2**16), jnp.float32),
        )


def test_a_leaf_too_large_for_its_shape():
    with pytest.raises(ValueError, match=r"leaves\[0\] of shape .*2\*\*32.*Reshape"):
        jax.eval_shape(
            lambda x: selection.top_k_mask([x], 5),
            jax.ShapeDtypeStruct((2**33,), jnp.float32),
        )


def test_a_pair_is_one_count():
    k = uint64.pair64(5)
    assert int(selection.top_k_mask([ONES], k)[0].sum()) == 5
