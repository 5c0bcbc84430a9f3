"""Files that are whole or not there, and files of other users."""

import contextlib
import os
import re
import secrets
import time
from pathlib import Path

ASK_OWNER = "whoever made it can make it readable: chmod -R a+rX"
"""The next step where a file may not be read."""

_LEFT = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, whenever the process dies."""
    # Not the process's number: two containers that share a cache may have one.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path, seconds: float) -> None:
    """Remove what writes in `folder` have left that were killed; younger than `seconds` may be another's at work."""
    left: list[Path] = []
    with contextlib.suppress(OSError):  # not ours to list
        left += (path for path in folder.iterdir() if _LEFT.fullmatch(path.name))
    for path in left:
        with contextlib.suppress(OSError):  # it has just become its file, or is not ours to remove
            if path.stat().st_mtime <= time.time() - seconds:
                path.unlink()


def is_there(path: Path) -> bool:
    """Say whether there is such a path, be it one that this user may not look at."""
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True
