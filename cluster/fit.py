"""Fine-tuning under Ray Train: data-parallel workers, summed metrics, checkpoints, resume.

A fit trains one model at one or more learning rates, one after the other in the same group of workers, and keeps
the rate that validates best. It survives two kinds of death: a worker's, from which Ray Train restarts the group at
the last checkpoint, and the driver's, after which the same call goes on from the last checkpoint that was registered.
What a restart would meet again, an error of the data or the code, ends it at once.
"""

import contextlib
import json
import math
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.cluster.connect import Connection
from headstart.cluster.fit_worker import STATE, LastingError, Row, train_worker
from headstart.trainer.errors import RunError
from headstart.trainer.loop import Task
from headstart.trainer.recipe import Train
from headstart.trainer.transfer import Classifier

# How often Ray Train waits its 60 s for a group of workers to start: half an hour, of a cluster that others use too.
_NUM_WAITS = 30
# Seconds until it is told that the workers wait for a place.
_PATIENCE = 10.0
# What a file that is not there, or not whole, is to json and to torch.load.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The weights a fit ends with, and how it came to them."""

    weights: dict[str, Tensor]
    """The best rate's `Classifier.state_dict()` after its last epoch."""
    learning_rate: float
    """The rate that validation chose."""
    validation_accuracy: float
    diverged: bool
    """Whether the loss on validation was not finite at any rate, so that the weights are of no use."""
    rows: list[Row]
    """An epoch a row, with the rate it belongs to; None for a loss that is not finite."""


def fit(
    model: Classifier,
    task: Task,
    settings: Train,
    *,
    learning_rates: Sequence[float],
    seed: int,
    connection: Connection,
    storage: Path,
    on_epoch: Callable[[Row, int], None] | None = None,
    on_wait: Callable[[], None] | None = None,
) -> Fitted:
    """Train `model` on `task` at each of `learning_rates` and return the best.

    `storage` holds the checkpoints; on a cluster it must be a folder that every worker sees. It is emptied by the
    caller once the result is stored. `on_epoch(row, total)` is called after each epoch, `on_wait()` when the workers
    find no place. Raises `RunError` when there are too few CPUs, when a worker meets a `LastingError`, or when the
    workers fail, or find no place to start, more often than Ray Train is allowed to restart them.
    """
    ray = connection.ray(num_workers=settings.workers)
    import ray.train.torch as ray_train_torch  # only once the connection has set Ray's environment

    resources = ray.cluster_resources()
    num_processes, use_gpu = divide_work(settings, int(resources.get("GPU", 0)), int(resources.get("CPU", 0)))
    resume = latest_state(storage)
    attempt = storage / f"attempt-{len(list(storage.glob('attempt-*')))}"
    attempt.mkdir(parents=True)
    config = {
        "payload": ray.put((model, task, resume)),
        "settings": settings,
        "rates": list(learning_rates),
        "seed": seed,
        "rows_file": str(attempt / "rows.jsonl"),
    }
    trainer = ray_train_torch.TorchTrainer(
        train_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=num_processes, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(attempt),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            failure_config=ray.train.FailureConfig(max_failures=2, controller_failure_limit=_NUM_WAITS),
            callbacks=[_no_restart_for_lasting_errors()],
        ),
    )
    _run(trainer, attempt / "rows.jsonl", on_epoch, on_wait, settings.epochs * len(learning_rates), resume)
    state = latest_state(storage)
    if state is None or state["best"] is None or state["position"] < len(learning_rates):
        raise RunError(f"Ray Train ended without a finished checkpoint in {attempt}; run the same command again")
    accuracy, negative_loss, rate = state["best"]
    diverged, weights, rows = math.isinf(negative_loss), state["weights"], state["rows"]
    return Fitted(weights=weights, learning_rate=rate, validation_accuracy=accuracy, diverged=diverged, rows=rows)


