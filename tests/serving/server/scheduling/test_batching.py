"""The scheduler: where a request runs, who shares its batch, and what it is told when it cannot run."""

import asyncio
import functools
import gc
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from headstart.serving.device import Device
from headstart.serving.manifest import Tensor
from headstart.serving.server.errors import ServeError
from headstart.serving.server.models.model import LoadedModel, load_graph
from headstart.serving.server.scheduling import batching, queueing
from headstart.serving.server.scheduling.queueing import Budget, Queue, Waiting
from headstart.serving.server.scheduling.signature import Signature
from headstart.serving.server.watching.metrics import Metrics
from headstart.serving.server.wire.protocol import DATATYPES, InferRequest, InferResponse, RequestedOutput
from tests.serving.server.graphs import identities, mlp

OPEN: list["Scheduler"] = []


class Scheduler(batching.Scheduler):
    """One that is closed when its test ends."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        OPEN.append(self)


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine; one that hangs fails after 20 s."""

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        async def play() -> None:
            try:
                await asyncio.wait_for(test(*arguments, **named), 20)
            finally:
                while OPEN:
                    OPEN.pop().close()

        asyncio.run(play())

    return run


class Doubling:
    """`x` float32 [batch, width] -> `y` = 2 x; a negative value makes it fail, `gate` makes it wait."""

    name, version, labels = "doubling", "7", None
    inputs = (Tensor(name="x", dtype="float32", shape=("batch", "width")),)
    outputs = (Tensor(name="y", dtype="float32", shape=("batch", "width")),)

    def __init__(self, seconds: float = 0.0, gate: threading.Event | None = None) -> None:
        self.seconds, self.gate = seconds, gate
        self.ran: list[np.ndarray] = []
        self.threads: list[int] = []

    def run(self, feed: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        self.threads.append(threading.get_ident())
        self.ran.append(feed["x"])
        if self.gate:
            assert self.gate.wait(10)
        time.sleep(self.seconds)
        if (feed["x"] < 0).any():
            raise RuntimeError("Non-zero status code in /secret/place/model.onnx")
        return [feed["x"] * 2 for _ in outputs]


def ask(*rows: float, width: int = 3, **fields: Any) -> InferRequest:
    """A request with one row for each value."""
    return InferRequest(model="m", inputs={"x": np.repeat(np.float32(rows)[:, None], width, 1)}, **fields)


async def answer(given: Any) -> InferResponse:
    return given if isinstance(given, InferResponse) else await given


async def outcome(given: Any) -> Any:
    """The first column of the answer, or the status of the refusal."""
    try:
        return (await answer(given)).outputs["y"][:, 0].tolist()
    except ServeError as error:
        return error.status
    except asyncio.CancelledError:
        return "cancelled"


def refusal(scheduler: Scheduler, request: InferRequest) -> ServeError:
    with pytest.raises(ServeError) as caught:
        scheduler.infer(request)
    return caught.value


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def calm(scheduler: Scheduler) -> None:
    """One request after another, until they are known to be short and alone."""
    for _ in range(30):
        await answer(scheduler.infer(ask(1)))
        await turns()


@pytest.fixture(scope="module")
def network() -> LoadedModel:
    return load_graph(mlp(), name="mlp", device=Device(threads=1), max_batch=32)


@on_a_loop
async def test_an_idle_scheduler_keeps_no_request_and_a_closed_one_no_model():
    """Without the collector, which `gc.freeze` keeps from what was there when the server was ready."""

    class Forgetful(Doubling):
        def run(self, feed: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
            return [feed["x"] * 2]

    gc.disable()
    try:
        scheduler, request = batching.Scheduler(Forgetful(), max_batch=4, max_queue=4), ask(1)
        statistics, left = scheduler.statistics, [weakref.ref(request.inputs["x"]), weakref.ref(scheduler.model)]
        await answer(scheduler.infer(request))
        del request
        await until(lambda: left[0]() is None)
        await scheduler.drained()
        scheduler.close()
        del scheduler
        await until(lambda: left[1]() is None)
        assert statistics.depth() == 0
    finally:
        gc.enable()


@on_a_loop
async def test_the_first_calls_run_in_a_thread_and_then_a_short_model_runs_at_once():
    model = Doubling()
    scheduler = Scheduler(model, max_batch=4, max_queue=8)
    first = scheduler.infer(ask(1))
    assert not isinstance(first, InferResponse)
    await first
    assert model.threads[0] != threading.get_ident()
    await calm(scheduler)
    given = scheduler.infer(ask(21))
    assert isinstance(given, InferResponse)
    assert given.outputs["y"].tolist() == [[42, 42, 42]]
    assert (given.model, given.version, set(given.timings_ns)) == ("doubling", "7", {"queue", "compute"})
    assert model.threads[-1] == threading.get_ident()


@on_a_loop
async def test_a_long_model_never_holds_up_the_event_loop():
    model = Doubling(seconds=0.02)
    scheduler = Scheduler(model, max_batch=4, max_queue=8)
    ticks = 0
    for _ in range(6):
        given = scheduler.infer(ask(1))
        while not given.done():
            await asyncio.sleep(0.001)
            ticks += 1
    assert threading.get_ident() not in model.threads
    assert ticks > 12  # it would be 6 at most


@on_a_loop
async def test_a_model_of_some_milliseconds_runs_at_once_for_the_only_client():
    model = Doubling()
    scheduler = Scheduler(model, max_batch=4, max_queue=8, known=[(12, 8_000_000)] * 8)
    given = scheduler.infer(ask(1))
    assert not isinstance(given, InferResponse)
    await given
    await turns()
    assert isinstance(scheduler.infer(ask(1, alone=True)), InferResponse)
    scheduler = Scheduler(model, max_batch=4, max_queue=8, known=[(12, 30_000_000)] * 8)
    given = scheduler.infer(ask(1, alone=True))
    assert not isinstance(given, InferResponse)
    await given


@on_a_loop
async def test_small_requests_that_are_short_say_nothing_of_large_ones():
    model = Doubling()
    scheduler = Scheduler(model, max_batch=4, max_queue=8)
    await calm(scheduler)
    assert isinstance(scheduler.infer(ask(1)), InferResponse)
    await turns()
    large = scheduler.infer(ask(1, width=10_000))
    assert not isinstance(large, InferResponse)
    await large


@on_a_loop
async def test_calls_timed_before_are_known():
    scheduler = Scheduler(Doubling(), max_batch=4, max_queue=8, known=[(12, 50_000)] * 3)
    assert isinstance(scheduler.infer(ask(1)), InferResponse)
    scheduler = Scheduler(Doubling(), max_batch=4, max_queue=8, known=[(12, 5_000_000)] * 3)
    assert not isinstance(scheduler.infer(ask(1)), InferResponse)


@on_a_loop
async def test_unbatched_answers_are_a_bare_session_run_bit_for_bit(network: LoadedModel):
    scheduler = Scheduler(network, max_batch=32, max_queue=64)
    random = np.random.default_rng(1)
    where = set()
    for rows in (1, 1, 1, 1, 1, 1, 3, 32, 7, 1, 5):
        x = random.normal(size=(rows, 16)).astype(np.float32)
        (expected,) = network.run({"x": x}, ["y"])
        given = scheduler.infer(InferRequest(model="mlp", inputs={"x": x}))
        where.add(isinstance(given, InferResponse))
        np.testing.assert_array_equal((await answer(given)).outputs["y"], expected)
        await turns()
    assert where == {True, False}


@on_a_loop
async def test_batched_answers_are_within_rounding_and_were_batched(network: LoadedModel):
    scheduler = Scheduler(network, max_batch=32, max_queue=64)
    random = np.random.default_rng(2)
    asked = [random.normal(size=(rows, 16)).astype(np.float32) for rows in (1, 3, 2, 8, 1, 1, 4)]
    given = [scheduler.infer(InferRequest(model="mlp", inputs={"x": x})) for x in asked]
    for x, one in zip(asked, given, strict=True):
        (expected,) = network.run({"x": x}, ["y"])
        np.testing.assert_allclose((await answer(one)).outputs["y"], expected, rtol=1e-5, atol=1e-5)
    assert scheduler.statistics.batches.keys() == {20}


@on_a_loop
async def test_requests_of_one_turn_share_a_batch_also_when_the_model_is_short():
    model = Doubling()
    scheduler = Scheduler(model, max_batch=8, max_queue=64)
    await calm(scheduler)
    assert isinstance(scheduler.infer(ask(1)), InferResponse)
    others = [scheduler.infer(ask(value)) for value in (2, 3, 4)]  # the same turn: a crowd
    assert [await outcome(one) for one in others] == [[4], [6], [8]]
    crowd = [scheduler.infer(ask(value)) for value in (5, 6, 7, 8)]
    assert not any(isinstance(one, InferResponse) for one in crowd)
    assert [await outcome(one) for one in crowd] == [[10], [12], [14], [16]]
    assert [len(x) for x in model.ran[-3:]] == [1, 3, 4]
    await calm(scheduler)
    assert isinstance(scheduler.infer(ask(1)), InferResponse)
    assert await outcome(scheduler.infer(ask(2))) == [4]  # two are a crowd too
    await turns()
    assert not isinstance(scheduler.infer(ask(3)), InferResponse)


@on_a_loop
async def test_what_queues_while_busy_is_batched_up_to_the_limit_and_by_shape():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=4, max_queue=64)
    first = scheduler.infer(ask(1))
    await until(lambda: model.ran)
    waiting = [scheduler.infer(ask(value)) for value in (2, 3)]
    waiting += [scheduler.infer(ask(4, width=5)), scheduler.infer(ask(5, 6)), scheduler.infer(ask(7))]
    await turns()
    gate.set()
    results = [await outcome(one) for one in (first, *waiting)]
    assert results == [[2], [4], [6], [8], [10, 12], [14]]
    assert [x.shape for x in model.ran] == [(1, 3), (4, 3), (1, 5), (1, 3)]


@on_a_loop
async def test_a_batch_takes_no_more_rows_than_have_turned_out_to_pay():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=8, max_queue=64)
    waited: list[int] = []
    learnt: list[int] = []
    scheduler._sizes.limit = lambda key, waiting: waited.append(waiting) or 2
    scheduler._sizes.learn = lambda key, rows, nanoseconds: learnt.append(rows)
    first = scheduler.infer(ask(1))
    await until(lambda: model.ran)
    waiting = [scheduler.infer(one) for one in (ask(2), ask(3), ask(4, 5, 6), ask(7))]
    await turns()
    gate.set()
    assert [await outcome(one) for one in (first, *waiting)] == [[2], [4], [6], [8, 10, 12], [14]]
    assert [len(x) for x in model.ran] == [1, 2, 3, 1]
    assert learnt == [1, 2, 3, 1]
    assert waited == [1, 6, 4, 1]


