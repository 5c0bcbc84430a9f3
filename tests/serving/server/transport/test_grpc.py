"""The gRPC server with NVIDIA's own client, and with bare messages where a client would not go."""

import asyncio
import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http as triton_http
from google.protobuf import descriptor_pb2
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from headstart.serving.server.command import serve
from headstart.serving.server.errors import ServeError, StartError
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport import grpc_calls
from headstart.serving.server.transport.grpc import GrpcServer, serve_grpc
from headstart.serving.server.watching.watch import Outcome, Seen, Watch
from headstart.serving.server.wire.grpc_codec import GrpcDecoder
from headstart.serving.server.wire.grpc_messages import MESSAGES
from headstart.serving.server.wire.protocol import Limits
from tests.serving.server.graphs import logits
from tests.serving.server.models.test_repository import IMAGE
from tests.serving.server.test_process import PROGRAM, ROOT, certificate  # noqa: F401 - a fixture
from tests.serving.server.test_service import Server, root  # noqa: F401 - a fixture
from tests.serving.server.tiny_service import Running, TinyService, wait_until

DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
DTYPES += ["float16", "float32", "float64"]
CONTENTS = {"BOOL": "bool", "FP32": "fp32", "FP64": "fp64", "INT64": "int64", "UINT64": "uint64"}
CONTENTS |= dict.fromkeys(["INT8", "INT16", "INT32"], "int") | dict.fromkeys(["UINT8", "UINT16", "UINT32"], "uint")


class RunningGrpc(Running):
    """As `Running`, with a gRPC server in place of the HTTP one."""

    grpc_server: GrpcServer
    watch: Watch | None = None

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.service, self._stop = TinyService(), asyncio.Event()
        self.grpc_server = await serve_grpc(self.service, self.settings, self.watch)
        self._ready.set()
        await self._stop.wait()
        await self.grpc_server.drain(timeout=0)

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.grpc_server.port}"

    def client(self) -> Any:
        return triton.InferenceServerClient(self.url)


@pytest.fixture(scope="module")
def running() -> Iterator[RunningGrpc]:
    with RunningGrpc(HttpSettings(grpc_port=0)) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: RunningGrpc) -> Iterator[Any]:
    with running.client() as one:
        yield one


@pytest.fixture(scope="module")
def call(running: RunningGrpc) -> Iterator[Callable[..., Any]]:
    """Sends any bytes to any method, and reads a ModelInferResponse."""
    with grpc.insecure_channel(running.url) as channel:

        def one(data: bytes, method: str = "ModelInfer", **options: Any) -> Any:
            path = f"/inference.GRPCInferenceService/{method}"
            return service_pb2.ModelInferResponse.FromString(channel.unary_unary(path)(data, timeout=10, **options))

        yield one


def tensor(name: str, array: np.ndarray) -> Any:
    kind = triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype))
    kind.set_data_from_numpy(array)
    return kind


def bare(
    model: str = "echo", name: str = "x", datatype: str = "FP32", shape: tuple[int, ...] = (2,), **more: Any
) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, **more)
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    return request


