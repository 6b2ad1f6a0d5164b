"""One cut of a trained network from the inputs of its layers: Wanda, SparseGPT.

The oracles are in float64, with an inverse matrix for each input.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from helpers import refuses

import sparse_optax
from sparse_optax import budgets, masks, patterns

RNG = np.random.default_rng(11)
N, INPUTS, OUTPUTS = 60, 12, 5
WEIGHTS = RNG.normal(size=(INPUTS, OUTPUTS))
# Inputs that depend on each other and differ in size.
X = RNG.normal(size=(N, INPUTS)) @ RNG.normal(size=(INPUTS, INPUTS))
X *= np.geomspace(0.3, 3, INPUTS)
DAMPING = 0.02
BATCHES = [jnp.float32(X[:25]), jnp.float32(X[25:])]


def one_layer(params, x):
    return x @ params["w"]


# --- the definitions ------------------------------------------------------------------


def np_wanda(weights, x, keep):
    """Each output alone; where the number does not divide, the best next weights."""
    scores = np.abs(weights) * np.sqrt((x**2).sum(0))[:, None]
    each, more = divmod(keep, weights.shape[1])
    mask = np.zeros(weights.shape, bool)
    following = []
    for j, column in enumerate(scores.T):
        order = np.argsort(-column, kind="stable")
        mask[order[:each], j] = True
        if each < len(order):
            following.append((-column[order[each]], j, order[each]))
    for _, j, i in sorted(following)[:more]:
        mask[i, j] = True
    return mask


def np_sparse_gpt(weights, x, choose, block, damping=DAMPING):
    """Input by input, with the inverse of what may still change written out.

    ``choose(start, scores)`` gives the masks of the inputs from start on.
    """
    hessian = x.T @ x
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse = [np.linalg.inv(hessian[i:, i:]) for i in range(len(hessian))]
    new, mask = weights.copy(), np.zeros(weights.shape, bool)
    for start in range(0, len(new), block):
        part = range(start, min(start + block, len(new)))
        pivots = np.array([inverse[i][0, 0] for i in part])
        mask[part] = choose(start, new[part] ** 2 / pivots[:, None])
        for i in part:
            error = np.where(mask[i], 0, new[i]) / inverse[i][0, 0]
            new[i:] -= np.outer(inverse[i][:, 0], error)
    return mask, np.where(mask, new, 0)


def by_number(keep, inputs=INPUTS):
    def choose(start, scores):
        end = start + len(scores)
        k = keep * end // inputs - keep * start // inputs
        return oracles.top_k([scores], k)[0]

    return choose


def two_of_four(start, scores):
    del start
    return np.stack([oracles.top_k([s], 2)[0] for s in scores.T], axis=1)


# --- one layer ------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 4, 5, 17, 30, 59, 60])
def test_wanda_keeps_the_best_of_each_output(keep):
    params = {"w": jnp.float32(WEIGHTS)}
    got = sparse_optax.wanda_masks(one_layer, params, BATCHES, budgets.nonzeros(keep))
    np.testing.assert_array_equal(got["w"], np_wanda(WEIGHTS, X, keep))
    counts = np.asarray(got["w"]).sum(0)
    assert counts.sum() == keep
    assert counts.max() - counts.min() <= 1


def test_wanda_of_two_of_four():
    params = {"w": jnp.float32(WEIGHTS)}
    got = sparse_optax.wanda_masks(
        one_layer, params, BATCHES, pattern=patterns.n_m(2, 4)
    )
    scores = np.abs(WEIGHTS) * np.sqrt((X**2).sum(0))[:, None]
    want = [two_of_four(0, scores[i : i + 4]) for i in range(0, INPUTS, 4)]
    np.testing.assert_array_equal(got["w"], np.concatenate(want))


def test_wanda_is_not_magnitude_within_outputs():
    """Else the norm could be left out and the tests would pass."""
    ones = np.ones_like(X)
    assert (np_wanda(WEIGHTS, X, 30) != np_wanda(WEIGHTS, ones, 30)).any()


def gpt(density=None, x=BATCHES, weights=WEIGHTS, dtype=jnp.float32, **options):
    params = {"b": jnp.ones(2), "w": jnp.asarray(weights, dtype)}
    options = {"damping": DAMPING} | options
    kept, new = sparse_optax.sparse_gpt(one_layer, params, x, density, **options)
    assert isinstance(kept["b"], optax.MaskedNode)
    assert new["w"].dtype == dtype
    np.testing.assert_array_equal(new["b"], params["b"])
    return np.asarray(kept["w"]), np.asarray(new["w"], np.float64)


# 5 and 8 do not divide the inputs; 12 and 128 choose all masks at once.
@pytest.mark.parametrize("block", [1, 4, 5, 8, 12, 128])
@pytest.mark.parametrize("keep", [7, 30, 51])
def test_sparse_gpt_follows_the_definition(block, keep):
    mask, new = gpt(budgets.nonzeros(keep), block=block)
    want, weights = np_sparse_gpt(WEIGHTS, X, by_number(keep), min(block, INPUTS))
    np.testing.assert_array_equal(mask, want)
    assert mask.sum() == keep
    np.testing.assert_array_equal(new[~mask], 0)
    np.testing.assert_allclose(new, weights, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("block", [1, 6, 8, 128])
def test_sparse_gpt_of_two_of_four(block):
    mask, new = gpt(pattern=patterns.n_m(2, 4), block=block)
    want, weights = np_sparse_gpt(WEIGHTS, X, two_of_four, 4)
    np.testing.assert_array_equal(mask, want)
    np.testing.assert_allclose(new, weights, rtol=2e-3, atol=2e-4)


def test_all_weights_stay_as_they_are():
    mask, new = gpt(1.0)
    assert mask.all()
    np.testing.assert_array_equal(new, np.float32(WEIGHTS))


def test_the_last_input_pruned_alone_is_the_update_of_the_surgeon():
    """With one missing weight, its row and the rows behind it are OBS's."""
    weights = WEIGHTS.copy()
    weights[0, 2] = 1e-4  # the first input's, so that all others may change
    mask, new = gpt(budgets.nonzeros(59), weights=weights, block=128)
    assert not mask[0, 2]
    hessian = X.T @ X
    hessian += DAMPING * np.diag(hessian).mean() * np.eye(INPUTS)
    inverse = np.linalg.inv(hessian)
    change = -weights[0, 2] / inverse[0, 0] * inverse[:, 0]
    np.testing.assert_allclose(new[:, 2], weights[:, 2] + change, rtol=1e-3, atol=1e-5)


