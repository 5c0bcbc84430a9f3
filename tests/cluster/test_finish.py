"""What the evaluation reports, from outcomes that are known."""

import numpy as np
import pytest
import torch

from headstart.cluster.stages.context import Context
from headstart.cluster.stages.finish import _conclude, _raw_pixels
from headstart.trainer.evaluation import (
    accuracy_interval,
    mcnemar_p_value,
    paired_interval,
    raw_pixels_control,
)
from headstart.trainer.inputs.batches import to_pixels
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing


def right(num: int, of: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(of) < num


def conclude(context: Context, mode: str, correct: np.ndarray, controls: dict[str, np.ndarray]) -> dict:
    labels = torch.from_numpy(context.target.part("test").labels)
    logits = 3 * torch.nn.functional.one_hot(torch.where(torch.from_numpy(correct), labels, (labels + 1) % 10), 10)
    return _conclude(context, {"mode": mode}, logits.float(), 1.5, correct, controls)


def test_a_model_is_compared_with_the_stronger_control_image_by_image(context: Context):
    labels = context.target.part("test").labels
    correct, weak, strong = right(330, 363, 0), right(200, 363, 1), right(280, 363, 2)
    for controls in ({"scratch": weak, "raw_pixels": strong}, {"scratch": strong, "raw_pixels": weak}):
        found = conclude(context, "feature", correct, controls)
        against = next(name for name, outcome in controls.items() if outcome is strong)
        assert found["verdict_control"] == against
        assert found["verdict_interval"] == list(paired_interval(correct, strong, seed=4))
        assert found["verdict_p_value"] == mcnemar_p_value(correct, strong)
        assert found["verdict"] == "transfer"
        assert found["test"] == {
            "accuracy": pytest.approx(330 / 363), "interval": list(accuracy_interval(correct)), "num_samples": 363,
        }  # fmt: skip
        assert found["controls"] == {
            name: {"accuracy": pytest.approx(outcome.mean()), "interval": list(accuracy_interval(outcome))}
            for name, outcome in controls.items()
        }
    shares = {str(label): correct[labels == label].mean() for label in range(10)}
    assert found["class_accuracy"] == pytest.approx(shares)
    assert len(set(shares.values())) > 5
    sure = np.exp(2) / (np.exp(2) + 9)  # logits 3 at temperature 1.5
    assert found["calibration_error"] == pytest.approx(330 / 363 - sure, abs=1e-6)
    assert found["num_test_images_also_in_training"] == 3


def test_a_model_worse_than_its_control_is_no_transfer(context: Context):
    found = conclude(context, "finetune", right(200, 363, 0), {"raw_pixels": right(300, 363, 1)})
    assert found["verdict"] == "no transfer"
    assert found["verdict_interval"][1] < 0
    assert found["controls"]["scratch"] is None


def test_a_model_from_scratch_has_no_verdict(context: Context):
    found = conclude(context, "scratch", right(330, 363, 0), {"raw_pixels": right(200, 363, 1)})
    assert [found[name] for name in ("verdict", "verdict_interval", "verdict_p_value", "verdict_control")] == [None] * 4
    assert found["controls"]["raw_pixels"]["accuracy"] == pytest.approx(200 / 363)


def test_the_raw_pixel_control_learns_from_training_images_and_is_chosen_on_validation_images(context: Context):
    grey = Preprocess(Preprocessing(resize=16, crop=16, channels=1, mean=(0.0,), std=(1.0,)))
    parts = [context.target.part(name) for name in ("train", "validation", "test")]
    train, validation, test = (
        to_pixels([part.image(i) for i in range(len(part))], grey).flatten(1).numpy() for part in parts
    )
    predicted = raw_pixels_control(train, parts[0].labels, validation, parts[1].labels, test)
    np.testing.assert_array_equal(_raw_pixels(context), predicted == parts[2].labels)
