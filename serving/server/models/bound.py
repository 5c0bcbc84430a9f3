"""Runs of a session at fixed batch sizes, in buffers that stay where they are: what a GPU wants.

The CUDA provider plans and searches algorithms anew for each shape that it has not seen, and a CUDA graph replays its
kernels on the addresses and shapes that it was captured with. So a batch is padded to the next of a few sizes, and for
each size and shape there is one set of buffers on the device, bound once: a request is copied in, the outputs asked for
are copied out. All of it runs on the CPU provider as well, where the tests compare it with plain runs bit for bit.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headstart.serving.manifest import Tensor
from headstart.serving.one_thread import OneThread
from headstart.serving.ort import onnxruntime

_MOST_PLANS = 64
"""Shapes that buffers are kept for; further ones run without, as images of every size would fill the device."""
_NO_GRAPH = "-1"


class Bound:
    """A session with its buffers. Calls from several threads are safe, and run one after the other.

        bound = Bound(session, inputs, outputs, buckets=(1, 2, 4, 8), device="cuda")
        bound.run(["logits"], {"images": images})

    Args:
        session: on the device's provider; with `enable_cuda_graph` each set of buffers gets a graph of its own.
        inputs, outputs: of the session.
        buckets: batch sizes to pad to, ascending.
        device: where the buffers lie, `cuda` or `cpu`.
        thread: which alone may use the session, and ends it, as `Device.thread`; None is any.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        buckets: Sequence[int],
        device: str,
        thread: OneThread | None = None,
    ) -> None:
        self._held = held = _Held(session)
        self._buckets, self._device = tuple(buckets), device
        self._inputs, self._outputs = inputs, outputs
        self._bindable = all(one.dtype != "object" for one in (*inputs, *outputs)) and all(
            all(isinstance(size, int) and size > 0 for size in one.shape[1:]) for one in outputs
        )
        self._options = _options(_NO_GRAPH)
        self._lock = threading.Lock()
        self._thread = thread
        if thread:
            weakref.finalize(self, thread.leave, vars(held).clear).atexit = False

    def run(self, names: list[str], feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """As `session.run`: the same numbers, for the rows that were given."""
        return self._thread.submit(self._run, names, feed).result() if self._thread else self._run(names, feed)

    def _run(self, names: list[str], feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        rows = len(feed[self._inputs[0].name])
        bucket = next((size for size in self._buckets if size >= rows), None)
        if bucket is None:
            return self._run_unbound(names, feed)
        key = (bucket, *(feed[one.name].shape[1:] for one in self._inputs))
        plans = self._held.plans
        with self._lock:
            plan = plans.get(key)
            if plan is None and self._bindable and len(plans) < _MOST_PLANS:
                plan = plans[key] = self._bind(bucket, feed)
                if self._options.terminate:  # asked once it is where `cut` finds it
                    terminate(plan.options)
            if plan is not None:
                return plan.run(names, feed, rows)
        padded = {name: _padded(array, bucket) for name, array in feed.items()}
        return [array[:rows] for array in self._run_unbound(names, padded)]

    def cut(self) -> None:
        """End the runs that have begun, and all others, with an error."""
        terminate(self._options)  # first: what is bound from now on is cut too
        for plan in [*self._held.plans.values()]:
            terminate(plan.options)

    def _run_unbound(self, names: list[str], feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = self._held.session.run(names, feed, self._options)
        return found

    def _bind(self, bucket: int, feed: dict[str, NDArray[Any]]) -> "_Plan":
        shapes = {one.name: (bucket, *feed[one.name].shape[1:]) for one in self._inputs}
        shapes |= {one.name: (bucket, *one.shape[1:]) for one in self._outputs}
        values = {
            one.name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(
                shapes[one.name], np.dtype(one.dtype).type, self._device, 0
            )
            for one in (*self._inputs, *self._outputs)
        }
        session = self._held.session
        binding = session.io_binding()
        for one in self._inputs:
            binding.bind_ortvalue_input(one.name, values[one.name])
        for one in self._outputs:
            binding.bind_ortvalue_output(one.name, values[one.name])
        return _Plan(session, binding, values, bucket, str(len(self._held.plans) + 1))


class _Held:
    """All that holds a session and its buffers: whoever clears it ends them."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.plans: dict[Any, _Plan] = {}


class _Plan:
    """Buffers of one batch size and shape, bound to a session."""

    def __init__(
        self, session: onnxruntime.InferenceSession, binding: Any, values: dict[str, Any], bucket: int, graph: str
    ) -> None:
        self._session, self._binding, self._values, self._bucket = session, binding, values, bucket
        self.options = _options(graph)

    def run(self, names: list[str], feed: dict[str, NDArray[Any]], rows: int) -> list[NDArray[Any]]:
        for name, array in feed.items():
            self._values[name].update_inplace(np.ascontiguousarray(_padded(array, self._bucket)))
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding, self.options)
        self._binding.synchronize_outputs()
        # A copy: on the CPU the array lies in the buffer, which the next run writes.
        return [np.array(self._values[name].numpy()[:rows]) for name in names]


def buckets(max_batch: int) -> tuple[int, ...]:
    """Batch sizes to pad to: 1, 2, 4, ... and `max_batch`."""
    return (*(1 << power for power in range((max_batch - 1).bit_length())), max_batch)


def _padded(array: NDArray[Any], bucket: int) -> NDArray[Any]:
    """The last row again and again, up to a batch size."""
    missing = bucket - len(array)
    return np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) if missing else array


def terminate(options: onnxruntime.RunOptions) -> None:
    """End the runs that have these options, and all that will, with an error."""
    options.terminate = True


def _options(graph: str) -> onnxruntime.RunOptions:
    """Which CUDA graph a run captures, or replays; `-1` is none."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    return options
