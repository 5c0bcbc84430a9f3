"""A serving process from start to end: what it refuses to start with, TLS, winding down, signals."""

import asyncio
import math
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton

from headstart.serving.server.errors import StartError
from headstart.serving.server.main import run
from headstart.serving.server.settings import HttpSettings, read_token
from tests.serving.server.tiny_service import RawClient, Running, TinyService, infer_body, wait_until

ROOT = Path(__file__).parents[3]
PROGRAM = """
import asyncio, sys, time
from headstart.serving.server.main import run
from headstart.serving.server.settings import HttpSettings
from tests.serving.server.tiny_service import TinyService

class Service(TinyService):
    async def start(self):
        self.is_ready = False
        await asyncio.sleep(float(sys.argv[1]))
        self.is_ready = True
        asyncio.get_running_loop().call_later(float(sys.argv[2]), self.gate.set)
    async def stop(self):
        print("stopped", flush=True)

settings = HttpSettings(port=int(sys.argv[3]), drain_timeout=float(sys.argv[4]))
sys.exit(run(settings, Service(), on_ready=lambda server: print("ready", server.port, flush=True)))
"""

LOADING = """
import sys
from pathlib import Path
import numpy as np
from headstart.serving.device import Device
from headstart.serving.server.main import run
from headstart.serving.server.models.model import load_graph
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.scratch import Scratch
from headstart.serving.server.service import Service
from headstart.serving.server.settings import HttpSettings
from tests.serving.server.graphs import looping

def loader(folder, name, version):
    with Scratch():
        model = load_graph(looping(1 << 40), name=name, device=Device(threads=2), max_batch=1)
        print("loads", flush=True)
        return model.run({"x": np.zeros((1, 64), np.float32)}, ["y"])

sys.exit(run(HttpSettings(port=0), Service(Repository(Path(sys.argv[1]), loader=loader))))
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cert.pem and key.pem for localhost, and with others of the same name: renewed.pem and other.pem."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("key", "other"):
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost"
        names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", f"{name}.pem", "-out"]
        certificate = "cert.pem" if name == "key" else "renewed.pem"
        subprocess.run([*command.split(), *names, certificate], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_slow_client_gets_all_of_its_last_answer(certificate: Path, tls: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("headstart.serving.server.transport.connection._LINGER", 0.1)
    files = {"tls_cert": certificate / "cert.pem", "tls_key": certificate / "key.pem"} if tls else {}
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem")) if tls else None
    sent = np.arange(5_000_000, dtype=np.float32)  # 20 MB, of which the kernel takes some 4
    body, length = infer_body(sent, outputs=[{"name": "x", "parameters": {"binary_data": True}}])
    with Running(HttpSettings(port=0, header_timeout=0.4, **files)) as running, running.connect(context) as raw:
        head = f"Connection: close\r\nInference-Header-Content-Length: {length}\r\nContent-Length: {len(body)}\r\n\r\n"
        raw.send(f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\n{head}".encode() + body)
        received = bytearray()
        while data := raw.socket.recv(1 << 16):
            if len(received) // 4_000_000 != (len(received) + len(data)) // 4_000_000:
                time.sleep(0.4)  # two seconds for all of it
            received += data
        assert received.endswith(sent.tobytes())


def test_tls_carries_everything(certificate: Path):
    settings = HttpSettings(
        port=0, tls_cert=certificate / "cert.pem", tls_key=certificate / "key.pem", token="t", header_timeout=0.5
    )
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    array = np.arange(200_000, dtype=np.float32)
    with Running(settings) as running:
        with triton.InferenceServerClient(
            running.url, ssl=True, ssl_context_factory=lambda: context, insecure=True
        ) as client:
            tensor = triton.InferInput("x", [array.size], "FP32")
            tensor.set_data_from_numpy(array)
            found = client.infer("echo", [tensor], headers={"Authorization": "Bearer t"}).as_numpy("x")
            assert np.array_equal(found, array)
        with running.connect(context) as raw:
            assert raw.ask("GET", "/v2").status == 401
            assert raw.closed()
        with running.connect(context) as raw:
            raw.send(b"GET / HT")
            assert raw.read().status == 401  # too slow, and nothing more is said
        with running.connect() as plain:
            plain.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert plain.closed()
        with running.connect() as silent:  # no handshake at all
            assert silent.closed(within=4)


def renew(certificate: Path, folder: Path, *names: str) -> None:
    """Put the named files of `certificate`, a key first, in the place of key.pem and cert.pem."""
    for source, target in zip(names, ("key.pem", "cert.pem"), strict=False):
        shutil.copy(certificate / source, folder / "new.pem")
        (folder / "new.pem").replace(folder / target)


def test_a_renewed_certificate_is_that_of_new_connections(
    certificate: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    renew(certificate, tmp_path, "key.pem", "cert.pem")
    old, new = (ssl.create_default_context(cafile=str(certificate / name)) for name in ("cert.pem", "renewed.pem"))
    settings = HttpSettings(port=0, tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem", body_timeout=0.2)
    with Running(settings) as running, running.connect(old) as before:
        renew(certificate, tmp_path, "other.pem")
        wait_until(lambda: "not renewed" in caplog.text)
        with running.connect(old):
            pass
        renew(certificate, tmp_path, "other.pem", "renewed.pem")
        wait_until(lambda: "new connections get the certificate" in caplog.text)
        with running.connect(new) as after:
            assert after.ask("GET", "/v2").status == 200
        with running.connect() as nameless:
            new.wrap_socket(nameless.socket, server_hostname="127.0.0.1").close()
        with pytest.raises(ssl.SSLCertVerificationError), running.connect(old):
            pass
        assert before.ask("GET", "/v2").status == 200


@pytest.mark.parametrize(
    ("cert", "key", "words"),
    [
        ("missing.pem", "key.pem", "missing.pem cannot be read"),
        ("cert.pem", "missing.pem", "missing.pem cannot be read"),
        ("cert.pem", "other.pem", "no certificate with its own"),
        ("cert.pem", "cert.pem", "no certificate with its own"),
        ("empty.pem", "empty.pem", "no certificate with its own"),
        ("cert.pem", None, "no certificate with its own"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_named(certificate: Path, cert: str, key: str | None, words: str):
    (certificate / "empty.pem").write_bytes(b"")
    settings = HttpSettings(port=0, tls_cert=certificate / cert, tls_key=certificate / key if key else None)
    with pytest.raises(StartError, match=words), Running(settings):
        pass


def test_a_port_in_use_and_a_strange_address_are_named():
    with Running(HttpSettings(port=0)) as running, pytest.raises(StartError, match=f"{running.url} is in use"):
        Running(HttpSettings(port=running.server.port)).__enter__()
    with pytest.raises(StartError, match="cannot listen on 203"):
        Running(HttpSettings(host="203.0.113.7", port=0)).__enter__()


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"host": ""},
        {"token": ""},
        {"token": "a\nb"},
        {"tls_key": Path("k")},
        {"max_headers": 0},
        {"max_header_bytes": 10},
        {"max_held_bytes": 5},
        {"idle_timeout": 0},
        {"idle_timeout": math.inf},
        {"header_timeout": math.nan},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HttpSettings(**wrong)


def test_a_token_is_read_from_a_file_and_shown_nowhere(tmp_path: Path):
    path = tmp_path / "token"
    for content, words in [(b"", "empty"), (b"a\nb", "several lines"), (b"\xff", "not ASCII")]:
        path.write_bytes(content)
        with pytest.raises(StartError, match=words):
            read_token(path)
    with pytest.raises(StartError, match="cannot be read"):
        read_token(tmp_path / "none")
    path.write_text("  s3cret\n")
    assert read_token(path) == "s3cret"
    assert "s3cret" not in repr(HttpSettings(token=read_token(path)))


def test_two_servers_share_a_port_when_asked_to():
    first = Running(HttpSettings(port=0, reuse_port=True))
    with first, Running(HttpSettings(port=first.server.port, reuse_port=True)) as second:
        assert second.server.port == first.server.port


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("reuse_port", [False, True], ids=["alone", "shared"])
def test_every_address_is_one_of_both_families(reuse_port: bool):
    with Running(HttpSettings(host="::", port=0, reuse_port=reuse_port)) as running:
        for host in ("127.0.0.1", "::1"):
            with socket.create_connection((host, running.server.port), timeout=10) as raw:
                raw.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
                assert raw.recv(1 << 12).startswith(b"HTTP/1.1 200 ")
        if not reuse_port:
            with pytest.raises(StartError, match=rf"\[::\]:{running.server.port} is in use"):
                Running(HttpSettings(host="::", port=running.server.port)).__enter__()


def test_connections_send_at_once():
    with Running(HttpSettings(port=0)) as running, running.connect() as raw:
        raw.ask("GET", "/v2")
        (connection,) = running.server._connections
        inner = connection._transport.get_extra_info("socket")
        assert inner.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def slow_request(port: int) -> Callable[[], tuple[int, str]]:
    """Ask what takes its time, on a connection of its own; the result of the call is status and Connection."""
    client = RawClient(port)
    body, length = infer_body(np.arange(3, dtype=np.float32))
    head = f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    client.send(f"{head}Inference-Header-Content-Length: {length}\r\n\r\n".encode() + body)

    def result() -> tuple[int, str]:
        answer = client.read()
        client.socket.close()
        return answer.status, answer.headers.get("connection", "")

    return result


def test_closing_answers_what_was_begun_and_accepts_no_more():
    with Running(HttpSettings(port=0)) as running:
        result = slow_request(running.server.port)
        wait_until(lambda: running.service.requests)
        with running.connect() as idle, running.connect() as late:
            assert idle.ask("GET", "/v2/health/ready").status == 200
            assert late.ask("GET", "/v2").status == 200
            running.call(running.server.close)
            answer = late.ask("GET", "/v2/health/ready")  # on a connection from before
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            assert idle.closed(within=3)
        with pytest.raises(ConnectionRefusedError):
            RawClient(running.server.port)
        running.call(running.service.gate.set)
        assert result() == (200, "close")
        wait_until(lambda: not running.server._connections)


@pytest.mark.parametrize("drain", [30, 0], ids=["answered", "cut off"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_what_waits_to_be_accepted_is_taken_before_the_port_closes(certificate: Path, tls: bool, drain: float):
    settings = HttpSettings(port=0, tls_cert=certificate / "cert.pem", tls_key=certificate / "key.pem")
    with Running(settings if tls else HttpSettings(port=0)) as running, ExitStack() as clients:
        trusted = ssl.create_default_context(cafile=certificate / "cert.pem")
        asked: list[RawClient] = []

        def close_while_clients_connect() -> None:  # on the loop, which accepts nobody meanwhile
            for _ in range(3):
                asked.append(RawClient(running.server.port))
                clients.enter_context(asked[-1].socket)
                if not tls:
                    asked[-1].send(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
            running.server.close()
            ending.append(asyncio.ensure_future(running.server.drain(drain)))

        ending: list[asyncio.Future[None]] = []
        running.call(close_while_clients_connect)
        silent = asked.pop()
        if drain:
            for client in asked:
                if tls:
                    client.socket = trusted.wrap_socket(client.socket, server_hostname="localhost")
                    client.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
                answer = client.read()
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                client.socket.close()
            silent.socket.close()
        wait_until(ending[0].done)
        assert not running.server._connections
        assert not running.server._late


@contextmanager
def start(*arguments: float, limit: str = "", **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own, which has ended when the block has: where that failed it is killed."""
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    if limit:
        command = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", *command]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    word, port = process.stdout.readline().split()
    assert word == "ready"
    return int(port)


