"""What bad input gets: one error that names argument, value, range and cure.

Every row of the tables is a call and the parts that its message must hold. The check
of the parts is ``helpers.refuses``; the cure is an order to the caller.
"""

import inspect
import pathlib
import re
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CURE, mask_tree, network, refuses

import sparse_optax
from sparse_optax import (
    budgets,
    gsm,
    gsm_gap,
    gsm_log_decay,
    gsm_mask,
    masks,
    regrowth,
    selection,
    sparse_momentum_regrow,
)

SHAPES = ((4, 3), (3, 5))
SGD = optax.sgd(0.1, momentum=0.9)
NAN = float("nan")
PARAMS = network(SHAPES)
BIASES = {"Dense_0": {"bias": jnp.ones(3)}}


def regrow(inner=SGD, params=PARAMS, **kwargs):
    """Makes sparse momentum and its state; None takes an argument out."""
    settings = dict(density=0.5, update_period=4, update_stop=20, key=0) | kwargs
    tx = sparse_momentum_regrow(inner, **settings)
    return tx, tx.init(params)


def ones(*shapes):
    """Masks of ones for kernels of these shapes."""
    return mask_tree([np.ones(s, bool) for s in shapes])


# --- a density outside (0, 1] ---------------------------------------------------------

DENSITY_USERS = {
    "gsm_mask": lambda d: gsm_mask(d),
    "gsm": lambda d: gsm(0.1, d),
    "gsm_gap": lambda d: gsm_gap(PARAMS, d),
    "sparse_momentum_regrow": lambda d: regrow(density=d),
    "random_masks": lambda d: masks.random_masks(0, PARAMS, d),
    "magnitude_masks": lambda d: masks.magnitude_masks(PARAMS, d),
    "uniform": lambda d: budgets.uniform(d),
    "erdos_renyi": lambda d: budgets.erdos_renyi(d),
    "erdos_renyi_kernel": lambda d: budgets.erdos_renyi_kernel(d),
    "linear": lambda d: budgets.linear(d),
    "count": lambda d: budgets.count(d, 10),
}


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, 2, NAN, float("inf")])
@pytest.mark.parametrize("user", DENSITY_USERS)
def test_density_outside_its_range(user, density):
    with refuses(user, "density", str(density), r"\(0, 1\]"):
        DENSITY_USERS[user](density)


@pytest.mark.parametrize("density", ["0.5", True, None])
def test_density_that_is_no_number(density):
    with refuses("gsm_mask", "density", str(density), r"\(0, 1\]"):
        gsm_mask(density)


# --- the number of weights to select --------------------------------------------------


@pytest.mark.parametrize("function", ["top_k_mask", "kth_largest"])
@pytest.mark.parametrize("k", [28, -1])
def test_k_beyond_the_pool(function, k):
    with refuses(function, "k", str(k), "27"):
        getattr(selection, function)([jnp.ones((3, 4)), jnp.ones((3, 5))], k)


def test_k_of_another_structure():
    with refuses("top_k_mask", "k"):
        selection.top_k_mask({"a": jnp.ones(3), "b": jnp.ones(4)}, {"a": 1})


@pytest.mark.parametrize("n", [0, -3, 28])
def test_a_count_of_nonzeros_that_cannot_be(n):
    with refuses("nonzeros", "", str(n)):
        budgets.nonzeros(n).counts(PARAMS)


@pytest.mark.parametrize("n", [0, -3])
def test_a_budget_of_no_bytes(n):
    with refuses("num_bytes", "", str(n)):
        budgets.num_bytes(n).counts(PARAMS)


# --- unknown names --------------------------------------------------------------------

CHOICES = {
    "ties": (
        lambda: gsm_mask(0.5, ties="random"),
        "gsm_mask",
        "'random'",
        "'exact'.*'paper'",
    ),
    "scope": (
        lambda: masks.magnitude_masks(PARAMS, 0.5, scope="layer"),
        "magnitude_masks",
        "'layer'",
        "'global'.*'leaf'",
    ),
    "momentum": (
        lambda: regrow(momentum="adam"),
        "sparse_momentum_regrow",
        "'adam'",
        r"'auto'|\"auto\"",
    ),
    "reset_moments": (
        lambda: regrow(reset_moments="all"),
        "sparse_momentum_regrow",
        "'all'",
        "none.*grown",
    ),
}


@pytest.mark.parametrize("argument", CHOICES)
def test_unknown_choice(argument):
    call, function, value, allowed = CHOICES[argument]
    with refuses(function, argument, value, allowed):
        call()


# --- numbers out of their range -------------------------------------------------------

NUMBERS = [
    ("sparse_momentum_regrow", "update_period", 0, "1", regrow),
    ("sparse_momentum_regrow", "update_period", -5, "1", regrow),
    ("sparse_momentum_regrow", "update_period", 2.5, "integer", regrow),
    ("sparse_momentum_regrow", "update_stop", 0, "1|positive|greater", regrow),
    ("sparse_momentum_regrow", "prune_rate", 1.5, r"\[0, 1\]", regrow),
    ("sparse_momentum_regrow", "prune_rate", -0.1, r"\[0, 1\]", regrow),
    ("sparse_momentum_regrow", "prune_rate", NAN, r"\[0, 1\]", regrow),
    ("sparse_momentum_regrow", "momentum", 1.0, r"\[0, 1\)", regrow),
    ("sparse_momentum_regrow", "momentum", -0.5, r"\[0, 1\)", regrow),
    ("sparse_momentum_regrow", "key", 0.5, "seed|integer", regrow),
    ("gsm", "momentum", 1.0, r"\[0, 1\)", lambda **k: gsm(0.1, 0.5, **k)),
    ("gsm", "momentum", -0.1, r"\[0, 1\)", lambda **k: gsm(0.1, 0.5, **k)),
    ("gsm", "weight_decay", -1e-4, "0", lambda **k: gsm(0.1, 0.5, **k)),
    ("gsm", "gate", 0.0, r"\(0, ", lambda **k: gsm(0.1, 0.5, **k)),
    ("gsm", "gate", 1.5, r"\(0, ", lambda **k: gsm(0.1, 0.5, **k)),
    ("gsm", "settle_start", -1, "0", lambda **k: gsm(0.1, 0.5, **k)),
    ("gsm_log_decay", "momentum", 1.0, r"\[0, 1\)", None),
    ("gsm_log_decay", "weight_decay", -1.0, "0", None),
    ("gsm_log_decay", "steps", -1, "0", None),
]


