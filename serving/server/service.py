"""The service that HTTP and gRPC both call: requests to schedulers, and what Triton's clients ask of a server."""

import asyncio
import functools
import importlib.metadata
from collections.abc import Awaitable
from time import perf_counter_ns, time_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from headstart.serving.manifest import Tensor
from headstart.serving.package import MODEL
from headstart.serving.runtime import CPU
from headstart.serving.server.errors import ServeError, bad_request
from headstart.serving.server.models.drift import distance
from headstart.serving.server.models.entry import Entry, Served
from headstart.serving.server.models.repository import Repository
from headstart.serving.server.watching.metrics import Metrics
from headstart.serving.server.watching.watch import CLIENT_GONE
from headstart.serving.server.wire.encoded import ENCODED, ImageDecoder, pixels_input
from headstart.serving.server.wire.protocol import Limits
from headstart.serving.server.wire.tensors import datatype_of

if TYPE_CHECKING:
    from headstart.serving.server.wire.protocol import InferRequest, InferResponse

PLATFORM = "onnxruntime_onnx"
EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
_FILES = Tensor(name=ENCODED, dtype="object", shape=("batch",))
_TYPES = {"BYTES": "TYPE_STRING"}  # all others are TYPE_ and the protocol's own name


class Service:
    """The models of a repository, behind the interface that the transports know. Belongs to one event loop.

        service = Service(Repository(Path("models")))
        await service.start()
        answer = service.infer(request)
        response = answer if isinstance(answer, InferResponse) else await answer
        await service.stop()

    Every refusal is a `ServeError`: 404 for a model or version that is not there, 503 for one that is not ready.
    """

    def __init__(self, repository: Repository, limits: Limits | None = None) -> None:
        self.repository = repository
        self.clients = 0
        self._images = ImageDecoder(limits or Limits())
        self.metrics: Metrics = repository.metrics

    async def start(self) -> None:
        """Load and warm up what the policies choose; a bad package is in the index with its reason."""
        await self.repository.start()

    async def stop(self) -> None:
        """Refuse new requests, answer those that are queued, close the sessions."""
        await self.repository.stop()
        self._images.close()

    def infer(self, request: "InferRequest") -> "InferResponse | Awaitable[InferResponse]":
        """The response, where the model ran at once, or one to wait for; files are decoded first."""
        if ENCODED in request.inputs:
            served = self.repository.find(request.model, request.version)
            if name := pixels_input(served.model.inputs):
                return self._decoded(request, name, served)
        return self.repository.route(request.model, request.version).scheduler.infer(request)

    async def _decoded(self, request: "InferRequest", name: str, served: Served) -> "InferResponse":
        """The answer to files, counted as one request, of however many parts."""
        arrived = perf_counter_ns()

        def start(parts: "tuple[InferRequest, ...]") -> "list[InferResponse | asyncio.Future[InferResponse]]":
            nonlocal served
            served = self.repository.route(request.model, request.version)  # one version for all parts
            return [served.scheduler.infer(part) for part in parts]

        try:
            response = await self._images.infer(request, name, served.model.max_batch, start)
        except ServeError as error:
            served.scheduler.statistics.refused(error, perf_counter_ns() - arrived)
            raise
        except asyncio.CancelledError:
            served.scheduler.statistics.failed(CLIENT_GONE, perf_counter_ns() - arrived)
            raise
        stages, total = response.timings_ns, perf_counter_ns() - arrived
        served.scheduler.statistics.answered(
            0, stages["queue"], stages["compute"], total, time_ns() // 1_000_000, stages["images"]
        )
        return response

    def refused(self, error: ServeError) -> None:
        """Count a request that was refused or failed, unless a version has counted it."""
        if not error.counted:
            self.metrics.refused(error.status)

    def live(self) -> bool:
        """Whether the process works: it does, if it answers."""
        return True

    def ready(self) -> bool:
        """Whether requests are taken: the first look at the repository is over and the server is not stopping.

        A package that is refused does not make the server unready: the others serve, and the index names it.
        """
        return self.repository.started and not self.repository.stopping

    def model_ready(self, name: str, version: str | None) -> bool:
        """Whether a request for it would be taken."""
        try:
            self.repository.find(name, version)
        except ServeError:
            return False
        return True

    def server_metadata(self) -> dict[str, Any]:
        """The server's name, version and extensions."""
        return {"name": "headstart", "version": _version(), "extensions": list(EXTENSIONS)}

    def model_metadata(self, name: str, version: str | None) -> dict[str, Any]:
        """Versions that serve, inputs and outputs; a free size is -1."""
        served = self.repository.find(name, version)
        versions = sorted(self.repository.entries[name].served)
        return {
            "name": name,
            "versions": [str(one) for one in versions],
            "platform": PLATFORM,
            "inputs": [_metadata(one) for one in _with_files(served.model.inputs)],
            "outputs": [_metadata(one) for one in served.model.outputs],
        }

    def model_config(self, name: str, version: str | None) -> dict[str, Any]:
        """Triton's ModelConfig as JSON; its sizes leave out the batch where `max_batch_size` is above 0."""
        served = self.repository.find(name, version)
        model, scheduling = served.model, self.repository.scheduling
        batched = served.scheduler.signature.batchable
        config: dict[str, Any] = {
            "name": name,
            "platform": PLATFORM,
            "backend": "onnxruntime",
            "version_policy": _version_policy(self.repository.entries[name]),
            "max_batch_size": model.max_batch if batched else 0,
            "input": [_config(one, batched) for one in _with_files(model.inputs)],
            "output": [_config(one, batched) for one in model.outputs],
            "instance_group": [
                {"name": name, "kind": "KIND_CPU" if model.provider == CPU else "KIND_GPU", "count": 1},
            ],
            "default_model_filename": MODEL,
            "parameters": {
                "provider": {"string_value": model.provider},
                "max_queue": {"string_value": str(scheduling.max_queue)},
            },
        }
        if batched:
            config["dynamic_batching"] = {"max_queue_delay_microseconds": round(scheduling.max_delay_s * 1e6)}
        return config

    def statistics(self, name: str | None, version: str | None) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """Triton's statistics of one version, of all of a model, or of all."""
        if name:
            self.repository.find(name, version)
        return self.metrics.document(name, version)

    def repository_index(self, ready: bool) -> list[dict[str, Any]]:
        """Every version with its state READY, LOADING or UNAVAILABLE and the reason, or those READY alone."""
        rows = [row for _, entry in sorted(self.repository.entries.items()) for row in entry.index()]
        return [row for row in rows if row["state"] == "READY"] if ready else rows

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        """Load a model from the repository; a configuration or files in the request are refused."""
        self.check_load(parameters)
        await self.repository.load(name)

    def check_load(self, parameters: dict[str, Any]) -> None:
        """Refuse what `load` does not take.

        Raises:
            ServeError: 400.
        """
        if parameters:
            given = ", ".join(sorted(str(one)[:40] for one in parameters))
            raise bad_request(f"load takes no parameters, found {given}; copy a package to the repository instead")

    async def unload(self, name: str) -> None:
        """Take a model down; returns when its last request is answered."""
        await self.repository.unload(name)

    def card(self, name: str, version: str | None = None) -> dict[str, Any]:
        """What a reader wants to know of a model: labels, task, licence, provenance, parity and latency."""
        served = self.repository.find(name, version)
        model = served.model
        card: dict[str, Any] = {
            "name": name,
            "version": model.version,
            "provider": model.provider,
            "max_batch": model.max_batch,
            "labels": list(model.labels) if model.labels is not None else None,
            "memory": {"estimated_bytes": served.memory.estimated, "measured_bytes": served.memory.measured},
        }
        if gauge := model.drift:
            state = gauge.state()
            card["drift"] = {"distance": distance(state), "rows": state["rows"]}  # of this process
        if manifest := model.manifest:
            latency = manifest.latency
            card |= {
                "task": "image classification",
                "licence": manifest.licence,
                "provenance": manifest.provenance,
                "preprocessing": manifest.preprocessing,
                "temperature": manifest.temperature,
                "variant": manifest.variant.name,
                "created": manifest.created,
                "parity": {
                    "tolerance": manifest.parity.tolerance,
                    "provider": manifest.parity.provider,
                    "providers": list(manifest.proven_on),
                    "relative_difference": max(row.relative_difference for row in manifest.parity.rows),
                },
                "latency": latency
                and {
                    "batch": latency.batch,
                    "shape": list(latency.shape),
                    "provider": latency.provider,
                    "p50_ms": latency.predict_p50_ms,
                },
            }
        return card

    def metrics_text(self) -> bytes | Awaitable[bytes]:
        """Prometheus' exposition."""
        return self.metrics.metrics_text()


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("headstart")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _datatype(tensor: Tensor) -> str:
    return datatype_of(np.dtype(tensor.dtype))


def _sizes(tensor: Tensor) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in tensor.shape]


def _with_files(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a client may send: the model's inputs, and for images also their files."""
    return (*inputs, _FILES) if pixels_input(inputs) else inputs


def _metadata(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": _datatype(tensor), "shape": _sizes(tensor)}


def _config(tensor: Tensor, batched: bool) -> dict[str, Any]:
    datatype = _datatype(tensor)
    data_type = _TYPES.get(datatype, f"TYPE_{datatype}")
    config = {"name": tensor.name, "data_type": data_type, "dims": _sizes(tensor)[int(batched) :]}
    return config | {"optional": True} if tensor is _FILES else config


def _version_policy(entry: Entry) -> dict[str, Any]:
    if entry.policy.kind == "latest":
        return {"latest": {"num_versions": 1}}
    return {"specific": {"versions": sorted(entry.served)}}
