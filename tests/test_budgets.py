"""Budgets against brute force in fractions and against numbers worked out by hand."""

import itertools
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st

import sparse_optax
from sparse_optax import budgets, export, masks
from sparse_optax.budgets.resolve import pool_size as size_of_pool
from sparse_optax.checks import boundary
from sparse_optax.layers import layers_of

HOLE = optax.MaskedNode()
LENET = {
    "Dense_0": {"kernel": (784, 300), "bias": (300,)},
    "Dense_1": {"kernel": (300, 100), "bias": (100,)},
    "Dense_2": {"kernel": (100, 10), "bias": (10,)},
}


def abstract(shapes, dtype=jnp.float32):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def kernels(counts):
    return [counts[f"Dense_{i}"]["kernel"] for i in range(3)]


# --- the oracle -----------------------------------------------------------------------
def exact_shares(lines, lows, highs, goal, costs):
    """Shares base + x * slope within bounds, by trying who sits at which bound."""
    for ends in itertools.product(("low", "free", "high"), repeat=len(lines)):
        at = {
            i: (lows if end == "low" else highs)[i]
            for i, end in enumerate(ends)
            if end != "free"
        }
        free = [i for i in range(len(lines)) if i not in at]
        rest = goal - sum(costs[i] * s for i, s in at.items())
        rest -= sum(costs[i] * lines[i][0] for i in free)
        slope = sum(costs[i] * lines[i][1] for i in free)
        if slope == 0:
            if rest == 0:
                return [Fraction(at[i]) for i in range(len(lines))]
            continue
        x = Fraction(rest) / slope
        shares = [base + x * rise for base, rise in lines]
        right = {
            "low": lambda i, s: s <= lows[i],
            "free": lambda i, s: lows[i] <= s <= highs[i],
            "high": lambda i, s: s >= highs[i],
        }
        if all(
            right[end](i, s)
            for i, (end, s) in enumerate(zip(ends, shares, strict=True))
        ):
            return [Fraction(at.get(i, s)) for i, s in enumerate(shares)]
    raise AssertionError("no shares add up to the goal")


def largest_remainder(shares, budget, costs):
    counts = [math.floor(s) for s in shares]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in order:
        spent = sum(n * c for n, c in zip(counts, costs, strict=True))
        if shares[i] != counts[i] and spent + costs[i] <= budget:
            counts[i] += 1
    return counts


def expected(lines, sizes, goal, costs=None, budget=None):
    costs = [1] * len(sizes) if costs is None else costs
    shares = exact_shares(lines, [1] * len(sizes), sizes, goal, costs)
    return largest_remainder(
        shares, math.floor(goal) if budget is None else budget, costs
    )


SLOPES = {
    "uniform": lambda s: math.prod(s),
    "erdos_renyi": lambda s: Fraction(s[-2] + s[-1], s[-2] * s[-1]) * math.prod(s),
    "erdos_renyi_kernel": lambda s: Fraction(sum(s), math.prod(s)) * math.prod(s),
    "linear": lambda s: s[-2] + s[-1],
}

sides = st.integers(1, 9)
layer = st.one_of(st.tuples(sides, sides), st.tuples(sides, sides, sides, sides))
networks = st.lists(layer, min_size=1, max_size=4)


# --- count ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("d", "n", "kept"),
    [
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.57, 100, 57),
        (0.1, 8_000_000_000, 800_000_000),
        (1 / 3, 9_999_999_999, 3_333_333_333),
        (1 / 60, 266_200, 4_436),
        (0.005, 266_200, 1_331),
        (1.0, 7, 7),
        (1, 7, 7),
        (0.5, 1, 0),
        (0.5, 0, 0),
        (Fraction(2, 3), 3, 2),
        (np.float32(0.29), 100, 29),
        (np.float64(0.29), 100, 29),
        (jnp.float32(0.29), 100, 29),
        (0.5, np.int64(2**40), 2**39),
    ],
)
def test_count(d, n, kept):
    got = budgets.count(d, n)
    assert got == kept
    assert type(got) is int


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(0, 10**12))
def test_count_means_the_decimal_or_the_ratio_that_was_typed(a, b, n):
    a, b = min(a, b), max(a, b)
    assert budgets.count(a / b, n) == a * n // b


@pytest.mark.parametrize("d", [0, 0.0, -0.1, 1.0000001, math.nan, math.inf, True, "1"])
def test_count_refuses(d):
    with pytest.raises(ValueError, match=r"count: `d` must be a number in \(0, 1\]"):
        budgets.count(d, 10)


@pytest.mark.parametrize("n", [-1, 0.5, math.nan, None])
def test_count_refuses_a_number_of_weights(n):
    with pytest.raises(ValueError, match="count: `n` must be a whole number"):
        budgets.count(0.5, n)


def test_count_refuses_a_traced_density():
    with pytest.raises(ValueError, match=r"`d` is a traced value.*static_args"):
        jax.jit(lambda d: budgets.count(d, 10))(0.5)


# --- by hand --------------------------------------------------------------------------
def test_lenet_uniform_one_percent():
    counts = budgets.uniform(0.01).counts(abstract(LENET))
    assert kernels(counts) == [2352, 300, 10]
    assert all(counts[name]["bias"] == HOLE for name in counts)
    assert all(type(c) is int for c in kernels(counts))


def test_lenet_erdos_renyi_one_percent():
    # eps * (1084, 400, 110) with eps = 2662 / 1594: 1810.3, 668.0, 183.7.
    for budget in (budgets.erdos_renyi, budgets.erdos_renyi_kernel, budgets.linear):
        assert kernels(budget(0.01).counts(abstract(LENET))) == [1810, 668, 184]


