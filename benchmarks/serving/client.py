"""A client that is not the bottleneck: prebuilt requests on kept connections, and answers that are only counted.

HTTP goes through non-blocking sockets and one epoll that does not sleep: a core that sleeps takes .05 to .15 ms to wake
and that would count as the server's. gRPC goes through `grpc.aio`, which sleeps, with bytes that nobody parses.
"""

import asyncio
import math
import select
import socket
import time
from collections.abc import Sequence
from typing import Any

WARM_UP_S = 0.3
"""Of a server that was just started."""
PATIENCE_S = 60.0
"""How long an answer may take before the server counts as stuck."""


class Clock:
    """Counts the answers of one spell: it begins when all clients have had one and the warm-up is over, and lasts so
    many seconds, and until there are two answers a client: a slow server that answers in bursts has too few of them
    in less for a rate.

    The rate is taken between the last answer before it and the last one in it, so that a server that answers in
    bursts gets what it does.
    """

    def __init__(self, concurrency: int, seconds: float, warm_up_s: float) -> None:
        self.latencies_ms: list[float] = []
        """Of the answers that came within the spell."""
        self.num_answers = 0
        """All of them, those of the warm-up as well."""
        self.answers: list[tuple[int, bytes]] = []
        """Each client's request, by number, and the last answer to it."""
        self._waiting, self._seconds, self._least = concurrency, seconds, 2 * concurrency
        self._earliest = time.perf_counter() + warm_up_s
        self._ends, self._before, self._last = math.inf, 0.0, 0.0

    def answered(self, started: float, *, is_first: bool) -> bool:
        """Count an answer; whether its client shall send again."""
        now = time.perf_counter()
        self.num_answers += 1
        self._waiting -= is_first
        if self._ends == math.inf:
            self._before = self._last = now
            if not self._waiting and now >= self._earliest:
                self._ends = now + self._seconds
        elif self._goes_on(now):
            self.latencies_ms.append((now - started) * 1e3)
            self._last = now
        return self._goes_on(now)

    def _goes_on(self, now: float) -> bool:
        return now <= self._ends or len(self.latencies_ms) < self._least

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies_ms) / (self._last - self._before) if self.latencies_ms else 0.0


def ask(port: int, request: bytes) -> bytes:
    """One request on a connection of its own."""
    with _Connection(port) as connection:
        connection.start(request)
        poll = select.poll()
        poll.register(connection.socket, select.POLLIN | select.POLLOUT)
        while (answer := connection.proceed()) is None:
            if not connection.unsent:
                poll.modify(connection.socket, select.POLLIN)
            if not poll.poll(PATIENCE_S * 1000):
                raise TimeoutError(f"no answer within {PATIENCE_S:g} s")
        return answer


def http_load(
    port: int, requests: Sequence[bytes], concurrency: int, seconds: float, warm_up_s: float = WARM_UP_S
) -> Clock:
    """So many connections, each of which sends its next request when its answer is there.

    Raises:
        RuntimeError: an answer other than 200.
        TimeoutError: no answer came for a long time.
        ConnectionError: the server closed a connection.
    """
    poll, connections = select.epoll(), {}
    try:
        for number in range(concurrency):
            connection = _Connection(port)
            connection.number = number % len(requests)
            connections[connection.socket.fileno()] = connection
            poll.register(connection.socket, select.EPOLLIN)
        clock, waiting = Clock(concurrency, seconds, warm_up_s), len(connections)
        for handle, connection in connections.items():
            _send(poll, handle, connection, requests[connection.number])
        heard = time.perf_counter()
        while waiting:
            events = poll.poll(0)
            if events:
                heard = time.perf_counter()
            elif time.perf_counter() - heard > PATIENCE_S:
                raise TimeoutError(f"no answer within {PATIENCE_S:g} s from {waiting} connections")
            for handle, event in events:
                connection = connections[handle]
                answer = connection.proceed()
                if event & select.EPOLLOUT and not connection.unsent:
                    poll.modify(handle, select.EPOLLIN)
                if answer is None:
                    continue
                if clock.answered(connection.started, is_first=connection.num_sent == 1):
                    _send(poll, handle, connection, requests[connection.number])
                else:
                    waiting -= 1
                    clock.answers.append((connection.number, answer))
    finally:
        for connection in connections.values():
            connection.socket.close()
        poll.close()
    return clock


class GrpcChannel:
    """Calls of gRPC on one channel, which is kept since a new one is slow at first; a context."""

    def __init__(self, port: int) -> None:
        import grpc
        import uvloop

        async def opened() -> Any:
            limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
            return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=limits)

        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._channel = self._runner.run(opened())
        self._call = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    def __enter__(self) -> "GrpcChannel":
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._channel.close())
        self._runner.close()

    def load(self, requests: Sequence[bytes], concurrency: int, seconds: float, warm_up_s: float = WARM_UP_S) -> Clock:
        """So many calls at a time, each of which is followed by the next when its answer is there."""
        return self._runner.run(self._load(requests, Clock(concurrency, seconds, warm_up_s), concurrency))

    async def _load(self, requests: Sequence[bytes], clock: Clock, concurrency: int) -> Clock:
        async def client(number: int) -> None:
            is_first = True
            while True:
                started = time.perf_counter()
                answer = await self._call(requests[number], timeout=PATIENCE_S)
                if not clock.answered(started, is_first=is_first):
                    break
                is_first = False
            clock.answers.append((number, answer))

        await asyncio.gather(*(client(index % len(requests)) for index in range(concurrency)))
        return clock


def _send(poll: select.epoll, handle: int, connection: "_Connection", request: bytes) -> None:
    connection.start(request)
    if connection.unsent:
        poll.modify(handle, select.EPOLLIN | select.EPOLLOUT)


class _Connection:
    """A kept connection with one request on its way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.unsent = memoryview(b"")
        self.started = 0.0
        self.number = self.num_sent = 0
        self._received, self._whole = b"", 0

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def start(self, request: bytes) -> None:
        """Send what the kernel takes."""
        self._received, self._whole, self.unsent = b"", 0, memoryview(request)
        self.num_sent += 1
        self.started = time.perf_counter()
        self._flush()

    def proceed(self) -> bytes | None:
        """Send and read what can be; the whole answer once it is there."""
        if self.unsent:
            self._flush()
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionError("the server closed the connection")
        self._received = self._received + data if self._received else data
        if not self._whole:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return None
            self._whole = end + 4 + _content_length(self._received[:end])
        return self._received if len(self._received) >= self._whole else None

    def _flush(self) -> None:
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            pass


def _content_length(head: bytes) -> int:
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"the server answered {head[:200].decode(errors='replace')!r}")
    lowered = head.lower()
    start = lowered.find(b"\r\ncontent-length:")
    if start < 0:
        raise RuntimeError("the answer has no Content-Length")
    return int(lowered[start + 17 :].split(b"\r\n", 1)[0])
