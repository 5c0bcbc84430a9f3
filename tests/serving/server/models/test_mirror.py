"""Repositories behind URLs: what file, zip and HTTP file systems hold is served, followed, and kept when they fail."""

import asyncio
import contextlib
import errno
import functools
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from headstart.serving.manifest import MANIFEST
from headstart.serving.package import MODEL
from headstart.serving.server.errors import StartError
from headstart.serving.server.models import mirror as mirror_module
from headstart.serving.server.models.folder import Folder, scan
from headstart.serving.server.models.mirror import Mirror
from headstart.serving.server.models.policy import Policy
from headstart.serving.server.models.remote import is_url
from headstart.serving.server.service import Service
from tests.serving.server.graphs import write_package
from tests.serving.server.models.test_repository import NEVER, rows, served_by, serving, status_of, until
from tests.serving.server.scheduling.test_batching import on_a_loop


class Faulty(LocalFileSystem):
    """The local file system, which fails when a test says so."""

    protocol = "faulty"
    cachable = False
    fault: ClassVar[str] = ""
    more: ClassVar[dict[str, Any]] = {}
    listed: Any = None

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("faulty://"))

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        if self.fault == "listing":
            raise ConnectionError("no route to user:secret, https://user:secret@store.example/x")
        if self.listed is None:  # kept until it is told to forget it, as object stores' file systems do
            self.listed = super().find(path, *arguments, **options)
        found = self.listed
        if self.fault == "vanished":
            next(Path(one) for one in found if one.endswith("/2/model.onnx")).unlink()
        return {**found, **self.more}

    def invalidate_cache(self, path: str | None = None) -> None:
        self.listed = None

    def open(self, path: str, *arguments: Any, **options: Any) -> Any:
        if self.fault == "longer" and path.endswith("/2/model.onnx"):
            with Path(path).open("ab") as file:
                file.write(b"more")
        if self.fault == "reset" and path.endswith("/2/model.onnx"):
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        if self.fault == "slow" and path.endswith("weights"):
            return Slow()
        return super().open(path, *arguments, **options)


class Slow(io.BytesIO):
    """A file that takes a minute."""

    def read(self, size: int | None = -1, /) -> bytes:
        time.sleep(0.02)
        return bytes(1024)


@pytest.fixture(autouse=True)
def faulty() -> Iterator[None]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    yield
    Faulty.fault, Faulty.more = "", {}


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    folder = tmp_path / "bucket"
    write_package(folder / "demo" / "1", 1)
    return folder


@asynccontextmanager
async def mirrored(url: str, policy: str = "latest") -> AsyncIterator[tuple[Service, Mirror]]:
    """A service of a URL, which is looked at when `follow` says so."""
    rule = Policy.parse(policy)
    mirror = Mirror(url, policy_of=lambda name: rule, look_s=3600)
    async with serving(mirror.folder, mirror=mirror, poll_s=NEVER, policy=rule) as service:
        yield service, mirror
    assert not mirror.folder.exists()


async def follow(service: Service, mirror: Mirror) -> None:
    mirror.look()
    await service.repository.look()


