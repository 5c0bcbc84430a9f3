"""Whether the two programs come to the same: without that a ratio of their times would mean nothing."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.textbook.programs import Ours, Textbook, replay
from benchmarks.textbook.workload import Workload
from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.features import extract_features
from headstart.trainer.inputs.dataset import ImageFiles
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.recipe import Data


class DisagreementError(Exception):
    """The two programs did not come to the same, so that a ratio of their times would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Whether the two programs came to the same, on held-out images."""

    accuracy_textbook: float
    accuracy_ours: float
    """Of our head; it differs from theirs in its initialisation and in standardising the features."""
    accuracy_replay: float
    """Of the textbook's own head trained on our cached features: what the cache alone changes."""
    replay_agreement: float
    """Share of images that the textbook's head and its replay put into the same class."""
    feature_difference: float
    """Frobenius norm of the difference between the features of both, relative to the textbook's: Pillow's resize
    rounds to whole grey levels, ours does not."""

    LIMIT = 0.05

    def failures(self) -> list[str]:
        """Say what differs by more than 5 points, 5% of the images or 5% of the features' norm."""
        found = {
            "accuracy of ours": abs(self.accuracy_ours - self.accuracy_textbook),
            "accuracy of the replay": abs(self.accuracy_replay - self.accuracy_textbook),
            "classes of the replay": 1 - self.replay_agreement,
            "features": self.feature_difference,
        }
        return [f"{name} differ by {value:.3f}" for name, value in found.items() if not value <= self.LIMIT]


def agreement(workload: Workload, textbook: Textbook, backbone: Backbone, run: Ours, cache: Path) -> Agreement:
    """Compare the heads and the features on the held-out images."""
    theirs, files = textbook.held_out()
    images = load_images(Data(path=str(textbook.folder / "test")), cache)
    assert isinstance(images.storage, ImageFiles)
    assert list(images.storage.paths) == files, "the two programs list the files in different orders"
    features = extract_features(backbone, images, cache).tensor()
    labels = torch.from_numpy(images.labels)
    predictions = {
        "textbook": textbook.head.linear(theirs).argmax(1),
        "ours": run.head(features).argmax(1),
        "replay": replay(workload, textbook, run.features)(features).argmax(1),
    }
    accuracies = {f"accuracy_{name}": _share(found == labels) for name, found in predictions.items()}
    return Agreement(
        **accuracies,
        replay_agreement=_share(predictions["textbook"] == predictions["replay"]),
        feature_difference=float((theirs - features).norm() / theirs.norm()),
    )


def _share(true: Tensor) -> float:
    return float(true.double().mean())
