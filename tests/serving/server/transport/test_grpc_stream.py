"""ModelStreamInfer with NVIDIA's own client, and streams that end in other ways than it would."""

import asyncio
import logging
import queue
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from headstart.serving.server.settings import HttpSettings
from headstart.serving.server.transport.grpc_stream import Streams
from tests.serving.server.models.test_repository import IMAGE
from tests.serving.server.test_service import Server, root  # noqa: F401 - a fixture
from tests.serving.server.tiny_service import wait_until
from tests.serving.server.transport.test_grpc import RunningGrpc, bare, tensor

PATH = "/inference.GRPCInferenceService/ModelStreamInfer"


class Stream:
    """A stream of Triton's client; `results` are (result, error) as they come."""

    def __init__(self, client: Any, **options: Any) -> None:
        self.client = client
        self.results: list[tuple[Any, Any]] = []
        client.start_stream(callback=lambda result, error: self.results.append((result, error)), **options)

    def ask(self, number: int, model: str = "echo", **options: Any) -> None:
        array = tensor("x", np.full(2, number, np.float32))
        self.client.async_stream_infer(model, [array], request_id=str(number), **options)


def test_triton_streams_and_each_message_has_one_answer_in_their_order():
    with RunningGrpc(HttpSettings(grpc_port=0)) as running, running.client() as client:
        stream = Stream(client)
        for number in range(200):
            stream.ask(number, enable_empty_final_response=True)
        client.stop_stream()
        assert [error for _, error in stream.results] == [None] * 200
        answers = [result.get_response() for result, _ in stream.results]
        assert [answer.id for answer in answers] == [str(number) for number in range(200)]
        assert all(answer.parameters["triton_final_response"].bool_param for answer in answers)
        assert [result.as_numpy("x").tolist() for result, _ in stream.results] == [[n, n] for n in range(200)]
        assert client.infer("echo", [tensor("x", np.ones(2, np.float32))]).get_response().parameters == {}


def test_a_refusal_answers_its_message_and_the_stream_goes_on():
    with RunningGrpc(HttpSettings(grpc_port=0)) as running, running.client() as client:
        stream = Stream(client)
        for number, model in enumerate(["echo", "nope", "full", "broken", "echo"]):
            stream.ask(number, model)
        client.stop_stream()
        words = [None if error is None else error.message() for _, error in stream.results]
        assert words[0] is None
        assert words[4] is None
        assert words[1] == "there is no model 'nope'"
        assert "the queue is full" in (words[2] or "")
        assert (words[3] or "").startswith("the server failed; its log says why under ")
        assert "passwd" not in str(words)


def messages(running: RunningGrpc, bodies: Any, **options: Any) -> Any:
    channel = grpc.insecure_channel(running.url)
    return channel, channel.stream_stream(PATH)(bodies, timeout=20, **options)


def test_a_damaged_message_is_refused_by_its_id_where_that_can_be_read():
    good = bare(raw_input_contents=[b"\0" * 8], id="a").SerializeToString()
    lost = bare("nope", raw_input_contents=[b"\0" * 8], id="b").SerializeToString()
    with RunningGrpc(HttpSettings(grpc_port=0)) as running:
        channel, answers = messages(running, iter([good, b"\xff\xff", lost, b"", good]))
        found = [service_pb2.ModelStreamInferResponse.FromString(data) for data in answers]
        channel.close()
    assert [bool(one.error_message) for one in found] == [False, True, True, True, False]
    assert [one.infer_response.id for one in found] == ["a", "", "b", "", "a"]
    assert "bytes end early or are damaged" in found[1].error_message


@pytest.mark.parametrize("how", ["cancel", "stop"])
def test_a_client_that_goes_cancels_all_of_its_requests(how: str):
    with RunningGrpc(HttpSettings(grpc_port=0)) as running:
        client = running.client()
        stream = Stream(client)
        for number in range(5):
            stream.ask(number, "slow")
        wait_until(lambda: len(running.service.requests) == 5)
        if how == "cancel":
            client.stop_stream(cancel_requests=True)
        else:
            client._stream._response_iterator.cancel()
        wait_until(lambda: all(request.cancelled for request in running.service.requests))
        wait_until(lambda: not running.service.clients)
        client.close()


