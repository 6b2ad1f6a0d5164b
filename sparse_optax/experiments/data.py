"""Data sets: digits, MNIST, Fashion-MNIST, CIFAR-10, a text, and ImageNet in files.

The digits are bundled with scikit-learn. The others are read from the folder named
by the environment variable ``SPARSE_OPTAX_DATA`` (sub-folders ``mnist``,
``fashion_mnist``, ``cifar10``); where the variable is not set they are downloaded
once into pooch's cache. The content of these files is compared with its published md5
before a byte of it is used, and the pickles of CIFAR-10 are opened only after that.
ImageNet is not downloaded, and no md5 is known of it: its images are JPEG files in the
sub-folder ``imagenet``, read while a network trains, see
:mod:`~sparse_optax.experiments.imagenet`.
"""

import gzip
import hashlib
import importlib.util
import lzma
import os
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparse_optax.experiments import imagenet

VARIABLE = "SPARSE_OPTAX_DATA"


class Dataset(NamedTuple):
    """Images and labels, cut into three fixed parts.

    ``n`` images of height ``h``, width ``w`` and ``c`` channels (NHWC), shifted and
    scaled to about zero mean and unit variance.

    Attributes:
      train_x: images to train on, float32 of shape (n, h, w, c); of ImageNet this and
        the other images are no arrays but give their rows, see ``imagenet.Cropped``.
      train_y: their labels, int32 of shape (n,).
      valid_x: validation images; none of them with ``split="full"``.
      valid_y: their labels.
      test_x: test images.
      test_y: their labels.
      classes: the number of classes.
      name: the name the set was loaded by.
    """

    train_x: np.ndarray | imagenet.Cropped
    train_y: np.ndarray
    valid_x: np.ndarray | imagenet.Cropped
    valid_y: np.ndarray
    test_x: np.ndarray | imagenet.Cropped
    test_y: np.ndarray
    classes: int
    name: str


class Source(NamedTuple):
    """One file of a data set.

    Attributes:
      file: its name inside the data set's folder.
      content_md5: md5 of its content after decompression.
      file_md5: md5 of the file itself, as it is downloaded.
      url: where to download it from, or None for a member of an archive.
    """

    file: str
    content_md5: str
    file_md5: str
    url: str | None


class Archive(NamedTuple):
    """A tar archive that holds all files of a data set: address and md5."""

    url: str
    md5: str


class Origin(NamedTuple):
    """Where a data set lies and how its pixels are normalised.

    Attributes:
      folder: sub-folder of ``$SPARSE_OPTAX_DATA``.
      sources: its files, by role.
      archive: the archive to download, where the files have no address of their own.
      mean: pixel mean per channel, pixels scaled to 0..1.
      std: pixel standard deviation per channel.
      decode: turns the checked contents into (train_x, train_y, test_x, test_y).
    """

    folder: str
    sources: dict[str, Source]
    archive: Archive | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    decode: Callable[
        [dict[str, bytes]], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    ]


