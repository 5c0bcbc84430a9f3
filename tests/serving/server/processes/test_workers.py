"""A server of two processes on one port: spread, killed, told to load and unload, counted as one, ended."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from headstart.serving.errors import PackageError
from headstart.serving.server.command import serve
from headstart.serving.server.errors import StartError
from headstart.serving.server.processes.supervisor import Supervisor
from headstart.serving.server.watching.metrics import added
from tests.serving.server.graphs import classifier, logits, write_package
from tests.serving.server.models.test_repository import IMAGE as IMAGES
from tests.serving.server.tiny_service import RawClient, infer_body, wait_until

PROGRAM = """
import sys
from pathlib import Path
from headstart.serving.server.command import serve
from headstart.serving.server.processes import supervisor
exec(sys.argv[3])
say = lambda line: print(line, flush=True)
code = serve(Path(sys.argv[1]), port=int(sys.argv[2]), grpc_port=0, threads=1, workers=2, say=say)
sys.exit(code)
"""
IMAGE = IMAGES[:1]
BODY, LENGTH = infer_body(IMAGE, names=["images"], outputs=[{"name": "logits"}])
EXPECTED = logits(IMAGE, 1)


class Workers:
    """`serve` with two workers, in a process of its own."""

    def __init__(self, root: Path, port: int = 0, before: str = "", **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(root), str(port), before], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment},
        )  # fmt: skip
        self.log: list[str] = []
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.match(r"ready: http://127\.0\.0\.1:(\d+) \(gRPC at 127\.0\.0\.1:(\d+)\)", self.line)
        assert found, (self.line, self.process.communicate()[1])
        self.port, self.grpc_port = int(found[1]), int(found[2])
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(self.process.stderr)

    def pids(self) -> list[int]:
        """Of the workers that run now."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        # The supervisor starts processes from its main thread alone.
        return [int(one) for one in children.read_text().split()]

    def metrics(self) -> dict[str, float]:
        """Every sample, by its name and labels."""
        for _ in range(5):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
                    lines = answer.read().decode().splitlines()
                break
            except OSError:  # it was given to a worker that was just killed
                time.sleep(0.05)
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


def ask(client: RawClient) -> Any:
    return client.ask("POST", "/v2/models/demo/infer", BODY, Inference_Header_Content_Length=LENGTH)


def right(answer: Any) -> bool:
    return answer.status == 200 and np.allclose(answer.json()["outputs"][0]["data"], EXPECTED[0], rtol=1e-6)


def sockets(pid: int) -> int:
    count = 0
    for one in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += "socket:" in str(one.readlink())
    return count


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("workers") / "models"
    write_package(root / "demo" / "1", 1)
    return root


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Workers]:
    """Shared by all tests that leave it as it was."""
    started = Workers(root)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture
def clients(server: Workers) -> Iterator[list[RawClient]]:
    """Forty connections: that one worker has none of them happens once in 5e11."""
    with ExitStack() as stack:
        clients = [RawClient(server.port) for _ in range(40)]
        for client in clients:
            stack.enter_context(closing(client.socket))
        yield clients


def test_requests_are_spread_over_workers_and_counted_as_one(server: Workers):
    assert f"serves 1 of 1 versions in {server.line.split(' in ')[1]}" in server.line
    assert server.line.endswith(", with 2 workers\n")
    pids = server.pids()
    assert len(pids) == 2
    assert {os.getpgid(pid) for pid in pids} == {*pids}, "a terminal's signals are for the supervisor to pass on"
    before = [sockets(pid) for pid in pids]
    counted = server.metrics()['headstart_requests_answered_total{model="demo",version="1"}']
    with ExitStack() as stack:
        clients = [RawClient(server.port) for _ in range(40)]
        for client in clients:
            stack.enter_context(closing(client.socket))
            assert right(ask(client))
        assert all(now - then >= 3 for then, now in zip(before, map(sockets, pids), strict=True))
        for client in clients[:8]:  # whoever answers, it is the count of all
            (row,) = client.ask("GET", "/v2/models/demo/stats").json()["model_stats"]
            assert row["inference_count"] == counted + 40
            assert row["inference_stats"]["success"]["count"] == counted + 40
            assert sum(one["compute_infer"]["count"] for one in row["batch_stats"]) == row["execution_count"]
    metrics = server.metrics()
    assert metrics['headstart_requests_answered_total{model="demo",version="1"}'] == counted + 40
    assert metrics['headstart_batch_rows_sum{model="demo",version="1"}'] == counted + 40
    assert metrics['headstart_queue_depth{model="demo",version="1"}'] == 0
    assert metrics["headstart_workers"] == 2
    assert metrics['process_resident_memory_bytes{worker="0"}'] > 1e7
    assert metrics['process_resident_memory_bytes{worker="1"}'] > 1e7


def test_while_their_models_load_workers_live_and_are_not_ready(tmp_path: Path):
    write_package(tmp_path / "demo" / "1", 1, graph=classifier(1, turns=200_000))  # half a second for each first run
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def first_answers() -> list[int]:
        for _ in range(600):
            with suppress(OSError), closing(RawClient(port).socket):
                break
            time.sleep(0.05)
        client = RawClient(port)
        with closing(client.socket):
            return [client.ask("GET", f"/v2/health/{one}").status for one in ("live", "ready")]

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(first_answers)
        server = Workers(tmp_path, port)
    try:
        assert answers.result() == [200, 503]
        client = RawClient(port)
        with closing(client.socket):
            assert client.ask("GET", "/v2/health/ready").status == 200
    finally:
        assert server.end() == 0


def test_grpc_shares_its_port_too(server: Workers):
    pids, statistics = server.pids(), []
    before = [sockets(pid) for pid in pids]
    tensor = triton_grpc.InferInput("images", list(IMAGE.shape), "UINT8")
    tensor.set_data_from_numpy(IMAGE)
    with ExitStack() as stack:
        for _ in range(24):
            client = triton_grpc.InferenceServerClient(
                f"127.0.0.1:{server.grpc_port}", channel_args=[("grpc.use_local_subchannel_pool", 1)]
            )
            stack.enter_context(client)
            np.testing.assert_allclose(client.infer("demo", [tensor]).as_numpy("logits"), EXPECTED, rtol=1e-6)
            statistics.append(client.get_inference_statistics("demo").model_stats[0].inference_count)
        assert all(now - then >= 2 for then, now in zip(before, map(sockets, pids), strict=True))
    assert statistics == list(range(statistics[0], statistics[0] + 24))


def test_load_and_unload_hold_in_all_workers_and_in_those_that_start_later(
    server: Workers, clients: list[RawClient], root: Path
):
    assert any('model="demo"' in sample for sample in server.metrics())
    assert clients[0].ask("POST", "/v2/repository/models/demo/unload").status == 200
    assert {ask(client).status for client in clients} == {503}
    killed = server.pids()[0]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(server.pids()) == 2 and killed not in server.pids())
    wait_until(lambda: server.metrics()["headstart_workers"] == 2, 10)
    again = [RawClient(server.port) for _ in range(20)]
    assert {ask(client).status for client in again} == {503}
    assert not any('model="demo"' in sample for sample in server.metrics())
    assert again[0].ask("POST", "/v2/repository/models/demo/load").status == 200
    assert all(right(ask(client)) for client in again)
    assert again[0].ask("POST", "/v2/repository/models/absent/load").status == 404
    assert again[0].ask("POST", "/v2/repository/models/absent/unload").status == 404
    assert again[0].ask("GET", "/v2/models/absent/stats").status == 404
    write_package(root / "new" / "1", 1)
    assert again[0].ask("POST", "/v2/repository/models/new/unload").status == 200, "also before any has looked"
    shutil.rmtree(root / "new")
    assert again[0].ask("POST", "/v2/repository/models/demo/load", b'{"parameters":{"config":"x"}}').status == 400
    for client in again:
        client.socket.close()


def test_what_a_killed_worker_had_counted_stays_counted(server: Workers, clients: list[RawClient]):
    assert all(right(ask(client)) for client in clients)
    counted = server.metrics()
    killed = server.pids()[0]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: server.metrics()["headstart_worker_restarts_total"] > counted["headstart_worker_restarts_total"])
    wait_until(lambda: server.metrics()["headstart_workers"] == 2, 10)
    answered = 'headstart_requests_answered_total{model="demo",version="1"}'
    assert server.metrics()[answered] == counted[answered]


