"""The feature cache: the same images, in the same order, are passed through a frozen backbone once.

Features live in safetensors shards under `<cache>/features/<key>/`. The key is the SHA-256 of everything that
decides a feature's value: the backbone's weights and pooling, the preprocessing, the dtype, the versions of what
decodes and computes, a GPU's name, and the content of the samples in order. A shard appears under its name only when it
is whole, so a killed extraction goes on at the first missing shard; the batches inside a shard are always cut alike, so
it ends with the same bits. Each shard carries the fingerprint of its features, and one that is no longer what was
written is made anew.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.backbones.tensors import tensors_fingerprint
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.exact import exact_on
from headstart.trainer.files import ASK_OWNER, sweep, write_atomically
from headstart.trainer.inputs.batches import pixel_batches
from headstart.trainer.inputs.dataset import LabelledImages

Progress = Callable[[int, int], None]

BATCH_SIZE = 32
SHARD_SIZE = 256
DTYPE = "float32"
_AT_WORK = 3600.0
"""Seconds after which nobody is writing a shard any more."""
SCHEMA = 2
"""2: a dark PGM of 16 bits is decoded as such."""


@dataclass(frozen=True, kw_only=True)
class CachedFeatures:
    """The cached features of one data set under one backbone."""

    directory: Path
    """Where the shards and their manifest are."""
    num_samples: int
    num_features: int

    def tensor(self) -> Tensor:
        """Return all features [N, D] float32; with one shard, the file's own memory map."""
        shards = []
        for index in range(_num_shards(self.num_samples)):
            with self._open(index) as shard:
                shards.append(shard.get_tensor("features"))
        features = shards[0] if len(shards) == 1 else torch.cat(shards)
        if tuple(features.shape) != (self.num_samples, self.num_features):
            raise RunError(
                f"the cached features in {self.directory} are {list(features.shape)}, their manifest says "
                f"{[self.num_samples, self.num_features]}; delete that folder and run again"
            )
        return features

    def num_computed(self, tag: str) -> int:
        """Count the images that the extraction called `tag` passed through the backbone."""
        computed = 0
        for index in range(_num_shards(self.num_samples)):
            with self._open(index) as shard:
                if shard.metadata()["tag"] == tag:
                    computed += shard.get_slice("features").get_shape()[0]
        return computed

    def _open(self, index: int) -> Any:
        path = _shard(self.directory, index)
        try:
            return safe_open(path, framework="pt")
        except (FileNotFoundError, SafetensorError) as error:  # both sound a moment ago
            raise RunError(
                f"{path} was deleted or altered while this run used it ({error}); run the same command again: what "
                "is finished is kept"
            ) from error


def feature_key(backbone: Backbone, images: LabelledImages) -> str:
    """Return the SHA-256 that names the features of these samples, in this order, under this backbone."""
    return hashlib.sha256(_canonical(_identity(backbone, images)).encode()).hexdigest()


def extract_features(
    backbone: Backbone,
    images: LabelledImages,
    cache: Path,
    *,
    tag: str = "",
    progress: Progress | None = None,
) -> CachedFeatures:
    """Return the features of all `images`, passing through `backbone` only those that the cache lacks.

    On `backbone.device`, after which the module is on the CPU again.

    Example: `extract_features(backbone, images.subset(parts["train"]), cache).tensor()` is [N, D].

    `tag` is written into each shard made now, so that a run can tell its own work from what it found. Raises
    `SourceError` naming the first image with a NaN or infinite feature, and `RunError` when the disk or the GPU's
    memory is full; the shards that are whole stay.
    """
    directory = cache / "features" / feature_key(backbone, images)
    cached = CachedFeatures(directory=directory, num_samples=len(images), num_features=backbone.num_features)
    _prepare(directory, _identity(backbone, images))
    missing = [i for i in range(_num_shards(len(images))) if not _is_sound(_shard(directory, i))]
    rows = [np.arange(i * SHARD_SIZE, min((i + 1) * SHARD_SIZE, len(images))) for i in missing]
    batches = [part for shard in rows for part in np.split(shard, range(BATCH_SIZE, len(shard), BATCH_SIZE))]
    pixels = pixel_batches(images, batches, backbone.preprocess)
    done = len(images) - sum(map(len, rows))
    with contextlib.closing(pixels), _placed(backbone) as device:
        for index, shard in zip(missing, rows, strict=True):
            parts: list[Tensor] = []
            while sum(map(len, parts)) < len(shard):
                parts.append(backbone.features(next(pixels).to(device)).cpu())
                done += len(parts[-1])
                if progress is not None:
                    progress(done, len(images))
            _write_shard(directory, index, _finite(torch.cat(parts), shard[0], backbone, images), tag)
    return cached


