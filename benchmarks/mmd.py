"""Squared MMD of one target to T ragged tasks, beside a loop over whole kernel matrices.

python -m benchmarks.mmd [--quick]
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.distances import Workload, cross_floor, is_quick, measure
from headstart.kernels import dispatch, naive
from headstart.kernels.engine.terms import SelfTerms
from headstart.kernels.mmd import median_bandwidths, mmd_distances, mmd_self_terms
from headstart.kernels.ragged import RaggedTasks


def kernel_mean(x: Tensor, y: Tensor, bandwidths: Tensor) -> Tensor:
    """Return the mean of the kernel mixture as plain torch computes it: cdist, then one exp a bandwidth."""
    squares = torch.cdist(x, y).square()
    return torch.stack([torch.exp(squares / (-2 * sigma**2)).mean() for sigma in bandwidths]).mean()


def loop(target: Tensor, tasks: RaggedTasks, own: Tensor, bandwidths: Tensor) -> Tensor:
    """A loop over whole kernel matrices; the self terms of the tasks `own` [T] are given to it, as they are to ours."""
    inner = kernel_mean(target, target, bandwidths)
    cross = [kernel_mean(target, tasks.task(t), bandwidths) for t in range(tasks.num_tasks)]
    return inner + own - 2 * torch.stack(cross)


def contenders(target: Tensor, tasks: RaggedTasks) -> dict[str, Callable[[], Tensor]]:
    """Return what is timed, ours first."""
    bandwidths = median_bandwidths(target)
    found: dict[str, Callable[[], Tensor]] = {}
    for precision in ("bf16", "bf16x3", "fp32") if target.is_cuda else ("fp32",):
        found[f"headstart {precision}"] = _ours(target, tasks, bandwidths, precision)
    with dispatch.override("eager"):  # the loop's own terms rest on no program of ours that may fail
        kept = mmd_self_terms(tasks, bandwidths)
    own = (kept.sums / (kept.sizes.to(kept.sums.device).double() ** 2)).to(target.dtype)
    return {**found, "loop": partial(loop, target, tasks, own, bandwidths.to(target))}


def _ours(target: Tensor, tasks: RaggedTasks, bandwidths: Tensor, precision: str) -> Callable[[], Tensor]:
    @cache
    def kept() -> SelfTerms:  # by the first call, so that a precision that fails takes no other with it
        return mmd_self_terms(tasks, bandwidths, precision=precision)

    def call() -> Tensor:
        return mmd_distances(target, tasks, bandwidths=bandwidths, precision=precision, self_terms=kept()).distances

    return call


def definition(target: Tensor, tasks: RaggedTasks) -> Tensor:
    """Return the distances at the target's own bandwidths, in float64."""
    return naive.mmd_distances(target, tasks, median_bandwidths(target))


def main(*, quick: bool = False) -> list[dict[str, Any]]:
    """Measure, append the rows, and return them."""
    if torch.cuda.is_available():
        workloads = [Workload(num_tasks=512, rows=1024, dim=dim, num_target=2048) for dim in (64, 256, 2048)]
    else:
        workloads = [
            Workload(num_tasks=128, rows=110, dim=256, num_target=220),
            Workload(num_tasks=4, rows=1024, dim=512, num_target=1024),
        ]
    return measure("mmd", workloads[:1] if quick else workloads, contenders, definition, floor=cross_floor)


if __name__ == "__main__":
    main(quick=is_quick(__doc__))
