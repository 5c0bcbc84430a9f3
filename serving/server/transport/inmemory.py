"""Requests that another HTTP server has read, answered by a connection of ours that has no socket.

What is let in, its limits, its handlers and every byte of the answer are those of `headstart serve`, since it is the
same code that reads the request: written out again as HTTP/1.1 and fed to a `Connection`.
"""

import asyncio
from collections.abc import Iterable
from typing import Any, NamedTuple

from headstart.serving.server.errors import unavailable
from headstart.serving.server.transport.connection import Connection
from headstart.serving.server.transport.exchange import error_response, response_head
from headstart.serving.server.transport.http import HttpServer

# Of the hop that ends here: the body has come whole, and the connection is for one request.
_OF_THE_HOP = {b"connection", b"content-length", b"expect", b"keep-alive", b"te", b"transfer-encoding", b"upgrade"}
_WRITTEN_BY_OTHERS = (b"date", b"connection")


class Answer(NamedTuple):
    """A response, without what belongs to a connection."""

    status: int
    """HTTP status."""
    headers: list[tuple[bytes, bytes]]
    """Names and values, `Content-Length` among them."""
    body: bytes
    """The body."""


async def answer(
    server: HttpServer, method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> Answer:
    """Answer one request. Where the caller is cancelled, its client has gone and the work is dropped.

        server = HttpServer(service, settings)  # which need not listen
        await answer(server, "POST", b"/v2/models/demo/infer", [(b"host", b"localhost")], body)

    Args:
        server: whose connection it would have come by.
        method: HTTP's.
        target: path and query, percent-encoded.
        headers: names and values.
        body: all of it.
    """
    kept = [(name, value) for name, value in headers if name.lower() not in _OF_THE_HOP]
    kept += [(b"Content-Length", b"%d" % len(body)), (b"Connection", b"close")]
    lines = [b"%s %s HTTP/1.1" % (method.encode("latin-1"), target), *(b": ".join(pair) for pair in kept), b"", b""]
    transport = _Memory()
    connection = Connection(server)
    connection.connection_made(transport)
    try:
        transport.feed(connection, b"\r\n".join(lines))
        transport.feed(connection, body)
        await transport.ended.wait()
    finally:
        connection.connection_lost(None)
    return _read(b"".join(transport.written) or _aborted(server), method == "HEAD")


class _Memory(asyncio.Transport):
    """Takes what a connection writes, until it ends its side."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.ended = asyncio.Event()

    def feed(self, connection: Connection, data: bytes) -> None:
        """Hand over bytes as a socket does, in pieces as large as the connection asks for."""
        view = memoryview(data)
        while view and not self.ended.is_set():
            buffer = connection.get_buffer(-1)
            taken = min(len(buffer), len(view))
            if not taken:  # the head is longer than the connection's limit, which it has answered
                break
            buffer[:taken] = view[:taken]
            view = view[taken:]
            connection.buffer_updated(taken)

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.written += map(bytes, list_of_data)

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended.set()

    def is_closing(self) -> bool:
        return self.ended.is_set()

    def close(self) -> None:
        self.ended.set()

    def abort(self) -> None:
        self.ended.set()

    def pause_reading(self) -> None:
        """Nothing more comes than is fed."""

    def resume_reading(self) -> None:
        """As above."""


def _aborted(server: HttpServer) -> bytes:
    """What a caller is told for whom the connection was closed at once, since there were too many or time was up."""
    response = error_response(unavailable("the server closed the connection without an answer; send the request again"))
    length = sum(map(len, response.parts))
    return b"".join((response_head(response, length, server.request_ids.choose(""), b"", b""), *response.parts))


def _read(written: bytes, no_body: bool) -> Answer:
    """Take a response apart that a `Connection` has written."""
    head, _, body = written.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    pairs = (line.partition(b": ") for line in lines)
    kept = [(name, value) for name, _, value in pairs if name.lower() not in _WRITTEN_BY_OTHERS]
    return Answer(int(first.split(b" ")[1]), kept, b"" if no_body else body)
