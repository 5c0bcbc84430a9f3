"""Files that are whole or not there, and files of other users."""

import os
import secrets
from pathlib import Path

ASK_OWNER = "whoever made it can make it readable: chmod -R a+rX"
"""The next step where a file may not be read."""


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


def is_there(path: Path) -> bool:
    """Say whether there is such a path, be it one that this user may not look at."""
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return True
