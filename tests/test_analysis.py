"""Questions about a network and a run, against NumPy."""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses

import sparse_optax
from sparse_optax import analysis
from sparse_optax.experiments import models

RNG = np.random.default_rng(0)
SHAPES = {"fc1": (5, 7), "fc2": (7, 3)}


def network(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[1]), jnp.float32),
        }
        for name, shape in SHAPES.items()
    }


def forward(params, x):
    x = jnp.tanh(x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
    return x @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]


def batches(count=3, size=6):
    return [
        (
            RNG.normal(size=(size, 5)).astype(np.float32),
            RNG.integers(3, size=size).astype(np.int32),
        )
        for _ in range(count)
    ]


def loss(params, batch):
    x, y = batch
    z = forward(params, x)
    right = jnp.take_along_axis(z, y[:, None], 1)[:, 0]
    return (jax.nn.logsumexp(z, axis=1) - right).mean()


# --- ranks ----------------------------------------------------------------------------


def test_rank_correlation_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    x = RNG.normal(size=40)
    for y in (x + RNG.normal(size=40), np.round(x), -x, RNG.integers(3, size=40)):
        found = analysis.rank_correlation(x, y)
        assert found.value == pytest.approx(stats.spearmanr(x, y).statistic)
        assert found.count == 40


def test_interval_of_a_rank_correlation_covers():
    """Of 400 samples with a known correlation about 95% hold it."""
    rng = np.random.default_rng(1)
    cover = np.array([[1, 0.6], [0.6, 1]])
    # Spearman's correlation of two normal variables with this Pearson correlation.
    true = 6 / np.pi * np.arcsin(0.3)
    hits = 0
    for _ in range(400):
        x, y = rng.multivariate_normal([0, 0], cover, size=30).T
        found = analysis.rank_correlation(x, y)
        hits += found.low <= true <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_rank_correlations_that_say_little():
    found = analysis.rank_correlation([1, 2, 3], [3, 1, 2])
    assert found.value == pytest.approx(-0.5)
    assert np.isnan([found.low, found.high]).all()
    assert np.isnan(analysis.rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]).value)
    assert analysis.rank_correlation(range(9), range(9))[:3] == (1, 1, 1)
    with refuses("rank_correlation", "x", "2", "as many"):
        analysis.rank_correlation([1, 2], [1, 2, 3])
    with refuses("rank_correlation", "y", "NaN", "finite"):
        analysis.rank_correlation([1, 2], [1, np.nan])
    for values, kind in (
        (np.array([1j, 2]), "complex128"),
        (["1", "2"], "<U1"),
        ([[1], [1, 2]], "list"),
        ({"a": 1, "b": 2}, "dict"),
    ):
        with refuses("rank_correlation", "x", kind, "real numbers"):
            analysis.rank_correlation(values, [1, 2])


# --- specialization -------------------------------------------------------------------


def test_specialization_against_a_loop():
    maps = [RNG.normal(size=(6, 4, 4, 5)).astype(np.float32) for _ in range(3)]
    labels = [RNG.integers(3, size=6) for _ in range(3)]
    for x in maps:
        x[..., 2] = 0  # a channel that is never active
    maps[0][labels[0] != 1, ..., 3] = 0  # and one that serves one class
    for x in maps[1:]:
        x[..., 3] = 0

    def layers(x):
        return {"map": x, "mean": x.mean((1, 2))}

    found = analysis.channel_specialization(layers, zip(maps, labels, strict=True), 3)
    for name in ("map", "mean"):
        sums = np.zeros((5, 3))
        for x, y in zip(maps, labels, strict=True):
            x = x if name == "map" else x.mean((1, 2))
            for image, label in zip(x, y, strict=True):
                sums[:, label] += np.abs(image).reshape(-1, 5).sum(0)
        active = sums.sum(1) > 0
        wanted = sums[active] / sums[active].sum(1, keepdims=True)
        np.testing.assert_allclose(found.shares[name][active], wanted, rtol=1e-5)
        np.testing.assert_allclose(
            found.largest[name][active], wanted.max(1), rtol=1e-5
        )
        assert np.isnan(found.largest[name][2])
        assert found.largest[name][3] == 1
        assert found.means()[name] == pytest.approx(wanted.max(1).mean(), rel=1e-5)


