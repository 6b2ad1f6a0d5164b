"""Masks from one look at a network: SNIP, SynFlow, Fisher, Optimal Brain Damage, L-OBS.

The oracles are in float64 and take derivatives by finite differences or by hand.
"""

import functools
import itertools
from fractions import Fraction

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from helpers import refuses

import sparse_optax
from sparse_optax import budgets, masks
from sparse_optax.masks import make
from sparse_optax.scoring import rounds as rounds_of

RNG = np.random.default_rng(7)
WEIGHTS = {
    "fc1": {"bias": RNG.normal(size=5), "kernel": RNG.normal(size=(4, 5))},
    "fc2": {"bias": RNG.normal(size=3), "kernel": RNG.normal(size=(5, 3))},
}
X, Y = RNG.normal(size=(12, 4)), RNG.integers(0, 3, 12)
KERNELS = ("fc1", "fc2")


def f32(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


PARAMS = f32(WEIGHTS)
BATCHES = [(jnp.float32(X[:6]), jnp.asarray(Y[:6])), (jnp.float32(X[6:]), Y[6:])]


# --- the network, twice ---------------------------------------------------------------


def forward(params, x):
    hidden = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
    return hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]


def loss(params, batch):
    x, y = batch
    z = forward(params, x)
    return optax.losses.softmax_cross_entropy_with_integer_labels(z, y).mean()


def example_loss(params, example):
    x, y = example
    return loss(params, (x[None], y[None]))


def np_forward(weights, x):
    hidden = np.tanh(x @ weights["fc1"]["kernel"] + weights["fc1"]["bias"])
    return hidden @ weights["fc2"]["kernel"] + weights["fc2"]["bias"]


def np_softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def np_loss(weights, x, y):
    p = np_softmax(np_forward(weights, x))
    return -np.log(p[np.arange(len(y)), y]).mean()


def finite_differences(function, name):
    """Derivatives of ``function(weights)`` by each weight of a kernel, first axes."""
    kernel = WEIGHTS[name]["kernel"]
    out = {}
    for place in np.ndindex(*kernel.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = kernel.copy()
            moved[place] += step
            changed = WEIGHTS | {name: WEIGHTS[name] | {"kernel": moved}}
            sides.append(np.asarray(function(changed)))
        out[place] = (sides[0] - sides[1]) / 2e-6
    some = next(iter(out.values()))
    result = np.zeros(kernel.shape + some.shape)
    for place, value in out.items():
        result[place] = value
    return result


def np_snip():
    """|w g|, g the mean gradient over the batches."""
    scores = []
    for name in KERNELS:
        g = [
            finite_differences(lambda w, s=s: np_loss(w, X[s], Y[s]), name)
            for s in (slice(0, 6), slice(6, 12))
        ]
        scores.append(np.abs(WEIGHTS[name]["kernel"] * np.mean(g, axis=0)))
    return scores


def np_fisher():
    """0.5 w^2 mean_n g_n^2, gradients by hand: backpropagation for each example."""
    squares = [np.zeros((4, 5)), np.zeros((5, 3))]
    for x, y in zip(X, Y, strict=True):
        hidden = np.tanh(x @ WEIGHTS["fc1"]["kernel"] + WEIGHTS["fc1"]["bias"])
        dz = np_softmax(np_forward(WEIGHTS, x)) - np.eye(3)[y]
        dh = (WEIGHTS["fc2"]["kernel"] @ dz) * (1 - hidden**2)
        squares[0] += np.outer(x, dh) ** 2
        squares[1] += np.outer(hidden, dz) ** 2
    return [
        0.5 * WEIGHTS[name]["kernel"] ** 2 * s / 12
        for name, s in zip(KERNELS, squares, strict=True)
    ]


def np_damage(hessian):
    """0.5 w^2 diag(mean_n J^T H J), the matrix written out; hessian(z) of one z."""
    scores = []
    for name in KERNELS:
        kernel = WEIGHTS[name]["kernel"]
        jacobian = finite_differences(lambda w: np_forward(w, X), name)
        jacobian = jacobian.reshape(kernel.size, len(X), 3)
        matrix = np.mean(
            [
                jacobian[:, n] @ hessian(np_forward(WEIGHTS, x)) @ jacobian[:, n].T
                for n, x in enumerate(X)
            ],
            axis=0,
        )
        diagonal = np.diag(matrix).reshape(kernel.shape)
        scores.append(0.5 * diagonal * kernel**2)
    return scores


def softmax_hessian(z):
    p = np_softmax(z)
    return np.diag(p) - np.outer(p, p)


COUPLING = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.7], [0.0, -0.7, 3.0]])


def coupled(z, target):
    """A quadratic criterion whose Hessian is full, for one example."""
    error = z - jax.nn.one_hot(target, 3)
    return 0.5 * error @ jnp.float32(COUPLING) @ error


