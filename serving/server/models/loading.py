"""From the files of a version to a model that is verified, warmed up and scheduled, or to the reason why not."""

import collections
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from headstart.serving.errors import PackageError, first_line
from headstart.serving.one_thread import OneThread
from headstart.serving.server.models.entry import Attempt, Entry, Served
from headstart.serving.server.models.folder import Opening
from headstart.serving.server.models.memory import Memory, Taken, resident
from headstart.serving.server.models.model import LoadedModel, public
from headstart.serving.server.scheduling.batching import Scheduler
from headstart.serving.server.scheduling.queueing import Budget
from headstart.serving.server.scheduling.threads import THREAD_PREFIX
from headstart.serving.server.watching.metrics import Metrics

_RETRY_S = 30.0  # a failure of the machine, not of the package: no memory, no space, no thread
_LACKING = re.compile("bad_alloc|Failed to allocate memory|out of memory|pthread_create failed|can't start new thread")
"""What Python and ONNX Runtime, whose errors have no type for it, say where there is no memory or no thread."""
_WARM_S = 600.0
"""Seconds that a warm-up may take, in which TensorRT may build an engine; nothing else is loaded meanwhile."""
_LOG = logging.getLogger(__name__)

Loader = Callable[[Path, str, str], LoadedModel]
"""A version's folder, name and version to a model."""


@dataclass(frozen=True, kw_only=True)
class Scheduling:
    """Limits of each model."""

    max_batch: int | None = None
    """Rows of one execution; None, and at most, the largest batch whose parity the package proves."""
    max_delay_s: float = 0.0
    """Seconds that a batch may wait to be filled."""
    max_queue: int = 256
    """Requests of one model that may wait."""
    max_queue_bytes: int = 1 << 30
    """Bytes of the inputs of all models' requests that wait."""

    def __post_init__(self) -> None:
        if self.max_batch is not None and self.max_batch < 1:
            raise PackageError(f"max_batch is {self.max_batch}; accepted: at least 1")
        if not 0 <= self.max_delay_s <= 10:
            raise PackageError(f"max_delay_s is {self.max_delay_s:g}; accepted: 0 to 10 seconds")
        if self.max_queue < 1:
            raise PackageError(f"max_queue is {self.max_queue}; accepted: at least 1")


