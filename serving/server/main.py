"""A serving process: start, serve until it is told to stop, drain, end."""

import asyncio
import atexit
import gc
import logging
import os
import resource
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvloop

from headstart.serving.server.errors import StartError
from headstart.serving.server.interface import InferenceService
from headstart.serving.server.scheduling.threads import THREAD_PREFIX
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.signals import end_signals
from headstart.serving.server.transport.http import serve_http
from headstart.serving.server.watching.watch import Watch

if TYPE_CHECKING:
    from headstart.serving.server.processes.worker import Link
    from headstart.serving.server.transport.grpc import GrpcServer
    from headstart.serving.server.transport.http import HttpServer

log = logging.getLogger(__name__)

_OTHER_FILES = 256
"""Room for what a process has open beside its connections: models, logs, the repository, gRPC's own."""
_GRACE = 0.5
"""Seconds for which a thread within ONNX Runtime is waited for at the end."""


@dataclass(frozen=True, kw_only=True)
class Ports:
    """Where a server that is ready listens."""

    port: int
    """HTTP's port."""
    grpc_port: int | None
    """gRPC's port; None where it is not served."""


def run(
    settings: HttpSettings,
    service: InferenceService,
    *,
    on_ready: Callable[[Ports], None] | None = None,
    link: "Link | None" = None,
    watch: Watch | None = None,
) -> int:
    """Serve until a signal of `signals.end_signals`, and return the exit code.

    The port opens before the models load, so that a taken one is told at once and liveness can be probed while
    readiness says no; only a worker that takes another's place opens it last. At the signal the server stops
    accepting, answers what it has begun and returns 0; a second signal cuts off what is left. Where ONNX Runtime is
    still at work then, as on a model that is being loaded, the process ends here: nothing can interrupt that, and an
    interpreter that comes to its end meanwhile crashes (SIGSEGV, SIGABRT).

    Args:
        settings: of the HTTP server, and of gRPC's where `grpc_port` is set.
        service: is started and stopped here.
        on_ready: called with the ports once the models are loaded and warm.
        link: to the supervisor, where this is one of several processes; the supervisor's word is the second signal.
        watch: is shown every request that was answered, and is closed here.

    Raises:
        StartError: the server cannot listen, or gRPC is asked for and not installed.
    """
    _allow_files(settings)
    try:
        code = uvloop.run(_serve(settings, service, on_ready, link, watch))
    finally:
        if watch is not None:
            watch.close()
    working = [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_PREFIX)]
    for thread in working:
        thread.join(_GRACE)
    if any(thread.is_alive() for thread in working):
        atexit._run_exitfuncs()
        os._exit(code)
    return code


def hold_standard_files() -> None:
    """Open those of stdin, stdout and stderr that are closed: what libuv opens would lie there, and it aborts a process
    that has it close one of these, as at the end.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one


def _allow_files(settings: HttpSettings) -> None:
    """Raise the limit of open files, as a process may: the usual 1,024 are what its connections alone take.

    Without one that is left no package is read, and a connection too many is cut off instead of told 503. There is room
    for four times the connections, for those that are within TLS's handshake or told 503, and for gRPC's.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 4 * settings.max_connections
    if hard != resource.RLIM_INFINITY and hard < most:
        most = hard
        if hard < settings.max_connections + _OTHER_FILES:
            log.warning(
                "this process may open %d files, which %d connections and its own would pass: clients are cut off "
                "then, and packages not read; raise its limit (LimitNOFILE=, --ulimit nofile=, ulimit -Hn)",
                hard, settings.max_connections,
            )  # fmt: skip
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def _serve(
    settings: HttpSettings,
    service: InferenceService,
    on_ready: Callable[[Ports], None] | None,
    link: "Link | None",
    watch: Watch | None,
) -> int:
    loop = asyncio.get_running_loop()
    first, second = asyncio.Event(), asyncio.Event()
    for number in end_signals():
        # A service manager may signal the supervisor and the workers: for a worker that is one end, not two.
        loop.add_signal_handler(number, lambda: (second if first.is_set() and link is None else first).set())
    servers: list[HttpServer | GrpcServer] = []

    async def listen() -> None:
        servers.append(await serve_http(service, settings, watch))
        if settings.grpc_port is not None:
            servers.append(await _serve_grpc(service, settings, watch))

    late = link is not None and await link.open(first, second)
    try:
        if not late:
            await listen()
        if await _unless(first, service.start()):
            if late:
                await listen()
            gc.collect()
            gc.freeze()  # the collector need not walk what lives as long as the process
            if on_ready is not None:
                ports = [server.port for server in servers]
                on_ready(Ports(port=ports[0], grpc_port=ports[1] if len(ports) > 1 else None))
            await first.wait()
        log.info("stopping: no new connections, requests in flight are answered")
        for server in servers:
            server.close()
        if not await _unless(second, _drain(servers)):
            await _drain(servers, timeout=0)
    finally:
        await _drain(servers, timeout=0)
        await service.stop()
    return 0


async def _drain(servers: "list[HttpServer | GrpcServer]", timeout: float | None = None) -> None:
    """Stop accepting on all of them, then wait until their requests are answered, or `timeout` seconds."""
    await asyncio.gather(*(server.drain(timeout) for server in servers))


async def _serve_grpc(service: InferenceService, settings: HttpSettings, watch: Watch | None) -> "GrpcServer":
    try:
        from headstart.serving.server.transport.grpc import serve_grpc
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("grpc", "google"):
            raise
        raise StartError(
            "gRPC is asked for and its libraries are not installed; "
            "run `pip install grpcio protobuf`, or leave --grpc-port out"
        ) from error
    return await serve_grpc(service, settings, watch)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, object]) -> bool:
    """Do `work`, and cancel it when `stop` comes first; whether it was done."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        working.cancel()
        await asyncio.wait((working,))
        return False
    finally:
        stopping.cancel()