@pytest.mark.parametrize(
    ("function", "argument", "value", "allowed", "call"),
    NUMBERS,
    ids=[f"{row[0]}-{row[1]}-{row[2]}" for row in NUMBERS],
)
def test_number_out_of_range(function, argument, value, allowed, call):
    if call is None:
        given = dict(learning_rate=0.1, momentum=0.9, weight_decay=1e-4, steps=10)
        call = lambda **k: gsm_log_decay(**(given | k))  # noqa: E731
    with refuses(function, argument, str(value), allowed):
        call(**{argument: value})


def test_no_prune_rate_and_no_end():
    """The default rate is a cosine to zero: it must know where."""
    with refuses("sparse_momentum_regrow", "update_stop", "None", "prune_rate"):
        regrow(update_stop=None)


# --- an empty selection ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("sparse_momentum_regrow", lambda where: regrow(where=where)),
        ("gsm_mask", lambda where: gsm_mask(0.5, where=where).init(PARAMS)),
        ("gsm", lambda where: gsm(0.1, 0.5, where=where).init(PARAMS)),
    ],
)
def test_where_chooses_nothing(function, call):
    with refuses(function, "where"):
        call(lambda path, leaf: False)


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("sparse_momentum_regrow", lambda: regrow(params=BIASES)),
        ("gsm_mask", lambda: gsm_mask(0.5).init(BIASES)),
    ],
)
def test_params_with_nothing_to_make_sparse(function, call):
    with refuses(function, "where"):
        call()


@pytest.mark.parametrize("where", [{"Dense_0": True}, {"other": {"kernel": True}}])
def test_where_of_another_structure(where):
    with refuses("sparse_momentum_regrow", "where"):
        regrow(where=where)


@pytest.mark.parametrize("value", [1, 0.5, "yes", None])
def test_where_that_is_not_made_of_bools(value):
    where = jax.tree.map(lambda _: True, PARAMS)
    where["Dense_0"]["kernel"] = value
    with refuses("sparse_momentum_regrow", "where", str(value)):
        regrow(where=where)


def test_where_chooses_integers():
    params = PARAMS | {"table": jnp.ones((3, 4), jnp.int32)}
    for function, call in (
        ("sparse_momentum_regrow", lambda where: regrow(params=params, where=where)),
        ("gsm_mask", lambda where: gsm_mask(0.5, where=where).init(params)),
    ):
        with refuses(function, "where", "int32", "floating"):
            call(lambda path, leaf: leaf.ndim == 2)


def test_params_of_integers_only():
    params = {"kernel": jnp.ones((3, 4), jnp.int32)}
    for function, call in (
        ("sparse_momentum_regrow", lambda: regrow(params=params)),
        ("gsm_mask", lambda: gsm_mask(0.5).init(params)),
    ):
        with refuses(function, ""):
            call()


def test_stacked_leaf_that_is_not_there():
    with refuses("sparse_momentum_regrow", "stacked", "Dense_9/kernel"):
        regrow(stacked={"Dense_9/kernel": 0})


def test_stacked_axis_that_is_not_there():
    with refuses("sparse_momentum_regrow", "stacked", "2", "1"):
        regrow(stacked={"Dense_0/kernel": 2})


# --- structures and shapes ------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "tx"),
    [
        ("sparse_momentum_regrow", regrow()[0]),
        ("gsm_mask", gsm_mask(0.5)),
    ],
    ids=["sparse_momentum_regrow", "gsm_mask"],
)
class TestUpdate:
    """Calls of update that do not fit the call of init."""

    def test_without_params(self, function, tx):
        with refuses(function, "params", "None"):
            tx.update(PARAMS, tx.init(PARAMS))

    def test_with_params_of_another_structure(self, function, tx):
        other = PARAMS | {"Dense_2": {"bias": jnp.ones(2), "kernel": jnp.ones((5, 2))}}
        with refuses(function, "params"):
            tx.update(other, tx.init(PARAMS), other)

    def test_with_gradients_of_another_structure(self, function, tx):
        other = {"Dense_0": PARAMS["Dense_0"]}
        with refuses(function, ""):
            tx.update(other, tx.init(PARAMS), PARAMS)


def test_update_with_params_of_another_shape():
    tx, state = regrow()
    other = network(((4, 3), (5, 3)))
    with refuses("sparse_momentum_regrow", "Dense_1/kernel", r"\(5, 3\)", r"\(3, 5\)"):
        tx.update(other, state, other)


def test_gsm_gradient_of_another_shape():
    tx, other = gsm_mask(0.5), network(((4, 3), (5, 3)))
    other["Dense_1"]["bias"] = PARAMS["Dense_1"]["bias"]
    with refuses("gsm_mask", "Dense_1/kernel", r"\(5, 3\)", r"\(3, 5\)"):
        tx.update(other, tx.init(PARAMS), PARAMS)


def test_given_masks_of_another_shape():
    with refuses("sparse_momentum_regrow", "masks", r"\(3, 4\)", r"\(4, 3\)"):
        regrow(density=None, masks=ones((3, 4), (3, 5)))


def test_given_masks_of_another_structure():
    with refuses("sparse_momentum_regrow", "masks"):
        regrow(density=None, masks=ones((4, 3)))


def test_given_masks_that_are_not_boolean():
    wrong = mask_tree([np.ones(s, np.float32) for s in SHAPES])
    with refuses("sparse_momentum_regrow", "masks", "float32", "bool"):
        regrow(density=None, masks=wrong)


def test_given_masks_of_another_density():
    """The count of given masks is the budget; another one contradicts it."""
    with refuses("sparse_momentum_regrow", "density", "0.5"):
        regrow(density=0.5, masks=ones(*SHAPES))


def test_set_masks_of_another_shape():
    _, state = regrow()
    with refuses("set_masks", "mask", r"\(3, 4\)", r"\(4, 3\)"):
        sparse_optax.set_masks(state, ones((3, 4), (3, 5)))


def test_set_masks_of_another_structure():
    _, state = regrow()
    with refuses("set_masks", "`masks`", "Dense_2/kernel", "Dense_0/kernel"):
        sparse_optax.set_masks(state, ones((4, 3), (3, 5), (5, 2)))


def test_sparsify_with_masks_of_another_shape():
    with refuses("sparsify", "mask", r"\(3, 4\)", r"\(4, 3\)"):
        sparse_optax.sparsify(PARAMS, ones((3, 4), (3, 5)))


def test_sparsify_with_masks_of_other_leaves():
    with refuses("sparsify", "Dense_2/kernel", "Dense_0/kernel"):
        sparse_optax.sparsify(PARAMS, ones((4, 3), (3, 5), (5, 2)))


