"""Random programs against what the library guarantees.

A program is a random tree of parameters, an optimizer, a method and a wrapper, trained
for a few steps on random gradients. The default run tries a few; ``pytest -m fuzz``
many. The same number gives the same program.
"""

import collections
import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from conftest import MARKS, put_figures
from flax import nnx
from flax.core import FrozenDict
from helpers import kept, stepper

import sparse_optax
from sparse_optax import budgets, selection

STEPS = 6
SHAPES = ((6, 5), (4, 3), (5, 1), (1, 7), (3, 3, 2, 4), (8,), ())
DTYPES = (jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16)
HOLE = optax.MaskedNode()


def is_hole(node):
    return isinstance(node, optax.MaskedNode)


# --- trees ----------------------------------------------------------------------------
class Pair(NamedTuple):
    left: Any
    right: Any


class Module(eqx.Module):
    weight: Any
    rest: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Record:
    first: Any
    second: Any


def leaf(rng, shape=None):
    """Weights: drawn, all equal, few values, zeros of both signs, subnormal, and now
    and then not finite.
    """
    shape = SHAPES[rng.integers(len(SHAPES))] if shape is None else shape
    values = rng.normal(size=shape)
    kind = rng.integers(5)
    if kind == 1:
        values = np.full(shape, 0.5)
    elif kind == 2:
        values = np.round(values)
    elif kind == 3:
        values = np.where(rng.random(shape) < 0.5, values, -0.0)
    elif kind == 4:
        values = values * 1e-39
    if rng.random() < 0.05:
        special = rng.choice([np.nan, np.inf, -np.inf], shape)
        values = np.where(rng.random(shape) < 0.2, special, values)
    return jnp.asarray(values, DTYPES[rng.integers(len(DTYPES))])


def tree(rng, depth=0):
    """A container of a random kind with a kernel in it, at times nested."""

    def part():
        if depth < 2 and rng.random() < 0.3:
            return tree(rng, depth + 1)
        return [None, HOLE, leaf(rng), leaf(rng)][rng.integers(4)]

    kernel = leaf(rng, SHAPES[rng.integers(5)])
    kind = rng.integers(9)
    if kind == 0:
        return {"kernel": kernel, "bias": part(), "more": part()}
    if kind == 1:
        return [kernel, part(), part()]
    if kind == 2:
        return (kernel, part())
    if kind == 3:
        return Pair(kernel, part())
    if kind == 4:
        return FrozenDict(kernel=kernel, more=part())
    if kind == 5 and depth == 0:
        inner = {"kernel": nnx.Param(leaf(rng, (4, 3))), "bias": nnx.Param(leaf(rng))}
        return nnx.State({"kernel": nnx.Param(kernel), "layer": inner})
    if kind == 6:
        return collections.OrderedDict(more=part(), kernel=kernel)
    if kind == 7:
        return Record(kernel, part())
    return Module(kernel, part())


def flat(tree):
    """All leaves, and where the tree has a hole the hole."""
    return jax.tree.leaves(tree, is_leaf=is_hole)


def taking_part(params, chosen):
    """The leaves whose weights a mask covers: kernels among those that are chosen."""
    structure = jax.tree.structure(params, is_leaf=is_hole)
    seen = [w if c else HOLE for w, c in zip(flat(params), chosen, strict=True)]
    takes = flat(sparse_optax.eligible(jax.tree.unflatten(structure, seen)))
    return [w for w, take in zip(seen, takes, strict=True) if take]


# --- methods --------------------------------------------------------------------------
def _always(count):
    return True


def _from(first):
    """Dense, and after so many finished updates sparse."""
    return lambda count: count >= first


def _falling(last):
    """On the way between two numbers, and after so many updates at the last one."""
    return lambda count: True if count >= last else None


class Kind(NamedTuple):
    """A method as a program uses it.

    Attributes:
      arguments: Its arguments besides optimizer and density.
      sparse: ``(count)``, whether the update after so many others leaves the number of
        weights that was asked for, all of them (False), or something between (None).
      layers: Whether each layer keeps its own number, or only all together.
      by_kernel: Whether a plain density is shared in proportion to the sum of a shape.
    """

    arguments: Mapping[str, Any]
    sparse: Callable[[int], bool | None] = _always
    layers: bool = True
    by_kernel: bool = False


