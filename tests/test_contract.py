"""The contract suite: what every transformation must do to be native in Optax.

Each test is a property and runs once for each row of ``contract.ROWS``.
"""

import functools
import inspect
import pathlib
import pickle
import re
import sys
from typing import Any, NamedTuple

import contract
import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import (
    DENSITY,
    LR,
    PERIOD,
    advance,
    arguments,
    build,
    injected,
    last,
    train,
)
from flax import nnx
from helpers import at_step, network, random_gradients, refuses

import sparse_optax
from sparse_optax import budgets, layers

P = jax.sharding.PartitionSpec
REPLICATED = P()
SHAPES = ((6, 5), (5, 4))
ONE = ((6, 5),)
# The first cycle opens the update after PERIOD; one more step follows it.
STEPS = PERIOD + 2

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: (
        COMPILED.append(event) if event.endswith("backend_compile_duration") else None
    )
)


def per_row(function):
    """Caches by row: programs and runs that several properties look at."""
    seen = {}

    @functools.wraps(function)
    def cached(row):
        if row.name not in seen:
            seen[row.name] = function(row)
        return seen[row.name]

    return cached


def close(tree, other, *, exact=False):
    """Equal structures and values; integers and masks to the bit."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        if exact or a.dtype.kind in "biu":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def types(tree):
    return [jax.typeof(x) for x in jax.tree.leaves(tree)]


def plain(row, tx):
    """The update function without jit, or with it where that would be slow."""
    return tx.update if row.eager else jax.jit(tx.update)


def keeps_promise(row, step, *, density=DENSITY, exact=True):
    row.family.promise(step, row.family.budget(density, step.params), exact)


class Main(NamedTuple):
    """The row's jitted update on two kernels, and its traces."""

    tx: Any
    update: Any
    traces: list


@per_row
def main(row):
    tx, traces = build(row), []

    def update(grads, state, params):
        traces.append(0)
        return tx.update(grads, state, params)

    return Main(tx, jax.jit(update), traces)


@per_row
def hundred(row):
    """A hundred steps on two kernels, by random gradients."""
    params = network(SHAPES)
    tx, update, _ = main(row)
    return list(
        train(update, params, tx.init(params), random_gradients(1, params, 100))
    )


@per_row
def alone(row):
    """A few steps without jit on one kernel."""
    params = network(ONE)
    tx = build(row)
    return list(
        train(
            plain(row, tx), params, tx.init(params), random_gradients(2, params, STEPS)
        )
    )


@per_row
def ready(row):
    """The transformation with its update compiled, on one kernel."""
    tx = build(row)
    update = jax.jit(tx.update)

    def call(grads, state, params=None):
        with jax.disable_jit(False):
            return update(grads, state, params)

    return optax.GradientTransformation(tx.init, call)


def wrapped(wrap, row):
    """A wrapper of Optax around the row: its state, and its update function.

    The wrapper's own conditions run in Python, around the compiled update of the row;
    that the whole can be traced, and gives the state its types back, is checked here.
    """
    params = network(ONE)
    whole, outside = wrap(build(row)), wrap(ready(row))
    state = whole.init(params)
    _, after = jax.eval_shape(whole.update, params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)

    def update(grads, state, params):
        with jax.disable_jit():
            return outside.update(grads, state, params)

    return state, update


# --- jit, types, recompilation --------------------------------------------------------


@contract.contract
def test_jit_equals_no_jit(row):
    tx, params = ready(row), network(ONE)
    grads = random_gradients(2, params, STEPS)
    for a, b in zip(
        train(tx.update, params, tx.init(params), grads), alone(row), strict=True
    ):
        close(a.after, b.after)
        close(a.new_state, b.new_state)


@contract.contract
def test_one_trace_for_all_steps(row):
    """Neither a dtype nor a weak type drifts."""
    assert len(hundred(row)) == 100
    assert len(main(row).traces) == 1


@contract.contract
def test_one_compilation_for_all_steps(row):
    """Nor is the state placed otherwise after a step than before the first."""
    assert len(hundred(row)) == 100
    assert main(row).update._cache_size() == 1


@contract.contract
def test_steps_without_jit_compile_once(row):
    params = network(ONE)
    tx = build(row)
    compiled = []
    for _ in train(
        tx.update, params, tx.init(params), random_gradients(2, params, STEPS + 1)
    ):
        compiled.append(len(COMPILED))
    # Before the last step each branch has run once.
    assert compiled[-1] == compiled[-2]


@contract.contract
def test_types_of_the_state_are_stable(row):
    first, *_, final = hundred(row)
    before = types(first.state)
    assert before == types(first.new_state) == types(final.new_state)
    assert jax.tree.structure(first.state) == jax.tree.structure(final.new_state)
    assert types(first.params) == types(first.updates)


