"""The scheduler of one model: on the event loop when it is idle and short, in a thread and in batches otherwise.

A request that finds nothing running runs where it arrived, if the model is known to be short, or somewhat longer where
no other client is connected: a thread costs a tenth of a millisecond. Requests that arrive together, in one turn of the
event loop or while a batch is running, share the next batch, which takes as many as pay (`sizes`). No timer is needed
for that, and none runs by default.
"""

import asyncio
import logging
from collections.abc import Iterable
from time import monotonic, perf_counter_ns, time_ns

from headstart.serving.server.errors import ServeError, timeout, too_many, unavailable
from headstart.serving.server.scheduling.batch import Batch, Costs, Runnable, failure, response
from headstart.serving.server.scheduling.queueing import Budget, Queue, Waiting
from headstart.serving.server.scheduling.signature import Signature
from headstart.serving.server.scheduling.sizes import BatchSizes
from headstart.serving.server.scheduling.threads import Threads
from headstart.serving.server.watching.statistics import Statistics
from headstart.serving.server.watching.watch import CLIENT_GONE
from headstart.serving.server.wire.protocol import InferRequest, InferResponse

SHORT_NS = 2_000_000
"""A model that takes less on average may hold up the event loop; other connections wait as long."""
ALONE_NS = 20_000_000
"""The same where the request's client is the only one: who connects just then waits as long."""
_CALM_AFTER = 8  # turns with a single request before the next may run where it arrived

_LOG = logging.getLogger(__name__)