ARRIVALS = st.lists(
    st.fixed_dictionaries(
        {
            "rows": st.integers(1, 4),
            "width": st.sampled_from([1, 2]),
            "priority": st.integers(-1, 1),
            "pause": st.sampled_from([0, 0, 0, 1, 2, 5]),
            "end": st.sampled_from(["wait", "wait", "wait", "cancel", "gone", "late", "poison"]),
        }
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=ARRIVALS,
    max_batch=st.integers(4, 9),
    seconds=st.sampled_from([0.0, 0.0, 0.0005, 0.003]),
    threads=st.integers(1, 2),
    delay=st.sampled_from([0.0, 0.0, 0.002]),
    short=st.booleans(),
)
def test_any_pattern_of_arrivals_gives_each_request_exactly_its_own_rows(
    arrivals: list[dict[str, Any]], max_batch: int, seconds: float, threads: int, delay: float, short: bool
):
    async def play() -> None:
        model = Doubling(seconds)
        known = [(4 << power, 1000) for power in range(5)] * 3  # so that short ones run at once from the first
        scheduler = Scheduler(
            model, max_batch=max_batch, max_queue=99, threads=threads, max_delay_s=delay, known=known if short else ()
        )
        asked: list[tuple[np.ndarray, Any]] = []
        for number, one in enumerate(arrivals):
            values = [100.0 * number + row + 1 for row in range(one["rows"])]
            if one["end"] == "poison":
                values[-1] = -values[-1]
            request = ask(*values, width=one["width"], priority=one["priority"])
            if one["end"] == "late":
                request.deadline = time.monotonic() + 1e-4
            try:
                given: Any = scheduler.infer(request)
            except ServeError as error:  # it ran at once, or was late at once
                given = error
            if one["end"] == "gone":
                request.cancelled = True
            if one["end"] == "cancel" and isinstance(given, asyncio.Future):
                given.cancel()
            asked.append((2 * request.inputs["x"], given))
            for _ in range(one["pause"]):
                await asyncio.sleep(0)
        for one, (expected, given) in zip(arrivals, asked, strict=True):
            found = await rows_or_refusal(given)
            if isinstance(found, np.ndarray):
                assert one["end"] != "poison"
                np.testing.assert_array_equal(found, expected)
            else:
                assert (one["end"], found) in {
                    ("cancel", "cancelled"),
                    ("gone", "cancelled"),
                    ("late", 504),
                    ("poison", 500),
                }
        await scheduler.drained()
        statistics = scheduler.statistics
        assert statistics.success + statistics.fail == len(arrivals)
        assert statistics.depth() == 0
        assert all(len(x) <= max_batch for x in model.ran)
        assert not errors

    errors: list[Any] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        await play()

    on_a_loop(guarded)()


async def rows_or_refusal(given: Any) -> Any:
    try:
        if isinstance(given, ServeError):
            raise given
        return (await answer(given)).outputs["y"]
    except ServeError as error:
        return error.status
    except asyncio.CancelledError:
        return "cancelled"


@on_a_loop
async def test_a_full_queue_says_so_at_once_and_when_to_come_back():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=1, max_queue=3)
    given = [scheduler.infer(ask(1))]
    await until(lambda: model.ran)
    waiting = [ask(value) for value in (2, 3, 4)]
    given += [scheduler.infer(one) for one in waiting]
    started = time.perf_counter()
    full = refusal(scheduler, ask(5))
    assert time.perf_counter() - started < 3  # the model is held by the gate
    assert (full.status, full.grpc) == (429, "RESOURCE_EXHAUSTED")
    assert full.retry_after is not None
    assert full.retry_after > 0
    assert "3 requests wait" in full.message
    for seconds_each, wait_s in ((0.5, 1.5), (100.0, 60.0)):
        scheduler._seconds_per_request = seconds_each
        assert refusal(scheduler, ask(5)).retry_after == wait_s
    waiting[1].cancelled = True  # its place is free
    await asyncio.sleep(0.02)
    given.append(scheduler.infer(ask(5)))
    assert refusal(scheduler, ask(6)).status == 429
    gate.set()
    assert [await outcome(one) for one in given] == [[2], [4], "cancelled", [8], [10]]