def test_an_input_that_is_never_used():
    """It ranks last, changes nothing, and what is kept of it stays."""
    x = X.copy()
    x[:, 3] = 0
    mask, new = gpt(budgets.nonzeros(55), x=[jnp.float32(x)], block=128)
    assert not mask[3].any()
    others = np.arange(INPUTS) != 3
    np.testing.assert_array_equal(new[others], np.float32(WEIGHTS)[others])
    mask, new = gpt(budgets.nonzeros(57), x=[jnp.float32(x)], block=128)
    assert mask.sum() == 57 == np.count_nonzero(new)
    np.testing.assert_array_equal(new[mask], np.float32(WEIGHTS)[mask])


def test_halves_and_float64():
    mask, new = gpt(0.5, dtype=jnp.bfloat16)
    half = np.asarray(jnp.asarray(WEIGHTS, jnp.bfloat16), np.float64)
    _, wide = gpt(0.5, weights=half)
    np.testing.assert_allclose(new, wide, rtol=1e-2, atol=1e-2)
    assert mask.sum() == 30
    with jax.enable_x64(True):
        mask, new = gpt(0.5, x=[jnp.asarray(X)], dtype=jnp.float64)
        want, weights = np_sparse_gpt(WEIGHTS, X, by_number(30), INPUTS)
        np.testing.assert_array_equal(mask, want)
        np.testing.assert_allclose(new, weights, rtol=1e-9, atol=1e-11)


def test_batches_count_together():
    one = sparse_optax.wanda_masks(
        one_layer, {"w": jnp.float32(WEIGHTS)}, [jnp.float32(X)], 0.5
    )
    two = sparse_optax.wanda_masks(
        one_layer, {"w": jnp.float32(WEIGHTS)}, iter(BATCHES), 0.5
    )
    np.testing.assert_array_equal(one["w"], two["w"])
    first = sparse_optax.wanda_masks(
        one_layer, {"w": jnp.float32(WEIGHTS)}, [jnp.float32(X[:3])], 0.5
    )
    assert (one["w"] != first["w"]).any()


