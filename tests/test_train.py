"""The train loop: what it trains, records, checkpoints and takes up again."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import numpy as np
import optax
import pytest

import sparse_optax

pytest.importorskip("flax")

from sparse_optax import load_sparse, masks
from sparse_optax.experiments import (
    checkpoints,
    data,
    models,
    recipes,
    records,
    setup,
    train,
    units,
)
from sparse_optax.experiments import config as configs
from sparse_optax.export import file

# Dense where the method does not matter: it compiles in half a second.
SMALL = configs.TrainConfig(method="dense", epochs=4, drop_epochs=(3,))
SPARSE = dataclasses.replace(SMALL, method="sparse_momentum")
BASE = configs.Base(
    epochs=2, batch_size=64, learning_rate=0.03, drop_epochs=(), momentum=0.9
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run compiles anew; here equal programs come from a cache on disk."""
    cache = pytest.importorskip("jax.experimental.compilation_cache.compilation_cache")
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        # The address of a callback, which differs although the program is the same.
        "jax_remove_custom_partitioning_ptr_from_cache_key": True,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for settings in (options, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        cache.reset_cache()
        if settings is options:
            yield


class Killed(Exception):
    """Stands for a kill: nothing of the run is told about it."""


def kill_after(epochs, stage):
    def on_epoch(progress):
        if progress.stage == stage and progress.epoch == epochs:
            raise Killed

    return on_epoch


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- configuration -----------------------------------------------------------------


def test_recipe_of_mnist_is_the_protocol_of_the_paper():
    run = configs.resolve(configs.TrainConfig(dataset="mnist"))
    assert (run.epochs, run.batch_size, run.split) == (100, 100, "lee")
    assert (run.learning_rate, run.momentum, run.nesterov) == (0.1, 0.9, True)
    assert (run.weight_decay, run.decay, run.init) == (5e-4, "all", "torch")
    rate = setup.learning_rate(run, steps_per_epoch=540)
    at = [float(rate(step)) for step in (0, 24_999, 25_000, 49_999, 50_000, 53_999)]
    np.testing.assert_allclose(at, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


def test_recipe_of_gsm_is_that_of_the_paper_and_starts_dense():
    run = configs.resolve(configs.TrainConfig(dataset="mnist", method="gsm"))
    assert (run.epochs, run.batch_size, run.momentum) == (240, 256, 0.99)
    assert (run.weight_decay, run.decay, run.drop_epochs) == (
        5e-4,
        "kernels",
        (160, 200),
    )
    base = configs.base_of(run)
    assert (base.method, base.density, base.epochs, base.momentum) == (
        "dense",
        1.0,
        100,
        0.9,
    )
    assert base.base == configs.ResolvedBase()


def test_variants_share_their_base():
    plain, gate, settled, other = (
        configs.base_of(configs.resolve(configs.TrainConfig(method="gsm", **options)))
        for options in ({}, {"gate": 0.02}, {"settle_epoch": 9}, {"seed": 1})
    )
    assert plain == gate == settled
    assert plain != other


def test_resolving_twice_changes_nothing():
    for method, drops in itertools.product(
        recipes.METHODS, ({}, {"drop_steps": (7,)}, {"drop_epochs": (2,)})
    ):
        run = configs.resolve(configs.TrainConfig(method=method, **drops))
        assert configs.resolve(run) == run


def test_drops_that_are_given_replace_those_of_the_recipe():
    run = configs.resolve(configs.TrainConfig(dataset="mnist", drop_epochs=(5,)))
    assert (run.drop_steps, run.drop_epochs) == ((), (5,))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"dataset": "svhn"}, "dataset='svhn'; choose one of digits"),
        ({"model": "vgg"}, "model='vgg'; choose one of lenet-300-100"),
        ({"method": "prune"}, "method='prune'; choose one of dense"),
        ({"density": 0.0}, r"density=0.0 must be in \(0, 1\]"),
        ({"density": 1.5}, r"density=1.5 must be in \(0, 1\]"),
        ({"density": float("nan")}, r"density=nan must be in \(0, 1\]"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"learning_rate": float("inf")}, "learning_rate=inf must be a finite"),
        ({"momentum": 1.0}, r"momentum=1.0 must be in \[0, 1\)"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be a finite number, 0 or"),
        ({"prune_rate": 2.0}, r"prune_rate=2.0 must be in \[0, 1\]"),
        ({"update_epochs": 0}, "update_epochs=0 must be between 1 and epochs=100"),
        ({"seed": -1}, r"seed=-1 must be in \[0, 4294967295\]"),
        ({"method": "gsm", "gate": 0.0}, "gate=0.0 must be in"),
        (
            {"method": "gsm", "settle_epoch": 900},
            "settle_epoch=900 must be between 0 and epochs",
        ),
        ({"method": "gsm", "decay": "all"}, "decay='all' must be 'kernels'"),
        ({"drop_steps": (1,), "drop_epochs": (1,)}, "both drop_steps and drop_epochs"),
        ({"epochs": 2, "drop_epochs": (1, 5)}, r"drop_epochs=\(1, 5\) must be below"),
        (
            {"base": configs.Base(epochs=3, drop_epochs=(3,))},
            r"base\.drop_epochs=\(3,\) must be below base\.epochs=3",
        ),
        ({"base": configs.Base(momentum=0.5)}, "base has .* but no epochs"),
        ({"base": configs.Base(epochs=-2)}, "base.epochs=-2 must be 0, for no dense"),
        ({"seed": 2**32}, r"seed=4294967296 must be in \[0, 4294967295\]"),
        ({"drop_steps": (-1,)}, r"drop_steps=\(-1,\) must be numbers from 1"),
        ({"drop_steps": (0, 3)}, r"drop_steps=\(0, 3\) must be numbers from 1"),
        ({"drop_steps": (3, 3)}, r"drop_steps=\(3, 3\) must be .* each once"),
        ({"drop_epochs": (5, 3)}, r"drop_epochs=\(5, 3\) must be .* increasing"),
        ({"drop_steps": (10**20,)}, r"drop_steps=.* must be .* to 2147483647"),
        ({"drop_epochs": (2**32 + 1,)}, r"drop_epochs=.* must be below epochs=100"),
        ({"drop_factor": float("inf")}, "drop_factor=inf must be a finite"),
        ({"drop_factor": float("nan")}, "drop_factor=nan must be a finite"),
        ({"drop_factor": -0.1}, "drop_factor=-0.1 must be a finite number, 0 or"),
        ({"weight_decay": float("inf")}, "weight_decay=inf must be a finite"),
        ({"learning_rate": 1e39}, "learning_rate=1e\\+39 must be a finite"),
        ({"l1": float("nan")}, "l1=nan must be a finite"),
        ({"update_epochs": 10**9}, "update_epochs=1000000000 must be between 1"),
        ({"base": configs.Base(2, drop_epochs=(-1,))}, r"base.drop_epochs=\(-1,\)"),
    ],
)
def test_wrong_values(values, words):
    with pytest.raises(ValueError, match=f"TrainConfig: {words}"):
        configs.resolve(configs.TrainConfig(**values))


