"""The clients: requests at a rate that does not wait for answers, and a judge of every answer."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tests.serving.server.tiny_service import infer_body
from tests.serving.soak.versions import TOLERANCE, Version, inputs
from tests.serving.soak.world import NAME

PATIENCE_S = 60.0
_MAX_CONNECTIONS = 800  # the server's own limit is 1024 a process
_TICK_S = 0.005
WANTED = {"name": "logits", "parameters": {"binary_data": True}}


def messages() -> list[bytes]:
    """A whole request for each input."""
    found = []
    for image in inputs():
        body, length = infer_body(image[None], names=["images"], outputs=[WANTED])
        head = f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: {length}\r\n"
        found.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return found


@dataclass
class Tally:
    """What became of the requests."""

    versions: Mapping[int, Version]
    """Those that may answer, by number; it grows while the server runs."""
    killed_at: list[float] = field(default_factory=list)
    """When a worker process was killed."""
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_ms: dict[str, list[float]] = field(default_factory=lambda: {"200": [], "429": []})
    first_answers: dict[int, float] = field(default_factory=dict)
    """When a version was first named by an answer."""
    problems: Counter[str] = field(default_factory=Counter)
    """What must not be."""

    def judge(self, number: int, started: float, status: int, head: bytes, body: bytes) -> None:
        """Count an answer to the request `number`, and say what is wrong with it."""
        taken = (time.monotonic() - started) * 1e3
        self.outcomes[str(status)] += 1
        if status == 200:
            self.latencies_ms["200"].append(taken)
            self._judge_numbers(number, head, body)
            return
        try:
            sentence = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            sentence = ""
        if not sentence:
            self.problems[f"{status} without a sentence"] += 1
        if status == 429:
            self.latencies_ms["429"].append(taken)
            if b"retry-after:" not in head.lower():
                self.problems["429 without Retry-After"] += 1
        elif status != 503 or not self.near_a_kill(started):
            self.problems[f"{status}: {sentence[:200]}"] += 1

    def lost(self, started: float, error: Exception) -> None:
        """Count a request whose connection broke: a killed worker's alone may."""
        self.outcomes["reset"] += 1
        now = time.monotonic()
        if not any(started <= killed + 0.5 and killed <= now <= killed + 2 for killed in self.killed_at):
            self.problems[f"no answer: {type(error).__name__}: {error}"] += 1

    def near_a_kill(self, started: float) -> bool:
        """Whether a worker may just be starting again."""
        return any(-PATIENCE_S <= started - killed <= 15 for killed in self.killed_at)

    def _judge_numbers(self, number: int, head: bytes, body: bytes) -> None:
        length = int(head.lower().split(b"\r\ninference-header-content-length:")[1].split(b"\r\n")[0])
        self._judge_version(number, json.loads(body[:length])["model_version"], body[length:])

    def judge_call(self, number: int, name: str, data: bytes) -> None:
        """Count gRPC's answer to the request `number`: the version that it names, and its numbers."""
        self.outcomes["gRPC OK"] += 1
        self._judge_version(number, name, data)

    def judge_refusal(self, started: float, code: str, sentence: str) -> None:
        """Count a call that gRPC ended with another status than OK."""
        self.outcomes[f"gRPC {code}"] += 1
        if code == "UNAVAILABLE" and self.near_a_kill(started):
            return
        if code != "RESOURCE_EXHAUSTED" or not sentence:
            self.problems[f"gRPC {code}: {sentence[:200]}"] += 1

    def _judge_version(self, number: int, name: str, data: bytes) -> None:
        version = self.versions.get(int(name))
        if version is None:
            self.problems["an answer names a version that was never deployed whole"] += 1
            return
        self.first_answers.setdefault(version.number, time.monotonic())
        expected, found = version.expected[number], np.frombuffer(data, np.float32)
        if found.shape != expected.shape or not is_close(found, expected):
            self.problems[f"a wrong answer of version {version.number}"] += 1


def is_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> bool:
    """Whether numbers are the bare call's but for the rounding of a batch."""
    return bool(np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max())


class Clients:
    """Sends requests over kept connections.

    Args:
        port: of the server.
        tally: judges the answers.
    """

    def __init__(self, port: int, tally: Tally) -> None:
        self._port, self._tally = port, tally
        self._messages = messages()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._open = self._next = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_sent = 0

    async def saturate(self, seconds: float, concurrency: int = 64) -> float:
        """Answers a second to clients that each wait for theirs: the saturation rate."""
        before, end = self._tally.outcomes["200"], time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < end:
                await self.request()

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return (self._tally.outcomes["200"] - before) / seconds

    async def offer(self, rate: float, seconds: float) -> None:
        """So many requests a second, whether or not earlier ones are answered; returns when all are."""
        started, sent = time.monotonic(), 0
        while (now := time.monotonic() - started) < seconds:
            due = int(now * rate)
            for _ in range(min(due - sent, _MAX_CONNECTIONS - len(self._tasks))):
                task = asyncio.create_task(self.request())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                sent += 1
            await asyncio.sleep(_TICK_S)
        await asyncio.gather(*self._tasks)

    async def request(self) -> None:
        """One request and its judgement."""
        self._next = (self._next + 1) % len(self._messages)
        number, started = self._next, time.monotonic()
        self.num_sent += 1
        try:
            async with asyncio.timeout(PATIENCE_S):
                reader, writer = await self._connection()
                writer.write(self._messages[number])
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
                body = await reader.readexactly(length)
        except (OSError, EOFError, TimeoutError) as error:
            self._tally.lost(started, error)
            return
        if b"\r\nconnection: close" in head.lower():
            writer.close()
        else:
            self._idle.append((reader, writer))
        self._tally.judge(number, started, int(head.split(b" ", 2)[1]), head, body)

    def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One that is idle and that the server has not closed, or a new one."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or writer.is_closing() or reader.exception()):
                return reader, writer
            writer.close()
        return await asyncio.open_connection("127.0.0.1", self._port)
