"""The limits on memory: of models, estimated, counted and released; of requests that wait, over all models."""

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest

from headstart.serving.device import Device
from headstart.serving.errors import PackageError
from headstart.serving.package import MODEL
from headstart.serving.server.command import serve
from headstart.serving.server.models.folder import snapshot
from headstart.serving.server.models.from_package import load_package
from headstart.serving.server.models.memory import FACTOR, Memory, Taken, read_size, resident
from headstart.serving.server.models.model import LoadedModel
from headstart.serving.server.scheduling.batching import Scheduler
from headstart.serving.server.scheduling.queueing import Budget
from tests.serving.server.graphs import classifier, write_package
from tests.serving.server.models.test_repository import NEVER, looks, rows, served_by, serving, status_of
from tests.serving.server.scheduling.test_batching import Doubling, ask, on_a_loop, refusal


def need(folder: Path) -> int:
    return FACTOR * sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_package(tmp_path / "models" / name / "1", 1)
    return tmp_path / "models"


@on_a_loop
async def test_a_model_that_does_not_fit_is_refused_and_loads_when_another_is_gone(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    # What a small model is measured with is noise: here the estimates count.
    monkeypatch.setattr("headstart.serving.server.models.loading.resident", lambda: 0)
    limit = need(root / "a" / "1") + need(root / "b" / "1") // 2
    async with serving(root, max_memory=limit, poll_s=NEVER) as service:
        assert await served_by(service, "a") == "1"
        assert await status_of(service, "b") == 503
        state, reason = rows(service)["b", "1"]
        assert state == "UNAVAILABLE"
        assert f"{FACTOR} times its files" in reason
        assert "unload another model, or give a larger --max-memory" in reason
        await service.unload("a")
        await service.load("b", {})
        assert await served_by(service, "b") == "1"
        assert service.card("b")["memory"]["estimated_bytes"] == need(root / "b" / "1")


@on_a_loop
async def test_while_a_version_is_replaced_both_count_and_the_old_one_stays_where_that_is_too_much(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("headstart.serving.server.models.loading.resident", lambda: 0)
    one = need(root / "a" / "1")
    for limit, expected in ((2 * one + one // 2, "1"), (3 * one + one // 2, "2")):
        async with serving(root, max_memory=limit, poll_s=NEVER) as service:
            write_package(root / "a" / "2", 2)
            await looks(service)
            assert await served_by(service, "a") == expected
            if expected == "1":
                assert "while a version is replaced both count" in rows(service)["a", "2"][1]
            else:
                for _ in range(5):  # what was replaced is released: it does not add up
                    write_package(root / "a" / "3", 3)
                    await looks(service)
                    assert await served_by(service, "a") == "3"
                    await asyncio.sleep(0.05)
                    remove(root / "a" / "3")
                    await service.repository.look()
                    assert await served_by(service, "a") == "2"
                    await asyncio.sleep(0.05)
        remove(root / "a" / "2")


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@on_a_loop
async def test_a_measured_growth_beyond_the_estimate_counts_instead(root: Path):
    grown: list[np.ndarray] = []

    class Growing(LoadedModel):
        def warm_up(self) -> list[tuple[int, int]]:
            grown.append(np.ones(6 << 20))  # 48 MiB
            return super().warm_up()

    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        model = Growing.__new__(Growing)
        model.__dict__.update(load(folder, name, version).__dict__)
        return model

    def load(folder: Path, name: str, version: str) -> LoadedModel:
        return load_package(folder, name=name, version=version, device=Device(threads=1))

    async with serving(root, max_memory=40 << 20, poll_s=NEVER, loader=loader) as service:
        assert await served_by(service, "a") == "1"
        measured = service.card("a")["memory"]["measured_bytes"]
        assert 40 << 20 < measured < 100 << 20
        usage = service.statistics("a", None)["model_stats"][0]["memory_usage"]
        assert usage == [{"type": "CPU", "id": 0, "byte_size": measured}]
        (line,) = (
            one
            for one in service.metrics_text().decode().splitlines()
            if one.startswith('headstart_model_memory_bytes{model="a"')
        )
        assert float(line.split()[-1]) == measured
        assert await status_of(service, "b") == 503


def test_estimates_and_what_is_taken_add_up(tmp_path: Path):
    write_package(tmp_path / "1", 1, graph=classifier(1))
    files = snapshot(tmp_path / "1")
    assert (tmp_path / "1" / MODEL).stat().st_size * FACTOR < Memory(None).estimate(files) == need(tmp_path / "1")
    memory = Memory(1000 + need(tmp_path / "1"))
    memory.take(first := Taken(estimated=900, measured=2))
    memory.take(second := Taken(estimated=3, measured=101))
    with pytest.raises(PackageError, match=r"0\.0\d MiB are left") as caught:
        memory.estimate(files)
    assert isinstance(caught.value.__cause__, MemoryError)  # it is tried again later
    memory.release(second)
    assert memory.estimate(files) == need(tmp_path / "1")
    memory.release(first)
    assert resident() > 10 << 20


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1", 1), ("512M", 512 << 20), ("1.5G", 3 << 29), ("4GiB", 4 << 30), ("2 kb", 2048), ("1t", 1 << 40)],
)
def test_sizes_are_read(text: str, expected: int):
    assert read_size(text) == expected


@pytest.mark.parametrize("text", ["", "0", "G", "-1G", "1X", "1e9", "1.5.G", "nan"])
def test_what_is_no_size_is_refused(root: Path, text: str):
    with pytest.raises(PackageError, match="is no size in memory; accepted: 512M") as caught:
        serve(root, port=0, max_memory=text)
    assert caught.value.exit_code == 2


@on_a_loop
async def test_requests_of_all_models_share_the_bytes_that_may_wait():
    gate = threading.Event()
    budget = Budget(4000)
    models = [Doubling(gate=gate), Doubling(gate=gate)]
    schedulers = [Scheduler(model, max_batch=1, max_queue=99, budget=budget) for model in models]
    running = [scheduler.infer(ask(1)) for scheduler in schedulers]
    for model in models:
        for _ in range(500):
            if model.ran:
                break
            await asyncio.sleep(0.01)
    waiting = schedulers[0].infer(ask(2, width=900))
    refused = refusal(schedulers[1], ask(3, width=900))
    assert refused.status == 429
    assert refused.retry_after is not None
    gate.set()
    await asyncio.gather(*running, waiting)
    assert budget.held == 0