# --- a network ------------------------------------------------------------------------

_DRAW = np.random.default_rng(0)
DEEP = {
    "a": {"kernel": _DRAW.normal(size=(12, 8)), "bias": _DRAW.normal(size=8)},
    # Of nearly equal size, so that its inputs decide.
    "b": {"kernel": 1 + 0.02 * _DRAW.normal(size=(8, 4)), "bias": np.ones(4)},
}
DEEP = jax.tree.map(jnp.float32, DEEP)


def deep(params, x):
    h = jax.nn.gelu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jax.nn.relu(h @ params["b"]["kernel"] + params["b"]["bias"][None])


def test_each_layer_sees_what_the_layers_before_it_have_become():
    got = sparse_optax.wanda_masks(deep, DEEP, BATCHES, 0.25)
    kernel = np.asarray(DEEP["a"]["kernel"], np.float64)
    first = np_wanda(kernel, X, 24)
    np.testing.assert_array_equal(got["a"]["kernel"], first)
    second = np.asarray(DEEP["b"]["kernel"], np.float64)
    wanted = []
    for w in (np.where(first, kernel, 0), kernel):
        h = np.asarray(jax.nn.gelu(X @ w + np.asarray(DEEP["a"]["bias"])))
        wanted.append(np_wanda(second, h, 8))
    np.testing.assert_array_equal(got["b"]["kernel"], wanted[0])
    assert (wanted[0] != wanted[1]).any()  # dense inputs would give another mask


def test_both_corrected_layers_follow_the_definition():
    mask, new = sparse_optax.sparse_gpt(deep, DEEP, BATCHES, 0.5, damping=DAMPING)
    kernel = np.asarray(DEEP["a"]["kernel"], np.float64)
    first, w = np_sparse_gpt(kernel, X, by_number(48), 12)
    np.testing.assert_array_equal(mask["a"]["kernel"], first)
    h = np.asarray(jax.nn.gelu(X @ w + np.asarray(DEEP["a"]["bias"])), np.float64)
    kernel = np.asarray(DEEP["b"]["kernel"], np.float64)
    second, w = np_sparse_gpt(kernel, h, by_number(16, 8), 8)
    np.testing.assert_array_equal(mask["b"]["kernel"], second)
    np.testing.assert_allclose(new["b"]["kernel"], w, rtol=5e-3, atol=5e-4)
    assert masks.count(mask) == 64
    np.testing.assert_array_equal(new["a"]["bias"], DEEP["a"]["bias"])


def test_the_inputs_of_layers():
    found = sparse_optax.layer_inputs(deep, DEEP, jnp.float32(X))
    assert list(found) == ["a/kernel", "b/kernel"]
    np.testing.assert_array_equal(found["a/kernel"], np.float32(X))
    h = jax.nn.gelu(jnp.float32(X) @ DEEP["a"]["kernel"] + DEEP["a"]["bias"][None])
    np.testing.assert_allclose(found["b/kernel"], h, rtol=1e-5, atol=1e-5)
    only = sparse_optax.layer_inputs(
        deep, DEEP, jnp.float32(X), where=lambda name, leaf: name == "b/kernel"
    )
    assert list(only) == ["b/kernel"]


def ways(params, x, look=lambda name, value: None):
    """Transposed, cast, computed again, mapped, by einsum, over two axes, twice."""
    hidden = jnp.tanh(x @ params["twice"])
    look("twice", jnp.concatenate([x, hidden]))
    x = jnp.tanh(hidden @ params["twice"])
    look("cast", x)
    x = x.astype(jnp.bfloat16) @ params["cast"].astype(jnp.bfloat16)
    x = jnp.tanh(x.astype(jnp.float32))
    look("mapped/weight", x)
    x = jax.vmap(jax.vmap(lambda v: params["mapped"]["weight"] @ v))(x)
    look("remat", x)
    x = jax.checkpoint(lambda x: jnp.sin(x @ params["remat"]))(x)
    look("turned", x)
    x = (x @ params["turned"].T).reshape(4, 3, 2, 3)
    look("einsum", x)
    return jnp.einsum("ntab,bao->nto", x, params["einsum"])