def test_a_killed_worker_is_replaced_while_the_others_answer(server: Workers):
    stop = threading.Event()
    counts: list[tuple[int, int, int]] = []

    def work() -> None:
        answered = wrong = reset = 0
        while not stop.is_set():
            try:
                with closing((client := RawClient(server.port)).socket):
                    for _ in range(20):
                        if right(ask(client)):
                            answered += 1
                        else:
                            wrong += 1
            except OSError:  # the killed one's connections
                reset += 1
        counts.append((answered, wrong, reset))

    before = server.metrics()
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    killed, other = server.pids()
    os.kill(killed, signal.SIGKILL)
    restarts = before["headstart_worker_restarts_total"] + 1

    def replaced() -> bool:
        now = server.metrics()
        return (now["headstart_worker_restarts_total"], now["headstart_workers"]) == (restarts, 2)

    wait_until(replaced, 20)
    stop.set()
    for thread in threads:
        thread.join(10)
    after = server.metrics()
    assert sum(one[0] for one in counts) > 100
    assert sum(one[1] for one in counts) == 0
    assert sum(one[2] for one in counts) < 60
    assert other in server.pids()
    assert killed not in server.pids()
    for sample, value in before.items():  # what was reported once is never taken back
        if sample.endswith("_total") and sample.startswith("headstart"):
            assert after[sample] >= value, sample
    assert any(f"(pid {killed}) was ended by SIGKILL; it is started again in" in line for line in server.log)


def test_a_shared_port_is_for_one_server_alone(server: Workers, root: Path):
    for workers in (1, 2):
        with pytest.raises(PackageError, match="is in use; stop what listens there") as caught:
            serve(root, port=server.port, workers=workers)
        assert caught.value.exit_code == 2
    with pytest.raises(PackageError, match="give another --grpc-port"):
        serve(root, port=0, grpc_port=server.grpc_port, workers=2)
    with pytest.raises(PackageError, match="cannot listen on 203"):
        serve(root, host="203.0.113.7", port=0, workers=2)
    with pytest.raises(PackageError, match="workers is 0"):
        serve(root, workers=0)


def test_a_worker_that_cannot_start_ends_the_server_with_its_reason(root: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = {"repository": root, "host": "127.0.0.1", "port": taken.getsockname()[1], "threads": 1}
        said: list[str] = []
        with pytest.raises(StartError, match="is in use; stop what listens there"):
            asyncio.run(asyncio.wait_for(run(options, said), 20))
    assert not said


async def run(options: dict[str, Any], said: list[str]) -> int:
    return await Supervisor(options, 2, said.append).run()


def test_at_sigterm_all_workers_drain_and_the_server_ends_with_0(tmp_path: Path):
    write_package(tmp_path / "demo" / "1", 1, graph=classifier(1, turns=80_000))  # a tenth of a second or more
    server = Workers(tmp_path)
    pids = server.pids()
    with ThreadPoolExecutor(6) as pool:
        clients = [RawClient(server.port) for _ in range(6)]
        for client in clients:
            client.ask("GET", "/v2")
        asked = [pool.submit(ask, client) for client in clients]
        time.sleep(0.15)
        for pid in pids:  # as a service manager does that signals all of a unit
            os.kill(pid, signal.SIGTERM)
        assert server.end() == 0
        assert all(right(one.result()) for one in asked)
    assert not any(map(alive, pids))
    assert not any("started again" in line for line in server.log)


def test_a_second_signal_cuts_off_and_the_folder_it_is_started_in_holds_no_modules(tmp_path: Path):
    write_package(tmp_path / "models" / "demo" / "1", 1)
    (tmp_path / "onnxruntime.py").write_text("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")  # not read
    before = f"import os, signal; sys.path.remove(''); os.chdir({str(tmp_path)!r})"
    # Whether or not the tests themselves are under nohup.
    before += "; signal.signal(signal.SIGHUP, signal.SIG_DFL)"
    server = Workers(tmp_path / "models", before=before)
    pids = server.pids()
    with closing(RawClient(server.port).socket) as half:
        half.sendall(b"POST /v2/models/demo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        time.sleep(0.2)
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.7)
        assert server.process.poll() is None
        started = time.monotonic()
        assert server.end(signal.SIGINT) == 0
        assert time.monotonic() - started < 4
    assert not any(map(alive, pids))


def test_a_worker_that_hangs_holds_up_neither_the_counts_nor_the_end(tmp_path: Path):
    write_package(tmp_path / "demo" / "1", 1)
    server = Workers(tmp_path, before="supervisor._END, supervisor._CUT = 1.0, 0.2")
    pids = server.pids()

    def answers(client: RawClient) -> bool:
        try:
            return client.ask("GET", "/metrics").status == 200
        except TimeoutError:
            return False

    with ExitStack() as stack, ThreadPoolExecutor(24) as pool:
        clients = [RawClient(server.port) for _ in range(24)]
        for client in clients:
            stack.enter_context(closing(client.socket))
            assert client.ask("GET", "/v2").status == 200
            client.socket.settimeout(6)
        os.kill(pids[0], signal.SIGSTOP)
        assert {True, False} == set(pool.map(answers, clients)), "those of the other worker are answered"
        started = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - started < 6
    assert not any(map(alive, pids))


def test_what_a_killed_worker_had_in_the_temporary_folder_is_deleted(tmp_path: Path):
    write_package(tmp_path / "models" / "demo" / "1", 1)
    (scratch := tmp_path / "scratch").mkdir()
    server = Workers(tmp_path / "models", TMPDIR=str(scratch))
    pid = server.pids()[0]
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    (place,) = (Path(one.removeprefix("TMPDIR=")) for one in variables if one.startswith("TMPDIR="))
    assert place.parent == scratch
    (place / "headstart-copy").mkdir()
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not place.exists() and len(list(scratch.glob("headstart-serve-*"))) == 2, 10)
    assert server.end() == 0
    assert not list(scratch.glob("headstart-*"))