def np_synflow(u, v, counts, bias=None, lost=-1):
    """Two linear layers: R = 1 |u| |v| 1, scores by hand, one cut for each count."""
    kept = [np.ones(u.shape, bool), np.ones(v.shape, bool)]
    bias = np.zeros(u.shape[1]) if bias is None else np.abs(bias)
    for k in counts:
        a, b = np.abs(u) * kept[0], np.abs(v) * kept[1]
        into, out_of = a.sum(0) + bias, b.sum(1)
        scores = [a * out_of, into[:, None] * b]
        scores = [np.where(m, s, lost) for m, s in zip(kept, scores, strict=True)]
        kept = oracles.top_k(scores, k)
    return kept


def geometric(n, k, rounds):
    """The largest c of each round r with (c / n)^rounds <= (k / n)^r, by counting."""
    return [
        max(c for c in range(n + 1) if c**rounds * n**r <= k**r * n**rounds)
        for r in range(1, rounds + 1)
    ]


# --- what each finds ------------------------------------------------------------------

FIND = {
    "snip": lambda p, d, **kw: sparse_optax.snip_masks(loss, p, BATCHES, d, **kw),
    "fisher": lambda p, d, **kw: sparse_optax.fisher_masks(
        example_loss, p, BATCHES, d, **kw
    ),
    "damage": lambda p, d, **kw: sparse_optax.optimal_brain_damage_masks(
        forward, p, BATCHES, d, **kw
    ),
    "damage_coupled": lambda p, d, **kw: sparse_optax.optimal_brain_damage_masks(
        forward, p, BATCHES, d, criterion=coupled, **kw
    ),
    "synflow": lambda p, d, **kw: sparse_optax.synflow_masks(
        forward, p, (1, 4), d, **({"rounds": 3} | kw)
    ),
}
SCORES = {
    "snip": np_snip,
    "fisher": np_fisher,
    "damage": lambda: np_damage(softmax_hessian),
    "damage_coupled": lambda: np_damage(lambda z: COUPLING),
}
every = pytest.mark.parametrize("method", ["snip", "fisher", "damage", "synflow"])


def found(tree):
    return [np.asarray(tree[name]["kernel"]) for name in KERNELS]