# What fits no model or data set, and the sentence that says so.
UNFIT = [
    ({"batch_size": 2000}, "batch_size=2000 must be at most 1293"),
    *(
        ({"method": method, "density": 1e-9}, "density=1e-09 must be at least 1.99e-05")
        for method in ("l1", "l2", "magnitude", "gsm", "fisher", "snip", "synflow")
    ),
    ({"method": "gsm", "gate": 1e-9}, "gate=1e-09 must be at least 1.99e-05"),
    ({"epochs": 10**10}, "epochs=10000000000 must be at most 53687091"),
    ({"drop_epochs": (10**8,)}, r"drop_epochs=\(100000000,\) must be below epochs=100"),
    ({"base": configs.Base(10**10)}, "base.epochs=10000000000 must be at most"),
]


@pytest.mark.parametrize(("values", "words"), UNFIT)
def test_what_does_not_fit_is_told_before_the_first_epoch(values, words):
    """By the real counts of model and data set, also where a base comes first."""
    epochs = []
    run = configs.TrainConfig(**values)
    with pytest.raises(ValueError, match=f"TrainConfig: {words}"):
        train.train(run, runs=None, on_epoch=epochs.append)
    assert not epochs


def test_a_model_that_a_method_cannot_take_is_told_before_its_base(monkeypatch):
    x, y = np.zeros((60, 28, 28, 1), np.float32), np.zeros(60, np.int32)
    images = data.Dataset(x, y, x, y, x, y, 4, "images")
    monkeypatch.setattr(data, "load", lambda *_, **__: images)
    run = configs.TrainConfig(method="layerwise_obs", model="lenet-5-caffe")
    epochs = []
    with pytest.raises(ValueError, match="needs a chain of dense layers"):
        train.train(run, runs=None, on_epoch=epochs.append)
    assert not epochs


# -- training ----------------------------------------------------------------------