class Scheduler:
    """Takes the requests of one model; belongs to the event loop that it is made on.

        scheduler = Scheduler(model, max_batch=16, max_queue=256)
        answer = scheduler.infer(request)  # an InferResponse, or a future of one
        scheduler.stop_accepting()
        await scheduler.drained()
        scheduler.close()

    Args:
        model: what runs.
        max_batch: rows of one execution, and of one request.
        max_delay_s: seconds that a batch may wait to be filled; 0 starts it at once.
        max_queue: requests that may wait.
        budget: of the bytes of their inputs, which other models may share.
        threads: batches that may run at once, each in a thread.
        statistics: where to count.
        known: (bytes of the input, ns) of calls already timed, such as the warm-up's.
    """

    def __init__(
        self,
        model: Runnable,
        *,
        max_batch: int,
        max_queue: int,
        max_delay_s: float = 0.0,
        budget: Budget | None = None,
        threads: int = 1,
        statistics: Statistics | None = None,
        known: Iterable[tuple[int, int]] = (),
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_queue", max_queue), ("threads", threads)):
            if value < 1:
                raise ValueError(f"{name} is {value}; accepted: at least 1")
        self.model = model
        self.signature = Signature(model.name, model.inputs, model.outputs, max_batch)
        self.statistics = statistics or Statistics(model.name, model.version)
        self._run = model.run
        self._budget = budget or Budget(1 << 30)
        self._queue = queue = Queue(max_requests=max_queue, budget=self._budget)
        # Of the queue alone: a cycle with the model in it would be kept by `gc.freeze`.
        self.statistics.depth = lambda: queue.depth
        self._max_delay_ns = int(max_delay_s * 1e9)
        self._loop = asyncio.get_running_loop()
        self._running = 0
        self._ran: list[tuple[bool, int, int, int, int, int]] = []
        """What ran on the event loop in this turn of it: if a part, rows, bytes, when it arrived, began and ended."""
        self._dispatching = self._stopping = False
        self._crowded = 0
        self._timer: asyncio.TimerHandle | None = None
        self._seconds_per_request = 0.0
        self._idle = asyncio.Event()
        self._idle.set()
        self._costs = Costs()
        self._sizes = BatchSizes(max_batch)
        for num_bytes, nanoseconds in known:
            self._costs.learn(num_bytes, nanoseconds)
        self._threads = Threads(model, self.signature, threads)

    def infer(self, request: InferRequest) -> InferResponse | asyncio.Future[InferResponse]:
        """Answer at once, or say when.

        A request whose `cancelled` is set, or whose future is cancelled, is dropped when its turn comes. Outputs
        of batched requests are views of one array.

        Raises:
            ServeError: here or from the future. 400: it does not fit the model. 429: the queue is full. 503: the
                scheduler has stopped accepting, or the machine gives no thread. 504: its deadline passed before it
                ran. 500: the model failed.
        """
        arrived = perf_counter_ns()
        try:
            rows, key = self.signature.check(request)
            if self._stopping:
                raise unavailable(f"{self.model.name} version {self.model.version} is being taken down; try again")
            if request.deadline is not None and request.deadline <= monotonic():
                raise timeout("the deadline had passed when the request arrived")
            num_bytes = sum([array.nbytes for array in request.inputs.values()])
            names = self.signature.wanted(request)
            if (
                not self._queue
                and not self._running
                and not self._max_delay_ns
                and not (self.signature.batchable and (self._crowded or self._ran))
                and self._costs.below(ALONE_NS if request.alone else SHORT_NS, num_bytes)
            ):
                return self._run_here(request, names, rows, num_bytes, arrived)
            self._make_room(num_bytes)
        except ServeError as error:
            self._failed(request, error, arrived)
            raise
        if self._ran:
            self._crowded = _CALM_AFTER
        item = Waiting(request, names, rows, num_bytes, arrived, self._loop.create_future())
        self._queue.push(key if self.signature.batchable else (), item)
        self._idle.clear()
        if not self._dispatching and self._running < self._threads.limit:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)
        return item.future

    def stop_accepting(self) -> None:
        """Refuse new requests with 503; those that wait are still answered, and wait for no batch to be filled."""
        self._stopping = True
        if self._queue and not self._dispatching:
            self._dispatching = True
            self._loop.call_soon(self._dispatch)

    async def drained(self) -> None:
        """Return when nothing waits or runs, and all is counted."""
        await self._idle.wait()
        self._turn_over()

    def close(self) -> None:
        """End the threads, each after the batch that it runs; what still waits is refused."""
        self._stopping = True
        if self._timer:
            self._timer.cancel()
        for item in self._queue.clear():
            self._refuse(item, unavailable(f"{self.model.name} was taken down before the request's turn came"))
        self._threads.close()

    def _run_here(
        self, request: InferRequest, names: list[str], rows: int, num_bytes: int, arrived: int
    ) -> InferResponse:
        started = perf_counter_ns()
        try:
            outputs = self._run(request.inputs, names)
        except Exception as error:  # anything that a graph can raise
            raise failure(self.model, error, request.request_id) from error
        ended = perf_counter_ns()
        if not self._ran:
            self._loop.call_soon(self._turn_over)
        self._ran.append((request.part, rows, num_bytes, arrived, started, ended))
        # Cold, `dict` and `zip` take 20 us.
        named = {names[0]: outputs[0]} if len(names) == 1 else dict(zip(names, outputs, strict=True))
        return response(self.model, request, named, arrived, started, ended)

    def _turn_over(self) -> None:
        """Count what ran in the last turn, now that the answers are sent.

        What counts is cold after a long model: between the run and the answer it would take .09 ms (MobileNetV2).
        """
        ran, self._ran = self._ran, []
        for part, rows, num_bytes, arrived, started, ended in ran:
            self._costs.learn(num_bytes, ended - started)
            self.statistics.executed(rows, ended - started)
            self._count(part, rows, arrived, started, ended, ended - arrived)

    def _make_room(self, num_bytes: int) -> None:
        """Raise 429 where the queue is full, after looking for clients that have gone."""
        if self._queue.has_room(num_bytes):
            return
        for item in self._queue.take_gone():
            self._drop(item)
        if self._queue.has_room(num_bytes):
            return
        depth = self._queue.depth
        wait_s = min(max(depth * self._seconds_per_request, 0.001), 60.0) if self._seconds_per_request else 1.0
        raise too_many(
            f"the queue of {self.model.name} is full ({depth} requests wait, {self._budget.held >> 20} MiB with those "
            f"of other models); try again in {wait_s:.3g} s",
            retry_after=wait_s,
        )

    def _dispatch(self) -> None:
        """Start what can be started."""
        self._dispatching = False
        while self._queue and self._running < self._threads.limit:
            batch = self._next()
            if batch is None:
                return
            if not batch.items:
                continue
            self._crowded = _CALM_AFTER if len(batch.items) > 1 else max(0, self._crowded - 1)
            if not self._running and self._costs.below(SHORT_NS, batch.num_bytes):
                batch.execute(self.model, self.signature)
                self._settle(batch)
                if self._queue and not self._dispatching:  # others first: sockets, timers
                    self._dispatching = True
                    self._loop.call_soon(self._dispatch)
                return
            if not self._threads.ready():
                for item in batch.items:
                    self._refuse(item, unavailable("the server is out of threads for this request"))
                continue
            self._running += 1
            self._threads.run(batch, self._finished)
        self._note_idle()

    def _timer_over(self) -> None:
        self._timer = None
        self._dispatch()

    def _next(self) -> Batch | None:
        """The next batch, which may turn out empty; None where the timer is left to start it."""
        latest = None
        if self._max_delay_ns and not self._stopping:
            latest = perf_counter_ns() - self._max_delay_ns
        key, oldest = self._queue.next_key(self.signature.max_batch, latest)
        if latest is not None and oldest > latest:
            if self._timer is None:
                self._timer = self._loop.call_later((oldest - latest) * 1e-9, self._timer_over)
            return None
        limit = self.signature.max_batch if self.signature.batchable else 1
        if limit > 1 and not self._max_delay_ns:  # who lets batches wait to be filled wants them full
            limit = self._sizes.limit(key, self._queue.waiting(key, limit))
        items, gone, late = self._queue.take(key, limit)
        for item in gone:
            self._drop(item)
        for item in late:
            self._refuse(item, timeout("the deadline passed while the request waited in the queue"))
        return Batch(items, key)

    def _drop(self, item: Waiting) -> None:
        if not item.request.part:
            self.statistics.failed(CLIENT_GONE, perf_counter_ns() - item.arrived)
        item.future.cancel()

    def _refuse(self, item: Waiting, error: ServeError) -> None:
        self._failed(item.request, error, item.arrived)
        if item.gone:
            item.future.cancel()
        else:
            item.future.set_exception(error)

    def _finished(self, batch: Batch) -> None:
        """A thread has run a batch: the next one starts before this one's answers are sent."""
        self._running -= 1
        if self._queue and not self._dispatching:
            self._dispatch()
        self._settle(batch)

    def _settle(self, batch: Batch) -> None:
        """Hand each request what is its own."""
        for rows, nanoseconds in batch.executions:
            self.statistics.executed(rows, nanoseconds)
        if len(batch.executions) == 1:
            self._costs.learn(batch.num_bytes, batch.ended - batch.started)
            if self.signature.batchable:
                self._sizes.learn(batch.key, batch.rows, batch.ended - batch.started)
        spent = (batch.ended - batch.started) * 1e-9 / len(batch.items)
        self._seconds_per_request += (0.2 if self._seconds_per_request else 1.0) * (spent - self._seconds_per_request)
        for item, answer in zip(batch.items, batch.answers, strict=True):
            if isinstance(answer, Exception):
                self._refuse(item, failure(self.model, answer, item.request.request_id))
            elif item.gone:
                self._drop(item)
            else:
                answered = response(self.model, item.request, answer, item.arrived, batch.started, batch.ended)
                total = perf_counter_ns() - item.arrived
                self._count(item.request.part, item.rows, item.arrived, batch.started, batch.ended, total)
                item.future.set_result(answered)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._queue and not self._running:
            self._idle.set()

    def _failed(self, request: InferRequest, error: ServeError, arrived: int) -> None:
        """Count a request that was not answered; a part is counted with the whole."""
        if not request.part:
            self.statistics.refused(error, perf_counter_ns() - arrived)

    def _count(self, part: bool, rows: int, arrived: int, started: int, ended: int, total: int) -> None:
        """Count a request that was answered, and of a part the rows alone."""
        if part:
            self.statistics.rows += rows
            return
        self.statistics.answered(rows, started - arrived, ended - started, total, time_ns() // 1_000_000)
