"""Rows of results: appended to a CSV a benchmark and device, with what is needed to read them later.

append_rows("energy", [{"case": "T512", "unit": "ms", "p50": 3.1, "max_error": 2e-6}])
"""

import csv
import datetime
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
_MOST_RUNS = 100


def append_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Append rows to `results/<name>-<device>.csv` with date, commit and versions in front, and return the file.

    All rows of a call have the same keys. A file with other columns is continued under a number of its own, because
    rows that cannot be compared do not belong into one table.
    """
    common = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "device": device_name(),
    }
    columns = [*common, *rows[0]]
    RESULTS.mkdir(exist_ok=True)
    number = 1
    while True:
        path = RESULTS / f"{name}-{device_slug()}{'' if number == 1 else f'-{number}'}.csv"
        if not path.exists() or path.read_text().splitlines()[0].split(",") == columns:
            break
        number += 1
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**common, **row} for row in rows)
    return path


def device_name() -> str:
    """Return the GPU's name, or how many CPU threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def device_slug() -> str:
    """Return a short name of the device for a file's name: cpu, h100, h200."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().lower().split()
    return next((word for word in words if any(c.isdigit() for c in word)), "cuda")


def interleaved(
    contenders: Mapping[str, Callable[[], object]], *, runs: int = 7, seconds: float = 0.0
) -> dict[str, dict[str, float]]:
    """Time the contenders in turn, after a warm-up each: p20, p50 and p80 of each in milliseconds.

    Each round is in an order of its own (seeded): a contender finds the caches as the one before left them. There are
    `runs` rounds at least, and more, up to 100, until `seconds` are over: seven of some milliseconds say little.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffled = list(contenders), random.Random(0)
    for name in order:
        contenders[name]()
    began, position = time.perf_counter(), 0
    while position < runs or (position < _MOST_RUNS and time.perf_counter() - began < seconds):
        shuffled.shuffle(order)
        for name in order:
            _synchronise()
            started = time.perf_counter()
            contenders[name]()
            _synchronise()
            times[name].append((time.perf_counter() - started) * 1e3)
        position += 1
    return {
        name: dict(zip(("p20", "p50", "p80"), map(float, np.quantile(taken, (0.2, 0.5, 0.8))), strict=True))
        for name, taken in times.items()
    }


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Return the commit; what HEADSTART_COMMIT says where a copy of the tree came without its history."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):  # no git: that loses no row
            return ""
        return done.stdout.strip()

    short = git("rev-parse", "--short", "HEAD") or os.environ.get("HEADSTART_COMMIT", "")
    return f"{short}+dirty" if git("status", "--porcelain", "--untracked-files=no") else short or "unknown"
