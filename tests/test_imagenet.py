"""Images from a folder through grain: order, crops, resuming, files that are broken."""

import json
import pathlib
import sys
import warnings
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("grain")
Image = pytest.importorskip("PIL.Image")
imagenet = pytest.importorskip("sparse_optax.experiments.imagenet")

SIZE = 8
NAMES = ("n01", "n02", "n03")


@pytest.fixture
def folder(tmp_path):
    """48 images to train on and 12 to evaluate with, of three classes and many sizes.

    Each has one brightness of its own, so that a crop tells which image it is of.
    """
    number = 0
    for part, count in (("train", 16), ("val", 4)):
        for name in NAMES:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                shape = (9 + number % 7, 9 + number % 5, 3)
                picture = Image.fromarray(np.full(shape, 4 * number, np.uint8))
                ending = ("JPEG", "jpg")[i % 2]
                picture.save(tmp_path / part / name / f"{i:02}.{ending}", quality=100)
                number += 1
    return tmp_path


def numbers(images):
    """Which image each crop is of."""
    pixels = images * np.float32(imagenet.STD) + np.float32(imagenet.MEAN)
    return np.round(255 * pixels.mean((1, 2, 3)) / 4).astype(int).tolist()


def batches(folder, part="train", **options):
    options = {"seed": 5, "size": SIZE, "threads": 2} | options
    return imagenet.train_batches(imagenet.find(folder, part), 8, **options)


