"""What goes between a supervisor and its workers: answers, refusals, and the end of either side."""

import asyncio
import socket
from typing import Any

import pytest

from headstart.serving.server.errors import ServeError
from headstart.serving.server.processes import channel as module
from headstart.serving.server.processes.channel import Channel


def test_a_refusal_is_the_same_on_both_ends_of_a_channel():
    async def answer(what: str, arguments: list[Any]) -> Any:
        if what == "refuse":
            raise ServeError(429, "full", grpc="RESOURCE_EXHAUSTED", retry_after=2.5)
        if what == "break":
            raise RuntimeError("secret of /etc/passwd")
        return [what, *arguments]

    async def talk() -> None:
        ends = socket.socketpair()
        one, other = [await Channel.open(end, answer) for end in ends]
        serving = [asyncio.ensure_future(end.serve()) for end in (one, other)]
        assert await asyncio.gather(one.ask("a", 1), other.ask("b", {"c": None})) == [["a", 1], ["b", {"c": None}]]
        with pytest.raises(ServeError) as caught:
            await one.ask("refuse")
        assert (caught.value.status, caught.value.message, caught.value.retry_after) == (429, "full", 2.5)
        with pytest.raises(ServeError, match=r"failed \(RuntimeError\)"):
            await one.ask("break")
        assert not one._waiting, "what was answered is forgotten"
        waiting = asyncio.ensure_future(one.ask("late"))
        await asyncio.sleep(0)
        other.close()
        with pytest.raises(ConnectionError):
            await waiting
        with pytest.raises(ConnectionError):
            await other.ask("more")
        await asyncio.gather(*serving)

    asyncio.run(asyncio.wait_for(talk(), 20))


@pytest.mark.parametrize("line", [b'{"number":3,"result":"' + b"x" * 5000, b"no JSON\n"], ids=["too long", "noise"])
def test_a_line_that_cannot_be_read_is_the_end_of_the_other_side(monkeypatch: pytest.MonkeyPatch, line: bytes):
    monkeypatch.setattr(module, "_LONGEST_LINE", 1000)

    async def play() -> None:
        async def answer(what: str, arguments: list[Any]) -> None: ...

        end, other = socket.socketpair()
        channel = await Channel.open(end, answer)
        waiting = asyncio.ensure_future(channel.ask("more"))
        with other:
            other.sendall(line)
            await asyncio.wait_for(channel.serve(), 20)
        with pytest.raises(ConnectionError):
            await waiting

    asyncio.run(play())


def test_half_a_line_of_a_process_that_was_killed_is_its_end():
    async def play() -> None:
        asked: list[str] = []

        async def answer(what: str, arguments: list[Any]) -> None:
            asked.append(what)

        end, other = socket.socketpair()
        channel = await Channel.open(end, answer)
        with other:
            other.sendall(b'{"ask":"whole","with":[]}\n{"number":3,"result":{"models":')
        await asyncio.wait_for(channel.serve(), 20)
        assert asked == ["whole"]
        with pytest.raises(ConnectionError):
            await channel.ask("more")

    asyncio.run(play())
