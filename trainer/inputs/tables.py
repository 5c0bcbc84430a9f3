"""Labelled images from one file, which lists them (.csv) or holds them (.npz)."""

import csv
import zipfile
import zlib
from pathlib import Path

import numpy as np

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.dataset import (
    PART_NAMES,
    ImageArrays,
    LabelledImages,
    Listing,
    label_images,
    lines,
    some,
)


def read_csv(path: Path) -> Listing:
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
            f"{path}: {len(wrong):,} of {len(table):,} rows cannot be used:{lines(wrong)}\n"
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
    part = "" if split is None else PART_NAMES.get(split.strip().lower())
    if not image or not name:
        raise ValueError("has no label" if image else "has no path")
    if part is None:
        raise ValueError(f"has the split {split!r}")
    if not (folder / image).is_file():
        raise ValueError(f"names {image}, which is not there")
    return folder / image, name, part


def read_npz(path: Path) -> LabelledImages:
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
    if unknown := sorted(set(names) - PART_NAMES.keys()):
        raise DataError(f"{path}: split has {some([repr(name) for name in unknown])}; {accepted}")
    return [PART_NAMES[name] for name in names]
