"""Clients that lie, dawdle, flood or have no token: told so or cut off, and the next good request is answered."""

import base64
import contextlib
import gzip
import json
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headstart.serving.server.errors import ServeError
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.wire.bodies import inflate
from headstart.serving.server.wire.encoded import ENCODED
from tests.serving.server.graphs import write_package
from tests.serving.server.tiny_service import Answer, RawClient, Running, infer_body, wait_until
from tests.serving.server.wire.test_encoded import RunningRepository, picture
from tests.serving.server.wire.test_protocol import damaged

BODY, LENGTH = infer_body(np.arange(50, dtype=np.float32), np.array([True, False]), parameters={"own": 1})
HEAD = (
    "POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\n"
    f"Inference-Header-Content-Length: {LENGTH}\r\nContent-Length: {len(BODY)}\r\n\r\n"
).encode()
SECRETS = ("Traceback", "/root", "/work", "/home", "/usr", ".py", "secret", "object at")


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    limits = {"max_body_bytes": 100_000, "max_held_bytes": 250_000, "max_connections": 40}
    with Running(HttpSettings(port=0, header_timeout=0.4, body_timeout=0.6, idle_timeout=1.2, **limits)) as server:
        yield server


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRepository]:
    root = tmp_path_factory.mktemp("models")
    write_package(root / "demo" / "1", mark=1)
    with RunningRepository(root) as one:
        yield one


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with Running(HttpSettings(port=0, token="right-token")) as server:
        yield server


def still_serves(running: Running) -> None:
    with running.connect() as raw:
        raw.send(HEAD + BODY)
        answer = raw.read()
        assert answer.status == 200
        assert answer.json()["outputs"][0]["data"] == list(range(50))


def told(running: Running, data: bytes) -> Answer:
    """What the server says to `data`; it then closes the connection."""
    with running.connect() as raw:
        raw.send(data)
        answer = raw.read()
        raw.socket.shutdown(socket.SHUT_WR)
        assert raw.closed()
    return answer


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\0\x01\0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: x\n\n\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: a\r\nAuthorization: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: \0\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", 404),
        (b"POST /nope HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", 404),
        (b"GET / HTTP/1.1\r\nHost: x\r\nExpect: magic\r\n\r\n", 417),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 64 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 20_000, 431),
        (b"GET /" + b"a" * 20_000, 431),
        (HEAD.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: 100001"), 413),
        (HEAD.replace(b"Header-Content-Length: %d" % LENGTH, b"Header-Content-Length: x"), 400),
        (HEAD.replace(b"Header-Content-Length: %d" % LENGTH, b"Header-Content-Length: -4"), 400),
    ],
    ids=lambda value: str(value[:60]) if isinstance(value, bytes) else str(value),
)
def test_a_request_that_breaks_the_rules_is_told_so_and_cut_off(running: Running, data: bytes, status: int):
    answer = told(running, data)
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert not any(word in answer.error for word in SECRETS)
    still_serves(running)


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        (b"zz\r\n", "hexadecimal"),
        (b"-1\r\n", "hexadecimal"),
        (b"\r\n", "hexadecimal"),
        (b"0000000000000001\r\na\r\n0\r\n\r\n", "hexadecimal"),
        (b"5\nhello\r\n0\r\n\r\n", "CR LF"),
        (b"3\r\nhello\r\n0\r\n\r\n", "longer than its size"),
        (b"fffffffffffffff\r\n", "more than 100000 bytes"),
        (b"1" * 300, "too long"),
        (b"1;" + b"e" * 300, "too long"),
        (b"1\r\na\r\n0\r\n" + b"A: b\r\n" * 1000, "too long"),
    ],
    ids=str,
)
def test_chunks_that_lie_are_refused(running: Running, chunks: bytes, words: str):
    head = b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = told(running, head + chunks)
    assert answer.status in (400, 413)
    assert words in answer.error
    still_serves(running)


