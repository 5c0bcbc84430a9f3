"""Spans of inferences as a collector gets them: a real exporter, a real HTTP collector, a served repository."""

import http.server
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from PIL import Image
from tritonclient.grpc import service_pb2

from headstart.serving.errors import PackageError
from headstart.serving.server.command import serve
from headstart.serving.server.errors import StartError
from headstart.serving.server.watching.tracing import Tracing
from headstart.serving.server.watching.watch import Outcome, Seen
from headstart.serving.server.wire.protocol import InferRequest
from tests.serving.server.graphs import write_package
from tests.serving.server.models.test_repository import IMAGE
from tests.serving.server.tiny_service import RawClient, wait_until
from tests.serving.server.watching.test_logs import BODY, LENGTH, PATH, Logged

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Keeps the spans that are sent to /v1/traces."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *words: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.services |= {
                one.value.string_value for one in resource.resource.attributes if one.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    one = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", one.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
    yield one
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_package(tmp_path / "demo" / "1", 1)
    return tmp_path


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def ask(client: RawClient, path: str = PATH, **headers: object) -> int:
    return client.ask("POST", path, BODY, Inference_Header_Content_Length=LENGTH, **headers).status


def test_an_inference_is_a_span_with_its_stages_in_the_callers_trace(collector: Collector, root: Path):
    server = Logged(root, otel=True)
    client = RawClient(server.port)
    assert ask(client, traceparent=f"00-{TRACE}-{PARENT}-01", X_Request_Id="one") == 200
    assert client.ask("GET", "/v2").status == 200  # no inference, no span
    assert ask(client, "/v2/models/absent/versions/7/infer") == 404
    client.socket.close()
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="images", datatype="UINT8", shape=IMAGE.shape)
    request = service_pb2.ModelInferRequest(model_name="demo", inputs=[tensor], raw_input_contents=[IMAGE.tobytes()])
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        call(request.SerializeToString(), metadata=[("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "g")])
    wait_until(lambda: len(collector.spans) >= 12)
    server.stop()
    assert collector.services == {"headstart"}
    by_request = {
        attributes(one)["headstart.request_id"]: one for one in collector.spans if one.kind == one.SPAN_KIND_SERVER
    }
    assert len(by_request) == 3
    for name in ("one", "g"):
        span = by_request[name]
        assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("infer demo", TRACE, PARENT)
        found = attributes(span)
        assert (found["headstart.model"], found["headstart.version"]) == ("demo", "1")
        stages = [one for one in collector.spans if one.parent_span_id == span.span_id]
        assert [one.name for one in stages] == ["decode", "queue", "compute", "encode"]
        assert {one.trace_id.hex() for one in stages} == {TRACE}
        times = [time for one in stages for time in (one.start_time_unix_nano, one.end_time_unix_nano)]
        assert times[:6] == sorted(times[:6])
        assert span.start_time_unix_nano == times[0]
        assert times[-1] == span.end_time_unix_nano
        assert stages[2].end_time_unix_nano > stages[2].start_time_unix_nano
        assert stages[2].end_time_unix_nano <= stages[3].start_time_unix_nano
    assert attributes(by_request["one"])["http.response.status_code"] == 200
    assert attributes(by_request["g"])["rpc.method"] == "ModelInfer"
    (absent,) = (one for name, one in by_request.items() if name not in ("one", "g"))
    assert attributes(absent)["http.response.status_code"] == 404
    assert attributes(absent)["headstart.version"] == "7"  # that was asked for
    assert absent.trace_id.hex() != TRACE
    assert absent.status.code != absent.status.STATUS_CODE_ERROR  # the fault was the client's


def test_the_decoding_of_files_is_a_stage_of_its_own(collector: Collector, root: Path):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)).save(file, "PNG")
    server = Logged(root, otel=True)
    client = RawClient(server.port)
    answer = client.ask("POST", "/v1/predict?model=demo", file.getvalue(), Content_Type="image/png")
    assert answer.status == 200
    told = dict(one.split(";dur=") for one in answer.headers["server-timing"].split(", "))
    client.socket.close()
    wait_until(lambda: len(collector.spans) >= 6)
    server.stop()
    (whole,) = (one for one in collector.spans if one.kind == one.SPAN_KIND_SERVER)
    stages = [one for one in collector.spans if one.parent_span_id == whole.span_id]
    assert [one.name for one in stages] == ["decode", "images", "queue", "compute", "encode"]
    times = [time for one in stages for time in (one.start_time_unix_nano, one.end_time_unix_nano)]
    assert times == sorted(times)
    took = (stages[1].end_time_unix_nano - stages[1].start_time_unix_nano) / 1e6
    assert took > 1  # ms, for two megapixels of noise
    assert list(told) == ["images", "queue", "compute"]
    assert float(told["images"]) == pytest.approx(took, abs=0.01)


def test_what_is_held_is_sent_at_the_end_and_what_is_not_sampled_is_not(
    collector: Collector, root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.name=mine")
    server = Logged(root, otel=True)
    client = RawClient(server.port)
    assert ask(client, traceparent=f"00-{TRACE}-{PARENT}-00") == 200
    assert ask(client) == 200
    client.socket.close()
    assert not collector.spans
    server.stop()
    assert [one.name for one in collector.spans if one.kind == one.SPAN_KIND_SERVER] == ["infer demo"]
    assert collector.services == {"mine"}


def test_a_collector_that_is_not_there_neither_fails_requests_nor_holds_up_the_end(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    server = Logged(root, otel=True)
    client = RawClient(server.port)
    assert ask(client) == 200
    client.socket.close()
    server.stop()


def test_a_span_is_an_error_where_the_fault_was_the_servers(collector: Collector):
    tracing = Tracing()
    for status in (200, 404, 500):
        seen = Seen(str(status), began=perf_counter_ns())
        seen.asked(InferRequest(model="demo", inputs={}))
        tracing.ended(seen, Outcome(method="POST", path=PATH, status=status, num_bytes=0, headers=dict))
    tracing.close()
    failed = {
        attributes(one)["headstart.request_id"]
        for one in collector.spans
        if one.status.code == one.status.STATUS_CODE_ERROR
    }
    assert failed == {"500"}


def test_another_protocol_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(StartError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'; accepted: http/protobuf"):
        Tracing()


def test_without_the_extra_the_operator_is_told(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "headstart.serving.server.watching.tracing")
    with pytest.raises(PackageError, match=r"pip install -e '\.\[otel\]'") as caught:
        serve(root, port=0, otel=True)
    assert caught.value.exit_code == 2


def test_without_otel_nothing_of_it_is_imported(root: Path):
    code = (
        "import sys, signal, os; from pathlib import Path; from headstart.serving.server.command import serve\n"
        "stop = lambda line: os.kill(os.getpid(), signal.SIGTERM)\n"
        "serve(Path(sys.argv[1]), port=0, say=stop, access_log=True)\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