def refusal(call: Callable[..., Any], data: bytes, **options: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(data, **options)
    return caught.value.code().name, caught.value.details()


@pytest.mark.parametrize("name", list(MESSAGES))
def test_messages_are_numbered_as_nvidias(name: str):
    first, *rest = name.split(".")
    module = service_pb2 if first in service_pb2.DESCRIPTOR.message_types_by_name else model_config_pb2
    theirs = module.DESCRIPTOR.message_types_by_name[first]
    for part in rest:
        theirs = theirs.nested_types_by_name[part]
    ours = MESSAGES[name].DESCRIPTOR
    assert ours.full_name == theirs.full_name
    (fields, oneofs), (expected, known) = fields_of(ours), fields_of(theirs)
    assert fields == {one: expected[one] for one in fields}
    assert set(oneofs) <= set(known)
    for field in ours.fields:
        if field.enum_type is not None:
            values = theirs.fields_by_name[field.name].enum_type.values
            assert [(v.name, v.number) for v in field.enum_type.values] == [(v.name, v.number) for v in values]


def fields_of(descriptor: Any) -> tuple[dict[str, Any], list[str]]:
    """Fields by name as number, type, type's name, label and oneof; and the names of the oneofs."""
    message = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(message)
    oneofs = [one.name for one in message.oneof_decl]
    fields = {
        one.name: (
            one.number,
            one.type,
            one.type_name,
            one.label,
            one.HasField("oneof_index") and oneofs[one.oneof_index],
        )
        for one in message.field
    }
    return fields, oneofs


def test_triton_reads_health_metadata_config_and_statistics(client: Any):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo", "1")
    assert not client.is_model_ready("full")
    assert list(client.get_server_metadata().extensions) == ["binary_tensor_data"]
    metadata = client.get_model_metadata("photo", "1")
    assert (metadata.inputs[0].name, list(metadata.inputs[0].shape)) == ("images", [-1, -1, -1, 3])
    assert [one.name for one in metadata.outputs] == ["logits", "probabilities"]
    assert client.get_model_config("echo").config.max_batch_size == 8
    assert client.get_inference_statistics("echo", "1").model_stats[0].version == "1"
    assert [one.name for one in client.get_model_repository_index().models] == ["echo", "photo"]


def test_triton_loads_and_unloads(client: Any, running: RunningGrpc):
    client.load_model("echo", config='{"max_batch_size": 4}')
    client.unload_model("echo")
    loaded, unloaded = running.service.calls[-2:]
    assert loaded == ("load", "echo", {"config": '{"max_batch_size": 4}'})
    assert unloaded == ("unload", "echo")
    with pytest.raises(InferenceServerException, match=r"\[StatusCode.NOT_FOUND\] there is no model 'nope'"):
        client.load_model("nope")
    with pytest.raises(InferenceServerException, match=r"\[StatusCode.UNAVAILABLE\] it is still busy"):
        client.unload_model("broken")


@pytest.mark.parametrize("shape", [(3, 4), (1,), (0, 4), (63, 257)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_infers_with_every_datatype(client: Any, dtype: str, shape: tuple[int, ...]):
    array = np.random.default_rng(1).integers(0, 2, shape).astype(dtype)
    result = client.infer("echo", [tensor("x", array)], outputs=[triton.InferRequestedOutput("x")], request_id="7")
    found = result.as_numpy("x")
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)
    assert (result.get_response().id, result.get_response().model_version) == ("7", "1")


def test_triton_infers_strings_and_several_inputs_of_odd_alignment(client: Any):
    text = np.array([[b"", "gr\u00fc\u00df".encode()], [b"\xff\x00", b"x" * 300]], dtype=object)
    odd, wide = np.arange(3, dtype=np.uint8), np.arange(5, dtype=np.float64)
    result = client.infer("echo", [tensor("x", text), tensor("y", odd), tensor("z", wide)])
    assert result.as_numpy("x").tolist() == text.tolist()
    assert np.array_equal(result.as_numpy("y"), odd)
    assert np.array_equal(result.as_numpy("z"), wide)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_triton_compresses(client: Any, compression: str):
    array = np.zeros(100_000, np.float32)
    found = client.infer("echo", [tensor("x", array)], compression_algorithm=compression).as_numpy("x")
    assert np.array_equal(found, array)


@pytest.mark.parametrize("datatype", list(CONTENTS))
def test_typed_contents_are_read(call: Callable[..., Any], datatype: str):
    request = bare(datatype=datatype, shape=(2, 1))
    getattr(request.inputs[0].contents, f"{CONTENTS[datatype]}_contents").extend([0, 1])
    answer = call(request.SerializeToString())
    found = np.frombuffer(answer.raw_output_contents[0], triton_to_np_dtype(datatype))
    assert found.tolist() == [0, 1]
    assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == (datatype, [2, 1])


def test_bfloat16_is_carried_as_its_bits(call: Callable[..., Any]):
    answer = call(bare(datatype="BF16", raw_input_contents=[b"\x80\x3f\0\xc0"]).SerializeToString())
    assert (answer.outputs[0].datatype, answer.raw_output_contents[0]) == ("BF16", b"\x80\x3f\0\xc0")


def test_typed_strings_are_read(call: Callable[..., Any]):
    request = bare(datatype="BYTES")
    request.inputs[0].contents.bytes_contents.extend([b"\xff", b""])
    assert call(request.SerializeToString()).raw_output_contents[0] == b"\1\0\0\0\xff\0\0\0\0"
    request.inputs[0].contents.bytes_contents.append(b"more")
    assert refusal(call, request.SerializeToString())[0] == "INVALID_ARGUMENT"


def test_classes_are_told_with_their_labels(client: Any):
    image = np.full((1, 4, 4, 3), 255, np.uint8)
    wanted = [triton.InferRequestedOutput("probabilities", class_count=2)]
    best = client.infer("photo", [tensor("images", image)], outputs=wanted).as_numpy("probabilities")
    assert [text.decode().split(":")[1:] for text in best[0]] == [["2", "light"], ["1", "grey"]]


def test_parameters_priority_and_deadlines_reach_the_service(client: Any, running: RunningGrpc):
    array = tensor("x", np.zeros(2, np.float32))
    given = {"a": "b", "c": 3, "d": 0.5, "e": True}
    client.infer("echo", [array], parameters=given, priority=1, timeout=2_000_000, client_timeout=60)
    request = running.service.requests[-1]
    assert request.parameters == given
    assert request.priority == 100
    assert request.deadline is not None
    assert 1 < request.deadline - time.monotonic() < 2.1
    client.infer("echo", [array], timeout=60_000_000, client_timeout=5)
    assert 3 < (running.service.requests[-1].deadline or 0) - time.monotonic() < 5.1
    client.infer("echo", [array])
    assert running.service.requests[-1].deadline is None


def test_the_only_call_is_told_from_one_of_several():
    with RunningGrpc(HttpSettings(grpc_port=0)) as running, running.client() as client:
        x = [tensor("x", np.zeros(2, np.float32))]
        client.infer("echo", x)
        client.async_infer("slow", x, callback=lambda result, error: None)
        wait_until(lambda: len(running.service.requests) == 2)
        client.infer("echo", x)
        running.call(running.service.gate.set)
        wait_until(lambda: running.service.clients == 0)
        client.infer("echo", x)
        assert [request.alone for request in running.service.requests] == [True, True, False, True]


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_client_that_goes_cancels_its_request(running: RunningGrpc, how: str):
    with running.client() as client:
        before = len(running.service.requests)
        results: list[Any] = []
        pending = client.async_infer(
            "slow",
            [tensor("x", np.zeros(2, np.float32))],
            callback=lambda result, error: results.append(error),
            client_timeout=0.3 if how == "deadline" else None,
        )
        wait_until(lambda: len(running.service.requests) > before)
        assert not running.service.requests[-1].cancelled
        if how == "cancel":
            pending.cancel()
        wait_until(lambda: running.service.requests[-1].cancelled)
        wait_until(lambda: results)
        assert str(results[0].status()) == f"StatusCode.{'CANCELLED' if how == 'cancel' else 'DEADLINE_EXCEEDED'}"


@pytest.mark.parametrize(
    ("model", "version", "status", "words"),
    [
        ("nope", "", "NOT_FOUND", "there is no model 'nope'"),
        ("echo", "9", "NOT_FOUND", "model 'echo' has no version '9'"),
        ("full", "", "RESOURCE_EXHAUSTED", "the queue is full"),
        ("broken", "", "INTERNAL", "the server failed; its log says why under "),
    ],
    ids=lambda value: str(value) or "-",
)
def test_refusals_are_statuses_and_tell_no_secrets(client: Any, model: str, version: str, status: str, words: str):
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, [tensor("x", np.zeros(2, np.float32))], model_version=version)
    assert caught.value.status() == f"StatusCode.{status}"
    assert caught.value.message().startswith(words)
    assert "passwd" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_where_memory_ends_a_client_is_told_to_come_again(
    client: Any, running: RunningGrpc, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(running.service, "infer", lambda request: bytearray(1 << 62))
    with pytest.raises(InferenceServerException, match=r"UNAVAILABLE\] the server is out of memory"):
        client.infer("echo", [tensor("x", np.zeros(2, np.float32))])


def test_a_full_queue_says_when_to_come_again(call: Callable[..., Any]):
    request = bare("full", raw_input_contents=[b"\0" * 8]).SerializeToString()
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    assert ("grpc-retry-pushback-ms", "2500") in [tuple(item) for item in caught.value.trailing_metadata()]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (bare(), "data (0 elements) does not fit the shape [2]"),
        (bare(raw_input_contents=[b"\0" * 7]), "FP32 of shape [2] has 8 bytes"),
        (bare(raw_input_contents=[b"\0" * 8] * 2), "2 entries for 1 inputs"),
        (bare(datatype="FP12", raw_input_contents=[b""]), "datatype 'FP12'; accepted: BOOL"),
        (bare(datatype="FP12"), "datatype 'FP12'; accepted: BOOL"),
        (bare(datatype="FP16"), "send it in raw_input_contents"),
        (bare(shape=(-1,), raw_input_contents=[b""]), "accepted: a list of whole numbers"),
        (bare(shape=(1 << 40,), raw_input_contents=[b""]), "elements"),
        (bare(datatype="BOOL", raw_input_contents=[b"\2\0"]), "neither 0 nor 1"),
        (bare(datatype="BYTES", raw_input_contents=[b"\xff" * 8]), "says 4294967295 bytes"),
        (bare(name="", raw_input_contents=[b"\0" * 8]), "1 to 256 characters"),
        (service_pb2.ModelInferRequest(model_name="echo"), "inputs is not a list of at least one tensor"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(call: Callable[..., Any], request_: Any, words: str):
    status, details = refusal(call, request_.SerializeToString())
    assert status == "INVALID_ARGUMENT"
    assert words in details


@pytest.mark.parametrize(
    "request_",
    [
        kind(**{field: text})
        for kind, fields in (
            (service_pb2.ModelInferRequest, ("model_name", "model_version")),
            (service_pb2.ModelReadyRequest, ("name", "version")),
            (service_pb2.ModelMetadataRequest, ("name", "version")),
            (service_pb2.ModelConfigRequest, ("name", "version")),
            (service_pb2.ModelStatisticsRequest, ("name", "version")),
            (service_pb2.RepositoryModelLoadRequest, ("model_name",)),
            (service_pb2.RepositoryModelUnloadRequest, ("model_name",)),
        )
        for field in fields
        for text in ("ä" * 129, "x" * 1_000_000)
    ],
    ids=lambda one: f"{one.DESCRIPTOR.name}-{one.ListFields()[0][0].name}-{len(one.ListFields()[0][1])}",
)
def test_names_and_versions_are_no_longer_than_over_http(call: Callable[..., Any], request_: Any):
    method = request_.DESCRIPTOR.name.removesuffix("Request")
    status, details = refusal(call, request_.SerializeToString(), method=method)
    ((field, text),) = request_.ListFields()
    assert status == "INVALID_ARGUMENT"
    assert details == f"the model's {field.name.removeprefix('model_')} has {len(text)} characters; accepted: 128"


def test_a_name_as_long_as_may_be_is_looked_for(call: Callable[..., Any]):
    request = bare("x" * 128, raw_input_contents=[b"\0" * 8], model_version="1" * 128).SerializeToString()
    assert refusal(call, request)[0] == "NOT_FOUND"


def test_contents_of_another_type_and_of_both_kinds_are_refused(call: Callable[..., Any]):
    request = bare(datatype="INT8")
    request.inputs[0].contents.int_contents.extend([1, 300])
    assert "beyond the range of INT8" in refusal(call, request.SerializeToString())[1]
    request.inputs[0].datatype = "FP32"
    assert "has int_contents; accepted for FP32: fp32_contents" in refusal(call, request.SerializeToString())[1]
    request.raw_input_contents.append(b"\0" * 8)
    assert "both contents and raw_input_contents" in refusal(call, request.SerializeToString())[1]
    shared = bare(raw_input_contents=[b"\0" * 8])
    shared.inputs[0].parameters["shared_memory_region"].string_param = "r"
    assert "shared memory is not supported" in refusal(call, shared.SerializeToString())[1]
    two = bare(raw_input_contents=[b"\0" * 8])
    two.inputs.add().CopyFrom(two.inputs[0])
    assert "1 entries for 2 inputs" in refusal(call, two.SerializeToString())[1]


def test_the_size_that_http_has_in_a_parameter_is_none_of_contents():
    request = bare()
    request.inputs[0].contents.fp32_contents.extend([1, 2])
    request.inputs[0].parameters["binary_data_size"].int64_param = 4
    assert GrpcDecoder(Limits()).decode(request.SerializeToString()).inputs["x"].tolist() == [1, 2]


def test_damaged_messages_are_refused_and_the_server_serves_on(call: Callable[..., Any]):
    request = bare(raw_input_contents=[b"\0" * 8], id="a").SerializeToString()
    generator = np.random.default_rng(3)
    statuses = set()
    for round_ in range(300):
        damaged = bytearray(request[: generator.integers(len(request))] if round_ % 2 else request)
        for _ in range(generator.integers(1, 4)):
            if damaged:
                damaged[generator.integers(len(damaged))] = generator.integers(256)
        try:
            call(bytes(damaged))
            statuses.add("OK")
        except grpc.RpcError as error:
            statuses.add(error.code().name)
    assert statuses <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"}
    assert "INVALID_ARGUMENT" in statuses
    assert refusal(call, b"\xff\xff", method="ModelMetadata")[0] == "INVALID_ARGUMENT"
    assert refusal(call, b"", method="TraceSetting")[0] == "UNIMPLEMENTED"
    assert call(request).raw_output_contents[0] == b"\0" * 8


def test_a_message_of_countless_fields_is_refused_before_it_is_read():
    decoder = GrpcDecoder(Limits(max_json_bytes=100_000))
    with pytest.raises(ServeError, match="more than 264 fields") as caught:
        decoder.decode(b"\x2a\x00" * 1_000_000)
    assert caught.value.grpc == "RESOURCE_EXHAUSTED"
    for fields, words in ((264, "inputs is not a list"), (265, "more than 264 fields")):
        with pytest.raises(ServeError, match=words):
            decoder.decode(b"\x12\x00" * fields)
    request = bare(shape=(1_000_000,))
    request.inputs[0].contents.fp32_contents.extend([0.0] * 1_000_000)
    with pytest.raises(ServeError, match="Send tensors as raw_input_contents"):
        decoder.decode(request.SerializeToString())


def test_large_messages_are_refused_also_when_they_are_compressed():
    with RunningGrpc(HttpSettings(grpc_port=0, max_body_bytes=1 << 20)) as running, running.client() as client:
        large = tensor("x", np.zeros(1 << 20, np.float32))
        for compression in (None, "gzip"):
            with pytest.raises(InferenceServerException, match=r"RESOURCE_EXHAUSTED.*larger than max"):
                client.infer("echo", [large], compression_algorithm=compression)
        assert not running.service.requests
        assert client.is_server_live()


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_a_call_that_grpc_ends_over_a_large_message_is_counted_and_told_to_who_watches(method: str):
    running, ended = RunningGrpc(HttpSettings(grpc_port=0, max_body_bytes=1 << 16)), list[Outcome]()
    counted = list[int]()

    class Watching:
        def ended(self, seen: Seen, outcome: Outcome) -> None:
            ended.append(outcome)

        def close(self) -> None: ...

    running.watch = Watching()
    path = f"inference.GRPCInferenceService/{method}"
    with running, grpc.insecure_channel(running.url) as channel:
        running.service.refused = lambda error: counted.append(error.status)  # type: ignore[method-assign]
        for compression in [grpc.Compression.NoCompression, grpc.Compression.Gzip] * 5:
            call = channel.stream_stream(f"/{path}")(iter([b"\0" * (1 << 17)]), compression=compression, timeout=10)
            with pytest.raises(grpc.RpcError, match="RESOURCE_EXHAUSTED"):
                next(call)
        wait_until(lambda: len(ended) == 10)
        small = bare(raw_input_contents=[b"\0" * 8]).SerializeToString()
        assert len(list(channel.stream_stream(f"/{path}")(iter([small]), timeout=10))) == 1
        wait_until(lambda: len(ended) == 11)
    assert [(one.method, one.status) for one in ended] == [*[(path, "CANCELLED")] * 10, (path, "OK")]
    assert counted == [499] * 10


def test_without_the_token_nothing_is_told():
    with RunningGrpc(HttpSettings(grpc_port=0, token="t", open_health=True)) as running, running.client() as client:
        stranger = "this server asks for a token"
        array = [tensor("x", np.zeros(2, np.float32))]
        for headers in (None, {"authorization": "Bearer u"}, {"authorization": "Basic t"}, {"authorization": ""}):
            for ask in (client.get_server_metadata, client.get_cuda_shared_memory_status):
                with pytest.raises(InferenceServerException, match=rf"\[StatusCode.UNAUTHENTICATED\] {stranger}"):
                    ask(headers=headers)
            for model in ("echo", "nope"):
                with pytest.raises(InferenceServerException, match=stranger):
                    client.infer(model, array, headers=headers)
        both = [("authorization", "Bearer t"), ("authorization", "Bearer u")]
        with grpc.insecure_channel(running.url) as channel:
            ask = channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
            with pytest.raises(grpc.RpcError, match=stranger):
                ask(b"", metadata=both, timeout=10)
        assert not running.service.requests
        assert client.is_server_live()
        token = {"authorization": "Bearer t"}
        assert client.infer("echo", array, headers=token).as_numpy("x").tolist() == [0, 0]
        with pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            client.get_cuda_shared_memory_status(headers=token)


@pytest.mark.parametrize("files", [("key.pem", "cert.pem"), ("cert.pem",)], ids=["two files", "one file"])
def test_tls_carries_everything_and_its_certificate_is_renewed(
    certificate: Path,  # noqa: F811
    tmp_path: Path,
    files: tuple[str, ...],
):
    def put(*contents: str) -> None:
        parts = [(certificate / name).read_bytes() for name in contents]
        for name, content in zip(files, parts if len(files) == 2 else [b"".join(parts)], strict=True):
            (tmp_path / name).write_bytes(content)

    put("key.pem", "cert.pem")
    key = tmp_path / "key.pem" if len(files) == 2 else None
    array = np.arange(200_000, dtype=np.float32)
    with RunningGrpc(HttpSettings(grpc_port=0, tls_cert=tmp_path / "cert.pem", tls_key=key)) as running:
        url = f"localhost:{running.grpc_server.port}"
        for roots in ("cert.pem", "renewed.pem"):
            with triton.InferenceServerClient(url, ssl=True, root_certificates=str(certificate / roots)) as client:
                assert np.array_equal(client.infer("echo", [tensor("x", array)]).as_numpy("x"), array)
            put("other.pem", "renewed.pem")
        with running.client() as plain, pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            plain.is_server_live(client_timeout=5)


def test_what_keeps_it_from_starting_is_named(certificate: Path):  # noqa: F811
    with RunningGrpc(HttpSettings(grpc_port=0)) as running:
        port = running.grpc_server.port
        with pytest.raises(StartError, match=f"{running.url} is in use; .*--grpc-port"):
            RunningGrpc(HttpSettings(grpc_port=port)).__enter__()
    with pytest.raises(StartError, match="cannot listen on 203"):
        RunningGrpc(HttpSettings(host="203.0.113.7", grpc_port=0)).__enter__()
    wrong = HttpSettings(grpc_port=0, tls_cert=certificate / "cert.pem", tls_key=certificate / "other.pem")
    with pytest.raises(StartError, match="no certificate with its own"):
        RunningGrpc(wrong).__enter__()
    for values in ({"grpc_port": 70000}, {"grpc_port": 8000, "port": 8000}):
        with pytest.raises(ValueError, match="grpc_port"):
            HttpSettings(**values)


def test_the_served_repository_answers_over_grpc_as_it_does_over_http(root: Path):  # noqa: F811
    server = Server(root, grpc_port=0)
    try:
        found = re.search(r"^ready: http://\S+ \(gRPC at (127\.0\.0\.1:\d+)\) serves 2 of 3 versions", server.line)
        assert found, server.line
        with triton.InferenceServerClient(found[1]) as client:
            result = client.infer("demo", [tensor("images", IMAGE)])
            assert result.get_response().model_version == "2"
            expected = logits(IMAGE, 2)
            np.testing.assert_allclose(result.as_numpy("logits"), expected, rtol=1e-6)
            images = triton_http.InferInput("images", list(IMAGE.shape), "UINT8").set_data_from_numpy(IMAGE)
            over_http = triton_http.InferenceServerClient(server.address).infer("demo", [images])
            assert np.array_equal(over_http.as_numpy("probabilities"), result.as_numpy("probabilities"))
            with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):
                client.infer("demo", [tensor("images", IMAGE.astype(np.float32))])
            config = client.get_model_config("demo").config
            assert (config.backend, config.max_batch_size > 0) == ("onnxruntime", True)
            assert [(one.name, one.optional) for one in config.input] == [("images", False), ("encoded_images", True)]
            assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
            (statistics,) = client.get_inference_statistics("demo", "2").model_stats
            assert statistics.inference_count >= 2
            assert statistics.inference_stats.success.count >= 2
            client.unload_model("other")
            assert not client.is_model_ready("other")
            index = {one.name: one.state for one in client.get_model_repository_index().models}
            assert index["other"] == "UNAVAILABLE"
            client.load_model("other")
            assert client.is_model_ready("other")
            with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT\] load takes no parameters"):
                client.load_model("other", config="{}")
            assert not client.is_model_ready("../demo")
        code, _ = server.stop()
        assert code == 0
    finally:
        server.process.kill()
        server.process.wait()


def test_what_does_not_end_is_cut_off():
    for drain, signals in (("0.3", 1), ("60", 2)):
        program = PROGRAM.replace("HttpSettings(", "HttpSettings(grpc_port=0, ").replace(
            "server.port", "server.grpc_port"
        )
        command = [sys.executable, "-c", program, "0", "1000", "0", drain]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline().split()[1])
            with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
                errors: list[Any] = []
                array = tensor("x", np.ones(2, np.float32))
                client.async_infer("slow", [array], callback=lambda result, error, to=errors: to.append(error))
                time.sleep(0.3)
                started = time.monotonic()
                for _ in range(signals):
                    process.terminate()
                    time.sleep(0.2)
                process.communicate(timeout=10)
                assert time.monotonic() - started < 5
                wait_until(lambda to=errors: to)
            assert errors[0] is not None
        assert process.returncode == 0


