"""How many rows a batch takes: as many as pay, which is learnt from the executions.

On one CPU core a larger batch need not pay: MobileNetV2 at 224 pixels took 7.8 ms of CPU time a row alone, 7.5 in
batches of two, 7.9 of four, 8.3 of eight and 8.8 of sixteen (the least of ten to 160 executions each).
"""

from headstart.serving.server.remembered import Remembered
from headstart.serving.server.scheduling.signature import Key

_KNOWN_AFTER = 5  # executions of a size before its estimate is believed; the first, which allocates, is not in it
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
        limit = sizes.limit(key)
        sizes.learn(key, limit, rows=16, nanoseconds=90e6)

    It begins with the largest, and tries the powers of two below once that is known. Of sizes that are as good the
    largest is chosen.

    Args:
        max_rows: of a batch.
    """

    def __init__(self, max_rows: int) -> None:
        self._sizes = [*(1 << power for power in range((max_rows - 1).bit_length())), max_rows]
        self._learnt: Remembered[Key, _Rates] = Remembered()

    def limit(self, key: Key) -> int:
        """The most rows that the next batch of this shape shall have."""
        rates = self._learnt.get(key)
        return self._sizes[-1 if rates is None else rates.next()]

    def learn(self, key: Key, limit: int, rows: int, nanoseconds: float) -> None:
        """Take in an execution of `rows` rows that was given this limit; one that did not fill it says nothing."""
        if 2 * rows <= limit or len(self._sizes) == 1:
            return
        if key not in self._learnt:
            self._learnt[key] = _Rates(len(self._sizes), _PROBE_EVERY * self._sizes[-1])
        self._learnt[key].learn(self._sizes.index(limit), rows, nanoseconds)


class _Rates:
    """Estimates of the nanoseconds for a row, by the place of a size among all sizes.

    Args:
        count: of sizes.
        probe_every: rows.
    """

    def __init__(self, count: int, probe_every: int) -> None:
        self._calls = [0] * count
        self._estimates = [0.0] * count
        self._probe_every, self._since_probe, self._step = probe_every, 0, 1

    def learn(self, place: int, rows: int, nanoseconds: float) -> None:
        self._since_probe += rows
        self._calls[place] += 1
        if self._calls[place] > 1:
            difference = nanoseconds / rows - self._estimates[place]
            weight = 1.0 if self._calls[place] == 2 else _UP if difference > 0 else _DOWN
            self._estimates[place] += weight * difference

    def next(self) -> int:
        """The place of the size to run: one that is still unknown, the best, or from time to time a neighbour of it."""
        best = float("inf")
        for place in reversed(range(len(self._calls))):
            if self._calls[place] < _KNOWN_AFTER:
                return place
            if self._estimates[place] > _HOPELESS * best:
                break
            best = min(best, self._estimates[place])
        known = range(place, len(self._calls))
        chosen = max(one for one in known if self._estimates[one] <= _EQUAL * best)
        neighbour = min(max(chosen + self._step, 0), len(self._calls) - 1)
        rarely = _RARELY if self._estimates[neighbour] > _HOPELESS * best else 1
        if self._since_probe < self._probe_every * rarely:
            return chosen
        self._since_probe, self._step = 0, -self._step
        return neighbour