def test_kernel_size_tells_the_distributions_apart():
    net = abstract({"conv": (3, 3, 16, 32), "head": (64, 72)})
    total = 921  # of 4,608 + 4,608 weights at 0.1
    per_layer = {
        # eps * (48 * 9, 136)
        "erdos_renyi": Fraction(total * 432, 568),
        # eps * (3 + 3 + 16 + 32, 136)
        "erdos_renyi_kernel": Fraction(total * 54, 190),
        # eps * (48, 136)
        "linear": Fraction(total * 48, 184),
    }
    for name, conv in per_layer.items():
        counts = getattr(budgets, name)(0.1).counts(net)
        assert abs(counts["conv"] - conv) < 1, name
        assert counts["conv"] + counts["head"] == total


def test_a_full_layer_is_made_dense_and_the_rest_solved_again():
    net = abstract([(20, 20), (2, 10), (10, 4)])
    # At 0.5: 230 weights; eps * (40, 12, 14) fills the second (20) and the third (40).
    assert budgets.erdos_renyi_kernel(0.5).counts(net) == [170, 20, 40]
    # At 0.3: 138 weights; 83.6, 25.1, 29.3. The second keeps 20, the others share 118
    # as 40 to 14 ...
    assert budgets.erdos_renyi_kernel(0.3).counts(net) == [87, 20, 31]
    # ... or, spilling equally, get 2.55 each.
    assert budgets.linear(0.3).counts(net) == [86, 20, 32]


def test_every_layer_keeps_a_weight():
    net = abstract([(100, 100), (3, 3), (2, 2)])
    assert budgets.uniform(0.001).counts(net) == [8, 1, 1]
    assert budgets.nonzeros(3).counts(net) == [1, 1, 1]


def test_ties_go_to_the_earlier_layer():
    net = abstract([(3, 3), (3, 3), (3, 3)])
    assert budgets.nonzeros(14).counts(net) == [5, 5, 4]
    assert budgets.uniform(0.5).counts(net) == [5, 4, 4]


def test_dense_and_overrides_stay_inside_the_total():
    budget = budgets.uniform(0.05, dense=["Dense_2/kernel"])
    assert kernels(budget.counts(abstract(LENET))) == [10917, 1393, 1000]
    budget = budgets.uniform(0.05, overrides={"Dense_1/kernel": 0.2})
    assert kernels(budget.counts(abstract(LENET))) == [7279, 6000, 31]
    budget = budgets.uniform(
        0.05, dense="Dense_2/kernel", overrides={"Dense_1/kernel": 0.00001}
    )
    assert kernels(budget.counts(abstract(LENET))) == [12309, 1, 1000]


@pytest.mark.parametrize(
    "budget",
    [
        budgets.erdos_renyi(0.05, dense=["Dense_2/kernel"]),
        budgets.erdos_renyi_kernel(0.05, dense=["Dense_2/kernel"]),
        budgets.linear(0.05, dense=["Dense_2/kernel"]),
        budgets.nonzeros(13310, dense=["Dense_2/kernel"]),
    ],
)
def test_every_budget_takes_dense_leaves(budget):
    first, second, third = kernels(budget.counts(abstract(LENET)))
    assert third == 1000
    assert first + second == 12310
    if not budget.kind == "nonzeros":
        assert abs(first - Fraction(12310 * 1084, 1484)) < 1


def test_everything_dense():
    for budget in (
        budgets.uniform(1.0),
        budgets.erdos_renyi(1),
        budgets.erdos_renyi_kernel(1.0),
        budgets.linear(1.0),
        budgets.nonzeros(266_200),
        budgets.num_bytes(10**9),
        budgets.num_flops(10**9, {f"Dense_{i}/kernel": 2 for i in range(3)}),
    ):
        counts = kernels(budget.counts(abstract(LENET)))
        assert counts == [235200, 30000, 1000]


# --- against brute force --------------------------------------------------------------
@pytest.mark.parametrize("name", ["uniform", "erdos_renyi", "erdos_renyi_kernel"])
@given(networks, st.fractions(0, 1, max_denominator=999))
def test_proportional_budgets(name, shapes, d):
    sizes = [math.prod(s) for s in shapes]
    goal = d * sum(sizes)
    if math.floor(goal) < len(sizes):
        return
    lines = [(0, SLOPES[name](s)) for s in shapes]
    counts = getattr(budgets, name)(float(d)).counts(abstract(shapes))
    assert counts == expected(lines, sizes, goal)
    assert sum(counts) == budgets.count(float(d), sum(sizes))


@given(networks, st.fractions(0, 1, max_denominator=999))
def test_linear_spills_equally(shapes, d):
    sizes = [math.prod(s) for s in shapes]
    goal = d * sum(sizes)
    if math.floor(goal) < len(sizes):
        return
    neurons = [SLOPES["linear"](s) for s in shapes]
    lines = [(goal * n / sum(neurons), 1) for n in neurons]
    counts = budgets.linear(float(d)).counts(abstract(shapes))
    assert counts == expected(lines, sizes, goal)


@given(networks, st.data())
def test_nonzeros(shapes, data):
    sizes = [math.prod(s) for s in shapes]
    n = data.draw(st.integers(len(sizes), sum(sizes)))
    counts = budgets.nonzeros(n).counts(abstract(shapes))
    assert counts == expected([(0, s) for s in sizes], sizes, n)
    assert sum(counts) == n