@contextlib.contextmanager
def over_http(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@on_a_loop
async def test_a_file_system_an_archive_and_a_web_server_are_served(remote: Path, tmp_path: Path):
    archive = shutil.make_archive(str(tmp_path / "models"), "zip", remote)
    with over_http(tmp_path) as address:
        for url in (f"file://{remote}", f"file://{remote}/", f"zip::file://{archive}", f"{address}/bucket"):
            async with mirrored(url) as (service, _):
                assert await served_by(service) == "1", url
                assert rows(service) == {("demo", "1"): ("READY", "")}


def copied(mirror: Mirror, name: str = "demo") -> list[str]:
    return sorted(path.name for path in (mirror.folder / name).iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("policy", "chosen", "answers"),
    [
        ("latest", ["4", "5"], "5"),
        ("pinned:2", ["2"], "2"),
        ("canary:1:10%", ["1", "4", "5"], "5"),
        ("canary:5:10%", ["3", "4", "5"], "4"),
        ("pinned:9", [], ""),
    ],
)
@pytest.mark.parametrize("by", ["option", "file"])
@on_a_loop
async def test_the_versions_that_the_policy_chooses_are_copied(
    remote: Path, policy: str, chosen: list[str], answers: str, by: str
):
    for version in range(2, 6):
        write_package(remote / "demo" / str(version), version)
    if by == "file":
        (remote / "demo" / "policy").write_text(policy)
    async with mirrored(f"file://{remote}", policy if by == "option" else "latest") as (service, mirror):
        if chosen:
            assert copied(mirror) == chosen
            assert await served_by(service) == answers
        else:
            assert await status_of(service) == 503
        others = {row for row in rows(service).items() if row[0][1] not in chosen}
        unchosen = ("UNAVAILABLE", f"not chosen by the policy {policy}")
        assert others == {(("demo", version), unchosen) for version in "12345" if version not in chosen}


@on_a_loop
async def test_the_index_lists_what_lies_at_the_url_now(remote: Path, caplog: pytest.LogCaptureFixture):
    for version in range(2, 5):
        write_package(remote / "demo" / str(version), version)
    write_package(remote / "other" / "1", 1)
    (remote / "other" / "policy").write_text("pinned:7")
    async with mirrored(f"file://{remote}") as (service, mirror):
        assert "other: version 7 of its policy is not there; there are 1" in caplog.messages
        assert {row: state for row, (state, _) in rows(service).items()} == {
            ("demo", "1"): "UNAVAILABLE",
            ("demo", "2"): "UNAVAILABLE",
            ("demo", "3"): "UNAVAILABLE",
            ("demo", "4"): "READY",
            ("other", "1"): "UNAVAILABLE",
        }
        for gone in ("demo/1", "other"):
            shutil.rmtree(remote / gone)
        await follow(service, mirror)
        assert {*rows(service)} == {("demo", "2"), ("demo", "3"), ("demo", "4")}
        shutil.rmtree(remote / "demo" / "2")
        await follow(service, mirror)
        assert {*rows(service)} == {("demo", "3"), ("demo", "4")}
        assert sorted(path.name for path in mirror.folder.iterdir()) == [".versions", "demo"]
        assert sorted(path.name for path in (mirror.folder / "demo").iterdir()) == ["3", "4"]


@on_a_loop
async def test_a_copy_stays_while_its_version_is_there_and_may_serve(remote: Path):
    write_package(remote / "demo" / "2", 2)
    async with mirrored(f"file://{remote}") as (service, mirror):
        for version in ("3", "4"):  # both are refused
            write_package(remote / "demo" / version, int(version))
            (remote / "demo" / version / MODEL).write_bytes(b"damaged")
            await follow(service, mirror)
        assert await served_by(service) == "2"
        assert copied(mirror) == ["1", "2", "3", "4"]
        shutil.rmtree(remote / "demo" / "1")
        await follow(service, mirror)
        assert copied(mirror) == ["2", "3", "4"]
        write_package(remote / "demo" / "5", 5)
        await follow(service, mirror)
        assert await served_by(service) == "5"


def damage(remote: Path, *versions: int) -> None:
    for version in versions:
        if not (remote / "demo" / str(version)).exists():
            write_package(remote / "demo" / str(version), version)
        (remote / "demo" / str(version) / MODEL).write_bytes(b"damaged")


async def served_in_the_end(service: Service, version: str) -> None:
    """Wait until it answers: the mirror looks by itself as soon as it hears of what was refused."""
    for _ in range(200):
        await service.repository.look()
        if rows(service).get(("demo", version), ("",))[0] == "READY":
            assert await served_by(service) == version
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"version {version} does not answer: {rows(service)}")


@on_a_loop
async def test_older_versions_are_copied_while_those_that_are_there_do_not_load(remote: Path):
    damage(remote, 2, 3, 4, 5)
    async with mirrored(f"file://{remote}") as (service, mirror):
        await served_in_the_end(service, "1")
        assert copied(mirror) == ["1", "2", "3", "4", "5"]
        shutil.rmtree(remote / "demo" / "5")
        await follow(service, mirror)
        write_package(remote / "demo" / "5", 5)  # sound this time
        await follow(service, mirror)
        assert await served_by(service) == "5"
        damage(remote, 6)
        await follow(service, mirror)
        assert await served_by(service) == "5"
        (remote / "demo" / "6" / MODEL).unlink()
        (remote / "demo" / "6" / MANIFEST).unlink()
        (remote / "demo" / "6").rmdir()
        write_package(remote / "demo" / "6", 6)  # in place, without a look between
        await follow(service, mirror)
        assert await served_by(service) == "6"


@on_a_loop
async def test_what_a_policy_does_not_choose_is_not_copied_for_what_does_not_load(remote: Path):
    damage(remote, 2, 3)
    async with mirrored(f"file://{remote}", "pinned:3") as (service, mirror):
        await follow(service, mirror)
        await follow(service, mirror)
        assert copied(mirror) == ["3"]
        assert await status_of(service) == 503


@on_a_loop
async def test_a_policy_that_changes_brings_the_version_that_it_names(remote: Path):
    for version in range(2, 6):
        write_package(remote / "demo" / str(version), version)
    async with mirrored(f"file://{remote}") as (service, mirror):
        assert await served_by(service) == "5"
        (remote / "demo" / "policy").write_text("pinned:1")
        await follow(service, mirror)
        assert await served_by(service) == "1"
        (remote / "demo" / "policy").write_text("no policy")
        await follow(service, mirror)
        assert await served_by(service) == "1"


@pytest.mark.parametrize("scheme", ["file", "http"])
@on_a_loop
async def test_versions_and_policies_are_followed(remote: Path, scheme: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("headstart.serving.server.models.mirror._KEPT_S", 0.0)
    with over_http(remote) as address:
        async with mirrored(f"file://{remote}" if scheme == "file" else address) as (service, mirror):
            write_package(remote / "demo" / "2", 2)
            write_package(remote / "other" / "7", 7)
            await follow(service, mirror)
            assert (await served_by(service), await served_by(service, "other")) == ("2", "7")
            (remote / "demo" / "policy").write_text("pinned:1")
            await follow(service, mirror)
            assert await served_by(service) == "1"
            (remote / "demo" / "policy").unlink()
            shutil.rmtree(remote / "other")
            await follow(service, mirror)
            assert await served_by(service) == "2"
            assert await status_of(service, "other") == 404
            shutil.rmtree(remote / "demo" / "2")
            await follow(service, mirror)
            assert await served_by(service) == "1"
            await follow(service, mirror)
            held = sorted(path.name for path in (mirror.folder / ".versions").iterdir() if path.name.isdigit())
            assert len(held) == 1, "what was replaced and removed is deleted"


@on_a_loop
async def test_half_an_upload_is_refused_and_the_old_one_stays(remote: Path, tmp_path: Path):
    whole = write_package(tmp_path / "whole", 2)
    async with mirrored(f"file://{remote}") as (service, mirror):
        target = remote / "demo" / "2"
        target.mkdir()
        shutil.copy(whole / MODEL, target)  # the manifest is still to come
        await follow(service, mirror)
        assert await served_by(service) == "1"
        assert rows(service)["demo", "2"][0] == "UNAVAILABLE"
        assert str(mirror.folder) not in rows(service)["demo", "2"][1]
        shutil.copy(whole / MANIFEST, target)
        await follow(service, mirror)
        assert await served_by(service) == "2"


@pytest.mark.parametrize("scheme", ["file", "http"])
@on_a_loop
async def test_a_version_that_is_overwritten_serves_on_until_the_new_one_is_whole(
    remote: Path, tmp_path: Path, scheme: str
):
    other = write_package(tmp_path / "other", 1.5)
    place = remote / "demo" / "1"
    with over_http(remote) as address:
        async with mirrored(f"file://{remote}" if scheme == "file" else address) as (service, mirror):
            shutil.copy(other / MODEL, place)
            os.utime(place / MODEL, (2e9, 2e9))  # HTTP tells whole seconds
            await follow(service, mirror)
            assert await served_by(service) == "1"  # with the old one's answer
            assert "SHA-256" in rows(service)["demo", "1"][1]
            shutil.copy(other / MANIFEST, place)
            os.utime(place / MANIFEST, (2e9, 2e9))
            await follow(service, mirror)
            assert rows(service)["demo", "1"] == ("READY", "")
            assert service.repository.find("demo", None).model.manifest.name == "mark-1.5"


@pytest.mark.parametrize("fault", ["listing", "vanished", "longer", "reset"])
@on_a_loop
async def test_what_is_loaded_serves_on_while_the_remote_fails(
    remote: Path, fault: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    async with mirrored(f"faulty://{remote}") as (service, mirror):
        write_package(remote / "demo" / "2", 2)
        kept = shutil.copytree(remote / "demo" / "2", tmp_path / "kept")
        Faulty.fault = fault
        with caplog.at_level(logging.WARNING, "headstart"):
            for _ in range(1 if fault == "vanished" else 3):
                await follow(service, mirror)
                assert await served_by(service) == "1"
                found = rows(service)
                assert found.pop(("demo", "1")) == ("READY", "")
                listed = {} if fault == "listing" else {("demo", "2"): ("UNAVAILABLE", mirror_module._NOT_COPIED)}
                assert found == listed
        told = [one for one in caplog.messages if "cannot be" in one]
        assert len(told) == (3 if fault == "longer" else 1), told  # its size differs each time
        assert "secret@" not in caplog.text
        Faulty.fault = ""
        shutil.copytree(kept, remote / "demo" / "2", dirs_exist_ok=True)
        await follow(service, mirror)
        assert await served_by(service) == "2"


@on_a_loop
async def test_a_url_that_is_empty_all_at_once_takes_nothing_down(remote: Path, caplog: pytest.LogCaptureFixture):
    async with mirrored(f"file://{remote}") as (service, mirror):
        remote.rename(remote.with_name("unmounted"))
        await follow(service, mirror)
        assert await served_by(service) == "1"
        assert "empty all at once" in caplog.text


@pytest.mark.parametrize("what", [f".versions/1/{MODEL}", ".versions/1", ".versions", "demo", "."])
@on_a_loop
async def test_what_is_deleted_from_the_copy_is_copied_again(remote: Path, what: str):
    """As whoever cleans temporary folders of old files does."""
    write_package(remote / "gone" / "1", 1)
    async with mirrored(f"file://{remote}") as (service, mirror):
        path = mirror.folder / what
        assert path.exists()
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(remote / "gone")
        await follow(service, mirror)
        assert await served_by(service) == "1"
        assert (mirror.folder / "demo" / "1" / MODEL).is_file()
        assert mirror.folder.stat().st_mode & 0o077 == 0


@on_a_loop
async def test_a_disk_that_is_full_refuses_the_version_alone(remote: Path, caplog: pytest.LogCaptureFixture):
    async with mirrored(f"file://{remote}") as (service, mirror):
        write_package(remote / "demo" / "2", 2)
        (remote / "demo" / "2" / "weights").write_bytes(bytes(3 << 20))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))  # a write beyond it fails as on a full disk
        try:
            await follow(service, mirror)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert await served_by(service) == "1"
        assert os.strerror(errno.EFBIG) in caplog.text
        assert len(list((mirror.folder / ".versions").glob("[0-9]*"))) == 1, "no half is left"


