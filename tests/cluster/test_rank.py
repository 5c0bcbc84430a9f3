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

CARD = catalog()["mtcnn-onet"]


def ranked(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    accuracies: dict[str, Any],
    *,
    runs: tuple[str, ...] = (),
    **more: float,
) -> Stage:
    """The ranking where these sources are there, `runs` as finished runs, a command of its own; `more` are scores."""

    def audition(context: Context, candidate: Candidate, heads: Path, used: list[Any]) -> dict[str, Any]:
        name = candidate.card.name
        found = {"loaded": True, "available": True, "audition_accuracy": accuracies[name], "score": more.get(name)}
        return stage._entry(name, candidate.card) | (found if accuracies[name] is not None else {})

    there = [candidate(name, Path(name) if name in runs else None) for name in accuracies]
    monkeypatch.setattr(stage, "survey", lambda *arguments, **more: (there, {}))
    monkeypatch.setattr(stage, "_audition", audition)
    context.run.attempt += "+"
    return stage.rank(context)


def candidate(name: str, base: Path | None = None) -> Candidate:
    return Candidate(card=dataclasses.replace(CARD, name=name), base=base)


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


def test_the_best_audition_is_first_and_of_equal_ones_the_better_score(
    context: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    accuracies = {"absent": None, "worse": 0.0, "weak": 0.9, "strong": 0.9}
    found = ranked(context, monkeypatch, accuracies, worse=3.0, weak=-2.0, strong=-1.0).result["ranking"]
    assert [entry["source"] for entry in found] == ["strong", "weak", "worse", "absent"]
    assert "not known which images" not in capsys.readouterr().err  # which is for finished runs, not for the catalog


def test_a_ranking_is_made_anew_for_other_data_another_search_or_another_seed(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    recipe = context.recipe
    others = [
        dataclasses.replace(context, data_key="other"),
        *(
            dataclasses.replace(context, recipe=dataclasses.replace(recipe, **field))
            for field in (
                {"seed": 5},
                {"search": dataclasses.replace(recipe.search, epochs=1)},
                {"train": dataclasses.replace(recipe.train, optimizer="sgd")},
            )
        ),
    ]
    keys = [ranked(one, monkeypatch, {"good": 0.9}).key for one in (context, context, *others)]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 5


def test_of_more_runs_than_the_shortlist_has_the_nearest_get_an_audition(
    context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def ranking(shortlist: int, energies: dict[str, float]) -> Stage:
        monkeypatch.setattr(stage, "task_distances", lambda *_, **more: (distances(energies), None))
        one = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, shortlist=shortlist))
        return ranked(one, monkeypatch, accuracies, runs=tuple(energies))

    def distances(energies: dict[str, float]) -> dict[str, dict[str, float]]:
        return {name: {"energy": energy, "euclidean": 0.0} for name, energy in energies.items()}

    accuracies = {"packaged": 0.5, "far": 1.0, "near": 0.7, "nearer": 0.8}
    energies = {"far": 3.0, "near": 2.0, "nearer": 1.0}
    all_three = ranking(3, energies)
    assert [entry["source"] for entry in all_three.result["ranking"]] == ["far", "nearer", "near", "packaged"]
    assert all_three.result["shortlist"] is None
    two = ranking(2, energies)
    assert [(each["source"], each["shortlisted"], each["distance"]) for each in two.result["ranking"]] == [
        ("nearer", True, 1.0), ("near", True, 2.0), ("packaged", True, None), ("far", False, 3.0)
    ]  # fmt: skip
    assert two.result["shortlist"] == 2
    assert two.result["ranking"][-1]["reason"] == "no audition: not among the 2 nearest finished runs (`shortlist`)"
    monkeypatch.setattr(stage, "_loads", lambda *_: True)
    assert ranking(2, energies).skipped  # what was left out is not looked at again
    assert ranking(3, energies).key == ranking(50, energies).key == all_three.key != two.key
    settled = dataclasses.replace(context, settled=True)
    ranking(2, energies)
    assert ranked(settled, monkeypatch, accuracies, runs=tuple(energies)).result["shortlist"] == 2
    monkeypatch.setattr(stage, "_audition", lambda context, one, *_: stage._entry(one.card.name, None, "is gone"))
    with pytest.raises(SourceError) as told:
        stage.rank(dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, shortlist=0)))
    assert str(told.value) == "no source can be used here:\n  packaged: is gone"


def test_a_source_whose_heads_all_diverge_is_unavailable_with_all_and_an_error_by_name(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    def assess(backbone: str, *arguments: object, **more: object) -> Any:
        if backbone == "wild":
            raise RecipeError("every head of the search diverged")
        return SimpleNamespace(
            features=SimpleNamespace(directory=Path("features"), num_computed=lambda attempt: 0),
            head=torch.nn.Linear(2, 2), score=0.1, knn=0.2, ridge=0.3, audition_accuracy=0.4, seconds=1.0,
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
    figures = {"score": 0.1, "knn": 0.2, "ridge": 0.3, "audition_accuracy": 0.4}
    assert {name: found[0][name] for name in figures} == figures
    context.run.attempt += "+"
    assert stage.rank(context).skipped  # it loads, and would diverge again
    named = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, sources=("wild",), seed=5))
    with pytest.raises(RecipeError, match="every head"):
        stage.rank(named)
    del there[2]
    with pytest.raises(SourceError, match=r"no source can be used here:\n  wild: every head .*\n  absent: no network"):
        stage.rank(context)


def test_what_is_trained_is_the_best_source_that_is_there_and_tunable():
    states = {"absent": (False, True), "frozen": (True, False), "best": (True, True), "next": (True, True)}
    entries = [{"source": name, "available": there, "tunable": can} for name, (there, can) in states.items()]
    found = stage.tunable_source({"ranking": entries})
    assert found is not None
    assert found["source"] == "best"
    assert stage.tunable_source({"ranking": entries[:2]}) is None