@given(networks, st.data())
def test_fixed_leaves_are_taken_out_and_the_rest_solved(shapes, data):
    sizes = [math.prod(s) for s in shapes]
    dense = data.draw(st.sets(st.sampled_from(range(len(shapes)))))
    free = [i for i in range(len(shapes)) if i not in dense]
    fixed = sum(sizes[i] for i in dense)
    n = data.draw(st.integers(fixed + len(free), sum(sizes)))
    budget = budgets.nonzeros(n, dense=[str(i) for i in dense])
    counts = budget.counts(abstract(shapes))
    assert [counts[i] for i in dense] == [sizes[i] for i in dense]
    inner = [sizes[i] for i in free]
    want = expected([(0, s) for s in inner], inner, n - fixed)
    assert [counts[i] for i in free] == want


@given(
    networks,
    st.data(),
    st.lists(st.fractions(0, 50, max_denominator=4), min_size=4, max_size=4),
)
def test_num_flops(shapes, data, costs):
    sizes, costs = [math.prod(s) for s in shapes], costs[: len(shapes)]
    low, high = sum(costs), sum(s * c for s, c in zip(sizes, costs, strict=True))
    n = low + data.draw(st.fractions(0, 1, max_denominator=99)) * (high - low)
    if n == 0:
        return
    counts = budgets.num_flops(n, costs).counts(abstract(shapes))
    assert sum(k * c for k, c in zip(counts, costs, strict=True)) <= n
    if n == high:
        assert counts == sizes
    else:
        assert counts == expected([(0, s) for s in sizes], sizes, n, costs, n)


# --- bytes of a file ------------------------------------------------------------------
def clustered(shape, kept, gap):
    """A mask with its weights at even gaps as far as they go, a hard case of a code."""
    flat = np.zeros(math.prod(shape), bool)
    flat[np.minimum(np.arange(kept) * gap, flat.size - kept + np.arange(kept))] = True
    return flat.reshape(shape)


def files(params, counts):
    """Bytes of files with masks of these counts: random ones and hard ones."""
    rng = np.random.default_rng(0)
    for gap in (0, 1, 3, 8, 20):
        made = {}
        for name, x in params.items():
            if isinstance(counts[name], optax.MaskedNode):
                continue
            size, kept = math.prod(x.shape), counts[name]
            made[name] = clustered(x.shape, kept, gap)
            if gap == 0:
                made[name] = (rng.permutation(size) < kept).reshape(x.shape)
            assert made[name].sum() == kept
        yield export.sparse_bytes(params, made), made


STORED = {
    "bias": jax.ShapeDtypeStruct((50,), jnp.float32),
    "key": jax.ShapeDtypeStruct((2,), jnp.uint32),
    "v": jax.ShapeDtypeStruct((40, 50), jnp.float32),
    "w": jax.ShapeDtypeStruct((3, 3, 10, 20), jnp.float32),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5, 0.8, 0.99, 1.0, 1.1])
