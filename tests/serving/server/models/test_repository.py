"""The repository: what is loaded of a folder, what is refused and why, and versions that change under load."""

import asyncio
import errno
import gc
import hashlib
import json
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from headstart.serving.device import Device, open_on
from headstart.serving.errors import PackageError
from headstart.serving.manifest import MANIFEST
from headstart.serving.one_thread import OneThread
from headstart.serving.package import MODEL
from headstart.serving.runtime import Predictor
from headstart.serving.server.errors import ServeError
from headstart.serving.server.models import folder as folders
from headstart.serving.server.models import from_package, loading
from headstart.serving.server.models import root as roots
from headstart.serving.server.models.folder import Opening
from headstart.serving.server.models.from_package import load_package
from headstart.serving.server.models.loading import Scheduling
from headstart.serving.server.models.model import LoadedModel, load_graph, public
from headstart.serving.server.models.policy import Policy
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.service import Service
from headstart.serving.server.wire.protocol import InferRequest, InferResponse
from tests.serving.server.graphs import (
    classifier,
    identities,
    logits,
    mlp,
    model_bytes,
    rewrite_manifest,
    write_package,
)
from tests.serving.server.scheduling.test_batching import on_a_loop

NEVER = 1e9
"""Seconds between two looks at the folder, in tests that look themselves."""
IMAGE = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@asynccontextmanager
async def serving(root: Path, **settings: Any) -> AsyncIterator[Service]:
    service = Service(Repository(root, **{"threads": 1, "poll_s": 0.02, **settings}))
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


async def infer(service: Service, name: str = "demo", version: str | None = None, **fields: Any) -> InferResponse:
    given = service.infer(InferRequest(model=name, version=version, **{"inputs": {"images": IMAGE}, **fields}))
    return given if isinstance(given, InferResponse) else await given


async def served_by(service: Service, name: str = "demo", version: str | None = None) -> str:
    """The version that answered, once its answer was that of the package with this mark."""
    response = await infer(service, name, version)
    np.testing.assert_allclose(response.outputs["logits"], logits(IMAGE, float(response.version)), rtol=1e-6)
    return response.version


async def status_of(service: Service, name: str = "demo", version: str | None = None) -> int:
    with pytest.raises(ServeError) as caught:
        await infer(service, name, version)
    return caught.value.status


def rows(service: Service) -> dict[tuple[str, str], tuple[str, str]]:
    return {(row["name"], row["version"]): (row["state"], row["reason"]) for row in service.repository_index(False)}


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        await asyncio.sleep(0.005)


async def looks(service: Service) -> None:
    """Look at the folder twice, as the poll does: a version is opened at the second look that sees the same files."""
    await service.repository.look()
    await service.repository.look()


@on_a_loop
async def test_a_copied_package_is_a_deployment(root: Path, pristine: Path):
    async with serving(root) as service:
        assert await status_of(service) == 404
        assert service.ready()
        shutil.copytree(pristine, root / "demo" / "1")
        await until(lambda: service.model_ready("demo", None))
        images = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), np.uint8)
        response = await infer(service, inputs={"images": images})
        expected = Predictor(pristine, threads=1).predict(images)
        np.testing.assert_array_equal(response.outputs["logits"], expected[0])
        np.testing.assert_array_equal(response.outputs["probabilities"], expected[1])
        assert rows(service) == {("demo", "1"): ("READY", "")}


@on_a_loop
async def test_all_processes_look_at_the_folder_at_the_same_moments(root: Path, monkeypatch: pytest.MonkeyPatch):
    write_package(root / "demo" / "1", 1)
    moments: dict[int, float] = {}
    look = Repository.look

    async def noted(self: Repository) -> None:
        moments.setdefault(id(self), time.monotonic())
        await look(self)

    async with serving(root, poll_s=1.0) as one:
        await asyncio.sleep(0.5)
        async with serving(root, poll_s=1.0) as other:
            monkeypatch.setattr(Repository, "look", noted)
            while not {id(one.repository), id(other.repository)} <= {*moments}:
                await asyncio.sleep(0.01)
    apart = abs(moments[id(one.repository)] - moments[id(other.repository)]) % 1.0
    assert min(apart, 1.0 - apart) < 0.25  # half a second, if each went by its own start


