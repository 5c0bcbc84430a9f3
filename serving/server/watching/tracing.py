"""OpenTelemetry: a span for each inference, with its stages below it, sent to a collector over OTLP.

Imported only where `--otel` is given; needs the extra `otel`. Spans are made when a request has been answered, from
the times noted on its way, so that a client waits for none of it.
"""

import os
import threading
from time import perf_counter_ns, time_ns
from typing import Any

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagate import extract
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode

from headstart.serving.server.errors import StartError
from headstart.serving.server.watching.watch import Outcome, Seen

_CLOSE_S = 5.0
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


class Tracing:
    """Spans of inferences.

    OpenTelemetry's own environment variables say the rest: OTEL_EXPORTER_OTLP_ENDPOINT and _HEADERS, OTEL_SERVICE_NAME
    (`headstart`, where it is not set), OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_PROPAGATORS (W3C's
    traceparent by default), OTEL_BSP_*, OTEL_SDK_DISABLED.

    Raises:
        StartError: the environment asks for a protocol other than http/protobuf.
    """

    def __init__(self) -> None:
        for name in _PROTOCOLS:
            if (asked := os.environ.get(name, "http/protobuf")) != "http/protobuf":
                raise StartError(f"{name} is {asked!r}; accepted: http/protobuf, which collectors take on port 4318")
        named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "headstart"}
        # What is given here goes before OTEL_RESOURCE_ATTRIBUTES, which may hold the name as well.
        if f"{SERVICE_NAME}=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
            named = {}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("headstart.serving")

    def ended(self, seen: Seen, outcome: Outcome) -> None:
        """Make the spans of an inference; other requests have none."""
        request, response = seen.request, seen.response
        if request is None:
            return
        now = perf_counter_ns()
        offset = time_ns() - now
        attributes: dict[str, Any] = {
            "headstart.model": request.model,
            "headstart.request_id": seen.request_id,
            "headstart.version": response.version if response is not None else request.version or "",
        }
        if outcome.path:
            attributes["http.request.method"], attributes["url.path"] = outcome.method, outcome.path
            attributes["http.response.status_code"] = outcome.status
        else:
            service, _, method = outcome.method.rpartition("/")
            attributes |= {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}
            attributes["rpc.response.status_code"] = outcome.status
        span = self._tracer.start_span(
            f"infer {request.model}",
            context=extract(outcome.headers()),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=seen.began + offset,
        )
        if span.is_recording():
            inside = trace.set_span_in_context(span)
            for stage, start, end in _stages(seen, now):
                child = self._tracer.start_span(stage, context=inside, start_time=start + offset)
                child.end(end + offset)
            if outcome.failed:
                span.set_status(Status(StatusCode.ERROR))
        span.end(now + offset)

    def close(self) -> None:
        """Send what is still held, within five seconds: alone it would try an unreachable collector for thirty."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(_CLOSE_S)


def _stages(seen: Seen, now: int) -> list[tuple[str, int, int]]:
    """Name, start and end of each stage that a request has reached."""
    stages = [("decode", seen.began, seen.decoded)]
    if seen.response is not None and seen.answered:
        timings = seen.response.timings_ns
        at = seen.decoded
        for name in ("images", "queue", "compute"):
            if name in timings:
                stages.append((name, at, at := at + timings[name]))
        stages.append(("encode", seen.answered, now))
    return stages
