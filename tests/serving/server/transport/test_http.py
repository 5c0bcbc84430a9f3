"""The HTTP server with NVIDIA's own client, and over raw sockets where a client would not go."""

import gzip
import io
import json
import re
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport import routes
from headstart.serving.server.transport.paths import ROUTES
from headstart.serving.server.watching.watch import Outcome, Seen
from tests.serving.server.tiny_service import Running, infer_body, wait_until

DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"]
DTYPES += ["float16", "float32", "float64"]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with Running(HttpSettings(port=0)) as server:
        yield server


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(running.url) as one:
        yield one


def tensor(name: str, array: np.ndarray, *, binary: bool = True) -> Any:
    kind = triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype))
    kind.set_data_from_numpy(array, binary_data=binary)
    return kind


def picture(shade: int, width: int = 40, height: int = 30, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), shade, np.uint8)).save(file, kind)
    return file.getvalue()


def test_triton_reads_health_metadata_config_and_statistics(client: Any):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert client.is_model_ready("echo", "1")
    assert not client.is_model_ready("echo", "9")
    assert not client.is_model_ready("full")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("photo", "1")["inputs"][0]["shape"] == [-1, -1, -1, 3]
    assert client.get_model_config("echo")["max_batch_size"] == 8
    assert client.get_inference_statistics("echo", "1")["model_stats"][0]["version"] == "1"
    assert client.get_inference_statistics()["model_stats"]
    assert [row["name"] for row in client.get_model_repository_index()] == ["echo", "photo"]


def test_triton_loads_and_unloads(client: Any, running: Running):
    client.load_model("echo", config='{"max_batch_size": 4}')
    client.unload_model("echo")
    assert running.service.calls[-2:] == [("load", "echo", {"config": '{"max_batch_size": 4}'}), ("unload", "echo")]
    with pytest.raises(InferenceServerException, match="no model 'nope'"):
        client.load_model("nope")
    with pytest.raises(InferenceServerException, match="still busy"):
        client.unload_model("broken")