@on_a_loop
async def test_the_time_to_come_back_is_from_the_measured_rate():
    model = Doubling(seconds=0.03)
    scheduler = Scheduler(model, max_batch=1, max_queue=10)
    await answer(scheduler.infer(ask(1)))
    given = [scheduler.infer(ask(1)) for _ in range(10)]
    await turns(5)
    given += [scheduler.infer(ask(1))]  # the place of the one that runs
    wait_s = refusal(scheduler, ask(1)).retry_after
    assert wait_s is not None
    assert 0.25 < wait_s < 3.0  # ten wait, 30 ms each
    started = time.perf_counter()
    await asyncio.gather(*given)
    assert time.perf_counter() - started < 3 * wait_s


@on_a_loop
async def test_the_queue_is_bounded_in_bytes_too():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=1, max_queue=99, budget=Budget(4000))
    given = [scheduler.infer(ask(1))]
    await until(lambda: model.ran)
    given.append(scheduler.infer(ask(2, width=2000)))  # alone it may be larger
    assert refusal(scheduler, ask(3, width=1)).status == 429
    gate.set()
    assert [await outcome(one) for one in given] == [[2], [4]]


@on_a_loop
async def test_a_deadline_that_passed_in_the_queue_is_not_run():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=4, max_queue=9)
    first = scheduler.infer(ask(1))
    await until(lambda: model.ran)
    late = scheduler.infer(ask(2, deadline=time.monotonic() + 0.02))
    patient = scheduler.infer(ask(3, deadline=time.monotonic() + 60))
    await asyncio.sleep(0.04)
    gate.set()
    assert [await outcome(one) for one in (first, late, patient)] == [[2], 504, [6]]
    assert [x[:, 0].tolist() for x in model.ran] == [[1], [3]]
    over = refusal(scheduler, ask(1, deadline=time.monotonic()))
    assert (over.status, over.grpc) == (504, "DEADLINE_EXCEEDED")