@pytest.mark.parametrize("order", [[MODEL, MANIFEST], [MANIFEST, MODEL]], ids="-first then ".join)
@on_a_loop
async def test_a_package_that_appears_in_pieces_is_loaded_when_it_is_whole(
    root: Path, tmp_path: Path, order: list[str]
):
    whole = write_package(tmp_path / "whole", 2)
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=0.005) as service:
        target = root / "demo" / "2"
        target.mkdir()
        for number, name in enumerate(order):
            content = (whole / name).read_bytes()
            with (target / name).open("wb") as file:
                for start in range(0, len(content), len(content) // 3 + 1):
                    file.write(content[start : start + len(content) // 3 + 1])
                    file.flush()
                    last = number == 1 and start + len(content) // 3 + 1 >= len(content)
                    if not last:
                        await looks(service)
                        assert await served_by(service) == "1"
                        state, reason = rows(service)["demo", "2"]
                        assert state == "UNAVAILABLE"
                        assert reason
                        assert str(tmp_path) not in reason
        await until(lambda: rows(service)["demo", "2"] == ("READY", ""))
        assert await served_by(service) == "2"


def break_digest(folder: Path) -> None:
    (folder / MODEL).write_bytes(classifier(9))


def break_graph(folder: Path) -> None:
    content = b"not a graph"
    (folder / MODEL).write_bytes(content)
    rewrite_manifest(folder, files={MODEL: hashlib.sha256(content).hexdigest()})


def other_graph(folder: Path) -> None:
    (folder / MODEL).write_bytes(mlp())
    rewrite_manifest(folder, files={MODEL: hashlib.sha256(mlp()).hexdigest()})


def runs_not(folder: Path) -> None:
    graph = classifier(2, line=1000)
    (folder / MODEL).write_bytes(graph)
    rewrite_manifest(folder, files={MODEL: hashlib.sha256(graph).hexdigest()})


def link(folder: Path) -> None:
    target = folder.parent.parent.parent / "elsewhere.onnx"
    shutil.move(folder / MODEL, target)
    (folder / MODEL).symlink_to(target)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "digest": (break_digest, "was changed"),
    "no graph": (break_graph, "cannot load"),
    "another graph": (other_graph, "its graph has x float32"),
    "does not run": (runs_not, "it does not run"),
    "labels": (lambda folder: rewrite_manifest(folder, labels=["a", "b"]), "3 columns for 2 labels"),
    "schema": (lambda folder: rewrite_manifest(folder, schema=99), "install a newer headstart"),
    "parity": (lambda folder: rewrite_manifest(folder, parity={"tolerance": 1, "provider": "", "rows": []}), "parity"),
    "no JSON": (lambda folder: (folder / MANIFEST).write_text('{"schema": 1'), "damaged"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no manifest.json"),
    "no model": (lambda folder: (folder / MODEL).unlink(), "lacks model.onnx"),
    "extra file": (lambda folder: (folder / "run.sh").write_text("true"), "run.sh, which its manifest does not list"),
    "link": (link, "is a link"),
    "leads out": (
        lambda folder: rewrite_manifest(folder, files={MODEL: "0" * 64, "../1/model.onnx": "0"}),
        "lacks ../1",
    ),
    "unreadable": (lambda folder: (folder / MODEL).unlink() or (folder / MODEL).mkdir(), "lacks model.onnx"),
}


@pytest.mark.parametrize("name", BROKEN)
@on_a_loop
async def test_a_bad_package_is_refused_with_a_reason_and_the_old_one_stays(root: Path, tmp_path: Path, name: str):
    damage, words = BROKEN[name]
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        draft = write_package(tmp_path / "a" / "draft" / "2", 2)
        damage(draft)
        shutil.move(draft, root / "demo" / "2")
        await looks(service)
        assert await served_by(service) == "1"
        state, reason = rows(service)["demo", "2"]
        assert (state, words in reason) == ("UNAVAILABLE", True), reason
        assert reason
        assert str(tmp_path) not in reason
        assert "/tmp" not in reason
        assert rows(service)["demo", "1"] == ("READY", "")
        assert await status_of(service, "demo", "2") == 503
        shutil.rmtree(root / "demo" / "2")
        write_package(root / "demo" / "2", 2)
        await looks(service)
        assert await served_by(service) == "2"


@on_a_loop
async def test_a_server_starts_with_a_bad_package_and_serves_the_best_that_is_sound(root: Path):
    for version in (1, 2, 10):
        write_package(root / "demo" / str(version), version)
    break_digest(root / "demo" / "10")
    break_digest(write_package(root / "other" / "1", 1))
    async with serving(root) as service:
        assert service.ready()
        assert await served_by(service) == "2"
        assert rows(service)["demo", "1"] == ("UNAVAILABLE", "not chosen by the policy latest")
        assert await status_of(service, "other") == 503
        assert not service.model_ready("other", None)
        assert service.metrics.counts()["loads"] == {"ready": 1, "refused": 2}
        write_package(root / "demo" / "11", 11)
        await until(lambda: service.model_ready("demo", "11"))
        assert await served_by(service) == "11"
        assert await status_of(service, "demo", "2") == 404


@on_a_loop
async def test_a_package_that_was_refused_is_not_read_again_until_it_changes(root: Path):
    break_digest(write_package(root / "demo" / "1", 1))
    attempts = []

    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        attempts.append(version)
        return load_package(folder, name=name, version=version, device=Device(threads=1))

    async with serving(root, loader=loader, poll_s=NEVER) as service:
        for _ in range(5):
            await looks(service)
        assert attempts == ["1"]
        with pytest.raises(ServeError, match=r"demo version 1 cannot be loaded: .*was changed"):
            await service.load("demo", {})
        assert attempts == ["1", "1"]


@on_a_loop
async def test_a_full_disk_refuses_a_version_until_there_is_space_again(root: Path, monkeypatch: pytest.MonkeyPatch):
    def no_space(source: Path, target: Path, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    write_package(root / "demo" / "1", 1)
    async with serving(root) as service:
        monkeypatch.setattr(loading, "_RETRY_S", 0.2)
        with monkeypatch.context() as full:
            full.setattr(shutil, "copyfile", no_space)
            write_package(root / "demo" / "2", 2)
            await until(lambda: "No space left" in rows(service).get(("demo", "2"), ("", ""))[1])
            state, reason = rows(service)["demo", "2"]
            assert state == "UNAVAILABLE"
            assert "free space" in reason
            assert str(root) not in reason
            assert await served_by(service) == "1"
        await until(lambda: rows(service)["demo", "2"] == ("READY", ""))
        assert await served_by(service) == "2"


def lacks_memory() -> None:
    """What ONNX Runtime says where it is given no 4 TiB."""
    size = onnx.helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1])
    zeros = onnx.helper.make_tensor_value_info("zeros", onnx.TensorProto.FLOAT, ["n"])
    nodes = [onnx.helper.make_node("ConstantOfShape", ["size"], ["zeros"])]
    model = load_graph(model_bytes(nodes, [size], [zeros], {}), name="zeros", device=Device(threads=1), max_batch=1)
    model.run({"size": np.array([1 << 40])}, ["zeros"])


def test_a_package_that_the_disk_has_no_room_for_is_refused_before_it_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_package(tmp_path / "demo", 1)
    os.truncate(folder / MODEL, 20 << 20)  # sparse
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=19 << 20))
    with pytest.raises(PackageError, match="demo cannot be copied: it has 20 MiB, and 19 MiB of the disk are free; "):
        load_package(folder, name="demo", version="1", device=Device(threads=1))


@on_a_loop
async def test_a_suspect_that_is_written_again_as_it_was_is_one_still(root: Path, tmp_path: Path):
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        openings: list[Opening] = []
        told: list[bool] = []
        service.repository.loading.on_opening = lambda opening, done: (openings.append(opening), told.append(done))
        write_package(root / "demo" / "2", 2)
        await looks(service)
        assert told == [False, True]
        service.repository.loading.suspects.update(openings)
        (root / "demo" / "2").rename(tmp_path / "before")
        shutil.copytree(tmp_path / "before", root / "demo" / "2", copy_function=shutil.copyfile)
        await looks(service)
        assert rows(service)["demo", "2"][1].startswith("processes of this server ended while they opened it")
        shutil.rmtree(root / "demo" / "2")
        write_package(root / "demo" / "2", 2.5)
        await looks(service)
        assert rows(service)["demo", "2"] == ("READY", "")
        other = openings[0]._replace(name="other")
        service.repository.loading.suspects.update([*openings, other])
        await service.unload("demo")
        await service.load("demo", {})  # by request it is tried whatever happened
        assert rows(service)["demo", "2"] == ("READY", "")
        assert service.repository.loading.suspects == {other}


def lacks_descriptors() -> None:
    try:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    except OSError as error:
        wrapped = PackageError("manifest.json cannot be read")
        wrapped.__cause__ = error
        raise PackageError("the folder that the operator knows") from wrapped


def lacks_a_folder() -> None:
    raise PackageError("it cannot be copied") from FileNotFoundError("No usable temporary directory found")