def test_ways_to_multiply():
    rng = np.random.default_rng(0)
    shapes = {"cast": (6, 6), "einsum": (3, 2, 5), "remat": (6, 6), "twice": (6, 6)}
    params = {name: jnp.float32(rng.normal(size=s)) for name, s in shapes.items()}
    params["mapped"] = {"weight": jnp.float32(rng.normal(size=(6, 6)))}
    params["turned"] = jnp.float32(rng.normal(size=(6, 6)))
    x = jnp.float32(rng.normal(size=(4, 3, 6)))
    seen = {}
    ways(params, x, lambda name, value: seen.update({name: np.asarray(value)}))
    # In the order of the kernel's axes, which is not that of the input's.
    seen["einsum"] = seen["einsum"].swapaxes(-1, -2)
    found = sparse_optax.layer_inputs(ways, params, x)
    assert set(found) == set(seen)
    for name, values in seen.items():
        got = np.asarray(found[name], np.float32)
        np.testing.assert_allclose(got, values.reshape(-1, 6), rtol=2e-2, atol=2e-2)


def nnx_layers(key):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(12, 8, rngs=rngs)
            self.attend = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

        def __call__(self, x):
            return self.attend(jax.nn.gelu(self.first(x)))

    graph, params = nnx.split(Net(nnx.Rngs(key)), nnx.Param)
    return lambda params, x: nnx.merge(graph, params)(x), params


def linen_layers(key):
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.gelu(linen.Dense(8, name="first")(x))
            return linen.MultiHeadDotProductAttention(2, name="attend")(x)

    net = Net()
    params = net.init(jax.random.key(key), jnp.ones((1, 2, 12)))["params"]
    return lambda params, x: net.apply({"params": params}, x), params


def equinox_layers(key):
    eqx = pytest.importorskip("equinox")
    a, b = jax.random.split(jax.random.key(key))

    class Net(eqx.Module):
        first: eqx.nn.Linear
        attend: eqx.nn.MultiheadAttention

        def __call__(self, x):
            x = jax.nn.gelu(jax.vmap(self.first)(x))
            return self.attend(x, x, x)

    net = Net(eqx.nn.Linear(12, 8, key=a), eqx.nn.MultiheadAttention(2, 8, key=b))
    params, rest = eqx.partition(net, eqx.is_array)
    return lambda params, x: jax.vmap(eqx.combine(params, rest))(x), params


def haiku_layers(key):
    hk = pytest.importorskip("haiku")

    def net(x):
        x = jax.nn.gelu(hk.Linear(8, name="first")(x))
        init = hk.initializers.VarianceScaling(1.0)
        attend = hk.MultiHeadAttention(2, 4, w_init=init, model_size=8, name="attend")
        return attend(x, x, x)

    pure = hk.without_apply_rng(hk.transform(net))
    params = pure.init(jax.random.key(key), jnp.ones((1, 2, 12)))
    return pure.apply, params