@pytest.mark.parametrize("method", SCORES)
def test_the_largest_scores_of_the_definition_are_kept(method):
    scores = SCORES[method]()
    for k in (4, 17, 26):
        got = found(FIND[method](PARAMS, budgets.nonzeros(k)))
        for a, b in zip(got, oracles.top_k(scores, k), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("method", ["snip", "fisher", "damage"])
def test_each_layer_alone(method):
    got = found(FIND[method](PARAMS, 0.4, scope="leaf"))
    for a, s in zip(got, SCORES[method](), strict=True):
        np.testing.assert_array_equal(a, oracles.top_k([s], s.size * 2 // 5)[0])


def test_damage_with_the_cross_entropy_spelled_out():
    """Eigenvectors of the automatic Hessian and the known factors agree."""

    def criterion(z, y):
        return optax.losses.softmax_cross_entropy_with_integer_labels(z, y)

    args = forward, PARAMS, BATCHES, 0.37
    one = sparse_optax.optimal_brain_damage_masks(*args)
    two = sparse_optax.optimal_brain_damage_masks(*args, criterion=criterion)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_fisher_weighs_examples_not_batches():
    uneven = [(jnp.float32(X[:1]), Y[:1]), (jnp.float32(X[1:]), Y[1:])]
    one = sparse_optax.fisher_masks(example_loss, PARAMS, uneven, 0.3)
    jax.tree.map(np.testing.assert_array_equal, one, usual("fisher"))


def test_fisher_differs_from_the_square_of_the_mean():
    """Else an implementation that averages first would pass all tests."""
    fisher, snip = np_fisher(), np_snip()
    squared = [0.5 * s**2 for s in snip]
    assert any(
        (a != b).any()
        for a, b in zip(
            oracles.top_k(fisher, 11), oracles.top_k(squared, 11), strict=True
        )
    )


# --- SynFlow --------------------------------------------------------------------------

U, V = RNG.normal(size=(6, 8)), RNG.normal(size=(8, 5))
LINEAR = f32({"u": U, "v": V})


def linear(params, x):
    x = x @ params["u"]
    if "bias" in params:
        x = x + params["bias"][None]
    return jax.nn.relu(x) @ params["v"]


def test_counts_of_rounds_are_exact():
    """A quotient of floats to a power would give 255 in the second round."""
    assert geometric(1024, 1, 10) == [2**n for n in range(9, -1, -1)]
    wanted = make.ranking({"w": jnp.zeros((32, 32))}, 1 / 1024)
    for r, right in enumerate(geometric(1024, 1, 10), 1):
        assert rounds_of.on_the_way(wanted, Fraction(r, 10)).limit == right


@pytest.mark.parametrize("rounds", [1, 2, 7])
@pytest.mark.parametrize("biased", [False, True])
def test_synflow_round_by_round(rounds, biased):
    bias = np.linspace(-3, 3, 8)
    params = LINEAR | ({"bias": jnp.float32(bias)} if biased else {})
    for density in (0.1, 0.3, 0.75):
        k = budgets.count(density, 88)
        got = sparse_optax.synflow_masks(linear, params, (1, 6), density, rounds=rounds)
        want = np_synflow(U, V, geometric(88, k, rounds), bias if biased else None)
        np.testing.assert_array_equal(got["u"], want[0])
        np.testing.assert_array_equal(got["v"], want[1])
        assert masks.count(got) == k


def test_synflow_keeps_a_path_where_one_round_loses_a_layer():
    """A wide layer in front of a narrow one: little flows through one weight of it."""
    rng = np.random.default_rng(3)
    params = f32({"u": rng.normal(size=(40, 40)), "v": rng.normal(size=(40, 1))})
    once, often = (
        sparse_optax.synflow_masks(linear, params, (1, 40), 0.02, rounds=r)
        for r in (1, 100)
    )
    assert masks.count(once) == masks.count(often) == 32
    assert int(once["u"].sum()) == 0
    flow = sparse_optax.sparsify(jax.tree.map(jnp.abs, params), often)
    assert float(linear(flow, jnp.ones((1, 40))).sum()) > 0


def test_synflow_never_brings_a_weight_back():
    """A weight that is cut off scores zero later, as one pruned before it does."""
    rng = np.random.default_rng(7)
    u, v = rng.normal(size=(3, 4)), rng.normal(size=(4, 2))
    got = sparse_optax.synflow_masks(
        linear, f32({"u": u, "v": v}), (1, 3), budgets.nonzeros(6), rounds=3
    )
    want = np_synflow(u, v, geometric(20, 6, 3))
    back = np_synflow(u, v, geometric(20, 6, 3), lost=0)
    assert (want[0] != back[0]).any() or (want[1] != back[1]).any()
    np.testing.assert_array_equal(got["u"], want[0])
    np.testing.assert_array_equal(got["v"], want[1])


def test_synflow_of_each_layer_alone():
    got = sparse_optax.synflow_masks(
        linear, LINEAR, (1, 6), 0.25, rounds=5, scope="leaf"
    )
    assert (int(got["u"].sum()), int(got["v"].sum())) == (12, 10)
    kept = [np.ones(U.shape, bool), np.ones(V.shape, bool)]
    for counts in zip(geometric(48, 12, 5), geometric(40, 10, 5), strict=True):
        a, b = np.abs(U) * kept[0], np.abs(V) * kept[1]
        scores = [a * b.sum(1), a.sum(0)[:, None] * b]
        scores = [np.where(m, s, -1) for m, s in zip(kept, scores, strict=True)]
        kept = [oracles.top_k([s], k)[0] for s, k in zip(scores, counts, strict=True)]
    np.testing.assert_array_equal(got["u"], kept[0])
    np.testing.assert_array_equal(got["v"], kept[1])


@pytest.mark.parametrize("price", [1, 2.5e-9])
def test_synflow_within_a_budget_of_costs(price):
    costs = {"u": 3 * price, "v": price}
    budget = 60 * price
    got = sparse_optax.synflow_masks(
        linear, LINEAR, (1, 6), budgets.num_flops(budget, costs), rounds=4
    )
    spent = sum(int(got[n].sum()) * costs[n] for n in "uv")
    assert 0.9 * budget < spent <= budget * (1 + 1e-6)


def test_synflow_takes_shapes_and_sees_ones():
    like = jax.ShapeDtypeStruct((2, 6), jnp.float32)
    for inputs in (like, jnp.full((2, 6), jnp.nan), np.zeros((2, 6), np.float32)):
        got = sparse_optax.synflow_masks(linear, LINEAR, inputs, 0.2, rounds=2)
        same = sparse_optax.synflow_masks(linear, LINEAR, (1, 6), 0.2, rounds=2)
        jax.tree.map(np.testing.assert_array_equal, got, same)


def test_synflow_past_the_range_of_float32():
    huge = jax.tree.map(lambda w: w * 1e20, LINEAR)
    with refuses("synflow_masks", "R", "inf", "finite"):
        sparse_optax.synflow_masks(linear, huge, (1, 6), 0.2)
    tiny = jax.tree.map(lambda w: w * 1e-30, LINEAR)
    with refuses("synflow_masks", "R", "zero", "above zero"):
        sparse_optax.synflow_masks(linear, tiny, (1, 6), 0.2)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64) * 1e20, LINEAR)
        got = sparse_optax.synflow_masks(linear, wide, (1, 6), 0.2, rounds=2)
    same = sparse_optax.synflow_masks(linear, LINEAR, (1, 6), 0.2, rounds=2)
    jax.tree.map(np.testing.assert_array_equal, got, same)


def test_synflow_of_halves_that_would_overflow():
    """65504 is passed at once; the flow is computed in float32."""
    half = jax.tree.map(lambda w: (w * 300).astype(jnp.float16), LINEAR)
    got = sparse_optax.synflow_masks(linear, half, (1, 6), 0.2, rounds=2)
    same = sparse_optax.synflow_masks(linear, LINEAR, (1, 6), 0.2, rounds=2)
    assert (np.asarray(got["u"]) == np.asarray(same["u"])).mean() > 0.9


# --- what all share -------------------------------------------------------------------


@functools.cache
def usual(method):
    """The masks of the network above at density 0.3."""
    return FIND[method](PARAMS, 0.3)


@every
@pytest.mark.parametrize(
    ("dtype", "density", "count"),
    [(jnp.float32, budgets.nonzeros(1), 1), (jnp.bfloat16, 0.98, 34)],
)
def test_counts_are_exact_and_biases_stay_dense(method, dtype, density, count):
    got = FIND[method](f32(WEIGHTS, dtype), density)
    assert masks.count(got) == count
    assert all(m.dtype == bool for m in jax.tree.leaves(got))
    for name in KERNELS:
        assert isinstance(got[name]["bias"], optax.MaskedNode)


@every
def test_all_weights(method):
    assert all(m.all() for m in found(FIND[method](PARAMS, 1.0)))


@every
def test_none_and_integer_leaves(method):
    odd = PARAMS | {"none": None, "step": jnp.int32(3)}
    got = FIND[method](odd, 0.3)
    assert got["none"] is None
    assert isinstance(got["step"], optax.MaskedNode)
    for a, b in zip(found(got), found(usual(method)), strict=True):
        np.testing.assert_array_equal(a, b)


@every
def test_states_of_nnx(method):
    class Net(nnx.Module):
        def __init__(self):
            self.fc1 = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
            self.fc2 = nnx.Linear(5, 3, rngs=nnx.Rngs(1))

    state = nnx.state(Net(), nnx.Param)
    nnx.replace_by_pure_dict(state, PARAMS)
    got = FIND[method](state, 0.3)
    assert type(got) is type(state)
    sparse = sparse_optax.sparsify(PARAMS, got)
    for a, b in zip(found(sparse), found(usual(method)), strict=True):
        np.testing.assert_array_equal(a != 0, b)


@every
def test_within_jit(method):
    jitted = jax.jit(lambda p: FIND[method](p, 0.3))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, jitted, usual(method))