def lacks_a_thread() -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("fails", [lacks_memory, lacks_descriptors, lacks_a_folder, lacks_a_thread])
@on_a_loop
async def test_what_fails_for_want_of_something_is_tried_again_with_the_same_files(
    root: Path, fails: Any, monkeypatch: pytest.MonkeyPatch
):
    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        if version == "2" and lacking:
            fails()
        return load_package(folder, name=name, version=version, device=Device(threads=1))

    lacking = True
    write_package(root / "demo" / "1", 1)
    async with serving(root, loader=loader, poll_s=NEVER) as service:
        write_package(root / "demo" / "2", 2)
        await looks(service)
        assert rows(service)["demo", "2"][0] == "UNAVAILABLE"
        assert await served_by(service) == "1"
        assert service.repository.entries["demo"].refused == []
        lacking = False
        await looks(service)
        assert await served_by(service) == "1"  # after a pause
        monkeypatch.setattr(loading, "monotonic", lambda: time.monotonic() + 31)
        await looks(service)
        assert await served_by(service) == "2"
        assert rows(service)["demo", "2"] == ("READY", "")


@on_a_loop
async def test_words_of_a_package_are_no_lack_of_the_machine(root: Path):
    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        raise PackageError("it holds 'out of memory', which its manifest does not list")

    write_package(root / "demo" / "1", 1)
    async with serving(root, loader=loader, poll_s=NEVER) as service:
        assert service.repository.entries["demo"].refused == [1]


@on_a_loop
async def test_where_there_is_no_thread_to_load_in_it_is_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch):
    def start(thread: threading.Thread) -> None:
        if thread.name == "headstart-load":
            lacks_a_thread()
        start_thread(thread)

    start_thread = threading.Thread.start
    async with serving(root, poll_s=NEVER) as service:
        write_package(root / "demo" / "1", 1)
        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", start)
            await looks(service)
        assert rows(service)["demo", "1"] == ("UNAVAILABLE", "can't start new thread")
        monkeypatch.setattr(loading, "monotonic", lambda: time.monotonic() + 31)
        await looks(service)
        assert await served_by(service) == "1"


@on_a_loop
async def test_where_there_is_no_thread_to_read_the_folder_in_what_is_loaded_serves_on(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def start(thread: threading.Thread) -> None:
        lacks_a_thread()

    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor())  # which has no thread yet
        with monkeypatch.context() as full:
            full.setattr(threading.Thread, "start", start)
            await looks(service)
            with pytest.raises(ServeError, match="the server's log says why") as caught:
                await service.load("demo", {})
        assert caught.value.status == 503
        assert await served_by(service) == "1"
        assert [one.getMessage() for one in caplog.records if one.levelname == "ERROR"] == [
            f"{root} cannot be read, what is loaded serves on: can't start new thread"
        ]
        await service.load("demo", {})


@on_a_loop
async def test_what_happens_to_a_model_is_in_the_log_once(root: Path, caplog: pytest.LogCaptureFixture):
    async def said() -> list[str]:
        caplog.clear()
        for _ in range(3):
            await service.repository.look()
        return [one.getMessage() for one in caplog.records]

    caplog.set_level("INFO")
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        assert await said() == []
        write_package(root / "demo" / "v2", 2)
        assert await said() == ["demo v2: its name is no version; accepted: 1, 2, 3 and so on"]
        (root / "demo" / "v2").rename(root / "demo" / "2")
        loaded = "demo version 2 is loaded on CPUExecutionProvider"
        assert await said() == [loaded, "demo version 1 answers no new requests"]
        (root / "demo" / "policy").write_text("pinned:1")
        again = "demo version 1 is loaded on CPUExecutionProvider"
        assert await said() == ["demo: its policy is pinned:1", again, "demo version 2 answers no new requests"]
        (root / "demo" / "policy").write_text("newest")
        assert [one.partition(";")[0] for one in await said()] == [
            "demo policy: the file is not used: the policy 'newest' is not known"
        ]
        shutil.rmtree(root / "demo")
        assert await said() == ["demo version 1 answers no new requests"]


@on_a_loop
async def test_nothing_of_a_package_is_read_on_the_event_loop(root: Path, monkeypatch: pytest.MonkeyPatch):
    def read(path: Path, most: int) -> bytes:
        threads.append(threading.current_thread().name)
        return read_plain(path, most)

    read_plain, threads = folders.read_plain, []
    monkeypatch.setattr(folders, "read_plain", read)
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        assert await served_by(service) == "1"
    assert threads == ["headstart-load"]


@on_a_loop
async def test_one_thread_loads_all_and_ends_with_the_repository(root: Path):
    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        threads.append(threading.current_thread())
        return load_package(folder, name=name, version=version, device=Device(threads=1))

    threads: list[threading.Thread] = []
    async with serving(root, loader=loader, poll_s=NEVER) as service:
        for number in (1, 2, 3):
            write_package(root / "demo" / str(number), number)
            await looks(service)
    assert len(threads) == 3
    assert len({*threads}) == 1
    threads[0].join(10)
    assert not threads[0].is_alive()


