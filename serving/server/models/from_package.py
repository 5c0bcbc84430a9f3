"""From a package's folder to a model: copied, verified and loaded, so that what was verified is what runs."""

import hashlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.serving.device import Device, open_on
from headstart.serving.errors import PackageError, brief
from headstart.serving.manifest import MANIFEST, Manifest, Tensor, load_manifest
from headstart.serving.ort import onnxruntime
from headstart.serving.package import MODEL, SIGNATURE, verify
from headstart.serving.runtime import CPU, OUTPUTS
from headstart.serving.server.models.bound import buckets
from headstart.serving.server.models.drift import DriftGauge
from headstart.serving.server.models.model import LoadedModel, WatchedModel, tensors
from headstart.serving.server.scratch import Scratch, check_room
from headstart.serving.signing import verify_signature

_LOG = logging.getLogger(__name__)


def load_package(
    source: Path,
    *,
    name: str,
    version: str,
    device: Device,
    max_batch: int | None = None,
    public_key: Path | None = None,
    drift: float = 0.0,
) -> LoadedModel:
    """Load a package from a private copy of its folder, so that what was verified is what runs.

    ONNX Runtime 1.31 maps external data into memory: a folder that is written over would change a model that serves
    from it, and one that is cut off ends the process (SIGBUS; a test holds it). The copy lies in the temporary folder
    and is deleted when the session exists, which keeps what it has mapped.

    Args:
        source: a folder with a package, or with part of one.
        max_batch: rows of one run; None, and at most, the largest batch whose parity is proven.
        public_key: PEM of the key that must have signed the package; None asks for no signature.
        drift: share of executions for the drift gauge, where the package has what that needs.

    Raises:
        PackageError: the folder is not a whole, proven and signed package, or its graph is not what its manifest says.
    """
    try:
        with Scratch() as scratch:
            folder = scratch.path
            _copy(source, folder)
            try:
                manifest = verify(folder)
                if public_key is not None:
                    verify_signature(folder, public_key)
                with device.ending():
                    return _open(folder, manifest, name, version, device, max_batch, drift)
            except PackageError as error:  # about the folder that the operator knows
                raise PackageError(str(error).replace(str(folder), str(source))) from error
    except OSError as error:
        raise PackageError(
            f"{source} cannot be copied: {error.strerror or error}; free space or grant access"
        ) from error


def _open(
    folder: Path, manifest: Manifest, name: str, version: str, device: Device, max_batch: int | None, drift: float
) -> LoadedModel:
    """A verified package's graph in a session, once it is what the manifest says."""
    key = hashlib.sha256(repr(sorted(manifest.files.items())).encode()).hexdigest()[:32]
    session = open_on(device, folder / MODEL, key=key)
    proven = max(row.batch for row in manifest.parity.rows)
    largest = min(proven, max_batch or proven)
    if device.provider not in manifest.proven_on:
        proven_on = ", ".join(manifest.proven_on)
        _LOG.warning("%s version %s runs on %s and was proven on %s alone", name, version, device.provider, proven_on)
    found, stated = _signature(session), (manifest.inputs, manifest.outputs)
    if found != stated:
        raise PackageError(
            f"{folder}: its graph has {_names(found)}, its manifest says {_names(stated)}; "
            "export the run again: headstart export RUN"
        )
    columns = {one.shape[-1] for one in manifest.outputs if one.name in OUTPUTS and isinstance(one.shape[-1], int)}
    if columns - {len(manifest.labels)}:
        raise PackageError(
            f"{folder}: its outputs have {max(columns)} columns for {len(manifest.labels)} labels; "
            "export the run again: headstart export RUN"
        )
    settings: dict[str, Any] = {
        "name": name,
        "version": version,
        "session": session,
        "max_batch": largest,
        "manifest": manifest,
        "buckets": buckets(largest) if device.provider != CPU else (),
        "memory": device.memory,
        "thread": device.thread,
    }
    if manifest.drift and drift:
        return WatchedModel(**settings, gauge=DriftGauge(manifest.drift, drift))
    if drift:
        _LOG.warning("%s version %s has no record of drift, so it has no gauge; export its run again", name, version)
    return LoadedModel(**settings)


def _copy(source: Path, target: Path) -> None:
    """Copy the files that a manifest lists; refuse a folder that holds others, or lacks some, before that."""
    manifest = load_manifest(source)
    present = set()
    for path in source.rglob("*"):
        if path.is_symlink():
            raise PackageError(f"{path.relative_to(source)} is a link; a package holds plain files: copy it there")
        if path.is_file():
            present.add(path.relative_to(source).as_posix())
    listed = {*manifest.files, MANIFEST}
    if missing := sorted(listed - present):
        raise PackageError(f"it lacks {brief(', '.join(missing))}; copy the whole folder")
    if extra := sorted(present - listed - {SIGNATURE}):
        raise PackageError(f"it holds {brief(', '.join(extra))}, which its manifest does not list; take it out")
    copied = listed | (present & {SIGNATURE})
    check_room(target, sum((source / name).lstat().st_size for name in copied))
    for name in copied:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name, follow_symlinks=False)  # one made since is refused by `verify`


def _signature(session: onnxruntime.InferenceSession) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    return tensors(session.get_inputs()), tensors(session.get_outputs())


def _names(sides: tuple[Sequence[Tensor], Sequence[Tensor]]) -> str:
    return brief(" -> ".join(", ".join(f"{one.name} {one.dtype} {list(one.shape)}" for one in side) for side in sides))