def test_num_bytes_is_met_by_the_file_and_nearly_used(dtype, share):
    params = STORED | {
        name: jax.ShapeDtypeStruct(STORED[name].shape, dtype) for name in "vw"
    }
    whole, _ = next(files(params, {"bias": HOLE, "key": HOLE, "v": 2000, "w": 1800}))
    n = 900 + math.floor(share * (whole - 900))
    counts = budgets.num_bytes(n).counts(params)
    sizes = [size for size, _ in files(params, counts)]
    assert max(sizes) <= n
    # A method may move weights between layers.
    for moved in (counts["v"] - 1, 1 - counts["w"], counts["v"] // 2):
        moved = max(min(moved, 1800 - counts["w"]), counts["v"] - 2000)
        other = {**counts, "v": counts["v"] - moved, "w": counts["w"] + moved}
        assert max(size for size, _ in files(params, other)) <= n
    if share >= 1:
        assert (counts["v"], counts["w"]) == (2000, 1800)
    else:
        # A bitmap takes up to a bit a weight more than random positions must.
        assert sizes[0] > 0.96 * n - 60 - (3800 // 8 if share > 0.6 else 0)
        assert counts["v"] == pytest.approx(counts["w"] / 0.9, abs=2)


def test_num_bytes_of_twenty_small_layers():
    """Mask bits, kept values, header: the whole file counts."""
    params = {
        str(i): jax.ShapeDtypeStruct((32, 32), jnp.float32) for i in range(20)
    } | {f"b{i}": jax.ShapeDtypeStruct((32,), jnp.float32) for i in range(20)}
    for n in (5068, 10_436):
        counts = budgets.num_bytes(n).counts(params)
        sizes = [size for size, _ in files(params, counts)]
        assert 0.93 * n < sizes[0] <= max(sizes) <= n


def test_num_bytes_of_a_tree_with_statistics(tmp_path):
    """The names of the whole tree are longer, and its statistics take bytes."""
    params = {"v": jnp.ones((40, 50)), "w": jnp.ones((50, 30))}
    stats = {"mean": jnp.ones(300), "step": 7, "key": jax.random.key(0)}
    tree = {"params": params, "batch_stats": stats}
    for options in ({}, {"dtype": "float16"}, {"dtype": "int8"}):
        budget = budgets.num_bytes(5000, tree=tree, **options)
        made = masks.random_masks(0, params, budget)
        kept = {**tree, "params": sparse_optax.sparsify(params, made)}
        sparse_optax.save_sparse(tmp_path / "m", kept, made, **options)
        assert 4800 < (tmp_path / "m").stat().st_size <= 5000
    with refuses("num_bytes", "tree", r"\['v', 'w'\]"):
        budgets.num_bytes(5000, tree=stats).counts(params)


def test_num_bytes_of_two_dtypes():
    params = {
        "a": jax.ShapeDtypeStruct((100, 10), jnp.float32),
        "v": jax.ShapeDtypeStruct((100, 10), jnp.bfloat16),
    }
    for n in (1500, 2500, 4500):
        counts = budgets.num_bytes(n).counts(params)
        sizes = [size for size, _ in files(params, counts)]
        assert n - 150 < sizes[0] <= max(sizes) <= n
        assert abs(counts["a"] - counts["v"]) <= 1


def test_num_bytes_with_fixed_layers():
    for options in (
        {"dense": ["v"]},
        {"overrides": {"v": 0.99}},
        {"dense": ["v", "w"]},
    ):
        for n in (12_000, 15_000, 16_500, 20_000):
            if n < 16_000 and len(options.get("dense", ())) == 2:
                continue
            counts = budgets.num_bytes(n, **options).counts(STORED)
            assert counts["v"] == (1980 if "overrides" in options else 2000)
            assert max(size for size, _ in files(STORED, counts)) <= n


def test_num_bytes_of_one_pool(tmp_path):
    """However the pool spreads the weights over layers, also of two dtypes."""
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16"):
        params = {
            "a": jnp.asarray(rng.normal(size=(50, 30)), jnp.float32),
            "b": jnp.ones(30),
            "c": jnp.asarray(9 * rng.normal(size=(30, 40)), dtype),
        }
        for n in (1200, 3000, 6000):
            made = masks.magnitude_masks(params, budgets.num_bytes(n))
            kept = sparse_optax.sparsify(params, made)
            sparse_optax.save_sparse(tmp_path / "m", kept, made)
            assert 0.75 * n < (tmp_path / "m").stat().st_size <= n


def test_too_few_bytes_and_the_cure():
    with pytest.raises(ValueError, match=r"^num_bytes: `n` leaves -") as caught:
        budgets.num_bytes(500).counts(STORED)
    more = int(re.search(r"Raise `n` by (\d+)", str(caught.value))[1])
    counts = budgets.num_bytes(500 + more).counts(STORED)
    assert min(counts["v"], counts["w"]) >= 1


@pytest.mark.parametrize("bad", ["float32", 8, object()])
def test_num_bytes_refuses_other_dtypes(bad):
    with refuses("num_bytes", "dtype", "", "'float16' or 'bfloat16' or 'int8' or None"):
        budgets.num_bytes(5000, dtype=bad)


# --- the work of a model --------------------------------------------------------------
def costs_of(fn, shapes, *args):
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    return budgets.flops_per_weight(fn, params, *args)


def convolve(x, w, groups=1, stride=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", None, None, numbers, groups
    )


IMAGE = jnp.zeros((1, 8, 6, 4))
ROW = jnp.zeros((1, 4))
SQUARE = {"w": (4, 4)}


@pytest.mark.parametrize(
    ("fn", "shapes", "x", "costs"),
    [
        (
            lambda p, x: x @ p["w"] + p["b"][None],
            SQUARE | {"b": (4,)},
            ROW,
            {"w": 2, "b": 0},
        ),
        # One weight of a convolution works at every place of the output.
        (lambda p, x: convolve(x, p["w"]), {"w": (3, 3, 4, 5)}, IMAGE, {"w": 96}),
        (lambda p, x: convolve(x, p["w"], 4), {"w": (3, 3, 1, 8)}, IMAGE, {"w": 96}),
        (lambda p, x: convolve(x, p["w"], 1, 2), {"w": (3, 3, 4, 5)}, IMAGE, {"w": 24}),
        # Transposed, reshaped, cast, scaled, masked, merged.
        (lambda p, x: x @ p["w"].T, {"w": (5, 4)}, ROW, {"w": 2}),
        (lambda p, x: x @ p["w"].reshape(4, 6), {"w": (2, 2, 6)}, ROW, {"w": 2}),
        (lambda p, x: x @ p["w"].astype("bfloat16"), SQUARE, ROW, {"w": 2}),
        (lambda p, x: x @ (p["w"] * jnp.eye(4)), SQUARE, ROW, {"w": 2}),
        (
            lambda p, x: x @ (p["g"][None] * p["w"] / jnp.linalg.norm(p["w"])),
            SQUARE | {"g": (4,)},
            ROW,
            {"w": 2, "g": 0},
        ),
        (
            lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
            SQUARE | {"a": (4, 1), "b": (1, 4)},
            ROW,
            {"w": 2, "a": 8, "b": 8},
        ),
        (
            lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
            SQUARE | {"v": (4, 2)},
            ROW,
            {"w": 2, "v": 2},
        ),
        # Used twice, in a scan over layers, in a loop, in a branch, under vmap.
        (lambda p, x: x @ p["w"] @ p["w"], SQUARE, ROW, {"w": 4}),
        (
            lambda p, x: jax.lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0],
            {"w": (3, 4, 4)},
            ROW,
            {"w": 2},
        ),
        (
            lambda p, x: jax.lax.fori_loop(0, 5, lambda i, c: c @ p["w"][i % 3], x),
            {"w": (3, 4, 4)},
            ROW,
            {"w": 2 * 5 / 3},
        ),
        (
            lambda p, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x),
            SQUARE,
            ROW,
            {"w": 2},
        ),
        (
            lambda p, x: jax.vmap(lambda r: r @ p["w"])(x),
            SQUARE,
            jnp.zeros((7, 4)),
            {"w": 14},
        ),
        (
            jax.jit(lambda p, x: jax.checkpoint(lambda r: r @ p["w"])(x)),
            SQUARE,
            ROW,
            {"w": 2},
        ),
        # Looked up, compared with each other, or not used at all.
        (lambda p, x: p["w"][x.astype(int)], SQUARE, ROW, {"w": 0}),
        (lambda p, x: jnp.tanh(x) @ x.T + 0 * p["w"][0, 0], SQUARE, ROW, {"w": 0}),
    ],
)
def test_the_work_of_a_weight(fn, shapes, x, costs):
    assert costs_of(fn, shapes, x) == pytest.approx(costs)
    abstract_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert costs_of(fn, shapes, abstract_x) == pytest.approx(costs)


