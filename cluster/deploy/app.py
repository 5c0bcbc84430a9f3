"""`headstart serve` as a Ray Serve application: the same server in each replica, behind Serve's proxy.

    serve deploy serve.yaml      # beside this file: the repository, the replicas, the port
    serve run headstart.cluster.deploy.app:app repository=/models

A replica reads the whole repository and follows it by itself, as `headstart serve` does, so that a package copied there
is deployed on all of them. What is asked of one replica holds for that one alone: `/metrics` and the statistics are
one replica's (Serve counts over all), and `load` and `unload` are refused.
"""

from pathlib import Path
from typing import Any
from urllib.parse import quote

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from headstart.serving.server.command import open_repository
from headstart.serving.server.errors import StartError, bad_request
from headstart.serving.server.service import Service
from headstart.serving.server.settings import HttpSettings, read_token
from headstart.serving.server.transport.http import HttpServer
from headstart.serving.server.transport.inmemory import answer

_OPTIONS = {
    "repository", "provider", "threads", "max_queue", "max_batch", "max_delay_ms", "policy", "public_key", "drift",
    "provider_options", "max_memory", "token_file", "open_health",
}  # fmt: skip
_DRAIN_S = 30.0


class _Replica(Service):
    """A service that is one of several."""

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        """Refused: the other replicas would not know of it."""
        raise bad_request(_ONE_OF_SEVERAL)

    async def unload(self, name: str) -> None:
        """Refused, as above."""
        raise bad_request(_ONE_OF_SEVERAL)


_ONE_OF_SEVERAL = "this is one of several replicas; copy a package to the repository, or take one out: all follow it"


@serve.deployment(
    name="headstart",
    # More than a batch: what Serve holds back cannot share an execution.
    max_ongoing_requests=256,
    health_check_period_s=5,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=_DRAIN_S + 5,
)
class Headstart:
    """A replica: a repository, and the server that answers for it without a socket of its own.

    Args:
        options: of `headstart serve`, by the names of `app`.
    """

    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        options = dict(options)
        token_file = options.pop("token_file", None)
        token = read_token(Path(token_file)) if token_file is not None else None
        open_health = options.pop("open_health", False)
        # Serve gives a replica CPUs; ONNX Runtime would take all of the machine's.
        assigned: dict[str, float] = ray.get_runtime_context().get_assigned_resources()  # type: ignore[no-untyped-call]
        options.setdefault("threads", max(1, int(assigned.get("CPU", 1))))
        if options.get("public_key") is not None:
            options["public_key"] = Path(options["public_key"])
        self._service = _Replica(open_repository(options.pop("repository"), **options))
        # Serve listens, wherever its configuration says: who may ask is not for a loopback address to decide.
        self._server = HttpServer(self._service, HttpSettings(host="0.0.0.0", token=token, open_health=open_health))
        await self._service.start()

    async def __call__(self, request: Request) -> Response:
        """Answer a request; Serve cancels the call when its client goes."""
        scope = request.scope
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        target = quote(path).encode() + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        body = await _read(request, self._server.settings.max_body_bytes)
        found = await answer(self._server, request.method, target, scope["headers"], body)
        response = Response(found.body, found.status)
        # Serve names the request as we do, by what it has handed us, and writes that line itself.
        response.raw_headers = [(name.lower(), value) for name, value in found.headers if name != b"X-Request-Id"]
        return response

    def check_health(self) -> None:
        """Readiness: Serve replaces a replica that raises here."""
        if not self._service.ready():
            raise RuntimeError("the repository has not been read, or the replica is stopping")

    async def close(self) -> None:
        """Answer what is queued, and close the sessions. Serve has stopped sending requests by then."""
        await self._service.stop()
        await self._server.drain(timeout=0)

    def __del__(self) -> Any:
        # Serve awaits what this returns. It has no running service where the constructor failed.
        return self.close() if "_server" in self.__dict__ and self._service.ready() else None


async def _read(request: Request, most: int) -> bytes:
    """The body, as far as it is accepted and some more, by which the server refuses it."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            break
    return bytes(body)


def app(args: dict[str, Any]) -> serve.Application:
    """The application of some options of `headstart serve`, which a configuration has under `args`.

    Args:
        args: `repository` (a folder or URL that every node reaches), and where they are not the defaults `provider`,
            `provider_options`, `threads` (the replica's CPUs), `max_queue`, `max_batch`, `max_delay_ms`, `policy`,
            `public_key`, `drift`, `max_memory`, `token_file`, `open_health`.

    Raises:
        StartError: an option that is none, no repository, or `open_health` that is neither true nor false.
    """
    unknown = sorted(set(args) - _OPTIONS)
    if unknown or "repository" not in args:
        wrong = f"{unknown[0]!r} is no option" if unknown else "repository is missing"
        raise StartError(f"{wrong}; accepted in args: {', '.join(sorted(_OPTIONS))}")
    if not isinstance(args.get("open_health", False), bool):  # a command line's "false" would open it
        raise StartError(f"open_health is {args['open_health']!r}; accepted: true and false in a configuration's args")
    application: serve.Application = Headstart.bind(dict(args))  # type: ignore[attr-defined] # the decorator's
    return application