def test_as_many_files_are_allowed_as_connections_take():
    with start(0, 0, 0, 30, limit="-Sn 128") as process:
        port = port_of(process)
        connected = [RawClient(port) for _ in range(200)]
        for raw in connected:
            raw.send(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert {raw.read().status for raw in connected} == {200}
        process.send_signal(signal.SIGTERM)


def test_too_few_files_for_the_connections_are_told():
    with start(0, 0, 0, 30, limit="-n 900", stderr=subprocess.PIPE) as process:
        port_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "may open 900 files, which 1024 connections" in process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_at_a_signal_the_process_drains_and_ends_with_0(number: signal.Signals):
    # Whether or not the tests themselves are under nohup.
    with start(0, 1.5, 0, 30, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)) as process:
        port = port_of(process)
        results: list[tuple[int, str]] = []
        asked = [slow_request(port) for _ in range(3)]
        threads = [threading.Thread(target=lambda one=one: results.append(one())) for one in asked]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        process.send_signal(number)
        for thread in threads:
            thread.join(10)
        out, _ = process.communicate(timeout=10)
    assert results == [(200, "close")] * 3
    assert process.returncode == 0
    assert "stopped" in out


def test_a_closed_terminal_does_not_end_what_nohup_has_started():
    with start(0, 0, 0, 30, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as process:
        port = port_of(process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert RawClient(port).ask("GET", "/v2/health/ready").status == 200
        process.terminate()
        assert process.wait(10) == 0


def test_what_does_not_end_is_cut_off_after_the_drain_timeout_or_a_second_signal():
    for drain, signals in ((0.3, 1), (60, 2)):
        with start(0, 1000, 0, drain) as process:
            unanswered = slow_request(port_of(process))
            time.sleep(0.3)
            started = time.monotonic()
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            process.communicate(timeout=10)
        assert process.returncode == 0
        assert time.monotonic() - started < 5
        with pytest.raises(OSError):  # noqa: PT011 - a reset, or the end
            unanswered()


def test_while_models_load_the_process_lives_and_is_not_ready():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with start(1.5, 0, port, 5) as process:
        client = None
        for _ in range(200):
            try:
                client = RawClient(port)
                break
            except OSError:
                time.sleep(0.05)
        assert client is not None
        assert client.ask("GET", "/v2/health/live").status == 200
        assert client.ask("GET", "/v2/health/ready").status == 503
        assert port_of(process) == port
        assert client.ask("GET", "/v2/health/ready").status == 200
        client.socket.close()
        process.terminate()
        assert process.wait(10) == 0


def test_a_signal_while_models_load_ends_the_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with start(100, 0, port, 5) as process:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(10) == 0


def test_a_signal_while_onnx_runtime_loads_a_model_ends_the_process(tmp_path: Path):
    (root := tmp_path / "models" / "demo" / "1").mkdir(parents=True)
    (scratch := tmp_path / "scratch").mkdir()
    command = [sys.executable, "-c", LOADING, str(root.parent.parent)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(scratch)}
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "loads\n"
            process.terminate()
            assert process.wait(10) == 0
        finally:
            process.kill()
    assert not [*scratch.glob("headstart-*")]


def test_a_service_that_cannot_start_ends_the_process_with_its_reason():
    class Broken(TinyService):
        async def start(self) -> None:
            raise StartError("the bucket is not there")

    with pytest.raises(StartError, match="the bucket is not there"):
        run(HttpSettings(port=0), Broken(), on_ready=lambda ports: os.kill(os.getpid(), signal.SIGTERM))


def test_the_server_loads_neither_torch_nor_ray():
    script = "import sys, headstart.serving.server.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"^\w+|(?<= )\w+", done.stdout))
    assert "uvloop" in loaded
    assert not {"torch", "ray", "onnx", "pydantic", "tritonclient"} & loaded