@pytest.mark.parametrize("function", ["apply", "fill"])
def test_masks_of_another_shape(function):
    with refuses(f"masks.{function}", "mask", r"\(3, 4\)", r"\(4, 3\)"):
        getattr(masks, function)(ones((3, 4), (3, 5)), PARAMS)


def test_a_state_without_masks():
    for call in (
        sparse_optax.get_masks,
        lambda state: sparse_optax.set_masks(state, ones(*SHAPES)),
    ):
        with refuses("", "opt_state"):
            call(SGD.init(PARAMS))


def test_a_state_with_two_masks_for_a_leaf():
    tx = optax.chain(*(regrow(key=i)[0] for i in (0, 1)))
    with refuses("get_masks", "Dense_0/kernel"):
        sparse_optax.get_masks(tx.init(PARAMS))


def test_a_mask_inside_a_mask():
    """One engine around another, or behind it, masks the same leaf twice."""
    (tx, state), (_, other) = regrow(), regrow(key=1)
    with refuses("sparse_momentum_regrow", "Dense_0/kernel"):
        regrow(inner=tx)
    with refuses("get_masks", "Dense_0/kernel"):
        sparse_optax.get_masks((state, other))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, NAN])
def test_clipping_to_no_norm(max_norm):
    with refuses("clip_by_active_norm", "max_norm", str(max_norm), "above 0"):
        sparse_optax.clip_by_active_norm(max_norm)


def test_clipping_outside_of_an_engine():
    tx = sparse_optax.clip_by_active_norm(1.0)
    with refuses("clip_by_active_norm", "masks", "", "inside"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


# --- optimizers that cannot be wrapped ------------------------------------------------


def test_multi_steps_inside():
    with refuses("sparse_momentum_regrow", "MultiSteps", "", "outside"):
        regrow(inner=optax.MultiSteps(SGD, 2).gradient_transformation())


def test_multi_steps_inside_a_chain():
    steps = optax.MultiSteps(SGD, 2).gradient_transformation()
    with refuses("sparse_momentum_regrow", "MultiSteps", "", "outside"):
        regrow(inner=optax.chain(optax.clip(1.0), steps))


def test_two_momenta_for_a_leaf():
    """The error names both places and the argument that settles it."""
    inner = optax.chain(optax.trace(0.9), optax.scale_by_adam())
    with refuses("sparse_momentum_regrow", "momentum=", "0/trace", "1/mu"):
        regrow(inner=inner)
    regrow(inner=inner, momentum=0.9)


def test_an_inner_that_is_no_optimizer():
    with refuses("sparse_momentum_regrow", "inner", "0.1"):
        regrow(inner=0.1)


def test_a_rule_that_is_a_bare_function():
    """`optax.inject_hyperparams` would take it for a schedule."""
    with refuses("regrow", "prune", "", "Rule|stateless"):
        regrowth.regrow(
            SGD,
            density=0.5,
            prune=lambda evidence: evidence.masks,
            redistribute=regrowth.redistribute.none,
            grow=regrowth.grow.random,
            update_period=4,
            update_stop=20,
            key=0,
        )


@pytest.mark.parametrize("field", ["gradient", "momentum"])
def test_a_rule_that_needs_what_is_not_there(field):
    evidence = regrowth.Evidence(
        params=(jnp.ones((4, 3)),), masks=(jnp.ones((4, 3), bool),)
    )
    with refuses(f"grow.{field}", field):
        regrowth.cycle(
            evidence,
            prune=regrowth.prune.magnitude,
            redistribute=regrowth.redistribute.none,
            grow=getattr(regrowth.grow, field),
            prune_rate=0.5,
        )


# --- nothing is checked that may be traced --------------------------------------------


def test_traced_numbers_are_not_checked():
    """A check of a tracer would raise under `inject_hyperparams`."""

    @jax.jit
    def run(rate, density):
        tx = sparse_momentum_regrow(
            SGD, density=0.5, update_period=4, prune_rate=rate, key=0
        )
        first, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        gate = gsm_mask(lambda count: density)
        second, _ = gate.update(PARAMS, gate.init(PARAMS), PARAMS)
        return first, second

    run(0.3, 0.4)


# --- numbers that are no Python numbers -----------------------------------------------
def test_numbers_in_arrays_without_axes_are_numbers():
    sparse_optax.ham(optax.sgd(0.1), 0.1, alpha=np.array(2.0))
    sparse_optax.clip_by_active_norm(np.float32(1.0))
    sparse_optax.rigl(
        optax.sgd(0.1),
        density=0.5,
        update_period=2,
        update_stop=9,
        prune_rate=np.array(0.3),
        key=0,
    )


def test_an_infinite_norm_clips_nothing():
    sparse_optax.clip_by_active_norm(float("inf"))


@pytest.mark.parametrize(
    ("function", "argument", "call"),
    [
        ("prune.below_spread", "c", lambda x: regrowth.prune.below_spread(x)),
        (
            "grow.above_spread",
            "gamma",
            lambda x: regrowth.grow.above_spread(1.0, gamma=x),
        ),
        ("prune.outranked", "ratio", lambda x: regrowth.prune.outranked(x)),
        ("blocks", "rows", lambda x: sparse_optax.patterns.blocks(x, 2)),
        ("n_m", "n", lambda x: sparse_optax.patterns.n_m(x, 4)),
    ],
)
def test_numbers_that_must_be_known_are_not_traced(function, argument, call):
    """They are keys of caches, or shapes."""
    with refuses(function, argument):
        call(jnp.int32(1))
    with refuses(function, argument):
        jax.jit(lambda x: call(x) and x)(1)


def test_masks_in_other_containers_than_the_parameters():
    """The density and the state follow the parameters, whatever holds the masks."""
    params = (jnp.ones((4, 4)),)
    mask = [jnp.arange(16).reshape(4, 4) < 8]
    tx = sparse_optax.static_sparse(optax.sgd(0.1), masks=mask, density=(8,))
    state = tx.init(params)
    assert jax.tree.structure(state.regrow_masks) == jax.tree.structure(params)
    updates, _ = tx.update(params, state, params)
    assert int((optax.apply_updates(params, updates)[0] != 0).sum()) == 8


def test_a_packed_scalar_names_the_method():
    tx = sparse_optax.static_sparse(
        optax.sgd(0.1), density=1.0, key=0, packed=True, where={"w": True}
    )
    with pytest.raises(ValueError, match=r"^static_sparse: a scalar mask"):
        tx.init({"w": jnp.ones([])})


def test_an_unknown_kind_of_budget_is_no_uniform_one():
    with pytest.raises(KeyError):
        sparse_optax.budgets.Shares("nope", 0.5).counts({"w": jnp.ones((4, 4))})


def test_a_budget_reads_as_the_call_that_made_it():
    made = sparse_optax.budgets.num_flops(9, {"w": 2}, dense=["w"])
    assert repr(made) == "num_flops(9, costs={'w': 2}, dense=('w',))"
    assert repr(sparse_optax.budgets.uniform(0.5)) == "uniform(0.5)"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("initial_density", "x"), ("initial_density", 2.0), ("density_stop", 6.5)],
)
def test_granet_is_checked_at_construction(argument, value):
    settings = dict(density=0.1, update_period=2, update_stop=9, key=0)
    with refuses("granet", argument, str(value)):
        sparse_optax.granet(optax.sgd(0.1), **settings | {argument: value})