def test_specialization_of_wrong_input():
    x = np.zeros((2, 3), np.float32)
    with refuses("channel_specialization", "batches", "from 0 to 5", "from 0 to 4"):
        analysis.channel_specialization(
            lambda x: {"a": x}, [(x, np.array([0, 5]))], classes=5
        )
    with refuses("channel_specialization", "batches", "empty", "at least one"):
        analysis.channel_specialization(lambda x: {"a": x}, [], 2)
    with refuses("channel_specialization", "classes", "0"):
        analysis.channel_specialization(lambda x: {"a": x}, [], 0)


LABELS = [
    # Labels of four examples of three classes, and what the message says.
    (np.array([0, 1, 2, 3]), "from 0 to 3", "from 0 to 2"),
    (np.array([0, -1, 2, 1]), "from -1 to 2", "from 0 to 2"),
    (np.array([0.0, 1.0, 2.0, 1.0]), "float64", "integers"),
    (np.array([True, False, True, True]), "bool", "integers"),
    (np.array([[0], [1], [2], [1]]), r"\(4, 1\)", r"\(b,\)"),
    (np.eye(4, 3), r"\(4, 3\)", r"\(b,\)"),
]


@pytest.mark.parametrize(("labels", "value", "allowed"), LABELS)
def test_labels_that_are_no_classes(labels, value, allowed):
    x = RNG.normal(size=(4, 5)).astype(np.float32)
    with refuses("channel_specialization", "batches", value, allowed):
        analysis.channel_specialization(lambda x: {"a": x}, [(x, labels)], 3)
    with refuses("compare_saliencies", "batches", value, allowed):
        analysis.compare_saliencies(forward, network(), [(x, labels)])


@pytest.mark.parametrize(
    ("batches", "value", "allowed"),
    [
        (3, "3", "an iterable of batches"),
        (None, "None", "an iterable of batches"),
        ((np.ones((2, 5)), np.arange(2)), "one tuple of arrays", "iterable"),
        ([np.ones((2, 5))], "ndarray", r"\(inputs, labels\)"),
        ([(np.ones((2, 5)), np.arange(2), 1)], "tuple of 3", r"\(inputs, labels\)"),
    ],
)
def test_batches_that_are_none(batches, value, allowed):
    with refuses("channel_specialization", "batches", value, allowed):
        analysis.channel_specialization(lambda x: {"a": x}, batches, 3)
    with refuses("compare_saliencies", "batches", value, allowed):
        analysis.compare_saliencies(forward, network(), batches)
    if "inputs" not in allowed:
        with refuses("layer_sensitivity", "batches", value, allowed):
            analysis.layer_sensitivity(loss, network(), batches)


@pytest.mark.parametrize(
    ("activations", "value", "allowed"),
    [
        (3, "3", r"activations\(inputs\)"),
        (lambda x: x, "float32", "a dict of arrays"),
        (lambda x: None, "None", "a dict of arrays"),
        (lambda x: {}, "{}", "one or more"),
        (lambda x: {"a": (x,)}, r"\(\(4, 5\),\) for 'a'", r"\(b, ..., c\)"),
        (lambda x: {"a": x[:, 0]}, r"\(4,\) for 'a'", r"\(b, ..., c\)"),
        (lambda x: {"a": x[:3]}, r"\(3, 5\) for 'a'.*4 labels", "a row for each"),
        (lambda x: {"a": x / x[:1]}, "activations of 'a'", "finite"),
    ],
)
def test_activations_that_are_none(activations, value, allowed):
    x = np.ones((4, 5), np.float32)
    x[0, 2] = 0
    with refuses("channel_specialization", "activations", value, allowed):
        analysis.channel_specialization(activations, [(x, np.arange(4))], 4)


def test_specialization_of_complex_activations_is_of_their_size():
    x = RNG.normal(size=(6, 5)).astype(np.float32)
    found = [
        analysis.channel_specialization(
            lambda x, c=c: {"a": c * x}, [(x, np.arange(6) % 3)], 3
        ).shares["a"]
        for c in (1, 1j)
    ]
    np.testing.assert_allclose(*found, rtol=1e-6)


# --- sensitivity ----------------------------------------------------------------------


