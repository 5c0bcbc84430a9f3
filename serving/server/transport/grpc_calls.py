"""The calls that come over gRPC: each found by its path, let in, answered or refused, and told of."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from time import perf_counter_ns
from typing import Any
from urllib.parse import unquote

import grpc  # type: ignore[import-untyped]
import grpc.aio  # type: ignore[import-untyped]

from headstart.serving.server.errors import (
    ServeError,
    bad_request,
    internal,
    too_many,
    too_slow,
    unauthenticated,
    unavailable,
)
from headstart.serving.server.interface import InferenceService
from headstart.serving.server.settings import HttpSettings, same_token, token_digest
from headstart.serving.server.transport.grpc_health import SERVICE as HEALTH
from headstart.serving.server.transport.grpc_health import Health
from headstart.serving.server.transport.grpc_methods import NAMES, Answer, Methods
from headstart.serving.server.transport.grpc_stream import Streams
from headstart.serving.server.watching.watch import CLIENT_GONE, Outcome, RequestIds, Seen, Watch
from headstart.serving.server.wire.grpc_codec import refused
from headstart.serving.server.wire.grpc_messages import SERVICE

log = logging.getLogger(__name__)

Stream = Callable[[Any, Any], AsyncGenerator[bytes]]
"""Messages and their call, to answers."""

STREAM = "ModelStreamInfer"
_HEALTH = ("ServerLive", "ServerReady")
_LONGEST_DETAILS = 1000
"""Characters of an error's message; clients refuse trailers of 8 KiB."""

_SOON_S = 0.05
"""Seconds within which grpc cancels a call whose message it refuses as too large: first it only has no message, and
would log a traceback where the call was answered then."""