def test_dense_is_sgd_over_shuffled_batches():
    """Two epochs against a plain loop: same order, same steps, same weights."""
    run = configs.resolve(
        configs.TrainConfig(method="dense", epochs=2, drop_epochs=(1,), seed=3)
    )
    trained = train.train(run, runs=None)
    digits = data.load("digits")
    init_key, order_key, _ = jax.random.split(jax.random.key(3), 3)
    apply, params = models.create("lenet-300-100", (8, 8, 1), 10, key=init_key)

    @jax.jit
    def gradient(params, x, y):
        def loss(params):
            log_p = jax.nn.log_softmax(apply(params, x))
            return -log_p[np.arange(32), y].mean()

        return jax.grad(loss)(params)

    velocity = jax.tree.map(np.zeros_like, params)
    for epoch, rate in ((0, 0.1), (1, 0.01)):
        key = jax.random.fold_in(order_key, epoch)
        order = np.asarray(jax.random.permutation(key, 1293))
        for rows in order[: 40 * 32].reshape(40, 32):
            g = gradient(params, digits.train_x[rows], digits.train_y[rows])
            g = jax.tree.map(lambda g, w: g + 5e-4 * w, g, params)
            velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, g)
            params = jax.tree.map(
                lambda w, v, g, rate=rate: w - rate * (g + 0.9 * v), params, velocity, g
            )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4),
        trained.params,
        params,
    )
    wrong = np.asarray(apply(params, digits.test_x)).argmax(-1) != digits.test_y
    assert trained.record.results["test_error"] == pytest.approx(
        100 * wrong.mean(), abs=0.6
    )


