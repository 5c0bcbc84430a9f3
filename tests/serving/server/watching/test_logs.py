"""Names of requests, and what the log says of each: read from a served repository over HTTP and gRPC."""

import fcntl
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper
from tritonclient.grpc import service_pb2

from headstart.serving.errors import PackageError
from headstart.serving.server.command import serve
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.watching.logs import configure
from headstart.serving.server.watching.watch import AccessLog, Outcome, RequestIds, Seen
from headstart.serving.server.wire.protocol import InferRequest, InferResponse
from tests.serving.server.graphs import model_bytes, value, write_package
from tests.serving.server.models.test_repository import IMAGE
from tests.serving.server.test_process import certificate  # noqa: F401 - a fixture
from tests.serving.server.tiny_service import RawClient, Running, infer_body, wait_until
from tests.serving.server.transport.test_grpc import RunningGrpc

MADE = re.compile(r"[0-9a-f]{12}-[0-9a-f]+")
PROGRAM = """
import json, sys
from pathlib import Path
from headstart.serving.server.command import serve
say = lambda line: print(line, flush=True)
files = "token_file", "tls_cert", "tls_key"
options = {name: Path(value) if name in files else value for name, value in json.loads(sys.argv[2]).items()}
sys.exit(serve(Path(sys.argv[1]), port=0, grpc_port=0, threads=1, say=say, **options))
"""
PATH = "/v2/models/demo/infer"
BODY, LENGTH = infer_body(IMAGE, names=["images"])
ODD_BODY, ODD_LENGTH = infer_body(IMAGE[:, :2], names=["images"])


def of_one_size() -> bytes:
    """A classifier that ONNX Runtime runs on images of 4 x 4 pixels, and on others fails with an error of its own."""
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["pixels", "shape"], ["rows"]),
        helper.make_node("ReduceMean", ["rows", "axes"], ["logits"], keepdims=0),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    inputs = [value("images", ["batch", "height", "width", 3], TensorProto.UINT8)]
    outputs = [value(name, ["batch", 3]) for name in ("logits", "probabilities")]
    constants = {"shape": np.array([0, 16, 3], np.int64), "axes": np.array([1], np.int64)}
    return model_bytes(nodes, inputs, outputs, constants)


@pytest.mark.parametrize("given", ["abc", "A.b_c~d:e/f+g=h@i-1", "x" * 128])
def test_a_plain_name_is_kept(given: str):
    assert RequestIds().choose(given) == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\r\nSet-Cookie: b", "naïve", '{"a":1}', "a,b", "\x00"])
def test_another_name_is_replaced_by_one_of_ours(given: str):
    ids = RequestIds()
    found = [ids.choose(given) for _ in range(100)]
    assert len(set(found)) == 100
    assert all(MADE.fullmatch(one) for one in found)


def test_every_answer_over_http_bears_its_name():
    with Running(HttpSettings(port=0, max_body_bytes=300)) as running, running.connect() as client:
        for path in ("/v2", "/v2/models/nope", "/nope"):
            assert client.ask("GET", path, X_Request_Id="mine").headers["x-request-id"] == "mine"
        first, second = (client.ask("GET", "/v2").headers["x-request-id"] for _ in range(2))
        assert first != second
        body, length = infer_body(np.zeros(2, np.float32))
        for model in ("echo", "full"):
            path, options = f"/v2/models/{model}/infer", {"Inference_Header_Content_Length": length}
            assert client.ask("POST", path, body, X_Request_Id="m", **options).headers["x-request-id"] == "m"
        failed = client.ask("POST", "/v2/models/broken/infer", body, X_Request_Id="b-1", **options)
        assert failed.error.endswith("its log says why under b-1")
        refused = client.ask("POST", path, b"x" * 301, X_Request_Id="mine")
        assert (refused.status, refused.headers["x-request-id"]) == (413, "mine")
    with Running(HttpSettings(port=0, token="t")) as running, running.connect() as client:
        refused = client.ask("GET", "/v2", X_Request_Id="mine")  # what was not let in is not even echoed
        assert (refused.status, bool(MADE.fullmatch(refused.headers["x-request-id"]))) == (401, True)
    with Running(HttpSettings(port=0)) as running, running.connect() as client:
        client.send(b"nonsense\r\n\r\n")
        assert MADE.fullmatch(client.read().headers["x-request-id"])