def load(
    name: str = "digits", *, split: str = "lee", pixels: str = "channels"
) -> Dataset:
    """Loads a data set.

    Pixels are scaled to 0..1, then ``(x - mean) / std`` with the usual constants of
    the set (MNIST 0.1307 and 0.3081). The digits have 1,797 images of 8 x 8 pixels;
    the last 360, by writers who are not among the others, are the test set.

    Args:
      name: ``"digits"``, ``"mnist"``, ``"fashion-mnist"``, ``"cifar10"``,
        ``"imagenet"``, a folder of JPEG files, or ``"topics"``, the help pages of
        Python, see :func:`text`.
      split: ``"lee"`` trains on the first 90% of the training images and validates
        on the last 10% (54,000 and 6,000 of MNIST), of ImageNet on those of each
        class; ``"full"`` trains on all of them and leaves the validation set empty.
      pixels: ``"channels"`` normalises as above, ``"half"`` to [-1, 1], as the released
        code of GSM does: a mean and a deviation of 0.5.

    Returns:
      A :class:`Dataset` of NumPy arrays; of ImageNet the images stay in their files.

    Raises:
      ValueError: for an unknown name, split or form of pixels, and for a truncated or
        altered file.
      FileNotFoundError: for a missing file, naming it and where it can be had.
      ImportError: for ImageNet without grain or Pillow.

    Examples:
      >>> from sparse_optax.experiments import data
      >>> digits = data.load("digits")
      >>> digits.train_x.shape, digits.valid_x.shape, digits.test_x.shape
      ((1293, 8, 8, 1), (144, 8, 8, 1), (360, 8, 8, 1))

    References:
      Lee et al., `SNIP: single-shot network pruning based on connection sensitivity
      <https://arxiv.org/abs/1810.02340>`_, 2019, for the 90/10 split.
    """
    if name not in NAMES:
        raise ValueError(f"load: name={name!r}; choose one of {', '.join(NAMES)}.")
    if split not in ("lee", "full"):
        raise ValueError(
            f"load: split={split!r}; choose 'lee' (first 90% to train on, last 10% to "
            "validate on) or 'full' (train on everything)."
        )
    if name == "topics":
        return text(split=split)
    if name == "imagenet":
        if pixels != "channels":
            raise ValueError(
                f"load: pixels={pixels!r} must be 'channels' for imagenet, whose "
                "images are normalised while they are read. Leave it out."
            )
        return _imagenet(split)
    largest, mean, std = scale(name, pixels)
    if name == "digits":
        train_x, train_y, test_x, test_y = _digits()
    else:
        origin = ORIGINS[name]
        contents = _contents(name, origin)
        train_x, train_y, test_x, test_y = origin.decode(contents)
    train_x, test_x = (_normalise(x, largest, mean, std) for x in (train_x, test_x))
    n = len(train_x)
    kept = n * 9 // 10 if split == "lee" else n
    return Dataset(
        train_x=train_x[:kept],
        train_y=train_y[:kept].astype(np.int32),
        valid_x=train_x[kept:],
        valid_y=train_y[kept:].astype(np.int32),
        test_x=test_x,
        test_y=test_y.astype(np.int32),
        classes=10,
        name=name,
    )