def test_chunks_are_counted_as_they_come(running: Running):
    with running.connect() as raw:
        raw.send(b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(120):
            try:
                raw.send(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
            except OSError:
                break
        assert raw.read().status == 413
    still_serves(running)


def test_a_body_cut_off_names_both_numbers(running: Running):
    with running.connect() as raw:
        raw.send(HEAD + BODY[:100])
        raw.socket.shutdown(socket.SHUT_WR)
        answer = raw.read()
    assert answer.status == 400
    assert f"Content-Length is {len(BODY)}, the body ended after 100 bytes" in answer.error


@pytest.mark.parametrize("sent", [b"", b"GE", b"GET / HTTP/1.1\r\nHost:"], ids=["nothing", "a word", "half a head"])
def test_a_head_that_dawdles_is_cut_off(running: Running, sent: bytes):
    with running.connect() as raw:
        raw.send(sent)
        if sent:
            assert "headers took longer than 0.4 s" in raw.read().error
        assert raw.closed()


def test_a_head_sent_byte_by_byte_is_cut_off_all_the_same(running: Running):
    with running.connect() as raw:
        started = time.monotonic()
        with contextlib.suppress(OSError):  # a broken pipe or a reset
            for byte in b"GET / HTTP/1.1\r\nHost: " + b"x" * 1000:
                raw.send(bytes([byte]))
                time.sleep(0.02)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(("sent", "seconds"), [(b"GET /v2 HT", 0.4), (HEAD, 0.6), (HEAD + b"{", 0.6)])
def test_a_request_that_dawdles_on_a_kept_connection_is_cut_off_in_its_own_time(
    running: Running, sent: bytes, seconds: float
):
    with running.connect() as raw:
        assert raw.ask("GET", "/v2").status == 200
        raw.send(sent)
        started = time.monotonic()
        answer = raw.read()
        assert seconds - 0.2 < time.monotonic() - started < 1.15  # an idle one is given 1.2 s
        assert answer.status == 408
        assert f"took longer than {seconds} s" in answer.error


def test_an_idle_connection_is_closed_after_a_while(running: Running):
    with running.connect() as raw:
        assert raw.ask("GET", "/v2").status == 200
        time.sleep(0.7)
        assert raw.ask("GET", "/v2").status == 200  # longer than a head may take, shorter than a pause may be
        assert raw.closed(within=4)


def test_a_client_that_does_not_read_is_cut_off():
    settings = HttpSettings(port=0, body_timeout=0.5)
    body, length = infer_body(np.zeros(1 << 20, np.float32), parameters={"binary_data_output": True})
    head = HEAD.replace(b": %d" % LENGTH, b": %d" % length).replace(b": %d" % len(BODY), b": %d" % len(body))
    with Running(settings) as running, running.connect() as raw:

        def flood() -> None:
            try:
                for _ in range(30):
                    raw.send(head + body)
            except OSError:
                pass

        thread = threading.Thread(target=flood)
        thread.start()
        thread.join(20)
        assert not thread.is_alive(), "the server neither read nor closed"
        assert len(running.service.requests) < 10, "answers pile up in memory"
        wait_until(lambda: not running.server._connections)
        still_serves(running)


def test_more_connections_than_allowed_are_told_so(running: Running):
    clients = []
    try:
        clients = [RawClient(running.server.port) for _ in range(60)]
        answers = []
        for client in clients:
            try:
                client.send(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
                answers.append(client.read().status)
            except OSError:  # the 503 was cut off by a reset
                answers.append(503)
        assert set(answers) == {200, 503}
        assert answers.count(200) <= 40
    finally:
        for client in clients:
            client.socket.close()
    wait_until(lambda: not running.server._connections)
    still_serves(running)


def test_a_connection_too_many_is_told_nothing_where_a_token_is_asked_for():
    with Running(HttpSettings(port=0, token="t", max_connections=1)) as running, running.connect() as raw:
        assert raw.ask("GET", "/v2", Authorization="Bearer t").status == 200
        with running.connect() as other:
            assert other.closed()


def test_bodies_count_as_they_come_and_not_as_they_are_announced(running: Running):
    head = HEAD.replace(b"Content-Length: %d\r\n\r\n" % len(BODY), b"Content-Length: 100000\r\n\r\n")
    clients = [RawClient(running.server.port) for _ in range(9)]
    try:
        for client in clients[:6]:
            client.send(head)
        still_serves(running)
        for client in clients[6:8]:
            client.send(head + bytes(99_000))
        wait_until(lambda: 198_000 <= running.server._held <= 198_002)
        clients[8].send(head + bytes(99_000))
        answer = clients[8].read()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    finally:
        for client in clients:
            client.socket.close()
    wait_until(lambda: running.server._held == 0)
    still_serves(running)


def test_inflated_bodies_count_as_what_they_have_become(running: Running):
    numbers = np.zeros(20_000, np.float32)
    body, length = infer_body(numbers)
    packed = gzip.compress(body)
    assert len(packed) < 1000
    head = (
        "POST /v2/models/slow/infer HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\n"
        f"Inference-Header-Content-Length: {length}\r\nContent-Length: {len(packed)}\r\n\r\n"
    ).encode()
    clients = [RawClient(running.server.port) for _ in range(4)]
    try:
        for client in clients[:3]:
            client.send(head + packed)
        wait_until(lambda: running.server._held > 3 * numbers.nbytes)
        clients[3].send(head + packed)
        assert clients[3].read().status == 503
        clients[2].socket.close()
        wait_until(lambda: running.server._held < 3 * numbers.nbytes)
    finally:
        for client in clients:
            client.socket.close()
    wait_until(lambda: running.server._held == 0)
    still_serves(running)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_bomb_is_not_inflated(encoding: str):
    packer = zlib.compressobj(wbits=31 if encoding == "gzip" else 15)
    bomb = packer.compress(bytes(1 << 25)) + packer.flush()
    tracemalloc.start()
    try:
        with pytest.raises(ServeError, match="more than 100000 bytes"):
            inflate(memoryview(bomb), encoding, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_shape_that_asks_for_terabytes_is_refused_before_memory_is_taken(running: Running):
    tracemalloc.start()
    try:
        for shape in ([1 << 27], [1 << 40, 0], [1 << 13, 1 << 13]):
            for datatype in ("FP64", "BYTES"):
                tensor = {"name": "x", "datatype": datatype, "shape": shape, "data": []}
                body = json.dumps({"inputs": [tensor]}).encode()
                with running.connect() as raw:
                    assert raw.ask("POST", "/v2/models/echo/infer", body).status == 400
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("authorization", ["", "Bearer wrong-token", "Bearer ", "Basic right-token", "right-token"])
def test_without_the_token_every_request_gets_the_same_401(guarded: Running, authorization: str):
    line = f"Authorization: {authorization}\r\n" if authorization else ""
    answers = set()
    for request in (
        "GET /",
        "GET /v2/health/live",
        "GET /nope",
        "DELETE /v2",
        "POST /v2/models/echo/infer",
        "GET /metrics",
    ):
        for rest in (
            "\r\n",
            "Content-Length: 99999999999\r\n\r\n",
            "Expect: 100-continue\r\nContent-Length: 9\r\n\r\n",
        ):
            answer = told(guarded, f"{request} HTTP/1.1\r\nHost: x\r\n{line}{rest}".encode())
            assert answer.headers["www-authenticate"] == "Bearer"
            answers.add((answer.status, answer.body))
    answers.add(((other := told(guarded, b"nonsense\r\n\r\n")).status, other.body))
    answers.add(((other := told(guarded, b"GET / HTTP/1.1\r\nA: " + b"a" * 20_000)).status, other.body))
    assert {status for status, _ in answers} == {401}
    assert len(answers) == 1
    assert not guarded.service.requests


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("Headstart-Timeout-Ms: 0", 400),
        ("Headstart-Priority: high", 400),
        ("Inference-Header-Content-Length: a", 400),
        ("Content-Type: a\r\nContent-Type: b", 400),
        ("Authorization: Bearer wrong-token", 400),
        ("A: \0", 400),
        ("Content-Length: -1", 400),
        ("Expect: magic", 417),
        ("Content-Length: 99999999999", 413),
        ("Transfer-Encoding: gzip", 400),
        ("Transfer-Encoding: gzip, chunked", 501),
        ("\r\n".join(["A: b"] * 65), 431),
        (f"Cookie: {'a' * 20_000}", 431),
    ],
)
def test_what_is_wrong_with_a_head_is_told_to_who_has_the_token_alone(guarded: Running, fault: str, status: int):
    for token, expected in (("right-token", status), ("wrong-token", 401)):
        # A second time, after a request that was let in, which says nothing of the next one.
        for first in (b"", b"GET /v2 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer right-token\r\n\r\n"):
            with guarded.connect() as raw:
                raw.send(first)
                assert not first or raw.read().status == 200
                raw.send(f"POST /v2/repository/index HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n".encode())
                raw.send(f"{fault}\r\n\r\n".encode())
                assert raw.read().status == expected


def test_with_the_token_requests_are_answered(guarded: Running):
    with guarded.connect() as raw:
        assert raw.ask("GET", "/v2", Authorization="Bearer right-token").status == 200
        assert raw.ask("GET", "/v2", Authorization="bearer  right-token ").status == 200
        assert raw.ask("GET", "/v2").status == 401  # on a connection that was let in before
        assert raw.closed()
    with guarded.connect() as raw:
        assert raw.ask("GET", "/v2", Authorization="Bearer right-token").status == 200
        raw.send(b"nonsense\r\n\r\n")
        assert raw.read().status == 401


def test_health_can_be_open_and_nothing_else_is():
    with Running(HttpSettings(port=0, token="t", open_health=True)) as running, running.connect() as raw:
        assert raw.ask("GET", "/v2/health/live").status == 200
        assert raw.ask("GET", "/v2/health/ready").status == 200
        assert raw.ask("GET", "/v2/models/echo/ready").status == 401


@pytest.mark.parametrize("body", ["Content-Length: 9", "Transfer-Encoding: chunked"])
def test_open_health_takes_no_body_of_a_stranger(body: str):
    with Running(HttpSettings(port=0, token="t", open_health=True)) as running:
        head = f"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n{body}\r\n"
        assert told(running, f"{head}\r\n".encode()).status == 401
        sent = b"9\r\nunheeded.\r\n0\r\n\r\n" if "chunked" in body else b"unheeded."
        with running.connect() as raw:
            raw.send(f"{head}Authorization: Bearer t\r\n\r\n".encode() + sent)
            assert raw.read().status == 200


def test_where_memory_ends_a_client_is_told_to_come_again(running: Running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(running.service, "infer", lambda request: bytearray(1 << 62))
    with running.connect() as raw:
        answer = raw.ask("POST", "/v2/models/echo/infer", BODY, Inference_Header_Content_Length=LENGTH)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert "out of memory" in answer.error


def test_a_failure_inside_leaks_nothing(running: Running, caplog: pytest.LogCaptureFixture):
    with running.connect() as raw:
        answer = raw.ask("POST", "/v2/models/broken/infer", BODY, Inference_Header_Content_Length=LENGTH)
    assert answer.status == 500
    assert not any(word in answer.error for word in SECRETS)
    number = answer.error.rpartition(" ")[2]
    assert number in caplog.text
    assert "secret" in caplog.text


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_requests_are_answered_or_refused_and_the_next_one_is_served(running: Running, data: st.DataObject):
    whole = bytearray(HEAD + BODY)
    for _ in range(data.draw(st.integers(0, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.one_of(st.just(len(whole)), st.integers(0, len(whole))))
    pieces = data.draw(st.integers(1, 4))
    with running.connect() as raw:
        size = -(-cut // pieces) or 1
        for start in range(0, cut, size):
            raw.send(bytes(whole[start : min(start + size, cut)]))
        raw.socket.shutdown(socket.SHUT_WR)
        try:
            while True:
                answer = raw.read()
                assert 200 <= answer.status < 600
                assert answer.status != 500, answer.body
                if answer.status >= 400:
                    assert not any(word in answer.error for word in SECRETS)
        except ConnectionError:
            pass
    still_serves(running)


def real_requests() -> dict[str, bytes]:
    """A good request of each kind that has a body."""
    image, text = picture(), base64.b64encode(picture(9, 9, "JPEG")).decode()
    pixels, length = infer_body(np.zeros((2, 3, 3, 3), np.uint8), names=("images",))
    files = struct.pack("<I", len(image)) + image
    described = {"name": ENCODED, "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(files)}}
    head = json.dumps({"inputs": [described]}).encode()
    form = b'--B\r\nContent-Disposition: form-data; name="image"\r\n\r\n' + image + b"\r\n--B--\r\n"
    row = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 2, 3], "data": [[[[0, 1, 2], [3, 4, 255]]]]}
    plain = json.dumps({"id": "i", "inputs": [row], "outputs": [{"name": "logits"}]}).encode()
    sizes = b"Inference-Header-Content-Length: %d\r\n"
    bodies = {
        "json": (b"", plain),
        "binary": (sizes % length, pixels),
        "gzip": (b"Content-Encoding: gzip\r\n", gzip.compress(plain)),
        "files": (sizes % len(head), head + files),
        "base64": (b"", json.dumps({"inputs": [{**described, "parameters": {}, "data": [text]}]}).encode()),
        "image": (b"Content-Type: image/png\r\n", image),
        "form": (b"Content-Type: multipart/form-data; boundary=B\r\n", form),
    }
    made = {}
    for name, (lines, body) in bodies.items():
        path = b"/v1/predict" if name in ("image", "form") else b"/v2/models/demo/infer"
        made[name] = b"POST %s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s" % (path, lines, len(body), body)
    chunked = b"Transfer-Encoding: chunked\r\n\r\n10\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n"
    made["chunks"] = made["json"].partition(b"Content-Length")[0] + chunked % (plain[:16], len(plain) - 16, plain[16:])
    return made


REAL = real_requests()


@pytest.mark.parametrize("kind", REAL)
def test_a_real_model_answers_each_kind_of_request(real: RunningRepository, kind: str):
    with real.connect() as raw:
        raw.send(REAL[kind])
        assert raw.read().status == 200


@pytest.mark.parametrize("kind", REAL)
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_request_of_any_kind_is_answered_or_refused_in_words(
    real: RunningRepository, kind: str, data: st.DataObject
):
    sent = data.draw(damaged(REAL[kind]))
    with real.connect() as raw:
        raw.send(sent)
        raw.socket.shutdown(socket.SHUT_WR)
        try:
            while True:
                answer = raw.read()
                assert answer.status != 500, answer.body
                if answer.status != 200:
                    assert 400 <= answer.status < 600
                    assert not any(word in answer.error for word in SECRETS)
        except ConnectionError:
            pass
    with real.connect() as raw:
        raw.send(REAL["binary"])
        assert raw.read().status == 200


@pytest.mark.parametrize("path", ["/v2/models/demo/infer", "/v2/repository/index", "/v2/repository/models/demo/load"])
@pytest.mark.parametrize("opening", [b"[", b'{"inputs":', b'{"inputs":[{"name":', b'{"parameters":{"a":'])
def test_json_nested_without_end_is_refused(real: RunningRepository, path: str, opening: bytes):
    for body in (opening * 60_000, opening * 900):
        with real.connect() as raw:
            answer = raw.ask("POST", path, body)
            assert answer.status == 400
            assert "nested too deeply" in answer.error or "not JSON" in answer.error


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_none_cross_as_bytes_and_are_refused_as_json(running: Running, value: str):
    array = np.array([float(value), 1], np.float32)
    body, length = infer_body(array, parameters={"binary_data_output": True})
    tensor = '{"inputs":[{"name":"x","datatype":"FP32","shape":[2],"data":[%s,1]}],"outputs":[{"name":"x",%s}]}'
    with running.connect() as raw:
        answer = raw.ask("POST", "/v2/models/echo/infer", body, Inference_Header_Content_Length=length)
        assert answer.body.endswith(array.tobytes())
        binary = tensor % (value, '"parameters":{"binary_data":true}')
        assert raw.ask("POST", "/v2/models/echo/infer", binary.encode()).body.endswith(array.tobytes())
        answer = raw.ask("POST", "/v2/models/echo/infer", (tensor % (value, '"parameters":{}')).encode())
        assert answer.status == 400
        assert "binary_data: true" in answer.error
        for wrong in ('"FP32"', '"INT32"', '"BOOL"'):
            text = (tensor % (value, f'"parameters":{{"classification":{value}}}')).replace('"FP32"', wrong)
            assert raw.ask("POST", "/v2/models/echo/infer", text.encode()).status == 400


@given(st.lists(st.binary(max_size=80), max_size=4))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_noise_on_the_wire_does_no_harm(running: Running, pieces: list[bytes]):
    with running.connect() as raw:
        for piece in pieces:
            raw.send(piece)
        raw.socket.shutdown(socket.SHUT_WR)
        try:
            answer = raw.read()
            assert answer.status in (400, 431, 505)
        except ConnectionError:
            pass
    still_serves(running)


def test_a_client_that_speaks_tls_to_the_plain_port_is_told_at_once(running: Running, guarded: Running):
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
    answer = told(running, hello)
    assert (answer.status, "the client speaks TLS" in answer.json()["error"]) == (400, True)
    assert told(guarded, hello).status == 401  # who brings no token learns nothing
    still_serves(running)