def test_a_version_that_processes_end_over_is_opened_no_more(tmp_path: Path):
    write_package(tmp_path / "demo" / "1", 1)
    server = Workers(tmp_path)
    first = set(server.pids())
    write_package(tmp_path / "demo" / "2", 2, graph=classifier(2, turns=1 << 40))

    def state(client: RawClient) -> tuple[str, str]:
        rows = client.ask("POST", "/v2/repository/index").json()
        return next(((one["state"], one["reason"]) for one in rows if one["version"] == "2"), ("", ""))

    def listens() -> bool:
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", server.port)) == 0

    with ExitStack() as stack:
        stack.callback(server.process.kill)
        client = RawClient(server.port)
        stack.enter_context(closing(client.socket))
        wait_until(lambda: state(client)[0] == "LOADING", 10)
        time.sleep(0.5)  # all look at the folder at the same moment
        for pid in first:  # as the kernel does when there is no memory
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(server.pids()) == 2 and not first & set(server.pids()), 10)
        wait_until(listens, 20)
        wait_until(lambda: server.metrics()["headstart_workers"] == 2, 20)
        clients = [RawClient(server.port) for _ in range(20)]
        for client in clients:
            stack.enter_context(closing(client.socket))
            assert right(ask(client))
            assert state(client)[0] == "UNAVAILABLE"
            assert state(client)[1].startswith("processes of this server ended while they opened it")
        shutil.rmtree(tmp_path / "demo" / "2")
        write_package(tmp_path / "demo" / "2", 2)
        wait_until(lambda: state(clients[0])[0] == "READY", 10)
        assert server.end() == 0


def test_workers_end_when_their_supervisor_is_killed(tmp_path: Path):
    write_package(tmp_path / "demo" / "1", 1)
    server = Workers(tmp_path)
    pids = server.pids()
    server.process.kill()
    wait_until(lambda: not any(map(alive, pids)), 10)
    shutil.rmtree(tmp_path / "demo")


def test_counts_are_added_number_by_number():
    one = {"a": {"x": [1, [2.5, 3]]}, "n": 1, "last_inference_ms": 7, "mine": {"b": 1}}
    other = {"a": {"x": [1, [0.5, 1]]}, "n": 2, "last_inference_ms": 5, "yours": 4}
    assert added(one, other) == {
        "a": {"x": [2, [3.0, 4]]},
        "n": 3,
        "last_inference_ms": 7,
        "mine": {"b": 1},
        "yours": 4,
    }
    assert added({}, one) == one