@on_a_loop
async def test_requests_whose_client_has_gone_are_dropped():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=1, max_queue=9)
    first = scheduler.infer(ask(1))
    await until(lambda: model.ran)
    gone, cancelled, kept, part = ask(2), scheduler.infer(ask(3)), scheduler.infer(ask(4)), ask(5, part=True)
    waiting = scheduler.infer(gone)
    of_whole = scheduler.infer(part)
    gone.cancelled = part.cancelled = True
    cancelled.cancel()
    gate.set()
    assert [await outcome(one) for one in (first, kept)] == [[2], [8]]
    assert [await outcome(one) for one in (cancelled, waiting, of_whole)] == ["cancelled"] * 3
    assert [x[0, 0] for x in model.ran] == [1, 4]
    assert scheduler.statistics.errors == {499: 2}


@pytest.mark.parametrize(("value", "status"), [(1, 499), (-1, 500)])
@on_a_loop
async def test_a_client_that_goes_while_its_request_runs_is_counted_and_holds_up_nobody(value: int, status: int):
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=1, max_queue=9)
    given = scheduler.infer(ask(value))
    await until(lambda: model.ran)
    given.cancel()
    gate.set()
    await scheduler.drained()
    assert (scheduler.statistics.success, scheduler.statistics.errors) == (0, {status: 1})


