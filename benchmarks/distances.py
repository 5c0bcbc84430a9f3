"""What the benchmarks of task distances share: ragged workloads, timing in turn, floors, correctness in each row."""

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import profile

from benchmarks.rows import append_rows, interleaved
from headstart.kernels.ragged import RaggedTasks

Contenders = Callable[[Tensor, RaggedTasks], dict[str, Callable[[], Tensor]]]

SECONDS = 3.0
"""For which the contenders of a workload take turns on a CPU, at least."""

CHECKED_TASKS = 8
"""Tasks whose distances are compared with the definition: the definition holds whole matrices in float64."""

FAILED: list[str] = []
"""What was left out on a GPU, because it failed or time was up."""

deadline = math.inf
"""The reading of time.monotonic() from which on no further workload is begun."""


def is_quick(description: str) -> bool:
    """Read the command line, where --quick is all there is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer workloads")
    return bool(parser.parse_args().quick)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """T tasks of log-normal sizes against one target."""

    num_tasks: int
    """T."""
    rows: int
    """Median rows of a task; the largest has twice as many."""
    dim: int
    """D."""
    num_target: int
    """N."""

    def make(self, device: str) -> tuple[Tensor, RaggedTasks]:
        """Return the target [N, D] and the tasks: post-ReLU-like features, seeded."""
        generator = torch.Generator().manual_seed(0)
        sizes = (self.rows * torch.randn(self.num_tasks, generator=generator).mul(0.5).exp()).long()
        sizes = sizes.clamp(1, 2 * self.rows)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(int(offsets[-1]), self.dim, generator=generator, device=device).relu_()
        target = torch.randn(self.num_target, self.dim, generator=generator, device=device).add_(0.1).relu_()
        return target, RaggedTasks(features, offsets)


def measure(
    name: str,
    workloads: Sequence[Workload],
    contenders: Contenders,
    definition: Callable[[Tensor, RaggedTasks], Tensor],
    *,
    floor: Callable[[Tensor, RaggedTasks, str], float] | None = None,
    runs: int = 7,
    checked_tasks: int = CHECKED_TASKS,
) -> list[dict[str, Any]]:
    """Time the contenders in turn on each workload, append the rows, print them and return them.

    The first contender is ours; `speedup` is a contender's median over ours, so that above 1 ours is faster, and
    nothing where ours failed. A contender's name may end in its precision, "... bf16", else it is fp32. `floor` says
    how many milliseconds this machine must take at a precision; `of_floor` is that over the median. `max_error` is
    against the definition in float64, on the first `checked_tasks` tasks; `peak_mb` is what was held beside the inputs.

    Time on a GPU is short and may not come again: there, what fails is named in FAILED and left out, and what was
    measured before is in the file already. On a CPU it raises.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for workload in workloads:
        started = time.monotonic()
        if started > deadline:
            FAILED.append(f"{name}, {workload}: not begun, the time is up")
            continue
        found: list[dict[str, Any]] = []
        with kept_going(f"{name}, {workload}", device):
            found = _measure_one(workload, contenders, definition, floor, runs, checked_tasks, device)
        if found:
            append_rows(name, found)
            rows += found
        print(f"{name}, {workload}: {len(found)} rows, {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    if rows:
        print_rows(name, rows)
    return rows


def _measure_one(
    workload: Workload,
    contenders: Contenders,
    definition: Callable[[Tensor, RaggedTasks], Tensor],
    floor: Callable[[Tensor, RaggedTasks, str], float] | None,
    runs: int,
    checked_tasks: int,
    device: str,
) -> list[dict[str, Any]]:
    """The rows of one workload."""
    target, tasks = workload.make(device)
    checked = tasks.offsets[: checked_tasks + 1]
    few = RaggedTasks(tasks.features[: int(checked[-1])].double(), checked)
    exact = definition(target.double(), few)
    given = contenders(target, tasks)
    timed = _working(given, workload, device)
    times = interleaved(timed, runs=runs, seconds=0 if device == "cuda" else SECONDS)  # a GPU's time is short
    ours = times.get(next(iter(given)))
    rows = []
    for contender, function in timed.items():
        precision = contender.rsplit(" ", 1)[-1]
        precision = precision if precision in _RATE_DTYPES else "fp32"
        least = None if floor is None else floor(target, tasks, precision)
        error, peak = _error_and_peak(function, exact)
        rows.append(
            {
                "num_tasks": workload.num_tasks,
                "median_rows": workload.rows,
                "dim": workload.dim,
                "num_target": workload.num_target,
                "contender": contender,
                "unit": "ms",
                **{quantile: round(value, 4) for quantile, value in times[contender].items()},
                "speedup": "" if ours is None else round(times[contender]["p50"] / ours["p50"], 3),
                "max_error": f"{error:.3g}",
                "peak_mb": peak,
                "floor_ms": "" if least is None else round(least, 4),
                "of_floor": "" if least is None else round(least / times[contender]["p50"], 3),
            }
        )
    return rows


def _working(
    timed: dict[str, Callable[[], Tensor]], workload: Workload, device: str
) -> dict[str, Callable[[], Tensor]]:
    """The contenders that run; on a CPU all of them, for each is run in its turn anyway."""
    if device == "cpu":
        return timed
    working = {}
    for contender, function in timed.items():
        with kept_going(f"{contender}, {workload}", device):
            function()
            torch.cuda.synchronize()
            working[contender] = function
    return working


@contextmanager
def kept_going(what: str, device: str) -> Iterator[None]:
    """On a GPU, note what fails in it and go on."""
    try:
        yield
    except Exception as error:
        if device == "cpu":
            raise
        said = f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        FAILED.append(said[:300])
        print(traceback.format_exc(limit=-6), f"left out: {said}", sep="\n", file=sys.stderr, flush=True)


def print_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a short table."""
    table = Table(title=name, title_justify="left")
    for column in rows[0]:
        if column not in ("unit", "p20", "p80"):
            table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(value) for column, value in row.items() if column not in ("unit", "p20", "p80")))
    Console(width=140).print(table)


_RATE_DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "bf16x3": torch.bfloat16, "fp32": torch.float32}


@cache
def product_rate(precision: str) -> float:
    """Multiplications and additions a millisecond of one large product on this machine, at a precision."""
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 2048)
    a, b = (torch.randn(size, size, device=device, dtype=_RATE_DTYPES[precision]) for _ in range(2))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        taken = interleaved({"product": lambda: a @ b.T}, runs=5)["product"]["p20"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return 2 * size**3 / taken / (3 if precision == "bf16x3" else 1)


@cache
def root_rate() -> float:
    """Square roots a millisecond: of an array that fits the CPU's cache; of a GPU's special-function units.

    Those give 16 a clock and multiprocessor (CUDA C++ programming guide, throughput of native arithmetic instructions,
    8.0 and 9.0), at some 1.7 GHz. An array's roots would measure its memory, where no fused program has its distances.
    """
    if torch.cuda.is_available():
        return 16 * 1.7e6 * torch.cuda.get_device_properties().multi_processor_count
    size = 2**18
    values = torch.rand(size)
    return size / interleaved({"roots": lambda: values.sqrt_()}, runs=5)["roots"]["p20"]


@cache
def copy_rate() -> float:
    """Bytes read and written a millisecond by a large copy."""
    device, size = ("cuda", 2**28) if torch.cuda.is_available() else ("cpu", 2**26)
    source, to = torch.rand(size, device=device), torch.empty(size, device=device)
    return 8 * size / interleaved({"copy": lambda: to.copy_(source)}, runs=5)["copy"]["p20"]


def cross_floor(target: Tensor, tasks: RaggedTasks, precision: str) -> float:
    """Milliseconds that the products with all tasks take at the rate of one large product, or a read of the features.

    The roots come on top on a CPU, whose units do either; a GPU's special-function units work beside its tensor cores.
    """
    num_pairs = len(target) * len(tasks.features)
    products = 2 * num_pairs * target.shape[1] / product_rate(precision)
    roots = num_pairs / root_rate()
    work = max(products, roots) if target.is_cuda else products + roots
    return max(work, tasks.features.numel() * tasks.features.element_size() / copy_rate())


def _error_and_peak(function: Callable[[], Tensor], exact: Tensor) -> tuple[float, float]:
    """Return the largest error, and the most that was held beside the inputs in MB."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = function()
        peak = float(torch.cuda.max_memory_allocated() - before)
    else:
        with profile(profile_memory=True) as profiled:
            found = function()
        events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = peak = 0.0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            peak = max(peak, now)
    return float((found[: len(exact)].double() - exact).abs().max()), round(peak / 1e6, 1)
