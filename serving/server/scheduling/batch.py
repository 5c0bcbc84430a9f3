"""A batch: what is run together, and what came of it; and what a call of a model costs."""

import logging
from collections.abc import Sequence
from time import perf_counter_ns
from typing import Any, Protocol

import numpy as np

from headstart.serving.manifest import Tensor
from headstart.serving.server.errors import ServeError, internal
from headstart.serving.server.scheduling.queueing import Waiting
from headstart.serving.server.scheduling.signature import Key, Signature
from headstart.serving.server.wire.protocol import InferRequest, InferResponse

_KNOWN_AFTER = 3  # calls of a size before its average is believed

_LOG = logging.getLogger(__name__)


class Runnable(Protocol):
    """What a scheduler needs of a model: `model.LoadedModel`, or a stand-in of a test."""

    name: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    labels: tuple[str, ...] | None

    def run(self, feed: dict[str, Any], outputs: list[str]) -> list[Any]:
        """Compute the named outputs; called by one thread or by several."""


class Costs:
    """Running average of a call's ns, by the power of two of its input's bytes: large images are not small ones."""

    def __init__(self) -> None:
        self._calls = [0] * 64
        self._average = [0.0] * 64

    def learn(self, num_bytes: int, nanoseconds: float) -> None:
        """Take in a call."""
        slot = num_bytes.bit_length()
        self._calls[slot] += 1
        weight = 1 / min(self._calls[slot], 8)
        self._average[slot] += weight * (nanoseconds - self._average[slot])

    def below(self, nanoseconds: int, num_bytes: int) -> bool:
        """Whether a call of such an input is known to take less."""
        slot = num_bytes.bit_length()
        return self._calls[slot] >= _KNOWN_AFTER and self._average[slot] < nanoseconds


class Batch:
    """Requests of one shape that run together.

    Args:
        items: the requests.
        key: their shape.
    """

    __slots__ = ("answers", "ended", "executions", "items", "key", "num_bytes", "rows", "started")

    def __init__(self, items: list[Waiting], key: Key) -> None:
        self.items, self.key = items, key
        self.rows = sum(item.rows for item in items)
        self.num_bytes = sum(item.num_bytes for item in items)
        self.started = self.ended = 0
        self.executions: list[tuple[int, int]] = []
        """Rows and ns of each `session.run`."""
        self.answers: list[dict[str, Any] | Exception] = []
        """Of each item: its outputs by their names, views of the batch's, or what the model raised."""

    def execute(self, model: Runnable, signature: Signature) -> None:
        """Run it; one that fails is run request by request, so that it fails those alone that must."""
        self.started = perf_counter_ns()
        try:
            self.answers = [*self._together(model, signature)]
        except Exception as error:  # anything that a graph can raise
            if len(self.items) == 1:
                self.answers = [error]
            else:
                _LOG.warning("a batch of %s failed and is run one by one: %s", model.name, type(error).__name__)
                self.answers = [self._alone(model, item) for item in self.items]
        self.ended = perf_counter_ns()

    def _together(self, model: Runnable, signature: Signature) -> Sequence[dict[str, Any]]:
        items = self.items
        if len(items) == 1:
            return [self._timed(model, items[0].request.inputs, items[0].names, items[0].rows)]
        first = items[0].request.inputs
        feed = {name: np.concatenate([item.request.inputs[name] for item in items]) for name in first}
        wanted = list(dict.fromkeys(name for item in items for name in item.names))
        outputs = self._timed(model, feed, wanted, self.rows)
        if any(array.shape[:1] != (self.rows,) for array in outputs.values()):
            signature.batchable = False  # a graph that mixes rows: from now on each request runs alone
            raise ValueError("an output without a row for each of the batch")
        answers, start = [], 0
        for item in items:
            answers.append({name: outputs[name][start : start + item.rows] for name in item.names})
            start += item.rows
        return answers

    def _alone(self, model: Runnable, item: Waiting) -> dict[str, Any] | Exception:
        try:
            return self._timed(model, item.request.inputs, item.names, item.rows)
        except Exception as error:  # anything that a graph can raise
            return error

    def _timed(self, model: Runnable, feed: dict[str, Any], names: list[str], rows: int) -> dict[str, Any]:
        started = perf_counter_ns()
        outputs = model.run(feed, names)
        self.executions.append((rows, perf_counter_ns() - started))
        return dict(zip(names, outputs, strict=True))


def response(
    model: Runnable, request: InferRequest, outputs: dict[str, Any], arrived: int, started: int, ended: int
) -> InferResponse:
    """The answer of a model to a request that arrived, and whose run began and ended, at these `perf_counter_ns`."""
    return InferResponse(
        model=model.name,
        version=model.version,
        id=request.id,
        outputs=outputs,
        parameters={},
        timings_ns={"queue": started - arrived, "compute": ended - started},
        labels=model.labels,
    )


def failure(model: Runnable, error: Exception, request_id: str) -> ServeError:
    """What a client is told of an error that the model raised: the log has its words, which may hold paths."""
    if isinstance(error, ServeError):
        return error
    extra = {"request_id": request_id, "model": model.name, "version": model.version}
    _LOG.error("%s version %s failed", model.name, model.version, exc_info=error, extra=extra)
    return internal(f"{model.name} failed on this request; the server's log says why")
