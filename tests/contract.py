"""The registry of the contract suite: one row per transformation or variant.

A row says how to make a transformation, where it stands in a chain, what it promises
and which properties it is exempt from, with the reason. ``test_contract.py`` holds
the properties; every row passes every property. A new method is one more row.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparse_optax
from sparse_optax import budgets, regrowth

LR, BETA, DECAY = 0.05, 0.9, 1e-3
DENSITY, PERIOD, STOP, SETTLE = 0.3, 3, 30, 4


# --- one step, and what is promised about it ------------------------------------------


class Step(NamedTuple):
    """An update that was made: what went in, what came out."""

    update: Callable
    params: Any
    state: Any
    grads: Any
    updates: Any
    after: Any
    new_state: Any


def advance(update, params, state, grads) -> Step:
    updates, new_state = update(grads, state, params)
    after = optax.apply_updates(params, updates)
    return Step(update, params, state, grads, updates, after, new_state)


def train(update, params, state, grads) -> Iterator[Step]:
    """One step for each entry of the gradients' leading axis."""
    for t in range(len(jax.tree.leaves(grads)[0])):
        step = advance(update, params, state, jax.tree.map(lambda g: g[t], grads))  # noqa: B023
        yield step
        params, state = step.after, step.new_state


def last(steps: Iterator[Step]) -> Step:
    *_, step = steps
    return step


def sparse(tree, params=None) -> list[np.ndarray]:
    """The leaves that take part, as NumPy arrays."""
    chosen = sparse_optax.eligible(tree if params is None else params)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(chosen), strict=True)
    return [np.asarray(x) for x, take in pairs if take]


def dense(tree, params=None) -> list[np.ndarray]:
    """The others."""
    chosen = sparse_optax.eligible(tree if params is None else params)
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(chosen), strict=True)
    return [np.asarray(x) for x, take in pairs if not take]


def total(arrays) -> int:
    return sum(int(np.sum(x)) for x in arrays)


def kept(state) -> list[np.ndarray]:
    return [np.asarray(m) for m in jax.tree.leaves(sparse_optax.get_masks(state))]


def _responds(step: Step) -> tuple[list[np.ndarray], Any, Any]:
    """Which weights the gradient moves: those that a zero gradient moves otherwise."""
    silence = jax.tree.map(jnp.zeros_like, step.grads)
    still, _ = step.update(silence, step.state, step.params)
    moved = jax.tree.map(lambda a, b: np.asarray(a != b), step.updates, still)
    return sparse(moved, step.params), dense(moved, step.params), still


def _gate_budget(density, params) -> int:
    return budgets.count(density, sum(w.size for w in sparse(params)))


def _gate_promise(step: Step, budget: int, exact: bool) -> None:
    """At most Q gradients pass, all biases' do, and every other weight decays."""
    responds, others, still = _responds(step)
    assert total(responds) <= budget
    if exact:
        assert total(responds) == budget
        assert all(x.all() for x in others)
    for w, u in zip(sparse(step.params), sparse(still), strict=True):
        assert (u[w != 0] != 0).all()


def _gate_broken(step: Step, name: str, index) -> None:
    """A NaN gradient ranks highest, passes, and shows."""
    assert np.isnan(np.asarray(step.updates[name]["kernel"])[index])


def _gate_masks(state, params):
    del state
    return sparse_optax.masks.magnitude_masks(params, DENSITY)


def _mask_budget(density, params) -> int:
    return sum(max(1, budgets.count(density, w.size)) for w in sparse(params))


def _mask_promise(step: Step, budget: int, exact: bool) -> None:
    """The mask keeps the budget, and a missing weight is +0 to the bit."""
    del exact
    masks = kept(step.new_state)
    assert total(masks) == budget
    for w, m in zip(sparse(step.after), masks, strict=True):
        assert not w[~m].tobytes().strip(b"\0")


def _mask_broken(step: Step, name: str, index) -> None:
    """NaN shows in its weight; the cycle that was due has changed no mask."""
    assert np.isnan(np.asarray(step.params[name]["kernel"])[index])
    for before, after in zip(kept(step.state), kept(step.new_state), strict=True):
        np.testing.assert_array_equal(before, after)
    assert int(optax.tree.get(step.new_state, "skipped")) == 1