@every
def test_a_choice_of_leaves_and_one_without_any(method):
    got = FIND[method](PARAMS, 0.5, where=lambda name, leaf: name == "fc2/kernel")
    assert masks.count(got) == 7
    assert isinstance(got["fc1"]["kernel"], optax.MaskedNode)
    with pytest.raises(ValueError, match=r"no leaf of .* takes part"):
        FIND[method](PARAMS, 0.5, where=lambda name, leaf: False)


@every
def test_stacked_layers_have_counts_of_their_own(method):
    got = FIND[method](PARAMS, 0.4, scope="leaf", stacked={"fc1/kernel": 1})
    np.testing.assert_array_equal(got["fc1"]["kernel"].sum(0), [2, 2, 2, 1, 1])


@every
@pytest.mark.parametrize(
    ("density", "options", "argument", "value"),
    [
        (0.0, {}, "density", "0.0"),
        (1.5, {}, "density", "1.5"),
        (3, {}, "density", "3"),
        (0.5, {"scope": "layer"}, "scope", "layer"),
        (0.5, {"stacked": {"fc9": 0}}, "stacked", "fc9"),
    ],
)
def test_wrong_input(method, density, options, argument, value):
    name = {"snip": "snip", "fisher": "fisher", "synflow": "synflow"}.get(
        method, "optimal_brain_damage"
    )
    with refuses(f"{name}_masks", argument, value):
        FIND[method](PARAMS, density, **options)


def test_snip_counts_examples_and_not_batches():
    """One batch or two of different size: the mean is over all examples."""
    x, y = (jnp.concatenate(parts) for parts in zip(*BATCHES, strict=True))
    whole = sparse_optax.snip_masks(loss, PARAMS, [(x, y)], 0.3)
    uneven = [(x[:1], y[:1]), (x[1:], y[1:])]
    cut = sparse_optax.snip_masks(loss, PARAMS, uneven, 0.3)
    each = [sparse_optax.snip_masks(loss, PARAMS, [batch], 0.3) for batch in uneven]
    same = lambda a, b: all(  # noqa: E731
        jax.tree.leaves(jax.tree.map(lambda m, n: bool((m == n).all()), a, b))
    )
    assert same(whole, cut)
    assert not same(whole, each[0])


ON_DATA = {
    "snip_masks": (sparse_optax.snip_masks, loss),
    "fisher_masks": (sparse_optax.fisher_masks, example_loss),
    "optimal_brain_damage_masks": (sparse_optax.optimal_brain_damage_masks, forward),
}


