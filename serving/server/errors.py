"""Refusals that a client is told, and the one that the operator is told when a server cannot start."""

import errno

from headstart.serving.errors import PackageError


class ServeError(Exception):
    """A request that is not answered; the transports turn it into an HTTP or gRPC status.

        raise ServeError(404, "there is no model 'cat'; ...", grpc="NOT_FOUND")

    Args:
        status: HTTP status.
        message: what was wrong, which value, what would be accepted. Never a path of the machine.
        grpc: name of the gRPC status.
        retry_after: seconds after which a retry may go through, or None.
    """

    def __init__(self, status: int, message: str, *, grpc: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.grpc = grpc
        self.retry_after = retry_after
        self.counted = False
        """Whether it is in the statistics of a model."""


class MethodNotAllowed(ServeError):  # noqa: N818 - the status' own name
    """405; `allow` is what the path accepts, as the header `Allow` says it."""

    def __init__(self, method: str, accepted: list[str]) -> None:
        self.allow = ", ".join(accepted)
        super().__init__(405, f"{method} is not served at this path; accepted: {self.allow}", grpc="UNIMPLEMENTED")


class StartError(PackageError):
    """A server that cannot start: the port is in use, the certificate unreadable; the message says what to do.

    Read by the operator, so it names files of the machine.
    """

    @classmethod
    def of_port(cls, error: OSError, host: str, port: int, option: str) -> "StartError":
        """What to do where `error` keeps a server from listening on a port that `option` chooses."""
        where = address(host, port)
        if error.errno == errno.EADDRINUSE:
            return cls(f"{where} is in use; stop what listens there, or give another {option}")
        if error.errno == errno.EACCES:
            return cls(f"{where} may not be used by this user; give a {option} from 1024 on")
        return cls(f"cannot listen on {where} ({error.strerror or error}); give --host an address of this machine")


def address(host: str, port: int) -> str:
    """`host:port` as in a URL, `[::1]:8000`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bad_request(message: str) -> ServeError:
    """400: the request itself is wrong."""
    return ServeError(400, message, grpc="INVALID_ARGUMENT")


def unauthenticated() -> ServeError:
    """401: always in the same words, whatever was asked."""
    return ServeError(401, "this server asks for a token: send Authorization: Bearer TOKEN", grpc="UNAUTHENTICATED")


def not_found(message: str) -> ServeError:
    """404: no such model, version or path."""
    return ServeError(404, message, grpc="NOT_FOUND")


def too_slow(message: str) -> ServeError:
    """408: the request did not come whole in time."""
    return ServeError(408, message, grpc="DEADLINE_EXCEEDED")


def too_large(message: str) -> ServeError:
    """413: beyond a limit on bytes or pixels."""
    return ServeError(413, message, grpc="RESOURCE_EXHAUSTED")


def too_many(message: str, retry_after: float = 1.0) -> ServeError:
    """429: a queue is full; `retry_after` in seconds."""
    return ServeError(429, message, grpc="RESOURCE_EXHAUSTED", retry_after=retry_after)


def internal(message: str) -> ServeError:
    """500: our fault; the cause is in the log and never in `message`."""
    return ServeError(500, message, grpc="INTERNAL")


def unavailable(message: str, retry_after: float | None = 1.0) -> ServeError:
    """503: not ready, or shutting down; `retry_after` in seconds."""
    return ServeError(503, message, grpc="UNAVAILABLE", retry_after=retry_after)


def timeout(message: str) -> ServeError:
    """504: the request's own deadline passed before it ran."""
    return ServeError(504, message, grpc="DEADLINE_EXCEEDED")