def test_calls_that_bring_no_message_do_not_keep_others_out():
    settings = HttpSettings(grpc_port=0, max_connections=8, body_timeout=0.5)
    service = "/inference.GRPCInferenceService"
    infer, stream, watch = f"{service}/ModelInfer", f"{service}/ModelStreamInfer", "/grpc.health.v1.Health/Watch"
    with RunningGrpc(settings) as running, grpc.insecure_channel(running.url) as channel, running.client() as client:
        never: threading.Event = threading.Event()

        def silent() -> Iterator[bytes]:
            never.wait()
            yield from ()

        try:
            for path, most in ((stream, 4), (watch, 1)):
                calls = [channel.stream_stream(path)(silent()) for _ in range(most + 1)]
                wait_until(lambda calls=calls: any(call.done() for call in calls), 30)
                (refused,) = (call for call in calls if call.done())  # the last to arrive, whichever that was
                assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert f"no more than {most} of these calls" in refused.details()
            calls = [channel.stream_unary(infer).future(silent()) for _ in range(3)]
            assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
            assert "took longer than 0.5 s" in calls[0].details()
            assert client.is_server_live()
        finally:
            never.set()
        with pytest.raises(grpc.RpcError) as caught:
            channel.stream_unary(infer)(iter(()))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_those_who_watch_take_no_place_from_streams():
    settings = HttpSettings(grpc_port=0, max_connections=16, token="t", open_health=True)
    with RunningGrpc(settings) as running, grpc.insecure_channel(running.url) as channel:
        watch, held = channel.unary_stream("/grpc.health.v1.Health/Watch"), []
        with contextlib.suppress(grpc.RpcError):
            while len(held) < 8:
                held.append(watch(b"", timeout=20))
                assert next(held[-1]) == b"\x08\x01"
        stream, token = (
            channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer"),
            (("authorization", "Bearer t"),),
        )
        body = bare(raw_input_contents=[b"\0" * 8]).SerializeToString()
        assert len(list(stream(iter([body]), metadata=token, timeout=20))) == 1
        for call in held:
            call.cancel()

        def watched() -> bool:
            with contextlib.suppress(grpc.RpcError):
                return next(watch(b"", timeout=20)) == b"\x08\x01"
            return False

        wait_until(watched)


