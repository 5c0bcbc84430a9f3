"""One server of several processes on one port: starts them, starts them again, speaks for all, ends them.

Each worker is a whole server that listens on the same port (SO_REUSEPORT: the kernel gives each new connection to one
of them) and is started as a program of its own: ONNX Runtime does not survive a fork. What must hold for all goes
through here: `load` and `unload`, one at a time and in one order; the counts that make `/metrics` and the statistics
those of the whole server; the end. A worker that notices that its supervisor has gone ends as at a SIGTERM.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from headstart.serving import cores
from headstart.serving.server.errors import ServeError, StartError, unavailable
from headstart.serving.server.models.folder import Opening, Refused
from headstart.serving.server.processes.channel import Channel
from headstart.serving.server.processes.ports import ReservedPort
from headstart.serving.server.processes.suspects import Suspects
from headstart.serving.server.scratch import Scratch
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.signals import end_signals
from headstart.serving.server.watching.metrics import added

PROGRAM = "headstart.serving.server.processes.worker"
_FIRST_DELAY, _LONGEST_DELAY = 0.1, 10.0
_CALM = 10.0
"""Seconds after which a worker that ends is started again as quickly as the first time."""
_CUT = 5.0
"""Seconds that a worker is given once it is told to cut off what it does."""
_END = 3 * HttpSettings.drain_timeout
"""Seconds that a worker is given to end at the first signal: more than it waits for its requests and its models."""
_COUNTS, _CHANGE = 1.0, 300.0
"""Seconds that a worker is given to say what it has counted, and to load or unload a model."""
_LOG = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Worker:
    """A process that runs."""

    number: int
    pid: int
    channel: Channel
    joined: bool = False
    """Whether it takes `load` and `unload`: from the moment that it was told what is unloaded."""
    ready: bool = False
    opening: Opening | None = None
    """What it is about to load, and ends over where it ends now."""
    counts: dict[str, Any] = field(default_factory=dict)
    """What it last said that it had counted."""


class Supervisor:
    """Runs the workers of one server; `supervise` makes it.

    Args:
        options: of `command.serve`, for each worker; what JSON cannot hold is a path.
        workers: how many.
        say: is given the ready line when all are ready.
        on_refused: as `Repository.on_refused`, where a mirror keeps the repository; else None.
    """

    def __init__(
        self, options: Mapping[str, Any], workers: int, say: Callable[[str], None], on_refused: Refused | None = None
    ) -> None:
        self._options = json.dumps(options, default=lambda path: {"path": str(path)})
        self._count = workers
        self._say, self._on_refused = say, on_refused
        self._running: dict[int, _Worker] = {}
        self._ready: set[int] = set()
        self._begun = False  # whether all have been ready
        self._failure: str | None = None
        self._restarts = 0
        self._unloaded: set[str] = set()
        self._suspects = Suspects()
        self._gone: dict[str, Any] = {}  # counts of workers that ended
        self._lock = asyncio.Lock()
        self._first, self._second = asyncio.Event(), asyncio.Event()

    async def run(self) -> int:
        """Serve until a signal of `signals.end_signals`; at a second one what is left is cut off. Returns 0.

        Raises:
            StartError: a worker cannot start, for a reason that the operator can mend.
        """
        loop = asyncio.get_running_loop()
        for number in end_signals():
            loop.add_signal_handler(number, lambda: (self._second if self._first.is_set() else self._first).set())
        ending = asyncio.ensure_future(self._end())
        try:
            await asyncio.gather(*(self._keep(number) for number in range(self._count)))
        finally:
            ending.cancel()
        if self._failure is not None:
            raise StartError(self._failure)
        return 0

    async def _keep(self, number: int) -> None:
        """Run a worker, and another in its place when it ends, until the server is to stop."""
        delay = _FIRST_DELAY
        while not self._first.is_set():
            started = monotonic()
            try:
                how = await self._run_worker(number)
            except OSError as error:  # no memory, no process, no file is left
                how = f"cannot be started ({error.strerror})"
            except Exception as error:
                # Of this worker and its link alone: the others serve on.
                _LOG.exception("the link to worker %d failed", number)
                how = f"was lost ({type(error).__name__})"
            if self._first.is_set():
                return
            if monotonic() - started > _CALM:
                delay = _FIRST_DELAY
            self._restarts += 1
            _LOG.error("worker %d %s; it is started again in %g s", number, how, delay)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._first.wait(), delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    async def _run_worker(self, number: int) -> str:
        """Start a worker and wait for its end, which is told in words."""
        with Scratch() as scratch:  # its copies of packages go with it, also where it crashes while it opens one
            return await self._run_in(scratch.path, number)

    async def _run_in(self, folder: Path, number: int) -> str:
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as unused:
            unused.enter_context(ours)
            # -P: a folder that the server is started in holds no modules for it. A group of its own: what a terminal
            # or a shell sends to the group is for the supervisor to pass on, once.
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", PROGRAM, str(theirs.fileno()), str(number), self._options,
                pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL, process_group=0,
                env={**os.environ, "TMPDIR": str(folder)},
            )  # fmt: skip
            unused.pop_all()
        channel = await Channel.open(ours, lambda what, arguments: self._answer(worker, what, arguments))
        worker = self._running[number] = _Worker(number=number, pid=process.pid, channel=channel)
        serving = asyncio.ensure_future(channel.serve())
        if self._first.is_set():
            channel.tell("stop")
        cutting = asyncio.ensure_future(self._cut(process))
        try:
            code = await process.wait()
            await serving  # what it said last
        finally:
            cutting.cancel()
            del self._running[number]
            if worker.opening and not self._first.is_set():
                self._suspects.ended(worker.opening)
            worker.counts.pop("now", None)
            self._gone = added(self._gone, worker.counts)
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"(pid {process.pid}) {how}"

    async def _end(self) -> None:
        """Pass the end on."""
        for event, what in ((self._first, "stop"), (self._second, "cut")):
            await event.wait()
            for worker in self._running.values():
                worker.channel.tell(what)

    async def _cut(self, process: asyncio.subprocess.Process) -> None:
        await self._first.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._second.wait(), _END)
        await asyncio.sleep(_CUT)
        process.kill()

    # What workers ask.

    async def _answer(self, worker: _Worker, what: str, arguments: list[Any]) -> Any:
        if what == "join":
            async with self._lock:
                worker.joined = True
                suspects = self._suspects.found()
                return {
                    "unloaded": sorted(self._unloaded),
                    "suspects": suspects,
                    "begun": self._begun,
                    "mirrored": self._on_refused is not None,
                }
        if what == "ready":
            return self._note_ready(worker, *arguments)
        if what == "failed":
            return self._note_failure(worker, *arguments)
        if what == "counts":
            return await self._counts()
        if what == "open":
            worker.opening = Opening(*arguments)
            return None
        if what == "opened":
            self._suspects.opened(Opening(*arguments))
            worker.opening = None
            return None
        if what == "refused":
            return self._on_refused(*arguments) if self._on_refused else None
        return await self._all(what, *arguments)

    def _note_ready(self, worker: _Worker, line: str) -> None:
        worker.ready = True
        self._ready.add(worker.number)
        if not self._begun and len(self._ready) == self._count:
            self._begun = True
            self._say(f"{line}, with {self._count} workers")

    def _note_failure(self, worker: _Worker, message: str) -> None:
        """A worker that cannot start ends the server at its start; later the others serve on, and it is tried again."""
        if self._begun:
            _LOG.error("worker %d cannot start: %s", worker.number, message)
        elif self._failure is None:
            self._failure = message
            self._first.set()

    async def _all(self, what: str, name: str) -> None:
        """`load` or `unload` a model everywhere; those that start later are told what is unloaded."""
        async with self._lock:
            (self._unloaded.add if what == "unload" else self._unloaded.discard)(name)
            asked = [worker for worker in self._running.values() if worker.joined]
            answers = await _each(asked, _CHANGE, what, name)
            refusals = [one for one in answers if isinstance(one, ServeError)]
            if refusals:
                if what == "unload" and len(refusals) == len(asked):  # there is no such model
                    self._unloaded.discard(name)
                raise refusals[0]
            if late := [one.number for one, answer in zip(asked, answers, strict=True) if type(answer) is TimeoutError]:
                raise unavailable(f"worker {late[0]} does not answer; look at the server's log, or restart the server")

    async def _counts(self) -> dict[str, Any]:
        """What each worker has counted, what those had that ended, and how often one was started again.

        Of a worker that does not answer, what it last said.
        """
        asked = [worker for worker in self._running.values() if worker.ready]
        answers = await _each(asked, _COUNTS, "counts")
        for worker, answer in zip(asked, answers, strict=True):
            if isinstance(answer, dict):
                worker.counts = answer
        # One that ended meanwhile is among those that are gone.
        there = [worker for worker in asked if self._running.get(worker.number) is worker]
        return {
            "workers": [{"number": one.number, "pid": one.pid, "counts": one.counts} for one in there],
            "gone": self._gone,
            "restarts": self._restarts,
        }


async def _each(workers: Sequence[_Worker], seconds: float, what: str, *arguments: Any) -> list[Any]:
    """Ask all at once; an answer may be the exception that there was in its place."""
    asked = (asyncio.wait_for(one.channel.ask(what, *arguments), seconds) for one in workers)
    return await asyncio.gather(*asked, return_exceptions=True)


def supervise(
    options: Mapping[str, Any], workers: int, say: Callable[[str], None], on_refused: Refused | None = None
) -> int:
    """Serve with several processes until a signal of `signals.end_signals`; returns the exit code.

    Args:
        options: of `command.serve`; `port` and `grpc_port` 0 are replaced by free ones, which all workers share, and
            `threads` None by a worker's share of the cores.
        workers: how many, at least 2.
        say: is given one line when all are ready.
        on_refused: as `Repository.on_refused`, told by each worker, where a mirror keeps the repository; else None.

    Raises:
        StartError: a port is in use or may not be used, or a worker cannot start.
    """
    with contextlib.ExitStack() as reserved:
        options = dict(options)
        options["port"] = reserved.enter_context(ReservedPort(options["host"], options["port"], "--port")).port
        if options["grpc_port"] is not None:
            held = reserved.enter_context(ReservedPort(options["host"], options["grpc_port"], "--grpc-port"))
            options["grpc_port"] = held.port
        if options["threads"] is None:
            allowed = len(os.sched_getaffinity(0))
            options["threads"] = max(1, min(allowed, cores.limit() or allowed) // workers)

        async def run() -> int:
            return await Supervisor(options, workers, say, on_refused).run()

        return asyncio.run(run())