def test_rates_of_gsm_are_numbers():
    with refuses("gsm", "learning_rate", "x"):
        sparse_optax.gsm("x", 0.5)
    with refuses("gsm_log_decay", "learning_rate", "-1.0"):
        sparse_optax.gsm_log_decay(-1.0, 0.9, 5e-4, 10)
    with refuses("gsm_gap", "alive_above", "x"):
        sparse_optax.gsm_gap({"w": jnp.ones((2, 2))}, 0.5, alive_above="x")


# --- every argument of every public function ------------------------------------------
# Values that no argument of a kind takes. Each call but for one argument is right.
OBJECT = object()
COUNTS = ("1", np.float32(0.5), 2.5, NAN, -1, True, 2**31, 10**10, [1], OBJECT)
RATES = ("1", NAN, float("inf"), -1.0, None, [1.0], OBJECT, 1j)
FLAGS = ("yes", 1, None, OBJECT)
CHOSEN = ("nope", 1, None, OBJECT)
SHARES = (
    "a",
    b"a",
    True,
    0,
    0.0,
    2,
    -0.5,
    NAN,
    np.float32(1.5),
    np.int64(3),
    OBJECT,
    1j,
)
DENSITIES = (*SHARES, {"w": 0.5}, [0.5])
SPREADS = ("x", NAN, -1.0, None, OBJECT)
TWO_AXES = ((0, 0), 5, "x", (0,), OBJECT, (0, 0.5))
MASKS = ("x", 1, OBJECT, {"w": 0.5})
BAD = {
    **dict.fromkeys(("density", "backward_density", "gate"), DENSITIES),
    **dict.fromkeys(("d", "final", "initial_density"), SHARES),
    **dict.fromkeys(("update_period", "at", "prunes", "phase"), (*COUNTS, None, 0)),
    **dict.fromkeys(("update_start", "density_start"), (*COUNTS, None)),
    **dict.fromkeys(("steps", "start", "stop"), (*COUNTS, None)),
    **dict.fromkeys(("update_stop", "density_stop", "settle_start"), COUNTS),
    "prune_rate": ("x", "1", NAN, 1.5, -0.1, [0.5], OBJECT, True),
    "key": (None, "x", 0.5, True, -1, 2**32, OBJECT, [0]),
    "where": (0.95, "x", 3, lambda name: True, OBJECT, {"w": "yes"}),
    "stacked": (1, "w", {"w": "a"}, {1: 0}, [0], OBJECT, {"w": 0.5}, {"w": True}),
    "pattern": ("x", 3, OBJECT, sparse_optax.patterns.blocks),
    "inner": ("x", 0.1, OBJECT, optax.sgd, {}),
    **dict.fromkeys(("prune", "grow", "redistribute", "rule"), ("x", 3, OBJECT)),
    **dict.fromkeys(("packed", "hidden", "reselect", "track_reactivated"), FLAGS),
    **dict.fromkeys(("nesterov", "decoupled", "prefer_unexplored"), FLAGS),
    **dict.fromkeys(("embeddings", "exact_threshold", "skip_zeros"), FLAGS),
    **dict.fromkeys(("ties", "scope", "regrown"), CHOSEN),
    "reset_moments": ("nope", 1, OBJECT),
    "momentum": ("x", NAN, 1.0, -0.5, None, [0.9], OBJECT),
    **dict.fromkeys(("learning_rate", "weight_decay", "penalty", "alpha"), RATES),
    **dict.fromkeys(("beta", "l1", "temperature", "strength"), RATES),
    **dict.fromkeys(("max_norm", "alive_above", "threshold", "tolerance"), SPREADS),
    "prune_number": ("x", 0, 2.5, 2**31, OBJECT),
    "ramp": ("x", 0.5, OBJECT),
    "overrides": ("x", 5, OBJECT, {"w": 2.0}, {"w": "x"}),
    "dense": (5, OBJECT, [5]),
    "axes": TWO_AXES,
    "axis": ("x", 0.5, True, OBJECT, {"w": 0.5}),
    "unit_axis": ("x", 0.5, True, (), (0, "x"), OBJECT, {"w": "x"}, {"w": None}),
    **dict.fromkeys(("masks", "keep", "previous_masks", "explored", "within"), MASKS),
    "dense_until": (*COUNTS, 0),
    "freeze": FLAGS,
    "masks_or_state": (*MASKS, 0.1, None),
    "n": (-1, "x", NAN, None, OBJECT, True),
    "m": (*COUNTS, 33),
    **dict.fromkeys(("rows", "columns"), COUNTS[:6]),
    "k": ("x", -1, 99, 0.5, NAN, OBJECT, None),
    "guess": ("x", OBJECT, {"a": 1}),
    "costs": ("x", -1.0, OBJECT),
    "score": ("x", 3),
}
CYCLES = dict(density=0.5, update_period=4, update_stop=20)
KEYED = dict(inner=SGD, key=0, **CYCLES)
LEAVES = [jnp.arange(6.0), jnp.arange(4.0)]
SMALL = {"b": jnp.ones(3), "w": jnp.ones((4, 6))}
KEPT = {"b": optax.MaskedNode(), "w": jnp.ones((4, 6), bool)}
CALLS = {
    sparse_optax.rigl: KEYED,
    sparse_optax.sparse_momentum_regrow: KEYED,
    sparse_optax.sparse_evolutionary: KEYED,
    sparse_optax.dynamic_sparse: KEYED,
    sparse_optax.in_time_over_parameterization: KEYED,
    sparse_optax.granet: KEYED,
    sparse_optax.long_average_regrow: KEYED,
    sparse_optax.falling_budget_regrow: KEYED,
    sparse_optax.deep_rewiring: dict(inner=SGD, key=0, density=0.5, learning_rate=0.1),
    sparse_optax.static_sparse: dict(inner=SGD, density=0.5, key=0),
    sparse_optax.gradual_magnitude: dict(inner=SGD, **CYCLES),
    sparse_optax.iterative_magnitude: dict(
        inner=SGD, density=0.5, prunes=2, update_period=4
    ),
    sparse_optax.one_shot_magnitude: dict(inner=SGD, density=0.5, at=3),
    sparse_optax.ac_dc: dict(inner=SGD, **CYCLES),
    sparse_optax.network_surgery: dict(inner=SGD, density=0.5),
    sparse_optax.straight_through_magnitude: dict(inner=SGD, density=0.5),
    sparse_optax.top_kast: dict(inner=SGD, density=0.5, backward_density=0.75),
    regrowth.regrow: dict(
        prune=regrowth.prune.magnitude,
        redistribute=regrowth.redistribute.none,
        grow=regrowth.grow.random,
        **KEYED,
    ),
    gsm_mask: dict(density=0.5),
    gsm: dict(learning_rate=0.1, density=0.5),
    gsm_log_decay: dict(learning_rate=0.1, momentum=0.9, weight_decay=0.1, steps=3),
    gsm_gap: dict(params=SMALL, density=0.5),
    sparse_optax.ham: dict(inner=SGD, learning_rate=0.1),
    sparse_optax.add_l1_decay: dict(strength=0.1),
    sparse_optax.clip_by_active_norm: dict(max_norm=1.0),
    budgets.uniform: dict(density=0.5),
    budgets.erdos_renyi: dict(density=0.5),
    budgets.erdos_renyi_kernel: dict(density=0.5),
    budgets.linear: dict(density=0.5),
    budgets.nonzeros: dict(n=5),
    budgets.num_bytes: dict(n=500),
    budgets.count: dict(d=0.5, n=5),
    budgets.resolve: dict(density=0.5, params=SMALL),
    sparse_optax.schedules.cubic_density: dict(initial=1.0, final=0.5, start=0, stop=5),
    sparse_optax.schedules.geometric_density: dict(
        initial=1.0, final=0.5, start=0, stop=5
    ),
    sparse_optax.schedules.alternating_density: dict(final=0.5, phase=2, stop=8),
    sparse_optax.schedules.cosine_prune_rate: dict(stop=5),
    sparse_optax.schedules.linear_prune_rate: dict(stop=5),
    sparse_optax.schedules.is_due: dict(count=3, update_period=4),
    sparse_optax.schedules.first_due: dict(update_period=4),
    sparse_optax.schedules.last_due: dict(update_period=4, update_stop=20),
    masks.random_masks: dict(key=0, params=SMALL, density=0.5),
    masks.magnitude_masks: dict(params=SMALL, density=0.5),
    masks.shuffle_masks: dict(key=0, masks=KEPT),
    masks.random_masks_like: dict(key=0, masks=KEPT),
    sparse_optax.sparsify: dict(params=SMALL, masks_or_state=KEPT),
    sparse_optax.eligible: dict(params=SMALL),
    sparse_optax.report.summary: dict(params=SMALL, masks=KEPT),
    sparse_optax.patterns.blocks: dict(rows=2, columns=2),
    sparse_optax.patterns.n_m: dict(n=2, m=4),
    sparse_optax.patterns.slices: {},
    sparse_optax.patterns.output_units: {},
    selection.top_k_mask: dict(leaves=LEAVES, k=2),
    selection.kth_largest: dict(leaves=LEAVES, k=2),
    selection.select: dict(leaves=LEAVES, k=2),
}