def test_sensitivity_prunes_one_layer_at_a_time_by_magnitude():
    params, held = network(), batches()
    densities = (0.2, 1.0, 0.5)
    found = analysis.layer_sensitivity(loss, params, held, densities)
    assert found.names == ("fc1/kernel", "fc2/kernel")
    assert found.densities == (1.0, 0.5, 0.2)

    def mean(params):
        return np.mean([loss(params, batch) for batch in held])

    assert found.dense == pytest.approx(mean(params), rel=1e-6)
    for row, name in enumerate(SHAPES):
        for column, density in enumerate(found.densities):
            kernel = np.asarray(params[name]["kernel"])
            kept = max(1, int(density * kernel.size + 1e-9))
            cut = np.sort(np.abs(kernel).ravel())[-kept]
            pruned = np.where(np.abs(kernel) >= cut, kernel, 0)
            assert np.count_nonzero(pruned) == kept
            other = params | {name: params[name] | {"kernel": jnp.asarray(pruned)}}
            assert found.values[row, column] == pytest.approx(mean(other), rel=1e-5)
    assert found.values[:, 0] == pytest.approx(found.dense)
    wanted = (found.values - found.dense).sum(1) / 3
    np.testing.assert_allclose(found.damage(), wanted)


def test_sensitivity_compiles_one_function_for_all_layers():
    traces = []

    def counted(params, batch):
        traces.append(1)
        return loss(params, batch)

    analysis.layer_sensitivity(counted, network(), batches(), (0.5, 0.2, 0.1))
    assert len(traces) == 1


def test_a_hole_before_a_layer_is_no_layer():
    kernel = jax.random.normal(jax.random.key(0), (4, 4))
    rest = {"b": {"kernel": kernel}, "c": {"kernel": kernel.T}}

    def metric(p, x):
        return jnp.mean((x @ p["b"]["kernel"]) ** 2) + 0 * p["c"]["kernel"].sum()

    damage = [
        analysis.layer_sensitivity(
            metric, {"a": {"kernel": hole}, **rest}, [jnp.ones((8, 4))], [0.25]
        ).damage()
        for hole in (None, optax.MaskedNode())
    ]
    np.testing.assert_array_equal(*damage)
    assert damage[0][0] != 0


def test_a_prediction_of_sensitivity_is_compared_by_rank():
    values = np.array([[1.0, 2.0], [3.0, 9.0], [1.0, 1.5], [5.0, 5.0]])
    found = analysis.Sensitivity(tuple("abcd"), (0.5, 0.1), 1.0, values)
    predicted = dict(a=0.2, b=0.7, c=0.1, d=0.9)
    # Damage 0.5, 5, 0.25 and 4: the two largest are the other way round.
    assert found.agreement(predicted).value == pytest.approx(0.8)
    with pytest.raises(ValueError, match=r"no number for \['d'\].*Give those too"):
        found.agreement({key: predicted[key] for key in "abc"})
    for wrong, value in (([1, 2, 3, 4], "1, 2"), (0.5, "0.5")):
        with refuses("agreement", "predicted", value, "a dict of numbers"):
            found.agreement(wrong)
    for wrong, value in ((np.nan, "nan"), (np.ones(2), "array"), ("x", "'x'")):
        with refuses("agreement", "predicted['b']", value, "a finite number"):
            found.agreement(predicted | {"b": wrong})
    with refuses("agreement", "damage", r"\[nan, 5.0,", "finite"):
        found._replace(values=values * [[np.nan], [1], [1], [1]]).agreement(predicted)
    with refuses("agreement", "damage", r"\[0.5\]", "two"):
        found._replace(names=("a",), values=values[:1]).agreement(predicted)