def test_the_work_of_lenet_5_by_hand():
    """24 x 24 and 8 x 8 places, 5 x 5 kernels: the numbers of the paper."""

    def model(p, x):
        for name in ("c1", "c2"):
            x = jax.lax.conv_general_dilated(
                x, p[name], (1, 1), "VALID", None, None, ("NHWC", "HWIO", "NHWC")
            )
            x = jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
            )
        return jax.nn.relu(x.reshape(1, -1) @ p["f1"]) @ p["f2"]

    shapes = {
        "c1": (5, 5, 1, 20),
        "c2": (5, 5, 20, 50),
        "f1": (800, 500),
        "f2": (500, 10),
    }
    costs = costs_of(model, shapes, jnp.zeros((1, 28, 28, 1)))
    assert costs == {"c1": 2 * 24 * 24, "c2": 2 * 8 * 8, "f1": 2, "f2": 2}
    work = {name: costs[name] * math.prod(shapes[name]) for name in shapes}
    assert sum(work.values()) == 2 * (288_000 + 1_600_000 + 400_000 + 5_000)
    counts = budgets.num_flops(10**6, costs).counts(abstract(shapes))
    spent = sum(counts[name] * costs[name] for name in shapes)
    assert 10**6 - 2 * 24 * 24 < spent <= 10**6


def test_work_that_cannot_be_seen():
    def loop(p, x):
        return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ p["w"], x)

    with refuses("flops_per_weight", "fn", r"\['w'\]", "'while'"):
        costs_of(loop, SQUARE, ROW)
    with refuses("flops_per_weight", "fn", "5", "function"):
        costs_of(5, SQUARE, ROW)


# --- layers of a leaf -----------------------------------------------------------------
@given(
    st.tuples(sides, sides, sides),
    st.integers(0, 2),
    layer,
    st.sampled_from(["uniform", "erdos_renyi", "erdos_renyi_kernel", "linear"]),
    st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 0.9]),
)
def test_a_slice_is_a_layer(shape, axis, other, name, d):
    """A stacked leaf gets what its slices get as leaves of their own."""
    piece = shape[:axis] + shape[axis + 1 :]
    copies = shape[axis]
    apart = abstract([piece] * copies + [other])
    together = abstract([shape, other])
    budget = getattr(budgets, name)(d)
    size = math.prod(shape) + math.prod(other)
    if budgets.count(d, size) <= copies:
        return
    # Also what is a vector by its shape.
    want = budget.counts(apart, where=[True] * len(apart))
    stacked, last = budget.counts(together, where=[True, True], stacked={"0": axis - 3})
    assert stacked.dtype == np.int64
    assert stacked.tolist() == want[:-1]
    assert last == want[-1]


def test_ties_go_to_the_earlier_slice():
    counts = budgets.nonzeros(7).counts(abstract([(3, 2, 2)]), stacked={"0": 0})
    assert counts[0].tolist() == [3, 2, 2]


def test_fixed_density_holds_for_each_slice():
    budget = budgets.nonzeros(20, overrides={"0": 0.5})
    stacked, rest = budget.counts(abstract([(3, 5, 1), (4, 4)]), stacked={"0": 0})
    assert stacked.tolist() == [2, 2, 2]  # floor(2.5) each
    assert rest == 14


# --- trees ----------------------------------------------------------------------------
def test_eight_billion_weights_without_an_array():
    huge = abstract({"a": (80_000, 100_000), "v": (2_000, 7)})
    counts = budgets.uniform(0.1).counts(huge)
    assert counts == {"a": 800_000_000, "v": 1_400}
    assert budgets.total(counts) == 800_001_400
    assert budgets.erdos_renyi(0.3).counts(huge)["v"] == 14_000
    stack = abstract({"a": (10, 80_000, 100_000)})
    slices = budgets.uniform(0.29).counts(stack, stacked={"a": 0})["a"]
    assert slices.tolist() == [2_320_000_000] * 10
    assert budgets.total(slices) == 23_200_000_000


def test_structure_is_kept():
    params = {
        "none": None,
        "hole": HOLE,
        "layers": [{"w": jnp.ones((2, 5))}, (jnp.ones((5, 2)),)],
        "steps": jnp.zeros((3, 3), jnp.int32),
        "empty": {},
    }
    assert budgets.uniform(0.5).counts(params) == {
        "none": None,
        "hole": HOLE,
        "layers": [{"w": 5}, (5,)],
        "steps": HOLE,
        "empty": {},
    }


@pytest.mark.parametrize("empty", [{}, None, [], {"a": HOLE}])
def test_a_tree_without_arrays_has_no_counts(empty):
    """``optax.tree.map_params`` and ``optax.partition`` hand such trees to init."""
    budget = budgets.erdos_renyi(0.1, dense=["w"])
    assert budget.counts(empty) == empty
    assert budgets.num_flops(5, {"w": 2}).counts(empty) == empty
    assert budgets.resolve(0.5, empty) == empty
    assert budgets.pool(0.5, empty).costs is None


def test_a_leaf_without_weights_keeps_none():
    params = abstract({"a": (0, 4), "v": (2, 4)})
    for budget in (budgets.uniform(0.5), budgets.erdos_renyi(0.5), budgets.linear(0.5)):
        assert budget.counts(params) == {"a": 0, "v": 4}


def test_where_chooses():
    params = abstract(LENET)
    counts = budgets.uniform(0.1).counts(
        params, where=lambda name, _: name.startswith("Dense_2")
    )
    assert kernels(counts) == [HOLE, HOLE, 100]
    assert counts["Dense_2"]["bias"] == 1


