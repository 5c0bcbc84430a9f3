"""The specification: every task distance written out plainly, one task at a time, with the whole [N, n_t] matrix.

These functions compute in the dtype that they are given; in float64 they are what every other path is held to.
They are slow and hold everything in memory: use `headstart.kernels.energy` and `headstart.kernels.euclidean`.

    naive.energy_distances(target.double(), RaggedTasks(features.double(), offsets))   # [T]
"""

from typing import Literal

import torch
from torch import Tensor

from headstart.kernels.ragged import RaggedTasks


def pairwise(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j||_2 for x [N, D] and y [M, D], as [N, M], from the differences themselves.

    Not from |x|^2 + |y|^2 - 2 x.y, which loses a distance that is small beside the norms.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def euclidean_distances(target: Tensor, tasks: RaggedTasks, *, form: Literal["mean", "pairs"] = "mean") -> Tensor:
    """Euclidean distance of a target [N, D] to each of T tasks, as [T].

    - `mean`: ||mean(x_s) - mean(x_t)||_2 = sqrt(sum_i (xs_i - xt_i)^2) between the tasks' mean features, the
      textbook's distance between two tasks' feature vectors.
    - `pairs`: mean over all pairs of rows of ||x_s - x_t||_2.
    """
    distances = []
    for t in range(tasks.num_tasks):
        source = tasks.task(t)
        if form == "mean":
            distances.append((source.mean(0) - target.mean(0)).square().sum().sqrt())
        else:
            distances.append(pairwise(target, source).mean())
    return torch.stack(distances)


def energy_distances(target: Tensor, tasks: RaggedTasks, *, unbiased: bool = False) -> Tensor:
    """Energy distance of a target x [N, D] to each of T tasks y [n_t, D], as [T]; no root is taken.

        2 mean_ij |x_i - y_j|  -  mean_ij |x_i - x_j|  -  mean_ij |y_i - y_j|

    The default is the V-statistic: all N^2 and n_t^2 pairs count, a row with itself too, so that d(X, X) = 0 and no
    value is negative. `unbiased` leaves the pairs of a row with itself out of the divisor, N (N - 1) and
    n_t (n_t - 1): the U-statistic, whose expectation is the distance of the populations and which may be negative.

    Source: G. J. Székely and M. L. Rizzo, "Energy statistics: A class of statistics based on distances", Journal of
    Statistical Planning and Inference 143 (2013) 1249-1272, equation (6.1) without its factor nm / (n + m).
    """
    distances = []
    for t in range(tasks.num_tasks):
        source = tasks.task(t)
        cross = pairwise(target, source).mean()
        distances.append(2 * cross - _within(target, unbiased) - _within(source, unbiased))
    return torch.stack(distances)


def _within(x: Tensor, unbiased: bool) -> Tensor:
    num_rows = len(x)
    return pairwise(x, x).sum() / (num_rows * (num_rows - 1 if unbiased else num_rows))