def divide_work(settings: Train, num_gpus: int, num_cpus: int) -> tuple[int, bool]:
    """Return how many processes train, and whether each has a GPU; otherwise each has a CPU.

    Where there are fewer GPUs than `workers`, one process a GPU is faster than `workers` on the CPU: the most of them
    that the batch is a multiple of. Raises `RunError` where there are fewer CPUs and no GPU: Ray Train would wait for
    more.
    """
    most = min(settings.workers, num_gpus or num_cpus)
    accepted = [n for n in range(1, most + 1) if settings.batch_size % n == 0]
    if num_gpus > 0:
        return accepted[-1], True
    if num_cpus < settings.workers:
        raise RunError(
            f"train.workers is {settings.workers}, each with a CPU of its own, and Ray has {num_cpus} in all; "
            f"accepted: {', '.join([*map(str, accepted), 'a cluster with more CPUs'])}"
        )
    return settings.workers, False


def latest_state(storage: Path) -> dict[str, Any] | None:
    """Return the newest state that Ray Train registered under `storage`, whichever attempt made it.

    Only registered checkpoints are whole; what cannot be read counts as never registered. The attempts are folders of
    their own because the workers of a killed driver live on for some seconds, and would write among those of the next.
    """
    attempts = sorted(storage.glob("attempt-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for attempt in attempts:
        folder = attempt / "train"
        try:
            latest = json.loads((folder / "checkpoint_manager_snapshot.json").read_text())["latest_checkpoint_result"]
            if latest is not None:
                path = folder / latest["checkpoint_dir_name"] / STATE
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                return state
        except _UNREADABLE:  # Ray Train writes its snapshot in place, and may be killed within
            continue
    return None


def _run(
    trainer: Any,
    rows_file: Path,
    on_epoch: Callable[[Row, int], None] | None,
    on_wait: Callable[[], None] | None,
    total: int,
    resume: dict[str, Any] | None,
) -> None:
    """Run the trainer in a thread and report its epochs from this one.

    In a thread Ray Train leaves SIGINT alone; its own handler would end the process with exit code 0. Where the
    workers wait for a place, `on_wait` is called once, and again when they wait after another epoch.
    """
    failures: list[BaseException] = []

    def target() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    seen, told, look = 0, False, time.monotonic() + _PATIENCE
    if on_epoch is not None and resume is not None:
        for row in resume["rows"]:
            on_epoch(row, total)
    while True:
        alive = thread.is_alive()
        lines = rows_file.read_text().splitlines(keepends=True) if rows_file.exists() else []
        for line in lines[seen:]:
            if not line.endswith("\n"):
                break
            seen, told = seen + 1, False
            if on_epoch is not None:
                on_epoch(json.loads(line), total)
        if not alive:
            break
        if on_wait is not None and not told and time.monotonic() > look:
            look = time.monotonic() + _PATIENCE
            if told := _has_no_place():
                on_wait()
        time.sleep(0.1)
    if failures:
        raise RunError(
            f"fine-tuning failed: {_root_cause(failures[0])}. The finished epochs are kept: mend the cause and run "
            "the same command again"
        ) from failures[0]


def _has_no_place() -> bool:
    """Say whether a group of workers of this process waits for a place: the id of a group ends with its job's."""
    import ray
    from ray.exceptions import RayError
    from ray.util import placement_group_table

    with contextlib.suppress(RayError):  # the head does not answer: Ray Train will tell
        job = ray.get_runtime_context().get_job_id()
        groups = placement_group_table().items()
        return any(name.endswith(job) and group["state"] == "PENDING" for name, group in groups)
    return False


def _no_restart_for_lasting_errors() -> Any:
    """Return what makes Ray Train give up: an error of a callback ends a fit, one of a worker restarts it."""
    import ray.train

    class NoRestart(ray.train.UserCallback):
        def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, LastingError):
                    raise error

    return NoRestart()


def _root_cause(error: BaseException) -> str:
    """Return the line that says what happened: a traceback's last, the first of Ray's own long explanations."""
    error = getattr(error, "controller_failure", error)
    workers = getattr(error, "worker_failures", None)
    if workers:
        error = next(iter(workers.values()))
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1] if "Traceback (most recent call last)" in str(error) else lines[0]
