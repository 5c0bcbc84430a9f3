"""Labelled images: what every reader gives and every later stage takes.

    images = load_images(recipe.data, cache)
    images.image(0)                      # uint8 [H, W, 3]
    images.subset(parts["train"])        # the same, fewer

Pixels stay where they are, in files or in memory, until `image` asks for one; labels and content digests are
at hand.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.images import Pixels, is_grey, read_image

PARTS = ("train", "validation", "test")
# Every spelling under which a data set's own parts are found; in a folder the names count only above class
# folders.
PART_NAMES = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
# Of what Python calls not printable, what words and emoji are written with: the joiners of Persian, Indian scripts and
# families, and the space of Chinese and Japanese.
_WRITTEN = dict.fromkeys(map(ord, "\u200c\u200d\u3000"))


class Storage(Protocol):
    """Where the pixels are."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Pixels:
        """Return sample i as uint8 [H, W, 3]."""

    def take(self, indices: npt.NDArray[np.int64]) -> "Storage":
        """Return a storage of these samples, in this order."""

    def describe(self, i: int) -> str:
        """Say where sample i is from, for a message."""


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk, known by the SHA-256 of their bytes."""

    paths: tuple[str, ...]
    """Absolute paths."""
    digests: tuple[str, ...]
    """SHA-256 of each file's bytes when it was checked."""

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> Pixels:
        """Read and decode file i, uint8 [H, W, 3].

        Raises DataError when the bytes are no longer those that were checked: features are kept under the
        digest, so other pixels under the same digest would poison the feature cache. Hashing costs a few
        percent of decoding.
        """
        path = self.paths[i]
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path} was there when it was checked and cannot be read now: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != self.digests[i]:
            raise DataError(f"{path} has changed since it was checked; run the same command again to take it up")
        return read_image(content, name=path)

    def describe(self, i: int) -> str:
        """Return the path of file i."""
        return self.paths[i]

    def take(self, indices: npt.NDArray[np.int64]) -> "ImageFiles":
        """Return these files only."""
        return ImageFiles(tuple(self.paths[i] for i in indices), tuple(self.digests[i] for i in indices))


