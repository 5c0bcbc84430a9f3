"""`grpc.health.v1.Health`: what Kubernetes' gRPC probes and load balancers ask, beside the protocol's own health.

Its two messages are built here, as `grpc_messages` builds the others: grpcio-health-checking is not needed.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from headstart.serving.server.errors import bad_request, not_found
from headstart.serving.server.wire.grpc_messages import SERVICE as INFERENCE

SERVICE = "grpc.health.v1.Health"
KNOWN = ("", INFERENCE)
"""The services that are asked for: the whole server, or the one that it has."""
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
_LOOK_S = 0.5


def _messages() -> tuple[Any, Any]:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="headstart/health.proto", package=SERVICE.rpartition(".")[0], syntax="proto3"
    )
    file.message_type.add(name="HealthCheckRequest").field.add(
        name="service", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL
    )
    response = file.message_type.add(name="HealthCheckResponse")
    statuses = response.enum_type.add(name="ServingStatus")
    for number, name in enumerate(("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")):
        statuses.value.add(name=name, number=number)
    kind = f".{file.package}.HealthCheckResponse.ServingStatus"
    response.field.add(name="status", number=1, type=field.TYPE_ENUM, type_name=kind, label=field.LABEL_OPTIONAL)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = ("HealthCheckRequest", "HealthCheckResponse")
    request, answer = (
        message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{one}")) for one in names
    )
    return request, answer


_Request, _Response = _messages()


class Health:
    """The two methods.

    Args:
        ready: whether requests are taken.
    """

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Tell those who watch that the server stops, and end their calls."""
        self._closing.set()

    def check(self, body: bytes) -> bytes:
        """Check: whether requests are taken now.

        Raises:
            ServeError: 404 for a service that is not here.
        """
        status = self._status(_service(body))
        if status == SERVICE_UNKNOWN:
            raise not_found(f"that service is not served here; accepted: {INFERENCE!r}, or none for the whole server")
        return _encoded(status)

    async def watch(self, body: bytes) -> AsyncIterator[bytes]:
        """Watch: the status now, and again when it has changed."""
        service, told = _service(body), None
        while True:
            ending = self._closing.is_set()
            if (status := self._status(service)) != told:
                told = status
                yield _encoded(status)
            if ending:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), _LOOK_S)

    def _status(self, service: str) -> int:
        if service not in KNOWN:
            return SERVICE_UNKNOWN
        return SERVING if self._ready() and not self._closing.is_set() else NOT_SERVING


def _service(body: bytes) -> str:
    try:
        return str(_Request.FromString(body).service)
    except DecodeError:
        raise bad_request("the message is no HealthCheckRequest: its bytes are damaged") from None


def _encoded(status: int) -> bytes:
    data: bytes = _Response(status=status).SerializeToString()
    return data