_CYCLES = {"update_period": 2, "update_stop": 40, "key": 0}
METHODS = {
    "sparse_momentum_regrow": Kind({**_CYCLES, "prune_rate": 0.4}, layers=False),
    "sparse_evolutionary": Kind(_CYCLES),
    "dynamic_sparse": Kind({**_CYCLES, "prune_number": 2}, layers=False),
    "rigl": Kind({**_CYCLES, "prune_rate": 0.3}),
    "in_time_over_parameterization": Kind(_CYCLES),
    "long_average_regrow": Kind(_CYCLES, by_kernel=True),
    "static_sparse": Kind({"key": 0}),
    "straight_through_magnitude": Kind({}),
    "network_surgery": Kind({}),
    "top_kast": Kind({"backward_density": 0.8}),
    "deep_rewiring": Kind({"key": 0, "learning_rate": 0.1}),
    "gradual_magnitude": Kind({"update_period": 2, "update_stop": 3}, _from(2)),
    "iterative_magnitude": Kind({"update_period": 1, "prunes": 2}, _falling(2)),
    "one_shot_magnitude": Kind({"at": 2}, _from(2)),
    "ac_dc": Kind(
        {"update_period": 1, "update_stop": 40},
        lambda count: count % 2 == 1,
        layers=False,
    ),
    "granet": Kind(
        {**_CYCLES, "update_stop": 3, "density_stop": 2}, _from(2), layers=False
    ),
    "falling_budget_regrow": Kind(
        {**_CYCLES, "update_stop": 5}, _falling(2), by_kernel=True
    ),
}
# What a program may give besides.
OPTIONS = {"packed": (True,), "reset_moments": ("grown", "none")}


def a_density(rng, method, leaves):
    """A density or a budget, and the number of weights of each layer by the oracle."""
    sizes = [w.size for w in leaves]
    slopes = sizes
    share = float(rng.choice([0.1, 0.29, 0.3, 0.5, 0.75, 1.0]))
    if method == "top_kast" or budgets.count(share, sum(sizes)) < len(sizes):
        share = 0.5
    goal = Fraction(str(share)) * sum(sizes)  # as it is written
    kind, density = rng.integers(4), share
    if method == "top_kast":
        kind = 0
    if kind == 1:
        goal = int(rng.integers(len(sizes), sum(sizes) + 1))
        density = budgets.nonzeros(goal)
    elif kind == 2 or METHODS[method].by_kernel:
        slopes = [sum(w.shape) for w in leaves]
        density = share if kind == 0 else budgets.erdos_renyi_kernel(share)
    elif kind == 3:
        density = budgets.uniform(share)
    if kind == 3 and METHODS[method].by_kernel:
        slopes, density = sizes, budgets.uniform(share)
    return density, oracles.shared(slopes, sizes, goal)


# --- optimizers and wrappers ----------------------------------------------------------
OPTIMIZERS = (
    lambda: optax.sgd(0.1),
    lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    lambda: optax.sgd(optax.linear_schedule(0.1, 0.0, 4), momentum=0.9),
    lambda: optax.adam(0.01),
    lambda: optax.adamw(0.01, weight_decay=0.1),
    lambda: optax.amsgrad(0.01),
    lambda: optax.lion(0.01),
    lambda: optax.rmsprop(0.01),
    lambda: optax.adafactor(0.01),
    lambda: optax.yogi(0.01),
    lambda: optax.novograd(0.01),
    lambda: optax.adadelta(0.1),
    lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)),
    lambda: optax.chain(sparse_optax.clip_by_active_norm(1.0), optax.sgd(0.1)),
    lambda: optax.chain(optax.add_decayed_weights(0.01), optax.adamax(0.01)),
    lambda: optax.chain(sparse_optax.add_l1_decay(1e-3), optax.sgd(0.1, momentum=0.9)),
    # Without momentum, which takes the dtype of the first leaf, in Optax itself.
    lambda: optax.inject_hyperparams(optax.sgd)(0.1),
)


