"""The nearest rows of many ragged tasks to each row of a target."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from headstart.kernels import dispatch
from headstart.kernels.engine import sweep
from headstart.kernels.engine.precision import PRECISIONS, ROUNDED, resolve_precision
from headstart.kernels.ragged import RaggedTasks, check_alike, check_finite, common_centre


class Neighbours(NamedTuple):
    """The k nearest rows of each target row, nearest first; equal distances by the number of the row."""

    distances: Tensor
    """||x_i - y||_2, [N, k], or [T, N, k] a task."""
    rows: Tensor
    """Row numbers in `tasks.features`, int64, of the same shape."""
    tasks: Tensor
    """The tasks that the rows belong to, int64, of the same shape."""


def nearest_neighbours(
    target: Tensor,
    tasks: RaggedTasks,
    k: int = 1,
    *,
    per_task: bool = False,
    precision: str | None = None,
    memory: int | None = None,
) -> Neighbours:
    """The k nearest of all tasks' rows to each row of a target [N, D]; with `per_task`, the k nearest of each task.

        nearest_neighbours(target, tasks)                        # argmin over sum n_t rows
        nearest_neighbours(target, tasks, 5, per_task=True)      # [T, N, 5]

    `naive.nearest_neighbours` is the definition. Products at `precision` (default: fp64 for float64 features, else
    fp32) choose candidates, more than k of them; their distances are computed again from the differences of the rows
    as given, in float32 at least, and decide. So a distance is that of its row, whatever the precision, and a row that
    is missed is nearer by less than the precision's error. `memory` bounds, in bytes, what is held beside the inputs
    and results of N (k + 40) numbers.

    ValueError: a target of another D, dtype or device, or without rows, or not finite; k below 1, or above the number
    of rows; a precision that is not accepted; a bound that cannot hold one tile.
    """
    check_alike(target, tasks)
    precision = resolve_precision(precision, target.dtype)
    most = tasks.smallest if per_task else len(tasks.features)
    if not 1 <= k <= most:
        where = "in the smallest task" if per_task else "in all tasks"
        raise ValueError(f"k is {k}; accepted: 1 to {most}, the rows {where}")
    distances, rows = _search(target, tasks.features, tasks.offsets, k, per_task, precision, memory)
    owner = torch.searchsorted(tasks.offsets.to(rows.device), rows, right=True) - 1
    return Neighbours(distances, rows, owner)


@torch.library.custom_op("headstart::nearest_neighbours", mutates_args=())
def _search(
    target: Tensor, features: Tensor, offsets: Tensor, k: int, per_task: bool, precision: str, memory: int | None
) -> tuple[Tensor, Tensor]:
    check_finite(target)
    path, reason = dispatch.choose(target.device, precision, target.shape[1])
    if path == "streamed" or (path == "fused" and k > 1):
        path, reason = "eager", f"{path} has no search for k = {k}"
    bounds = offsets.tolist() if per_task else [0, len(features)]
    with dispatch.Watch("neighbours", target.device, path, reason, precision) as watch:
        centre = common_centre(features) if precision in ROUNDED or path == "fused" else None
        engine = sweep.Sweep(target, len(features), sweep.Value("squared"), precision, memory, centre)
        watch.planned = engine.planned
        found = [_nearest(engine, target, features[start:end], k, path, memory) for start, end in pairwise(bounds)]
    distances = torch.stack([each[0] for each in found])
    rows = torch.stack([each[1] + start for each, start in zip(found, bounds[:-1], strict=True)])
    return (distances, rows) if per_task else (distances[0], rows[0])


@_search.register_fake
def _(
    target: Tensor, features: Tensor, offsets: Tensor, k: int, per_task: bool, precision: str, memory: int | None
) -> tuple[Tensor, Tensor]:
    shape = (len(offsets) - 1, len(target), k) if per_task else (len(target), k)
    return target.new_empty(shape, dtype=PRECISIONS[precision]), target.new_empty(shape, dtype=torch.int64)


def _nearest(
    engine: sweep.Sweep, target: Tensor, features: Tensor, k: int, path: str, memory: int | None
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of features to each target row: (distances [N, k], rows [N, k])."""
    # Enough beyond k that a row within the products' error of the k-th is among them.
    wanted = min(len(features), k + 8 if engine.precision not in ROUNDED else 4 * k + 32)
    if path == "fused":
        from headstart.kernels.engine import gpu  # Triton, which other paths do not need

        assert engine.centre is not None
        candidates = gpu.nearest_rows(target, features, engine.centre, engine.precision, memory, wanted)
    else:
        candidates = _candidates(engine, target, features, wanted)
    return _ranked(target, features, candidates, k, engine)


def _candidates(engine: sweep.Sweep, target: Tensor, features: Tensor, wanted: int) -> Tensor:
    """The `wanted` rows of features nearest to each target row by the engine's products, [N, wanted], in no order."""
    best = torch.full((len(target), wanted), torch.inf, dtype=engine.dtype, device=target.device)
    rows = torch.zeros(len(target), wanted, dtype=torch.int64, device=target.device)
    # The target's rows are the tiles' rows, so that each is searched where it lies.
    for tile in engine.tiles(features, target):
        mine = slice(tile.row, tile.row + len(tile.squares))
        values, inside = _smallest(tile.squares, min(wanted, tile.squares.shape[1]))
        # Those found before come first: a stable sort keeps the lower row where distances are equal.
        values = torch.cat([best[mine], values], 1)
        numbers = torch.cat([rows[mine], inside + tile.column], 1)
        values, order = values.sort(stable=True, dim=1)
        best[mine] = values[:, :wanted]
        rows[mine] = numbers.gather(1, order)[:, :wanted]
    return rows


def _smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row of values [R, W], ascending, and their places, the lowest places where values tie."""
    width = values.shape[1]
    found, places = values.topk(min(k + 1, width), dim=1, largest=False)
    # topk takes any of equal values: in order of place where it took all, by a stable sort where it had to choose.
    places, order = places.sort(1)
    found, again = found.gather(1, order).sort(stable=True, dim=1)
    places = places.gather(1, again)
    if k < width:
        tied = (found[:, k - 1] == found[:, k]).nonzero().flatten()
        if len(tied):
            ordered, where = values[tied].sort(stable=True, dim=1)
            found[tied, :k], places[tied, :k] = ordered[:, :k], where[:, :k]
    return found[:, :k], places[:, :k]


def _ranked(target: Tensor, features: Tensor, candidates: Tensor, k: int, engine: sweep.Sweep) -> tuple[Tensor, Tensor]:
    """The nearest k of candidates [N, K] by their distances, which are computed from differences."""
    candidates = candidates.sort(1).values
    distances = torch.empty(candidates.shape, dtype=engine.dtype, device=target.device)
    step = max(1, engine.pairs // candidates.shape[1])
    for start in range(0, len(target), step):
        rows = features[candidates[start : start + step]].to(engine.wide)
        difference = rows.sub_(target[start : start + step, None].to(engine.wide))
        distances[start : start + step] = torch.linalg.vector_norm(difference, dim=2)
    distances, order = distances.sort(stable=True, dim=1)
    return distances[:, :k].contiguous(), candidates.gather(1, order)[:, :k].contiguous()