@on_a_loop
async def test_what_was_taken_down_or_failed_is_let_go_of_before_another_is_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    """At once: a collector that comes by some time frees no memory of a GPU that the next version needs."""

    class Fails(LoadedModel):
        def warm_up(self) -> list[tuple[int, int]]:
            raise MemoryError

    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        kind = Fails if version == "2" else LoadedModel
        session = open_on(Device(threads=1), folder / MODEL)
        model = kind(name=name, version=version, session=session, max_batch=1, buckets=(1,))
        made.append(weakref.ref(model))
        return model

    made: list[weakref.ref[LoadedModel]] = []
    monkeypatch.setattr(loading._LOG, "warning", lambda *_: None)  # pytest keeps what is logged, and its error
    gc.disable()
    try:
        async with serving(root, loader=loader, poll_s=NEVER) as service:
            for version in (1, 2):
                write_package(root / "demo" / str(version), version)
                await looks(service)
            await until(lambda: [one() is None for one in made] == [False, True], 5)
            await service.unload("demo")
            await until(lambda: made[0]() is None, 5)
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["another graph", "labels", "does not run"])
@on_a_loop
async def test_a_refused_package_ends_on_the_thread_that_its_session_belongs_to(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    class Graphs(Device):
        """As with CUDA graphs, but for the provider."""

        thread = OneThread("graphs")

    class Session:
        """One that says where it ends."""

        def __init__(self, session: Any) -> None:
            self._session = session

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def __del__(self) -> None:
            ended.append(threading.current_thread().name)

    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        return load_package(folder, name=name, version=version, device=Graphs(threads=1))

    ended: list[str] = []
    monkeypatch.setattr(from_package, "open_on", lambda *given, **named: Session(open_on(*given, **named)))
    monkeypatch.setattr(from_package, "CPU", "another")  # which alone is not run in buffers
    monkeypatch.setattr(loading._LOG, "warning", lambda *_: None)  # pytest keeps what is logged, and its error
    damage, words = BROKEN[name]
    damage(write_package(root / "demo" / "1", 1))
    gc.disable()
    try:
        async with serving(root, loader=loader, poll_s=NEVER) as service:
            assert words in rows(service)["demo", "1"][1]
            await until(lambda: ended, 5)
    finally:
        gc.enable()
        Graphs.thread.stop()
    assert ended == ["graphs"]


@pytest.mark.parametrize("name", BROKEN)
@on_a_loop
async def test_a_bad_package_is_refused_until_its_files_change(root: Path, name: str):
    damage, _ = BROKEN[name]
    damage(write_package(root / "demo" / "1", 1))
    async with serving(root, poll_s=NEVER) as service:
        assert [one.again_at for one in service.repository.entries["demo"].failed.values()] == [None]


@on_a_loop
async def test_a_folder_that_cannot_be_read_concerns_its_own_model_alone(root: Path, monkeypatch: pytest.MonkeyPatch):
    iterdir = Path.iterdir

    def denied(path: Path) -> Iterator[Path]:
        if path.name in ("demo", "new"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return iterdir(path)

    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        write_package(root / "demo" / "2", 2)
        write_package(root / "new" / "1", 1)
        write_package(root / "other" / "3", 3)
        with monkeypatch.context() as other_user:
            other_user.setattr(Path, "iterdir", denied)
            await looks(service)
            assert (await served_by(service, "other"), await served_by(service)) == ("3", "1")
            for name in ("demo", "new"):
                assert rows(service)[name, ""] == ("UNAVAILABLE", "it cannot be read (Permission denied)")
        await looks(service)
        assert (await served_by(service), await served_by(service, "new")) == ("2", "1")
        assert ("demo", "") not in rows(service)


@on_a_loop
async def test_odd_names_are_left_alone_and_misplaced_packages_are_told(root: Path, tmp_path: Path):
    write_package(root / "good.name-1_x" / "1", 1)
    for name in (".hidden", "with space", "ünïcode", "semi;colon", "a" * 129):
        write_package(root / name / "1", 1)
    write_package(root / "no-version", 1)
    for version in ("v1", "0", "01", "1.0", "-1", ".1", "9" * 19):
        write_package(root / "versions" / version, 1)
    (root / "empty").mkdir()
    (root / "README.md").write_text("a file")
    (root / "good.name-1_x" / "notes.txt").write_text("a file")
    async with serving(root) as service:
        found = rows(service)
        assert {name for name, _ in found} == {"good.name-1_x", "no-version", "versions", "empty"}
        assert await served_by(service, "good.name-1_x") == "1"
        assert found["no-version", ""] == (
            "UNAVAILABLE",
            "the package lies in no-version/; copy it to no-version/1/",
        )
        assert {version for name, version in found if name == "versions"} == {"v1", "0", "01", "1.0", "-1", "9" * 19}
        assert found["versions", "v1"][1] == "its name is no version; accepted: 1, 2, 3 and so on"
        assert found["empty", ""] == ("UNAVAILABLE", "there is no version folder")
        for name in ("..", "../models", ".", "", "with space", "demo/1", "good.name-1_x/1", "\0"):
            assert await status_of(service, name) == 404
        for version in ("0", "01", "../1", "1/..", "x" * 99, "-1", "1 "):
            assert await status_of(service, "good.name-1_x", version) == 404


@on_a_loop
async def test_links_that_lead_out_are_refused_and_others_followed(root: Path, tmp_path: Path):
    outside = write_package(tmp_path / "outside" / "1", 1)
    write_package(root / "demo" / "1", 1)
    (root / "alias").symlink_to(root / "demo")
    (root / "leading-out").symlink_to(outside.parent)
    (root / "other").mkdir()
    (root / "other" / "1").symlink_to(outside)
    (root / "dangling").symlink_to(tmp_path / "absent")
    async with serving(root) as service:
        assert await served_by(service, "alias") == "1"
        assert await status_of(service, "leading-out") == 503
        assert await status_of(service, "other") == 503
        for name, version in (("leading-out", ""), ("other", "1")):
            state, reason = rows(service)[name, version]
            assert state == "UNAVAILABLE"
            assert "a link that leads out" in reason


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latest", "latest"),
        (" pinned:3\n", "pinned:3"),
        ("canary:3:10%", "canary:3:10%"),
        ("canary:3:0.1", "canary:3:10%"),
        ("canary:3:0.57", "canary:3:57%"),
    ],
)
def test_a_policy_reads_and_writes_itself(text: str, words: str):
    policy = Policy.parse(text)
    assert str(policy) == words
    assert Policy.parse(words) == policy


@pytest.mark.parametrize(
    "text",
    ["", "newest", "latest:1", "pinned", "pinned:0", "pinned:x", "pinned:1:2", "canary:1", "canary:1:0", "canary:1:1",
     "canary:1:100%", "canary:1:-5%", "canary:1:nan", "canary:1:1e-1", "canary:1:200%", "canary::10%",
     "canary:1:0.12345"],
)  # fmt: skip
def test_a_policy_that_is_not_one_is_refused_with_what_is_accepted(text: str):
    with pytest.raises(PackageError, match="accepted: latest, pinned:VERSION, or canary:VERSION:SHARE"):
        Policy.parse(text)


@pytest.mark.parametrize("share", ["10%", "0.5", "33.33%", "0.01%", "99.99%"])
def test_a_canary_gets_exactly_its_share_and_evenly(share: str):
    policy = Policy.parse(f"canary:2:{share}")
    taken = [policy.takes(count) for count in range(20_000)]
    assert sum(taken[:10_000]) == sum(taken[5_000:15_000]) == policy.share
    sums = np.cumsum(taken)
    assert np.abs(sums - policy.share / 10_000 * np.arange(1, 20_001)).max() < 1


@on_a_loop
async def test_a_canary_takes_its_share_of_the_requests_that_name_no_version(root: Path):
    for version in (2, 3):
        write_package(root / "demo" / str(version), version)
    async with serving(root, policies={"demo": Policy.parse("canary:3:20%")}) as service:
        answered = [await served_by(service) for _ in range(50)]
        assert answered.count("3") == 10
        assert answered == ["2", "2", "2", "2", "3"] * 10
        assert await served_by(service, "demo", "3") == "3"
        assert await served_by(service, "demo", "2") == "2"
        assert service.model_metadata("demo", None)["versions"] == ["2", "3"]
        assert {service.repository.find("demo", None).model.version for _ in range(6)} == {"2"}
        assert [await served_by(service) for _ in range(5)] == ["2", "2", "2", "2", "3"]  # questions count for nothing
        shutil.rmtree(root / "demo" / "3")
        await looks(service)
        assert {await served_by(service) for _ in range(10)} == {"2"}


@on_a_loop
async def test_a_canary_without_another_version_answers_all_and_is_replaced_as_any(root: Path):
    folder = write_package(root / "demo" / "1", 1)
    async with serving(root, policy=Policy.parse("canary:1:50%"), poll_s=NEVER) as service:
        assert [await served_by(service) for _ in range(4)] == ["1"] * 4
        shutil.rmtree(folder)
        write_package(folder, 5)
        await looks(service)
        for _ in range(4):
            np.testing.assert_allclose((await infer(service)).outputs["logits"], logits(IMAGE, 5), rtol=1e-6)