def test_surviving_densities_are_a_budget():
    params = network()
    masks = sparse_optax.masks.magnitude_masks(params, 0.3)
    sparse = sparse_optax.sparsify(params, masks)
    found = analysis.surviving_densities(sparse)
    wanted = {
        f"{name}/kernel": np.count_nonzero(sparse[name]["kernel"]) / np.prod(shape)
        for name, shape in SHAPES.items()
    }
    assert found == pytest.approx(wanted)
    counts = sparse_optax.budgets.uniform(
        0.3, overrides={"fc1/kernel": found["fc1/kernel"]}
    ).counts(params)
    for name, shape in SHAPES.items():
        kept = round(wanted[f"{name}/kernel"] * np.prod(shape))
        assert int(counts[name]["kernel"]) == kept
    tiny = jax.tree.map(lambda w: 1e-5 * w, params)
    assert set(analysis.surviving_densities(tiny).values()) == {0.0}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(densities=(0.5, 0.0)), ("densities", "0.0")),
        (dict(densities=()), ("densities", "empty", "at least one")),
        (dict(batches=[]), ("batches", "empty", "at least one")),
        (dict(densities=0.5), ("densities", "0.5", "a sequence of numbers")),
        (dict(densities="0.5"), ("densities", "'0.5'", "a sequence of numbers")),
        (dict(densities=None), ("densities", "None", "a sequence of numbers")),
        (dict(densities=["a"]), ("densities", "'a'", "a number in")),
        (dict(densities=[True]), ("densities", "True", "a number in")),
        (dict(metric="loss"), ("metric", "'loss'", r"metric\(params, batch\)")),
        (dict(metric=forward), ("metric", r"shape \(6, 3\)", "one number")),
        (
            dict(metric=lambda p, b: (loss(p, b), 1)),
            ("metric", r"\(\(\), \(\)\)", "one"),
        ),
        (dict(metric=lambda p, b: None), ("metric", "None", "one number")),
        (
            dict(metric=lambda p, b: 1j * loss(p, b)),
            ("metric", "complex", "one number"),
        ),
    ],
)
def test_sensitivity_of_wrong_input(options, words):
    given = dict(metric=loss, batches=batches(1), densities=(0.5,)) | options
    if given["metric"] is forward:
        given["metric"] = lambda params, batch: forward(params, batch[0])
    with refuses("layer_sensitivity", *words):
        analysis.layer_sensitivity(params=network(), **given)


def test_weights_without_a_value_are_neither_pruned_nor_kept():
    kernel = jnp.ones((2, 2)).at[0, 1].set(jnp.nan)
    for params, value, allowed in (
        ({"a": {"kernel": kernel}}, "weights of 'a/kernel'", "must be finite"),
        (jax.eval_shape(network), "leaf 'fc1/kernel'", "abstract"),
    ):
        with refuses("surviving_densities", "params", value, allowed):
            analysis.surviving_densities(params)
        with refuses("layer_sensitivity", "params", value, allowed):
            analysis.layer_sensitivity(lambda p, b: 0.0, params, [1.0])
    with refuses("compare_saliencies", "params", "leaf 'fc1/kernel'", "abstract"):
        analysis.compare_saliencies(forward, params, batches(1))
    found = analysis.surviving_densities(
        {"v": jnp.ones((0, 3)), "w": jnp.zeros((2, 3))}
    )
    assert found == {"v": 1.0, "w": 0.0}


# --- re-activation --------------------------------------------------------------------


def test_reactivation_against_sets():
    masks = RNG.random(size=(6, 20)) < 0.3
    trees = [{"a": jnp.asarray(m[:8].reshape(2, 4)), "b": m[8:]} for m in masks]
    found = analysis.reactivation(iter(trees))
    ever = set(np.flatnonzero(masks[0]))
    for step, (before, now) in enumerate(itertools.pairwise(masks)):
        fresh = set(np.flatnonzero(now)) - set(np.flatnonzero(before))
        assert found.taken_up[step] == pytest.approx(len(fresh) / 20)
        assert found.first_time[step] == pytest.approx(len(fresh - ever) / 20)
        ever |= set(np.flatnonzero(now))
        assert found.explored[step] == pytest.approx(len(ever) / 20)


def test_reactivation_is_what_the_gate_counts():
    params = network()
    gate = sparse_optax.gsm_mask(0.3, track_reactivated=True)
    state, masks, counted = gate.init(params), [], []
    for batch in batches(4):
        gradient = jax.grad(loss)(params, batch)
        _, state = gate.update(gradient, state, params)
        masks.append(state.gsm_active)
        counted.append(int(state.gsm_reactivated))
    found = analysis.reactivation(masks)
    weights = sum(np.prod(shape) for shape in SHAPES.values())
    np.testing.assert_allclose(found.taken_up * weights, counted[1:])
    assert max(counted[1:]) > 0


