"""When sources are ranked again, from auditions that are known."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch

from headstart.cluster.stages import rank as stage
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.run_directory import Stage
from headstart.trainer.errors import RecipeError, SourceError
from headstart.trainer.selection.sources import Candidate, catalog


def ranked(context: Context, monkeypatch: pytest.MonkeyPatch, accuracies: dict[str, float]) -> Stage:
    """The ranking where these sources are there, as a command of its own."""

    def audition(context: Context, candidate: Candidate, heads: Path, used: list[Any]) -> dict[str, Any]:
        name = candidate.card.name
        return stage._entry(name, candidate.card) | {"available": True, "audition_accuracy": accuracies[name]}

    there = [candidate(name) for name in accuracies]
    monkeypatch.setattr(stage, "survey", lambda *arguments, **more: (there, {}))
    monkeypatch.setattr(stage, "_audition", audition)
    context.run.attempt += "+"
    return stage.rank(context)


def candidate(name: str) -> Candidate:
    return Candidate(card=dataclasses.replace(catalog()["mtcnn-onet"], name=name))


def gone(*_: object) -> NoReturn:
    raise SourceError("there is no weights file")


def test_a_settled_ranking_stays_where_a_source_has_come_or_gone(context: Context, monkeypatch: pytest.MonkeyPatch):
    first = ranked(context, monkeypatch, {"good": 0.9, "losing": 0.5})
    settled = dataclasses.replace(context, settled=True)
    for now in ({"good": 0.9}, {"good": 0.9, "losing": 0.5, "better": 1.0}):
        again = ranked(settled, monkeypatch, now)
        assert (again.key, again.result, again.skipped) == (first.key, first.result, True)
    with monkeypatch.context() as lost:
        lost.setattr(stage, "_survey", gone)  # a source that the recipe names
        assert stage.rank(settled).skipped
    again = ranked(context, monkeypatch, {"good": 0.9})
    assert not again.skipped
    assert [entry["source"] for entry in again.result["ranking"]] == ["good"]


def test_a_source_whose_heads_all_diverge_is_unavailable_with_all_and_an_error_by_name(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    def assess(backbone: str, *arguments: object, **more: object) -> Any:
        if backbone == "wild":
            raise RecipeError("every head of the search diverged")
        return SimpleNamespace(
            features=SimpleNamespace(directory=Path("features"), num_computed=lambda attempt: 0),
            head=torch.nn.Linear(2, 2), score=0.5, knn=0.5, ridge=0.5, audition_accuracy=0.5, seconds=1.0,
        )  # fmt: skip

    def load(one: Candidate, cache: Path) -> Any:
        if one.card.name == "absent":
            raise SourceError("no network")
        return Loaded(one.card.name)

    class Loaded(str):
        tunable = True

    there = [candidate(name) for name in ("wild", "absent", "tame")]
    monkeypatch.setattr(stage, "survey", lambda *arguments, **more: (there, {}))
    monkeypatch.setattr(stage, "assess", assess)
    monkeypatch.setattr(Candidate, "load", load)
    found = stage.rank(context).result["ranking"]
    assert [(entry["source"], entry["available"], entry["reason"]) for entry in found] == [
        ("tame", True, None),
        ("wild", False, "every head of the search diverged"),
        ("absent", False, "no network"),
    ]
    context.run.attempt += "+"
    assert stage.rank(context).skipped  # it loads, and would diverge again
    named = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, sources=("wild",), seed=5))
    with pytest.raises(RecipeError, match="every head"):
        stage.rank(named)
