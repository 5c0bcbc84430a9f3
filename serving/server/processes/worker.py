"""One of several processes of a server: a whole server on a shared port, with a line to its supervisor.

Started by `supervisor`, as `python -m headstart.serving.server.processes.worker FD NUMBER OPTIONS`.
"""

import asyncio
import contextlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

from headstart.serving.errors import PackageError
from headstart.serving.server.errors import ServeError, unavailable
from headstart.serving.server.models.folder import Opening
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.processes.channel import Channel
from headstart.serving.server.service import Service
from headstart.serving.server.watching.metrics import Metrics


class Link:
    """A worker's way to its supervisor.

    Args:
        end: of the pair of sockets.
        number: the worker's, from 0.
    """

    def __init__(self, end: socket.socket, number: int) -> None:
        self.number = number
        self._end, self._last = end, end.dup()
        self._channel: Channel
        self._serving: asyncio.Task[None]
        self._first: asyncio.Event
        self._second: asyncio.Event
        self.service: SharedService
        """What answers the supervisor's questions."""

    async def open(self, first: asyncio.Event, second: asyncio.Event) -> bool:
        """Begin to answer; sets `first` when the server is to stop or the supervisor has gone, `second` to cut off.

        Returns:
            whether the server serves already: a worker that listens before its models are loaded would then be given
            requests that another one could answer.
        """
        self._first, self._second = first, second
        self._channel = await Channel.open(self._end, self._answer)
        self._serving = asyncio.ensure_future(self._channel.serve())
        self._serving.add_done_callback(lambda done: first.set())
        try:
            joined = await self.ask("join")
        except ServeError:  # it has gone: `first` is set
            return True
        self.service.repository.mirrored = joined["mirrored"]
        self.service.repository.unloaded.update(joined["unloaded"])
        self.service.repository.loading.suspects.update(Opening(*one) for one in joined["suspects"])
        return bool(joined["begun"])

    def ready(self, line: str) -> None:
        """Tell the supervisor that this worker serves, and what the operator may read of it."""
        self._channel.tell("ready", line)

    def refused(self, name: str, versions: list[int]) -> None:
        """Tell the supervisor, which may keep the repository up with a URL, which versions do not load."""
        self._channel.tell("refused", name, versions)

    def opening(self, opening: Opening, done: bool) -> None:
        """Tell the supervisor what is about to be opened, and when it was: one that ends meanwhile ended over it."""
        self._channel.tell("opened" if done else "open", *opening)

    def fail(self, message: str) -> None:
        """Tell the supervisor why this worker does not start: before `open`, or when the loop is over."""
        self._last.setblocking(True)
        with contextlib.suppress(ConnectionError):
            self._last.sendall(json.dumps({"ask": "failed", "with": [message]}).encode() + b"\n")

    async def ask(self, what: str, *arguments: Any) -> Any:
        """Ask the supervisor.

        Raises:
            ServeError: it refuses, or it has gone and this worker is about to stop.
        """
        try:
            return await self._channel.ask(what, *arguments)
        except ConnectionError:
            raise unavailable("the server is shutting down") from None

    async def _answer(self, what: str, arguments: list[Any]) -> Any:
        if what == "stop":
            return self._first.set()
        if what == "cut":
            self._first.set()
            return self._second.set()
        return await self.service.answer(what, arguments)


class SharedService(Service):
    """A worker's service: what is asked of one worker holds for all, and is counted over all."""

    def __init__(self, repository: Repository, link: Link) -> None:
        super().__init__(repository)
        self._link, link.service = link, self
        repository.on_refused, repository.loading.on_opening = link.refused, link.opening
        self._started = asyncio.Event()

    async def start(self) -> None:
        """As `Service`; what the supervisor asks meanwhile waits."""
        await super().start()
        self._started.set()

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        """Load a model in every worker; returns when all have it."""
        self.check_load(parameters)
        await self._link.ask("load", name)

    async def unload(self, name: str) -> None:
        """Take a model down in every worker; returns when all have answered their last request of it."""
        await self._link.ask("unload", name)

    async def statistics(self, name: str | None, version: str | None) -> dict[str, Any]:
        """As `Service`, of all workers."""
        if name:
            self.repository.find(name, version)
        return (await self._whole()).document(name, version)

    async def metrics_text(self) -> bytes:
        """As `Service`, of all workers; what is known of each process has the label `worker`."""
        return (await self._whole()).metrics_text()

    async def _whole(self) -> Metrics:
        found = await self._link.ask("counts")
        workers = found["workers"]
        pids = {str(one["number"]): int(one["pid"]) for one in workers}
        return Metrics.summed([found["gone"], *(one["counts"] for one in workers)], pids, found["restarts"])

    async def answer(self, what: str, arguments: list[Any]) -> Any:
        """What the supervisor asks of this worker alone."""
        if what == "counts":
            return self.metrics.counts()
        await self._started.wait()
        if what == "load":
            await self.repository.load(*arguments)
        else:
            await self.repository.look()  # so that all workers know of the same models
            await self.repository.unload(*arguments)
        return None


def main(fd: str, number: str, options: str) -> int:
    """Serve as one of several workers; returns the exit code."""
    from headstart.serving.server.command import serve

    link = Link(socket.socket(fileno=int(fd)), int(number))
    try:
        return serve(**json.loads(options, object_hook=_path), link=link)
    except PackageError as error:
        link.fail(str(error))
        return error.exit_code


def _path(document: dict[str, Any]) -> Any:
    return Path(document["path"]) if document.keys() == {"path"} else document


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