def test_vectors_are_one_row():
    counts = budgets.erdos_renyi(0.5).counts(
        abstract({"a": (10,), "v": (20, 20)}), where=lambda *_: True
    )
    assert counts == {"a": 10, "v": 195}


def test_linen_and_nnx_agree():
    model = linen.Sequential([linen.Dense(30), linen.Dense(10)])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 20)))
    plain = budgets.uniform(0.1).counts(shapes["params"])
    twin = nnx.eval_shape(
        lambda: nnx.Sequential(
            nnx.Linear(20, 30, rngs=nnx.Rngs(0)), nnx.Linear(30, 10, rngs=nnx.Rngs(0))
        )
    )
    counts = budgets.uniform(0.1).counts(nnx.state(twin, nnx.Param))
    assert jax.tree.leaves(plain) == jax.tree.leaves(counts) == [60, 30]


def test_traced_params_are_enough():
    @jax.jit
    def kept(params):
        return jnp.zeros(budgets.uniform(0.5).counts(params)["w"])

    assert kept({"w": jnp.ones((4, 6))}).shape == (12,)


def test_budgets_pass_through_inject_hyperparams():
    def method(density, rate):
        assert isinstance(density, budgets.Shares)
        return optax.scale(rate)

    tx = optax.inject_hyperparams(method)(density=budgets.erdos_renyi(0.5), rate=2.0)
    state = tx.init({"w": jnp.ones(3)})
    updates, _ = jax.jit(tx.update)({"w": jnp.ones(3)}, state)
    assert updates["w"].tolist() == [2.0, 2.0, 2.0]


def test_budgets_are_values():
    made = [
        budgets.uniform(0.1, overrides={"a": 0.2}, dense=["b"]),
        budgets.erdos_renyi(0.1),
        budgets.erdos_renyi_kernel(0.1),
        budgets.linear(0.1, axes=[0, 1]),
        budgets.nonzeros(1e3),
        budgets.num_bytes(4e6),
        budgets.num_flops(1e6, {"a": 2.5, "b": HOLE}),
    ]
    assert len(set(made)) == len(made)
    assert not any(callable(budget) for budget in made)
    assert made[4] == budgets.nonzeros(1000)
    assert made[6].costs == (("a", Fraction(5, 2)),)


def test_axes_for_kernels_that_lead_with_channels():
    last = {"conv": (3, 3, 8, 16), "head": (30, 40)}
    first = {"conv": (16, 8, 3, 3), "head": (40, 30)}
    for factory in (budgets.erdos_renyi, budgets.linear):
        want = factory(0.2).counts(abstract(last))
        assert factory(0.2, axes=(0, 1)).counts(abstract(first)) == want
        assert factory(0.2).counts(abstract(first)) != want
    kernel = budgets.erdos_renyi_kernel(0.2)
    assert kernel.counts(abstract(first)) == kernel.counts(abstract(last))


def test_costs_as_a_tree_or_by_name():
    params = abstract(LENET)
    tree = jax.tree.map(lambda _: 2, params)
    by_name = {f"Dense_{i}/kernel": 2 for i in range(3)}
    got = budgets.num_flops(5324, tree).counts(params)
    assert kernels(got) == [2352, 300, 10]
    assert budgets.num_flops(5324, by_name).counts(params) == got
    assert budgets.num_flops(5325, by_name).counts(params) == got


def test_weights_that_cost_nothing_follow_the_common_density():
    counts = budgets.num_flops(10, {"a": 2, "v": 0}).counts(
        abstract({"a": (2, 5), "v": (1, 31)})
    )
    assert counts == {"a": 5, "v": 16}  # 15.5, and the half costs nothing


# --- errors ---------------------------------------------------------------------------
PARAMS = abstract({"a": (10, 10), "b": (3,), "c": (5, 4)})
COSTS = {"a": 2, "c": 3}


@pytest.mark.parametrize("bad", [0, 0.0, -1, 1.01, 20, math.nan, True, None, "x", [1]])
@pytest.mark.parametrize(
    "name", ["uniform", "erdos_renyi", "erdos_renyi_kernel", "linear"]
)
def test_densities_out_of_range(name, bad):
    with pytest.raises(ValueError, match=rf"^{name}: `density` must .*\(0, 1\]"):
        getattr(budgets, name)(bad)
    with pytest.raises(ValueError, match=rf"^{name}: `overrides\['a'\]` must"):
        getattr(budgets, name)(0.5, overrides={"a": bad})