@pytest.mark.parametrize("max_batch", [1, 2])
@on_a_loop
async def test_larger_priorities_go_first_and_equal_ones_in_their_order(max_batch: int):
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=max_batch, max_queue=9)
    given = [scheduler.infer(ask(0))]
    await until(lambda: model.ran)
    given += [
        scheduler.infer(ask(number, priority=priority, width=1 + number % 2))
        for number, priority in enumerate((0, 5, -1, 5, 0), start=1)
    ]
    gate.set()
    await asyncio.gather(*given)
    assert [value for x in model.ran for value in x[:, 0]] == [0, 2, 4, 1, 5, 3]
    assert len(model.ran) == {1: 6, 2: 4}[max_batch]  # those of one width share a batch


@on_a_loop
async def test_two_threads_run_two_batches_at_once():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=1, max_queue=9, threads=2)
    given = [scheduler.infer(ask(value)) for value in (1, 2, 3)]
    await until(lambda: len(model.ran) == 2)
    await asyncio.sleep(0.02)
    assert len(model.ran) == 2
    gate.set()
    assert [await outcome(one) for one in given] == [[2], [4], [6]]


@on_a_loop
async def test_a_thread_that_cannot_be_started_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch):
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=1, max_queue=9, threads=2)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refused)
        given = [scheduler.infer(ask(value)) for value in (1, 2, 3)]
        assert [await outcome(one) for one in given] == [503, 503, 503]
        await scheduler.drained()
    given = [scheduler.infer(ask(4))]
    await until(lambda: model.ran)
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refused)
        given += [scheduler.infer(ask(value)) for value in (5, 6)]  # for the thread that there is
        await turns()
        gate.set()
        assert [await outcome(one) for one in given] == [[8], [10], [12]]
    assert scheduler.statistics.errors == {503: 3}
    await scheduler.drained()


@on_a_loop
async def test_a_delay_waits_for_a_batch_to_fill_and_no_longer():
    model = Doubling()
    scheduler = Scheduler(model, max_batch=3, max_queue=9, max_delay_s=0.05)
    started = time.perf_counter()
    assert await outcome(scheduler.infer(ask(1))) == [2]
    assert time.perf_counter() - started >= 0.045
    scheduler.close()
    scheduler = Scheduler(model, max_batch=3, max_queue=9, max_delay_s=5, known=[(12, 50_000)] * 3)
    full = []
    started = time.perf_counter()
    for value in (1, 2, 3):
        full.append(scheduler.infer(ask(value)))
        await turns()
    assert [await outcome(one) for one in full] == [[2], [4], [6]]
    assert time.perf_counter() - started < 2
    assert [len(x) for x in model.ran] == [1, 3]


@on_a_loop
async def test_a_scheduler_that_is_closed_keeps_no_model_until_a_batch_would_have_filled():
    scheduler = batching.Scheduler(Doubling(), max_batch=8, max_queue=9, max_delay_s=10.0)
    waiting = scheduler.infer(ask(1))
    await turns()
    scheduler.close()
    assert await outcome(waiting) == 503
    model = weakref.ref(scheduler.model)
    del scheduler
    gc.collect()
    assert model() is None


@on_a_loop
async def test_a_full_batch_does_not_wait_behind_one_that_is_being_filled():
    scheduler = Scheduler(Doubling(), max_batch=2, max_queue=9, max_delay_s=60)
    filling = scheduler.infer(ask(1, width=1))
    await turns()
    full = [scheduler.infer(ask(value, width=2)) for value in (2, 3)]
    assert [await outcome(one) for one in full] == [[4], [6]]
    assert await outcome(scheduler.infer(ask(4, 5, width=2))) == [8, 10]  # rows fill a batch, not requests
    assert not filling.done()
    scheduler.stop_accepting()
    assert await outcome(filling) == [2]


