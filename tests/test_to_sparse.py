"""``to_sparse``: sparse matrices for dense layers, and what is measured."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparse_optax
from sparse_optax import export
from sparse_optax.experiments import models

FORMS = ("compacted", "bcsr", "ell")


@pytest.fixture
def fastest(monkeypatch):
    """Makes one form the fastest by far, without measuring."""

    def make(form):
        def least(calls, **options):
            return {name: 1.0 - 0.9 * (name == form) for name in calls}

        module = sys.modules["sparse_optax.export.sparse"]
        monkeypatch.setattr(module, "least_seconds", least)

    return make


def pruned(params, density, seed=0):
    masks = sparse_optax.masks.random_masks(seed, params, density)
    return sparse_optax.sparsify(params, masks)


def hollow(w, live=0.5, seed=0):
    """A kernel of which many inputs and outputs have no weight."""
    rng = np.random.default_rng(seed)
    for axis in (0, 1):
        sides = [1, 1]
        sides[axis] = -1
        w = w * (rng.random(w.shape[axis]) < live).reshape(sides)
    return w * (rng.random(w.shape) < 0.2)


def same(fn, network, params, *args):
    a, b = fn(params, *args), network(network.params, *args)
    assert jax.tree.map(jnp.shape, a) == jax.tree.map(jnp.shape, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


# --- the same function ----------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
def test_lenet_300_100(form, fastest):
    fastest(form)
    apply, params = models.create(
        "lenet-300-100", (28, 28, 1), 10, key=jax.random.key(0)
    )
    params = pruned(params, 0.05)
    params["fc3"]["kernel"] = jnp.asarray(
        hollow(params["fc3"]["kernel"] + 1), jnp.float32
    )
    x = jax.random.normal(jax.random.key(1), (6, 28, 28, 1))
    network = export.to_sparse(apply, params, x)
    forms = {layer.name: layer.form for layer in network.record.layers}
    assert set(forms) == {"fc1/kernel", "fc2/kernel", "fc3/kernel"}
    assert form in forms.values()
    assert all(layer.rows == 6 for layer in network.record.layers)
    same(apply, network, params, x)
    same(apply, network, params, x[:1])  # another batch
    run = jax.jit(network)
    np.testing.assert_allclose(run(network.params, x), apply(params, x), atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_equinox_has_outputs_first(form, fastest):
    fastest(form)
    model = eqx.nn.MLP(20, 12, 30, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    arrays = jax.tree.map(
        lambda w: jnp.asarray(hollow(w), w.dtype) if w.ndim == 2 else w, arrays
    )

    def fn(arrays, x):
        return jax.vmap(eqx.combine(arrays, static))(x)

    x = jax.random.normal(jax.random.key(1), (5, 20))
    network = export.to_sparse(fn, arrays, x)
    assert [layer.shape for layer in network.record.layers] == [
        (20, 30),
        (30, 30),
        (30, 12),
    ]
    assert [layer.form for layer in network.record.layers] == [form] * 3
    same(fn, network, arrays, x)


@pytest.mark.parametrize("form", FORMS)
def test_products_of_any_shape_from_either_side(form, fastest):
    fastest(form)

    def fn(params, x, y):
        first = jnp.einsum("btc,cd->btd", x, params["a"])
        second = params["a"].T @ y  # (d, c) @ (c, n)
        third = jnp.einsum("cd,bct->dbt", params["a"], x.swapaxes(1, 2))
        return jnp.tanh(first), second, third, params["b"] @ y

    params = {
        "a": jnp.asarray(hollow(np.ones((12, 9))), jnp.float32),
        "b": jnp.asarray(hollow(np.ones((12, 12))), jnp.float32),
    }
    keys = jax.random.split(jax.random.key(0))
    x, y = jax.random.normal(keys[0], (2, 7, 12)), jax.random.normal(keys[1], (12, 3))
    network = export.to_sparse(fn, params, x, y)
    rows = {layer.name: (layer.rows, layer.form) for layer in network.record.layers}
    assert rows == {"a": (14, form), "b": (3, form)}
    same(fn, network, params, x, y)


def test_what_is_read_otherwise_stays(fastest):
    fastest("bcsr")

    def fn(params, x):
        tied = x @ params["tied"]
        decay = jnp.sum(jnp.square(params["read"]))
        both = x @ params["square"] + x @ params["square"].T
        return (
            tied @ params["tied"].T,
            x @ params["read"] + decay,
            both,
            params["given"],
        )

    params = {n: jnp.eye(8) for n in ("given", "read", "square", "tied")}
    network = export.to_sparse(fn, params, jnp.ones((2, 8)))
    assert network.record.layers == ()
    same(fn, network, params, jnp.ones((2, 8)))


def test_convolutions_and_what_is_not_sparse_stay(fastest):
    fastest("bcsr")
    apply, params = models.create(
        "lenet-5-caffe", (28, 28, 1), 10, key=jax.random.key(0)
    )
    masks = sparse_optax.masks.random_masks(
        0, params, sparse_optax.budgets.uniform(0.05, overrides={"fc2/kernel": 0.3})
    )
    params = sparse_optax.sparsify(params, masks)
    x = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    network = export.to_sparse(apply, params, x)
    found = {x.name: (x.form, bool(x.seconds)) for x in network.record.layers}
    assert found == {"fc1/kernel": ("bcsr", True), "fc2/kernel": ("dense", False)}
    same(apply, network, params, x)


def test_after_compact(fastest):
    fastest("bcsr")

    def fn(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    params = {
        "a": jnp.asarray(hollow(np.ones((40, 60)), 0.7), jnp.float32),
        "b": jnp.asarray(hollow(np.ones((60, 30)), 0.7, 1), jnp.float32),
    }
    x = jax.random.normal(jax.random.key(0), (3, 40))
    small = sparse_optax.compact(fn, params, x)
    network = export.to_sparse(small, small.params, x)
    assert any(layer.form == "bcsr" for layer in network.record.layers)
    np.testing.assert_allclose(network(network.params, x), fn(params, x), atol=1e-5)


def test_a_module_of_nnx(fastest):
    fastest("bcsr")
    model = nnx.Linear(20, 30, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    state = jax.tree.map(lambda w: jnp.asarray(hollow(w)) if w.ndim == 2 else w, state)

    def fn(state, x):
        return nnx.merge(graph, state)(x)

    x = jax.random.normal(jax.random.key(0), (3, 20))
    network = export.to_sparse(fn, state, x)
    assert network.record.layers[0].form == "bcsr"
    same(fn, network, state, x)


def test_zeros_that_masks_keep_stay_entries(fastest):
    fastest("bcsr")
    params = {"w": jnp.eye(20).at[3, 3].set(0)}
    masks = {"w": jnp.eye(20, dtype=bool)}

    def fn(params, x):
        return x @ params["w"]

    x = jnp.ones((2, 20))
    network = export.to_sparse(fn, params, x, masks=masks)
    assert network.params["w"].matrix.nse == 20
    assert export.to_sparse(fn, params, x).params["w"].matrix.nse == 19
    assert network.record.layers[0].density == 0.05


def test_float64_and_half_precision(fastest):
    fastest("bcsr")

    def fn(params, x):
        return x @ params["w"]

    with jax.enable_x64(True):
        params = {"w": jnp.asarray(hollow(np.ones((30, 20))))}
        x = jax.random.normal(jax.random.key(0), (3, 30), jnp.float64)
        network = export.to_sparse(fn, params, x)
        assert network.params["w"].matrix.dtype == jnp.float64
        np.testing.assert_allclose(
            network(network.params, x), fn(params, x), rtol=1e-12
        )
    params = {"w": jnp.asarray(hollow(np.ones((30, 20))), jnp.bfloat16)}
    network = export.to_sparse(fn, params, jnp.ones((3, 30), jnp.bfloat16))
    assert "bcsr" not in network.record.layers[0].seconds


# --- what is chosen -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("seconds", "form"),
    [
        ({"dense": 1.0, "compacted": 0.8, "bcsr": 0.7}, "bcsr"),
        ({"dense": 1.0, "compacted": 0.6, "bcsr": 0.7, "scipy": 0.1}, "compacted"),
        ({"dense": 1.0, "bcsr": 0.96}, "dense"),  # within what scatters
        ({"dense": 1.0, "scipy": 0.1}, "dense"),  # not a form that JAX runs
    ],
)
def test_the_fastest_that_is_faster_than_dense(monkeypatch, seconds, form):
    module = sys.modules["sparse_optax.export.sparse"]
    monkeypatch.setattr(module, "least_seconds", lambda calls, **options: dict(seconds))

    def fn(params, x):
        return x @ params["w"]

    params = {"w": jnp.asarray(hollow(np.ones((40, 30))), jnp.float32)}
    network = export.to_sparse(fn, params, jnp.ones((3, 40)))
    (layer,) = network.record.layers
    assert layer.form == form
    assert layer.seconds == seconds
    assert f"{1e3 * seconds['dense']:.3g}" in network.record.table()
    same(fn, network, params, jnp.ones((3, 40)))


def test_times_are_measured():
    def fn(params, x):
        return x @ params["w"]

    params = {"w": jnp.asarray(hollow(np.ones((64, 48))), jnp.float32)}
    x = jax.ShapeDtypeStruct((5, 64), jnp.float32)
    network = export.to_sparse(fn, params, x)
    (layer,) = network.record.layers
    assert set(layer.seconds) == {"dense", *FORMS, "scipy"}
    assert all(0 < s < 10 for s in layer.seconds.values())
    won = min(layer.seconds[f] for f in FORMS) * 1.05 < layer.seconds["dense"]
    assert (layer.form != "dense") == won


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
def test_narrow_floats_are_measured_too(dtype):
    """SciPy has none of them: it multiplies in float32."""

    def fn(params, x):
        return x @ params["w"]

    params = {"w": jnp.asarray(hollow(np.ones((64, 48))), dtype)}
    network = export.to_sparse(fn, params, jax.ShapeDtypeStruct((5, 64), dtype))
    (layer,) = network.record.layers
    assert set(layer.seconds) == {"dense", "compacted", "ell", "scipy"}


@pytest.mark.parametrize("form", ["compacted", "ell"])
def test_outputs_keep_narrow_floats(form, fastest):
    fastest(form)

    def fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(hollow(rng.normal(size=(60, 40))), jnp.bfloat16),
        "v": jnp.asarray(hollow(rng.normal(size=(40, 30))), jnp.bfloat16),
    }
    x = jnp.asarray(rng.normal(size=(3, 60)), jnp.bfloat16)
    network = export.to_sparse(fn, params, x)
    assert {layer.form for layer in network.record.layers} == {form}
    found, wanted = network(network.params, x), fn(params, x)
    assert found.dtype == wanted.dtype == jnp.bfloat16
    found, wanted = (np.asarray(y, np.float32) for y in (found, wanted))
    np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())


def test_break_even(monkeypatch):
    found = export.sparse_break_even(40, 30, batch=3, densities=[0.05, 0.5])
    assert found.densities == (0.5, 0.05)
    assert [set(s) for s in found.seconds] == [{"dense", "bcsr", "ell", "scipy"}] * 2
    head = found.table().splitlines()[0].split()
    assert head == ["density", "dense", "bcsr", "ell", "scipy"]
    module = sys.modules["sparse_optax.export.sparse"]
    times = iter([3.0, 1.5, 0.5, 2.0, 0.5, 0.5])
    monkeypatch.setattr(
        module,
        "least_seconds",
        lambda calls, **options: {"dense": 1.0, "bcsr": next(times)},
    )
    assert export.sparse_break_even(9, 9, 1, [0.5, 0.2, 0.1]).density == 0.1
    # It must win at all smaller densities too.
    assert export.sparse_break_even(9, 9, 1, [0.5, 0.2, 0.1]).density == 0.2


def test_ell_pads_outputs_to_the_longest(fastest):
    fastest("ell")
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(30, 6)) * (rng.random((30, 6)) < 0.15)
    kernel[:, 2] = 0
    params = {"w": jnp.asarray(kernel, jnp.float32)}

    def fn(params, x):
        return x @ params["w"]

    network = export.to_sparse(fn, params, jnp.ones((1, 30)))
    most = int((kernel != 0).sum(0).max())
    assert network.params["w"].values.shape == (6, most)
    same(fn, network, params, jax.random.normal(jax.random.key(0), (4, 30)))


def test_no_copy_that_is_too_large_is_tried(fastest, monkeypatch):
    fastest("ell")
    module = sys.modules["sparse_optax.export.sparse"]
    monkeypatch.setattr(module, "_COPY", 3 * 30)

    def fn(params, x):
        return x @ params["w"]

    params = {"w": jnp.eye(30)}
    for rows, form in ((3, "ell"), (4, "dense")):
        network = export.to_sparse(fn, params, jnp.ones((rows, 30)))
        assert network.record.layers[0].form == form


def test_no_win_is_no_density(monkeypatch):
    module = sys.modules["sparse_optax.export.sparse"]
    monkeypatch.setattr(
        module, "least_seconds", lambda calls, **options: {"dense": 1.0, "bcsr": 2.0}
    )
    assert export.sparse_break_even(9, 9, 1, [0.5, 0.1]).density is None


# --- bad input ------------------------------------------------------------------------
def test_bad_input_gets_one_clear_error():
    def fn(params, x):
        return x @ params["w"]

    params, x = {"w": jnp.eye(8)}, jnp.ones((2, 8))
    with pytest.raises(ValueError, match="to_sparse: `fn` must be a function"):
        export.to_sparse(params, params, x)
    with pytest.raises(ValueError, match="to_sparse: the leaf 'w' of `params` is"):
        export.to_sparse(fn, {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32)}, x)
    with pytest.raises(ValueError, match=r"to_sparse: `masks` has shape \(2, 2\)"):
        export.to_sparse(fn, params, x, masks={"w": jnp.ones((2, 2), bool)})
    with pytest.raises(ValueError, match="to_sparse: `masks` holds"):
        export.to_sparse(fn, params, x, masks={"v": jnp.ones((8, 8), bool)})
    (n,) = jax.export.symbolic_shape("n")
    with pytest.raises(ValueError, match="to_sparse: `example` has an axis"):
        export.to_sparse(fn, params, jax.ShapeDtypeStruct((n, 8), jnp.float32))
    network = export.to_sparse(fn, params, x)
    with pytest.raises(ValueError, match="to_sparse: `params` has the structure"):
        network([params["w"]], x)
    with pytest.raises(
        ValueError, match="sparse_break_even: `batch` must be an integer"
    ):
        export.sparse_break_even(4, 4, 0)
    with pytest.raises(ValueError, match="sparse_break_even: `densities` must be"):
        export.sparse_break_even(4, 4, 1, [2.0])
    with pytest.raises(ValueError, match="sparse_break_even: `densities` is empty"):
        export.sparse_break_even(4, 4, 1, [])
