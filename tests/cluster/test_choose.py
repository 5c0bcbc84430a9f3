"""The choice between a frozen source and a fine-tuned one, from outcomes on validation that are known."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headstart.cluster.fit import Fitted
from headstart.cluster.stages import choose as stage
from headstart.cluster.stages import run_directory
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.run_directory import Stage
from headstart.trainer.errors import RecipeError
from headstart.trainer.recipe import Mode


def logits(context: Context, num_right: int) -> torch.Tensor:
    """Of the validation images, [60, 10]: right for the first `num_right` alone."""
    labels = torch.from_numpy(context.target.part("validation").labels)
    wrong = torch.arange(len(labels)) >= num_right
    return torch.nn.functional.one_hot((labels + wrong) % 10, 10).float()


def of(key: str, result: dict[str, Any]) -> Stage:
    return Stage(key=key, result=result, seconds=0.0, skipped=False)


def found(context: Context, monkeypatch: pytest.MonkeyPatch, frozen: int, tuned: int) -> dict[str, Any]:
    models = {"first": logits(context, frozen), "fit": logits(context, tuned)}
    monkeypatch.setattr(stage, "auditioned", lambda context, source: models[source])
    monkeypatch.setattr(stage, "fitted_model", lambda context, name, tuned: models[name])
    monkeypatch.setattr(stage, "validation_logits", lambda context, model, used: model)
    ranked = of("ranked", {"ranking": [{"source": "first"}, {"source": "second"}]})
    fitted = of(f"fitted {tuned}", {"mode": "finetune", "source": "second"})
    return stage.choose(context, ranked, fitted).result


def test_what_fine_tuning_gains_on_validation_decides(context: Context, monkeypatch: pytest.MonkeyPatch):
    gained = found(context, monkeypatch, frozen=30, tuned=45)
    assert (gained["mode"], gained["source"]) == ("finetune", "second")
    assert gained["difference"] == pytest.approx(15 / 60)
    lost = found(context, monkeypatch, frozen=30, tuned=15)
    assert (lost["mode"], lost["source"]) == ("feature", "first")
    assert lost["difference"] == pytest.approx(-15 / 60)
    assert gained["standard_error"] == lost["standard_error"] > 0


def test_a_ranking_made_again_with_another_best_source_is_chosen_from_again(context: Context):
    feature = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, mode="feature"))
    chosen = [
        stage.choose(feature, of("the same inputs", {"ranking": [{"source": best}]}), None)
        for best in ("first", "first", "available by now")
    ]
    assert [one.result["source"] for one in chosen] == ["first", "first", "available by now"]
    assert len({one.key for one in chosen}) == 2


def fitting(context: Context, monkeypatch: pytest.MonkeyPatch, mode: Mode, *, diverged: bool) -> Context:
    """A run in `mode` whose training leaves a checkpoint and ends as it is told."""
    backbone = SimpleNamespace(preprocess=None)
    monkeypatch.setattr(stage, "load_source", lambda context, source: backbone)
    monkeypatch.setattr(stage, "auditioned", lambda context, source: SimpleNamespace(head=None))
    monkeypatch.setattr(stage, "build_classifier", lambda *arguments, **more: None)

    def fit(*arguments: object, storage: Path, **more: object) -> Fitted:
        storage.mkdir(parents=True, exist_ok=True)
        return Fitted(weights={}, learning_rate=50.0, validation_accuracy=0.0, diverged=diverged, rows=[])

    monkeypatch.setattr(stage, "fit", fit)
    return dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, mode=mode))


RANKED = of("ranked", {"ranking": [{"source": "first", "available": True, "tunable": True}]})


def test_fine_tuning_that_diverges_loses_to_the_frozen_source(context: Context, monkeypatch: pytest.MonkeyPatch):
    context = fitting(context, monkeypatch, "auto", diverged=True)
    chosen = stage.choose(context, RANKED, stage.tune_source(context, RANKED)).result
    assert (chosen["mode"], chosen["source"]) == ("feature", "first")
    assert "diverged at train.learning_rate 50" in chosen["reason"]


@pytest.mark.parametrize(
    ("mode", "field"), [("finetune", "learning_rate"), ("full", "learning_rate"), ("scratch", "scratch_learning_rates")]
)
def test_training_that_diverges_where_nothing_else_is_asked_for_names_the_rate(
    context: Context, monkeypatch: pytest.MonkeyPatch, mode: Mode, field: str
):
    context = fitting(context, monkeypatch, mode, diverged=True)
    with pytest.raises(RecipeError, match=rf"training first in mode {mode} diverged: train.{field} is 0.0003"):
        stage.tune_source(context, RANKED)


def test_a_control_that_diverges_names_its_rates(context: Context, monkeypatch: pytest.MonkeyPatch):
    context = fitting(context, monkeypatch, "auto", diverged=True)
    with pytest.raises(RecipeError, match=r"train.scratch_learning_rates is 0.0003, 0.001, 0.003; set less"):
        stage.train_control(context, RANKED)


def test_checkpoints_are_deleted_once_the_fit_is_recorded_and_those_of_earlier_recipes_with_them(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    context = fitting(context, monkeypatch, "auto", diverged=False)
    storages = context.run.private / "ray"
    abandoned, of_the_control = storages / "fit-0123456789ab", storages / "control-0123456789ab"
    abandoned.mkdir(parents=True)
    of_the_control.mkdir()

    def killed(path: Path, document: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_directory, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.tune_source(context, RANKED)
    assert len(list(storages.glob("fit-*"))) == 2
    stage.tune_source(context, RANKED)
    assert list(storages.iterdir()) == [of_the_control]