@settings(max_examples=100, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 3), st.booleans()), max_size=30),
    max_rows=st.integers(3, 6),
)
def test_the_queue_is_a_list_sorted_by_priority_and_arrival(items: list[tuple[int, int, bool]], max_rows: int):
    async def play() -> None:
        loop = asyncio.get_running_loop()
        queue = Queue(max_requests=99, budget=Budget(99))
        waiting = []
        for number, (priority, rows, gone) in enumerate(items):
            request = ask(number, priority=priority, cancelled=gone)
            waiting.append(Waiting(request, ["y"], rows, 1, number, loop.create_future()))
            queue.push((), waiting[-1])
        assert set(queue.take_gone()) == {item for item in waiting if item.request.cancelled}
        expected = sorted((item for item in waiting if not item.gone), key=lambda item: -item.request.priority)
        assert queue.depth == len(expected)
        while expected:
            batch, gone, late = queue.take(queue.next_key(max_rows, None)[0], max_rows)
            assert (gone, late) == ([], [])
            assert batch == expected[: len(batch)]
            rows = sum(item.rows for item in batch)
            expected = expected[len(batch) :]
            assert rows <= max_rows
            assert not expected or rows + expected[0].rows > max_rows
        assert not queue
        assert queue.depth == 0
        assert queue.has_room(99)

    asyncio.run(play())


@on_a_loop
async def test_a_full_queue_is_not_searched_again_within_ten_milliseconds(monkeypatch: pytest.MonkeyPatch):
    queue = Queue(max_requests=9, budget=Budget(99))
    gone = [Waiting(ask(1, cancelled=True), ["y"], 1, 1, 0, asyncio.Future()) for _ in range(2)]
    for now, item, found in ((1.0, gone[0], gone[:1]), (1.005, gone[1], []), (1.02, None, gone[1:])):
        monkeypatch.setattr(queueing, "monotonic", lambda now=now: now)
        if item:
            queue.push((), item)
        assert queue.take_gone() == found


REFUSED: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "missing": ({}, "lacks the input 'x'"),
    "extra": ({"x": np.zeros((1, 3), np.float32), "z": np.zeros(1, np.float32)}, "'z' that is not known"),
    "other name": ({"images": np.zeros((1, 3), np.float32)}, "lacks the input 'x'"),
    "dtype": ({"x": np.zeros((1, 3), np.float64)}, r"float64 \[1, 3\]; accepted: float32 \[batch, width\]"),
    "byte order": ({"x": np.zeros((1, 3), ">f4")}, "accepted: float32"),
    "rank": ({"x": np.zeros(3, np.float32)}, r"\[3\]; accepted"),
    "no row": ({"x": np.zeros((0, 3), np.float32)}, "no size 0"),
    "no column": ({"x": np.zeros((2, 0), np.float32)}, "no size 0"),
    "rows": ({"x": np.zeros((5, 3), np.float32)}, "5 rows, doubling takes at most 4"),
    "strings": ({"x": np.full((1, 3), b"a", dtype=object)}, "BYTES"),
}


@pytest.mark.parametrize("name", REFUSED)
@on_a_loop
async def test_what_does_not_fit_the_model_is_refused_before_it_is_queued(name: str):
    inputs, words = REFUSED[name]
    model = Doubling()
    scheduler = Scheduler(model, max_batch=4, max_queue=9)
    with pytest.raises(ServeError, match=words) as caught:
        scheduler.infer(InferRequest(model="m", inputs=inputs))
    assert (caught.value.status, caught.value.grpc) == (400, "INVALID_ARGUMENT")
    assert scheduler.statistics.errors == {400: 1}
    assert await outcome(scheduler.infer(ask(1, 2, 3, 4))) == [2, 4, 6, 8]


def test_the_bits_of_bfloat16_are_not_taken_for_whole_numbers():
    inputs, outputs = ([Tensor(name=name, dtype="uint16", shape=("batch",))] for name in "xy")
    signature = Signature("m", inputs, outputs, max_batch=4)
    bits = np.zeros(2, np.uint16)
    assert signature.check(InferRequest(model="m", inputs={"x": bits})) == (2, ((),))
    with pytest.raises(ServeError, match=r"the input 'x' is BF16 \[2\]; accepted: uint16 \[batch\]"):
        signature.check(InferRequest(model="m", inputs={"x": bits.view(DATATYPES["BF16"])}))


def test_an_image_that_a_resize_would_make_enormous_is_refused():
    """Packages of ours resize the shorter side of an image to their own size: 1 by 25,000 pixels took 1.4 GB."""

    def check(dtype: Any, *shape: int) -> None:
        images = [Tensor(name="images", dtype="uint8", shape=("batch", "height", "width", 3))]
        request = InferRequest(model="m", inputs={"images": np.zeros(shape, dtype)})
        Signature("m", images, [], 4).check(request)

    for height, width in ((1, 32), (32, 1), (224, 7168), (1, 1)):
        check(np.uint8, 2, height, width, 3)
    for height, width in ((1, 33), (33, 1), (25000, 1), (224, 7169)):
        with pytest.raises(ServeError, match=f"{height} rows of {width} pixels; accepted: sides up to 32 times"):
            check(np.uint8, 1, height, width, 3)