def injected(method, inner, arguments):
    """The method under ``inject_hyperparams``, its rates injected."""
    function = getattr(sparse_optax, method)
    moving = {"prune_rate", "learning_rate"} & set(arguments)
    static = [x for x in inspect.signature(function).parameters if x not in moving]
    made = optax.inject_hyperparams(
        function, static_args=static, hyperparam_dtype=jnp.float32
    )
    return made(inner, **arguments)


def plainly(method, inner, arguments):
    return getattr(sparse_optax, method)(inner, **arguments)


def _masked(tx, chosen):
    return optax.masked(tx, chosen)


def _partition(tx, chosen):
    labels = jax.tree.map(lambda c: "sparse" if c else "dense", chosen)
    return optax.partition({"sparse": tx, "dense": optax.sgd(0.1)}, labels)


# ``(tx, chosen)``: around the method; `chosen` says of each leaf whether it gets there.
WRAPPERS = {
    "none": lambda tx, chosen: tx,
    "inject_hyperparams": lambda tx, chosen: tx,
    "chain": lambda tx, chosen: optax.chain(optax.clip(10.0), tx),
    "multi_steps": lambda tx, chosen: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx, chosen: optax.apply_if_finite(tx, 3),
    "extra_args": lambda tx, chosen: optax.with_extra_args_support(tx),
    "masked": _masked,
    "partition": _partition,
    "masked in multi_steps": lambda tx, chosen: optax.MultiSteps(
        _masked(tx, chosen), 2
    ),
}
# Around some of the leaves.
PARTIAL = ("masked", "partition", "masked in multi_steps")


def a_choice(rng, wrapper, params):
    """Which leaves reach the method: all, or some with a kernel among them."""
    leaves = flat(params)
    chosen = [True] * len(leaves)
    if wrapper in PARTIAL:
        some = [bool(x) for x in rng.random(len(leaves)) < 0.7]
        chosen = some if taking_part(params, some) else chosen
    return chosen


def gradients(rng, params, broken):
    """Random gradients of the parameters' shapes; at times with NaN and infinity."""

    def one(w):
        values = np.asarray(rng.normal(size=w.shape) * 10.0 ** rng.integers(-3, 3))
        if broken:
            values = np.where(rng.random(w.shape) < 0.1, np.inf, values)
            values = np.where(rng.random(w.shape) < 0.1, np.nan, values)
        return jnp.asarray(values, w.dtype)

    return jax.tree.map(one, params)