LIBRARIES = {
    "nnx": nnx_layers,
    "linen": linen_layers,
    "equinox": equinox_layers,
    "haiku": haiku_layers,
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_layers_of_real_libraries(library):
    """The five layers are found, and a cut without loss is no cut."""
    forward, params = LIBRARIES[library](0)
    x = jax.random.normal(jax.random.key(1), (6, 7, 12))
    found = sparse_optax.layer_inputs(forward, params, x)
    sizes = [a.shape for a in found.values()]
    assert sizes[0] == (42, 12)
    assert sizes[1:] == [(42, 8)] * 4
    first, *rest = list(found.values())
    np.testing.assert_array_equal(first, x.reshape(42, 12))
    for one in rest[:-1]:  # query, key and value have the same inputs
        np.testing.assert_allclose(one, rest[0], rtol=1e-5, atol=1e-6)
    kept, new = sparse_optax.sparse_gpt(forward, params, [x], 0.5)
    # 96 and 4 times 64 weights, in whatever shapes.
    assert masks.count(kept) == 48 + 4 * 32
    assert jax.tree.structure(new) == jax.tree.structure(params)
    wanda = sparse_optax.wanda_masks(forward, params, [x], 0.5)
    assert masks.count(wanda) == 48 + 4 * 32
    dense = forward(params, x)
    errors = [
        float(jnp.mean(jnp.square(forward(p, x) - dense)))
        for p in (new, sparse_optax.sparsify(params, wanda))
    ]
    assert errors[0] < errors[1]
    whole, same = sparse_optax.sparse_gpt(forward, params, [x], 1.0)
    assert masks.count(whole) == 96 + 4 * 64
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_groups_lie_along_the_axis_of_the_program():
    """The output projection of attention sums over heads and indices within them."""
    forward, params = nnx_layers(0)
    x = jax.random.normal(jax.random.key(1), (6, 7, 12))
    for cut in (sparse_optax.wanda_masks, sparse_optax.sparse_gpt):
        found = cut(forward, params, [x], pattern=patterns.n_m(2, 4))
        mask = found[0] if isinstance(found, tuple) else found
        out = np.asarray(mask["attend"]["out"]["kernel"][...])  # (2, 4, 8)
        query = np.asarray(mask["attend"]["query"]["kernel"][...])  # (8, 2, 4)
        np.testing.assert_array_equal(out.sum(1), np.full((2, 8), 2))
        np.testing.assert_array_equal(query.reshape(2, 4, 2, 4).sum(1), 2)


def test_within_jit():
    def cut(params, x):
        kept, new = sparse_optax.sparse_gpt(deep, params, [x], 0.5)
        return kept, new, sparse_optax.wanda_masks(deep, params, [x], 0.5)

    x = jnp.float32(X)
    for a, b in zip(jax.jit(cut)(DEEP, x), cut(DEEP, x), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), a, b)


