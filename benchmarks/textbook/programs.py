"""The two programs: the textbook's, which passes every image through the backbone in every epoch, and ours."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.textbook.workload import SEED, Workload
from headstart.trainer.backbones.architectures import IMAGENET_MEAN, IMAGENET_STD
from headstart.trainer.backbones.backbone import Backbone, load_backbone
from headstart.trainer.backbones.card import SourceCard
from headstart.trainer.backbones.weights import file_sha256
from headstart.trainer.features import extract_features
from headstart.trainer.heads import HeadBank, HeadSetting
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.recipe import Data


class Head:
    """The textbook's head: a linear layer under SGD, wherever its features come from."""

    def __init__(self, num_features: int, workload: Workload) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.linear = nn.Linear(num_features, workload.num_classes)
        steps = workload.epochs * math.ceil(workload.num_train / workload.batch_size)
        self.optimizer = torch.optim.SGD(
            self.linear.parameters(), lr=workload.learning_rate, momentum=0.9, nesterov=True
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)

    def step(self, features: Tensor, labels: Tensor) -> None:
        """Take one step on features [B, D] with labels [B]."""
        loss = nn.functional.cross_entropy(self.linear(features), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()


class Textbook:
    """Transfer learning as tutorials have it: frozen backbone, new head, every image through both in every epoch."""

    def __init__(self, workload: Workload, weights: Path, folder: Path) -> None:
        self.backbone = textbook_backbone(workload.model, weights)
        self.transform = transforms.Compose(
            [
                transforms.Resize(workload.resize),
                transforms.CenterCrop(workload.crop),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )
        self.batch_size = workload.batch_size
        self.folder = folder
        self.train = ImageFolder(str(folder / "train"), self.transform)
        # The sampler has a generator of its own, so that `replay` can draw the same order.
        sampler = RandomSampler(self.train, generator=torch.Generator().manual_seed(SEED))
        self.loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            self.train, batch_size=workload.batch_size, sampler=sampler
        )
        with torch.no_grad():
            num_features = self.backbone(torch.zeros(1, 3, workload.crop, workload.crop)).shape[1]
        self.head = Head(num_features, workload)

    def epoch(self) -> None:
        """Pass all training images through the backbone and take the head's steps."""
        for pixels, labels in self.loader:
            self.head.step(self._features(pixels), labels)

    def held_out(self) -> tuple[Tensor, list[str]]:
        """Features [N, D] of the held-out images, and their files."""
        images = ImageFolder(str(self.folder / "test"), self.transform)
        features = [self._features(pixels) for pixels, _ in DataLoader(images, batch_size=self.batch_size)]
        return torch.cat(features), [path for path, _ in images.samples]

    def _features(self, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = self.backbone(pixels.contiguous(memory_format=torch.channels_last))
        return features


def textbook_backbone(model: str, weights: Path) -> nn.Module:
    """Return torchvision's model with `weights` in it, without its classifier, frozen."""
    backbone: nn.Module = torchvision.models.get_model(model, weights=None)
    safe = weights.suffix == ".safetensors"
    backbone.load_state_dict(load_file(weights) if safe else torch.load(weights, weights_only=True))
    setattr(backbone, "fc" if hasattr(backbone, "fc") else "classifier", nn.Identity())
    return backbone.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def our_backbone(workload: Workload, weights: Path, cache: Path) -> Backbone:
    """Return the same model in our hands."""
    card = SourceCard(
        name=workload.model,
        task="the benchmark's weights",
        architecture=f"torchvision:{workload.model}",
        weights=f"file:{weights}",
        sha256=file_sha256(weights),
        preprocessing=workload.preprocessing,
    )
    return load_backbone(card, cache)


@dataclass(frozen=True, kw_only=True)
class Ours:
    """What one run of ours came to."""

    features: Tensor
    head: nn.Linear
    heads_seconds: float


def ours(workload: Workload, backbone: Backbone, folder: Path, cache: Path) -> Ours:
    """One pass over the images into an empty cache, then all epochs of the head on what is cached."""
    images = load_images(Data(path=str(folder / "train")), cache)
    features = extract_features(backbone, images, cache).tensor()
    started = time.perf_counter()
    bank = HeadBank(
        [HeadSetting(learning_rate=workload.learning_rate, weight_decay=0.0, seed=SEED)],
        num_classes=workload.num_classes,
        optimizer="sgd",
    )
    bank.fit(features, images.labels, epochs=workload.epochs, batch_size=workload.batch_size, seed=SEED)
    return Ours(features=features, head=bank.head(0), heads_seconds=time.perf_counter() - started)


def replay(workload: Workload, textbook: Textbook, features: Tensor) -> nn.Linear:
    """Train the textbook's head once more, in its own order of batches, on our cached features [N, D]."""
    labels = torch.tensor(textbook.train.targets)
    order = RandomSampler(textbook.train, generator=torch.Generator().manual_seed(SEED))
    head = Head(features.shape[1], workload)
    for _ in range(workload.epochs):
        for batch in torch.tensor(list(order)).split(workload.batch_size):
            head.step(features[batch], labels[batch])
    return head.linear
