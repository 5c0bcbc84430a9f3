"""Sinkhorn divergences of one target to T ragged tasks, beside a loop over geomloss.

python -m benchmarks.sinkhorn [--quick]
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.distances import Workload, is_quick, measure
from headstart.kernels import naive
from headstart.kernels.ragged import RaggedTasks
from headstart.kernels.sinkhorn import default_epsilon, sinkhorn_distances, sinkhorn_self_terms


def contenders(target: Tensor, tasks: RaggedTasks) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, ours first, all at the same epsilon."""
    epsilon = default_epsilon(target)
    kept = sinkhorn_self_terms(tasks, epsilon=epsilon)
    found: dict[str, Callable[[], Tensor]] = {
        "headstart": lambda: sinkhorn_distances(target, tasks, epsilon=epsilon).distances,
        "headstart, self terms kept": lambda: (
            sinkhorn_distances(target, tasks, epsilon=epsilon, self_terms=kept).distances
        ),
    }
    try:
        import geomloss
    except ImportError:
        return found
    for scaling in (0.5, 0.9):  # its default, and a slower one whose result is nearer to the definition
        loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=epsilon**0.5, scaling=scaling, backend="tensorized")
        found[f"geomloss loop, scaling {scaling}"] = lambda loss=loss: torch.stack(  # type: ignore[misc]
            [loss(target, tasks.task(t)) for t in range(tasks.num_tasks)]
        )
    return found


def definition(target: Tensor, tasks: RaggedTasks) -> Tensor:
    """Return the distances at the target's own epsilon, in float64."""
    return naive.sinkhorn_distances(target, tasks, epsilon=default_epsilon(target), num_iterations=500)


def main(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure, append the rows, and return them."""
    if torch.cuda.is_available():
        workloads = [Workload(num_tasks=64, rows=512, dim=dim, num_target=512) for dim in (64, 512)]
    else:
        workloads = [
            Workload(num_tasks=64, rows=110, dim=64, num_target=220),
            Workload(num_tasks=64, rows=110, dim=1280, num_target=220),
        ]
    return measure("sinkhorn", workloads[:1] if quick else workloads, contenders, definition, runs=3)


if __name__ == "__main__":
    main(quick=is_quick(__doc__))