@pytest.mark.parametrize("answer_binary", [True, False], ids=["bytes-out", "json-out"])
@pytest.mark.parametrize("binary", [True, False], ids=["bytes-in", "json-in"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_infers_with_every_datatype(client: Any, dtype: str, binary: bool, answer_binary: bool):
    array = np.random.default_rng(1).integers(0, 2, (3, 4)).astype(dtype)
    wanted = [triton.InferRequestedOutput("x", binary_data=answer_binary)]
    found = client.infer("echo", [tensor("x", array, binary=binary)], outputs=wanted).as_numpy("x")
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def test_the_only_client_is_told_from_one_of_several():
    with Running(HttpSettings(port=0)) as running, triton.InferenceServerClient(running.url) as client:
        x = [tensor("x", np.zeros((1, 2), np.float32))]
        client.infer("echo", x)
        with running.connect():
            wait_until(lambda: len(running.server._connections) == 2)
            client.infer("echo", x)
        wait_until(lambda: len(running.server._connections) == 1)
        client.infer("echo", x)
        assert [request.alone for request in running.service.requests] == [True, False, True]


@pytest.mark.parametrize("binary", [True, False])
def test_triton_infers_with_strings(client: Any, binary: bool):
    array = np.array([[b"", "grün".encode()], [b"a" * 300, b"0"]], dtype=object)
    found = client.infer("echo", [tensor("x", array, binary=binary)]).as_numpy("x")
    assert found.tolist() == array.tolist()


def test_triton_infers_with_bfloat16(client: Any):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = np.array([[1.5, -2.25]], dtype=ml_dtypes.bfloat16)
    assert client.infer("echo", [tensor("x", array)]).as_numpy("x").tolist() == array.tolist()


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_compresses(client: Any, algorithm: str):
    array = np.arange(50_000, dtype=np.float32)
    found = client.infer(
        "echo",
        [tensor("x", array)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert np.array_equal(found.as_numpy("x"), array)


def test_triton_chooses_outputs_versions_ids_and_classes(client: Any, running: Running):
    x, y = np.arange(3, dtype=np.float32)[None], np.arange(4, dtype=np.int64)
    wanted = [triton.InferRequestedOutput("y"), triton.InferRequestedOutput("x", class_count=2)]
    found = client.infer(
        "echo",
        [tensor("x", x), tensor("y", y)],
        outputs=wanted,
        model_version="1",
        request_id="r-7",
        priority=1,
        timeout=5_000_000,
        parameters={"own": "word"},
    )
    assert found.get_response()["id"] == "r-7"
    assert [output["name"] for output in found.get_response()["outputs"]] == ["y", "x"]
    assert found.as_numpy("x").tolist() == [[b"2.000000:2:light", b"1.000000:1:grey"]]
    request = running.service.requests[-1]
    assert (request.version, request.priority, request.parameters) == ("1", 100, {"own": "word"})
    assert request.deadline is not None


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [("nope", "404", "no model 'nope'"), ("full", "429", "the queue is full"), ("broken", "500", "its log says why")],
)
def test_triton_is_told_what_is_wrong(client: Any, model: str, status: str, words: str):
    with pytest.raises(InferenceServerException, match=words) as caught:
        client.infer(model, [tensor("x", np.zeros(1, np.float32))])
    assert caught.value.status() == status
    assert "secret" not in str(caught.value)
    assert "/" not in str(caught.value.message())


def test_concurrent_triton_requests_get_their_own_answers(running: Running):
    with triton.InferenceServerClient(running.url, concurrency=8) as client:
        pending = [client.async_infer("echo", [tensor("x", np.full(3000, n, np.float32))]) for n in range(64)]
        for n, one in enumerate(pending):
            assert set(one.get_result().as_numpy("x")) == {n}


def test_a_full_queue_says_when_to_come_again(running: Running):
    body, length = infer_body(np.zeros(1, np.float32))
    with running.connect() as raw:
        answer = raw.ask("POST", "/v2/models/full/infer", body, Inference_Header_Content_Length=length)
        assert (answer.status, answer.headers["retry-after"]) == (429, "3")
        assert raw.ask("GET", "/v2").status == 200


@pytest.mark.parametrize("size", [700, 70_000], ids=["with-the-head", "received-in-place"])
def test_the_model_gets_the_first_tensor_aligned_and_not_copied(running: Running, size: int):
    for n in range(16):
        body, length = infer_body(np.zeros(size, np.float64), parameters={"own": "a" * n})
        with running.connect() as raw:
            assert raw.ask("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length).status == 200
        array = running.service.requests[-1].inputs["x"]
        assert array.ctypes.data % 16 == 0
        assert array.base is not None


def test_headers_set_priority_and_deadline(running: Running):
    body, length = infer_body(np.zeros(1, np.float32))
    headers = {"Inference_Header_Content_Length": length, "Headstart_Priority": -5, "Headstart_Timeout_Ms": 1500}
    with running.connect() as raw:
        assert raw.ask("POST", "/v2/models/echo/infer", body, **headers).status == 200
        assert running.service.requests[-1].priority == -5
        assert running.service.requests[-1].deadline is not None
        for wrong in ({"Headstart_Priority": "high"}, {"Headstart_Timeout_Ms": 0}):
            with running.connect() as other:
                assert other.ask("POST", "/v2/models/echo/infer", body, **wrong).status == 400


def test_pipelined_requests_are_answered_in_order(running: Running):
    requests = b""
    for n in range(20):
        body, length = infer_body(np.full(n * 700, n, np.float32))
        name = "echo" if n % 3 else "photo"  # which refuses it
        requests += (
            f"POST /v2/models/{name}/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            f"Inference-Header-Content-Length: {length}\r\n\r\n"
        ).encode() + body
    with running.connect() as raw:
        running.call(running.service.gate.set)
        raw.send(requests.replace(b"/echo/", b"/slow/"))
        for n in range(20):
            answer = raw.read()
            if n % 3 == 0:
                assert answer.status == 500
            else:
                assert answer.json()["outputs"][0]["data"] == [n] * n * 700


def test_a_client_that_goes_cancels_its_request(running: Running, monkeypatch: pytest.MonkeyPatch):
    class Watching:
        def ended(self, seen: Seen, outcome: Outcome) -> None:
            told.append(outcome)

        def close(self) -> None: ...

    told: list[Outcome] = []
    monkeypatch.setattr(running.server, "watch", Watching())
    running.call(running.service.gate.clear)
    body, length = infer_body(np.zeros(1, np.float32))
    before = len(running.service.requests)
    with running.connect() as raw:
        raw.send(
            f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            f"Inference-Header-Content-Length: {length}\r\n\r\n".encode()
            + body
        )
        wait_until(lambda: len(running.service.requests) > before)
        assert not running.service.requests[-1].cancelled
    wait_until(lambda: running.service.requests[-1].cancelled)
    running.call(running.service.gate.set)
    wait_until(lambda: told)
    assert [(one.path, one.status, one.num_bytes) for one in told] == [("/v2/models/slow/infer", 499, 0)]


def test_whoever_is_answered_while_the_server_stops_is_told_to_ask_no_more():
    with Running(HttpSettings(port=0)) as running, running.connect() as raw:
        running.call(running.service.gate.clear)
        body, length = infer_body(np.zeros(1, np.float32))
        head = f"POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {length}\r\n"
        raw.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: running.service.requests)
        running.call(running.server.close)
        running.call(running.service.gate.set)
        answer = raw.read()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert raw.closed()


def test_chunked_bodies_and_100_continue(running: Running):
    body, length = infer_body(np.arange(9000, dtype=np.float32), parameters={"binary_data_output": True})
    head = f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {length}\r\n"
    with running.connect() as raw:
        for _ in range(2):
            raw.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for start in range(0, len(body), 1000):
                piece = body[start : start + 1000]
                raw.send(b"%X;ext=1\r\n%s\r\n" % (len(piece), piece))
            raw.send(b"0\r\nTrailer: 1\r\n\r\n")
            assert raw.read().body.endswith(body[length:])
        expecting = f"{head}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode()
        raw.send(expecting)
        assert raw.read().status == 100
        raw.send(body)
        assert raw.read().body.endswith(body[length:])
        raw.send(expecting.replace(b"HTTP/1.1", b"HTTP/1.0"))  # which has no such answer
        time.sleep(0.05)
        raw.send(body)
        assert raw.read().status == 200


def test_as_many_headers_as_are_allowed_are_read_and_one_more_is_not(running: Running):
    for more, status in ((0, 200), (1, 431)):
        with running.connect() as raw:
            headers = {f"X_{number}": number for number in range(63 + more)}
            assert raw.ask("GET", "/v2", **headers).status == status


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress], ids=["gzip", "deflate"])
def test_compressed_bodies_are_whole_or_refused(running: Running, pack: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routes, "_MOST_DECODING", 1)  # at once, that is: here they come one by one
    body, length = infer_body(np.arange(100, dtype=np.float32))
    encoding = "gzip" if pack is gzip.compress else "deflate"
    headers = {"Content_Encoding": encoding, "Inference_Header_Content_Length": length}
    packed = pack(body)
    for sent, status, words in [
        (packed, 200, ""),
        (packed[:-5], 400, "cut off"),
        (packed + b"more", 400, "followed by more"),
        (body, 400, f"not {encoding}"),
        (pack(b"\0" * (65 << 20)), 413, "inflates to more than"),
    ]:
        with running.connect() as raw:
            answer = raw.ask("POST", "/v2/models/echo/infer", sent, **headers)
            assert answer.status == status
            assert words in answer.body.decode()
    with running.connect() as raw:
        assert raw.ask("POST", "/v2/models/echo/infer", body, Content_Encoding="br").status == 415


def test_an_image_is_classified_raw_and_as_a_form(running: Running):
    for kind in ("PNG", "JPEG"):
        for size in (40, 900):  # decoded at once, and in a thread
            with running.connect() as raw:
                image = picture(250, size, size, kind)
                answer = raw.ask("POST", "/v1/predict", image, Content_Type=f"image/{kind.lower()}")
            document = answer.json()
            assert answer.status == 200
            assert document["label"] == "light"
            assert document["probability"] == document["probabilities"]["light"] > 0.9
            assert sum(document["probabilities"].values()) == pytest.approx(1)
            timing = re.fullmatch(
                r"images;dur=(\d+\.\d{3}), queue;dur=0\.000, compute;dur=0\.001", answer.headers["server-timing"]
            )
            assert timing
            assert float(timing[1]) > 0
    form = (
        b'--B\r\nContent-Disposition: form-data; name="image"; filename="../../a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + picture(5) + b"\r\n--B--\r\n"
    )
    kind = 'multipart/form-data; boundary="B"'
    with running.connect() as raw:
        assert raw.ask("POST", "/v1/predict?model=photo", form, Content_Type=kind).json()["label"] == "dark"
        twice = form.replace(b"--B--", form.partition(b"\r\n--B--")[0] + b"\r\n--B--")
        for wrong in (twice, form[:-8], b"--B--\r\n", b""):
            assert raw.ask("POST", "/v1/predict", wrong, Content_Type=kind).status == 400
        assert raw.ask("POST", "/v1/predict", form, Content_Type="multipart/form-data").status == 400


def test_what_is_no_image_or_too_large_a_one_is_refused(running: Running):
    png = bytearray(picture(1))
    png[16:24] = (60_000).to_bytes(4) * 2  # a bomb: the header says 3.6 gigapixels
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4)
    large = picture(1, 5100, 5000)
    gif = io.BytesIO()
    Image.new("RGB", (4, 4)).save(gif, "GIF")
    for body, status in [
        (bytes(png), 413),
        (large, 413),
        (b"\x89PNG\r\n\x1a\n", 400),
        (picture(1)[:60], 400),
        (gif.getvalue(), 400),
        (b"", 400),
    ]:
        with running.connect() as raw:
            answer = raw.ask("POST", "/v1/predict", body, Content_Type="image/png")
            assert answer.status == status, answer.body
            assert "object at" not in answer.error
            assert "/" not in answer.error
    with running.connect() as raw:
        assert raw.ask("POST", "/v1/predict", picture(1), Content_Type="text/plain").status == 415
        assert "does not classify" in raw.ask("POST", "/v1/predict?model=echo", b"1", Content_Type="image/png").error
        assert raw.ask("POST", "/v1/predict?model=a&model=b", b"1", Content_Type="image/png").status == 400
        assert raw.ask("POST", "/v1/predict?model=../x", b"1", Content_Type="image/png").status == 400


