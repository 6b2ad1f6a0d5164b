"""A size in place of a density: weights, bytes of the file, FLOPs of an image."""

import math
import re

import jax
import numpy as np
import pytest

pytest.importorskip("tyro")
pytest.importorskip("flax")

from sparse_optax.experiments import cli, data, models, records, sizes, train
from sparse_optax.experiments import config as configs
from sparse_optax.experiments.config import Base, TrainConfig

WEIGHTS = 50_200  # of LeNet-300-100 on the digits


@pytest.mark.parametrize(
    ("text", "amount", "unit", "again"),
    [
        ("13310", 13_310, "weights", "13310"),
        ("13_310", 13_310, "weights", "13310"),
        ("1e4", 10_000, "weights", "10000"),
        ("200KB", 200_000, "bytes", "200KB"),
        ("0.2 mb", 200_000, "bytes", "200KB"),
        ("1.5KiB", 1_536, "bytes", "1536B"),
        ("2MiB", 2_097_152, "bytes", "2097152B"),
        ("3B", 3, "bytes", "3B"),
        ("1.0005KB", 1_000, "bytes", "1KB"),
        ("10MFLOPs", 10_000_000, "FLOPs", "10MFLOPs"),
        ("1500 flop", 1_500, "FLOPs", "1500FLOPs"),
        ("2GFLOPs", 2 * 10**9, "FLOPs", "2GFLOPs"),
    ],
)
def test_a_size_is_read_and_has_one_text(text, amount, unit, again):
    size = sizes.parse(text)
    assert size == (amount, unit)
    assert str(size) == again
    assert sizes.parse(again) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5", "200K", "200Ki", "1/2", "nan", "KB", "0.5B", "1 2"]
)
def test_no_size(text):
    with pytest.raises(ValueError, match=r"TrainConfig: budget=.* must be a size"):
        sizes.parse(text)


@pytest.mark.parametrize("name", sizes.IMAGES)
def test_shapes_are_those_of_the_data(name):
    try:
        loaded = data.load(name)
    except (ValueError, OSError) as error:
        pytest.skip(str(error))
    assert sizes.IMAGES[name] == (loaded.train_x.shape[1:], loaded.classes)


def flags(tmp_path, *words):
    folders = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    return ["train", *words, *folders]


@pytest.mark.parametrize("method", ["sparse_momentum", "static", "l2", "snip"])
def test_the_file_of_a_run_has_at_most_the_bytes(tmp_path, capsys, method):
    """The file on the disk, and it is filled to a tenth."""
    words = ["--no-dense", "--method", method, "--epochs", "2", "--budget", "20KB"]
    assert cli.main(flags(tmp_path, *words)) == 0
    (file,) = (tmp_path / "runs").glob("*/weights.sparse")
    (path,) = (tmp_path / "results").glob("*.json")
    assert 18_000 < file.stat().st_size <= 20_000
    record = records.read(path)
    assert record.config["budget"] == "20KB"
    assert record.config["density"] == record.results["kept"] / WEIGHTS
    assert record.results["file_bytes"] == file.stat().st_size
    printed = capsys.readouterr().out
    assert f"{file.stat().st_size:,} bytes of at most 20,000" in printed
    # The size is read again in another form, and nothing is trained.
    words[-1] = "0.02MB"
    assert cli.main(flags(tmp_path, *words)) == 0
    assert "had finished before" in capsys.readouterr().out