def test_what_the_disk_has_no_room_for_is_refused_before_it_is_copied(remote: Path, caplog: pytest.LogCaptureFixture):
    Faulty.more = {f"{remote}/demo/2/{MODEL}": {"type": "file", "size": 1 << 60}}
    mirror = Mirror(f"faulty://{remote}")
    mirror.look()
    assert f"demo/2 of faulty://{remote} cannot be copied: it has {1 << 40} MiB, and " in caplog.text
    assert copied(mirror) == ["1"]
    mirror.close()


@pytest.mark.parametrize("fault", ["unlink", "mkdir"])
@on_a_loop
async def test_a_disk_that_fails_ends_no_deployment(
    remote: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    failed = []
    real = getattr(Path, fault)

    def failing(path: Path, *arguments: Any, **options: Any) -> None:
        if path.is_relative_to(mirror.folder) and (fault == "mkdir" or path.name == "1"):
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        real(path, *arguments, **options)

    write_package(remote / "demo" / "2", 2)
    write_package(remote / "other" / "1", 1)
    mirror = Mirror(f"file://{remote}", look_s=0.02)
    async with serving(mirror.folder, mirror=mirror, poll_s=NEVER) as service:
        with monkeypatch.context() as broken:
            broken.setattr(Path, fault, failing)
            shutil.rmtree(remote / "demo" / "1")
            shutil.rmtree(remote / "other")
            await until(lambda: len(failed) > 2)
        assert os.strerror(errno.EIO) in caplog.text
        write_package(remote / "demo" / "3", 3)
        await served_in_the_end(service, "3")
        assert copied(mirror) == ["2", "3"]
        assert not (mirror.folder / "other").exists()


@on_a_loop
async def test_what_cannot_be_copied_is_read_again_after_pauses_that_grow(
    remote: Path, monkeypatch: pytest.MonkeyPatch
):
    now, attempts = [0.0], []
    copy = Mirror._copy

    def full(mirror: Mirror, entry: Any, target: Path) -> None:
        copy(mirror, entry, target)
        if target.name == MODEL:
            attempts.append(now[0])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async with mirrored(f"file://{remote}") as (service, mirror):
        write_package(remote / "demo" / "2", 2)
        mirror._look_s = 10.0
        monkeypatch.setattr(mirror_module, "time", SimpleNamespace(monotonic=lambda: now[0]))  # the loop keeps its own
        with monkeypatch.context() as disk:
            disk.setattr(Mirror, "_copy", full)
            for look in range(150):
                now[0] = look * 10.0
                mirror.look()
            assert attempts == [0, 10, 30, 70, 150, 310, 610, 910, 1210]
            os.utime(remote / "demo" / "2" / MODEL, (2e9, 2e9))  # what changes is copied at once
            mirror.look()
            assert attempts[-1] == 1490
        now[0] += 10.0
        await follow(service, mirror)
        assert await served_by(service) == "2"


def test_names_that_lead_elsewhere_are_not_followed(remote: Path, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("outside")
    root = str(remote)
    names = [
        "../escaped/1/a", "demo/../../escaped", "demo/1/../../../escaped", "demo/1/../../x", "demo/1//etc/x",
        "demo/01/a", "demo/1/", "demo/1", "demo/2/a/./b", "demo/2/..\\x", "demo/2/a\0b", ".versions/1/model.onnx",
        "..", "/etc/1/x", "demo/policy/../../x", "demo/latest/model.onnx",
    ]  # fmt: skip
    entry = {"type": "file", "size": 7, "mtime": 1.0}
    Faulty.more = {f"{root}/{name}": {**entry, "name": str(outside)} for name in names}
    Faulty.more |= {"/elsewhere/demo/3/model.onnx": entry, "elsewhere/3/model.onnx": entry}
    before = set(tmp_path.rglob("*"))
    mirror = Mirror(f"faulty://{remote}")
    try:
        mirror.start()
        found = {path.relative_to(mirror.folder).as_posix() for path in (mirror.folder / "demo" / "1").rglob("*")} | {
            path.name for path in mirror.folder.iterdir()
        }
        assert found == {"demo/1/model.onnx", "demo/1/manifest.json", "demo", ".versions"}
        assert set(tmp_path.rglob("*")) == before
        assert [path.name for path in (mirror.folder / "demo").iterdir()] == ["1"]
    finally:
        mirror.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("dropbox://models", "pip install"),
        ("nonsense://models", "Protocol not known: nonsense"),
        ("zip::file:///nowhere/models.zip", "cannot be opened"),
    ],
)
def test_a_url_that_cannot_be_opened_is_told(url: str, words: str):
    with pytest.raises(StartError, match=words):
        Mirror(url)


