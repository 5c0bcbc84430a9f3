"""When the loop stays awake, on a clock and a loop that the test turns."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.serving.server.transport import busy_poll
from headstart.serving.server.transport.busy_poll import PATIENCE_NS, BusyPoll

TURN_NS = 10_000


class Turned:
    """A client, and a loop that has turns of `TURN_NS` as long as something is to be called."""

    def __init__(self) -> None:
        self.now = 1
        self.calls: list[Callable[[], None]] = []
        self.polling = BusyPoll(self)  # type: ignore[arg-type]

    def call_soon(self, call: Callable[[], None]) -> None:
        self.calls.append(call)

    def request(self, gap: int) -> int:
        """Answer one, and ask the next after `gap` ns; the turns that were taken meanwhile."""
        self.polling.answered()
        ends, turns = self.now + gap, 0
        while self.now + TURN_NS <= ends and self.calls:
            self.now += TURN_NS
            due, self.calls = self.calls, []
            assert len(due) == 1, "one chain of turns and no second"
            for call in due:
                call()
            turns += 1
        self.now = ends
        self.polling.asked()
        return turns


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> Turned:
    loop = Turned()
    monkeypatch.setattr(busy_poll, "perf_counter_ns", lambda: loop.now)
    return loop


def test_the_loop_stays_awake_once_most_requests_come_soon(turned: Turned):
    turns = [turned.request(PATIENCE_NS // 5) for _ in range(40)]
    assert turns[:8] == [0] * 8
    assert min(turns[20:]) >= PATIENCE_NS // 5 // TURN_NS - 1
    turned.request(PATIENCE_NS * 10)
    assert turned.request(PATIENCE_NS // 5) > 0, "one late request changes nothing"


def test_a_client_that_takes_its_time_is_waited_for_asleep(turned: Turned):
    for _ in range(40):
        turned.request(PATIENCE_NS // 5)
    turns = [turned.request(PATIENCE_NS * 3) for _ in range(20)]
    assert max(turns) <= PATIENCE_NS // TURN_NS + 2
    assert turns[4:] == [0] * 16


@given(st.lists(st.sampled_from([PATIENCE_NS // 10, PATIENCE_NS * 2]), min_size=50))
@settings(max_examples=300, deadline=None)
def test_what_is_waited_in_vain_is_bounded(gaps: list[int]):
    """A quarter of the patience a request at most, beside three times that a run of soon ones earns."""
    loop, vain = Turned(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(busy_poll, "perf_counter_ns", lambda: loop.now)
        for gap in gaps:
            turns = loop.request(gap)
            vain += turns * TURN_NS if gap > PATIENCE_NS else 0
    assert vain <= (PATIENCE_NS + 2 * TURN_NS) * (3 + len(gaps) / 4)


def test_a_real_loop_is_kept_awake_and_let_go():
    async def main() -> tuple[float, bool, bool]:
        loop = asyncio.get_running_loop()
        polling, longest = BusyPoll(loop), 0.0
        for _ in range(40):
            began = loop.time()
            polling.answered()
            await asyncio.sleep(0)
            polling.asked()
            longest = max(longest, loop.time() - began)
        polling.answered()
        awake = polling._turning
        await asyncio.sleep(PATIENCE_NS * 1e-9 * 20)
        return longest, awake, polling._turning

    for _ in range(100):
        longest, *found = asyncio.run(main())
        if longest < PATIENCE_NS * 1e-9:  # where others have taken the core for longer than that, no request was soon
            break
    assert (longest < PATIENCE_NS * 1e-9, *found) == (True, True, False)