@contextlib.contextmanager
def _placed(backbone: Backbone) -> Iterator[torch.device]:
    """The backbone's device, where float32 is exact and run after run gives the same bits; left as it was found."""
    device = backbone.device
    try:
        with exact_on(device, f"compute features under {backbone.name}"):
            yield device
    finally:
        if device.type != "cpu" and backbone.module is not None:
            backbone.module.cpu()
            torch.cuda.empty_cache()  # for those who fine-tune on it


def _identity(backbone: Backbone, images: LabelledImages) -> dict[str, object]:
    samples = hashlib.sha256("\n".join(images.digests).encode()).hexdigest()
    return {
        "schema": SCHEMA,
        "backbone": backbone.fingerprint,
        # Another decoder or another library of kernels rounds otherwise: one folder has features of one of each.
        "versions": {"pillow": PIL.__version__, **backbone.versions},
        "preprocessing": asdict(backbone.preprocessing),
        "dtype": DTYPE,
        "shard_size": SHARD_SIZE,
        "num_features": backbone.num_features,
        "num_samples": len(images),
        "samples": samples,
    }


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _num_shards(num_samples: int) -> int:
    return -(-num_samples // SHARD_SIZE)


def _shard(directory: Path, index: int) -> Path:
    return directory / f"{index:05d}.safetensors"


def _prepare(directory: Path, identity: dict[str, object]) -> None:
    """Make the folder, or refuse one whose manifest describes other features; tidy one that is there."""
    manifest = directory / "manifest.json"
    with contextlib.suppress(FileNotFoundError, ValueError):  # a damaged one is written anew: the key implies it
        try:
            found = json.loads(manifest.read_text())
        except PermissionError as error:
            raise RunError(
                f"cannot read features that are kept: {error}; {ASK_OWNER}. Or set HEADSTART_CACHE to another folder"
            ) from error
        if _canonical(found) != _canonical(identity):
            raise RunError(f"{manifest} describes other features than its name; delete {directory} and run again")
        sweep(directory, _AT_WORK)
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(manifest, json.dumps(identity, indent=1).encode())
    except OSError as error:
        raise _no_room(directory, error) from error


def _finite(features: Tensor, first: int, backbone: Backbone, images: LabelledImages) -> Tensor:
    finite = torch.isfinite(features).all(dim=1)
    if not bool(finite.all()):
        row = int(first) + int(torch.nonzero(~finite)[0])
        raise SourceError(
            f"source {backbone.name} gives NaN or infinite features for {int((~finite).sum())} images, the first is "
            f"number {row} ({images.storage.describe(row)}); look at that image, or leave the source out of `sources`"
        )
    return features


def _is_sound(path: Path) -> bool:
    """Say whether a shard is there and holds what was written; shards of earlier versions do not say what that was."""
    try:
        with safe_open(path, framework="pt") as shard:
            written = shard.metadata().get("features")
            return written is None or written == tensors_fingerprint({"features": shard.get_tensor("features")})
    except (FileNotFoundError, SafetensorError):
        return False


def _write_shard(directory: Path, index: int, features: Tensor, tag: str) -> None:
    tensors = {"features": features}
    content = save(tensors, metadata={"tag": tag, "features": tensors_fingerprint(tensors)})
    try:
        write_atomically(_shard(directory, index), content)
    except OSError as error:
        raise _no_room(directory, error) from error


def _no_room(directory: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write features under {directory}: {error}. Free space there, mend its permissions, or set "
        "HEADSTART_CACHE to another folder, and run the same command again: what is finished is kept"
    )
