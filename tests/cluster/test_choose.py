"""The choice between a frozen source and a fine-tuned one, from outcomes on validation that are known."""

import dataclasses
from typing import Any

import pytest
import torch

from headstart.cluster.stages import choose as stage
from headstart.cluster.stages.context import Context
from headstart.cluster.stages.run_directory import Stage


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
