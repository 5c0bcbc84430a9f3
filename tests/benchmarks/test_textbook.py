"""The two programs of benchmarks/textbook do what they claim; how fast they are is for the benchmark to say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.textbook import measure as measuring
from benchmarks.textbook.agreement import Agreement, DisagreementError
from benchmarks.textbook.measure import limit, measure
from benchmarks.textbook.programs import Textbook, our_backbone, ours, replay
from benchmarks.textbook.workload import QUICK, Workload, prepare

TINY = replace(QUICK, num_train=16, num_test=8, epochs=2)


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Workload, Path, Path]:
    """A tiny workload, its folder of PNG files, its weights."""
    return TINY, tmp_path, prepare(TINY, tmp_path, tmp_path / "cache")


def test_both_programs_learn_the_same_from_the_same_images():
    row = measure(QUICK, num_runs=2)
    assert row["accuracy_textbook"] >= 0.9
    assert row["accuracy_ours"] >= 0.9
    assert row["replay_agreement"] >= 0.95
    assert row["feature_difference"] < 0.02
    assert row["ratio_p50"] > 0
    assert 0 < row["limit"] < QUICK.epochs
    assert row["num_images"] == QUICK.num_train


def test_theirs_passes_every_image_in_every_epoch_and_ours_once(prepared: tuple[Workload, Path, Path]):
    workload, folder, weights = prepared
    seen = {"theirs": 0, "ours": 0}
    program = Textbook(workload, weights, folder)
    backbone = our_backbone(workload, weights, folder / "cache")
    assert backbone.module is not None
    for name, module in (("theirs", program.backbone), ("ours", backbone.module)):
        module.register_forward_hook(lambda _, pixels, __, name=name: seen.update({name: seen[name] + len(pixels[0])}))
    for _ in range(workload.epochs):
        program.epoch()
    ours(workload, backbone, folder, folder / "empty")
    assert seen == {"theirs": workload.num_train * workload.epochs, "ours": workload.num_train}


def test_the_backbone_of_the_textbook_stays_frozen(prepared: tuple[Workload, Path, Path]):
    workload, folder, weights = prepared
    program = Textbook(workload, weights, folder)
    before = {name: tensor.clone() for name, tensor in program.backbone.state_dict().items()}
    head = program.head.linear.weight.detach().clone()
    program.epoch()
    assert all(torch.equal(before[name], tensor) for name, tensor in program.backbone.state_dict().items())
    assert not torch.equal(head, program.head.linear.weight)


def test_a_replay_on_the_textbooks_own_features_gives_its_head(prepared: tuple[Workload, Path, Path]):
    workload, folder, weights = prepared
    program = Textbook(workload, weights, folder)
    for _ in range(workload.epochs):
        program.epoch()
    with torch.no_grad():
        features = program.backbone(torch.stack([pixels for pixels, _ in program.train]))
    replayed = replay(workload, program, features)
    assert torch.allclose(replayed.weight, program.head.linear.weight, atol=1e-5)
    assert torch.allclose(replayed.bias, program.head.linear.bias, atol=1e-5)


def test_programs_that_see_different_pixels_get_no_ratio(monkeypatch: pytest.MonkeyPatch):
    made = our_backbone
    monkeypatch.setattr(measuring, "our_backbone", lambda w, *places: made(replace(w, resize=w.crop), *places))
    with pytest.raises(DisagreementError, match="features differ by"):
        measure(TINY, num_runs=1)


def test_what_disagrees_is_named():
    same = Agreement(
        accuracy_textbook=0.9,
        accuracy_ours=0.93,
        accuracy_replay=0.9,
        replay_agreement=0.98,
        feature_difference=0.01,
    )
    assert same.failures() == []
    assert replace(same, accuracy_ours=0.8).failures() == ["accuracy of ours differ by 0.100"]
    assert replace(same, feature_difference=float("nan")).failures() == ["features differ by nan"]


def test_the_limit_is_reached_by_heads_that_cost_nothing():
    assert limit(10, 8.0, 0.0) == 10
    assert limit(10, 8.0, 0.01) == pytest.approx(9.9875, abs=1e-4)