@on_a_loop
async def test_what_was_loaded_anew_is_counted_also_where_a_canary_loads_while_the_old_one_ends(root: Path):
    write_package(root / "demo" / "1", 1, graph=classifier(1, turns=10_000))  # which runs in a thread
    write_package(root / "demo" / "2", 2)
    opened, answers, gate = (threading.Event() for _ in range(3))

    def loader(folder: Path, name: str, version: str) -> LoadedModel:
        if version == "2" and opened.is_set():
            assert gate.wait(10)
        return load_package(folder, name=name, version=version, device=Device(threads=1))

    async with serving(root, loader=loader, policy=Policy.parse("canary:2:1%"), poll_s=NEVER) as service:
        model = service.repository.find("demo", None).model
        run = model.run
        model.run = lambda feed, outputs: [answers.wait(10), run(feed, outputs)][1]
        opened.set()
        asked = asyncio.create_task(infer(service))
        await asyncio.sleep(0)
        unloading = asyncio.create_task(service.unload("demo"))
        await asyncio.sleep(0)
        loading = asyncio.create_task(service.load("demo", {}))
        await until(lambda: rows(service)["demo", "2"][0] == "LOADING")
        answers.set()
        await asyncio.gather(asked, unloading)
        gate.set()
        await loading
        await infer(service)
        counted = [(one["version"], one["inference_count"]) for one in service.statistics("demo", None)["model_stats"]]
        assert counted == [("1", 4), ("2", 0)]
        assert b'answered_total{model="demo",version="1"} 2.0' in service.metrics_text()
        await service.unload("demo")
        assert service.statistics(None, None) == {"model_stats": []}


@on_a_loop
async def test_the_file_of_a_model_goes_before_the_setting_and_is_followed(root: Path):
    for version in (1, 2, 3):
        write_package(root / "demo" / str(version), version)
    (root / "demo" / "policy").write_text("pinned:1\n")
    write_package(root / "other" / "1", 1)
    write_package(root / "other" / "2", 2)
    (root / "other" / "policy").write_text("damaged from the start")
    policies = {"other": Policy.parse("pinned:1")}
    async with serving(root, policy=Policy.parse("pinned:2"), policies=policies, poll_s=NEVER) as service:
        assert await served_by(service) == await served_by(service, "other") == "1"
        (root / "demo" / "policy").write_text("pined:3")
        await looks(service)
        assert await served_by(service) == "1"  # a damaged file changes nothing
        assert "is not known; accepted: latest" in rows(service)["demo", "policy"][1]
        (root / "demo" / "policy").write_text("pinned:7")  # not there: the old one stays, and the index says so
        await looks(service)
        assert await served_by(service) == "1"
        reason = "not chosen by the policy pinned:7; it serves until what is chosen does"
        assert rows(service)["demo", "1"] == ("READY", reason)
        (root / "demo" / "policy").write_text("latest")
        await looks(service)
        assert await served_by(service) == "3"
        (root / "demo" / "policy").unlink()
        await looks(service)
        assert await served_by(service) == "2"
        shutil.rmtree(root / "demo" / "2")  # and none is served in the place of one that is pinned
        await looks(service)
        assert await status_of(service) == 503


@on_a_loop
async def test_a_refusal_says_what_is_wrong_with_what_is_chosen_and_not_that_others_are_not(root: Path):
    break_digest(write_package(root / "demo" / "1", 1))
    write_package(root / "demo" / "2", 2)
    async with serving(root, policy=Policy.parse("pinned:1"), poll_s=NEVER) as service:
        with pytest.raises(ServeError, match=r"demo is not ready: model\.onnx was changed"):
            service.repository.route("demo", None)
        service.repository.entries["demo"].loading.add(1)
        with pytest.raises(ServeError, match="demo is not ready: it is being loaded"):
            service.repository.route("demo", None)


@pytest.mark.timeout(60)
@on_a_loop
async def test_what_is_no_plain_file_holds_nobody_up(root: Path):
    """Opening a FIFO waits for a writer, and reading /dev/zero does not end: both while nothing else is loaded."""
    write_package(root / "good" / "1", 1)
    (root / "evil").mkdir()
    os.mkfifo(root / "evil" / "policy")
    async with serving(root, poll_s=NEVER) as service:
        assert rows(service)["evil", "policy"][1] == "the file is not used: it is a link or not a plain file"
        for version, damage in enumerate((os.mkfifo, lambda path: path.symlink_to("/dev/zero")), start=1):
            (root / "evil" / str(version)).mkdir()
            damage(root / "evil" / str(version) / MANIFEST)
        write_package(root / "good" / "2", 2)
        await looks(service)
        assert await served_by(service, "good") == "2"
        for version in ("1", "2"):
            assert "manifest.json cannot be read (it is a link or not a plain" in rows(service)["evil", version][1]
        assert service.repository.entries["evil"].refused == [1, 2]  # until their files change


@on_a_loop
async def test_a_removed_version_gives_way_to_the_next_and_a_removed_model_is_unknown(root: Path):
    for version in (1, 2):
        write_package(root / "demo" / str(version), version)
    async with serving(root) as service:
        assert await served_by(service) == "2"
        shutil.rmtree(root / "demo" / "2")
        await until(lambda: service.model_ready("demo", "1"))
        assert await served_by(service) == "1"
        assert await status_of(service, "demo", "2") == 404
        shutil.rmtree(root / "demo")
        await until(lambda: not rows(service))
        assert await status_of(service) == 404
        await until(lambda: service.statistics(None, None) == {"model_stats": []})  # once the last one is retired


@on_a_loop
async def test_a_version_written_over_serves_what_was_verified_until_the_new_one_is(root: Path, tmp_path: Path):
    folder = write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        old = service.repository.find("demo", None).model
        (folder / MODEL).write_bytes(classifier(5))
        await looks(service)
        assert await served_by(service) == "1"
        state, reason = rows(service)["demo", "1"]
        assert state == "READY"
        assert "was changed" in reason
        assert service.model_ready("demo", "1")
        rewrite_manifest(folder, files={MODEL: hashlib.sha256(classifier(5)).hexdigest()})
        await looks(service)
        assert rows(service)["demo", "1"] == ("READY", "")
        response = await infer(service)
        np.testing.assert_allclose(response.outputs["logits"], logits(IMAGE, 5), rtol=1e-6)
        with pytest.raises(ServeError, match="taken down"):
            old.run({"images": IMAGE}, ["logits"])
        assert service.metrics.find("demo", "1")  # of the old one and the new one


