"""Bodies that do not come as they are: chunked, compressed, or a form around one file. All are counted as they come."""

import zlib

from headstart.serving.server.errors import ServeError, bad_request, too_large

_MOST_LINE = 256
_MOST_TRAILERS = 4096


class ChunkedBody:
    """Takes the chunks of a body apart.

        body = ChunkedBody(limit=1 << 20, padding=0)
        used = body.feed(view)  # until body.done; what is left belongs to the next request

    Args:
        limit: bytes of the body; beyond, 413.
        padding: bytes left free before it in `data`, for alignment.
    """

    def __init__(self, limit: int, padding: int) -> None:
        self.data = bytearray(padding)
        self.done = False
        self._limit, self._padding = limit, padding
        self._left = 0
        """Bytes of the chunk that are still to come."""
        self._line = bytearray()
        """The line that is being read; None of it while a chunk's data comes."""
        self._state = "size"
        self._trailers = 0

    def __len__(self) -> int:
        """Bytes of the body so far."""
        return len(self.data) - self._padding

    def feed(self, view: memoryview) -> int:
        """Read what has come and return how many bytes of it belonged to this body.

        Raises:
            ServeError: 400 where the framing is wrong, 413 beyond the limit.
        """
        used, end = 0, len(view)
        while used < end and not self.done:
            if self._state == "data":
                take = min(self._left, end - used)
                self.data += view[used : used + take]
                used += take
                self._left -= take
                if not self._left:
                    self._state = "end"
                continue
            most = (_MOST_TRAILERS - self._trailers if self._state == "trailer" else _MOST_LINE) - len(self._line)
            piece = view[used : used + max(most, 1)].tobytes()
            length = piece.find(b"\n") + 1
            self._line += piece[:length] if length else piece
            used += length or len(piece)
            if length:
                line = bytes(self._line)
                self._line.clear()
                self._read_line(line)
            elif len(piece) >= most:
                raise bad_request(f"the chunked body has a {self._state} line that is too long")
        return used

    def _read_line(self, line: bytes) -> None:
        if line[-2:] != b"\r\n" or b"\r" in line[:-2] or b"\0" in line:
            raise bad_request("a chunk's line does not end with CR LF")
        line = line[:-2]
        if self._state == "end":
            if line:
                raise bad_request("a chunk is longer than its size says")
            self._state = "size"
        elif self._state == "size":
            digits = line.partition(b";")[0].rstrip(b" \t")
            if not 0 < len(digits) <= 15 or digits.strip(b"0123456789abcdefABCDEF"):
                raise bad_request("a chunk's size is not hexadecimal")
            self._left = int(digits, 16)
            if len(self) + self._left > self._limit:
                raise too_large(f"the body has more than {self._limit} bytes")
            self._state = "data" if self._left else "trailer"
        elif line:
            self._trailers += len(line) + 2
        else:
            self.done = True


def inflate(body: memoryview, encoding: str, limit: int) -> bytes:
    """A body of Content-Encoding gzip or deflate as it was.

    Raises:
        ServeError: 400 where it is damaged, cut off or followed by more; 413 where it inflates beyond `limit`
            bytes, of which no more than that are made; 415 for another encoding.
    """
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ServeError(
            415, f"Content-Encoding {encoding[:40]!r} is not known; accepted: gzip, deflate", grpc="INVALID_ARGUMENT"
        )
    inflater = zlib.decompressobj(zlib.MAX_WBITS if encoding == "deflate" else zlib.MAX_WBITS | 16)
    try:
        data = inflater.decompress(body, limit + 1)
    except zlib.error:
        raise bad_request(f"the body is not {encoding}, as its Content-Encoding says") from None
    if len(data) > limit:
        raise too_large(f"the body inflates to more than {limit} bytes")
    if not inflater.eof or inflater.unused_data:
        raise bad_request(f"the {encoding} body is {'followed by more' if inflater.eof else 'cut off'}")
    return data


def only_file(content_type: str, body: memoryview) -> bytes:
    """The one file in a body of multipart/form-data.

    Raises:
        ServeError: 400 where the form is damaged or has not exactly one part.
    """
    boundary = next(
        (
            part.strip()[9:].strip('"')
            for part in content_type.split(";")[1:]
            if part.strip().lower().startswith("boundary=")
        ),
        "",
    )
    if not 0 < len(boundary) <= 70 or not boundary.isascii():
        raise bad_request("the Content-Type multipart/form-data has no boundary of 1 to 70 characters")
    delimiter = b"--" + boundary.encode()
    data = b"\r\n" + bytes(body)
    pieces = data.split(b"\r\n" + delimiter, 3)
    if len(pieces) != 3 or not pieces[2].startswith(b"--") or not pieces[1].startswith(b"\r\n"):
        raise bad_request("the form has not exactly one part that ends with its boundary; send one file")
    head, separator, content = pieces[1].partition(b"\r\n\r\n")
    if not separator or len(head) > 4096:
        raise bad_request("the form's part has no headers; send one file")
    return content
