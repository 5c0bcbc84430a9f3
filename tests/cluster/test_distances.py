"""How far finished runs are from a target, and which of many are near enough for an audition."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headstart.cluster.stages import distances as stage
from headstart.cluster.stages.context import Context
from headstart.trainer.errors import SourceError
from headstart.trainer.selection.sources import Sketch


def sketch(moved: float, probe: str = "ours") -> Sketch:
    features = torch.full((4, 4), moved)
    return Sketch(features=features, labels=torch.zeros(4).long(), mean=features.mean(0), probe=probe)


def candidates(sketches: dict[str, Sketch | None]) -> Any:
    return [
        SimpleNamespace(card=SimpleNamespace(name=name), sketch=lambda one=one: one, base=None if one is None else name)
        for name, one in sketches.items()
    ]


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "load_probe", lambda cache: None)
    monkeypatch.setattr(stage, "make_sketch", lambda *arguments, **more: (sketch(0.0), "cached"))


def found(context: Context, there: Any) -> Any:
    return stage.task_distances(context.recipe, context.target, there, context.cache, context.reporter)


def test_each_source_has_its_own_distance_and_none_where_its_sketch_is_of_another_probe(
    context: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    there = candidates({"far": sketch(3.0), "other": sketch(0.0, "another"), "none": None, "near": sketch(0.5)})
    distances, cached = found(context, there)
    assert cached == "cached"
    assert set(distances) == {"near", "far"}
    assert distances["near"]["euclidean"] == pytest.approx(1)  # 0.5 in each of four dimensions
    assert distances["far"]["euclidean"] == pytest.approx(6)
    assert 0 < distances["near"]["energy"] < distances["far"]["energy"]
    assert found(context, candidates({"none": None})) == ({}, None)
    assert "no task distances" not in capsys.readouterr().err

    def absent(cache: object) -> Any:
        raise SourceError("its weights are not to be had")

    monkeypatch.setattr(stage, "load_probe", absent)
    assert found(context, there) == ({}, None)  # a ranking needs no distances
    assert "no task distances: its weights are not to be had" in capsys.readouterr().err


def test_the_distances_to_many_are_those_to_each(context: Context, monkeypatch: pytest.MonkeyPatch):
    there = candidates({f"run-{number}": sketch(number / 4) for number in range(9)})
    whole, _ = found(context, there)
    monkeypatch.setattr(stage, "_AT_ONCE", 4)
    parts, _ = found(context, there)
    assert list(parts) == list(whole)
    for name, distance in whole.items():
        assert parts[name] == pytest.approx(distance, rel=1e-6, abs=1e-6)


def test_the_shortlist_is_of_the_nearest_runs_and_never_of_what_the_recipe_names(context: Context):
    sketches = {"far": sketch(3.0), "other": sketch(0.0, "another"), "packaged": None, "near": sketch(0.5)}
    there = candidates(sketches | {"same": sketch(3.0)})
    distances, _ = found(context, there)

    def too_far(shortlist: int, **changes: Any) -> set[str]:
        recipe = dataclasses.replace(context.recipe, sources="all", shortlist=shortlist)
        return stage.too_far(dataclasses.replace(recipe, **changes), there, distances)

    assert too_far(4) == set()
    assert too_far(3) == {"other"}
    assert too_far(2) == {"same", "other"}  # as far as the one before it
    assert too_far(0) == {"near", "far", "same", "other"}
    assert too_far(1, sources=("far", "near")) == set()
    recipe = dataclasses.replace(context.recipe, sources="all", shortlist=1)
    assert stage.too_far(recipe, there, {}) == set()  # nothing to tell by
