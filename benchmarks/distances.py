"""What the benchmarks of the task distances share: ragged workloads, timing in turn, correctness beside each row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.rows import append_rows, interleaved
from headstart.kernels.ragged import RaggedTasks

Contenders = Callable[[Tensor, RaggedTasks], dict[str, Callable[[], Tensor]]]


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
        features = torch.randn(int(offsets[-1]), self.dim, generator=generator).relu()
        target = torch.randn(self.num_target, self.dim, generator=generator).add(0.1).relu()
        return target.to(device), RaggedTasks(features.to(device), offsets.to(device))


def measure(
    name: str,
    workloads: Sequence[Workload],
    contenders: Contenders,
    definition: Callable[[Tensor, RaggedTasks], Tensor],
) -> list[dict[str, Any]]:
    """Time the contenders in turn on each workload, append the rows, print them and return them.

    The first contender is ours; `speedup` is a contender's median over ours, so that above 1 ours is faster.
    `max_error` is against the definition in float64.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for workload in workloads:
        target, tasks = workload.make(device)
        exact = definition(target.double(), RaggedTasks(tasks.features.double(), tasks.offsets))
        timed = contenders(target, tasks)
        times = interleaved(timed)
        ours = times[next(iter(timed))]["p50"]
        for contender, function in timed.items():
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
                    "speedup": round(times[contender]["p50"] / ours, 3),
                    "max_error": f"{error:.3g}",
                    "peak_mb": peak,
                }
            )
    append_rows(name, rows)
    print_rows(name, rows)
    return rows


def print_rows(name: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as a short table."""
    table = Table(title=name, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)


def _error_and_peak(function: Callable[[], Tensor], exact: Tensor) -> tuple[float, float | str]:
    """Return the largest error and, on a GPU, the peak of memory in MB; the CPU's allocator does not tell."""
    if not torch.cuda.is_available():
        return float((function().double() - exact).abs().max()), ""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = function()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return float((found.double() - exact).abs().max()), round(peak, 1)
