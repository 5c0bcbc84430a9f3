"""Files and JSON that somebody else may have written: read without a wait and within bounds, or refused."""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from headstart.serving.errors import brief

_NOT_PLAIN = "it is a link or not a plain file"
_DEEPEST = 32
_TOO_DEEP = f"it is nested more than {_DEEPEST} deep"


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
            raise ValueError(_NOT_PLAIN) from None  # of no error of the machine, which a server would wait for to pass
        raise


def parse_plain(content: bytes) -> Any:
    """The document in JSON all of whose parts can be written down again, in JSON and in UTF-8.

    Raises:
        ValueError: it is no JSON, nested more than 32 deep, or has numbers beyond 64 bits or text that is not Unicode.
    """
    try:
        document = json.loads(content.decode(), parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check(document, _DEEPEST)
    return document


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _check(value: Any, depth: int) -> None:
    if isinstance(value, dict | list):
        if not depth:
            raise ValueError(_TOO_DEEP)
        for one in (*value, *value.values()) if isinstance(value, dict) else value:
            _check(one, depth - 1)
    elif isinstance(value, str):
        value.encode()  # a lone surrogate is an escape that JSON has, and no text; the error is a ValueError
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number is too large for a float")  # 1e999
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"the number {brief(str(value))} is too large for 64 bits")
