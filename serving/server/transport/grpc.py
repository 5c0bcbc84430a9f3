"""The gRPC server: `inference.GRPCInferenceService` on grpc.aio, beside the HTTP server and on its loop.

    server = await serve_grpc(service, HttpSettings(grpc_port=8001))
    ...
    server.close()
    await server.drain(timeout=30)

Imported only where a gRPC port is asked for: a server of HTTP alone needs neither grpcio nor protobuf.
"""

import asyncio
import os
import socket
from functools import partial
from pathlib import Path
from typing import Any

# Read as grpc is imported. By default its core writes a line of its own to stderr, in a form that is no log's, for
# each handshake of TLS that fails, and so for all that is no TLS. What the variable says already holds.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]

from headstart.serving.server.errors import StartError
from headstart.serving.server.interface import InferenceService
from headstart.serving.server.settings import HttpSettings, Renewal, tls_context
from headstart.serving.server.transport.grpc_calls import Calls
from headstart.serving.server.watching.watch import Watch

_FOREVER = 1e6
"""Seconds of grace that never end before `drain` does. When the grace of one stop ends while another has just destroyed
the server, grpc.aio 1.85 cancels the calls of a null pointer: 13 of 112 processes ended with a segmentation fault."""

_SETTLE_S = 0.1
"""Seconds for which calls are taken and not begun before the end. grpc's core cancels those that wait to be taken when
it stops, as many as there are clients where a model was running: by then their clients wait, and none is left."""


_MOST_KEEPALIVE_S = 75.0
"""Seconds after which a silent client is asked whether it is still there, however long one may be idle."""


class GrpcServer:
    """A running server; `serve_grpc` makes it.

    Args:
        service: answers the requests.
        settings: those of the HTTP server: address, token, certificate, limits; and `grpc_port`.
        watch: is shown every call that was answered; None is nobody.
    """

    def __init__(self, service: InferenceService, settings: HttpSettings, watch: Watch | None = None) -> None:
        self.settings = settings
        self.port = 0
        """The port that it listens on."""
        self._calls = Calls(service, settings, watch)
        self._stopping: asyncio.Task[None] | None = None
        self._server: Any = None

    async def listen(self) -> None:
        """Open the port.

        Raises:
            StartError: the port is in use or may not be used, the address is not this machine's, or TLS fails.
        """
        settings, port = self.settings, self.settings.grpc_port or 0
        tls_context(settings)  # says what is wrong with a certificate, where grpc only fails
        _probe(settings.host, port, settings.reuse_port)
        self._server = grpc.aio.server(
            maximum_concurrent_rpcs=settings.max_connections,
            options=[
                ("grpc.so_reuseport", int(settings.reuse_port)),
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", settings.max_header_bytes),
                ("grpc.max_allowed_incoming_connections", settings.max_connections),
                ("grpc.server_handshake_timeout_ms", round(settings.header_timeout * 1000)),
                ("grpc.keepalive_time_ms", round(min(settings.idle_timeout, _MOST_KEEPALIVE_S) * 1000)),
            ],
        )
        self._server.add_generic_rpc_handlers((self._calls,))
        where = f"[{settings.host}]:{port}" if ":" in settings.host else f"{settings.host}:{port}"
        try:
            if settings.tls_cert is None:
                self.port = self._server.add_insecure_port(where)
            else:
                renewal, read = Renewal(settings), partial(_certificate, settings.tls_cert, settings.tls_key)
                credentials = grpc.dynamic_ssl_server_credentials(read(), lambda: read() if renewal.look() else None)
                self.port = self._server.add_secure_port(where, credentials)
        except (RuntimeError, OSError) as error:
            raise StartError(f"gRPC cannot listen on {where}; give another --grpc-port or --host") from error
        await self._server.start()

    def close(self) -> None:
        """Stop accepting: calls in flight are answered, later ones are told UNAVAILABLE."""
        if self._stopping is None and self._server is not None:
            self._calls.close()
            self._calls.hold()
            self._stopping = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        await asyncio.sleep(_SETTLE_S)
        stopping = asyncio.ensure_future(self._server.stop(_FOREVER))
        await asyncio.sleep(0)  # it tells clients to go away, and then they are answered
        self._calls.release()
        await stopping

    async def drain(self, timeout: float | None = None) -> None:
        """Wait until the calls in flight are answered.

        Args:
            timeout: seconds, after which what is left is cut off; None is the settings' `drain_timeout`.
        """
        self.close()
        if self._stopping is None:
            return
        wait = self.settings.drain_timeout if timeout is None else timeout
        await asyncio.wait((self._stopping,), timeout=wait)
        if not self._stopping.done():
            await self._server.stop(None)
        await self._stopping


async def serve_grpc(service: InferenceService, settings: HttpSettings, watch: Watch | None = None) -> GrpcServer:
    """Start a server on the running loop, at `settings.grpc_port`.

    Raises:
        StartError: the port, the address or the certificate cannot be used.
    """
    server = GrpcServer(service, settings, watch)
    await server.listen()
    return server


def _certificate(cert: Path, key: Path | None) -> Any:
    chain = cert.read_bytes()
    return grpc.ssl_server_certificate_configuration([(chain if key is None else key.read_bytes(), chain)])


def _probe(host: str, port: int, reuse_port: bool) -> None:
    """Say why a port cannot be had, which grpc does not.

    Raises:
        StartError: it is in use or may not be used, or the address is not this machine's.
    """
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind(address)
    except OSError as error:
        raise StartError.of_port(error, host, port, "--grpc-port") from error
