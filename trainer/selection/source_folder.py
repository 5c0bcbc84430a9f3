"""The `source/` folder of a run: what the next run needs to start from it.

`card.yaml`, `weights.safetensors` (tensors `backbone.*` and `head.*`), `sketch.safetensors`, `seen.bin`: the images
that it and the sources before it learned from, 16 bytes each, and `graph.onnx` where the backbone is a graph that
cannot be fetched. The card is written last, so a folder with a card is whole.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from headstart.trainer.backbones.card import SourceCard, card_from_yaml, card_to_yaml
from headstart.trainer.backbones.weights import fetch_weights, file_sha256
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.files import ASK_OWNER, is_there, write_atomically

CARD = "card.yaml"
WEIGHTS = "weights.safetensors"
GRAPH = "graph.onnx"
SKETCH = "sketch.safetensors"
SEEN = "seen.bin"
ID_BYTES = 16
MAX_SKETCH = 1000
SKETCH_PRECISION = "float32"


@dataclass(frozen=True, kw_only=True, eq=False)
class Sketch:
    """The stored sample of a task's features under a probe backbone; distances between tasks are taken on
    it."""

    features: Tensor
    """[n, D] float32, n at most 1000."""
    labels: Tensor
    """[n] int64."""
    mean: Tensor
    """[D] float32, of the sample."""
    probe: str
    """Fingerprint of the probe backbone; sketches of different probes cannot be compared."""
    precision: str = SKETCH_PRECISION
    """Of the products that self terms were computed with."""
    centre: str = "origin"
    """The point that the features are stored relative to."""

    def __post_init__(self) -> None:
        num_rows, num_features = self.features.shape if self.features.ndim == 2 else (0, 0)
        if not 1 <= num_rows <= MAX_SKETCH or self.features.dtype != torch.float32:
            raise ValueError(
                f"features are {self.features.dtype} {list(self.features.shape)}; accepted: float32 [n, D], "
                f"n from 1 to {MAX_SKETCH}"
            )
        if self.labels.shape != (num_rows,) or self.labels.dtype != torch.int64:
            raise ValueError(f"labels are {self.labels.dtype} {list(self.labels.shape)}; accepted: int64 [{num_rows}]")
        if self.mean.shape != (num_features,) or self.mean.dtype != torch.float32:
            raise ValueError(f"mean is {self.mean.dtype} {list(self.mean.shape)}; accepted: float32 [{num_features}]")


def write_source(
    directory: Path,
    card: SourceCard,
    backbone_state: Mapping[str, Tensor] | None,
    head_state: Mapping[str, Tensor],
    sketch: Sketch,
    *,
    seen: Set[bytes] = frozenset(),
    graph: Path | None = None,
) -> SourceCard:
    """Write a run's `source/` folder and return the card as written.

    `seen` has the `image_id` of all that it learned from; empty where that is not known.

    With a `backbone_state` the card's weights become the file beside it; without one, for a source that is a
    graph, that file holds the head alone. The card keeps saying where the graph comes from, or is given a copy of
    the file `graph`, which has the card's digest and could not be found from elsewhere. Raises `RunError` when the
    disk cannot take it.
    """
    backbone = {f"backbone.{name}": tensor for name, tensor in (backbone_state or {}).items()}
    tensors = backbone | {f"head.{name}": tensor for name, tensor in head_state.items()}
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    columns = {"features": sketch.features, "labels": sketch.labels, "mean": sketch.mean}
    columns = {name: column.detach().cpu().contiguous() for name, column in columns.items()}
    metadata = {"probe": sketch.probe, "precision": sketch.precision, "centre": sketch.centre}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CARD).unlink(missing_ok=True)  # of an earlier one: with its card a folder is whole
        write_atomically(directory / WEIGHTS, save(own))
        write_atomically(directory / SKETCH, save(columns, metadata))
        if seen:
            content = b"".join(sorted(seen))
            write_atomically(directory / SEEN, content)
            card = dataclasses.replace(card, seen_sha256=hashlib.sha256(content).hexdigest())
        if backbone_state is not None:
            card = dataclasses.replace(card, weights=WEIGHTS, sha256=file_sha256(directory / WEIGHTS))
        if graph is not None:
            write_atomically(directory / GRAPH, graph.read_bytes())
            card = dataclasses.replace(card, weights=GRAPH)
        write_atomically(directory / CARD, card_to_yaml(card).encode())
    except OSError as error:
        raise RunError(f"cannot write {directory}: {error}; free space there and run the same command again") from error
    return card


def read_card(directory: Path) -> SourceCard:
    """Return the card of a source folder; raises `SourceError` where there is none that can be read."""
    path = directory / CARD
    if not is_there(path):
        raise SourceError(f"{directory} has no {CARD}; name the source/ folder of a finished run, or the run's own")
    try:
        return card_from_yaml(path.read_text(encoding="utf-8"), path)
    except PermissionError as error:
        raise SourceError(f"the source card {path} cannot be read: {error}; {ASK_OWNER}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"the source card {path} cannot be read: {error}; remove {directory} and run its recipe again"
        ) from error


def read_head(directory: Path) -> dict[str, Tensor]:
    """Return the head's tensors, without the prefix `head.`; a weights file of another digest is refused."""
    card = read_card(directory)
    if card.weights == WEIGHTS:
        fetch_weights(card.weights, card.sha256, directory, base=directory)
    tensors = load_file(directory / WEIGHTS)
    return {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}


def image_id(digest: str) -> bytes:
    """Return what `seen.bin` knows an image by: the first 16 bytes of the SHA-256 of its content."""
    return bytes.fromhex(digest)[:ID_BYTES]


def read_seen(directory: Path, card: SourceCard) -> frozenset[bytes] | None:
    """Return the `image_id` of all that a source and those before it learned from, None where that is not known.

    Raises `SourceError` for a file that is not the one on the card.
    """
    if not card.seen_sha256:
        return None
    path = directory / SEEN
    try:
        content = path.read_bytes()
    except PermissionError as error:
        raise SourceError(f"{path} cannot be read: {error}; {ASK_OWNER}") from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}; run its recipe again with --fresh") from error
    if hashlib.sha256(content).hexdigest() != card.seen_sha256:
        raise SourceError(f"{path} is not the file that its card names; run its recipe again with --fresh")
    return frozenset(content[start : start + ID_BYTES] for start in range(0, len(content), ID_BYTES))


def read_sketch(directory: Path, *, probe: str = "") -> Sketch | None:
    """Return the sketch of a source folder, None where it has none.

    Raises `SourceError` where the sketch is damaged, may not be read, or was made under another probe than the
    fingerprint `probe`, if one is given.
    """
    path = directory / SKETCH
    if not is_there(path):
        return None
    try:
        with path.open("rb"):  # safetensors says of one that may not be read that it is not there
            pass
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
        sketch = Sketch(
            features=tensors["features"],
            labels=tensors["labels"],
            mean=tensors["mean"],
            probe=metadata["probe"],
            precision=metadata["precision"],
            centre=metadata["centre"],
        )
    except PermissionError as error:
        raise SourceError(f"{path} cannot be read: {error}; {ASK_OWNER}") from error
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SourceError(f"{path} is no sketch ({error}); run its recipe again with --fresh") from error
    if probe and sketch.probe != probe:
        raise SourceError(
            f"{path} was made under probe {sketch.probe[:16]}, this run's is {probe[:16]}: distances between "
            "the two mean nothing; run its recipe again with --fresh"
        )
    return sketch