@pytest.mark.parametrize("name", ON_DATA)
def test_wrong_batches(name):
    find, function = ON_DATA[name]
    for none in ([], ()):
        with refuses(name, "batches", "empty"):
            find(function, PARAMS, none, 0.5)
    inputs = jnp.ones((3, 4))
    for one in (inputs, {"x": inputs}, (inputs, jnp.ones(3, int))):
        with refuses(name, "batches", "one"):
            find(function, PARAMS, one, 0.5)
    if name != "snip_masks":
        with refuses(name, "batch", r"\(2, 4\).*\(3,\)", "same examples"):
            find(function, PARAMS, [(jnp.ones((2, 4)), jnp.ones(3, int))], 0.5)
    empty = BATCHES[0][0][:0], BATCHES[0][1][:0]
    with refuses(name, "batches", "without examples", "at least one"):
        find(function, PARAMS, [*BATCHES, empty], 0.5)
    with refuses(name, "scores", "fc", "finite"):
        broken = PARAMS | {"fc1": PARAMS["fc1"] | {"bias": jnp.full(5, jnp.nan)}}
        find(function, broken, BATCHES, 0.5)


@pytest.mark.parametrize("name", ["snip_masks", "fisher_masks"])
@pytest.mark.parametrize("extra", [lambda v: (v, v), lambda v: v[None]])
def test_a_loss_that_is_no_number(name, extra):
    find, function = ON_DATA[name]
    with refuses(name, "loss", "", "one number"):
        find(lambda p, b: extra(function(p, b)), PARAMS, BATCHES, 0.5)


def test_wrong_input_of_damage_and_synflow():
    damage = "optimal_brain_damage_masks"
    with refuses(damage, "batches", "Tracer", "inputs, targets"):
        sparse_optax.optimal_brain_damage_masks(forward, PARAMS, [jnp.float32(X)], 0.5)
    with refuses(damage, "forward", r"\(1, 3, 1\)", r"\(1, C\)"):
        sparse_optax.optimal_brain_damage_masks(
            lambda p, x: forward(p, x)[..., None], PARAMS, BATCHES, 0.5
        )
    for rounds in (0, 2.0, True):
        with refuses("synflow_masks", "rounds", str(rounds), "at least 1"):
            sparse_optax.synflow_masks(linear, LINEAR, (1, 6), 0.5, rounds=rounds)
    with refuses("synflow_masks", "inputs", "6", "shape"):
        sparse_optax.synflow_masks(linear, LINEAR, 6, 0.5)


def test_score_masks_refuses_other_trees():
    scores = {"w": jnp.ones((2, 3))}
    with refuses("score_masks", "scores", r"\(2, 3\)", r"\(3, 2\)"):
        masks.score_masks(scores, {"w": jnp.ones((3, 2))}, 0.5)
    with refuses("score_masks", "scores", "'w'", "'v'"):
        masks.score_masks(scores, {"v": jnp.ones((2, 3))}, 0.5)
    with refuses("score_masks", "scores", "'w'", "'w', 'x'"):
        masks.score_masks(scores, scores | {"x": jnp.ones((2, 3))}, 0.5)


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_score_masks_of_ties_and_nan(scope):
    rng = np.random.default_rng(5)
    values = [rng.integers(0, 3, (7, 5)).astype(float), rng.normal(size=(4, 4))]
    values[1][2, 1] = np.nan
    names = ("v", "w")
    tree = dict(zip(names, map(jnp.float32, values), strict=True))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    got = masks.score_masks(tree, shapes, 0.5, scope=scope)
    want = (
        oracles.top_k(values, 25)
        if scope == "global"
        else [oracles.top_k([v], k)[0] for v, k in zip(values, (17, 8), strict=True)]
    )
    for name, b in zip(names, want, strict=True):
        np.testing.assert_array_equal(got[name], b)


# --- layer-wise optimal brain surgeon -------------------------------------------------

KERNEL = RNG.normal(size=(6, 4))
INPUTS = RNG.normal(size=(50, 6)) @ RNG.normal(size=(6, 6))
DAMPING = 1e-2


def np_hessian(inputs=INPUTS, damping=DAMPING):
    return inputs.T @ inputs / len(inputs) + damping * np.eye(inputs.shape[1])


def np_losses():
    """L_q of each weight."""
    return KERNEL**2 / (2 * np.diag(np.linalg.inv(np_hessian()))[:, None])


def np_mended(mask):
    """The least squares of each column over its survivors, on data and damping rows."""
    rows = np.vstack([INPUTS / np.sqrt(len(INPUTS)), np.sqrt(DAMPING) * np.eye(6)])
    new = np.zeros_like(KERNEL)
    for j in range(KERNEL.shape[1]):
        kept = mask[:, j]
        target = rows @ KERNEL[:, j]
        new[kept, j] = np.linalg.lstsq(rows[:, kept], target, rcond=None)[0]
    return new


def np_error(new):
    change = new - KERNEL
    return 0.5 * np.sum(change * (np_hessian() @ change))


def surgeon(keep, kernel=KERNEL, dtype=jnp.float32):
    mask, new = sparse_optax.layerwise_obs(
        jnp.asarray(kernel, dtype), jnp.asarray(INPUTS, dtype), keep, damping=DAMPING
    )
    return np.asarray(mask), np.asarray(new, np.float64)


