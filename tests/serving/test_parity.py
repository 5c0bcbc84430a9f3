"""The record of parity, number by number, from logits that are made up."""

from typing import Any

import numpy as np
import pytest

from headstart.serving.errors import PackageError
from headstart.serving.parity import prove_parity, same_size

IMAGES = [np.zeros((4, 4, 3), np.uint8)]


class Session:
    """Answers every image with the same logits, and with their softmax or other probabilities."""

    def __init__(self, logits: list[float], probabilities: list[float] | None = None) -> None:
        self.logits = np.float32([logits])
        exponents = np.exp(self.logits.astype(np.float64) - self.logits.max())
        self.probabilities = np.float32([probabilities] if probabilities else exponents / exponents.sum())

    def run(self, names: list[str], feed: dict[str, Any]) -> list[Any]:
        (images,) = feed.values()
        return [np.repeat(rows, len(images), axis=0) for rows in (self.logits, self.probabilities)]

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def prove(session: Any, theirs: list[float]) -> Any:
    return prove_parity(session, lambda images: np.float32([theirs] * len(images)), IMAGES, 1.0, len(theirs), 1e-3)


def test_a_difference_is_measured_against_the_largest_logit():
    for row in prove(Session([0.125, -200, 100]), [0, -200, 100]).rows:
        assert (row.difference, row.relative_difference) == (0.125, 0.125 / 200)
        assert (row.top1_agreement, row.num_disagreements) == (1, 0)
    with pytest.raises(PackageError, match="does not compute what PyTorch does"):
        prove(Session([0.25, -200, 100]), [0, -200, 100])


def test_a_tie_is_as_close_as_the_tolerance_and_the_largest_logit_say():
    for row in prove(Session([100.125, 100, -200]), [100, 100.125, -200]).rows:
        assert (row.top1_agreement, row.num_disagreements) == (0, 0)
    with pytest.raises(PackageError, match="change class"):  # each logit is close, and theirs are no tie
        prove(Session([100.15, 100.1, -200]), [100, 100.25, -200])


@pytest.mark.parametrize("wrong", [[float("nan"), 0.5], [0.5, 0.50002], [0.50002, 0.49998]])
def test_probabilities_are_the_softmax(wrong: list[float]):
    assert prove(Session([1, 1], [0.500001, 0.499999]), [1, 1])
    with pytest.raises(PackageError, match=r"away from softmax"):
        prove(Session([1, 1], wrong), [1, 1])


def test_images_of_many_sizes_are_cropped_around_their_middle():
    wide = np.arange(45, dtype=np.uint8).reshape(3, 5, 3)
    small = np.full((1, 1, 3), 77, np.uint8)
    assert same_size([wide, small], 3).tolist() == [[[[21, 22, 23]]], [[[77] * 3]], [[[21, 22, 23]]]]
    assert same_size([wide, small, wide], 2).tolist() == [wide.tolist()] * 2
