"""How far the finished runs' tasks are from the target, and which of many are near enough for an audition."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.markup import escape

from headstart.cluster.stages.context import Reporter
from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.errors import SourceError
from headstart.trainer.features import CachedFeatures
from headstart.trainer.recipe import Recipe
from headstart.trainer.selection.ranking import Target, make_sketch, sketch_distances, sketched
from headstart.trainer.selection.sources import Candidate, catalog

PROBE = "mobilenet-v2-imagenet"
"""The one backbone under which tasks are compared: small, packaged, and of a broad source task."""

Distances = dict[str, dict[str, float]]
"""By source, the `energy` and the `euclidean` distance of its task to the target."""

_AT_ONCE = 32
"""Sketches that are in memory together: 330 MB of the largest, with the copy that the distances are taken from."""


def load_probe(cache: Path) -> Backbone:
    """Return the probe backbone, or raise `SourceError` when its weights are not to be had."""
    return Candidate(card=catalog()[PROBE]).load(cache)


def task_distances(
    recipe: Recipe, target: Target, candidates: Sequence[Candidate], cache: Path, reporter: Reporter, *, tag: str = ""
) -> tuple[Distances, CachedFeatures | None]:
    """Return the distances to the candidates that have a sketch, and the cached features of the target's own.

    Nothing, and None, where no candidate has one, or where the probe is not to be had, which is told.
    """
    if all(candidate.sketch() is None for candidate in candidates):
        return {}, None
    try:
        probe = load_probe(cache)
    except SourceError as error:
        reporter.say(escape(f"no task distances: {error}"))
        return {}, None
    with reporter.bar("task distances") as progress:
        mine, cached = make_sketch(probe, sketched(target, recipe.seed), cache, tag=tag, progress=progress)
    found: Distances = {}
    for start in range(0, len(candidates), _AT_ONCE):
        sketches = {each.card.name: each.sketch() for each in candidates[start : start + _AT_ONCE]}
        near = {name: one for name, one in sketches.items() if one is not None and one.probe == mine.probe}
        found |= dict(zip(near, sketch_distances(mine, list(near.values())), strict=True))
    return found, cached


def too_far(recipe: Recipe, candidates: Sequence[Candidate], distances: Mapping[str, Mapping[str, float]]) -> set[str]:
    """Return the names of the finished runs that get no audition, being beyond the `recipe.shortlist` nearest.

    None where the recipe names its sources, or where there are no distances to tell by. A run without one, whose
    sketch is of another probe, is farther than those that have one; of equals the first are taken.
    """
    if not distances or not is_long(recipe, candidates):
        return set()
    runs = [each.card.name for each in candidates if each.base is not None]
    runs.sort(key=lambda name: distances[name]["energy"] if name in distances else float("inf"))
    return set(runs[recipe.shortlist :])


def is_long(recipe: Recipe, candidates: Sequence[Candidate]) -> bool:
    """Say whether there are more finished runs than the recipe has auditioned."""
    return recipe.sources == "all" and sum(each.base is not None for each in candidates) > recipe.shortlist


def why_too_far(recipe: Recipe) -> str:
    """What is said of a source that gets no audition."""
    return f"no audition: not among the {recipe.shortlist} nearest finished runs (`shortlist`)"
