"""What `fuzz` feeds: each function makes a target, which takes bytes and raises nothing, and inputs to begin with."""

import asyncio
import contextlib
import gzip
import io
import json
import re
import socket
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from PIL import Image

from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.service import Service
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport.connection import Connection
from headstart.serving.server.transport.http import HttpServer
from headstart.serving.server.wire import documents
from headstart.serving.server.wire.bodies import ChunkedBody, inflate, only_file
from headstart.serving.server.wire.decoding import RequestDecoder
from headstart.serving.server.wire.encoded import ENCODED, ImageDecoder
from headstart.serving.server.wire.grpc_codec import GrpcDecoder, encode, parse
from headstart.serving.server.wire.grpc_messages import MESSAGES
from headstart.serving.server.wire.head import HeadParser
from headstart.serving.server.wire.protocol import InferRequest, InferResponse, Limits, encode_response, error_body
from tests.serving.fuzz import MOST_BYTES
from tests.serving.server.graphs import write_package
from tests.serving.server.tiny_service import infer_body

Made = tuple[Callable[[bytes], None], list[bytes]]
LIMIT = 1 << 16
"""Bytes and pixels that are accepted, so that the claims of an input are beyond all of it."""
LIMITS = Limits(max_tensors=8, max_elements=LIMIT, max_strings=LIMIT, max_image_bytes=LIMIT, max_pixels=LIMIT)


def body() -> Made:
    """Bodies of inference requests: two bytes of JSON's length (65535 is none), then the body."""
    decoder = RequestDecoder(LIMITS)

    def read(data: bytes, short: int) -> tuple[InferRequest, bool] | ServeError:
        documents.SHORT = short
        length = int.from_bytes(data[:2])
        try:
            return decoder.decode(memoryview(data)[2:], None if length == 65535 else length, model="m", version=None)
        except ServeError as error:
            return error

    def target(data: bytes) -> None:
        found, as_long = read(data, MOST_BYTES), read(data, 0)
        if isinstance(found, ServeError) or isinstance(as_long, ServeError):
            assert str(found) == str(as_long)
            json.loads(error_body(found))
            return
        (request, binary), (again, _) = found, as_long
        assert list(again.inputs) == list(request.inputs)
        _check_inputs(request, len(data))
        try:
            parts, size = encode_response(_answer(request), request.outputs, binary)
        except ServeError:
            return
        json.loads(b"".join(parts)[:size])

    seeds = [b"\xff\xff" + _as_json(one) for one in _DOCUMENTS]
    for arrays in ([np.arange(4, dtype=np.float32)], [np.ones((2, 2), np.bool_), np.zeros(3, np.int64)]):
        text, length = infer_body(*arrays, parameters={"binary_data_output": True})
        seeds.append(length.to_bytes(2) + text)
    strings = b"\1\0\0\0a\0\0\0\0"
    tensor = {"name": "x", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": len(strings)}}
    text = _as_json({"inputs": [tensor]})
    return target, [*seeds, len(text).to_bytes(2) + text + strings]


def grpc() -> Made:
    """Messages of gRPC: requests for inference, and what else the server reads."""
    decoder = GrpcDecoder(LIMITS)

    def target(data: bytes) -> None:
        for name in ("ModelStatisticsRequest", "RepositoryModelLoadRequest"):
            with contextlib.suppress(ServeError):
                parse(name, data)
        try:
            request = decoder.decode(data)
            again = decoder.decode(data)
        except ServeError as error:
            error.message.encode()
            return
        assert list(again.inputs) == list(request.inputs)
        _check_inputs(request, len(data))
        with contextlib.suppress(ServeError):
            MESSAGES["ModelInferResponse"].FromString(encode(_answer(request), request.outputs, lambda index: None))

    message = MESSAGES["ModelInferRequest"]
    seeds = []
    for datatype, field, values in (
        ("FP32", "fp32_contents", [1.5, float("nan")]),
        ("BYTES", "bytes_contents", [b"a", b""]),
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-1, 127]),
        ("UINT64", "uint64_contents", [0, 1 << 63]),
    ):
        one = message(model_name="m", model_version="1", id="i")
        getattr(one.inputs.add(name="x", datatype=datatype, shape=[2]).contents, field).extend(values)
        one.outputs.add(name="x").parameters["classification"].int64_param = 1
        one.parameters["priority"].int64_param = 3
        seeds.append(one.SerializeToString())
    raw = message(model_name="m", raw_input_contents=[struct.pack("<2f", 1, 2)])
    raw.inputs.add(name="x", datatype="FP32", shape=[2])
    return target, [*seeds, raw.SerializeToString()]