def test_the_document_describes_exactly_what_is_served(running: Running):
    with running.connect() as raw:
        document = raw.ask("GET", "/openapi.json").json()
        described = {
            (verb.upper(), path) for path, item in document["paths"].items() for verb in item if verb != "parameters"
        }
        assert described == {(verb, path) for verb, path, _ in ROUTES}
        names = [item[verb.lower()]["operationId"] for verb, path, _ in ROUTES for item in [document["paths"][path]]]
        assert len(set(names)) == len(names)
        text = json.dumps(document)
        for reference in {part.split('"')[0] for part in text.split('"#/')[1:]}:
            found = document
            for word in reference.split("/"):
                found = found[word]
        for verb, path, _ in ROUTES:  # each is there, whatever it answers
            answer = raw.ask(verb, path.replace("{name}", "echo").replace("{version}", "1"), b"{}")
            assert answer.status in (200, 400, 415), (verb, path)


def test_answers_are_what_the_document_says(running: Running):
    jsonschema = pytest.importorskip("jsonschema")
    body, length = infer_body(np.arange(3, dtype=np.float32), id="i")
    sent = {"infer": body, "predict": picture(250), "index": b'{"ready": true}'}
    with running.connect() as raw:
        document = raw.ask("GET", "/openapi.json").json()
        checked = 0
        for verb, path, _ in ROUTES:
            for name in ("photo" if path.startswith("/v1") else "echo", "nope"):
                data = sent.get(path.rpartition("/")[2], b"")
                url = path.replace("{name}", name).replace("{version}", "1") + ("?model=" + name) * ("v1" in path)
                answer = raw.ask(
                    verb, url, data, Content_Type="image/png", Inference_Header_Content_Length=length * (data == body)
                )
                responses = document["paths"][path][verb.lower()]["responses"]
                response = responses.get(str(answer.status), responses["default"])
                if "$ref" in response:
                    response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
                content = response.get("content", {}).get(answer.headers.get("content-type"))
                if content is None:
                    assert not answer.body or path in ("/", "/metrics")
                    continue
                schema = {**content["schema"], "components": document["components"]}
                jsonschema.Draft202012Validator(schema).validate(answer.json())
                checked += 1
        assert checked > 30


