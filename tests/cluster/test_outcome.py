"""What a terminal is told of a run."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headstart.cluster.pipeline import Outcome
from headstart.cluster.report.outcome import print_outcome
from headstart.trainer.inputs.dataset import some


def told(
    ranking: list[dict[str, Any]],
    evaluation: dict[str, Any] | None = None,
    choice: dict[str, Any] | None = None,
    width: int = 200,
    **package: Any,
) -> str:
    """What is printed of a run, in one line."""
    console = Console(file=io.StringIO(), record=True, width=width)
    outcome = Outcome(
        path=Path("runs/[/x]/[y] mine"),
        summary={"name": "mine"},
        ranking={"ranking": ranking, "probe": "probe"},
        choice=choice,
        evaluation=evaluation,
        **package,
    )
    print_outcome(outcome, console)
    return " ".join(console.export_text().split())


FIGURES = {"accuracy": 0.9, "interval": [0.7, 1.0]}
EVALUATION = {
    "test": FIGURES | {"num_samples": 30},
    "controls": {"scratch": None, "raw_pixels": FIGURES},
    "verdict": "unclear",
    "verdict_interval": [0.0333, 0.25],
    "verdict_p_value": 1.0,
    "verdict_control": "raw_pixels",
    "temperature": 1.0,
    "calibration_error": 0.0,
    "num_test_images_also_in_training": 0,
    "num_test_images_nearly_in_training": 0,
    "largest_class": {"name": "a", "share": 0.5},
    "num_repeated_test_images": 0,
    "num_contents_of_several_classes": 0,
}
ENTRY = {"source": "a", "available": True, "architecture": "resnet18", "distances": None, "seconds": 1.0}
ENTRY |= {"licence": "MIT"} | dict.fromkeys(("knn", "ridge", "score", "audition_accuracy"), 0.5)


@pytest.mark.parametrize(("p_value", "shown"), [(3e-14, "p < 0.0001"), (0.125, "p = 0.1250")])
def test_the_p_value_stands_beside_the_interval(p_value: float, shown: str):
    evaluation = EVALUATION | {"verdict_p_value": p_value}
    assert f"image by image: [+0.0333, +0.2500] at 95%, McNemar's exact {shown}." in told([], evaluation)


@pytest.mark.parametrize(("architecture", "shown"), [("resnet18", "the same architecture"), ("resnet34", "resnet34")])
def test_the_control_is_called_the_same_architecture_where_it_is(architecture: str, shown: str):
    scratch = {"controls": {"scratch": FIGURES | {"architecture": architecture}, "raw_pixels": FIGURES}}
    choice = {"source": "a", "mode": "feature", "reason": "it is asked for"}
    chosen = {"test": {"accuracy": 0.95, "interval": [0.8, 0.99], "num_samples": 30}}
    text = told([ENTRY], EVALUATION | scratch | chosen | {"verdict_control": "scratch"}, choice)
    assert "│ a, feature │ 0.9500 │ [0.8000, 0.9900] │" in text
    assert "│ control: raw 16x16 pixels │ 0.9000 │ [0.7000, 1.0000] │" in text
    assert f"control: {shown} from scratch" in text
    assert f"stronger control ({shown} from scratch)" in text


def test_from_scratch_there_is_no_verdict_and_test_images_in_training_are_told():
    none = dict.fromkeys(("verdict", "verdict_interval", "verdict_p_value", "verdict_control"))
    text = told([], EVALUATION | none | {"num_test_images_also_in_training": 3})
    assert "Verdict" not in text
    assert "; 3 test images are also among those learned from." in text


def test_the_largest_class_is_told_where_the_model_may_do_no_better_than_naming_it():
    assert "largest class" not in told([], EVALUATION)
    text = told([], EVALUATION | {"largest_class": {"name": "[x]", "share": 0.7}})
    assert "Always naming the largest class, [x], would be right for 0.7000 of the test images" in text


def test_an_energy_below_0_is_explained():
    near, far = ({"distances": {"energy": energy, "euclidean": 0.0}} for energy in (-0.2, 0.2))
    assert "Energies around 0, or below, are those of two samples of one task." in told([ENTRY | near, ENTRY])
    assert "Energies around 0" not in told([ENTRY | far, ENTRY])


def test_test_images_saved_anew_are_told_where_there_are_any():
    assert "saved anew" not in told([], EVALUATION)
    text = told([], EVALUATION | {"num_test_images_nearly_in_training": 4})
    assert "Test images that look like one of those learned from, saved anew: 4." in text


def test_repeated_test_images_are_told_where_there_are_any():
    assert "repeat" not in told([], EVALUATION)
    text = told([], EVALUATION | {"num_repeated_test_images": 9})
    assert "Test images that repeat an earlier one: 9. The intervals take them for new ones." in text


def test_images_under_several_classes_are_told_where_there_are_any():
    assert "more than one class" not in told([], EVALUATION)
    text = told([], EVALUATION | {"num_contents_of_several_classes": 2})
    assert "Images that the data has under more than one class: 2." in text


def test_of_parity_the_worst_batch_is_told_and_of_latency_each_at_its_place():
    rows = [
        {"batch": 1, "relative_difference": 1e-6, "top1_agreement": 1.0},
        {"batch": 16, "relative_difference": 3e-6, "top1_agreement": 0.9375},
    ]
    latency = {
        "predict_p50_ms": 0.5,
        "session_run_p50_ms": 0.4,
        "ratio": 1.25,
        "shape": [1, 8, 8, 3],
        "provider": "CPU",
    }
    manifest = {"licence": "MIT", "parity": {"rows": rows}, "latency": latency}
    variant = {"accuracy": 0.9, "num_images": 60, "fp32_accuracy": 0.91, "max_loss": 0.02, "latency_ms": 0.2}
    variants = {
        "int8": {"refused": None, "manifest": manifest | {"variant": variant | {"fp32_latency_ms": 0.3}}},
        "fp16": {"refused": "0.5 is lost", "manifest": None},
    }
    text = told([], manifest=manifest, variants=variants)
    assert "at batches 1, 16: logits within 3e-06 of the largest, top-1 agreement 0.9375." in text
    assert "Prediction p50 0.500 ms, bare session.run 0.400 ms (ratio 1.250), one 1x8x8x3 image, CPU." in text
    assert (
        "int8: runs/[/x]/[y] mine/package-int8: accuracy 0.9000 on 60 validation images (fp32 0.9100, 0.02 may be "
        "lost), top-1 agreement 0.9375; p50 0.200 ms (fp32 0.300 ms, in turns)."
    ) in text
    assert "No fp16 package: 0.5 is lost" in text
    assert "Package: runs/[/x]/[y] mine/package (licence: MIT)" in text
    assert "Source: runs/[/x]/[y] mine/source. Summary: runs/[/x]/[y] mine/summary.json" in text


def test_a_source_that_is_passed_over_is_told_with_its_reason():
    entry = {"source": "broken", "available": False, "reason": "card.yaml cannot be read [here]"}
    assert "unavailable: broken: card.yaml cannot be read [here]" in told([entry])


def test_each_figure_of_a_source_stands_in_its_column():
    figures = {"knn": 0.1, "ridge": 0.2, "score": 0.3, "audition_accuracy": 0.4, "seconds": 6.0}
    text = told([ENTRY | figures | {"distances": {"energy": 1.5, "euclidean": 2.5}}])
    assert "source ┃ k-NN ┃ ridge ┃ score ┃ audition ┃ energy ┃ Euclidean ┃ seconds ┃ licence ┃" in text
    assert "│ a │ 0.1000 │ 0.2000 │ 0.3000 │ 0.4000 │ 1.5 │ 2.5 │ 6.0 │ MIT │" in text


NARROW = {
    200: "source ┃ k-NN ┃ ridge ┃ score ┃ audition ┃ energy ┃ Euclidean ┃ seconds ┃ licence",
    113: "source ┃ k-NN ┃ ridge ┃ score ┃ audition ┃ energy ┃ Euclidean ┃ seconds ┃ licence",
    100: "source ┃ score ┃ audition ┃ energy ┃ Euclidean ┃ seconds ┃ licence",
    80: "source ┃ score ┃ audition ┃ energy ┃ licence",
    60: "source ┃ audition ┃ licence",
    40: "source ┃ audition ┃ licence",
}


@pytest.mark.parametrize("width", NARROW)
def test_a_narrow_ranking_goes_without_columns_and_cuts_no_number(width: int):
    figures = {"knn": 0.1111, "ridge": 0.2222, "score": 0.3333, "audition_accuracy": 0.4444, "seconds": 12.3}
    entry = ENTRY | figures | {"source": "efficientnet-lite0-imagenet", "licence": "Apache-2.0"}
    entry |= {"distances": {"energy": 12.51, "euclidean": 15.84}}
    text = told([entry, entry | {"licence": "https://example.org/" + 40 * "a"}], width=width)
    assert f"┃ {NARROW[width]} ┃" in text
    assert "…" not in text
    cells = {"k-NN": "0.1111", "ridge": "0.2222", "score": "0.3333", "audition": "0.4444", "energy": "12.51"}
    cells |= {"source": "efficientnet-lite0-imagenet", "Euclidean": "15.84", "seconds": "12.3", "licence": "Apache-2.0"}
    shown = NARROW[width].split(" ┃ ")
    if width > 40:  # where the name of the source is folded
        assert f"│ {' │ '.join(cells[name] for name in shown)} │" in text
    else:
        assert "│ 0.4444 │ Apache-2.0 │" in text
    left_out = [name for name in ("k-NN", "ridge", "Euclidean", "seconds", "energy", "score") if name not in shown]
    assert ("Left out for want of width" in text) == bool(left_out)
    assert f"{', '.join(left_out)}; ranking.json has them" in text or not left_out


def test_a_ranking_says_what_a_dash_in_the_place_of_a_distance_means():
    text = told([ENTRY])
    assert "│ - │" in text
    assert "- where a source has no sketch: finished runs have one" in text


def test_sources_that_are_unavailable_for_one_reason_are_told_in_one_line():
    far = [ENTRY | {"source": f"run-{number}", "available": False, "reason": "too far"} for number in range(300)]
    gone = ENTRY | {"source": "gone", "available": False, "reason": "no network"}
    text = told([ENTRY, *far, gone])
    assert text.count("too far") == 1
    assert f"unavailable: {some([one['source'] for one in far])}: too far" in text
    assert "unavailable: gone: no network" in text
