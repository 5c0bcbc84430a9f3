"""Energy distances between a target and many ragged tasks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.kernels.ragged import RaggedTasks, check_target
from headstart.kernels.tile import check_memory, cross_sums, resolve_precision, self_sums


@dataclass(frozen=True, kw_only=True, eq=False)
class SelfTerms:
    """The part of an energy distance that a task brings by itself, worth keeping beside the tasks.

    The centre that it was computed with lies amid the task's own rows, so it serves every target.
    """

    sums: Tensor
    """sum_ij |y_i - y_j| of each task, [T] float64."""
    sizes: Tensor
    """Rows of each task, [T] int64 on the CPU."""
    precision: str
    """The precision that it was computed with; another is refused, because its errors would not cancel."""


def energy_self_terms(tasks: RaggedTasks, *, precision: str | None = None, memory: int | None = None) -> SelfTerms:
    """The self terms of T tasks, for `energy_distances(..., self_terms=...)` with many targets.

    Cost: sum n_t^2 D multiplications. Errors as for `energy_distances`.
    """
    precision = resolve_precision(precision, tasks.features.dtype)
    return SelfTerms(
        sums=self_sums(tasks.features, tasks.offsets, precision=precision, memory=memory),
        sizes=tasks.sizes,
        precision=precision,
    )


def energy_distances(
    target: Tensor,
    tasks: RaggedTasks,
    *,
    unbiased: bool = False,
    precision: str | None = None,
    memory: int | None = None,
    self_terms: SelfTerms | None = None,
) -> Tensor:
    """Energy distance of a target x [N, D] to each of T ragged tasks y [n_t, D], as [T]; smaller is closer.

        2 mean_ij |x_i - y_j|  -  mean_ij |x_i - x_j|  -  mean_ij |y_i - y_j|

        energy_distances(target, tasks)                    # V-statistic: 0 for X itself, never negative
        energy_distances(target, tasks, unbiased=True)     # U-statistic: may be negative; needs two rows a task

    No root is taken: the root is the metric. Székely and Rizzo, Journal of Statistical Planning and Inference 143
    (2013) 1249-1272; `naive.energy_distances` is the definition.

    `precision` is "fp32" or "fp64" (default: as the features, and fp32 for 16-bit ones), and is the result's dtype.
    `memory` bounds, in bytes, what is held beside the inputs and what is as long as T or the sum of n_t (default
    256 MiB): it changes the time and no bit of the result, and d(X, X) is exactly 0. `self_terms` spares the tasks'
    own part, half of the work when n_t is about N. Not differentiable.

    Error: some sqrt(D) u of the mean distance in each of the three means, u = 6e-8 for fp32 and 1.1e-16 for fp64.
    ValueError: a target of another D, dtype or device, without rows, or not finite; a precision that is not accepted;
    a bound that cannot hold one tile; self terms of other tasks or another precision; one row with `unbiased`; rows
    so far apart that squares overflow.
    """
    check_target(target, tasks)
    precision = resolve_precision(precision, target.dtype)
    num_target, sizes = len(target), tasks.sizes.to(target.device, torch.float64)
    if unbiased:
        _check_two_rows(num_target, tasks.sizes)
    check_memory(target, max(num_target, int(tasks.sizes.max())), precision, memory)
    if self_terms is None:
        self_terms = energy_self_terms(tasks, precision=precision, memory=memory)
    elif self_terms.precision != precision or not torch.equal(self_terms.sizes, tasks.sizes):
        raise ValueError(
            f"self terms are those of {len(self_terms.sizes)} tasks at {self_terms.precision}; accepted: those of "
            f"these {tasks.num_tasks} tasks at {precision}"
        )
    cross = cross_sums(target, tasks, precision=precision, memory=memory) / (num_target * sizes)
    target_sum = self_sums(target, torch.tensor([0, num_target]), precision=precision, memory=memory)
    less = 1 if unbiased else 0
    target_mean = target_sum / float(num_target * (num_target - less))
    task_means = self_terms.sums.to(target.device) / (sizes * (sizes - less))
    # In this order equal terms cancel exactly.
    distances = (cross - target_mean) + (cross - task_means)
    if not unbiased:
        distances.clamp_(min=0)  # what rounding leaves of a value that cannot be negative
    return distances.to(torch.float64 if precision == "fp64" else torch.float32)


def _check_two_rows(num_target: int, task_sizes: Tensor) -> None:
    if num_target < 2:
        raise ValueError("target has one row; accepted with unbiased=True: at least two")
    if bool((task_sizes < 2).any()):
        task = int((task_sizes < 2).nonzero()[0])
        raise ValueError(f"task {task} has one row; accepted with unbiased=True: at least two a task")
