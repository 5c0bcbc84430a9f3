"""Clients that begin a TLS handshake and do not end it: no more of them than connections, and none for long."""

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from headstart.serving.server.settings import HttpSettings
from tests.serving.server.test_process import certificate  # noqa: F401 - a fixture
from tests.serving.server.tiny_service import RawClient, Running

MOST = 3


def go(client: socket.socket) -> None:
    client.close()


def send_what_is_no_tls(client: socket.socket) -> None:
    client.sendall(b"GET / HTTP/1.1\r\n\r\n")
    while client.recv(100):  # until the server closes
        pass


def wait(client: socket.socket) -> None:
    client.settimeout(30)
    assert client.recv(1) == b""  # timed out


def test_plain_http_to_the_tls_port_is_in_the_log_once(
    certificate: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
):
    files = {"tls_cert": certificate / "cert.pem", "tls_key": certificate / "key.pem"}
    with Running(HttpSettings(port=0, **files)) as running:
        for sent in (b"\0" * 99, b"GET / HTTP/1.1\r\n\r\n", b"POST /v2 HTTP/1.1\r\n\r\n"):
            with running.connect() as client:
                client.socket.sendall(sent)
                assert client.closed(within=3)
    assert [one.getMessage() for one in caplog.records] == [
        "a client spoke plain HTTP to the TLS port and was cut off; ask for https://"
    ]


@pytest.mark.parametrize("end", [go, send_what_is_no_tls, wait])
def test_no_more_handshakes_than_connections_are_under_way(
    certificate: Path,  # noqa: F811
    end: Callable[[socket.socket], None],
):
    files = {"tls_cert": certificate / "cert.pem", "tls_key": certificate / "key.pem"}
    context = ssl.create_default_context(cafile=str(certificate / "cert.pem"))
    with (
        Running(HttpSettings(port=0, max_connections=MOST, header_timeout=4, **files)) as running,
        ExitStack() as open_,
    ):
        for _ in range(2):  # what one round has begun and not ended is not counted in the next
            silent = [open_.enter_context(running.connect()).socket for _ in range(MOST)]
            began = time.monotonic()
            with running.connect() as one_more:
                assert one_more.closed(within=3)
            assert time.monotonic() - began < 3
            for client in silent:
                end(client)
            time.sleep(1.5)  # for the server to see all of them go
        clients: list[RawClient] = [open_.enter_context(running.connect(context)) for _ in range(MOST)]
        assert [client.ask("GET", "/v2").status for client in clients] == [200] * MOST
        with running.connect(context) as one_more:  # its handshake is not one too many, since theirs are over
            assert one_more.read().status == 503
