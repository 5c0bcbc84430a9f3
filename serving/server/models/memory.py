"""A limit on the memory that models take: estimated before one is loaded, measured when it is."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from headstart.serving.errors import PackageError
from headstart.serving.server.models.folder import Snapshot

FACTOR = 3
"""A model's estimated need for each byte of its files: the weights, what ONNX Runtime packs of them, and activations.

Measured with batches of 16: 3.0 for MobileNetV2's 5.6 MB, 4.4 for 8.9 MB; less the larger the weights are.
"""
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)
_MIB = 1 << 20


class Taken(NamedTuple):
    """What a model takes, in bytes."""

    estimated: int
    """From its files."""
    measured: int
    """By how much the process grew while it was loaded and warmed up; what others did meanwhile is in it."""

    @property
    def counted(self) -> int:
        """What counts against the limit."""
        return max(self)


class Memory:
    """What the models of one process take together, and may take.

    Args:
        limit: bytes; None is no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._taken = 0

    def estimate(self, files: Snapshot) -> int:
        """The bytes that a package is thought to need.

        Raises:
            PackageError: the limit does not leave them; caused by a MemoryError, since it may later.
        """
        need = FACTOR * sum(size for _, size, *_ in files)
        if self.limit is not None and need > self.limit - self._taken:
            raise PackageError(
                f"it needs about {_mib(need)}, {FACTOR} times its files, and of the {_mib(self.limit)} that models may "
                f"take {_mib(max(0, self.limit - self._taken))} are left (while a version is replaced both count); "
                "unload another model, or give a larger --max-memory"
            ) from MemoryError()
        return need

    def take(self, taken: Taken) -> None:
        """Count a model that was loaded."""
        self._taken += taken.counted

    def release(self, taken: Taken) -> None:
        """Count it no more."""
        self._taken -= taken.counted


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def read_size(text: str) -> int:
    """`512M`, `1.5G`, `4GiB` or a plain number to bytes; K is 1024 bytes, and so on.

    Raises:
        PackageError: it is none of these, or 0.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise PackageError(f"{text[:40]!r} is no size in memory; accepted: 512M, 1.5G and the like")
    return size


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:.{0 if num_bytes >= 10 * _MIB else 2}f} MiB"