class Calls(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Handles the calls of one server.

    Args:
        service: answers the requests.
        settings: token and limits.
        watch: is shown every call that was answered; None is nobody.
    """

    def __init__(self, service: InferenceService, settings: HttpSettings, watch: Watch | None = None) -> None:
        self._settings = settings
        self._watch = watch
        self._service = service
        self._request_ids = RequestIds()
        self._methods = Methods(service, settings)
        self._health = Health(lambda: service.ready() and not self._methods.closing)
        self._token = None if settings.token is None else token_digest(settings.token.encode())
        self._held = 0
        self._begin = asyncio.Event()
        self._begin.set()
        answers: dict[str, Answer] = {
            name: self._methods.infer if name == "ModelInfer" else self._methods.document(name) for name in NAMES
        }
        self._handlers = {
            # The library reads the message of a unary call itself, and waits for it for ever.
            path: grpc.stream_unary_rpc_method_handler(self._guarded(path, answer))
            for path, answer in [
                *((f"/{SERVICE}/{name}", answer) for name, answer in answers.items()),
                (f"/{HEALTH}/Check", self._check),
            ]
        }
        self._streams = Streams()
        # They may stay open for as long as their clients like, and `Watch` may be anybody's.
        for path, stream, share in ((f"/{SERVICE}/{STREAM}", self._stream, 2), (f"/{HEALTH}/Watch", self._watched, 8)):
            most = max(1, settings.max_connections // share)
            self._handlers[path] = grpc.stream_stream_rpc_method_handler(self._bounded(path, stream, most))
        probes = [f"/{SERVICE}/{name}" for name in _HEALTH] + [f"/{HEALTH}/{name}" for name in ("Check", "Watch")]
        self._open = set(probes) if settings.open_health else set()

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call, for grpc. Without the token nothing of a call is read."""
        path = handler_call_details.method
        if self._token is not None and path not in self._open:
            given = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
            header = given[0].encode() if len(given) == 1 and isinstance(given[0], str) else None
            if not same_token(header, self._token):
                return self._refusing(path if path in self._handlers else "/-", unauthenticated(), named=False)
        return self._handlers.get(path) or self._refusing(path, _unknown())

    def close(self) -> None:
        """Be ready no more; streams end once what they have brought is answered, and so do those that watch health."""
        self._methods.closing = True
        self._health.close()
        self._streams.close()

    def hold(self) -> None:
        """Take calls and begin none, until `release`: those in flight are answered."""
        self._begin.clear()

    def release(self) -> None:
        """Begin the calls that were taken."""
        self._begin.set()

    def _guarded(self, path: str, answer: Answer) -> Callable[[Any, Any], Awaitable[bytes]]:
        """A method that tells refusals as statuses, and names its request in the trailers."""
        longest = self._settings.body_timeout

        async def call(bodies: Any, context: Any) -> bytes:
            name = self._named(context)
            try:
                await self._begin.wait()
                async with asyncio.timeout(longest):
                    body = await _message(context)
            except TimeoutError:
                await self._refuse(path, too_slow(f"the message took longer than {longest:g} s"), context, name)
            except ServeError as error:
                await self._refuse(path, error, context, name)
            except asyncio.CancelledError:
                self._note_cut(path, context, name)
                raise
            seen, found = await self._answer(path, answer, body, context, name)
            if isinstance(found, ServeError):
                await _abort(context, found, seen.request_id)
                return b""  # not reached: abort raises
            context.set_trailing_metadata((("x-request-id", seen.request_id),))
            return found

        return call

    async def _stream(self, bodies: Any, context: Any) -> AsyncGenerator[bytes]:
        """ModelStreamInfer: a refusal is the answer to its message, and the stream goes on."""
        path = f"/{SERVICE}/{STREAM}"

        async def one(body: bytes) -> bytes:
            name = self._request_ids.choose("")
            seen, found = await self._answer(path, self._methods.stream_infer, body, context, name)
            if isinstance(found, ServeError):
                return refused(found.message[:_LONGEST_DETAILS], seen.request.id if seen.request else "")
            return found

        try:
            async for data in self._streams.answers(_messages(bodies), one):
                yield data
        except (asyncio.CancelledError, GeneratorExit):  # the latter where an answer could not be written
            self._note_cut(path, context, self._named(context))
            raise
        except Exception:  # of grpc.aio, which would send its words; those of an answer are refusals by now
            log.exception("a stream cannot be read")
            await self._refuse(path, internal("the stream cannot be read; open it again"), context)
        if self._methods.closing:
            await _abort(context, unavailable("the server is stopping; open the stream again"))

    async def _answer(
        self, path: str, answer: Answer, body: bytes, context: Any, name: str
    ) -> tuple[Seen, bytes | ServeError]:
        """The answer to a message or its refusal, with what it holds counted."""
        seen = Seen(name, perf_counter_ns() if self._watch else 0)
        refusal: ServeError | None = None
        status, data = "CANCELLED", b""
        self._held += len(body)
        self._service.clients += 1
        try:
            if self._held > self._settings.max_held_bytes:
                raise unavailable("the server holds as many bytes of requests as it may; send this one again later")
            data = await answer(body, context, seen)
            status = "OK"
        except ServeError as error:
            refusal = error
        except MemoryError:
            refusal = unavailable("the server is out of memory for this request")
        # Whatever else an answer raises is our fault: grpc.aio would send the exception's words to the client,
        # which may hold paths. Cancelling is no Exception and passes.
        except Exception:
            log.exception("call %s failed", name, extra={"request_id": name})
            refusal = internal(f"the server failed; its log says why under {name}")
        finally:
            self._held -= len(body)
            self._service.clients -= 1
            if refusal is not None:
                self._service.refused(refusal)
            self._tell(seen, path, refusal.grpc if refusal else status, len(data), context)
        return seen, refusal or data

    def _note_cut(self, path: str, context: Any, name: str) -> None:
        """Count and tell of a call that is over: its client has gone, or grpc ended it over a message too large.

        Which of them grpc does not say, nor that it was a message at all.
        """
        self._service.refused(ServeError(CLIENT_GONE, "the call was cancelled", grpc="CANCELLED"))
        self._tell(Seen(name, perf_counter_ns()), path, "CANCELLED", 0, context)

    def _named(self, context: Any) -> str:
        """The name of a call's request."""
        given = [value for key, value in context.invocation_metadata() or () if key == "x-request-id"]
        return self._request_ids.choose(given[0] if len(given) == 1 and isinstance(given[0], str) else "")

    def _tell(self, seen: Seen, path: str, status: str, num_bytes: int, context: Any) -> None:
        """Tell who watches how a call ended."""
        if self._watch is None:
            return

        def metadata() -> dict[str, str]:
            return {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}

        self._watch.ended(seen, Outcome(path[1:], "", status, num_bytes, metadata, _client(context)))

    async def _check(self, body: bytes, context: Any, seen: Seen) -> bytes:
        return self._health.check(body)

    async def _watched(self, bodies: Any, context: Any) -> AsyncGenerator[bytes]:
        try:
            async for status in self._health.watch(await _message(context)):
                yield status
        except ServeError as error:
            await self._refuse(f"/{HEALTH}/Watch", error, context)

    def _bounded(self, path: str, stream: Stream, most: int) -> Callable[[Any, Any], Awaitable[None]]:
        """A stream of which no more than `most` are open at once."""
        places = asyncio.Semaphore(most)

        async def call(bodies: Any, context: Any) -> None:
            if places.locked():
                await self._refuse(path, too_many(f"no more than {most} of these calls may be open at once"), context)
            async with places, contextlib.aclosing(stream(bodies, context)) as answers:
                async for data in answers:
                    try:
                        await context.write(data)
                    except grpc.aio.InternalError:  # the client has gone, of which grpc would log a traceback
                        raise asyncio.CancelledError from None

        return call

    def _refusing(self, path: str, error: ServeError, *, named: bool = True) -> Any:
        """The handler of a call of which nothing is read, nor its request's own name where it is not to be told."""

        async def call(bodies: Any, context: Any) -> None:
            await self._refuse(path, error, context, None if named else self._request_ids.choose(""))

        return grpc.stream_unary_rpc_method_handler(call)

    async def _refuse(self, path: str, error: ServeError, context: Any, name: str | None = None) -> None:
        """End a call to which nothing was answered with an error's status, count it, and tell who watches."""
        name = name or self._named(context)
        self._service.refused(error)
        self._tell(Seen(name, perf_counter_ns()), path, error.grpc, 0, context)
        await _abort(context, error, name)


def _client(context: Any) -> str:
    """The address of a call's client, of which grpc says `ipv4:127.0.0.1:4000` or `ipv6:%5B::1%5D:4000`."""
    kind, _, where = unquote(context.peer()).partition(":")
    return where.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""


def _unknown() -> ServeError:
    return ServeError(404, "the server has no such method", grpc="UNIMPLEMENTED")


async def _message(context: Any) -> bytes:
    """The next message of a call.

    Raises:
        ServeError: 400, where there is none.
    """
    body: bytes = await context.read()
    if body is grpc.aio.EOF:
        await asyncio.sleep(_SOON_S)
        raise bad_request("the call has no message; send one")
    return body


async def _messages(bodies: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Those of a stream, whose end is believed when grpc has had the time to say that the call is over."""
    async for body in bodies:
        yield body
    await asyncio.sleep(_SOON_S)


async def _abort(context: Any, error: ServeError, request_id: str = "") -> None:
    """End a call with an error's status; `grpc-retry-pushback-ms` is gRPC's own Retry-After."""
    status = getattr(grpc.StatusCode, error.grpc, grpc.StatusCode.UNKNOWN)
    after = error.retry_after
    trailing = [] if after is None else [("grpc-retry-pushback-ms", str(round(after * 1000)))]
    if request_id:
        trailing.append(("x-request-id", request_id))
    await context.abort(status, error.message[:_LONGEST_DETAILS], trailing_metadata=tuple(trailing))