# --- a trained transformer ------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer():
    """A character transformer that has learned a text of words, in a few seconds."""
    from flax import nnx

    from sparse_optax.experiments.models.transformer import Transformer

    rng = np.random.default_rng(0)
    words = [rng.integers(1, 12, rng.integers(2, 6)) for _ in range(12)]
    text = np.concatenate([np.append(words[i], 0) for i in rng.integers(0, 12, 6000)])
    length = 16
    texts = text[: len(text) // length * length].reshape(-1, length)
    model = Transformer((length,), 12, width=32, depth=2, heads=2, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def forward(params, x):
        return nnx.merge(graph, params)(x)

    def loss(params, x):
        z = forward(params, x)[:, :-1]
        each = optax.losses.softmax_cross_entropy_with_integer_labels(z, x[:, 1:])
        return each.mean()

    params = fitted(loss, params, lambda: texts[rng.integers(0, len(texts) - 200, 32)])
    return forward, params, texts[:128], texts[-200:]


@pytest.fixture(scope="module")
def perceptron():
    """LeNet-300-100 on the digits of scikit-learn, whose pixels differ in size."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, rng = np.float32(images / 16), np.random.default_rng(0)
    draw = jax.nn.initializers.he_normal()
    params = {
        f"layer{i}": {"fc": {"bias": jnp.zeros(size[1]), "kernel": draw(key, size)}}
        for i, size in enumerate([(64, 300), (300, 100), (100, 10)])
        for key in [jax.random.key(i)]
    }

    def forward(params, x):
        for i in range(3):
            layer = params[f"layer{i}"]["fc"]
            x = x @ layer["kernel"] + layer["bias"][None]
            x = jax.nn.relu(x) if i < 2 else x
        return x

    def loss(params, batch):
        each = optax.losses.softmax_cross_entropy_with_integer_labels(
            forward(params, batch[0]), batch[1]
        )
        return each.mean()

    def batch():
        rows = rng.integers(0, 1400, 32)
        return images[rows], labels[rows]

    return forward, fitted(loss, params, batch), images[:1400], images[1400:]


def fitted(loss, params, batch, steps=200):
    """Parameters after Adam, whose loss has fallen by half at least."""
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(steps):
        params, state, value = step(params, state, batch())
        values.append(float(value))
    assert np.mean(values[-20:]) < 0.5 * values[0]
    return params


def lost(network, density, pattern):
    """Of each layer alone, the share of its outputs that a cut changes, on new data."""
    forward, params, seen, fresh = network
    inputs = sparse_optax.layer_inputs(forward, params, seen)
    tests = sparse_optax.layer_inputs(forward, params, fresh)
    errors = []
    for name, x in inputs.items():
        one, two, _ = name.split("/")
        kernel = {"w": jnp.asarray(params[one][two]["kernel"][...])}

        def cut(x, kernel=kernel):
            found = sparse_optax.wanda_masks(
                one_layer, kernel, [x], density, pattern=pattern
            )
            return sparse_optax.sparsify(kernel, found)["w"]

        magnitude = masks.magnitude_masks(
            kernel, density, scope="leaf", pattern=pattern
        )
        new = {
            "magnitude": sparse_optax.sparsify(kernel, magnitude)["w"],
            "within outputs": cut(jnp.ones_like(x)),
            "wanda": cut(x),
            "sparse_gpt": sparse_optax.sparse_gpt(
                one_layer, kernel, [x], density, pattern=pattern
            )[1]["w"],
        }
        assert len({int((w != 0).sum()) for w in new.values()}) == 1
        whole = np.sum(np.square(tests[name] @ kernel["w"]))
        errors.append(
            {
                n: float(np.sum(np.square(tests[name] @ (w - kernel["w"]))) / whole)
                for n, w in new.items()
            }
        )
    return errors


KEPT = {
    "50%": (0.5, None),
    "30%": (0.3, None),
    "2:4": (None, patterns.n_m(2, 4)),
}


@pytest.mark.parametrize("kept", KEPT)
def test_outputs_of_layers_change_least_under_sparse_gpt(perceptron, kept):
    """In each layer: less than under Wanda, and there less than by magnitude."""
    errors = lost(perceptron, *KEPT[kept])
    assert len(errors) == 3
    for layer in errors:
        assert layer["sparse_gpt"] < 0.6 * layer["wanda"]
        assert layer["wanda"] < 0.8 * layer["magnitude"]


@pytest.mark.parametrize("kept", KEPT)
def test_outputs_of_layers_of_a_transformer(transformer, kept):
    """Its layer norms make inputs alike: there the norm gains little, and comparing
    within outputs may cost more than that.
    """
    errors = lost(transformer, *KEPT[kept])
    assert len(errors) == 8
    mean = {n: np.mean([layer[n] for layer in errors]) for n in errors[0]}
    assert mean["sparse_gpt"] < 0.8 * mean["wanda"]
    assert mean["sparse_gpt"] < 0.8 * mean["magnitude"]
    assert mean["wanda"] < mean["within outputs"]


# --- wrong input ----------------------------------------------------------------------

CUTS = {"wanda_masks": sparse_optax.wanda_masks, "sparse_gpt": sparse_optax.sparse_gpt}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize(
    ("options", "argument", "value", "allowed"),
    [
        ({"density": 0.0}, "density", "0.0", r"\(0, 1\]"),
        ({"density": None}, "density", "None", r"\(0, 1\]"),
        ({"batches": []}, "batches", "empty", "at least one"),
        ({"batches": BATCHES[0]}, "batches", "Array", "iterable"),
        ({"batches": [jnp.zeros((0, 12))]}, "batches", "without examples", "at least"),
        ({"batches": [jnp.full((3, 12), jnp.nan)]}, "scores", "'w'", "finite"),
        ({"pattern": patterns.blocks(2, 1)}, "pattern", "blocks", "n_m"),
        ({"pattern": patterns.n_m(2, 4)}, "density", "0.3", "0.5"),
        (
            {"pattern": patterns.n_m(2, 4, axis=1), "density": None},
            "pattern",
            "axis 1",
            "axis 0",
        ),
        (
            {"pattern": patterns.n_m(2, 5), "density": None},
            "n_m",
            r"\(12, 5\)",
            "multiple of 5",
        ),
        ({"forward": lambda params, x: x}, "forward", "'w'", "multiply"),
    ],
)
def test_wrong_input(name, options, argument, value, allowed):
    settings = {
        "forward": one_layer,
        "params": {"w": jnp.float32(WEIGHTS)},
        "batches": BATCHES,
        "density": 0.3,
    } | options
    with refuses(name, argument, value, allowed):
        CUTS[name](**settings)


@pytest.mark.parametrize(
    ("options", "argument", "value", "allowed"),
    [
        ({"damping": -1.0}, "damping", "-1.0", "at least 0"),
        ({"block": 0}, "block", "0", "at least 1"),
        (
            {"batches": [jnp.ones((3, 12))], "damping": 0.0},
            "damping",
            "0.0",
            "definite",
        ),
    ],
)
def test_wrong_input_of_sparse_gpt(options, argument, value, allowed):
    settings = {"batches": BATCHES, "density": 0.5} | options
    if "pattern" in options:
        settings["density"] = None
    with refuses("sparse_gpt", argument, value, allowed):
        sparse_optax.sparse_gpt(one_layer, {"w": jnp.float32(WEIGHTS)}, **settings)


def test_a_convolution_is_refused_by_name():
    params = {"conv": {"kernel": jnp.ones((3, 3, 1, 2))}, "w": jnp.ones((2, 3))}

    def forward(params, x):
        x = jax.lax.conv_general_dilated(
            x,
            params["conv"]["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x.mean((1, 2)) @ params["w"]

    images = jnp.ones((2, 4, 4, 1))
    with refuses("wanda_masks", "forward", "'conv/kernel'", "multiply"):
        sparse_optax.wanda_masks(forward, params, [images], 0.5)
    got = sparse_optax.wanda_masks(
        forward, params, [images], 0.5, where=lambda name, leaf: name == "w"
    )
    assert masks.count(got) == 3


def by_a_loop(p, x):
    again, _ = jax.lax.scan(lambda h, _: (h @ p["a"], None), x @ p["a"], None, length=2)
    return again @ p["w"]


def by_a_branch(p, x):
    h = x @ p["a"]
    return jax.lax.cond(h.sum() > 0, lambda: h @ p["a"], lambda: h) @ p["w"]


def by_a_spectral_norm(p, x):
    size = jnp.linalg.norm(jnp.ones((1, 4)) @ p["a"])
    return (x @ (p["a"] / size)) @ p["w"]


UNSEEN = {
    "loop": (by_a_loop, "inside of a loop"),
    "branch": (by_a_branch, "inside of a loop or a branch"),
    "scaled": (lambda p, x: x @ p["a"] @ (2 * p["a"]) @ p["w"], "other operations"),
    # A product with what does not come from the batch shows no inputs.
    "spectral": (by_a_spectral_norm, "no product"),
    "low rank": (lambda p, x: x @ (p["a"] @ p["b"]) @ p["w"], "no product"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_a_leaf_with_inputs_that_are_not_seen_is_refused(name):
    forward, why = UNSEEN[name]
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 4), "b": (4, 4), "w": (4, 2)}
    params = {n: jnp.float32(rng.normal(size=s)) for n, s in shapes.items()}
    x = jnp.float32(rng.normal(size=(9, 4)))
    chosen = dict(where=lambda name, leaf: name in ("a", "w"))
    with refuses("layer_inputs", "forward", "'a'", why):
        sparse_optax.layer_inputs(forward, params, x, **chosen)
    with refuses("wanda_masks", "forward", "'a'", why):
        sparse_optax.wanda_masks(forward, params, [x], 0.5, **chosen)
    rest = dict(where=lambda name, leaf: name == "w")
    assert sparse_optax.layer_inputs(forward, params, x, **rest)["w"].shape == (9, 4)


def test_keys_and_queries_of_one_kernel_are_two_uses():
    def forward(p, x):
        h = x @ p["a"]
        return jax.nn.softmax(h @ (x @ p["a"]).T) @ x @ p["w"]

    params = {"a": jnp.eye(4), "w": jnp.ones((4, 2))}
    found = sparse_optax.layer_inputs(forward, params, jnp.ones((9, 4)))
    assert {n: x.shape for n, x in found.items()} == {"a": (18, 4), "w": (9, 4)}


@pytest.mark.parametrize("name", CUTS)
def test_broken_weights_are_named(name):
    broken = {"w": jnp.float32(WEIGHTS).at[1, 1].set(jnp.nan)}
    with refuses(name, "'w'", "not finite", "diverged"):
        CUTS[name](one_layer, broken, BATCHES, 0.5)


def test_a_leaf_summed_over_different_axes_is_refused():
    params = {"w": jnp.ones((4, 4))}

    def both(params, x):
        return x @ params["w"] + x @ params["w"].T

    with refuses("layer_inputs", "forward", "several axes", "multiply"):
        sparse_optax.layer_inputs(both, params, jnp.ones((3, 4)))