def form(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def is_finite(tree):
    found = [
        np.isfinite(np.asarray(x, np.float64)).all() for x in jax.tree.leaves(tree)
    ]
    return all(found)


# --- a program ------------------------------------------------------------------------
class Program(NamedTuple):
    """What a number stands for."""

    params: Any
    method: str
    optimizer: int
    wrapper: str
    tx: optax.GradientTransformation
    chosen: list[bool]
    wanted: list[int]  # of each layer, in the end


def program_of(rng):
    params = tree(rng)
    method = list(METHODS)[rng.integers(len(METHODS))]
    optimizer = int(rng.integers(len(OPTIMIZERS)))
    wrapper = list(WRAPPERS)[rng.integers(len(WRAPPERS))]
    chosen = a_choice(rng, wrapper, params)
    density, wanted = a_density(rng, method, taking_part(params, chosen))
    function = getattr(sparse_optax, method)
    arguments = {"density": density, **METHODS[method].arguments}
    for name, values in OPTIONS.items():
        if name in inspect.signature(function).parameters and rng.random() < 0.2:
            arguments[name] = values[rng.integers(len(values))]
    build = injected if wrapper == "inject_hyperparams" else plainly
    tx = build(method, OPTIMIZERS[optimizer](), arguments)
    structure = jax.tree.structure(params, is_leaf=is_hole)
    tx = WRAPPERS[wrapper](tx, jax.tree.unflatten(structure, chosen))
    return Program(params, method, optimizer, wrapper, tx, chosen, wanted)


def check_counts(program, state, updates, broken):
    """The number of weights after so many updates of the method."""
    kind, wanted = METHODS[program.method], program.wanted
    sizes = [w.size for w in taking_part(program.params, program.chosen)]
    masks = kept(state)
    assert [m.size for m in masks] == sizes
    counts = [int(m.sum()) for m in masks]
    sparse = kind.sparse(max(updates - 1, 0))
    if kind.sparse is not _always and broken:
        sparse = None  # a cycle may have been left out
    if sparse is None:
        assert sum(wanted) <= sum(counts)
    elif not sparse:
        assert counts == sizes
    elif kind.layers or updates == 0:
        assert counts == wanted
    else:
        assert sum(counts) == sum(wanted)


def check_zeros(program, params, state, finite):
    """A missing weight is +0 to the bit."""
    leaves = taking_part(params, program.chosen)
    for w, m in zip(leaves, kept(state), strict=True):
        missing = np.asarray(w.astype(jnp.float32))[~m]
        # What is not finite shows; no subtraction makes it zero.
        assert np.isfinite(missing).all() or not finite
        missing = missing[np.isfinite(missing)]
        assert (missing == 0).all()
        assert not np.signbit(missing).any()


def check_file(params, state, folder):
    """The model comes back from its file to the bit."""
    sparse_optax.save_sparse(folder / "model.sparse", params, state)
    again = sparse_optax.load_sparse(folder / "model.sparse", like=params).dense()
    assert form(again) == form(params)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def check_program(number, folder):
    """Trains one program and checks it at each step."""
    rng = np.random.default_rng(number)
    program = program_of(rng)
    params, tx, wrapper = program.params, program.tx, program.wrapper
    step, state = stepper(tx), tx.init(params)
    forms = form(params), form(state)
    check_counts(program, state, 0, False)
    every = 2 if "multi_steps" in wrapper else 1
    finite, compiled = is_finite(params), []
    broken_at = rng.integers(STEPS) if rng.random() < 0.3 else None
    for t in range(STEPS):
        params, state = step(params, state, gradients(rng, params, t == broken_at))
        finite = finite and is_finite(params) and is_finite(state) and t != broken_at
        compiled.append(step._cache_size())
        assert (form(params), form(state)) == forms
        check_counts(program, state, (t + 1) // every, not finite)
        # Without an update nothing has become zero: so it is while gradients are
        # accumulated or refused.
        if t + 1 >= every and (finite or t + 1 == STEPS):
            check_zeros(program, params, state, finite)
    # The second step may compile once more: what `init` gives is not committed.
    assert compiled[-1] == compiled[1]
    if every > 1:
        assert int(state.gradient_step) == STEPS // every
    if finite:
        check_file(params, state, folder)
        total = sparse_optax.report.summary(params, state).total
        assert total.kept == sum(int(m.sum()) for m in kept(state))


@pytest.mark.parametrize(
    ("first", "number"),
    [
        pytest.param(0, 6, id="some"),
        *(
            pytest.param(first, 10, id=f"many{first}", marks=pytest.mark.fuzz)
            for first in range(100, 250, 10)
        ),
    ],
)
def test_random_programs_keep_what_is_guaranteed(first, number, tmp_path, figures):
    for case in range(first, first + number):
        try:
            check_program(case, tmp_path)
        except Exception as error:
            error.add_note(f"random program number {case}")
            raise
    figures["programs of a tree, an optimizer, a method and a wrapper"] += number


# --- the gate of GSM ------------------------------------------------------------------
def check_gate(number):
    """The gradients that pass are those of the largest |g w|, to the bit."""
    rng = np.random.default_rng(number)
    # Products of these are exact, and none is subnormal.
    values = [0.0, -0.0, 0.5, -0.5, 1.0, 2.0, -3.0, 8.0, np.inf, -np.inf, np.nan]
    chance = np.array([3, 1, 4, 4, 4, 4, 4, 4, *rng.choice([0.0, 0.3], 3)])
    dtype = DTYPES[rng.integers(1, len(DTYPES))]

    def draw(shape):
        drawn = rng.choice(values, shape, p=chance / chance.sum())
        return jnp.asarray(drawn, dtype)

    shapes = ((6, 5), (4, 3), (3, 3, 2, 4))
    params, grads = [draw(s) for s in shapes], [draw(s) for s in shapes]
    density = float(rng.choice([0.1, 0.29, 0.5, 0.9, 1.0]))
    tx = sparse_optax.gsm_mask(density)
    updates, _ = tx.update(grads, tx.init(params), params)
    wide = [[np.asarray(x.astype(jnp.float32)) for x in xs] for xs in (grads, params)]
    with np.errstate(invalid="ignore"):  # infinity times zero
        passing = oracles.gsm_pass(
            *wide, budgets.count(density, sum(x.size for x in params))
        )
    for u, g, p in zip(updates, wide[0], passing, strict=True):
        expected = jnp.asarray(np.where(p, g, 0.0), dtype)
        assert np.asarray(u).tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize(
    ("first", "number"),
    [
        pytest.param(0, 5, id="some"),
        pytest.param(100, 200, id="many", marks=pytest.mark.fuzz),
    ],
)
def test_random_gates_pass_the_largest(first, number, figures):
    for case in range(first, first + number):
        try:
            check_gate(case)
        except Exception as error:
            error.add_note(f"random gate number {case}")
            raise
    figures["gates of GSM against a sort"] += number


# --- selection ------------------------------------------------------------------------
def rank_keys(values):
    """Scores as integers in the library's order: all NaN highest, zeros equal."""
    values = np.asarray(values, np.float64)
    keys = np.where(np.isnan(values), np.inf, values)
    order = np.unique(keys[~np.isnan(values)])
    ranks = np.searchsorted(order, keys)
    return np.where(np.isnan(values), len(order), ranks)


def check_selection(number):
    rng = np.random.default_rng(number)
    dtype = DTYPES[rng.integers(1, 4)]
    shapes = [tuple(rng.integers(1, 9, rng.integers(1, 4))) for _ in range(3)]
    leaves = []
    for shape in shapes:
        x = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 4)
        special = rng.choice(
            [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-40], shape
        )
        x = np.where(rng.random(shape) < rng.choice([0.0, 0.1, 0.6]), special, x)
        if rng.random() < 0.3:
            x = np.round(x)
        leaves.append(jnp.asarray(x, dtype))
    flat = np.concatenate([np.asarray(x.astype(jnp.float32)).ravel() for x in leaves])
    k = int(rng.integers(0, flat.size + 1))
    found = np.concatenate(
        [np.asarray(m).ravel() for m in selection.top_k_mask(leaves, k)]
    )
    # Ties go to the lowest index: a stable sort of the negative ranks.
    chosen = np.argsort(-rank_keys(flat), kind="stable")[:k]
    expected = np.zeros(flat.size, bool)
    expected[chosen] = True
    np.testing.assert_array_equal(found, expected, err_msg=f"selection {number}")


@pytest.mark.parametrize(
    ("first", "number"),
    [
        pytest.param(0, 10, id="some"),
        *(
            pytest.param(first, 100, id=f"many{first}", marks=pytest.mark.fuzz)
            for first in range(100, 500, 100)
        ),
    ],
)
def test_random_selections_are_those_of_a_stable_sort(first, number, figures):
    for case in range(first, first + number):
        check_selection(case)
    figures["selections against a stable sort"] += number


# --- the figures ----------------------------------------------------------------------
def test_figures_stand_between_the_marks(tmp_path):
    page, marks = tmp_path / "page.md", "".join(MARKS)
    page.write_text(f"before\n\n{marks}\n\nafter\n")
    put_figures(page, collections.Counter(b=1234, a=5))
    put_figures(page, collections.Counter(b=1235, a=5))
    before, table, after = re.split(f"{MARKS[0]}|{MARKS[1]}", page.read_text())
    assert (before, after) == ("before\n\n", "\n\nafter\n")
    head, *rows = table.splitlines()
    assert jax.__version__ in head
    assert rows == ["|---|---:|", "| a | 5 |", "| b | 1,235 |"]
    with pytest.raises(pytest.UsageError, match="-m fuzz"):
        put_figures(page, collections.Counter())
    page.write_text("no marks")
    with pytest.raises(pytest.UsageError, match="does not hold the marks"):
        put_figures(page, collections.Counter(a=1))
