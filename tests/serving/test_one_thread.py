"""One thread that makes calls: their order, their errors, and how it starts and ends."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from functools import partial

import pytest

from headstart.serving.one_thread import OneThread


@pytest.fixture
def thread() -> Iterator[OneThread]:
    made = OneThread("one")
    yield made
    made.stop()
    for one in threading.enumerate():
        if one.name == "one":
            one.join(10)


def running() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name == "one"]


def test_it_starts_with_its_first_call_and_makes_all_of_them_in_order(thread: OneThread):
    def note(number: int, *, by: int) -> int:
        made.append((threading.current_thread().name, number * by))
        return number * by

    made: list[tuple[str, int]] = []
    assert running() == []
    asked = [thread.submit(note, number, by=2) for number in range(50)]
    assert [one.result(10) for one in asked] == [2 * number for number in range(50)]
    assert made == [("one", 2 * number) for number in range(50)]
    assert running() == ["one"]


@pytest.mark.parametrize("error", [ValueError, MemoryError, SystemExit, KeyboardInterrupt])
def test_whatever_is_raised_is_the_callers_and_the_thread_goes_on(thread: OneThread, error: type[BaseException]):
    def fails() -> None:
        raise error

    for _ in range(2):
        with pytest.raises(error):
            thread.submit(fails).result(10)
    assert thread.submit(int).result(10) == 0


def test_a_machine_without_a_thread_is_told_and_asked_again(thread: OneThread, monkeypatch: pytest.MonkeyPatch):
    def lacks(started: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", lacks)
        with pytest.raises(RuntimeError, match="can't start"):
            thread.submit(pytest.fail)
    assert thread.submit(int).result(10) == 0


def test_it_ends_after_what_it_was_given_and_takes_no_more(thread: OneThread):
    go_on = threading.Event()
    asked = [thread.submit(go_on.wait, 10), thread.submit(int)]
    (one,) = (found for found in threading.enumerate() if found.name == "one")
    thread.stop()
    with pytest.raises(RuntimeError, match="the thread one was stopped"):
        thread.submit(pytest.fail)
    go_on.set()
    assert [call.result(10) for call in asked] == [True, 0]
    one.join(10)
    assert not one.is_alive()


def test_one_that_made_no_call_is_stopped_too():
    thread = OneThread("one")
    thread.stop()
    with pytest.raises(RuntimeError, match="was stopped"):
        thread.submit(int)
    assert running() == []


def test_a_caller_that_was_cancelled_leaves_its_call_and_all_others_as_they_were(thread: OneThread):
    async def ask() -> None:
        begun, go_on = threading.Event(), threading.Event()
        first = asyncio.create_task(thread.run(lambda: (begun.set(), go_on.wait(10))))
        second = asyncio.create_task(thread.run(made.append, 2))
        await asyncio.to_thread(begun.wait, 10)
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        go_on.set()
        assert await thread.run(int) == 0
        assert made == [2]

    made: list[int] = []
    asyncio.run(ask())


def test_neither_it_nor_its_caller_keeps_what_was_made_or_an_error(thread: OneThread):
    class Made:
        pass

    def make(fails: bool) -> Made:
        one = Made()
        made.append(weakref.ref(one))
        if fails:
            raise ValueError
        return one

    async def ask() -> None:
        for fails in (False, True):
            with contextlib.suppress(ValueError):
                await thread.run(make, fails)
            await asyncio.sleep(0.05)

    made: list[weakref.ref[Made]] = []
    gc.disable()
    try:
        asyncio.run(ask())
        assert [one() for one in made] == [None, None]
    finally:
        gc.enable()


def test_what_a_failed_call_has_made_ends_on_the_thread_while_its_error_is_kept(thread: OneThread):
    class Made:
        def __del__(self) -> None:
            ended.append(threading.current_thread().name)

    def fails() -> None:
        made = Made()
        raise ValueError(type(made))

    ended: list[str] = []
    failed = thread.submit(fails)
    assert isinstance(failed.exception(10), ValueError)
    assert ended == ["one"]


def test_the_end_of_the_process_does_not_wait_for_it():
    code = (
        "import time\nfrom headstart.serving.one_thread import OneThread\n"
        "OneThread('one').submit(time.sleep, 60)\nprint('over')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert ended.stdout == "over\n"


@pytest.mark.timeout(60)
def test_a_finalizer_leaves_it_a_call_wherever_garbage_is_collected(thread: OneThread):
    """Also while `submit` has its lock, which one that submits would wait for, and with it all others."""

    class Cyclic:
        def __init__(self) -> None:
            self.itself = self

    left: list[str] = []
    threshold = gc.get_threshold()
    try:
        for number in range(2000):
            gc.set_threshold(1 + number % 30)
            weakref.finalize(Cyclic(), thread.leave, lambda: left.append(threading.current_thread().name))
            thread.submit(int)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    thread.submit(int).result(10)
    assert left == ["one"] * 2000


def test_what_is_left_to_it_waits_for_its_first_call(thread: OneThread):
    made: list[int] = []
    thread.leave(partial(made.append, 1))
    assert running() == []
    assert thread.submit(lambda: list(made)).result(10) == [1]
