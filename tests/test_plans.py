"""What a run of the experiments hands to its method, without training."""

import dataclasses
import hashlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import refuses

import sparse_optax
from sparse_optax import regrowth
from sparse_optax.experiments import config, methods, models, recipes, setup, tables
from sparse_optax.experiments.tables import resnet50_mostafa

SHAPES = {"fc1": (20, 30), "fc2": (30, 10)}


def draw(key):
    keys = jax.random.split(key, len(SHAPES))
    return {
        name: {"kernel": jax.random.normal(k, shape), "bias": jnp.zeros(shape[1])}
        for k, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def setup_of(params=None, **options):
    run = config.resolve(config.TrainConfig(**({"epochs": 10} | options)))
    return setup.Setup(
        config=run,
        steps_per_epoch=4,
        key=jax.random.key(5),
        forward=lambda params, images: images,
        params=draw(jax.random.key(1)) if params is None else params,
        images=(None, None),
        draw=draw,
        init_key=jax.random.key(1),
    )


@pytest.mark.parametrize("redistribute", recipes.REDISTRIBUTE)
@pytest.mark.parametrize("grow", recipes.GROW)
@pytest.mark.parametrize("prune", recipes.PRUNE)
def test_a_mixture_is_the_one_that_was_asked_for(
    monkeypatch, prune, redistribute, grow
):
    seen = {}
    monkeypatch.setattr(
        sparse_optax,
        "sparse_momentum_regrow",
        lambda inner, **given: seen.update(given),
    )
    rules = dict(prune=prune, redistribute=redistribute, grow=grow)
    made = setup_of(method="sparse_momentum", **rules)
    methods.BUILDERS["sparse_momentum"](made)
    assert seen["prune"] is vars(regrowth.prune)[prune]
    assert seen["redistribute"] is vars(regrowth.redistribute)[redistribute]
    assert seen["grow"] is vars(regrowth.grow)[grow]
    assert (seen["update_period"], seen["update_stop"]) == (4, 40)


@pytest.mark.parametrize(
    ("decay", "wanted"),
    [
        ("constant", [0.4, 0.4, 0.4]),
        ("linear", [0.4, 0.3, 0.2]),
        ("cosine", [0.4, 0.2 * (1 + np.cos(np.pi / 4)), 0.2]),
    ],
)
def test_the_prune_rate_and_its_decay(decay, wanted):
    rate = setup.rate(setup_of(prune_rate=0.4, prune_decay=decay))
    got = [float(rate(step)) for step in (0, 10, 20)]  # of 40 steps
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        # A tenth of 600 and of 300; or the 90 in proportion to inputs and outputs.
        ("uniform", [60, 30]),
        ("erdos_renyi", [50, 40]),
    ],
)
def test_the_shares_of_a_run(kind, wanted):
    made = setup_of(method="static", density=0.1, shares=kind)
    plan = methods.BUILDERS["static"](made)
    masks = plan.masks(plan.optimizer.init(made.params))
    assert [int(masks[name]["kernel"].sum()) for name in SHAPES] == wanted


@pytest.mark.parametrize(
    "method", [name for name, entry in recipes.METHODS.items() if entry.pooled]
)
def test_shares_that_a_method_would_not_read_are_refused(method):
    with refuses("TrainConfig", "shares", "linear", "all layers at once"):
        config.resolve(config.TrainConfig(method=method, shares="linear"))
    run = config.resolve(config.TrainConfig(method=method))
    assert config.resolve(run) == run


def test_thin_is_a_model_of_its_density():
    run = config.resolve(config.TrainConfig(method="thin", density=0.02))
    assert run.model == "thin-lenet-0.02"
    with refuses("TrainConfig", "model", "vgg16-c", "lenet-300-100"):
        config.resolve(config.TrainConfig(method="thin", model="vgg16-c"))
    with refuses("TrainConfig", "density", "0.07", "0.01, 0.02"):
        config.resolve(config.TrainConfig(method="thin", density=0.07))


def test_top_kast_takes_the_shares_of_a_run():
    made = setup_of(method="top_kast", density=0.1, shares="erdos_renyi")
    plan = methods.BUILDERS["top_kast"](made)
    masks = plan.masks(plan.optimizer.init(made.params))
    assert [int(masks[name]["kernel"].sum()) for name in SHAPES] == [50, 40]


def test_cycles_cut_the_time_between_two_of_them():
    made = setup_of(update_epochs=3, cycles=2)
    assert (made.steps_per_epoch, made.period) == (4, 6)
    assert setup_of(cycles=4).period == 1
    with refuses("train", "cycles", "5", "4 steps"):
        setup_of(cycles=5).period  # noqa: B018


