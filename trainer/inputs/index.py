"""The index of checked image files: each is read, hashed and decoded once, and its outcome remembered.

Hashing and decoding a data set takes longer than training heads on it, so a second run must not do it again.
The index is one SQLite file in the cache, keyed on a file's absolute path, size and time of change (ctime, which
moves whenever the content does; copying and unpacking set the modification time back). Several processes may use it
at once, and a process that is killed loses the files of one chunk at most.
"""

import contextlib
import hashlib
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import PIL

from headstart.trainer.errors import DataError, RunError
from headstart.trainer.inputs.images import is_grey, read_image

Progress = Callable[[int, int], None]

# Files between two commits: under a second of decoding, and below SQLite's least limit of 999 parameters a
# statement.
_CHUNK = 256
# An error may be mended by another Pillow, so it is believed from this one alone; digests are good for ever.
_DECODER = f"1/{PIL.__version__}"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS checked (
    path BLOB PRIMARY KEY, size INTEGER NOT NULL, ctime_ns INTEGER NOT NULL,
    sha256 TEXT NOT NULL, error TEXT NOT NULL, grey INTEGER NOT NULL, decoder TEXT NOT NULL
) WITHOUT ROWID
"""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The outcome for one file."""

    sha256: str = ""
    """Of the file's bytes; empty when they could not be read."""
    error: str = ""
    """What is wrong with the file, to be read after its path; empty when it is a readable image."""
    grey: bool = False
    """R = G = B in every pixel."""


def check_images(paths: Sequence[str], cache: Path, progress: Progress | None = None) -> list[Checked]:
    """Return the outcome for each absolute path, reading only files that are new or have changed.

    Raises RunError when the index cannot be written: a full disk, or a cache without write access.
    """
    outcomes: list[Checked] = []
    with _opened(cache / "images.sqlite") as index, _pool() as pool:
        for start in range(0, len(paths), _CHUNK):
            outcomes += _check_chunk(paths[start : start + _CHUNK], index, pool)
            if progress is not None:
                progress(len(outcomes), len(paths))
    return outcomes


def _check_chunk(paths: Sequence[str], index: sqlite3.Connection, pool: ThreadPoolExecutor) -> list[Checked]:
    known = _look_up(paths, index)
    stamps = list(pool.map(_stamp, paths))
    # The stamp is taken before the bytes are read: a file written in between is checked again next time.
    new = [i for i, path in enumerate(paths) if (path, stamps[i]) not in known]
    checked = dict(zip(new, pool.map(_check, [paths[i] for i in new]), strict=True))
    # A file that could not even be opened is not remembered: that is the disk's state, not the file's.
    rows = [
        (os.fsencode(paths[i]), *stamps[i], c.sha256, c.error, c.grey, _DECODER) for i, c in checked.items() if c.sha256
    ]
    if rows:
        with index:
            index.executemany("INSERT OR REPLACE INTO checked VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    return [checked[i] if i in checked else known[path, stamps[i]] for i, path in enumerate(paths)]


def _look_up(paths: Sequence[str], index: sqlite3.Connection) -> dict[tuple[str, tuple[int, int]], Checked]:
    marks = ", ".join("?" * len(paths))
    rows = index.execute(f"SELECT * FROM checked WHERE path IN ({marks})", [os.fsencode(path) for path in paths])
    return {
        (os.fsdecode(path), (size, ctime_ns)): Checked(sha256=sha256, error=error, grey=bool(grey))
        for path, size, ctime_ns, sha256, error, grey, decoder in rows
        if not error or decoder == _DECODER
    }


def _stamp(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError:
        return (-1, -1)  # never stored, so never found; _check says why
    return (status.st_size, status.st_ctime_ns)


def _check(path: str) -> Checked:
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return Checked(error="is no regular file")  # a pipe would be waited for without end
        content = Path(path).read_bytes()
    except OSError as error:
        return Checked(error=f"cannot be read: {error.strerror or error}")
    digest = hashlib.sha256(content).hexdigest()
    try:
        return Checked(sha256=digest, grey=is_grey(read_image(content, name=path)))
    except DataError as error:
        return Checked(sha256=digest, error=str(error).removeprefix(path).strip())


@contextlib.contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """Give threads for decoding, which Pillow does without Python's lock; Ctrl-C drops what is queued."""
    pool = ThreadPoolExecutor(max_workers=min(32, len(os.sched_getaffinity(0))), thread_name_prefix="check-images")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[sqlite3.Connection]:
    try:
        with contextlib.closing(_connect(file)) as index:
            yield index
    except sqlite3.Error as error:
        raise RunError(
            f"the index of checked images {file} cannot be used: {error}; free some space, make it and its "
            "folder writable, or set HEADSTART_CACHE to another folder (the index may be deleted: it is built anew)"
        ) from error


def _connect(file: Path) -> sqlite3.Connection:
    """Open the index, beginning a new one where the file is no database: all in it can be found again."""
    for attempt in (1, 2):
        _make(file)
        # Two processes wait for each other's short transactions, and for a slow network disk, up to a minute.
        index = sqlite3.connect(file, timeout=60)
        try:
            index.execute(_SCHEMA)
            return index
        except sqlite3.OperationalError:  # locked, full or read-only: the file itself is sound
            index.close()
            raise
        except sqlite3.DatabaseError:
            index.close()
            if attempt == 2:
                raise
            file.replace(file.with_suffix(".damaged"))
    raise AssertionError("unreachable")


def _make(file: Path) -> None:
    """Make an empty index where there is none: SQLite would, 0644 under any umask, which no group can share."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch()
    except OSError as error:
        raise RunError(f"the cache {file.parent} cannot be used: {error.strerror}; set HEADSTART_CACHE") from error