def as_arrays(values):
    """The numbers among values as scalars of JAX: no less wrong for that."""
    numbers = [x for x in values if isinstance(x, int | float) and x not in (True, 0)]
    return [jnp.asarray(x) for x in numbers if not abs(x) > 2**30]


def is_named(value, text):
    """Whether a message shows a value, or the entry of a container that is wrong."""
    parts = value.values() if isinstance(value, dict) else [value]
    return any(str(x) in text for x in (value, *parts)) or repr(value) in text


@pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)
def test_every_bad_value_is_named(function):
    """At construction: function, argument, value and a cure, whatever the value is."""
    accepted = CALLS[function]
    names = inspect.signature(function).parameters
    swept = [name for name in names if name in BAD]
    assert swept
    for name in swept:
        # A count of JAX is clipped; masks are arrays, which the message names by dtype.
        also = [] if name in ("k", "masks_or_state") else as_arrays(BAD[name])
        for value in (*BAD[name], *also):
            with refuses(function.__name__, name) as caught:
                function(**{**accepted, name: value})
            assert is_named(value, str(caught.value)), (name, value, caught.value)


# Values that some argument takes and most do not.
ODD = (
    *(None, True, False, 0, 1, 3, -7, 2**31, 2**63, 10**30, 0.5, 1.0, -0.25),
    *(1e-320, NAN, float("inf"), 1j, "", "w", "auto", b"w", "\ud800", OBJECT, object),
    *([], [0.5], (), (1, 2), (-2, -1), {}, {"w": 1}, {"w": 0.5}, {1: 2}, {0.5}),
    *(np.float32(0.5), np.int8(2), np.uint32(2**31), np.bool_(True), np.ones(2)),
    *(np.array(0.5), np.array("x"), np.array([], object), np.array([None])),
    *(jnp.float32(0.5), jnp.int32(2), jnp.ones((4, 6), bool), jnp.zeros((0,))),
    *(jax.random.key(0), jax.ShapeDtypeStruct((4, 6), bool), Ellipsis, slice(3)),
    *(SMALL, KEPT, SGD, range(3), type(None)),
    *(lambda: 1, lambda count: count, lambda name, leaf: True),
    *(optax.MaskedNode(), optax.constant_schedule(0.5), budgets.uniform(0.5)),
    *(budgets.nonzeros(5), sparse_optax.patterns.n_m(2, 4), regrowth.prune.magnitude),
    *(np.datetime64("2020"), Fraction(1, 3), Decimal("0.5"), pathlib.Path("w")),
    *(float("-inf"), "0.5"),
)


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(397, id="some"),
        pytest.param(3, id="many", marks=pytest.mark.fuzz),
    ],
)
def test_any_value_is_taken_or_named(every, figures):
    """Whatever an argument is given, the call and ``init`` work or name it."""
    cases = [
        (function, name, value)
        for function in CALLS
        for name in inspect.signature(function).parameters
        if name != "params"  # which another argument may not fit
        for value in ODD
    ]
    # Trees that do not fit another argument, which the message names.
    others = {"leaves": "k =", "masks_or_state": "masks"}
    taken = 0
    for function, name, value in cases[::every]:
        try:
            made = function(**{**CALLS[function], name: value})
            if isinstance(made, optax.GradientTransformation):
                made.init(SMALL)
            taken += 1
        except ValueError as error:
            text = str(error)
            assert text.startswith(function.__name__), (name, value, text)
            assert name in text or others.get(name, name) in text, (name, value, text)
            assert re.search(f"(?i){CURE}", text), (name, value, text)
        except Exception as error:
            error.add_note(f"{function.__name__}({name}={value!r})")
            raise
    assert 0 < taken < len(cases)
    figures["arguments of public functions with any value"] += len(cases[::every])