UNREAD = [
    ({"method": "dense", "density": 0.05}, "density"),
    ({"method": "dense", "shares": "linear"}, "shares"),
    ({"method": "thin", "density": 0.02, "shares": "linear"}, "shares"),
    ({"method": "static", "cycles": 2}, "cycles"),
    ({"method": "snip", "update_epochs": 2}, "update_epochs"),
    ({"method": "l0_regularization", "momentum": 0.5}, "momentum"),
    ({"method": "soft_weight_sharing", "optimizer": "adamw"}, "optimizer"),
    ({"method": "sparse_variational_dropout", "weight_decay": 0.5}, "weight_decay"),
    ({"method": "rigl", "optimizer": "adamw", "momentum": 0.5}, "momentum"),
    ({"method": "rigl", "optimizer": "adamw", "nesterov": False}, "nesterov"),
    ({"method": "rigl", "schedule": "one_cycle", "drop_epochs": (3,)}, "drop_epochs"),
    ({"method": "rigl", "schedule": "one_cycle", "warmup_epochs": 3}, "warmup_epochs"),
]


@pytest.mark.parametrize(("values", "unread"), UNREAD)
def test_values_that_change_nothing_are_refused(values, unread):
    with refuses("TrainConfig", unread, re.escape(str(values[unread])), "out"):
        config.resolve(config.TrainConfig(**values))


def test_every_run_of_a_table_can_be_resolved_and_its_dense_run():
    for table in tables.TABLES.values():
        for row in table.rows:
            run = config.resolve(row.config)
            assert config.resolve(config.dense_of(run)).method == "dense"


def test_one_cycle_and_warm_up():
    rate = setup.learning_rate(
        setup_of(schedule="one_cycle", learning_rate=0.5).config, 4
    )
    got = np.array([rate(step) for step in range(41)])
    assert got.argmax() == 12  # 30% of 40 steps
    np.testing.assert_allclose(got[12], 0.5, rtol=1e-6)
    np.testing.assert_allclose(got[0], 0.5 / 25, rtol=1e-6)
    # Along a cosine: half way up in the middle of the climb.
    np.testing.assert_allclose(got[6], (0.5 + 0.5 / 25) / 2, rtol=1e-5)
    assert got[40] < 1e-4
    plain = dict(learning_rate=0.5, drop_epochs=(5,))
    warm, cold = (
        setup.learning_rate(setup_of(warmup_epochs=epochs, **plain).config, 4)
        for epochs in (2, 0)
    )
    steps = np.arange(40)
    wanted = np.minimum(1, steps / 8) * np.array([cold(step) for step in steps])
    np.testing.assert_allclose([warm(step) for step in steps], wanted, rtol=1e-6)
    assert cold(0) == 0.5


def test_adamw_decays_the_kernels_beside_the_gradient():
    made = setup_of(optimizer="adamw", weight_decay=0.3, decay="kernels")
    optimizer = setup.inner(made)
    state = optimizer.init(made.params)
    nothing = jax.tree.map(jnp.zeros_like, made.params)
    updates, _ = optimizer.update(nothing, state, made.params)
    rate = made.config.learning_rate
    for name in SHAPES:
        expected = -rate * 0.3 * np.asarray(made.params[name]["kernel"])
        np.testing.assert_allclose(updates[name]["kernel"], expected, rtol=1e-5)
        assert not np.asarray(updates[name]["bias"]).any()


def test_gsm_with_adamw_lets_its_share_pass():
    made = setup_of(
        method="gsm", optimizer="adamw", density=0.1, base=config.Base(epochs=0)
    )
    plan = methods.BUILDERS["gsm"](made)
    state = plan.optimizer.init(made.params)
    gradient = draw(jax.random.key(7))
    _, state = plan.optimizer.update(gradient, state, made.params)
    moved = [np.count_nonzero(state[1][0].mu[name]["kernel"]) for name in SHAPES]
    score = np.concatenate(
        [
            np.abs(np.asarray(gradient[n]["kernel"] * made.params[n]["kernel"])).ravel()
            for n in SHAPES
        ]
    )
    cut = np.sort(score)[-90]  # a tenth of 900
    assert sum(moved) == 90
    assert moved[0] == np.count_nonzero(score[:600] >= cut)


