"""Data sets: shapes, splits, and what happens to missing, cut or altered files."""

import gc
import gzip
import hashlib
import http.server
import itertools
import lzma
import os
import pickle
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")
augment = pytest.importorskip("sparse_optax.experiments.augment")
data = pytest.importorskip("sparse_optax.experiments.data")

ROOT = os.environ.get(data.VARIABLE)
needs_files = pytest.mark.skipif(
    not ROOT, reason=f"{data.VARIABLE} is not set: no MNIST files to read"
)


def test_digits_shapes_and_normalisation():
    digits = data.load("digits")
    assert digits.train_x.shape == (1293, 8, 8, 1)
    assert digits.valid_x.shape == (144, 8, 8, 1)
    assert digits.test_x.shape == (360, 8, 8, 1)
    assert digits.train_x.dtype == np.float32
    assert digits.train_y.dtype == np.int32
    assert sorted(set(digits.test_y.tolist())) == list(range(10))
    train = np.concatenate([digits.train_x, digits.valid_x])
    assert abs(train.mean()) < 0.01
    assert abs(train.std() - 1) < 0.01


def test_full_split_trains_on_the_validation_images_too():
    lee, full = data.load("digits"), data.load("digits", split="full")
    assert full.valid_x.shape == (0, 8, 8, 1)
    np.testing.assert_array_equal(
        full.train_x, np.concatenate([lee.train_x, lee.valid_x])
    )
    np.testing.assert_array_equal(full.test_y, lee.test_y)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "svhn"}, "load: name='svhn'; choose one of digits, mnist"),
        ({"name": "digits", "split": "80/20"}, "load: split='80/20'; choose 'lee'"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        data.load(**arguments)


def test_pixels_from_minus_one_to_one():
    half = data.load("digits", pixels="half")
    plain = data.load("digits")
    assert (half.train_x.min(), half.train_x.max()) == (-1, 1)
    grey = plain.train_x * 0.3763 + 0.3059
    np.testing.assert_allclose(half.train_x, 2 * grey - 1, atol=1e-5)
    assert half.train_x.min() == data.black("digits", "half")[0]
    np.testing.assert_allclose(plain.train_x.min(), data.black("digits")[0], rtol=1e-6)
    np.testing.assert_allclose(
        data.black("cifar10"), [-0.4914 / 0.2023, -0.4822 / 0.1994, -0.4465 / 0.2010]
    )
    with pytest.raises(ValueError, match="pixels='raw'; choose 'channels'"):
        data.load("digits", pixels="raw")


# -- text --------------------------------------------------------------------------


def test_windows_of_the_text_are_the_text():
    from pydoc_data.topics import topics

    whole = "".join(topics[name] for name in sorted(topics))
    alphabet = np.array(sorted(set(whole)))
    found = data.load("topics")
    assert found.classes == len(alphabet)

    def words(part):
        return ["".join(alphabet[row]) for row in part]

    tested = len(whole) * 9 // 10
    kept = tested * 9 // 10
    train = words(found.train_x)
    assert train[0] == whole[:128]
    assert train[3] == whole[3 * 64 : 3 * 64 + 128]
    assert "".join(words(found.valid_x)) == whole[kept:][: found.valid_x.size]
    assert "".join(words(found.test_x)) == whole[tested:][: found.test_x.size]
    assert "".join(words(found.test_y)) == whole[tested + 1 :][: found.test_y.size]
    for x, y in (
        (found.train_x, found.train_y),
        (found.valid_x, found.valid_y),
        (found.test_x, found.test_y),
    ):
        np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
        assert x.dtype == y.dtype == np.int32
    # All but what fills no window, none twice but in training.
    assert 0 <= tested - kept - found.valid_x.size <= 128
    assert 0 <= kept - 64 * (len(train) + 1) <= 64
    full = data.text(split="full")
    assert len(full.valid_x) == 0
    np.testing.assert_array_equal(full.test_x, found.test_x)


# -- augmentation ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "black"), [("reflect", ()), ("zero", (-1.0, 2.0))])
def test_a_crop_is_one_of_the_padded_image(kind, black):
    size = 12
    images = np.random.default_rng(0).normal(size=(3, size, size, 2)).astype("float32")
    pads = ((4, 4), (4, 4), (0, 0))
    found = [set(), set(), set()]
    run = jax.jit(lambda key: augment.augment(key, images, kind, black))
    for seed in range(60):
        cut = np.asarray(run(jax.random.key(seed)))
        for i, image in enumerate(images):
            padded = np.pad(image, pads, mode="reflect")
            if kind == "zero":
                padded[:] = black
                padded[4:-4, 4:-4] = image
            hits = [
                (row, column, flip)
                for row, column, flip in itertools.product(range(9), range(9), (1, -1))
                if np.allclose(
                    cut[i],
                    padded[row : row + size, column : column + size][:, ::flip],
                    atol=1e-6,
                )
            ]
            assert hits
            found[i].add(hits[0])
    for i, seen in enumerate(found):
        assert {row for row, _, _ in seen} == set(range(9))
        assert {column for _, column, _ in seen} == set(range(9))
        assert {flip for _, _, flip in seen} == {1, -1}
        # Images of a batch are cut each in its own way.
        assert seen != found[i - 1]


def test_no_augmentation_and_a_kind_there_is_not():
    images = jnp.ones((2, 8, 8, 3))
    assert augment.augment(jax.random.key(0), images, "none") is images
    with pytest.raises(ValueError, match="kind='mirror'; choose one of none, reflect"):
        augment.augment(jax.random.key(0), images, "mirror")


# -- a small data set of our own, in the real formats ------------------------------


def idx(array: np.ndarray) -> bytes:
    magic = {3: 2051, 1: 2049}[array.ndim]
    return np.array([magic, *array.shape], ">i4").tobytes() + array.tobytes()


def source(path: Path, content: bytes) -> data.Source:
    """Writes a compressed file and describes it as the loader wants."""
    compress = gzip.compress if path.suffix == ".gz" else lzma.compress
    path.write_bytes(compress(content))
    md5s = (hashlib.md5(bytes_).hexdigest() for bytes_ in (content, path.read_bytes()))
    return data.Source(path.name, *md5s, url=None)


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Twenty training and ten test images under the name ``mnist``."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    contents = {
        "train images": idx(rng.integers(0, 256, (20, 28, 28), np.uint8)),
        "train labels": idx(np.arange(20, dtype=np.uint8) % 10),
        "test images": idx(rng.integers(0, 256, (10, 28, 28), np.uint8)),
        "test labels": idx(np.arange(10, dtype=np.uint8)),
    }
    origin = data.ORIGINS["mnist"]
    sources = {
        role: source(folder / origin.sources[role].file, content)
        for role, content in contents.items()
    }
    monkeypatch.setitem(data.ORIGINS, "mnist", origin._replace(sources=sources))
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    return folder


