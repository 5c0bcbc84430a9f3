"""What a connection has received and not read yet."""


class ReceiveBuffer:
    """Bytes of fixed room, filled at one end and read at the other.

        count = socket.recv_into(buffer.room())
        buffer.filled(count)
        head = buffer.take_head()

    Args:
        size: bytes; no head can be longer.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._bytes = bytearray(size)
        self._view = memoryview(self._bytes)
        self._start = self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    @property
    def is_full(self) -> bool:
        """Whether nothing more can be received before something is read or `compact` makes room."""
        return self._end == self.size

    def room(self) -> memoryview:
        """Where the next bytes go; not empty unless `is_full`."""
        return self._view[self._end :]

    def scrap(self) -> memoryview:
        """Where bytes go that nobody will read."""
        return self._view

    def filled(self, count: int) -> None:
        """So many bytes have come."""
        self._end += count

    def put(self, data: memoryview) -> None:
        """Bytes have come that were received elsewhere; there must be room for them."""
        self._view[self._end : self._end + len(data)] = data
        self._end += len(data)

    def clear(self) -> None:
        """Forget what was not read."""
        self._start = self._end = 0

    def compact(self) -> None:
        """Make room for all that can be held beside what was not read."""
        if self._start:
            left = self._end - self._start
            self._bytes[:left] = self._bytes[self._start : self._end]
            self._start, self._end = 0, left

    def take_head(self) -> bytes | None:
        """The next request's head with its empty line, or None where all of it has not come yet."""
        while self._bytes.startswith(b"\r\n", self._start, self._end):  # empty lines before a request are allowed
            self._start += 2
        end = self._bytes.find(b"\r\n\r\n", self._start, self._end)
        if end < 0:
            return None
        head = self._view[self._start : end + 4].tobytes()
        self._start = end + 4
        return head

    def take_into(self, target: memoryview) -> int:
        """Copy what there is to the front of `target`, as far as it fits; how many bytes."""
        count = min(len(target), len(self))
        target[:count] = self._view[self._start : self._start + count]
        self._start += count
        return count

    def unread(self) -> memoryview:
        """All that was not read."""
        return self._view[self._start : self._end]

    def skip(self, count: int) -> None:
        """So many bytes of `unread` have been read."""
        self._start += count
