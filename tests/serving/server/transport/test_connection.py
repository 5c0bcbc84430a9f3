"""How a connection reads, fed with bytes as a socket does."""

import asyncio
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport.connection import Connection
from headstart.serving.server.transport.http import HttpServer
from headstart.serving.server.transport.inmemory import _Memory
from tests.serving.server.tiny_service import TinyService, infer_body

HEADER_BYTES = 1024


def asked(number: int, values: int) -> bytes:
    """A request for `values` numbers like `number`, of which the answer is the echo."""
    body, length = infer_body(np.full(values, number, np.float32))
    head = f"POST /v2/models/echo/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Inference-Header-Content-Length: {length}\r\n\r\n".encode() + body


def connect() -> tuple[Connection, _Memory]:
    server = HttpServer(TinyService(), HttpSettings(port=0, max_header_bytes=HEADER_BYTES))
    connection, transport = Connection(server), _Memory()
    connection.connection_made(transport)
    return connection, transport


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    cuts=st.lists(st.integers(1, 3000), min_size=1, max_size=30),
)
def test_requests_are_answered_wherever_their_bytes_are_cut(sizes: list[int], cuts: list[int]):
    async def run() -> list[list[float]]:
        connection, transport = connect()
        sent = b"".join(asked(number, values) for number, values in enumerate(sizes))
        start = 0
        for turn in range(len(sent)):
            end = start + cuts[turn % len(cuts)]
            transport.feed(connection, sent[start:end])
            start = end
        bodies = [answer.partition(b"\r\n\r\n")[2] for answer in transport.written]
        connection.connection_lost(None)
        return [json.loads(body)["outputs"][0]["data"] for body in bodies]

    assert asyncio.run(run()) == [[number] * values for number, values in enumerate(sizes)]


def test_no_request_fills_the_room_that_is_offered():
    """What fills it makes libuv read again before anything else has its turn, and the next request may be there."""

    async def run() -> None:
        connection, transport = connect()
        request = asked(1, 5000)
        for _ in range(3):
            left = memoryview(request)
            while len(left):
                room = connection.get_buffer(-1)
                count = min(len(room), len(left), 4096)
                room[:count] = left[:count]
                left = left[count:]
                connection.buffer_updated(count)
                assert len(left) or count < len(room)
        assert len(transport.written) == 3
        connection.connection_lost(None)

    asyncio.run(run())


class _Slow(_Memory):
    """A client that has yet to take some of what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.unsent, self.aborted = 0, False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def close(self) -> None:
        """Waits for what is unsent, as asyncio's do."""

    def abort(self) -> None:
        self.aborted = True


def expire_at(connection: Connection, now: float) -> None:
    connection._server.clock = lambda: now
    if connection.deadline <= now:
        connection.expire()


@pytest.mark.parametrize("how", ["Connection: close", "idle"])
def test_what_is_not_sent_yet_is_waited_for_and_given_up_in_the_end(how: str):
    async def run(takes_it: bool) -> float:
        server = HttpServer(TinyService(), HttpSettings(port=0, body_timeout=60, idle_timeout=75))
        server.clock = lambda: 0.0
        connection, transport = Connection(server), _Slow()
        connection.connection_made(transport)
        line = b"" if how == "idle" else how.encode() + b"\r\n"
        transport.unsent = 8000
        transport.feed(connection, b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n")
        began = 75.0 if how == "idle" else 0.0
        for second in range(200):
            expire_at(connection, float(second))
            if second - began == 30 and takes_it:
                assert not transport.aborted
                transport.unsent = 0
            if transport.aborted:
                break
        connection.connection_lost(None)
        return second - began

    assert 60 <= asyncio.run(run(takes_it=False)) <= 62
    assert 32 <= asyncio.run(run(takes_it=True)) <= 36


def with_an_unread_answer(idle_timeout: float) -> tuple[HttpServer, Connection, "_Slow"]:
    """A connection at second 0 that has answered, and whose client does not read."""
    server = HttpServer(TinyService(), HttpSettings(port=0, body_timeout=60, idle_timeout=idle_timeout))
    server.clock = lambda: 0.0
    connection, transport = Connection(server), _Slow()
    connection.connection_made(transport)
    transport.feed(connection, b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
    connection.pause_writing()
    return server, connection, transport


def test_a_client_that_reads_no_answer_is_given_the_time_of_a_body_and_not_that_of_a_pause():
    async def run(reads_again: bool) -> bool:
        _, connection, transport = with_an_unread_answer(idle_timeout=300)
        if reads_again:
            connection.resume_writing()
        expire_at(connection, 61.0)
        connection.connection_lost(None)
        return transport.aborted

    assert asyncio.run(run(reads_again=False))
    assert not asyncio.run(run(reads_again=True))


@pytest.mark.parametrize("takes_it_after", [0.0, 9.0, None])
def test_a_server_that_winds_down_waits_for_a_client_that_takes_its_answer_and_no_longer(takes_it_after: float | None):
    """Seconds from the end's beginning until the connection is closed."""

    async def run() -> float:
        server, connection, transport = with_an_unread_answer(idle_timeout=75)
        server.close()
        for tenth in range(700):
            expire_at(connection, tenth / 10)
            if tenth / 10 == takes_it_after:
                connection.resume_writing()
            if transport.aborted or connection._closing:
                break
        assert transport.aborted is (takes_it_after is None)
        connection.connection_lost(None)
        return tenth / 10

    closed_after = asyncio.run(run())
    assert closed_after == pytest.approx(60 if takes_it_after is None else takes_it_after + 0.5)
