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
from headstart.trainer.inputs.dataset import LabelledImages
from headstart.trainer.loop import Task
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
    # Asked for by then, and trained alike: the choice is made anew.
    asked = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, mode="finetune"))
    assert found(asked, monkeypatch, frozen=30, tuned=15)["mode"] == "finetune"


def test_a_ranking_made_again_with_another_best_source_is_chosen_from_again(context: Context):
    feature = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, mode="feature"))
    chosen = [
        stage.choose(feature, of("the same inputs", {"ranking": [{"source": best}]}), None)
        for best in ("first", "first", "available by now")
    ]
    assert [one.result["source"] for one in chosen] == ["first", "first", "available by now"]
    assert len({one.key for one in chosen}) == 2


def fitting(
    context: Context, monkeypatch: pytest.MonkeyPatch, mode: Mode, *, diverged: bool, fits: list[Any] | None = None
) -> Context:
    """A run in `mode` whose training leaves a checkpoint and ends as it is told; `fits` is what was trained."""
    backbone = SimpleNamespace(preprocess=None)
    monkeypatch.setattr(stage, "load_source", lambda context, source: backbone)
    monkeypatch.setattr(stage, "auditioned", lambda context, source: SimpleNamespace(head=f"head of {source}"))
    monkeypatch.setattr(stage, "build_classifier", lambda mode, *arguments, head, seed: (mode, head, seed))

    def fit(
        model: object, task: Task, *arguments: object, storage: Path, learning_rates: Any, **more: object
    ) -> Fitted:
        if fits is not None:
            fits.append((model, task, learning_rates))
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


RANKED_OTHERS_FIRST = of("ranked", {
    "ranking": [
        {"source": "frozen", "available": True, "tunable": False},
        {"source": "net", "available": True, "tunable": True},
    ]
})  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "mode", "head", "rates"),
    [
        ("auto", "finetune", "head of net", (0.5,)),
        ("finetune", "finetune", "head of net", (0.5,)),
        ("full", "full", None, (0.5,)),
        ("scratch", "scratch", None, (0.1, 0.2)),
    ],
)
def test_a_fit_starts_where_its_mode_does_and_sees_no_test_images(
    context: Context, monkeypatch: pytest.MonkeyPatch, asked: Mode, mode: Mode, head: str | None, rates: Any
):
    fits: list[Any] = []
    context = fitting(context, monkeypatch, asked, diverged=False, fits=fits)
    train = dataclasses.replace(context.recipe.train, learning_rate=0.5, scratch_learning_rates=(0.1, 0.2))
    context = dataclasses.replace(context, recipe=dataclasses.replace(context.recipe, train=train))
    tuned, control = (make(context, RANKED_OTHERS_FIRST) for make in (stage.tune_source, stage.train_control))
    assert tuned is not None
    assert (tuned.result["mode"], tuned.result["source"]) == (mode, "net")
    assert [(model, found) for model, _, found in fits[:1]] == [((mode, head, 4), rates)]
    if asked != "auto":
        chosen = stage.choose(context, RANKED_OTHERS_FIRST, tuned).result
        assert (chosen["mode"], chosen["source"]) == (mode, "net")
    if asked == "scratch":  # which is its own control
        assert control is None
    else:
        assert control is not None
        assert (control.result["mode"], control.result["source"]) == ("scratch", "net")
        assert [(model, found) for model, _, found in fits[1:]] == [(("scratch", None, 4), (0.1, 0.2))]
    for _, task, _ in fits:
        assert [task.train.digests, task.validation.digests] == [
            context.target.part(name).digests for name in ("train", "validation")
        ]


def test_mode_feature_trains_the_control_alone(context: Context, monkeypatch: pytest.MonkeyPatch):
    context = fitting(context, monkeypatch, "feature", diverged=False)
    assert stage.tune_source(context, RANKED) is None
    assert stage.train_control(context, RANKED) is not None


def test_a_fit_and_a_choice_are_made_anew_for_what_they_rest_on(context: Context, monkeypatch: pytest.MonkeyPatch):
    context = fitting(context, monkeypatch, "full", diverged=False)
    recipe = context.recipe
    others = [
        (context, of("ranked anew", RANKED.result)),
        *(
            (dataclasses.replace(context, recipe=dataclasses.replace(recipe, **field)), RANKED)
            for field in ({"seed": 5}, {"train": dataclasses.replace(recipe.train, epochs=1)})
        ),
    ]
    fits = [stage.tune_source(*given) for given in ((context, RANKED), (context, RANKED), *others)]
    assert all(one is not None for one in fits)
    for keys in (
        [one.key for one in fits if one],
        [stage.choose(context, RANKED, one).key for one in fits],
    ):
        assert keys[0] == keys[1]
        assert len(set(keys)) == 4


def test_validation_logits_are_of_the_validation_images_alone(context: Context, monkeypatch: pytest.MonkeyPatch):
    """A frozen source has them behind the training images."""
    seen: list[Any] = []

    def extract(backbone: object, images: LabelledImages, *arguments: object, **more: object) -> Any:
        return SimpleNamespace(tensor=lambda: torch.from_numpy(images.labels))

    monkeypatch.setattr(stage, "extract_features", extract)
    for mode in ("feature", "finetune"):
        model: Any = SimpleNamespace(mode=mode, backbone=None, logits=lambda features: features)
        found = stage.validation_logits(context, model, seen)
        assert found.tolist() == context.target.part("validation").labels.tolist()
    assert len(seen) == 2


def test_the_rows_of_a_fit_are_written_beside_its_job_and_mode(tmp_path: Path):
    fits = {"fit": of("a", {"mode": "full", "rows": [{"epoch": 1}, {"epoch": 2}]}), "control": None}
    stage.write_training_csv(tmp_path / "training.csv", fits)
    assert (tmp_path / "training.csv").read_text().split() == ["job,mode,epoch", "fit,full,1", "fit,full,2"]


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