def test_a_run_of_a_size_goes_on_after_ctrl_c(tmp_path, monkeypatch):
    run = TrainConfig(budget="2510", epochs=4)

    def stop(progress):
        if progress.epoch == 2:
            raise KeyboardInterrupt

    kept = dict(runs=tmp_path, checkpoint_every=1)
    with pytest.raises(train.Stopped):
        train.train(run, on_epoch=stop, **kept)
    seen = []
    again = train.train(run, on_epoch=lambda p: seen.append(p.epoch), **kept)
    assert seen == [3, 4]
    assert again.record.results["kept"] == 2_510
    assert again.record.config["density"] == 0.05


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (dict(model="lenet-300-100", method="rigl"), 5_000),
        (dict(model="lenet-5-caffe", method="rigl", dataset="mnist"), 400_000),
        (
            dict(
                model="lenet-5-caffe",
                dataset="mnist",
                redistribute="none",
                shares="linear",
            ),
            999_999,
        ),
    ],
)
def test_flops_stay_within_the_budget_and_fill_it(config, most):
    """Counted by hand: two for each kept weight at each place of the output."""
    run = configs.resolve(TrainConfig(budget=f"{most}FLOPs", **config))
    shape, classes = sizes.IMAGES[run.dataset]
    _, params = models.create(run.model, shape, classes, key=jax.random.key(0))
    counts = sizes.SHARES[run.shares](run.density).counts(params)
    places = {"conv1": 24 * 24, "conv2": 8 * 8}
    spent = sum(
        2 * places.get(name, 1) * layer["kernel"] for name, layer in counts.items()
    )
    assert 0.99 * most < spent <= most


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(budget="1KB"), r"budget='1KB' must be at least 2167B .* header. Give"),
        (dict(budget="2"), "budget='2' must be at least 3 for lenet-300-100: one"),
        (dict(budget="5FLOPs"), "must be at least 6FLOPs for lenet-300-100"),
        (dict(budget="50200"), "must be less than all of .* of 50,200 weights"),
        (dict(budget="1GB"), "budget='1GB' must be less than all of lenet-300-100"),
        (dict(budget="1GFLOPs"), "budget='1GFLOPs' must be less than all"),
        (dict(budget="9KB", density=0.1), "both density=0.1 and budget='9KB' are"),
        (dict(budget="9KB", method="dense"), "must be left out for method='dense'"),
        (dict(budget="9KB", method="thin"), "must be left out for method='thin'"),
        (
            dict(budget="1MFLOPs", dataset="mnist", model="lenet-5-caffe"),
            "a number of weights or of bytes here.* costs 2 to 1,152 FLOPs",
        ),
        (
            dict(budget="1MFLOPs", dataset="mnist", model="lenet-5-caffe", method="l1"),
            "a number of weights or of bytes here",
        ),
    ],
)
def test_sizes_that_cannot_be_are_told_before_training(values, words):
    with pytest.raises(ValueError, match=words):
        configs.resolve(TrainConfig(**values))


def test_the_smallest_size_is_one_weight_a_layer():
    for budget in ("2167B", "3", "6FLOPs"):
        run = configs.resolve(TrainConfig(budget=budget))
        assert run.density == 3 / WEIGHTS


def test_a_base_and_a_shared_training_know_no_size():
    run = TrainConfig(budget="13KB", method="magnitude", base=Base(epochs=1))
    with_size = configs.resolve(run)
    without = configs.resolve(TrainConfig(method="magnitude", base=Base(epochs=1)))
    assert configs.base_of(with_size) == configs.base_of(without)


def test_without_a_size_nothing_of_a_run_has_changed():
    """Names hold a digest of all values: older records and folders are found."""
    run = configs.resolve(TrainConfig())
    assert configs.default_name(run).endswith("-fc3f643e")
    assert "budget" not in configs.as_dict(run)


@pytest.mark.parametrize("budget", ["20KB", "4000", "7KFLOPs"])
def test_resolving_a_size_twice_changes_nothing(budget):
    run = configs.resolve(TrainConfig(budget=budget))
    assert configs.resolve(run) == run


@pytest.mark.parametrize(
    ("text", "density"),
    [("1%", 0.01), ("29 %", 0.29), ("0.29", 0.29), ("5e-1%", 0.005)],
)
def test_a_density_in_percent(tmp_path, monkeypatch, text, density):
    seen = []

    def stop(config, **_):
        seen.append(configs.resolve(config).density)
        raise ValueError("would train")

    monkeypatch.setattr(train, "train", stop)
    assert cli.main(flags(tmp_path, "--density", text)) == 1
    assert seen == [density]


@pytest.mark.parametrize("text", ["x", "%", "1%%", "5 percent"])
def test_no_density(text, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--density", text])
    assert caught.value.code == 2
    printed = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert f"{text!r} must be a number, 0.05 or 5%" in printed


def test_any_whole_number_of_weights_is_met():
    """The density is a float, the count is exact all the same."""
    for n in np.random.default_rng(0).integers(3, WEIGHTS, 200):
        found = sizes.density(sizes.Size(int(n), "weights"), "lenet-300-100", "digits")
        params = {"w": jax.ShapeDtypeStruct((WEIGHTS, 1), np.float32)}
        assert sizes.SHARES["uniform"](found).counts(params)["w"] == n
        assert math.isclose(found, n / WEIGHTS)