def head() -> Made:
    """Heads of HTTP requests."""
    parser = HeadParser(max_headers=16)

    def target(data: bytes) -> None:
        try:
            found = parser.parse(data.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")
        except ServeError as error:
            json.loads(error_body(error))
            return
        assert found.length >= 0
        assert len(found.headers) <= 16

    lines = b"Host: x\r\nContent-Length: 12\r\nInference-Header-Content-Length: 7\r\nHeadstart-Priority: -3\r\n"
    return target, [
        b"POST /v2/models/a/infer?x=%2e HTTP/1.1\r\n" + lines + b"Headstart-Timeout-Ms: 10",
        b"GET http://x/v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue",
        b"OPTIONS * HTTP/1.0\r\nConnection: keep-alive, upgrade\r\nUpgrade: h2c",
    ]


def chunks() -> Made:
    """Chunked bodies: one byte says in pieces of which size they come."""

    def target(data: bytes) -> None:
        chunked, rest = ChunkedBody(LIMIT, padding=5), memoryview(data)[1:]
        step = data[0] + 1 if data else 1
        try:
            while rest and not chunked.done:
                used = chunked.feed(rest[:step])
                assert 0 < used <= step
                rest = rest[used:]
        except ServeError:
            return
        assert len(chunked) <= len(data)

    whole = b"5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n"
    return target, [bytes([step]) + whole for step in (0, 2, 255)]


def inflated() -> Made:
    """Compressed bodies: the first byte says how."""

    def target(data: bytes) -> None:
        try:
            found = inflate(memoryview(data)[1:], ("gzip", "deflate")[data[0] & 1 if data else 0], LIMIT)
        except ServeError:
            return
        assert len(found) <= LIMIT

    return target, [b"\0" + gzip.compress(b"hello" * 9), b"\1" + zlib.compress(bytes(LIMIT + 1))]


def form() -> Made:
    """Forms: a line with the Content-Type, then the body."""

    def target(data: bytes) -> None:
        kind, _, rest = data.partition(b"\n")
        try:
            found = only_file(kind.decode("latin-1"), memoryview(rest))
        except ServeError:
            return
        assert found in rest

    head = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return target, [b'multipart/form-data; boundary="B"\n--B\r\n' + head + b"data\r\n--B--\r\n"]


def image() -> Made:
    """Files of the input `encoded_images`, between blank lines."""
    loop, decoder = asyncio.new_event_loop(), ImageDecoder(LIMITS)
    separator = b"\n\n\n\n"

    def run(parts: tuple[InferRequest, ...]) -> list[Any]:
        assert sum(part.inputs["images"][..., 0].size for part in parts) <= LIMIT
        return [_answer(part) for part in parts]

    def target(data: bytes) -> None:
        files = data.split(separator)
        array = np.empty(len(files), dtype=object)
        array[:] = files
        request = InferRequest(model="m", inputs={ENCODED: array})
        try:
            loop.run_until_complete(decoder.infer(request, "images", 8, run))
        except ServeError:
            return

    seeds = []
    for kind, mode in (("PNG", "RGB"), ("PNG", "P"), ("PNG", "I;16"), ("PNG", "LA"), ("JPEG", "RGB"), ("JPEG", "CMYK")):
        file = io.BytesIO()
        Image.new(mode, (6, 5)).save(file, kind)
        seeds.append(file.getvalue())
    return target, [*seeds, separator.join(seeds[:2])]


class _Steady(Service):
    """A service whose model no request can take away."""

    async def load(self, name: str, parameters: dict[str, Any]) -> None: ...

    async def unload(self, name: str) -> None: ...


def http() -> Made:
    """All that comes in on a connection, answered by a real server with a real model."""
    folder = Path(tempfile.mkdtemp())
    write_package(folder / "demo" / "1", mark=1)
    loop = uvloop.new_event_loop()

    async def start() -> HttpServer:
        service = _Steady(Repository(folder, threads=1, poll_s=1e6), LIMITS)
        await service.start()
        server = HttpServer(service, HttpSettings(port=0, max_body_bytes=LIMIT, limits=LIMITS))
        await server.listen()
        return server

    server = loop.run_until_complete(start())

    async def exchange(data: bytes) -> bytes:
        ours, theirs = socket.socketpair()
        with ours:
            ours.setblocking(False)
            await loop.connect_accepted_socket(lambda: Connection(server), theirs)
            answer = b""
            try:
                await loop.sock_sendall(ours, data)
                ours.shutdown(socket.SHUT_WR)
                while piece := await loop.sock_recv(ours, 1 << 16):
                    answer += piece
            except OSError:  # it was cut off
                pass
            return answer

    def target(data: bytes) -> None:
        answer = loop.run_until_complete(exchange(data))
        assert b"HTTP/1.1 500" not in answer, answer
        assert not answer or re.match(rb"HTTP/1\.1 \d{3} ", answer), answer

    text, length = infer_body(np.zeros((1, 2, 2, 3), np.uint8), names=("images",))
    infer = b"POST /v2/models/demo/infer HTTP/1.1\r\nHost: x\r\n"
    sized = infer + b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % (length, len(text)) + text
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
    plain = _as_json({"inputs": [tensor], "outputs": [{"name": "logits", "parameters": {"classification": 2}}]})
    sent = b"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n" + b'{"ready": true}'
    seeds = [sized, infer + b"Content-Length: %d\r\n\r\n" % len(plain) + plain, sent]
    seeds.append(infer + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(plain) + plain + b"\r\n0\r\n\r\n")
    picture = image()[1][0]
    kind = b"Content-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(picture)
    seeds.append(b"POST /v1/predict?model=demo HTTP/1.1\r\nHost: x\r\n" + kind + picture)
    paths = ("", "openapi.json", "metrics", "v1/card", "v2", "v2/models/demo/config", "v2/models/demo/versions/1/stats")
    asked = [f"{verb} /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for verb in ("GET", "HEAD") for path in paths]
    return target, [*seeds, *asked, b"".join(asked[-2:])]


def _as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


_DOCUMENTS: list[Any] = [
    {"inputs": [{"name": "x", "datatype": datatype, "shape": [1, 2], "data": data}], **beside}
    for datatype, data, beside in (
        ("FP32", [1.5, -1e30], {"id": "i", "parameters": {"priority": 1, "timeout": 5, "own": "word"}}),
        ("FP64", [[float("nan"), 1]], {"outputs": [{"name": "x", "parameters": {"binary_data": True}}]}),
        ("INT8", [[-128, 127]], {"outputs": [{"name": "x", "parameters": {"classification": 1}}]}),
        ("BOOL", [True, False], {"parameters": {"binary_data_output": False}}),
        ("BYTES", ["a", "\ud800"], {}),
        ("FP16", [[[]]], {}),
    )
]


def _answer(request: InferRequest) -> InferResponse:
    return InferResponse(model="m", version="1", id=request.id, outputs=dict(request.inputs))


def _check_inputs(request: InferRequest, size: int) -> None:
    """What was made of a request is no larger than what it sent."""
    for array in request.inputs.values():
        assert array.size <= max(size, 1), (array.dtype, array.shape)
        array.tobytes()