@on_a_loop
async def test_a_fixed_size_is_the_models_and_shared_words_agree():
    model = load_graph(identities({"a": 1, "b": 1}), name="pair", device=Device(threads=1), max_batch=8)
    scheduler = Scheduler(model, max_batch=8, max_queue=9)
    with pytest.raises(ServeError, match=r"float32 \[1, 3\]; accepted: float32 \[batch, 2\]"):
        scheduler.infer(
            InferRequest(model="pair", inputs={"in_a": np.ones((1, 3), "f4"), "in_b": np.ones((1, 2), "f4")})
        )
    with pytest.raises(ServeError, match="'batch' differs between inputs: 'in_a' has 1, 'in_b' has 2"):
        scheduler.infer(
            InferRequest(model="pair", inputs={"in_a": np.ones((1, 2), "f4"), "in_b": np.ones((2, 2), "f4")})
        )


@on_a_loop
async def test_only_the_outputs_asked_for_come_back_also_from_a_batch():
    model = load_graph(identities({"a": 1, "b": 1}), name="pair", device=Device(threads=1), max_batch=8)
    scheduler = Scheduler(model, max_batch=8, max_queue=9)

    def request(value: float, *names: str) -> InferRequest:
        inputs = {f"in_{name}": np.full((1, 2), value + index, np.float32) for index, name in enumerate("ab")}
        wanted = tuple(RequestedOutput(name=name, binary=True) for name in names)
        return InferRequest(model="pair", inputs=inputs, outputs=wanted or None)

    given = [scheduler.infer(request(1, "out_b")), scheduler.infer(request(5, "out_a")), scheduler.infer(request(9))]
    found = [{name: array[0, 0] for name, array in (await answer(one)).outputs.items()} for one in given]
    assert found == [{"out_b": 2}, {"out_a": 5}, {"out_a": 9, "out_b": 10}]
    assert scheduler.statistics.executions == 1
    with pytest.raises(ServeError, match="no output 'out_c'; accepted: out_a, out_b"):
        scheduler.infer(request(1, "out_c"))


@on_a_loop
async def test_a_request_that_makes_the_model_fail_fails_alone():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=8, max_queue=9)
    first = scheduler.infer(ask(1))
    await until(lambda: model.ran)
    given = [scheduler.infer(ask(value)) for value in (2, -3, 4)]
    gate.set()
    assert [await outcome(one) for one in (first, *given)] == [[2], [4], 500, [8]]
    assert await outcome(scheduler.infer(ask(5))) == [10]
    assert scheduler.statistics.errors == {500: 1}


@on_a_loop
async def test_a_failure_names_no_path_wherever_it_ran():
    model = Doubling()
    scheduler = Scheduler(model, max_batch=4, max_queue=9)
    with pytest.raises(ServeError) as queued:
        await scheduler.infer(ask(-1))
    await calm(scheduler)
    with pytest.raises(ServeError) as inline:
        scheduler.infer(ask(-1))
    for error in (queued.value, inline.value):
        assert (error.status, error.grpc) == (500, "INTERNAL")
        assert "/" not in error.message
    await turns()
    assert isinstance(scheduler.infer(ask(1)), InferResponse)


class Mixing(Doubling):
    """Declares a row for each row and gives one for all."""

    def run(self, feed: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        return [array.sum(axis=0, keepdims=True) for array in super().run(feed, outputs)]


@on_a_loop
async def test_a_graph_that_mixes_rows_is_never_batched_again():
    model = Mixing()
    scheduler = Scheduler(model, max_batch=8, max_queue=9)
    for _ in range(2):
        given = [scheduler.infer(ask(value)) for value in (1, 2, 3)]
        assert [await outcome(one) for one in given] == [[2], [4], [6]]
    assert [len(x) for x in model.ran] == [3, 1, 1, 1, 1, 1, 1]


@on_a_loop
async def test_stopping_answers_what_waits_and_refuses_what_comes():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=1, max_queue=9)
    given = [scheduler.infer(ask(value)) for value in (1, 2, 3)]
    await until(lambda: model.ran)
    scheduler.stop_accepting()
    refused = refusal(scheduler, ask(4))
    assert (refused.status, refused.grpc) == (503, "UNAVAILABLE")
    draining = asyncio.ensure_future(scheduler.drained())
    await asyncio.sleep(0.01)
    assert not draining.done()
    gate.set()
    await draining
    assert [await outcome(one) for one in given] == [[2], [4], [6]]
    scheduler.close()


