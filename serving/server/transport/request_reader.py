"""What a client sends over one connection, read into requests.

It is read into the connection's own buffers and not through asyncio's streams: a head is found in its buffer, and a
body of known length is received where it will be used.
"""

import asyncio
from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import TYPE_CHECKING, cast

import numpy as np

from headstart.serving.server.errors import ServeError, bad_request, unavailable
from headstart.serving.server.transport.admission import Admission
from headstart.serving.server.transport.receive_buffer import ReceiveBuffer
from headstart.serving.server.wire.bodies import ChunkedBody
from headstart.serving.server.wire.head import Head, too_many_headers

if TYPE_CHECKING:
    from headstart.serving.server.transport.http import HttpServer

EMPTY = memoryview(b"")
NEVER = float("inf")
_ALIGNMENT = 16
"""Where the first tensor of a body starts; memory that is asked for starts so."""
_TLS_HANDSHAKE = 22  # the first byte of a client that speaks TLS, and of no request
_SPARE = 1
"""Bytes of room after a body's end. What fills its room makes libuv read again at once: a client that is quick to ask
again would be served up to 32 times in a row, and nothing else in that time."""


class State(Enum):
    """What a connection does with what comes."""

    HEAD = auto()
    BODY = auto()
    CHUNKS = auto()
    BUSY = auto()
    DISCARD = auto()


class RequestReader(asyncio.BufferedProtocol, ABC):
    """Reads requests one after the other, and hands each over once it is whole; a connection answers them.

    Args:
        server: whose settings, routes and clock it uses.
    """

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._settings = server.settings
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)
        self._admission = Admission(server)
        self._buffer = ReceiveBuffer(server.settings.max_header_bytes)
        self._state = State.HEAD
        self._head: Head = cast(Head, None)
        self._body = self._rest = EMPTY  # a body, and the room for what of it is still to come
        self._chunks: ChunkedBody = cast(ChunkedBody, None)
        self._held = 0
        self._reading = True
        self._writing = True
        self._closing = False
        self.deadline = NEVER
        """When `expire` is due, by the server's clock."""

    @abstractmethod
    def _answer(self, head: Head, body: memoryview) -> None:
        """A request is whole: be `State.BUSY` until it is answered."""

    @abstractmethod
    def _refuse(self, error: ServeError, head: Head | None = None) -> None:
        """Answer what cannot be read any further, and close; `head` is what was read of the request's, where let in."""

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        if self._state is State.BODY:
            return self._rest
        if self._state is State.DISCARD:
            return self._buffer.scrap()
        return self._buffer.room()

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes have come."""
        if self._state is State.BODY:
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
        if self._state is State.DISCARD:
            return
        self._buffer.filled(nbytes)
        if self._state is not State.BUSY and self._writing:
            self._advance()
        elif self._buffer.is_full:
            self._make_room()

    def eof_received(self) -> bool:
        """The client sends no more. What it has asked and was not answered yet is dropped, as if it had gone."""
        if self._state is State.BODY:
            declared, missing = len(self._body), len(self._rest) - _SPARE
            self._refuse(
                bad_request(f"Content-Length is {declared}, the body ended after {declared - missing} bytes"),
                self._head,
            )
        elif self._state is State.CHUNKS:
            self._refuse(bad_request(f"the chunked body was cut off after {len(self._chunks)} bytes"), self._head)
        return False

    def _advance(self) -> None:
        """Read as many requests as have come and can be answered now."""
        while self._buffer and self._writing and not self._closing:
            if self._state is State.HEAD:
                if not self._find_head():
                    break
            elif self._state is State.CHUNKS:
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
            elif self._buffer and self._buffer.unread()[0] == _TLS_HANDSHAKE:
                self._refuse(bad_request("the client speaks TLS, this port does not; ask for http://"))
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
            self._state = State.CHUNKS
        elif head.length == 0:
            self._answer(head, EMPTY)
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
            self._state = State.BODY
        self.deadline = self._server.clock() + self._settings.body_timeout
        if head.expects_continue:
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