def scale(name: str, pixels: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """What normalises the pixels of a set of images.

    Args:
      name: the set.
      pixels: ``"channels"`` or ``"half"``.

    Returns:
      The largest pixel, and mean and deviation of each channel of pixels in 0..1.

    Raises:
      ValueError: for another ``pixels``.
    """
    if name == "digits":
        # Mean and deviation of the training pixels, rounded.
        largest, mean, std = 16, (0.3059,), (0.3763,)
    else:
        largest, mean, std = 255, ORIGINS[name].mean, ORIGINS[name].std
    if pixels == "half":
        mean = std = (0.5,) * len(mean)
    elif pixels != "channels":
        raise ValueError(
            f"load: pixels={pixels!r}; choose 'channels' (mean and deviation of each "
            "channel) or 'half' (all to [-1, 1])."
        )
    return largest, mean, std


def black(name: str, pixels: str = "channels") -> tuple[float, ...]:
    """What a black pixel is after normalisation, one number a channel.

    Examples:
      >>> from sparse_optax.experiments import data
      >>> data.black("cifar10", "half")
      (-1.0, -1.0, -1.0)
    """
    if name == "topics":
        return ()
    _, mean, std = scale(name, pixels)
    return tuple(-m / s for m, s in zip(mean, std, strict=True))


def text(*, split: str = "lee", length: int = 128) -> Dataset:
    """The help pages of Python as numbers of characters, to predict the next of each.

    The pages of ``pydoc_data.topics``, by name, end to end: some 465,000 characters
    that come with Python and differ a little between its versions. The last tenth is
    the test set; of the rest the last tenth validates, as in :func:`load`.

    Args:
      split: as in :func:`load`.
      length: characters of a window, at least 1.

    Returns:
      A :class:`Dataset` whose images are windows, int32 of shape (n, length), and
      whose labels are the same windows one character later. Training windows begin
      every length / 2 characters, the others do not overlap. The classes are the
      characters that occur.

    Examples:
      >>> from sparse_optax.experiments import data
      >>> topics = data.text(length=64)
      >>> bool((topics.train_x[0, 1:] == topics.train_y[0, :-1]).all())
      True
    """
    from pydoc_data.topics import topics

    whole = "".join(topics[name] for name in sorted(topics))
    alphabet = {character: i for i, character in enumerate(sorted(set(whole)))}
    numbers = np.array([alphabet[character] for character in whole], np.int32)
    tested = len(numbers) * 9 // 10
    kept = tested * 9 // 10 if split == "lee" else tested
    cuts = (numbers[:kept], numbers[kept:tested], numbers[tested:])
    steps = (max(1, length // 2), length, length)
    parts = []
    for part, step in zip(cuts, steps, strict=True):
        starts = np.arange(0, len(part) - length, step)[:, None]
        places = starts + np.arange(length)[None]
        parts += [part[places], part[places + 1]]
    return Dataset(*parts, classes=len(alphabet), name="topics")


def can_be_had(name: str) -> bool:
    """Whether a data set is here or can be downloaded: all are, but for ImageNet, which
    needs its folder and two packages.
    """
    if name != "imagenet":
        return True
    root = os.environ.get(VARIABLE)
    packages = map(importlib.util.find_spec, ("grain", "PIL"))
    return bool(root) and (Path(root) / "imagenet").is_dir() and all(packages)


def _imagenet(split: str) -> Dataset:
    """The folder of ImageNet; its images stay in their files."""
    root = os.environ.get(VARIABLE)
    if not root:
        raise FileNotFoundError(
            f"load: imagenet needs {VARIABLE}, which is not set: nothing downloads it. "
            "Set it to the folder that holds imagenet/train and imagenet/val, in which "
            "each class has a folder of JPEG files."
        )
    imagenet.load_grain()
    folder = Path(root) / "imagenet"
    train, test = imagenet.find(folder), imagenet.find(folder, "val")
    if train.classes != test.classes:
        alone = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"load: {folder} must have the same classes in train and val, but "
            f"{', '.join(alone[:3])}{' and others' * (len(alone) > 3)} are in one of "
            "them only. Add or remove these folders."
        )
    nothing = imagenet.Images((), np.zeros(0, np.int32), train.classes)
    kept, valid = imagenet.held_back(train) if split == "lee" else (train, nothing)
    parts = []
    for part in (kept, valid, test):
        parts += [imagenet.Cropped(part, imagenet.SIZE), part.labels]
    return Dataset(*parts, classes=len(train.classes), name="imagenet")


def _normalise(x, largest, mean, std):
    mean, std = (np.asarray(v, np.float32)[None, None, None] for v in (mean, std))
    return (x.astype(np.float32) / np.float32(largest) - mean) / std


def _digits():
    from sklearn.datasets import load_digits

    bundle: Any = load_digits()
    x, y = bundle.images[..., None], bundle.target
    # In the order of the file, so that the test set is written by other people.
    train = len(x) * 4 // 5
    return x[:train], y[:train], x[train:], y[train:]


# -- files: find, decompress, check ------------------------------------------------


def _contents(name: str, origin: Origin) -> dict[str, bytes]:
    """The decompressed, checked content of every file of a data set, by role."""
    root = os.environ.get(VARIABLE)
    if not root:
        return _downloaded(name, origin)
    folder = Path(root) / origin.folder
    contents = {}
    for role, source in origin.sources.items():
        path = folder / source.file
        if not path.is_file():
            raise FileNotFoundError(
                f"load: {name} needs {path}, which does not exist "
                f"(expected md5 {source.file_md5}). Put the file there, or unset "
                f"{VARIABLE}={root} to let it be downloaded."
            )
        contents[role] = _checked(path, source)
    return contents


def _checked(path: Path, source: Source) -> bytes:
    """Reads, decompresses and compares one file with its md5."""
    try:
        content = _decompress(path)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(
            f"load: {path} cannot be decompressed ({error}; {path.stat().st_size} "
            f"bytes): it is truncated or altered. Expected a file of md5 "
            f"{source.file_md5}, found {_md5(path.read_bytes())}. Delete it and fetch "
            "it again."
        ) from error
    _compare(content, source.content_md5, str(path))
    return content


def _decompress(path: Path) -> bytes:
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            return file.read()
    if path.suffix == ".xz":
        with lzma.open(path) as file:
            return file.read()
    return path.read_bytes()


def _compare(content: bytes, expected: str, label: str) -> None:
    found = _md5(content)
    if found != expected:
        raise ValueError(
            f"load: the content of {label} has md5 {found}, expected {expected}: the "
            "file is truncated or altered. Delete it and fetch it again."
        )


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _downloaded(name: str, origin: Origin) -> dict[str, bytes]:
    """As :func:`_contents`, from pooch's cache, filled where it has to be."""
    import pooch

    cache = pooch.os_cache("sparse_optax") / origin.folder

    # Typed loosely: pooch's own class does not satisfy its protocol of downloaders.
    downloader: Any = pooch.HTTPDownloader(timeout=60)

    def fetch(url, md5, file):
        try:
            return Path(
                pooch.retrieve(
                    url,
                    known_hash=f"md5:{md5}",
                    fname=file,
                    path=cache,
                    downloader=downloader,
                )
            )
        except ValueError as error:  # pooch's word for another md5
            raise ValueError(
                f"load: what {url} sent for {name} does not have md5 {md5} ({error}). "
                f"Fetch {file} from elsewhere and set {VARIABLE} to the folder that "
                f"holds {origin.folder}/{file}."
            ) from error
        except Exception as error:
            raise FileNotFoundError(
                f"load: {name} needs {file} (md5 {md5}), and {url} could not be "
                f"downloaded ({type(error).__name__}: {error}). Set {VARIABLE} to a "
                f"folder that holds {origin.folder}/{file}, or try again."
            ) from error

    if origin.archive is None:
        return {
            role: _checked(fetch(source.url, source.file_md5, source.file), source)
            for role, source in origin.sources.items()
        }
    path = fetch(origin.archive.url, origin.archive.md5, Path(origin.archive.url).name)
    contents = {}
    with tarfile.open(path) as archive:
        members = {Path(member.name).name: member for member in archive.getmembers()}
        for role, source in origin.sources.items():
            member = members[source.file.removesuffix(".xz")]
            file = archive.extractfile(member)
            contents[role] = file.read() if file is not None else b""
            _compare(contents[role], source.content_md5, f"{path}:{member.name}")
    return contents


# -- formats -----------------------------------------------------------------------


def _idx_images(content: bytes) -> np.ndarray:
    n, height, width = np.frombuffer(content, ">i4", count=3, offset=4)
    pixels = np.frombuffer(content, np.uint8, offset=16)
    return pixels.reshape(n, height, width, 1)


def _idx_labels(content: bytes) -> np.ndarray:
    return np.frombuffer(content, np.uint8, offset=8)


def _decode_idx(contents):
    return (
        _idx_images(contents["train images"]),
        _idx_labels(contents["train labels"]),
        _idx_images(contents["test images"]),
        _idx_labels(contents["test labels"]),
    )


def _decode_cifar(contents):
    def batch(content):
        # The caller has compared the md5: this is the published pickle.
        record = pickle.loads(content, encoding="bytes")
        x = record[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return x, np.asarray(record[b"labels"], np.uint8)

    train = [batch(contents[f"batch {i}"]) for i in range(1, 6)]
    test_x, test_y = batch(contents["test"])
    train_x, train_y = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return train_x, train_y, test_x, test_y


# File, md5 of the file, md5 of its content after decompression.
_MD5S = """
mnist/train-images-idx3-ubyte.gz
    f68b3c2dcbeaaa9fbdd348bbdeb94873 6bbc9ace898e44ae57da46a324031adb
mnist/train-labels-idx1-ubyte.gz
    d53e105ee54ea40749a09fcbcd1e9432 a25bea736e30d166cdddb491f175f624
mnist/t10k-images-idx3-ubyte.gz
    9fb629c4189551a2d022fa330f9573f3 2646ac647ad5339dbf082846283269ea
mnist/t10k-labels-idx1-ubyte.gz
    ec29112dd5afa0611ce80d1b7f02629c 27ae3e4e09519cfbb04c329615203637
fashion_mnist/train-images-idx3-ubyte.gz
    8d4fb7e6c68d591d4c3dfef9ec88bf0d f4a8712d7a061bf5bd6d2ca38dc4d50a
fashion_mnist/train-labels-idx1-ubyte.gz
    25c81989df183df01b3e8a0aad5dffbe 9018921c3c673c538a1fc5bad174d6f9
fashion_mnist/t10k-images-idx3-ubyte.gz
    bef4ecab320f06d8554ea6380940ec79 8181f5470baa50b63fa0f6fddb340f0a
fashion_mnist/t10k-labels-idx1-ubyte.gz
    bb300cfdad3c16e7a12a480ee83cd310 15d484375f8d13e6eb1aabb0c3f46965
cifar10/data_batch_1.xz
    e748212717105f144810484ddac518d2 c99cafc152244af753f735de768cd75f
cifar10/data_batch_2.xz
    ba9859bde8a29fee430031ac7f21906f d4bba439e000b95fd0a9bffe97cbabec
cifar10/data_batch_3.xz
    3135ca0ea8cf813acd193da22ce756e9 54ebc095f3ab1f0389bbae665268c751
cifar10/data_batch_4.xz
    0bbed9126b8a33fe0243a6dd081ef594 634d18415352ddfa80567beed471001a
cifar10/data_batch_5.xz
    96b268c64ffad5f17af24b7d47f24f21 482c414d41f54cd18b22e5b47cb7c3cb
cifar10/test_batch.xz
    824177a8625f7919ebfd8dc6dacebdbb 40351d587109b95175f43aff81a1287e
"""
_IDX_FILES = {
    "train images": "train-images-idx3-ubyte.gz",
    "train labels": "train-labels-idx1-ubyte.gz",
    "test images": "t10k-images-idx3-ubyte.gz",
    "test labels": "t10k-labels-idx1-ubyte.gz",
}
_CIFAR_FILES = {
    **{f"batch {i}": f"data_batch_{i}.xz" for i in range(1, 6)},
    "test": "test_batch.xz",
}


def _sources(
    folder: str, files: dict[str, str], base: str | None = None
) -> dict[str, Source]:
    words = iter(_MD5S.split())
    md5s: dict[str, Any] = dict(zip(words, zip(words, words, strict=True), strict=True))

    def source(file):
        file_md5, content_md5 = md5s[f"{folder}/{file}"]
        return Source(file, content_md5, file_md5, base and base + file)

    return {role: source(file) for role, file in files.items()}


ORIGINS = {
    "mnist": Origin(
        folder="mnist",
        sources=_sources(
            "mnist",
            _IDX_FILES,
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        archive=None,
        mean=(0.1307,),
        std=(0.3081,),
        decode=_decode_idx,
    ),
    "fashion-mnist": Origin(
        folder="fashion_mnist",
        sources=_sources(
            "fashion_mnist",
            _IDX_FILES,
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/"
            "data/fashion/",
        ),
        archive=None,
        mean=(0.2860,),
        std=(0.3530,),
        decode=_decode_idx,
    ),
    "cifar10": Origin(
        folder="cifar10",
        sources=_sources("cifar10", _CIFAR_FILES),
        archive=Archive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
        ),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        decode=_decode_cifar,
    ),
}
NAMES = ("digits", *ORIGINS, "imagenet", "topics")
