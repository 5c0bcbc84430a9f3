"""Cards of what a recipe names without one: torchvision:ARCH, file:PATH#ARCH and onnx:PATH#TENSOR."""

import re
from collections.abc import Mapping
from pathlib import Path

from headstart.trainer.backbones.architectures import find_architecture
from headstart.trainer.backbones.card import LICENCE_NOT_STATED, SourceCard
from headstart.trainer.backbones.weights import file_sha256
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.preprocessing import Preprocessing

SPEC_KINDS = ("torchvision", "file", "onnx")


def card_from_spec(spec: str, packaged: Mapping[str, SourceCard]) -> SourceCard:
    """Return the card of a spec of one of the three kinds in `SPEC_KINDS`.

    `packaged` are the cards that come with Headstart, whose architectures are given their preprocessing. Raises
    `SourceError` for an architecture or a file that is not there.
    """
    kind = spec.partition(":")[0]
    if kind == "torchvision":
        return _torchvision_card(spec)
    return _file_card(spec, packaged) if kind == "file" else _onnx_card(spec)


def _torchvision_card(spec: str) -> SourceCard:
    import torchvision

    architecture = find_architecture(spec)
    weights = torchvision.models.get_model_weights(spec.removeprefix("torchvision:")).DEFAULT
    transforms = weights.transforms()
    published = re.search(r"-([0-9a-f]{8,})\.\w+$", weights.url)
    if published is None:
        raise SourceError(f"{weights.url} publishes no digest; download it yourself and name file:PATH#{spec}")
    return SourceCard(
        name=_file_safe(spec),
        task="ImageNet, 1,000 classes of photographs",
        architecture=architecture.name,
        weights=f"torchvision:{weights}",
        sha256=published[1],
        licence=weights.meta.get("license", "BSD-3-Clause"),
        preprocessing=Preprocessing(
            resize=transforms.resize_size[0],
            crop=transforms.crop_size[0],
            mean=transforms.mean,
            std=transforms.std,
        ),
    )


def _file_card(spec: str, packaged: Mapping[str, SourceCard]) -> SourceCard:
    path, _, name = spec.removeprefix("file:").rpartition("#")
    if not path:
        raise SourceError(f"{spec} does not name its architecture; accepted: file:PATH#ARCH, such as {spec}#resnet50")
    architecture = find_architecture(name if ":" in name else f"torchvision:{name}")
    preprocessing = architecture.preprocessing
    for card in packaged.values():  # a packaged architecture has the constants of its own card
        if card.architecture == architecture.name and card.architecture.startswith("headstart:"):
            preprocessing = card.preprocessing
    return _user_card(spec, Path(path), architecture.name, preprocessing)


def _onnx_card(spec: str) -> SourceCard:
    path, _, tensor = spec.removeprefix("onnx:").partition("#")
    preprocessing = find_architecture("torchvision:resnet50").preprocessing
    return _user_card(spec, Path(path), f"onnx:{tensor}", preprocessing, suffix=f"#{tensor}")


def _user_card(
    spec: str, path: Path, architecture: str, preprocessing: Preprocessing, *, suffix: str = ""
) -> SourceCard:
    path = path.expanduser().resolve()
    sha256 = file_sha256(path)
    return SourceCard(
        name=_file_safe(f"{path.stem}-{sha256[:8]}{suffix}"),
        task=f"your own weights, {path.name}",
        architecture=architecture,
        weights=f"file:{path}",
        sha256=sha256,
        licence=LICENCE_NOT_STATED,
        preprocessing=preprocessing,
    )


def _file_safe(spec: str) -> str:
    """Return a name for files and tables."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", spec).strip(".-")[-200:]
