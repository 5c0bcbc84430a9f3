"""Files that somebody else may have written: a reader neither waits for them nor takes more than it has room for."""

import errno
import os
import stat
from pathlib import Path

_NOT_PLAIN = "it is a link or not a plain file"


def read_plain(path: Path, most: int) -> bytes:
    """What a file holds; of what is no plain file nothing is read.

    Opening a FIFO waits until somebody writes to it, reading `/dev/zero` never ends, and a link shows what its writer
    may not read.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no plain file, or has more than `most` bytes.
    """
    with open(path, "rb", opener=_open) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(_NOT_PLAIN)
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise ValueError(_NOT_PLAIN) from error
        raise
