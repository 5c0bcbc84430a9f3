"""Small real files for the readers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headstart.trainer.errors import DataError
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.recipe import Data


@pytest.fixture
def make_image():
    """make_image(path, value): a 6x5 PNG whose pixels depend on value, so that no two are the same."""

    def make(path: Path, value: int = 0) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(value).integers(0, 256, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    return make


@pytest.fixture
def make_folder(tmp_path, make_image):
    """make_folder(cat=3, dog=2): a folder of class folders; names may hold a part, as in {"train/cat": 3}."""

    def make(sizes: dict[str, int] | None = None, *, name: str = "data", **more: int) -> Path:
        for i, (folder, size) in enumerate(((sizes or {}) | more).items()):
            (tmp_path / name / folder).mkdir(parents=True)
            for j in range(size):
                make_image(tmp_path / name / folder / f"{j}.png", 1000 * i + j)
        (tmp_path / name).mkdir(exist_ok=True)
        return tmp_path / name

    return make


@pytest.fixture
def load(tmp_path):
    """load(path, unreadable="skip"): a recipe's labelled images, with a cache of the test's own."""

    def loading(path: Path | str, progress=None, **options: str):
        return load_images(Data(path=str(path), **options), tmp_path / "cache", progress)

    return loading


@pytest.fixture
def refused(load):
    """refused(path, "said", ...): the message of the DataError, which must hold these texts."""

    def refusing(path: Path | str, *said: str, **options: str) -> str:
        with pytest.raises(DataError) as caught:
            load(path, **options)
        for text in said:
            assert text in str(caught.value)
        return str(caught.value)

    return refusing