@on_a_loop
async def test_what_runs_is_waited_for_when_nothing_is_queued():
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=1, max_queue=9)
    given = scheduler.infer(ask(1))
    await until(lambda: model.ran)
    draining = asyncio.ensure_future(scheduler.drained())
    await asyncio.sleep(0.01)
    assert not draining.done()
    gate.set()
    await draining
    assert given.done()


@on_a_loop
async def test_closing_refuses_what_still_waits_and_ends_the_threads():
    gate = threading.Event()
    model = Doubling(gate=gate)
    model.name = "closing"
    scheduler = Scheduler(model, max_batch=1, max_queue=9)
    given = [scheduler.infer(ask(value)) for value in (1, 2)]
    await until(lambda: model.ran)
    scheduler.close()
    assert await outcome(given[1]) == 503
    gate.set()
    assert await outcome(given[0]) == [2]
    await until(lambda: not any("closing" in thread.name for thread in threading.enumerate()))


@on_a_loop
async def test_everything_is_counted():
    metrics = Metrics()
    gate = threading.Event()
    model = Doubling(gate=gate)
    scheduler = Scheduler(model, max_batch=4, max_queue=4, statistics=metrics.track("doubling", "7"))
    given = [scheduler.infer(ask(1))]
    await until(lambda: model.ran)
    given += [scheduler.infer(ask(2, 3)), scheduler.infer(ask(4))]
    with pytest.raises(ServeError):
        scheduler.infer(ask(1, 2, 3, 4, 5))
    families = {one.name: one for one in text_string_to_metric_families(metrics.metrics_text().decode())}
    assert [sample.value for sample in families["headstart_queue_depth"].samples] == [2]
    gate.set()
    await asyncio.gather(*given)
    document = scheduler.statistics.document()
    assert (document["inference_count"], document["execution_count"]) == (4, 2)
    assert [row["batch_size"] for row in document["batch_stats"]] == [1, 3]
    assert document["inference_stats"]["success"]["count"] == 3
    assert document["inference_stats"]["fail"]["count"] == 1
    assert document["inference_stats"]["queue"]["ns"] > 0
    assert document["inference_stats"]["compute_infer"]["ns"] > 0
    assert abs(document["last_inference"] - time.time() * 1000) < 5000
    families = {one.name: one for one in text_string_to_metric_families(metrics.metrics_text().decode())}

    def sample(family: str, suffix: str = "", **labels: str) -> float:
        wanted = {"model": "doubling", "version": "7", **labels}
        (found,) = [s for s in families[family].samples if s.name == family + suffix and s.labels == wanted]
        return found.value

    seconds = "headstart_request_duration_seconds"
    for stage in ("queue", "compute", "total"):
        assert sample(seconds, "_count", stage=stage) == 3
        assert sample(seconds, "_bucket", stage=stage, le="+Inf") == 3
    assert sample(seconds, "_sum", stage="total") >= sample(seconds, "_sum", stage="compute") > 0
    assert sample("headstart_batch_rows", "_count") == 2
    assert sample("headstart_batch_rows", "_sum") == 4
    assert sample("headstart_batch_rows", "_bucket", le="2.0") == 1
    assert sample("headstart_requests_answered", "_total") == 3
    assert sample("headstart_request_errors", "_total", status="400") == 1
    assert sample("headstart_queue_depth") == 0


@on_a_loop
async def test_each_stage_is_counted_as_it_is_told_wherever_it_ran():
    scheduler = Scheduler(Doubling(seconds=0.01), max_batch=1, max_queue=4)
    responses = [await answer(scheduler.infer(ask(1)))]  # in a thread
    scheduler._costs.below = lambda *given: True
    responses.append(await answer(scheduler.infer(ask(1))))  # at once: counted when all is drained
    assert scheduler.statistics.success == 1
    await scheduler.drained()
    statistics = scheduler.statistics
    assert statistics.success == 2
    assert statistics.queue_ns == sum(one.timings_ns["queue"] for one in responses)
    assert statistics.compute_ns == sum(one.timings_ns["compute"] for one in responses)
    assert min(one.timings_ns["compute"] for one in responses) >= 10_000_000


@pytest.mark.parametrize("name", ["max_batch", "max_queue", "threads"])
@on_a_loop
async def test_limits_that_cannot_be_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Scheduler(Doubling(), **{"max_batch": 1, "max_queue": 1, name: 0})
