"""A package: the folder of `model.onnx`, its external data and `manifest.json`, and what proves it.

The manifest lists the SHA-256 of every file beside it, and `verify` computes them anew: ONNX Runtime loads
external data whose recorded checksum is wrong. A package is written whole by `new_package` or not at all.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from headstart.serving.errors import PackageError, brief
from headstart.serving.manifest import MANIFEST, MEND, SCHEMA, Manifest, load_manifest

MODEL = "model.onnx"
SIGNATURE = "package.sig"  # covers the manifest and what it lists, which therefore cannot list it
_BLOCK = 1 << 20  # bytes


def verify(directory: Path) -> Manifest:
    """Check that a package is whole, unchanged and proven.

        manifest = verify(Path("runs/demo/package"))

    Raises:
        PackageError: a digest differs, a file is missing or not listed, a path leads out of the folder, the
            parity record does not hold, or `load_manifest` refuses.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    if problem := next(_inconsistencies(manifest), ""):
        raise PackageError(f"{directory / MANIFEST}: {problem}; {MEND}")
    present = set()
    for path in directory.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise PackageError(f"{path} is a link or not a plain file; a package holds plain files: copy it there")
        if path.is_file() and path not in (directory / MANIFEST, directory / SIGNATURE):
            present.add(path.relative_to(directory).as_posix())
    if missing := sorted(set(manifest.files) - present):
        raise PackageError(f"{directory} lacks {brief(', '.join(missing))}; copy the whole folder again, or {MEND}")
    if extra := sorted(present - set(manifest.files)):
        raise PackageError(
            f"{directory} holds {brief(', '.join(extra))}, which its manifest does not list; take it out"
        )
    for name, expected in manifest.files.items():
        found = digest(directory / name)
        if found != expected:
            raise PackageError(
                f"{directory / name} was changed: SHA-256 {found}, the manifest has {brief(expected)}; "
                f"copy the package again, or {MEND}"
            )
    if named := _named(directory / MODEL):
        raise PackageError(
            f"{directory / MODEL} names {named}, which no digest covers: weights there could be changed; {MEND}"
        )
    return manifest


def _inconsistencies(manifest: Manifest) -> Iterator[str]:
    """What a manifest says that cannot be."""
    if manifest.schema < 1:
        yield f"schema is {manifest.schema}, this version reads {SCHEMA}"
    if not 0 < manifest.temperature < math.inf:
        yield f"temperature is {manifest.temperature}, a number above 0 is accepted"
    if not manifest.labels or len(set(manifest.labels)) != len(manifest.labels):
        yield f"labels {brief(repr(list(manifest.labels)))} are not distinct names"
    if MODEL not in manifest.files:
        yield f"files does not list {MODEL}"
    for name in manifest.files:
        plain = PurePosixPath(name)
        if plain.is_absolute() or ".." in plain.parts or plain.as_posix() != name or "\\" in name:
            yield f"the file {brief(repr(name))} leads out of the package; a path inside the folder is accepted"
    if failure := manifest.variant.failure():
        yield f"the variant does not hold: {failure}"
    if failure := manifest.drift.failure() if manifest.drift else "":
        yield f"the drift record does not hold: {failure}"
    if failure := manifest.latency.failure() if manifest.latency else "":
        yield f"the latency record does not hold: {failure}"
    for parity in (manifest.parity, *manifest.provider_parity):
        if failure := parity.failure():
            yield f"the parity on {brief(parity.provider)} does not hold: {failure}"


def _named(model: Path) -> str:
    """The file beside a graph that no digest covers and that the graph names, as the place of its weights; or nothing.

    Every name is in the graph's file as it is written, and no other part of a graph is called so: no need of onnx.
    """
    before = b""
    with model.open("rb") as file:
        while block := file.read(_BLOCK):
            both = before + block
            for name in (MANIFEST, SIGNATURE):
                if name.encode() in both:
                    return name
            before = both[-len(MANIFEST) :]
    return ""


def digest(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_package(directory: Path) -> Iterator[Path]:
    """A folder to build a package in, which takes the place of `directory` when the block ends well.

        with new_package(Path("runs/demo/package")) as folder:
            ...  # write model.onnx and manifest.json into it

    The folder is a hidden sibling. At the end it is verified and synced to the disk, then renamed. When the
    block raises, it is removed and an earlier package stays; what a killed process left is put right by the
    next call.

    Raises:
        PackageError: `directory` is a file or a folder of something else, or the new package does not verify.
    """
    directory = Path(directory).absolute()
    building = directory.with_name(f".{directory.name}.partial")
    earlier = directory.with_name(f".{directory.name}.earlier")
    if earlier.exists() and not directory.exists():  # killed between the two renames below
        earlier.rename(directory)
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and not _is_package(directory)):
        raise PackageError(f"{directory} exists and is not a package; name another folder or move it away")
    for leftover in (building, earlier):
        if leftover.exists():
            shutil.rmtree(leftover)
    building.mkdir(parents=True)
    try:
        yield building
        verify(building)
        _sync(building)
        if directory.exists():
            directory.rename(earlier)
        building.rename(directory)
        _sync_path(directory.parent)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        if earlier.exists() and not directory.exists():
            earlier.rename(directory)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _is_package(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