TIMED = {
    sparse_optax.falling_budget_regrow: dict(KEYED, density_stop=8),
    sparse_optax.granet: dict(KEYED, density_start=4, density_stop=8),
    sparse_optax.gradual_magnitude: dict(inner=SGD, update_start=4, **CYCLES),
    sparse_optax.ac_dc: dict(inner=SGD, **CYCLES),
    sparse_optax.iterative_magnitude: CALLS[sparse_optax.iterative_magnitude],
    sparse_optax.one_shot_magnitude: CALLS[sparse_optax.one_shot_magnitude],
}
TIMES = ("update_period", "update_start", "update_stop", "density_stop", "at")


@pytest.mark.parametrize("function", TIMED, ids=lambda function: function.__name__)
def test_times_that_a_ramp_needs_are_known(function):
    """A traced one is named; one of JAX that is only closed over is a number."""
    timed = {name: n for name, n in TIMED[function].items() if name in TIMES}
    assert timed
    for name, n in timed.items():

        def first(value, name=name):
            tx = function(**TIMED[function] | {name: value})
            return tx.init(SMALL).regrow_masks["w"]

        with refuses(function.__name__, name, "[Tt]race", "static_args"):
            jax.jit(first)(n)
        value = jnp.int32(n)
        closed = jax.jit(lambda value=value: first(value))()
        np.testing.assert_array_equal(closed, first(n))


def test_every_count_may_be_a_numpy_scalar():
    for one in (np.int32(4), np.int64(4), np.array(4)):
        sparse_optax.rigl(**KEYED | dict(update_period=one, key=one))
    for share in (np.float32(0.25), np.float64(0.25), np.array(0.25)):
        for function in (gsm_mask, budgets.uniform):
            function(share)
        tx = sparse_optax.gradual_magnitude(
            SGD, density=share, update_period=1, update_stop=3
        )
        tx.init(SMALL)
        top = sparse_optax.top_kast(
            SGD,
            backward_density=np.float32(0.5),
            pattern=sparse_optax.patterns.n_m(1, 4),
        )
        top.init({"w": jnp.ones((4, 4))})
    tree = {"a": jnp.arange(4.0), "b": jnp.arange(4.0)}
    costs = {"a": np.float32(2), "b": 1}
    kept = selection.top_k_mask(tree, 5, costs=costs)
    assert [int(m.sum()) for m in kept.values()] == [2, 1]


def test_never_is_none():
    with refuses("rigl", "update_stop", str(10**10), "2147483647") as caught:
        sparse_optax.rigl(**KEYED | dict(update_stop=10**10))
    assert "None is never" in str(caught.value)
    with refuses("iterative_magnitude", "prunes", "2000", "before"):
        sparse_optax.iterative_magnitude(
            SGD, density=0.5, prunes=2000, update_period=2**22
        )


def test_seeds_past_32_bits_are_no_other_seeds():
    for seed in (2**32, 2**40, -1, np.int64(2**32)):
        with refuses("random_masks", "key", str(seed), r"2\*\*32"):
            masks.random_masks(seed, SMALL, 0.5)
    masks.random_masks(2**32 - 1, SMALL, 0.5)


def test_unknown_argument():
    for call in (
        lambda: sparse_optax.rigl(SGD, sparsity=0.95, update_period=4, key=0),
        lambda: gsm_mask(sparsity=0.95),
    ):
        with pytest.raises(TypeError, match=r"`sparsity`.*Give `density`"):
            call()
    with refuses("uniform", "`densty`", "", "'density'"):
        budgets.uniform(0.5, densty=1)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("prune_rate", lambda f: sparse_optax.rigl(**KEYED | dict(prune_rate=f))),
        (
            "ramp",
            lambda f: sparse_optax.straight_through_magnitude(SGD, density=0.5, ramp=f),
        ),
    ],
)
def test_schedule_that_is_no_number(name, make):
    with refuses("", name, "", "schedule"):
        make(lambda count: jnp.full(1, 0.5)).init(SMALL)


def test_numbers_for_masks():
    with refuses("sparsify", "masks_or_state", "0.1", "magnitude_masks"):
        sparse_optax.sparsify(SMALL, 0.1)


def test_summary_under_jit():
    state = sparse_optax.static_sparse(SGD, density=0.5, key=0).init(SMALL)
    with refuses("summary", "opt_state", "traced", "outside jit"):
        jax.jit(lambda s: sparse_optax.report.summary(SMALL, s) and 0)(state)


def test_axes_that_are_one():
    """-2 of a matrix is 0; of a convolution it is not."""
    made = budgets.erdos_renyi(0.5, axes=(0, -2))
    with refuses("erdos_renyi", "axes", r"\(0, -2\)", "two axes"):
        made.counts(SMALL)
    made.counts({"conv": jnp.ones((3, 3, 4, 5))})


# --- trees and states that do not fit -------------------------------------------------
TWO = {"a": {"kernel": jnp.ones((8, 4))}, "b": {"kernel": jnp.ones((4, 2))}}
MOVING = {"density": 0.5, "update_period": 2, "update_stop": 9, "key": 0}


STEPPED = {
    "rigl": lambda inner: sparse_optax.rigl(inner, **MOVING),
    "static_sparse": lambda inner: sparse_optax.static_sparse(
        inner, density=0.5, key=0
    ),
    "top_kast": lambda inner: sparse_optax.top_kast(
        inner, density=0.25, backward_density=0.5
    ),
    "granet": lambda inner: sparse_optax.granet(inner, **MOVING),
    "dynamic_sparse": lambda inner: sparse_optax.dynamic_sparse(inner, **MOVING),
    "long_average_regrow": lambda inner: sparse_optax.long_average_regrow(
        inner, **MOVING
    ),
    "learning_compression": lambda inner: sparse_optax.learning_compression(
        inner, density=0.5, update_period=2, update_stop=9
    ),
    "ham": lambda inner: sparse_optax.ham(inner, 0.1),
    "l0_regularization": lambda inner: sparse_optax.l0_regularization(
        inner, examples=9, strength=0.1, key=0
    ),
    "sparse_variational_dropout": lambda inner: sparse_optax.sparse_variational_dropout(
        inner, examples=9, key=0
    ),
    "soft_weight_sharing": lambda _: sparse_optax.soft_weight_sharing(examples=9),
    "proximal_group_lasso": lambda _: sparse_optax.proximal_group_lasso(0.1, 0.1),
    "add_l1_decay": lambda _: sparse_optax.add_l1_decay(lambda count: 0.1),
    "gsm_mask": lambda _: sparse_optax.gsm_mask(0.5),
    "gsm": lambda _: sparse_optax.gsm(0.1, 0.5),
}