def test_reactivation_of_wrong_input():
    with refuses("reactivation", "masks", "two"):
        analysis.reactivation([{"a": np.ones(3, bool)}])
    with refuses("reactivation", "masks", "None", "an iterable of mask trees"):
        analysis.reactivation(None)
    first = np.ones((2, 3), bool)
    with refuses("reactivation", "masks", r"\(2, 3\).*\(3, 2\)", "same weights"):
        analysis.reactivation([{"a": first}, {"a": first.T}])
    with refuses("reactivation", "masks", "'a'.*'b'", "same weights"):
        analysis.reactivation([{"a": first}, {"b": first}])
    for other in (first.astype(float), first.astype(int)):
        with refuses("reactivation", "masks", str(other.dtype), "must be bool"):
            analysis.reactivation([{"a": other}, {"a": other}])
    gate = sparse_optax.gsm_mask(0.3).init(network())
    with refuses("reactivation", "masks", "int32", "must be bool"):
        analysis.reactivation([gate, gate])


def test_reactivation_reads_packed_masks_and_states():
    masks = [{"a": jnp.asarray(RNG.random(size=(4, 5)) < 0.5)} for _ in range(3)]
    wanted = analysis.reactivation(masks)
    packed = [{"a": sparse_optax.masks.pack(m["a"])} for m in masks]
    states = [
        sparse_optax.static_sparse(optax.sgd(0.1), masks=m).init(
            {"a": jnp.ones((4, 5))}
        )
        for m in masks
    ]
    for given in (packed, states):
        np.testing.assert_array_equal(analysis.reactivation(given), wanted)


# --- decay ----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.98, 0.99])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_short_formula_against_a_loop(beta, nesterov):
    rate, decay, steps = 5e-3, 5e-4, 3000
    w, z = 1.0, 0.0
    for _ in range(steps):
        z = beta * z + decay * w
        w -= rate * (decay * w + beta * z if nesterov else z)
    found = analysis.passive_decay_error(rate, beta, decay, steps, nesterov=nesterov)
    assert found.exact == pytest.approx(-np.log(w), rel=1e-8)
    assert found.formula == pytest.approx(
        -steps * np.log1p(-rate * decay / (1 - beta)), rel=1e-12
    )
    assert found.error == pytest.approx(found.formula / -np.log(w) - 1, abs=1e-8)
    assert abs(found.error) < 0.05


def test_where_the_short_formula_does_not_hold():
    assert np.isnan(analysis.passive_decay_error(0.1, 0.9, 0.0, 10).error)
    # Beyond (1 - sqrt(beta))^2 the weight swings about zero.
    assert analysis.passive_decay_error(0.05, 0.99, 5e-3, 2000).error > 1
    with refuses("passive_decay_error", "momentum", "1"):
        analysis.passive_decay_error(0.1, 1.0, 0.1, 10)
    with refuses("passive_decay_error", "learning_rate", "traced", "a number"):
        jax.jit(lambda x: analysis.passive_decay_error(x, 0.9, 0.1, 10))(0.1)


def test_the_short_formula_is_exact_for_scalars_of_jax():
    plain = analysis.passive_decay_error(0.5, 0.875, 0.0625, 10)
    scalars = (jnp.float32(x) for x in (0.5, 0.875, 0.0625))
    found = analysis.passive_decay_error(*scalars, jnp.int32(10))
    assert found == plain
    assert all(isinstance(x, float) for x in found)


# --- saliencies -----------------------------------------------------------------------


