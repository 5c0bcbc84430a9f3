"""What is remembered of clients' requests, in bounded memory."""

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

MOST = 256
"""Keys that are remembered; clients choose them, so there is a limit."""


class Remembered(dict[K, V]):
    """A dict that forgets everything when a key beyond the first `MOST` comes: reading costs what a dict's does."""

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= MOST and key not in self:
            self.clear()
        super().__setitem__(key, value)