def test_bytes_that_are_held_are_bounded():
    settings = HttpSettings(grpc_port=0, max_body_bytes=3_000_000, max_held_bytes=3_000_000)
    with RunningGrpc(settings) as running, running.client() as client:
        large = tensor("x", np.zeros(500_000, np.float32))
        results: list[Any] = []
        client.async_infer("slow", [large], callback=lambda result, error: results.append(error))
        wait_until(lambda: running.service.requests)
        with pytest.raises(InferenceServerException, match=r"UNAVAILABLE\] the server holds as many bytes"):
            client.infer("echo", [large])
        running.call(running.service.gate.set)
        wait_until(lambda: results)
        assert results == [None]
        assert client.infer("echo", [large]).as_numpy("x").size == 500_000


def test_readiness_is_the_services(running: RunningGrpc, client: Any):
    running.service.is_ready = False
    assert not client.is_server_ready()
    running.service.is_ready = True
    assert client.is_server_ready()


def test_at_a_signal_http_and_grpc_drain_and_the_process_ends_with_0():
    program = PROGRAM.replace("HttpSettings(", "HttpSettings(grpc_port=0, ").replace("server.port", "server.grpc_port")
    command = [sys.executable, "-c", program, "0", "1", "0", "30"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().split()[1])
        answers: list[Any] = []

        def ask() -> None:
            with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
                answers.append(client.infer("slow", [tensor("x", np.ones(2, np.float32))]).as_numpy("x").tolist())

        asking = [threading.Thread(target=ask) for _ in range(3)]
        for thread in asking:
            thread.start()
        time.sleep(0.4)
        process.terminate()
        for thread in asking:
            thread.join(10)
        out, _ = process.communicate(timeout=10)
    assert answers == [[1, 1]] * 3
    assert process.returncode == 0
    assert "stopped" in out


