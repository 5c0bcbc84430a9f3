"""How many cores a container's limit allows, of which ONNX Runtime knows nothing."""

import math
from pathlib import Path, PurePosixPath

_OWN = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")


def limit(own: Path = _OWN, root: Path = _ROOT) -> int | None:
    """Cores of CPU time that this process' control groups (version 2) allow, rounded up; None where they do not say.

    A thread per core of the machine where fewer may run at once uses up the time of all, and then all are stopped.

    Args:
        own: says which control group this process is in.
        root: where control groups are mounted.
    """
    try:
        path = next(line[3:] for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    group = PurePosixPath(path.lstrip("/"))
    quotas = [_quota(root / one / "cpu.max") for one in (group, *group.parents)]
    return min((math.ceil(quota) for quota in quotas if quota), default=None)


def _quota(file: Path) -> float | None:
    try:
        most, period = file.read_text().split()
        return int(most) / int(period)
    except (OSError, ValueError):  # `max`: no limit; the root has no such file
        return None
