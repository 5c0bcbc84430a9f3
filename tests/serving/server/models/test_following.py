"""How a repository follows its folder: a link that moves, a copy that takes its time, a policy that finds nothing."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest

from headstart.serving.device import Device
from headstart.serving.package import MODEL
from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.from_package import load_package
from headstart.serving.server.models.model import LoadedModel
from headstart.serving.server.models.policy import Policy
from headstart.serving.server.service import Service
from tests.serving.server.graphs import write_package
from tests.serving.server.models.test_repository import (
    NEVER,
    break_digest,
    looks,
    rows,
    served_by,
    serving,
    status_of,
    until,
)
from tests.serving.server.scheduling.test_batching import on_a_loop

CHANGING = "its files are still changing; it is opened when two looks in a row saw the same"


def lead(link: Path, target: Path) -> None:
    """Let a link lead elsewhere in one step, as `ln -s` and `mv -T` do."""
    new = link.with_name("next")
    new.symlink_to(target)
    new.replace(link)


def name_of(service: Service) -> str:
    """Of the package that answers, whatever its version."""
    base = service.repository.entries["demo"].base
    return base.model.manifest.name if base and base.model.manifest else ""


def told(caplog: pytest.LogCaptureFixture, words: str) -> int:
    return sum(words in one.getMessage() for one in caplog.records)


@on_a_loop
async def test_a_root_that_is_a_link_is_followed_to_where_it_leads_now(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_package(tmp_path / "a" / "demo" / "1", 1)
    write_package(tmp_path / "b" / "demo" / "2", 2)
    write_package(tmp_path / "c" / "demo" / "2", 3)
    link = tmp_path / "current"
    link.symlink_to("a")
    async with serving(link, poll_s=NEVER) as service, serving(link, poll_s=0.005) as polled:
        assert await served_by(service) == "1"
        lead(link, tmp_path / "b")
        shutil.rmtree(tmp_path / "a")
        await service.repository.look()
        assert await served_by(service) == "1"  # until what follows it was seen twice
        await service.repository.look()
        assert rows(service) == {("demo", "2"): ("READY", "")}
        assert await served_by(service) == "2"
        break_digest(write_package(tmp_path / "b" / "demo" / "3", 3))
        await looks(service)
        assert str(tmp_path) not in rows(service)["demo", "3"][1]
        lead(link, tmp_path / "c")
        await looks(service)
        assert rows(service) == {("demo", "2"): ("READY", "")}
        for one in (service, polled):
            await until(lambda one=one: name_of(one) == "mark-3")
    assert not told(caplog, "cannot be read")


@on_a_loop
async def test_a_load_that_goes_on_while_the_link_moves_is_whole(tmp_path: Path):
    for number, name in enumerate("ab", start=1):
        write_package(tmp_path / name / "demo" / "1", number)
    link, begun, go_on = tmp_path / "current", threading.Event(), threading.Event()
    link.symlink_to("a")

    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        folders.append(folder)
        begun.set()
        assert go_on.wait(10)
        return load_package(folder, name=name, version=version, device=Device(threads=1))

    folders: list[Path] = []

    def move() -> None:
        begun.wait(10)
        lead(link, tmp_path / "b")
        go_on.set()

    moving = threading.Thread(target=move)
    moving.start()
    async with serving(link, loader=loader, poll_s=NEVER) as service:
        moving.join()
        assert await served_by(service) == "1"
        await looks(service)
        assert folders == [tmp_path / name / "demo" / "1" for name in "ab"]


@on_a_loop
async def test_a_root_that_cannot_be_read_is_told_once_for_each_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level("INFO", "headstart")
    root = tmp_path / "models"
    write_package(root / "demo" / "1", 1)

    def denied(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    async with serving(root, poll_s=NEVER) as service:
        root.rename(tmp_path / "moved")
        await looks(service)
        with pytest.raises(ServeError, match="the server's log says why"):
            await service.load("demo", {})
        assert (told(caplog, "cannot be read"), told(caplog, "No such file")) == (1, 1)
        root.symlink_to(root)
        await looks(service)
        assert (told(caplog, "cannot be read"), told(caplog, "Too many levels")) == (2, 1)
        root.unlink()
        (tmp_path / "moved").rename(root)
        with monkeypatch.context() as other_user:
            other_user.setattr(Path, "iterdir", denied)
            await looks(service)
        assert (told(caplog, "cannot be read"), told(caplog, "Permission denied")) == (3, 1)
        assert not told(caplog, "can be read again")
        await looks(service)
        assert told(caplog, "can be read again") == 1
        assert await served_by(service) == "1"


@on_a_loop
async def test_a_copy_that_takes_its_time_is_opened_once_and_when_it_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    root, whole = tmp_path / "models", write_package(tmp_path / "whole", 2)
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        content, target = (whole / MODEL).read_bytes(), root / "demo" / "2"
        target.mkdir()
        with (target / MODEL).open("wb") as file:
            for start in range(0, len(content), len(content) // 5):
                file.write(content[start : start + len(content) // 5])
                file.flush()
                await service.repository.look()
                assert rows(service)["demo", "2"] == ("UNAVAILABLE", CHANGING)
                assert await status_of(service, "demo", "2") == 503
        shutil.copy(whole / "manifest.json", target)
        await service.repository.look()
        assert await served_by(service) == "1"
        await service.repository.look()
        assert rows(service)["demo", "2"] == ("READY", "")
        assert service.metrics.counts()["loads"] == {"ready": 2, "refused": 0}
        assert not told(caplog, "refused")


@on_a_loop
async def test_a_model_that_is_still_copied_says_so_and_is_loaded_at_once_by_request(tmp_path: Path):
    root = tmp_path / "models"
    root.mkdir()
    async with serving(root, poll_s=NEVER) as service:
        break_digest(write_package(root / "demo" / "1", 1))
        with pytest.raises(ServeError, match="was changed"):
            await service.load("demo", {})
        shutil.rmtree(root / "demo" / "1")
        write_package(root / "demo" / "1", 1)
        await service.repository.look()
        with pytest.raises(ServeError, match=f"demo is not ready: {CHANGING}"):
            service.repository.route("demo", None)
        await service.load("demo", {})
        assert await served_by(service) == "1"
        write_package(root / "other" / "1", 1)
        await service.load("other", {})
        assert await served_by(service, "other") == "1"


@on_a_loop
async def test_what_serves_stays_while_what_follows_it_is_still_copied(tmp_path: Path):
    """Where a version is moved out and its successor in, nobody is told 503 for the time of a look."""
    root = tmp_path / "models"
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER, policy=Policy.parse("canary:2:10%")) as service:
        shutil.rmtree(root / "demo" / "1")
        write_package(root / "demo" / "2", 2)
        await service.repository.look()
        assert await served_by(service) == "1"
        assert rows(service)["demo", "1"][0] == "READY"
        await service.repository.look()
        assert await served_by(service) == "2"
        assert [*rows(service)] == [("demo", "2")]


@on_a_loop
async def test_a_policy_that_can_do_nothing_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = tmp_path / "models"
    for version in (1, 2):
        write_package(root / "demo" / str(version), version)
    policies = {"dmeo": Policy.parse("pinned:1")}
    async with serving(root, poll_s=NEVER, policies=policies, policy=Policy.parse("canary:7:10%")) as service:
        await looks(service)
        assert told(caplog, "the policy pinned:1 is of the model dmeo, which is not there") == 1
        assert told(caplog, "demo: the canary 7 of its policy is not there; there are 1, 2") == 1
        assert await served_by(service) == "2"
        assert rows(service)["demo", "2"] == ("READY", "the canary 7 of its policy is not there")
        (root / "demo" / "policy").write_text("pinned:8")
        await looks(service)
        assert told(caplog, "demo: version 8 of its policy is not there") == 1
        write_package(root / "demo" / "8", 8)
        await looks(service)
        assert rows(service)["demo", "8"] == ("READY", "")
        shutil.rmtree(root / "demo" / "8")
        await looks(service)
        assert told(caplog, "demo: version 8 of its policy is not there") == 2
        shutil.rmtree(root / "demo")
        await looks(service)
        assert told(caplog, "is not there") == 4