@dataclass(frozen=True, eq=False)
class ImageArrays:
    """Images in memory. Grey ones stay one channel here and become RGB when asked for."""

    arrays: Pixels | tuple[Pixels, ...]
    """uint8 [N, H, W], uint8 [N, H, W, 3], or a tuple of [H, W] and [H, W, 3] of mixed sizes."""

    def __len__(self) -> int:
        return len(self.arrays)

    def image(self, i: int) -> Pixels:
        """Return sample i as a writable copy, uint8 [H, W, 3]."""
        # A copy, because arrays that came through Ray's object store are read-only and torch warns of those.
        array = self.arrays[i]
        return np.repeat(array[:, :, None], 3, axis=2) if array.ndim == 2 else array.copy()

    def describe(self, i: int) -> str:
        """Return the number of sample i and its size."""
        return f"sample {i} in memory, {'x'.join(map(str, self.arrays[i].shape))}"

    def take(self, indices: npt.NDArray[np.int64]) -> "ImageArrays":
        """Return these arrays only, copied, so that a small subset is small when it is pickled."""
        if isinstance(self.arrays, tuple):
            return ImageArrays(tuple(self.arrays[i] for i in indices))
        return ImageArrays(self.arrays[indices])

    def digests(self) -> tuple[str, ...]:
        """Return the SHA-256 of each array's shape and bytes."""
        return tuple(hashlib.sha256(f"{a.shape}".encode() + a.tobytes()).hexdigest() for a in self.arrays)

    def grey(self) -> npt.NDArray[np.bool_]:
        """Return bool [N]: is R = G = B everywhere in the sample?"""
        return np.array([array.ndim == 2 or is_grey(array) for array in self.arrays], dtype=np.bool_)


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """N images with one label each; picklable, so that it can be sent to other processes."""

    classes: tuple[str, ...]
    """Names of the classes in natural order; a label is an index into it."""
    labels: npt.NDArray[np.int64]
    """int64 [N], 0 up to C - 1."""
    digests: tuple[str, ...]
    """SHA-256 of each sample's stored content: a file's bytes, or an array's shape and bytes."""
    storage: Storage
    """Where the pixels are."""
    grey: npt.NDArray[np.bool_]
    """bool [N]: R = G = B everywhere in the sample."""
    parts: Mapping[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    """Sorted indices of the parts that the data brings: some of train, validation, test, or none."""
    skipped: tuple[str, ...] = ()
    """Unreadable files that were left out because the recipe allows it."""

    def __post_init__(self) -> None:
        sizes = {len(self.labels), len(self.digests), len(self.storage), len(self.grey)}
        if len(sizes) != 1:
            raise ValueError(f"labels, digests, storage and grey have different lengths: {sorted(sizes)}")
        if self.labels.dtype != np.int64 or self.labels.ndim != 1:
            raise ValueError(f"labels are {self.labels.dtype} {self.labels.shape}; accepted: int64 [N]")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(f"labels reach from {self.labels.min()} to {self.labels.max()}; accepted: 0 up to C - 1")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Pixels:
        """Return sample i as uint8 [H, W, 3]; raises DataError when its file is gone or has changed."""
        return self.storage.image(int(i))

    def subset(self, indices: npt.ArrayLike) -> "LabelledImages":
        """Return the samples at these indices, in this order, with the same classes and without parts."""
        chosen = np.asarray(indices, dtype=np.int64)
        return LabelledImages(
            classes=self.classes,
            labels=self.labels[chosen],
            digests=tuple(self.digests[i] for i in chosen),
            storage=self.storage.take(chosen),
            grey=self.grey[chosen],
        )

    @property
    def is_grey(self) -> bool:
        """Is every sample grey at its source?"""
        return bool(self.grey.all())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over classes, labels and digests in order; where the pixels are stored does not enter."""
        content = json.dumps([self.classes, self.labels.tolist(), self.digests])
        return hashlib.sha256(content.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a reader found before any image was opened: files, their class names and, perhaps, their parts."""

    origin: str
    """What the user called the data, for messages."""
    paths: tuple[str, ...]
    """Absolute path of each sample."""
    names: tuple[str, ...]
    """Class name of each sample."""
    parts: tuple[str, ...] = ()
    """Part of each sample, or empty when the data brings no parts."""


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names without repeats as a reader would: 2 before 10, 'class 9' before 'class 10', -1 before 1."""

    def key(name: str) -> tuple[Any, ...]:
        if re.fullmatch(r"-?[0-9]+", name):
            return (0, int(name), name)
        chunks = re.split(r"([0-9]+)", name)  # text and digits in turn, beginning with text
        return (1, [int(chunk) if i % 2 else chunk for i, chunk in enumerate(chunks)], name)

    return tuple(sorted(set(names), key=key))


def label_images(
    storage: Storage,
    names: Sequence[str],
    *,
    origin: str,
    digests: tuple[str, ...],
    grey: npt.NDArray[np.bool_],
    parts: Sequence[str] = (),
    skipped: tuple[str, ...] = (),
) -> LabelledImages:
    """Number the classes of N named samples and gather them.

    Raises DataError for no image at all, for one class only, for class names that are not UTF-8, not to be seen
    or the same but for their Unicode form, and for parts without training images of every class.
    """
    classes = natural_order(names)
    if not names:
        raise DataError(f"{origin} holds no images; at least two classes with images are needed")
    if len(classes) == 1:
        raise DataError(
            f"{origin} has one class only, {classes[0]!r}; two are needed at least. A folder needs one "
            "sub-folder per class: if the classes lie deeper, point data.path at the folder just above them"
        )
    illegible = [ascii(name) for name in classes if re.search("[\ud800-\udfff]", name)]  # a folder's undecoded bytes
    if illegible:
        raise DataError(
            f"{origin} has classes whose names are not UTF-8: {some(illegible)}; rename their folders, which no card, "
            "manifest or picture could name"
        )
    unseen = [repr(name) for name in classes if not name.translate(_WRITTEN).isprintable()]
    if unseen:
        raise DataError(
            f"{origin} has classes with characters in their names that nobody can see, such as line breaks: "
            f"{some(unseen)}; rename them"
        )
    alike: dict[str, list[str]] = {}
    for name in classes:
        alike.setdefault(unicodedata.normalize("NFC", name), []).append(name)
    twice = [" and ".join(map(ascii, same)) for same in alike.values() if len(same) > 1]
    if twice:
        raise DataError(
            f"{origin} has classes whose names look the same and differ in their Unicode form, as archives of macOS "
            f"bring them: {some(twice)}; rename one to the other where they are one class"
        )
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[name] for name in names], dtype=np.int64)
    indices = {part: np.flatnonzero(np.array(parts) == part) for part in PARTS if part in parts}
    if indices:
        trained = labels[indices["train"]] if "train" in indices else labels[:0]
        untrained = [classes[i] for i in np.setdiff1d(np.arange(len(classes)), trained)]
        if untrained:
            raise DataError(
                f"{origin} brings its own parts, and these classes have no image in train: {some(untrained)}"
                "; add training images of them or remove them from the other parts"
            )
    return LabelledImages(classes, labels, digests, storage, grey, indices, skipped)


def some(items: Sequence[str], most: int = 10) -> str:
    """Join the first of many for a message, with the count of all where some are left out."""
    shown = ", ".join(items[:most])
    return shown if len(items) <= most else f"{shown}, ... ({len(items):,} in all)"


def lines(messages: list[str], most: int = 10) -> str:
    """Put the first of many messages on lines of their own."""
    left_out = [f"... and {len(messages) - most:,} more"] if len(messages) > most else []
    return "".join(f"\n  {message}" for message in messages[:most] + left_out)
