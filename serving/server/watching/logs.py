"""The server's log: lines to read, or one JSON object a line."""

import json
import logging
import select
import time
from collections.abc import Iterator
from typing import Any

from headstart.serving.errors import printable

FORMATS = ("text", "json")
FIELDS = ("worker", "client", "request_id", "model", "version", "status", "ms", "bytes")
"""What a record may say beside its message: given as `extra`, shown where it is there."""

_PATIENCE_MS = 100
"""How long a line waits, once, for whoever reads the log."""
_PIECE = 1024
"""Characters, so 4 KiB at most: what fits where a pipe says that it takes more."""


def configure(log_format: str, worker: int | None = None) -> None:
    """Write the log to stderr.

    Args:
        log_format: one of `FORMATS`.
        worker: the number of this process, which each line then bears.
    """
    handler = _Handler()
    handler.setFormatter(_JsonFormatter(worker) if log_format == "json" else _TextFormatter(worker))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Handler(logging.StreamHandler[Any]):
    """Writes to stderr, and drops lines that nobody takes: a collector that hangs must not hold up the answers.

    The first line that is taken again says how many were lost.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lost = 0
        self._torn = False  # whether the last line was cut off

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            text = self.format(record) + self.terminator
            if self._lost:
                words = "%d lines of the log are lost, since nobody took them"
                note = logging.LogRecord(__name__, logging.WARNING, "", 0, words, (self._lost,), None)
                text = self.terminator * self._torn + self.format(note) + self.terminator + text
            for start in range(0, len(text), _PIECE):
                if not self._is_taken(0 if self._lost else _PATIENCE_MS):
                    self._lost, self._torn = self._lost + 1, start > 0 or self._torn
                    return
                self.stream.write(text[start : start + _PIECE])
                self.flush()
            self._lost, self._torn = 0, False
        except Exception:  # as in every handler of logging: what cannot be written must not stop who logs it
            self.handleError(record)

    def _is_taken(self, patience_ms: int) -> bool:
        """Whether a piece can be written without waiting, or after a while."""
        try:
            waiting = select.poll()
            waiting.register(self.stream.fileno(), select.POLLOUT)
        except (AttributeError, OSError, ValueError):  # no file: closed, or in memory
            return True
        return bool(waiting.poll(patience_ms))


class _Formatter(logging.Formatter):
    """The time is UTC in ISO 8601, with milliseconds."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self, worker: int | None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._worker = {} if worker is None else {"worker": worker}

    def fields(self, record: logging.LogRecord) -> Iterator[tuple[str, Any]]:
        """What a record says beside its message."""
        there = record.__dict__ | self._worker
        return ((name, there[name]) for name in FIELDS if name in there)


class _TextFormatter(_Formatter):
    """`TIME LEVEL LOGGER: MESSAGE request_id=... status=...`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """The line, before a traceback."""
        line = printable(super().formatMessage(record))
        return " ".join([line, *(f"{name}={_plain(value)}" for name, value in self.fields(record))])

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's own name
        """A traceback, indented: what the error says, which may be somebody else's text, looks like no line of ours."""
        return "\n".join(f"  {printable(line)}" for line in super().formatException(ei).split("\n"))


class _JsonFormatter(_Formatter):
    """One object: `time`, `level`, `logger`, `message`, the fields, and `exception` with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        document = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **dict(self.fields(record)),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def _plain(value: Any) -> str:
    """A value on one line; what a stranger chose cannot begin another."""
    text = str(value)
    return text if text.isprintable() and " " not in text else json.dumps(text)
