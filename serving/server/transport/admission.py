"""Which requests of a connection are let in: by their heads alone, before any body."""

import contextlib
import re
from functools import partial
from typing import TYPE_CHECKING

from headstart.serving.server.errors import ServeError, too_large, unauthenticated
from headstart.serving.server.settings import LOOPBACK
from headstart.serving.server.transport.exchange import Exchange, Response
from headstart.serving.server.transport.paths import HEALTH
from headstart.serving.server.wire.head import Head, HeadParser

if TYPE_CHECKING:
    from headstart.serving.server.transport.http import HttpServer

_LOCAL = re.compile(f"({'|'.join(map(re.escape, LOOPBACK))})(:\\d+)?".encode(), re.IGNORECASE)
_HEALTH_PATHS = tuple(f"/v2/health/{one}" for one in HEALTH)


class Admission:
    """Reads heads, checks the token and finds the handler; a connection's own.

    A head whose bytes equal the last one's is not read again.

    Args:
        server: whose settings, token and routes it uses.
    """

    def __init__(self, server: "HttpServer") -> None:
        self._server, self._settings = server, server.settings
        self._parser = HeadParser(server.settings.max_headers)
        self._raw = b""
        self.head: Head | None = None
        """That of the last request, as far as it could be read, where it was let in."""
        self.is_known = server.trusts(None)
        """Whether the last request had the token or needs none, and so may learn what is wrong with it."""

    def admit(self, raw: bytes) -> Head:
        """The head that these bytes are, with its handler.

        Raises:
            ServeError: it is not HTTP/1.1, has not the token or no handler, is a web page's of another site, or
                announces too large a body.
        """
        if raw == self._raw and self.head is not None:
            return self.head
        self.head, self._raw = None, b""
        try:
            head = self._parser.parse(raw)
        finally:
            self.is_known = self._server.trusts(self._parser.headers.get(b"authorization"))
            if self.is_known:
                self.head = self._parser.head
        self.is_known |= self._is_open(head)
        if not self.is_known:
            raise unauthenticated()
        self.head = head
        try:
            self._check_page(head)
            self._server.routes.resolve(head)
        except ServeError as error:
            if head.length or head.chunked:
                raise
            head.handler = partial(_refused, error)
        if head.length > self._settings.max_body_bytes:
            raise too_large(f"Content-Length is {head.length}; accepted: {self._settings.max_body_bytes} bytes")
        self._raw = raw
        return head

    def look(self, part: bytes) -> None:
        """See whether a head that is too long has the token, as far as it has come."""
        with contextlib.suppress(ServeError):
            self.admit(part)

    def _is_open(self, head: Head) -> bool:
        """Whether it is a probe's, without a body: those of strangers would fill the memory that bodies may take."""
        return self._settings.open_health and head.path in _HEALTH_PATHS and not (head.length or head.chunked)

    def _check_page(self, head: Head) -> None:
        """Refuse a web page of another site, and one that has had its name lead to this machine (DNS rebinding)."""
        origin = head.headers.get(b"origin")
        if origin is None or head.method in ("GET", "HEAD"):
            return
        host = head.headers.get(b"host", b"")
        if origin.partition(b"://")[2] != host:
            raise ServeError(403, "a web page of another site may not send requests here", grpc="PERMISSION_DENIED")
        if self._settings.is_local and self._settings.token is None and _LOCAL.fullmatch(host) is None:
            raise ServeError(
                403,
                "this server has no token and is for this machine alone, so its page is known as http://localhost or "
                "http://127.0.0.1 with the port; open it there, or give --token-file",
                grpc="PERMISSION_DENIED",
            )

    def close(self) -> None:
        """Let go of the parser."""
        self._parser.close()


def _refused(error: ServeError, exchange: Exchange) -> Response:
    """The handler of a request that has none and no body either, after which the connection can go on."""
    raise error.with_traceback(None)  # which would grow where the same head comes again
