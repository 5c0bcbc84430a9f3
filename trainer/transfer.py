"""The modes: what is taken over from a source, and what of it is trained on.

| mode       | starts from                           | trains           | BatchNorm statistics     |
| ---------- | ------------------------------------- | ---------------- | ------------------------ |
| `feature`  | the source, frozen                    | the head         | the source's, untouched  |
| `finetune` | the source and the trained head       | everything       | the source's, frozen     |
| `full`     | the source and a new head             | everything       | adapted to the target    |
| `scratch`  | the architecture's own random start   | everything       | learned from nothing     |

`finetune` is LP-FT: a head trained first keeps the first steps from distorting the features (Kumar et al. 2022,
arXiv 2202.10054). Its statistics stay the source's because a target with few labels gives worse ones.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from headstart.trainer.backbones.backbone import Backbone, build_architecture
from headstart.trainer.recipe import Mode


class Classifier(nn.Module):
    """A backbone and a head: pixels [N, C, S, S] to logits [N, C]."""

    def __init__(self, backbone: nn.Module, head: nn.Linear, *, freeze_statistics: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.freeze_statistics = freeze_statistics

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, C]."""
        logits: Tensor = self.head(self.backbone(pixels))
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """Switch to training; with frozen statistics BatchNorm stays in evaluation."""
        super().train(mode)
        if self.freeze_statistics:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self


def build_classifier(
    mode: Mode, backbone: Backbone, num_classes: int, *, head: nn.Linear | None, seed: int
) -> Classifier:
    """Return the model that `mode` starts training from.

    `head` is the trained head that `finetune` starts from. Raises `ValueError` for a mode that trains no backbone,
    a backbone that cannot be trained, and `finetune` without a head.
    """
    if mode not in ("finetune", "full", "scratch"):
        raise ValueError(f"mode {mode} trains no backbone; accepted: finetune, full, scratch")
    if backbone.module is None:
        raise ValueError(f"backbone {backbone.name} is a frozen ONNX graph; it can be used in mode feature alone")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new_head = nn.Linear(backbone.num_features, num_classes)
        module = build_architecture(backbone.architecture)[0] if mode == "scratch" else backbone.module
    if mode != "finetune":
        return Classifier(module, new_head)
    if head is None:
        raise ValueError("mode finetune starts from a trained head, and none was given")
    return Classifier(module, head, freeze_statistics=True)