def test_idx_files_are_read(small_mnist):
    mnist = data.load("mnist")
    assert mnist.train_x.shape == (18, 28, 28, 1)
    assert mnist.valid_x.shape == (2, 28, 28, 1)
    assert mnist.train_y.tolist() == [*range(10), *range(8)]
    with gzip.open(small_mnist / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16)
    np.testing.assert_allclose(
        mnist.test_x.ravel(), (pixels / 255 - 0.1307) / 0.3081, rtol=1e-5, atol=1e-6
    )


def test_missing_file_is_named_with_its_md5(small_mnist):
    path = small_mnist / "train-labels-idx1-ubyte.gz"
    path.unlink()
    md5 = data.ORIGINS["mnist"].sources["train labels"].file_md5
    with pytest.raises(FileNotFoundError) as caught:
        data.load("mnist")
    assert str(path) in str(caught.value)
    assert md5 in str(caught.value)
    assert data.VARIABLE in str(caught.value)


def test_truncated_file(small_mnist):
    path = small_mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    found = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="truncated or altered") as caught:
        data.load("mnist")
    expected = data.ORIGINS["mnist"].sources["train images"].file_md5
    for word in (str(path), expected, found, "fetch it again"):
        assert word in str(caught.value)


def test_altered_file_that_still_decompresses(small_mnist):
    path = small_mnist / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ValueError, match="truncated or altered") as caught:
        data.load("mnist")
    expected = data.ORIGINS["mnist"].sources["test labels"].content_md5
    found = hashlib.md5(content).hexdigest()
    for word in (str(path), expected, found):
        assert word in str(caught.value)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """Five batches of four images and a test batch, pickled as CIFAR-10 is."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    rng = np.random.default_rng(0)
    origin = data.ORIGINS["cifar10"]
    sources = {
        role: source(
            folder / real.file,
            pickle.dumps(
                {
                    b"data": rng.integers(0, 256, (4, 3072), np.uint8),
                    b"labels": [0, 1, 2, 3],
                },
                protocol=2,
            ),
        )
        for role, real in origin.sources.items()
    }
    monkeypatch.setitem(data.ORIGINS, "cifar10", origin._replace(sources=sources))
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    return folder


def test_cifar_batches_become_nhwc(small_cifar):
    cifar = data.load("cifar10", split="full")
    assert cifar.train_x.shape == (20, 32, 32, 3)
    raw = pickle.loads(lzma.decompress((small_cifar / "test_batch.xz").read_bytes()))
    green = raw[b"data"][2].reshape(3, 32, 32)[1]
    np.testing.assert_allclose(
        cifar.test_x[2, :, :, 1], (green / 255 - 0.4822) / 0.1994, rtol=1e-5, atol=1e-6
    )


def test_altered_pickle_is_not_opened(small_cifar, tmp_path):
    """A pickle can run code: this one would leave a file behind."""
    trace = tmp_path / "the pickle ran"

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    path = small_cifar / "data_batch_3.xz"
    path.write_bytes(lzma.compress(pickle.dumps(Trap())))
    with pytest.raises(ValueError, match="truncated or altered"):
        data.load("cifar10")
    assert not trace.exists()
    pickle.loads(lzma.decompress(path.read_bytes()))
    assert trace.exists(), "the trap does not work, so the test proves nothing"


def harmed(rng, content: bytes) -> bytes:
    """Some bits changed, an end cut off or added, bytes put in, or zeros."""
    new, place = bytearray(content), int(rng.integers(len(content)))
    kind = rng.integers(5)
    if kind == 0:
        for place in rng.integers(len(content), size=rng.integers(1, 4)):
            new[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del new[place:]
    elif kind == 2:
        new += rng.bytes(int(rng.integers(1, 20)))
    elif kind == 3:
        new[place:place] = rng.bytes(int(rng.integers(1, 9)))
    else:
        new[place:] = bytes(len(new) - place)
    return bytes(new)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(60, id="some"),
        pytest.param(4000, id="many", marks=pytest.mark.fuzz),
    ],
)
def test_a_damaged_file_is_named_or_read_as_it_was(
    small_mnist, small_cifar, number, figures
):
    """As it was: a change of a name or a date in a header, or behind the end."""
    rng = np.random.default_rng(0)
    whole = {name: data.load(name) for name in ("mnist", "cifar10")}
    files = [(f.name, p) for f in (small_mnist, small_cifar) for p in f.iterdir()]
    refused = 0
    for _ in range(number):
        name, path = files[rng.integers(len(files))]
        content = path.read_bytes()
        path.write_bytes(harmed(rng, content))
        found, message = whole[name], ""
        try:
            found = data.load(name)
        except ValueError as error:
            message = str(error)
            refused += 1
        for word in (str(path), "truncated or altered", "fetch it again"):
            assert not message or word in message
        for a, b in zip(found, whole[name], strict=True):
            np.testing.assert_array_equal(a, b)
        path.write_bytes(content)
    assert refused > number / 2
    figures["data files changed at random"] += number


@pytest.fixture
def mirror(small_mnist, tmp_path, monkeypatch):
    """The small MNIST behind a web server, an empty cache, and no variable set."""
    pooch = pytest.importorskip("pooch")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=small_mnist)

        def log_message(self, *arguments):
            asked.append(self.path)

    monkeypatch.delenv(data.VARIABLE)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        origin = data.ORIGINS["mnist"]
        sources = {
            role: real._replace(url=base + real.file)
            for role, real in origin.sources.items()
        }
        monkeypatch.setitem(data.ORIGINS, "mnist", origin._replace(sources=sources))
        yield asked
        server.shutdown()
    # pooch leaves the socket of a refused answer to the garbage collector, which
    # warns; here and not in whichever test it would run.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_download_is_cached(mirror):
    assert data.load("mnist").test_y.tolist() == list(range(10))
    assert len(mirror) == 4
    data.load("mnist")
    assert len(mirror) == 4


def test_altered_download_is_refused(mirror, small_mnist):
    altered = small_mnist / "t10k-labels-idx1-ubyte.gz"
    altered.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(ValueError, match="does not have md5") as caught:
        data.load("mnist")
    assert data.ORIGINS["mnist"].sources["test labels"].file_md5 in str(caught.value)


def test_failed_download_says_what_to_do(mirror, small_mnist):
    (small_mnist / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match="404") as caught:
        data.load("mnist")
    md5 = data.ORIGINS["mnist"].sources["train images"].file_md5
    for word in (data.VARIABLE, "mnist/train-images-idx3-ubyte.gz", md5):
        assert word in str(caught.value)


# -- the real files ----------------------------------------------------------------


@needs_files
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("mnist", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("fashion-mnist", [6000] * 10),
    ],
)
def test_real_idx_sets(name, counts):
    whole = data.load(name, split="full")
    assert whole.train_x.shape == (60_000, 28, 28, 1)
    assert whole.test_x.shape == (10_000, 28, 28, 1)
    assert np.bincount(whole.train_y).tolist() == counts
    assert abs(whole.train_x.mean()) < 1e-2
    assert abs(whole.train_x.std() - 1) < 1e-2


@needs_files
def test_real_cifar():
    cifar = data.load("cifar10")
    assert cifar.train_x.shape == (45_000, 32, 32, 3)
    assert cifar.valid_x.shape == (5_000, 32, 32, 3)
    assert np.bincount(cifar.test_y).tolist() == [1000] * 10
