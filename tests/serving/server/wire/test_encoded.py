"""JPEG and PNG files as an input, over HTTP and gRPC, answered as their pixels are; and files that are none."""

import asyncio
import base64
import io
import json
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from PIL import Image
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from headstart.serving.images import read_image
from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.service import Service
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport.grpc import GrpcServer, serve_grpc
from headstart.serving.server.transport.http import serve_http
from headstart.serving.server.wire import encoded
from headstart.serving.server.wire.encoded import ENCODED, ImageDecoder
from headstart.serving.server.wire.predict import prediction
from headstart.serving.server.wire.protocol import InferRequest, InferResponse, Limits, RequestedOutput
from tests.serving.server.graphs import logits, mlp, write_package
from tests.serving.server.models.test_repository import Graph, serving
from tests.serving.server.tiny_service import Running, wait_until

Infer = Callable[..., np.ndarray]


class RunningRepository(Running):
    """As `Running`, with a repository's service, and gRPC beside HTTP."""

    grpc_server: GrpcServer

    def __init__(self, root: Path) -> None:
        super().__init__(HttpSettings(port=0, grpc_port=0))
        self.root = root

    async def _serve(self) -> None:
        self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        service: Any = Service(Repository(self.root, threads=1))
        await service.start()
        self.service = service
        self.server = await serve_http(service, self.settings)
        self.grpc_server = await serve_grpc(service, self.settings)
        self._ready.set()
        await self._stop.wait()
        await self.server.drain(timeout=0)
        await self.grpc_server.drain(timeout=0)
        await service.stop()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRepository]:
    root = tmp_path_factory.mktemp("models")
    write_package(root / "demo" / "1", mark=1)
    with RunningRepository(root) as one:
        yield one


def picture(height: int = 8, width: int = 6, kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def encoded_grey(height: int, width: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height)).save(file, "PNG")
    return file.getvalue()


def bomb(side: int = 60_000) -> bytes:
    """A PNG of few bytes whose head says how many pixels are to come."""
    data = bytearray(picture())
    data[16:24] = side.to_bytes(4) * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
    return bytes(data)


def progressive(scans: int) -> bytes:
    """A JPEG whose last scan comes again and again: few bytes, and each is a pass over all pixels."""
    file = io.BytesIO()
    Image.new("L", (64, 64), 99).save(file, "JPEG", progressive=True)
    data, found = file.getvalue(), file.getvalue().count(b"\xff\xda")
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (scans - found) + data[-2:]


def strings(files: list[bytes], shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = np.empty(len(files), dtype=object)
    array[:] = files
    return array.reshape(shape or (len(files),))


@pytest.fixture(scope="module", params=["http", "http-json", "grpc", "grpc-contents"])
def infer(running: RunningRepository, request: pytest.FixtureRequest) -> Iterator[Infer]:
    """Send files by one of the four ways, and return the logits; a refusal is an InferenceServerException."""
    way = request.param
    triton: Any = triton_http if way.startswith("http") else triton_grpc
    url = running.url if triton is triton_http else f"127.0.0.1:{running.grpc_server.port}"
    with triton.InferenceServerClient(url) as client, grpc.insecure_channel(url) as channel:

        def binary(files: list[bytes], shape: tuple[int, ...] | None = None) -> np.ndarray:
            array = strings(files, shape)
            tensor = triton.InferInput(ENCODED, list(array.shape), "BYTES").set_data_from_numpy(array)
            return client.infer("demo", [tensor]).as_numpy("logits")

        def in_json(files: list[bytes], shape: tuple[int, ...] | None = None) -> np.ndarray:
            texts = [base64.b64encode(one).decode() for one in files]
            tensor = {"name": ENCODED, "datatype": "BYTES", "shape": list(shape or (len(files),)), "data": texts}
            with running.connect() as raw:
                body = json.dumps({"inputs": [tensor], "outputs": [{"name": "logits"}]}).encode()
                answer = raw.ask("POST", "/v2/models/demo/infer", body)
            if answer.status != 200:
                raise InferenceServerException(answer.error, str(answer.status))
            (output,) = answer.json()["outputs"]
            return np.array(output["data"], np.float32).reshape(output["shape"])

        def contents(files: list[bytes], shape: tuple[int, ...] | None = None) -> np.ndarray:
            message = service_pb2.ModelInferRequest(model_name="demo")
            tensor = message.inputs.add(name=ENCODED, datatype="BYTES", shape=shape or (len(files),))
            tensor.contents.bytes_contents.extend(files)
            call = channel.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                request_serializer=service_pb2.ModelInferRequest.SerializeToString,
                response_deserializer=service_pb2.ModelInferResponse.FromString,
            )
            try:
                return triton_grpc.InferResult(call(message)).as_numpy("logits")
            except grpc.RpcError as error:
                raise InferenceServerException(error.details(), str(error.code())) from None

        yield {"http-json": in_json, "grpc-contents": contents}.get(way, binary)


