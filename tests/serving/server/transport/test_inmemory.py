"""A request through a connection without a socket: the same answer, byte for byte, as over a socket."""

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport.http import HttpServer
from headstart.serving.server.transport.inmemory import Answer, answer
from tests.serving.server.tiny_service import RawClient, Running, TinyService, infer_body

ARRAY = np.arange(20_000, dtype=np.float32).reshape(4, 5000)
BODY, LENGTH = infer_body(ARRAY)
SMALL = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2.5]}]}).encode()
REQUESTS: list[tuple[str, str, dict[str, str], bytes]] = [
    ("GET", "/", {}, b""),
    ("GET", "/v2", {}, b""),
    ("HEAD", "/v2", {}, b""),
    ("GET", "/v2/health/ready", {}, b""),
    ("GET", "/v2/models/echo", {}, b""),
    ("GET", "/v1/card?model=photo", {}, b""),
    ("GET", "/metrics", {}, b""),
    ("POST", "/v2/models/echo/infer", {}, SMALL),
    ("POST", "/v2/models/echo/versions/1/infer", {"Inference-Header-Content-Length": str(LENGTH)}, BODY),
    ("POST", "/v2/models/full/infer", {}, SMALL),
    ("POST", "/v2/models/broken/infer", {"X-Request-Id": "mine"}, SMALL),
    ("POST", "/v2/models/none/infer", {}, SMALL),
    ("POST", "/v2/models/echo/infer", {}, b"{"),
    ("POST", "/v2/models/echo/infer", {"Content-Encoding": "br"}, SMALL),
    ("POST", "/v2/repository/index", {}, b""),
    ("POST", "/v2/repository/models/echo/load", {}, b"{}"),
    ("DELETE", "/v2", {}, b""),
    ("GET", "/../etc/passwd", {}, b""),
    ("GET", "/v2/models/%2e%2e", {}, b""),
    ("POST", "/v2/models/echo/infer", {"Origin": "http://evil.example"}, SMALL),
    ("GET", "/v2", {"X-Long": "a" * 20_000}, b""),
    ("GET", "/v2", {f"X-{number}": "a" for number in range(100)}, b""),
    ("POST", "/v2/models/echo/infer", {}, bytes(100_001)),
]


def ask(settings: HttpSettings, requests: list[tuple[str, str, dict[str, str], bytes]]) -> list[Answer]:
    async def run() -> list[Answer]:
        server = HttpServer(TinyService(), settings)
        return [
            await answer(
                server,
                method,
                target.encode(),
                [(b"host", b"x"), *((name.lower().encode(), value.encode()) for name, value in more.items())],
                body,
            )
            for method, target, more, body in requests
        ]

    return asyncio.run(run())


def comparable(headers: dict[str, str], sent: dict[str, str]) -> dict[str, str]:
    """Without what differs between any two answers: the date, the connection, and a name that the server chose."""
    left_out = {"date", "connection"} | (set() if "X-Request-Id" in sent else {"x-request-id"})
    return {name: value for name, value in headers.items() if name not in left_out}


def test_every_answer_is_the_one_over_a_socket():
    settings = HttpSettings(port=0, max_body_bytes=100_000)
    answers = ask(settings, REQUESTS)
    statuses = set()
    with Running(settings) as running:
        for request, found in zip(REQUESTS, answers, strict=True):
            method, target, more, body = request
            client = RawClient(running.server.port)
            expected = client.ask(
                method, target, body, **{name.replace("-", "_"): value for name, value in more.items()}
            )
            client.socket.close()
            headers = {name.decode().lower(): value.decode() for name, value in found.headers}
            assert found.status == expected.status, request[:2]
            if b"log says why" not in found.body or more:
                assert found.body == expected.body, request[:2]
            assert comparable(headers, more) == comparable(expected.headers, more), request[:2]
            statuses.add(found.status)
    assert {200, 400, 403, 404, 405, 413, 415, 429, 431, 500} <= statuses


def test_the_token_is_asked_for():
    settings = HttpSettings(port=0, token="secret", open_health=True)
    request = ("GET", "/v2", {}, b"")
    wrong, right, health = ask(
        settings,
        [request, ("GET", "/v2", {"Authorization": "Bearer secret"}, b""), ("GET", "/v2/health/live", {}, b"")],
    )
    assert (wrong.status, right.status, health.status) == (401, 200, 200)
    assert (b"WWW-Authenticate", b"Bearer") in wrong.headers


def test_headers_of_the_hop_before_are_not_ours():
    more = {"Transfer-Encoding": "chunked", "Connection": "keep-alive", "Expect": "100-continue", "Content-Length": "3"}
    plain, marked = ask(
        HttpSettings(port=0),
        [("POST", "/v2/models/echo/infer", {}, SMALL), ("POST", "/v2/models/echo/infer", more, SMALL)],
    )
    assert plain.status == marked.status == 200
    assert plain.body == marked.body


def test_a_caller_that_is_cancelled_drops_the_work():
    async def run() -> None:
        service = TinyService()
        server = HttpServer(service, HttpSettings(port=0))
        task = asyncio.ensure_future(answer(server, "POST", b"/v2/models/slow/infer", [(b"host", b"x")], SMALL))
        while not service.requests:
            await asyncio.sleep(0.01)
        assert not service.requests[0].cancelled
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert service.requests[0].cancelled
        service.gate.set()
        assert not server._connections

    asyncio.run(run())


@pytest.mark.parametrize("when", ["at once", "later"])
def test_a_connection_that_is_closed_without_an_answer_is_told_as_such(when: str):
    async def run() -> Answer:
        service = TinyService()
        server = HttpServer(service, HttpSettings(port=0, token="t", max_connections=1))
        headers = [(b"host", b"x"), (b"authorization", b"Bearer t")]
        task = asyncio.ensure_future(answer(server, "POST", b"/v2/models/slow/infer", headers, SMALL))
        await asyncio.sleep(0)
        if when == "at once":  # one connection too many
            found = await answer(server, "GET", b"/v2", headers, b"")
            service.gate.set()
            assert (await task).status == 200
            return found
        await server.drain(timeout=0)
        return await task

    found = asyncio.run(run())
    assert found.status == 503
    assert (b"Retry-After", b"1") in found.headers
    assert "closed the connection" in json.loads(found.body)["error"]


def test_several_at_once_keep_their_own_answers():
    async def run() -> list[Any]:
        service = TinyService()
        server = HttpServer(service, HttpSettings(port=0))
        bodies = [SMALL.replace(b"2.5", b"%d" % number) for number in range(20)]
        tasks = [
            asyncio.ensure_future(answer(server, "POST", b"/v2/models/slow/infer", [(b"host", b"x")], body))
            for body in bodies
        ]
        await asyncio.sleep(0.05)
        service.gate.set()
        return [json.loads((await task).body)["outputs"][0]["data"][1] for task in tasks]

    assert asyncio.run(run()) == [*range(20)]
