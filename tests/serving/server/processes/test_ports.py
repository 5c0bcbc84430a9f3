"""The ports that a supervisor holds for its workers."""

import socket

import pytest

from headstart.serving.server.errors import StartError
from headstart.serving.server.processes.ports import ReservedPort

HOST = "127.0.0.1"


def left_behind() -> int:
    """A port of which a connection is left that a server of one process has closed (TIME-WAIT)."""
    with socket.create_server((HOST, 0)) as listening:
        port = int(listening.getsockname()[1])
        with socket.create_connection((HOST, port)) as client:
            listening.accept()[0].close()
            assert client.recv(1) == b""
    return port


def listen(port: int, *options: int) -> socket.socket:
    listening = socket.socket()
    for option in options:
        listening.setsockopt(socket.SOL_SOCKET, option, 1)
    listening.bind((HOST, port))
    listening.listen()
    return listening


@pytest.mark.parametrize("port", [left_behind, lambda: 0], ids=["left behind", "free"])
def test_it_is_had_at_once_and_by_nobody_else(port):
    with ReservedPort(HOST, port(), "--port") as reserved:
        for options in ([], [socket.SO_REUSEADDR]):
            with pytest.raises(OSError, match="in use"):
                listen(reserved.port, *options)
        with pytest.raises(StartError, match="give another --port"):
            ReservedPort(HOST, reserved.port, "--port")
        both = socket.SO_REUSEADDR, socket.SO_REUSEPORT
        with listen(reserved.port, *both), listen(reserved.port, *both):
            pass