def _shown(step: Step, name: str, index) -> None:
    """NaN shows in its weight; there is no cycle to leave out."""
    assert np.isnan(np.asarray(step.params[name]["kernel"])[index])
    for before, after in zip(kept(step.state), kept(step.new_state), strict=True):
        np.testing.assert_array_equal(before, after)


def _clip_promise(step: Step, budget: int, exact: bool) -> None:
    """Besides: active and dense updates have at most the norm asked for.

    A weight that this update sets to zero, pruned or regrown in place, takes no part.
    """
    _mask_promise(step, budget, exact)
    moved = zip(sparse(step.updates, step.params), sparse(step.after), strict=True)
    parts = [u[w != 0] for u, w in moved] + dense(step.updates, step.params)
    norm = np.sqrt(sum((np.float64(u) ** 2).sum() for u in parts))
    assert norm <= LR * MAX_NORM * 1.01


def _gate_reported(step: Step) -> None:
    """No weight has decayed, and the gap says why."""
    gap = sparse_optax.gsm_gap(step.after, DENSITY, step.new_state)
    assert "gsm_mask stands behind the optimizer" in gap.advice


def _mask_reported(step: Step) -> None:
    """The state counts it, and the report says it in two lines."""
    made = sparse_optax.report.summary(step.after, step.new_state)
    assert made.misplaced == int(optax.tree.get(step.new_state, "misplaced")) > 0
    masks = kept(step.new_state)
    weights = zip(sparse(step.after), masks, strict=True)
    outside = total((w != 0)[~m] for w, m in weights)
    assert made.total.outside == outside
    # In a dense phase nothing is outside; the state still tells what it has seen.
    dense = all(m.all() for m in masks)
    assert (outside == 0) == dense
    assert sparse_optax.report.table(made).count("WARNING") == 2 - dense


class Family(NamedTuple):
    """What a kind of transformation promises.

    Attributes:
      budget: ``(density, params) -> int``, how many weights may take part.
      promise: ``(step, budget, exact)``, asserts what holds of every step;
        ``exact`` where gradients are all different and not zero, in float32.
      chosen: ``(step) -> list of bool arrays``, the weights that take part.
      masks: ``(state, params) -> mask tree`` for ``sparsify``.
      broken: ``(step, name, index)``, asserts what the update that opens a cycle
        does where the gradient of one weight was NaN at this step or before.
      delay: Steps between the NaN and its effect.
      reported: ``(step)``, asserts that a wrong position is told.
      member: ``(params, seed) -> params`` of a member of a batch: what makes its
        mask its own is its key, or where there is none its weights.
    """

    budget: Callable
    promise: Callable
    chosen: Callable
    masks: Callable
    broken: Callable
    delay: int
    reported: Callable
    member: Callable


GATE = Family(
    budget=_gate_budget,
    promise=_gate_promise,
    chosen=lambda step: _responds(step)[0],
    masks=_gate_masks,
    broken=_gate_broken,
    delay=0,
    reported=_gate_reported,
    member=lambda params, seed: jax.tree.map(lambda p: p[:: 1 - 2 * seed], params),
)
MASK = Family(
    budget=_mask_budget,
    promise=_mask_promise,
    chosen=lambda step: kept(step.new_state),
    masks=lambda state, params: sparse_optax.get_masks(state),
    broken=_mask_broken,
    delay=1,
    reported=_mask_reported,
    member=lambda params, seed: params,
)
CLIP = MASK._replace(promise=_clip_promise)
# First masks of the largest weights: a member is told by its weights.
HIDDEN = MASK._replace(member=GATE.member)


def _scheduled(is_sparse: Callable[[int], bool]) -> Family:
    """At its budget where ``is_sparse(finished updates)``, elsewhere dense."""

    def is_state(node):
        return isinstance(node, regrowth.RegrowState)

    def promise(step: Step, budget: int, exact: bool) -> None:
        nodes = jax.tree.leaves(step.state, is_leaf=is_state)
        (state,) = filter(is_state, nodes)
        size = sum(w.size for w in sparse(step.params))
        now = budget if is_sparse(int(state.count)) else size
        _mask_promise(step, now, exact)

    return HIDDEN._replace(promise=promise)


