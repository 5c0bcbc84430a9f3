"""Energy distances of one target to T ragged tasks, beside the loop over torch.cdist and padded batched cdist.

python -m benchmarks.energy [--quick]
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.distances import Workload, measure
from headstart.kernels import naive
from headstart.kernels.energy import energy_distances, energy_self_terms
from headstart.kernels.ragged import RaggedTasks


def cdist_loop(target: Tensor, tasks: RaggedTasks, own: Tensor) -> Tensor:
    """A loop over torch.cdist; the self terms of the tasks `own` [T] are given to it, as they are to ours."""
    inner = torch.cdist(target, target).mean()
    cross = [torch.cdist(target, tasks.task(t)).mean() for t in range(tasks.num_tasks)]
    return 2 * torch.stack(cross) - inner - own


def padded_cdist(target: Tensor, tasks: RaggedTasks, own: Tensor) -> Tensor:
    """torch.cdist on tasks padded to the largest, 32 tasks at a time, the padding left out of the sums."""
    inner, cross = torch.cdist(target, target).mean(), []
    for first in range(0, tasks.num_tasks, 32):
        chosen = [tasks.task(t) for t in range(first, min(first + 32, tasks.num_tasks))]
        batch = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        sizes = torch.tensor([len(task) for task in chosen], device=target.device)
        inside = torch.arange(batch.shape[1], device=target.device) < sizes[:, None]
        distances = torch.cdist(target.expand(len(chosen), -1, -1), batch).sum(1)
        cross.append((distances * inside).sum(1) / (sizes * len(target)))
    return 2 * torch.cat(cross) - inner - own


def contenders(target: Tensor, tasks: RaggedTasks) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, ours first."""
    kept = energy_self_terms(tasks)
    own = (kept.sums / (kept.sizes.to(kept.sums.device).double() ** 2)).to(target.dtype)
    return {
        "headstart": lambda: energy_distances(target, tasks, self_terms=kept),
        "cdist loop": lambda: cdist_loop(target, tasks, own),
        "padded cdist": lambda: padded_cdist(target, tasks, own),
    }


def main(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure, append the rows, and return them."""
    workloads = [Workload(num_tasks=512, rows=110, dim=256, num_target=220)]
    if not quick:
        workloads += [
            Workload(num_tasks=1, rows=1024, dim=256, num_target=1024),
            Workload(num_tasks=64, rows=110, dim=64, num_target=220),
            Workload(num_tasks=64, rows=512, dim=1280, num_target=512),
            Workload(num_tasks=512, rows=110, dim=1280, num_target=220),
        ]
    return measure("energy", workloads, contenders, naive.energy_distances)


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
