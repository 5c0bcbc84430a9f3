"""How many rows a batch takes: as many as pay, which is learnt from the executions.

On one CPU core a larger batch need not pay: MobileNetV2 at 224 pixels took 7.8 ms of CPU time a row alone, 7.5 in
batches of two, 7.9 of four, 8.3 of eight and 8.8 of sixteen (the least of ten to 160 executions each). ResNet-50, on a
slower processor: 106, 107, 112, 117 and 119 ms.
"""

from bisect import bisect_left

from headstart.serving.server.remembered import Remembered
from headstart.serving.server.scheduling.signature import Key

_KNOWN_AFTER = 5  # executions of a size before its estimate is believed; the first, which allocates, is not in it
_KNOWN_AFTER_NS = 500_000_000  # or after so much time in them, which another program disturbs less
_UP, _DOWN = (
    0.1,
    0.5,
)  # weight of an execution that took longer or less: what else runs on a machine only lengthens them
_EQUAL = 1.03  # a larger batch that takes so much longer for a row is still taken: it costs fewer turns
_HOPELESS = 1.1  # sizes below one that takes so much longer for a row are not tried
_PROBE_EVERY = 16  # times the most rows: then a neighbour of the chosen size is measured anew,
_RARELY = 8  # and a hopeless one after so many times that


class BatchSizes:
    """Learns, for each shape of a request, the size of batch that takes least time for a row.

        sizes = BatchSizes(16)
        limit = sizes.limit(key, waiting=20)
        sizes.learn(key, rows=16, nanoseconds=90e6)

    It begins with the largest that those who wait can fill, by more than half, and tries the powers of two below once
    that is known. Of sizes that are as good the largest is chosen.

    Args:
        max_rows: of a batch.
    """

    def __init__(self, max_rows: int) -> None:
        self._sizes = [*(1 << power for power in range((max_rows - 1).bit_length())), max_rows]
        self._learnt: Remembered[Key, _Rates] = Remembered()

    def limit(self, key: Key, waiting: int) -> int:
        """The most rows that the next batch of this shape shall have, where so many wait."""
        rates, last = self._learnt.get(key), self._place(waiting)
        return self._sizes[last if rates is None else rates.next(last)]

    def learn(self, key: Key, rows: int, nanoseconds: float) -> None:
        """Take in an execution of so many rows, as one of the next larger size."""
        if not rows or len(self._sizes) == 1:
            return
        if key not in self._learnt:
            self._learnt[key] = _Rates(len(self._sizes), _PROBE_EVERY * self._sizes[-1])
        self._learnt[key].learn(self._place(rows), rows, nanoseconds)

    def _place(self, rows: int) -> int:
        """The place of the least size that holds so many rows, or of the largest."""
        return min(bisect_left(self._sizes, rows), len(self._sizes) - 1)


class _Rates:
    """Estimates of the nanoseconds for a row, by the place of a size among all sizes.

    Args:
        count: of sizes.
        probe_every: rows.
    """

    def __init__(self, count: int, probe_every: int) -> None:
        self._calls = [0] * count
        self._spent = [0.0] * count
        self._estimates = [0.0] * count
        self._probe_every, self._since_probe, self._step = probe_every, 0, 1

    def learn(self, place: int, rows: int, nanoseconds: float) -> None:
        self._since_probe += rows
        self._calls[place] += 1
        if self._calls[place] > 1:
            self._spent[place] += nanoseconds
            difference = nanoseconds / rows - self._estimates[place]
            weight = 1.0 if self._calls[place] == 2 else _UP if difference > 0 else _DOWN
            self._estimates[place] += weight * difference

    def next(self, last: int) -> int:
        """The place of the size to run, none after `last`: one that is still unknown, the best, or from time to time a
        neighbour of it."""
        best = float("inf")
        for place in reversed(range(last + 1)):
            if self._calls[place] < _KNOWN_AFTER and self._spent[place] < _KNOWN_AFTER_NS:
                return place
            if self._estimates[place] > _HOPELESS * best:
                break
            best = min(best, self._estimates[place])
        known = range(place, last + 1)
        chosen = max(one for one in known if self._estimates[one] <= _EQUAL * best)
        neighbour = min(max(chosen + self._step, 0), last)
        rarely = _RARELY if self._estimates[neighbour] > _HOPELESS * best else 1
        if self._since_probe < self._probe_every * rarely:
            return chosen
        self._since_probe, self._step = 0, -self._step
        return neighbour
