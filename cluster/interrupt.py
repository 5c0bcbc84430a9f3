"""Ctrl-C that cannot be lost.

Python raises KeyboardInterrupt wherever the main thread happens to be, and code there can swallow it. A run was once
seen to go on to its end after one; where it was lost was not found. The handler therefore also remembers it, and
`check` raises it again.

SIGTERM is lost where this is process 1, as in a container, and does not handle it: the kernel drops it then. Whatever
stops the container while a command still imports would wait as long as it may, and kill.
"""

import os
import signal
import sys
from types import FrameType

_pressed = False


def install() -> None:
    """Remember Ctrl-C from now on, and as process 1 end at SIGTERM until a command handles it itself."""
    global _pressed
    _pressed = False
    signal.signal(signal.SIGINT, _handle)
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, _end)


def check() -> None:
    """Raise KeyboardInterrupt if there has been a Ctrl-C."""
    if _pressed:
        raise KeyboardInterrupt


def _handle(signum: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt


def _end(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)