def test_page_metrics_and_head(running: Running):
    with running.connect() as raw:
        page = raw.ask("GET", "/")
        assert b"<h1>Headstart</h1>" in page.body
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert b"://" not in page.body
        assert raw.ask("GET", "/metrics").body.startswith(b"# TYPE up")
        head = raw.ask("HEAD", "/")
        assert (head.body, head.headers["content-length"]) == (b"", str(len(page.body)))
        assert raw.ask("GET", "/v1/card?model=photo").json()["labels"] == ["dark", "grey", "light"]


def test_unknown_paths_and_methods(running: Running):
    names = ("a/b", "..", "%2e%2e", "%2Fetc/ready", "%00", "%ff", "a%2F..%2Fb", "a%5C..", "", "." * 2 + "/ready")
    with running.connect() as raw:
        for path in ("/nope", "/v2/", "/../../etc/passwd", *(f"/v2/models/{name}" for name in names)):
            answer = raw.ask("GET", path)
            assert answer.status == 404, path
            assert "nothing is served at this path" in answer.error, "a name that is a path reached the models"
        answer = raw.ask("DELETE", "/v2/models/echo/infer")
        assert (answer.status, answer.headers["allow"]) == (405, "POST")
        assert raw.ask("POST", "/v2").headers["allow"] == "GET, HEAD"
        assert raw.ask("GET", "http://x/v2?a=b").status == 200


