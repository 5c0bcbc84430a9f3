"""What a handler is given, one request, and what it returns: a response, or what must be awaited for one."""

import json
import logging
import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, NamedTuple

from headstart.serving.server.errors import MethodNotAllowed, ServeError, internal, unavailable
from headstart.serving.server.watching.watch import Seen
from headstart.serving.server.wire.head import Head
from headstart.serving.server.wire.protocol import error_body

log = logging.getLogger(__name__)

JSON = b"Content-Type: application/json\r\n"
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class Exchange(Seen):
    """One request while it is answered; `request` is what the service was given, for a client that goes.

    `hold` counts bytes that its body comes to take, or raises a ServeError, until it is answered.
    """

    __slots__ = ("body", "gone", "head", "hold")

    def __init__(
        self, head: Head, body: memoryview, request_id: str, hold: Callable[[int], None], began: int = 0
    ) -> None:
        super().__init__(request_id, began)
        self.head = head
        self.body = body
        self.hold = hold
        self.gone = False

    def leave(self) -> None:
        """The client has gone: drop the work."""
        self.gone = True
        if self.request is not None:
            self.request.cancel()


class Response(NamedTuple):
    """A response but for what belongs to the connection."""

    status: int
    """HTTP status."""
    headers: bytes
    """Header lines, each with its CR LF, without those on length and connection."""
    parts: list[bytes | memoryview]
    """The body."""


class Later(NamedTuple):
    """A response that must be waited for."""

    awaitable: Awaitable[Any]
    """What to wait for."""
    finish: Callable[[Any], Response]
    """Makes the response of its result."""


def json_response(value: Any, status: int = 200) -> Response:
    """A JSON document."""
    return Response(status, JSON, [_encode(value).encode()])


def error_response(error: ServeError) -> Response:
    """`{"error": "..."}` with the headers that its status asks for."""
    headers = JSON
    if error.retry_after is not None:
        headers += b"Retry-After: %d\r\n" % max(1, math.ceil(error.retry_after))
    if error.status == 401:
        headers += b"WWW-Authenticate: Bearer\r\n"
    if isinstance(error, MethodNotAllowed):
        headers += f"Allow: {error.allow}\r\n".encode()
    return Response(error.status, headers, [error_body(error)])


def refusal(error: Exception, request_id: str) -> ServeError:
    """What is told of what a handler raised; the cause of what it did not mean to raise is in the log alone."""
    if isinstance(error, ServeError):
        return error
    if isinstance(error, MemoryError):
        return unavailable("the server is out of memory for this request")
    log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
    return internal(f"the server failed; its log says why under {request_id}")


def response_head(response: Response, length: int, request_id: str, date: bytes, connection: bytes) -> bytes:
    """The head of a response whose body has that length; `date` and `connection` are header lines, or empty."""
    return b"%s%s%sX-Request-Id: %s\r\nContent-Length: %d\r\n%s\r\n" % (
        _STATUS_LINES[response.status],
        date,
        response.headers,
        request_id.encode(),
        length,
        connection,
    )