@pytest.mark.parametrize("bad", [0, -5, 2.5, math.nan, math.inf, None, True])
@pytest.mark.parametrize("name", ["nonzeros", "num_bytes"])
def test_numbers_out_of_range(name, bad):
    with pytest.raises(ValueError, match=f"^{name}: `n` must be a whole number"):
        getattr(budgets, name)(bad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: budgets.num_flops(0, COSTS), "`n` must be a finite number above 0"),
        (lambda: budgets.num_flops(math.inf, COSTS), "`n` must be a finite number"),
        (lambda: budgets.num_flops(5, {"a": -1}), "`costs` must be .* got -1 for 'a'"),
        (lambda: budgets.num_flops(5, {"a": "x"}), "`costs` must be finite numbers"),
        (
            lambda: budgets.num_flops(900, {"a": 1}).counts(PARAMS),
            r"`costs` lacks \['c'\]; it must give .*\['a', 'c'\]",
        ),
        (
            lambda: budgets.num_flops(900, COSTS | {"z": 1}).counts(PARAMS),
            r"`costs` names \['z'\]",
        ),
        (
            lambda: budgets.num_flops(4, COSTS).counts(PARAMS),
            "`n` leaves 4 for the weights and must leave at least 5.*Raise `n` by 1",
        ),
        (
            lambda: budgets.nonzeros(1).counts(PARAMS),
            "n=1 keeps 1 of 120 weights, fewer than 2.*Keep 2 or more",
        ),
        (
            lambda: budgets.nonzeros(121).counts(PARAMS),
            "n=121 keeps 121 of 120 weights, but there are only 120. Keep 120 or fewer",
        ),
        (
            lambda: budgets.uniform(0.01).counts(PARAMS),
            r"^uniform: density=0.01 keeps 1 of 120 .*a density of 2/120",
        ),
        (
            lambda: budgets.uniform(0.5, dense=["a"]).counts(PARAMS),
            "density=0.5 keeps 60 of 120 weights, fewer than 101",
        ),
        (
            lambda: budgets.uniform(0.9, overrides={"a": 0.5}).counts(PARAMS),
            "keeps 108 .*`overrides` leave room for 70.*raise the overrides",
        ),
        (
            lambda: budgets.linear(0.5, dense=["z"]).counts(PARAMS),
            r"`overrides` or `dense` names \['z'\].*some of \['a', 'c'\]",
        ),
        (
            lambda: budgets.linear(0.5, overrides={"b": 0.5}).counts(PARAMS),
            r"^linear: `overrides` or `dense` names \['b'\]",
        ),
        (
            lambda: budgets.linear(0.5, overrides={"a": 0.5}, dense=["a"]),
            r"\['a'\] stand in `overrides` and in `dense`",
        ),
        (lambda: budgets.linear(0.5, axes=(1, 1)), "`axes` must be two different"),
        (lambda: budgets.erdos_renyi(0.5, axes=(1,)), "`axes` must be two different"),
        (
            lambda: budgets.erdos_renyi(0.5, axes=(-3, 1)).counts(PARAMS),
            r"`axes`=\(-3, 1\) does not fit 'a', a layer of shape \(10, 10\)",
        ),
        (
            lambda: budgets.uniform(0.5).counts(PARAMS, stacked={"z": 0}),
            r"^uniform: `stacked` names \['z'\]",
        ),
        (
            lambda: budgets.uniform(0.5).counts(PARAMS, where=lambda *_: False),
            r"^uniform: no leaf of \['a', 'b', 'c'\] takes part; at least one must",
        ),
        (
            lambda: budgets.Shares("uniform", 2.0).counts(PARAMS),
            r"^uniform: `density` must be a number in \(0, 1\]",
        ),
    ],
)
def test_messages(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@boundary("test")
def pool_size(density, params):
    return size_of_pool(density, layers_of(params), params)


# --- resolve --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "density",
    [
        0.25,
        Fraction(1, 4),
        np.float32(0.25),
        np.asarray(0.25),
        jnp.float32(0.25),
        budgets.uniform(0.25),
        budgets.nonzeros(30),
        {"a": 25, "b": HOLE, "c": 5},
        {"a": np.int32(25), "b": HOLE, "c": np.asarray(5)},
    ],
)
def test_resolve(density):
    counts = budgets.resolve(density, PARAMS)
    assert counts == {"a": 25, "b": HOLE, "c": 5}
    assert type(counts["a"]) is int


def test_resolve_takes_its_own_counts():
    params = abstract({"a": (2, 5, 5), "b": (3,), "c": (5, 4)})
    for budget in (budgets.erdos_renyi(0.33), budgets.linear(0.5)):
        counts = budget.counts(params, stacked={"a": 0})
        again = budgets.resolve(counts, params, stacked={"a": 0})
        assert again["a"].tolist() == counts["a"].tolist()
        assert again["c"] == counts["c"]
    listed = budgets.resolve({"a": [1, 2], "b": HOLE, "c": 3}, params, stacked={"a": 0})
    assert listed["a"].tolist() == [1, 2]
    assert budgets.resolve(5, jax.ShapeDtypeStruct((3, 3), jnp.float32)) == 5


def test_resolve_takes_a_budget_of_the_users_own():
    class Ones:
        def counts(self, params, *, where=None, stacked=None):
            return jax.tree.map(lambda x: x.shape[0], params)

    assert budgets.resolve(Ones(), PARAMS) == {"a": 10, "b": HOLE, "c": 5}
    assert pool_size(Ones(), abstract({"a": (4, 4), "c": (5, 4)})) == 9


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (0.0, r"^resolve: `density` must be a number in \(0, 1\]; got 0.0"),
        (1.5, r"^resolve: `density` must be a number in \(0, 1\]; got 1.5"),
        (1, "must be a float .* got 1. Write 1.0 to keep every weight"),
        (True, "must be a float"),
        ("0.5", "must be a float"),
        (None, "must be a float"),
        (lambda step: 0.5, "must be a float"),
        (budgets.uniform, "must be a float"),
        (budgets.Shares, "must be a float"),
        ({"a": 25}, "must be a float"),
        ({"a": 25, "b": 1, "c": 5}, "has 1 for 'b', which does not take part"),
        ({"a": HOLE, "b": HOLE, "c": 5}, r"'a' must be an integer in \[1, 100\]"),
        ({"a": 0, "b": HOLE, "c": 5}, r"'a' must be an integer in \[1, 100\]; got 0"),
        ({"a": 25, "b": HOLE, "c": 21}, r"'c' must be an integer in \[1, 20\]; got 21"),
        ({"a": 2.5, "b": HOLE, "c": 5}, "'a' must be an integer .* got 2.5"),
        ({"a": True, "b": HOLE, "c": 5}, "'a' must be an integer"),
        ({"a": [1, [2]], "b": HOLE, "c": 5}, "'a' must be an integer"),
    ],
)
def test_resolve_refuses(density, message):
    with pytest.raises(ValueError, match=message):
        budgets.resolve(density, PARAMS)