def test_calls_that_wait_to_be_taken_when_the_server_stops_are_answered():
    body = bare(shape=(1,), raw_input_contents=[np.float32(1).tobytes()]).SerializeToString()
    calls: list[Any] = []

    def stop_while_calls_come() -> None:  # on the loop, which takes none meanwhile
        calls.extend(infer.future(body, timeout=10) for _ in range(8))
        time.sleep(0.3)
        server.grpc_server.close()

    with RunningGrpc(HttpSettings(grpc_port=0)) as server, grpc.insecure_channel(server.url) as channel:
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        infer(body, timeout=10)
        server.call(stop_while_calls_come)
        for one in calls:
            assert service_pb2.ModelInferResponse.FromString(one.result()).raw_output_contents
        with pytest.raises(grpc.RpcError) as caught:
            infer(body, timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("asked", [True, False], ids=["grpc", "http alone"])
def test_without_its_libraries_grpc_is_refused_by_name_and_http_serves(tmp_path: Path, asked: bool):
    script = (
        "import sys; sys.modules['grpc'] = sys.modules['google'] = sys.modules['google.protobuf'] = None\n"
        "import os, signal, pathlib; from headstart.serving.server.command import serve\n"
        "stop = lambda line: (print(line), os.kill(os.getpid(), signal.SIGTERM))\n"
        f"serve(pathlib.Path({str(tmp_path)!r}), port=0, grpc_port={0 if asked else None}, threads=1, say=stop)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    if asked:
        assert done.returncode == 1
        assert "StartError: gRPC is asked for" in done.stderr
        assert "pip install grpcio protobuf" in done.stderr
    else:
        assert (done.returncode, "ready: http" in done.stdout) == (0, True), done.stderr


def test_an_option_that_cannot_be_is_refused_before_anything_loads(tmp_path: Path):
    with pytest.raises(Exception, match="grpc_port is 70000") as caught:
        serve(tmp_path, grpc_port=70000)
    assert getattr(caught.value, "exit_code", None) == 2


@pytest.mark.parametrize(
    ("peer", "client"),
    [("ipv4:203.0.113.7:4000", "203.0.113.7"), ("ipv6:%5B2001:db8::7%5D:4000", "2001:db8::7"), ("unix:", "")],
)
def test_the_address_of_a_client_is_read_from_what_grpc_calls_its_peer(peer: str, client: str):
    assert grpc_calls._client(SimpleNamespace(peer=lambda: peer)) == client