@pytest.mark.parametrize("name", STEPPED)
def test_a_gradient_that_does_not_fit_is_named_as_such(name):
    params = {"a": TWO["a"], "b": {"bias": jnp.ones(2)}}
    tx = STEPPED[name](optax.sgd(0.1))
    state = tx.init(params)
    for leaf, wrong in (
        ("a/kernel", {"a": {"kernel": jnp.ones((4, 8))}}),
        ("a/kernel", {"a": {"kernel": jnp.ones((1, 4))}}),  # it would be spread
        ("b/bias", {"b": {"bias": jnp.ones(5)}}),
    ):
        with refuses(name, f"the gradient of '{leaf}' has shape", "", "must be equal"):
            tx.update(params | wrong, state, params)
    with refuses(name, "the gradient has 1 leaves", "", "must be equal"):
        tx.update({"a": TWO["a"]}, state, params)


def test_a_gradient_of_none_is_left_out():
    tx = sparse_optax.add_l1_decay(0.1)
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "c": None}
    grads = {"a": jnp.ones(2), "b": None, "c": None}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], 1.1)
    assert updates["b"] is None


@pytest.mark.parametrize("name", STEPPED)
def test_the_state_of_another_transformation_is_named(name):
    """Of another optimizer, of another method, and with another optimizer inside."""
    alike = {"rigl": {"static_sparse"}, "static_sparse": {"rigl"}}
    tx = STEPPED[name](optax.sgd(0.1))
    others = {
        other: make(optax.sgd(0.1)).init(TWO)
        for other, make in STEPPED.items()
        if other != name and other not in alike.get(name, ())
    }
    inside = STEPPED[name](optax.adam(0.1)).init(TWO)
    if jax.tree.structure(inside) != jax.tree.structure(tx.init(TWO)):
        tx, others["inside"] = STEPPED[name](optax.adam(0.1)), tx.init(TWO)
    others |= {"sgd": optax.sgd(0.1).init(TWO), "chain": (tx.init(TWO),), "params": TWO}
    for other, state in {**others, "none": None}.items():
        with refuses(name, "`state` is a", "", "what init of the same") as caught:
            tx.update(TWO, state, TWO)
        assert "tx.init(params)" in str(caught.value), other


def test_an_error_of_the_users_own_is_not_about_the_state():
    def broken(updates, state, params=None):
        raise KeyError("mine")

    inner = optax.GradientTransformation(lambda params: (), broken)
    tx = sparse_optax.rigl(inner, **MOVING)
    with pytest.raises(KeyError, match="mine"):
        tx.update(TWO, tx.init(TWO), TWO)


def test_two_methods_of_one_layer_are_refused():
    def method(inner, *names):
        def where(name, leaf):
            return name.split("/")[0] in names

        return sparse_optax.rigl(inner, **MOVING, where=where)

    apart = method(method(optax.sgd(0.1), "a"), "b")
    assert len(apart.init(TWO).inner_state.regrow_masks) == 2
    with pytest.raises(ValueError, match=r"rigl: another sparse .*\['b/kernel'\], too"):
        method(method(optax.sgd(0.1), "a", "b"), "b").init(TWO)


@pytest.mark.parametrize(
    "pattern",
    [
        sparse_optax.patterns.n_m(2, 4, axis={"c/kernel": 0}),
        sparse_optax.patterns.blocks(2, 2, axes={"c/kernel": (0, 1)}),
        sparse_optax.patterns.output_units(axis={"c/kernel": 1}),
    ],
)
def test_axes_of_a_leaf_that_is_not_there(pattern):
    with pytest.raises(ValueError, match=r"`pattern`.*\['c/kernel'\].*'a/kernel'"):
        sparse_optax.masks.magnitude_masks(
            TWO, None if pattern.density else 0.5, pattern=pattern
        )


def test_several_keys_are_no_key():
    for keys in (
        jax.random.split(jax.random.key(0), 3),
        jax.random.split(jax.random.PRNGKey(0), 3),
        jnp.arange(3),
    ):
        with pytest.raises(ValueError, match=r"rigl: `key` has shape \(3.*must be one"):
            sparse_optax.rigl(SGD, **{**MOVING, "key": keys})
        assert sparse_optax.rigl(SGD, **{**MOVING, "key": keys[0]}).init(TWO)


# --- values of schedules --------------------------------------------------------------
SCHEDULED = {
    "rigl": ("prune_rate", lambda f: sparse_optax.rigl(**KEYED | {"prune_rate": f})),
    "gsm_mask": ("density", gsm_mask),
    "ham": ("learning_rate", lambda f: sparse_optax.ham(SGD, f)),
    "add_l1_decay": ("strength", sparse_optax.add_l1_decay),
    "proximal_group_lasso": (
        "strength",
        lambda f: sparse_optax.proximal_group_lasso(0.1, f),
    ),
    "soft_weight_sharing": (
        "strength",
        lambda f: sparse_optax.soft_weight_sharing(examples=9, strength=f),
    ),
    "l0_regularization": (
        "strength",
        lambda f: sparse_optax.l0_regularization(SGD, examples=9, strength=f, key=0),
    ),
    "sparse_variational_dropout": (
        "strength",
        lambda f: sparse_optax.sparse_variational_dropout(
            SGD, examples=9, strength=f, key=0
        ),
    ),
}
REWIRING = dict(inner=SGD, key=0, density=0.5, learning_rate=0.1)
for argument in ("l1", "temperature", "gradient_noise", "learning_rate"):
    SCHEDULED[f"deep_rewiring-{argument}"] = (
        argument,
        lambda f, argument=argument: sparse_optax.deep_rewiring(
            **REWIRING | {argument: f}
        ),
    )


