"""Ctrl-C that cannot be lost.

Python raises KeyboardInterrupt wherever the main thread happens to be, and code there can swallow it. A run was once
seen to go on to its end after one; where it was lost was not found. The handler therefore also remembers it, and
`check` raises it again.
"""

import signal
from types import FrameType

_pressed = False


def install() -> None:
    """Remember Ctrl-C from now on."""
    global _pressed
    _pressed = False
    signal.signal(signal.SIGINT, _handle)


def check() -> None:
    """Raise KeyboardInterrupt if there has been a Ctrl-C."""
    if _pressed:
        raise KeyboardInterrupt


def _handle(signum: int, frame: FrameType | None) -> None:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
