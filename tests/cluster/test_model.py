"""A run's models: their sources may go while it is at work."""

import dataclasses
from pathlib import Path

import pytest
import torch

from headstart.cluster.connect import Connection
from headstart.cluster.recipe_file import load_recipe
from headstart.cluster.stages.context import Context, Reporter
from headstart.cluster.stages.model import load_source
from headstart.cluster.stages.run_directory import RunDirectory
from headstart.trainer.backbones.architectures import build_architecture
from headstart.trainer.errors import SourceError
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.selection.ranking import Target
from headstart.trainer.selection.registry import register
from headstart.trainer.selection.sources import Sketch, catalog, find_source, resolve, write_source


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
        with pytest.raises(SourceError, match=f"{ranked} was taken away, or altered, .*: headstart run .*recipe.yaml"):
            load_source(context, ranked)


def test_the_head_of_a_source_is_not_put_on_another_of_its_name(context: Context, tmp_path: Path):
    def register_mine(seed: int) -> None:
        torch.manual_seed(seed)
        module, _ = build_architecture("headstart:mtcnn-onet")
        sketch = Sketch(features=torch.zeros(1, 2), labels=torch.zeros(1).long(), mean=torch.zeros(2), probe="probe")
        card = dataclasses.replace(catalog()["mtcnn-onet"], name="mine")
        write_source(tmp_path / "source", card, module.state_dict(), {"bias": torch.zeros(2)}, sketch)
        register(tmp_path / "source", context.cache)

    register_mine(seed=0)
    fingerprint = find_source("mine", "all", context.cache).fingerprint
    ranked = {"sources": {"mine": fingerprint}}
    context.run.stage("rank", {}, lambda: [], lambda: (ranked, []))
    before = load_source(context, "mine").fingerprint
    register_mine(seed=0)  # its run was given again
    assert load_source(context, "mine").fingerprint == before
    register_mine(seed=1)
    with pytest.raises(SourceError, match="source mine was taken away, or altered, since it was ranked"):
        load_source(context, "mine")