def test_two_of_four_inputs():
    run = dict(method="gradual_magnitude", density=0.5, pattern="2:4")
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sparse_optax, "gradual_magnitude", lambda inner, **given: seen.update(given)
        )
        methods.BUILDERS["gradual_magnitude"](setup_of(**run))
    assert seen["pattern"] == sparse_optax.patterns.n_m(2, 4)
    with refuses("TrainConfig", "pattern", "2:4", "density=0.5"):
        config.resolve(config.TrainConfig(**run | {"density": 0.25}))


def test_the_budget_of_mostafa_and_wang():
    params = jax.eval_shape(
        lambda key: models.create_stateful("wrn-28-2", (32, 32, 3), 10, key=key)[1],
        jax.random.key(0),
    )
    counts = sparse_optax.budgets.resolve(setup.mostafa_wang(params, 0.1), params)
    paths = jax.tree_util.tree_leaves_with_path(params)
    kept, dense = 0, 0
    for (path, leaf), n in zip(
        paths, jax.tree.leaves(counts, is_leaf=hole), strict=True
    ):
        if hole(n):
            continue
        names = [key.key for key in path]
        if "shortcut" in names or names[0] in ("conv", "fc"):
            assert n == leaf.size
            dense += leaf.size
        else:
            assert n < leaf.size
            kept += n
    assert (kept, dense) == (1_451_520 // 10, 12_464)
    with refuses("train", "shares", "mostafa_wang", "Dense_0/kernel"):
        setup.mostafa_wang({"Dense_0": {"kernel": jnp.ones((3, 4))}}, 0.1)


def resnet_50():
    """The shapes of its parameters."""
    shape = (224, 224, 3)
    return jax.eval_shape(
        lambda key: models.create_stateful("resnet-50", shape, 1000, key=key)[1],
        jax.random.key(0),
    )


def test_in_a_resnet_50_the_last_layer_takes_part():
    params = resnet_50()
    made = setup_of(model="resnet-50", method="static", shares="mostafa_wang")
    made = made._replace(params=params)
    budget = setup.budget(made, 0.1)
    counts = sparse_optax.budgets.resolve(budget, params)
    kept = sum(n for n in jax.tree.leaves(counts, is_leaf=hole) if not hole(n))
    # The first layer and the four shortcuts are dense, by the sizes of the network.
    dense = 9_408 + 2_768_896
    assert kept == dense + int(0.1 * (25_502_912 - dense))
    fc = counts["fc"]["kernel"]
    assert abs(fc - 0.1 * 2_048_000) < 2


@pytest.mark.parametrize(
    ("group", "wanted", "kept"),
    [
        ("dense", {"epochs": 100, "nesterov": True, "label_smoothing": 0.0}, None),
        # A tenth of all weights; the others keep 2,778,304 dense besides.
        (
            "sparse_momentum_d0.1",
            {
                "prune_rate": 0.5,
                "nesterov": False,
                "drop_epochs": (30, 60, 80),
                "warmup_epochs": 5,
                "label_smoothing": 0.1,
            },
            2_550_291,
        ),
        ("dynamic_sparse_d0.1", {"epochs": 100, "nesterov": True}, 5_050_764),
        ("static_d0.2", {"epochs": 200, "drop_epochs": (60, 120, 180)}, 7_323_225),
    ],
)
def test_rows_of_resnet_50_are_those_of_their_sources(group, wanted, kept):
    run = config.resolve(config.TrainConfig(**resnet50_mostafa.LINES[group].options))
    assert {name: getattr(run, name) for name in wanted} == wanted
    assert (run.batch_size, run.learning_rate, run.split) == (256, 0.1, "full")
    if kept is None:
        return
    params = jax.eval_shape(
        lambda key: models.create_stateful("resnet-50", (224, 224, 3), 1000, key=key)[
            1
        ],
        jax.random.key(0),
    )
    budget = setup.budget(setup_of()._replace(config=run, params=params))
    if isinstance(budget, float):
        budget = sparse_optax.budgets.uniform(budget)
    counts = sparse_optax.budgets.resolve(budget, params)
    # Each of the 54 layers rounds its own share.
    found = sum(int(n) for n in jax.tree.leaves(counts, is_leaf=hole) if not hole(n))
    assert abs(found - kept) <= 27


def hole(leaf):
    return isinstance(leaf, optax.MaskedNode)


@pytest.mark.parametrize(
    ("finder", "method", "density"),
    [
        ("sparse_momentum", "sparse_momentum", 0.1),
        ("gsm", "gsm", 0.1),
        ("magnitude", "dense", 1.0),
    ],
)
def test_what_finds_the_mask_of_a_ticket(finder, method, density):
    run = config.TrainConfig(
        dataset="mnist", method="ticket", finder=finder, density=0.1, seed=3
    )
    found = config.base_of(config.resolve(run))
    assert found is not None
    assert (found.method, found.density, found.seed) == (method, density, 3)
    if finder == "magnitude":  # the dense network that GSM of this seed starts from
        gsm = config.base_of(config.resolve(dataclasses.replace(run, finder="gsm")))
        assert gsm is not None
        assert config.base_of(gsm) == found


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("static", "finder", "gsm"),
        ("rigl", "prune_rate", 0.9),
        ("rigl", "prune_decay", "linear"),
        ("sparse_evolutionary", "grow", "gradient"),
        ("granet", "prune", "global_magnitude"),
        ("dense", "redistribute", "none"),
        ("l2", "l1", 1e-3),
        ("snip", "ticket", "random"),
        ("sparse_momentum", "gate", 0.1),
        ("magnitude", "settle_epoch", 1),
    ],
)
def test_what_a_method_does_not_read_is_refused(method, field, value):
    # It would change the name of the run, and nothing else.
    with refuses("TrainConfig", field, repr(value), "which does not read it"):
        config.resolve(config.TrainConfig(method=method, **{field: value}))


