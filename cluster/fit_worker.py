"""What each worker of a fit does: train a rank, report every epoch, and leave a checkpoint to go on from."""

import copy
import json
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.trainer.loop import Epoch, Loop, Rank
from headstart.trainer.recipe import Train

Row = dict[str, float | None]
STATE = "state.pt"


class LastingError(Exception):
    """What went wrong in a worker and would again after a restart."""


@dataclass(kw_only=True)
class _Progress:
    """What the workers have done so far; saved with each epoch."""

    position: int = 0
    loop: dict[str, Any] | None = None
    weights: dict[str, Tensor] | None = None
    best: tuple[float, float, float] | None = None  # (validation accuracy, -validation loss, learning rate)
    rows: list[Row] = field(default_factory=list)


def train_worker(config: dict[str, Any]) -> None:
    """Train on one rank, telling what a restart can mend from what it cannot; runs in a Ray worker process."""
    from ray.exceptions import RayError

    try:
        _train(config)
    except (OSError, RayError):  # a network, a disk that others use too, a process of Ray's
        raise
    except Exception as error:
        # Those of a rank whose peer has died: NCCL's, and gloo's, which is no kind of its own.
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise
        said = (str(error).strip() or repr(error)).splitlines()[0]
        raise LastingError(f"{type(error).__name__}: {said}") from error


def _train(config: dict[str, Any]) -> None:
    import ray
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    size, rank_number = context.get_world_size(), context.get_world_rank()
    device = ray.train.torch.get_device()
    rank = Rank(rank=rank_number, size=size, device=str(device))
    settings: Train = config["settings"]
    if device.type == "cpu":
        # The same number of threads wherever the rank runs, so that sums are added in the same order.
        torch.set_num_threads(1)
    model, task, resume = ray.get(config["payload"])
    progress = _Progress(**(_reported_state() or resume or {}))
    for position in range(progress.position, len(config["rates"])):
        rate = config["rates"][position]
        replica = ray.train.torch.prepare_model(copy.deepcopy(model))
        loop = Loop(replica, task, settings, learning_rate=rate, seed=config["seed"], rank=rank, reduce=_all_reduce)
        if progress.loop is not None:
            loop.load_state(progress.loop)
        for epoch in loop.epochs():
            figures = {"peak_learning_rate": rate, **asdict(epoch)}
            row: Row = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            progress.rows = [*progress.rows, row]
            progress.loop = loop.state()
            if epoch.epoch == settings.epochs:
                outcome = _outcome(epoch, rate)
                if progress.best is None or outcome[:2] > progress.best[:2]:
                    progress.best = outcome
                    progress.weights = _cpu(loop.inner.state_dict())
                progress = replace(progress, position=position + 1, loop=None)
            _report(progress, row, rank_number, Path(config["rows_file"]))


def _outcome(epoch: Epoch, rate: float) -> tuple[float, float, float]:
    """Return what `_Progress.best` has of a rate after its last epoch; the worst there is where it diverged.

    As of a head: NaN would compare with nothing, and a rate with it be kept for coming first.
    """
    if not math.isfinite(epoch.validation_loss):
        return (0.0, -math.inf, rate)
    return (epoch.validation_accuracy, -epoch.validation_loss, rate)


def _all_reduce(totals: Tensor) -> Tensor:
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        import ray.train.torch

        device = ray.train.torch.get_device()
        shared = totals.to(device, copy=True)
        torch.distributed.all_reduce(shared)
        return shared.cpu()
    return totals


def _cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _reported_state() -> dict[str, Any] | None:
    """Return the state from which Ray Train restarts this group, if it does."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as directory:
        state: dict[str, Any] = torch.load(Path(directory) / STATE, map_location="cpu", weights_only=True)
        return state


def _report(progress: _Progress, row: Row, rank: int, rows_file: Path) -> None:
    import ray.train

    if rank != 0:
        ray.train.report(dict(row))
        return
    directory = Path(tempfile.mkdtemp())
    try:
        torch.save(vars(progress), directory / STATE)
        ray.train.report(dict(row), checkpoint=ray.train.Checkpoint.from_directory(str(directory)))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    with rows_file.open("a") as file:
        file.write(json.dumps(row) + "\n")
