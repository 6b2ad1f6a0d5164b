"""ImageNet from a folder of JPEG files, read by grain: decode, crop, flip, batch.

The folder has the usual layout, one folder for each class, in which its files lie::

    folder/train/n01440764/n01440764_10026.JPEG
    folder/val/n01440764/ILSVRC2012_val_00000293.JPEG

Nothing is kept in memory. Images of training are cropped at random and flipped, and
come in another order each epoch; those of evaluation are cropped at their center. The
iterators are grain's: ``get_state()`` and ``set_state()`` go on at any batch, in the
middle of an epoch too, with the same images and the same crops.

Needs the packages grain and Pillow: ``pip install "sparse_optax[imagenet]"``.

References:
  Szegedy et al., `Going deeper with convolutions <https://arxiv.org/abs/1409.4842>`_,
  2015, for the random crops; Goyal et al., `Accurate, large minibatch SGD
  <https://arxiv.org/abs/1706.02677>`_, 2017, for the recipe that uses them.
"""

import dataclasses
import functools
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from sparse_optax import checks

# Means and deviations of the channels, of pixels in 0..1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
# Height and width of the images that `sparse-optax train` takes.
SIZE = 224
# Share of the area of an image that a crop has, and its width over its height.
_AREA = (0.08, 1.0)
_RATIO = (3 / 4, 4 / 3)
# Crops that are drawn before one at the center is taken.
_TRIES = 10
# The shorter side of an image of evaluation over the side of its crop: 256 to 224.
_MARGIN = 256 / 224
_ENDINGS = (".jpeg", ".jpg")


class Images(NamedTuple):
    """The files of one part of the data set.

    Attributes:
      files: their paths, ordered by class and name.
      labels: the number of the class of each file, int32 of shape (n,).
      classes: the names of the classes, in the order of their numbers.
    """

    files: tuple[Path, ...]
    labels: np.ndarray
    classes: tuple[str, ...]

    def digest(self) -> str:
        """Of the folders and names of all files, in their order."""
        names = "\n".join("/".join(path.parts[-2:]) for path in self.files)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    def pick(self, numbers: np.ndarray) -> "Images":
        """The files of these numbers, in this order."""
        files = tuple(self.files[i] for i in numbers)
        return Images(files, self.labels[numbers], self.classes)


@dataclasses.dataclass(frozen=True)
class Cropped:
    """The images of a part, as an array of shape (n, size, size, 3) would give them.

    Rows are read from their files when they are asked for, cropped at the center.

    Attributes:
      images: the files.
      size: height and width.
    """

    images: Images
    size: int

    @property
    def dtype(self) -> np.dtype:
        """The numbers of the rows that it gives."""
        return np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, height, width and channels."""
        return len(self.images.files), self.size, self.size, 3

    def __len__(self) -> int:
        return len(self.images.files)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """The images of a slice or of an array of row numbers, float32."""
        chosen = rows if isinstance(rows, slice) else np.asarray(rows)
        numbers = np.arange(len(self))[chosen]
        if not len(numbers):
            return np.zeros((0, *self.shape[1:]), self.dtype)
        found = eval_batches(self.images.pick(numbers), len(numbers), size=self.size)
        return next(iter(found))[0]


class Batches(Protocol):
    """An iterator of batches whose place can be kept: a ``grain.DatasetIterator``."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Itself."""
        ...

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        """Images, float32 of shape (b, size, size, 3), and labels, int32 of (b,)."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Where it stands, in numbers that fit into a JSON file."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where an iterator of the same arguments stood."""
        ...


def find(folder: str | Path, part: str = "train") -> Images:
    """The files of a part of the data set.

    Args:
      folder: the folder that holds ``train`` and ``val``.
      part: ``"train"``, ``"val"`` or the name of another folder in it.

    Returns:
      The files, their labels and the classes. The number of a class is its place in the
      order of the names of the folders, so that both parts must have the same classes.

    Raises:
      FileNotFoundError: where there is no such folder.
      ValueError: where it has no folders of classes, or a class has no JPEG file.

    Examples:
      >>> import pathlib, tempfile
      >>> from sparse_optax.experiments import imagenet
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for name in ("cat/1.JPEG", "dog/2.JPEG", "dog/3.JPEG"):
      ...         path = pathlib.Path(folder, "train", name)
      ...         path.parent.mkdir(parents=True, exist_ok=True)
      ...         path.touch()
      ...     images = imagenet.find(folder)
      >>> images.classes, images.labels.tolist()
      (('cat', 'dog'), [0, 1, 1])
    """
    root = Path(folder) / part
    if not root.is_dir():
        raise FileNotFoundError(
            f"find: there is no folder {root}. Give the folder that holds {part!r}, in "
            "which each class has a folder of its own."
        )
    classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    if not classes:
        raise ValueError(
            f"find: {root} has no folders of classes. Put the files of each class into "
            "a folder of its own, as in train/n01440764/n01440764_10026.JPEG."
        )
    files, labels = [], []
    for number, name in enumerate(classes):
        paths = (root / name).iterdir()
        own = sorted(path for path in paths if path.suffix.lower() in _ENDINGS)
        if not own:
            raise ValueError(
                f"find: the class {root / name} has no file that ends in "
                f"{' or '.join(_ENDINGS)}. Put its images there, or remove the folder."
            )
        files += own
        labels += [number] * len(own)
    return Images(tuple(files), np.asarray(labels, np.int32), classes)