class Loading:
    """Loads versions of a repository, once for the same files, and counts what they take.

    Args:
        loader: how a version's folder becomes a model.
        scheduling: limits of each model.
        metrics: where to count.
        max_memory: bytes that models may take together; None is no limit.
    """

    def __init__(self, loader: Loader, scheduling: Scheduling, metrics: Metrics, max_memory: int | None) -> None:
        self._load_model, self._scheduling, self._metrics = loader, scheduling, metrics
        self._memory = Memory(max_memory)
        # For all loads: threads of their own would have an arena of the allocator each, and what is freed there stays
        # with the process. Its end does not wait for it: a load cannot be cut off.
        self._thread = OneThread(f"{THREAD_PREFIX}load")
        self._budget = Budget(scheduling.max_queue_bytes)
        self._open: collections.Counter[tuple[str, str]] = collections.Counter()
        """Models that were loaded and not released, by name and version: two while one takes the other's place."""
        self._warming: LoadedModel | None = None
        self._stopping = False
        self.suspects: set[Opening] = set()
        """What other processes of this server ended over, and is not opened here."""
        self.on_opening: Callable[[Opening, bool], None] = lambda opening, done: None
        """Is told what is about to be opened, and when that is over."""

    async def ensure(self, entry: Entry, version: int) -> Served | None:
        """A version loaded from the files that are there now, the one that was loaded before them, or None."""
        files, old, failed = entry.folder.versions[version], entry.served.get(version), entry.failed.get(version)
        if old and old.files == files:
            return old
        if failed and failed.files == files and (failed.again_at is None or monotonic() < failed.again_at):
            return old
        if version in entry.changing:  # for whoever copies it a second later, this would be half of it
            return old
        entry.loading.add(version)
        folder = entry.folder.path / str(version)
        try:
            opening = await self._thread.run(Opening.of, entry.name, version, files, folder)
            if opening in self.suspects:
                raise PackageError(
                    "processes of this server ended while they opened it, for which their log and the kernel's have "
                    "the reason; put another in its place, or load it by request"
                )
            estimated, before = self._memory.estimate(files), resident()
            self.on_opening(opening, False)
            try:
                model, known = await self._thread.run(self._load, folder, entry.name, version)
            finally:
                self.on_opening(opening, True)
        except (PackageError, RuntimeError) as error:  # the latter: there is no thread to load it in
            reason = public(str(error), folder)
            again_at = monotonic() + _RETRY_S if _may_pass(error) else None
            entry.failed[version] = Attempt(files=files, reason=reason, again_at=again_at)
            self._metrics.loaded(ready=False)
            _LOG.warning("%s version %d is refused: %s", entry.name, version, error)
            return old
        finally:
            entry.loading.discard(version)
        entry.failed.pop(version, None)
        self._metrics.loaded(ready=True)
        _LOG.info("%s version %d is loaded on %s", entry.name, version, model.provider)
        taken = Taken(estimated=estimated, measured=max(0, resident() - before))
        self._memory.take(taken)
        return Served(model=model, scheduler=self._schedule(model, known, taken), files=files, memory=taken)

    def _load(self, folder: Path, name: str, version: int) -> tuple[LoadedModel, list[tuple[int, int]]]:
        """In a thread: everything that takes time. The error is a PackageError, whatever a damaged graph raises."""
        try:
            model = self._load_model(folder, name, str(version))
            return model, self._warm_up(model)
        except PackageError:
            raise
        except Exception as error:
            raise PackageError(f"it does not run: {first_line(error)}") from error

    def _warm_up(self, model: LoadedModel) -> list[tuple[int, int]]:
        started, timer = monotonic(), threading.Timer(_WARM_S, model.cut)
        timer.start()
        self._warming = model
        try:
            if self._stopping:
                model.cut()
            return model.warm_up()
        finally:
            timer.cancel()
            self._warming = None
            if monotonic() - started >= _WARM_S:  # also one that was over just then: it is cut for good
                raise PackageError(f"its first runs were not over after {_WARM_S:g} s, and were cut off")

    def forget(self, name: str) -> None:
        """Open all versions of a model again, whatever happened to others."""
        self.suspects = {one for one in self.suspects if one.name != name}

    def stop(self) -> None:
        """Cut a warm-up off, and let the thread end."""
        self._stopping = True
        self._thread.stop()
        if model := self._warming:
            model.cut()

    def _schedule(self, model: LoadedModel, known: list[tuple[int, int]], taken: Taken) -> Scheduler:
        self._open[model.name, model.version] += 1
        statistics = self._metrics.track(model.name, model.version)
        statistics.memory = taken.measured
        statistics.drift = model.drift.state if model.drift else dict
        return Scheduler(
            model,
            max_batch=model.max_batch,
            max_delay_s=self._scheduling.max_delay_s,
            max_queue=self._scheduling.max_queue,
            budget=self._budget,
            statistics=statistics,
            known=known,
        )

    def release(self, one: Served) -> None:
        """Close a version that no longer answers; its counts go with the last that was loaded of it."""
        one.scheduler.close()
        one.model.close()
        self._memory.release(one.memory)
        self._open[key := (one.model.name, one.model.version)] -= 1
        if not self._open[key]:
            del self._open[key]
            self._metrics.forget(*key)


def _may_pass(error: BaseException | None) -> bool:
    """Whether a load failed because the machine lacked something, and not for what the package is."""
    while error is not None:
        words = "" if isinstance(error, PackageError) else str(error)  # whose words may be the package's
        if isinstance(error, (OSError, MemoryError)) or _LACKING.search(words):
            return True
        error = error.__cause__
    return False
