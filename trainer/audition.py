"""The audition of a source task: how well heads on its frozen features do on the target task.

    found = audition(train, train_labels, validation, validation_labels, num_classes=10, search=Search())
    found.accuracy, found.head

All combinations of a search are trained at once, as one bank.
"""

import itertools
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from headstart.trainer.errors import RecipeError
from headstart.trainer.exact import exact_on
from headstart.trainer.heads import Array, HeadBank, HeadSetting, Progress, require_finite
from headstart.trainer.recipe import Search


@dataclass(frozen=True, kw_only=True)
class Audition:
    """What a bank of heads says about a source task's features."""

    accuracy: float
    """Of the best head on the validation part, 0 to 1."""
    loss: float
    """Mean cross-entropy of the best head on the validation part, in nats."""
    setting: HeadSetting
    """Of the best head."""
    head: nn.Linear
    """The best head, on the CPU; it takes features as they come, not scaled."""
    settings: tuple[HeadSetting, ...]
    """Of all K heads."""
    accuracies: tuple[float, ...]
    """Of all K heads on the validation part; 0 for one that diverged."""
    losses: tuple[float, ...]
    """Of all K heads on the validation part; infinite for one that diverged."""
    seconds: float
    """Wall time of fitting and choosing."""


def head_settings(search: Search) -> tuple[HeadSetting, ...]:
    """Every combination of the search: rates outermost, then decays, then seeds."""
    grid = itertools.product(search.learning_rates, search.weight_decays, search.seeds)
    return tuple(HeadSetting(learning_rate=r, weight_decay=d, seed=s) for r, d, s in grid)


def audition(
    train_features: Array,
    train_labels: Array,
    validation_features: Array,
    validation_labels: Array,
    *,
    num_classes: int,
    search: Search,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Audition:
    """Train a bank of heads on cached features [N, D] and keep the best one on the validation part.

    Best is the highest accuracy, then the lower loss, then the lower index in `head_settings(search)`. Raises
    DataError where a feature is not finite, RecipeError where every head diverged, RunError where the memory of the GPU
    is full.
    """
    start = time.perf_counter()
    require_finite(train_features, "training")
    require_finite(validation_features, "validation")
    settings = head_settings(search)
    bank = HeadBank(settings, num_classes=num_classes, optimizer=optimizer, device=device)
    with exact_on(bank.device, "train heads"):
        bank.fit(
            train_features,
            train_labels,
            epochs=search.epochs,
            batch_size=search.batch_size,
            seed=seed,
            progress=progress,
        )
        accuracies, losses = (v.tolist() for v in bank.evaluate(validation_features, validation_labels))
    best = min(range(len(settings)), key=lambda k: (-accuracies[k], losses[k], k))
    if math.isinf(losses[best]):
        raise RecipeError(
            f"every head of the search diverged: search.learning_rates is {search.learning_rates} with "
            f"search.weight_decays {search.weight_decays}; set smaller ones, such as the defaults"
        )
    return Audition(
        accuracy=accuracies[best],
        loss=losses[best],
        setting=settings[best],
        head=bank.head(best),
        settings=settings,
        accuracies=tuple(accuracies),
        losses=tuple(losses),
        seconds=time.perf_counter() - start,
    )