@contract.contract
def test_init_of_shapes(row):
    params = network(SHAPES)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tx = main(row).tx

    def shapes(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    state = shapes(tx.init(params))
    assert jax.eval_shape(tx.init, params) == state
    assert shapes(jax.eval_shape(tx.init, abstract)) == state
    updates, after = jax.eval_shape(tx.update, abstract, state, abstract)
    assert (shapes(updates), shapes(after)) == (abstract, state)


# --- the interface --------------------------------------------------------------------


@contract.contract
def test_unknown_extra_arguments_are_accepted(row):
    for tx in (contract.bare(row), main(row).tx):
        assert isinstance(tx, optax.GradientTransformationExtraArgs)
    first = alone(row)[0]
    tx = build(row)
    update = functools.partial(plain(row, tx), loss=jnp.ones([]), unknown=None)
    close(advance(update, *first[1:4]).updates, first.updates)


@contract.contract
def test_missing_params(row):
    params = network(ONE)
    tx = contract.bare(row)
    with refuses(row.factory.__name__, "params", "None"):
        tx.update(params, tx.init(params))


@contract.contract
def test_map_params_changes_nothing(row):
    state = hundred(row)[0].new_state
    close(optax.tree.map_params(main(row).tx, lambda x: x, state), state, exact=True)


@contract.contract
def test_map_params_gives_partition_specs(row):
    """An entry shaped like a weight takes that weight's spec; others are replicated."""
    params = network(SHAPES)
    state = hundred(row)[0].new_state
    specs = jax.tree.map(lambda p: P(*map(str, p.shape)), params)

    def place(x, spec=REPLICATED):
        # Counts of a leaf and packed masks stand in its place without its shape.
        if isinstance(x, optax.MaskedNode):
            return x
        return spec if x.ndim == len(spec) else P()

    by_state = optax.tree.map_params(
        main(row).tx,
        place,
        state,
        specs,
        transform_non_params=place,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
    flat = jax.tree.leaves(by_state, is_leaf=lambda x: isinstance(x, P))
    found = set()
    for (path, x), spec in zip(jax.tree.leaves_with_path(state), flat, strict=True):
        layer = layers.path_name(path).split("/")[-2:]
        like = params.get(layer[0], {}).get(layer[-1])
        is_weight = like is not None and like.shape == x.shape
        assert spec == (P(*map(str, x.shape)) if is_weight else P())
        found |= {x.shape} if is_weight else set()
    assert found


@contract.contract
def test_injected_equals_plain(row):
    """Rebuilt in each update, with traced values, it does the same."""
    steps = alone(row)
    tx = build(row, make=injected(row))
    state = tx.init(steps[0].params)
    values = optax.tree.get(state, "hyperparams")
    assert set(values) == set(row.injected)
    jax.eval_shape(tx.update, steps[0].grads, state, steps[0].params)
    update = plain(row, tx)
    for wanted in steps:
        step = advance(update, wanted.params, state, wanted.grads)
        close(step.updates, wanted.updates)
        state = step.new_state


def _constant(value):
    return lambda count: jnp.full_like(count, value, jnp.float32)


@contract.contract
def test_constant_schedule(row):
    steps = alone(row)
    assert row.scheduled
    values = arguments(row)
    tx = build(row, **{n: _constant(values[n]) for n in row.scheduled})
    state, update = tx.init(steps[0].params), plain(row, tx)
    for wanted in steps:
        step = advance(update, wanted.params, state, wanted.grads)
        close(step.updates, wanted.updates)
        state = step.new_state


# --- where it stands, how much takes part ---------------------------------------------


@contract.contract
def test_stated_position_keeps_the_promise_for_100_steps(row):
    for step in hundred(row):
        keeps_promise(row, step)


@contract.contract
def test_wrong_position(row):
    params = network(ONE)
    tx = build(row, place="wrong")
    grads = random_gradients(2, params, STEPS)
    for step in train(plain(row, tx), params, tx.init(params), grads):
        keeps_promise(row, step)


@contract.contract
def test_wrong_position_is_reported(row):
    params = network(SHAPES)
    tx = build(row, place="wrong")
    grads = random_gradients(2, params, 3 * PERIOD)
    steps = train(jax.jit(tx.update), params, tx.init(params), grads)
    row.family.reported(last(steps))


def _misplaced(state):
    return int(optax.tree.get(state, "misplaced"))


@contract.contract
def test_right_position_is_not_reported(row):
    """Nor in wrappers that average weights, or leave steps out, or move them."""
    assert _misplaced(hundred(row)[-1].new_state) == 0
    start, tx = network(ONE), ready(row)
    grads = random_gradients(2, start, 6 * PERIOD)
    broken = jax.tree.map(lambda g: g.at[1].set(jnp.nan), grads)
    for wrap, gradients in (
        (lambda tx: optax.MultiSteps(tx, 2), grads),
        (lambda tx: optax.apply_if_finite(tx, 3), broken),
        (lambda tx: optax.contrib.sam(tx, _adversary()), grads),
    ):
        whole = wrap(tx)
        state = whole.init(start)
        with jax.disable_jit():
            step = last(train(whole.update, start, state, gradients))
        assert _misplaced(step.new_state) == 0
    for sync in (2, PERIOD + 1):
        params, whole = (
            optax.LookaheadParams.init_synced(start),
            optax.lookahead(tx, sync, 0.5),
        )
        state = whole.init(params)
        for t in range(3 * PERIOD):
            updates, state = whole.update(at_step(grads, t), state, params)
            params = optax.apply_updates(params, updates)
        assert _misplaced(state) == 0


@contract.contract
def test_never_above_the_budget(row):
    """Counted on what took part, at each step and on the weights themselves."""
    budget = row.family.budget(DENSITY, network(SHAPES))
    assert budget == 15
    seen = [contract.total(row.family.chosen(s)) for s in hundred(row)]
    assert max(seen) == budget
    nonzero = [
        contract.total(
            w != 0 for w in contract.sparse(sparse_optax.sparsify(s.after, masks))
        )
        for s in hundred(row)[::PERIOD]
        for masks in [row.family.masks(s.new_state, s.after)]
    ]
    assert max(nonzero) == budget


@contract.contract
def test_least_density(row):
    """One weight of thirty."""
    params = network(ONE)
    tx = build(row, density=1 / 30)
    grads = random_gradients(2, params, STEPS)
    for step in train(plain(row, tx), params, tx.init(params), grads):
        assert row.family.budget(1 / 30, params) == 1
        keeps_promise(row, step, density=1 / 30)


@contract.contract
def test_zero_density(row):
    """A schedule may let nothing pass."""
    params = network(ONE)
    tx = build(row, density=lambda count: jnp.int32(0))
    grads = random_gradients(2, params, STEPS)
    for step in train(plain(row, tx), params, tx.init(params), grads):
        row.family.promise(step, 0, True)


@contract.contract
def test_full_density(row):
    """All weights take part; before the first cycle nothing tells it from dense."""
    params = network(ONE)
    tx, other = build(row, density=1.0), row.place.dense(row.optimizer)
    grads = random_gradients(2, params, STEPS)
    state, update = tx.init(params), plain(row, tx)
    dense = list(train(other.update, params, other.init(params), grads))
    for t, step in enumerate(train(update, params, state, grads)):
        keeps_promise(row, step, density=1.0)
        assert all(m.all() for m in row.family.chosen(step))
        if t < PERIOD:
            close(step.after, dense[t].after)


@contract.contract
def test_all_scores_equal(row):
    """Ties never let more take part than the budget."""
    params = jax.tree.map(jnp.ones_like, network(SHAPES))
    tx, update, _ = main(row)
    state = tx.init(params)
    for _ in range(STEPS):
        step = advance(update, params, state, jax.tree.map(jnp.ones_like, params))
        assert contract.total(row.family.chosen(step)) == 15
        keeps_promise(row, step)
        params, state = step.after, step.new_state


@contract.contract
def test_quadratic_converges_on_the_kept_weights(row):
    """A target with as many large weights as may be kept; biases as well."""
    params = network(SHAPES)
    rng = np.random.default_rng(5)
    places = rng.permutation(50) < 15
    values = np.where(places, rng.choice([-1, 1], 50) * rng.uniform(1, 2, 50), 0)
    targets = [values[:30].reshape(6, 5), values[30:].reshape(5, 4)]
    target = network(SHAPES, targets)
    tx, update, _ = main(row)
    state = tx.init(params)
    for _ in range(300):
        grads = jax.tree.map(lambda w, t: w - t, params, target)
        step = advance(update, params, state, grads)
        params, state = step.after, step.new_state
    kept = row.family.chosen(step)
    assert contract.total(kept) == 15
    weights = zip(contract.sparse(params), contract.sparse(target), kept, strict=True)
    for w, t, m in weights:
        np.testing.assert_allclose(w[m], t[m], atol=0.03)
    for a, b in zip(contract.dense(params), contract.dense(target), strict=True):
        np.testing.assert_allclose(a, b, atol=0.03)


# --- dtypes ---------------------------------------------------------------------------


def steps_in(row, dtype):
    cast = functools.partial(jax.tree.map, lambda x: x.astype(dtype))
    params = cast(network(ONE))
    tx = build(row)
    grads = cast(random_gradients(2, params, STEPS))
    return train(plain(row, tx), params, tx.init(params), grads)


def dtypes_are_kept(row, steps, dtype):
    for step in steps:
        assert {x.dtype for x in jax.tree.leaves(step.updates)} == {jnp.dtype(dtype)}
        assert types(step.new_state) == types(step.state)
        keeps_promise(row, step, exact=False)


@contract.contract
def test_bfloat16(row):
    dtypes_are_kept(row, steps_in(row, jnp.bfloat16), jnp.bfloat16)


@contract.contract
def test_float16(row):
    dtypes_are_kept(row, steps_in(row, jnp.float16), jnp.float16)


@contract.contract
def test_float32(row):
    dtypes_are_kept(row, alone(row), jnp.float32)


@contract.contract
def test_float64(row):
    """Types alone: nothing else tells it from float32."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(np.float64), network(ONE))
        tx = build(row)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, params, state, params)
        dtypes = [x.dtype for x in jax.tree.leaves(after)]
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float64")}
        assert dtypes == [x.dtype for x in jax.tree.leaves(state)]


# --- scan, cond, donation -------------------------------------------------------------


@per_row
def scanned(row):
    """``(carry, gradients, flags) -> carry``: a scan over conditional steps."""
    tx = build(row)

    def step(carry, inputs):
        grads, go = inputs

        def act(carry):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.cond(go, act, lambda carry: carry, carry), None

    run = jax.jit(
        lambda carry, grads, flags: jax.lax.scan(step, carry, (grads, flags))[0],
        donate_argnums=0,
    )

    def start():
        params = network(ONE)
        return jax.tree.map(
            lambda x: jnp.array(x, copy=True), (params, tx.init(params))
        )

    return run, start


@contract.contract
def test_scan_over_the_state(row):
    run, start = scanned(row)
    grads = random_gradients(2, network(ONE), STEPS)
    params, state = run(start(), grads, jnp.ones(STEPS, bool))
    final = alone(row)[-1]
    close((params, state), (final.after, final.new_state))


@contract.contract
def test_cond_over_the_state(row):
    """Steps that a condition leaves out have not happened."""
    run, start = scanned(row)
    grads = random_gradients(2, network(ONE), STEPS)
    order = jnp.array([0, 1, 1, 2, 3, 4, 4][:STEPS])
    flags = np.diff(np.asarray(order), prepend=-1) > 0
    params, state = run(start(), at_step(grads, order), jnp.asarray(flags))
    final = alone(row)[int(flags.sum()) - 1]
    close((params, state), (final.after, final.new_state))


@contract.contract
def test_donated_state(row):
    """The state may be given away: no two of its entries share a buffer."""
    run, start = scanned(row)
    tx, params = build(row), network(ONE)
    grads = random_gradients(2, params, STEPS)
    wanted = run(start(), grads, jnp.ones(STEPS, bool))
    state = tx.init(params)
    mine = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    got = run((mine, state), grads, jnp.ones(STEPS, bool))
    assert all(x.is_deleted() for x in jax.tree.leaves(mine))
    close(got, wanted, exact=True)
    # The first parameters were not given away with the state.
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


# --- vmap -----------------------------------------------------------------------------

# (seed, density) of four members.
MEMBERS = ((0, DENSITY), (1, DENSITY), (0, 0.1), (0, 0.6))


@per_row
def members(row):
    """A few steps of all members in one compiled program, and its traces."""
    txs = [build(row, key=s, density=d, make=injected(row)) for s, d in MEMBERS]
    params = [row.family.member(network(ONE), seed) for seed, _ in MEMBERS]
    states = [tx.init(p) for tx, p in zip(txs, params, strict=True)]
    traces = []

    def update(grads, state, params):
        traces.append(0)
        return txs[0].update(grads, state, params)

    together = jax.jit(jax.vmap(update, in_axes=(None, 0, 0)))
    stacked = [jax.tree.map(lambda *x: jnp.stack(x), *t) for t in (params, states)]
    grads = random_gradients(2, params[0], STEPS)
    return params, list(train(together, *stacked, grads)), traces


def member_equals_its_own_run(row, index):
    """Returns what took part in its last step."""
    params, steps, traces = members(row)
    assert len(traces) == 1
    seed, density = MEMBERS[index]
    tx = build(row, key=seed, density=density)
    grads = jax.tree.map(lambda *g: jnp.stack(g), *(s.grads for s in steps))
    own = list(train(plain(row, tx), params[index], tx.init(params[index]), grads))
    for step, wanted in zip(steps, own, strict=True):
        close(at_step(step.after, index), wanted.after)
    chosen = row.family.chosen(own[-1])
    assert contract.total(chosen) == row.family.budget(density, params[index])
    return chosen


@contract.contract
def test_vmap_over_seeds(row):
    (one,), (two,) = (member_equals_its_own_run(row, i) for i in (0, 1))
    assert (one != two).any()


@contract.contract
def test_vmap_over_densities(row):
    counts = [contract.total(member_equals_its_own_run(row, i)) for i in (2, 0, 3)]
    assert counts == [3, 9, 18]


# --- containers -----------------------------------------------------------------------


class Layer(NamedTuple):
    """A container whose fields are parameters."""

    kernel: Any
    bias: Any


@per_row
def odd(row):
    """A few steps on a tree of every container, with holes and a scalar."""
    rng = np.random.default_rng(7)
    kernel = jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)
    params = [
        Layer(kernel, jnp.ones(5)),
        {"bias": None, "temperature": jnp.ones([])},
        (),
    ]
    tx = build(row)
    grads = random_gradients(2, params, STEPS)
    return list(train(plain(row, tx), params, tx.init(params), grads))


@contract.contract
def test_lists_and_named_tuples(row):
    for step in odd(row):
        for tree in (step.updates, step.after):
            assert jax.tree.structure(tree) == jax.tree.structure(step.params)
        assert isinstance(step.after[0], Layer)
        keeps_promise(row, step)
    masks = row.family.masks(step.new_state, step.after)
    sparsified = sparse_optax.sparsify(step.after, masks)
    assert int((sparsified[0].kernel != 0).sum()) == 9


@contract.contract
def test_none_leaves(row):
    for step in odd(row):
        assert step.updates[1]["bias"] is None
        assert step.after[1]["bias"] is None


@contract.contract
def test_scalar_leaves(row):
    """A scalar trains as the optimizer trains it alone."""
    steps = odd(row)
    other = row.optimizer
    scalar = {"temperature": steps[0].params[1]["temperature"]}
    state = other.init(scalar)
    for step in steps:
        grads = {"temperature": step.grads[1]["temperature"]}
        updates, state = other.update(grads, state, scalar)
        scalar = optax.apply_updates(scalar, updates)
        close(step.after[1]["temperature"], scalar["temperature"])


@contract.contract
def test_empty_trees(row):
    for empty in ({}, (), {"a": None}):
        tx = build(row)
        state = tx.init(empty)
        for _ in range(PERIOD + 1):
            updates, state = tx.update(empty, state, empty)
            assert updates == empty
        counts = [x for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
        assert PERIOD + 1 in [int(x) for x in counts if x.ndim == 0]


# --- state as data --------------------------------------------------------------------


def goes_on_from(row, state):
    """The step after the first cycle, from a state that was stored."""
    steps = hundred(row)
    wanted = steps[PERIOD + 1]
    assert jax.tree.structure(state) == jax.tree.structure(wanted.state)
    assert types(state) == types(wanted.state)
    # Copied: an array that is tied to its device would compile the step again.
    state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
    step = advance(main(row).update, wanted.params, state, wanted.grads)
    close((step.after, step.new_state), (wanted.after, wanted.new_state), exact=True)


@contract.contract
def test_flatten_and_unflatten(row):
    leaves, structure = jax.tree.flatten(hundred(row)[PERIOD + 1].state)
    assert all(isinstance(x, jax.Array) for x in leaves)
    goes_on_from(row, jax.tree.unflatten(structure, leaves))


@contract.contract
def test_pickle(row):
    state = hundred(row)[PERIOD + 1].state
    goes_on_from(row, pickle.loads(pickle.dumps(state)))


@contract.contract
def test_orbax(row, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    state = hundred(row)[PERIOD + 1].state
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        fresh = main(row).tx.init(network(SHAPES))
        goes_on_from(row, checkpointer.restore(tmp_path / "state", fresh))


# --- broken numbers -------------------------------------------------------------------


@contract.contract
def test_nan_gradient(row):
    params = network(SHAPES)
    tx, update, _ = main(row)
    state = tx.init(params)
    grads = random_gradients(2, params, PERIOD + 1)
    at = PERIOD - row.family.delay
    steps = list(train(update, params, state, at_step(grads, slice(0, at))))
    chosen = row.family.chosen(steps[-1])
    (index, *_) = np.argwhere(chosen[1])
    grad = at_step(grads, at)
    kernel = grad["Dense_1"]["kernel"].at[tuple(index)].set(jnp.nan)
    grad["Dense_1"] = grad["Dense_1"] | {"kernel": kernel}
    step = advance(update, steps[-1].after, steps[-1].new_state, grad)
    for t in range(at + 1, PERIOD + 1):
        step = advance(update, step.after, step.new_state, at_step(grads, t))
    assert contract.total(row.family.chosen(step)) <= 15
    row.family.broken(step, "Dense_1", tuple(index))


@per_row
def finite(row):
    return wrapped(lambda tx: optax.apply_if_finite(tx, 3), row)


@contract.contract
def test_apply_if_finite(row):
    """A broken gradient, where a cycle is due, has not happened."""
    state, update = finite(row)
    params = network(ONE)
    grads = random_gradients(2, params, STEPS)
    for value in (jnp.nan, jnp.inf):
        *_, before = train(update, params, state, at_step(grads, slice(0, PERIOD)))
        grad = at_step(grads, PERIOD)
        broken = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(value), grad)  # noqa: B023
        step = advance(update, before.after, before.new_state, broken)
        close(step.after, before.after, exact=True)
        inner = step.new_state.inner_state
        close(inner, before.new_state.inner_state, exact=True)
        assert int(step.new_state.total_notfinite) == 1
        for t in (PERIOD, PERIOD + 1):
            step = advance(update, step.after, step.new_state, at_step(grads, t))
            keeps_promise(row, step)
        wanted = alone(row)[-1]
        close(
            (step.after, step.new_state.inner_state), (wanted.after, wanted.new_state)
        )


@contract.contract
def test_float16_loss_scaling(row):
    """The scaled loss overflows once, where a cycle is due: it has not happened."""
    start, update = finite(row)
    params = network(ONE)
    target = at_step(random_gradients(6, params, 1), 0)

    def loss(params, scale):
        half = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float16))
        pairs = zip(
            jax.tree.leaves(half(params)), jax.tree.leaves(half(target)), strict=True
        )
        return scale.astype(jnp.float16) * sum(jnp.sum((w - t) ** 2) for w, t in pairs)

    gradient = jax.jit(jax.grad(loss))

    def run(scales):
        params, state = network(ONE), start
        for scale in scales:
            scaled = gradient(params, jnp.float32(scale))
            unscaled = jax.tree.map(lambda g: g / scale, scaled)  # noqa: B023
            step = advance(update, params, state, unscaled)
            yield step
            params, state = step.after, step.new_state

    one = last(run([1.0] * STEPS))
    scaled = list(run([256.0] * PERIOD + [2.0**16] + [128.0] * 2))
    skipped = scaled[PERIOD]
    assert not all(np.isfinite(g).all() for g in jax.tree.leaves(skipped.grads))
    close(skipped.after, skipped.params, exact=True)
    for step in scaled[:PERIOD] + scaled[PERIOD + 1 :]:
        keeps_promise(row, step)
    chosen = [row.family.chosen(s) for s in (one, scaled[-1])]
    close(*chosen)
    for a, b in zip(
        *(jax.tree.leaves(s.after) for s in (one, scaled[-1])), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


# --- other wrappers of Optax ----------------------------------------------------------


@per_row
def accumulated(row):
    """Steps of two mini-steps each, by gradients whose means are those of ``alone``."""
    state, update = wrapped(lambda tx: optax.MultiSteps(tx, 2), row)
    params = network(ONE)
    noise = random_gradients(9, params, STEPS)
    grads = jax.tree.map(
        lambda g, n: jnp.stack([g + n, g - n], 1).reshape(2 * STEPS, *g.shape[1:]),
        random_gradients(2, params, STEPS),
        noise,
    )
    return list(train(update, params, state, grads))


@contract.contract
def test_mini_steps_move_nothing(row):
    for step in accumulated(row)[::2]:
        assert types(step.updates) == types(step.params)
        assert all(not np.any(np.asarray(u)) for u in jax.tree.leaves(step.updates))
        close(step.after, step.params, exact=True)


@contract.contract
def test_mini_steps_are_no_steps(row):
    """Counts, cycles and masks go by real steps."""
    for t, step in enumerate(accumulated(row)):
        inner = step.new_state.inner_opt_state
        assert types(inner) == types(step.state.inner_opt_state)
        if t % 2 == 0:
            close(inner, step.state.inner_opt_state, exact=True)


@contract.contract
def test_accumulated_steps_are_steps_of_the_mean(row):
    for step, wanted in zip(accumulated(row)[1::2], alone(row), strict=True):
        close(step.after, wanted.after)
        close(step.new_state.inner_opt_state, wanted.new_state)


def _named(answer):
    """A mask for ``optax.masked``: the answer for each layer."""
    return lambda tree: {name: answer[name] for name in tree}


def part_equals_the_whole(row, tx):
    """On ``Dense_0`` of two layers it does what it does alone; returns the rest."""
    params = network(SHAPES)
    grads = random_gradients(2, network(ONE), STEPS)
    more = random_gradients(3, params, STEPS)
    grads = {"Dense_0": grads["Dense_0"], "Dense_1": more["Dense_1"]}
    start = {"Dense_0": network(ONE)["Dense_0"], "Dense_1": params["Dense_1"]}
    steps = list(train(plain(row, tx), start, tx.init(start), grads))
    for step, wanted in zip(steps, alone(row), strict=True):
        close(step.updates["Dense_0"], wanted.updates["Dense_0"])
    return steps


@contract.contract
def test_masked(row):
    tx = optax.masked(build(row), _named({"Dense_0": True, "Dense_1": False}))
    for step in part_equals_the_whole(row, tx):
        close(step.updates["Dense_1"], step.grads["Dense_1"], exact=True)


@contract.contract
def test_nested_masked(row):
    inner = optax.masked(build(row), {"Dense_0": True, "Dense_1": False})
    outer = {"Dense_0": True, "Dense_1": {"bias": False, "kernel": True}}
    for step in part_equals_the_whole(row, optax.masked(inner, outer)):
        close(step.updates["Dense_1"], step.grads["Dense_1"], exact=True)


@contract.contract
def test_partition(row):
    txs = {"sparse": build(row), "dense": optax.sgd(0.5)}
    tx = optax.partition(txs, _named({"Dense_0": "sparse", "Dense_1": "dense"}))
    for step in part_equals_the_whole(row, tx):
        wanted = jax.tree.map(lambda g: -0.5 * g, step.grads["Dense_1"])
        close(step.updates["Dense_1"], wanted)


@contract.contract
def test_schedule_free(row):
    """As the optimizer in the stated place; what is evaluated is made sparse."""
    tx = build(row, optimizer=optax.contrib.schedule_free(optax.sgd(LR), LR))
    params = network(ONE)
    grads = random_gradients(2, params, STEPS)
    for step in train(plain(row, tx), params, tx.init(params), grads):
        keeps_promise(row, step)

    def is_state(node):
        return isinstance(node, optax.contrib.ScheduleFreeState)

    (state,) = filter(is_state, jax.tree.leaves(step.new_state, is_leaf=is_state))
    average = optax.contrib.schedule_free_eval_params(state, step.after)
    stays_sparse(row, step, average)


def stays_sparse(row, step, average):
    """``sparsify`` is the documented way to keep an average sparse."""
    (before,) = contract.sparse(average)[:1]
    assert (before != 0).sum() > 9
    masks = row.family.masks(step.new_state, average)
    sparse = sparse_optax.sparsify(average, masks)
    budget = row.family.budget(DENSITY, average)
    assert contract.total(w != 0 for w in contract.sparse(sparse)) == budget
    close(contract.dense(sparse), contract.dense(average), exact=True)
    for a, b in zip(contract.sparse(sparse), contract.sparse(average), strict=True):
        np.testing.assert_array_equal(a[a != 0], b[a != 0])


@contract.contract
def test_incremental_update(row):
    average = hundred(row)[0].params
    for step in hundred(row)[:STEPS]:
        average = optax.incremental_update(step.after, average, 0.3)
    stays_sparse(row, step, average)


@contract.contract
def test_ema(row):
    ema = optax.ema(0.7)
    state = ema.init(network(SHAPES))
    for step in hundred(row)[:STEPS]:
        average, state = ema.update(step.after, state)
    stays_sparse(row, step, average)


@contract.contract
def test_lookahead(row):
    """Fast weights keep the promise up to a synchronisation, then by ``sparsify``."""
    sync = PERIOD + 2
    start = network(ONE)
    params = optax.LookaheadParams.init_synced(start)
    tx = optax.lookahead(ready(row), sync, 0.5)
    state = tx.init(params)
    for t, wanted in enumerate(alone(row)):
        updates, state = tx.update(wanted.grads, state, params)
        params = optax.apply_updates(params, updates)
        close(state.fast_state, wanted.new_state)
        if t < sync - 1:
            close(params.fast, wanted.after)
            close(params.slow, start, exact=True)
    close(params.fast, params.slow)
    middle = jax.tree.map(lambda a, b: (a + b) / 2, start, wanted.after)
    close(params.slow, middle)
    stays_sparse(row, wanted, params.slow)


def _adversary():
    return optax.chain(optax.contrib.normalize(), optax.sgd(0.05))


@contract.contract
def test_sam(row):
    """Opaque: the step is one of the gradient at the adversarial weights."""
    params = network(ONE)
    tx = optax.contrib.sam(ready(row), _adversary(), opaque_mode=True)
    target = at_step(random_gradients(6, params, 1), 0)

    def gradient(params, _):
        return jax.tree.map(lambda w, t: w - t, params, target)

    state, sam_state, update = (
        tx.init(params).opt_state,
        tx.init(params),
        ready(row).update,
    )
    for _ in range(STEPS):
        grads = gradient(params, 0)
        length = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
        there = jax.tree.map(lambda w, g: w + 0.05 * g / length, params, grads)  # noqa: B023
        step = advance(update, params, state, gradient(there, 0))
        keeps_promise(row, step)
        updates, sam_state = tx.update(grads, sam_state, params, grad_fn=gradient)
        close(updates, step.updates)
        close(sam_state.opt_state, step.new_state)
        params, state = step.after, step.new_state


@contract.contract
def test_sam_in_two_calls(row):
    """Transparent: states are mixed by arithmetic, so that masks come back as ints."""
    params = network(ONE)
    tx = optax.contrib.sam(build(row), _adversary())
    target = at_step(random_gradients(6, params, 1), 0)
    state, update = tx.init(params), ready(row).update
    plain_params, plain_state = params, ready(row).init(params)
    for t in range(2 * STEPS):
        grads = jax.tree.map(lambda w, t: w - t, params, target)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if t % 2:
            step = advance(update, plain_params, plain_state, grads)
            plain_params, plain_state = step.after, step.new_state
            for a, b in zip(*map(jax.tree.leaves, (params, plain_params)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- derivatives, losses, trees of other libraries ------------------------------------


@contract.contract
def test_derivative_of_an_update(row):
    """In float64: that of finite differences, since masks are constants."""
    with jax.enable_x64(True):
        wide = functools.partial(jax.tree.map, lambda x: x.astype(np.float64))
        params = wide(network(ONE))
        grads = wide(random_gradients(2, params, STEPS))
        tx = build(row)
        start = params, tx.init(params)

        @jax.jit
        def size(scale):
            def step(carry, inputs):
                params, state = carry
                grads, scaled = inputs
                # Not all of them: Adam would divide by the scale.
                factor = jnp.where(scaled, scale, 1.0)
                grads = jax.tree.map(lambda g: g * factor, grads)
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            odd = jnp.arange(STEPS) % 2 == 1
            (last, _), _ = jax.lax.scan(step, start, (grads, odd))
            return sum(jnp.sum(x**2) for x in jax.tree.leaves(last))

        one, small = np.float64(1.0), np.float64(1e-6)
        wanted = (size(one + small) - size(one - small)) / (2 * small)
        _, forward = jax.jvp(size, (one,), (one,))
        assert abs(wanted) > 1e-3
        np.testing.assert_allclose(forward, wanted, rtol=1e-4)
        np.testing.assert_allclose(jax.grad(size)(one), forward, rtol=1e-6)


@contract.contract
def test_value_fn(row):
    """A loss for a line search passes every method, and changes nothing without one."""
    first = alone(row)[0]

    def loss(params, batch=2.0):
        return batch * sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    tx = build(row)
    given = dict(value=jnp.ones([]), grad=first.grads, value_fn=loss, batch=1.0)
    update = functools.partial(tx.update, **given)
    close(advance(update, *first[1:4]).updates, first.updates)


class Kernels(NamedTuple):
    """A layer in a tuple whose fields are not in alphabetical order."""

    kernel: Any
    bias: Any


class Net(eqx.Module):
    """A module, which is callable."""

    Dense_1: Any
    Dense_0: Any

    def __call__(self, x):
        return x


def _variables(params):
    return nnx.State(jax.tree.map(nnx.Param, params))


def _module(params):
    layers = {name: Kernels(**layer) for name, layer in params.items()}
    return Net(**layers)


@contract.contract
def test_counts_of_every_tree_type(row):
    """A tree of counts fits by the names of its leaves, whatever holds them."""
    params = network(SHAPES)
    fixed = {"initial_density": 1.0} if "initial_density" in arguments(row) else {}
    found = []
    for box in (dict, flax.core.freeze, _variables, _module):
        counts = budgets.erdos_renyi(DENSITY).counts(box(params))
        tx = build(row, density=counts, **fixed)
        state = tx.init(params)
        jax.eval_shape(tx.update, params, state, params)
        found.append(state)
    for state in found[1:]:
        close(state, found[0])


@contract.contract
def test_nnx_optimizer(row):
    """The same steps as on a tree of arrays, with packed masks where there are any."""
    params = network(ONE)
    packed = "packed" in inspect.signature(row.factory).parameters
    tx = build(row, **({"packed": True} if packed else {}))

    class Model(nnx.Module):
        def __init__(self):
            self.Dense_0 = nnx.Linear(*ONE[0], rngs=nnx.Rngs(0))

    model = Model()
    nnx.update(model, _variables(params))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))
    for t, wanted in enumerate(alone(row)[:PERIOD]):
        now = nnx.as_pure(nnx.state(model, nnx.Param))
        close(dict(now["Dense_0"]), wanted.params["Dense_0"])
        step(model, optimizer, _variables(wanted.grads))
        if packed and not t:
            masks = sparse_optax.get_masks(optimizer.opt_state)
            assert sparse_optax.masks.count(masks) > 0


# --- the suite itself -----------------------------------------------------------------

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


def test_rows_name_existing_properties():
    found = {
        n.removeprefix("test_")
        for n, f in vars(sys.modules[__name__]).items()
        if contract.rows_of(f)
    }
    for row in contract.ROWS:
        assert {*row.exempt, *row.fails} <= found
        assert all(
            len(reason) > 15 for reason in (*row.exempt.values(), *row.fails.values())
        )


def test_the_readme_states_the_count():
    pairs = contract.count_pairs(sys.modules[__name__])
    text = " ".join(README.read_text(encoding="utf-8").split())
    (stated,) = re.findall(r"<!-- contract:begin -->(.*?)<!-- contract:end -->", text)
    assert stated.strip() == (
        f"The contract suite runs {pairs.run} pairs of {pairs.transformations} "
        f"transformations and {pairs.properties} properties; {pairs.fails} of them are "
        f"documented to fail and {pairs.exempt} more do not apply, each with its "
        "reason."
    )
