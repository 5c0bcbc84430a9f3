"""One small exported package, made once, that the serving tests copy and damage."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F

from headstart.serving.export import export_package

LABELS = ["sky", "petal", "leaf", "roof", "water"]


class Pixels(nn.Module):
    """uint8 [N, H, W, 3] -> float32 [N, 3, crop, crop]: the resize and crop of the trainer, written small."""

    def __init__(self, resize: int, crop: int) -> None:
        super().__init__()
        self.resize, self.crop = resize, crop

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / 255
        height, width = pixels.shape[-2:]
        short = torch.sym_min(height, width)
        size: Any = (self.resize * height // short, self.resize * width // short)
        pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
        top, left = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        return pixels.narrow(-2, top, self.crop).narrow(-1, left, self.crop) * 4 - 2


class Net(nn.Module):
    """float32 [N, 3, S, S] -> logits [N, C], with BatchNorm whose running statistics are not the batch's."""

    def __init__(self, num_labels: int, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU()
        )
        self.head = nn.Linear(16, num_labels)
        norm: Any = self.layers[1]
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(pixels).mean((2, 3)))


@dataclass(frozen=True)
class Model:
    """A model, and all that `export_package` wants to know of it."""

    stages: list[Any]
    reference: Callable[[NDArray[np.uint8]], NDArray[np.float32]]
    samples: list[NDArray[np.uint8]]

    def export(self, directory: Path, **changes: Any) -> Any:
        fields: dict[str, Any] = {
            "name": "small",
            "stages": self.stages,
            "labels": LABELS,
            "temperature": 1.5,
            "reference": self.reference,
            "samples": self.samples,
            "preprocessing": {"resize": 36, "crop": 32},
            "licence": "not stated",
            "provenance": {"recipe": "0" * 64},
        }
        return export_package(directory, **{**fields, **changes})


def answer(*stages: nn.Module) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    model = copy.deepcopy(nn.Sequential(*stages)).eval()

    def reference(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            return model(torch.from_numpy(np.array(images))).numpy()

    return reference


@pytest.fixture(scope="session")
def photographs() -> list[NDArray[np.uint8]]:
    """20 pieces of two real photographs, 40 x 48; every fifth is 44 x 52."""
    images = load_sample_images().images
    pieces = []
    for index in range(20):
        height, width = (44, 52) if index % 5 == 4 else (40, 48)
        top, left = 17 * index, 29 * index
        pieces.append(images[index % 2][top : top + height, left : left + width])
    return pieces


@pytest.fixture(scope="session")
def model(photographs: list[NDArray[np.uint8]]) -> Model:
    torch.set_num_threads(2)
    stages = [Pixels(36, 32), Net(len(LABELS))]
    return Model(stages, answer(*stages), photographs)


@pytest.fixture(scope="session")
def pristine(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package; read it, do not write to it."""
    directory = tmp_path_factory.mktemp("package") / "small"
    model.export(directory, latency_runs=20)
    return directory


@pytest.fixture
def package(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the package, to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "package"))
