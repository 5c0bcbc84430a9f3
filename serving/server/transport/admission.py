"""Which requests of a connection are let in: by their heads alone, before any body."""

from functools import partial
from typing import TYPE_CHECKING

from headstart.serving.server.errors import ServeError, too_large, unauthenticated
from headstart.serving.server.transport.exchange import Exchange, Response, error_response
from headstart.serving.server.transport.routes import HEALTH
from headstart.serving.server.wire.head import Head, HeadParser

if TYPE_CHECKING:
    from headstart.serving.server.transport.http import HttpServer

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
        """That of the last request, where it had the token."""

    def admit(self, raw: bytes) -> Head:
        """The head that these bytes are, with its handler.

        Raises:
            ServeError: it is not HTTP/1.1, has not the token or no handler, or announces too large a body.
        """
        if raw == self._raw and self.head is not None:
            return self.head
        self.head, self._raw = None, b""
        head = self._parser.parse(raw)
        if not self._server.trusts(head.headers.get(b"authorization")) and not (
            self._settings.open_health and head.path in _HEALTH_PATHS
        ):
            raise unauthenticated()
        self.head = head
        try:
            self._server.routes.resolve(head)
        except ServeError as error:
            if head.length or head.chunked:
                raise
            head.handler = partial(_refused, error)
        if head.length > self._settings.max_body_bytes:
            raise too_large(f"Content-Length is {head.length}; accepted: {self._settings.max_body_bytes} bytes")
        self._raw = raw
        return head

    def close(self) -> None:
        """Let go of the parser."""
        self._parser.close()


def _refused(error: ServeError, exchange: Exchange) -> Response:
    """The handler of a request that has none and no body either, after which the connection can go on."""
    return error_response(error)
