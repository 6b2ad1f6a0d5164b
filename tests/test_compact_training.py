"""``compact_training``: training in small form between cycles."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_optax
from sparse_optax import compact_training, regrowth
from sparse_optax.schedules.timing import NoCycle

STEPS = 40


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def network(seed=0, widths=(12, 24, 16, 3)):
    """Parameters, loss, and batches for ``STEPS`` steps of a multilayer perceptron."""
    rng = np.random.default_rng(seed)
    params = {}
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        params[f"w{i}"] = jnp.asarray(rng.normal(size=(n, m)) / np.sqrt(n))
        params[f"b{i}"] = jnp.asarray(rng.normal(size=m) + 0.3)
    depth = len(widths) - 1

    def loss(params, x, y):
        for i in range(depth):
            x = x @ params[f"w{i}"] + params[f"b{i}"][None]
            x = jax.nn.relu(x) if i < depth - 1 else x
        return jnp.mean((x - y) ** 2)

    batches = (
        jnp.asarray(rng.normal(size=(STEPS, 5, widths[0]))),
        jnp.asarray(rng.normal(size=(STEPS, 5, widths[-1]))),
    )
    return params, loss, batches


def plain(loss, tx, params, state, batches):
    """The same steps, one after another, at full size."""

    @jax.jit
    def step(params, state, *batch):
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for i in range(len(batches[0])):
        params, state, value = step(params, state, *(x[i] for x in batches))
        losses.append(float(value))
    return params, state, losses


def close(a, b, **tolerance):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, **tolerance)


def dying(params, seed=1, density=0.2):
    """Masks under which units have no outgoing or no incoming weights."""
    rng, masks = np.random.default_rng(seed), {}
    for name, x in params.items():
        masks[name] = optax.MaskedNode()
        if x.ndim > 1:
            kept = rng.random(x.shape) < density
            kept &= rng.random(x.shape[:1])[:, None] < 0.6
            masks[name] = jnp.asarray(kept & (rng.random(x.shape[1:]) < 0.8)[None])
    return masks


INNER = {
    "momentum": optax.chain(
        optax.add_decayed_weights(0.01),
        optax.sgd(optax.exponential_decay(0.05, 10, 0.9), momentum=0.9, nesterov=True),
    ),
    "adam": optax.adamw(0.01, weight_decay=0.1),
    "clipped": optax.chain(
        sparse_optax.clip_by_active_norm(0.1), optax.sgd(0.05, momentum=0.9)
    ),
}


# --- the same as plain training -------------------------------------------------------
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("inner", INNER)
def test_what_is_present_is_trained_as_at_full_size(inner, packed):
    """Weights and biases, also of units that nothing reads."""
    params, loss, batches = network()
    masks = dying(params)
    tx = sparse_optax.static_sparse(INNER[inner], masks=masks, packed=packed)
    state = tx.init(params)
    params = sparse_optax.sparsify(params, state)
    training = compact_training(loss, tx, total_steps=STEPS, compile_at=[0])
    found = training(params, state, batches)
    full, small = training.record
    assert (full.steps, small.steps) == (3, STEPS - 3)
    assert small.multiply_adds < 0.8 * full.multiply_adds
    expected, after, losses = plain(loss, tx, params, state, batches)
    close(found.params, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-6)
    # The state too, but for the momentum of missing weights.
    for name, x in params.items():
        there = x != 0 if x.ndim > 1 else np.ones(x.shape, bool)
        pairs = zip(
            optax.tree.get_all_with_path(
                found.state, "trace" if inner != "adam" else "nu"
            ),
            optax.tree.get_all_with_path(after, "trace" if inner != "adam" else "nu"),
            strict=True,
        )
        for (_, a), (_, b) in pairs:
            np.testing.assert_allclose(a[name][there], b[name][there], atol=1e-10)
    assert jax.tree.map(jnp.shape, found.state) == jax.tree.map(jnp.shape, after)


def test_a_bias_that_nothing_reads_decays_by_the_closed_form():
    params, loss, batches = network()
    masks = dying(params)
    masks["w1"] = masks["w1"].at[:5].set(False)  # of these units nothing is read
    rate, decay, beta = 0.05, 0.1, 0.9
    inner = optax.chain(
        optax.add_decayed_weights(decay), optax.sgd(rate, momentum=beta)
    )
    tx = sparse_optax.static_sparse(inner, masks=masks)
    state = tx.init(params)
    params = sparse_optax.sparsify(params, state)
    training = compact_training(loss, tx, total_steps=STEPS, compile_at=[0])
    found = training(params, state, batches)
    assert training.record[1].steps == STEPS - 3
    # m <- beta m + decay w, then w <- w - rate m.
    step = np.array([[1 - rate * decay, -rate * beta], [decay, beta]])
    start = np.stack([params["b0"][:5], np.zeros(5)])
    expected, moment = np.linalg.matrix_power(step, STEPS) @ start
    np.testing.assert_allclose(found.params["b0"][:5], expected, rtol=1e-10)
    trace = optax.tree.get(found.state, "trace")["b0"]
    np.testing.assert_allclose(trace[:5], moment, rtol=1e-9)


METHODS = {
    "set": (sparse_optax.sparse_evolutionary, None, 0),
    "rigl": (sparse_optax.rigl, 0.9, None),  # it forgets the momentum of what grows
}


@pytest.mark.parametrize("name", METHODS)
def test_a_whole_training_with_cycles_is_the_same(name):
    """Masks too. Units die, and come back at a cycle."""
    params, loss, batches = network(widths=(12, 40, 30, 3))
    method, momentum, window = METHODS[name]
    tx = method(
        optax.sgd(0.05, momentum=momentum),
        density=0.06,
        update_period=8,
        update_stop=STEPS,
        prune_rate=0.5,
        key=3,
    )
    state = tx.init(params)
    training = compact_training(
        loss, tx, total_steps=STEPS, window=window, compile_at=range(STEPS)
    )
    found = training(params, state, batches)
    full, *small = training.record
    assert full.steps == 3 + 3 * 4
    assert sum(form.steps for form in small) == STEPS - full.steps
    expected, after, _ = plain(loss, tx, params, state, batches)
    close(found.params, expected, rtol=1e-8, atol=1e-11)
    masks, others = map(sparse_optax.get_masks, (found.state, after))
    close(masks, others)
    first = sparse_optax.get_masks(state)
    came = [
        (~np.asarray(first[n]).any(1) & np.asarray(masks[n]).any(1)).any()
        for n in ("w1", "w2")
    ]
    assert any(came)


def test_sparse_momentum_with_a_window_grows_the_same_weights():
    """Momentum of decay 1/2 forgets what was before the window."""
    params, loss, batches = network(widths=(12, 40, 30, 3))
    tx = sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.05, momentum=0.3),
        density=0.06,
        update_period=20,
        update_stop=STEPS,
        key=3,
    )
    state = tx.init(params)
    training = compact_training(
        loss, tx, total_steps=STEPS, window=14, compile_at=[0, 20]
    )
    found = training(params, state, batches)
    expected, after, _ = plain(loss, tx, params, state, batches)
    masks, others = map(sparse_optax.get_masks, (found.state, after))
    close(masks, others)
    assert sum(form.steps for form in training.record[1:]) == 3 + 17
    close(found.params, expected, rtol=1e-6, atol=1e-9)
    assert sparse_optax.masks.count(masks) == sparse_optax.masks.count(
        sparse_optax.get_masks(state)
    )
    assert int(after.skipped) == int(found.state.skipped) == 0


def test_a_window_of_the_whole_period_is_plain_training():
    params, loss, batches = network()
    tx = sparse_optax.sparse_momentum_regrow(
        optax.sgd(0.05, momentum=0.9),
        density=0.2,
        update_period=10,
        update_stop=STEPS,
        key=0,
    )
    state = tx.init(params)
    training = compact_training(
        loss, tx, total_steps=STEPS, window=10, compile_at=range(STEPS)
    )
    batches = tuple(x[:30] for x in batches)
    found = training(params, state, batches)
    assert [form.steps for form in training.record] == [30]
    expected, after, _ = plain(loss, tx, params, state, batches)
    close((found.params, found.state), (expected, after), rtol=1e-12, atol=1e-15)


# --- forms ----------------------------------------------------------------------------
def test_one_program_serves_many_cycles_and_calls():
    params, loss, batches = network(widths=(60, 120, 60, 3))
    tx = sparse_optax.sparse_evolutionary(
        optax.sgd(0.02), density=0.02, update_period=8, update_stop=STEPS, key=0
    )
    state, whole = tx.init(params), tuple(x for x in batches)
    training = compact_training(loss, tx, total_steps=STEPS, window=0, compile_at=[0])
    for start in range(0, STEPS, 4):
        now = tuple(x[start : start + 4] for x in whole)
        params, state, _, losses = training(params, state, now)
        assert losses.shape == (4,)
        assert sparse_optax.masks.count(sparse_optax.get_masks(state)) == 144 + 144 + 3
    full, small = training.record
    assert full.steps + small.steps == STEPS
    assert small.steps > STEPS / 2
    assert len(training.table().splitlines()) == 3


def test_a_size_is_compiled_where_it_pays(monkeypatch):
    module = sys.modules["sparse_optax.export.compaction.training"]
    compiled = module._Task._compiled

    def run(seconds):
        def cost(*args):
            return compiled(*args)[0], seconds

        monkeypatch.setattr(module._Task, "_compiled", cost)
        params, loss, batches = network(widths=(60, 120, 60, 3))
        tx = sparse_optax.sparse_evolutionary(
            optax.sgd(0.02),
            density=0.02,
            update_period=8,
            update_stop=STEPS,
            prune_rate=0.0,
            key=0,
        )
        training = compact_training(loss, tx, total_steps=STEPS, window=0)
        training(params, tx.init(params), batches)
        return training.record

    assert [form.steps for form in run(1e6)] == [STEPS]
    monkeypatch.setattr(
        module._Task, "_gain", lambda self, form, work: float(form is self.full)
    )
    assert [form.steps for form in run(1e6)] == [STEPS]
    full, small = run(4.5)
    # A gain of a second a step: it pays after the first five steps.
    assert full.steps == 3 + 3 * 4
    assert small.steps == STEPS - full.steps
    full, small = run(16)  # half of it is taken for that of a small form
    assert full.steps == 3 + 5 + 3 * 4
    assert [form.steps for form in run(60)] == [STEPS]


def test_batches_are_made_from_data_that_stays():
    params, loss, batches = network()
    masks = dying(params)
    tx = sparse_optax.static_sparse(optax.sgd(0.05), masks=masks)
    x, y = (jnp.concatenate(list(b)) for b in batches)
    rows = jnp.arange(len(x)).reshape(STEPS, -1)
    training = compact_training(
        loss,
        tx,
        total_steps=STEPS,
        batch=lambda rows, x, y: (x[rows], y[rows]),
        compile_at=[0],
    )
    state = tx.init(params)
    found = training(params, state, rows, x, y)
    again = compact_training(loss, tx, total_steps=STEPS, compile_at=[0])
    close(found.params, again(params, state, batches).params, rtol=1e-12)
    assert len(training.record) == 2


def convolutions(width=6):
    """A loss of two convolutions with a norm between them, and its parameters."""
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.normal(size=(3, 3, 2, width)) / 3},
        "b": {"kernel": rng.normal(size=(3, 3, width, 4)) / 6},
        "norm": {"scale": np.ones(width), "bias": np.full(width, 0.1)},
    }
    stats = {"norm": {"mean": np.zeros(width), "var": np.ones(width)}}

    def conv(x, w):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w["kernel"], (1, 1), "SAME", dimension_numbers=layout
        )

    def loss(params, stats, x):
        h = conv(x, params["a"])
        mean, var = h.mean((0, 1, 2)), h.var((0, 1, 2))
        old = stats["norm"]
        new = {"mean": 0.9 * old["mean"] + 0.1 * mean, "var": 0.9 * old["var"] + var}
        h = (h - mean) / jnp.sqrt(var + 1e-3) * params["norm"]["scale"]
        h = jax.nn.relu(h + params["norm"]["bias"])
        return jnp.mean(jnp.sin(conv(h, params["b"]))), {"norm": new}

    x = jnp.asarray(rng.normal(size=(12, 3, 6, 6, 2)))
    return *jax.tree.map(jnp.asarray, (params, stats)), loss, x


def test_running_statistics_of_channels_that_are_there():
    params, stats, loss, x = convolutions()
    masks = jax.tree.map(
        lambda w: jnp.ones(w.shape, bool) if w.ndim > 2 else optax.MaskedNode(), params
    )
    masks["b"]["kernel"] = masks["b"]["kernel"].at[:, :, 1:3].set(False)
    tx = sparse_optax.static_sparse(optax.sgd(0.05, momentum=0.9), masks=masks)
    state = tx.init(params)
    params = sparse_optax.sparsify(params, state)
    training = compact_training(loss, tx, total_steps=12, compile_at=[0])
    with jax.numpy_rank_promotion("allow"):
        found = training(params, state, x, stats=stats)
        now, after, own = params, state, stats
        for batch in x:
            (_, own), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
                now, own, batch
            )
            updates, after = jax.jit(tx.update)(gradient, after, now)
            now = optax.apply_updates(now, updates)
    assert training.record[1].steps == 9
    assert training.record[1].multiply_adds < training.record[0].multiply_adds
    close(found.params, now, rtol=1e-8, atol=1e-11)
    there = np.array([0, 3, 4, 5])
    for name in ("mean", "var"):
        a, b = found.stats["norm"][name], own["norm"][name]
        np.testing.assert_allclose(a[there], b[there], rtol=1e-8)


def test_what_was_given_stays_as_it_is():
    params, loss, batches = network()
    tx = sparse_optax.static_sparse(optax.sgd(0.05), masks=dying(params))
    state = tx.init(params)
    before = jax.tree.map(np.array, (params, state))
    compact_training(loss, tx, total_steps=STEPS, compile_at=[0])(
        params, state, batches
    )
    close((params, state), before)


# --- bad input ------------------------------------------------------------------------
def test_bad_input_gets_one_clear_error():
    params, loss, batches = network()
    tx = sparse_optax.static_sparse(optax.sgd(0.05), masks=dying(params))
    state = tx.init(params)
    make = functools.partial(compact_training, loss, total_steps=STEPS)
    match = r"compact_training: `fn` must be a function"
    with pytest.raises(ValueError, match=match):
        compact_training(params, tx, total_steps=3)
    with pytest.raises(ValueError, match=r"compact_training: `tx` must be an optax"):
        make(loss)
    with pytest.raises(ValueError, match=r"`total_steps` must be an integer of at"):
        compact_training(loss, tx, total_steps=0)
    with pytest.raises(ValueError, match=r"`window` must be an integer of at least 0"):
        make(tx, window=-1)
    with pytest.raises(ValueError, match=r"`batch` must be a function"):
        make(tx, batch=3)
    with pytest.raises(ValueError, match=r"`compile_at` must be a sequence"):
        make(tx, compile_at=3)
    with pytest.raises(ValueError, match=r"`compile_at` must be an integer of at"):
        make(tx, compile_at=[-1])
    with pytest.raises(ValueError, match=r"compact_training: `batches` must hold"):
        make(tx)(params, state, (batches[0], batches[1][:3]))
    with pytest.raises(ValueError, match=r"compact_training: `batches` must hold"):
        make(tx)(params, state, ())
    with pytest.raises(ValueError, match=r"compact_training: `state` holds no masks"):
        make(optax.sgd(0.1))(params, optax.sgd(0.1).init(params), batches)
    with pytest.raises(ValueError, match=r"compact_training: `fn` must be a function"):
        compact_training(lambda p, x, y: x @ p["w0"], tx, total_steps=STEPS)(
            params, state, batches
        )
    hidden = sparse_optax.top_kast(optax.sgd(0.1), density=0.5, backward_density=0.8)
    match = r"trains missing weights too"
    with pytest.raises(ValueError, match=match):
        make(hidden)(params, hidden.init(params), batches)
    many = optax.MultiSteps(tx, 4)
    many = optax.GradientTransformationExtraArgs(many.init, many.update)
    with pytest.raises(ValueError, match=r"each step must be an update"):
        make(many)(params, many.init(params), batches)

    def deaf(updates, state, params=None):
        return tx.update(updates, state, params)

    silent = optax.GradientTransformation(tx.init, deaf)
    with pytest.raises(ValueError, match=r"does not hand extra arguments on"):
        make(silent)(params, state, batches)
    rows = sparse_optax.static_sparse(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1), masks=dying(params)
    )
    with pytest.raises(ValueError, match=r"it must work entry by entry"):
        make(rows, compile_at=[0])(params, rows.init(params), batches)


def test_no_cycle_opens_where_the_caller_says_so():
    """``regrow_between`` of ``update``; what it tells is when cycles are due."""
    params = {"w": jnp.arange(1.0, 21).reshape(4, 5)}
    tx = regrowth.regrow(
        optax.sgd(0.1),
        density=0.5,
        prune=regrowth.prune.magnitude,
        redistribute=regrowth.redistribute.none,
        grow=regrowth.grow.random,
        update_period=1,
        update_stop=10,
        key=0,
    )
    state = tx.init(params)
    _, state = tx.update(params, state, params)
    between = NoCycle()
    updates, after = tx.update(params, state, params, regrow_between=between)
    close(sparse_optax.get_masks(after), sparse_optax.get_masks(state))
    (due,) = between.due
    assert due(jnp.arange(12)).tolist() == [False] + [True] * 9 + [False] * 2
    assert int(after.count) == 2
    _, moved = tx.update(params, state, params)
    assert (moved.regrow_masks["w"] != state.regrow_masks["w"]).any()
    np.testing.assert_array_equal(
        (params["w"] + updates["w"]) != 0, state.regrow_masks["w"]
    )
