"""The head of an HTTP/1.1 request: its line and headers, read by llhttp in its strict mode."""

from collections.abc import Callable
from typing import Any

import httptools

from headstart.serving.server.errors import ServeError, bad_request, too_large

_ONCE = {
    b"authorization",
    b"content-encoding",
    b"content-type",
    b"expect",
    b"headstart-priority",
    b"headstart-timeout-ms",
    b"host",
    b"inference-header-content-length",
    b"origin",
}


class Head:
    """What a request's head says.

    `read` sets what depends on headers' values, and may refuse; `resolve` of the routes sets `handler` and `arguments`.
    """

    __slots__ = (
        "arguments",
        "chunked",
        "expects_continue",
        "handler",
        "headers",
        "json_length",
        "keep_alive",
        "length",
        "method",
        "old",
        "path",
        "priority",
        "query",
        "request_id",
        "timeout",
    )

    def __init__(self, method: str, target: bytes, keep_alive: bool, headers: dict[bytes, bytes]) -> None:
        self.method = method
        self.path, self.query = _split(target)
        self.request_id = headers.get(b"x-request-id", b"").decode("latin-1")
        self.headers = headers
        self.keep_alive = keep_alive
        self.handler: Callable[..., Any] | None = None
        self.arguments: tuple[Any, ...] = ()

    def read(self, version: str) -> None:
        """Read the headers whose values matter here.

        Raises:
            ServeError: 400, 417, 501 or 505.
        """
        headers = self.headers
        self.old = version == "1.0"
        if version not in ("1.0", "1.1"):
            raise ServeError(505, "this server speaks HTTP/1.1", grpc="UNIMPLEMENTED")
        if not self.old and b"host" not in headers:
            raise bad_request("the request has no Host header")
        self.length = int(headers.get(b"content-length", b"0"))
        coding = headers.get(b"transfer-encoding", b"").lower()
        if coding not in (b"", b"chunked"):
            raise ServeError(501, "the only accepted Transfer-Encoding is chunked", grpc="UNIMPLEMENTED")
        self.chunked = bool(coding)
        expect = headers.get(b"expect", b"").lower()
        if expect not in (b"", b"100-continue"):
            raise ServeError(417, "the only accepted Expect is 100-continue", grpc="INVALID_ARGUMENT")
        self.expects_continue = bool(expect) and not self.old
        self.json_length = self._number(b"inference-header-content-length", 0, 1 << 40)
        self.priority = self._number(b"headstart-priority", -100, 100)
        timeout = self._number(b"headstart-timeout-ms", 1, 1 << 40)
        self.timeout = None if timeout is None else timeout / 1e3

    def texts(self) -> dict[str, str]:
        """The headers as text."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self.headers.items()}

    def _number(self, name: bytes, least: int, most: int) -> int | None:
        text = self.headers.get(name)
        if text is None:
            return None
        if text.removeprefix(b"-").isdigit() and len(text) < 16 and least <= int(text) <= most:
            return int(text)
        raise bad_request(f"the header {name.decode().title()} is no whole number from {least} to {most}")


def _split(target: bytes) -> tuple[str, str]:
    """Path and query of a request's target, as sent: percent-encoded ASCII."""
    if not target.startswith(b"/"):
        try:
            url = httptools.parse_url(target)
        except httptools.HttpParserInvalidURLError:
            raise bad_request("the request's target is no path") from None
        return (url.path or b"/").decode("ascii", "replace"), (url.query or b"").decode("ascii", "replace")
    path, _, query = target.partition(b"#")[0].partition(b"?")
    return path.decode("ascii", "replace"), query.decode("ascii", "replace")


class HeadParser:
    """Reads heads one after the other; a connection's own.

    head = HeadParser(max_headers=64).parse(b"GET /v2 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
    """

    def __init__(self, max_headers: int) -> None:
        self._max_headers = max_headers
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._target = b""
        self.headers: dict[bytes, bytes] = {}
        """Of the last head, as far as it could be read."""
        self.head: Head | None = None
        """The last head, whatever its headers' values; of what is no head, what could be read, for the log."""
        self._complete = self._keep_alive = False
        self._twice: bytes | None = None

    def parse(self, raw: bytes) -> Head:
        """One head, which ends with its first empty line.

        Raises:
            ServeError: 400, 417, 431, 501 or 505.
        """
        self.head, self._target, self.headers, self._complete, self._twice = None, b"", {}, False, None
        parser = self._parser
        if parser is None:
            raise RuntimeError("the parser was closed")
        # Initialising it anew makes it forget the body that it now waits for: bodies do not pass through it.
        parser.__init__(self)  # type: ignore[misc]
        problem = ""
        try:
            parser.feed_data(raw)
        except httptools.HttpParserUpgrade:
            pass  # a server may stay with HTTP/1.1
        except httptools.HttpParserCallbackError:
            self._complete = False
        except httptools.HttpParserError as error:
            problem, self._complete = f": {str(error)[:100]}", False
        if self._target:
            self.head = Head(parser.get_method().decode(), self._target, self._keep_alive, self.headers)
        if self.head is None or not self._complete:
            raise bad_request(f"the request is not HTTP/1.1{problem}")
        head = self.head
        if raw.count(b"\r\n") - 2 > self._max_headers:
            raise too_many_headers(f"more than {self._max_headers} headers")
        if self._twice is not None:
            raise bad_request(f"the header {self._twice.decode('latin-1').title()} is there twice")
        head.read(parser.get_http_version())
        return head

    def close(self) -> None:
        """Let go of the parser, which refers to this object, so that both are freed at once."""
        self._parser = None

    def on_url(self, url: bytes) -> None:
        """Called by the parser, perhaps with pieces."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser with a whole header."""
        name = name.lower()
        if name not in self.headers:
            self.headers[name] = value.rstrip()
        elif name in _ONCE:
            self._twice = name
        else:
            self.headers[name] += b", " + value.rstrip()

    def on_headers_complete(self) -> None:
        """Called by the parser at the empty line."""
        self._complete = True
        # Asked here: where no body follows, the parser is about to forget what `Connection` said.
        self._keep_alive = self._parser is not None and self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """Called by the parser if it finds the head's end before we do, which smuggles a request."""
        raise ValueError("a body within the head")


def too_many_headers(what: str) -> ServeError:
    """431: `what` says which limit, as `more than 64 headers`."""
    error = too_large(f"the request's head has {what}")
    error.status = 431
    return error
