"""What the transports call: the one interface between HTTP or gRPC and the models."""

from collections.abc import Awaitable
from typing import Any, Protocol

from headstart.serving.server.errors import ServeError
from headstart.serving.server.wire.protocol import InferRequest, InferResponse


class InferenceService(Protocol):
    """Models that answer requests. Every refusal is a `ServeError`.

    A service may also have `metrics_text`, which gives Prometheus' exposition as bytes or what to wait for.
    """

    clients: int
    """Connections of HTTP that are open and calls of gRPC that are worked on: counted by the transports."""

    def refused(self, error: ServeError) -> None:
        """Count a request that was refused or failed; called by the transports, once for each."""

    async def start(self) -> None:
        """Load the models and warm them up."""

    async def stop(self) -> None:
        """Finish what runs and release the models."""

    def infer(self, request: InferRequest) -> InferResponse | Awaitable[InferResponse]:
        """Run a request: its response, where the model ran at once, or one to wait for.

        Where a model's metadata lists `encoded_images`, a request may bring these in the place of the pixels.
        """

    def live(self) -> bool:
        """Whether the process works."""

    def ready(self) -> bool:
        """Whether requests are taken; a package that is refused changes nothing."""

    def model_ready(self, name: str, version: str | None) -> bool:
        """Whether a model is ready."""

    def server_metadata(self) -> dict[str, Any]:
        """The server's name, version and extensions."""

    def model_metadata(self, name: str, version: str | None) -> dict[str, Any]:
        """A model's versions, inputs and outputs."""

    def model_config(self, name: str, version: str | None) -> dict[str, Any]:
        """A model's configuration in Triton's form."""

    def statistics(self, name: str | None, version: str | None) -> dict[str, Any] | Awaitable[dict[str, Any]]:
        """Triton's statistics of one model, or of all; something to wait for, where other processes are asked."""

    def repository_index(self, ready: bool) -> list[dict[str, Any]]:
        """The models of the repository, or only those that are ready."""

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        """Load a model, or load it anew, also where the caller is cancelled meanwhile; so too `unload`."""

    async def unload(self, name: str) -> None:
        """Stop serving a model."""

    def card(self, name: str) -> dict[str, Any]:
        """A model's labels, task, licence, provenance and latency."""