def test_saliencies_against_numpy():
    """Gradients of each example written out by hand."""
    params, held = network(), batches()
    w1, b1, w2, b2 = (
        np.asarray(params[layer][name], np.float64)
        for layer in ("fc1", "fc2")
        for name in ("kernel", "bias")
    )
    fisher, curvature, taylor = ([np.zeros_like(w1), np.zeros_like(w2)] for _ in "abc")
    examples = 0
    for x, y in held:
        mean = [np.zeros_like(w1), np.zeros_like(w2)]
        for row, label in zip(x.astype(np.float64), y, strict=True):
            hidden = np.tanh(row @ w1 + b1)
            z = hidden @ w2 + b2
            p = np.exp(z) / np.exp(z).sum()

            def pull(v, row=row, hidden=hidden):
                back = (w2 @ v) * (1 - hidden**2)
                return [np.outer(row, back), np.outer(hidden, v)]

            gradient = pull(p - np.eye(3)[label])
            examples += 1
            for i, g in enumerate(gradient):
                fisher[i] += g**2
                mean[i] += g / len(x)
            for c in range(3):
                for i, g in enumerate(pull(np.eye(3)[c] - p)):
                    curvature[i] += p[c] * g**2
        for i, g in enumerate(mean):
            taylor[i] += g**2 / len(held)
    weights = [w1, w2]

    def flat(parts):
        return np.concatenate([part.ravel() for part in parts])

    wanted = {
        "magnitude": flat([np.abs(w) for w in weights]),
        "taylor": flat([w**2 * t for w, t in zip(weights, taylor, strict=True)]),
        "fisher": flat(
            [w**2 * f / examples / 2 for w, f in zip(weights, fisher, strict=True)]
        ),
        "optimal_brain_damage": flat(
            [w**2 * h / examples / 2 for w, h in zip(weights, curvature, strict=True)]
        ),
    }
    found = analysis.compare_saliencies(forward, params, held)
    assert found.names == tuple(wanted)
    for name, scores in wanted.items():
        np.testing.assert_allclose(found.scores[name], scores, rtol=1e-3, atol=1e-9)
    for i, one in enumerate(found.names):
        for j, other in enumerate(found.names):
            value = analysis.rank_correlation(found.scores[one], found.scores[other])
            assert found.ranks[i, j] == pytest.approx(value.value)
    assert np.diag(found.ranks) == pytest.approx(1)


def test_taylor_of_single_examples_is_fisher():
    """E[T^2] = w^2 E[g^2]: one criterion but for a factor of two."""
    params = network()
    x, y = batches(1, 12)[0]
    alone = [(x[i : i + 1], y[i : i + 1]) for i in range(12)]
    found = analysis.compare_saliencies(forward, params, alone)
    np.testing.assert_allclose(
        found.scores["taylor"], 2 * found.scores["fisher"], rtol=1e-4, atol=1e-12
    )
    assert found.ranks[1, 2] > 0.9999
    together = analysis.compare_saliencies(forward, params, [(x, y)])
    assert together.ranks[1, 2] < 0.999


def test_saliencies_of_wrong_input():
    with refuses("compare_saliencies", "forward", r"\(1,\)", "a row for each"):
        analysis.compare_saliencies(
            lambda params, x: forward(params, x).sum(1), network(), batches(1)
        )
    for wrong, value in ((None, "None"), (lambda x: x, "lambda")):
        with refuses("compare_saliencies", "forward", value, r"\(params, inputs\)"):
            analysis.compare_saliencies(wrong, network(), batches(1))


# --- speed ----------------------------------------------------------------------------
@pytest.fixture
def clock(monkeypatch):
    """Times that are known: of the n-th product n seconds dense, a tenth compacted, a
    fifth in a sparse matrix; of whole models 8, 4 and 16.
    """
    count = itertools.count(1)

    def of_layers(calls, **options):
        if "sparse" in calls:
            return {"dense": 8.0, "compacted": 4.0, "sparse": 16.0}
        n = next(count) if calls else 0
        return {k: {"dense": n, "compacted": n / 10}[k] for k in calls}

    for name, least in (
        ("analysis.speedup", of_layers),
        ("export.sparse", lambda calls, **options: dict.fromkeys(calls, 0.2)),
    ):
        module = sys.modules[f"sparse_optax.{name}"]
        monkeypatch.setattr(module, "least_seconds", least)


