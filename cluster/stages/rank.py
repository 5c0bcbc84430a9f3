"""The stage that ranks the sources: an audition of each that is near enough, and its distance where it has a sketch."""

from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from headstart.cluster.recipe_file import recipe_document
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.distances import PROBE, is_long, task_distances, too_far, why_too_far
from headstart.cluster.stages.model import save_head
from headstart.cluster.stages.run_directory import Result, Stage, write_json
from headstart.trainer.errors import RecipeError, SourceError
from headstart.trainer.features import CachedFeatures
from headstart.trainer.selection.ranking import assess
from headstart.trainer.selection.sources import Candidate, SourceCard, survey


def rank(context: Context) -> Stage:
    """Rank the sources; writes ranking.json and each source's best head."""
    recipe = context.recipe
    ranked = context.run.result("rank") if context.settled else None
    # Sources that went, or are others by now, change nothing in a settled run, but for the one that is used:
    # `ranked_source`. Earlier versions did not write of which their ranking is.
    look = cache(partial(_survey, context, ranked))
    sources = ranked["sources"] if ranked is not None and "sources" in ranked else _identities(*look())
    if ranked is not None:
        shortlist = ranked.get("shortlist")
    else:  # an input only where it leaves something out
        shortlist = recipe.shortlist if is_long(recipe, look()[0]) else None
    document = recipe_document(recipe)
    inputs = {
        "data": context.data_key,
        "sources": list(sources.items()),
        "search": document["search"],
        "optimizer": recipe.train.optimizer,
        "seed": recipe.seed,
        **({} if shortlist is None else {"shortlist": shortlist}),
    }
    heads = context.run.private / "heads"

    def make() -> tuple[Result, list[CachedFeatures]]:
        candidates, passed_over = look()
        _tell_unknown(context, candidates)
        distances, mine = task_distances(
            recipe, context.target, candidates, context.cache, context.reporter, tag=context.tag
        )
        used = [] if mine is None else [mine]
        far = too_far(recipe, candidates, distances)
        entries = [
            _entry(candidate.card.name, candidate.card, why_too_far(recipe)) | {"shortlisted": False}
            if candidate.card.name in far
            else _audition(context, candidate, heads, used)
            for candidate in candidates
        ]
        entries += [_entry(name, None, reason) for name, reason in passed_over.items()]
        if not any(entry["available"] for entry in entries):
            raise no_source({entry["source"]: entry["reason"] for entry in entries if entry["shortlisted"]})
        for entry in entries:
            if entry["source"] in distances:
                entry["distances"] = distances[entry["source"]]
                entry["distance"] = entry["distances"]["energy"]
        # The best audition first; a tie goes to the better score, then to the order of the recipe.
        entries.sort(key=lambda e: (not e["available"], -(e["audition_accuracy"] or 0), -(e["score"] or 0)))
        result = {
            "schema": 1,
            "target": context.recipe.name,
            "probe": PROBE,
            "ranking": entries,
            "sources": _identities(candidates, passed_over),
            "shortlist": shortlist,
        }
        write_json(context.run.path / "ranking.json", result)
        return result, used

    def nothing_new(result: Result) -> bool:
        if context.settled:
            return True
        candidates, _ = look()
        tried = (entry for entry in result["ranking"] if entry.get("shortlisted", True))
        lacking = {entry["source"] for entry in tried if not entry["loaded"]}
        return not any(_loads(context, candidate) for candidate in candidates if candidate.card.name in lacking)

    return context.run.stage(
        "rank", inputs, lambda: [context.run.path / "ranking.json", *heads.glob("*.safetensors")], make, nothing_new
    )


def _survey(context: Context, ranked: Result | None) -> tuple[list[Candidate], dict[str, str]]:
    """The sources of the recipe, and why others are passed over; where there is a ranking already, those in it alone:
    an evaluation or an export beside others must not be of another source."""
    target = context.target
    candidates, passed_over = survey(
        context.recipe.sources, context.cache, exclude_data=target.images.fingerprint, judged_on=target.judged_on
    )
    if ranked is not None:
        names = {entry["source"] for entry in ranked["ranking"]}
        candidates = [candidate for candidate in candidates if candidate.card.name in names]
        passed_over = {name: reason for name, reason in passed_over.items() if name in names}
    return candidates, passed_over


def _identities(candidates: list[Candidate], passed_over: Mapping[str, str]) -> dict[str, str]:
    """By name the fingerprint of a source that is ranked, or why it is passed over."""
    return {candidate.card.name: candidate.fingerprint for candidate in candidates} | dict(passed_over)


def no_source(reasons: Mapping[str, str]) -> SourceError:
    """The error of a run that can use none of its sources, which says why by their names."""
    lines = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
    return SourceError(f"no source can be used here:\n{lines}")


def _tell_unknown(context: Context, candidates: Sequence[Candidate]) -> None:
    """Say of which finished runs it is not known what they learned from: earlier versions kept no list of images."""
    unknown = [
        candidate.card.name
        for candidate in candidates
        if candidate.base is not None and (candidate.card.seen_lacks or not candidate.card.seen_sha256)
    ]
    if unknown:
        context.reporter.say(
            f"not known which images these sources learned from, this run's may be among them: {', '.join(unknown)}"
        )


def _loads(context: Context, candidate: Candidate) -> bool:
    """Say whether a source that was unavailable has become available."""
    try:
        candidate.load(context.cache)
    except SourceError:
        return False
    return True


def _entry(name: str, card: SourceCard | None, reason: str | None = None) -> dict[str, Any]:
    """An entry of the ranking without figures; of a source that is passed over there is no card either."""
    return {
        "source": name,
        "task": card.task if card else None,
        "licence": card.licence if card else None,
        "architecture": card.architecture if card else None,
        "shortlisted": True,
        "loaded": False,
        "available": False,
        "tunable": False,
        "reason": reason,
        "distance": None,
        "distances": None,
        "score": None,
        "knn": None,
        "ridge": None,
        "audition_accuracy": None,
        "seconds": None,
    }


def _audition(context: Context, candidate: Candidate, heads: Path, used: list[CachedFeatures]) -> dict[str, Any]:
    entry = _entry(candidate.card.name, candidate.card)
    try:
        with context.reporter.bar(f"audition {candidate.card.name}") as progress:
            backbone = candidate.load(context.cache)
            entry["loaded"] = True
            found = assess(backbone, context.target, context.recipe, context.cache, tag=context.tag, progress=progress)
    except (SourceError, RecipeError) as error:  # RecipeError: all of its heads diverged
        if context.recipe.sources != "all":
            raise
        return entry | {"reason": str(error)}
    used.append(found.features)
    heads.mkdir(exist_ok=True)
    save_head(heads / f"{candidate.card.name}.safetensors", found.head)
    return entry | {
        "available": True,
        "tunable": backbone.tunable,
        "score": found.score,
        "knn": found.knn,
        "ridge": found.ridge,
        "audition_accuracy": found.audition_accuracy,
        "seconds": round(found.seconds, 3),
    }


def tunable_source(ranking: Result) -> dict[str, Any] | None:
    """Return the best available source whose backbone can be trained, or None."""
    return next((entry for entry in ranking["ranking"] if entry["available"] and entry["tunable"]), None)
