"""When sources are ranked again, from auditions that are known."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from headstart.cluster.stages import rank as stage
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.run_directory import Stage
from headstart.trainer.selection.sources import Candidate, catalog


def ranked(context: Context, monkeypatch: pytest.MonkeyPatch, accuracies: dict[str, float]) -> Stage:
    """The ranking where these sources are there, as a command of its own."""

    def audition(context: Context, candidate: Candidate, heads: Path, used: list[Any]) -> dict[str, Any]:
        name = candidate.card.name
        return stage._entry(name, candidate.card) | {"available": True, "audition_accuracy": accuracies[name]}

    card = catalog()["mtcnn-onet"]
    there = [Candidate(card=dataclasses.replace(card, name=name)) for name in accuracies]
    monkeypatch.setattr(stage, "survey", lambda *arguments, **more: (there, {}))
    monkeypatch.setattr(stage, "_audition", audition)
    context.run.attempt += "+"
    return stage.rank(context)


def test_a_settled_ranking_stays_where_a_source_has_come_or_gone(context: Context, monkeypatch: pytest.MonkeyPatch):
    first = ranked(context, monkeypatch, {"good": 0.9, "losing": 0.5})
    settled = dataclasses.replace(context, settled=True)
    for now in ({"good": 0.9}, {"good": 0.9, "losing": 0.5, "better": 1.0}):
        again = ranked(settled, monkeypatch, now)
        assert (again.key, again.result, again.skipped) == (first.key, first.result, True)
    again = ranked(context, monkeypatch, {"good": 0.9})
    assert not again.skipped
    assert [entry["source"] for entry in again.result["ranking"]] == ["good"]