def convolutional(seed=0):
    """A convolution, one with groups, and two dense layers, with dead channels."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (3, 3, 2, 6), "g": (3, 3, 3, 8), "u": (32, 40), "v": (40, 5)}
    params = {}
    for name, shape in shapes.items():
        kernel = rng.normal(size=shape) * (rng.random(shape) < 0.15)
        kernel *= rng.random(shape[-1]) < 0.6
        params[name] = {"kernel": kernel.astype(np.float32)}

    def fn(params, x):
        layout = ("NHWC", "HWIO", "NHWC")
        for name, groups in (("a", 1), ("g", 2)):
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x,
                    params[name]["kernel"],
                    (2, 2),
                    "SAME",
                    dimension_numbers=layout,
                    feature_group_count=groups,
                )
            )
        x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["u"]["kernel"])
        return x @ params["v"]["kernel"]

    return fn, jax.tree.map(jnp.asarray, params), jnp.ones((3, 8, 8, 2))


def test_estimates_of_a_speed_up(clock):
    fn, params, x = convolutional()
    found = analysis.measure_speedup(fn, params, x)
    assert [layer.name for layer in found.layers] == [f"{n}/kernel" for n in "aguv"]
    by_density = by_channels = 0
    for n, layer in enumerate(found.layers, 1):
        kernel = np.asarray(params[layer.name[0]]["kernel"])
        density = np.count_nonzero(kernel) / kernel.size
        empty = np.mean([not kernel[..., o].any() for o in range(kernel.shape[-1])])
        np.testing.assert_allclose(layer[1:4], [density, empty, n])
        np.testing.assert_allclose(layer[4:6], [n * density, n * (1 - empty)])
        np.testing.assert_allclose(layer.compacted, n / 10)
        assert layer.sparse == (0.2 if n > 2 else None)
        by_density += n * density
        by_channels += n * (1 - empty)
    assert found.estimates == pytest.approx(
        {"by_density": 10 / by_density, "by_channels": 10 / by_channels}
    )
    assert found.measured == {"compacted": 2.0, "sparse": 0.5}
    lines = [line.split() for line in found.table().splitlines()]
    assert lines[0][:3] == ["layer", "density", "empty"]
    # Milliseconds; layers without a sparse form stay dense.
    assert lines[5][-2:] == ["1e+03", "3.4e+03"]
    assert lines[5][2] == "1e+04"
    factors = [f"{10 / by_density:.2f}x", f"{10 / by_channels:.2f}x", "10.00x", "2.94x"]
    assert lines[6] == factors
    assert lines[8] == ["2.00x", "0.50x"]


def test_masks_say_what_is_kept(clock):
    fn, params, x = convolutional()
    masks = jax.tree.map(lambda w: w != 0, params)
    masks["u"]["kernel"] = masks["u"]["kernel"].at[:, 3].set(True)
    found = analysis.measure_speedup(fn, params, x, masks=masks)
    kept = np.asarray(masks["u"]["kernel"])
    assert found.layers[2].density == pytest.approx(kept.mean())
    assert found.layers[2].empty == pytest.approx(1 - kept.any(0).mean())


def test_a_parameter_that_is_used_twice_and_in_a_loop(clock):
    def fn(params, x):
        x = jnp.tanh(x @ params["w"])
        x = jax.lax.map(lambda row: jnp.tanh(row @ params["w"]), x)
        return x @ params["w"].T, x @ x.T

    params = {"w": jnp.eye(6)}
    found = analysis.measure_speedup(fn, params, jnp.ones((4, 6)))
    first, second = found.layers
    # The second product is one of four rows; the third is like the first.
    assert (first.name, first.dense) == ("w", 1 + 4 * 2 + 1)
    assert first.compacted == first.dense  # nothing can go
    assert first.by_density == pytest.approx(10 / 6)
    assert second[:4] == ("(activations)", 1.0, 0.0, 3)


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-5-caffe"])
def test_times_of_a_network_are_measured(name):
    apply, params = models.create(name, (28, 28, 1), 10, key=jax.random.key(0))
    masks = sparse_optax.masks.random_masks(0, params, 0.05)
    params = sparse_optax.sparsify(params, masks)
    found = analysis.measure_speedup(apply, params, jnp.ones((2, 28, 28, 1)))
    names = [name for name, leaf in flat(params) if leaf.ndim > 1]
    assert sorted(layer.name for layer in found.layers) == sorted(names)
    assert set(found.seconds) == {"dense", "compacted", "sparse"}
    assert all(s > 0 for s in found.seconds.values())
    for layer in found.layers:
        assert layer.dense > 0
        assert layer.compacted > 0
        assert (layer.sparse is None) == ("conv" in layer.name)


def flat(params):
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [("/".join(key.key for key in path), leaf) for path, leaf in paths]


def test_a_speed_up_of_wrong_input():
    fn, params, x = convolutional()
    with refuses("measure_speedup", "fn", "a function"):
        analysis.measure_speedup(params, params, x)
    with refuses("measure_speedup", "params", "concrete array"):
        analysis.measure_speedup(fn, jax.eval_shape(lambda: params), x)
    with refuses("measure_speedup", "masks", r"must be \(40, 5\)"):
        masks = {"v": {"kernel": jnp.ones((2, 2), bool)}}
        analysis.measure_speedup(fn, params, x, masks=masks)
