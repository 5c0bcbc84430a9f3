"""The training loop of one rank: mixed precision, a schedule, and a state from which it resumes exactly.

Nothing here knows Ray: `cluster.fit` wraps the model for its workers, sums the metrics over them through `reduce`,
and stores the state after each epoch. A loop resumed from such a state ends with the weights of one that was never
stopped: the order of an epoch is a function of the seed and the epoch alone.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headstart.trainer.inputs.batches import pixel_batches
from headstart.trainer.inputs.dataset import LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess
from headstart.trainer.recipe import Train

State = dict[str, object]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one pass over the training images gave; all figures are over all ranks."""

    epoch: int
    """Counted from 1."""
    learning_rate: float
    """At the end of the epoch."""
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Task:
    """The images a loop learns from and is measured on."""

    train: LabelledImages
    validation: LabelledImages
    preprocess: Preprocess


class Loop:
    """Epochs of `model` over `task`, one at a time, with everything a resume needs in `state()`."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Train,
        *,
        learning_rate: float,
        seed: int,
        rank: Rank,
        reduce: Reduce = lambda total: total,
    ) -> None:
        self.model, self.task, self.settings = model, task, settings
        # Data parallelism wraps the model; its weights and its evaluation are those of the model inside.
        self.inner: nn.Module = getattr(model, "module", model)
        self.seed, self.rank, self.reduce = seed, rank, reduce
        self.autocast = autocast(settings.precision, rank.device)
        self.optimizer = _optimizer(model, settings, learning_rate)
        total = settings.epochs * len(self._batches(0))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _warmup_cosine(step, total, settings.warmup)
        )
        self.epoch = 0

    def state(self) -> State:
        """Return what resumes this loop, exactly, after the epochs done so far."""
        return {
            "epoch": self.epoch,
            "model": self.inner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state(self, state: Mapping[str, object]) -> None:
        """Go on where `state()` was taken."""
        self.inner.load_state_dict(state["model"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.schedule.load_state_dict(state["schedule"])  # type: ignore[arg-type]
        self.epoch = int(state["epoch"])  # type: ignore[call-overload]

    def epochs(self) -> Iterator[Epoch]:
        """Train the epochs that are left, yielding after each."""
        while self.epoch < self.settings.epochs:
            started = time.perf_counter()
            trained = self._train_one()
            validated = self._validate()
            self.epoch += 1
            yield Epoch(
                epoch=self.epoch,
                learning_rate=float(self.schedule.get_last_lr()[0]),
                train_loss=trained[0],
                train_accuracy=trained[1],
                validation_loss=validated[0],
                validation_accuracy=validated[1],
                seconds=time.perf_counter() - started,
            )

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """This rank's share of each global batch; padded by repeating so that every rank steps alike."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.task.train))
        size, share = self.rank.size, self.settings.batch_size // self.rank.size
        order = np.resize(order, -(-len(order) // size) * size)
        mine = order[self.rank.rank :: size]
        batches = np.split(mine, range(share, len(mine), share))
        # One image has no variance for BatchNorm to divide by; such a last batch waits for another epoch's order.
        return [b for b in batches if len(b) > 1 or len(batches) == 1]

    def _train_one(self) -> tuple[float, float]:
        # Every epoch draws from its own stream (dropout), so that a resumed one draws the same.
        torch.manual_seed(hash((self.seed, self.epoch, self.rank.rank)) % 2**63)
        self.model.train()
        labels = torch.from_numpy(self.task.train.labels)
        batches = self._batches(self.epoch)
        totals = torch.zeros(3, dtype=torch.float64)
        for batch, pixels in zip(batches, pixel_batches(self.task.train, batches, self.task.preprocess), strict=True):
            target = labels[torch.from_numpy(batch)].to(self.rank.device)
            with self.autocast:
                logits = self.model(pixels.to(self.rank.device))
            loss = F.cross_entropy(logits.float(), target)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            totals += _totals(logits.detach(), target)
        self._average_statistics()
        return self._means(totals)

    def _average_statistics(self) -> None:
        """Give every rank the mean of the ranks' running statistics, so that all validate the same model."""
        if self.rank.size > 1:
            for buffer in self.inner.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.reduce(buffer.cpu()) / self.rank.size)

    @torch.no_grad()
    def _validate(self) -> tuple[float, float]:
        self.model.eval()
        labels = torch.from_numpy(self.task.validation.labels)
        mine = np.arange(len(self.task.validation))[self.rank.rank :: self.rank.size]
        batches = [b for b in np.split(mine, range(64, len(mine), 64)) if len(b)]
        totals = torch.zeros(3, dtype=torch.float64)
        for batch, pixels in zip(
            batches, pixel_batches(self.task.validation, batches, self.task.preprocess), strict=True
        ):
            with self.autocast:
                logits = self.inner(pixels.to(self.rank.device))
            totals += _totals(logits, labels[torch.from_numpy(batch)].to(self.rank.device))
        return self._means(totals)

    def _means(self, totals: Tensor) -> tuple[float, float]:
        loss, correct, num = self.reduce(totals).tolist()
        return loss / num, correct / num


def autocast(precision: str, device: str) -> "torch.autocast | nullcontext[None]":
    """Return the precision asked for, or refuse: never another one in silence.

    `auto` is bf16 on CUDA devices that compute in it, fp32 elsewhere. Raises `ValueError` for bf16 on a CUDA device
    that only emulates it.
    """
    kind = torch.device(device).type
    native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and kind == "cuda" and not native:
        raise ValueError("train.precision is 'bf16', which this GPU only emulates; accepted here: fp32, auto")
    if precision == "bf16" or (precision == "auto" and native):
        return torch.autocast(kind, dtype=torch.bfloat16)
    return nullcontext()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the parameters so that biases and norms, which are vectors, are not decayed."""
    trained = list(model.parameters())
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _optimizer(model: nn.Module, settings: Train, learning_rate: float) -> torch.optim.Optimizer:
    groups = parameter_groups(model, settings.weight_decay)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=learning_rate)


def _warmup_cosine(step: int, total: int, warmup: float) -> float:
    ramp = warmup * total
    if step < ramp:
        return (step + 1) / (ramp + 1)
    return 0.5 * (1 + math.cos(math.pi * ((step - ramp) / (total - ramp))))


def _totals(logits: Tensor, target: Tensor) -> Tensor:
    """Return [sum of losses, number right, number] in float64 on the CPU."""
    loss = F.cross_entropy(logits.float(), target, reduction="sum").double()
    correct = (logits.argmax(dim=1) == target).sum()
    return torch.stack(
        [loss, correct.double(), torch.tensor(len(target), dtype=torch.float64, device=loss.device)]
    ).cpu()
