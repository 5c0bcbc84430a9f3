"""`headstart tune`: a trial is one source's whole bank, and finds what that bank finds without Ray."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from headstart.cluster import tune
from headstart.cluster.recipe_file import load_recipe
from headstart.cluster.tune import print_trials, source_features
from headstart.trainer.audition import audition
from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.errors import RecipeError, RunError, SourceError
from headstart.trainer.features import extract_features
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.inputs.split import split_images
from headstart.trainer.recipe import Recipe, Search
from headstart.trainer.selection import sources
from headstart.trainer.selection.ranking import Target
from headstart.trainer.selection.sources import resolve

from .processes import MARK, gone, kill

SOURCES = ["mtcnn-onet", "mobilenet-v2-imagenet"]
SEARCH = {
    "learning_rates": [0.003, 0.03],
    "weight_decays": [0.01, 0.1, 1.0],
    "seeds": [0, 1],
    "epochs": 20,
    "batch_size": 64,
}


@pytest.fixture
def recipe(tmp_path: Path, write_digits: Callable[..., Path]) -> Path:
    document = {
        "name": "searched",
        "data": {"path": str(write_digits(tmp_path / "digits", 15)), "split": {"train": 80, "validation": 50}},
        "sources": SOURCES,
        "search": SEARCH,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def target_of(recipe: Recipe, cache: Path) -> Target:
    images = load_images(recipe.data, cache)
    return Target(images=images, parts=split_images(images, recipe.data.split, recipe.seed))


def auditioned(recipe: Recipe, source: str, cache: Path) -> dict[str, Any]:
    """What the same bank finds in this process."""
    target = target_of(recipe, cache)
    (candidate,) = resolve((source,), cache)
    features = extract_features(candidate.load(cache), target.known(), cache).tensor()
    labels = torch.from_numpy(target.known().labels)
    found = audition(
        features[:80], labels[:80], features[80:], labels[80:], num_classes=10, search=recipe.search,
        optimizer=recipe.train.optimizer, seed=recipe.seed,
    )  # fmt: skip
    return {
        "source": source,
        "accuracy": found.accuracy,
        "loss": pytest.approx(found.loss, rel=1e-4),  # the trial has one thread, and sums in another order
        "learning_rate": found.setting.learning_rate,
        "weight_decay": found.setting.weight_decay,
        "seed": found.setting.seed,
        "num_heads": len(found.settings),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_trial_is_the_whole_bank_of_one_source(recipe: Path, tmp_path: Path, cache: Path):
    out = tmp_path / "run"

    def tuned() -> "subprocess.CompletedProcess[str]":
        mark = uuid.uuid4().hex
        try:
            ended = subprocess.run(
                [sys.executable, "-m", "headstart.cluster.cli", "tune", str(recipe), "--out", str(out), "--json"],
                capture_output=True, text=True, timeout=400, env=os.environ | {MARK: mark}, cwd=tmp_path, check=False,
            )  # fmt: skip
            assert gone(mark), "Ray's processes live on after the command"
        finally:
            kill(mark)
        assert ended.returncode == 0, ended.stderr
        return ended

    ended = tuned()
    document = json.loads(ended.stdout)
    assert document["schema"] == 1
    assert document["search"] == SEARCH
    assert document["unavailable"] == {}
    assert json.loads((out / "tune.json").read_text()) == document

    expected = [auditioned(load_recipe(str(recipe)), source, cache) for source in SOURCES]
    assert [trial["num_heads"] for trial in document["trials"]] == [2 * 3 * 2] * 2
    assert document["trials"] == sorted(expected, key=lambda trial: -trial["accuracy"])
    assert document["trials"][0]["accuracy"] > document["trials"][1]["accuracy"]
    assert not (out / ".stages" / "tune").exists()

    (out / "tune.json").unlink()  # as if it had been killed when one had finished
    (out / ".stages" / "trials" / f"{SOURCES[0]}.json").unlink()
    again = tuned()
    assert "1 of 2 trials were finished by an earlier command" in again.stderr
    assert json.loads(again.stdout) == json.loads((out / "tune.json").read_text()) == document


def test_trials_that_have_finished_are_not_run_again(
    recipe: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[str] = []
    ends = [True]

    def run(*arguments: Any) -> None:
        features, keep = arguments[2], arguments[-1]
        for name in features:
            if name == "ended" and ends.pop():
                raise RunError("ended")
            ran.append(name)
            keep({"config": {"source": name}, "accuracy": 0.5 + len(ran), "time_total_s": 1.0})

    monkeypatch.setattr(tune, "_run", run)
    one = load_recipe(str(recipe))
    target = target_of(one, cache)
    features = {name: torch.full((130, 2), float(number)) for number, name in enumerate(("whole", "ended"))}

    def trials(recipe: Recipe = one) -> list[dict[str, Any]]:
        ran.clear()
        connection: Any = None  # `run` needs none
        return tune._trials(recipe, target, features, tmp_path, connection, {})

    monkeypatch.setattr(tune, "_FIGURES", ("accuracy",))
    with pytest.raises(RunError, match="ended"):
        trials()
    ends += [False] * 5
    assert trials() == [{"source": "whole", "accuracy": 1.5}, {"source": "ended", "accuracy": 1.5}]
    assert ran == ["ended"]
    assert len(trials()) == 2
    assert ran == []
    features["whole"] = features["whole"] + 1
    trials()
    assert ran == ["whole"]
    for other in (replace(one, seed=5), replace(one, search=replace(one.search, epochs=1))):
        trials(other)
        assert ran == ["whole", "ended"]


def features_but_of(source: str) -> Callable[..., Any]:
    """`extract_features` where one source gives NaN."""

    def extract(backbone: Backbone, *arguments: Any, **more: Any) -> Any:
        if backbone.name == source:
            raise SourceError(f"source {source} gives NaN")
        return extract_features(backbone, *arguments, **more)

    return extract


def test_a_trial_whose_heads_all_diverge_has_the_reason_with_all_and_is_an_error_by_name(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
):
    every = replace(load_recipe(str(recipe)), sources="all", search=Search(weight_decays=(1e30,), epochs=3))
    monkeypatch.setattr("ray.get", lambda stored: stored)
    stored = {"wild": (torch.arange(8.0)[:, None], torch.arange(8) % 2)}
    shape: dict[str, Any] = {"stored": stored, "num_train": 4, "num_classes": 2}
    figures = tune._trial({"source": "wild"}, recipe=every, **shape)
    assert figures["accuracy"] == 0
    assert "every head of the search diverged" in str(figures["reason"])
    with pytest.raises(RecipeError, match="every head"):
        tune._trial({"source": "wild"}, recipe=replace(every, sources=("wild",)), **shape)


def test_sources_that_cannot_be_used_are_told_with_their_reasons(
    recipe: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    absent = replace(sources.catalog()["mtcnn-onet"], name="absent", weights=f"file:{cache}/absent.onnx")
    few = {"absent": absent, "mtcnn-onet": sources.catalog()["mtcnn-onet"]}
    monkeypatch.setattr(sources, "catalog", lambda: few)
    (cache / "sources/broken").mkdir(parents=True)
    (cache / "sources/broken/card.yaml").write_text("name: [cut")
    every = replace(load_recipe(str(recipe)), sources="all")
    features, unavailable = source_features(every, target_of(every, cache), cache)
    assert {name: len(tensor) for name, tensor in features.items()} == {"mtcnn-onet": 130}
    assert list(unavailable) == ["broken", "absent"]
    assert "broken/card.yaml cannot be used" in unavailable["broken"]
    assert "absent.onnx" in unavailable["absent"]
    print_trials({"name": "searched", "trials": [], "unavailable": unavailable})
    assert "unavailable: absent: source absent cannot be used: " in capsys.readouterr().out

    few["nan"] = replace(few["mtcnn-onet"], name="nan")
    monkeypatch.setattr(tune, "extract_features", features_but_of("nan"))
    features, unavailable = source_features(every, target_of(every, cache), cache)
    assert (list(features), unavailable["nan"]) == (["mtcnn-onet"], "source nan gives NaN")
    with pytest.raises(SourceError, match="gives NaN"):
        source_features(replace(every, sources=("nan",)), target_of(every, cache), cache)
    del few["nan"]

    del few["mtcnn-onet"]
    with pytest.raises(SourceError, match=r"(?s)no source can be used here:\n  broken: .*\n  absent: "):
        source_features(every, target_of(every, cache), cache)


def test_runs_beyond_the_shortlist_have_no_trial(recipe: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    card = sources.catalog()["mtcnn-onet"]
    there = [sources.Candidate(card=replace(card, name=name), base=Path(name)) for name in ("far", "near")]
    monkeypatch.setattr(tune, "survey", lambda *_, **more: (there, {}))
    far_and_near = {name: {"energy": energy} for name, energy in (("far", 2.0), ("near", 1.0))}
    monkeypatch.setattr(tune, "task_distances", lambda *_: (far_and_near, None))
    one = replace(load_recipe(str(recipe)), sources="all", shortlist=1)
    features, unavailable = source_features(one, target_of(one, cache), cache)
    assert list(features) == ["near"]
    assert unavailable == {"far": "no audition: not among the 1 nearest finished runs (`shortlist`)"}
    features, unavailable = source_features(replace(one, shortlist=2), target_of(one, cache), cache)
    assert (list(features), unavailable) == (["far", "near"], {})


def test_the_folder_of_another_recipe_is_refused(headstart: Callable[..., Any], recipe: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("not a run")
    ended = headstart("tune", recipe, "--out", tmp_path / "taken")
    assert ended.code == 2
    assert ended.stdout == ""
    assert "is no run directory; give --out" in ended.stderr
