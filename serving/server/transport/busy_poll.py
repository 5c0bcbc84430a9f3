"""Busy polling: the loop stays awake for a moment after the only client's answer, where its next request is near.

A process that sleeps in epoll is woken late and finds its caches cold: a request that follows soon is answered .07 ms
earlier by a small model where the loop stays awake (benchmarks/LOG.md).
"""

import asyncio
import os
from time import perf_counter_ns

PATIENCE_NS = 1_000_000
"""How long the loop stays awake after an answer at most."""
_LIKELY = 0.75
_WEIGHT = 1 / 8
_give_way = getattr(os, "sched_yield", lambda: None)  # which Windows lacks


class BusyPoll:
    """Keeps a loop awake after an answer if most of the last requests came within `PATIENCE_NS` of one.

        polling = BusyPoll(loop)
        polling.answered()  # the only client has been answered
        polling.asked()  # a request is whole

    What it costs is CPU time that nobody else wants, a quarter of `PATIENCE_NS` a request on average at most: the
    core is offered to others at each turn, and a client that lets more time pass is waited for asleep.

    Args:
        loop: which is kept awake.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._answered = 0
        self._share = 0.0  # of the last requests, those that came so soon
        self._waiting = self._turning = False

    def answered(self) -> None:
        """Wait for the next request: awake where it is likely to come soon."""
        self._answered = perf_counter_ns()
        self._waiting = self._share >= _LIKELY
        if self._waiting and not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn)

    def asked(self) -> None:
        """Note that a request has come."""
        soon = perf_counter_ns() - self._answered <= PATIENCE_NS
        self._share += _WEIGHT * (soon - self._share)
        self._waiting = False

    def _turn(self) -> None:
        """One more turn of the loop, in which it looks at its sockets."""
        self._turning = self._waiting and perf_counter_ns() - self._answered <= PATIENCE_NS
        if self._turning:
            _give_way()
            self._loop.call_soon(self._turn)