def held_back(images: Images) -> tuple[Images, Images]:
    """The first nine tenths of each class, and the rest.

    Args:
      images: the files of all classes.

    Returns:
      What is left to train on, at least one file of each class, and what validates.

    Examples:
      >>> import numpy as np
      >>> from sparse_optax.experiments import imagenet
      >>> files = tuple(range(12))  # stand for paths
      >>> images = imagenet.Images(files, np.repeat([0, 1], 6), ("cat", "dog"))
      >>> [part.files for part in imagenet.held_back(images)]
      [(0, 1, 2, 3, 4, 6, 7, 8, 9, 10), (5, 11)]
    """
    counts = np.bincount(images.labels, minlength=len(images.classes))
    first = np.cumsum(counts) - counts
    place = np.arange(len(images.labels)) - first[images.labels]
    kept = place < np.maximum(1, counts * 9 // 10)[images.labels]
    return images.pick(np.nonzero(kept)[0]), images.pick(np.nonzero(~kept)[0])


@checks.boundary("train_batches")
def train_batches(
    images: Images,
    batch_size: int,
    *,
    seed: int,
    size: int = 224,
    epochs: int | None = None,
    corrupt: str = "refuse",
    threads: int = 16,
) -> Batches:
    """Batches to train on: random crops and flips, in another order each epoch.

    A crop has 8% to 100% of the area of its image and a ratio of its sides between 3/4
    and 4/3; it is resized to ``size`` by bilinear interpolation and mirrored in one of
    two cases. What is drawn for an image depends on ``seed`` and on its place in the
    order alone.

    Args:
      images: the files, see :func:`find`.
      batch_size: images of a batch, at least 1 and at most all. The last images of an
        epoch that make no full batch are in the next one.
      seed: of the order, the crops and the flips, from 0 to 2**32 - 1.
      size: height and width of the images that it gives.
      epochs: how many times all files are read; None for no end.
      corrupt: what a file that is no readable image does: ``"refuse"`` raises an error
        that names it, ``"skip"`` warns of it and goes on with the next one. Errors of
        the system, such as a missing file, are raised in any case, and so is one after
        as many corrupt files in a row as there are files.
      threads: files that are decoded at a time.

    Returns:
      An iterator of pairs: images, float32 of shape (batch_size, size, size, 3), about
      zero in mean and one in deviation, and labels, int32 of shape (batch_size,).

    Raises:
      ValueError: for a value outside its range; while it is read for a corrupt file.
      ImportError: without grain or Pillow.
    """
    grain = load_grain()
    checks.whole("seed", seed, 0, 2**32 - 1, static=True, cure="Give seed=0.")
    most, cure = len(images.files), "There are no more files: give fewer."
    checks.whole("batch_size", batch_size, 1, most, static=True, cure=cure)
    _check(size, corrupt, threads)
    if epochs is not None:
        cure = "Leave it out for no end."
        checks.whole("epochs", epochs, 1, static=True, cure=cure)

    skipped = _Skipped(images)

    def read(index: int, random: np.random.Generator) -> Any:
        crop = functools.partial(_random_crop, size=size, random=random)
        return _read(images, index, corrupt, crop, skipped)

    order = grain.MapDataset.range(len(images.files)).seed(seed).shuffle()
    data = order.repeat(epochs).random_map(read)
    return _batches(data, batch_size, threads, drop_remainder=True)


@checks.boundary("eval_batches")
def eval_batches(
    images: Images,
    batch_size: int,
    *,
    size: int = 224,
    corrupt: str = "refuse",
    threads: int = 16,
) -> Batches:
    """All images once, in their order: the shorter side to 8/7 of ``size``, the center.

    Args:
      images: the files, see :func:`find`.
      batch_size: images of a batch; the last one has what is left.
      size: height and width of the images that it gives.
      corrupt: as in :func:`train_batches`.
      threads: files that are decoded at a time.

    Returns:
      An iterator as that of :func:`train_batches`.

    Raises:
      ValueError: for a value outside its range; while it is read for a corrupt file.
      ImportError: without grain or Pillow.
    """
    grain = load_grain()
    cure = "Give 64, for instance."
    checks.whole("batch_size", batch_size, 1, static=True, cure=cure)
    _check(size, corrupt, threads)

    skipped = _Skipped(images)

    def read(index: int) -> Any:
        crop = functools.partial(_center_crop, size=size)
        return _read(images, index, corrupt, crop, skipped)

    data = grain.MapDataset.range(len(images.files)).map(read)
    return _batches(data, batch_size, threads, drop_remainder=False)


def load_grain() -> Any:
    """The package grain, which needs Pillow here; a clear error without."""
    try:
        import grain
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"imagenet: {error.name} is not installed. It needs grain and Pillow: "
            'pip install "sparse_optax[imagenet]".'
        ) from error
    return grain


