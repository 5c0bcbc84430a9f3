"""What is noted of each request while it is answered, who looks at it afterwards, and the requests' names.

Nothing here is paid for where nobody watches but the name: 0.2 us, and its line in the answer.
"""

import itertools
import logging
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import NamedTuple, Protocol

from headstart.serving.server.wire.protocol import InferRequest, InferResponse

CLIENT_GONE = 499
"""Where HTTP has no status: the client had gone before its answer."""
ACCESS = logging.getLogger("headstart.access")
_NAMES = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")


class RequestIds:
    """Names of requests: the client's own where it is short and plain, or ours, which no two requests share."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    def choose(self, given: str) -> str:
        """The client's name of a request, if it may go into logs and headers, or a new one."""
        return given if given and _NAMES.fullmatch(given) else f"{self._prefix}-{next(self._numbers):x}"


class Seen:
    """One request: its name, what the service was asked and has answered, and when, in `perf_counter_ns`.

    The times are 0 where nobody watches: `began` when all of it had come, `decoded` when the service was asked,
    `answered` when the service had answered.
    """

    __slots__ = ("answered", "began", "decoded", "request", "request_id", "response")

    def __init__(self, request_id: str, began: int = 0) -> None:
        self.request_id = request_id
        self.began = began
        self.decoded = self.answered = 0
        self.request: InferRequest | None = None
        self.response: InferResponse | None = None

    def asked(self, request: InferRequest) -> None:
        """Note that the service is asked now."""
        self.request = request
        request.request_id = self.request_id
        if self.began:
            self.decoded = perf_counter_ns()

    def told(self, response: InferResponse) -> None:
        """Note that the service has answered."""
        self.response = response
        if self.began:
            self.answered = perf_counter_ns()


class Outcome(NamedTuple):
    """How a request ended."""

    method: str
    """HTTP's method, or the service and method of gRPC."""
    path: str
    """Without the query; empty for gRPC."""
    status: int | str
    """HTTP's number or gRPC's name."""
    num_bytes: int
    """Of the answer's body."""
    headers: Callable[[], Mapping[str, str]]
    """Gives the request's headers, or metadata, in lower case."""
    client: str = ""
    """The address that the request came from, a proxy's where there is one; empty where it has none."""

    @property
    def failed(self) -> bool:
        """Whether the fault was the server's."""
        status = self.status
        return status >= 500 if isinstance(status, int) else status in ("INTERNAL", "UNAVAILABLE", "UNKNOWN")


class Watch(Protocol):
    """Looks at requests that were answered."""

    def ended(self, seen: Seen, outcome: Outcome) -> None:
        """Called once for each request, after its answer was handed to the socket."""

    def close(self) -> None:
        """Hand on what is still held; called at the end, and may take seconds."""


class Watches:
    """Several of them as one."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches

    def ended(self, seen: Seen, outcome: Outcome) -> None:
        """As `Watch`."""
        for one in self._watches:
            one.ended(seen, outcome)

    def close(self) -> None:
        """As `Watch`."""
        for one in self._watches:
            one.close()


class AccessLog:
    """A line in the log for each request."""

    def ended(self, seen: Seen, outcome: Outcome) -> None:
        """Write it."""
        extra: dict[str, object] = {
            "request_id": seen.request_id,
            "status": outcome.status,
            "ms": round((perf_counter_ns() - seen.began) * 1e-6, 3),
            "bytes": outcome.num_bytes,
        }
        if outcome.client:
            extra["client"] = outcome.client
        if seen.request is not None:
            extra["model"] = seen.request.model
            if version := seen.response.version if seen.response is not None else seen.request.version:
                extra["version"] = version
        ACCESS.info("%s %s" if outcome.path else "%s%s", outcome.method, outcome.path, extra=extra)

    def close(self) -> None:
        """Nothing is held."""