@pytest.mark.parametrize("keep", [0, 1, 7, 13, 20, 23, 24])
def test_the_surgeon_ranks_and_mends(keep):
    mask, new = surgeon(keep)
    np.testing.assert_array_equal(mask, oracles.top_k([np_losses()], keep)[0])
    assert mask.sum() == keep
    np.testing.assert_array_equal(new[~mask], 0.0)
    np.testing.assert_allclose(new, np_mended(mask), rtol=2e-4, atol=2e-5)
    if keep == 24:
        np.testing.assert_array_equal(new, np.float32(KERNEL))


def test_one_pruned_weight_is_the_update_of_the_paper():
    mask, new = surgeon(23)
    ((q, j),) = np.argwhere(~mask)
    inverse = np.linalg.inv(np_hessian())
    change = -KERNEL[q, j] / inverse[q, q] * inverse[:, q]
    np.testing.assert_allclose(new[:, j], KERNEL[:, j] + change, rtol=1e-4, atol=1e-5)
    others = np.arange(4) != j
    np.testing.assert_array_equal(new[:, others], np.float32(KERNEL)[:, others])
    # And L_q is what it costs, the least of all single deletions.
    costs = []
    for place in np.ndindex(*KERNEL.shape):
        without = np.ones(KERNEL.shape, bool)
        without[place] = False
        costs.append(np_error(np_mended(without)))
    np.testing.assert_allclose(np_error(new), np_losses()[q, j], rtol=1e-3)
    np.testing.assert_allclose(np_error(new), min(costs), rtol=1e-3)


def test_mending_is_the_minimum_for_its_mask():
    """No kernel with the same zeros is closer, and brute force finds none by steps."""
    mask, new = surgeon(11)
    least = np_error(new)
    assert least < 0.8 * np_error(np.where(mask, KERNEL, 0))
    for place, step in itertools.product(np.argwhere(mask), (-0.05, 0.05)):
        other = new.copy()
        other[tuple(place)] += step
        assert np_error(other) > least


def test_the_surgeon_on_halves():
    half = KERNEL.astype(jnp.bfloat16).astype(float)
    mask, new = sparse_optax.layerwise_obs(
        jnp.asarray(KERNEL, jnp.bfloat16), jnp.float32(INPUTS), 13, damping=DAMPING
    )
    _, wide = surgeon(13, half)
    assert new.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(new) != 0, mask)
    np.testing.assert_allclose(np.asarray(new, float), wide, rtol=1e-2, atol=1e-3)


def test_the_surgeon_takes_a_traced_count_and_more_axes():
    inputs = jnp.float32(INPUTS).reshape(5, 10, 6)
    prune = jax.jit(
        lambda k: sparse_optax.layerwise_obs(
            jnp.float32(KERNEL), inputs, k, damping=DAMPING
        )
    )
    mask, new = prune(jnp.int32(13))
    np.testing.assert_array_equal(mask, surgeon(13)[0])
    np.testing.assert_allclose(new, surgeon(13)[1], rtol=1e-4, atol=1e-5)


def test_patches_in_the_order_that_the_docs_give():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
    images = jax.random.normal(jax.random.key(1), (5, 8, 8, 2))
    layout = ("NHWC", "HWIO", "NHWC")
    patches = jax.lax.conv_general_dilated_patches(
        images, (3, 3), (1, 1), "SAME", dimension_numbers=layout
    )
    wanted = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=layout
    )
    flat = kernel.transpose(2, 0, 1, 3).reshape(18, 4)
    np.testing.assert_allclose(patches @ flat, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "argument", "value", "allowed"),
    [
        ({"keep": -1}, "keep", "-1", r"\[0, 24\]"),
        ({"keep": 25}, "keep", "25", r"\[0, 24\]"),
        ({"keep": 0.5}, "keep", "0.5", r"\[0, 24\]"),
        ({"keep": True}, "keep", "True", r"\[0, 24\]"),
        ({"damping": -1.0}, "damping", "-1.0", "at least 0"),
        ({"damping": float("nan")}, "damping", "nan", "at least 0"),
        ({"inputs": np.ones((5, 7))}, "inputs", r"\(5, 7\)", r"\(n, 6\)"),
        ({"inputs": np.ones(6)}, "inputs", r"\(6,\)", r"\(n, 6\)"),
        (
            {"kernel": np.ones((3, 3, 2, 4))},
            "kernel",
            r"\(3, 3, 2, 4\)",
            r"\(in, out\)",
        ),
        ({"kernel": np.ones((6, 4), int)}, "kernel", "int", "floating"),
        ({"inputs": np.ones((5, 6)), "damping": 0.0}, "damping", "0.0", "definite"),
        ({"inputs": np.full((5, 6), np.nan)}, "damping", "", "definite"),
    ],
)
def test_wrong_input_of_the_surgeon(changes, argument, value, allowed):
    settings = {"kernel": KERNEL, "inputs": INPUTS, "keep": 5, "damping": DAMPING}
    settings |= changes
    for name in ("kernel", "inputs"):
        x = settings[name]
        settings[name] = jnp.asarray(x, jnp.int32 if x.dtype == int else jnp.float32)
    with refuses("layerwise_obs", argument, value, allowed):
        sparse_optax.layerwise_obs(
            settings.pop("kernel"), settings.pop("inputs"), **settings
        )


