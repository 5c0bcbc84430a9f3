"""A run's models: their sources may go while it is at work."""

from pathlib import Path

import pytest

from headstart.cluster.connect import Connection
from headstart.cluster.recipe_file import load_recipe
from headstart.cluster.stages.context import Context, Reporter
from headstart.cluster.stages.model import load_source
from headstart.cluster.stages.run_directory import RunDirectory
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.selection.ranking import Target
from headstart.trainer.selection.sources import resolve


def test_a_source_that_is_altered_during_the_run_is_told(tmp_path: Path):
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(b"not read here")
    recipe = load_recipe("folder", ["data.path=sklearn:digits", f"sources=['onnx:{graph}']"])
    with RunDirectory(tmp_path / "run", {}) as directory:
        context = Context(
            recipe=recipe, target=Target(images=load_images(recipe.data, tmp_path), parts={}), data_key="",
            run=directory, cache=tmp_path, connection=Connection(), reporter=Reporter(),
        )  # fmt: skip
        ranked = resolve(recipe.sources, tmp_path)[0].card.name
        graph.write_bytes(b"trained a little longer")
        with pytest.raises(SourceError, match=f"{ranked} was taken away, or its file altered"):
            load_source(context, ranked)
