"""Processes that belong to one test: those whose environment holds the variable that the test set.

Ray's processes are daemons of their own, and other Rays may run on the same machine: the environment that all of
them inherit tells whose they are.
"""

import os
import signal
import time
from pathlib import Path

MARK = "HEADSTART_TEST_MARK"


def marked(mark: str) -> list[int]:
    """Return the living processes that inherited `mark`."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # A zombie has no environment any more.
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def gone(mark: str, seconds: float = 30) -> bool:
    """Wait until no process has `mark`; False when some still live after that time."""
    end = time.monotonic() + seconds
    while marked(mark):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def kill(mark: str) -> None:
    """Kill every process that has `mark`, and those that they start meanwhile."""
    while found := marked(mark):
        for process in found:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)