# --- lottery tickets ------------------------------------------------------------------

DRIFT = [
    {name: RNG.normal(size=WEIGHTS[name]["kernel"].shape) for name in KERNELS}
    for _ in range(3)
]


def _grow(params, masks, drifts):
    """Training that moves kept weights by known amounts, and biases by one."""
    drift = next(drifts)
    out = {}
    for name in KERNELS:
        mask = masks[name]["kernel"]
        kernel = params[name]["kernel"]
        np.testing.assert_array_equal(np.asarray(kernel)[~np.asarray(mask)], 0)
        moved = kernel + jnp.where(mask, jnp.float32(drift[name]), 0)
        out[name] = {"bias": params[name]["bias"] + 1, "kernel": moved}
    return out


@pytest.mark.parametrize("scope", ["global", "leaf"])
def test_tickets_are_found_round_by_round(scope):
    """Each round starts again from the same weights, on those that are left."""
    seen = []

    def train(params, masks):
        seen.append(params)
        return _grow(params, masks, drifts)

    drifts = iter(DRIFT)
    found = sparse_optax.ticket_masks(train, PARAMS, 0.2, rounds=3, scope=scope)

    start = [np.float32(WEIGHTS[name]["kernel"]) for name in KERNELS]
    kept = [np.ones(w.shape, bool) for w in start]
    sizes = [w.size for w in start]
    for r, drift in enumerate(DRIFT, 1):
        for w, k, name in zip(start, kept, KERNELS, strict=True):
            got = np.asarray(seen[r - 1][name]["kernel"])
            np.testing.assert_array_equal(got, np.where(k, w, 0))
            np.testing.assert_array_equal(
                seen[r - 1][name]["bias"], np.float32(WEIGHTS[name]["bias"])
            )
        score = [
            np.where(k, np.abs(w + np.float32(drift[name])), -1.0)
            for w, k, name in zip(start, kept, KERNELS, strict=True)
        ]
        if scope == "global":
            final = sum(sizes) // 5
            count = rounds_of.floor_power(sum(sizes), final, Fraction(r, 3))
            kept = oracles.top_k(score, final if r == 3 else count)
        else:
            counts = [
                n // 5 if r == 3 else rounds_of.floor_power(n, n // 5, Fraction(r, 3))
                for n in sizes
            ]
            kept = [
                oracles.top_k([s], k)[0] for s, k in zip(score, counts, strict=True)
            ]
    assert len(seen) == 3
    for name, mask in zip(KERNELS, kept, strict=True):
        np.testing.assert_array_equal(found[name]["kernel"], mask)


def test_rewinding_takes_every_parameter_back():
    """To the type of the trained ones; weights without a mask go back whole."""
    trained = jax.tree.map(lambda x: (x + 1).astype(jnp.bfloat16), PARAMS)
    mask = {"fc1": {"kernel": PARAMS["fc1"]["kernel"] > 0}}
    back = sparse_optax.rewind(trained, PARAMS, mask)
    for name in KERNELS:
        for part, value in PARAMS[name].items():
            wanted = value.astype(jnp.bfloat16)
            if (name, part) == ("fc1", "kernel"):
                wanted = jnp.where(value > 0, wanted, 0)
            assert back[name][part].dtype == jnp.bfloat16
            np.testing.assert_array_equal(back[name][part], wanted)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    plain = {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3))}
    back = sparse_optax.rewind(
        state, plain, {"kernel": jnp.arange(6).reshape(2, 3) > 2}
    )
    assert jax.tree.structure(back) == jax.tree.structure(state)
    np.testing.assert_array_equal(back["kernel"][...], [[0, 0, 0], [1, 1, 1]])


def test_tickets_are_scored_from_the_same_weights():
    ticket = masks.magnitude_masks(PARAMS, 0.3)
    random = sparse_optax.random_masks_like(0, ticket)
    got = {}

    def score(params, mask):
        got[len(got)] = params
        return float(sum(jnp.sum(jnp.abs(params[n]["kernel"])) for n in KERNELS))

    named = {"ticket": ticket, "random": random}
    found = sparse_optax.score_tickets(score, PARAMS, named)
    for i, (name, mask) in enumerate(named.items()):
        wanted = sum(
            np.abs(WEIGHTS[n]["kernel"][np.asarray(mask[n]["kernel"])]).sum()
            for n in KERNELS
        )
        assert found[name] == pytest.approx(wanted, rel=1e-5)
        np.testing.assert_array_equal(got[i]["fc1"]["bias"], PARAMS["fc1"]["bias"])
    assert found["ticket"] > found["random"]


