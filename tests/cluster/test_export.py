"""Variants that lose too much: the run says so, goes on with fp32, and leaves no stale package behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from headstart.cluster.commands import runs
from headstart.cluster.stages import export
from headstart.serving.manifest import VARIANTS
from headstart.serving.runtime import Predictor
from headstart.serving.variants import PARITY_TOLERANCES
from headstart.trainer.inputs.dataset import ImageArrays, LabelledImages
from headstart.trainer.recipe import Export

Run = Callable[..., Any]


@pytest.fixture
def outlier(tmp_path: Path) -> Path:
    """A graph one of whose channels is enormous between two layers: fp32 computes on, fp16 and int8 cannot."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Conv2d(3, 16, 16, 8), nn.Conv2d(16, 48, 5, 2), nn.Linear(48, 2)
            with torch.no_grad():
                self.first.weight[0], self.first.bias[0] = 1e4, 0
                self.second.weight[:, 0] *= 1e-8

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.second(self.first(pixels).relu()).relu().amax((2, 3)))
            return logits

    path = tmp_path / "outlier.onnx"
    torch.onnx.export(
        Net().eval(), (torch.zeros(2, 3, 224, 224),), path, dynamo=True, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    return path


def test_parity_is_proven_on_images_of_several_classes():
    """Data sets are often sorted by class, and the first validation images of one."""
    images = ImageArrays(tuple(np.full((2, 2, 3), value, np.uint8) for value in range(100)))
    labels = np.arange(100) // 10
    sorted_ones = LabelledImages(tuple("abcdefghij"), labels, images.digests(), images, images.grey())
    context: Any = SimpleNamespace(
        target=SimpleNamespace(part={"validation": sorted_ones}.get), recipe=SimpleNamespace(seed=0)
    )
    drawn = [int(image[0, 0, 0]) for image in export._samples(context)]
    assert len(set(drawn)) == len(drawn) == export.NUM_PARITY_SAMPLES
    assert len({labels[i] for i in drawn}) > 5


def test_variants_that_lose_too_much_are_told_and_left_out(
    headstart: Run, write_digits: Run, outlier: Path, tmp_path: Path
):
    data = write_digits(tmp_path / "images", 20)
    arguments = (
        "run", "folder", "--set", f"data.path={data}", "--set", "name=digits", "--set", "mode=feature",
        "--set", f"sources=['onnx:{outlier}']", "--set", "search.epochs=60",
    )  # fmt: skip
    ended = headstart(*arguments, "--set", "export.variants=[fp16, int8]", "--json")
    assert ended.code == 0, ended.stderr
    summary, run = ended.json(), tmp_path / "runs/digits"
    assert summary["package"] == "package"
    assert set(summary["variants"]) == {"fp16", "int8"}
    for name, reason in (("fp16", "fp16 ends at 65504"), ("int8", "more than 0.01 is lost")):
        found = summary["variants"][name]
        assert (found["package"], found["accuracy"]) == (None, None)
        assert reason in found["refused"]
        assert f"No {name} package" in ended.stderr
        assert not (run / f"package-{name}").exists()
    assert Predictor(run / "package").manifest.variant.name == "fp32"

    again = headstart("export", run)  # nothing is done again, and nothing is hidden
    assert again.code == 0, again.stderr
    assert "No int8 package" in again.stdout
    assert "more than 0.01 is lost" in " ".join(again.stdout.split())
    asked = headstart("export", run, "--variant", "int8", "--json")
    assert asked.code == 2
    assert asked.stdout == ""
    assert "error: int8 has" in asked.stderr

    # A new fp32 package takes the variants of the old one with it.
    shutil.copytree(run / "package", run / "package-int8")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["export"] |= {"variants": [], "features": False}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plain = headstart("export", run, "--json").json()
    assert plain["drift"] is None
    assert [output["name"] for output in plain["outputs"]] == ["logits", "probabilities"]
    assert not (run / "package-int8").exists()


def test_features_that_are_all_the_same_have_no_drift_record(headstart: Run, write_digits: Run, tmp_path: Path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 8, 16, 16), nn.Linear(8, 2)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(self.first(pixels).amax((2, 3)).clamp(5, 5))
            return logits

    torch.onnx.export(
        Net().eval(), (torch.zeros(2, 3, 224, 224),), tmp_path / "same.onnx", dynamo=True, external_data=False,
        verbose=False, dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    data = write_digits(tmp_path / "images", 20, num_classes=2)
    ended = headstart(
        "run", "folder", "--set", f"data.path={data}", "--set", "name=same", "--set", "mode=feature",
        "--set", f"sources=['onnx:{tmp_path / 'same.onnx'}']", "--set", "search.epochs=1",
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    manifest = Predictor(tmp_path / "runs/same/package").manifest
    assert manifest.drift is None
    assert [output.name for output in manifest.outputs] == ["logits", "probabilities"]


def test_every_room_knows_the_same_variants():
    recipe = get_args(get_args(get_type_hints(Export)["variants"])[0])
    option = get_args(get_args(get_args(get_type_hints(runs.export, include_extras=True)["variant"])[0])[0])
    assert recipe == option == tuple(PARITY_TOLERANCES) == VARIANTS[1:]


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("export.variants=[int4]", "export.variants"),
        ("export.variants=[int8, int8]", "each once at most"),
        ("export.max_loss=1", "export.max_loss is 1"),
    ],
)
def test_an_export_that_cannot_be_is_refused(headstart: Run, tmp_path: Path, setting: str, reason: str):
    ended = headstart("run", "folder", "--set", f"data.path={tmp_path}", "--set", setting)
    assert ended.code == 2
    assert reason in ended.stderr


def test_a_variant_that_cannot_be_is_refused_by_its_option(headstart: Run, tmp_path: Path):
    ended = headstart("export", tmp_path, "--variant", "int4")
    assert ended.code == 2
    said = " ".join(ended.stderr.split())
    assert "--variant" in said
    assert "'int4' is not one of 'fp16', 'int8'" in said