def test_smooth_labels_give_their_share_to_all_classes():
    """The loss of one step over all images, at a rate of zero, by its definition."""
    digits = data.load("digits")
    images = len(digits.train_x)
    run = configs.TrainConfig(
        method="dense",
        density=1.0,
        epochs=1,
        batch_size=images,
        learning_rate=0.0,
        drop_epochs=(),
        label_smoothing=0.2,
    )
    found = train.train(run, runs=None).record.history["train_loss"][0]
    key = jax.random.split(jax.random.key(0), 3)[0]
    apply, params = models.create("lenet-300-100", (8, 8, 1), 10, key=key)
    logits = np.asarray(apply(params, digits.train_x), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    own = log_p[np.arange(images), digits.train_y]
    assert found == pytest.approx(-(0.8 * own + 0.2 * log_p.mean(-1)).mean(), rel=1e-5)
    with pytest.raises(ValueError, match=r"label_smoothing=1 must be in \[0, 1\)"):
        configs.resolve(configs.TrainConfig(label_smoothing=1))


def test_sparse_momentum_learns_with_the_weights_it_was_given():
    run = dataclasses.replace(SPARSE, density=0.1, epochs=8, drop_epochs=(6,))
    trained = train.train(run, runs=None)
    results = trained.record.results
    assert results["weights"] == 50_200
    assert results["kept"] == 5_020
    assert results["nonzeros"] <= 5_020
    counted = sum(
        int(np.count_nonzero(layer["kernel"])) for layer in trained.params.values()
    )
    assert results["nonzeros"] == counted
    assert results["skipped_cycles"] == 0
    # Chance is 90; 8 short epochs come to about 10.
    assert results["test_error"] < 20
    assert results["valid_error"] < 20
    kept = [layer["kept"] for layer in trained.record.layers]
    assert kept != [1920, 3000, 100], "no weight moved between the layers"


def test_no_cycle_follows_the_last_step():
    """What is evaluated after the last epoch is the net that was trained."""
    trained = train.train(SPARSE, runs=None)
    mask = trained.opt_state.regrow_masks["fc2"]["kernel"]
    kernel = np.asarray(trained.params["fc2"]["kernel"])
    assert not kernel[~np.asarray(mask)].any()
    # A weight that a cycle has just grown is zero; after an epoch few still are.
    assert np.count_nonzero(kernel) > 0.7 * masks.count({"w": mask})


def test_gsm_is_cut_to_the_largest_weights():
    run = configs.TrainConfig(
        method="gsm", epochs=3, drop_epochs=(), base=BASE, density=0.05
    )
    trained = train.train(run, runs=None)
    record = trained.record
    assert record.results["nonzeros"] == record.results["kept"] == 2_510
    assert record.results["gap"]["kept"] == 2_510
    assert record.results["test_error_before_cut"] == record.history["test_error"][-1]
    assert record.base["config"]["epochs"] == 2
    assert record.base["results"]["nonzeros"] == 50_200
    assert record.history["below_1e-03"][-1] > record.history["below_1e-03"][0]


def test_settled_gsm_trains_only_the_largest_weights():
    """From the settled epoch on, no gradient reaches what will be cut."""
    common = dict(method="gsm", base=BASE, density=0.05, drop_epochs=(), epochs=20)
    settled = train.train(
        configs.TrainConfig(**common, settle_epoch=2, weight_decay=2e-2), runs=None
    )
    plain = train.train(configs.TrainConfig(**common, weight_decay=2e-2), runs=None)
    share = "below_1e-03"
    assert settled.record.history[share][-1] > plain.record.history[share][-1]


def test_same_seed_same_run_and_other_seed_another():
    first, again, other = (
        train.train(
            dataclasses.replace(SPARSE, epochs=2, drop_epochs=(), seed=seed), runs=None
        )
        for seed in (0, 0, 1)
    )
    masks_of = [run.opt_state.regrow_masks["fc1"]["kernel"] for run in (first, other)]
    assert np.any(masks_of[0] != masks_of[1])
    same(first.params, again.params)
    assert first.record.history["test_error"] == again.record.history["test_error"]
    assert first.record.history["train_loss"] != other.record.history["train_loss"]


def test_python_loop_equals_scan(monkeypatch):
    """Networks with convolutions are stepped through in Python on a CPU."""
    scanned = train.train(
        dataclasses.replace(SPARSE, epochs=2, drop_epochs=()), runs=None
    )
    entry = models.MODELS["lenet-300-100"]
    monkeypatch.setitem(
        models.MODELS, "lenet-300-100", entry._replace(convolutional=True)
    )
    told = []
    looped = train.train(
        dataclasses.replace(SPARSE, epochs=2, drop_epochs=()),
        runs=None,
        on_activity=told.append,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        scanned.params,
        looped.params,
    )
    assert looped.record.results["kept"] == scanned.record.results["kept"]
    # Every step is told of once it has been taken, in both epochs.
    steps = [activity.text for activity in told if activity.brief]
    assert steps == 2 * [f"step {i} of 40" for i in range(1, 39)]


def test_a_record_says_what_each_layer_kept_and_moved(monkeypatch):
    """After each epoch, against the masks that the method holds then."""
    seen = []
    masks = train._Run._masks

    def look(run, opt_state):
        found = masks(run, opt_state)
        seen.append({name: np.array(x["kernel"]) for name, x in found.items()})
        return found

    with monkeypatch.context() as context:
        context.setattr(train._Run, "_masks", look)
        trained = train.train(dataclasses.replace(SPARSE, epochs=4), runs=None)
    history = trained.record.history
    assert len(seen) == 5  # at the start and after each epoch
    for name in seen[0]:
        kept = [int(x[name].sum()) for x in seen[1:]]
        moved = [int((b[name] & ~a[name]).sum()) for a, b in itertools.pairwise(seen)]
        assert history[f"kept/{name}/kernel"] == kept
        assert history[f"moved/{name}/kernel"] == moved
    assert any(history["moved/fc1/kernel"])
    dense = train.train(configs.TrainConfig(method="dense", epochs=1), runs=None)
    assert not any("/" in name for name in dense.record.history)


def test_lenet5_trains(monkeypatch):
    """On small images drawn in four corners, so that a few steps are enough."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, 240).astype(np.int32)
    x = rng.normal(size=(240, 28, 28, 1)).astype(np.float32)
    for i, label in enumerate(y):
        row, column = divmod(int(label), 2)
        x[i, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14] += 4
    corners = data.Dataset(
        x[:160], y[:160], x[160:200], y[160:200], x[200:], y[200:], 4, "corners"
    )
    monkeypatch.setattr(data, "load", lambda *_, **__: corners)
    run = configs.TrainConfig(
        model="lenet-5-caffe", epochs=3, batch_size=16, learning_rate=0.05, density=0.2
    )
    trained = train.train(run, runs=None)
    assert [layer["name"] for layer in trained.record.layers] == [
        "conv1/kernel",
        "conv2/kernel",
        "fc1/kernel",
        "fc2/kernel",
    ]
    assert trained.record.results["test_error"] < 20


def test_full_split_has_no_validation_error():
    run = dataclasses.replace(SMALL, epochs=1, drop_epochs=(), split="full")
    record = train.train(run, runs=None).record
    assert record.history["valid_error"] == [None]
    assert record.steps_per_epoch == 1437 // 32


def test_crops_change_the_training_and_not_the_evaluation(monkeypatch):
    """The first batch is augmented before it is learned from, no other image is."""
    seen = []

    def note(key, images, kind, black):
        seen.append((images.shape, kind, black))
        return jax.numpy.zeros_like(images)

    monkeypatch.setattr(train.augment, "augment", note)
    run = dataclasses.replace(SMALL, epochs=1, drop_epochs=(), augment="zero")
    blind = train.train(run, runs=None)
    batch = (32, *data.load("digits").train_x.shape[1:])
    assert set(seen) == {(batch, "zero", data.black("digits"))}
    # Nothing but zeros was learned from, so that the first kernel has only decayed.
    start = models.create("lenet-300-100", (8, 8, 1), 10, key=first_key(run))[1]
    kernel, first = (np.asarray(p["fc1"]["kernel"]) for p in (blind.params, start))
    ratio = kernel / first
    assert np.ptp(ratio) < 1e-4
    assert ratio.max() < 1


def first_key(run):
    return jax.random.split(jax.random.key(run.seed), 3)[0]


def test_a_text_is_told_in_bits_a_character(monkeypatch):
    few = data.text(length=8)
    few = few._replace(
        train_x=few.train_x[:64],
        train_y=few.train_y[:64],
        valid_x=few.valid_x[:5],
        valid_y=few.valid_y[:5],
        test_x=few.test_x[:7],
        test_y=few.test_y[:7],
    )
    monkeypatch.setattr(data, "load", lambda *_, **__: few)
    small = models.transformer.Transformer
    entry = models.Entry(functools.partial(small, width=8, depth=1), False, True)
    monkeypatch.setitem(models.MODELS, "transformer", entry)
    run = configs.TrainConfig(
        dataset="topics", model="transformer", method="sparse_momentum", density=0.2
    )
    trained = train.train(dataclasses.replace(run, epochs=2), runs=None)
    apply = models.create("transformer", (8,), few.classes, key=jax.random.key(0))[0]
    logits = np.asarray(apply(trained.params, few.test_x), np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = np.take_along_axis(shares, few.test_y[..., None], -1)
    results = trained.record.results
    np.testing.assert_allclose(results["test_bits"], -np.log2(right).mean(), rtol=1e-4)
    wrong = 100 * (logits.argmax(-1) != few.test_y).mean()
    np.testing.assert_allclose(results["test_error"], wrong, rtol=1e-5)
    assert len(trained.record.history["valid_bits"]) == 2
    assert results["kept"] == sum(
        np.count_nonzero(trained.params["layer1"][name]["kernel"])
        for name in ("qkv", "out", "up", "down")
    )


# -- checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "sparse_momentum", "gsm"])
def test_killed_run_goes_on_bit_for_bit(tmp_path, method):
    options = {"base": BASE} if method == "gsm" else {}
    run = dataclasses.replace(SMALL, method=method, **options)
    unbroken = train.train(run, runs=tmp_path / "unbroken", checkpoint_every=2)
    with pytest.raises(Killed):
        # One epoch past the checkpoint, so that something has to be done again.
        train.train(
            run,
            runs=tmp_path / "broken",
            checkpoint_every=2,
            on_epoch=kill_after(3, method),
        )
    epochs = []
    resumed = train.train(
        run,
        runs=tmp_path / "broken",
        checkpoint_every=2,
        on_epoch=lambda progress: epochs.append((progress.stage, progress.epoch)),
    )
    assert epochs == [(method, 3), (method, 4)]
    same(resumed.params, unbroken.params)
    same(resumed.opt_state, unbroken.opt_state)
    for column in ("epoch", "train_loss", "test_error", "below_1e-03"):
        assert resumed.record.history[column] == unbroken.record.history[column]
    assert resumed.record.results == unbroken.record.results


def test_run_killed_in_its_base_goes_on_there(tmp_path):
    run = dataclasses.replace(SMALL, method="gsm", base=BASE, epochs=2, drop_epochs=())
    unbroken = train.train(run, runs=None)
    with pytest.raises(Killed):
        train.train(
            run, runs=tmp_path, checkpoint_every=1, on_epoch=kill_after(1, "base")
        )
    epochs = []
    resumed = train.train(
        run,
        runs=tmp_path,
        checkpoint_every=1,
        on_epoch=lambda progress: epochs.append((progress.stage, progress.epoch)),
    )
    assert epochs == [("base", 2), ("gsm", 1), ("gsm", 2)]
    same(resumed.params, unbroken.params)


def test_finished_base_is_not_trained_again(tmp_path):
    run = dataclasses.replace(SMALL, method="gsm", base=BASE, epochs=1, drop_epochs=())
    stages = []
    for gate in (0.05, 0.02):
        train.train(
            dataclasses.replace(run, gate=gate),
            runs=tmp_path,
            on_epoch=lambda progress: stages.append(progress.stage),
        )
    assert stages == ["base", "base", "gsm", "gsm"]


def test_finished_run_leaves_weights_and_no_checkpoint(tmp_path):
    trained = train.train(SMALL, runs=tmp_path)
    folder = checkpoints.RunFolder(tmp_path / trained.record.name)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        *("checksums.json", "lock", "record.json", "weights.sparse")
    ]
    weights, record = folder.finished(trained.params)
    same(weights, trained.params)
    model = load_sparse(folder.path / "weights.sparse", trained.params)
    assert masks.count(model.masks) == record.results["kept"]
    assert record == trained.record


def test_fresh_ignores_the_checkpoint(tmp_path):
    with pytest.raises(Killed):
        train.train(
            SMALL,
            runs=tmp_path,
            checkpoint_every=1,
            on_epoch=kill_after(2, "dense"),
        )
    epochs = []
    train.train(
        SMALL,
        runs=tmp_path,
        fresh=True,
        on_epoch=lambda progress: epochs.append(progress.epoch),
    )
    assert epochs == [1, 2, 3, 4]


def test_two_processes_do_not_train_one_run(tmp_path):
    name = configs.default_name(configs.resolve(SMALL))
    # A lock belongs to the open file, so that this process can play the other one.
    with checkpoints.RunFolder(tmp_path / name).lock():
        with pytest.raises(ValueError, match="another process is training"):
            train.train(SMALL, runs=tmp_path)
    train.train(dataclasses.replace(SMALL, epochs=3, drop_epochs=()), runs=tmp_path)


# -- records -----------------------------------------------------------------------


def test_record_says_what_was_run(tmp_path):
    path = tmp_path / "results" / "table" / "run.json"
    trained = train.train(
        SMALL, runs=tmp_path / "runs", record_path=path, command="the command"
    )
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]
    written = json.loads(path.read_text())
    assert records.read(path) == trained.record
    assert written["name"] == "run"
    assert written["command"] == "the command"
    assert written["config"] == configs.as_dict(configs.resolve(SMALL))
    assert written["seed"] == 0
    assert written["versions"]["optax"] == optax.__version__
    assert written["device"]["platform"] == jax.devices()[0].platform
    assert written["steps_per_epoch"] == 40
    for column in written["history"].values():
        assert len(column) == 4
    assert written["results"]["test_error"] == written["history"]["test_error"][-1]
    assert 0 < written["seconds_per_epoch"] < written["wall_seconds"]
    assert {"commit", "dirty"} <= set(written)


def test_a_run_that_diverges_leaves_no_record(tmp_path):
    path = tmp_path / "run.json"
    run = dataclasses.replace(SMALL, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"after epoch 1 of .* that are not finite"):
        train.train(run, runs=None, record_path=path)
    assert not path.exists()


def test_a_number_that_is_not_finite_is_null_in_the_record(tmp_path):
    path = tmp_path / "run.json"
    made = train.train(SMALL, runs=None).record
    records.write(path, dataclasses.replace(made, history={"train_loss": [math.nan]}))
    assert json.loads(path.read_text())["history"]["train_loss"] == [None]


def test_unwritable_results_folder_is_told_before_training(tmp_path):
    (tmp_path / "results").write_text("a file, not a folder")
    started = []
    with pytest.raises(ValueError, match="results cannot be written to") as caught:
        train.train(
            SMALL,
            runs=None,
            record_path=tmp_path / "results" / "run.json",
            on_epoch=started.append,
        )
    assert "--results" in str(caught.value)
    assert not started


def test_unwritable_runs_folder_is_told_before_training(tmp_path):
    (tmp_path / "runs").write_text("a file, not a folder")
    with pytest.raises(ValueError, match="cannot be written to"):
        train.train(SMALL, runs=tmp_path / "runs")


def test_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(file.os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        file.write_atomically(path, lambda out: out.write(b"new"))
    with pytest.raises(ValueError, match=r"run\.json cannot be written \(disk full\)"):
        train.train(SMALL, runs=None, record_path=path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    "content", [b'{"name": "half a rec', b"\xff\xfe", b"[]", b"{}", b"7", None]
)
def test_file_that_is_no_record(tmp_path, content):
    path = tmp_path / "run.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is not a results record"):
        records.read(path)


def test_folder_in_the_place_of_a_record_is_told_before_training(tmp_path):
    epochs = []
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ValueError, match=r"run\.json is a folder"):
        train.train(
            SMALL,
            runs=None,
            record_path=tmp_path / "run.json",
            on_epoch=epochs.append,
        )
    assert not epochs


def test_densities_of_a_cut_share_one_training(tmp_path):
    """The errors are those of runs that trained alone, the epochs are not run again."""
    config = dataclasses.replace(SMALL, method="l1", l1=1e-3, density=0.3)
    other = dataclasses.replace(config, density=0.1)
    alone = [train.train(run, runs=None) for run in (config, other)]
    epochs = []
    shared = [
        train.train(run, runs=tmp_path, on_epoch=epochs.append)
        for run in (config, other)
    ]
    assert [progress.epoch for progress in epochs] == [1, 2, 3, 4]
    for a, b in zip(alone, shared, strict=True):
        same(a.params, b.params)
        assert a.record.results == b.record.results
    kept = [trained.record.results["nonzeros"] for trained in shared]
    assert kept == [15_060, 5_020]
    for run, trained in zip((config, other), shared, strict=True):
        folder = tmp_path / configs.default_name(configs.resolve(run))
        weights = load_sparse(folder / "weights.sparse").leaves
        for name in trained.params:
            leaf, kernel = weights[f"{name}/kernel"], trained.params[name]["kernel"]
            np.testing.assert_array_equal(leaf.dense(), kernel)
            assert len(leaf.values) == np.count_nonzero(kernel)


def test_cuts_of_a_dense_network_share_its_training(tmp_path):
    """Wanda and SparseGPT, in any pattern, cut what L2 trains, at any density."""
    runs = [
        dataclasses.replace(SMALL, method="l2", density=1.0),
        dataclasses.replace(SMALL, method="wanda", density=0.5, pattern="2:4"),
        dataclasses.replace(SMALL, method="sparse_gpt", density=0.3),
    ]
    epochs = []
    done = [train.train(run, runs=tmp_path, on_epoch=epochs.append) for run in runs]
    assert [progress.epoch for progress in epochs] == [1, 2, 3, 4]
    dense = train.train(dataclasses.replace(SMALL, method="dense"), runs=None)
    same(dense.params, done[0].params)
    errors = [trained.record.results["test_error_before_cut"] for trained in done]
    assert errors == [dense.record.results["test_error"]] * 3
    assert [trained.record.results["kept"] for trained in done] == [
        50_200,
        25_100,
        15_060,
    ]


@pytest.mark.parametrize("method", ["wanda", "sparse_gpt"])
def test_a_cut_is_calibrated_with_the_statistics_of_training(method, monkeypatch):
    """Not with those that batch norm starts from."""
    seen = []
    name = "wanda_masks" if method == "wanda" else "sparse_gpt"
    own = getattr(sparse_optax, name)

    def spy(forward, params, batches, *args, **options):
        seen.append((forward, params, batches[0]))
        return own(forward, params, batches, *args, **options)

    monkeypatch.setattr(sparse_optax, name, spy)
    run = dataclasses.replace(
        SMALL, model="lenet-300-100-bn", method=method, density=0.5, epochs=1
    )
    done = train.train(dataclasses.replace(run, drop_epochs=()), runs=None)
    [(forward, params, images)] = seen
    apply, _, start = models.create_stateful(
        run.model, images.shape[1:], 10, key=jax.random.key(0)
    )
    trained = apply(params, done.stats, images)[0]
    np.testing.assert_allclose(forward(params, images), trained, rtol=1e-5, atol=1e-5)
    assert np.abs(apply(params, start, images)[0] - trained).max() > 0.1


def test_dead_units_are_constant_or_unheard():
    rng = np.random.default_rng(0)
    shapes = {"fc1": (6, 5), "fc2": (5, 4), "fc3": (4, 3)}
    params = {
        name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[1])}
        for name, shape in shapes.items()
    }
    images = rng.normal(size=(50, 2, 3))
    params["fc1"]["kernel"][:, 0] = 0  # says what its bias says
    params["fc1"]["bias"][0] = 1.0
    params["fc1"]["bias"][1] = -100.0  # never on
    params["fc1"]["kernel"][:, 4] = 0  # gone altogether
    params["fc2"]["kernel"][4] = 0
    params["fc2"]["kernel"][2] = 0  # not heard
    params["fc2"]["bias"][3] = -100.0
    x, counts, removed, dead = images.reshape(50, 6), {}, {}, {}
    for name, following in (("fc1", "fc2"), ("fc2", "fc3")):
        x = np.maximum(x @ params[name]["kernel"] + params[name]["bias"], 0)
        varies = np.ptp(x, axis=0) > 0
        heard = (params[following]["kernel"] != 0).any(axis=1)
        fed = (params[name]["kernel"] != 0).any(axis=0)
        dead[name] = ~(varies & heard)
        counts[name] = int(dead[name].sum())
        removed[name] = int((~fed & ~heard).sum())
    assert counts["fc1"] >= 4
    assert counts["fc2"] >= 1
    assert removed == {"fc1": 1, "fc2": 0}
    wasted = 0
    for name, before, after in (
        ("fc1", np.zeros(6, bool), dead["fc1"]),
        ("fc2", dead["fc1"], dead["fc2"]),
        ("fc3", dead["fc2"], np.zeros(3, bool)),
    ):
        for i, j in np.argwhere(params[name]["kernel"] != 0):
            wasted += int(before[i] or after[j])
    float32 = jax.tree.map(lambda a: np.asarray(a, np.float32), (params, images))
    assert units.dead_units(*float32) == (counts, removed, wasted)
    # Ten is after nine.
    other = {"fc1": "fc8", "fc2": "fc9", "fc3": "fc10"}
    renamed = {other[name]: layer for name, layer in float32[0].items()}
    found = units.dead_units(renamed, float32[1])
    assert found.dead == {other[name]: n for name, n in counts.items()}
    # A weight in the mask is kept, though it is zero.
    kernels = {name: layer["kernel"] for name, layer in params.items()}
    masks = {name: {"kernel": np.ones(k.shape, bool)} for name, k in kernels.items()}
    assert units.dead_units(*float32, masks).removed == {"fc1": 0, "fc2": 0}


def test_dead_units_are_those_of_dense_chains_only():
    images = np.zeros((2, 28, 28, 1), np.float32)
    params = models.create("lenet-5-caffe", (28, 28, 1), 10, key=jax.random.key(0))[1]
    assert units.dead_units(params, images) is None
    assert units.dead_units({"fc": {"kernel": np.ones((3, 2))}}, images) is None


# Test errors of 20 epochs at 10% of the weights; 10% of the test images are one digit.
WORST = {"gsm": 20.0, "sparse_evolutionary": 15.0, "l1": 15.0, "deep_rewiring": 15.0}
# They cut at a tenth, the same in each layer, and do not train on.
WORST |= {"wanda": 45.0, "sparse_gpt": 25.0, "sparse_variational_dropout": 25.0}


@pytest.mark.parametrize("method", recipes.METHODS)
def test_every_method_trains_at_its_exact_count(method):
    """A method added to the registry is trained here, whatever it is."""
    recipe = recipes.METHODS[method].recipe
    stages = {
        "scratch": dict(epochs=20, drop_epochs=(14,)),
        "trained": dict(epochs=8, drop_epochs=(5,), base=configs.Base(epochs=12)),
        "gsm": dict(
            epochs=60, drop_epochs=(45,), base=configs.Base(epochs=10, drop_epochs=())
        ),
    }
    density = None if method == "dense" else 0.1
    run = configs.TrainConfig(method=method, density=density, **stages[recipe])
    trained = train.train(run, runs=None)
    results = trained.record.results
    # Thin: 58 and 19 units, as close to 5,020 as whole units come.
    kept = {"dense": 50_200, "thin": 58 * 64 + 19 * 58 + 190}.get(method, 5_020)
    if method == "ticket":  # what is not zero at the end of sparse momentum
        assert kept - 50 < results["kept"] <= kept
        kept = results["kept"]
    assert results["kept"] == kept
    nonzero = sum(
        int(np.count_nonzero(layer["kernel"])) for layer in trained.params.values()
    )
    assert nonzero <= kept
    assert results["test_error"] < WORST.get(method, 12.0)


@pytest.mark.parametrize(
    "rules",
    [
        dict(prune="global_magnitude"),
        dict(grow="global_momentum"),
        dict(prune="global_magnitude", grow="global_momentum"),
    ],
    ids=lambda rules: "-".join(rules),
)
def test_rules_of_one_pool_train_at_their_exact_count(rules):
    """Sparse momentum where the network as a whole loses and gets weights."""
    run = configs.TrainConfig(density=0.1, epochs=20, drop_epochs=(14,), **rules)
    trained = train.train(run, runs=None)
    results = trained.record.results
    assert results["kept"] == 5_020
    assert results["test_error"] < 12.0
    counts = [layer["kept"] for layer in trained.record.layers if layer["kept"]]
    uniform = [1920, 3000, 100]
    assert counts != uniform  # weights went to other layers