FALLING = _scheduled(lambda count: count >= PERIOD)
# Sparse and dense by turns; the last cycle below STOP leaves it sparse.
TURNS = _scheduled(lambda count: count >= STOP - PERIOD or count // PERIOD % 2 == 1)


# --- places in a chain ----------------------------------------------------------------

MAX_NORM = 5.0
SGD = optax.sgd(LR, momentum=BETA)
PLAIN_SGD = optax.sgd(LR)
ADAM = optax.adam(LR, eps=1e-4)


def _decayed(optimizer):
    decay = optax.add_decayed_weights(DECAY, mask=sparse_optax.eligible)
    return optax.chain(decay, optimizer)


class Place(NamedTuple):
    """Where a transformation stands.

    Attributes:
      right: ``(tx, optimizer, cycles) -> `` the whole optimizer.
      wrong: The same with the transformation out of place.
      dense: ``(optimizer) -> `` what remains at full density.
    """

    right: Callable
    wrong: Callable
    dense: Callable


FIRST = Place(
    right=lambda tx, optimizer, cycles: optax.chain(tx, _decayed(optimizer)),
    wrong=lambda tx, optimizer, cycles: optax.chain(_decayed(optimizer), tx),
    dense=_decayed,
)
AROUND = Place(
    right=lambda tx, optimizer, cycles: optax.chain(optax.clip(1e3), tx),
    wrong=lambda tx, optimizer, cycles: optax.chain(tx, optax.scale(0.9)),
    dense=lambda optimizer: optimizer,
)
LAST = AROUND._replace(
    right=lambda tx, optimizer, cycles: optax.chain(optimizer, tx),
    wrong=lambda tx, optimizer, cycles: optax.chain(optimizer, tx, optax.scale(0.9)),
)
WHOLE = Place(
    right=lambda tx, optimizer, cycles: tx,
    wrong=lambda tx, optimizer, cycles: tx,
    dense=_decayed,
)
INSIDE = Place(
    right=lambda tx, optimizer, cycles: sparse_optax.sparse_momentum_regrow(
        optax.chain(tx, optimizer), **cycles
    ),
    wrong=lambda tx, optimizer, cycles: optax.chain(tx, optimizer),
    dense=lambda optimizer: optax.chain(optax.clip_by_global_norm(MAX_NORM), optimizer),
)


# --- the rows -------------------------------------------------------------------------


class Row(NamedTuple):
    """One transformation or variant.

    Attributes:
      name: The pytest id.
      factory: The public function.
      settings: ``(optimizer, cycles) -> `` its keyword arguments; ``cycles`` holds
        density, key and the times of the regrow methods.
      injected: Arguments that ``inject_hyperparams`` may inject; all others are
        static.
      scheduled: Arguments that may be schedules.
      place: Where it stands.
      family: What it promises.
      optimizer: What stands behind, before or inside it.
      eager: Whether steps without jit are cheap; False compiles them.
      exempt: ``{property: reason}``, properties that do not apply: skipped.
      fails: ``{property: reason}``, properties known not to hold: xfail, strict.
    """

    name: str
    factory: Callable
    settings: Callable
    injected: tuple[str, ...]
    scheduled: tuple[str, ...]
    place: Place
    family: Family
    optimizer: optax.GradientTransformation = SGD
    eager: bool = True
    exempt: Mapping[str, str] = {}
    fails: Mapping[str, str] = {}


# Known not to hold. A line goes when its defect does: an xfail here is strict.
_PACKED = {
    "map_params_gives_partition_specs": "a packed mask is two arrays, of other shapes "
    "than the parameter's"
}


_NO_MASKS = {"right_position_is_not_reported": "without masks no weight is missing"}


def _gate_row(name, *, exempt=None, fails=None, eager=True, **kwargs):
    return Row(
        name=name,
        factory=sparse_optax.gsm_mask,
        settings=lambda optimizer, cycles: dict(density=cycles["density"], **kwargs),
        injected=("density",),
        scheduled=("density",),
        place=FIRST,
        family=GATE,
        eager=eager,
        exempt=_NO_MASKS | (exempt or {}),
        fails={"wrong_position": "last, it stops the decay of passive weights"}
        | (fails or {}),
    )


def _gsm_row(name, *, exempt=None, fails=None, eager=True, **kwargs):
    own = "brings its own SGD and decay: nothing stands in a wrong place"
    return Row(
        name=name,
        factory=sparse_optax.gsm,
        settings=lambda optimizer, cycles: dict(
            learning_rate=LR,
            density=cycles["density"],
            momentum=BETA,
            nesterov=False,
            weight_decay=DECAY,
            **kwargs,
        ),
        injected=("learning_rate", "density", "momentum", "weight_decay"),
        scheduled=("learning_rate",),
        place=WHOLE,
        family=GATE,
        eager=eager,
        exempt=_NO_MASKS
        | {
            "wrong_position": own,
            "wrong_position_is_reported": own,
            "schedule_free": "brings its own SGD: there is no optimizer to choose",
            "zero_density": "its density is a number; a schedule is for gsm_mask",
        }
        | (exempt or {}),
        fails=fails or {},
    )


_NEVER_EMPTY = {"zero_density": "every leaf keeps at least one weight"}


def _cycle_row(name, factory, *, optimizer=SGD, exempt=None, fails=None, **kwargs):
    return Row(
        name=name,
        factory=factory,
        settings=lambda optimizer, cycles: dict(inner=optimizer, **cycles, **kwargs),
        injected=("prune_rate",),
        scheduled=("prune_rate",),
        place=AROUND,
        family=MASK,
        optimizer=optimizer,
        exempt=_NEVER_EMPTY | (exempt or {}),
        fails={"wrong_position": "rescaled updates leave pruned weights over"}
        | (fails or {}),
    )


_DENSE_AT_FIRST = {
    name: "dense until its first cycle; the promise says when it is not"
    for name in ("never_above_the_budget", "all_scores_equal", "nan_gradient")
} | {"vmap_over_densities": "the density of the end is a static number"}


def _towards_row(factory, family, *, exempt=None, **kwargs):
    """A method that becomes sparse, or hides weights: it takes no random key."""
    return Row(
        name=factory.__name__,
        factory=factory,
        settings=lambda optimizer, cycles: dict(
            inner=optimizer, density=cycles["density"], **kwargs
        ),
        injected=(),
        scheduled=(),
        place=AROUND,
        family=family,
        exempt=_NEVER_EMPTY
        | {"constant_schedule": "none of its numbers may be a schedule"}
        | (exempt or {}),
        fails={"wrong_position": "rescaled updates leave pruned weights over"},
    )


def _inside_row(name, factory, settings, *, injected, place, exempt):
    """What changes updates and not masks, inside sparse momentum."""
    return Row(
        name=name,
        factory=factory,
        settings=settings,
        injected=injected,
        scheduled=injected[:1],
        place=place,
        family=MASK,
        exempt=_NEVER_EMPTY | exempt,
        fails={"wrong_position": "outside the engine nothing keeps the zeros"},
    )


_MOMENTUM = sparse_optax.sparse_momentum_regrow

ROWS = (
    _gate_row("gsm_mask"),
    _gate_row(
        "gsm_mask_paper",
        ties="paper",
        exempt={"all_scores_equal": "the paper's >= lets every tied weight pass"},
    ),
    _gate_row("gsm_mask_frozen", reselect=False),
    _gsm_row("gsm"),
    _gsm_row("gsm_settled", settle_start=SETTLE),
    _cycle_row("sparse_momentum_sgd", _MOMENTUM),
    _cycle_row("sparse_momentum_adam", _MOMENTUM, optimizer=ADAM),
    _cycle_row(
        "sparse_momentum_packed",
        _MOMENTUM,
        packed=True,
        fails=_PACKED,
    ),
    _cycle_row(
        "regrow_random",
        regrowth.regrow,
        optimizer=ADAM,
        prune=regrowth.prune.magnitude,
        redistribute=regrowth.redistribute.none,
        grow=regrowth.grow.random,
        reset_moments="grown",
    ),
    _cycle_row("sparse_evolutionary", sparse_optax.sparse_evolutionary),
    _cycle_row(
        "deep_rewiring",
        sparse_optax.deep_rewiring,
        optimizer=PLAIN_SGD,
        exempt={
            "full_density": "signs are fixed: it is not the dense optimizer",
            "quadratic_converges_on_the_kept_weights": "a target may have another sign",
            "ema": "weights come and go by zero: five steps mix too few of them",
        },
    )._replace(
        settings=lambda optimizer, cycles: dict(
            inner=optimizer,
            density=cycles["density"],
            key=cycles["key"],
            learning_rate=LR,
            l1=1e-3,
            temperature=1e-4,
        ),
        injected=("learning_rate", "l1", "temperature"),
        scheduled=("learning_rate", "l1", "temperature"),
    ),
    _cycle_row("dynamic_sparse", sparse_optax.dynamic_sparse, threshold=0.2),
    _cycle_row(
        "in_time_over_parameterization",
        sparse_optax.in_time_over_parameterization,
    ),
    _cycle_row(
        "granet",
        sparse_optax.granet,
        exempt={
            "vmap_over_densities": "a density that moves is no part of the state: "
            "the members would share it"
        },
    )._replace(
        settings=lambda optimizer, cycles: dict(
            inner=optimizer, initial_density=cycles["density"], **cycles
        )
    ),
    _cycle_row("rigl", sparse_optax.rigl, optimizer=ADAM),
    _cycle_row("long_average_regrow", sparse_optax.long_average_regrow),
    _cycle_row(
        "falling_budget_regrow",
        sparse_optax.falling_budget_regrow,
        initial_factor=1.0,
        exempt={
            "vmap_over_densities": "a density that moves is no part of the state: "
            "the members would share it"
        },
    ),
    _cycle_row("sparse_momentum_last", _MOMENTUM)._replace(
        settings=lambda optimizer, cycles: cycles, place=LAST
    ),
    _towards_row(
        sparse_optax.gradual_magnitude,
        FALLING,
        exempt=_DENSE_AT_FIRST,
        update_period=PERIOD,
        update_stop=PERIOD + 1,
    ),
    _towards_row(
        sparse_optax.iterative_magnitude,
        FALLING,
        exempt=_DENSE_AT_FIRST,
        update_period=PERIOD,
        prunes=1,
    ),
    _towards_row(
        sparse_optax.one_shot_magnitude, FALLING, exempt=_DENSE_AT_FIRST, at=PERIOD
    ),
    _towards_row(
        sparse_optax.ac_dc,
        TURNS,
        exempt=_DENSE_AT_FIRST,
        update_period=PERIOD,
        update_stop=STOP,
    ),
    # The penalty towards weights that are all kept is zero: one step at a time.
    _towards_row(
        sparse_optax.learning_compression,
        FALLING,
        exempt=_DENSE_AT_FIRST,
        update_period=1,
        update_stop=PERIOD,
    ),
    # Without an end a weight that is missed grows behind its zero and takes a turn.
    _towards_row(sparse_optax.network_surgery, HIDDEN, update_stop=STOP),
    _towards_row(sparse_optax.straight_through_magnitude, HIDDEN, update_stop=STOP),
    _towards_row(
        sparse_optax.straight_through_magnitude,
        HIDDEN,
        update_stop=STOP,
        missing_decay=0.1,
    )._replace(name="straight_through_decayed"),
    _towards_row(
        sparse_optax.top_kast,
        HIDDEN,
        exempt={"full_density": "the row's backward density is less than 1"},
        backward_density=0.9,
        penalty=0.0,
        update_stop=STOP,
    ),
    _cycle_row("static_sparse", sparse_optax.static_sparse)._replace(
        settings=lambda optimizer, cycles: dict(
            inner=optimizer, density=cycles["density"], key=cycles["key"]
        ),
        injected=(),
        scheduled=(),
        family=MASK._replace(broken=_shown),
        exempt=_NEVER_EMPTY
        | {
            "constant_schedule": "none of its numbers may be a schedule",
            "ema": "an average under masks that stay is as sparse as they are",
        },
    ),
    _inside_row(
        "add_l1_decay",
        sparse_optax.add_l1_decay,
        lambda optimizer, cycles: dict(strength=1e-4, mask=sparse_optax.eligible),
        injected=("strength",),
        place=INSIDE,
        exempt={
            "wrong_position_is_reported": "outside the engine there are no masks",
            "missing_params": "inside the engine, which asks for them itself",
            "full_density": "its penalty moves a dense network too",
        },
    ),
    _inside_row(
        "ham",
        sparse_optax.ham,
        lambda optimizer, cycles: dict(
            inner=optimizer, learning_rate=LR, alpha=1.0, beta=1e-3
        ),
        injected=("learning_rate", "alpha", "beta"),
        place=INSIDE._replace(
            right=lambda tx, optimizer, cycles: sparse_optax.sparse_momentum_regrow(
                tx, **cycles
            ),
            wrong=lambda tx, optimizer, cycles: optax.chain(
                sparse_optax.sparse_momentum_regrow(optimizer, **cycles),
                optax.scale(0.9),
            ),
        ),
        exempt={"full_density": "it moves a dense network too"},
    ),
    Row(
        name="clip_by_active_norm",
        factory=sparse_optax.clip_by_active_norm,
        settings=lambda optimizer, cycles: dict(max_norm=MAX_NORM),
        injected=("max_norm",),
        scheduled=(),
        place=INSIDE,
        family=CLIP,
        optimizer=PLAIN_SGD,
        exempt=_NEVER_EMPTY
        | {
            "wrong_position_is_reported": "outside the engine it raises at once",
            "missing_params": "reads no parameters; the engine around it does",
            "constant_schedule": "its one argument is a number",
            "scalar_leaves": "scaled by the norm of all active weights",
            "schedule_free": "moves by averages, whose norm no clipping bounds",
        },
        fails={"wrong_position": "outside the engine it finds no masks, and says so"},
    ),
)


def build(
    row: Row,
    *,
    density=DENSITY,
    key=1,
    optimizer=None,
    make=None,
    place="right",
    **overrides,
) -> optax.GradientTransformationExtraArgs:
    """The row's transformation in its place, with the rest of an optimizer."""
    optimizer = row.optimizer if optimizer is None else optimizer
    cycles = _cycles(density, key)
    tx = (make or row.factory)(**{**row.settings(optimizer, cycles), **overrides})
    return getattr(row.place, place)(tx, optimizer, cycles)


def _cycles(density=DENSITY, key=1):
    return dict(
        density=density,
        key=key,
        update_period=PERIOD,
        update_stop=STOP,
        prune_rate=0.5,
    )


def arguments(row: Row) -> dict[str, Any]:
    """The keyword arguments that the row gives by default."""
    return dict(row.settings(row.optimizer, _cycles()))


def bare(row: Row) -> optax.GradientTransformationExtraArgs:
    """The transformation alone."""
    return build(row._replace(place=WHOLE))


def injected(row: Row) -> Callable:
    """The factory under ``inject_hyperparams``."""
    names = inspect.signature(row.factory).parameters
    return optax.inject_hyperparams(
        row.factory,
        static_args=[name for name in names if name not in row.injected],
        hyperparam_dtype=jnp.float32,
    )


# --- pairs ----------------------------------------------------------------------------


# A row of each family, for a second run with other versions.
CORE = ("gsm_mask", "sparse_momentum_sgd", "rigl", "gradual_magnitude", "top_kast")


def contract(test):
    """Makes a property of a test: it runs once for each row, with its exemptions."""
    assert set(CORE) <= {row.name for row in ROWS}
    name = test.__name__.removeprefix("test_")
    params = []
    for row in ROWS:
        marks = []
        if name in row.exempt:
            marks = [pytest.mark.skip(reason=row.exempt[name])]
        elif name in row.fails:
            marks = [pytest.mark.xfail(strict=True, reason=row.fails[name])]
        if row.name in CORE:
            marks.append(pytest.mark.core)
        params.append(pytest.param(row, id=row.name, marks=marks))
    return pytest.mark.parametrize("row", params)(test)


class Pairs(NamedTuple):
    """How large the suite is.

    Attributes:
      transformations: Rows.
      properties: Tests that take a row.
      exempt: Pairs that do not apply, each with its reason.
      fails: Pairs that are documented to fail: a wrong place, a known defect.
      run: All pairs that are not exempt.
    """

    transformations: int
    properties: int
    exempt: int
    fails: int
    run: int


def rows_of(test) -> list[Any]:
    """The parameters of a property, or nothing where a test is not one."""
    marks = getattr(test, "pytestmark", [])
    found = [m.args[1] for m in marks if m.name == "parametrize" and m.args[0] == "row"]
    return found[0] if found else []


def count_pairs(module) -> Pairs:
    """Counts transformations x properties from what pytest collects of a module."""
    tests = [f for name, f in vars(module).items() if name.startswith("test_")]
    properties = [rows for rows in map(rows_of, tests) if rows]
    pairs = [param for rows in properties for param in rows]
    marks = [m.name for p in pairs for m in p.marks]
    return Pairs(
        transformations=len({p.values[0].name for p in pairs}),
        properties=len(properties),
        exempt=marks.count("skip"),
        fails=marks.count("xfail"),
        run=len(pairs) - marks.count("skip"),
    )
