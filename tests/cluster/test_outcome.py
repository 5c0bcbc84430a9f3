"""What a terminal is told of a run."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from headstart.cluster.pipeline import Outcome
from headstart.cluster.report.outcome import print_outcome


def told(
    ranking: list[dict[str, Any]], evaluation: dict[str, Any] | None = None, choice: dict[str, Any] | None = None
) -> str:
    """What is printed of a run, in one line."""
    console = Console(file=io.StringIO(), record=True, width=200)
    outcome = Outcome(
        path=Path("runs/mine"),
        summary={"name": "mine"},
        ranking={"ranking": ranking, "probe": "probe"},
        choice=choice,
        evaluation=evaluation,
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
    text = told([ENTRY], EVALUATION | scratch | {"verdict_control": "scratch"}, choice)
    assert f"control: {shown} from scratch" in text
    assert f"stronger control ({shown} from scratch)" in text


def test_a_source_that_is_passed_over_is_told_with_its_reason():
    entry = {"source": "broken", "available": False, "reason": "card.yaml cannot be read [here]"}
    assert "unavailable: broken: card.yaml cannot be read [here]" in told([entry])


def test_a_ranking_says_what_a_dash_in_the_place_of_a_distance_means():
    text = told([ENTRY])
    assert "│ - │" in text
    assert "- where a source has no sketch: finished runs have one" in text