def test_resolve_refuses_counts_of_another_number_of_slices():
    params = abstract({"a": (2, 5, 5)})
    for bad in (5, np.array([1, 2, 3]), np.array([0, 1]), np.array([1.0, 2.0])):
        with pytest.raises(ValueError, match=r"'a' must be 2 integers in \[1, 25\]"):
            budgets.resolve({"a": bad}, params, stacked={"a": 0})


def test_resolve_refuses_traced_values():
    with pytest.raises(ValueError, match=r"^resolve: `density` is a traced"):
        jax.jit(lambda d: budgets.resolve(d, PARAMS))(0.5)


# --- pools ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("density", "size"),
    [
        (0.25, 30),
        (1.0, 120),
        (0.01, 1),  # one pool owes no layer a weight
        (budgets.uniform(0.25), 30),
        (budgets.erdos_renyi(0.29), 34),
        (budgets.linear(0.25), 30),
        (budgets.nonzeros(1), 1),
        (budgets.nonzeros(120), 120),
        (budgets.num_bytes(10**9), 120),
        (budgets.num_flops(61, {"a": 2, "c": 2}), 30),
        (budgets.num_flops(0.7, {"a": 0.1, "c": 0.1}), 7),
        (budgets.num_flops(5, {"a": 0, "c": 0}), 120),
        ({"a": 25, "b": HOLE, "c": 7}, 32),
    ],
)
def test_pool_of_weights(density, size):
    assert budgets.pool(density, PARAMS) == (size, None)
    assert pool_size(density, PARAMS) == size


def test_pool_of_costs():
    pool = budgets.pool(budgets.num_flops(50, COSTS), PARAMS)
    assert pool == (50, {"a": 2, "b": HOLE, "c": 3})
    assert budgets.pool(budgets.num_flops(10**9, COSTS), PARAMS).budget == 260
    halves = budgets.pool(budgets.num_flops(50.5, {"a": 2.5, "c": 3}), PARAMS)
    assert halves == (Fraction(101, 2), {"a": Fraction(5, 2), "b": HOLE, "c": 3})
    mixed = PARAMS | {"c": jax.ShapeDtypeStruct((5, 4), jnp.bfloat16)}
    pool = budgets.pool(budgets.num_bytes(430), mixed)  # in bits
    assert pool.costs["a"] - pool.costs["c"] == 16
    assert pool.costs["c"] >= 16


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (0.001, "pays for less than one of 120 weights"),
        (budgets.num_bytes(18), "pays for less than one of 120 weights"),
        (budgets.num_flops(1, COSTS), "pays for less than one of 120 weights"),
        (budgets.nonzeros(121), r"n=121 exceeds the 120 .*in \[1, 120\]"),
        (budgets.uniform(0.5, dense=["a"]), "fixes the counts of leaves"),
        (budgets.uniform(0.5, overrides={"a": 0.5}), "fixes the counts of leaves"),
        (0.0, r"`density` must be a number in \(0, 1\]"),
        (3, "Write 1.0 to keep every weight"),
        (budgets.num_flops(50, COSTS), "weights differ in cost.*nonzeros"),
    ],
)
def test_pool_refuses(density, message):
    with pytest.raises(ValueError, match=f"^test: .*{message}"):
        pool_size(density, PARAMS)


# --- densities near other fractions ---------------------------------------------------
@pytest.mark.parametrize(
    ("density", "n", "kept"),
    [
        (0.29, 100, 29),
        (1 / 3, 3, 1),
        (1 / 60, 60, 1),
        (0.7 * 0.05, 200, 7),
        (1e-10, 10**10, 1),
        (math.nextafter(1.0, 0.0), 10**16, 10**16),
        (np.float32(0.29), 100, 29),
        (1.0, 10**12, 10**12),
    ],
)
def test_a_density_is_a_fraction_only_where_it_is_one(density, n, kept):
    """Within two units in the last place; else the float itself counts."""
    assert budgets.count(density, n) == kept


@pytest.mark.parametrize("gap", [5e-10, 1e-10, 1e-12])
def test_a_density_near_one_is_not_one(gap):
    density, n = 1 - gap, 10**13
    exact = math.floor(Fraction(density) * n)
    assert budgets.count(density, n) == exact
    assert n - exact == pytest.approx(gap * n, rel=0.2)


def test_a_ramp_ends_at_the_density_near_one():
    """A schedule in float32 cannot tell it from 1, the count can."""
    density = 1 - 1e-7
    tx = sparse_optax.gradual_magnitude(
        optax.sgd(0.1), density=density, update_period=1, update_stop=3
    )
    params = {"w": jnp.ones((40, 50))}
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    kept = sparse_optax.masks.count(sparse_optax.get_masks(state))
    assert kept == budgets.count(density, 2000) == 1999


def test_counts_by_name_beside_another_group():
    """`optax.partition` puts a hole in place of a branch of another group."""
    params = {"a": {"w": jnp.ones((4, 5))}, "b": {"w": jnp.ones((3, 4))}}
    counts = budgets.uniform(0.5).counts(nnx.State(jax.tree.map(nnx.Param, params)))
    assert budgets.resolve(counts, params) == {"a": {"w": 10}, "b": {"w": 6}}
    for hole in (HOLE, {"w": HOLE}):
        group = params | {"b": hole}
        assert budgets.resolve(counts, group) == {"a": {"w": 10}, "b": hole}
    for other in ({"a": {"w": 10}}, {"a": {"w": 10}, "c": {"w": 6}}):
        with pytest.raises(ValueError, match="structure of params"):
            budgets.resolve(nnx.State(jax.tree.map(nnx.Param, other)), params)
