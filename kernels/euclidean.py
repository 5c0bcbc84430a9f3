"""Euclidean distances between a target and many ragged tasks, and the nearest of them."""

from collections import defaultdict
from typing import Literal

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine.memory import fit_memory
from headstart.kernels.engine.pairs import pair_sums
from headstart.kernels.engine.precision import PRECISIONS, as_result, resolve_precision
from headstart.kernels.engine.terms import NONE, needed_centre
from headstart.kernels.ragged import (
    BLOCK_ROWS,
    RaggedTasks,
    block_means,
    check_alike,
    check_bytes,
    check_finite,
    check_tensor,
    check_whole,
    common_centre,
)

_CHUNK = defaultdict(lambda: 2**26, cpu=2**20)
"""Numbers of the features that the `mean` form takes at a time: more would leave the CPU's cache; on CUDA fewer would
be launches alone."""


def euclidean_distances(
    target: Tensor,
    tasks: RaggedTasks,
    *,
    form: Literal["mean", "pairs"] = "mean",
    precision: str | None = None,
    memory: int | None = None,
) -> Tensor:
    """Euclidean distance of a target x [N, D] to each of T ragged tasks y [n_t, D], as [T]; smaller is closer.

        mean:  ||mean(y) - mean(x)||_2 = sqrt(sum_i (ys_i - xt_i)^2), the distance of the tasks' mean features
        pairs: mean_ij ||x_i - y_j||_2

        euclidean_distances(target, tasks)                  # one pass over the features; T up to a million
        euclidean_distances(target, tasks, form="pairs")    # N * sum n_t * D multiplications

    `naive.euclidean_distances` is the definition. `precision` is one of `engine.precision.PRECISIONS` (default: fp64
    for float64 features, else fp32); `mean` has no products, and is at least as exact as fp32. `memory` bounds, in
    bytes, what is held beside the inputs and what is as long as T or the sum of n_t (default 256 MiB, for `pairs` 4 GiB
    on a GPU's own paths, or more where less cannot do); it changes the time and no bit of the result. For `mean`,
    d(X, X) is exactly 0. `pairs` is differentiable with respect to the target.

    Error: for `mean` at most 512 u times the mean distance of the rows from their centre, u = 6e-8 for fp32 and 1.1e-16
    for fp64; for `pairs` some sqrt(D) u of the result. Squares below the least normal number lose their digits: means
    nearer than 1e-154, or with `pairs` rows nearer than 1e-19 (1e-154 for fp64), may count as equal.
    ValueError: a target of another D, dtype or device, or without rows, or not finite; a form or precision that is not
    accepted; a bound that is too small; rows so far apart that they, or with `pairs` squares, overflow.
    """
    check_alike(target, tasks)
    check_bytes(memory)
    precision = resolve_precision(precision, target.dtype)
    if form == "mean":
        means: Tensor = _mean_distances(target, tasks.features, tasks.offsets, precision, memory)
        return means
    if form == "pairs":
        centre = needed_centre(tasks, precision, dispatch.choose(target.device, precision, tasks.num_features)[0])
        how = (centre, NONE, "distance", precision, memory)
        sums: Tensor = pair_sums(target, tasks.features, tasks.offsets, *how, False)[0]
        return (sums / (len(target) * tasks.sizes.to(target.device))).to(PRECISIONS[precision])
    raise ValueError(f"form is {form!r}; accepted: mean, pairs")


def topk(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of distances [T], ascending, and their indices: (values [k], indices [k] int64).

    Equal distances come in the order of their indices, on every device. ValueError: k outside 1 to T, or a NaN.
    """
    check_tensor("distances", distances)
    check_whole("k", k, "1 to T")
    if distances.ndim != 1 or not 1 <= k <= len(distances):
        raise ValueError(f"k is {k} for distances {list(distances.shape)}; accepted: distances [T] and k from 1 to T")
    if bool(distances.isnan().any()):
        raise ValueError(f"distance {int(distances.isnan().nonzero()[0])} is NaN; accepted: numbers")
    # All that the k-th distance ties with, then a stable sort of those few.
    candidates = (distances <= distances.kthvalue(k).values).nonzero().flatten()
    values, order = distances[candidates].sort(stable=True)
    return values[:k], candidates[order[:k]]


@torch.library.custom_op("headstart::mean_distances", mutates_args=())
def _mean_distances(target: Tensor, features: Tensor, offsets: Tensor, precision: str, memory: int | None) -> Tensor:
    """||mean(y) - mean(x)||_2 for every task, from sums of rows less one common centre."""
    check_finite(target)
    dtype, dim, num_tasks = PRECISIONS[precision], features.shape[1], len(offsets) - 1
    # A row less its centre, once more where it is converted, and, of tasks of one row, sums and means in float64.
    row_bytes = dim * (4 * torch.promote_types(target.dtype, dtype).itemsize + 16) + 64
    memory = fit_memory(memory, BLOCK_ROWS * row_bytes)
    chunk_rows = max(BLOCK_ROWS, min(memory // row_bytes, _CHUNK[target.device.type] // dim))
    with dispatch.Watch("mean distances", target.device, precision=precision) as watch:
        watch.planned = min(chunk_rows, max(len(target), len(features))) * row_bytes
        centre = common_centre(target)
        target_mean = block_means(target, torch.tensor([0, len(target)]), centre, dtype, chunk_rows)[0]
        distances, low = [], 0
        while low < num_tasks:
            # As many tasks as fit, and at least one.
            high = int(torch.searchsorted(offsets, offsets[low] + chunk_rows, right=True)) - 1
            high = max(low + 1, high)
            rows = features[int(offsets[low]) : int(offsets[high])]
            means = block_means(rows, offsets[low : high + 1] - offsets[low], centre, dtype, chunk_rows)
            distances.append(torch.linalg.vector_norm(means.sub_(target_mean), dim=1))
            low = high
        return as_result(torch.cat(distances), precision)


@_mean_distances.register_fake
def _(target: Tensor, features: Tensor, offsets: Tensor, precision: str, memory: int | None) -> Tensor:
    return target.new_empty(offsets.shape[0] - 1, dtype=PRECISIONS[precision])
