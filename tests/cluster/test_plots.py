"""The pictures of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image

from headstart.cluster.report import plots
from headstart.cluster.report.plots import font_families, plot_confusion, plot_learning


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures of a test."""
    figures: list[Figure] = []

    class Kept(Figure):
        def __init__(self, **how: Any) -> None:
            super().__init__(**how)
            figures.append(self)

    monkeypatch.setattr(plots, "Figure", Kept)
    return figures


def test_names_of_classes_are_no_formulas(tmp_path: Path):
    picture = tmp_path / "confusion.png"
    plot_confusion(picture, np.array([0, 1, 1]), np.array([0, 1, 0]), ("$_$", r"$\frac$"), "prices")
    with Image.open(picture) as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_a_font_that_has_the_names_is_found_where_one_is_installed(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    assert font_families("Ärger 12") == ["DejaVu Sans"]
    of_stix = "\u20ec\u1d81"  # which DejaVu Sans lacks
    plot_confusion(tmp_path / "confusion.png", np.array([0, 1]), np.array([0, 1]), (of_stix, "b"), "mine")
    plot_learning(tmp_path / "learning.png", {"fit": _fit(of_stix)}, of_stix)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    files = {font_manager.findfont(family) for family in font_families(of_stix)}
    assert set(map(ord, of_stix)) <= set().union(*(font_manager.get_font(file).get_charmap() for file in files))


def test_a_row_of_the_confusion_matrix_is_a_true_class(drawn: list[Figure], tmp_path: Path):
    labels, predicted = np.array([0, 0, 0, 0, 1]), np.array([0, 0, 0, 2, 0])
    plot_confusion(tmp_path / "confusion.png", labels, predicted, ("a", "b", "absent"), "mine")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.75, 0, 0.25], [1, 0, 0], [0, 0, 0]]  # type: ignore[union-attr]
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    assert counts == {(0, 0): "3", (2, 0): "1", (0, 1): "1"}
    assert axes.get_title() == "mine: 60.0% of 5 test images right"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_a_matrix_of_many_classes_has_them_all_and_no_numbers(drawn: list[Figure], tmp_path: Path):
    labels = np.arange(200)
    plot_confusion(tmp_path / "confusion.png", labels, labels, tuple(map(str, labels)), "mine")
    axes = drawn[0].axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), np.eye(200))
    assert not axes.texts


def test_of_very_many_classes_those_that_most_mistakes_are_of_are_drawn(drawn: list[Figure], tmp_path: Path):
    labels = np.repeat(np.arange(201), 3)
    predicted = labels.copy()
    predicted[600:] = 7
    predicted[60:111:3] += 100  # one of each of 20 to 36; what it is taken for is as often mistaken, and comes later
    plot_confusion(tmp_path / "confusion.png", labels, predicted, tuple(f"c{i}" for i in range(201)), "mine")
    axes = drawn[0].axes[0]
    kept = ["c7", *(f"c{i}" for i in range(20, 37)), "c200", "182 others"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == kept
    counts = {text.get_position(): text.get_text() for text in axes.texts}
    alike = {(i, i): "2" for i in range(1, 18)} | {(19, i): "1" for i in range(1, 18)}
    assert counts == alike | {(0, 0): "3", (0, 18): "3", (19, 19): "546"}
    assert axes.get_title() == "mine: 96.7% of 603 test images right"


def test_the_chosen_rate_is_drawn_with_its_training_images(drawn: list[Figure], tmp_path: Path):
    plot_learning(tmp_path / "learning.png", {"control": _fit("net")}, "mine")
    lines = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in drawn[0].axes[0].lines}
    assert lines == {
        "scratch (net), rate 0.1": [[1, 0.1 + 0.1], [2, 0.1 + 0.2]],
        "scratch, training images": [[1, 0.9], [2, 0.9]],
        "scratch (net), rate 0.2 (not chosen)": [[1, 0.2 + 0.1], [2, 0.2 + 0.2]],
    }


def _fit(source: str) -> dict[str, Any]:
    rows = [
        {"peak_learning_rate": rate, "epoch": epoch, "validation_accuracy": rate + epoch / 10, "train_accuracy": 0.9}
        for rate in (0.1, 0.2) for epoch in (1, 2)
    ]  # fmt: skip
    return {"mode": "scratch", "source": source, "learning_rate": 0.1, "rows": rows}