def _check(size: int, corrupt: str, threads: int) -> None:
    checks.whole("size", size, 1, static=True, cure="Give 224, for instance.")
    checks.whole("threads", threads, 1, static=True, cure="Give 16, for instance.")
    cure = "'refuse' raises an error that names the file, 'skip' warns of it."
    checks.choice("corrupt", corrupt, ("refuse", "skip"), cure=cure)


def _batches(data: Any, batch_size: int, threads: int, drop_remainder: bool) -> Any:
    """Reads ahead in threads; what is None has been skipped."""
    grain = load_grain()
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    data = data.filter(lambda read: read is not None).to_iter_dataset(options)
    return iter(data.batch(batch_size, drop_remainder=drop_remainder))


class _Skipped:
    """How many files in a row have been skipped, by all threads."""

    def __init__(self, images: Images):
        self.most, self.count = len(images.files), 0


def _read(
    images: Images,
    index: int,
    corrupt: str,
    crop: Callable[[Any], Any],
    skipped: _Skipped,
) -> tuple[np.ndarray, np.ndarray] | None:
    """One image and its label; None for a file that is skipped."""
    from PIL import Image

    path = images.files[index]
    try:
        with Image.open(path) as opened:
            if opened.mode[0] in "IF":  # which `convert` would cut off at 255
                raise ValueError(f"its mode {opened.mode} has no 8 bits a channel")
            pixels = np.asarray(crop(opened.convert("RGB")), np.float32)
    # What Pillow raises for bytes that are no image, or not all of one.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        # A number comes from the system: the file is gone, a disk fails.
        if isinstance(error, OSError) and error.errno is not None:
            told = f"imagenet: {path} cannot be read ({error.strerror}). "
            cure = "Mend the file or its link, or remove it."
            raise type(error)(error.errno, told + cure) from None
        told = f"{path} is no readable image ({error})"
        if corrupt == "refuse":
            raise ValueError(
                f"imagenet: {told}. Replace or remove the file. Batches go on without "
                "such files where train_batches and eval_batches get corrupt='skip'."
            ) from error
        skipped.count += 1
        if skipped.count >= skipped.most:
            raise ValueError(
                f"imagenet: {told}, nor were the {skipped.most - 1} files before it. "
                "Give a folder with readable images."
            ) from error
        warnings.warn(f"imagenet: {told}; it is skipped.", stacklevel=1)
        return None
    skipped.count = 0
    pixels = (pixels / 255 - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return pixels, images.labels[index]


def _random_crop(image: Any, size: int, random: np.random.Generator) -> Any:
    """A random part of an image, at the size, mirrored in one of two cases."""
    from PIL import Image

    part = image.resize((size, size), Image.Resampling.BILINEAR, _box(image, random))
    if random.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return part


def _box(image: Any, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a random crop."""
    width, height = image.size
    for _ in range(_TRIES):
        area = width * height * random.uniform(*_AREA)
        low, high = map(math.log, _RATIO)
        ratio = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(random.integers(width - w + 1))
            top = int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    # An image that is much longer than wide: as much of its center as the ratios allow.
    w = max(1, min(width, round(height * _RATIO[1])))
    h = max(1, min(height, round(width / _RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _center_crop(image: Any, size: int) -> Any:
    """The center of an image whose shorter side is a little longer than the crop."""
    from PIL import Image

    # The part is resized, not the whole image, which may be much longer than wide.
    side = min(image.size) * size / round(size * _MARGIN)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box)