def test_files_are_found_in_the_order_of_their_classes(folder):
    (folder / "train" / "n01" / "notes.txt").write_text("no image")
    (folder / "train" / "list.txt").write_text("no class")
    train, valid = imagenet.find(folder), imagenet.find(folder, "val")
    assert train.classes == valid.classes == NAMES
    assert [len(train.files), len(valid.files)] == [48, 12]
    assert train.labels.tolist() == [i // 16 for i in range(48)]
    assert [path.parent.name for path in train.files] == [
        NAMES[i] for i in train.labels
    ]
    assert list(train.files) == sorted(train.files)


def test_an_epoch_has_each_image_once_and_its_label(folder):
    seen = []
    for images, labels in batches(folder, epochs=2):
        assert images.shape == (8, SIZE, SIZE, 3)
        assert images.dtype == np.float32
        assert labels.dtype == np.int32
        assert [n // 16 for n in numbers(images)] == labels.tolist()
        seen += numbers(images)
    assert sorted(seen[:48]) == sorted(seen[48:]) == list(range(48))
    assert seen[:48] != seen[48:]
    assert seen[:48] != list(range(48))


def test_a_seed_gives_the_same_and_another_seed_other_images(folder):
    first, second = (next(batches(folder))[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert numbers(next(batches(folder, seed=6))[0]) != numbers(first)


@pytest.mark.parametrize("taken", [1, 4, 6, 9])
def test_going_on_from_a_place_gives_the_same_crops(folder, taken):
    """Within an epoch of six batches, at its end, and in the next one."""
    # Ramps, so that other crops and flips of an image are other pixels.
    for path in imagenet.find(folder).files:
        ramp = np.arange(12 * 10).reshape(12, 10, 1) * np.ones(3)
        Image.fromarray(ramp.astype(np.uint8)).save(path, quality=100)
    run = batches(folder)
    for _ in range(taken):
        next(run)
    place = json.loads(json.dumps(run.get_state()))
    expected = [next(run) for _ in range(4)]
    again = batches(folder)
    again.set_state(place)
    for (images, labels), right in zip(again, expected, strict=False):
        np.testing.assert_array_equal(images, right[0])
        np.testing.assert_array_equal(labels, right[1])
    first = expected[0][0]
    assert all(not np.array_equal(first, images) for images, _ in expected[1:])


def test_crops_keep_to_area_and_ratio_and_half_are_mirrored():
    random = np.random.default_rng(0)
    image = Image.fromarray(np.zeros((300, 400, 3), np.uint8))
    boxes = np.array([imagenet._box(image, random) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert (boxes >= 0).all()
    assert right.max() <= 400
    assert bottom.max() <= 300
    share, ratio = width * height / (300 * 400), width / height
    assert 0.078 < share.min() < 0.1
    assert 0.9 < share.max() <= 1
    # A side is rounded to a whole pixel.
    assert 0.74 < ratio.min() < 0.76
    assert 1.31 < ratio.max() < 1.35
    ramp = np.arange(20, dtype=np.uint8)[None, :, None] * np.ones((20, 1, 3), np.uint8)
    picture = Image.fromarray(ramp)
    crops = [np.asarray(imagenet._random_crop(picture, 8, random)) for _ in range(400)]
    mirrored = np.mean([crop[0, 0, 0] > crop[0, -1, 0] for crop in crops])
    assert 0.4 < mirrored < 0.6


@pytest.mark.parametrize("shape", [(2, 300), (300, 2), (1, 1)])
def test_an_image_that_no_crop_fits_is_cropped_at_its_center(shape):
    image = Image.fromarray(np.zeros((*shape, 3), np.uint8))
    left, top, right, bottom = imagenet._box(image, np.random.default_rng(0))
    height, width = shape
    assert left == width - right or left == width - right - 1
    assert top == height - bottom or top == height - bottom - 1
    assert min(right - left, bottom - top) == min(shape)


def test_evaluation_reads_all_once_at_their_center(folder):
    # A frame of another brightness lies outside of the crop.
    files = imagenet.find(folder, "val").files
    for number, path in enumerate(files):
        pixels = np.full((32, 64, 3), 20 * number, np.uint8)
        pixels[:, :14] = pixels[:, -14:] = 255
        Image.fromarray(pixels).save(path, quality=100)
    valid = imagenet.find(folder, "val")
    made = list(imagenet.eval_batches(valid, 5, size=28, threads=2))
    assert [len(labels) for _, labels in made] == [5, 5, 2]
    assert np.concatenate([labels for _, labels in made]).tolist() == [
        i // 4 for i in range(12)
    ]
    images = np.concatenate([images for images, _ in made])
    pixels = 255 * (images * np.float32(imagenet.STD) + np.float32(imagenet.MEAN))
    expected = 20 * np.arange(12, dtype=np.float32)[:, None, None, None]
    # The columns beside the frame are mixed with it by the JPEG.
    assert np.abs(pixels - expected)[:, :, 10:-10].max() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_kinds_of_pixels_become_three_channels(folder, mode):
    for path in imagenet.find(folder).files:
        Image.open(path).convert(mode).save(path, "JPEG", quality=100)
    images, _ = next(batches(folder))
    assert images.shape == (8, SIZE, SIZE, 3)
    assert np.isfinite(images).all()


def broken(folder):
    """A file that is no image, one that is cut off, and one that is empty."""
    files = imagenet.find(folder).files
    files[3].write_bytes(b"this is no image" * 10)
    Image.effect_noise((64, 64), 90).convert("RGB").save(files[20], quality=95)
    files[20].write_bytes(files[20].read_bytes()[:-600])
    files[30].write_bytes(b"")
    return {3, 20, 30}, [str(files[i]) for i in (3, 20, 30)]


def test_a_corrupt_file_is_refused_by_name(folder):
    _, paths = broken(folder)
    with pytest.raises(ValueError, match="is no readable image") as raised:
        list(batches(folder, epochs=1))
    assert any(path in str(raised.value) for path in paths)
    assert "corrupt='skip'" in str(raised.value)


def test_corrupt_files_are_named_and_skipped_and_batches_stay_full(folder):
    bad, paths = broken(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = batches(folder, corrupt="skip")
        made = [next(run) for _ in range(7)]
        place = run.get_state()
        after = next(run)
        again = batches(folder, corrupt="skip")
        again.set_state(place)
        np.testing.assert_array_equal(next(again)[0], after[0])
    told = " ".join(str(warning.message) for warning in caught)
    assert all(path in told for path in paths)
    assert all(len(labels) == 8 for _, labels in made)
    seen = [n for images, _ in made for n in numbers(images)]
    # 45 files are left: the first 45 images are each of them once.
    assert sorted(seen[:45]) == sorted(set(range(48)) - bad)


def test_pixels_of_16_bits_are_no_white_image(folder):
    from PIL import Image

    valid = imagenet.find(folder, "val")
    deep = np.full((40, 40), 30_000, np.uint16)
    Image.fromarray(deep).save(valid.files[0], format="png")
    with pytest.raises(ValueError, match=f"{valid.files[0].name}.*8 bits a channel"):
        list(imagenet.eval_batches(valid, 100, size=SIZE, threads=2))


def test_errors_of_the_system_and_a_folder_of_broken_files_are_not_skipped(folder):
    files = imagenet.find(folder, "val").files
    valid = imagenet.find(folder, "val")
    files[5].unlink()
    with pytest.raises(FileNotFoundError, match=files[5].name):
        list(imagenet.eval_batches(valid, 100, size=SIZE, corrupt="skip", threads=2))
    files[5].mkdir()
    with pytest.raises(IsADirectoryError, match=f"{files[5].name}.*remove it"):
        list(imagenet.eval_batches(valid, 100, size=SIZE, corrupt="skip", threads=2))
    files[5].rmdir()
    for path in files:
        path.write_bytes(b"no image")
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(ValueError, match="nor were the 11 files before it"),
    ):
        next(imagenet.train_batches(valid, 4, seed=0, size=SIZE, corrupt="skip"))


def test_the_center_of_a_thin_image_is_read_alone(folder):
    """Its shorter side at full size would make it millions of pixels long."""
    image = Image.fromarray(np.zeros((2, 60_000, 3), np.uint8))
    with mock.patch.object(
        Image.Image, "resize", autospec=True, side_effect=Image.Image.resize
    ) as resize:
        made = imagenet._center_crop(image, 56)
    assert made.size == (56, 56)
    assert [call.args[1] for call in resize.call_args_list] == [(56, 56)]


def test_what_is_no_folder_of_classes_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*test"):
        imagenet.find(folder, "test")
    (folder / "none").mkdir()
    with pytest.raises(ValueError, match="no folders of classes"):
        imagenet.find(folder, "none")
    (folder / "val" / "n04").mkdir()
    with pytest.raises(ValueError, match="n04 has no file that ends in"):
        imagenet.find(folder, "val")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be .* in [1, 12]; got 0"),
        ({"batch_size": 13}, "`batch_size` must be .* in [1, 12]; got 13"),
        ({"size": 2.5}, "`size` must be .* at least 1; got 2.5"),
        ({"threads": 0}, "`threads` must be .* at least 1; got 0"),
        ({"corrupt": "ignore"}, "`corrupt` must be 'refuse' or 'skip'; got 'ignore'"),
        ({"seed": -1}, "`seed` must be .* in [0, 4294967295]; got -1"),
        ({"epochs": 0}, "`epochs` must be .* at least 1; got 0"),
    ],
)
def test_bad_values_are_named(folder, options, message):
    valid = imagenet.find(folder, "val")
    given = {"batch_size": 4, "seed": 0, "size": SIZE} | options
    message = message.replace("[", r"\[")
    with pytest.raises(ValueError, match=f"^train_batches: {message}"):
        imagenet.train_batches(valid, given.pop("batch_size"), **given)


def test_without_the_packages_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"sparse_optax\[imagenet\]"):
        imagenet.train_batches(imagenet.find(folder), 8, seed=0)


def test_the_path_may_be_text(folder):
    assert imagenet.find(str(folder)).files[0].parent == pathlib.Path(
        folder, "train", "n01"
    )


# --- the data set of sparse-optax train -----------------------------------------------


@pytest.fixture
def root(folder, tmp_path_factory, monkeypatch):
    """The same images as a data set of the command, small."""
    root = tmp_path_factory.mktemp("data")
    (root / "imagenet").symlink_to(folder)
    monkeypatch.setenv("SPARSE_OPTAX_DATA", str(root))
    monkeypatch.setattr(imagenet, "SIZE", SIZE)
    return root


def config(**options):
    configs = pytest.importorskip("sparse_optax.experiments.config")
    plain = {"epochs": 2, "batch_size": 8, "drop_epochs": (), "learning_rate": 0.02}
    return configs.TrainConfig(dataset="imagenet", **(plain | options))


def test_each_class_holds_back_its_last_tenth(root):
    data = pytest.importorskip("sparse_optax.experiments.data")
    found = data.load("imagenet")
    assert found.train_x.shape == (42, SIZE, SIZE, 3)  # 14 of 16 of each class
    assert found.train_x.dtype == np.float32
    assert [len(found.valid_x), len(found.test_x), found.classes] == [6, 12, 3]
    assert numbers(found.train_x[:]) == [n for n in range(48) if n % 16 < 14]
    assert numbers(found.valid_x[:]) == [14, 15, 30, 31, 46, 47]
    assert found.valid_y.tolist() == [0, 0, 1, 1, 2, 2]
    whole = data.load("imagenet", split="full")
    assert [len(whole.train_x), len(whole.valid_x), len(whole.valid_y)] == [48, 0, 0]


def test_a_class_of_one_file_trains_on_it():
    files = tuple(pathlib.Path(str(i)) for i in range(4))
    labels = np.array([0, 1, 1, 1], np.int32)
    kept, rest = imagenet.held_back(imagenet.Images(files, labels, ("a", "b")))
    assert kept.labels.tolist() == [0, 1, 1]
    assert rest.files == files[3:]


@pytest.mark.parametrize(
    "rows", [slice(5), slice(40, None), np.array([7, 3, 3]), slice(3, 3)]
)
def test_rows_are_those_of_an_array(folder, rows):
    images = imagenet.find(folder)
    found = imagenet.Cropped(images, SIZE)
    whole = np.concatenate([x for x, _ in imagenet.eval_batches(images, 7, size=SIZE)])
    np.testing.assert_array_equal(found[rows], whole[rows])
    assert found[rows].dtype == found.dtype


def test_a_folder_that_is_none_is_named(root, monkeypatch):
    data = pytest.importorskip("sparse_optax.experiments.data")
    (root / "imagenet" / "val" / "n03").rename(root / "imagenet" / "val" / "n04")
    with pytest.raises(
        ValueError, match=r"same classes in train and val, but n03, n04"
    ):
        data.load("imagenet")
    with pytest.raises(ValueError, match="pixels='half' must be 'channels' for imag"):
        data.load("imagenet", pixels="half")
    monkeypatch.setenv("SPARSE_OPTAX_DATA", str(root / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere/imagenet/train"):
        data.load("imagenet")
    monkeypatch.delenv("SPARSE_OPTAX_DATA")
    with pytest.raises(FileNotFoundError, match="SPARSE_OPTAX_DATA, which is not set"):
        data.load("imagenet")


def test_steps_take_the_batches_of_the_files(root):
    """Two epochs against a loop by hand, with the same crops, in NumPy's order."""
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    train = pytest.importorskip("sparse_optax.experiments.train")
    from sparse_optax.experiments import data, models

    run = config(method="dense", density=1.0, weight_decay=0.0)
    trained = train.train(run, runs=None)
    record = trained.record
    assert [record.steps_per_epoch, len(record.history["epoch"])] == [5, 2]

    files = data.load("imagenet").train_x.images
    keys = jax.random.split(jax.random.key(0), 3)
    apply, params = models.create("lenet-300-100", (SIZE, SIZE, 3), 3, key=keys[0])

    def loss(params, x, y):
        logits = apply(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    tx = optax.sgd(0.02, momentum=0.9, nesterov=True)
    state, losses = tx.init(params), []
    for epoch in range(2):
        seed = jax.random.bits(jax.random.fold_in(keys[1], epoch), dtype=np.uint32)
        for x, y in imagenet.train_batches(
            files, 8, seed=int(seed), size=SIZE, epochs=1
        ):
            value, gradient = jax.value_and_grad(loss)(params, x, y)
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            losses.append(float(value))
    assert len(losses) == 10
    expected = [np.mean(losses[:5]), np.mean(losses[5:])]
    np.testing.assert_allclose(record.history["train_loss"], expected, rtol=1e-5)
    for ours, right in zip(
        jax.tree.leaves(trained.params), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(ours, right, rtol=1e-4, atol=1e-6)
    # The errors are those of all images of their parts.
    for part in ("valid", "test"):
        x, y = (getattr(data.load("imagenet"), f"{part}_{name}") for name in "xy")
        wrong = float((apply(params, x[:]).argmax(-1) != y).mean())
        assert record.results[f"{part}_error"] == pytest.approx(100 * wrong, abs=1e-3)


def test_a_stopped_run_goes_on_with_the_same_images(root, tmp_path):
    jax = pytest.importorskip("jax")
    train = pytest.importorskip("sparse_optax.experiments.train")
    run = config(epochs=3, method="sparse_momentum", density=0.2)
    whole = train.train(run, runs=None)
    with pytest.raises(train.TimeOver, match="stopped after epoch 1 of 3"):
        train.train(run, runs=tmp_path / "runs", hours=0)
    broken = train.train(run, runs=tmp_path / "runs")
    for ours, right in zip(
        jax.tree.leaves(broken.params), jax.tree.leaves(whole.params), strict=True
    ):
        np.testing.assert_array_equal(ours, right)
    assert whole.record.results["nonzeros"] <= whole.record.results["kept"]


@pytest.mark.parametrize("method", ["snip", "gsm", "layerwise_obs"])
def test_methods_that_look_at_images_or_start_from_a_network(root, method):
    train = pytest.importorskip("sparse_optax.experiments.train")
    from sparse_optax.experiments.config import Base

    base = {}
    if method in ("gsm", "layerwise_obs"):
        base = {"base": Base(epochs=1, batch_size=8, drop_epochs=())}
    run = config(method=method, density=0.1, **base)
    results = train.train(run, runs=None).record.results
    weights = 3 * SIZE**2 * 300 + 300 * 100 + 100 * 3
    # Each layer rounds up its own tenth; one pool rounds to the nearest.
    assert abs(results["kept"] - 0.1 * weights) <= 2
    assert results["weights"] == weights


@pytest.mark.parametrize("name", ["train/n02/03.jpg", "val/n02/01.jpg"])
def test_a_broken_file_stops_a_run_with_its_name(root, tmp_path, name):
    train = pytest.importorskip("sparse_optax.experiments.train")
    broken, told = root / "imagenet" / name, []
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + " is no readable"):
        train.train(
            config(method="dense"),
            runs=tmp_path,
            on_activity=lambda activity: told.append(activity.text),
        )
    # What validates and tests is read before anything is trained.
    begun = any(text.startswith("epoch 1 of") for text in told)
    assert begun == name.startswith("train")


def test_a_run_does_not_go_on_with_other_images(root, tmp_path):
    train = pytest.importorskip("sparse_optax.experiments.train")
    run = config(epochs=3, method="dense", density=1.0)
    with pytest.raises(train.TimeOver):
        train.train(run, runs=tmp_path, hours=0)
    moved = root / "imagenet" / "train" / "n02" / "03.jpg"
    moved.rename(moved.with_name("16.jpg"))
    with pytest.raises(ValueError, match="train part of imagenet has 42 files, and"):
        train.train(run, runs=tmp_path)
    moved.with_name("16.jpg").rename(moved)
    record = train.train(run, runs=tmp_path).record
    assert {k: v[0] for k, v in record.results["files"].items()} == {
        "train": 42,
        "valid": 6,
        "test": 12,
    }
    assert {"grain", "pillow"} <= record.versions.keys()
    # Nor is a finished one read for other images.
    assert train.train(run, runs=tmp_path).record.results == record.results
    moved.rename(moved.with_name("16.jpg"))
    with pytest.raises(ValueError, match="train part of imagenet has 42 files, and"):
        train.train(run, runs=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augment": "reflect"},
            "must be 'random_resized_crop' for dataset='imagenet'",
        ),
        ({"augment": "none"}, "must be 'random_resized_crop' for dataset='imagenet'"),
        ({"pixels": "half"}, "must be 'channels' for dataset='imagenet'"),
        ({"dataset": "digits", "augment": "random_resized_crop"}, "dataset='imagenet'"),
    ],
)
def test_images_in_files_are_cropped_in_one_way(options, message):
    configs = pytest.importorskip("sparse_optax.experiments.config")
    with pytest.raises(ValueError, match=message):
        configs.resolve(configs.TrainConfig(**({"dataset": "imagenet"} | options)))


def test_its_recipes_are_those_of_a_resnet_50():
    configs = pytest.importorskip("sparse_optax.experiments.config")
    plain = configs.resolve(configs.TrainConfig(dataset="imagenet", model="resnet-50"))
    assert [plain.epochs, plain.batch_size, plain.learning_rate] == [100, 256, 0.1]
    assert [plain.drop_epochs, plain.weight_decay] == [(30, 60, 90), 1e-4]
    gsm = configs.resolve(configs.TrainConfig(dataset="imagenet", method="gsm"))
    assert [gsm.epochs, gsm.batch_size, gsm.learning_rate] == [60, 64, 1e-3]
    assert [gsm.drop_epochs, gsm.momentum, gsm.weight_decay] == [(40, 50), 0.98, 1e-4]
    assert [gsm.base.epochs, gsm.base.batch_size, gsm.base.momentum] == [100, 256, 0.9]
    # As many epochs in all, of which the dense network has those before the first fall.
    after = configs.resolve(configs.TrainConfig(dataset="imagenet", method="fisher"))
    assert [after.base.epochs, after.epochs, after.drop_epochs] == [30, 70, (30, 60)]
    assert [after.base.learning_rate, after.learning_rate] == [0.1, 0.01]


def test_the_command_says_what_is_not_installed(root, capsys, monkeypatch):
    cli = pytest.importorskip("sparse_optax.experiments.cli")
    monkeypatch.setitem(sys.modules, "grain", None)
    words = "train --dataset imagenet --epochs 2 --batch-size 8 --drop-epochs 1"
    monkeypatch.chdir(root)
    assert cli.main(words.split()) == 1
    assert "grain is not installed" in capsys.readouterr().err


def test_a_budget_counts_the_network_of_its_images(root):
    sizes = pytest.importorskip("sparse_optax.experiments.sizes")
    weights = 3 * SIZE**2 * 300 + 300 * 100 + 100 * 3
    # The network is kept by model and data set.
    sizes._network.cache_clear()
    try:
        found = sizes.density(sizes.parse("5000"), "lenet-300-100", "imagenet")
    finally:
        sizes._network.cache_clear()
    assert found == 5000 / weights
