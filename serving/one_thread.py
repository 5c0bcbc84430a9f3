"""One thread that makes calls, one after the other."""

import asyncio
import concurrent.futures
import queue
import threading
import traceback
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
        self._name, self._starting = name, threading.Lock()
        self._started = self._stopped = False

    def submit(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> "concurrent.futures.Future[T]":
        """Call the function after those that were given before it.

        Raises:
            RuntimeError: the machine gives no thread, or it was stopped.
        """
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        done.set_running_or_notify_cancel()  # from now on nobody cancels it
        with self._starting:
            if self._stopped:
                raise RuntimeError(f"the thread {self._name} was stopped")
            if not self._started:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._started = True
            self._jobs.put((done, partial(function, *arguments, **named)))
        return done

    async def run(self, function: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """As `asyncio.to_thread`; RuntimeError as of `submit`."""
        done = self.submit(function, *arguments, **named)
        try:
            return await asyncio.wrap_future(done)
        finally:
            del done  # which has the error whose traceback has this frame, and with it all that was made

    def leave(self, function: Callable[[], Any]) -> None:
        """Call the function after those that were given before it, once the thread runs, which this does not start.

        For finalizers: a collection of garbage may call them within `submit`, whose lock they would wait for.
        """
        self._jobs.put((concurrent.futures.Future(), function))  # which is reentrant

    def stop(self) -> None:
        """Let it end after what it was given."""
        with self._starting:
            self._stopped = True
            self._jobs.put(None)

    def _work(self) -> None:
        while job := self._jobs.get():
            done, call = job
            try:
                done.set_result(call())
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # what was made ends here, wherever the error is let go of
                done.set_exception(error)
            del job, done, call  # or what was made would stay until the next call
