"""Questions and answers between a supervisor and its workers: JSON, one document a line, over a socket, either way."""

import asyncio
import itertools
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from headstart.serving.server.errors import ServeError

_LONGEST_LINE = 1 << 26  # the counts of very many models
_LOG = logging.getLogger(__name__)

Answer = Callable[[str, list[Any]], Awaitable[Any]]
"""Answers a question by its name and arguments; a `ServeError` is raised again where it was asked."""


class Channel:
    """One end of a connection between two processes of one server; belongs to the running loop.

        channel = await Channel.open(end, answer)
        serving = asyncio.ensure_future(channel.serve())  # ends when the other side does
        counts = await channel.ask("counts")

    Args:
        reader, writer: of the socket.
        answer: what the other side asks.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Answer) -> None:
        self._reader, self._writer, self._answer = reader, writer, answer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()
        self._open = True

    @classmethod
    async def open(cls, end: socket.socket, answer: Answer) -> "Channel":
        """A channel over one end of a pair of sockets."""
        reader, writer = await asyncio.open_unix_connection(sock=end, limit=_LONGEST_LINE)
        return cls(reader, writer, answer)

    async def ask(self, what: str, *arguments: Any) -> Any:
        """Ask the other side.

        Raises:
            ServeError: it refuses.
            ConnectionError: it has gone.
        """
        if not self._open:
            raise ConnectionError("the other process has gone")
        number = next(self._numbers)
        self._waiting[number] = future = asyncio.get_running_loop().create_future()
        self._send({"ask": what, "with": arguments, "number": number})
        try:
            return await future
        finally:
            self._waiting.pop(number, None)  # also where it is no longer waited for

    def tell(self, what: str, *arguments: Any) -> None:
        """Say what needs no answer; where the other side has gone, nothing."""
        if self._open:
            self._send({"ask": what, "with": arguments})

    async def serve(self) -> None:
        """Answer until the other side has gone or `close` is called."""
        try:
            # One that is killed while it writes leaves half a line.
            while (line := await self._reader.readline()).endswith(b"\n"):
                document = json.loads(line)
                if "ask" in document:
                    task = asyncio.ensure_future(self._respond(**{"number": None, **document}))
                    self._answering.add(task)
                    task.add_done_callback(self._answering.discard)
                else:
                    self._settle(**document)
        except (ConnectionError, ValueError):
            pass  # the same as its end, and so is a line that is too long or no JSON: what follows cannot be understood
        finally:
            self.close()

    def close(self) -> None:
        """Hang up; whoever waits for an answer is told that there will be none."""
        self._open = False
        self._writer.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ConnectionError("the other process has gone"))

    async def _respond(self, ask: str, number: int | None, **rest: Any) -> None:
        answer: dict[str, Any] = {"number": number}
        try:
            answer["result"] = await self._answer(ask, rest["with"])
        except ServeError as error:
            answer["refused"] = [error.status, error.message, error.grpc, error.retry_after]
        except Exception as error:
            # The other side waits: whatever went wrong here must reach it.
            _LOG.exception("%r was not answered", ask)
            answer["refused"] = [500, f"a process of the server failed ({type(error).__name__})", "INTERNAL", None]
        if number is not None and self._open:
            self._send(answer)

    def _settle(self, number: int, result: Any = None, refused: list[Any] | None = None) -> None:
        future = self._waiting.get(number)
        if future is None or future.done():
            return
        if refused is None:
            future.set_result(result)
        else:
            status, message, grpc, retry_after = refused
            future.set_exception(ServeError(status, message, grpc=grpc, retry_after=retry_after))

    def _send(self, document: dict[str, Any]) -> None:
        self._writer.write(json.dumps(document, separators=(",", ":")).encode() + b"\n")
