"""A supervisor by itself: what it asks and tells its workers, whom it suspects, and how it starts them again."""

import asyncio
import errno
import gc
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest

from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.folder import Opening
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.processes import supervisor as module
from headstart.serving.server.processes.channel import Channel
from headstart.serving.server.processes.supervisor import Supervisor, _Worker
from headstart.serving.server.processes.suspects import Suspects
from headstart.serving.server.processes.worker import Link, SharedService
from tests.serving.server.graphs import write_package
from tests.serving.server.models.test_repository import NEVER


def test_one_end_is_no_suspicion_and_what_was_opened_once_is_none():
    one, again = Opening("demo", 1, "a"), Opening("demo", 1, "b")
    suspects = Suspects()
    suspects.ended(one)
    assert suspects.found() == []
    suspects.ended(again)
    assert suspects.found() == [], "other files, from the beginning"
    suspects.ended(again)
    assert suspects.found() == [again]
    suspects.opened(again)
    assert suspects.found() == []
    for _ in range(3):
        suspects.ended(again)
    assert suspects.found() == []
    for _ in range(2):
        suspects.ended(one)
    assert suspects.found() == [one], "that others were opened in its place says nothing of these files"


class Other:
    """A worker's channel, as its supervisor has it, whose answers are made here; without one it is silent."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    async def ask(self, what: str, *arguments: Any) -> Any:
        if isinstance(self.answer, ServeError):
            raise self.answer
        if callable(self.answer):
            return self.answer()
        return self.answer or await asyncio.Event().wait()


def supervised(*others: Other) -> tuple[Supervisor, list[_Worker]]:
    said: list[str] = []
    supervisor = Supervisor({}, len(others), said.append)
    workers = [
        _Worker(number=number, pid=number, channel=one, joined=True, ready=True)  # type: ignore[arg-type]
        for number, one in enumerate(others)
    ]
    supervisor._running = dict(enumerate(workers))
    return supervisor, workers


def test_a_worker_that_does_not_answer_is_told_and_its_last_counts_stay(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_CHANGE", 0.05)
    monkeypatch.setattr(module, "_COUNTS", 0.05)

    async def play() -> None:
        supervisor, workers = supervised(Other({"unknown": 1}), Other())
        workers[1].counts = {"unknown": 7}
        with pytest.raises(ServeError, match="worker 1 does not answer") as caught:
            await supervisor._answer(workers[0], "load", ["demo"])
        assert caught.value.status == 503
        found = await supervisor._answer(workers[0], "counts", [])
        assert [one["counts"]["unknown"] for one in found["workers"]] == [1, 7]
        workers[0].channel.answer = lambda: supervisor._running.pop(1) and None  # type: ignore[attr-defined]
        found = await supervisor._answer(workers[0], "counts", [])
        assert [one["number"] for one in found["workers"]] == [0], "one that ended meanwhile is among those that did"

    asyncio.run(play())


def test_a_worker_that_starts_later_is_told_what_is_unloaded_now():
    async def play() -> None:
        absent = ServeError(404, "there is no model", grpc="NOT_FOUND")
        supervisor, workers = supervised(Other({"done": 1}), Other({"done": 1}))

        async def told() -> list[str]:
            found: list[str] = (await supervisor._answer(workers[0], "join", []))["unloaded"]
            return found

        for name in ("a", "b"):
            await supervisor._answer(workers[0], "unload", [name])
        assert await told() == ["a", "b"]
        await supervisor._answer(workers[0], "load", ["a"])
        assert await told() == ["b"]
        workers[0].channel.answer = absent  # type: ignore[attr-defined]
        with pytest.raises(ServeError, match="there is no model"):
            await supervisor._answer(workers[0], "unload", ["c"])
        assert await told() == ["b", "c"], "one of them had it"
        workers[1].channel.answer = absent  # type: ignore[attr-defined]
        with pytest.raises(ServeError, match="there is no model"):
            await supervisor._answer(workers[0], "unload", ["d"])
        assert await told() == ["b", "c"]

    asyncio.run(play())


@pytest.mark.parametrize("mirrored", [False, True])
def test_workers_open_at_once_what_a_mirror_has_put_in_its_place(tmp_path: Path, mirrored: bool):
    write_package(tmp_path / "demo" / "1", 1)

    async def play() -> list[str]:
        ours, theirs = socket.socketpair()
        supervisor = Supervisor({}, 1, print, (lambda name, versions: None) if mirrored else None)
        channel = await Channel.open(ours, lambda what, arguments: supervisor._answer(worker, what, arguments))
        worker = _Worker(number=0, pid=0, channel=channel)
        answering = asyncio.ensure_future(channel.serve())
        link, found = Link(theirs, 0), []
        service = SharedService(Repository(tmp_path, threads=1, poll_s=NEVER), link)
        await link.open(asyncio.Event(), asyncio.Event())
        await service.start()
        write_package(tmp_path / "demo" / "2", 2)
        for _ in range(2):
            await service.repository.look()
            found += service.model_metadata("demo", None)["versions"]
        await service.stop()
        channel.close()
        await answering
        return found

    assert asyncio.run(play()) == (["2", "2"] if mirrored else ["1", "2"])


def test_what_a_worker_has_opened_is_no_suspect_when_another_ends_over_it():
    async def play() -> None:
        supervisor, workers = supervised(Other(), Other())
        one = Opening("demo", 1, "a")
        supervisor._suspects.ended(one)
        await supervisor._answer(workers[0], "open", [*one])
        assert workers[0].opening == one
        await supervisor._answer(workers[0], "opened", [*one])
        assert workers[0].opening is None
        for _ in range(2):
            supervisor._suspects.ended(one)
        assert (await supervisor._answer(workers[1], "join", []))["suspects"] == []

    asyncio.run(play())


def test_the_server_is_ready_once_and_what_fails_later_does_not_end_it():
    async def play() -> None:
        supervisor, workers = supervised(Other(), Other())
        said: list[str] = []
        supervisor._say = said.append
        for worker in (workers[0], workers[0], workers[1], workers[0]):
            await supervisor._answer(worker, "ready", ["ready: x"])
        assert said == ["ready: x, with 2 workers"]
        await supervisor._answer(workers[0], "failed", ["the key is gone"])
        assert not supervisor._first.is_set()

    asyncio.run(play())


def test_a_worker_that_is_started_as_the_end_begins_is_told(monkeypatch: pytest.MonkeyPatch):
    async def play() -> bytes:
        supervisor, heard = Supervisor({}, 1, print), bytearray()

        class Process:
            pid = 0

            def __init__(self, end: socket.socket) -> None:
                self.end = end
                end.setblocking(False)

            async def wait(self) -> int:
                with self.end:
                    heard.extend(await asyncio.get_running_loop().sock_recv(self.end, 1000))
                return 0

        async def begun(*arguments: object, pass_fds: tuple[int], **options: object) -> Process:
            supervisor._first.set()
            return Process(socket.socket(fileno=os.dup(pass_fds[0])))

        monkeypatch.setattr(asyncio, "create_subprocess_exec", begun)
        await asyncio.wait_for(supervisor._run_worker(0), 20)
        return bytes(heard)

    assert b'"stop"' in asyncio.run(play())


def test_a_worker_that_cannot_be_started_is_tried_again_less_and_less_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(module, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(module, "_LONGEST_DELAY", 0.05)

    async def play() -> None:
        supervisor, tries = Supervisor({}, 1, print), 0

        async def full(*arguments: object, **options: object) -> None:
            nonlocal tries
            tries += 1
            if tries == 5:
                supervisor._first.set()
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(asyncio, "create_subprocess_exec", full)
        gc.collect()  # what others left
        before = len([*Path("/proc/self/fd").iterdir()])
        await asyncio.wait_for(supervisor._keep(0), 20)
        assert len([*Path("/proc/self/fd").iterdir()]) == before
        assert not list(tmp_path.iterdir())

    asyncio.run(play())
    delays = [re.findall(r"in ([0-9.]+) s", record.message)[0] for record in caplog.records]
    assert delays == ["0.01", "0.02", "0.04", "0.05"]
    assert "cannot be started (Too many open files)" in caplog.text


def test_what_is_wrong_with_one_worker_ends_no_other(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    async def play() -> None:
        supervisor, tries = Supervisor({}, 1, print), 0
        monkeypatch.setattr(module, "_FIRST_DELAY", 0.01)

        async def broken(number: int) -> str:
            nonlocal tries
            tries += 1
            if tries == 2:
                supervisor._first.set()
            raise TypeError("no number")

        monkeypatch.setattr(supervisor, "_run_worker", broken)
        await asyncio.wait_for(supervisor._keep(0), 20)
        assert tries == 2

    asyncio.run(play())
    assert "worker 0 was lost (TypeError); it is started again in 0.01 s" in caplog.text
