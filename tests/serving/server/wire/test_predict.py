"""Which model `POST /v1/predict` means where none is named: a server that starts beside others must not answer 404."""

import asyncio
import threading
from pathlib import Path

import pytest

from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.model import LoadedModel
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.service import Service
from headstart.serving.server.wire.predict import only_model
from tests.serving.server.models.test_repository import NEVER, Graph, serving
from tests.serving.server.scheduling.test_batching import on_a_loop


def refusal(service: Service) -> ServeError:
    with pytest.raises(ServeError) as caught:
        only_model(service)
    return caught.value


@on_a_loop
async def test_while_the_server_starts_it_is_503_also_once_the_first_of_two_models_is_ready(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name / "1").mkdir(parents=True)
    load, gate = Graph(), threading.Event()

    def slowly(folder: Path, name: str, version: str) -> LoadedModel:
        assert name == "one" or gate.wait(10)
        return load(folder, name, version)

    service = Service(Repository(tmp_path, threads=1, poll_s=NEVER, loader=slowly))
    assert refusal(service).status == 503
    starting = asyncio.create_task(service.start())
    while not service.model_ready("one", None):
        await asyncio.sleep(0.001)
    assert not starting.done()
    assert (refusal(service).status, refusal(service).retry_after) == (503, 1)
    gate.set()
    await starting
    assert (refusal(service).status, "one, two" in refusal(service).message) == (400, True)
    await service.stop()
    assert refusal(service).status == 503


@on_a_loop
async def test_the_only_model_is_meant_also_where_it_is_not_ready_and_without_any_it_is_404(tmp_path: Path):
    async with serving(tmp_path, poll_s=NEVER) as service:
        assert refusal(service).status == 404
        (tmp_path / "half" / "1").mkdir(parents=True)
        await service.repository.look()
        assert only_model(service) == "half"
        with pytest.raises(ServeError, match="half is not ready") as caught:
            service.card("half")
        assert caught.value.status == 503
