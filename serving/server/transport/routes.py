"""What the HTTP server answers at which path.

`Routes.resolve` finds the handler of a head; a handler takes an exchange and what its path names, and returns a
`Response`, or a `Later` where something must be awaited first.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from headstart.serving.server.errors import MethodNotAllowed, bad_request, not_found, too_many, unavailable
from headstart.serving.server.interface import InferenceService
from headstart.serving.server.remembered import Remembered
from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport.exchange import Exchange, Later, Response, json_response
from headstart.serving.server.transport.paths import ROUTES, match, model_named
from headstart.serving.server.transport.static import page
from headstart.serving.server.watching.metrics import CONTENT_TYPE
from headstart.serving.server.wire import predict
from headstart.serving.server.wire.bodies import inflate
from headstart.serving.server.wire.decoding import RequestDecoder, read_parameters
from headstart.serving.server.wire.documents import parse_json
from headstart.serving.server.wire.encoded import ENCODED
from headstart.serving.server.wire.head import Head
from headstart.serving.server.wire.openapi import document
from headstart.serving.server.wire.protocol import InferRequest, InferResponse, RequestedOutput, ResponseEncoder

T = TypeVar("T")

_BINARY = b"Content-Type: application/octet-stream\r\nInference-Header-Content-Length: %d\r\n"
_JSON = b"Content-Type: application/json\r\n"
_DECODERS = 2
_MOST_DECODING = 64


class Routes:
    """The handlers, over one service.

    Args:
        service: answers the requests.
        settings: the limits.
    """

    def __init__(self, service: InferenceService, settings: HttpSettings) -> None:
        self.service = service
        self.settings = settings
        self.closing = False
        """Whether the server has stopped accepting, which makes it not ready."""
        self._decoder = RequestDecoder(settings.limits)
        self._encoder = ResponseEncoder()
        self._pool = ThreadPoolExecutor(_DECODERS, thread_name_prefix="decode")
        self._decoding = 0
        self._page = page()
        self._openapi_document = json_response(document())
        self._remembered: Remembered[str, tuple[dict[str, Callable[..., Any]], tuple[str, ...]]] = Remembered()

    def close(self) -> None:
        """Let go of the threads that decode."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def resolve(self, head: Head) -> None:
        """Set the handler of a head, and its arguments.

        Raises:
            ServeError: 404, 405.
        """
        handlers, names = self._find(head.path)
        method = "GET" if head.method == "HEAD" else head.method
        if method not in handlers:
            raise MethodNotAllowed(head.method, [*handlers, *(["HEAD"] if "GET" in handlers else [])])
        head.handler, head.arguments = handlers[method], names
        if b"content-encoding" in head.headers and head.headers[b"content-encoding"].lower() != b"identity":
            head.handler = self._inflated

    def _find(self, path: str) -> tuple[dict[str, Callable[..., Any]], tuple[str, ...]]:
        found = self._remembered.get(path)
        if found is not None:
            return found
        segments = path.split("/")
        for _, template, _ in ROUTES:
            names = match(template.split("/"), segments)
            if names is None:
                continue
            handlers = {verb: getattr(self, f"_{name}") for verb, other, name in ROUTES if other == template}
            self._remembered[path] = handlers, names
            return handlers, names
        raise not_found("nothing is served at this path; GET /openapi.json lists what is")

    def _inflated(self, exchange: Exchange, *arguments: str) -> Later:
        head = exchange.head
        encoding = head.headers[b"content-encoding"].decode("latin-1").strip().lower()
        handlers, _ = self._find(head.path)
        handler = handlers["GET" if head.method == "HEAD" else head.method]

        async def answer() -> Response:
            inflated = await self._apart(inflate, exchange.body, encoding, self.settings.max_body_bytes)
            if exchange.gone:
                raise unavailable("the client has gone")
            exchange.hold(len(inflated))
            exchange.body = memoryview(inflated)
            result = handler(exchange, *arguments)
            if isinstance(result, Later):
                return result.finish(await result.awaitable)
            response: Response = result
            return response

        return Later(answer(), _as_it_is)

    async def _apart(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run what takes long and releases the lock in a thread of its own."""
        if self._decoding >= _MOST_DECODING:
            raise too_many(f"{_MOST_DECODING} bodies wait to be decoded")
        self._decoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)
        finally:
            self._decoding -= 1

    def _infer(self, exchange: Exchange, name: str, version: str | None = None) -> Response | Later:
        head = exchange.head
        request, binary = self._decoder.decode(exchange.body, head.json_length, model=name, version=version)
        if head.priority is not None:
            request.priority = head.priority
        if head.timeout is not None:
            request.deadline = time.monotonic() + head.timeout
        request.alone = self.service.clients == 1
        exchange.asked(request)
        result = self.service.infer(request)
        if type(result) is InferResponse:
            return self._inferred(exchange, request, binary, result)
        return Later(result, lambda response: self._inferred(exchange, request, binary, response))  # type: ignore[arg-type]

    def _inferred(self, exchange: Exchange, request: InferRequest, binary: bool, response: InferResponse) -> Response:
        exchange.told(response)
        outputs = request.outputs
        label: Callable[[int], str | None] = _no_label
        if outputs is not None and any(output.classification for output in outputs):
            label = dict(enumerate(response.labels or ())).get
        parts, length = self._encoder.encode(response, outputs, binary, label)
        return Response(200, _JSON if length is None else _BINARY % length, parts)

    def _predict(self, exchange: Exchange) -> Response | Later:
        head = exchange.head
        name = model_named(head) or predict.only_model(self.service)
        predict.check(self.service.model_metadata(name, None))
        media = head.headers.get(b"content-type", b"").decode("latin-1")
        request = InferRequest(
            model=name,
            inputs={ENCODED: predict.uploaded(media, exchange.body)},
            outputs=(RequestedOutput(name="probabilities", binary=False),),
            deadline=None if head.timeout is None else time.monotonic() + head.timeout,
            priority=head.priority or 0,
            cancelled=exchange.gone,
        )
        exchange.asked(request)
        result = self.service.infer(request)
        if isinstance(result, InferResponse):
            return self._predicted(exchange, result)
        return Later(result, lambda response: self._predicted(exchange, response))

    def _predicted(self, exchange: Exchange, response: InferResponse) -> Response:
        exchange.told(response)
        timing = ", ".join(f"{stage};dur={ns / 1e6:.3f}" for stage, ns in response.timings_ns.items())
        answer = json_response(predict.prediction(response))
        return answer._replace(headers=answer.headers + f"Server-Timing: {timing}\r\n".encode()) if timing else answer

    def _home(self, exchange: Exchange) -> Response:
        return self._page

    def _openapi(self, exchange: Exchange) -> Response:
        return self._openapi_document

    def _metrics(self, exchange: Exchange) -> Response | Later:
        text = getattr(self.service, "metrics_text", None)
        if text is None:
            raise not_found("this server counts nothing")
        exposition = text()
        return _exposition(exposition) if isinstance(exposition, bytes) else Later(exposition, _exposition)

    def _card(self, exchange: Exchange) -> Response:
        return json_response(self.service.card(model_named(exchange.head) or predict.only_model(self.service)))

    def _live(self, exchange: Exchange) -> Response:
        live = self.service.live()
        return json_response({"live": live}, 200 if live else 503)

    def _ready(self, exchange: Exchange) -> Response:
        ready = self.service.ready() and not self.closing
        return json_response({"ready": ready}, 200 if ready else 503)

    def _model_ready(self, exchange: Exchange, name: str, version: str | None = None) -> Response:
        ready = self.service.model_ready(name, version) and not self.closing
        return json_response({"name": name, "ready": ready}, 200 if ready else 503)

    def _server_metadata(self, exchange: Exchange) -> Response:
        return json_response(self.service.server_metadata())

    def _model_metadata(self, exchange: Exchange, name: str, version: str | None = None) -> Response:
        return json_response(self.service.model_metadata(name, version))

    def _model_config(self, exchange: Exchange, name: str, version: str | None = None) -> Response:
        return json_response(self.service.model_config(name, version))

    def _statistics(self, exchange: Exchange, name: str | None = None, version: str | None = None) -> Response | Later:
        found = self.service.statistics(name, version)
        return json_response(found) if isinstance(found, dict) else Later(found, json_response)

    def _repository_index(self, exchange: Exchange) -> Response:
        ready = self._document(exchange).get("ready", False)
        if type(ready) is not bool:
            raise bad_request("ready is neither true nor false")
        return json_response(self.service.repository_index(ready))

    def _load(self, exchange: Exchange, name: str) -> Later:
        parameters = read_parameters(self._document(exchange), "the request", self.settings.limits)
        return Later(self.service.load(name, parameters), _nothing)

    def _unload(self, exchange: Exchange, name: str) -> Later:
        read_parameters(self._document(exchange), "the request", self.settings.limits)
        return Later(self.service.unload(name), _nothing)

    def _document(self, exchange: Exchange) -> dict[str, Any]:
        """A short JSON body, which may be missing."""
        if len(exchange.body) > self.settings.limits.max_json_bytes:
            raise bad_request(f"the body has {len(exchange.body)} bytes of JSON")
        return parse_json(exchange.body) if len(exchange.body) else {}


def _no_label(index: int) -> str | None:
    return None


def _as_it_is(response: Response) -> Response:
    return response


def _exposition(body: bytes) -> Response:
    return Response(200, f"Content-Type: {CONTENT_TYPE}\r\n".encode(), [body])


def _nothing(result: None) -> Response:
    return Response(200, b"", [])
