"""Temporary folders that go with the server, also where it was killed: the next one deletes what nobody holds."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from headstart.serving.server.errors import StartError

_PREFIX = "headstart-serve-"


class Scratch:
    """A new temporary folder of this user alone, held by a lock that ends with the process.

        with Scratch() as scratch:
            (scratch.path / "model.onnx").write_bytes(graph)

    Raises:
        OSError: there is no space, or no folder for temporary files.
    """

    def __init__(self) -> None:
        # A cleaner of temporary folders may have taken the one that a worker was given.
        Path(tempfile.gettempdir()).mkdir(mode=0o700, exist_ok=True)
        while True:
            self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True)
            self.path = Path(self._folder.name)
            try:
                self._held: int | None = _hold(self.path)
                break
            except (BlockingIOError, FileNotFoundError):  # another server that starts took it for one that nobody holds
                self._folder.cleanup()
            except OSError:  # a file system without locks, or that gives it another owner: nobody can take it for one
                self._held = None
                break

    def close(self) -> None:
        """Delete the folder and what is in it."""
        self._folder.cleanup()
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def __enter__(self) -> "Scratch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse what there is no room for before its first byte is written: a full disk is everybody's.

    Raises:
        OSError: fewer bytes are free where the folder lies.
    """
    if num_bytes > (free := shutil.disk_usage(folder).free):
        raise OSError(errno.ENOSPC, f"it has {num_bytes >> 20} MiB, and {free >> 20} MiB of the disk are free")


def sweep() -> None:
    """Delete what servers of this user left in the temporary folder and no process holds.

    Raises:
        StartError: there is no folder for temporary files that may be written to.
    """
    try:
        temporary = Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise StartError(
            "there is no folder for temporary files that may be written to, and packages are copied to one before they "
            "are loaded; mount one, and name it with TMPDIR"
        ) from error
    for path in temporary.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # held, somebody else's, or gone meanwhile
            held = _hold(path)
            try:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(held)


def _hold(path: Path) -> int:
    """Lock a folder; the descriptor that holds the lock.

    Raises:
        OSError: another process holds it, it is not there, or no folder.
    """
    held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.fstat(held)
        if status.st_uid != os.geteuid():
            raise PermissionError(f"{path} is another user's")
        if status.st_nlink == 0:
            raise FileNotFoundError(f"{path} is gone")
    except OSError:
        os.close(held)
        raise
    return held
