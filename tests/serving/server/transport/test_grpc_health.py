"""`grpc.health.v1.Health`, asked with the bytes that its definition says: probes bring their own messages."""

import threading
import time
from typing import Any

import grpc
import pytest

from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport import grpc_health
from tests.serving.server.tiny_service import wait_until
from tests.serving.server.transport.test_grpc import RunningGrpc

SERVING, NOT_SERVING, UNKNOWN = b"\x08\x01", b"\x08\x02", b"\x08\x03"  # HealthCheckResponse.status


def request(service: str) -> bytes:
    """A HealthCheckRequest, as its definition numbers it."""
    return b"" if not service else b"\x0a" + bytes([len(service)]) + service.encode()


def check(channel: Any, service: str = "", **options: Any) -> bytes:
    found: bytes = channel.unary_unary("/grpc.health.v1.Health/Check")(request(service), timeout=5, **options)
    return found


def test_check_says_whether_requests_are_taken():
    with RunningGrpc(HttpSettings(grpc_port=0)) as running, grpc.insecure_channel(running.url) as channel:
        assert check(channel) == check(channel, "inference.GRPCInferenceService") == SERVING
        running.service.is_ready = False
        assert check(channel) == NOT_SERVING
        for body, code in [(request("other"), "NOT_FOUND"), (b"\xff\xff", "INVALID_ARGUMENT")]:
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary("/grpc.health.v1.Health/Check")(body, timeout=5)
            error: Any = caught.value
            assert error.code().name == code


def test_watch_tells_changes_and_ends_with_the_server(monkeypatch: pytest.MonkeyPatch):
    found: list[bytes] = []
    monkeypatch.setattr(grpc_health, "_LOOK_S", 0.01)
    with RunningGrpc(HttpSettings(grpc_port=0)) as running, grpc.insecure_channel(running.url) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        assert next(watch(request("other"), timeout=5)) == UNKNOWN
        thread = threading.Thread(target=lambda: found.extend(watch(b"", timeout=20)))
        thread.start()
        wait_until(lambda: found)
        time.sleep(0.1)  # many looks, at which nothing has changed
        assert found == [SERVING]
        running.service.is_ready = False
        wait_until(lambda: found == [SERVING, NOT_SERVING])
        running.service.is_ready = True
        wait_until(lambda: found == [SERVING, NOT_SERVING, SERVING])
        started = time.monotonic()
        running.call(running.grpc_server.close)
        thread.join(5)
        assert time.monotonic() - started < 2
        assert found == [SERVING, NOT_SERVING, SERVING, NOT_SERVING]


def test_a_token_guards_it_unless_health_is_open():
    for open_health in (False, True):
        settings = HttpSettings(grpc_port=0, token="t", open_health=open_health)
        with RunningGrpc(settings) as running, grpc.insecure_channel(running.url) as channel:
            assert check(channel, metadata=[("authorization", "Bearer t")]) == SERVING
            if open_health:
                assert check(channel) == SERVING
                continue
            with pytest.raises(grpc.RpcError) as caught:
                check(channel)
            error: Any = caught.value
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED
