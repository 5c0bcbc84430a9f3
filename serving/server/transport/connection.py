"""One connection of the HTTP server: requests one after the other, in the order in which they come.

It reads into its own buffers and not through asyncio's streams: a head is found in the connection's buffer, a body of
known length is received where it will be used, and a request whose model runs at once is answered without a task.
"""

import asyncio
from enum import Enum, auto
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from headstart.serving.server.errors import ServeError, bad_request, too_slow, unauthenticated, unavailable
from headstart.serving.server.transport.admission import Admission
from headstart.serving.server.transport.exchange import (
    Exchange,
    Later,
    Response,
    error_response,
    refusal,
    response_head,
)
from headstart.serving.server.transport.receive_buffer import ReceiveBuffer
from headstart.serving.server.watching.watch import CLIENT_GONE, Outcome, Seen
from headstart.serving.server.wire.bodies import ChunkedBody
from headstart.serving.server.wire.head import Head, too_many_headers

if TYPE_CHECKING:
    from headstart.serving.server.transport.http import HttpServer

_EMPTY = memoryview(b"")
_ALIGNMENT = 16
"""Where the first tensor of a body starts; memory that is asked for starts so."""
_LINGER = 2.0
"""Seconds for which what a refused client still sends is thrown away, so that it reads the refusal before a reset."""
_NEVER = float("inf")
_JOINED = 1 << 16
_SPARE = 1
"""Bytes of room after a body's end. What fills its room makes libuv read again at once: a client that is quick to ask
again would be served up to 32 times in a row, and nothing else in that time."""


class _State(Enum):
    HEAD = auto()
    BODY = auto()
    CHUNKS = auto()
    BUSY = auto()
    DISCARD = auto()


