"""What the tests of single stages are given."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from headstart.cluster.connect import Connection
from headstart.cluster.recipe_file import load_recipe
from headstart.cluster.stages.context import Context, Reporter
from headstart.cluster.stages.run_directory import RunDirectory
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.selection.ranking import Target


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """Digits, of which the test images repeat one for training, twice, and one for validation."""
    recipe = load_recipe("folder", ["data.path=sklearn:digits", "seed=4"])
    images = load_images(recipe.data, tmp_path).subset([*range(520), 0, 0, 100])
    parts = {"train": np.arange(100), "validation": np.arange(100, 160), "test": np.arange(160, 523)}
    with RunDirectory(tmp_path / "run", {}) as directory:
        yield Context(
            recipe=recipe, target=Target(images=images, parts=parts), data_key="", run=directory, cache=tmp_path,
            connection=Connection(), reporter=Reporter(),
        )  # fmt: skip
