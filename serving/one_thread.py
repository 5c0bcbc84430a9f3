"""One thread that makes calls, one after the other."""

import asyncio
import concurrent.futures
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class OneThread:
    """A thread that starts with its first call, and which the end of the process does not wait for.

        thread = OneThread("headstart-load")
        thread.submit(load, "a").result()

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._name, self._started, self._starting = name, False, threading.Lock()

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> "concurrent.futures.Future[T]":
        """Call the function after those that were given before it; RuntimeError: the machine gives no thread."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        done.set_running_or_notify_cancel()  # from now on nobody cancels it
        with self._starting:
            if not self._started:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._started = True
            self._jobs.put((done, partial(function, *arguments, **named)))
        return done

    async def run(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """As `asyncio.to_thread`; RuntimeError: the machine gives no thread."""
        done = self.submit(function, *arguments, **named)
        try:
            return await asyncio.wrap_future(done)
        finally:
            del done  # which has the error whose traceback has this frame, and with it all that was made

    def stop(self) -> None:
        """Let it end after what it was given; another call starts it again."""
        with self._starting:
            if self._started:
                self._started = False
                self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            done, call = job
            try:
                done.set_result(call())
            except BaseException as error:
                done.set_exception(error)
            del job, done, call  # or what was made would stay until the next call