def pixels(data: bytes) -> np.ndarray:
    return read_image(data)[None]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize(
    ("size", "num"), [((8, 6), 1), ((8, 6), 3), ((400, 300), 3)], ids=["at-once", "small", "large"]
)
def test_files_are_answered_as_their_pixels_are(infer: Infer, kind: str, size: tuple[int, int], num: int):
    files = [picture(*size, kind, seed) for seed in range(num)]
    expected = np.concatenate([logits(pixels(one), 1) for one in files])
    np.testing.assert_allclose(infer(files), expected, rtol=1e-6)


def test_a_progressive_file_is_taken(infer: Infer):
    np.testing.assert_allclose(infer([progressive(32)]), logits(pixels(progressive(6)), 1), rtol=1e-6)


def test_files_of_several_sizes_come_back_in_the_order_they_were_sent(infer: Infer):
    files = [picture(4 + index % 3, 5, seed=index) for index in range(10)] + [picture(600, 40)]
    expected = np.concatenate([logits(pixels(one), 1) for one in files])
    np.testing.assert_allclose(infer(files), expected, rtol=1e-6)


WRONG: dict[str, tuple[list[bytes], str]] = {
    "a bomb": ([picture(), bomb()], "image 1 has more than [0-9]+ pixels"),
    "too many pixels": ([bomb(5001)], "the images have 25010001 pixels; accepted: 25000000"),
    "too many together": ([bomb(3600)] * 2, "the images have 25920000 pixels; accepted: 25000000"),
    "too many scans": ([progressive(33)], "image 0 has more than 32 scans"),
    "cut off": ([picture(), picture(), picture()[:-40]], "image 2 cannot be decoded; accepted: an undamaged JPEG"),
    "a JPEG cut off": ([picture(90, 90, "JPEG")[:900]], "image 0 cannot be decoded"),
    "another format": ([picture(kind="GIF")], "image 0 cannot be decoded"),
    "text": ([b"hello"], "image 0 cannot be decoded"),
    "nothing": ([b""], "image 0 cannot be decoded"),
    "too many": ([picture()] * 17, "the request has 17 images; accepted: 16; send several requests"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_image_or_too_much_is_refused_in_words(infer: Infer, case: str):
    files, words = WRONG[case]
    with pytest.raises(InferenceServerException, match=words) as caught:
        infer(files)
    status = caught.value.status()
    assert any(one in status for one in ("400", "413", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"))
    assert not any(one in caught.value.message() for one in ("/", "object at", "PIL"))
    assert infer([picture()]).shape == (1, 3)


def test_a_wrong_count_is_refused(infer: Infer):
    for files, shape, words in (
        ([picture()] * 2, (2, 1), r"BYTES \[2, 1\]; accepted: BYTES \[N\]"),
        ([], (0,), r"BYTES \[0\]; accepted: BYTES \[N\]"),
    ):
        with pytest.raises(InferenceServerException, match=words):
            infer(files, shape)


def test_shapes_that_lie_and_other_inputs_are_refused(running: RunningRepository):
    text = base64.b64encode(picture()).decode()
    files = {"name": ENCODED, "datatype": "BYTES", "shape": [1], "data": [text]}
    images = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
    for inputs, words in (
        ([{**files, "shape": [2]}], "2 elements"),
        ([{**files, "data": [text, text]}], "1 elements"),
        ([{**files, "data": [[text]]}], "list"),
        ([files, images], "has 'encoded_images' and 'images'; send one of them"),
        ([{**files, "datatype": "UINT8", "shape": [2], "data": [1, 2]}], r"is uint8 [2]; accepted: BYTES [N]"),
        ([{**files, "data": [text[:-1]]}], "base64"),
        ([{**files, "data": [f"data:image/png;base64,{text}"]}], "base64"),
        ([{**files, "data": [f"{text[:8]}!!!!{text[8:]}"]}], "base64"),
        ([{**files, "name": "encoded"}], "'images'"),
    ):
        with running.connect() as raw:
            answer = raw.ask("POST", "/v2/models/demo/infer", json.dumps({"inputs": inputs}).encode())
            assert answer.status == 400
            assert words in answer.error
    with running.connect() as raw:
        for name in ("nope", "demo/versions/7"):
            body = json.dumps({"inputs": [files]}).encode()
            assert raw.ask("POST", f"/v2/models/{name}/infer", body).status == 404


def test_a_bomb_takes_no_memory():
    async def ask() -> None:
        decoder = ImageDecoder(Limits())
        request = InferRequest(model="m", inputs={ENCODED: strings([bomb(5001)] * 4)})
        with pytest.raises(ServeError, match="pixels"):
            await decoder.infer(request, "images", 4, lambda parts: [])
        decoder.close()

    asyncio.run(ask())
    tracemalloc.start()
    try:
        asyncio.run(ask())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_client_that_goes_drops_every_part(tmp_path: Path):
    async def play() -> None:
        decoder, seen = ImageDecoder(Limits()), []

        def never(parts: tuple[InferRequest, ...]) -> list[Any]:
            seen.extend(parts)
            return [asyncio.get_running_loop().create_future() for _ in parts]

        files = strings([picture(4), picture(5), picture(300, 300)])
        request = InferRequest(model="m", inputs={ENCODED: files}, priority=7)
        task = asyncio.ensure_future(decoder.infer(request, "images", 4, never))
        while not seen:
            await asyncio.sleep(0.001)
        assert [one.inputs["images"].shape for one in seen] == [(1, 4, 6, 3), (1, 5, 6, 3), (1, 300, 300, 3)]
        assert [one.priority for one in seen] == [7] * 3
        assert not any(one.cancelled for one in seen)
        request.cancel()  # what HTTP does
        assert all(one.cancelled for one in seen)
        task.cancel()  # what gRPC does
        with pytest.raises(asyncio.CancelledError):
            await task
        gone = InferRequest(model="m", inputs={ENCODED: files}, cancelled=True)
        with pytest.raises(asyncio.CancelledError):
            await decoder.infer(gone, "images", 4, never)
        assert len(seen) == 3
        assert decoder._held == decoder._waiting == 0
        decoder.close()

    asyncio.run(play())


def test_a_client_that_goes_while_its_image_is_decoded_is_counted_as_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_package(tmp_path / "demo" / "1", mark=1)
    decode, begun, gate = encoded._decode, threading.Event(), threading.Event()

    def held_up(*given: Any) -> Any:
        begun.set()
        return decode(*given) if gate.wait(20) else None

    monkeypatch.setattr(encoded, "_decode", held_up)
    body = picture(300, 300)
    with RunningRepository(tmp_path) as running:
        with running.connect() as client:
            client.send(b"POST /v1/predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n")
            client.send(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert begun.wait(10)
        wait_until(lambda: running.service.clients == 0)
        gate.set()
        statistics = running.service.repository.find("demo", None).scheduler.statistics  # type: ignore[attr-defined]
        wait_until(lambda: statistics.fail or statistics.success)
        assert (statistics.errors, statistics.executions) == ({499: 1}, 0)


def test_memory_and_threads_are_bounded_over_all_requests(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoded, "_MOST_HELD", 3 * 3 * 300 * 300)
    monkeypatch.setattr(encoded, "_MOST_WAITING", 5)
    decode, gate = encoded._decode, threading.Event()
    monkeypatch.setattr(encoded, "_decode", lambda *given: decode(*given) if gate.wait(20) else None)

    async def play() -> list[int]:
        decoder, answered = ImageDecoder(Limits()), asyncio.get_running_loop().create_future()

        def wait(parts: tuple[InferRequest, ...]) -> list[Any]:
            return [asyncio.ensure_future(asyncio.shield(answered)) for _ in parts]

        async def one() -> int:
            request = InferRequest(model="m", inputs={ENCODED: strings([picture(300, 300)])})
            try:
                await decoder.infer(request, "images", 4, wait)
            except ServeError as error:
                return error.status
            return 200

        tasks = [asyncio.ensure_future(one()) for _ in range(8)]
        async with asyncio.timeout(20):
            while sum(task.done() for task in tasks) < 5:
                await asyncio.sleep(0.001)
            gate.set()  # not before: what waits for a thread has its place
        answered.set_result(InferResponse(model="m", version="1", outputs={}))
        statuses = await asyncio.gather(*tasks)
        assert await one() == 200  # all was given back
        assert decoder._held == 0
        decoder.close()
        return statuses

    assert sorted(asyncio.run(play())) == [200, 200, 200, 429, 429, 429, 503, 503]


def test_photos_of_a_dozen_clients_at_once_are_all_answered(monkeypatch: pytest.MonkeyPatch):
    """Two are decoded at a time; those that wait were counted as if they were, and each third was told 503."""
    monkeypatch.setattr(encoded, "_num_pixels", lambda data, index: 12_000_000)

    async def play() -> None:
        decoder = ImageDecoder(Limits())
        answer = InferResponse(model="m", version="1", outputs={})
        requests = [InferRequest(model="m", inputs={ENCODED: strings([picture(40, 30)])}) for _ in range(12)]
        await asyncio.gather(*(decoder.infer(one, "images", 4, lambda parts: [answer]) for one in requests))
        decoder.close()

    asyncio.run(play())


def with_chunks(kind: bytes, data: bytes, num: int, after: bool = False) -> bytes:
    """A small PNG with some chunks more, before its pixels or behind them."""
    whole = picture()
    place = whole.index(b"IEND" if after else b"IDAT") - 4
    chunk = len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)
    return whole[:place] + chunk * num + whole[place:]


def with_segments(marker: int, data: bytes, num: int) -> bytes:
    """A small JPEG with some segments more."""
    whole = picture(kind="JPEG")
    return whole[:2] + (bytes([255, marker]) + (len(data) + 2).to_bytes(2) + data) * num + whole[2:]


INFLATES = b"k\0\0" + zlib.compress(bytes(1000))
SHORT_WORK = {
    "a PNG": ([picture()], True),
    "a JPEG": ([picture(kind="JPEG")], True),
    "a progressive one": ([progressive(6)], True),
    "two": ([picture()] * 2, False),
    "many pixels": ([encoded_grey(257, 256)], False),
    "many bytes": ([picture(120, 120)], False),
    "text that inflates": ([with_chunks(b"zTXt", INFLATES, 1)], False),
    "text that inflates behind": ([with_chunks(b"zTXt", INFLATES, 1, after=True)], False),
    "many chunks": ([with_chunks(b"tIME", bytes(7), 30)], False),
    "some chunks": ([with_chunks(b"tIME", bytes(7), 9)], True),
    "EXIF": ([with_segments(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", 1)], False),
    "many segments": ([with_segments(0xE0, b"", 30)], False),
    "some segments": ([with_segments(0xE0, b"", 9)], True),
}
"""Files, and whether they are decoded on the event loop."""


@pytest.mark.parametrize("what", SHORT_WORK)
def test_only_what_is_short_work_holds_up_the_event_loop(what: str):
    files, at_once = SHORT_WORK[what]
    decoder, apart = ImageDecoder(Limits()), []

    async def play() -> None:
        response = InferResponse(model="m", version="1", outputs={})
        waited, decoder._apart = (
            decoder._apart,
            lambda function, *given: apart.append(function) or waited(function, *given),
        )
        await decoder.infer(
            InferRequest(model="m", inputs={ENCODED: strings(files)}), "images", 4, lambda parts: [response]
        )
        decoder.close()

    asyncio.run(play())
    assert (encoded._decode not in apart) == at_once
    assert (encoded._count not in apart) == (at_once or what == "many pixels")


def test_one_part_that_fails_drops_the_others_and_answers_without_rows_are_refused():
    files = strings([picture(4), picture(5), picture(4)])
    seen: list[InferRequest] = []

    def answered(*outputs: Any) -> Any:
        decoder = ImageDecoder(Limits())

        def run(parts: tuple[InferRequest, ...]) -> list[Any]:
            seen[:] = parts
            answers: list[Any] = []
            for number, output in enumerate(outputs):
                future = asyncio.get_running_loop().create_future()
                if isinstance(output, Exception):
                    future.set_exception(output)
                elif output is not None:
                    timings = {"queue": 5 + 4 * number, "compute": 9 - number}
                    found = {"y": np.float32(output)}
                    future.set_result(InferResponse(model="m", version="1", outputs=found, timings_ns=timings))
                answers.append(future)
            return answers

        request = InferRequest(model="m", inputs={ENCODED: files})
        try:
            return asyncio.run(asyncio.wait_for(decoder.infer(request, "images", 4, run), 20))
        finally:
            decoder.close()

    whole = answered([[1], [3]], [[2]])
    assert whole.outputs["y"].tolist() == [[1], [2], [3]]
    assert list(whole.timings_ns) == ["images", "queue", "compute"]
    assert whole.timings_ns["images"] > 0
    assert (whole.timings_ns["queue"], whole.timings_ns["compute"]) == (9, 8), "of the part that took longest"
    assert not any(part.cancelled for part in seen)
    with pytest.raises(ServeError, match="fails"):
        answered(None, ServeError(500, "it fails", grpc="INTERNAL"))
    assert [part.cancelled for part in seen] == [True, True]
    for strange in ([[2], [2]], [[2, 2]], 2):
        with pytest.raises(ServeError, match="'y' has no row of one size for each image") as caught:
            answered([[1], [3]], strange)
        assert caught.value.status == 400


def test_labels_that_are_not_the_columns_name_none():
    response = InferResponse(model="m", version="1", outputs={"probabilities": np.float32([[0.25, 0.75]])})
    assert prediction(response)["probabilities"] == {"0": 0.25, "1": 0.75}
    found = {1: {"0": 0.25, "1": 0.75}, 2: {"cat": 0.25, "dog": 0.75}}
    for count, probabilities in found.items():
        response.labels = ["cat", "dog"][:count]
        assert prediction(response)["probabilities"] == probabilities


def test_a_model_that_takes_no_images_knows_no_files(tmp_path: Path):
    (tmp_path / "demo" / "1").mkdir(parents=True)
    loader = Graph()
    loader.graph = mlp()

    async def play() -> None:
        async with serving(tmp_path, loader=loader) as service:
            assert [one["name"] for one in service.model_metadata("demo", None)["inputs"]] == ["x"]
            request = InferRequest(model="demo", inputs={ENCODED: strings([picture()])})
            with pytest.raises(ServeError, match="lacks the input 'x'"):
                service.infer(request)

    asyncio.run(play())


def test_one_version_answers_all_sizes_and_only_what_was_asked_for(tmp_path: Path):
    write_package(tmp_path / "demo" / "1", mark=1)
    write_package(tmp_path / "demo" / "2", mark=2)
    (tmp_path / "demo" / "policy").write_text("canary:2:50%")
    files = [picture(4 + index) for index in range(6)]
    wanted = (RequestedOutput(name="logits", binary=True),)

    async def play() -> set[str]:
        seen = set()
        async with serving(tmp_path) as service:
            for _ in range(8):
                request = InferRequest(model="demo", id="i", inputs={ENCODED: strings(files)}, outputs=wanted)
                response = await service.infer(request)  # type: ignore[misc]
                expected = np.concatenate([logits(pixels(one), float(response.version)) for one in files])
                np.testing.assert_allclose(response.outputs["logits"], expected, rtol=1e-6)
                assert (response.id, list(response.outputs)) == ("i", ["logits"])
                seen.add(response.version)
        return seen

    assert asyncio.run(play()) == {"1", "2"}
