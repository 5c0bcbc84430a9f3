"""The threads of one model, which run its batches beside the event loop."""

import asyncio
import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from headstart.serving.server.scheduling.batch import Batch, Runnable
from headstart.serving.server.scheduling.signature import Signature

THREAD_PREFIX = "headstart-"
"""What the names of threads begin with that may be within ONNX Runtime."""

_LOG = logging.getLogger(__name__)

Finished = Callable[[Batch], None]


class Threads:
    """Up to `limit` threads, each started when a batch has none to run in; belongs to the running event loop.

    A batch comes with what is to be told of its end and is not kept: who owns this would be in a cycle with the model
    otherwise, which `gc.freeze` would keep.

    Args:
        model: what runs.
        signature: its.
        limit: of threads.
    """

    def __init__(self, model: Runnable, signature: Signature, limit: int) -> None:
        self.limit = limit
        self._model, self._signature = model, signature
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[tuple[Batch, Finished] | None] = SimpleQueue()
        self._started: list[threading.Thread] = []

    def ready(self) -> bool:
        """Start another thread where there may be more; False where there is none, since the machine gives none."""
        if len(self._started) < self.limit:
            model = self._model
            thread = threading.Thread(
                target=self._work, name=f"{THREAD_PREFIX}{model.name}-{model.version}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:  # a limit on processes: the next request tries again
                _LOG.error("%s version %s: %s", model.name, model.version, error)
            else:
                self._started.append(thread)
        return bool(self._started)

    def run(self, batch: Batch, finished: Finished) -> None:
        """Run a batch in a thread, then call `finished` with it on the event loop."""
        self._jobs.put((batch, finished))

    def close(self) -> None:
        """End the threads, each after the batch that it runs."""
        for _ in self._started:
            self._jobs.put(None)
        self._started.clear()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, finished = job
            batch.execute(self._model, self._signature)
            try:
                self._loop.call_soon_threadsafe(finished, batch)
            except RuntimeError:  # the loop was closed without us
                return
            del job, batch, finished  # or its images would stay for as long as the model is idle
