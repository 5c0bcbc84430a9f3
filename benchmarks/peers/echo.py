"""The transport alone: a protocol class on uvloop that reads whole HTTP requests and answers them without a look.

python echo.py MODEL PORT
"""

import asyncio
import re
import sys

import uvloop
from model import Model

ANSWER = b"x" * 4 * Model(sys.argv[1]).num_classes
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(ANSWER) + ANSWER


class Echo(asyncio.Protocol):
    """One connection: counts the bytes of each request."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with nothing read."""
        self.transport, self.head, self.missing = transport, b"", 0

    def data_received(self, data: bytes) -> None:
        """Answer when a request is whole."""
        if not self.missing:
            self.head += data
            end = self.head.find(b"\r\n\r\n")
            if end < 0:
                return
            length = re.search(rb"(?i)\r\ncontent-length: (\d+)", self.head)
            assert length is not None
            self.missing = end + 4 + int(length[1]) - len(self.head)
        else:
            self.missing -= len(data)
        if not self.missing:
            self.head = b""
            self.transport.write(RESPONSE)  # type: ignore[attr-defined]


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", int(sys.argv[2]))
    await server.serve_forever()


uvloop.run(main())