@on_a_loop
async def test_the_bytes_that_wait_are_bounded_over_all_models(root: Path):
    for name in ("a", "b"):
        write_package(root / name / "1", 1)
    async with serving(root, scheduling=Scheduling(max_queue_bytes=8)) as service:
        one, other = (service.repository.find(name, None).scheduler._budget for name in "ab")
        one.held += 1
        assert not other.has_room(8)


@on_a_loop
async def test_external_data_that_is_cut_off_under_a_model_harms_nothing(root: Path):
    """ONNX Runtime maps external data into memory: without a copy this test ends the process (SIGBUS)."""
    folder = write_package(root / "demo" / "1", 1)
    model = onnx.load(folder / MODEL)
    big = np.ones((1 << 20, 3), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(big, "big"))
    next(node for node in model.graph.node if "logits" in node.output).output[0] = "sums"
    for node in (
        onnx.helper.make_node("ReduceMin", ["pixels"], ["darkest"], keepdims=0),  # so that it is not folded
        onnx.helper.make_node("Cast", ["darkest"], ["row"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("Gather", ["big", "row"], ["ones"]),
        onnx.helper.make_node("Mul", ["sums", "ones"], ["logits"]),
    ):
        model.graph.node.insert(len(model.graph.node) - 1, node)
    onnx.save(model, folder / MODEL, save_as_external_data=True, location="weights.bin", size_threshold=1 << 20)
    names = (MODEL, "weights.bin")
    rewrite_manifest(folder, files={name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names})
    async with serving(root, poll_s=NEVER) as service:
        assert await served_by(service) == "1"
        os.truncate(folder / "weights.bin", 0)
        assert await served_by(service) == "1"


@on_a_loop
async def test_200_requests_across_three_swaps_are_each_answered_by_the_version_they_name(root: Path, tmp_path: Path):
    slow = 400  # turns of a loop: about a millisecond
    drafts = {version: tmp_path / "drafts" / str(version) for version in (1, 2, 3, 4)}
    for version, folder in drafts.items():
        write_package(folder, version, graph=classifier(version, turns=slow))
    shutil.copytree(drafts[1], root / "demo" / "1")
    async with serving(root, poll_s=0.01, scheduling=Scheduling(max_queue=400)) as service:
        answered: list[str] = []
        newest = 0
        flying = 0
        most = 0
        stop = False

        async def client(seed: int) -> None:
            nonlocal newest, flying, most
            random = np.random.default_rng(seed)
            while not stop:
                images = random.integers(0, 256, (1, 4, 4, 3), np.uint8)
                seen = newest
                flying += 1
                most = max(most, flying)
                response = await infer(service, inputs={"images": images})
                flying -= 1
                expected = logits(images, float(response.version))
                np.testing.assert_allclose(response.outputs["logits"], expected, rtol=1e-6)
                assert int(response.version) >= seen  # what was asked before a swap may still come after it
                newest = max(newest, int(response.version))
                answered.append(response.version)
                await asyncio.sleep(0)

        clients = [asyncio.create_task(client(seed)) for seed in range(200)]
        await until(lambda: len(answered) > 400)
        for version in (2, 3, 4):
            shutil.copytree(drafts[version], root / "demo" / str(version))
            await until(lambda version=version: newest == version)
            before = len(answered)
            await until(lambda before=before: len(answered) > before + 400)
        stop = True
        await asyncio.gather(*clients)
        assert most == 200
        assert set(answered) == {"1", "2", "3", "4"}
        assert len(service.repository.entries["demo"].served) == 1


@on_a_loop
async def test_a_deleted_version_still_answers_what_it_was_asked(root: Path):
    write_package(root / "demo" / "1", 1, graph=classifier(1, turns=20_000))
    async with serving(root, poll_s=NEVER, scheduling=Scheduling(max_batch=2)) as service:
        tasks = [asyncio.create_task(infer(service)) for _ in range(5)]
        await asyncio.sleep(0)
        shutil.rmtree(root / "demo")
        await service.repository.look()
        assert await status_of(service) == 404
        for response in await asyncio.gather(*tasks):
            np.testing.assert_allclose(response.outputs["logits"], logits(IMAGE, 1), rtol=1e-6)


@on_a_loop
async def test_a_slow_model_keeps_deadlines_and_says_when_it_is_full(root: Path):
    write_package(root / "demo" / "1", 1, graph=classifier(1, turns=100_000))
    async with serving(root, scheduling=Scheduling(max_batch=2, max_queue=2)) as service:
        tasks = [asyncio.create_task(infer(service))]
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(infer(service, deadline=time.monotonic() + 0.001)))
        tasks.append(asyncio.create_task(infer(service)))
        await asyncio.sleep(0.002)
        with pytest.raises(ServeError) as full:
            await infer(service)
        assert full.value.status == 429
        first, late, patient = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(first, InferResponse)
        assert isinstance(patient, InferResponse)
        assert isinstance(late, ServeError)
        assert late.status == 504


@on_a_loop
async def test_unloading_waits_for_the_last_answer_and_lasts_until_loading(root: Path):
    write_package(root / "demo" / "1", 1, graph=classifier(1, turns=10_000))
    async with serving(root, poll_s=0.005) as service:
        asked = asyncio.create_task(infer(service))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        (worker,) = (one for one in threading.enumerate() if one.name == "headstart-demo-1")
        await service.unload("demo")
        assert asked.done()
        assert (await asked).version == "1"
        await asyncio.to_thread(worker.join, 10)
        assert not worker.is_alive()
        await looks(service)
        assert await status_of(service) == 503
        assert await status_of(service, "demo", "1") == 503
        state, reason = rows(service)["demo", "1"]
        assert (state, reason) == ("UNAVAILABLE", "unloaded by request; load it by request")

        async def come_back() -> None:
            shutil.rmtree(root / "demo")
            await service.repository.look()
            write_package(root / "demo" / "1", 1)
            await looks(service)

        await come_back()
        assert await status_of(service) == 503
        await service.load("demo", {})
        assert await served_by(service) == "1"
        await come_back()
        assert await served_by(service) == "1"
        (root / "empty").mkdir()
        with pytest.raises(ServeError, match="empty cannot be loaded: there is no version folder"):
            await service.load("empty", {})
        for version in (2, 3):
            break_digest(write_package(root / "demo" / str(version), version))
        with pytest.raises(ServeError, match=r"demo version 3 cannot be loaded: .*was changed"):
            await service.load("demo", {})
        assert service.repository.entries["demo"].refused == [2, 3]
        for version, refused in ((3, [2]), (2, [])):
            shutil.rmtree(root / "demo" / str(version))
            await service.repository.look()
            assert service.repository.entries["demo"].refused == refused
        for name in ("absent", "..", "demo/1"):
            with pytest.raises(ServeError) as caught:
                await service.load(name, {})
            assert caught.value.status == 404
            with pytest.raises(ServeError) as caught:
                await service.unload(name)
            assert caught.value.status == 404


@on_a_loop
async def test_whoever_gives_up_waiting_for_the_end_of_a_model_harms_none_of_its_requests(root: Path):
    write_package(root / "demo" / "1", 1, graph=classifier(1, turns=50_000))
    async with serving(root, poll_s=NEVER) as service:
        asked = asyncio.create_task(infer(service))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        unloading = asyncio.create_task(service.unload("demo"))
        await asyncio.sleep(0.01)
        assert not asked.done()
        unloading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unloading
        await service.unload("demo")
        assert asked.done(), "the next one waits for it too"
        assert (await asked).version == "1"
        await service.load("demo", {})
        assert (await infer(service)).version == "1"


class Graph:
    """A loader that takes its time and counts, in place of packages."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.graph, self.max_batch = mlp(), 8
        self.threads: set[int] = set()
        self.loaded: list[LoadedModel] = []

    def __call__(self, folder: Path, name: str, version: str) -> LoadedModel:
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        model = load_graph(self.graph, name=name, version=version, device=Device(threads=1), max_batch=self.max_batch)
        self.loaded.append(model)
        return model


@on_a_loop
async def test_loading_never_runs_on_the_event_loop_and_is_seen_in_the_index(root: Path):
    (root / "demo" / "1").mkdir(parents=True)
    loader = Graph(seconds=1.2)
    service = Service(Repository(root, threads=1, poll_s=NEVER, loader=loader))
    assert not service.ready()
    assert await status_of(service) == 503
    starting = asyncio.create_task(service.start())
    longest, states = 0.0, set()
    while not starting.done():
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - before)
        states.add(rows(service).get(("demo", "1"), ("", ""))[0])
        assert service.live()
        if not starting.done():
            assert not service.ready()
            assert await status_of(service) == 503
    assert longest < 1
    assert states >= {"LOADING"}
    assert threading.get_ident() not in loader.threads
    assert service.ready()
    await service.stop()
    assert not service.ready()
    assert await status_of(service) == 503


@on_a_loop
async def test_a_load_goes_on_where_whoever_asked_for_it_gives_up(root: Path):
    (root / "demo" / "1").mkdir(parents=True)
    loader, told = Graph(), []
    async with serving(root, poll_s=NEVER, loader=loader) as service:
        await service.unload("demo")
        loader.seconds = 0.3
        service.repository.loading.on_opening = lambda opening, done: told.append((done, len(loader.loaded)))
        asked = [asyncio.create_task(service.load("demo", {})) for _ in range(2)]
        await until(lambda: told)
        for one in asked:
            one.cancel()
        await asyncio.wait(asked)
        await until(lambda: service.model_ready("demo", None))
        assert told == [(False, 1), (True, 2)], "opened once, and told when that was over"
        await service.load("demo", {})
        await service.unload("demo")
        assert not service.model_ready("demo", None)


@on_a_loop
async def test_a_model_is_warm_before_it_is_ready(root: Path, monkeypatch: pytest.MonkeyPatch):
    (root / "demo" / "1").mkdir(parents=True)
    ran: list[Any] = []
    plain = LoadedModel.run

    def run(self: LoadedModel, feed: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        ran.append((feed["x"].shape, service.model_ready("demo", None)))
        return plain(self, feed, outputs)

    monkeypatch.setattr(LoadedModel, "run", run)
    service = Service(Repository(root, threads=1, poll_s=NEVER, loader=Graph()))
    await service.start()
    assert {ready for _, ready in ran} == {False}
    assert {shape for shape, _ in ran} == {(1, 16), (8, 16)}
    given = service.infer(InferRequest(model="demo", inputs={"x": np.zeros((1, 16), np.float32)}))
    assert isinstance(given, InferResponse)  # and known to be short
    await service.stop()


@on_a_loop
async def test_a_package_whose_first_run_does_not_end_is_cut_off_and_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "_WARM_S", 0.3)
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        write_package(root / "demo" / "2", 2, graph=classifier(2, turns=1 << 40))
        write_package(root / "other" / "1", 1)
        await looks(service)
        assert await served_by(service) == "1"
        assert await served_by(service, "other") == "1"
        assert rows(service)["demo", "2"] == (
            "UNAVAILABLE", "its first runs were not over after 0.3 s, and were cut off",
        )  # fmt: skip


@pytest.mark.parametrize("version", ["1", "2"], ids=["of the version that serves", "of another"])
@on_a_loop
async def test_stopping_cuts_a_first_run_off_and_nothing_serves_after_it(root: Path, version: str):
    write_package(root / "demo" / "1", 1)
    async with serving(root, poll_s=NEVER) as service:
        shutil.rmtree(root / "demo" / version, ignore_errors=True)
        write_package(root / "demo" / version, 2, graph=classifier(2, turns=1 << 40))
        looking = asyncio.ensure_future(looks(service))
        while service.repository.loading._warming is None:
            await asyncio.sleep(0.01)
        await service.stop()
        await asyncio.wait_for(looking, 5)
        assert not service.model_ready("demo", None)
        assert await status_of(service) == 503


def test_a_package_is_warmed_with_the_size_that_it_was_timed_with(pristine: Path, monkeypatch: pytest.MonkeyPatch):
    model = load_package(pristine, name="demo", version="1", device=Device(threads=1))
    shapes = []
    plain = LoadedModel.run
    monkeypatch.setattr(
        LoadedModel,
        "run",
        lambda self, feed, outputs: shapes.append(feed["images"].shape) or plain(self, feed, outputs),
    )
    known = model.warm_up()
    assert set(shapes) == {(1, 40, 48, 3), (16, 40, 48, 3)}
    assert {size for size, _ in known} == {40 * 48 * 3}


@pytest.mark.parametrize("limits", [{"max_batch": 2}, {"max_delay_s": 10}], ids="-".join)
@on_a_loop
async def test_stopping_answers_what_is_queued(root: Path, limits: dict[str, Any]):
    write_package(root / "demo" / "1", 1, graph=classifier(1, turns=10_000))
    async with serving(root, scheduling=Scheduling(**limits)) as service:
        tasks = [asyncio.create_task(infer(service)) for _ in range(4)]
        await asyncio.sleep(0)
        begun = time.monotonic()
        await service.stop()
        assert time.monotonic() - begun < 5  # nothing waits for a batch to be filled
        assert all(task.done() for task in tasks)
        assert [(await task).version for task in tasks] == ["1"] * 4
        for name in ("demo", "absent"):
            with pytest.raises(ServeError, match="the server is shutting down"):
                await infer(service, name)
        assert service.repository.metrics.counts()["unknown"] == 2


@on_a_loop
async def test_stopping_ends_the_looks(root: Path):
    async with serving(root) as service:
        looking = service.repository._poller
        assert looking
        assert not looking.done()
        await service.stop()
        assert looking.done()


@on_a_loop
async def test_stopping_waits_no_longer_than_it_was_told(root: Path):
    write_package(root / "demo" / "1", 1, graph=classifier(1, turns=10_000))  # which runs in a thread
    over = threading.Event()
    async with serving(root) as service:
        service.repository.find("demo", None).model.run = lambda feed, outputs: over.wait(10)
        asked = asyncio.create_task(infer(service))
        await asyncio.sleep(0.01)
        begun = time.monotonic()
        await service.repository.stop(drain_s=0.05)
        assert time.monotonic() - begun < 5
        over.set()
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)


@on_a_loop
async def test_a_look_that_fails_is_not_the_last(root: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(root: Path) -> None:
        failed.append(root)
        raise LookupError("nobody thought of this")

    failed: list[Path] = []
    async with serving(root, poll_s=0.005) as service:
        with monkeypatch.context() as broken:
            broken.setattr(roots, "scan", fails)
            await until(lambda: failed)
        write_package(root / "demo" / "1", 1)
        await until(lambda: service.model_ready("demo", None), 5)


@on_a_loop
async def test_a_root_that_cannot_be_read_takes_nothing_down(root: Path):
    write_package(root / "demo" / "1", 1)
    async with serving(root) as service:
        root.rename(root.with_name("moved"))
        await asyncio.sleep(0.1)
        assert await served_by(service) == "1"
        with pytest.raises(ServeError) as caught:
            await service.load("demo", {})
        assert caught.value.status == 503
        root.with_name("moved").rename(root)
        write_package(root / "demo" / "2", 2)
        await until(lambda: service.model_ready("demo", "2"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"provider": "cpu"}, "'cpu' is not in this ONNX Runtime; accepted: .*CPUExecutionProvider"),
        ({"threads": 0}, "threads is 0"),
        ({"policy": None, "root": "absent"}, "is no folder; make it"),
        ({"drift": 1.5}, "the share for drift is 1.5"),
    ],
    ids=["provider", "threads", "root", "drift"],
)
def test_settings_that_cannot_be_are_refused(root: Path, settings: dict[str, Any], words: str):
    folder = root / settings.pop("root", ".")
    with pytest.raises(PackageError, match=words):
        Repository(folder, **settings)


@pytest.mark.parametrize(
    "limit", [{"max_batch": 0}, {"max_queue": 0}, {"max_delay_s": -1}, {"max_delay_s": float("nan")}]
)
def test_limits_that_cannot_be_are_refused(limit: dict[str, Any]):
    with pytest.raises(PackageError, match=f"{next(iter(limit))} is .*accepted"):
        Scheduling(**limit)


def test_the_operator_is_told_which_folder_is_damaged(tmp_path: Path):
    folder = write_package(tmp_path / "models" / "demo" / "1", 1)
    for damage in (break_graph, break_digest):
        damage(folder)
        with pytest.raises(PackageError, match=re.escape(str(folder / MODEL))) as caught:
            load_package(folder, name="demo", version="1", device=Device(threads=1))
        assert "headstart-" not in str(caught.value)


def test_a_limit_on_the_batch_lowers_what_is_proven_and_never_raises_it(tmp_path: Path):
    folder = write_package(tmp_path / "1", 1)
    for asked, found in ((None, 16), (4, 4), (64, 16)):
        assert load_package(folder, name="a", version="1", device=Device(threads=1), max_batch=asked).max_batch == found


def test_every_type_of_the_protocol_goes_through_unchanged():
    kinds = {
        onnx.helper.tensor_dtype_to_np_dtype(kind).name: kind
        for name, kind in onnx.TensorProto.DataType.items()
        if re.fullmatch("FLOAT|DOUBLE|FLOAT16|BOOL|U?INT(8|16|32|64)", name)
    }
    model = load_graph(identities(kinds), name="m", device=Device(threads=1), max_batch=4)
    assert {one.name: one.dtype for one in model.inputs} == {f"in_{name}": name for name in kinds}
    feed = {f"in_{name}": np.array([[1, 0], [3, 7]]).astype(name) for name in kinds}
    for name, array in zip(kinds, model.run(feed, [f"out_{name}" for name in kinds]), strict=True):
        np.testing.assert_array_equal(array, feed[f"in_{name}"])
        assert array.dtype == name


def test_strings_are_bytes_outside_and_text_inside():
    model = load_graph(identities({"s": onnx.TensorProto.STRING}), name="m", device=Device(threads=1), max_batch=4)
    texts = np.array([[b"a", "é€".encode()]], dtype=object)
    (found,) = model.run({"in_s": texts}, ["out_s"])
    assert found.tolist() == texts.tolist()
    with pytest.raises(ServeError, match="'in_s' holds bytes that are not UTF-8"):
        model.run({"in_s": np.array([[b"\xff", b""]], dtype=object)}, ["out_s"])


def test_a_type_that_the_protocol_lacks_is_refused():
    with pytest.raises(PackageError, match=r"'in_b' is tensor.bfloat16., which the protocol cannot carry"):
        load_graph(identities({"b": onnx.TensorProto.BFLOAT16}), name="m", device=Device(threads=1), max_batch=4)


def test_a_closed_model_refuses_and_runs_no_more():
    model = load_graph(mlp(), name="m", device=Device(threads=1), max_batch=4)
    model.close()
    with pytest.raises(ServeError, match="taken down"):
        model.run({"x": np.zeros((1, 16), np.float32)}, ["y"])


def test_a_reason_for_strangers_has_no_paths():
    known = Path("/srv/models/demo/1")
    reason = f"{known}/model.onnx was changed; see /home/ann/log.txt, '/tmp/headstart-x/model.onnx' and ../1/a or 3/4"
    assert public(reason, known) == "model.onnx was changed; see log.txt, 'model.onnx' and ../1/a or 3/4"


@on_a_loop
async def test_names_of_files_that_are_no_text_are_escaped(root: Path):
    write_package(root / "demo" / "1", 1)
    write_package(root / "demo" / "2", 2)
    for name in (b"v\xff", b"2/\xfe"):
        (root / "demo" / os.fsdecode(name)).mkdir()
    (root / "demo" / os.fsdecode(b"2/\xfe/\x1b")).touch()
    async with serving(root, poll_s=NEVER) as service:
        assert await served_by(service) == "1"
        found = rows(service)
        assert found["demo", r"v\udcff"][1].startswith("its name is no version")
        assert r"it holds \udcfe/\x1b, which" in found["demo", "2"][1]


def test_a_reason_for_strangers_is_bounded_and_on_one_line():
    assert public("a\nb \x1b[2J \udcff") == r"a\nb \x1b[2J \udcff"
    assert len(public("no graph: " + "x" * 1_000_000)) == 2000


def test_the_manifest_is_plain_json(tmp_path: Path):
    assert json.loads((write_package(tmp_path / "1", 1) / MANIFEST).read_text())["labels"] == ["red", "green", "blue"]