def test_wrong_arguments_of_tickets():
    with refuses("rewind", "initial", "fc2"):
        sparse_optax.rewind(PARAMS, {"fc1": PARAMS["fc1"]}, masks.fill({}, {}))
    with refuses("ticket_masks", "train", "None"):
        sparse_optax.ticket_masks(None, PARAMS, 0.5, rounds=1)
    with refuses("ticket_masks", "rounds", "0", "at least 1"):
        sparse_optax.ticket_masks(lambda p, m: p, PARAMS, 0.5, rounds=0)
    with refuses("score_tickets", "candidates", "{}"):
        sparse_optax.score_tickets(lambda p, m: 0, PARAMS, {})
    both = {d: masks.magnitude_masks(PARAMS, d) for d in (0.2, 0.4)}
    dense = sum(PARAMS[name]["bias"].size for name in KERNELS)
    kept = ", ".join(f"{d}: {dense + masks.count(m)}" for d, m in both.items())
    with refuses("score_tickets", "candidates", kept, "as many"):
        sparse_optax.score_tickets(lambda p, m: 0, PARAMS, both)
    with refuses("score_tickets", "score", "None", "parameters and masks"):
        sparse_optax.score_tickets(None, PARAMS, {"a": both[0.2]})
    for wrong, value in ((None, "None"), ({"fc9": jnp.ones(3, bool)}, "fc9")):
        with refuses("score_tickets", "candidates['a']", value):
            sparse_optax.score_tickets(lambda p, m: 0, PARAMS, {"a": wrong})
    with refuses("rewind", "`masks`", "None", "a mask tree"):
        sparse_optax.rewind(PARAMS, PARAMS, None)


def test_tickets_with_masks_for_other_leaves_are_counted_as_a_whole():
    """Five kept weights and a dense leaf are more than five kept weights."""
    params = {"a": {"kernel": jnp.ones((3, 4))}, "b": {"kernel": jnp.ones((2, 3))}}
    five = {"kernel": jnp.arange(12).reshape(3, 4) < 5}
    four = {"kernel": jnp.arange(12).reshape(3, 4) < 4}
    one = {"kernel": jnp.arange(6).reshape(2, 3) < 1}

    def score(params, masks):
        return sum(np.count_nonzero(x) for x in jax.tree.leaves(params))

    unequal = {"a alone": {"a": five}, "both": {"a": four, "b": one}}
    with refuses("score_tickets", "candidates", "'a alone': 11, 'both': 5", "as many"):
        sparse_optax.score_tickets(score, params, unequal)
    every = {"kernel": jnp.ones((2, 3), bool)}
    state = sparse_optax.static_sparse(
        optax.sgd(0.1), masks={"a": five, "b": every}
    ).init(params)
    equal = {"a alone": {"a": five}, "both": {"a": five, "b": every}, "state": state}
    found = sparse_optax.score_tickets(score, params, equal)
    assert found == {"a alone": 11, "both": 11, "state": 11}


@pytest.mark.parametrize(
    ("train", "value", "allowed"),
    [
        (lambda p: p, "lambda", "of parameters and masks"),
        (lambda p, m: None, "NoneType", "those of `initial`"),
        (lambda p, m: (p, 0.0), "tuple", "those of `initial`"),
        (lambda p, m: jax.tree.leaves(p), "list", "those of `initial`"),
        (lambda p, m: {"fc1": p["fc1"]}, "dict", "those of `initial`"),
        (lambda p, m: jax.tree.map(jnp.transpose, p), "fc1/kernel", "as in `initial`"),
        (lambda p, m: jax.tree.map(lambda x: 1, p), "fc1/kernel", "as in `initial`"),
        (lambda p, m: jax.tree.map(lambda x: x / 0, p), "fc1/kernel", "finite"),
    ],
)
def test_what_a_training_of_tickets_may_return(train, value, allowed):
    with refuses("ticket_masks", "`train`", value, allowed):
        sparse_optax.ticket_masks(train, PARAMS, 0.5, rounds=1)


def test_rewinding_loses_no_imaginary_part_and_no_fraction():
    mask = {"w": jnp.ones((2, 2), bool)}
    real, early = {"w": jnp.ones((2, 2))}, {"w": 1j * jnp.ones((2, 2))}
    with refuses("rewind", "initial", "complex64 for 'w'", "float32"):
        sparse_optax.rewind(real, early, mask)
    back = sparse_optax.rewind(early, real, mask)
    np.testing.assert_array_equal(back["w"], np.ones((2, 2), np.complex64))
    with refuses("rewind", "initial", "float32 for 'n'", "int32"):
        sparse_optax.rewind(real | {"n": jnp.int32(3)}, real | {"n": 0.5}, mask)
    keys = real | {"n": jax.random.key(0)}
    assert sparse_optax.rewind(keys, keys, mask)["n"] == keys["n"]