def test_a_client_that_goes_while_it_is_written_to_is_nothing_to_log(caplog: pytest.LogCaptureFixture):
    body = bare(raw_input_contents=[b"\0" * (4 << 20)], shape=[1 << 20]).SerializeToString()
    counted: list[int] = []
    with RunningGrpc(HttpSettings(grpc_port=0)) as running:
        running.service.refused = lambda error: counted.append(error.status)  # type: ignore[method-assign]
        for number in range(5):
            channel, answers = messages(running, iter([body] * 8))
            wait_until(lambda: len(running.service.requests) >= 8)
            time.sleep(0.05)  # the first answer fills what is sent unread
            answers.cancel()
            channel.close()
            wait_until(lambda: not running.service.clients)
            wait_until(lambda number=number: counted == [499] * (number + 1))  # type: ignore[misc]
            running.service.requests.clear()
        with running.client() as client:
            assert client.is_server_live()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_stream_without_the_token_is_told_nothing():
    with RunningGrpc(HttpSettings(grpc_port=0, token="t")) as running:
        body = bare(raw_input_contents=[b"\0" * 8]).SerializeToString()
        channel, answers = messages(running, iter([body]))
        with pytest.raises(grpc.RpcError) as caught:
            list(answers)
        assert caught.value.code().name == "UNAUTHENTICATED"
        assert not running.service.requests
        _, answers = messages(running, iter([body]), metadata=(("authorization", "Bearer t"),))
        assert len(list(answers)) == 1
        channel.close()


def test_a_message_that_is_too_large_ends_its_stream_and_no_other():
    small = bare(raw_input_contents=[b"\0" * 8]).SerializeToString()
    with RunningGrpc(HttpSettings(grpc_port=0, max_body_bytes=1 << 20)) as running:
        channel, answers = messages(running, iter([small, bytes(2 << 20), small]))
        with pytest.raises(grpc.RpcError) as caught:
            list(answers)
        assert caught.value.code().name == "RESOURCE_EXHAUSTED"
        _, answers = messages(running, iter([small]))
        assert len(list(answers)) == 1
        channel.close()


def test_at_the_end_what_was_asked_is_answered_and_the_stream_is_told():
    with RunningGrpc(HttpSettings(grpc_port=0)) as running, running.client() as client:
        stream = Stream(client)
        for number in range(3):
            stream.ask(number, "slow")
        wait_until(lambda: len(running.service.requests) == 3)
        running.call(running.grpc_server.close)
        time.sleep(0.2)
        assert not stream.results
        running.call(running.service.gate.set)
        wait_until(lambda: len(stream.results) == 4)
        assert [error for _, error in stream.results[:3]] == [None] * 3
        assert "open the stream again" in stream.results[3][1].message()


@pytest.mark.parametrize("ends", ["all answered", "given up"])
def test_what_is_worked_on_at_once_is_bounded_and_nothing_is_left(ends: str):
    async def main() -> tuple[int, int, list[bytes]]:
        streams, gate = Streams(), asyncio.Event()
        working = most = 0

        async def one(body: bytes) -> bytes:
            nonlocal working, most
            working += 1
            most = max(most, working)
            try:
                await gate.wait()
            finally:
                working -= 1
            return body

        async def bodies() -> AsyncIterator[bytes]:
            for number in range(1000):
                yield b"%d" % number

        answers = streams.answers(bodies(), one)
        found = []
        if ends == "given up":
            first = asyncio.ensure_future(anext(answers))
            await asyncio.sleep(0.05)
            first.cancel()
            await asyncio.wait([first])
        else:
            asyncio.get_running_loop().call_later(0.05, gate.set)
            found = [data async for data in answers]
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == 1
        return most, working, found

    most, working, found = asyncio.run(main())
    assert 1 < most <= 66
    assert working == 0
    assert found == ([] if ends == "given up" else [b"%d" % number for number in range(1000)])


def test_what_reading_raises_is_raised_behind_the_answers():
    async def main() -> None:
        async def one(body: bytes) -> bytes:
            await asyncio.sleep(0.01)
            return body

        async def bodies() -> AsyncIterator[bytes]:
            yield b"first"
            raise OSError("the wire is cut")

        async for data in Streams().answers(bodies(), one):
            found.append(data)

    found: list[bytes] = []
    with pytest.raises(OSError, match="the wire is cut"):
        asyncio.run(main())
    assert found == [b"first"]


def test_a_served_model_is_asked_by_stream(root: Any):  # noqa: F811
    server = Server(root, grpc_port=0)
    try:
        url = server.line.split("gRPC at ")[1].split(")")[0]
        results: queue.Queue[tuple[Any, Any]] = queue.Queue()
        with triton.InferenceServerClient(url) as client:
            expected = client.infer("demo", [tensor("images", IMAGE)])
            client.start_stream(callback=lambda result, error: results.put((result, error)))
            for _ in range(8):
                client.async_stream_infer("demo", [tensor("images", IMAGE)])
            for _ in range(8):
                result, error = results.get(timeout=20)
                assert error is None
                np.testing.assert_allclose(result.as_numpy("logits"), expected.as_numpy("logits"), rtol=1e-5)
            code, _ = server.stop()
            assert code == 0
    finally:
        server.process.kill()
        server.process.wait()