def test_without_fsspec_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(StartError, match=r"pip install fsspec` with what its protocol needs \(s3fs") as caught:
        Mirror("https://user:secret@store.example/models")
    assert "secret" not in str(caught.value)


def test_a_url_that_cannot_be_listed_ends_the_start(remote: Path):
    Faulty.fault = "listing"
    mirror = Mirror(f"faulty://{remote}")
    with pytest.raises(StartError, match="ConnectionError: no route") as caught:
        mirror.start()
    assert "secret@" not in str(caught.value)
    mirror.close()


def test_a_web_server_that_is_not_there_is_no_empty_repository():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listened on
        mirror = Mirror(f"http://127.0.0.1:{taken.getsockname()[1]}/models")
        try:
            with pytest.raises(StartError, match=r"cannot be listed: ClientConnectorError"):
                mirror.start()
        finally:
            mirror.close()


def test_a_stop_does_not_wait_for_a_file_that_is_being_copied(remote: Path):
    (remote / "demo" / "1" / "weights").write_bytes(bytes(3 << 20))
    Faulty.fault = "slow"
    mirror = Mirror(f"faulty://{remote}")
    starting = threading.Thread(target=mirror.start)
    starting.start()
    time.sleep(0.2)
    began = time.monotonic()
    mirror.close()
    starting.join(5)
    assert not starting.is_alive()
    assert time.monotonic() - began < 2
    assert not mirror.folder.exists()


def test_a_version_is_whole_at_every_moment_while_it_is_replaced(remote: Path, tmp_path: Path):
    others = [write_package(tmp_path / f"other{number}", number) for number in (2, 3)]
    (remote / "demo" / "1" / "only0").touch()
    mirror = Mirror(f"file://{remote}", look_s=3600)
    mirror.start()
    seen, wrong = set(), []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            versions = scan(mirror.folder).get("demo", Folder()).versions
            names = {row[0] for row in versions.get(1, ())}
            if not {MODEL, MANIFEST} < names:
                wrong.append(names)
            seen.add(versions.get(1))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for number in range(60):
            for name in (MODEL, MANIFEST):
                shutil.copy(others[number % 2] / name, remote / "demo" / "1")
            (remote / "demo" / "1" / f"only{number}").rename(remote / "demo" / "1" / f"only{number + 1}")
            mirror.look()
            time.sleep(0.01)
    finally:
        done.set()
        thread.join()
        mirror.close()
    assert not wrong
    assert len(seen) > 20


def test_a_version_can_be_read_to_its_end_whatever_replaces_it(remote: Path, tmp_path: Path):
    other = write_package(tmp_path / "other", 2)
    mirror = Mirror(f"file://{remote}", look_s=3600)
    mirror.start()
    try:
        reading = (mirror.folder / "demo" / "1").resolve()
        shutil.copy(other / MODEL, remote / "demo" / "1")
        for _ in range(3):  # one look after the other, as refused versions cause them
            mirror.look()
        assert {MODEL, MANIFEST} <= {path.name for path in reading.iterdir()}
        assert (mirror.folder / "demo" / "1").resolve() != reading
    finally:
        mirror.close()


def test_a_folder_is_no_url():
    assert [is_url(text) for text in ("models", "/a/b:c", "s3://b/m", "zip::/a.zip", "file:///m")] == [
        False, False, True, True, True,
    ]  # fmt: skip


def test_the_command_serves_a_url_and_deletes_its_copy(remote: Path, tmp_path: Path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "headstart.cluster.cli", "serve", f"file://{remote}", "--port", "0"]
    with subprocess.Popen(
        [*command, "--threads", "1"], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert re.search(rf"serves 1 of 1 versions in file://{re.escape(str(remote))}$", line.strip()), line
        (copy,) = scratch.glob("headstart-serve-*")
        assert copy.stat().st_mode & 0o077 == 0
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert not [*scratch.glob("headstart-*")]


def test_several_processes_get_older_versions_too(remote: Path):
    damage(remote, 2, 3, 4)
    command = [sys.executable, "-m", "headstart.cluster.cli", "serve", f"file://{remote}", "--port", "0"]
    with subprocess.Popen([*command, "--workers", "2"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            url = re.search(r"http://\S+", line)
            assert url, line
            found = None
            for _ in range(200):
                with contextlib.suppress(urllib.error.HTTPError):  # 503 until it is there
                    with urllib.request.urlopen(f"{url[0]}/v2/models/demo", timeout=10) as answer:
                        found = json.load(answer)["versions"]
                    break
                time.sleep(0.1)
            assert found == ["1"]
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
