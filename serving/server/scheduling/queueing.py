"""The queue of one model: bounded, by priority and arrival, with requests of one shape side by side."""

import asyncio
from heapq import heapify, heappop, heappush
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING

from headstart.serving.server.scheduling.signature import Key

if TYPE_CHECKING:
    from headstart.serving.server.wire.protocol import InferRequest, InferResponse

_FORGET_S = 0.01  # between two searches of a full queue for clients that have gone


class Waiting:
    """A request in the queue.

    Args:
        names: outputs to compute.
        rows: of its inputs.
        num_bytes: of its inputs.
        arrived: `perf_counter_ns`.
        future: of its answer.
    """

    __slots__ = ("arrived", "future", "names", "num_bytes", "request", "rows")

    def __init__(
        self,
        request: "InferRequest",
        names: list[str],
        rows: int,
        num_bytes: int,
        arrived: int,
        future: "asyncio.Future[InferResponse]",
    ) -> None:
        self.request, self.names, self.rows, self.num_bytes = request, names, rows, num_bytes
        self.arrived, self.future = arrived, future

    @property
    def gone(self) -> bool:
        """Whether nobody waits for its answer."""
        return self.request.cancelled or self.future.done()

    def late(self, now: float) -> bool:
        """Whether its deadline has passed; `now` is `monotonic` seconds."""
        deadline = self.request.deadline
        return deadline is not None and deadline <= now


class Budget:
    """Bytes of the inputs of all requests that wait, in the queues of all models.

    Args:
        max_bytes: of them; one request may be larger when nothing waits.
    """

    def __init__(self, max_bytes: int) -> None:
        self.held = 0
        """Bytes that wait."""
        self._max_bytes = max_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether so many more may wait."""
        return not self.held or self.held + num_bytes <= self._max_bytes


class Queue:
    """Requests that wait, a heap for each key; requests of one key can share a batch.

    Args:
        max_requests: that may wait.
        budget: of the bytes of their inputs.
    """

    def __init__(self, *, max_requests: int, budget: Budget) -> None:
        self.depth = 0
        """Requests that wait."""
        self._max_requests, self._budget = max_requests, budget
        self._heaps: dict[Key, list[tuple[int, int, Waiting]]] = {}  # -priority, order of arrival, request
        self._order = count()
        self._searched = 0.0

    def __bool__(self) -> bool:
        return bool(self._heaps)

    def has_room(self, num_bytes: int) -> bool:
        """Whether another request may wait."""
        return self.depth < self._max_requests and self._budget.has_room(num_bytes)

    def push(self, key: Key, item: Waiting) -> None:
        """Let a request wait."""
        heappush(self._heaps.setdefault(key, []), (-item.request.priority, next(self._order), item))
        self.depth += 1
        self._budget.held += item.num_bytes

    def next_key(self, max_rows: int, latest_arrival: int | None) -> tuple[Key, int]:
        """The key whose batch is next, and the `arrived` of its oldest request.

        Args:
            max_rows: rows that fill a batch.
            latest_arrival: a batch that is not full and whose oldest request arrived later goes behind the others;
                None: none does.
        """
        if latest_arrival is None:
            return min(self._heaps, key=lambda key: self._heaps[key][0][:2]), 0
        ranked = []
        for key, heap in self._heaps.items():
            full = sum(entry[2].rows for entry in heap) >= max_rows
            oldest = 0 if full else min(entry[2].arrived for entry in heap)
            ranked.append((oldest > latest_arrival, *heap[0][:2], key, oldest))
        *_, key, oldest = min(ranked, key=lambda row: row[:3])
        return key, oldest

    def waiting(self, key: Key, max_rows: int) -> int:
        """The rows that wait for a batch of this key, or `max_rows` where there are more."""
        return min(sum(entry[2].rows for entry in self._heaps[key][:max_rows]), max_rows)

    def take(self, key: Key, max_rows: int) -> tuple[list[Waiting], list[Waiting], list[Waiting]]:
        """Take a batch: in order of priority and arrival, until one does not fit.

        Returns:
            the batch, those that nobody waits for, and those whose deadline has passed.
        """
        heap, rows, now = self._heaps[key], 0, monotonic()
        batch: list[Waiting] = []
        gone: list[Waiting] = []
        late: list[Waiting] = []
        while heap:
            item = heap[0][2]
            if batch and rows + item.rows > max_rows:
                break
            heappop(heap)
            self._forget(item)
            if item.gone:
                gone.append(item)
            elif item.late(now):
                late.append(item)
            else:
                batch.append(item)
                rows += item.rows
        if not heap:
            del self._heaps[key]
        return batch, gone, late

    def take_gone(self) -> list[Waiting]:
        """Take those that nobody waits for, but not again within 10 ms: a full queue must answer quickly."""
        now = monotonic()
        if now - self._searched < _FORGET_S:
            return []
        self._searched = now
        gone = []
        for key, heap in list(self._heaps.items()):
            gone += [entry[2] for entry in heap if entry[2].gone]
            heap[:] = [entry for entry in heap if not entry[2].gone]
            heapify(heap)
            if not heap:
                del self._heaps[key]
        for item in gone:
            self._forget(item)
        return gone

    def clear(self) -> list[Waiting]:
        """Take all."""
        items = [entry[2] for heap in self._heaps.values() for entry in heap]
        self._heaps.clear()
        for item in items:
            self._forget(item)
        return items

    def _forget(self, item: Waiting) -> None:
        self.depth -= 1
        self._budget.held -= item.num_bytes
