"""Which source tasks there are: the catalog, the registry of finished runs, and what a recipe names.

    for candidate in resolve("all", cache):
        backbone = candidate.load(cache)  # SourceError: not available here, and what would make it so

The registry is the folder `<cache>/sources/`; NAME there is a copy of a run's `source/` folder.
"""

import contextlib
import difflib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from headstart.trainer.backbones.backbone import Backbone, load_backbone
from headstart.trainer.backbones.card import SourceCard, card_from_yaml, card_to_yaml
from headstart.trainer.backbones.tensors import tensors_fingerprint
from headstart.trainer.errors import RunError, SourceError
from headstart.trainer.files import ASK_OWNER, is_there
from headstart.trainer.inputs.dataset import some
from headstart.trainer.selection.source_folder import (
    CARD,
    SKETCH_PRECISION,
    Sketch,
    image_id,
    read_card,
    read_seen,
    read_sketch,
    write_source,
)
from headstart.trainer.selection.spec_cards import SPEC_KINDS, card_from_spec

__all__ = [
    "SKETCH_PRECISION",
    "Candidate",
    "Sketch",
    "SourceCard",
    "catalog",
    "find_source",
    "image_id",
    "registered",
    "registered_card",
    "resolve",
    "same_data",
    "survey",
    "write_source",
]

_REPLACED = "another run was registered under its name meanwhile; run the same command again"
_SPECS = "torchvision:ARCH, file:PATH#ARCH, onnx:PATH, source:PATH"


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A source task that a run may start from."""

    card: SourceCard
    base: Path | None = None
    """The folder of the card, with its weights and sketch; None for cards without one."""
    unreachable: set[str] = field(default_factory=set, repr=False)
    """Hosts that did not answer; shared by the candidates of one `resolve`, so that none is waited for
    twice."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the card, which has the weights' digest in it, and the sketch."""
        card, sketch = card_to_yaml(self.card), self.sketch()
        if sketch is None:
            return tensors_fingerprint({}, card)
        # Not the file's bytes: safetensors writes its metadata in an order of the moment.
        tensors = {"features": sketch.features, "labels": sketch.labels, "mean": sketch.mean}
        return tensors_fingerprint(tensors, card, sketch.probe, sketch.precision, sketch.centre)

    def load(self, cache: Path, *, progress: Callable[[int, int], None] | None = None) -> Backbone:
        """Return the backbone; raises `SourceError` with the reason and what would make it available."""
        try:
            return load_backbone(self.card, cache, base=self.base, unreachable=self.unreachable, progress=progress)
        except SourceError as error:
            reason = _REPLACED if self._is_replaced() else error
            raise SourceError(f"source {self.card.name} cannot be used: {reason}") from error

    def _is_replaced(self) -> bool:
        """Whether the folder has another card by now, so that its weights are not those of this one."""
        with contextlib.suppress(SourceError):
            return self.base is not None and read_card(self.base) != self.card
        return False

    def sketch(self) -> Sketch | None:
        """Return the task's sketch, under whichever probe it was made; None where it has none."""
        return read_sketch(self.base) if self.base is not None else None

    def seen(self) -> frozenset[bytes] | None:
        """Return the `image_id` of all that it learned from; None where that is not known, as of others' models."""
        return read_seen(self.base, self.card) if self.base is not None else None


def catalog() -> dict[str, SourceCard]:
    """Return the cards that come with Headstart, by name."""
    found = sorted(files("headstart.trainer.catalog").iterdir(), key=lambda entry: entry.name)
    cards = [card_from_yaml(entry.read_text(), entry.name) for entry in found if entry.name.endswith(".yaml")]
    return {card.name: card for card in cards}


def registered(cache: Path) -> dict[str, Path]:
    """Return the folders of the finished runs in `cache`, by name; what is in them has not been read.

    With those that this user may not read: no glob, which would leave out such a one and all that come after it.
    """
    folder = cache / "sources"
    try:
        entries = sorted(folder.iterdir()) if is_there(folder) else []
    except OSError as error:
        raise RunError(f"cannot list the sources in {folder}: {error}; {ASK_OWNER}") from error
    return {path.name: path for path in entries if not path.name.startswith(".") and is_there(path / CARD)}


def resolve(sources: Literal["all"] | tuple[str, ...], cache: Path) -> list[Candidate]:
    """Return the candidates of a recipe's `sources`, none of them loaded; `survey` has the rules."""
    return survey(sources, cache)[0]


