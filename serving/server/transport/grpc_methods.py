"""What the methods of `inference.GRPCInferenceService` answer, over one service."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf import json_format  # type: ignore[import-untyped]

from headstart.serving.server.interface import InferenceService
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.watching.watch import Seen
from headstart.serving.server.wire.grpc_codec import GrpcDecoder, encode, named, parse, read_parameters, streamed
from headstart.serving.server.wire.grpc_messages import MESSAGES
from headstart.serving.server.wire.protocol import InferRequest, InferResponse

FINAL = "triton_final_response"
"""The parameter by which Triton's clients know the last answer to a message of a stream."""

Answer = Callable[[bytes, Any, Seen], Awaitable[bytes]]
"""The bytes of a message, the call and what is noted of it, to the bytes of the answer."""


class Methods:
    """What the methods answer, over one service.

    Args:
        service: answers the requests.
        settings: the limits.
    """

    def __init__(self, service: InferenceService, settings: HttpSettings) -> None:
        self.service = service
        self.closing = False
        """Whether the server has stopped accepting, which makes it not ready."""
        self._limits = settings.limits
        self._decoder = GrpcDecoder(settings.limits)

    async def infer(self, body: bytes, context: Any, seen: Seen) -> bytes:
        """ModelInfer. A client that goes, or whose deadline passes, cancels its request."""
        request, response = await self._inferred(body, context, seen)
        return encode(response, request.outputs, _label(request, response))

    async def stream_infer(self, body: bytes, context: Any, seen: Seen) -> bytes:
        """One message of ModelStreamInfer, to which there is one answer, marked as the last as Triton does."""
        request, response = await self._inferred(body, context, seen)
        response.parameters[FINAL] = True
        return streamed(encode(response, request.outputs, _label(request, response)))

    async def _inferred(self, body: bytes, context: Any, seen: Seen) -> tuple[InferRequest, InferResponse]:
        request = self._decoder.decode(body)
        remaining = context.time_remaining()
        if remaining is not None:
            deadline = time.monotonic() + remaining
            request.deadline = deadline if request.deadline is None else min(request.deadline, deadline)
        request.alone = self.service.clients == 1
        seen.asked(request)
        try:
            result = self.service.infer(request)
            response = result if isinstance(result, InferResponse) else await result
        except asyncio.CancelledError:
            request.cancel()
            raise
        seen.told(response)
        return request, response

    def document(self, name: str) -> Answer:
        """The method of this name, whose answer the service gives as a document."""
        method: Callable[[Any], Any] = getattr(self, f"_{name}")
        kind = MESSAGES[f"{name}Response"]

        async def answer(body: bytes, context: Any, seen: Seen) -> bytes:
            found = method(parse(f"{name}Request", body))
            if asyncio.iscoroutine(found):
                found = await found
            data: bytes = json_format.ParseDict(found, kind(), ignore_unknown_fields=True).SerializeToString()
            return data

        return answer

    def _ServerLive(self, request: Any) -> dict[str, Any]:  # noqa: N802 - these bear the protocol's names
        return {"live": self.service.live()}

    def _ServerReady(self, request: Any) -> dict[str, Any]:  # noqa: N802
        return {"ready": self.service.ready() and not self.closing}

    def _ModelReady(self, request: Any) -> dict[str, Any]:  # noqa: N802
        return {"ready": self.service.model_ready(*named(request.name, request.version)) and not self.closing}

    def _ServerMetadata(self, request: Any) -> dict[str, Any]:  # noqa: N802
        return self.service.server_metadata()

    def _ModelMetadata(self, request: Any) -> dict[str, Any]:  # noqa: N802
        return self.service.model_metadata(*named(request.name, request.version))

    def _ModelConfig(self, request: Any) -> dict[str, Any]:  # noqa: N802
        return {"config": self.service.model_config(*named(request.name, request.version))}

    def _ModelStatistics(self, request: Any) -> Any:  # noqa: N802
        name, version = named(request.name, request.version)
        return self.service.statistics(name or None, version)

    def _RepositoryIndex(self, request: Any) -> dict[str, Any]:  # noqa: N802
        return {"models": self.service.repository_index(request.ready)}

    async def _RepositoryModelLoad(self, request: Any) -> dict[str, Any]:  # noqa: N802
        name, _ = named(request.model_name)
        await self.service.load(name, read_parameters(request, self._limits))
        return {}

    async def _RepositoryModelUnload(self, request: Any) -> dict[str, Any]:  # noqa: N802
        name, _ = named(request.model_name)
        await self.service.unload(name)
        return {}


def _label(request: InferRequest, response: InferResponse) -> Callable[[int], str | None]:
    if not any(output.classification for output in request.outputs or ()):
        return lambda index: None
    return dict(enumerate(response.labels or ())).get


NAMES = ("ModelInfer", *(name[1:] for name in vars(Methods) if name[1:2].isupper()))
"""All methods that take one message and give one."""
