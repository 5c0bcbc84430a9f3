"""What Python, the kernel and the model take at least: sockets asked in a loop, and no server.

The loop stays awake for a millisecond after an answer, as ours does, and then sleeps, since bare calls have the core
then. It trusts its client: one request after another on a connection, no limits, no timeouts, no errors.

python sockets.py MODEL PORT
"""

import re
import select
import socket
import sys
import time

from model import Model

WHOLE = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)
DOCUMENT = re.compile(rb"\r\ninference-header-content-length: (\d+)", re.IGNORECASE)
ROOM = 1 << 18  # a head and an image
AWAKE_S = 1e-3
model = Model(sys.argv[1])


class Connection:
    """One client: its socket, and what has come of its next request."""

    def __init__(self, client: socket.socket) -> None:
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.client, self.received = client, bytearray(ROOM)
        self.room = memoryview(self.received)
        self.filled = self.start = self.json_length = self.end = 0  # of a request

    def read(self) -> bool:
        """Take what has come and answer it where it is whole; False where the client has gone."""
        try:
            num_bytes = self.client.recv_into(self.room[self.filled :])
        except BlockingIOError:  # told of the connection that had this number before
            return True
        except ConnectionError:
            return False
        self.filled += num_bytes
        if not self.end and (end := self.received.find(b"\r\n\r\n", 0, self.filled)) >= 0:
            whole, document = (one.search(self.room[:end]) for one in (WHOLE, DOCUMENT))
            assert whole is not None
            assert document is not None
            self.start = end + 4
            self.json_length, self.end = int(document[1]), self.start + int(whole[1])
        if self.end and self.filled == self.end:
            self.answer()
            self.filled = self.end = 0
        return num_bytes > 0

    def answer(self) -> None:
        """Run the model on the request that has come, and send what it says."""
        document, tensor = model.answer(self.room[self.start : self.end], self.json_length)
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n"
        self.client.sendall(head % (len(document) + len(tensor), len(document)) + document + tensor)


listening = socket.create_server(("127.0.0.1", int(sys.argv[2])), backlog=128)
poll, connections = select.epoll(), dict[int, Connection]()
poll.register(listening)
answered = time.perf_counter()
while True:
    for handle, _ in poll.poll(0 if time.perf_counter() - answered < AWAKE_S else None):
        if handle == listening.fileno():
            client, _ = listening.accept()
            connections[client.fileno()] = Connection(client)
            poll.register(client)
        elif not connections[handle].read():
            poll.unregister(handle)
            connections.pop(handle).client.close()
        answered = time.perf_counter()
