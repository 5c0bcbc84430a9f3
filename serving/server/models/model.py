"""A model in ONNX Runtime: a session, what it takes and gives, and its `run`."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.serving.device import Device, open_on
from headstart.serving.errors import PackageError, first_line, printable
from headstart.serving.manifest import Manifest, Tensor
from headstart.serving.one_thread import OneThread
from headstart.serving.ort import onnxruntime
from headstart.serving.server.errors import bad_request, internal, unavailable
from headstart.serving.server.models.bound import Bound, terminate
from headstart.serving.server.models.drift import DriftGauge

_WARM_RUNS = 4  # of one row: the first plans and allocates, the others tell how long a call takes
_WARM_NS = 1_000_000_000  # a largest batch that would take longer is not warmed on the CPU, where it gains little
_REASON = 2000  # characters of a reason, whatever ONNX Runtime quotes in it
_FREE_SIZE = 224  # pixels, where a package does not say what it was timed with
_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(double)": "float64",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(string)": "object",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_Compute = Callable[[list[str], dict[str, NDArray[Any]]], list[NDArray[Any]]]
_REFUSED = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument


class LoadedModel:
    """A graph in a session, with what a server says about it.

    Args:
        name, version: of the repository.
        session: an ONNX Runtime session.
        max_batch: rows of one run.
        manifest: of the package it is from; None for a bare graph.
        buckets: batch sizes to pad to and to keep buffers for, ascending, ending with `max_batch`; empty runs each size
            as it comes.
        memory: where those buffers lie, `cpu` or `cuda`.
        thread: the only one that may use the session, as `Device.thread`.

    Raises:
        PackageError: an input or output of a type that the protocol cannot carry (bfloat16, sequences, maps).
    """

    drift: DriftGauge | None = None

    def __init__(
        self,
        *,
        name: str,
        version: str,
        session: onnxruntime.InferenceSession,
        max_batch: int,
        manifest: Manifest | None = None,
        buckets: tuple[int, ...] = (),
        memory: str = "cpu",
        thread: OneThread | None = None,
    ) -> None:
        self.name, self.version, self.manifest, self.max_batch = name, version, manifest, max_batch
        self.inputs = tensors(session.get_inputs())
        outputs = tensors(session.get_outputs())
        hidden = manifest.drift.output if manifest and manifest.drift else None
        self.outputs = tuple(one for one in outputs if one.name != hidden)
        """What clients are offered: all but the features, which are for the drift gauge."""
        self.labels = manifest.labels if manifest else None
        self.provider = str(session.get_providers()[0])
        self._buckets = buckets
        self._texts = [one.name for one in (*self.inputs, *self.outputs) if one.dtype == "object"]
        self._cut: Callable[[], None]
        self._compute: _Compute | None
        if buckets:
            bound = Bound(session, self.inputs, outputs, buckets=buckets, device=memory, thread=thread)
            self._compute, self._cut = bound.run, bound.cut
        else:
            options = onnxruntime.RunOptions()
            self._compute, self._cut = partial(session.run, run_options=options), partial(terminate, options)

    def run(self, feed: dict[str, NDArray[Any]], outputs: list[str]) -> list[NDArray[Any]]:
        """Compute `outputs`, in their order; calls from several threads are safe.

        Raises:
            ServeError: 400, where ONNX Runtime refuses the inputs; 503 after `close`.
        """
        compute = self._compute
        if compute is None:
            raise unavailable(f"{self.name} version {self.version} was taken down; try again")
        if self._texts:
            feed = {name: _decoded(name, array) for name, array in feed.items()}
        try:
            found = compute(outputs, feed)
        except _REFUSED as error:
            raise bad_request(f"{self.name} does not take this request: {public(first_line(error))}") from error
        return [_encoded(array) for array in found] if self._texts else found

    def warm_up(self) -> list[tuple[int, int]]:
        """Run before the first request: one row, then the largest batch or each bucket.

        The sizes are those that the package was timed with when it was exported.

        Returns:
            (bytes of the input, ns) of the calls after the first, for the scheduler.
        """
        known: list[tuple[int, int]] = []
        names = [one.name for one in self.outputs]
        for rows in (*[1] * _WARM_RUNS, *(self._buckets or (self.max_batch,))):
            if rows > 1 and not self._buckets and rows * known[-1][1] > _WARM_NS:
                break
            feed = {one.name: self._sample(one, rows) for one in self.inputs}
            started = perf_counter_ns()
            self.run(feed, names)
            known.append((sum(array.nbytes for array in feed.values()), perf_counter_ns() - started))
        return known[1:_WARM_RUNS]  # a call is known when its size has been run more than once

    def cut(self) -> None:
        """End the runs that have begun, and all others, with an error."""
        self._cut()

    def close(self) -> None:
        """Let go of the session; a run that has begun ends well."""
        self._compute = None

    def _sample(self, tensor: Tensor, rows: int) -> NDArray[Any]:
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in tensor.shape]
        if self.manifest:
            timed = self.manifest.latency.shape if self.manifest.latency else (1, _FREE_SIZE, _FREE_SIZE, 3)
            if len(timed) == len(shape):
                shape = [
                    size if isinstance(size, int) else free for size, free in zip(tensor.shape, timed, strict=True)
                ]
        if shape and not (isinstance(tensor.shape[0], int) and tensor.shape[0] > 0):
            shape[0] = rows
        if tensor.dtype == "object":
            return np.full(shape, b"", dtype=object)
        return np.full(shape, 127 if tensor.dtype == "uint8" else 0, np.dtype(tensor.dtype))


class WatchedModel(LoadedModel):
    """A model some of whose runs also compute the features, for a drift gauge.

    Args:
        gauge: decides which, and takes them in.
        settings: as of `LoadedModel`.
    """

    def __init__(self, *, gauge: DriftGauge, **settings: Any) -> None:
        super().__init__(**settings)
        self.drift: DriftGauge = gauge

    def run(self, feed: dict[str, NDArray[Any]], outputs: list[str]) -> list[NDArray[Any]]:
        """As `LoadedModel`."""
        if not self.drift.due():
            return super().run(feed, outputs)
        *found, features = super().run(feed, [*outputs, self.drift.training.output])
        self.drift.observe(features)
        return found

    def warm_up(self) -> list[tuple[int, int]]:
        """As `LoadedModel`; what it runs on is no live image."""
        known = super().warm_up()
        self.drift.clear()
        return known


def load_graph(model: Path | bytes, *, name: str, version: str = "1", device: Device, max_batch: int) -> LoadedModel:
    """Load a bare ONNX graph: for tests and benchmarks; a repository takes packages alone."""
    return LoadedModel(name=name, version=version, session=open_on(device, model), max_batch=max_batch)


def public(message: str, *known: Path) -> str:
    """A reason that strangers may read: the names of `known` folders' files stay, all other paths lose theirs."""
    for path in known:
        message = message.replace(f"{path}/", "").replace(str(path), "the package")
    return printable(re.sub(r"(?<![\w.])/(?:[^\s/'\",:;()]+/)+([^\s/'\",:;()]*)", r"\1", message)[:_REASON])


def tensors(nodes: Sequence[Any]) -> tuple[Tensor, ...]:
    """A session's inputs or outputs; a size that is free keeps its word, or is -1."""
    found = []
    for node in nodes:
        if node.type not in _DTYPES:
            raise PackageError(f"{node.name!r} is {node.type}, which the protocol cannot carry; use a plain type")
        shape = tuple(-1 if size is None else size for size in node.shape)
        found.append(Tensor(name=node.name, dtype=_DTYPES[node.type], shape=shape))
    return tuple(found)


def _decoded(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """BYTES to the text that ONNX Runtime takes."""
    if array.dtype.kind != "O":
        return array
    try:
        texts = [item.decode() if isinstance(item, bytes) else item for item in array.ravel()]
    except UnicodeDecodeError:
        raise bad_request(f"the input {name!r} holds bytes that are not UTF-8 text") from None
    return np.array(texts, dtype=object).reshape(array.shape)


def _encoded(array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind not in "OU":
        return array
    try:
        texts = [str(item).encode() for item in array.ravel()]
    except UnicodeEncodeError as error:
        raise internal("the model gave text that is not Unicode") from error
    found = np.empty(len(texts), dtype=object)
    found[:] = texts
    return found.reshape(array.shape)
