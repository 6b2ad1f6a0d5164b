"""What a run of the experiments hands to its method, without training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import refuses

import sparse_optax
from sparse_optax import regrowth
from sparse_optax.experiments import config, methods, recipes, setup

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
