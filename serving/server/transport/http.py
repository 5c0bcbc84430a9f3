"""The HTTP/1.1 server: listens, lets in, keeps time and winds down.

    server = await serve_http(service, HttpSettings(port=8000))
    ...
    server.close()
    await server.drain(timeout=30)

It must run on uvloop or asyncio; it imports neither torch nor ray.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

from headstart.serving.server.errors import StartError, address
from headstart.serving.server.interface import InferenceService
from headstart.serving.server.settings import HttpSettings, Renewal, same_token, tls_context, token_digest
from headstart.serving.server.transport.busy_poll import BusyPoll
from headstart.serving.server.transport.connection import Connection
from headstart.serving.server.transport.handshakes import bound_handshakes
from headstart.serving.server.transport.routes import Routes
from headstart.serving.server.watching.watch import RequestIds, Watch

log = logging.getLogger(__name__)

_BACKLOG = 1024
_GRACE = 0.5
"""Seconds for which an idle connection may still bring a request once the server winds down."""


class HttpServer:
    """A running server; `serve_http` makes it.

    Args:
        service: answers the requests.
        settings: limits, token and times.
        watch: is shown every request that was answered; None is nobody.
    """

    def __init__(self, service: InferenceService, settings: HttpSettings, watch: Watch | None = None) -> None:
        self.settings = settings
        self.watch = watch
        self.request_ids = RequestIds()
        self.routes = Routes(service, settings)
        self.closing = False
        """Whether it has stopped accepting."""
        self.idle_timeout = settings.idle_timeout
        """Seconds that a connection may stay open without a request: the settings', and few once it is closing."""
        self.port = 0
        """The port that it listens on."""
        self.date = b""
        """The header `Date`, a second old at most."""
        loop = asyncio.get_running_loop()
        self.clock: Callable[[], float] = loop.time
        """Seconds; what deadlines are compared with."""
        self._loop = loop
        self.polling = BusyPoll(loop)
        self._token = None if settings.token is None else token_digest(settings.token.encode())
        self._connections: set[Connection] = set()
        self._held = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._tick = min(1.0, settings.header_timeout / 4, settings.body_timeout / 4, settings.idle_timeout / 4)
        self._listener: asyncio.Server | None = None
        self._handshake: dict[str, Any] = {}
        self._late: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._renewal = Renewal(settings)
        self._renewed: ssl.SSLContext | None = None

    async def listen(self) -> None:
        """Open the port.

        Raises:
            StartError: the port is in use or may not be used, the address is not this machine's, or TLS fails.
        """
        settings = self.settings
        context = tls_context(settings)
        if context is not None:
            context.sni_callback = self._choose_certificate
            bound_handshakes(context, settings.max_connections)
            self._handshake = {
                "ssl": context,
                "ssl_handshake_timeout": settings.header_timeout,
                "ssl_shutdown_timeout": settings.body_timeout,
            }
        where = address(settings.host, settings.port)
        try:
            self._listener = await self._loop.create_server(
                lambda: Connection(self), **self._address(), backlog=_BACKLOG, **self._handshake
            )
        except OSError as error:
            raise StartError.of_port(error, settings.host, settings.port, "--port") from error
        self.port = self._listener.sockets[0].getsockname()[1]
        if not settings.is_local:
            if settings.token is None:
                log.warning("%s: whoever reaches this address is let in; give --token-file", where)
            elif context is None:
                log.warning("%s: tokens and tensors cross the network in the clear; give --tls-cert", where)
        self._sweep()

    def _address(self) -> dict[str, Any]:
        """What to listen on. `::` is every address of this machine, IPv4 too where it has both, as for gRPC."""
        settings = self.settings
        if settings.host != "::":
            return {"host": settings.host, "port": settings.port, "reuse_port": settings.reuse_port or None}
        listening = socket.create_server(
            ("::", settings.port), family=socket.AF_INET6, backlog=_BACKLOG, reuse_port=settings.reuse_port,
            dualstack_ipv6=socket.has_dualstack_ipv6(),
        )  # fmt: skip
        return {"sock": listening}

    def close(self) -> None:
        """Stop accepting: no new connections; each open one is closed after the request that it has begun.

        So is one that the kernel has accepted for us: it would be reset with the listener, after its request was sent.
        """
        if self.closing:
            return
        self.closing = self.routes.closing = True
        if self._listener is not None:
            waiting = [accepted for one in self._listener.sockets for accepted in _accepted(one)]
            self._listener.close()
            for accepted in waiting:
                self._empty.clear()
                self._late.add(taking := self._loop.create_task(self._take(accepted)))
                taking.add_done_callback(self._taken)
        self.idle_timeout = min(self.idle_timeout, _GRACE)
        for connection in self._connections:
            connection.wind_down()
        self._tick = min(self._tick, _GRACE / 2)
        self._sweep()

    async def _take(self, accepted: socket.socket) -> None:
        """Serve a connection that was waiting when the listener was closed."""
        with contextlib.suppress(OSError):  # a handshake that fails
            _, connection = await self._loop.connect_accepted_socket(
                lambda: Connection(self), accepted, **self._handshake
            )
            connection.wind_down()

    def _taken(self, taking: "asyncio.Task[None]") -> None:
        self._late.discard(taking)
        self._settle()

    async def drain(self, timeout: float | None = None) -> None:
        """Wait until the requests in flight are answered.

        Args:
            timeout: seconds, after which what is left is cut off; None is the settings' `drain_timeout`.
        """
        self.close()
        try:
            await asyncio.wait_for(self._empty.wait(), self.settings.drain_timeout if timeout is None else timeout)
        except TimeoutError:
            for taking in self._late:
                taking.cancel()
            for connection in list(self._connections):
                connection.abort()
            await asyncio.sleep(0)
        if self._timer is not None:
            self._timer.cancel()
        self.routes.close()

    # What connections call.

    def add(self, connection: Connection) -> bool:
        """Note a new connection; False where there are too many."""
        self._connections.add(connection)
        self.routes.service.clients += 1
        self._empty.clear()
        return len(self._connections) <= self.settings.max_connections

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        self._connections.discard(connection)
        self.routes.service.clients -= 1
        self._settle()

    def _settle(self) -> None:
        if not self._connections and not self._late:
            self._empty.set()

    def trusts(self, authorization: bytes | None) -> bool:
        """Whether a request with this `Authorization` header is let in."""
        return self._token is None or same_token(authorization, self._token)

    def hold(self, nbytes: int) -> bool:
        """Count bytes of bodies that are held, or, below 0, let go; False where there is no room for them."""
        if nbytes > 0 and self._held + nbytes > self.settings.max_held_bytes:
            return False
        self._held += nbytes
        return True

    def _sweep(self) -> None:
        """Once per tick: set the date, see to the certificate, and close what is too slow."""
        if self._timer is not None:
            self._timer.cancel()
        self.date = f"Date: {formatdate(usegmt=True)}\r\n".encode()
        self._renewed = self._renewal.look() or self._renewed
        now = self.clock()
        for connection in list(self._connections):
            if connection.deadline <= now:
                connection.expire()
        self._timer = self._loop.call_later(self._tick, self._sweep)

    def _choose_certificate(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """At each handshake, also where the client names no server."""
        if self._renewed is not None:
            connection.context = self._renewed


def _accepted(listening: socket.socket) -> list[socket.socket]:
    """The connections that wait to be accepted, a backlog of them at most."""
    waiting: list[socket.socket] = []
    with socket.fromfd(listening.fileno(), listening.family, listening.type) as own, contextlib.suppress(OSError):
        own.setblocking(False)
        while len(waiting) <= _BACKLOG:
            waiting.append(accepted := own.accept()[0])
            accepted.setblocking(False)
    return waiting


async def serve_http(service: InferenceService, settings: HttpSettings, watch: Watch | None = None) -> HttpServer:
    """Start a server on the running loop.

    Raises:
        StartError: the port, the address or the certificate cannot be used.
    """
    server = HttpServer(service, settings, watch)
    await server.listen()
    return server
