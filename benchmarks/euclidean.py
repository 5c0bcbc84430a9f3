"""Euclidean distances of one target to T ragged tasks, beside plain torch.

python -m benchmarks.euclidean [--quick]
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.distances import Workload, is_quick, measure
from headstart.kernels import naive
from headstart.kernels.euclidean import euclidean_distances
from headstart.kernels.ragged import RaggedTasks


def mean_contenders(target: Tensor, tasks: RaggedTasks) -> dict[str, Callable[[], Tensor]]:
    """Between the tasks' mean features: ours, a loop over means, and one scatter-add."""

    def loop() -> Tensor:
        centre = target.mean(0)
        return torch.stack([(tasks.task(t).mean(0) - centre).norm() for t in range(tasks.num_tasks)])

    owner = torch.repeat_interleave(torch.arange(tasks.num_tasks), tasks.sizes.cpu()).to(target.device)

    def scatter() -> Tensor:
        sums = torch.zeros(tasks.num_tasks, target.shape[1], device=target.device)
        sums.index_add_(0, owner, tasks.features)
        return (sums / tasks.sizes.to(target.device)[:, None] - target.mean(0)).norm(dim=1)

    found = {"headstart": lambda: euclidean_distances(target, tasks), "index_add": scatter}
    # 20 s a run for a million tasks, and 5 s of launches on CUDA for a tenth of them, which would tell nothing new.
    return found if tasks.num_tasks > (10_000 if target.is_cuda else 100_000) else {**found, "loop": loop}


def pairs_contenders(target: Tensor, tasks: RaggedTasks) -> dict[str, Callable[[], Tensor]]:
    """Over all pairs of rows: ours and a loop over torch.cdist."""

    def loop() -> Tensor:
        return torch.stack([torch.cdist(target, tasks.task(t)).mean() for t in range(tasks.num_tasks)])

    return {"headstart": lambda: euclidean_distances(target, tasks, form="pairs"), "cdist loop": loop}


def main(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure, append the rows, and return them."""
    few = [Workload(num_tasks=512, rows=110, dim=256, num_target=220)]
    many = [
        Workload(num_tasks=100_000, rows=4, dim=256, num_target=220),
        Workload(num_tasks=1_000_000, rows=2, dim=64, num_target=220),  # half a gigabyte of features
    ]
    rows = measure(
        "euclidean-mean", few if quick else few + many, mean_contenders, partial(naive.euclidean_distances, form="mean")
    )
    return rows + measure("euclidean-pairs", few, pairs_contenders, partial(naive.euclidean_distances, form="pairs"))


if __name__ == "__main__":
    main(quick=is_quick(__doc__))
