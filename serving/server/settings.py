"""What an HTTP server is told before it starts: where it listens, whom it lets in, and its limits."""

import hashlib
import hmac
import logging
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from headstart.serving.server.errors import StartError
from headstart.serving.server.wire.protocol import Limits

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "[::1]", "localhost")
"""Names of this machine, as a URL has them, that lead here from nowhere else."""


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """Settings of the HTTP server.

    HttpSettings(port=8000, token=read_token(Path("token")))
    """

    host: str = "127.0.0.1"
    """Address to listen on; this one is reached from the same machine alone."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    grpc_port: int | None = None
    """Port of gRPC, at the same address and with the same token, certificate and limits; None is HTTP alone."""
    token: str | None = field(default=None, repr=False)
    """What every request must bring as `Authorization: Bearer TOKEN`; None lets everyone in."""
    open_health: bool = False
    """Whether liveness and readiness answer without the token, for probes that cannot hold a secret."""
    tls_cert: Path | None = None
    """Certificate chain in PEM; with it the server speaks HTTPS alone."""
    tls_key: Path | None = None
    """The certificate's private key in PEM; None where the certificate's file holds it."""
    reuse_port: bool = False
    """Whether other processes may listen on the same port, for one process per core."""
    max_connections: int = 1024
    """Open connections; one more is told 503."""
    max_header_bytes: int = 16384
    """Bytes of a request's line and headers, and of a connection's buffer."""
    max_headers: int = 64
    """Headers of a request."""
    max_body_bytes: int = 64 << 20
    """Bytes of a request's body, as sent and as inflated."""
    max_held_bytes: int = 512 << 20
    """Bytes of all bodies that are held at once; a request beyond is told 503."""
    header_timeout: float = 10.0
    """Seconds from a request's first byte to the end of its headers."""
    body_timeout: float = 60.0
    """Seconds for a body to come, and for a client to take its answer."""
    idle_timeout: float = 75.0
    """Seconds that a connection may wait between requests."""
    drain_timeout: float = 30.0
    """Seconds that requests in flight are given when the server stops."""
    limits: Limits = field(default_factory=Limits)
    """Limits on what a body holds, the same for every transport."""

    def __post_init__(self) -> None:
        if not self.host:  # as of a variable that is not set: it would be every address
            raise ValueError("host is empty; accepted: an address or a name, 0.0.0.0 and :: for all addresses")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; accepted: 0 to 65535")
        if self.grpc_port is not None and not 0 <= self.grpc_port <= 65535:
            raise ValueError(f"grpc_port is {self.grpc_port}; accepted: 0 to 65535, or none")
        if self.grpc_port and self.grpc_port == self.port:
            raise ValueError(f"grpc_port is {self.grpc_port}, as port is; give each its own")
        if self.token is not None and not (self.token and self.token.isascii() and self.token.isprintable()):
            raise ValueError("token is empty or holds characters that a header cannot; accepted: printable ASCII")
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("tls_key is given without tls_cert; give both")
        for name in ("max_connections", "max_headers", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: at least 1")
        if self.max_header_bytes < 1024:
            raise ValueError(f"max_header_bytes is {self.max_header_bytes}; accepted: at least 1024")
        if self.max_held_bytes < self.max_body_bytes:
            raise ValueError(f"max_held_bytes is {self.max_held_bytes}; accepted: max_body_bytes or more")
        for name in ("header_timeout", "body_timeout", "idle_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) <= 86400:
                raise ValueError(f"{name} is {getattr(self, name)}; accepted: seconds above 0, up to 86400")

    @property
    def is_local(self) -> bool:
        """Whether the server is reached from the same machine alone."""
        return (f"[{self.host}]" if ":" in self.host else self.host) in LOOPBACK


def read_token(path: Path) -> str:
    """The token in a file, without the white space around it.

    Raises:
        StartError: the file is unreadable, or holds no token that a header can carry.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise StartError(f"the token file {path} cannot be read ({error.strerror}); give a readable file") from error
    except UnicodeDecodeError as error:
        raise StartError(f"the token file {path} is not ASCII text; write one line of printable ASCII") from error
    if not token or not token.isprintable():
        raise StartError(f"the token file {path} is empty or has several lines; write one line of printable ASCII")
    return token


def token_digest(token: bytes) -> bytes:
    """What tokens are compared by, so that the time taken tells nothing of their length."""
    return hashlib.sha256(token).digest()


def same_token(authorization: bytes | None, expected: bytes) -> bool:
    """Whether an `Authorization` header holds the token of which `expected` is the digest, in constant time."""
    scheme, _, token = (authorization or b"").partition(b" ")
    return hmac.compare_digest(token_digest(token.strip()), expected) and scheme.lower() == b"bearer"


def tls_context(settings: HttpSettings) -> ssl.SSLContext | None:
    """The TLS side of a server, or None where no certificate is given.

    Raises:
        StartError: a file is missing, unreadable or no PEM, or the key is not the certificate's.
    """
    if settings.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    for path in (settings.tls_cert, settings.tls_key):
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:
            raise StartError(f"{path} cannot be read ({error.strerror}); give a PEM file") from error
    try:
        # An encrypted key would make OpenSSL ask at the terminal.
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise StartError(
            f"{settings.tls_cert} and {settings.tls_key or 'the key in it'} are no certificate with its own, "
            f"unencrypted key in PEM ({getattr(error, 'reason', None) or error}); check both files"
        ) from error
    return context


class Renewal:
    """Tells when a certificate's files have changed: some are renewed every few weeks, while the server runs.

        if context := renewal.look():
            ...  # for new connections

    Args:
        settings: whose certificate it is; where there is none, nothing changes.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self._settings = settings
        self._paths = [path for path in (settings.tls_cert, settings.tls_key) if path is not None]
        self._seen = self._stamps()

    def look(self) -> ssl.SSLContext | None:
        """The TLS side with another certificate than at the last look, or None; the log says what cannot be used."""
        if (stamps := self._stamps()) == self._seen:
            return None
        self._seen = stamps
        try:
            context = tls_context(self._settings)
        except StartError as error:  # of one that is being written the rest is seen at the next look
            log.warning("the certificate is not renewed, new connections get the one before: %s", error)
            return None
        log.info("new connections get the certificate that %s holds now", self._settings.tls_cert)
        return context

    def _stamps(self) -> list[tuple[int, int]]:
        try:
            return [(status.st_mtime_ns, status.st_ino) for status in map(os.stat, self._paths)]
        except OSError:
            return []
