"""Fine-tuning under Ray Train: two workers learn, survive a worker's death, and refuse who has no token."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from headstart.cluster.connect import Connection
from headstart.cluster.fit import divide_work, fit, latest_state
from headstart.cluster.fit_worker import _outcome
from headstart.trainer.errors import RunError
from headstart.trainer.inputs.dataset import ImageArrays, LabelledImages
from headstart.trainer.inputs.preprocessing import Preprocess, Preprocessing
from headstart.trainer.loop import Epoch, Task
from headstart.trainer.recipe import Train
from headstart.trainer.transfer import Classifier

SETTINGS = Train(epochs=3, batch_size=20, workers=2)
ALONE = Train(epochs=1, batch_size=20, workers=1)
"""Starting a second process takes longer than what these tests look at."""
RATES = (1e-5, 1e-2, 1e-5)


def task() -> Task:
    found = load_digits()
    storage = ImageArrays((found.images[:160] * 15).astype(np.uint8))
    everything = LabelledImages(
        tuple("0123456789"), found.target[:160].astype(np.int64), storage.digests(), storage, storage.grey()
    )
    preprocess = Preprocess(Preprocessing(resize=8, crop=8, channels=1, mean=(0.5,), std=(0.5,)))
    return Task(
        train=everything.subset(range(100)),
        validation=everything.subset(range(100, 160)),
        preprocess=preprocess,
    )


class Network(nn.Module):
    """A small net; with `kill` set, rank 1 kills itself once, in its third forward pass in training.

    With `passes` set, each forward pass adds a letter to that file.
    """

    def __init__(self, kill: str = "", passes: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.kill, self.passes, self.passes_file = kill, 0, passes

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.passes += self.training
        if self.passes_file:
            with Path(self.passes_file).open("a") as file:
                file.write(".")
        if self.kill and self.passes == 8 and torch.distributed.get_rank() == 1 and not Path(self.kill).exists():
            Path(self.kill).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        found: torch.Tensor = self.net(pixels)
        return found


@pytest.fixture(scope="module")
def connection() -> Iterator[Connection]:
    with Connection() as connection:
        yield connection


def run(connection: Connection, storage: Path, kill: str = "", settings: Train = SETTINGS):
    torch.manual_seed(1)
    model = Classifier(Network(kill), nn.Linear(288, 10))
    rows: list[dict[str, float]] = []
    fitted = fit(
        model, task(), settings, learning_rates=RATES, seed=3, connection=connection, storage=storage,
        on_epoch=lambda row, total: rows.append(row | {"total": total}),
        on_wait=lambda: pytest.fail("nobody else has CPUs here"),
    )  # fmt: skip
    return fitted, rows


def test_two_workers_learn_and_validation_chooses_the_rate(connection: Connection, tmp_path: Path):
    fitted, rows = run(connection, tmp_path / "plain")
    assert fitted.learning_rate == 1e-2
    assert fitted.validation_accuracy > 0.5
    assert [(row["peak_learning_rate"], row["epoch"]) for row in rows] == [
        (rate, epoch) for rate in RATES for epoch in (1, 2, 3)
    ]
    assert {row["total"] for row in rows} == {9}
    losses = [row["validation_loss"] for row in rows]
    assert [row["validation_loss"] for row in fitted.rows] == losses
    assert losses[6:] == losses[:3]  # each rate starts where the first did
    model = Classifier(Network(), nn.Linear(288, 10))
    model.load_state_dict(fitted.weights)
    data = task()
    pixels = data.preprocess(torch.from_numpy(np.stack([data.validation.image(i) for i in range(60)])))
    with torch.no_grad():
        right = model.eval()(pixels).argmax(1) == torch.from_numpy(data.validation.labels)
    assert float(right.double().mean()) == pytest.approx(fitted.validation_accuracy)


@pytest.mark.parametrize(
    ("workers", "batch_size", "num_gpus", "processes"),
    [(2, 32, 0, (2, False)), (2, 32, 1, (1, True)), (2, 32, 8, (2, True)), (4, 32, 3, (2, True)), (6, 18, 5, (3, 1))],
)
def test_each_process_has_a_gpu_where_there_is_one(workers: int, batch_size: int, num_gpus: int, processes: object):
    assert divide_work(Train(workers=workers, batch_size=batch_size), num_gpus, workers) == processes


@pytest.mark.parametrize(
    ("num_cpus", "accepted"), [(5, "1, 2, 3, a cluster with"), (1, "1, a cluster with"), (0, "a cluster with")]
)
def test_too_few_cpus_are_told_and_not_waited_for(num_cpus: int, accepted: str):
    settings = Train(workers=6, batch_size=18)
    with pytest.raises(RunError, match=rf"train.workers is 6, .* Ray has {num_cpus} in all; accepted: {accepted}"):
        divide_work(settings, 0, num_cpus)
    assert divide_work(settings, 1, num_cpus) == (1, True)


def test_cpus_that_others_keep_are_not_waited_for_without_end(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")  # of which Ray takes the whole seconds
    monkeypatch.setattr("headstart.cluster.fit._NUM_WAITS", 2)
    monkeypatch.setattr("headstart.cluster.fit._PATIENCE", 0.1)
    told: list[bool] = []
    ray = connection.ray()
    from ray.util.placement_group import placement_group, remove_placement_group

    taken = placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    ray.get(taken.ready())
    model = Classifier(Network(), nn.Linear(288, 10))
    try:
        with pytest.raises(RunError, match=r"fine-tuning failed: .*timed out"):
            fit(
                model, task(), ALONE, learning_rates=(1e-3,), seed=0, connection=connection,
                storage=tmp_path / "taken", on_wait=lambda: told.append(True),
            )  # fmt: skip
        assert told == [True]
    finally:
        remove_placement_group(taken)


def test_the_newest_state_that_was_registered_is_the_one_to_go_on_from(tmp_path: Path):
    assert latest_state(tmp_path) is None
    for attempt in (2, 9, 10, 11, 12, 13, *range(14, 20)):
        folder = tmp_path / f"attempt-{attempt}" / "train"
        (folder / "made").mkdir(parents=True)
        if attempt != 13:  # killed before its first epoch
            latest = None if attempt == 12 else {"checkpoint_dir_name": "made"}
            (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps({"latest_checkpoint_result": latest}))
        if attempt != 11:
            torch.save({"position": attempt}, folder / "made" / "state.pt")
    state = (tmp_path / "attempt-10/train/made/state.pt").read_bytes()
    for attempt, torn in enumerate((b"", b'{"latest', b"{}"), 14):
        (tmp_path / f"attempt-{attempt}/train/checkpoint_manager_snapshot.json").write_bytes(torn)
    for attempt, torn in enumerate((b"", b"PK", state[: len(state) // 2]), 17):
        (tmp_path / f"attempt-{attempt}/train/made/state.pt").write_bytes(torn)
    assert latest_state(tmp_path) == {"position": 10}


@pytest.mark.slow
def test_of_rates_that_validate_alike_the_one_with_the_smaller_loss_is_kept(connection: Connection, tmp_path: Path):
    torch.manual_seed(1)
    model = Classifier(Network(), nn.Linear(288, 10))
    rates = (1e-8, 1e-6, 1e-7)
    fitted = fit(
        model, task(), replace(SETTINGS, epochs=1), learning_rates=rates, seed=3, connection=connection,
        storage=tmp_path / "alike",
    )  # fmt: skip
    assert len({row["validation_accuracy"] for row in fitted.rows}) == 1
    losses = [row["validation_loss"] for row in fitted.rows]
    assert fitted.learning_rate == rates[losses.index(min(losses))]
    assert losses.index(max(losses)) != losses.index(min(losses))


def test_a_rate_that_diverges_is_the_worst(connection: Connection, tmp_path: Path):
    torch.manual_seed(1)
    model = Classifier(Network(), nn.Linear(288, 10))
    fitted = fit(
        model, task(), ALONE, learning_rates=(1e30, 1e-8), seed=3, connection=connection, storage=tmp_path / "diverging"
    )
    assert [row["validation_loss"] is None for row in fitted.rows] == [True, False]
    assert (fitted.learning_rate, fitted.diverged) == (1e-8, False)
    assert all(torch.isfinite(tensor).all() for tensor in fitted.weights.values())


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_of_rates_of_one_accuracy_one_that_diverged_is_not_kept_for_coming_first(loss: float):
    figures = {"epoch": 1, "learning_rate": 0.0, "train_loss": 1.0, "train_accuracy": 0.5, "seconds": 1.0}
    diverged, wrong = (
        _outcome(Epoch(**figures, validation_loss=loss, validation_accuracy=accuracy), 1e-3)
        for loss, accuracy in ((loss, 0.5), (9.0, 0.0))
    )
    assert wrong[:2] > diverged[:2] == (0.0, -math.inf)


@pytest.mark.slow
def test_a_killed_worker_changes_nothing_but_the_time(connection: Connection, tmp_path: Path):
    plain, _ = run(connection, tmp_path / "plain")
    killed, _ = run(connection, tmp_path / "killed", kill=str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    for name, tensor in plain.weights.items():
        assert torch.equal(tensor, killed.weights[name]), name


def test_a_failing_fit_says_why(connection: Connection, tmp_path: Path):
    model = Classifier(Network(passes=str(tmp_path / "passes")), nn.Linear(7, 10))  # takes 288 features
    with pytest.raises(RunError, match=r"fine-tuning failed: RuntimeError: .*mat1 and mat2"):
        fit(model, task(), ALONE, learning_rates=(1e-3,), seed=0, connection=connection, storage=tmp_path / "failing")
    assert latest_state(tmp_path / "failing") is None
    assert (tmp_path / "passes").read_text() == "."  # and none of a worker that was started again


def test_a_client_without_the_token_is_refused(connection: Connection):
    ray = connection.ray()
    address = ray.get_runtime_context().gcs_address
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    code = f"import ray; ray.init(address={address!r}, logging_level='error'); print(ray.cluster_resources())"
    tokens = {None: False, "0" * 64: False, os.environ["RAY_AUTH_TOKEN"]: True}

    def ask(token: str | None) -> subprocess.CompletedProcess[str]:
        extra = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment | extra, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip

    with ThreadPoolExecutor(len(tokens)) as pool:  # a refused client waits long before it says so
        answers = list(pool.map(ask, tokens))
    for (token, accepted), done in zip(tokens.items(), answers, strict=True):
        assert (done.returncode == 0) == accepted, f"token {token}: {done.stdout}{done.stderr[-500:]}"


def test_an_address_where_nobody_answers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = (
        "from headstart.cluster.connect import Connection\n"
        "from headstart.trainer.errors import RunError\n"
        "try:\n    Connection('127.0.0.1:1').ray()\nexcept RunError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert "cannot connect to Ray at 127.0.0.1:1" in done.stdout, done.stdout + done.stderr[-2000:]
    assert "RAY_AUTH_TOKEN" in done.stdout


def test_a_temporary_folder_too_long_for_a_socket_is_told(tmp_path: Path):
    folder = tmp_path / ("long" * 20)
    folder.mkdir()
    script = (
        "from headstart.cluster.connect import Connection\n"
        "from headstart.trainer.errors import RunError\n"
        "try:\n    Connection().ray()\nexcept RunError as error:\n    print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment | {"TMPDIR": str(folder)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert "cannot start Ray: " in done.stdout, done.stdout + done.stderr[-2000:]
    assert "set RAY_TMPDIR to a folder with a short path" in done.stdout
