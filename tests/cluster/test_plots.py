"""The pictures of a run."""

from pathlib import Path

import numpy as np
from PIL import Image

from headstart.cluster.report.plots import plot_confusion


def test_names_of_classes_are_no_formulas(tmp_path: Path):
    picture = tmp_path / "confusion.png"
    plot_confusion(picture, np.array([0, 1, 1]), np.array([0, 1, 0]), ("$_$", r"$\frac$"), "prices")
    with Image.open(picture) as image:
        assert np.asarray(image.convert("L")).std() > 5