class Connection(asyncio.BufferedProtocol):
    """The protocol of one connection.

    Args:
        server: whose settings, routes and clock it uses.
    """

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._choose_id, self._watch = server.request_ids.choose, server.watch
        self._settings = server.settings
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._admission = Admission(server)
        self._buffer = ReceiveBuffer(server.settings.max_header_bytes)
        self._state = _State.HEAD
        self._head: Head = cast(Head, None)
        self._body = self._rest = _EMPTY  # a body, and the room for what of it is still to come
        self._chunks: ChunkedBody = cast(ChunkedBody, None)
        self._held = 0
        self._exchange: Exchange | None = None
        self._reading = True
        self._writing = True
        self._closing = self._flushing = False
        self._latest = _NEVER  # when what a connection that closes has not sent yet is given up
        self.deadline = _NEVER
        """When `expire` is due, by the server's clock."""

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast(asyncio.Transport, transport)
        self.deadline = self._server.clock() + self._settings.header_timeout
        if self._server.add(self):
            return
        if self._settings.token is None:
            self._refuse(unavailable("too many connections are open"))
        else:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or we have closed."""
        self._closing = True
        self._release()
        self._admission.close()
        self._server.remove(self)
        if self._exchange is not None:
            self._exchange.leave()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._state is _State.BODY:
            return self._rest
        if self._state is _State.DISCARD:
            return self._buffer.scrap()
        return self._buffer.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        if self._state is _State.BODY:
            try:
                self._hold(nbytes)
            except ServeError as error:
                self._refuse(error, self._head)
                return
            rest, self._rest = self._rest, self._rest[nbytes:]
            if len(self._rest) <= _SPARE:
                self._buffer.put(rest[len(rest) - _SPARE : nbytes])  # the next request's beginning
                self._answer(self._head, self._body)
                self._advance()
            return
        if self._state is _State.DISCARD:
            return
        self._buffer.filled(nbytes)
        if self._state is not _State.BUSY and self._writing:
            self._advance()
        elif self._buffer.is_full:
            self._make_room()

    def eof_received(self) -> bool:
        """The client sends no more. What it has asked and was not answered yet is dropped, as if it had gone."""
        if self._state is _State.BODY:
            declared, missing = len(self._body), len(self._rest) - _SPARE
            self._refuse(
                bad_request(f"Content-Length is {declared}, the body ended after {declared - missing} bytes"),
                self._head,
            )
        elif self._state is _State.CHUNKS:
            self._refuse(bad_request(f"the chunked body was cut off after {len(self._chunks)} bytes"), self._head)
        return False

    def pause_writing(self) -> None:
        """The client does not read its answers."""
        self._writing = False
        self.deadline = self._server.clock() + self._settings.body_timeout

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writing = True
        if self._state is _State.HEAD:
            self.deadline = self._server.clock() + self._server.idle_timeout
            self._advance()
        elif self._state is _State.BUSY:
            self.deadline = _NEVER

    # What the server calls.

    def expire(self) -> None:
        """Close a connection whose deadline has passed, with 408 where a request has begun."""
        settings = self._settings
        if self._state is _State.DISCARD:
            self._go_on_closing()
        elif not self._writing:
            self._transport.abort()
        elif self._state is _State.HEAD and not self._buffer:
            self._end()
            self._transport.close()
        elif self._state is _State.HEAD:
            self._refuse(too_slow(f"the headers took longer than {settings.header_timeout:g} s"))
        elif self._state is not _State.BUSY:
            self._refuse(too_slow(f"the body took longer than {settings.body_timeout:g} s"), self._head)

    def wind_down(self) -> None:
        """Serve what has come, and close soon where nothing does; a client that has yet to take an answer may first."""
        if self._state is _State.HEAD and self._writing:
            self.deadline = min(self.deadline, self._server.clock() + self._server.idle_timeout)

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    # Reading.

    def _advance(self) -> None:
        """Read as many requests as have come and can be answered now."""
        while self._buffer and self._writing and not self._closing:
            if self._state is _State.HEAD:
                if not self._find_head():
                    break
            elif self._state is _State.CHUNKS:
                self._feed_chunks()
            else:
                break
        if not self._buffer:
            self._buffer.clear()
        elif self._buffer.is_full:
            self._make_room()
        if not self._reading and not self._buffer.is_full and not self._closing:
            self._reading = True
            self._transport.resume_reading()

    def _make_room(self) -> None:
        """For more to come; where there is none, nothing is received until something is read."""
        self._buffer.compact()
        if self._buffer.is_full and self._reading and not self._closing:
            self._reading = False
            self._transport.pause_reading()

    def _find_head(self) -> bool:
        """Read a head if all of it has come."""
        raw = self._buffer.take_head()
        if raw is None:
            if len(self._buffer) == self._buffer.size:
                self._admission.look(self._buffer.unread().tobytes())
                self._refuse(too_many_headers(f"more than {self._buffer.size} bytes"), self._admission.head)
            elif self._buffer and self.deadline > (latest := self._server.clock() + self._settings.header_timeout):
                self.deadline = latest
            return False
        try:
            self._begin(self._admission.admit(raw))
        except ServeError as error:
            self._refuse(error, self._admission.head)
        except MemoryError:
            self._refuse(unavailable("the server is out of memory for this request"), self._admission.head)
        return True

    def _begin(self, head: Head) -> None:
        """Make room for a body, and answer if there is none to wait for."""
        self._head = head
        padding = -(head.json_length or 0) % _ALIGNMENT
        if head.chunked:
            self._chunks = ChunkedBody(self._settings.max_body_bytes, padding)
            self._state = _State.CHUNKS
        elif head.length == 0:
            self._answer(head, _EMPTY)
            return
        else:
            room = np.empty(padding + head.length + _SPARE, np.uint8).data[padding:]
            body = room[: head.length]
            come = self._buffer.take_into(body)
            self._hold(come)
            if come == head.length:
                self._answer(head, body)
                return
            self._body, self._rest = body, room[come:]
            self._state = _State.BODY
        self.deadline = self._server.clock() + self._settings.body_timeout
        if head.expects_continue and not self._buffer:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _feed_chunks(self) -> None:
        chunks, before = self._chunks, len(self._chunks)
        try:
            self._buffer.skip(chunks.feed(self._buffer.unread()))
            self._hold(len(chunks) - before)
        except ServeError as error:
            self._refuse(error, self._head)
            return
        if chunks.done:
            padding = len(chunks.data) - len(chunks)
            self._chunks = cast(ChunkedBody, None)
            self._answer(self._head, memoryview(chunks.data)[padding:])

    def _hold(self, nbytes: int) -> None:
        """Count bytes of a body, until it is answered."""
        if not self._server.hold(nbytes):
            raise unavailable("the bodies of other requests fill the memory that the server may take")
        self._held += nbytes

    def _release(self) -> None:
        if self._held:
            self._server.hold(-self._held)
            self._held = 0

    # Answering.

    def _answer(self, head: Head, body: memoryview) -> None:
        """Call a request's handler, and answer at once where it can."""
        self._state = _State.BUSY
        self._body = self._rest = _EMPTY
        self._server.polling.asked()
        began = perf_counter_ns() if self._watch else 0
        exchange = Exchange(head, body, self._choose_id(head.request_id), self._hold, began)
        try:
            result: Response | Later = head.handler(exchange, *head.arguments)  # type: ignore[misc]
        except Exception as error:
            result = self._refusal(error, exchange.request_id)
        if isinstance(result, Response):
            self._respond(exchange, result)
            return
        self.deadline = _NEVER
        self._exchange = exchange
        later = result
        future: asyncio.Future[Any] = asyncio.ensure_future(later.awaitable)
        future.add_done_callback(lambda done: self._answered(exchange, later, done))

    def _answered(self, exchange: Exchange, later: Later, done: "asyncio.Future[Any]") -> None:
        """What an answer waited for is there."""
        self._exchange = None
        if self._closing:
            if not done.cancelled():
                done.exception()  # asked for, or asyncio would complain that nobody did
            if self._watch is not None:
                head = exchange.head
                self._watch.ended(exchange, Outcome(head.method, head.path, CLIENT_GONE, 0, head.texts))
            return
        try:
            response = later.finish(done.result())
        except asyncio.CancelledError:
            response = error_response(unavailable("the request was dropped"))
        except Exception as error:
            response = self._refusal(error, exchange.request_id)
        self._respond(exchange, response)
        self._advance()

    def _refusal(self, error: Exception, request_id: str) -> Response:
        """What a request is told of an error, counted."""
        refused = refusal(error, request_id)
        self._server.routes.service.refused(refused)
        return error_response(refused)

    def _respond(self, exchange: Exchange, response: Response) -> None:
        """Send a response, and be ready for the next request."""
        head, parts = exchange.head, response.parts
        keep = head.keep_alive and not self._server.closing
        length = sum(map(len, parts))
        if head.method == "HEAD":
            parts = []
        connection = b"Connection: close\r\n" if not keep else b"Connection: keep-alive\r\n" if head.old else b""
        line = response_head(response, length, exchange.request_id, self._server.date, connection)
        if length < _JOINED:
            self._transport.write(b"".join((line, *parts)))
        else:
            self._transport.writelines((line, *parts))
        self._release()
        if keep:
            self._state = _State.HEAD
            if self._server.routes.service.clients == 1:
                self._server.polling.answered()
            if self._writing:
                self.deadline = self._server.clock() + self._server.idle_timeout
        else:
            self._linger()
        if self._watch is not None:
            self._watch.ended(exchange, Outcome(head.method, head.path, response.status, length, head.texts))

    def _refuse(self, error: ServeError, head: Head | None = None) -> None:
        """Answer what cannot be read any further, and close; `head` is what was read of the request's, where let in."""
        if not self._admission.is_known:
            error = unauthenticated()
        self._release()
        request_id = self._choose_id(head.request_id if head else "")
        response = self._refusal(error, request_id)
        body = response.parts[0]
        line = response_head(response, len(body), request_id, self._server.date, b"Connection: close\r\n")
        self._transport.write(b"".join((line, body)))
        self._linger()
        if self._watch is not None:
            method, path, headers = (head.method, head.path, head.texts) if head else ("-", "-", dict)
            outcome = Outcome(method, path, error.status, len(body), headers)
            self._watch.ended(Seen(request_id, perf_counter_ns()), outcome)

    def _linger(self) -> None:
        """Close our side, and throw away what still comes until the client closes its own."""
        self._end()
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
            if not self._reading:
                self._reading = True
                self._transport.resume_reading()
        else:
            self._transport.close()

    def _end(self) -> None:
        """Read no more requests, and give the client time to take what is not sent yet."""
        self._state = _State.DISCARD
        self._buffer.clear()
        self._closing = True
        self._body = self._rest = _EMPTY
        self._flushing = self._transport.get_write_buffer_size() > 0
        now = self._server.clock()
        self._latest, self.deadline = now + self._settings.body_timeout, now + _LINGER

    def _go_on_closing(self) -> None:
        """Wait on for a client that takes its answer, and once more after that, since TLS has a buffer below ours."""
        now, unsent = self._server.clock(), self._transport.get_write_buffer_size() > 0
        if now < self._latest and (unsent or self._flushing):
            self._flushing, self.deadline = unsent, now + _LINGER
        else:
            self._transport.abort()