def survey(
    sources: Literal["all"] | tuple[str, ...], cache: Path, *, exclude_data: str = "", judged_on: Collection[str] = ()
) -> tuple[list[Candidate], dict[str, str]]:
    """Return the candidates of a recipe's `sources`, none of them loaded, and by name why others are passed over.

    `all` is the catalog and the registry without sources made from the data with fingerprint `exclude_data`,
    which would meet their own images again; damaged ones are passed over, and those that learned from images of
    the digests `judged_on`. Naming one of these is a `SourceError`, as are unknown names and paths, and two sources
    of one name, whose heads a run would confuse.
    """
    unreachable: set[str] = set()
    if sources == "all":
        found = [Candidate(card=card, unreachable=unreachable) for card in catalog().values()]
        passed_over: dict[str, str] = {}
        for name, folder in registered(cache).items():
            try:
                candidate = Candidate(card=registered_card(folder), base=folder, unreachable=unreachable)
                if same_data(candidate.card, exclude_data):
                    continue
                candidate.sketch()  # a damaged one is told here
                if leak := _leak(candidate, judged_on):
                    passed_over[name] = f"it {leak}"
                else:
                    found.append(candidate)
            except SourceError as error:
                passed_over[name] = str(error)
        return found, passed_over
    found = []
    named: dict[str, str] = {}
    for spec in dict.fromkeys(sources):
        card, base = _named(spec, cache)
        candidate = Candidate(card=card, base=base, unreachable=unreachable)
        if same_data(card, exclude_data):
            raise SourceError(f"source {spec} was made from this run's own data; take it out of `sources`")
        if named.setdefault(card.name, spec) != spec:
            raise SourceError(f"{named[card.name]} and {spec} are both called {card.name}; take one out of `sources`")
        candidate.sketch()  # a damaged one is told here
        if leak := _leak(candidate, judged_on):
            raise SourceError(f"source {spec} {leak}; take it out of `sources`")
        found.append(candidate)
    return found, {}


def find_source(name: str, sources: Literal["all"] | tuple[str, ...], cache: Path) -> Candidate:
    """Return the candidate called `name` among a recipe's `sources`; raises `SourceError` where it is not.

    Others may be gone, or damaged: `survey` looks at all.
    """
    if sources == "all":
        if name in (cards := catalog()):
            return Candidate(card=cards[name])
        if name in (folders := registered(cache)):
            return Candidate(card=registered_card(folders[name]), base=folders[name])
    else:
        for spec in sources:
            with contextlib.suppress(SourceError):  # of another, which has gone
                card, base = _named(spec, cache)
                if card.name == name:
                    return Candidate(card=card, base=base)
    raise SourceError(f"there is no source {name!r} among the recipe's; `headstart sources list` shows them all")


def registered_card(folder: Path) -> SourceCard:
    """Return the card of a folder in the registry, which goes by its name: of two of one name a run would take one."""
    card = read_card(folder)
    if card.name != folder.name:
        raise SourceError(f"{folder} has the card of {card.name}; give it that name, or take it out of there")
    return card


def same_data(card: SourceCard, fingerprint: str) -> bool:
    """Say whether a source was made from the data of that fingerprint; that of others' models is not known."""
    return fingerprint != "" and card.data_fingerprint == fingerprint


def _leak(candidate: Candidate, judged_on: Collection[str]) -> str:
    """Say what is wrong where the candidate learned from images that a run judges by; empty where it did not."""
    seen = candidate.seen() or frozenset()
    known = sum(image_id(digest) in seen for digest in judged_on)
    images = f"{known} of the {len(judged_on)} images that this run validates and tests on"
    return f"has learned from {images}, which would flatter it" if known else ""


def _named(spec: str, cache: Path) -> tuple[SourceCard, Path | None]:
    """Return the card that one entry of `sources` means, and its folder."""
    kind, _, rest = spec.partition(":")
    if kind in SPEC_KINDS and rest:
        return card_from_spec(spec, catalog()), None
    if kind == "source" and rest:
        folder = Path(rest).expanduser().resolve()
        folder = folder / "source" if (folder / "source" / CARD).is_file() else folder
        return read_card(folder), folder
    cards = catalog()
    if spec in cards:
        return cards[spec], None
    folder = cache / "sources" / spec
    if is_there(folder / CARD) and os.sep not in spec:
        return registered_card(folder), folder
    names = [*cards, *registered(cache)]
    near = difflib.get_close_matches(spec, names, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"accepted: {some(names, 20)}"
    raise SourceError(f"there is no source {spec!r}; {hint} (also accepted: {_SPECS})")