def test_every_answer_over_grpc_bears_its_name():
    with RunningGrpc(HttpSettings(grpc_port=0)) as running, grpc.insecure_channel(running.url) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        _, known = call.with_call(b"", metadata=[("x-request-id", "mine")])
        assert dict(known.trailing_metadata())["x-request-id"] == "mine"
        _, known = call.with_call(b"", metadata=[("x-request-id", "a"), ("x-request-id", "b")])
        assert MADE.fullmatch(dict(known.trailing_metadata())["x-request-id"])
        request = service_pb2.ModelMetadataRequest(name="nope").SerializeToString()
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")(
                request, metadata=[("x-request-id", "mine")]
            )
        error: Any = caught.value
        assert (error.code(), dict(error.trailing_metadata())["x-request-id"]) == (grpc.StatusCode.NOT_FOUND, "mine")


class Logged:
    """`serve` in a process of its own, and the lines of its log."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(root), json.dumps(options, default=str)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.findall(r"127\.0\.0\.1:(\d+)", line)
        assert found, (line, self.process.communicate()[1])
        self.port, self.grpc_port = map(int, found)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()), daemon=True)
        self.reader.start()

    def stop(self) -> list[str]:
        self.process.terminate()
        assert self.process.wait(20) == 0
        self.reader.join(5)
        return self.lines


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    write_package(tmp_path / "demo" / "1", 1)
    write_package(tmp_path / "odd" / "1", 1, graph=of_one_size())
    return tmp_path


def ask_all(server: Logged) -> None:
    client = RawClient(server.port)
    options = {"Inference_Header_Content_Length": LENGTH}
    assert client.ask("POST", PATH, BODY, X_Request_Id="good", **options).status == 200
    assert client.ask("GET", "/v2/models/absent?secret=1", X_Request_Id="absent").status == 404
    options = {"Inference_Header_Content_Length": ODD_LENGTH}
    assert client.ask("POST", "/v2/models/odd/infer", ODD_BODY, X_Request_Id="bad", **options).status == 500
    refused = client.ask("GET", "/v2", X_Request_Id="late", Headstart_Timeout_Ms="soon")
    assert (refused.status, refused.headers["x-request-id"]) == (400, "late")
    client.socket.close()
    client = RawClient(server.port)
    client.send(b"nonsense\r\n\r\n")
    assert client.read().status == 400
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelReady")
        call(service_pb2.ModelReadyRequest(name="demo").SerializeToString(), metadata=[("x-request-id", "rpc")])
    client.socket.close()


def test_json_lines_say_what_became_of_each_request(root: Path):
    server = Logged(root, log_format="json", access_log=True)
    ask_all(server)
    documents = [json.loads(line) for line in server.stop()]
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", one["time"]) for one in documents)
    assert all({"time", "level", "logger", "message"} <= one.keys() for one in documents)
    access = {one["request_id"]: one for one in documents if one["logger"] == "headstart.access"}
    good = access["good"]
    assert (good["message"], good["status"], good["model"], good["version"]) == (f"POST {PATH}", 200, "demo", "1")
    assert 0 < good["ms"] < 1000
    assert good["bytes"] > 24
    assert (access["absent"]["message"], access["absent"]["status"]) == ("GET /v2/models/absent", 404)
    assert "model" not in access["absent"]
    assert (access["late"]["message"], access["late"]["status"]) == ("GET /v2", 400)
    assert access["rpc"]["message"] == "inference.GRPCInferenceService/ModelReady"
    assert access["rpc"]["status"] == "OK"
    (odd,) = (one for name, one in access.items() if MADE.fullmatch(name))
    assert (odd["message"], odd["status"]) == ("- -", 400)
    (failure,) = (one for one in documents if one["level"] == "ERROR")
    assert (failure["request_id"], failure["model"], failure["version"]) == ("bad", "odd", "1")
    assert "Traceback" in failure["exception"]
    assert access["bad"]["status"] == 500
    assert len(access) == 6
    assert {one["client"] for one in access.values()} == {"127.0.0.1"}


@pytest.mark.parametrize("token", [None, "t"])
def test_a_head_that_is_no_http_is_told_of_as_far_as_it_can_be_read(root: Path, tmp_path: Path, token: str | None):
    options: dict[str, Any] = {}
    if token is not None:
        (tmp_path / "token").write_text(token)
        options["token_file"] = tmp_path / "token"
    server = Logged(root, log_format="json", access_log=True, **options)
    known, long = b"X-Request-Id: mine\r\nAuthorization: Bearer t\r\n", b"A: " + b"b" * 20_000
    heads = [  # what is sent, what is logged and told where it is let in, and whether it has the token
        (b"GET /v2/odd?secret=1 HTTP/1.1\r\n%sHost: x\r\nA : b\r\n\r\n" % known, "GET /v2/odd", 400, True),
        (b"GET /v2/long HTTP/1.1\r\n%sHost: x\r\n%s" % (known, long), "GET /v2/long", 431, True),
        (b"GET /v2/new HTTP/1.1\r\nX-Request-Id: mine\r\nHost: x\r\nA : b\r\n\r\n", "GET /v2/new", 400, False),
    ]
    told = []
    for head, *_ in heads:
        client = RawClient(server.port)
        client.send(head)
        told.append(client.read().status)
        client.socket.close()
    access = [one for one in map(json.loads, server.stop()) if one["logger"] == "headstart.access"]
    assert told == [one["status"] for one in access]
    for (_, message, status, has_token), one in zip(heads, access, strict=True):
        if has_token or token is None:
            assert (one["message"], one["status"], one["request_id"]) == (message, status, "mine")
        else:  # what was not let in is not even echoed
            assert (one["message"], one["status"]) == ("- -", 401)
            assert MADE.fullmatch(one["request_id"])


def test_what_is_no_tls_leaves_no_line_of_grpcs_own(root: Path, certificate: Path):  # noqa: F811
    server = Logged(root, log_format="json", tls_cert=certificate / "cert.pem", tls_key=certificate / "key.pem")
    with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=10) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while plain.recv(1 << 10):  # until the server closes
            pass
    lines = server.stop()
    assert lines
    assert all(json.loads(line)["logger"].startswith("headstart.") for line in lines)


def test_calls_that_are_refused_before_they_are_answered_have_their_line_too(root: Path, tmp_path: Path):
    (tmp_path / "token").write_text("t\n")
    server = Logged(root, log_format="json", access_log=True, token_file=tmp_path / "token")
    service, known = "/inference.GRPCInferenceService", ("authorization", "Bearer t")
    calls = [  # path, messages, metadata and what is told
        (f"{service}/ModelInfer", [b""], [("authorization", "Bearer u"), ("x-request-id", "guess")], "UNAUTHENTICATED"),
        ("/guessed/Path", [b""], [], "UNAUTHENTICATED"),
        ("/some.Service/Method", [b""], [known, ("x-request-id", "unknown")], "UNIMPLEMENTED"),
        (f"{service}/ModelInfer", [], [known, ("x-request-id", "empty")], "INVALID_ARGUMENT"),
        ("/grpc.health.v1.Health/Watch", [b"\xff"], [known, ("x-request-id", "watch")], "INVALID_ARGUMENT"),
    ]
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        for path, messages, metadata, status in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.stream_stream(path)(iter(messages), metadata=metadata, timeout=10))
            error: Any = caught.value
            assert error.code().name == status
    documents = [json.loads(line) for line in server.stop()]
    access = [one for one in documents if one["logger"] == "headstart.access"]
    paths = [path if path != "/guessed/Path" else "/-" for path, *_ in calls]
    assert [(f"/{one['message']}", one["status"]) for one in access] == [
        (path, call[-1]) for path, call in zip(paths, calls, strict=True)
    ]
    assert all(MADE.fullmatch(one["request_id"]) for one in access[:2])  # what was not let in is not even echoed
    assert [one["request_id"] for one in access[2:]] == ["unknown", "empty", "watch"]


def test_without_an_access_log_the_log_has_failures_alone(root: Path):
    server = Logged(root)
    ask_all(server)
    lines = server.stop()
    assert any(
        re.search(r"Z ERROR headstart\.\S+: odd version 1 failed request_id=bad model=odd", one) for one in lines
    )
    assert not any("headstart.access" in line for line in lines)


def test_lines_of_workers_bear_their_number(root: Path):
    server = Logged(root, workers=2, access_log=True)
    clients = [RawClient(server.port) for _ in range(24)]
    for client in clients:
        client.ask("GET", "/v2")
    wait_until(lambda: sum("headstart.access" in line for line in server.lines) == 24)
    for client in clients:
        client.socket.close()
    lines = server.stop()
    access = [line.split() for line in lines if "headstart.access" in line]
    assert {field for line in access for field in line if field.startswith("worker=")} == {"worker=0", "worker=1"}


@pytest.mark.parametrize("chosen", ["a\nERROR forged", "a\rERROR=forged", "a status=forged"])
def test_what_a_stranger_chose_begins_neither_a_line_nor_a_field(capsys: pytest.CaptureFixture[str], chosen: str):
    for log_format in ("text", "json"):
        root = logging.getLogger()
        before, root.handlers = root.handlers, []
        level = root.level
        try:
            configure(log_format)
            logging.getLogger("headstart.x").info("it", extra={"model": chosen, "status": 200})
        finally:
            root.handlers, root.level = before, level
        (line,) = capsys.readouterr().err.splitlines()
        assert json.dumps(chosen) in line
        assert "200" in line


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_a_message_or_an_error_quotes_begins_no_line_of_ours(monkeypatch: pytest.MonkeyPatch, log_format: str):
    monkeypatch.setattr(logging, "basicConfig", lambda *, handlers, **options: made.extend(handlers))
    made: list[logging.Handler] = []
    configure(log_format)
    error = ValueError("odd\n2026-01-01T00:00:00.000Z INFO x: forged\x1b[2J\r")
    fields = {"msg": "%s is refused", "args": (error,), "levelname": "WARNING", "exc_info": (ValueError, error, None)}
    text = made[0].format(logging.makeLogRecord(fields))
    first, *traceback = text.split("\n")
    assert r"odd\n2026-01-01T00:00:00.000Z INFO x: forged" in first
    assert all(line.startswith("  ") and line.isprintable() for line in traceback)
    assert bool(traceback) == (log_format == "text")


@pytest.mark.parametrize("length", [10, 3_000, 30_000])
def test_lines_that_nobody_takes_are_dropped_and_counted(monkeypatch: pytest.MonkeyPatch, length: int):
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 14)
    with os.fdopen(read, "rb", buffering=0) as reader, os.fdopen(write, "w", encoding="utf-8") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        configure("json")
        began = time.monotonic()
        for number in range(500):
            logging.error("%d %s", number, "x" * length)
        assert time.monotonic() - began < 5
        os.set_blocking(read, False)
        taken = reader.read()
        logging.error("taken again")
        whole = [line for line in (taken + reader.read()).splitlines() if line.endswith(b"}")]  # the last was cut off
        *first, note, last = map(json.loads, whole)
        lost = int(note["message"].split()[0])
        assert note["message"] == f"{lost} lines of the log are lost, since nobody took them"
        assert len(first) == 500 - lost
        assert last["message"] == "taken again"
        logging.error("and again")
        assert json.loads(reader.read())["message"] == "and again"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_times_are_utc_wherever_the_server_is(monkeypatch: pytest.MonkeyPatch, log_format: str):
    monkeypatch.setattr(logging, "basicConfig", lambda *, handlers, **options: made.extend(handlers))
    made: list[logging.Handler] = []
    configure(log_format)
    record = logging.makeLogRecord({"msg": "it", "created": 1.25, "msecs": 250.0})
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert "1970-01-01T00:00:01.250Z" in made[0].format(record)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_line_names_the_version_that_answered_or_else_the_one_that_was_asked_for(caplog: pytest.LogCaptureFixture):
    seen = Seen("a")
    with caplog.at_level("INFO", "headstart.access"):
        for version in (None, "8"):
            seen.asked(InferRequest(model="demo", version="7", inputs={}))
            if version:
                seen.told(InferResponse(model="demo", version=version, outputs={}))
            AccessLog().ended(seen, Outcome("POST", "/v2", 200, 0, dict))
    assert [one.__dict__["version"] for one in caplog.records] == ["7", "8"]


@pytest.mark.parametrize(
    ("status", "failed"),
    [(200, False), (404, False), (499, False), (500, True), (503, True), ("OK", False), ("NOT_FOUND", False),
     ("CANCELLED", False), ("RESOURCE_EXHAUSTED", False), ("INTERNAL", True), ("UNAVAILABLE", True)],
)  # fmt: skip
def test_a_failure_is_what_was_the_servers_fault(status: int | str, failed: bool):
    outcome = Outcome(method="POST", path="/v2", status=status, num_bytes=0, headers=dict)
    assert outcome.failed == failed


def test_another_format_is_refused(root: Path):
    with pytest.raises(PackageError, match="log_format is 'xml'; accepted: text, json"):
        serve(root, log_format="xml")