@pytest.mark.parametrize("name", SCHEDULED)
def test_the_first_value_of_a_schedule_is_in_range(name):
    argument, make = SCHEDULED[name]
    for value in (-1.0, NAN, jnp.float32(-1.0), np.float32(NAN)):
        with refuses(name.split("-")[0], f"{argument}(0)", "-1.0|nan", "must be a"):
            make(lambda count, value=value: value).init(SMALL)
    make(lambda count: 0.5 + 0 * count).init(SMALL)
    # What is traced is not looked at.
    jax.jit(lambda x: jax.tree.leaves(make(lambda count: x).init(SMALL)))(0.5)


def test_every_value_of_a_rate_of_gsm_is_in_range():
    """All are computed, not only the first."""
    for late in (-0.1, NAN):
        with refuses("gsm_log_decay", "learning_rate(3)", str(late), "at least 0"):
            gsm_log_decay(lambda t, x=late: jnp.where(t < 3, 0.1, x), 0.9, 5e-4, 5)


def test_a_schedule_may_give_a_number_of_weights():
    """Of Python as of JAX; under `jit` both are traced or known, and pass as many."""
    for count in (5, jnp.int32(5)):
        tx = gsm_mask(lambda _, count=count: count)
        state = tx.init(SMALL)
        _, state = tx.update(SMALL, state, SMALL)
        assert int(state.gsm_passed["w"]) == 5
    with refuses("gsm_mask", "density(0)", "-2", "at least 0"):
        gsm_mask(lambda _: -2).init(SMALL)
    with refuses("gsm_mask", "density", "1., 1.", r"\(0, 1\]"):
        gsm_mask(jnp.ones(2))


@pytest.mark.parametrize("name", ["straight_through_magnitude", "network_surgery"])
def test_a_ramp_that_never_reaches_its_density(name):
    method = getattr(sparse_optax, name)
    falls = sparse_optax.schedules.cubic_density

    def start(ramp, update_stop=None, density=0.25):
        tx = method(SGD, density=density, ramp=ramp, update_stop=update_stop)
        return tx.init(SMALL)

    for ramp, stop, value in (
        (lambda count: 0.5, None, "0.5"),
        (falls(1.0, 0.5, 0, 8), 20, "0.5"),
        (falls(1.0, 0.25, 0, 8), 5, "0.34375"),
        (lambda count: jnp.where(count > 3, jnp.nan, 1.0), None, "nan"),
        (sparse_optax.schedules.Towards(lambda end: lambda count: 1.0), None, "1"),
    ):
        with refuses(name, "`ramp` is", value, "`density`, here 0.25"):
            start(ramp, stop)
    start(falls(1.0, 0.25, 0, 8), 9)
    start(falls(1.0, 0.1, 0, 8))
    start(sparse_optax.schedules.Towards(lambda end: falls(1.0, end, 0, 8)), 20)
    # The count of a budget is rounded down, and the ramp ends at what was asked for.
    start(falls(1.0, 0.27, 0, 8), density=budgets.erdos_renyi(0.27))


# --- two arguments that say one thing, and masks of nothing ---------------------------
GIVEN = {
    "rigl": lambda **k: sparse_optax.rigl(
        SGD, **CYCLES | {"density": None, "key": 0} | k
    ),
    "static_sparse": lambda **k: sparse_optax.static_sparse(SGD, **k),
    "deep_rewiring": lambda **k: sparse_optax.deep_rewiring(
        SGD, learning_rate=0.1, key=0, **k
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_where_and_masks_of_other_leaves(name):
    other = GIVEN[name](masks=KEPT, where=lambda name, leaf: name == "b")
    with refuses(name, "`where` and `masks`", r"\['b', 'w'\]", "must agree"):
        other.init(SMALL)
    GIVEN[name](masks=KEPT, where={"b": False, "w": True}).init(SMALL)


def test_a_prune_rate_and_a_prune_number():
    for rate in (0.3, 0.1, lambda count: 0.1):
        with refuses("dynamic_sparse", "prune_number", "3", "None beside `prune_rate`"):
            sparse_optax.dynamic_sparse(**KEYED, prune_rate=rate, prune_number=3)


@pytest.mark.parametrize("name", GIVEN)
def test_masks_that_keep_nothing(name):
    nothing = KEPT | {"w": jnp.zeros((4, 6), bool)}
    with refuses(name, "masks", "none of 24 weights", "at least one"):
        GIVEN[name](masks=nothing).init(SMALL)
    with refuses("set_masks", "masks", "none of 24 weights", "at least one"):
        sparse_optax.set_masks(GIVEN[name](masks=KEPT).init(SMALL), nothing)
    with refuses(name, "masks", "no mask", "at least one"):
        GIVEN[name](masks={"b": optax.MaskedNode(), "w": optax.MaskedNode()})


def test_masks_that_keep_nothing_where_a_ramp_fills_them():
    nothing = KEPT | {"w": jnp.zeros((4, 6), bool)}
    sparse_optax.falling_budget_regrow(**KEYED, masks=nothing).init(SMALL)


def test_nothing_to_be_used():
    with refuses("rigl", "within", "no mask", "at least one"):
        sparse_optax.rigl(**KEYED, within={})


@pytest.mark.parametrize(
    "make",
    [
        lambda: sparse_optax.top_kast(SGD, density=0.25, backward_density=0.5),
        lambda: sparse_optax.falling_budget_regrow(**KEYED),
        lambda: sparse_optax.l0_regularization(SGD, examples=9, strength=0.1, key=0),
    ],
    ids=["top_kast", "falling_budget_regrow", "l0_regularization"],
)
def test_leaves_without_entries_do_nothing(make):
    tx, params = make(), {"b": jnp.ones(3), "w": jnp.ones((0, 4))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].shape == (0, 4)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize(
    "make",
    [
        lambda: sparse_optax.learning_compression(
            optax.sgd(0.1), density=0.5, update_period=1, update_stop=2
        ),
        lambda: sparse_optax.straight_through_magnitude(
            optax.sgd(0.1), density=0.5, missing_decay=0.5
        ),
        lambda: sparse_optax.static_sparse(
            optax.chain(sparse_optax.clip_by_active_norm(1.0), optax.sgd(0.1)),
            density=0.5,
            key=0,
        ),
        lambda: sparse_optax.soft_weight_sharing(examples=9),
        lambda: sparse_optax.add_l1_decay(lambda count: jnp.float32(0.1)),
    ],
    ids=["lc", "missing_decay", "clip", "soft_weight_sharing", "l1"],
)
def test_floats_of_eight_bits(make, dtype):
    """They are not promoted: sums are in float32, as the optimizers of Optax do."""
    tx, params = make(), {"w": jnp.full((2, 4), 2, dtype)}
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == dtype
    assert bool(jnp.isfinite(updates["w"].astype(jnp.float32)).all())
