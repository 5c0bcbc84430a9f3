"""Streams of requests: several answered at once, and told in the order in which they came."""

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable

_AT_ONCE = 64
"""Messages of one stream that are worked on; further ones are not read meanwhile, which holds the client up."""


class Streams:
    """The streams of a server.

        async for data in streams.answers(bodies, one):
            yield data
        streams.close()  # no message is read any more, those that were read are answered

    Messages of one stream may share a batch, as those of several do.
    """

    def __init__(self) -> None:
        self._readers: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """End all streams once what they have brought is answered."""
        for reader in self._readers:
            reader.cancel()

    async def answers(
        self, bodies: AsyncIterable[bytes], one: Callable[[bytes], Awaitable[bytes]]
    ) -> AsyncIterator[bytes]:
        """The answers of `one` to a stream's messages; all of its work is cancelled where the client goes.

        What reading a message raises is raised behind the answers to those before it.
        """
        pending: asyncio.Queue[asyncio.Future[bytes] | None] = asyncio.Queue()
        places = asyncio.Semaphore(_AT_ONCE)

        async def read() -> None:
            try:
                async for body in bodies:
                    pending.put_nowait(asyncio.ensure_future(one(body)))
                    await places.acquire()
            finally:
                pending.put_nowait(None)

        reader = asyncio.ensure_future(read())  # over by the time that its last entry is taken
        self._readers.add(reader)
        try:
            while (answer := await pending.get()) is not None:
                yield await answer
                places.release()
            if not reader.cancelled():
                reader.result()  # raises what the reading has raised
        finally:
            self._readers.discard(reader)
            reader.cancel()
            while not pending.empty():
                if left := pending.get_nowait():
                    left.cancel()
