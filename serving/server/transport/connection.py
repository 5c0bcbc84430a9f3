"""One connection of the HTTP server: requests one after the other, in the order in which they come.

A request whose model runs at once is answered without a task.
"""

import asyncio
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

from headstart.serving.server.errors import ServeError, too_slow, unauthenticated, unavailable
from headstart.serving.server.transport.exchange import (
    Exchange,
    Later,
    Response,
    error_response,
    refusal,
    response_head,
)
from headstart.serving.server.transport.request_reader import EMPTY, NEVER, RequestReader, State
from headstart.serving.server.watching.watch import CLIENT_GONE, Outcome, Seen
from headstart.serving.server.wire.head import Head

if TYPE_CHECKING:
    from headstart.serving.server.transport.http import HttpServer

_LINGER = 2.0
"""Seconds for which what a refused client still sends is thrown away, so that it reads the refusal before a reset."""
_JOINED = 1 << 16


class Connection(RequestReader):
    """The protocol of one connection.

    Args:
        server: whose settings, routes and clock it uses.
    """

    def __init__(self, server: "HttpServer") -> None:
        super().__init__(server)
        self._choose_id, self._watch = server.request_ids.choose, server.watch
        self._exchange: Exchange | None = None
        self._flushing = False
        self._client = ""
        self._latest = NEVER  # when what a connection that closes has not sent yet is given up

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        self._transport = cast(asyncio.Transport, transport)
        if self._watch is not None and (peer := transport.get_extra_info("peername")):
            self._client = peer[0]
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

    def pause_writing(self) -> None:
        """The client does not read its answers."""
        self._writing = False
        self.deadline = self._server.clock() + self._settings.body_timeout

    def resume_writing(self) -> None:
        """The client reads again."""
        self._writing = True
        if self._state is State.HEAD:
            self.deadline = self._server.clock() + self._server.idle_timeout
            self._advance()
        elif self._state is State.BUSY:
            self.deadline = NEVER

    # What the server calls.

    def expire(self) -> None:
        """Close a connection whose deadline has passed, with 408 where a request has begun."""
        settings = self._settings
        if self._state is State.DISCARD:
            self._go_on_closing()
        elif not self._writing:
            self._transport.abort()
        elif self._state is State.HEAD and not self._buffer:
            self._end()
            self._transport.close()
        elif self._state is State.HEAD:
            self._refuse(too_slow(f"the headers took longer than {settings.header_timeout:g} s"))
        elif self._state is not State.BUSY:
            self._refuse(too_slow(f"the body took longer than {settings.body_timeout:g} s"), self._head)

    def wind_down(self) -> None:
        """Serve what has come, and close soon where nothing does; a client that has yet to take an answer may first."""
        if self._state is State.HEAD and self._writing:
            self.deadline = min(self.deadline, self._server.clock() + self._server.idle_timeout)

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    # Answering.

    def _answer(self, head: Head, body: memoryview) -> None:
        """Call a request's handler, and answer at once where it can."""
        self._state = State.BUSY
        self._body = self._rest = EMPTY
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
        self.deadline = NEVER
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
                self._watch.ended(exchange, Outcome(head.method, head.path, CLIENT_GONE, 0, head.texts, self._client))
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
            self._state = State.HEAD
            if self._server.routes.service.clients == 1:
                self._server.polling.answered()
            if self._writing:
                self.deadline = self._server.clock() + self._server.idle_timeout
        else:
            self._linger()
        if self._watch is not None:
            outcome = Outcome(head.method, head.path, response.status, length, head.texts, self._client)
            self._watch.ended(exchange, outcome)

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
            outcome = Outcome(method, path, error.status, len(body), headers, self._client)
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
        self._state = State.DISCARD
        self._buffer.clear()
        self._closing = True
        self._body = self._rest = EMPTY
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
