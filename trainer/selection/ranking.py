"""From candidates to an order: distance, score, audition.

A candidate's score is how well a nearest-neighbour and a ridge classifier, each leaving one training image out, do on
its frozen features; its audition trains a bank of heads on them and takes the best on validation. The audition
decides the order, because it is the thing itself: what a head on this source reaches on images it was not fitted to.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from headstart.kernels.energy import energy_distances
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.ragged import RaggedTasks
from headstart.trainer.audition import audition
from headstart.trainer.backbones.backbone import Backbone
from headstart.trainer.features import CachedFeatures, Progress, extract_features
from headstart.trainer.inputs.dataset import LabelledImages
from headstart.trainer.recipe import Recipe
from headstart.trainer.selection.scores import score_features
from headstart.trainer.selection.sources import SKETCH_PRECISION, Sketch

MAX_SKETCH = 1000


@dataclass(frozen=True, kw_only=True)
class Target:
    """The target task: its images and which of them are for what."""

    images: LabelledImages
    parts: dict[str, np.ndarray]

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.images.classes)

    def part(self, name: str) -> LabelledImages:
        """Return the images of one part."""
        return self.images.subset(self.parts[name])

    @property
    def judged_on(self) -> tuple[str, ...]:
        """Digests of the validation and the test images: what a candidate must not have learned from."""
        return tuple(self.images.digests[i] for name in ("validation", "test") for i in self.parts[name])

    def known(self) -> LabelledImages:
        """Return the training images and behind them the validation images: all that a candidate may see."""
        return self.images.subset(np.concatenate([self.parts["train"], self.parts["validation"]]))


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What one source is worth on the target."""

    knn: float
    """Leave-one-out accuracy of nearest neighbours on the training features."""
    ridge: float
    """Leave-one-out accuracy of ridge regression on the training features."""
    score: float
    """The mean of the two."""
    audition_accuracy: float
    """Of the best head, on validation."""
    audition_loss: float
    correct: np.ndarray
    """Which validation images the best head has right, [N] bool."""
    head: nn.Linear
    features: CachedFeatures
    seconds: float


def assess(
    backbone: Backbone, target: Target, recipe: Recipe, cache: Path, *, tag: str, progress: Progress | None = None
) -> Assessment:
    """Extract the target's features under `backbone`, score them, and audition a bank of heads on them.

    Features and heads are computed on `backbone.device`. `progress` counts images, and then the heads' epochs.
    """
    started = time.perf_counter()
    known = target.known()
    cached = extract_features(backbone, known, cache, tag=tag, progress=progress)
    features = cached.tensor()
    num_train = len(target.parts["train"])
    labels = torch.from_numpy(known.labels)
    scores = score_features(features[:num_train], labels[:num_train], seed=recipe.seed)
    heads = audition(
        features[:num_train],
        labels[:num_train],
        features[num_train:],
        labels[num_train:],
        num_classes=target.num_classes,
        search=recipe.search,
        optimizer=recipe.train.optimizer,
        seed=recipe.seed,
        device=backbone.device,
        progress=progress,
    )
    with torch.no_grad():
        correct = heads.head(features[num_train:]).argmax(1) == labels[num_train:]
    return Assessment(
        knn=scores["knn"],
        ridge=scores["ridge"],
        score=scores["score"],
        audition_accuracy=heads.accuracy,
        audition_loss=heads.loss,
        correct=correct.numpy(),
        head=heads.head,
        features=cached,
        seconds=time.perf_counter() - started,
    )


def sketched(target: Target, seed: int) -> LabelledImages:
    """Return the at most 1,000 known images that stand for the task in its sketch, drawn without looking."""
    known = target.known()
    if len(known) <= MAX_SKETCH:
        return known
    return known.subset(np.sort(np.random.default_rng(seed).choice(len(known), MAX_SKETCH, replace=False)))


def make_sketch(
    probe: Backbone, images: LabelledImages, cache: Path, *, tag: str, progress: Progress | None = None
) -> tuple[Sketch, CachedFeatures]:
    """Return a task's sketch under the probe backbone, and the cached features behind it."""
    cached = extract_features(probe, images, cache, tag=tag, progress=progress)
    features = cached.tensor()
    sketch = Sketch(
        features=features,
        labels=torch.from_numpy(images.labels),
        mean=features.double().mean(dim=0).float(),
        probe=probe.fingerprint,
        precision=SKETCH_PRECISION,
        centre="origin",
    )
    return sketch, cached


def sketch_distances(target: Sketch, sources: Sequence[Sketch]) -> list[dict[str, float]]:
    """Return the energy and the Euclidean distance from the target to each source, smaller being closer.

    All sketches are of one probe backbone; `kernels.energy` and `kernels.euclidean` have the formulas. What the number
    of images adds is taken off, or a task of few would be far from itself: energy is the U-statistic, about 0 for one
    and the same task and sometimes below it; the square of the distance of two means is less by what their own
    variances, tr(S) / n each, add on average, and not below 0. One image alone has no variance.
    """
    if not sources:
        return []
    tasks = RaggedTasks.from_list([sketch.features for sketch in sources])
    several = len(target.features) > 1 and tasks.smallest > 1
    energy: Tensor = energy_distances(target.features, tasks, unbiased=several)
    euclidean: Tensor = euclidean_distances(target.features, tasks, form="mean").double()
    if several:
        noise = torch.stack([one.features.double().var(dim=0).sum() / len(one.features) for one in (target, *sources)])
        euclidean = (euclidean.square() - noise[0] - noise[1:]).clamp(min=0).sqrt()
    return [{"energy": float(e), "euclidean": float(d)} for e, d in zip(energy, euclidean, strict=True)]
