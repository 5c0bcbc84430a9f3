"""The nearest rows of a ragged set to each row of a target, beside cdist and topk, and faiss where it is installed.

python -m benchmarks.neighbours [--quick]
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.distances import Workload, cross_floor, is_quick, measure
from headstart.kernels import naive
from headstart.kernels.neighbours import nearest_neighbours
from headstart.kernels.ragged import RaggedTasks

K = 10
CHECKED_ROWS = 256
"""Rows of the target whose nearest rows are compared with the definition's, which needs all tasks."""


def matrix(target: Tensor, tasks: RaggedTasks, k: int) -> Tensor:
    """Return the distances [N, k] by the whole matrix of distances."""
    return torch.cdist(target, tasks.features).topk(k, dim=1, largest=False).values


def chunks(target: Tensor, tasks: RaggedTasks, k: int) -> Tensor:
    """Return the distances [N, k], 4,096 rows at a time."""
    best = torch.empty(len(target), 0, device=target.device)
    for rows in tasks.features.split(4096):
        best = torch.cat([best, torch.cdist(target, rows)], 1).topk(k, dim=1, largest=False).values
    return best


def contenders(target: Tensor, tasks: RaggedTasks) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, ours first."""
    found: dict[str, Callable[[], Tensor]] = {}
    for k in (1, K):
        for precision in ("bf16", "fp32") if target.is_cuda else ("fp32", "bf16"):
            ours = partial(nearest_neighbours, target, tasks, k, precision=precision)
            found[f"headstart k={k} {precision}"] = lambda ours=ours: ours().distances[:, :1]  # type: ignore[misc]
    found[f"cdist + topk k={K}"] = lambda: matrix(target, tasks, K)[:, :1]
    found[f"chunked cdist + topk k={K}"] = lambda: chunks(target, tasks, K)[:, :1]
    if not target.is_cuda:
        try:
            import faiss
        except ImportError:
            return found
        index = faiss.IndexFlatL2(target.shape[1])
        index.add(tasks.features.numpy())
        found[f"faiss flat k={K}"] = lambda: torch.from_numpy(index.search(target.numpy(), K)[0]).sqrt()[:, :1]
    return found


def main(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure, append the rows, and return them; the error is that of the nearest row's distance."""
    if torch.cuda.is_available():
        workloads = [Workload(num_tasks=64, rows=4096, dim=dim, num_target=4096) for dim in (256, 2048)]
    else:
        workloads = [Workload(num_tasks=8, rows=1024, dim=dim, num_target=1024) for dim in (256, 1280)]

    def nearest(target: Tensor, tasks: RaggedTasks) -> Tensor:
        return naive.nearest_neighbours(target[:CHECKED_ROWS], tasks.features, 1)[0]

    some = workloads[:1] if quick else workloads
    most = max(workload.num_tasks for workload in some)
    return measure("neighbours", some, contenders, nearest, floor=cross_floor, checked_tasks=most)


if __name__ == "__main__":
    main(quick=is_quick(__doc__))