def test_a_web_page_of_another_site_may_not_send_requests(running: Running):
    with running.connect() as raw:
        for host in ("localhost", "LOCALHOST:80", running.url, "[::1]:8000"):
            assert raw.ask("POST", "/v2/repository/index", Host=host, Origin=f"http://{host}").status == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost:x"):  # DNS rebinding
            answer = raw.ask("POST", "/v2/repository/models/echo/unload", Host=host, Origin=f"http://{host}")
            assert (answer.status, "--token-file" in answer.error) == (403, True)
        for origin in ("http://evil", "http://localhost.evil", "http://localhost:80"):
            page = {"Host": "localhost", "Origin": origin}
            assert raw.ask("POST", "/v2/repository/models/echo/unload", **page).status == 403
        assert raw.ask("POST", "/v2/repository/models/echo/unload", Origin="null").status == 403


def test_pages_of_any_name_may_ask_a_server_that_is_for_everybody_or_has_a_token():
    everywhere = "0.0.0.0"
    for settings in (HttpSettings(port=0, host=everywhere), HttpSettings(port=0, token="t")):
        with Running(settings) as running, running.connect() as raw:
            token = {"Authorization": "Bearer t"} if settings.token else {}
            page = {"Host": "a.example", "Origin": "http://a.example", **token}
            assert raw.ask("POST", "/v2/repository/index", **page).status == 200


def test_a_client_that_asks_for_it_is_closed_after_its_answer(running: Running):
    body, length = infer_body(np.zeros(2, np.float32))
    for method, path, sent, headers in (
        ("GET", "/v2", b"", {}),
        ("POST", "/v2/repository/index", b"", {"Content-Length": 0}),
        ("POST", "/v2/models/echo/infer", body, {"Inference-Header-Content-Length": length}),
    ):
        with running.connect() as raw:
            assert raw.ask(method, path, sent, Connection="close", **headers).headers["connection"] == "close"
            assert raw.closed()
    with running.connect() as raw:  # HTTP/1.0 closes where it is not asked to keep
        raw.send(b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert raw.read().headers["connection"] == "keep-alive"
        raw.send(b"GET /v2 HTTP/1.0\r\n\r\n")
        assert raw.read().headers["connection"] == "close"
        assert raw.closed()