def test_a_ticket_of_magnitude_is_the_largest_weights_of_the_whole_network():
    trained = draw(jax.random.key(2))
    made = setup_of(trained, method="ticket", finder="magnitude", density=0.2)
    plan = methods.BUILDERS["ticket"](made)
    masks = plan.masks(plan.optimizer.init(trained))
    pool = np.concatenate([np.abs(trained[n]["kernel"]).ravel() for n in SHAPES])
    cut = np.sort(pool)[-180]  # a fifth of 900
    for name in SHAPES:
        wanted = np.abs(np.asarray(trained[name]["kernel"])) >= cut
        np.testing.assert_array_equal(masks[name]["kernel"], wanted)


def test_a_text_needs_the_model_that_reads_it():
    with refuses("TrainConfig", "model", "lenet-300-100", "go together"):
        config.resolve(config.TrainConfig(dataset="topics"))
    with refuses("TrainConfig", "model", "transformer", "go together"):
        config.resolve(config.TrainConfig(model="transformer"))


def test_names_of_runs_are_those_from_before_their_later_values():
    """Folders of runs that were begun then are found again."""
    run = config.TrainConfig(dataset="mnist", density=0.02)
    name = config.default_name(config.resolve(run))
    values = config.as_dict(config.resolve(run))
    old = {k: v for k, v in values.items() if k not in config.EARLIER}
    del old["base"]["weight_decay"]
    text = json.dumps(old, sort_keys=True)
    assert name.endswith(hashlib.sha256(text.encode()).hexdigest()[:8])
    for other in ({"augment": "zero"}, {"cycles": 2}, {"dtype": "bfloat16"}):
        changed = config.resolve(dataclasses.replace(run, **other))
        assert config.default_name(changed) != name


def ticket(control):
    """Kernels of a run's start and its masks, of the final weights it is made from."""
    trained = draw(jax.random.key(2))
    trained["fc2"]["kernel"] *= 5.0  # so that the layers do not keep the same share
    final = sparse_optax.sparsify(
        trained, sparse_optax.masks.magnitude_masks(trained, 0.2)
    )
    made = setup_of(final, method="ticket", density=0.2, ticket=control)
    plan = methods.BUILDERS["ticket"](made)
    state = plan.optimizer.init(final)
    start, masks = plan.start(final, state), plan.masks(state)
    pick = lambda tree: [np.asarray(tree[name]["kernel"]) for name in SHAPES]  # noqa: E731
    return pick(start), pick(masks), pick(final)


def test_tickets_and_their_controls():
    first = [np.asarray(draw(jax.random.key(1))[name]["kernel"]) for name in SHAPES]
    kinds = ("own", "reinitialised", "shuffled", "random")
    made = {kind: ticket(kind) for kind in kinds}
    for kind, (start, masks, final) in made.items():
        found = [w != 0 for w in final]
        same_mask = [(a == b).all() for a, b in zip(masks, found, strict=True)]
        own = [
            (w[m] == f[m]).all() for w, m, f in zip(start, masks, first, strict=True)
        ]
        assert all(same_mask) == (kind in ("own", "reinitialised"))
        assert all(own) == (kind != "reinitialised")
        assert not any(w[~m].any() for w, m in zip(start, masks, strict=True))
        counts, wanted = ([int(m.sum()) for m in each] for each in (masks, found))
        assert sum(counts) == sum(wanted) == 180
        assert (counts == wanted) == (kind != "random")
